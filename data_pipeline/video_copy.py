"""Cut a clip out of a video without encoding it again, where its stored frames already are what a sample holds.

A sample's video is H.264 in 4:2:0, upright with square pixels, at a constant rate, in short closed groups of pictures
without B-frames. A clip that begins at a keyframe of such a file is cut by copying: no pixel changes, and it costs a
fraction of encoding.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from fractions import Fraction
from itertools import islice

import av
import numpy as np
from av.video.stream import VideoStream

from .video_index import PathLike, VideoIndex, index_video, open_video, packets_from_key, video_stream

_IDR = 5  # the type of a picture that nothing after it looks back beyond, ITU-T H.264 table 7-1
_LENGTH_PREFIXED = ("mov", "matroska")  # containers that put the parameter sets in front and a length before each unit


def copy_clip(path: PathLike, first_frame: int, num_frames: int, fps: float, max_gop: int) -> bytes | None:
    """The frames from `first_frame` on as an MP4 like `encode_video`'s, or None where that takes encoding.

    They decode to what `decode_frames` gives. The caller sees to it that the picture is wanted as it is (no crop, no
    scaling) and that `fps` is the rate of the clip. The same file gives the same bytes. VideoError as in `index_video`.
    """
    index = index_video(path)
    if not _is_sample_like(index) or not _keeps_time(index, first_frame, num_frames, fps):
        return None
    key = index.key_before(first_frame)
    if index.key_pts[key] != index.pts[first_frame] or index.damaged_keys:
        return None
    with open_video(path) as container:
        stream = video_stream(container, path)
        if not container.format.name.startswith(_LENGTH_PREFIXED):
            return None
        packets = list(islice(packets_from_key(container, stream, index, key), num_frames))
        wanted = index.pts[first_frame : first_frame + num_frames]
        if [packet.pts for packet in packets] != wanted.tolist():  # out of order: there are B-frames
            return None
        if not _has_short_closed_gops(packets, stream, max_gop):
            return None
        return _mux(packets, stream, Fraction(fps).limit_denominator(1001))


def _is_sample_like(index: VideoIndex) -> bool:
    picture = index.picture
    return (
        index.can_seek
        and index.codec == "h264"
        and picture.pix_fmt == "yuv420p"
        and picture.pixel_aspect == 1
        and picture.is_upright
        and picture.width % 2 == 0
        and picture.height % 2 == 0
    )


def _keeps_time(index: VideoIndex, first_frame: int, num_frames: int, fps: float) -> bool:
    """Whether these frames come at this rate, as exactly as the container's ticks can say."""
    if first_frame < 0 or first_frame + num_frames > len(index.pts):
        return False
    ticks = index.pts[first_frame : first_frame + num_frames] - index.pts[first_frame]
    interval = 1 / fps / float(index.time_base)
    return bool(np.abs(ticks - np.arange(num_frames) * interval).max() <= min(1.0, 0.1 * interval))


def _has_short_closed_gops(packets: Sequence[av.Packet], stream: VideoStream, max_gop: int) -> bool:
    extradata = stream.codec_context.extradata
    if not extradata or extradata[0] != 1 or any(packet.has_sidedata("new_extradata") for packet in packets):
        return False
    length_size = (extradata[4] & 3) + 1
    starts = [i for i, packet in enumerate(packets) if _IDR in _unit_types(bytes(packet), length_size)]
    return bool(starts) and starts[0] == 0 and max(np.diff([*starts, len(packets)])) <= max_gop


def _unit_types(data: bytes, length_size: int) -> set[int]:
    """Types of the units in a packet of ISO/IEC 14496-15: a length, then a unit whose first byte says what it is."""
    types, place = set(), 0
    while place + length_size < len(data):
        types.add(data[place + length_size] & 31)
        place += length_size + int.from_bytes(data[place : place + length_size], "big")
    return types


def _mux(packets: Sequence[av.Packet], source: VideoStream, rate: Fraction) -> bytes:
    options = {"fflags": "+bitexact", "movflags": "+faststart"}
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        with av.open(file.name, "w", format="mp4", options=options) as container:
            stream = container.add_stream_from_template(source)
            stream.metadata.clear()
            stream.time_base = 1 / rate
            for position, packet in enumerate(packets):
                packet.stream = stream
                packet.time_base = 1 / rate
                packet.pts = packet.dts = position
                packet.duration = 1
                container.mux(packet)
        return file.read()
