"""Demonstrations in robomimic's layout, which LIBERO, MimicGen and RoboCasa share: many episodes per HDF5 file.

    data                       attributes: env_args (JSON: env_name, env_kwargs), problem_info (JSON, LIBERO)
    data/demo_<i>/actions      [n a]
    data/demo_<i>/obs/<key>    [n …]: pictures [n h w 3] and the robot's readings
    mask/<filter key>          names of the demos in a group ("train", "20_percent", …)

Layout: https://robomimic.github.io/docs/datasets/overview.html. Two things differ by who wrote the file:

- *Pictures upside down.* MuJoCo renders from the bottom row up. robomimic's scripts turn the pictures; LIBERO's
  `create_dataset.py` does not, and says so in `macros_image_convention` ("opengl"). They are turned where the file says
  that, or says nothing and has LIBERO's attributes or its name for the camera (agentview_rgb), as the copies without
  idle steps have that OpenVLA's script makes. (Turning by 180 degrees, as is often done, gives the mirror image.)
- *Pictures after the action.* In robomimic's files picture i was taken before action i. LIBERO's script steps the
  simulation with action i and then stores the picture, so in files with its attributes action i + 1 follows picture i.

robosuite's own `demo.hdf5` holds simulator states and no pictures: such episodes are rejected (`no_images`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from jaxtyping import Float32
from pydantic import Field, PositiveFloat

from configs.loader import UserError

from ..embodiments import Embodiment, RotationSlots
from .base import (
    Episode,
    Footage,
    SourceConfig,
    SourceError,
    check_dims,
    content_sha256,
    is_rate,
    key_safe,
    stable_id,
)
from .files import check_size, find_files
from .hdf5 import (
    HDF5_SUFFIXES,
    Hdf5Images,
    any_file,
    find_all,
    find_dataset,
    find_group,
    image_footage,
    open_hdf5,
    read_json,
    read_rows,
    relative_parts,
    rows_sha256,
    usable_frames,
)

DEFAULT_HZ = 20.0
"""robosuite's, and what LIBERO and robomimic record at."""

_ROBOT_READINGS = ("eef_pos", "eef_quat", "gripper_qpos")
_LIBERO_READINGS = ("ee_states", "gripper_states")
_ARM_ACTIONS = {
    "OSC_POSE": ("x", "y", "z", "rx", "ry", "rz"),
    "IK_POSE": ("x", "y", "z", "rx", "ry", "rz"),
    "OSC_POSITION": ("x", "y", "z"),
}  # robosuite's controllers; the joint controllers have one value per joint


class RobomimicConfig(SourceConfig):
    """robomimic, LIBERO, MimicGen and RoboCasa files: one, or all below a folder."""

    kind: Literal["robomimic"] = "robomimic"
    filter_key: str | None = Field(default=None, description="only the episodes of this group under mask/; null: all")
    action_key: str = Field(default="actions", description="dataset with the actions (some files have actions_abs too)")
    proprio_keys: tuple[str, ...] | None = Field(
        default=None, description="datasets under obs/ that make up the proprio; null: pose and gripper of each arm"
    )
    control_hz: PositiveFloat | None = Field(
        default=None, description="rate of rows and frames; null: control_freq in the file, else 20"
    )
    flip_images: bool | None = Field(
        default=None, description="turn pictures that are stored upside down; null: where the file is known to need it"
    )
    frames_follow_actions: bool | None = Field(
        default=None,
        description="whether picture i was taken after action i instead of before; null: in LIBERO's files",
    )


@dataclass(frozen=True)
class _Place:
    path: Path
    demo: str | None  # None: the file itself cannot be read, and reading it says why


