"""What goes into a checkpoint's JSON comes out the same, type and bits."""

import collections
import json
import random

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from slimgrad.errors import CheckpointError, UnsupportedError
from slimgrad.training.plain_values import decode, encode

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner, max_size=4)
    ),
    max_leaves=20,
)


def round_trip(value):
    return decode(json.loads(json.dumps(encode(value))))


@given(plain)
def test_plain_values_survive(value):
    assert repr(round_trip(value)) == repr(
        value
    )  # repr tells 1 from 1.0 and True, and 0.0 from -0.0


def test_a_dictionary_cannot_pass_for_a_tagged_value():
    value = {"$": "tuple", "items": [1]}
    assert round_trip(value) == value


def test_random_states_survive():
    state, numpy_state = random.getstate(), np.random.get_state()
    assert round_trip(state) == state
    for a, b in zip(round_trip(numpy_state), numpy_state, strict=True):
        assert type(a) is type(b)
        assert np.array_equal(a, b)
    assert torch.equal(round_trip(torch.get_rng_state()), torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_survive(dtype):
    for tensor in (
        torch.randn(3, 2).to(dtype),
        torch.ones((), dtype=dtype),
        torch.zeros(0, 2).to(dtype),
    ):
        read = round_trip(tensor)
        assert read.dtype == dtype
        assert read.shape == tensor.shape
        assert torch.equal(read, tensor)


def test_numbers_of_numpy_and_counters_survive():
    assert type(round_trip(np.float64(0.1))) is np.float64
    assert round_trip(np.float64(0.1)) == np.float64(0.1)
    counter = collections.Counter({30: 1, 60: 2})
    assert round_trip(counter) == counter
    assert type(round_trip(counter)) is collections.Counter


@pytest.mark.parametrize(
    "value", [object(), lambda: 0, {"a": [torch.zeros(10**5)]}, np.array([object()])]
)
def test_what_only_pickling_could_store_is_refused(value):
    with pytest.raises(UnsupportedError, match="values"):
        encode(value, "values")


def test_unknown_kinds_are_refused():
    with pytest.raises(CheckpointError, match="newer format"):
        decode({"$": "module", "items": []})
