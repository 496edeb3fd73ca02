"""One run of an engine's own load generator against its server: what it is asked, and what it measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class BenchRun:
    """`requests` requests of `prompt` random tokens and `output` generated ones, `concurrency` at a time.

    model: a folder or Hub id that has the tokenizer; name: what the server calls the model; result: the file that is written. texts: a
    file as `Engine.bench_texts` makes it, whose texts are the prompts instead; `prompt` is then the most that one has. temperature: of the
    sampling, 0 for the likeliest token.
    """

    url: str
    model: str
    name: str
    concurrency: int
    requests: int
    prompt: int
    output: int
    seed: int
    result: Path
    texts: Path | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class Measured:
    """What a run measured. Times in milliseconds; ttft_ms, itl_ms: by percentile (PERCENTILES).

    output_tokens_per_s: all generated tokens over the whole run, prompts included in its time. decode_tokens_per_s: concurrency over the
    mean time of a token after the first. acceptance_length: tokens that a step with a draft model gave, the target's own one included;
    acceptance_by_guess: the share of steps in which the first, second, .. guess was accepted. None and empty without a draft.
    """

    duration_s: float
    completed: int
    output_tokens: int
    output_tokens_per_s: float
    decode_tokens_per_s: float
    ttft_ms: dict[int, float]
    itl_ms: dict[int, float]
    acceptance_length: float | None = None
    acceptance_by_guess: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
