"""Traced steps: on fake tensors as on real ones, changing nothing, operations attributed to calls."""

import random
import warnings

import numpy as np
import pytest
import torch
from tests.plain_training import State, plain_step
from tests.sample_models import SAMPLES, adamw
from torch import nn

from slimgrad import measure
from slimgrad.errors import LossError
from slimgrad.host import Share
from slimgrad.measuring.blocks import cut
from slimgrad.measuring.trace import trace_step
from slimgrad.methods.gradients.micro_batches import MicroBatches
from slimgrad.types import Column


def _trace(name, *, fake, parts=1):
    model, loss_fn, batch = SAMPLES[name].make()
    shares = MicroBatches(parts).split(batch) if parts > 1 else [Share(batch)]
    keys = {}
    return trace_step(model, loss_fn, shares, cut(model), keys, fake=fake), keys


@pytest.mark.parametrize("name", SAMPLES)
def test_fake_and_real_traces_agree(name):
    (fake, _), (real, _) = _trace(name, fake=True), _trace(name, fake=False)
    assert fake.timeline().peak_bytes == real.timeline().peak_bytes
    at_end = [t.timeline().columns[Column.GRADIENTS][-1] for t in (fake, real)]
    assert at_end[0] == at_end[1]
    assert [c.path for c in fake.calls] == [c.path for c in real.calls]


@pytest.mark.parametrize("name", ["attention", "gpt2", "llama"])
def test_fake_and_real_traces_agree_operation_by_operation(name):
    """Models that look at masks and positions take the same way on fake tensors."""
    (fake, fake_keys), (real, real_keys) = _trace(name, fake=True), _trace(name, fake=False)

    def operations(trace, keys):
        by_number = {number: str(key[0]) for key, number in keys.items()}
        return [by_number[op] for op in trace.op]

    assert operations(fake, fake_keys) == operations(real, real_keys)
    assert (fake.timeline().total == real.timeline().total).all()


def test_fake_and_real_micro_batches_agree():
    fake, real = (_trace("mlp", fake=kind, parts=4)[0] for kind in (True, False))
    assert fake.timeline().peak_bytes == real.timeline().peak_bytes
    assert fake.num_shares == 4


@pytest.mark.parametrize("name", SAMPLES)
def test_measure_changes_nothing(measured, name):
    assert measured(name)[1] == []


def test_measure_draws_from_no_generator_and_keeps_schedulers():
    model, loss_fn, batch = SAMPLES["attention"].make()
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    wrapped, held = optimizer.step, scheduler.state_dict()
    python, numpy = random.getstate(), np.random.get_state()
    tensors = dict(model.named_parameters())
    measure(model, optimizer, loss_fn, batch, limit_s=0.0)
    assert optimizer.step is wrapped
    assert scheduler.state_dict() == held
    assert random.getstate() == python
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy, strict=True))
    assert all(p is tensors[n] for n, p in model.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error"
        )  # a scheduler that was fooled would warn of the order of steps
        plain_step(model, optimizer, loss_fn, batch)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)


def test_user_hooks_are_left_alone():
    model, loss_fn, batch = SAMPLES["mlp"].make()
    model[1].register_forward_hook(lambda *_: None)
    model[1].weight_hook = model[1][0].weight.register_post_accumulate_grad_hook(lambda _: None)
    measure(model, adamw(model), loss_fn, batch, limit_s=0.0)
    assert len(model[1]._forward_hooks) == 1
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks
    assert len(model[1][0].weight._post_accumulate_grad_hooks) == 1
    assert not model[0][0].weight._post_accumulate_grad_hooks


@pytest.mark.parametrize("name", ["mlp", "tied", "frozen_layer", "shared_twice"])
def test_every_gradient_has_the_tick_at_which_it_was_complete(name):
    model, _, _ = SAMPLES[name].make()
    trace, _ = _trace(name, fake=True)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trace.gradients.keys() == trainable.keys()
    for parameter, (storage, tick) in trace.gradients.items():
        assert trace.nbytes[storage] == trainable[parameter].nbytes
        assert trace.birth[storage] <= tick
        assert trace.death[storage] > trace.num_ticks  # kept to the end
        assert trace.op_backward[tick - 1]
        assert list(Column)[trace.column[storage]] is Column.GRADIENTS


