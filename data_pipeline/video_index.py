"""The presentation order of a video's frames, and whether the file holds all that its container promises.

The index is read from packet headers, without decoding, and kept per process: a file that is decoded clip by clip is
indexed once. The functions that decode stand in `video_io`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import chain

import av
import numpy as np
from av.container import InputContainer
from av.stream import Discard, Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from .damage import CheckedDecoder
from .video_pixels import Picture

PathLike = str | os.PathLike[str]

# Playlists (HLS, concat scripts) would let a "video" read other files or the network: only self-contained formats open.
OPEN_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,ivf,m4v,h264,hevc,obu,gif",
}
# Packets of these formats carry presentation times; those of AVI and raw streams do not, whatever the demuxer invents.
_TIMED_FORMATS = {"mov", "matroska", "mpegts", "mpeg", "flv", "asf", "ivf"}


class VideoError(Exception):
    """A video file that cannot be used. `reason` is one of

    missing_video      there is no such file
    not_a_video        empty, text, a Git LFS pointer, audio only, or a container that is not a video
    truncated_video    the container promises more frames or a longer duration than the file holds
    undecodable_video  the container is whole, but a wanted frame does not decode (damaged, encrypted, unknown codec)
    out_of_range       the caller asked for a frame or a time that the video does not have
    """

    def __init__(self, reason: str, path: PathLike, detail: str) -> None:
        super().__init__(f"{reason}: {path}: {detail}")
        self.reason = reason
        self.path = str(path)
        self.detail = detail

    def __reduce__(self) -> tuple[type[VideoError], tuple[str, str, str]]:  # exceptions cross process borders in Ray
        return VideoError, (self.reason, self.path, self.detail)


@dataclass(frozen=True)
class VideoIndex:
    pts: np.ndarray  # int64 [f], increasing; frames that an edit list cuts away are left out
    key_pts: np.ndarray  # int64, increasing: where decoding can start
    time_base: Fraction
    end_pts: int  # presentation end of the last frame
    can_seek: bool  # False: timestamps are missing or repeated, so frames are counted from the start
    codec: str
    average_rate: float  # as the header states it; 0: it does not
    picture: Picture
    num_hidden: int  # frames that an edit list cuts away
    num_streams: int  # of video, of which this is one
    damaged_keys: frozenset[int] = frozenset()  # numbers of keyframes after which packets are known to be damaged

    def position(self, frame: VideoFrame) -> int | None:
        """The frame's place in presentation order; None for one that is not presented."""
        if frame.pts is None:
            return None
        found = int(np.searchsorted(self.pts, frame.pts))
        return found if found < len(self.pts) and self.pts[found] == frame.pts else None

    def key_before(self, position: int) -> int:
        """Number of the last keyframe that is presented at or before frame `position`."""
        return max(0, int(np.searchsorted(self.key_pts, self.pts[position], side="right")) - 1)

    def num_skipped(self, position: int, wanted: int) -> int:
        """Frames between `position` and the keyframe that `wanted` needs: what a seek would save."""
        if not self.can_seek:
            return 0
        return int(np.searchsorted(self.pts, self.key_pts[self.key_before(wanted)])) - position

    def times_s(self) -> np.ndarray:
        """Start of each frame, relative to the first one's: float64 [f]."""
        return (self.pts - self.pts[0]).astype(np.float64) * float(self.time_base)

    @property
    def duration_s(self) -> float:
        return float((self.end_pts - int(self.pts[0])) * self.time_base)


def index_video(path: PathLike) -> VideoIndex:
    return _cached_index(*file_identity(path))


