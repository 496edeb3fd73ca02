"""Modules that no recipe touches (router, head, vision, multi-token prediction, unknown), in `quantization_config`.

An engine that builds one of them as a Linear layer asks the config under its own name; if a target claims it, the engine looks for
packed weights that are not there. So each is listed, under its name on disk, the engine's and transformers'. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from ..checkpoint import TensorInfo
from ..checkpoint.name_list import NameList
from ..checkpoint.patterns import Allowance
from ..errors import CheckpointError
from ..families import QUANTIZABLE, Family, Role

PASSED_THROUGH = ("mtp", "unknown")  # roles copied byte for byte, in whatever dtype the source has them
_NO_LINEAR = ("embedding", "norm")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_SAID = 20  # problems of one kind that are listed
_MTP = re.compile(r"(?:.*\.)?mtp\.")


def kept_linears(family: Family, tensors: Iterable[TensorInfo], fmt: str) -> list[tuple[str, Role]]:
    """Modules among stored tensors that may be Linear layers and have no scheme of the recipe's, with their roles (the layer's number
    too for layers past the last).

    fmt: the output's format. In `fp8` a module copied with its FP8 block scales is what the config says of every other one.
    """
    stored = list(tensors)
    scaled = (
        {t.name.removesuffix("_scale_inv") for t in stored if t.name.endswith(".weight_scale_inv")}
        if fmt == "fp8"
        else set()
    )
    found = []
    for tensor in stored:
        if len(tensor.shape) < 2 or not tensor.name.endswith(".weight") or tensor.name in scaled:
            continue
        role = family.role(tensor.name)
        if (
            role.kind == "mtp"
            and tensor.name.startswith(f"{family.body}layers.")
            and (number := _LAYER.search(tensor.name))
        ):
            role = Role("mtp", int(number[1]))
        if fmt == "fp8" and role.kind == "unknown" and role.layer is not None and ".experts." in tensor.name:
            continue  # an entry inside a layer's list of experts would take all of them out (vLLM's is_layer_skipped); no family needs it
        if role.kind not in QUANTIZABLE and role.kind not in _NO_LINEAR:
            found.append((tensor.name.removesuffix(".weight"), role))
    return found


def module_names(family: Family, module: str) -> tuple[str, ...]:
    """A module's names: on disk, in vLLM, in transformers. Without the one under which vLLM looks up a whole list of experts."""
    names = dict.fromkeys((module, *family.engine_names(module), *family.recipe_aliases(module)))
    return tuple(name for name in names if not name.endswith(".experts"))


def add_kept(
    config: dict[str, Any], family: Family, kept: Iterable[tuple[str, Role]], mixed: Collection[str] = ()
) -> None:
    """Add to `config` whatever its ignore list lacks for the modules `kept`: numbered layers and `mtp.` by pattern, others by name.

    mixed: roles that are kept in some layers and quantized in others.
    """
    method = config["quant_method"]
    entries: list[str] = config["ignore" if method == "compressed-tensors" else "modules_to_not_convert"]
    kept = list(kept)
    if method != "fp8":
        numbers = sorted({role.layer for _, role in kept if role.kind == "mtp" and role.layer is not None})
        named = any(role.kind == "mtp" and _MTP.match(module) for module, role in kept)
        if method == "compressed-tensors":
            entries += [rf"re:.*\.layers\.({'|'.join(map(str, numbers))})\..*"] if numbers else []
            entries += [r"re:(.*\.)?mtp\..*"] if named else []
        else:
            entries += [f".layers.{number}." for number in numbers] + (["mtp."] if named else [])
    listed, added = IgnoreList(config), dict.fromkeys(entries)
    for module, role in kept:
        for name in module_names(family, module):
            if name in listed:
                continue
            if (
                method == "fp8" and role.kind == "mtp" and ".experts." in name
            ):  # looked up under the name of the list of experts
                entry = f"{name.partition('.experts.')[0]}.experts"
            elif method == "compressed-tensors" and role.kind not in (*PASSED_THROUGH, *mixed) and _LAYER.search(name):
                # A role that is kept everywhere has the same name in every layer: one pattern.
                before, after = (re.escape(part) for part in _LAYER.split(name, maxsplit=1)[::2])
                entry = rf"re:{before}\.layers\.\d+\.{after}$"
            else:
                entry = name
            added[entry] = None
    entries[:] = added


class IgnoreList:
    """The modules that a quantization_config leaves alone, by the rule of its method: `name in IgnoreList(config)`.

    Of any shape, and with anybody's patterns: raises CheckpointError for one that is none, and beyond the bounds of `NameList`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.method = config.get("quant_method")
        key = "ignore" if self.method == "compressed-tensors" else "modules_to_not_convert"
        listed = config.get(key) or config.get("ignored_layers")
        entries = [entry for entry in listed if isinstance(entry, str)] if isinstance(listed, list) else []
        allowance = Allowance(f"quantization_config.{key}", "Convert again.", CheckpointError)
        self._listed = NameList(entries, allowance, regexes=self.method == "compressed-tensors")

    def __contains__(self, name: str) -> bool:
        listed = self._listed
        if listed.names(name):
            return True
        if self.method == "compressed-tensors":
            return False
        if self.method == "awq":
            return listed.has_piece(name)
        # One entry may cover the list of experts; the releases write leaves such as "gate", which transformers looks for in a
        # name and whose modules vLLM builds without a quantization config.
        parent, experts, _ = name.rpartition(".experts.")
        return name.rpartition(".")[2] in listed.exact or (bool(experts) and f"{parent}.experts" in listed.exact)


def kept_problems(config: Mapping[str, Any], family: Family, kept: Iterable[tuple[str, Role]]) -> Iterator[str]:
    """Modules stored without a scheme that an engine would take for quantized, one sentence each; the first few."""
    listed, said = IgnoreList(config), 0
    for module, _ in kept:
        wrong = next((name for name in module_names(family, module) if name not in listed), None)
        if wrong is None:
            continue
        yield (
            f"{module} is stored unquantized, but quantization_config does not leave {wrong} alone: an engine that builds it would look "
            "for quantized weights. Convert again."
        )
        said += 1
        if said == _SAID:
            return
