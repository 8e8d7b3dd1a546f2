"""Every kind of damage is listed in one line that names file and sample; a sound dataset has none."""

import json
import re
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from configs.loader import UserError
from data_pipeline.dataset_index import DatasetIndex
from data_pipeline.verify import verify
from tests.data_pipeline.tiny_dataset import tiny_dataset


@pytest.fixture
def dataset(tmp_path):
    return tiny_dataset(tmp_path / "dataset", clips=(3, 4, 2, 3))


def shard_of(dataset, split="train"):
    return next((dataset / "shards" / split).rglob("*.tar"))


def test_a_sound_dataset_holds_every_promise(dataset):
    assert verify(dataset) == []


def test_a_shard_cut_in_half(dataset):
    shard = shard_of(dataset)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    (problem,) = verify(dataset)
    assert (
        "shards/train/16x16x5/000000.tar: is cut short at byte" in problem and "samples are lost, from key" in problem
    )


def test_a_flipped_byte(dataset):
    index = DatasetIndex(dataset)
    row = index.row(index.indices("train")[1])
    shard = dataset / row["shard"]
    data = bytearray(shard.read_bytes())
    data[row["offset"] + row["bytes"] // 2] ^= 1
    shard.write_bytes(data)
    assert verify(dataset) == [f"{row['shard']}: {row['key']}: its bytes differ from its checksum"]


def test_a_missing_shard(dataset):
    shard = shard_of(dataset)
    shard.unlink()
    (problem,) = [problem for problem in verify(dataset) if ".idx" not in problem]
    assert problem.startswith("shards/train/16x16x5/000000.tar: is missing, and with it ")


def change_manifest(dataset, **columns):
    path = dataset / "manifest.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    for name, value in columns.items():
        rows[0][name] = value(rows) if callable(value) else value
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), path)


SHARD_NAMES = [
    "../../secret.tar",
    "/etc/passwd",
    "shards/../../secret.tar",
    "shards/train/../../../x",
    "",
    "secret.tar",
]


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        *(("shard", name, "is not below shards/; restore the file") for name in SHARD_NAMES),
        ("shard", "shards/a\0b", "is not below shards/"),
        ("shard", None, "1 of its rows have no shard"),
        ("offset", None, "1 of its rows have no offset"),
        ("offset", -512, "bytes at -512; restore the file or build the dataset again"),
        ("offset", 2**63 - 1, "bytes at 9223372036854775807"),
        ("bytes", 0, "cannot be 0 bytes at 0"),
        ("bytes", -1, "cannot be -1 bytes at 0"),
        ("key", None, "1 of its rows have no key"),
    ],
)
def test_a_manifest_that_leads_elsewhere_is_neither_verified_nor_read(dataset, column, value, words):
    (dataset.parent / "secret.tar").write_bytes(shard_of(dataset).read_bytes())
    change_manifest(dataset, **{column: value})
    (problem,) = verify(dataset)
    assert problem.startswith(f"{dataset}/manifest.parquet: ") and words in problem and "\n" not in problem
    with pytest.raises(UserError, match=re.escape(problem)):
        DatasetIndex(dataset)


def change_json(path, *keys, value):
    record = json.loads(path.read_text())
    inner = record
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(record))


