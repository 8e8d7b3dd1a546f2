"""Memory that lies in files."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.loader import UserError
from pretrain.engine.disk import LEAST, DiskMemory
from pretrain.engine.ranks import join_ranks


@pytest.fixture
def disk(tmp_path: Path) -> DiskMemory:
    return DiskMemory(tmp_path / "made" / "for it", join_ranks("cpu", timeout_s=60))


def lies_on(folder: Path, values: torch.Tensor) -> bool:
    """Whether the numbers are a file's, which this process has mapped."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= values.data_ptr() < high:
            return str(folder) in line
    return False


def test_what_is_in_files_has_no_name_and_goes_with_its_last_user(disk: DiskMemory, tmp_path: Path) -> None:
    values = disk.zeros(3 * LEAST)
    part = values[LEAST:]
    assert lies_on(tmp_path, part) and not values.any()
    part.fill_(7.0)
    del values
    assert part.sum() == 7 * 2 * LEAST
    assert os.listdir(tmp_path / "made" / "for it") == []
    del part
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_what_is_small_stays_in_memory(disk: DiskMemory, tmp_path: Path) -> None:
    assert [len(disk.zeros(num)) for num in (0, 1, LEAST - 1)] == [0, 1, LEAST - 1]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_what_is_allocated_for_the_cpu_is_placed_and_is_what_it_would_be(disk: DiskMemory, tmp_path: Path) -> None:
    source = torch.randn(3, LEAST)

    def made() -> list[torch.Tensor]:
        return [
            torch.zeros(3, LEAST),
            torch.full((LEAST,), 0.3),
            torch.empty(2, LEAST, device="cpu", dtype=torch.float32).fill_(5.0),
            source.clone(),
            source.double().to(torch.float32),
            source[0].detach().clone(),
        ]

    expected = made()
    with disk.placing():
        placed = made()
        pinned = torch.ops.aten._pin_memory(placed[0])  # what `pin_memory` comes to where there is a GPU
    assert all(torch.equal(one, other) for one, other in zip(placed, expected, strict=True))
    assert all(lies_on(tmp_path, one) for one in (*placed, pinned))
    leaf = placed[0].requires_grad_()  # as DeepSpeed makes of partitions
    leaf.sum().backward()
    assert leaf.grad is not None and leaf.grad.eq(1).all()


def test_what_no_gpu_offloads_is_left_alone(disk: DiskMemory, tmp_path: Path) -> None:
    with disk.placing():
        kept = [torch.zeros(LEAST, dtype=torch.int64), torch.zeros(LEAST - 1), torch.ones(4).clone()]
        on_device = torch.zeros(LEAST, device="meta")
    assert on_device.is_meta
    assert not any(lies_on(tmp_path, one) for one in kept)
    assert not lies_on(tmp_path, torch.zeros(LEAST))


def test_a_full_disk_is_told_before_anything_is_written(
    disk: DiskMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(UserError, match=r"offload_folder=.*no room for 4 GB .*No space left on device.*another"):
        disk.zeros(10**9)
    assert os.listdir(tmp_path / "made" / "for it") == []


def test_a_folder_that_cannot_be_used_is_refused_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"offload_folder=.*file: cannot be written to \(File exists\)"):
        DiskMemory(tmp_path / "file", join_ranks("cpu", timeout_s=60))
    elsewhere: Any = SimpleNamespace(any=lambda flag: True)
    with pytest.raises(UserError, match="another rank cannot use it"):
        DiskMemory(tmp_path / "fine", elsewhere)
