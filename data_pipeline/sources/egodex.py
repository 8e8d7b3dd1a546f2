"""EgoDex: egocentric video of people's hands at work, with the pose of every joint (https://arxiv.org/abs/2505.11709).

    <part>/<task>/<n>.mp4        1080p at 30 Hz; of another rate, the rows follow it
    <part>/<task>/<n>.hdf5       the same number of rows:
      transforms/<joint>         [n 4 4] pose of the joint, and of the camera, in the world that ARKit started with
      confidences/<joint>        [n] 0..1, in some files
      attributes                 llm_description, llm_description2 for the way back, which_llm_description

That world is another one in each recording, so hands are told relative to the camera, along the axes that the file
gives it. A hand is 24 numbers: its position, the first two columns of its rotation matrix
(https://arxiv.org/abs/1812.07035), and the positions of its five fingertips; left before right.

Proprio i is where the hands are in frame i, action i where they will be in frame i + 1, both seen from the camera of
frame i: the movement of the hands is the action, that of the head is not.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
from jaxtyping import Float32, Float64
from pydantic import Field

from configs.loader import UserError

from ..embodiments import Embodiment, RotationSlots
from ..video_io import VideoError, VideoInfo, frame_times, probe_video
from .base import (
    Episode,
    SourceConfig,
    SourceError,
    VideoSegment,
    check_dims,
    content_sha256,
    key_safe,
    stable_id,
)
from .files import find_files
from .hdf5 import (
    any_file,
    find_dataset,
    open_hdf5,
    read_rows,
    read_text,
    relative_parts,
    usable_frames,
)
from .video_folder import video_repairs

HZ = 30.0
SIDES = ("left", "right")
FINGERTIPS = ("ThumbTip", "IndexFingerTip", "MiddleFingerTip", "RingFingerTip", "LittleFingerTip")
_HAND_NAMES = (
    *(f"hand_{axis}" for axis in "xyz"),
    *(f"hand_rotation_{row}{column}" for column in (0, 1) for row in (0, 1, 2)),
    *(f"{finger}_tip_{axis}" for finger in ("thumb", "index", "middle", "ring", "little") for axis in "xyz"),
)
DIM_NAMES = tuple(f"{side}_{name}" for side in SIDES for name in _HAND_NAMES)
_ROTATIONS = tuple(
    RotationSlots(slots=tuple(range(first, first + 6)), format="six_d_columns") for first in (3, 3 + len(_HAND_NAMES))
)


class EgoDexConfig(SourceConfig):
    """EgoDex, or any part of it."""

    kind: Literal["egodex"] = "egodex"
    min_confidence: float = Field(
        default=0.1, ge=0, le=1, description="steps where the mean confidence of a hand's joints is lower are invalid"
    )


class EgoDexSource:
    """Reads every <n>.hdf5 that has an <n>.mp4 beside it."""

    format_name = "EgoDex"

    def __init__(self, config: EgoDexConfig) -> None:
        self._config = config
        self.name = config.name or key_safe(config.path.resolve().stem)

    def list_episodes(self) -> list[str]:
        return sorted(self._files)

    def repairs(self) -> tuple[str, ...]:
        return ()

    def embodiment(self) -> Embodiment:
        return self._config.embodiment or Embodiment(
            name="egodex_hands",
            action_names=DIM_NAMES,
            proprio_names=DIM_NAMES,
            control_hz=HZ,
            action_units=tuple("" if "rotation" in name else "m" for name in DIM_NAMES),
            proprio_units=tuple("" if "rotation" in name else "m" for name in DIM_NAMES),
            action_rotations=_ROTATIONS,
            proprio_rotations=_ROTATIONS,
            pose_frame="camera",
        )

    def read_episode(self, episode_id: str) -> Episode:
        if episode_id not in self._files:
            raise SourceError("unknown_episode", str(self._config.path), f"there is no episode {episode_id}")
        path, notes = self._files[episode_id], list[str]()
        video = path.with_suffix(".mp4")
        with open_hdf5(path) as file:
            hands, camera = _poses(file, notes)
            is_sure = self._is_sure(file, len(camera), notes)
            instruction = self._config.instruction or _instruction(file)
        try:
            info = probe_video(video)
        except VideoError as error:
            raise SourceError(error.reason, str(video), error.detail) from error
        notes += video_repairs("The video", info)
        num_frames = usable_frames({"hdf5": len(camera), "mp4": info.num_frames}, str(path), notes)
        if num_frames < 2:
            raise SourceError("too_short", str(path), "one frame shows no movement")
        fps, times_s = _clock(video, info, num_frames, notes)
        proprio = _seen_from(hands, camera)
        actions = _seen_from(hands[1:], camera[:-1])
        actions[~is_sure[1:]] = np.nan
        embodiment = self.embodiment()
        check_dims(embodiment, actions, proprio, str(path))
        return Episode(
            source=self.name,
            episode_id=episode_id,
            uri=str(path),
            views={"ego": VideoSegment(str(video), 0.0, num_frames, 0 if times_s is None else None)},
            fps=fps,
            num_frames=num_frames,
            actions=actions[: num_frames - 1],
            proprio=proprio[: num_frames - 1],
            control_hz=fps,
            control_times_s=None if times_s is None else times_s[:-1],
            embodiment=embodiment.name,
            instruction=instruction,
            success=None,
            licence=self._config.licence,
            content_sha256=content_sha256([path, video], (instruction or "").encode()),
            repairs=tuple(notes),
        )

    def _is_sure(self, file: h5py.File, num_rows: int, notes: list[str]) -> np.ndarray:
        """bool [n]: whether both hands were tracked; true where the file does not say."""
        is_sure = np.ones(num_rows, dtype=bool)
        for side in SIDES:
            names = [f"confidences/{joint}" for joint in _joints(side)]
            told = [name for name in names if find_dataset(file, name) is not None]
            if told:
                confidence = read_rows(file, told, notes)[:num_rows].mean(axis=1)
                is_sure[: len(confidence)] &= confidence >= self._config.min_confidence
        if not is_sure.all():
            lost = int(np.count_nonzero(~is_sure))
            notes.append(
                f"In {lost} of {num_rows} frames a hand was hardly tracked: actions that lead there are invalid."
            )
        return is_sure

    @cached_property
    def _files(self) -> dict[str, Path]:
        root = self._config.path
        if not root.exists():
            raise UserError(f"{root}: there is no such file or folder; check the path of the recordings.")
        files = {stable_id(*relative_parts(path, root)): path for path in find_files(root, (".hdf5",))}
        if not files:
            raise UserError(f"{root}: holds no EgoDex episodes (0.hdf5 and 0.mp4, …).")
        return files


def find_egodex(path: Path) -> bool:
    """Whether HDF5 files here hold the pose of a camera and of a hand."""
    return any_file(
        path,
        lambda file: (
            find_dataset(file, "transforms/camera") is not None
            and find_dataset(file, "transforms/leftHand") is not None
        ),
    )


def _clock(
    video: Path, info: VideoInfo, num_frames: int, notes: list[str]
) -> tuple[float, Float64[np.ndarray, "n"] | None]:
    """Frames per second, and the time of each where the rate varies: a row of the hands belongs to each frame."""
    if info.is_variable_rate:
        return info.fps, frame_times(video)[:num_frames]
    if abs(info.fps / HZ - 1) < 0.01:
        return HZ, None
    notes.append(f"The video has {info.fps:g} frames per second instead of {HZ:g}: the hands are timed by it.")
    return info.fps, None


def _joints(side: str) -> tuple[str, ...]:
    return (f"{side}Hand", *(f"{side}{tip}" for tip in FINGERTIPS))


def _poses(file: h5py.File, notes: list[str]) -> tuple[Float64[np.ndarray, "n 12 4 4"], Float64[np.ndarray, "n 4 4"]]:
    """Poses in the world: of both hands' joints, and of the camera."""
    names = [f"transforms/{joint}" for joint in (*_joints("left"), *_joints("right"), "camera")]
    rows = read_rows(file, names, notes)
    if rows.shape[1] != 16 * len(names):
        raise SourceError("bad_record", file.filename, "transforms/<joint> are not 4x4 matrices")
    poses = rows.reshape(-1, len(names), 4, 4).astype(np.float64)
    return poses[:, :-1], poses[:, -1]


