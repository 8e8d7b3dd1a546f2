"""The page that says what went wrong: the cause first, with its rank, node, step and shard."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from slurm import errors
from slurm.attempt_files import LOGS, read_attempts, run, write_whole
from slurm.attempts import begin, end
from slurm.errors import LOST_CONTACT, SPOKE, VANISHED, error_page, find_endings

BAD_SHARD = (
    "error: /data/pick/shards/000012.tar: sample pick-000031 cannot be used (it ends too early); restore the file, or "
    "set loader.max_bad_fraction to leave such samples out."
)
LOST = (
    "error: rank {rank} on {host} lost contact with the other ranks at step 42 (Connection closed by peer): one of "
    "them has ended. Its own log, runs/a/events.jsonl and stacks/ beside it may say why; the same command goes on from "
    "the last checkpoint."
)
TRACEBACK = """Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
  File "/repo/pretrain/checkpoint.py", line 108, in load
    stored = checkpoints.load(ema)
{error}
"""


class Job:
    """A job's folder with one attempt, whose ranks end as a test says."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_dir = folder / "slurm" / "pretrain", folder / "run"
        self.run_dir.mkdir()
        begin(self.folder, self.run_dir, None, 3, ["n1", "n2"])
        self.logs = self.folder / LOGS / "attempt_001"

    def rank(self, rank: int, log: str, exit_code: int | None, ended: float, host: str = "") -> None:
        host = host or f"n{1 + rank // 4}"
        row: dict[str, Any] = {"rank": rank, "host": host, "pid": 100 + rank, "started": 1.0}
        row |= {} if exit_code is None else {"ended": ended, "exit_code": exit_code}
        (self.logs / f"rank_{rank:04d}.json").write_text(json.dumps(row))
        (self.logs / f"rank_{rank:04d}.log").write_text(log)

    def page(self) -> str:
        end(self.folder, 1)
        return error_page(self.folder, read_attempts(self.folder)[-1])


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    return Job(tmp_path)


def section(page: str, title: str) -> str:
    return next(part for part in page.strip().split("\n\n") if part.startswith(f"{title}:"))


def test_the_first_error_names_rank_node_step_and_shard(job: Job) -> None:
    for rank in range(8):
        if rank != 5:  # seven complain of the one that failed, most of them before it has ended itself
            job.rank(
                rank, f"step 40/100  loss 0.5\n{LOST.format(rank=rank, host=f'n{1 + rank // 4}')}\n", 1, ended=10.0
            )
    job.rank(5, f"2026-11-30 12:00:00,000 INFO pretrain: step 41/100  loss 0.5\n{BAD_SHARD}\n", 2, ended=11.0)
    page = job.page()
    assert read_attempts(job.folder)[0].reason == (
        "attempt 1 ended at step 0 with a mistake in its input, which another attempt would not mend. "
        f"rank 5 on n2 at step 41, reading /data/pick/shards/000012.tar: {BAD_SHARD.removeprefix('error: ')}"
    )
    assert section(page, "first") == (
        "first:\n"
        f"  rank 5 on n2 at step 41, reading /data/pick/shards/000012.tar, 1970-01-01T00:00:11+00:00\n    {BAD_SHARD}\n"
        f"    its log is {job.logs / 'rank_0005.log'}"
    )
    assert "7 ranks: 0-4, 6-7 on n1, n2 at step 42" in section(page, "then")
    assert section(page, "then").count("lost contact") == 1  # told once
    assert BAD_SHARD in section(page, f"the end of {job.logs / 'rank_0005.log'}")


def test_the_same_mistake_on_all_ranks_is_told_once(job: Job) -> None:
    for rank in range(6):
        job.rank(rank, "error: /data/none: no such folder; give the `out` folder of a finished build.", 2, ended=rank)
    page = job.page()
    assert section(page, "first").startswith("first:\n  6 ranks: 0-5 on n1, n2, ")
    assert page.count("error: /data/none") == 2 and "\nthen:" not in page  # and at the end of the first one's log


