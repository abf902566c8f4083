"""Deferred logits: every step and every fallback equals the plain tensor, and the losses are lean."""

import copy
import io
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from slimgrad.errors import UnsupportedError
from slimgrad.methods.loss.deferred_logits import DeferredLogits, defer
from slimgrad.methods.loss.pending_logits import Outcome

B, T, D, V = 2, 5, 3, 11


def operands(bias=False, dtype=torch.float64):
    hidden = torch.randn(B, T, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randn(V, dtype=dtype, requires_grad=True) if bias else None


def compare(use, *, lean, bias=False, dtype=torch.float64, steps=1, tolerance=1e-12):
    """``use(logits)`` gives a scalar: equal with deferred and real logits, values and gradients."""
    hidden, weight, b = operands(bias, dtype)
    wanted = [t for t in (hidden, weight, b) if t is not None]
    outcome = Outcome(())
    found = []
    for logits in (
        defer(hidden, weight, b, chunk_size=3, outcome=outcome),
        functional.linear(hidden, weight, b),
    ):
        value = use(logits)
        assert type(value) is torch.Tensor
        grads = torch.autograd.grad(value, wanted) if value.requires_grad else ()
        found.append((value, *grads))
    mine, plain = found
    assert len(mine) == len(plain)
    for a, c in zip(mine, plain, strict=True):
        assert a.dtype == c.dtype
        torch.testing.assert_close(a, c, rtol=tolerance, atol=tolerance)
    assert outcome.is_lean == lean, outcome
    return outcome


def targets(*shape):
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(3))


