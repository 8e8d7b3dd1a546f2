"""What every test shares: a quiet, single-threaded, offscreen, offline environment and the real recordings."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
HAS_CUDA_DRIVER = Path("/dev/nvidiactl").exists()  # asking torch would cost every small test two seconds of import

# Set before torch, mujoco or ray is imported anywhere, and inherited by the processes that tests start.
os.environ.setdefault("MUJOCO_GL", "osmesa")  # needs no GPU and no display
os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa's software renderer takes every core otherwise
os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks and Ray workers share a few cores: more threads is slower
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would download fails at once instead of hanging
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if not HAS_CUDA_DRIVER:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# `python -m pretrain.train` works from any working directory, in Ray workers too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))

# A shared machine stalls now and then: a deadline per example would fail good code. Under CI the examples are the same
# every time, so that a change is judged by itself; elsewhere they are new ones, and find what nobody thought of.
hypothesis.settings.register_profile("foresight", deadline=None, max_examples=50, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("foresight")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_CUDA_DRIVER:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def ray() -> Iterator[None]:
    """One Ray for all tests of a process: starting it and its workers takes longer than what most tests do there."""
    from data_pipeline import ray_job

    os.environ.setdefault("RAY_OVERRIDE_RESOURCES", '{"GPU": 2}')  # to be held: nothing computes on them
    with ray_job.ray_session(None, num_workers=2, object_store_mb=100):
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of third-party recordings, which is no part of the project."""
    folder = Path(os.environ.get("FORESIGHT_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no recordings at {folder}; set FORESIGHT_SHARED_DATA to their folder")
    return folder
