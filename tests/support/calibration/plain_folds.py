"""The plain reference of a fold: one layer's tensors folded, nothing quantized."""

from collections.abc import Iterable, Mapping

import torch

from m3quant.calibration.folds import FoldGroup, all_groups, fold_norm, pair_folds, scale_columns
from m3quant.calibration.spec import LayerSpec
from m3quant.errors import PlanError


def apply_folds(
    spec: LayerSpec,
    tensors: Mapping[str, torch.Tensor],
    norm_scales: Mapping[str, torch.Tensor],
    pair_scales: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Fold one layer's tensors without quantizing: the model must compute what it computed before.

    norm_scales: wanted scale [H] per norm name. pair_scales: t [I] per down-projection (w2) name. Returns a new dict
    with every tensor of the layer; changed ones keep their dtype (use float32 copies to test exactness).
    """
    out = dict(tensors)
    groups = {group.norm: group for group in all_groups(spec)}
    for norm, scale in norm_scales.items():
        out[norm], effective = fold_norm(tensors[norm], scale, spec.norm_one_plus)
        for name in _present(groups[norm], tensors):
            out[name] = scale_columns(out[name], effective)
    if pair_scales:
        pairs = {pair.down: pair for pair in pair_folds(spec)}
        for down, scale in pair_scales.items():
            up = pairs[down].up
            out[up] = (out[up].double() / scale.double()[:, None]).to(out[up].dtype)
            out[down] = scale_columns(out[down], scale)
    return out


def _present(group: FoldGroup, tensors: Mapping[str, torch.Tensor]) -> Iterable[str]:
    """The group's tensors. Raises PlanError if one is missing: folding without it would not be exact."""
    for name in (*group.readers, *group.compensated):
        if name not in tensors:
            raise PlanError(f"cannot fold {group.norm}: its reader {name} is missing, so the fold would not be exact.")
        yield name
