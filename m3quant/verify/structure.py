"""The plan of a finished output, rebuilt from its own files, and the checks that read no weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import CONFIG_NAME, Checkpoint, sha256_file
from ..checkpoint.bounded import MANIFEST_BYTES, read_json, read_yaml
from ..checkpoint.links import require_regular
from ..checkpoint.strict_json import shown
from ..convert.journal import MANIFEST, unfinished
from ..engine_config import engine_problems
from ..errors import CheckpointError, M3QuantError, VerifyError
from ..headers import HeaderSource
from ..plan import INDEX_FILE, RECIPE_FILE, Plan, make_plan, unquantized
from ..recipe import Recipe, build_recipe
from ..source import FP8_BLOCK, PLAIN, source_kind


def require_converted(output: Path) -> None:
    """Raise CheckpointError if there is no such folder."""
    if not output.is_dir():
        raise CheckpointError(f"there is no folder {output}: give the output of m3quant convert.")


def read_manifest(output: Path) -> dict[str, Any]:
    """m3quant.json of an output. Raises VerifyError if the folder is unfinished or not ours."""
    path = output / MANIFEST
    if sentence := unfinished(output):
        raise VerifyError(sentence)
    if not path.exists():
        raise VerifyError(
            f"{output} has no {MANIFEST}: it was not written by m3quant convert, or the file was removed."
        )
    manifest = read_json(path, MANIFEST_BYTES, "It is damaged: convert again.", error=VerifyError)
    needed = ("source", "recipe", "shards", "files")
    if not all(isinstance(manifest.get(key), dict) for key in needed):
        raise VerifyError(
            f"{path} lacks one of {', '.join(needed)}: it is damaged or of another version; convert again."
        )
    if not all(isinstance(facts, dict) and {"size", "sha256"} <= facts.keys() for facts in manifest["shards"].values()):
        raise VerifyError(f"{path} lacks size or sha256 of a shard: it is damaged; convert again.")
    return manifest


def recorded_source(output: Checkpoint, manifest: Mapping[str, Any]) -> HeaderSource:
    """The source as the manifest recorded it: enough to plan again without the source's files."""
    recorded = manifest["source"]["tensors"]
    config = _source_config(output.config, {facts["kind"] for facts in recorded.values()})
    source = HeaderSource(output.root, config)
    for name, facts in recorded.items():
        source.add(name, facts["dtype"], tuple(facts["shape"]), facts["kind"], facts.get("scale"))
    return source


def _source_config(config: Mapping[str, Any], kinds: set[str]) -> dict[str, Any]:
    """The source's config.json: the output's, with the source's own quantization in place of ours."""
    source = unquantized(config)
    quantized = kinds - {PLAIN}
    if quantized:
        source["quantization_config"] = {"quant_method": "fp8" if FP8_BLOCK in quantized else "mxfp8"}
    return source


def output_plan(output: Checkpoint, manifest: Mapping[str, Any], source: Checkpoint | None) -> Plan:
    """What the output should hold. With a source, planned from it; else from the manifest's record of it.

    Raises VerifyError if the recipe beside the weights is not the one in the manifest.
    """
    path = Path(output.root) / RECIPE_FILE
    try:
        recipe: Recipe = build_recipe(read_yaml(path, "recipe", follow=False))
    except M3QuantError as error:
        raise VerifyError(f"{path} cannot be read as a recipe ({error}): convert again.") from None
    if recipe.model_dump() != manifest["recipe"]:
        raise VerifyError(
            f"{path} differs from the recipe recorded in {MANIFEST}: one of them was edited after the conversion."
        )
    return make_plan(source or recorded_source(output, manifest), recipe)


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
            yield f"{info.shard}: tensor '{name}' is not in the plan: an engine may skip it without a word"
    # What the manifest does not list is neither hashed nor published.
    listed = {*manifest["shards"], *manifest["files"]}
    for name in (*(unit.shard for unit in plan.units), INDEX_FILE, RECIPE_FILE, CONFIG_NAME):
        if name not in listed:
            yield f"{MANIFEST} does not list {name}: convert again, for its bytes cannot be told from others"
    yield from _config_problems(output, plan, source)
    if source is not None and manifest["source"]["fingerprint"] != source.fingerprint():
        yield f"the output was made from another source than {source.root}: its headers or config.json differ"
    if missing := [f for f in plan.copied_files if not (Path(output.root) / f).exists()]:
        yield f"{len(missing)} files of the source were not carried over, first {missing[0]}"


def _config_problems(output: Checkpoint, plan: Plan, source: Checkpoint | None) -> Iterator[str]:
    written = output.config.get("quantization_config")
    if written != plan.quantization:
        yield "config.json: quantization_config is not the one that the recipe gives"
    if written:
        for problem in engine_problems(plan.family, output.config, written, plan.modules):
            yield f"config.json: {problem}"
    if source is not None:
        theirs, ours = unquantized(source.config), unquantized(output.config)
        if changed := sorted(k for k in {*theirs, *ours} if theirs.get(k) != ours.get(k)):
            yield f"config.json differs from the source's in {', '.join(changed)}: only quantization_config may"


def hash_problems(output: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Shards, config, index, recipe and carried files whose bytes are not those that were written."""
    for shard, facts in manifest["shards"].items():
        path, problem = _listed(output, shard)
        if problem:
            yield problem
        elif path.stat().st_size != facts["size"]:
            yield f"{shard} has {path.stat().st_size} bytes, {facts['size']} were written"
        elif sha256_file(path) != facts["sha256"]:
            yield f"{shard}: sha256 differs from the one recorded when it was written: the file was changed or damaged"
    for name, digest in manifest["files"].items():
        path, problem = _listed(output, name)
        if problem:
            yield problem
        elif sha256_file(path) != digest:
            yield f"{name}: sha256 differs from the one recorded when it was written: the file was edited or damaged"


def _listed(output: Path, name: str) -> tuple[Path, str | None]:
    """The path of a file that the manifest lists, and what is wrong with it: missing, a link, or outside the folder."""
    if not (output / name).is_symlink() and not (output / name).exists():
        return output / name, f"{shown(name)} is missing"
    try:
        return require_regular(output, name, VerifyError), None
    except VerifyError as error:
        return output / name, str(error)


def check_same_kind(output: Checkpoint, source: Checkpoint) -> None:
    """Raise CheckpointError if the source given is quantized in a way that cannot be a source."""
    source_kind(source.config, source.root)
    if source.config.get("model_type") != output.config.get("model_type"):
        raise CheckpointError(
            f"{source.root} is a {source.config.get('model_type')}, {output.root} a {output.config.get('model_type')}: "
            "give the source that this output was made from."
        )
