"""Ends a chain: whatever of it waits or works. What it has saved stays, and `slurm.resubmit` goes on from there.

python -m slurm.cancel RUN_DIR
"""

import sys
from pathlib import Path

from pydantic import Field

from configs.loader import StrictConfig, UserError, run_command

from . import scheduler
from .jobs import read_submissions


class CancelConfig(StrictConfig):
    """Which chain."""

    run_dir: Path = Field(description="of the chain")


def main(config: CancelConfig) -> int:
    submissions = read_submissions(config.run_dir)
    if not submissions:
        raise UserError(f"{config.run_dir}: no job was submitted there; give the run_dir of a chain.")
    queue = scheduler.read_queue((one.job_id for one in submissions), ", so nothing is cancelled")
    alive = dict.fromkeys(job_id for job_id, _ in reversed(queue))  # those that wait for others first
    try:
        scheduler.cancel(list(alive))
    except UserError as error:
        raise UserError(f"of job {', '.join(alive)} not all may be cancelled: {error}") from None
    sys.stdout.write(f"cancelled {', '.join(alive)}\n" if alive else "nothing of it was waiting or at work\n")
    return 0


if __name__ == "__main__":
    run_command(main, CancelConfig, description=__doc__, positional="run_dir")
