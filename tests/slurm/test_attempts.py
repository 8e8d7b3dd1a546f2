"""The ledger of attempts: what is requeued, what is not, and that nothing goes round for ever."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm import attempts
from slurm.attempt_files import (
    DONE,
    FAILED,
    LEDGER,
    LOGS,
    REQUEUE,
    STOP,
    Attempt,
    CommandError,
    append_row,
    attempt_name,
    read_attempts,
    read_rows,
    run,
)
from slurm.attempts import MAX_STALLS, Standing, begin, command_exit_code, end, judge, newest_step, progress

REPOSITORY = Path(__file__).resolve().parent.parent.parent
LOST = -1  # as an exit code: nobody was left to note it
JOB = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "", "SLURM_ARRAY_TASK_ID": ""}


@pytest.fixture(autouse=True)
def _in_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # hundreds of rows take minutes on a busy disk


def save_checkpoint(run_dir: Path, step: int, *, is_complete: bool = True) -> None:
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    if is_complete:
        (folder / "COMPLETE").touch()


def note_rank(folder: Path, number: int, rank: int, exit_code: int | None) -> None:
    row = {"rank": rank, "host": "n1", "pid": 100 + rank, "started": 1.0}
    path = folder / LOGS / attempt_name(number) / f"rank_{rank:04d}.json"
    path.write_text(json.dumps(row if exit_code is None else {**row, "ended": 2.0, "exit_code": exit_code}))


def attempt(folder: Path, exit_code: int | None, *, run_dir: Path | None = None, max_failures: int = 3) -> str | None:
    """One whole attempt; None as exit code: nobody notes its end."""
    begin(folder, run_dir, None, max_failures, ["n1", "n2"])
    return None if exit_code is None else ended(folder, exit_code).verdict


def ended(folder: Path, exit_code: int) -> Attempt:
    """The newest attempt, of one rank."""
    note_rank(folder, read_attempts(folder)[-1].number, 0, exit_code)
    return end(folder, exit_code)


# --- verdicts -----------------------------------------------------------------------------------------------------


@given(
    history=st.lists(st.tuples(st.sampled_from([0, 1, 2, 75, 93, 137, LOST]), st.integers(-20, 20)), max_size=12),
    max_failures=st.integers(0, 4),
)
def test_the_verdict_is_what_the_rules_in_words_say(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[int, int]], max_failures: int
) -> None:
    """Any history of attempts, each of which ends so and with so many steps more or, for a damaged checkpoint, less."""
    folder = tmp_path_factory.mktemp("job")
    job, run_dir = folder / "job", folder / "run"
    step = best = failures = stalls = 0
    for code, move in history:
        begin(job, run_dir, None, max_failures, [])
        step = max(0, step + move)
        shutil.rmtree(run_dir, ignore_errors=True)
        save_checkpoint(run_dir, step)
        if step > best:
            best, failures, stalls = step, 0, 0
        elif code == 75:
            stalls += 1
        failures += code not in (0, 75)
        if code == LOST:
            if failures <= max_failures:
                begin(job, run_dir, None, max_failures, [])
                assert read_attempts(job)[-2].verdict == REQUEUE
                assert ended(job, 0).verdict == DONE
            else:
                with pytest.raises(CommandError):
                    begin(job, run_dir, None, max_failures, [])
            return
        verdict = ended(job, code).verdict
        if code == 75:
            assert verdict == (STOP if stalls == 2 else REQUEUE)
        elif code in (1, 137):
            assert verdict == (FAILED if failures > max_failures else REQUEUE)
        else:
            assert verdict == {0: DONE, 2: FAILED, 93: STOP}[code]
        if verdict != REQUEUE:
            return


@given(codes=st.lists(st.sampled_from([1, 75, 137, None]), min_size=20, max_size=20), max_failures=st.integers(0, 6))
def test_without_progress_it_ends(codes: Sequence[int | None], max_failures: int) -> None:
    """Whatever goes wrong in whatever order, a job that gets no further is not started for ever."""
    standing = Standing(best_step=10)
    for number, code in enumerate(codes, 1):
        standing = standing.after(code, 10)
        if judge(standing, code, max_failures) != REQUEUE:
            assert number <= max_failures + 1 + MAX_STALLS
            return
    raise AssertionError("it is still requeued")


@given(codes=st.lists(st.sampled_from([1, 75, 137, None]), max_size=30))
def test_with_progress_it_goes_on(codes: Sequence[int | None]) -> None:
    standing = Standing(best_step=0)
    for step, code in enumerate(codes, 1):
        standing = standing.after(code, step)
        assert judge(standing, code, max_failures=1) == REQUEUE


@pytest.mark.parametrize(("code", "verdict"), [(75, STOP), (1, FAILED)])
def test_where_no_progress_can_be_seen_all_attempts_count(code: int, verdict: str) -> None:
    """An evaluation that is longer than its time limit."""
    standing, verdicts = Standing(), []
    for _ in range(3):
        standing = standing.after(code, None)
        verdicts.append(judge(standing, code, max_failures=2))
    assert verdicts == [REQUEUE, REQUEUE, verdict]


# --- the ledger ---------------------------------------------------------------------------------------------------


def test_failures_in_a_row_end_a_job_and_a_checkpoint_between_them_does_not(tmp_path: Path) -> None:
    job, run_dir = tmp_path / "job", tmp_path / "run"
    assert [attempt(job, 1, run_dir=run_dir, max_failures=2) for _ in range(2)] == [REQUEUE, REQUEUE]
    save_checkpoint(run_dir, 10)  # during an attempt that then fails, too
    assert [attempt(job, 1, run_dir=run_dir, max_failures=2) for _ in range(3)] == [REQUEUE, REQUEUE, FAILED]
    assert [one.step for one in read_attempts(job)] == [0, 0, 10, 10, 10]
    assert read_attempts(job)[-1].reason == (
        "attempt 5 failed at step 10 with exit code 1; failure 3 in a row without progress, more than 2. rank 0 on n1: "
        "ended with exit code 1 and without an error message"
    )


def test_only_complete_checkpoints_are_progress(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert newest_step(run_dir) == 0
    save_checkpoint(run_dir, 10)
    save_checkpoint(run_dir, 30, is_complete=False)
    save_checkpoint(run_dir / "checkpoints" / "damaged", 40)
    assert newest_step(run_dir) == 10
    (run_dir / "checkpoints" / "step_more").mkdir()
    (run_dir / "checkpoints" / "step_more" / "COMPLETE").touch()
    assert newest_step(run_dir) == 10


def test_a_checkpoint_that_is_damaged_again_and_again_is_no_progress(tmp_path: Path) -> None:
    job, run_dir = tmp_path / "job", tmp_path / "run"
    for verdict in (REQUEUE, REQUEUE, STOP):
        begin(job, run_dir, None, 3, [])
        save_checkpoint(run_dir, 10)
        assert end(job, 75).verdict == verdict
        (run_dir / "checkpoints" / "step_00000010" / "COMPLETE").unlink()
        (run_dir / "checkpoints" / "step_00000010").rmdir()


def test_records_are_counted_while_another_task_tidies_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.json").touch()
    scandir = os.scandir

    def losing_a(path: Any) -> Any:
        if str(path).endswith("/a"):
            shutil.rmtree(path, ignore_errors=True)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", losing_a)
    assert progress(None, tmp_path) == 1


def test_finished_records_of_a_build_are_progress(tmp_path: Path) -> None:
    job, staging = tmp_path / "job", tmp_path / "data.staging"
    (staging / "curated").mkdir(parents=True)
    verdicts = []
    for record in (True, True, False, False):
        number = begin(job, None, staging, 3, [])
        if record:
            (staging / "curated" / f"{number}.json").touch()
        verdicts.append(end(job, 75).verdict)
    assert verdicts == [REQUEUE, REQUEUE, REQUEUE, STOP]
    assert "at record 2" in read_attempts(job)[-1].reason


def test_a_lost_attempt_is_a_failure_that_the_next_one_notes(tmp_path: Path) -> None:
    job = tmp_path / "job"
    attempt(job, None)
    assert read_attempts(job)[-1].verdict is None
    attempt(job, None)
    first, second = read_attempts(job)
    assert first.verdict == REQUEUE and first.exit_code is None and "was lost" in first.reason
    assert second.verdict is None and second.nodes == ("n1", "n2")


def test_a_job_whose_nodes_are_lost_again_and_again_does_not_begin(tmp_path: Path) -> None:
    job = tmp_path / "job"
    for _ in range(2):
        attempt(job, None, max_failures=1)
    with pytest.raises(CommandError, match=r"attempt 2 was lost: .*failure 2 in a row without progress, more than 1"):
        attempt(job, None, max_failures=1)
    assert read_attempts(job)[-1].verdict == FAILED


def test_a_new_submission_counts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tmp_path / "job"
    assert [attempt(job, 1, max_failures=1) for _ in range(2)] == [REQUEUE, FAILED]
    assert attempt(job, 1, max_failures=1) == REQUEUE  # requeued by hand
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert [attempt(job, 1, max_failures=1) for _ in range(2)] == [REQUEUE, FAILED]
    assert [one.number for one in read_attempts(job)] == [1, 2, 3, 4, 5]


def test_submissions_do_not_close_each_others_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tmp_path / "job"
    begin(job, None, None, 3, [])
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    begin(job, None, None, 3, [])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert end(job, 1).number == 1
    with pytest.raises(CommandError, match="no attempt of this job is at work"):
        end(job, 0)
    assert [one.verdict for one in read_attempts(job)] == [REQUEUE, None]


@pytest.mark.parametrize(("count", "noted"), [(None, 0), ("3", 3), ("many", None)])
def test_slurms_own_count_of_restarts_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: str | None, noted: int | None
) -> None:
    monkeypatch.setattr(os, "environ", {**JOB, **({"SLURM_RESTART_COUNT": count} if count else {})})
    begin(tmp_path, None, None, 3, [])
    assert read_rows(tmp_path / LEDGER)[0]["restarts"] == noted


def test_tasks_of_an_array_are_jobs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "20")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert attempts.job_id_in_environment() == "20_3"


# --- cut by a kill ------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_whatever_a_kill_leaves_of_the_last_row_the_ledger_goes_on(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    job = tmp_path_factory.mktemp("job")
    for code in (75, 1):
        attempt(job, code)
    text = (job / LEDGER).read_bytes()
    cut = data.draw(st.integers(0, len(text)), label="bytes left")
    (job / LEDGER).write_bytes(text[:cut])
    whole = read_rows(job / LEDGER)
    assert [json.loads(line) for line in text.splitlines()][: len(whole)] == whole
    number = begin(job, None, None, 3, [])
    assert number == 3  # its logs are there, if not its rows
    assert ended(job, 0).verdict == DONE
    rows = read_rows(job / LEDGER)
    assert rows[: len(whole)] == whole and rows[-1]["verdict"] == DONE
    assert all(one.verdict is not None for one in read_attempts(job))


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "3", '"begin"', "\0\0\0", "[" * 100_000, '{"event": "begin"}', '{"event": "end", "attempt": 9}'],
    ids=range(9),
)
def test_lines_that_are_no_rows_are_passed_over(tmp_path: Path, line: str) -> None:
    (tmp_path / LEDGER).write_text(line + "\n")
    assert read_attempts(tmp_path) == []
    append_row(tmp_path / LEDGER, {"event": "begin", "attempt": 1, "nodes": 5, "step": "x", "max_failures": None})
    assert [one.number for one in read_attempts(tmp_path)] == [1]


# --- how the command ended ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launcher", "ranks", "expected"),
    [
        (0, [0, 0], 0),
        (1, [75, 75], 75),  # torchrun's own code is 1 after every stop
        (0, [75, 75], 75),  # and 0 where ranks tell it that they are done
        (0, [75, None], 1),  # and after a job was cancelled
        (0, [None], 1),
        (0, [], 1),
        (1, [75, 130], 75),  # asked to stop while it still started
        (1, [1, 75], 1),  # a sibling that was ended for another's failure
        (137, [None, 75], 137),
        (1, [2, 1], 2),
        (1, [None, 2], 2),
        (1, [93, 93], 93),
        (1, [0, 0], 1),  # died while it was taken apart
        (1, [], 1),
        (75, [], 75),
        (2, [], 2),
    ],
)
def test_the_ranks_say_how_they_ended(tmp_path: Path, launcher: int, ranks: list[int | None], expected: int) -> None:
    begin(tmp_path, None, None, 3, [])
    for rank, code in enumerate(ranks):
        note_rank(tmp_path, 1, rank, code)
    (tmp_path / LOGS / "attempt_001" / "rank_0099.json").write_text("{")
    assert command_exit_code(tmp_path / LOGS / "attempt_001", launcher) == expected
    (tmp_path / LOGS / "attempt_001" / "rank_0098.json").write_text('{"rank": 98, "exit_code": [0]}')
    expected = expected if expected in (2, 93) else launcher or 1  # it may have ended otherwise
    assert command_exit_code(tmp_path / LOGS / "attempt_001", launcher) == expected


# --- as a command -------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Gives exit code, output and errors."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["attempts", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            run(attempts.main)
        assert isinstance(leaving.value.code, int)
        return leaving.value.code, *capsys.readouterr()

    return call


def test_it_needs_no_packages(tmp_path: Path) -> None:
    """A batch script calls it outside the container that has them."""
    code = (
        "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); sys.argv = sys.argv[1:]\n"
        "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    )
    program = [sys.executable, "-I", "-S", "-c", code, str(REPOSITORY), "slurm.attempts", "begin", str(tmp_path)]
    begun = subprocess.run(program, capture_output=True, text=True)
    assert (begun.returncode, begun.stdout, begun.stderr) == (0, "001\n", "")


def test_the_batch_script_gets_a_word_and_an_exit_code(tmp_path: Path, command: Callable[..., Any]) -> None:
    job, run_dir = tmp_path / "job", tmp_path / "run"
    beginning = ("begin", job, "--run-dir", run_dir, "--nodes", "n1,n2 n3", "--max-failures", "1")
    assert command(*beginning) == (0, "001\n", "")
    assert read_attempts(job)[0].nodes == ("n1", "n2", "n3")
    save_checkpoint(run_dir, 10)
    assert command("end", job, "--exit-code", "75") == (75, "requeue\n", "attempt 1 stopped cleanly at step 10.\n")
    assert not (job / "errors.txt").exists()
    for verdict, code in ((REQUEUE, 75), (FAILED, 137)):
        command(*beginning)
        code_here, out, error = command("end", job, "--exit-code", "137")
        assert (code_here, out) == (code, f"{verdict}\n")
        assert f"What went wrong is in {job / 'errors.txt'}" in error
    assert "attempt 3 failed at step 10 with exit code 137" in (job / "errors.txt").read_text()


def test_what_the_batch_script_knows_is_told_and_counts_more_than_what_ranks_say(
    tmp_path: Path, command: Callable[..., Any]
) -> None:
    command("begin", tmp_path)
    note_rank(tmp_path, 1, 0, 130)  # it was told to stop, and did
    code, out, _ = command("end", tmp_path, "--exit-code", "1", "--cause", "Ray has ended on n1.")
    assert (code, out) == (75, "requeue\n")
    ended = read_attempts(tmp_path)[-1]
    assert ended.exit_code == 1 and ended.reason.endswith(" Ray has ended on n1.")
    assert "Ray has ended on n1." in (tmp_path / "errors.txt").read_text()
    command("begin", tmp_path)
    note_rank(tmp_path, 2, 0, 130)
    command("end", tmp_path, "--exit-code", "1", "--cause", "")
    assert read_attempts(tmp_path)[-1].exit_code == 75


def test_what_cannot_be_noted_is_not_started_again(tmp_path: Path, command: Callable[..., Any]) -> None:
    begin(tmp_path, None, None, 3, [])
    ledger = tmp_path / LEDGER
    ledger.unlink()
    ledger.mkdir()  # root may write everywhere, so a full disk is played by what cannot be a file
    sentence = f"error: {ledger}: the attempt cannot be noted (Is a directory), so the job is not started again; "
    for arguments, expected in ((("begin", tmp_path), ""), (("end", tmp_path, "--exit-code", "1"), "failed\n")):
        code, out, error = command(*arguments)
        assert (code, out) == (1, expected) and error.startswith(sentence)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: command"),
        (["start", "."], "invalid choice"),
        (["end", "."], "the following arguments are required: --exit-code"),
        (["end", ".", "--exit-code", "-1"], "--exit-code"),
        (["end", ".", "--exit-code", "256"], "give a number from 0 to 255"),
        (["end", "/nowhere", "--exit-code", "1"], "/nowhere: no such folder"),
        (["begin", "job", "--max-failures", "many"], "'many' is not a whole number"),
    ],
)
def test_mistakes_are_told_in_one_sentence(command: Callable[..., Any], arguments: list[str], sentence: str) -> None:
    code, out, error = command(*arguments)
    assert code == 2 and out == ""
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error


@pytest.mark.parametrize("name", ["attempt_files", "attempts", "errors", "preflight", "rank"])
def test_it_is_written_for_the_python_of_a_cluster(name: str) -> None:
    """Not a whole proof: the grammar of 3.9, which is what many clusters have outside of containers."""
    source = (REPOSITORY / "slurm" / f"{name}.py").read_text()
    ast.parse(source, feature_version=(3, 9))
    assert "from __future__ import annotations" in source
