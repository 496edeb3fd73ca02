"""The attention block: q, k, v and the index projections behind one norm, then o_proj on the rounded heads' outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from m3quant.calibration.feedback.evidence import Trust, regularised
from m3quant.calibration.feedback.moments import MomentSum, halves
from m3quant.calibration.feedback.products import matmul
from m3quant.calibration.feedback.settings import FeedbackSettings
from m3quant.calibration.feedback.solve import Solver
from m3quant.calibration.feedback.targets import targets
from m3quant.calibration.folds import all_groups
from m3quant.calibration.head import Windows
from m3quant.calibration.layers import Layer
from m3quant.calibration.quantized_layer import StoredWeight
from m3quant.schemes import KEEP, Scheme

O_PROJ = "self_attn.o_proj.weight"


class AttentionQuantizer:
    def __init__(
        self, layer: Layer, schemes: Mapping[str, Scheme], x: Windows, x_source: Windows, settings: FeedbackSettings
    ) -> None:
        self.layer, self.spec, self.settings = layer, layer.spec, settings
        self.x, self.x_source = x, x_source
        self.readers = {n: schemes[n] for n in all_groups(self.spec)[0].readers if schemes.get(n, KEEP).quantizes}
        self.o_scheme = schemes.get(O_PROJ, KEEP)
        windows, self.length, _ = x.shape
        self.step = max(1, settings.batch_tokens // self.length)
        self.half = halves(windows * self.length, self.length, layer.device).view(windows, self.length)

    def run(self) -> tuple[dict[str, StoredWeight], torch.Tensor, torch.Tensor, dict[str, Any]]:
        """(weights, the quantized stream and the source stream after attention [T, H], log)."""
        log: dict[str, Any] = {"block": "attention", "weights": {}}
        source_mid = torch.cat([self._after(self._read(self.x_source, part)) for part in self._slices()])
        kept = {name: self.layer.weight(name) for name in (*self.readers, O_PROJ)}
        weights: dict[str, StoredWeight] = {}
        if self.readers:
            moments = self._input_moments()
            second, plain, cross, ridge = regularised([moments], self.trust["in"], None)
            for name, scheme in self.readers.items():
                weight = kept[name].float()[None]
                weights[name] = self._solve(name, weight, plain, second, matmul(weight, cross), ridge, scheme, log)
                self.layer.set_weight(name, weights[name].dequantized().to(kept[name].dtype))
        if self.o_scheme.quantizes:
            moments = self._output_moments(source_mid, kept[O_PROJ])
            second, plain, cross, ridge = regularised([moments], self.trust["out"], None)
            weight = kept[O_PROJ].float()[None]
            weights[O_PROJ] = self._solve(O_PROJ, weight, plain, second, cross, ridge, self.o_scheme, log)
            self.layer.set_weight(O_PROJ, weights[O_PROJ].dequantized().to(kept[O_PROJ].dtype))
        mid = torch.cat([self._after(self._read(self.x, part)) for part in self._slices()])
        for name, tensor in kept.items():
            self.layer.set_weight(name, tensor)
        return weights, mid.flatten(0, 1), source_mid.flatten(0, 1), log

    @property
    def trust(self) -> dict[str, Trust]:
        from m3quant.calibration.feedback.mlp import TRUST

        return {"in": TRUST["attention", "in"], "out": TRUST["attention", "out"]}

    def _solve(self, name, weight, plain, second, cross, ridge, scheme, log):  # type: ignore
        target, _ = targets(weight, cross, plain, ridge) if self.settings.source_targets else (weight, None)
        stored, loss, nearest, _ = Solver(target, second, scheme, self.settings).run()
        log["weights"][name] = [float(nearest[0]), float(loss[0])]
        return stored[0]

    def _slices(self) -> Iterator[slice]:
        for start in range(0, self.x.shape[0], self.step):
            yield slice(start, start + self.step)

    def _read(self, stream: Windows, part: slice) -> torch.Tensor:
        return stream.read(part, self.layer.device)

    def _after(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer.attention(self.layer.attention_input(x)).to(x.dtype)

    def _input_moments(self) -> Any:
        width = self.spec.hidden_size
        total = MomentSum(width, width, self.layer.device)
        for part in self._slices():
            h, given = (self.layer.attention_input(self._read(s, part)).flatten(0, 1) for s in (self.x, self.x_source))
            total.add(h, given.float() - h.float(), torch.ones(len(h), device=h.device), self.half[part].flatten())
        return total.total()

    def _output_moments(self, source_mid: torch.Tensor, weight: torch.Tensor) -> Any:
        total = MomentSum(weight.shape[1], weight.shape[0], self.layer.device)
        for part in self._slices():
            x = self._read(self.x, part)
            heads = self.layer.heads(self.layer.attention_input(x))
            base = x if self.settings.residual else self._read(self.x_source, part)
            error = (source_mid[part].float() - base.float() - self.layer.output(heads, weight).float()).flatten(0, 1)
            heads = heads.flatten(0, 1)
            total.add(heads, error, torch.ones(len(heads), device=heads.device), self.half[part].flatten())
        return total.total()
