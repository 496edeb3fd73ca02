"""From token counts to a reservation, or to the refusal of what can never fit. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .counting import Count
from .demand import TOKENS, Demand
from .pool import Pool
from .replies import over_context, prompt_too_long, too_many_output_tokens, too_many_sequences
from .settings import GuardSettings


@dataclass(frozen=True)
class Need:
    """`tokens` to reserve, whole blocks for all sequences; `set_output` when the body's max_tokens has to become that."""

    tokens: int
    output_field: str
    set_output: int | None = None
    set_reason: str = ""


def plan_need(demand: Demand, counts: Sequence[Count], pool: Pool, settings: GuardSettings) -> Need:
    """Raises the 400 refusal of a request that the pool could not hold even when empty."""
    clamp = demand.kind != TOKENS and settings.oversize == "clamp"  # there max_tokens stands inside sampling_params
    if demand.output is not None and demand.output > pool.max_model_len and not clamp:
        raise too_many_output_tokens(demand.output_field, demand.output, pool.max_model_len)
    wanted = demand.output or 1
    lengths = [count.tokens if count.exact else bounded(count.tokens, wanted, pool) for count in counts]
    longest_prompt = max(lengths)
    if longest_prompt > pool.max_model_len:
        raise prompt_too_long(pool.max_model_len, longest_prompt)
    if longest_prompt >= pool.longest:
        raise over_context(pool.longest, longest_prompt, 1)
    room = pool.longest - longest_prompt
    asked, given, reason = demand.output, None, ""
    if asked is None and demand.kind != TOKENS and settings.default_max_tokens is not None:
        asked = given = min(settings.default_max_tokens, room)
        reason = "default"
    if asked is not None and pool.output_cap is not None:
        asked = min(asked, pool.output_cap)
    if asked is not None and asked > room:
        if not clamp:
            raise over_context(pool.longest, longest_prompt, asked)
        asked, given, reason = room, room, "clamped"
    total = 0
    for length in lengths:
        output = asked if asked is not None else silent_output(length, pool)
        if length + output > pool.longest:  # only without max_tokens, and only in a pool smaller than the context
            if not clamp:
                raise over_context(pool.longest, length, output)
            given, reason = room, "clamped"
            output = room
        total += pool.blocks(length + output + pool.lookahead) * demand.copies
    if total > pool.usable and not all(count.exact for count in counts):
        total = pool.usable
    elif total > pool.usable:
        raise too_many_sequences(len(lengths) * demand.copies, total, pool.usable)
    return Need(total, demand.output_field, given, reason)


def bounded(tokens: int, output: int, pool: Pool) -> int:
    """A bound on a prompt that proves nothing when it is too large: then prompt and output fill the context, the most vLLM lets run."""
    return max(1, min(tokens, pool.longest - min(output, pool.longest - 1)))


def silent_output(length: int, pool: Pool) -> int:
    """What vLLM takes when a request does not say: its own default, at most the rest of the context (`get_max_tokens`)."""
    rest = pool.max_model_len - length
    limits = [rest] + [limit for limit in (pool.default_output, pool.output_cap) if limit is not None]
    return min(limits)
