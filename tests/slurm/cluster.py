"""A real SLURM of two nodes on this machine: its own daemons, ports, sockets and folders, gone when it is left.

As a script it runs a command against such a cluster: `python tests/slurm/cluster.py sinfo --long`.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
NODES = ("n1", "n2")
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

# Below the ports that the kernel gives to whoever asks for any: nobody else takes one of these while a daemon is gone.
PORTS, NUM_CLUSTERS, MAX_JOBS = 18000, 6, 166

# cred_expire is also how long a requeued job waits before it starts anew: two minutes unless told otherwise.
# A machine that stalls for some seconds loses no node, no message and no batch script that is about to end.
# Two partitions, so that a job can be preempted: what is submitted to `urgent` takes the nodes of jobs in `batch`.
CONFIG = """
ClusterName=foresight
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
FirstJobId={first_job}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmdLogFile={folder}/slurmd_%n.log
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={folder}/task_prolog
MpiDefault=none
MailProg=/bin/true
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=300
MessageTimeout=60
KillWait=30
CompleteWait=0
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""

# What it prints is added to a task's environment.
TASK_PROLOG = """#!/bin/sh
[ ! -e {folder}/sick_"$SLURMD_NODENAME" ] || echo export PYTHONHOME=/nowhere
"""


def why_no_cluster() -> str:
    """What keeps this machine from running one, or nothing."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=SEARCH_PATH) is None]
    if missing:
        return f"needs {', '.join(missing)}: ./setup.sh --test-packages"
    if os.geteuid() != 0:
        return "needs root: a SLURM daemon that starts jobs runs as root"
    return ""


class Cluster:
    """As long as it is entered: a controller, two nodes of four CPUs (whatever the machine has), and munge.

    `environment` is what commands need to find it. Nothing that it started outlives it, jobs included.
    """

    def __init__(self) -> None:
        # Not pytest's folder, which is its owner's alone and too long a path for a socket: munge refuses both.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.config = self.folder / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.config), "PATH": SEARCH_PATH}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._claimed = contextlib.ExitStack()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    # --- what tests do with it ----------------------------------------------------------------------------------------

    def run(self, *command: str | Path, check: bool = True) -> str:
        """The output of one of SLURM's commands, or of any that calls them."""
        process = subprocess.run(
            [str(word) for word in command], env=self.environment, capture_output=True, text=True, timeout=120
        )
        assert not check or process.returncode == 0, f"{command}: {process.stdout}{process.stderr}"
        return process.stdout.strip()

    def submit(self, *arguments: str | Path) -> str:
        """The id of the job that sbatch makes of them."""
        return self.run("sbatch", "--parsable", *arguments)

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says of it: JobState, Restarts, NodeList, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job_id)))

    def wait_for_state(self, job_id: str, *states: str, timeout_s: float = 90) -> dict[str, str]:
        """The job, once it is in one of these states."""
        job: dict[str, str] = {}

        def has_come() -> bool:
            job.update(self.job(job_id))
            return job["JobState"] in states

        self.wait_until(has_come, f"job {job_id} to be {' or '.join(states)}", timeout_s)
        return job

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 90) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}\n{self.describe()}"
            time.sleep(0.2)

    def start_soon(self, job_id: str) -> None:
        """A requeued job that is held back (BeginTime) starts, but not in the second of its end: a node would take it
        for the job that has ended ("Job credential revoked")."""
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now+2")

    def lose_node(self, node: str) -> None:
        """As if its power was cut: daemon and jobs are gone in the same moment, and the controller is told."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        _end_all(lambda: self.processes(node))
        daemon.wait()
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def reset(self) -> None:
        """Back to no jobs and both nodes."""
        self.run("scancel", "--user=root")
        _end_all(self.processes)
        self.wait_until(lambda: not self.run("squeue", "--noheader"), "no jobs")
        for node in NODES:
            if node not in self._daemons:
                self.return_node(node)
        self._wait_for_nodes()

    def return_node(self, node: str) -> None:
        self._start_daemon(node, "slurmd", "-D", "-N", node, "-f", str(self.config))
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)  # it may be back already
        self._wait_for_nodes()

    @contextlib.contextmanager
    def sick_node(self, node: str) -> Iterator[None]:
        """While entered, it takes jobs but no Python starts there, as where a disk with the packages is gone."""
        marker = self.folder / f"sick_{node}"
        marker.touch()
        try:
            yield
        finally:
            marker.unlink()

    def processes(self, node: str | None = None) -> list[int]:
        """Ids of what runs in jobs here (on a node), and of the slurmstepd that looks after each."""
        marks = [f"SLURM_CONF={self.config}", f"SLURMD_NODENAME={node or ''}"]
        tasks = _processes_with(*marks)
        return sorted(tasks | {pid for pid in map(_parent, tasks) if _name(pid) == "slurmstepd"})

    def describe(self) -> str:
        """Queue, nodes and the ends of the daemons' logs: for messages."""
        if not self.config.exists():
            return ""
        logs = [f"{path.name}:\n" + "\n".join(_last_lines(path)) for path in sorted(self.folder.glob("*.log"))]
        return "\n".join([self.run("squeue", "--long", check=False), self.run("sinfo", "-N", check=False), *logs])

    # --- daemons ------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        place = self._claimed.enter_context(_claim_place())
        controller_port, *node_ports = (PORTS + 10 * place + number for number in range(1, 2 + len(NODES)))
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=8000 State=UNKNOWN"
            for node, port in zip(NODES, node_ports, strict=True)
        )
        self.config.write_text(
            CONFIG.format(
                host=host,
                controller_port=controller_port,
                first_job=1 + MAX_JOBS * place,
                folder=self.folder,
                nodes=nodes,
            )
        )
        prolog = self.folder / "task_prolog"
        prolog.write_text(TASK_PROLOG.format(folder=self.folder))
        prolog.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        names = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        munge = [f"--{option}={self.folder / name}" for option, name in names.items()]
        self._start_daemon("munged", "munged", "--foreground", *munge)
        self.wait_until((self.folder / "munge.socket").exists, "munged")
        self._start_daemon("slurmctld", "slurmctld", "-D", "-f", str(self.config))
        for node in NODES:
            (self.folder / f"spool_{node}").mkdir()
            self._start_daemon(node, "slurmd", "-D", "-N", node, "-f", str(self.config))
        self._wait_for_nodes()

    def _start_daemon(self, name: str, *command: str) -> None:
        """In the foreground, as a child that the kernel ends with us, however we end."""
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for the tests, who then stop them in order
            )

    def _wait_for_nodes(self) -> None:
        up = set(self._daemons) & set(NODES)

        def are_up() -> bool:
            for name, daemon in self._daemons.items():
                assert daemon.poll() is None, f"{name} ended: {_last_lines(self.folder / f'{name}.out')}"
            states = self.run("sinfo", "--noheader", "-N", "-p", "batch", "-o", "%N %T", check=False).splitlines()
            return up <= {line.split()[0] for line in states if line.split()[1] in ("idle", "mixed", "allocated")}

        self.wait_until(are_up, f"nodes {sorted(up)}")

    def stop(self) -> None:
        if "slurmctld" in self._daemons:
            self.run("scancel", "--user=root", check=False)
        for daemon in self._daemons.values():  # at once: their folder goes too, so there is nothing to put in order
            daemon.kill()
            daemon.wait()
        self._daemons.clear()
        # Jobs, whose daemons outlive ours.
        _end_all(lambda: _processes_with(f"SLURM_CONF={self.config}") - {os.getpid()})
        shutil.rmtree(self.folder, ignore_errors=True)
        self._claimed.close()


