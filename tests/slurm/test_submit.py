"""What submission leaves behind where something comes between: another command, SLURM's refusal, a full disk."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from configs.loader import UserError, load_config
from slurm import scheduler, submit
from slurm.attempt_files import append_row
from slurm.chain import plan_jobs
from slurm.jobs import Submission, only_one, read_submissions, write_submissions
from slurm.submit import Script, SubmitConfig, submit_all

CHAIN = """
run_dir: {folder}/run
env: {folder}/env.sh
stages:
  pretrain: {{config: none.yaml, time: 60}}
  finetune: {{config: none.yaml, time: 60}}
"""


@pytest.fixture
def config(tmp_path: Path) -> SubmitConfig:
    (tmp_path / "env.sh").touch()
    (tmp_path / "chain.yaml").write_text(CHAIN.format(folder=tmp_path))
    return load_config(SubmitConfig, tmp_path / "chain.yaml")


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of what is in the queue of a SLURM that takes two jobs and no more."""
    ids: list[str] = []

    def take(command: Any) -> str:
        if len(ids) == 2:
            raise UserError("sbatch: Job violates accounting/QOS policy.")
        ids.append(str(len(ids) + 1))
        return ids[-1]

    monkeypatch.setattr(scheduler, "submit", take)
    monkeypatch.setattr(scheduler, "cancel", lambda jobs: [ids.remove(job) for job in jobs])
    return ids


def submit_both(config: SubmitConfig) -> None:
    scripts = [Script(job, config.run_dir / "job.sbatch", "") for job in plan_jobs(config)]
    config.run_dir.mkdir(exist_ok=True)
    submit_all(config.run_dir, scripts, {script.job.stage: [""] for script in scripts}, {})


def test_of_two_commands_at_once_one_submits(config: SubmitConfig, monkeypatch: pytest.MonkeyPatch):
    for name in ("check_partitions", "write_texts", "write_files"):
        monkeypatch.setattr(submit, name, lambda *given: [])
    with (
        only_one(config.run_dir),
        pytest.raises(UserError, match="another command is just submitting its jobs; try again in a minute"),
    ):
        submit.main(config)
    with only_one(config.run_dir):  # it is free again
        pass


def test_a_stage_alone_needs_what_the_one_before_it_leaves(
    config: SubmitConfig, queue: list[str], monkeypatch: pytest.MonkeyPatch
):
    for name in ("check_partitions", "write_texts", "write_files"):
        monkeypatch.setattr(submit, name, lambda *given: [])
    alone = config.model_copy(update={"stage": "finetune"})
    with pytest.raises(
        UserError, match=r"stage finetune: needs .*/pretrain/export, but pretrain is not done \(not submitted\); begin"
    ):
        submit.main(alone)
    write_submissions(config.run_dir, [Submission("pretrain", "9", {"": "pretrain"}, [], "")])
    ledger = config.run_dir / "slurm/pretrain/attempts.jsonl"
    ledger.parent.mkdir(parents=True)
    append_row(ledger, {"event": "begin", "attempt": 1, "job_id": "9"})
    at_work = {("9", ""): scheduler.QueuedTask("RUNNING", "None", "1:00", "n1")}
    monkeypatch.setattr(scheduler, "read_queue", lambda *given: at_work)
    assert submit.main(alone) == 0
    at_work.clear()
    append_row(ledger, {"event": "end", "attempt": 1, "verdict": "failed"})
    with pytest.raises(UserError, match=r"but pretrain is not done \(failed\)"):
        submit.main(alone)
    (config.run_dir / "pretrain/export").mkdir(parents=True)  # by whatever made it
    assert submit.main(alone) == 0


def test_what_slurm_has_taken_is_noted_before_it_refuses_the_rest(config: SubmitConfig, queue: list[str]):
    queue.append("0")
    with pytest.raises(UserError) as refused:
        submit_both(config)
    assert str(refused.value) == (
        "stage finetune could not be submitted (sbatch: Job violates accounting/QOS policy); whatever came before it "
        f"was: after a fix, `python -m slurm.resubmit {config.run_dir}` submits the rest."
    )
    assert [(one.stage, one.job_id) for one in read_submissions(config.run_dir)] == [("pretrain", "2")]


def test_a_job_that_cannot_be_noted_is_cancelled(
    config: SubmitConfig, queue: list[str], monkeypatch: pytest.MonkeyPatch
):
    def write(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(submit, "write_submissions", write)
    with pytest.raises(UserError, match=r"job 1 cannot be noted \(No space left on device\), so it was cancelled"):
        submit_both(config)
    assert queue == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"jobs": [1]}',
        '{"jobs": null}',
        '{"jobs": ' + "[" * 100_000,
        '{"jobs": [{"stage": "x", "job_id": "1", "tasks": {}, "depends_on": [], "submitted": ""}]}',
        '{"jobs": [{"stage": "data", "job_id": 1, "tasks": {}, "depends_on": [], "submitted": ""}]}',
        '{"jobs": [{"stage": "data", "job_id": "1", "tasks": null, "depends_on": [], "submitted": ""}]}',
    ],
)
def test_a_damaged_list_of_jobs_is_told(tmp_path: Path, text: str):
    (tmp_path / "jobs.json").write_text(text)
    with pytest.raises(UserError, match=r"jobs\.json: is not as slurm\.submit writes it; restore it, or submit"):
        read_submissions(tmp_path)


def test_a_link_to_the_folder_of_the_command_is_no_folder_of_its_own(config: SubmitConfig, tmp_path: Path):
    os.symlink(Path.cwd(), tmp_path / "run")
    with pytest.raises(UserError, match="choose a folder of its own"):
        submit.main(config)
