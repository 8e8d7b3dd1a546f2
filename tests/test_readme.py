"""What the pages tell people to type and open exists, and every config loads by the command in its first comment.

The checkers take text, so that the second half of the file can prove that they find what is broken.
"""

import ast
import importlib
import io
import itertools
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType

import pytest

from configs.loader import run_command
from slurm.attempt_files import CommandError

REPOSITORY = Path(__file__).resolve().parent.parent
ROOMS = ("configs", "data_pipeline", "pretrain", "finetune", "slurm")
PAGES = [
    "README.md",
    "CHANGELOG.md",
    *(path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("docs/**/*.md")),
]
CONFIGS = sorted(path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("configs/**/*.yaml"))

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\]\(([^()\s]+)\)|\b(?:src|href)=\"([^\"]+)\"")
_PATH = re.compile(r"(?<![\w./-])((?:" + "|".join((*ROOMS, "docs", "benchmarks", "tests")) + r")/(?:[\w./-]*[\w/])?)")
_SHELL_OPERATORS = set("();<>|&")


# --- checkers -----------------------------------------------------------------------------------------------------


def check_page(text: str) -> list[str]:
    """Complaints about the commands, paths and module names of a page."""
    complaints = []
    for language, block in _FENCE.findall(text):
        if language in ("", "bash", "sh", "console"):
            for command in shell_commands(block, is_console=language == "console"):
                complaints += check_command(command)
    prose = _FENCE.sub("", text)
    for code in _INLINE_CODE.findall(prose):
        complaints += check_names(code.split())
    complaints += [f"no such path: {path}" for path in paths(text) if not (REPOSITORY / path).exists()]
    return complaints


def check_links(text: str, folder: Path) -> list[str]:
    """Complaints about the relative links of a page that stands in `folder`, headings included."""
    complaints = []
    for markdown_target, html_target in _LINK.findall(_FENCE.sub("", text)):
        target = markdown_target or html_target
        if re.match(r"[a-z]+:", target):
            continue  # another site: tests stay offline
        name, _, anchor = target.partition("#")
        path = folder / name
        if name and not path.exists():
            complaints.append(f"broken link: {target}")
        elif anchor and (not name or path.suffix == ".md"):
            page = path.read_text(encoding="utf-8") if name else text
            if anchor not in heading_anchors(page):
                complaints.append(f"no such heading: {target}")
    return complaints


def check_config_header(path: str, text: str) -> list[str]:
    """A config's first comment is the command that it belongs to, which must accept it."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    header = "\n".join(line.lstrip("# ") for line in comment)
    commands = [command for command in shell_commands(header) if is_ours(command) and path in command]
    if not commands:
        return [f"{path}: its first comment must hold its command, as in: # python -m room.verb --config {path}"]
    return [complaint for command in commands for complaint in check_command(command)]


def check_command(command: Sequence[str]) -> list[str]:
    """The module or make target exists, and the command's own parser accepts its arguments."""
    complaints = check_names(command)
    if complaints or not is_ours(command):
        return complaints
    module, arguments = module_and_arguments(command)
    if hasattr(
        importlib.import_module(module), "command_line"
    ):  # it works without packages, and so without run_command
        return refusals_of_parser(module, arguments)
    config_class, positional = command_interface(module)
    with pytest.raises(SystemExit) as stopped, redirect_stderr(io.StringIO()) as stderr, redirect_stdout(io.StringIO()):
        run_command(lambda config: 0, config_class, description="", positional=positional, argv=arguments)
    return [f"refused: {shlex.join(command)}: {stderr.getvalue().strip()}"] if stopped.value.code else []


def refusals_of_parser(module: str, arguments: Sequence[str]) -> list[str]:
    try:
        importlib.import_module(module).command_line().parse_args(arguments)
    except CommandError as error:
        return [f"refused: python -m {module} {shlex.join(arguments)}: {error}"]
    return []


def check_names(words: Sequence[str]) -> list[str]:
    if words[:1] == ["make"]:
        targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        asked = [word for word in words[1:] if re.fullmatch(r"[a-z][\w-]*", word)]
        return [f"make has no target {word}" for word in asked if word not in targets]
    if not is_ours(words):
        return []
    module, _ = module_and_arguments(words)
    exists = (REPOSITORY / f"{module.replace('.', '/')}.py").exists()
    return [] if exists else [f"no such command: python -m {module}"]


