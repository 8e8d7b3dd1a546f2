"""A run whose disk fills up while it trains, on a disk of 4 MB that is mounted for this process alone.

unshare --map-root-user --mount python full_disk.py FOLDER        prints what was seen, as JSON
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from configs.loader import UserError
from pretrain.checkpoint import Checkpoints
from pretrain.events import EventLog
from pretrain.metrics import MetricsLog, read_metrics

sys.path.insert(0, str(Path(__file__).parent))
from tiny_training import tiny_config, tiny_run

NUM_STEPS, FULL_FROM = 12, 7  # a checkpoint is due at steps 5, 10 and 12


def fill(disk: Path) -> None:
    try:
        with (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        pass


def told_by(work: Any) -> str:
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


def train(disk: Path) -> dict[str, Any]:
    settle = Checkpoints.settle

    def settle_before_it_is_full(checkpoints: Checkpoints, wait_for_it: bool = False) -> None:
        settle(checkpoints, wait_for_it or not (disk / "filler").exists())

    def on_step(step: int) -> None:
        if step == FULL_FROM:
            fill(disk)

    config = tiny_config(disk / "run", NUM_STEPS, log_every=100)
    with patch.object(Checkpoints, "settle", settle_before_it_is_full):
        told = told_by(lambda: tiny_run(config, on_step=on_step))
    left = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
    (disk / "filler").unlink()
    return {"told": told, "left": left, "again": tiny_run(config), "events": rows(disk / "run" / "events.jsonl")}


def note(disk: Path) -> dict[str, Any]:
    """More than the last page of a file has room for."""
    metrics = MetricsLog(disk / "metrics.jsonl", 0, is_main=True)
    with EventLog(disk, 0, 0, "one rank") as events:
        metrics.write({"step": 0, "split": "train"})
        fill(disk)
        told = told_by(lambda: [metrics.write({"step": n, "split": "train", "note": "x" * 100}) for n in range(100)])
        for number in range(100):
            events.note("trouble", number=number, note="x" * 100)
        had_room = not (disk / ".reserve").exists()
    metrics.close()
    (disk / "filler").unlink()
    whole = len(read_metrics(disk / "metrics.jsonl"))
    MetricsLog(disk / "metrics.jsonl", 1000, is_main=True).close()
    kept = rows(disk / "metrics.jsonl")
    num_events = len(rows(disk / "events.jsonl"))
    return {"told": told, "events": num_events, "had_room": had_room, "metrics": [whole, len(kept)]}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    disk = Path(sys.argv[1])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], check=True)
    sys.stdout.write(json.dumps({"train": train(disk), "note": note(disk)}) + "\n")
