"""Exact folds: moving a per-channel scale from a norm, or from up's rows, into the linears that read it.

A norm's output divided by `s` is undone exactly when *every* reader's input columns are multiplied by `s`: the
quantized readers, and also those that are never quantized (an indexer or shared expert that is kept, the router).
The norm is stored on a coarse grid (BF16; for `1 + w` norms the grid of w, however small 1 + w
is), so the scale that takes effect is not the one asked for. `fold_norm` therefore stores the norm first and returns
what really took effect.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from m3quant.errors import PlanError
from m3quant.families.spec import INPUT_NORM as ATTENTION_NORM
from m3quant.families.spec import MLP_NORM, SILU, LayerSpec, always_on_names, expert_names
from m3quant.schemes import KEEP, Scheme


@dataclass(frozen=True)
class FoldGroup:
    """One norm and everything that reads its output, as names relative to the layer.

    readers: linears that a recipe may quantize. compensated: multiplied too, but never quantized (the router).
    """

    norm: str
    readers: tuple[str, ...]
    compensated: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "attention" if self.norm == ATTENTION_NORM else "mlp"


@dataclass(frozen=True)
class PairFold:
    """up (w3) divided by t per row, down (w2) multiplied by t per column. Exact only where the GLU is linear in up."""

    up: str
    down: str


def all_groups(spec: LayerSpec) -> tuple[FoldGroup, FoldGroup]:
    """The two norm folds of a layer, complete: every tensor that reads the norm's output is in the group."""
    attention = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"]
    if spec.sparse is not None:
        attention += ["self_attn.index_q_proj.weight", "self_attn.index_k_proj.weight"]
    always_on = always_on_names(spec)
    mlp = [name for gate, up, _ in expert_names(spec) for name in (gate, up)]
    mlp += always_on[:2] if always_on else ()
    router = (spec.moe.router_name,) if spec.moe else ()
    return FoldGroup(ATTENTION_NORM, tuple(attention)), FoldGroup(MLP_NORM, tuple(mlp), router)


def fold_groups(spec: LayerSpec, schemes: Mapping[str, Scheme]) -> list[FoldGroup]:
    """The groups worth a scale search: those with at least one integer-quantized reader.

    FP8 is a floating format whose error hardly depends on a column scale, so a group of FP8 or kept readers is left
    alone.
    """
    return [g for g in all_groups(spec) if any(schemes.get(name, KEEP).kind == "int" for name in g.readers)]


def pair_folds(spec: LayerSpec) -> list[PairFold]:
    """w3 -> w2 of every routed expert. Raises PlanError where the activation makes the fold inexact (see below)."""
    check_pair_fold(spec)
    return [PairFold(up, down) for _, up, down in expert_names(spec)]


def check_pair_fold(spec: LayerSpec) -> None:
    """Refuse up -> down under swigluoai: clamp(up) + beta is not linear, so u/t + 1 is not (u + 1)/t."""
    if spec.activation.kind != SILU:
        raise PlanError(
            f"layer {spec.index}: folding a scale from up (w3) into down (w2) is not exact under activation "
            f"'{spec.activation.kind}', which clamps up and adds {spec.activation.beta}; leave the pair fold off here."
        )


def fold_norm(weight: torch.Tensor, scale: torch.Tensor, one_plus: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide a norm by `scale` on the grid of its own dtype, and say which scale took effect.

    weight, scale: [K]. one_plus: the norm multiplies by 1 + w instead of w. Returns the norm to store, in
    weight's dtype, and `effective` float32 [K] = (1 + w) / (1 + w') or w / w', computed in float64 from the value
    really stored; every reader's columns are multiplied by it. Channels where the norm is zero before or after, or
    the stored value is not finite, are left as they were with effective 1.
    """
    old = weight.double()
    gain = old + 1 if one_plus else old
    wanted = gain / scale.double()
    stored = (wanted - 1 if one_plus else wanted).to(weight.dtype)
    stored_gain = stored.double() + 1 if one_plus else stored.double()
    effective = (gain / stored_gain).float()
    usable = (
        (gain != 0) & (stored_gain != 0) & torch.isfinite(stored_gain) & torch.isfinite(effective) & (effective != 0)
    )
    return torch.where(usable, stored, weight), torch.where(usable, effective, torch.ones_like(effective))


def scale_columns(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """weight [..., N, K] times scale [K] in float32 (float64 stays), back in the weight's dtype."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    return (wide * scale.to(wide.dtype)).to(weight.dtype)
