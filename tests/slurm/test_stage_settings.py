"""What stages are asked before anything is submitted: each command once, whatever the number of its runs."""

import sys
from pathlib import Path
from typing import Any

import pytest

from configs.loader import UserError
from slurm.chain import ChainConfig, plan_jobs
from slurm.environment import read_environment
from slurm.render import Place
from slurm.stage_settings import check_stages

COMMAND = """
import os, sys
from pathlib import Path

with Path("processes").open("a") as file:
    file.write(f"{os.getpid()}\\n")
if "does=nothing" in sys.argv:
    sys.stderr.write("a warning\\nerror: does=nothing cannot be.\\n")
    sys.exit(2)
if "does=crash" in sys.argv:
    raise RuntimeError("no such package")
assert sys.argv[-1] == "--print-config"
batch = 8 if "batch=8" in sys.argv else 6
sys.stdout.write(f"{{loader: {{global_batch_size: {batch}}}, engine: {{grad_accum_steps: 1, sequence_parallel: 1}}}}")
"""


def node_counts(folder: Path, *overrides: str, **settings: Any) -> list[int]:
    (folder / "finetune").mkdir()
    (folder / "finetune/__init__.py").touch()
    (folder / "finetune/train.py").write_text(COMMAND)
    (folder / "env.sh").write_text(f"PYTHON={sys.executable}\n")
    presets = [{"name": f"p{number}", "overrides": [override]} for number, override in enumerate(overrides)]
    stage = {"config": "c.yaml", "time": "60", "nodes": {"min": 1, "max": 4}, "presets": presets, **settings}
    chain = ChainConfig(run_dir=folder / "run", stages={"finetune": stage})
    repository = Path(__file__).resolve().parents[2]
    place = Place(folder, repository, Path(sys.executable))
    (counts,) = check_stages(plan_jobs(chain), read_environment(folder / "env.sh"), place)
    return counts


@pytest.fixture(autouse=True)
def _repository_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))


def test_all_runs_are_asked_in_one_process(tmp_path: Path):
    assert node_counts(tmp_path, *(f"x={number}" for number in range(1000)), "batch=8") == [1, 2]  # of 6 and of 8
    processes = (tmp_path / "processes").read_text().split()
    assert len(processes) == 1001 and len(set(processes)) == 1


def test_a_mistake_is_told_with_the_run_that_makes_it(tmp_path: Path):
    with pytest.raises(UserError, match=r"^stage finetune, p1, python -m finetune\.train: does=nothing cannot be\.$"):
        node_counts(tmp_path, "x=0", "does=nothing")


def test_a_command_that_cannot_be_asked_is_no_mistake(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert node_counts(tmp_path, "does=crash") == [1, 2, 3, 4]
    assert "finetune could not be asked here" in caplog.text and "RuntimeError: no such package" in caplog.text


def test_runs_that_differ_in_their_seed_alone_are_asked_once(tmp_path: Path):
    assert node_counts(tmp_path, seeds=[0, 1, 2]) == [1, 2, 3]
    assert len((tmp_path / "processes").read_text().split()) == 1
