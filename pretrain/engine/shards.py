"""A rank's part of the weights and of the optimizer's states, the same to look at under every engine.

Engines keep float32 weights where their optimizer updates them: in the parameter itself (one process, DDP), in its
local shard (FSDP2), in a slice of a flat partition (ZeRO). A `Shard` says which elements of a parameter this rank is in
charge of, and where they are. Over all ranks the shards of a parameter hold each of its elements exactly once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

STEP = "step"  # of an optimizer's states the one that counts updates; the others have a number per weight
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's others


@dataclass(frozen=True)
class Shard:
    """Elements from `start` on of a flattened parameter: the `num` of `holder`, flattened, from `offset` on."""

    start: int
    num: int
    holder: Any
    """The tensor that the optimizer updates, and files its states under."""
    offset: int
    is_trained: bool

    @property
    def values(self) -> Float[Tensor, "num"]:
        """The live weights: writing into them changes them."""
        return self.part_of(self.holder)

    def part_of(self, like_holder: Any) -> Float[Tensor, "num"]:
        return local(like_holder).detach().view(-1)[self.offset : self.offset + self.num]


def share(num_elements: int, rank: int, world_size: int) -> tuple[int, int]:
    """First element and number of elements of the rank-th of equal parts; the last ones may be shorter or empty."""
    part = -(-num_elements // world_size)
    start = min(rank * part, num_elements)
    return start, min(part, num_elements - start)


def local(tensor: Any) -> Tensor:
    """A DTensor's local shard; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def optimizer_states(
    optimizer: torch.optim.Optimizer, shards: dict[str, Shard]
) -> Iterator[tuple[str, str, Float[Tensor, "num"]]]:
    """(key, parameter's name, its shard's numbers) of all states that have a number per weight; live."""
    for name, shard in shards.items():
        if shard.is_trained:
            for key, value in optimizer.state.get(shard.holder, {}).items():
                if key != STEP:
                    yield key, name, shard.part_of(value)


def adamw_update_square(
    optimizer: torch.optim.Optimizer, shards: dict[str, Shard], shapes: Mapping[str, tuple[int, ...]]
) -> float:
    """Sum of squares of what the last update of AdamW added to these shards, from what it left; 0 before the first.

    Weights before the update are nowhere kept, but they follow from those after it and the states.
    """
    group = optimizer.param_groups[0]
    (beta1, beta2), eps, lr = group["betas"], group["eps"], group["lr"]
    decay = max(group["weight_decay"] for group in optimizer.param_groups)  # of matrices, see `build_optimizer`
    total = 0.0
    for name, shard in shards.items():
        states = optimizer.state.get(shard.holder, {}) if shard.is_trained else {}
        step = float(states.get(STEP, 0))
        if not step or not shard.num:
            continue
        mean, square = (shard.part_of(states[key]) for key in MOMENTS)
        shift = mean * (lr / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt_() + eps)
        lost = lr * decay if len(shapes[name]) >= 2 else 0.0
        update = (shard.values.to(shift) + shift).mul_(lost / (1 - lost)).add_(shift) if lost else shift
        total += float(torch.linalg.vector_norm(update, dtype=torch.float64)) ** 2
    return total


def make_optimizer_states(optimizer: torch.optim.Optimizer, holder: Tensor, keys: set[str], step: float) -> None:
    """The states that an optimizer would have made in its first update; those that are not there yet are zero."""
    state = optimizer.state[holder]
    state[STEP] = torch.tensor(step, dtype=torch.float32, device=local(holder).device)
    for key in keys - state.keys():
        state[key] = torch.zeros_like(holder, requires_grad=False)
