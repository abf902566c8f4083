import math

import pytest
import torch
from tests.coding.test_group_codes import use_of
from tests.coding.unbiased import assert_mean
from torch._subclasses.fake_tensor import FakeTensorMode

from slimgrad import Ledger
from slimgrad.coding import projection
from slimgrad.coding.projection import ProjectionCode
from slimgrad.errors import MethodError, UnsupportedError


def rows(num_rows=20, width=12):
    return torch.randn(num_rows, width, dtype=torch.float64) + 0.3


def test_only_the_weight_gradient_of_a_linear_layer_changes():
    x = rows(30, 16).requires_grad_()
    w = torch.randn(8, 16, dtype=torch.float64, requires_grad=True)
    plain = torch.nn.functional.linear(x, w)
    g = torch.randn_like(plain)
    code = ProjectionCode(0.5, seed=1)
    kept = lambda t: code.encode(t) if t is x else t  # noqa: E731
    made = lambda t: t if isinstance(t, torch.Tensor) else t.decode()  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(kept, made):
        y = torch.nn.functional.linear(x, w)
    assert torch.equal(y, plain)
    dx, dw = torch.autograd.grad(y, (x, w), g)
    assert torch.equal(dx, g @ w.detach())
    code.draws.restart()
    torch.testing.assert_close(dw, g.T @ code.encode(x.detach()).decode())
    assert (dw - g.T @ x.detach()).norm() > 0.1 * dw.norm()


def test_what_comes_back_is_the_projection_and_back():
    """With the matrix of the seed, ``[D, R]``: what rows of the identity are kept as."""
    code = ProjectionCode(0.25, seed=3)
    p_DR = code.encode(torch.eye(24, dtype=torch.float64)).kept
    assert p_DR.shape == (24, 6)
    x = rows(5, 24)
    code.draws.restart()
    encoded = code.encode(x)
    torch.testing.assert_close(encoded.kept, x @ p_DR)
    for _ in range(2):  # each time of the same matrix
        torch.testing.assert_close(encoded.decode(), x @ p_DR @ p_DR.T)


def test_every_tensor_has_a_matrix_of_its_own():
    code, x = ProjectionCode(0.5), rows()
    assert not torch.equal(code.encode(x).kept, code.encode(x).kept)


def test_the_matrix_is_made_in_parts(monkeypatch):
    x = rows(7, 40)
    code = ProjectionCode(0.5)
    monkeypatch.setattr(projection, "PART", 40 * 6)  # columns of 20 in parts of 6, 6, 6 and 2
    p_DR = code.encode(torch.eye(40, dtype=torch.float64)).kept
    assert p_DR.isfinite().all()
    code.draws.restart()
    encoded = code.encode(x)
    torch.testing.assert_close(encoded.decode(), x @ p_DR @ p_DR.T)
    with Ledger(inputs=(x, encoded.kept)) as ledger:
        out = encoded.decode()
    above = ledger.peak_bytes - x.nbytes - encoded.kept.nbytes - out.nbytes
    assert 40 * 6 * 8 <= above <= 2 * 40 * 6 * 8  # one part, and its successor before it goes


def test_the_decoded_tensor_is_unbiased_and_a_scaled_twin_is_not():
    x = rows(6, 8)
    code = ProjectionCode(0.5, seed=2)

    def with_length(y):
        return torch.cat([y.flatten(), (y * x).sum().view(1)])

    assert_mean(lambda: with_length(code.encode(x).decode()), with_length(x))
    with pytest.raises(AssertionError, match="are off"):
        assert_mean(lambda: with_length(0.8 * code.encode(x).decode()), with_length(x))


def test_the_squared_error_of_a_row_is_the_formulas():
    x, num_draws = rows(1, 12), 2000
    code = ProjectionCode(0.25, seed=1)
    found = torch.stack([(code.encode(x).decode() - x).square().sum() for _ in range(num_draws)])
    expected = (12 + 1) / 3 * float(x.square().sum())
    error = float(found.std()) / math.sqrt(num_draws)
    assert abs(float(found.mean()) - expected) < 4 * error
    assert abs(float(found.mean()) - 0.8 * expected) > 4 * error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [(0, 8), (1, 8), (30, 8), (2, 15, 8), (3, 2)])
def test_bytes_are_exactly_the_ratio_of_the_width(dtype, size):
    x = torch.randn(size).to(dtype)
    code = ProjectionCode(0.25)
    with Ledger(inputs=x) as ledger:
        encoded = code.encode(x)
    assert ledger.now_bytes - x.nbytes == encoded.num_bytes == code.num_bytes(use_of(x))
    assert encoded.num_bytes == x.nbytes // (4 if size[-1] == 8 else 2)  # one direction at least
    back = encoded.decode()
    assert back.shape == x.shape
    assert back.dtype == x.dtype
    assert back.isfinite().all()


def test_under_autocast_it_is_kept_in_its_own_dtype():
    x = torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        encoded = ProjectionCode(0.5).encode(x)
        assert encoded.kept.dtype == torch.float32
        under = encoded.decode()
    assert torch.equal(under, encoded.decode())


def test_dense_tensors_in_any_order_of_dimensions():
    x = torch.randn(4, 6, 8)
    back = ProjectionCode(0.5).encode(x.transpose(0, 1)).decode()
    assert back.stride() == x.transpose(0, 1).stride()
    assert torch.equal(back, ProjectionCode(0.5).encode(x).decode().transpose(0, 1))


def test_nothing_waits_for_a_value_and_a_trace_leaves_no_state():
    code, x = ProjectionCode(0.25), torch.randn(20, 8)
    with FakeTensorMode():
        encoded = code.encode(torch.empty(20, 8))
        assert encoded.num_bytes == 20 * 2 * 4
        assert encoded.decode().shape == (20, 8)
    assert torch.equal(code.encode(x).decode(), ProjectionCode(0.25).encode(x).decode())


def test_random_numbers_are_the_codes_own():
    x = torch.randn(30, 4)
    before = torch.get_rng_state()
    first = ProjectionCode(0.5, seed=4).encode(x).decode()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(ProjectionCode(0.5, seed=4).encode(x).decode(), first)
    assert not torch.equal(ProjectionCode(0.5, seed=5).encode(x).decode(), first)


def test_whole_numbers_are_refused():
    with pytest.raises(UnsupportedError, match=r"floating-point tensor, found torch\.int64"):
        ProjectionCode().encode(torch.ones(4, 4, dtype=torch.int64))


@pytest.mark.parametrize("ratio", [0.0, 1.5])
def test_fields_have_bounds(ratio):
    with pytest.raises(MethodError, match="ratio"):
        ProjectionCode(ratio)
