"""Every engine takes the step that one process would take on the whole global batch."""

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.loader import UserError
from pretrain.draws import SampleDraws
from pretrain.engine import EngineConfig, OptimizerConfig, create_engine, learning_rate
from pretrain.engine.deepspeed import deepspeed_config
from pretrain.engine.optimizer import build_optimizer
from pretrain.engine.ranks import join_ranks, resolve_precision
from pretrain.engine.shards import MOMENTS, make_optimizer_states

SCRIPT = Path(__file__).with_name("engine_ranks.py")
ENGINES = ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero2_nvme", "zero3_nvme", "ddp", "fsdp2"]
SOME = ["zero1", "zero3", "fsdp2"]
NUM_STEPS, SAVED_STEP, NAN_STEP, SCHEDULE_STEPS = 5, 3, 4, 10


def on_ranks(num_ranks: int, *arguments: Any) -> dict[str, Any]:
    """What the script saw on so many ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_ranks]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    words = [str(part) for part in (*command, SCRIPT, *arguments)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def on_two(folder: Path) -> dict[str, Any]:
    """Every engine, on two ranks, resumed from its own checkpoint and from others'."""
    names = [*ENGINES, "zero1_bf16"]
    return on_ranks(2, folder, "--train", *names, "--resume", *names, "--saved-on", 2, "--sequence")


@pytest.fixture(scope="module")
def on_four(folder: Path, on_two: dict[str, Any]) -> dict[str, Any]:
    """Some engines, on four ranks, resumed from the checkpoints that two ranks wrote."""
    return on_ranks(4, folder, "--train", *SOME, "--resume", *SOME, "--saved-on", 2, "--sequence")


@pytest.fixture(scope="module")
def seen(on_two: dict[str, Any]) -> dict[str, Any]:
    return on_two["trained"]


@pytest.fixture(scope="module")
def reference() -> SimpleNamespace:
    """A plain torch loop in one process on whole global batches."""
    tiny = runpy.run_path(str(SCRIPT.with_name("tiny_training.py")))
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, max_grad_norm=0.5)
    model = tiny["build_tiny_model"]()
    optimizer = build_optimizer(config, model)
    rows = []
    for step in range(1, NUM_STEPS + 1):
        draws = SampleDraws.seeded(0, step, range(tiny["BATCH"]))
        loss = model.loss({"latents": tiny["global_batch"](step)}, draws).total
        if step != NAN_STEP:
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = learning_rate(
                config, step, SCHEDULE_STEPS
            )
            optimizer.step()
            optimizer.zero_grad()
        rows.append({"loss": loss.item(), "grad_norm": norm.item()})
        if step == SAVED_STEP:
            weights = {name: value.double().sum().item() for name, value in model.named_parameters()}
    return SimpleNamespace(rows=rows, weights=weights)


def assert_close(rows: list[dict[str, Any]], expected: list[dict[str, Any]], first_step: int = 1) -> None:
    for step, (row, other) in enumerate(zip(rows, expected, strict=True), start=first_step):
        if step != NAN_STEP:
            assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_matches_one_process_on_the_global_batch(name: str, seen: dict[str, Any], reference: SimpleNamespace) -> None:
    assert_close(seen[name]["rows"], reference.rows)
    assert seen[name]["weights"] == pytest.approx(reference.weights, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ENGINES, "zero1_bf16"])
