"""What a rank must be able to ask of its device about memory: one answer for each kind of device.

A CPU's memory is that of the process, by the kernel's account. An accelerator's is what torch's
allocator took from it; what the driver and libraries take beside is seen as a difference of the
device's free memory, so other processes on the same device must not come or go meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from baton.core.errors import BatonError
from baton.engine.holdings import extent
from baton.engine.memory import MemoryEntry
from baton.engine.ops.linear import packed_calls
from baton.engine.resident import (
    heap_used_bytes,
    mappings,
    memory_limit,
    process_memory,
    reset_peak,
    resident_bytes,
    trim_heap,
)

KERNEL_CACHE = 128
"""Kernels that oneDNN may keep, for so many pairs of a weight's shape and a number of rows. Each is
about half a MiB, and its own bound, 1024, lets a process grow by as many for hours."""
_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    # All that oneDNN tells of it; shapes that it cannot do were refused when a step was warmed up.
    "could not create a primitive",
    "could not execute a primitive",
)
_PROBED_ROWS = (97, 101, 103, 107)
_LOOKS, _STEADY_BYTES = 4, 1 << 20
_ACCELERATOR_SHARE = 0.95
"""Of an accelerator's memory, where nothing else is said: drivers need some for themselves."""


class OutOfMemory(BatonError):
    """A step needed more memory than there is; the message holds the map of what took it."""

    retryable = True


class DeviceMemory(Protocol):
    """The memory of one device, as one rank sees it. Bytes everywhere."""

    imports: int
    """What was in use when this object was made."""

    def in_use(self) -> int:
        """Taken now, and not to be had back by the system: not a file's pages."""

    def peak(self) -> int:
        """The most that was ``in_use`` since ``reset_peak``."""

    def reset_peak(self) -> None:
        """Begin a new peak."""

    def limit(self) -> int:
        """What this process can use at most, all of it."""

    def settle(self) -> None:
        """Wait for the device, and give back what is kept for later."""

    def resident(self, tensor: Tensor) -> int:
        """Of the memory behind a tensor, what is counted in ``in_use``."""

    def kernel_reserve(self, weights: Sequence[Tensor], max_rows: int) -> int:
        """What kernels may yet take that libraries make and keep for each new number of rows."""

    def ready(self, held: Mapping[str, Sequence[Tensor]]) -> None:
        """All kernels that a start makes are there: what they take has a line of its own."""

    def account(self, held: Mapping[str, Sequence[Tensor]]) -> tuple[list[MemoryEntry], int]:
        """(entries, bytes in use beyond the imports): ``held`` by tag, and what lies beside it.

        Each piece of memory is counted once, under the first tag that has it.
        """


class CpuMemory:
    """``DeviceMemory`` of a process."""

    def __init__(self) -> None:
        # Read by torch and by oneDNN when they make their first kernel.
        os.environ.setdefault("LRU_CACHE_CAPACITY", str(KERNEL_CACHE))
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNEL_CACHE))
        self._kernels = self._kernel_bytes = self._num_kernels = 0
        now = process_memory()
        self.imports = now.unreclaimable
        self._imports = now
        self._before, _ = _resident_by_kind()
        self._heap_used = heap_used_bytes()
        self._file_bytes = now.file

    def in_use(self) -> int:
        """See ``DeviceMemory``."""
        return process_memory().unreclaimable

    def peak(self) -> int:
        """See ``DeviceMemory``. Of the peak, what files had when it began is left out."""
        return process_memory().peak - self._file_bytes

    def reset_peak(self) -> None:
        """See ``DeviceMemory``."""
        self._file_bytes = process_memory().file
        reset_peak()

    def limit(self) -> int:
        """See ``DeviceMemory``."""
        return memory_limit()

    def settle(self) -> None:
        """See ``DeviceMemory``."""
        trim_heap()

    def resident(self, tensor: Tensor) -> int:
        """See ``DeviceMemory``."""
        address, size = extent(tensor)
        return sum(resident_bytes([(address, address + size)]))

    def kernel_reserve(self, weights: Sequence[Tensor], max_rows: int) -> int:
        """See ``DeviceMemory``. Tries what one takes; plain products keep nothing."""
        packed = {weight.shape: weight for weight in weights if weight.is_mkldnn}
        if not packed:
            return 0
        weight = next(iter(packed.values()))
        inputs = [torch.ones(rows, weight.shape[1], dtype=weight.dtype) for rows in _PROBED_ROWS]
        before = heap_used_bytes()
        for x_NK in inputs:
            torch.ops.mkldnn._linear_pointwise(x_NK, weight, None, "none", [], "")
        self._kernel_bytes = max(0, heap_used_bytes() - before) // len(inputs)
        return min(KERNEL_CACHE, len(packed) * max_rows) * self._kernel_bytes

    def ready(self, held: Mapping[str, Sequence[Tensor]]) -> None:
        """See ``DeviceMemory``."""
        self._kernels, self._num_kernels = 0, len(packed_calls)
        entries, _ = self.account(held)
        self._kernels = next(entry.size for entry in entries if entry.tag == "runtime.heap")

    def account(self, held: Mapping[str, Sequence[Tensor]]) -> tuple[list[MemoryEntry], int]:
        """See ``DeviceMemory``. Files that were mapped count as far as they are resident.

        Looked at again, a few times at most, where memory changed meanwhile: steps go on, and what
        one gives back between two looks would be missing from the second.
        """
        for _ in range(_LOOKS):
            before = process_memory().total
            entries = self._entries(held)
            after = process_memory().total
            if abs(after - before) <= _STEADY_BYTES:
                break
        return entries, after - self._imports.total

    def _entries(self, held: Mapping[str, Sequence[Tensor]]) -> list[MemoryEntry]:
        entries = []
        pieces = _pieces(held)
        taken: list[tuple[int, int]] = []
        for tag, ranges in pieces.items():
            size = sum(end - begin for begin, end in ranges)
            resident = resident_bytes(ranges)
            entries.append(MemoryEntry(tag, size, sum(resident)))
            taken += [(begin, count) for (begin, _), count in zip(ranges, resident, strict=True)]
        beside, tensors = _resident_by_kind(taken)
        grown = {kind: beside[kind] - self._before.get(kind, 0) for kind in beside}
        # In the heap lie tensors, what libraries keep, and what steps gave back for the next ones.
        heap = max(0, grown.get("heap", 0))
        used = min(heap, max(0, heap_used_bytes() - self._heap_used - tensors.get("heap", 0)))
        more = min(KERNEL_CACHE, len(packed_calls) - self._num_kernels) * self._kernel_bytes
        kernels = min(used, self._kernels + more)
        entries += [
            _grown("workspace", heap - used),
            _grown("runtime.kernels", kernels),
            _grown("runtime.heap", used - kernels),
            _grown("runtime.libraries", grown.get("file", 0)),
            _grown("runtime.compiled", grown.get("compiled", 0)),
            _grown("runtime.stacks", grown.get("stack", 0)),
            _grown("shared", grown.get("shared", 0)),
        ]
        return entries


