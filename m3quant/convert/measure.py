"""What each scheme would cost, measured while the layers pass once: the content of `sensitivity.json`.

Per layer, role and candidate, the role's weights are quantized with error feedback on the calibration windows, and the
layer's output on the held-out windows is compared with the source's. What such an error means at the end of the model
is measured too: held-out windows of the source stream are given one candidate's error of one layer and role (a probe),
pass with it through all later layers of the source, and end in a KL divergence. Other candidates of the layer and role
follow from their error. A few whole recipes (the pilots) run along, each with a quantized stream of its own as in a
conversion; `planning.sensitivity` says what they are for.

Errors and probes are computed in float32 on any device: what BF16 adds, a changed choice of experts above all, is as
large as the error of 8 bits, and would be counted once for every layer and role. Pilots are computed as in a conversion.

One pass reads every weight once. Memory holds what a calibrated conversion does, and besides one copy of the layer with
changed weights, the pilots' streams, and PROBE_BYTES of probes at most.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from .. import __version__
from ..calibration.boundary import WindowView
from ..calibration.corpus import Windows
from ..calibration.head import Head, compare_heads
from ..calibration.head import Windows as States
from ..calibration.layers import Layer, LayerTensors, layer_spec
from ..calibration.quantized_layer import QuantizedLayer
from ..calibration.quantizers import layer_quantizer
from ..calibration.ranks import ALONE
from ..calibration.spec import LayerSpec
from ..calibration.stream import HiddenStates, Prefetcher, embed_source, read_head, read_layer, run_layer
from ..checkpoint.streaming import reading_words, remote_budget, streamed
from ..errors import CalibrationError
from ..planning.choices import role_of
from ..planning.fit import Fitting
from ..planning.kl_estimate import kl_of_error, others_left
from ..planning.layout import scale_dtype
from ..planning.sensitivity import (
    Candidate,
    LayerSensitivity,
    Pilot,
    Probe,
    Sensitivity,
    TextIdentity,
    source_identity,
)
from ..planning.streaming import EMBEDDINGS, UNIT, layer_steps
from ..planning.unit import Unit
from ..quant.formats import TORCH_DTYPES
from ..quant.reading import SourceReader
from ..running import steps
from ..running.device import device_name, pick_device
from ..running.progress import Progress
from ..running.stopping import StopFlag, stop_on_signals
from ..schemes import Scheme, parse_scheme
from .device_layers import DeviceLoader
from .job import out_of_memory
from .measure_plan import pilot_recipes, probe_windows, probes_of
from .measure_state import MeasureState, PilotState, ProbeState, SavedState
from .words import layer_words


@dataclass
class MeasureSettings:
    """How to measure, as opposed to what."""

    device: str = "cpu"
    save_seconds: float = 600.0  # between two saved states, if there is a folder for them
    micro_batch_tokens: int = 16384
    strict_coverage: bool = False
    shards: Path = Path("m3quant-shards")  # folder for shards of a checkpoint that is elsewhere, while it is measured
    cache_disk: int | None = None  # bytes that they may take at a time; None: what is free


def measure(
    fitting: Fitting,
    windows: Windows,
    text_sha256: str,
    settings: MeasureSettings,
    progress: Progress,
    state_folder: Path | None = None,
) -> Sensitivity:
    """Read the whole checkpoint once and return what every candidate of `fitting` costs.

    windows: those of fitting.data, calibration before held-out. text_sha256: of the documents they are from.
    state_folder: where the state is saved now and then, so that the same call continues after a kill; removed at the end. Raises CalibrationError without held-out windows or
    for weights and activations that are not finite, CheckpointError where the source cannot be read, and InterruptedRun.
    """
    device = pick_device(settings.device)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        try:
            return Measuring(fitting, windows, settings, device, stop, progress).run(text_sha256, state_folder)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(device, error) from None


class Measuring:
    """One measuring pass; `measure` runs it."""

    def __init__(
        self,
        fitting: Fitting,
        windows: Windows,
        settings: MeasureSettings,
        device: torch.device,
        stop: StopFlag,
        progress: Progress,
    ) -> None:
        self.fitting, self.plan, self.settings = fitting, fitting.base, settings
        self.device, self.stop, self.progress, self.windows = device, stop, progress, windows
        self.recipe = fitting.recipe(fitting.least)
        self.tokens = torch.from_numpy(windows.ids)
        self.calibration = self.recipe.data.windows
        if self.calibration >= len(self.tokens):
            raise CalibrationError("measuring needs held-out windows: set heldout_windows to at least 1.")
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.micro_batch = max(1, settings.micro_batch_tokens // self.tokens.shape[1])
        self.reader = SourceReader(self.plan.checkpoint, self.plan.sources)
        scale = TORCH_DTYPES[scale_dtype(Scheme("int", 4), self.recipe.format)]
        self._quantizer = layer_quantizer(self.recipe, scale, settings.strict_coverage, ALONE)

    def run(self, text_sha256: str, state_folder: Path | None = None) -> Sensitivity:
        saved = SavedState(state_folder, self._identity(text_sha256)) if state_folder else None
        self.progress.start(sum(unit.bytes_in for unit in self.plan.units[1:]), 0, "measure")
        checkpoint, settings = self.plan.checkpoint, self.settings
        work = layer_steps(self.plan, saved.layers() if saved else 0)
        budget = remote_budget(checkpoint, work, settings.shards, settings.cache_disk)
        with streamed(checkpoint, work, settings.shards, budget, self.stop, self.progress, keep=True):
            steps.step("hidden states that enter the first layer")
            self.state = MeasureState(
                self._embedded(self.tokens, self.dtype),
                self._embedded(self.tokens[self.calibration :], torch.float32),
                [
                    PilotState(own, self._embedded(self.tokens, self.dtype), others)
                    for own, others in pilot_recipes(self.fitting)
                ],
            )
            exact = self.state.exact
            self.probe_windows = probe_windows(self.fitting, len(exact), exact.nbytes // len(exact))
            checkpoint.finish_step(EMBEDDINGS)
            found = self._run(text_sha256, saved)
        if saved:
            saved.remove()
        return found

    def _run(self, text_sha256: str, saved: SavedState | None) -> Sensitivity:
        units, state = self.plan.units[1:], self.state
        self.progress.say(
            f"measuring: {len(units)} layers, {sum(len(n) for n in self.fitting.choices.by_role.values())} candidates a layer "
            f"at most, {self.calibration} windows to calibrate on and {len(self.tokens) - self.calibration} held out"
        )
        if saved and saved.restore(state, self.device):
            self.progress.say(f"continuing after layer {len(state.errors) - 1}, where the state was saved last")
            self.progress.advance(sum(unit.bytes_in for unit in units[: len(state.errors)]))
        todo, last = units[len(state.errors) :], time.monotonic()
        with contextlib.ExitStack() as stack:
            layers = self._layers(stack, todo)
            stack.enter_context(self.plan.checkpoint.abandoned_on_error())
            for unit in todo:
                steps.step(layer_words(self.plan, unit, reading_words(self.plan.checkpoint)))
                self._measure_layer(unit, next(layers))
                self.plan.checkpoint.finish_step((UNIT, unit.index))
                if saved and unit is not units[-1] and time.monotonic() - last >= self.settings.save_seconds:
                    steps.step(layer_words(self.plan, unit, "saving the state"))
                    saved.save(state)
                    last = time.monotonic()
        return self._result(text_sha256)

    def _identity(self, text_sha256: str) -> dict[str, Any]:
        """Everything that the numbers depend on."""
        return {
            "m3quant": __version__,
            "torch": torch.__version__,
            "device": device_name(self.device),
            "source": self.plan.checkpoint.fingerprint(),
            "text": [text_sha256, self.windows.sha256],
            "recipe": self.recipe.model_dump(),
            "candidates": [
                {role: list(names) for role, names in own.items()} for own in self.fitting.choices.candidates
            ],
            "pilots": [layers for layers, _ in pilot_recipes(self.fitting)],
            "settings": [self.settings.micro_batch_tokens, self.settings.strict_coverage],
        }

    def _embedded(self, tokens: torch.Tensor, dtype: torch.dtype) -> HiddenStates:
        return embed_source(self.reader, tokens, dtype, self.device, None)

    def _layers(self, stack: contextlib.ExitStack, units: Sequence[Unit]) -> Iterator[dict[str, torch.Tensor]]:
        load: Callable[[Unit], dict[str, torch.Tensor]]
        if self.device.type == "cuda":
            loader, config = stack.enter_context(DeviceLoader(self.reader, self.device)), self.plan.checkpoint.config
            load = lambda unit: loader.load(layer_spec(config, cast("int", unit.layer)))  # noqa: E731
        else:
            load = lambda unit: read_layer(self.reader, cast("int", unit.layer))  # noqa: E731
        return stack.enter_context(Prefetcher(load, units))

    def _measure_layer(self, unit: Unit, tensors: dict[str, torch.Tensor]) -> None:
        assert unit.layer is not None
        state, spec = self.state, layer_spec(self.plan.checkpoint.config, unit.layer)
        layer = Layer(spec, tensors, self.device, self.dtype)
        exact = layer if self.dtype == torch.float32 else Layer(spec, tensors, self.device, torch.float32)
        heldout = state.exact.read(slice(None))
        expected = self._through(exact, heldout)
        candidates = self.fitting.choices.candidates[unit.layer]
        errors: dict[str, dict[str, float]] = {role: {} for role in candidates}
        part = unit.bytes_in // (sum(map(len, candidates.values())) + len(state.pilots) + 1)
        arrived = len(state.probes)
        view = WindowView(state.source, 0, self.calibration)
        for role, names in candidates.items():
            probes = probes_of(self.fitting, role, names)
            for name in names:
                self.stop.check()
                steps.step(layer_words(self.plan, unit, f"{role} as {name}"))
                quantized = self._quantize(layer, tensors, self._schemes(unit, {role: name}), view, view)
                out = self._through(self._rounded(spec, tensors, quantized, torch.float32), heldout)
                errors[role][name] = error = _relative(out, expected)
                if name in probes:
                    states = HiddenStates(out[: self.probe_windows].clone())
                    state.probes.append(ProbeState(unit.layer, role, name, error, states))
                self.progress.advance(part)
        for number, pilot in enumerate(state.pilots, 1):
            self.stop.check()
            steps.step(layer_words(self.plan, unit, f"whole model, {number} of {len(state.pilots)}"))
            own = WindowView(pilot.states, 0, self.calibration)
            quantized = self._quantize(layer, tensors, self._schemes(unit, pilot.layers[unit.layer]), own, view)
            run_layer(self._rounded(spec, tensors, quantized, self.dtype), pilot.states, self.micro_batch)
            self.progress.advance(part)
        steps.step(layer_words(self.plan, unit, "hidden states that leave it"))
        for probe in state.probes[:arrived]:
            run_layer(exact, probe.states, self.micro_batch)
        state.exact.write(slice(None), expected)
        run_layer(layer, state.source, self.micro_batch)
        self.progress.advance(unit.bytes_in - part * (sum(map(len, candidates.values())) + len(state.pilots)))
        state.errors.append(errors)
        self.progress.say(layer_line(unit.layer, errors))

    def _schemes(self, unit: Unit, by_role: Mapping[str, str]) -> dict[str, Scheme]:
        """Relative weight name -> scheme, for the weights of some roles of the layer."""
        assert unit.layer is not None
        prefix = self.plan.family.layer_prefix(unit.layer)
        roles = {t.name.removeprefix(prefix): role_of(t) for t in unit.tensors}
        return {
            name: parse_scheme(by_role[role]) for name, role in roles.items() if role is not None and role in by_role
        }

    def _quantize(
        self,
        layer: Layer,
        tensors: Mapping[str, torch.Tensor],
        schemes: Mapping[str, Scheme],
        quantized: WindowView,
        source: WindowView,
    ) -> QuantizedLayer:
        quantizer, settings = self._quantizer
        return quantizer.quantize(
            layer.spec, tensors, schemes, quantized, source, settings, self.device, self.dtype, layer
        )

    def _rounded(
        self, spec: LayerSpec, tensors: Mapping[str, torch.Tensor], quantized: QuantizedLayer, dtype: torch.dtype
    ) -> Layer:
        """A layer of what an engine computes with; the tensors given stay as they are, and are shared where they can be."""
        stacked = (
            {name for which in tensors.stacks for name in tensors.names(which)}
            if isinstance(tensors, LayerTensors)
            else set()
        )
        changed = {
            name: weight.dequantized().to(torch.bfloat16)
            for name, weight in quantized.weights.items()
            if name not in stacked
        }
        changed |= quantized.other
        if not isinstance(tensors, LayerTensors):
            return Layer(spec, {**tensors, **changed}, self.device, dtype)
        stacks = {}
        for which, stack in tensors.stacks.items():
            names = tensors.names(which)
            if names[0] not in quantized.weights:
                stacks[which] = stack
                continue
            rounded = stacks[which] = torch.empty_like(stack)
            for number, name in enumerate(names):  # one after the other: all of them besides would be a layer more
                rounded[number] = quantized.weights[name].dequantized()
        return Layer(spec, LayerTensors({**tensors, **changed}, stacks, tensors.moe), self.device, dtype)

    def _through(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        """x [S, L, H] through the layer."""
        return torch.cat([layer.forward(part) for part in torch.split(x, self.micro_batch)])

    def _result(self, text_sha256: str) -> Sensitivity:
        steps.step("predictions of the whole models")
        head = read_head(self.reader, self.device)
        tokens = self.tokens[self.calibration :]
        probed: dict[tuple[int, str], list[Probe]] = {}
        for probe in self.state.probes:
            kl = divergence(head, self.state.exact, probe.states, tokens)
            probed.setdefault((probe.layer, probe.role), []).append(
                Probe(scheme=probe.scheme, error=probe.error, kl=kl)
            )
        raw = [
            {
                role: {
                    name: (error, kl_of_error(error, [(p.error, p.kl) for p in probed[number, role]]))
                    for name, error in errors.items()
                }
                for role, errors in own.items()
            }
            for number, own in enumerate(self.state.errors)
        ]
        source = WindowView(self.state.source, self.calibration, len(self.tokens))
        kls = [
            divergence(head, source, WindowView(pilot.states, self.calibration, len(self.tokens)), tokens)
            for pilot in self.state.pilots
        ]
        sums = [_sums(raw, pilot.layers, self.fitting.bulk) for pilot in self.state.pilots]
        told = zip(sums, kls, (pilot.others for pilot in self.state.pilots), strict=True)
        left = others_left([(both, kl, others) for both, kl, others in told if others is not None])
        layers = [
            LayerSensitivity(
                layer=number,
                candidates={
                    role: {
                        name: Candidate(error=error, kl=kl * (1.0 if role == self.fitting.bulk else left))
                        for name, (error, kl) in errors.items()
                    }
                    for role, errors in own.items()
                },
                probes={role: probed[number, role] for role in own},
            )
            for number, own in enumerate(raw)
        ]
        return Sensitivity(
            schema_version=1,
            m3quant=__version__,
            source=source_identity(self.plan.checkpoint, self.plan.family.model_type),
            text=self._text(text_sha256),
            rounding=self.recipe.rounding,
            options=self.recipe.feedback.model_dump(),
            device=device_name(self.device),
            others_left=left,
            layers=layers,
            pilots=[
                Pilot(layers=pilot.layers, estimate=bulk + left * others, kl=kl)
                for pilot, (bulk, others), kl in zip(self.state.pilots, sums, kls, strict=True)
            ],
        )

    def _text(self, sha256: str) -> TextIdentity:
        return TextIdentity(
            source=self.windows.source,
            sha256=sha256,
            tokenizer_sha256=self.windows.tokenizer_sha256,
            windows=self.calibration,
            heldout_windows=len(self.tokens) - self.calibration,
            window_length=self.tokens.shape[1],
        )


def divergence(head: Head, source: States, states: States, tokens: torch.Tensor) -> float:
    """Mean KL(source || states), nats per token, over as many of the first windows of tokens [S, L] as `states` has."""
    count = states.shape[0]
    seen = source if source.shape[0] == count else WindowView(cast("HiddenStates", source), 0, count)
    return compare_heads(head, head, seen, states, tokens[:count]).kl.double().mean().item()


def _sums(
    raw: Sequence[Mapping[str, Mapping[str, tuple[float, float]]]], layers: Sequence[Mapping[str, str]], bulk: str
) -> tuple[float, float]:
    """A recipe's estimates of the role that most weights are in, and of all others together."""
    sums = [0.0, 0.0]
    for own, chosen in zip(raw, layers, strict=True):
        for role, scheme in chosen.items():
            sums[role != bulk] += own[role][scheme][1]
    return sums[0], sums[1]


def _relative(out: torch.Tensor, expected: torch.Tensor) -> float:
    """||out - expected||^2 / ||expected||^2. Raises CalibrationError if it is not finite."""
    error = float((out - expected).double().square().sum())
    norm = float(expected.double().square().sum())
    if not math.isfinite(error) or not math.isfinite(norm):
        raise CalibrationError("a layer gives NaN or Inf on the held-out windows; look for non-finite weights in it.")
    return error / norm if norm else float(error > 0)


def layer_line(layer: int, errors: Mapping[str, Mapping[str, float]]) -> str:
    """One line per layer while it runs: each role's error in its narrowest and widest scheme."""
    parts = [f"layer {layer}"]
    for role, own in errors.items():
        shown = sorted(own.items(), key=lambda item: -item[1])
        ends = [shown[0], shown[-1]] if len(shown) > 1 else shown
        parts.append(f"{role}: " + ", ".join(f"{name} {error:.2e}" for name, error in ends))
    return "; ".join(parts)
