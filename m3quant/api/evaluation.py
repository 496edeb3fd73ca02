"""evaluate: perplexity, KL divergence from the source and long context, into eval.json and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact.eval_record import EVAL_FILE, EvalRecord
from ..evaluate.choices import ACTIVATIONS, INDEX_DTYPES, KV_DTYPES
from ..evaluate.gate import Limit, broken, check_limits, parse_limits
from ..evaluate.suites import Suite, load_suite, make_tasks
from ..extras import need
from ..publish.pull import local_copy
from ..running.progress import ShowProgress, quietly

if TYPE_CHECKING:
    from ..evaluate.models import Model
    from ..evaluate.task import Task


@dataclass(frozen=True)
class Question:
    """What is measured and where it is written: a suite (quick, full or a file), text instead of its own, a folder (None: beside an
    output's weights), limits (kld=0.05,ppl=+2%)."""

    suite: str = "quick"
    data: str | None = None
    report: Path | None = None
    limits: str | None = None

    def parsed(self) -> tuple[Suite, list[Limit]]:
        """The suite and the limits. Raises EvaluationError for what is wrong in either."""
        return load_suite(self.suite), parse_limits(self.limits) if self.limits is not None else []

    def check(self, source: bool) -> None:
        """Raise EvaluationError for what can be wrong with it before there is a checkpoint."""
        suite, limits = self.parsed()
        check_limits(limits, [entry.task for entry in suite.tasks], source)


@dataclass(frozen=True)
class Arithmetic:
    """How it is computed. states: where hidden states live (auto, device, host, disk). activations, kv_dtype, index_dtype: of the
    checkpoint, as `evaluate.choices` lists them; the source is never rounded."""

    device: str = "auto"
    states: str = "auto"
    batch_tokens: int = 16384
    activations: str = ACTIVATIONS[0]
    kv_dtype: str = KV_DTYPES[0]
    index_dtype: str = INDEX_DTYPES[0]

    @property
    def rounds_as_by_default(self) -> bool:
        return (self.activations, self.kv_dtype, self.index_dtype) == (ACTIVATIONS[0], KV_DTYPES[0], INDEX_DTYPES[0])


@dataclass(frozen=True)
class Evaluation:
    """What was measured. written: eval.json. page: for people. limits: as given; broken: a sentence for each that does not hold."""

    record: EvalRecord
    written: Path
    page: Path
    limits: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def evaluate(
    ckpt: str | Path,
    source: str | Path | None = None,
    *,
    suite: str = "quick",
    data: str | None = None,
    report: str | Path | None = None,
    limits: str | None = None,
    device: str = "auto",
    states: str = "auto",
    batch_tokens: int = 16384,
    activations: str = ACTIVATIONS[0],
    kv_dtype: str = KV_DTYPES[0],
    index_dtype: str = INDEX_DTYPES[0],
    progress: ShowProgress = quietly,
) -> Evaluation:
    """Measure `ckpt` (a folder or Hub id; a source or an output), and its distance from `source`, one layer in memory at a time.

    suite, data, report, limits: as of `Question`; the others as of `Arithmetic`. Run again after an interruption: it continues.
    Raises M3QuantError subclasses for what cannot be measured, PackageMissing without torch.
    """
    need("eval", "m3quant eval")
    question = Question(suite, data, None if report is None else Path(report), limits)
    how = Arithmetic(device, states, batch_tokens, activations, kv_dtype, index_dtype)
    with progress("pull") as shown:
        folder, origin = local_copy(ckpt, shown), local_copy(source, shown) if source is not None else None
    return measure(folder, origin, question, how, progress)


def measure(
    folder: Path, source: Path | None, question: Question, how: Arithmetic, progress: ShowProgress = quietly
) -> Evaluation:
    """`evaluate` for checkpoints that are on this machine."""
    from ..calibration.corpus import load_tokenizer
    from ..evaluate.evaluation import Settings
    from ..evaluate.evaluation import evaluate as run
    from ..evaluate.models import open_model

    suite, limits = question.parsed()
    checkpoint = open_model(folder)
    origin = open_model(source, "source") if source else None
    tasks, notes = make_tasks(suite, load_tokenizer(checkpoint.folder), checkpoint.config, question.data)
    check_limits(limits, _kinds(tasks), origin is not None)
    written, pages = (question.report, question.report) if question.report else default_report(checkpoint)
    settings = Settings(how.device, how.states, how.batch_tokens, how.activations, how.kv_dtype, how.index_dtype)
    with progress("eval") as shown:
        for note in notes:
            shown.say(f"note: {note}")
        record = run(checkpoint, origin, tasks, suite.name, written, settings, shown, notes)
    return _judged(record, written, pages, limits)


def ask_endpoint(
    folder: Path, url: str, question: Question, *, model: str | None = None, api_key_env: str | None = None
) -> Evaluation:
    """The suite's tasks through an OpenAI-compatible server of the checkpoint in `folder`, which gives the tokenizer.

    The record goes to question.report, or NAME-endpoint-eval: the checkpoint's own eval.json is of its weights.
    """
    from ..calibration.corpus import load_tokenizer
    from ..checkpoint import Checkpoint, make_folder
    from ..evaluate.endpoint import evaluate_endpoint
    from ..evaluate.evaluation import write_record
    from ..evaluate.haystack import Reach

    suite, limits = question.parsed()
    tokenizer = load_tokenizer(folder)
    config = Checkpoint.open(folder).config
    tasks, notes = make_tasks(suite, tokenizer, config, question.data)
    check_limits(limits, _kinds(tasks), source=False)
    record = evaluate_endpoint(
        url, model, tasks, tokenizer, Reach.of(config), api_key_env=api_key_env, suite=suite.name
    )
    record.notes.extend(notes)
    written = question.report or Path(f"{folder.resolve().name}-endpoint-eval")
    make_folder(written)
    write_record(record, written)
    return _judged(record, written, written, limits)


def default_report(checkpoint: Model) -> tuple[Path, Path]:
    """Folders of eval.json and of the page: beside the weights for an output of ours; a source is not written into."""
    from ..reports.conversion import FOLDER

    if checkpoint.manifest is not None:
        return checkpoint.folder, checkpoint.folder / FOLDER
    apart = Path(f"{checkpoint.folder.resolve().name}-eval")
    return apart, apart


def _kinds(tasks: Sequence[Task]) -> list[str]:
    return [task.kind for task in tasks]


def _judged(record: EvalRecord, written: Path, pages: Path, limits: list[Limit]) -> Evaluation:
    from ..reports.evaluation_html import write_report

    page = write_report(record, pages)
    return Evaluation(record, written / EVAL_FILE, page, [limit.text for limit in limits], broken(limits, record))
