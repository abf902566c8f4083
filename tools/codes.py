"""Write docs/codes.md from the rows of three benchmarks: ``python tools/codes.py [--check]``.

They are benchmarks/finetuning.py's, and those of benchmarks/approximate.py and topics.py in sections of their own
(tools/plans_section.py, tools/topics_section.py).

With ``--check`` nothing is written: the exit code is 1 if the page differs from what would be written.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import plans_section
import topics_section
from pages import asked_to_check, rows_in, table, written_or_checked

from slimgrad.types import format_bytes

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "finetuning.jsonl"
PAGE = ROOT / "docs" / "codes.md"
MOST_ERROR = 10.0  # above it nothing is left of a gradient
LAST = 10  # steps whose losses are averaged as the final one
NOTE = (
    "<!-- Written by tools/codes.py from finetuning.jsonl, approximate.jsonl and topics.jsonl of "
    "benchmarks/results: run `make docs`. -->"
)
INTRODUCTION = """\
What training loses when every block keeps all that a store suits as codes, at one setting and with no regard to a bound
(plans use a code only where the bound on the error allows it). `vit` (4 blocks) and `cnn` (3 blocks) learn scikit-learn's
digits from scratch; `minilm` is pretrained and fine-tuned, every parameter, to tell from 32 tokens which of eight topics
of Python's documentation they are of; `smollm2`, pretrained, is asked for the next of 64 tokens, for its gradient
alone (`python benchmarks/finetuning.py`). Weights, order of batches and draws are exact
training's; figures are means over seeds, differences paired by seed, ± their standard deviation. *Activations*: the ledger's
most, as a part of exact training's. *Error* is the relative
L2 error of the second batch's gradient in the untrained model, *measured before* what `measure(sensitivity=True)` said of it,
on the first batch: the squares of what single blocks bring, added (at most twelve are tried with one setting and three with
each other, which is said to be as much worse in between), and no less than what all blocks at once bring, or as many as
bring no more than the gradient. Batches and draws differ: that is an estimate, not a bound, and what a plan keeps to is
the error on the batch that it was made with. `slim` verifies the gradient of the plan that it made, and plans again for a
smaller error where it is off by more than allowed.
Loss: the mean of the last 10 training steps, against exact training's. Accuracy: points on what was not trained on.

