"""Sampled rows as a store: bytes by the share kept, unbiased weight gradients, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from tests.methods.activations.coded_mlp import (
    NORMED,
    NUM_BLOCKS,
    UP,
    assert_only_weights_are_off,
    freed_bytes,
    gradients,
    offered,
    record,
)

from slimgrad.code import Use
from slimgrad.errors import MethodError
from slimgrad.methods.activations.wta_crs import WtaCrs


def test_the_kept_share_of_rows_and_their_numbers_stay() -> None:
    store = WtaCrs(keep=0.25).on(record())
    predicted = sum(c.num_bytes for c in offered(store).coded)
    covered = 4 * (UP + NORMED)
    assert 0.25 * covered <= predicted <= 0.27 * covered + 2 * 128 * 8
    assert freed_bytes(WtaCrs(keep=0.25)) == NUM_BLOCKS * (covered - predicted)


def test_gradients_but_those_of_weights_are_exact() -> None:
    assert_only_weights_are_off(WtaCrs())


def test_the_mean_over_draws_is_nearer_than_one_draw() -> None:
    plain = gradients(None)["2.up.weight"]
    draws = torch.stack([gradients(WtaCrs(seed=s))["2.up.weight"] for s in range(64)])

    def error(of: torch.Tensor) -> float:
        return float((of - plain).norm() / plain.norm())

    one = sum(map(error, draws)) / len(draws)
    assert error(draws.mean(0)) < 2 * one / 8  # an eighth, were there no chance in it
    assert error(0.5 * draws.mean(0)) > 2 * one / 8


@pytest.mark.parametrize("readers", [[], ["gelu_backward"], ["convolution_backward"], ["bmm"]])
def test_only_products_of_matrices_suit(readers: list[str]) -> None:
    assert WtaCrs().suits(Use(8192, "float32", 64, frozenset(["mm"])))
    assert not WtaCrs().suits(Use(8192, "float32", 64, frozenset(readers)))
    assert not WtaCrs().suits(Use(64, "float32", 64, frozenset(["mm"])))  # a single row


@pytest.mark.parametrize("keep", [0.0, 1.5])
def test_other_shares_are_refused(keep: float) -> None:
    with pytest.raises(MethodError, match=r"keep must be in \(0, 1\]"):
        WtaCrs(keep=keep)
