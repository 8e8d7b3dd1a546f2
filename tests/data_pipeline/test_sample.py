"""The sample: to bytes and back, and every way to break its contract is named."""

import io
import json
from tokenize import TokenError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save

from data_pipeline.sample import Sample, array_bytes, read_array, read_tensor, tensor_bytes, validate
from tests.data_pipeline.tiny_dataset import tiny_sample


@pytest.mark.parametrize("has_actions", [True, False])
@pytest.mark.parametrize("text", ["push it", None])
def test_a_sample_survives_its_members(has_actions, text):
    sample = tiny_sample(1, 2, has_actions=has_actions, text=text)
    members = sample.to_members()
    assert validate(members) == []
    back = Sample.from_members(members)
    assert back.key == sample.key and back.meta == sample.meta and back.video == sample.video
    torch.testing.assert_close(back.latents, sample.latents)
    assert (back.text is None) == (text is None)
    assert (back.actions is None) == (back.proprio is None) == (not has_actions)
    if has_actions:
        np.testing.assert_array_equal(back.actions, sample.actions)
    assert back.to_members() == members


def test_a_member_is_absent_rather_than_empty():
    assert set(tiny_sample(0, 0, has_actions=False, text=None).to_members()) == {
        "__key__",
        "front.latents.safetensors",
        "front.mp4",
        "meta.json",
    }


def changed_meta(**changes):
    def change(members):
        members["meta.json"] = json.dumps(json.loads(members["meta.json"]) | changes).encode()

    return change


def replaced(name, data):
    return lambda members: members.update({name: data})


def without(name):
    return lambda members: members.pop(name)


