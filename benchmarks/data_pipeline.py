"""What curating video costs, beside what it must cost.

    OMP_NUM_THREADS=1 python -m benchmarks.data_pipeline [--data PATH ...] [--parts floor decode workers memory starts]

floor    our curation of recordings (decode, scale, score, encode, pack) over the same clips decoded, scaled and encoded
         by the ffmpeg command (where it is not installed: by PyAV, doing just that), one process each; beside it our
         own decoding, scaling and encoding alone
decode   frames decoded per second of one core, to RGB: ours, plain PyAV, and torchcodec where it is installed
workers  two worker processes over one
memory   the peak of a process that probes, decodes and cuts an hour of 1080p
starts   three builds of one episode in one session of Ray, the first from the start of its process on

Alternatives are timed in turn, A B A B …; printed are medians, and the median of the pairwise ratios. CPU seconds are
those of the processes that do the work: other jobs on the machine count for neither side, wall seconds they do disturb.
"""

import argparse
import functools
import importlib.util
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil

from data_pipeline.build_config import BuildConfig
from data_pipeline.curate.episode import CuratePlan, curate_episode
from data_pipeline.resolve import open_sources, resolve
from data_pipeline.shards import TarWriter
from data_pipeline.sources import FORMATS, Source, VideoSegment, detect_kind
from data_pipeline.video_io import GOP, ViewConfig, decode_frames, decode_view, encode_planes, probe_video, view_window

from .timing import cpu_and_wall, in_turn, median_ratio, say

CLIP_FRAMES = 17
CRF, PRESET = 18, "veryfast"  # as `encode_planes` has them
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
DEFAULT_SETS = ("g1_real_lerobot_v21_trim", "gr00t_pnp_lerobot_v2")  # AV1 640x480 and H.264 256x256
HOUR_S = 3600


@dataclass(frozen=True)
class Set:
    """A recording set, opened for curation into square views; clips follow each other without overlap."""

    name: str
    plan: CuratePlan
    source: Source
    episodes: list[str]

    @classmethod
    def open(cls, path: Path, size: int) -> "Set":
        kind = detect_kind(path)
        config = BuildConfig(
            sources={"benchmark": FORMATS[kind].config(path=path)},
            out=Path("unused"),
            height=size,
            width=size,
            clip_frames=CLIP_FRAMES,
            stride=CLIP_FRAMES,
            crf=CRF,
        )
        sources, listing = open_sources(config)
        return cls(path.name, resolve(config, sources, listing), sources["benchmark"], listing["benchmark"])

    @property
    def view(self) -> ViewConfig:
        return next(iter(self.plan.views.values()))

    def segments(self) -> Iterator[tuple[VideoSegment, int]]:
        """Every view's video of every episode, and how many of its frames are in whole clips."""
        for episode_id in self.episodes:
            episode = self.source.read_episode(episode_id)
            for footage in episode.views.values():
                if isinstance(footage, VideoSegment):
                    yield footage, episode.num_frames // CLIP_FRAMES * CLIP_FRAMES

    def footage_s(self) -> float:
        return sum(num_frames / segment.info().fps for segment, num_frames in self.segments())


# --- over the floor --------------------------------------------------------------------------------------------------


def floor(sets: list[Set], repeats: int, price: float) -> None:
    has_ffmpeg = shutil.which("ffmpeg") is not None
    say(f"floor: {'the ffmpeg command' if has_ffmpeg else 'PyAV (ffmpeg is not installed)'}")
    for one in sets:
        works: dict[str, Callable[[], object]] = {
            "curation": functools.partial(curate, one),
            "pixels only": functools.partial(our_pixels, one),
            "PyAV": functools.partial(pyav_floor, one),
        }
        if has_ffmpeg:
            works["ffmpeg"] = functools.partial(ffmpeg_floor, one)
        timings = in_turn(works, repeats)
        base = timings["ffmpeg" if has_ffmpeg else "PyAV"]
        footage_s = one.footage_s()
        say(f"  {one.name}: {footage_s:.1f} s of video to {one.view.height}x{one.view.width}")
        for name, values in timings.items():
            cpu, wall = (statistics.median(column) for column in zip(*values, strict=True))
            ratios = f"{median_ratio(values, base, 0):5.2f} CPU {median_ratio(values, base, 1):5.2f} wall"
            say(f"    {name:12} {cpu:7.2f} s CPU {wall:7.2f} s wall   over the floor {ratios}")
        core_s = statistics.median(cpu for cpu, _ in timings["curation"])
        say(f"    video_hours_per_day_per_core {24 * footage_s / core_s:.0f}")
        say(f"    cost of 1000 h at {price:g} per core-hour: {1000 * core_s / footage_s * price:.2f}")


