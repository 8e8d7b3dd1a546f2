"""Jobs as plain sbatch files: options and settings first, then `job.sh` and the job's template, as they stand here."""

import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.loader import UserError

from .chain import ARRAY_INDEX, REPOSITORY, ChainConfig, DataConfig, Job, Task, TrainingConfig, job_folder, seconds
from .environment import MAX_RAY_FOLDER, Environment, filled_in

TEMPLATES = REPOSITORY / "slurm"
SCRIPT, SHARED = "job.sbatch", "job.sh"


@dataclass(frozen=True)
class Place:
    """Where the jobs are submitted, and so where they start: relative paths in configs mean the same in both."""

    work_dir: Path
    repository: Path
    python: Path

    @classmethod
    def here(cls) -> "Place":
        return cls(Path.cwd(), REPOSITORY, Path(sys.executable))


def render(job: Job, chain: ChainConfig, environment: Environment, place: Place, node_counts: Sequence[int]) -> str:
    """The text of a job's sbatch file. `node_counts`: numbers of nodes that it can use, smallest first."""
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in sbatch_options(job, chain, environment, node_counts)),
        "",
        f"# Stage {job.stage} of {chain.run_dir}, written by slurm.submit. All that it does stands here.",
        "",
        *preparations(environment),
        "set -u # and no -e: the exit code of a step decides what comes next",
        "",
        *settings(job, chain, environment, place, node_counts),
        *folders_to_mount(environment),
        "",
        *which_task(job),
    ]
    pieces = ["\n".join(lines) + "\n", *((TEMPLATES / name).read_text() for name in (SHARED, job.template))]
    return "\n".join(pieces)


def script_path(job: Job, chain: ChainConfig) -> Path:
    return job_folder(chain, job.stage) / SCRIPT


# --- options of sbatch --------------------------------------------------------------------------------------------


def sbatch_options(job: Job, chain: ChainConfig, environment: Environment, node_counts: Sequence[int]) -> Iterator[str]:
    config, cluster = job.config, environment.cluster
    yield f"--job-name={job.stage}-{chain.run_dir.name}"  # of which squeue shows eight characters
    for option, value in (
        ("partition", config.partition or cluster.partition),
        ("account", cluster.account),
        ("qos", cluster.qos),
    ):
        if value:
            yield f"--{option}={filled_in(value, str(environment.path))}"
    fewest, most = node_counts[0], node_counts[-1]
    yield f"--nodes={fewest}" if fewest == most else f"--nodes={fewest}-{most}"
    if config.cpus_per_node:
        yield f"--cpus-per-task={config.cpus_per_node}"  # a task per node: with --ntasks-per-node, 1-8 would mean 1
    if config.gpus_per_node:
        yield f"--gres=gpu:{config.gpus_per_node}"
    if config.memory:
        yield f"--mem={config.memory}"
    if config.exclusive:
        yield "--exclusive"
    yield f"--time={config.time}"
    yield f"--signal=B:USR2@{config.lead_s}"
    if job.is_array:
        yield array_option(list(job.tasks), job)
    yield f"--output={job_folder(chain, job.stage)}/{'batch_%a.log' if job.is_array else 'batch.log'}"
    yield "--open-mode=append"
    yield "--requeue"
    if most > 1:
        yield "--wait-all-nodes=1"
    yield "--kill-on-invalid-dep=yes"
    yield from config.sbatch


def array_option(indices: Sequence[str], job: Job) -> str:
    numbers = [int(index) for index in indices]
    is_range = len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1))
    text = f"{numbers[0]}-{numbers[-1]}" if is_range else ",".join(indices)
    return f"--array={text}" + (f"%{job.max_at_once}" if job.max_at_once else "")


def _tasks_per_node(job: Job) -> int:
    """Under torchrun one, which starts the ranks."""
    config = job.config
    return config.ranks if isinstance(config, TrainingConfig) and config.launcher == "srun" else 1


# --- settings -----------------------------------------------------------------------------------------------------


def settings(
    job: Job, chain: ChainConfig, environment: Environment, place: Place, node_counts: Sequence[int]
) -> Iterator[str]:
    """Assignments that job.sh and the template read."""
    config = job.config
    yield f"WORK_DIR={_quoted(place.work_dir)} # where relative paths start"
    yield f"REPOSITORY={_quoted(place.repository)}"
    yield f"HOST_PYTHON={_quoted(place.python)} # on the nodes themselves, never in a container"
    yield f"SCRATCH={_expanded(environment.cluster.scratch)}"
    yield from _array("SRUN", list(_srun(chain, environment, place)))
    yield from _array("PYTHON", list(_python(chain, environment, place, config.gpus_per_node)))
    yield f"TIME_S={seconds(config.time)}"
    yield f"MAX_FAILURES={config.max_failures} # in a row"
    if job.pattern is None:  # parts of a build are too many to write the page each
        yield f"CHAIN_DIR={_quoted(chain.run_dir)} # where the page is written"
    if isinstance(config, TrainingConfig):
        yield f"LEAD_S={config.lead_s}"
        yield f"LAUNCHER={config.launcher}"
        yield f"NODE_COUNTS=({' '.join(map(str, node_counts))})"
        yield f"TASKS_PER_NODE={_tasks_per_node(job)}"
        yield f"RANKS_PER_NODE={config.ranks}"
        yield f"PREFLIGHT={'yes' if config.preflight else 'no'}"
        yield f"PREFLIGHT_S={config.preflight_s}"
        yield f"GPUS_PER_NODE={config.gpus_per_node}"
    elif isinstance(config, DataConfig):
        yield f"STAGING={_quoted(chain.run_dir / 'dataset.staging')}"
        if config.kind == "ray":
            yield f"MAX_RAY_FOLDER={MAX_RAY_FOLDER} # bytes of its path"
            yield f"GPUS_PER_NODE={config.gpus_per_node}"
            yield f"NETWORK_INTERFACE={_expanded(environment.cluster.network_interface)}"


