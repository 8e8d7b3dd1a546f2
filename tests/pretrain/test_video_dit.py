"""The video expert against diffusers' own Wan transformer: names, shapes and numbers."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from pretrain.models.transformer import FP32RMSNorm
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


def test_time_embeddings_are_float32_under_autocast():
    torch.manual_seed(0)
    model = VideoDiT(VideoDiTConfig(**SIZES))
    flow_time, actions = torch.tensor([[0.5, 0.5005]]), torch.randn(1, 2, 48)
    expected = model.condition_embedder.time(flow_time, actions)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.condition_embedder.time(flow_time, actions)
    for value, exact in zip(found, expected, strict=True):
        assert value.dtype == torch.float32 and torch.equal(value, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_and_its_gradients_are_torchs(dtype):
    torch.manual_seed(0)
    ours, torchs = FP32RMSNorm(24, eps=1e-6), torch.nn.RMSNorm(24, eps=1e-6)
    torch.nn.init.normal_(ours.weight)
    torchs.load_state_dict(ours.state_dict())
    x, grad = torch.randn(2, 5, 24).to(dtype), torch.randn(2, 5, 24).to(dtype)
    results = []
    for norm, wide in ((ours, x), (torchs, x.float())):
        leaf = wide.clone().requires_grad_()
        out = norm(leaf)
        results.append([out, *torch.autograd.grad(out, [leaf, norm.weight], grad.to(out.dtype))])
    assert [value.dtype for value in results[0]] == [dtype, dtype, torch.float32]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for found, exact in zip(*results, strict=True):
        torch.testing.assert_close(found.float(), exact, atol=tolerance, rtol=tolerance)
