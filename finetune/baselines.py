"""Two policies that every result is set against: random actions, and behaviour cloning by a small CNN.

    python -m finetune.baselines --config configs/finetune/behaviour_cloning_demo.yaml

trains the latter on a built dataset, from pixels rather than latents: one frame, proprio and the instruction in, an
action chunk out, L1 loss. No world model, no video: what a world action model has to beat, or at least to match.
"""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from pydantic import Field, PositiveInt
from safetensors.torch import save
from torch import Tensor, nn

from configs.loader import StrictConfig, UserError, dump_config, load_config, run_command
from data_pipeline.align import spans_mask
from data_pipeline.dataset import DatasetFolder, Split
from data_pipeline.dataset_index import DatasetIndex
from data_pipeline.normalize import Normalizer, VectorStats
from data_pipeline.sample import SampleMeta, read_array
from data_pipeline.storage import Address, StorageConfig
from data_pipeline.video_io import ViewConfig, decode_clip, prepare_view
from pretrain.engine.ranks import bf16_is_faster
from pretrain.exported import WEIGHTS, load_weights

from .held_actions import random_actions
from .simulators.base import Observation

log = logging.getLogger(__name__)

SPEC = "behaviour_cloning.yaml"


class RandomPolicy:
    """Uniform actions, each held for a while."""

    def __init__(self, action_dim: int) -> None:
        self.action_dim = action_dim
        self._actions: Iterator[np.ndarray] = iter(())

    def reset(self, instruction: str, seed: int = 0) -> None:
        self._actions = random_actions(np.random.default_rng(seed), self.action_dim)

    def needs_observation(self) -> bool:
        return False

    def act(self, observation: Observation) -> np.ndarray:
        return next(self._actions).astype(np.float32)


# --- behaviour cloning -----------------------------------------------------------------------------------------------


class NetworkConfig(StrictConfig):
    channels: int = Field(32, ge=8, multiple_of=8, description="of the first convolution; later ones have more")
    width: int = Field(256, ge=8, description="of the fully connected layers")


class BehaviourCloningSpec(StrictConfig):
    """What is saved beside the weights: enough to act."""

    network: NetworkConfig
    action_horizon: PositiveInt
    execute_steps: PositiveInt
    view: str
    view_config: ViewConfig
    instructions: tuple[str, ...]
    action_stats: VectorStats
    proprio_stats: VectorStats | None

    @property
    def action_dim(self) -> int:
        return self.action_stats.dim

    @property
    def proprio_dim(self) -> int:
        return self.proprio_stats.dim if self.proprio_stats else 0


