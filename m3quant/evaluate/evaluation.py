"""An evaluation from end to end: models and tasks checked, one pass over the weights, figures, eval.json."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..artifact.conversion_eval import heldout_result
from ..artifact.eval_record import EVAL_FILE, EvalRecord
from ..artifact.identity import identify
from ..artifact.journal import Journal
from ..artifact.records import MeasuredLayer
from ..artifact.reread import recorded_digests
from ..checkpoint import make_folder, write_json_atomic
from ..errors import EvaluationError, StoppedError
from ..running import steps
from ..running.device import device_name, pick_device
from ..running.progress import Progress
from ..running.stopping import StopFlag, stop_on_signals
from .arithmetic import Arithmetic
from .batches import unique
from .choices import ENGINE
from .from_hub import check_cache, shards_of_hub
from .haystack import Reach
from .models import Model, check_same_model
from .passes import NOISE, SOURCE, PassSettings, make_streams, predict, run_layers
from .recheck import recheck
from .states import Placement, place_states
from .task import NoiseFloor, Predictions, ScoredSequence, Task

JOURNAL = ".m3quant-eval"
# Activations of a layer in addition to its input, in float32 states of as many tokens: projections, heads, chosen experts' outputs.
_ACTIVATIONS = 12
_WORKING = 2 << 30  # chunks of logits and attention, the allocator's slack


@dataclass(frozen=True)
class Settings:
    """How to run. states: where hidden states live, one of `states.PLACES`. activations, kv_dtype, index_dtype: of the
    checkpoint, one of `choices`' ACTIVATIONS, KV_DTYPES and INDEX_DTYPES."""

    device: str = "auto"
    states: str = "auto"
    batch_tokens: int = 16384
    activations: str = ENGINE
    kv_dtype: str = "auto"
    index_dtype: str = "bf16"
    cache_disk: int | None = None  # bytes that shards from the Hub may take in the folder at a time; None: what is free


def evaluate(
    checkpoint: Model,
    source: Model | None,
    tasks: Sequence[Task],
    suite: str,
    folder: Path | None,
    settings: Settings,
    progress: Progress,
    notes: Sequence[str] = (),
) -> EvalRecord:
    """Measure every task in one pass over the weights. With a folder, write eval.json there and continue an interrupted run.

    Raises M3QuantError subclasses: models that do not match, sequences that the model does not take, NaN or Inf in a layer,
    a full disk or GPU, another evaluation begun in the folder.
    """
    return evaluate_all([checkpoint], source, tasks, suite, folder, [folder], settings, progress, notes)[0]


def evaluate_all(
    checkpoints: Sequence[Model],
    source: Model | None,
    tasks: Sequence[Task],
    suite: str,
    folder: Path | None,
    written: Sequence[Path | None],
    settings: Settings,
    progress: Progress,
    notes: Sequence[str] = (),
) -> list[EvalRecord]:
    """`evaluate` of several checkpoints, with labels of their own, in one pass: each layer of the source is read once for all.

    folder: of the state of an interrupted run. written: where the eval.json of each goes. Several need a source: without one they
    have nothing in common that would be read once. Raises as `evaluate`.
    """
    if source is None and len(checkpoints) > 1:
        raise ValueError("several checkpoints without a source")
    if source is not None:
        for checkpoint in checkpoints:
            check_same_model(checkpoint, source)
    started = time.monotonic()
    steps.step("looking at the checkpoints and at what is finished")
    plan = _Plan(checkpoints, source, tasks, settings)
    journal = None
    if folder is not None:
        make_folder(folder)
        read = {model.label: identify(model.reader.checkpoint) for model in plan.models}
        journal = Journal.begin(folder, plan.facts(suite), read, JOURNAL, MeasuredLayer)
    try:
        with stop_on_signals() as stop:
            if journal is not None:
                recheck(journal, plan.models, read, stop, progress)
                journal.accept(plan.facts(suite), read)
                for model in plan.models:
                    model.reader.checkpoint.record_reads()
                journal.unit_read = plan.layer_read
            predictions, layers = plan.run(journal, stop, progress)
        steps.step("writing what was measured")
        seconds = time.monotonic() - started
        records = [plan.record(number, predictions, layers, suite, seconds) for number in range(len(checkpoints))]
        for record, place in zip(records, written, strict=True):
            record.notes.extend(notes)
            if place is not None:
                make_folder(place)
                write_record(record, place)
        if journal is not None:
            journal.remove()
        return records
    except torch.OutOfMemoryError as error:
        raise StoppedError(
            f"{plan.settings.device} has too little free memory ({str(error).split('. ')[0]}): run again with --states host or "
            "with fewer --batch-tokens."
        ) from None
    finally:
        if journal is not None:
            journal.release()


