"""ReGELU2 and ReSiLU2 as a store: 2 bits of GELU's input, a bit-equal forward, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from tests.methods.activations.coded_mlp import (
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
from slimgrad.coding.approx_bp import ApproxBpCode
from slimgrad.errors import MethodError
from slimgrad.methods.activations.approx_bp import FUNCTIONS, ApproxBp


def test_two_bits_of_what_gelu_saves_stay() -> None:
    store = ApproxBp().on(record())
    assert [c.num_bytes for c in offered(store).coded] == [UP // 4]
    assert freed_bytes(ApproxBp()) == NUM_BLOCKS * (4 * UP - UP // 4)


def test_the_forward_pass_is_plains_and_backward_multiplies_by_the_levels() -> None:
    found = []
    for setting in (None, ApproxBp()):
        model, batch = made()
        attached(model, setting)
        loss = mean_square(model, batch)
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (plain_loss, plain), (loss, ours) = found
    assert torch.equal(loss, plain_loss)
    assert torch.equal(ours["3.down.weight"], plain["3.down.weight"])
    model, batch = made()
    last = model[3]
    x = model[:3](batch).detach()
    hidden = last.up(last.norm(x)).detach()
    out = (x + last.down(torch.nn.functional.gelu(hidden))).detach()
    slope = ApproxBpCode().steps(hidden)
    expected = (2 * out / out.numel() @ last.down.weight.detach() * slope).sum(0)
    torch.testing.assert_close(ours["3.up.bias"], expected, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_only_the_functions_own_backward_may_read(function: str) -> None:
    own = f"{function}_backward"
    assert ApproxBp(function=function).suits(Use(8192, "float32", 64, frozenset([own])))
    for readers in ([], ["mm"], [own, "mm"]):
        assert not ApproxBp(function=function).suits(Use(8192, "float32", 64, frozenset(readers)))


def test_other_functions_are_refused() -> None:
    with pytest.raises(MethodError, match="function must be one of"):
        ApproxBp(function="tanh")
