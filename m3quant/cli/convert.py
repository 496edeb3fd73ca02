"""m3quant convert: quantize a checkpoint, one layer in memory at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..checkpoint import Checkpoint
from ..errors import EvaluationError, PlanError, RecipeError
from ..extras import need
from ..planning.plan import WARNING, Plan, make_plan
from ..recipe.recipe import CalibrationOptions, Recipe, with_data
from ..running.words import human_bytes
from .fit_convert import asked_of, fit_options, fitted, predicted_line
from .options import RecipeChoice, TokenCount, recipe_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..calibration.mixture import Part
    from ..calibration.windows import Windows
    from ..convert.job import Settings


@click.command("convert")
@click.argument("src")
@click.argument("dst", type=click.Path(path_type=Path))
@recipe_options("awq")
@fit_options
@click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:N, or auto: a GPU where there is one."
)
@click.option(
    "--calibration",
    "corpus",
    metavar="SOURCE[=WEIGHT]",
    multiple=True,
    help="Calibration text: a file, folder, Hub dataset or bundled; several are mixed by their weights [bundled].",
)
@click.option("--windows", type=int, default=None, help="Calibration windows.")
@click.option(
    "--calibration-tokens", type=TokenCount(), default=None, help="The same in tokens, for instance 786432 or 800k."
)
@click.option("--window-length", type=int, default=None, help="Tokens in a window.")
@click.option("--min-expert-tokens", type=int, default=None, help="Tokens below which an expert is topped up [32].")
@click.option(
    "--strict-coverage",
    is_flag=True,
    help="Fail where an expert stays below --min-expert-tokens, instead of topping it up.",
)
@click.option("--spill", is_flag=True, help="Keep hidden states on disk, in the output's folder, instead of in memory.")
@click.option(
    "--eval", "suite", metavar="quick|full|FILE", default=None, help="Run m3quant eval on the output afterwards."
)
@click.option(
    "--fail-over", metavar="LIMITS", default=None, help="With --eval: exit 1 beyond these, e.g. kld=0.05,ppl=+2%."
)
@click.option(
    "--engine",
    type=click.Choice(("local", "ray")),
    default="local",
    show_default=True,
    help="Where to run: this process, or all GPUs of a Ray cluster.",
)
@click.option("--address", metavar="HOST:PORT", default=None, help="Ray cluster to join [one started on this machine].")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    src: str,
    dst: Path,
    choice: RecipeChoice,
    budget: str | None,
    node: str | None,
    context: int | None,
    concurrency: int | None,
    kv_dtype: str | None,
    sensitivity_file: Path | None,
    device: str,
    corpus: tuple[str, ...],
    windows: int | None,
    calibration_tokens: int | None,
    window_length: int | None,
    min_expert_tokens: int | None,
    strict_coverage: bool,
    spill: bool,
    engine: str,
    address: str | None,
    suite: str | None,
    fail_over: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Quantize SRC into the folder DST. Run again after any interruption: it continues."""
    need("convert", "m3quant convert")
    if address and engine != "ray":
        raise PlanError("--address names a Ray cluster: give --engine ray with it.")
    if engine == "ray" and ":" in device:
        raise PlanError(f"--device {device} names one GPU of this machine: with --engine ray give cuda, cpu or auto.")
    serving = {"context": context, "concurrency": concurrency, "kv_dtype": kv_dtype}
    asked = asked_of(budget, node, serving, sensitivity_file, bool(choice))
    if choice.requantize and asked is not None:
        raise RecipeError(
            "--requantize goes with a recipe (--to, --recipe): m3quant fit measures on unquantized weights."
        )
    checkpoint = Checkpoint.open(src)
    recipe = choice.recipe(checkpoint.config) if asked is None else Recipe(rounding="feedback")
    if calibration_tokens is not None:
        if windows is not None:
            raise RecipeError("--windows and --calibration-tokens both say how much text: give one of them.")
        length = window_length or recipe.data.window_length
        windows = -(-calibration_tokens // length)  # whole windows, and not fewer tokens than were asked for
    given = {"windows": windows, "window_length": window_length, "min_expert_tokens": min_expert_tokens}
    changes = {key: value for key, value in given.items() if value is not None}
    if not recipe.calibrated and (changes or corpus or strict_coverage):
        raise RecipeError(
            f"recipe '{recipe.name}' uses no calibration data: leave calibration options out, or use --to awq."
        )
    recipe = with_data(recipe, changes)
    if suite is not None:
        _check_eval(suite, fail_over)
    elif fail_over is not None:
        raise EvaluationError("--fail-over holds figures against limits: give --eval quick with it.")
    from ..calibration.mixture import parse_mixture

    parts = parse_mixture(corpus)

    def enough(plan: Plan) -> Plan:
        chosen = windows is not None or corpus or plan.recipe.rounding != "feedback"
        return plan if chosen else _with_enough_text(plan, device)

    fit = fitted(checkpoint, src, dst, asked, recipe.data, enough, device, corpus, dry_run) if asked else None
    plan = fit.plan if fit and fit.plan else enough(make_plan(checkpoint, recipe))
    if dry_run:
        from .plan import plan_json, print_plan

        if as_json:
            click.echo(json.dumps(plan_json(plan), indent=2))
        else:
            print_plan(plan)
        if plan.recipe.calibrated and not as_json:
            found = calibration_windows(plan, parts)
            for line in (f"calibration text: {found.source}", *(f"note: {note}" for note in found.notes)):
                click.echo(line)
        return
    from ..convert.job import Settings

    for note in plan.notes:
        if note.startswith(WARNING):
            click.echo(note, err=True)
    how = Settings(device=device, strict_coverage=strict_coverage, spill=spill, engine=engine, address=address)
    manifest = _run(plan, dst, how, parts)
    told = {"output": str(dst), **manifest}
    if not as_json:
        print_result(plan, dst, manifest)
        if fit and (line := predicted_line(fit, manifest)):
            click.echo(line)
    elif suite is None:
        click.echo(json.dumps(told, indent=2))
    if suite is not None:
        from ..evaluate.evaluation import Settings as Evaluating
        from .eval import Judgement, run_eval

        run_eval(dst, Path(src), Judgement(suite, fail_over=fail_over, as_json=as_json), Evaluating(device), told)


def _with_enough_text(plan: Plan, device: str) -> Plan:
    """The plan with as much of the bundled text as a GPU has time for, where the recipe does not say how much."""
    from ..planning.calibration_text import token_choice
    from ..planning.timing_model import load_rates
    from ..running.device import pick_device

    data = plan.recipe.data
    if data.windows != CalibrationOptions().windows or pick_device(device).type != "cuda":
        return plan
    windows = -(-token_choice(plan, load_rates()).tokens // data.window_length)
    return plan if windows <= data.windows else make_plan(plan.checkpoint, with_data(plan.recipe, {"windows": windows}))


def _check_eval(suite: str, fail_over: str | None) -> None:
    """What can be wrong with --eval and --fail-over, before the conversion."""
    from ..evaluate.gate import check_limits, parse_limits
    from ..evaluate.suites import load_suite

    kinds = [entry.task for entry in load_suite(suite).tasks]
    if fail_over is not None:
        check_limits(parse_limits(fail_over), kinds, source=True)


def _run(plan: Plan, dst: Path, settings: Settings, parts: Sequence[Part]) -> dict[str, Any]:
    from ..convert.conversion import check_places
    from ..convert.start import convert
    from ..planning.config_models import check_config_model
    from ..running.device import pick_device
    from .progress import BytesProgress

    check_places(plan, dst)
    check_config_model(plan.quantization)
    pick_device(settings.device)
    if plan.recipe.calibrated:
        settings.windows = calibration_windows(plan, parts)
    with BytesProgress(plan.recipe.name) as progress:
        for note in settings.windows.notes if settings.windows else ():
            progress.say(f"note: {note}")
        return convert(plan, dst, settings, progress)


def calibration_windows(plan: Plan, parts: Sequence[Part]) -> Windows:
    """Tokenized calibration and held-out windows for this plan. Raises CalibrationError for too little text."""
    from ..calibration.corpus import load_tokenizer
    from ..calibration.mixture import mixed_windows

    data = plan.recipe.data
    tokenizer = load_tokenizer(plan.checkpoint.root)
    return mixed_windows(parts, tokenizer, data.windows + data.heldout_windows, data.window_length, seed=data.seed)


def print_result(plan: Plan, dst: Path, manifest: dict[str, Any]) -> None:
    bytes_in = manifest["source"]["bytes"]
    share = manifest["output_bytes"] / bytes_in
    click.echo(
        f"{dst}: {human_bytes(manifest['output_bytes'])}, {share:.1%} of the source's {human_bytes(bytes_in)}, "
        f"{manifest['bits_per_weight']} bits per quantized weight, {manifest['seconds']:.1f} s"
    )
    if quality := manifest.get("heldout"):
        click.echo(
            f"held-out windows ({quality['tokens']} tokens): perplexity {quality['perplexity_source']:.4f} -> "
            f"{quality['perplexity_quantized']:.4f}, KL divergence {quality['kl_mean']:.5f}, top-1 agreement {quality['top1_agreement']:.2%}, "
            f"activations {quality['activations']}"
        )
    if coverage := manifest.get("coverage"):
        click.echo(coverage["sentence"])
    if manifest.get("report"):
        click.echo(f"report: {dst / manifest['report']}")
    click.echo(f"next: m3quant verify {dst} --source {plan.checkpoint.root}")
