"""bench: which points a node can measure, and the measuring, with the engine's own load generator against a server as `serve` starts it."""

from __future__ import annotations

import math
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2

from ..checkpoint.bounded import CONFIG_BYTES, read_json
from ..engines import DEFAULT, engine_named
from ..engines.bench import BenchRun, Measured
from ..errors import DoesNotFit, OptionError, ServeError
from .bench_texts import MOST_BYTES, MOST_OUTPUT
from .cost import decode_bound
from .fit import Fit
from .launch import POLL_S, EngineProcess
from .load_generator import LoadGenerator
from .serve import Planned, Prepared, Ready, Say, start_options, started
from .serve_recipe import ServeRecipe

SPARE = 16  # tokens of a context left free: special tokens that the server adds, and text that is split in another way than it was made
WARM_UP_TOKENS = 16
REQUEST_S = 600.0  # of the one request before the first measurement


@dataclass(frozen=True)
class Point:
    """`concurrency` requests at once, each of `context` tokens, of which `output` are generated; `requests` in all."""

    concurrency: int
    context: int
    output: int
    requests: int

    @property
    def prompt(self) -> int:
        return self.context - self.output - SPARE


@dataclass(frozen=True)
class Row:
    """What was measured at a point. guarded: through the guard; bound: decoded tokens per second that bandwidth allows, 0.0 if unknown (also for texts, whose lengths are not counted here).
    texts: whether the prompts were texts."""

    point: Point
    guarded: bool
    measured: Measured
    bound: float
    texts: bool = False


@dataclass(frozen=True)
class Load:
    """What the user wants measured. rounds: requests of each concurrent stream; temperature: of their sampling."""

    concurrency: Sequence[int]
    contexts: Sequence[int]
    output: int
    rounds: int
    texts: Path | None = None
    temperature: float = 1.0

    def points(self) -> list[Point]:
        """Every combination, short contexts first."""
        return [Point(n, context, self.output, n * self.rounds) for context in sorted(set(self.contexts)) for n in sorted(set(self.concurrency))]  # fmt: skip

    def check(self) -> None:
        """Raise OptionError for an answer that leaves no prompt."""
        shortest = min(self.contexts)
        if self.texts and len(set(self.contexts)) > 1:
            raise OptionError("--texts have their own lengths: give one --context, which is the server's.")
        if self.texts and (self.output > MOST_OUTPUT or shortest - self.output - SPARE < MOST_BYTES):
            raise OptionError(
                f"--texts: prompts of up to {MOST_BYTES:,} tokens and answers of up to {MOST_OUTPUT:,} are measured: give --context "
                f"{MOST_BYTES + min(self.output, MOST_OUTPUT) + SPARE} or more, and --output {min(self.output, MOST_OUTPUT)}."
            )
        if shortest - self.output - SPARE < 1:
            raise OptionError(
                f"--context {shortest} has no room for --output {self.output}, {SPARE} spare tokens and a prompt: give a longer context or a shorter answer."
            )

    def recipe(self, recipe: ServeRecipe) -> ServeRecipe:
        """The serving recipe with the longest context. Raises OptionError."""
        if not (engine := engine_named(recipe.engine)).has_bench:
            raise OptionError(
                f"bench drives {DEFAULT.title}'s own load generator; {engine.title} has another: leave --engine out."
            )
        seqs = recipe.max_num_seqs
        if seqs is not None and seqs < max(self.concurrency):
            raise OptionError(
                f"--max-num-seqs {seqs} is less than --concurrency {max(self.concurrency)}: the rest would wait, and their speed would not be measured."
            )
        return recipe.model_copy(update={"context": max(self.contexts), "concurrency": 1})


def check_sampling(prepared: Prepared, temperature: float) -> None:
    """Raise OptionError where the engine is known to sample wrongly with the draft."""
    fit = prepared.fit
    fault = fit.engine.draft_sampling_fault(fit.setup.draft, fit.node.gpu) if fit.setup.draft and temperature else ""
    if fault:
        raise OptionError(f"{fault}: measure with --temperature 0.")


