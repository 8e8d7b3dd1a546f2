import io
import pickle
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs.loader import UserError
from data_pipeline.sources import Episode, RosConfig, Source, SourceError, detect_kind, open_source, ros_bag
from data_pipeline.sources.ros import RosImages
from data_pipeline.video_io import VideoError
from tests.data_pipeline.recordings import numbered_frames, read_numbers

pytest.importorskip("rosbags")
from rosbags.rosbag1 import Writer as Writer1
from rosbags.rosbag2 import (
    CompressionFormat,
    CompressionMode,
    StoragePlugin,
)
from rosbags.rosbag2 import Writer as Writer2
from rosbags.typesys import Stores, get_typestore

START_NS = 1_700_000_000 * 10**9
FORMATS = ("bag", "bag_lz4", "db3", "db3_file_zstd", "db3_message_zstd", "mcap", "mcap_zstd", "mcap_file", "db3_file")


@dataclass
class Recorder:
    """Messages, and how to write them down in each format."""

    is_ros1: bool
    messages: list[tuple[int, str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = get_typestore(Stores.ROS1_NOETIC if self.is_ros1 else Stores.ROS2_HUMBLE)

    def add(self, time_s: float, topic: str, message: Any) -> None:
        self.messages.append((START_NS + round(time_s * 1e9), topic, message))

    def make(self, name: str, *values: Any, **named: Any) -> Any:
        return self.store.types[name](*values, **named)

    def header(self, stamp_s: float = 0.0) -> Any:
        time_ns = (START_NS if stamp_s else 0) + round(stamp_s * 1e9)
        stamp = self.make("builtin_interfaces/msg/Time", time_ns // 10**9, time_ns % 10**9)
        sequence = {"seq": 0} if self.is_ros1 else {}
        return self.make("std_msgs/msg/Header", stamp=stamp, frame_id="", **sequence)

    def jpeg(self, number: int, stamp_s: float = 0.0, kind: str = "jpeg") -> Any:
        data = io.BytesIO()
        Image.fromarray(numbered_frames([number])[0]).save(data, kind)
        pixels = np.frombuffer(data.getvalue(), np.uint8)
        return self.make("sensor_msgs/msg/CompressedImage", self.header(stamp_s), kind, pixels)

    def raw(self, number: int, encoding: str = "bgr8", padding: int = 0) -> Any:
        pixels = numbered_frames([number])[0]
        channels = {"rgb8": [0, 1, 2], "bgr8": [2, 1, 0], "mono8": [0], "bgra8": [2, 1, 0, 0], "16UC1": [0]}[encoding]
        stored = np.pad(pixels[:, :, channels].reshape(len(pixels), -1), ((0, 0), (0, padding)))
        height, width, step = *pixels.shape[:2], stored.shape[1]
        return self.make("sensor_msgs/msg/Image", self.header(), height, width, encoding, 0, step, stored.reshape(-1))

    def joints(self, names: list[str], positions: list[float], stamp_s: float = 0.0) -> Any:
        values = np.array(positions, np.float64)
        return self.make("sensor_msgs/msg/JointState", self.header(stamp_s), names, values, 10 * values, values[:0])

    def floats(self, *values: float) -> Any:
        layout = self.make("std_msgs/msg/MultiArrayLayout", dim=[], data_offset=0)
        return self.make("std_msgs/msg/Float64MultiArray", layout, np.array(values, np.float64))

    def write(self, path: Path, kind: str) -> Path:
        """What rosbags' writers make of it: a `.bag`, a ROS 2 folder, or the file inside such a folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.is_ros1:
            writer: Any = Writer1(path := path.with_suffix(".bag"))
            if kind == "bag_lz4":
                writer.set_compression(Writer1.CompressionFormat.LZ4)
            serialize: Any = self.store.serialize_ros1
        else:
            plugin = StoragePlugin.MCAP if kind.startswith("mcap") else StoragePlugin.SQLITE3
            writer = Writer2(path, version=9, storage_plugin=plugin)
            modes = {"db3_file_zstd": "FILE", "db3_message_zstd": "MESSAGE", "mcap_zstd": "STORAGE"}
            if kind in modes:
                writer.set_compression(CompressionMode[modes[kind]], CompressionFormat.ZSTD)
            serialize = self.store.serialize_cdr
        with writer:
            connections = {
                (topic, message.__msgtype__): writer.add_connection(topic, message.__msgtype__, typestore=self.store)
                for topic, message in {
                    (topic, message.__msgtype__): (topic, message) for _, topic, message in self.messages
                }.values()
            }
            for time_ns, topic, message in sorted(self.messages, key=lambda row: row[0]):
                data = serialize(message, message.__msgtype__)
                writer.write(connections[topic, message.__msgtype__], time_ns, data)
        if kind in ("mcap_file", "db3_file"):
            (inside,) = [file for file in path.iterdir() if file.suffix in (".mcap", ".db3")]
            return inside.rename(path.with_suffix(inside.suffix))
        return path


def record(kind: str = "mcap", num_frames: int = 12, drop: tuple[int, ...] = ()) -> Recorder:
    """Frame i at i/10 s (the wrist 0.02 s later), commands [i, -i] at 0.03 + i/20 s, joints at i/50 s."""
    recorder = Recorder(is_ros1=kind.startswith("bag"))
    for i in range(num_frames):
        if i not in drop:
            recorder.add(i / 10, "/front/image_raw/compressed", recorder.jpeg(i))
            recorder.add(i / 10 + 0.02, "/wrist/image_raw", recorder.raw(100 + i))
    for i in range(2 * num_frames):
        recorder.add(0.03 + i / 20, "/arm/command", recorder.floats(i, -i))
    for i in range(5 * num_frames):
        order = (["b", "a"], [i + 0.5, i]) if i % 3 else (["a", "b"], [i, i + 0.5])
        recorder.add(i / 50, "/joint_states", recorder.joints(*order))
    return recorder


SETTINGS: dict[str, Any] = {"action_topics": ["/arm/command"], "proprio_topics": ["/joint_states"]}


def open_bags(path: Path, **settings: Any) -> Source:
    return open_source(RosConfig(path=path, **settings))


def read_one(path: Path, **settings: Any) -> Episode:
    source = open_bags(path, **settings)
    (episode_id,) = source.list_episodes()
    return source.read_episode(episode_id)


def reason(path: Path, **settings: Any) -> str:
    with pytest.raises(SourceError) as caught:
        read_one(path, **settings)
    return caught.value.reason


@contextmanager
def counting_messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    seen: list[str] = []
    deserialize = ros_bag.Bag._between

    def counted(self: Any, topic: str, start_ns: Any, stop_ns: Any) -> Any:
        for found in deserialize(self, topic, start_ns, stop_ns):
            seen.append(topic)
            yield found

    monkeypatch.setattr(ros_bag.Bag, "_between", counted)
    yield seen
    monkeypatch.undo()


# --- every format ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_an_episode_in_every_format(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = record(kind).write(tmp_path / "set" / "take 1", kind)
    assert detect_kind(tmp_path / "set") == detect_kind(path) == "ros"
    with counting_messages(monkeypatch) as seen:
        source = open_bags(tmp_path / "set", **SETTINGS)
        (episode_id,) = source.list_episodes()
        episode = source.read_episode(episode_id)
        assert not {"/front/image_raw/compressed", "/wrist/image_raw"} & set(seen)  # times come from the index
    assert set(episode_id) <= set("abcdefghijklmnopqrstuvwxyz0123456789_")
    assert (list(episode.views), episode.fps, episode.num_frames, episode.repairs) == (["wrist", "front"], 10, 11, ())
    assert (episode.control_hz, episode.embodiment, episode.instruction) == (20, "set", None)

    times = np.arange(episode.num_frames) / episode.fps  # time zero is 0.02 s, when the wrist camera starts
    for view, offset in (("front", 0), ("wrist", 100)):
        footage = episode.views[view]
        positions = footage.positions(times, episode.fps)
        assert read_numbers(footage.read(positions.tolist())) == [offset + i for i in range(11)]
        assert (footage.info().height, footage.info().width, footage.info().fps) == (48, 64, 10)

    assert episode.actions is not None
    assert episode.proprio is not None
    assert episode.control_times_s is not None
    np.testing.assert_array_equal(episode.actions, [[i, -i] for i in range(24)])
    np.testing.assert_allclose(episode.control_times_s, 0.01 + np.arange(24) / 20, atol=1e-6)
    held = np.floor((0.03 + np.arange(24) / 20) * 50 + 1e-6)  # the last joint state before each command
    np.testing.assert_array_equal(episode.proprio, np.stack([held, held + 0.5], axis=1))
    robot = source.embodiment()
    assert robot is not None
    assert (robot.action_names, robot.proprio_names) == (("data_0", "data_1"), ("a", "b"))


def test_mcap_by_its_reference_writer(tmp_path: Path) -> None:
    """Many compressed chunks and messages out of order; and a file whose chunks have no message index."""
    from mcap.writer import CompressionType, IndexType, Writer

    recorder = record()
    for name, index_types in (("all", IndexType.ALL), ("none", IndexType.ALL & ~IndexType.MESSAGE)):
        with (tmp_path / f"{name}.mcap").open("wb") as file:
            writer = Writer(file, chunk_size=4000, compression=CompressionType.LZ4, index_types=index_types)
            writer.start("ros2")
            channels: dict[str, int] = {}
            order = sorted(recorder.messages, key=lambda row: row[0])
            for time_ns, topic, message in [*order[1::2], *order[::2]]:
                if topic not in channels:
                    text, _ = recorder.store.generate_msgdef(message.__msgtype__, ros_version=2)
                    schema = writer.register_schema(message.__msgtype__, "ros2msg", text.encode())
                    channels[topic] = writer.register_channel(topic, "cdr", schema)
                data = bytes(recorder.store.serialize_cdr(message, message.__msgtype__))
                writer.add_message(channels[topic], time_ns, data, time_ns)
                writer.finish()
        if name == "none":
            assert reason(tmp_path / "none.mcap", **SETTINGS) == "unreadable_file"
            return
        episode = read_one(tmp_path / f"{name}.mcap", **SETTINGS)
        np.testing.assert_array_equal(episode.actions, [[i, -i] for i in range(24)])
        footage = episode.views["wrist"]
        assert read_numbers(footage.read([9, 0, 11, 9])) == [109, 100, 111, 109]


def test_ros_2_recordings_that_do_not_define_their_types(tmp_path: Path) -> None:
    path = record("db3").write(tmp_path / "old", "db3")
    with sqlite3.connect(path / "old.db3") as database:
        database.execute("DELETE FROM message_definitions")
    assert read_one(path, **SETTINGS).actions is not None


# --- clocks ----------------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(data=st.data())
def test_a_frame_is_the_one_nearest_in_time(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    gaps = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=20))
    stamps = np.concatenate([[0], np.cumsum(gaps)]) / 1000
    recorder = Recorder(is_ros1=False)
    for i, stamp in enumerate(stamps):
        recorder.add(float(stamp), "/camera", recorder.raw(i))
    footage = read_one(recorder.write(tmp_path_factory.mktemp("bags") / "a", "mcap")).views["camera"]
    times = np.array(data.draw(st.lists(st.floats(0, float(stamps[-1])), min_size=1, max_size=10)))
    shown = read_numbers(footage.read(footage.positions(times, 30.0).tolist()))
    distance = np.abs(stamps[None] - times[:, None])
    np.testing.assert_allclose(np.abs(stamps[shown] - times), distance.min(axis=1), atol=1e-6)


def test_dropped_images_are_told_and_bridged(tmp_path: Path) -> None:
    path = record(drop=(3, 4, 5, 6, 7)).write(tmp_path / "a", "mcap")
    episode = read_one(path, image_topics={"front": "/front/image_raw/compressed"})
    assert (episode.fps, episode.num_frames) == (10, 12)
    assert episode.repairs[0].startswith("The images of /front/image_raw/compressed pause for up to 0.60 s")
    footage = episode.views["front"]
    times = np.arange(12) / 10
    shown = read_numbers(footage.read(footage.positions(times, 10).tolist()))
    assert shown == [0, 1, 2, 2, 2, 2, 8, 8, 8, 9, 10, 11] or shown == [0, 1, 2, 2, 2, 8, 8, 8, 8, 9, 10, 11]


def test_times_of_the_headers(tmp_path: Path) -> None:
    """Images arrive late and out of order; their headers say when they were taken. An unset stamp means nothing."""
    recorder = Recorder(is_ros1=False)
    for i, arrives in enumerate((0.30, 0.28, 0.5, 0.6)):
        recorder.add(arrives, "/camera", recorder.jpeg(i, stamp_s=1 + i / 10))
        recorder.add(2 + i / 10, "/command", recorder.joints(["a"], [i], stamp_s=1 + i / 10))
    path = recorder.write(tmp_path / "a", "mcap")
    for header_times, expected in ((True, [0, 1, 2, 3]), (False, [1, 0, 2, 3])):
        episode = read_one(path, action_topics=["/command"], header_times=header_times)
        footage = episode.views["camera"]
        assert read_numbers(footage.read([0, 1, 2, 3])) == expected
        assert episode.control_times_s is not None
        np.testing.assert_allclose(episode.control_times_s[0], 0 if header_times else 1.72, atol=1e-6)
    unset = record().write(tmp_path / "unset", "mcap")
    assert read_one(unset, **SETTINGS, header_times=True).num_frames == 11


def test_only_wanted_images_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = record(num_frames=60).write(tmp_path / "a", "db3")
    footage = read_one(path).views["front"]
    with counting_messages(monkeypatch) as seen:
        assert read_numbers(footage.read([50, 3, 5, 3])) == [50, 3, 5, 3]
        assert len(seen) == 4  # 3, 4, 5 in one go, and 50


# --- what a message holds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "mono8", "bgra8"])
def test_raw_images(tmp_path: Path, encoding: str) -> None:
    recorder = Recorder(is_ros1=False)
    for i in range(3):
        recorder.add(i / 10, "/image_raw", recorder.raw(i, encoding, padding=7))
    footage = read_one(recorder.write(tmp_path / "a", "mcap"), image_topics={"main": "/image_raw"}).views["main"]
    np.testing.assert_array_equal(footage.read([2, 0]), numbered_frames([2, 0]))


def test_colours_are_not_swapped(tmp_path: Path) -> None:
    recorder = Recorder(is_ros1=False)
    red = np.zeros((4, 4, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    message = recorder.raw(0)
    message.height, message.width, message.step, message.data = 4, 4, 12, red[:, :, ::-1].reshape(-1)
    recorder.add(0, "/image_raw", message)
    encoded = io.BytesIO()
    Image.fromarray(red).save(encoded, "PNG")
    png = recorder.make(
        "sensor_msgs/msg/CompressedImage", recorder.header(), "png", np.frombuffer(encoded.getvalue(), np.uint8)
    )
    recorder.add(0, "/png/compressed", png)
    views = read_one(
        recorder.write(tmp_path / "a", "mcap"), image_topics={"a": "/image_raw", "b": "/png/compressed"}
    ).views
    for footage in views.values():
        np.testing.assert_array_equal(footage.read([0])[0], red)


def test_fields_of_messages(tmp_path: Path) -> None:
    recorder = record()
    pose = recorder.make(
        "geometry_msgs/msg/PoseStamped",
        recorder.header(),
        recorder.make(
            "geometry_msgs/msg/Pose",
            recorder.make("geometry_msgs/msg/Point", 1, 2, 3),
            recorder.make("geometry_msgs/msg/Quaternion", 0, 0, 0, 1),
        ),
    )
    recorder.add(0.0, "/pose", pose)
    recorder.add(0.0, "/gripper", recorder.make("std_msgs/msg/Bool", True))
    recorder.add(0.0, "/task", recorder.make("std_msgs/msg/String", " open the\ndrawer "))
    path = recorder.write(tmp_path / "a", "mcap")
    source = open_bags(
        path,
        action_topics=["/arm/command:data", "/gripper"],
        proprio_topics=["/pose", "/joint_states:velocity", "/pose:pose.position.y"],
        instruction_topic="/task",
    )
    episode = source.read_episode(source.list_episodes()[0])
    robot = source.embodiment()
    assert robot is not None
    assert robot.action_names == ("arm.command.data_0", "arm.command.data_1", "gripper.data")
    assert robot.gripper_actions == (2,)
    assert robot.proprio_names[:3] == ("pose.pose.position.x", "pose.pose.position.y", "pose.pose.position.z")
    assert robot.proprio_names[7:] == ("joint_states.velocity.a", "joint_states.velocity.b", "pose.pose.position.y")
    assert episode.proprio is not None
    np.testing.assert_array_equal(episode.proprio[0], [1, 2, 3, 0, 0, 0, 1, 10, 15, 2])
    np.testing.assert_array_equal(episode.actions[:, 2], 1)  # type: ignore[index]
    assert episode.instruction == "open the drawer"


def test_messages_of_other_joints_are_skipped(tmp_path: Path) -> None:
    recorder = record()
    recorder.add(0.5, "/joint_states", recorder.joints(["finger"], [3.0]))
    episode = read_one(recorder.write(tmp_path / "a", "mcap"), **SETTINGS)
    assert episode.repairs == (
        "1 messages of /joint_states name or hold other numbers than its first: they are skipped.",
    )
    assert episode.proprio is not None
    assert episode.proprio.shape[1] == 2


def test_without_action_topics_it_is_video(tmp_path: Path) -> None:
    path = record().write(tmp_path / "a", "mcap")
    source = open_bags(path)
    episode = source.read_episode(source.list_episodes()[0])
    assert (episode.actions, episode.control_hz, source.embodiment()) == (None, None, None)
    (note,) = source.notes()  # type: ignore[attr-defined]
    assert "/arm/command (std_msgs/msg/Float64MultiArray), /joint_states" in note
    assert open_bags(path, **SETTINGS).notes() == []  # type: ignore[attr-defined]


def test_footage_travels_between_processes(tmp_path: Path) -> None:
    footage = read_one(record().write(tmp_path / "a", "mcap")).views["front"]
    assert isinstance(footage, RosImages)
    data = pickle.dumps(footage)
    assert len(data) < 1000
    assert read_numbers(pickle.loads(data).read([7])) == [7]


# --- what is wrong ---------------------------------------------------------------------------------------------------


def test_topics_that_do_not_fit(tmp_path: Path) -> None:
    recorder = record()
    recorder.add(0, "/depth/image_raw", recorder.raw(0, "mono8"))
    recorder.add(0, "/late", recorder.floats(1))
    path = recorder.write(tmp_path / "a", "mcap")
    assert list(read_one(path).views) == ["wrist", "front"]  # no depth
    assert reason(path, image_topics={"main": "/absent"}) == "missing_view"
    assert reason(path, image_topics={"main": "/joint_states"}) == "missing_view"
    assert reason(path, action_topics=["/absent"]) == "missing_topic"
    assert reason(path, action_topics=["/arm/command:layout.nothing"]) == "bad_record"
    only = Recorder(is_ros1=False)
    only.add(0, "/joint_states", only.joints(["a"], [1.0]))
    assert reason(only.write(tmp_path / "no images", "mcap")) == "no_images"


@pytest.mark.parametrize("kind", ["bag", "bag_lz4", "mcap_file", "db3_file"])
def test_damaged_recordings_are_their_own_problem(tmp_path: Path, kind: str) -> None:
    whole = record(kind).write(tmp_path / "set" / "good", kind)
    data = whole.read_bytes()
    contents = {
        "cut": data[: len(data) // 2],
        "cut_short": data[:-20],
        "empty": b"",
        "text": b"no recording",
        "pointer": b"version https://git-lfs.github.com/spec/v1\n",
        "zeros": data[:200] + bytes(len(data) - 200),
    }
    for name, content in contents.items():
        (tmp_path / "set" / f"{name}{whole.suffix}").write_bytes(content)
    source = open_bags(tmp_path / "set", **SETTINGS)
    found: dict[str, Any] = {}
    for episode_id in source.list_episodes():
        name = episode_id.rpartition("_")[0]
        try:
            episode = source.read_episode(episode_id)
            pixels = [footage.read(range(11)) for footage in episode.views.values()]
            found[name] = len(pixels)
        except (SourceError, VideoError) as error:
            found[name] = error.reason
    assert found.pop("good") == 2
    if kind == "db3_file":  # SQLite notices a cut page only when it comes to it
        assert found.pop("cut_short") in (2, "unreadable_file")
    assert set(found.values()) == {"unreadable_file"}
    assert source.embodiment() is not None


def test_images_that_do_not_decode(tmp_path: Path) -> None:
    recorder = Recorder(is_ros1=False)
    depth = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(depth, "PNG")
    cut = recorder.jpeg(0)
    cut.data = cut.data[: len(cut.data) // 2]
    deep = recorder.jpeg(0)
    deep.data = np.frombuffer(depth.getvalue(), np.uint8)
    text = recorder.jpeg(0)
    text.data = np.frombuffer(b"no picture", np.uint8)
    short = recorder.raw(0)
    short.data = short.data[:100]
    for name, message in {
        "cut": cut,
        "deep": deep,
        "text": text,
        "short": short,
        "other": recorder.raw(0, "16UC1"),
    }.items():
        recorder.add(0, f"/{name}", message)
    recorder.add(0, "/changing", recorder.raw(0))
    small = recorder.raw(0)
    small.height = 24
    recorder.add(1, "/changing", small)
    path = recorder.write(tmp_path / "a", "mcap")
    for topic, positions in [
        ("cut", [0]),
        ("deep", [0]),
        ("text", [0]),
        ("short", [0]),
        ("other", [0]),
        ("changing", [0, 1]),
    ]:
        footage = read_one(path, image_topics={"main": f"/{topic}"}).views["main"]
        with pytest.raises(VideoError) as caught:
            footage.read(positions)
        assert caught.value.reason == "undecodable_video", topic


def test_unusable_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        open_bags(tmp_path / "absent").list_episodes()
    with pytest.raises(UserError, match="no ROS recordings"):
        open_bags(tmp_path).list_episodes()


def test_an_episode_keeps_its_id_when_recordings_are_added(tmp_path: Path) -> None:
    record().write(tmp_path / "b", "mcap")
    before = open_bags(tmp_path).list_episodes()
    record("bag").write(tmp_path / "a", "bag")
    record().write(tmp_path / "deep" / "er", "mcap_file")
    after = open_bags(tmp_path).list_episodes()
    assert set(before) < set(after)
    assert len(after) == 3 or len(after) == 4  # the folder that held the single file is left over
