"""Text to train on, as tokens in shuffled blocks whose order a checkpoint can resume."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from slimgrad.errors import BatchError, CheckpointError, LoadError


class Tokenizer(Protocol):
    """What is asked of a tokenizer: Hugging Face's have it, and so has ``ByteTokenizer``."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Token ids."""
        ...


@dataclass(frozen=True)
class TextSource:
    """Documents, and a name to print."""

    name: str
    documents: tuple[str, ...]


class ByteTokenizer:
    """One token for each byte of the text's UTF-8: for models without a tokenizer of their own."""

    vocab_size: Final = 256
    eos_token_id: Final = None

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The bytes of ``text``, 0 to 255. There are no special tokens."""
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become replacement characters."""
        return bytes(ids).decode(errors="replace")


def text_source(spec: str | None = None) -> TextSource:
    """The documents that ``spec`` names.

    None is the topics of Python's own documentation (``pydoc_data.topics``); a ``.txt`` file is one document; a
    ``.jsonl`` file has one a line, under ``"text"`` or else in the first field that is text. Raises ``LoadError``
    with the place in the file for what cannot be read.
    """
    if spec is None:
        return TextSource("pydoc_data.topics", _python_topics())
    path = Path(spec).expanduser()
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise LoadError(f"cannot tell what {spec!r} is: expected a .txt or .jsonl file")
    text = _read(path)
    documents = (text,) if path.suffix.lower() == ".txt" else tuple(_json_lines(path, text))
    if not any(document.strip() for document in documents):
        raise LoadError(f"{path} holds no text: expected something to train on")
    return TextSource(path.name, documents)


def _python_topics() -> tuple[str, ...]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise LoadError(
            "this Python comes without pydoc_data.topics, the default text: name a .txt or .jsonl file"
        ) from error
    return tuple(topics[name] for name in sorted(topics))


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f": did you mean {str(path.parent / near[0])!r}?" if near else ""
        raise LoadError(f"cannot read {path} ({error.strerror}){hint}") from error
    except UnicodeDecodeError as error:
        raise LoadError(
            f"{path} is not UTF-8 text: byte {error.start:,} is {error.object[error.start]:#04x}; convert it"
        ) from error


def _json_lines(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise LoadError(f"line {number} of {path} is not JSON ({error})") from error
        yield _text_of(record, f"line {number} of {path}")


def _text_of(record: Any, place: str) -> str:
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise LoadError(f"{place} is {type(record).__name__}, expected an object with text in it")
    if isinstance(record.get("text"), str):
        return record["text"]
    for value in record.values():
        if isinstance(value, str):
            return value
    raise LoadError(f"{place} has no text in any of its fields: {', '.join(map(str, record))}")


def tokenize(source: TextSource, tokenizer: Tokenizer | None) -> Tensor:
    """All documents as one row of tokens, int32 ``[num_tokens]``, each followed by the end-of-text token if any.

    Without a tokenizer, bytes are the tokens.
    """
    encoder: Tokenizer = tokenizer if tokenizer is not None else ByteTokenizer()
    end = getattr(encoder, "eos_token_id", None)
    # a Hugging Face tokenizer warns of documents longer than its model's context unless told not to
    options = {} if isinstance(encoder, ByteTokenizer) else {"verbose": False}
    rows: list[Tensor] = []
    for document in source.documents:
        ids = encoder.encode(document, add_special_tokens=False, **options)
        rows.append(torch.tensor([*ids, *([] if end is None else [end])], dtype=torch.int32))
    return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int32)


class TokenBlocks:
    """Batches of blocks of ``seq_len`` tokens, in an order that ``seed`` alone decides; never ends.

    Each epoch visits the blocks once in a new order and drops the last incomplete batch. Global random state is
    neither read nor changed. A batch is ``{"input_ids": [B, T], "labels": [B, T]}``, int64; models of
    Transformers shift the labels themselves. Raises ``BatchError`` if the tokens do not fill one batch.
    """

    def __init__(
        self, tokens: Tensor | Sequence[int], seq_len: int, batch_size: int, seed: int = 0
    ) -> None:
        if seq_len < 1 or batch_size < 1:
            raise BatchError(f"seq_len={seq_len}, batch_size={batch_size}: both must be 1 or more")
        flat = torch.as_tensor(tokens).reshape(-1)
        num_blocks = flat.numel() // seq_len
        if num_blocks < batch_size:
            raise BatchError(
                f"the text is too short: one batch of {batch_size} blocks of {seq_len} tokens needs "
                f"{seq_len * batch_size:,} tokens, found {flat.numel():,}; use a longer text, or a smaller "
                "sequence length or batch size"
            )
        self.blocks = flat[: num_blocks * seq_len].to(torch.int32).view(num_blocks, seq_len)
        self.batch_size = batch_size
        self.seed = seed
        self.batches_per_epoch = num_blocks // batch_size
        self.epoch = 0
        self.batch = 0
        self._order = self._shuffle()

    def _shuffle(self) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        return torch.randperm(len(self.blocks), generator=generator)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        if self.batch == self.batches_per_epoch:
            self.epoch, self.batch = self.epoch + 1, 0
            self._order = self._shuffle()
        start = self.batch * self.batch_size
        rows = self._order[start : start + self.batch_size]
        self.batch += 1
        input_ids = self.blocks[rows].long()
        return {"input_ids": input_ids, "labels": input_ids.clone()}

    def _identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(memoryview(self.blocks.numpy()).cast("B"))  # pyright: ignore[reportArgumentType]
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "blocks": list(self.blocks.shape),
            "sha256": digest.hexdigest(),
        }

    def state(self) -> dict[str, Any]:
        """The position, and what identifies the text: plain values for a checkpoint."""
        return {"epoch": self.epoch, "batch": self.batch, **self._identity()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue with the batch that would have come next when ``state`` was taken.

        Raises ``CheckpointError`` if it was taken with another text, seed or shape of batches.
        """
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise CheckpointError(
                    f"the checkpoint's position is in other data: {key} is {state.get(key)}, expected "
                    f"{value}; resume with the same text, tokenizer, sequence length, batch size and seed"
                )
        if not 0 <= int(state["batch"]) <= self.batches_per_epoch or int(state["epoch"]) < 0:
            raise CheckpointError(f"no such position in the data: {dict(state)}")
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])
        self._order = self._shuffle()
