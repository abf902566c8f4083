"""Each method for your own code on one model of its kind: bytes by column, and time, beside plain and a peer.

    python benchmarks/methods.py [--kinds attention,loss,...] [--rounds 5] [--out benchmarks/results/methods.jsonl]

One line a way. Bytes are the ledger's maxima by column over a forward and backward pass; times are medians of passes
in turns in this one process, as ratios to plain's. Every figure is of the machine that the line names.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import slimgrad
from rows import write_rows
from slimgrad.comparing.zoo import subject
from slimgrad.layers.arena_inference import ArenaInference
from slimgrad.layers.coupling import ReversibleBlock
from slimgrad.layers.memory_efficient_attention import memory_efficient_attention
from slimgrad.layers.reversible_sequence import ReversibleSequence
from slimgrad.layers.reversible_supernet import ReversibleSupernet
from slimgrad.layers.reversible_unet3d import ReversibleUnet3d
from slimgrad.layers.sequence_operations import sequence_operations
from slimgrad.layers.sparse_linear import SparseLinear
from slimgrad.methods.activations.grad_cache import GradCache
from slimgrad.methods.activations.memory_replay import memory_replay
from slimgrad.methods.loss.cut_cross_entropy import cut_cross_entropy
from slimgrad.methods.loss.linear_cross_entropy import (
    chunked_linear_cross_entropy,
    core_is_present,
)
from slimgrad.methods.time.adjoint_ode import AdjointODE
from slimgrad.types import format_bytes

RESULTS = Path(__file__).parent / "results" / "methods.jsonl"


@dataclass
class Way:
    """One way to run the pass; ``model`` and ``inputs`` give the ledger's columns their names."""

    name: str
    run: Callable[[], object]
    model: nn.Module
    inputs: Any = ()
    times_s: list[float] = field(default_factory=list)

    def columns(self) -> dict[str, int]:
        self.run()
        self.clear()
        with slimgrad.Ledger(self.model, inputs=self.inputs) as ledger:
            self.run()
        self.clear()
        return {"peak": ledger.peak_bytes} | {c.value: b for c, b in ledger.columns.items()}

    def turn(self) -> None:
        begin = time.perf_counter()
        self.run()
        self.times_s.append(time.perf_counter() - begin)
        self.clear()

    def clear(self) -> None:
        for tensor in (*self.model.parameters(), *tensors(self.inputs)):
            tensor.grad = None


def tensors(tree: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def attention() -> list[Way]:
    """One layer of 4 heads and 2,048 tokens with a bias that is trained: torch's fused kernel does not serve it."""
    q, k, v = (torch.randn(1, 4, 2048, 64, requires_grad=True) for _ in range(3))
    bias = torch.zeros(1, 4, 2048, 2048, requires_grad=True)
    inputs, none = (q, k, v, bias), nn.Module()

    def plain() -> Tensor:
        return ((q @ k.transpose(2, 3) / 8 + bias).softmax(3) @ v).sum().backward()

    def by_torch() -> None:
        functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).sum().backward()

    def by_tiles() -> None:
        memory_efficient_attention(q, k, v, bias=bias).sum().backward()

    named = {"plain": plain, "memory_efficient_attention": by_tiles, "torch SDPA": by_torch}
    return [Way(name, run, none, inputs) for name, run in named.items()]


def loss() -> list[Way]:
    """SmolLM2-135M's head, 1,024 tokens."""
    head = nn.Linear(576, 49152, bias=False)
    hidden = torch.randn(1024, 576, requires_grad=True)
    target = torch.randint(49152, (1024,))
    arguments = (hidden, head.weight, target)
    runs: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: functional.cross_entropy(head(hidden), target),
        "cut_cross_entropy": lambda: cut_cross_entropy(*arguments),
        "chunked_cross_entropy": lambda: chunked_linear_cross_entropy(*arguments),
    }
    if core_is_present():
        by_torch = functools.partial(chunked_linear_cross_entropy, backend="torch")
        runs["torch linear_cross_entropy"] = lambda: by_torch(*arguments)
    inputs = (hidden, target)
    return [Way(name, lambda r=r: r().backward(), head, inputs) for name, r in runs.items()]


def contrastive() -> list[Way]:
    """An encoder of four wide layers under a loss over 512 pairs, in chunks of 32."""
    layers = [
        nn.Linear(128, 1024),
        nn.GELU(),
        nn.Linear(1024, 1024),
        nn.GELU(),
        nn.Linear(1024, 64),
    ]
    encoder = nn.Sequential(*layers)
    left, right = torch.randn(512, 16, 128), torch.randn(512, 16, 128)

    def embed(encoder: nn.Module, chunk: Tensor) -> Tensor:
        return functional.normalize(encoder(chunk).mean(1), dim=1)

    def of_pairs(a: Tensor, b: Tensor) -> Tensor:
        return functional.cross_entropy(20 * a @ b.t(), torch.arange(len(a)))

    cache = GradCache(encoder, of_pairs, 32, embed=embed)

    def plain() -> None:
        of_pairs(embed(encoder, left), embed(encoder, right)).backward()

    named = {"plain": plain, "grad_cache": lambda: cache(left, right)}
    return [Way(name, run, encoder, (left, right)) for name, run in named.items()]


