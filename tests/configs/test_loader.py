"""What a user may get wrong in a config or on a command line, and what they read when they do."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, NonNegativeInt, ValidationError, model_validator

from configs.loader import StrictConfig, UserError, dump_config, load_config, run_command


class OptimizerConfig(StrictConfig):
    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(3e-4, gt=0, description="Peak learning rate.")
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1


class FolderSource(StrictConfig):
    kind: Literal["folder"] = "folder"
    path: Path


class RobotSource(StrictConfig):
    kind: Literal["robot"] = "robot"
    path: Path
    licence: str | None = None


class ViewConfig(StrictConfig):
    height: int
    crop: tuple[int, int, int, int] | None = None


class RunConfig(StrictConfig):
    dataset: Path = Field(description="Folder that the build wrote.")
    run_name: str = "first"
    steps: int = Field(100, ge=1, description="Optimizer updates.")
    lr_or_auto: float | Literal["auto"] = "auto"
    as_json: bool = Field(False, alias="json", description="Machine-readable output.")
    tasks: tuple[str, ...] = ("drawer-open",)
    optimizer: OptimizerConfig = OptimizerConfig(weight_decay=0.5)
    sources: tuple[Annotated[FolderSource | RobotSource, Field(discriminator="kind")], ...] = ()
    views: dict[str, ViewConfig] = {}
    folders: Path | Annotated[dict[Annotated[str, Field(pattern="^[a-z]+$")], Path], Field(min_length=1)] = Path("x")
    shares: dict[str, float | dict[NonNegativeInt, float]] = {}
    instruction: str | None = None

    @model_validator(mode="after")
    def _auto_needs_many_steps(self) -> "RunConfig":
        if self.run_name == "forbidden":
            raise ValueError("run_name may not be forbidden; choose another")
        return self


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write_file


def problem(path: Path | None, *overrides: str, config_class: type[StrictConfig] = RunConfig) -> str:
    with pytest.raises(UserError) as caught:
        load_config(config_class, path, overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith((".", "?"))
    return sentence


# --- files --------------------------------------------------------------------------------------------------------


def test_a_file_becomes_a_frozen_typed_config(write):
    path = write(
        """
        dataset: data/demo
        steps: 7
        optimizer: {lr: 1e-4, betas: [0.8, 0.9]}
        sources:
          - {kind: robot, path: a}
          - {kind: folder, path: b}
        views: {front: {height: 64, crop: [0, 1, 2, 3]}}
        """
    )
    config = load_config(RunConfig, path)
    assert config.dataset == Path("data/demo")
    assert config.optimizer.lr == 1e-4
    assert config.optimizer.betas == (0.8, 0.9)
    assert [type(source) for source in config.sources] == [RobotSource, FolderSource]
    assert config.views["front"].crop == (0, 1, 2, 3)
    with pytest.raises(ValidationError):
        config.steps = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("12", 12),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("1:30:00", "1:30:00"),
        ("2026-01-01", "2026-01-01"),
        ("007", "007"),
        ("1.2.3", "1.2.3"),
        ("null", None),
    ],
)
def test_scalars_mean_what_they_look_like(write, text, value):
    class AnyConfig(StrictConfig):
        value: float | int | bool | str | None

    read = load_config(AnyConfig, write(f"value: {text}")).value
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize("word", ["yes", "on", "true"])
def test_a_true_or_false_field_takes_the_usual_words(write, word):
    assert load_config(RunConfig, write(f"dataset: d\njson: {word}")).as_json is True


def test_home_is_expanded(write):
    assert load_config(RunConfig, write("dataset: ~/demo")).dataset == Path.home() / "demo"


def test_a_partial_section_keeps_what_its_default_sets(write):
    config = load_config(RunConfig, write("dataset: d\noptimizer: {lr: 1}"), ["optimizer.betas=[0.1, 0.2]"])
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.betas) == (1, 0.5, (0.1, 0.2))


def test_unknown_key_names_file_path_and_nearest(write):
    path = write("dataset: d\noptimizer:\n  weight_decai: 1\n")
    assert problem(path) == f'{path}: unknown key "optimizer.weight_decai"; did you mean "optimizer.weight_decay"?'


def test_unknown_key_inside_a_list_and_a_mapping(write):
    path = write("dataset: d\nsources: [{kind: robot, path: a, licens: MIT}]")
    assert '"sources.0.licens"; did you mean "sources.0.licence"?' in problem(path)
    path = write("dataset: d\nviews: {front: {height: 1, cropp: null}}")
    assert '"views.front.cropp"; did you mean "views.front.crop"?' in problem(path)


def test_unknown_key_that_belongs_elsewhere_or_nowhere(write):
    assert 'did you mean "optimizer.lr"?' in problem(write("dataset: d\nlr: 1"))
    assert "the keys of optimizer are name, lr, betas, weight_decay." in problem(
        write("dataset: d\noptimizer: {zzz: 1}")
    )


def test_unknown_key_is_told_before_what_it_caused(write):
    sentence = problem(write("datasett: d"))
    assert 'unknown key "datasett"; did you mean "dataset"?' in sentence
    assert "1 more after this one" in sentence


def test_missing_key(write):
    path = write("steps: 3")
    assert problem(path).startswith(f'{path}: "dataset" is required but not given')
    assert '"sources.0.path" is required' in problem(write("dataset: d\nsources: [{kind: robot}]"))


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("steps: ten", ["steps is 'ten'", "integer"]),
        ("steps: 0", ["steps is 0", "greater than or equal to 1"]),
        ("steps: 2.5", ["steps is 2.5", "integer"]),
        ("optimizer: {name: adam}", ["optimizer.name is 'adam'", "'adamw' or 'muon'", 'did you mean "adamw"?']),
        ("optimizer: {lr: .nan}", ["optimizer.lr is nan", "finite"]),
        ("optimizer: {betas: [1]}", ["optimizer.betas.1", "required"]),
        ("optimizer: 3", ["optimizer is 3"]),
        ("tasks: drawer-open", ["tasks is 'drawer-open'", "[a, b]"]),
        ("lr_or_auto: never", ["lr_or_auto is 'never'", "number", "'auto'"]),
        ("sources: [{kind: robott, path: a}]", ['sources.0 has the unknown kind "robott"; did you mean "robot"?']),
        ("sources: [{kind: 3, path: a}]", ['sources.0 has the unknown kind "3"; it can be folder, robot; `python -m ']),
        ("sources: [{path: a}]", ["sources.0 needs a kind (folder, robot); `python -m data_pipeline.doctor PATH` "]),
        ("run_name: 5", ["run_name is 5", "string"]),
        ("1: a", ['unknown key "1"', "the keys are dataset"]),
        ("json: maybe", ["json is 'maybe', but should be true or false"]),
        ("sources: [{kind: robot, path: 3}]", ["sources.0.path is 3, but should be a path"]),
        ("folders: {a/b: x}", [": folders.a/b is 'a/b', but should match pattern '^[a-z]+$'."]),
        ("folders: {a: null}", [": folders.a is empty, but should be a path."]),
        ("folders: {}", [": folders should be a path or needs at least 1."]),
        ("folders: 5", [": folders is 5, but should be a path or should be a valid dictionary."]),
        ("shares: {a: {-5: 1}}", [": shares.a.-5 is -5, but should be greater than or equal to 0."]),
        ("shares: {a: {5: x}}", [": shares.a.5 is 'x', but should be a valid number"]),
        ("run_name: forbidden", ["run_name may not be forbidden; choose another"]),
    ],
)
def test_wrong_values_say_what_is_allowed(write, line, fragments):
    path = write(f"dataset: d\n{line}")
    sentence = problem(path)
    assert sentence.startswith(f"{path}: ")
    for fragment in fragments:
        assert fragment in sentence


def test_missing_file_names_a_near_one(write, tmp_path):
    near = write("dataset: d", "pretrain.yaml")
    assert f'did you mean "{near}"?' in problem(tmp_path / "pretrian.yaml")
    assert "no such folder either" in problem(tmp_path / "nowhere" / "run.yaml")


def test_a_folder_and_a_binary_file_are_not_configs(write, tmp_path):
    write("a: 1", "one.yaml")
    assert "is a folder" in problem(tmp_path) and "one.yaml" in problem(tmp_path)
    binary = tmp_path / "video.yaml"
    binary.write_bytes(b"\x00\x01\xff\xfe")
    assert "not a text file" in problem(binary)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("dataset: d\nsteps: [1, 2\n", 3),
        ("dataset: d\nsteps: 1: 2\n", 2),
        ("dataset: d\n\tsteps: 1\n", 2),
        ("dataset: d\nsteps: 1\nsteps: 2\n", 3),
        ("dataset: !!python/object/apply:os.system ['true']\n", 1),
    ],
)
def test_malformed_yaml_names_the_line(write, text, line):
    path = write(text)
    assert problem(path).startswith(f"{path}, line {line}: not valid YAML: ")


@pytest.mark.parametrize("value", ["!!bool x", "!!int x", "!!timestamp x", "[" * 5000, "9" * 5000])
def test_yaml_that_its_parser_chokes_on_is_one_sentence(write, value):
    assert "not valid YAML: " in problem(write(f"dataset: d\nrun_name: {value}\n"))


def test_a_file_that_is_not_key_value_lines(write):
    assert "must contain `key: value` lines" in problem(write("- a\n- b\n"))
    assert '"dataset" is required' in problem(write("# only a comment\n"))


# --- overrides ----------------------------------------------------------------------------------------------------


def test_overrides_are_merged_before_validation(write):
    path = write("dataset: d\nsteps: 0\nsources: [{kind: robot, path: a}]")  # steps: 0 alone would be refused
    config = load_config(
        RunConfig,
        path,
        ["steps=5", "optimizer.lr=1e-5", "views.front.height=8", "sources.0.path=b", "lr_or_auto=0.1", "tasks=[x, y]"],
    )
    assert (config.steps, config.optimizer.lr, config.views["front"].height) == (5, 1e-5, 8)
    assert (config.sources[0].path, config.lr_or_auto, config.tasks) == (Path("b"), 0.1, ("x", "y"))


def test_text_and_paths_are_taken_literally():
    config = load_config(RunConfig, None, ["dataset=001", "run_name=1e-4", "instruction=open: the [drawer] # now"])
    assert (config.dataset, config.run_name) == (Path("001"), "1e-4")
    assert config.instruction == "open: the [drawer] # now"
    assert load_config(RunConfig, None, ["dataset=d", "instruction=null"]).instruction is None
    assert load_config(RunConfig, None, ["dataset=a=b"]).dataset == Path("a=b")


def test_an_empty_path_is_refused():
    """An unset shell variable must not mean the current folder."""
    assert "dataset= is empty; give a path" in problem(None, "dataset=")


def test_a_blank_path_is_refused():
    """It would be a folder that nobody sees."""
    assert "dataset is ' ', but should be a path, not blank." in problem(None, "dataset= ")
    assert load_config(RunConfig, None, ["dataset=d", "instruction="]).instruction == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (r'"a\0b"', "holds a character that no path can have"),
        (r'"\ud800"', "holds a character that no path can have"),
        ("~nobody-of-this-name/x", "begins with the home folder of somebody who is not known here"),
    ],
)
def test_a_path_that_cannot_be_is_refused(write, text, said):
    assert f"but {said}." in problem(write(f"dataset: {text}"))


def test_override_of_a_key_that_does_not_exist(write):
    path = write("dataset: d")
    sentence = problem(path, "optimizer.lrr=1")
    assert sentence == 'command line: unknown key "optimizer.lrr"; did you mean "optimizer.lr"?'


def test_override_into_something_without_an_inside(write):
    path = write("dataset: d\nsources: [{kind: robot, path: a}]")
    assert '"steps" is 3, which has nothing inside' in problem(path, "steps=3", "steps.x=1")
    assert '"1" must be a number below 1' in problem(path, "sources.1.path=b")


def test_override_that_is_no_override(write):
    path = write("dataset: d")
    assert "not of the form key=value" in problem(path, "steps")
    assert "command line: tasks=[a: line 1: not valid YAML" in problem(path, "tasks=[a")


def test_the_place_of_a_wrong_value_is_where_it_was_written(write):
    path = write("dataset: d\nsteps: 0")
    assert problem(path, "run_name=x").startswith(f"{path}: steps is 0")
    assert problem(path, "steps=-1").startswith("command line: steps is -1")


# --- dump ---------------------------------------------------------------------------------------------------------

words = st.text(max_size=12) | st.sampled_from(
    ["1e-4", "no", "null", "007", "1:30", "~", "", " x ", "a: b", "<<", "=", "2026-01-01"]
)
configs = st.builds(
    RunConfig,
    dataset=words.filter(lambda word: not word.startswith("~") and "\0" not in word).map(Path),
    run_name=words.filter(lambda word: word != "forbidden"),
    steps=st.integers(1, 10**12),
    lr_or_auto=st.floats(allow_nan=False, allow_infinity=False) | st.just("auto"),
    json=st.booleans(),
    tasks=st.lists(words).map(tuple),
    optimizer=st.builds(
        OptimizerConfig, lr=st.floats(1e-300, 1e300), betas=st.tuples(st.floats(0, 1), st.floats(0, 1))
    ),
    sources=st.lists(st.builds(RobotSource, path=st.just("a"), licence=st.none() | words)).map(tuple),
    views=st.dictionaries(words, st.builds(ViewConfig, height=st.integers())),
    instruction=st.none() | words,
)


@given(configs)
def test_dump_then_load_gives_the_same_config(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("dump") / "run.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(RunConfig, path) == config


# --- commands -----------------------------------------------------------------------------------------------------


def run(*argv: str, positional: str | None = None, main=lambda config: None, config_class=RunConfig) -> int:
    with pytest.raises(SystemExit) as stopped:
        run_command(main, config_class, description="Trains a thing.", positional=positional, argv=argv)
    return int(stopped.value.code or 0)


def test_every_way_to_give_a_setting(write):
    path = write("dataset: d\nsteps: 3")
    seen: list[RunConfig] = []
    code = run(
        *["--config", str(path), "run_name=a", "--steps", "9", "--optimizer.weight-decay=0", "--json"],
        *["--lr-or-auto", "-1", "--instruction", "open it"],
        main=lambda config: seen.append(config),
    )
    assert code == 0
    (config,) = seen
    assert (config.run_name, config.steps, config.optimizer.weight_decay, config.as_json) == ("a", 9, 0, True)
    assert (config.lr_or_auto, config.instruction, config.dataset) == (-1, "open it", Path("d"))


@pytest.mark.parametrize(
    ("argv", "path", "json"),
    [
        (["/data/x=1"], "/data/x=1", False),
        (["--json", "data"], "data", True),
        (["--json", "false", "data"], "data", False),
        (["data", "--json=false"], "data", False),
        (["[a", "--json", "true"], "[a", True),
    ],
)
def test_the_first_bare_argument_fills_the_positional_field(argv, path, json):
    seen: list[RunConfig] = []
    assert run(*argv, positional="dataset", main=seen.append) == 0
    assert (seen[0].dataset, seen[0].as_json) == (Path(path), json)


@pytest.mark.parametrize("code", [0, 1, 75])
def test_the_exit_code_is_what_main_returns(code):
    assert run("dataset=d", main=lambda config: code) == code


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (["--config", "a.yaml", "--config=b.yaml"], "--config is given twice, first a.yaml"),
        (["--config"], "--config needs a value"),
        (["dataset=d", "--steps"], "--steps needs a value"),
        (["dataset=d", "--steps", "--json"], "--steps needs a value"),
        (["dataset=d", "--stepz"], 'unknown key "stepz"; did you mean "steps"?'),
        (["dataset=d", "--optimizer.weight-decai", "1"], 'did you mean "optimizer.weight_decay"?'),
        (["run.yaml"], "write --config run.yaml"),
        (["dataset=d", "words"], '"words" is not expected here'),
        (["-v"], '"-v" is not expected here'),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_exit_code_2(capsys, argv, fragment):
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert fragment in err


def test_a_second_bare_argument_is_refused(capsys):
    assert run("a", "b", positional="dataset") == 2
    assert '"b" is not expected here' in capsys.readouterr().err


def test_print_config_round_trips(capsys, write):
    assert run("dataset=d", "steps=4", "optimizer.lr=1e-5", "--print-config", main=lambda config: 1) == 0
    again = write(capsys.readouterr().out)
    assert load_config(RunConfig, again) == load_config(RunConfig, None, ["dataset=d", "steps=4", "optimizer.lr=1e-5"])


def test_help_lists_every_setting(capsys):
    assert run("--help", positional="dataset") == 0
    out = capsys.readouterr().out
    for expected in [
        "Trains a thing.",
        "[DATASET] [--config FILE] [key=value ...]",
        "  dataset: path, required\n      Folder that the build wrote.",
        "  steps: int >= 1, default 100\n      Optimizer updates.",
        "  json: true | false, default false",
        "  lr_or_auto: float | auto, default auto",
        "  tasks: list of text, default [drawer-open]",
        "  optimizer.name: adamw | muon, default adamw",
        "  optimizer.lr: float > 0, default 0.0003",
        "  optimizer.betas: [float, float], default [0.9, 0.95]",
        "  optimizer.weight_decay: float, default 0.5",  # of the section's default instance
        "  sources: list of section (folder) | section (robot), default []",
        "  sources.0.licence: text | null, default null",
        "  views: mapping of text to section, default {}",
        "  views.NAME.height: int, required",
        "  views.NAME.crop: [int, int, int, int] | null, default null",
    ]:
        assert expected in out, expected


def test_help_shows_once_what_sections_share(capsys):
    """And each one's own after the tag that names it."""
    assert run("--help") == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  sources.0.")]
    assert lines == [
        "sources.0.path: path, required",
        "sources.0.kind: folder",
        "sources.0.kind: robot",
        "sources.0.licence: text | null, default null",
    ]


