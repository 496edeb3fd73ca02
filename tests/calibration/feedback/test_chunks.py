"""How many experts are in work together on a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest

from m3quant.calibration.feedback import mlp
from m3quant.calibration.feedback.mlp import MlpQuantizer, experts_at_once
from m3quant.calibration.ranks import Ranks
from m3quant.planning.quantizers import FEEDBACK_CHUNK_BYTES, feedback_chunks

M2, M3 = (256, 3072, 1536), (128, 6144, 3072)  # experts, hidden, intermediate


@pytest.mark.parametrize(("shape", "experts", "at_once"), [(M2, 16, 2), (M3, 4, 1), ((64, 16384, 8192), 1, 1)])
def test_chunks_take_the_room_that_two_layers_leave(shape: tuple[int, int, int], experts: int, at_once: int) -> None:
    assert experts_at_once(*shape, FEEDBACK_CHUNK_BYTES) == experts
    assert feedback_chunks(*shape) == at_once


@pytest.mark.parametrize(("ranks", "groups"), [(1, 8), (4, 8), (8, 8), (16, 16), (24, 16)])
def test_no_rank_has_two_chunks_while_another_has_none(
    ranks: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer: Any = object.__new__(MlpQuantizer)
    quantizer.layer = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    quantizer.settings = SimpleNamespace(ranks=Ranks(size=ranks))
    monkeypatch.setattr(mlp, "feedback_chunks", lambda *shape: 2)
    monkeypatch.setattr(MlpQuantizer, "_routed_shape", lambda self: M2)
    monkeypatch.setattr(MlpQuantizer, "_chunks", lambda self: [[number] for number in range(16)])
    together = quantizer._chunks_together()
    assert len(together) == groups
    assert [number for chunks in together for (number,) in chunks] == list(range(16))
