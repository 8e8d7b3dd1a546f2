"""Files made to hang, to fill memory or to lead astray: each is named and costs its episode, nothing is waited for.

The sharpest ones of every format; damage of other kinds is tested beside each reader.
"""

import bz2
import io
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import h5py
import numcodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.loader import UserError
from data_pipeline.doctor import Report, examine
from data_pipeline.sources import SourceError, detect_kind, files, json_records
from data_pipeline.sources.files import bounded_memory, check_size, find_files, parse_json
from data_pipeline.sources.npz import NpzConfig, NpzSource
from data_pipeline.sources.tfrecord import masked_crc32c
from tests.data_pipeline import (
    test_sources_aloha,
    test_sources_droid,
    test_sources_npz,
    test_sources_rlds,
    test_sources_ros,
    test_sources_video_json,
)
from tests.data_pipeline.recordings import (
    lerobot_columns,
    numbered_frames,
    write_lerobot_v3,
    write_lerobot_v21,
    write_table,
    write_video,
)
from tests.data_pipeline.test_sources_zarr import edit, write_buffer

MB = 2**20
RATE = {"control_hz": 10}


@pytest.fixture(autouse=True)
def nothing_is_waited_for() -> Iterator[None]:
    """A pipe that is opened would otherwise hold up the whole suite."""

    def stop(*_: Any) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def reasons(path: Path, **settings: Any) -> dict[str, int]:
    """How many episodes doctor rejects for which reason."""
    report = doctor(path, **settings)
    told = [bad.reason for bad in report.unreadable]
    return {reason: told.count(reason) for reason in told}


def doctor(path: Path, kind: str = "auto", **settings: Any) -> Report:
    report = examine(path, detect_kind(path) if kind == "auto" else kind, settings)
    assert "unexpected_error" not in {bad.reason for bad in report.unreadable}, report.unreadable
    return report


# --- no files --------------------------------------------------------------------------------------------------------


def lerobot_v21(root: Path) -> dict[str, Any]:
    write_lerobot_v21(root, lengths=(8, 7))
    return {}


def lerobot_v3(root: Path) -> dict[str, Any]:
    write_lerobot_v3(root, lengths=(8, 7))
    return {}


def zarr(root: Path) -> dict[str, Any]:
    write_buffer(root / "a.zarr")
    return RATE


def npz(root: Path) -> dict[str, Any]:
    test_sources_npz.write_episode(root / "a.npz")
    return RATE


def aloha(root: Path) -> dict[str, Any]:
    test_sources_aloha.write_episode(root, 0)
    return {}


def droid(root: Path) -> dict[str, Any]:
    test_sources_droid.write_episode(root, "0")
    (root / "aggregated-annotations-1.json").write_text("{}")
    return {}


def rlds(root: Path) -> dict[str, Any]:
    test_sources_rlds.write_one(root)
    return RATE


def video_json(root: Path) -> dict[str, Any]:
    test_sources_video_json.write_record(root, action="a.npy")
    np.save(root / "annotation/a.npy", np.zeros((9, 3)))
    return {}


def ros(root: Path) -> dict[str, Any]:
    test_sources_ros.record("mcap").write(root / "a", "mcap")
    return {}


def video_folder(root: Path) -> dict[str, Any]:
    write_video(root / "a.mp4", numbered_frames(range(9)))
    (root / "a.txt").write_text("wave")
    return {}


WRITERS = [lerobot_v21, lerobot_v3, zarr, npz, aloha, droid, rlds, video_json, ros, video_folder]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_any_file_may_be_a_pipe(tmp_path: Path, write: Callable[[Path], dict[str, Any]]) -> None:
    """One after the other: what is left is read, or told in a sentence."""
    root = tmp_path / "set"
    root.mkdir()
    settings = write(root)
    kind = detect_kind(root)
    assert not doctor(root, kind, **settings).unreadable
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        kept = path.rename(tmp_path / "kept")
        os.mkfifo(path)
        for what in (kind, "auto"):
            try:
                doctor(root, what, **settings)
            except UserError as error:
                assert "\n" not in str(error)
        path.unlink()
        kept.rename(path)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "npz", "zarr.zip", "h5", "bag", "mcap", "db3", "mp4"])
