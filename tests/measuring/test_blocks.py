"""Cutting models into blocks."""

import pytest
from tests.sample_models import SAMPLES
from torch import nn

from slimgrad.measuring.blocks import cut


def _run(num, inner=None):
    return nn.Sequential(*((inner() if inner else nn.Linear(2, 2)) for _ in range(num)))


EXPECTED = {
    "mlp": [str(i) for i in range(5)],
    "attention": [f"body.layers.{i}" for i in range(3)],
    "gpt2": [f"transformer.h.{i}" for i in range(2)],
    "llama": [f"model.layers.{i}" for i in range(2)],
    "shared_twice": [f"blocks.{i}" for i in range(3)],
    "lstm": [],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_blocks_of_sample_models(name):
    assert cut(SAMPLES[name].make()[0]) == EXPECTED[name]


@pytest.mark.parametrize("name", SAMPLES)
def test_no_block_is_inside_another(name):
    model = SAMPLES[name].make()[0]
    paths = cut(model)
    assert len(set(paths)) == len(paths)
    for path in paths:
        model.get_submodule(path)
        assert not any(other.startswith(f"{path}.") for other in paths)


def test_a_member_with_a_longer_run_of_its_own_is_cut_instead():
    backbone = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(4))})
    model = nn.Sequential(backbone, nn.Linear(2, 2))
    assert cut(model) == ["0.layers.0", "0.layers.1", "0.layers.2", "0.layers.3", "1"]


def test_a_run_of_short_runs_is_not_cut_further():
    assert cut(_run(3, lambda: _run(2))) == ["0", "1", "2"]


def test_two_runs_side_by_side():
    model = nn.ModuleDict({"encoder": _run(3), "decoder": _run(2), "head": nn.Linear(2, 2)})
    assert cut(model) == ["encoder.0", "encoder.1", "encoder.2", "decoder.0", "decoder.1"]


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        nn.LSTM(2, 2),
        nn.Sequential(nn.Linear(2, 2)),
        nn.ModuleDict({"a": nn.ReLU()}),
    ],
    ids=["linear", "lstm", "run_of_one", "dict"],
)
def test_a_flat_model_has_no_blocks(model):
    assert cut(model) == []
