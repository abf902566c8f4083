"""A model whose forward pass fails ends a command with one line, not with a traceback of torch."""

import pytest
from click.testing import CliRunner

from slimgrad.cli import main as cli

MODULE = """
from torch import nn

class Wrong(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(256, 8), nn.Linear(9, 256)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))
"""


@pytest.mark.parametrize("options", [["--fake"], []])
def test_measure(options, tmp_path, monkeypatch):
    (tmp_path / "wrong_shapes.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ["measure", "wrong_shapes:Wrong", "--seq-len", "8", *options]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "forward and backward pass of loss_fn failed" in result.output
    assert "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) == 1
