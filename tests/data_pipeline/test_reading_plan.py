"""What ranks would read, on paper, is what they read; and how well it is mixed is measured right."""

import itertools
import json
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.loader import UserError, load_config, run_command
from data_pipeline.dataset_index import DatasetIndex
from data_pipeline.datasets import Datasets
from data_pipeline.loader import Loader, LoaderConfig
from data_pipeline.mixing_quality import MixingQuality, share_of_equal_pairs
from data_pipeline.reading_plan import OTHER_SETTINGS, ReadingPlanConfig, StreamSamples, lay_out, main
from data_pipeline.sample_order import Cursor, GlobalBatch, SampleOrder, ShuffleConfig, Stream
from data_pipeline.video_io import ViewConfig
from finetune.train import FinetuneConfig
from pretrain.train import PretrainConfig
from tests.data_pipeline.tiny_dataset import tiny_dataset

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    sources = ("robot", "robot", "people_a", "people_b", "toys", "toys")
    return {
        "short": tiny_dataset(folder / "short", (9, 7, 8, 9, 6, 9), sources=sources),
        "long": tiny_dataset(
            folder / "long", (5, 4, 6), first_episode=50, views={"front": ViewConfig(height=24, width=16)}, num_frames=9
        ),
    }


def config_of(folders, **changes):
    mixture = {"weights": {"long/*": 2, "played": 1, "robot": 1}, "tags": {"played": ["toys", "people_*"]}}
    settings = {"latent_cells_per_batch": 72 * 8, "batch_multiple": 4, "mixture": mixture, "text_length": 4}
    return LoaderConfig(dataset=folders, **settings, **changes)


