"""m3quant convert: quantize a checkpoint, one layer in memory at a time."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from ..api.calibration_text import TextChoice
from ..api.conversion import Conversion, How, Prepared, prepare
from ..api.evaluation import Arithmetic, Question, measure
from ..api.fitted_conversion import asked_of
from ..artifact.manifest import MANIFEST
from ..checkpoint import Checkpoint
from ..errors import EvaluationError, OptionError
from ..extras import need
from ..planning.plan import WARNING
from ..publish.licence_line import licence_line
from ..recipe.choice import RecipeChoice
from ..recipe.recipe import SHORTEST_WINDOW
from ..reports.verdict import unknown_text
from ..running.words import human_bytes
from .convert_publish import print_published, publish_while_converting, wanted_of
from .eval import tell
from .fit_convert import fit_options, predicted_line
from .options import Length, TokenCount, cache_option, network_option, outdated, recipe_options
from .progress import BytesProgress, opening


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
    help="Calibration text: a file (JSON lines, JSON, CSV, Parquet, text), a folder, a Hub dataset (ORG/NAME[:CONFIG][:SPLIT]), wikitext-2, "
    "pg19 or bundled; several are mixed by their weights [bundled].",
)
@click.option(
    "--windows",
    "--num-calibration-samples",
    "windows",
    type=click.IntRange(1),
    default=None,
    help="Calibration windows.",
)
@click.option(
    "--calibration-tokens", type=TokenCount(), default=None, help="The same in tokens, for instance 786432 or 800k."
)
@click.option(
    "--window-length",
    "--max-seq-length",
    "window_length",
    type=Length(SHORTEST_WINDOW),
    default=None,
    help="Tokens in a window.",
)
@click.option(
    "--window-lengths",
    type=click.Choice(("one", "mixed")),
    default=None,
    help="mixed: join a quarter of the windows by four, and a quarter past the sparse attention's selection [one].",
)
@click.option(
    "--min-expert-tokens", type=click.IntRange(0), default=None, help="Tokens below which an expert is topped up [32]."
)
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
@click.option("--ray", is_flag=True, help="Run on all GPUs of a Ray cluster.")
@click.option("--address", metavar="HOST:PORT", default=None, help="Ray cluster to join [one started on this machine].")
@publish_while_converting
@click.option("--engine", type=click.Choice(("local", "ray")), default=None, hidden=True)
@cache_option("If SRC is on the Hub: disk space for its shards, e.g. 60GB [free space minus the output].")
@network_option
@click.option("--dry-run", is_flag=True, help="Make every check of the run, print the plan and stop.")
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
    ray: bool,
    engine: str | None,
    address: str | None,
    suite: str | None,
    fail_over: str | None,
    repo: str | None,
    drop_uploaded: bool,
    tag: str | None,
    cache_disk: int | None,
    network: int | None,
    dry_run: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Quantize SRC (a folder, or a Hub repo as ORG/NAME or ORG/NAME@REVISION) into the folder DST. Run again after any interruption: it continues.

    The shards of a Hub repo are fetched ahead of the layer that needs them, and removed after their last use.
    """
    if network is not None and not dry_run:
        raise OptionError("--network is for the time estimate of a plan: give --dry-run with it, or leave it out.")
    need("convert", "m3quant convert")
    opening(f"convert {src} to {dst}")
    if engine is not None:
        outdated(f"--engine {engine}", "is now --ray" if engine == "ray" else "is what happens without it")
        ray = ray or engine == "ray"
    wanted = wanted_of(repo, drop_uploaded, tag, given, suite is not None)
    serving = {"context": context, "concurrency": concurrency, "kv_dtype": kv_dtype}
    asked = asked_of(budget, node, serving, sensitivity_file, bool(choice))
    question = None if suite is None else Question(suite, limits=fail_over)
    if question is not None:
        question.check(source=True)
    elif fail_over is not None:
        raise EvaluationError("--fail-over holds figures against limits: give --eval quick with it.")
    if question is not None and Path(src).is_dir():
        question.check_on(src, Checkpoint.open(src).config)
    text = TextChoice(corpus, windows, calibration_tokens, window_length, min_expert_tokens, window_lengths)
    if asked is not None and not dry_run:  # measuring is most of the work
        _say_licence(Checkpoint.open(src))
    how = How(device, strict_coverage, spill, ray, address, cache_disk)
    prepared = prepare(src, dst, choice, text, how, asked, publish=wanted, dry_run=dry_run, progress=BytesProgress)
    if dry_run:
        if wanted:
            click.echo("note: with --dry-run nothing is asked of the Hub, and no gate of --publish is run", err=True)
        _print_dry(prepared, as_json, network)
        return
    for note in prepared.plan.notes:
        if note.startswith(WARNING):
            click.echo(note, err=True)
    if asked is None:
        _say_licence(prepared.plan.checkpoint)
    done = prepared.run(BytesProgress)
    if not as_json:
        print_result(done)
    elif question is None:
        click.echo(json.dumps(summary(done), indent=2))
    if question is not None:
        tell(
            measure(dst, done.plan.checkpoint.pinned, question, Arithmetic(device), BytesProgress),
            as_json,
            summary(done),
        )


