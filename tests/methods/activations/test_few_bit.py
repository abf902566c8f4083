"""Few-bit derivatives as a store: the bytes of GELU's input, its gradient, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from tests.methods.activations.coded_mlp import (
    NUM_BLOCKS,
    UP,
    freed_bytes,
    gradients,
    mean_square,
    offered,
    record,
)
from torch import nn

import slimgrad
from slimgrad.code import Use
from slimgrad.errors import MethodError
from slimgrad.methods.activations.few_bit import FUNCTIONS, READERS, FewBit


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_bits_of_32_of_what_gelu_saves_stay(bits: int) -> None:
    store = FewBit(bits=bits).on(record())
    assert [c.num_bytes for c in offered(store).coded] == [UP * bits // 8]
    assert freed_bytes(FewBit(bits=bits)) == NUM_BLOCKS * (4 * UP - UP * bits // 8)


def test_more_bits_are_nearer_and_the_last_layer_is_exact() -> None:
    plain, errors = gradients(None), list[float]()
    for bits in (1, 2, 3, 4):
        ours = gradients(FewBit(bits=bits))
        assert torch.equal(ours["3.down.weight"], plain["3.down.weight"])  # GELU's output is kept
        off, size = ours["0.up.weight"] - plain["0.up.weight"], plain["0.up.weight"]
        errors.append(float(off.norm() / size.norm()))
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_only_the_functions_own_backward_may_read(function: str) -> None:
    own = READERS[function]
    assert FewBit(function=function).suits(Use(8192, "float32", 64, frozenset([own])))
    for readers in ([], ["mm"], [own, "mm"]):
        assert not FewBit(function=function).suits(Use(8192, "float32", 64, frozenset(readers)))


def test_other_functions_and_bits_are_refused() -> None:
    with pytest.raises(MethodError, match="function must be one of"):
        FewBit(function="relu")
    with pytest.raises(MethodError, match="bits must be 1 to 4, found 5"):
        FewBit(bits=5)


MODULES = {
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "selu": nn.SELU(),
    "elu": nn.ELU(),
    "softplus": nn.Softplus(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_each_function_is_known_by_its_backward_and_its_error_falls_with_bits(
    function: str,
) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64), MODULES[function], nn.Dropout(0.1)]  # tanh's output stays inside
    blocks = [nn.Sequential(*layers) for _ in range(2)]
    model, batch = nn.Sequential(*blocks, nn.Linear(64, 8)), torch.randn(128, 64)
    profile = slimgrad.measure(
        model, None, mean_square, batch, allow_compile=False, sensitivity=True
    )
    errors = {
        dict(fields)["bits"]: cost.squared_error**0.5
        for (name, fields), cost in next(iter(profile.coding.values())).items()
        if name == "few_bit" and dict(fields)["function"] == function
    }
    assert 0 < errors[4] < errors[3] < errors[2] < 0.5


@pytest.mark.parametrize(
    "module", [nn.ELU(alpha=0.5), nn.Softplus(beta=2), nn.ELU(inplace=True)], ids=repr
)
def test_functions_of_other_numbers_are_left_alone(module: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 64), module), nn.Linear(64, 8))
    batch = torch.randn(128, 64)
    profile = slimgrad.measure(
        model, None, mean_square, batch, allow_compile=False, sensitivity=True
    )
    assert not any(name == "few_bit" for costs in profile.coding.values() for name, _ in costs)
