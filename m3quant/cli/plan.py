"""m3quant plan: from headers alone, what a conversion would write, need and refuse."""

from __future__ import annotations

import json
from typing import Any

import click

from .. import api
from ..api.planning import open_source
from ..artifact.uploads import refuse_dropped
from ..checkpoint import Checkpoint
from ..errors import OptionError, PlanError
from ..planning.calibration_text import calibration_lines, token_choice
from ..planning.plan import Plan, bits_per_weight, make_plan, passed_through, role_schemes, role_table
from ..planning.resources import resources
from ..planning.source_units import source_units
from ..planning.streaming import conversion_shards, streaming_lines
from ..planning.timing_model import Rates, estimate, load_rates, rates_option, sentence
from ..publish.licence_line import licence_line
from ..recipe.choice import RecipeChoice
from ..recipe.recipe import recipe_names
from ..running.words import LONG_SECONDS, duration, human_bytes
from .options import (
    ASK_OPTIONS,
    OFFLOAD_OPTIONS,
    cache_option,
    network_option,
    primary_name,
    print_table,
    recipe_options,
    serving_options,
)


@click.command("plan")
@click.argument("src")
@recipe_options(None)
@click.option("--revision", default=None, help="Revision of a Hub repo.")
@click.option(
    "--rates",
    "rates_file",
    metavar="FILE|cpu",
    default=None,
    help="Rates of a machine, for the time: a file, or cpu for a CPU with as many cores as this one [one H200].",
)
@cache_option("If SRC is on the Hub: disk space for its shards while it is converted, e.g. 60GB.")
@network_option
@serving_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    src: str,
    choice: RecipeChoice,
    revision: str | None,
    rates_file: str | None,
    cache_disk: int | None,
    network: int | None,
    as_json: bool,
    **serving: Any,
) -> int | None:
    """What SRC (a folder, a Hub repo, or a config.json alone) is, and what its conversion would write.

    With --to or --recipe: that conversion in detail. Without: one line for each recipe.
    With --on, --all or --check-log: whether SRC, or what --to would make of it, can be served, and at which context; exit code 3 if not.
    """
    refuse_dropped(src)
    rates = rates_option(rates_file)
    if serving["everything"] or serving["on"] is not None or serving["check_log"] is not None:
        return _serving(src, revision, choice, as_json, serving)
    if given := sorted(name for name, value in serving.items() if value is not None and value is not False):
        raise click.UsageError(
            f"{primary_name(given[0])} says how to serve: add --on NODE, for example --on 1xH200, or --all."
        )
    checkpoint = open_source(src, revision)
    streaming = cache_disk, network
    check_streaming(checkpoint, streaming, bool(choice))
    if choice:
        plan = api.plan(
            checkpoint,
            choice.to,
            recipe=choice.file,
            settings=choice.settings,
            format=choice.format,
            requantize=choice.requantize,
            scheme=choice.scheme,
        )
        click.echo(json.dumps(plan_json(plan, rates, streaming), indent=2) if as_json else "", nl=as_json)
        if not as_json:
            print_plan(plan, rates, streaming)
        return None
    plans, refused, source = [], {}, source_units(checkpoint)
    for name in recipe_names():
        recipe = RecipeChoice(name, requantize=choice.requantize).recipe(checkpoint.config)
        try:
            plans.append(make_plan(checkpoint, recipe, source))
        except PlanError as error:
            refused[name] = str(error)
    if not plans:
        raise PlanError(next(iter(refused.values())))
    choice.check_used(checkpoint.root, plans[0].recipe.requantize)
    if as_json:
        click.echo(
            json.dumps(
                {"plans": {plan.recipe.name: plan_json(plan, rates) for plan in plans}, "refused": refused}, indent=2
            )
        )
        return None
    print_source(plans[0])
    click.echo(licence_line(checkpoint.root, plans[0].family.model_type).text)
    print_overview(plans, rates)
    for name, reason in refused.items():
        click.echo(f"{name}: {reason}")
    return None


