"""The longest sequence that trains within a budget: plain, under checkpoints, and as slimgrad plans it.

    python benchmarks/longest.py [--budget 2GiB] [--optimizers sgd,adamw] [--out benchmarks/results/longest.jsonl]

A model of SmolLM2-135M's shape, one sequence a batch, every parameter trained, in float32. Bytes come from fake
tensors (nothing of the model's size is allocated), so the figures are the same on every machine; that predicted and
measured peaks agree is what the tests and the other benchmarks show. Lengths are multiples of 128, found by bisection.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import slimgrad
from rows import write_rows
from slimgrad.comparing.peers import PEERS
from slimgrad.comparing.zoo import Subject
from slimgrad.host import Share
from slimgrad.measuring.trace import trace_step
from slimgrad.types import Budget

RESULTS = Path(__file__).parent / "results" / "longest.jsonl"
STEP = 128
STATE = {"sgd": 0, "adamw": 2}  # tensors of a parameter's own size that the optimizer keeps


def model_of_smollm2() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, use_cache=False,
        max_position_embeddings=2**20,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def own_loss(model: Any, batch: Any) -> torch.Tensor:
    return model(**batch).loss


def optimizer_of(name: str, model: Any) -> torch.optim.Optimizer:
    made = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    return made(model.parameters(), lr=1e-4)


def tokens(length: int) -> dict[str, torch.Tensor]:
    tokens_NT = torch.zeros((1, length), dtype=torch.int64)
    return {"input_ids": tokens_NT, "labels": tokens_NT}


def by_trace(mode: FakeTensorMode, peer: str | None, state: int) -> Callable[[int], int]:
    """The peak of plain training, or under a peer's checkpoints, by length."""

    def peak(length: int) -> int:
        with mode:
            model, batch = model_of_smollm2(), tokens(length)
        made = Subject(model, own_loss, batch, lambda m: optimizer_of("sgd", m))
        undo = PEERS[peer].attach(model, made) if peer else None
        trace = trace_step(model, own_loss, [Share(batch, 1.0)], [], {})
        if undo is not None:
            undo()
        kept = state * sum(p.nbytes for p in model.parameters())
        return trace.timeline().peak_bytes + kept

    return peak


def by_plan(mode: FakeTensorMode, optimizer: str, budget: int) -> Callable[[int], int]:
    def peak(length: int) -> int:
        with mode:
            model, batch = model_of_smollm2(), tokens(length)
            made = optimizer_of(optimizer, model)
        profile = slimgrad.measure(model, made, own_loss, batch, limit_s=1.0, allow_compile=False)
        try:
            return slimgrad.plan(profile, budget).peak_bytes
        except slimgrad.BudgetError:
            return 2**62

    return peak


def longest(peak: Callable[[int], int], budget: int) -> int:
    """The most tokens, a multiple of ``STEP``, whose peak is within the budget; 0: none."""
    low, high = 0, 1
    while high <= 2**11 and peak(high * STEP) <= budget:
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if peak(middle * STEP) <= budget else (low, middle)
    return low * STEP


def bench(optimizer: str, budget: int) -> list[dict[str, Any]]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    ways = {
        "plain": by_trace(mode, None, STATE[optimizer]),
        "checkpoint": by_trace(mode, "checkpoint", STATE[optimizer]),
        "slimgrad": by_plan(mode, optimizer, budget),
    }
    rows = []
    for name, peak in ways.items():
        found = longest(peak, budget)
        rows.append({"optimizer": optimizer, "way": name, "tokens": found, "budget_bytes": budget})
        print(f"{optimizer} {name}: {found} tokens", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", default="2GiB")
    parser.add_argument("--optimizers", default="sgd,adamw")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    budget = Budget.parse(chosen.budget).bytes
    assert budget is not None, "expected bytes"
    groups = (bench(name, budget) for name in chosen.optimizers.split(","))
    write_rows(chosen.out, groups, key=("optimizer",))


if __name__ == "__main__":
    main()