# --- processes ----------------------------------------------------------------------------------------------------


def _processes_with(*marks: str) -> set[int]:
    """Those whose environment holds all of these."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended
            environment = path.read_bytes().decode(errors="replace")
            if all(mark in environment for mark in marks):
                found.add(int(path.parent.name))
    return found


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _end_all(find: Callable[[], Iterable[int]]) -> None:
    """Until none is left: what is killed may have started others, and is there for a moment more."""
    deadline = time.monotonic() + 60
    while pids := list(find()):
        assert time.monotonic() < deadline, f"processes {pids} do not end"
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


@contextlib.contextmanager
def _claim_place() -> Iterator[int]:
    """A number that no other cluster on this machine has: its ports and its jobs' ids follow from it.

    Jobs meet at 20000 + id + 997 * attempt (`slurm/training.sbatch`): those of different places never at the same port.
    """
    for place in range(NUM_CLUSTERS):
        ports = range(PORTS + 10 * place, PORTS + 10 * place + 2 + len(NODES))
        with contextlib.ExitStack() as stack:
            claim, *others = (stack.enter_context(socket.socket()) for _ in ports)
            try:
                for one, port in zip((claim, *others), ports, strict=True):
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    one.bind(("127.0.0.1", port))
                    one.listen()
            except OSError:
                continue
            for one in others:  # which are for the daemons
                one.close()
            yield place
            return
    raise AssertionError(f"all of {NUM_CLUSTERS} clusters are at work on this machine")


def _last_lines(path: Path, number: int = 15) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").splitlines()[-number:]
    return []


def main(command: Sequence[str]) -> int:
    reason = why_no_cluster()
    if reason:
        sys.stderr.write(f"no cluster on this machine: {reason}\n")
        return 2
    with Cluster() as cluster:
        return subprocess.run(command, env=cluster.environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["sinfo"]))
