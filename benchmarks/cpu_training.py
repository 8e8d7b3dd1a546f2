"""What makes a small training step fast on a CPU: alternatives side by side in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.cpu_training             add --engines for DeepSpeed beside a bare loop

Each pair is timed in turn, A B A B …, in processor seconds (what else runs on the machine counts for neither); printed
are medians and the median of the pairwise ratios.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.timing import in_turn, median_ratio, say
from benchmarks.video_dit import CLIPS, SIZES, TEXT_LENGTH
from configs.loader import load_config
from pretrain.draws import SampleDraws
from pretrain.engine import EngineConfig, OptimizerConfig, create_engine
from pretrain.engine.optimizer import build_optimizer, set_learning_rate
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


def wan_like_model() -> ObservationSpaceWorldModel:
    torch.manual_seed(0)
    config = ObservationSpaceConfig(video=SIZES, action_dim=4, actions_per_latent=4, residual_std=1.0)
    return ObservationSpaceWorldModel(config)


def batch_of(size: int, latents: tuple[int, ...], text: tuple[int, int]) -> dict[str, Tensor]:
    """`latents` are (frames, channels, rows, columns) of a clip, `text` its tokens and their width."""
    return {
        "latents": torch.randn(size, *latents),
        "text_tokens": torch.randn(size, *text),
        "actions": torch.randn(size, (latents[0] - 1) * 4, 4),
        "has_actions": torch.ones(size, dtype=torch.bool),
    }


def demo_batch(size: int) -> dict[str, Tensor]:
    return batch_of(size, (3, 48, 16, 16), (16, 64))


def training_step(model: ObservationSpaceWorldModel, batch: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model.loss(batch, SampleDraws.seeded(0, 0, range(len(batch["latents"])))).total
    loss.backward()


def compare(name: str, first: Callable[[], None], second: Callable[[], None], repeats: int) -> None:
    timings = in_turn({"first": first, "second": second}, repeats)
    of_first, of_second = (median(cpu for cpu, _ in rows) for rows in timings.values())
    ratio = median_ratio(timings["second"], timings["first"], 0)
    say(f"{name:64}{of_first:9.3f} s{of_second:9.3f} s   second / first {ratio:5.2f}")


# --- engines ------------------------------------------------------------------------------------------------------

Precision = Literal["bf16", "fp32"]
ATTENTION: dict[Precision, AttentionBackend] = {"bf16": "blockwise", "fp32": "sdpa"}
OPTIMIZER = OptimizerConfig()


def bare_loop(model: ObservationSpaceWorldModel, batch: dict[str, Tensor], precision: Precision) -> Callable[[], None]:
    """What an engine's step does, written down in plain torch."""
    set_execution(model, Execution(ATTENTION[precision]))
    optimizer = build_optimizer(OPTIMIZER, model)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model.loss(batch, SampleDraws.seeded(0, 0, range(len(batch["latents"])))).total
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm)
        if norm.isfinite():
            set_learning_rate(optimizer, OPTIMIZER.learning_rate)
            optimizer.step()
        optimizer.zero_grad()

    return step


def zero_1(model: ObservationSpaceWorldModel, batch: dict[str, Tensor], precision: Precision) -> Callable[[], None]:
    config = EngineConfig(device="cpu", precision=precision, zero_stage=1, attention=ATTENTION[precision])
    engine = create_engine(config, model, OPTIMIZER)

    def step() -> None:
        draws = SampleDraws.seeded(0, 0, range(len(batch["latents"])))
        engine.backward(engine.forward_loss(batch, draws).total)
        engine.step(OPTIMIZER.learning_rate)

    return step


def workloads(demo_size: int) -> Iterator[tuple[str, Callable[[], ObservationSpaceWorldModel], dict[str, Tensor]]]:
    yield f"demo, batch {demo_size}", demo_model, demo_batch(demo_size)
    for clip, (size, t, h, w) in CLIPS.items():
        yield clip, wan_like_model, batch_of(size, (t, SIZES.in_channels, h, w), (TEXT_LENGTH, SIZES.text_dim))


def compare_engines(demo_size: int, repeats: int) -> None:
    for name, build, batch in workloads(demo_size):
        precisions: tuple[Precision, ...] = ("bf16", "fp32")
        for precision in precisions:
            compare(
                f"{name}, {precision}: bare loop | DeepSpeed ZeRO-1",
                bare_loop(build(), batch, precision),
                zero_1(build(), batch, precision),
                repeats,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--engines", action="store_true", help="one rank of DeepSpeed ZeRO-1 beside a bare loop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.engines:
        compare_engines(options.batch_size, options.repeats)
        return
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