# --- reading pages ------------------------------------------------------------------------------------------------


def shell_commands(block: str, is_console: bool = False) -> Iterator[list[str]]:
    """The simple commands of a shell block as lists of words, without environment settings and redirections."""
    block = re.sub(r"<[\w ./-]+>", "PLACEHOLDER", block.replace("\\\n", " "))
    for line in block.splitlines():
        if is_console and not line.startswith("$ "):
            continue
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        is_redirected = False
        try:
            for word in [*lexer, ";"]:
                if not set(word) <= _SHELL_OPERATORS:
                    is_environment = not words and re.match(r"[A-Z_]+=", word)
                    words += [] if is_redirected or is_environment else [word]
                elif set(word) <= {"<", ">"}:
                    is_redirected = True
                else:
                    if words:
                        yield words
                    words, is_redirected = [], False
        except ValueError:  # prose with an apostrophe in a config's header, for example
            continue


def is_ours(words: Sequence[str]) -> bool:
    return module_and_arguments(words)[0] != ""


def module_and_arguments(words: Sequence[str]) -> tuple[str, list[str]]:
    """What stands after `-m` when it is one of our modules: `torchrun ... -m pretrain.train --config C`."""
    for index, word in enumerate(words[:-1]):
        if word == "-m" and words[index + 1].split(".")[0] in ROOMS:
            return words[index + 1], list(words[index + 2 :])
    return "", []