def plan_of(loader, capsys, **changes):
    main(ReadingPlanConfig(loader=loader, json=True, **changes))
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_plan_is_what_ranks_read(folders, capsys, tmp_path, num_ranks):
    loader = config_of(folders)
    plan = plan_of(loader, capsys, num_ranks=num_ranks)
    datasets = Datasets.open(folders)
    size_of = {row["key"]: row["bytes"] for index in datasets.by_name.values() for row in index.manifest.to_pylist()}
    megabytes, drawn = [], Counter()
    for rank in range(num_ranks):
        reader = Loader(datasets, loader, rank, num_ranks)
        batches = list(islice(reader, plan["num_batches"]))
        megabytes.append(sum(size_of[key] for batch in batches for key in batch["keys"]) / 1e6)
        drawn.update("long" if key >= "key050" else "short" for batch in batches for key in batch["keys"])
        assert sum(len(batch["keys"]) for batch in batches) == plan["rank"]["samples"]
    found = plan["rank"]
    assert [found[f"megabytes_{what}"] for what in ("min", "mean", "max")] == pytest.approx(
        [min(megabytes), np.mean(megabytes), max(megabytes)]
    )
    streams = {one["name"]: one for one in plan["streams"]}
    assert streams.keys() == {"long/*/long", "played/short", "robot/short"}
    assert streams["long/*/long"]["drawn"] == drawn["long"]
    assert streams["played/short"]["drawn"] + streams["robot/short"]["drawn"] == drawn["short"]
    assert reader.epochs() == pytest.approx({name.rpartition("/")[0]: one["epochs"] for name, one in streams.items()})
    assert all(one["epochs"] >= 1 and 0 < one["tail"] <= one["samples"] for one in plan["streams"])
    assert max(one["steps_per_epoch"] for one in plan["streams"]) == plan["num_batches"]
    sizes = {one["bucket"]: (one["samples_per_batch"], one["samples_per_batch_and_rank"]) for one in plan["buckets"]}
    assert sizes == {"16x16x5": (16, 16 // num_ranks), "24x16x9": (8, 8 // num_ranks)}


def test_no_shard_is_touched(folders, capsys, tmp_path):
    moved = {name: shutil.copytree(folder, tmp_path / name) for name, folder in folders.items()}
    for folder in moved.values():
        shutil.rmtree(folder / "shards")
    assert plan_of(config_of(moved), capsys) == plan_of(config_of(folders), capsys)


def test_as_a_table(folders, capsys):
    main(ReadingPlanConfig(loader=config_of(folders), num_ranks=4))
    text = capsys.readouterr().out
    for what in (
        "long/*/long",
        "played/short",
        "24x16x9",
        "4 rank(s)",
        "same episode if perfect",
        "Read from at a time",
    ):
        assert what in text


def test_ranks_that_do_not_fit(folders):
    with pytest.raises(UserError, match=r"by 3 ranks; set loader\.batch_multiple to a multiple of 3"):
        main(ReadingPlanConfig(loader=config_of(folders), num_ranks=3))


def test_the_config_of_any_training_run_will_do():
    paths = [path for path in CONFIGS.glob("*/*.yaml") if "\nloader:" in path.read_text()]
    assert {path.parent.name for path in paths} == {"pretrain", "finetune"}
    for path in paths:
        assert load_config(ReadingPlanConfig, path, ["num_ranks=512"]).num_ranks == 512


def test_what_is_no_setting_of_a_training_run_is_refused(folders, capsys):
    of_training = {name for config in (PretrainConfig, FinetuneConfig) for name in config.model_fields}
    assert of_training - {"loader"} == OTHER_SETTINGS
    with pytest.raises(SystemExit) as stopped:
        argv = [f"loader.dataset={folders['short']}", "num_rank=4"]
        run_command(main, ReadingPlanConfig, description="", argv=argv)
    assert stopped.value.code == 2 and 'did you mean "num_ranks"' in capsys.readouterr().err


@pytest.mark.slow
def test_512_ranks_over_ten_million_samples():
    sizes = np.full(5000, 2048)
    total = int(sizes.sum())
    order = SampleOrder([Stream("all/a", "all", "a", sizes)], {"all": 1.0}, {"a": 512 * 16}, 0, ShuffleConfig())
    random = np.random.default_rng(0)
    num_bytes = random.integers(100_000, 200_000, total)
    samples = StreamSamples(num_bytes, np.repeat(np.arange(5000), sizes), random.permutation(total) // 50)
    plan = lay_out(order, [samples], window_shards=16, num_ranks=512)
    (stream,) = plan.streams
    assert plan.num_batches == stream.steps_per_epoch == total / (512 * 16) and stream.epochs == 1.0
    assert plan.rank.samples == total / 512
    # every sample once: their sizes are random, and what all ranks read adds up to all of them
    assert plan.rank.megabytes_mean * 512 == pytest.approx(num_bytes.sum() / 1e6, rel=1e-12)
    assert plan.rank.megabytes_max < 1.02 * plan.rank.megabytes_min
    assert plan.megabytes_in_windows == pytest.approx(16 / 5000 * num_bytes.sum() / 1e6)
    # 16 of 5000 shards at a time; episodes lie anywhere, as `build` packs them
    assert plan.mixing.same_shard == pytest.approx(1 / 16, rel=0.2)
    assert plan.mixing.same_shard_if_perfect == pytest.approx(1 / 5000, rel=0.01)
    assert plan.mixing.same_episode == pytest.approx(plan.mixing.same_episode_if_perfect, rel=0.05)


# --- quality of mixing --------------------------------------------------------------------------------------------


def test_pairs():
    assert share_of_equal_pairs(np.array([3, 3, 3])) == 1.0
    assert share_of_equal_pairs(np.array([1, 1, 2, 3])) == pytest.approx(1 / 6)
    assert share_of_equal_pairs(np.array([5])) == 0.0


LABELS = st.lists(st.integers(0, 2), min_size=1, max_size=4)


@given(LABELS, LABELS, st.data())
def test_a_perfect_shuffle_is_the_mean_over_all_draws(one, other, data):
    counts = [data.draw(st.integers(0, len(labels))) for labels in (one, other)]
    if not sum(counts):
        return
    quality = MixingQuality([np.array(one), np.array(other)])
    draws = [
        list(itertools.combinations(range(len(labels)), c)) for labels, c in zip((one, other), counts, strict=True)
    ]
    stream = np.repeat([0, 1], counts)
    for mine in draws[0]:
        for theirs in draws[1]:
            quality.add(GlobalBatch("a", stream, np.array([*mine, *theirs], dtype=np.int64)))
    assert quality.measured() == pytest.approx(quality.of_perfect_shuffle(), abs=1e-12)


def mixing(**shuffle):
    """Of shards of 50, in which the ten samples of an episode lie together."""
    order = SampleOrder(
        [Stream("s/a", "s", "a", np.full(64, 50))], {"s": 1.0}, {"a": 40}, 0, ShuffleConfig(**shuffle)
    )  # fmt: skip
    by_shard, by_episode = (MixingQuality([np.arange(3200) // size]) for size in (50, 10))
    cursor = Cursor()
    for _ in range(80):
        batch, cursor = order.draw(cursor)
        by_shard.add(batch)
        by_episode.add(batch)
    return by_shard, by_episode


def test_a_wider_window_mixes_better_and_longer_runs_worse():
    shares = {window: mixing(window_shards=window)[0].measured() for window in (1, 4, 16, 64)}
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert shares[1] > 0.7 and shares[16] == pytest.approx(1 / 16, rel=0.2)
    whole, by_episode = mixing(window_shards=64)
    assert whole.measured() == pytest.approx(whole.of_perfect_shuffle(), rel=0.1)
    assert by_episode.measured() == pytest.approx(by_episode.of_perfect_shuffle(), rel=0.25)
    assert mixing(window_shards=64, run_length=5)[1].measured() > 5 * by_episode.of_perfect_shuffle()


def test_a_single_folder(folders, capsys):
    plan = plan_of(LoaderConfig(dataset=folders["short"], global_batch_size=8), capsys, num_batches=3)
    index = DatasetIndex(folders["short"])
    assert plan["num_batches"] == 3 and plan["streams"][0]["name"] == "all"
    assert plan["streams"][0]["samples"] == len(index.indices("train"))
    assert plan["streams"][0]["steps_per_epoch"] is None and plan["streams"][0]["tail"] is None
