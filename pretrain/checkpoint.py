"""Checkpoints: a folder that is there whole or not at all, and resumes a run exactly.

    checkpoints/step_00001000/
      model.safetensors  ema.safetensors    whole float32 weights: all that later stages read, with model.yaml
      engine/                               optimizer states and shards, in the engine's own format
      state.json                            step, seed, samples seen, skipped steps, the caller's further entries
      checksums.json                        size and sha256 of every file above
      COMPLETE                              sha256 of checksums.json, written last

It is written under a temporary name beside its place, synced to disk and renamed, so a kill at any moment leaves the
checkpoints before it as they were. No random-generator state is stored: every step seeds its own (`pretrain.run`).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from configs.loader import UserError

from .ema import ExponentialMovingAverage
from .engine import Engine

WEIGHTS, EMA_WEIGHTS = "model.safetensors", "ema.safetensors"
STATE, CHECKSUMS, COMPLETE = "state.json", "checksums.json", "COMPLETE"
CHECKPOINTS, ENGINE_FOLDER = "checkpoints", "engine"
TEMPORARY = ".tmp-"


# --- find, check, read --------------------------------------------------------------------------------------------


def find_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; what a kill left half-written is not one."""
    return sorted(path for path in folder.glob("step_*") if (path / COMPLETE).is_file())


def verify_checkpoint(path: Path) -> None:
    """Compares every file with its checksum; raises a `UserError` that names the first one that differs."""
    text = (path / CHECKSUMS).read_bytes() if (path / CHECKSUMS).is_file() else b""
    if hashlib.sha256(text).hexdigest().encode() != (path / COMPLETE).read_bytes().strip():
        raise _damaged(path, CHECKSUMS, "is missing or does not match COMPLETE")
    expected: dict[str, dict[str, Any]] = json.loads(text)
    for name, promise in expected.items():
        if not (path / name).is_file():
            raise _damaged(path, name, "is missing")
        size = (path / name).stat().st_size
        if size != promise["bytes"]:
            raise _damaged(path, name, f"has {size} bytes instead of {promise['bytes']}")
        if _sha256(path / name) != promise["sha256"]:
            raise _damaged(path, name, "does not match its checksum")
    # An engine may open whatever lies in its folder, pickles included, so nothing else may lie there.
    for found in _files(path / ENGINE_FOLDER):
        if found.relative_to(path).as_posix() not in expected:
            raise _damaged(path, found.relative_to(path).as_posix(), "was not written by the run")


def load_checkpoint(folder: Path, engine: Engine, ema: ExponentialMovingAverage) -> dict[str, Any] | None:
    """Restores the newest complete checkpoint and returns its state, or None where there is none yet. Collective."""
    # One rank reads all the bytes and the others take its word: a folder that several machines share is read once.
    checkpoints = find_checkpoints(folder)
    problem: UserError | None = None
    if engine.is_main and checkpoints:
        try:
            verify_checkpoint(checkpoints[-1])
        except UserError as error:
            problem = error
    if engine.any_rank(problem is not None):
        raise problem or UserError(f"{checkpoints[-1]}: is damaged, rank 0 says how.")
    if not checkpoints:
        return None
    engine.load(checkpoints[-1] / ENGINE_FOLDER)
    ema.restore(read_weights(checkpoints[-1] / EMA_WEIGHTS))
    return json.loads((checkpoints[-1] / STATE).read_text())


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights by name, from a safetensors file that a checkpoint or an export holds."""
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of a checkpoint's or an export's weights.") from None
    except SafetensorError as error:
        raise UserError(f"{path}: is not a readable safetensors file ({error}); write or copy it again.") from None


# --- write --------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    engine: Engine,
    ema: ExponentialMovingAverage,
    state: Mapping[str, Any],
    *,
    texts: Mapping[str, str],
    keep_last: int,
) -> Path:
    """Writes `step_<state["step"]>` with all ranks, then drops all but the newest `keep_last`. Collective.

    `texts` are small files beside the weights, such as model.yaml, by name.
    """
    final = folder / f"step_{state['step']:08d}"
    partial = folder / f"{TEMPORARY}{final.name}"
    with _told_if_refused(final, partial):
        if engine.is_main:
            for leftover in folder.glob(f"{TEMPORARY}*"):
                shutil.rmtree(leftover)
            (partial / ENGINE_FOLDER).mkdir(parents=True)
        engine.barrier()
        engine.save(partial / ENGINE_FOLDER)
        weights = engine.full_state_dict()
        if engine.is_main:
            write_weights(partial / WEIGHTS, weights)
            write_weights(partial / EMA_WEIGHTS, {**weights, **ema.average})
            (partial / STATE).write_text(json.dumps(dict(state), indent=1) + "\n")
            for name, text in texts.items():
                (partial / name).write_text(text)
        engine.barrier()  # every rank's files are there
        if engine.is_main:
            _seal(partial)
            _replace_folder(partial, final)
            for old in find_checkpoints(folder)[:-keep_last]:
                _remove_checkpoint(old)
        engine.barrier()
    return final


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Safetensors. Tied weights are written under each of their names, so that every reader can load them strictly."""
    storages: set[int] = set()
    unshared = {}
    for name, value in weights.items():
        value = value.detach().cpu().contiguous()
        is_shared = value.untyped_storage().data_ptr() in storages
        storages.add(value.untyped_storage().data_ptr())
        unshared[name] = value.clone() if is_shared else value
    save_file(unshared, path, metadata={"format": "pt"})


def write_export(
    folder: Path, engine: Engine, ema: ExponentialMovingAverage, texts: Mapping[str, str], copies: Sequence[Path]
) -> None:
    """The averaged weights in a folder that stands on its own: with small text files, and copies of the files and
    folders that are needed to use them, where those exist. Collective.
    """
    weights = {**engine.full_state_dict(), **ema.average}
    partial = folder.with_name(f"{TEMPORARY}{folder.name}")
    with _told_if_refused(folder, partial):
        if engine.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write_weights(partial / WEIGHTS, weights)
            for name, text in texts.items():
                (partial / name).write_text(text)
            for source in copies:
                if source.is_dir():
                    shutil.copytree(source, partial / source.name)
                elif source.is_file():
                    shutil.copy(source, partial / source.name)
            _sync_tree(partial)
            _replace_folder(partial, folder)
        engine.barrier()


@contextmanager
def _told_if_refused(final: Path, partial: Path) -> Iterator[None]:
    """One sentence where the disk refuses. What was half-written goes, what was there before stays."""
    try:
        yield
        return
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
    except RuntimeError as error:
        if "inline_container" in str(error):  # all that torch says, whose archives DeepSpeed writes
            reason = "the disk is full or fails"
        elif "Connection closed by peer" in str(error):
            reason = "another rank ended in the middle of it"
        else:
            raise
    shutil.rmtree(partial, ignore_errors=True)
    raise UserError(
        f"{final}: cannot be written ({reason}); see to the disk's space and permissions, then start the same command "
        "again: it goes on from the newest checkpoint that is there."
    )


def _seal(folder: Path) -> None:
    """Checksums over everything, then COMPLETE, each on the disk before the next."""
    names = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    checksums = {name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for name, path in names.items()}
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=1) + "\n")
    _sync_tree(folder)
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


def _damaged(path: Path, name: str, what: str) -> UserError:
    return UserError(
        f"{path / name}: {what}, so this checkpoint cannot be trusted; delete the folder {path} to resume from the "
        f"checkpoint before it."
    )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


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
