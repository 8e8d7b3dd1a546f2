"""RLDS episodes in TFRecord files, as TensorFlow Datasets writes them (Open X-Embodiment, BridgeV2, DROID).

One record is one episode, its steps as long lists. What is read is described by `features.json`
(`rlds_metadata`); the rules are those of https://github.com/google-research/rlds#dataset-format. The format knows no
rate: it is a setting, or that of a dataset in `PUBLISHED_HZ`.
"""

from __future__ import annotations

import io
import math
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image
from pydantic import Field, PositiveFloat

from configs.loader import UserError

from ..embodiments import Embodiment
from ..video_io import VideoError
from .base import Episode, SourceConfig, SourceError, StoredImages, UnknownRateError, content_sha256, key_safe
from .rlds_metadata import Builder, Leaf, Shard, read_builder
from .tfrecord import Feature, RecordError, index_records, parse_example, read_record

# Control rates as the Open X-Embodiment collection states them (https://robotics-transformer-x.github.io).
PUBLISHED_HZ = {
    "bridge": 5.0,
    "bridge_dataset": 5.0,
    "bridge_orig": 5.0,
    "fractal20220817_data": 3.0,
    "kuka": 10.0,
    "taco_play": 15.0,
    "jaco_play": 10.0,
    "berkeley_cable_routing": 10.0,
    "viola": 20.0,
    "berkeley_autolab_ur5": 5.0,
    "toto": 30.0,
    "language_table": 10.0,
    "droid": 15.0,
    "droid_100": 15.0,
    "austin_buds_dataset_converted_externally_to_rlds": 20.0,
    "austin_sailor_dataset_converted_externally_to_rlds": 20.0,
    "austin_sirius_dataset_converted_externally_to_rlds": 20.0,
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": 20.0,
    "utaustin_mutex": 20.0,
}
# Observations that are proprio, the first set that is there; the names that Open X-Embodiment's datasets use
# (https://github.com/octo-models/octo/blob/main/octo/data/oxe/oxe_dataset_configs.py).
PROPRIO_SETS = (
    ("state",),
    ("proprio",),
    ("robot_state",),
    ("EEF_state", "gripper_state"),
    ("eef_state", "gripper_state"),
    ("state_eef", "state_gripper"),
    ("joint_states", "gripper_states"),
    ("joint_position", "gripper_position"),
    ("base_pose_tool_reached", "gripper_closed"),
    ("tcp_pose", "gripper_state"),
    ("effector_translation",),
)
INSTRUCTION_KEYS = (
    "language_instruction",
    "language_instruction_2",
    "language_instruction_3",
    "observation/natural_language_instruction",
    "observation/language_instruction",
    "observation/instruction",
)
# BridgeData V2 (https://rail-berkeley.github.io/bridgedata/): a change of the hand's pose and the gripper; its pose.
BRIDGE = ("bridge", "bridge_dataset", "bridge_orig")
BRIDGE_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
NO_COMMANDS = ("terminate_episode",)  # parts of an action that move nothing


class RldsConfig(SourceConfig):
    """An RLDS dataset in a TFDS folder."""

    kind: Literal["rlds"] = "rlds"
    splits: list[str] | None = Field(default=None, description="splits to read; null: all")
    control_hz: PositiveFloat | None = Field(
        default=None, description="steps per second, which the format does not say; null: as published, if known"
    )
    image_keys: list[str] | None = Field(
        default=None, description="pictures below steps/observation; null: all in colour"
    )
    action_keys: list[str] | None = Field(
        default=None, description="actions below steps, joined in this order; null: action, its parts by name"
    )
    proprio_keys: list[str] | None = Field(
        default=None,
        description="proprio below steps/observation, joined in this order; null: found by its usual names",
    )
    instruction_key: str | None = Field(default=None, description="text below steps; null: found by its usual names")


