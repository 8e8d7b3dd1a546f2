import json
import pickle
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.loader import UserError
from data_pipeline.align import spans
from data_pipeline.sources import Source, SourceError, detect_kind, open_source, rlds
from data_pipeline.sources.rlds import RldsConfig
from data_pipeline.video_io import VideoError
from tests.data_pipeline.recordings import HEIGHT, WIDTH, actions_of, numbered_frames, read_numbers
from tests.data_pipeline.tfrecord_writer import (
    EPISODE,
    STEPS,
    encode_image,
    episode_values,
    example,
    features_dict,
    image,
    tensor,
    write_rlds,
)


def open_rlds(path: Path, **settings: Any) -> Source:
    return open_source(RldsConfig(path=path, **{"control_hz": 5, **settings}))


def payload(index: int, length: int, **changes: Any) -> bytes:
    return example(episode_values(index, length, **changes))


def write_one(root: Path, features: dict[str, Any] | None = None, **changes: Any) -> Path:
    return write_rlds(root, {"train": [[payload(0, 5, **changes)]]}, step_features=STEPS | (features or {}))


def only_episode(path: Path, **settings: Any) -> Any:
    return open_rlds(path, **settings).read_episode("train_00000_000000")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = [[payload(0, 6), payload(1, 4)], [payload(2, 5)]]
    return write_rlds(tmp_path, {"train": files, "val": [[payload(3, 7)]]})


def test_every_record_of_every_split_is_an_episode(folder: Path) -> None:
    source = open_rlds(folder)
    ids = source.list_episodes()
    assert ids == ["train_00000_000000", "train_00000_000001", "train_00001_000000", "val_00000_000000"]
    assert source.name == "two_joints"
    for index, (episode_id, length) in enumerate(zip(ids, (6, 4, 5, 7), strict=True)):
        episode = source.read_episode(episode_id)
        assert (episode.num_frames, episode.fps, episode.control_hz) == (length, 5, 5)
        assert (episode.instruction, episode.success, episode.embodiment) == ("push the block", True, "two_joints")
        assert episode.actions is not None and episode.actions.dtype == np.float32
        np.testing.assert_array_equal(episode.actions[:-1], actions_of(index, length)[:-1])
        np.testing.assert_array_equal(episode.proprio, actions_of(index, length)[:, :2] + 100)
        assert list(episode.views) == ["image", "wrist_image"]
        assert episode.views["image"].info().codec == "png"
        numbers = [100 * index + i for i in range(length)]
        assert read_numbers(episode.views["image"].read(range(length))) == numbers
        assert read_numbers(255 - episode.views["wrist_image"].read(range(length))) == numbers
        assert episode.repairs == ()
    embodiment = source.embodiment()
    assert embodiment is not None
    assert embodiment.action_names == ("action_0", "action_1", "action_2")
    assert embodiment.proprio_names == ("state_0", "state_1")


def test_the_action_of_the_last_step_is_not_executed(folder: Path) -> None:
    episode = open_rlds(folder).read_episode("train_00001_000000")
    assert spans(np.isfinite(episode.actions).all(axis=1)) == ((0, 4),)


def test_a_recording_without_a_marked_end_keeps_its_last_action(tmp_path: Path) -> None:
    episode = only_episode(write_one(tmp_path, steps__is_last=np.zeros(5, np.int64)))
    assert np.isfinite(episode.actions).all()
    assert "No step is marked as the last one: the action of the last step counts as executed." in episode.repairs


