"""Batches: the same samples for any number of ranks and workers, every sample once per epoch, errors that say where."""

import json
import os
import shutil
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from configs.loader import UserError
from data_pipeline.dataset_index import DatasetIndex
from data_pipeline.datasets import Datasets
from data_pipeline.loader import Loader, LoaderConfig, LostWorkerError, telling_of_lost_workers
from data_pipeline.sample import tensor_bytes
from data_pipeline.sample_order import Cursor
from data_pipeline.video_io import ViewConfig
from tests.data_pipeline.tiny_dataset import tiny_dataset, tiny_sample


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """23 clips, 5 of them action-free; of 6 episodes, whole ones in validation."""
    return tiny_dataset(tmp_path_factory.mktemp("loader") / "dataset", clips=(3, 4, 2, 6, 3, 5), action_free=(5,))


@pytest.fixture(scope="module")
def index(dataset):
    return DatasetIndex(dataset)


def loader(index, rank=0, world_size=1, cursor=None, **changes):
    datasets = index if isinstance(index, Datasets) else Datasets({"": index})
    folders = {name: one.path for name, one in datasets.by_name.items()}
    config = LoaderConfig(dataset=folders.get("", folders), **{"global_batch_size": 4, "text_length": 6, **changes})
    return Loader(datasets, config, rank, world_size, cursor)


def take(iterable, number):
    return list(islice(iterable, number))  # and not one more, which would move the cursor


# --- order --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Three sources of 48 clips, in shards of a few."""
    folder = tmp_path_factory.mktemp("mixed") / "dataset"
    clips = (9, 7, 8, 9, 6, 9)
    sources = ("robot", "robot", "people_a", "people_b", "toys", "toys")
    return DatasetIndex(tiny_dataset(folder, clips, action_free=(2, 3), sources=sources))


LONG = {"views": {"front": ViewConfig(height=24, width=16)}, "num_frames": 9}


@pytest.fixture(scope="module")
def two(mixed, tmp_path_factory):
    """That, and a dataset of longer clips from a lab and from toys."""
    folder = tmp_path_factory.mktemp("two") / "dataset"
    longer = tiny_dataset(folder, (5, 4, 6, 5), sources=("lab", "lab", "toys", "toys"), **LONG, first_episode=50)
    return Datasets({"short": mixed, "long": DatasetIndex(longer)})


MIXTURES = {
    "one source": {"shuffle": {"window_shards": 2, "run_length": 2}},
    "three sources": {"mixture": {"weights": {"robot": 0.5, "people_*": 0.3, "toys": {0: 0.1, 9: 0.6}}}},
    # 32 and 72 latent cells per clip
    "two datasets": {
        "latent_cells_per_batch": 72 * 24,
        "batch_multiple": 24,
        "mixture": {"weights": {"long/*": 2, "played": 1, "robot": 1}, "tags": {"played": ["toys", "people_*"]}},
    },
}
STEPS = 5


