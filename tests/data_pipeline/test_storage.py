"""A dataset behind a URL: the same batches as from the folder, whatever the server does; a cache that never lies."""

import multiprocessing
import os
import pickle
import random
import re
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.spec import AbstractBufferedFile
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.loader import StrictConfig, UserError, dump_config, load_config, run_command
from data_pipeline import storage
from data_pipeline.dataset_index import DatasetIndex
from data_pipeline.datasets import Datasets
from data_pipeline.disk_cache import _ROOM, CHUNK, DiskCache
from data_pipeline.loader import Loader, LoaderConfig
from data_pipeline.shards import ShardError
from data_pipeline.storage import Address, StorageConfig, open_files
from data_pipeline.verify import VerifyConfig, main, verify
from pretrain.metrics import read_metrics
from pretrain.train import PretrainConfig, resume_run
from pretrain.train import main as train
from tests.data_pipeline.range_server import FAILURES, serving
from tests.data_pipeline.tiny_dataset import tiny_dataset

BLOCK = 1 << 17


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """360 samples in shards of 1 MB."""
    return tiny_dataset(tmp_path_factory.mktemp("remote") / "dataset", clips=(60,) * 6, max_shard_mb=1)


@pytest.fixture
def server(folder):
    with serving(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.005)


@pytest.fixture
def config(tmp_path):
    return StorageConfig(cache_dir=tmp_path / "cache", block_mb=BLOCK / 2**20, timeout_s=5)


def changed(config, **changes):
    return StorageConfig(**{**config.model_dump(), **changes})


def batches(address, config=None, number=4, **changes):
    settings = {"global_batch_size": 64, "text_length": 4, "check_sha256": True, **changes}
    loader = Loader(Datasets({"": DatasetIndex(address, config)}), LoaderConfig(dataset=address, **settings))
    return list(islice(loader, number)), loader


def assert_same(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others, strict=True):
        assert one.keys() == other.keys() and one["keys"] == other["keys"]
        assert all(torch.equal(one[name], other[name]) for name in one if name != "keys")


def blocks(config):
    return sorted(path for path in (config.cache_dir / "blocks").rglob("*") if path.is_file())


def shard_requests(server):
    return sum(number for path, number in server.requests.items() if path.endswith(".tar"))


# --- the same as from the folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_the_folder(folder, server, config, num_workers):
    expected, _ = batches(folder)
    found, loader = batches(server.address, config, num_workers=num_workers)
    assert_same(found, expected)
    assert loader.traffic["requests"] and not loader.traffic["retries"] and not loader.bad_samples
    assert DatasetIndex(server.address, config).digest == DatasetIndex(folder).digest  # so a run may go on from either
    size = sum(shard.stat().st_size for shard in folder.rglob("train/*/*.tar"))
    assert shard_requests(server) <= size / BLOCK + len(list(folder.rglob("*.tar")))  # each block once, for all workers
    before = shard_requests(server)
    assert_same(batches(server.address, config, num_workers=num_workers)[0], expected)
    assert shard_requests(server) == before  # the second run has them


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_server_that_fails_every_third_request_changes_nothing(folder, server, config, num_workers):
    server.fail_every = 3
    found, loader = batches(server.address, changed(config, timeout_s=1), num_workers=num_workers)
    assert_same(found, batches(folder)[0])
    assert loader.traffic["retries"] and not loader.bad_samples
    assert set(server.failed) == set(FAILURES)


def test_neighbours_cost_one_request(folder, server, config):
    index = DatasetIndex(server.address, config)
    shard = index.row(0)["shard"]
    rows = [i for i in range(len(index)) if index.row(i)["shard"] == shard]
    neighbours = [i for i in rows if index.row(i)["offset"] + index.row(i)["bytes"] <= BLOCK]
    assert len(neighbours) > 5
    for i in neighbours:
        index.read_sample(i, check_sha256=True)
    assert shard_requests(server) == 1


def test_a_spawned_process_opens_connections_of_its_own(server, config):
    files = open_files(server.address, config)
    name = "dataset.yaml"
    expected = files.read(name, 0, files.size(name))
    there = pickle.loads(pickle.dumps(files))
    assert there.read(name, 0, there.size(name)) == expected


def test_memory_and_other_clients_without_an_event_loop(folder, config):
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/dataset", recursive=True)
    try:
        assert_same(batches("memory://dataset", config, 1)[0], batches(folder, number=1)[0])
    finally:
        memory.rm("/dataset", recursive=True)


