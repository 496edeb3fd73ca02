"""m3quant plan --on, --all and --check-log: what a checkpoint needs on a serving node. No torch, no GPU, headers only."""

from __future__ import annotations

import gc
import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from ..engines.device import GIB
from ..engines.memory import Estimate
from ..errors import DoesNotFit, NodeError
from ..recipe.choice import RecipeChoice
from ..running.words import human_bytes
from ..runtime.checklog import LogCheck, check_log, log_reader
from ..runtime.cost import Prices, Speed, decode_speed, load_prices, price_per_million
from ..runtime.draft import draft_notes, with_draft
from ..runtime.engine_notes import release_notes, weight_notes
from ..runtime.fit import Ask, Fit, Remedy, assess, remedies
from ..runtime.hardware import STANDARD_NODES, Node, parse_node
from ..runtime.model import ServedModel, Subject, open_subject
from ..runtime.offload_price import judged
from ..runtime.weights import Split
from .offload_output import offload_json, offload_lines
from .options import print_table

TABLE_CONTEXT = 32768  # tokens that each request of the price column holds, unless --context says otherwise
NO_FIT = DoesNotFit.exit_code
LOG_BYTES = 64 * 2**20  # of an engine's log; its start has a few hundred kB


@dataclass(frozen=True)
class Where:
    """What a checkpoint is held against: one node, all that are known, or the log of an engine; and the prices of hours."""

    on: str | None
    everything: bool
    log: Path | None
    prices: Path | None


def run_fit(
    src: str,
    revision: str | None,
    choice: RecipeChoice,
    where: Where,
    ask: Ask,
    draft: tuple[str | None, int | None],
    as_json: bool,
) -> int:
    """The three modes. draft: as in `runtime.draft.with_draft`. Returns the exit code: 0 fits (or the log agrees), 3 does not fit, 1 the log disagrees."""
    gc.disable()  # 140,000 tensors become objects that all live to the end: collections would take a third of the time
    node = parse_node(where.on) if where.on is not None else None
    subject = open_subject(src, revision)
    ask = with_draft(ask, subject.family, *draft)
    # A log is of one checkpoint: a config.json is then what it describes.
    table = where.log is None and (where.everything or subject.config_only)
    models, refused = _models(subject, choice, table)
    if where.log is not None:
        return _log_mode(models[0], where.log, node, ask, as_json)
    prices = load_prices(where.prices)
    if where.everything or len(models) > 1:
        nodes = [node] if node else [parse_node(name) for name in STANDARD_NODES]
        return _table_mode(subject, models, refused, nodes, ask, prices, as_json)
    assert node is not None  # the command asks for --on, --all or --check-log
    fit = judged(assess(models[0], node, ask), prices)
    changes = [] if fit.fits or fit.dear else remedies(fit, subject if subject.convertible else None)
    if as_json:
        click.echo(json.dumps(fit_json(fit, changes, prices), indent=2))
    else:
        for note in draft_notes(ask.draft, fit.engine, node.gpu) if ask.draft else ():
            click.echo(note)
        for note in (*release_notes(fit), *weight_notes(fit)):
            click.echo(f"note: {note}")
        print_fit(fit, changes, prices)
    return 0 if fit.fits else NO_FIT


def _models(subject: Subject, choice: RecipeChoice, table: bool) -> tuple[list[ServedModel], dict[str, str]]:
    """What to plan, and why some recipes are refused. table: all precisions, where no recipe is given."""
    choice.check_used(subject.where, bool(subject.requantizable))
    if choice:
        return [subject.converted(choice.recipe(subject.config))], {}
    if table:
        return subject.precisions(choice.requantize)
    return [subject.stored], {}


def _log_mode(model: ServedModel, path: Path, node: Node | None, ask: Ask, as_json: bool) -> int:
    try:
        with path.open("rb") as file:  # a pipe may be given too
            data = file.read(LOG_BYTES + 1)
    except OSError as error:
        raise NodeError(f"log {path} cannot be read: {error.strerror}.") from None
    if len(data) > LOG_BYTES:
        raise NodeError(f"log {path} has more than {LOG_BYTES:,} bytes: cut it to the lines of one start.")
    text = data.decode("utf-8", "replace")
    reader = log_reader(ask.engine)
    starts = text.count(reader.start)
    if starts > 1:
        raise NodeError(
            f"log {path} holds {starts} starts of an engine: cut it to one (each begins with '{reader.start}')."
        )
    check = check_log(model, reader.read(text), node, ask)
    if as_json:
        click.echo(json.dumps(log_json(check), indent=2))
    else:
        print_log(check)
    return 0 if check.holds else 1


