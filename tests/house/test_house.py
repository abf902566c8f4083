"""The house: imports run one way, files and functions stay short, every function has a room."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "slimgrad"
ROOMS = [  # a room may import itself and those on earlier lines; rooms on one line do not know each other
    {"errors"},
    {"types"},
    {"optimizers", "storage", "batches", "integer_programs"},
    {"code"},
    {"host", "streaming", "arena", "single_backward", "operation_graph"},
    {"method"},
    {"measuring", "kernels", "replaced_forward"},
    {"coding"},
    {"methods", "layers"},
    {"catalogue"},
    {"planning"},
    {"applying"},
    {"verifying"},
    {"training"},
    {"integrations", "comparing"},
    {"cli"},
]
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
ONLY_FOR = {"kernels": {"kernels", "coding", "methods", "layers"}}
DOORS = {"__init__", "__main__"}  # of the package itself: they open on every room
NO_ROOMS = {"utils", "util", "helpers", "helper", "misc", "common", "manager", "base"}
MOST_LINES, MOST_TEST_LINES, MOST_FUNCTION_LINES, MOST_BYTES = 400, 600, 60, 2**20

SOURCES = sorted(PACKAGE.rglob("*.py"))
PYTHON = SOURCES + sorted(
    path for folder in ("tests", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)


def named(path):
    return str(path.relative_to(ROOT))


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def run_time_nodes(node):
    """``node`` and all nodes below it but those under ``if TYPE_CHECKING``."""
    yield node
    children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        children = node.orelse
    for child in children:
        yield from run_time_nodes(child)


def imported_modules(tree, package):
    """Dotted names of slimgrad's modules that a module of ``package`` imports at run time."""
    for node in run_time_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def wrong_imports(room, tree, package):
    """Rooms that ``room`` imports though it comes before them, or is not let in."""
    for name in imported_modules(tree, package):
        parts = name.split(".")
        if parts[0] != "slimgrad" or len(parts) < 2 or parts[1] not in RANK or parts[1] == room:
            continue
        if RANK[parts[1]] >= RANK[room] or room not in ONLY_FOR.get(parts[1], {room}):
            yield parts[1]


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_imports_run_one_way(path):
    if path.parent == PACKAGE and path.stem in DOORS:
        return
    room = room_of(path)
    assert room in RANK, f"{named(path)} lies in no known room: give {room!r} its place in ROOMS"
    package = ["slimgrad", *path.relative_to(PACKAGE).parts[:-1]]
    tree = ast.parse(path.read_text("utf-8"))
    assert list(wrong_imports(room, tree, package)) == []


@pytest.mark.parametrize(
    ("room", "source", "wrong"),
    [
        ("measuring", "from slimgrad.methods.loss import chunked", ["methods"]),
        ("measuring", "import slimgrad.catalogue", ["catalogue"]),
        ("measuring", "def f():\n    from slimgrad.planning import plan", ["planning"]),
        ("measuring", "from ..planning import plan", ["planning"]),
        ("measuring", "from slimgrad import catalogue", ["catalogue"]),
        ("methods", "from slimgrad.measuring.ledger import Ledger", []),
        ("method", "from slimgrad.measuring.ledger import Ledger", ["measuring"]),
        ("planning", "from slimgrad.kernels import chunk", ["kernels"]),
        ("types", "from slimgrad.errors import SlimgradError", []),
        ("planning", "from slimgrad.measuring import ledger\nimport torch.optim", []),
        ("measuring", "if TYPE_CHECKING:\n    from slimgrad.planning import Plan", []),
        ("measuring", "if TYPE_CHECKING:\n    pass\nelse:\n    import slimgrad.cli", ["cli"]),
    ],
)
def test_the_direction_is_really_looked_at(room, source, wrong):
    assert list(wrong_imports(room, ast.parse(source), ["slimgrad", room])) == wrong


@pytest.mark.parametrize("path", PYTHON, ids=named)
def test_files_and_functions_are_short(path):
    text = path.read_text("utf-8")
    tests = (ROOT / "tests") in path.parents
    assert len(text.splitlines()) <= (MOST_TEST_LINES if tests else MOST_LINES)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MOST_FUNCTION_LINES, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", PYTHON, ids=named)
def test_every_function_has_a_room(path):
    names = {*path.relative_to(ROOT).parts[:-1], path.stem}
    assert not names & NO_ROOMS


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text("utf-8")))


def test_no_large_file_is_kept():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert len(paths) > 10
    assert [named(p) for p in paths if p.is_file() and p.stat().st_size > MOST_BYTES] == []
