"""The method on small plain modules: what it finds, what it refuses, and that undo is exact."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from slimgrad.errors import MethodError, UnsupportedError
from slimgrad.host import Host
from slimgrad.method import Block, Method, ModelRecord, Offer, Refusal, Scope, method_name
from slimgrad.methods.loss import chunked_cross_entropy as module
from slimgrad.methods.loss.chunked_cross_entropy import ChunkedCrossEntropy, discover, find_head
from slimgrad.methods.loss.deferring_head import outcomes

RECORD = ModelRecord(
    weight_bytes=1,
    gradient_bytes=1,
    state_bytes=0,
    state_tensors=0,
    largest_parameter_bytes=1,
    update_s=0.0,
    batch_size=2,
    separable=True,
    elementwise=True,
)
NUM_CLASSES = 23


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


def assert_same(loss, grads, plain, plain_grads, tolerance=1e-12):
    """Equal up to rounding in float64, relative to the largest entry of each gradient."""
    torch.testing.assert_close(loss, plain, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert len(grads) == len(plain_grads)
    for mine, theirs in zip(grads, plain_grads, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        scale = max(float(theirs.abs().max()), 1e-3) if theirs.numel() else 1.0
        torch.testing.assert_close(mine / scale, theirs / scale, rtol=0, atol=tolerance)


class Classifier(nn.Module):
    """Two heads' worth of temptation: an inner layer is wider than the head."""

    def __init__(self):
        super().__init__()
        double = {"dtype": torch.float64}
        self.embed = nn.Embedding(NUM_CLASSES, 6, **double)
        self.wide = nn.Linear(6, 40, **double)
        self.norm = nn.BatchNorm1d(40, **double)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(40, NUM_CLASSES, **double)

    def forward(self, tokens):
        inner = torch.relu(self.wide(self.embed(tokens)))
        return self.head(self.drop(self.norm(inner.transpose(1, 2)).transpose(1, 2)))


def loss_of_model(model, batch):
    tokens, target = batch
    return functional.cross_entropy(model(tokens).view(-1, NUM_CLASSES), target.view(-1))


def batch_of(num=3, length=9):
    return tuple(torch.randint(0, NUM_CLASSES, (num, length)) for _ in range(2))


def block_of(model, loss_fn=loss_of_model):
    return Block("", Scope.MODEL, host=Host(model, None, loss_fn))


def test_it_is_a_method():
    method = ChunkedCrossEntropy()
    assert isinstance(method, Method)
    assert method_name(method) == "chunked_cross_entropy"
    for line in ("Formula:", "Memory:", "Exactness:", "Limits:", "References:"):
        assert any(text.startswith(line) for text in module.__doc__.splitlines())
    assert ChunkedCrossEntropy(heads=["a"]).heads == ("a",)
    with pytest.raises(MethodError):
        ChunkedCrossEntropy(chunk_size=0)
    with pytest.raises(MethodError):
        ChunkedCrossEntropy(backend="other")


def test_settings_are_made_for_the_heads_that_the_loss_uses():
    model, batch = Classifier(), batch_of()
    settings = ChunkedCrossEntropy.settings(Host(model, None, loss_of_model), batch)
    assert not isinstance(settings, Refusal)
    assert {s.heads for s in settings} == {("head",)}
    assert len({s.chunk_size for s in settings if s.backend == "slimgrad"}) > 1
    block = Block("", Scope.MODEL, record=RECORD)
    for setting in settings:
        offer = setting.offer(block)
        assert isinstance(offer, Offer)
        assert offer.record == RECORD  # the measured step already has it
        assert str(setting.chunk_size) in offer.note


def test_settings_are_refused_where_no_head_feeds_a_cross_entropy():
    def squares(model, batch):
        return model(batch[0]).square().mean()

    settings = ChunkedCrossEntropy.settings(Host(Classifier(), None, squares), batch_of())
    assert isinstance(settings, Refusal)
    assert "cross-entropy" in settings.reason


def test_discover_finds_the_head_and_leaves_all_as_it_was():
    model, batch = Classifier(), batch_of()
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    assert find_head(model) == "wide"  # structure alone cannot know
    assert discover(model, loss_of_model, batch) == ("head",)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_discover_on_fake_tensors_and_without_a_head():
    model = Classifier()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = Classifier()
        tokens = torch.zeros(3, 9, dtype=torch.int64)
        assert discover(fake, loss_of_model, (tokens, tokens)) == ("head",)
    assert discover(model, lambda m, b: m(b[0]).square().mean(), batch_of()) == ()


def test_discover_cleans_up_after_an_error():
    model = Classifier()
    with pytest.raises(ZeroDivisionError):
        discover(model, lambda m, b: 1 / 0, batch_of())
    assert "forward" not in vars(model.head)


