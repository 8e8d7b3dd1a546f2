"""Settings, manifests and descriptions that somebody got wrong, or made to: one sentence before training, no surprise
in it."""

import json
import logging
import multiprocessing
import os
import resource
import shutil
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from configs.loader import UserError, load_config
from data_pipeline.dataset_index import DatasetIndex
from data_pipeline.datasets import Datasets
from data_pipeline.loader import Loader, LoaderConfig
from data_pipeline.reading_plan import ReadingPlanConfig
from data_pipeline.reading_plan import main as reading_plan
from data_pipeline.verify import verify
from tests.data_pipeline.tiny_dataset import tiny_dataset


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("sound") / "dataset", clips=(3, 4, 2, 3), action_free=(2,))


@pytest.fixture
def dataset(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "dataset"))


def loader(dataset, **changes):
    config = LoaderConfig(dataset=dataset, **{"global_batch_size": 4, "text_length": 4, **changes})
    return Loader(Datasets.open(config.addresses), config)


def refused(call, *args, **kwargs):
    with pytest.raises(UserError) as raised:
        call(*args, **kwargs)
    sentence = str(raised.value)
    assert "\n" not in sentence and ": :" not in sentence and sentence.endswith(".")
    return sentence


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        *(f"{name}={10**12}" for name in ("global_batch_size", "batch_multiple", "num_workers", "prefetch_factor")),
        *(f"{name}={10**12}" for name in ("announced_batches", "text_length", "shuffle.run_length")),
        f"mixture.weights={{a: {{{10**400}: 1}}}}",
        "augment.view_weights={front: 1e308, side: 1e308}",
        *(f"storage.{name}={10**12}" for name in ("cache_gb", "block_mb", "retries", "timeout_s")),
        "mixture.weights={a: 5e-324}",
        f"seed={2**63}",
        "augment.speed=[1e-300, 1]",
        "augment.speed=[1, 1e300]",
    ],
)
def test_numbers_beyond_reason(setting):
    sentence = refused(load_config, LoaderConfig, None, ["dataset=x", setting])
    assert sentence.startswith(f"command line: {setting.partition('=')[0]}") and "should be" in sentence


def test_a_budget_beyond_reason(sound):
    sentence = refused(loader, sound, latent_cells_per_batch=10**12)
    assert "latent_cells_per_batch=1000000000000 makes batches of 31250000000 clips of 16x16x5" in sentence
    assert f"set it to at most {32 * 2**20}." in sentence
    loader(sound, latent_cells_per_batch=32 * 2**20)  # on paper: nothing is read


def test_weights_that_are_all_zero():
    sentence = refused(load_config, LoaderConfig, None, ["dataset=x", "mixture.weights={a: 0}"])
    assert sentence == "command line: mixture.weights are all zero at step 0; give at least one a positive weight."


@pytest.mark.parametrize(
    ("speed", "words"), [(2, "set loader.crop_frames to at most 5, or the speed"), (100, "; set the speed")]
)
def test_a_speed_that_no_clip_has_room_for(tmp_path, speed, words):
    folder = tiny_dataset(tmp_path / "dataset", clips=(2,), num_frames=13)
    settings = {"reads": "video", "crop_frames": 9, "augment": {"speed": [1, speed]}}
    sentence = refused(loader, folder, **settings)
    assert words in sentence and sentence.endswith("the speed to at most 1.5.")
    settings["augment"] = {"speed": [1, 1.5]}
    loader(folder, **settings)


@pytest.mark.parametrize(
    "changes",
    [
        {"augment": {"random_start": True}},
        {"augment": {"speed": [0.5, 2]}, "reads": "video"},
        {"augment": {"view_dropout": {"wrist": 0.5}}},
        {"latent_cells_per_batch": 10**12},
    ],
)
def test_the_reading_plan_refuses_what_training_refuses(sound, changes):
    config = LoaderConfig(dataset=sound, global_batch_size=4, **changes)
    assert refused(reading_plan, ReadingPlanConfig(loader=config)) == refused(loader, sound, **changes)


def test_a_reading_plan_ends():
    sentence = refused(load_config, ReadingPlanConfig, None, ["loader.dataset=x", f"num_batches={10**12}"])
    assert sentence.startswith("command line: num_batches is 1000000000000, but should be less than")


