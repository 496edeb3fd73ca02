"""One pass over the weights for everything that is to be measured.

Layer by layer, while the next one is read: the source's layer takes the source's hidden states, then those of the
noise floor (the source again, in another dtype and other batches), then each checkpoint's layer takes its own. At the end
the heads are compared on the predicted tokens alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..artifact.journal import Journal
from ..calibration.head import CHUNK_TOKENS, Head, score
from ..calibration.layers import Layer
from ..calibration.stream import Prefetcher, embed, read_embeddings, read_head, read_layer
from ..checkpoint.streaming import reading_words
from ..errors import EvaluationError
from ..planning.streaming import EMBEDDINGS, HEAD
from ..running import steps
from ..running.progress import Progress
from ..running.stopping import StopFlag
from .arithmetic import Arithmetic
from .batches import Batch, Layout, lay_out
from .from_hub import layer_step
from .models import Model
from .states import StreamStates
from .task import Predictions, ScoredSequence

SOURCE, NOISE = "source", "noise"  # names of streams; a checkpoint's is its label
_EMBED_TOKENS = 1 << 14
# States of a run of predicted tokens are read together where at most this many others are between two of them.
_GAP = 64


@dataclass(frozen=True)
class PassSettings:
    """How to run. dtype: of the layers and the residual stream; noise_dtype: the other one, for the noise floor.

    batch_tokens: tokens that pass through a layer together; a longer sequence's attention is computed whole all the same.
    """

    device: torch.device
    dtype: torch.dtype
    noise_dtype: torch.dtype
    batch_tokens: int = 16384
    place: str = "auto"


class Stream:
    """One model's hidden states over one layout of texts (by number, of those that are run).

    arithmetic: what of it is rounded; None for the source and its noise floor, which round nothing.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        dtype: torch.dtype,
        layout: Layout,
        texts: Sequence[int],
        arithmetic: Arithmetic | None = None,
    ) -> None:
        self.name, self.model, self.dtype, self.layout, self.texts = name, model, dtype, layout, texts
        self.arithmetic = arithmetic
        self._states: StreamStates | None = None

    @property
    def nbytes(self) -> int:
        return len(self.layout.ids) * self.model.family.hidden_size * self.dtype.itemsize

    @property
    def states(self) -> StreamStates:
        assert self._states is not None
        return self._states

    def open(self, device: torch.device, place: str, journal: Journal | None) -> None:
        shape = (len(self.layout.ids), self.model.family.hidden_size)
        folder = journal.folder if journal else None
        self._states = StreamStates(self.name, shape, self.dtype, device, place, folder)

    def close(self) -> None:
        if self._states is not None:
            self._states.close()


