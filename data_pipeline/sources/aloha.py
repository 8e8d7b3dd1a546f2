"""ALOHA recordings as ACT writes them: `episode_<n>.hdf5`, one episode per file.

    /action                        [n 14]  commanded joint positions, left arm then right
    /observations/qpos, qvel       [n 14]  sensed
    /observations/images/<camera>  [n h w 3] uint8, or [n bytes] JPEGs padded with zeros to the longest
    /compress_len                  [cameras n] the JPEGs' lengths; not needed, JPEGs know their own end
    /base_action                   [n 2]   Mobile ALOHA's base, where there is one

Layout: https://github.com/tonyzhaozh/act/blob/main/record_sim_episodes.py. Row i is the command that is sent right
after frame i was taken, so rows and frames match by number.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal

import h5py
from pydantic import Field, PositiveFloat

from configs.loader import UserError

from ..embodiments import Embodiment
from .base import (
    Episode,
    Footage,
    SourceConfig,
    SourceError,
    check_dims,
    content_sha256,
    key_safe,
    stable_id,
)
from .files import find_files
from .hdf5 import (
    HDF5_SUFFIXES,
    Hdf5Images,
    any_file,
    find_all,
    find_dataset,
    find_group,
    image_footage,
    open_hdf5,
    read_rows,
    read_text,
    relative_parts,
    usable_frames,
)

_JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
ARM_NAMES = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in _JOINTS)
_ARM_JOINTS = tuple(name for name in ARM_NAMES if not name.endswith("gripper"))
BASE_NAMES = ("base_linear_velocity", "base_angular_velocity")
_INSTRUCTION_ATTRIBUTES = ("language_instruction", "instruction", "task")


class AlohaConfig(SourceConfig):
    """Episodes of ALOHA, Mobile ALOHA and ACT's simulations."""

    kind: Literal["aloha"] = "aloha"
    control_hz: PositiveFloat = Field(default=50.0, description="rate of rows and frames; the files do not say it")
    action_keys: tuple[str, ...] | None = Field(
        default=None, description="datasets that make up an action; null: action, and base_action where there is one"
    )
    proprio_keys: tuple[str, ...] = Field(
        default=("observations/qpos",), description="datasets that make up the proprio"
    )
    swap_red_blue: bool = Field(
        default=False,
        description="exchange red and blue: OpenCV writes RGB arrays as JPEGs with the two exchanged, as ACT++ does",
    )