def test_gradients_complete_from_the_last_layer_to_the_first():
    trace, _ = _trace("mlp", fake=True)
    ticks = [trace.gradients[f"{i}.0.weight"][1] for i in range(4)]
    assert ticks == sorted(ticks, reverse=True)
    tied, _ = _trace("tied", fake=True)
    # a tied weight is complete only after the embedding's backward, the last of all
    assert tied.gradients["embed.weight"][1] == max(tick for _, tick in tied.gradients.values())


def test_operations_belong_to_the_calls_that_made_them():
    trace, keys = _trace("mlp", fake=True)
    names = {number: key[0].overloadpacket.__name__ for key, number in keys.items()}
    for index, call in enumerate(trace.calls[:4]):
        forward = (trace.op_call == index) & ~trace.op_backward
        assert list(np.flatnonzero(forward)) == list(range(call.forward_from, call.forward_to))
        mine = [names[op] for op in trace.op[(trace.op_call == index) & trace.op_backward]]
        assert mine.count("gelu_backward") == 1
        # two layers, each with the gradients of weight and input; the batch needs none
        assert mine.count("mm") == (4 if index else 3)
    outside = [names[op] for op in trace.op[trace.op_call < 0]]
    assert "_log_softmax" in outside
    assert "gelu" not in outside


def test_a_module_called_twice_has_two_calls():
    trace, _ = _trace("shared_twice", fake=True)
    assert [c.path for c in trace.calls] == [f"blocks.{i}" for i in (0, 1, 2, 0, 1, 2)]
    for index in range(6):
        assert ((trace.op_call == index) & trace.op_backward).any()


def test_borders_of_calls_are_the_storages_that_cross_them():
    trace, _ = _trace("mlp", fake=True)
    for one, two in zip(trace.calls[:-1], trace.calls[1:], strict=True):
        assert one.outputs == two.inputs
        assert [trace.nbytes[s] for s in one.outputs] == [4 * 4 * 16 * 48]


def test_a_fake_trace_allocates_nothing():
    """A layer of 16 GiB: on real tensors it could not be made here at all."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2**16, 2**16, bias=False), nn.ReLU())
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        model = nn.Sequential(nn.Linear(2**16, 2**16, bias=False), nn.ReLU())
        x = torch.randn(4, 2**16)
    assert mode is not None
    trace = trace_step(model, lambda m, b: m(b).sum(), [Share(x)], cut(model), {})
    assert trace.timeline().columns[Column.GRADIENTS].max() == 4 * 2**32


@pytest.mark.parametrize(
    ("loss_fn", "found"),
    [
        (lambda m, b: m(b[0]), r"shape \(4, 16, 10\)"),
        (lambda m, b: m(b[0]).sum().item(), "float"),
        (lambda m, b: (m(b[0]).sum(), 1), "tuple"),
        (lambda m, b: m(b[0]).sum().detach(), "no gradient"),
        (lambda m, b: torch.no_grad()(m)(b[0]).sum(), "no gradient"),
        (lambda m, b: None, "NoneType"),
    ],
    ids=["vector", "number", "tuple", "detached", "no_grad", "none"],
)
def test_a_loss_that_is_no_scalar_with_a_gradient(loss_fn, found):
    model, _, batch = SAMPLES["mlp"].make()
    optimizer = adamw(model)
    before = State.of(model, optimizer)
    with pytest.raises(LossError, match=found):
        measure(model, optimizer, loss_fn, batch, limit_s=0.0)
    assert State.of(model, optimizer).differences(before) == []


def test_a_loss_function_that_fails_is_told():
    model, _, batch = SAMPLES["mlp"].make()
    with pytest.raises(LossError, match="no_such_layer"):
        measure(model, None, lambda m, b: m.no_such_layer(b), batch, limit_s=0.0)