def write_record(record: EvalRecord, folder: Path) -> None:
    """folder/eval.json, whole or not at all."""
    write_json_atomic(folder / EVAL_FILE, record.model_dump(mode="json"))


class _Plan:
    """What is run, known before a weight is read."""

    def __init__(
        self, checkpoints: Sequence[Model], source: Model | None, tasks: Sequence[Task], settings: Settings
    ) -> None:
        self.checkpoints, self.source, self.tasks = checkpoints, source, tasks
        self.cache_disk = settings.cache_disk
        check_cache(self.models, settings.cache_disk)
        device = pick_device(settings.device)
        on_gpu = device.type == "cuda"
        self.settings = PassSettings(
            device=device,
            dtype=torch.bfloat16 if on_gpu else torch.float32,
            noise_dtype=torch.float32 if on_gpu else torch.bfloat16,
            batch_tokens=settings.batch_tokens,
            place=settings.states,
        )
        arithmetics = [
            Arithmetic.of(model, settings.activations, settings.kv_dtype, settings.index_dtype) for model in checkpoints
        ]
        self.computed = [
            arithmetic.record(model, self.settings.dtype)
            for model, arithmetic in zip(checkpoints, arithmetics, strict=True)
        ]
        self.given = [list(task.sequences()) for task in tasks]
        for task, sequences in zip(tasks, self.given, strict=True):
            for checkpoint in checkpoints:
                _check_sequences(task.name, sequences, checkpoint)
        flat = [s for sequences in self.given for s in sequences]
        if not flat:
            raise EvaluationError("no task has anything to run: choose another suite.")
        self.texts, self.where = unique(flat)
        self.noise = self._noise_texts()
        computed = list(zip(checkpoints, arithmetics, strict=True))
        self.streams = make_streams(computed, source, self.texts, self.noise, self.settings)

    def _noise_texts(self) -> list[int]:
        if self.source is None:
            return []
        wanted, start = set[int](), 0
        for task, sequences in zip(self.tasks, self.given, strict=True):
            if isinstance(task, NoiseFloor):
                wanted |= {self.where[start + i][0] for i in task.noise_sequences()}
            start += len(sequences)
        return sorted(wanted)

    @property
    def models(self) -> list[Model]:
        return [*self.checkpoints, *([self.source] if self.source is not None else [])]

    def layer_read(self, layer: int) -> dict[str, dict[str, str]]:
        """Label of each model -> its shard -> digest of what was read of it for a layer."""
        return {m.label: recorded_digests(m.reader.checkpoint, m.stored_infos(layer)) for m in self.models}

    def facts(self, suite: str) -> dict[str, Any]:
        """Everything that the figures depend on; an interrupted run is continued under the same only."""
        return {
            **{model.label: model.fingerprint() for model in self.checkpoints},
            "source": self.source.fingerprint() if self.source else None,
            "suite": suite,
            **{f"task {task.name}": _digest(given) for task, given in zip(self.tasks, self.given, strict=True)},
            "noise": self.noise,
            "streams": [stream.name for stream in self.streams],
            "device": device_name(self.settings.device),
            "batch_tokens": self.settings.batch_tokens,
            "computed": " / ".join(computed.sentence for computed in self.computed),
            "version": __version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
        }

    def placement(self, folder: Path | None) -> Placement:
        """Where the hidden states go, and the sentence that says so before anything is computed."""
        family = self.checkpoints[0].family
        hidden = family.hidden_size
        longest = max(batch.size for stream in self.streams for batch in stream.layout.batches)
        activations = longest * hidden * 4 * _ACTIVATIONS
        layers = family.num_layers
        weights = max(model.dense_bytes(layer) for model in self.models for layer in range(layers))
        on_gpu = self.settings.device.type == "cuda"
        reserve = weights * (1 if on_gpu else 2) + activations + _WORKING
        tokens = [f"{len(s.layout.ids):,} tokens x {hidden:,} x {str(s.dtype)[6:]} ({s.name})" for s in self.streams]
        return place_states(
            self.settings.place,
            [s.nbytes for s in self.streams],
            " + ".join(tokens),
            reserve,
            self.settings.device,
            folder,
        )

    def run(
        self, journal: Journal | None, stop: StopFlag, progress: Progress
    ) -> tuple[dict[str, list[Predictions]], list[dict[str, float]]]:
        placement = self.placement(journal.folder if journal else None)
        progress.say(placement.sentence)
        try:
            for stream in self.streams:
                stream.open(self.settings.device, placement.place, journal)
            saved = 2 * sum(
                s.nbytes for s in self.streams
            )  # the states entering the next layer, beside those of this one
            with shards_of_hub(self.models, journal, self.cache_disk, saved, stop, progress):
                layers = run_layers(self.streams, self.settings, journal, stop, progress)
                with torch.no_grad():
                    return predict(self.streams, self.settings.device), layers
        finally:
            for stream in self.streams:
                stream.close()

    def record(
        self,
        number: int,
        predictions: dict[str, list[Predictions]],
        layers: list[dict[str, float]],
        suite: str,
        seconds: float,
    ) -> EvalRecord:
        """Of the checkpoint of that number. seconds: of the pass, whatever it measured."""
        checkpoint = self.checkpoints[number]
        reach = Reach.of(checkpoint.config)
        results, start = [], 0
        for task, sequences in zip(self.tasks, self.given, strict=True):
            where = self.where[start : start + len(sequences)]
            start += len(sequences)
            mine = {
                name: [_own(predictions[name], *place) for place in where]
                for name in (checkpoint.label, SOURCE)
                if name in predictions
            }
            if isinstance(task, NoiseFloor) and NOISE in predictions:
                task.take_noise(
                    [self._noise_of(predictions, where[i]) for i in task.noise_sequences()], self._noise_run()
                )
            for result in task.results(mine[checkpoint.label], mine.get(SOURCE)):
                result.kind = task.kind
                reach.mark(result, sequences)
                results.append(result)
        manifest = checkpoint.manifest
        if manifest and (heldout := heldout_result(manifest)):
            results.append(heldout)
        return EvalRecord(
            m3quant=__version__,
            finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            seconds=round(seconds, 3),
            device=device_name(self.settings.device),
            versions={"torch": torch.__version__, "transformers": version("transformers")},
            checkpoint=checkpoint.measured(),
            source=self.source.measured() if self.source else None,
            suite=suite,
            results=results,
            layers=[
                {"layer": facts["layer"], "relative_error": facts[checkpoint.label]}
                for facts in layers
                if checkpoint.label in facts
            ],
            coverage=(manifest or {}).get("coverage"),
            computed=self.computed[number],
            notes=[self.computed[number].sentence],
        )

    def _noise_of(self, predictions: dict[str, list[Predictions]], place: tuple[int, np.ndarray]) -> Predictions:
        number, positions = place
        return _own(predictions[NOISE], self.noise.index(number), positions)

    def _noise_run(self) -> str:
        one, other = (str(d)[6:] for d in (self.settings.dtype, self.settings.noise_dtype))
        return f"{other} against {one} in other batches"


