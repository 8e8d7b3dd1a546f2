"""The video expert against diffusers' own Wan transformer: names, shapes and numbers."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from pretrain.models.video_dit import VideoDiT, VideoDiTConfig

SIZES = dict(
    patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32,
    freq_dim=64, ffn_dim=96, num_layers=2, cross_attn_norm=True,
)  # fmt: skip


@pytest.fixture(params=[{}, {"patch_size": (1, 1, 1)}, {"in_channels": 36}, {"cross_attn_norm": False}])
def pair(request):
    torch.manual_seed(0)
    sizes = SIZES | request.param
    reference = WanTransformer3DModel(**sizes).eval()
    for parameter in reference.parameters():  # Wan starts with a zero head: give every weight a say
        torch.nn.init.normal_(parameter, std=0.1)
    ours = VideoDiT(VideoDiTConfig(**sizes)).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours, reference


def inputs(reference: WanTransformer3DModel, frames: int = 3):
    latents = torch.randn(2, reference.config.in_channels, frames, 8, 6)
    return latents, torch.randn(2, 5, reference.config.text_dim)


@torch.no_grad()
def test_outputs_equal_with_a_timestep_per_sample(pair):
    ours, reference = pair
    latents, text = inputs(reference)
    timestep = torch.tensor([17.0, 903.5])
    expected = reference(latents, timestep, text, return_dict=False)[0]
    torch.testing.assert_close(ours(latents, timestep, text), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_outputs_equal_with_a_timestep_per_token(pair):
    ours, reference = pair
    latents, text = inputs(reference)
    patches = reference.config.patch_size
    tokens = 3 * (8 // patches[1]) * (6 // patches[2])
    timestep = torch.rand(2, tokens) * 1000
    expected = reference(latents, timestep, text, return_dict=False)[0]
    torch.testing.assert_close(ours(latents, timestep, text), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_timestep_per_latent_frame_equals_the_same_timesteps_per_token(pair):
    ours, reference = pair
    latents, text = inputs(reference)
    patches = reference.config.patch_size
    per_frame = torch.rand(2, 3) * 1000
    per_token = per_frame.repeat_interleave((8 // patches[1]) * (6 // patches[2]), dim=1)
    torch.testing.assert_close(ours(latents, per_frame, text), ours(latents, per_token, text), atol=1e-5, rtol=1e-5)


def test_gradients_equal(pair):
    ours, reference = pair
    latents, text = inputs(reference)
    timestep = torch.tensor([250.0, 750.0])
    ours(latents, timestep, text).square().mean().backward()
    reference(latents, timestep, text, return_dict=False)[0].square().mean().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_new_model_predicts_zero():
    torch.manual_seed(0)
    model = VideoDiT(VideoDiTConfig(**SIZES))
    out = model(torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 3, 32))
    assert out.abs().max() == 0
