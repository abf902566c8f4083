"""The ledger against closed forms, against torch's own MemTracker, and against itself."""

import pytest
import torch
from tests.plain_training import plain_step
from tests.sample_models import SAMPLES, adamw
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint

from slimgrad import Ledger, SlimgradError
from slimgrad.batches import named_tensors
from slimgrad.host import Share
from slimgrad.measuring.trace import trace_step
from slimgrad.types import Column

FLOAT = 4  # bytes
SCALARS = (
    2 * FLOAT
)  # the loss, and the one that backward() starts from: both are made before the engine runs


def _linear_step(num, d_in, d_out, optimizer=None):
    """The ledger of the second step of one layer without bias on ``num`` samples; loss: the sum of squares."""
    model, x = nn.Linear(d_in, d_out, bias=False), torch.randn(num, d_in)
    made = optimizer(model.parameters()) if optimizer else None

    def step():
        model.zero_grad()
        model(x).square().sum().backward()
        if made is not None:
            made.step()

    step()
    with Ledger(model, made, inputs=x) as ledger:
        step()
    return ledger


# -- closed forms ------------------------------------------------------------------------------------


def test_a_tensor_lives_from_its_birth_to_its_last_owner():
    with Ledger() as ledger:
        x = torch.zeros(1024)
        assert ledger.now_bytes == 1024 * FLOAT
        y = x
        del x
        assert ledger.now_bytes == 1024 * FLOAT
        del y
        assert ledger.now_bytes == 0
        torch.zeros(16)
    assert ledger.peak_bytes == 1024 * FLOAT


@pytest.mark.parametrize(("num", "d_in", "d_out"), [(4, 8, 16), (7, 3, 5), (32, 64, 2)])
def test_columns_of_one_layer(num, d_in, d_out):
    columns = _linear_step(num, d_in, d_out).columns
    assert columns == {
        Column.WEIGHTS: FLOAT * d_in * d_out,
        Column.INPUTS: FLOAT * num * d_in,
        Column.GRADIENTS: FLOAT * d_in * d_out,
        Column.ACTIVATIONS: FLOAT * num * d_out + SCALARS,  # the layer's output, saved by square()
        Column.OPTIMIZER_STATE: 0,
        # backward of square(): y to the first power, twice that, and its product with the incoming gradient
        Column.TEMPORARIES: 3 * FLOAT * num * d_out,
    }


@pytest.mark.parametrize(
    ("optimizer", "per_element", "per_parameter"),
    [
        (lambda p: torch.optim.AdamW(p), 2, 1),  # two moments; a step count
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 3, 1),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1, 0),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0, 0),
    ],
    ids=["adamw", "amsgrad", "momentum", "sgd"],
)
def test_optimizer_state_by_closed_form(optimizer, per_element, per_parameter):
    columns = _linear_step(4, 8, 16, optimizer).columns
    assert columns[Column.OPTIMIZER_STATE] == FLOAT * (per_element * 8 * 16 + per_parameter)


def test_views_count_once():
    with Ledger() as ledger:
        x = torch.zeros(1024)
        views = [x.view(32, 32), x[::2], x.expand(8, 1024), x.detach()]
        assert ledger.now_bytes == 1024 * FLOAT
        del x, views[1:]
        assert ledger.now_bytes == 1024 * FLOAT  # the last view holds the whole storage
    assert ledger.peak_bytes == 1024 * FLOAT


class _Keeps(nn.Module):
    """Keeps a tensor that autograd does not need as an attribute: hooks on saved tensors would miss it."""

    def __init__(self, keep):
        super().__init__()
        self.layer, self.keep, self.kept = nn.Linear(16, 16), keep, None

    def forward(self, x):
        extra = x.detach().repeat(8, 1)
        self.kept = extra if self.keep else None
        return self.layer(x)


def test_a_tensor_kept_as_an_attribute_counts():
    def activations(keep):
        model, x = _Keeps(keep), torch.randn(4, 16)
        with Ledger(model, inputs=x) as ledger:
            model(x).sum().backward()
        return ledger.columns[Column.ACTIVATIONS]

    assert activations(True) - activations(False) == FLOAT * 8 * 4 * 16


def test_bytes_by_module_are_those_of_the_module_that_made_them():
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    x = torch.randn(16, 8)
    with Ledger(model, inputs=x) as ledger:
        loss = model(x).square().sum()
    loss.backward()
    # the first layer's output dies with tanh, whose own output is saved
    assert ledger.modules["1"] == FLOAT * 16 * 32
    assert ledger.modules["2"] == FLOAT * 16 * 4
    assert "0" not in ledger.modules


# -- recomputation, updates in backward -----------------------------------------------------------------


