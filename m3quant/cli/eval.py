"""m3quant eval: what a checkpoint predicts, and how far it is from its source, in one pass over the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..api.evaluation import Arithmetic, Comparison, Evaluation, Question, ask_endpoint, compare, evaluate
from ..errors import EvaluationError
from ..evaluate.choices import ACTIVATIONS, INDEX_DTYPES, KV_DTYPES
from ..extras import need
from ..reports.verdict import Verdict, of_evaluation
from .options import Length, cache_option, print_table
from .progress import BytesProgress, opening

if TYPE_CHECKING:
    from ..artifact.eval_record import EvalRecord, Result

_PLACES = ("auto", "device", "host", "disk")


def running_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How to run it."""
    for option in reversed(
        (
            click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:N, or auto."),
            click.option(
                "--states",
                type=click.Choice(_PLACES),
                default="auto",
                show_default=True,
                help="Where hidden states live.",
            ),
            click.option(
                "--batch-tokens",
                type=Length(),
                default=16384,
                show_default=True,
                help="Tokens that pass through a layer together.",
            ),
        )
    ):
        function = option(function)
    return function


@click.command("eval")
@click.argument("ckpts", metavar="CKPT...", nargs=-1, required=True)
@click.option(
    "--endpoint",
    metavar="URL",
    default=None,
    help="Ask an OpenAI-compatible server that serves CKPT, which gives the tokenizer.",
)
@click.option("--model", default=None, help="With --endpoint: the served model's name, where there are several.")
@click.option("--api-key-env", metavar="NAME", default=None, help="With --endpoint: variable that holds the API key.")
@click.option("--source", default=None, help="The checkpoint that CKPT was made from.")
@click.option("--suite", default="quick", show_default=True, metavar="quick|full|FILE", help="What to measure.")
@click.option(
    "--data",
    metavar="SOURCE",
    default=None,
    help="Text instead of the suite's: a file (JSON lines, JSON, CSV, Parquet, text), a folder, a Hub dataset (ORG/NAME[:CONFIG][:SPLIT]), "
    "wikitext-2, pg19 or bundled.",
)
@running_options
@click.option(
    "--activations",
    type=click.Choice(ACTIVATIONS),
    default=ACTIVATIONS[0],
    show_default=True,
    help="CKPT's activations: rounded where an engine rounds them, or exact (weights only).",
)
@click.option(
    "--kv-dtype",
    type=click.Choice(KV_DTYPES),
    default=KV_DTYPES[0],
    show_default=True,
    help="CKPT's keys and values: rounded to FP8 as an FP8 cache does, or not; auto: as config.json states.",
)
@click.option(
    "--index-dtype",
    type=click.Choice(INDEX_DTYPES),
    default=INDEX_DTYPES[0],
    show_default=True,
    help="CKPT's index keys.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder for eval.json and the page [an output of m3quant: CKPT/eval.json, page in CKPT/m3quant-report; else ./NAME-eval; of several, their page in ./SOURCE-compared].",
)
@click.option("--fail-over", metavar="LIMITS", default=None, help="Exit 1 beyond these, e.g. kld=0.05,ppl=+2%.")
@cache_option("If CKPT or --source is on the Hub: disk space for shards [free space].")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    ckpts: tuple[str, ...],
    endpoint: str | None,
    model: str | None,
    api_key_env: str | None,
    source: str | None,
    suite: str,
    data: str | None,
    device: str,
    states: str,
    batch_tokens: int,
    activations: str,
    kv_dtype: str,
    index_dtype: str,
    report: Path | None,
    fail_over: str | None,
    cache_disk: int | None,
    as_json: bool,
) -> None:
    """Measure CKPT (a source or an output of m3quant; a folder or a Hub repo), and its distance from --source. Run again after an interruption: it continues.

    Of several, a page shows them side by side; with --source all of them pass through in one pass over its weights.
    """
    how = Arithmetic(device, states, batch_tokens, activations, kv_dtype, index_dtype, cache_disk)
    need("eval", "m3quant eval")
    opening(f"eval {' '.join(ckpts)}" + (f" against {source}" if source else "") + f", suite {suite}")
    if endpoint is not None:
        if source is not None:
            raise EvaluationError("--source is compared by streaming: leave --endpoint out, or evaluate the two apart.")
        if not how.rounds_as_by_default:
            raise EvaluationError(
                "a server rounds as it was started: leave --activations, --kv-dtype and --index-dtype out."
            )
        if len(ckpts) > 1:
            raise EvaluationError("--endpoint asks a server of one checkpoint: give that one alone.")
        question = Question(suite, data, report, fail_over)
        if cache_disk is not None:
            raise EvaluationError("a server reads the weights: leave --cache-disk out.")
        found = ask_endpoint(ckpts[0], endpoint, question, model=model, api_key_env=api_key_env)
        tell(found, as_json)
        return
    measured: dict[str, Any] = {"suite": suite, "data": data, "report": report, "limits": fail_over, **asdict(how)}
    if len(ckpts) == 1:
        tell(evaluate(ckpts[0], source, **measured, progress=BytesProgress), as_json)
    else:
        tell_comparison(compare(ckpts, source, **measured, progress=BytesProgress), as_json)


