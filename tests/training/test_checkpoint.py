"""A checkpoint is whole or it is none: damage, kills at any moment, and every failing write."""

import hashlib
import os
import pathlib
import select
import shutil
import signal
import subprocess
import sys
import time
import warnings

import pytest
import safetensors.torch
import torch

from slimgrad.errors import CheckpointError, UnsupportedError
from slimgrad.training import checkpoint as checkpoint_module
from slimgrad.training import durable
from slimgrad.training.checkpoint import CheckpointState, latest, load_checkpoint, save_checkpoint
from slimgrad.training.tensor_files import Chunked

EFFECTS = ("write", "sync", "sync_folder", "rename")


def state_of(step: int) -> CheckpointState:
    """Every number in it is the step, so that a mixture of two generations shows."""
    tensors = {f"layer{i}": torch.full((5, i + 1), float(step)) for i in range(3)}
    moments = {f"{name}/exp_avg": tensor * 1 for name, tensor in tensors.items()}
    return CheckpointState(step, tensors, moments, {"data": {"batch": step}}, "model-a")


def assert_consistent(path: pathlib.Path) -> int:
    """The step of the whole generation at ``path``, which every value in it must equal."""
    found = load_checkpoint(path)
    assert len(found.model) == len(found.optimizer) == 3
    for stored in (*found.model.values(), *found.optimizer.values()):
        assert (stored.read() == found.step).all()
    assert found.values == {"data": {"batch": found.step}}
    return found.step


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_generation_on_disk(tmp_path):
    path = save_checkpoint(tmp_path / "deep" / "folder", state_of(7))
    assert path == tmp_path / "deep" / "folder" / "gen-00000001"
    assert names(path) == [
        "COMMITTED",
        "model-00001.safetensors",
        "optimizer-00001.safetensors",
        "state.json",
    ]
    digest = hashlib.sha256((path / "state.json").read_bytes()).hexdigest()
    assert (path / "COMMITTED").read_text() == digest
    assert torch.equal(
        safetensors.torch.load_file(path / "model-00001.safetensors")["layer2"],
        torch.full((5, 3), 7.0),
    )
    found = load_checkpoint(path)
    assert (found.step, found.fingerprint) == (7, "model-a")
    assert found.versions["torch"] == torch.__version__


def test_the_last_two_generations_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, state_of(step))
    assert names(tmp_path) == ["gen-00000003", "gen-00000004"]
    assert [assert_consistent(tmp_path / name) for name in names(tmp_path)] == [3, 4]
    save_checkpoint(tmp_path, state_of(5), keep=1)
    assert names(tmp_path) == ["gen-00000005"]
    with pytest.raises(CheckpointError, match="keep=0"):
        save_checkpoint(tmp_path, state_of(6), keep=0)


def test_a_damaged_generation_is_not_one_of_the_two_kept(tmp_path):
    for step in (1, 2):
        path = save_checkpoint(tmp_path, state_of(step))
    (path / "model-00001.safetensors").write_bytes(b"")
    save_checkpoint(tmp_path, state_of(3))
    assert names(tmp_path) == ["gen-00000001", "gen-00000003"]


def test_what_killed_runs_left_is_cleared_after_the_commit(tmp_path):
    save_checkpoint(tmp_path, state_of(1))
    for name in (".tmp-gen-00000002-77", ".old-gen-00000001-77", "gen-00000002"):
        shutil.copytree(tmp_path / "gen-00000001", tmp_path / name)
    (tmp_path / "gen-00000002" / "COMMITTED").unlink()
    (tmp_path / "notes.txt").write_text("mine")
    assert load_checkpoint(tmp_path).path.name == "gen-00000001"  # the second was never committed
    assert save_checkpoint(tmp_path, state_of(3)).name == "gen-00000003"
    assert names(tmp_path) == ["gen-00000001", "gen-00000003", "notes.txt"]


def test_tensors_are_spread_over_files_of_limited_size(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "SHARD_BYTES", 100)
    path = save_checkpoint(tmp_path, state_of(4))
    assert len(list(path.glob("model-*.safetensors"))) == 2
    assert assert_consistent(path) == 4


def test_no_checkpoint(tmp_path):
    (tmp_path / "gen-00000001").mkdir()
    for folder in (tmp_path, tmp_path / "absent"):
        assert latest(folder) is None
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            load_checkpoint(folder)