def test_help_is_no_wider_than_the_page(capsys, monkeypatch):
    class Wide(StrictConfig):
        mode: Literal["one-after-the-other", "side-by-side", "first-in-first-out", "round-robin"] = "side-by-side"
        prompt: str = " ".join(["Describe what happens."] * 9)

    monkeypatch.setenv("COLUMNS", "60")
    assert run("--help", config_class=Wide) == 0
    out = capsys.readouterr().out
    settings = out[out.index("  mode:") :].splitlines()
    assert max(map(len, settings)) <= 60
    assert settings[:3] == [
        "  mode: one-after-the-other | side-by-side |",
        "      first-in-first-out | round-robin, default side-by-side",
        "  prompt: text, default Describe what happens. Describe what",
    ]


def test_a_class_inside_itself_is_shown_once(capsys):
    class Tree(StrictConfig):
        name: str = "leaf"
        children: tuple["Tree", ...] = ()

    assert run("--help", config_class=Tree) == 0
    assert capsys.readouterr().out.count("name: text") == 1


def test_user_error_from_the_work_itself(capsys):
    def main(config: RunConfig) -> None:
        raise UserError("d: the dataset has no shards;\nrun the build first.")

    assert run("dataset=d", main=main) == 2
    assert capsys.readouterr().err == "error: d: the dataset has no shards; run the build first.\n"


