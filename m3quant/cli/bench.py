"""m3quant bench: tokens per second, time to the first token and between tokens, measured on a server as `serve` starts it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ..engines import DEFAULT, NAMES
from ..errors import OptionError
from ..reports.bench_html import BenchPage, page
from ..running.stopping import InterruptedRun
from ..runtime.acceptance import LEAST_SHARE, Baseline, measured_with, read_baseline
from ..runtime.bench import AtOnce, Left, Load, Point, Row, check_sampling, client_log, held, measure, through_guard
from ..runtime.bench_texts import read_texts, shares
from ..runtime.hardware import MAX_COUNT
from ..runtime.serve import Prepared, Stopping, check_start, prepare
from ..runtime.serve_recipe import load_serve_recipe
from .options import (
    ASK_OPTIONS,
    OFFLOAD_OPTIONS,
    Length,
    RequestCount,
    TokenCount,
    ask_options,
    draft_options,
    offload_options,
    print_table,
)
from .output_file import check_file, write_file

SERVER_OPTIONS = (
    "node", "engine", "port", "start_timeout", "draft", "draft_tokens", *OFFLOAD_OPTIONS, *(n for n in ASK_OPTIONS if n not in ("context", "concurrency")),
)  # fmt: skip
MAX_POINTS = 64  # of a run: more is likelier a typing error than days that somebody means to spend


class Counts(click.ParamType[tuple[int, ...]]):
    """Numbers with commas between: 1,4,16 or 1k,8k. each: what one of them is."""

    name = "numbers"

    def __init__(self, each: TokenCount) -> None:
        self.each = each

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(self.each.convert(part, param, ctx) for part in str(value).split(","))


def _server_options(function: Any) -> Any:
    """`serve`'s options that change what is measured; context and concurrency are lists here."""
    asked = ask_options(function)
    params: list[click.Parameter] = asked.__click_params__
    asked.__click_params__ = [param for param in params if param.name not in ("context", "concurrency")]
    return asked


