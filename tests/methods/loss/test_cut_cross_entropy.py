"""Cut cross-entropy: values and gradients of the plain loss, filtering within its threshold, bytes by the ledger."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from slimgrad import Ledger
from slimgrad.errors import MethodError, UnsupportedError
from slimgrad.methods.loss.cut_cross_entropy import aims_and_sums, cut_cross_entropy, tiling_for
from slimgrad.methods.loss.cut_tiles import backward_by_tiles, forward_by_tiles
from slimgrad.types import Column

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def made(num=37, width=12, classes=53, dtype=torch.float64, bias=True, seed=0):
    torch.manual_seed(seed)
    hidden = torch.randn(num, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(classes, width, dtype=dtype, requires_grad=True)
    b = torch.randn(classes, dtype=dtype, requires_grad=True) if bias else None
    target = torch.randint(classes, (num,))
    target[::5] = -100
    return hidden, weight, target, b


def plain(hidden, weight, target, bias, *, softcap=None, scale=1.0, **options):
    logits = functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return functional.cross_entropy(logits, target, **options)


def gradients(loss, *tensors):
    wanted = [t for t in tensors if t is not None]
    return torch.autograd.grad(loss, wanted)


@given(
    num=st.integers(1, 40),
    classes=st.integers(2, 60),
    token_block=st.integers(1, 50),
    vocab_block=st.integers(1, 70),
    softcap=st.sampled_from([None, 3.0]),
    scale=st.sampled_from([1.0, 0.5]),
    bias=st.booleans(),
    reduction=st.sampled_from(["sum", "none"]),
)
@settings(max_examples=40, deadline=None)
def test_loss_and_gradients_are_the_plain_ones(
    num, classes, token_block, vocab_block, softcap, scale, bias, reduction
):
    hidden, weight, target, b = made(num, 8, classes, bias=bias)
    rule = {"softcap": softcap, "scale": scale, "reduction": reduction}
    blocks = {"token_block": token_block, "vocab_block": vocab_block}
    loss = cut_cross_entropy(hidden, weight, target, b, filter_eps=None, **rule, **blocks)
    wanted = plain(hidden, weight, target, b, **rule)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(0.5, 2.0, num, dtype=torch.float64) if reduction == "none" else 1.0
    found = gradients((loss * weights).sum(), hidden, weight, b)
    for a, c in zip(found, gradients((wanted * weights).sum(), hidden, weight, b), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_mean_and_label_smoothing(smoothing):
    hidden, weight, target, b = made()
    options = {"label_smoothing": smoothing, "scale": 0.5}
    loss = cut_cross_entropy(hidden, weight, target, b, vocab_block=10, **options)
    wanted = plain(hidden, weight, target, b, **options)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    for a, c in zip(
        gradients(loss, hidden, weight, b), gradients(wanted, hidden, weight, b), strict=True
    ):
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-12)


def peaked(num=96, width=16, classes=640):
    """Logits as a trained model's: few classes are likely, and nine of ten hardly ever."""
    torch.manual_seed(1)
    weight = torch.randn(classes, width, dtype=torch.float64)
    target = torch.randint(classes // 10, (num,)) * 10
    weight[:, 0] = torch.where(torch.arange(classes) % 10 == 0, 2.0, -2.0)
    hidden = 1.2 * weight[target]
    hidden[:, 0] = 3.0
    hidden.requires_grad_()
    return hidden, weight.requires_grad_(), target


@pytest.mark.parametrize("eps", [2.0**-12, 1e-6])
def test_what_the_filter_leaves_out_is_below_its_threshold(eps):
    hidden, weight, target = peaked()
    exact = gradients(plain(hidden, weight, target, None, reduction="sum"), hidden, weight)
    loss = cut_cross_entropy(
        hidden, weight, target, filter_eps=eps, token_block=16, vocab_block=32, reduction="sum"
    )
    found = gradients(loss, hidden, weight)
    left_out = [(a - b).abs() for a, b in zip(found, exact, strict=True)]
    # an entry of the gradient in the logits is off by less than eps: so is the product with what it meets
    assert (left_out[0] <= eps * weight.detach().abs().sum(0)).all()
    assert (left_out[1] <= eps * hidden.detach().abs().sum(0)).all()
    assert max(part.max() for part in left_out) > 0


def test_sorting_by_mean_logit_leaves_out_more_tiles():
    hidden, weight, target = peaked()
    tiling = tiling_for(hidden, 1.0, None, 2.0**-12, 16, 32, "torch")
    with torch.no_grad():
        _, lse, total = forward_by_tiles(hidden, weight, None, target, tiling)
        order = total.argsort(descending=True)
        g = torch.ones_like(lse)
        skipped = [
            backward_by_tiles(
                hidden, weight, None, target, lse, o, -g, g, (True, True, False), tiling
            )[1]
            for o in (None, order)
        ]
    assert skipped[1] > skipped[0]
    assert skipped[1] > 0.3 * (len(hidden) / 16) * (len(weight) / 32)


def test_no_tensor_of_tokens_times_vocabulary_and_twenty_times_fewer_bytes():
    """SmolLM2-135M's head: 49,152 classes of width 576."""
    torch.manual_seed(0)
    hidden = torch.randn(1024, 576, requires_grad=True)
    weight = (0.02 * torch.randn(49152, 576)).requires_grad_()
    target = torch.randint(49152, (1024,))
    logits = 1024 * 49152 * 4
    with Ledger(inputs=(hidden, weight, target)) as ledger:
        loss = cut_cross_entropy(hidden, weight, target)
        forward = ledger.peak_bytes - ledger.columns[Column.INPUTS]
        loss.backward()
    assert max(ledger.lifetimes.nbytes) < logits / 1.5  # the weight's gradient is the largest
    assert forward < 2 * logits / 20
    plain_loss = functional.cross_entropy(hidden @ weight.t(), target)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-5)
    exact = gradients(plain_loss, hidden, weight)
    for found, wanted in zip((hidden.grad, weight.grad), exact, strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_between_forward_and_backward_one_number_a_token_is_held():
    hidden, weight, target, _ = made(200, 16, 3000, torch.float32, bias=False)
    with Ledger(inputs=(hidden, weight, target)) as ledger:
        before = ledger.now_bytes
        loss = cut_cross_entropy(hidden, weight, target, filter_eps=None)
        held = ledger.now_bytes - before
    assert loss.requires_grad
    assert held <= 16 * 200 + 64


def test_the_log_sum_exp_is_differentiable_too():
    hidden, weight, target, b = made()
    aim, lse, _ = aims_and_sums(hidden, weight, target, b, ignore_index=-100, filter_eps=None)
    z_loss = (lse.square()).mean()
    logits = functional.linear(hidden, weight, b)
    wanted = logits.logsumexp(1).square().mean()
    torch.testing.assert_close(z_loss, wanted)
    for a, c in zip(
        gradients(z_loss, hidden, weight, b), gradients(wanted, hidden, weight, b), strict=True
    ):
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-11)
    assert aim[0] == 0  # of an ignored token


