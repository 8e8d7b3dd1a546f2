"""The report: self-contained, well-formed, and nothing that a recording says can break out of it."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from configs.loader import UserError
from data_pipeline.dataset import REJECTED_SCHEMA
from data_pipeline.dataset_index import DatasetIndex
from data_pipeline.preview import histogram, render, write_report
from tests.data_pipeline.tiny_dataset import tiny_dataset

VOID = {"meta", "img", "rect", "br"}


class Balance(HTMLParser):
    """Fails where a tag is closed that is not open."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture
def dataset(tmp_path):
    return tiny_dataset(tmp_path / "dataset", clips=(3, 4, 2), action_free=(2,))


def test_the_report_is_one_well_formed_page(dataset):
    page = (dataset / "report.html").read_text()
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "@import" not in page and "url(" not in page
    image = re.search(r'src="data:image/jpeg;base64,([^"]+)"', page).group(1)
    assert Image.open(io.BytesIO(base64.b64decode(image))).size == (6 * 16, 16)
    for text in ("lab", "arm", "gripper", "push it", "not_a_video", "lab/broken", "python -m data_pipeline.build"):
        assert text in page


def test_the_same_dataset_gives_the_same_page(dataset):
    before = (dataset / "report.html").read_bytes()
    (dataset / "report.html").unlink()
    write_report(dataset)
    assert (dataset / "report.html").read_bytes() == before


def test_what_recordings_say_is_only_text(dataset):
    rows = [
        dict.fromkeys(REJECTED_SCHEMA.names) | {"where": "<script>alert(1)</script>", "reason": "a&b", "detail": "<b>"}
    ]
    pq.write_table(
        pq.read_table(dataset / "rejected.parquet").from_pylist(rows, schema=REJECTED_SCHEMA),
        dataset / "rejected.parquet",
    )
    page = render(DatasetIndex(dataset))
    assert "<script" not in page and "&lt;script&gt;" in page and "a&amp;b" in page


def test_repairs_are_told_and_how_many_are_left_out(dataset):
    path = dataset / "dataset.yaml"
    info = yaml.safe_load(path.read_text())
    info["sources"]["lab"] |= {"repairs": [{"sentence": "<i>1 row</i> is left out.", "num_episodes": 3}]}
    path.write_text(yaml.safe_dump(info))
    page = render(DatasetIndex(dataset))
    assert "&lt;i&gt;1 row&lt;/i&gt; is left out." in page and "more kinds" not in page
    info["sources"]["lab"]["more_repairs"] = 7
    path.write_text(yaml.safe_dump(info))
    assert "And 7 more kinds" in render(DatasetIndex(dataset))


def test_damage_is_one_sentence(dataset):
    shard = next(dataset.rglob("*.tar"))
    data = bytearray(shard.read_bytes())
    start = data.index(b"latents.safetensors") + 512 - data.index(b"latents.safetensors") % 512
    data[start : start + 8] = b"\xff" * 8  # the length of its header
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"holds a member that cannot be read.*verify"):
        write_report(dataset)
    (dataset / "rejected.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"rejected\.parquet: is missing or damaged"):
        write_report(dataset)


def test_a_histogram_of_one_value_is_one_bar():
    drawn = histogram("x", "", np.full(10, 3.0))
    assert sum(bar["height"] > 0 for bar in drawn.bars) == 1 and (drawn.low, drawn.high) == (3.0, 3.0)
