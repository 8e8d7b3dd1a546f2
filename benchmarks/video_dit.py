"""One training step of our video transformer beside diffusers' `WanTransformer3DModel`, on a CPU in bf16.

    OMP_NUM_THREADS=1 python -m benchmarks.video_dit            add --compile for our blocks compiled (slow to start)

Same sizes, weights, batch and threads; forward, backward and AdamW under autocast. The two take turns, in processor
seconds (what else runs on the machine counts for neither); printed are medians and the median of the pairwise ratios.
"""

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from benchmarks.timing import in_turn, median_ratio, say
from pretrain.models.execution import Execution, set_execution
from pretrain.models.video_dit import VideoDiT, VideoDiTConfig

SIZES = VideoDiTConfig(num_attention_heads=6, attention_head_dim=64, text_dim=64, ffn_dim=1536, num_layers=4)
CLIPS = {  # batch, then latent frames, height, width: what a causal 4x8x8 codec makes of the clip
    "17 frames of 256x320, batch 1": (1, 5, 32, 40),
    "17 frames of 128x160, batch 2": (2, 5, 16, 20),
    "9 frames of 128x128, batch 8": (8, 3, 16, 16),
}
TEXT_LENGTH = 32


def training_step(model: nn.Module, latents: Tensor, text: Tensor, per_frame: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    timestep = torch.full((len(latents),), 500.0)
    if per_frame:  # as a world model needs it: clean context frames beside noised ones
        frames, tokens = latents.shape[2], latents.shape[3] * latents.shape[4] // 4
        timestep = timestep[:, None].expand(-1, frames)
        if isinstance(model, WanTransformer3DModel):  # which takes one per token
            timestep = timestep.repeat_interleave(tokens, 1)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out: Any = model(latents, timestep, text)
            velocity = out if isinstance(out, Tensor) else out.sample
        (velocity.float() - latents).square().mean().backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    theirs: Any = WanTransformer3DModel(**SIZES.model_dump())  # diffusers' types do not say that it is a module
    variants = {
        "torch's attention": Execution(),
        "blockwise attention": Execution("blockwise"),
        **({"blockwise attention, compiled": Execution("blockwise", compile=True)} if options.compile else {}),
    }
    for clip, (batch, *size) in CLIPS.items():
        latents, text = torch.randn(batch, SIZES.in_channels, *size), torch.randn(batch, TEXT_LENGTH, SIZES.text_dim)
        for per_frame in (False, True):
            say(f"{clip}, a timestep per {'frame' if per_frame else 'sample'}")
            works = {"diffusers": training_step(theirs, latents, text, per_frame)}
            for name, execution in variants.items():
                ours = VideoDiT(SIZES)
                ours.load_state_dict(theirs.state_dict())
                set_execution(ours, execution)
                works[name] = training_step(ours, latents, text, per_frame)
            timings = in_turn(works, options.repeats)
            for name, rows in timings.items():
                ratio = median_ratio(rows, timings["diffusers"], 0)
                say(f"  {name:32}{median(cpu for cpu, _ in rows):8.3f} s   of diffusers' {ratio:5.2f}")


if __name__ == "__main__":
    main()
