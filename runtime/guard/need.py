"""From token counts to a reservation, or to the refusal of what can never fit. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def plan_need(demand: Demand, lengths: Sequence[int], pool: Pool, settings: GuardSettings) -> Need:
    """`lengths` are the prompts' tokens. Raises the 400 refusal of a request that the pool could not hold even when empty."""
    longest_prompt = max(lengths)
    if longest_prompt > pool.max_model_len:
        raise prompt_too_long(pool.max_model_len, longest_prompt)
    if longest_prompt >= pool.longest:
        raise over_context(pool.longest, longest_prompt, 1)
    room = pool.longest - longest_prompt
    settable = demand.kind != TOKENS  # its max_tokens stands inside sampling_params
    asked, given, reason = demand.output, None, ""
    clamp = settable and settings.oversize == "clamp"
    if asked is None and settable and settings.default_max_tokens is not None:
        asked = given = min(settings.default_max_tokens, room)
        reason = "default"
    if asked is not None and pool.output_cap is not None:
        asked = min(asked, pool.output_cap)
    if asked is not None and asked > room:
        if not clamp:
            if asked > pool.max_model_len:
                raise too_many_output_tokens(demand.output_field, asked, pool.max_model_len)
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
    if total > pool.usable:
        raise too_many_sequences(len(lengths) * demand.copies, total, pool.usable)
    return Need(total, demand.output_field, given, reason)


def silent_output(length: int, pool: Pool) -> int:
    """What vLLM takes when a request does not say: its own default, at most the rest of the context (`get_max_tokens`)."""
    rest = pool.max_model_len - length
    limits = [rest] + [limit for limit in (pool.default_output, pool.output_cap) if limit is not None]
    return min(limits)
