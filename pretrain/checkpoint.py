"""Checkpoints: a folder that is there whole or not at all, and resumes a run exactly.

    checkpoints/step_00001000/
      weights_00000.safetensors …   what each rank has of weights, average and optimizer (`pretrain.checkpoint_files`)
      state.json                    step, skipped steps, data cursor: the caller's entries
      model.yaml                    and other small texts of the caller's
      checksums.json                size and sha256 of every file above
      COMPLETE                      sha256 of checksums.json, written last

A save copies the numbers to the CPU's memory; threads write them while training goes on, every rank its own. Once all
have, the folder, which has a temporary name until then, is synced, sealed and renamed where a step ends: a kill at any
moment leaves the checkpoints before it as they were. No random-generator state is stored: every step seeds its own
(`pretrain.draws`).
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.loader import UserError

from .checkpoint_files import (
    AVERAGE,
    BUFFERS,
    LAYOUT,
    WEIGHTS,
    CheckpointWeights,
    LazyParts,
    PartFiles,
    part_file,
    part_kinds,
    read_layout,
    write_parts,
)
from .ema import ExponentialMovingAverage
from .engine import Engine
from .weights import differences, write_shards

CHECKPOINTS = "checkpoints"
STATE, CHECKSUMS, COMPLETE = "state.json", "checksums.json", "COMPLETE"
TEMPORARY, DAMAGED = ".tmp-", "damaged_"
_STEP = re.compile(r"step_[0-9]{8,}")
EXPORT_STEM, EXPORT_SHARD_BYTES = "model", 10 * 10**9

logger = logging.getLogger(__name__)

Checksums = dict[str, dict[str, Any]]
REFUSALS = (OSError, SafetensorError, UserError)  # what a disk or a damaged file answers with


# --- find and check -----------------------------------------------------------------------------------------------


def find_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; neither what a kill left half-written is one, nor a copy of another name."""
    steps = [path for path in folder.glob("step_*") if _STEP.fullmatch(path.name) and (path / COMPLETE).is_file()]
    return sorted(steps, key=_step_of)


def verify_checkpoint(path: Path, rank: int = 0, world_size: int = 1) -> None:
    """Compares the rank-th of equal parts of the files with their checksums; a `UserError` names one that differs."""
    expected = _promised(path)
    for name, promise in sorted(expected.items())[rank::world_size]:
        if not (path / name).is_file():
            raise _damaged(path, name, "is missing")
        size = (path / name).stat().st_size
        if size != promise["bytes"]:
            raise _damaged(path, name, f"has {size} bytes instead of {promise['bytes']}")
        if _sha256(path / name) != promise["sha256"]:
            raise _damaged(path, name, "does not match its checksum")
    for found in path.iterdir():  # parts are found by their names
        if found.name not in expected.keys() | {CHECKSUMS, COMPLETE}:
            raise _damaged(path, found.name, "was not written by the run")


