"""Meta-World: a Sawyer arm, 50 table-top tasks, a scripted expert for each (package `metaworld`, MuJoCo).

Differences from the package's defaults, all of which a published comparison has to mention: shadows, reflections and
multisampling are off (ten times faster on a CPU), the camera is `corner2` turned upright, images are square and small.
"""

import contextlib
import difflib
import gc
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from configs.loader import UserError

from .base import BLACK_LEVEL, HINT, Observation, SimulatorError

APT_LINE = "apt-get install -y --no-install-recommends libosmesa6 libegl1 libgl1 libgl1-mesa-dri libglfw3 libglib2.0-0"

# The published success criteria and experts belong to the package; the words are ours.
INSTRUCTIONS = {
    "assembly-v3": "pick up the ring and put it on the peg",
    "basketball-v3": "put the basketball into the hoop",
    "bin-picking-v3": "move the block from one bin to the other",
    "box-close-v3": "put the lid on the box",
    "button-press-topdown-v3": "press the button from above",
    "button-press-topdown-wall-v3": "reach over the wall and press the button from above",
    "button-press-v3": "press the button",
    "button-press-wall-v3": "reach over the wall and press the button",
    "coffee-button-v3": "press the button of the coffee machine",
    "coffee-pull-v3": "pull the mug away from the coffee machine",
    "coffee-push-v3": "push the mug under the coffee machine",
    "dial-turn-v3": "turn the dial",
    "disassemble-v3": "pull the ring off the peg",
    "door-close-v3": "close the door",
    "door-lock-v3": "lock the door",
    "door-open-v3": "open the door",
    "door-unlock-v3": "unlock the door",
    "drawer-close-v3": "close the drawer",
    "drawer-open-v3": "open the drawer",
    "faucet-close-v3": "close the faucet",
    "faucet-open-v3": "open the faucet",
    "hammer-v3": "hammer the nail into the wall",
    "hand-insert-v3": "put the hand into the hole",
    "handle-press-side-v3": "press the handle down from the side",
    "handle-press-v3": "press the handle down",
    "handle-pull-side-v3": "pull the handle up from the side",
    "handle-pull-v3": "pull the handle up",
    "lever-pull-v3": "pull the lever up",
    "peg-insert-side-v3": "insert the peg into the hole in the side",
    "peg-unplug-side-v3": "unplug the peg from the side",
    "pick-out-of-hole-v3": "pick the puck out of the hole",
    "pick-place-v3": "pick up the puck and bring it to the goal",
    "pick-place-wall-v3": "pick up the puck and bring it over the wall to the goal",
    "plate-slide-back-side-v3": "slide the plate back out of the cabinet to the side",
    "plate-slide-back-v3": "slide the plate back out of the cabinet",
    "plate-slide-side-v3": "slide the plate into the cabinet from the side",
    "plate-slide-v3": "slide the plate into the cabinet",
    "push-back-v3": "push the puck back to the goal",
    "push-v3": "push the puck to the goal",
    "push-wall-v3": "push the puck around the wall to the goal",
    "reach-v3": "reach the goal",
    "reach-wall-v3": "reach the goal behind the wall",
    "shelf-place-v3": "put the block on the shelf",
    "soccer-v3": "push the ball into the net",
    "stick-pull-v3": "pull the box with the stick",
    "stick-push-v3": "push the box with the stick",
    "sweep-into-v3": "sweep the puck into the hole",
    "sweep-v3": "sweep the puck off the table",
    "window-close-v3": "close the window",
    "window-open-v3": "open the window",
}