class OpenedFile(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        self.fs.asked.append((start, end))
        return bytes(end - start)


class ClientOfFiles(fsspec.AbstractFileSystem):
    """Reads through open files, as that of the Hugging Face hub does."""

    cachable = False

    def __init__(self):
        super().__init__()
        self.asked = []

    def info(self, path):
        return {"name": path, "size": 10 * BLOCK, "type": "file"}

    def _open(self, path, mode, **options):
        options.pop("cache_options")
        return OpenedFile(self, path, mode, size=10 * BLOCK, **options)


def test_nothing_is_read_ahead(config, monkeypatch):
    client = ClientOfFiles()
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: (client, url))
    assert open_files("hf://datasets/me/set", config).read("a.tar", BLOCK + 5, 10) == bytes(10)
    assert client.asked == [(BLOCK, 2 * BLOCK)]


@pytest.fixture
def s3_server(server, monkeypatch):
    """What the real client takes for S3; a folder of the server's is a bucket."""
    s3fs = pytest.importorskip("s3fs")
    for name, value in {"ENDPOINT_URL": server.address, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield server
    s3fs.S3FileSystem.clear_instance_cache()  # it would remember this server


def test_s3(folder, s3_server, config):
    s3_server.folder = folder.parent
    found, loader = batches("s3://dataset/", config, 2, num_workers=1)
    assert_same(found, batches(folder, number=2)[0])
    assert loader.traffic["requests"]


def test_verify_reads_remote_datasets_too(folder, server, config, tmp_path):
    assert verify(server.address, config, decode=False) == []
    server.folder = shutil.copytree(folder, tmp_path / "damaged")
    shards = sorted(server.folder.glob("shards/train/*/*.tar"))
    shards[0].unlink()
    flip(shards[1])
    problems = verify(server.address, config, decode=False)
    assert problems == verify(server.folder, decode=False)
    assert any("is missing, and with it" in one for one in problems)
    assert any("its bytes differ from its checksum" in one for one in problems)


# --- damage -------------------------------------------------------------------------------------------------------


def cut(shard):
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def flip(shard):
    data = bytearray(shard.read_bytes())
    data[data.index(b"\x93NUMPY") + 130] ^= 1
    shard.write_bytes(data)


DAMAGES = {"truncated_shard": cut, "missing_shard": os.unlink, "wrong_checksum": flip}


@pytest.mark.parametrize("reason", DAMAGES)
def test_damage_there_is_refused_or_replaced_as_here(folder, server, config, tmp_path, reason):
    server.folder = shutil.copytree(folder, tmp_path / "damaged")
    DAMAGES[reason](sorted(server.folder.glob("shards/train/*/*.tar"))[1])
    expected, local = batches(server.folder, max_bad_fraction=1.0)
    found, remote = batches(server.address, config, max_bad_fraction=1.0)
    assert_same(found, expected)
    assert remote.bad_samples == local.bad_samples and set(remote.bad_samples) == {reason}
    pattern = rf"^{server.address}/shards/train/.*\.tar: sample .*`python -m data_pipeline\.verify {server.address}`"
    with pytest.raises(UserError, match=pattern):
        batches(server.address, config)


def test_a_server_that_stays_away_makes_samples_unreadable(folder, server, config):
    index = DatasetIndex(server.address, changed(config, retries=2))
    index.take_traffic()
    server.status = 503
    with pytest.raises(UserError, match=r"cannot be read \(ClientResponseError: 503"):
        index.read_sample(0)
    assert index.take_traffic() == Counter(requests=3, retries=2)
    server.status = 200
    assert index.read_sample(0)["__key__"] == index.key(0)


def test_a_server_without_ranges_is_not_taken_for_one(folder, server, config):
    server.has_ranges = False
    index = DatasetIndex(server.address, config)
    index.take_traffic()
    with pytest.raises(UserError, match=r"\d+ bytes came instead of \d+"):
        index.read_sample(0)
    assert index.take_traffic() == Counter(requests=2)  # what it is, and one part: whole files are not asked for again


# --- the cache ----------------------------------------------------------------------------------------------------


def used(config):
    return sum(path.stat().st_size for path in config.cache_dir.rglob("*") if path.is_file())


def small(config):
    """Room for the description of the dataset and a few blocks."""
    return changed(config, cache_gb=12 * BLOCK / 2**30)


def read_all(address, config, order, failed):
    try:
        index = DatasetIndex(address, config)
        for i in order:
            index.read_sample(i, check_sha256=True)
            with index.files._cache._locked(_ROOM):  # or blocks would be counted that go while others come
                assert used(config) <= config.cache_gb * 2**30
    except BaseException as error:
        failed.put(repr(error))
        raise


def test_two_processes_share_a_cache_that_stays_small(folder, server, config):
    config = small(config)
    context = multiprocessing.get_context("fork")
    failed = context.Queue()
    numbers = range(0, 360, 3)
    readers = [
        context.Process(target=read_all, args=(server.address, config, order, failed))
        for order in (numbers, numbers[::-1])
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert [reader.exitcode for reader in readers] == [0, 0], failed.get(timeout=1)
    assert blocks(config) and used(config) <= config.cache_gb * 2**30


def test_of_those_that_want_a_block_one_fetches_it(server, config):
    index = DatasetIndex(server.address, config)
    server.delay_s = 0.3  # so that all of them ask before the first has it
    context = multiprocessing.get_context("fork")
    readers = [context.Process(target=index.read_sample, args=(0,)) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert [reader.exitcode for reader in readers] == [0] * 4 and shard_requests(server) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_blocks_are_fetched_again(folder, server, config, damage):
    expected, _ = batches(server.address, config, 2)
    kept = blocks(config)
    for block in kept:
        data = bytearray(block.read_bytes())
        for place in range(100, len(data), CHUNK):
            data[place] ^= 1
        block.write_bytes({"cut": data[: len(data) // 2], "flipped": data, "empty": b""}[damage])
    before = shard_requests(server)
    assert_same(batches(server.address, config, 2)[0], expected)
    assert shard_requests(server) == before + len(kept)
    assert_same(batches(server.address, config, 2)[0], expected)
    assert shard_requests(server) == before + len(kept)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_range_is_that_of_the_file(tmp_path_factory, data):
    content = random.Random(0).randbytes(5 * CHUNK + 17)
    fsspec.filesystem("memory").pipe("/ranges/a", content)
    block_mb = data.draw(st.sampled_from([1000, CHUNK, CHUNK + 1, 8 * CHUNK])) / 2**20
    files = open_files("memory://ranges", StorageConfig(cache_dir=tmp_path_factory.mktemp("ranges"), block_mb=block_mb))
    for _ in range(8):
        begin, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        assert files.read("a", begin, end - begin) == content[begin:end]
    with pytest.raises(ShardError, match=f"ends at byte {len(content)}, but this sample should reach to byte"):
        files.read("a", len(content), 1)


def test_a_cache_smaller_than_the_shuffle_is_told(server, folder, config, caplog):
    remote = Datasets.open({"": server.address}, small(config))
    remote.warn_of_small_cache(1)
    Datasets.open({"": folder}).warn_of_small_cache(16)
    assert not caplog.records
    remote.warn_of_small_cache(16)
    assert "much will be fetched several times" in caplog.text


def test_damaged_descriptions_are_fetched_again(server, config):
    DatasetIndex(server.address, config)
    (manifest,) = config.cache_dir.rglob("files/manifest.parquet")
    manifest.write_bytes(manifest.read_bytes()[:-100])
    assert DatasetIndex(server.address, config).manifest.num_rows == 360


@pytest.mark.parametrize("has_versions", [True, False])
def test_a_dataset_that_was_built_again_is_read_again(tmp_path, config, has_versions):
    """The files of both have the same names and sizes, and other samples in them."""
    first = tiny_dataset(tmp_path / "first", clips=(9, 9), sources=("one", "one"))
    second = tiny_dataset(tmp_path / "second", clips=(9, 9), sources=("two", "two"))
    sizes = [{path.name: path.stat().st_size for path in one.rglob("*.tar")} for one in (first, second)]
    assert sizes[0] == sizes[1]
    with serving(first) as server:
        server.has_versions = has_versions
        address = server.address
        assert_same(
            batches(address, config, 1, global_batch_size=8)[0], batches(first, number=1, global_batch_size=8)[0]
        )
        server.folder = second
        opened = DatasetIndex(address, config)
        assert opened.row(0)["source"] == "two"
        for i in range(len(opened)):
            assert opened.read_sample(i, check_sha256=True) == DatasetIndex(second).read_sample(i)


def test_what_is_open_stays(server, config):
    """Another dataset's blocks do not push out the description of one that is being read."""
    config = small(config)
    index = DatasetIndex(server.address, config)
    for i in range(0, 360, 3):
        index.read_sample(i)
    assert index.codec().weight_hash == index.info.codec.weight_hash
    cache = DiskCache(config.cache_dir, round(config.cache_gb * 2**30))
    group = index.path.parent
    assert not cache.make_room(cache.max_bytes) and group.is_dir()
    del index
    assert cache.make_room(cache.max_bytes) and not group.exists()


class Blocks:
    """Blocks of a size for each key, as bytes that tell their key."""

    SIZES = (1, 100, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7)

    @staticmethod
    def key(number):
        return f"{number:064x}"

    @classmethod
    def block(cls, number):
        return bytes([number]) * cls.SIZES[number % len(cls.SIZES)]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 11), st.floats(0, 1), st.floats(0, 1)), max_size=20))
def test_a_cache_gives_what_it_was_given_or_nothing(tmp_path_factory, steps):
    cache = DiskCache(tmp_path_factory.mktemp("blocks"), 6 * CHUNK)
    for is_write, number, one, other in steps:
        block = Blocks.block(number)
        if is_write:
            cache.write(Blocks.key(number), block)
        begin, end = sorted((round(one * len(block)), round(other * len(block))))
        found = cache.read(Blocks.key(number), len(block), begin, end)
        assert found == block[begin:end] or (found is None and not is_write)
        assert sum(path.stat().st_size for path in cache.folder.rglob("*/*/*")) <= cache.max_bytes


def test_what_was_used_longest_ago_goes_first(tmp_path):
    cache = DiskCache(tmp_path, 10 * 1004)
    for number in range(9):
        cache.write(Blocks.key(number), bytes(1000))
        os.utime(cache._block(Blocks.key(number)), ns=(number, number))
    assert cache.read(Blocks.key(0), 1000, 0, 1) == b"\0"  # used now
    cache.write(Blocks.key(9), bytes(1000))
    cache.write(Blocks.key(10), bytes(1000))
    there = [number for number in range(11) if cache.read(Blocks.key(number), 1000, 0, 1) is not None]
    assert {0, 9, 10} <= set(there) and 1 not in there and len(there) >= 8


# --- addresses and errors -----------------------------------------------------------------------------------------


class AddressConfig(StrictConfig):
    dataset: Address


def test_an_address_is_a_path_or_a_url(tmp_path):
    for url in ("s3://bucket/x", "hf://datasets/me/x@main/y", "https://host:80/a b", "memory://x"):
        config = load_config(AddressConfig, None, [f"dataset={url}"])
        assert config.dataset == url and isinstance(config.dataset, str)
        (tmp_path / "run.yaml").write_text(dump_config(config))
        assert load_config(AddressConfig, tmp_path / "run.yaml") == config
    path = load_config(AddressConfig, None, ["dataset=~/runs/demo"]).dataset
    assert path == Path.home() / "runs/demo"
    assert load_config(AddressConfig, None, ["dataset=s3://bucket/x/"]).dataset == "s3://bucket/x"
    assert load_config(AddressConfig, None, ["dataset=s3://"]).dataset == Path("s3:")  # no such folder


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        run_command(main, VerifyConfig, description="", positional="dataset", argv=list(arguments))
    assert ended.value.code == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("error: ") and sentence.count("\n") == 1
    return sentence


@pytest.fixture
def arguments(config):
    return [f"storage.cache_dir={config.cache_dir}", "storage.retries=1"]


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (404, r"holds no dataset\.yaml, or there is no such bucket or folder; give the address"),
        (403, r"403.*; check the address"),
        (503, r"503.*; check the address, and whether this machine reaches it"),
    ],
)
def test_answers_that_end_a_command(server, arguments, capsys, status, sentence):
    server.status = status
    told = refusal(capsys, server.address, *arguments)
    assert server.address in told
    assert re.search(sentence, told)


