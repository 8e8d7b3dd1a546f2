"""What is made of the words of SLURM's commands, where no test cluster says them."""

import pytest

from configs.loader import UserError
from slurm import scheduler

HOUR = 3600


@pytest.fixture
def sinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of three partitions, one of which has two kinds of nodes."""
    said = "gpu*|6|1-00:00:00\ngpu*|2|1-00:00:00\nlong|4|7-00:00:00\ncpu|100|infinite\n"
    monkeypatch.setattr(scheduler, "_run", lambda *command: said)


@pytest.mark.parametrize(
    ("partition", "num_nodes", "time_s", "said"),
    [
        ("", 8, 24 * HOUR, None),
        ("cpu", 100, 1000 * HOUR, None),
        ("gpu,long", 8, 30 * HOUR, None),
        ("", 9, HOUR, "needs 9 nodes, but partition gpu has 8"),
        ("gpu", 1, 25 * HOUR, r"its time is more than partition gpu allows \(1-00:00:00\)"),
        ("gpu,long", 1, 200 * HOUR, "its time is more than"),
        ("lng", 1, HOUR, r'no partition lng; did you mean "long"\?$'),
        ("xyz", 1, HOUR, r"no partition xyz; it can be cpu, gpu, long\.$"),
    ],
)
def test_what_a_partition_has_not_is_told(sinfo: None, partition: str, num_nodes: int, time_s: int, said: str | None):
    if said is None:
        scheduler.check_partition(partition, num_nodes, time_s, "here")
        return
    with pytest.raises(UserError, match=f"^here: .*{said}"):
        scheduler.check_partition(partition, num_nodes, time_s, "here")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "sbatch: error: invalid partition specified: x\nallocation failure: Invalid partition\n",
            "invalid partition specified: x",
        ),
        (
            "sbatch: warning: can't honor --ntasks-per-node\nsbatch: error: ----------\n"
            "sbatch: error: Your account has no hours left.\nsbatch: error: Batch job submission failed: Unspecified\n",
            "Your account has no hours left; Batch job submission failed: Unspecified",
        ),
        (
            "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n",
            "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        ),
        ("sbatch: Job 7 to start at 2026-11-30T14:18:00 using 1 processors\n", "no reason given"),
        (
            "scancel: error: Kill job error on job id 5: Access/permission denied\n",
            "Kill job error on job id 5: Access/permission denied",
        ),
        (
            "sbatch: unrecognized option '--x'\nTry \"sbatch --help\" for more information\n",
            "unrecognized option '--x'",
        ),
        ("", "no reason given"),
    ],
)
def test_what_was_complained_of_first_comes_first(text: str, sentence: str):
    assert scheduler._reason(text) == sentence


def test_a_command_is_submitted_with_what_it_waits_for(tmp_path):
    command = scheduler.submission(tmp_path / "job.sbatch", "afterok:12:13", "--array=1,3")
    assert command == [
        *("sbatch", "--parsable", "--dependency=afterok:12:13", "--array=1,3", str(tmp_path / "job.sbatch"))
    ]
