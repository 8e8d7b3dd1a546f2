"""Twenty kills at random moments, of workers and of whole builds, and still the bytes of the build left alone."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from configs.loader import dump_config
from data_pipeline import build, ray_job
from data_pipeline.resolve import staging_folder
from data_pipeline.verify import verify
from tests.data_pipeline.recordings import numbered_frames, write_lerobot_v21, write_video
from tests.data_pipeline.test_build import config_of, digests

NUM_KILLS = 20
LONGEST_WAIT_S = 0.5  # a build works for some two seconds, and after a kill goes on from there
# Starting a build and its workers is what takes long. At most two of its workers: an episode that ends more of them is
# given up, and rightly.
VICTIMS = ("build", "worker build", "worker worker build", "worker worker build")
WORKER = "ray::_work_on_row"
# Starts builds by forking: importing torch and Ray anew for each of them would take most of the test's time.
STARTER = """
import os, sys
from pathlib import Path
from configs.loader import load_config
from data_pipeline import build, build_stages
for path in sys.stdin:
    pid = os.fork()
    if not pid:
        os.setsid()
        os.dup2(2, 1)  # what Ray prints is not for the test
        os._exit(build.main(load_config(build.BuildConfig, Path(path.strip()))))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    root = tmp_path_factory.mktemp("recordings")
    write_lerobot_v21(root / "robot", lengths=(24, 14, 16, 20, 30, 12), cameras=("observation.images.front",))
    for number in range(6):
        write_video(root / "people" / f"video {number}.mp4", numbered_frames(range(100 * number, 100 * number + 30)))
    return root


class Builds:
    """Builds of one config, one after the other."""

    def __init__(self, config_path: Path, log: Path) -> None:
        self._config_path = config_path
        command = [sys.executable, "-c", STARTER]
        self._starter = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True
        )

    def start(self) -> int:
        self._starter.stdin.write(f"{self._config_path}\n")
        self._starter.stdin.flush()
        return int(self._starter.stdout.readline())

    def exit_code(self) -> int:
        return int(self._starter.stdout.readline())

    def close(self) -> None:
        self._starter.stdin.close()
        self._starter.wait(30)


def workers() -> list[psutil.Process]:
    """Ray's processes that work on episodes, of whichever build."""
    return [process for process in psutil.Process().children(recursive=True) if name_of(process).startswith(WORKER)]


def name_of(process: psutil.Process) -> str:
    try:
        return process.cmdline()[0]
    except (psutil.Error, IndexError):
        return ""


def wait_for_workers(pid: int) -> bool:
    """False where the build ends first."""
    while not workers():
        if not is_running(pid):
            return False
        time.sleep(0.05)
    return True


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill(victim: str, pid: int) -> bool:
    """False where there was nobody left to kill."""
    try:
        if victim == "build":
            os.killpg(pid, signal.SIGKILL)
        else:
            random.choice(workers()).kill()
    except (ProcessLookupError, psutil.NoSuchProcess, IndexError):
        return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(900)  # how often a build has to start again is chance
def test_twenty_kills_change_no_byte(ray, recordings, tmp_path):
    """One Ray for all builds, as on a cluster: starting it anew each time would take minutes."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    chance = random.Random()
    kills = {"worker": 0, "build": 0}
    build.main(config_of(recordings, alone))
    config_path = tmp_path / "build.yaml"
    config_path.write_text(dump_config(config_of(recordings, killed, ray_address=ray_job.address())))
    builds = Builds(config_path, tmp_path / "log")
    while sum(kills.values()) < NUM_KILLS:
        pid = builds.start()
        for victim in chance.choice(VICTIMS).split():
            if not wait_for_workers(pid):
                break
            time.sleep(chance.uniform(0, LONGEST_WAIT_S))
            kills[victim] += kill(victim, pid)
        if builds.exit_code() == 0:  # it was not caught in time: once more from the start
            assert digests(killed) == digests(alone)
            shutil.rmtree(killed)
            shutil.rmtree(staging_folder(killed))
    builds.start()
    assert builds.exit_code() == 0, (tmp_path / "log").read_text()
    builds.close()
    assert kills["worker"] and kills["build"], kills
    assert digests(killed) == digests(alone)
    assert verify(killed) == []
