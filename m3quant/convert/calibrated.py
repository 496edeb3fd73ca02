"""The calibrated conversion: layer by layer, two hidden-state streams, the next layer read while this one is searched.

Per layer: a quantizer makes codes from the layer's weights and from what enters it in both streams; the source stream passes
through the source weights; the codes are packed, written, and put back dequantized; the quantized stream passes through
those, activations rounded where an engine rounds them. So the layer's error, and at the end perplexity and KL divergence on held-out windows, come out of the same pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from ..calibration.boundary import Streams, WindowView
from ..calibration.experts import ExpertLedger
from ..calibration.layers import Layer, LayerSpec, LayerTensors, layer_shapes, layer_spec
from ..calibration.quantized_layer import QuantizedLayer
from ..calibration.quantizers import layer_quantizer
from ..calibration.ranks import ALONE
from ..calibration.rounding_errors import ROUNDING_ERROR, RoundingErrors
from ..calibration.stream import Prefetcher, read_head, read_layer, run_layer
from ..checkpoint.streaming import reading_words
from ..errors import CalibrationError
from ..planning.calibration_text import run_groups
from ..planning.layout import scale_dtype
from ..planning.quantizers import facts_of
from ..planning.resources import boundary_interval
from ..planning.streaming import EMBEDDINGS, HEAD, REPLAY
from ..planning.unit import PlannedTensor, Unit
from ..quant.formats import TORCH_DTYPES, pack
from ..reports.conversion import write_report
from ..running import steps
from ..running.timing import device_span
from ..schemes import Scheme, rounded_activations
from .device_layers import DeviceLoader
from .device_warm_up import WarmUp
from .expert_stacks import pack_experts
from .layer_work import LayerWork, stage_shares
from .layer_writer import LayerSink, LayerWriter, NoWriter
from .pipeline import convert_unit
from .quality import coverage, heldout_quality
from .replay import replay_layer
from .units import named, shard_facts
from .words import layer_words

if TYPE_CHECKING:
    from .job import Run


def convert_calibrated(run: Run) -> dict[str, Any]:
    """Convert all units that the journal has no record of; returns what the manifest states about calibration.

    run.settings.ranks: one of several processes that do so together; all but the first write nothing and return {}.
    Raises CalibrationError, CheckpointError, StoppedError or InterruptedRun; a layer in progress is then dropped whole.
    """
    layerwise, reading = _Layerwise(run), reading_words(run.plan.checkpoint)
    ranks = layerwise.ranks
    todo = [u for u in run.plan.units if u.layer is not None and u.index not in run.journal.records]
    first = run.plan.units[0]
    replayed = layerwise.since_last_boundary(todo[0] if todo else None)
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(contextlib.closing(layerwise.writer))
        warm_up = stack.enter_context(contextlib.closing(layerwise.warm_up(todo)))
        # The first layer is read while the tensors outside layers are converted.
        layers = stack.enter_context(
            Prefetcher[Unit, dict[str, torch.Tensor]](layerwise.loader(stack), [*replayed, *todo])
        )
        stack.enter_context(run.plan.checkpoint.abandoned_on_error())
        if ranks.first and first.index not in run.journal.records:
            fmt = run.plan.recipe.format
            steps.step(f"{reading} {first.label}")
            record = convert_unit(run.output, first, run.reader, fmt, run.device, run.stop, run.progress.advance)
            run.journal.finish_unit(first.index, shard_facts(record))
        steps.step("hidden states that enter the first layer")
        streams = stack.enter_context(contextlib.closing(layerwise.streams()))
        warm_up.close()
        for unit in replayed:
            steps.step(layer_words(run.plan, unit, reading))
            layerwise.replay(unit, next(layers), streams)
            run.plan.checkpoint.finish_step((REPLAY, unit.index))
        for unit in todo:
            steps.step(layer_words(run.plan, unit, reading))
            layerwise.convert_layer(unit, next(layers), streams)
        if not ranks.first:
            return {}
        steps.step("perplexity and KL divergence of the held-out windows")
        head = read_head(run.reader, run.device)
        run.plan.checkpoint.finish_step(HEAD)
        quality = heldout_quality(
            head, streams, layerwise.tokens, run.plan.recipe.data.windows, rounded_activations(_all_schemes(run))
        )
        steps.step("writing the last layers")
        writer.wait()
    return _summary(run, quality)


def _all_schemes(run: Run) -> Iterator[Scheme]:
    return (t.scheme for unit in run.plan.units for t in unit.tensors if t.action == "quantize")


def stacked_on(device: torch.device) -> bool:
    """Whether layers come as stacks on the device, are packed there, and are written in the background."""
    return device.type == "cuda"


class _Layerwise:
    """What stays the same from layer to layer."""

    def __init__(self, run: Run) -> None:
        self.run, self.plan, self.reader, self.device = run, run.plan, run.reader, run.device
        plan, settings, device = run.plan, run.settings, run.device
        assert settings.windows is not None, "a calibrated recipe needs windows"
        self.tokens = torch.from_numpy(settings.windows.ids)
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.micro_batch = max(1, settings.micro_batch_tokens // self.tokens.shape[1])
        self.spill = run.journal.folder if settings.spill else None
        # On a CPU stacks would be a second copy of a layer, and writing would take cores from the search.
        self.stacked = stacked_on(device)
        ranks = settings.ranks or ALONE
        background = self.stacked and not settings.spill
        self.writer: LayerSink = LayerWriter(run.output, run.journal, background) if ranks.first else NoWriter()
        self.ranks = ranks
        self.shares = stage_shares(plan)
        leaving = settings.sink is not None and settings.sink.held is not None
        self.every = settings.boundary_every or boundary_interval(plan, self.stacked, leaving)
        scale = TORCH_DTYPES[scale_dtype(Scheme("int", 4), plan.recipe.format)]
        self._quantizer = layer_quantizer(plan.recipe, scale, settings.strict_coverage, ranks)

    def quantize(
        self,
        spec: LayerSpec,
        tensors: dict[str, torch.Tensor],
        schemes: dict[str, Scheme],
        quantized: WindowView,
        source: WindowView,
        layer: Layer,
    ) -> QuantizedLayer:
        """The layer by the recipe's quantizer, as `quantized_layer.LayerQuantizer` says."""
        quantizer, settings = self._quantizer
        return quantizer.quantize(spec, tensors, schemes, quantized, source, settings, self.device, self.dtype, layer)

    def since_last_boundary(self, unit: Unit | None) -> list[Unit]:
        """Finished layers between the last saved hidden states and `unit` (None: the head)."""
        stop = unit.index if unit else len(self.plan.units)
        return self.plan.units[self.run.journal.last_boundary() : stop]

    def streams(self) -> Streams:
        """Both streams as they were last saved, or embedded."""
        index = self.run.journal.last_boundary()
        if index == 1:
            streams = Streams.embedded(self.reader, self.tokens, self.dtype, self.device, self.spill)
            self.plan.checkpoint.finish_step(EMBEDDINGS)
        else:
            shape = (self.tokens.shape[0], self.tokens.shape[1], self.plan.family.hidden_size)
            saved = self.run.journal.boundary(index)
            streams = Streams.restored(saved, shape, self.dtype, self.device, self.spill)
        streams.join(run_groups(self.plan))
        return streams

    def replay(self, unit: Unit, tensors: dict[str, torch.Tensor], streams: Streams) -> None:
        """Move the streams through a layer that is finished and after which they were not saved."""
        self.run.stop.check()
        steps.step(layer_words(self.plan, unit, "hidden states are computed again"))
        self.run.progress.say(f"layer {unit.layer}: hidden states are computed again")
        layer = Layer(
            layer_spec(self.plan.checkpoint.config, cast("int", unit.layer)), tensors, self.device, self.dtype
        )
        replay_layer(layer, unit, self.plan, self.run.output, streams, self.micro_batch, self.ranks)

    def loader(self, stack: contextlib.ExitStack) -> Callable[[Unit], dict[str, torch.Tensor]]:
        """Reads a unit's layer, by relative name: to the GPU, if there is one, or into host memory."""
        if not self.stacked:
            return lambda unit: read_layer(self.reader, cast("int", unit.layer))
        device_loader = stack.enter_context(DeviceLoader(self.reader, self.device))
        config = self.plan.checkpoint.config
        return lambda unit: device_loader.load(layer_spec(config, cast("int", unit.layer)))

    def warm_up(self, todo: Sequence[Unit]) -> WarmUp:
        """Started; does nothing without a GPU or without a layer to do."""
        spec = layer_spec(self.plan.checkpoint.config, cast("int", todo[0].layer)) if todo else None
        background = self.writer.background
        saved = self.tokens.numel() * spec.hidden_size * self.dtype.itemsize if spec and background else 0
        return WarmUp(todo, spec if self.device.type == "cuda" else None, self.device, saved)

    def convert_layer(self, unit: Unit, tensors: dict[str, torch.Tensor], streams: Streams) -> None:
        """Calibrate one layer and hand it to the writer. tensors: relative name -> dense source; changed in place."""
        assert unit.layer is not None
        self.run.stop.check()
        prefix = self.plan.family.layer_prefix(unit.layer)
        schemes = {t.name.removeprefix(prefix): t.scheme for t in unit.tensors if t.action == "quantize"}
        spec = layer_spec(self.plan.checkpoint.config, unit.layer)
        layer = Layer(spec, tensors, self.device, self.dtype)
        work = LayerWork(self.run.progress, self.plan, unit, self.shares)
        with device_span("search"), work.stage("search"):
            quantized = self.quantize(spec, tensors, schemes, *self._seen(streams), layer)
        self.run.stop.check()
        with device_span("forward"), work.stage("forward_source"):
            run_layer(layer, streams.source, self.micro_batch, ranks=self.ranks)
        self.writer.begin(unit)
        with device_span("pack"), work.stage("pack"):
            errors = self._store(unit, prefix, layer, tensors, quantized)
        layer.round_activations(schemes)
        with device_span("forward"), work.stage("forward_quantized"):
            error = run_layer(layer, streams.quantized, self.micro_batch, streams.source, self.ranks)
        ledger = quantized.ledger.to_json() if quantized.ledger else None
        record = {"layer": unit.layer, "stream_error": error, "log": quantized.log, "ledger": ledger}
        if not facts_of(self.plan.recipe.rounding).nearest_codes:
            record[ROUNDING_ERROR] = errors.to_json()
        self.writer.finish(unit, record, self._to_save(unit, streams))
        self.run.progress.say(layer_line(unit.layer, quantized, error or 0.0))

    def _to_save(self, unit: Unit, streams: Streams) -> Streams | None:
        if unit.index % self.every:
            return None
        return streams.snapshot() if self.writer.background else streams

    def _seen(self, streams: Streams) -> tuple[WindowView, WindowView]:
        """The calibration windows of the quantized and of the source stream; the rest is held out."""
        windows = self.plan.recipe.data.windows
        return WindowView(streams.quantized, 0, windows), WindowView(streams.source, 0, windows)

    def _store(
        self, unit: Unit, prefix: str, layer: Layer, tensors: dict[str, torch.Tensor], quantized: QuantizedLayer
    ) -> RoundingErrors:
        """Hand every tensor of the shard to the writer, and put into `layer` what an engine computes with."""
        errors = RoundingErrors()
        planned = {t.name.removeprefix(prefix): t for t in unit.tensors}
        packed: set[str] = set()
        if isinstance(tensors, LayerTensors):
            for names, outputs, ready in pack_experts(planned, quantized, tensors, self.plan.recipe.format, errors):
                self.run.stop.check()
                self.writer.add(outputs, ready)
                packed.update(names)
        used = layer_shapes(layer.spec)
        for name, tensor in planned.items():
            if name in packed:
                continue
            self.run.stop.check()
            outputs, dense = self._one(tensor, name, tensors[name], quantized, errors)
            if not isinstance(tensors, LayerTensors):
                tensors[name] = dense
            if name in used:
                layer.set_weight(name, dense)
            self.writer.add(outputs)
        return errors

    def _one(
        self,
        planned: PlannedTensor,
        name: str,
        tensor: torch.Tensor,
        quantized: QuantizedLayer,
        errors: RoundingErrors,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What is stored of one tensor, on the CPU, and the tensor that an engine computes with."""
        if planned.action == "copy" and planned.source.scale is not None:
            # Quantized, and no forward pass reads it.
            return self.reader.checkpoint.read_many([part.name for part in planned.read]), tensor
        if planned.action != "quantize":
            kept = quantized.other.get(name, tensor).cpu()
            if kept.dtype != tensor.dtype:
                raise CalibrationError(
                    f"{planned.name} was folded as {kept.dtype}, but is stored as {tensor.dtype}: a defect of m3quant, please report it."
                )
            return {planned.name: kept}, kept
        stored = quantized.weights[name]
        parts = pack(stored.codes, stored.scale, stored.zero_point, planned.scheme, self.plan.recipe.format)
        values = stored.dequantized()
        errors.add([planned.name], tensor[None], values[None])
        dense = values.to(torch.bfloat16)
        return named(planned, parts), dense


def layer_line(layer: int, quantized: QuantizedLayer, error: float) -> str:
    """One line per layer while it runs: what was chosen, what it gained, who starved."""
    parts = [f"layer {layer}"]
    for block in quantized.log["blocks"]:
        if (chosen := block.get("chosen", "feedback")) != "unquantized":
            parts.append(f"{block['block']}: {chosen}")
    parts.append(f"stream error {error:.4f}")
    if quantized.ledger is not None and quantized.ledger.starved:
        starved = quantized.ledger.starved
        shown = ", ".join(map(str, starved[:8])) + (", ..." if len(starved) > 8 else "")
        parts.append(
            f"{len(starved)} experts below {quantized.ledger.floor} tokens, topped up by router score: {shown}"
        )
    return "; ".join(parts)


def _summary(run: Run, quality: dict[str, Any] | None) -> dict[str, Any]:
    records = [run.journal.records[u.index] for u in run.plan.units if u.layer is not None]
    ledgers = [ExpertLedger.from_json(r["ledger"]) for r in records if r["ledger"]]
    assert run.settings.windows is not None
    errors = {name: value for r in records for name, value in r.get(ROUNDING_ERROR, {}).items()}
    facts = {
        "calibration": run.settings.windows.record(),
        "heldout": quality,
        "coverage": coverage(ledgers),
        "stream_error": {str(r["layer"]): r["stream_error"] for r in records},
    }
    extra = {ROUNDING_ERROR: errors} if errors else {}
    return {**facts, **extra, "report": write_report(run.plan, run.output, records, facts)}
