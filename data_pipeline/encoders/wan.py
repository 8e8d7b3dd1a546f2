"""Wan's video VAE (diffusers' `AutoencoderKLWan`, of Wan 2.1 and 2.2) as a frozen video codec.

Latents are `(mode(x) - mean) / std` with the mean and std of the weights' own config.json, as in Wan's pipelines.
Beware when comparing: those pipelines keep `1 / std` in a variable called `latents_std`.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from configs.loader import UserError

from ..encoder_config import TEMPORAL_STRIDE
from .local_weights import (
    CONFIG_NAME,
    DTYPES,
    check_weight_hash,
    find_model_folder,
    hash_files,
    load_reference,
    read_json,
    save_reference,
)

if TYPE_CHECKING:
    from diffusers.models import AutoencoderKLWan


class WanCodec:
    """Encodes and decodes with the weights in `folder`: the VAE's own folder, or a Wan pipeline that has a `vae/`."""

    name = "wan"
    temporal_stride = TEMPORAL_STRIDE

    def __init__(self, folder: Path | str, dtype: str = "float32") -> None:
        if dtype not in DTYPES:
            raise UserError(f"codec.dtype={dtype!r} is not known: choose one of {', '.join(DTYPES)}.")
        self.folder = find_model_folder(Path(folder), "vae").resolve()
        self.dtype = dtype
        config_path = self.folder / CONFIG_NAME
        weights = sorted(self.folder.glob("*.safetensors"))
        if len(weights) != 1:
            names = ", ".join(path.name for path in weights)
            raise UserError(f"{self.folder} holds {len(weights)} .safetensors files ({names}): leave only the VAE's.")
        self.weight_hash = hash_files([config_path, *weights])
        self.vae: Any = _load_vae(config_path, weights[0], DTYPES[dtype])
        # One clip at a time: a batch gains nothing at video sizes, and a clip's latents must not depend, not even in
        # the last bit, on which other clips it was encoded with.
        self.vae.use_slicing = True
        # The VAE keeps its causal convolutions' caches on itself, so two threads would mix their videos.
        self._lock = threading.Lock()

        config: Any = self.vae.config
        # Structure rather than `scale_factor_spatial`, which older config.json files lack and nothing checks.
        self.spatial_stride = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1)
        self.latent_channels: int = config.z_dim
        self._mean = _per_channel(config.latents_mean, "latents_mean", config.z_dim, config_path)
        self._std = _per_channel(config.latents_std, "latents_std", config.z_dim, config_path)
        if not bool((self._std > 0).all()):
            raise UserError(f"{config_path}: every number of latents_std must be above 0; restore the original file.")

    def to(self, device: torch.device | str) -> Self:
        """Move the VAE; videos and latents stay on whichever device the caller has them."""
        self.vae.to(device)
        return self

    @torch.no_grad()
    def encode(self, video: UInt8[Tensor, "b f h w 3"]) -> Float[Tensor, "b t c hl wl"]:
        self._check_size(video)
        pixels = rearrange(video, "b f h w c -> b c f h w").to(self.vae.device).float() / 127.5 - 1
        with self._lock:
            # The mode, not a draw: a frozen encoder gives one answer.
            latents = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode().float()
        latents = rearrange(latents, "b c t h w -> b t c h w").to(video.device)
        return (latents - self._mean.to(video.device)) / self._std.to(video.device)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b t c hl wl"]) -> UInt8[Tensor, "b f h w 3"]:
        device = latents.device
        raw = latents.float() * self._std.to(device) + self._mean.to(device)
        raw = rearrange(raw, "b t c h w -> b c t h w").to(self.vae.device, self.vae.dtype)
        with self._lock:
            pixels = self.vae.decode(raw).sample.float()
        video = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return rearrange(video, "b c f h w -> b f h w c").to(device)

    def save(self, folder: Path) -> None:
        """A reference, not a copy: the weights are half a gigabyte and the same for every dataset."""
        save_reference(folder, kind=self.name, folder=str(self.folder), dtype=self.dtype, weight_hash=self.weight_hash)

    @classmethod
    def load(cls, folder: Path) -> Self:
        reference = load_reference(folder, fields=("folder", "dtype"))
        path = folder / CONFIG_NAME
        try:
            codec = cls(reference["folder"], reference["dtype"])
        except UserError as error:
            raise UserError(
                f"{path} refers to weights that cannot be opened (if they moved, edit it): {error}"
            ) from error
        check_weight_hash(path, recorded=reference["weight_hash"], found=codec.weight_hash, weights=codec.folder)
        return codec

    def _check_size(self, video: UInt8[Tensor, "b f h w 3"]) -> None:
        _, frames, height, width, _ = video.shape
        stride = self.spatial_stride
        if (frames - 1) % TEMPORAL_STRIDE:
            raise UserError(f"A clip of {frames} frames cannot be encoded by Wan: it takes 1, 5, 9, 13, … frames.")
        if height % stride or width % stride:
            raise UserError(
                f"Frames of {height}x{width} pixels cannot be encoded by this Wan VAE: height and width must be "
                f"multiples of {stride}; change the view's height and width."
            )


def _load_vae(config_path: Path, weights: Path, dtype: torch.dtype) -> AutoencoderKLWan:
    """Strictly: diffusers' own `from_pretrained` only warns about weights that are missing, and leaves them random."""
    from diffusers.models import AutoencoderKLWan  # seconds to import, and only this codec needs it

    config: dict[str, Any] = read_json(config_path)
    if config.get("_class_name") != "AutoencoderKLWan":
        raise UserError(
            f"{config_path} describes {config.get('_class_name', 'no diffusers model')}, not AutoencoderKLWan: give "
            "the folder of the VAE (`vae` in a Wan pipeline)."
        )
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(config)
    if 2 ** sum(vae.config.temperal_downsample) != TEMPORAL_STRIDE:  # sic: diffusers' spelling
        raise UserError(f"{config_path}: only VAEs with a temporal stride of {TEMPORAL_STRIDE} are supported.")
    try:
        state = {name: tensor.to(dtype) for name, tensor in load_file(weights).items()}
        missing, unexpected = vae.load_state_dict(state, strict=False, assign=True)
    except (SafetensorError, RuntimeError) as error:  # a cut file; a tensor of another shape
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{weights} cannot be loaded ({reason}): download or copy the VAE's folder again.") from error
    if missing or unexpected:
        raise UserError(
            f"{weights} does not belong to its {CONFIG_NAME}: {len(missing)} tensors are missing and "
            f"{len(unexpected)} are unknown (first: {(missing + unexpected)[0]}); download the VAE's folder again."
        )
    return vae.eval().requires_grad_(False)


def _per_channel(values: list[float], name: str, channels: int, config_path: Path) -> Float[Tensor, "c 1 1"]:
    if len(values) != channels:
        raise UserError(
            f"{config_path}: {name} has {len(values)} numbers but z_dim is {channels}; restore the original file."
        )
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
