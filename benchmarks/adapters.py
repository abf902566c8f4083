"""Ways of fine-tuning SmolLM2-135M, pretrained, on Python's documentation: bytes, and the loss of what was held out.

    python benchmarks/adapters.py [--ways full,lora,meft] [--window 256] [--steps 30] [--seeds 0]

``full`` trains every parameter, ``lora`` low-rank adapters of all linear layers, and ``velora``, ``low_memory_bp``,
``lemo`` and ``random`` the same adapters with one method more: codes of what matrix products alone read, ReSiLU2 with
memory-sharing norms, and half of the tokens from layer 4 on, told by predictors or drawn. ``meft`` trains its own adapters in
a reversible model. Of one seed all ways have the same batches in the same order, and all LoRA the same initial
adapters. Written down: the loss of each step, that of the held-out windows (all tokens) before and after, and of the
second step the ledger's largest activations and peak; with ``--steps 2`` these bytes alone. Rows of other ways, windows,
seeds and numbers of steps stay in the file.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import slimgrad
from lora import add_lora
from rows import write_rows
from slimgrad.host import Host
from slimgrad.layers.lemo import LeMo
from slimgrad.layers.meft import meft
from slimgrad.method import Block, Scope
from slimgrad.methods.activations.approx_bp import ApproxBp
from slimgrad.methods.activations.coded_store import CodedStore
from slimgrad.methods.activations.memory_sharing_norm import memory_sharing_norm
from slimgrad.methods.activations.selective_recompute import SelectiveRecompute
from slimgrad.methods.activations.velora import Velora
from slimgrad.planning.settings import block_record, layout_of, model_record
from slimgrad.training.models import load_model
from slimgrad.training.text import TokenBlocks, text_source, tokenize
from slimgrad.types import Column

RESULTS = Path(__file__).parent / "results" / "adapters.jsonl"
HELD_OUT = 1024  # the held-out text is cut into windows of this length, whatever is trained on
NUM_HELD_OUT = 3
STAGES = {4: 0.5}  # LeMo: half of the tokens from layer 4 on
KEY = ("way", "seed", "tokens", "steps")

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Way:
    """Changes a pretrained model in place (given batches, a seed) and says by which loss it is trained."""

    attach: Callable[[Any, TokenBlocks, int], Loss]
    lr: float


def own_loss(model: Any, batch: Batch) -> Tensor:
    return model(**batch).loss


def full(model: Any, batches: TokenBlocks, seed: int) -> Loss:
    return own_loss


def lora(model: Any, batches: TokenBlocks, seed: int) -> Loss:
    add_lora(model, model.model.layers)
    return own_loss


def reversible(model: Any, batches: TokenBlocks, seed: int) -> Loss:
    meft(model)
    return own_loss


def coded(model: Any, batches: TokenBlocks, store: CodedStore) -> None:
    """What the store suits is kept as codes in every block; nothing is run again."""
    profile = slimgrad.measure(model, None, own_loss, next(batches), allow_compile=False)
    layout, whole = layout_of(profile, profile.variants[()]), model_record(profile, 1, None)
    host = Host(model, None, own_loss)
    for path, block in layout.blocks.items():
        record = block_record(profile, layout, block, model=whole)
        suited = store.on(record)
        if record.graph is None or not suited.storages:
            continue
        for method in (suited, SelectiveRecompute(record.graph.saved)):
            method.attach(Block(path, Scope.BLOCK, host=host))


def velora(model: Any, batches: TokenBlocks, seed: int) -> Loss:
    add_lora(model, model.model.layers)
    coded(model, batches, Velora())
    return own_loss


def low_memory_bp(model: Any, batches: TokenBlocks, seed: int) -> Loss:
    add_lora(model, model.model.layers)
    memory_sharing_norm(model)
    coded(model, batches, ApproxBp(function="silu"))
    return own_loss


def lemo(model: Any, batches: TokenBlocks, seed: int) -> Loss:
    add_lora(model, model.model.layers)
    method = LeMo(model, STAGES, seed=seed)
    recalls = method.fit([{"input_ids": next(batches)["input_ids"]} for _ in range(12)])
    print(f"  recall {recalls}", flush=True)
    return lambda m, batch: method.loss(m(input_ids=batch["input_ids"]).logits, batch["labels"])


def random_tokens(model: Any, batches: TokenBlocks, seed: int) -> Loss:
    add_lora(model, model.model.layers)
    method = LeMo(model, STAGES, choice="random", seed=seed)
    return lambda m, batch: method.loss(m(input_ids=batch["input_ids"]).logits, batch["labels"])


WAYS = {
    "full": Way(full, 5e-5),
    "lora": Way(lora, 1e-3),
    "meft": Way(reversible, 1e-3),
    "velora": Way(velora, 1e-3),
    "low_memory_bp": Way(low_memory_bp, 1e-3),
    "lemo": Way(lemo, 1e-3),
    "random": Way(random_tokens, 1e-3),
}


def windows(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """The tokens to train on, and windows that are held out, spread over the whole text."""
    blocks = TokenBlocks(tokenize(text_source(), tokenizer), HELD_OUT, 1).blocks
    held = torch.zeros(len(blocks), dtype=torch.bool)
    held[len(blocks) // (2 * NUM_HELD_OUT) :: len(blocks) // NUM_HELD_OUT] = True
    return blocks[~held].flatten(), blocks[held].long()


@torch.no_grad()
def held_out_loss(model: nn.Module, held_NT: Tensor) -> float:
    """The mean loss of all tokens, each window alone."""
    losses = [own_loss(model, {"input_ids": row, "labels": row}) for row in held_NT.split(1)]
    return float(torch.stack(losses).mean())


def trained(way: Way, model: Any, tokens: Tensor, asked: argparse.Namespace, seed: int) -> Any:
    """Losses of the steps, and the bytes of the second one."""
    torch.manual_seed(seed)
    loss_of = way.attach(model, TokenBlocks(tokens, asked.window, 1, seed + 1000), seed)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=way.lr)
    batches, losses, row = TokenBlocks(tokens, asked.window, 1, seed), list[float](), {}
    begin = time.perf_counter()
    for step in range(asked.steps):
        batch = next(batches)
        ledger = slimgrad.Ledger(model, optimizer, inputs=batch) if step == 1 else nullcontext()
        with ledger:
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
        if isinstance(ledger, slimgrad.Ledger):
            row["activation_bytes"] = ledger.columns[Column.ACTIVATIONS]
            row["peak_bytes"] = ledger.peak_bytes
    row |= {"losses": losses, "seconds": round(time.perf_counter() - begin, 1)}
    return row


def rows_of(names: list[str], asked: argparse.Namespace) -> Iterator[list[Mapping[str, Any]]]:
    """A row for each way and seed."""
    loaded = load_model("smollm2")
    pretrained: Any = loaded.model
    pretrained.config.use_cache = False
    tokens, held_NT = windows(loaded.tokenizer)
    is_trained = asked.steps > 2
    start = held_out_loss(pretrained, held_NT) if is_trained else None
    for seed in asked.seeds:
        for name in names:
            model = copy.deepcopy(pretrained)
            found = trained(WAYS[name], model, tokens, asked, seed)
            row = {
                "way": name, "seed": seed, "steps": asked.steps, "tokens": asked.window, "lr": WAYS[name].lr,
                "pretrained_loss": start, **found,
                "held_out_loss": held_out_loss(model, held_NT) if is_trained else None,
            }  # fmt: skip
            print({k: v for k, v in row.items() if k != "losses"}, flush=True)
            yield [row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    write_rows(asked.out, rows_of(asked.ways.split(","), asked), KEY)


if __name__ == "__main__":
    main()
