"""The program for a borrowed GPU works before there is one."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu


def run(output: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    arguments = ["gpu", "--device", "cpu", "--tiny", "--repeats", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    gpu.main()
    return json.loads(output.read_text())


def test_it_measures_every_variant_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(tmp_path / "gpu.json", monkeypatch)
    assert {"diffusers", "blocks: full", "attention: blockwise"} <= result["parity"].keys()
    assert len(result["rows"]) == 12
    for row in result["rows"]:
        assert "error" not in row, row
        assert row["step_s"] > 0 and row["tokens_per_s"] > 0 and row["model_flops"] > 0
    assert "times as fast as the best of diffusers' class" in capsys.readouterr().out


def test_nothing_is_timed_where_something_is_computed_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "parity", lambda device: {"blocks: full": 0.5, "attention: math": float("nan")})
    with pytest.raises(SystemExit, match=r"blocks: full, attention: math computes something else; nothing was timed"):
        run(tmp_path / "gpu.json", monkeypatch)
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"] == []


def test_a_kernel_that_fails_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> tuple[float, None]:
        raise RuntimeError("No available kernel.\nand more")

    monkeypatch.setattr(gpu, "measure", fails)
    model = gpu.build("ours", gpu.TINY, gpu.torch.device("cpu"))
    optimizer = gpu.torch.optim.AdamW(model.parameters())
    variant = gpu.Variant("ours", "math", False)
    assert gpu._try(model, optimizer, variant, gpu.TINY_CLIPS[0], gpu.TINY, 4, 1) == {"error": "No available kernel."}
