"""What ``slimgrad train`` asks of measuring, from the rung that is allowed."""

from types import SimpleNamespace

import pytest
from torch import nn

from slimgrad.training import loop
from slimgrad.training.job import JobSpec
from slimgrad.training.loop import TrainRequest
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
