"""What a run starts from follows from its seed or from pretrained weights, and no rank holds more than it needs."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pretrain.starting_weights import SeededWeights
from pretrain.weights import FirstOf, WeightFiles

sys.path.insert(0, str(Path(__file__).parent))
from placed_ranks import ENGINES, EXPORTS, TINY, empty_model, write_exports, write_wan

SCRIPT = Path(__file__).with_name("placed_ranks.py")
SHARES = {"fsdp2": 0.5, "zero3": 1.5, "zero1": 2.0, "ddp": 2.0}
"""Of all weights' bytes, the most that a rank of two holds before its first step: FSDP2 its part; ZeRO-3 too, with a
float32 copy and room for the part's gradients; ZeRO-1 all, while it lays them end to end in a new place; DDP all, with
room for their gradients. Besides, ZeRO-3 has a bucket for gradients, which is as large for every model."""


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("starting")
    write_wan(folder / "wan")
    write_exports(folder)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT, folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_a_model_is_placed_in_the_memory_of_its_share(name: str, on_two: dict[str, Any]) -> None:
    """And of one block, which is a twelfth of this model."""
    assert SHARES[name] - 0.05 < on_two[name]["peak"] < SHARES[name] + 0.12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_who_needs_a_part_never_has_all_layers(name: str, on_two: dict[str, Any]) -> None:
    """Room for gradients comes later, so it would hide a model that was built whole at first."""
    assert 0.45 < on_two[name]["layers"] < 0.62


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_weights_are_the_same_under_every_engine(name: str, on_two: dict[str, Any]) -> None:
    assert on_two[name]["differing"] == []
    assert on_two[name]["from_wan"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_fine_tuning_starts_from_the_pretrained_weights_under_every_engine(name: str, on_two: dict[str, Any]) -> None:
    assert {export: on_two[name][export] for export in EXPORTS} == {export: [] for export in EXPORTS}


# --- from a seed --------------------------------------------------------------------------------------------------


def all_of(weights: SeededWeights, names: list[str]) -> dict[str, torch.Tensor]:
    return {name: weights.part(name, 0, torch.Size(weights.shapes[name]).numel()) for name in names}


def test_weights_are_a_function_of_the_seed_in_whatever_order_they_are_read() -> None:
    build = partial(empty_model, TINY)
    names = list(build().state_dict())
    first, again, backwards, other = (
        all_of(SeededWeights(build, seed), order)
        for seed, order in ((1, names), (1, names), (1, names[::-1]), (2, names))
    )
    assert all(torch.equal(first[name], again[name]) and torch.equal(first[name], backwards[name]) for name in names)
    drawn = [name for name in names if first[name].std() > 0]
    assert drawn and all(not torch.equal(first[name], other[name]) for name in drawn)
    same_in_two_blocks = [name for name in drawn if ".blocks.0." in name]
    assert same_in_two_blocks
    assert all(not torch.equal(first[name], first[name.replace(".0.", ".1.", 1)]) for name in same_in_two_blocks)


def test_they_are_distributed_as_in_a_model_that_is_built_whole() -> None:
    model = empty_model(TINY)
    weights = SeededWeights(partial(empty_model, TINY), 0)
    torch.manual_seed(0)
    whole = type(model)(model.config).state_dict()
    for name, value in all_of(weights, list(whole)).items():
        assert value.isfinite().all()
        assert (value.std() == 0) == (whole[name].std() == 0), name
        if value.numel() > 100:
            assert value.std().item() == pytest.approx(whole[name].std().item(), rel=0.3), name
        elif value.std() == 0:
            assert torch.equal(value, whole[name].flatten()), name


def test_drawing_leaves_the_default_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    SeededWeights(partial(empty_model, TINY), 0).part("video.proj_out.bias", 0, 1)
    assert torch.equal(torch.rand(3), expected)


# --- from files ---------------------------------------------------------------------------------------------------


@given(shape=st.lists(st.integers(1, 5), max_size=3), data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_part_of_a_file_is_that_part_of_the_tensor(
    shape: list[int], data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensor = torch.randn(shape)
    folder = tmp_path_factory.mktemp("weights")
    save_file({"x": tensor}, folder / "model.safetensors")
    start = data.draw(st.integers(0, tensor.numel()))
    num = data.draw(st.integers(0, tensor.numel() - start))
    part = WeightFiles(folder, "model").part("x", start, num)
    assert torch.equal(part, tensor.flatten()[start : start + num])


def test_of_several_sources_the_first_counts(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "first.safetensors")
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "second.safetensors")
    both = FirstOf(WeightFiles(tmp_path, "first"), WeightFiles(tmp_path, "second"))
    assert both.part("a", 0, 2).tolist() == [1, 1] and both.part("b", 1, 1).tolist() == [0]
