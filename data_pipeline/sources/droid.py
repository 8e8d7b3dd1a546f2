"""DROID's raw recordings: a Franka arm, two exterior cameras and one at the wrist, at 15 Hz.

    <lab>/<success|failure>/<date>/<time>/
      metadata_<uuid>.json                    serials of the cameras, current_task, success; without it: not valid
      trajectory.h5                           action/*, observation/{robot_state,controller_info,timestamp}/*
      recordings/MP4/<serial>.mp4             a frame per step, often one fewer; its own frame rate means nothing
      recordings/MP4/<serial>_timestamps.json when each frame of the video was received, in some recordings
    aggregated-annotations-<date>.json        at the root: better texts by uuid

Layout and order of events: https://github.com/droid-dataset/droid (trajectory_utils/misc.py, postprocessing/).

A step first reads the cameras and the arm, then thinks and waits out its 67 ms, and only then sends its action. So
action i starts about when frame i + 1 is taken, and steps come as late as the machine was busy. The recording has the
true times of all three, and they are used (`clock: recorded`): frames stand where they were taken, actions where they
were sent, and proprio is interpolated to when the actions were sent. `clock: nominal` pairs frame i with row i at an
even 15 Hz, as DROID's RLDS release does; so does a recording without usable times.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt8
from pydantic import Field

from configs.loader import UserError

from ..align import resample
from ..embodiments import Embodiment, RotationSlots
from ..video_io import VideoError, VideoInfo, ViewConfig, decode_frames, decode_view, probe_video
from .base import (
    Episode,
    Footage,
    FootageInfo,
    SourceConfig,
    SourceError,
    VideoSegment,
    check_dims,
    content_sha256,
    key_safe,
    stable_id,
)
from .files import find_files, read_json
from .hdf5 import (
    find_all,
    find_dataset,
    find_group,
    open_hdf5,
    read_rows,
    usable_frames,
)

HZ = 15.0
ActionSpace = Literal["joint_position", "joint_velocity", "cartesian_position", "cartesian_velocity"]

_JOINTS = tuple(f"joint_{i}" for i in range(7))
_POSE = ("x", "y", "z", "roll", "pitch", "yaw")
_POSE_ROTATION = (RotationSlots(slots=(3, 4, 5), format="euler_xyz_extrinsic"),)
_VIEWS = {"wrist": "wrist", "ext1": "exterior_1", "ext2": "exterior_2"}  # metadata's name -> view
_MAX_CLOCK_GAP_MS = 1000.0


class DroidConfig(SourceConfig):
    """DROID's raw recordings (droid_raw), or any part of them."""

    kind: Literal["droid"] = "droid"
    action_space: ActionSpace = Field(
        default="joint_position",
        description="which of the recorded forms of a command is the action; the gripper's position is added to each",
    )
    clock: Literal["recorded", "nominal"] = Field(
        default="recorded", description="place frames and actions by their recorded times, or by number at 15 Hz"
    )


@dataclass(frozen=True)
class TimedVideo:
    """A video whose frames were taken at known times, whatever its container says."""

    path: str
    times_s: tuple[float, ...]  # of each frame, increasing, on the episode's clock

    def info(self) -> FootageInfo:
        video = probe_video(self.path)
        fps = (len(self.times_s) - 1) / (self.times_s[-1] - self.times_s[0])
        return FootageInfo(f"{video.codec} {video.pix_fmt}", video.height, video.width, fps)

    def positions(self, times_s: Float64[np.ndarray, "f"], fps: float) -> Int64[np.ndarray, "f"]:
        """The nearest frame in time; a tie goes to the earlier one."""
        taken = np.asarray(self.times_s)
        return np.searchsorted((taken[1:] + taken[:-1]) / 2, times_s, side="left").astype(np.int64)

    def read(self, positions: Sequence[int]) -> UInt8[np.ndarray, "f h w 3"]:
        return decode_frames(self.path, positions)

    def read_view(self, positions: Sequence[int], view: ViewConfig) -> UInt8[np.ndarray, "f p w"]:
        return decode_view(self.path, positions, view)


