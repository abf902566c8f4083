"""doctor shows the machine; its facts are read from where the system keeps them."""

import dataclasses
import json

import psutil
import pytest
import torch
from click.testing import CliRunner

from slimgrad.cli.main import main
from slimgrad.measuring.machine import cgroup_memory, this_machine
from slimgrad.types import format_bytes


def test_doctor_names_versions_memory_and_extras(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    result = CliRunner().invoke(main, ["doctor"], env={"COLUMNS": "160"})
    assert result.exit_code == 0
    for text in (
        torch.__version__,
        format_bytes(psutil.virtual_memory().total),
        "NO_COLOR",
        "triton",
    ):
        assert text in result.stdout


def test_doctor_as_json_agrees_with_the_machine():
    told = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    assert told["memory_bytes"] == psutil.virtual_memory().total
    assert told["versions"]["torch"] == torch.__version__
    assert told["num_threads"] == torch.get_num_threads()
    assert {extra["name"] for extra in told["extras"]} >= {"transformers", "gguf"}
    assert 0 < told["usable_bytes"] <= told["memory_bytes"]


def test_a_compiler_is_looked_for_in_the_path(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert this_machine().compiler is None
    (tmp_path / "cc").write_text("#!/bin/sh\n")
    (tmp_path / "cc").chmod(0o755)
    assert this_machine().compiler == str(tmp_path / "cc")


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/a/b\n", {"a/memory.max": "500\n", "a/b/memory.max": "max\n"}, (500, None)),
        (
            "0::/a/b\n",
            {"a/memory.max": "500", "a/b/memory.max": "300", "a/b/memory.current": "20"},
            (300, 20),
        ),
        ("0::/\n", {"memory.max": "max"}, (None, None)),
        (
            "5:cpu,memory:/x\n1:pids:/y\n",
            {"memory/x/memory.limit_in_bytes": "700", "memory/x/memory.usage_in_bytes": "1"},
            (700, 1),
        ),
        (
            "5:memory:/x\n",
            {"memory/x/memory.limit_in_bytes": "700", "memory/x/memory.usage_in_bytes": "1"},
            (700, 1),
        ),
        ("5:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, (None, None)),
    ],
)
def test_cgroup_limits(tmp_path, own, files, expected):
    write(tmp_path, {**files, "own": own})
    assert cgroup_memory(tmp_path, tmp_path / "own") == expected


def test_without_cgroups_there_is_no_limit(tmp_path):
    assert cgroup_memory(tmp_path, tmp_path / "absent") == (None, None)


def test_usable_memory_is_the_smaller_of_the_two():
    machine = dataclasses.replace(this_machine(), available_bytes=1000, cgroup_limit_bytes=None)
    assert machine.usable_bytes == 1000
    limited = dataclasses.replace(machine, cgroup_limit_bytes=600, cgroup_used_bytes=200)
    assert limited.usable_bytes == 400
    assert dataclasses.replace(limited, cgroup_used_bytes=900).usable_bytes == 0