def through_guard(prepared: Prepared, src: str, guard: bool) -> Prepared:
    """The same decisions with another command: the server with or without the guard."""
    recipe = prepared.recipe.model_copy(update={"guard": guard})
    options = start_options(src, recipe, None, None, prepared.pin)
    fit = prepared.fit
    return replace(prepared, recipe=recipe, launch=fit.engine.launch(fit.serving, options, prepared.installed))


@dataclass(frozen=True)
class Left:
    """A point that is not measured, and why."""

    point: Point
    why: str


class AtOnce:
    """Chooses max_num_seqs for a bench: the largest concurrency that was asked for of which a server for just so many holds a point, and a
    point of every context.

    Each request that may run takes memory for sampling and graphs, so a server for more of them has a smaller pool. The concurrencies are
    tried from the largest down, each with the plan of its own max_num_seqs. So the number of tries is that of the concurrencies, no point is
    measured on a server for more requests than are measured, and a larger concurrency is given up for a smaller one only where a context
    would have no point. Where none is held it is the smallest, of which `prepare` or `held` then says what is missing.

    why: filled by a call, for each concurrency that was tried before, why no point of it is measured.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        self.points = points
        self.why: dict[int, str] = {}

    def __call__(self, planned: Planned) -> int:
        *larger, smallest = sorted({point.concurrency for point in self.points}, reverse=True)
        for seqs in larger:
            why = self._why_not(seqs, *planned(seqs))
            if not why:
                return seqs
            self.why[seqs] = why
        return smallest

    def _why_not(self, seqs: int, fit: Fit, recipe: ServeRecipe) -> str:
        """Why a server for `seqs` at once is not taken; "" if it is."""
        if not fit.fits:
            return f"a server for {seqs:,} at once {fit.verdict}: {fit.why_not}"
        run = [point for point in self.points if point.concurrency <= seqs and _holds(fit, recipe, point)]
        if seqs not in {point.concurrency for point in run}:
            return _too_small(fit)
        if without := sorted({point.context for point in self.points} - {point.context for point in run}):
            return f"{_too_small(fit, f'a point of {without[0]:,} tokens')}: measure them without that context"
        return ""


def held(
    fit: Fit, recipe: ServeRecipe, points: Sequence[Point], why: Mapping[int, str] | None = None
) -> tuple[list[Point], list[Left]]:
    """Points that the pool holds at once, as planned, and those that it does not. why: of concurrencies that are left out already
    (`AtOnce`). Raises DoesNotFit where it holds none of a context."""
    run, left = list[Point](), list[Left]()
    for point in points:
        if why and point.concurrency in why:
            left.append(Left(point, why[point.concurrency]))
        elif _holds(fit, recipe, point):
            run.append(point)
        else:
            left.append(Left(point, _too_small(fit)))
    for context in {one.point.context for one in left} - {point.context for point in run}:
        least = min(one.point.concurrency for one in left if one.point.context == context)
        raise DoesNotFit(
            f"{least} request(s) of {context:,} tokens do not fit the {fit.pool.tokens:,} KV tokens planned on {fit.node.name}: give a smaller "
            "--context or --concurrency, or a smaller cache dtype (--kv-dtype fp8)."
        )
    return run, left


def _holds(fit: Fit, recipe: ServeRecipe, point: Point) -> bool:
    free = fit.pool.blocks - 1 - math.ceil(recipe.watermark * fit.pool.blocks)
    return point.concurrency * math.ceil((point.context + fit.setup.draft_slots) / fit.pool.block_size) <= free


def _too_small(fit: Fit, what: str = "them") -> str:
    return (
        f"the pool of a server for {fit.setup.max_num_seqs:,} at once, {fit.pool.tokens:,} tokens, does not hold {what}"
    )


def measure(
    prepared: Prepared,
    points: Sequence[Point],
    log: Path,
    point_timeout: float,
    texts: Sequence[Sequence[str]] | None,
    echo: Say | None,
    say: Say,
    stopped: threading.Event,
    pinning: bool,
    on_row: Callable[[Row], None],
    temperature: float = 1.0,
) -> Ready | None:
    """Start the server, measure every point, stop it. None where `stopped` was set before it was ready. texts: of every point, None for
    random prompts.

    Raises ServeError where the server or the load generator fails, or a request is not answered whole.
    """
    say(
        f"starting {prepared.fit.engine.title}: the weights are loaded, at most {prepared.recipe.start_timeout} s; log {log}"
    )
    assert prepared.installed is not None
    with (
        LoadGenerator(prepared.fit.engine.bench_command(prepared.installed), client_log(log)) as client,
        started(prepared, log, echo, stopped, pinning) as (process, ready),
        tempfile.TemporaryDirectory(prefix="m3quant-bench-") as folder,
    ):
        if ready is None:
            return None
        _warm_up(ready.url, _name(prepared), temperature)
        for number, point in enumerate(points, start=1):
            if stopped.is_set():
                break
            prompts = "a text" if texts else f"{point.prompt:,}"
            say(
                f"point {number} of {len(points)}: {point.requests} requests of {prompts} + {point.output:,} tokens, {point.concurrency} at once"
            )
            dataset = Path(folder) / f"{number}.texts.json" if texts else None
            if texts and dataset:
                dataset.write_text(prepared.fit.engine.bench_texts(texts[number - 1]), encoding="utf-8")
            run = BenchRun(ready.url, prepared.fit.model.where, _name(prepared), point.concurrency, point.requests,
                           point.prompt, point.output, number, Path(folder) / f"{number}.json", dataset, temperature)  # fmt: skip
            measured = _run(prepared, run, process, client, point_timeout, stopped)
            if measured is None:
                break
            bound = 0.0 if texts else decode_bound(prepared.fit, point.context, point.concurrency)
            on_row(Row(point, prepared.launch.guarded, measured, bound, bool(texts)))
        return ready


def client_log(log: Path) -> Path:
    """Where the load generator's output is kept: beside the engine's."""
    return log.with_name(f"{log.stem}-client{log.suffix}")


def _name(prepared: Prepared) -> str:
    return prepared.recipe.served_name or prepared.fit.model.where


def _warm_up(url: str, name: str, temperature: float) -> None:
    """One short request, so that what is compiled at the first one is in no figure. Raises ServeError where it is not answered."""
    body = {
        "model": name,
        "prompt": "warm up",
        "max_tokens": WARM_UP_TOKENS,
        "ignore_eos": True,
        "temperature": temperature,
    }
    try:
        answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=REQUEST_S, trust_env=False)
    except httpx2.HTTPError as error:
        raise ServeError(f"the server is ready, but its first request failed: {error}.") from None
    if answer.status_code != 200:
        raise ServeError(f"the server is ready, but answered its first request with {answer.status_code}: {answer.text[:200]}")  # fmt: skip


def _run(
    prepared: Prepared,
    run: BenchRun,
    server: EngineProcess,
    client: LoadGenerator,
    timeout_s: float,
    stopped: threading.Event,
) -> Measured | None:
    """One run of the load generator; None where it was stopped."""
    engine, deadline = prepared.fit.engine, time.monotonic() + timeout_s
    client.begin(engine.bench_arguments(run))
    while (code := client.code(POLL_S)) is None:
        if stopped.is_set():
            return None
        if server.process.poll() is not None:
            raise ServeError(f"the engine ended while it was measured: {engine.reason(server.text)}. Log: {server.log}")
        if time.monotonic() > deadline:
            raise ServeError(f"{run.concurrency} requests at once were not answered within {timeout_s:.0f} s: give a longer --point-timeout. Log: {client.log}")  # fmt: skip
    if code != 0:
        raise ServeError(
            f"the load generator ended with exit code {code}: {engine.reason(client.tail())}. Log: {client.log}"
        )
    return engine.read_bench(read_json(run.result, CONFIG_BYTES, "Run it again.", error=ServeError), run)
