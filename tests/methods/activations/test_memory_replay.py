"""Memory replay: full backpropagation through time from the memory between segments, in one segment's bytes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimgrad import Ledger
from slimgrad.errors import ArgumentError, BatchError, LossError
from slimgrad.layers.memformer import Memformer
from slimgrad.measuring.randomness import RandomState
from slimgrad.methods.activations.memory_replay import memory_replay
from slimgrad.types import Column

SYMBOLS, LENGTH, DIM, SLOTS = 8, 4, 32, 8


class Copier(nn.Module):
    """Tokens in, tokens out, a Memformer between; ``forgets`` makes it see the segment alone."""

    def __init__(self, dropout=0.0, forgets=False):
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS + 2, DIM)
        self.dropout, self.forgets = nn.Dropout(dropout), forgets
        self.body = Memformer(DIM, num_layers=1, num_heads=2, num_slots=SLOTS, max_length=LENGTH)
        self.head = nn.Linear(DIM, SYMBOLS)

    def forward(self, tokens, memory):
        if self.forgets:
            memory = self.body.initial_memory(len(tokens))
        hidden, memory = self.body(self.dropout(self.embedding(tokens)), memory)
        return self.head(hidden), memory


def copier(seed=0, **options):
    torch.manual_seed(seed)
    return Copier(**options).double()


def copy_task(num_segments, batch_size=3):
    """Symbols in the first segment, blanks, and in the last one the question what they were."""
    symbols = torch.randint(SYMBOLS, (batch_size, LENGTH))
    blank, question = torch.full_like(symbols, SYMBOLS), torch.full_like(symbols, SYMBOLS + 1)
    return [symbols, *[blank] * (num_segments - 2), question], symbols


def recalled(symbols, last):
    """The loss of the last segment alone."""

    def loss_fn(output, t):
        return F.cross_entropy(output.flatten(0, 1), symbols.flatten()) if t == last else None

    return loss_fn


def repeated(symbols):
    """A loss in every segment."""
    return lambda output, t: F.cross_entropy(output.flatten(0, 1), symbols.flatten()) / (t + 1)


def full_backpropagation(model, segments, memory, loss_fn):
    losses = []
    for t, segment in enumerate(segments):
        output, memory = model(segment, memory)
        losses.append(loss_fn(output, t))
    total = sum(loss for loss in losses if loss is not None)
    total.backward()
    return total.detach(), memory


def gradients(module):
    found = [p.grad for p in module.parameters()]
    module.zero_grad()
    return found


def assert_equal_to_rounding(found, expected):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("num_segments", [1, 2, 16])
@pytest.mark.parametrize("every_segment", [True, False])
def test_gradients_are_those_of_full_backpropagation(num_segments, every_segment):
    model = copier()
    segments, symbols = copy_task(max(num_segments, 2))
    segments = segments[:num_segments]
    loss_fn = repeated(symbols) if every_segment else recalled(symbols, num_segments - 1)
    memory = model.body.initial_memory(3)  # with a graph: the first memory is learned
    total, last = full_backpropagation(model, segments, memory, loss_fn)
    expected = gradients(model)
    assert expected[[n for n, _ in model.named_parameters()].index("body.writer.bias")].norm() > 0
    found, after = memory_replay(model, segments, model.body.initial_memory(3), loss_fn)
    torch.testing.assert_close(found, total)
    torch.testing.assert_close(after, last.detach())
    assert not found.requires_grad
    assert not after.requires_grad
    assert_equal_to_rounding(gradients(model), expected)


def test_a_gradient_cut_off_between_segments_is_seen():
    model = copier()
    segments, symbols = copy_task(4)
    full_backpropagation(model, segments, model.body.initial_memory(3), repeated(symbols))
    expected = gradients(model)

    def cut(segment, memory):
        output, after = model(segment, memory)
        return output, after.detach()

    memory_replay(cut, segments, model.body.initial_memory(3), repeated(symbols))
    with pytest.raises(AssertionError):
        assert_equal_to_rounding(gradients(model), expected)


def test_dropout_is_replayed_and_random_states_end_where_they_would():
    model = copier(dropout=0.3)
    segments, symbols = copy_task(5)
    torch.manual_seed(4)
    full_backpropagation(model, segments, model.body.initial_memory(3), repeated(symbols))
    expected, after = gradients(model), RandomState.now()
    torch.manual_seed(4)
    memory_replay(model, segments, model.body.initial_memory(3), repeated(symbols))
    assert RandomState.now().same_as(after)
    assert_equal_to_rounding(gradients(model), expected)


def test_an_lstm_with_its_pair_of_states_and_segments_with_a_graph():
    torch.manual_seed(0)
    below, model = nn.Linear(3, 5).double(), nn.LSTM(5, 6, batch_first=True).double()
    x = torch.randn(2, 12, 3).double()
    state = tuple(torch.randn(1, 2, 6).double().requires_grad_() for _ in range(2))

    def loss_fn(output, t):
        return output.square().sum() * (t + 1)

    def run(train):
        train(model, below(x).split(3, dim=1), state, loss_fn)
        found = [*gradients(model), *gradients(below), *(s.grad for s in state)]
        for s in state:
            s.grad = None
        return found

    expected = run(full_backpropagation)
    assert_equal_to_rounding(run(memory_replay), expected)


class Counting(nn.Module):
    """A recurrence with a buffer that counts segments and is used."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(4, 4).double()
        self.register_buffer("segments", torch.zeros(()).double())

    def forward(self, x, memory):
        self.segments += 1
        memory = (self.cell(x) * self.segments.clone() + memory).tanh()
        return memory.sum(1), memory


