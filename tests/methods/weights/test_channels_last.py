"""Convolution weights with channels last: their places in memory, and that nothing else of training changes."""

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from tests.hand_made_plans import block_paths, hand_made
from tests.sample_models import adamw, cross_entropy
from tests.single_method_plans import measured_peak, plan_of
from torch import nn

from slimgrad import measure, plan
from slimgrad.applying.step import apply
from slimgrad.host import Host
from slimgrad.measuring.profile import Profile
from slimgrad.method import Block, Refusal, Scope
from slimgrad.methods.weights.channels_last import ChannelsLast
from slimgrad.planning.plan import Choice
from slimgrad.training.checkpoint import load_checkpoint, save_checkpoint
from slimgrad.training.offloaded import state_sink, state_source
from slimgrad.training.resume import capture, restore

ALONE = (("channels_last", ()),)
TOLERANCE = 1e-10

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


def network() -> nn.Module:
    """Blocks of a convolution with batch norm; a 1x1 convolution and a transposed one at the end."""
    torch.manual_seed(5)

    def block(c_in, c_out):
        return nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()
        )

    body = nn.Sequential(block(4, 16), *(block(16, 16) for _ in range(3)))
    tail = nn.Sequential(nn.Conv2d(16, 8, 1), nn.ConvTranspose2d(8, 6, 2, stride=2))
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))
    return nn.Sequential(body, tail, pooled)


def images(dtype=torch.float64, num=6):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(num, 4, 16, 16, generator=generator).to(dtype),
        torch.randint(0, 10, (num,), generator=generator),
    )


def live(model, optimizer=None):
    return Block("", Scope.MODEL, host=Host(model, optimizer, cross_entropy))


def own_step(model, optimizer, batch):
    optimizer.zero_grad()
    cross_entropy(model, batch).backward()
    optimizer.step()


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def agree(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=TOLERANCE, atol=TOLERANCE), name


def test_weights_get_the_layout_and_undo_gives_it_back():
    model = nn.Sequential(network(), nn.Conv1d(3, 4, 2), nn.Conv3d(2, 3, 2), nn.Conv2d(4, 4, 3))
    model[3].weight.requires_grad_(False)
    before = values(model)
    strides = {n: p.stride() for n, p in model.named_parameters()}
    objects = dict(model.named_parameters())
    undo = ChannelsLast().attach(live(model))
    assert model[0][0][0][0].weight.stride() == (36, 1, 12, 4)
    assert model[0][1][1].weight.stride() == (24, 1, 12, 6)
    assert model[2].weight.stride() == (16, 1, 8, 4, 2)
    assert model[3].weight.stride() == (36, 1, 12, 4)
    changed = {n for n, p in model.named_parameters() if p.stride() != strides[n]}
    convolutions = {"0.0.0.0", "0.0.1.0", "0.0.2.0", "0.0.3.0", "0.1.1", "2", "3"}
    assert changed == {f"{path}.weight" for path in convolutions}
    for _ in range(2):
        assert {n: id(p) for n, p in model.named_parameters()} == {
            n: id(p) for n, p in objects.items()
        }
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
        undo()
    assert {n: p.stride() for n, p in model.named_parameters()} == strides


def test_outputs_of_convolutions_follow_and_the_batch_stays():
    model, batch = network().double(), images()
    seen = []
    model[0].register_forward_hook(lambda _, args, out: seen.append(out.stride()[1]))
    model(batch[0])
    undo = ChannelsLast().attach(live(model))
    model(batch[0])
    undo()
    assert seen == [16 * 16, 1]
    assert batch[0].is_contiguous()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_made_before_meanwhile_and_after(name):
    """Fused kernels take elements in the order of memory, whatever the strides say."""
    batch = images()
    model, other = network().double(), network().double()
    optimizer, theirs = (OPTIMIZERS[name](m.parameters()) for m in (model, other))
    for _ in range(5):
        own_step(other, theirs, batch)
    own_step(model, optimizer, batch)
    for _ in range(2):
        undo = ChannelsLast().attach(live(model, optimizer))
        own_step(model, optimizer, batch)
        weight = model[0][1][0].weight
        assert weight.grad.stride() == weight.stride() == (144, 1, 48, 16)
        undo()
        assert weight.grad.stride() == weight.stride() == (144, 9, 3, 1)
        own_step(model, optimizer, batch)
    agree(values(model), values(other))


@pytest.mark.parametrize("name", ["adamw_fused", "sgd_fused"])
def test_state_that_is_loaded_meanwhile(name):
    batch = images()
    other = network().double()
    theirs = OPTIMIZERS[name](other.parameters())
    own_step(other, theirs, batch)
    model = network().double()
    optimizer = OPTIMIZERS[name](model.parameters())
    undo = ChannelsLast().attach(live(model, optimizer))
    model.load_state_dict(other.state_dict())
    loaded = copy.deepcopy(theirs.state_dict())
    strides = [v.stride() for s in loaded["state"].values() for v in s.values()]
    optimizer.load_state_dict(loaded)
    assert [v.stride() for s in loaded["state"].values() for v in s.values()] == strides
    for each in ((model, optimizer), (other, theirs)):
        own_step(*each, batch)
    undo()
    agree(values(model), values(other))
    assert not optimizer._optimizer_load_state_dict_post_hooks


def chosen(*methods, **fields):
    return [Choice("", name, fields.get(name, {})) for name in ("channels_last", *methods)]


