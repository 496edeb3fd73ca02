"""m3quant eval: what a checkpoint predicts, and how far it is from its source, in one pass over the weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import EvaluationError
from ..evaluate.choices import ACTIVATIONS, INDEX_DTYPES, KV_DTYPES
from ..extras import need
from .options import print_table

if TYPE_CHECKING:
    from ..artifact.eval_record import EvalRecord, Result
    from ..evaluate.gate import Limit
    from ..evaluate.models import Model

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
                type=click.IntRange(min=1),
                default=16384,
                show_default=True,
                help="Tokens that pass through a layer together.",
            ),
        )
    ):
        function = option(function)
    return function


@click.command("eval")
@click.argument("ckpt")
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
    "--data", metavar="FILE|NAME", default=None, help="Text in place of the suite's: a file, folder, wikitext-2, pg19."
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
    help="Folder for eval.json and the page [an output of m3quant: CKPT/eval.json, page in CKPT/m3quant-report; else ./NAME-eval].",
)
@click.option("--fail-over", metavar="LIMITS", default=None, help="Exit 1 beyond these, e.g. kld=0.05,ppl=+2%.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    ckpt: str,
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
    as_json: bool,
) -> None:
    """Measure CKPT (a source or an output of m3quant; a folder or a Hub repo), and its distance from --source. Run again after an interruption: it continues."""
    need("eval", "m3quant eval")
    from ..evaluate.evaluation import Settings
    from .progress import local_folder

    judgement = Judgement(suite, data, report, fail_over, as_json)
    if endpoint is not None:
        if source is not None:
            raise EvaluationError("--source is compared by streaming: leave --endpoint out, or evaluate the two apart.")
        if (activations, kv_dtype, index_dtype) != (ACTIVATIONS[0], KV_DTYPES[0], INDEX_DTYPES[0]):
            raise EvaluationError(
                "a server rounds as it was started: leave --activations, --kv-dtype and --index-dtype out."
            )
        _served(local_folder(ckpt), endpoint, model, api_key_env, judgement)
        return
    settings = Settings(device, states, batch_tokens, activations, kv_dtype, index_dtype)
    folder, origin = local_folder(ckpt), local_folder(source) if source else None
    run_eval(folder, origin, judgement, settings)


@dataclass(frozen=True)
class Judgement:
    """What is asked of a checkpoint and where it is written: a suite, text instead of the suite's own, a folder, limits, JSON."""

    suite: str
    data: str | None = None
    report: Path | None = None
    fail_over: str | None = None
    as_json: bool = False


def run_eval(
    ckpt: Path,
    source: Path | None,
    judgement: Judgement,
    settings: Any,
    conversion: dict[str, Any] | None = None,
) -> None:
    """The command's body. conversion: what a conversion before it tells; JSON then has the figures under "evaluation".

    Raises SystemExit(1) if a limit is broken, M3QuantError for what cannot be measured."""
    from ..calibration.corpus import load_tokenizer
    from ..evaluate.evaluation import evaluate
    from ..evaluate.gate import check_limits, parse_limits
    from ..evaluate.models import open_model
    from ..evaluate.suites import load_suite, make_tasks
    from .progress import BytesProgress

    limits = parse_limits(judgement.fail_over) if judgement.fail_over is not None else []
    loaded = load_suite(judgement.suite)
    checkpoint = open_model(ckpt)
    origin = open_model(source, "source") if source else None
    tasks, notes = make_tasks(loaded, load_tokenizer(checkpoint.folder), checkpoint.config, judgement.data)
    check_limits(limits, [task.kind for task in tasks], origin is not None)
    report = judgement.report
    folder, pages = (report, report) if report else default_report(checkpoint)
    with BytesProgress("eval") as progress:
        for note in notes:
            progress.say(f"note: {note}")
        record = evaluate(checkpoint, origin, tasks, loaded.name, folder, settings, progress, notes)
    _tell(record, folder, pages, limits, judgement.as_json, conversion)


def _served(
    ckpt: Path,
    endpoint: str,
    model: str | None,
    api_key_env: str | None,
    judgement: Judgement,
) -> None:
    """The suite's tasks through a server; the record goes where --report says, for CKPT's own eval.json is of its weights."""
    from ..calibration.corpus import load_tokenizer
    from ..checkpoint import Checkpoint, make_folder
    from ..evaluate.endpoint import evaluate_endpoint
    from ..evaluate.evaluation import write_record
    from ..evaluate.gate import check_limits, parse_limits
    from ..evaluate.haystack import Reach
    from ..evaluate.suites import load_suite, make_tasks

    limits = parse_limits(judgement.fail_over) if judgement.fail_over is not None else []
    loaded, tokenizer = load_suite(judgement.suite), load_tokenizer(ckpt)
    config = Checkpoint.open(ckpt).config
    tasks, notes = make_tasks(loaded, tokenizer, config, judgement.data)
    check_limits(limits, [task.kind for task in tasks], source=False)
    record = evaluate_endpoint(
        endpoint, model, tasks, tokenizer, Reach.of(config), api_key_env=api_key_env, suite=loaded.name
    )
    record.notes.extend(notes)
    folder = judgement.report or Path(f"{ckpt.resolve().name}-endpoint-eval")
    make_folder(folder)
    write_record(record, folder)
    _tell(record, folder, folder, limits, judgement.as_json, None)


def _tell(
    record: EvalRecord, folder: Path, pages: Path, limits: list[Limit], as_json: bool, conversion: dict[str, Any] | None
) -> None:
    """Print the record and what it breaks; SystemExit(1) if anything."""
    from ..evaluate.gate import broken
    from ..reports.evaluation_html import write_report

    page = write_report(record, pages)
    sentences = broken(limits, record)
    if as_json:
        gate = {"limits": [limit.text for limit in limits], "broken": sentences}
        told = {**record.model_dump(mode="json"), "gate": gate}
        click.echo(json.dumps(told if conversion is None else {**conversion, "evaluation": told}, indent=2))
    else:
        print_record(record)
        click.echo(f"written: {folder / 'eval.json'} and {page}")
        for sentence in sentences:
            click.echo(f"FAIL  {sentence}")
    if sentences:
        raise SystemExit(1)


def default_report(checkpoint: Model) -> tuple[Path, Path]:
    """Folders of eval.json and of the page: beside the weights for an output of ours; a source is not written into."""
    from ..reports.conversion import FOLDER

    if checkpoint.manifest is not None:
        return checkpoint.folder, checkpoint.folder / FOLDER
    apart = Path(f"{checkpoint.folder.resolve().name}-eval")
    return apart, apart


def print_record(record: EvalRecord) -> None:
    """Every result under its convention; a noise floor beside what it is the floor of."""
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