def test_autocast_takes_products_in_its_dtype():
    hidden, weight, target, _ = made(64, 32, 100, torch.float32, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cut_cross_entropy(hidden, weight, target)
        wanted = functional.cross_entropy(functional.linear(hidden, weight), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=2e-3, atol=2e-3)
    found, exact = gradients(loss, hidden, weight), gradients(wanted, hidden, weight)
    for a, c in zip(found, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - c).norm() < 0.02 * c.norm()


@needs_triton
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("eps", [None, 2.0**-12])
def test_the_kernel_does_what_its_twin_does(softcap, eps):
    hidden, weight, target, b = made(45, 40, 150, torch.float32)
    options = {"softcap": softcap, "scale": 0.7, "filter_eps": eps, "reduction": "sum"}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    moved = [t.detach().to(device).requires_grad_(t.is_floating_point()) for t in (hidden, weight)]
    c = b.detach().to(device).requires_grad_()
    loss = cut_cross_entropy(*moved, target.to(device), c, backend="triton", **options)
    wanted = cut_cross_entropy(hidden, weight, target, b, backend="torch", **options)
    torch.testing.assert_close(loss.cpu(), wanted, rtol=1e-5, atol=1e-4)
    found, twin = gradients(loss, *moved, c), gradients(wanted, hidden, weight, b)
    for a, d in zip(found, twin, strict=True):
        assert (a.cpu() - d).norm() <= 1e-4 * d.norm()


@needs_triton
def test_the_kernel_leaves_tiles_out():
    hidden, weight, target = (t.detach() for t in peaked(64, 16, 320))
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    exact = gradients(
        cut_cross_entropy(hidden, weight, target, filter_eps=None, reduction="sum"), hidden, weight
    )
    loss = cut_cross_entropy(
        hidden, weight, target, filter_eps=1e-3, backend="triton", reduction="sum"
    )
    found = gradients(loss, hidden, weight)
    apart = (found[0] - exact[0]).abs()
    assert (apart <= 1e-3 * weight.detach().abs().sum(0) + 1e-4).all()
    assert apart.max() > 1e-6


def test_a_double_backward_is_refused():
    hidden, weight, target, _ = made()
    loss = cut_cross_entropy(hidden, weight, target)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(UnsupportedError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_block": 0}, "at least 1"),
        ({"filter_eps": 1.5}, "filter_eps"),
        ({"softcap": 0.0}, "other than 0"),
        ({"reduction": "max"}, "reduction"),
        ({"backend": "tpu"}, "backend"),
        ({"label_smoothing": 0.1, "softcap": 2.0}, "no softcap"),
        ({"backend": "triton"}, "float64"),
    ],
)
def test_arguments_out_of_bounds(change, message):
    hidden, weight, target, _ = made()
    with pytest.raises(MethodError, match=message):
        cut_cross_entropy(hidden, weight, target, **change)


def test_shapes_and_targets_that_do_not_belong():
    hidden, weight, target, b = made()
    with pytest.raises(MethodError, match="weight"):
        cut_cross_entropy(hidden, weight[:, :3], target)
    with pytest.raises(MethodError, match="bias"):
        cut_cross_entropy(hidden, weight, target, b[:4])
    with pytest.raises(MethodError, match="targets"):
        cut_cross_entropy(hidden, weight, target[:3])
    with pytest.raises(IndexError, match="out of bounds"):
        cut_cross_entropy(hidden, weight, target.fill_(999))
