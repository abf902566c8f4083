import pytest
import torch
from tests.coding.test_group_codes import use_of
from torch._subclasses.fake_tensor import FakeTensorMode

from slimgrad import Ledger
from slimgrad.coding.velora import VeloraCode
from slimgrad.errors import MethodError, UnsupportedError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sub_token", [4, 16])
def test_bytes_fall_by_exactly_the_sub_token(dtype, sub_token):
    x = torch.randn(3, 10, 64).to(dtype)
    code = VeloraCode(sub_token)
    code.encode(x)  # the direction belongs to the place
    with Ledger(inputs=(x, code.direction)) as ledger:
        encoded = code.encode(x)
    held = ledger.now_bytes - x.nbytes - code.direction.nbytes
    assert held == encoded.num_bytes == code.num_bytes(use_of(x))
    assert held * sub_token == x.nbytes


def test_what_comes_back_is_the_projection_onto_the_first_mean():
    first, x = 1 + torch.randn(20, 12, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    code = VeloraCode(4)
    code.encode(first)
    v = first.view(-1, 4).mean(0)
    v = v / v.norm()
    torch.testing.assert_close(code.direction, v)
    expected = ((x.view(-1, 4) @ v)[:, None] * v).view(5, 12)
    once = code.encode(x).decode()
    torch.testing.assert_close(once, expected)
    torch.testing.assert_close(code.encode(once).decode(), once)
    torch.testing.assert_close(code.direction, v)  # the second tensor did not change it


def test_sub_tokens_along_the_direction_are_kept():
    v = torch.tensor([3.0, -4.0])
    x = (torch.randn(30)[:, None] + 2) * v
    torch.testing.assert_close(VeloraCode(2).encode(x.view(6, 10)).decode(), x.view(6, 10))


def test_only_the_weight_gradient_of_a_linear_layer_changes():
    x = (1 + torch.randn(50, 16, dtype=torch.float64)).requires_grad_()
    w = torch.randn(8, 16, dtype=torch.float64, requires_grad=True)
    plain = torch.nn.functional.linear(x, w)
    g = torch.randn_like(plain)
    exact = torch.autograd.grad(plain, (x, w), g)
    code = VeloraCode(4)
    kept = lambda t: code.encode(t) if t is x else t  # noqa: E731
    made = lambda t: t if isinstance(t, torch.Tensor) else t.decode()  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(kept, made):
        y = torch.nn.functional.linear(x, w)
    assert torch.equal(y, plain)
    dx, dw = torch.autograd.grad(y, (x, w), g)
    assert torch.equal(dx, exact[0])
    torch.testing.assert_close(dw, g.T @ code.encode(x.detach()).decode())
    cosine = torch.nn.functional.cosine_similarity(dw.flatten(), exact[1].flatten(), dim=0)
    assert 0.5 < cosine < 0.999


def test_dense_tensors_in_any_order_and_empty_ones():
    x = torch.randn(4, 6, 8)
    code = VeloraCode(4)
    expected = code.encode(x).decode()
    back = code.encode(x.transpose(0, 1)).decode()
    assert back.stride() == x.transpose(0, 1).stride()
    assert torch.equal(back, expected.transpose(0, 1))
    assert VeloraCode(4).encode(torch.empty(0, 8)).decode().shape == (0, 8)
    assert torch.equal(VeloraCode(4).encode(torch.zeros(2, 8)).decode(), torch.zeros(2, 8))


def test_a_trace_leaves_no_state():
    code = VeloraCode(4)
    with FakeTensorMode():
        code.encode(torch.empty(2, 8))
    assert code.direction is None
    code.encode(torch.randn(2, 8))
    assert code.direction.isfinite().all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(UnsupportedError, match="rows of 6"):
        VeloraCode(4).encode(torch.randn(2, 6))
    with pytest.raises(MethodError, match="at least 1"):
        VeloraCode(0)
