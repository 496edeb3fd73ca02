"""Run a whole model one decoder layer at a time: hidden states stay in memory, weights are streamed.

A `source` is anything with `.config` (the original config.json dict), `.tensors` (a container of on-disk names) and
`.read_many(names) -> {name: tensor}`, dequantized if it is stored in FP8. Host memory holds at most two layers (one in
use, one being read), a GPU one layer, the hidden states (unless spilled) and the activations of one micro-batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F

from m3quant.calibration.head import Head, head_nll
from m3quant.calibration.joined import batches, joined, rows_at
from m3quant.calibration.layers import Layer
from m3quant.calibration.ranks import ALONE, Ranks
from m3quant.errors import CalibrationError, CheckpointError
from m3quant.families import family_of
from m3quant.planning.calibration_text import WindowGroup
from m3quant.running import steps
from m3quant.schemes import Scheme

Key = TypeVar("Key")
Value = TypeVar("Value")
Progress = Callable[[int, int], None]


class Source(Protocol):
    """A checkpoint to stream from (m3quant.checkpoint.Checkpoint, or a wrapper that dequantizes it)."""

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def tensors(self) -> Iterable[str]: ...

    def read_many(self, names: Sequence[str]) -> dict[str, torch.Tensor]: ...


class HiddenStates:
    """Windows of hidden states [S, L, H], in memory (any device) or spilled to one file; read and written by window.

    A spilled one uses plain reads and writes, not a memory map: the memory it takes is one micro-batch, and a full disk
    is an OSError rather than a killed process. It holds an open file: close it, or use it in a `with`.
    """

    def __init__(self, data: torch.Tensor) -> None:
        if data.dim() != 3:
            raise ValueError(f"hidden states are [S, L, H], not {tuple(data.shape)}")
        self.shape: tuple[int, int, int] = (data.shape[0], data.shape[1], data.shape[2])
        self.dtype = data.dtype
        self.path: Path | None = None
        self.groups: tuple[WindowGroup, ...] = ()  # rows that are joined to longer windows; (): none is
        self._data: torch.Tensor | None = data
        self._file = -1

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int, int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        spill: Path | None = None,
    ) -> HiddenStates:
        """Room for [S, L, H]: on `device`, or in the new file `spill` (its folder is made; OSError on a full disk)."""
        if spill is None:
            return cls(torch.empty(shape, dtype=dtype, device=device))
        return cls._spilled(spill, shape, dtype, create=True)

    @classmethod
    def opened(cls, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> HiddenStates:
        """A file that an earlier run spilled; CalibrationError if its size is not that of shape and dtype."""
        return cls._spilled(path, shape, dtype, create=False)

    @classmethod
    def _spilled(cls, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, create: bool) -> HiddenStates:
        states = cls(torch.empty(shape, dtype=dtype, device="meta"))
        size = shape[0] * shape[1] * shape[2] * dtype.itemsize
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        elif path.stat().st_size != size:
            raise CalibrationError(f"spilled activations {path} hold {path.stat().st_size} bytes, not {size}")
        states._data, states.path = None, path
        states._file = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_TRUNC if create else 0), 0o644)
        if create:
            # Reserves the blocks now, so that a disk too small is found before any computing.
            os.posix_fallocate(states._file, 0, max(size, 1))
            os.ftruncate(states._file, size)
        return states

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2] * self.dtype.itemsize

    @property
    def on_gpu(self) -> bool:
        return self._data is not None and self._data.is_cuda

    def read(self, windows: slice, device: torch.device | str | None = None) -> torch.Tensor:
        """Windows [n, L, H]; a copy, except that of states in memory on the same device (do not write into it)."""
        if self._data is not None:
            return self._data[windows].to(device or self._data.device)
        start, stop, _ = windows.indices(self.shape[0])
        out = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)
        self._transfer(os.preadv, out, start)
        return out.to(device or "cpu")

    def write(self, windows: slice, values: torch.Tensor) -> None:
        """Store windows [n, L, H], converted to this dtype and device."""
        if self._data is not None:
            self._data[windows] = values.to(self._data.device, self.dtype)
            return
        start, stop, _ = windows.indices(self.shape[0])
        if tuple(values.shape) != (stop - start, *self.shape[1:]):
            raise ValueError(f"windows {start}..{stop} of {self.shape} cannot take {tuple(values.shape)}")
        self._transfer(os.pwritev, values.detach().to("cpu", self.dtype).contiguous(), start)

    def batches(self, micro_batch: int) -> Iterator[slice]:
        """Slices of at most micro_batch windows, or of one that is longer, that cover all of them in order."""
        yield from batches(self.shape[0], micro_batch, self.groups)

    def sync(self) -> None:
        """Force spilled states to the disk, so that a journal may point at them."""
        if self._file >= 0:
            os.fsync(self._file)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _transfer(self, call: Callable[[int, list[memoryview], int], int], tensor: torch.Tensor, window: int) -> None:
        view = tensor.view(-1).view(torch.uint8).numpy().data
        offset = window * self.shape[1] * self.shape[2] * self.dtype.itemsize
        done = 0
        while done < len(view):
            count = call(self._file, [view[done:]], offset + done)
            if count == 0:
                raise CalibrationError(f"spilled activations {self.path} end early; delete the file and run again")
            done += count


class Prefetcher(Generic[Key, Value]):
    """Iterate load(key) for each key in order, loading the next on a thread while the caller uses the current one.

    At most two values are alive: the caller's and the one being read. An exception in `load` is raised where its value
    would have been returned. Leaving the `with` waits for the read in flight and drops the rest.
    """

    def __init__(self, load: Callable[[Key], Value], keys: Iterable[Key]) -> None:
        self._load = load
        self._keys = iter(keys)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._next: Future[Value] | None = None
        self._advance()

    def _advance(self) -> None:
        try:
            key = next(self._keys)
        except StopIteration:
            self._next = None
        else:
            self._next = self._pool.submit(self._load, key)

    def __iter__(self) -> Iterator[Value]:
        return self

    def __next__(self) -> Value:
        if self._next is None:
            raise StopIteration
        value = self._next.result()
        self._advance()
        return value

    def close(self) -> None:
        """Idempotent; returns when no read is running."""
        self._next = None
        self._keys = iter(())
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Prefetcher[Key, Value]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_layer(source: Source, index: int) -> dict[str, torch.Tensor]:
    """All tensors of one layer, names relative to its prefix."""
    prefix = family_of(source.config).layer_prefix(index)
    names = [name for name in source.tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensor for name, tensor in source.read_many(names).items()}


def embed(tokens: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Token embeddings: tokens [S, L] int64, table [V, H] -> [S, L, H] in table's dtype, on table's device.

    Raises CalibrationError for a token that the table does not have.
    """
    low, high = (int(tokens.min()), int(tokens.max())) if tokens.numel() else (0, 0)
    if low < 0 or high >= table.shape[0]:
        raise CalibrationError(
            f"token ids run from {low} to {high}, but the model embeds {table.shape[0]} tokens; the tokenizer belongs "
            "to another model"
        )
    return F.embedding(tokens.to(table.device), table)


