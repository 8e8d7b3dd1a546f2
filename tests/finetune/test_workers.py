"""Jobs in processes of their own: results in order, and an end for all as soon as one fails or somebody asks for it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.loader import UserError
from finetune.workers import run_jobs


def double(number: int) -> int:
    return 2 * number


def fail_once_there_is(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)
    raise UserError("one sentence")


def touch_and_sleep(path: Path) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(str(os.getpid()))
    partial.rename(path)  # whoever sees it can read it
    time.sleep(600)


def has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True


def test_results_come_in_the_order_of_the_jobs():
    assert run_jobs([(double, (number,)) for number in range(3)], num_workers=2) == [0, 2, 4]


def test_a_job_that_fails_ends_the_others(tmp_path: Path):
    with pytest.raises(UserError, match="one sentence"):
        run_jobs([(touch_and_sleep, (tmp_path / "pid",)), (fail_once_there_is, (tmp_path / "pid",))], num_workers=2)
    assert has_ended(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("ask", ["Ctrl-C in a terminal", "kill"])
def test_whoever_stops_the_command_stops_its_workers_without_a_traceback(tmp_path: Path, ask: str):
    (tmp_path / "toy.py").write_text(f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from configs.loader import StrictConfig, run_command
from finetune.workers import run_jobs
from test_workers import touch_and_sleep

class ToyConfig(StrictConfig):
    path: Path

def main(config):
    run_jobs([(touch_and_sleep, (config.path,))], 1)

if __name__ == "__main__":
    run_command(main, ToyConfig, description="")
""")
    pid_file = tmp_path / "pid"
    command = [sys.executable, "-m", "toy", f"path={pid_file}"]
    toy = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # As a terminal starts it: where the tests run in the background, a shell has told them to ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not pid_file.exists():
        time.sleep(0.05)
    if ask == "kill":
        toy.send_signal(signal.SIGTERM)
    else:
        os.killpg(toy.pid, signal.SIGINT)
    _, errors = toy.communicate(timeout=30)
    assert (toy.returncode, errors) == (130, "stopped\n")
    assert has_ended(int(pid_file.read_text()))
