"""The plan of a finished output, rebuilt from its own files, and the checks that read no weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..artifact.manifest import MANIFEST
from ..checkpoint import CONFIG_NAME, Checkpoint
from ..checkpoint.strict_json import described, shown
from ..engines.rules import lookup_problems
from ..errors import CheckpointError
from ..planning.engine_kept import kept_linears, kept_problems
from ..planning.plan import INDEX_FILE, RECIPE_FILE, Plan, unquantized
from ..planning.source_format import source_format


def structure_problems(
    output: Checkpoint, plan: Plan, manifest: Mapping[str, Any], source: Checkpoint | None
) -> Iterator[str]:
    """Everything wrong that headers and config.json can tell, one sentence each."""
    expected = {o.name: (o, unit.shard) for unit in plan.units for t in unit.tensors for o in t.outputs}
    for name, (planned, shard) in expected.items():
        info = output.tensors.get(name)
        if info is None:
            yield f"tensor '{name}' is missing: the plan puts it into {shard}"
        elif (info.dtype, info.shape) != (planned.dtype, planned.shape):
            yield f"{info.shard}: tensor '{name}' is {info.dtype} {list(info.shape)}, the plan says {planned.dtype} {list(planned.shape)}"
        elif info.shard != shard:
            yield f"tensor '{name}' is in {info.shard}, the plan puts it into {shard}"
    for name, info in output.tensors.items():
        if name not in expected:
            yield f"{info.shard}: tensor '{name}' is not in the plan: an engine may skip it without an error"
    # What the manifest does not list is neither hashed nor published.
    listed = {*manifest["shards"], *manifest["files"]}
    for name in (*(unit.shard for unit in plan.units), INDEX_FILE, RECIPE_FILE, CONFIG_NAME):
        if name not in listed:
            yield f"{MANIFEST} does not list {name}: convert again, because its bytes cannot be checked"
    yield from _config_problems(output, plan, source)
    if source is not None and manifest["source"]["fingerprint"] != source.fingerprint():
        yield f"the output was made from another source than {source.root}: its headers or config.json differ"
    if missing := [f for f in plan.copied_files if not (Path(output.root) / f).exists()]:
        yield f"{len(missing)} files of the source were not carried over, first {missing[0]}"


def _config_problems(output: Checkpoint, plan: Plan, source: Checkpoint | None) -> Iterator[str]:
    written = output.config.get("quantization_config")
    if written != plan.quantization:
        # Only the recipe's own is asked what an engine makes of it all: another one may be of any shape.
        difference = _difference(written, plan.quantization, "quantization_config")
        yield f"config.json: quantization_config is not the one that the recipe gives: {difference}"
    elif written and not plan.recipe.native:  # whose names make_plan has just looked up
        for problem in lookup_problems(plan.family, written, plan.modules):
            yield f"config.json: {problem}"
    if written and isinstance(written, Mapping):
        kept = kept_linears(plan.family, output.tensors.values(), plan.recipe.format)
        try:
            for problem in kept_problems(written, plan.family, kept):
                yield f"config.json: {problem}"
        except CheckpointError as error:
            yield f"config.json: {error}"
    if source is not None:
        theirs, ours = unquantized(source.config), unquantized(output.config)
        if changed := sorted(k for k in {*theirs, *ours} if theirs.get(k) != ours.get(k)):
            yield f"config.json differs from the source's in {', '.join(changed)}: only quantization_config may"


def _difference(written: Any, expected: Any, where: str) -> str:
    """The first place where two JSON values differ, and how."""
    if isinstance(written, Mapping) and isinstance(expected, Mapping):
        for key in sorted({*written, *expected}):
            if key not in written or key not in expected:
                return f"{where}.{shown(key)} is {'missing' if key in expected else 'too many'}"
            if written[key] != expected[key]:
                return _difference(written[key], expected[key], f"{where}.{key}")
    if isinstance(written, list) and isinstance(expected, list):
        if missing := next((item for item in expected if item not in written), None):
            return f"{where} lacks {described(missing)}"
        if extra := next((item for item in written if item not in expected), None):
            return f"{where} has {described(extra)}, which the recipe does not give"
        return f"{where} has another order"
    return f"{where} is {described(written)}, not {described(expected)}"


def check_same_kind(output: Checkpoint, source: Checkpoint) -> None:
    """Raise CheckpointError if the source given is quantized in a way that cannot be a source."""
    source_format(source).required_kind()
    if source.config.get("model_type") != output.config.get("model_type"):
        raise CheckpointError(
            f"{source.root} is a {source.config.get('model_type')}, {output.root} a {output.config.get('model_type')}: "
            "give the source that this output was made from."
        )