class AcceleratorMemory:
    """``DeviceMemory`` of an accelerator that torch knows."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Makes the driver's own memory part of the imports.
        torch.zeros(1, device=device)
        self._before, _ = self._driver()
        self.imports = 0

    def in_use(self) -> int:
        """See ``DeviceMemory``."""
        return self._beside() + torch.accelerator.memory_allocated(self._device)

    def peak(self) -> int:
        """See ``DeviceMemory``."""
        return self._beside() + torch.accelerator.max_memory_allocated(self._device)

    def reset_peak(self) -> None:
        """See ``DeviceMemory``."""
        torch.accelerator.reset_peak_memory_stats(self._device)

    def limit(self) -> int:
        """See ``DeviceMemory``: a share of what was free at first."""
        free, _ = self._driver()
        reserved = torch.accelerator.memory_reserved(self._device)
        return int(_ACCELERATOR_SHARE * (free + reserved))

    def settle(self) -> None:
        """See ``DeviceMemory``."""
        torch.accelerator.synchronize(self._device)
        torch.accelerator.empty_cache()

    def resident(self, tensor: Tensor) -> int:
        """See ``DeviceMemory``."""
        return extent(tensor)[1]

    def kernel_reserve(self, weights: Sequence[Tensor], max_rows: int) -> int:
        """See ``DeviceMemory``: none on the device."""
        return 0

    def ready(self, held: Mapping[str, Sequence[Tensor]]) -> None:
        """See ``DeviceMemory``."""

    def account(self, held: Mapping[str, Sequence[Tensor]]) -> tuple[list[MemoryEntry], int]:
        """See ``DeviceMemory``."""
        entries = []
        for tag, tensors in held.items():
            here = [tensor for tensor in tensors if tensor.device.type == self._device.type]
            size = sum(end - begin for begin, end in _pieces({tag: here}).get(tag, []))
            entries.append(MemoryEntry(tag, size, size))
        allocated = torch.accelerator.memory_allocated(self._device)
        reserved = torch.accelerator.memory_reserved(self._device)
        beside = self._beside()
        entries += [
            _grown("workspace", reserved - allocated),
            _grown("runtime.driver", beside),
        ]
        return entries, reserved + beside

    def _driver(self) -> tuple[int, int]:
        free, total = torch.accelerator.get_memory_info(self._device)
        return free, total

    def _beside(self) -> int:
        """Taken since the start, but not by torch's allocator: libraries' workspaces, graphs."""
        free, _ = self._driver()
        return max(0, self._before - free - torch.accelerator.memory_reserved(self._device))


def device_memory(device: torch.device) -> DeviceMemory:
    """The one of this kind of device. Makes it the starting point of what is counted."""
    return CpuMemory() if device.type == "cpu" else AcceleratorMemory(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the system or a device had no memory for what was asked."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def _pieces(held: Mapping[str, Sequence[Tensor]]) -> dict[str, list[tuple[int, int]]]:
    """By tag the address ranges behind the tensors, each once."""
    seen: set[int] = set()
    pieces: dict[str, list[tuple[int, int]]] = {tag: [] for tag in held}
    for tag, tensors in held.items():
        for tensor in tensors:
            address, size = extent(tensor)
            if size and address not in seen:
                seen.add(address)
                pieces[tag].append((address, address + size))
    return pieces


def _resident_by_kind(
    taken: Sequence[tuple[int, int]] = (),
) -> tuple[dict[str, int], dict[str, int]]:
    """Resident bytes by kind of mapping: beside ``taken`` (address, resident bytes), and of it."""
    beside: dict[str, int] = {}
    inside: dict[str, int] = {}
    starts = sorted(taken)
    place = 0
    for mapping in mappings():
        count = 0
        while place < len(starts) and starts[place][0] < mapping.end:
            if starts[place][0] >= mapping.begin:
                count += starts[place][1]
            place += 1
        beside[mapping.kind] = beside.get(mapping.kind, 0) + mapping.resident - count
        inside[mapping.kind] = inside.get(mapping.kind, 0) + count
    return beside, inside


def _grown(tag: str, count: int) -> MemoryEntry:
    return MemoryEntry(tag, max(0, count), max(0, count))
