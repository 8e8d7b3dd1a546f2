"""Jobs on a real cluster, with stages that only pretend: what the batch script does about how they end."""

import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from slurm.attempt_files import read_attempts

REPOSITORY = Path(__file__).resolve().parents[2]

# In attempt n it does the n-th of `does=ok,wait,7`: ends well, waits for a signal, exits with a code.
PRETENDED_STAGE = """
import os, re, signal, sys, time
from pathlib import Path

given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
if "--print-config" in sys.argv:
    if given["does"] == "nothing":
        sys.stderr.write("error: does=nothing cannot be.\\n")
        sys.exit(2)
    sys.stdout.write("{loader: {global_batch_size: 8}, engine: {grad_accum_steps: 1, sequence_parallel: 1}}")
    sys.exit(0)
attempt = int(re.search(r"attempt_(\\d+)", os.environ["ATTEMPT_LOGS"])[1])
plan = given["does"].split(",")
does = plan[min(attempt, len(plan)) - 1]
if does == "wait":
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(75))
    Path(os.environ["ATTEMPT_LOGS"], "waiting").touch()
    time.sleep(300)
sys.exit(0 if does == "ok" else int(does))
"""


class Chain:
    """A chain of pretended stages, and the commands that a user has for it."""

    def __init__(self, folder: Path, cluster: Any, env: str = "", scratch: Path | None = None) -> None:
        self.folder, self.cluster, self.run_dir = folder, cluster, folder / "run"
        for module in ("data_pipeline/build", "pretrain/train", "finetune/train", "finetune/evaluate"):
            (folder / module).parent.mkdir(exist_ok=True)
            (folder / f"{module}.py").write_text(PRETENDED_STAGE)
            (folder / module).with_name("__init__.py").touch()
        (folder / "none.yaml").write_text("")
        (folder / "env.sh").write_text(f"SCRATCH={scratch or folder / 'scratch'}\n{env}")

    def write(self, **stages: dict[str, Any]) -> None:
        shared = {"config": "none.yaml", "time": "5", "lead_s": 60}
        for name, stage in stages.items():
            if name in ("pretrain", "finetune"):
                stage.setdefault("preflight", False)
            stage["overrides"] = [f"does={stage.pop('does')}"]
        chain = {"run_dir": str(self.run_dir), "env": str(self.folder / "env.sh")}
        chain["stages"] = {name: {**shared, **stage} for name, stage in stages.items()}
        (self.folder / "chain.yaml").write_text(yaml.safe_dump(chain))

    def call(self, *words: str | Path, path: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**self.cluster.environment, "PYTHONPATH": str(REPOSITORY)}
        if path is not None:
            environment["PATH"] = path
        command = [sys.executable, "-m", *map(str, words)]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=120)

    def submit(self) -> None:
        process = self.call("slurm.submit", "--config", "chain.yaml")
        assert process.returncode == 0, process.stderr

    def status(self) -> str:
        process = self.call("slurm.status", self.run_dir)
        assert process.returncode == 0, process.stderr
        return process.stdout

    def jobs(self) -> list[dict[str, Any]]:
        return json.loads((self.run_dir / "jobs.json").read_text())["jobs"]

    def verdicts(self, task: str) -> list[str | None]:
        return [attempt.verdict for attempt in read_attempts(self.run_dir / "slurm" / task)]

    def wait_for_end(self) -> None:
        self.cluster.wait_until(lambda: not self.cluster.run("squeue", "--noheader"), "the queue to be empty")

    def wait_for_verdicts(self, task: str, verdicts: list[str], timeout_s: float = 90) -> None:
        self.wait_until(lambda: self.verdicts(task) == verdicts, f"{task}: {verdicts}", timeout_s)

    def wait_for_work(self, task: str, attempt: int = 1, timeout_s: float = 90) -> None:
        path = self.run_dir / "slurm" / task / f"logs/attempt_{attempt:03d}/waiting"
        self.wait_until(path.exists, str(path), timeout_s)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        try:
            self.cluster.wait_until(condition, what, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from None

    def said(self) -> str:
        logs = sorted((self.run_dir / "slurm").rglob("*.log"))
        return "\n".join(f"{log}:\n{log.read_text(errors='replace')}" for log in logs)


@pytest.fixture
def chain(cluster: Any, tmp_path: Path) -> Chain:
    tmp_path.chmod(0o755)
    return Chain(tmp_path, cluster)


# --- before submission --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"partition": "btch"}, 'stage pretrain: this cluster has no partition btch; did you mean "batch"?'),
        ({"nodes": 4}, "stage pretrain: needs 4 nodes, but partition batch has 2"),
        ({"gpus_per_node": 1}, "stage pretrain: SLURM refuses"),
        ({"does": "nothing"}, "stage pretrain, python -m pretrain.train: does=nothing cannot be."),
        ({"ranks_per_node": 3}, "loader.global_batch_size=8 cannot be cut equally for 1 node(s) of 3 rank(s)"),
        ({"sbatch": ["--nonsense"]}, "stage pretrain: SLURM refuses"),
    ],
)
def test_what_cannot_run_is_told_before_anything_is_submitted(chain: Chain, stage: dict[str, Any], said: str):
    chain.write(pretrain={"does": "ok", **stage})
    process = chain.call("slurm.submit", "--config", "chain.yaml")
    last = process.stderr.splitlines()[-1]
    assert process.returncode == 2 and last.startswith("error: ") and said in last
    assert not chain.cluster.run("squeue", "--noheader") and not (chain.run_dir / "jobs.json").exists()


