"""The catalogue: what lies in ``methods/`` and ``layers/``, found by walking them, and each one's card.

Nothing is registered anywhere. A method is a frozen dataclass that keeps the contract of ``method.py``; a component
is a class or function declared with ``component``. Each is defined in the module that bears its name, whose
docstring is its card.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn, TypeVar

from slimgrad.errors import MethodError
from slimgrad.method import Component, Method, method_name

_YOURS = "your code"
_DECLARATIONS = ("column", "exactness", "scope", "paper")
_VERBS = ("offer", "attach")
_HEADERS = ("Formula", "Memory", "Exactness", "Limits", "References")
_HEADER = re.compile(rf"^({'|'.join(_HEADERS)}):[ \t]*(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Card:
    """What a method's, or a component's, file says about it, in the words of its docstring."""

    name: str
    summary: str
    formula: str
    memory: str
    exactness_text: str
    limits: str
    references: str


@functools.cache
def methods() -> Mapping[str, type[Any]]:
    """Every method of slimgrad by name, sorted."""
    return find_methods("slimgrad.methods")


@functools.cache
def components() -> Mapping[str, Callable[..., Any]]:
    """Every layer and function of slimgrad that users call themselves, by name, sorted."""
    return find_components("slimgrad.methods", "slimgrad.layers")


@functools.cache
def everything() -> Mapping[str, Callable[..., Any]]:
    """Methods and components by name, sorted."""
    return _named([*methods().values(), *components().values()])


def find_methods(package_name: str) -> Mapping[str, type[Any]]:
    """Every method defined below a package, by name, sorted.

    Raises MethodError for a class that keeps the contract but is not a frozen dataclass that can be made
    without arguments, for two methods in one module, and for two modules of one name.
    """
    return _named(cls for module in _modules(package_name) for cls in _methods_of(module))


def find_components(*package_names: str) -> Mapping[str, Callable[..., Any]]:
    """Every component declared below the packages, by name, sorted. Raises MethodError for two of one name."""
    modules = [module for name in package_names for module in _modules(name)]
    return _named(
        value
        for module in modules
        for name, value in vars(module).items()
        if "component" in getattr(value, "__dict__", {})  # its own, not a base class's
        and isinstance(value.component, Component)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    )


_Found = TypeVar("_Found", bound=Callable[..., Any])


def _named(found: Iterable[_Found]) -> Mapping[str, _Found]:
    by_name: dict[str, _Found] = {}
    for value in found:
        name = method_name(value)
        if name in by_name:
            raise MethodError(
                f"expected one method named {name!r}, found {_place(by_name[name])} and {_place(value)}; "
                "a method bears its module's name: give each its own module"
            )
        by_name[name] = value
    return dict(sorted(by_name.items()))


def _modules(package_name: str) -> Iterator[ModuleType]:
    package = importlib.import_module(package_name)
    for info in pkgutil.walk_packages(package.__path__, f"{package_name}.", onerror=_reraise):
        if not info.ispkg:
            yield importlib.import_module(info.name)


def _reraise(_name: str) -> NoReturn:
    raise  # walk_packages calls this while the import's error is being handled


def _methods_of(module: ModuleType) -> list[type[Any]]:
    """The classes defined in ``module`` that keep the contract."""
    classes = [
        cls
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__ == module.__name__ and not name.startswith("_")
    ]
    kept = [cls for cls in classes if _keeps_contract(cls)]
    for cls in kept:
        _check_is_value(cls)
    return kept


def _keeps_contract(cls: type[Any]) -> bool:
    declared = all(hasattr(cls, name) for name in _DECLARATIONS)
    return declared and all(callable(getattr(cls, verb, None)) for verb in _VERBS)


def _check_is_value(cls: type[Any]) -> None:
    parameters = getattr(cls, "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        raise MethodError(
            f"expected {_place(cls)} to be a frozen dataclass; decorate it with @dataclass(frozen=True)"
        )
    needed = [
        field.name
        for field in dataclasses.fields(cls)
        if field.init
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if needed:
        raise MethodError(
            f"expected {_place(cls)} to be made without arguments; give the paper's defaults to {needed}"
        )


def _place(cls: Callable[..., Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that names the nearest of ``known``, or a list of all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known) or 'none'}"


def find(name: str) -> type[Any]:
    """The class of the method ``name`` (hyphens count as underscores). Raises MethodError if unknown."""
    return _looked_up(name, methods())


def find_anything(name: str) -> Callable[..., Any]:
    """The method or component ``name`` (hyphens count as underscores). Raises MethodError if unknown."""
    return _looked_up(name, everything())


def _looked_up(name: str, known: Mapping[str, _Found]) -> _Found:
    asked = name.strip().lower().replace("-", "_")
    if asked not in known:
        raise MethodError(f"there is no method {name!r}; {did_you_mean(asked, known)}")
    return known[asked]


def get(name: str, **fields: Any) -> Method:
    """The method ``name`` with ``fields`` as its hyperparameters, the paper's defaults for the rest.

    Raises MethodError for an unknown name or field, and what the method raises for fields out of bounds.
    """
    cls = find(name)
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    for field in fields:
        if field not in known:
            raise MethodError(
                f"{method_name(cls)} has no field {field!r}; {did_you_mean(field, known)}"
            )
    return cls(**fields)


def card(method: Method | Callable[..., Any]) -> Card:
    """The card of a method or component, from its module's docstring.

    The text before the first header is the summary. A header stands at the start of a line; its text runs to
    the next one. Raises MethodError for a header that is missing, doubled or empty.
    """
    module = importlib.import_module(method.__module__)
    text = inspect.cleandoc(module.__doc__ or "")
    parts = _HEADER.split(text)
    summary, headers, texts = (
        parts[0],
        parts[1::3],
        list(zip(parts[2::3], parts[3::3], strict=True)),
    )
    if sorted(headers) != sorted(_HEADERS) or not summary.strip():
        raise MethodError(
            f"the docstring of {module.__name__} is no card: expected a summary and then one line starting "
            f"with each of {', '.join(f'{h}:' for h in _HEADERS)}; found {headers or 'none of them'}"
        )
    told = {
        header: inspect.cleandoc(first + rest).strip()
        for header, (first, rest) in zip(headers, texts, strict=True)
    }
    empty = [header for header in _HEADERS if not told[header]]
    if empty:
        raise MethodError(f"the card of {module.__name__} says nothing under {', '.join(empty)}")
    return Card(
        name=method_name(method),
        summary=" ".join(summary.split()),
        formula=told["Formula"],
        memory=told["Memory"],
        exactness_text=told["Exactness"],
        limits=told["Limits"],
        references=told["References"],
    )


def describe(method: Method | Callable[..., Any]) -> dict[str, Any]:
    """A method's or component's card, declarations and hyperparameters as plain values, for JSON and the docs.

    ``scope`` is what a method is offered to; a component, which no plan chooses, is for ``your code``,
    its ``fields`` are the arguments that have defaults, and ``usage`` is how it is imported and called.
    """
    declared = getattr(method, "component", None)
    defined: Any = method if hasattr(method, "__qualname__") else type(method)
    paper = (declared or defined).paper
    return {
        **dataclasses.asdict(card(method)),
        "family": defined.__module__.split(".")[-2],
        "class": defined.__name__,
        "column": str((declared or defined).column),
        "exactness": str((declared or defined).exactness),
        "scope": _YOURS if declared else str(defined.scope),
        "paper": {**dataclasses.asdict(paper), "link": paper.link},
        "fields": _arguments(defined) if declared else _fields(method),
        "usage": _usage(defined) if declared else "",
    }


def _usage(defined: Any) -> str:
    """The import, and each name's signature and docstring: the component's, and what its module names beside it."""
    module: Any = sys.modules[defined.__module__]
    beside = [n for n in getattr(module, "__all__", ()) if n != defined.__name__]
    parts = [f"from {defined.__module__} import {', '.join([defined.__name__, *beside])}"]
    for found in (defined, *(getattr(module, name) for name in beside)):
        signature = re.sub(
            r"""(: |-> )(['"])(.*?)\2(?=[,)]| = |$)""", r"\1\3", str(inspect.signature(found))
        ).removesuffix(" -> None")
        signature = re.sub(r"<function (\w+) at 0x\w+>", r"\1", signature)
        parts.append(
            f"{found.__name__}{signature}\n{textwrap.indent(inspect.getdoc(found) or '', '    ')}"
        )
    return "\n\n".join(parts)


def offered_to(described: Mapping[str, Any]) -> str:
    """Who uses what ``describe`` told of: ``offered to each block``, or ``for your code``."""
    yours = described["scope"] == _YOURS
    return f"for {_YOURS}" if yours else f"offered to each {described['scope']}"


def _fields(method: Any) -> dict[str, Any]:
    value = method() if isinstance(method, type) else method
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}


