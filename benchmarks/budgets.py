"""Three models under five budgets: predicted peak, measured peak, time against plain, error of the update.

    python benchmarks/budgets.py [--models smollm2,resnet50,lstm] [--pairs 3] [--out benchmarks/results/budgets.jsonl]

One line a model and budget. Every figure is of this machine, which the line names. Times are medians of steps
taken alternately, planned and plain, in this one process; peaks are the ledger's; the error is that of the whole
update after two steps, |dtheta - dtheta_plain| / |dtheta_plain|.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import slimgrad
from rows import write_rows
from slimgrad.training.job import JobSpec, loss_fn, open_job
from slimgrad.types import format_bytes
from slimgrad.verifying.gradient import relative_error
from slimgrad.verifying.snapshot import Snapshot

BUDGETS = ("100%", "75%", "60%", "50%", "min")
RESULTS = Path(__file__).parent / "results" / "budgets.jsonl"


class LstmLm(nn.Module):
    """A three-layer LSTM language model with a tied head."""

    def __init__(self, vocabulary: int = 16384, width: int = 384) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, num_layers=3, batch_first=True)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, T, V]``."""
        return self.head(self.lstm(self.embed(tokens_BT))[0])


def smollm2() -> tuple[nn.Module, Any, Callable[..., Any], Any]:
    job = open_job(JobSpec())
    return job.model, job.optimizer, loss_fn, next(job.batches)


def resnet50() -> tuple[nn.Module, Any, Callable[..., Any], Any]:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(num_labels=1000)).train()
    batch = {"pixel_values": torch.randn(8, 3, 224, 224), "labels": torch.randint(0, 1000, (8,))}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return model, optimizer, lambda m, b: m(**b).loss, batch


def lstm() -> tuple[nn.Module, Any, Callable[..., Any], Any]:
    torch.manual_seed(0)
    model = LstmLm()
    tokens = torch.randint(0, 16384, (16, 129))

    def loss(m: nn.Module, b: Any) -> torch.Tensor:
        logits_BTV = m(b[:, :-1])
        return F.cross_entropy(logits_BTV.reshape(-1, logits_BTV.shape[-1]), b[:, 1:].reshape(-1))

    return model, torch.optim.AdamW(model.parameters(), lr=1e-3), loss, tokens


MODELS = {"smollm2": smollm2, "resnet50": resnet50, "lstm": lstm}


def plain_step(model: nn.Module, optimizer: Any, loss: Any, batch: Any) -> None:
    loss(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def moves(model: nn.Module, snapshot: Snapshot) -> dict[str, torch.Tensor]:
    moved = snapshot.moved()
    return {name: moved[id(p)] for name, p in model.named_parameters()}


def timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def one_budget(
    name: str, parts: Any, profile: Any, budget: str, start: Snapshot, reference: Any, pairs: int
) -> dict[str, Any]:
    model, optimizer, loss, batch = parts
    begin = time.perf_counter()
    try:
        plan = slimgrad.plan(profile, budget)
    except slimgrad.BudgetError as error:
        return {"model": name, "budget": budget, "smallest_bytes": error.smallest_bytes}
    planning_s = time.perf_counter() - begin
    step = slimgrad.apply(plan, model, optimizer, loss)
    peak = 0
    for _ in range(2):
        with step.ledger(batch) as ledger:
            step(batch)
        peak = max(peak, ledger.peak_bytes)
    error = relative_error(moves(model, start), reference)
    slim_s, plain_s = [], []
    for _ in range(pairs):
        slim_s.append(timed(lambda: step(batch)))
        with step.suspended():
            plain_s.append(timed(lambda: plain_step(model, optimizer, loss, batch)))
    step.undo()
    start.restore()
    return {
        "model": name,
        "budget": budget,
        "budget_bytes": plan.budget_bytes,
        "predicted_bytes": plan.peak_bytes,
        "measured_bytes": peak,
        "predicted_time_ratio": plan.seconds / plan.plain_seconds,
        "time_ratio": median(slim_s) / median(plain_s),
        "update_error": error,
        "planning_s": planning_s,
        "methods": sorted({c.method for c in plan.choices}),
    }


def bench(name: str, pairs: int) -> list[dict[str, Any]]:
    parts = MODELS[name]()
    model, optimizer, loss, batch = parts
    profile = slimgrad.measure(model, optimizer, loss, batch)
    start = Snapshot(model, optimizer)
    peak = 0
    for _ in range(2):
        with slimgrad.Ledger(model, optimizer, inputs=batch) as ledger:
            plain_step(model, optimizer, loss, batch)
        peak = max(peak, ledger.peak_bytes)
    reference = moves(model, start)
    start.restore()
    print(f"{name}: plain {format_bytes(peak)}, predicted {format_bytes(profile.peak_bytes)}")
    rows = []
    for budget in BUDGETS:
        row = one_budget(name, parts, profile, budget, start, reference, pairs)
        row |= {"plain_bytes": peak, "plain_predicted_bytes": profile.peak_bytes}
        rows.append(row)
        if "measured_bytes" not in row:
            print(f"  {budget:>5} does not fit: at least {format_bytes(row['smallest_bytes'])}")
            continue
        print(
            f"  {budget:>5} predicted {format_bytes(row['predicted_bytes']):>10} measured "
            f"{format_bytes(row['measured_bytes']):>10} ({row['measured_bytes'] / peak:.0%} of plain) time "
            f"{row['time_ratio']:.2f} (predicted {row['predicted_time_ratio']:.2f}) update error "
            f"{row['update_error']:.1e}  {', '.join(row['methods'])}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    write_rows(chosen.out, (bench(name, chosen.pairs) for name in chosen.models.split(",")))


if __name__ == "__main__":
    main()