def test_buffers_count_once_and_each_segment_but_the_last_runs_twice():
    torch.manual_seed(0)
    model, x = Counting(), torch.randn(6, 2, 4).double()
    memory, calls = torch.zeros(2, 4).double(), []
    model.cell.register_forward_hook(lambda *_: calls.append(1) or _[2])

    def loss_fn(output, t):
        return output.square().sum()

    full_backpropagation(model, list(x), memory, loss_fn)
    expected = gradients(model)
    model.segments.zero_()
    calls.clear()
    memory_replay(model, list(x), memory, loss_fn)
    assert model.segments == 6
    assert len(calls) == 6 + 5
    assert_equal_to_rounding(gradients(model), expected)


def test_autocast_is_the_callers():
    torch.manual_seed(0)
    model, x = nn.LSTMCell(4, 8), torch.randn(5, 3, 4)
    weights = nn.Linear(8, 8)

    def recurrence(x, state):
        hidden, cell = model(x, state)
        return weights(hidden), (hidden, cell)

    def run(train):
        with torch.autocast("cpu", torch.bfloat16):
            train(
                recurrence, list(x), (torch.zeros(3, 8),) * 2, lambda o, t: o.float().square().sum()
            )
        return gradients(weights)

    expected = run(full_backpropagation)
    for a, b in zip(run(memory_replay), expected, strict=True):
        assert b.norm() > 0
        assert (a - b).norm() < 0.02 * b.norm()


def ledger_of(model, run, inputs):
    with Ledger(model, inputs=inputs) as ledger:
        run()
    return ledger


def test_saved_bytes_are_one_segment_and_the_slots_of_each():
    model = copier()
    slots = 3 * SLOTS * DIM * 8
    segments, symbols = copy_task(2)
    one = ledger_of(
        model,
        lambda: memory_replay(model, segments[:1], model.body.initial_memory(3), repeated(symbols)),
        segments,
    ).columns[Column.ACTIVATIONS]
    found, full = {}, {}
    for num_segments in (8, 16):
        segments, symbols = copy_task(num_segments)
        args = model, segments, model.body.initial_memory(3).detach(), repeated(symbols)
        model.zero_grad()
        for into, train in ((found, memory_replay), (full, full_backpropagation)):
            ledger = ledger_of(model, lambda train=train, args=args: train(*args), segments)
            into[num_segments] = ledger.columns[Column.ACTIVATIONS]
            model.zero_grad()
        assert found[num_segments] <= one + num_segments * slots
    assert found[16] - found[8] == 8 * slots
    assert found[16] < 0.25 * full[16]
    print(
        f"16 segments: {found[16]} bytes saved, {full[16]} in full; one segment {one}, slots {slots}"
    )


def test_inference_takes_the_same_memory_at_any_length():
    model, peaks = copier().eval(), []
    segments, _ = copy_task(3)
    for num_segments in (4, 64):

        def read(num_segments=num_segments):
            memory = model.body.initial_memory(3)
            with torch.no_grad():
                for t in range(num_segments):
                    _, memory = model(segments[min(t, 1)], memory)

        peaks.append(ledger_of(model, read, segments).peak_bytes)
    assert peaks[0] == peaks[1]


def test_what_cannot_be_is_told():
    model = copier()
    segments, symbols = copy_task(3)
    memory = model.body.initial_memory(3)
    with pytest.raises(BatchError, match="no segments"):
        memory_replay(model, [], memory, repeated(symbols))
    with pytest.raises(LossError, match="None for every segment"):
        memory_replay(model, segments, memory, lambda output, t: None)
    with pytest.raises(LossError, match=r"shape \[3, 4, 8\]"):
        memory_replay(model, segments, memory, lambda output, t: output)
    with pytest.raises(ArgumentError, match="output, memory = model"):
        memory_replay(lambda s, m: m, segments, memory, repeated(symbols))