def _promised(path: Path) -> Checksums:
    text = (path / CHECKSUMS).read_bytes() if (path / CHECKSUMS).is_file() else b""
    if hashlib.sha256(text).hexdigest().encode() != (path / COMPLETE).read_bytes().strip():
        raise _damaged(path, CHECKSUMS, "is missing or does not match COMPLETE")
    try:
        return {name: {"bytes": one["bytes"], "sha256": one["sha256"]} for name, one in json.loads(text).items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _damaged(path, CHECKSUMS, "is no list of files and their checksums") from None


# --- a run's checkpoints ------------------------------------------------------------------------------------------


class Checkpoints:
    """Saves and restores a run. All methods are collective; errors are `UserError`s, raised on every rank."""

    def __init__(self, folder: Path, engine: Engine, *, keep_last: int, keep_every: int | None = None) -> None:
        self.folder = folder
        self._engine = engine
        self._keep_last, self._keep_every = keep_last, keep_every
        self._copies: dict[str, Tensor] = {}  # kept from save to save
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Checksums] | None = None
        self._step = 0  # of the checkpoint that is being written

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever ends a run, nothing goes on writing behind it."""
        self._thread.shutdown()

    @property
    def newest(self) -> Path:
        return find_checkpoints(self.folder)[-1]

    # Restore

    def load(self, ema: ExponentialMovingAverage) -> dict[str, Any] | None:
        """Restores the newest checkpoint that is not damaged and returns its state; None where there is none yet."""
        checkpoints = find_checkpoints(self.folder)
        self._engine.barrier()  # all ranks have looked before one of them moves a folder away
        for path in reversed(checkpoints):
            if self._is_whole(path):
                self._read(path, ema)
                return json.loads((path / STATE).read_text())
        if checkpoints:
            raise UserError(
                f"{self.folder}: each of the {len(checkpoints)} checkpoints is damaged; restore one, or choose another "
                "run_dir."
            )
        return None

    def _is_whole(self, path: Path) -> bool:
        """Every rank reads a part of the files. A damaged checkpoint is told, and moved out of the way."""
        engine = self._engine
        error = _attempt(lambda: verify_checkpoint(path, engine.rank, engine.world_size))
        if error is not None:
            logger.warning("%s", error)
        if not engine.any_rank(error is not None):
            return True
        if engine.is_main:
            target = path.with_name(f"{DAMAGED}{path.name}")
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
            logger.warning("%s is damaged: it is %s now, and the checkpoint before it is tried", path, target.name)
        engine.barrier()
        return False

    def _read(self, path: Path, ema: ExponentialMovingAverage) -> None:
        engine, layout = self._engine, _checked_layout(path, self._engine)
        shards = engine.shards()

        def parts(kind: str, names: Iterable[str]) -> LazyParts:
            spans = {name: (shards[name].start, shards[name].num) for name in names}
            return LazyParts(PartFiles(path, kind, engine.rank), spans)

        engine.assign_shards(parts(WEIGHTS, shards))
        engine.assign_buffers(load_file(path / BUFFERS))
        ema.restore(parts(AVERAGE, ema.average))
        steps = layout["steps"]
        engine.restore_optimizer(steps, {kind: parts(kind, steps) for kind in part_kinds(path) - {WEIGHTS, AVERAGE}})
        if layout["written_by"] != engine.layout:
            logger.info(
                "%s was written by %s and goes on under %s: with the same samples and noise, and the same losses up to "
                "rounding",
                *(path.name, layout["written_by"], engine.layout),
            )

    # Save

    def prepare(self) -> None:
        """Finds out whether a checkpoint could be written, before a run has anything to lose. Collective."""
        self._tell(_attempt(self._make_room) if self._engine.is_main else None)
        if self._engine.is_main:
            self._partial.rmdir()

    def save(self, ema: ExponentialMovingAverage, state: Mapping[str, Any], texts: Mapping[str, str]) -> None:
        """Begins `step_<state["step"]>`, once the checkpoint before it is there. Training may go on meanwhile.

        `texts` are small files beside the weights, such as model.yaml, by name.
        """
        self.settle(wait_for_it=True)
        engine, self._step = self._engine, state["step"]
        self._tell(_attempt(self._make_room) if engine.is_main else None)
        shards = engine.shards()
        parts = {WEIGHTS: {name: shard.values for name, shard in shards.items()}, AVERAGE: ema.average}
        copies = self._copied({**parts, **engine.optimizer_states()})
        files: dict[str, Callable[[Path], None]] = {
            part_file(kind, engine.rank): _parts_writer(copies[kind], {name: shards[name].start for name in shards})
            for kind in copies
        }
        if engine.is_main:
            layout = {
                "written_by": engine.layout,
                "steps": engine.optimizer_steps(),
                "tied": engine.tied,
                "shapes": engine.shapes,
            }
            buffers = {name: value.detach().cpu().clone() for name, value in engine.buffers().items()}
            files[BUFFERS] = lambda path: save_file(buffers, path)
            small = {STATE: json.dumps(dict(state), indent=1) + "\n", LAYOUT: json.dumps(layout, indent=1) + "\n"}
            files |= {name: _text_writer(text) for name, text in {**small, **texts}.items()}
        self._writing = self._thread.submit(_write, self._partial, files)

    def settle(self, wait_for_it: bool = False) -> None:
        """Where a step ends: what all ranks have written by now becomes a checkpoint; what failed stops the run."""
        if self._writing is None:
            return
        if wait_for_it:
            wait([self._writing])
        if self._engine.any_rank(not self._writing.done()):
            return
        writing, self._writing = self._writing, None
        self._tell(writing.exception())
        written = self._engine.ranks.gather(writing.result())
        self._tell(_attempt(lambda: self._publish(written)) if self._engine.is_main else None)

    def export(self, folder: Path, texts: Mapping[str, str], copies: Sequence[Path]) -> None:
        """Exports the newest checkpoint, see `write_export`."""
        error = _attempt(lambda: write_export(folder, self.newest, texts, copies)) if self._engine.is_main else None
        if self._engine.any_rank(error is not None):
            raise error or UserError(f"{folder}: cannot be written; rank 0 says why.")

    @property
    def _final(self) -> Path:
        return self.folder / f"step_{self._step:08d}"

    @property
    def _partial(self) -> Path:
        return self._final.with_name(f"{TEMPORARY}{self._final.name}")

    def _make_room(self) -> None:
        for leftover in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover)
        self._partial.mkdir(parents=True)

    def _publish(self, written: Sequence[Checksums]) -> None:
        _seal(self._partial, {name: sums for of_rank in written for name, sums in of_rank.items()})
        _replace_folder(self._partial, self._final)
        for old in find_checkpoints(self.folder)[: -self._keep_last]:
            if not self._keep_every or _step_of(old) % self._keep_every:
                _remove_checkpoint(old)

    def _copied(self, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """In the CPU's memory, where training does not reach them."""
        copies: dict[str, dict[str, Tensor]] = {}
        for kind, of_kind in parts.items():
            copies[kind] = {}
            for name, values in of_kind.items():
                copy = self._copies.get(f"{kind}/{name}")
                if copy is None:
                    copy = self._engine.room_for(values, on_host=True)
                    self._copies[f"{kind}/{name}"] = copy
                copies[kind][name] = copy.copy_(values, non_blocking=True)
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize()
        return copies

    def _tell(self, error: BaseException | None) -> None:
        """Raises what went wrong on this rank or on another. What was half-written goes, all else stays."""
        if error is not None and not isinstance(error, REFUSALS):
            raise error
        if not self._engine.any_rank(error is not None):
            return
        if self._engine.is_main:
            shutil.rmtree(self._partial, ignore_errors=True)
        raise _refused(self._final, error or RuntimeError("another rank could not write its part"))


