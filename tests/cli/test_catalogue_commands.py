"""methods, explain and cite show what the catalogue says."""

import importlib
import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
from click.testing import CliRunner

from slimgrad import catalogue
from slimgrad.cli.main import main
from slimgrad.method import Paper, Refusal, Scope, Undo
from slimgrad.types import Column, Exactness

__doc__ = """Forgets [red]everything[/red].

Formula: 0 = 0
Memory: nothing is left.
Exactness: exact.
Limits: none.
References: The paper, page 1.
"""


@dataclass(frozen=True)
class Forget:
    column: ClassVar[Column] = Column.OPTIMIZER_STATE
    exactness: ClassVar[Exactness] = Exactness.EXACT
    scope: ClassVar[Scope] = Scope.MODEL
    paper: ClassVar[Paper] = Paper("On forgetting", "Lethe", 1999, url="https://example.org/lethe")
    rank: int = 7

    def offer(self, block):
        return Refusal("a test")

    def attach(self, block):
        return Undo()


NAME = __name__.rpartition(".")[2]


@pytest.fixture(autouse=True)
def _one_method(monkeypatch):
    found = {NAME: Forget}
    shown = {"methods": found, "components": {}, "everything": found}
    commands = [importlib.import_module(f"slimgrad.cli.{name}") for name in ("methods", "cite")]
    for place in (catalogue, *commands):
        for name in shown.keys() & vars(place).keys():
            monkeypatch.setattr(place, name, lambda name=name: shown[name])


def run(*arguments):
    result = CliRunner().invoke(main, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_methods_lists_name_column_rung_and_paper():
    shown = run("methods")
    for text in (
        NAME,
        "optimizer state",
        "exact",
        "[red]everything[/red]",
        "On forgetting",
        "1 method",
    ):
        assert text in shown
    (told,) = json.loads(run("methods", "--json"))
    assert told["name"] == NAME
    assert told["fields"] == {"rank": 7}


def test_explain_shows_the_whole_card():
    shown = run("explain", NAME.replace("_", "-"))
    for text in ("0 = 0", "nothing is left.", "none.", "page 1", "rank = 7", "example.org/lethe"):
        assert text in shown
    assert json.loads(run("explain", NAME, "--json"))["limits"] == "none."


def test_explain_suggests_a_name():
    result = CliRunner().invoke(main, ["explain", NAME[:-1]])
    assert result.exit_code == 1
    assert f"did you mean '{NAME}'" in result.stderr.replace("\n", "")


def test_cite_prints_bibtex():
    assert run("cite") == run("cite", NAME)
    assert "@misc{lethe1999forgetting," in run("cite")
    assert json.loads(run("cite", "--json")) == {NAME: catalogue.bibtex(Forget)}
