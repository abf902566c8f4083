"""``plan --layout`` runs a step under the plan and tells how its tensors would lie in one arena."""

import json

import pytest
from click.testing import CliRunner

from slimgrad.cli import main as cli

MODULE = """
from torch import nn

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(3)]
        self.embed, self.body, self.head = nn.Embedding(256, 16), nn.Sequential(*layers), nn.Linear(16, 256)

    def forward(self, input_ids):
        return self.head(self.body(self.embed(input_ids)))
"""


@pytest.fixture(autouse=True)
def _factory(tmp_path, monkeypatch):
    (tmp_path / "small_stack.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))


def run(*options):
    arguments = ["plan", "small_stack:Small", "--seq-len", "16", "--budget", "90%", *options]
    return CliRunner().invoke(cli.main, arguments)


def test_rules_are_told_beside_the_live_bytes():
    result = run("--layout")
    assert result.exit_code == 0, result.output
    assert "are live at once" in result.output
    assert "greedy by size" in result.output


def test_as_json():
    result = run("--layout", "--json")
    assert result.exit_code == 0, result.output
    layout = json.loads(result.stdout)["layout"]
    assert layout["live_bytes"] <= min(layout["arenas"].values())
    assert layout["fragmentation"]["first fit"] >= 0


def test_a_profile_has_no_model_to_run(tmp_path):
    result = run("--layout", "--profile", str(tmp_path / "profile.json"))
    assert result.exit_code == 1  # 2 would say that nothing fits
    assert "leave one out" in result.output
