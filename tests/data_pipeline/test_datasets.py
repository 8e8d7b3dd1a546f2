"""Several datasets read as one: what has to agree is refused in one sentence, what may differ is merged."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from configs.loader import UserError
from data_pipeline.dataset import MANIFEST_SCHEMA, DatasetFolder
from data_pipeline.dataset_index import DatasetIndex
from data_pipeline.datasets import Datasets
from data_pipeline.loader import Loader, LoaderConfig
from data_pipeline.model_inputs import InputConfig
from data_pipeline.normalize import StreamingStats, merge_stats
from data_pipeline.sample_order import Cursor
from tests.data_pipeline.tiny_dataset import ROBOT, tiny_dataset

DUCK = ROBOT.model_copy(update={"name": "duck", "proprio_names": ("x", "y", "z")})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two of the same robot, one of another robot and of longer clips."""
    folder = tmp_path_factory.mktemp("datasets")
    return {
        "lab": tiny_dataset(folder / "lab", (3, 4, 2)),
        "barn": tiny_dataset(folder / "barn", (5, 2), first_episode=20),
        "pond": tiny_dataset(folder / "pond", (3, 3), first_episode=40, robot=DUCK, num_frames=9),
    }


@pytest.fixture
def changed(folders, tmp_path):
    """The barn, with entries of its dataset.yaml changed."""

    def change(**entries):
        copy = tmp_path / "barn"
        copy.mkdir(exist_ok=True)
        for path in folders["barn"].iterdir():
            (copy / path.name).unlink(missing_ok=True)
            (copy / path.name).symlink_to(path)
        info = yaml.safe_load((folders["barn"] / "dataset.yaml").read_text())
        for dotted, value in entries.items():
            *path, last = dotted.split("__")
            section = info
            for part in path:
                section = section[part]
            section[last] = value
        (copy / "dataset.yaml").unlink()
        (copy / "dataset.yaml").write_text(yaml.safe_dump(info))
        return copy

    return change


# --- what has to agree --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"codec__weight_hash": "f" * 64},
            r"the video codec is \w+ \w{12} in \S+lab, but \w+ ffffffffffff in \S+barn; ",
        ),
        (
            {"text_encoder__name": "t5"},
            r"the text encoder is \w+ \w{12} in \S+lab, but t5 \w{12} in \S+barn; build both ",
        ),
        (
            {"fps": 5.0, "control_hz": 10.0},
            r"fps is 10\.0 in \S+lab, but 5\.0 in \S+barn; build \S+barn again with fps=10",
        ),
        (
            {"actions_per_frame": 4, "control_hz": 40.0},
            r"actions_per_frame is 2 in \S+lab, but 4 in \S+barn; build \S+ again with act",
        ),
        (
            {"embodiments__arm__action_names": ["y", "x", "gripper"]},
            r"both \S+lab and \S+barn have the robot arm, but its action_names is \[x, y, gripper\] in the one and "
            r"\[y, x, gripper\] in the other; .* another embodiment\.name",
        ),
        ({"embodiments__arm__gripper_actions": [2]}, r"gripper_actions is \[\] in the one and \[2\]"),
    ],
)
def test_what_has_to_agree_names_both_datasets_and_values(folders, changed, entries, message):
    with pytest.raises(UserError, match=message) as raised:
        Datasets.open({"lab": folders["lab"], "barn": changed(**entries)})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "entries",
    [
        {"embodiments__arm__control_hz": 50.0},  # of the recording; clips are resampled
        {"embodiments__arm__pose_frame": "base"},  # the other does not say
        {"code_version": "other"},
    ],
)
def test_what_may_differ(folders, changed, entries):
    Datasets.open({"lab": folders["lab"], "barn": changed(**entries)})


