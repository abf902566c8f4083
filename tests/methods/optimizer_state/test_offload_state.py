"""Streaming the state gives the bits of plain training, whatever the optimizer keeps, and undo brings it back."""

import copy
import os

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from slimgrad.errors import MethodError, StorageError, UnsupportedError
from slimgrad.host import Host
from slimgrad.method import Block, ModelRecord, Offer, Refusal, Scope
from slimgrad.methods.optimizer_state.offload_state import OffloadState
from slimgrad.optimizers import is_elementwise, is_sliceable
from slimgrad.storage import store_of
from slimgrad.streaming import StreamedUpdate, cuts_of


class Lion(torch.optim.Optimizer):
    """An optimizer whose state is one tensor that it replaces, and a Python int."""

    def __init__(self, params, lr=1e-2, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                average = state.get("average", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(torch.sign(average * 0.9 + p.grad * 0.1) * group["lr"])
                state["average"] = average * 0.99 + p.grad * 0.01
                state["count"] = state.get("count", 0) + 1


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, maximize=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw_tensor_lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd_momentum": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "rmsprop": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "rprop": lambda p: torch.optim.Rprop(p),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "lion": Lion,
}


class Net(nn.Module):
    """Tied weights, a scalar parameter, a frozen one, one that never gets a gradient, a transposed one."""

    def __init__(self, dtype):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.1))
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(7))
        self.turned = nn.Parameter(torch.randn(5, 6).t())
        self.to(dtype)

    def forward(self, x):
        h = torch.tanh(self.inner(self.embed(x))) * self.scale + self.frozen
        return self.head(h + (h @ self.turned).sum(-1, keepdim=True) * 0.1)


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten())


def batches(num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 11, (4, 5), generator=generator) for _ in range(num)]


def training(make, dtype=torch.float32, clip=None):
    torch.manual_seed(3)
    model = Net(dtype)
    decayed = [p for n, p in model.named_parameters() if n.endswith("weight")]
    others = [p for n, p in model.named_parameters() if not n.endswith("weight")]
    optimizer = make([{"params": decayed, "lr": 0.02}, {"params": others, "weight_decay": 0.0}])
    if isinstance(optimizer.param_groups[0]["lr"], float) and isinstance(
        optimizer.defaults["lr"], torch.Tensor
    ):
        optimizer.param_groups[0]["lr"] = torch.tensor(0.02)
    return Host(model, optimizer, loss_fn, clip_grad_norm=clip)


class Driver:
    """What a step does with a host, here in ten lines."""

    def __init__(self, host):
        self.host = host
        self.completed = []
        for parameter in host.parameters():
            parameter.register_post_accumulate_grad_hook(self.complete)

    def complete(self, parameter):
        self.completed.append(parameter)
        if self.host.on_gradient is not None:
            self.host.on_gradient(parameter)

    def __call__(self, batch):
        self.completed = []
        loss = self.host.loss_fn(self.host.model, batch)
        loss.backward()
        self.host.finish()
        self.host.gradient_order = self.completed
        for parameter in self.host.parameters():
            parameter.grad = None
        return loss.detach()


def update_during_backward(host):
    """As the method of that name does it."""

    def consume(parameter):
        host.update(parameter)
        parameter.grad = None

    host.on_gradient, host.finish = consume, lambda: host.optimizer.step()


def attach(host, **fields):
    return OffloadState(**{"slice_bytes": 64, **fields}).attach(Block("", Scope.MODEL, host=host))


def equal(a, b):
    if isinstance(a, torch.Tensor):
        same_kind = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.stride() == b.stride()
        return same_kind and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def same(host, plain):
    return equal(dict(host.model.state_dict()), dict(plain.model.state_dict())) and equal(
        host.optimizer.state_dict(), plain.optimizer.state_dict()
    )


def tensors_in_memory(optimizer):
    return [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]


