"""Compiled blocks against torch.compile of the whole model, at the same peak: GPT-2's shape, 12 layers.

    python benchmarks/compiled.py [--widths 256,384] [--budgets 60%,45%] [--pairs 3] [--out benchmarks/results/compiled.jsonl]

One line a width and way to train. Peaks are the ledger's and, beside them, the profiler's allocation events over
the same step plus what was there before; times are medians of steps taken in turns with plain ones, in this one
process; errors are those of all gradients together, |g - g_plain| / |g_plain|.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import slimgrad
from rows import write_rows
from slimgrad.comparing.allocations import allocated_peak, held_bytes
from slimgrad.types import format_bytes
from slimgrad.verifying.gradient import captured_gradients, relative_error
from slimgrad.verifying.snapshot import Snapshot

RESULTS = Path(__file__).parent / "results" / "compiled.jsonl"
VOCABULARY, TOKENS, SAMPLES = 8192, 256, 4


def gpt2(width: int) -> tuple[nn.Module, Any, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=TOKENS,
        n_embd=width,
        n_layer=12,
        n_head=width // 64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    words = torch.randint(VOCABULARY, (SAMPLES, TOKENS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return model, optimizer, {"input_ids": words, "labels": words}


def loss_fn(model: Any, batch: Any) -> torch.Tensor:
    return model(**batch).loss


def timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


class Way:
    """One way to run a step, beside plain steps on the same model."""

    def __init__(self, model: nn.Module, optimizer: Any, batch: Any, pairs: int) -> None:
        self.model, self.optimizer, self.batch, self.pairs = model, optimizer, batch, pairs
        self.start = Snapshot(model, optimizer)

    def plain(self, caller: Any = None) -> None:
        loss_fn(self.model if caller is None else caller, self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self, run: Callable[[], object]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        self.start.restore()
        with captured_gradients(self.model, found):
            run()
        return found

    def figures(
        self, run: Callable[[], object], plain: Callable[[], float], step: Any = None
    ) -> dict[str, Any]:
        first_s = timed(run)
        ours = slimgrad.Ledger(self.model, self.optimizer, inputs=self.batch)
        with ours if step is None else step.ledger(self.batch) as ledger:
            run()
        events = allocated_peak(run, held_bytes(self.model, self.optimizer, self.batch))
        plain_s, own_s = [], []
        for _ in range(self.pairs):
            own_s.append(timed(run))
            plain_s.append(plain())
        return {
            "first_step_s": first_s,
            "peak_bytes": ledger.peak_bytes,
            "allocated_peak_bytes": events,
            "time_ratio": median(own_s) / median(plain_s),
        }


def bench(width: int, pairs: int, budgets: list[str]) -> list[dict[str, Any]]:
    model, optimizer, batch = gpt2(width)
    way = Way(model, optimizer, batch, pairs)
    reference = way.gradients(way.plain)

    def plain() -> float:
        return timed(way.plain)

    rows = [{"way": "plain", "gradient_error": 0.0} | way.figures(way.plain, plain)]
    whole = torch.compile(model)
    error = relative_error(way.gradients(lambda: way.plain(whole)), reference)
    figures = way.figures(lambda: way.plain(whole), plain)
    rows.append({"way": "torch.compile", "gradient_error": error} | figures)
    way.start.restore()
    begin = time.perf_counter()
    profile = slimgrad.measure(model, optimizer, loss_fn, batch, allow_compile=True)
    measuring_s = time.perf_counter() - begin
    for budget in (figures["peak_bytes"], *budgets):
        for allow in (True, False):
            named = "the same peak" if isinstance(budget, int) else budget
            row = {"way": f"slimgrad, {named}", "compiled": allow, "measuring_s": measuring_s}
            rows.append(row | planned(way, profile, budget, allow, reference))
    return [row | {"width": width} for row in rows]


def planned(
    way: Way, profile: Any, budget: Any, allow: bool, reference: dict[str, torch.Tensor]
) -> dict[str, Any]:
    try:
        plan = slimgrad.plan(profile, budget, allow_compile=allow)
    except slimgrad.BudgetError as error:
        return {"smallest_bytes": error.smallest_bytes}
    way.start.restore()
    step = slimgrad.apply(plan, way.model, way.optimizer, loss_fn)
    error = relative_error(way.gradients(lambda: step(way.batch)), reference)

    def plain() -> float:
        with step.suspended():
            return timed(way.plain)

    figures = way.figures(lambda: step(way.batch), plain, step)
    step.undo()
    counted: dict[str, int] = {}
    for choice in plan.choices:
        counted[choice.method] = counted.get(choice.method, 0) + 1
    return figures | {
        "gradient_error": error,
        "predicted_bytes": plan.peak_bytes,
        "predicted_time_ratio": plan.seconds / plan.plain_seconds,
        "methods": counted,
    }


def told(rows: list[dict[str, Any]], width: int) -> list[dict[str, Any]]:
    for row in rows:
        if "peak_bytes" not in row:
            print(f"{width} {row['way']}: at least {format_bytes(row['smallest_bytes'])}")
            continue
        print(
            f"{width} {row['way']} {'' if row.get('compiled', True) else '(not compiled)'}: peak "
            f"{format_bytes(row['peak_bytes'])} (events {format_bytes(row['allocated_peak_bytes'])}) time "
            f"{row['time_ratio']:.2f} first step {row['first_step_s']:.1f} s gradient error "
            f"{row['gradient_error']:.1e} {row.get('methods', '')}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", default="256,384")
    parser.add_argument("--budgets", default="60%,45%", help="beside torch.compile's peak")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    budgets = [b for b in chosen.budgets.split(",") if b]
    widths = map(int, chosen.widths.split(","))
    write_rows(chosen.out, (told(bench(width, chosen.pairs, budgets), width) for width in widths))


if __name__ == "__main__":
    main()