def _serving(src: str, revision: str | None, choice: RecipeChoice, as_json: bool, serving: dict[str, Any]) -> int:
    from ..runtime.fit import Ask
    from .fitting import Where, run_fit

    wanted = {name: serving[name] for name in (*ASK_OPTIONS, *OFFLOAD_OPTIONS, "release") if serving[name] is not None}
    where = Where(serving["on"], bool(serving["everything"]), serving["check_log"], serving["prices"])
    draft = (serving["draft"], serving["draft_tokens"])
    return run_fit(src, revision, choice, where, Ask(**wanted), draft, as_json)


Streaming = tuple[int | None, int | None]
"""--cache-disk and --network."""


def check_streaming(checkpoint: Checkpoint, streaming: Streaming, detailed: bool = True) -> None:
    """Raise OptionError where --cache-disk or --network say nothing. detailed: whether one conversion is planned."""
    if streaming == (None, None):
        return
    if checkpoint.remote is None:
        raise OptionError(
            f"--cache-disk and --network are about a source on the Hub or in an object store, and {checkpoint.root} is here: leave them out."
        )
    if not detailed:
        raise OptionError(
            "--cache-disk and --network are about one conversion: give --to NAME or --recipe FILE with them."
        )


def plan_json(plan: Plan, rates: Rates | None = None, streaming: Streaming = (None, None)) -> dict[str, Any]:
    """The plan for programs: every number that the table shows, and each tensor's fate."""
    rates = rates or load_rates()
    budget, network = streaming
    from_hub = conversion_shards(plan, budget).to_json(network) if plan.checkpoint.remote else None
    time = estimate(plan, rates)
    return {
        "estimate": time.model_dump() if time else None,
        "calibration_tokens": token_choice(plan, rates).to_json() if plan.recipe.calibrated else None,
        "source": plan.checkpoint.root,
        "revision": plan.checkpoint.revision,
        "model_type": plan.family.model_type,
        "licence": licence_line(plan.checkpoint.root, plan.family.model_type).to_json(),
        "recipe": plan.recipe.model_dump(),
        "bytes_in": sum(u.bytes_in for u in plan.units),
        "output_bytes": plan.output_bytes,
        "bits_per_weight": bits_per_weight(plan) if plan.quantization else None,
        "from_hub": from_hub,
        "resources": {"cpu": resources(plan, False).to_json(), "gpu": resources(plan, True).to_json()},
        "roles": role_table(plan),
        "passed_through": passed_through(plan),
        "copied_files": plan.copied_files,
        "skipped_files": plan.checkpoint.skipped_files,
        "notes": plan.notes,
        "quantization_config": plan.quantization,
        "shards": [{"name": u.shard, "bytes": u.bytes_out, "holds": u.label} for u in plan.units],
        "tensors": [
            {
                "name": t.name,
                "role": t.role.kind,
                "action": t.action,
                "scheme": t.scheme.name,
                "outputs": [{"name": o.name, "dtype": o.dtype, "shape": list(o.shape)} for o in t.outputs],
            }
            for t in plan.tensors
        ],
    }


def print_source(plan: Plan) -> None:
    family = plan.family
    weights = sum(count * t.source.numel for unit, count in plan.kinds for t in unit.tensors)
    shards = f" in {len(plan.checkpoint.shards)} shards" if plan.checkpoint.shards else ""
    bytes_in = sum(u.bytes_in for u in plan.units)
    click.echo(
        f"{plan.checkpoint.root}: {family.model_type}, {weights / 1e9:.3f}B parameters, {human_bytes(bytes_in)}{shards}; "
        f"{family.num_layers} layers, "
        + (f"{family.moe.num_experts} experts, top-{family.moe.top_k}" if family.moe else "no routed experts")
    )
    kv = family.kv_geometry
    index = f" + {kv.bytes_per_token(0, 2):,.0f} of index keys" if kv.index_layers else ""
    click.echo(
        f"KV cache per token, unsharded: {kv.bytes_per_token(2, 0):,.0f} bytes in BF16, {kv.bytes_per_token(1, 0):,.0f} in FP8{index}"
    )


