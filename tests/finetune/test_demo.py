"""The whole chain, twice: on Meta-World and on somebody's own dataset, with a few steps of everything."""

import json
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import markupsafe
import pytest

from configs.loader import UserError
from finetune.demo import (
    DemoConfig,
    Stage,
    demo_folder,
    empty,
    main,
    own_data_stages,
    run_stage,
    simulator_stages,
)
from finetune.demo_report import smoothed

REPOSITORY = Path(__file__).resolve().parents[2]
recordings = SimpleNamespace(**runpy.run_path(str(REPOSITORY / "tests/data_pipeline/recordings.py")))


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "finetune.demo", "quick=true", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=900)


def check(folder: Path, process: subprocess.CompletedProcess[str]) -> dict:
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    assert process.stdout.rstrip().endswith(f"{folder}/results.json\n{folder}/report.html")
    results = json.loads((folder / "results.json").read_text())
    assert {"psnr_model", "psnr_copy_last", "psnr_moving_model", "psnr_moving_copy_last", "psnr_shuffled_actions"} <= (
        results["video"].keys()
    )
    assert results["codec"].keys() == {"psnr", "psnr_moving"}
    assert all(seconds > 0 for seconds in results["seconds"].values())
    page = (folder / "report.html").read_text()
    assert page.count("data:image/") >= 3
    for stage in json.loads((folder / "stages.json").read_text()).values():
        assert str(markupsafe.escape(stage["command"])) in page
    return results


@pytest.mark.slow
def test_meta_world_from_recording_to_report(tmp_path: Path):
    folder = tmp_path / "demo"
    results = check(folder, demo(f"folder={folder}"))
    assert set(results["success"]) == {"drawer-open-v3", "button-press-topdown-v3", "door-open-v3"}
    for rows in results["success"].values():
        assert rows.keys() == {"policy", "random", "blind", "bc", "expert"}
        assert all(cell["episodes"] == 1 for cell in rows.values())
    verify = [sys.executable, "-m", "data_pipeline.verify", str(folder / "dataset")]
    assert subprocess.run(verify, cwd=REPOSITORY, timeout=300).returncode == 0
    again = demo(f"folder={folder}")  # all stages are done: only the report is written anew
    assert again.stdout.count("done before") == len(simulator_stages(DemoConfig(), folder))


@pytest.mark.slow
def test_ones_own_lerobot_dataset(tmp_path: Path):
    data, folder = tmp_path / "my robot", tmp_path / "demo"
    recordings.write_lerobot_v3(data, lengths=(30,) * 3)
    results = check(folder, demo(f"data={data}", f"folder={folder}", "num_ranks=1"))
    assert {"policy", "blind"} <= results["action_error"].keys()
    assert "success" not in results


def test_a_failed_stage_shows_its_reason_and_keeps_what_is_there(tmp_path: Path):
    data, folder = tmp_path / "no robot", tmp_path / "demo"
    data.mkdir()
    process = demo(f"data={data}", f"folder={folder}")
    assert process.returncode == 1
    assert "stage build failed" in process.stdout
    assert "Traceback" not in process.stdout + process.stderr


def test_a_failed_stage_shows_the_sentence_under_all_that_torchrun_says(tmp_path: Path, capsys):
    script = tmp_path / "stage.py"
    printed = "error: no such thing; give another.\n" * 2 + "Traceback\n" + "noise\n" * 50
    script.write_text(f"print({printed!r})\nexit(2)\n")
    assert run_stage(Stage("toy", "a toy", f"python {script}"), tmp_path / "toy.log") is None
    assert capsys.readouterr().out.splitlines()[0] == "      | error: no such thing; give another."
    assert "noise" in (tmp_path / "toy.log").read_text()


def test_fresh_never_empties_a_folder_that_is_not_a_demos(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("do not delete")
    with pytest.raises(UserError, match=r"has no stages\.json, so it is not a demo's"):
        main(DemoConfig(folder=tmp_path, fresh=True))
    assert (tmp_path / "thesis.tex").exists()
    (tmp_path / "thesis.tex").rename(tmp_path / "stages.json")
    empty(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == []


@pytest.mark.parametrize("data", [None, Path("my robot's data")])
def test_folders_of_any_name_reach_the_commands_whole(data: Path | None):
    folder = Path("a demo/für's lab")
    config = DemoConfig(data=data)
    for stage in simulator_stages(config, folder) if data is None else own_data_stages(config, folder):
        words = shlex.split(stage.command)
        paths = [word.partition("=")[2] for word in words if "/für" in word or "robot" in word.partition("=")[2]]
        assert paths
        assert all(path.startswith(str(folder)) or path == str(data) for path in paths)


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path: Path):
    process = demo(f"data={tmp_path}/nowhere")
    assert process.returncode == 2
    assert len(process.stderr.strip().splitlines()) == 1


def test_folders_are_named_after_the_data():
    assert demo_folder(None) == Path("runs/demo")
    assert demo_folder(Path("/data/my robot/")) == Path("runs/demo-my-robot")


def test_smoothing_keeps_length_and_constants():
    assert smoothed([2.0] * 50) == [2.0] * 50
