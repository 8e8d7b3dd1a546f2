"""env.sh is read as bash reads it; what is not a plain value is refused; words in scripts mean themselves."""

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.loader import UserError
from slurm.environment import check_ray_folder, filled_in, read_environment
from slurm.render import _expanded, _quoted

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12)


def read(folder: Path, text: str):
    (folder / "env.sh").write_text(text)
    return read_environment(folder / "env.sh")


def bash(script: str) -> str:
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout


def test_values_mean_what_bash_makes_of_them(tmp_path: Path):
    lines = {
        "A": "plain",
        "B": "'in single quotes, with # and \"'",
        "C": '"in double quotes, $HOME/x"',
        "D": "/scratch/$USER/x # a comment",
        "E": "",
        "F": "a#b",
        "G": "${HOME}_x",
        "H": "mlx5_0,mlx5_1:1",
    }
    text = "".join(f"export {name}={value}\n" for name, value in lines.items())
    exports = read(tmp_path, f"# comment\n\n{text}").exports
    words = " ".join(_expanded(exports[name]) for name in lines)
    said = bash(f"{text} printf '%s\\n' " + " ".join(f'"${name}"' for name in lines))
    assert bash(f"printf '%s\\n' {words}") == said
    assert filled_in("$HOME/x", "here") == os.environ["HOME"] + "/x"


@settings(max_examples=20, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=20))
def test_words_in_scripts_mean_themselves(words: list[str]):
    assert bash(f"printf '%s\\n' {' '.join(map(_quoted, words))}").split("\n")[:-1] == words


def test_only_the_index_of_a_task_is_filled_in():
    assert bash(f"SLURM_ARRAY_TASK_ID=7; printf %s {_quoted('a b=$SLURM_ARRAY_TASK_ID/$HOME')}") == "a b=7/$HOME"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("PARTITOIN=gpu", 'did you mean "PARTITION"'),
        ("CONTAINER=docker", "CONTAINER"),
        ("CONTAINER=pyxis", "needs IMAGE"),
        ("IMAGE=x.sif", "CONTAINER is none"),
        ("CONTAINER=apptainer\nIMAGE=/no/such.sif", "there is no IMAGE=/no/such.sif"),
        ("ACCOUNT = me", "line 1"),
        ("ACCOUNT=me and you", "in quotes"),
        ("module load cuda", "SETUP"),
        ("ACCOUNT=$(whoami)", "SETUP"),
        ('ACCOUNT="`whoami`"', "SETUP"),
        ("ACCOUNT=a;b", "SETUP"),
        ("ACCOUNT='$HOME'", "single quotes"),
        ("SCRATCH=", "SCRATCH"),
        ("SCRATCH=here", "SCRATCH"),
        ("SCRATCH=~/x", "$HOME in place of ~"),
        ("export SCRATCH=/scratch", "line 1: SCRATCH is a setting of this file; write it without `export`"),
        ("ACCOUNT=a#b", "ACCOUNT"),
        ("ACCOUNT=\u200bme", "cannot be seen"),
        ("export \u00c4=1", "is neither NAME=value"),
        ("CONTAINER=apptainer\nIMAGE=no/such.sif", "there is no IMAGE=no/such.sif"),
        ("PYTHON=/tmp", "there is no PYTHON=/tmp"),
        ("SETUP=/tmp", "there is no SETUP=/tmp"),
        ("ACCOUNT='me and you'", "ACCOUNT"),
        ("PYTHON=/not/there", "there is no PYTHON=/not/there"),
        ("SETUP=/not/there.sh", "there is no SETUP=/not/there.sh"),
        ("export A=1\nexport A=2", "line 2: A is given twice"),
    ],
)
def test_what_is_no_setting_is_told_in_one_sentence(tmp_path: Path, line: str, said: str):
    with pytest.raises(UserError) as refused:
        read(tmp_path, line + "\n")
    assert said in str(refused.value) and str(tmp_path / "env.sh") in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_scratch_too_long_for_the_sockets_of_ray_is_told_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    longest = f"/{'x' * 27}"
    socket = "/ray-67108863/session_2026-11-30_15-10-31_123456_4194304/sockets/plasma_store.1"
    assert len(longest + socket) == 107  # of the 108 bytes of sun_path one is the end's
    check_ray_folder(read(tmp_path, f"SCRATCH={longest}\n"))
    check_ray_folder(read(tmp_path, f"SCRATCH={longest}/$SURELY_NOT_SET_ANYWHERE\n"))  # a job may know better
    monkeypatch.setenv("WHO", "me")
    with pytest.raises(UserError, match=rf"env\.sh: SCRATCH={longest}/me is too long a path .* leave it 28 bytes; "):
        check_ray_folder(read(tmp_path, f"SCRATCH={longest}/$WHO\n"))


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path):
    assert read(tmp_path, "\ufeffPARTITION=gpu\n").cluster.partition == "gpu"


def test_a_file_that_is_not_there_is_told_with_what_to_do(tmp_path: Path):
    with pytest.raises(UserError, match=r"env\.sh: cannot be read .* copy slurm/env\.sh"):
        read_environment(tmp_path / "env.sh")
    with pytest.raises(UserError, match="not set here"):
        filled_in("$SURELY_NOT_SET_ANYWHERE", "env.sh")
