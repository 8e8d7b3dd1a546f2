"""Weights of a measuring network in one file on this machine: safetensors, or a state dict of `torch.save`.

Such networks are published as state dicts. torch reads those without running what else a pickle may hold; TorchScript
archives and whole pickled models are programs, and refused.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from configs.loader import UserError

from ..weights import differences

UNUSED = ".num_batches_tracked"  # of batch norms, which count in training alone


def read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a file of weights.") from None
    try:
        with warnings.catch_warnings(action="ignore"):  # what it warns of is refused
            is_safe = path.suffix == ".safetensors"
            found: Any = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch lets through whatever a damaged or a foreign file provokes
        raise UserError(
            f"{path}: is no state dict ({_first_sentence(error)}); give a .safetensors file, or one that torch.save "
            "wrote of a state dict (TorchScript and whole models are programs, which are not run)."
        ) from None
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path}: holds no tensors by name; give a file of one state dict.")
    return {name: value.float() for name, value in found.items() if not name.endswith(UNUSED)}


def fill(network: nn.Module, found: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Loads the tensors of a file into a network, if they are the same ones; else a `UserError`."""
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items() if not name.endswith(UNUSED)}
    problem = differences(expected, {name: tuple(value.shape) for name, value in found.items()})
    if problem:
        raise UserError(f"{path}: is not {what} ({problem}); give a file with its weights.")
    network.load_state_dict(found, strict=False)
    network.eval().requires_grad_(False)


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:120].split(". ")[0].rstrip(".") or type(error).__name__