@pytest.mark.parametrize("num_workers", [0, 1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", MIXTURES)
def test_global_batches_are_the_same_on_any_ranks_and_workers_after_any_stop(request, name, world_size, num_workers):
    data = request.getfixturevalue("two" if name == "two datasets" else "mixed")
    settings = {"global_batch_size": 24, **MIXTURES[name]}
    expected = [batch["keys"] for batch in take(loader(data, **settings), STEPS)]
    for stop in (2,) if num_workers else (0, 2, STEPS - 1):  # worker processes take their time to start
        before = loader(data, **settings)  # one rank, until it is killed
        take(before, stop)
        cursor = Cursor.model_validate_json(before.cursor.model_dump_json())
        ranks = [
            take(loader(data, rank, world_size, cursor, **settings, num_workers=num_workers), STEPS - stop)
            for rank in range(world_size)
        ]
        for step, keys in enumerate(expected[stop:]):
            assert [key for rank in ranks for key in rank[step]["keys"]] == keys


def test_the_cursor_does_not_run_ahead_with_the_workers(mixed):
    reader = loader(mixed, num_workers=2, prefetch_factor=4)
    for number, _ in zip(range(1, 6), reader, strict=False):
        assert reader.cursor.step == number and reader.cursor.consumed == {"all/16x16x5": 4 * number}


@pytest.mark.parametrize("announced_batches", [0, 3])
def test_the_disk_is_told_of_batches_before_they_are_read(mixed, monkeypatch, announced_batches):
    read, announced = [], []
    preadv = os.preadv

    def note_read(file, buffers, offset):
        read.append((sum(map(len, buffers)), offset, len(announced)))
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", note_read)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, offset, length, advice: announced.append((length, offset)))
    take(loader(mixed, announced_batches=announced_batches), 5)
    if announced_batches:
        assert [(num_bytes, offset) for num_bytes, offset, _ in read] == announced[: len(read)]
        # Batch k is read when batch k + 3 has been announced.
        assert [known for *_, known in read] == [
            4 * (batch + 1 + announced_batches) for batch in range(5) for _ in range(4)
        ]
    else:
        assert not announced and len(read) == 20


def test_batches_of_several_datasets_have_one_size_each(two):
    """Sizes follow the budget; all are read, as often as their weights say."""
    reader = loader(two, **MIXTURES["two datasets"])
    assert reader.batch_sizes == {"16x16x5": 48, "24x16x9": 24}
    drawn = Counter()
    for batch in take(reader, 40):
        is_long = batch["keys"][0] >= "key050"
        assert batch["latents"].shape[1:] == ((3, 6, 6, 4) if is_long else (2, 6, 4, 4))
        assert batch["actions"].shape == (len(batch["latents"]), 16 if is_long else 8, 3)
        assert len(batch["keys"]) == reader.batch_sizes["24x16x9" if is_long else "16x16x5"]
        assert len({key >= "key050" for key in batch["keys"]}) == 1
        numbers = torch.tensor([number_of(key) for key in batch["keys"]])
        torch.testing.assert_close(batch["latents"][:, -1, 0, 0, 0], numbers, rtol=2**-8, atol=0.5)
        drawn.update("long" if is_long else "robot" if key < "key002" else "played" for key in batch["keys"])
    shares = {name: count / drawn.total() for name, count in drawn.items()}
    assert shares == pytest.approx({"long": 0.5, "robot": 0.25, "played": 0.25}, abs=0.02)
    assert reader.epochs().keys() == {"long/*", "played", "robot"}


def test_without_weights_every_sample_of_all_datasets_comes_once_an_epoch(two):
    num_train = len(two.by_name["short"].indices("train")) + len(two.by_name["long"].indices("train"))
    reader = loader(two, global_batch_size=1)
    keys = Counter(batch["keys"][0] for batch in take(reader, num_train))
    assert set(keys.values()) == {1}


def test_a_budget_that_cannot_be_met(two):
    with pytest.raises(UserError, match=r"=500 is less than 8 clips of 24x16x9, which have 72 .* at least 576"):
        loader(two, latent_cells_per_batch=500)
    with pytest.raises(UserError, match=r"48 clips of 16x16x5.* by 5 ranks; set loader\.batch_multiple"):
        loader(two, 0, 5, **MIXTURES["two datasets"])


def test_a_mixture_draws_by_weight(mixed):
    weights = {"robot": 0.5, "people_*": 0.25, "toys": 0.25}
    reader = loader(mixed, mixture={"weights": weights}, global_batch_size=8)
    counts = Counter(key[:6] for batch in take(reader, 30) for key in batch["keys"])
    assert counts["key000"] + counts["key001"] == 120 and counts["key002"] + counts["key003"] == 60
    epochs = reader.epochs()
    assert epochs.keys() == weights.keys() and epochs["robot"] > 2
    by_robot = loader(mixed, mixture={"by": "embodiment", "weights": {"arm": 1, "none": 0}})
    assert all(batch["has_actions"].all() for batch in take(by_robot, 10))


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"weights": {"robt": 1}}, "no source of split train in .* is called 'robt'.*robot.*there are: "),
        ({"weights": {"robot": 0}}, "are all zero at step 0; give"),
        ({"weights": {"robot": {0: 1, 5: 0}}}, "are all zero at step 5"),
        ({"weights": {"robot": -1}}, "greater than or equal to 0"),
        ({"weights": {}}, "at least 1"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(mixed, mixture, message):
    with pytest.raises((UserError, ValidationError), match=message):
        loader(mixed, mixture=mixture)


def test_workers_and_checks_change_nothing(index):
    plain = take(loader(index), 12)
    for changes in ({"num_workers": 2}, {"check_sha256": True}):
        for one, other in zip(plain, take(loader(index, **changes), 12), strict=True):
            assert one["keys"] == other["keys"]
            torch.testing.assert_close(
                {name: value for name, value in one.items() if name != "keys"},
                {name: value for name, value in other.items() if name != "keys"},
            )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_that_are_kept_stay_as_they_are(index, num_workers):
    """While the memory of others is used again."""
    plain = take(loader(index), 40)
    kept = [
        (number, batch["latents"][1:, 0], batch["text_tokens"])
        for number, batch in enumerate(islice(loader(index, num_workers=num_workers), 40))
        if number % 10 == 0
    ]
    for number, latents, text in kept:
        assert torch.equal(latents, plain[number]["latents"][1:, 0])
        assert torch.equal(text, plain[number]["text_tokens"])


def test_a_dataset_smaller_than_a_batch_repeats_itself(index):
    (batch,) = take(loader(index, split="validation", global_batch_size=64), 1)
    counts = np.unique(batch["keys"], return_counts=True)[1]
    assert len(counts) == len(index.indices("validation")) and counts.max() - counts.min() <= 1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Clips of one frame: they have no actions, and one shard."""
    folder = tmp_path_factory.mktemp("pictures") / "dataset"
    return DatasetIndex(tiny_dataset(folder, (3, 2), action_free=(0, 1), num_frames=1, first_episode=70))


LARGE = {"global_batch_size": 16}


@pytest.mark.parametrize("num_workers", [0, 4])
@pytest.mark.parametrize("world_size", [1, 4])
def test_fewer_samples_than_a_batch_and_fewer_shards_than_workers(pictures, world_size, num_workers):
    """No rank and no worker waits for data of its own: all read parts of batches that are settled."""
    keys = [
        [batch["keys"] for batch in take(loader(pictures, rank, world_size, num_workers=num_workers, **LARGE), 3)]
        for rank in range(world_size)
    ]
    for step in range(3):
        counts = Counter(key for rank in keys for key in rank[step])
        assert counts.total() == 16 and len(counts) == len(pictures.indices("train")) < 16
        assert max(counts.values()) - min(counts.values()) <= 1


def test_clips_of_one_frame(pictures, mixed):
    (batch,) = take(loader(pictures), 1)
    assert batch["latents"].shape == (4, 1, 6, 4, 4) and batch["actions"].shape == (4, 0, 1)
    assert not batch["has_actions"].any() and batch["proprio"].shape == (4, 1)
    both = Datasets({"films": mixed, "pictures": pictures})
    reader = loader(both, mixture={"by": "dataset", "weights": {"films": 1, "pictures": 1}})
    assert {tuple(batch["latents"].shape[1:]) for batch in take(reader, 6)} == {(1, 6, 4, 4), (2, 6, 4, 4)}


def test_a_dataset_or_source_of_which_nothing_is_left(mixed, pictures):
    both = Datasets({"films": mixed, "pictures": pictures})
    keys = [key for batch in take(loader(both, only_with_actions=True), 8) for key in batch["keys"]]
    assert all(key < "key070" for key in keys)
    with pytest.raises(UserError, match=r"no dataset of split train .* is called 'pictures'.*there are: films\."):
        loader(both, only_with_actions=True, mixture={"by": "dataset", "weights": {"films": 1, "pictures": 1}})
    with pytest.raises(UserError, match="split train holds no action-labelled samples"):
        loader(pictures, only_with_actions=True)


# --- content ------------------------------------------------------------------------------------------------------


def number_of(key):
    return float(100 * int(key[3:6]) + int(key[7:]))


def test_a_batch_holds_what_its_keys_say(index):
    stats = index.norm_stats["embodiments"]["arm"]
    for batch in take(loader(index, normalization="mean_std"), 10):
        numbers = torch.tensor([number_of(key) for key in batch["keys"]])
        is_free = torch.tensor([key.startswith("key005") for key in batch["keys"]])
        assert batch["latents"].dtype == torch.float32 and batch["latents"].shape == (4, 2, 6, 4, 4)
        # bfloat16 keeps eight bits
        torch.testing.assert_close(batch["latents"][:, 0, 0, 0, 0], numbers, rtol=2**-8, atol=0.5)
        assert batch["text_tokens"].shape == (4, 6, 8) and (batch["text_tokens"][:, 3:] == 0).all()
        assert (batch["text_tokens"][:, :3].abs().sum(-1) > 0).all()  # two words and the end token
        torch.testing.assert_close(batch["has_actions"], ~is_free)
        assert batch["actions"].shape == (4, 8, 3) and batch["proprio"].shape == (4, 2)
        assert (batch["action_is_valid"] == ~is_free[:, None, None]).all()
        expected = (numbers - stats["actions_absolute"]["mean"][0]) / stats["actions_absolute"]["std"][0]
        torch.testing.assert_close(
            batch["actions"], (expected * ~is_free)[:, None, None].expand(4, 8, 3), rtol=1e-4, atol=1e-4
        )
        expected = (numbers - stats["proprio"]["mean"][0]) / stats["proprio"]["std"][0]
        torch.testing.assert_close(batch["proprio"], (expected * ~is_free)[:, None].expand(4, 2), rtol=1e-4, atol=1e-4)


def test_actions_that_were_not_recorded_are_masked_and_zero(index, monkeypatch):
    members = tiny_sample(1, 2).to_members()
    meta = json.loads(members["meta.json"]) | {"action_spans": [[0, 2], [5, 8]]}
    members["meta.json"] = json.dumps(meta).encode()
    monkeypatch.setattr(index, "read_sample", lambda *_, **__: members)
    batch = next(iter(loader(index, normalization="none")))
    valid = [True, True, False, False, False, True, True, True]
    assert batch["action_is_valid"][0].all(dim=1).tolist() == batch["action_is_valid"][0].any(dim=1).tolist() == valid
    assert batch["actions"][0, :, 0].tolist() == [102.0 * one for one in valid] and batch["has_actions"].all()


@pytest.mark.parametrize(
    ("member", "tensor"),
    [
        ("front.latents", torch.ones(1, 6, 4, 4)),  # one frame, which could be repeated
        ("front.latents", torch.ones(2, 6, 4, 1)),
        ("text", torch.ones(3, 1)),
    ],
)
def test_numbers_of_another_shape_are_refused(index, monkeypatch, member, tensor):
    members = tiny_sample(1, 2).to_members()
    members[f"{member}.safetensors"] = tensor_bytes(member.split(".")[-1], tensor.bfloat16())
    monkeypatch.setattr(index, "read_sample", lambda *_, **__: members)
    with pytest.raises(UserError, match=r"a member that cannot be read \(its shape is \[.*\], but \[.*\] is"):
        take(loader(index), 1)


def test_video_on_request(index):
    (batch,) = take(loader(index, reads="both"), 1)
    assert batch["video"].dtype == torch.uint8 and batch["video"].shape == (4, 5, 16, 16, 3)
    level = torch.tensor([(int(key[3:6]) * 16 + int(key[7:])) % 256 for key in batch["keys"]])
    assert (batch["video"].float().mean((1, 2, 3, 4)) - level).abs().max() < 3  # a lossy codec
    assert "video" not in take(loader(index), 1)[0]


def test_only_with_actions(index):
    batches = take(loader(index, only_with_actions=True), 10)
    assert all(batch["has_actions"].all() for batch in batches)


def test_without_robots_batches_hold_one_masked_number_per_action(tmp_path):
    index = DatasetIndex(tiny_dataset(tmp_path / "dataset", clips=(3, 3), action_free=(0, 1)))
    (batch,) = take(loader(index), 1)
    assert (index.action_dim, index.proprio_dim) == (0, 0)
    assert batch["actions"].shape == (4, 8, 1) and batch["proprio"].shape == (4, 1)
    assert not batch["has_actions"].any() and not batch["action_is_valid"].any()


def test_what_the_index_tells(index):
    assert len(index) == 23 and len(index.indices("train")) + len(index.indices("validation")) == 23
    assert (index.num_frames, index.fps, index.num_actions, index.actions_per_latent) == (5, 10.0, 8, 8)
    assert index.latent_shape == (2, 6, 4, 4) and (index.action_dim, index.proprio_dim) == (3, 2)
    assert index.codec().weight_hash == index.info.codec.weight_hash
    assert index.text_encoder().width == 8
    assert index.residual_std == 0.0
    assert index.row(0)["key"] == index.key(0) == index.read_sample(0, check_sha256=True)["__key__"]


# --- errors -------------------------------------------------------------------------------------------------------


def test_settings_that_cannot_be_met(index):
    with pytest.raises(UserError, match="cannot be shared equally by 3 ranks; choose a multiple of 3"):
        loader(index, world_size=3)
    with pytest.raises(UserError, match=r"view=wrist: .* has no such view; choose one of front"):
        loader(index, views=["wrist"])


def test_an_empty_split(tmp_path):
    index = DatasetIndex(tiny_dataset(tmp_path / "dataset", clips=(3,)))
    with pytest.raises(UserError, match="split validation holds no samples"):
        loader(index, split="validation")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_half_cut_shard_names_shard_key_and_the_next_move(tmp_path, num_workers):
    index = DatasetIndex(tiny_dataset(tmp_path / "dataset", clips=(9,)))
    shard = next(index.path.rglob("*.tar"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    pattern = (
        r"000000\.tar: sample key000-\d{4}: the shard ends at byte \d+.*`python -m data_pipeline\.verify .*dataset`"
    )
    with pytest.raises(UserError, match=pattern) as raised:
        take(loader(index, num_workers=num_workers), 3)
    assert "\n" not in str(raised.value)


def test_a_vanished_shard(tmp_path):
    index = DatasetIndex(tiny_dataset(tmp_path / "dataset", clips=(3,)))
    next(index.path.rglob("*.tar")).unlink()
    with pytest.raises(UserError, match=r"000000\.tar: sample key.*cannot be opened"):
        take(loader(index), 1)


def test_a_vanished_shard_is_told_before_training(two_shards, tmp_path, caplog):
    folder = shutil.copytree(two_shards, tmp_path / "dataset")
    datasets = Datasets.open({"": folder})
    datasets.check_shards(0.0)
    shards = sorted(folder.glob("shards/train/*/*.tar"))
    shards[1].unlink()
    with pytest.raises(UserError, match=rf"^{shards[1]}: missing, but manifest.parquet names .* loader.max_bad_fr"):
        datasets.check_shards(0.0)
    datasets.check_shards(0.5)
    assert f"{shards[1]}: missing" in caplog.text
    shutil.rmtree(folder / "shards")
    with pytest.raises(UserError, match=r"000000.tar and \d+ other shard"):
        datasets.check_shards(0.0)


def test_a_flipped_byte_is_found_on_request(tmp_path):
    index = DatasetIndex(tiny_dataset(tmp_path / "dataset", clips=(3,)))
    shard = next(index.path.rglob("*.tar"))
    data = bytearray(shard.read_bytes())
    start = data.index(b"\x93NUMPY")
    data[start + 130] ^= 1  # inside the numbers
    shard.write_bytes(data)
    take(loader(index), 1)  # a number like any other
    with pytest.raises(UserError, match="holds other bytes than its checksum promises"):
        take(loader(index, check_sha256=True), 1)
    data[start] ^= 1  # no .npy file any more
    shard.write_bytes(data)
    with pytest.raises(UserError, match="holds a member that cannot be read"):
        take(loader(index), 1)


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory):
    dataset = tiny_dataset(tmp_path_factory.mktemp("shards") / "dataset", clips=(60,) * 6, max_shard_mb=1)
    assert len(list(dataset.glob("shards/train/*/*.tar"))) >= 2
    return dataset


def cut_in_half(shard):
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def flip_a_number(shard):
    data = bytearray(shard.read_bytes())
    data[data.index(b"\x93NUMPY") + 130] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_in_half, "truncated_shard"),
        (lambda shard: shard.unlink(), "missing_shard"),
        (flip_a_number, "wrong_checksum"),
    ],
)
def test_bad_samples_are_replaced_told_and_counted(two_shards, tmp_path, caplog, damage, reason):
    """Other ranks' samples stay where they are, and so do the good ones of the same rank."""
    settings = {"global_batch_size": 64, "check_sha256": True, "max_bad_fraction": 1.0}
    whole = [batch["keys"] for batch in take(loader(DatasetIndex(two_shards), **settings), 4)]
    dataset = shutil.copytree(two_shards, tmp_path / "dataset")
    damage(sorted(dataset.glob("shards/train/*/*.tar"))[1])
    ranks = [loader(DatasetIndex(dataset), rank, 2, **settings) for rank in (0, 1)]
    read = [take(rank, 4) for rank in ranks]
    num_replaced = 0
    for step, keys in enumerate(whole):
        for rank in (0, 1):
            mine, found = keys[32 * rank : 32 * rank + 32], read[rank][step]["keys"]
            replaced = [key for key, other in zip(mine, found, strict=True) if key != other]
            assert set(found) <= set(mine)  # by a neighbour in the same part
            assert all(f"sample {key}" in caplog.text for key in replaced)
            num_replaced += len(replaced)
    assert num_replaced and sum((rank.bad_samples for rank in ranks), Counter()) == {reason: num_replaced}


@pytest.mark.parametrize(
    "words",
    ["DataLoader worker (pid 7) is killed by signal: Killed. ", "DataLoader worker (pid(s) 7) exited unexpectedly"],
)
def test_a_reading_process_that_is_lost_is_told(words):
    """PyTorch's words; it raises them from a signal handler, which here might be in the middle of pytest's own code."""
    config = LoaderConfig(dataset="x", num_workers=3)
    told = r"^A reading process was lost \(DataLoader worker .* loader\.num_workers=3 or loader\.prefetch_factor=2"
    with pytest.raises(LostWorkerError, match=told), telling_of_lost_workers(config):
        raise RuntimeError(words)
    with pytest.raises(RuntimeError, match=r"^another"), telling_of_lost_workers(config):
        raise RuntimeError("another error")


def test_too_many_bad_samples_stop_the_run(two_shards, tmp_path):
    index = DatasetIndex(shutil.copytree(two_shards, tmp_path / "dataset"))
    sorted(index.path.glob("shards/train/*/*.tar"))[1].unlink()
    reader = loader(index, max_bad_fraction=0.004, global_batch_size=8)
    with pytest.raises(
        UserError, match=r"^\d+ of the \d+ samples read .* loader\.max_bad_fraction=0\.004 allows\. .*\.tar"
    ):
        take(reader, 60)
    with pytest.raises(UserError, match=r"None of the 1 samples of a batch's part can be used"):
        take(loader(index, max_bad_fraction=1.0, global_batch_size=1), 120)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("dataset.yaml", b"schema_version: 99", "has schema version 99, but this code reads 1"),
        ("dataset.yaml", b"schema_version: 1\nspeed: 3", "dataset.yaml: code_version: Field required"),
        ("dataset.yaml", b"a: [", "cannot be read"),
        ("manifest.parquet", b"PAR1", "manifest.parquet: is missing or damaged"),
        ("norm_stats.json", b"{", "norm_stats.json: cannot be read"),
        ("norm_stats.json", b"[]", r"norm_stats\.json: Input should be a valid dictionary"),
        ("norm_stats.json", b'{"embodiments": {}}', "norm_stats.json: latents: Field required"),
    ],
)
def test_damaged_records_say_what_to_do(tmp_path, name, data, message):
    dataset = tiny_dataset(tmp_path / "dataset", clips=(1, 1))
    (dataset / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        DatasetIndex(dataset)


VECTORS = ("mean", "std", "min", "max", "q01", "q99")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stats: stats.pop("arm"), "has no statistics of embodiment 'arm'"),
        (lambda stats: stats["arm"].update(proprio=None), "3 relative action and 0 proprio values of arm, but"),
        (lambda stats: stats["arm"]["actions_relative"].update({what: [1.0] for what in VECTORS}), "and 1 relative"),
        (lambda stats: stats["arm"]["actions_absolute"].update(q99=[1.0]), "different numbers of dimensions"),
        (lambda stats: stats["arm"]["actions_absolute"].update(std=None), "actions_absolute.std: Input should be"),
    ],
)
def test_statistics_that_do_not_fit_the_robot_are_refused(tmp_path, change, message):
    dataset = tiny_dataset(tmp_path / "dataset", clips=(1, 1))
    stats = json.loads((dataset / "norm_stats.json").read_text())
    change(stats["embodiments"])
    (dataset / "norm_stats.json").write_text(json.dumps(stats))
    with pytest.raises(UserError, match=message):
        DatasetIndex(dataset)