class RobomimicSource:
    """Reads one file, or all files below a folder."""

    format_name = "robomimic HDF5"

    def __init__(self, config: RobomimicConfig) -> None:
        self._config = config
        self.name = config.name or key_safe(config.path.resolve().stem)

    def list_episodes(self) -> list[str]:
        return sorted(self._places)

    def repairs(self) -> tuple[str, ...]:
        return ()

    def embodiment(self) -> Embodiment | None:
        return self._config.embodiment or self._recorded_embodiment

    def read_episode(self, episode_id: str) -> Episode:
        if episode_id not in self._places:
            raise SourceError("unknown_episode", str(self._config.path), f"there is no episode {episode_id}")
        place, notes = self._places[episode_id], list[str]()
        with open_hdf5(place.path) as file:
            writer = _Writer(file, self._config)
            demo = _find_demo(file, place)
            views, digests = self._views(demo, writer, notes)
            actions = read_rows(demo, [self._config.action_key], notes)
            keys = self._proprio_keys(demo)
            proprio = read_rows(demo, keys, notes) if keys else None
            instruction = self._config.instruction or writer.instruction(demo)
            success = _success(demo)
        embodiment = self.embodiment()
        assert embodiment is not None
        where = f"{place.path}#{place.demo}"
        check_dims(embodiment, actions, proprio, where)
        lengths = {"actions": len(actions), **{name: view.num_frames for name, view in views.items()}}
        if proprio is not None:
            lengths["proprio"] = len(proprio)
        num_frames = usable_frames(lengths, where, notes)
        if writer.frames_follow_actions:
            actions = actions[1:num_frames]
            notes.append("Picture i was taken after action i: action i + 1 is the one that follows it.")
        num_rows = min(len(actions), num_frames)
        arrays = [array[:num_rows].tobytes() for array in (actions, proprio) if array is not None]
        return Episode(
            source=self.name,
            episode_id=episode_id,
            uri=where,
            views=dict[str, Footage](views),
            fps=writer.hz,
            num_frames=num_frames,
            actions=actions[:num_rows],
            proprio=proprio[:num_rows] if proprio is not None else None,
            control_hz=writer.hz,
            embodiment=embodiment.name,
            instruction=instruction,
            success=success,
            licence=self._config.licence,
            # Not the file's bytes: it holds many episodes, and none of them changes when another is added.
            content_sha256=content_sha256([], *digests, (instruction or "").encode(), *arrays),
            repairs=tuple(notes),
        )

    def _views(
        self, demo: h5py.Group, writer: _Writer, notes: list[str]
    ) -> tuple[dict[str, Hdf5Images], tuple[bytes, ...]]:
        """Cameras by name, and digests of their pictures."""
        views, digests = {}, []
        for name, dataset in find_all(find_group(demo, "obs")).items():
            if not isinstance(dataset, h5py.Dataset) or "depth" in name or "segmentation" in name:
                continue
            footage = image_footage(dataset, writer.hz, flip=writer.flip)
            if footage is not None:
                views[key_safe(re.sub("_(image|rgb)$", "", name))] = footage
                digests.append(rows_sha256(dataset) + bytes([writer.flip]))
        if not views:
            detail = "it holds no pictures; render them with robomimic's dataset_states_to_obs.py --camera_names"
            raise SourceError("no_images", f"{demo.file.filename}#{demo.name}", detail)
        if writer.flip:
            notes.append("The pictures are stored upside down: they are turned.")
        return views, tuple(digests)

    def _proprio_keys(self, demo: h5py.Group) -> tuple[str, ...]:
        if self._config.proprio_keys is not None:
            return tuple(f"obs/{key}" for key in self._config.proprio_keys)
        held = find_all(find_group(demo, "obs"))
        robots = sorted({name.split("_")[0] for name in held if re.match(r"robot\d+_", name)})
        known = [f"{robot}_{reading}" for robot in robots for reading in _ROBOT_READINGS]
        return tuple(f"obs/{key}" for key in (*known, *_LIBERO_READINGS) if key in held)

    # --- the set as a whole ---

    @cached_property
    def _places(self) -> dict[str, _Place]:
        root = self._config.path
        if not root.exists():
            raise UserError(f"{root}: there is no such file or folder; check the path of the demonstrations.")
        places = {}
        for path in find_files(root, HDF5_SUFFIXES):
            parts = relative_parts(path, root)
            try:
                demos = self._demo_names(path)
            except SourceError:
                places[stable_id(*parts)] = _Place(path, None)
            else:
                places |= {stable_id(*parts, demo): _Place(path, demo) for demo in demos}
        if not places:
            chosen = f" of the group mask/{self._config.filter_key}" if self._config.filter_key else ""
            raise UserError(f"{root}: holds no demonstrations{chosen} (HDF5 files with data/demo_0, …).")
        return places

    def _demo_names(self, path: Path) -> list[str]:
        with open_hdf5(path) as file:
            demos = [name for name, one in find_all(find_group(file, "data")).items() if isinstance(one, h5py.Group)]
            if self._config.filter_key is None:
                return demos
            mask = find_dataset(file, f"mask/{self._config.filter_key}")
            if mask is None or mask.ndim != 1 or mask.dtype.kind not in "SO":
                return []
            check_size(mask.size * mask.dtype.itemsize, f"{path}:{mask.name}", "the list of episodes")
            wanted = {name.decode() if isinstance(name, bytes) else str(name) for name in mask[()].tolist()}
            return [demo for demo in demos if demo in wanted]

    @cached_property
    def _recorded_embodiment(self) -> Embodiment:
        """Of the first episode that can be read."""
        problems = []
        for place in self._places.values():
            try:
                with open_hdf5(place.path) as file:
                    writer, demo = _Writer(file, self._config), _find_demo(file, place)
                    num_actions = read_rows(demo, [self._config.action_key], []).shape[1]
                    proprio_names = tuple(
                        f"{key.removeprefix('obs/')}_{i}"
                        for key in self._proprio_keys(demo)
                        for i in range(read_rows(demo, [key], []).shape[1])
                    )
                    return writer.embodiment(self.name, num_actions, proprio_names)
            except SourceError as error:
                problems.append(error)
        raise UserError(f"{self._config.path}: none of its {len(problems)} episodes can be read; {problems[0]}.")


