"""The state of a training run, taken and put back so that it continues with the same bits.

Parameters and buffers, the optimizer's groups and state, the scheduler, the position in the data, and every
random generator: PyTorch's on the CPU and on each CUDA device, Python's and NumPy's.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slimgrad.errors import CheckpointError, FingerprintError, UnsupportedError
from slimgrad.training.checkpoint import Checkpoint, CheckpointState
from slimgrad.training.tensor_files import Chunked, Storable, StoredTensor

StateOf: TypeAlias = Callable[[Tensor], Mapping[str, Any]]
"""A parameter's optimizer state: names to tensors, to ``Chunked`` sources, or to plain values."""

PutState: TypeAlias = Callable[[Tensor, dict[str, Any]], object]
"""Takes a parameter and its stored state: names to ``StoredTensor`` or to plain values."""


class Stateful(Protocol):
    """What ``torch.optim.lr_scheduler`` classes offer."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Put it back."""
        ...


def capture(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    step: int,
    scheduler: Stateful | None = None,
    data: Any = None,
    extra: Any = None,
    fingerprint: str | None = None,
    state_of: StateOf | None = None,
) -> CheckpointState:
    """What ``save_checkpoint`` writes after ``step`` steps. Tensors are referred to, not copied: save at once.

    ``data`` is the position in the data and ``extra`` anything else with a plain form. ``state_of`` hands over
    the optimizer state of a parameter where it is not in ``optimizer.state`` (kept in files, say). Raises
    ``CheckpointError`` or ``UnsupportedError`` for what cannot be stored without pickling.
    """
    tensors: dict[str, Storable] = {}
    values: dict[str, Any] = {
        "data": data,
        "extra": extra,
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "optimizer": None,
        "rng": random_states(),
    }
    if optimizer is not None:
        tensors, values["optimizer"] = _capture_optimizer(model, optimizer, state_of)
    return CheckpointState(step, dict(_model_tensors(model)), tensors, values, fingerprint)


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    scheduler: Stateful | None = None,
    fingerprint: str | None = None,
    put_state: PutState | None = None,
) -> None:
    """Put a checkpoint's state back, in place; ``checkpoint.values["data"]`` and ``["extra"]`` are the caller's.

    Names, shapes, dtypes and groups are compared before anything is changed. Raises ``FingerprintError`` if the
    checkpoint was made for another run, ``CheckpointError`` if it does not fit the model or the optimizer.
    """
    if fingerprint is not None and checkpoint.fingerprint != fingerprint:
        raise FingerprintError(
            f"{checkpoint.path} was made for {checkpoint.fingerprint!r}, expected {fingerprint!r}: "
            "resume with the model, optimizer and data that it was made with"
        )
    tensors = _model_tensors(model)
    _check_model(checkpoint, tensors)
    stored: dict[str, Any] | None = checkpoint.values["optimizer"]
    if optimizer is not None:
        _check_optimizer(checkpoint, model, optimizer, stored)
    if scheduler is not None and checkpoint.values["scheduler"] is None:
        raise CheckpointError(f"{checkpoint.path} holds no scheduler: it was saved without one")
    for name, tensor in tensors.items():
        checkpoint.model[name].read_into(tensor)
    if optimizer is not None and stored is not None:
        _restore_optimizer(checkpoint, tensors, optimizer, stored, put_state)
    if scheduler is not None:
        scheduler.load_state_dict(checkpoint.values["scheduler"])
    set_random_states(checkpoint.values["rng"])


def random_states() -> dict[str, Any]:
    """The state of each global random generator."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if cuda else [],
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put back what ``random_states`` gave."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    if not states["cuda"]:
        return
    if torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])
    else:
        warnings.warn(
            f"the checkpoint holds the random state of {len(states['cuda'])} CUDA devices, here are "
            f"{torch.cuda.device_count()}: draws on CUDA will differ",
            RuntimeWarning,
            stacklevel=3,
        )


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once: a tied one under its first name."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise UnsupportedError(
                f"module {name!r} ({type(module).__name__}) keeps extra state of any kind, which only "
                "pickling could store: a checkpoint holds parameters and buffers"
            )
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The names of the parameters of each group."""
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: list[list[str]] = []
    for number, group in enumerate(optimizer.param_groups):
        if any(id(p) not in by_id for p in group["params"]):
            raise CheckpointError(
                f"group {number} of the optimizer holds a parameter that the model does not have: "
                "a checkpoint keeps optimizer state by the parameter's name in the model"
            )
        groups.append([by_id[id(p)] for p in group["params"]])
    return groups


