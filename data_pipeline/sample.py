"""The data contract: what one sample of a dataset consists of, as bytes in a shard and as a typed record.

    K.<view>.mp4                   constant frame rate, closed short GOP; `views[<view>]` of the meta has its size
    K.<view>.latents.safetensors   {"latents": bfloat16 [t c h w]}
    K.text.safetensors             {"text": bfloat16 [l d]}, unpadded
    K.actions.npy                  float32 [k a], raw physical units; row i is executed from i / control_hz on
    K.proprio.npy                  float32 [k s], the robot's state when action i starts
    K.meta.json                    `SampleMeta`

A member is absent, never empty; none is a pickle. A clip has F frames, (F - 1) % 4 == 0, and k = (F - 1) * r actions,
r = control_hz / fps a whole number: latent frame i >= 1 takes the actions 4r(i - 1) to 4ri. Dims: see the legend in
docs (t latent frames, c channels, l text tokens, d width, k actions, a action dim, s proprio dim).
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from jaxtyping import BFloat16, Float32
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from .encoder_config import TEMPORAL_STRIDE
from .shards import Bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SCHEMA_VERSION = 1
"""Raised when a reader of the old version would misread a new dataset."""

KEY = re.compile(r"[A-Za-z0-9_-]+")
"""No dot: WebDataset ends the key at the first dot of the file's name."""

VIEW_NAME = re.compile(r"[a-z0-9_-]+")
"""No dot, and lower case because WebDataset lower-cases what follows the key."""


class _Record(BaseModel):
    """Strict as a config is, but without what only settings need: training reads one with every sample."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SourceMeta(_Record):
    name: str
    uri: str = Field(description="Where the episode was read from.")
    licence: str | None
    sha256: str = Field(description="Of the bytes that the episode was read from.")


class ViewMeta(_Record):
    height: int
    width: int
    role: str = Field(description="wrist | head | external, guessed from the view's name.")


class SampleMeta(_Record):
    """`K.meta.json`."""

    schema_version: int
    source: SourceMeta
    episode: str
    clip_index: int
    start_s: float = Field(description="Of the clip in its episode.")
    fps: float
    control_hz: float | None = Field(description="Of the rows in this sample (resampled), not of the robot.")
    num_frames: int
    views: dict[str, ViewMeta]
    embodiment: str | None
    instruction: str | None
    captions: tuple[str, ...]
    has_actions: bool
    success: bool | None
    action_spans: tuple[tuple[int, int], ...] = Field(description="Rows [first, end) whose actions are valid.")
    filter_scores: dict[str, float]


@dataclass(frozen=True)
class Sample:
    """One clip; `None` and missing views stand for absent members."""

    key: str
    meta: SampleMeta
    video: dict[str, bytes] = field(default_factory=dict)  # view -> mp4
    latents: dict[str, BFloat16[Tensor, "t c h w"]] = field(default_factory=dict)  # view -> latents
    text: BFloat16[Tensor, "l d"] | None = None
    actions: Float32[np.ndarray, "k a"] | None = None
    proprio: Float32[np.ndarray, "k s"] | None = None

    def to_members(self) -> dict[str, Any]:
        """A WebDataset sample: `__key__` and the members' bytes by suffix, sorted."""
        members = {"meta.json": self.meta.model_dump_json().encode()}
        members |= {f"{view}.mp4": data for view, data in self.video.items()}
        members |= {f"{view}.latents.safetensors": tensor_bytes("latents", x) for view, x in self.latents.items()}
        if self.text is not None:
            members["text.safetensors"] = tensor_bytes("text", self.text)
        if self.actions is not None:
            members["actions.npy"] = array_bytes(self.actions)
        if self.proprio is not None:
            members["proprio.npy"] = array_bytes(self.proprio)
        return {"__key__": self.key, **{suffix: members[suffix] for suffix in sorted(members)}}

    @classmethod
    def from_members(cls, members: Mapping[str, Any]) -> Self:
        """Of a valid sample (see `validate`)."""
        return cls(
            key=members["__key__"],
            meta=SampleMeta.model_validate_json(members["meta.json"]),
            video={s.removesuffix(".mp4"): data for s, data in members.items() if s.endswith(".mp4")},
            latents={
                s.removesuffix(".latents.safetensors"): read_tensor("latents", data)
                for s, data in members.items()
                if s.endswith(".latents.safetensors")
            },
            text=read_tensor("text", members["text.safetensors"]) if "text.safetensors" in members else None,
            actions=read_array(members["actions.npy"]) if "actions.npy" in members else None,
            proprio=read_array(members["proprio.npy"]) if "proprio.npy" in members else None,
        )