Three ways replace layers, and nothing is measured before: `gradient_filter` in the `last` convolutions (7 are all of them);
`compact` in all linear layers but the classifier, with `CompactAdam` at exact training's rate and at the best of three or
four tried on a seed that no row is of (exact training's rate was not chosen so); `low_memory_bp`, which is `approx_bp` with
`memory_sharing_norm`. The error of `compact` is that of the gradient lifted to the weights' space, which its optimizer does
not use."""
CLAIMS = {
    "mesa": (
        "up to 50 % less training memory at comparable accuracy",
        "1/4 of the bytes of all that has a code; what an attention or a loss keeps beside blocks has none. `group_size` 0 is "
        "one range a tensor; 32, the default, one for each so many channels: the error on a pretrained MiniLM, some of "
        "whose channels are far above the others, is less than half with it",
    ),
    "few_bit": (
        "the same convergence, activation functions' inputs at a few bits an element",
        "the bytes are as told; they are a part of a block's, so that a model's fall by a tenth (`smollm2`) to a quarter (`cnn`)",
    ),
    "approx_bp": (
        "up to 30 % lower peak with memory-sharing norms, comparable accuracy",
        "the gradient is off by a tenth and more, so the default bound of 0.05 seldom allows it; training bears it",
    ),
    "velora": (
        "activations compressed without degradation, in fine-tuning and in pre-training",
        "it covers every linear input in every block here, with one fixed direction each; 50 and 160 steps",
    ),
    "wta_crs": (
        "up to 2.7 times less peak memory with almost no drop of accuracy, in fine-tuning",
        "rows are drawn by the norms of activations alone: gradients' norms are not known when they are stored",
    ),
    "low_memory_bp": (
        "up to 30 % lower peak at comparable accuracy: 2-bit activation functions and memory-sharing norms together",
        "activations alone are told here, not the peak; norms are exact, so that the error is that of `approx_bp`, and save "
        "where a linear layer keeps their output too",
    ),
    "projected_store": (
        "CompAct's: see `compact`",
        "what comes back is as wide as the gradient, with noise of about the square root of width over rank times its size, "
        "which an optimizer in the weights' own space is given whole at each step; it is here for plans, not for its curve",
    ),
    "compact": (
        "25 to 30 % lower peak in pre-training, 50 % in fine-tuning, at comparable quality",
        "activations alone are told here; gradients and Adam's state are as much smaller beside. Runs are shorter than the "
        "200 updates after which P would be drawn anew: a quarter of each weight's directions is trained",
    ),
    "gradient_filter": (
        "77 % less memory and up to 19 times less time, 0.1 % accuracy lost (ImageNet, the last layers trained)",
        "images of 8 x 8 pixels, of which 2 x 2 are a large part; all layers train, from scratch, and what GELU keeps stays",
    ),
    "stochastic_store": (
        "unbiased codes of 2 bits with hardly any loss of accuracy (ActNN, GACT)",
        "only what linear operations alone read is kept so: elsewhere it would not be unbiased",
    ),
}


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The page, in Markdown."""
    parts = ["# What codes cost training", NOTE, INTRODUCTION]
    for model in dict.fromkeys(row["model"] for row in rows):
        parts += _model(model, [row for row in rows if row["model"] == model])
    header = ("store", "its paper's claim", "why it differs here")
    parts += ["## Claims", table(header, [(f"`{n}`", *told) for n, told in CLAIMS.items()])]
    parts += plans_section.section()
    parts += topics_section.section(LAST)
    return "\n\n".join(parts) + "\n"


def _model(model: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    rows = [row for row in rows if "losses" in row] or rows  # where something was trained, that
    exact = {row.get("seed", 0): row for row in rows if row["store"] == "exact"}
    first = next(iter(exact.values()))
    days = sorted({row["date"] for row in rows})
    where = f"{first['machine']['processor']}; {' to '.join(dict.fromkeys((days[0], days[-1])))}"
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=_place):
        if row["store"] != "exact":
            told = ", ".join(
                f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}"
                for k, v in row["setting"].items()
                if k not in ("seed", "momentum")
            )
            groups.setdefault(f"`{row['store']}` {told}".strip(), []).append(row)
    header = ("store", "activations", "error", "measured before")
    cells = [_first_step(name, group[0]) for name, group in groups.items()]
    if "losses" not in first:
        size = format_bytes(first["activation_bytes"])
        return [
            f"## {model}",
            f"Gradient alone; {where}. Exact: activations of {size}.",
            table(header, cells),
        ]
    loss, accuracy = mean(map(_loss, exact.values())), mean(r["accuracy"] for r in exact.values())
    facts = f"{len(exact)} seeds, {len(first['losses'])} steps; {where}"
    cells = [
        (*told, *_training(group, exact))
        for told, group in zip(cells, groups.values(), strict=True)
    ]
    return [
        f"## {model}",
        f"{facts}. Exact: loss {loss:.4f}, accuracy {accuracy:.1%}.",
        table((*header, "loss", "accuracy"), cells),
    ]


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Stores by name, the largest numbers of a setting first."""
    numbers = (v for v in row["setting"].values() if isinstance(v, int | float))
    return row["store"], *(-v for v in numbers)


def _first_step(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    before = row["predicted_error"]
    return (
        name,
        f"{row['activation_ratio']:.2f}",
        _percent(row["gradient_error"]),
        "–" if before is None else _percent(before),
    )


def _percent(error: float) -> str:
    if error <= MOST_ERROR:
        return f"{error:.2%}"
    return "not a number" if math.isnan(error) else f"above {MOST_ERROR:.0%}"


def _training(group: Sequence[dict[str, Any]], exact: dict[int, dict[str, Any]]) -> tuple[str, str]:
    losses = [_loss(row) / _loss(exact[row["seed"]]) - 1 for row in group]
    points = [100 * (row["accuracy"] - exact[row["seed"]]["accuracy"]) for row in group]
    return (
        f"{mean(losses):+.1%} ± {_spread(losses):.1%}",
        f"{mean(points):+.1f} ± {_spread(points):.1f}",
    )


def _loss(row: dict[str, Any]) -> float:
    return mean(row["losses"][-LAST:])


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the page; returns the exit code."""
    return written_or_checked(PAGE, page(rows_in(ROWS)), asked_to_check(__doc__, arguments))


if __name__ == "__main__":
    sys.exit(main())
