"""What is made again from codes is as far off as it was said to be, whichever way a block is coded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.every_method.coded_blocks import (
    coded_profile,
    gradient_of,
    records_of,
    sensitive_profile,
    stores,
)
from tests.sample_models import SAMPLES
from torch import Tensor, nn
from torch.nn import functional

from slimgrad.host import Host
from slimgrad.method import Block, Method, Offer, Record, Refusal, Scope, Undo
from slimgrad.methods.activations.half_store import HalfStore
from slimgrad.methods.activations.selective_recompute import SelectiveRecompute
from slimgrad.planning.coded import coded_ways

MOST = 24  # schedules of a block that are tried, about


class Residual(nn.Module):
    """Two ReLUs behind norms: backward reads their signs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        hidden = functional.relu(self.norms[0](self.convs[0](x_NCHW)))
        return functional.relu(x_NCHW + self.norms[1](self.convs[1](hidden)))


def residual() -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *(Residual(16) for _ in range(2)))
    return model, lambda model, batch: model(batch).square().mean(), torch.randn(8, 3, 16, 16)


def schedules_of(path: str, record: Record) -> Iterator[tuple[tuple[Method, ...], Record]]:
    """Methods that code a block and make one of the tensors that they code again, from what is left."""
    for way in coded_ways(path, record, list(stores().values()), may_run_again=False):
        stores_, asked = way.methods[:-1], record
        for store in stores_:
            offer = store.offer(Block(path, Scope.BLOCK, asked))
            assert isinstance(offer, Offer)
            assert isinstance(offer.record, Record)
            asked = offer.record
        for number in (c.number for c in asked.coded):
            assert asked.graph is not None
            schedule = SelectiveRecompute(tuple(s for s in asked.graph.saved if s != number))
            offer = schedule.offer(Block(path, Scope.BLOCK, asked))
            if isinstance(offer, Offer) and isinstance(offer.record, Record) and offer.record.coded:
                yield (*stores_, schedule), offer.record


@pytest.mark.parametrize("name", ["attention", "residual"])
def test_what_is_made_again_is_no_farther_off_than_it_is_said_to_be(name: str) -> None:
    model, loss_fn, batch = residual() if name == "residual" else SAMPLES[name].make()
    profile = (
        coded_profile(model, loss_fn, batch) if name == "residual" else sensitive_profile(name)
    )
    host, exact, num = Host(model, None, loss_fn), gradient_of(model, loss_fn, batch), 0
    for path, record in records_of(profile).items():
        found = list(schedules_of(path, record)) if record.coding else []
        for methods, told in found[:: max(1, len(found) // MOST)]:
            undo = Undo()
            for method in methods:
                undo.then(method.attach(Block(path, Scope.BLOCK, host=host)))
            off = (gradient_of(model, loss_fn, batch) - exact).norm() / exact.norm()
            undo()
            assert float(off) <= 2 * told.squared_error**0.5 + 1e-6, (path, methods)
            num += 1
    assert num


def test_signs_are_not_made_again_from_what_is_a_little_off() -> None:
    model, loss_fn, batch = residual()
    refused = 0
    for path, record in records_of(coded_profile(model, loss_fn, batch)).items():
        if record.graph is None or not record.coding:
            continue
        asked = Block(path, Scope.BLOCK, record)
        coded = HalfStore().on(record).offer(asked)
        assert not isinstance(coded, Refusal)
        assert isinstance(coded.record, Record)
        for number in (c.number for c in coded.record.coded if not c.is_smooth):
            keep = tuple(s for s in record.graph.saved if s != number)
            offer = SelectiveRecompute(keep).offer(Block(path, Scope.BLOCK, coded.record))
            reads_a_code = any(
                c.number in keep
                for o in record.graph.recipe([number], keep)
                for c in coded.record.coded
                if c.number in record.graph.operations[o][1]
            )
            if reads_a_code:
                assert isinstance(offer, Refusal)
                assert "signs or places" in offer.reason
                refused += 1
    assert refused