def test_what_is_no_file_is_no_recording(tmp_path: Path, suffix: str) -> None:
    makers: list[Callable[[str], Any]] = [
        os.mkfifo,
        os.mkdir,
        lambda name: os.symlink("/dev/zero", name),
        lambda name: socket.socket(socket.AF_UNIX).bind(name),
    ]
    for number, make in enumerate(makers):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(f"{folder}/a.{suffix}")
        assert list(find_files(folder, (suffix,))) == []
        for path in (folder, folder / f"a.{suffix}"):
            with pytest.raises(UserError, match="holds no recordings"):
                detect_kind(path)


def test_links_that_lead_in_a_circle_are_not_followed(tmp_path: Path) -> None:
    video_folder(tmp_path)
    os.symlink(tmp_path, tmp_path / "again")
    os.symlink("loop.mp4", tmp_path / "loop.mp4")
    assert reasons(tmp_path) == {"missing_video": 1}


# --- more than memory holds ------------------------------------------------------------------------------------------


def test_a_size_is_refused_before_memory_is_taken() -> None:
    check_size(files.MAX_BYTES, "a", "it")
    with pytest.raises(SourceError, match=r"too_large: a: it would take 1\.1e\+12 GB of memory, the limit is 0\.5 GB"):
        check_size(2**70, "a", "it")


def test_memory_is_bounded_only_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_GROWTH_BYTES", 100 * MB)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    told = pytest.raises(SourceError, match="too_large: inner: reading it takes more")
    with bounded_memory("outer"), told, bounded_memory("inner"):
        bytes(200 * MB)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert len(bytes(200 * MB)) == 200 * MB


def zeros_by(compressor: Any, num_mb: int = 200) -> bytes:
    return b"".join([*(compressor.compress(bytes(MB)) for _ in range(num_mb)), compressor.flush()])


@pytest.mark.parametrize("codec", ["zlib", "bz2", "zip", "zstd", "lz4"])
def test_a_chunk_that_unpacks_to_more_costs_its_episodes(
    tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_GROWTH_BYTES", 80 * MB)
    compressors = {"bz2": numcodecs.BZ2(), "zstd": numcodecs.Zstd(), "lz4": numcodecs.LZ4(), "zip": None}
    path = write_buffer(
        tmp_path / "a.zarr", (3, 3), array_settings={"compressors": compressors.get(codec, numcodecs.Zlib())}
    )
    bomb = {
        "bz2": lambda: zeros_by(bz2.BZ2Compressor(9)),
        "zstd": lambda: b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 2**40) + b"\x01\x00\x00",  # a claim alone
        "lz4": lambda: struct.pack("<I", 2**31 - 1) + bytes(20),
        "zip": lambda: bytes(200 * MB),
    }.get(codec, lambda: zeros_by(zlib.compressobj(1)))()
    if codec == "zip":
        with zipfile.ZipFile(tmp_path / "b.zarr.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for file in (file for file in path.rglob("*") if file.is_file()):
                name = str(file.relative_to(path))
                archive.writestr(name, bomb if name == "data/action/0.0" else file.read_bytes())
        path = tmp_path / "b.zarr.zip"
    else:
        (path / "data/action/0.0").write_bytes(bomb)
    report = doctor(path, **RATE)
    (bad,) = report.unreadable
    assert (bad.episode[1:], report.num_readable) == ("_000000", 1)
    assert bad.reason == ("too_large" if codec in ("zlib", "bz2", "zip") else bad.reason)


def test_episodes_longer_than_memory(tmp_path: Path) -> None:
    """Rows that are not stored read as zeros, terabytes of them."""
    path = write_buffer(tmp_path / "a.zarr", (3, 4), img=numbered_frames(range(7)), state=None)
    for name, shape in (("img", [2**40, 48, 64, 3]), ("action", [2**40, 3])):
        edit(path / f"data/{name}/.zarray", shape=shape)
    edit(path / "meta/episode_ends/.zarray", compressor=None, filters=None)
    (path / "meta/episode_ends/0").write_bytes(np.array([3, 2**40], np.int64).tobytes())
    assert reasons(path, **RATE) == {"too_large": 1}


def member(shape: tuple[int, ...], dtype: str, data: bytes = b"") -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"shape": shape, "fortran_order": False, "descr": dtype})
    return header.getvalue() + data


