import importlib.util

import pytest
import torch
from tests.coding.unbiased import assert_mean

from slimgrad import Ledger
from slimgrad.code import Use
from slimgrad.coding import group_codes
from slimgrad.coding.group_codes import BLOCK, GroupCode
from slimgrad.errors import ArgumentError, MethodError, UnsupportedError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [(0,), (1,), (7,), (256,), (257,), (4, 3, 100), (BLOCK + 300,), (9 * BLOCK + 1000,)]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def use_of(tensor, readers=()):
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Use(tensor.numel(), dtype, tensor.shape[-1], frozenset(readers))


def steps_of(x, bits, group):
    """Each element's step, in the dtype of ``x``'s reckoning, and the largest element of its group."""
    flat = x.flatten().double()
    padded = torch.cat([flat, flat[-1:].expand(-len(flat) % group)]) if len(flat) else flat
    rows = padded.view(-1, group)
    step = (rows.amax(1) - rows.amin(1)) / (2**bits - 1)
    largest = rows.abs().amax(1)
    return [each.repeat_interleave(group)[: len(flat)].view_as(x) for each in (step, largest)]


def between_codes(bits, num_elements, dtype=torch.float32):
    """Elements at codes, and (every other) well between two, so that 400 draws see either."""
    top = 2**bits - 1
    x = torch.randint(top, (num_elements,)).to(dtype)
    x[::2] += 0.1 + 0.8 * torch.rand(len(x[::2]), dtype=dtype)
    x[::8], x[1::8] = 0.0, top  # the ends of every group
    return x


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stochastic", [False, True])
def test_an_element_is_at_most_half_a_step_off(bits, dtype, stochastic):
    for size in SIZES:
        x = torch.randn(size).to(dtype)
        code = GroupCode(bits, stochastic=stochastic)
        encoded = code.encode(x)
        assert encoded.num_bytes == code.num_bytes(use_of(x))
        assert (
            encoded.num_bytes == (x.numel() * bits + 7) // 8 + 2 * -(-x.numel() // 256) * x.itemsize
        )
        y = encoded.decode()
        assert y.dtype == x.dtype
        assert y.shape == x.shape
        step, largest = steps_of(x, bits, 256)
        bound = (1.0 if stochastic else 0.5) * step + 2 * torch.finfo(dtype).eps * largest
        assert ((y.double() - x.double()).abs() <= bound).all()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_ends_of_a_group_far_from_zero_are_kept(bits):
    x = 1000 + torch.rand(512)
    y = GroupCode(bits).encode(x).decode()
    step, _ = steps_of(x, bits, 256)
    assert ((y - x).abs() <= 0.5 * step + 2 * 1000 * torch.finfo(torch.float32).eps).all()
    for group in range(2):
        for end in (torch.argmin, torch.argmax):
            place = 256 * group + int(end(x[256 * group : 256 * (group + 1)]))
            assert (y[place] - x[place]).abs() <= 1000 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("value", [0.0, -3.7, 1e30, 1e-42])
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_constant_group_is_exact(value, stochastic):
    x = torch.full((300,), value)
    assert torch.equal(GroupCode(2, stochastic=stochastic).encode(x).decode(), x)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_the_scale_of_the_tensor_does_not_matter(scale):
    x = torch.randn(512)
    y = GroupCode(4).encode(x * scale).decode() / scale
    step, _ = steps_of(x, 4, 256)
    assert ((y - x).abs() <= 0.5 * step + 1e-5).all()


def test_nan_is_not_hidden():
    x = torch.randn(512)
    x[3] = float("nan")
    y = GroupCode(8).encode(x).decode()
    assert y[:256].isnan().all()
    assert y[256:].isfinite().all()


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stochastic_rounding_is_unbiased_and_a_scaled_twin_is_not(bits, dtype):
    x = between_codes(bits, 600, dtype)
    code = GroupCode(bits, stochastic=True, seed=3)
    assert_mean(lambda: code.encode(x).decode(), x)
    with pytest.raises(AssertionError, match="are off"):
        assert_mean(lambda: 0.9 * code.encode(x).decode(), x)


def test_rounding_to_nearest_is_no_unbiased_code():
    x = between_codes(4, 600)
    with pytest.raises(AssertionError, match="are off"):
        assert_mean(lambda: GroupCode(4).encode(x).decode(), x)


def test_errors_of_stochastic_rounding_do_not_move_together():
    x = torch.rand(256) + torch.arange(256)  # one group, every element between two codes
    code = GroupCode(8, stochastic=True)
    errors = torch.stack([code.encode(x).decode() - x for _ in range(400)])
    single = errors.var(0).sum()
    assert 0.7 < errors.sum(1).var() / single < 1.4  # the variance of a sum is the sum of variances