class DroidSource:
    """Reads every folder with a metadata_<uuid>.json."""

    format_name = "DROID raw"

    def __init__(self, config: DroidConfig) -> None:
        self._config = config
        self.name = config.name or key_safe(config.path.resolve().name)

    def list_episodes(self) -> list[str]:
        return sorted(self._folders)

    def repairs(self) -> tuple[str, ...]:
        _, num_invalid = self._found
        return (f"Folders without metadata are not valid and left out: {num_invalid}.",) if num_invalid else ()

    def embodiment(self) -> Embodiment:
        if self._config.embodiment is not None:
            return self._config.embodiment
        space = self._config.action_space
        state_names = _JOINTS if space.startswith("joint") else _POSE
        # A velocity has another name than the position, so that nobody subtracts one from the other.
        names = state_names if space.endswith("position") else tuple(f"{name}_velocity" for name in state_names)
        return Embodiment(
            name="droid_franka" if space == "joint_position" else f"droid_franka_{space}",
            action_names=(*names, "gripper"),
            proprio_names=(*state_names, "gripper"),
            control_hz=HZ,
            gripper_actions=(len(names),),
            velocity_actions=tuple(range(len(names))) if space.endswith("velocity") else (),
            joint_actions=tuple(range(7)) if space.startswith("joint") else (),
            joint_proprio=tuple(range(7)) if space.startswith("joint") else (),
            action_rotations=_POSE_ROTATION if space == "cartesian_position" else (),
            proprio_rotations=_POSE_ROTATION if space.startswith("cartesian") else (),
            pose_frame="base" if space.startswith("cartesian") else None,
        )

    def read_episode(self, episode_id: str) -> Episode:
        if episode_id not in self._folders:
            raise SourceError("unknown_episode", str(self._config.path), f"there is no episode {episode_id}")
        folder, notes = self._folders[episode_id], list(self.repairs())
        metadata_path = min(folder.glob("metadata_*.json"))
        metadata = _read_metadata(metadata_path)
        with open_hdf5(folder / "trajectory.h5") as file:
            actions, proprio = self._control(file, notes)
            videos = _find_videos(folder, _serials(metadata, file), notes)
            times = _StepTimes.read(file, len(actions), videos) if self._config.clock == "recorded" else None
        embodiment = self.embodiment()
        check_dims(embodiment, actions, proprio, str(folder))
        if times is not None:
            views, num_frames = times.views(videos, notes)
            proprio, _ = resample(proprio, times.state_s, times.control_s, embodiment.proprio_rules())
        else:
            views, num_frames = _by_number(videos, len(actions), notes)
            actions, proprio = actions[:num_frames], proprio[:num_frames]
            if self._config.clock == "recorded":
                notes.append("Its timestamps are missing or contradict each other: frame i is paired with row i.")
        if num_frames < 2:
            raise SourceError("too_short", str(folder), "one frame shows no movement")
        instruction = self._config.instruction or self._instruction(metadata_path, metadata)
        files = [folder / "trajectory.h5", *(video.path for video in videos.values())]
        choices = f"{self._config.action_space} {self._config.clock} {sorted(views)} {instruction}"
        return Episode(
            source=self.name,
            episode_id=episode_id,
            uri=str(folder),
            views=views,
            fps=HZ,
            num_frames=num_frames,
            actions=actions,
            proprio=proprio,
            control_hz=HZ,
            embodiment=embodiment.name,
            instruction=instruction,
            success=_success(metadata, folder),
            licence=self._config.licence,
            content_sha256=content_sha256(files, choices.encode()),
            repairs=tuple(notes),
            control_times_s=times.control_s if times is not None else None,
        )

    def _control(
        self, file: h5py.File, notes: list[str]
    ) -> tuple[Float32[np.ndarray, "n a"], Float32[np.ndarray, "n s"]]:
        space = self._config.action_space
        state = "joint_positions" if space.startswith("joint") else "cartesian_position"
        actions = read_rows(file, [f"action/{space}", "action/gripper_position"], notes)
        robot = "observation/robot_state"
        proprio = read_rows(file, [f"{robot}/{state}", f"{robot}/gripper_position"], notes)
        usable_frames({"action": len(actions), "robot_state": len(proprio)}, file.filename, notes)
        num_rows = min(len(actions), len(proprio))
        is_sent = _is_sent(file, num_rows, notes)
        if not is_sent.all():
            held = int(np.count_nonzero(~is_sent))
            notes.append(f"In {held} of {num_rows} steps the controller was not engaged: their actions are invalid.")
        actions[:num_rows][~is_sent] = np.nan
        return actions[:num_rows], proprio[:num_rows]

    def _instruction(self, metadata_path: Path, metadata: dict[str, Any]) -> str | None:
        uuid = metadata.get("uuid") or metadata_path.stem.removeprefix("metadata_")
        texts = self._annotations.get(str(uuid))
        candidates = [*(texts.values() if isinstance(texts, dict) else ()), metadata.get("current_task")]
        cleaned = (" ".join(text.split()) for text in candidates if isinstance(text, str))
        return next((text for text in cleaned if text), None)

    @cached_property
    def _annotations(self) -> dict[str, Any]:
        """uuid -> {"language_instruction1": …}"""
        texts: dict[str, Any] = {}
        for path in sorted(self._config.path.glob("aggregated-annotations-*.json")):
            try:
                texts |= read_json(path)
            except (SourceError, TypeError) as error:
                raise UserError(f"{path}: the annotations cannot be read ({error}); download them again.") from error
        return texts

    @property
    def _folders(self) -> dict[str, Path]:
        return self._found[0]

    @cached_property
    def _found(self) -> tuple[dict[str, Path], int]:
        """Episode id -> folder, and how many folders hold a recording without metadata. The tree is walked once."""
        root = self._config.path
        if not root.is_dir():
            raise UserError(f"{root}: there is no such folder; check the path of the recordings.")
        files = list(find_files(root, (".json", "trajectory.h5")))
        recorded = {path.parent for path in files if path.name == "trajectory.h5"}
        described = {path.parent for path in files if _is_metadata(path)}
        if not described:
            raise UserError(f"{root}: holds no DROID episodes (folders with metadata_….json and trajectory.h5).")
        folders = {stable_id(*folder.relative_to(root).parts): folder for folder in sorted(described)}
        return folders, len(recorded - described)