def test_the_view_that_is_read_must_be_in_all(folders, changed):
    view = {"height": 16, "width": 16}
    other = Datasets.open({"lab": folders["lab"], "barn": changed(views={"left": view, "right": view})})
    with pytest.raises(UserError, match=r"front of \S+lab are read, but the views of \S+barn are left, right; "):
        other.inputs(InputConfig())
    more = Datasets.open({"lab": folders["lab"], "barn": changed(views={"left": view, "front": view})})
    assert (
        more.inputs(InputConfig()).config.views == more.inputs(InputConfig(views=("front",))).config.views == ("front",)
    )
    with pytest.raises(UserError, match="has no such view"):
        more.inputs(InputConfig(views=("left",)))


# --- what is merged -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 200), min_size=1, max_size=4), st.integers(0, 100))
def test_merged_statistics_are_those_of_all_rows(sizes, seed):
    random = np.random.default_rng(seed)
    parts = [random.normal(random.normal(0, 3), 1, (size, 2)).astype(np.float32) for size in sizes]
    whole, results = StreamingStats(2), []
    for rows in parts:
        whole.add(rows)
        one = StreamingStats(2)
        one.add(rows)
        results.append(one.result())
    merged, expected = merge_stats(results), whole.result()
    assert merged.keys() == expected.keys() and merged["count"] == expected["count"]
    for name in ("mean", "std", "min", "max"):
        np.testing.assert_allclose(merged[name], expected[name], rtol=1e-9, atol=1e-12)
    for rows, result in zip(parts, results, strict=True):  # what lay between the quantiles still does
        inside = (rows >= result["q01"]) & (rows <= result["q99"])
        assert ((rows >= merged["q01"]) & (rows <= merged["q99"]))[inside].all()


def test_a_robot_of_two_datasets_has_one_scale(folders):
    datasets = Datasets.open(folders)
    assert set(datasets.embodiments) == {"arm", "duck"} and (datasets.action_dim, datasets.proprio_dim) == (3, 3)
    indices = [datasets.by_name[name] for name in ("lab", "barn")]
    parts = [index.norm_stats["embodiments"]["arm"]["actions_absolute"] for index in indices]
    arm = datasets.norm_stats["embodiments"]["arm"]["actions_absolute"]
    assert arm == merge_stats(parts) != parts[0]
    assert datasets.norm_stats["embodiments"]["duck"] == datasets.by_name["pond"].norm_stats["embodiments"]["duck"]
    # every latent of a tiny clip is its number: all training clips count, the longer ones more
    numbers, weights = [], []
    for index in datasets.by_name.values():
        for i in index.indices("train"):
            numbers.append(100 * int(index.key(i)[3:6]) + int(index.key(i)[7:]))
            weights.append(index.latent_shape[0])
    mean = np.average(numbers, weights=weights)
    assert datasets.norm_stats["latents"]["mean"] == pytest.approx([mean] * 6, rel=1e-2)
    std = np.sqrt(np.average((np.array(numbers) - mean) ** 2, weights=weights))
    assert datasets.norm_stats["latents"]["std"] == pytest.approx([std] * 6, rel=1e-2)

    config = LoaderConfig(dataset=folders, global_batch_size=1, normalization="min_max", only_with_actions=True)
    reader = Loader(datasets, config)
    for batch, _ in zip(reader, range(12), strict=False):
        number = 100 * int(batch["keys"][0][3:6]) + int(batch["keys"][0][7:])
        if number < 4000:
            low, high = arm["min"][0], arm["max"][0]
            assert batch["actions"][0, 0, 0].item() == pytest.approx(2 * (number - low) / (high - low) - 1, abs=1e-5)


def test_a_single_dataset_is_what_it_is(folders):
    datasets, index = Datasets.open({"": folders["lab"]}), DatasetIndex(folders["lab"])
    assert datasets.files() == {
        name: (folders["lab"] / name).read_text() for name in ("dataset.yaml", "norm_stats.json")
    }
    assert (len(datasets), datasets.info, datasets.norm_stats) == (len(index), index.info, index.norm_stats)
    assert datasets.find(4) == ("", 4)


