"""What recorders write as a rotation, read and written back; the conventions held against matrices written out here."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from data_pipeline.rotations import FORMATS, NUM_VALUES, decode, encode, interpolate, is_rotation

forms = st.sampled_from(sorted(NUM_VALUES))
seeds = st.integers(0, 2**32 - 1)


def about(axis, angle):
    """The textbook matrix of a turn about x, y or z."""
    c, s = np.cos(angle), np.sin(angle)
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[[i, j], [i, j]] = c
    matrix[i, j], matrix[j, i] = -s, s
    return matrix


@given(forms, st.booleans(), seeds)
def test_every_format_says_the_rotation(form, in_degrees, seed):
    rotations = Rotation.random(10, random_state=seed)
    values = encode(rotations, form, in_degrees)
    assert values.shape == (10, NUM_VALUES[form])
    np.testing.assert_allclose(decode(values, form, in_degrees).as_matrix(), rotations.as_matrix(), atol=1e-7)


def test_the_conventions_are_the_ones_described():
    assert FORMATS.keys() == NUM_VALUES.keys()
    a, b, c = 0.3, -0.7, 1.1
    angles = np.array([[a, b, c]])
    extrinsic = about("z", c) @ about("y", b) @ about("x", a)
    intrinsic = about("x", a) @ about("y", b) @ about("z", c)
    np.testing.assert_allclose(decode(angles, "euler_xyz_extrinsic").as_matrix()[0], extrinsic, atol=1e-12)
    np.testing.assert_allclose(decode(angles, "euler_xyz_intrinsic").as_matrix()[0], intrinsic, atol=1e-12)
    np.testing.assert_allclose(decode(np.rad2deg(angles), "euler_xyz_intrinsic", True).as_matrix()[0], intrinsic)
    np.testing.assert_allclose(decode(np.array([[0, 0, c]]), "axis_angle").as_matrix()[0], about("z", c), atol=1e-12)
    half = np.array([[0, 0, np.sin(c / 2), np.cos(c / 2)]])
    np.testing.assert_allclose(decode(half, "quaternion_xyzw").as_matrix()[0], about("z", c), atol=1e-12)
    np.testing.assert_allclose(decode(half[:, [3, 0, 1, 2]], "quaternion_wxyz").as_matrix()[0], about("z", c))
    columns, rows = extrinsic[:, :2].T.reshape(1, 6), extrinsic[:2].reshape(1, 6)
    np.testing.assert_allclose(decode(columns, "six_d_columns").as_matrix()[0], extrinsic, atol=1e-12)
    np.testing.assert_allclose(decode(rows, "six_d_rows").as_matrix()[0], extrinsic, atol=1e-12)


@given(forms, seeds)
def test_the_spelling_follows_the_values_nearby(form, seed):
    """Other spellings of the same rotation come back as they are."""
    rng = np.random.default_rng(seed)
    values = encode(Rotation.from_rotvec(rng.normal(0, 0.5, (5, 3))), form)
    spellings = [values]
    if form.startswith("quaternion"):
        spellings.append(-values)
    elif form == "axis_angle":
        spellings.append(values * (1 + 2 * np.pi / np.linalg.norm(values, axis=1, keepdims=True)))
    elif form.startswith("euler"):
        spellings += [values + np.array([0, 0, 2 * np.pi]), np.full(3, np.pi) + values * [1, -1, 1]]
    for spelled in spellings:
        np.testing.assert_allclose(decode(spelled, form).as_matrix(), decode(values, form).as_matrix(), atol=1e-9)
        np.testing.assert_allclose(encode(decode(spelled, form), form, near=spelled), spelled, atol=1e-6)


def test_no_turn_is_spelled_like_its_neighbour():
    near = np.array([[0.0, 0.0, 2 * np.pi - 0.01]])
    np.testing.assert_allclose(encode(Rotation.identity(1), "axis_angle", near=near), [[0, 0, 2 * np.pi]])


@pytest.mark.parametrize("form", ["quaternion_xyzw", "quaternion_wxyz", "six_d_columns", "six_d_rows"])
def test_values_without_a_direction_are_no_rotation(form):
    values = np.zeros((2, NUM_VALUES[form]))
    values[1] = encode(Rotation.from_rotvec([[0.1, 0.2, 0.3]]), form)[0]
    assert is_rotation(values, form).tolist() == [False, True]
    np.testing.assert_allclose(decode(values, form)[0].as_matrix(), np.eye(3))
    assert is_rotation(np.zeros((1, 3)), "axis_angle").all()


@given(forms, seeds)
def test_rounding_and_scaling_are_forgiven(form, seed):
    """float32, quaternions of length 2, columns that are not quite at right angles."""
    rotations = Rotation.random(5, random_state=seed)
    values = encode(rotations, form).astype(np.float32)
    if NUM_VALUES[form] > 3:
        values = values * np.float32(2)
    assert (decode(values, form).inv() * rotations).magnitude().max() < 1e-4


def test_interpolation_turns_at_constant_speed():
    first, second = Rotation.identity(3), Rotation.from_rotvec([[0, 0, 1.0]] * 3)
    turned = interpolate(first, second, np.array([0.0, 0.25, 1.0]))
    np.testing.assert_allclose(turned.as_rotvec(), [[0, 0, 0], [0, 0, 0.25], [0, 0, 1]], atol=1e-12)
