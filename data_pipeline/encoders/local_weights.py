"""Pretrained weights in a local folder: found, hashed and referred to; never downloaded, never unpickled, never copied.

A dataset records *where* its encoder's weights were and the hash of what they were (`save_reference`). Opening the
dataset later checks the hash (`load_reference`), so latents are never decoded by weights that did not make them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from configs.loader import UserError

CONFIG_NAME = "config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def find_model_folder(folder: Path, part: str, example: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers") -> Path:
    """`folder` itself, or its `part` (`vae`, `text_encoder`) if `folder` is a whole pipeline in diffusers' layout."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder: pretrained weights are read from this machine only, so download the model "
            f"first (for example `hf download {example} --local-dir FOLDER`) and give its folder."
        )
    inner = folder / part
    chosen = inner if (inner / CONFIG_NAME).is_file() else folder
    if not (chosen / CONFIG_NAME).is_file():
        raise UserError(
            f"{folder} holds no {CONFIG_NAME} and no {part}/{CONFIG_NAME}: give the folder of the model, or of a whole "
            "pipeline in diffusers' layout."
        )
    if not any(chosen.glob("*.safetensors")):
        raise UserError(
            f"{chosen} holds no .safetensors file: pickled weights (.bin, .pt, .pth) are never opened, so convert them "
            "to safetensors or download the safetensors version of the model."
        )
    return chosen


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): restore it, or write its folder again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold one JSON object, not a {type(content).__name__}: write its folder again.")
    return content


def hash_files(paths: Iterable[Path]) -> str:
    """sha256 over names and contents; independent of where the files lie and of the order they are given in."""
    digest = hashlib.sha256()
    for path in sorted(set(paths), key=lambda path: path.name):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def load_pretrained(model_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A model of transformers, frozen. UserError where the folder holds not all of it."""
    try:
        model, info = model_class.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # transformers raises OSError, ValueError, RuntimeError and safetensors' own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: its weights cannot be loaded ({reason}); copy the folder again.") from error
    check_complete(folder, info)
    return model.eval().requires_grad_(False)


def check_complete(folder: Path, loading_info: Mapping[str, Any]) -> None:
    """transformers only warns, and leaves what is missing random."""
    missing = sorted({*map(str, loading_info["missing_keys"]), *map(str, loading_info["mismatched_keys"])})
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors are missing (first: {missing[0]}); download it again.")


def save_reference(target: Path, *, kind: str, weight_hash: str, **fields: str | int) -> None:
    target.mkdir(parents=True, exist_ok=True)
    reference = {"kind": kind, **fields, "weight_hash": weight_hash}
    (target / CONFIG_NAME).write_text(json.dumps(reference, indent=2) + "\n", encoding="utf-8")


def load_reference(folder: Path, fields: Iterable[str]) -> dict[str, Any]:
    """What `save_reference` wrote, with every one of `fields` (besides kind and weight_hash) known to be there."""
    path = folder / CONFIG_NAME
    reference = read_json(path)
    missing = sorted({"kind", "weight_hash", *fields} - reference.keys())
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: it was not saved by an encoder; build the dataset again.")
    if not isinstance(reference["weight_hash"], str):
        raise UserError(f"{path}: its weight_hash must be text: restore the file, or build the dataset again.")
    return reference


def check_weight_hash(path: Path, *, recorded: str, found: str, weights: Path | str) -> None:
    if recorded != found:
        raise UserError(
            f"{weights} is not the encoder that {path} was written for (sha256 {found[:12]} instead of "
            f"{recorded[:12]}): put the original weights back, or point the file's `folder` at them."
        )