def _arguments(defined: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(defined).parameters.values()
    given = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {
        name: getattr(value, "__name__", value) for name, value in given.items()
    }  # of functions


def bibtex(method: Method | Callable[..., Any]) -> str:
    """The method's or component's paper as one BibTeX entry."""
    defined: Any = getattr(method, "component", method)
    paper = defined.paper
    names = re.sub(r",?\s+et al\.?$", ", others", paper.authors)
    authors = [name for name in re.split(r"\s*(?:,|;|\band\b|&)\s*", names) if name]
    word = next((w for w in re.findall(r"[A-Za-z]+", paper.title) if len(w) > 3), "paper")
    surname = re.sub(r"\W", "", authors[0].split()[-1]) if authors else "anonymous"
    entry = {
        "title": f"{{{_latex(paper.title)}}}",
        "author": " and ".join(map(_latex, authors)),
        "year": str(paper.year),
    }
    if paper.arxiv:
        entry |= {"eprint": paper.arxiv, "archivePrefix": "arXiv"}
    elif paper.link:
        entry |= {"howpublished": f"\\url{{{paper.link}}}"}
    lines = [f"  {key} = {{{value}}}" for key, value in entry.items()]
    key = f"{surname}{paper.year}{word}".lower()
    return f"@misc{{{key},\n" + ",\n".join(lines) + "\n}"


def _latex(text: str) -> str:
    return re.sub(r"([&%$#_])", r"\\\1", text)
