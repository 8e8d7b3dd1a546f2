"""What every training command shares: its run folder, and how it is asked to stop."""

import fcntl
import logging
import os
import signal
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

from configs.loader import StrictConfig, UserError, dump_config, load_config
from data_pipeline.dataset import DATASET_YAML

EXIT_DONE, EXIT_STOPPED = 0, 75  # 75 (EX_TEMPFAIL): stopped cleanly on a signal, start me again
CONFIG_FILE, LOCK_FILE = "config.yaml", ".lock"
AUTO = "auto"

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=StrictConfig)


# --- the run folder -----------------------------------------------------------------------------------------------


def resume_config(run_dir: Path, config: ConfigT, may_change: Collection[str]) -> ConfigT:
    """The config to go on with: as given, and where it says `auto`, what the run settled on when it started.

    Settings that would have given other results are refused. `may_change` are the dotted keys of those that would not,
    and of sections of those.
    """
    path = run_dir / CONFIG_FILE
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run_dir {run_dir} is a file; choose another run_dir.")
    if (run_dir / DATASET_YAML).exists():
        raise UserError(f"run_dir {run_dir} is a dataset or an export ({DATASET_YAML}); choose another run_dir.")
    if not path.exists():
        return config
    stored = dict(_leaves(_stored_config(type(config), path).model_dump(mode="json", by_alias=True)))
    here = dict(_leaves(config.model_dump(mode="json", by_alias=True)))
    different = {key for key in stored.keys() | here.keys() if stored.get(key) != here.get(key)}
    settled = {key for key in different if here.get(key) == AUTO}
    allowed = {key for key in different if any(f"{key}.".startswith(f"{may}.") for may in may_change)}
    for key in sorted(different - settled - allowed):
        given, before = (show_value(values.get(key)) for values in (here, stored))
        raise UserError(
            f"{key} is {given}, but {run_dir} was started with {before} ({path}), and resuming would mix the two; set "
            f"{key}={before} to go on, or choose another run_dir."
        )
    return _with_leaves(config, {key: stored[key] for key in settled})


def _stored_config(config_class: type[ConfigT], path: Path) -> ConfigT:
    try:
        return load_config(config_class, path)
    except UserError as error:
        raise UserError(
            f"{error} The run there was started by another version or command, or the file was edited; go on with that "
            "version, mend the file, or choose another run_dir."
        ) from None


def show_value(value: Any) -> str:
    """As it is written in YAML."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """One run at a time per folder. The lock goes with its process, however that ends.

    Each rank locks a byte of its own, so that all ranks of a second run are refused at once and none waits for others.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK_FILE).open("w")
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be written ({error.strerror}); choose another folder.") from None
    with file:
        try:
            # Not flock: data workers would inherit it, and they outlive a killed run by some seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank_in_environment())
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"{run_dir}: another run is at work there; wait for it to end, or choose another folder."
            ) from None
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s cannot be locked (%s): take care not to start a second run there", run_dir, error)
        yield


def write_config(run_dir: Path, config: StrictConfig) -> None:
    """The resolved config, whole or not at all: it is enough to run again."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        partial = run_dir / f".tmp-{CONFIG_FILE}"
        partial.write_text(dump_config(config))
    except OSError as error:
        raise UserError(f"run_dir {run_dir} cannot be written ({error.strerror}); choose another run_dir.") from None
    os.replace(partial, run_dir / CONFIG_FILE)


def _with_leaves(config: ConfigT, values: Mapping[str, Any]) -> ConfigT:
    data = config.model_dump(mode="json", by_alias=True)
    for key, value in values.items():
        *path, last = key.split(".")
        section = data
        for name in path:
            section = section[name]
        section[last] = value
    return type(config).model_validate(data)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else name)
    else:
        yield key, value


# --- stop requests ------------------------------------------------------------------------------------------------


class StopSignal:
    """SIGTERM and SIGUSR2 set `requested`; the loop looks at it where a step ends, when it can save and leave.

    SIGUSR2 is what SLURM is asked to send some time before it ends a job (`--signal=USR2@300`).
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # a launcher that has seen another rank fail sends SIGTERM: what went wrong is told first
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True  # and nothing else: a handler may interrupt anything


# --- logging ------------------------------------------------------------------------------------------------------


def log_on_main_rank_only() -> None:
    """Every rank runs the same code; one telling of what happens is enough. Warnings come from all."""
    if rank_in_environment() != 0:
        logging.getLogger().setLevel(logging.WARNING)


def rank_in_environment() -> int:
    """As torchrun sets it, before the ranks have joined."""
    return int(os.environ.get("RANK", "0"))
