"""Which blocks of a prompt could be the same blocks of another: a hash chain over its tokens, as vLLM's prefix cache keys them.

Used only with `prefix_hits=count`. A block counts as present while an admitted request whose prefill is over holds it; what vLLM keeps
cached of finished requests it may evict at any time, so that is never counted.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from .idspan import IdSpan


def block_chain(token_ids: Sequence[int] | IdSpan, block_size: int, salt: str) -> tuple[bytes, ...]:
    """One hash for each whole block that a hit could cover; the last token is always computed (vLLM needs its logits)."""
    if isinstance(token_ids, IdSpan):
        token_ids = token_ids.ids()
    whole = max(0, len(token_ids) - 1) // block_size * block_size
    try:
        raw = array("q", token_ids[:whole]).tobytes()
    except (TypeError, OverflowError):  # not token ids; the engine will say so
        return ()
    size = block_size * 8
    found, previous = [], hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest()
    for at in range(0, len(raw), size):
        previous = hashlib.sha256(previous + raw[at : at + size]).digest()
        found.append(previous)
    return tuple(found)
