"""Starts training commands by forking, and has them note which samples every step is taken on.

Importing torch and DeepSpeed anew for each of many starts would take most of a test's time. Reads a JSON line per
start: `module` (such as pretrain.train), `config` (a YAML file), `num_ranks` and `notes` (a new folder). Answers with
the ids of the ranks' processes, and when they have ended with their exit codes, a JSON line each.
"""

import json
import os
import runpy
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

import pretrain.steps
from pretrain.draws import SampleDraws

sample_draws = pretrain.steps.sample_draws
notes = Path()


def noted(engine: Any, seed: int, step: int, batch: dict[str, Any], stream: str = "train") -> SampleDraws:
    """What the training loop asks for, once before every step."""
    if stream == "train":
        with (notes / f"rank_{engine.data_rank}.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "keys": batch["keys"]}) + "\n")
    return sample_draws(engine, seed, step, batch, stream)


pretrain.steps.sample_draws = noted  # before anybody takes it from there

import finetune.train  # noqa: E402, F401  # imports all that either command does


def run(order: dict[str, Any], rank: int, port: int) -> NoReturn:
    global notes
    os.setsid()
    os.dup2(2, 1)  # what is told is not for the test
    notes = Path(order["notes"])
    if order["num_ranks"] > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": order["num_ranks"]}
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["num_ranks"]}
        os.environ.update({name: str(value) for name, value in (address | place).items()})
    sys.argv = [order["module"], "--config", order["config"]]
    code = 1
    try:
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def answer(numbers: list[int]) -> None:
    sys.stdout.write(json.dumps(numbers) + "\n")
    sys.stdout.flush()


def main() -> None:
    for line in sys.stdin:
        order, port, pids = json.loads(line), free_port(), []
        for rank in range(order["num_ranks"]):
            pids.append(os.fork())
            if not pids[-1]:
                run(order, rank, port)
        answer(pids)
        answer([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])


if __name__ == "__main__":
    main()
