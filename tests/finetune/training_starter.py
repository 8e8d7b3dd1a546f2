"""Starts training commands by forking, and has them note which samples every step is taken on.

Importing torch and DeepSpeed anew for each of many starts would take most of a test's time. Reads a JSON line per
start: `module` (such as pretrain.train), `config` (a YAML file), `num_ranks`, `notes` (a new folder) and `last_step`,
after which ranks wait until `notes` holds the file `killed` (null: they do not). Answers with the ids of the ranks'
processes, and when they have ended with their exit codes, a JSON line each.
"""

import json
import os
import runpy
import socket
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import pretrain.steps
from pretrain.draws import SampleDraws

sample_draws = pretrain.steps.sample_draws
notes = Path()
last_step: int | None = None


def noted(engine: Any, seed: int, step: int, batch: dict[str, Any], stream: str = "train") -> SampleDraws:
    """What the training loop asks for, once before every step."""
    if stream == "train":
        while last_step is not None and step > last_step and not (notes / "killed").exists():
            time.sleep(0.01)
        with (notes / f"rank_{engine.data_rank}.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "keys": batch["keys"]}) + "\n")
    return sample_draws(engine, seed, step, batch, stream)


pretrain.steps.sample_draws = noted  # before anybody takes it from there

import finetune.train  # noqa: E402, F401  # imports all that either command does


def run(order: dict[str, Any], rank: int, port: int) -> NoReturn:
    global notes, last_step
    os.setsid()
    os.dup2(2, 1)  # what is told is not for the test
    notes, last_step = Path(order["notes"]), order["last_step"]
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


def reserved_port() -> socket.socket:
    """A socket whose port nobody else is given while it is open; ranks may listen there, for it does not."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    one.bind(("127.0.0.1", 0))
    return one


def answer(numbers: list[int]) -> None:
    sys.stdout.write(json.dumps(numbers) + "\n")
    sys.stdout.flush()


def main() -> None:
    for line in sys.stdin:
        order, pids = json.loads(line), []
        with reserved_port() as reserved:
            for rank in range(order["num_ranks"]):
                pids.append(os.fork())
                if not pids[-1]:
                    run(order, rank, reserved.getsockname()[1])
            answer(pids)
            answer([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])


if __name__ == "__main__":
    main()
