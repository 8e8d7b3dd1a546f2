"""ROS recordings: ROS 1 `.bag` files, ROS 2 folders (db3 or MCAP inside), and single `.mcap` and `.db3` files.

One recording is one episode. YAML names the topics; a field of a message is written after a colon:

    lab:
      kind: ros
      path: recordings
      image_topics: {front: /camera/front/image_raw/compressed, wrist: /camera/wrist/image_raw/compressed}
      action_topics: ["/arm/command:data", "/gripper/command:data"]
      proprio_topics: [/joint_states]

Every message has its own time, so nothing is counted: the frame at a time is the image message nearest to it, the first
action topic gives the times of the control rows, and the other topics hold their last message. Of images, only the
index of a recording is read to know their times, and after that the wanted ones alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt8
from pydantic import Field

from configs.loader import UserError

from ..embodiments import Embodiment
from ..video_io import VideoError
from .base import Episode, SourceConfig, SourceError, StoredImages, content_sha256, key_safe, stable_id
from .ros_bag import (
    BAG_SUFFIXES,
    COMPRESSED_IMAGE,
    IMAGE_TYPES,
    RAW_IMAGE,
    Bag,
    Columns,
    bag_files,
    decode_image,
    find_bags,
    header_time_ns,
    open_bag,
)

_PAUSE_FRAMES = 4  # images missing in a row that are worth a sentence


class RosConfig(SourceConfig):
    """ROS 1 and ROS 2 recordings."""

    kind: Literal["ros"] = "ros"
    image_topics: dict[str, str] | None = Field(
        default=None, description="view name -> topic; null: every topic with colour images"
    )
    action_topics: tuple[str, ...] = Field(
        default=(), description="topics of the actions, as /topic or /topic:field; the first gives the times. []: none"
    )
    proprio_topics: tuple[str, ...] = Field(default=(), description="topics of the proprio, written alike")
    instruction_topic: str | None = Field(default=None, description="topic whose first text is the instruction")
    header_times: bool = Field(
        default=False,
        description="use the times in the messages' headers, not those of recording: truer, but all images are read",
    )


class RosSource:
    """Reads a folder of recordings, or one."""

    format_name = "ROS recordings"

    def __init__(self, config: RosConfig) -> None:
        self._config = config
        self.name = config.name or key_safe(config.path.resolve().stem)

    def list_episodes(self) -> list[str]:
        return sorted(self._bags)

    def repairs(self) -> tuple[str, ...]:
        return ()

    def notes(self) -> list[str]:
        """The topics that are neither views, actions nor proprio."""
        used = {*self._config.action_topics, *self._config.proprio_topics, self._config.instruction_topic}
        used = {str(name).partition(":")[0] for name in used}
        for path in self._bags.values():
            try:
                types = open_bag(path).types
            except SourceError:
                continue
            left = [
                f"{topic} ({kind})" for topic, kind in types.items() if {topic, kind}.isdisjoint({*used, *IMAGE_TYPES})
            ]
            if left:
                return [
                    f"Topics that are not read: {', '.join(left)}; action_topics and proprio_topics choose among them."
                ]
        return []

    def embodiment(self) -> Embodiment | None:
        return self._config.embodiment or self._recorded_embodiment

    def read_episode(self, episode_id: str) -> Episode:
        if episode_id not in self._bags:
            raise SourceError("unknown_episode", str(self._config.path), f"there is no episode {episode_id}")
        path = self._bags[episode_id]
        bag = open_bag(path)
        topics = self._config.image_topics or _colour_topics(bag)
        if not topics:
            raise SourceError("no_images", str(path), f"no topic holds colour images; it has {', '.join(bag.types)}")
        times = {view: self._image_times(bag, view, topic) for view, topic in topics.items()}
        start_ns = max(int(stamps[0]) for stamps in times.values())  # from here on every view has a frame
        end_ns = min(int(stamps[-1]) for stamps in times.values())
        if end_ns < start_ns:
            raise SourceError("missing_view", str(path), "its views have no time in common")
        fps = _rate(next(iter(times.values())))
        repairs = [sentence for view, stamps in times.items() for sentence in _pauses(topics[view], stamps)]
        control = self._control(bag, start_ns, repairs)
        embodiment = self.embodiment() if control else None
        return Episode(
            source=self.name,
            episode_id=episode_id,
            uri=str(path),
            views={
                view: RosImages(
                    str(path), len(times[view]), _rate(times[view]), topic, start_ns, self._config.header_times
                )
                for view, topic in topics.items()
            },
            fps=fps,
            num_frames=int((end_ns - start_ns) / 1e9 * fps + 0.01) + 1,
            actions=control.actions if control else None,
            proprio=control.proprio if control else None,
            control_hz=control.hz if control else None,
            embodiment=embodiment.name if embodiment else None,
            instruction=self._config.instruction or self._instruction(bag),
            success=None,
            licence=self._config.licence,
            content_sha256=content_sha256(bag_files(path)),
            repairs=tuple(repairs),
            control_times_s=control.times_s if control else None,
        )

    def _image_times(self, bag: Bag, view: str, topic: str) -> Int64[np.ndarray, "n"]:
        if bag.types.get(topic) not in IMAGE_TYPES:
            found = bag.types.get(topic, "no such topic")
            raise SourceError("missing_view", str(bag.path), f"view {view} is {topic}, which holds {found}")
        times = bag.times_ns(topic, self._config.header_times)
        if not len(times):
            raise SourceError("no_images", str(bag.path), f"{topic} holds no messages")
        return times

    def _control(self, bag: Bag, start_ns: int, repairs: list[str]) -> _Control | None:
        if not self._config.action_topics:
            return None
        actions, proprio = self._action_and_proprio_series(bag, repairs)
        clock = np.unique(actions[0].times_ns)  # of messages at the same time the last one counts
        clock = clock[clock >= max(int(series.times_ns[0]) for series in (*actions, *proprio))]
        if not len(clock):
            raise SourceError("no_valid_actions", str(bag.path), "its action and proprio topics have no time in common")
        return _Control(
            times_s=(clock - start_ns) / 1e9,
            hz=_rate(actions[0].times_ns),
            actions=np.concatenate([series.held_at(clock) for series in actions], axis=1),
            proprio=np.concatenate([series.held_at(clock) for series in proprio], axis=1) if proprio else None,
        )

    def _action_and_proprio_series(self, bag: Bag, repairs: list[str]) -> tuple[list[_Series], list[_Series]]:
        given = (self._config.action_topics, self._config.proprio_topics)
        actions, proprio = ([self._series(bag, spec, len(specs) > 1, repairs) for spec in specs] for specs in given)
        return actions, proprio

    def _series(self, bag: Bag, spec: str, is_one_of_many: bool, repairs: list[str]) -> _Series:
        """All messages of a topic as rows of numbers."""
        topic, _, field = spec.partition(":")
        if topic not in bag.types:
            raise SourceError("missing_topic", str(bag.path), f"it has no topic {topic} but {', '.join(bag.types)}")
        columns = Columns(field)
        times, rows, num_other = [], [], 0
        for time_ns, message in bag.messages(topic):
            row = columns.row(message)
            if row is None:
                num_other += 1
                continue
            times.append((header_time_ns(message) or time_ns) if self._config.header_times else time_ns)
            rows.append(row)
        if not rows or not rows[0]:
            raise SourceError("bad_record", str(bag.path), f"{spec} holds no numbers")
        if num_other:
            repairs.append(
                f"{num_other} messages of {topic} name or hold other numbers than its first: they are skipped."
            )
        order = np.argsort(times, kind="stable")
        prefix = topic.strip("/").replace("/", ".") + "." if is_one_of_many else ""
        names = tuple(prefix + name for name in columns.names)
        return _Series(np.asarray(times, np.int64)[order], np.asarray(rows, np.float32)[order], names)

    def _instruction(self, bag: Bag) -> str | None:
        topic = self._config.instruction_topic
        if topic is None or topic not in bag.types:
            return None
        texts = (getattr(message, "data", None) for _, message in bag.messages(topic))
        return next((" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()), None)

    @cached_property
    def _recorded_embodiment(self) -> Embodiment | None:
        """The layout of the first recording that can be read."""
        for path in self._bags.values() if self._config.action_topics else ():
            try:
                bag = open_bag(path)
                actions, proprio = self._action_and_proprio_series(bag, [])
            except SourceError:
                continue
            names = tuple(name for series in actions for name in series.names)
            return Embodiment(
                name=self.name,
                action_names=names,
                proprio_names=tuple(name for series in proprio for name in series.names),
                control_hz=_rate(actions[0].times_ns),
                gripper_actions=tuple(i for i, name in enumerate(names) if "gripper" in name.lower()),
            )
        return None

    @cached_property
    def _bags(self) -> dict[str, Path]:
        """Episode id -> recording."""
        root = self._config.path
        if not root.exists():
            raise UserError(f"{root}: there is no such file or folder; check the path of the recordings.")
        bags = find_bags(root)
        if not bags:
            raise UserError(f"{root}: holds no ROS recordings; files ending in {', '.join(BAG_SUFFIXES)} are read.")
        return {stable_id(path.relative_to(root).as_posix() if path != root else path.name): path for path in bags}


@dataclass(frozen=True)
class _Series:
    times_ns: Int64[np.ndarray, "n"]
    rows: Float32[np.ndarray, "n d"]
    names: tuple[str, ...]

    def held_at(self, times_ns: Int64[np.ndarray, "k"]) -> Float32[np.ndarray, "k d"]:
        """The last message at or before each time."""
        return self.rows[np.searchsorted(self.times_ns, times_ns, side="right") - 1]


@dataclass(frozen=True)
class _Control:
    times_s: Float64[np.ndarray, "n"]
    hz: float
    actions: Float32[np.ndarray, "n a"]
    proprio: Float32[np.ndarray, "n s"] | None


def _rate(times_ns: Int64[np.ndarray, "n"]) -> float:
    """The usual rate of messages (dropped ones do not lower it). Clocks jitter: 29.98 Hz is 30 Hz."""
    intervals = np.diff(times_ns)
    intervals = intervals[intervals > 0]
    rate = 1e9 / float(np.median(intervals)) if len(intervals) else 1.0
    return float(round(rate)) if abs(rate - round(rate)) < 0.02 * rate and rate >= 1 else rate


def _pauses(topic: str, times_ns: Int64[np.ndarray, "n"]) -> list[str]:
    longest_s = float(np.diff(times_ns).max(initial=0)) / 1e9
    if longest_s * _rate(times_ns) < _PAUSE_FRAMES:
        return []
    return [f"The images of {topic} pause for up to {longest_s:.2f} s: the nearest one is shown meanwhile."]


def _colour_topics(bag: Bag) -> dict[str, str]:
    """View name -> topic, for all that are no depth images; of a compressed and a raw one, the compressed."""
    topics: dict[str, str] = {}
    for kind in (RAW_IMAGE, COMPRESSED_IMAGE):
        for topic in (topic for topic, found in bag.types.items() if found == kind and "depth" not in topic.lower()):
            parts = [part for part in topic.split("/") if part and part not in ("image", "image_raw", "compressed")]
            topics[key_safe("_".join(parts) or "main")] = topic
    return topics


# --- frames ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RosImages(StoredImages):
    """The messages of one image topic; its times are looked up in the recording's index."""

    topic: str
    start_ns: int  # the episode's time zero
    header_times: bool

    @property
    def codec(self) -> str:
        return "jpeg or png" if _open_video(self.path).types.get(self.topic) == COMPRESSED_IMAGE else "raw image"

    def positions(self, times_s: Float64[np.ndarray, "f"], fps: float) -> Int64[np.ndarray, "f"]:
        stamps = (_open_video(self.path).times_ns(self.topic, self.header_times) - self.start_ns) / 1e9
        after = np.searchsorted(stamps, times_s).clip(1, max(1, len(stamps) - 1))
        before_is_nearer = times_s - stamps[after - 1] <= stamps[after.clip(max=len(stamps) - 1)] - times_s
        return np.where(before_is_nearer, after - 1, after).astype(np.int64).clip(max=len(stamps) - 1)

    def read(self, positions: Sequence[int]) -> UInt8[np.ndarray, "f h w 3"]:
        wanted = sorted(set(positions))
        bag = _open_video(self.path)
        frames = {}
        try:
            for position, message in bag.messages_at(self.topic, wanted, self.header_times):
                frames[position] = decode_image(message)
        except SourceError as error:
            raise VideoError(error.reason, self.path, error.detail) from error
        except (ValueError, OSError) as error:
            detail = f"an image of {self.topic} does not decode ({error})"
            raise VideoError("undecodable_video", self.path, detail) from error
        if len(frames) < len(wanted):
            detail = f"{len(wanted) - len(frames)} images of {self.topic} are in its index, but not in it"
            raise VideoError("undecodable_video", self.path, detail)
        if len({frame.shape for frame in frames.values()}) > 1:
            raise VideoError("undecodable_video", self.path, f"the images of {self.topic} change their size")
        return np.stack([frames[position] for position in positions])


def _open_video(path: str) -> Bag:
    try:
        return open_bag(Path(path))
    except SourceError as error:
        raise VideoError(error.reason, path, error.detail) from error