def test_skips_a_step_that_is_not_finite_on_one_rank(name: str, seen: dict[str, Any]) -> None:
    assert [row["was_applied"] for row in seen[name]["rows"]] == [step != NAN_STEP for step in range(1, NUM_STEPS + 1)]
    assert seen[name]["rows"][NAN_STEP - 1]["grad_norm"] == math.inf
    assert math.isfinite(seen[name]["rows"][NAN_STEP]["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ENGINES, "zero1_bf16"])
def test_resumes_to_the_last_digit(name: str, on_two: dict[str, Any]) -> None:
    """And the checkpoint holds the moment of the save, though it was written during the steps after it."""
    trained, resumed = on_two["trained"][name], on_two["resumed"][f"{name}_on_2 on {name}"]
    assert repr(resumed["rows"]) == repr(trained["rows"][SAVED_STEP:])  # repr: one loss is NaN, which equals nothing
    assert resumed["validation"] == trained["validation"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_what_is_offloaded_to_disks_lies_there_on_every_rank(name: str, seen: dict[str, Any]) -> None:
    """Copies of weights that checkpoints are written from, sums over micro-batches and all else included."""
    kept = ["master", "gradients", "sums", "moments", "average", "copies"]
    expected = {"zero2_nvme": kept, "zero3_nvme": [*kept, "weights"]}.get(name, [])
    assert seen[name]["on_disk"] == [expected] * 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_disk_changes_no_digit(stage: int, seen: dict[str, Any]) -> None:
    in_memory, on_disk = seen[f"zero{stage}_offload"], seen[f"zero{stage}_nvme"]
    assert repr(on_disk["rows"]) == repr(in_memory["rows"])
    assert (on_disk["weights"], on_disk["validation"]) == (in_memory["weights"], in_memory["validation"])


@pytest.mark.slow
def test_engines_go_on_from_what_others_saved(on_two: dict[str, Any], reference: SimpleNamespace) -> None:
    assert {f"zero1_on_2 on {name}" for name in ENGINES} <= on_two["resumed"].keys()
    assert {f"{name}_on_2 on ddp" for name in ENGINES} <= on_two["resumed"].keys()
    for name, resumed in on_two["resumed"].items():
        if "bf16" not in name:
            assert_close(resumed["rows"], reference.rows[SAVED_STEP:], SAVED_STEP + 1)


@pytest.mark.slow
def test_a_run_goes_on_on_other_numbers_of_ranks(
    folder: Path, on_two: dict[str, Any], on_four: dict[str, Any], reference: SimpleNamespace
) -> None:
    on_one = on_ranks(1, folder, "--resume", *SOME, "zero3_nvme", "--saved-on", 2, 4)
    back_on_two = on_ranks(2, folder, "--resume", *SOME, "--saved-on", 4)
    resumed = {**on_four["resumed"], **on_one["resumed"], **back_on_two["resumed"]}
    assert len(resumed) == 2 * len(SOME) * (len(SOME) + 1)  # from checkpoints of two ranks, and of four
    for row in (*on_four["resumed"].values(), *on_one["resumed"].values(), *back_on_two["resumed"].values()):
        assert_close(row["rows"], reference.rows[SAVED_STEP:], SAVED_STEP + 1)
        assert row["validation"] == pytest.approx(on_two["trained"]["ddp"]["validation"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_sequences_split_over_ranks_give_the_step_of_one_process(world_size: int, request: Any) -> None:
    """And imagine the clips that it would, between two steps, whatever lies on the other ranks."""
    seen = dict(request.getfixturevalue({2: "on_two", 4: "on_four"}[world_size])["sequence"])
    splits = [size for size in (1, 2, 4) if size <= world_size]
    engines = ("zero1", "zero2", "zero3", "ddp", "fsdp2")
    others = {"joint", "joint_fsdp2", "full", "selective", "selective_zero3", "bf16"}
    others |= {"compiled_zero3"} if world_size == 2 else set()
    assert seen.keys() == {f"{name}/{size}" for name in engines for size in splits} | others
    bf16 = seen.pop("bf16")
    assert 1e-4 < bf16["loss"] < 0.1 and bf16["weights"] < 0.01  # autocast was on, and changed little
    videos = [worst for name, worst in seen.items() if not name.startswith(("joint", "compiled"))]
    assert all({"imagined", "measured"} <= worst.keys() for worst in videos)
    bounds = {"measured": 1e-4}  # on pixels, which are rounded
    wrong = {
        name: worst for name, worst in seen.items() if any(far > bounds.get(what, 1e-5) for what, far in worst.items())
    }
    assert not wrong  # gradient norms are about 5, losses about 2, and a step moves weights by about 0.01


@pytest.mark.slow
def test_fsdp2_gathers_a_block_for_each_pass_or_once(on_two: dict[str, Any]) -> None:
    """Of three units (two blocks, and what is in none) the last is gathered for both passes in any case."""
    assert on_two["gathers"] == [3 + 3, 3 + 1]


@pytest.mark.slow
def test_validation_with_averaged_weights_is_the_same_under_every_engine(seen: dict[str, Any]) -> None:
    losses = [seen[name]["validation"] for name in ENGINES]
    assert losses == pytest.approx([losses[0]] * len(losses), abs=1e-5)


@pytest.mark.slow
def test_bf16_computes_close_to_fp32_and_keeps_fp32_weights(seen: dict[str, Any]) -> None:
    losses = [row["loss"] for row in seen["zero1_bf16"]["rows"][:SAVED_STEP]]
    expected = [row["loss"] for row in seen["zero1"]["rows"][:SAVED_STEP]]
    assert losses != expected and losses == pytest.approx(expected, rel=0.05)
    folder_sums = seen["zero1_bf16"]["weights"]
    assert folder_sums == pytest.approx(seen["zero1"]["weights"], abs=0.1)


@pytest.mark.slow
def test_what_goes_wrong_on_one_rank_is_told_on_all(on_two: dict[str, Any]) -> None:
    full, other = on_two["failed"]["told"][::-1]
    assert "step_00000003: cannot be written (No space left on device)" in full
    assert "step_00000003: cannot be written (another rank could not write its part)" in other
    assert on_two["failed"]["left"] == ["step_00000001", "step_00000002"]
    assert on_two["failed"]["states"] == [{"step": 1}] * 2


@pytest.mark.slow
def test_ranks_agree_on_a_flag(seen: dict[str, Any]) -> None:
    assert all(observed["any_rank"] == [True, False] for observed in seen.values())


def test_starting_weights_that_one_rank_refuses_are_refused_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the others would wait for it, and say no more than that it is gone."""

    def refuse(name: str, start: int, num: int) -> torch.Tensor:
        raise UserError("not finite")

    votes: list[bool] = []
    engine = create_engine(EngineConfig(kind="accelerate", device="cpu"), torch.nn.Linear(2, 2), OptimizerConfig())
    monkeypatch.setattr(engine, "any_rank", lambda flag: votes.append(flag) or True)
    for part, told in ((refuse, "not finite"), (lambda name, start, num: torch.zeros(num), "Another rank cannot")):
        with pytest.raises(UserError, match=told):
            engine.take(SimpleNamespace(part=part, shapes={}))
    assert votes == [True, False]


@pytest.mark.slow
def test_a_process_leaves_its_ranks_before_the_interpreter_ends() -> None:
    """Or threads of gloo's may abort it, and a run that is done would count as failed."""
    script = """
import atexit
atexit.register(lambda: print(dist.is_initialized(), groups._WORLD_GROUP))  # what is registered later runs earlier
import torch.distributed as dist
from deepspeed.utils import groups
from torch.nn import Linear
from pretrain.engine import EngineConfig, OptimizerConfig, create_engine
create_engine(EngineConfig(device="cpu", precision="fp32"), Linear(2, 2), OptimizerConfig()).close()
print(dist.is_initialized(), groups._WORLD_GROUP is not None)
"""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-2:] == ["True True", "False None"]


def test_step_needs_all_its_micro_batches() -> None:
    config = EngineConfig(kind="accelerate", device="cpu", precision="fp32", grad_accum_steps=2)
    engine = create_engine(config, torch.nn.Linear(2, 2), OptimizerConfig())
    with pytest.raises(RuntimeError, match="after 0 backward passes, expected 2"):
        engine.step(1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"engine\.device"):
        create_engine(EngineConfig(device="cuda"), torch.nn.Linear(2, 2), OptimizerConfig())


def test_deepspeed_json_follows_from_the_config() -> None:
    config = EngineConfig(zero_stage=2, grad_accum_steps=3)
    rendered = deepspeed_config(config, OptimizerConfig(max_grad_norm=0.7), "bf16")
    assert rendered["zero_optimization"]["stage"] == 2
    assert rendered["gradient_accumulation_steps"] == 3
    assert rendered["gradient_clipping"] == 0.7
    assert rendered["torch_autocast"]["enabled"] is True
    assert json.loads(json.dumps(rendered)) == rendered


def test_offload_reaches_deepspeed_and_is_refused_where_it_cannot_be() -> None:
    config = EngineConfig(zero_stage=3, offload_optimizer="cpu", offload_weights="cpu")
    rendered = deepspeed_config(config, OptimizerConfig(), "bf16")["zero_optimization"]
    assert rendered["offload_optimizer"]["device"] == rendered["offload_param"]["device"] == "cpu"
    with pytest.raises(ValueError, match="kind=accelerate offloads nothing: set kind to deepspeed"):
        EngineConfig(kind="accelerate", offload_optimizer="cpu")
    with pytest.raises(ValueError, match=r"zero_stage=2 keeps weights on every rank: offload_weights needs stage 3"):
        EngineConfig(zero_stage=2, offload_weights="cpu")
    with pytest.raises(ValueError, match=r"zero_stage=1 keeps weights on every rank: offload_weights needs stage 3"):
        EngineConfig(offload_weights="nvme", offload_folder=Path("disk"))
    with pytest.raises(ValueError, match=r"offload_weights=cpu: what is offloaded lies in one place; set both to cpu"):
        EngineConfig(zero_stage=3, offload_optimizer="nvme", offload_weights="cpu", offload_folder=Path("disk"))
    for field in ("offload_optimizer", "offload_weights"):
        with pytest.raises(ValueError, match=r"nvme needs offload_folder: name a folder on a fast disk"):
            EngineConfig.model_validate({"zero_stage": 3, field: "nvme"})


def test_an_update_that_was_not_taken_yet_moves_nothing() -> None:
    """Moments on a disk are there before the first one."""
    engine = create_engine(EngineConfig(kind="accelerate", device="cpu"), torch.nn.Linear(2, 2), OptimizerConfig())
    for shard in engine.shards().values():
        make_optimizer_states(engine._optimizer, shard.holder, set(MOMENTS), step=0)
    assert engine.optimizer_steps() == {}
    assert engine.update_norm() == 0


# --- learning rate ------------------------------------------------------------------------------------------------


@given(
    peak=st.floats(1e-6, 1.0),
    share=st.floats(0, 1),
    warmup=st.integers(0, 50),
    num_steps=st.integers(1, 500),
    step=st.integers(1, 1000),
)
def test_learning_rate_stays_between_its_bounds(
    peak: float, share: float, warmup: int, num_steps: int, step: int
) -> None:
    config = OptimizerConfig(learning_rate=peak, min_learning_rate=peak * share, warmup_steps=warmup)
    value = learning_rate(config, step, num_steps)
    assert value <= peak * (1 + 1e-9)
    assert value > 0 or (value == 0 and config.min_learning_rate == 0)  # a product with a tiny share may be zero
    if step >= max(warmup, num_steps):
        assert value == pytest.approx(peak * share) or warmup >= num_steps
    elif step >= warmup:
        assert value >= learning_rate(config, step + 1, num_steps)


def test_learning_rate_warms_up_linearly_and_ends_at_its_minimum() -> None:
    config = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4)
    assert [learning_rate(config, step, 100) for step in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert learning_rate(config, 52, 100) == pytest.approx(0.55)
    assert learning_rate(config, 100, 100) == pytest.approx(0.1)


def test_decay_steps_frees_the_schedule_from_num_steps() -> None:
    config = OptimizerConfig(decay_steps=50)
    assert learning_rate(config, 30, 100) == learning_rate(config, 30, 1000)


def test_vectors_are_not_decayed() -> None:
    groups = build_optimizer(OptimizerConfig(weight_decay=0.1), torch.nn.Linear(3, 3)).param_groups
    assert [(group["weight_decay"], group["params"][0].ndim) for group in groups] == [(0.1, 2), (0.0, 1)]


# --- precision ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="a processor without bf16 is never measured")
@pytest.mark.parametrize(("bf16_s", "expected"), [(0.2, "bf16"), (0.9, "fp32"), (2.0, "fp32")])
def test_auto_precision_is_what_is_faster(bf16_s: float, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.float32: 1.0, torch.bfloat16: bf16_s}
    monkeypatch.setattr("pretrain.engine.ranks._matmul_s", seconds.__getitem__)
    assert resolve_precision("auto", join_ranks("cpu", timeout_s=60)) == expected


def test_precision_that_is_asked_for_is_taken() -> None:
    ranks = join_ranks("cpu", timeout_s=60)
    assert [resolve_precision(precision, ranks) for precision in ("bf16", "fp32")] == ["bf16", "fp32"]
