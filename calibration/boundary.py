"""Hidden states of both streams between two layers: in use while converting, and saved so that a killed run continues exactly.

Recomputing them instead would not give the same bits on another batch size or device, and would cost the whole prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import xxhash

from ..checkpoint import sync_folder
from ..checkpoint.reader import bytes_view
from ..errors import CalibrationError, StoppedError
from ..planning.calibration_text import WindowGroup
from .joined import batches
from .stream import HiddenStates, embed_source

if TYPE_CHECKING:
    from ..quant.reading import SourceReader

STREAMS = ("source", "quantized")
_COPY_WINDOWS = 16


class WindowView:
    """Some windows of hidden states, read-only: what is calibrated on, and what is held out."""

    def __init__(self, states: HiddenStates, start: int, stop: int) -> None:
        self._states, self._start = states, start
        self.shape: tuple[int, int, int] = (stop - start, states.shape[1], states.shape[2])
        own = (group for group in states.groups if start <= group.start < stop)
        self.groups = tuple(replace(group, start=group.start - start) for group in own)
        self.dtype = states.dtype

    def read(self, windows: slice, device: torch.device | str | None = None) -> torch.Tensor:
        start, stop, _ = windows.indices(self.shape[0])
        return self._states.read(slice(self._start + start, self._start + stop), device)

    def batches(self, micro_batch: int) -> Iterator[slice]:
        yield from batches(self.shape[0], micro_batch, self.groups)


@dataclass
class Streams:
    """The source model's and the quantized model's hidden states [S, L, H] entering one layer."""

    source: HiddenStates
    quantized: HiddenStates

    def join(self, groups: tuple[WindowGroup, ...]) -> None:
        """From here on, attention treats some rows as one window (`joined`)."""
        self.source.groups = self.quantized.groups = groups

    @classmethod
    def embedded(
        cls, reader: SourceReader, tokens: torch.Tensor, dtype: torch.dtype, device: torch.device, spill: Path | None
    ) -> Streams:
        """Both streams at the first layer: the token embeddings, which stay unquantized."""
        with disk_errors():
            return cls(*(embed_source(reader, tokens, dtype, device, _file(spill, name)) for name in STREAMS))

    @classmethod
    def restored(
        cls, saved: Path, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, spill: Path | None
    ) -> Streams:
        """The streams that `save` wrote under the stem `saved`. Raises CalibrationError if they are not of this shape."""
        streams = []
        for name in STREAMS:
            path = _saved(saved, name)
            over = "the run cannot go on from its last layer; remove the output and start again."
            if not path.exists():
                raise CalibrationError(f"{path} is missing: {over}")
            try:
                with disk_errors():
                    stored = HiddenStates.opened(path, shape, dtype)
            except CalibrationError as error:
                raise CalibrationError(f"{error}: {over}") from None
            with disk_errors(), stored:
                live = HiddenStates.empty(shape, dtype, device, _file(spill, name))
                _copy(stored, live)
            streams.append(live)
        return cls(*streams)

    def save(self, stem: Path) -> dict[str, str]:
        """Write both streams next to the journal and sync them; a journal record then points at them.

        Returns file name -> xxh3_128 (hex) of its bytes.
        """
        digests = {}
        for name, states in zip(STREAMS, (self.source, self.quantized), strict=True):
            path, digest = _saved(stem, name), xxhash.xxh3_128()
            with disk_errors(), HiddenStates.empty(states.shape, states.dtype, spill=path) as stored:
                for windows in states.batches(_COPY_WINDOWS):
                    values = states.read(windows, "cpu").contiguous()
                    digest.update(bytes_view(values))
                    stored.write(windows, values)
                stored.sync()
            digests[path.name] = digest.hexdigest()
        with disk_errors():
            sync_folder(stem.parent)
        return digests

    def snapshot(self) -> Streams:
        """A copy in host memory of streams that are in memory, to be saved while these move on."""
        copies = []
        for states in (self.source, self.quantized):
            data = states.read(slice(None))
            host = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda)
            copies.append(HiddenStates(host.copy_(data, non_blocking=True)))
        if self.source.on_gpu:
            torch.cuda.current_stream().synchronize()
        return Streams(*copies)

    def close(self) -> None:
        self.source.close()
        self.quantized.close()


def drop_other(stem: Path) -> None:
    """Remove every saved boundary of the folder but the one under `stem`."""
    kept = {_saved(stem, name).name for name in STREAMS}
    for path in sorted(stem.parent.glob("boundary-*.states")):
        if path.name not in kept:
            path.unlink()


def _saved(stem: Path, name: str) -> Path:
    return stem.with_name(f"{stem.name}-{name}.states")


def _file(spill: Path | None, name: str) -> Path | None:
    return spill / f"live-{name}.states" if spill else None


def _copy(source: HiddenStates, target: HiddenStates) -> None:
    for windows in source.batches(_COPY_WINDOWS):
        target.write(windows, source.read(windows))


class disk_errors:
    """A full disk while spilling or saving becomes a resumable stop."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise StoppedError(
                f"hidden states cannot be saved: {error.strerror or error}. Free space and run the same command again."
            ) from error
