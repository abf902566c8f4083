"""Gradients that leave memory until the update give the bits of plain training, clipped or not."""

import os

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from slimgrad.errors import StorageError
from slimgrad.host import Host
from slimgrad.method import Block, ModelRecord, Refusal, Scope, Undo, Update
from slimgrad.methods.gradients.offload_gradients import OffloadGradients, clip_coefficient
from slimgrad.methods.optimizer_state.offload_state import OffloadState
from slimgrad.storage import store_of

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p),
}


class Net(nn.Module):
    def __init__(self, inner_dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.inner = nn.Linear(6, 6).to(inner_dtype)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.1))
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, x):
        h = self.embed(x)  # batch, 5, 6
        image = torch.stack([h, h * 2], 1).to(memory_format=torch.channels_last)
        h = h + self.conv(image).mean() * self.scale
        return self.head(torch.tanh(self.inner(h.to(self.inner.weight.dtype))).float())


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten()) * 3


def batches(num):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 11, (4, 5), generator=generator) for _ in range(num)]


def training(make=OPTIMIZERS["adamw"], clip=None, inner_dtype=torch.float32):
    torch.manual_seed(3)
    model = Net(inner_dtype)
    return Host(model, make(list(model.parameters())), loss_fn, clip_grad_norm=clip)


class Driver:
    """What a step does with a host, here in ten lines."""

    def __init__(self, host):
        self.host = host
        for parameter in host.parameters():
            parameter.register_post_accumulate_grad_hook(self.complete)

    def complete(self, parameter):
        if self.host.on_gradient is not None:
            self.host.on_gradient(parameter)

    def backward(self, batch):
        loss = self.host.loss_fn(self.host.model, batch)
        loss.backward()
        return loss.detach()

    def __call__(self, batch):
        loss = self.backward(batch)
        self.host.finish()
        for parameter in self.host.parameters():
            parameter.grad = None
        return loss


def attach(host, *methods):
    block = Block("", Scope.MODEL, host=host)
    return Undo.all([method.attach(block) for method in methods])


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def same(host, plain):
    return equal(dict(host.model.state_dict()), dict(plain.model.state_dict())) and equal(
        host.optimizer.state_dict(), plain.optimizer.state_dict()
    )


