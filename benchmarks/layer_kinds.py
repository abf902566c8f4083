"""Kinds of layers and losses, and the ways to run each: plain, the methods for your own code, and a peer."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from slimgrad.layers.coupling import ReversibleBlock
from slimgrad.layers.memory_efficient_attention import memory_efficient_attention
from slimgrad.layers.reversible_sequence import ReversibleSequence
from slimgrad.layers.reversible_supernet import ReversibleSupernet
from slimgrad.layers.sequence_operations import sequence_operations
from slimgrad.layers.sparse_attention import sparse_attention
from slimgrad.layers.sparse_linear import SparseLinear
from slimgrad.layers.two_stage_backward import TwoStageBackward
from slimgrad.methods.activations.memory_replay import memory_replay
from slimgrad.methods.loss.cut_cross_entropy import cut_cross_entropy
from slimgrad.methods.loss.cut_distillation import cut_distillation
from slimgrad.methods.loss.cut_preference import answer_log_probabilities, cut_preference
from slimgrad.methods.loss.linear_cross_entropy import (
    chunked_linear_cross_entropy,
    core_is_present,
)
from slimgrad.methods.time.adjoint_ode import AdjointODE
from ways import Way


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


def long_attention() -> list[Way]:
    """One layer of 4 heads and 4,096 tokens, causal: the full pattern, and one of two factors."""
    tensors = tuple(torch.randn(1, 4, 4096, 64, requires_grad=True) for _ in range(3))

    def plain() -> None:
        functional.scaled_dot_product_attention(*tensors, is_causal=True).sum().backward()

    def sparse_factors(recompute: bool) -> None:
        sparse_attention(*tensors, recompute=recompute).sum().backward()

    named = {
        "plain": plain,
        "sparse_attention": lambda: sparse_factors(False),
        "sparse_attention, recomputed": lambda: sparse_factors(True),
    }
    return [Way(name, run, nn.Module(), tensors) for name, run in named.items()]


def distillation() -> list[Way]:
    """A student's head of SmolLM2-135M's size beside a teacher's twice as wide, 512 tokens."""
    head, teacher = nn.Linear(576, 49152, bias=False), nn.Linear(1152, 49152, bias=False)
    teacher.requires_grad_(False)
    hidden, wide = torch.randn(512, 576, requires_grad=True), torch.randn(512, 1152)

    def plain() -> Tensor:
        wanted = functional.log_softmax(teacher(wide), 1)
        found = functional.log_softmax(head(hidden), 1)
        return functional.kl_div(found, wanted, reduction="batchmean", log_target=True)

    def cut() -> Tensor:
        return cut_distillation(hidden, head.weight, wide, teacher.weight)

    both = nn.ModuleList([head, teacher])
    named = {"plain": plain, "cut_distillation": cut}
    return [
        Way(name, lambda r=r: r().backward(), both, (hidden, wide)) for name, r in named.items()
    ]


def preference() -> list[Way]:
    """Two pairs of answers of 128 tokens under SmolLM2-135M's head."""
    head = nn.Linear(576, 49152, bias=False)
    hidden = torch.randn(4, 128, 576, requires_grad=True)
    target = torch.randint(49152, (4, 128))
    reference = torch.randn(4) - 1000

    def plain() -> Tensor:
        found = functional.log_softmax(head(hidden), 2)
        return found.gather(2, target[..., None]).sum((1, 2))

    def cut() -> Tensor:
        return answer_log_probabilities(hidden, head.weight, target)

    def run(log_probabilities: Callable[[], Tensor]) -> None:
        found = log_probabilities()
        cut_preference(found[:2], found[2:], reference[:2], reference[2:]).backward()

    named = {"plain": plain, "cut_preference": cut}
    inputs = (hidden, target, reference)
    return [Way(name, lambda r=r: run(r), head, inputs) for name, r in named.items()]


def two_stages() -> list[Way]:
    """Eight wide layers: weights' gradients with the inputs', or after all of them."""
    layers = [layer for _ in range(8) for layer in (nn.Linear(512, 512), nn.GELU())]
    model, x = nn.Sequential(*layers), torch.randn(2048, 512)

    def plain() -> None:
        model(x).square().mean().backward()

    def in_stages() -> None:
        stages = TwoStageBackward(model)
        plain()
        stages.flush()
        stages.undo()

    named = {"plain": plain, "two_stage_backward": in_stages}
    return [Way(name, run, model, (x,)) for name, run in named.items()]


LAYER_KINDS: dict[str, Callable[[], list[Way]]] = {
    "attention": attention,
    "long attention": long_attention,
    "loss": loss,
    "distillation": distillation,
    "preference": preference,
    "reversible": reversible,
    "search": search,
    "continuous": continuous,
    "recurrent": recurrent,
    "sparse": sparse,
    "two stages": two_stages,
}
