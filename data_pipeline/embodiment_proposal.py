"""A robot's block of YAML, guessed from the names and the numbers of a recording; a person checks it and keeps it.

What the recording or its reader already says stays as it is: guesses fill only what is not set. Names win over numbers
where they say something. What neither can say (the frame of poses, which end of an unnamed quaternion is the scalar) is
left open or at the usual choice, and a sentence asks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64

from .embodiments import ANGLE_UNITS, DEGREES, Embodiment, RotationSlots
from .rotations import RotationFormat, decode

MIN_ROWS = 20
"""With fewer rows, numbers prove nothing."""

_ROLL_PITCH_YAW = ("roll", "pitch", "yaw")
_TURNS = {"rad": 2 * np.pi, "deg": 360.0}
_POSE_WORDS = re.compile(r"(^|_)([xyz]|pos(ition)?_[xyz])$")
_NUMBER = re.compile(r"_?\d+$")
_GRIPPER_WORDS = re.compile(r"grip|claw|jaw")
_HAND_WORDS = re.compile(r"hand|finger|thumb|pinky|grip|claw|jaw")
_JOINT_WORDS = re.compile(
    r"joint|motor|servo|shoulder|elbow|wrist|waist|torso|neck|head|hip|knee|ankle|finger|thumb|pinky|index|middle|ring"
    r"|(^|_)j\d+($|_)"
)
_DELTA_WORDS = re.compile(r"(^|_)(delta|rel|relative|displacement|d(x|y|z|rx|ry|rz|roll|pitch|yaw))($|_)")
_VELOCITY_WORDS = re.compile(r"(^|_)(vel|velocity|speed|twist|v[xyz]|w[xyz])($|_)")
_QUATERNION = re.compile(r"(?:^|_)(?:q|(?:quat|quaternion|rot|rotation|ori|orientation)_?)([wxyz])$")
_ANGLE = re.compile(r"(?:^|_)d?(?:(roll|pitch|yaw)|(euler|rotvec|axis_angle|aa|rot|rotation|r)_?([xyz]))$")


@dataclass
class _Part:
    """The actions or the proprio of a recording, and what has been found out about them."""

    what: str  # "action" or "proprio"
    names: tuple[str, ...]
    declared: set[int]  # slots that the recording itself says something about
    has_known_rotations: bool
    episodes: list[Float64[np.ndarray, "n d"]] = field(default_factory=list)
    rotations: list[RotationSlots] = field(default_factory=list)
    units: dict[int, str] = field(default_factory=dict)

    @property
    def rows(self) -> Float64[np.ndarray, "n d"]:
        return np.concatenate(self.episodes) if self.episodes else np.zeros((0, len(self.names)))

    @property
    def taken(self) -> set[int]:
        return self.declared | {slot for one in self.rotations for slot in one.slots}

    def may_turn(self, slots: Sequence[int]) -> bool:
        """Whether these slots can still become a rotation."""
        num_in_degrees = sum(self.units.get(slot, "").lower() in DEGREES for slot in slots)
        is_free = not self.has_known_rotations and not self.taken & {*slots}
        return is_free and num_in_degrees in (0, len(slots))

    def words(self, slot: int) -> str:
        """A name in one style: left.WristRoll.pos is left_wrist_roll (LeRobot's trailing pos says nothing)."""
        spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", self.names[slot])
        return re.sub(r"_pos$", "", re.sub(r"[^a-z0-9]+", "_", spaced.lower()).strip("_"))

    def stem(self, slot: int) -> str:
        """What a name shares with the others of its pose or numbered list; joints and other names stand alone."""
        words = self.words(slot)
        if not _JOINT_WORDS.search(words):
            for pattern in (_ANGLE, _QUATERNION, _POSE_WORDS, _NUMBER):
                if match := pattern.search(words):
                    return words[: match.start()]
        return words

    def called(self, slots: Sequence[int]) -> str:
        """The slots, for a sentence."""
        return f"{self.what} {', '.join(map(str, slots))} ({', '.join(self.names[slot] for slot in slots)})"

    def matching(self, pattern: re.Pattern[str]) -> list[int]:
        return [i for i in range(len(self.names)) if i not in self.taken and pattern.search(self.words(i))]

    def biggest(self, slots: Sequence[int]) -> float:
        return float(np.abs(self.rows[:, list(slots)]).max(initial=0))


def propose_embodiment(
    recorded: Embodiment,
    actions: Sequence[Float32[np.ndarray, "n a"]],
    proprio: Sequence[Float32[np.ndarray, "n s"]] | None,
) -> tuple[Embodiment, tuple[str, ...]]:
    """The recorded layout, completed by names and numbers, and sentences that say why and what only a person can know.

    `actions` and `proprio` hold one array per episode, row by row on the same clock; a few hundred rows are enough.
    """
    action, state = _parts(recorded, actions, proprio)
    known_moves = {*recorded.delta_actions, *recorded.velocity_actions}
    why = [*_find_rotations(action), *_find_rotations(state), *_pair_rotations(action, state, known_moves)]
    grippers = [*recorded.gripper_actions] or _find_grippers(action, why)
    kinds = _find_kinds(action, state, recorded, {*grippers}, why)
    named_joints = [i for i in state.matching(_JOINT_WORDS) if not _GRIPPER_WORDS.search(state.words(i))]
    joint_proprio = [*recorded.joint_proprio] or named_joints
    named_joints = [i for i in action.matching(_JOINT_WORDS) if i not in grippers]
    joint_actions = [*recorded.joint_actions] or named_joints
    moving = {*grippers, *kinds["delta"], *kinds["velocity"], *known_moves}
    _guess_units(action, joint_actions, moving)
    _guess_units(state, joint_proprio, set())
    wrapping_actions = [*recorded.wrapping_actions] or _find_wrapping(action, joint_actions, moving, why)
    wrapping_proprio = [*recorded.wrapping_proprio] or _find_wrapping(state, joint_proprio, set(), why)
    guessed = {
        "action_units": _units(action),
        "proprio_units": _units(state),
        "gripper_actions": grippers,
        "delta_actions": kinds["delta"],
        "velocity_actions": kinds["velocity"],
        "joint_actions": joint_actions,
        "joint_proprio": joint_proprio,
        "wrapping_actions": wrapping_actions,
        "wrapping_proprio": wrapping_proprio,
        "action_rotations": action.rotations,
        "proprio_rotations": state.rotations,
        "pose_frame": None,
    }
    declared = {field: value for field in guessed if (value := getattr(recorded, field))}
    robot = Embodiment.model_validate({**dict(recorded), **guessed, **declared})
    if declared:
        why.insert(0, f"{', '.join(declared)}: as the recording says.")
    why += [] if recorded.action_units else _unit_reasons(action)
    why += [] if recorded.proprio_units else _unit_reasons(state)
    is_pose = any(_POSE_WORDS.search(action.words(slot)) for slot in range(robot.action_dim))
    if robot.pose_frame is None and (robot.action_rotations or robot.proprio_rotations or is_pose):
        why.append("pose_frame is left open: numbers do not say whether poses are in base, world, camera or tool.")
    return robot, tuple(why)


def _parts(
    recorded: Embodiment, actions: Sequence[np.ndarray], proprio: Sequence[np.ndarray] | None
) -> tuple[_Part, _Part]:
    """What the recording says, and its rows without those with NaN or infinity."""
    action = _known_part("action", recorded)
    state = _known_part("proprio", recorded)
    for index, rows in enumerate(actions):
        sensed = proprio[index] if proprio is not None else np.zeros((len(rows), 0))
        is_finite = np.isfinite(rows).all(axis=1) & np.isfinite(sensed).all(axis=1)
        if is_finite.any():
            action.episodes.append(rows[is_finite].astype(np.float64))
            state.episodes.append(sensed[is_finite].astype(np.float64))
    return action, state


def _known_part(what: Literal["action", "proprio"], recorded: Embodiment) -> _Part:
    """A declared angle without a unit is in radians."""
    if what == "action":
        names, units, rotations = recorded.action_names, recorded.action_units, recorded.action_rotations
        angles = recorded.wrapping_actions
        others = (*recorded.gripper_actions, *recorded.delta_actions, *recorded.velocity_actions)
        declared = {*angles, *others, *recorded.joint_actions}
    else:
        names, units, rotations = recorded.proprio_names, recorded.proprio_units, recorded.proprio_rotations
        angles = recorded.wrapping_proprio
        declared = {*angles, *recorded.joint_proprio}
    turning = {slot for one in rotations for slot in one.slots}
    angles += tuple(slot for one in rotations for slot in one.slots if not _is_unit_free(one))
    known = dict(enumerate(units)) if units is not None else dict.fromkeys(angles, "rad")
    return _Part(what, names, declared | turning, bool(rotations), rotations=[*rotations], units=known)


# --- rotations ----------------------------------------------------------------------------------------------------


def _find_rotations(part: _Part) -> Iterator[str]:
    """Adds to `part.rotations` and says why. Six numbers first: three of them may look like part of a quaternion."""
    for finders in ((_six_d,), (_named_quaternion, _named_angles, _unit)):
        for slot in range(len(part.names)):
            found = next((found for finder in finders if (found := finder(part, slot))), None)
            if found is not None and part.may_turn(found[0].slots):
                part.rotations.append(found[0])
                yield f"{part.called(found[0].slots)}: {found[0].format}, because {found[1]}."
    part.rotations.sort(key=lambda one: one.slots)


_Found = tuple[RotationSlots, str] | None


def _named_quaternion(part: _Part, slot: int) -> _Found:
    slots = range(slot, min(slot + 4, len(part.names)))
    letters = [match.group(1) for i in slots if (match := _QUATERNION.search(part.words(i)))]
    if sorted(letters) != ["w", "x", "y", "z"]:
        return None
    form: RotationFormat = "quaternion_wxyz" if letters[0] == "w" else "quaternion_xyzw"
    ordered = tuple(slot + letters.index(letter) for letter in form.removeprefix("quaternion_"))
    return RotationSlots(slots=ordered, format=form), "its names say so"


def _named_angles(part: _Part, slot: int) -> _Found:
    slots = tuple(range(slot, min(slot + 3, len(part.names))))
    matches = [_ANGLE.search(part.words(i)) for i in slots]
    found = [match for match in matches if match]
    letters = ["xyz"[_ROLL_PITCH_YAW.index(m.group(1))] if m.group(1) else m.group(3) for m in found]
    is_joints = any(_JOINT_WORDS.search(part.words(i)) for i in slots)  # a wrist's roll, pitch and yaw are three motors
    is_speed = any(_VELOCITY_WORDS.search(part.words(i)) for i in slots)
    if letters != ["x", "y", "z"] or is_joints or is_speed or not part.may_turn(slots):
        return None
    unit = part.units.get(slot, "deg" if part.biggest(slots) > 1.1 * _TURNS["rad"] else "rad")
    if len(part.rows):
        part.units = dict.fromkeys(slots, unit) | part.units
    is_degrees = unit.lower() in DEGREES
    word = found[0].group(2) or "euler"
    if word == "euler":
        return RotationSlots(slots=slots, format="euler_xyz_extrinsic"), "of its names; check whether it is intrinsic"
    if word in ("rotvec", "axis_angle", "aa"):
        return RotationSlots(slots=slots, format="axis_angle"), "of its names"
    jumps = {form: _largest_turn(part, slots, form, is_degrees) for form in ("axis_angle", "euler_xyz_extrinsic")}
    for form, other in (("axis_angle", "euler_xyz_extrinsic"), ("euler_xyz_extrinsic", "axis_angle")):
        if jumps[form] < 0.5 * jumps[other]:
            reason = f"read as {other} it would turn by {np.rad2deg(jumps[other]):.0f} degrees from one row to the next"
            return RotationSlots(slots=slots, format=form), reason
    return RotationSlots(
        slots=slots, format="axis_angle"
    ), "that is usual under such names; check: Euler angles fit too"


def _largest_turn(part: _Part, slots: Sequence[int], form: RotationFormat, in_degrees: bool) -> float:
    """Between rows that follow each other, in radians: the wrong format turns wildly where angles wrap."""
    largest = 0.0
    for rows in part.episodes:
        rotations = decode(rows[:, list(slots)], form, in_degrees)
        if len(rows) > 1:
            largest = max(largest, float((rotations[:-1].inv() * rotations[1:]).magnitude().max()))
    return largest


def _six_d(part: _Part, slot: int) -> _Found:
    slots = tuple(range(slot, slot + 6))
    if slots[-1] >= len(part.names) or len(part.rows) < MIN_ROWS:
        return None
    first, second = part.rows[:, slots[:3]], part.rows[:, slots[3:]]
    products = [np.square(first).sum(axis=1) - 1, np.square(second).sum(axis=1) - 1, (first * second).sum(axis=1)]
    if np.abs(products).max() > 5e-3 or _num_moving(part, slots) < 3:
        return None
    reason = "it is always two unit vectors at right angles; check whether they are columns or rows of the matrix"
    return RotationSlots(slots=slots, format="six_d_columns"), reason


def _unit(part: _Part, slot: int) -> _Found:
    slots = tuple(range(slot, slot + 4))
    if slots[-1] >= len(part.names) or len(part.rows) < MIN_ROWS:
        return None
    if np.abs(np.linalg.norm(part.rows[:, slots], axis=1) - 1).max() > 5e-3 or _num_moving(part, slots) < 2:
        return None
    reason = "its length is always 1; check whether its scalar comes last (xyzw) or first (wxyz)"
    return RotationSlots(slots=slots, format="quaternion_xyzw"), reason


def _num_moving(part: _Part, slots: Sequence[int]) -> int:
    return int((np.ptp(part.rows[:, list(slots)], axis=0) > 1e-3).sum())


def _pair_rotations(action: _Part, state: _Part, known_moves: set[int]) -> Iterator[str]:
    """The same names are a rotation on both sides or on neither, unless the recording says that they are no targets."""
    for part, other in ((action, state), (state, action)):
        for one in [one for one in part.rotations if not part.has_known_rotations]:
            names = [part.names[slot] for slot in one.slots]
            slots = tuple(other.names.index(name) for name in names if name in other.names)
            if not slots or any({*slots} == {*theirs.slots} for theirs in other.rotations):
                continue
            if other is action and known_moves.issuperset(slots):
                continue
            if len(slots) == len(names) and other.may_turn(slots):
                other.rotations.append(RotationSlots(slots=slots, format=one.format))
                theirs = {
                    slot: part.units[mine] for slot, mine in zip(slots, one.slots, strict=True) if mine in part.units
                }
                other.units = theirs | other.units
                yield f"{other.called(slots)}: {one.format} too, because its names are the same."
            else:
                part.rotations.remove(one)
                yield f"{part.called(one.slots)} is no rotation after all: {other.what} has these names not as one."


# --- other kinds --------------------------------------------------------------------------------------------------


def _find_grippers(action: _Part, why: list[str]) -> list[int]:
    named = action.matching(_GRIPPER_WORDS)
    two_valued = [
        slot
        for slot in range(len(action.names))
        if slot not in action.taken and slot not in named and len(action.rows) >= MIN_ROWS
        if len(np.unique(action.rows[:, slot])) == 2
    ]
    if named:
        why.append(f"{action.called(named)}: gripper, because of the name.")
    if two_valued:
        why.append(f"{action.called(two_valued)}: held like a gripper, because it only ever has two values.")
    return sorted([*named, *two_valued])


def _find_kinds(
    action: _Part, state: _Part, recorded: Embodiment, grippers: set[int], why: list[str]
) -> dict[str, list[int]]:
    """The slots that are deltas, and those that are velocities; a pose is one as a whole or not at all."""
    known = {"delta": recorded.delta_actions, "velocity": recorded.velocity_actions}
    kinds: dict[str, list[int]] = {"delta": [], "velocity": []}
    reasons: dict[tuple[str, str], list[int]] = {}
    undecided = []
    for slots in _groups(action, grippers):
        guesses = {slot: _kind(action, slot, state, recorded.control_hz) for slot in slots}
        votes = {kind for kind, _ in guesses.values() if kind is not None}
        if action.declared & {*slots} or any(known.get(kind) for kind in votes):
            continue
        if len(votes) > 1:
            undecided.append(_undecided(guesses))
            continue
        for slot, (kind, reason) in guesses.items():
            if kind is not None and reason:
                reasons.setdefault((kind, reason), []).append(slot)
        for kind in votes & kinds.keys():
            kinds[kind] += slots
            if kind == "velocity":  # of an angle: three plain numbers
                action.rotations = [one for one in action.rotations if not {*one.slots} <= {*slots}]
    why += [f"{action.called(slots)}: {kind}, because {reason}." for (kind, reason), slots in reasons.items()]
    why += undecided
    return {kind: sorted(slots) for kind, slots in kinds.items()}


def _groups(action: _Part, grippers: set[int]) -> list[list[int]]:
    """Slots that are of one kind: the positions and angles of a pose, the numbers of a list; any other alone."""
    groups: list[list[int]] = []
    for slot in range(len(action.names)):
        if slot in grippers:
            continue
        if groups and groups[-1][-1] == slot - 1 and action.stem(slot) == action.stem(slot - 1):
            groups[-1].append(slot)
        else:
            groups.append([slot])
    for one in action.rotations:  # whose slots may lie apart
        parts = [group for group in groups if {*group} & {*one.slots}]
        groups = [group for group in groups if group not in parts]
        groups.append(sorted(slot for part in parts for slot in part))
    return sorted(groups)


def _undecided(guesses: dict[int, tuple[str | None, str]]) -> str:
    """What to decide where some slots of a group look like one thing and some like another."""
    slots, found = sorted(guesses), {kind for kind, _ in guesses.values()}
    looks = " or ".join(plural for kind, plural in (("delta", "deltas"), ("velocity", "velocities")) if kind in found)
    alike = ", ".join(str(slot) for slot, (kind, _) in guesses.items() if kind in ("delta", "velocity"))
    return (
        f"Actions {slots[0]}-{slots[-1]} look partly like {looks}: decide before building ({alike} do, and are left "
        "out of the block)."
    )


def _kind(action: _Part, slot: int, state: _Part, control_hz: float) -> tuple[str | None, str]:
    """What the action is and why; without a reason where it looks like a plain target; None where it never moves."""
    if _VELOCITY_WORDS.search(action.words(slot)):
        return "velocity", "of the name"
    if _DELTA_WORDS.search(action.words(slot)):
        return "delta", "of the name"
    pairs = [(a, s) for a, s in zip(action.episodes, state.episodes, strict=True) if len(a) > 1 and state.names]
    if sum(len(a) for a, _ in pairs) < MIN_ROWS:
        return "target", "nothing says otherwise; check that it is no delta"
    command = np.concatenate([a[:-1, slot] for a, _ in pairs])
    sensed = np.concatenate([s[:-1] for _, s in pairs])
    change = np.concatenate([np.diff(s, axis=0) for _, s in pairs])
    if np.ptp(command) == 0:
        return None, ""
    name = action.names[slot]
    columns = [state.names.index(name)] if name in state.names else list(range(len(state.names)))
    follows_state = max(_correlation(command, sensed[:, j]) for j in columns)
    best = max(columns, key=lambda j: _correlation(command, change[:, j]))
    follows_change = _correlation(command, change[:, best])
    if follows_change < 0.6 or 1 - follows_change**2 > 0.5 * (1 - follows_state**2):  # what each leaves unexplained
        return "target", "" if follows_state > 0.6 else "it follows neither the proprio nor its change; check"
    per_unit = float((command * change[:, best]).sum() / (command**2).sum())  # change of proprio per 1 of the command
    if 0.7 < per_unit * control_hz < 1.4:
        return "velocity", f"the proprio changes by it per second, not towards it (at {control_hz:g} Hz)"
    return "delta", "it goes with the change of the proprio, not with the proprio itself"


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    spread = float(one.std() * other.std())
    return 0.0 if spread < 1e-12 else float(((one - one.mean()) * (other - other.mean())).mean()) / spread


def _find_wrapping(part: _Part, joints: Sequence[int], moving: set[int], why: list[str]) -> list[int]:
    """Angles that were seen to start over."""
    found = []
    for slot in range(len(part.names)):
        unit = part.units.get(slot, "rad").lower()
        if slot in moving | (part.taken - {*joints}) or unit not in ANGLE_UNITS:
            continue
        full_turn = _TURNS["deg" if unit in DEGREES else "rad"]
        values = part.rows[:, slot]
        if len(np.unique(values)) < MIN_ROWS or np.ptp(values) > 1.02 * full_turn:
            continue
        steps = np.abs(np.concatenate([np.diff(rows[:, slot]) for rows in part.episodes]))
        is_jump = steps > 0.8 * full_turn
        if is_jump.any() and steps[~is_jump].max(initial=0) < 0.2 * full_turn:
            found.append(slot)
    if found:
        why.append(f"{part.called(found)}: wraps, because it jumps by a full turn between neighbouring rows.")
    for slot in found:
        part.units.setdefault(slot, "rad")
    return found


def _guess_units(part: _Part, joints: Sequence[int], moving: set[int]) -> None:
    """Of joint and position targets that were seen to move."""
    joints = [slot for slot in joints if slot not in moving and not _has_own_scale(part, slot)]
    positions = [slot for slot in part.matching(_POSE_WORDS) if slot not in moving]
    positions = [slot for slot in positions if not _HAND_WORDS.search(part.words(slot))]
    if all(_has_own_scale(part, slot) for slot in positions):  # an arm may well stay within 0 to 1 m of one axis
        positions = []
    unit = "deg" if part.biggest(joints) > 1.5 * _TURNS["rad"] else "rad"  # one robot, one unit
    for slot in joints:
        if part.biggest([slot]) < 1.5 * _TURNS[unit]:  # else a motor's own steps, or per cent
            part.units.setdefault(slot, unit)
    for slot in positions:
        part.units.setdefault(slot, "mm" if part.biggest(positions) > 20 else "m")
    for one in part.rotations:
        if _is_unit_free(one):
            part.units = dict.fromkeys(one.slots, "1") | part.units


def _has_own_scale(part: _Part, slot: int) -> bool:
    """How far a hand is closed, a share, a byte; or no rows to tell."""
    values = part.rows[:, slot]
    if not len(values) or _HAND_WORDS.search(part.words(slot)):
        return True
    low, high = values.min(), values.max()
    return bool(low >= 0 and (high <= 1 or (high <= 255 and (values == np.rint(values)).all())))


def _is_unit_free(one: RotationSlots) -> bool:
    return one.format.startswith(("quaternion", "six_d"))


_UNIT_REASONS = {
    "rad": "joints or angles that stay within",
    "deg": "joints or angles that reach",
    "m": "positions that stay within",
    "mm": "positions that reach",
}


def _unit_reasons(part: _Part) -> Iterator[str]:
    for unit, reason in _UNIT_REASONS.items():
        slots = sorted(slot for slot, theirs in part.units.items() if theirs == unit)
        if slots and len(part.rows):
            named = f"their names are those of {reason} {part.biggest(slots):.3g}"
            yield f"units of {part.what} {_ranges(slots)}: {unit}, because {named}; check."


def _ranges(slots: Sequence[int]) -> str:
    """0, 1, 2, 5 as 0-2, 5."""
    runs: list[list[int]] = []
    for slot in slots:
        if runs and runs[-1][-1] == slot - 1:
            runs[-1].append(slot)
        else:
            runs.append([slot])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _units(part: _Part) -> tuple[str, ...] | None:
    """Empty where nothing suggests one."""
    return tuple(part.units.get(slot, "") for slot in range(len(part.names))) if part.units else None