def log_json(check: LogCheck) -> dict[str, Any]:
    return {
        "holds": check.holds,
        "engine": asdict(check.log),
        "setup": asdict(check.fit.setup),
        "lines": [line.to_json() for line in check.lines],
        "not_covered": check.uncompared,
    }


def print_log(check: LogCheck) -> None:
    log, setup = check.log, check.fit.setup
    click.echo(
        f"{check.fit.engine.title} {log.version or '(version not in the log)'}: {_split_words(setup.split)}, KV {setup.kv_dtype}, "
        f"utilization {setup.utilization:g}; {check.fit.model.label} of {check.fit.model.where}"
    )
    rows = [["quantity", "predicted", "range", "engine", "off", "verdict"]]
    for line in check.lines:
        digits = 2 if line.unit == "GiB" else 0
        span = "" if line.low == line.high else f"{line.low:,.{digits}f} - {line.high:,.{digits}f}"
        rows.append([
            f"{line.name} [{line.unit}]", f"{line.predicted:,.{digits}f}", span, f"{line.measured:,.{digits}f}", f"{line.off:+.1%}",
            "holds" if line.holds else f"OFF: {line.constant}",
        ])  # fmt: skip
    print_table(rows)
    for name, parts in check.uncompared.items():
        click.echo(
            f"not compared: what depends on {' and '.join(parts)}, which the log's {name} changes; the prediction does not cover it"
        )
    if log.other_settings and not check.holds:
        click.echo(
            f"note: the prediction does not read these of the log's settings either: {', '.join(log.other_settings)}"
        )
    if any(line.name.startswith("weights") and not line.holds for line in check.lines):
        click.echo(
            f"note: is {check.fit.model.label} of {check.fit.model.where} what the log is of? --to and CKPT say what is compared"
        )


def _split_words(split: Split) -> str:
    words = [f"TP {split.tp}", f"PP {split.pp}"]
    words += [f"{name} {size}" for name, size in (("DP", split.dp), ("DCP", split.dcp)) if size > 1]
    return ", ".join([*words, *(["EP"] if split.expert_parallel else []), *(["vision"] if split.vision else [])])


def _table_mode(
    subject: Subject,
    models: list[ServedModel],
    refused: dict[str, str],
    nodes: list[Node],
    ask: Ask,
    prices: Prices,
    as_json: bool,
) -> int:
    fits = [judged(assess(model, node, ask), prices) for model in models for node in nodes]
    if as_json:
        found = [fit_json(fit, [], prices) for fit in fits]
        click.echo(
            json.dumps(
                {
                    "checkpoint": subject.where,
                    "prices": prices.model_dump(mode="json"),
                    "rows": found,
                    "refused": refused,
                },
                indent=2,
            )
        )
        return 0 if any(fit.fits for fit in fits) else NO_FIT
    context = _context(ask, subject.stored)
    kv = f"KV cache {fits[0].setup.kv_dtype}" + (
        f", index keys {ask.index_dtype}" if subject.family.kv_geometry.index_layers else ""
    )
    click.echo(
        f"{subject.where}: {kv}; {ask.concurrency} request(s); config.json allows {subject.stored.max_positions:,} tokens. "
        f"Pool: tokens at the high end of the overhead, and at the low end."
    )
    rows = [
        [
            "precision",
            "weights",
            "node",
            "split",
            "pool tokens",
            "longest context",
            f"at {context:,}",
            f"{prices.currency}/h",
            f"{prices.currency}/M out",
            "verdict",
        ]
    ]
    for fit in fits:
        per_hour, speed = prices.per_hour(fit.node), _speed(fit)
        rows.append([
            fit.model.label, human_bytes(fit.model.stored_bytes), fit.node.name, split_name(fit),
            f"{fit.pool.tokens:,} - {fit.prediction.pool('low').tokens:,}" if fit.prediction.pool("low").tokens else "0",
            f"{fit.longest_context:,}", f"{_requests(fit)}x", "" if per_hour is None else f"{per_hour:.2f}",
            "" if per_hour is None else _price_cell(per_hour, speed), f"{fit.verdict}: {fit.short}" if fit.short and fit.loads else fit.verdict,
        ])  # fmt: skip
    print_table(rows)
    if any(fit.loads and not fit.fits for fit in fits):
        click.echo("where it does not fit: --json has the whole reasons, --on NODE --to RECIPE says what would help")
    for note in release_notes(fits[0]):
        click.echo(f"note: {note}")
    for label, notes in {fit.model.label: weight_notes(fit) for fit in fits if fit.loads}.items():
        for note in notes:
            click.echo(f"note: {label}: {note}")
    for label, reason in {fit.model.label: fit.why_not for fit in fits if not fit.loads}.items():
        click.echo(f"is not loaded: {label}: {reason}")
    for name, reason in refused.items():
        click.echo(f"not in the table: {name}: {reason}")
    click.echo(
        f"prices of {prices.date}: {prices.source}; per million output tokens when the pool is full of requests of {context:,} tokens (at most "
        "max-num-seqs): a range where speeds near that were measured, on such GPUs or others of the same chip, no prefill; else (>=) "
        "the floor that HBM bandwidth sets"
    )
    sources = dict.fromkeys(source for fit in fits if (measured := _speed(fit).near) for source in measured.sources)
    for source in sources:
        click.echo(f"measured: {source}")
    if ask.context is None and context < TABLE_CONTEXT:
        click.echo(f"at {context:,}: the longest context that config.json allows, in place of {TABLE_CONTEXT:,}")
    return 0 if any(fit.fits for fit in fits) else NO_FIT


