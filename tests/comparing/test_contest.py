"""A whole comparison on small models: its rows, its files, its errors as rows, the command."""

import json
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from click.testing import CliRunner

from slimgrad.cli.main import main
from slimgrad.comparing import contenders, contest, zoo
from slimgrad.comparing.contest import Contest, run
from slimgrad.comparing.drawing import approximate_points, frontier_svg
from slimgrad.comparing.meter import limited, seconds_of
from slimgrad.comparing.peers import PEERS, Peer, chosen_peers
from slimgrad.comparing.plot import save_png
from slimgrad.comparing.report import save_html
from slimgrad.comparing.rows import Row, load_rows, save_rows
from slimgrad.comparing.verdict import duels, prediction
from slimgrad.errors import BudgetFormatError, LoadError, StorageError, UnsupportedError
from slimgrad.planning import offers


@pytest.fixture(scope="module")
def rows():
    """One small model against two peers, under three budgets, one of which nothing fits."""
    asked = Contest(
        models=["vit"],
        peers=chosen_peers(["checkpoint", "offload"]),
        budgets=["100%", "1KiB", "min"],
        rounds=2,
        steps=2,
        size="small",
    )
    said = []
    (found,) = run(asked, said.append)
    assert any("round 2 of 2" in line for line in said)
    return found


def named(rows):
    return {row.contender: row for row in rows}


def test_there_is_a_row_for_every_contender(rows):
    assert [row.contender for row in rows] == [
        "plain",
        "checkpoint",
        "offload",
        "slimgrad 100%",
        "slimgrad 1KiB",
        "slimgrad min",
        "slimgrad@checkpoint",
        "slimgrad@offload",
    ]
    assert all(row.model == "vit" and row.date and row.machine["torch"] for row in rows)


def test_rows_hold_what_was_measured(rows):
    plain = rows[0]
    assert plain.peak_ratio == plain.time_ratio == 1.0
    for row in rows:
        if row.error is not None:
            continue
        assert len(row.times_s) == 4
        assert row.gradient_error is not None
        assert row.gradient_error < 1e-5
        assert row.buffers_equal
        assert row.peak_from == "ledger"
        assert row.allocator_bytes == pytest.approx(row.peak_bytes, rel=0.1)
        assert 0 < row.activations_bytes <= row.peak_bytes
        assert row.peak_ratio == row.peak_bytes / plain.peak_bytes
    assert named(rows)["checkpoint"].peak_ratio < 1
    assert named(rows)["slimgrad min"].peak_ratio < named(rows)["slimgrad 100%"].peak_ratio


def test_plans_have_predictions_beside_measurements(rows):
    for row in rows:
        if row.kind == "slimgrad" and row.error is None:
            assert row.predicted_peak_bytes > 0
            assert row.predicted_s > 0
            assert row.predicted_time_ratio > 0
            assert row.planning_s > 0
    assert rows[0].predicted_peak_bytes == pytest.approx(rows[0].peak_bytes, rel=0.1)
    found = prediction(rows)
    assert found.num_plans == 4 - sum(row.error is not None for row in rows if "@" in row.contender)


def test_slimgrad_is_planned_for_what_each_peer_was_measured_to_need(rows):
    fought = {duel.peer: duel for duel in duels(rows)}
    assert set(fought) == {"checkpoint", "offload"}
    for name, duel in fought.items():
        assert duel.peer_bytes == named(rows)[name].peak_bytes
        slim = named(rows)[f"slimgrad@{name}"]
        if slim.error is None:
            assert duel.slim_bytes <= 1.001 * duel.peer_bytes
            assert duel.time_ratio == slim.time_s / named(rows)[name].time_s
        else:
            assert duel.reason == slim.error
    assert fought["checkpoint"].time_ratio is not None


def test_a_budget_that_nothing_fits_is_a_row_with_the_smallest_one(rows):
    row = named(rows)["slimgrad 1KiB"]
    assert "does not fit" in row.error
    assert row.smallest_bytes > 1024
    assert row.times_s == []


def test_rows_come_back_from_their_file(rows, tmp_path):
    path = tmp_path / "a" / "rows.jsonl"
    save_rows(rows, path)
    assert load_rows(path) == rows
    path.write_text('{"model": 1}\n')
    with pytest.raises(StorageError):
        load_rows(path)


def test_the_page_is_one_file_with_every_row_and_point(rows, tmp_path):
    text = save_html([replace(rows[1], contender="<b>"), *rows], tmp_path / "x.html").read_text()
    HTMLParser().feed(text)
    assert "<b>" not in text
    assert "&lt;b&gt;" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    for row in rows:
        assert f"<td>{row.contender}</td>" in text
    measured = [row for row in rows if row.kind == "slimgrad" and row.is_measured]
    assert text.count('class="slim"') == len(measured)