def damages(path: pathlib.Path):
    """Each file of a generation: cut at several lengths, a bit flipped in several places, absent."""
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        for length in sorted({0, 1, 7, 8, 9, len(data) // 2, len(data) - 1}):
            yield file, data[:length]
        for place in sorted({0, 7, 8, len(data) // 3, len(data) - 1}):
            flipped = bytearray(data)
            flipped[place] ^= 1
            yield file, bytes(flipped)
        yield file, data + b"\0"
        if file.name != "COMMITTED":
            yield file, None


def test_every_cut_and_every_flip_is_noticed_and_named(tmp_path):
    save_checkpoint(tmp_path, state_of(1))
    newest = save_checkpoint(tmp_path, state_of(2))
    count = 0
    for file, content in damages(newest):
        before = file.read_bytes()
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(CheckpointError, match=file.name) as error:
            load_checkpoint(tmp_path)
        assert "gen-00000001 is whole" in str(error.value)
        assert "expected" in str(error.value) or "cannot be read" in str(error.value)
        with pytest.raises(CheckpointError, match=file.name):
            load_checkpoint(newest)
        with pytest.warns(RuntimeWarning, match=f"damaged checkpoint.*{file.name}"):
            assert latest(tmp_path) == tmp_path / "gen-00000001"
        file.write_bytes(before)
        count += 1
    assert count > 40
    assert latest(tmp_path) == newest
    assert assert_consistent(tmp_path) == 2


def test_the_error_says_when_no_older_one_is_whole(tmp_path):
    for step in (1, 2):
        path = save_checkpoint(tmp_path, state_of(step))
        (path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no older generation is whole"):
        load_checkpoint(tmp_path)
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert latest(tmp_path) is None


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "FORMAT", 2)
    save_checkpoint(tmp_path, state_of(1))
    with pytest.raises(CheckpointError, match="of format 2, expected 1"):
        load_checkpoint(tmp_path)


class Crash(BaseException):
    """The process ends here: nothing that follows in it runs."""


def interrupted(monkeypatch, error: BaseException, at: int, action) -> bool:
    """Run ``action`` with the effect number ``at`` on the disk failing; whether it was reached."""
    count = 0
    # deleting a folder never raises, but a process may die before it
    effects = (*EFFECTS, "remove_tree") if isinstance(error, Crash) else EFFECTS

    def failing(effect):
        original = getattr(durable, effect)

        def call(*args):
            nonlocal count
            count += 1
            if count == at:
                raise error
            return original(*args)

        return call

    with monkeypatch.context() as patch:
        for effect in effects:
            patch.setattr(durable, effect, failing(effect))
        try:
            action()
        except (Crash, CheckpointError):
            assert count >= at
    return count >= at


@pytest.mark.parametrize("error", [Crash(), OSError(28, "No space left on device")], ids=repr)
def test_any_failing_effect_leaves_the_last_commit_whole(tmp_path, monkeypatch, error):
    steps: list[int] = []
    for at in range(1, 200):
        folder = tmp_path / str(at)
        for step in (1, 2):
            save_checkpoint(folder, state_of(step))
        reached = interrupted(
            monkeypatch, error, at, lambda to=folder: save_checkpoint(to, state_of(3))
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an interrupted save leaves no damaged generation
            path = latest(folder)
        assert path is not None
        steps.append(assert_consistent(path))
        assert assert_consistent(save_checkpoint(folder, state_of(9))) == 9
        kept = names(folder)
        assert len(kept) == 2
        assert all(name.startswith("gen-") for name in kept)
        if not reached:
            break
    assert steps[-1] == 3
    assert steps == sorted(steps)  # before the marker's rename the old one, after it the new one
    assert steps.count(2) > 10
    assert steps.count(3) > 1


def test_a_failed_save_says_so_and_clears_its_remains(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, state_of(1))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "write", full)
    with pytest.raises(CheckpointError, match=r"No space left.*untouched: free space"):
        save_checkpoint(tmp_path, state_of(2))
    assert names(tmp_path) == ["gen-00000001"]


def test_a_value_without_plain_form_leaves_nothing_behind(tmp_path):
    state = CheckpointState(1, {"x": torch.ones(2)}, {}, {"extra": object()})
    with pytest.raises(UnsupportedError, match=r"values\.extra"):
        save_checkpoint(tmp_path, state)
    assert names(tmp_path) == []


def test_bytes_are_on_disk_before_the_name_that_makes_them_count(tmp_path, monkeypatch):
    events: list[tuple[str, str]] = []

    def recording(effect, original):
        def call(first, *rest):
            target = rest[-1] if effect == "rename" else first
            name = getattr(target, "name", target)
            events.append((effect, pathlib.Path(str(name)).name))
            return original(first, *rest)

        return call

    for effect in EFFECTS:
        monkeypatch.setattr(durable, effect, recording(effect, getattr(durable, effect)))
    save_checkpoint(tmp_path, state_of(1))
    order = [event for event in events if event[0] in ("sync", "sync_folder", "rename")]
    temporary = next(name for effect, name in order if name.startswith(".tmp"))
    assert order == [
        ("sync", "model-00001.safetensors"),
        ("sync", "optimizer-00001.safetensors"),
        ("sync", "state.json"),
        ("sync_folder", temporary),
        ("rename", "gen-00000001"),
        ("sync_folder", tmp_path.name),
        ("sync", "COMMITTED.tmp"),
        ("rename", "COMMITTED"),
        ("sync_folder", "gen-00000001"),
    ]
    last_write = max(i for i, event in enumerate(events) if event == ("write", "state.json"))
    assert last_write < events.index(("sync", "state.json"))


def test_an_old_generation_loses_its_name_before_its_files(tmp_path, monkeypatch):
    """Killed while it deletes, a run must not leave what looks like a damaged checkpoint."""
    for step in (1, 2):
        save_checkpoint(tmp_path, state_of(step))
    monkeypatch.setattr(durable, "remove_tree", lambda folder: None)
    save_checkpoint(tmp_path, state_of(3))
    old = tmp_path / f".old-gen-00000001-{os.getpid()}"
    assert names(tmp_path) == [old.name, "gen-00000002", "gen-00000003"]
    assert (old / "COMMITTED").exists()  # renamed whole: nothing was deleted under its own name


def test_sync_reaches_the_disk(tmp_path, monkeypatch):
    synced: list[int] = []
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), original(fd))[1])
    durable.write_file(tmp_path / "a", b"abc")
    durable.sync_folder(tmp_path)
    assert len(synced) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_at_any_moment_leaves_a_whole_generation(tmp_path):
    """One process imports torch; each kill hits a fork of it that saves in a loop."""
    generator = torch.Generator().manual_seed(1)
    delays = (torch.rand(20, generator=generator) * 0.03).tolist()
    seen: list[int] = []
    for delay in delays:
        read_end, write_end = os.pipe()
        last = seen[-1] if seen else 0
        child = os.fork()
        if child == 0:
            save_until_killed(tmp_path, last, write_end)
        os.close(write_end)
        with os.fdopen(read_end, "rb", buffering=0) as committed:
            assert select.select([committed], [], [], 60)[0], "the child never saved"
            committed.read(1)  # the first generation of this child is committed
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            reported = last + 1 + len(committed.readall())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            path = latest(tmp_path)
        assert path is not None
        seen.append(assert_consistent(path))
        assert seen[-1] in (reported, reported + 1)  # never less than what save had returned
    assert seen == sorted(set(seen))


def save_until_killed(folder: pathlib.Path, step: int, pipe: int) -> None:
    """The child's whole life: it must not return into the test runner."""
    try:
        while True:
            step += 1
            save_checkpoint(folder, state_of(step))
            os.write(pipe, b".")
    finally:
        os._exit(1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_large_state_is_streamed(tmp_path):
    """64 MiB of optimizer state pass through a process that may hold far less at a time."""
    script = """
import sys, torch
from slimgrad.training.checkpoint import CheckpointState, load_checkpoint, save_checkpoint
from slimgrad.training.tensor_files import Chunked
torch.set_num_threads(1)
rows, width = 256, 65536
def chunks():
    for row in range(rows):
        yield torch.full((width,), float(row))
state = CheckpointState(1, {"x": torch.ones(3)}, {"x/exp_avg": Chunked(torch.float32, (rows, width), chunks)})
def peak_kib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
save_checkpoint(sys.argv[1] + "/small", CheckpointState(1, {"x": torch.ones(3)}))
load_checkpoint(sys.argv[1] + "/small")
before = peak_kib()
save_checkpoint(sys.argv[1], state)
stored = load_checkpoint(sys.argv[1]).optimizer["x/exp_avg"]
row = torch.empty(1, width)
for index in range(rows):
    stored.read_into(row, index * width)
    assert (row == index).all()
print(peak_kib() - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 16 * 1024, "64 MiB were held at once"


def test_a_chunked_source_may_be_what_is_stored(tmp_path):
    state = state_of(6)
    chunked = {
        name: Chunked(t.dtype, tuple(t.shape), lambda t=t: t.split(2))
        for name, t in state.model.items()
    }
    first = load_checkpoint(
        save_checkpoint(tmp_path / "a", CheckpointState(6, chunked, state.optimizer, state.values))
    )
    again = CheckpointState(6, first.model, first.optimizer, first.values)
    assert assert_consistent(save_checkpoint(tmp_path / "b", again)) == 6
