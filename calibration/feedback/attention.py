"""The attention block: q, k, v and the index projections behind one norm, then o_proj on the rounded heads' outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from m3quant.calibration.feedback.evidence import HEADS, NORMED, Rule
from m3quant.calibration.feedback.fit import Fitted, block_log, fit
from m3quant.calibration.feedback.heldout import Readers, joined_by_scheme
from m3quant.calibration.feedback.moments import Moments, MomentSum, Segment, boundary, halves_of
from m3quant.calibration.feedback.settings import FeedbackSettings
from m3quant.calibration.folds import all_groups
from m3quant.calibration.head import Windows
from m3quant.calibration.joined import batches, joined, rows_at
from m3quant.calibration.layers import O_PROJ, Layer
from m3quant.calibration.quantized_layer import StoredWeight
from m3quant.quant.activations import round_activations
from m3quant.schemes import KEEP, Activations, Scheme


class AttentionQuantizer:
    """One layer's attention over the hidden states that enter it: x in the quantized stream, x_source in the source's."""

    def __init__(
        self, layer: Layer, schemes: Mapping[str, Scheme], x: Windows, x_source: Windows, settings: FeedbackSettings
    ) -> None:
        self.layer, self.spec, self.settings = layer, layer.spec, settings
        self.x, self.x_source = x, x_source
        self.readers = {n: schemes[n] for n in all_groups(self.spec)[0].readers if schemes.get(n, KEEP).quantizes}
        self.o_scheme = schemes.get(O_PROJ, KEEP)
        self.kept = {name: layer.weight(name) for name in (*self.readers, O_PROJ)}
        windows, length, _ = x.shape
        self.step = max(1, settings.batch_tokens // length)
        self.second_half = boundary(windows * length, length)
        self.fitted: dict[str, Fitted] = {}

    def run(self) -> tuple[dict[str, StoredWeight], torch.Tensor, torch.Tensor, dict[str, Any]]:
        """(weights by name, the quantized stream and the source's after attention [T, H], log). The layer stays as it was."""
        source_mid = torch.cat([self._after(self._read(self.x_source, part)).flatten(0, 1) for part in self._slices()])
        schemes = {**self.readers, O_PROJ: self.o_scheme}
        try:
            for activations, readers in self._by_activations().items():
                self._fit(self._input_moments(activations), readers, NORMED, inputs=True)
            with self.layer.rounding(schemes):
                if self.o_scheme.quantizes:
                    self._fit(self._output_moments(source_mid), {O_PROJ: self.o_scheme}, HEADS, inputs=False)
                mid = torch.cat([self._after(self._read(self.x, part)).flatten(0, 1) for part in self._slices()])
        finally:
            for name, tensor in self.kept.items():
                self.layer.set_weight(name, tensor)
        weights = {name: fitted.stored[0] for name, fitted in self.fitted.items()}
        verdicts = {name: fitted.verdicts[0] for name, fitted in self.fitted.items()}
        log = block_log("attention", verdicts)
        return weights, mid, source_mid, log

    def _fit(self, moments: Moments, schemes: Mapping[str, Scheme], rule: Rule, inputs: bool) -> None:
        """Quantize these weights and put them into the layer as an engine computes with them."""
        sets = joined_by_scheme({name: (scheme, len(self.kept[name])) for name, scheme in schemes.items()})
        groups = [
            Readers.of([self.kept[name].float()[None] for name in names], schemes[names[0]], inputs) for names in sets
        ]
        for names, readers in zip(sets, groups, strict=True):
            for name, fitted in zip(names, fit(moments, readers, rule, None, self.settings), strict=True):
                self.fitted[name] = fitted
                self.layer.set_weight(name, fitted.stored.dequantized()[0].to(self.kept[name].dtype))

    def _by_activations(self) -> dict[Activations | None, dict[str, Scheme]]:
        """The readers by how they round what they read: each kind has its own moments."""
        kinds: dict[Activations | None, dict[str, Scheme]] = {}
        for name, scheme in self.readers.items():
            kinds.setdefault(scheme.activations, {})[name] = scheme
        return kinds

    def _slices(self) -> Iterator[slice]:
        yield from batches(self.x.shape[0], self.step, self.x.groups)

    def _halves(self, part: slice) -> list[Segment]:
        """Which of these windows' tokens belong to which half."""
        length = self.x.shape[1]
        return halves_of(part.start * length, part.stop * length, self.second_half)

    def _read(self, stream: Windows, part: slice) -> torch.Tensor:
        """The hidden states of these rows as windows: [windows, tokens of one, H]."""
        return joined(stream.read(part, self.layer.device), rows_at(self.x.groups, part.start))

    def _after(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer.attention(self.layer.attention_input(x)).to(x.dtype)

    def _input_moments(self, activations: Activations | None) -> Moments:
        """Of what q, k, v and the index projections read, rounded so; the cross moment is of the inputs."""
        width = self.spec.hidden_size
        total = MomentSum(1, width, width, self.layer.device)
        for part in self._slices():
            read = self.layer.attention_input(self._read(self.x, part)).flatten(0, 1).float()
            given, h = read, round_activations(read, activations)
            if self.settings.source_targets:
                given = self.layer.attention_input(self._read(self.x_source, part)).flatten(0, 1).float()
            total.add(h, given - h, torch.ones(len(h), device=h.device), self._halves(part))
        return total.total()

    def _output_moments(self, source_mid: torch.Tensor) -> Moments:
        """Of what o_proj reads under the rounded readers; the cross moment is of the outputs."""
        weight = self.kept[O_PROJ]
        total = MomentSum(1, weight.shape[1], weight.shape[0], self.layer.device)
        for part in self._slices():
            x = self._read(self.x, part)
            heads = self.layer.heads(self.layer.attention_input(x))
            short = torch.zeros_like(x, dtype=torch.float32)
            if self.settings.source_targets or self.settings.residual:
                # With the residual: what the whole stream lacks after attention; without: what the block's output does.
                base = x if self.settings.residual else self._read(self.x_source, part)
                after = source_mid[part.start * self.x.shape[1] : part.stop * self.x.shape[1]].view(x.shape)
                short = after.float() - base.float() - self.layer.output(heads, weight).float()
            heads = self.layer.read_by(O_PROJ, heads).flatten(0, 1)
            ones = torch.ones(len(heads), device=heads.device)
            total.add(heads, short.flatten(0, 1), ones, self._halves(part))
        return total.total()