def find_robomimic(path: Path) -> bool:
    """Whether HDF5 files here hold data/<demo>/actions."""

    def is_robomimic(file: h5py.File) -> bool:
        demos = find_group(file, "data")
        first = next(iter(demos), None) if demos is not None else None
        return first is not None and find_dataset(file, f"data/{first}/actions") is not None

    return any_file(path, is_robomimic)


class _Writer:
    """What a file's attributes say, and what follows from who wrote it."""

    def __init__(self, file: h5py.File, config: RobomimicConfig) -> None:
        data = find_group(file, "data")
        if data is None:
            raise SourceError("bad_record", file.filename, "it has no group data")
        self._file_name = Path(file.filename).name
        self._action_key = config.action_key
        self._problem = read_json(data.attrs, "problem_info")
        told = read_json(data.attrs, "env_args").get("env_kwargs")
        self._env: dict[str, Any] = told if isinstance(told, dict) else read_json(data.attrs, "env_info")
        is_libero = bool(self._problem) or "bddl_file_name" in data.attrs
        first = next(iter(data), None)
        has_libero_names = find_dataset(data, f"{first}/obs/agentview_rgb") is not None
        convention = data.attrs.get("macros_image_convention", "opengl" if is_libero or has_libero_names else None)
        self.flip = convention == "opengl" if config.flip_images is None else config.flip_images
        follow = config.frames_follow_actions
        self.frames_follow_actions = is_libero if follow is None else follow
        recorded = self._env.get("control_freq")
        self.hz = float(config.control_hz or (recorded if is_rate(recorded) else DEFAULT_HZ))  # type: ignore[arg-type]

    def embodiment(self, source: str, num_actions: int, proprio_names: tuple[str, ...]) -> Embodiment:
        action_names = self._action_names(num_actions)
        is_arm = [not name.endswith("gripper") for name in action_names]
        return Embodiment(
            name=key_safe("_".join(self._robots)) if self._robots else source,
            action_names=action_names,
            proprio_names=proprio_names,
            control_hz=self.hz,
            gripper_actions=tuple(i for i, arm in enumerate(is_arm) if not arm),
            delta_actions=tuple(i for i, arm in enumerate(is_arm) if arm and self._commands == "changes"),
            action_rotations=tuple(
                RotationSlots(slots=(i, i + 1, i + 2), format="axis_angle")
                for i, name in enumerate(action_names)
                if name.endswith("rx") and self._commands == "targets"
            ),
            proprio_rotations=_sensed_rotations(proprio_names),
        )

    @property
    def _robots(self) -> list[str]:
        robots = self._env.get("robots")
        return [robots] if isinstance(robots, str) else [str(one) for one in robots] if isinstance(robots, list) else []

    @property
    def _controller(self) -> dict[str, Any]:
        configs = self._env.get("controller_configs")
        first = configs[0] if isinstance(configs, list) and configs else configs
        return first if isinstance(first, dict) else {}

    @property
    def _commands(self) -> Literal["changes", "targets"] | None:
        """Of a pose; None where the file does not say, or a joint is commanded.

        Changes are shares of the controller's largest step, so a turn is no angle: it is added up like the positions.
        """
        controller = self._controller
        if controller.get("type") not in _ARM_ACTIONS:
            return None
        is_delta, given = (
            controller.get("control_delta"),
            controller.get("input_type"),
        )  # before and since robosuite 1.5
        if self._action_key == "actions_abs" or is_delta is False or given == "absolute":
            return "targets"
        return "changes" if is_delta is True or given == "delta" else None

    def _action_names(self, count: int) -> tuple[str, ...]:
        """From the controller's type; numbered where that does not explain as many values as there are."""
        kind = str(self._controller.get("type", ""))
        joints = tuple(f"joint_{i}" for i in range(7)) if kind.startswith("JOINT_") else ()
        arm = _ARM_ACTIONS.get(kind, joints)
        num_arms = max(1, len(self._robots))
        for names in ((*arm, "gripper"), arm):
            if arm and len(names) * num_arms == count:
                prefixes = [f"robot{i}_" for i in range(num_arms)] if num_arms > 1 else [""]
                return tuple(prefix + name for prefix in prefixes for name in names)
        return tuple(f"action_{i}" for i in range(count))

    def instruction(self, demo: h5py.Group) -> str | None:
        """RoboCasa says it per episode, LIBERO per file (`problem_info`), and in the file's name."""
        text = read_json(demo.attrs, "ep_meta").get("lang") or self._problem.get("language_instruction")
        if isinstance(text, list):  # LIBERO's older files: a list of letters
            text = "".join(map(str, text))
        if isinstance(text, str) and text.strip(' "'):
            return " ".join(text.strip(' "').split())
        named = re.fullmatch(r"(?:[A-Z_0-9]+_SCENE\d+_)?(\w+)_demo\.hdf5", self._file_name)
        return named[1].replace("_", " ") if named else None