def test_of_two_that_speak_for_themselves_the_earlier_one_is_the_cause(job: Job) -> None:
    job.rank(0, TRACEBACK.format(error="RuntimeError: CUDA error: an illegal memory access"), 1, ended=20.0)
    job.rank(
        1, TRACEBACK.format(error="torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"), 1, ended=19.0
    )
    assert section(job.page(), "first").splitlines()[2].strip().startswith("torch.OutOfMemoryError: CUDA out of memory")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("RuntimeError: [..] Connection closed by peer [127.0.0.1]:41", LOST_CONTACT),
        ("torch.distributed.DistBackendError: NCCL error in: ..., remote process exited", LOST_CONTACT),
        ("torch.distributed.elastic.multiprocessing.api.SignalException: Process 4 got signal: 15", LOST_CONTACT),
        (
            "error: ckpt: cannot be written (another rank could not write its part); see to the disk's space.",
            LOST_CONTACT,
        ),
        ("error: s3://b/shards/000001.tar: cannot be read (Connection reset by peer); try again.", SPOKE),
        ("ValueError: 3 is not 4", SPOKE),
        ("KeyboardInterrupt", SPOKE),
        ("Fatal Python error: Segmentation fault", SPOKE),
        ("2026-11-30 12:00:00 WARNING data_pipeline: sample 3 cannot be used", VANISHED),
        ("UserWarning: something is deprecated", VANISHED),
        ("Traceback (most recent call last):\n  File so\n    x\nlibrary.Oddity: no", SPOKE),
    ],
)
def test_who_is_to_blame(job: Job, error: str, kind: int) -> None:
    job.rank(0, f"starting\n{error}\n", 1 if kind != VANISHED else None, ended=3.0)
    (ending,) = find_endings(job.logs, read_attempts(job.folder)[0])
    assert ending.kind == kind
    assert (ending.sentence == error.splitlines()[-1]) == (kind != VANISHED)


def test_a_killed_rank_comes_before_those_that_lost_it(job: Job) -> None:
    job.rank(0, LOST.format(rank=0, host="n1"), 1, ended=5.0)
    job.rank(1, "", None, ended=0)
    (job.logs / "launcher.log").write_text(
        "[1]:\n  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 101)\n"
        "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\nsrun: error: n1: task 0: Out Of Memory\nhello\n"
    )
    page = job.page()
    assert "rank 1 on n1 at step 42, last heard of" in section(page, "first")  # as the others say
    assert "was killed by signal 9 without a word" in section(page, "first")
    said = section(page, "the launcher and SLURM say")
    assert "oom_kill" in said and "Out Of Memory" in said and "hello" not in said


def test_a_rank_that_did_not_save_in_time_is_told_from_others(job: Job) -> None:
    job.rank(0, "step 12/100\n", None, ended=0)
    (job.logs / "launcher.log").write_text("Unable to shutdown process 100 via 12, forcefully exiting via 9\n")
    assert "    did not end in time when it was asked to, so it was killed\n" in section(job.page(), "first")


def test_a_stuck_rank_shows_its_stacks(job: Job) -> None:
    job.rank(3, "step 7/100\n", None, ended=0)
    stacks = job.run_dir / "stacks" / "rank_00003_103.txt"
    stacks.parent.mkdir()
    stacks.write_text("Timeout (1:00:00)!\n")
    (stacks.parent / "rank_00003_999.txt").write_text("of another attempt")
    assert f"was stuck, and has left its stacks in {stacks}" in section(job.page(), "first")


