"""What `slurm.status` says, of every state that a task can be in and of files that a kill has cut short."""

import json
from pathlib import Path
from typing import Any

import pytest

from slurm.attempt_files import append_row
from slurm.chain import ChainConfig
from slurm.jobs import Submission, read_states, write_submissions
from slurm.scheduler import QueuedTask
from slurm.status import last_rows, outcome, progress, report

STAGE = {"config": "c.yaml", "time": "60"}
RUNNING = QueuedTask("RUNNING", "None", "1:00:00", "n[1-2]")
WAITING = QueuedTask("PENDING", "Resources", "1:00:00", "")


def chain_in(folder: Path) -> ChainConfig:
    presets = [{"name": name} for name in ("at_work", "waits", "fails", "stops", "is_lost", "never_began", "is_over")]
    chain = ChainConfig(
        run_dir=folder, stages={"data": {**STAGE, "parts": 3}, "finetune": {**STAGE, "presets": presets}}
    )
    parts = {str(index): f"part_{index}" for index in range(3)}
    names = {str(index): preset["name"] for index, preset in enumerate(presets)}
    write_submissions(folder, [Submission("data", "7", parts, [], ""), Submission("finetune", "8", names, ["7"], "")])
    for index in range(2):
        attempt(folder, f"data/part_{index}", f"7_{index}", "done")
    ends = {"at_work": None, "fails": "failed", "stops": "stop", "is_lost": None, "is_over": "requeue"}
    for index, name in names.items():
        if name in ends:
            attempt(folder, f"finetune/{name}", f"8_{index}", ends[name], f"why {name}.")
    return chain


def attempt(folder: Path, task: str, job_id: str, verdict: str | None, reason: str = "") -> None:
    ledger = folder / "slurm" / task / "attempts.jsonl"
    ledger.parent.mkdir(parents=True)
    append_row(ledger, {"event": "begin", "attempt": 1, "job_id": job_id, "nodes": ["n1"], "max_failures": 3})
    if verdict is not None:
        append_row(ledger, {"event": "end", "attempt": 1, "verdict": verdict, "reason": reason})


def test_every_state_has_its_word_and_says_what_to_do(tmp_path: Path):
    chain = chain_in(tmp_path)
    queue = {("7", "2"): RUNNING, ("8", "0"): RUNNING, ("8", "1"): WAITING}
    said = "\n".join(report(tmp_path, read_states(chain, queue)))
    for line in (
        "data      2 done, 1 running of 3 parts",
        "finetune  at_work running  job 8_0  on n[1-2], 1:00:00 left  attempt 1",
        "finetune  waits waiting  job 8_1  for Resources",
        "finetune  fails failed  job 8_2  attempt 1",
        "why fails.",
        "finetune  stops stopped  job 8_3  attempt 1",
        "finetune  is_lost lost  job 8_4  attempt 1",
        "finetune  never_began cancelled  job 8_5",
        "it never began: cancelled, or what it waits for failed",
        "finetune  is_over cancelled  job 8_6  attempt 1",
        f"to go on after a fix: python -m slurm.resubmit {tmp_path}",
    ):
        assert line in said, said


def test_a_job_that_ended_in_its_first_lines_says_why(tmp_path: Path):
    chain = chain_in(tmp_path)
    log = tmp_path / "slurm/finetune/batch_5.log"
    log.write_text("error: /scratch cannot be written on n1: is there room?\n")
    said = "\n".join(report(tmp_path, read_states(chain, {})))
    assert f"it never began: {log} ends with\n            error: /scratch cannot be written on n1" in said
    jobs = tmp_path / "jobs.json"
    jobs.write_text(jobs.read_text().replace('"submitted": ""', '"submitted": "2999-01-01T00:00:00+00:00"'))
    said = "\n".join(report(tmp_path, read_states(chain, {})))
    assert "cannot be written" not in said  # that was an earlier submission's


def test_without_the_queue_nothing_is_called_over(tmp_path: Path):
    states = read_states(chain_in(tmp_path), None)
    words = {state.task.name: state.word for state in states}
    assert words["at_work"] == words["waits"] == words["never_began"] == "not known"
    assert (words["part_0"], words["fails"], words["stops"]) == ("done", "failed", "stopped")
    assert not {"lost", "cancelled"} & {*words.values()}


def test_a_job_at_its_last_lines_is_told_by_how_its_attempt_ended(tmp_path: Path):
    queue = {("7", "0"): RUNNING, ("8", "2"): RUNNING, ("8", "3"): WAITING}
    words = {state.task.name: state.word for state in read_states(chain_in(tmp_path), queue)}
    assert (words["part_0"], words["fails"]) == ("done", "failed")
    assert words["stops"] == "waiting"  # somebody has requeued it by hand


# --- what a training and an evaluation leave ----------------------------------------------------------------------


def test_progress_is_read_off_the_last_whole_rows(tmp_path: Path):
    rows = [{"step": step, "split": "train", "loss": 1 / step, "step_s": 2.0} for step in range(1, 3000)]
    rows.insert(2000, {"step": 2000, "split": "validation", "loss": 0.25})
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3000, "spl'
    (tmp_path / "metrics.jsonl").write_text(text)
    (tmp_path / "config.yaml").write_text("num_steps: 4799\n")
    assert progress(tmp_path) == "step 2999 of 4799, loss 0.0003, 60 min to go"
    rows.append(rows.pop(2000))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert progress(tmp_path) == "step 2999 of 4799, loss 0.0003, held-out loss 0.2500, 60 min to go"
    assert len(last_rows(tmp_path / "metrics.jsonl")) < 2999


ODD = ["null", '"2.0"', "true", "[2.0]", '{"mean": 2.0}', "NaN", "Infinity", "1e999", "1" + "0" * 400, "[" * 10_000]


@pytest.mark.parametrize("settings", ["num_steps: 9\n", "num_steps: [\n", "num_steps: true\n", "- 9\n"])
@pytest.mark.parametrize("odd", ODD)
def test_odd_rows_are_no_harm(tmp_path: Path, odd: str, settings: str):
    (tmp_path / "config.yaml").write_text(settings)
    total = " of 9" if settings == "num_steps: 9\n" else ""
    for row in (odd, "{}", f'{{"step": {odd}, "split": "train"}}', f'{{"step": 1, "split": {odd}}}'):
        (tmp_path / "metrics.jsonl").write_text(row + "\n")
        assert progress(tmp_path) == ""
    for name in ("step_s", "loss"):
        sound = '{"step": 1, "split": "train"}\n'
        (tmp_path / "metrics.jsonl").write_text(f'{sound}{{"step": 1, "split": "train", "{name}": {odd}}}\n')
        assert progress(tmp_path) == f"step 1{total}"
    (tmp_path / "results.json").write_text(f'{{"pooled": {{"policy": {{"rate": {odd}, "interval": [0, {odd}]}}}}}}')
    assert outcome(tmp_path / "results.json").startswith(("see ", "success "))


@pytest.mark.parametrize(
    ("results", "said"),
    [
        ({"pooled": {"policy": {"rate": 0.85, "interval": [0.7, 0.94]}}}, "success 85% (70% to 94%)"),
        ({"action_error": {"policy": {"l1_normalised": 0.1234}}}, "action error 0.1234 (L1, normalised)"),
        ({"pooled": {"expert": {"rate": 1.0, "interval": [0.9, 1.0]}}}, "see "),
        ([], "see "),
    ],
)
def test_an_evaluation_is_told_in_a_few_words(tmp_path: Path, results: Any, said: str):
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert outcome(tmp_path / "results.json").startswith(said)
    assert outcome(tmp_path / "nothing.json") == ""
