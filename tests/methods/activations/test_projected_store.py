"""Projected inputs as a store: bytes by the ratio of the width, unbiased weight gradients, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from tests.coding.unbiased import assert_mean
from tests.methods.activations.coded_mlp import (
    NORMED,
    NUM_BLOCKS,
    UP,
    assert_only_weights_are_off,
    attached,
    freed_bytes,
    gradients,
    made,
    mean_square,
    offered,
    record,
)

from slimgrad.code import Use
from slimgrad.errors import MethodError
from slimgrad.methods.activations.projected_store import ProjectedStore


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_exactly_the_ratio_of_the_width_stays(ratio: float) -> None:
    store = ProjectedStore(ratio=ratio)
    predicted = sum(c.num_bytes for c in offered(store.on(record())).coded)
    covered = 4 * (
        UP + NORMED
    )  # what both products save: float32 after GELU, and the norm's output
    assert predicted == ratio * covered
    assert freed_bytes(store) == NUM_BLOCKS * (covered - predicted)


def test_gradients_but_those_of_weights_are_exact() -> None:
    assert_only_weights_are_off(ProjectedStore())


def test_the_mean_over_draws_is_the_exact_gradient_and_a_scaled_twins_is_not() -> None:
    plain = gradients(None)["2.up.weight"].double()
    model, batch = made()
    attached(model, ProjectedStore())

    def drawn() -> torch.Tensor:
        model.zero_grad()
        mean_square(model, batch).backward()
        gradient = model.get_parameter("2.up.weight").grad
        assert gradient is not None
        return with_length(gradient.double())

    def with_length(gradient: torch.Tensor) -> torch.Tensor:
        return torch.cat([gradient.flatten(), (gradient * plain).sum().view(1)])

    draws = [drawn() for _ in range(400)]
    assert_mean(iter(draws).__next__, with_length(plain))
    with pytest.raises(AssertionError, match="are off"):
        assert_mean(iter([0.9 * d for d in draws]).__next__, with_length(plain))


@pytest.mark.parametrize("readers", [[], ["gelu_backward"], ["convolution_backward"], ["bmm"]])
def test_only_products_of_matrices_suit(readers: list[str]) -> None:
    assert ProjectedStore().suits(Use(8192, "float32", 64, frozenset(["mm"])))
    assert not ProjectedStore().suits(Use(8192, "float32", 64, frozenset(readers)))
    assert not ProjectedStore().suits(Use(64, "float32", 64, frozenset(["mm"])))  # a single row


@pytest.mark.parametrize("ratio", [0.0, 1.5])
def test_other_ratios_are_refused(ratio: float) -> None:
    with pytest.raises(MethodError, match=r"ratio must be in \(0, 1\]"):
        ProjectedStore(ratio=ratio)
