"""Which ranks share a sequence; how they do is `pretrain.models.sequence`.

Consecutive ranks do, because they sit on one machine, where links are fastest. The libraries under the engines are told
nothing: to them every rank is a data-parallel one. So ZeRO and FSDP2 shard over all ranks, and the mean of gradients
over all ranks is the right one whatever the ZeRO stage. DeepSpeed's own sequence parallelism (an `mpu`) is not used:
under it stages 1 and 2 multiply gradients by the size of the group, and stage 3 does not.
"""

from datetime import timedelta

import torch.distributed as dist
from torch import nn

from configs.loader import UserError

from ..models.sequence import SequenceRanks, SplitsSequence
from .ranks import Ranks


def split_sequence(module: nn.Module, ranks: Ranks, size: int, timeout_s: float) -> None:
    """Lets every `size` consecutive ranks share a sequence in all networks of `module` that make tokens. Collective."""
    if size == 1:
        return
    networks = [part for part in module.modules() if isinstance(part, SplitsSequence)]
    if not networks:
        raise UserError(f"engine.sequence_parallel={size}, but this model has no token sequence to split; set it to 1.")
    for network in networks:
        check_split(size, network.heads, ranks.world_size)
    group, _ = dist.new_subgroups(group_size=size, timeout=timedelta(seconds=timeout_s))
    for network in networks:
        network.sequence = SequenceRanks(ranks.rank % size, size, group)


def check_split(size: int, heads: int, num_ranks: int) -> None:
    if num_ranks % size:
        raise UserError(
            f"engine.sequence_parallel={size} does not divide the {num_ranks} rank(s) of this run; choose a "
            "divisor, or start another number of ranks."
        )
    if heads % size:
        raise UserError(
            f"engine.sequence_parallel={size} does not divide the {heads} attention heads of the model; "
            "choose a divisor of the heads."
        )