def curate(one: Set) -> int:
    clips = 0
    with tempfile.TemporaryDirectory() as folder:
        for episode_id in one.episodes:
            with TarWriter(Path(folder) / "clips.tar") as writer:
                record = curate_episode(one.plan, "benchmark", one.source, episode_id, writer)
            clips += len(record.clips)
    if not clips:
        raise SystemExit(f"{one.name}: no clip was accepted ({record.rejected[0].reason}: {record.rejected[0].detail})")
    return clips


def our_pixels(one: Set) -> None:
    for segment, num_frames in one.segments():
        first = segment.start_frame or 0
        for start in range(first, first + num_frames, CLIP_FRAMES):
            planes = decode_view(segment.path, range(start, start + CLIP_FRAMES), one.view)
            encode_planes(planes, None, one.plan.fps, crf=CRF, preset=PRESET)


def ffmpeg_floor(one: Set) -> None:
    """One command per video: decoded once, scaled in one step, each clip a file."""
    view = one.view
    x264 = f"keyint={GOP}:min-keyint={GOP}:scenecut=0:open-gop=0:mbtree=0:threads=1:lookahead-threads=1"
    with tempfile.TemporaryDirectory() as folder:
        for segment, num_frames in one.segments():
            info = probe_video(segment.path)
            top, left, height, width = view_window(info.height, info.width, view)
            cuts = ",".join(str(frame) for frame in range(CLIP_FRAMES, num_frames, CLIP_FRAMES))
            command = ["ffmpeg", "-v", "error", "-y", "-threads", "1", "-ss", str(segment.start_s), "-i", segment.path]
            command += ["-frames:v", str(num_frames), "-an", "-filter_threads", "1", "-threads", "1"]
            command += ["-vf", f"crop={width}:{height}:{left}:{top},scale={view.width}:{view.height}:flags=bilinear"]
            command += ["-pix_fmt", "yuv420p", "-c:v", "libx264", "-preset", PRESET, "-crf", str(CRF), "-bf", "0"]
            command += ["-g", str(GOP), "-x264-params", x264, "-force_key_frames", f"expr:not(mod(n,{CLIP_FRAMES}))"]
            command += ["-f", "segment", "-segment_frames", cuts, "-reset_timestamps", "1", f"{folder}/%04d.mp4"]
            subprocess.run(command, check=True)


def pyav_floor(one: Set) -> None:
    """The same with PyAV: no RGB in between, no checks, no scores."""
    view = one.view
    for segment, num_frames in one.segments():
        info = probe_video(segment.path)
        top, left, height, width = view_window(info.height, info.width, view)
        first = segment.start_frame or 0
        with av.open(segment.path) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            graph = av.filter.Graph()
            graph.threads = 1
            clip: list[av.VideoFrame] = []
            source = None
            for position, frame in enumerate(container.decode(stream)):
                if not first <= position < first + num_frames:
                    continue
                if source is None:
                    source = graph.add_buffer(
                        width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
                    )
                    crop = graph.add("crop", f"{width}:{height}:{left}:{top}")
                    scale = graph.add("scale", f"{view.width}:{view.height}:flags=bilinear")
                    graph.link_nodes(source, crop, scale, graph.add("format", "yuv420p"), graph.add("buffersink"))
                    graph.configure()
                graph.push(frame)
                clip.append(graph.pull())  # type: ignore[arg-type]
                if len(clip) == CLIP_FRAMES:
                    _pyav_encode(clip, one.plan.fps)
                    clip = []


def _pyav_encode(frames: list[av.VideoFrame], fps: float) -> None:
    with tempfile.TemporaryDirectory() as folder, av.open(f"{folder}/clip.mp4", "w") as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.max_b_frames = 0
        x264 = f"keyint={GOP}:min-keyint={GOP}:scenecut=0:open-gop=0:mbtree=0:threads=1:lookahead-threads=1"
        stream.options = {"crf": str(CRF), "preset": PRESET, "x264-params": x264}
        for position, frame in enumerate(frames):
            frame.pts, frame.time_base = position, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


# --- decoding --------------------------------------------------------------------------------------------------------


