"""What users are told by status, cancel and resubmit where SLURM does not answer or the folder is not where it was."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from configs.loader import UserError, dump_config, run_command
from slurm import cancel, resubmit, scheduler, status, submit
from slurm.attempt_files import append_row
from slurm.chain import ChainConfig
from slurm.jobs import JOBS_FILE, Submission, write_submissions

COMMANDS: dict[str, Callable[[Path], int]] = {
    "status": lambda run_dir: status.main(status.StatusConfig(run_dir=run_dir)),
    "cancel": lambda run_dir: cancel.main(cancel.CancelConfig(run_dir=run_dir)),
    "resubmit": lambda run_dir: resubmit.main(resubmit.ResubmitConfig(run_dir=run_dir, dry_run=True)),
}
AT_WORK = "echo '8|8|N/A|RUNNING|None|1:00:00|n1'"


class Slurm:
    """SLURM's commands as scripts, and what became of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in ("sbatch", "sinfo", "squeue", "scancel"):
            self.says(name, "")

    def says(self, name: str, script: str) -> None:
        program = self.folder / name
        program.write_text(f"#!/bin/bash\necho {name} $* >>{self.folder}/called\n{script}\n")
        program.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        called = self.folder / "called"
        lines = called.read_text().splitlines() if called.exists() else []
        return [line for line in lines if line.split()[0] == name]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return Slurm(tmp_path / "bin")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A chain of one training that has failed in its first attempt, as job 8."""
    run_dir = tmp_path / "run"
    folder = run_dir / "slurm" / "pretrain"
    folder.mkdir(parents=True)
    chain = ChainConfig(run_dir=run_dir, stages={"pretrain": {"config": "c.yaml", "time": "60"}})
    (run_dir / "chain.yaml").write_text(dump_config(chain))
    write_submissions(run_dir, [Submission("pretrain", "8", {"": "pretrain"}, [], "")])
    append_row(folder / "attempts.jsonl", {"event": "begin", "attempt": 1, "job_id": "8", "nodes": ["n1"]})
    return run_dir


# --- whose jobs they are ------------------------------------------------------------------------------------------


def test_a_chain_is_looked_at_whoever_asks(
    slurm: Slurm, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Or to a colleague, and after `su`, what is at work would look cancelled: resubmit would start it again."""
    monkeypatch.setenv("LOGNAME", "somebody_else")
    slurm.says("squeue", AT_WORK)
    assert COMMANDS["status"](run_dir) == 0 and "pretrain  running" in capsys.readouterr().out
    (call,) = slurm.calls("squeue")
    assert "--jobs=8,8 " in call and "somebody_else" not in call and "--user" not in call


def test_what_is_no_id_of_a_job_is_told(slurm: Slurm):
    slurm.says("sbatch", "echo Welcome to our cluster")
    with pytest.raises(UserError, match="sbatch: says 'Welcome to our cluster', which is no job's id"):
        scheduler.submit(["sbatch", "job.sbatch"])


# --- SLURM does not answer ----------------------------------------------------------------------------------------

ANSWERS = [
    ("echo slurm_load_jobs error: Connection refused >&2; exit 1", "slurm_load_jobs error: Connection refused."),
    ("exec sleep 60", "squeue: SLURM has not answered for 0.5 s; try again later."),
    ("echo Welcome to our cluster", "squeue: says 'Welcome to our cluster', which is no row of jobs."),
]


@pytest.mark.parametrize(("script", "said"), ANSWERS)
@pytest.mark.parametrize(("command", "undone"), [("cancel", "cancelled"), ("resubmit", "submitted")])
def test_what_is_left_undone_is_told(
    slurm: Slurm, run_dir: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str, command: str, undone: str
):
    monkeypatch.setattr(scheduler, "TIMEOUT_S", 0.5 if "sleep" in script else 120)
    slurm.says("squeue", script)
    with pytest.raises(UserError) as refusal:
        COMMANDS[command](run_dir)
    assert str(refusal.value).startswith(f"what waits and what works is not known, so nothing is {undone}: squeue: ")
    assert said in str(refusal.value)
    assert not slurm.calls("scancel") and not slurm.calls("sbatch")


@pytest.mark.parametrize(("script", "said"), ANSWERS)
def test_status_tells_what_the_files_do(
    slurm: Slurm,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str,
    said: str,
):
    monkeypatch.setattr(scheduler, "TIMEOUT_S", 0.5 if "sleep" in script else 120)
    slurm.says("squeue", script)
    assert COMMANDS["status"](run_dir) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("what waits and what works is not known: ") and said in first
    assert second.startswith("pretrain  not known  job 8  attempt 1")


def test_a_cancellation_that_slurm_refuses_in_part_is_told(slurm: Slurm, run_dir: Path):
    slurm.says("squeue", AT_WORK)
    slurm.says("scancel", "echo 'scancel: error: Kill job error on job id 8: Access/permission denied' >&2; exit 1")
    with pytest.raises(UserError, match=r"^of job 8 not all may be cancelled: scancel: Kill job error on job id 8: "):
        COMMANDS["cancel"](run_dir)


# --- the folder is not where it was -------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("is_moved", [True, False], ids=["moved", "copied"])
def test_what_is_not_the_folder_of_the_jobs_is_refused(slurm: Slurm, run_dir: Path, command: str, is_moved: bool):
    slurm.says("squeue", AT_WORK)
    elsewhere = run_dir.with_name("elsewhere")
    (shutil.move if is_moved else shutil.copytree)(run_dir, elsewhere)
    with pytest.raises(UserError) as refusal:
        COMMANDS[command](elsewhere)
    said = f"was {run_dir} when it was submitted" if is_moved else f"is a copy of {run_dir}"
    assert str(refusal.value).startswith(f"{elsewhere}: {said}")
    assert not slurm.calls("scancel") and not slurm.calls("sbatch")


