"""What `slurm.submit --dry-run` prints: as it stands in golden/, and accepted by bash and shellcheck.

After a change that is meant, `PYTHONPATH=. python tests/slurm/test_dry_run.py` writes golden/ anew.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from configs.loader import load_config
from slurm.chain import ChainConfig, plan_jobs
from slurm.environment import read_environment
from slurm.render import Place, render, script_path
from slurm.submit import Script, dry_run

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
PLACE = Place(Path("/home/me/foresight"), Path("/home/me/foresight"), Path("/home/me/foresight/.venv/bin/python"))

# Name -> chain, overrides, env.sh, and the numbers of nodes that each job can use.
CASES: dict[str, tuple[Path, list[str], str, list[list[int]]]] = {
    "1_node": (GOLDEN / "1_node.yaml", [], "", [[1]]),
    "8_nodes": (
        REPOSITORY / "configs/slurm/cluster.yaml",
        ["run_dir=/shared/runs/wan"],
        "PARTITION=gpu\nACCOUNT=robots\nNETWORK_INTERFACE=ib0\nSCRATCH=/scratch/$USER\nexport NCCL_IB_HCA=mlx5\n",
        [[1], [4, 8], [1], [1]],
    ),
    "64_nodes": (
        GOLDEN / "64_nodes.yaml",
        [],
        "PARTITION=large\nQOS=long\nMODULES='cuda/12.8 enroot'\nSETUP=/etc/profile\nCONTAINER=pyxis\n"
        "IMAGE=registry.example.org#robots/foresight:1\nMOUNTS=/datasets,/home/me/keys:/keys\n",
        [[16], [32, 64]],
    ),
}


def scripts_of(case: str, folder: Path) -> list[Script]:
    chain_file, overrides, env, node_counts = CASES[case]
    (folder / "env.sh").write_text(env)
    chain = load_config(ChainConfig, chain_file, [*overrides, f"env={folder / 'env.sh'}"])
    environment = read_environment(chain.env)
    return [
        Script(job, script_path(job, chain), render(job, chain, environment, PLACE, counts))
        for job, counts in zip(plan_jobs(chain), node_counts, strict=True)
    ]


@pytest.mark.parametrize("case", CASES)
def test_the_output_is_as_it_was(case: str, tmp_path: Path):
    assert dry_run(scripts_of(case, tmp_path)) == (GOLDEN / f"{case}.txt").read_text()


@pytest.mark.parametrize("case", CASES)
def test_bash_and_shellcheck_accept_it(case: str, tmp_path: Path):
    scripts = scripts_of(case, tmp_path)
    for number, script in enumerate(scripts):
        (tmp_path / f"{number}.sbatch").write_text(script.text)
    files = [str(tmp_path / f"{number}.sbatch") for number in range(len(scripts))]
    for file in files:
        complaints_of(["bash", "-n", file])
    commands = dry_run(scripts).rpartition("==> commands\n")[2]
    complaints_of(["bash", "-n", "-c", commands])
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck: ./setup.sh --test-packages")
    complaints_of(["shellcheck", *files])


def test_odd_words_are_no_harm(tmp_path: Path):
    odd = "a=$HOME `id` $(id) \"b\" 'c'\\ \n#!* \u00e4"
    stage = {"config": f"{odd}.yaml", "overrides": [odd], "presets": [{"name": "-p", "overrides": [odd]}], "time": "60"}
    chain = ChainConfig(run_dir="/runs/(x);&*[y]\u00e4!", stages={"finetune": stage})
    (tmp_path / "env.sh").write_text("export A='b c'\nSCRATCH=$A/x\nMODULES='c d'\n")
    (job,) = plan_jobs(chain)
    script = Script(job, script_path(job, chain), render(job, chain, read_environment(tmp_path / "env.sh"), PLACE, [1]))
    file = tmp_path / "odd.sbatch"
    file.write_text(script.text)
    complaints_of(["bash", "-n", str(file)])
    complaints_of(["bash", "-n", "-c", dry_run([script]).rpartition("==> commands\n")[2]])
    case = script.text[script.text.index("\ncase ") : script.text.index("\nesac")]
    said = subprocess.run(
        ["bash", "-c", f"SLURM_ARRAY_TASK_ID=0{case}\nesac\nprintf '%s\\0' \"${{COMMAND[@]}}\""],
        capture_output=True,
        text=True,
    )
    assert said.stdout.split("\0")[:-1] == list(job.tasks["0"].command)
    if shutil.which("shellcheck") is not None:
        complaints_of(["shellcheck", str(file)])


def test_what_shellcheck_accepts_it_could_refuse(tmp_path: Path):
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck: ./setup.sh --test-packages")
    (script,) = scripts_of("1_node", tmp_path)
    (tmp_path / "broken.sbatch").write_text(script.text.replace('"$SLURM_JOB_NODELIST"', "$SLURM_JOB_NODELIST"))
    with pytest.raises(AssertionError, match="SC2086"):
        complaints_of(["shellcheck", str(tmp_path / "broken.sbatch")])


def test_env_sh_is_bash_as_well():
    complaints_of(["bash", "-n", str(REPOSITORY / "slurm/env.sh")])
    assert read_environment(REPOSITORY / "slurm/env.sh").exports == {}


def complaints_of(command: Sequence[str]) -> None:
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr


if __name__ == "__main__":
    import tempfile

    for name in CASES:
        with tempfile.TemporaryDirectory() as temporary:
            (GOLDEN / f"{name}.txt").write_text(dry_run(scripts_of(name, Path(temporary))))
            sys.stdout.write(f"{GOLDEN / name}.txt\n")
