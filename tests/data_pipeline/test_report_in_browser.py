"""report.html in a real browser: no complaint in the console, every picture drawn, not one request."""

import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_dataset.py"))))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# The page is a copy with this at its end: --dump-dom then shows what the browser made of it.
PROBE = """<script>
window.onload = () => {
  document.title = JSON.stringify({
    width: document.documentElement.scrollWidth,
    images: [...document.images].map(image => image.naturalWidth),
    requests: performance.getEntriesByType("resource").map(entry => entry.name),
  });
};
</script>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; `./setup.sh --test-packages` installs it"),
]


def browse(page: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,2000"]
    command += ["--enable-logging=stderr", f"--user-data-dir={folder}/profile", "--no-first-run"]
    command += ["--proxy-server=127.0.0.1:9", *arguments, page.as_uri()]  # no network
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def probe(html: str, folder: Path) -> tuple[dict[str, Any], str]:
    """What the browser made of a page, and what it logged."""
    page = folder / "page.html"
    page.write_text(html + PROBE)
    process = browse(page, folder, "--dump-dom")
    return json.loads(re.search(r"<title>(.*?)</title>", process.stdout).group(1)), process.stderr


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return tiny.tiny_dataset(tmp_path_factory.mktemp("report") / "dataset") / "report.html"


def test_everything_on_the_page_is_in_the_page(report, tmp_path):
    found, log = probe(report.read_text(), tmp_path)
    assert len(found["images"]) >= 4 and min(found["images"]) > 0
    assert found["width"] <= 1200  # nothing sticks out sideways
    assert found["requests"] == []
    assert "CONSOLE" not in log


def test_the_probes_can_fail(report, tmp_path):
    broken = '<img src="data:image/jpeg;base64,AAAA"><img src="http://127.0.0.1:9/x.png"><script>nonsense()</script>'
    found, log = probe(report.read_text() + broken + '<div style="width: 3000px">wide</div>', tmp_path)
    assert 0 in found["images"] and found["width"] >= 3000
    assert found["requests"] == ["http://127.0.0.1:9/x.png"]
    assert "CONSOLE" in log and "nonsense" in log


def test_a_screenshot_shows_the_clips(report, tmp_path):
    browse(report, tmp_path, f"--screenshot={tmp_path}/page.png", "--window-size=1200,4000")
    picture = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert picture.shape == (4000, 1200, 3)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 30  # text, bars and pictures, not an empty page
