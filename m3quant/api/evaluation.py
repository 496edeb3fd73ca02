"""evaluate: perplexity, KL divergence from the source and long context, into eval.json and a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact.eval_record import EVAL_FILE, EvalRecord
from ..artifact.uploads import refuse_dropped
from ..errors import EvaluationError
from ..evaluate.choices import ACTIVATIONS, INDEX_DTYPES, KV_DTYPES
from ..evaluate.gate import Limit, broken, check_limits, parse_limits
from ..evaluate.suites import Suite, load_suite, make_tasks
from ..extras import need
from ..running import steps
from ..running.progress import ShowProgress, quietly
from ..running.words import size_of
from .arguments import check_count, check_file, check_place, check_size, check_word

if TYPE_CHECKING:
    from ..evaluate.evaluation import Settings
    from ..evaluate.models import Model
    from ..evaluate.task import Task
    from ..reports.comparison_html import Compared


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

    def check_on(self, root: str, config: dict[str, Any]) -> None:
        """The same with a checkpoint at hand: its tokenizer, and the texts and lengths that go with it."""
        from ..calibration.corpus import load_tokenizer

        make_tasks(self.parsed()[0], load_tokenizer(root), config, self.data)


@dataclass(frozen=True)
class Arithmetic:
    """How it is computed. states: where hidden states live (auto, device, host, disk). activations, kv_dtype, index_dtype: of the
    checkpoint, as `evaluate.choices` lists them; the source is never rounded. cache_disk: bytes that shards from the Hub may take on the
    disk at a time; None: what is free."""

    device: str = "auto"
    states: str = "auto"
    batch_tokens: int = 16384
    activations: str = ACTIVATIONS[0]
    kv_dtype: str = KV_DTYPES[0]
    index_dtype: str = INDEX_DTYPES[0]
    cache_disk: int | None = None

    @property
    def rounds_as_by_default(self) -> bool:
        return (self.activations, self.kv_dtype, self.index_dtype) == (ACTIVATIONS[0], KV_DTYPES[0], INDEX_DTYPES[0])

    def settings(self) -> Settings:
        from ..evaluate.evaluation import Settings

        return Settings(**asdict(self))


@dataclass(frozen=True)
class Evaluation:
    """What was measured. written: eval.json. page: for people. limits: as given; broken: a sentence for each that does not hold."""

    record: EvalRecord
    written: Path
    page: Path
    limits: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def _check_kinds(question: Question, how: Arithmetic) -> None:
    """Raise OptionError for the first argument that should be text, or a number, and is not."""
    check_word(suite=question.suite, data=question.data, limits=question.limits)
    given = asdict(how)
    check_count(batch_tokens=given.pop("batch_tokens"))
    del given["cache_disk"]
    check_word(**given)


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
    cache_disk: int | str | None = None,
    progress: ShowProgress = quietly,
) -> Evaluation:
    """Measure `ckpt` (a folder or Hub id; a source or an output), and its distance from `source`, one layer in memory at a time.

    suite, data, report, limits: as of `Question`; the others as of `Arithmetic`. Run again after an interruption: it continues.
    Raises M3QuantError subclasses for what cannot be measured, PackageMissing without torch.
    """
    check_file(report=report, source=source)
    check_size(cache_disk=cache_disk)
    need("eval", "m3quant eval")
    question = Question(suite, data, None if report is None else Path(report), limits)
    how = Arithmetic(device, states, batch_tokens, activations, kv_dtype, index_dtype, size_of(cache_disk))
    _check_kinds(question, how)
    check_place(ckpt=ckpt)
    return measure(ckpt, source, question, how, progress)


def measure(
    ckpt: str | Path,
    source: str | Path | None,
    question: Question,
    how: Arithmetic,
    progress: ShowProgress = quietly,
) -> Evaluation:
    """`evaluate` of what was asked as one question."""
    from ..calibration.corpus import load_tokenizer
    from ..evaluate.evaluation import evaluate as run
    from ..evaluate.models import open_model

    question.check(source is not None)
    suite, limits = question.parsed()
    checkpoint = open_model(ckpt)
    origin = open_model(source, "source") if source else None
    written, pages = (question.report, question.report) if question.report else default_report(checkpoint)
    with progress("eval") as shown:
        steps.step("texts and questions of the suite")
        tasks, notes = make_tasks(suite, load_tokenizer(checkpoint.folder), checkpoint.config, question.data)
        check_limits(limits, _kinds(tasks), origin is not None)
        for note in notes:
            shown.say(f"note: {note}")
        record = run(checkpoint, origin, tasks, suite.name, written, how.settings(), shown, notes)
    return _judged(record, written, pages, limits)


@dataclass(frozen=True)
class Comparison:
    """Several checkpoints measured alike. compared: with names that differ, and sizes. page: compare.html."""

    evaluations: list[Evaluation]
    compared: list[Compared]
    page: Path

    @property
    def broken(self) -> list[str]:
        """Limits that do not hold, with the checkpoint's name."""
        pairs = zip(self.compared, self.evaluations, strict=True)
        return [f"{one.name}: {sentence}" for one, found in pairs for sentence in found.broken]