class AlohaSource:
    """Reads a folder of episodes, or one."""

    format_name = "ALOHA HDF5"

    def __init__(self, config: AlohaConfig) -> None:
        self._config = config
        self.name = config.name or key_safe(config.path.resolve().stem)

    def list_episodes(self) -> list[str]:
        _ = self._first  # a folder without one readable episode is unusable as a whole
        return sorted(self._files)

    def repairs(self) -> tuple[str, ...]:
        return ()

    def embodiment(self) -> Embodiment | None:
        return self._config.embodiment or self._recorded_embodiment

    def read_episode(self, episode_id: str) -> Episode:
        if episode_id not in self._files:
            raise SourceError("unknown_episode", str(self._config.path), f"there is no episode {episode_id}")
        path, hz, notes = self._files[episode_id], self._config.control_hz, list[str]()
        embodiment = self.embodiment()
        assert embodiment is not None
        with open_hdf5(path) as file:
            views = self._views(file)
            actions = read_rows(file, self._action_keys, notes)
            proprio = read_rows(file, self._config.proprio_keys, notes) if self._config.proprio_keys else None
            instruction = self._config.instruction or _instruction(file)
        check_dims(embodiment, actions, proprio, str(path))
        lengths = {"action": len(actions), **{name: view.num_frames for name, view in views.items()}}
        num_frames = usable_frames(
            lengths | ({"proprio": len(proprio)} if proprio is not None else {}), str(path), notes
        )
        return Episode(
            source=self.name,
            episode_id=episode_id,
            uri=str(path),
            views=dict[str, Footage](views),
            fps=hz,
            num_frames=num_frames,
            actions=actions[:num_frames],
            proprio=proprio[:num_frames] if proprio is not None else None,
            control_hz=hz,
            embodiment=embodiment.name,
            instruction=instruction,
            success=None,
            licence=self._config.licence,
            content_sha256=content_sha256([path], (instruction or "").encode(), repr(self._action_keys).encode()),
            repairs=tuple(notes),
        )

    def _views(self, file: h5py.File) -> dict[str, Hdf5Images]:
        datasets = find_all(find_group(file, "observations/images"))
        views = {
            key_safe(name): image_footage(
                one, self._config.control_hz, swap_red_blue=self._config.swap_red_blue and one.ndim != 4
            )
            for name, one in datasets.items()
            if isinstance(one, h5py.Dataset)
        }
        found = {name: view for name, view in views.items() if view is not None}
        if not found:
            raise SourceError("no_images", file.filename, "observations/images holds no colour pictures")
        return found

    @cached_property
    def _files(self) -> dict[str, Path]:
        root = self._config.path
        if not root.exists():
            raise UserError(f"{root}: there is no such file or folder; check the path of the recordings.")
        files = {stable_id(*relative_parts(path, root)): path for path in find_files(root, HDF5_SUFFIXES)}
        if not files:
            raise UserError(f"{root}: holds no ALOHA episodes (episode_0.hdf5, …).")
        return files

    @cached_property
    def _first(self) -> tuple[tuple[str, ...], int, int]:
        """Action keys, and the numbers of action and proprio values, of the first episode that can be read."""
        problems = []
        for path in self._files.values():
            try:
                with open_hdf5(path) as file:
                    keys = self._config.action_keys or (
                        ("action", "base_action") if find_dataset(file, "base_action") is not None else ("action",)
                    )
                    proprio_keys = self._config.proprio_keys
                    num_proprio = read_rows(file, proprio_keys, []).shape[1] if proprio_keys else 0
                    return keys, read_rows(file, keys, []).shape[1], num_proprio
            except SourceError as error:
                problems.append(error)
        raise UserError(
            f"{self._config.path}: none of its {len(problems)} files can be read, the first: {problems[0]}."
        )

    @property
    def _action_keys(self) -> tuple[str, ...]:
        return self._first[0]

    @cached_property
    def _recorded_embodiment(self) -> Embodiment:
        _, num_actions, num_proprio = self._first
        action_names, proprio_names = _names(num_actions, "action"), _names(num_proprio, "proprio")
        return Embodiment(
            name="aloha" if action_names[0] == ARM_NAMES[0] else self.name,
            action_names=action_names,
            proprio_names=proprio_names,
            control_hz=self._config.control_hz,
            gripper_actions=tuple(i for i, name in enumerate(action_names) if name.endswith("gripper")),
            velocity_actions=tuple(i for i, name in enumerate(action_names) if name in BASE_NAMES),
            joint_actions=tuple(i for i, name in enumerate(action_names) if name in _ARM_JOINTS),
            joint_proprio=tuple(i for i, name in enumerate(proprio_names) if name in _ARM_JOINTS),
        )


def find_aloha(path: Path) -> bool:
    """Whether HDF5 files here are laid out as ACT lays them out."""
    return any_file(
        path,
        lambda file: find_dataset(file, "action") is not None and find_group(file, "observations/images") is not None,
    )


def _names(count: int, prefix: str) -> tuple[str, ...]:
    for names in (ARM_NAMES, ARM_NAMES + BASE_NAMES):
        if len(names) == count:
            return names
    return tuple(f"{prefix}_{i}" for i in range(count))


def _instruction(file: h5py.File) -> str | None:
    texts = (read_text(file.attrs, name) for name in _INSTRUCTION_ATTRIBUTES)
    return next((text for text in texts if text), None)
