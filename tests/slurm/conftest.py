"""One cluster for all tests of a process that ask for it."""

import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

parts = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("cluster.py"))))


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Any]:
    reason = parts.why_no_cluster()
    if reason:
        pytest.skip(f"no SLURM here: {reason}")
    with parts.Cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster: Any) -> Iterator[Any]:
    """With both nodes up and no jobs, whatever the test before did."""
    yield running_cluster
    running_cluster.reset()
