"""The tensors of a source that m3quant reads: plain, or quantized in one of `source_layouts.KINDS`, module by module. Torch-free.

Decides which tensors are weights and which are companions (scales), and whether they are those that config.json promises.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..checkpoint import Checkpoint, TensorInfo
from ..errors import CheckpointError
from ..families import family_of
from ..families.base import Family
from .integer_kinds import QWEIGHT
from .other_trees import other_tree, read_as_release
from .source_format import REMEDY, KeptModules, SourceFormat, source_format
from .source_integers import holds_integers, recognise_integers
from .source_layouts import COMPANIONS, PACKED, PLAIN, SourceTensor, recognise, words

FLOAT_DTYPES = ("BF16", "F16", "F32")
_RESTORE = "restore the release's config.json"


def source_tensors(checkpoint: Checkpoint, whole: bool = True) -> dict[str, SourceTensor]:
    """Every model tensor by its name in the model, companions paired with their codes (wherever the shard).

    whole: False for some layers of a release, whose config.json promises the others too.
    Raises CheckpointError for a layout that matches no formula, and where headers and config.json disagree on a module.
    """
    source = source_format(checkpoint)
    source.required_kind()
    family = family_of(checkpoint.config, f"{checkpoint.root}/config.json")
    if whole:
        family.check_promised(len(checkpoint.tensors))
        read_as_release(checkpoint, family)
    beside = _companions(checkpoint)
    statement = _Statement(checkpoint, source, family)
    out: dict[str, SourceTensor] = {}
    for name, info in checkpoint.tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf in COMPANIONS and stem in beside:
            continue
        if not _is_code(info, leaf):
            out[name] = SourceTensor(info)
            continue
        if not source.quantized:
            raise CheckpointError(
                f"{checkpoint.root}/{info.shard}: tensor '{name}' is {info.dtype} but config.json has no quantization_config: {_RESTORE}."
            )
        found = statement.recognise(info, stem, beside.get(stem, {}))
        statement.check(stem, found)
        if found.name in out:
            raise CheckpointError(
                f"{checkpoint.root}/{info.shard}: '{name}' and '{out[found.name].info.name}' are both the weight of '{stem}': keep one."
            )
        out[found.name] = found
    statement.check_named(out)
    return out


def _is_code(info: TensorInfo, leaf: str) -> bool:
    return leaf in (PACKED, QWEIGHT) or info.dtype.startswith(("F8", "F4")) or (leaf == "weight" and info.dtype == "U8")


def _companions(checkpoint: Checkpoint) -> dict[str, dict[str, TensorInfo]]:
    """Module -> leaf -> what is stored with its codes. Raises CheckpointError for a scale without codes."""
    infos = checkpoint.tensors
    beside: dict[str, dict[str, TensorInfo]] = {}
    for name, info in infos.items():
        stem, _, leaf = name.rpartition(".")
        if leaf not in COMPANIONS:
            continue
        weight = next(
            (infos[codes] for codes in (f"{stem}.{PACKED}", f"{stem}.{QWEIGHT}", f"{stem}.weight") if codes in infos),
            None,
        )
        if weight is None or not _is_code(weight, weight.name.rpartition(".")[2]):
            if (leaf.startswith("input_") and weight is not None) or (leaf == "scales" and weight is None):
                continue  # an activation's scale of an unquantized weight is passed through
            raise CheckpointError(
                f"{checkpoint.root}/{info.shard}: scale '{name}' has no quantized weight '{stem}.weight': the download is incomplete; fetch "
                "the missing shards again."
            )
        beside.setdefault(stem, {})[leaf] = info
    return beside


class _Statement:
    """What the source's config says of each module, compared with what the headers show."""

    def __init__(self, checkpoint: Checkpoint, source: SourceFormat, family: Family) -> None:
        self._checkpoint, self._source = checkpoint, source
        self._family = family if source.quantized else None
        plainly = [entry for entry in source.kept if not entry.startswith("re:")]
        self._kept = KeptModules(plainly, self._family, source.file) if self._family else None

    def _kinds(self, module: str) -> frozenset[str]:
        assert self._family is not None
        return self._source.kinds_of(self._family.recipe_aliases(module))

    def recognise(self, codes: TensorInfo, module: str, beside: Mapping[str, TensorInfo]) -> SourceTensor:
        """The weight of `module`, by its codes and companions, in one of the kinds that are stated where they alone do not tell."""
        kinds, root = self._kinds(module), self._checkpoint.root
        if holds_integers(codes):
            assert self._family is not None
            promised = self._family.expected_tensors.get(f"{module}.weight")
            return recognise_integers(root, codes, beside, kinds, promised.shape if promised else None)
        return recognise(root, codes, beside, next(iter(kinds)) if len(kinds) == 1 else PLAIN)

    def check(self, module: str, found: SourceTensor) -> None:
        """Raise CheckpointError where the module is stated to be another kind, or unquantized."""
        kinds = self._kinds(module)
        if self._kept is not None and found.name in self._kept:
            kinds = frozenset({PLAIN})
        if found.kind not in kinds:
            raise self._disagreement(found, kinds)

    def check_named(self, found: Mapping[str, SourceTensor]) -> None:
        """Raise CheckpointError where the config names a module with a kind, and the headers hold none, or an unquantized one."""
        if not self._source.stated.modules:
            return
        assert self._family is not None
        held = {alias: source for name, source in self._held(found) for alias in self._family.recipe_aliases(name)}
        for module, kind in self._source.stated.modules.items():
            source = held.get(module)
            if source is None:
                raise CheckpointError(
                    f"{self._source.file} says that '{module}' is {words(kind)}, but {self._checkpoint.root} holds no weight of that name: "
                    f"fetch the missing shards, or {_RESTORE}."
                )
            if source.kind == PLAIN:
                raise self._disagreement(source, frozenset({kind}))

    @staticmethod
    def _held(found: Mapping[str, SourceTensor]) -> Iterator[tuple[str, SourceTensor]]:
        for name, source in found.items():
            if name.endswith(".weight"):
                yield name.removesuffix(".weight"), source

    def _disagreement(self, found: SourceTensor, kinds: frozenset[str]) -> CheckpointError:
        stated = " or ".join(words(kind) for kind in sorted(kinds))
        return CheckpointError(
            f"{self._checkpoint.root}/{found.info.shard}: tensor '{found.info.name}' is {words(found.kind)} by its name, dtype and shapes, "
            f"but {self._source.file} says {stated}: one of the two is of another checkpoint. Fetch both again, or {_RESTORE}. {REMEDY}"
        )


