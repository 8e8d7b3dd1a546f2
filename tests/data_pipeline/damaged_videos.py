"""Videos of which one packet is damaged, and what a reader makes of them."""

import random
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from data_pipeline.video_index import VideoError
from data_pipeline.video_io import decode_frames
from tests.data_pipeline.recordings import FPS

GOP = 8
_X265 = f"log-level=none:keyint={GOP}:min-keyint={GOP}:scenecut=0:open-gop=0"
ENCODINGS = {  # the container, and what `write_video` is told
    "h264": (".mp4", {"b_frames": 2, "options": {"x264-params": f"keyint={GOP}:min-keyint={GOP}:scenecut=0"}}),
    "hevc": (".mp4", {"codec": "libx265", "options": {"x265-params": _X265}}),
    "hevc_checksums": (".mp4", {"codec": "libx265", "options": {"x265-params": f"{_X265}:hash=1"}}),
    "vp8": (".mkv", {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "4", "b": "400k"}}),
    "vp9": (".mkv", {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "6", "b": "400k"}}),
    "av1": (".mp4", {"codec": "libsvtav1", "options": {"preset": "10"}}),
    "mpeg4": (".mkv", {"codec": "mpeg4", "options": {"qscale": "4"}}),
    "mpeg2": (
        ".mkv",
        {"codec": "mpeg2video", "time_base": Fraction(1, FPS), "options": {"qscale": "4", "strict": "unofficial"}},
    ),
    "mjpeg": (".mkv", {"codec": "mjpeg", "pix_fmt": "yuvj420p", "options": {"qscale": "4"}}),
}


def moving_frames(num_frames: int, height: int, width: int) -> np.ndarray:
    """Smooth noise that moves under a patch that moves otherwise: something for every part of a codec to code."""
    rng = np.random.default_rng(0)
    rough = rng.normal(0, 90, (height + num_frames, width + 2 * num_frames, 3))
    smooth = sum(np.roll(rough, shift, axis) for axis in (0, 1) for shift in range(-4, 5)) / 3 + 128
    frames = np.stack([smooth[i : i + height, 2 * i : 2 * i + width] for i in range(num_frames)])
    for i, frame in enumerate(frames):
        patch = frame[height // 4 + i : height // 2 + i, width // 4 - i : width // 2 - i]
        patch[:] = 255 - patch
    return (frames + rng.normal(0, 4, frames.shape)).clip(0, 255).astype(np.uint8)


def damaged_copies(whole: Path, count: int, seed: int = 0) -> Iterator[tuple[Path, int]]:
    """Files that differ from `whole` in one packet each, and that packet's number; one at a time."""
    rng = random.Random(seed)
    content, packets = whole.read_bytes(), stored_packets(whole)
    starts = [0]
    for packet in packets:
        starts.append(content.index(packet, starts[-1]))
    path = whole.with_name(f"damaged_{whole.name}")
    for _ in range(count):
        number = rng.randrange(len(packets))
        start, size = starts[number + 1], len(packets[number])
        path.write_bytes(content[:start] + _damaged(packets[number], rng) + content[start + size :])
        yield path, number


def stored_packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def _damaged(data: bytes, rng: random.Random) -> bytes:
    """As many bytes, with bits turned over, or a part overwritten or missing, as on a bad disk or line."""
    damaged = bytearray(data)
    first = rng.randrange(len(data))
    end = min(len(data), first + rng.randint(4, max(4, len(data) // 4)))
    match rng.choice(["bits", "bits", "zeros", "noise", "missing"]):
        case "bits":
            for _ in range(rng.choice([1, 1, 3])):
                damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case "zeros":
            damaged[first:end] = bytes(end - first)
        case "noise":
            damaged[first:end] = rng.randbytes(end - first)
        case "missing":
            damaged = damaged[:first] + damaged[end:] + bytes(end - first)
    return bytes(damaged)


def frames_given(path: Path, positions: Sequence[int]) -> dict[int, np.ndarray]:
    """The frames that a reader gives, by position; asked for as a build does, which halves what fails."""
    try:
        return dict(zip(positions, decode_frames(path, positions), strict=True))
    except VideoError:
        half = len(positions) // 2
        return {} if not half else frames_given(path, positions[:half]) | frames_given(path, positions[half:])


def frames_unchecked(path: Path) -> dict[int | None, np.ndarray]:
    """What plain PyAV gives, by presentation time."""
    frames: dict[int | None, np.ndarray] = {}
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for packet in container.demux(video=0):
            try:
                frames |= {frame.pts: frame.to_ndarray(format="rgb24") for frame in packet.decode()}
            except av.FFmpegError:
                continue
    return frames