# --- dataset.yaml -------------------------------------------------------------------------------------------------


def describe(dataset, **entries):
    """Changes entries of dataset.yaml, named with double underscores for dots."""
    path = dataset / "dataset.yaml"
    info = yaml.safe_load(path.read_text())
    for dotted, value in entries.items():
        *sections, last = dotted.split("__")
        section = info
        for name in sections:
            section = section[name]
        section[last] = value
    path.write_text(yaml.safe_dump(info))


@pytest.mark.parametrize(
    "entry",
    ["num_frames", "actions_per_frame", "views__front__height", "codec__latent_channels", "text_encoder__width"],
)
def test_sizes_beyond_reason(dataset, entry):
    describe(dataset, **{entry: 2**40})
    sentence = refused(DatasetIndex, dataset)
    assert f"dataset.yaml: {entry.replace('__', '.')}: Input should be less than or equal to" in sentence


@pytest.mark.parametrize(("entry", "value"), [("num_frames", 9), ("views__front__width", 32)])
def test_sizes_of_other_clips(dataset, entry, value):
    describe(dataset, **{entry: value})
    assert "12 of its rows have the bucket '16x16x5', but there can be " in refused(DatasetIndex, dataset)


@pytest.mark.parametrize(("entry", "value"), [("fps", 12.0), ("control_hz", 5.0), ("actions_per_frame", 4)])
def test_rates_that_contradict_each_other(dataset, entry, value):
    describe(dataset, **{entry: value})
    sentence = refused(DatasetIndex, dataset)
    assert f"{entry}={value:g}" in sentence and "control_hz=" in sentence and "is not fps=" in sentence


@pytest.mark.parametrize("num_workers", [0, 1])
def test_rates_of_other_clips(dataset, num_workers):
    """Which no file but the samples themselves could tell."""
    describe(dataset, fps=12.0, control_hz=24.0)
    reader = loader(dataset, num_workers=num_workers, max_bad_fraction=1.0)
    sentence = refused(next, iter(reader))
    assert "None of the 4 samples" in sentence and "but dataset.yaml says (5, 12.0, 24.0)" in sentence


# --- the manifest -------------------------------------------------------------------------------------------------


def change_rows(dataset, change):
    path = dataset / "manifest.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


ROWS = {
    "a row that is there twice": (lambda rows: rows.append(rows[3]), "2 of its rows have the key 'key"),
    "one key twice": (lambda rows: rows[0].update(key=rows[1]["key"]), "2 of its rows have the key 'key"),
    "an unknown split": (
        lambda rows: [row.update(split="tarin") for row in rows[:3]],
        "3 of its rows have the split 'tarin', but there can be train and validation; restore",
    ),
    "a held-out clip in training": (lambda rows: rows[-1].update(split="train"), "of split train lies in shards/valid"),
    "another bucket": (
        lambda rows: rows[0].update(bucket="8x8x5"),
        "1 of its rows have the bucket '8x8x5', but there can be 16x16x5",
    ),
    "a shard elsewhere": (
        lambda rows: rows[0].update(shard="shards/train/000000.tar"),
        "of split train lies in shards/train/000000.tar",
    ),
    "an unknown robot": (
        lambda rows: next(row for row in rows if row["has_actions"]).update(embodiment="leg"),
        "has has_actions=True and the embodiment 'leg', but dataset.yaml describes arm",
    ),
    "actions of no robot": (
        lambda rows: next(row for row in rows if not row["has_actions"]).update(has_actions=True),
        "has has_actions=True and the embodiment empty, but",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_contradict_each_other(dataset, name):
    change, message = ROWS[name]
    change_rows(dataset, change)
    sentence = refused(loader, dataset)
    assert sentence.startswith(f"{dataset}/manifest.parquet: ") and message in sentence
    assert verify(dataset) and sentence not in verify(dataset)  # which lists all of them, row by row


def test_text_that_is_none(dataset):
    path = dataset / "manifest.parquet"
    table = pq.read_table(path)
    raw = pa.array([key.encode() + b"\xff" for key in table["key"].to_pylist()])
    text = pa.StringArray.from_buffers(len(raw), *raw.buffers()[1:])
    pq.write_table(table.set_column(table.schema.get_field_index("key"), "key", text), path)
    assert "manifest.parquet: is missing or damaged (" in refused(loader, dataset)


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("count", 0, "arm.proprio.count: Input should be greater than 0"),
        ("std", [1.0, 0.0], "dimension 1 cannot have a std of 0 between"),
        ("std", [1.0, -1.0], "dimension 1 cannot have a std of -1 between"),
        ("max", [1e39, 1.0], "between 0 and 1e+39"),
        ("max", [-7.0, 1.0], "between 0 and -7"),
    ],
)
def test_statistics_that_cannot_be(dataset, what, value, message):
    path = dataset / "norm_stats.json"
    stats = json.loads(path.read_text())
    stats["embodiments"]["arm"]["proprio"][what] = value
    path.write_text(json.dumps(stats))
    sentence = refused(loader, dataset)
    assert "norm_stats.json: embodiments.arm.proprio" in sentence and message in sentence