@dataclass(frozen=True)
class RecordImages(StoredImages):
    """Pictures inside a record, where each of them lies in the file."""

    encoding: str  # "jpeg", "png"; "bytes" or "zlib": raw uint8 of `shape`
    shape: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def codec(self) -> str:
        return self.encoding if self.encoding in ("jpeg", "png") else f"uint8 array ({self.encoding})"

    def read(self, positions: Sequence[int]) -> UInt8[np.ndarray, "f h w 3"]:
        if not positions or min(positions) < 0 or max(positions) >= len(self.starts):
            raise VideoError("out_of_range", self.path, f"frames {list(positions)[:3]} of {len(self.starts)}")
        try:
            with open(self.path, "rb", buffering=0) as file:
                pictures = {i: self._decode(os.pread(file.fileno(), self.sizes[i], self.starts[i])) for i in positions}
            return np.stack([pictures[i] for i in positions])
        except FileNotFoundError as error:
            raise VideoError("missing_video", self.path, "there is no such file") from error
        except (OSError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the machine's fault (too many open files, a broken disk), not the picture's
            raise VideoError(
                "undecodable_video", self.path, f"one of its pictures does not decode ({error})"
            ) from error

    def _decode(self, data: bytes) -> UInt8[np.ndarray, "h w 3"]:
        if self.encoding in ("bytes", "zlib"):
            raw = _inflate(data, math.prod(self.shape)) if self.encoding == "zlib" else data
            return np.frombuffer(raw, np.uint8).reshape(self.shape)[..., :3]
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as picture:
            return np.asarray(picture.convert("RGB"))


class RldsSource:
    """Reads one dataset; episodes are called `train_00003_000012`: split, file and record."""

    format_name = "RLDS (TFRecord)"

    def __init__(self, config: RldsConfig) -> None:
        self._config = config
        folder = config.path.resolve()
        while re.fullmatch(r"\d+\.\d+\.\d+", folder.name):  # the folder above the version has the dataset's name
            folder = folder.parent
        self.name = config.name or key_safe(folder.name)

    def list_episodes(self) -> list[str]:
        _ = self._action_keys, self._image_keys, self._proprio_keys, self._control_hz  # or unusable as a whole
        return [
            f"{key_safe(shard.split)}_{shard.number:05d}_{number:06d}"
            for shard in sorted(self._shards.values(), key=lambda shard: (key_safe(shard.split), shard.number))
            for number in range(_num_episodes(shard))
        ]

    def repairs(self) -> tuple[str, ...]:
        notes = list(self._builder.repairs)
        if self._config.control_hz is None:
            notes.append(
                f"The format has no rate: the steps of {self._builder.name} are taken at the published "
                f"{self._control_hz:g} Hz."
            )
        if not self._action_keys:
            notes.append("The steps have no action: the episodes are read without actions.")
        elif self._config.action_keys is None and len(self._action_keys) > 1:
            notes.append(f"The action has parts, which are joined by name: {_list(self._action_keys)}.")
        if self._action_keys and not self._proprio_keys:
            numbers = [k for k, leaf in self._builder.steps.items() if k.startswith("observation/") and leaf.is_numbers]
            if numbers:
                notes.append(
                    f"None of the observations is a known proprio; proprio_keys can name some of {_list(numbers)}."
                )
        return tuple(notes)

    def embodiment(self) -> Embodiment | None:
        if self._config.embodiment is not None:
            return self._config.embodiment
        if not self._action_keys:
            return None
        action_names = self._dimension_names(self._action_keys)
        is_bridge = self._builder.name in BRIDGE and action_names == BRIDGE_NAMES
        return Embodiment(
            name=key_safe(self._builder.name),
            action_names=action_names,
            proprio_names=self._dimension_names(self._proprio_keys),
            control_hz=self._control_hz,
            delta_actions=tuple(range(6)) if is_bridge else (),
            gripper_actions=tuple(i for i, name in enumerate(action_names) if "gripper" in name.lower()),
        )

    def read_episode(self, episode_id: str) -> Episode:
        place = re.fullmatch(r"(.+)_(\d{5,})_(\d{6,})", episode_id)
        shard = self._shards.get((place[1], int(place[2]))) if place else None
        if place is None or shard is None:
            raise SourceError("unknown_episode", str(self._builder.root), f"there is no episode {episode_id}")
        uri, notes = f"{shard.path}#{int(place[3])}", list(self.repairs())
        try:
            record = read_record(shard.path, int(place[3]))
            _note_surplus(shard, notes)
            steps = _Steps(uri, self._builder, parse_example(record.data, self._is_read), record.data)
        except RecordError as error:
            raise SourceError(error.reason, uri, error.detail) from error
        if steps.flag("invalid"):
            raise SourceError("invalid_episode", uri, "the recording itself says that it is invalid")
        views = {
            name: RecordImages(
                path=str(shard.path),
                num_frames=steps.num_steps,
                fps=self._control_hz,
                encoding=self._builder.steps[key].encoding.lower(),
                shape=self._builder.steps[key].shape,
                starts=tuple(record.start + picture.start for picture in pictures),
                sizes=tuple(picture.stop - picture.start for picture in pictures),
            )
            for key, name in _short_names(self._image_keys).items()
            if (pictures := steps.pictures(key, notes))
        }
        if not views:
            raise SourceError("no_images", uri, "none of its views holds real pictures")
        actions = steps.matrix(self._action_keys, notes)
        embodiment = self.embodiment() if actions is not None else None
        instruction = self._config.instruction or steps.instruction(self._instruction_keys, notes)
        return Episode(
            source=self.name,
            episode_id=episode_id,
            uri=uri,
            views=views,
            fps=self._control_hz,
            num_frames=steps.num_steps,
            actions=None if actions is None else steps.without_last_action(actions, notes),
            proprio=None if actions is None else steps.matrix(self._proprio_keys, notes),
            control_hz=self._control_hz if actions is not None else None,
            embodiment=embodiment.name if embodiment is not None else None,
            instruction=instruction,
            success=steps.flag("success"),
            licence=self._config.licence,
            content_sha256=content_sha256([], record.data, (instruction or "").encode()),
            repairs=tuple(notes),
        )

    def _is_read(self, name: str) -> bool:
        """Whether a value of a record is looked at: the others may be large."""
        step_key = name.removeprefix("steps/")
        keys = (*self._image_keys, *self._action_keys, *self._proprio_keys, *self._instruction_keys)
        return step_key == name or step_key in (*keys, "is_first", "is_last", self._builder.length_key)

    # --- what is read, the same for every episode ---

    @cached_property
    def _builder(self) -> Builder:
        return read_builder(self._config.path)

    @cached_property
    def _shards(self) -> dict[tuple[str, int], Shard]:
        found = {shard.split for shard in self._builder.shards}
        splits = found if self._config.splits is None else set(self._config.splits)
        if not splits <= found:
            raise UserError(
                f"{self._builder.root}: has no split {', '.join(sorted(splits - found))}; it has "
                f"{', '.join(sorted(found))}."
            )
        return {(key_safe(shard.split), shard.number): shard for shard in self._builder.shards if shard.split in splits}

    @cached_property
    def _control_hz(self) -> float:
        config = self._config
        hz = config.control_hz or (config.embodiment and config.embodiment.control_hz)
        hz = hz or PUBLISHED_HZ.get(self._builder.name)
        if hz is None:
            raise UnknownRateError(
                f"{self._builder.root}: RLDS does not say how many steps there are in a second, and no rate is known "
                f"for {self._builder.name}; set control_hz."
            )
        return hz

    @cached_property
    def _image_keys(self) -> tuple[str, ...]:
        if self._config.image_keys is not None:
            return self._keys("image_keys", self._config.image_keys, "is_picture")
        keys = tuple(k for k, leaf in self._builder.steps.items() if k.startswith("observation/") and leaf.is_picture)
        if not keys:
            raise UserError(f"{self._builder.root}: its observations have no colour pictures that can be read.")
        return tuple(sorted(keys))

    @cached_property
    def _action_keys(self) -> tuple[str, ...]:
        if self._config.action_keys is not None:
            return self._keys("action_keys", self._config.action_keys, "is_numbers")
        numbers = [key for key, leaf in self._builder.steps.items() if leaf.is_numbers]
        parts = [k for k in numbers if k.startswith("action/") and k.rpartition("/")[2] not in NO_COMMANDS]
        return ("action",) if "action" in numbers else tuple(sorted(parts))

    @cached_property
    def _proprio_keys(self) -> tuple[str, ...]:
        if self._config.proprio_keys is not None:
            return self._keys("proprio_keys", self._config.proprio_keys, "is_numbers")
        numbers = {key for key, leaf in self._builder.steps.items() if leaf.is_numbers}
        sets = [tuple(f"observation/{name}" for name in names) for names in PROPRIO_SETS]
        return next((keys for keys in sets if numbers.issuperset(keys)), ())

    @cached_property
    def _instruction_keys(self) -> tuple[str, ...]:
        key = self._config.instruction_key
        return self._keys("instruction_key", [key], "is_text") if key is not None else INSTRUCTION_KEYS

    def _keys(self, setting: str, given: Sequence[str], wanted: str) -> tuple[str, ...]:
        """The given keys as paths below `steps`."""
        steps, found = self._builder.steps, []
        for key in given:
            paths = [
                path for path in (key.removeprefix("steps/"), f"observation/{key}", f"action/{key}") if path in steps
            ]
            if not paths or not getattr(steps[paths[0]], wanted):
                usable = ", ".join(path for path, leaf in steps.items() if getattr(leaf, wanted)) or "none"
                raise UserError(f"{self._builder.root}: {setting} has {key}, the steps have {usable}.")
            found.append(paths[0])
        return tuple(found)

    def _dimension_names(self, keys: Sequence[str]) -> tuple[str, ...]:
        sizes = [self._builder.steps[key].size for key in keys]
        if self._builder.name in BRIDGE and sizes == [len(BRIDGE_NAMES)]:
            return BRIDGE_NAMES
        names: list[str] = []
        for key, name in _short_names(keys).items():
            size = self._builder.steps[key].size
            names += [name] if size == 1 else [f"{name}_{i}" for i in range(size)]
        return tuple(names)


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """`observation/image_0` -> `image_0`; whole keys where short names would collide."""
    short = {key: key_safe(key.rpartition("/")[2]) for key in keys}
    return short if len(set(short.values())) == len(keys) else {key: key_safe(key) for key in keys}


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "")