@pytest.mark.parametrize("run_dir", [".", "/", "../.."])
def test_a_run_dir_that_is_not_its_own_is_refused(chain: Chain, run_dir: str):
    chain.write(pretrain={"does": "ok"})
    process = chain.call("slurm.submit", "--config", "chain.yaml", f"run_dir={run_dir}", "--dry-run")
    assert process.returncode == 2 and "choose a folder of its own" in process.stderr


def test_a_dry_run_needs_no_cluster_and_submission_says_that_it_does(chain: Chain):
    chain.write(pretrain={"does": "ok"})
    process = chain.call("slurm.submit", "--config", "chain.yaml", "--dry-run", path="/nowhere")
    assert process.returncode == 0 and "==> commands\npretrain_job=$(sbatch" in process.stdout
    assert not chain.run_dir.exists()
    process = chain.call("slurm.submit", "--config", "chain.yaml", path="/nowhere")
    assert process.returncode == 2 and "sbatch is not on the PATH" in process.stderr


# --- in the job ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_of_an_array_the_task_alone_is_requeued_that_failed_or_was_stopped(chain: Chain):
    """One of them has the id of the whole array."""
    presets = [{"name": "a", "overrides": ["does=wait,ok"]}, {"name": "b", "overrides": ["does=3,ok"]}]
    chain.write(finetune={"does": "ok", "presets": presets, "launcher": "srun"}, evaluate={"does": "ok"})
    chain.submit()
    finetune, evaluate = chain.jobs()
    assert evaluate["depends_on"] == [finetune["job_id"]] and finetune["tasks"] == {"0": "a", "1": "b"}
    chain.wait_for_verdicts("evaluate/b", ["done"])
    assert (chain.verdicts("finetune/a"), chain.verdicts("finetune/b")) == ([None], ["requeue", "done"])
    chain.cluster.run("scancel", "--signal=USR2", "--batch", f"{finetune['job_id']}_0")
    chain.wait_for_verdicts("evaluate/a", ["done"])
    assert [chain.verdicts(f"finetune/{name}") for name in "ab"] == [["requeue", "done"]] * 2
    assert chain.status().count(" done") == 4