def _capture_optimizer(
    model: nn.Module, optimizer: Optimizer, state_of: StateOf | None
) -> tuple[dict[str, Storable], dict[str, Any]]:
    take: StateOf = state_of or (lambda parameter: optimizer.state.get(parameter, {}))
    tensors: dict[str, Storable] = {}
    states: dict[str, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for names, group in zip(_names(model, optimizer), optimizer.param_groups, strict=True):
        rest = {key: value for key, value in group.items() if key != "params"}
        groups.append({"names": names, "rest": rest})
        for name, parameter in zip(names, group["params"], strict=True):
            state = states[name] = {"stored": [], "plain": {}, "host": []}
            for key, value in take(parameter).items():
                if not isinstance(value, (Tensor, Chunked, StoredTensor)):
                    state["plain"][key] = value
                    continue
                tensors[f"{name}/{key}"] = value
                state["stored"].append(key)
                if isinstance(value, Tensor) and value.device.type == "cpu":
                    state["host"].append(key)
    return tensors, {"groups": groups, "states": states}


def _check_model(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
    missing = sorted(tensors.keys() - checkpoint.model.keys())
    surplus = sorted(checkpoint.model.keys() - tensors.keys())
    if missing or surplus:
        raise CheckpointError(
            f"{checkpoint.path} was made for another model: it lacks {_few(missing)} and has in excess "
            f"{_few(surplus)}"
        )
    for name, tensor in tensors.items():
        stored = checkpoint.model[name]
        if stored.shape != tuple(tensor.shape) or stored.dtype != tensor.dtype:
            raise CheckpointError(
                f"{name!r} of {checkpoint.path} is {stored.dtype} of shape {stored.shape}, expected "
                f"{tensor.dtype} of shape {tuple(tensor.shape)}: it was made for another model"
            )


def _few(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "nothing"


def _check_optimizer(
    checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer, stored: dict[str, Any] | None
) -> None:
    if stored is None:
        raise CheckpointError(f"{checkpoint.path} holds no optimizer: it was saved without one")
    expected = _names(model, optimizer)
    found = [group["names"] for group in stored["groups"]]
    if expected != found:
        raise CheckpointError(
            f"{checkpoint.path} was made with {len(found)} groups of {[len(g) for g in found]} parameters, "
            f"expected {len(expected)} of {[len(g) for g in expected]} with the same names in the same order"
        )
    for name, state in stored["states"].items():
        for key in state["stored"]:
            if f"{name}/{key}" not in checkpoint.optimizer:
                raise CheckpointError(f"{checkpoint.path} lacks the optimizer's {name}/{key}")


def _restore_optimizer(
    checkpoint: Checkpoint,
    parameters: Mapping[str, Tensor],
    optimizer: Optimizer,
    stored: dict[str, Any],
    put_state: PutState | None,
) -> None:
    for group, saved in zip(optimizer.param_groups, stored["groups"], strict=True):
        for key, value in saved["rest"].items():
            if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                group[key].copy_(value)
            else:
                group[key] = value
    for name, state in stored["states"].items():
        parameter = parameters[name]
        entries: dict[str, Any] = {
            key: checkpoint.optimizer[f"{name}/{key}"] for key in state["stored"]
        } | state["plain"]
        if put_state is not None:
            put_state(parameter, entries)
        else:
            _put_in_memory(optimizer, parameter, entries, state["host"])


def _put_in_memory(
    optimizer: Optimizer, parameter: Tensor, entries: dict[str, Any], host: list[str]
) -> None:
    """Replace a parameter's optimizer state; what was on the CPU stays there, the rest goes to the parameter."""
    optimizer.state.pop(parameter, None)
    for key, value in entries.items():
        if isinstance(value, StoredTensor):
            device = torch.device("cpu") if key in host else parameter.device
            if value.shape == tuple(parameter.shape):  # keeps the parameter's memory format
                tensor = torch.empty_like(
                    parameter, dtype=value.dtype, device=device, requires_grad=False
                )
            else:
                tensor = torch.empty(value.shape, dtype=value.dtype, device=device)
            value.read_into(tensor)
            value = tensor
        optimizer.state[parameter][key] = value