def tell_comparison(found: Comparison, as_json: bool) -> None:
    """Print several checkpoints side by side, and SystemExit(1) if a limit is broken for any."""
    from ..reports.comparison_html import of_comparison

    verdict = of_comparison(found.compared)
    if as_json:
        every = zip(found.compared, found.evaluations, strict=True)
        evaluations = [{"name": one.name, "bytes": one.nbytes, **told(own)} for one, own in every]
        whole = {"verdict": verdict.to_json(), "page": str(found.page), "evaluations": evaluations}
        click.echo(json.dumps(whole, indent=2))
    else:
        for own in found.evaluations:
            print_record(own.record)
            click.echo(f"written: {own.written} and {own.page}\n")
        rows = [["checkpoint", "size and divergence", "what it means"]]
        print_table(rows + [[one.label, one.value, one.meaning] for one in verdict.findings])
        click.echo(f"\nverdict: {verdict.headline}")
        for line in verdict.not_tested:
            click.echo(f"  not tested: {line}")
        click.echo(f"side by side: {found.page}")
        for sentence in found.broken:
            click.echo(f"FAIL  {sentence}")
    if found.broken:
        raise SystemExit(1)


def told(found: Evaluation) -> dict[str, Any]:
    """An evaluation for programs: the record, the verdict, and limits."""
    return {
        **found.record.model_dump(mode="json"),
        "verdict": of_evaluation(found.record).to_json(),
        "gate": {"limits": found.limits, "broken": found.broken},
    }


def tell(found: Evaluation, as_json: bool, conversion: Mapping[str, Any] | None = None) -> None:
    """Print what was measured, and SystemExit(1) if a limit is broken.

    conversion: what a conversion before it wrote of itself; JSON then has the figures under "evaluation".
    """
    if as_json:
        figures = told(found)
        click.echo(json.dumps(figures if conversion is None else {**conversion, "evaluation": figures}, indent=2))
    else:
        print_record(found.record)
        print_verdict(of_evaluation(found.record))
        click.echo(f"written: {found.written} and {found.page}")
        for sentence in found.broken:
            click.echo(f"FAIL  {sentence}")
    if found.broken:
        raise SystemExit(1)


def print_verdict(verdict: Verdict) -> None:
    """The conclusion, the findings that stand out, and what was not tested."""
    click.echo(f"\nverdict: {verdict.headline}")
    for finding in verdict.findings:
        if finding.bad:
            click.echo(f"  {finding.label}: {finding.value}. {finding.meaning}")
    for one in verdict.not_tested:
        click.echo(f"  not tested: {one}")


def print_record(record: EvalRecord) -> None:
    """Every result under its convention; a noise floor with the figure that it belongs to."""
    against = f", against {record.source.name} ({record.source.stored})" if record.source else ""
    click.echo(
        f"{record.checkpoint.name} ({record.checkpoint.stored}){against}: suite {record.suite}, {record.device}, {record.seconds:.1f} s"
    )
    floors = {r.task: r for r in record.results if is_noise(r)}
    for result in record.results:
        if not is_noise(result):
            click.echo(f"\n{result.label}")
            _print_result(result, floors.get(result.task))
    if record.notes:
        click.echo()
    for note in record.notes:
        click.echo(f"note: {note}")


def is_noise(result: Result) -> bool:
    return result.convention.startswith("noise-floor")


def _print_result(result: Result, floor: Result | None) -> None:
    click.echo(f"  [{result.convention}] {result.tokens:,} tokens of {result.data.name if result.data else 'its own'}")
    if result.not_run is not None:
        click.echo(f"  not run: {result.not_run}")
    rows = []
    for name, value in result.metrics.items():
        base = (result.source_metrics or {}).get(name)
        row = [f"  {name}", f"{value:.6g}"]
        if result.source_metrics is not None:
            row += [f"{base:.6g}", f"{value / base - 1:+.2%}" if base else ""] if base is not None else ["", ""]
        if floor is not None:
            row.append(f"{floor.metrics[name]:.6g}" if name in floor.metrics else "")
        rows.append(row)
    if rows:
        heading = ["  metric", "checkpoint"]
        heading += ["source", "change"] if result.source_metrics is not None else []
        heading += ["noise floor"] if floor is not None else []
        print_table([heading, *rows])
    for note in [floor.label] if floor is not None else []:
        click.echo(f"  {note}")
    for note in result.notes:
        click.echo(f"  note: {note}")
