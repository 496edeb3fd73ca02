""".eval_results/*.yaml: figures of benchmarks that are registered on the Hub, measured by the publisher. Read, checked, shown.

m3quant measures none of them itself. Format and registration: https://huggingface.co/docs/hub/eval-results
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub

from ..checkpoint.bounded import read_yaml
from ..errors import PublishError
from .files import EVAL_RESULTS_FOLDER

REGISTRATION = "eval.yaml"  # at the top of a dataset that is a benchmark of the Hub


@dataclass(frozen=True)
class BenchmarkResult:
    """One figure: of which task of which dataset repo, and what is said of how it was measured."""

    dataset: str
    task: str
    value: str
    date: str
    source: str
    notes: str


def read_benchmarks(out: Path) -> list[BenchmarkResult]:
    """Entries of OUT/.eval_results/*.yaml in order, as huggingface_hub parses them. Raises PublishError for one that it would not take."""
    folder = out / EVAL_RESULTS_FOLDER
    paths = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []
    return [result for path in paths for result in _read(path)]


def registration_problems(results: Sequence[BenchmarkResult]) -> list[str]:
    """Sentences on datasets that are no benchmark of the Hub, where their figures would show nowhere. Asks the Hub."""
    problems = []
    for name in sorted({result.dataset for result in results}):
        try:
            info = huggingface_hub.HfApi().dataset_info(name, timeout=30)
        except huggingface_hub.errors.RepositoryNotFoundError:
            problems.append(f"{EVAL_RESULTS_FOLDER} names the dataset {name}, which the Hub does not have: correct it.")
            continue
        if not any(file.rfilename == REGISTRATION for file in info.siblings or []):
            problems.append(
                f"{EVAL_RESULTS_FOLDER} names {name}, which is no benchmark of the Hub (it has no {REGISTRATION}): take it out."
            )
    return problems


def _read(path: Path) -> list[BenchmarkResult]:
    parse: Any = getattr(huggingface_hub, "parse_eval_result_entries", None)
    if parse is None:
        raise PublishError(
            f"huggingface_hub {huggingface_hub.__version__} cannot read {path}: upgrade it, or move the folder away."
        )
    if path.suffix != ".yaml":
        raise PublishError(f"{path} is no .yaml file: the Hub reads only those in this folder; move it away.")
    try:
        document = read_yaml(path, "the file", error=PublishError, follow=False)
        entries = parse(document) if isinstance(document, list) and document else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PublishError(
            f"{path} is not in the Hub's format ({type(error).__name__}: {reason}): correct it."
        ) from None
    if not entries or len(entries) != len(document):
        raise PublishError(f"{path} holds no list of results in the Hub's format: correct it, or move it away.")
    return [
        BenchmarkResult(e.dataset_id, e.task_id, str(e.value), str(e.date or ""), e.source_url or "", e.notes or "")
        for e in entries
    ]