@pytest.mark.slow
def test_a_chain_that_is_cancelled_stays_so_until_it_is_submitted_again(chain: Chain):
    chain.write(data={"does": "ok", "parts": 3}, pretrain={"does": "wait,ok", "launcher": "srun", "nodes": 2})
    chain.submit()
    chain.wait_for_work("pretrain")
    assert "data      3 done of 3 parts\npretrain  running" in chain.status()
    again = chain.call("slurm.submit", "--config", "chain.yaml")
    assert again.returncode == 2 and "was submitted before" in again.stderr
    assert chain.call("slurm.resubmit", chain.run_dir).returncode == 2  # nothing is due
    assert chain.call("slurm.cancel", chain.run_dir).returncode == 0
    chain.wait_for_end()
    assert chain.verdicts("pretrain") == ["requeue"]  # a clean stop, but of a job that is not to go on
    assert "pretrain  cancelled" in chain.status()
    assert chain.call("slurm.resubmit", chain.run_dir).returncode == 0
    chain.wait_for_end()
    assert chain.verdicts("pretrain") == ["requeue", "done"]
    assert [job["stage"] for job in chain.jobs()] == ["data", "pretrain", "pretrain"]


@pytest.mark.slow
def test_after_a_failure_what_is_due_runs_again_and_nothing_else(chain: Chain):
    presets = [{"name": "a", "overrides": ["does=ok"]}, {"name": "b", "overrides": ["does=2"]}]
    chain.write(finetune={"does": "ok", "presets": presets, "launcher": "srun"}, evaluate={"does": "ok"})
    chain.submit()
    chain.wait_for_end()
    assert chain.verdicts("finetune/b") == ["failed"]  # a mistake gets no other attempt
    assert chain.verdicts("evaluate/a") == ["done"] and chain.verdicts("evaluate/b") == []
    status = chain.status()
    assert "finetune  b failed" in status and "evaluate  b cancelled" in status
    assert f"to go on after a fix: python -m slurm.resubmit {chain.run_dir}" in status
    assert "stage finetune" in (chain.run_dir / "report.html").read_text() and "on one page: " in status
    stored = chain.run_dir / "chain.yaml"
    stored.write_text(stored.read_text().replace("does=2", "does=ok"))
    process = chain.call("slurm.resubmit", chain.run_dir)
    assert process.returncode == 0, process.stderr
    chain.wait_for_end()
    finetune, evaluate = chain.jobs()[2:]
    assert finetune["tasks"] == evaluate["tasks"] == {"1": "b"} and evaluate["depends_on"] == [finetune["job_id"]]
    assert chain.verdicts("finetune/b") == ["failed", "done"] and chain.verdicts("evaluate/b") == ["done"]
    assert chain.verdicts("finetune/a") == ["done"]
    assert "all stages are done" in (chain.run_dir / "report.html").read_text()


@pytest.mark.slow
def test_a_node_that_is_not_fit_is_left_out_of_the_next_attempt(chain: Chain):
    """By a Python that finds the second node unfit; the job goes on with one node."""
    row = '{"node": "%s", "problems": {%s}}\\n'
    (chain.folder / "python").write_text(f"""#!/bin/bash
    case "$*" in
    *"slurm.preflight check"*)
        [ $SLURMD_NODENAME = n1 ] || problem='"disk": "is full"'
        printf '{row}' $SLURMD_NODENAME "${{problem:-}}" >"$4/$SLURMD_NODENAME.json"
        ;;
    *) exec {sys.executable} "$@" ;;
    esac
    """)
    (chain.folder / "python").chmod(0o755)
    chain = Chain(chain.folder, chain.cluster, f"PYTHON={chain.folder}/python\n")
    chain.write(pretrain={"does": "ok", "nodes": {"min": 1, "max": 2}, "launcher": "srun", "preflight": True})
    chain.submit()
    chain.wait_for_end()
    attempts = read_attempts(chain.run_dir / "slurm/pretrain")
    assert [(one.nodes, one.verdict) for one in attempts] == [(("n1", "n2"), "requeue"), (("n1",), "done")], (
        chain.said()
    )


@pytest.fixture
def ray_chain(cluster: Any, tmp_path: Path) -> Chain:
    tmp_path.chmod(0o755)
    return Chain(tmp_path, cluster, scratch=cluster.folder / "scratch")  # Ray's sockets bear no long path