def test_one_dataset_under_two_names(dataset, sound):
    sentence = refused(loader, {"one": sound, "other": dataset})
    assert sentence.startswith("loader: dataset.one and dataset.other hold the same samples; ")


# --- damaged samples ----------------------------------------------------------------------------------------------


def test_a_damaged_sample_is_told_once(dataset, caplog):
    caplog.set_level(logging.WARNING)
    for shard in dataset.glob("shards/train/*/*.tar"):
        shard.write_bytes(shard.read_bytes()[:-4096])
    reader = loader(dataset, global_batch_size=1)
    with pytest.raises(UserError) as raised:
        list(reader)
    assert str(raised.value).count("sample key") == 1 and not caplog.records
    reader = loader(dataset, global_batch_size=8, max_bad_fraction=1e-4)
    sentence = refused(list, reader)
    assert sentence.count("sample key") == 1 and sentence.startswith(f"{len(caplog.records) + 1} of the ")


# --- files that wait or unfold ------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["dataset.yaml", "norm_stats.json", "manifest.parquet"])
def test_a_pipe_is_not_waited_for(dataset, name):
    (dataset / name).unlink()
    os.mkfifo(dataset / name)
    assert f"/{name}: " in refused(loader, dataset)


@pytest.mark.timeout(60)
def test_a_shard_may_be_a_pipe(dataset):
    for shard in dataset.glob("shards/train/*/*.tar"):
        shard.unlink()
        os.mkfifo(shard)
    assert "the shard cannot be read (Illegal seek)" in refused(next, iter(loader(dataset)))


def test_a_description_that_unfolds(dataset):
    """Nine lines that stand for a billion words."""
    lines = ["l0: &l0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 9)]
    path = dataset / "dataset.yaml"
    path.write_text(path.read_text().replace("build:\n", "build:\n" + "".join(f"  {line}\n" for line in lines)))
    assert "dataset.yaml: cannot be read (it unfolds to more than 1000000 values)" in refused(loader, dataset)


@pytest.mark.timeout(60)
def test_a_member_of_less_than_no_bytes(dataset):
    index = DatasetIndex(dataset)
    row = index.row(int(index.indices("train")[0]))
    with (dataset / row["shard"]).open("r+b") as shard:
        shard.seek(row["offset"])
        header = bytearray(shard.read(512))
        header[124:135] = b"-0000002000"  # two blocks back, in octal
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        shard.seek(row["offset"])
        shard.write(header)
    assert "has a damaged member header" in refused(index.read_sample, int(index.indices("train")[0]))


# --- what the machine refuses -------------------------------------------------------------------------------------


def read_with(dataset, soft, hard):
    """The limits are those of more files than are open already."""
    num_open = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + soft, num_open + hard))
    assert sum(len(batch["keys"]) for batch in islice(loader(dataset, num_workers=2), 30)) == 120


def test_few_open_files(sound):
    """Where too few are allowed it is told, and where more may be had they are taken."""
    processes = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(1, processes) as pool:
        refusal = pool.submit(read_with, sound, 64, 64).exception()
        assert isinstance(refusal, UserError) and "raise it (`ulimit -n`), or lower the two." in str(refusal)
    with ProcessPoolExecutor(1, processes) as pool:
        pool.submit(read_with, sound, 64, 256).result()
