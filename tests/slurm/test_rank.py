"""One rank: its output, its place among the others, and how it ended."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.rank import _tasks_on_node, cpu_share

SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURMD_NODENAME": "n2",
    "MASTER_ADDR": "n1",
}


def start(folder: Path, source: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A rank that runs a module of this source."""
    (folder / "work.py").write_text(source)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TORCHELASTIC", "RANK"))}
    return subprocess.Popen(
        [sys.executable, "-m", "slurm.rank", "work", *arguments],
        env={**kept, "ATTEMPT_LOGS": str(folder / "logs"), **environment}
        | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(rank: subprocess.Popen[str], folder: Path, number: int = 0) -> tuple[int, dict[str, Any], str]:
    """Its exit code for the launcher, its row and its log."""
    assert rank.communicate() == ("", "")  # all of it is in the log
    logs = folder / "logs"
    row = json.loads((logs / f"rank_{number:04d}.json").read_text())
    return rank.returncode, row, (logs / f"rank_{number:04d}.log").read_text()


@pytest.mark.parametrize(
    ("source", "noted", "launcher", "log"),
    [
        ("print('hello')", 0, 0, "hello\n"),
        ("raise SystemExit", 0, 0, ""),
        ("raise SystemExit(3)", 3, 3, ""),
        ("raise SystemExit(75)", 75, 0, ""),
        ("raise SystemExit(2)", 2, 2, ""),
        ("raise SystemExit('so')", 1, 1, "so\n"),
        ("1 / 0", 1, 1, "ZeroDivisionError: division by zero\n"),
        ("import os; os.write(1, b'raw'); os.system('echo child >&2')", 0, 0, "rawchild\n"),
        ("import nowhere", 1, 1, "ModuleNotFoundError: No module named 'nowhere'\n"),
    ],
)
def test_it_notes_how_it_ended_and_keeps_what_it_said(
    tmp_path: Path, source: str, noted: int, launcher: int, log: str
) -> None:
    before = time.time()
    rank = start(tmp_path, source, SLURMD_NODENAME="n7")
    code, row, text = finish(rank, tmp_path)
    assert (code, row["exit_code"], row["rank"], row["host"]) == (launcher, noted, 0, "n7")
    assert row["pid"] == rank.pid and before <= row["started"] <= row["ended"] <= time.time()
    assert text.endswith(log)


def test_the_module_is_run_as_python_would_run_it(tmp_path: Path) -> None:
    source = "import sys; print(__name__, __spec__.name, sys.modules['__main__'].__spec__.name, sys.argv[1:])"
    assert finish(start(tmp_path, source, "--config", "c.yaml"), tmp_path)[2] == (
        "__main__ work work ['--config', 'c.yaml']\n"
    )


def test_a_killed_rank_has_begun_and_not_ended(tmp_path: Path) -> None:
    source = "import os; print('so far', flush=True); os.kill(os.getpid(), 9)"
    code, row, text = finish(start(tmp_path, source), tmp_path)
    assert code == -signal.SIGKILL and "exit_code" not in row and text == "so far\n"


def test_a_crash_leaves_its_stack(tmp_path: Path) -> None:
    source = "import ctypes; ctypes.string_at(0)"
    code, row, text = finish(start(tmp_path, source), tmp_path)
    assert code == -signal.SIGSEGV and "exit_code" not in row
    assert "Fatal Python error: Segmentation fault" in text and "work.py" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_that_comes_too_early_is_a_clean_stop(tmp_path: Path, number: signal.Signals) -> None:
    flag = tmp_path / "ready"
    rank = start(tmp_path, f"import pathlib, time; pathlib.Path({str(flag)!r}).touch(); time.sleep(60)")
    while not flag.exists():
        time.sleep(0.01)
    rank.send_signal(number)
    code, row, text = finish(rank, tmp_path)
    assert (code, row["exit_code"]) == (0, 75) and text == f"stopped by {number.name} before it had begun\n"


def test_a_signal_amid_an_import_is_one_too(tmp_path: Path) -> None:
    """An extension's import makes another error of an exit, and a package that cannot be imported may be optional."""
    flag = tmp_path / "ready"
    (tmp_path / "extension.py").write_text(
        f"import pathlib, time\npathlib.Path({str(flag)!r}).touch()\n"
        "try: time.sleep(60)\nexcept BaseException: raise ImportError from None"
    )
    rank = start(tmp_path, "try: import extension\nexcept ImportError: print('goes on without')")
    while not flag.exists():
        time.sleep(0.01)
    rank.send_signal(signal.SIGUSR2)
    code, row, text = finish(rank, tmp_path)
    assert (code, row["exit_code"]) == (0, 75) and text == "stopped by SIGUSR2 before it had begun\n"


def test_a_signal_that_comes_too_late_changes_nothing(tmp_path: Path) -> None:
    """The command has ended, and what it leaves is being taken apart."""
    source = "import atexit, os; atexit.register(os.kill, os.getpid(), 12); print('done')"
    code, row, text = finish(start(tmp_path, source), tmp_path)
    assert (code, row["exit_code"], text) == (0, 0, "done\n")


def test_srun_says_who_it_is(tmp_path: Path) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    source = f"import os; print(*(os.environ.get(name) for name in {names}))"
    _, row, text = finish(start(tmp_path, source, **SLURM), tmp_path, number=3)
    assert text == "3 5 1 2 2\n" and (row["rank"], row["host"]) == (3, "n2")


def test_what_torchrun_says_comes_first(tmp_path: Path) -> None:
    source = "import os; print(os.environ['RANK'], os.environ['LOCAL_SIZE'], len(os.sched_getaffinity(0)))"
    torchrun = {"RANK": "6", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}
    text = finish(start(tmp_path, source, **{**SLURM, **torchrun}), tmp_path, number=6)[2]
    assert text == f"6 1 {len(os.sched_getaffinity(0))}\n"


@pytest.mark.parametrize(("text", "counts"), [("2(x3)", [2, 2, 2]), ("2(x2),1", [2, 2, 1]), ("4,1(x2)", [4, 1, 1])])
def test_tasks_per_node(text: str, counts: list[int]) -> None:
    assert [_tasks_on_node(text, node) for node in range(len(counts))] == counts


@given(num_cpus=st.integers(1, 300), num_ranks=st.integers(1, 16))
def test_ranks_share_the_cpus(num_cpus: int, num_ranks: int) -> None:
    shares = [cpu_share(range(num_cpus), rank, num_ranks) for rank in range(num_ranks)]
    taken = [cpu for share in shares for cpu in share]
    assert taken == sorted(set(taken)) and len({len(share) for share in shares}) == 1
    assert num_cpus - len(taken) < num_ranks


@pytest.mark.parametrize(("arguments", "logs"), [([], "logs"), (["work"], None)])
def test_without_a_module_or_a_folder_it_says_so(tmp_path: Path, arguments: list[str], logs: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ATTEMPT_LOGS"}
    environment |= {} if logs is None else {"ATTEMPT_LOGS": str(tmp_path / logs)}
    program = [sys.executable, "-m", "slurm.rank", *arguments]
    ended = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("error: python -m slurm.rank needs a module to run, and")


def test_logs_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    rank = start(tmp_path, "print('never')")
    out, error = rank.communicate()
    assert rank.returncode == 1 and out == "" and error.startswith("error: ") and "cannot be written" in error
