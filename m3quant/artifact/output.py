"""A finished output folder read back: its manifest, its plan, and whether its bytes are those that were written."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import CONFIG_NAME, Checkpoint, sha256_file
from ..checkpoint.bounded import CONFIG_BYTES, read_bounded, read_yaml
from ..checkpoint.links import require_regular
from ..checkpoint.strict_json import parse_object, shown
from ..errors import CheckpointError, M3QuantError, VerifyError
from ..planning.headers import HeaderSource
from ..planning.plan import RECIPE_FILE, Plan, make_plan, unquantized
from ..planning.source_layouts import FP8_BLOCK, MX_GROUP, PLAIN
from ..recipe.recipe import Recipe, build_recipe
from ..running import steps
from ..schemes import FP8_BLOCK as BLOCK
from .journal import unfinished
from .manifest import MANIFEST, Manifest, load_manifest
from .uploads import refuse_dropped


def require_converted(output: Path) -> None:
    """Raise CheckpointError if there is no such folder."""
    if not output.is_dir():
        raise CheckpointError(f"there is no folder {output}: give the output of m3quant convert.")


def read_manifest(output: Path) -> dict[str, Any]:
    """m3quant.json of an output, as plain values that `Manifest` describes. Raises CheckpointError if the folder is unfinished or
    not ours, VerifyError if the file is damaged."""
    path = output / MANIFEST
    if sentence := unfinished(output):
        raise CheckpointError(sentence)
    if not path.exists():
        raise CheckpointError(
            f"{output} has no {MANIFEST}: it was not written by m3quant convert, or the file was removed."
        )
    try:
        return load_manifest(path, Manifest).to_json()
    except ValueError as error:
        raise VerifyError(f"{error}: convert again.") from None


def read_config(output: Path) -> dict[str, Any]:
    """config.json of an output. Raises CheckpointError."""
    path = output / CONFIG_NAME
    return parse_object(read_bounded(path, CONFIG_BYTES), str(path), "Convert again.", constants=True)


def recorded_source(folder: Path, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> HeaderSource:
    """The source as the manifest recorded it: enough to plan again without the source's files. config: the output's."""
    recorded = manifest["source"]["tensors"]
    kinds = {facts["kind"] for facts in recorded.values()}
    source = HeaderSource(str(folder), _source_config(config, kinds, manifest["source"].get("quantization")))
    for name, facts in recorded.items():
        if facts.get("parts"):
            source.add_parts(name, {leaf: (dtype, tuple(shape)) for leaf, (dtype, shape) in facts["parts"].items()})
        else:
            source.add(name, facts["dtype"], tuple(facts["shape"]), facts["kind"], facts.get("scale"))
    return source


def _source_config(config: Mapping[str, Any], kinds: set[str], section: Mapping[str, Any] | None) -> dict[str, Any]:
    """The source's config.json: the output's, with the source's own quantization in place of the output's. section: as recorded; older outputs
    have none, and were made of FP8 in blocks or MXFP8."""
    source = unquantized(config)
    quantized = kinds - {PLAIN}
    if section:
        source["quantization_config"] = dict(section)
    elif quantized:
        block = FP8_BLOCK in quantized
        source["quantization_config"] = {
            "quant_method": "fp8" if block else "mxfp8",
            "weight_block_size": [BLOCK, BLOCK] if block else [1, MX_GROUP],
        }
    return source


def output_plan(output: Checkpoint, manifest: Mapping[str, Any], source: Checkpoint | None) -> Plan:
    """What the output should hold. With a source, planned from it; else from the manifest's record of it.

    Raises VerifyError if the recipe next to the weights is not the one in the manifest.
    """
    return plan_in(output.files([RECIPE_FILE]), output.config, manifest, source)


def plan_in(
    folder: Path, config: Mapping[str, Any], manifest: Mapping[str, Any], source: Checkpoint | None = None
) -> Plan:
    """`output_plan` of an output of which no more than its folder and its config.json is known."""
    path = folder / RECIPE_FILE
    try:
        recipe: Recipe = build_recipe(read_yaml(path, "recipe", follow=False))
    except M3QuantError as error:
        raise VerifyError(f"{path} cannot be read as a recipe ({error}): convert again.") from None
    try:
        recorded = build_recipe(manifest["recipe"])
    except M3QuantError as error:
        raise VerifyError(f"{MANIFEST} holds no recipe that can be read ({error}): convert again.") from None
    if recipe != recorded:
        raise VerifyError(
            f"{path} differs from the recipe recorded in {MANIFEST}: one of them was edited after the conversion."
        )
    return make_plan(source or recorded_source(folder, config, manifest), recipe)


def require_output(out: Path) -> None:
    """Raise CheckpointError where `out` is no finished output of m3quant convert or lacks shards that it had, VerifyError where its
    manifest is damaged."""
    require_converted(out)
    refuse_dropped(out)
    read_manifest(out)


def hash_problems(output: Path, manifest: Mapping[str, Any], but: Container[str] = ()) -> Iterator[str]:
    """Shards, config, index, recipe and carried files whose bytes are not those that were written. but: shards to leave out."""
    for number, (shard, facts) in enumerate(manifest["shards"].items()):
        steps.part(number, len(manifest["shards"]))
        if shard in but:
            continue
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
    path = output / name
    if not path.is_symlink() and not path.exists():
        return path, f"{shown(name)} is missing"
    try:
        return require_regular(output, name, VerifyError), None
    except VerifyError as error:
        return path, str(error)
