"""What is told and remembered of the blocks that a sequence has computed. Pure."""

from __future__ import annotations

from baton.core.blocks import BlockKey
from baton.core.request import Submission
from baton.engine.block_manager import BlockManager
from baton.engine.events import PrefillProgress, PrefixComplete
from baton.engine.sequence import Sequence


def prefix_keys(submission: Submission, blocks: BlockManager) -> list[BlockKey]:
    """Keys of the leading blocks that a lookup for ``submission`` may find."""
    keys: list[BlockKey] = []
    if blocks.enable_prefix_cache and submission.sampling.prompt_logprobs is None:
        salt = blocks.salt_for(tenant=submission.tenant, adapter=submission.adapter)
        token_ids = (*submission.prompt_ids, *submission.output_ids)
        # The last token is always computed: its logits are what is wanted.
        blocks.extend_keys(keys, token_ids[:-1], salt=salt)
    return keys


def progress_of(sequence: Sequence, blocks: BlockManager, *, final: bool) -> PrefillProgress:
    """What decode can have: full blocks, and with ``final`` the partial last one."""
    num_tokens = sequence.num_committed
    if not final:
        num_tokens -= num_tokens % blocks.block_size
    table = sequence.block_table(blocks.blocks_for(num_tokens))
    return PrefillProgress(
        request_id=sequence.request_id,
        num_computed_tokens=num_tokens,
        blocks=table,
        generations=blocks.generations_of(table),
        final=final,
    )


def completed_prefix(sequence: Sequence, blocks: BlockManager) -> PrefixComplete:
    """Those of a sequence's blocks that a lookup finds."""
    count = sequence.num_registered
    table = tuple(sequence.blocks[:count])
    return PrefixComplete(
        request_id=sequence.request_id,
        blocks=table,
        generations=blocks.generations_of(table),
        keys=tuple(sequence.keys[:count]),
        priority=sequence.submission.priority,
    )


def register_blocks(sequence: Sequence, blocks: BlockManager) -> None:
    """Enter full blocks with committed content in the cache."""
    num_full = sequence.num_committed // blocks.block_size
    may_register = sequence.may_register and blocks.enable_prefix_cache
    if num_full <= sequence.num_registered or not may_register:
        return
    keys = sequence.keys
    blocks.extend_keys(keys, sequence.token_ids, salt=sequence.salt)
    for index in range(sequence.num_registered, num_full):
        parent = keys[index - 1] if index else None
        if not blocks.register(sequence.blocks[index], keys[index], parent=parent):
            # Another sequence was first: this block and all later ones stay private.
            sequence.may_register = False
            return
        sequence.num_registered += 1
