"""Which nodes are fit: what each finds out about itself, and who is to blame for what goes wrong between them."""

import argparse
import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm import preflight
from slurm.attempt_files import preflight_rows, run
from slurm.attempts import begin, end
from slurm.preflight import nodes_to_exclude, partner, unfit_nodes

GOOD, TOO_LITTLE = {}, {"memory": "has 1.0 GB of memory available, less than 64"}
SUM_FAILED = {"all_reduce": "the all-reduce (gloo) failed: it takes too long"}


@pytest.fixture(autouse=True)
def _outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["preflight", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            run(preflight.main)
        assert isinstance(leaving.value.code, int)
        return leaving.value.code, *capsys.readouterr()

    return call


def check(command: Callable[..., Any], folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Of a node on its own: exit code and row."""
    code, _, error = command("check", folder, "--rendezvous", "n1:29500", *arguments)
    row = preflight_rows(folder)["n1"]
    assert error == "".join(f"n1: {problem}\n" for problem in row["problems"].values())
    return code, row


# --- one node -----------------------------------------------------------------------------------------------------


def test_a_sound_node_leaves_a_row_and_nothing_else(tmp_path: Path, command: Callable[..., Any]) -> None:
    scratch = tmp_path / "scratch" / "of_this_node"  # which the node that the batch script runs on alone has so far
    code, row = check(command, tmp_path / "rows", "--disk", str(scratch), "--min-free-gb", "0.01")
    assert code == 0 and row["problems"] == {} and row["node"] == "n1" and row["memory_gb"] > 0
    assert set(row["free_gb"]) == {str(tmp_path / "rows"), str(scratch)}
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["n1.json"] and not list(scratch.iterdir())


def test_too_little_of_anything_is_told(
    tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")  # as shutil's own
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(3e9))
    code, row = check(command, tmp_path, "--min-free-gb", "5", "--min-memory-gb", "1e6", "--gpus", "0")
    assert code == 1 and set(row["problems"]) == {f"disk {tmp_path}", "memory"}
    assert row["problems"][f"disk {tmp_path}"] == f"{tmp_path}: has 3.0 GB free, less than 5"


def test_a_disk_that_refuses_or_forgets_is_told(
    tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = check(command, tmp_path, "--disk", "/proc", "--min-free-gb", "0")[1]["problems"]
    assert refused["disk /proc"].startswith("/proc: cannot be written (")
    assert check(command, tmp_path, "--disk", "/proc/not/there")[1]["problems"] == {
        "disk /proc/not/there": "/proc/not/there: cannot be written (No such file or directory)"
    }
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"something else")
    assert "gives back other bytes than were written" in check(command, tmp_path)[1]["problems"][f"disk {tmp_path}"]


def test_a_disk_that_hangs_is_not_waited_for(
    tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "DISK_LIMIT_S", 0.05)
    answer = threading.Event()
    monkeypatch.setattr(preflight, "_probe_disk", lambda disk, min_free_gb: (answer.wait(60), None))
    assert check(command, tmp_path)[1]["problems"] == {f"disk {tmp_path}": f"{tmp_path}: does not answer within 0.05 s"}
    answer.set()


@pytest.mark.parametrize(
    ("script", "num_gpus", "problem"),
    [
        ("echo 'GPU 0: H100 (UUID: a)'; echo 'GPU 1: H100 (UUID: b)'", 2, None),
        ("echo 'GPU 0: H100 (UUID: a)'", 1, "shows 1 GPUs of the 2 that are needed"),
        (
            "echo 'No devices were found'; exit 6",
            0,
            "shows 0 GPUs of the 2 that are needed (nvidia-smi fails: No devices were found)",
        ),
        ("exec sleep 60", 0, "shows 0 GPUs of the 2 that are needed (nvidia-smi does not answer within 0.5 s)"),
        (None, 0, "shows 0 GPUs of the 2 that are needed (there is no nvidia-smi)"),
    ],
)
def test_gpus_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, num_gpus: int, problem: str | None
) -> None:
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/nothing" if script is None else f"{tmp_path}:/usr/bin:/bin")
    if script is not None and "sleep" in script:
        monkeypatch.setattr(preflight, "GPU_LIMIT_S", 0.5)
    found = preflight._gpus(tmp_path, argparse.Namespace(gpus=2))
    assert found == {"gpus": num_gpus, "problems": {"gpus": problem} if problem else {}}
    assert preflight._gpus(tmp_path, argparse.Namespace(gpus=0))["problems"] == {}


# --- between nodes ------------------------------------------------------------------------------------------------


@given(num_nodes=st.integers(2, 70))
def test_in_as_many_rounds_as_needed_everybody_meets_everybody_once(num_nodes: int) -> None:
    met: Counter[frozenset[int]] = Counter()
    for number in range(num_nodes - 1 + num_nodes % 2):
        for node in range(num_nodes):
            other = partner(node, num_nodes, number)
            assert other is None or (other != node and partner(other, num_nodes, number) == node)
            met[frozenset({node, node if other is None else other})] += 1
    pairs = {pair: number for pair, number in met.items() if len(pair) == 2}
    assert len(pairs) == num_nodes * (num_nodes - 1) // 2 and set(pairs.values()) == {2}


def simulate(folder: Path, num_nodes: int, broken: set[int]) -> list[str]:
    """Rows as nodes would leave them of which some reach nobody; their names."""

    def add(given: argparse.Namespace, name: str, place: int, num_places: int, limit_s: float) -> Any:
        group = set(range(num_nodes)) if name == "all" else {int(word) for word in name.split(", ")[1].split(" and ")}
        return (
            ({}, "it takes too long") if group & broken else ({"all_reduce_s": 0.1, "clocks": [0.0] * num_nodes}, None)
        )

    settings = argparse.Namespace(limit_s=0.0, gpus=0, max_clock_skew_s=2.0)
    names = [f"n{number}" for number in range(num_nodes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "_sum", add)
        for number, name in enumerate(names):
            found = preflight._network(settings, number, num_nodes)
            (folder / f"{name}.json").write_text(json.dumps({"node": name, "node_id": number, **found}))
    return names


@given(num_nodes=st.integers(3, 40), data=st.data())
def test_a_node_that_reaches_nobody_is_found_among_those_that_do(
    tmp_path_factory: pytest.TempPathFactory, num_nodes: int, data: st.DataObject
) -> None:
    broken = data.draw(st.integers(0, num_nodes - 1), label="broken")
    folder = tmp_path_factory.mktemp("rows")
    names = simulate(folder, num_nodes, {broken})
    assert nodes_to_exclude(folder, names) == [names[broken]]
    assert len(unfit_nodes(folder, names)) == num_nodes  # the sum came off nowhere


def test_several_are_found_too_and_nobody_where_it_cannot_be_told(tmp_path: Path) -> None:
    names = simulate(tmp_path, 16, {3, 9})
    assert nodes_to_exclude(tmp_path, names) == ["n3", "n9"]
    names = simulate(tmp_path, 16, set(range(16)))  # no node reaches another: it is the network, or its settings
    assert nodes_to_exclude(tmp_path, names) == [] and len(unfit_nodes(tmp_path, names)) == 16
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    names = simulate(tmp_path, 2, {1})
    assert nodes_to_exclude(tmp_path, names) == [] and len(unfit_nodes(tmp_path, names)) == 2


@pytest.mark.parametrize(
    ("clocks", "off"), [([5.0, 5.1, 9.0], {2}), ([1.0, 5.0, 5.0, 5.1], {0}), ([5.0, 8.0], {1}), ([5.0, 6.0], set())]
)
def test_a_clock_that_is_off_is_told(monkeypatch: pytest.MonkeyPatch, clocks: list[float], off: set[int]) -> None:
    monkeypatch.setattr(preflight, "_sum", lambda *_: ({"all_reduce_s": 0.1, "clocks": clocks}, None))
    settings = argparse.Namespace(limit_s=1.0, gpus=0, max_clock_skew_s=2.0)
    found = [preflight._network(settings, number, len(clocks)) for number in range(len(clocks))]
    assert {number for number, row in enumerate(found) if row["problems"]} == off


def start(folder: Path, node_id: int, port: int, *arguments: str, num_nodes: int = 2) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "slurm.preflight", "check", str(folder), f"--rendezvous=127.0.0.1:{port}", *arguments],
        env={
            **os.environ,
            "SLURMD_NODENAME": f"n{1 + node_id}",
            "SLURM_NODEID": str(node_id),
            "SLURM_NNODES": str(num_nodes),
        },
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    """Not one of those that the kernel gives to whoever asks for any: it might, before this one is used."""
    for port in random.sample(range(10_000, 18_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


@pytest.mark.slow
def test_nodes_that_reach_each_other_add_up(tmp_path: Path) -> None:
    port = free_port()
    nodes = [start(tmp_path, number, port) for number in range(2)]
    assert [node.communicate()[1] for node in nodes] == ["", ""]
    assert [node.returncode for node in nodes] == [0, 0]
    for row in preflight_rows(tmp_path).values():
        assert 0 < row["all_reduce_s"] < 60 and abs(row["clock_offset_s"]) < 2


def test_a_node_that_waits_in_vain_gives_up(tmp_path: Path) -> None:
    node = start(tmp_path, 0, free_port(), "--limit-s", "0.5")
    assert node.communicate()[1] == "n1: waited 0.5 s for nodes that have not come\n"
    assert node.returncode == 1 and nodes_to_exclude(tmp_path, ["n1", "n2"]) == ["n2"]  # which left no row
    row = {"node": "n2", "own_checks_s": 0.1, "problems": {"unfinished": "did not finish its checks"}}
    (tmp_path / "n2.json").write_text(json.dumps(row))
    node = start(tmp_path, 0, free_port(), "--limit-s", "1")
    assert node.communicate()[1] == "n1: the all-reduce (gloo) failed: it takes too long\n"
    assert node.returncode == 1 and nodes_to_exclude(tmp_path, ["n1", "n2"]) == ["n2"]


def test_where_a_node_is_unfit_nobody_adds_up(tmp_path: Path) -> None:
    (tmp_path / "n2.json").write_text(json.dumps({"node": "n2", "own_checks_s": 0.1, "problems": TOO_LITTLE}))
    node = start(tmp_path, 0, free_port(), "--limit-s", "60")
    assert node.communicate()[1] == "" and node.returncode == 0
    assert "all_reduce_s" not in preflight_rows(tmp_path)["n1"]
    assert nodes_to_exclude(tmp_path, ["n1", "n2"]) == ["n2"]


# --- the verdict --------------------------------------------------------------------------------------------------


def leave(job: Path, number: int, **rows: dict[str, str]) -> None:
    """Rows of an attempt by node; of a node that is not named, none."""
    for node, problems in rows.items():
        (job / "preflight" / f"attempt_{number:03d}" / f"{node}.json").write_text(
            json.dumps({"node": node, "problems": problems})
        )


@pytest.mark.parametrize(
    ("rows", "excluded", "code"),
    [
        ({"n1": GOOD, "n2": GOOD, "n3": GOOD}, "", 0),
        ({"n1": GOOD, "n2": TOO_LITTLE, "n3": GOOD}, "n2", 1),
        ({"n1": GOOD, "n2": TOO_LITTLE | SUM_FAILED, "n3": SUM_FAILED}, "n2", 1),  # n3's trouble is n2's
        ({"n1": SUM_FAILED, "n2": SUM_FAILED}, "n3", 1),  # which did not answer
        ({"n1": {"unfinished": "did not finish its checks"}, "n2": GOOD, "n3": GOOD}, "n1", 1),
        ({"n1": TOO_LITTLE, "n2": TOO_LITTLE, "n3": TOO_LITTLE}, "", 1),  # no fault of a node
        ({}, "", 1),  # nor is that
    ],
)
def test_the_batch_script_gets_a_list(
    tmp_path: Path, command: Callable[..., Any], rows: dict[str, Any], excluded: str, code: int
) -> None:
    begin(tmp_path, None, None, 3, ["n1", "n2", "n3"])
    leave(tmp_path, 1, **rows)
    assert command("exclude", tmp_path, "--nodes", "n1,n2 n3")[:2] == (code, f"{excluded}\n")
    out = command("exclude", tmp_path)  # the ledger knows the nodes
    assert out[:2] == (code, f"{excluded}\n")
    assert ("n2: has 1.0 GB" in out[2]) == ("memory" in rows.get("n2", {}))


def test_a_lone_node_that_is_unfit_is_excluded(tmp_path: Path, command: Callable[..., Any]) -> None:
    begin(tmp_path, None, None, 3, ["n1"])
    leave(tmp_path, 1, n1=TOO_LITTLE)
    assert command("exclude", tmp_path)[:2] == (1, "n1\n")


def test_who_was_excluded_stays_excluded_until_the_next_submission(
    tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for nodes, bad in ((["n1", "n2"], "n2"), (["n1", "n3"], "n3")):
        number = begin(tmp_path, None, None, 3, nodes)
        leave(tmp_path, number, **{"n1": GOOD, bad: TOO_LITTLE})
        end(tmp_path, 1)
    begin(tmp_path, None, None, 3, ["n1", "n4"])  # without checks
    end(tmp_path, 1)
    number = begin(tmp_path, None, None, 3, ["n1", "n4"])
    leave(tmp_path, number, n1=GOOD, n4=GOOD)
    assert command("exclude", tmp_path)[:2] == (0, "n2,n3\n")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    number = begin(tmp_path, None, None, 3, ["n1", "n2"])
    leave(tmp_path, number, n1=GOOD, n2=GOOD)
    assert command("exclude", tmp_path)[:2] == (0, "\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "required: command"),
        (["check", "rows"], "required: --rendezvous"),
        (["check", "rows", "--rendezvous", "n1"], "--rendezvous 'n1' is no address; give HOST:PORT"),
        (["check", "rows", "--rendezvous", "n1:99999"], "is no address"),
        (["check", "rows", "--rendezvous", "n1:1", "--limit-s", "nan"], "'nan' is no amount"),
        (["check", "rows", "--rendezvous", "n1:1", "--gpus", "-1"], "'-1' is not a whole number"),
        (["check", "/proc/rows", "--rendezvous", "n1:1"], "/proc/rows: the row of this node cannot be written"),
        (["exclude", "/nowhere"], "/nowhere: no such folder"),
        (["exclude", "/"], "no attempt has begun there"),
    ],
)
def test_mistakes_are_told_in_one_sentence(command: Callable[..., Any], arguments: list[str], sentence: str) -> None:
    code, out, error = command(*arguments)
    assert code in (1, 2) and out == ""
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