def test_the_plot_is_a_png_or_says_what_to_install(rows, tmp_path, monkeypatch):
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match="plots"):
        save_png(rows, tmp_path / "x.png")
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert save_png(rows, tmp_path / "y.png").read_bytes().startswith(b"\x89PNG")


class _Broken(Peer):
    def attach(self, model, subject):
        raise RuntimeError("no such\nluck")


def test_a_peer_that_fails_is_a_row_with_its_error():
    asked = Contest(["lstm"], [_Broken("broken", "b"), PEERS["offload"]], ["100%"], 1, 1, "small")
    (found,) = run(asked)
    assert named(found)["broken"].error == "RuntimeError: no such luck"
    assert named(found)["offload"].time_ratio is not None
    assert "slimgrad@broken" not in named(found)


class _Slow(Peer):
    """Compiles for ever."""

    def loss_fn(self, subject):
        def compile_first(model, batch):
            for _ in range(50):
                time.sleep(0.1)
            return subject.loss_fn(model, batch)

        return compile_first


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_compiling_that_takes_too_long_is_given_up_once_for_all_peers():
    slow = [_Slow("compile", "", compile_budget=1.0), _Slow("compile-0.5", "", compile_budget=0.5)]
    asked = Contest(["unet"], slow, [], 1, 1, "small", compile_limit_s=0.1)
    (found,) = run(asked)
    assert named(found)["compile"].error.startswith("TimeoutError")
    assert "not tried" in named(found)["compile-0.5"].error
    assert named(found)["plain"].time_ratio == 1.0


def test_what_pytorch_does_not_compile_is_not_called_compiled():
    (found,) = run(
        Contest(["unet"], [_Uncompiled("compile", "", compile_budget=1.0)], [], 1, 1, "small")
    )
    assert "nothing was compiled" in named(found)["compile"].error


class _Uncompiled(Peer):
    """What PyTorch falls back to, silently."""

    def loss_fn(self, subject):
        return subject.loss_fn


def test_a_contender_that_fails_in_its_turn_leaves_the_others_going(monkeypatch):
    def fail_in_turn(self, num_steps):
        if self.row.contender == "offload":
            raise RuntimeError("worn out")
        self.row.times_s.append(1.0)

    monkeypatch.setattr(contenders.Contender, "turn", fail_in_turn)
    (found,) = run(Contest(["lstm"], [PEERS["offload"]], ["100%"], 2, 1, "small"))
    assert named(found)["offload"].error == "RuntimeError: worn out"
    assert named(found)["plain"].times_s == [1.0, 1.0]
    assert named(found)["slimgrad@offload"].times_s == [1.0, 1.0] or (
        named(found)["slimgrad@offload"].error
    )


def test_a_model_that_cannot_be_made_is_a_row(monkeypatch):
    def missing(small):
        raise LoadError("its package is not installed")

    monkeypatch.setitem(zoo.ZOO, "smollm2", missing)
    (found,) = run(Contest(["smollm2"], [], ["100%"], 1, 1, "small"))
    assert [row.error for row in found] == ["LoadError: its package is not installed"]


def test_a_model_that_slimgrad_cannot_measure_still_compares_the_peers(monkeypatch):
    def refuse(*_, **__):
        raise UnsupportedError("not this one")

    monkeypatch.setattr(contest, "measure", refuse)
    (found,) = run(Contest(["lstm"], [PEERS["checkpoint"]], ["100%"], 1, 1, "small"))
    assert [row.contender for row in found] == ["plain", "checkpoint"]
    assert all(row.time_ratio is not None for row in found)
    assert "not this one" in found[0].note


