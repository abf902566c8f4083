"""Projected sub-tokens as a store: bytes by their size, exact input gradients, and what is left alone."""

from __future__ import annotations

import functools

import pytest
import torch
from tests.methods.activations.coded_mlp import (
    NORMED,
    NUM_BLOCKS,
    UP,
    attached,
    freed_bytes,
    made,
    mean_square,
    offered,
    records,
)

from slimgrad.code import Use
from slimgrad.errors import MethodError
from slimgrad.method import Record
from slimgrad.methods.activations.velora import Velora


@functools.cache
def record() -> Record:
    return records()["1"]


@pytest.mark.parametrize("sub_token", [8, 32])
def test_bytes_fall_by_exactly_the_size_of_a_sub_token(sub_token: int) -> None:
    covered = UP + NORMED
    store = Velora(sub_token=sub_token).on(record())
    assert sum(c.num_bytes for c in offered(record(), store).coded) == 4 * covered // sub_token
    directions = 2 * 4 * sub_token  # one a place
    freed = NUM_BLOCKS * (4 * covered - 4 * covered // sub_token - directions)
    assert freed_bytes(record(), Velora(sub_token=sub_token)) == freed


def test_gradients_but_those_of_weights_are_exact() -> None:
    found = []
    for setting in (None, Velora(sub_token=8)):
        model, batch = made()
        attached(model, record(), setting)
        batch.requires_grad_()
        mean_square(model, batch).backward()
        found.append({n: p.grad for n, p in model.named_parameters()} | {"batch": batch.grad})
    plain, ours = found
    for name, gradient in plain.items():
        is_product = name.endswith(("up.weight", "down.weight"))
        assert torch.equal(ours[name], gradient) is not is_product, name
        if is_product:
            cosine = torch.cosine_similarity(ours[name].flatten(), gradient.flatten(), 0)
            assert 0.05 < float(cosine) < 0.999, name


@pytest.mark.parametrize(
    "readers", [[], ["gelu_backward"], ["convolution_backward"], ["mm", "mul"]]
)
def test_only_products_of_matrices_suit(readers: list[str]) -> None:
    assert Velora().suits(Use(8192, "float32", 64, frozenset(["mm"])))
    assert not Velora().suits(Use(8192, "float32", 64, frozenset(readers)))
    assert not Velora().suits(Use(8192, "float32", 48, frozenset(["mm"])))  # not cut evenly


def test_no_sub_token_is_refused() -> None:
    with pytest.raises(MethodError, match="at least 1, found 0"):
        Velora(sub_token=0)
