"""Scale and range search of a layer's attention: q, k, v (and index projections) behind one norm, and o.

Candidates run through the layer's own attention, so a change of which blocks an indexer selects counts in the loss.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from m3quant.calibration.awq_settings import AwqSettings
from m3quant.calibration.folds import FoldGroup, all_groups, fold_norm
from m3quant.calibration.head import Windows
from m3quant.calibration.layers import O_PROJ, Layer
from m3quant.calibration.ranges import COARSE_FACTORS, FACTORS, fake_quantize, search_range, weighted_error
from m3quant.calibration.scales import candidate, ratios, weight_mean
from m3quant.calibration.search import BlockResult, best_ratio, choose, energy, range_log, require_finite, squared_error
from m3quant.families.spec import LayerSpec
from m3quant.quant.formats import round_trip
from m3quant.schemes import KEEP, Scheme


@dataclass
class _Variant:
    """One way to store the block's weights. effective [H]: the norm's scale; shrink: factors by weight name."""

    effective: torch.Tensor
    shrink: dict[str, torch.Tensor] = field(default_factory=dict)
    error_before: float = 0.0  # activation-weighted rounding error at full range
    error_after: float = 0.0


class AttentionSearch:
    """The attention search of one layer over the hidden states x that enter it in the quantized stream."""

    def __init__(
        self,
        layer: Layer,
        spec: LayerSpec,
        tensors: Mapping[str, torch.Tensor],
        schemes: Mapping[str, Scheme],
        x: Windows,
        settings: AwqSettings,
    ) -> None:
        self.layer, self.spec, self.tensors, self.x, self.settings = layer, spec, tensors, x, settings
        readers = all_groups(spec)[0].readers
        self.schemes = {n: schemes.get(n, KEEP) for n in (*readers, O_PROJ) if schemes.get(n, KEEP).kind == "int"}
        self.fp8 = {n: schemes[n] for n in (*readers, O_PROJ) if schemes.get(n, KEEP).kind == "fp8"}
        self.column: dict[str, torch.Tensor] = {}  # the fold that was kept, by reader
        self.readers = [name for name in readers if name in self.schemes]
        windows, length = x.shape[:2]
        self.step = max(1, settings.batch_tokens // length)
        cap = max(1, settings.attention_tokens // length)
        self.search, self.accept = settings.split(windows, cap, spec.index, purpose=0)

    def run(self, group: FoldGroup | None) -> BlockResult:
        """Keep the best of rounding to nearest, ranges, and folds with ranges; the layer is left rounded.

        Without an integer-quantized weight nothing is searched and the layer keeps its weights.
        """
        if not self.schemes:
            return BlockResult(log={"block": "attention", "groups": [], "chosen": "unquantized"})
        magnitude, moment, o_moment = self._moments()
        identity = torch.ones_like(moment)
        norm, effective, entry = None, identity, None
        if group is not None and self.settings.smooth:
            norm, effective, entry = self._search_norm(group, magnitude, moment, identity)

        variants = {"round_to_nearest": _Variant(identity)}
        if self.settings.range_search:
            variants["ranges"] = self._with_ranges(identity, moment, o_moment)
        if norm is not None:
            searched = self.settings.range_search
            variants["folds_and_ranges"] = (
                self._with_ranges(effective, moment, o_moment) if searched else _Variant(effective)
            )
        reference = self._outputs(self.accept)
        total = energy(reference)
        where = f"layer {self.spec.index}, attention block"
        errors = {}
        for name, variant in variants.items():
            self._put(self._rounded(variant.effective, variant.shrink))
            errors[name] = squared_error(self._outputs(self.accept), reference, where) / total
        kept = choose(errors)
        chosen, folded = variants[kept], kept == "folds_and_ranges"
        self._put(self._rounded(chosen.effective, chosen.shrink))

        log: dict[str, Any] = {"block": "attention", "groups": [], "block_error": errors, "chosen": kept}
        if entry is not None:
            log["groups"] = [entry | {"accepted": folded}]
        log["ranges"] = range_log(chosen.shrink.values(), chosen.error_before, chosen.error_after)
        result = BlockResult(shrink={name: shrink.cpu() for name, shrink in chosen.shrink.items()}, log=log)
        if folded and group is not None and norm is not None:
            result.fold(group, norm, effective)
            self.column = dict.fromkeys(group.readers, effective)
        return result

    def mlp_inputs(self) -> torch.Tensor:
        """The normed input [T, H] of the feed-forward block, with every attention weight as it will be stored.

        FP8 weights are rounded here, and what they read as an engine rounds it. Where readers of one norm are of both kinds,
        a fold divides what the engine rounds, and this rounds the undivided input: the stream itself makes no such error.
        """
        for name, scheme in self.fp8.items():
            folded = self.tensors[name].float() * self.column.get(name, 1.0)
            rounded = round_trip(folded, scheme, name=name) / self.column.get(name, 1.0)
            self.layer.set_weight(name, rounded.to(self.tensors[name].dtype))
        windows, length, hidden = self.x.shape
        h = torch.empty(windows, length, hidden, dtype=self.layer.dtype, device=self.layer.device)
        with self.layer.rounding({**self.schemes, **self.fp8}):
            for part in self._slices():
                x = self.x.read(part, self.layer.device)
                h[part] = self.layer.mlp_input(x + self.layer.attention(self.layer.attention_input(x)).to(x.dtype))
        return h.flatten(0, 1)

    def _slices(self) -> Iterator[slice]:
        for start in range(0, self.x.shape[0], self.step):
            yield slice(start, start + self.step)

    def _batches(self, windows: torch.Tensor) -> Iterator[torch.Tensor]:
        for part in torch.split(windows, self.step):
            yield torch.cat([self.x.read(slice(i, i + 1), self.layer.device) for i in part.tolist()])

    def _outputs(self, windows: torch.Tensor) -> torch.Tensor:
        """The attention block's output on these windows, before the residual is added: [s * L, H]."""
        outputs = [self.layer.attention(self.layer.attention_input(x)) for x in self._batches(windows)]
        return torch.cat(outputs).flatten(0, 1)

    def _moments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Over all windows, float32: mean |h| and h^2 of the normed input [H], mean a^2 of o's input [heads * dim]."""
        sums: list[torch.Tensor] = []
        count = 0
        for part in self._slices():
            h = self.layer.attention_input(self.x.read(part, self.layer.device))
            require_finite(h, self.spec.index, "the input of the attention block")
            context = self.layer.heads(h)
            require_finite(context, self.spec.index, "the input of o_proj")
            h, context = h.flatten(0, 1).float(), context.flatten(0, 1).float()
            parts = [t.sum(0, dtype=torch.float64) for t in (h.abs(), h.square(), context.square())]
            sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
            count += len(h)
        magnitude, moment, o_moment = ((total / count).float() for total in sums)
        return magnitude, moment, o_moment

    def _search_norm(
        self, group: FoldGroup, magnitude: torch.Tensor, moment: torch.Tensor, identity: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, dict[str, Any]]:
        """(norm to store, effective scale, log entry) of the best ratio, o left as it is; identity if none is better."""
        reference = self._outputs(self.search)
        w_mean = weight_mean((self.tensors[name], self.schemes[name]) for name in self.readers)
        norm = self.tensors[group.norm]

        def loss(effective: torch.Tensor) -> float:
            shrinks = (
                self._ranges(self.readers, effective, moment, COARSE_FACTORS) if self.settings.range_search else {}
            )
            self._put(self._rounded(effective, shrinks, self.readers))
            return squared_error(
                self._outputs(self.search), reference, f"layer {self.spec.index}, attention scale search"
            )

        scales = {r: candidate(magnitude, w_mean, r, self.settings.duo_scaling) for r in ratios(self.settings.n_grid)}
        options = ((ratio, *fold_norm(norm, scale, self.spec.norm_one_plus)) for ratio, scale in scales.items())
        found = best_ratio(group.name, options, loss, identity, self.settings.ranks)
        self._put({name: self.tensors[name] for name in self.readers})
        return found

    def _ranges(
        self, names: Iterable[str], effective: torch.Tensor, moment: torch.Tensor, factors: tuple[float, ...] = FACTORS
    ) -> dict[str, torch.Tensor]:
        """Range factors of the named readers, whose unfolded input has this second moment."""
        second, dtype = moment / effective.square(), self.settings.scale_dtype
        return {
            n: search_range(
                self._folded(n, effective), self.schemes[n], second, factors, dtype, self.settings.signed_scales
            )
            for n in names
        }

    def _with_ranges(self, effective: torch.Tensor, moment: torch.Tensor, o_moment: torch.Tensor) -> _Variant:
        """Search the range of every integer weight under this scale."""
        variant = _Variant(effective, self._ranges(self.readers, effective, moment))
        if O_PROJ in self.schemes:
            variant.shrink |= self._ranges([O_PROJ], torch.ones_like(o_moment), o_moment)
        for name, shrink in variant.shrink.items():
            second = o_moment if name == O_PROJ else moment / effective.square()
            weight, scheme, dtype = self._folded(name, effective), self.schemes[name], self.settings.scale_dtype
            full, chosen = (fake_quantize(weight, scheme, factor, dtype) for factor in (1.0, shrink))
            variant.error_before += float(weighted_error(weight, full, second, scheme).sum(dtype=torch.float64))
            variant.error_after += float(weighted_error(weight, chosen, second, scheme).sum(dtype=torch.float64))
        return variant

    def _folded(self, name: str, effective: torch.Tensor) -> torch.Tensor:
        weight = self.tensors[name].float()
        return weight if name == O_PROJ else weight * effective

    def _rounded(
        self, effective: torch.Tensor, shrinks: Mapping[str, torch.Tensor], names: list[str] | None = None
    ) -> dict[str, torch.Tensor]:
        """Rounded weights as they act on unfolded inputs, q(W s) / s, for `names` (default: every integer weight)."""
        out = {}
        for name in self.schemes if names is None else names:
            folded = self._folded(name, effective)
            rounded = fake_quantize(folded, self.schemes[name], shrinks.get(name, 1.0), self.settings.scale_dtype)
            out[name] = rounded if name == O_PROJ else rounded / effective
        return out

    def _put(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            self.layer.set_weight(name, weight)
