"""Shards are plain tars whose bytes follow from their samples, and any sample is one ranged read."""

import errno
import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import example, given
from hypothesis import strategies as st

from configs.problems import explain_refusal
from data_pipeline.shards import (
    ShardError,
    ShardReader,
    ShardWriter,
    TarWriter,
    _sum,
    index_path,
    parse_index,
    read_records,
    tar_records,
    write_atomic,
)

suffixes = st.sampled_from(["a.mp4", "meta.json", "text.safetensors", "wrist.latents.safetensors", "actions.npy"])
samples = st.dictionaries(suffixes, st.binary(min_size=1, max_size=1500), min_size=1)


def some_samples(number: int) -> list[dict]:
    return [
        {"__key__": f"key{i:02d}", "meta.json": b"%d" % i, "a.mp4": bytes([i]) * (100 * i + 1)} for i in range(number)
    ]


def write(folder, number=7, max_bytes=8000):
    writer = ShardWriter(folder, "shards/train/1x1x1", max_bytes)
    locations = [writer.add(tar_records(sample)) for sample in some_samples(number)]
    writer.close()
    return locations


@given(samples, st.from_regex(r"[A-Za-z0-9_-]{1,40}", fullmatch=True))
def test_records_are_a_tar_and_read_back(members, key):
    records = tar_records({"__key__": key, **members})
    assert read_records(records) == {"__key__": key, **dict(sorted(members.items()))}
    with tarfile.open(fileobj=io.BytesIO(records + bytes(1024))) as tar:
        assert {info.name: tar.extractfile(info).read() for info in tar} == {
            f"{key}.{s}": d for s, d in members.items()
        }
        assert all((info.mtime, info.uid, info.gid, info.uname) == (0, 0, 0, "") for info in tar)


@given(samples, st.data())
def test_damaged_records_are_noticed_or_only_differ_in_data(members, data):
    """A flipped bit in a header is an error; in a member's data, the checksum's business."""
    records = bytearray(tar_records({"__key__": "k", **members}))
    position = data.draw(st.integers(0, len(records) - 1))
    records[position] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = read_records(bytes(records))
    except ShardError:
        return
    assert found.keys() == {"__key__", *members}


@given(st.binary(max_size=256))
@example(b"\xff" * 256)
def test_bytes_are_added_up_exactly(part):
    assert _sum(part) == sum(part)


def test_every_sample_is_one_ranged_read(tmp_path):
    locations = write(tmp_path)
    assert len({location.shard for location in locations}) > 1
    reader = ShardReader(tmp_path, max_open=1)  # also: more shards than open files
    for sample, location in zip(some_samples(7), locations, strict=True):
        assert read_records(reader.read(location.shard, location.offset, location.num_bytes)) == dict(
            sorted(sample.items())
        )
    reader.close()


def test_the_index_holds_starts_and_the_end(tmp_path):
    locations = write(tmp_path, max_bytes=10**6)
    index = parse_index(index_path(tmp_path / locations[0].shard).read_bytes())
    assert index.dtype == np.dtype("<u8")
    assert index.tolist() == [location.offset for location in locations] + [
        locations[-1].offset + locations[-1].num_bytes
    ]


def test_webdataset_reads_them(tmp_path):
    write(tmp_path)
    shards = [str(path) for path in sorted(tmp_path.rglob("*.tar"))]
    read = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [(sample["__key__"], sample["meta.json"], sample["a.mp4"]) for sample in read] == [
        (sample["__key__"], sample["meta.json"], sample["a.mp4"]) for sample in some_samples(7)
    ]


def test_the_same_samples_give_the_same_bytes(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "two")
    files = [sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in ("one", "two")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_a_sample_larger_than_a_shard_has_its_own(tmp_path):
    locations = write(tmp_path, number=3, max_bytes=1)
    assert [location.offset for location in locations] == [0, 0, 0]


def test_an_interrupted_shard_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), TarWriter(tmp_path / "000000.tar") as writer:
        writer.add(tar_records(some_samples(2)[1]))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


class FullDisk(io.FileIO):
    """Takes so many bytes, and then none."""

    room = 1500

    def write(self, data):
        if self.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_a_full_disk_is_named_and_nothing_half_is_left(tmp_path, monkeypatch):
    records = tar_records(some_samples(2)[1])  # more than fit
    write_atomic(tmp_path / "a.json", b"old")
    before = sorted(path.name for path in tmp_path.iterdir())
    for buffering in (0, 2**20):  # the disk is found to be full by writing, or only when the file is closed

        def open_on_it(path, mode, buffering=buffering):
            file = FullDisk(path, mode)
            return io.BufferedWriter(file, buffering) if buffering else file

        monkeypatch.setattr(Path, "open", open_on_it)
        for write_it in (
            lambda: write_atomic(tmp_path / "a.json", bytes(2000)),
            lambda: one_shard(TarWriter(tmp_path / "b.tar"), records),
            lambda: one_shard(ShardWriter(tmp_path, "shards", 10**6), records),
        ):
            with pytest.raises(OSError) as caught:
                write_it()
            sentence = explain_refusal(caught.value)
            assert re.fullmatch(
                rf"{tmp_path}/\S+: No space left on device; free some space there and start the same command again\.",
                sentence,
            )
        monkeypatch.undo()
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != "shards") == before
        assert list((tmp_path / "shards").iterdir()) == []
    assert (tmp_path / "a.json").read_bytes() == b"old"


def one_shard(writer, records):
    with writer:
        writer.add(records)
        writer.add(records)


def test_a_half_shard_and_a_missing_one_say_so(tmp_path):
    last = write(tmp_path, max_bytes=10**6)[-1]
    path = tmp_path / last.shard
    path.write_bytes(path.read_bytes()[: last.offset + 100])
    with pytest.raises(ShardError, match=f"ends at byte {last.offset + 100}, but this sample should reach to byte"):
        ShardReader(tmp_path).read(last.shard, last.offset, last.num_bytes)
    with pytest.raises(ShardError, match="cannot be opened"):
        ShardReader(tmp_path).read("shards/gone.tar", 0, 1)
    with pytest.raises(ShardError, match="ends at byte"):  # and takes no memory for what is promised
        ShardReader(tmp_path).read(last.shard, 512, 1 << 60)
    with pytest.raises(ShardError, match="ends at byte"):
        ShardReader(tmp_path).read(last.shard, 1 << 60, 512)
    with pytest.raises(ShardError, match="cannot be read"):
        ShardReader(tmp_path).read(".", 0, 1)  # a folder opens, and only then refuses to be read


def test_an_atomic_file_replaces_the_old_one(tmp_path):
    for text in (b"old", b"new"):
        write_atomic(tmp_path / "deep" / "file", text)
    assert [path.read_bytes() for path in (tmp_path / "deep").iterdir()] == [b"new"]