def make_streams(
    checkpoints: Sequence[tuple[Model, Arithmetic]],
    source: Model | None,
    texts: Sequence[ScoredSequence],
    noise: Sequence[int],
    settings: PassSettings,
) -> list[Stream]:
    """Streams in the order in which a layer takes them: the source, its noise floor, the checkpoints.

    noise: which texts the noise floor runs on; needs a source.
    """
    layout = lay_out(texts, settings.batch_tokens)
    streams = []
    if source is not None:
        streams.append(Stream(SOURCE, source, settings.dtype, layout, range(len(texts))))
        if noise:
            other = lay_out([texts[i] for i in noise], max(1, settings.batch_tokens // 2), longest_first=True)
            streams.append(Stream(NOISE, source, settings.noise_dtype, other, noise))
    for model, arithmetic in checkpoints:
        streams.append(Stream(model.label, model, settings.dtype, layout, range(len(texts)), arithmetic))
    return streams


def run_layers(
    streams: Sequence[Stream], settings: PassSettings, journal: Journal | None, stop: StopFlag, progress: Progress
) -> list[dict[str, float]]:
    """Put every stream through all layers; returns per layer {"layer", label of a checkpoint: relative error to the source}.

    Finished layers of an interrupted run are skipped. Raises EvaluationError naming the first layer that gives NaN or Inf.
    """
    layers = streams[-1].model.family.num_layers
    models = list({id(s.model): s.model for s in streams}.values())
    done = 0
    while journal is not None and done in journal.records:
        done += 1
    facts = [journal.records[layer]["facts"] for layer in range(done)] if journal else []
    read = [sum(model.stored_bytes(layer) for model in models) for layer in range(layers)]
    progress.start(sum(read), sum(read[:done]), "evaluate")
    if done:
        progress.say(f"continuing: {done} of {layers} layers are finished")
    steps.step("hidden states that enter the first layer" if not done else "hidden states of the last finished layer")
    for stream in streams:
        if done:
            stream.states.restore(done)
        else:
            _embed(stream)
    if not done:
        for model in models:
            model.reader.checkpoint.finish_step(EMBEDDINGS)
    keys = [(layer, model) for layer in range(done, layers) for model in models]
    with Prefetcher(lambda key: read_layer(key[1].reader, key[0]), keys) as loaded, ExitStack() as stack:
        for model in models:
            stack.enter_context(model.reader.checkpoint.abandoned_on_error())
        for layer in range(done, layers):
            facts.append(_one_layer(layer, streams, models, loaded, settings, stop, progress))
            if journal is not None:
                saved = {name: digest for stream in streams for name, digest in stream.states.saved.items()}
                journal.finish_unit(layer, {"facts": facts[-1], "states": saved})
                for stream in streams:
                    stream.states.drop(layer)
            for model in models:
                model.reader.checkpoint.finish_step(layer_step(layer))
    return facts


def _one_layer(
    layer: int,
    streams: Sequence[Stream],
    models: Sequence[Model],
    loaded: Iterator[dict[str, torch.Tensor]],
    settings: PassSettings,
    stop: StopFlag,
    progress: Progress,
) -> dict[str, float]:
    facts: dict[str, float] = {"layer": layer}
    words = f"layer {layer} ({layer + 1} of {streams[-1].model.family.num_layers})"
    for stream in streams:
        stream.states.begin(layer + 1)
    for model in models:
        steps.step(f"{words}: {reading_words(model.reader.checkpoint)}")
        tensors = next(loaded)
        steps.step(words)
        mine = [stream for stream in streams if stream.model is model]
        ticks = _Ticks(progress, model.stored_bytes(layer), sum(len(s.layout.ids) for s in mine))
        for stream in mine:
            compared = stream.arithmetic is not None and streams[0].name == SOURCE
            reference = streams[0] if compared else None
            # The layer has no name here: it must be gone from the device before the next one is put there.
            error = _through(_computed(stream, layer, tensors, settings), stream, reference, settings, stop, ticks)
            stream.states.finish()
            if error is not None:
                facts[stream.name] = error
                progress.say(f"layer {layer}: stream error {error:.5f}{_of(stream, streams)}")
        ticks.rest()
    return facts


def _of(stream: Stream, streams: Sequence[Stream]) -> str:
    """Which checkpoint it is, where there are several."""
    return f" ({stream.model.folder.name})" if sum(s.arithmetic is not None for s in streams) > 1 else ""


def _computed(stream: Stream, index: int, tensors: dict[str, torch.Tensor], settings: PassSettings) -> Layer:
    layer = Layer(stream.model.family.layer(index), tensors, settings.device, stream.dtype)
    return layer if stream.arithmetic is None else stream.arithmetic.apply(layer, stream.model)


def _through(
    layer: Layer, stream: Stream, reference: Stream | None, settings: PassSettings, stop: StopFlag, ticks: _Ticks
) -> float | None:
    """All batches of one stream through one layer -> ||out - reference|| / ||reference||, if there is a reference."""
    error = norm = 0.0
    for batch in stream.layout.batches:
        stop.check()
        out = forward(layer, stream.states.read(batch.tokens, layer.device), batch, settings.batch_tokens)
        if not bool(torch.isfinite(out).all()):
            raise EvaluationError(
                f"layer {layer.spec.index} of {stream.model.where} gives NaN or Inf, the layers before it do not: look for "
                "non-finite weights in it (m3quant verify), or use a compute dtype of wider range."
            )
        stream.states.write(batch.tokens, out)
        if reference is not None:
            expected = reference.states.read(batch.tokens, layer.device).double()
            error += float((out.double() - expected).square().sum())
            norm += float(expected.square().sum())
        ticks.add(batch.size)
    return None if reference is None else (error / norm) ** 0.5 if norm else float(error > 0)


def forward(layer: Layer, x: torch.Tensor, batch: Batch, chunk: int) -> torch.Tensor:
    """The layer on a batch's tokens [n, H] -> [n, H]: attention by sequence, the MLP by chunks of tokens."""
    out = torch.empty_like(x)
    start = 0
    for count, length in batch.groups:
        rows = slice(start, start + count * length)
        group = x[rows].view(count, length, -1)
        attended = layer.attention(layer.attention_input(group)).to(x.dtype)
        out[rows] = (group + attended).flatten(0, 1)
        start = rows.stop
    for start in range(0, len(out), chunk):
        part = out[None, start : start + chunk]
        part += layer.mlp(layer.mlp_input(part)).to(x.dtype)
    return out


def _embed(stream: Stream) -> None:
    table = read_embeddings(stream.model.reader)
    ids = torch.from_numpy(stream.layout.ids)
    stream.states.begin(0)
    for start in range(0, len(ids), _EMBED_TOKENS):
        tokens = slice(start, min(start + _EMBED_TOKENS, len(ids)))
        states = embed(ids[tokens], table).to(stream.dtype)
        if not bool(torch.isfinite(states).all()):
            raise EvaluationError(
                f"embed_tokens of {stream.model.where} holds NaN or Inf: look at what it was made from (m3quant verify)."
            )
        stream.states.write(tokens, states)
    stream.states.finish()


def predict(streams: Sequence[Stream], device: torch.device) -> dict[str, list[Predictions]]:
    """Compare the heads of all streams on the predicted tokens -> stream name -> one `Predictions` per its text."""
    steps.step("logits of the scored tokens")
    heads = {id(s.model): _finite_head(s.model, device) for s in streams}
    for stream in streams:
        stream.model.reader.checkpoint.finish_step(HEAD)
    main = [s for s in streams if s.name != NOISE]
    out = _scored(main, [heads[id(s.model)] for s in main], [s.layout for s in main], device)
    for noise in (s for s in streams if s.name == NOISE):
        source, head = streams[0], heads[id(noise.model)]
        out[NOISE] = _scored([source, noise], [head, head], [_like(source, noise), noise.layout], device)[NOISE]
    return out


def _finite_head(model: Model, device: torch.device) -> Head:
    """The model's head. Raises EvaluationError naming the model and the tensor that is not finite."""
    head = read_head(model.reader, device)
    parts = (("final norm", head.norm[None]), ("lm_head", head.weight))
    for name, tensor in parts:
        if not all(bool(torch.isfinite(part).all()) for part in torch.split(tensor, _EMBED_TOKENS)):
            raise EvaluationError(
                f"{name} of {model.where} holds NaN or Inf, the layers before it are finite: look at what it was made from "
                "(m3quant verify)."
            )
    return head


def _like(source: Stream, noise: Stream) -> Layout:
    """The source's layout cut down to the noise floor's texts, in its order: same targets, other rows."""
    rows: list[np.ndarray] = []
    for place, scored in zip(noise.layout.place, noise.layout.scored, strict=True):
        first = noise.texts[len(rows)]
        rows.append(noise.layout.rows[scored] - place + source.layout.place[first])
    return replace(noise.layout, rows=np.concatenate(rows))


def _scored(
    streams: Sequence[Stream], heads: Sequence[Head], layouts: Sequence[Layout], device: torch.device
) -> dict[str, list[Predictions]]:
    targets = layouts[-1].targets
    total = len(targets)
    nll = np.empty((len(streams), total), dtype=np.float32)
    best = np.empty((len(streams), total), dtype=np.int64)
    kl = np.empty((len(streams), total), dtype=np.float32)
    # In the order of the states in the file, so that each is read once.
    order = np.argsort(layouts[0].rows, kind="stable")
    for start in range(0, total, CHUNK_TOKENS):
        chosen = order[start : start + CHUNK_TOKENS]
        inputs = [_gather(s.states, lay.rows[chosen], device) for s, lay in zip(streams, layouts, strict=True)]
        for number, found in enumerate(score(heads, inputs, torch.from_numpy(targets[chosen]).to(device))):
            nll[number, chosen], best[number, chosen] = found.nll.numpy(), found.best.numpy()
            if found.kl is not None:
                kl[number, chosen] = found.kl.numpy()
    return {
        stream.name: [Predictions(nll[i, s], best[i, s], kl[i, s] if i else None) for s in layouts[-1].scored]
        for i, stream in enumerate(streams)
    }


def _gather(states: StreamStates, rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """States of these rows [n, H], reading runs of neighbours at once."""
    order = np.argsort(rows, kind="stable")
    parts = []
    for run in np.split(order, np.flatnonzero(np.diff(rows[order]) > _GAP) + 1):
        first, last = int(rows[run[0]]), int(rows[run[-1]])
        block = states.read(slice(first, last + 1), device)
        parts.append(block[torch.from_numpy(rows[run] - first).to(device)])
    back = torch.from_numpy(np.argsort(order)).to(device)
    return torch.cat(parts)[back]


class _Ticks:
    """Tells progress the bytes of a layer in shares, as its tokens pass."""

    def __init__(self, progress: Progress, total: int, tokens: int) -> None:
        self._progress, self._total, self._tokens = progress, total, max(1, tokens)
        self._seen = self._told = 0

    def add(self, tokens: int) -> None:
        self._seen += tokens
        self._tell(self._total * self._seen // self._tokens)

    def rest(self) -> None:
        self._tell(self._total)

    def _tell(self, bytes_now: int) -> None:
        self._progress.advance(bytes_now - self._told)
        self._told = bytes_now