@pytest.mark.parametrize("during", [False, True], ids=["after", "during"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bits_of_plain_training(name, during):
    plain, host = training(OPTIMIZERS[name]), training(OPTIMIZERS[name])
    attach(host)
    if during:
        update_during_backward(host)
    plain_step, step = Driver(plain), Driver(host)
    for batch in batches(4):
        assert torch.equal(step(batch), plain_step(batch))
        assert all(t.numel() < 2 for t in tensors_in_memory(host.optimizer))
        assert same(host, plain)
    assert any(v.numel() > 1 for v in tensors_in_memory(plain.optimizer)) == (name != "sgd")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["adamw", "sgd_momentum", "rmsprop", "adafactor"])
def test_other_dtypes(name, dtype):
    plain, host = training(OPTIMIZERS[name], dtype), training(OPTIMIZERS[name], dtype)
    attach(host, slice_bytes=72)
    plain_step, step = Driver(plain), Driver(host)
    for batch in batches(3):
        plain_step(batch)
        step(batch)
    assert same(host, plain)


@pytest.mark.parametrize("num_buffers", [1, 2, 3, 40])
@pytest.mark.parametrize("slice_bytes", [64, 100, 2**20])
def test_any_slices_and_buffers(num_buffers, slice_bytes):
    plain, host = training(OPTIMIZERS["adamw"]), training(OPTIMIZERS["adamw"])
    attach(host, num_buffers=num_buffers, slice_bytes=slice_bytes)
    update_during_backward(host)
    plain_step, step = Driver(plain), Driver(host)
    for batch in batches(4):
        plain_step(batch)
        step(batch)
    assert same(host, plain)


def test_state_that_exists_is_moved_and_undo_brings_it_back():
    plain, host = training(OPTIMIZERS["adamw"]), training(OPTIMIZERS["adamw"])
    plain_step, step = Driver(plain), Driver(host)
    first, second, third = batches(3)
    plain_step(first), step(first)
    before = copy.deepcopy(host.optimizer.state_dict())
    update, finish = host.update, host.finish
    undo = attach(host)
    assert all(t.numel() < 2 for t in tensors_in_memory(host.optimizer))
    assert host.update != update
    undo()
    assert (host.update, host.finish) == (update, finish)
    assert equal(host.optimizer.state_dict(), before)
    assert StreamedUpdate.of(host) is None
    undo = attach(host)
    plain_step(second), step(second)
    undo()
    undo()
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        assert not getattr(host.optimizer, name)
    for name in ("_optimizer_state_dict_post_hooks", "_optimizer_load_state_dict_post_hooks"):
        assert not getattr(host.optimizer, name)
    assert equal(
        dict(enumerate(host.optimizer.state.values())),
        dict(enumerate(plain.optimizer.state.values())),
    )
    plain_step(third), step(third)
    assert same(host, plain)


def test_the_users_own_loop():
    plain, host = training(OPTIMIZERS["adamw"]), training(OPTIMIZERS["adamw"])
    attach(host)
    for batch in batches(3):
        for each in (plain, host):
            each.optimizer.zero_grad()
            loss_fn(each.model, batch).backward()
            each.optimizer.step()
        for p, q in zip(host.parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.equal(p.grad, q.grad)
    assert same(host, plain)


def test_gradients_are_freed_in_a_step_of_ours():
    host = training(OPTIMIZERS["adamw"])
    attach(host)
    loss_fn(host.model, batches(1)[0]).backward()
    host.finish()
    assert all(p.grad is None for p in host.parameters())


@pytest.mark.parametrize("clip", [0.05, 100.0])
def test_clipping(clip):
    plain, host = (training(OPTIMIZERS["adamw"], clip=clip) for _ in range(2))
    unclipped = training(OPTIMIZERS["adamw"])
    attach(host)
    steps = [Driver(each) for each in (plain, host, unclipped)]
    for batch in batches(3):
        for step in steps:
            step(batch)
    assert same(host, plain)
    assert same(host, unclipped) == (clip == 100.0)


@pytest.mark.parametrize("during", [False, True], ids=["after", "during"])
def test_schedulers_and_hooks_see_one_step(during):
    plain, host = training(OPTIMIZERS["adamw"]), training(OPTIMIZERS["adamw"])
    counts = []
    for each in (plain, host):
        each.optimizer.register_step_pre_hook(lambda *_: counts.append("pre"))
        each.optimizer.register_step_post_hook(lambda *_: counts.append("post"))
    attach(host)
    if during:
        update_during_backward(host)
    schedulers = [StepLR(each.optimizer, 2, 0.3) for each in (plain, host)]
    steps = [Driver(plain), Driver(host)]
    for batch in batches(4):
        for step, scheduler in zip(steps, schedulers, strict=True):
            counts.clear()
            step(batch)
            assert counts == ["pre", "post"]
            scheduler.step()  # a warning, and so an error, if it saw no optimizer step
    assert same(host, plain)


def test_loading_a_state_dict():
    source, plain, host = (training(OPTIMIZERS["adamw"]) for _ in range(3))
    undo = attach(host)
    step, plain_step, source_step = Driver(host), Driver(plain), Driver(source)
    first, second, third = batches(3, seed=5)
    for each in (step, plain_step, source_step):
        each(first), each(third)
    source_step(second)  # another state than the one in the store
    saved = copy.deepcopy(source.optimizer.state_dict())
    size = store_of(host).file_bytes
    for each in (plain, host):
        each.optimizer.load_state_dict(copy.deepcopy(saved))  # torch keeps its step tensors
    assert store_of(host).file_bytes == size
    assert all(t.numel() < 2 for t in tensors_in_memory(host.optimizer))
    assert same(host, plain)
    step(third), plain_step(third)
    undo()
    assert same(host, plain)


def test_state_can_be_read_in_slices():
    host = training(OPTIMIZERS["adamw"])
    attach(host)
    step = Driver(host)
    for batch in batches(2):
        step(batch)
    streamed = StreamedUpdate.of(host)
    full = host.optimizer.state_dict()["state"]
    indices = {
        id(p): i for i, p in enumerate(q for g in host.optimizer.param_groups for q in g["params"])
    }
    longest = 0
    for parameter in host.parameters():
        found = {}
        for key, start, values in streamed.state_slices(parameter):
            found.setdefault(key, []).append((start, values.clone()))
            longest = max(longest, values.numel()) if parameter.is_contiguous() else longest
        if parameter.numel() < 2 or parameter is host.model.unused:
            assert not found
            continue
        assert set(found) == {"exp_avg", "exp_avg_sq"}
        for key, parts in found.items():
            assert [start for start, _ in parts] == sorted(start for start, _ in parts)
            whole = torch.cat([values for _, values in parts])
            assert torch.equal(whole, full[indices[id(parameter)]][key].reshape(-1))
    assert longest == 64 // 4


@pytest.mark.parametrize("during", [False, True])
def test_buffers_are_what_the_offer_says(during):
    """They stay where backward uses them; else they are gone when the updates are done."""
    host = training(OPTIMIZERS["adamw"])
    method = OffloadState(slice_bytes=64, num_buffers=3)
    method.attach(Block("", Scope.MODEL, host=host))
    if during:
        update_during_backward(host)
    streamed, update, seen = StreamedUpdate.of(host), host.update, set()

    def looking(parameter):
        update(parameter)
        seen.add(streamed.ahead.buffer_bytes)

    host.update = looking
    step = Driver(host)
    for batch in batches(3):
        step(batch)
    offer = method.offer(Block("", Scope.MODEL, record(largest_parameter_bytes=66 * 4)))
    assert max(seen) == offer.record.buffer_bytes == 3 * 2 * 64
    assert streamed.ahead.buffer_bytes == (max(seen) if during else 0)


def test_the_next_parameter_is_read_ahead():
    host = training(OPTIMIZERS["adamw"])
    attach(host, slice_bytes=2**20)
    update_during_backward(host)
    step = Driver(host)
    for batch in batches(2):
        step(batch)
    streamed = StreamedUpdate.of(host)
    ahead = []
    take = streamed.ahead.take

    def watch(parameter, cut):
        ahead.append(any(r.parameter is parameter and r.cut == cut for r in streamed.ahead._queue))
        return take(parameter, cut)

    streamed.ahead.take = watch
    step(batches(1)[0])
    assert len(ahead) == 4
    assert sum(ahead) >= 3  # what follows a parameter that is updated whole is not


def test_a_closure_is_refused():
    host = training(OPTIMIZERS["adamw"])
    attach(host)
    with pytest.raises(UnsupportedError, match="closure"):
        host.optimizer.step(lambda: 0.0)
    with pytest.raises(UnsupportedError, match="closure"):
        host.optimizer.step(closure=lambda: 0.0)


@pytest.mark.parametrize("num_buffers", [1, 2, 3, 9])
@pytest.mark.parametrize("sizes", [[40], [12, 15], [40, 12]])
def test_nothing_is_read_before_it_is_written(sizes, num_buffers):
    def make():
        torch.manual_seed(0)
        model = nn.ParameterList(torch.randn(n) for n in sizes)
        return Host(model, OPTIMIZERS["adamw"](model.parameters()), loss_fn)

    plain, host = make(), make()
    attach(host, num_buffers=num_buffers)
    for step in range(4):
        for each in (plain, host):
            for parameter in each.model:
                parameter.grad = parameter.detach().cos() * (step + 1)
            each.optimizer.step()
    assert same(host, plain)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_and_dense_gradients_take_turns():
    def make():
        torch.manual_seed(0)
        model = nn.Embedding(20, 3)
        return Host(model, OPTIMIZERS["adagrad"](model.parameters()), loss_fn)

    plain, host = make(), make()
    attach(host)
    for is_sparse in (False, False, True, False, True, True, False):
        for each in (plain, host):
            gradient = each.model.weight.detach().cos()
            each.model.weight.grad = gradient.to_sparse(1) if is_sparse else gradient
            each.optimizer.step()
            each.model.weight.grad = None
        assert same(host, plain)


def test_a_shortened_file_is_told():
    host = training(OPTIMIZERS["adamw"])
    attach(host)
    step = Driver(host)
    first, second = batches(2)
    step(first)
    os.ftruncate(store_of(host).fileno(), 0)
    with pytest.raises(StorageError, match="cut short"):
        step(second)


def test_an_update_that_fails_keeps_the_gradients_of_the_users_loop():
    host, updated = training(OPTIMIZERS["adamw"]), []
    attach(host)
    update = host.update

    def fails_at_last(parameter):
        updated.append(parameter)
        if len(updated) == 3:
            raise StorageError("no more")
        update(parameter)

    host.update = fails_at_last
    loss_fn(host.model, batches(1)[0]).backward()
    gradients = [p.grad for p in host.parameters()]
    with pytest.raises(StorageError, match="no more"):
        host.optimizer.step()
    for parameter, gradient in zip(host.parameters(), gradients, strict=True):
        assert parameter.grad is gradient


def test_no_room_leaves_all_as_it_was(monkeypatch):
    host = training(OPTIMIZERS["adamw"])
    step = Driver(host)
    step(batches(1)[0])
    before, update = copy.deepcopy(host.optimizer.state_dict()), host.update
    pwritev, calls = os.pwritev, []

    def full(*arguments):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return pwritev(*arguments)

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(StorageError, match="no space left"):
        attach(host)
    assert host.update == update
    assert equal(host.optimizer.state_dict(), before)


def test_a_write_that_failed_is_told_later(monkeypatch):
    host = training(OPTIMIZERS["adamw"])
    attach(host)
    step = Driver(host)
    first, second = batches(2)
    step(first)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(StorageError, match="no space left"):
        step(second)


def test_a_parameter_added_later():
    plain, host = training(OPTIMIZERS["adagrad"]), training(OPTIMIZERS["adagrad"])
    attach(host)
    for each in (plain, host):
        torch.manual_seed(1)
        each.model.late = nn.Parameter(torch.randn(40))
        each.optimizer.add_param_group({"params": [each.model.late], "lr": 0.5})
    for _ in range(3):
        for each in (plain, host):
            each.optimizer.zero_grad()
            (each.model.late**2).sum().backward()
            each.optimizer.step()
    assert same(host, plain)


def test_slices_of_one_element_are_never_made():
    for num in range(2, 40):
        cuts = cuts_of(num, 4)
        assert [a for a, _ in cuts[1:]] == [b for _, b in cuts[:-1]]
        assert cuts[0][0] == 0
        assert cuts[-1][1] == num
        assert all(2 <= b - a <= 4 for a, b in cuts)


def test_sliceable_is_shown_by_value():
    floats, halves = torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)
    momentum = torch.optim.SGD([floats, halves], lr=0.1, momentum=0.9, weight_decay=0.1)
    assert not is_elementwise(
        momentum
    )  # bfloat16 rounds the last elements of a vector in another way
    assert is_elementwise(torch.optim.SGD([floats], lr=0.1, momentum=0.9))
    assert is_sliceable(momentum, 0, torch.float32)
    assert not is_sliceable(torch.optim.Adafactor([floats]), 0, torch.float32)
    groups = [{"params": [floats]}, {"params": [torch.zeros(2)], "lr": 0.2}]
    assert is_sliceable(torch.optim.AdamW(groups), 1, torch.bfloat16)


def record(**changed):
    return ModelRecord(
        **{
            "weight_bytes": 4000,
            "gradient_bytes": 4000,
            "state_bytes": 8000,
            "state_tensors": 2,
            "largest_parameter_bytes": 1000,
            "update_s": 0.1,
            "batch_size": 2,
            "separable": True,
            "elementwise": True,
            "read_bytes_s": 1000.0,
            "write_bytes_s": 500.0,
            **changed,
        }
    )


def test_offer():
    offer = OffloadState(slice_bytes=256).offer(Block("", Scope.MODEL, record(extra_s=1.0)))
    assert isinstance(offer, Offer)
    changed = offer.record
    assert changed.state_in_files
    assert (changed.slice_bytes, changed.buffer_bytes) == (256, 2 * 2 * 256)
    assert changed.extra_s == pytest.approx(1.0 + 8.0 + 16.0)
    whole = OffloadState().offer(Block("", Scope.MODEL, record(elementwise=False))).record
    assert (whole.slice_bytes, whole.buffer_bytes) == (0, 0)
    small = OffloadState().offer(Block("", Scope.MODEL, record())).record
    assert small.slice_bytes == 1000


@pytest.mark.parametrize(
    "changed", [{"state_bytes": 0}, {"separable": False}, {"state_in_files": True}]
)
def test_refusals(changed):
    assert isinstance(OffloadState().offer(Block("", Scope.MODEL, record(**changed))), Refusal)


def test_bounds():
    for fields in ({"slice_bytes": 0}, {"num_buffers": 0}):
        with pytest.raises(MethodError):
            OffloadState(**fields)
    with pytest.raises(MethodError, match="optimizer"):
        attach(Host(nn.Linear(2, 2), None, loss_fn))
