"""A task of given sequences, plain references on full logits in float64, and a source folder that can be changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from m3quant.artifact.eval_record import EvalRecord, Result
from m3quant.evaluate.evaluation import Settings, evaluate
from m3quant.evaluate.models import open_model
from m3quant.evaluate.task import Predictions, ScoredSequence
from tests.support.calibration import tiny
from tests.support.convert.common import Silent


class Plain:
    """Asks for given sequences and keeps its predictions for them."""

    kind = "plain"

    def __init__(self, sequences: Sequence[ScoredSequence], noise: Sequence[int] = (), name: str = "plain") -> None:
        self.name = name
        self._sequences, self._noise = sequences, noise
        self.checkpoint: Sequence[Predictions] = ()
        self.source: Sequence[Predictions] | None = None
        self.noise: Sequence[Predictions] = ()

    def sequences(self) -> Sequence[ScoredSequence]:
        return self._sequences

    def noise_sequences(self) -> Sequence[int]:
        return self._noise

    def take_noise(self, predictions: Sequence[Predictions], run: str) -> None:
        self.noise = predictions

    def results(self, checkpoint: Sequence[Predictions], source: Sequence[Predictions] | None) -> list[Result]:
        self.checkpoint, self.source = checkpoint, source
        mean = float(np.concatenate([p.nll for p in checkpoint]).mean())
        return [Result(task=self.name, convention="plain", label="plain", metrics={"nll_mean": mean})]


def sequence(length: int, scored: Sequence[int] | None = None, seed: int = 0, vocab: int = 500) -> ScoredSequence:
    ids = np.random.default_rng([seed, length]).integers(0, vocab, length)
    return ScoredSequence(ids, np.arange(1, length) if scored is None else np.array(scored))


def run(
    checkpoint: Path,
    source: Path | None,
    tasks: Sequence[Any],
    folder: Path | None = None,
    progress: Silent | None = None,
    **settings: Any,
) -> EvalRecord:
    origin = open_model(source, "source") if source else None
    given = Settings(**{"device": "cpu", **settings})
    return evaluate(open_model(checkpoint), origin, tasks, "test", folder, given, progress or Silent())


def changed_copy(source: Path, folder: Path, noise: float, seed: int = 9) -> Path:
    """The same model with every matrix of its layers a little off, deterministically."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    for path in sorted(source.iterdir()):
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
            continue
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.dim() == 2 and ".layers." in name and "gate.weight" not in name:
                off = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * noise
                tensors[name] = (tensor.float() + off).to(tensor.dtype)
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
    return folder


def full_logits(folder: Path, sequences: Sequence[ScoredSequence]) -> list[torch.Tensor]:
    """transformers' eager float32 logits [N, V] that predict the scored tokens of each sequence, as float64."""
    model = tiny.load_reference(folder)
    out = []
    with torch.no_grad():
        for one in sequences:
            logits = model(input_ids=torch.from_numpy(one.ids)[None]).logits[0]
            out.append(logits[torch.from_numpy(one.scored) - 1].double())
    return out


def reference(logits: torch.Tensor, one: ScoredSequence) -> tuple[np.ndarray, np.ndarray]:
    """nll and log-probabilities in float64, from full logits."""
    logp = torch.log_softmax(logits, dim=-1)
    target = torch.from_numpy(one.ids[one.scored])
    return -logp.gather(1, target[:, None])[:, 0].numpy(), logp.numpy()


class StopAfter(Silent):
    """Raises when progress reports a layer."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.left = layers

    def say(self, line: str) -> None:
        super().say(line)
        self.left -= line.startswith("layer")
        if self.left < 0:
            raise KeyboardInterrupt
