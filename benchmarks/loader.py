"""How fast training data is read, beside what else there is for the same shards.

    OMP_NUM_THREADS=1 python -m benchmarks.loader [--dataset PATH] [--parts latents …]

latents     samples per second: ours over a plain webdataset pipeline that makes the same tensors (unnormalised), in
            this process and with two workers
video       the same of video decoded on the fly, with latents; webdataset with our decoder, and with plain PyAV
bandwidth   bytes per second of latent samples, over the same shards read from end to end, with a cold page cache
large       `latents` and `bandwidth` once more, of samples whose latents are as large as those of a large model
mixing      how often two samples of a batch come from one shard, over a perfect shuffle, by what is read at a time
open        a manifest of a million samples: seconds, and memory
resume      from a cursor somewhere in a run to its first batch
memory      resident memory over many batches

The dataset is the demo's (`make demo`) unless another is given. Alternatives are timed in turn; medians are printed.
"""

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import webdataset
from safetensors.torch import load

from configs.loader import dump_config
from data_pipeline.dataset import DATASET_YAML, MANIFEST, MANIFEST_SCHEMA, NORM_STATS, SHARDS, bucket_name
from data_pipeline.dataset_index import DatasetIndex
from data_pipeline.datasets import Datasets
from data_pipeline.loader import Loader, LoaderConfig
from data_pipeline.reading_plan import lay_out, stream_samples
from data_pipeline.sample import array_bytes, read_array, tensor_bytes
from data_pipeline.sample_order import Cursor, ShuffleConfig
from data_pipeline.sample_plan import plan_samples
from data_pipeline.shards import ShardWriter, tar_records
from data_pipeline.video_io import ViewConfig, decode_clip

from .timing import in_turn, median_ratio, say

DEMO = Path("runs/demo/dataset")
BATCH = 32
MILLION = 1_000_000
PARTS = ["latents", "video", "bandwidth", "large", "mixing", "open", "resume", "memory"]


def our_config(dataset: Path, **settings: Any) -> LoaderConfig:
    return LoaderConfig(dataset=dataset, **{"global_batch_size": BATCH, "text_length": 16, **settings})


def ours(dataset: Path, num_batches: int, **settings: Any) -> None:
    config = our_config(dataset, **settings)
    for number, _ in enumerate(Loader(Datasets.open({"": dataset}), config), start=1):
        if number == num_batches:
            return


# --- throughput ------------------------------------------------------------------------------------------------------


def throughput(dataset: Path, reads: str, repeats: int, num_batches: int) -> None:
    say(f"{reads}: samples/s (and per processor second), {num_batches} batches of {BATCH}, page cache warm")
    settings = {"reads": "both"} if reads == "video" else {}
    decoders = DECODERS if reads == "video" else {"webdataset": None}
    for num_workers in (0, 2):
        works: dict[str, Callable[[], object]] = {
            "ours": functools.partial(ours, dataset, num_batches, num_workers=num_workers, **settings)
        }
        for name, decode in decoders.items():
            works[name] = functools.partial(plain_webdataset, dataset, num_batches, num_workers, decode)
        timings = in_turn(works, repeats)
        say(f"  {num_workers} workers   ours {_rate(timings['ours'], num_batches)}")
        for name in decoders:
            processor, wall = (median_ratio(timings[name], timings["ours"], which) for which in (0, 1))
            say(f"    {name:22} {_rate(timings[name], num_batches)}   ours / this {wall:.2f} ({processor:.2f})")


def _rate(timings: list[tuple[float, float]], num_batches: int) -> str:
    cpu, wall = (statistics.median(seconds) for seconds in zip(*timings, strict=True))
    return f"{num_batches * BATCH / wall:6.0f} ({num_batches * BATCH / cpu:.0f})"


Decoder = Callable[[bytes], np.ndarray]


