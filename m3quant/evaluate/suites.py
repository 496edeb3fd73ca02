"""What a run measures: a YAML file that lists tasks by name, with their parameters.

    name: my-suite
    tasks:
      - task: perplexity-gptq
        window: 2048
      - task: divergence
        data: notes.txt

Every task takes `data` (see `texts.load_texts`) and `name`, for suites that have two of a kind. A task's factory takes
(tokenizer, config, params) and returns a `Task`; params is the pydantic model that its third argument is annotated with, or
the plain dict. Factories are imported when a suite uses them.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..checkpoint.bounded import read_yaml
from ..errors import EvaluationError
from ..families import family_of
from ..running.complaints import complaint, given, key_of
from .task import Task
from .texts import BUNDLED, load_texts

# task name -> "module under m3quant.evaluate:factory"
TASKS = {
    "perplexity-gptq": "perplexity:gptq",
    "perplexity-lm-eval": "perplexity:lm_eval",
    "perplexity-llama-cpp": "perplexity:llama_cpp",
    "divergence": "divergence:divergence",
    "position": "position:make",
    "needle": "needle:make",
    "ruler": "ruler:make",
}
# Tasks that are given running text itself, as `text`, `text_name` and `text_licence`; a suite names it by `data`, as for all.
_TEXT_TASKS = ("position", "needle", "ruler")
SUITES = Path(__file__).parent / "suites"


class TaskEntry(BaseModel):
    """One line of a suite: the task and its parameters."""

    model_config = ConfigDict(extra="allow")
    task: str

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Suite(BaseModel):
    """A suite file. beyond_context: whether lengths above the model's max_position_embeddings are refused, or left out with a note."""

    model_config = ConfigDict(extra="forbid")
    name: str
    description: str = ""
    beyond_context: Literal["refuse", "leave-out"] = "refuse"
    tasks: list[TaskEntry] = Field(min_length=1)


def suite_names() -> list[str]:
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def load_suite(spec: str) -> Suite:
    """A suite that ships with m3quant, or a file. Raises EvaluationError with the nearest valid name or key."""
    path = SUITES / f"{spec}.yaml" if spec in suite_names() else Path(spec)
    if not path.exists():
        near = _nearest(spec, suite_names())
        raise EvaluationError(f"no suite and no file '{spec}': did you mean --suite {near}?")
    document = read_yaml(path, "suite", error=EvaluationError)
    if not isinstance(document, Mapping):
        raise EvaluationError(f"suite {path} holds no mapping: it needs the keys 'name' and 'tasks'.")
    suite: Suite = _validated(Suite, document, f"suite {path}")
    for entry in suite.tasks:
        if entry.task not in TASKS:
            raise EvaluationError(
                f"suite {path}: no task '{entry.task}': did you mean '{_nearest(entry.task, TASKS)}'? Known: {', '.join(TASKS)}."
            )
    return suite


def make_tasks(
    suite: Suite, tokenizer: Any, config: dict[str, Any], data: str | None = None
) -> tuple[list[Task], list[str]]:
    """The suite's tasks, and notes on what was left out. data: in place of the text of every task. Raises EvaluationError."""
    tasks: list[Task] = []
    notes: list[str] = []
    limit = family_of(config).max_positions
    for entry in suite.tasks:
        params = entry.params
        if data is not None:
            params["data"] = data
        if suite.beyond_context == "leave-out" and limit is not None and not _fit(entry.task, params, limit, notes):
            continue
        if entry.task in _TEXT_TASKS:
            texts = load_texts(params.pop("data", BUNDLED), tokenizer)
            params |= {"text": texts.joined(), "text_name": texts.name, "text_licence": texts.licence}
        factory = _factory(entry.task)
        accepted = _params_model(factory)
        given = _validated(accepted, params, f"suite {suite.name}, task {entry.task}") if accepted else params
        tasks.append(factory(tokenizer, config, given))
    names = [task.name for task in tasks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise EvaluationError(f"suite {suite.name} has {repeated[0]} twice: give one of them another 'name'.")
    return tasks, notes


def _fit(task: str, params: dict[str, Any], limit: int, notes: list[str]) -> bool:
    """Take lengths beyond the model's context out of params, saying so; False if none is left."""
    lengths = params.get("lengths") or ([params["length"]] if "length" in params else [])
    if not isinstance(lengths, list) or not all(isinstance(length, int) for length in lengths):
        return True  # the task says what is wrong with them
    beyond = [length for length in lengths if length > limit]
    if beyond:
        shown = ", ".join(f"{length:,}" for length in beyond)
        notes.append(f"{_called(task, params)}: not run at {shown} tokens, beyond max_position_embeddings {limit:,}")
    if "lengths" in params:
        params["lengths"] = [length for length in lengths if length <= limit]
    return len(beyond) < len(lengths) or not lengths


def _called(task: str, params: Mapping[str, Any]) -> str:
    """What distinguishes an entry of a suite from others of its kind."""
    return str(params.get("name") or "_".join(filter(None, (task, params.get("variant")))))


def _factory(name: str) -> Callable[[Any, dict[str, Any], Any], Task]:
    module, function = TASKS[name].split(":")
    factory: Callable[[Any, dict[str, Any], Any], Task] = getattr(
        importlib.import_module(f"m3quant.evaluate.{module}"), function
    )
    return factory


def _params_model(factory: Callable[..., Any]) -> type[BaseModel] | None:
    kind = list(inspect.get_annotations(factory, eval_str=True).values())[2]
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _validated(model: type[BaseModel], document: Mapping[str, Any], where: str) -> Any:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        key = key_of(first)
        if first["type"] == "extra_forbidden":
            near = _nearest(str(first["loc"][-1]), model.model_fields)
            raise EvaluationError(f"{where} has an unknown key '{key}': did you mean '{near}'?") from None
        raise EvaluationError(complaint(f"{where}: key '{key}'", first) + f"{given(first)}.") from None


def _nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
