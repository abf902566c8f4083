"""Workspaces that fake tensors leave out: a kernel may return one whose size nobody but the kernel knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from slimgrad.measuring.clock import OpKey, built
from slimgrad.measuring.randomness import kept_randomness
from slimgrad.measuring.tracker import plain_tensors

if TYPE_CHECKING:
    from slimgrad.measuring.trace import Trace

_UNKNOWN = (
    torch.ops.aten.mkldnn_rnn_layer.default,
)  # their fake versions return workspaces of 0 bytes


def fill_workspaces(trace: Trace, keys: Mapping[OpKey, int]) -> None:
    """Give the storages made by such kernels the sizes that they have when run for real, one kernel at a time."""
    for key, number in keys.items():
        if key[0] not in _UNKNOWN:
            continue
        sizes: list[int] | None = None
        for tick in np.flatnonzero(trace.op == number) + 1:
            sizes = _sizes(key) if sizes is None else sizes
            born = np.flatnonzero(trace.birth == tick)
            if len(born) == len(sizes):
                trace.nbytes[born] = sizes


def _sizes(key: OpKey) -> list[int]:
    """Bytes of each storage that the operation returns, in order."""
    func, (args, kwargs) = key
    with kept_randomness(), torch.enable_grad():  # no workspace is made without gradients
        out = func(*[built(a) for a in args], **{k: built(v) for k, v in kwargs})
    return list(
        {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in plain_tensors(out))}.values()
    )
