"""Documents are true: their examples run, the generated ones are up to date, links lead somewhere."""

import doctest
import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

from slimgrad.comparing.rows import load_rows

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
WRITTEN = sorted({path for path in PAGES if path.parent.name != "methods"})
EXAMPLES = sorted(
    path for path in (ROOT / "src" / "slimgrad").rglob("*.py") if ">>> " in path.read_text("utf-8")
)
FENCE = re.compile(r"^```python[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def named(path):
    return str(path.relative_to(ROOT))


def generator(name="docs"):
    spec = importlib.util.spec_from_file_location(
        f"{name}_generator", ROOT / "tools" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")  # as where the tool is run as a script
        spec.loader.exec_module(module)
    return module


def run_examples(path, text):
    """Run the python blocks of a page in order, in one namespace; failures point into the page."""
    namespace = {"__name__": "__example__"}
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start(1))
        exec(compile("\n" * line + match[1], str(path), "exec"), namespace)


@pytest.mark.parametrize("path", WRITTEN, ids=named)
def test_examples_of_a_page_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_examples(path, path.read_text("utf-8"))


def test_a_wrong_example_is_noticed():
    text = "# A page\n\n```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 2\n```\n"
    with pytest.raises(AssertionError) as caught:
        run_examples("page.md", text)
    assert caught.traceback[-1].lineno + 1 == 10


@pytest.mark.parametrize("path", EXAMPLES, ids=named)
def test_examples_of_docstrings_run(path):
    parts = path.relative_to(ROOT / "src").with_suffix("").parts
    results = doctest.testmod(
        importlib.import_module(".".join(parts)), optionflags=doctest.ELLIPSIS
    )
    assert results.failed == 0
    assert results.attempted > 0


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_to_files_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{named(path)} links to {target}"


def test_generated_pages_are_up_to_date():
    assert generator().main(["--check"]) == 0


def test_the_check_notices_pages_that_are_changed_missing_or_left_over(tmp_path, capsys):
    docs = generator()
    options = ["--folder", str(tmp_path)]
    assert docs.main([*options, "--check"]) == 1
    assert docs.main(options) == 0
    assert docs.main([*options, "--check"]) == 0
    page = tmp_path / "index.md"
    page.write_text(page.read_text() + "by hand\n")
    (tmp_path / "gone.md").write_text("a method that is no more")
    capsys.readouterr()
    assert docs.main([*options, "--check"]) == 1
    told = capsys.readouterr().err
    assert "index.md" in told
    assert "gone.md" in told
    assert docs.main(options) == 0
    assert docs.main([*options, "--check"]) == 0
    assert not (tmp_path / "gone.md").exists()


def test_the_page_of_codes_says_what_its_rows_say():
    made = generator("codes")
    rows = [json.loads(line) for line in made.ROWS.read_text(encoding="utf-8").splitlines()]
    assert made.page(rows) == made.PAGE.read_text(encoding="utf-8")
    coded = [r for r in rows if r["store"] != "exact"]
    for row in (coded[0], next(r for r in coded if "losses" not in r)):
        plain, row["gradient_error"] = row["gradient_error"], 2 * row["gradient_error"]
        assert made.page(rows) != made.PAGE.read_text(encoding="utf-8")
        row["gradient_error"] = plain


def test_the_page_of_adapters_says_what_its_rows_say():
    made = generator("adapters")
    rows = [json.loads(line) for line in made.ROWS.read_text(encoding="utf-8").splitlines()]
    assert made.page(rows) == made.PAGE.read_text(encoding="utf-8")
    row = next(r for r in rows if r["way"] == "meft")
    row["activation_bytes"] *= 2
    assert made.page(rows) != made.PAGE.read_text(encoding="utf-8")


def test_the_page_of_the_frontier_says_what_its_rows_say():
    made = generator("frontier")
    rows = load_rows(made.ROWS)
    assert made.page(rows) == made.PAGE.read_text(encoding="utf-8")
    plan = next(r for r in rows if r.contender.startswith("slimgrad@") and r.error is None)
    plan.time_s *= 2
    assert made.page(rows) != made.PAGE.read_text(encoding="utf-8")


def test_the_page_of_methods_for_your_own_code_says_what_its_rows_say():
    made = generator("methods")
    rows, longest = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (made.ROWS, made.LONGEST)
    )
    assert made.page(rows, longest) == made.PAGE.read_text(encoding="utf-8")
    rows[-1]["peak_bytes"] *= 2
    assert made.page(rows, longest) != made.PAGE.read_text(encoding="utf-8")