def find_droid(path: Path) -> bool:
    """Whether a folder here holds an episode's metadata and its trajectory."""
    return any(
        _is_metadata(found) and (found.parent / "trajectory.h5").is_file() for found in find_files(path, (".json",))
    )


def _is_metadata(path: Path) -> bool:
    has_recording = (path.parent / "trajectory.h5").is_file() or (path.parent / "recordings").is_dir()
    return path.name.startswith("metadata_") and has_recording


# --- control ---------------------------------------------------------------------------------------------------------


def _is_sent(file: h5py.File, num_rows: int, notes: list[str]) -> Bool[np.ndarray, "n"]:
    """Whether each step's action was meant and sent: people let go of the controller to rearrange their hands."""
    is_sent = np.ones(num_rows, dtype=bool)
    for name, meaning in (("controller_info/movement_enabled", True), ("timestamp/skip_action", False)):
        if find_dataset(file, f"observation/{name}") is None:
            continue
        flags = read_rows(file, [f"observation/{name}"], notes)[:, 0] > 0
        if len(flags) < num_rows:
            notes.append(f"observation/{name} has {len(flags)} rows for {num_rows} steps: it is ignored.")
        else:
            is_sent &= flags[:num_rows] == meaning
    return is_sent


# --- views -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Video:
    path: Path
    serial: str
    info: VideoInfo


def _read_metadata(path: Path) -> dict[str, Any]:
    metadata = read_json(path)
    if not isinstance(metadata, dict):
        raise SourceError("bad_record", str(path), "it is not a JSON object")
    return metadata


def _serials(metadata: dict[str, Any], file: h5py.File) -> dict[str, str]:
    """View -> serial of its camera. Where the metadata is silent: camera_type is 0 at the wrist."""
    told = {
        view: str(metadata[f"{name}_cam_serial"]) for name, view in _VIEWS.items() if f"{name}_cam_serial" in metadata
    }
    if told:
        return told
    types = find_all(find_group(file, "observation/camera_type"))
    is_wrist = {
        name: not one[0] for name, one in types.items() if isinstance(one, h5py.Dataset) and one.shape[:1] != (0,)
    }
    exterior = [name for name, wrist in is_wrist.items() if not wrist]
    wrist = [name for name, wrist in is_wrist.items() if wrist]
    return dict(zip(_VIEWS.values(), [*wrist[:1], *exterior[:2]], strict=False)) if wrist else {}


def _find_videos(folder: Path, serials: dict[str, str], notes: list[str]) -> dict[str, _Video]:
    videos, problems = {}, []
    for view, serial in serials.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", serial):
            raise SourceError("outside_folder", str(folder), f"{serial!r} is no serial number of a camera")
        path = folder / "recordings" / "MP4" / f"{serial}.mp4"
        try:
            videos[view] = _Video(path, serial, probe_video(path))
        except VideoError as error:
            problems.append(error)
            notes.append(f"The view {view} is left out: {error}.")
    if problems and not videos:
        raise SourceError(problems[0].reason, problems[0].path, problems[0].detail)
    if not videos:
        raise SourceError("missing_video", str(folder), "neither metadata nor trajectory.h5 names its cameras")
    return videos


def _by_number(videos: dict[str, _Video], num_rows: int, notes: list[str]) -> tuple[dict[str, Footage], int]:
    lengths = {view: video.info.num_frames for view, video in videos.items()}
    num_frames = usable_frames({"rows": num_rows, **lengths}, str(next(iter(videos.values())).path), notes)
    return {view: VideoSegment(str(video.path), 0.0, num_frames, 0) for view, video in videos.items()}, num_frames


