"""Write docs/adapters.md from the rows of benchmarks/adapters.py: ``python tools/adapters.py [--check]``.

With ``--check`` nothing is written: the exit code is 1 if the page differs from what would be written.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from pages import asked_to_check, rows_in, table, written_or_checked

from slimgrad.types import format_bytes

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "adapters.jsonl"
PAGE = ROOT / "docs" / "adapters.md"
NUM_PARTS = 4  # of a run, whose losses are averaged each
NOTE = (
    "<!-- Written by tools/adapters.py from benchmarks/results/adapters.jsonl: run `make docs`. -->"
)
INTRODUCTION = """\
SmolLM2-135M, pretrained, learns Python's documentation (`python benchmarks/adapters.py`): one window of tokens a step,
float32, AdamW. `full` trains every parameter, `lora` adapters of rank 8 beside all linear layers. `velora` (codes of all
that matrix products alone read, pieces of 32), `low_memory_bp` (ReSiLU2 and memory-sharing norms), `lemo` and `random` (half
of the tokens from layer 4 on, in blocks of 64: those that predictors find, or drawn) are LoRA with one method more; `meft` is
the model made reversible, with adapters of its own. Ways of one table have the same windows in the same order; those
with LoRA have the same adapters at first. Bytes are the ledger's, in the second step: the largest activations, and the peak
with weights, gradients and the optimizer's state. Held out are three windows of 1,024 tokens, of which every token
counts, whatever was trained on; training's losses of `lemo` and `random` are of the tokens that they keep. The steps are few:
differences of a hundredth of a nat tell little."""

WHY = {
    "meft": "what is left are logits and loss; its function starts farther away (first step), the distance shrinks, and this many "
    "steps are too few to close it",
    "velora": "pieces of every input that matrix products alone read; the adapters' second factor learns from exact inputs",
    "low_memory_bp": "adapters, weights and logits, which it leaves alone, are most of the peak: the share grows with the tokens "
    "of a step",
    "lemo": "three seeds, twelve windows each: predicted blocks are better than drawn ones in the mean, by less than seeds differ",
}

Row = dict[str, Any]


class Runs:
    """Rows of one window's length, by way."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.ways: dict[str, list[Row]] = {}
        for row in rows:
            self.ways.setdefault(row["way"], []).append(row)

    def mean(self, way: str, name: str) -> float:
        """Over seeds."""
        return mean(row[name] for row in self.ways[way])

    def ratio(self, way: str, other: str, name: str) -> float:
        """One way's bytes over another's."""
        return self.mean(way, name) / self.mean(other, name)

    def has(self, *ways: str) -> bool:
        """Whether all of these were run."""
        return all(way in self.ways for way in ways)

    def nats(self, way: str) -> float:
        """Held-out loss above LoRA's with the same seeds."""
        lora = {row["seed"]: row["held_out_loss"] for row in self.ways["lora"]}
        return mean(row["held_out_loss"] - lora[row["seed"]] for row in self.ways[way])


def page(rows: Sequence[Row]) -> str:
    """The page, in Markdown."""
    lengths = sorted({row["tokens"] for row in rows})
    trained = {n: Runs([r for r in rows if r["tokens"] == n and r["steps"] > 2]) for n in lengths}
    alone = {n: Runs([r for r in rows if r["tokens"] == n]) for n in lengths}
    parts = ["# Ways of fine-tuning a language model", NOTE, INTRODUCTION]
    for length, runs in trained.items():
        if runs.ways:
            parts += _trained(length, runs)
    parts += ["## Bytes of a step", _bytes(alone)]
    header = ("method", "its paper's claim", "here", "why")
    parts += ["## Claims", table(header, _claims(trained, alone))]
    return "\n\n".join(parts) + "\n"