def test_what_the_run_noted_stands_in_for_a_silent_log(job: Job) -> None:
    rows = [
        {"time": "1999-01-01T00:00:00+00:00", "rank": 0, "step": 3, "event": "failed", "error": "OSError: of old"},
        {
            "time": read_attempts(job.folder)[0].began,
            "rank": 0,
            "host": "n1",
            "step": 41,
            "event": "failed",
            "error": "OSError: x",
        },
    ]
    (job.run_dir / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"event": "fai')
    job.rank(0, "", 1, ended=3.0)
    assert "rank 0 on n1 at step 41, 1970-01-01T00:00:03+00:00\n    OSError: x" in section(job.page(), "first")


def test_ranks_that_ended_well_are_not_on_the_page(job: Job) -> None:
    for rank, code in enumerate((0, 75, 130)):
        job.rank(rank, "error: told and mended\n", code, ended=3.0)
    assert "Nothing in its logs looks like an error." in job.page()


def test_a_node_that_was_not_fit_comes_first(job: Job) -> None:
    for node, problems in {"n1": {"all_reduce": "it takes too long"}, "n2": {"gpus": "shows 7 GPUs"}}.items():
        row = {"node": node, "problems": problems}
        (job.folder / "preflight" / "attempt_001" / f"{node}.json").write_text(json.dumps(row))
    page = job.page()
    assert section(page, "before it started") == "before it started:\n  n2: shows 7 GPUs\n  n1: it takes too long"
    assert read_attempts(job.folder)[0].reason.endswith(" n2: shows 7 GPUs")


@pytest.mark.parametrize("ended", ["NaN", "1e300", "-1", '"later"', "null", "true"])
@pytest.mark.parametrize(
    "other",
    ['"host": {"x": 1}', '"host": "\\ud800"', '"pid": "x"', '"exit_code": 99999999999999999999999', '"exit_code": [1]'],
)
def test_rows_may_hold_anything(job: Job, ended: str, other: str) -> None:
    (job.logs / "rank_0000.json").write_text(f'{{"rank": 0, "ended": {ended}, {other}}}')
    (job.run_dir / "events.jsonl").write_text(
        '{"event": "failed", "time": "2999", "rank": 0, "error": {}, "step": [1]}'
    )
    page = job.page()
    assert "rank 0 on" in section(page, "first")
    write_whole(job.folder / "errors.txt", page)


def test_logs_may_hold_anything(job: Job) -> None:
    log = (
        b"\xff\xfe\0\x1b[31mstep 5\x1b[0m\r\x1b[Kstep 6/9  loss 1\rstep 7/9  loss 1\n"
        + b"x" * 10**6
        + b"\nerror: so\r\n"
    )
    job.rank(0, "", 1, ended=3.0)
    (job.logs / "rank_0000.log").write_bytes(log)
    (job.logs / "rank_x.log").write_bytes(b"")
    (job.logs / "rank_0007.log").mkdir()
    page = job.page()
    assert "error: so" in section(page, "first") and page.isprintable() is False
    assert all(character.isprintable() or character == "\n" for character in page)
    assert max(map(len, page.splitlines())) < 500


# --- as a command -------------------------------------------------------------------------------------------------


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["errors", *map(str, arguments)])
    with pytest.raises(SystemExit) as leaving:
        run(errors.main)
    return leaving.value.code


def test_any_attempt_can_be_asked_for(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job.rank(0, "error: of the first\n", 1, ended=3.0)
    end(job.folder, 1)
    begin(job.folder, job.run_dir, None, 3, [])
    assert call(monkeypatch, job.folder) == 0 and "Nothing in its logs" in capsys.readouterr().out
    assert call(monkeypatch, job.folder, "--attempt", "1") == 0 and "of the first" in capsys.readouterr().out
    assert call(monkeypatch, job.folder, "--attempt", "9") == 2
    assert capsys.readouterr().err == f"error: {job.folder}: has no attempt 9; its attempts are 1-2.\n"
    assert call(monkeypatch, job.folder.parent) == 2
    assert capsys.readouterr().err.endswith("begun there; give the folder of one of its tasks: pretrain.\n")
    assert call(monkeypatch, job.run_dir) == 2 and "give the folder of a job, RUN_DIR" in capsys.readouterr().err
    (job.run_dir / "attempts.jsonl").mkdir()
    assert call(monkeypatch, job.run_dir) == 2 and "cannot be read (Is a directory)" in capsys.readouterr().err
    assert call(monkeypatch, job.run_dir / "no") == 2 and "no such folder" in capsys.readouterr().err
