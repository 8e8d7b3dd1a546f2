"""What a video looks like, as short codes to compare: of its packets, which copies share, and of what it shows.

A hash of packets is the same in every container that the same stream is put into. A perceptual hash changes in a few
bits when a clip is encoded or scaled anew: it says for every low frequency of the picture whether it is strong.
"""

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
from av.packet import Packet
from av.video.stream import VideoStream
from jaxtyping import Float64, UInt8
from PIL import Image

from .. import nal_units
from ..sources.base import Footage, VideoSegment
from ..video_index import VideoIndex, index_video, open_video, video_stream
from ..video_io import frame_indices_at
from ..video_pixels import split_planes

PHASH_FRAMES = 4
"""Frames of a clip, from its first to its last, that are hashed."""

PHASH_SIDE, PHASH_FREQUENCIES = 32, 8
"""A frame is reduced to 32 x 32 pixels, of whose frequencies the lowest 8 x 8 give 64 bits."""


# --- what it shows ------------------------------------------------------------------------------------------------


def clip_phash(pixels: Mapping[str, UInt8[np.ndarray, "f p w"]]) -> str:
    """64 bits for each of a few frames of each view, which come as planes, in hexadecimal."""
    return "".join(_phash(split_planes(planes)[0]) for planes in pixels.values())


def _phash(luma: UInt8[np.ndarray, "f h w"]) -> str:
    """The method of pHash (https://www.phash.org): which low frequencies are stronger than their median."""
    chosen = np.linspace(0, len(luma) - 1, PHASH_FRAMES).round().astype(int)
    small = np.stack([_reduced(frame) for frame in luma[chosen]]).astype(np.float64)
    frequencies = (_COSINES @ small @ _COSINES.T).reshape(PHASH_FRAMES, -1)
    is_strong = frequencies > np.median(frequencies, axis=1, keepdims=True)
    return np.packbits(is_strong).tobytes().hex()


def _reduced(luma: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "32 32"]:
    size = (PHASH_SIDE, PHASH_SIDE)
    return np.asarray(Image.fromarray(luma).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0))


def _cosines() -> Float64[np.ndarray, "8 32"]:
    """The lowest rows of the discrete cosine transform (DCT-II)."""
    place, frequency = np.arange(PHASH_SIDE), np.arange(PHASH_FREQUENCIES)[:, None]
    return np.cos(np.pi * (2 * place + 1) * frequency / (2 * PHASH_SIDE))


_COSINES = _cosines()


# --- packets ------------------------------------------------------------------------------------------------------


def footage_sha256(footage: Footage) -> str | None:
    """Of the compressed frames; None for footage that is no video, or not a known part of one."""
    if not isinstance(footage, VideoSegment) or footage.num_frames is None:
        return None
    first = footage.start_frame
    if first is None:  # a variable rate
        first = int(frame_indices_at(footage.path, [footage.start_s])[0])
    return packets_sha256(footage.path, first, first + footage.num_frames)


def packets_sha256(path: str, first: int = 0, end: int | None = None) -> str | None:
    """Of the compressed frames `first` to `end` in presentation order, as they are stored; without their times.

    The same in MP4, MOV, MKV and WebM, for H.264 and HEVC in MPEG-TS too. None where packets cannot be told apart by
    their times.
    """
    index = index_video(path)
    end = len(index.pts) if end is None else min(end, len(index.pts))
    if not index.can_seek:
        return None
    # Formats disagree on where a seek lands: what it may have jumped over is found from the file's start.
    return _hash_packets(path, index, first, end, seeks=first > 0) or _hash_packets(
        path, index, first, end, seeks=False
    )


def _hash_packets(path: str, index: VideoIndex, first: int, end: int, *, seeks: bool) -> str | None:
    """None where not all of the frames were met."""
    digest = hashlib.sha256()
    num_missing = end - first
    with open_video(path) as container:
        stream = video_stream(container, path)
        if seeks:
            container.seek(int(index.key_pts[index.key_before(first)]), stream=stream, backward=True)
        for packet in container.demux(stream):
            place = int(np.searchsorted(index.pts, packet.pts)) if packet.pts is not None else len(index.pts)
            if packet.size == 0 or not first <= place < end or index.pts[place] != packet.pts:
                continue
            for payload in _payloads(packet, stream):
                digest.update(len(payload).to_bytes(8, "big") + payload)
            num_missing -= 1
            if num_missing == 0:
                return digest.hexdigest()
    return None


def _payloads(packet: Packet, stream: VideoStream) -> Iterator[bytes]:
    if stream.codec_context.codec.canonical_name in nal_units.CODECS:
        yield from nal_units.slices(packet, stream.codec_context)
    else:
        yield bytes(packet)
