"""Figures on paper are those of real models and states, and the best setting is the best of all."""

import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.fields import summarise_fields
from configs.loader import UserError, load_config
from configs.tables import console
from data_pipeline.datasets import Datasets
from data_pipeline.video_io import ViewConfig
from pretrain.draws import SampleDraws
from pretrain.engine import EngineConfig
from pretrain.engine.deepspeed import REDUCE_BUCKET
from pretrain.flops import training_flops, world_model_tokens
from pretrain.memory import ModelSize, activation_bytes, kept_bytes, model_size, states
from pretrain.models.execution import Execution, set_execution
from pretrain.plan import MODES, PlanConfig, Workload, cheapest, lay_out, main, price, settings, usable_bytes
from pretrain.plan_report import show
from pretrain.step_time import GPU_TYPES, best_interval_s, goodput
from pretrain.world_models.observation_space import ObservationSpaceConfig, ObservationSpaceWorldModel
from tests.data_pipeline.tiny_dataset import tiny_dataset

sys.path.insert(0, str(Path(__file__).parent))
from held_ranks import ENGINES, MODEL

CONFIGS = Path(__file__).parents[2] / "configs" / "pretrain"
SHORT = "latent_shape=[5,16,32,40]"  # 17 frames of 256x320
LONG = "latent_shape=[21,16,60,104]"  # 81 frames of 480x832
NVME = {"offload_optimizer": "nvme", "offload_folder": Path("disk")}


def planned(name, *overrides):
    return load_config(PlanConfig, CONFIGS / f"{name}.yaml", overrides)


# --- parameters and memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("wan_1_3b", SHORT, 1_418_996_800),
        ("wan_5b", "latent_shape=[5,48,16,20]", 4_999_787_712),
        ("wan_14b", SHORT, 14_288_491_584),
    ],
)
def test_parameters_are_those_of_the_released_models(name, shape, parameters):
    plan = lay_out(planned(name, shape, "num_gpus=64", "gpu=b200"))
    assert plan.parameters == parameters
    assert plan.parameters_added == (7 * 4 + 1) * plan_width(name) + (plan_width(name) + 1) * plan_width(name)


def plan_width(name):
    return planned(name).model.video.width


class Made(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are still held by somebody."""

    def __init__(self):
        super().__init__()
        self._made = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor):
                storage = one.untyped_storage()
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def held(self, but):
        own = {one.untyped_storage()._cdata for one in but}
        return sum(size for key, (ref, size) in self._made.items() if key not in own and not ref.expired())


TINY = MODEL.video
WIDE_TEXT = TINY.model_copy(update={"text_dim": 256, "num_layers": 2, "ffn_dim": 256})


@pytest.mark.parametrize("sizes", [TINY, WIDE_TEXT], ids=["tiny", "wide_text"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("mode", MODES)
def test_activations_are_what_autograd_keeps(sizes, precision, mode, monkeypatch):
    # ZeRO-3 leaves its own linear layer behind, which keeps the weights in place of autocast's copies of them.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    model = ObservationSpaceWorldModel(
        ObservationSpaceConfig(video=sizes, action_dim=2, actions_per_latent=4, residual_std=1.0)
    )
    set_execution(model, Execution("sdpa", mode))
    num_clips, text = 2, 24
    batch = {
        "latents": torch.randn(num_clips, 3, 16, 16, 12), "text_tokens": torch.randn(num_clips, text, sizes.text_dim),
        "actions": torch.randn(num_clips, 8, 2), "has_actions": torch.ones(num_clips, dtype=torch.bool),
    }  # fmt: skip
    draws = SampleDraws.seeded(0, 0, range(num_clips))
    with Made() as made, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = model.loss(batch, draws).total
    measured = made.held(but=model.parameters())
    counts = world_model_tokens(sizes, (3, 16, 12), text)
    on_paper = num_clips * kept_bytes(sizes, counts, mode, precision)
    if precision == "bf16" and mode == "none":
        on_paper += 2 * model_size(model).cast  # autocast's copies of weights
    assert loss.requires_grad
    assert on_paper == pytest.approx(measured, rel=0.15)


def test_saved_tensors_are_what_is_kept():
    """The same by autograd's own hooks, which see no further than the first checkpoint."""
    model = ObservationSpaceWorldModel(
        ObservationSpaceConfig(video=TINY, action_dim=2, actions_per_latent=4, residual_std=1.0)
    )
    own = {one.untyped_storage().data_ptr() for one in model.parameters()}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = (0 if storage.data_ptr() in own else storage.nbytes(), tensor)
        return tensor

    batch = {
        "latents": torch.randn(1, 3, 16, 16, 16), "text_tokens": torch.randn(1, 24, TINY.text_dim),
        "actions": torch.randn(1, 8, 2), "has_actions": torch.ones(1, dtype=torch.bool),
    }  # fmt: skip
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.loss(batch, SampleDraws.seeded(0, 0, range(1)))
    on_paper = kept_bytes(TINY, world_model_tokens(TINY, (3, 16, 16), 24), "none", "fp32")
    assert on_paper == pytest.approx(sum(size for size, _ in saved.values()), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "ddp", "fsdp2"])
