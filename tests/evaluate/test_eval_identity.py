"""An interrupted evaluation goes on with the models it was begun with, by content, and with the states it saved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from m3quant.checkpoint import Checkpoint
from m3quant.errors import OutputError
from m3quant.evaluate.evaluation import JOURNAL
from tests.support.calibration import tiny
from tests.support.convert.common import Silent
from tests.support.convert.tampering import edit_unsampled, flip
from tests.support.evaluate.measuring import Plain, StopAfter, changed_copy, run, sequence

TASK = [Plain([sequence(60)])]


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    source = tiny.make_tiny_m2(tmp_path / "source", seed=3, num_local_experts=4, num_hidden_layers=2)
    return changed_copy(source, tmp_path / "checkpoint", 0.02), source


def interrupt(models: tuple[Path, Path], folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(*models, TASK, folder, StopAfter(1))


@pytest.mark.parametrize("which", [0, 1], ids=["checkpoint", "source"])
def test_another_model_is_refused_and_the_same_in_other_files_is_not(
    models: tuple[Path, Path], tmp_path: Path, which: int
) -> None:
    report, label = tmp_path / "report", ("checkpoint", "source")[which]
    interrupt(models, report)
    other = changed_copy(models[1], tmp_path / "other", 0.3, seed=5)
    with pytest.raises(OutputError, match=f"another {label}: model-0000.* holds other weights"):
        run(*(other if i == which else m for i, m in enumerate(models)), TASK, report)
    moved = shutil.copytree(models[which], tmp_path / "moved")
    shard = next(i for n, i in Checkpoint.open(moved).tensors.items() if ".layers.0." in n and "experts" in n)
    edited = shutil.copytree(moved, tmp_path / "edited")
    edit_unsampled(edited, shard.shard, shard.name)
    with pytest.raises(OutputError, match=rf"begun with another {label} \({shard.shard} held other weights"):
        run(*(edited if i == which else m for i, m in enumerate(models)), TASK, report)
    progress = Silent()
    resumed = run(*(moved if i == which else m for i, m in enumerate(models)), TASK, report, progress)
    assert "continuing: 1 of 2 layers are finished" in progress.lines
    assert resumed.results == run(*models, TASK).results


def test_a_flipped_bit_in_saved_states_is_found(models: tuple[Path, Path], tmp_path: Path) -> None:
    interrupt(models, tmp_path / "report")
    path = tmp_path / "report" / JOURNAL / "states-00001-source.states"
    flip(path, 50)
    with pytest.raises(OutputError, match=f"{path.name} is missing or holds other hidden states"):
        run(*models, TASK, tmp_path / "report")