@pytest.mark.parametrize("allowed", [True, False])
def test_slimgrad_compiles_blocks_only_where_its_rival_compiles(monkeypatch, allowed):
    asked = {}
    real_measure, real_plan = contest.measure, contenders.plan

    def measure(*given, allow_compile, **others):
        asked["measure"] = allow_compile
        return real_measure(*given, allow_compile=False, **others)

    def plan(profile, budget, *, allow_compile, **others):
        asked[str(budget)] = allow_compile
        return real_plan(profile, budget, allow_compile=allow_compile, **others)

    monkeypatch.setattr(contest, "measure", measure)
    monkeypatch.setattr(contenders, "plan", plan)
    race = Contest(["lstm"], [PEERS["checkpoint"]], ["100%"], 1, 1, "small", allow_compile=allowed)
    (found,) = run(race)
    peak = found[1].peak_bytes
    compiles = None if allowed else False
    assert asked == {"measure": compiles, "100%": allowed, str(peak + peak // 1000): False}


def test_a_contest_asked_for_wrongly_is_refused_at_once():
    with pytest.raises(BudgetFormatError):
        Contest(budgets=["lots"])
    with pytest.raises(LoadError, match="did you mean 'resnet50'"):
        Contest(models=["resnet5"])
    with pytest.raises(ValueError, match="at least 1"):
        Contest(rounds=0)
    with pytest.raises(ValueError, match="an error of a gradient"):
        Contest(error=1.0)


def test_approximate_plans_stay_within_budget_and_error(tmp_path, monkeypatch):
    monkeypatch.setattr(offers, "_CODING_SHARE", 10.0)  # on a model of toy size codes do not pay
    asked = Contest(["vit"], [], ["min", "70%"], 1, 1, "small", allow_compile=False, error=0.2)
    (found,) = run(asked)
    rows = named(found)
    exact, approximate = rows["slimgrad min"], rows["approximate min"]
    assert approximate.kind == "approximate"
    assert approximate.peak_bytes <= exact.peak_bytes
    for name in ("approximate min", "approximate 70%"):
        assert rows[name].error is None
        assert 0 <= rows[name].gradient_error <= 0.2
        assert rows[name].predicted_error <= 0.2
    assert approximate.gradient_error > 1e-5 > exact.gradient_error
    assert approximate_points(found) == [approximate, rows["approximate 70%"]]
    assert "slimgrad, approximate" in frontier_svg("vit", found)
    save_rows(found, tmp_path / "rows.jsonl")
    assert load_rows(tmp_path / "rows.jsonl") == found


def test_the_limit_stops_what_takes_too_long():
    with pytest.raises(TimeoutError), limited(0.02):
        time.sleep(5)
    with limited(60.0), limited(None):
        assert seconds_of(lambda: torch.zeros(1), torch.device("cpu")) > 0


def test_ratios_of_compiled_rows_are_of_the_profilers_peaks():
    plain = Row("m", "plain", "plain", peak_from="ledger", peak_bytes=100, allocator_bytes=200)
    ours = Row("m", "x", "peer", True, peak_from="allocator", peak_bytes=50, allocator_bytes=50)
    ours.compare(plain)
    assert ours.peak_ratio == 0.25
    assert ours.time_ratio is None
    slim = Row("m", "slimgrad@x", "slimgrad", peak_from="ledger", peak_bytes=24)
    (duel,) = duels([plain, ours, slim])
    assert (duel.peer_bytes, duel.slim_bytes) == (25, 24)


def test_the_command_writes_rows_tables_page_and_plot(tmp_path):
    options = ["--models", "lstm", "--size", "small", "--no-compile", "--rounds", "1"]
    options += ["--budgets", "80%,min", "--peers", "checkpoint,compile", "--device", "cpu"]
    result = CliRunner().invoke(main, ["bench", "frontier", *options, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "at each peer's peak" in result.stdout
    assert "slimgrad@checkpoint" in result.stdout
    assert "compile" not in result.stdout
    assert "round 1 of 1" in result.stderr
    rows = load_rows(tmp_path / "frontier.jsonl")
    assert [row.contender for row in rows][:2] == ["plain", "checkpoint"]
    assert (tmp_path / "frontier.html").exists()
    assert (tmp_path / "frontier.png").exists() or "matplotlib" in result.stderr


def test_the_command_prints_rows_as_json(tmp_path):
    options = ["--models", "unet", "--size", "small", "--peers", "none", "--budgets", "100%"]
    options += ["--rounds", "1", "--device", "cpu", "--json", "--out", str(tmp_path)]
    result = CliRunner().invoke(main, ["bench", "frontier", *options])
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["contender"] for row in found] == ["plain", "slimgrad 100%"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_compiled_peers_are_compiled_and_give_plains_gradients():
    wanted = chosen_peers(["compile", "compile-checkpoint", "compile-0.5"])
    (found,) = run(Contest(["deep"], wanted, ["100%"], 1, 1, "small"))
    for name in ("compile", "compile-checkpoint", "compile-0.5"):
        row = named(found)[name]
        assert row.error is None
        assert row.compile_s > 0
        assert 0 < row.gradient_error < 1e-5  # other bits: it did not run as it is
        assert row.peak_from == "allocator"
        assert row.time_ratio is not None


@pytest.mark.gpu
def test_a_contest_on_cuda_measures_with_the_allocator():
    asked = Contest(
        ["vit"], [PEERS["checkpoint"], PEERS["offload"]], ["100%", "min"], 1, 1, "small",
        device=torch.device("cuda"),
    )  # fmt: skip
    (found,) = run(asked)
    for name in ("plain", "checkpoint", "offload", "slimgrad 100%", "slimgrad min"):
        row = named(found)[name]
        assert row.error is None, row.error
        assert row.peak_from == "cuda"
        assert row.gradient_error < 1e-3
    assert named(found)["offload"].peak_ratio < 1