def _seen_from(
    joints: Float64[np.ndarray, "n 12 4 4"], camera: Float64[np.ndarray, "n 4 4"]
) -> Float32[np.ndarray, "n 48"]:
    """`DIM_NAMES` of joints that are given in the world."""
    to_camera = camera[:, None, :3, :3].swapaxes(-1, -2)  # the inverse of a rotation
    positions = (to_camera @ (joints[..., :3, 3:] - camera[:, None, :3, 3:]))[..., 0]
    rotations = to_camera @ joints[..., :3, :3]
    sides = []
    for first in (0, 6):
        two_columns = rotations[:, first, :, :2].swapaxes(1, 2).reshape(-1, 6)
        tips = positions[:, first + 1 : first + 6].reshape(-1, 15)
        sides += [positions[:, first], two_columns, tips]
    return np.concatenate(sides, axis=1).astype(np.float32)


def _instruction(file: h5py.File) -> str | None:
    """Reversible tasks have two texts, and say which of them was done."""
    which = file.attrs.get("which_llm_description", "1")
    is_second = str(which.decode() if isinstance(which, bytes) else which).strip() == "2"
    names = ("llm_description2", "llm_description") if is_second else ("llm_description",)
    texts = (read_text(file.attrs, name) for name in (*names, "description"))
    return next((text for text in texts if text), None)
