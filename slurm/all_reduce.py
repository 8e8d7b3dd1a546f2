"""One sum over processes that meet at an address: what `slurm.preflight` starts beside itself, and ends if it hangs.

    python -m slurm.all_reduce serve HOST:PORT
    python -m slurm.all_reduce join HOST:PORT NAME --rank 0 --world-size 2 --local-rank 0 --backend gloo --limit-s 60

`serve` is where they meet, until its standard input is closed. `join` writes a JSON row: the seconds that the sum took,
and every process's clock at one moment.
"""

import argparse
import json
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

NUM_ELEMENTS = 2**20
NUM_CLOCK_ROUNDS = 3


def serve(host: str, port: int) -> None:
    store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False)
    sys.stdin.read()
    del store


def join(host: str, port: int, given: argparse.Namespace) -> dict[str, object]:
    limit = timedelta(seconds=given.limit_s)
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
    device = torch.device("cpu")
    if given.backend == "nccl":
        device = torch.device("cuda", given.local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        given.backend,
        store=dist.PrefixStore(given.name, store),
        rank=given.rank,
        world_size=given.world_size,
        timeout=limit,
    )
    _sum(given.rank, given.world_size, device)  # the first one makes the connections
    began = time.perf_counter()
    _sum(given.rank, given.world_size, device)
    return {"all_reduce_s": time.perf_counter() - began, "clocks": _clocks(given.world_size, device)}


def _sum(rank: int, world_size: int, device: torch.device) -> None:
    numbers = torch.full((NUM_ELEMENTS,), float(rank + 1), device=device)
    dist.all_reduce(numbers)
    expected = world_size * (world_size + 1) / 2
    if not bool((numbers == expected).all()):
        raise RuntimeError(f"the sum is wrong: {numbers[0].item():g} instead of {expected:g}")


def _clocks(world_size: int, device: torch.device) -> list[float]:
    """Of all processes, right after they have waited for each other; the best of a few rounds."""
    rounds = []
    for _ in range(NUM_CLOCK_ROUNDS):
        dist.all_reduce(torch.zeros(1, device=device))
        if device.type == "cuda":
            torch.cuda.synchronize()
        clocks = torch.zeros(world_size, dtype=torch.float64, device=device)
        clocks[dist.get_rank()] = time.time()
        dist.all_reduce(clocks)
        rounds.append(clocks.tolist())
    return min(rounds, key=lambda clocks: max(clocks) - min(clocks))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m slurm.all_reduce")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve").add_argument("address")
    joining = commands.add_parser("join")
    joining.add_argument("address")
    joining.add_argument("name", help="of the group: processes with the same name meet")
    joining.add_argument("--rank", type=int, required=True)
    joining.add_argument("--world-size", type=int, required=True)
    joining.add_argument("--local-rank", type=int, required=True)
    joining.add_argument("--backend", choices=("gloo", "nccl"), required=True)
    joining.add_argument("--limit-s", type=float, required=True)
    given = parser.parse_args()
    host, _, port = given.address.rpartition(":")
    if given.command == "serve":
        serve(host, int(port))
        return
    sys.stdout.write(json.dumps(join(host, int(port), given)) + "\n")
    sys.stdout.flush()
    os._exit(0)  # taking a group apart may hang, and all is said


if __name__ == "__main__":
    main()
