"""Reads a GGUF file once where Transformers would read it three times.

``from_pretrained`` with a GGUF file parses its whole header for the configuration, again for the tokenizer and
again for the weights, and builds the map of tensor names anew for each module. For SmolLM2-135M that is 21 of
26 seconds, and 200 MB of objects. ``shared_reader`` lends Transformers one reader and one map for the time of a
load; the values that it reads are the same, and so are they if a later version reads in another way.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np


def _plain_reader(gguf: Any) -> Any:
    """A reader that slices the mapped file as a plain array: ``np.memmap`` costs microseconds a slice."""

    class PlainReader(gguf.GGUFReader):
        @property
        def data(self) -> np.ndarray[Any, Any]:
            return self._plain

        @data.setter
        def data(self, mapped: np.ndarray[Any, Any]) -> None:
            self._plain = np.asarray(mapped)

    return PlainReader


@contextmanager
def shared_reader(path: Path) -> Generator[None, None, None]:
    """Within, whatever opens ``path`` through ``gguf.GGUFReader`` gets the same reader. Not for several threads."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    reader_type = _plain_reader(gguf)
    shared: list[Any] = []

    def open_reader(wanted: Any, mode: str = "r") -> Any:
        if Path(wanted).resolve() != path.resolve() or mode != "r":
            return reader_type(wanted, mode)
        if not shared:
            shared.append(reader_type(wanted))
        return shared[0]

    def silent(items: Iterable[Any], *_: object, **__: object) -> Iterable[Any]:
        return items

    with ExitStack() as stack:
        replace = mock.patch.object
        stack.enter_context(replace(gguf, "GGUFReader", open_reader))
        names = functools.cache(gguf.get_tensor_name_map)
        stack.enter_context(replace(gguf, "get_tensor_name_map", names))
        if hasattr(reading, "tqdm"):
            stack.enter_context(replace(reading, "tqdm", silent))
        yield
