"""What the HDF5 formats share. The formats themselves have test files of their own."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.sources import SourceError
from data_pipeline.sources.base import stable_id
from data_pipeline.sources.files import find_files
from data_pipeline.sources.hdf5 import (
    HDF5_SUFFIXES,
    Hdf5Images,
    find_all,
    find_object,
    image_footage,
    open_hdf5,
    read_json,
    read_rows,
    read_text,
    relative_parts,
    rows_sha256,
    usable_frames,
)
from data_pipeline.video_index import VideoError
from tests.data_pipeline.recordings import numbered_frames, read_numbers


def encoded(frames: np.ndarray, form: str = "JPEG") -> list[np.ndarray]:
    """Each frame as the bytes of a picture file."""
    found = []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, form, quality=95)
        found.append(np.frombuffer(buffer.getvalue(), dtype=np.uint8))
    return found


def padded(rows: list[np.ndarray]) -> np.ndarray:
    longest = max(len(row) for row in rows)
    return np.stack([np.pad(row, (0, longest - len(row))) for row in rows])


def write_variable(file: h5py.File, name: str, rows: list[np.ndarray]) -> None:
    dataset = file.create_dataset(name, (len(rows),), dtype=h5py.vlen_dtype(np.uint8))
    for i, row in enumerate(rows):
        dataset[i] = row


FRAMES = numbered_frames(range(9))
WAYS: dict[str, Callable[[h5py.File], Any]] = {
    "plain": lambda file: file.create_dataset("images", data=FRAMES),
    "one chunk per frame": lambda file: file.create_dataset("images", data=FRAMES, chunks=(1, 48, 64, 3)),
    "compressed chunks of many": lambda file: file.create_dataset(
        "images", data=FRAMES, chunks=(4, 48, 64, 3), compression="gzip"
    ),
    "channels first": lambda file: file.create_dataset("images", data=FRAMES.transpose(0, 3, 1, 2)),
    "float 0..1": lambda file: file.create_dataset("images", data=FRAMES.astype(np.float32) / 255),
    "float64 0..255": lambda file: file.create_dataset("images", data=FRAMES.astype(np.float64)),
    "float channels first": lambda file: file.create_dataset(
        "images", data=FRAMES.transpose(0, 3, 1, 2).astype(np.float32) / 255
    ),
    "padded jpeg": lambda file: file.create_dataset("images", data=padded(encoded(FRAMES))),
    "padded png": lambda file: file.create_dataset("images", data=padded(encoded(FRAMES, "PNG"))),
    "variable jpeg": lambda file: write_variable(file, "images", encoded(FRAMES)),
    "fixed bytes": lambda file: file.create_dataset(
        "images", data=np.array([row.tobytes() for row in encoded(FRAMES, "PNG")])
    ),
    "bytes objects": lambda file: file.create_dataset(
        "images", data=[row.tobytes().hex() for row in encoded(FRAMES, "PNG")]
    ),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.hdf5"


def footage_of(path: Path, write: Callable[[h5py.File], object], **settings: Any) -> Hdf5Images | None:
    with h5py.File(path, "w") as file:
        write(file)
    with open_hdf5(path) as file:
        return image_footage(file["images"], 10.0, **settings)


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [way for way in WAYS if way != "bytes objects"])
def test_every_way_to_store_frames_gives_the_same_frames(path: Path, way: str) -> None:
    footage = footage_of(path, WAYS[way])
    assert footage is not None
    assert footage.num_frames == 9
    info = footage.info()
    assert (info.height, info.width, info.fps) == (48, 64, 10.0)
    assert pickle.loads(pickle.dumps(footage)) == footage  # it travels between processes
    frames = footage.read([3, 0, 8, 8, 4, 5])
    assert frames.dtype == np.uint8
    assert frames.flags["C_CONTIGUOUS"]
    assert read_numbers(frames) == [3, 0, 8, 8, 4, 5]
    if "jpeg" not in way:
        np.testing.assert_array_equal(frames, FRAMES[[3, 0, 8, 8, 4, 5]])


def test_the_codec_is_what_the_file_holds(path: Path) -> None:
    for way, codec in {"plain": "uint8 array", "float 0..1": "float32 array", "padded jpeg": "jpeg"}.items():
        footage = footage_of(path, WAYS[way])
        assert footage is not None
        assert footage.info().codec == codec


@settings(max_examples=30)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=20))
def test_any_positions_are_the_brute_force_ones(tmp_path_factory: pytest.TempPathFactory, wanted: list[int]) -> None:
    path = tmp_path_factory.mktemp("any") / "a.hdf5"
    footage = footage_of(path, WAYS["compressed chunks of many"])
    assert footage is not None
    np.testing.assert_array_equal(footage.read(wanted), FRAMES[wanted])


def test_pictures_can_be_turned_and_their_colours_exchanged(path: Path) -> None:
    colourful = FRAMES.copy()
    colourful[..., 0] = 7
    footage = footage_of(
        path, lambda file: file.create_dataset("images", data=colourful), flip=True, swap_red_blue=True
    )
    assert footage is not None
    np.testing.assert_array_equal(footage.read([2]), colourful[[2]][:, ::-1, :, ::-1])


def test_a_frame_outside_is_said(path: Path) -> None:
    footage = footage_of(path, WAYS["plain"])
    assert footage is not None
    for wanted in ([9], [-1], []):
        with pytest.raises(VideoError) as caught:
            footage.read(wanted)
        assert caught.value.reason == "out_of_range"


@pytest.mark.parametrize(
    "data",
    [
        np.zeros((5, 48, 64, 1), np.float32),  # depth
        np.zeros((5, 48, 64), np.uint8),
        np.zeros((5, 14), np.uint8),  # bytes that are no picture
        np.zeros((0, 48, 64, 3), np.uint8),
        np.zeros((5, 48, 64, 3), np.int64),
        np.zeros((5, 2, 20_000, 3), np.uint8),
        np.float32(3),
        np.array([b"no picture", b"at all"]),
        WAYS["bytes objects"],
    ],
    ids=lambda data: "bytes objects" if callable(data) else f"{data.dtype}{list(data.shape)}",
)
def test_other_arrays_are_no_pictures(path: Path, data: Any) -> None:
    write = data if callable(data) else (lambda file: file.create_dataset("images", data=data))
    assert footage_of(path, write) is None


def test_a_damaged_picture_costs_only_itself(path: Path) -> None:
    rows = encoded(FRAMES)
    rows[4] = rows[4][: len(rows[4]) // 3]
    rows[6] = np.frombuffer(b"\xff\xd8\xff no jpeg at all", dtype=np.uint8)
    footage = footage_of(path, lambda file: file.create_dataset("images", data=padded(rows)))
    assert footage is not None
    assert read_numbers(footage.read([3, 5, 7])) == [3, 5, 7]
    for broken in (4, 6):
        with pytest.raises(VideoError, match=f"frame {broken}") as caught:
            footage.read([3, broken])
        assert caught.value.reason == "undecodable_video"


def test_pictures_of_different_sizes_are_refused(path: Path) -> None:
    rows = [*encoded(FRAMES[:2]), *encoded(numbered_frames([2], 24, 32))]
    footage = footage_of(path, lambda file: write_variable(file, "images", rows))
    assert footage is not None
    with pytest.raises(VideoError, match="different sizes"):
        footage.read([0, 2])


def test_damaged_chunks_are_refused_frame_by_frame(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (8, 48, 64, 3), dtype=np.uint8)
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("images", data=noise, chunks=(2, 48, 64, 3), compression="gzip", fletcher32=True)
        offset = dataset.id.get_chunk_info(2).byte_offset
    data = bytearray(path.read_bytes())
    data[offset + 100 : offset + 200] = bytes(100)
    path.write_bytes(bytes(data))
    with open_hdf5(path) as file:
        footage = image_footage(file["images"], 10.0)
    assert footage is not None
    np.testing.assert_array_equal(footage.read([0, 3, 6]), noise[[0, 3, 6]])
    with pytest.raises(VideoError) as caught:
        footage.read([4])
    assert caught.value.reason == "undecodable_video"


def test_a_file_written_anew_is_read_anew(path: Path) -> None:
    footage = footage_of(path, WAYS["plain"])
    assert footage is not None
    assert read_numbers(footage.read([1])) == [1]
    path.unlink()
    with pytest.raises(VideoError) as caught:
        footage.read([1])
    assert caught.value.reason == "missing_video"
    footage_of(path, lambda file: file.create_dataset("images", data=numbered_frames(range(100, 107))))
    assert read_numbers(footage.read([1])) == [101]


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    whole = tmp_path / "whole.hdf5"
    with h5py.File(whole, "w") as file:
        file["action"] = np.zeros((1000, 14))
    contents = {
        "empty": (b"", "unreadable_file", "empty"),
        "text": (b"no hdf5 at all\n", "unreadable_file", "text file"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "unreadable_file", "git lfs pull"),
        "other": (b"PK\x03\x04" + bytes(300), "unreadable_file", "not an HDF5 file"),
        "short": (whole.read_bytes()[:5000], "truncated_file", "end is missing"),
        "damaged": (whole.read_bytes()[:8] + b"\xff" * 4000, "unreadable_file", "damaged"),
    }
    for name, (data, reason, words) in contents.items():
        path = tmp_path / f"{name}.hdf5"
        path.write_bytes(data)
        with pytest.raises(SourceError, match=words) as caught, open_hdf5(path):
            pass
        assert (caught.value.reason, caught.value.where) == (reason, str(path))
    for path, reason in ((tmp_path / "absent.hdf5", "missing_file"), (tmp_path, "not_a_file")):
        with pytest.raises(SourceError) as caught, open_hdf5(path):
            pass
        assert caught.value.reason == reason


def test_links_to_other_files_are_never_followed(tmp_path: Path, path: Path) -> None:
    other = tmp_path / "secret.hdf5"
    with h5py.File(other, "w") as file:
        file["action"] = np.ones((3, 2))
    (tmp_path / "raw.bin").write_bytes(bytes(48))
    with h5py.File(path, "w") as file:
        file["action"] = np.zeros((3, 2))
        file["external"] = h5py.ExternalLink("secret.hdf5", "/action")
        file["folder"] = h5py.ExternalLink("secret.hdf5", "/")
        file["soft_out"] = h5py.SoftLink("/folder/action")
        file["soft_in"] = h5py.SoftLink("/action")
        file["dangling"] = h5py.SoftLink("/nowhere")
        file["loop"] = h5py.SoftLink("/loop")
        layout = h5py.VirtualLayout((3, 2), dtype=np.float64)
        layout[:] = h5py.VirtualSource(other, "action", shape=(3, 2))
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("raw", (3, 2), dtype=np.float64, external=[("raw.bin", 0, 48)])
    with open_hdf5(path) as file:
        for name in ("external", "folder/action", "soft_out", "virtual", "raw"):
            with pytest.raises(SourceError) as caught:
                find_object(file, name)
            assert caught.value.reason == "outside_folder"
        assert read_rows(file, ["soft_in"], []).tolist() == np.zeros((3, 2)).tolist()
        for name in ("dangling", "loop", "nothing", "action/deeper"):
            assert find_object(file, name) is None


def test_a_picture_never_comes_from_another_file(tmp_path: Path, path: Path) -> None:
    footage = footage_of(path, WAYS["plain"])
    assert footage is not None
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["images"] = FRAMES
    path.unlink()
    with h5py.File(path, "w") as file:
        file["images"] = h5py.ExternalLink("other.hdf5", "/images")
    with pytest.raises(VideoError, match="link to another file"):
        footage.read([0])


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_stand_side_by_side_and_bad_ones_are_told(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["a"] = np.arange(6).reshape(3, 2)
        file["b"] = np.array([True, False, True])
        file["c"] = np.array([[[1.0], [2.0]], [[np.nan], [4.0]], [[5.0], [1e300]]])
    notes: list[str] = []
    with open_hdf5(path) as file:
        rows = read_rows(file, ["a", "b", "c"], notes)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(
        rows, np.array([[0, 1, 1, 1, 2], [2, 3, 0, np.nan, 4], [4, 5, 1, 5, np.inf]], np.float32)
    )
    assert notes == ["2 of the 3 rows of a, b, c hold NaN or infinity: they are invalid."]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("absent", None, "no dataset"),
        ("text", np.array([b"a", b"b"]), "not numbers"),
        ("scalar", np.float32(1), "no rows"),
        ("empty", np.zeros((0, 3)), "no rows"),
        ("pickles", [np.array([1, 2]), np.array([3])], "not numbers"),
    ],
)
def test_what_is_no_table_of_numbers_is_refused(path: Path, name: str, data: Any, words: str) -> None:
    with h5py.File(path, "w") as file:
        if isinstance(data, list):
            write_variable(file, name, data)
        elif data is not None:
            file[name] = data
    with open_hdf5(path) as file, pytest.raises(SourceError, match=words) as caught:
        read_rows(file, [name], [])
    assert caught.value.reason == "bad_record"


def test_a_promise_of_too_many_rows_is_refused(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("action", (10**9, 14), dtype="f4", chunks=(1000, 14))  # a few kB on disk
    with open_hdf5(path) as file, pytest.raises(SourceError, match="too_large"):
        read_rows(file, ["action"], [])


def test_rows_must_be_as_many(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["a"], file["b"] = np.zeros((3, 2)), np.zeros((4, 2))
    with open_hdf5(path) as file, pytest.raises(SourceError, match="a has 3, b has 4"):
        read_rows(file, ["a", "b"], [])


def test_texts_are_read_however_they_are_stored(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["text"] = " open\n the  drawer "
        file.attrs["bytes"] = np.bytes_(b"open the drawer")
        file.attrs["array"] = np.array(["open the drawer"], dtype=h5py.string_dtype())
        file.attrs["number"], file.attrs["blank"] = 3, "  "
        file.attrs["json"], file.attrs["list"], file.attrs["broken"] = '{"a": 1}', "[1]", '{"a": '
    with open_hdf5(path) as file:
        assert [read_text(file.attrs, name) for name in ("text", "bytes", "array")] == ["open the drawer"] * 3
        assert [read_text(file.attrs, name) for name in ("number", "blank", "absent")] == [None] * 3
        assert [read_json(file.attrs, name) for name in ("json", "list", "broken", "absent")] == [{"a": 1}, {}, {}, {}]
        assert find_all(file) == {}


def test_a_digest_follows_the_values_only(path: Path) -> None:
    def digest(write: Callable[[h5py.File], object]) -> bytes:
        footage_of(path, write)
        with open_hdf5(path) as file:
            return rows_sha256(file["images"])

    assert digest(WAYS["plain"]) == digest(WAYS["compressed chunks of many"]) != digest(WAYS["channels first"])
    assert digest(WAYS["variable jpeg"]) != digest(lambda file: write_variable(file, "images", encoded(FRAMES[:8])))


@given(st.integers(1, 1000), st.integers(0, 30))
def test_frames_and_rows_must_fit(rows: int, missing: int) -> None:
    notes: list[str] = []
    lengths = {"rows": rows + missing, "frames": rows}
    if missing > max(2, round(0.02 * (rows + missing))):
        with pytest.raises(SourceError, match="do not fit"):
            usable_frames(lengths, "a", notes)
    else:
        assert usable_frames(lengths, "a", notes) == rows
        assert len(notes) == (missing > 0)


# --- ids -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(min_size=1), min_size=1, max_size=4))
def test_an_id_is_safe_and_stable(parts: list[str]) -> None:
    found = stable_id(*parts)
    assert set(found) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
    assert found == stable_id(*parts)
    assert found != stable_id(*parts, "more")


def test_files_are_found_in_order_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.hdf5", "a/c.h5", "a/b.HDF5", ".hidden/d.hdf5", "a/.e.hdf5", "a/f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [relative_parts(path, tmp_path) for path in find_files(tmp_path, HDF5_SUFFIXES)]
    assert found == [("b",), ("a", "b"), ("a", "c")]
    assert [relative_parts(path, tmp_path / "b.hdf5") for path in find_files(tmp_path / "b.hdf5", HDF5_SUFFIXES)] == [
        ("b",)
    ]
    assert list(find_files(tmp_path / "a" / "f.txt", HDF5_SUFFIXES)) == []
