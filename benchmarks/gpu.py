"""Wan 1.3B on one NVIDIA GPU: is everything right there, and how fast is it beside diffusers' class?

    python -m benchmarks.gpu --output gpu.json                       about ten minutes; --minutes ends it earlier
    python -m benchmarks.gpu --device cpu --tiny --output tiny.json  the same program in seconds, to try it

Needs no network and no weights. First parity: a tiny model against diffusers', every attention kernel, block masks,
compiled and checkpointed blocks against plain ones; a difference ends it with exit code 1. Then training steps
(forward, backward, AdamW on float32 weights under bf16 autocast) of clips of 17 frames of 256x320 and 81 of 480x832,
with a timestep per sample: time, tokens per second, MFU, HFU and peak memory. It ends with a table and writes JSON.
Without diffusers its rows are left out. FLOPs are those of `pretrain.flops`.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import say
from pretrain.flops import TokenCounts, peak_flops, training_flops
from pretrain.models.attention import SDPA_BACKENDS, AttentionBackend, attend, attention
from pretrain.models.execution import Checkpointing, Execution, recomputing, set_execution
from pretrain.models.token_groups import Rule, attention_plan
from pretrain.models.video_dit import VideoDiT, VideoDiTConfig

try:
    from diffusers import WanTransformer3DModel
except ImportError:
    WanTransformer3DModel = None  # type: ignore[assignment, misc]

TINY = VideoDiTConfig(num_attention_heads=2, attention_head_dim=24, text_dim=16, freq_dim=32, ffn_dim=96, num_layers=2)


@dataclass(frozen=True)
class Clips:
    """A batch of latents."""

    name: str
    batch: int
    latents: tuple[int, int, int]  # frames, height, width


REAL_CLIPS = Clips("17x256x320", 8, (5, 32, 40)), Clips("81x480x832", 1, (21, 60, 104))
TINY_CLIPS = Clips("5x32x32", 2, (2, 4, 4)), Clips("9x32x48", 1, (3, 4, 6))


@dataclass(frozen=True)
class Variant:
    who: str  # ours, diffusers
    attention: AttentionBackend
    compile: bool
    checkpointing: Checkpointing = "none"


def variants(device: str, is_long: bool) -> Iterator[Variant]:
    """The most telling ones first: time may run out."""
    if device == "cpu":
        yield from (Variant("ours", "sdpa", False, checkpointing) for checkpointing in ("none", "selective", "full"))
        yield Variant("ours", "blockwise", False)
        yield from (Variant("diffusers", "sdpa", False, checkpointing) for checkpointing in ("none", "full"))
        return
    yield Variant("ours", "cudnn", True)
    yield Variant("diffusers", "sdpa", False, "full" if is_long else "none")
    yield Variant("diffusers", "cudnn", True)
    yield Variant("diffusers", "cudnn", False)
    yield Variant("ours", "cudnn", False)
    yield Variant("ours", "flash", True)
    yield Variant("ours", "cudnn", True, "full")
    yield Variant("ours", "cudnn", False, "selective")
    yield Variant("ours", "cudnn", False, "full")
    yield Variant("ours", "efficient", True)


# --- parity -------------------------------------------------------------------------------------------------------


def parity(device: torch.device) -> dict[str, float]:
    """Relative differences by name; each should be within its bound."""
    found = {f"attention: {name}": error for name, error in kernel_errors(device).items()}
    plain = outputs_and_gradients(device, Execution("math"))
    found["blocks: selective"] = difference(outputs_and_gradients(device, Execution("math", "selective")), plain)
    found["blocks: full"] = difference(outputs_and_gradients(device, Execution("math", "full")), plain)
    if device.type == "cuda":
        found["blocks: compiled"] = difference(outputs_and_gradients(device, Execution("math", compile=True)), plain)
        found["block mask"] = block_mask_error(device)
    if WanTransformer3DModel is not None:
        found["diffusers"] = difference(diffusers_outputs_and_gradients(device), plain)
    return found


BOUNDS = {"attention": 2e-2, "block mask": 2e-2, "blocks": 1e-4, "diffusers": 1e-4}
"""bf16 kernels against float32; the rest is float32 against float32."""


def kernel_errors(device: torch.device) -> dict[str, float]:
    names: Sequence[AttentionBackend] = ("sdpa", "cudnn", "flash", "efficient", "math")
    names = names if device.type == "cuda" else ("sdpa", "math", "blockwise")
    torch.manual_seed(0)
    exact = [torch.randn(2, 200, 4, 128, device=device) for _ in range(3)]
    bf16 = [x.bfloat16() for x in exact]
    expected = with_gradients(lambda q, k, v: attention(q, k, v, backend="math"), [x.float() for x in bf16])
    return {
        name: difference(with_gradients(lambda q, k, v, name=name: attention(q, k, v, backend=name), bf16), expected)
        for name in names
    }


def block_mask_error(device: torch.device) -> float:
    """Chunk-causal attention, through FlexAttention and through a boolean mask."""
    headers = [("video", tuple(chunk for chunk in range(4) for _ in range(100)))]
    table = {("video", "video"): Rule.SAME_OR_EARLIER_BLOCKS}
    inputs = [torch.randn(1, 400, 2, 64, device=device).bfloat16() for _ in range(3)]
    flex = attention_plan(headers, headers, table, device)
    (boolean,) = attention_plan(headers, headers, table, torch.device("cpu"))
    assert isinstance(boolean.mask, Tensor)
    mask = boolean.mask.to(device)
    exact = with_gradients(lambda q, k, v: attention(q, k, v, mask, "math"), [x.float() for x in inputs])
    return difference(with_gradients(lambda q, k, v: attend(q, k, v, flex), inputs), exact)


def with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]


def outputs_and_gradients(device: torch.device, execution: Execution) -> list[Tensor]:
    model = tiny_weights(VideoDiT(TINY)).to(device)
    set_execution(model, execution)
    return _run_tiny(model, device)


def diffusers_outputs_and_gradients(device: torch.device) -> list[Tensor]:
    return _run_tiny(tiny_weights(diffusers_model(TINY)).to(device), device)


def tiny_weights(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(model.named_parameters()):
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def _run_tiny(model: nn.Module, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 16, 3, 8, 8, generator=generator), torch.randn(2, 7, 16, generator=generator)
    out = velocity(model, latents.to(device), torch.tensor([250.0, 750.0], device=device), text.to(device))
    out.square().mean().backward()
    return [out, *(cast(Tensor, parameter.grad) for _, parameter in sorted(model.named_parameters()))]


def difference(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative one of several tensors."""
    pairs = zip(found, exact, strict=True)
    return max(((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-6)).item() for a, b in pairs)