@pytest.mark.parametrize("command", ["status", "cancel"])
def test_a_folder_that_was_moved_and_linked_to_its_place_is_as_good(slurm: Slurm, run_dir: Path, command: str):
    slurm.says("squeue", AT_WORK)
    elsewhere = run_dir.with_name("elsewhere")
    shutil.move(run_dir, elsewhere)
    run_dir.symlink_to(elsewhere)
    assert COMMANDS[command](run_dir) == COMMANDS[command](elsewhere) == 0


def test_a_chain_can_be_cancelled_whose_file_is_being_edited(slurm: Slurm, run_dir: Path):
    slurm.says("squeue", AT_WORK)
    (run_dir / "chain.yaml").write_text("stages: {pretrain: {")
    assert COMMANDS["cancel"](run_dir) == 0
    assert slurm.calls("scancel") == ["scancel --quiet 8"]


def test_a_list_of_jobs_from_before_it_had_a_place_is_read(slurm: Slurm, run_dir: Path):
    path = run_dir / JOBS_FILE
    path.write_text(path.read_text().replace("run_dir", "other"))
    assert COMMANDS["cancel"](run_dir) == 0


# --- submission ---------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm_submit(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command, on a chain of two trainings whose own commands are not asked; its exit code."""
    stage = {"config": "c.yaml", "time": "60"}
    chain = {"run_dir": f"{tmp_path}/new", "env": f"{tmp_path}/env.sh", "stages": dict(pretrain=stage, finetune=stage)}
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(chain))
    (tmp_path / "env.sh").write_text(f"PARTITION=batch\nPYTHON={sys.executable}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submit, "check_stages", lambda jobs, *_: [[1]] * len(jobs))

    def call(*words: str) -> int:
        with pytest.raises(SystemExit) as leaving:
            argv = ["--config", "chain.yaml", *words]
            run_command(submit.main, submit.SubmitConfig, description="", argv=argv)
        assert isinstance(leaving.value.code, int)
        return leaving.value.code

    return call


def test_a_submission_that_ends_in_the_middle_says_how_to_go_on(
    slurm_submit: Callable[..., int], slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    slurm.says("sinfo", "echo 'batch*|2|infinite'")
    slurm.says(
        "sbatch",
        "[[ $* == *--test-only* ]] && exit; [[ $* == *dependency* ]] || { echo 8; exit; }\n"
        "echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2\n"
        "echo 'sbatch: error: Batch job submission failed: Job violates accounting/QOS policy' >&2; exit 1",
    )
    assert slurm_submit() == 2
    assert capsys.readouterr().err == (
        "error: stage finetune could not be submitted (sbatch: QOSMaxSubmitJobPerUserLimit; Batch job submission "
        "failed: Job violates accounting/QOS policy); whatever came before it was: after a fix, "
        f"`python -m slurm.resubmit {tmp_path}/new` submits the rest.\n"
    )


@pytest.mark.parametrize("words", [["--stage", "finetune"], ["--stage=finetune"], ["stage=finetune"]])
def test_one_stage_is_shown_alone(
    slurm_submit: Callable[..., int], slurm: Slurm, capsys: pytest.CaptureFixture[str], words: list[str]
):
    assert slurm_submit(*words, "--dry-run") == 0
    files = [line.split("/")[-2] for line in capsys.readouterr().out.splitlines() if line.startswith("==> /")]
    assert files == ["finetune"] and not slurm.calls("sbatch")


def test_a_stage_that_the_chain_has_not_is_refused(
    slurm_submit: Callable[..., int], capsys: pytest.CaptureFixture[str]
):
    assert slurm_submit("--stage", "data") == 2
    assert capsys.readouterr().err == "error: --stage data: the chain has no such stage; add it to stages.\n"


# --- a chain that was edited --------------------------------------------------------------------------------------


def edited_chain(run_dir: Path, tasks: dict[str, str], stage: str, settings: dict[str, object]) -> None:
    """Of which one stage was submitted with these tasks, as job 8, and now has these settings."""
    chain = ChainConfig(run_dir=run_dir, stages={stage: {"config": "c.yaml", "time": "60", **settings}})
    (run_dir / "chain.yaml").write_text(dump_config(chain))
    write_submissions(run_dir, [Submission(stage, "8", tasks, [], "")])


def test_runs_that_moved_up_are_not_taken_for_those_at_work(
    slurm: Slurm, run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    """With preset a gone, b is the first of the array: it would be submitted while it is at work as the second."""
    edited_chain(run_dir, {"0": "a", "1": "b"}, "finetune", {"presets": [{"name": "b"}]})
    slurm.says("squeue", "echo '9|8|1|RUNNING|None|1:00:00|n1'")
    with pytest.raises(UserError, match=r"stage finetune: b is at work as job 8, and .*chain\.yaml has other presets"):
        COMMANDS["resubmit"](run_dir)
    slurm.says("squeue", "")
    assert COMMANDS["resubmit"](run_dir) == 0 and "finetune  b: not submitted, so it is due" in capsys.readouterr().out


def test_parts_of_a_build_stay_as_many_as_they_were(slurm: Slurm, run_dir: Path):
    edited_chain(run_dir, {str(index): f"part_{index}" for index in range(3)}, "data", {"parts": 5})
    with pytest.raises(
        UserError, match=r"stage data: had 3 part\(s\) when it was submitted, and has 5 now; put that back"
    ):
        COMMANDS["resubmit"](run_dir)
