"""The state of a measuring pass between two layers, and how it is saved so that a killed pass continues from there.

Saved is a folder next to the file that will be written: hidden states of all streams, one file each, and a JSON file that
comes last. A newer state is complete under another name before the older one goes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..calibration.boundary import disk_errors
from ..calibration.stream import HiddenStates
from ..checkpoint import sync_folder, write_json_atomic
from ..checkpoint.bounded import MANIFEST_BYTES, read_json
from ..errors import CheckpointError

RECORDS = "state.json"
_COPY_WINDOWS = 16


@dataclass
class ProbeState:
    """One error that passes through the rest of the model. error: that of the layer's output, see `planning.sensitivity`."""

    layer: int
    role: str
    scheme: str
    error: float
    states: HiddenStates


@dataclass
class PilotState:
    """A whole recipe in progress. layers: role -> scheme, of every layer. others: whether it shows what is left of errors
    outside the bulk of the weights; None: a recipe that is only measured."""

    layers: list[dict[str, str]]
    states: HiddenStates
    others: bool | None


@dataclass
class MeasureState:
    """source: all windows, as a conversion computes them; exact: the held-out ones in float32. errors: of every layer that
    is done, role -> scheme -> error."""

    source: HiddenStates
    exact: HiddenStates
    pilots: list[PilotState]
    probes: list[ProbeState] = field(default_factory=list)
    errors: list[dict[str, dict[str, float]]] = field(default_factory=list)

    def streams(self) -> dict[str, HiddenStates]:
        named = {"source": self.source, "exact": self.exact}
        named |= {f"pilot-{n}": pilot.states for n, pilot in enumerate(self.pilots)}
        return named | {f"probe-{n}": probe.states for n, probe in enumerate(self.probes)}


class SavedState:
    """The folder in which a measuring pass saves its state. identity: everything that the numbers depend on, JSON-able."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, json.loads(json.dumps(identity))
        self._next = folder.with_name(f"{folder.name}.next")

    def save(self, state: MeasureState) -> None:
        """Raises StoppedError where the disk is full; what was saved before stays."""
        with disk_errors():
            shutil.rmtree(self._next, ignore_errors=True)
            self._next.mkdir(parents=True)
            for name, states in state.streams().items():
                with HiddenStates.empty(states.shape, states.dtype, spill=self._next / name) as stored:
                    _copy(states, stored)
                    stored.sync()
            records = {
                "identity": self.identity,
                "errors": state.errors,
                "probes": [
                    {"layer": p.layer, "role": p.role, "scheme": p.scheme, "error": p.error, "windows": len(p.states)}
                    for p in state.probes
                ],
            }
            write_json_atomic(self._next / RECORDS, records)
            sync_folder(self._next)
            shutil.rmtree(self.folder, ignore_errors=True)
            self._next.rename(self.folder)
            sync_folder(self.folder.parent)

    def layers(self) -> int:
        """Layers that are done in what `restore` would restore."""
        records = next(filter(None, map(self._records, (self.folder, self._next))), None)
        return len(records["errors"]) if records else 0

    def restore(self, state: MeasureState, device: torch.device) -> bool:
        """Bring `state`, as it was embedded, to where it was saved last. False, and nothing is changed, if nothing that belongs
        to this measurement was saved."""
        for folder in (self.folder, self._next):
            records = self._records(folder)
            if records is None:
                continue
            with disk_errors():
                for probe in records["probes"]:
                    shape = (probe.pop("windows"), *state.exact.shape[1:])
                    state.probes.append(ProbeState(**probe, states=HiddenStates.empty(shape, torch.float32, device)))
                state.errors = records["errors"]
                for name, states in state.streams().items():
                    with HiddenStates.opened(folder / name, states.shape, states.dtype) as stored:
                        _copy(stored, states)
            return True
        return False

    def _records(self, folder: Path) -> dict[str, Any] | None:
        try:
            records = read_json(folder / RECORDS, MANIFEST_BYTES, "")
        except CheckpointError:
            return None
        return records if records.get("identity") == self.identity else None

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self._next, ignore_errors=True)


def _copy(source: HiddenStates, target: HiddenStates) -> None:
    for windows in source.batches(_COPY_WINDOWS):
        target.write(windows, source.read(windows))