@click.command("bench")
@click.argument("checkpoint")
@click.option(
    "--concurrency",
    type=Counts(RequestCount()),
    default="1,4,16",
    show_default=True,
    help="Requests at once, each a measurement.",
)
@click.option(
    "--context", "contexts", type=Counts(Length()), default="1k", show_default=True, help="Tokens of a request, prompt and answer, each a measurement; k is 1,024."
)  # fmt: skip
@click.option("--output", type=click.IntRange(2, MAX_COUNT), default=128, help="Generated tokens of a request. [128]")
@click.option("--rounds", type=click.IntRange(1, 1000), default=2, help="Requests of each concurrent stream. [2]")
@click.option("--texts", type=click.Path(path_type=Path), default=None, help='Prompts as JSON lines ({"prompt": ...}), which a draft guesses better than the random ones.')  # fmt: skip
@click.option(
    "--temperature", type=click.FloatRange(0, 2), default=1.0, help="Of the sampling; 0: the likeliest token. [1]"
)
@click.option("--acceptance-of", "source", type=click.Path(path_type=Path), default=None, metavar="FILE", help="What bench --json wrote of the source with the same draft: exit 1 where this checkpoint's acceptance is too small a part of it.")  # fmt: skip
@click.option(
    "--least-acceptance",
    type=click.FloatRange(0, 1, min_open=True),
    default=None,
    help=f"That part. [{LEAST_SHARE:g}]",
)
@click.option("--guard", "through", flag_value="guard", default=None, help="Through the KV cache guard. [default]")
@click.option("--no-guard", "through", flag_value="engine", help="Without it.")
@click.option("--both", "through", flag_value="both", help="With and without it, one server after the other.")
@click.option("--recipe", "recipe_file", default=None, metavar="FILE", help="Serving choices as YAML, as for serve.")
@click.option(
    "--on", "node", default=None, metavar="NODE", help="1xH200, 2xH100, ..., cpu, cpu:4GiB. [what this machine has]"
)
@_server_options
@draft_options
@offload_options
@click.option("--port", type=click.IntRange(1, 65535), default=None, help="Port of the server, on 127.0.0.1. [8000]")
@click.option("--engine", type=click.Choice(NAMES), default=None, help=f"[{DEFAULT.name}]")
@click.option(
    "--engine-python",
    default=None,
    metavar="PYTHON",
    help="Python that has the engine. [M3QUANT_ENGINE_PYTHON, or this one]",
)
@click.option("--pin/--no-pin", default=True, help="Reuse the cache size that an earlier start measured. [on]")
@click.option("--start-timeout", type=click.IntRange(1, MAX_COUNT), default=None, help="Seconds until ready. [3600]")
@click.option(
    "--point-timeout", type=click.IntRange(1, MAX_COUNT), default=3600, help="Seconds of one measurement. [3600]"
)
@click.option(
    "--log", type=click.Path(path_type=Path), default=Path("m3quant-bench.log"), help="Of the server; the client's is beside it. [m3quant-bench.log]"
)  # fmt: skip
@click.option("--report", type=click.Path(path_type=Path), default=None, help="Write a page (HTML) too.")
@click.option("--dry-run", is_flag=True, help="Print what would be measured, and the server's command, and stop.")
@click.option("--quiet", is_flag=True, help="Keep the engine's output in the log only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(checkpoint: str, concurrency: tuple[int, ...], contexts: tuple[int, ...], output: int, rounds: int, texts: Path | None, temperature: float,
            source: Path | None, least_acceptance: float | None, through: str | None, recipe_file: str | None, engine_python: str | None, pin: bool, point_timeout: int, log: Path, report: Path | None, dry_run: bool,
            quiet: bool, as_json: bool, **options: Any) -> None:  # fmt: skip
    """Measure CHECKPOINT on this machine: start its server, send random prompts, print tokens per second and latencies, stop it."""
    load = Load(concurrency, contexts, output, rounds, texts, temperature)
    load.check()
    if least_acceptance is not None and source is None:
        raise OptionError(
            "--least-acceptance is a part of what the source's draft gives: name that measurement with --acceptance-of."
        )
    if len(load.points()) > MAX_POINTS:
        raise OptionError(f"{len(load.points())} measurements were asked for: at most {MAX_POINTS} in a run.")
    if report:
        check_file(report)
    recipe = load_serve_recipe(recipe_file, {name: options[name] for name in SERVER_OPTIONS})
    recipe = load.recipe(recipe.model_copy(update={"host": "127.0.0.1"}))
    _say(f"{checkpoint}: reading its headers and planning the node ...")
    first, *others = _guards(through, recipe.guard)
    at_once = AtOnce(load.points())
    server = prepare(
        checkpoint, recipe.model_copy(update={"guard": first}), engine_python, None, None, dry_run, pin, _say, at_once
    )
    servers = [server, *(through_guard(server, checkpoint, guard) for guard in others)]
    for note in server.launch.notes:
        _say(f"note: {note}")
    if server.fit.setup.draft and not texts:
        _say("note: random prompts are guessed worse than text: --texts FILE measures what a draft gives")
    points, left = held(server.fit, server.recipe, load.points(), at_once.why)
    for one in left:
        _say(f"not measured: {_words(one.point)}: {one.why}")
    prompts = shares(texts, read_texts(texts), [point.requests for point in points]) if texts else None
    check_sampling(server, temperature)
    baseline = (
        read_baseline(source, server.fit.setup.draft, load, points, least_acceptance or LEAST_SHARE) if source else None
    )
    if dry_run:
        _show_plan(servers, points, left, as_json)
        return
    rows, stopped_by = _measure(
        servers, points, prompts, temperature, log, point_timeout, pin, None if quiet or as_json else _say
    )
    if report:
        write_file(report, page(bench_page(servers[0], load, rows, left, baseline)))
        _say(f"written: {report}")
    if as_json:
        click.echo(json.dumps(bench_json(servers[0], load, rows, left, baseline), indent=2))
    elif rows:
        print_table([head_of(rows, baseline), *map(cells_of(rows, baseline), rows)])
    too_low = baseline.below(rows) if baseline else []
    for sentence in too_low:
        _say(f"warning: {sentence}")
    if stopped_by:
        whole = len(points) * len(servers)
        raise InterruptedRun(
            stopped_by, f"stopped by a signal after {len(rows)} of {whole} points; the server has ended."
        )
    if too_low:
        raise SystemExit(1)


def _guards(through: str | None, in_recipe: bool) -> list[bool]:
    return {None: [in_recipe], "guard": [True], "engine": [False], "both": [True, False]}[through]


def _say(line: str) -> None:
    click.echo(line, err=True)


def _words(point: Point) -> str:
    return f"{point.concurrency} at once of {point.context:,} tokens"


def _version(server: Prepared) -> str:
    return server.installed.version if server.installed else "(not installed here)"


def _measure(servers: Sequence[Prepared], points: Sequence[Point], texts: Sequence[Sequence[str]] | None, temperature: float, log: Path, timeout: float, pin: bool,
             echo: Any) -> tuple[list[Row], int]:  # fmt: skip
    """The rows, and the signal that ended it, 0 without one."""
    rows: list[Row] = []
    for server in servers:
        check_start(server)
    try:
        client_log(log).unlink(missing_ok=True)
    except OSError as error:
        raise OptionError(
            f"the log {client_log(log)} cannot be written: {error.strerror}; name another with --log."
        ) from None

    def on_row(row: Row) -> None:
        rows.append(row)
        measured = row.measured
        _say(
            f"  {measured.decode_tokens_per_s:,.1f} tokens/s decoding, first token after {measured.ttft_ms[50]:,.0f} ms"
        )

    for server in servers:
        signals = Stopping()
        with signals as stopped:
            measure(server, points, log, timeout, texts, echo, _say, stopped, pin, on_row, temperature)
        if signals.signal:
            return rows, signals.signal
    return rows, 0


