"""Projected sub-tokens as a store: bytes by their size, exact input gradients, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from tests.methods.activations.coded_mlp import (
    NORMED,
    NUM_BLOCKS,
    UP,
    assert_only_weights_are_off,
    freed_bytes,
    offered,
    record,
)

from slimgrad.code import Use
from slimgrad.errors import MethodError
from slimgrad.methods.activations.velora import Velora


@pytest.mark.parametrize("sub_token", [8, 32])
def test_bytes_fall_by_exactly_the_size_of_a_sub_token(sub_token: int) -> None:
    covered = UP + NORMED
    store = Velora(sub_token=sub_token).on(record())
    assert sum(c.num_bytes for c in offered(store).coded) == 4 * covered // sub_token
    directions = 2 * 4 * sub_token  # one a place
    freed = NUM_BLOCKS * (4 * covered - 4 * covered // sub_token - directions)
    assert freed_bytes(Velora(sub_token=sub_token)) == freed


def test_gradients_but_those_of_weights_are_exact() -> None:
    for name, (ours, plain) in assert_only_weights_are_off(Velora(sub_token=8)).items():
        cosine = torch.cosine_similarity(ours.flatten(), plain.flatten(), 0)
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
