"""How few activation bytes, and at what price: forward and backward alone, beside PyTorch's checkpoints.

    python benchmarks/activations.py [--models gpt2,deep] [--rounds 3] [--out benchmarks/results/activations.jsonl]

For each share asked for, the fastest plan is taken whose activations (the ledger's column, its maximum) are within
that share of plain's: the planner is given a profile in which all else weighs nothing. One line a contender; times are medians of passes in turns in this one process, as ratios to
plain's. Every figure is of the machine that the line names.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import slimgrad
from rows import write_rows
from slimgrad.comparing.peers import PEERS, Peer
from slimgrad.comparing.zoo import Subject, subject
from slimgrad.types import Column, format_bytes

RESULTS = Path(__file__).parent / "results" / "activations.jsonl"
SHARES = {"gpt2": (0.5, 0.2, 0.1), "deep": (0.15, 0.05)}
PEER_NAMES = ("checkpoint", "checkpoint-sqrt")


@dataclass
class Contender:
    """One way to run the passes: ``attach`` sets it up and gives the pass and the undo."""

    name: str
    attach: Callable[[], tuple[Callable[[], object], Callable[[], object]]]
    row: dict[str, Any] = field(default_factory=dict)
    times_s: list[float] = field(default_factory=list)

    def measure(self, model: Any, batch: Any) -> None:
        run, undo = self.attach()
        run()
        with slimgrad.Ledger(model, inputs=batch) as ledger:
            run()
        undo()
        self.row |= {
            "peak_bytes": ledger.peak_bytes,
            "activation_bytes": ledger.columns[Column.ACTIVATIONS],
        }

    def turn(self) -> None:
        run, undo = self.attach()
        run()
        begin = time.perf_counter()
        run()
        self.times_s.append(time.perf_counter() - begin)
        undo()


def plain_pass(made: Subject) -> None:
    made.loss_fn(made.model, made.batch).backward()
    for parameter in made.model.parameters():
        parameter.grad = None


def as_peer(made: Subject, peer: Peer) -> Contender:
    return Contender(peer.name, lambda: (lambda: plain_pass(made), peer.attach(made.model, made)))


def as_plan(made: Subject, plan: slimgrad.Plan, name: str) -> Contender:
    def attach() -> Any:
        step = slimgrad.apply(plan, made.model, None, made.loss_fn)
        return (lambda: step(made.batch)), step.undo

    plain = plan.plain_seconds
    row = {
        "predicted_activation_bytes": plan.peak_bytes,
        "predicted_time_ratio": plan.seconds / plain,
        "methods": sorted({choice.method for choice in plan.choices}),
    }
    return Contender(name, attach, row)


def activations_alone(profile: slimgrad.Profile) -> slimgrad.Profile:
    """The profile of a step in which nothing but activations takes memory: budgets then bound those alone.

    What blocks make in forward and let go keeps its size, as a plan may keep it in place of what is saved.
    """
    activation, temporary = map(list(Column).index, (Column.ACTIVATIONS, Column.TEMPORARIES))
    variants = {}
    for settings, trace in profile.variants.items():
        counts = trace.column == activation
        for call in trace.calls:
            is_inside = (trace.birth > call.forward_from) & (trace.birth <= call.forward_to)
            counts |= is_inside & (trace.column == temporary)
        variants[settings] = replace(trace, nbytes=np.where(counts, trace.nbytes, 0))
    return replace(profile, variants=variants, weight_bytes=0)


def within_share(alone: slimgrad.Profile, share: float | None) -> slimgrad.Plan:
    """The fastest plan whose activations are within ``share`` of plain's; None: the leanest."""
    plain = int(alone.variants[()].timeline().peak_bytes)
    try:
        return slimgrad.plan(alone, int(share * plain) if share else "min", allow_compile=False)
    except slimgrad.BudgetError:
        return slimgrad.plan(alone, "min", allow_compile=False)


def bench(name: str, rounds: int) -> list[dict[str, Any]]:
    made = subject(name)
    begin = time.perf_counter()
    profile = slimgrad.measure(made.model, None, made.loss_fn, made.batch, allow_compile=False)
    measuring_s = time.perf_counter() - begin
    contenders = [Contender("plain", lambda: (lambda: plain_pass(made), lambda: None))]
    contenders += [as_peer(made, PEERS[peer]) for peer in PEER_NAMES]
    begin = time.perf_counter()
    alone = activations_alone(profile)
    for share in (*SHARES.get(name, (0.5, 0.2, 0.1)), None):
        label = f"slimgrad {share:.0%}" if share else "slimgrad min"
        contenders.append(as_plan(made, within_share(alone, share), label))
    planning_s = time.perf_counter() - begin
    print(f"{name}: measured in {measuring_s:.0f} s, planned in {planning_s:.0f} s", flush=True)
    for contender in contenders:
        contender.measure(made.model, made.batch)
    for _ in range(rounds):
        for contender in contenders:
            contender.turn()
    plain = contenders[0]
    rows = []
    for contender in contenders:
        row = {"model": name, "contender": contender.name, **contender.row}
        row["activation_ratio"] = row["activation_bytes"] / plain.row["activation_bytes"]
        row["time_s"] = median(contender.times_s)
        row["time_ratio"] = row["time_s"] / median(plain.times_s)
        rows.append(row)
        print(
            f"  {contender.name:16} activations {format_bytes(row['activation_bytes']):>10} "
            f"({row['activation_ratio']:.3f} of plain) peak {format_bytes(row['peak_bytes']):>10} time "
            f"{row['time_ratio']:.2f} (predicted {row.get('predicted_time_ratio', 1):.2f})  "
            f"{', '.join(row.get('methods', ()))}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(SHARES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    groups = (bench(name, chosen.rounds) for name in chosen.models.split(","))
    write_rows(chosen.out, groups, key=("model",))


if __name__ == "__main__":
    main()
