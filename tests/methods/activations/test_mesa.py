"""Running ranges as a store: a byte an element, a range for each head, remembered from step to step."""

from __future__ import annotations

import pytest
import torch
from tests.methods.activations.coded_mlp import (
    HIDDEN,
    NUM_BLOCKS,
    WIDTH,
    attached,
    freed_bytes,
    made,
    mean_square,
    offered,
    record,
)

from slimgrad.errors import MethodError
from slimgrad.methods.activations.mesa import Mesa


def test_a_byte_an_element_and_a_range_a_group_stay() -> None:
    store, changed = Mesa().on(record()), offered(Mesa().on(record()))
    graph = record().graph
    assert graph is not None
    covered = sum(graph.num_bytes[s] for s in store.storages)
    predicted = sum(c.num_bytes for c in changed.coded)
    rows = [graph.uses[s].row for s in store.storages]  # type: ignore[union-attr]
    assert sorted(rows) == [WIDTH, HIDDEN, HIDDEN]
    assert predicted == covered // 4 + 8 * sum(row // Mesa().group_size for row in rows)
    assert freed_bytes(Mesa()) == NUM_BLOCKS * (covered - predicted)


def test_the_forward_pass_is_plains_and_the_gradient_near() -> None:
    found = []
    for setting in (None, Mesa()):
        model, batch = made()
        attached(model, setting)
        loss = mean_square(model, batch)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    (plain_loss, plain), (loss, ours) = found
    assert torch.equal(loss, plain_loss)
    flat, exact = (torch.cat([g.flatten() for g in each]) for each in (ours, plain))
    assert 0 < float((flat - exact).norm() / exact.norm()) < 0.05


def test_heads_have_ranges_of_their_own_that_move_slowly() -> None:
    x_BHTD = torch.randn(2, 4, 64, 16) * torch.tensor([1e-3, 1.0, 10.0, 100.0]).view(1, 4, 1, 1)
    code = Mesa(momentum=0.9).code()
    off_H = (code.encode(x_BHTD).decode() - x_BHTD).abs().amax((0, 2, 3))
    width_H = x_BHTD.amax((0, 2, 3)) - x_BHTD.amin((0, 2, 3))
    assert (off_H <= width_H / 255 * 1.001).all()
    wide = code.encode(2 * x_BHTD).decode()  # the ranges have moved a tenth of the way
    for head in range(4):
        assert wide[:, head].max() < 1.6 * x_BHTD[:, head].max()


def test_groups_of_channels_have_ranges_of_their_own() -> None:
    x_ND = torch.randn(64, 128)
    x_ND[:, 7] *= 100  # as the inputs of a language model's norms have some channels
    off = {
        size: (Mesa(group_size=size).code().encode(x_ND).decode() - x_ND)[:, 32:].norm()
        for size in (0, 32)
    }
    assert off[32] < 0.05 * off[0]


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_other_momenta_are_refused(momentum: float) -> None:
    with pytest.raises(MethodError, match="momentum must be in"):
        Mesa(momentum=momentum)


def test_groups_of_no_size_are_refused() -> None:
    with pytest.raises(MethodError, match="group_size must be at least 0"):
        Mesa(group_size=-1)