def read_embeddings(source: Source) -> torch.Tensor:
    """The token embedding table [V, H] as stored."""
    return _read_one(source, family_of(source.config).embedding_name)


def embed_source(
    source: Source,
    tokens: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    spill: Path | None = None,
) -> HiddenStates:
    """The input of layer 0 for tokens [S, L], in `dtype`; in memory on `device`, or spilled to a file."""
    table = read_embeddings(source)
    states = HiddenStates.empty((tokens.shape[0], tokens.shape[1], table.shape[1]), dtype, device, spill)
    for windows in states.batches(16):
        states.write(windows, embed(tokens[windows].cpu(), table))
    return states


def read_head(source: Source, device: torch.device | str = "cpu") -> Head:
    """The final norm and lm_head, which is the embedding table where the two are tied."""
    family = family_of(source.config)
    name = family.embedding_name if family.tied else family.head_name
    norm = _read_one(source, family.final_norm_name).to(device)
    return Head(norm, _read_one(source, name).to(device), family.eps, family.norm_one_plus)


def _read_one(source: Source, name: str) -> torch.Tensor:
    if name not in set(source.tensors):
        raise CheckpointError(f"tensor {name} is missing; the checkpoint is incomplete")
    return source.read_many([name])[name]


def run_layer(
    layer: Layer,
    states: HiddenStates,
    micro_batch: int,
    reference: HiddenStates | None = None,
    ranks: Ranks = ALONE,
) -> float | None:
    """Put every window through the layer, in place. With a reference, return ||states - reference|| / ||reference||.

    reference: another stream's output of the same layer, same shape; the norms are over all windows. ranks: processes that
    share the micro-batches and all hold the same states. Raises CalibrationError if an output is not finite.
    """
    error = norm = 0.0

    def forward(part: slice) -> torch.Tensor:
        x = states.read(part, layer.device)
        return layer.forward(joined(x, rows_at(states.groups, part.start))).view(x.shape)

    for windows, out in ranks.each(forward, states.batches(micro_batch)):
        if not bool(torch.isfinite(out).all()):
            raise CalibrationError(
                f"layer {layer.spec.index} gives NaN or Inf on windows {windows.start}..{windows.stop - 1}; look for "
                "non-finite weights in it, or use a compute dtype of wider range"
            )
        states.write(windows, out)
        steps.part(windows.stop, states.shape[0])
        if reference is not None:
            expected = reference.read(windows, layer.device).double()
            error += float((out.double() - expected).square().sum())
            norm += float(expected.square().sum())
    return None if reference is None else (error / norm) ** 0.5 if norm else float(error > 0)


def nll(
    source: Source,
    tokens: torch.Tensor,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    micro_batch: int = 4,
    spill: Path | None = None,
    progress: Progress | None = None,
    schemes: Callable[[int], Mapping[str, Scheme]] | None = None,
) -> torch.Tensor:
    """Negative log-likelihood (nats) of tokens [S, L] under the source -> [S, L - 1] float32, entry t for token t + 1.

    The source is streamed once. dtype: compute dtype of the layers and of the residual stream (float32 on the CPU,
    bfloat16 on a GPU if None). spill: a file for the hidden states, removed at the end. progress(done, layers).
    schemes(layer): by relative weight name; activations are rounded as an engine does for weights of these schemes.
    """
    family = family_of(source.config)
    layers = family.num_layers
    dtype = dtype or _default_dtype(device)
    states = embed_source(source, tokens, dtype, device, spill)
    try:
        with Prefetcher(lambda index: read_layer(source, index), range(layers)) as loaded:
            for index, tensors in enumerate(loaded):
                layer = Layer(family.layer(index), tensors, device, dtype)
                layer.round_activations(schemes(index) if schemes else {})
                run_layer(layer, states, micro_batch)
                if progress:
                    progress(index + 1, layers)
        return head_nll(read_head(source, device), states, tokens)
    finally:
        _discard(states)


def _default_dtype(device: torch.device | str) -> torch.dtype:
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def _discard(states: HiddenStates) -> None:
    states.close()
    if states.path:
        states.path.unlink(missing_ok=True)
