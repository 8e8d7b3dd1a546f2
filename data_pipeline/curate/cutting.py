"""Where an episode is cut into clips: in every shot, and only where something happens."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..embodiments import Embodiment
from ..sources.base import Episode, Footage, SourceError
from .clips import MIN_RATE_SHARE, Range, clip_starts, frame_ranges, num_clip_frames, shot_ranges
from .idle import Activity, IdleConfig, find_activity
from .shots import ShotConfig, find_cuts


@dataclass(frozen=True)
class ClipShape:
    fps: float
    num_frames: int
    stride: int


@dataclass(frozen=True)
class Cutting:
    starts: tuple[int, ...]  # first frame of each clip, counted at the clips' fps
    notes: tuple[str, ...]  # sentences: what is left out and why


def cut_episode(
    episode: Episode,
    footages: Mapping[str, Footage],
    robot: Embodiment | None,
    clip: ClipShape,
    shots: ShotConfig,
    idle: IdleConfig,
) -> Cutting:
    """SourceError where no clip fits."""
    if episode.fps < MIN_RATE_SHARE * clip.fps:
        detail = f"{episode.fps:g} frames/s for clips of {clip.fps:g}"
        raise SourceError("frame_rate_too_low", episode.uri, detail)
    num_frames = num_clip_frames(episode.num_frames, episode.fps, clip.fps)
    if num_frames < clip.num_frames:
        span_s = (episode.num_frames - 1) / episode.fps
        detail = f"its {episode.num_frames} frames span {span_s:.2f} s, a clip {_clip_s(clip):.2f} s"
        raise SourceError("too_short", episode.uri, detail)
    has_actions = robot is not None and episode.actions is not None
    shot_list = (
        _shots(episode, footages, clip.fps, num_frames, shots) if shots.applies(has_actions) else [(0, num_frames)]
    )
    activity = _activity(episode, robot, idle)
    starts = clip_starts(shot_list, frame_ranges(activity.kept, clip.fps, num_frames), clip.num_frames, clip.stride)
    if not starts:
        raise _no_clip_fits(episode, clip, shot_list, activity)
    notes = (_shot_note(shot_list, clip), activity.note())
    return Cutting(tuple(starts), tuple(note for note in notes if note))


def _shots(
    episode: Episode, footages: Mapping[str, Footage], fps: float, num_frames: int, config: ShotConfig
) -> list[Range]:
    times_s = np.arange(num_frames) / fps
    shown = {view: footage.positions(times_s, episode.fps) for view, footage in footages.items()}
    cuts = {
        view: find_cuts(footage, int(shown[view].min()), int(shown[view].max()), config)
        for view, footage in footages.items()
    }
    return shot_ranges(shown, cuts, num_frames)


def _activity(episode: Episode, robot: Embodiment | None, config: IdleConfig) -> Activity:
    duration_s = episode.num_frames / episode.fps
    if config.trim == "off" or robot is None or episode.actions is None or not len(episode.actions):
        return Activity(((0.0, duration_s),), (), duration_s)
    times_s = episode.control_times_s
    if times_s is None:
        times_s = np.arange(len(episode.actions)) / (episode.control_hz or robot.control_hz)
    return find_activity(episode.actions, episode.proprio, times_s, duration_s, robot, config)


def _shot_note(shots: list[Range], clip: ClipShape) -> str | None:
    if len(shots) == 1:
        return None
    cuts = [f"{first / clip.fps:.2f}" for first, _ in shots[1:]]
    listed = ", ".join(cuts[:10]) + " …" * (len(cuts) > 10)
    short = sum(end - first < clip.num_frames for first, end in shots)
    left_out = f"; {short} of its {len(shots)} shots too short for a clip" if short else ""
    return f"Shot cuts at {listed} s: no clip crosses one{left_out}."


def _no_clip_fits(episode: Episode, clip: ClipShape, shots: list[Range], activity: Activity) -> SourceError:
    longest = max(end - first for first, end in shots)
    if longest < clip.num_frames:
        detail = f"the longest of its {len(shots)} shots lasts {longest / clip.fps:.2f} s, a clip {_clip_s(clip):.2f} s"
        return SourceError("shots_too_short", episode.uri, detail)
    return SourceError("idle", episode.uri, f"nothing happens in its {activity.duration_s:.2f} s ({activity.note()})")


def _clip_s(clip: ClipShape) -> float:
    return (clip.num_frames - 1) / clip.fps
