"""Goes on with a chain after something was put right: what is done stays, what failed, was stopped or never ran is due.

    python -m slurm.resubmit RUN_DIR                 submits it again, with its failures forgotten
    python -m slurm.resubmit RUN_DIR --dry-run       says what it would submit

The sbatch files are written anew, from RUN_DIR/chain.yaml (where time, nodes and the like may be changed), the configs
that it names and env.sh. What waits or works already is left alone, but for jobs that wait for one that has failed.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

from pydantic import Field

from configs.loader import StrictConfig, UserError, run_command

from . import scheduler
from .chain import ChainConfig, StageName
from .jobs import only_one, read_chain, read_states, read_submissions, refuse_changed_tasks, tasks_at_work
from .submit import check_partitions, submit_all, write_files, write_texts

WAITS_FOR_EVER = "DependencyNeverSatisfied"


class ResubmitConfig(StrictConfig):
    """Which chain."""

    run_dir: Path = Field(description="of the chain")
    dry_run: bool = Field(False, description="only say what is due")


def main(config: ResubmitConfig) -> int:
    chain = read_chain(config.run_dir)
    with nullcontext() if config.dry_run else only_one(chain.run_dir):
        return resubmit(chain, config.dry_run)


def resubmit(chain: ChainConfig, only_say: bool) -> int:
    submissions = read_submissions(chain.run_dir)
    queue = scheduler.read_queue((one.job_id for one in submissions), ", so nothing is submitted")
    ending = [job_id for (job_id, _), one in queue.items() if one.state == "COMPLETING"]
    if ending:
        raise UserError(f"{chain.run_dir}: job {ending[0]} is just ending; try again in a minute.")
    refuse_changed_tasks(chain, queue)
    waiting_for_ever = [key for key, one in queue.items() if one.reason == WAITS_FOR_EVER]
    states = read_states(chain, {key: one for key, one in queue.items() if key not in waiting_for_ever})
    due: dict[StageName, list[str]] = {}
    for state in states:
        if state.queued is None and not state.is_done:
            due.setdefault(state.job.stage, []).append(state.index)
            sys.stdout.write(f"{state.job.stage:9} {state.task.name}: {state.word}, so it is due\n")
    if not due:
        raise UserError(f"{chain.run_dir}: nothing is due; see `python -m slurm.status {chain.run_dir}`.")
    if only_say:
        return 0
    jobs = {state.job.stage: state.job for state in states if state.job.stage in due}
    check_partitions(chain, list(jobs.values()))
    scripts = write_texts(chain, list(jobs.values()))
    write_files(chain, scripts)
    scheduler.cancel([f"{job_id}_{index}" if index else job_id for job_id, index in waiting_for_ever])
    submit_all(chain.run_dir, scripts, due, tasks_at_work(states))
    return 0


if __name__ == "__main__":
    run_command(main, ResubmitConfig, description=__doc__, positional="run_dir")