def flat_loss(logits, **kwargs):
    return functional.cross_entropy(logits.reshape(-1, V), targets(logits.numel() // V), **kwargs)


LEAN = {
    "view": lambda z: functional.cross_entropy(z.view(-1, V), targets(B * T)),
    "view_by_size": lambda z: functional.cross_entropy(z.view(-1, z.size(-1)), targets(B * T)),
    "module": lambda z: nn.CrossEntropyLoss()(z.flatten(0, 1), targets(B * T)),
    "flatten_negative": lambda z: functional.cross_entropy(z.flatten(0, -2), targets(B * T)),
    "unflatten": lambda z: flat_loss(z.unflatten(1, (1, T))),
    "squeeze": lambda z: flat_loss(z.unsqueeze(0).squeeze(0)),
    "torch_reshape": lambda z: functional.cross_entropy(
        torch.reshape(z, (B * T, V)), targets(B * T)
    ),
    "shift": lambda z: flat_loss(z[..., :-1, :].contiguous()),
    "shift_named": lambda z: flat_loss(z[:, :-1]),
    "shift_back": lambda z: flat_loss(z[:, 1:, :]),
    "shift_step": lambda z: flat_loss(z[:, ::2, 0:V]),
    "shift_new_axis": lambda z: flat_loss(z[None, :, :-1, ...]),
    "one_row": lambda z: functional.cross_entropy(z[1], targets(T)),
    "one_token": lambda z: functional.cross_entropy(z[0, 2], targets()),
    "last_token": lambda z: functional.cross_entropy(z[:, -1, :], targets(B)),
    "transpose": lambda z: functional.cross_entropy(z.transpose(1, 2), targets(B, T)),
    "permute": lambda z: functional.cross_entropy(z.permute(0, 2, 1), targets(B, T)),
    "movedim": lambda z: functional.cross_entropy(torch.movedim(z, -1, 1), targets(B, T)),
    "matrix_transpose": lambda z: functional.cross_entropy(z.mT, targets(B, T)),
    "transpose_then_slice": lambda z: functional.cross_entropy(z.mT[..., 1:], targets(B, T - 1)),
    "time_first": lambda z: flat_loss(z.transpose(0, 1)),
    "transpose_twice": lambda z: flat_loss(z.transpose(1, 2).transpose(1, 2)),
    "float": lambda z: flat_loss(z.float().double()),
    "to": lambda z: flat_loss(z.to(torch.float32).to("cpu").to(z.device, torch.float64)),
    "type": lambda z: flat_loss(z.type(torch.float64)),
    "clone": lambda z: flat_loss(z.clone()),
    "scale": lambda z: flat_loss(2.0 * z * 0.25 / 3),
    "scale_by_tensor": lambda z: flat_loss(z * torch.tensor(0.3) / torch.tensor([7.0]).double()),
    "softcap": lambda z: flat_loss(torch.tanh(z / 2.0) * 2.0),
    "softcap_and_temperature": lambda z: flat_loss((z * 0.5).tanh().mul(-3.0).div(0.7)),
    "class_bias": lambda z: flat_loss(0.5 * (2.0 * z + torch.linspace(-1, 1, V).double()[None])),
    "sum": lambda z: flat_loss(z, reduction="sum") / 7,
    "smoothing": lambda z: flat_loss(z, label_smoothing=0.1),
    "ignore": lambda z: flat_loss(z, ignore_index=4),
    "twice": lambda z: flat_loss(z) + flat_loss(z[:, 1:]),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", LEAN)
def test_lean_uses(name, bias):
    # a round trip through float32 rounds the logits of the plain model, but not those of the chunks
    tolerance = 1e-6 if name in ("float", "to") else 1e-12
    compare(LEAN[name], lean=True, bias=bias, tolerance=tolerance)


def test_the_comparison_rejects_a_twin_scaled_by_nine_tenths():
    for wrong in (lambda z: 0.9 * flat_loss(z), lambda z: flat_loss(z * 0.9)):
        with pytest.raises(AssertionError):
            compare(
                lambda z, wrong=wrong: wrong(z) if type(z) is DeferredLogits else flat_loss(z),
                lean=True,
            )


def in_place(z):
    z.mul_(2.0)
    return flat_loss(z)


def in_place_seen_by_a_view(z):
    flat = z.view(-1, V)
    z.mul_(2.0)
    return flat_loss(flat)


def in_place_through_a_view(z):
    z.view(-1, V)[1] = 0.5
    return flat_loss(z)


def in_place_unseen_by_a_copy(z):
    before = z * 3.0
    shifted = before[:, 1:]
    z.add_(torch.randn(V, generator=torch.Generator().manual_seed(1)).double())
    return flat_loss(z) + before.logsumexp(-1).sum() + shifted.square().sum()


def masked(z):
    z[..., 3] = -1e4
    return flat_loss(z, ignore_index=3)


def with_metric_first(z):
    with torch.no_grad():
        assert z.argmax(-1).shape == (B, T)
        assert not z[0].exp().requires_grad
    assert z.requires_grad
    return flat_loss(z)


def with_retained_gradient(z):
    z.retain_grad()
    loss = flat_loss(z)
    loss.backward(retain_graph=True)
    return loss + z.grad.square().sum()


def with_hook(z):
    z.register_hook(lambda grad: 2.0 * grad)
    return flat_loss(z)


class Square(torch.autograd.Function):
    """Reaches C++ with the stand-in itself: Function.apply asks no ``__torch_function__``."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x * x).sum()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


PLAIN = {
    "class_weights": lambda z: flat_loss(z, weight=torch.linspace(0, 1, V).double()),
    "reduction_none": lambda z: flat_loss(z, reduction="none").square().sum(),
    "soft_targets": lambda z: functional.cross_entropy(
        z.view(-1, V), torch.full((B * T, V), 1 / V).double()
    ),
    "log_softmax": lambda z: functional.nll_loss(
        functional.log_softmax(z.view(-1, V), -1), targets(B * T)
    ),
    "legacy_reduction": lambda z: flat_loss(z.float(), reduction="none").mean().double(),
    "distillation": lambda z: functional.kl_div(z.log_softmax(-1), z.detach().softmax(-1) * 0.5),
    "add": lambda z: (z + 1).square().mean(),
    "two_stand_ins": lambda z: (z * z).sum(),
    "cat": lambda z: torch.cat([z, z[:1]]).square().sum(),
    "matmul": lambda z: (z @ z.mT).sum(),
    "fewer_classes": lambda z: functional.cross_entropy(
        z[..., : V - 1].flatten(0, 1), targets(10) % 5
    ),
    "tensor_index": lambda z: functional.cross_entropy(
        z[:, torch.tensor([0, 3])].flatten(0, 1), targets(4)
    ),
    "mask_index": lambda z: functional.cross_entropy(z[targets(B, T) > 4], targets(6)),
    "view_over_classes": lambda z: z.view(B, -1).square().sum(),
    "tanh_twice": lambda z: flat_loss(z.tanh().tanh()),
    "bias_after_tanh": lambda z: flat_loss(z.tanh() + torch.ones(V).double()),
    "learned_scale": lambda z: flat_loss(z * torch.tensor(2.0, requires_grad=True)),
    "zero_scale": lambda z: flat_loss(z * 0.0),
    "complex": lambda z: z.to(torch.complex128).abs().sum(),
    "integers": lambda z: z.to(torch.int64).sum().double(),
    "iteration": lambda z: sum(row.square().sum() for row in z),
    "autograd_function": lambda z: Square.apply(z * 3),
    "in_place": in_place,
    "in_place_seen_by_a_view": in_place_seen_by_a_view,
    "in_place_through_a_view": in_place_through_a_view,
    "in_place_unseen_by_a_copy": in_place_unseen_by_a_copy,
    "masked": masked,
    "metric_first": with_metric_first,
    "retained_gradient": with_retained_gradient,
    "hook": with_hook,
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("name", PLAIN)
def test_other_uses_compute_the_logits(name):
    use = PLAIN[name]
    if "mask" in name and "index" in name:
        num = int((targets(B, T) > 4).sum())
        use = lambda z: functional.cross_entropy(z[targets(B, T) > 4], targets(num))  # noqa: E731
    outcome = compare(use, lean=False, bias=True)
    assert outcome.materialised_by is not None


def test_the_outcome_names_the_first_operation():
    logits = defer(*operands(), chunk_size=3)
    outcome = logits.pending.origin.outcome
    assert outcome == Outcome((B, T, V))
    flat_loss(logits)
    assert outcome == Outcome((B, T, V), consumed=1)
    logits.softmax(-1)
    logits.exp()
    assert "softmax" in outcome.materialised_by
    assert not outcome.is_lean


def test_geometry_computes_nothing():
    logits, plain = defer(*operands(), chunk_size=3), functional.linear(*operands())
    uses = (
        lambda z: (z.shape, z.size(), z.size(1), z.dim(), z.ndim, z.numel(), z.stride(), len(z)),
        lambda z: (z.dtype, z.device, z.layout, z.requires_grad, z.is_leaf, z.is_cuda),
        lambda z: (z.is_contiguous(), z.storage_offset(), z.element_size(), z.nbytes),
        lambda z: (z.is_floating_point(), torch.is_floating_point(z), z.is_sparse),
    )
    moves = (
        lambda z: z,
        lambda z: z[:, 1:],
        lambda z: z.transpose(1, 2),
        lambda z: z[:, 1:].contiguous(),
        lambda z: z[:, :-1].reshape(-1, V),
        lambda z: z.detach(),
        lambda z: z.float(),
    )
    for move in moves:
        for use in uses:
            assert use(move(logits)) == use(move(plain))
    assert isinstance(logits, torch.Tensor)
    assert "DeferredLogits(shape=(2, 5, 11)" in repr(logits)
    assert f"{logits!s}" == repr(logits)
    assert logits.contiguous() is logits
    assert logits.double() is logits
    assert logits.pending.origin.outcome == Outcome((B, T, V))


def test_bad_moves_raise_what_torch_raises():
    logits, plain = defer(*operands(), chunk_size=3), functional.linear(*operands())
    moves = (
        lambda z: z.view(-1, V + 1),
        lambda z: z[:, 1:].view(-1, V),
        lambda z: z[0, 0, 0, 0],
        lambda z: z[5],
        lambda z: z.transpose(0, 7),
        lambda z: functional.cross_entropy(z.view(-1, V), targets(3)),
        lambda z: functional.cross_entropy(z.view(-1, V), targets(B * T) + V),
        lambda z: z.no_such_attribute,
    )
    for move in moves:
        with pytest.raises(Exception) as theirs:
            move(plain)
        with pytest.raises(theirs.type):
            move(logits)


def test_views_share_the_values_once_computed():
    logits = defer(*operands(), chunk_size=3)
    view = logits.view(-1, V)
    assert view.data_ptr() == logits.data_ptr()
    copied = logits[:, 1:].contiguous()
    assert copied.data_ptr() != logits.data_ptr()
    assert logits.numpy(force=True).shape == (B, T, V)


def test_under_autocast():
    hidden, weight, b = operands(bias=True, dtype=torch.float32)
    for use in (flat_loss, lambda z: flat_loss(z.float()), lambda z: z.float().square().mean()):
        found = []
        for make in (lambda *a: defer(*a, chunk_size=3), functional.linear):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = make(hidden, weight, b)
                assert logits.dtype == torch.bfloat16
                loss = use(logits)
            outside = (
                logits.float()
            )  # computed after autocast has ended, as it would have been within
            found.append((loss, *torch.autograd.grad(loss, (hidden, weight, b)), outside + 0))
        for mine, plain in zip(*found, strict=True):
            assert mine.dtype == plain.dtype
            torch.testing.assert_close(mine, plain, rtol=2e-2, atol=2e-3)
        assert torch.equal(found[0][-1], found[1][-1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    hidden, weight, b = operands(bias=True)
    with mode():
        logits, plain = defer(hidden, weight, b, chunk_size=3), functional.linear(hidden, weight, b)
        assert not logits.requires_grad
        loss = flat_loss(logits[:, 1:])
        assert not loss.requires_grad
        torch.testing.assert_close(loss, flat_loss(plain[:, 1:]), rtol=1e-12, atol=0)
        last = logits[:, -1, :].to(copy=True, dtype=torch.float32)
        assert torch.equal(last, plain[:, -1, :].float())
        assert torch.equal(logits.argmax(-1), plain.argmax(-1))
    assert flat_loss(logits).requires_grad is False
    assert torch.equal(logits + 0, plain)


def test_detached_or_ungraded_steps_carry_no_gradient():
    logits = defer(*operands(), chunk_size=3)
    with torch.no_grad():
        ungraded = logits * 2
    for z in (logits.detach(), ungraded):
        assert not z.requires_grad
        assert not flat_loss(z).requires_grad
        assert not (z + 1).requires_grad
    assert (logits + 1).requires_grad


@pytest.mark.parametrize("which", [0, 1, 2])
def test_reading_after_an_operand_has_changed_is_an_error(which):
    changed = operands(bias=True)
    logits = defer(*changed, chunk_size=3)
    flat_loss(logits).backward()
    with torch.no_grad():
        changed[which].add_(1.0)
    for use in (flat_loss, lambda z: z.argmax(-1)):
        with pytest.raises(UnsupportedError, match="before the update"):
            use(logits)


def test_a_gradient_in_the_logits_after_a_lean_loss_is_an_error():
    logits = defer(*operands(), chunk_size=3)
    loss = flat_loss(logits)
    uses = (
        lambda: logits.retain_grad(),
        lambda: logits.register_hook(print),
        lambda: torch.autograd.grad(loss, [logits], allow_unused=True),
    )
    for use in uses:
        with pytest.raises(UnsupportedError, match="before the loss"):
            use()


def test_hidden_in_place_operations_are_an_error():
    class Scribble(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            with torch._C.DisableTorchFunctionSubclass():
                x.mul_(2)
            ctx.mark_dirty(x)
            return x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    with pytest.raises(UnsupportedError, match="in place"):
        Scribble.apply(defer(*operands(), chunk_size=3))


def test_copy_and_pickle_have_the_values():
    with torch.no_grad():
        hidden, weight, _ = operands()
        plain = functional.linear(hidden, weight)
        assert torch.equal(copy.deepcopy(defer(hidden, weight, chunk_size=3)), plain)
        file = io.BytesIO()
        torch.save({"logits": defer(hidden, weight, chunk_size=3)}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)["logits"]
    assert type(loaded) is torch.Tensor
    assert torch.equal(loaded, plain)


def test_under_fake_tensors():
    with FakeTensorMode():
        hidden, weight, _ = operands()
        logits = defer(hidden, weight, chunk_size=3)
        capped = torch.tanh(logits[:, :-1].contiguous() / 3) * 3
        target = torch.zeros(B * (T - 1), dtype=torch.int64)
        functional.cross_entropy(capped.view(-1, V), target).backward()
        assert weight.grad.shape == weight.shape
        assert hidden.grad.shape == hidden.shape
        assert logits.pending.origin.outcome.is_lean
        assert logits.exp().shape == (B, T, V)
        assert (logits * torch.ones((), dtype=torch.float64)).shape == (B, T, V)


def test_hidden_states_are_freed_with_the_logits():
    hidden, weight, _ = operands()
    for use in (flat_loss, lambda z: (z * 1.5).float().view(-1, V).logsumexp(-1).sum()):
        inner = torch.tanh(hidden)
        alive = weakref.ref(inner)
        logits = defer(inner, weight, chunk_size=3)
        loss = use(logits)
        del inner
        assert alive() is not None
        del logits, loss
        assert alive() is None  # by reference counts alone: no cycle


def to_float32(z):
    return z.float()


MOVES = (
    lambda z: z[:, 1:],
    lambda z: z[..., ::2, :],
    lambda z: z[-1],
    lambda z: z[None],
    lambda z: z.squeeze(0),
    lambda z: z.unsqueeze(1),
    lambda z: z.reshape(-1, V),
    lambda z: z.view(-1, V),
    lambda z: z.view(1, *z.shape),
    lambda z: z.flatten(0, 1),
    lambda z: z.transpose(0, 1),
    lambda z: z.transpose(-1, -2),
    lambda z: z.movedim(0, -1),
    lambda z: z.contiguous(),
    lambda z: z.clone(),
    lambda z: z.detach(),
    to_float32,
    lambda z: z.double(),
    lambda z: z * 1.7,
    lambda z: z / -3,
    lambda z: z.tanh(),
    lambda z: z + torch.arange(V, dtype=z.dtype),
    lambda z: z.add_(1.0),
    lambda z: z.exp(),
)


def meaningful_strides(z):
    return [step for step, size in zip(z.stride(), z.shape, strict=True) if size > 1 and z.numel()]


def assert_bits(mine, plain):
    torch.testing.assert_close(mine + 0, plain + 0, rtol=0, atol=0, equal_nan=True)


def along_tokens(z):
    if z.dim() == 2 and z.shape[1] == V:
        return z
    if z.dim() > 2 and z.shape[1] == V:
        return z.movedim(1, -1).reshape(-1, V)
    return z.reshape(-1, V) if z.dim() and z.shape[-1] == V else None


@settings(max_examples=150, deadline=None)
@given(moves=st.lists(st.sampled_from(MOVES), max_size=6), seed=st.integers(0, 99))
def test_any_sequence_of_moves(moves, seed):
    torch.manual_seed(seed)
    hidden, weight, bias = operands(bias=True)
    logits, plain = (
        defer(hidden, weight, bias, chunk_size=3),
        functional.linear(hidden, weight, bias),
    )
    first, plain_first = logits, plain
    for move in moves:
        try:
            plain = move(plain)
        except (RuntimeError, IndexError) as error:
            with pytest.raises(type(error)):
                move(logits)
            return
        logits = move(logits)
        assert logits.shape == plain.shape
        assert meaningful_strides(logits) == meaningful_strides(plain)
        assert (logits.dtype, logits.requires_grad) == (plain.dtype, plain.requires_grad)
    found = []
    for z in (logits, plain):
        rows = along_tokens(z)
        loss = z.square().sum() if rows is None else flat_loss(rows)
        try:
            grads = torch.autograd.grad(loss, (hidden, weight, bias)) if loss.requires_grad else ()
        except RuntimeError as error:  # changed in place after an operation had saved it
            assert "modified by an inplace operation" in str(error)  # noqa: PT017
            grads = ()
        found.append((loss, *grads))
    assert len(found[0]) == len(found[1])
    rounding = 1e-4 if to_float32 in moves else 1e-11
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rounding, atol=rounding, equal_nan=True)
    assert_bits(logits, plain)
    assert_bits(first, plain_first)