def test_an_export_opens_with_all_statistics(folders, tmp_path):
    datasets = Datasets.open(folders)
    for name, text in datasets.files().items():
        (tmp_path / name).write_text(text)
    for name in ("codec", "text_encoder"):
        (tmp_path / name).symlink_to(folders["lab"] / name)
    export = DatasetFolder(tmp_path)
    assert export.embodiments == datasets.embodiments and export.norm_stats == datasets.norm_stats
    for robot in ("arm", "duck"):
        np.testing.assert_array_equal(
            export.normalizer(robot, "proprio", "quantile").scale,
            datasets.normalizer(robot, "proprio", "quantile").scale,
        )
    assert export.info.counts.accepted == 9 + 7 + 6 and set(export.info.sources) == {"lab/lab", "barn/lab", "pond/lab"}
    assert export.codec().weight_hash == datasets.info.codec.weight_hash


# --- the identity of the order ------------------------------------------------------------------------------------


def config_of(folders, **changes):
    return LoaderConfig(dataset=folders, **{"global_batch_size": 4, **changes})


def test_the_digest_changes_with_samples_and_places_only(folders, tmp_path):
    lab = DatasetIndex(folders["lab"])
    assert DatasetIndex(folders["lab"]).digest == lab.digest
    same = tiny_dataset(tmp_path / "elsewhere", (3, 4, 2))
    assert DatasetIndex(same).digest == lab.digest
    others = [
        tiny_dataset(tmp_path / "more", (3, 4, 3)),
        tiny_dataset(tmp_path / "other keys", (3, 4, 2), first_episode=1),
        folders["barn"],
    ]
    assert len({lab.digest, *(DatasetIndex(other).digest for other in others)}) == 4
    for name, value in (("key", lab.key(0)[:-1] + "x"), ("offset", 512)):  # of the first sample, and nothing else
        rows = lab.manifest.to_pylist()
        rows[0][name] = value
        pq.write_table(pa.Table.from_pylist(rows, MANIFEST_SCHEMA), same / "manifest.parquet")
        assert DatasetIndex(same).digest != lab.digest


def test_a_run_does_not_go_on_in_another_order(folders, tmp_path):
    mine = {"lab": folders["lab"], "barn": folders["barn"]}
    reader = Loader(Datasets.open(mine), config_of(mine))
    next(iter(reader))
    cursor = Cursor.model_validate(json.loads(json.dumps(reader.cursor.model_dump())))
    assert cursor.step == 1
    Loader(Datasets.open(mine), config_of(mine, num_workers=2, text_length=3), 0, 2, cursor)
    moved = mine | {"barn": tiny_dataset(tmp_path / "moved", (5, 2), first_episode=20)}
    Loader(Datasets.open(moved), config_of(moved), 0, 1, cursor)

    rebuilt = mine | {"barn": tiny_dataset(tmp_path / "rebuilt", (5, 3), first_episode=20)}
    more, renamed = mine | {"pond": folders["pond"]}, {"lab": mine["lab"], "shed": mine["barn"]}
    for others, changes, message in (
        (rebuilt, {}, r"loader\.dataset\.barn: \S+rebuilt held other samples when .* step 2 .* another run_dir"),
        (more, {}, r"loader\.dataset\.pond: was not there when this"),
        (renamed, {}, r"loader\.dataset\.barn: was there when"),
        (mine, {"seed": 3}, r"loader\.seed: was 0, not 3, when this run was started"),
        (mine, {"global_batch_size": 8}, r"loader\.global_batch_size"),
        (mine, {"shuffle": {"window_shards": 3}}, r"loader\.shuffle"),
        (mine, {"mixture": {"weights": {"lab": 1}}}, r"loader\.mixture"),
        (mine, {"only_with_actions": True}, r"loader\.only_with_actions"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            Loader(Datasets.open(others), config_of(others, **changes), 0, 1, cursor)
        assert re.fullmatch(r"[^\n]*\.", str(raised.value))
