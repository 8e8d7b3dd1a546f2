"""Memory that lies in files: what `nvme` means for an engine's offload settings.

The files are mapped, so DeepSpeed, averages, checkpoints and norms find tensors there as they find any others; the
kernel keeps in memory what there is room for, and moves the rest out and in as it is touched. No file has a name in the
folder, so nothing is left behind, however a run ends.

DeepSpeed's own NVMe offload is not used: it moves states under ZeRO-3 alone (1 and 2 keep them in memory, and do not
say so), needs libaio and a compiler on every machine, has no room for averages and for the copies that checkpoints are
written from, and what it has moved out can be read one group at a time only.
"""

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from configs.loader import UserError

from .ranks import Ranks

FLOAT = 4  # bytes
LEAST = 1024
"""Numbers, a page of memory. What is smaller is not worth a file."""

_aten = torch.ops.aten
_COPIES = (_aten.clone.default, _aten._to_copy.default)
_FACTORIES = (_aten.empty.memory_format, _aten.zeros.default, _aten.full.default)
_PINS = (_aten.pin_memory.default, _aten._pin_memory.default)


class DiskMemory:
    """A rank's memory in a folder. Making one is collective: a folder that one rank cannot use is refused on all."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._folder = folder
        problem: UserError | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._map(LEAST)
        except OSError as error:
            problem = self._refused("cannot be written to", error)
        if ranks.any(problem is not None):
            raise problem or UserError(f"engine.offload_folder={folder}: another rank cannot use it, and says why.")

    def zeros(self, num: int) -> Float[Tensor, "num"]:
        """Raises UserError where the disk has no room for them."""
        if num < LEAST:
            return torch.zeros(num)
        try:
            return self._map(num)
        except OSError as error:
            raise self._refused(f"has no room for {FLOAT * num / 1e9:.3g} GB of what is offloaded", error) from None

    def _map(self, num: int) -> Float[Tensor, "num"]:
        with tempfile.TemporaryFile(dir=self._folder) as file:
            # All of it now: a page that finds no room on the disk later would end the process by SIGBUS.
            os.posix_fallocate(file.fileno(), 0, FLOAT * num)
            return torch.from_file(f"/proc/self/fd/{file.fileno()}", shared=True, size=num, dtype=torch.float32)

    def placing(self) -> TorchDispatchMode:
        """What is allocated for the CPU inside the `with` lies in files, unless it is small."""
        return _Placing(self)

    def _refused(self, what: str, error: OSError) -> UserError:
        return UserError(
            f"engine.offload_folder={self._folder}: {what} ({error.strerror}); see to the disk's space and "
            "permissions, or choose another folder."
        )


class _Placing(TorchDispatchMode):
    """Below all Python, so that it does not matter by which calls DeepSpeed comes to its buffers."""

    def __init__(self, disk: DiskMemory) -> None:
        super().__init__()
        self._disk = disk

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _PINS:  # would be a copy, of pages that cannot move to the disk
            return args[0]
        if function in _COPIES:
            shape, device, dtype = args[0].shape, args[0].device, args[0].dtype
        elif function in _FACTORIES:
            shape, device, dtype = args[0], torch.get_default_device(), torch.get_default_dtype()
        else:
            return function(*args, **kwargs)
        device, dtype = torch.device(kwargs.get("device") or device), kwargs.get("dtype") or dtype
        if device.type != "cpu" or dtype != torch.float32 or math.prod(shape) < LEAST:
            return function(*args, **kwargs)
        placed = self._disk.zeros(math.prod(shape)).view(shape).data  # not a view of something, to autograd
        if function in _COPIES:
            placed.copy_(args[0])
        elif function == _aten.full.default:
            placed.fill_(args[1])
        return placed
