"""Cuts a model into blocks: the calls of the members of its longest ModuleList or Sequential runs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def cut(model: nn.Module) -> list[str]:
    """Dotted paths of the modules whose calls are blocks, in the order of registration; none is inside another.

    A run is a ``ModuleList`` or ``Sequential`` of at least two members. Its members are blocks, unless a member
    holds a longer run of its own (a backbone inside a wrapper), which is cut instead. A flat model has none.

    >>> cut(nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "head": nn.Linear(2, 2)}))
    ['body.0', 'body.1']
    """
    return _cut(model, "")


def _cut(module: nn.Module, path: str) -> list[str]:
    prefix = f"{path}." if path else ""
    found: list[str] = []
    is_run = _is_run(module)
    for name, child in module.named_children():
        inner = _longest_run(child)
        if is_run and inner <= _length(module):
            found.append(prefix + name)
        elif inner:
            found += _cut(child, prefix + name)
        elif is_run:
            found.append(prefix + name)
    return found


def _is_run(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential)) and _length(module) >= 2


def _length(module: nn.Module) -> int:
    return sum(1 for _ in module.children())


def _longest_run(module: nn.Module) -> int:
    return max((_length(m) for m in module.modules() if _is_run(m)), default=0)


def cut_large(model: nn.Module, paths: list[str], saved_bytes: Mapping[str, int]) -> list[str]:
    """``paths`` with each block that saves more than a sixth of all bytes replaced by the blocks inside it.

    Only runs of modules that have parts of their own count as blocks inside: a run of single layers (the two
    linear layers of an MLP) would leave the rest of the block uncut.
    """
    total = sum(saved_bytes.values())
    found: list[str] = []
    for path in paths:
        module = model.get_submodule(path)
        inner = _cut_inside(module, path) if 6 * saved_bytes.get(path, 0) > total else []
        found += inner or [path]
    return found


def _cut_inside(module: nn.Module, path: str) -> list[str]:
    if _is_run(module) and any(_length(child) for child in module.children()):
        return [f"{path}.{name}" for name, _ in module.named_children()]
    found: list[str] = []
    for name, child in module.named_children():
        found += _cut_inside(child, f"{path}.{name}")
    return found