def plain_webdataset(dataset: Path, num_batches: int, num_workers: int, decode: Decoder | None) -> None:
    """As its documentation has it: shards shuffled, a buffer of a thousand samples, batches made by the workers."""
    shards = sorted(str(path) for path in (dataset / "shards" / "train").rglob("*.tar"))
    view = next(iter(DatasetIndex(dataset).views))
    pipeline = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), nodesplitter=None, workersplitter=_no_split, seed=0)
        .shuffle(1000)
        .map(functools.partial(_tensors, view=view, decode=decode))
        .batched(BATCH, collation_fn=_collate, partial=False)
        .repeat()
    )
    for number, _ in enumerate(webdataset.WebLoader(pipeline, batch_size=None, num_workers=num_workers), start=1):
        if number == num_batches:
            return


def _no_split(shards: Any) -> Any:
    """Every worker reads all shards: with fewer shards than workers some would have none."""
    return shards


def _tensors(members: dict[str, bytes], *, view: str, decode: Decoder | None) -> dict[str, Any]:
    sample: dict[str, Any] = {"keys": members["__key__"], "meta": json.loads(members["meta.json"])}
    sample["latents"] = load(members[f"{view}.latents.safetensors"])["latents"].float()
    if "actions.npy" in members:
        sample["actions"] = torch.from_numpy(_read_array(members["actions.npy"]))
        sample["proprio"] = torch.from_numpy(_read_array(members["proprio.npy"])[0])
    if "text.safetensors" in members:
        sample["text_tokens"] = load(members["text.safetensors"])["text"].float()
    if decode is not None:
        sample["video"] = torch.from_numpy(decode(members[f"{view}.mp4"]))
    return sample


def _decode_by_pyav(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


DECODERS: dict[str, Decoder | None] = {"webdataset": decode_clip, "webdataset with PyAV": _decode_by_pyav}


def _read_array(data: bytes) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(data))


def _collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = {"keys": [sample["keys"] for sample in samples]}
    for name in ("latents", "video"):
        if name in samples[0]:
            batch[name] = torch.stack([sample[name] for sample in samples])
    for name in ("actions", "proprio", "text_tokens"):
        batch[name] = [sample.get(name) for sample in samples]
    return batch


# --- bandwidth -------------------------------------------------------------------------------------------------------


def bandwidth(dataset: Path, repeats: int) -> None:
    """An epoch, with a cold cache: of whole shards on one side, of whole samples in our order on the other."""
    shards = sorted((dataset / "shards" / "train").rglob("*.tar"))
    total_mb = sum(path.stat().st_size for path in shards) / 1e6
    say(f"bandwidth: {total_mb:.0f} MB of shards, page cache dropped before each reading")
    index = DatasetIndex(dataset)
    config = our_config(dataset)
    num_batches = len(index.indices("train")) // BATCH
    works: dict[str, Callable[[], object]] = {"sequential": functools.partial(_read_through, shards)}
    for num_workers in (0, 2):
        works[f"ours, {num_workers} workers"] = functools.partial(ours, dataset, num_batches, num_workers=num_workers)
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            _drop_cache(shards)
            start = time.perf_counter()
            work()
            rates[name].append(total_mb / (time.perf_counter() - start))
    base = rates["sequential"][1:]
    for name, values in rates.items():
        share = statistics.median(rate / raw for rate, raw in zip(values[1:], base, strict=True))
        say(f"  {name:18} {statistics.median(values[1:]):7.0f} MB/s   {share:5.0%} of reading from end to end")
    say(f"  ({config.shuffle.window_shards} shards in a window, reads of {config.shuffle.run_length} neighbours)")


def _read_through(shards: list[Path]) -> None:
    buffer = bytearray(8 * 2**20)
    for path in shards:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _drop_cache(shards: list[Path]) -> None:
    for path in shards:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- large samples ---------------------------------------------------------------------------------------------------


LARGE_VIEW, LARGE_FRAMES, LARGE_SHAPE = ViewConfig(height=480, width=832), 17, (5, 16, 60, 104)
"""A second at 480p, and its latents by Wan 2.1's codec."""