def test_nobody_answers(folder, arguments, capsys):
    with serving(folder) as server:
        address = server.address
    assert "Cannot connect to host" in refusal(capsys, address, *arguments)


def test_protocols_and_packages(config, arguments, capsys, monkeypatch):
    told = refusal(capsys, "ftp://host/x", *arguments)
    assert "ftp:// is not known; give a local folder, or one of s3://, gs://, hf://, http://, https://" in told

    def lacks_its_package(url):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr("fsspec.core.url_to_fs", lacks_its_package)
    assert "`pip install gcsfs`" in refusal(capsys, "gs://bucket/x", *arguments)


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("HTTP://host/x", "write http://host/x"),
        ("s3:/bucket/x", "write s3://bucket/x"),
        ("https:///x", "write https://x"),
        ("gs://", "write gs://HOST/FOLDER"),
    ],
)
def test_what_was_meant_as_an_address(arguments, capsys, address, hint):
    told = refusal(capsys, address, *arguments)
    assert f"is neither a folder nor an address; {hint}, or give a local folder." in told


def test_s3_errors(s3_server, arguments, capsys):
    s3_server.status = 403
    assert "check the address and the credentials (AWS_ACCESS_KEY_ID" in refusal(capsys, "s3://bucket/x", *arguments)
    s3_server.status = 404
    assert "holds no dataset.yaml" in refusal(capsys, "s3://bucket/y", *arguments)


