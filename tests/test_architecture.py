"""The house rules as tests: which room may import which, what stays behind one door, and how large code may grow.

Each rule is a function from (path, source) to a list of complaints; the second half of the file proves that each can
fail.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# A room may import itself and the rooms before it. slurm renders files and runs `python -m ...`: it imports no stage.
MAY_IMPORT = {
    "configs": {"configs"},
    "data_pipeline": {"configs", "data_pipeline"},
    "pretrain": {"configs", "data_pipeline", "pretrain"},
    "finetune": {"configs", "data_pipeline", "pretrain", "finetune"},
    "slurm": {"configs", "slurm"},
}
NEVER_IMPORTED = {"tests", "benchmarks"}

# Heavy or replaceable dependencies live behind one door each.
ONLY_IN = {
    "ray": "data_pipeline/ray_job.py",
    "deepspeed": "pretrain/engine/",
    "metaworld": "finetune/simulators/",
    "mujoco": "finetune/simulators/",
    "gymnasium": "finetune/simulators/",
}

# Importing these takes seconds. Commands answer a mistake before, and the many processes that cut clips do without.
SLOW = {"torch", "ray", "transformers", "diffusers"}
STARTS_FAST = (
    "configs.loader",
    "data_pipeline.build",
    "data_pipeline.curate.episode",
    "data_pipeline.doctor",
    "data_pipeline.preview",
    "data_pipeline.verify",
    "finetune.demo",
    "finetune.record",
    "slurm.report",
    "slurm.submit",
    "slurm.status",
)

# Batch scripts call these outside the container that has the packages.
NEEDS_NO_PACKAGES = tuple(
    f"slurm/{name}.py" for name in ("__init__", "attempt_files", "attempts", "errors", "preflight", "rank")
)

# Whoever unpickles a file runs the file.
UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv_python_headless",
    "faiss": "faiss_cpu",
    "pydantic_core": "pydantic",
    "scenedetect": "scenedetect_headless",
    "yaml": "pyyaml",
}  # where pip's name differs
VAGUE_NAMES = {"utils", "util", "helpers", "misc"}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80

Rule = Callable[[str, str], list[str]]


# --- the rules ----------------------------------------------------------------------------------------------------


def imports(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import, wherever in the file it stands."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__") and node.args:
            yield node.lineno, ast.unparse(node.args[0]).strip("'")


def called_name(call: ast.Call) -> str:
    """The last part of what is called: `load` for `torch.load(...)`."""
    return ast.unparse(call.func).rsplit(".", 1)[-1]


def arrows(path: str, source: str) -> list[str]:
    room = path.split("/")[0]
    forbidden = (MAY_IMPORT.keys() | NEVER_IMPORTED) - MAY_IMPORT[room]
    return [
        f"{path}:{line}: {room} may not import {name}"
        for line, name in imports(path, source)
        if name.split(".")[0] in forbidden
    ]


def one_door(path: str, source: str) -> list[str]:
    return [
        f"{path}:{line}: {name} may be imported only in {ONLY_IN[name.split('.')[0]]}"
        for line, name in imports(path, source)
        if name.split(".")[0] in ONLY_IN and not path.startswith(ONLY_IN[name.split(".")[0]])
    ]


def no_packages(path: str, source: str) -> list[str]:
    known = sys.stdlib_module_names | {name.replace("/", ".").removesuffix(".py") for name in NEEDS_NO_PACKAGES}
    return [
        f"{path}:{line}: works without packages, but imports {name}"
        for line, name in imports(path, source)
        if path in NEEDS_NO_PACKAGES and not {name.split(".")[0], ".".join(name.split(".")[:2])} & known
    ]


def no_pickle(path: str, source: str) -> list[str]:
    found = [(line, f"imports {name}") for line, name in imports(path, source) if name.split(".")[0] in UNPICKLERS]
    for node in ast.walk(ast.parse(source, path)):
        if not isinstance(node, ast.Call):
            continue
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if arguments.get("allow_pickle", "False") != "False":
            found.append((node.lineno, f"allow_pickle={arguments['allow_pickle']}"))
        if arguments.get("weights_only", "True") != "True":
            found.append((node.lineno, f"weights_only={arguments['weights_only']}"))
        if ast.unparse(node.func) == "torch.load" and "weights_only" not in arguments:
            found.append((node.lineno, "torch.load without weights_only=True"))
        if called_name(node) == "read_pickle":
            found.append((node.lineno, "read_pickle"))
    return [f"{path}:{line}: may unpickle: {what}" for line, what in found]


def declared(path: str, source: str) -> list[str]:
    """What is imported is named in pyproject.toml, not merely brought along by something else."""
    known = sys.stdlib_module_names | MAY_IMPORT.keys() | declared_distributions()
    tops = ((line, name.split(".")[0]) for line, name in imports(path, source))
    return [
        f"{path}:{line}: {top} is not among the dependencies in pyproject.toml"
        for line, top in tops
        if DISTRIBUTIONS.get(top, top) not in known
    ]


def declared_distributions() -> set[str]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    return {re.split(r"[^\w-]", requirement)[0].replace("-", "_") for requirement in requirements}


def plain_names(path: str, source: str) -> list[str]:
    vague = VAGUE_NAMES.intersection(path.removesuffix(".py").split("/"))
    return [f'{path}: "{name}" says nothing; name the module after what it does' for name in sorted(vague)]


def budgets(path: str, source: str) -> list[str]:
    complaints = []
    num_lines = len(source.splitlines())
    if num_lines > MAX_FILE_LINES:
        complaints.append(f"{path}: {num_lines} lines, at most {MAX_FILE_LINES}")
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                complaints.append(
                    f"{path}:{node.lineno}: {node.name} has {num_lines} lines, at most {MAX_FUNCTION_LINES}"
                )
    return complaints


def packages_under_tests(repository: Path) -> list[str]:
    """A tests/pretrain package would shadow pretrain itself."""
    return [str(path.relative_to(repository)) for path in sorted(repository.glob("tests/**/__init__.py"))]


RULES: tuple[Rule, ...] = (arrows, one_door, no_packages, no_pickle, declared, plain_names, budgets)


# --- held by the repository ---------------------------------------------------------------------------------------


def package_sources() -> dict[str, str]:
    files = [path for room in MAY_IMPORT for path in sorted((REPOSITORY / room).rglob("*.py"))]
    return {path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8") for path in files}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_holds(rule: Rule):
    complaints = [complaint for path, source in package_sources().items() for complaint in rule(path, source)]
    assert not complaints, "\n" + "\n".join(complaints)


def test_the_sources_are_found():
    assert {"configs/loader.py"} <= package_sources().keys()


def test_tests_are_no_packages():
    assert packages_under_tests(REPOSITORY) == []


def test_what_starts_fast_imports_nothing_slow():
    code = f"import sys, {', '.join(STARTS_FAST)}; print(*sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    loaded = set(process.stdout.split())
    assert loaded >= set(STARTS_FAST) and not loaded & SLOW


# --- and can fail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "path", "source", "num_complaints"),
    [
        (arrows, "configs/loader.py", "import data_pipeline.sample", 1),
        (arrows, "configs/loader.py", "import datetime", 0),
        (arrows, "data_pipeline/build.py", "from pretrain.train import main", 1),
        (arrows, "data_pipeline/build.py", "def f():\n    from finetune import demo", 1),
        (arrows, "data_pipeline/build.py", "from configs.loader import run_command", 0),
        (arrows, "data_pipeline/sources/lerobot.py", "from ..video_io import probe_video", 0),
        (arrows, "data_pipeline/sources/lerobot.py", "from ...pretrain import train", 1),
        (arrows, "pretrain/train.py", "import importlib\nimportlib.import_module('finetune.train')", 1),
        (arrows, "pretrain/train.py", "import data_pipeline, configs, finetune", 1),
        (arrows, "finetune/train.py", "import pretrain.train, data_pipeline.loader, configs.loader", 0),
        (arrows, "finetune/train.py", "from tests.conftest import shared_data", 1),
        (arrows, "finetune/train.py", "import slurm.submit", 1),
        (arrows, "slurm/submit.py", "import pretrain.train", 1),
        (arrows, "slurm/submit.py", "from configs.loader import run_command", 0),
        (one_door, "data_pipeline/build.py", "def f():\n    import ray.data", 1),
        (one_door, "data_pipeline/ray_job.py", "import ray.data", 0),
        (one_door, "data_pipeline/build.py", "from .ray_job import build", 0),
        (one_door, "pretrain/train.py", "from deepspeed.ops import adam", 1),
        (one_door, "pretrain/engine/deepspeed.py", "import deepspeed", 0),
        (one_door, "pretrain/train.py", "from .engine.deepspeed import DeepSpeedEngine", 0),
        (one_door, "finetune/record.py", "import metaworld\nimport mujoco\nimport gymnasium", 3),
        (one_door, "finetune/simulators/metaworld.py", "import metaworld, mujoco, gymnasium", 0),
        (no_packages, "slurm/attempts.py", "import json, os.path\nfrom .errors import error_page", 0),
        (no_packages, "slurm/attempts.py", "def f():\n    import yaml", 1),
        (no_packages, "slurm/rank.py", "from configs.loader import UserError\nfrom .render import render", 2),
        (no_packages, "slurm/submit.py", "from configs.loader import UserError", 0),
        (no_pickle, "pretrain/ema.py", "import pickle", 1),
        (no_pickle, "pretrain/ema.py", "def f():\n    from cloudpickle import loads", 1),
        (no_pickle, "pretrain/ema.py", "import numpy as np\nnp.load(p, allow_pickle=True)", 1),
        (no_pickle, "pretrain/ema.py", "import numpy as np\nnp.load(p, allow_pickle=False)", 0),
        (no_pickle, "pretrain/ema.py", "import torch\ntorch.load(p)", 1),
        (no_pickle, "pretrain/ema.py", "import torch\ntorch.load(p, weights_only=False)", 1),
        (no_pickle, "pretrain/ema.py", "import torch\ntorch.load(p, weights_only=flag)", 1),
        (no_pickle, "pretrain/ema.py", "import torch\ntorch.load(p, weights_only=True)", 0),
        (no_pickle, "data_pipeline/verify.py", "import pandas\npandas.read_pickle(p)", 1),
        (
            declared,
            "pretrain/ema.py",
            "import os, torch, yaml, configs.loader\nfrom PIL import Image\nfrom . import plan",
            0,
        ),
        (declared, "pretrain/ema.py", "import tensorflow\nfrom sympy import Symbol", 2),
        (plain_names, "pretrain/utils.py", "", 1),
        (plain_names, "pretrain/utils/masks.py", "", 1),
        (plain_names, "pretrain/masks.py", "", 0),
        (budgets, "pretrain/train.py", "x = 1\n" * 501, 1),
        (budgets, "pretrain/train.py", "x = 1\n" * 500, 0),
        (budgets, "pretrain/train.py", "def f():\n" + "    x = 1\n" * 80, 1),
        (budgets, "pretrain/train.py", "def f():\n" + "    x = 1\n" * 79, 0),
        (budgets, "pretrain/train.py", "class A:\n    async def f():\n" + "        x = 1\n" * 80, 1),
    ],
)
def test_a_rule_can_fail(rule: Rule, path: str, source: str, num_complaints: int):
    complaints = rule(path, source)
    assert len(complaints) == num_complaints
    assert all(complaint.startswith(f"{path}:") for complaint in complaints)


def test_a_package_under_tests_is_found(tmp_path: Path):
    (tmp_path / "tests" / "pretrain").mkdir(parents=True)
    (tmp_path / "tests" / "pretrain" / "__init__.py").touch()
    assert packages_under_tests(tmp_path) == ["tests/pretrain/__init__.py"]
