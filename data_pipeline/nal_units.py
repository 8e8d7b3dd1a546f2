"""The units of which packets of H.264 and HEVC consist (network abstraction layer), as containers hold them."""

from __future__ import annotations

from collections.abc import Iterator

from av.codec import CodecContext
from av.packet import Packet

CODECS = ("h264", "hevc")
_SUFFIX_SEI, _PICTURE_HASH = 40, 132  # ITU-T H.265, tables 7-1 and D.1


def slices(packet: Packet, context: CodecContext) -> Iterator[bytes]:
    """The units that hold pictures, without what containers put around and before them."""
    is_h264 = context.codec.canonical_name == "h264"
    for unit in _units(bytes(packet), context.extradata or b"", is_h264):
        is_slice = bool(unit) and (1 <= unit[0] & 31 <= 5 if is_h264 else unit[0] >> 1 & 63 < 32)
        if is_slice:
            yield unit.rstrip(b"\0")  # zeros may follow a unit in a stream with start codes


def has_checksum(packet: Packet, context: CodecContext) -> bool:
    """Of HEVC: whether it says what the decoded picture adds up to (ITU-T H.265, D.2.19)."""
    units = _units(bytes(packet), context.extradata or b"", is_h264=False)
    return any(unit[0] >> 1 & 63 == _SUFFIX_SEI and unit[2] == _PICTURE_HASH for unit in units if len(unit) > 2)


def _units(data: bytes, extradata: bytes, is_h264: bool) -> Iterator[bytes]:
    has_lengths = extradata[:1] == b"\x01"  # MP4 and Matroska; MPEG-TS has start codes
    size_at = 4 if is_h264 else 21  # ISO/IEC 14496-15: where avcC and hvcC say how long the lengths are
    if not has_lengths or len(extradata) <= size_at:
        yield from data.split(b"\0\0\1")[1:]
        return
    width, place = 1 + (extradata[size_at] & 3), 0
    while place + width <= len(data):
        size = int.from_bytes(data[place : place + width], "big")
        yield data[place + width : place + width + size]
        place += width + size
