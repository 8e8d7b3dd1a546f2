"""What a TFDS builder folder says about its RLDS episodes: `features.json`, `dataset_info.json` and the file names.

<dataset>/[<config>/]<version>/features.json              what each step and each episode holds
                               dataset_info.json          splits, and how many episodes each file holds
                               <dataset>-<split>.tfrecord-00000-of-00010
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.loader import UserError

from .base import SourceError
from .files import read_json, read_text

MAX_VALUES = 4096  # of an action or of proprio
_SHARD = re.compile(r"(?P<dataset>.+)-(?P<split>[^-]+)\.tfrecord-(?P<number>\d{5,})-of-(?P<total>\d{5,})")


@dataclass(frozen=True)
class Leaf:
    """One value that every step (or the episode) has."""

    kind: str  # "image", "tensor", "text" or "other"
    shape: tuple[int, ...]  # of one step's value; -1 where it varies
    dtype: str
    encoding: str  # of an image: "jpeg" or "png"; of a tensor: "none", "bytes" or "zlib"

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_numbers(self) -> bool:
        """Whether it has a fixed count of numbers that can be part of an action or of proprio."""
        is_number = re.fullmatch(r"bool|u?int\d+|float\d+|bfloat16", self.dtype) is not None
        is_small = all(size > 0 for size in self.shape) and self.size <= MAX_VALUES
        return self.kind == "tensor" and is_number and is_small

    @property
    def is_text(self) -> bool:
        """Text, or the code points of text (Language-Table)."""
        return self.kind == "text" or (self.kind == "tensor" and self.dtype.startswith("int"))

    @property
    def is_picture(self) -> bool:
        """Colour pictures only: one channel is depth or a mask, and so is what has more than eight bits."""
        is_colour = len(self.shape) == 3 and self.shape[2] in (3, 4, -1) and self.dtype == "uint8"
        # uint8 tensors without an encoding are lists of integers, whose pixels have no fixed place in the file.
        return is_colour and (self.kind == "image" or (self.encoding in ("bytes", "zlib") and min(self.shape) > 0))


@dataclass(frozen=True)
class Shard:
    path: Path
    split: str
    number: int
    num_episodes: int | None  # as dataset_info.json says


@dataclass(frozen=True)
class Builder:
    """One version of one dataset."""

    root: Path
    name: str
    steps: dict[str, Leaf]  # by path below `steps`, such as observation/image_0
    episode: dict[str, Leaf]  # by path, such as episode_metadata/file_path
    shards: tuple[Shard, ...]
    repairs: tuple[str, ...]

    @property
    def length_key(self) -> str:
        """What there is one of in every step."""
        pictures = (key for key, leaf in self.steps.items() if leaf.is_picture)
        return next(key for key in ("is_first", "is_last", *pictures) if key in self.steps)


def find_builders(path: Path) -> list[Path]:
    """Folders with RLDS episodes at or a few levels below `path`, sorted."""
    if not path.is_dir():
        return []
    for pattern in ("", "*/", "*/*/", "*/*/*/"):
        found = [file.parent for file in path.glob(f"{pattern}features.json") if _describes_steps(file)]
        if found:
            return sorted(found)
    return []


def _describes_steps(features_json: Path) -> bool:
    try:
        return '"steps"' in read_text(features_json)
    except SourceError:
        return False


def read_builder(path: Path) -> Builder:
    """UserError where `path` holds none or several, or where its metadata cannot be understood."""
    roots = find_builders(path)
    if not roots:
        raise UserError(
            f"{path}: holds no RLDS dataset; expected a TFDS folder with features.json and *.tfrecord files."
        )
    if len(roots) > 1:
        names = ", ".join(str(root.relative_to(path)) for root in roots[:8])
        raise UserError(f"{path}: holds {len(roots)} datasets ({names}); give the folder of one of them.")
    root = roots[0]
    tree = _read_json(root / "features.json")
    info = _read_json(root / "dataset_info.json") if (root / "dataset_info.json").is_file() else {}
    try:
        leaves = dict(_leaves(tree, ""))
    except RecursionError as error:
        raise UserError(f"{root / 'features.json'}: is nested too deeply; it is not an RLDS dataset.") from error
    steps = {key.removeprefix("steps/"): leaf for key, leaf in leaves.items() if key.startswith("steps/")}
    if not steps:
        raise UserError(f"{root / 'features.json'}: describes no steps; it is not an RLDS dataset.")
    shards, repairs = _find_shards(root, info)
    return Builder(
        root=root,
        name=info["name"] if isinstance(info.get("name"), str) else shards[0].path.name.partition("-")[0],
        steps=steps,
        episode={key: leaf for key, leaf in leaves.items() if not key.startswith("steps/")},
        shards=shards,
        repairs=repairs,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = read_json(path)
    except SourceError as error:
        raise UserError(f"{path}: cannot be read ({error.detail}); download the dataset's metadata again.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: is not a JSON object; download the dataset's metadata again.")
    return data


# --- features.json ---------------------------------------------------------------------------------------------------


def _leaves(feature: Any, key: str) -> Iterator[tuple[str, Leaf]]:
    """Every value with its path. TFDS wrote `type` and `content` before its version 4.6, and since then a protocol
    buffer as JSON (https://github.com/tensorflow/datasets/blob/master/tensorflow_datasets/core/proto/feature.proto)."""
    if not isinstance(feature, dict):
        return
    class_name = str(feature.get("pythonClassName") or feature.get("type") or "").rpartition(".")[2]
    content = _content(feature)
    match class_name:
        case "FeaturesDict":
            features = content.get("features", content)
            for name, inner in features.items() if isinstance(features, dict) else ():
                yield from _leaves(inner, f"{key}/{name}" if key else name)
        case "Dataset" | "Sequence" if key == "steps":
            yield from _leaves(content.get("feature"), key)
        case "Image":
            encoding = content.get("encodingFormat") or content.get("encoding_format") or "png"
            yield key, Leaf("image", _shape(content), str(content.get("dtype") or "uint8"), str(encoding))
        case "Tensor" | "Scalar" | "BBoxFeature":
            dtype, encoding = str(content.get("dtype")), str(content.get("encoding") or "none")
            kind = "text" if dtype in ("string", "object") else "tensor"
            yield key, Leaf(kind, _shape(content), dtype, encoding)
        case "Text":
            yield key, Leaf("text", (), "string", "none")
        case "ClassLabel":
            yield key, Leaf("tensor", (), "int64", "none")
        case _:
            yield key, Leaf("other", (), class_name, "none")


def _content(feature: dict[str, Any]) -> dict[str, Any]:
    for name in ("featuresDict", "sequence", "tensor", "image", "content"):
        if isinstance(feature.get(name), dict):
            return dict(feature[name])
    return {}


def _shape(content: dict[str, Any]) -> tuple[int, ...]:
    shape = content.get("shape") or []
    sizes = shape.get("dimensions", []) if isinstance(shape, dict) else shape
    return tuple(int(size) if str(size).isdecimal() else -1 for size in sizes)


# --- files -----------------------------------------------------------------------------------------------------------


def _find_shards(root: Path, info: dict[str, Any]) -> tuple[tuple[Shard, ...], tuple[str, ...]]:
    """The files that are there (a part of a dataset is fine), not the ones that the metadata promises."""
    matches = [match for file in sorted(root.iterdir()) if (match := _SHARD.fullmatch(file.name))]
    if not matches:
        other = info.get("fileFormat")
        hint = f"it is stored as {other}, only tfrecord is read" if other not in (None, "tfrecord") else "download them"
        raise UserError(f"{root}: holds no files like name-train.tfrecord-00000-of-00010; {hint}.")
    counts = _episode_counts(info)
    shards, totals = [], {}
    for match in matches:
        split, number, totals[split] = match["split"], int(match["number"]), int(match["total"])
        stated = counts.get(split, [])
        count = stated[number] if len(stated) == int(match["total"]) else None
        shards.append(Shard(root / match.string, split, number, count))
    repairs = []
    for split, total in totals.items():
        num_found = sum(shard.split == split for shard in shards)
        if num_found < total:
            repairs.append(f"Split {split} has {total} files, {num_found} of them are here: the others are left out.")
    return tuple(shards), tuple(repairs)


def _episode_counts(info: dict[str, Any]) -> dict[str, list[int]]:
    """Episodes per file of each split; nothing for a split that is described in another way."""
    counts: dict[str, list[int]] = {}
    splits = info.get("splits")
    for split in splits if isinstance(splits, list) else ():
        try:
            counts[str(split["name"])] = [int(length) for length in split["shardLengths"]]
        except (KeyError, TypeError, ValueError):
            continue
    return counts
