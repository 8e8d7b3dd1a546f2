"""What makes a small training step fast on a CPU: alternatives side by side in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.cpu_training

Each pair is timed in turn, A B A B …, in processor seconds (what else runs on the machine counts for neither); printed
are medians and the median of the pairwise ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from configs.loader import load_config
from pretrain.draws import SampleDraws
from pretrain.models.attention import AttentionBackend
from pretrain.models.execution import Execution, set_execution
from pretrain.train import PretrainConfig
from pretrain.world_models.observation_space import ObservationSpaceConfig, ObservationSpaceWorldModel

DEMO = Path(__file__).resolve().parent.parent / "configs" / "pretrain" / "demo.yaml"


def demo_model() -> ObservationSpaceWorldModel:
    config: ObservationSpaceConfig = load_config(PretrainConfig, DEMO).model
    sizes = {"action_dim": 4, "actions_per_latent": 4, "residual_std": 0.4}
    torch.manual_seed(0)
    return ObservationSpaceWorldModel(config.model_copy(update=sizes))


def demo_batch(size: int) -> dict[str, Tensor]:
    return {
        "latents": torch.randn(size, 3, 48, 16, 16),
        "text_tokens": torch.randn(size, 16, 64),
        "actions": torch.randn(size, 8, 4),
        "has_actions": torch.ones(size, dtype=torch.bool),
    }


def training_step(model: ObservationSpaceWorldModel, batch: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model.loss(batch, SampleDraws.seeded(0, 0, range(len(batch["latents"])))).total
    loss.backward()


def compare(name: str, first: Callable[[], None], second: Callable[[], None], repeats: int) -> None:
    timings: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        pair = []
        for work in (first, second):
            start = time.process_time()
            work()
            pair.append(time.process_time() - start)
        timings.append((pair[0], pair[1]))
    timings = timings[1:]  # the first round warms up
    medians = [statistics.median(column) for column in zip(*timings, strict=True)]
    ratio = statistics.median(b / a for a, b in timings)
    print(f"{name:58}{medians[0]:9.3f} s{medians[1]:9.3f} s   second / first {ratio:5.2f}")  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, batch = demo_model(), demo_batch(options.batch_size)

    def step(attention: AttentionBackend = "sdpa", dtype: torch.dtype | None = None) -> Callable[[], None]:
        def work() -> None:
            set_execution(model, Execution(attention))
            training_step(model, batch, dtype)

        return work

    bf16 = torch.bfloat16
    compare("step, fp32: torch's attention | plain attention", step(), step("math"), options.repeats)
    compare("step, bf16: torch's attention | blockwise", step(dtype=bf16), step("blockwise", bf16), options.repeats)
    compare("step: fp32 | bf16 blockwise", step(), step("blockwise", bf16), options.repeats)


if __name__ == "__main__":
    main()