def _sensed_rotations(names: tuple[str, ...]) -> tuple[RotationSlots, ...]:
    """robosuite's quaternions have the scalar last; LIBERO's ee_states are a position and a rotation vector."""
    found = []
    for slot, name in enumerate(names):
        if re.fullmatch(r"robot\d+_eef_quat_0", name):
            found.append(RotationSlots(slots=tuple(range(slot, slot + 4)), format="quaternion_xyzw"))
        if name == "ee_states_3":
            found.append(RotationSlots(slots=tuple(range(slot, slot + 3)), format="axis_angle"))
    return tuple(found)


def _find_demo(file: h5py.File, place: _Place) -> h5py.Group:
    demo = find_group(file, f"data/{place.demo}") if place.demo is not None else None
    if demo is None:
        raise SourceError("bad_record", file.filename, f"it has no group data/{place.demo or 'demo_0'}")
    return demo


def _success(demo: h5py.Group) -> bool | None:
    """A reward of one is robosuite's sign of success. All zeros may mean that nobody computed them."""
    rewards = find_dataset(demo, "rewards")
    if rewards is None or rewards.ndim != 1 or rewards.dtype.kind not in "biuf":
        return None
    check_size(rewards.size * max(4, rewards.dtype.itemsize), f"{demo.file.filename}:{rewards.name}", "the rewards")
    values: Float32[np.ndarray, "n"] = np.asarray(rewards[()], dtype=np.float32)
    is_sparse = np.isin(values, (0, 1)).all()
    return True if is_sparse and values.any() else None
