"""The catalogue finds what lies in the folders, and every method there carries a whole card."""

import dataclasses
import importlib
import sys
import textwrap
from itertools import count
from pathlib import Path

import pytest

from slimgrad import catalogue
from slimgrad.catalogue import (
    bibtex,
    card,
    components,
    describe,
    everything,
    find_anything,
    find_components,
    find_methods,
    get,
    methods,
    offered_to,
)
from slimgrad.errors import MethodError
from slimgrad.method import Method, Paper, method_name
from slimgrad.types import Column, Exactness

TESTS = Path(__file__).parents[1]
CARD = '''"""Keeps nothing, for tests.

Formula: y = x
    and x = y
Memory: activations fall to 0.
Exactness: exact, if 1 = 1.

Limits: none:
no limit at all.
References: A paper, section 2.
"""
'''
CLASS = """
from dataclasses import dataclass
from typing import ClassVar
from slimgrad.method import Offer, Paper, Refusal, Scope, Undo
from slimgrad.types import Column, Exactness

@dataclass(frozen=True)
class {name}:
    '''A method for tests.'''
    column: ClassVar[Column] = Column.ACTIVATIONS
    exactness: ClassVar[Exactness] = Exactness.EXACT
    scope: ClassVar[Scope] = Scope.BLOCK
    paper: ClassVar[Paper] = Paper("Training at 50% & less", "Ada Byron, C. Babbage and Others", 1843, "1843.00001")
    rank: int = 4
    keep_ratio: float = 0.5
    def offer(self, block): return Refusal("a test")
    def attach(self, block): return Undo()
"""
COMPONENT = """
from slimgrad.method import Paper, component
from slimgrad.types import Column, Exactness

class Other: pass

@component(Column.TEMPORARIES, Exactness.EXACT, Paper("On pages", "A. Byron", 1843, "1843.00002"))
def {name}(values, chunk=8, *, causal=False, reduce=sum):
    '''A function for tests.'''
"""
LAYER = """
from torch import nn
from slimgrad.method import Paper, component
from slimgrad.types import Column, Exactness

@component(Column.ACTIVATIONS, Exactness.EXACT, Paper("On leaves", "A. Byron", 1843, "1843.00003"))
class {name}(nn.Module):
    '''A layer for tests.'''
    def __init__(self, width, splits=2): super().__init__()

class Narrow({name}):
    '''Declares nothing of its own.'''
"""
_numbers = count()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes packages of methods and finds what is in them."""
    monkeypatch.syspath_prepend(tmp_path)
    name = f"fake_methods_{next(_numbers)}"

    def build(files, find=find_methods):
        for file, text in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            for folder in path.relative_to(tmp_path).parents[:-1]:
                (tmp_path / folder / "__init__.py").touch()
            path.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        return find(name)

    yield build
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[module]


def test_a_new_file_is_found_without_being_registered(package):
    found = package(
        {
            "activations/keep_none.py": CARD + CLASS.format(name="KeepNone"),
            "loss/chunk.py": CARD + CLASS.format(name="Chunk"),
            "loss/heads.py": "'''No method, and so not listed.'''\nclass Head: pass",
            "loss/imports.py": "from ..loss.chunk import Chunk",
        }
    )
    assert list(found) == ["chunk", "keep_none"]
    assert found["keep_none"].__name__ == "KeepNone"


def test_a_card_is_read_from_the_docstring(package):
    cls = package({"activations/keep_none.py": CARD + CLASS.format(name="KeepNone")})["keep_none"]
    read = card(cls())
    assert read == card(cls)
    assert read.name == "keep_none"
    assert read.summary == "Keeps nothing, for tests."
    assert read.formula == "y = x\nand x = y"
    assert read.memory == "activations fall to 0."
    assert read.exactness_text == "exact, if 1 = 1."
    assert read.limits == "none:\nno limit at all."
    assert read.references == "A paper, section 2."


@pytest.mark.parametrize("header", ["Formula", "Memory", "Exactness", "Limits", "References"])
def test_a_missing_header_is_an_error(package, header):
    text = CARD.replace(f"{header}:", f"  {header}:") + CLASS.format(name="KeepNone")
    with pytest.raises(MethodError, match=f"{header}:"):
        card(package({"a/keep_none.py": text})["keep_none"])


def test_an_empty_header_is_an_error(package):
    text = CARD.replace(" A paper, section 2.", "") + CLASS.format(name="KeepNone")
    with pytest.raises(MethodError, match="nothing under References"):
        card(package({"a/keep_none.py": text})["keep_none"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("frozen=True", "frozen=False"), "frozen dataclass"),
        (("@dataclass(frozen=True)", ""), "frozen dataclass"),
        (("rank: int = 4", "rank: int"), "without arguments.*rank"),
    ],
)
def test_a_method_that_is_no_value_is_an_error(package, change, message):
    with pytest.raises(MethodError, match=message):
        package({"a/broken.py": CARD + CLASS.format(name="Broken").replace(*change)})


def test_one_name_is_one_method(package):
    text = CARD + CLASS.format(name="Twice")
    with pytest.raises(MethodError, match="one method named 'twice'"):
        package({"a/twice.py": text, "b/twice.py": text})


def test_a_file_that_does_not_import_is_not_passed_over(package):
    with pytest.raises(ModuleNotFoundError):
        package({"a/broken.py": "import a_module_that_is_not_there"})


def test_get_sets_fields_and_suggests_names(package, monkeypatch):
    found = package({"a/keep_none.py": CARD + CLASS.format(name="KeepNone")})
    monkeypatch.setattr(catalogue, "methods", lambda: found)
    assert get("keep-none", rank=8).rank == 8
    assert get("keep_none") == found["keep_none"]()
    with pytest.raises(MethodError, match="did you mean 'keep_none'"):
        get("keepnone")
    with pytest.raises(MethodError, match="did you mean 'rank'"):
        get("keep_none", ranks=3)
    with pytest.raises(MethodError, match="known are: keep_none"):
        get("xyz")


def test_describe_and_bibtex(package):
    cls = package({"activations/keep_none.py": CARD + CLASS.format(name="KeepNone")})["keep_none"]
    told = describe(cls(rank=2))
    assert told["fields"] == {"rank": 2, "keep_ratio": 0.5}
    assert told["family"] == "activations"
    assert told["paper"]["link"] == "https://arxiv.org/abs/1843.00001"
    entry = bibtex(cls)
    assert entry.startswith("@misc{byron1843training,")
    assert "author = {Ada Byron and C. Babbage and Others}" in entry
    assert r"title = {{Training at 50\% \& less}}" in entry
    assert "eprint = {1843.00001}" in entry
    assert entry.count("{") == entry.count("}")


def test_components_are_functions_and_layers_that_declare_themselves(package):
    found = package(
        {
            "layers/running_softmax.py": CARD + COMPONENT.format(name="running_softmax"),
            "layers/folded_block.py": CARD + LAYER.format(name="FoldedBlock"),
            "layers/folds_again.py": "from .folded_block import FoldedBlock",
            "layers/keep_none.py": CARD + CLASS.format(name="KeepNone"),
        },
        find_components,
    )
    assert list(found) == ["folded_block", "running_softmax"]
    told = describe(found["running_softmax"])
    assert told["fields"] == {"chunk": 8, "causal": False, "reduce": "sum"}
    assert told["column"] == "temporaries"
    assert told["paper"]["arxiv"] == "1843.00002"
    assert offered_to(told) == "for your code"
    assert describe(found["folded_block"])["fields"] == {"splits": 2}
    assert "On leaves" in bibtex(found["folded_block"])
    assert offered_to(describe(methods()["recompute"])) == "offered to each block"


def test_one_name_is_one_component(package):
    text = CARD + COMPONENT.format(name="twice")
    with pytest.raises(MethodError, match="one method named 'twice'"):
        package({"a/twice.py": text, "b/twice.py": text}, find_components)


def test_bibtex_of_many_authors_and_of_a_page(package):
    text = CARD + CLASS.format(name="KeepNone").replace(
        'Ada Byron, C. Babbage and Others", 1843, "1843.00001"',
        'Byron et al.", 1843, url="https://example.org/a"',
    )
    entry = bibtex(package({"a/keep_none.py": text})["keep_none"])
    assert "author = {Byron and others}" in entry
    assert r"howpublished = {\url{https://example.org/a}}" in entry
    assert "eprint" not in entry


@pytest.mark.parametrize("name", list(methods()))
def test_every_method_keeps_the_contract_and_has_a_whole_card(name):
    cls = methods()[name]
    method = get(name)
    assert isinstance(method, Method)
    assert method_name(cls) == name
    assert isinstance(cls.column, Column)
    assert isinstance(cls.exactness, Exactness)
    assert isinstance(cls.paper, Paper)
    assert cls.paper.link.startswith("https://")
    assert hash(method) == hash(get(name))
    assert cls.__name__.lower() == name.replace("_", "")
    assert all(dataclasses.asdict(card(cls)).values())
    assert str(cls.exactness) in card(cls).exactness_text.lower()
    assert bibtex(cls).count("{") == bibtex(cls).count("}")


@pytest.mark.parametrize("name", list(components()))
def test_every_component_has_a_whole_card_and_a_test(name):
    found = components()[name]
    declared = found.component
    assert find_anything(name.replace("_", "-")) is found is everything()[name]
    assert found.__name__.lower().replace("_", "") == name.replace("_", "")
    assert isinstance(declared.column, Column)
    assert isinstance(declared.exactness, Exactness)
    assert declared.paper.link.startswith("https://")
    assert all(dataclasses.asdict(card(found)).values())
    assert str(declared.exactness) in card(found).exactness_text.lower()
    assert bibtex(found).count("{") == bibtex(found).count("}")
    parts = found.__module__.split(".")[1:-1]
    assert TESTS.joinpath(*parts, f"test_{name}.py").is_file()