# --- members as bytes ---------------------------------------------------------------------------------------------


def array_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def read_array(data: Bytes) -> np.ndarray:
    """Raises ValueError where the bytes are not those of `array_bytes`."""
    header = bytes(data[: 10 + int.from_bytes(data[8:10], "little")])
    try:
        layout = _array_layout(header)
        if layout is None:
            return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        shape, dtype = layout
        return np.ndarray(shape, dtype, data, len(header)).copy()
    except _DAMAGED_HEADER as error:
        raise ValueError(str(error)) from error


_DAMAGED_HEADER = (SyntaxError, tokenize.TokenError, TypeError, OverflowError, MemoryError)
"""What numpy may raise besides ValueError."""


@lru_cache(maxsize=64)
def _array_layout(header: bytes) -> tuple[tuple[int, ...], np.dtype] | None:
    """Shape and dtype of a usual array; None: numpy has to read it.

    Samples share few headers, and numpy takes longer to parse one than to read a hundred arrays.
    """
    stream = io.BytesIO(header)
    if np.lib.format.read_magic(stream) != (1, 0):
        return None
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    return None if is_fortran or dtype.hasobject else (shape, dtype)


def tensor_bytes(name: str, tensor: Tensor) -> bytes:
    from safetensors.torch import save  # imports torch: seconds that whoever only cuts clips need not wait

    return save({name: tensor.contiguous()})


def read_tensor(name: str, data: Bytes) -> Tensor:
    """It shares the memory of `data` where that can be written to.

    Raises ValueError or KeyError where the bytes are not those of `tensor_bytes`.
    """
    import torch  # as in `tensor_bytes`

    header = bytes(data[: 8 + int.from_bytes(data[:8], "little")])
    kind = (name, header, len(data))
    if kind in _known_tensors:
        dtype, shape = _known_tensors[kind]
        numbers = memoryview(data)[len(header) :]
        return torch.frombuffer(bytearray(numbers) if numbers.readonly else numbers, dtype=dtype).reshape(shape)
    tensors = _read_tensors(data)
    tensor = tensors[name]
    if len(tensors) == 1 and tensor.numel() and len(header) < 1000 and len(_known_tensors) < 1000:
        _known_tensors[kind] = tensor.dtype, tensor.shape
    return tensor


_known_tensors: dict[tuple[str, bytes, int], tuple[torch.dtype, torch.Size]] = {}
"""Type and shape by name, header and size of files that safetensors has read: it would find the same in all others of
their kind. Samples are of few kinds, and each takes it longer than the numbers do."""


def _read_tensors(data: Bytes) -> dict[str, Tensor]:
    from safetensors.torch import load  # as in `tensor_bytes`

    try:
        return load(bytes(data))
    except SafetensorError as error:
        raise ValueError(str(error)) from error


# --- validation ---------------------------------------------------------------------------------------------------


def validate(members: Mapping[str, Any]) -> list[str]:
    """What breaks the contract, one line per problem: `key: field: expected …, found …`. Pixels are not decoded."""
    key = str(members.get("__key__"))
    check = _Checker(key, members)
    if not KEY.fullmatch(key):
        check.fail("__key__", "letters, digits, _ and - only", repr(key))
    meta = check.meta()
    if meta is None:
        return check.problems
    if meta.schema_version != SCHEMA_VERSION:
        check.fail("meta.json schema_version", SCHEMA_VERSION, meta.schema_version)
    if meta.num_frames < 1 or (meta.num_frames - 1) % TEMPORAL_STRIDE:
        check.fail("meta.json num_frames", "1, 5, 9, 13, …", meta.num_frames)
    check.members(meta)
    check.latents(meta)
    check.text(meta)
    check.control(meta)
    return check.problems