def reversible() -> list[Way]:
    """16 blocks of two functions on two streams of 8 x 512 tokens."""

    def function() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))

    chain = ReversibleSequence(ReversibleBlock(function(), function()) for _ in range(16))
    streams = tuple(torch.randn(8, 512, 128, requires_grad=True) for _ in range(2))

    def run(is_reversible: bool, overlap: bool = False) -> None:
        chain.is_reversible, chain.overlap = is_reversible, overlap
        sum(out.square().mean() for out in chain(streams)).backward()

    def checkpointed() -> None:
        now = streams
        for block in chain.blocks:
            now = checkpoint(block, now, use_reentrant=False)
        sum(out.square().mean() for out in now).backward()

    named = {
        "plain": lambda: run(False),
        "reversible_sequence": lambda: run(True),
        "pareprop": lambda: run(True, overlap=True),
        "torch checkpoint": checkpointed,
    }
    return [Way(name, way, chain, streams) for name, way in named.items()]


def search() -> list[Way]:
    """Six cells of two streams, seven candidates an operation, 8 x 128 tokens: one step of a search's gradients."""
    net = ReversibleSupernet(sequence_operations(64), num_cells=6)
    streams = tuple(torch.randn(8, 128, 64) for _ in range(2))

    def run(is_reversible: bool) -> None:
        net.is_reversible = is_reversible
        sum(out.square().mean() for out in net(streams)).backward()

    named = {"plain": False, "reversible_supernet": True}
    return [Way(name, lambda r=r: run(r), net, streams) for name, r in named.items()]


def segmentation() -> list[Way]:
    """A 3-D U-Net of three levels, two blocks each, on a volume of 32^3."""
    ways = []
    volume = torch.randn(1, 1, 32, 32, 32)
    for name, is_reversible in {"plain": False, "reversible_unet3d": True}.items():
        net = ReversibleUnet3d(1, 2, width=8, blocks_per_level=2, is_reversible=is_reversible)
        ways.append(Way(name, lambda n=net: n(volume).square().mean().backward(), net, volume))
    return ways


class Field(nn.Module):
    """A small network as dy/dt."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 256), nn.Tanh(), nn.Linear(256, width))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


def continuous() -> list[Way]:
    """An ODE block of 32 fixed steps; torchdiffeq's own adjoint is ``backsolve``."""
    vector_field, x = Field(64), torch.randn(256, 64, requires_grad=True)
    ways = []
    for adjoint in ("backprop", "backsolve", "interpolated", "checkpointed"):
        block = AdjointODE(vector_field, adjoint=adjoint, solver="rk4", num_steps=32)
        name = "plain" if adjoint == "backprop" else f"adjoint_ode, {adjoint}"
        ways.append(Way(name, lambda b=block: b(x).square().mean().backward(), vector_field, (x,)))
    return ways


def recurrent() -> list[Way]:
    """An LSTM of two layers over 16 segments of 32 tokens."""
    lstm = nn.LSTM(128, 256, num_layers=2)
    segments = list(torch.randn(16, 32, 16, 128))
    start = (torch.zeros(2, 16, 256), torch.zeros(2, 16, 256))

    def plain() -> None:
        state, total = start, torch.zeros(())
        for segment in segments:
            out, state = lstm(segment, state)
            total = total + out.square().mean()
        total.backward()

    def replayed() -> None:
        memory_replay(lstm, segments, start, lambda out, _: out.square().mean())

    named = {"plain": plain, "memory_replay": replayed}
    return [Way(name, run, lstm, (segments, start)) for name, run in named.items()]


def sparse() -> list[Way]:
    """A layer of 1,024 x 1,024 weights, one in twenty of them kept, 512 rows."""
    dense = nn.Linear(1024, 1024)
    lean = SparseLinear.from_dense(dense, sparsity=0.95)
    mask = (lean.to_dense().weight != 0).float()
    x = torch.randn(512, 1024, requires_grad=True)

    def masked() -> None:
        functional.linear(x, dense.weight * mask, dense.bias).square().mean().backward()

    return [
        Way("plain", masked, dense, (x, mask)),
        Way("sparse_linear", lambda: lean(x).square().mean().backward(), lean, (x,)),
    ]


def inference() -> list[Way]:
    """A vision transformer without gradients."""
    made = subject("vit")
    model, images = made.model.eval(), made.batch[0]
    infer = ArenaInference(model, images)

    def plain() -> None:
        with torch.no_grad():
            model(images)

    return [
        Way("plain", plain, model, (images,)),
        Way("arena_inference", lambda: infer(images), model, (images,)),
    ]


KINDS: dict[str, Callable[[], list[Way]]] = {
    "attention": attention,
    "loss": loss,
    "contrastive": contrastive,
    "reversible": reversible,
    "search": search,
    "segmentation": segmentation,
    "continuous": continuous,
    "recurrent": recurrent,
    "sparse": sparse,
    "inference": inference,
}


def bench(kind: str, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    ways = KINDS[kind]()
    columns = [way.columns() for way in ways]
    for _ in range(rounds):
        for way in ways:
            way.turn()
    plain_s = median(ways[0].times_s)
    rows = []
    for way, held in zip(ways, columns, strict=True):
        row = {"kind": kind, "way": way.name, **{f"{c}_bytes": b for c, b in held.items()}}
        row["time_ratio"] = median(way.times_s) / plain_s
        rows.append(row)
        print(
            f"{kind:12} {way.name:28} peak {format_bytes(held['peak']):>10} activations "
            f"{format_bytes(held['activations']):>10} temporaries {format_bytes(held['temporaries']):>10} "
            f"time {row['time_ratio']:.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    write_rows(chosen.out, (bench(kind, chosen.rounds) for kind in chosen.kinds.split(",")))


if __name__ == "__main__":
    main()