# --- speed --------------------------------------------------------------------------------------------------------


def diffusers_model(sizes: VideoDiTConfig) -> Any:
    return WanTransformer3DModel(**sizes.model_dump())


def velocity(model: Any, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    out = model(latents, timestep, text)
    return out if isinstance(out, Tensor) else out.sample


def build(who: str, sizes: VideoDiTConfig, device: torch.device) -> Any:
    torch.manual_seed(0)
    with device:  # initialised where it is used: minutes faster at this size
        model = VideoDiT(sizes) if who == "ours" else diffusers_model(sizes)
    return model.to(device).train()


def prepare(model: Any, variant: Variant) -> None:
    if variant.who == "ours":
        set_execution(model, Execution(variant.attention, variant.checkpointing, variant.compile))
        return
    for block in model.blocks:
        block._compiled_call_impl = None
    if variant.compile:
        model.compile_repeated_blocks()
    model.gradient_checkpointing = False
    if variant.checkpointing == "full":
        model.enable_gradient_checkpointing()


def training_step(model: Any, optimizer: Any, variant: Variant, clips: Clips, text_dim: int, text_length: int) -> Any:
    device = next(model.parameters()).device
    channels = model.config.in_channels
    latents = torch.randn(clips.batch, channels, *clips.latents, device=device)
    text = torch.randn(clips.batch, text_length, text_dim, device=device)
    timestep = torch.full((clips.batch,), 500.0, device=device)
    theirs = variant.who == "diffusers" and variant.attention in SDPA_BACKENDS
    order = [SDPA_BACKENDS.get(variant.attention, SDPBackend.MATH), SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def step() -> None:
        optimizer.zero_grad()
        with sdpa_kernel(order, set_priority=True) if theirs else nullcontext():
            with torch.autocast(device.type, torch.bfloat16):
                out = velocity(model, latents, timestep, text)
            (out.float() - latents[:, : out.shape[1]]).square().mean().backward()
        optimizer.step()

    return step


def measure(step: Callable[[], None], device: torch.device, repeats: int) -> tuple[float, float | None]:
    """Seconds per step, and peak GPU memory in gigabytes; two steps go before, in which blocks compile."""
    for _ in range(2):
        step()
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    wait(device)
    seconds = (time.perf_counter() - start) / repeats
    return seconds, torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def row(clips: Clips, variant: Variant, sizes: VideoDiTConfig, text_length: int, seconds: float) -> dict[str, Any]:
    (t, h, w), (s, p, q) = clips.latents, sizes.patch_size
    tokens = (t // s) * (h // p) * (w // q)
    again = recomputing(variant.checkpointing, variant.compile and variant.who == "ours")
    flops = training_flops(sizes, TokenCounts(tokens, tokens**2, 1, text_length), again)
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return {
        "step_s": seconds,
        "tokens_per_s": clips.batch * tokens / seconds,
        "model_flops": clips.batch * flops.model,
        "mfu": clips.batch * flops.model / seconds / peak if peak else None,
        "hfu": clips.batch * flops.hardware / seconds / peak if peak else None,
    }


def run_all(options: argparse.Namespace, device: torch.device, deadline: float) -> list[dict[str, Any]]:
    sizes, text_length = (TINY, 8) if options.tiny else (VideoDiTConfig(), 512)
    rows = []
    for who in ("ours", "diffusers") if WanTransformer3DModel is not None else ("ours",):
        model = build(who, sizes, device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
        for clips in TINY_CLIPS if options.tiny else REAL_CLIPS:
            if options.batch:
                clips = replace(clips, batch=options.batch)
            chosen = [one for one in variants(device.type, clips.latents[0] > 10) if one.who == who]
            for variant in chosen:
                # Ours comes first and may not eat all of the time.
                left = deadline - time.monotonic()
                if left < 0 or (who == "ours" and left < options.minutes * 60 * 0.4):
                    say(f"{clips.name}: no time left for {variant}")
                    continue
                rows.append({"clips": clips.name, "batch": clips.batch, **asdict(variant)})
                rows[-1] |= _try(model, optimizer, variant, clips, sizes, text_length, options.repeats)
                say(_line(rows[-1]))
        del model, optimizer
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _try(
    model: Any, optimizer: Any, variant: Variant, clips: Clips, sizes: VideoDiTConfig, text_length: int, repeats: int
) -> dict[str, Any]:
    device = next(model.parameters()).device
    try:
        prepare(model, variant)
        step = training_step(model, optimizer, variant, clips, sizes.text_dim, text_length)
        seconds, memory = measure(step, device, repeats)
        return {**row(clips, variant, sizes, text_length, seconds), "peak_memory_gb": memory}
    except (torch.OutOfMemoryError, RuntimeError) as error:  # a kernel that is not there is a row too
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return {"error": "out of memory" if "out of memory" in str(error) else str(error).splitlines()[0][:200]}


def _line(row: dict[str, Any]) -> str:
    name = f"{row['clips']:>11} x{row['batch']:<3}{row['who']:10}{row['attention']:10}"
    name += f"{'compiled' if row['compile'] else 'eager':9}{row['checkpointing']:10}"
    if "error" in row:
        return f"{name}{row['error']}"
    mfu, hfu = (f"{100 * row[key]:5.1f} %" if row[key] else "      -" for key in ("mfu", "hfu"))
    memory = f"{row['peak_memory_gb']:7.1f} GB" if row["peak_memory_gb"] else ""
    return f"{name}{row['step_s']:8.3f} s{row['tokens_per_s']:10.0f} tokens/s  MFU {mfu}  HFU {hfu}{memory}"


def best(rows: list[dict[str, Any]], who: str, clips: str) -> dict[str, Any] | None:
    done = [row for row in rows if row["who"] == who and row["clips"] == clips and "error" not in row]
    return min(done, key=lambda row: row["step_s"] / row["batch"], default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights")
    parser.add_argument("--minutes", type=float, default=10.0, help="no new measurement is begun after so many")
    parser.add_argument("--repeats", type=int, default=5, help="steps per measurement")
    parser.add_argument("--batch", type=int, default=0, help="clips per step; 0: 8 short ones, 1 long one")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA device here; try --device cpu --tiny")
    torch.backends.cudnn.allow_tf32 = False  # parity is measured in float32
    errors = parity(device)
    wrong = [name for name, error in errors.items() if not error <= BOUNDS[name.split(":")[0]]]
    for name, error in errors.items():
        say(f"parity {name:24}{error:10.1e}{'  WRONG' if name in wrong else ''}")
    rows = [] if wrong else run_all(options, device, deadline)
    machine = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    options.output.write_text(json.dumps({"machine": machine, "parity": errors, "rows": rows}, indent=1) + "\n")
    if wrong:
        sys.exit(f"error: {', '.join(wrong)} computes something else; nothing was timed")
    say()
    for clips in dict.fromkeys(row["clips"] for row in rows):
        ours, theirs = best(rows, "ours", clips), best(rows, "diffusers", clips)
        for fastest in (ours, theirs):
            if fastest is not None:
                say(_line(fastest))
        if ours and theirs:
            ratio = theirs["step_s"] / theirs["batch"] * ours["batch"] / ours["step_s"]
            say(f"{clips:>11}: {ratio:.2f} times as fast as the best of diffusers' class")


if __name__ == "__main__":
    main()