def _own(predictions: Sequence[Predictions], number: int, positions: np.ndarray) -> Predictions:
    """A task's own tokens out of those that were predicted of a text for all tasks together."""
    all_of = predictions[number]
    return Predictions(
        all_of.nll[positions], all_of.best[positions], None if all_of.kl is None else all_of.kl[positions]
    )


def _digest(sequences: Sequence[ScoredSequence]) -> str:
    """What a task runs, for the user to distinguish two and for a hash to be sure."""
    digest = sha256()
    for one in sequences:
        digest.update(np.int64(len(one.ids)).tobytes() + one.ids.tobytes() + one.scored.tobytes() + b"|")
    tokens = sum(len(one.ids) for one in sequences)
    return f"{len(sequences)} sequences, {tokens:,} tokens, sha256 {digest.hexdigest()[:16]}"


def _check_sequences(task: str, sequences: Sequence[ScoredSequence], model: Model) -> None:
    limit = model.family.max_positions
    for sequence in sequences:
        scored = sequence.scored
        if len(scored) == 0 or scored[0] < 1 or scored[-1] >= len(sequence.ids) or (np.diff(scored) < 1).any():
            raise ValueError(f"task {task}: scored positions must ascend within 1..{len(sequence.ids) - 1}")
        if limit is not None and int(scored[-1]) > limit:
            raise EvaluationError(
                f"task {task} runs {int(scored[-1]):,} tokens, but {model.where}/config.json says max_position_embeddings "
                f"{limit:,}: set a shorter length."
            )
