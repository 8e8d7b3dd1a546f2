"""Rotations as robots record them, read into scipy's `Rotation` and written back.

One rotation has many spellings: q and -q, angles a full turn apart, Euler angles with the middle one flipped over.
`encode` therefore takes the values that the result should lie next to, so that a resampled recording never jumps from
one spelling to another.
"""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float64
from scipy.spatial.transform import Rotation

RotationFormat = Literal[
    "euler_xyz_extrinsic",
    "euler_xyz_intrinsic",
    "axis_angle",
    "quaternion_xyzw",
    "quaternion_wxyz",
    "six_d_columns",
    "six_d_rows",
]

FORMATS: dict[RotationFormat, str] = {
    "euler_xyz_extrinsic": "roll, pitch, yaw: about the fixed x, then the fixed y, then the fixed z axis",
    "euler_xyz_intrinsic": "about x, then about the turned y, then about the twice turned z axis",
    "axis_angle": "the axis, as long as the angle (a rotation vector)",
    "quaternion_xyzw": "unit quaternion, scalar last",
    "quaternion_wxyz": "unit quaternion, scalar first",
    "six_d_columns": "the first two columns of the rotation matrix, one after the other",
    "six_d_rows": "the first two rows of the rotation matrix, one after the other",
}

NUM_VALUES: dict[RotationFormat, int] = {
    "euler_xyz_extrinsic": 3,
    "euler_xyz_intrinsic": 3,
    "axis_angle": 3,
    "quaternion_xyzw": 4,
    "quaternion_wxyz": 4,
    "six_d_columns": 6,
    "six_d_rows": 6,
}

_EULER = {"euler_xyz_extrinsic": "xyz", "euler_xyz_intrinsic": "XYZ"}  # scipy: lower case turns about fixed axes
_SHORTEST = 1e-6  # a quaternion or matrix column shorter than this has no direction


def is_rotation(values: Float[np.ndarray, "n d"], form: RotationFormat) -> Bool[np.ndarray, "n"]:
    """Which rows say a rotation: zeros, as recorders write before tracking starts, are none where length matters."""
    if form.startswith("quaternion"):
        return np.linalg.norm(values, axis=1) > _SHORTEST
    if form.startswith("six_d"):
        first, second = values[:, :3].astype(np.float64), values[:, 3:].astype(np.float64)
        return np.linalg.norm(np.cross(first, second), axis=1) > _SHORTEST  # zero too where they are parallel
    return np.ones(len(values), dtype=bool)


def decode(values: Float[np.ndarray, "n d"], form: RotationFormat, in_degrees: bool = False) -> Rotation:
    """The rotations that the rows say; no rotation where `is_rotation` is false."""
    rows = values.astype(np.float64)
    is_good = is_rotation(rows, form)
    if form.startswith("quaternion"):
        neutral = [0.0, 0.0, 0.0, 1.0] if form == "quaternion_xyzw" else [1.0, 0.0, 0.0, 0.0]
        return Rotation.from_quat(np.where(is_good[:, None], rows, neutral), scalar_first=form == "quaternion_wxyz")
    if form.startswith("six_d"):
        rows = np.where(is_good[:, None], rows, [1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
        matrices = _orthonormal(rows[:, :3], rows[:, 3:])
        return Rotation.from_matrix(matrices.swapaxes(1, 2) if form == "six_d_columns" else matrices)
    radians = np.deg2rad(rows) if in_degrees else rows
    return Rotation.from_rotvec(radians) if form == "axis_angle" else Rotation.from_euler(_EULER[form], radians)


def encode(
    rotations: Rotation,
    form: RotationFormat,
    in_degrees: bool = False,
    near: Float[np.ndarray, "n d"] | None = None,
) -> Float64[np.ndarray, "n d"]:
    """The inverse of `decode`: of a rotation's spellings the one closest to `near`, else the shortest."""
    if form.startswith("quaternion"):
        values = rotations.as_quat(canonical=True, scalar_first=form == "quaternion_wxyz")
        return values if near is None else np.where((values * near).sum(axis=1, keepdims=True) < 0, -values, values)
    if form.startswith("six_d"):
        matrices = rotations.as_matrix()
        first_two = matrices.swapaxes(1, 2)[:, :2] if form == "six_d_columns" else matrices[:, :2]
        return first_two.reshape(-1, 6)
    values = rotations.as_rotvec() if form == "axis_angle" else _euler(rotations, form)
    if near is not None:
        radians = np.deg2rad(near.astype(np.float64)) if in_degrees else near.astype(np.float64)
        values = _near_axis_angle(values, radians) if form == "axis_angle" else _near_euler(values, radians)
    return np.rad2deg(values) if in_degrees else values


def interpolate(first: Rotation, second: Rotation, share: Float64[np.ndarray, "n"]) -> Rotation:
    """On the sphere, the short way: at constant angular speed from `first` (share 0) to `second` (share 1)."""
    return first * Rotation.from_rotvec(share[:, None] * (first.inv() * second).as_rotvec())


def _orthonormal(first: Float64[np.ndarray, "n 3"], second: Float64[np.ndarray, "n 3"]) -> Float64[np.ndarray, "n 3 3"]:
    """Matrices whose rows are `first`, what of `second` is at right angles to it, and their cross product."""
    x = first / np.linalg.norm(first, axis=1, keepdims=True)
    y = second - (second * x).sum(axis=1, keepdims=True) * x
    y = y / np.linalg.norm(y, axis=1, keepdims=True)
    return np.stack([x, y, np.cross(x, y)], axis=1)


def _euler(rotations: Rotation, form: RotationFormat) -> Float64[np.ndarray, "n 3"]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where two of the axes coincide, any split between them is right
        return rotations.as_euler(_EULER[form])


def _near_euler(values: Float64[np.ndarray, "n 3"], near: Float64[np.ndarray, "n 3"]) -> Float64[np.ndarray, "n 3"]:
    flipped = np.stack([values[:, 0] + np.pi, np.pi - values[:, 1], values[:, 2] + np.pi], axis=1)
    spellings = [angles + _full_turns(near - angles) for angles in (values, flipped)]
    distances = [np.abs(angles - near).sum(axis=1, keepdims=True) for angles in spellings]
    return np.where(distances[1] < distances[0], spellings[1], spellings[0])


def _near_axis_angle(
    values: Float64[np.ndarray, "n 3"], near: Float64[np.ndarray, "n 3"]
) -> Float64[np.ndarray, "n 3"]:
    angle = np.linalg.norm(values, axis=1, keepdims=True)
    length = np.linalg.norm(near, axis=1, keepdims=True)
    axis = np.where(angle > 1e-9, values / np.maximum(angle, 1e-9), near / np.maximum(length, 1e-9))
    return values + axis * _full_turns((axis * near).sum(axis=1, keepdims=True) - angle)


def _full_turns(angles: Float64[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
    return 2 * np.pi * np.round(angles / (2 * np.pi))
