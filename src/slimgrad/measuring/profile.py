"""What was measured: everything a plan is made from. Prints well, saves as JSON, holds no tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from slimgrad.batches import Shapes, shapes_from_json
from slimgrad.errors import PlanError
from slimgrad.measuring.clock import Rates
from slimgrad.measuring.ledger import MemoryTimeline
from slimgrad.measuring.optimizer import OptimizerLaw, ParameterLaw
from slimgrad.measuring.trace import Call, Trace
from slimgrad.method import CodingCost, CompiledCost, Setting
from slimgrad.types import Column

FORMAT = 3


@dataclass(frozen=True)
class ModuleCost:
    """One block, or what lies outside all blocks, in the plain step."""

    path: str
    cls: str
    weight_bytes: int
    activation_bytes: int
    forward_s: float
    backward_s: float


@dataclass(eq=False)
class Profile:
    """A measured step. ``variants`` maps the rewriting methods attached (none: the plain step) to its trace.

    ``compiled`` has what those blocks take once compiled that were measured so, by path; ``compile_s`` is what
    compiling the whole step took. ``coding`` has, by block, what keeping what it saves as codes was measured to cost.
    ``gradient_noise`` is how far another batch of as many samples would take the gradient: the standard deviation as a
    share of its length, of the whole gradient at "" and of each block's own by its path; empty where not measured.
    """

    fingerprint: str
    device: str
    batch_size: int
    weight_bytes: int
    trainable_bytes: int
    variants: dict[tuple[Setting, ...], Trace]
    law: OptimizerLaw
    rates: Rates
    modules: list[ModuleCost]
    refusals: dict[str, str]
    has_batch_statistics: bool
    has_dropout: bool
    read_bytes_s: float
    write_bytes_s: float
    plain_timeline: MemoryTimeline
    forward_s: float
    backward_s: float
    update_s: float
    faked: bool = True
    versions: dict[str, str] = field(default_factory=dict)
    batch_shapes: Shapes = field(default_factory=dict)
    compiled: dict[str, CompiledCost] = field(default_factory=dict)
    compile_s: float = 0.0
    coding: dict[str, dict[Setting, CodingCost]] = field(default_factory=dict)
    gradient_noise: dict[str, float] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """The most live bytes at any instant of the plain step, optimizer included."""
        return self.plain_timeline.peak_bytes

    @property
    def columns(self) -> dict[Column, int]:
        """The most bytes that each column holds at any instant of the plain step."""
        return {c: int(live.max(initial=0)) for c, live in self.plain_timeline.columns.items()}

    @property
    def timeline(self) -> MemoryTimeline:
        """Live bytes by column over the plain step."""
        return self.plain_timeline

    @property
    def seconds(self) -> float:
        """One plain step: the sum of its operations, each timed alone."""
        return self.forward_s + self.backward_s + self.update_s

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON."""
        Path(path).write_text(json.dumps(profile_to_json(self)))

    @staticmethod
    def load(path: str | Path) -> Profile:
        """Read a profile written by ``save``; raises ``PlanError`` if it is not one."""
        try:
            return profile_from_json(json.loads(Path(path).read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PlanError(
                f"{path} is not a profile written by Profile.save: {error!r}"
            ) from error

    def __str__(self) -> str:
        from slimgrad.measuring.table import profile_table

        return profile_table(self)


def fingerprint(model: nn.Module, optimizer: Optimizer | None) -> str:
    """A name for the shapes a plan depends on: parameters, buffers, module classes, the optimizer's class."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(
            f"{name}:{tuple(tensor.shape)}:{tensor.dtype}:{tensor.requires_grad};".encode()
        )
    for name, module in model.named_modules():
        digest.update(f"{name}={type(module).__name__};".encode())
    digest.update((type(optimizer).__name__ if optimizer is not None else "none").encode())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """The versions that a profile or plan was made with."""
    import platform

    return {"python": platform.python_version(), "torch": torch.__version__}


# -- JSON ----------------------------------------------------------------------------------------

_ARRAYS = ("nbytes", "birth", "death", "column", "op_call", "op_backward", "op_seconds", "module")


def _trace_to_json(trace: Trace) -> dict[str, Any]:
    out: dict[str, Any] = {name: getattr(trace, name).tolist() for name in _ARRAYS}
    out |= {
        "num_ticks": trace.num_ticks,
        "num_shares": trace.num_shares,
        "is_timed": trace.is_timed,
    }
    out["op_node"] = trace.op_node.tolist()
    out["calls"] = [asdict(call) for call in trace.calls]
    out["gradients"] = {name: list(value) for name, value in trace.gradients.items()}
    out["cached"] = sorted(trace.cached.items())
    out["module_paths"] = trace.module_paths
    out["reads"], out["writes"] = trace.reads, trace.writes
    out["dtypes"], out["row"] = trace.dtypes, trace.row.tolist()
    out["names"], out["name"] = trace.names, trace.name.tolist()
    return out


def _trace_from_json(data: Mapping[str, Any]) -> Trace:
    types = {"op_backward": bool, "op_seconds": np.float64}
    arrays = {name: np.array(data[name], dtype=types.get(name, np.int64)) for name in _ARRAYS}
    calls = [Call(**_as_tuples(c, "inputs", "outputs", "nodes")) for c in data["calls"]]
    return Trace(
        **arrays,
        op=np.zeros(0, dtype=np.int64),
        num_ticks=data["num_ticks"],
        num_shares=data["num_shares"],
        op_node=np.array(data.get("op_node", ()), dtype=np.int64),
        is_timed=data.get("is_timed", False),
        cached=dict(data["cached"]),
        calls=calls,
        gradients={name: (v[0], v[1]) for name, v in data["gradients"].items()},
        module_paths=list(data["module_paths"]),
        reads=[tuple(r) for r in data["reads"]],
        writes=[tuple(w) for w in data["writes"]],
        dtypes=list(data.get("dtypes", ())),
        row=np.array(data.get("row", ()), dtype=np.int64),
        names=list(data.get("names", ())),
        name=np.array(data.get("name", ()), dtype=np.int64),
    )


def _coding_cost(data: Mapping[str, Any]) -> CodingCost:
    values: dict[str, Any] = dict(data)
    values["shares"] = tuple((s, share) for s, share in data["shares"])
    return CodingCost(**values)


def _as_tuples(data: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """``data`` with the lists under ``names`` as tuples: JSON knows only lists."""
    return {**data, **{name: tuple(data[name]) for name in names}}


def setting_from_json(data: Sequence[Any]) -> Setting:
    """A setting read back from JSON."""
    return (data[0], tuple((k, field_from_json(v)) for k, v in data[1]))


def field_from_json(value: Any) -> Any:
    """A method's field read back from JSON, where tuples are lists."""
    return tuple(map(field_from_json, value)) if isinstance(value, list) else value


def profile_to_json(profile: Profile) -> dict[str, Any]:
    """The profile as plain data."""
    out = {
        name: getattr(profile, name)
        for name in Profile.__dataclass_fields__
        if name
        not in ("variants", "law", "rates", "modules", "plain_timeline", "compiled", "coding")
    }
    out["format"] = FORMAT
    out["law"] = asdict(profile.law)
    out["rates"] = asdict(profile.rates)
    out["modules"] = [asdict(m) for m in profile.modules]
    out["timeline"] = {c.value: live.tolist() for c, live in profile.plain_timeline.columns.items()}
    out["compiled"] = {path: asdict(cost) for path, cost in profile.compiled.items()}
    out["coding"] = {
        path: [[list(setting), asdict(cost)] for setting, cost in costs.items()]
        for path, costs in profile.coding.items()
    }
    out["marks"] = [list(mark) for mark in profile.plain_timeline.marks]
    out["variants"] = [[list(key), _trace_to_json(t)] for key, t in profile.variants.items()]
    out["peak_bytes"] = profile.peak_bytes
    out["columns"] = {c.value: v for c, v in profile.columns.items()}
    return out


def profile_from_json(data: Mapping[str, Any]) -> Profile:
    """A profile from plain data; raises KeyError, TypeError or ValueError where it is not one."""
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']} is not {FORMAT}: measure again")
    plain = {
        name: data[name]
        for name in Profile.__dataclass_fields__
        if name in data and name not in ("timeline",)
    }
    law = dict(data["law"])
    law["parameters"] = tuple(ParameterLaw(**_as_tuples(p, "shape")) for p in law["parameters"])
    plain |= {
        "batch_shapes": shapes_from_json(data.get("batch_shapes", {})),
        "law": OptimizerLaw(**law),
        "rates": Rates(**data["rates"]),
        "compiled": {path: CompiledCost(**c) for path, c in data["compiled"].items()},
        "coding": {
            path: {setting_from_json(s): _coding_cost(cost) for s, cost in costs}
            for path, costs in data.get("coding", {}).items()
        },
        "modules": [ModuleCost(**m) for m in data["modules"]],
        "variants": {
            tuple(setting_from_json(s) for s in key): _trace_from_json(t)
            for key, t in data["variants"]
        },
        "plain_timeline": MemoryTimeline(
            {Column(c): np.array(v, dtype=np.int64) for c, v in data["timeline"].items()},
            tuple((m[0], m[1]) for m in data["marks"]),
        ),
    }
    return Profile(**plain)