def _say_licence(source: Checkpoint) -> None:
    click.echo(licence_line(source.root, str(source.config.get("model_type"))).text, err=True)


def _print_dry(prepared: Prepared, as_json: bool, network: int | None) -> None:
    """The plan with times of the device that would be used, the text, and what is in the output folder."""
    from .plan import check_streaming, plan_json, print_plan

    streaming = prepared.how.cache_disk, network
    check_streaming(prepared.plan.checkpoint, streaming)
    looked = prepared.look(BytesProgress)
    windows = looked.windows
    if as_json:
        calibration = windows.record() if windows else None
        run = {
            "output": str(prepared.output),
            "found": looked.found,
            "device": looked.device,
            "calibration": calibration,
        }
        click.echo(json.dumps(plan_json(prepared.plan, looked.rates, streaming) | {"dry_run": run}, indent=2))
        return
    print_plan(prepared.plan, looked.rates, streaming)
    if windows:
        click.echo(f"calibration text: {windows.source}")
    click.echo(f"output folder {prepared.output}: {looked.found}")


def summary(done: Conversion) -> dict[str, Any]:
    """What --json prints of a conversion; everything else is in the file that `manifest` names."""
    dst, plan, manifest = done.output, done.plan, done.manifest
    recipe = plan.recipe
    return {
        "output": str(dst),
        "manifest": str(dst / MANIFEST),
        "report": str(dst / manifest["report"]) if manifest.get("report") else None,
        "recipe": {"name": recipe.name, "format": recipe.format, "rounding": recipe.rounding},
        "source": {name: manifest["source"].get(name) for name in ("repo", "revision", "bytes")},
        "licence": licence_line(plan.checkpoint.root, plan.family.model_type).to_json(),
        "output_bytes": manifest["output_bytes"],
        "bits_per_weight": manifest["bits_per_weight"],
        "seconds": manifest["seconds"],
        "heldout": manifest.get("heldout"),
        "coverage": (manifest.get("coverage") or {}).get("sentence"),
        **({"published": done.published.to_json()} if done.published else {}),
    }


def print_result(done: Conversion) -> None:
    dst, manifest = done.output, done.manifest
    bytes_in = manifest["source"]["bytes"]
    share = (
        sum(row["bytes_out"] for row in manifest["roles"]) / bytes_in
    )  # like with like: the source's texts and draft are not counted
    click.echo(
        f"{dst}: {human_bytes(manifest['output_bytes'])}, its weights {share:.1%} of the source's {human_bytes(bytes_in)}, "
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
    if done.published:
        print_published(dst, done.published)
    else:
        click.echo(f"next: {shlex.join(['m3quant', 'verify', str(dst), '--source', done.plan.checkpoint.pinned])}")
    if done.fitted and (line := predicted_line(done.fitted, manifest)):
        click.echo(line)
