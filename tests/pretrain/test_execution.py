"""However blocks are computed, they compute the same: attention kernels, compilation, activation checkpointing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import FlopCounterMode

from configs.loader import UserError
from pretrain.engine import EngineConfig
from pretrain.engine.kernels import _gpu_attention, resolve_attention
from pretrain.engine.ranks import join_ranks
from pretrain.models import attention as kernels
from pretrain.models import execution, token_groups
from pretrain.models.attention import attend, attention
from pretrain.models.execution import Execution, recomputing, set_execution
from pretrain.models.token_groups import Rule, attention_plan
from pretrain.models.video_dit import VideoDiT, VideoDiTConfig

CPU = torch.device("cpu")


def qkv(batch: int, queries: int, keys: int, heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(batch, queries, heads, dim), (batch, keys, heads, dim), (batch, keys, heads, dim)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def outputs_and_gradients(inputs: list[Tensor], **options) -> list[Tensor]:
    copies = [x.detach().float().requires_grad_() for x in inputs] if options.pop("exact", False) else inputs
    out = attention(*copies, **options)
    return [out, *torch.autograd.grad(out.float().square().sum(), copies)]


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.float() - exact).norm() / exact.norm()).item()


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 2), queries=st.integers(1, 70), keys=st.integers(1, 40), heads=st.integers(1, 3),
    has_mask=st.booleans(), block_bytes=st.sampled_from([256, 4096, 8 << 20]), keeps=st.booleans(),
)  # fmt: skip
def test_blockwise_attention_is_exact_to_what_bf16_holds(batch, queries, keys, heads, has_mask, block_bytes, keeps):
    """Against float32, whatever the blocks and whether probabilities are kept or computed again."""
    inputs = qkv(batch, queries, keys, heads, 16, torch.bfloat16)
    mask = (torch.rand(queries, keys) < 0.5) | (torch.arange(keys) == 0) if has_mask else None
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernels, "BLOCK_BYTES", block_bytes)
        patched.setattr(kernels, "KEPT_BYTES", 1 << 30 if keeps else 0)
        found = outputs_and_gradients(inputs, mask=mask, backend="blockwise")
    exact = outputs_and_gradients(inputs, mask=mask, exact=True)
    for ours, truth in zip(found, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        if truth.norm() > 1e-3:  # one key: its probability is 1 and gradients to scores vanish
            assert relative_error(ours, truth) < 0.02


def test_blockwise_attention_takes_what_autocast_leaves_in_float32():
    query, key, value = qkv(1, 5, 5, 2, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(query, key, value.bfloat16(), backend="blockwise")
        expected = attention(query, key, value.bfloat16())
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0.03)


@pytest.mark.filterwarnings("ignore:.*flex_attention.*:UserWarning")
def test_a_block_mask_gives_what_the_boolean_mask_gives(monkeypatch: pytest.MonkeyPatch):
    """Chunk-causal groups, teacher forced: what runs on a GPU, here uncompiled."""
    headers = [("clean", (0, 0, 1, 1, 2, 2)), ("noised", (0, 0, 1, 1, 2, 2))]
    table = {
        ("clean", "clean"): Rule.SAME_OR_EARLIER_BLOCKS,
        ("noised", "noised"): Rule.SAME_BLOCK,
        ("noised", "clean"): Rule.EARLIER_BLOCKS,
    }
    inputs = [x.detach() for x in qkv(1, 12, 12, 2, 16, torch.float32)]  # on a CPU it has no backward pass
    expected = attend(*inputs, attention_plan(headers, headers, table, CPU))
    token_groups._plan.cache_clear()
    monkeypatch.setattr(token_groups, "_takes_block_masks", lambda device: True)
    blocks = attention_plan(headers, headers, table, CPU)
    token_groups._plan.cache_clear()
    assert all(isinstance(part.mask, BlockMask) for part in blocks)
    torch.testing.assert_close(attend(*inputs, blocks), expected, atol=1e-5, rtol=1e-5)


def small_model(num_layers: int = 2) -> VideoDiT:
    sizes = VideoDiTConfig(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=48, num_layers=num_layers,
    )  # fmt: skip
    torch.manual_seed(0)
    model = VideoDiT(sizes)
    for parameter in model.parameters():  # layers that start at zero hide what comes before them
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def run(execution: Execution, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Output and gradients."""
    model = small_model()
    set_execution(model, execution)
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 4, 3, 8, 6, generator=generator), torch.randn(2, 5, 8, generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = model(latents, torch.tensor([250.0, 750.0]), text)
    out.float().square().mean().backward()
    return {"output": out.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointing_changes_no_digit(checkpointing, dtype):
    expected = run(Execution(), dtype)
    for name, value in run(Execution(activation_checkpointing=checkpointing), dtype).items():
        assert torch.equal(value, expected[name]), name


def saved_bytes(execution: Execution) -> int:
    """What a forward pass keeps for the backward pass, weights aside."""
    model = small_model(num_layers=6)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    set_execution(model, execution)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = model(torch.randn(1, 4, 3, 8, 6), torch.tensor([500.0]), torch.randn(1, 5, 8))
    assert out.requires_grad
    return sum(kept.values())


def test_full_checkpointing_keeps_a_fraction():
    assert saved_bytes(Execution(activation_checkpointing="full")) < 0.2 * saved_bytes(Execution())


def test_selective_checkpointing_computes_no_product_twice(monkeypatch: pytest.MonkeyPatch):
    products = {}
    for checkpointing in ("none", "selective", "full"):
        with FlopCounterMode(display=False) as counter:
            run(Execution("math", checkpointing))
        # the matrix products of linear layers; torch's math attention is made of bmm, which is computed again
        flops = counter.get_flop_counts()["Global"]
        products[checkpointing] = flops[torch.ops.aten.addmm] + flops.get(torch.ops.aten.mm, 0)
    assert products["selective"] == products["none"] < products["full"]


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_and_are_compiled_once_for_all_layers(monkeypatch: pytest.MonkeyPatch):
    """Into which selective checkpointing cannot look: of what it would keep, it keeps what attentions give."""
    kept: set[str] = set()

    def note(context, operation, *args, **kwargs):
        policy = keep_products(context, operation, *args, **kwargs)
        kept.update([operation.name()] if policy == CheckpointPolicy.MUST_SAVE else [])
        return policy

    keep_products = execution._keep_products
    monkeypatch.setattr(execution, "_keep_products", note)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    expected = run(Execution(activation_checkpointing="selective"))
    assert kept == {"aten::addmm", "aten::_scaled_dot_product_flash_attention_for_cpu"}
    kept.clear()
    for checkpointing in ("none", "selective", "full"):
        for name, value in run(Execution(compile=True, activation_checkpointing=checkpointing)).items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # the three parts of a block, for two layers
    assert kept == {"aten::_scaled_dot_product_flash_attention_for_cpu"}
    assert [recomputing("selective", is_compiled) for is_compiled in (False, True)] == ["selective", "products"]


def test_an_attention_kernel_is_chosen_by_what_runs_it(monkeypatch: pytest.MonkeyPatch):
    ranks = join_ranks("cpu", timeout_s=60)
    assert resolve_attention("auto", "fp32", ranks) == "sdpa"
    for is_faster, expected in ((True, "blockwise"), (False, "sdpa")):
        monkeypatch.setattr("pretrain.engine.kernels.blockwise_is_faster", lambda faster=is_faster: faster)
        assert resolve_attention("auto", "bf16", ranks) == expected
    assert resolve_attention("math", "bf16", ranks) == "math"
    with pytest.raises(UserError, match=r"engine\.attention=cudnn does not run on cpu; choose one of auto, sdpa"):
        resolve_attention("cudnn", "bf16", ranks)
    assert [_gpu_attention("bf16", kind) for kind in ((9, 0), (8, 0))] == ["cudnn", "flash"]
    assert _gpu_attention("fp32", (9, 0)) == "efficient"


def test_zero_3_is_compiled_only_where_activations_are_computed_again():
    with pytest.raises(ValueError, match="compile goes with zero_stage 3 only where activation_checkpointing is"):
        EngineConfig(compile=True, zero_stage=3)
    assert EngineConfig(compile=True, zero_stage=3, activation_checkpointing="full").compile