def bench_json(
    server: Prepared, load: Load, rows: Sequence[Row], left: Sequence[Left], baseline: Baseline | None = None
) -> dict[str, Any]:
    """Every figure, and what was measured with."""
    fit = server.fit
    source = baseline and {"file": str(baseline.path), "checkpoint": baseline.checkpoint, "least": baseline.least, "below": baseline.below(rows)}  # fmt: skip
    return {
        "checkpoint": fit.model.where,
        "precision": fit.model.label,
        "node": fit.node.name,
        "engine": {"name": fit.engine.name, "version": _version(server)},
        "setup": {"kv_dtype": fit.setup.kv_dtype, "index_dtype": fit.setup.index_dtype, "max_num_seqs": fit.setup.max_num_seqs},
        "command": server.launch.command,
        "environment": server.launch.public_env(),
        "texts": str(load.texts) if load.texts else None,
        "measured_with": measured_with(fit.setup.draft, load),
        "acceptance_of": source,
        "rows": [
            {
                "guard": row.guarded, "concurrency": row.point.concurrency, "context": row.point.context, "output": row.point.output,
                "requests": row.point.requests, **row.measured.to_json(), "bound_tokens_per_s": row.bound or None,
                "acceptance_share": baseline.share(row) if baseline else None,
            }
            for row in rows
        ],
        "not_measured": list(map(_left_json, left)),
    }  # fmt: skip


def _left_json(left: Left) -> dict[str, Any]:
    return {"concurrency": left.point.concurrency, "context": left.point.context, "why": left.why}


def head_of(rows: Sequence[Row], baseline: Baseline | None = None) -> list[str]:
    head = ["guard", "at once", "context", "decode tok/s", "all tok/s", "of bound", "TTFT p50", "p90", "p99", "ITL p50", "p90", "p99"]  # fmt: skip
    return [*head, *(["accepted"] if _drafts(rows) else []), *(["of source"] if baseline else [])]


def cells_of(rows: Sequence[Row], baseline: Baseline | None = None) -> Callable[[Row], list[str]]:
    """A row of the table; latencies in milliseconds."""
    drafts = _drafts(rows)

    def cells(row: Row) -> list[str]:
        measured = row.measured
        found = [
            "on" if row.guarded else "off",
            str(row.point.concurrency),
            "text" if row.texts else f"{row.point.context:,}",
        ]
        found += [f"{measured.decode_tokens_per_s:,.1f}", f"{measured.output_tokens_per_s:,.1f}"]
        found += [f"{measured.decode_tokens_per_s / row.bound:.0%}" if row.bound else ""]
        found += [f"{value:,.1f}" for value in (*measured.ttft_ms.values(), *measured.itl_ms.values())]
        found += [f"{measured.acceptance_length or 0:.2f}"] if drafts else []
        share = baseline.share(row) if baseline else None
        return [*found, *([f"{share:.1%}" if share is not None else ""] if baseline else [])]

    return cells


def _drafts(rows: Sequence[Row]) -> bool:
    return any(row.measured.acceptance_length is not None for row in rows)


def bench_page(
    server: Prepared, load: Load, rows: Sequence[Row], left: Sequence[Left], baseline: Baseline | None = None
) -> BenchPage:
    fit = server.fit
    prompts = f"texts of {load.texts.name}" if load.texts else "random tokens"
    facts = [
        ("checkpoint", f"{fit.model.where} ({fit.model.label})"),
        ("node", fit.node.name),
        ("engine", f"{fit.engine.title} {_version(server)}"),
        ("KV cache", f"{fit.setup.kv_dtype}, {fit.pool.tokens:,} tokens planned"),
        ("prompts", f"{prompts}, temperature {load.temperature:g}"),
        ("command", server.launch.shown(shlex.quote, None)),
    ]
    if draft := fit.setup.draft:
        facts.insert(4, ("draft", f"{draft.where}, {draft.title}, {draft.tokens} tokens a step"))
    if baseline:
        facts.append(("source", f"{baseline.checkpoint}, by {baseline.path.name}; at least {baseline.least:.0%} of its acceptance is asked for"))  # fmt: skip
    not_run = [f"{_words(one.point)}: {one.why}" for one in left]
    head, cells = head_of(rows, baseline), [*map(cells_of(rows, baseline), rows)]
    return BenchPage(
        f"{fit.model.label} on {fit.node.name}", facts, head, cells, not_run, baseline.below(rows) if baseline else ()
    )


def _show_plan(servers: Sequence[Prepared], points: Sequence[Point], left: Sequence[Left], as_json: bool) -> None:
    if as_json:
        document = {
            "points": [{"concurrency": point.concurrency, "context": point.context, "requests": point.requests} for point in points],
            "not_measured": list(map(_left_json, left)),
            "commands": [server.launch.command for server in servers],
            "environments": [server.launch.public_env() for server in servers],
        }  # fmt: skip
        click.echo(json.dumps(document, indent=2))
        return
    for point in points:
        click.echo(f"{_words(point)}, {point.requests} requests")
    for server in servers:
        click.echo(server.launch.shown(shlex.quote, None))
