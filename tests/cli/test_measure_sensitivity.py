"""``slimgrad measure --sensitivity``: the figures as JSON and as a table."""

from __future__ import annotations

import json
import re
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
            assert cost.keys() == {
                "encode_s",
                "decode_s",
                "squared_error",
                "own_error",
                "own_cosine",
            }
            assert all(figure > 0 for figure in cost.values())


def test_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--seq-len", "64", "--batch-size", "1", "--sensitivity")
    result = measured(tmp_path, monkeypatch, *options)
    assert result.exit_code == 0
    table = result.stdout.partition("Saved tensors as codes")[2].splitlines()[1:]
    assert table[0].split()[:4] == ["setting", "error", "own", "cosine"]
    told = next(number for number, line in enumerate(table) if not line.strip())
    rows = [line.split() for line in table[1:told]]
    assert {"half_store", "quantized_store"} <= {row[0] for row in rows} <= stores().keys()
    assert "quantized_store bits=4" in result.stdout
    errors, own, cosines = ([float(row[k]) for row in rows] for k in (-5, -4, -3))
    assert errors == sorted(errors)
    assert all(0 < error < 3 for error in (*errors, *own))
    assert all(0 < cosine <= 1 for cosine in cosines)
    assert all(float(figure) > 0 for row in rows for figure in row[-2:])
    assert "batch variance" not in result.stdout  # one sample says nothing of another one


def test_html_has_a_cell_for_each_block_and_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "report.html"
    options = ("--seq-len", "64", "--batch-size", "2", "--sensitivity", "--html", str(page))
    result = measured(tmp_path, monkeypatch, *options)
    assert result.exit_code == 0
    assert "of batch variance" in result.stdout
    text = page.read_text()
    cells = re.findall(r'data-tip="([^"]+) on (blocks\.\d)[^"]*of the variance of batches', text)
    named = {name.split()[0] for name, _ in cells}
    assert {"half_store", "quantized_store"} <= named <= stores().keys()
    assert {path for _, path in cells} == {"blocks.0", "blocks.1", "blocks.2"}
    assert len(set(cells)) == len(cells)


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
