"""verify from end to end: every check runs, and every problem is listed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifact.output import hash_problems, output_plan, read_manifest
from ..artifact.reread import recorded_digests, stored_infos
from ..artifact.uploads import refuse_dropped
from ..checkpoint import Checkpoint
from ..checkpoint.streaming import no_shards, remote_budget, streamed
from ..errors import OptionError
from ..extras import need
from ..planning.config_models import library_version, model_problems
from ..planning.plan import Plan
from ..planning.streaming import UNIT, unit_steps
from ..running import steps
from ..running.progress import Progress, Silent
from ..running.stopping import StopFlag
from ..running.words import human_bytes
from .same_source import other_source_problems
from .stored import unit_stored_problems
from .structure import check_same_kind, structure_problems
from .tensor_error import TensorError, worst

Report = Callable[[str], None]
# In the output, hidden, and gone when verify ends.
CACHE = ".m3quant-verify"


@dataclass
class Check:
    """One check: its name, what it looked at, and what it found. It holds if `problems` is empty."""

    name: str
    looked_at: str
    problems: list[str] = field(default_factory=list)


@dataclass
class Verification:
    """Everything that verify found."""

    output: str
    checks: list[Check]
    errors: dict[str, TensorError]
    engine: dict[str, Any] | None = None
    transformers: dict[str, Any] | None = None

    @property
    def holds(self) -> bool:
        return all(not check.problems for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        def number(value: float) -> float | None:
            return value if math.isfinite(value) else None

        return {
            "output": self.output,
            "holds": self.holds,
            "checks": [{"name": c.name, "looked_at": c.looked_at, "problems": c.problems} for c in self.checks],
            "worst": [{"name": e.name, "scheme": e.scheme, "sqnr_db": number(e.sqnr_db)} for e in worst(self.errors)],
            "sqnr_db_by_scheme": sqnr_by_scheme(self.errors),
            "engine": self.engine,
            "transformers": self.transformers,
        }


def sqnr_by_scheme(errors: dict[str, TensorError]) -> dict[str, dict[str, float]]:
    """Scheme -> least and mean SQNR in dB of its tensors, exact ones left out."""
    out: dict[str, dict[str, float]] = {}
    for scheme in sorted({e.scheme for e in errors.values()}):
        values = [e.sqnr_db for e in errors.values() if e.scheme == scheme and math.isfinite(e.sqnr_db)]
        if values:
            out[scheme] = {"tensors": len(values), "least": min(values), "mean": sum(values) / len(values)}
    return out


def verify(
    output: Path, source: str | None, say: Report, cache_disk: int | None = None, progress: Progress | None = None
) -> tuple[Verification, Plan]:
    """Check an output without an engine. Raises VerifyError or CheckpointError only if there is nothing to check.

    source: a folder, a Hub id or a prefix of an object store, whose shards are fetched one after the other. cache_disk: bytes that they may take in `output` at a
    time; progress: told of their bytes.
    Only a comparison with a source needs torch: PackageMissing without it, before anything is read.
    """
    if source is not None:
        need("convert", "Comparing every tensor with its source")
    refuse_dropped(output)
    manifest = read_manifest(output)
    converted = Checkpoint.open(output)
    origin = Checkpoint.open(source) if source else None
    if origin is not None:
        check_same_kind(converted, origin)
    if cache_disk is not None and (origin is None or origin.remote is None):
        raise OptionError(no_shards(source or str(output)))
    plan = output_plan(converted, manifest, origin)
    checks: list[Check] = []
    errors: dict[str, TensorError] = {}

    def run(name: str, looked_at: str, problems: Callable[[], Any]) -> None:
        say(f"{name} ...")
        steps.step(name)
        checks.append(Check(name, looked_at, list(problems())))

    tensors = sum(len(u.entries) for u in plan.units)
    run(
        "structure",
        f"{tensors} tensors, config.json, engine names",
        lambda: structure_problems(converted, plan, manifest, origin),
    )
    run("hashes", f"{len(manifest['shards'])} shards", lambda: hash_problems(output, manifest))
    written = converted.config.get("quantization_config")
    if isinstance(written, dict) and written.get("quant_method") == "compressed-tensors":
        if release := library_version():
            looked_at = f"quantization_config, by the models of compressed-tensors {release}"
            run("config models", looked_at, lambda: model_problems(written))
        else:
            say(
                "note: compressed-tensors is not installed: quantization_config was not read by its models (pip install compressed-tensors)"
            )
    sound = not checks[0].problems
    if sound:
        run(
            "values",
            f"{tensors} tensors: finite, no zero scale",
            lambda: _each_unit(plan, lambda u: unit_stored_problems(u, converted)),
        )
    if origin is not None and sound:
        origin.record_reads()
        if origin.remote is not None:
            size = human_bytes(sum(unit.bytes_in for unit in plan.units))
            say(f"{origin.root} is on {origin.remote.kind}: {size} are read shard by shard, none is kept")

        def compare() -> list[str]:
            place = output / CACHE, cache_disk, progress or Silent()
            errors.update(_errors(plan, origin, converted, manifest, place))
            return error_problems(plan, errors)

        run("against the source", f"every tensor of {origin.root}, folds undone", compare)
        read = f"what {origin.root} holds, against what was read of it when the output was made"
        if "read" not in manifest["source"]:
            say(
                "note: the output was made before m3quant recorded what it read: weights were compared by their values alone"
            )
        run("the same source", read, lambda: other_source_problems(plan, manifest, origin))
    return Verification(str(output), checks, errors), plan


def _errors(
    plan: Plan,
    origin: Checkpoint,
    converted: Checkpoint,
    manifest: Mapping[str, Any],
    place: tuple[Path, int | None, Progress],
) -> dict[str, TensorError]:
    """Tensor -> its error against the source. place: of shards from the Hub, bytes that they may take, who is told of them."""
    from ..calibration.rounding_errors import ROUNDING_ERROR
    from ..quant.reading import ConvertedReader, SourceReader
    from .values import unit_errors

    reader = SourceReader(origin, plan.sources)
    dense = ConvertedReader(converted, {t.name: t for t in plan.tensors}, plan.recipe.format)
    recorded = manifest.get(ROUNDING_ERROR)
    errors: dict[str, TensorError] = {}
    folder, cache_disk, progress = place
    work = unit_steps(plan)
    budget = remote_budget(origin, work, folder, cache_disk)
    with streamed(origin, work, folder, budget, StopFlag(), progress, label="fetch"):
        for number, unit in enumerate(plan.units, 1):
            errors |= {e.name: e for e in unit_errors(plan, unit, reader, dense, recorded)}
            recorded_digests(origin, stored_infos(unit))  # what no error needed is read now, while it is here
            origin.finish_step((UNIT, unit.index))
            steps.part(number, len(plan.units))
    return errors


def _each_unit(plan: Plan, function: Callable[[Any], Any]) -> list[str]:
    problems = []
    for number, unit in enumerate(plan.units, 1):
        problems += function(unit)
        steps.part(number, len(plan.units))
    return problems


def error_problems(plan: Plan, errors: dict[str, TensorError]) -> list[str]:
    """Sentences for tensors that are wrong: too far from the source, or off it in a way that no rounding explains."""
    problems = []
    for planned in plan.tensors:
        error = errors.get(planned.name)
        if error is None:
            continue
        if error.wrong:
            problems.append(
                f"tensor '{error.name}' ({error.scheme}) differs from the source: SQNR {error.sqnr_db:.1f} dB"
            )
        elif error.defect:
            problems.append(f"tensor '{error.name}' {error.defect}")
    return problems