def decode(sets: list[Set], repeats: int) -> None:
    """Whole videos in order, and windows of one clip at random places."""
    has_torchcodec = importlib.util.find_spec("torchcodec") is not None
    say("decode: frames per second of CPU, to RGB at full size")
    for one in sets:
        path = next(one.segments())[0].path
        total = probe_video(path).num_frames
        starts = np.random.default_rng(0).integers(0, total - CLIP_FRAMES, 20).tolist()
        readers: dict[str, Callable[[str, list[int]], object]] = {"ours": _our_frames, "PyAV": _pyav_frames}
        if has_torchcodec:
            readers["torchcodec"] = _torchcodec_frames
        orders = {"in order": [list(range(total))], "windows": [list(range(i, i + CLIP_FRAMES)) for i in starts]}
        for order, requests in orders.items():
            works = {name: functools.partial(_read_all, read, path, requests) for name, read in readers.items()}
            timings = in_turn(works, repeats)
            count = sum(map(len, requests))
            rates = {name: count / statistics.median(cpu for cpu, _ in values) for name, values in timings.items()}
            versus = f"PyAV / ours {median_ratio(timings['PyAV'], timings['ours'], 0):.2f}"
            say(f"  {one.name:28} {order:9} " + "  ".join(f"{n} {r:.0f}/s" for n, r in rates.items()) + f"   {versus}")
    if not has_torchcodec:
        say("  (torchcodec is not installed)")


def _read_all(read: Callable[[str, list[int]], object], path: str, requests: list[list[int]]) -> None:
    for request in requests:
        read(path, request)


def _our_frames(path: str, positions: list[int]) -> np.ndarray:
    return decode_frames(path, positions)


def _pyav_frames(path: str, positions: list[int]) -> np.ndarray:
    """As a careful user would: seek to the keyframe before, decode from there, convert what is wanted."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        assert stream.average_rate is not None and stream.time_base is not None
        start = int(positions[0] / stream.average_rate / stream.time_base)
        container.seek(start, stream=stream)
        frames: list[np.ndarray] = []
        for frame in container.decode(stream):
            if frame.pts is not None and frame.pts >= start:
                frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == len(positions):
                break
        return np.stack(frames)


def _torchcodec_frames(path: str, positions: list[int]) -> object:
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(path, num_ffmpeg_threads=1, dimension_order="NHWC").get_frames_at(positions).data


# --- workers ---------------------------------------------------------------------------------------------------------


def workers(sets: list[Set], paths: list[Path], size: int, repeats: int) -> None:
    """Every set curated once by each worker: twice the work for two of them."""
    say("workers: two over one, at the same work for each")
    context = multiprocessing.get_context("spawn")
    for one, path in zip(sets, paths, strict=True):
        gains, busy = [], []
        with context.Pool(2, _keep_open, (path, size)) as pool:
            pool.map(_curate_kept, range(4), chunksize=1)  # both have imported and read everything once
            for _ in range(repeats):
                single = time.perf_counter()
                alone_cpu = pool.map(_curate_kept, range(1), chunksize=1)[0]
                single = time.perf_counter() - single
                both = time.perf_counter()
                both_cpu = pool.map(_curate_kept, range(2), chunksize=1)
                both = time.perf_counter() - both
                gains.append(2 * single / both)
                busy.append(2 * alone_cpu / statistics.mean(both_cpu))
        say(f"  {one.name:28} wall {statistics.median(gains):.2f}x   by CPU seconds {statistics.median(busy):.2f}x")


_KEPT: list[Set] = []
"""Of a worker process: what it has opened once."""


def _keep_open(path: Path, size: int) -> None:
    _KEPT[:] = [Set.open(path, size)]


def _curate_kept(_: int) -> float:
    return cpu_and_wall(lambda: curate(_KEPT[0]))[0]


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(size: int) -> None:
    say(f"memory: an hour of 1080p, 30 frames/s (limit 1.5 GB), clips of {size}x{size}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hour.mp4"
        write_long_video(path, HOUR_S)
        say(f"  {path.stat().st_size / 2**20:.0f} MiB, {probe_video(path).num_frames} frames")
        context = multiprocessing.get_context("spawn")
        for name, job in (("probe", _probe_job), ("decode", _decode_job), ("cut", _cut_job)):
            with context.Pool(1) as pool:
                peak_mb, seconds = pool.apply(job, (path, size))
            say(f"  {name:8} peak {peak_mb:6.0f} MB   {seconds:6.1f} s of CPU")


def write_long_video(path: Path, seconds: int, fps: int = 30) -> None:
    """Ten seconds, encoded once and stored again and again: an hour takes seconds to write."""
    height, width, part_s = 1080, 1920, 10
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    still = noise.repeat(8, 0).repeat(8, 1)
    with av.open(os.fspath(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.max_b_frames = 0
        stream.options = {"preset": "ultrafast", "x264-params": f"keyint={fps}:scenecut=0"}
        packets = []
        for i in range(part_s * fps):
            frame = av.VideoFrame.from_ndarray(np.roll(still, 4 * i, axis=1), format="rgb24")
            packets += stream.encode(frame.reformat(format="yuv420p"))
        packets += stream.encode(None)
        parts = [(bytes(packet), packet.is_keyframe) for packet in packets]
        for position in range(seconds * fps):
            data, is_keyframe = parts[position % len(parts)]
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, fps), is_keyframe
            packet.pts = packet.dts = position
            packet.duration = 1
            container.mux(packet)


def _peak(work: Callable[[], object]) -> tuple[float, float]:
    cpu_s, _ = cpu_and_wall(work)
    status = Path("/proc/self/status").read_text()  # getrusage would tell what this process was forked from, too
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6, cpu_s


def _probe_job(path: Path, size: int) -> tuple[float, float]:
    return _peak(lambda: probe_video(path))


def _decode_job(path: Path, size: int) -> tuple[float, float]:
    """A second of full pictures, from the beginning, the middle and the end."""
    total = probe_video(path).num_frames

    def some_seconds() -> None:
        for first in (0, total // 2, total - 30):
            decode_frames(path, range(first, first + 30))

    return _peak(some_seconds)


def _cut_job(path: Path, size: int) -> tuple[float, float]:
    """A clip a minute. Shot detection, which would decode every frame, is left to the decode part's figures."""
    one = Set.open(path, size)
    shots = one.plan.shots.model_copy(update={"detect": "off"})
    stride = round(60 * one.plan.fps)
    return _peak(
        lambda: curate(
            Set(one.name, one.plan.model_copy(update={"shots": shots, "stride": stride}), one.source, one.episodes)
        )
    )


