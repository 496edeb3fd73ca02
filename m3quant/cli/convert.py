"""m3quant convert: quantize a checkpoint, one layer in memory at a time."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..api.calibration_text import TextChoice
from ..api.conversion import Conversion, How, Prepared, prepare
from ..api.evaluation import Arithmetic, Question, measure
from ..api.fitted_conversion import asked_of
from ..errors import EvaluationError
from ..planning.plan import WARNING
from ..recipe.choice import RecipeChoice
from ..reports.verdict import unknown_text
from ..running.words import human_bytes
from .eval import tell
from .fit_convert import fit_options, predicted_line
from .options import TokenCount, recipe_options
from .progress import BytesProgress


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
@click.option(
    "--window-lengths",
    type=click.Choice(("one", "mixed")),
    default=None,
    help="mixed: join a quarter of the windows by four, and a quarter past the sparse attention's selection [one].",
)
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
    window_lengths: str | None,
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
    serving = {"context": context, "concurrency": concurrency, "kv_dtype": kv_dtype}
    asked = asked_of(budget, node, serving, sensitivity_file, bool(choice))
    question = None if suite is None else Question(suite, limits=fail_over)
    if question is not None:
        question.check(source=True)
    elif fail_over is not None:
        raise EvaluationError("--fail-over holds figures against limits: give --eval quick with it.")
    text = TextChoice(corpus, windows, calibration_tokens, window_length, min_expert_tokens, window_lengths)
    how = How(device, strict_coverage, spill, engine, address)
    prepared = prepare(src, dst, choice, text, how, asked, dry_run=dry_run, progress=BytesProgress)
    if dry_run:
        _print_dry(prepared, as_json)
        return
    for note in prepared.plan.notes:
        if note.startswith(WARNING):
            click.echo(note, err=True)
    done = prepared.run(BytesProgress)
    told = {"output": str(dst), **done.manifest}
    if not as_json:
        print_result(done)
    elif question is None:
        click.echo(json.dumps(told, indent=2))
    if question is not None:
        tell(measure(dst, Path(src), question, Arithmetic(device), BytesProgress), as_json, told)


def _print_dry(prepared: Prepared, as_json: bool) -> None:
    """The plan, and the text that it would be calibrated on."""
    from .plan import plan_json, print_plan

    if as_json:
        click.echo(json.dumps(plan_json(prepared.plan), indent=2))
        return
    print_plan(prepared.plan)
    if prepared.plan.recipe.calibrated:
        found = prepared.text()
        for line in (f"calibration text: {found.source}", *(f"note: {note}" for note in found.notes)):
            click.echo(line)


def print_result(done: Conversion) -> None:
    dst, manifest = done.output, done.manifest
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
        if unknown := unknown_text(quality["perplexity_source"]):
            click.echo(f"note: {unknown}")
    if coverage := manifest.get("coverage"):
        click.echo(coverage["sentence"])
    if manifest.get("report"):
        click.echo(f"report: {dst / manifest['report']}")
    click.echo(f"next: m3quant verify {dst} --source {done.plan.checkpoint.root}")
    if done.fitted and (line := predicted_line(done.fitted, manifest)):
        click.echo(line)
