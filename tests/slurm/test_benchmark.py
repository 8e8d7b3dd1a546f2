"""The benchmark of interruptions measures what it says, with a training of some seconds."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_chain.py"))))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_it_times_a_signal_and_a_kill(cluster: Any, tmp_path: Path):
    config = tiny.write_training(tmp_path, tiny.write_dataset(tmp_path), checkpoint_every=10**6)
    command = [sys.executable, "-m", "benchmarks.slurm", "--dataset", tmp_path / "dataset", "--config", config]
    command += ["--folder", tmp_path / "benchmark", "--interruptions", "signal", "kill", "--every-s", "1"]
    command += ["--nodes", "1", "--launcher", "srun", "--no-preflight"]
    process = subprocess.run(
        command, env=cluster.environment, cwd=tiny.REPOSITORY, capture_output=True, text=True, timeout=800
    )
    assert process.returncode == 0, process.stdout + process.stderr
    result = json.loads((tmp_path / "benchmark" / "result.json").read_text())
    signal, kill = result["interruptions"]
    for one in (signal, kill):
        assert 0 < one["began"] < one["ranks"] < one["training"]
    assert 0 < signal["saved"] < signal["began"] and signal["lost_steps"] == 0
    assert kill["saved"] is None and kill["lost_steps"] > 0  # nothing was saved since the signal
    assert 0 < result["goodput"] < 1 and result["steps"] > 0
    assert f"goodput {result['goodput']:.1%}" in process.stdout
    assert cluster.run("squeue", "--noheader", "--states=RUNNING,PENDING") == ""