class BehaviourCloningNetwork(nn.Module):
    """Patches, then strided convolutions, whose last map is flattened: where things are matters more than what."""

    def __init__(self, spec: BehaviourCloningSpec) -> None:
        super().__init__()
        c, width = spec.network.channels, spec.network.width
        # Patches of 4 x 4 first: on a CPU, convolutions at full resolution would take most of the time.
        self.image = nn.Sequential(
            *(nn.Conv2d(5, c, 4, stride=4), nn.GroupNorm(8, c), nn.ReLU()),
            *(nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), nn.GroupNorm(8, 2 * c), nn.ReLU()),
            *(nn.Conv2d(2 * c, 2 * c, 3, stride=2, padding=1), nn.GroupNorm(8, 2 * c), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * c, width), nn.ReLU()),
        )
        self.proprio = nn.Sequential(nn.Linear(max(spec.proprio_dim, 1), width // 4), nn.ReLU())
        self.instruction = nn.Embedding(len(spec.instructions) + 1, width // 4)  # the last one: any other instruction
        self.head = nn.Sequential(
            *(nn.Linear(width + 2 * (width // 4), width), nn.ReLU()),
            *(nn.Linear(width, width), nn.ReLU()),
            nn.Linear(width, spec.action_horizon * spec.action_dim),
        )
        self.action_horizon = spec.action_horizon

    def forward(
        self, image: UInt8[Tensor, "b h w 3"], proprio: Float[Tensor, "b s"], instruction: Tensor
    ) -> Float[Tensor, "b k a"]:
        pixels = image.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1  # b c h w
        # Two more channels hold each pixel's row and column.
        rows = torch.linspace(-1, 1, pixels.shape[2]).view(1, 1, -1, 1).expand_as(pixels[:, :1])
        columns = torch.linspace(-1, 1, pixels.shape[3]).view(1, 1, 1, -1).expand_as(pixels[:, :1])
        seen = self.image(torch.cat([pixels, rows, columns], 1))
        features = torch.cat([seen, self.proprio(proprio), self.instruction(instruction)], 1)
        return self.head(features).unflatten(1, (self.action_horizon, -1)).float()


class BehaviourCloning:
    """The trained network as a policy: plans a chunk, executes part of it, plans again."""

    def __init__(self, spec: BehaviourCloningSpec, network: BehaviourCloningNetwork) -> None:
        self.spec = spec
        self.network = network.eval()
        self.normalize_actions, self.normalize_proprio = _normalizers(spec)
        self._instruction = torch.zeros(1, dtype=torch.long)
        self._chunk: list[np.ndarray] = []

    @classmethod
    def load(cls, folder: Path) -> Self:
        if not (folder / SPEC).is_file() or not (folder / WEIGHTS).is_file():
            raise UserError(
                f"{folder}: holds no behaviour cloning policy ({SPEC} and {WEIGHTS}): "
                "train one with python -m finetune.baselines"
            )
        spec = load_config(BehaviourCloningSpec, folder / SPEC)
        network = BehaviourCloningNetwork(spec)
        load_weights(network, folder, described_by=SPEC)
        return cls(spec, network)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{WEIGHTS}"  # a disk that is full must not cost the policy that is there
        partial.write_bytes(save(self.network.state_dict()))
        (folder / SPEC).write_text(dump_config(self.spec))
        partial.replace(folder / WEIGHTS)

    def reset(self, instruction: str, seed: int = 0) -> None:
        if instruction not in self.spec.instructions:
            log.warning("behaviour cloning never saw the instruction %r and ignores it", instruction)
        self._instruction = self.instruction_indices([instruction])
        self._chunk = []

    def needs_observation(self) -> bool:
        return not self._chunk

    def act(self, observation: Observation) -> np.ndarray:
        if not self._chunk:
            if self.spec.view not in observation.views:
                seen = ", ".join(observation.views) or "none"
                raise UserError(f"behaviour cloning was trained on view {self.spec.view!r}; the views here are: {seen}")
            image = prepare_view(observation.views[self.spec.view][None], self.spec.view_config)
            proprio = torch.from_numpy(observation.proprio[None])
            chunk = self.predict(torch.from_numpy(image), proprio, self._instruction)[0]
            self._chunk = list(chunk[: self.spec.execute_steps].numpy())
        return self._chunk.pop(0)

    def instruction_indices(self, instructions: Sequence[str]) -> Int[Tensor, "b"]:
        return instruction_indices(self.spec.instructions, instructions)

    @torch.no_grad()
    def predict(
        self, image: UInt8[Tensor, "b h w 3"], proprio: Float[Tensor, "b s"], instruction: Tensor
    ) -> Float[Tensor, "b k a"]:
        """Action chunks in physical units, from prepared images and proprio in physical units."""
        if self.normalize_proprio is not None:
            proprio = self.normalize_proprio.normalize(proprio)
        return self.normalize_actions.unnormalize(self.network(image, proprio, instruction))


def instruction_indices(known: Sequence[str], instructions: Sequence[str]) -> Int[Tensor, "b"]:
    """Positions among the known ones; all others share the position after the last."""
    position = {text: i for i, text in enumerate(known)}
    return torch.tensor([position[text] if text in position else len(known) for text in instructions])


def _normalizers(spec: BehaviourCloningSpec) -> tuple[Normalizer, Normalizer | None]:
    proprio = Normalizer(spec.proprio_stats.model_dump(), "mean_std") if spec.proprio_stats else None
    return Normalizer(spec.action_stats.model_dump(), "mean_std"), proprio


# --- its training data -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frames:
    """Every frame of a split from which a whole action chunk was recorded, in memory."""

    images: UInt8[Tensor, "n h w 3"]
    proprio: Float[Tensor, "n s"]  # physical units
    actions: Float[Tensor, "n k a"]  # physical units
    instructions: tuple[str, ...]  # one per frame


def collect_frames(
    index: DatasetIndex, split: Split, embodiment: str, view: str, action_horizon: int, max_frames: int
) -> Frames:
    """Reads each recorded frame once, though clips overlap. Evenly thinned out beyond `max_frames`."""
    rows = index.indices(split, only_with_actions=True)
    keep_every = -(-len(rows) * index.num_frames // max_frames) if len(rows) else 1
    seen: set[tuple[str, str, int]] = set()
    images, proprios, chunks, instructions = [], [], [], []
    for i in rows:
        members = index.read_sample(i)
        meta = SampleMeta.model_validate_json(members["meta.json"])
        if meta.embodiment != embodiment:
            continue
        actions = read_array(members["actions.npy"])
        proprio = read_array(members["proprio.npy"]) if "proprio.npy" in members else np.zeros((len(actions), 1), "f4")
        is_valid = spans_mask(meta.action_spans, len(actions))
        step = len(actions) // (meta.num_frames - 1)  # actions per frame
        wanted = []
        for frame in range(0, (len(actions) - action_horizon) // step + 1):
            number = round(meta.start_s * meta.fps) + frame
            key = (meta.source.name, meta.episode, number)
            is_whole = is_valid[frame * step : frame * step + action_horizon].all()
            if is_whole and key not in seen and number % keep_every == 0:
                seen.add(key)
                wanted.append(frame)
        if not wanted:
            continue
        images.append(decode_clip(members[f"{view}.mp4"], wanted))
        proprios += [proprio[frame * step] for frame in wanted]
        chunks += [actions[frame * step : frame * step + action_horizon] for frame in wanted]
        instructions += [meta.instruction or ""] * len(wanted)
    if not images:
        raise UserError(
            f"{index.address}: split {split!r} has no clip of {embodiment!r} with {action_horizon} recorded actions in "
            "a row: lower action_horizon or build longer clips"
        )
    return Frames(
        images=torch.from_numpy(np.concatenate(images)),
        proprio=torch.from_numpy(np.stack(proprios)),
        actions=torch.from_numpy(np.stack(chunks)),
        instructions=tuple(instructions),
    )


# --- its training ----------------------------------------------------------------------------------------------------


class BehaviourCloningConfig(StrictConfig):
    dataset: Address = Field(description="dataset folder written by data_pipeline.build, or its URL")
    storage: StorageConfig = StorageConfig()
    output: Path = Field(description="folder to write the policy to")
    view: str | None = Field(None, description="camera; null: the dataset's first")
    embodiment: str | None = Field(None, description="robot; null: the dataset's only one")
    network: NetworkConfig = NetworkConfig()
    action_horizon: int = Field(8, ge=1, description="actions predicted at once")
    execute_steps: int = Field(4, ge=1, description="actions executed before it looks again")
    steps: int = Field(600, ge=1, description="optimizer steps")
    batch_size: int = Field(128, ge=1)
    lr: float = Field(1e-3, gt=0, description="highest learning rate; warmed up over 5 % of the steps, then a cosine")
    weight_decay: float = Field(1e-4, ge=0)
    proprio_noise: float = Field(0.1, ge=0, description="noise on standardised proprio, lest it be trusted too much")
    instruction_dropout: float = Field(0.05, ge=0, le=1, description="share of the samples without their instruction")
    max_frames: int = Field(50_000, ge=1, description="frames kept in memory; more are thinned out evenly")
    num_threads: int = Field(1, ge=1, description="two are hardly faster, and far slower where other work runs")
    seed: int = 0


def main(config: BehaviourCloningConfig) -> None:
    started = time.monotonic()
    if config.execute_steps > config.action_horizon:
        raise UserError(f"execute_steps={config.execute_steps} exceeds action_horizon={config.action_horizon}")
    torch.set_num_threads(config.num_threads)
    config.output.mkdir(parents=True, exist_ok=True)
    index = DatasetIndex(config.dataset, config.storage)
    view, embodiment = index.check_view(config.view), choose_embodiment(index, config.embodiment)
    arguments = (embodiment, view, config.action_horizon, config.max_frames)
    frames = collect_frames(index, "train", *arguments)
    log.info("%d frames read in %.0f s", len(frames.images), time.monotonic() - started)
    stats = index.norm_stats["embodiments"][embodiment]
    spec = BehaviourCloningSpec(
        network=config.network,
        action_horizon=config.action_horizon,
        execute_steps=config.execute_steps,
        view=view,
        view_config=index.views[view],
        instructions=tuple(sorted(set(frames.instructions))),
        action_stats=stats["actions_absolute"],
        proprio_stats=stats["proprio"],
    )
    policy = train(config, spec, frames)
    policy.save(config.output)
    summary = f"{config.output}: behaviour cloning, {config.steps} steps, {time.monotonic() - started:.0f} s"
    if len(index.indices("validation", only_with_actions=True)):
        error = validation_error(policy, collect_frames(index, "validation", *arguments))
        summary += f", L1 of standardised actions on held-out episodes {error:.3f}"
    sys.stdout.write(summary + "\n")


def train(config: BehaviourCloningConfig, spec: BehaviourCloningSpec, frames: Frames) -> BehaviourCloning:
    torch.manual_seed(config.seed)
    network = BehaviourCloningNetwork(spec)
    normalize_actions, normalize_proprio = _normalizers(spec)
    actions = normalize_actions.normalize(frames.actions)
    proprio = normalize_proprio.normalize(frames.proprio) if normalize_proprio is not None else frames.proprio
    instructions = instruction_indices(spec.instructions, frames.instructions)
    # Now and then the instruction is withheld, so that the network can do without one that it does not know.
    withheld = torch.tensor(len(spec.instructions))
    optimizer = torch.optim.AdamW(network.parameters(), config.lr, weight_decay=config.weight_decay)
    warmup = max(1, config.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * np.cos(np.pi * step / config.steps))
    )
    generator = torch.Generator().manual_seed(config.seed)
    use_bf16 = bf16_is_faster(torch.device("cpu"))
    running_loss = 0.0
    for step in range(1, config.steps + 1):
        rows = torch.randint(len(actions), (config.batch_size,), generator=generator)
        noise = torch.randn(proprio[rows].shape, generator=generator)
        is_withheld = torch.rand(len(rows), generator=generator) < config.instruction_dropout
        instruction = torch.where(is_withheld, withheld, instructions[rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):
            predicted = network(frames.images[rows], proprio[rows] + config.proprio_noise * noise, instruction)
        loss = F.l1_loss(predicted, actions[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running_loss += (loss.item() - running_loss) / min(step, 50)
        if step % 100 == 0 or step == config.steps:
            log.info("step %d of %d, L1 %.3f", step, config.steps, running_loss)
    return BehaviourCloning(spec, network)


def validation_error(policy: BehaviourCloning, frames: Frames) -> float:
    """Mean L1 of standardised actions."""
    total = 0.0
    for start in range(0, len(frames.images), 256):
        batch = slice(start, start + 256)
        instructions = policy.instruction_indices(frames.instructions[batch])
        predicted = policy.predict(frames.images[batch], frames.proprio[batch], instructions)
        error = (predicted - frames.actions[batch]) / torch.from_numpy(policy.normalize_actions.scale)
        total += float(error.abs().mean(dim=(1, 2)).sum())
    return total / len(frames.images)


def choose_embodiment(dataset: DatasetFolder, wanted: str | None) -> str:
    """The robot asked for, or the dataset's only one."""
    known = list(dataset.embodiments)
    if not known:
        raise UserError(f"{dataset.address}: holds no actions, so there is nothing to imitate or to compare with")
    if wanted is None and len(known) == 1:
        return known[0]
    if wanted not in known:
        given = "holds several robots" if wanted is None else f"holds no robot {wanted!r}"
        raise UserError(f"{dataset.address}: {given}, choose embodiment= one of {', '.join(known)}")
    return wanted


if __name__ == "__main__":
    run_command(main, BehaviourCloningConfig, description=__doc__ or "")
