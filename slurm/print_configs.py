"""What a command makes of several configs: `--print-config` of all in one process, as its imports take seconds.

python -m slurm.print_configs < COMMANDS        [["pretrain.train", "--config", "c.yaml", "num_steps=5"], ...] as JSON

Writes a JSON list with an `Answer` for each: an exit code, and what it wrote to both outputs.
"""

import contextlib
import io
import json
import runpy
import sys
import traceback
from collections.abc import Sequence
from typing import NamedTuple


class Answer(NamedTuple):
    """As if the command had been run by itself."""

    exit_code: int
    output: str
    errors: str


def answer(command: Sequence[str]) -> Answer:
    sys.argv = [*command, "--print-config"]
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except Exception:
            traceback.print_exc()
            code = 1
    return Answer(code, output.getvalue(), errors.getvalue())


if __name__ == "__main__":
    answers = [answer(command) for command in json.load(sys.stdin)]
    json.dump(answers, sys.stdout)
