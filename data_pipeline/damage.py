"""Decode a video's packets and leave out the frames that show damage.

A decoder does not stop at damage: what it cannot read it guesses, and gives pictures that nobody recorded. What it can
tell of them it is asked for here. What is built on a damaged frame is damaged as well, until the next keyframe. A frame
that is left out is noticed by its absence.

What is asked, by codec: whether the parts of a picture that were guessed are marked, or errors in a packet are raised
(all of FFmpeg's own decoders); whether data and picture end together (AV1, VP9); the pictures' own checksums (HEVC,
where the encoder wrote them); bytes that an encoder must not write (H.264, HEVC).

What stays unseen is damage that reads as another valid picture: rare where data and picture have to end together, a
third of it in Motion JPEG, most of it in HEVC without checksums, all of it in VP8.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import av
from av.bitstream import BitStreamFilterContext
from av.codec import CodecContext
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from . import nal_units

_VP9 = "libvpx-vp9"  # FFmpeg's own decoder of VP9 does not notice where the data end
# Not for other codecs: an error raised there takes the sound frame with it that was to come out next. And not more of
# err_detect ("aggressive"), which takes the habits of real encoders for damage.
_CHECKS = {
    "hevc": {"err_detect": "crccheck+explode"},
    "mjpeg": {"err_detect": "explode"},
    "av1": {"strict": "strict"},
}
_MAX_REORDERED = 16  # frames that may be stored before one that is shown earlier, in any codec
_NO_SLICE_HOLDS = re.compile(rb"\0\0(?:[\1\2]|\0+[^\0])")  # ITU-T H.264 and H.265, 7.4.1: what looks like a start code


@dataclass
class _Sent:
    """A packet that was given to the decoder."""

    number: int  # in decoding order
    group: int  # of pictures
    is_leading: bool  # shown before the keyframe of its group, so it may be built on the group before, too
    is_damaged: bool


class CheckedDecoder:
    """Takes packets of one stream in decoding order, starting at a keyframe. Nothing else decodes with that stream."""

    def __init__(self, stream: VideoStream) -> None:
        self._context = stream.codec_context
        self._has_slices = self._context.codec.canonical_name in nal_units.CODECS
        self._splitter: BitStreamFilterContext | None = None
        if self._context.codec.canonical_name == "vp9" and _is_read_by_libvpx(stream):
            self._context = _vp9_decoder()
            # a packet of several pictures is checked only at its end: each one becomes a packet
            self._splitter = BitStreamFilterContext("vp9_superframe_split", stream)
        self.has_found_damage = False
        self._last = _Sent(0, 0, False, False)
        self._key_pts: int | None = None
        self._is_damaged = False  # whether frames of this group of pictures are, from now on
        self._are_leading_damaged = False
        self._pending: dict[int | None, _Sent] = {}  # by time: those whose frames are yet to come
        self._held: deque[tuple[VideoFrame, _Sent]] = deque()  # frames that damage may spread to from a pending one

    def decode(self, packet: Packet) -> Iterator[VideoFrame]:
        """The frames known by then to show no damage, in presentation order. A packet of no bytes ends the stream."""
        is_end = packet.size == 0
        if is_end and packet.dts is not None:  # a dropped frame; the decoder would take it for the end
            return
        if not self._context.is_open:
            self._context.options = _checks(self._context, packet)
        self._last = self._sent(packet)
        if not self._last.is_damaged or is_end:
            self._send(packet)
        while self._held and (is_end or self._is_settled(self._held[0][1])):
            frame, sent = self._held.popleft()
            if not sent.is_damaged:
                yield frame

    def _sent(self, packet: Packet) -> _Sent:
        group = self._last.group
        if packet.is_keyframe:
            group, self._key_pts = group + 1, packet.pts
            self._is_damaged, self._are_leading_damaged = False, self._is_damaged
        is_leading = packet.pts is not None and self._key_pts is not None and packet.pts < self._key_pts
        is_damaged = self._are_leading_damaged if is_leading else self._is_damaged
        return _Sent(self._last.number + 1, group, is_leading, is_damaged)

    def _send(self, packet: Packet) -> None:
        sent, was_damaged = self._last, self._is_damaged
        if self._has_slices and any(map(_NO_SLICE_HOLDS.search, nal_units.slices(packet, self._context))):
            self._spread_damage(sent)
        else:
            self._pending[packet.pts] = sent
            self._run_decoder(self._parts(packet))
        if self._is_damaged and not was_damaged:  # the next keyframe finds the decoder as after a seek
            self._run_decoder([None])
            self._context.flush_buffers()
            if self._splitter is not None:
                self._splitter.flush()

    def _run_decoder(self, packets: Iterable[Packet | None]) -> None:
        try:
            for packet in packets:
                for frame in self._context.decode(packet):
                    self._hold(frame)
        except av.FFmpegError:
            self._spread_damage(self._last)

    def _parts(self, packet: Packet) -> Iterator[Packet | None]:
        if packet.size == 0:
            yield None
        elif self._splitter is None:
            yield packet
        else:
            yield from self._splitter.filter(packet)

    def _hold(self, frame: VideoFrame) -> None:
        sent = self._pending.pop(frame.pts, self._last)
        if frame.pts is not None:  # frames come in order: of an earlier time there will be none
            self._pending = {pts: one for pts, one in self._pending.items() if pts is None or pts > frame.pts}
        self._held.append((frame, sent))
        if frame.is_corrupt:
            self._spread_damage(sent)

    def _is_settled(self, sent: _Sent) -> bool:
        """Whether all that is stored before it has come out."""
        is_first = all(sent.number < pending.number for pending in self._pending.values())
        return is_first or len(self._held) > _MAX_REORDERED

    def _spread_damage(self, source: _Sent) -> None:
        """What is stored after it may be built on it: frames on the way, and those to come until the next keyframe."""
        self.has_found_damage = True
        is_current = source.group == self._last.group
        self._is_damaged |= is_current and not source.is_leading
        self._are_leading_damaged |= is_current or not source.is_leading
        for sent in (source, *self._pending.values(), *(sender for _, sender in self._held)):
            is_built_on_it = sent.is_leading or (sent.group == source.group and not source.is_leading)
            sent.is_damaged |= sent is source or (sent.number > source.number and is_built_on_it)


def _checks(context: CodecContext, packet: Packet) -> dict[str, str]:
    codec = context.codec.canonical_name
    if codec == "hevc" and not nal_units.has_checksum(packet, context):
        return {}  # of errors that are raised some are of the metadata of sound pictures, as cameras write it
    return _CHECKS.get(codec, {})


def _is_read_by_libvpx(stream: VideoStream) -> bool:
    is_eight_bit = stream.format is not None and all(part.bits == 8 for part in stream.format.components)
    return is_eight_bit and _VP9 in av.codecs_available  # built for eight bits, as a rule


def _vp9_decoder() -> VideoCodecContext:
    context = CodecContext.create(_VP9, "r")
    assert isinstance(context, VideoCodecContext)
    context.thread_count = 1
    return context