SLICED = OffloadState(slice_bytes=64)
STACKS = {
    "alone": [OffloadGradients()],
    "state_first": [SLICED, OffloadGradients()],
    "state_last": [OffloadGradients(), SLICED],
}


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("clip", [None, 0.3, 1e4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bits_of_plain_training(name, clip, stack):
    plain, host = (training(OPTIMIZERS[name], clip) for _ in range(2))
    undo = attach(host, *STACKS[stack])
    plain_step, step = Driver(plain), Driver(host)
    for batch in batches(4):
        assert torch.equal(step(batch), plain_step(batch))
        assert same(host, plain)
    finish = host.finish
    undo()
    assert host.finish != finish
    assert host.on_gradient is None
    plain_step(batch), step(batch)
    assert same(host, plain)


def test_clipping_does_something():
    clipped, plain = training(clip=0.3), training()
    attach(clipped, *STACKS["state_first"])
    steps = Driver(clipped), Driver(plain)
    for batch in batches(2):
        for step in steps:
            step(batch)
    assert not same(clipped, plain)


@pytest.mark.parametrize("stack", STACKS)
def test_mixed_dtypes_are_clipped_in_the_same_order(stack):
    plain, host = (training(clip=0.3, inner_dtype=torch.bfloat16) for _ in range(2))
    attach(host, *STACKS[stack])
    plain_step, step = Driver(plain), Driver(host)
    for batch in batches(3):
        plain_step(batch), step(batch)
    assert same(host, plain)


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
def test_the_coefficient_is_that_of_torch(max_norm):
    parameters = [
        nn.Parameter(torch.zeros(n, dtype=dtype))
        for n, dtype in [(70, torch.float32), (9, torch.float64), (1000, torch.float32)]
    ]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    norms = [torch.linalg.vector_norm(p.grad) for p in parameters]
    coefficient = clip_coefficient(norms, max_norm)
    before = parameters[2].grad.clone()
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    assert torch.equal(parameters[2].grad, before * coefficient)
    assert (coefficient == 1) == (max_norm == 1e6)


@pytest.mark.parametrize("stack", STACKS)
def test_at_most_one_gradient_is_in_memory(stack):
    host = training(clip=0.3)
    attach(host, *STACKS[stack])
    step, counts = Driver(host), []
    first, second = batches(2)
    step(first)
    step.backward(second)
    assert all(p.grad is None for p in host.parameters())
    register = host.optimizer.register_step_pre_hook(
        lambda *_: counts.append(sum(p.grad is not None for p in host.parameters()))
    )
    if stack == "alone":
        update = host.update

        def watch(parameter):
            counts.append(sum(p.grad is not None for p in host.parameters()))
            update(parameter)

        host.update = watch
    host.finish()
    register.remove()
    assert counts[-1] == 0
    assert max(counts) <= 1
    assert len(counts) == (7 if stack == "alone" else 1)


def test_schedulers_and_hooks_see_one_step():
    host, counts = training(), []
    host.optimizer.register_step_post_hook(lambda *_: counts.append("post"))
    attach(host, *STACKS["state_first"])
    scheduler, step = StepLR(host.optimizer, 1), Driver(host)
    for batch in batches(2):
        step(batch)
        scheduler.step()  # a warning, and so an error, if it saw no optimizer step
    assert counts == ["post", "post"]


def test_two_backward_passes_in_a_step_are_added():
    plain, host = training(clip=0.3), training(clip=0.3)
    attach(host, OffloadGradients())
    plain_step, step = Driver(plain), Driver(host)
    first, second = batches(2)
    for each in (plain_step, step):
        each.backward(first)
        each(second)
    assert same(host, plain)


def test_sparse_gradients_stay_in_memory():
    def make():
        torch.manual_seed(0)
        model = nn.Embedding(10, 4, sparse=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Host(model, optimizer, lambda model, batch: model(batch).pow(2).sum())

    plain, host = make(), make()
    attach(host, OffloadGradients())
    for batch in batches(2):
        for each in (plain, host):
            Driver(each)(batch % 10)
    assert same(host, plain)


def test_undo_between_backward_and_update_gives_the_gradients_back():
    plain, host = training(), training()
    undo = attach(host, OffloadGradients())
    for each in (plain, host):
        Driver(each).backward(batches(1)[0])
    undo()
    for p, q in zip(host.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)
        assert p.grad is None or p.grad.stride() == q.grad.stride()


def test_slots_are_used_again():
    host = training()
    attach(host, OffloadGradients())
    step, sizes = Driver(host), set()
    for batch in batches(3):
        step(batch)
        sizes.add(store_of(host).file_bytes)
    assert len(sizes) == 1


def test_a_shortened_file_is_told():
    host = training()
    attach(host, OffloadGradients())
    step = Driver(host)
    step.backward(batches(1)[0])
    store_of(host).write(store_of(host).allocate(4), torch.zeros(1))  # all writes are done
    os.ftruncate(store_of(host).fileno(), 0)
    with pytest.raises(StorageError, match="cut short"):
        host.finish()


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


def test_offers_compose_in_either_order():
    state, gradients = OffloadState(slice_bytes=256), OffloadGradients()
    found = []
    for first, second in ((state, gradients), (gradients, state)):
        once = first.offer(Block("", Scope.MODEL, record())).record
        found.append(second.offer(Block("", Scope.MODEL, once)).record)
    assert found[0] == found[1]
    assert found[0].gradients_in_files
    assert found[0].buffer_bytes == 2 * 2 * 256 + 2 * 256
    assert found[0].extra_s == pytest.approx(4 + 8 + 8 + 16)


@pytest.mark.parametrize(
    "changed",
    [
        {"gradient_bytes": 0},
        {"separable": False},
        {"update": Update.DURING},
        {"gradients_in_files": True},
    ],
)
def test_refusals(changed):
    assert isinstance(OffloadGradients().offer(Block("", Scope.MODEL, record(**changed))), Refusal)