def test_npz_headers_are_not_believed(tmp_path: Path) -> None:
    pictures = member((6, 48, 64, 3), "|u1", bytes(6 * 48 * 64 * 3))
    evil = {
        "a": {"image": pictures, "action": member((2**40, 2), "<f4", bytes(48))},
        "b": {"image": pictures, "action": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b" " * 1000},
        "c": {"image": pictures, "action": b"\x93NUMPY\x01\x00\x10\x00{'descr': open('x'"},
        "d": {"image": member((2, 16384, 16384, 3), "|u1"), "action": member((2, 2), "<f4", bytes(16))},
        "e": {"../../image": pictures, "/action": member((6, 2), "<f4", bytes(48))},
    }
    for name, arrays in evil.items():
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for member_name, data in arrays.items():
                archive.writestr(f"{member_name}.npy", data)
    test_sources_npz.write_episode(tmp_path / "0.npz")
    report = doctor(tmp_path, **RATE)
    told = {bad.where[-5]: bad.reason for bad in report.unreadable}
    assert told == {"a": "truncated_file", "b": "unreadable_file", "c": "unreadable_file", "d": "truncated_file"}
    assert report.num_readable == 2  # a name is only a name: nothing is unpacked to where it points
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npz"] * 6


@pytest.mark.parametrize("shape", [(2**40, 16, 16, 3), (2**40, 1, 16, 16, 3)])
def test_more_frames_or_episodes_than_fit_into_memory(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """An archive's directory may say any size of what is packed in it."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", member(shape, "|u1", bytes(3 * 16 * 16 * 3)))
        archive.infolist()[0].file_size = 2**60  # written when the archive is closed
    source = NpzSource(NpzConfig(path=tmp_path, control_hz=10))
    (episode_id,) = source.list_episodes()
    if len(shape) == 4:
        with pytest.raises(SourceError, match=f"too_large: .*a.npz: it has {shape[0]} frames"):
            source.read_episode(episode_id)


def test_hdf5_promises_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_GROWTH_BYTES", 80 * MB)

    def write(index: int, change: Callable[[h5py.File], Any]) -> None:
        with h5py.File(test_sources_aloha.write_episode(tmp_path, index), "a") as file:
            change(file)

    def replace(file: h5py.File, name: str, **settings: Any) -> h5py.Dataset:
        del file[name]
        return file.create_dataset(name, **settings)

    def bomb(file: h5py.File) -> None:
        one = replace(file, "action", shape=(12, 14), maxshape=(None, 14), dtype="f4", chunks=(12, 14), compression=1)
        one.id.write_direct_chunk((0, 0), zeros_by(zlib.compressobj(1)))

    camera = f"observations/images/{test_sources_aloha.CAMERAS[0]}"
    pictures: dict[str, Any] = {"dtype": "u1", "chunks": (1, 480, 640, 3)}
    for index, change in enumerate(
        (
            lambda file: None,
            lambda file: replace(file, "action", shape=(2**40, 14), dtype="f4", chunks=(64, 14)),
            lambda file: replace(file, "action", shape=(2**33, 2**33), dtype="f4", chunks=(64, 14)),  # 2**66 numbers
            lambda file: replace(file, "action", shape=(12, 14), dtype="f4", chunks=(12, 14), maxshape=(None, None)),
            lambda file: replace(file, camera, shape=(10**9, 480, 640, 3), **pictures),
            lambda file: replace(file, camera, shape=(12, 480, 640, 3), **pictures).__setitem__(0, 1),
            lambda file: replace(file, camera, shape=(12, 480, 640, 3), dtype="u1"),
            bomb,
        )
    ):
        write(index, change)
    # HDF5 itself tells of the last one that it found no memory.
    assert reasons(tmp_path) == {"too_large": 2, "missing_chunks": 3, "unreadable_file": 1}


def test_tables_that_are_larger_than_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal values take no space: a million rows are a kilobyte."""
    monkeypatch.setattr(files, "MAX_BYTES", 20 * MB)
    root = write_lerobot_v21(tmp_path, lengths=(8, 7))
    columns = lerobot_columns(0, 8, 0)
    table = root / "data/chunk-000/episode_000001.parquet"
    write_table(table, {name: [values[0]] * 1_000_000 for name, values in columns.items()})
    assert table.stat().st_size < MB
    assert reasons(root) == {"too_large": 1}
    nested, values = pa.float32(), 1.0
    for _ in range(60):
        nested, values = pa.list_(nested), [values]
    pq.write_table(pa.table({"action": pa.array([values] * 7, nested)}), table)
    assert reasons(root) == {"missing_column": 1} or not reasons(root).get("unexpected_error")


def test_pages_that_unpack_to_more_than_the_footer_says(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"a": pa.array([bytes(60 * MB)], pa.large_binary())})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    told, lie = varint(column.total_uncompressed_size), varint(1000)
    lie = bytes(byte | 0x80 for byte in lie) + bytes([0x80] * (len(told) - len(lie) - 1)) + b"\0"  # as many bytes
    whole = path.read_bytes()
    assert len(whole) < MB and whole.count(told) == 2  # of the column, and of all of them
    path.write_bytes(whole.replace(told, lie))
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size == 1000
    read = (
        "import sys; from data_pipeline.sources import files, parquet_tables as tables;"
        f"files.MAX_GROWTH_BYTES = {30 * MB}; tables.read_columns(sys.argv[1], tables.open_table(sys.argv[1]), ['a'])"
    )  # in a process of its own: in this one Arrow may still have the memory of an earlier test
    done = subprocess.run([sys.executable, "-c", read, str(path)], capture_output=True, text=True, check=False)
    assert f"SourceError: too_large: {path}" in done.stderr


