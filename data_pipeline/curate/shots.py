"""Shot cuts: where a video jumps from one picture to another. No clip shows two shots.

PySceneDetect's AdaptiveDetector looks for a change that stands out from those of the two frames before and after it, so
that a fast camera is no cut. It is fed with our own frames: what it finds are positions in presentation order, the
numbers that `Footage.positions` and `Footage.read` use. Fades and dissolves are no cuts.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Literal

import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from jaxtyping import Int64, UInt8
from PIL import Image
from pydantic import Field, PositiveFloat

from configs.loader import StrictConfig, UserError

from ..sources.base import Footage, VideoSegment, read_undamaged
from ..video_index import VideoError, decode_from_key, decode_from_start, index_video, open_video, video_stream

WINDOW = 2
"""Frames before and after a change that it has to stand out from."""

SIDE = 160
"""Longer side, in pixels, of the pictures that are compared."""

IMAGES_AT_ONCE = 16
"""Stored images (not video) held at full size at a time."""


class ShotConfig(StrictConfig):
    """Where clips may not go on: shot cuts."""

    detect: Literal["auto", "on", "off"] = Field(
        "auto", description="look for shot cuts; auto: in episodes without actions (a robot's camera has no cuts)"
    )
    threshold: PositiveFloat = Field(
        2.5, description="how many times larger than those around it the change of a cut is; lower finds more cuts"
    )
    min_change: PositiveFloat = Field(
        15.0, description="smallest mean change of brightness, of 255, that can be a cut; lower finds more cuts"
    )

    def applies(self, has_actions: bool) -> bool:
        return self.detect == "on" or (self.detect == "auto" and not has_actions)


def find_cuts(footage: Footage, first: int, last: int, config: ShotConfig) -> Int64[np.ndarray, "n"]:
    """Positions of the first frames of new shots among the stored frames `first` to `last`, sorted.

    Frames that do not decode are passed over: whatever shows them is rejected when its own frames are read.
    """
    return cuts_among(small_frames(footage, first, last), config)


def cuts_among(frames: Iterable[tuple[int, UInt8[np.ndarray, "h w 3"]]], config: ShotConfig) -> Int64[np.ndarray, "n"]:
    """The cuts in a stream of (position, picture), of which no more than a few pictures are held at a time."""
    try:
        from scenedetect import AdaptiveDetector, FrameTimecode
    except ImportError as error:
        raise UserError("Finding shot cuts needs PySceneDetect: pip install 'foresight-wam[data]'.") from error
    # Brightness only: hue is noise in dark pictures, where it makes cuts of every fade.
    detector = AdaptiveDetector(
        adaptive_threshold=config.threshold,
        min_content_val=config.min_change,
        window_width=WINDOW,
        min_scene_len=0,
        luma_only=True,
    )
    shown: list[int] = []  # position of each frame fed so far
    cuts: set[int] = set()
    for position, picture in _mirrored_ends(frames):
        shown.append(position)
        timecode = FrameTimecode(len(shown) - 1, 25.0)  # its rate does not matter: only the frame number is read back
        found = detector.process_frame(timecode, np.ascontiguousarray(picture[..., ::-1]))
        cuts.update(shown[one.frame_num] for one in found if one.frame_num > WINDOW)
    return np.asarray(sorted(cuts), dtype=np.int64)


def _mirrored_ends(frames: Iterable[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
    """The frames, with those next to both ends also mirrored: 2 1 0 1 2 ... 7 8 9 8 7.

    The detector judges no change within `WINDOW` of an end, but a video that somebody has cut before often begins or
    ends with a frame of the neighbouring shot.
    """
    stream = iter(frames)
    head = [frame for _, frame in zip(range(WINDOW + 1), stream, strict=False)]
    yield from reversed(head[1:])
    yield from head
    tail = deque(head, maxlen=WINDOW + 1)
    for frame in stream:
        tail.append(frame)
        yield frame
    yield from list(tail)[-2::-1]


def small_frames(footage: Footage, first: int, last: int) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]]:
    """The stored frames `first` to `last` one by one, at most `SIDE` pixels wide and high: (position, RGB)."""
    if isinstance(footage, VideoSegment):
        return _small_video_frames(footage.path, first, last)
    return _small_images(footage, first, last)


def _small_video_frames(path: str, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
    """One pass over the file: reading it in pieces would decode from a keyframe anew for each of them.

    Not turned upright, which would find the same cuts.
    """
    reformatter = VideoReformatter()
    size: tuple[int, int] | None = None  # a stream that changes size midway is scaled to the size it starts with
    with suppress(VideoError), open_video(path) as container:
        index, stream = index_video(path), video_stream(container, path)
        if index.can_seek:
            decoded = decode_from_key(container, stream, index, index.key_before(first), path)
        else:
            decoded = decode_from_start(container, stream)
        for count, frame in enumerate(decoded):
            position = index.position(frame) if index.can_seek else count
            if position is None or position < first:
                continue
            if position > last:
                return
            size = size or _small_size(frame.width, frame.height)
            small = reformatter.reformat(
                frame, width=size[0], height=size[1], format="rgb24", interpolation=Interpolation.AREA, threads=1
            )
            yield position, small.to_ndarray()


def _small_images(footage: Footage, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(first, last + 1, IMAGES_AT_ONCE):
        positions = range(start, min(start + IMAGES_AT_ONCE, last + 1))
        for position, picture in zip(positions, read_undamaged(footage, positions), strict=True):
            if picture is not None:
                size = _small_size(picture.shape[1], picture.shape[0])
                yield position, np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def _small_size(width: int, height: int) -> tuple[int, int]:
    scale = min(1.0, SIDE / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))