def which_task(job: Job) -> Iterator[str]:
    """What is run: of an array's tasks the one that this is."""
    if not job.is_array or job.pattern is not None:
        yield from _task(job.pattern or job.tasks[""])
        return
    yield f"case {ARRAY_INDEX} in"
    for index, task in job.tasks.items():
        yield f"{index})"
        yield from ("    " + line for line in _task(task))
        yield "    ;;"
    yield "esac"


def _task(task: Task) -> Iterator[str]:
    yield f"JOB_FOLDER={_quoted(task.folder)}"
    if task.run_dir is not None:
        yield f"TRAINING_DIR={_quoted(task.run_dir)}"
    module, option, config, *overrides = task.command
    yield from _array("COMMAND", [module, f"{option} {_quoted(config)}", *map(_quoted, overrides)])


def _array(name: str, words: Sequence[str]) -> Iterator[str]:
    """Words that are quoted already, a line each where they are several."""
    if len(words) == 1:
        yield f"{name}=({words[0]})"
        return
    yield f"{name}=("
    yield from (f"    {word}" for word in words)
    yield ")"


def preparations(environment: Environment) -> Iterator[str]:
    """What env.sh asks for."""
    cluster, exports = environment.cluster, dict(environment.exports)
    if cluster.network_interface:
        exports = dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), cluster.network_interface) | exports
    yield from (f"export {name}={_expanded(value)}" for name, value in exports.items())
    if cluster.modules:  # which scripts do not know everywhere
        yield "for file in /etc/profile.d/{modules,lmod,z00_lmod}.sh; do"
        yield "    # shellcheck source=/dev/null"
        yield '    command -v module >/dev/null || { [ -r "$file" ] && source "$file"; }'
        yield "done"
        yield f"module load {' '.join(map(_expanded, cluster.modules.split()))} || exit 2"
    if cluster.setup:
        yield "# shellcheck source=/dev/null"
        yield f"source {_expanded(cluster.setup)} || exit 2"
    if exports or cluster.modules or cluster.setup:
        yield ""


# --- containers ---------------------------------------------------------------------------------------------------


def _srun(chain: ChainConfig, environment: Environment, place: Place) -> Iterator[str]:
    yield "srun"
    cluster = environment.cluster
    if cluster.container == "pyxis":
        mounts = ",".join(f"{outside}:{inside}" for outside, inside in _mounts(chain, environment, place).items())
        yield f"--container-image={_expanded(cluster.image)}"
        yield f"--container-mounts={_expanded(mounts)}"
        yield f"--container-workdir={_quoted(place.work_dir)}"


def folders_to_mount(environment: Environment) -> Iterator[str]:
    """What a container cannot be started without."""
    if environment.cluster.container != "none":
        yield ""
        yield "# On every node: a disk of its own may not have the folder yet."
        yield 'timeout 60 srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 mkdir -p "$SCRATCH"'


def _python(chain: ChainConfig, environment: Environment, place: Place, gpus: int) -> Iterator[str]:
    cluster = environment.cluster
    if cluster.container == "apptainer":
        mounts = ",".join(f"{outside}:{inside}" for outside, inside in _mounts(chain, environment, place).items())
        yield "apptainer exec" + (" --nv" if gpus else "")
        yield f"--bind {_expanded(mounts)}"
        yield f"--pwd {_quoted(place.work_dir)}"
        yield _expanded(cluster.image)
    in_container = "python" if cluster.container != "none" else str(place.python)
    yield _expanded(cluster.python or in_container)


def _mounts(chain: ChainConfig, environment: Environment, place: Place) -> Mapping[str, str]:
    """Folders of the host, and where they are seen inside."""
    own = [str(place.repository), str(place.work_dir), str(chain.run_dir)]
    for folder in own:
        if re.search(r"[,:\"$`\\]", folder):
            raise UserError(
                f'{folder}: cannot be mounted into a container; rename it, without , : " $ ` and backslashes.'
            )
    mounts = {folder: folder for folder in [*own, environment.cluster.scratch]}
    for mount in filter(None, environment.cluster.mounts.split(",")):
        outside, _, inside = mount.strip().partition(":")
        mounts[outside] = inside or outside
    return mounts


# --- words of bash ------------------------------------------------------------------------------------------------


def _quoted(text: str | Path) -> str:
    """One word that means itself, but for the index of an array task."""
    parts = str(text).split(ARRAY_INDEX)
    return f'"{ARRAY_INDEX}"'.join(_literal(part) if part else "" for part in parts) or "''"


def _expanded(text: str) -> str:
    """One word, in which bash fills in its variables: env.sh allows nothing else that bash would act on."""
    return f'"{text}"' if "$" in text else _literal(text)


def _literal(text: str) -> str:
    if "$" in text or "`" in text:  # which in single quotes look like a mistake
        return '"' + re.sub(r'([$`"\\])', r"\\\1", text) + '"'
    # shlex leaves commas bare, which look like a mistake in an array.
    return shlex.quote(text) if "," not in text or "'" in text else f"'{text}'"
