"""TFRecord files and RLDS datasets, written by hand: TensorFlow is no dependency, not even of the tests."""

import io
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from PIL import Image

from tests.data_pipeline.recordings import actions_of, numbered_frames

Values = Sequence[bytes] | np.ndarray
"""Byte strings, float32 or int64."""


def masked(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def tfrecord(payloads: Sequence[bytes]) -> bytes:
    lengths = [struct.pack("<Q", len(payload)) for payload in payloads]
    return b"".join(n + masked(n) + data + masked(data) for n, data in zip(lengths, payloads, strict=True))


def varint(value: int) -> bytes:
    value %= 2**64
    groups = [value >> shift & 127 for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes([group | 128 for group in groups[:-1]] + groups[-1:])


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def feature(values: Values, is_packed: bool = True) -> bytes:
    if not isinstance(values, np.ndarray):
        return field(1, b"".join(field(1, value) for value in values))
    if values.dtype == np.float32:
        singles = [value.tobytes() for value in values.reshape(-1)]
        number, wire_type = 2, 5
    else:
        singles = [varint(int(value)) for value in values.reshape(-1)]
        number, wire_type = 3, 0
    if is_packed:
        return field(number, field(1, b"".join(singles)))
    return field(number, b"".join(varint(1 << 3 | wire_type) + single for single in singles))


def features(values: Mapping[str, Values], is_packed: bool = True) -> bytes:
    entries = [field(1, name.encode()) + field(2, feature(one, is_packed)) for name, one in values.items()]
    return b"".join(field(1, entry) for entry in entries)


def example(values: Mapping[str, Values], is_packed: bool = True) -> bytes:
    return field(1, features(values, is_packed))


def encode_image(frame: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, kind)
    return buffer.getvalue()


# --- features.json -------------------------------------------------------------------------------------------------


def tensor(dtype: str, *shape: int, encoding: str = "none") -> dict[str, Any]:
    sizes = {"dimensions": [str(size) for size in shape]} if shape else {}
    return {
        "pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor",
        "tensor": {"shape": sizes, "dtype": dtype, "encoding": encoding},
    }


def image(*shape: int, encoding: str = "png", dtype: str = "uint8") -> dict[str, Any]:
    return {
        "pythonClassName": "tensorflow_datasets.core.features.image_feature.Image",
        "image": {
            "shape": {"dimensions": [str(size) for size in shape]},
            "dtype": dtype,
            "encodingFormat": encoding,
        },
    }


TEXT = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}


def features_dict(inner: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {"features": dict(inner)},
    }


def steps(inner: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "pythonClassName": "tensorflow_datasets.core.features.dataset_feature.Dataset",
        "sequence": {"feature": features_dict(inner)},
    }


STEPS = {
    "action": tensor("float32", 3),
    "is_first": tensor("bool"),
    "is_last": tensor("bool"),
    "language_instruction": TEXT,
    "observation": features_dict(
        {
            "image": image(48, 64, 3),
            "wrist_image": image(48, 64, 3, encoding="jpeg"),
            "depth": image(48, 64, 1),
            "state": tensor("float32", 2),
        }
    ),
}
EPISODE = {"episode_metadata": features_dict({"file_path": TEXT, "success": tensor("bool")})}


# --- datasets --------------------------------------------------------------------------------------------------------


def episode_values(index: int, length: int, **changes: Values | None) -> dict[str, Values]:
    """Frame i of episode e shows the number 100 e + i. None leaves a value out; `__` in a name stands for `/`."""
    frames = numbered_frames([100 * index + i for i in range(length)])
    actions = actions_of(index, length)
    values: dict[str, Values | None] = {
        "steps/action": actions,
        "steps/is_first": (np.arange(length) == 0).astype(np.int64),
        "steps/is_last": (np.arange(length) == length - 1).astype(np.int64),
        "steps/language_instruction": [b"push the block"] * length,
        "steps/observation/image": [encode_image(frame) for frame in frames],
        "steps/observation/wrist_image": [encode_image(255 - frame, "JPEG") for frame in frames],
        "steps/observation/depth": [encode_image(frame[..., 0]) for frame in frames],
        "steps/observation/state": actions[:, :2] + np.float32(100),
        "episode_metadata/file_path": [b"/raw/%d" % index],
        "episode_metadata/success": np.array([1]),
    }
    values |= {name.replace("__", "/"): value for name, value in changes.items()}
    return {name: value for name, value in values.items() if value is not None}


def write_rlds(
    root: Path,
    payloads: Mapping[str, Sequence[Sequence[bytes]]],
    *,
    step_features: Mapping[str, Any] = STEPS,
    episode_features: Mapping[str, Any] = EPISODE,
    name: str = "two_joints",
    info: Mapping[str, Any] | None = None,
) -> Path:
    """A builder folder: for each split its files, for each file its episodes' payloads."""
    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    tree = features_dict({"steps": steps(step_features), **episode_features})
    (folder / "features.json").write_text(json.dumps(tree))
    splits = [{"name": split, "shardLengths": [str(len(file)) for file in files]} for split, files in payloads.items()]
    data = {"name": name, "fileFormat": "tfrecord", "splits": splits} if info is None else info
    (folder / "dataset_info.json").write_text(json.dumps(data))
    for split, files in payloads.items():
        for number, file in enumerate(files):
            path = folder / f"{name}-{split}.tfrecord-{number:05d}-of-{len(files):05d}"
            path.write_bytes(tfrecord(file))
    return folder
