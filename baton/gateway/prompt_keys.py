"""Keys of a prompt's blocks, as the instances compute them: the controller looks them up."""

from __future__ import annotations

from collections.abc import Sequence

from baton.core.blocks import BlockKey, block_keys, block_salt, tenant_salt
from kvpool.layout import canonical_text
from protos.baton.internal.v1 import controller_pb2

MAX_KEYS = 1024
"""Blocks of a prompt that placement looks at; what comes after them is computed or fetched all the
same."""


class PromptKeys:
    """Knows the cluster's salt and block size as soon as an instance has registered."""

    def __init__(self) -> None:
        self._salt: bytes | None = None
        self._block_size = 0
        self._names: tuple[str, str, int] | None = None

    def on_view(self, view: controller_pb2.ClusterView) -> None:
        """Take what the instances have in common; the last known stays while there is none."""
        for item in view.instances:
            record = item.record
            if item.state == "dead" or not record.block_size:
                continue
            names = (record.model_fingerprint, record.kv_layout, record.block_size)
            if names != self._names:
                self._names = names
                layout = canonical_text(record.kv_layout)
                self._salt = block_salt(model_fingerprint=record.model_fingerprint, layout=layout)
                self._block_size = record.block_size
            return

    def of(self, token_ids: Sequence[int], cache_salt: str) -> tuple[BlockKey, ...]:
        """Of the full blocks that a cache may hold; none before an instance is known.

        The last token is always computed, so its block is none of them.
        """
        if self._salt is None:
            return ()
        count = min(len(token_ids) - 1, MAX_KEYS * self._block_size)
        salt = tenant_salt(self._salt, tenant=cache_salt)
        return tuple(block_keys(token_ids[:count], block_size=self._block_size, salt=salt))