def varint(number: int) -> bytes:
    """As Thrift's compact protocol stores it."""
    number, out = 2 * number, bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def test_a_list_of_episodes_that_is_larger_than_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_BYTES", 20 * MB)
    root = write_lerobot_v3(tmp_path, lengths=(8,))
    write_table(root / "meta/episodes/chunk-000/file-001.parquet", {"episode_index": [0] * 4_000_000})
    with pytest.raises(UserError, match=r"\(its episode_index would take 0\.0298 GB of memory"):
        doctor(root)


def framed(data: bytes, length: int) -> bytes:
    header = struct.pack("<Q", length)
    return header + struct.pack("<I", masked_crc32c(header)) + data + struct.pack("<I", masked_crc32c(data))


def test_lengths_in_tfrecords_are_not_believed(tmp_path: Path) -> None:
    path = test_sources_rlds.write_one(tmp_path)
    (shard,) = tmp_path.rglob("*.tfrecord-*")
    shard.write_bytes(framed(b"", 2**60) + bytes(100))
    assert list(reasons(path, **RATE)) == ["truncated_file"]
    shard.write_bytes(framed(b"", 5 * 2**30)[:12])
    os.truncate(shard, 5 * 2**30 + 16)  # sparse
    assert list(reasons(path, **RATE)) == ["too_large"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000 + "]" * 100_000, "unreadable_file"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "unreadable_file"),
        ("[" + ",".join(["{}"] * 3_000_000) + "]", "too_large"),  # 9 MB of text, 700 MB of objects
        ("9" * 5000, "unreadable_file"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "unreadable_file"),
        ("", "unreadable_file"),
    ],
    ids=["lists", "sections", "objects", "digits", "pointer", "empty"],
)
def test_json_is_bounded(text: str, reason: str) -> None:
    with pytest.raises(SourceError) as caught:
        parse_json(text.encode(), "a.json")
    assert (caught.value.reason, caught.value.where) == (reason, "a.json")
    assert len(caught.value.detail) < 200


def test_a_line_without_an_end_costs_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (files, json_records):
        monkeypatch.setattr(module, "MAX_BYTES", 20 * MB)
    test_sources_video_json.write_record(tmp_path)
    with (tmp_path / "annotation/1.jsonl").open("wb") as file:
        file.write(b'{"video_path": "videos/0.mp4", "x": "')
        file.truncate(files.MAX_BYTES + 10)  # sparse
    assert reasons(tmp_path) == {"too_large": 1}