def compare(
    ckpts: Sequence[str | Path],
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
    cache_disk: int | str | None = None,
    progress: ShowProgress = quietly,
) -> Comparison:
    """`evaluate` for several checkpoints of one model, and a page that shows them side by side.

    With a source all of them pass through in one pass, in which the source is read once; hidden states of all are held at the
    same time. Without one they are measured one after another. report: a folder for the page, with a folder for each checkpoint;
    without it each goes where `evaluate` writes, and the page into NAME-compared.
    """
    check_file(report=report, source=source)
    check_size(cache_disk=cache_disk)
    need("eval", "m3quant eval")
    question = Question(suite, data, None if report is None else Path(report), limits)
    how = Arithmetic(device, states, batch_tokens, activations, kv_dtype, index_dtype, size_of(cache_disk))
    _check_kinds(question, how)
    for ckpt in ckpts:
        check_place(ckpt=ckpt)
    return measure_all(ckpts, source, question, how, progress)


def measure_all(
    ckpts: Sequence[str | Path],
    source: str | Path | None,
    question: Question,
    how: Arithmetic,
    progress: ShowProgress = quietly,
) -> Comparison:
    """`compare` of what was asked as one question. Raises EvaluationError for fewer than two, or one that is given twice."""
    from ..calibration.corpus import load_tokenizer
    from ..evaluate.evaluation import evaluate_all
    from ..evaluate.models import open_model
    from ..reports.comparison_html import Compared, write_comparison

    names = _names([Path(ckpt) for ckpt in ckpts])
    question.check(source is not None)
    suite, limits = question.parsed()
    models = [open_model(ckpt, f"checkpoint-{number}") for number, ckpt in enumerate(ckpts, 1)]
    origin = open_model(source, "source") if source else None
    tasks, notes = make_tasks(suite, load_tokenizer(models[0].folder), models[0].config, question.data)
    check_limits(limits, _kinds(tasks), origin is not None)
    folder = question.report or Path(f"{(origin or models[0]).name}-compared")
    places = [
        (folder / name, folder / name) if question.report else default_report(model)
        for name, model in zip(names, models, strict=True)
    ]
    if origin is not None:
        settings = how.settings()
        with progress("eval") as shown:
            for note in notes:
                shown.say(f"note: {note}")
            written = [place for place, _ in places]
            records = evaluate_all(models, origin, tasks, suite.name, folder, written, settings, shown, notes)
    else:
        apart = [replace(question, report=written if question.report else None) for written, _ in places]
        found = zip(ckpts, apart, strict=True)
        records = [measure(one, None, asked, how, progress).record for one, asked in found]
    evaluations = [
        _judged(record, written, pages, limits) for record, (written, pages) in zip(records, places, strict=True)
    ]
    sizes = [model.reader.checkpoint.nbytes for model in models]
    compared = [Compared(*one) for one in zip(names, sizes, records, strict=True)]
    return Comparison(evaluations, compared, write_comparison(compared, folder))


def _names(folders: Sequence[Path]) -> list[str]:
    """A name of each folder that none of the others has."""
    if len(folders) < 2:
        raise EvaluationError("a comparison needs two checkpoints or more.")
    places = [folder.resolve() for folder in folders]
    if twice := [place for place, count in Counter(places).items() if count > 1]:
        raise EvaluationError(f"{twice[0]} is given twice: a comparison is of different checkpoints.")
    for parts in range(1, max(len(place.parts) for place in places) + 1):
        names = ["-".join(part.strip("/") for part in place.parts[-parts:]) for place in places]
        if len(set(names)) == len(names):
            return names
    raise EvaluationError(f"{places[0]} and the others have no names that differ: rename one of the folders.")


def ask_endpoint(
    ckpt: str | Path, url: str, question: Question, *, model: str | None = None, api_key_env: str | None = None
) -> Evaluation:
    """The suite's tasks through an OpenAI-compatible server of `ckpt` (a folder or Hub id), which gives the tokenizer.

    The record goes to question.report, or NAME-endpoint-eval: the checkpoint's own eval.json is of its weights.
    """
    from ..calibration.corpus import load_tokenizer
    from ..checkpoint import Checkpoint, make_folder
    from ..evaluate.endpoint import evaluate_endpoint
    from ..evaluate.evaluation import write_record
    from ..evaluate.haystack import Reach

    refuse_dropped(ckpt)
    suite, limits = question.parsed()
    checkpoint = Checkpoint.open(ckpt)
    tokenizer, config = load_tokenizer(checkpoint.files()), checkpoint.config
    tasks, notes = make_tasks(suite, tokenizer, config, question.data)
    check_limits(limits, _kinds(tasks), source=False)
    record = evaluate_endpoint(
        url, model, tasks, tokenizer, Reach.of(config), api_key_env=api_key_env, suite=suite.name
    )
    record.notes.extend(notes)
    written = question.report or Path(f"{checkpoint.name}-endpoint-eval")
    make_folder(written)
    write_record(record, written)
    return _judged(record, written, written, limits)


def default_report(checkpoint: Model) -> tuple[Path, Path]:
    """Folders of eval.json and of the page: next to the weights for an output of m3quant; nothing is written into a source."""
    from ..reports.conversion import FOLDER

    if checkpoint.manifest is not None and checkpoint.reader.checkpoint.local:
        return checkpoint.folder, checkpoint.folder / FOLDER
    apart = Path(f"{checkpoint.name}-eval")
    return apart, apart


def _kinds(tasks: Sequence[Task]) -> list[str]:
    return [task.kind for task in tasks]


def _judged(record: EvalRecord, written: Path, pages: Path, limits: list[Limit]) -> Evaluation:
    from ..reports.evaluation_html import write_report

    page = write_report(record, pages)
    return Evaluation(record, written / EVAL_FILE, page, [limit.text for limit in limits], broken(limits, record))
