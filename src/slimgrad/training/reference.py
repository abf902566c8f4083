"""Plain training of a job's first steps in a process of its own: what the planned run is compared with.

Run as ``python -m slimgrad.training.reference SPEC_JSON FOLDER``. It writes the parameters before and after the
steps, the ledger's figures and losses, and how far plain training is from the truth: the same steps again in
float64, or, where the machine has no room for that, with the samples of each batch in reverse order (the same
mean, other rounding).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimgrad.batches import map_tensors
from slimgrad.errors import SlimgradError
from slimgrad.measuring.ledger import Ledger, MemoryTimeline
from slimgrad.measuring.machine import free_bytes
from slimgrad.training.job import Job, JobSpec, adamw, loss_fn, open_job
from slimgrad.training.tensor_files import StoredTensor, open_tensors, write_tensors
from slimgrad.types import Column
from slimgrad.verifying.gradient import in_float64

_PIECE = 1 << 20  # elements compared at a time


@dataclass(frozen=True)
class Reference:
    """What plain training did: the ledger's figures of its last step, losses, seconds a step."""

    folder: Path
    peak_bytes: int
    columns: dict[str, int]
    timeline: MemoryTimeline
    losses: list[float]
    step_s: float
    own_error: float
    own_error_in: str

    def update_error(self, model: nn.Module) -> float:
        """|dtheta - dtheta_plain| / |dtheta_plain| of ``model`` after the same steps, read in small pieces."""
        before = open_tensors(self.folder / "before.safetensors")
        after = open_tensors(self.folder / "after.safetensors")
        return _distance(dict(model.named_parameters()), before, after)


def run_reference(spec: JobSpec, folder: Path, num_steps: int = 2) -> Reference:
    """Run plain training in a child process; raises ``SlimgradError`` with its last words if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "slimgrad.training.reference"]
    arguments = [json.dumps(spec.to_json()), str(folder), str(num_steps)]
    ran = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=dict(os.environ)
    )
    if ran.returncode:
        raise SlimgradError(
            f"plain training failed in its own process: {ran.stderr.strip()[-800:]}"
        )
    return read_reference(folder)


def read_reference(folder: Path) -> Reference:
    """What ``run_reference`` wrote to ``folder``."""
    data = json.loads((folder / "figures.json").read_text())
    arrays = np.load(folder / "timeline.npz")
    timeline = MemoryTimeline(
        {c: arrays[c.value] for c in Column}, tuple((m[0], m[1]) for m in data["marks"])
    )
    keys = ("peak_bytes", "columns", "losses", "step_s", "own_error", "own_error_in")
    return Reference(folder=folder, timeline=timeline, **{k: data[k] for k in keys})


def _distance(
    ours: dict[str, Tensor], before: dict[str, StoredTensor], after: dict[str, StoredTensor]
) -> float:
    difference = size = 0.0
    for name in sorted(ours):
        flat = ours[name].detach().reshape(-1)
        for start in range(0, flat.numel(), _PIECE):
            piece = flat[start : start + _PIECE]
            old, new = (torch.empty(piece.shape, dtype=before[name].dtype) for _ in range(2))
            before[name].read_into(old, start)
            after[name].read_into(new, start)
            difference += float((piece.double() - new.double()).square().sum())
            size += float((new.double() - old.double()).square().sum())
    return (difference / size) ** 0.5 if size else float("inf")


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def _run(job: Job, num_steps: int, *, reverse: bool = False) -> tuple[list[float], float, Ledger]:
    losses: list[float] = []
    seconds: list[float] = []
    ledger = Ledger()
    for _ in range(num_steps):
        batch: Any = next(job.batches)
        if reverse:
            batch = map_tensors(lambda t: t.flip(0), batch)
        ledger = Ledger(job.model, job.optimizer, inputs=batch)
        begin = time.perf_counter()
        with ledger:
            loss = loss_fn(job.model, batch)
            loss.backward()
            job.optimizer.step()
            job.optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
        losses.append(float(loss.detach()))
        del loss
    return losses, min(seconds), ledger


def _own_error(
    job: Job,
    num_steps: int,
    before: dict[str, StoredTensor],
    after: dict[str, StoredTensor],
    peak: int,
) -> tuple[float, str]:
    """How far the plain steps are from the same steps in float64, and what was compared with."""
    job.optimizer.state.clear()
    with torch.no_grad():
        for name, parameter in job.model.named_parameters():
            before[name].read_into(parameter)
    if free_bytes(torch.device("cpu")) < 2.5 * peak:
        job.optimizer = adamw(job.spec, job.model)
        _run(job, num_steps, reverse=True)
        return _distance(_named(job.model), before, after), "samples in reverse order"
    with in_float64(job.model):
        job.optimizer = adamw(job.spec, job.model)
        for _ in range(num_steps):
            loss_fn(job.model, next(job.batches)).backward()
            job.optimizer.step()
            job.optimizer.zero_grad()
        wide = {name: p.clone() for name, p in _named(job.model).items()}
    return _distance(wide, before, after), "float64"


def main(spec_json: str, folder: str, num_steps: str = "2") -> None:
    """Run the plain steps twice and write what was found to ``folder``."""
    out = Path(folder)
    spec = JobSpec(**json.loads(spec_json))
    job = open_job(spec)
    start = job.batches.state()
    write_tensors(out / "before.safetensors", _named(job.model))
    losses, step_s, ledger = _run(job, int(num_steps), reverse=False)
    write_tensors(out / "after.safetensors", _named(job.model))
    before, after = (
        open_tensors(out / "before.safetensors"),
        open_tensors(out / "after.safetensors"),
    )
    job.batches.restore(start)
    own_error, own_error_in = _own_error(job, int(num_steps), before, after, ledger.peak_bytes)
    figures = {
        "peak_bytes": ledger.peak_bytes,
        "columns": {c.value: v for c, v in ledger.columns.items()},
        "marks": [list(m) for m in ledger.timeline.marks],
        "losses": losses,
        "step_s": step_s,
        "own_error": own_error,
        "own_error_in": own_error_in,
    }
    np.savez(out / "timeline.npz", **{c.value: v for c, v in ledger.timeline.columns.items()})  # pyright: ignore[reportArgumentType]
    (out / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
