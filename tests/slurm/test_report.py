"""The page of a chain: every attempt and every figure on it, whatever state the chain is in; looked at in a browser."""

import json
import math
import re
import runpy
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from configs.loader import UserError, dump_config
from slurm import report, scheduler
from slurm.attempt_files import Attempt, append_row
from slurm.chain import ChainConfig
from slurm.jobs import Submission, write_submissions
from slurm.loss_curve import BOTTOM, LEFT, RIGHT, TOP, loss_curve

browser = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[1] / "data_pipeline" / "test_report_in_browser.py"))
)

STAGE = {"config": "c.yaml", "time": "04:00:00"}
PRESETS = ("joint", "actions_alone")
START = datetime(2026, 11, 30, 8, tzinfo=UTC)
ERRORS = "first:\n  rank 5 on n2 at step 240, reading /data/<pick>/000012.tar\n    error: sample cannot be used\n"


class ChainFolder:
    """A chain's folder as its jobs would leave it, minute by minute."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        stages = {
            "data": {**STAGE, "parts": 3},
            "pretrain": {**STAGE, "nodes": 8},
            "finetune": {**STAGE, "presets": [{"name": name} for name in PRESETS]},
            "evaluate": STAGE,
        }
        chain = ChainConfig(run_dir=run_dir, stages=stages)
        run_dir.mkdir()
        (run_dir / "chain.yaml").write_text(dump_config(chain))
        tasks = {
            "data": {str(i): f"part_{i}" for i in range(3)},
            "pretrain": {"": "pretrain"},
            **{stage: {str(i): name for i, name in enumerate(PRESETS)} for stage in ("finetune", "evaluate")},
        }
        ids = {"data": "7", "pretrain": "8", "finetune": "9", "evaluate": "10"}
        write_submissions(run_dir, [Submission(stage, ids[stage], names, [], "") for stage, names in tasks.items()])
        self.job_ids = {
            f"{stage}/{name}" if index else stage: f"{ids[stage]}_{index}" if index else ids[stage]
            for stage, names in tasks.items()
            for index, name in names.items()
        }

    def attempt(
        self, task: str, minutes: tuple[int, int], end: tuple[str, int | None, str] | None, steps: Any = (None, None)
    ) -> None:
        """`end`: verdict, exit code and reason; none: it is at work."""
        folder = self.run_dir / "slurm" / task
        folder.mkdir(parents=True, exist_ok=True)
        ledger = folder / "attempts.jsonl"
        number = 1 + (ledger.read_text().count('"begin"') if ledger.exists() else 0)
        began, ended = ((START + timedelta(minutes=m)).isoformat() for m in minutes)
        nodes = [f"n{i}" for i in range(1, 9)] if task == "pretrain" else ["n1"]
        row = {"event": "begin", "attempt": number, "time": began, "job_id": self.job_ids[task], "nodes": nodes}
        append_row(ledger, {**row, "max_failures": 3, "step": steps[0]})
        logs = folder / "logs" / f"attempt_{number:03d}"
        logs.mkdir(parents=True)
        (logs / "rank_0000.log").write_text("said\n")
        if end is not None:
            verdict, code, reason = end
            row = {"event": "end", "attempt": number, "time": ended, "exit_code": code, "step": steps[1]}
            append_row(ledger, {**row, "verdict": verdict, "reason": f"attempt {number} {reason}"})

    def train(self, task: str, num_steps: int, scale: float) -> None:
        folder = self.run_dir / task
        (folder / "export").mkdir(parents=True)
        (folder / "config.yaml").write_text(f"num_steps: {num_steps}\n")
        noise = np.random.default_rng(0)
        rows = [
            {"step": step, "split": "train", "loss": scale * (math.exp(-step / 80) + 0.2 + 0.04 * noise.normal())}
            for step in range(1, num_steps + 1)
        ]
        rows += [
            {"step": step, "split": "validation", "loss": scale * (math.exp(-step / 80) + 0.25)}
            for step in range(50, num_steps + 1, 50)
        ]
        rows.append({"step": "odd", "split": "train", "loss": [1]})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def evaluate(self, name: str, successes: int) -> None:
        rate = successes / 20
        policy = {"successes": successes, "episodes": 20}
        pooled = {**policy, "rate": rate, "interval": [max(0, rate - 0.2), min(1, rate + 0.2)]}
        blind = {"successes": 1, "episodes": 20}
        results = {
            "success": {"open <drawer>": {"policy": policy, "blind": blind}},
            "pooled": {"policy": pooled, "blind": {**blind, "rate": 0.05, "interval": [0.01, 0.24]}},
            "action_error": {"policy": {"l1": 0.0123, "mse": 0.001, "l1_normalised": 0.21, "mse_normalised": 0.1}},
            "seconds": 12.5,
        }
        (self.run_dir / "evaluate" / name).mkdir(parents=True)
        (self.run_dir / "evaluate" / name / "results.json").write_text(json.dumps(results))


DONE, STOPPED = ("done", 0, "is done."), ("requeue", 75, "stopped cleanly at step 150.")
FAILED = ("requeue", 1, "failed at step 240 with exit code 1; failure 1 in a row. rank 5 on n2: sample cannot be used")


def finished_chain(run_dir: Path) -> Path:
    chain = ChainFolder(run_dir)
    for index in range(3):
        chain.attempt(f"data/part_{index}", (index, 20 + 4 * index), DONE)
    for minutes, end, steps in (
        ((32, 80), STOPPED, (0, 150)),
        ((84, 110), FAILED, (150, 240)),
        ((112, 160), DONE, (240, 400)),
    ):
        chain.attempt("pretrain", minutes, end, steps)
    chain.train("pretrain", 400, 1.0)
    (run_dir / "slurm" / "pretrain" / "errors.txt").write_text(ERRORS)
    for index, name in enumerate(PRESETS):
        chain.attempt(f"finetune/{name}", (162, 200 + 9 * index), DONE, (0, 120))
        chain.train(f"finetune/{name}", 120, 0.5 + 0.2 * index)
        chain.attempt(f"evaluate/{name}", (210, 222 + 5 * index), DONE)
        chain.evaluate(name, 17 - 6 * index)
    return run_dir


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_chain(tmp_path_factory.mktemp("chain") / "wan")


@pytest.fixture(autouse=True)
def _no_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "is_here", lambda: False)


def page_of(run_dir: Path) -> str:
    assert report.main(report.ReportConfig(run_dir=run_dir)) == 0
    return (run_dir / "report.html").read_text()


def text_of(page: str) -> str:
    """As it is read, in one line."""
    body = re.sub(r"<[^>]*>", " ", page.partition("<body>")[2])
    return " ".join(body.split())


def test_a_finished_chain_is_told_from_attempts_to_policies(finished: Path):
    page = page_of(finished)
    text = text_of(page)
    for said in (
        "finished all stages are done",
        "3 h 47 min from 2026-11-30 08:00 on",
        "10 attempts: 1 stopped and went on, 1 failed",
        "85 % of tasks solved by joint",
        "data 3 parts done",
        "pretrain done , step 400 of 400, loss",
        "2 n1 and 7 more 11-30 09:24 26 min 150 to 240 failed at step 240 with exit code 1",
        "successes open &lt;drawer&gt; pooled policy 17 of 20 17 of 20 blind 1 of 20 1 of 20",
        "policy 0.0123 0.001 0.21 0.1",
    ):
        assert said in text, f"{said}\n{text}"
    links = re.findall(r'(?:href|src)="([^"]+)"', page)
    assert {"finetune/joint/export", "slurm/pretrain/logs/attempt_002/rank_0000.log"} <= set(links)
    assert [link for link in links if not (finished / link).exists()] == []


def test_a_chain_that_failed_shows_its_errors(tmp_path: Path):
    chain = ChainFolder(tmp_path / "run")
    for index in range(3):
        chain.attempt(f"data/part_{index}", (0, 9), DONE)
    chain.attempt("pretrain", (10, 30), FAILED, (0, 240))
    chain.attempt("pretrain", (31, 40), ("failed", 1, "failed at step 240 again."), (240, 240))
    (tmp_path / "run/slurm/pretrain/errors.txt").write_text(ERRORS)
    page = page_of(tmp_path / "run")
    assert "failed stage pretrain" in text_of(page)
    assert "reading /data/&lt;pick&gt;/000012.tar" in page and page.count("<pre>") == 1


@pytest.mark.parametrize("number", [0, 1])
def test_a_chain_that_has_hardly_begun_has_a_page(tmp_path: Path, number: int):
    chain = ChainFolder(tmp_path / "run")
    for index in range(number):
        chain.attempt(f"data/part_{index}", (0, 0), None)
    assert "not known" in text_of(page_of(tmp_path / "run"))


def test_what_other_programs_left_is_no_harm(tmp_path: Path):
    run_dir = finished_chain(tmp_path / "run")
    (run_dir / "evaluate/joint/results.json").write_text('{"pooled": {"policy": {"rate": "all"}}}')
    (run_dir / "pretrain/metrics.jsonl").write_text('{"step": 1, "split": "train"}\n[')
    append_row(run_dir / "slurm/pretrain/attempts.jsonl", {"event": "begin", "attempt": 4, "time": "?", "nodes": 7})
    text = text_of(page_of(run_dir))
    assert "55 % of tasks solved by actions_alone" in text
    assert "in the end" in text  # the losses of the other runs


def test_a_page_that_another_task_outdates_is_written_again(finished: Path, monkeypatch: pytest.MonkeyPatch):
    """Two evaluations end at once: the page of the one that looked first may be written last."""
    states = report.look(finished)
    looks = iter([states[:-1], states, states])
    monkeypatch.setattr(report, "look", lambda run_dir: next(looks))
    page_of(finished)
    assert next(looks, None) is None


# --- the curve ----------------------------------------------------------------------------------------------------


@given(
    losses=st.lists(st.floats(-1e6, 1e6) | st.none(), min_size=2, max_size=300),
    restarts=st.lists(st.integers(0, 300), max_size=5),
)
def test_a_curve_stays_in_its_picture(
    tmp_path_factory: pytest.TempPathFactory, losses: list[float | None], restarts: list[int]
):
    folder = tmp_path_factory.mktemp("run")
    rows = [{"step": step, "split": "train", "loss": loss} for step, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    attempts = [Attempt(n, "7", (), None, None, 3, "", step) for n, step in enumerate([0, *sorted(restarts)], start=1)]
    curve = loss_curve("a", folder, attempts)
    known = [loss for loss in losses if loss is not None]
    if len(known) < 2:
        assert curve is None
        return
    assert curve is not None and curve.last == pytest.approx(known[-1], rel=1e-2, abs=2e6)
    xs, ys = zip(*(map(float, point.split(",")) for point in curve.line.split()), strict=True)
    assert min(xs) >= LEFT and max(xs) <= RIGHT and list(xs) == sorted(xs)
    assert max(ys) <= BOTTOM and min(ys[len(ys) // 20 :]) >= TOP
    assert all(LEFT <= mark.x <= RIGHT for mark in curve.marks)
    assert len(curve.marks) == len({step for step in restarts if step <= max_step(losses)})


def max_step(losses: list[float | None]) -> int:
    return max(step for step, loss in enumerate(losses, start=1) if loss is not None)


# --- in a browser -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium; `./setup.sh --test-packages` installs it")
def test_a_browser_shows_it_all_without_a_request(finished: Path, tmp_path: Path):
    found, log = browser.probe(page_of(finished), tmp_path)
    assert found["width"] <= 1200 and found["requests"] == [] and "CONSOLE" not in log
    shutil.copy(finished / "report.html", tmp_path / "report.html")
    browser.browse(tmp_path / "report.html", tmp_path, f"--screenshot={tmp_path}/page.png", "--window-size=1200,3000")
    colours = np.unique(np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).reshape(-1, 3), axis=0)
    assert len(colours) > 30


def test_jinja_that_is_not_there_is_told(finished: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(UserError, match="the page needs jinja2"):
        page_of(finished)