SLICES = {"offload_state": {"slice_bytes": 256}}


@pytest.mark.parametrize(
    ("methods", "clip"),
    [
        (["update_in_backward"], None),
        (["offload_state"], None),
        (["offload_state"], 0.5),
        (["offload_state", "update_in_backward"], None),
        (["offload_gradients"], 0.5),
        (["offload_state", "offload_gradients"], 0.5),
    ],
    ids=lambda v: "+".join(v) if isinstance(v, list) else str(v),
)
@pytest.mark.parametrize("name", ["adamw_fused", "adamw"])
def test_updates_are_those_of_plain_training(name, methods, clip):
    batch = images()
    model, other = network().double(), network().double()
    optimizer, theirs = (OPTIMIZERS[name](m.parameters()) for m in (model, other))

    def plain(model, optimizer):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(5):
        plain(other, theirs)
    plain(model, optimizer)
    asked = plan_of(model, optimizer, chosen(*methods, **SLICES))
    asked = dataclasses.replace(asked, clip_grad_norm=clip)
    with apply(asked, model, optimizer, cross_entropy) as step:
        for _ in range(3):
            step(batch)
    plain(model, optimizer)
    agree(values(model), values(other))
    for mine, its in zip(optimizer.state.values(), theirs.state.values(), strict=True):
        assert mine["exp_avg"].stride() == its["exp_avg"].stride()
        assert torch.allclose(mine["exp_avg"], its["exp_avg"], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("methods", [[], ["offload_state"]], ids=["in_memory", "offloaded"])
def test_a_checkpoint_continues_the_run(methods, tmp_path):
    batch = images()

    def started():
        model = network().double()
        optimizer = OPTIMIZERS["adamw_fused"](model.parameters())
        asked = plan_of(model, optimizer, chosen(*methods, **SLICES))
        return model, optimizer, apply(asked, model, optimizer, cross_entropy)

    model, optimizer, step = started()
    for _ in range(2):
        step(batch)
    saved = capture(model, optimizer, step=2, state_of=state_source(step.host))
    path = save_checkpoint(tmp_path, saved)
    step(batch)
    again, its_optimizer, resumed = started()
    put_state = state_sink(resumed.host)
    restore(load_checkpoint(path.parent), again, its_optimizer, put_state=put_state)
    resumed(batch)
    assert all(torch.equal(v, values(model)[n]) for n, v in values(again).items())
    step.undo()
    resumed.undo()


@functools.cache
def profile() -> Profile:
    model = network()
    return measure(
        model,
        adamw(model),
        cross_entropy,
        images(torch.float32, 24),
        limit_s=0.0,
        allow_compile=False,
    )


@pytest.mark.parametrize(
    ("on_blocks", "on_model"),
    [
        (None, []),
        ("recompute", []),
        ("selective_recompute", []),
        ("offload_activations", []),
        (None, ["update_in_backward"]),
        ("recompute", ["update_in_backward", "offload_state"]),
    ],
)
def test_predicted_peak_is_the_measured_one(on_blocks, on_model):
    model, batch = network(), images(torch.float32, 24)
    convolutions = [path for path in block_paths(profile()) if path.startswith("0.")]
    paths = dict.fromkeys(convolutions, on_blocks) if on_blocks else {}
    made = hand_made(profile(), paths, variant=ALONE, on_model=on_model)
    with apply(made, model, adamw(model), cross_entropy) as step:
        measured = measured_peak(step, batch)
    above = 1.12 if on_blocks == "offload_activations" else 1.03
    assert 0.97 * measured <= made.peak_bytes <= above * measured + 2**16


def test_measuring_leaves_every_tensor_where_it_is():
    model = network().float()
    optimizer = torch.optim.AdamW(model.parameters())
    own_step(model, optimizer, images(torch.float32))
    before = [p.data_ptr() for p in model.parameters()]
    state = [t for s in optimizer.state.values() for t in s.values()]
    measure(model, optimizer, cross_entropy, images(torch.float32), limit_s=0.0)
    assert [p.data_ptr() for p in model.parameters()] == before
    now = [t for s in optimizer.state.values() for t in s.values()]
    assert all(a is b for a, b in zip(now, state, strict=True))


@pytest.mark.parametrize(("factor", "is_chosen"), [(1.1, False), (1.0, False), (0.9, True)])
def test_it_is_chosen_where_real_passes_were_faster(factor, is_chosen):
    variants = {}
    for key, trace in profile().variants.items():
        seconds = factor if "channels_last" in dict(key) else 1.0
        spread = np.full(len(trace.op), seconds / len(trace.op))
        variants[key] = dataclasses.replace(trace, op_seconds=spread, is_timed=True)
    assert ALONE in variants
    made = plan(dataclasses.replace(profile(), variants=variants), "100%")
    assert ("channels_last" in [c.method for c in made.choices]) is is_chosen


def shared_memory():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight.data = model[0].weight.data
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3)), "no 2-d or 3-d"),
        (lambda: nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last), "already"),
        (lambda: nn.Conv2d(4, 4, 1), "already"),
        (shared_memory, "share"),
        (lambda: nn.LazyConv2d(4, 3), "no 2-d or 3-d"),
    ],
)
def test_refusals(make, reason):
    found = ChannelsLast.settings(live(make()).live, None)
    assert isinstance(found, Refusal)
    assert reason in found.reason