def _context(ask: Ask, model: ServedModel) -> int:
    """Tokens of each request in the table and the price: as asked, else TABLE_CONTEXT or the model's own longest."""
    return ask.context or min(TABLE_CONTEXT, model.max_positions or TABLE_CONTEXT)


def _requests(fit: Fit) -> int:
    return (
        min(fit.pool.concurrency(_context(fit.ask, fit.model)), fit.setup.max_num_seqs)
        if fit.longest_context >= _context(fit.ask, fit.model)
        else 0
    )


def _speed(fit: Fit) -> Speed:
    return decode_speed(fit, _context(fit.ask, fit.model), _requests(fit))


def _price_cell(per_hour: float, speed: Speed) -> str:
    if speed.near:
        return f"{price_per_million(per_hour, speed.high):.2f} - {price_per_million(per_hour, speed.low):.2f}"
    return f">= {price_per_million(per_hour, speed.bound):.2f}" if speed.bound else ""


def split_name(fit: Fit) -> str:
    split = fit.setup.split
    return f"TP{split.tp}" + (f" PP{split.pp}" if split.pp > 1 else "") + (" EP" if split.expert_parallel else "")


def fit_json(fit: Fit, changes: list[Remedy], prices: Prices) -> dict[str, Any]:
    """Everything that the tables show, for programs. Bytes per GPU."""
    per_hour, speed = prices.per_hour(fit.node), _speed(fit)
    pools = {
        name: fit.prediction.pool(which).tokens
        for name, which in (("low", "high"), ("expected", "expected"), ("high", "low"))
    }
    return {
        "checkpoint": fit.model.where,
        "precision": fit.model.label,
        "stored_bytes": fit.model.stored_bytes,
        "node": {"name": fit.node.name, "gpus": fit.node.count, "bytes_per_gpu": fit.node.gpu.total_bytes, "source": fit.node.gpu.source},
        "setup": asdict(fit.setup),
        "fits": fit.fits,
        "loads": fit.loads,
        "why_not": fit.why_not,
        "why_not_short": fit.short,
        "pool_tokens": pools,
        "longest_context": fit.longest_context,
        "context": fit.context,
        "max_position_embeddings": fit.model.max_positions,
        "concurrency": fit.concurrency,
        "ranks": [
            {
                "stage": r.stage, "layers": r.layers, "total": r.total, "requested": r.requested, "weights": r.weights,
                "weight_bytes": r.weight_bytes, "non_torch": asdict(r.non_torch), "activation": asdict(r.activation),
                "graphs": asdict(r.graphs), "moved": asdict(r.moved), "kv_bytes": {w: r.kv_bytes(getattr(r.overhead, w)) for w in ("low", "expected", "high")},
                "bytes_per_token": r.bytes_per_token,
            }
            for r in fit.prediction.ranks
        ],
        "price": {"per_hour": per_hour, "currency": prices.currency, "date": prices.date.isoformat(), "decode_bound_tokens_per_s": speed.bound,
                  "bound_context": speed.context, "bound_requests": speed.requests,
                  "per_million_output_floor": price_per_million(per_hour, speed.bound) if per_hour is not None and speed.bound else None,
                  "measured": _measured_json(per_hour, speed)},
        "offload": offload_json(fit, prices),
        "command": shlex.join(fit.command()) if fit.fits else None,
        "notes": [*release_notes(fit), *weight_notes(fit)],
        "changes": [{"change": r.change, "longest_context": r.fit.longest_context, "pool_tokens": r.fit.pool.tokens} for r in changes],
    }  # fmt: skip