def test_attached_step_equals_plain_and_undo_is_exact():
    model, batch = Classifier(), batch_of()

    def run():
        torch.manual_seed(1)  # dropout
        model.zero_grad()
        model.norm.reset_running_stats()
        with LargestOutput() as seen:
            loss = loss_of_model(model, batch)
        loss.backward()
        return loss, [p.grad for p in model.parameters()], seen.numel

    plain, plain_grads, plain_numel = run()
    state_keys, attributes = list(model.state_dict()), set(vars(model.head))
    undo = ChunkedCrossEntropy(chunk_size=4, heads=("head",)).attach(block_of(model))
    loss, grads, _ = run()
    assert_same(loss, grads, plain, plain_grads)
    assert outcomes(model.head)[-1].is_lean
    assert list(model.state_dict()) == state_keys
    undo()
    undo()
    assert set(vars(model.head)) == attributes
    again, again_grads, again_numel = run()
    assert torch.equal(again, plain)
    assert again_numel == plain_numel
    assert all(torch.equal(a, b) for a, b in zip(again_grads, plain_grads, strict=True))


def test_hooks_on_the_head_fire_once():
    model, calls = Classifier().eval(), []
    model.head.register_forward_hook(lambda m, args, out: calls.append(tuple(out.shape)))
    undo = ChunkedCrossEntropy(heads=("head",)).attach(block_of(model))
    loss_of_model(model, batch_of()).backward()
    assert calls == [(3, 9, NUM_CLASSES)]
    assert outcomes(model.head)[-1].is_lean
    undo()


def test_backward_hooks_on_the_head_make_it_plain():
    model, calls, batch = Classifier().eval(), [], batch_of()
    model.head.register_full_backward_hook(lambda m, gi, go: calls.append(go[0].shape))
    plain = loss_of_model(model, batch)
    undo = ChunkedCrossEntropy(heads=("head",)).attach(block_of(model))
    loss = loss_of_model(model, batch)
    assert torch.equal(loss, plain)
    loss.backward()
    assert calls == [(3, 9, NUM_CLASSES)]
    assert outcomes(model.head)[-1].materialised_by == "backward hooks on the head"
    undo()


def test_a_replaced_forward_or_a_missing_head_is_refused():
    model = Classifier()
    model.head.forward = model.head.forward
    with pytest.raises(UnsupportedError, match="replaced forward"):
        ChunkedCrossEntropy(heads=("wide", "head")).attach(block_of(model))
    assert "forward" not in vars(model.wide)
    with pytest.raises(UnsupportedError, match="found none"):
        ChunkedCrossEntropy().attach(block_of(nn.Conv1d(2, 3, 1)))


def test_an_undone_forward_that_was_wrapped_since_is_plain():
    model, batch = Classifier().eval(), batch_of()
    plain = loss_of_model(model, batch)
    undo = ChunkedCrossEntropy(heads=("head",)).attach(block_of(model))
    inner = model.head.forward
    model.head.forward = lambda x: inner(x)
    undo()
    assert torch.equal(loss_of_model(model, batch), plain)
    assert "forward" in vars(model.head)


def test_a_copy_of_an_attached_model_trains_itself():
    model, batch = Classifier().eval(), batch_of()
    undo = ChunkedCrossEntropy(heads=("head",)).attach(block_of(model))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.head.weight.mul_(2.0)
    loss_of_model(twin, batch).backward()
    assert model.head.weight.grad is None
    mine = loss_of_model(twin, batch)
    undo()
    del vars(twin.head)["forward"]
    torch.testing.assert_close(mine, loss_of_model(twin, batch), rtol=1e-12, atol=0)


def test_torch_func_keeps_the_plain_head():
    model, batch = Classifier().eval(), batch_of()
    parameters = dict(model.named_parameters())

    def loss(parameters):
        logits = torch.func.functional_call(model, parameters, (batch[0],))
        return functional.cross_entropy(logits.view(-1, NUM_CLASSES), batch[1].view(-1))

    plain = torch.func.grad(loss)(parameters)
    undo = ChunkedCrossEntropy(heads=("head",)).attach(block_of(model))
    found = torch.func.grad(loss)(parameters)
    undo()
    assert all(torch.equal(found[k], plain[k]) for k in plain)


def test_an_absent_backend_is_refused(monkeypatch):
    monkeypatch.delattr(functional, "linear_cross_entropy", raising=False)
    method = ChunkedCrossEntropy(backend="torch")
    refusal = method.offer(Block("", Scope.MODEL, record=RECORD))
    assert isinstance(refusal, Refusal)
    with pytest.raises(MethodError, match=r"2\.13"):
        method.attach(Block("", Scope.MODEL, host=Host(Classifier(), None, loss_of_model)))