def file_identity(path: PathLike) -> tuple[str, int, int]:
    """(path, size, modification time): the key of caches, so that a file written anew is read anew."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise VideoError("missing_video", path, "there is no such file") from error
    return os.fspath(path), stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=64)  # an hour at 30 frames/s takes 1 MB
def _cached_index(path: str, size: int, mtime_ns: int) -> VideoIndex:
    with open_video(path) as container:
        stream = video_stream(container, path)
        pts: list[int | None] = []
        key_pts: list[int] = []
        damaged_after: list[int] = []  # keyframes' timestamps
        end = -(2**62)
        num_packets, num_hidden, is_cut = 0, 0, False
        picture: Picture | None = None
        for packet in container.demux(stream):
            if picture is None:
                picture = _picture(packet, stream)
            if packet.size == 0:  # the demuxer's end mark, or (with a timestamp) a frame that the recorder dropped
                num_packets += packet.dts is not None
                continue
            num_packets += 1
            if packet.has_sidedata("encryption_info"):  # now and then a decoder makes something of it
                raise VideoError("undecodable_video", path, "its pictures are encrypted; decrypt the file first")
            if packet.is_keyframe and packet.pts is not None:
                key_pts.append(packet.pts)
            is_cut = packet.is_corrupt  # set for a packet that the file's end cuts short, and where bytes were lost
            if is_cut:
                damaged_after += key_pts[-1:]
            if packet.is_discard:
                num_hidden += 1
            else:
                pts.append(packet.pts)
                end = max(end, (packet.pts or 0) + (packet.duration or 0))
        if not pts:
            raise VideoError("truncated_video" if stream.frames else "not_a_video", path, "it holds no frames")
        _check_complete(container, stream, num_packets, is_cut, end, path)
        if picture is None:
            raise VideoError("undecodable_video", path, f"no frame of its {len(pts)} decodes")
        known = {value for value in pts if value is not None}
        if len(known) == len(pts) and key_pts and container.format.name.split(",")[0] in _TIMED_FORMATS:
            ordered, keys = np.sort(np.asarray(list(known), dtype=np.int64)), np.sort(np.asarray(key_pts))
            return VideoIndex(
                pts=ordered,
                key_pts=keys,
                time_base=_time_base(stream),
                end_pts=_end(ordered, end),
                can_seek=True,
                codec=stream.codec_context.codec.canonical_name,
                average_rate=float(stream.average_rate or 0),
                picture=picture,
                num_hidden=num_hidden,
                num_streams=len(moving_streams(container)),
                damaged_keys=frozenset(np.searchsorted(keys, damaged_after).tolist()),
            )
    return _index_by_decoding(path, picture)


def _index_by_decoding(path: str, picture: Picture) -> VideoIndex:
    """For files whose packets have no usable timestamps: count what comes out of the decoder."""
    with open_video(path) as container:
        stream = video_stream(container, path)
        decoder = CheckedDecoder(stream)
        pts = [frame.pts for packet in container.demux(stream) for frame in decoder.decode(packet)]
        if not pts:
            raise VideoError("undecodable_video", path, "none of its frames decodes without damage")
        time_base = _time_base(stream)
        times = np.asarray([-1 if value is None else value for value in pts], dtype=np.int64)
        if np.any(times < 0) or np.any(np.diff(times) <= 0):  # no clock at all: the nominal rate is all there is
            if decoder.has_found_damage:
                raise VideoError(
                    "undecodable_video", path, "frames are damaged, and no timestamps place those after them"
                )
            rate = stream.average_rate or Fraction(25)
            times = np.asarray([round(i / rate / time_base) for i in range(len(pts))], dtype=np.int64)
        return VideoIndex(
            pts=times,
            key_pts=times[:1],
            time_base=time_base,
            end_pts=_end(times, 0),
            can_seek=False,
            codec=stream.codec_context.codec.canonical_name,
            average_rate=float(stream.average_rate or 0),
            picture=picture,
            num_hidden=0,
            num_streams=len(moving_streams(container)),
        )


def _end(pts: np.ndarray, packet_end: int) -> int:
    """Presentation end of the last frame; a missing or absurd packet duration is replaced by the usual interval."""
    usual = int(np.median(np.diff(pts))) if len(pts) > 1 else 1
    last = packet_end - int(pts[-1])
    is_plausible = last > 0 and (len(pts) == 1 or last <= 10 * usual)
    return int(pts[-1]) + (last if is_plausible else usual)


# --- completeness ----------------------------------------------------------------------------------------------------


def _check_complete(
    container: InputContainer, stream: VideoStream, num_packets: int, is_cut: bool, end: int, path: str
) -> None:
    """Compare what the container promises with what the file holds: readers reach an early end without an error."""
    counts_frames = stream.frames > 0 and container.format.name.startswith("mov")  # AVI counts ticks, Matroska nothing
    if counts_frames and num_packets < stream.frames:
        raise VideoError("truncated_video", path, f"it holds {num_packets} of the {stream.frames} frames promised")
    if is_cut:
        raise VideoError("truncated_video", path, "its last frame is cut short")
    missing_bytes = _missing_matroska_bytes(path) if container.format.name.startswith("matroska") else 0
    if missing_bytes:
        raise VideoError("truncated_video", path, f"{missing_bytes} of the bytes that its header promises are missing")
    promised_s = None if counts_frames else _promised_duration_s(container, stream)
    if promised_s is not None:
        held_s = float((end - (stream.start_time or 0)) * _time_base(stream))
        if held_s < promised_s - max(0.25, 0.02 * promised_s):
            raise VideoError("truncated_video", path, f"it holds {held_s:.2f} of the {promised_s:.2f} s promised")


def _missing_matroska_bytes(path: str) -> int:
    """How far the file ends before its Segment does: the duration alone misses frames that were stored after the last
    one shown. 0 where the size is left open, as live recorders do. Layout: RFC 8794 (EBML), RFC 9559 (Matroska)."""
    with open(path, "rb") as file:
        head = file.read(4096)

    def size_at(place: int) -> tuple[int | None, int]:
        """A variable-length size and the place after it; None where every bit is set, for "unknown"."""
        width = 9 - head[place].bit_length()
        value = int.from_bytes(head[place : place + width], "big") & ((1 << 7 * width) - 1)
        return (None if value == (1 << 7 * width) - 1 else value), place + width

    try:
        header_size, place = size_at(4)  # after the EBML header's ID of four bytes
        size, start = size_at(place + (header_size or 0) + 4)  # after the Segment's, of four bytes too
    except IndexError:
        return 0
    return 0 if size is None else max(0, start + size - os.path.getsize(path))


def _promised_duration_s(container: InputContainer, stream: VideoStream) -> float | None:
    """The video stream's duration as the header states it (Matroska keeps it in a tag, or only for the whole file)."""
    if stream.duration is not None:
        return float(stream.duration * _time_base(stream))
    tag = stream.metadata.get("DURATION", "")
    try:
        hours, minutes, seconds = tag.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        is_only_stream = len(container.streams) == 1  # else the file's duration may be that of its audio
        return container.duration / av.time_base if is_only_stream and container.duration else None