def print_overview(plans: list[Plan], rates: Rates) -> None:
    rows = [["recipe", "output", "of source", "bits/weight", "routed experts", "attention", "calibration", "time"]]
    for plan in plans:
        table = role_table(plan)
        share = sum(row["bytes_out"] for row in table) / sum(row["bytes_in"] for row in table)
        rows.append([
            plan.recipe.name, human_bytes(plan.output_bytes), f"{share:.1%}", f"{bits_per_weight(plan):.2f}",
            *(", ".join(map(str, role_schemes(plan, role))) for role in ("routed_experts", "attention")), plan.recipe.rounding,
            _minutes(time.seconds) if (time := estimate(plan, rates)) else "not measured",
        ])  # fmt: skip
    print_table(rows)
    click.echo(
        f"time: on {rates.machine}, by rates of {rates.measured}; --rates cpu for a CPU, --rates FILE for another machine"
    )


def _minutes(seconds: float) -> str:
    """To a tenth of a minute, or what takes longer in hours and days."""
    return f"{seconds / 60:.1f} min" if seconds < LONG_SECONDS else duration(seconds)


def print_plan(plan: Plan, rates: Rates | None = None, streaming: Streaming = (None, None)) -> None:
    budget, network = streaming
    store = plan.checkpoint.remote
    from_hub = streaming_lines(conversion_shards(plan, budget), store.kind, network) if store else []
    print_source(plan)
    click.echo(licence_line(plan.checkpoint.root, plan.family.model_type).text)
    click.echo(f"recipe {plan.recipe.name}, format {plan.recipe.format}, rounding {plan.recipe.rounding}")
    table = role_table(plan)
    rows = [["role", "action", "scheme", "tensors", "in", "out"]]
    for row in table:
        rows.append([
            row["role"], row["action"], row["scheme"], str(row["tensors"]), human_bytes(row["bytes_in"]), human_bytes(row["bytes_out"]),
        ])  # fmt: skip
    if plan.recipe.layers:
        rows = [
            [*cells, layers]
            for cells, layers in zip(rows, ["layers", *(r.get("layers", "") for r in table)], strict=True)
        ]
    print_table(rows)
    for row in table:
        if row["action"] != "quantize":
            click.echo(f"{row['role']}: {row['action']}, because: {row['reason']}")
    bits = f", {bits_per_weight(plan):.3f} bits per quantized weight" if plan.quantization else ""
    click.echo(
        f"output: {plan.output_bytes:,} bytes ({human_bytes(plan.output_bytes)}) in {len(plan.units)} shards{bits}"
    )
    for name, need in (("CPU", resources(plan, False)), ("GPU", resources(plan, True))):
        device = f", device memory {human_bytes(need.device)}" if need.device else ""
        click.echo(
            f"on a {name}: peak host memory {human_bytes(need.host)}{device}, free disk {human_bytes(need.disk)}"
        )
    for line in from_hub:
        click.echo(line)
    rates = rates or load_rates()
    if time := estimate(plan, rates):
        click.echo(sentence(time))
    if plan.recipe.calibrated:
        for line in calibration_lines(plan, rates):
            click.echo(line)
    passed = passed_through(plan)
    if passed:
        click.echo(
            f"passed through byte for byte ({len(passed)}): {', '.join(passed[:8])}{', ...' if len(passed) > 8 else ''}"
        )
    for name, reason in plan.checkpoint.skipped_files.items():
        click.echo(f"not carried over: {name} ({reason})")
    for note in plan.notes:
        click.echo(f"note: {note}")
