"""Checkpoints whose tensors have the names of another tree than the release's: transformers' modules, a text-only copy, MLX. Torch-free."""

from __future__ import annotations

import re

from ..checkpoint import Checkpoint
from ..families import Family

# What trees of other programs have and no release: experts in stacks, transformers' parents and indexer, MLX's switch.
_STACK = re.compile(r"\.experts\.(gate_up_proj|gate_proj|up_proj|down_proj|w13|w[123])(_|\.|$)|\.switch_mlp\.")
_PARENT = re.compile(r"\.mlp\.(experts|gate|shared_experts|e_score_correction_bias)(\.|$)|\.self_attn\.indexer\.")
_ELSEWHERE = re.compile(r"(?:\w+\.){0,4}layers\.\d+\.")
_NO_DECODER = ("vision_tower.", "mtp.", "dspark.", "draft.")


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
