"""The group: finding commands without importing them, errors as one line, exit codes."""

import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from slimgrad import errors
from slimgrad.cli import main as cli


def run(*arguments):
    return CliRunner().invoke(cli.main, arguments)


def test_help_lists_every_command_with_its_line():
    result = run("--help")
    assert result.exit_code == 0
    for name in ("methods", "explain", "cite", "doctor"):
        assert f"  {name} " in result.output
    assert "List every method" in result.output


def test_help_does_not_import_torch():
    code = (
        "import sys\nfrom slimgrad.cli.main import main\n"
        "main(['--help'], standalone_mode=False)\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_commands_are_files_with_a_command(tmp_path):
    (tmp_path / "grow.py").write_text('"""Grow.\n\nMore."""\n@deco\ndef command(): ...\n')
    (tmp_path / "shrink_all.py").write_text('"""Shrink."""\ncommand: object = None\n')
    (tmp_path / "written.py").write_text('"""No command."""\ndef other():\n    command = 1\n')
    assert dict(cli.command_lines(tmp_path)) == {"grow": "Grow.", "shrink-all": "Shrink."}


@pytest.mark.parametrize("name", list(cli.command_lines()))
def test_every_command_loads_has_help_and_json(name):
    result = run(name, "--help")
    assert result.exit_code == 0, result.output
    assert "--json" in result.output
    assert cli.command_lines()[name].endswith(".")


def test_version():
    assert run("--version").output.startswith("slimgrad, version ")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.BudgetError("too [bold]small[/bold]", smallest_bytes=9), 2),
        (errors.VerificationError("too [bold]small[/bold]"), 3),
        (errors.ModelError("too [bold]small[/bold]\nand more"), 1),
    ],
)
def test_errors_are_one_line_and_an_exit_code(monkeypatch, error, code):
    @click.command()
    def failing():
        raise error

    monkeypatch.setattr(cli.FoundCommands, "get_command", lambda *_: failing)
    result = run("doctor")
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith("slimgrad: too [bold]small[/bold]")
    assert result.stderr.count("\n") == 1


def test_a_command_may_end_with_its_own_code(monkeypatch):
    @click.command()
    @click.pass_context
    def ending(ctx):
        ctx.exit(3)

    monkeypatch.setattr(cli.FoundCommands, "get_command", lambda *_: ending)
    assert run("doctor").exit_code == 3


def test_other_errors_are_not_swallowed(monkeypatch):
    @click.command()
    def broken():
        raise ZeroDivisionError

    monkeypatch.setattr(cli.FoundCommands, "get_command", lambda *_: broken)
    assert isinstance(run("doctor").exception, ZeroDivisionError)


@pytest.mark.parametrize("arguments", [["doctr"], ["doctor", "--nonsense"], ["explain"]])
def test_wrong_usage_is_an_error_but_not_a_budget_that_does_not_fit(arguments):
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "Error" in result.stderr


def test_an_unknown_command_is_suggested():
    assert "did you mean 'doctor'?" in run("doctr").stderr
    assert "slimgrad --help" in run("xyzzy").stderr


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "slimgrad", "methods", "--json"], capture_output=True, check=True
    )
    assert isinstance(json.loads(done.stdout), list)
