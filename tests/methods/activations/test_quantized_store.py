"""Group-wise codes: bits / 32 of the bytes and two numbers a group of 256, half a step off at most."""

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

from slimgrad.errors import MethodError
from slimgrad.methods.activations.quantized_store import QuantizedStore


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_bits_of_32_and_the_ranges_stay(bits: int) -> None:
    covered = 2 * UP + NORMED
    kept = covered * bits // 8 + covered // 256 * 8
    assert freed_bytes(QuantizedStore(bits=bits)) == NUM_BLOCKS * (4 * covered - kept)
    store = QuantizedStore(bits=bits).on(record())
    assert sum(c.num_bytes for c in offered(store).coded) == kept


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_value_is_at_most_half_a_step_of_its_group_off(bits: int) -> None:
    x_RG = torch.randn(64, 256)
    off_RG = (QuantizedStore(bits=bits).code().encode(x_RG).decode() - x_RG).abs()
    step_R1 = (x_RG.amax(1, keepdim=True) - x_RG.amin(1, keepdim=True)) / (2**bits - 1)
    assert (off_RG <= 0.5 * step_R1 + 1e-6).all()
    assert (off_RG.amax(1, keepdim=True) > 0.4 * step_R1).all()


@pytest.mark.parametrize("bits", [0, 1, 3, 16, -8])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(MethodError, match=f"2, 4 or 8, found {bits}"):
        QuantizedStore(bits=bits)


def test_the_settings_are_8_4_and_2_bits() -> None:
    assert [store.bits for store in QuantizedStore.strengths()] == [8, 4, 2]
