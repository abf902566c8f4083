"""bfloat16 in place of float32: half the bytes, at most 2^-8 of each value off."""

from __future__ import annotations

import pytest
import torch
from tests.methods.activations.coded_mlp import (
    NORMED,
    NUM_BLOCKS,
    UP,
    freed_bytes,
    offered,
    record,
)

from slimgrad.code import Use
from slimgrad.methods.activations.half_store import HalfStore


def test_half_of_the_float32_tensors_of_a_block_stays() -> None:
    covered = 4 * (2 * UP + NORMED)
    assert freed_bytes(HalfStore()) == NUM_BLOCKS * covered // 2


def test_the_offer_says_the_same() -> None:
    store = HalfStore().on(record())
    coded = offered(store).coded
    assert sorted(c.num_bytes for c in coded) == [2 * NORMED, 2 * UP, 2 * UP]
    assert sum(c.encode_s for c in coded) == pytest.approx(1e-9 * (2 * UP + NORMED))


def test_a_value_is_at_most_2_to_the_minus_8_of_itself_off() -> None:
    x = torch.randn(4096) * torch.logspace(-30, 30, 4096)
    off = ((HalfStore().code().encode(x).decode() - x) / x).abs().max()
    assert 2.0**-10 < off <= 2.0**-8


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16", "int64"])
def test_other_dtypes_stay(dtype: str) -> None:
    assert HalfStore().suits(Use(8192, "float32", 64, frozenset(["mm"])))
    assert not HalfStore().suits(Use(8192, dtype, 64, frozenset(["mm"])))
