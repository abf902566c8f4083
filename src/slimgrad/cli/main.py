"""The command line: finds the commands beside it, and turns errors into one line and an exit code.

A command is a file of this folder with a module-level ``command``; the first line of its docstring is its help
in the list. Files are read, not imported, to make the list: ``slimgrad --help`` does not wait for torch.

Exit codes: 0 done; 1 any other error; 2 no plan fits the budget; 3 verification failed, nothing applied.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import os
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from slimgrad.errors import BudgetError, SlimgradError, VerificationError

EXIT_ERROR, EXIT_DOES_NOT_FIT, EXIT_NOT_VERIFIED = 1, 2, 3
_FOLDER = Path(__file__).parent


@functools.cache
def command_lines(folder: Path = _FOLDER) -> Mapping[str, str]:
    """The commands of a folder by name, and the first line of each one's docstring."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any("command" in _names_bound(node) for node in tree.body):
            first = (ast.get_docstring(tree) or "").partition("\n")[0]
            found[path.stem.replace("_", "-")] = first
    return found


def _names_bound(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def exit_code(error: SlimgradError) -> int:
    """The exit code that an error ends the program with."""
    if isinstance(error, BudgetError):
        return EXIT_DOES_NOT_FIT
    return EXIT_NOT_VERIFIED if isinstance(error, VerificationError) else EXIT_ERROR


class FoundCommands(click.Group):
    """A group whose commands are the files of this folder, each imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands."""
        return sorted(command_lines())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now; None if there is none."""
        if cmd_name not in command_lines():
            return None
        module = importlib.import_module(f"slimgrad.cli.{cmd_name.replace('-', '_')}")
        return module.command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with a suggestion for a name that is not known."""
        if args and not args[0].startswith("-") and args[0] not in command_lines():
            near = difflib.get_close_matches(args[0], command_lines(), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see 'slimgrad --help'"
            ctx.fail(f"there is no command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from the files' first lines."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(command_lines().items()))

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run; with ``standalone_mode`` end the process with the exit code of the module's docstring."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        try:
            result = super().main(*args, standalone_mode=False, **extra)
        except click.ClickException as error:
            error.show()
            sys.exit(EXIT_ERROR)  # not click's 2, which here says that nothing fits
        except (click.Abort, KeyboardInterrupt):
            sys.exit(_say("stopped", 130))
        except SlimgradError as error:
            sys.exit(_say(str(error), exit_code(error)))
        except BrokenPipeError:  # the reader has gone: nothing is left to be said
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(EXIT_ERROR)
        sys.exit(result if isinstance(result, int) else 0)


def _say(message: str, code: int) -> int:
    """Print ``message`` as one line on standard error."""
    from rich.console import Console
    from rich.text import Text

    line = Text("slimgrad: ", style="bold red").append(Text(" ".join(message.split()), style=""))
    Console(stderr=True, highlight=False, soft_wrap=True).print(line)
    return code


def _version() -> str:
    try:
        return metadata.version("slimgrad")
    except metadata.PackageNotFoundError:
        return "(not installed)"


@click.group(cls=FoundCommands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="slimgrad")
def main() -> None:
    """Fit neural-network training into the memory you have."""


if __name__ == "__main__":
    main()
