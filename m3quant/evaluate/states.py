"""Hidden states of one stream between two layers: on the device, in host memory, or on the disk, and saved either way.

The output of a layer is written to the file from which the next layer would start, by a thread, while the layer is computed;
so a killed run continues with the layer it was in. States that are kept on the disk are read from the last such file.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ..artifact.reread import states_digest
from ..calibration.boundary import disk_errors
from ..calibration.stream import HiddenStates
from ..checkpoint import sync_folder
from ..checkpoint.system import free_memory
from ..errors import CalibrationError, EvaluationError, StoppedError
from ..running.device import device_memory

PLACES = ("auto", "device", "host", "disk")
DISK_MARGIN = 64 * 2**20
_QUEUED = 2  # batches waiting to be written, in addition to the one being computed


class StreamStates:
    """States [T, H] of one stream. `read` gives the current layer's input, `write` takes its output.

    place: "device", "host" or "disk". stem(layer) names the file with the input of `layer`; None keeps nothing on the
    disk, and a killed run starts again.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        place: str,
        folder: Path | None,
    ) -> None:
        if folder is None and place == "disk":
            raise ValueError("states on the disk need a folder")
        self.name, self.shape, self.dtype = name, (shape[0], 1, shape[1]), dtype
        self.saved: dict[str, str] = {}  # file name -> digest of the output that `finish` put on the disk last
        self._folder, self._layer = folder, 0
        self._live: HiddenStates | None = None
        if place != "disk":
            self._live = HiddenStates.empty(self.shape, dtype, device if place == "device" else "cpu")
        self._input: HiddenStates | None = None
        self._output: HiddenStates | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix=f"save-{name}")
        self._pending: deque[Future[None]] = deque()

    def begin(self, layer: int) -> None:
        """What is written from now on is the output of the layer before `layer` (or the embeddings, for 0)."""
        self._layer = layer
        if self._folder is not None and (layer > 0 or self._live is None):
            with disk_errors():
                self._output = HiddenStates.empty(self.shape, self.dtype, spill=self._path(layer))

    def restore(self, layer: int) -> None:
        """Take up the saved input of `layer`. Raises EvaluationError if it is gone or of another size."""
        path = self._path(layer)
        if not path.exists():
            raise EvaluationError(f"{path} is missing: remove {path.parent} to start this evaluation again.")
        self._layer = layer
        with disk_errors():
            try:
                self._input = HiddenStates.opened(path, self.shape, self.dtype)
            except CalibrationError as error:
                raise EvaluationError(f"{error}: remove {path.parent} to start this evaluation again.") from None
            if self._live is not None:
                for tokens in self._input.batches(1 << 14):
                    self._live.write(tokens, self._input.read(tokens))
                self._input.close()
                self._input = None

    def read(self, tokens: slice, device: torch.device) -> torch.Tensor:
        """States [n, H] on `device`; do not write into them."""
        source = self._live if self._live is not None else self._input
        assert source is not None
        return source.read(tokens, device)[:, 0]

    def write(self, tokens: slice, values: torch.Tensor) -> None:
        """Store [n, H]. The values must not be changed afterwards: they may be saved later."""
        values = values[:, None]
        if self._live is not None:
            self._live.write(tokens, values)
        if self._output is not None:
            self._pending.append(self._writer.submit(self._output.write, tokens, values))
            while len(self._pending) > _QUEUED:
                self._wait_one()

    def finish(self) -> None:
        """The layer is through: its output is on the disk, and is what `read` gives from now on."""
        while self._pending:
            self._wait_one()
        if self._output is not None:
            with disk_errors():
                self._output.sync()
                sync_folder(self._path(self._layer).parent)
                self.saved = {self._path(self._layer).name: states_digest(self._path(self._layer))}
            if self._live is None:
                if self._input is not None:
                    self._input.close()
                self._input = self._output
            else:
                self._output.close()
            self._output = None

    def drop(self, layer: int) -> None:
        """Remove the saved input of `layer`, once a record says that the next one is in place."""
        if self._folder is not None:
            self._path(layer).unlink(missing_ok=True)

    def close(self) -> None:
        self._writer.shutdown(wait=True, cancel_futures=True)
        for states in (self._input, self._output):
            if states is not None:
                states.close()

    def _wait_one(self) -> None:
        with disk_errors():
            self._pending.popleft().result()

    def _path(self, layer: int) -> Path:
        assert self._folder is not None
        return self._folder / f"states-{layer:05d}-{self.name}.states"


@dataclass(frozen=True)
class Placement:
    """Where the hidden states go, and the sentence that says so."""

    place: str
    sentence: str


def place_states(
    wanted: str,
    sizes: Sequence[int],
    shape_text: str,
    reserve: int,
    device: torch.device,
    folder: Path | None,
) -> Placement:
    """Choose device, host or disk for streams of these bytes, before anything is computed.

    reserve: bytes that weights and activations need in addition to them on the device (on the host, without a GPU). Raises
    EvaluationError or StoppedError if they fit nowhere.
    """
    need = sum(sizes)
    free_device = device_memory(device)[0] - reserve if device.type == "cuda" else -1
    free_host = free_memory() - (0 if device.type == "cuda" else reserve)
    if wanted == "auto":
        wanted = "device" if need <= free_device else "host" if need <= free_host else "disk"
    if wanted == "device" and device.type != "cuda":
        wanted = "host"
    if wanted == "disk" and folder is None:
        raise EvaluationError(
            f"hidden states take {need / 1e9:.1f} GB, more than is free in memory: give a folder for them with --report."
        )
    saved = 2 * need if folder is not None else 0  # a layer's input goes only when its output is in place
    where = {"device": f"on {device}", "host": "in host memory", "disk": f"on the disk in {folder}"}[wanted]
    sentence = f"hidden states: {shape_text} = {_gigabytes(need)}, {where}"
    if folder is not None:
        _check_disk(folder, saved)
        sentence += f"; saved after every layer, up to {_gigabytes(saved)} in {folder}"
    return Placement(wanted, sentence)


def _check_disk(folder: Path, need: int) -> None:
    present = sum(p.stat().st_size for p in folder.glob("*.states")) if folder.exists() else 0
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if need + DISK_MARGIN > free + present:
        raise StoppedError(
            f"the disk of {existing} has {free / 1e9:.1f} GB free, but hidden states need {need / 1e9:.1f} GB of it to "
            "survive an interruption: free some, or choose another folder with --report. Nothing was changed."
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