# --- opening and decoding --------------------------------------------------------------------------------------------


@contextmanager
def open_video(path: PathLike) -> Iterator[InputContainer]:
    """The open file. Whatever FFmpeg raises, here or while it is read, becomes a VideoError."""
    with open_container(path) as container, reading(path):
        yield container


def open_container(path: PathLike) -> InputContainer:
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise VideoError("not_a_video", path, "it is no file but a folder, a pipe or a device")
    try:
        name = f"file:{os.fspath(path)}"  # else what stands before a colon (12:00.mp4) is taken for a protocol
        return av.open(name, "r", options=dict(OPEN_OPTIONS), metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise _why_not_opened(path, error) from error


@contextmanager
def reading(path: PathLike) -> Iterator[None]:
    """Makes a VideoError of what FFmpeg raises."""
    try:
        yield
    except av.FFmpegError as error:
        raise VideoError("undecodable_video", path, f"reading it fails ({error.strerror})") from error


def _why_not_opened(path: PathLike, error: Exception) -> VideoError:
    if not os.path.isfile(path):
        return VideoError("missing_video", path, "there is no such file")
    with open(path, "rb") as file:
        head = file.read(256)
    if not head:
        return VideoError("not_a_video", path, "the file is empty")
    if head.startswith(b"version https://git-lfs"):
        return VideoError("not_a_video", path, "it is a Git LFS pointer: fetch the real file with `git lfs pull`")
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free"):
        return VideoError("truncated_video", path, "an MP4 without its index (the end of the file is missing)")
    if b"\0" not in head and all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return VideoError("not_a_video", path, "it is a text file")
    return VideoError("not_a_video", path, f"no known video container ({getattr(error, 'strerror', None) or error})")


def video_stream(container: InputContainer, path: PathLike) -> VideoStream:
    """The main video stream, set to decode on one thread; the file's other streams are no longer read.

    Of several: those marked as default before the others, then the largest picture, then the first. Cover pictures and
    streams without a decoder do not count.
    """
    streams = moving_streams(container)
    if not streams:
        raise VideoError("not_a_video", path, "it has no video stream")
    decodable = [stream for stream in streams if stream.codec_context is not None and stream.time_base]
    if not decodable:
        raise VideoError("undecodable_video", path, "there is no decoder for its codec")
    main = max(decodable, key=lambda s: (bool(s.disposition & Disposition.default), s.width * s.height, -s.index))
    for stream in container.streams:
        if stream is not main:
            stream.discard = Discard.all
    main.codec_context.thread_count = 1
    return main


def moving_streams(container: InputContainer) -> list[VideoStream]:
    """Its streams of video; cover pictures are none."""
    return [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]


def decode_from_start(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Frames without damage in presentation order, from where the container stands."""
    return _decode_packets(container.demux(stream), stream)


def decode_from_key(
    container: InputContainer, stream: VideoStream, index: VideoIndex, key: int, path: PathLike
) -> Iterator[VideoFrame]:
    """Frames without damage in presentation order, starting at or before keyframe number `key`."""
    packets = packets_from_key(container, stream, index, key)
    first = next(packets, None)
    if first is None:  # the format cannot seek at all
        with open_video(path) as fresh:
            yield from decode_from_start(fresh, video_stream(fresh, path))
        return
    yield from _decode_packets(chain([first], packets), stream)


def _decode_packets(packets: Iterable[av.Packet], stream: VideoStream) -> Iterator[VideoFrame]:
    decoder = CheckedDecoder(stream)
    for packet in packets:
        yield from decoder.decode(packet)


def packets_from_key(
    container: InputContainer, stream: VideoStream, index: VideoIndex, key: int
) -> Iterator[av.Packet]:
    """Packets in decoding order, starting at or before keyframe number `key`; none where the format cannot seek.

    Containers disagree on which timestamps a seek compares (MP4 uses decoding times), so the landing place is checked,
    and an earlier keyframe is tried when it lies behind the one that is needed.
    """
    for candidate in range(key, -1, -1):
        container.seek(int(index.key_pts[candidate]), stream=stream, backward=True)
        packets = container.demux(stream)
        first = next(packets, None)
        if first is not None and first.pts is not None and first.pts <= index.key_pts[key]:
            yield first
            yield from packets
            return


def _picture(packet: av.Packet, stream: VideoStream) -> Picture | None:
    """Of the first frame that comes out, by the stream's own decoder: no other is told how the picture is turned."""
    if packet.size == 0 and packet.dts is not None:
        return None
    try:
        return next((Picture.of(frame, stream) for frame in stream.codec_context.decode(packet)), None)
    except av.FFmpegError:
        return None


def _time_base(stream: VideoStream) -> Fraction:
    assert stream.time_base is not None  # checked in video_stream
    return stream.time_base