def command_interface(module: str) -> tuple[type, str | None]:
    """The config class and positional field that a command module hands to run_command on its last line."""
    tree = ast.parse((REPOSITORY / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "run_command":
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            positional = ast.literal_eval(keywords["positional"]) if "positional" in keywords else None
            return getattr(importlib.import_module(module), ast.unparse(node.args[1])), positional
    raise AssertionError(f"{module} is not a command: it never calls run_command")


def paths(text: str) -> set[str]:
    """Repository paths named anywhere on a page, links apart; `configs/x.yaml`, `docs/`, but not `pretrain/*.py`."""
    prose = _LINK.sub("", text)
    found = {match[1] for match in _PATH.finditer(prose) if prose[match.end() : match.end() + 1] not in list("*<{")}
    return {path for path in found if path.endswith("/") or "." in path.rsplit("/", 1)[1]}


def heading_anchors(page: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ +(.*)$", _FENCE.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


# --- held by the repository ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    complaints = check_page(text) + check_links(text, (REPOSITORY / page).parent)
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize("config", CONFIGS)
def test_config_loads_by_the_command_in_its_header(config: str):
    complaints = check_config_header(config, (REPOSITORY / config).read_text(encoding="utf-8"))
    assert not complaints, "\n" + "\n".join(complaints)


def test_the_readme_starts_with_the_two_commands():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    blocks = [block for _, block in _FENCE.findall(text)]
    assert any("make demo" in block for block in blocks)
    assert any("make test" in block for block in blocks)


# --- and can fail -------------------------------------------------------------------------------------------------


@pytest.fixture
def toy_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one command, one config and one make target."""
    (tmp_path / "Makefile").write_text(".PHONY: demo\ndemo: setup\n\techo\n")
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "toy_command.py").write_text(
        "from configs.loader import StrictConfig, run_command\n"
        "class ToyConfig(StrictConfig):\n    dataset: str\n    steps: int = 1\n"
        "if __name__ == '__main__':\n    run_command(print, ToyConfig, description='', positional='dataset')\n"
    )
    (tmp_path / "configs" / "pretrain").mkdir(parents=True)
    (tmp_path / "configs" / "pretrain" / "toy.yaml").write_text("dataset: d\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("# What is `here`, now?\n")
    module = ModuleType("pretrain.toy_command")
    exec((tmp_path / "pretrain" / "toy_command.py").read_text(), module.__dict__)
    monkeypatch.setitem(sys.modules, "pretrain.toy_command", module)
    (tmp_path / "pretrain" / "toy_parser.py").touch()
    parser = ModuleType("pretrain.toy_parser")
    exec("from slurm.errors import command_line", parser.__dict__)
    monkeypatch.setitem(sys.modules, "pretrain.toy_parser", parser)
    monkeypatch.setitem(globals(), "REPOSITORY", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bash(*lines: str) -> str:
    return "Text.\n\n```bash\n" + "\n".join(lines) + "\n```\n"


@pytest.mark.parametrize(
    "page",
    [
        bash("make demo", "make demo DATA=<path to a dataset>   # your own", "git clone x && cd x", "pip install -e ."),
        bash("python -m pretrain.toy_command --config configs/pretrain/toy.yaml steps=3"),
        bash("python -m pretrain.toy_parser runs/data --lines 3"),
        bash("A=1 torchrun --nproc-per-node 2 \\", "  -m pretrain.toy_command data --steps 3 > log.txt 2>&1 &"),
        bash(
            "python -m pretrain.toy_command <dataset> | head",
            "python -m venv x",
            "python -m pretrain.toy_command --help",
        ),
        "```console\n$ make demo\nmake nonsense\npython -m pretrain.nothing\n```\n",
        "```python\nimport nothing\n```\nRun `make demo`, `python -m pretrain.toy_command PATH`.",
        "Read `docs/page.md`, `pretrain/*.py`, `configs/<stage>/x.yaml`, or https://x.y/docs/z.md.",
        "The output is in `runs/demo/report.html`, told in [the page](docs/page.md#what-is-here-now) and [above](https://x.y/z).",
    ],
)
def test_good_pages_pass(toy_repository: Path, page: str):
    assert check_page(page) + check_links(page, toy_repository) == []


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        (bash("make demoo"), "make has no target demoo"),
        ("Type `make demoo`.", "make has no target demoo"),
        (bash("python -m pretrain.toy"), "no such command: python -m pretrain.toy"),
        ("`torchrun -m pretrain.toy --config C`", "no such command: python -m pretrain.toy"),
        (
            bash("cd x && python -m pretrain.toy_command data stepz=3"),
            "refused: python -m pretrain.toy_command data stepz=3",
        ),
        (
            bash("python -m pretrain.toy_command --config \\", " configs/pretrain/toi.yaml"),
            "no such path: configs/pretrain/toi.yaml",
        ),
        (
            bash("python -m pretrain.toy_command --config toy.yaml"),
            "refused: python -m pretrain.toy_command --config toy.yaml",
        ),
        (bash("python -m pretrain.toy_command"), "refused: python -m pretrain.toy_command"),
        (
            bash("python -m pretrain.toy_command data --steps many"),
            "refused: python -m pretrain.toy_command data --steps many",
        ),
        (
            bash("python -m pretrain.toy_parser runs/data --lines few"),
            "refused: python -m pretrain.toy_parser runs/data --lines few",
        ),
        ("Read `docs/pag.md`.", "no such path: docs/pag.md"),
        ("The folder benchmarks/ has it.", "no such path: benchmarks/"),
        ("See [it](docs/pag.md).", "broken link: docs/pag.md"),
        ('<img src="docs/mask.png">', "broken link: docs/mask.png"),
        ("See [it](docs/page.md#there).", "no such heading: docs/page.md#there"),
        ("# Here\n[it](#there)", "no such heading: #there"),
    ],
)
def test_broken_pages_are_found(toy_repository: Path, page: str, complaint: str):
    complaints = check_page(page) + check_links(page, toy_repository)
    assert any(found.startswith(complaint) for found in complaints), complaints


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("# Small.\n#   python -m pretrain.toy_command --config configs/pretrain/toy.yaml\ndataset: d\n", None),
        (
            "# It's small.\n# python -m pretrain.toy_command --config configs/pretrain/toy.yaml steps=2\ndataset: d\n",
            None,
        ),
        ("dataset: d\n", "first comment must hold its command"),
        (
            "# python -m pretrain.toy_command --config configs/pretrain/other.yaml\n",
            "first comment must hold its command",
        ),
        ("# python -m pretrain.toy --config configs/pretrain/toy.yaml\n", "no such command"),
        ("# python -m pretrain.toy_command --config configs/pretrain/toy.yaml\nstepz: 1\n", "refused"),
    ],
)
def test_config_headers(toy_repository: Path, text: str, complaint: str | None):
    path = "configs/pretrain/toy.yaml"
    (toy_repository / path).write_text(text)
    complaints = check_config_header(path, text)
    assert complaints == [] if complaint is None else any(complaint in found for found in complaints)
