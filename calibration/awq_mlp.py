"""Scale and range search of a layer's feed-forward block: routed experts, shared expert, or a dense MLP.

One scale per input channel is shared by every reader of the norm, because the norm can be divided only once; w3 -> w2
may be scaled per expert where the GLU is linear in up. A candidate is evaluated as q(W s) / s on the unfolded input: the same numbers, and
the source's routing stays valid, since an exact fold does not change what the router reads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from m3quant.calibration.awq_settings import AwqSettings
from m3quant.calibration.experts import ExpertTokens
from m3quant.calibration.folds import FoldGroup, fold_norm, pair_folds
from m3quant.calibration.glu import Glu, GluBlock, Sample
from m3quant.calibration.ranges import COARSE_FACTORS
from m3quant.calibration.round_weight import round_weight
from m3quant.calibration.rounding import Rounder
from m3quant.calibration.scales import candidate, ratios, weight_mean
from m3quant.calibration.search import BlockResult, best_ratio, choose, energy, range_log, squared_error
from m3quant.families.spec import SILU, LayerSpec
from m3quant.running import steps
from m3quant.schemes import Scheme

_ROWS = 8192


@dataclass
class _Variant:
    """One way to store the block: its output on the acceptance sample, and what has to be stored to get it."""

    output: torch.Tensor
    shrink: dict[str, torch.Tensor] = field(default_factory=dict)
    pair: dict[str, torch.Tensor] = field(default_factory=dict)  # t per down name, accepted experts only
    error_before: float = 0.0
    error_after: float = 0.0


@dataclass
class _Part:
    """What ranks tell one another of a chunk. Of its weights only what they put out travels, an eighteenth of their bytes."""

    rows: torch.Tensor
    shrink: list[torch.Tensor | None]
    pair: torch.Tensor | None
    error_before: float
    error_after: float


class MlpSearch:
    """The search of one layer's feed-forward block over its normed input h [T, H] in the quantized stream."""

    def __init__(
        self,
        spec: LayerSpec,
        tensors: Mapping[str, torch.Tensor],
        schemes: Mapping[str, Scheme],
        h: torch.Tensor,
        assigned: ExpertTokens | None,
        settings: AwqSettings,
        stacks: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self.spec, self.tensors, self.settings = spec, tensors, settings
        self.block = GluBlock(spec, tensors, schemes, h, assigned, stacks)
        self.search, self.accept = settings.split(len(h), settings.search_tokens, spec.index, purpose=1)
        self.magnitude, self.moment = channel_means(h)
        self.identity = torch.ones_like(self.moment)
        self._passes = self._passed = 0

    def _tell(self) -> None:
        """One more of the passes over all units is done: of a candidate of the norm's search, or of a variant."""
        self._passed += 1
        steps.part(self._passed, self._passes)

    def run(self, group: FoldGroup | None) -> BlockResult:
        """Keep the best of rounding to nearest, ranges, and folds with ranges. group: the norm fold to try, if any."""
        norm, effective, entry = None, self.identity, None
        self._passes = 3 + (self.settings.n_grid + 1 if group is not None and self.settings.smooth else 0)
        if group is not None and self.settings.smooth:
            norm, effective, entry = self._search_norm(group)
        pairs = self.settings.smooth and self._pairs_possible()
        sample = self.block.sample(self.accept)
        reference = self.block.output(sample, quantized=True)
        total = energy(reference + self.block.output(sample, quantized=False))

        variants = {"round_to_nearest": self._variant(sample, self.identity, ranges=False, pair=False)}
        if self.settings.range_search:
            variants["ranges"] = self._variant(sample, self.identity, ranges=True, pair=False)
        if pairs or norm is not None:
            variants["folds_and_ranges"] = self._variant(sample, effective, self.settings.range_search, pairs)
        where = f"layer {self.spec.index}, feed-forward block"
        errors = {name: squared_error(v.output, reference, where) / total for name, v in variants.items()}
        kept = choose(errors)
        chosen, folded = variants[kept], kept == "folds_and_ranges"

        log: dict[str, Any] = {"block": "mlp", "groups": [], "block_error": errors, "chosen": kept}
        if entry is not None:
            log["groups"] = [entry | {"accepted": folded and norm is not None}]
        if pairs:
            log["pair"] = {"experts": len(self.block.units), "accepted": len(chosen.pair)}
        log["ranges"] = range_log(chosen.shrink.values(), chosen.error_before, chosen.error_after)
        result = BlockResult(shrink=chosen.shrink, log=log)
        if folded and group is not None and norm is not None:
            result.fold(group, norm, effective)
        up_of = {unit.names[2]: unit.names[1] for unit in self.block.units}
        for down, t in chosen.pair.items():
            result.column[down] = result.row[up_of[down]] = t
        return result

    def _search_norm(self, group: FoldGroup) -> tuple[torch.Tensor | None, torch.Tensor, dict[str, Any]]:
        """(norm to store, effective scale, log entry) of the best ratio on the search sample, or of identity."""
        sample = self.block.sample(self.search)
        reference = self.block.output(sample, quantized=True)
        w_mean = weight_mean(self._readers())
        norm = self.tensors[group.norm].to(self.moment.device)

        def loss(effective: torch.Tensor) -> float:
            output = self.block.output(sample, self._round_readers(effective), quantized=True)
            self._tell()
            return squared_error(output, reference, f"layer {self.spec.index}, feed-forward scale search")

        scales = {
            r: candidate(self.magnitude, w_mean, r, self.settings.duo_scaling) for r in ratios(self.settings.n_grid)
        }
        options = ((ratio, *fold_norm(norm, scale, self.spec.norm_one_plus)) for ratio, scale in scales.items())
        return best_ratio(group.name, options, loss, self.identity, self.settings.ranks)

    def _readers(self) -> list[tuple[torch.Tensor, Scheme]]:
        return [
            (self.tensors[name], scheme)
            for unit in self.block.units
            for name, scheme in zip(unit.names[:2], unit.schemes[:2], strict=True)
            if scheme.kind == "int"
        ]

    def _round_readers(self, effective: torch.Tensor) -> Callable[[list[int], Glu], Glu]:
        """Replace gate and up by what rounding (with coarse ranges) makes of them under the scale, but not down."""
        dtype = self.settings.scale_dtype
        moment = self.moment / effective.square()

        def rounded(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
            if scheme.kind != "int":
                return weight
            second = moment if self.settings.range_search else None
            return round_weight(
                weight, scheme, effective, moment=second, factors=COARSE_FACTORS, scale_dtype=dtype,
                signed=self.settings.signed_scales, errors=False,
            ).acting  # fmt: skip

        def change(indices: list[int], weights: Glu) -> Glu:
            gate_scheme, up_scheme, _ = self.block.units[indices[0]].schemes
            return Glu(rounded(weights.gate, gate_scheme), rounded(weights.up, up_scheme), weights.down)

        return change

    def _pairs_possible(self) -> bool:
        """w3 -> w2 is exact and worth a search: a plain GLU and integer down-projections in every routed expert."""
        if self.spec.activation.kind != SILU or not pair_folds(self.spec):
            return False
        return all(unit.schemes[2].kind == "int" for unit in self.block.units)

    def _variant(self, sample: Sample, effective: torch.Tensor, ranges: bool, pair: bool) -> _Variant:
        """Round the block one chunk of units at a time, computing its output on the sample along the way."""
        variant, output = _Variant(sample.h), self.block.collect(sample, quantized=True)
        rounder = Rounder(self.block, self.settings, effective, self.moment, ranges, pair)
        chunks = self.block.chunks(quantized=True)

        def part(chunk: tuple[list[int], Glu]) -> _Part:
            rounded = rounder(*chunk)
            rows = output.rows(chunk[0], rounded.weights)
            return _Part(rows, rounded.shrink, rounded.pair, rounded.error_before, rounded.error_after)

        for (indices, _), rounded in self.settings.ranks.each(part, chunks):
            output.add(indices, rounded.rows)
            variant.error_before += rounded.error_before
            variant.error_after += rounded.error_after
            for slot, index in enumerate(indices):
                names = self.block.units[index].names
                for name, shrink in zip(names, rounded.shrink, strict=True):
                    if shrink is not None:
                        variant.shrink[name] = shrink[slot]
            if rounded.pair is not None:
                pairs = rounded.pair.cpu()
                for index, t in zip(indices, pairs, strict=True):
                    if bool((t != 1).any()):
                        variant.pair[self.block.units[index].names[2]] = t
        variant.output = output.total()
        self._tell()
        return variant


def channel_means(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean |h| and mean h^2 per channel over [T, H], accumulated in float64 -> two [H] float32."""
    magnitude = torch.zeros(h.shape[-1], dtype=torch.float64, device=h.device)
    moment = torch.zeros_like(magnitude)
    for part in torch.split(h, _ROWS):
        magnitude += part.float().abs().sum(0, dtype=torch.float64)
        moment += part.float().square().sum(0, dtype=torch.float64)
    return (magnitude / len(h)).float(), (moment / len(h)).float()
