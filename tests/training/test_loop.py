"""What ``slimgrad train`` asks of measuring, from the rung that is allowed."""

from types import SimpleNamespace

import pytest
from torch import nn

from slimgrad.training import loop
from slimgrad.training.job import JobSpec
from slimgrad.training.loop import TrainRequest, TrainResult
from slimgrad.types import Exactness


class MeasuringError(Exception):
    """Raised where measuring would begin."""


class OneBatch:
    """Batches that are put back."""

    def state(self):
        return 0

    def restore(self, position):
        assert position == 0

    def __next__(self):
        return {}


@pytest.mark.parametrize(
    ("exactness", "wanted"),
    [(Exactness.EXACT, False), (Exactness.UNBIASED, True), (Exactness.APPROXIMATE, True)],
)
def test_what_codes_do_is_measured_where_the_rung_allows_codes(monkeypatch, exactness, wanted):
    def measure(*given, sensitivity, **others):
        raise MeasuringError(sensitivity)

    monkeypatch.setattr(loop, "measure", measure)
    job = SimpleNamespace(model=nn.Linear(2, 2), optimizer=None, batches=OneBatch())
    listener = SimpleNamespace(phase=lambda text: None)
    with pytest.raises(MeasuringError) as asked:
        loop._planned(TrainRequest(JobSpec(), exactness=exactness), job, listener)
    assert asked.value.args == (wanted,)


@pytest.mark.parametrize(("modules", "more"), [({}, 0), ({loop._COMPILER: None}, 128 << 20)])
def test_the_compiler_may_be_resident_where_it_was_loaded(monkeypatch, modules, more):
    monkeypatch.setattr(loop.sys, "modules", modules)
    plan = SimpleNamespace(budget_bytes=1 << 30)
    result = TrainResult(plan, [], 0, None, None, None)
    assert result.resident_limit_bytes == (5 << 28) + more