@pytest.mark.slow
def test_a_build_whose_ray_is_gone_is_ended_and_begins_again(ray_chain: Chain):
    """It waits for an answer that does not come: here, until it is told to stop."""
    ray_chain.write(data={"does": "wait,ok", "kind": "ray", "nodes": 2, "cpus_per_node": 1})
    ray_chain.submit()
    ray_chain.wait_for_work("data", timeout_s=240)
    (head,) = [pid for pid in ray_chain.cluster.processes("n1") if name_of(pid) == "gcs_server"]
    os.kill(head, signal.SIGKILL)
    ray_chain.wait_for_verdicts("data", ["requeue", "done"], timeout_s=240)
    (failed, _) = read_attempts(ray_chain.run_dir / "slurm/data")
    assert failed.exit_code == 1 and "Ray has ended on n1, where its head was" in failed.reason, failed.reason
    assert "ray_head.log" in failed.reason and "gcs_server" in (ray_chain.run_dir / "slurm/data/errors.txt").read_text()


@pytest.mark.slow
def test_a_ray_that_does_not_start_on_a_node_ends_the_attempt(ray_chain: Chain):
    stage = {"does": "wait", "kind": "ray", "nodes": 2, "cpus_per_node": 1, "max_failures": 1}
    ray_chain.write(data=stage)
    with ray_chain.cluster.sick_node("n2"):
        ray_chain.submit()
        ray_chain.wait_for_verdicts("data", ["requeue", "failed"], timeout_s=240)
    for attempt in read_attempts(ray_chain.run_dir / "slurm/data"):
        assert "Ray has ended, or did not start, on one of n2" in attempt.reason, attempt.reason
        assert not (ray_chain.run_dir / f"slurm/data/logs/attempt_{attempt.number:03d}/waiting").exists()
    assert "ray_others.log" in ray_chain.status()


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:  # it has ended
        return ""


@pytest.mark.slow
def test_a_signal_that_comes_before_the_ranks_is_a_clean_stop(chain: Chain):
    """By a Python that takes long to start, and knows nothing of signals until it has."""
    marker = chain.folder / "starting"
    (chain.folder / "python").write_text(f"""#!/bin/bash
    case "$*" in
    *slurm.rank*) [ -e {marker} ] || {{ touch {marker}; exec sleep 300; }} ;;
    esac
    exec {sys.executable} "$@"
    """)
    (chain.folder / "python").chmod(0o755)
    chain = Chain(chain.folder, chain.cluster, f"PYTHON={chain.folder}/python\n")
    chain.write(pretrain={"does": "ok", "launcher": "srun"})
    chain.submit()
    chain.cluster.wait_until(marker.exists, f"{marker}\n{chain.said()}")
    chain.cluster.run("scancel", "--signal=USR2", "--batch", chain.jobs()[0]["job_id"])
    chain.wait_for_end()
    attempts = read_attempts(chain.run_dir / "slurm/pretrain")
    assert [(one.exit_code, one.verdict) for one in attempts] == [(75, "requeue"), (0, "done")], chain.said()


def test_a_container_is_given_the_command_and_the_folders(chain: Chain):
    """By a stand-in for apptainer, which notes what it was called with and runs the rest of it."""
    (chain.folder / "bin").mkdir()
    (chain.folder / "bin/apptainer").write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$@" >> {chain.folder}/called\nshift 5\n[ "$1" = {chain.folder}/image.sif ]\n'
        'shift; exec "$@"\n'
    )
    (chain.folder / "bin/apptainer").chmod(0o755)
    (chain.folder / "image.sif").touch()
    env = f"CONTAINER=apptainer\nIMAGE={chain.folder}/image.sif\nMOUNTS=/etc:/host_etc\nPYTHON={sys.executable}\n"
    chain = Chain(chain.folder, chain.cluster, env + f"export PATH={chain.folder}/bin:$PATH\n")
    chain.write(evaluate={"does": "ok"})
    chain.submit()
    chain.wait_for_end()
    assert chain.verdicts("evaluate") == ["done"], chain.said()
    called = (chain.folder / "called").read_text().split("\n")
    assert called[0] == "exec" and called[3:5] == ["--pwd", str(chain.folder)]
    assert {f"{chain.run_dir}:{chain.run_dir}", f"{REPOSITORY}:{REPOSITORY}", "/etc:/host_etc"} <= {
        *called[2].split(",")
    }