def test_frames_are_read_where_they_lie(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    footage = open_rlds(folder).read_episode("train_00000_000001").views["image"]
    assert len(pickle.dumps(footage)) < 1000
    read_bytes = []
    monkeypatch.setattr(rlds.os, "pread", lambda file, size, at: read_bytes.append(size) or os_pread(file, size, at))
    frames = footage.read([3, 0, 3, 1])
    assert read_numbers(frames) == [103, 100, 103, 101]
    assert sum(read_bytes) <= 4 * len(encode_image(numbered_frames([103])[0])) + 200
    np.testing.assert_array_equal(frames, numbered_frames([103, 100, 103, 101]))
    for positions in ([], [4], [-1]):
        with pytest.raises(VideoError, match="out_of_range"):
            footage.read(positions)


os_pread = rlds.os.pread


def test_splits_can_be_chosen(folder: Path) -> None:
    assert open_rlds(folder, splits=["val"]).list_episodes() == ["val_00000_000000"]
    with pytest.raises(UserError, match="has no split test; it has train, val"):
        open_rlds(folder, splits=["test"]).list_episodes()


def test_the_folder_is_found_from_above(folder: Path) -> None:
    for path in (folder, folder.parent, folder.parent.parent):
        assert detect_kind(path) == "rlds"
        assert len(open_rlds(path).list_episodes()) == 4
    shutil.copytree(folder, folder.parent / "2.0.0")
    with pytest.raises(UserError, match=r"2 datasets \(1\.0\.0, 2\.0\.0\); give the folder of one"):
        open_rlds(folder.parent).list_episodes()


def test_a_part_of_a_dataset_keeps_its_ids(folder: Path) -> None:
    before = open_rlds(folder).list_episodes()
    (folder / "two_joints-train.tfrecord-00000-of-00002").unlink()
    source = open_rlds(folder)
    assert source.list_episodes() == before[2:]
    assert source.repairs() == ("Split train has 2 files, 1 of them are here: the others are left out.",)


def test_episodes_are_counted_where_the_metadata_does_not_say(folder: Path) -> None:
    before = open_rlds(folder).list_episodes()
    (folder / "dataset_info.json").write_text(json.dumps({"splits": [{"name": "train", "shardLengths": ["3"]}]}))
    assert open_rlds(folder).list_episodes() == before
    (folder / "dataset_info.json").unlink()
    source = open_rlds(folder)
    assert source.list_episodes() == before
    assert source.embodiment().name == "two_joints"  # type: ignore[union-attr]


def test_a_surplus_of_episodes_is_told(tmp_path: Path) -> None:
    info = {"name": "two_joints", "splits": [{"name": "train", "shardLengths": ["1"]}]}
    folder = write_rlds(tmp_path, {"train": [[payload(0, 4), payload(1, 4)]]}, info=info)
    assert len(open_rlds(folder).list_episodes()) == 1
    assert any("has 2 episodes, dataset_info.json says 1" in note for note in only_episode(folder).repairs)


def test_the_rate_is_a_setting_or_published(tmp_path: Path) -> None:
    unknown = write_rlds(tmp_path, {"train": [[payload(0, 4)]]})
    with pytest.raises(UserError, match="no rate is known for two_joints; set control_hz"):
        open_source(RldsConfig(path=unknown)).list_episodes()
    droid = write_rlds(tmp_path, {"train": [[payload(0, 4)]]}, name="droid")
    source = open_source(RldsConfig(path=droid))
    assert source.read_episode("train_00000_000000").fps == 15
    assert source.repairs() == ("The format has no rate: the steps of droid are taken at the published 15 Hz.",)


# --- what the steps hold ---------------------------------------------------------------------------------------------

PARTS = {
    "action": features_dict(
        {
            "world_vector": tensor("float32", 2),
            "gripper_closedness_action": tensor("float32", 1),
            "terminate_episode": tensor("int32", 3),
        }
    )
}


def parts_values() -> dict[str, Any]:
    world = np.arange(10, dtype=np.float32)
    return {
        "steps__action": None,
        "steps__action__world_vector": world,
        "steps__action__gripper_closedness_action": -np.ones(5, np.float32),
        "steps__action__terminate_episode": np.zeros(15, np.int64),
    }


def test_an_action_in_parts_is_joined_by_name(tmp_path: Path) -> None:
    path = write_one(tmp_path, PARTS, **parts_values())
    source = open_rlds(path)
    episode = source.read_episode("train_00000_000000")
    assert episode.actions[:2].tolist() == [[-1, 0, 1], [-1, 2, 3]]  # type: ignore[index]
    embodiment = source.embodiment()
    assert embodiment is not None
    assert embodiment.action_names == ("gripper_closedness_action", "world_vector_0", "world_vector_1")
    assert embodiment.gripper_actions == (0,)
    note = "The action has parts, which are joined by name: action/gripper_closedness_action, action/world_vector."
    assert note in episode.repairs


def test_the_order_of_the_parts_can_be_given(tmp_path: Path) -> None:
    path = write_one(tmp_path, PARTS, **parts_values())
    source = open_rlds(path, action_keys=["world_vector", "action/gripper_closedness_action"], proprio_keys=[])
    assert source.read_episode("train_00000_000000").actions[1].tolist() == [2, 3, -1]  # type: ignore[index]
    assert source.read_episode("train_00000_000000").proprio is None
    with pytest.raises(UserError, match="action_keys has elbow, the steps have"):
        open_rlds(path, action_keys=["elbow"]).list_episodes()
    with pytest.raises(UserError, match="image_keys has depth, the steps have observation/image, observation/wrist"):
        open_rlds(path, image_keys=["depth"]).list_episodes()
    assert list(only_episode(path, image_keys=["wrist_image"]).views) == ["wrist_image"]


def test_tensors_may_be_stored_as_bytes(tmp_path: Path) -> None:
    frames = numbered_frames(range(5))
    raw = tensor("uint8", HEIGHT, WIDTH, 3, encoding="zlib")
    observation = features_dict({"raw": raw, "state": tensor("float64", 2, encoding="bytes")})
    state = np.arange(10, dtype=np.float64).reshape(5, 2)
    path = write_one(
        tmp_path,
        {"observation": observation},
        steps__observation__raw=[zlib.compress(frame.tobytes()) for frame in frames],
        steps__observation__state=[row.tobytes() for row in state],
    )
    episode = only_episode(path)
    np.testing.assert_array_equal(episode.views["raw"].read(range(5)), frames)
    np.testing.assert_array_equal(episode.proprio, state)
    assert episode.views["raw"].info().codec == "uint8 array (zlib)"


def test_metadata_of_older_versions_is_understood(tmp_path: Path) -> None:
    core = "tensorflow_datasets.core.features"

    def old(kind: str, content: Any) -> dict[str, Any]:
        return {"type": f"{core}.{kind}", "content": content, "proto_cls": ""}

    path = write_one(tmp_path)
    observation = {
        "image": old("image_feature.Image", {"shape": [None, None, 3], "dtype": "uint8", "encoding_format": "png"}),
        "state": old("tensor_feature.Tensor", {"shape": [2], "dtype": "float32", "encoding": "none"}),
    }
    inner = {
        "action": old("tensor_feature.Tensor", {"shape": [3], "dtype": "float32", "encoding": "none"}),
        "is_last": old("tensor_feature.Tensor", {"shape": [], "dtype": "bool", "encoding": "none"}),
        "observation": old("features_dict.FeaturesDict", observation),
    }
    step = old("features_dict.FeaturesDict", inner)
    tree = {"steps": old("dataset_feature.Dataset", {"feature": step, "length": None})}
    (path / "features.json").write_text(json.dumps(old("features_dict.FeaturesDict", tree)))
    episode = only_episode(path)
    assert (list(episode.views), episode.actions.shape, episode.proprio.shape) == (["image"], (5, 3), (5, 2))


def test_steps_are_counted_by_their_pictures_where_nothing_else_says(tmp_path: Path) -> None:
    features = {key: one for key, one in STEPS.items() if not key.startswith("is_")}
    values = payload(0, 5, steps__is_first=None, steps__is_last=None)
    episode = only_episode(write_rlds(tmp_path, {"train": [[values]]}, step_features=features))
    assert (episode.num_frames, len(episode.actions)) == (5, 5)


def test_texts_come_from_wherever_they_are(tmp_path: Path) -> None:
    codes = np.zeros((5, 16), np.int64)
    codes[:, :4] = [ord(letter) for letter in "pusé"]
    observation = {**STEPS["observation"]["featuresDict"]["features"], "instruction": tensor("int32", 16)}
    path = write_one(
        tmp_path,
        {"observation": features_dict(observation)},
        steps__language_instruction=[b""] * 5,
        steps__observation__instruction=codes.reshape(-1),
    )
    assert only_episode(path).instruction == "pusé"
    assert only_episode(path, instruction="play").instruction == "play"


def test_changing_and_missing_texts_are_told(tmp_path: Path) -> None:
    path = write_one(tmp_path, steps__language_instruction=[b"", b"open", b"open", b"close  it", b""])
    episode = only_episode(path)
    assert episode.instruction == "open"
    assert "The steps have 2 different texts: the first is the instruction." in episode.repairs
    none = write_one(tmp_path / "none", steps__language_instruction=[b""] * 5)
    assert only_episode(none).instruction is None
    assert "The steps have no text: the episode has no instruction." in only_episode(none).repairs


@pytest.mark.parametrize(("is_still", "views"), [(True, ["wrist_image"]), (False, ["image", "wrist_image"])])
def test_a_view_that_was_not_there_is_left_out(tmp_path: Path, is_still: bool, views: list[str]) -> None:
    """Some datasets deny all their views: only pictures that are all alike are believed to be a filling."""
    numbers = [0] * 5 if is_still else range(5)
    values = episode_values(
        0,
        5,
        episode_metadata__has_image=np.array([0]),
        steps__observation__image=[encode_image(frame) for frame in numbered_frames(numbers)],
    )
    episode_features = EPISODE | {"episode_metadata": features_dict({"has_image": tensor("bool")})}
    path = write_rlds(tmp_path, {"train": [[example(values)]]}, episode_features=episode_features)
    episode = only_episode(path)
    assert list(episode.views) == views
    assert any(note.startswith("has_image is false") for note in episode.repairs)


def test_a_dataset_without_actions_is_video(tmp_path: Path) -> None:
    path = write_rlds(
        tmp_path,
        {"train": [[payload(0, 5)]]},
        step_features={key: one for key, one in STEPS.items() if key != "action"},
    )
    source = open_rlds(path)
    episode = source.read_episode("train_00000_000000")
    assert (episode.actions, episode.proprio, episode.control_hz, episode.embodiment) == (None, None, None, None)
    assert source.embodiment() is None
    assert source.repairs() == ("The steps have no action: the episodes are read without actions.",)


def test_actions_that_are_no_numbers_are_told(tmp_path: Path) -> None:
    actions = actions_of(0, 5)
    actions[1, 1] = np.nan
    episode = only_episode(write_one(tmp_path, steps__action=actions))
    assert spans(np.isfinite(episode.actions).all(axis=1)) == ((0, 1), (2, 4))
    assert "action: 1 rows are not finite numbers and do not count as recorded." in episode.repairs


# --- what cannot be used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason", "detail"),
    [
        ({"steps__action": np.zeros(14, np.float32)}, "wrong_dims", "action does not have 3 values"),
        ({"steps__observation__state": None}, "missing_column", "no observation/state"),
        ({"steps__observation__image": [b""] * 4}, "frame_count_mismatch", "4 pictures for 5 steps"),
        ({"steps__is_first": np.zeros(0, np.int64)}, "too_short", "no steps"),
        ({"invalid": np.array([1])}, "invalid_episode", "says that it is invalid"),
    ],
)
def test_a_bad_episode_is_its_own_problem(tmp_path: Path, changes: Any, reason: str, detail: str) -> None:
    values = [payload(0, 5), payload(1, 5, **changes), payload(2, 5)]
    path = write_rlds(tmp_path, {"train": [values]}, episode_features=EPISODE | {"invalid": tensor("bool")})
    source = open_rlds(path)
    assert [source.read_episode(f"train_00000_00000{i}").num_frames for i in (0, 2)] == [5, 5]
    with pytest.raises(SourceError, match=detail) as error:
        source.read_episode("train_00000_000001")
    assert error.value.reason == reason
    assert error.value.where.endswith("#1")


