"""Compiling is allowed, forbidden and paid off by options of the commands that plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tests.sample_models import SAMPLES, adamw

import slimgrad
from slimgrad.cli.main import main
from slimgrad.method import CompiledCost
from slimgrad.planning.calls import call_bytes
from slimgrad.planning.settings import layout_of


@pytest.fixture(scope="module")
def profile_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile in which compiled blocks take no time, 60 s of compiling apart."""
    model, loss_fn, batch = SAMPLES["attention"].make()
    profile = slimgrad.measure(model, adamw(model), loss_fn, batch, limit_s=0.0)
    layout = layout_of(profile, profile.variants[()])
    costs: dict[str, CompiledCost] = {}
    for path, block in layout.blocks.items():
        saved = call_bytes(layout.trace, block.saved[block.calls[0]])
        costs[path] = CompiledCost(
            saved, saved, saved, 0.0, 0.0, saved, 1.0, 1.0, 60.0, 3, True, False
        )
    for trace in profile.variants.values():
        trace.op_seconds[:] = 1e-3
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    replace(profile, compiled=costs).save(path)
    return path


@pytest.mark.parametrize(
    ("options", "is_used"),
    [
        (["--steps", "1000000"], True),
        (["--steps", "1000000", "--compile"], True),
        (["--steps", "1000000", "--no-compile"], False),
        (["--steps", "1000000", "--exactness", "bitwise"], False),
        (["--steps", "2"], False),
    ],
)
def test_plan(profile_file: Path, options: list[Any], is_used: bool) -> None:
    command = ["plan", "--profile", str(profile_file), "--budget", "100%", "--json", *options]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0
    plan = json.loads(result.output)
    assert any(c["method"] == "compiled" for c in plan["choices"]) is is_used


@pytest.mark.parametrize("command", ["measure", "plan", "verify", "train"])
def test_every_command_that_measures_has_the_flags(command: str) -> None:
    told = CliRunner().invoke(main, [command, "--help"]).output
    assert "--compile / --no-compile" in told