@dataclass(frozen=True)
class _StepTimes:
    """When things happened, in milliseconds of the recording computer's clock."""

    control_ms: Float64[np.ndarray, "n"]  # an action was sent
    state_ms: Float64[np.ndarray, "n"]  # the arm was read
    frame_ms: dict[str, Float64[np.ndarray, "f"]]  # view -> its frames were taken

    @property
    def start_ms(self) -> float:
        return float(min(times[0] for times in self.frame_ms.values()))

    @property
    def control_s(self) -> Float64[np.ndarray, "n"]:
        return (self.control_ms - self.start_ms) / 1000

    @property
    def state_s(self) -> Float64[np.ndarray, "n"]:
        return (self.state_ms - self.start_ms) / 1000

    @classmethod
    def read(cls, file: h5py.File, num_rows: int, videos: dict[str, _Video]) -> _StepTimes | None:
        """None where any of them is missing or cannot be true."""
        control = _milliseconds(file, "control/control_start", num_rows)
        state = _milliseconds(file, "robot_state/read_start", num_rows)
        frames = {view: _frame_times(file, video, num_rows) for view, video in videos.items()}
        if control is None or state is None or any(times is None for times in frames.values()):
            return None
        known = {view: times for view, times in frames.items() if times is not None}
        starts = [control[0], state[0], *(times[0] for times in known.values())]
        return cls(control, state, known) if max(starts) - min(starts) < _MAX_CLOCK_GAP_MS else None

    def views(self, videos: dict[str, _Video], notes: list[str]) -> tuple[dict[str, Footage], int]:
        """Cameras by name, and how many frames at an even 15 Hz the time that all of them saw is worth."""
        end_ms = min(times[-1] for times in self.frame_ms.values())
        views: dict[str, Footage] = {}
        for view, times in self.frame_ms.items():
            seconds = (times - self.start_ms) / 1000
            views[view] = TimedVideo(str(videos[view].path), tuple(seconds.tolist()))
            longest = float(np.diff(seconds).max())
            if longest > 2 / HZ:
                notes.append(f"The frames of {view} have a gap of {longest:.2f} s: the nearest ones stand in.")
        return views, round((end_ms - self.start_ms) / 1000 * HZ) + 1


def _frame_times(file: h5py.File, video: _Video, num_rows: int) -> Float64[np.ndarray, "f"] | None:
    """When each frame of the video was taken: by the list beside it, else by the steps, one frame each."""
    taken = _milliseconds(file, f"cameras/{video.serial}_estimated_capture", num_rows)
    received = _milliseconds(file, f"cameras/{video.serial}_frame_received", num_rows)
    listed = _read_times_list(video.path.with_name(f"{video.serial}_timestamps.json"))
    if taken is None:
        return None
    if listed is not None and received is not None and len(listed) == video.info.num_frames:
        return listed - (received[0] - taken[0])  # the time that a picture takes to arrive
    num_frames = min(num_rows, video.info.num_frames)
    is_frame_per_step = abs(num_rows - video.info.num_frames) <= max(2, round(0.02 * num_rows))
    return taken[:num_frames] if is_frame_per_step and num_frames > 1 else None


def _milliseconds(file: h5py.File, name: str, num_rows: int) -> Float64[np.ndarray, "n"] | None:
    """Not through float32, which knows no millisecond of this century."""
    dataset = find_dataset(file, f"observation/timestamp/{name}")
    if dataset is None or dataset.ndim != 1 or dataset.dtype.kind not in "iuf" or not num_rows <= len(dataset):
        return None
    return _plausible(np.asarray(dataset[:num_rows], dtype=np.float64))


def _read_times_list(path: Path) -> Float64[np.ndarray, "f"] | None:
    try:
        times = np.asarray(read_json(path), dtype=np.float64)
    except (SourceError, ValueError, TypeError, OverflowError):
        return None
    return _plausible(times) if times.ndim == 1 else None


def _plausible(times: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"] | None:
    """The times if they increase, at about DROID's rate."""
    steps = np.diff(times)
    if not np.isfinite(times).all() or len(steps) == 0 or steps.min() <= 0:
        return None
    return times if 0.5 < HZ * float(np.median(steps)) / 1000 < 2.0 else None


def _success(metadata: dict[str, Any], folder: Path) -> bool | None:
    told = metadata.get("success")
    if isinstance(told, bool):
        return told
    return next((part == "success" for part in reversed(folder.parts) if part in ("success", "failure")), None)