def check_complete(checkpoint: Checkpoint, family: Family, tensors: Mapping[str, SourceTensor]) -> list[str]:
    """Compare with the tensors that config.json promises; returns notes. Raises CheckpointError naming what is missing or misshapen."""
    family.check_promised(len(checkpoint.tensors))
    expected = family.expected_tensors
    notes = []
    rounded: dict[tuple[str, str], list[str]] = {}  # (role, dtype) -> names
    optional = {role: [n for n in expected if family.role(n).kind == role] for role in family.optional_groups()}
    absent_groups = {role for role, names in optional.items() if names and not any(n in tensors for n in names)}
    missing = [n for n in expected if n not in tensors and family.role(n).kind not in absent_groups]
    if missing:
        if tree := other_tree(checkpoint, family):
            raise CheckpointError(tree)
        raise CheckpointError(
            f"{checkpoint.root} lacks {len(missing)} tensors that its config.json promises, first '{missing[0]}': "
            "fetch the missing shards, or restore the release's config.json."
        )
    for role in sorted(absent_groups):
        notes.append(f"the source has no {role} tensors although config.json describes them: a text-only copy")
    for name, want in expected.items():
        if name not in tensors:
            continue
        info, shape = tensors[name].info, tensors[name].shape
        if shape != want.shape:
            raise CheckpointError(
                f"{checkpoint.root}/{info.shard}: tensor '{info.name}' has shape {list(shape)}, but config.json implies "
                f"{list(want.shape)}: the weights and config.json are not of one model."
            )
        if tensors[name].kind == PLAIN and info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{checkpoint.root}/{info.shard}: tensor '{name}' is {info.dtype}: expected one of {', '.join(FLOAT_DTYPES)}."
            )
        if want.float32 and info.dtype != "F32":
            rounded.setdefault((family.role(name).kind, info.dtype), []).append(name)
    for (role, dtype), names in rounded.items():
        told = names[0] if len(names) == 1 else f"{len(names)} {role} tensors (first {names[0]})"
        notes.append(f"{told}: stored as {dtype}, in the official releases as F32; copied as stored")
    for name in tensors:
        if reason := family.unread_companion(name):
            raise CheckpointError(
                f"{checkpoint.root}/{tensors[name].info.shard}: {reason}, so that engines and m3quant would compute "
                "without it: restore the release's config.json, or take the tensor out if it is not meant."
            )
    return notes
