"""How many experts are in work together on a GPU."""

import pytest

from m3quant.calibration.feedback.mlp import experts_at_once
from m3quant.planning.quantizers import FEEDBACK_CHUNK_BYTES, feedback_chunks

M2, M3 = (256, 3072, 1536), (128, 6144, 3072)  # experts, hidden, intermediate


@pytest.mark.parametrize(("shape", "experts", "at_once"), [(M2, 16, 2), (M3, 4, 1), ((64, 16384, 8192), 1, 1)])
def test_chunks_take_the_room_that_two_layers_leave(shape: tuple[int, int, int], experts: int, at_once: int) -> None:
    assert experts_at_once(*shape, FEEDBACK_CHUNK_BYTES) == experts
    assert feedback_chunks(*shape) == at_once
