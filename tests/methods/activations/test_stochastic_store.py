"""Unbiased codes of what matrix products and convolutions read, and of nothing else."""

from __future__ import annotations

import pytest
import torch
from tests.coding.unbiased import assert_mean
from tests.methods.activations.coded_mlp import (
    NORMED,
    NUM_BLOCKS,
    UP,
    attached,
    freed_bytes,
    made,
    mean_square,
    offered,
    record,
)

from slimgrad.code import Use
from slimgrad.errors import MethodError
from slimgrad.methods.activations.stochastic_store import StochasticStore


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_bits_of_32_and_the_ranges_of_what_products_read_stay(bits: int) -> None:
    covered = UP + NORMED  # not what GELU saves
    kept = covered * bits // 8 + covered // 256 * 8
    store = StochasticStore(bits=bits).on(record())
    assert sum(c.num_bytes for c in offered(store).coded) == kept
    assert freed_bytes(StochasticStore(bits=bits)) == NUM_BLOCKS * (4 * covered - kept)


def test_what_backward_uses_otherwise_is_not_touched() -> None:
    graph = record().graph
    assert graph is not None
    chosen = StochasticStore().on(record()).storages
    for number, use in enumerate(graph.uses):
        if use is not None and use.readers - {"mm"}:
            assert number not in chosen
    assert [graph.uses[n].readers for n in chosen] == [frozenset(["mm"])] * 2  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize(
    "readers",
    [
        [],
        ["gelu_backward"],
        ["mm", "threshold_backward"],
        ["bmm"],
        ["mm", "bmm"],
        ["native_layer_norm_backward"],
    ],
)
def test_only_linear_uses_suit(readers: list[str]) -> None:
    assert StochasticStore().suits(Use(8192, "float32", 64, frozenset(["mm"])))
    assert not StochasticStore().suits(Use(8192, "float32", 64, frozenset(readers)))


def test_gradients_of_biases_and_of_the_input_are_exact() -> None:
    found = []
    for setting in (None, StochasticStore(bits=2)):
        model, batch = made()
        if setting is not None:
            attached(model, setting)
        batch.requires_grad_()
        mean_square(model, batch).backward()
        found.append({n: p.grad for n, p in model.named_parameters()} | {"batch": batch.grad})
    plain, ours = found
    for name, gradient in plain.items():
        is_product = name.endswith(("up.weight", "down.weight"))
        assert torch.equal(ours[name], gradient) is not is_product, name


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_value_is_less_than_a_step_off_and_right_in_the_mean(bits: int) -> None:
    x_RG = torch.rand(4, 256, dtype=torch.float64)
    code = StochasticStore(bits=bits).code()
    step_R1 = (x_RG.amax(1, keepdim=True) - x_RG.amin(1, keepdim=True)) / (2**bits - 1)
    assert ((code.encode(x_RG).decode() - x_RG).abs() <= step_R1 + 1e-12).all()
    # a probability below 1 % of 400 draws is too few for a normal z
    inside = ((x_RG - x_RG.amin(1, keepdim=True)) / step_R1).frac()
    seen = (inside > 0.05) & (inside < 0.95)
    assert seen.sum() > 500
    assert_mean(lambda: code.encode(x_RG).decode()[seen], x_RG[seen])


def test_the_seed_decides_and_the_models_stream_is_not_touched() -> None:
    x, before = torch.randn(1024), torch.get_rng_state()
    first, again, other = (StochasticStore(seed=s).code().encode(x).decode() for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bits", [0, 1, 3, 16])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(MethodError, match=f"2, 4 or 8, found {bits}"):
        StochasticStore(bits=bits)