def _blocks_step(num_blocks, recompute, d=16, num=8):
    """The ledger over blocks Linear, Tanh, Linear; each saves its tanh and passes on its output."""
    blocks = nn.Sequential(
        *(
            nn.Sequential(nn.Linear(d, 2 * d), nn.Tanh(), nn.Linear(2 * d, d))
            for _ in range(num_blocks)
        )
    )
    x = torch.randn(num, d, requires_grad=True)

    def loss():
        h = x
        for block in blocks:
            h = checkpoint(block, h, use_reentrant=False) if recompute else block(h)
        return h.sum()

    loss().backward()
    blocks.zero_grad()
    x.grad = None
    with Ledger(blocks, inputs=x) as ledger:
        loss().backward()
    return ledger


@pytest.mark.parametrize("num_blocks", [1, 3, 8])
def test_activations_without_and_with_recomputation(num_blocks):
    d, num = 16, 8
    output, inside = FLOAT * num * d, FLOAT * num * 2 * d
    plain = _blocks_step(num_blocks, recompute=False).columns[Column.ACTIVATIONS]
    # of every block its tanh; the outputs of all but the last, being inputs of the next
    assert plain == num_blocks * inside + (num_blocks - 1) * output + SCALARS
    lean = _blocks_step(num_blocks, recompute=True).columns[Column.ACTIVATIONS]
    # inputs of blocks, and one block's inside at a time
    assert lean == (num_blocks - 1) * output + inside + SCALARS


def test_gradients_that_are_used_up_at_once_do_not_add_up():
    d, depth = 16, 6
    model = nn.Sequential(*(nn.Linear(d, d, bias=False) for _ in range(depth)))
    x = torch.randn(4, d)

    def columns():
        with Ledger(model, inputs=x) as ledger:
            model(x).sum().backward()
        model.zero_grad()
        return ledger.columns

    assert columns()[Column.GRADIENTS] == depth * FLOAT * d * d
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    assert columns()[Column.GRADIENTS] == FLOAT * d * d


# -- consistency ----------------------------------------------------------------------------------------


@pytest.fixture
def ledger_of():
    def of(name):
        model, loss_fn, batch = SAMPLES[name].make()
        optimizer = adamw(model)
        plain_step(model, optimizer, loss_fn, batch)
        with Ledger(model, optimizer, inputs=batch) as ledger:
            plain_step(model, optimizer, loss_fn, batch)
        return ledger

    return of


@pytest.mark.parametrize("name", SAMPLES)
def test_columns_of_the_timeline_sum_to_the_peak(ledger_of, name):
    ledger = ledger_of(name)
    timeline = ledger.timeline
    assert sum(timeline.at_peak().values()) == ledger.peak_bytes == timeline.peak_bytes
    assert all((live >= 0).all() for live in timeline.columns.values())
    assert [mark for _, mark in timeline.marks] == ["backward begins", "optimizer"]


@pytest.mark.parametrize("name", ["attention", "lstm", "shared_twice"])
def test_the_same_step_gives_the_same_timeline(ledger_of, name):
    one, two = ledger_of(name), ledger_of(name)
    assert one.columns == two.columns
    assert (one.timeline.total == two.timeline.total).all()
    assert one.modules == two.modules


def test_a_ledger_is_used_once():
    ledger = Ledger()
    with ledger:
        pass
    with pytest.raises(SlimgradError, match="make a new one"), ledger:
        pass


def test_an_error_inside_leaves_no_hook_behind():
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = adamw(model)
    with pytest.raises(ZeroDivisionError), Ledger(model, optimizer):
        raise ZeroDivisionError
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not optimizer._optimizer_step_post_hooks


def test_a_trace_on_fake_tensors_made_meanwhile_takes_no_memory():
    model, loss_fn, batch = SAMPLES["attention"].make()
    with Ledger(model, inputs=batch) as ledger:
        before = ledger.peak_bytes
        trace = trace_step(model, loss_fn, [Share(batch, 1.0)], [], {})
    assert trace.timeline().peak_bytes > before
    assert (
        ledger.peak_bytes - before < 0.05 * trace.timeline().peak_bytes
    )  # copies of whole numbers


# -- torch's own tracker --------------------------------------------------------------------------------

_MEM_TRACKER_FAILS = {
    # "cannot register a hook on a tensor that doesn't require gradient": MemTracker takes no frozen parameter
    "frozen_layer"
}


@pytest.mark.parametrize("name", [n for n in SAMPLES if n not in _MEM_TRACKER_FAILS])
def test_peak_agrees_to_the_byte_with_mem_tracker(ledger_of, name):
    ours = ledger_of(name).peak_bytes
    model, loss_fn, batch = SAMPLES[name].make()
    optimizer = adamw(model)
    plain_step(model, optimizer, loss_fn, batch)
    theirs = MemTracker()
    theirs.track_external(model, optimizer, *named_tensors(batch).values())
    with theirs:
        plain_step(model, optimizer, loss_fn, batch)
    assert ours == theirs.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