# --- in its first lines -------------------------------------------------------------------------------------------


def script_in(folder: Path, case: str = "1_node") -> str:
    """The first batch script of a case of test_dry_run.py, with paths that are there; that of a training."""
    scripts = runpy.run_path(str(Path(__file__).with_name("test_dry_run.py")))
    script, *_ = scripts["scripts_of"](case, folder)
    text = script.text.replace("/home/me/foresight/.venv/bin/python", sys.executable)
    text = text.replace("/home/me/foresight", str(REPOSITORY)).replace("/shared/runs", str(folder))
    text = text.replace("module load", "true").replace("timeout 60 srun", "true")
    return text.replace("SCRATCH=/tmp", f"SCRATCH={folder}")


@pytest.mark.parametrize(
    ("case", "change", "said"),
    [
        ("1_node", ("SCRATCH=", "SCRATCH=/proc/nowhere #"), "/proc/nowhere cannot be written"),
        ("1_node", ("WORK_DIR=", "WORK_DIR=/nowhere #"), "/nowhere cannot be entered"),
        ("1_node", ("set -u", "PATH=/nowhere\nset -u"), "there is no scontrol"),
        ("64_nodes", ("MAX_RAY_FOLDER=", "MAX_RAY_FOLDER=8 #"), "too long a path for Ray's sockets; shorten SCRATCH"),
    ],
)
def test_what_a_node_lacks_is_told_in_the_first_lines(tmp_path: Path, case: str, change: tuple[str, str], said: str):
    text = script_in(tmp_path, case)
    assert change[0] in text
    process = subprocess.run(
        ["/bin/bash"],
        input=text.replace(*change),
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1"},
    )
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2 and len(errors) == 1 and said in errors[0], process.stderr


def test_a_signal_that_comes_before_there_is_a_step_starts_none(tmp_path: Path):
    """As a preemption in the first second: nobody would pass it on later, and the job would be killed in the end."""
    commands = {
        "scontrol": 'case "$*" in *hostnames*) kill -USR2 $SCRIPT; echo n1 ;; *job*) echo JobState=RUNNING ;; esac',
        "srun": f"touch {tmp_path}/started",
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f'#!/bin/bash\necho "$*" >> {tmp_path}/called\n{text}\n')
        (tmp_path / name).chmod(0o755)
    environment = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_ON_NODE": "1",
    }
    process = subprocess.run(
        ["/bin/bash"],
        input=f"export SCRIPT=$$\n{script_in(tmp_path)}",
        capture_output=True,
        text=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **environment},
    )
    assert process.returncode == 75 and "USR2: the job is to end" in process.stdout, process.stdout + process.stderr
    assert not (tmp_path / "started").exists()
    assert "requeue 7" in (tmp_path / "called").read_text()
    assert [one.verdict for one in read_attempts(tmp_path / "small/slurm/pretrain")] == ["requeue"]


# --- in its last lines --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("time_s", "limit"), [(29, None), (40, "10"), (3600, "300")])
def test_the_page_of_a_chain_is_no_reason_to_meet_the_time_limit(time_s: int, limit: str | None):
    """The next stage would not start."""
    text = (REPOSITORY / "slurm/job.sh").read_text()
    function = "write_report" + text.partition("\nwrite_report")[2].partition("\n}\n")[0] + "\n}\n"
    settings = f"TIME_S={time_s} SRUN=(srun) PYTHON=(python) NODES='n1 n2' CHAIN_DIR=/run\n"
    calls = 'timeout() { echo "$*"; }\nunset SECONDS\nSECONDS=0\nwrite_report\n'  # a clock that stands still
    process = subprocess.run(["bash", "-c", function + settings + calls], capture_output=True, text=True)
    called = "srun --overlap --nodes=1 --ntasks=1 --nodelist=n1 python -m slurm.report /run\n"
    assert (process.returncode, process.stdout) == (0, f"{limit} {called}" if limit else ""), process.stderr