@contextlib.contextmanager
def large_samples(dataset: Path, num_samples: int = 640) -> Iterator[Path]:
    """The dataset's training samples with noise of another shape as latents, and twice the actions."""
    index = DatasetIndex(dataset)
    view, generator = next(iter(index.views)), torch.Generator().manual_seed(0)
    bucket = bucket_name(LARGE_VIEW, LARGE_FRAMES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "large"
        shutil.copytree(dataset, folder, ignore=shutil.ignore_patterns("shards", MANIFEST))
        rows = []
        with ShardWriter(folder, f"{SHARDS}/train/{bucket}", 256 * 2**20) as writer:
            for i in index.indices("train")[:num_samples]:
                latents = torch.randn(LARGE_SHAPE, generator=generator).bfloat16()
                location = writer.add(tar_records(_enlarged(index.read_sample(i), view, latents)))
                rows.append(index.row(i) | location.manifest_columns() | {"bucket": bucket})
        pq.write_table(pa.Table.from_pylist(rows, MANIFEST_SCHEMA), folder / MANIFEST)
        codec = index.info.codec.model_copy(update={"latent_channels": LARGE_SHAPE[1], "spatial_stride": 8})
        changes = {"codec": codec, "views": {view: LARGE_VIEW}, "num_frames": LARGE_FRAMES}
        (folder / DATASET_YAML).write_text(dump_config(index.info.model_copy(update=changes)))
        stats = index.norm_stats | {"latents": {name: [1.0] * LARGE_SHAPE[1] for name in index.norm_stats["latents"]}}
        (folder / NORM_STATS).write_text(json.dumps(stats))
        yield folder


def _enlarged(members: dict[str, Any], view: str, latents: torch.Tensor) -> dict[str, Any]:
    meta = json.loads(members["meta.json"])
    meta |= {"num_frames": LARGE_FRAMES, "action_spans": [[2 * n for n in span] for span in meta["action_spans"]]}
    control = {
        name: array_bytes(np.tile(read_array(members[name]), (2, 1)))
        for name in ("actions.npy", "proprio.npy")
        if name in members
    }
    changed = {"meta.json": json.dumps(meta).encode(), f"{view}.latents.safetensors": tensor_bytes("latents", latents)}
    return members | control | changed


# --- mixing ----------------------------------------------------------------------------------------------------------


def mixing(dataset: Path) -> None:
    say("mixing: pairs of samples in a batch that come from one shard, over those in a perfect shuffle")
    with a_million_samples(dataset) as big:
        datasets = Datasets.open({"": big})
        for window_shards in (4, 16, 64):
            for run_length in (1, 8):
                shuffle = ShuffleConfig(window_shards=window_shards, run_length=run_length)
                plan = plan_samples(datasets, our_config(big, shuffle=shuffle, global_batch_size=256))
                assert plan is not None
                found = lay_out(plan.order, stream_samples(datasets, plan), window_shards, 1, num_batches=1000).mixing
                say(
                    f"  {window_shards:2} shards in a window, runs of {run_length}: {found.same_shard:7.2%}, "
                    f"perfect {found.same_shard_if_perfect:.2%}"
                )


# --- opening ---------------------------------------------------------------------------------------------------------


def opening(dataset: Path, repeats: int) -> None:
    say("open: a manifest of a million samples, from `import` on, in a process of its own")
    with a_million_samples(dataset) as big:
        context = multiprocessing.get_context("spawn")
        measured = []
        for _ in range(repeats):
            with context.Pool(1) as pool:
                measured.append(pool.apply(_open_job, (big,)))
    seconds, first_batch, megabytes = (statistics.median(column) for column in zip(*measured, strict=True))
    say(f"  opened in {seconds:.2f} s (target 1), the order and its first batch {first_batch:.2f} s more")
    say(f"  {megabytes:.0f} MB more memory at most (target 300)")


def _open_job(dataset: Path) -> tuple[float, float, float]:
    before = _memory_mb("VmRSS")
    start = time.perf_counter()
    index = DatasetIndex(dataset)
    seconds = time.perf_counter() - start
    loader = Loader(Datasets({"": index}), our_config(dataset))
    loader.order.draw(Cursor())
    return seconds, time.perf_counter() - start - seconds, _memory_mb("VmHWM") - before


@contextlib.contextmanager
def a_million_samples(dataset: Path) -> Iterator[Path]:
    """The dataset's description over its manifest repeated under new keys and shards; no shard is there."""
    rows = DatasetIndex(dataset).manifest
    copies = -(-MILLION // len(rows))
    tables = []
    for copy in range(copies):
        prefix = pa.scalar(f"{copy:06d}-")
        key = pc.binary_join_element_wise(prefix, rows["key"], "")
        shard = pc.binary_join_element_wise(rows["shard"].cast(pa.string()), pa.scalar(f"{copy:06d}"), ".")
        tables.append(rows.set_column(0, "key", key).set_column(1, "shard", shard.dictionary_encode()))
    with tempfile.TemporaryDirectory() as folder:
        big = Path(folder) / "million"
        shutil.copytree(dataset, big, ignore=shutil.ignore_patterns("shards", MANIFEST))
        table = pa.concat_tables(table.cast(MANIFEST_SCHEMA) for table in tables).slice(0, MILLION)
        pq.write_table(table.unify_dictionaries(), big / MANIFEST)
        yield big


def _memory_mb(which: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{which}:")[1].split()[0]) * 1024 / 1e6


# --- resuming and memory ---------------------------------------------------------------------------------------------


def resume(dataset: Path, repeats: int) -> None:
    say("resume: from a cursor to its first batch, in a process that has everything imported (target 2 s)")
    index = DatasetIndex(dataset)
    samples = len(index.indices("train"))
    for epochs in (0, 3.5, 1000.5):
        cursor = Loader(Datasets({"": index}), our_config(dataset)).order.cursor_at(int(epochs * samples / BATCH))
        for num_workers in (0, 2):
            seconds = []
            for _ in range(repeats):
                start = time.perf_counter()
                config = our_config(dataset, num_workers=num_workers)
                next(iter(Loader(Datasets.open({"": dataset}), config, cursor=cursor)))
                seconds.append(time.perf_counter() - start)
            say(f"  after {epochs:g} epochs, {num_workers} workers: {statistics.median(seconds):.2f} s")


def memory(dataset: Path, num_batches: int) -> None:
    say(f"memory: of this process, over {num_batches} batches of 1")
    config = our_config(dataset, global_batch_size=1)
    marks = {num_batches // 10 * tenth for tenth in range(1, 11)}
    for number, _ in enumerate(Loader(Datasets.open({"": dataset}), config), start=1):
        if number in marks:
            say(f"  batch {number:7}: {_memory_mb('VmRSS'):6.0f} MB")
        if number == num_batches:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, default=DEMO)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=150, help="per timing of latents; a fifth of others")
    parser.add_argument("--memory-batches", type=int, default=100_000)
    options = parser.parse_args()
    for reads, num_batches in (("latents", options.batches), ("video", options.batches // 5)):
        if reads in options.parts:
            throughput(options.dataset, reads, options.repeats, num_batches)
    if "bandwidth" in options.parts:
        bandwidth(options.dataset, options.repeats)
    if "large" in options.parts:
        with large_samples(options.dataset) as large:
            throughput(large, "latents", options.repeats, options.batches // 5)
            bandwidth(large, options.repeats)
    if "mixing" in options.parts:
        mixing(options.dataset)
    if "open" in options.parts:
        opening(options.dataset, options.repeats)
    if "resume" in options.parts:
        resume(options.dataset, options.repeats)
    if "memory" in options.parts:
        memory(options.dataset, options.memory_batches)


if __name__ == "__main__":
    main()
