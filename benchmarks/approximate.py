"""How few activation bytes codes reach where no matrix product is run again, at what price and with what error.

    python benchmarks/approximate.py [--models gpt2,smollm2,vit,t5] [--shares 0.25,0.15] [--error 0.05] [--autocast]

Forward and backward alone. For each share, the fastest plan is taken whose activations (the ledger's column, its
maximum) are within that share of plain's and that runs no matrix product, attention or convolution again: once of
rung ``exact``, once of rung ``approximate`` with the gradient's relative L2 error bounded. With ``--autocast`` plain
itself runs in bfloat16 autocast, and the shares are of its own bytes. Times are medians of passes in turns in this one
process, as ratios to plain's; the error is measured against plain's gradient on the same random state. Rows of other models stay in the file.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import slimgrad
from activations import Contender, activations_alone, as_plan, plain_pass
from rows import write_rows
from slimgrad.comparing.zoo import Subject, subject
from slimgrad.types import format_bytes
from slimgrad.verifying.gradient import captured_gradients, relative_error

RESULTS = Path(__file__).parent / "results" / "approximate.jsonl"
MODELS = "gpt2,smollm2,vit,t5"
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution", "attention")
DEAR_S = 1e3  # what running a product again is said to cost
TRIES = 7  # budgets for a share


def products_stay(profile: slimgrad.Profile) -> slimgrad.Profile:
    """The profile of a machine on which products in blocks cost so much that no plan runs one again.

    Outside of blocks nothing is: a loss in chunks takes more calls for the same products.
    """
    variants = {}
    for settings, trace in profile.variants.items():
        dear = np.array([any(p in name for p in PRODUCTS) for name in trace.names])
        in_block = ~trace.op_backward & (trace.op_call >= 0)
        added = np.where(dear[trace.name] & in_block, DEAR_S, 0.0)
        variants[settings] = replace(trace, op_seconds=trace.op_seconds + added)
    return replace(profile, variants=variants)


def within(
    made: Subject, profile: slimgrad.Profile, share: float, **allowed: Any
) -> slimgrad.Plan | None:
    """The fastest plan within ``share`` of plain's activations that runs no product again; None: none was found.

    A budget bounds what is held besides, too (weights in bfloat16 that autocast keeps until forward ends), so the
    largest is looked for, by halving, under which the ledger shows activations within the share.
    """
    plain = int(profile.variants[()].timeline().peak_bytes)
    passes_s = float(profile.variants[()].op_seconds.sum())
    found, low, high, budget = None, share * plain, float(plain), share * plain
    for _ in range(TRIES):
        try:
            plan = slimgrad.plan(profile, int(budget), allow_compile=False, **allowed)
        except slimgrad.BudgetError:
            low = budget
        else:
            is_free = plan.seconds < passes_s + DEAR_S
            is_within = is_free and activation_bytes(made, plan) <= share * plain
            found = plan if is_within else found
            low, high = (low, budget) if is_free and not is_within else (budget, high)
        budget = (low + high) / 2
    return found


def activation_bytes(made: Subject, plan: slimgrad.Plan) -> int:
    """The ledger's highest activations in a pass under the plan."""
    contender = as_plan(made, plan, "")
    contender.measure(made.model, made.batch)
    return contender.row["activation_bytes"]


def gradients(contender: Contender, made: Subject) -> dict[str, torch.Tensor]:
    """The gradient of one pass from a fixed random state."""
    found: dict[str, torch.Tensor] = {}
    run, undo = contender.attach()
    torch.manual_seed(0)
    with captured_gradients(made.model, found):
        run()
    undo()
    return found


def autocast(made: Subject) -> Subject:
    """The same model, its loss taken in bfloat16 autocast."""

    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return made.loss_fn(model, batch)

    return replace(made, loss_fn=loss_fn)


def contenders_of(
    made: Subject, profile: slimgrad.Profile, shares: list[float], error: float
) -> list[Contender]:
    """Plain, and for each share an exact and an approximate plan, where there is one."""
    found = [Contender("plain", lambda: (lambda: plain_pass(made), lambda: None))]
    dear = products_stay(activations_alone(profile))
    base_s = float(dear.variants[()].op_seconds.sum())
    for share in shares:
        label = f"{share:.0%}"
        for allowed in ({"exactness": "exact"}, {"exactness": "approximate", "error": error}):
            plan = within(made, dear, share, **allowed)
            if plan is None:
                print(f"  no {allowed['exactness']} plan within {label}", flush=True)
                continue
            contender = as_plan(made, plan, f"{allowed['exactness']} {label}")
            contender.row["predicted_error"] = plan.predicted_error
            contender.row["predicted_time_ratio"] = 1 + (plan.seconds - base_s) / profile.seconds
            found.append(contender)
    return found


def bench(name: str, shares: list[float], error: float, rounds: int, narrow: bool) -> list[Any]:
    made = autocast(subject(name)) if narrow else subject(name)
    begin = time.perf_counter()
    profile = slimgrad.measure(
        made.model, None, made.loss_fn, made.batch, allow_compile=False, sensitivity=True
    )
    measured = time.perf_counter()
    contenders = contenders_of(made, profile, shares, error)
    planned = time.perf_counter()
    print(f"{name}: measured in {measured - begin:.0f} s, planned in {planned - measured:.0f} s")
    exact = gradients(contenders[0], made)
    for contender in contenders:
        contender.measure(made.model, made.batch)
        contender.row["gradient_error"] = relative_error(gradients(contender, made), exact)
    del exact
    for _ in range(rounds):
        for contender in contenders:
            contender.turn()
    return [row_of(f"{name} bf16" if narrow else name, c, contenders[0]) for c in contenders]


def row_of(model: str, contender: Contender, plain: Contender) -> dict[str, Any]:
    row = {"model": model, "contender": contender.name, **contender.row}
    row["activation_ratio"] = row["activation_bytes"] / plain.row["activation_bytes"]
    row["time_s"] = median(contender.times_s)
    row["time_ratio"] = row["time_s"] / median(plain.times_s)
    print(
        f"  {contender.name:16} activations {format_bytes(row['activation_bytes']):>10} "
        f"({row['activation_ratio']:.3f}) peak {format_bytes(row['peak_bytes']):>10} time {row['time_ratio']:.2f} "
        f"(predicted {row.get('predicted_time_ratio', 1):.2f}) gradient error {row['gradient_error']:.4f} "
        f"(predicted {row.get('predicted_error', 0):.4f})  {', '.join(row.get('methods', ()))}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--shares", default="0.25,0.15")
    parser.add_argument("--error", type=float, default=0.05)
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    shares = [float(share) for share in chosen.shares.split(",")]
    asked = shares, chosen.error, chosen.rounds, chosen.autocast
    groups = (bench(name, *asked) for name in chosen.models.split(","))
    write_rows(chosen.out, groups, key=("model",))


if __name__ == "__main__":
    main()