def test_ctrl_c_prints_no_traceback(capsys):
    def main(config: RunConfig) -> None:
        raise KeyboardInterrupt

    assert run("dataset=d", main=main) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_a_signal_to_end_lets_the_command_clean_up(capsys):
    handler, is_clean = signal.getsignal(signal.SIGTERM), []

    def main(config: RunConfig) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            is_clean.append(True)

    assert run("dataset=d", main=main) == 130
    assert is_clean and capsys.readouterr().err == "stopped\n"
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize("error", [ZeroDivisionError(), FileNotFoundError(errno.ENOENT, "No such file", "x")])
def test_a_bug_keeps_its_traceback(error):
    def main(config: RunConfig) -> None:
        raise error

    with pytest.raises(type(error)):
        run_command(main, RunConfig, description="", argv=["dataset=d"])


def test_what_the_file_system_refuses_is_one_sentence(capsys, tmp_path):
    def write_below_a_file(config: RunConfig) -> None:
        (config.dataset / "out").mkdir()

    def fill_the_disk(config: RunConfig) -> None:
        with open("/dev/full", "w") as file:
            file.write("x" * 10**6)

    (tmp_path / "file").touch()
    assert run(f"dataset={tmp_path}/file", main=write_below_a_file) == 2
    expected = f"error: {tmp_path}/file/out: Not a directory; a file stands where a folder should be"
    assert capsys.readouterr().err.startswith(expected)
    assert run("dataset=d", main=fill_the_disk) == 2
    sentence = "error: No space left on device; free some space there and start the same command again.\n"
    assert capsys.readouterr().err == sentence