def test_random_numbers_are_the_codes_own_and_are_drawn_again():
    x = torch.randn(3000)
    code = GroupCode(4, stochastic=True, seed=5)
    before = torch.get_rng_state()
    first, second = (code.encode(x).decode() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)
    again = GroupCode(4, stochastic=True, seed=5)
    assert torch.equal(again.encode(x).decode(), first)
    code.draws.restart()
    assert torch.equal(code.encode(x).decode(), first)
    assert not torch.equal(GroupCode(4, stochastic=True, seed=6).encode(x).decode(), first)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_dense_tensors_in_any_order_of_dimensions(bits):
    x = torch.randn(6, 5, 40)
    y = x.permute(2, 0, 1)
    back = GroupCode(bits).encode(y).decode()
    assert back.stride() == y.stride()
    assert torch.equal(back, GroupCode(bits).encode(x).decode().permute(2, 0, 1))
    inside = torch.randn(10, 300)[4:8]  # dense, not at the start of its storage
    assert torch.equal(
        GroupCode(bits).encode(inside).decode(), GroupCode(bits).encode(inside.clone()).decode()
    )


def test_what_is_not_dense_is_refused():
    with pytest.raises(ArgumentError, match="contiguous"):
        GroupCode().encode(torch.randn(8, 8)[:, ::2])


def test_what_is_not_floating_is_refused():
    with pytest.raises(UnsupportedError, match="int64"):
        GroupCode().encode(torch.arange(4))


@pytest.mark.parametrize("fields", [{"bits": 3}, {"group": 100}, {"group": 4}])
def test_fields_have_bounds(fields):
    with pytest.raises(MethodError, match="expected"):
        GroupCode(**fields)


def test_a_code_is_a_value():
    assert GroupCode(4) == GroupCode(4)
    assert len({GroupCode(4), GroupCode(4), GroupCode(8)}) == 2


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ledger_sees_the_predicted_bytes_and_bounded_scratch(bits, stochastic, dtype):
    code = GroupCode(bits, stochastic=stochastic)
    scratch = {}
    for blocks in (17, 25):
        x = torch.randn(blocks * BLOCK).to(dtype)
        with Ledger(inputs=x) as ledger:
            encoded = code.encode(x)
        held = code.num_bytes(use_of(x))
        assert encoded.num_bytes == held
        assert ledger.now_bytes - x.nbytes == held
        scratch[blocks] = [ledger.peak_bytes - x.nbytes - held]
        with Ledger(inputs=(encoded.codes, encoded.ranges)) as ledger:
            y = encoded.decode()
        assert ledger.now_bytes == held + y.nbytes
        scratch[blocks].append(ledger.peak_bytes - held - y.nbytes)
    assert scratch[17] == scratch[25]
    assert max(scratch[17]) <= (2 if stochastic else 1) * 2**20


def test_autograd_through_saved_tensors():
    x = torch.randn(64, 32, dtype=torch.float64, requires_grad=True)
    w = torch.randn(16, 32, dtype=torch.float64, requires_grad=True)
    plain = torch.nn.functional.linear(x, w)
    code = GroupCode(8)

    def pack(tensor):
        return code.encode(tensor) if tensor is x else tensor

    def unpack(kept):
        return kept if isinstance(kept, torch.Tensor) else kept.decode()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = torch.nn.functional.linear(x, w)
    assert torch.equal(y, plain)
    g = torch.randn_like(y)
    y.backward(g)
    torch.testing.assert_close(w.grad, g.T @ code.encode(x).decode())
    torch.testing.assert_close(x.grad, g @ w.detach())


@needs_triton
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_elements", [0, 5, 256, 1000])
def test_the_kernels_make_what_their_twin_makes(bits, dtype, num_elements):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(num_elements).to(dtype)
    expected = GroupCode(bits).encode(x)
    made = GroupCode(bits).encode(x.to(device))
    made.codes.zero_(), made.ranges.zero_()
    group_codes.encode_on_device(x.to(device), made, None)
    assert torch.equal(made.ranges.cpu(), expected.ranges)
    assert torch.equal(made.codes.cpu(), expected.codes)
    out = torch.empty(num_elements, dtype=dtype, device=device)
    group_codes.decode_on_device(made, out)
    torch.testing.assert_close(out.cpu(), expected.decode())


@needs_triton
def test_the_kernels_stochastic_rounding_is_unbiased(monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = between_codes(4, 40).to(device)
    code = GroupCode(4, stochastic=True)
    encoded = code.encode(x)

    def draw():
        group_codes.encode_on_device(x, encoded, code.draws.number())
        return encoded.decode()

    assert_mean(draw, x, 60)
    with pytest.raises(AssertionError, match="are off"):
        assert_mean(lambda: 0.9 * draw(), x, 60)


@needs_triton
def test_the_kernels_do_not_hide_nan():
    x = torch.randn(300)
    x[7] = float("nan")
    encoded = GroupCode(8).encode(x)
    group_codes.encode_on_device(x, encoded, None)
    y = encoded.decode()
    assert y[:256].isnan().all()
    assert y[256:].isfinite().all()
