"""Whatever a member of a sample holds: the sample is read, or told as a bad one. Nothing else is raised."""

import io
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.augment import AugmentConfig
from data_pipeline.clips import ClipConfig, ClipDataset
from data_pipeline.dataset_index import BadSampleError, DatasetIndex
from tests.data_pipeline.tiny_dataset import tiny_dataset

READINGS = {
    "latents": ClipConfig(text_length=4),
    "both": ClipConfig(text_length=4, reads="both", check_sha256=True),
    "moving video": ClipConfig(
        text_length=4, reads="video", crop_frames=5, augment=AugmentConfig(random_start=True, speed=(0.5, 1.5))
    ),
}
NUMBERS = [0, -1, 1, 7, 2**31, 2**40, 2**63, 2**70, 1e308, -1e308, 5e-324, 0.5]
VALUES = [*NUMBERS, None, True, "x", "", [], {}, [[0, 2**40]], [[-5, 3]], [[3, 1]], {"front": {}}]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return DatasetIndex(tiny_dataset(tmp_path_factory.mktemp("damaged") / "dataset", clips=(3,), num_frames=9))


@pytest.fixture(scope="module")
def members(index):
    return {suffix: bytes(data) for suffix, data in index.read_sample(0).items() if suffix != "__key__"}


def npy(shape: object, descr: str, data: bytes = b"") -> bytes:
    """As `np.save` writes it, of a header that need not be true."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": descr})
    return file.getvalue() + data


def safetensors(name: str, **entry: object) -> bytes:
    header = json.dumps({name: {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2], **entry}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(64)


@st.composite
def damaged(draw, members):
    changed = dict(members)
    suffix = draw(st.sampled_from(sorted(members)))
    data = bytearray(members[suffix])
    kinds = ["bytes", "cut", "gone", "another", "empty"]
    if suffix.endswith((".json", ".npy", ".safetensors")):
        kinds += ["value"] * 5
    kind = draw(st.sampled_from(kinds))
    if kind == "bytes":
        for _ in range(draw(st.integers(1, 5))):
            # Headers stand in front; most of a video is pixels.
            data[draw(st.integers(0, min(len(data), 400) - 1))] = draw(st.integers(0, 255))
    elif kind == "cut":
        del data[draw(st.integers(0, len(data) - 1)) :]
    elif kind == "another":
        data = members[draw(st.sampled_from(sorted(members)))]
    elif kind == "empty":
        data = b""
    elif suffix.endswith(".json"):
        meta = json.loads(data)
        meta[draw(st.sampled_from(sorted(meta)))] = draw(st.sampled_from(VALUES))
        data = json.dumps(meta).encode()
    elif suffix.endswith(".npy"):
        size = st.sampled_from([0, 1, 2, 3, 16, 2**20, 2**40, 2**62])
        shape = tuple(draw(st.lists(size, max_size=3)))
        data = npy(shape, draw(st.sampled_from(["<f4", "<f8", "<i8", "|O", "|S5", "<M8[s]", "<c8", "|b1"])), bytes(400))
    elif suffix.endswith(".safetensors"):
        shape = draw(st.lists(st.sampled_from([0, 1, 3, 6, 2**20, 2**62]), max_size=5))
        ends = draw(st.tuples(st.sampled_from([0, 5]), st.sampled_from([0, 2, 64, 2**40, 2**63])))
        dtype = draw(st.sampled_from(["BF16", "F32", "I64", "F8_E4M3", "BOOL", "X"]))
        name = suffix.split(".")[-2]
        data = safetensors(name, shape=shape, data_offsets=ends, dtype=dtype)
    changed[suffix] = bytes(data)
    if kind == "gone":
        del changed[suffix]
    return changed


@pytest.mark.parametrize("reading", READINGS)
def test_a_sample_is_read_or_told(index, members, reading, monkeypatch):
    clips = ClipDataset(index, READINGS[reading])

    @settings(max_examples=200, suppress_health_check=list(HealthCheck))
    @given(damaged(members))
    def check(changed):
        with monkeypatch.context() as patch:
            patch.setattr(index, "read_sample", lambda *_, **__: {"__key__": "key000-0000", **changed})
            try:
                clips.read(0, place=(0, 0, 0))
            except BadSampleError as error:
                assert "\n" not in str(error)

    check()