def test_a_machine_without_room_for_temporary_files_is_told(capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    assert run("dataset=d", main=lambda config: tempfile.gettempdir()) == 2
    sentence = (
        "error: No usable temporary directory found in ['/nowhere']; set TMPDIR to a folder that can be written.\n"
    )
    assert capsys.readouterr().err == sentence


def test_as_a_real_process(tmp_path):
    (tmp_path / "toy.py").write_text(
        textwrap.dedent('''
        """Toy command."""
        from configs.loader import StrictConfig, run_command

        class ToyConfig(StrictConfig):
            steps: int = 1

        def main(config: ToyConfig) -> int:
            return config.steps

        if __name__ == "__main__":
            run_command(main, ToyConfig, description=__doc__)
        ''')
    )

    def toy(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "toy", *argv], cwd=tmp_path, capture_output=True, text=True)

    assert toy("steps=3").returncode == 3
    assert toy("--help").stdout.startswith("usage: python -m toy ")
    command = f"{sys.executable} -m toy --help | true; echo ${{PIPESTATUS[0]}}"
    piped = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (piped.stdout, piped.stderr) == ("141\n", "")  # no traceback
    wrong = toy("step=3")
    assert wrong.returncode == 2
    assert wrong.stderr == 'error: command line: unknown key "step"; did you mean "steps"?\n'