class MetaWorldSimulator:
    """One Meta-World task. At most one may be open in a process: see `__init__`."""

    TASKS = tuple(INSTRUCTIONS)
    MAX_STEPS = 500  # the package refuses to step further

    embodiment = "metaworld_sawyer"
    view_names: tuple[str, ...] = ("corner2",)
    action_names: tuple[str, ...] = ("dx", "dy", "dz", "gripper")
    proprio_names: tuple[str, ...] = ("hand_x", "hand_y", "hand_z", "gripper_open")
    control_hz = 80.0
    num_goals = 50

    _is_open = False

    def __init__(self, task: str, goal_seed: int, image_size: int = 128) -> None:
        """`goal_seed` draws the 50 goals and object positions that `episode_seed` then indexes."""
        # Two GL contexts in one process are a trap: collecting a closed one unbinds the live one, and every later
        # frame is silently black. So: one at a time, and `close` collects before the next one may be made.
        if MetaWorldSimulator._is_open:
            raise RuntimeError("a MetaWorldSimulator is open in this process: close() it, or use another process")
        self.check_task(task)
        metaworld, experts = import_metaworld()
        self.task = task
        self.instruction = INSTRUCTIONS[task]
        with _quiet_gymnasium():
            # MT1 makes an environment of its own to draw the goals; it never renders, so it holds no GL context.
            self._goals = metaworld.MT1(task, seed=goal_seed).train_tasks
            self._env = metaworld.ALL_V3_ENVIRONMENTS[task](
                render_mode="rgb_array", camera_name="corner2", width=image_size, height=image_size
            )
        gc.collect()
        # Before the first render, or they have no effect. The shadow map is 4096 pixels wide whatever the image's size,
        # and a reflecting material draws the scene twice (for a faint mirror image in a hundredth of the pixels).
        self._env.model.light_castshadow[:] = 0
        self._env.model.mat_reflectance[:] = 0
        self._env.model.vis.quality.offsamples = 0
        self._expert = experts[task]()
        self._state = np.zeros(39)
        MetaWorldSimulator._is_open = True

    @staticmethod
    def check_task(task: str) -> None:
        """Refuse a name that is not a task of this simulator, without starting it."""
        if task not in INSTRUCTIONS:
            nearest = difflib.get_close_matches(task, INSTRUCTIONS, n=3, cutoff=0.3) or ["drawer-open-v3"]
            raise UserError(f"Meta-World has no task {task!r}: the nearest names are {', '.join(nearest)}")

    @staticmethod
    def draw_goals(task: str, goal_seed: int) -> np.ndarray:
        """All goals [50 d] of a goal seed, without rendering anything: to show that two seeds share none."""
        metaworld, _ = import_metaworld()
        with _quiet_gymnasium():
            environment = metaworld.ALL_V3_ENVIRONMENTS[task]()
            goals = []
            for goal in metaworld.MT1(task, seed=goal_seed).train_tasks:
                environment.set_task(goal)
                goals.append(np.array(environment._last_rand_vec, np.float64))
            environment.close()
        return np.stack(goals)

    def reset(self, episode_seed: int, render: bool = True) -> Observation:
        """Goal number `episode_seed` (modulo 50) of the goal seed; nothing else in an episode is random."""
        self._env.set_task(self._goals[episode_seed % self.num_goals])
        self._state, _ = self._env.reset()
        return self._observe(render)

    def step(self, action: np.ndarray, render: bool = True) -> tuple[Observation, bool]:
        self._state, _, _, _, info = self._env.step(np.clip(np.asarray(action, np.float32), -1, 1))
        return self._observe(render), bool(info["success"])

    def expert_action(self) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Constant.*may be too high")  # it is clipped here on purpose
            # a copy: some experts write into the observation that they are given
            action = self._expert.get_action(self._state.copy())
        return np.clip(np.asarray(action, np.float32), -1, 1)

    def goal(self) -> np.ndarray:
        return np.array(self._env._last_rand_vec, np.float64)

    def close(self) -> None:
        if hasattr(self, "_env"):
            self._env.close()
            del self._env
            gc.collect()
            MetaWorldSimulator._is_open = False

    def _observe(self, render: bool) -> Observation:
        views = {"corner2": self._render()} if render else {}
        # The other 35 numbers of the state hold object and goal positions: for the expert only.
        return Observation(views, self._state[:4].astype(np.float32), self.instruction)

    def _render(self) -> np.ndarray:
        try:
            picture = self._env.render()
        except Exception as error:  # each GL backend fails with exceptions of its own
            raise SimulatorError(
                f"MuJoCo cannot render with MUJOCO_GL={os.environ['MUJOCO_GL']} ({error}): "
                f"set MUJOCO_GL=osmesa or egl, whose libraries come with: {APT_LINE}"
            ) from error
        image = np.ascontiguousarray(picture[::-1, ::-1])  # corner2 hangs upside down
        if image.max() < BLACK_LEVEL:
            raise SimulatorError(f"{self.task}: the renderer returned a black frame: {HINT}")
        return image


@contextlib.contextmanager
def _quiet_gymnasium() -> Iterator[None]:
    with warnings.catch_warnings():
        # "Box bound precision lowered by casting to float32", at every construction
        warnings.filterwarnings("ignore", module="gymnasium")
        yield


def import_metaworld() -> tuple[Any, Any]:
    """Import late: everything but closed-loop work runs without the simulator or its GL libraries."""
    os.environ.setdefault("MUJOCO_GL", "osmesa")  # software rendering: needs no display and no GPU
    os.environ.setdefault("LP_NUM_THREADS", "1")  # we run a process per core, and each would start a thread per core
    logging.getLogger("OpenGL").setLevel(logging.WARNING)  # it reports at INFO that its accelerator is not installed
    try:
        import metaworld
        from metaworld.policies import ENV_POLICY_MAP
    except ModuleNotFoundError as error:
        raise UserError(f"the simulator's Python package is missing ({error}): pip install '.[sim]'") from error
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        # MuJoCo loads its GL library at import; PyOpenGL reports an absent one as an AttributeError.
        backend = os.environ["MUJOCO_GL"]
        raise UserError(
            f"the GL libraries for MUJOCO_GL={backend} do not load ({error}): install them with: {APT_LINE}"
        ) from error
    return metaworld, ENV_POLICY_MAP
