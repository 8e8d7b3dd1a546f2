"""One command, and some time later a report: the whole chain on a real SLURM of two nodes."""

import json
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slurm.attempt_files import read_attempts

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_chain.py"))))
recordings = SimpleNamespace(**runpy.run_path(str(tiny.REPOSITORY / "tests/data_pipeline/recordings.py")))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FEW_STEPS = ["num_steps=4", "checkpoint_every=2", "validate_every=4", "validation_batches=1", "log_every=1"]
FEW_STEPS += ["loader.global_batch_size=4", "engine.precision=fp32"]


def small_chain(cluster: Any, folder: Path) -> Path:
    recordings.write_lerobot_v3(folder / "recordings", lengths=(30,) * 3)
    shared = {"time": "00:10:00", "lead_s": 60, "cpus_per_node": 4}
    return tiny.write_chain(
        cluster,
        folder,
        held_at=[1],
        data={
            "config": "configs/data_pipeline/own_data.yaml",
            "overrides": [f"sources.data.path={folder}/recordings"],
            "kind": "ray",
            "nodes": 2,
            **shared,
            "cpus_per_node": 1,  # of which each gets a worker
        },
        pretrain={"config": "configs/pretrain/own_data.yaml", "overrides": FEW_STEPS, "nodes": 2, **shared},
        finetune={
            "config": "configs/finetune/own_data.yaml",
            "overrides": [*FEW_STEPS, "engine.kind=accelerate"],
            "presets": [
                {"name": "joint", "overrides": []},
                {"name": "actions_alone", "overrides": ["policy.video_loss_weight=0", tiny.HELD]},
            ],
            "preflight": False,
            **shared,
        },
        evaluate={"config": "configs/finetune/evaluate_own_data.yaml", **shared},
    )


def test_one_command_from_recordings_to_a_report_past_a_killed_preset(cluster: Any, tmp_path: Path):
    chain = small_chain(cluster, tmp_path)
    jobs = tiny.submit(cluster, chain)
    assert list(jobs) == ["data", "pretrain", "finetune", "evaluate"]
    run = tmp_path / "run"
    joint, killed = (
        tiny.WatchedTask(cluster, jobs["finetune"], run / "slurm" / "finetune" / name, run / "finetune" / name)
        for name in ("joint", "actions_alone")
    )
    killed.wait_for_step(1, attempt=1)
    killed.signal_rank(0, signal.SIGKILL, attempt=1)
    cluster.wait_until(lambda: not cluster.run("squeue", "--noheader"), "the end of the chain", timeout_s=400)

    status = cluster.run(sys.executable, "-m", "slurm.status", run)
    assert status.count("done") == 6, status
    assert [one.verdict for one in killed.attempts] == ["requeue", "done"]
    assert killed.attempts[0].exit_code not in (0, 75)
    assert [one.verdict for one in joint.attempts] == ["done"]  # it knows nothing of its neighbour's trouble
    page = (run / "report.html").read_text()  # which the last job has written
    assert all(said in page for said in ("all stages are done", "loss of finetune, joint", "1 failed", "blind"))
    for name in ("joint", "actions_alone"):
        results = json.loads((run / "evaluate" / name / "results.json").read_text())
        assert {"policy", "blind"} <= results["action_error"].keys()
    assert json.loads((run / "pretrain" / "ds_config.json").read_text())["zero_optimization"]["stage"] == 1
    events = [json.loads(line) for line in (run / "pretrain" / "events.jsonl").read_text().splitlines()]
    assert {row["rank"] for row in events if row["event"] == "started"} == {0, 1}
    assert {tuple(one.nodes) for one in read_attempts(run / "slurm" / "pretrain")} == {("n1", "n2")}
    verify = [sys.executable, "-m", "data_pipeline.verify", run / "dataset"]
    assert subprocess.run(verify, cwd=tiny.REPOSITORY, timeout=300).returncode == 0