def _measured_json(per_hour: float | None, speed: Speed) -> dict[str, Any] | None:
    """The range by measured speeds; None where nothing near was measured. other_gpus: empty where they are of this GPU."""
    if speed.near is None:
        return None
    prices = [None if per_hour is None else price_per_million(per_hour, rate) for rate in (speed.high, speed.low)]
    return {
        "tokens_per_s": {"low": speed.low, "high": speed.high},
        "of_bound": {"low": speed.near.low, "high": speed.near.high},
        "per_million_output": {"low": prices[0], "high": prices[1]},
        "figures": speed.near.count,
        "sources": list(speed.near.sources),
        "other_gpus": list(speed.near.others),
    }


def print_fit(fit: Fit, changes: list[Remedy], prices: Prices) -> None:
    model, setup, rank = fit.model, fit.setup, fit.prediction.tightest
    index = f", index keys {setup.index_dtype}" if model.family.kv_geometry.index_layers else ""
    click.echo(
        f"{model.where} ({model.label}, {human_bytes(model.stored_bytes)}) on {fit.node.name}: {split_name(fit)}, KV cache {setup.kv_dtype}{index}, "
        f"utilization {setup.utilization:g}, max-num-seqs {setup.max_num_seqs}"
    )
    rows = [["per GPU" + (f", stage {rank.stage} of {setup.split.pp}" if setup.split.pp > 1 else ""), "GiB", "source"]]
    rows.append(
        [
            "requested of the GPU",
            f"{rank.requested / GIB:.2f}",
            f"{rank.total / GIB:.2f} GiB x {setup.utilization:g}; {fit.node.gpu.source}",
        ]
    )
    for role, size in sorted(rank.weights.items(), key=lambda item: -item[1]):
        rows.append([f"- {role}", f"{size / GIB:.2f}", "headers"])
    if rank.moved.weights:
        rows.append(
            [
                "  (routed_experts in host memory)",
                f"{rank.moved.weights / GIB:.2f}",
                "whole parameters, in the engine's order",
            ]
        )
    for name, estimate in (
        ("non-torch", rank.non_torch),
        ("peak activation", rank.activation),
        ("CUDA graphs", rank.graphs),
    ):
        rows.append([f"- {name}", _span(estimate), estimate.source])
    left = (
        f"{max(0, rank.kv_bytes(rank.overhead.high)) / GIB:.2f} - {max(0, rank.kv_bytes(rank.overhead.low)) / GIB:.2f}"
    )
    rows.append(["= KV cache", left, f"{rank.bytes_per_token:,} bytes per token and GPU"])
    print_table(rows)
    for line in offload_lines(fit, prices):
        click.echo(line)
    low, high = fit.pool.tokens, fit.prediction.pool("low").tokens
    click.echo(
        f"KV pool: {low:,} to {high:,} tokens; longest context {fit.longest_context:,} of the {model.max_positions:,} that config.json allows"
    )
    if not fit.fits:
        click.echo(f"{fit.verdict.upper()}: {fit.why_not}.")
        for remedy in changes:
            click.echo(
                f"  fits with {remedy.change}: context up to {remedy.fit.longest_context:,}, pool {remedy.fit.pool.tokens:,} tokens"
            )
        if not changes and not fit.dear:
            click.echo("  no change of flags, recipe or standard node makes it fit")
        return
    click.echo(f"FITS: {fit.concurrency} request(s) of {fit.context:,} tokens at once")
    _print_speed(_speed(fit), fit.node.gpu.name, prices.per_hour(fit.node), prices)
    click.echo(shlex.join(fit.command()))


def _print_speed(speed: Speed, gpu: str, per_hour: float | None, prices: Prices) -> None:
    if not speed.bound:
        return
    load = f"{speed.requests} requests of {speed.context:,} tokens"
    if speed.near:
        near = speed.near
        figures = f"{near.count} figures" if near.count > 1 else "one figure"
        where = f" on {' and '.join(near.others)}, of the same chip; none on {gpu}" if near.others else ""
        click.echo(
            f"speed, {load}: {speed.low:,.0f} to {speed.high:,.0f} tokens/s decoding, {near.low:.0%} to {near.high:.0%} of the bandwidth's "
            f"{speed.bound:,.0f}, by {figures} measured near this{where}"
        )
        for source in speed.near.sources:
            click.echo(f"  measured: {source}")
    else:
        click.echo(
            f"speed, {load}: at most {speed.bound:,.0f} tokens/s by bandwidth; nothing near this was measured, m3quant bench measures it"
        )
    if per_hour is not None:
        cost = _price_cell(per_hour, speed).replace(">=", "at least").replace(" - ", " to ")
        click.echo(f"price: {per_hour:.2f} {prices.currency}/h ({prices.date}); {cost} per million output tokens")


def _span(estimate: Estimate) -> str:
    return f"{estimate.low / GIB:.2f} - {estimate.high / GIB:.2f}"
