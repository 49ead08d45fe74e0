"""Reads a checkpoint's tensors: mapped, sliced, cast and copied once.

Each tensor is mapped by itself and only while it is read, so that what a process holds is what it
made of the tensors: a rank that reads a slice touches little more than the slice's pages. Mapped
pages are the file's and not anonymous memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from baton.core.errors import ConfigError
from baton.engine.checkpoint import Checkpoint

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

ALL = slice(None)
Progress = Callable[[int, int], None]
"""(bytes read, bytes to read)"""


class WeightSource:
    """One rank's view of a checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
    ) -> None:
        """``progress`` is told after each tensor, of the checkpoint's bytes dealt with so far.

        On the device ``meta`` tensors have shapes only, and no file is read.
        """
        self.config = checkpoint.config
        self.dtype = dtype
        self.device = device
        self._tensors = checkpoint.tensors
        self._progress = progress
        self._total = sum(info.end - info.begin for info in checkpoint.tensors.values())
        self._read = 0
        self._seen: set[str] = set()

    def mapped(self, name: str) -> Tensor:
        """The tensor as it lies in its file, read-only by convention; unmapped with the last view.

        ``KeyError`` for a name that the checkpoint's check did not find, ``ConfigError`` where the
        file was cut short since.
        """
        info = self._tensors[name]
        if self.device.type == "meta":
            return torch.empty(info.shape, dtype=_DTYPES[info.dtype], device=self.device)
        size = info.end - info.begin
        # Copy on write: torch wants a writable array, and nobody writes.
        try:
            raw = np.memmap(info.file, np.uint8, "c", info.begin, (size,))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{info.file}: tensor {name} cannot be read ({error}); the file has changed since "
                "it was checked: start again when it is complete",
                param="model",
            ) from error
        tensor = torch.from_numpy(raw).view(_DTYPES[info.dtype]).view(info.shape)
        if name not in self._seen:
            self._seen.add(name)
            self._read += size
            if self._progress is not None:
                self._progress(self._read, self._total)
        return tensor

    def load(self, name: str, rows: slice = ALL) -> Tensor:
        """A copy of some rows, in the model's dtype on its device."""
        return self.join([self.mapped(name)[rows]])

    def join(self, parts: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Tensors below each other along dim 0, copied into one new parameter."""
        total = sum(len(part) for part in parts)
        shape = (total, *parts[0].shape[1:])
        parameter = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        begin = 0
        for part in parts:
            parameter[begin : begin + len(part)].copy_(part)
            begin += len(part)
        return parameter
