from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.sources.tfrecord import (
    Feature,
    RecordError,
    index_records,
    masked_crc32c,
    parse_example,
    parse_sequence_example,
    read_record,
)
from tests.data_pipeline.tfrecord_writer import example, feature, features, field, tfrecord, varint

INT64 = st.integers(-(2**63), 2**63 - 1)
VALUES = st.one_of(
    st.lists(st.binary(max_size=20), max_size=5),
    st.lists(st.floats(width=32), max_size=5).map(lambda one: np.asarray(one, np.float32)),
    st.lists(INT64, max_size=5).map(lambda one: np.asarray(one, np.int64)),
)


def plain(found: Feature, data: bytes) -> Any:
    return found.tobytes() if isinstance(found, np.ndarray) else [data[place] for place in found]


def wanted(values: Any) -> Any:
    return values.tobytes() if isinstance(values, np.ndarray) else list(values)


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_checksum_is_that_of_the_reference() -> None:
    assert masked_crc32c(b"123456789") == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) % 2**32  # RFC 3720


@given(payloads=st.lists(st.binary(max_size=40), max_size=6))
def test_every_record_comes_back(payloads: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("records") / "a.tfrecord"
    path.write_bytes(tfrecord(payloads))
    index = index_records(path)
    assert (len(index.starts), index.damage) == (len(payloads), None)
    for number in reversed(range(len(payloads))):
        record = read_record(path, number)
        assert record.data == payloads[number]
        assert path.read_bytes()[record.start :].startswith(payloads[number])


def test_the_index_reads_headers_only(tmp_path: Path) -> None:
    path = tmp_path / "a"
    data = bytearray(tfrecord([b"first", b"second"]))
    data[14] ^= 1  # in the first payload
    path.write_bytes(data)
    assert index_records(path).sizes.tolist() == [5, 6]
    with pytest.raises(RecordError, match="record 0 fails its checksum") as error:
        read_record(path, 0)
    assert error.value.reason == "bad_record"
    assert read_record(path, 1).data == b"second"


def test_records_before_the_damage_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a"
    whole = tfrecord([b"first", b"second", b"third"])
    for cut in (len(whole) - 1, len(whole) - 18):
        path.write_bytes(whole[:cut])
        assert read_record(path, 1).data == b"second"
        with pytest.raises(RecordError, match="ends in the middle of record 2") as error:
            read_record(path, 2)
        assert error.value.reason == "truncated_file"
    data = bytearray(whole)
    data[16 + 5] ^= 255  # the second length
    path.write_bytes(data)
    assert read_record(path, 0).data == b"first"
    with pytest.raises(RecordError, match="the length of record 1 fails its checksum"):
        read_record(path, 1)


def test_a_file_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(tfrecord([b"one"]))
    assert read_record(path, 0).data == b"one"
    path.write_bytes(tfrecord([b"another", b"two"]))
    assert read_record(path, 1).data == b"two"


@pytest.mark.parametrize(
    ("content", "reason", "match"),
    [
        (b"", "missing_record", "has 0 records"),
        (b"some text that is long enough to be a header", "not_a_tfrecord", "no record"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "not_a_tfrecord", "git lfs pull"),
        (b"\x1f\x8b\x08" + bytes(40), "not_a_tfrecord", "gunzip"),
        (b"short", "truncated_file", "record 0"),
    ],
)
def test_what_is_no_tfrecord_is_named(content: bytes, reason: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(RecordError, match=match) as error:
        read_record(tmp_path / "a", 0)
    assert error.value.reason == reason
    with pytest.raises(RecordError, match="no such file"):
        read_record(tmp_path / "absent", 0)


# --- messages --------------------------------------------------------------------------------------------------------


@given(values=st.dictionaries(st.text(max_size=8), VALUES, max_size=5), is_packed=st.booleans())
def test_examples_come_back(values: dict[str, Any], is_packed: bool) -> None:
    data = example(values, is_packed)
    found = parse_example(data)
    assert found.keys() == values.keys()
    for name, one in values.items():
        assert plain(found[name], data) == wanted(one)


@given(values=st.dictionaries(st.text(max_size=8), st.lists(VALUES, max_size=3), max_size=3))
def test_sequence_examples_come_back(values: dict[str, list[Any]]) -> None:
    lists = [
        field(1, field(1, name.encode()) + field(2, b"".join(field(1, feature(one)) for one in ones)))
        for name, ones in values.items()
    ]
    data = field(1, features({"id": np.array([7])})) + field(2, b"".join(lists))
    context, found = parse_sequence_example(data)
    assert context["id"].tolist() == [7]
    assert {name: [plain(one, data) for one in ones] for name, ones in found.items()} == {
        name: [wanted(one) for one in ones] for name, ones in values.items()
    }


def reference_messages() -> Iterator[bytes]:
    """`tf.train.Example` as the protobuf library itself writes it."""
    descriptor_pb2 = pytest.importorskip("google.protobuf.descriptor_pb2")
    from google.protobuf import descriptor_pool, message_factory

    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tf", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, str | None, bool], is_entry: bool = False) -> Any:
        one = descriptor_pb2.DescriptorProto(name=name)
        one.options.map_entry = is_entry
        for text, number, kind, type_name, is_repeated in fields:
            label = field_type.LABEL_REPEATED if is_repeated else field_type.LABEL_OPTIONAL
            one.field.add(name=text, number=number, type=kind, type_name=type_name, label=label)
        return one

    nested = field_type.TYPE_MESSAGE
    maps = message("Features", ("feature", 1, nested, ".tf.Features.FeatureEntry", True))
    entry = [("key", 1, field_type.TYPE_STRING, None, False), ("value", 2, nested, ".tf.Feature", False)]
    maps.nested_type.append(message("FeatureEntry", *entry, is_entry=True))
    lists = {"BytesList": field_type.TYPE_BYTES, "FloatList": field_type.TYPE_FLOAT, "Int64List": field_type.TYPE_INT64}
    file.message_type.extend(message(name, ("value", 1, kind, None, True)) for name, kind in lists.items())
    kinds = [(f"kind_{i}", i, nested, f".tf.{name}", False) for i, name in enumerate(lists, 1)]
    file.message_type.extend([message("Feature", *kinds), maps])
    file.message_type.append(message("Example", ("features", 1, nested, ".tf.Features", False)))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    new = message_factory.GetMessageClass(pool.FindMessageTypeByName("tf.Example"))
    one = new()
    one.features.feature["steps/action"].kind_2.value.extend([0.5, -1.25, 3e38])
    one.features.feature["steps/is_last"].kind_3.value.extend([0, 1, -1, 2**63 - 1, -(2**63)])
    one.features.feature["steps/image"].kind_1.value.extend([b"\xff\xd8\xff", b"", b"x" * 300])
    one.features.feature["empty"].kind_3.SetInParent()
    yield one.SerializeToString()


def test_messages_of_the_protobuf_library_are_read() -> None:
    for data in reference_messages():
        found = parse_example(data)
        assert found["steps/action"].tolist() == np.float32([0.5, -1.25, 3e38]).tolist()
        assert found["steps/is_last"].tolist() == [0, 1, -1, 2**63 - 1, -(2**63)]
        assert plain(found["steps/image"], data) == [b"\xff\xd8\xff", b"", b"x" * 300]
        assert len(found["empty"]) == 0


@given(data=st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for parse in (parse_example, parse_sequence_example):
        try:
            parse(data)
        except RecordError as error:
            assert error.reason == "bad_record"


@given(values=st.dictionaries(st.text(max_size=4), VALUES, min_size=1, max_size=3), data=st.data())
def test_a_damaged_message_is_read_or_refused(values: dict[str, Any], data: st.DataObject) -> None:
    message = bytearray(example(values))
    message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    try:
        parse_example(bytes(message))
    except RecordError as error:
        assert error.reason == "bad_record"


@pytest.mark.parametrize(
    "bad", [field(3, field(1, b"\x80")), field(3, field(1, b"\x80" * 11 + b"\x01")), field(2, b"\x0a\x03abc")]
)
def test_numbers_without_an_end_are_refused(bad: bytes) -> None:
    entry = field(1, b"name") + field(2, bad)
    with pytest.raises(RecordError):
        parse_example(field(1, field(1, entry)))


def test_varints_of_the_writer_are_canonical() -> None:
    assert (varint(0), varint(300), len(varint(-1))) == (b"\x00", b"\xac\x02", 10)