def test_a_cache_that_is_too_small_or_cannot_be(server, config, arguments, tmp_path, capsys):
    with pytest.raises(ValueError, match="holds less than four blocks"):
        changed(config, cache_gb=3 * BLOCK / 2**30)
    tight = [*arguments, f"storage.cache_gb={4096 / 2**30}", f"storage.block_mb={1024 / 2**20}"]
    assert "leaves no room for; raise it" in refusal(capsys, server.address, *tight)
    (tmp_path / "file").write_text("")
    told = refusal(capsys, server.address, f"storage.cache_dir={tmp_path / 'file'}")
    assert "set storage.cache_dir to a folder on a local disk" in told


def test_a_full_disk_costs_speed_only(server, config, monkeypatch, caplog):
    index = DatasetIndex(server.address, config)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiskCache, "write", refuse)
    assert index.read_sample(0, check_sha256=True)["__key__"] == index.key(0)
    assert "No space left on device" in caplog.text


def test_what_is_kept_but_cannot_be_read_costs_speed_only(server, config, monkeypatch, tmp_path):
    index = DatasetIndex(server.address, config)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(DiskCache, "_block", lambda cache, key: tmp_path / "file" / key)  # "Not a directory"
    assert index.read_sample(0, check_sha256=True)["__key__"] == index.key(0)


