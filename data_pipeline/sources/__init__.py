"""Readers of raw recordings, one file per format, all giving `Episode` objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from configs.loader import UserError

from ..video_io import VIDEO_SUFFIXES
from .aloha import AlohaConfig, AlohaSource, find_aloha
from .base import Episode, Footage, Source, SourceConfig, SourceError, VideoSegment
from .droid import DroidConfig, DroidSource, find_droid
from .egodex import EgoDexConfig, EgoDexSource, find_egodex
from .lerobot import LeRobotConfig, LeRobotSource
from .lerobot_metadata import dataset_roots
from .npz import NpzConfig, NpzSource, find_npz
from .rlds import RldsConfig, RldsSource
from .rlds_metadata import find_builders
from .robomimic import RobomimicConfig, RobomimicSource, find_robomimic
from .ros import RosConfig, RosSource
from .ros_bag import BAG_SUFFIXES, find_bags
from .video_folder import VideoFolderConfig, VideoFolderSource, find_videos
from .video_json import VideoJsonConfig, VideoJsonSource, names_videos
from .zarr_replay import ZarrConfig, ZarrSource, find_buffers


@dataclass(frozen=True)
class Format:
    """One raw format: its settings, its reader, and how a folder or file is recognised as being of it."""

    config: type[SourceConfig]
    open: Callable[[Any], Source]
    is_at: Callable[[Path], object]  # true or a non-empty list where it is
    looks_like: str  # what `is_at` looks for, for people


FORMATS: dict[str, Format] = {  # detected in this order: a format that holds video files comes before plain video
    "lerobot": Format(LeRobotConfig, LeRobotSource, dataset_roots, "a LeRobot dataset (meta/info.json)"),
    "droid": Format(DroidConfig, DroidSource, find_droid, "DROID episodes (metadata_….json beside trajectory.h5)"),
    "egodex": Format(EgoDexConfig, EgoDexSource, find_egodex, "EgoDex episodes (0.hdf5 beside 0.mp4)"),
    "aloha": Format(
        AlohaConfig, AlohaSource, find_aloha, "ALOHA episodes (HDF5 with /action and /observations/images)"
    ),
    "robomimic": Format(RobomimicConfig, RobomimicSource, find_robomimic, "robomimic or LIBERO HDF5 (/data/demo_0)"),
    "rlds": Format(RldsConfig, RldsSource, find_builders, "an RLDS dataset (features.json beside .tfrecord files)"),
    "zarr": Format(ZarrConfig, ZarrSource, find_buffers, "Zarr replay buffers (data/ and meta/episode_ends)"),
    "npz": Format(NpzConfig, NpzSource, find_npz, ".npz files with arrays of pictures"),
    "ros": Format(RosConfig, RosSource, find_bags, f"ROS recordings ({', '.join(BAG_SUFFIXES)})"),
    "video_json": Format(VideoJsonConfig, VideoJsonSource, names_videos, "JSON files that name videos"),
    "video_folder": Format(
        VideoFolderConfig, VideoFolderSource, find_videos, f"video files ({', '.join(VIDEO_SUFFIXES)})"
    ),
}

AnySourceConfig = Annotated[
    LeRobotConfig
    | DroidConfig
    | EgoDexConfig
    | AlohaConfig
    | RobomimicConfig
    | RldsConfig
    | ZarrConfig
    | NpzConfig
    | RosConfig
    | VideoJsonConfig
    | VideoFolderConfig,
    Field(discriminator="kind"),
]


def open_source(config: AnySourceConfig) -> Source:
    """The reader for a recording set. Keep it for many episodes: it reads the set's metadata once."""
    return FORMATS[config.kind].open(config)


def detect_kind(path: Path) -> str:
    """The name in FORMATS of what lies at `path`."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder; check the path of the recordings.")
    for kind, one in FORMATS.items():
        if one.is_at(path):
            return kind
    expected = " or ".join(one.looks_like for one in FORMATS.values())
    raise UserError(f"{path}: holds no recordings that can be read; expected {expected}.")


__all__ = [
    "FORMATS",
    "AnySourceConfig",
    "Episode",
    "Footage",
    "LeRobotConfig",
    "RosConfig",
    "Source",
    "SourceConfig",
    "SourceError",
    "VideoFolderConfig",
    "VideoJsonConfig",
    "VideoSegment",
    "detect_kind",
    "open_source",
]