def _checked_layout(path: Path, engine: Engine) -> dict[str, Any]:
    if not (path / LAYOUT).is_file():
        raise UserError(
            f"{path}: was written by an older version, in a format that is not read any more; go on with that version, "
            "or choose another run_dir."
        )
    layout = read_layout(path)
    problem = differences(engine.shapes, {name: tuple(shape) for name, shape in layout["shapes"].items()})
    if problem:
        raise UserError(
            f"{path}: is of another model than this config's: {problem}; use the config that the run was started with, "
            "or choose another run_dir."
        )
    return layout


# --- export -------------------------------------------------------------------------------------------------------


def write_export(folder: Path, checkpoint: Path, texts: Mapping[str, str], copies: Sequence[Path]) -> None:
    """The averaged weights of a checkpoint in a folder that stands on its own: with small text files, and copies of the
    files and folders that are needed to use them, where those exist.
    """
    partial = folder.with_name(f"{TEMPORARY}{folder.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        weights = CheckpointWeights(checkpoint, averaged=True)
        write_shards(partial, EXPORT_STEM, weights.shapes, weights.read, EXPORT_SHARD_BYTES, torch.float32)
        for name, text in texts.items():
            (partial / name).write_text(text)
        for source in copies:
            if source.is_dir():
                shutil.copytree(source, partial / source.name)
            elif source.is_file():
                shutil.copy(source, partial / source.name)
        _sync_tree(partial)
        _replace_folder(partial, folder)
    except REFUSALS as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _refused(folder, error) from None


# --- files --------------------------------------------------------------------------------------------------------


def _write(folder: Path, files: Mapping[str, Callable[[Path], None]]) -> Checksums:
    """Writes each file and brings it to the disk."""
    sums: Checksums = {}
    for name, write in files.items():
        write(folder / name)
        _sync(folder / name)
        sums[name] = {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
    return sums


def _parts_writer(parts: Mapping[str, Tensor], starts: Mapping[str, int]) -> Callable[[Path], None]:
    return lambda path: write_parts(path, parts, starts)


def _text_writer(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(text)

    return write


def _seal(folder: Path, checksums: Checksums) -> None:
    """Checksums, then COMPLETE, each on the disk before the next."""
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=1) + "\n")
    _sync(folder / CHECKSUMS)
    _sync(folder)
    (folder / COMPLETE).write_text(_sha256(folder / CHECKSUMS) + "\n")
    _sync(folder / COMPLETE)
    _sync(folder)


def _replace_folder(source: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    source.rename(target)
    _sync(target.parent)


def _remove_checkpoint(path: Path) -> None:
    (path / COMPLETE).unlink()  # first, so that a kill halfway does not leave a folder that says it is whole
    shutil.rmtree(path)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _attempt(work: Callable[[], None]) -> Exception | None:
    """What went wrong, for ranks to agree on."""
    try:
        work()
    except REFUSALS as error:
        return error
    return None


def _refused(final: Path, error: BaseException) -> UserError:
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    return UserError(
        f"{final}: cannot be written ({reason}); see to the disk's space and permissions, then start the same command "
        "again: it goes on from the newest checkpoint that is there."
    )


def _damaged(path: Path, name: str, what: str) -> UserError:
    return UserError(f"{path / name}: {what}, so this checkpoint cannot be trusted; restore the file, or use another.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """To the disk, not only to its cache: a file's bytes, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