DAMAGE = {
    "two rows with one key": (
        lambda d: change_manifest(d, key=lambda rows: rows[1]["key"]),
        "a key must be unique, but 2 rows have it",
    ),
    "a key with a dot": (lambda d: change_manifest(d, key="a.b"), "manifest.parquet: a.b: a key has letters"),
    "an episode in both splits": (
        lambda d: change_manifest(d, episode=lambda rows: rows[-1]["episode"]),
        "is in both train and validation",
    ),
    "a recording in both splits": (
        lambda d: change_manifest(d, content_sha256=lambda rows: rows[-1]["content_sha256"]),
        "manifest.parquet: content_sha256",
    ),
    "a lost row": (
        lambda d: pq.write_table(pq.read_table(d / "manifest.parquet").slice(1), d / "manifest.parquet"),
        "counts say 12 accepted and 1 rejected, but manifest.parquet has 11 rows",
    ),
    "no list of the rejected": (lambda d: (d / "rejected.parquet").unlink(), "rejected.parquet: is missing or damaged"),
    "counts that do not add up": (
        lambda d: (d / "dataset.yaml").write_text((d / "dataset.yaml").read_text().replace("found: 13", "found: 14")),
        "found 14 is not 12 accepted + 1 rejected",
    ),
    "statistics of other data": (
        lambda d: change_json(
            d / "norm_stats.json", "embodiments", "arm", "actions_absolute", "q99", value=[1.0, 2.0, 3.0]
        ),
        "norm_stats.json: embodiments.arm.actions_absolute.q99: the training clips give other numbers",
    ),
    "a missing statistic": (
        lambda d: change_json(d / "norm_stats.json", "latents", "std", value=None),
        "norm_stats.json: latents.std: ",
    ),
    "a robot that is described nowhere": (
        lambda d: (d / "dataset.yaml").write_text(
            re.sub(
                r"embodiments:\n.*?\ncodec:", "embodiments: {}\ncodec:", (d / "dataset.yaml").read_text(), flags=re.S
            )
        ),
        "embodiment: arm is not described in dataset.yaml",
    ),
    "half a codec": (lambda d: (d / "codec" / "codec.safetensors").write_bytes(b"\0" * 9), "codec.safetensors"),
    "no codec": (lambda d: (d / "codec" / "config.json").unlink(), "codec"),
    "no manifest": (lambda d: (d / "manifest.parquet").unlink(), "manifest.parquet: is missing or damaged"),
    "no report": (lambda d: (d / "report.html").unlink(), "report.html: is missing; write it with"),
    "no index": (lambda d: shard_of(d).with_name("000000.tar.idx").unlink(), "its index 000000.tar.idx is missing"),
    "another index": (
        lambda d: shard_of(d).with_name("000000.tar.idx").write_bytes(np.arange(3, dtype="<u8").tobytes()),
        "its index 000000.tar.idx differs from the manifest",
    ),
    "a stray shard": (
        lambda d: (d / "shards/train/16x16x5/000009.tar").write_bytes(b""),
        "000009.tar: no sample of the manifest is in it",
    ),
    "bytes after the end": (
        lambda d: shard_of(d).write_bytes(shard_of(d).read_bytes() + b"x" * 512),
        "000000.tar: has",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(dataset, name):
    damage, message = DAMAGE[name]
    damage(dataset)
    problems = verify(dataset)
    assert any(message in problem for problem in problems), problems
    assert all("\n" not in problem for problem in problems)


def test_a_sample_that_does_not_fit_its_dataset(dataset):
    """Sound in itself, with a right checksum, but of another rate than dataset.yaml says."""
    path = dataset / "dataset.yaml"
    path.write_text(path.read_text().replace("\nfps: 10.0", "\nfps: 12.0"))
    problems = verify(dataset)
    assert len(problems) == 12 and all(problem.endswith("fps: expected 12.0, found 10.0") for problem in problems)


def test_no_dataset_is_bad_input(tmp_path):
    with pytest.raises(UserError, match=r"holds no dataset\.yaml"):
        verify(tmp_path)


def test_the_command_lists_and_exits_with_one(dataset):
    command = [sys.executable, "-m", "data_pipeline.verify", str(dataset)]
    shard_of(dataset).unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "000000.tar: is missing" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["dataset.yaml", "norm_stats.json"])
def test_a_file_that_is_nested_too_deeply_is_damage_like_any_other(dataset, name):
    (dataset / name).write_text(100_000 * "[")
    try:
        (told,) = verify(dataset)
    except UserError as error:
        told = str(error)
    assert name in told and "cannot be read" in told