def _trained(length: int, runs: Runs) -> list[str]:
    first = next(iter(runs.ways.values()))[0]
    steps = first["steps"]
    size = steps // NUM_PARTS
    spans = [(i * size, (i + 1) * size) for i in range(NUM_PARTS)]
    header = (
        "way",
        "rate",
        "first step",
        *(f"steps {a + 1} to {b}" for a, b in spans),
        "held out",
        "above LoRA",
    )
    cells = [
        (
            f"`{way}`",
            f"{group[0]['lr']:g}",
            f"{mean(r['losses'][0] for r in group):.3f}",
            *(f"{mean(mean(r['losses'][a:b]) for r in group):.3f}" for a, b in spans),
            f"{runs.mean(way, 'held_out_loss'):.4f}",
            f"{runs.nats(way):+.4f}",
        )
        for way, group in runs.ways.items()
    ]
    seeds = len({row["seed"] for group in runs.ways.values() for row in group})
    facts = (
        f"{seeds} seed{'s' * (seeds > 1)}, {steps} steps; {first['machine']['processor']}; {first['date']}. "
        f"Held out, before any training: {first['pretrained_loss']:.4f}. Losses in nats a token, of training as means of steps."
    )
    return [f"## Windows of {length:,} tokens", facts, table(header, cells)]


def _bytes(alone: dict[int, Runs]) -> str:
    header = ("way", "tokens", "activations", "of full", "of LoRA", "peak", "of full", "of LoRA")
    return table(
        header,
        [_bytes_of(way, n, runs) for n, runs in alone.items() for way in runs.ways],
    )


def _bytes_of(way: str, length: int, runs: Runs) -> tuple[str, ...]:
    found = [f"`{way}`", f"{length:,}"]
    for name in ("activation_bytes", "peak_bytes"):
        found.append(format_bytes(int(runs.mean(way, name))))
        found += [
            f"{runs.ratio(way, other, name):.2f}" if runs.has(other) else ""
            for other in ("full", "lora")
        ]
    return tuple(found)


def _claims(trained: dict[int, Runs], alone: dict[int, Runs]) -> list[tuple[str, ...]]:
    short, long = (trained[n] for n in sorted(trained) if trained[n].ways)
    held, lora = "activation_bytes", short.mean("lora", "held_out_loss")
    low = short.nats("low_memory_bp") / lora
    found = {
        "meft": (
            "up to 84 % less activation memory than full tuning, the same score",
            f"less than full: {_less(alone, 'meft', 'full', held)}; held-out loss {short.nats('meft'):+.3f} nats from LoRA's",
        ),
        "velora": (
            "activations compressed without degradation (here: perplexity within 2 % of LoRA's)",
            f"perplexity {math.expm1(short.nats('velora')):+.1%}; activations less than LoRA's: {_less(alone, 'velora', 'lora', held)}",
        ),
        "low_memory_bp": (
            "up to 30 % lower peak, comparable accuracy (here: 15 % and more, loss within 2 %)",
            f"lower than LoRA's: peak {_less(alone, 'low_memory_bp', 'lora', 'peak_bytes')}, activations "
            f"{_less(alone, 'low_memory_bp', 'lora', held)}; held-out loss {low:+.1%}",
        ),
        "lemo": (
            "up to 1.93 times less memory (here: activations 1.5 times, loss within 0.05 nats of LoRA's and below random's)",
            f"activations {long.ratio('lora', 'lemo', held):.2f} times less; held-out loss {long.nats('lemo'):+.3f} nats, of "
            f"drawn tokens {long.nats('random'):+.3f}",
        ),
    }
    return [(f"`{way}`", *told, WHY[way]) for way, told in found.items()]


def _less(alone: dict[int, Runs], way: str, than: str, name: str) -> str:
    parts = [
        f"{1 - runs.ratio(way, than, name):.0%} at {n:,} tokens"
        for n, runs in alone.items()
        if runs.has(way, than)
    ]
    return ", ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the page; returns the exit code."""
    return written_or_checked(PAGE, page(rows_in(ROWS)), asked_to_check(__doc__, arguments))


if __name__ == "__main__":
    sys.exit(main())