def test_a_disk_too_full_for_the_descriptions(server, arguments, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiskCache, "put", refuse)
    told = refusal(capsys, server.address, *arguments)
    assert "No space left on device, so remote data cannot be kept there; set storage.cache_dir" in told


# --- training -----------------------------------------------------------------------------------------------------


def run_config(run_dir, dataset, **loader):
    video = {"patch_size": [1, 2, 2], "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 6}
    video |= {"out_channels": 6, "text_dim": 8, "freq_dim": 16, "ffn_dim": 32, "num_layers": 1}
    return PretrainConfig.model_validate(
        {
            "run_dir": run_dir,
            "num_steps": 3,
            "log_every": 1,
            "validation_batches": 1,
            "model": {"prediction": "data", "predict_residual": True, "video": video},
            "loader": {"dataset": dataset, "global_batch_size": 32, "text_length": 4, **loader},
            "engine": {"kind": "accelerate", "device": "cpu", "precision": "fp32"},  # of all tests in a process
        }
    )


def run(*args, **loader):
    config = run_config(*args, **loader)
    assert train(config) == 0
    return [row for row in read_metrics(config.run_dir / "metrics.jsonl") if row["split"] == "train"]


def test_training_from_a_url(folder, server, config, tmp_path):
    server.folder = shutil.copytree(folder, tmp_path / "damaged")
    flip(sorted(server.folder.glob("shards/train/*/*.tar"))[0])
    tolerant = {"check_sha256": True, "max_bad_fraction": 1.0}
    expected = run(tmp_path / "local", server.folder, **tolerant)
    server.fail_every = 3
    settings = changed(config, timeout_s=1).model_dump(mode="json")
    found = run(tmp_path / "remote", server.address, storage=settings, num_workers=1, **tolerant)
    assert [row["loss"] for row in found] == [row["loss"] for row in expected]
    assert found[-1]["storage/retries"] > 0 and found[-1]["storage/requests"] > found[-1]["storage/retries"]
    assert "storage/requests" not in expected[-1]
    bad = "bad_samples/wrong_checksum"
    assert found[-1][bad] == expected[-1][bad] > 0
    resume_run(run_config(tmp_path / "local", server.address, storage=settings, **tolerant))  # it may go on from there
    exported = tmp_path / "remote/export"
    assert {"codec", "text_encoder", "dataset.yaml", "norm_stats.json"} <= {path.name for path in exported.iterdir()}
