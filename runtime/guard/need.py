"""From token counts to a reservation, or to the refusal of what can never fit. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .demand import TOKENS
from .pool import Pool
from .reading import Reading
from .replies import Refusal, over_context, prompt_too_long, too_many_output_tokens, too_many_sequences
from .settings import GuardSettings


@dataclass
class Count:
    """Tokens of one prompt. `exact` counts can be refused; a bound only reserves, and is refused for what is certain, `least`."""

    tokens: int
    method: str  # "ids", "tokenize", "bytes" or "context"
    exact: bool
    least: int = 1


@dataclass(frozen=True)
class Need:
    """`tokens` to reserve, whole blocks for all sequences; `set_output` when the body's max_tokens has to become that.

    `prompt` and `output`, cache tokens and output tokens at most, where it is one sequence whichever way the request is read; else 0.
    """

    tokens: int
    output_field: str
    set_output: int | None = None
    set_reason: str = ""
    prompt: int = 0
    output: int = 0


def plan_all(
    readings: Sequence[Reading], counts: Sequence[Sequence[Count]], pool: Pool, settings: GuardSettings
) -> Need:
    """The largest need of all ways to read the request. Raises the refusal that they share.

    Where one reading can never fit and another can, the whole pool is reserved: the engine refuses the first or runs it alone.
    """
    if len(readings) == 1:
        return plan_need(readings[0], counts[0], pool, settings)
    needs, refusals = [], []
    for reading, counted in zip(readings, counts, strict=True):
        try:
            needs.append(plan_need(reading, counted, pool, settings, alter=False))
        except Refusal as refusal:
            refusals.append(refusal)
    if not needs:
        raise refusals[0]
    return Need(pool.usable if refusals else max(need.tokens for need in needs), needs[0].output_field)


def plan_need(
    reading: Reading, counts: Sequence[Count], pool: Pool, settings: GuardSettings, alter: bool = True
) -> Need:
    """Raises the 400 refusal of a request that the pool could not hold even when empty. `alter`: the body may be given a number."""
    alter = alter and reading.kind != TOKENS  # there max_tokens is inside sampling_params
    clamp = alter and settings.oversize == "clamp"
    if reading.output is not None and reading.output > pool.max_model_len and not clamp:
        raise too_many_output_tokens(reading.output_field, reading.output, pool.max_model_len)
    asked, given, reason = reading.output, None, ""
    if asked is not None and pool.output_cap is not None and reading.rules.capped:
        asked = min(asked, pool.output_cap)
    default = settings.default_max_tokens if asked is None and alter else None
    wanted = asked or default or 1
    lengths = [count.tokens if count.exact else bounded(count.tokens, wanted, pool) for count in counts]
    longest_prompt = max(lengths)
    if longest_prompt > pool.max_model_len:
        raise prompt_too_long(pool.max_model_len, longest_prompt)
    if longest_prompt >= pool.longest:
        raise over_context(pool.longest, longest_prompt, 1)
    room = pool.longest - longest_prompt
    if default is not None:
        asked = given = min(default, room)
        reason = "default"
        if pool.output_cap is not None and reading.rules.capped:
            asked = min(asked, pool.output_cap)
    if asked is not None and asked > room:
        if not clamp:
            raise over_context(pool.longest, longest_prompt, asked)
        asked, given, reason = room, room, "clamped"
    total = certain = 0
    for count, length in zip(counts, lengths, strict=True):
        output = asked if asked is not None else silent_output(reading, length, pool)
        if length + output > pool.longest:  # only without max_tokens, and only in a pool smaller than the context
            if not clamp:
                raise over_context(pool.longest, length, output)
            given, reason = room, "clamped"
            output = room
        total += pool.blocks(length + output + pool.lookahead) * reading.copies
        least = length if count.exact else min(count.least, length)
        certain += pool.blocks(least + (asked or 1) + pool.lookahead) * reading.certain_copies
    if certain > pool.usable or (total > pool.usable and all(count.exact for count in counts)):
        raise too_many_sequences(reading.sequences, max(certain, total), pool.usable)
    need = Need(min(total, pool.usable), reading.output_field, given, reason)
    if reading.sequences > 1:
        return need
    return replace(need, prompt=lengths[0] + pool.lookahead, output=output)


def refuse_certain(reading: Reading, pool: Pool, settings: GuardSettings) -> None:
    """Raises the refusal of what cannot fit whatever its prompts hold, before anybody counts them."""
    output = min(reading.output or 1, pool.longest)
    if pool.output_cap is not None and reading.rules.capped:
        output = min(output, pool.output_cap)
    if settings.oversize == "clamp":
        output = 1
    sizes = [1 if prompt.ids is None or reading.truncate is not None else prompt.ids for prompt in reading.prompts]
    certain = sum(pool.blocks(min(size, pool.longest) + output + pool.lookahead) for size in sizes)
    if len(sizes) * reading.certain_copies > 1 and certain * reading.certain_copies > pool.usable:
        raise too_many_sequences(len(sizes) * reading.certain_copies, certain * reading.certain_copies, pool.usable)


def bounded(tokens: int, output: int, pool: Pool) -> int:
    """An upper bound on a prompt that is larger than the context shows nothing about the prompt: prompt and output then count as the whole context, the most that vLLM runs."""
    return max(1, min(tokens, pool.longest - min(output, pool.longest - 1)))


def silent_output(reading: Reading, length: int, pool: Pool) -> int:
    """What vLLM takes when a request does not say: its own default, at most the rest of the context (`get_max_tokens`)."""
    rest = pool.max_model_len - length
    limits = (
        [] if reading.uncapped else [limit for limit in (pool.default_output, pool.output_cap) if limit is not None]
    )
    return min([rest, *limits])


def guess_tokens(reading: Reading, size: int, pool: Pool) -> int:
    """What a request may need, before its prompt is counted: four bytes a token, as English text has."""
    count = len(reading.prompts)
    prompts = sum(size // 4 // count if prompt.ids is None else prompt.ids for prompt in reading.prompts)
    tokens = (prompts + count * (reading.output or 0)) * reading.copies
    return min(pool.blocks(tokens), pool.usable)
