"""The run folder, and the request to stop."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs.loader import StrictConfig, UserError, load_config
from pretrain.run import StopSignal, exclusive, resume_config, write_config


class Inner(StrictConfig):
    lr: float = 1e-3
    workers: int = 0
    precision: str = "auto"


class RunConfig(StrictConfig):
    run_dir: Path
    inner: Inner = Inner()


def test_an_unchanged_config_resumes(tmp_path: Path) -> None:
    config = RunConfig(run_dir=tmp_path / "run")
    assert resume_config(config.run_dir, config, may_change=()) == config
    write_config(config.run_dir, config)
    assert resume_config(config.run_dir, config, may_change=()) == config
    assert load_config(RunConfig, config.run_dir / "config.yaml") == config


def test_a_changed_config_is_refused_by_field(tmp_path: Path) -> None:
    write_config(tmp_path, RunConfig(run_dir=tmp_path))
    changed = RunConfig(run_dir=tmp_path, inner=Inner(lr=0.5))
    message = r"inner\.lr is 0\.5.*started with 0\.001.*set inner\.lr=0\.001.*another run_dir"
    with pytest.raises(UserError, match=message):
        resume_config(tmp_path, changed, may_change={"run_dir"})


def test_fields_that_do_not_matter_may_change(tmp_path: Path) -> None:
    write_config(tmp_path, RunConfig(run_dir=tmp_path))
    changed = RunConfig(run_dir=tmp_path, inner=Inner(workers=8))
    assert resume_config(tmp_path, changed, may_change={"inner.workers"}) == changed
    assert resume_config(tmp_path, changed, may_change={"inner"}) == changed
    with pytest.raises(UserError, match=r"inner\.workers"):
        resume_config(tmp_path, changed, may_change={"inner.work", "inn"})


def test_auto_takes_what_the_run_settled_on(tmp_path: Path) -> None:
    write_config(tmp_path, RunConfig(run_dir=tmp_path, inner=Inner(precision="fp32")))
    resumed = resume_config(tmp_path, RunConfig(run_dir=tmp_path, inner=Inner(workers=8)), {"inner.workers"})
    assert resumed.inner == Inner(precision="fp32", workers=8)
    with pytest.raises(UserError, match=r"inner\.precision is bf16"):
        resume_config(tmp_path, RunConfig(run_dir=tmp_path, inner=Inner(precision="bf16")), ())


def test_a_run_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text("")
    with pytest.raises(UserError, match="is a file; choose another run_dir"):
        resume_config(path, RunConfig(run_dir=path), may_change=())


def test_a_dataset_is_no_run_dir(tmp_path: Path) -> None:
    (tmp_path / "dataset.yaml").write_text("")
    with pytest.raises(UserError, match=r"is a dataset or an export \(dataset\.yaml\); choose another run_dir"):
        resume_config(tmp_path, RunConfig(run_dir=tmp_path), may_change=())


@pytest.mark.parametrize(
    ("text", "complaint"), [("run_dir: a\nwarmup: 3\n", 'unknown key "warmup"'), ("run_dir: [", "config.yaml")]
)
def test_the_config_of_another_version_is_told_as_such(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"{complaint}.* another version .* choose another run_dir") as error:
        resume_config(tmp_path, RunConfig(run_dir=tmp_path), may_change=())
    assert "\n" not in str(error.value)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every rank, as none would hear of it from another; and not after the first one was killed."""
    hold = "import sys, time; from pathlib import Path; from pretrain.run import exclusive"
    for rank in (0, 1):
        command = f"{hold}\nwith exclusive(Path({str(tmp_path)!r})): print(flush=True); time.sleep(60)"
        environment = {**os.environ, "RANK": str(rank)}
        with subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, env=environment) as first:
            assert first.stdout is not None
            first.stdout.readline()
            monkeypatch.setenv("RANK", str(rank))
            with pytest.raises(UserError, match="another run is at work there"), exclusive(tmp_path):
                pass
            monkeypatch.setenv("RANK", str(rank + 2))  # another rank of the same run
            with exclusive(tmp_path):
                pass
            first.kill()
        monkeypatch.setenv("RANK", str(rank))
        with exclusive(tmp_path):
            pass


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run: cannot be written"), exclusive(tmp_path / "file" / "run"):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_signals_only_set_a_flag(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert signal.getsignal(number) is before


def test_a_run_that_failed_is_not_ended_before_it_has_said_so():
    """torchrun sends SIGTERM to the others when a rank has failed."""
    before = {number: signal.getsignal(number) for number in StopSignal.SIGNALS}
    stop = StopSignal()
    try:
        with pytest.raises(ValueError, match="why"), stop:
            raise ValueError("why")
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
