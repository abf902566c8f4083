"""``slimgrad measure --sensitivity``: the figures as JSON and as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.every_method.coded_blocks import stores

from slimgrad.cli.main import main

MODULE = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(256, 16), nn.Linear(16, 256)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
"""


def measured(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Result:
    """The command on a model that saves 32 KiB a tensor (``--seq-len 64``)."""
    (folder / "tiny_coded.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(folder))
    return CliRunner().invoke(
        main, ["measure", "tiny_coded:Tiny", *options], catch_exceptions=False
    )


def test_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--seq-len", "64", "--sensitivity", "--json")
    result = measured(tmp_path, monkeypatch, *options)
    assert result.exit_code == 0
    coding: dict[str, list[Any]] = json.loads(result.stdout)["coding"]
    assert list(coding) == ["blocks.0", "blocks.1", "blocks.2"]
    for costs in coding.values():
        names = {setting[0] for setting, _ in costs}
        assert {"half_store", "quantized_store"} <= names <= stores().keys()
        for _, cost in costs:
            shares = dict(cost.pop("shares"))
            assert sum(shares.values()) == pytest.approx(1.0)
            assert cost.keys() == {"encode_s", "decode_s", "squared_error"}
            assert all(figure > 0 for figure in cost.values())


def test_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = measured(tmp_path, monkeypatch, "--seq-len", "64", "--sensitivity")
    assert result.exit_code == 0
    table = result.stdout.partition("Saved tensors as codes")[2].splitlines()[1:]
    assert "error of the gradient" in table[0]
    assert "decode, ns an element" in table[0]
    rows = [line.split() for line in table[1:] if line.strip()]
    assert {"half_store", "quantized_store"} <= {row[0] for row in rows} <= stores().keys()
    assert "quantized_store bits=4" in result.stdout
    errors = [float(row[-3]) for row in rows]
    assert errors == sorted(errors)
    assert all(0 < error < 3 for error in errors)
    assert all(float(figure) > 0 for row in rows for figure in row[-2:])


def test_where_no_tensor_is_large_enough_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = measured(tmp_path, monkeypatch, "--seq-len", "8", "--sensitivity")
    assert result.exit_code == 0
    assert "no block saves a tensor" in result.stdout


def test_fake_passes_cannot_tell() -> None:
    result = CliRunner().invoke(main, ["measure", "--fake", "--sensitivity"])
    assert result.exit_code == 1
    assert "leave --fake out" in result.output