def test_states_are_what_an_engine_holds(name):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).with_name("held_ranks.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIGS.parents[1])}
    done = subprocess.run([*words, script, name], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    size = model_size(ObservationSpaceWorldModel(MODEL))
    on_paper = states(size, EngineConfig(**ENGINES[name], grad_accum_steps=2), 2, "fp32").steady
    bucket = 4 * REDUCE_BUCKET if name in ("zero1", "zero3") else 0  # ZeRO-2 has let go of it
    never_cut = 4 * size.parameters if name == "zero3" else 0  # all weights of so small a model
    unseen = 4 * size.parameters if name == "ddp" else 0  # DDP's buckets, which Python knows nothing of
    assert on_paper + never_cut == pytest.approx(measured - bucket + unseen, rel=0.03)


@given(st.integers(1, 64), st.integers(1, 4), st.sampled_from(["bf16", "fp32"]))
def test_memory_is_monotone(num_clips, more, precision):
    size = ModelSize(parameters=100_003, cast=90_000)
    counts = world_model_tokens(TINY, (3, 16, 16), 8)
    longer = world_model_tokens(TINY, (3 + more, 16, 16), 8)
    by_mode = [activation_bytes(TINY, counts, num_clips, mode, precision) for mode in MODES]
    assert by_mode[0] > by_mode[1] > by_mode[2]
    for mode, few in zip(MODES, by_mode, strict=True):
        assert few < activation_bytes(TINY, counts, num_clips + more, mode, precision)
        assert few < activation_bytes(TINY, longer, num_clips, mode, precision)
        assert few > activation_bytes(TINY, counts, num_clips, mode, precision, sequence_parallel=2)
    engines = [EngineConfig(zero_stage=stage, grad_accum_steps=2) for stage in (1, 2, 3)]
    held = [states(size, engine, num_clips + 1, precision).steady for engine in engines]
    assert held[0] > held[1] > held[2]
    more_gpus = [states(size, engine, num_clips + 9, precision).steady for engine in engines]
    assert all(many < few for many, few in zip(more_gpus, held, strict=True))
    for engine in engines:
        offloading = engine.model_copy(update={"offload_optimizer": "cpu"})
        kept, moved = (states(size, one, num_clips, precision) for one in (engine, offloading))
        assert moved.steady < kept.steady < moved.steady + moved.on_host
        on_disk = states(size, offloading.model_copy(update=NVME), num_clips, precision)
        assert replace(on_disk, on_disk=0, on_host=moved.on_host) == moved and moved.on_disk == on_disk.on_host == 0
        assert on_disk.on_disk > moved.on_host  # what a checkpoint is written from lies there too


# --- the best setting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "gpu", "num_gpus"),
    [("wan_1_3b", SHORT, "h200", 8), ("wan_1_3b", LONG, "h100", 16), ("wan_14b", SHORT, "h200", 64)],
)
def test_the_best_is_the_fastest_of_all_that_fit(name, shape, gpu, num_gpus):
    config = planned(name, shape, f"gpu={gpu}", f"num_gpus={num_gpus}", "loader.global_batch_size=64")
    work = Workload.of(config)
    best = cheapest(config, work, gpu, 0.4)
    assert best is not None
    shortest, num_fitting = float("inf"), 0
    for stage, offloads, ranks, steps, mode, is_compiled in itertools.product(
        (1, 2, 3), (("none", "none"), ("cpu", "none"), ("cpu", "cpu")), range(1, 17), range(1, 65), MODES, (False, True)
    ):
        heads = config.model.video.num_attention_heads
        if heads % ranks or num_gpus % ranks or 64 % (num_gpus // ranks * steps):
            continue
        if stage < 3 and offloads[1] == "cpu":
            continue
        if is_compiled and (not config.engine.compile or (stage == 3 and mode == "none")):
            continue
        engine = EngineConfig(
            zero_stage=stage, offload_optimizer=offloads[0], offload_weights=offloads[1], sequence_parallel=ranks,
            grad_accum_steps=steps, activation_checkpointing=mode, compile=is_compiled,
        )  # fmt: skip
        found = price(config, work, engine, gpu, 0.4)
        assert found.fits == (found.memory <= usable_bytes(gpu))
        if found.fits:
            num_fitting += 1
            shortest = min(shortest, found.step_s)
    assert num_fitting > 3
    assert price(config, work, best, gpu, 0.4).step_s == shortest


def test_compiling_is_proposed_where_it_pays_for_what_it_computes_again():
    """ZeRO-3 compiles with checkpointing alone, and selective checkpointing keeps no products of what is compiled."""
    config = planned("wan_1_3b", SHORT, "gpu=b200", "num_gpus=512", "loader.global_batch_size=1024")
    work = Workload.of(config)
    best = cheapest(config, work, "b200", 0.4)
    assert (best.zero_stage, best.activation_checkpointing, best.compile) == (3, "selective", True)
    others = [{"compile": False, "activation_checkpointing": mode} for mode in MODES]
    others.append({"activation_checkpointing": "full"})
    prices = [price(config, work, best.model_copy(update=changes), "b200", 0.4) for changes in ({}, *others)]
    compiled, _, eager, _, full = (found.memory for found in prices)
    assert eager > compiled > full
    assert min(prices, key=lambda found: found.step_s) == prices[0]

    counts = work.clips[0].counts
    flops = [training_flops(config.model.video, counts, again) for again in ("selective", "products", "full")]
    assert [one.recomputed for one in flops] == sorted({one.recomputed for one in flops})
    assert len({one.model for one in flops}) == 1
    eager_only = planned("wan_1_3b", SHORT, "engine.compile=false", "num_gpus=512", "loader.global_batch_size=1024")
    assert not any(one.compile for one in settings(eager_only, work))


def test_a_run_that_offloads_to_disks_is_planned_with_them():
    """What fits stays what it is, and takes as much longer as the disk is slow."""
    folder = ("engine.offload_folder=/nvme", "num_gpus=8", "engine.zero_stage=3")
    in_memory, slow, fast = (
        planned("wan_14b", SHORT, *folder, f"engine.offload_optimizer={place}", f"offload_gb_s={rate}")
        for place, rate in (("cpu", 5), ("nvme", 5), ("nvme", 1e6))
    )
    work = Workload.of(slow)
    prices = [price(config, work, config.engine, "h200", 0.4) for config in (in_memory, slow, fast)]
    assert len({one.memory for one in prices}) == 1
    assert prices[0].step_s == pytest.approx(prices[2].step_s, rel=1e-3) and prices[1].step_s > 2 * prices[2].step_s
    plan = lay_out(slow)
    assert all((one.on_disk > 0) == (one.offload != "none") and one.on_host == 0 for one in plan.states)
    assert plan.deepspeed is not None and "nvme" not in json.dumps(plan.deepspeed)


def test_a_step_is_as_long_as_its_arithmetic_where_nothing_else_is_to_do():
    alone = ("num_gpus=1", "mfu=0.5", "engine.grad_accum_steps=64")
    config = planned("wan_1_3b", SHORT, *alone)
    plan = lay_out(config)
    work = Workload.of(config)
    flops = 256 * training_flops(config.model.video, work.clips[0].counts).model
    assert plan.configured.step_s == pytest.approx(flops / (0.5 * GPU_TYPES["h200"].peak_flops), rel=0.01)
    assert plan.configured.gpu_hours == pytest.approx(config.num_steps * plan.configured.step_s / 3600)
    full = lay_out(planned("wan_1_3b", SHORT, *alone, "engine.activation_checkpointing=full"))
    assert 1.3 < full.configured.step_s / plan.configured.step_s < 1.8  # a third more products, and nothing fused


def test_more_gpus_are_faster():
    seconds = [
        lay_out(
            planned("wan_14b", SHORT, f"num_gpus={n}", "gpus_per_node=128", "loader.global_batch_size=512")
        ).best.step_s
        for n in (16, 32, 64, 128)
    ]
    assert seconds == sorted(seconds, reverse=True)


def test_4096_gpus():
    config = planned("wan_14b", LONG, "num_gpus=4096", "loader.global_batch_size=4096", "gpu=h100")
    plan = lay_out(config)
    assert plan.best.fits and plan.failures.nodes == 512
    assert plan.failures.hours_between_failures == pytest.approx(6300 / 512)
    assert 0.8 < plan.failures.goodput < 1
    assert len(list(settings(config, Workload.of(config)))) < 5000  # it stays a matter of seconds


@pytest.mark.parametrize(("name", "num_gpus", "best"), [("wan_1_3b", 1, "DDP"), ("wan_14b", 64, "FSDP2")])
def test_accelerate_is_planned_for_as_well(name, num_gpus, best, capsys):
    overrides = (SHORT, "engine.kind=accelerate", "engine.activation_checkpointing=none", f"num_gpus={num_gpus}")
    config = planned(name, *overrides)
    plan = lay_out(config)
    assert plan.best.sharding.startswith(best) and plan.best.fits and plan.deepspeed is None
    ddp, kept, dropped = plan.states
    assert ddp.steady >= dropped.steady == kept.steady and kept.in_backward > dropped.in_backward
    work = Workload.of(config)
    fitting = [found for one in settings(config, work) if (found := price(config, work, one, "h200", 0.4)).fits]
    assert plan.best.step_s == min(found.step_s for found in fitting)
    again = lay_out(planned(name, *overrides, *plan.overrides))
    assert again.configured == again.best
    main(config)
    assert "FSDP2" in capsys.readouterr().out


# --- measured MFU, failures ---------------------------------------------------------------------------------------


def test_the_mfu_of_a_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": n, "split": "train", "mfu": mfu} for n, mfu in ((10, 0.1), (20, 0.35), (30, 0.36))]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"step": 30, "split": "validation"}]))
    assert lay_out(planned("wan_1_3b", SHORT, f"measured={path}")).mfu == 0.35
    path.write_text('{"step": 1, "split": "train"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: no training step in it has an mfu"):
        lay_out(planned("wan_1_3b", SHORT, f"measured={path}"))


def test_the_mfu_of_the_benchmark(tmp_path):
    path = tmp_path / "gpu.json"
    rows = [
        {"who": who, "mfu": mfu, "tokens_per_s": 100.0 * tokens, "step_s": 0.01, "batch": 1}
        for who, mfu, tokens in (
            ("ours", 0.5, 1600),
            ("ours", 0.3, 1600),
            ("ours", 0.7, 32760),
            ("diffusers", 0.9, 1600),
        )
    ]
    path.write_text(json.dumps({"rows": [*rows, {"who": "ours", "error": "out of memory"}]}))
    assert lay_out(planned("wan_1_3b", SHORT, f"measured={path}")).mfu == 0.5
    assert lay_out(planned("wan_1_3b", LONG, f"measured={path}")).mfu == 0.7
    path.write_text("{}")
    with pytest.raises(UserError, match=r"gpu\.json: no MFU"):
        lay_out(planned("wan_1_3b", SHORT, f"measured={path}"))


@pytest.mark.parametrize("mfu", ["NaN", "-0.4", "40", "1e-30", '"fast"', "[1]"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "gpu.json"])
def test_an_mfu_that_cannot_be_is_refused(mfu, name, tmp_path):
    row = f'{{"step": 1, "who": "ours", "tokens_per_s": 1.0, "step_s": 1.0, "batch": 1, "mfu": {mfu}}}'
    (tmp_path / name).write_text(row + "\n" if name == "metrics.jsonl" else f'{{"rows": [{row}]}}')
    with pytest.raises(
        UserError, match=rf"{name}: (has an MFU of .*, which no GPU reaches|no MFU of ours in it); give "
    ):
        lay_out(planned("wan_1_3b", SHORT, f"measured={tmp_path / name}"))


@given(st.floats(0.1, 600), st.floats(1e4, 1e7), st.floats(0, 3600))
def test_no_interval_is_better_than_dalys(checkpoint_s, between_s, restart_s):
    best = goodput(best_interval_s(checkpoint_s, between_s), checkpoint_s, restart_s, between_s)
    others = [between_s * 2.0**-n for n in range(24)]
    assert 0 < best < 1
    assert all(goodput(one, checkpoint_s, restart_s, between_s) <= best * 1.001 for one in others)


def test_sizes_of_clips_are_those_of_the_datasets(tmp_path):
    wide = {"front": ViewConfig(height=24, width=16)}
    folders = {"short": tiny_dataset(tmp_path / "short"), "long": tiny_dataset(tmp_path / "long", views=wide)}
    text_dim, channels = (
        Datasets.open(folders).info.text_encoder.width,
        Datasets.open(folders).info.codec.latent_channels,
    )
    sizes = f"{{patch_size: [1, 1, 1], text_dim: {text_dim}, in_channels: {channels}, out_channels: {channels}}}"
    named = f"{{short: {folders['short']}, long: {folders['long']}}}"
    plan = lay_out(planned("demo", f"loader.dataset={named}", f"model.video={sizes}", "num_gpus=4"))
    assert not plan.assumed
    tokens = {row.clips: row.tokens for row in plan.clips}
    assert len(tokens) == 2 and max(tokens.values()) == 1.5 * min(tokens.values())
    assert plan.configured.micro_batch == "8, 8"


# --- telling ------------------------------------------------------------------------------------------------------


def test_tables_and_json(capsys):
    config = planned("wan_14b", SHORT, "num_gpus=64")
    main(config)
    text = capsys.readouterr().out
    for what in (
        "14,288,491,584",
        "as configured",
        "gpu hours",
        "goodput",
        "checkpoint every",
        '"stage": 3',
        "assumed",
    ):
        assert what in text
    main(config.model_copy(update={"as_json": True}))
    plan = json.load(io.StringIO(capsys.readouterr().out))
    assert f"ZeRO-{plan['deepspeed']['zero_optimization']['stage']}" == plan["best"]["sharding"]
    assert {row["gpu"] for row in plan["gpu_types"]} == GPU_TYPES.keys()
    # the overrides make the configured run the best one
    again = lay_out(planned("wan_14b", SHORT, "num_gpus=64", *plan["overrides"]))
    assert again.configured == again.best


def test_the_page_shows_what_is_printed(capsys):
    page = (CONFIGS.parents[1] / "docs" / "pretraining.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"python -m pretrain\.plan --config (.*?)```", page, re.DOTALL)
    path, *overrides = shlex.split(command.replace("\\\n", ""))
    shown = [_cells(line) for line in page[page.index("| best on |") :].split("\n\n")[0].splitlines()]
    assert len(shown) > 15
    for column, num_gpus in enumerate((1, 8, 512), start=1):
        config = load_config(PlanConfig, CONFIGS.parents[1] / path, [*overrides, f"num_gpus={num_gpus}"])
        plan = lay_out(config)
        show(plan, console())
        out = capsys.readouterr().out
        printed = {row[0]: row[-1] for row in map(_cells, out.splitlines()) if row}
        printed["best on"] = f"{num_gpus} H200"
        printed["beside the config"] = re.findall("Best, beside the config: (.*)", out)[0]
        for row in (shown[0], *shown[2:]):
            assert row[column].strip("`") == printed[row[0]], (num_gpus, row[0])
        told = [f"{clips.activations_gb:.2f} GB" for clips in plan.clips]
        now = plan.configured
        told.append(f"{now.step_s:.4g} s a step" if now.fits else f"({now.memory_gb:.4g} GB)")
        assert all(what in page for what in told), told


def _cells(line):
    return [cell.strip() for cell in re.split("[|│]", line)[1:-1]]


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["engine.sequence_parallel=5", "num_gpus=10"], r"sequence_parallel=5 does not divide the 12 attention heads"),
        (["engine.sequence_parallel=4", "num_gpus=6"], r"sequence_parallel=4 does not divide the 6 rank"),
        (["num_gpus=48"], r"global_batch_size=256 .* 48 rank.*choose a multiple of 48"),
        (["loader.latent_cells_per_batch=1000000000000000000"], r"_per_batch=10+ makes batches of .*1048576"),
        (["engine.grad_accum_steps=3"], r"global_batch_size=256 .*grad_accum_steps=3; choose a multiple of 24"),
        (["latent_shape=[5,48,16,20]"], r"has 48 channels, but model\.video\.out_channels=16"),
        (["latent_shape=[5,16,31,40]"], r"patch_size=\[1, 2, 2\] does not divide latent_shape=\[5, 16, 31, 40\]"),
        (["latent_shape=[2,16,32,40]"], r"has 2 frames, .*=2 leave nothing to predict"),
        (
            ["latent_shape=[201,16,180,320]", "num_gpus=1", "gpu=l40s"],
            r"need at least [\d.]+ GB on each GPU .*gpu=l40s has 43\.2 GB",
        ),
        (["loader.dataset=/nowhere"], r"/nowhere"),
        (["measured=/nowhere.jsonl"], r"measured=/nowhere\.jsonl: no such file"),
    ],
)
def test_what_cannot_be_is_refused(overrides, complaint):
    shape = [] if any("dataset" in one or "latent_shape" in one for one in overrides) else [SHORT]
    with pytest.raises(UserError, match=complaint):
        lay_out(planned("wan_1_3b", *shape, *overrides))


@pytest.mark.parametrize(
    "name", ["video.num_layers", "video.num_attention_heads", "video.in_channels", "video.ffn_dim", "action_dim"]
)
def test_sizes_that_no_machine_could_count_are_refused(name):
    with pytest.raises(UserError, match=rf"model\.{name} is 10+, but should be less than or equal to"):
        planned("wan_1_3b", f"model.{name}=1000000000000000000")


NUMBERS = ("nan", "-1", "1e-320", "1e308", str(10**400))


def numeric_settings():
    fields = summarise_fields(PlanConfig, str)
    return [one.key for one in fields if re.search(r"\b(int|float)\b", one.type_text) and ".0" not in one.key]


@pytest.mark.parametrize("number", NUMBERS)
def test_whatever_number_stands_somewhere_there_is_a_plan_or_a_sentence(number):
    names = numeric_settings()
    assert len(names) > 60 and {"num_gpus", "mfu", "model.flow_time.mean", "optimizer.eps"} <= set(names)
    for name in names:
        value = f"[{', '.join([number] * {'latent_shape': 4, 'model.video.patch_size': 3}.get(name, 2))}]"
        for written in (number, value):
            try:
                lay_out(planned("demo", "latent_shape=[5,48,8,8]", f"{name}={written}"))
            except UserError as error:
                assert "\n" not in str(error)
            except Exception as error:
                raise AssertionError(f"{name}={written}") from error
