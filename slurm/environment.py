"""What a cluster is like: `slurm/env.sh`, read as plain NAME=value lines. Nothing in it is executed here."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from configs.loader import StrictConfig, UserError
from configs.problems import explain

_LINE = re.compile(r"(?P<export>export\s+)?(?P<name>[A-Za-z_]\w*)=(?P<value>.*)", re.ASCII)
# A value is one word of bash: bare, in single quotes, or in double quotes; a comment may follow.
_VALUE = re.compile(r"""(?:(?P<bare>[^\s"'#][^\s"']*)|'(?P<single>[^']*)'|"(?P<double>[^"]*)")?(?:\s*|\s+\#.*)""")

ONE_WORD = r"^[^\s#'\"]*$"
"""As an option of sbatch is read, in which # begins a comment."""

MAX_RAY_FOLDER = 107 - len("/session_2026-11-30_15-10-31_123456_4194304/sockets/plasma_store.1")
"""Ray makes sockets in its folder, whose whole paths Linux allows 107 bytes."""


class ClusterConfig(StrictConfig):
    """The settings of env.sh, each by the name that it has there."""

    partition: str = Field(
        "", alias="PARTITION", pattern=ONE_WORD, description="where jobs go; empty: the cluster's default"
    )
    account: str = Field("", alias="ACCOUNT", pattern=ONE_WORD, description="who pays")
    qos: str = Field("", alias="QOS", pattern=ONE_WORD, description="quality of service")
    modules: str = Field("", alias="MODULES", description="what `module load` loads first")
    setup: str = Field("", alias="SETUP", description="a bash file to source first")
    python: str = Field("", alias="PYTHON", description="with this project's packages; empty: the one that submits")
    container: Literal["none", "pyxis", "apptainer"] = Field("none", alias="CONTAINER", description="what runs images")
    image: str = Field("", alias="IMAGE", description="a .sqsh or .sif file, or docker://...")
    mounts: str = Field("", alias="MOUNTS", description="host folders, comma-separated: folder or folder:inside")
    network_interface: str = Field("", alias="NETWORK_INTERFACE", description="that ranks talk over")
    scratch: str = Field("/tmp", alias="SCRATCH", pattern=r"^[/$]", description="a node's own disk")


SETTINGS = {field.alias for field in ClusterConfig.model_fields.values()}


@dataclass(frozen=True)
class Environment:
    """A cluster's settings, and the variables that its jobs get besides; values may hold $NAME, for bash to fill in."""

    path: Path
    cluster: ClusterConfig
    exports: dict[str, str]


def read_environment(path: Path) -> Environment:
    """Raises a `UserError` that names the line that is no setting, or the setting that cannot be."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise UserError(
            f"{path}: cannot be read ({reason}); copy slurm/env.sh, edit it, and name it in the chain: env=FILE."
        ) from None
    settings: dict[str, str] = {}
    exports: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, value, is_export = _read_line(line.strip(), f"{path}, line {number}")
        if name in settings.keys() | exports.keys():
            raise UserError(f"{path}, line {number}: {name} is given twice; keep one of them.")
        (exports if is_export else settings)[name] = value
    try:
        cluster = ClusterConfig.model_validate(settings)
    except ValidationError as error:
        raise UserError(explain(error, ClusterConfig, settings, path, ())) from None
    _check_container(cluster, path)
    _check_files(cluster, path)
    return Environment(path, cluster, exports)


def _read_line(line: str, where: str) -> tuple[str, str, bool]:
    if not line.replace("\t", " ").isprintable():
        raise UserError(f"{where}: {line!r} holds characters that cannot be seen; type the line anew.")
    match = _LINE.fullmatch(line)
    value = _VALUE.fullmatch(match["value"]) if match else None
    if value and "~" in (value["bare"] or "")[:1]:
        raise UserError(f"{where}: write $HOME in place of ~, which is expanded only in some places.")
    if match is None or value is None:
        raise UserError(
            f"{where}: {line!r} is neither NAME=value nor `export NAME=value` with one value; put what has spaces "
            "in quotes, and commands into a file that SETUP names."
        )
    if match["export"] and match["name"] in SETTINGS:
        raise UserError(f"{where}: {match['name']} is a setting of this file; write it without `export`.")
    word = next((text for text in value.groups() if text is not None), "")
    if value["single"] is not None:
        if "$" in word:
            raise UserError(f"{where}: a $ in single quotes is not supported; write it in double quotes, or as it is.")
    elif re.search(r"\$[^A-Za-z_{]|\$$|`|\\|;|&|\|", word) or re.search(r"\$\{(?!\w+\})", word):
        raise UserError(
            f"{where}: {word!r} is more than a value with $NAMEs in it; put commands into a file that SETUP names."
        )
    return match["name"], word, match["export"] is not None


def _check_container(cluster: ClusterConfig, path: Path) -> None:
    if cluster.container == "none":
        if cluster.image:
            raise UserError(f"{path}: IMAGE is given, but CONTAINER is none; set CONTAINER to pyxis or apptainer.")
        return
    if not cluster.image:
        raise UserError(f"{path}: CONTAINER={cluster.container} needs IMAGE, a file or docker://...")
    image = os.path.expandvars(cluster.image)
    is_file = image.startswith(("/", "./"))
    if cluster.container == "apptainer" and "$" not in image:
        is_file |= ":" not in image.partition("/")[0]  # as in docker://...
    if is_file and not Path(image).exists():
        raise UserError(f"{path}: there is no IMAGE={image}; build or import it first, or correct its path.")


def _check_files(cluster: ClusterConfig, path: Path) -> None:
    """What is named must be there, as far as can be seen from here."""
    named = {"SETUP": cluster.setup, "PYTHON": cluster.python if cluster.container == "none" else ""}
    for name, value in named.items():
        file = os.path.expandvars(value)
        if "$" in file or not file:
            continue
        if not (Path(file).is_file() and os.access(file, os.R_OK)) and shutil.which(file) is None:
            raise UserError(f"{path}: there is no {name}={value} here; correct its path, or leave it empty.")


def check_ray_folder(environment: Environment) -> None:
    """As far as it can be known here: SCRATCH may hold variables that jobs alone have."""
    scratch = os.path.expandvars(environment.cluster.scratch)
    longest = MAX_RAY_FOLDER - len("/ray-67108863")  # the last job that SLURM can number
    if "$" not in scratch and len(scratch.encode()) > longest:
        raise UserError(
            f"{environment.path}: SCRATCH={scratch} is too long a path for a Ray cluster's sockets, which leave it "
            f"{longest} bytes; name a shorter one, or a link to it that all nodes have."
        )


def filled_in(value: str, where: str) -> str:
    """A value for sbatch, which fills in no variables itself."""
    text = os.path.expandvars(value)
    if "$" in text:
        raise UserError(f"{where}: {value} uses a variable that is not set here; set it, or write the value out.")
    return text
