"""Tensors in safetensors files, one file or several shards: read one by one, written shard by shard, never unpickled.

The names of the files are those of transformers and diffusers: `STEM.safetensors`, or where that would be large
`STEM-00001-of-00003.safetensors` … with `STEM.safetensors.index.json`, which says what lies where.
"""

import copy
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from configs.loader import UserError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

Shape = tuple[int, ...]


class Weights(Protocol):
    """Tensors by name, of which anybody reads the elements that he needs."""

    @property
    def shapes(self) -> Mapping[str, Shape]: ...

    def part(self, name: str, start: int, num: int) -> Float[Tensor, "num"]:
        """Elements of a flattened tensor."""
        ...


class FirstOf:
    """Several sources as one: of those that have a name the first one counts."""

    def __init__(self, *sources: Weights) -> None:
        self._sources = {name: source for source in reversed(sources) for name in source.shapes}
        self.shapes = {name: source.shapes[name] for name, source in self._sources.items()}

    def part(self, name: str, start: int, num: int) -> Float[Tensor, "num"]:
        return self._sources[name].part(name, start, num)


class WeightFiles:
    """The tensors of one `stem` in a folder. Names and shapes are known at once, tensors are read one by one.

    Raises a `UserError` where a file is missing, cannot be read, or is not safetensors.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder = folder
        self.shapes: dict[str, Shape] = {}
        self._stored: dict[str, tuple[Path, str]] = {}
        for path in _files(folder, stem):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118  # a file is no dict
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
                    self._stored[name] = path, name

    def renamed(self, rename: Callable[[str], str]) -> Self:
        """The same tensors under other names."""
        return self._under({name: rename(name) for name in self.shapes})

    def without(self, prefix: str) -> Self:
        """The tensors whose names begin otherwise."""
        return self._under({name: name for name in self.shapes if not name.startswith(prefix)})

    def _under(self, names: Mapping[str, str]) -> Self:
        other = copy.copy(self)
        other.shapes = {new: self.shapes[name] for name, new in names.items()}
        other._stored = {new: self._stored[name] for name, new in names.items()}
        return other

    def read(self, name: str) -> Tensor:
        path, stored_name = self._stored[name]
        with _opened(path) as file:
            return file.get_tensor(stored_name)

    def part(self, name: str, start: int, num: int) -> Float[Tensor, "num"]:
        """Only the rows that it lies in are read. What is not finite is refused: nothing good can come of it."""
        values = self._part(name, start, num)
        bad = int((~values.float().isfinite()).sum())
        if bad:
            raise UserError(
                f"{self.folder}: {bad} of the numbers of {name} are not finite (NaN or infinity); copy the folder "
                "again, or give that of another checkpoint."
            )
        return values

    def _part(self, name: str, start: int, num: int) -> Float[Tensor, "num"]:
        shape = self.shapes[name]
        if not shape:
            return self.read(name).view(1)[start : start + num]
        row = torch.Size(shape[1:]).numel()
        first, end = start // row, -(-(start + num) // row)
        path, stored_name = self._stored[name]
        with _opened(path) as file:
            return file.get_slice(stored_name)[first:end].flatten()[start - first * row :][:num]


def misfit(module: nn.Module, *sources: Weights) -> str:
    """What keeps the sources' tensors from being a module's own, as the middle of a sentence; empty if nothing does."""
    found = {name: shape for source in sources for name, shape in source.shapes.items()}
    return differences({name: tuple(value.shape) for name, value in module.state_dict().items()}, found)


@torch.no_grad()
def load_into(module: nn.Module, *sources: Weights) -> None:
    """Copies tensors into a module's own, whatever their number format, one at a time."""
    target = module.state_dict()
    for source in sources:
        for name in source.shapes:
            target[name].copy_(source.part(name, 0, target[name].numel()).view_as(target[name]))


def _files(folder: Path, stem: str) -> list[Path]:
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
        what = f"its weights are pickles ({pickles[0]})" if pickles else f"holds no {whole.name}"
        raise UserError(f"{folder}: {what}; give a folder with safetensors, which cannot run code when they are read.")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index}: is not an index of weights; copy the folder again.") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: names {name!r}, which is no safetensors file beside it; copy the folder again.")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: is missing, but {index.name} names it; copy the folder again.")
    return [folder / name for name in names]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy or write it again.") from None


def differences(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> str:
    """What keeps found tensors from being loaded, as the middle of a sentence; empty where nothing does."""
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    reshaped = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    told = []
    if missing:
        told.append(f"{len(missing)} of {len(expected)} tensors are missing, first {missing[0]}{_near(missing, found)}")
    if unknown:
        told.append(f"{len(unknown)} are not known here, first {unknown[0]}{_near(unknown, expected)}")
    if reshaped:
        name = reshaped[0]
        shapes = f"{list(found[name])} instead of {list(expected[name])}"
        told.append(f"{len(reshaped)} have another shape, first {name} with {shapes}")
    return "; ".join(told)


def _near(names: Sequence[str], others: Mapping[str, Shape]) -> str:
    near = difflib.get_close_matches(names[0], others, n=1, cutoff=0.8)
    return f" (nearest: {near[0]})" if near else ""


def write_shards(
    folder: Path,
    stem: str,
    shapes: Mapping[str, Shape],
    read: Callable[[str], Tensor],
    max_shard_bytes: int,
    dtype: torch.dtype,
) -> list[Path]:
    """Writes the tensors that `read` gives by name, one shard in memory at a time; one file where all fit into one."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    paths = [folder / f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        paths = [folder / f"{stem}.safetensors"]
    for path, names in zip(paths, shards, strict=True):
        # Cloned, because tensors that share memory (views, tied weights) are refused.
        save_file({name: read(name).to(dtype, copy=True).contiguous() for name in names}, path, {"format": "pt"})
    if len(shards) > 1:
        total = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
        weight_map = {name: path.name for path, names in zip(paths, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return paths