def _num_episodes(shard: Shard) -> int:
    """As the metadata says; else by looking, and what follows a damaged spot is one episode that cannot be read."""
    if shard.num_episodes is not None:
        return shard.num_episodes
    index = index_records(shard.path)
    return len(index.starts) + (index.damage is not None)


def _note_surplus(shard: Shard, notes: list[str]) -> None:
    found = len(index_records(shard.path).starts)
    if shard.num_episodes is not None and found > shard.num_episodes:
        notes.append(
            f"{shard.path.name} has {found} episodes, dataset_info.json says {shard.num_episodes}: the others are left "
            "out."
        )


# --- the steps of one episode ----------------------------------------------------------------------------------------


class _Steps:
    """One episode's values, checked against what the metadata says about them."""

    def __init__(self, uri: str, builder: Builder, values: dict[str, Feature], data: bytes) -> None:
        self._uri = uri
        self._builder = builder
        self._values = values
        self._data = data
        self.num_steps = len(self._value(builder.length_key))
        if self.num_steps == 0:
            raise SourceError("too_short", uri, "it has no steps")

    def flag(self, name: str) -> bool | None:
        """A yes or no about the whole episode; None where the dataset does not say."""
        for key, leaf in self._builder.episode.items():
            value = self._values.get(key)
            if key.rpartition("/")[2] == name and leaf.is_numbers and isinstance(value, np.ndarray) and len(value):
                return bool(value[0])
        return None

    def pictures(self, key: str, notes: list[str]) -> list[slice]:
        """Where the pictures of a view lie in the record; none where they only fill its place."""
        places = self._value(key)
        if not isinstance(places, list) or len(places) != self.num_steps:
            detail = f"{key} has {len(places)} pictures for {self.num_steps} steps"
            raise SourceError("frame_count_mismatch", self._uri, detail)
        name = key.rpartition("/")[2]
        if self.flag(f"has_{name}") is False:  # some datasets say so of every view, real or not
            if len({self._data[place] for place in places}) == 1:
                notes.append(f"has_{name} is false, and all pictures of {name} are the same: the view is left out.")
                return []
            notes.append(f"has_{name} is false, but the pictures of {name} change: the view is used.")
        return places

    def matrix(self, keys: Sequence[str], notes: list[str]) -> Float32[np.ndarray, "n d"] | None:
        """The values of the keys side by side, a row per step."""
        if not keys:
            return None
        rows = np.concatenate([self._numbers(key) for key in keys], axis=1)
        num_bad = int(np.count_nonzero(~np.isfinite(rows).all(axis=1)))
        if num_bad:
            notes.append(f"{', '.join(keys)}: {num_bad} rows are not finite numbers and do not count as recorded.")
        return rows

    def without_last_action(self, actions: Float32[np.ndarray, "n a"], notes: list[str]) -> np.ndarray:
        """The last step is only an observation: its action is no number, so that nobody trains on it."""
        is_last = self._values.get("steps/is_last")
        if not isinstance(is_last, np.ndarray) or len(is_last) != self.num_steps or not is_last.any():
            notes.append("No step is marked as the last one: the action of the last step counts as executed.")
            return actions
        return np.where(is_last[:, None] != 0, np.float32(np.nan), actions)

    def instruction(self, keys: Sequence[str], notes: list[str]) -> str | None:
        for key in keys:
            texts = dict.fromkeys(text for text in self._texts(key) if text)
            if texts:
                first = next(iter(texts))
                if len(texts) > 1:
                    notes.append(f"The steps have {len(texts)} different texts: the first is the instruction.")
                return first
        notes.append("The steps have no text: the episode has no instruction.")
        return None

    def _value(self, key: str) -> Feature:
        value = self._values.get(f"steps/{key}")
        if value is None:
            raise SourceError("missing_column", self._uri, f"it has no {key}, which features.json promises")
        return value

    def _numbers(self, key: str) -> Float32[np.ndarray, "n d"]:
        leaf, value = self._builder.steps[key], self._value(key)
        try:
            if isinstance(value, list):
                value = np.concatenate([_decode_tensor(self._data[place], leaf) for place in value])
            with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and is then seen as such
                return value.reshape(self.num_steps, leaf.size).astype(np.float32)
        except (ValueError, TypeError, zlib.error) as error:
            detail = f"{key} does not have {leaf.size} values for each of {self.num_steps} steps"
            raise SourceError("wrong_dims", self._uri, detail) from error

    def _texts(self, key: str) -> list[str]:
        value = self._values.get(f"steps/{key}")
        if isinstance(value, list):
            texts = [self._data[place].decode("utf-8", "replace") for place in value]
        elif isinstance(value, np.ndarray) and value.dtype == np.int64 and len(value) % self.num_steps == 0:
            rows = value.reshape(self.num_steps, -1)  # Language-Table: code points, filled up with zeros
            texts = ["".join(chr(code) for code in row if 0 < code < 0x110000) for row in np.unique(rows, axis=0)]
        else:
            return []
        return [" ".join(text.split()) for text in texts]


def _decode_tensor(data: bytes, leaf: Leaf) -> np.ndarray:
    dtype = np.dtype(leaf.dtype)
    return np.frombuffer(_inflate(data, leaf.size * dtype.itemsize) if leaf.encoding == "zlib" else data, dtype)


def _inflate(data: bytes, size: int) -> bytes:
    """At most one byte more than it should be: a few bytes can unpack to any size."""
    return zlib.decompressobj().decompress(data, size + 1)