def test_statistics_that_do_not_fit_the_latents_are_refused(tmp_path):
    dataset = tiny_dataset(tmp_path / "dataset", clips=(1, 1))
    stats = json.loads((dataset / "norm_stats.json").read_text())
    stats["latents"]["std"] = [1.0]
    (dataset / "norm_stats.json").write_text(json.dumps(stats))
    with pytest.raises(UserError, match=r"latents\.std has 1 values, but dataset\.yaml says codec\.latent_channels=6"):
        DatasetIndex(dataset)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("codec/codec.safetensors", b"", "codec.safetensors: cannot be read"),
        ("codec/config.json", b'{"kind": "embedded", "weight_hash": "0"}', "lacks patch, scale"),
        ("text_encoder/config.json", b'{"kind": "hashed", "weight_hash": 3}', "weight_hash must be text"),
    ],
)
def test_damaged_encoders_say_what_to_do(tmp_path, name, data, message):
    index = DatasetIndex(tiny_dataset(tmp_path / "dataset", clips=(1, 1)))
    (index.path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        index.codec() if name.startswith("codec") else index.text_encoder()


def test_a_codec_of_another_dataset_is_refused(tmp_path):
    index = DatasetIndex(tiny_dataset(tmp_path / "dataset", clips=(1, 1)))
    codec = index.codec()
    codec.mean += 1
    codec.save(index.path / "codec")
    with pytest.raises(UserError, match="is not the codec that this dataset was encoded with"):
        index.codec()


def test_no_dataset_at_all(tmp_path):
    with pytest.raises(UserError, match=r"no such folder; give the `out` folder of a finished build"):
        DatasetIndex(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: is no folder; give the `out` folder of a finished build"):
        DatasetIndex(tmp_path / "file")
    with pytest.raises(UserError, match=r"holds no dataset\.yaml, so it is not a dataset"):
        DatasetIndex(tmp_path)