def test_endless_captions_are_cut(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(range(9)))
    (tmp_path / "a.txt").write_text("word " * 1_000_000)
    report = doctor(tmp_path)
    assert len(report.instructions[0]) == 2000
    assert report.repairs[0].sentence.startswith("The instruction has more than 2000 characters")
    (tmp_path / "a.txt").write_bytes(b"")
    os.truncate(tmp_path / "a.txt", files.MAX_BYTES + 1)
    (repair,) = doctor(tmp_path).repairs
    assert "would take 0.5 GB of memory" in repair.sentence and repair.sentence.endswith("the episode has none.")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fps": 1e308}, "fps must be a positive number of at most a million, found 1e+308"),
        ({"fps": True}, "million, found True"),
        ({"data_path": "{episode_index:0900000000d}.parquet"}, "cannot be filled in"),
        ({"video_path": "{episode_chunk.__class__}/{video_key}.mp4"}, "cannot be filled in"),
        ({"data_path": "../../{episode_index}.parquet"}, "leads out of the dataset's folder"),
    ],
)
def test_info_json_is_not_believed(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    root = write_lerobot_v21(tmp_path, lengths=(8,), **changes)
    with pytest.raises(UserError) as caught:
        doctor(root)
    assert words in str(caught.value)


def test_sentences_stay_short_whatever_they_quote(tmp_path: Path) -> None:
    root = write_lerobot_v21(tmp_path, lengths=(8,), fps="x" * 5_000_000)
    with pytest.raises(UserError) as caught:
        doctor(root)
    assert len(str(caught.value)) < 1000
    assert len(SourceError("bad_record", "a", "x" * 5_000_000).detail) < 1100


@pytest.mark.parametrize("has_pictures", [True, False], ids=["encrypted", "sound"])
def test_a_video_that_nobody_can_see(tmp_path: Path, has_pictures: bool) -> None:
    """Pictures behind a key, and an MP4 of sound alone."""
    key = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "0f" * 16, "encryption_kid": "0e" * 16}
    with av.open(str(tmp_path / "a.mp4"), "w", options=key if has_pictures else {}) as container:
        stream: Any = container.add_stream("libx264" if has_pictures else "aac", rate=10 if has_pictures else 44_100)
        if has_pictures:
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for number, picture in enumerate(numbered_frames(range(30))):
            frame: Any = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44_100, 1024 * number
            frame = av.VideoFrame.from_ndarray(picture) if has_pictures else frame
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (bad,) = doctor(tmp_path).unreadable
    assert bad.reason == ("undecodable_video" if has_pictures else "not_a_video"), bad
    assert ("encrypted" in bad.detail) == has_pictures


# --- metadata that means something else ------------------------------------------------------------------------------


def test_a_recording_that_unpacks_to_more_than_a_disk(tmp_path: Path) -> None:
    zstd = pytest.importorskip("backports.zstd")
    folder = tmp_path / "rec"
    folder.mkdir()
    (folder / "a.db3.zstd").write_bytes(zstd.compress(bytes(200 * MB)))
    metadata: dict[str, Any] = {
        "version": 5,
        "storage_identifier": "sqlite3",
        "duration": {"nanoseconds": 1},
        "starting_time": {"nanoseconds_since_epoch": 1},
        "message_count": 0,
        "topics_with_message_count": [],
        "compression_format": "zstd",
        "compression_mode": "FILE",
        "relative_file_paths": ["../../a.db3.zstd"],
    }
    (folder / "metadata.yaml").write_text(json.dumps({"rosbag2_bagfile_information": metadata}))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert reasons(tmp_path) == {"too_large": 1}
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before
    with (folder / "metadata.yaml").open("a") as file:
        file.truncate(20 * MB)
    assert reasons(tmp_path) == {"too_large": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"features.json": {"type": "x.FeaturesDict", "steps": 1, "content": {"features": [1, 2]}}},
        {"dataset_info.json": {"name": 5, "splits": 5, "fileFormat": [1]}},
        {"dataset_info.json": {"splits": [{"name": "train", "shardLengths": "x"}]}},
    ],
)
def test_metadata_of_another_shape_is_told(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = test_sources_rlds.write_one(tmp_path)
    for name, data in changes.items():
        for file in [*tmp_path.rglob(name)]:
            file.write_text(json.dumps(data))
    try:
        doctor(path, "rlds", **RATE)
    except UserError as error:
        assert "\n" not in str(error)