BROKEN = {
    "a dot in the key": (replaced("__key__", "clip.5s"), "clip.5s: __key__: expected letters, digits"),
    "no meta": (without("meta.json"), "meta.json: expected present, found absent"),
    "meta is no JSON": (replaced("meta.json", b"{"), "meta.json: expected Invalid JSON"),
    "an unknown meta key": (changed_meta(speed=1), "meta.json speed: expected Extra inputs"),
    "another schema": (changed_meta(schema_version=99), "schema_version: expected 1, found 99"),
    "frames the codec cannot take": (changed_meta(num_frames=6), "num_frames: expected 1, 5, 9, 13, …, found 6"),
    "a view without video": (without("front.mp4"), "front.mp4: expected present, found absent"),
    "a member of no view": (replaced("side.mp4", b"x"), "side.mp4: expected no such member, found 1 bytes"),
    "a pickle": (replaced("extra.pickle", b"x"), "extra.pickle: expected no such member"),
    "an empty member": (replaced("front.mp4", b""), "front.mp4: expected absent rather than empty"),
    "latents of another type": (
        replaced("front.latents.safetensors", tensor_bytes("latents", torch.zeros(2, 6, 4, 4))),
        "front.latents.safetensors: expected bfloat16 [t c h w], found float32 [2, 6, 4, 4]",
    ),
    "too few latent frames": (
        replaced("front.latents.safetensors", tensor_bytes("latents", torch.zeros(1, 6, 4, 4).bfloat16())),
        "expected t = 2 latent frames, found 1",
    ),
    "NaN latents": (
        replaced("front.latents.safetensors", tensor_bytes("latents", torch.full((2, 6, 4, 4), torch.nan).bfloat16())),
        "expected finite numbers, found NaN",
    ),
    "a tensor under another name": (
        replaced("text.safetensors", tensor_bytes("words", torch.zeros(2, 8).bfloat16())),
        "text.safetensors: expected one tensor \"text\", found ['words']",
    ),
    "no safetensors": (replaced("text.safetensors", b"garbage"), "text.safetensors: expected safetensors"),
    "text out of nowhere": (changed_meta(instruction=None, captions=[]), "text.safetensors: expected absent"),
    "actions unannounced": (changed_meta(has_actions=False), "actions.npy: expected as has_actions=false says"),
    "actions missing": (without("actions.npy"), "actions.npy: expected as has_actions=true says, found absent"),
    "too few actions": (replaced("actions.npy", array_bytes(np.zeros((7, 3), np.float32))), "expected k = 8 rows"),
    "double actions": (replaced("actions.npy", array_bytes(np.zeros((8, 3)))), "expected float32 [k a], found float64"),
    "an array of objects": (
        replaced("actions.npy", array_bytes(np.zeros((8, 3), np.float32)).replace(b"<f4", b"|O ")),
        "actions.npy: expected a .npy file without pickles",
    ),
    "a rate that is no multiple": (changed_meta(control_hz=25.0), "control_hz: expected a whole multiple of fps=10"),
    "spans past the end": (changed_meta(action_spans=[[0, 9]]), "action_spans: expected rows within 0..8"),
    "a view name with a dot": (
        changed_meta(views={"a.b": {"height": 1, "width": 1, "role": "external"}}),
        "meta.json views: expected lower-case letters",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_named(name):
    change, message = BROKEN[name]
    members = tiny_sample(0, 0).to_members()
    change(members)
    problems = validate(members)
    assert any(message in problem for problem in problems), problems
    assert all(problem.startswith(f"{members['__key__']}: ") for problem in problems)


# --- members as bytes ---------------------------------------------------------------------------------------------


LIBRARIES = (ValueError, KeyError, SyntaxError, TokenError, OverflowError, MemoryError, SafetensorError)


def result_of(read, data, errors=LIBRARIES):
    """What is read, or that it cannot be."""
    try:
        return read(data)
    except errors:
        return "an error"


@st.composite
def damaged(draw, data):
    """The data whole, with a few bits flipped, or cut."""
    changed = bytearray(data)
    for position in draw(st.lists(st.integers(0, len(data) - 1), max_size=2)):
        changed[position] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed[: draw(st.integers(0, len(data)))]) if draw(st.booleans()) else bytes(changed)


ARRAYS = {
    "actions": array_bytes(np.arange(24, dtype=np.float32).reshape(8, 3)),
    "doubles": array_bytes(np.arange(3.0)),
    "nothing": array_bytes(np.zeros((0, 4), np.float32)),
    "a number": array_bytes(np.float32(3)),
    "objects": array_bytes(np.zeros((8, 3), np.float32)).replace(b"<f4", b"|O "),
    "columns first": array_bytes(np.zeros((8, 3), np.float32)).replace(b"False", b"True "),
}


@pytest.mark.parametrize("name", ARRAYS)
@settings(max_examples=60)
@given(data=st.data())
def test_arrays_are_read_as_numpy_reads_them(name, data):
    data = data.draw(damaged(ARRAYS[name]))
    expected = result_of(lambda data: np.lib.format.read_array(io.BytesIO(data)), data)
    found = result_of(read_array, data, ValueError)
    assert isinstance(found, str) == isinstance(expected, str)
    if isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape, found.flags.writeable) == (expected.dtype, expected.shape, True)
        assert found.tobytes() == expected.tobytes()


TENSORS = {
    "latents": tensor_bytes("latents", torch.arange(96.0).reshape(2, 6, 8).bfloat16()),
    "single numbers": tensor_bytes("latents", torch.arange(5.0)),
    "nothing": tensor_bytes("latents", torch.zeros(0, 3)),
    "two": save({"latents": torch.ones(2), "more": torch.zeros(3)}),
}


@pytest.mark.parametrize("name", TENSORS)
@settings(max_examples=60)
@given(data=st.data(), kind=st.sampled_from([bytes, bytearray, lambda data: memoryview(bytearray(data))]))
def test_tensors_are_read_as_safetensors_reads_them(name, data, kind):
    read_tensor("latents", TENSORS[name])  # so that this kind is known
    data = data.draw(damaged(TENSORS[name]))
    expected = result_of(lambda data: load(data)["latents"], data)
    found = result_of(lambda data: read_tensor("latents", kind(data)), data, (ValueError, KeyError))
    assert found == expected if isinstance(expected, str) else same_bits(found, expected)
    with pytest.raises((KeyError, ValueError)):
        read_tensor("others", kind(data))


def same_bits(one, other):
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8)
    )
