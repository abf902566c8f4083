"""The search: which parameters each half step changes, by hand, in bytes; and the cell that it finds."""

import copy
import statistics

import pytest
import torch
from tests.layers.copy_reverse import (
    WIDTH,
    PlainTransformer,
    Tagger,
    batches,
    loss_fn,
    trained_loss,
)
from torch import nn

from slimgrad import Ledger
from slimgrad.errors import ArgumentError
from slimgrad.layers.architecture_search import (
    architecture_parameters,
    search,
    weight_parameters,
)
from slimgrad.layers.reversible_supernet import ReversibleSupernet, cell_sequence
from slimgrad.layers.sequence_operations import sequence_operations
from slimgrad.types import Column

OPERATIONS = sequence_operations(WIDTH)


def tagger(num_cells=1, **options):
    return Tagger(ReversibleSupernet(OPERATIONS, num_cells=num_cells, **options), 2)


def optimizers(model, make=torch.optim.SGD, weight_rate=0.1, architecture_rate=1.0):
    return {
        "weight_optimizer": make(weight_parameters(model), weight_rate),
        "architecture_optimizer": make(architecture_parameters(model), architecture_rate),
    }


def test_it_is_the_alternation_of_both_descents():
    model = tagger().double()
    twin = copy.deepcopy(model)
    history = search(model, loss_fn, batches(3, 1), batches(3, 2), **optimizers(model))
    twin.body.is_reversible = False
    losses = [], []
    for pair in zip(batches(3, 1), batches(3, 2), strict=True):
        kinds = (weight_parameters(twin), 0.1), (architecture_parameters(twin), 1.0)
        for batch, (parameters, rate), told in zip(pair, kinds, losses, strict=True):
            loss = loss_fn(twin, batch)
            told.append(float(loss.detach()))
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.data -= rate * g
    assert history.training == pytest.approx(losses[0], rel=1e-9)
    assert history.validation == pytest.approx(losses[1], rel=1e-9)
    assert len(set(history.training + history.validation)) == 6
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
        assert found.grad is None
        assert found.requires_grad


def test_each_half_step_holds_the_gradients_of_its_own_half():
    model, held = tagger(), []

    def noted(model, batch):
        held.append({id(p) for p in model.parameters() if p.requires_grad})
        return loss_fn(model, batch)

    model.tokens.weight.requires_grad_(False)
    by = optimizers(model)
    with Ledger(model) as ledger:
        search(model, noted, batches(1, 1), batches(1, 2), **by)
    trained = {id(p) for p in weight_parameters(model)} - {id(model.tokens.weight)}
    assert held == [trained, {id(p) for p in architecture_parameters(model)}]
    assert not model.tokens.weight.requires_grad
    num_bytes = sum(4 * p.numel() for p in weight_parameters(model) if p.requires_grad)
    assert 0 < ledger.columns[Column.GRADIENTS] <= num_bytes


def test_the_papers_optimizers_are_the_defaults():
    model = tagger()
    before = [p.detach().clone() for p in model.parameters()]
    search(model, loss_fn, batches(1, 1), batches(1, 2))
    apart = {id(p): 3e-4 for p in architecture_parameters(model)}
    for old, new in zip(before, model.parameters(), strict=True):
        moved = float((new - old).abs().max().detach())
        assert moved == pytest.approx(apart.get(id(new), 5e-4), rel=1e-3)  # Adam's first step


def test_what_cannot_be_searched_is_refused():
    model = tagger()
    both = torch.optim.SGD(model.parameters(), 0.1)
    for name in ("weight_optimizer", "architecture_optimizer"):
        with pytest.raises(ArgumentError, match=f"{name} to hold one kind"):
            search(model, loss_fn, batches(1, 1), batches(1, 2), **{name: both})
    with pytest.raises(ArgumentError, match="nothing to search"):
        search(nn.Linear(2, 2), loss_fn, [], [])


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


def plain_of_size(least):
    """A plain Transformer whose feed-forward networks are wide enough for ``least`` parameters."""
    inner = 1
    while num_parameters(Tagger(PlainTransformer(2, inner), 1)) < least:
        inner += 1
    return Tagger(PlainTransformer(2, inner), 1)


def of_cell(cell):
    model = Tagger(cell_sequence(OPERATIONS, cell, num_cells=2), 2)
    model.body.is_reversible = False  # the search is over: time counts
    return model


def losses_of(make, num_runs):
    found = []
    for seed in range(num_runs):
        torch.manual_seed(seed)
        found.append(trained_loss(make(), seed))
    return found


@pytest.mark.slow
def test_the_searched_cell_is_no_worse_than_a_plain_transformer_of_its_size():
    model = tagger(num_cells=2)
    by = optimizers(model, torch.optim.Adam, 3e-3, 0.1)
    history = search(model, loss_fn, batches(200, 1, 16), batches(200, 2, 16), **by)
    cell = model.body.cell()
    print(cell, [a.softmax(0).tolist() for a in architecture_parameters(model)])
    assert statistics.mean(history.validation[-10:]) < history.validation[0] / 10

    size = num_parameters(of_cell(cell))
    assert num_parameters(plain_of_size(size)) < 1.01 * size
    searched = losses_of(lambda: of_cell(cell), 3)
    plain = losses_of(lambda: plain_of_size(size), 3)
    (without_mixing,) = losses_of(lambda: of_cell((("gated", "gated"),)), 1)
    print(size, searched, plain, without_mixing)
    assert statistics.median(searched) <= statistics.median(plain)
    assert without_mixing > 10 * statistics.median(plain)  # no token sees another: not all cells do