class _Checker:
    def __init__(self, key: str, members: Mapping[str, Any]) -> None:
        self.key = key
        self.data = {suffix: data for suffix, data in members.items() if not suffix.startswith("__")}
        self.problems: list[str] = []

    def fail(self, name: str, expected: object, found: object) -> None:
        self.problems.append(f"{self.key}: {name}: expected {expected}, found {found}")

    def meta(self) -> SampleMeta | None:
        if "meta.json" not in self.data:
            self.fail("meta.json", "present", "absent")
            return None
        try:
            return SampleMeta.model_validate_json(self.data["meta.json"])
        except ValidationError as error:
            for problem in error.errors():
                where = ".".join(map(str, problem["loc"]))
                self.fail(f"meta.json {where}".strip(), problem["msg"], repr(problem["input"])[:80])
            return None

    def members(self, meta: SampleMeta) -> None:
        if not meta.views:
            self.fail("meta.json views", "at least one", "none")
        for view in meta.views:
            if not VIEW_NAME.fullmatch(view):
                self.fail("meta.json views", "lower-case letters, digits, _ and - only", repr(view))
        expected = {f"{view}.{kind}" for view in meta.views for kind in ("mp4", "latents.safetensors")} | {"meta.json"}
        optional = {"text.safetensors", "actions.npy", "proprio.npy"}
        for suffix in sorted(expected - self.data.keys()):
            self.fail(suffix, "present", "absent")
        for suffix in sorted(self.data.keys() - expected - optional):
            self.fail(suffix, "no such member", f"{len(self.data[suffix])} bytes")
        for suffix in sorted(suffix for suffix, data in self.data.items() if not data):
            self.fail(suffix, "absent rather than empty", "0 bytes")

    def latents(self, meta: SampleMeta) -> None:
        for view in meta.views:
            latents = self._tensor(f"{view}.latents.safetensors", "latents", "[t c h w]")
            frames = 1 + (meta.num_frames - 1) // TEMPORAL_STRIDE
            if latents is not None and latents.shape[0] != frames:
                self.fail(f"{view}.latents.safetensors", f"t = {frames} latent frames", latents.shape[0])

    def text(self, meta: SampleMeta) -> None:
        self._tensor("text.safetensors", "text", "[l d]")
        if "text.safetensors" in self.data and not (meta.captions or meta.instruction):
            self.fail("text.safetensors", "absent, as the meta has no instruction and no caption", "present")

    def control(self, meta: SampleMeta) -> None:
        if meta.has_actions != ("actions.npy" in self.data):
            found = "present" if "actions.npy" in self.data else "absent"
            self.fail("actions.npy", f"as has_actions={str(meta.has_actions).lower()} says", found)
        if not meta.has_actions:
            if "proprio.npy" in self.data:
                self.fail("proprio.npy", "absent without actions", "present")
            return
        ratio = (meta.control_hz or 0.0) / meta.fps
        if ratio < 1 or abs(ratio - round(ratio)) > 1e-6:
            self.fail("meta.json control_hz", f"a whole multiple of fps={meta.fps:g}", meta.control_hz)
            return
        num_actions = (meta.num_frames - 1) * round(ratio)
        for suffix, dims in (("actions.npy", "[k a]"), ("proprio.npy", "[k s]")):
            array = self._array(suffix, dims)
            if array is not None and len(array) != num_actions:
                self.fail(suffix, f"k = {num_actions} rows", len(array))
        if not all(0 <= first < end <= num_actions for first, end in meta.action_spans):
            self.fail("meta.json action_spans", f"rows within 0..{num_actions}", meta.action_spans)

    def _tensor(self, suffix: str, name: str, dims: str) -> Tensor | None:
        if not self.data.get(suffix):
            return None
        try:
            tensors = _read_tensors(self.data[suffix])
        except ValueError as error:
            self.fail(suffix, "safetensors", str(error))
            return None
        if set(tensors) != {name}:
            self.fail(suffix, f'one tensor "{name}"', sorted(tensors))
            return None
        tensor = tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype != "bfloat16" or tensor.ndim != len(dims.split()):
            self.fail(suffix, f"bfloat16 {dims}", f"{dtype} {list(tensor.shape)}")
            return None
        if not tensor.isfinite().all():
            self.fail(suffix, "finite numbers", "NaN or infinity")
        return tensor

    def _array(self, suffix: str, dims: str) -> np.ndarray | None:
        if not self.data.get(suffix):
            return None
        try:
            array = read_array(self.data[suffix])
        except ValueError as error:
            self.fail(suffix, "a .npy file without pickles", str(error))
            return None
        if array.dtype != np.float32 or array.ndim != len(dims.split()):
            self.fail(suffix, f"float32 {dims}", f"{array.dtype} {list(array.shape)}")
            return None
        if not np.isfinite(array).all():
            self.fail(suffix, "finite numbers", "NaN or infinity")
        return array
