"""Profiles: what they say of the plain step, and their JSON."""

import json

import pytest
import torch
from tests.plain_training import plain_step
from tests.sample_models import SAMPLES, adamw
from torch import nn

from slimgrad import Ledger, Profile, measure, plan
from slimgrad.errors import BatchError, ModelError, PlanError, UnsupportedError
from slimgrad.layers.compact import compact
from slimgrad.measuring.profile import fingerprint
from slimgrad.types import Column


@pytest.mark.parametrize("name", SAMPLES)
def test_the_plain_peak_is_the_one_the_ledger_sees(profile_of, name):
    profile = profile_of(name)
    model, loss_fn, batch = SAMPLES[name].make()
    optimizer = adamw(model)
    plain_step(model, optimizer, loss_fn, batch)
    with Ledger(model, optimizer, inputs=batch) as ledger:
        plain_step(model, optimizer, loss_fn, batch)
    assert ledger.peak_bytes * 0.995 <= profile.peak_bytes <= ledger.peak_bytes * 1.03
    if name != "counting_buffer":  # whose buffers the forward pass replaces by new tensors
        assert profile.columns[Column.WEIGHTS] == ledger.columns[Column.WEIGHTS]
    assert profile.columns[Column.GRADIENTS] == ledger.columns[Column.GRADIENTS]
    assert profile.weight_bytes == sum(
        t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    )


def test_forward_and_backward_alone():
    model, loss_fn, batch = SAMPLES["mlp"].make()
    profile = measure(model, None, loss_fn, batch, limit_s=0.0)
    with Ledger(model, inputs=batch) as ledger:
        loss_fn(model, batch).backward()
    assert profile.columns[Column.OPTIMIZER_STATE] == 0
    assert ledger.peak_bytes <= profile.peak_bytes <= 1.03 * ledger.peak_bytes


@pytest.mark.parametrize("name", ["gpt2", "shared_twice", "autocast"])
def test_json_round_trip(profile_of, tmp_path, name):
    profile, path = profile_of(name), tmp_path / "profile.json"
    profile.save(path)
    loaded = Profile.load(path)
    assert loaded.variants.keys() == profile.variants.keys()
    assert loaded.peak_bytes == profile.peak_bytes
    assert loaded.columns == profile.columns
    for exactness in ("bitwise", "exact"):
        ours, theirs = (plan(p, "min", exactness=exactness) for p in (profile, loaded))
        assert ours == theirs
        assert ours.timeline.peak_bytes == theirs.timeline.peak_bytes


def test_a_file_that_is_no_profile(tmp_path, profile_of):
    path = tmp_path / "profile.json"
    for text in ("", "{}", "[1]", '{"format": 99}', json.dumps({"format": 1, "law": {}})):
        path.write_text(text)
        with pytest.raises(PlanError, match="not a profile"):
            Profile.load(path)
    with pytest.raises(PlanError, match="not a profile"):
        Profile.load(tmp_path / "absent.json")
    profile_of("tied").save(path)
    path.write_text(path.read_text()[:-1000])  # cut short
    with pytest.raises(PlanError, match="not a profile"):
        Profile.load(path)


def _mlp(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))


def test_fingerprints_tell_what_a_plan_depends_on():
    model = _mlp()
    same = fingerprint(model, adamw(model))
    other = _mlp()
    assert fingerprint(other, adamw(other)) == same  # values do not matter
    wider, frozen, swapped = _mlp(9), _mlp(), _mlp()
    frozen[0].requires_grad_(False)
    swapped[1] = nn.Tanh()
    for changed in (wider, frozen, swapped, _mlp().double()):
        assert fingerprint(changed, adamw(changed)) != same
    assert fingerprint(model, torch.optim.SGD(model.parameters(), lr=0.1)) != same
    assert fingerprint(model, None) != same


def test_a_frozen_model_is_refused():
    model, loss_fn, batch = SAMPLES["mlp"].make()
    optimizer = adamw(model)
    model.requires_grad_(False)
    with pytest.raises(ModelError, match="requires_grad_"):
        measure(model, optimizer, loss_fn, batch)


def test_gradients_that_methods_do_not_know_are_refused():
    model, loss_fn, batch = SAMPLES["mlp"].make()
    compact(model)
    with pytest.raises(UnsupportedError, match="of compact"):
        measure(model, None, loss_fn, batch)
    words = nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Linear(4, 1))
    with pytest.raises(UnsupportedError, match="'0' is a sparse tensor"):
        measure(words, None, lambda model, batch: model(batch).mean(), torch.zeros(2, 3).long())


def test_the_optimizer_of_another_model_is_refused():
    model, loss_fn, batch = SAMPLES["mlp"].make()
    with pytest.raises(ModelError, match="no trainable parameter of this model"):
        measure(model, adamw(SAMPLES["mlp"].make()[0]), loss_fn, batch)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (torch.zeros(0, 48), "is empty"),
        ((torch.zeros(4, 16, 48), torch.zeros(4, 0, dtype=torch.int64)), r"batch\['1'\] is empty"),
        ({}, "holds no tensors"),
        (None, "holds no tensors"),
        ("words", "holds no tensors"),
        ({"x": torch.zeros(4, 16, 48, device="meta")}, r"batch\['x'\] is on meta"),
    ],
    ids=["no_samples", "no_labels", "no_members", "none", "text", "another_device"],
)
def test_bad_batches_are_told(batch, found):
    model, loss_fn, _ = SAMPLES["mlp"].make()
    with pytest.raises(BatchError, match=found):
        measure(model, adamw(model), loss_fn, batch)
