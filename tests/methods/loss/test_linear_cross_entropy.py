"""The function against plain autograd in float64, its errors, and the logits that never exist."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from slimgrad.errors import MethodError, UnsupportedError
from slimgrad.methods.loss.linear_cross_entropy import (
    chunked_linear_cross_entropy,
    core_is_present,
)

IGNORE = -7


class LargestOutput(TorchDispatchMode):
    """The most elements that any operation's output has had, and the operations' names."""

    def __init__(self):
        super().__init__()
        self.numel, self.names = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        for leaf in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return out


def plain_loss(
    hidden, weight, target, bias=None, *, scale=1.0, softcap=None, upcast=None, **kwargs
):
    logits = functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if upcast is not None:
        logits = logits.to(upcast)
    return functional.cross_entropy(logits.flatten(0, -2), target.flatten(), **kwargs)


def gradients(loss, leaves):
    return torch.autograd.grad(loss, [t for t in leaves if t is not None and t.requires_grad])


def assert_same(loss, grads, plain, plain_grads, tolerance=1e-12):
    """Equal up to rounding in float64, relative to the largest entry of each gradient."""
    torch.testing.assert_close(loss, plain, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert len(grads) == len(plain_grads)
    for mine, theirs in zip(grads, plain_grads, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        scale = max(float(theirs.abs().max()), 1e-3) if theirs.numel() else 1.0
        torch.testing.assert_close(mine / scale, theirs / scale, rtol=0, atol=tolerance)


def assert_matches_plain(loss_of, hidden, weight, target, bias, **kwargs):
    leaves = (hidden, weight, bias)
    plain = plain_loss(hidden, weight, target, bias, **kwargs)
    loss = loss_of(hidden, weight, target, bias, **kwargs)
    assert loss.shape == ()
    assert loss.dtype == plain.dtype
    assert_same(loss, gradients(loss, leaves), plain, gradients(plain, leaves))


def make(lead=(2, 5), num_features=4, num_classes=11, dtype=torch.float64, bias=True, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        x = torch.randn(*shape, dtype=torch.float64, generator=draw)
        return x.to(dtype).requires_grad_()

    target = torch.randint(0, num_classes, lead, generator=draw)
    hidden, weight = normal(*lead, num_features), normal(num_classes, num_features)
    return hidden, weight, target, normal(num_classes) if bias else None


@settings(max_examples=80, deadline=None)
@given(
    lead=st.sampled_from([(1,), (7,), (2, 5), (3, 1, 4)]),
    num_classes=st.integers(1, 13),
    chunk_size=st.sampled_from([1, 2, 3, 4, 100]),
    bias=st.booleans(),
    ignored=st.sampled_from([0.0, 0.4]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    softcap=st.sampled_from([None, 0.7, 30.0]),
    scale=st.sampled_from([1.0, -0.3]),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 99),
)
def test_equals_plain_autograd(
    lead,
    num_classes,
    chunk_size,
    bias,
    ignored,
    label_smoothing,
    softcap,
    scale,
    reduction,
    seed,
):
    hidden, weight, target, b = make(lead, 4, num_classes, bias=bias, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    target[torch.rand(lead, generator=draw) < ignored] = IGNORE
    assert_matches_plain(
        lambda *args, **kw: chunked_linear_cross_entropy(*args, chunk_size=chunk_size, **kw),
        hidden,
        weight,
        target,
        b,
        ignore_index=IGNORE,
        label_smoothing=label_smoothing,
        softcap=softcap,
        scale=scale,
        reduction=reduction,
    )


@pytest.mark.parametrize("which", ["loss", "gradient"])
def test_the_assert_rejects_a_twin_scaled_by_nine_tenths(which):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * (0.9 if which == "loss" else 1.0)

        @staticmethod
        def backward(ctx, grad):
            return grad * (0.9 if which == "gradient" else 1.0)

    with pytest.raises(AssertionError):
        assert_matches_plain(
            lambda *args, **kw: Scaled.apply(chunked_linear_cross_entropy(*args, **kw)), *make()
        )


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_frozen_parts(frozen):
    hidden, weight, target, bias = make()
    for i in frozen:
        (hidden, weight, bias)[i].requires_grad_(False)
    assert_matches_plain(chunked_linear_cross_entropy, hidden, weight, target, bias)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_ignored(label_smoothing, reduction):
    hidden, weight, target, bias = make()
    target.fill_(-100)
    assert_matches_plain(
        chunked_linear_cross_entropy,
        hidden,
        weight,
        target,
        bias,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_tokens(reduction):
    hidden, weight, target, bias = make(lead=(0,))
    assert_matches_plain(
        chunked_linear_cross_entropy, hidden, weight, target, bias, reduction=reduction
    )


def test_masked_classes():
    hidden, weight, target, bias = make()
    bias = bias.detach().clone()
    bias[3] = -torch.inf
    target[target == 3] = 4
    assert_matches_plain(chunked_linear_cross_entropy, hidden, weight, target, bias)


def test_non_contiguous_hidden_and_weight():
    hidden, weight, target, bias = make(lead=(5, 2))
    assert_matches_plain(
        chunked_linear_cross_entropy,
        hidden.detach().transpose(0, 1).requires_grad_(),
        weight.detach().t().contiguous().t().requires_grad_(),
        target.t(),
        bias,
    )
    wide = torch.randn(2, 5, 8, dtype=torch.float64)[..., ::2].requires_grad_()
    assert_matches_plain(chunked_linear_cross_entropy, wide, weight, target.t(), bias)


def test_tied_weight():
    _, weight, target, _ = make()
    tokens = torch.randint(0, 11, target.shape)

    def run(loss_of):
        loss = loss_of(torch.tanh(functional.embedding(tokens, weight)), weight, target)
        return loss, torch.autograd.grad(loss, [weight])

    assert_same(*run(chunked_linear_cross_entropy), *run(plain_loss))


def test_a_gradient_of_the_loss_other_than_one():
    hidden, weight, target, bias = make()
    mine = 3.0 * chunked_linear_cross_entropy(hidden, weight, target, bias, chunk_size=3)
    plain = 3.0 * plain_loss(hidden, weight, target, bias)
    leaves = (hidden, weight, bias)
    assert_same(mine, gradients(mine, leaves), plain, gradients(plain, leaves))


def test_two_backward_passes_accumulate():
    hidden, weight, target, bias = make()
    for loss_of in (chunked_linear_cross_entropy, plain_loss):
        for t in (hidden, weight, bias):
            t.grad = None
        loss = loss_of(hidden, weight, target, bias)
        loss.backward(retain_graph=True)
        (2.0 * loss).backward()
        found = [t.grad.clone() for t in (hidden, weight, bias)]
        if loss_of is chunked_linear_cross_entropy:
            mine = found
    assert_same(loss, mine, loss, found)


def test_a_second_backward_of_a_freed_graph_is_an_error():
    hidden, weight, target, bias = make()
    loss = chunked_linear_cross_entropy(hidden, weight, target, bias)
    loss.backward()
    kept = weight.grad.clone()
    with pytest.raises(UnsupportedError, match="retain_graph"):
        loss.backward()
    assert torch.equal(weight.grad, kept)


@pytest.mark.parametrize("through", [0, 1, 2])
def test_double_backward_is_an_error(through):
    leaves = hidden, weight, bias = [make()[i] for i in (0, 1, 3)]
    loss = chunked_linear_cross_entropy(torch.tanh(hidden), weight, make()[2], bias)
    (grad,) = torch.autograd.grad(loss, [leaves[through]], create_graph=True)
    penalty = loss + grad.square().sum()  # with a silent zero this would train something else
    with pytest.raises(UnsupportedError, match="double backward"):
        penalty.backward(retain_graph=True)
    for leaf in leaves:
        with pytest.raises(UnsupportedError, match="double backward"):
            torch.autograd.grad(penalty, [leaf], retain_graph=True)


def test_gradients_are_handed_over_not_copied():
    hidden, weight, target, _ = make()
    loss = chunked_linear_cross_entropy(hidden, weight, target)
    made = [g.data_ptr() for g in loss.grad_fn.grads if g is not None]
    loss.backward()
    assert weight.grad.data_ptr() == made[1]
    assert loss.grad_fn.grads is None


def products(run):
    with LargestOutput() as seen:
        run()
    return [name for name in seen.names if "mm" in name]


def test_gradients_that_nobody_needs_are_not_computed():
    hidden, weight, target, bias = make()

    def run():
        loss = chunked_linear_cross_entropy(hidden, weight, target, bias, chunk_size=100)
        assert loss.requires_grad == (torch.is_grad_enabled() and hidden.requires_grad)

    logits, for_hidden, for_weight = "aten.addmm.out", "aten.mm.out", "aten.addmm_.default"
    assert products(run) == [logits, for_hidden, for_weight]
    with torch.no_grad():
        assert products(run) == [logits]
    weight.requires_grad_(False)
    assert products(run) == [logits, for_hidden]
    hidden, bias = hidden.detach(), bias.detach()
    assert products(run) == [logits]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upcast", [None, torch.float32])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_low_precision_error_is_at_most_twice_that_of_plain(dtype, upcast, softcap):
    kwargs = {"softcap": softcap, "upcast": upcast}

    def square_errors(seed, loss_of):
        hidden, weight, target, bias = make((96,), 32, 50, dtype=dtype, seed=seed)
        exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
        truth = plain_loss(exact[0], exact[1], target, exact[2], softcap=softcap)
        truths = [truth.detach(), *torch.autograd.grad(truth, exact)]
        loss = loss_of(hidden, weight, target, bias, **kwargs)
        found = [loss.detach(), *gradients(loss, (hidden, weight, bias))]
        dtypes = [t.dtype for t in found]
        pairs = zip(found, truths, strict=True)
        return torch.stack([(f.double() - t).norm().square() / t.norm() for f, t in pairs]), dtypes

    def small_chunks(*args, **kw):
        return chunked_linear_cross_entropy(*args, chunk_size=8, **kw)

    mine = [square_errors(seed, small_chunks) for seed in range(8)]
    plain = [square_errors(seed, plain_loss) for seed in range(8)]
    assert mine[0][1] == plain[0][1]
    ratio = (
        sum(e for e, _ in mine) / sum(e for e, _ in plain)
    ).sqrt()  # loss, hidden, weight, bias
    assert ratio.max() <= 2.0, ratio


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_under_autocast_as_plain(dtype):
    hidden, weight, target, bias = make((32,), 16, 40, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = chunked_linear_cross_entropy(hidden, weight, target, bias, chunk_size=8)
        plain = plain_loss(hidden, weight, target, bias)
    assert mine.dtype == plain.dtype
    for a, b in zip(
        (mine, *gradients(mine, (hidden, weight, bias))),
        (plain, *gradients(plain, (hidden, weight, bias))),
        strict=True,
    ):
        assert a.dtype == b.dtype
        assert float((a - b).detach().norm()) <= 1e-2 * float(b.detach().norm())
    exact = plain_loss(*(t.double() for t in (hidden, weight)), target, bias.double())
    in_bf16 = float((mine - exact).detach().abs()) > 1e-7
    assert in_bf16 == (dtype == torch.float32)  # autocast took part, and leaves float64 alone


def test_the_logits_never_exist():
    hidden, weight, target, bias = make((60,), 4, 50)
    with LargestOutput() as seen:
        chunked_linear_cross_entropy(hidden, weight, target, bias, chunk_size=10).backward()
    assert seen.numel == 10 * 50
    with LargestOutput() as seen:
        plain_loss(hidden, weight, target, bias).backward()
    assert seen.numel == 60 * 50


def test_bad_arguments():
    hidden, weight, target, bias = make()
    for bad in (11, -1):
        wrong = target.clone()
        wrong[1, 2] = bad
        with pytest.raises(IndexError, match=f"{bad} is out of bounds"):
            chunked_linear_cross_entropy(hidden, weight, wrong, bias)
    for kwargs in (
        {"chunk_size": 0},
        {"label_smoothing": 1.5},
        {"softcap": 0.0},
        {"scale": 0.0},
        {"reduction": "none"},
    ):
        with pytest.raises(MethodError, match="expected"):
            chunked_linear_cross_entropy(hidden, weight, target, bias, **kwargs)
    with pytest.raises(MethodError, match="hidden"):
        chunked_linear_cross_entropy(hidden[..., :2], weight, target)
    with pytest.raises(MethodError, match="targets"):
        chunked_linear_cross_entropy(hidden, weight, target[0])
    with pytest.raises(MethodError, match="one dtype"):
        chunked_linear_cross_entropy(hidden.float(), weight, target)


@pytest.mark.skipif(not core_is_present(), reason="torch before 2.13")
def test_the_backend_of_torch():
    hidden, weight, target, bias = make()
    target[0, 1] = IGNORE
    for reduction in ("mean", "sum"):
        assert_matches_plain(
            lambda *args, **kw: chunked_linear_cross_entropy(
                *args, chunk_size=4, backend="torch", **kw
            ),
            hidden,
            weight,
            target,
            bias,
            ignore_index=IGNORE,
            reduction=reduction,
        )
    target[0, 1] = 0
    for kwargs in ({"softcap": 2.0}, {"scale": 2.0}, {"label_smoothing": 0.1}):
        with pytest.raises(MethodError, match="slimgrad"):
            chunked_linear_cross_entropy(hidden, weight, target, bias, backend="torch", **kwargs)
    with pytest.raises(MethodError, match="dtype of the logits"):
        chunked_linear_cross_entropy(
            hidden.float(), weight.float(), target, upcast=torch.float64, backend="torch"
        )


def test_an_absent_backend_is_refused(monkeypatch):
    monkeypatch.delattr(functional, "linear_cross_entropy", raising=False)
    hidden, weight, target, _ = make()
    with pytest.raises(MethodError, match=r"2\.13"):
        chunked_linear_cross_entropy(hidden, weight, target, backend="torch")
