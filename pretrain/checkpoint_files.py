"""The tensors of a checkpoint: every rank writes its part of each parameter, and any number of ranks reads them.

    weights_00000.safetensors  average_…  exp_avg_…  exp_avg_sq_…    one of each per rank: float32, flattened parts
    buffers.safetensors       what belongs to the model besides parameters
    layout.json               who wrote it; shape, tied names and number of updates of the parameters

A part is elements of one flattened parameter; where it begins stands in its file's header. Nothing here knows about
engines: DeepSpeed on 64 ranks and one plain process read and write the same files.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, AVERAGE = "weights", "average"  # every other kind of part is a state of the optimizer's
BUFFERS, LAYOUT = "buffers.safetensors", "layout.json"
STARTS = "starts"


def write_parts(path: Path, parts: Mapping[str, Tensor], starts: Mapping[str, int]) -> None:
    """Parts by the parameter's name, each beginning at an element of the flattened parameter."""
    held = {name: values for name, values in parts.items() if len(values)}
    save_file(held, path, {STARTS: json.dumps({name: starts[name] for name in held})})


def part_file(kind: str, rank: int) -> str:
    return f"{kind}_{rank:05d}.safetensors"


def part_kinds(checkpoint: Path) -> set[str]:
    return {path.name.rpartition("_")[0] for path in checkpoint.glob(part_file("*", 0))}


def read_layout(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / LAYOUT).read_text())


class PartFiles:
    """All parts of one kind. Files are opened as they are needed, beginning with that of rank `first`: a rank of a run
    that goes on as it was needs no other.
    """

    def __init__(self, checkpoint: Path, kind: str, first: int = 0) -> None:
        paths = sorted(checkpoint.glob(part_file(kind, 0).replace("0" * 5, "[0-9]*")))
        self._unopened = paths[first:] + paths[:first]
        self._parts: dict[str, list[tuple[int, int, Any]]] = {}

    def read(self, name: str, start: int, num: int) -> Tensor:
        """Elements of a flattened parameter, wherever they are."""
        while self._num_found(name, start, num) < num:
            self._open_next()
        values = torch.empty(num)
        for first, size, file in self._parts.get(name, ()):
            low, high = max(first, start), min(first + size, start + num)
            if low < high:
                values[low - start : high - start] = file.get_slice(name)[low - first : high - first]
        return values

    def holds(self, name: str) -> bool:
        while name not in self._parts and self._unopened:
            self._open_next()
        return name in self._parts

    def _num_found(self, name: str, start: int, num: int) -> int:
        parts = self._parts.get(name, ())
        return sum(max(0, min(first + size, start + num) - max(first, start)) for first, size, _ in parts)

    def _open_next(self) -> None:
        file = safe_open(self._unopened.pop(0), framework="pt")
        for name, first in json.loads(file.metadata()[STARTS]).items():
            (size,) = file.get_slice(name).get_shape()
            self._parts.setdefault(name, []).append((first, size, file))


class LazyParts(Mapping[str, Tensor]):
    """Elements of parameters, each read when it is asked for: all of them at once may be more than memory holds."""

    def __init__(self, files: PartFiles, spans: Mapping[str, tuple[int, int]]) -> None:
        """`spans` are the first element and the number of them, by the parameter's name."""
        self._files, self._spans = files, spans

    def __getitem__(self, name: str) -> Tensor:
        return self._files.read(name, *self._spans[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)


class CheckpointWeights:
    """The whole weights of a checkpoint, tied names and buffers included; names and shapes at once, tensors one by one.

    Of an average, what is not trained is as it is.
    """

    def __init__(self, checkpoint: Path, averaged: bool) -> None:
        layout = read_layout(checkpoint)
        self._tied: dict[str, str] = layout["tied"]
        self._buffers = load_file(checkpoint / BUFFERS)
        self._kinds = [PartFiles(checkpoint, kind) for kind in ([AVERAGE, WEIGHTS] if averaged else [WEIGHTS])]
        shapes: dict[str, Any] = {**layout["shapes"], **{name: value.shape for name, value in self._buffers.items()}}
        shapes |= {name: shapes[first] for name, first in self._tied.items()}
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}

    def read(self, name: str) -> Tensor:
        if name in self._buffers:
            return self._buffers[name]
        first_name, shape = self._tied.get(name, name), self.shapes[name]
        files = next(files for files in self._kinds if files.holds(first_name))
        return files.read(first_name, 0, torch.Size(shape).numel()).view(shape)

    def read_all(self) -> dict[str, Tensor]:
        return {name: self.read(name) for name in self.shapes}
