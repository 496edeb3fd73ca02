"""Checkpoints whose tensors have the names of another tree than the release's: transformers' modules, a text-only copy, MLX. Torch-free.

Where every tensor stands for one of the release's, it is read under that name, and outputs are written with the release's
names, which engines look for. Other trees (all experts of a layer in one tensor) are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from ..checkpoint import Checkpoint
from ..families import Family
from .integer_kinds import QWEIGHT
from .source_layouts import COMPANIONS, PACKED

# What trees of other programs have and no release: experts in stacks, transformers' parents and indexer, MLX's switch.
_STACK = re.compile(r"\.experts\.(gate_up_proj|gate_proj|up_proj|down_proj|w13|w[123])(_|\.|$)|\.switch_mlp\.")
_PARENT = re.compile(r"\.mlp\.(experts|gate|shared_experts|e_score_correction_bias)(\.|$)|\.self_attn\.indexer\.")
_ELSEWHERE = re.compile(r"(?:\w+\.){0,4}layers\.\d+\.")
_LEAVES = ("weight", "bias", PACKED, QWEIGHT, *COMPANIONS)
_NO_DECODER = ("vision_tower.", "mtp.", "dspark.", "draft.")


def release_names(names: Collection[str], family: Family) -> dict[str, str]:
    """Stored name -> the release's, for tensors of another tree; {} where there are none, or where one of them has no single counterpart."""
    stored = {_module(name) for name in names}
    expected = {_module(name) for name in family.expected_tensors}
    if expected <= stored:
        return {}
    meanings: dict[str, set[str]] = {}
    for module in expected:
        for alias in _aliases(module, family):
            meanings.setdefault(alias, set()).add(module)
    found: dict[str, str] = {}
    for name in names:
        module = _module(name)
        if module in expected:
            continue
        meant = meanings.get(module, set())
        if len(meant) == 1:
            found[name] = next(iter(meant)) + name[len(module) :]
        elif meant or _is_foreign(name, family.body):
            return {}
    taken = set(names) - found.keys()
    return {} if len(set(found.values()) | taken) != len(names) else found


def read_as_release(checkpoint: Checkpoint, family: Family) -> str:
    """Give the tensors of another tree the release's names, where that is one to one; a note of it, or ''."""
    if names := release_names(checkpoint.tensors, family):
        checkpoint.rename(names)
    return checkpoint.renamed


def _module(name: str) -> str:
    """The module that a tensor belongs to; a parameter of a block itself, such as a router's bias, stands for its own."""
    module, _, leaf = name.rpartition(".")
    return module if leaf in _LEAVES else name


def _aliases(module: str, family: Family) -> Iterator[str]:
    """A module's names in other trees."""
    yield from (alias for alias in family.recipe_aliases(module) if alias != module)
    text = family.body.removesuffix("model.")  # what a text-only copy leaves out
    if text and module.startswith(text):
        yield module.removeprefix(text)


def other_tree(checkpoint: Checkpoint, family: Family) -> str:
    """A sentence where a checkpoint has no MLP under the release's names, and the names of another tree; or ''."""
    own = "routed_experts" if family.moe else "dense_mlp"
    if any(family.role(name).kind == own for name in checkpoint.tensors):
        return ""
    unknown = (name for name in checkpoint.tensors if family.role(name).kind == "unknown")
    foreign = [name for name in unknown if _is_foreign(name, family.body)]
    if not foreign:
        return ""
    name = next((name for name in foreign if _STACK.search(name)), foreign[0])
    stacked = ", with all experts of a layer in one tensor" if _STACK.search(name) else ""
    return (
        f"{checkpoint.root}: tensor '{name}' has a name of another tree (transformers' modules or another program's{stacked}), not one of "
        f"the release's, whose layers begin with '{family.layer_prefix(0)}': neither engines nor m3quant would find the weights. Load it "
        "with transformers 5 and save it with save_pretrained, which writes the release's names."
    )


def _is_foreign(name: str, root: str) -> bool:
    if ".mtp." in name or name.startswith(_NO_DECODER):
        return False
    if name.startswith(root):
        return bool(_STACK.search(name) or _PARENT.search(name))
    return _ELSEWHERE.match(name) is not None
