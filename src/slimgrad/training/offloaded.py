"""Checkpoints of optimizer state that is not in memory: streamed out of the store and back into it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from slimgrad.host import Host
from slimgrad.streaming import StreamedUpdate
from slimgrad.training.resume import PutState, StateOf
from slimgrad.training.tensor_files import Chunked, StoredTensor


def state_source(host: Host) -> StateOf | None:
    """Where a checkpoint takes the optimizer's state from; None while it is in ``optimizer.state``."""
    streamed = StreamedUpdate.of(host)
    if streamed is None or host.optimizer is None:
        return None
    optimizer = host.optimizer

    def state_of(parameter: Tensor) -> dict[str, Any]:
        places = streamed.state.places(parameter)
        state: dict[str, Any] = dict(optimizer.state.get(parameter, {}))
        for key, place in places.items():
            state[key] = Chunked(
                place.dtype, tuple(place.shape), lambda key=key: _slices(streamed, parameter, key)
            )
        return state

    return state_of


def _slices(streamed: StreamedUpdate, parameter: Tensor, wanted: str) -> Iterator[Tensor]:
    for key, _, values in streamed.state_slices(parameter):
        if key == wanted:
            yield values


def state_sink(host: Host) -> PutState | None:
    """Where a checkpoint puts the optimizer's state back, one parameter at a time; None: into memory."""
    streamed = StreamedUpdate.of(host)
    if streamed is None or host.optimizer is None:
        return None
    optimizer = host.optimizer

    def put_state(parameter: Tensor, entries: dict[str, Any]) -> None:
        streamed.state.drop(parameter)
        optimizer.state[parameter] = {
            key: value.read() if isinstance(value, StoredTensor) else value
            for key, value in entries.items()
        }
        streamed.take_in(parameter)

    return put_state
