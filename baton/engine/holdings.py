"""Which tensors a rank holds for good, found by looking: what the loader made need not be listed.

A tensor's tag follows from where it hangs in the model, so that other layouts of weights and other
operations need no change here.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_TAGS = (
    (re.compile(r"\.experts\b"), "weights.experts"),
    (re.compile(r"norm\b"), "weights.norms"),
    (re.compile(r"\bembedding\b"), "weights.embedding"),
    (re.compile(r"\blm_head\b"), "weights.lm_head"),
    (re.compile(r"\brotary\b"), "rotary"),
)
"""By the first that is found in a tensor's path; the rest are projections."""


def weight_tag(path: str) -> str:
    """Of a tensor in a ``Decoder``, by its path, such as ``.layers.0.attention.qkv._weight``."""
    for pattern, tag in _TAGS:
        if pattern.search(path):
            return tag
    return "weights.projections"


def tensors_of(root: object) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of all that can be reached from ``root`` through objects of ours."""
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", root)]
    while stack:
        path, item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield path, item
        else:
            stack.extend((f"{path}.{name}", part) for name, part in _parts(item))


def extent(tensor: Tensor) -> tuple[int, int]:
    """(address, bytes) of the memory behind a tensor."""
    if tensor.is_mkldnn:
        address = torch.ops.mkldnn.data_ptr(tensor)
        return address, torch.ops.mkldnn._nbytes(tensor)
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _parts(item: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(item, tuple | list):
        yield from ((str(i), part) for i, part in enumerate(item))
    elif isinstance(item, dict):
        yield from ((str(name), part) for name, part in item.items())
    elif isinstance(item, functools.partial):
        yield from (("func", item.func), ("args", item.args), *item.keywords.items())
    elif isinstance(item, types.MethodType):
        yield "self", item.__self__
    elif isinstance(item, types.FunctionType):
        cells = (item.__closure__ or ()) if item.__module__.startswith("baton.") else ()
        for name, cell in zip(item.__code__.co_freevars, cells, strict=False):
            yield name, cell.cell_contents
    elif type(item).__module__.startswith("baton.") and not isinstance(item, type):
        yield from getattr(item, "__dict__", {}).items()
        for kind in type(item).__mro__:
            slots = kind.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if hasattr(item, name):
                    yield name, getattr(item, name)