def test_damaged_files_cost_only_what_is_damaged(folder: Path) -> None:
    file = folder / "two_joints-train.tfrecord-00000-of-00002"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    source = open_rlds(folder)
    assert source.read_episode("train_00000_000000").num_frames == 6
    with pytest.raises(SourceError, match="record 1 fails its checksum"):
        source.read_episode("train_00000_000001")
    file.write_bytes(data[: len(data) // 2])
    (folder / "dataset_info.json").unlink()
    reasons = {}
    for episode_id in open_rlds(folder).list_episodes():
        try:
            open_rlds(folder).read_episode(episode_id)
        except SourceError as error:
            reasons[episode_id] = error.reason
    assert list(reasons.values()) == ["truncated_file"]
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a")
    with pytest.raises(SourceError, match="git lfs pull"):
        open_rlds(folder).read_episode("train_00000_000000")
    for episode_id in ("train_00000_000009", "train_00009_000000", "train", "../x_00000_000000"):
        with pytest.raises(SourceError):
            open_rlds(folder).read_episode(episode_id)


@pytest.mark.parametrize("bad", [b"", b"GIF89a", encode_image(numbered_frames([1])[0])[:-60]])
def test_a_damaged_picture_costs_only_itself(tmp_path: Path, bad: bytes) -> None:
    pictures = [encode_image(frame) for frame in numbered_frames(range(5))]
    pictures[2] = bad
    footage = only_episode(write_one(tmp_path, steps__observation__image=pictures)).views["image"]
    assert read_numbers(footage.read([0, 1, 3, 4])) == [0, 1, 3, 4]
    with pytest.raises(VideoError) as error:
        footage.read([1, 2])
    assert error.value.reason == "undecodable_video"


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no RLDS dataset"):
        open_rlds(tmp_path).list_episodes()
    path = write_rlds(tmp_path, {"train": []}, info={"name": "two_joints", "fileFormat": "array_record"})
    with pytest.raises(UserError, match="stored as array_record, only tfrecord is read"):
        open_rlds(path).list_episodes()
    no_pictures = {**STEPS, "observation": features_dict({"depth": image(48, 64, 1)})}
    with pytest.raises(UserError, match="no colour pictures"):
        open_rlds(write_rlds(tmp_path / "b", {"train": [[payload(0, 4)]]}, step_features=no_pictures)).list_episodes()
    (path / "features.json").write_text('{"steps": "steps"')
    with pytest.raises(UserError, match=r"features\.json: cannot be read"):
        open_rlds(path).list_episodes()


# --- real recordings -------------------------------------------------------------------------------------------------


def test_bridge_as_octo_ships_it(shared_data: Path) -> None:
    source = open_source(RldsConfig(path=shared_data / "octo_bridge_rlds"))
    ids = source.list_episodes()
    assert len(ids) == 50 and len([one for one in ids if one.startswith("val")]) == 25
    embodiment = source.embodiment()
    assert embodiment is not None
    assert embodiment.action_names == ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
    assert (embodiment.delta_actions, embodiment.gripper_actions) == (tuple(range(6)), (6,))
    digests, num_frames, num_actions, instructions = [], 0, 0, set()
    for episode_id in ids:
        episode = source.read_episode(episode_id)
        assert (episode.fps, list(episode.views)) == (5, ["image_0", "image_1", "image_2"])  # the fourth is black
        assert any("pictures of image_3 are the same: the view is left out" in note for note in episode.repairs)
        assert any("No step is marked as the last one" in note for note in episode.repairs)
        assert episode.actions is not None and episode.proprio is not None
        assert episode.actions.shape == episode.proprio.shape == (10, 7)
        num_frames += episode.num_frames
        num_actions += int(np.isfinite(episode.actions).all(axis=1).sum())
        instructions.add(episode.instruction)
        digests.append(episode.content_sha256)
    assert (num_frames, num_actions, len(instructions)) == (500, 500, 4)
    frames = {name: footage.read(range(10)) for name, footage in episode.views.items()}
    assert {one.shape for one in frames.values()} == {(10, 64, 64, 3)}
    assert all(one.std() > 20 for one in frames.values())
    assert len(set(digests)) == 25  # the two splits hold the same episodes, in another order
