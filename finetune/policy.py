"""A trained world action model as a policy: observation in, action out, replanning every few actions.

`Policy.load` needs only the export folder of a fine-tuning run: weights, statistics, codec and text encoder are in it.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from configs.loader import StrictConfig, UserError
from data_pipeline.dataset import DatasetFolder
from data_pipeline.encoders import pad_text
from data_pipeline.model_inputs import InputConfig, ModelInputs
from data_pipeline.video_io import prepare_view
from data_pipeline.view_layout import PIXELS
from pretrain.exported import load_model_config, load_weights
from pretrain.world_models.base import Batch
from pretrain.world_models.observation_space import ObservationSpaceConfig, ObservationSpaceWorldModel

from .paradigms.joint_video_action import JointVideoAction, JointVideoActionConfig
from .simulators.base import Observation


class PolicyModelConfig(StrictConfig):
    """`model.yaml` of a fine-tuning run: all that is needed to build the network and to feed it."""

    world_model: ObservationSpaceConfig
    policy: JointVideoActionConfig
    inputs: InputConfig
    embodiment: str = Field(description="the robot whose statistics scale proprio and actions")
    execute_steps: int = Field(ge=1, description="actions executed before replanning")


class Policy:
    """Receding horizon over one model: plan a chunk from one observation, execute its first `execute_steps`."""

    def __init__(
        self, model: JointVideoAction, config: PolicyModelConfig, dataset: DatasetFolder, is_blind: bool = False
    ) -> None:
        self.model = model.eval()
        self.config = config
        self.is_blind = is_blind
        self.inputs = ModelInputs(dataset, config.inputs)
        self.view_names = self.inputs.shown
        self.text_encoder = dataset.text_encoder()
        self.text_length = config.inputs.text_length
        embodiment, mode = config.embodiment, config.inputs.normalization
        actions = dataset.normalizer(embodiment, "actions_absolute", mode)
        if actions is None or embodiment not in dataset.embodiments:
            raise UserError(
                f"{dataset.address}: does not describe the robot {embodiment!r}, so no policy can act with it."
            )
        self.action_normalizer = actions
        self.proprio_normalizer = dataset.normalizer(embodiment, "proprio", mode)
        self.embodiment = dataset.embodiments[embodiment]
        self.queue: deque[np.ndarray] = deque()
        self.imagined: Float[Tensor, "t c h w"] | None = None
        self.reset("")

    @classmethod
    def load(cls, folder: Path | str, blind: bool = False) -> Policy:
        """Open the `export/` folder of a fine-tuning run. `blind` zeroes every image, to see what sight is worth."""
        folder = Path(folder)
        config = load_model_config(folder, PolicyModelConfig)
        dataset = DatasetFolder(folder)
        codec = ModelInputs(dataset, config.inputs).codec()
        world_model = ObservationSpaceWorldModel(config.world_model, codec)
        model = JointVideoAction(config.policy, world_model)
        load_weights(model, folder)
        return cls(model, config, dataset, blind)

    def reset(self, instruction: str, seed: int = 0) -> None:
        """Forget the current chunk; `seed` makes the episode's denoising noise reproducible."""
        self.queue.clear()
        self.text = pad_text(self.text_encoder.encode([instruction]), self.text_length)
        self.generator = torch.Generator().manual_seed(seed)

    def needs_observation(self) -> bool:
        """True when the next `act` will plan, and so has to see; otherwise its observation may hold no views."""
        return not self.queue

    def act(self, observation: Observation) -> Float[np.ndarray, "a"]:
        """The next action, in the robot's own units."""
        if not self.queue:
            self.queue.extend(self.plan(observation)[: self.config.execute_steps])
        return self.queue.popleft()

    def plan(self, observation: Observation) -> Float[np.ndarray, "k a"]:
        """A whole action chunk; what it imagines to see is kept in `imagined` (latents)."""
        context = self.model.world_model.latents({"video": self._picture(observation)})
        proprio = torch.zeros(1, self.model.config.proprio_dim or 0)
        if self.proprio_normalizer is not None:
            names = self.embodiment.proprio_names
            if np.shape(observation.proprio) != (len(names),):
                raise UserError(
                    f"proprio has shape {list(np.shape(observation.proprio))}; {self.embodiment.name} reports "
                    f"{len(names)} numbers: {', '.join(names)}."
                )
            scaled = self.proprio_normalizer.normalize(np.asarray(observation.proprio, np.float32))
            proprio[0, : len(scaled)] = torch.from_numpy(scaled)
        actions, future = self.model.plan(context, proprio, self.text, self.generator)
        self.imagined = future[0]
        return self._to_robot(actions[0])

    def predict_chunk(self, batch: Batch) -> Float[np.ndarray, "b k a"]:
        """Chunks for a batch of recorded clips (open-loop evaluation), in the robot's own units."""
        context, _ = self.model.world_model.split(self.model.world_model.latents(batch))
        if self.is_blind:
            context = self.model.world_model.latents({"video": self._black()}).expand_as(context)
        actions, _ = self.model.plan(context, batch["proprio"], batch["text_tokens"], self.generator)
        return np.stack([self._to_robot(chunk) for chunk in actions])

    def _picture(self, observation: Observation) -> UInt8[Tensor, "1 1 h w 3"]:
        """The observed views, cropped, resized and laid out as in training."""
        views = [torch.from_numpy(self._frame(observation, name)) for name in self.view_names]
        return self._black() if self.is_blind else self.inputs.layout.join(views, PIXELS)[None]

    def _frame(self, observation: Observation, name: str) -> UInt8[np.ndarray, "1 h w 3"]:
        if name not in observation.views:
            raise UserError(
                f"The observation has the views {sorted(observation.views) or 'none'}, but the policy was trained on "
                f"{', '.join(map(repr, self.view_names))}; name the robot's cameras so."
            )
        image = np.asarray(observation.views[name])
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"View {name!r} is {image.dtype} {list(image.shape)}; give uint8 [height, width, 3], RGB.")
        return prepare_view(image[None], self.inputs.dataset.views[name])

    def _black(self) -> UInt8[Tensor, "1 1 h w 3"]:
        return torch.zeros(1, 1, *self.inputs.layout.size, 3, dtype=torch.uint8)

    def _to_robot(self, actions: Float[Tensor, "k a"]) -> Float[np.ndarray, "k a"]:
        return self.action_normalizer.unnormalize(actions[:, : self.embodiment.action_dim].numpy()).astype(np.float32)