# --- starts ----------------------------------------------------------------------------------------------------------


def starts(paths: list[Path], repeats: int) -> None:
    """What a build costs that has next to nothing to do. CPU seconds are those of all processes, Ray's own included."""
    say("starts: builds of one episode to 64x64 by two workers, in one session")
    for path in paths:
        runs = []
        for _ in range(repeats):
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process that has imported nothing
                runs.append(pool.apply(_build_job, (path, time.time())))
        for number, name in enumerate(("cold", "second", "third")):
            wall, cpu = (statistics.median(run[number][which] for run in runs) for which in (0, 1))
            say(f"  {path.name:28} {name:7} {wall:6.1f} s wall {cpu:6.1f} s CPU")


def _build_job(path: Path, started: float) -> list[tuple[float, float]]:
    from data_pipeline import ray_job
    from data_pipeline.build import main as build

    source = {"kind": detect_kind(path), "path": path, "max_episodes": 1}
    timings, cpu = [], 0.0
    with tempfile.TemporaryDirectory() as folder, ray_job.ray_session(None, num_workers=2, object_store_mb=128):
        for number in range(3):
            out = Path(folder) / str(number)
            build(BuildConfig.model_validate({"sources": {"benchmark": source}, "out": out, "num_workers": 2}))
            wall, cpu_before, cpu = time.time() - started, cpu, _family_cpu_s()
            timings.append((wall, cpu - cpu_before))
            started += wall
    return timings


def _family_cpu_s() -> float:
    """Of this process and all that it has started and that still run."""
    process = psutil.Process()
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", default=[SHARED / name for name in DEFAULT_SETS])
    parser.add_argument("--parts", nargs="+", default=["floor", "decode", "workers", "memory", "starts"])
    parser.add_argument("--size", type=int, default=256, help="height and width of the clips")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--price", type=float, default=0.04, help="of one core for an hour, in any currency")
    options = parser.parse_args()
    needs_sets = {"floor", "decode", "workers"}.intersection(options.parts)
    sets = [Set.open(path, options.size) for path in options.data] if needs_sets else []
    if "floor" in options.parts:
        floor(sets, options.repeats, options.price)
    if "decode" in options.parts:
        decode(sets, options.repeats)
    if "workers" in options.parts:
        workers(sets, options.data, options.size, options.repeats)
    if "memory" in options.parts:
        memory(options.size)
    if "starts" in options.parts:
        starts(options.data, options.repeats)


if __name__ == "__main__":
    main()
