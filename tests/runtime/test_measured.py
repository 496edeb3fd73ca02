"""Measured speeds: the file says what it measured, its bounds are computed again, and what is wrong with it is said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from m3quant.errors import NodeError
from m3quant.runtime.cost import decode_bound, decode_speed
from m3quant.runtime.measured import MeasuredSet, measured_sets, read_measured
from tests.support.runtime.speeds import fit_of


@pytest.mark.parametrize("known", measured_sets(), ids=lambda known: known.recipe)
def test_every_bound_is_the_one_computed(known: MeasuredSet) -> None:
    fit = fit_of(known.model_type, known.recipe, f"{known.gpus}x{known.gpu}")
    assert fit.model.stored_bytes == known.stored_bytes and "vLLM" in known.source and "2026" in known.source
    for requests, context, speed, bound in known.figures:
        assert decode_bound(fit, context, requests) == pytest.approx(bound, abs=0.05)
        assert 0.1 < speed / bound < 1  # a figure above what the bandwidth allows would be of something else
        found = decode_speed(fit, context, requests)
        assert found.low <= speed <= found.high


GOOD = {
    "model_type": "minimax_m2", "recipe": "awq", "weights": "int", "stored_bytes": 1, "gpu": "H200", "gpus": 1, "source": "vLLM", "figures": [[1, 1, 1.0, 2.0]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("document", "key"),
    [
        ({"sets": [GOOD], "version": 2}, "version"),
        ({"sets": [{**GOOD, "version": "0.34"}]}, "sets.0.version"),
        ({"sets": [{**GOOD, "figures": [[0, 1, 1.0, 2.0]]}]}, "sets.0.figures.0.0"),
        ({"sets": [{**GOOD, "figures": [[1, 1, 1.0]]}]}, "sets.0.figures.0.3"),
        ({"sets": [{**GOOD, "figures": []}]}, "sets.0.figures"),
        ({"sets": [{**GOOD, "figures": [[1, 1, 2.1, 2.0]]}]}, "sets.0.figures"),
        ({"sets": [{**GOOD, "gpu": "h200"}]}, "sets.0.gpu"),
        ({"sets": [{**GOOD, "stored_bytes": 0}]}, "sets.0.stored_bytes"),
        ({}, "sets"),
        ([], "the whole"),
    ],
)
def test_a_file_that_is_wrong_is_told_by_its_key(document: Any, key: str, tmp_path: Path) -> None:
    path = tmp_path / "measured.yaml"
    path.write_text(json.dumps({"sets": [GOOD]}))
    assert len(read_measured(path)) == 1
    path.write_text(json.dumps(document))
    with pytest.raises(NodeError, match=f"measured speeds .*, key '{re.escape(key)}': .*bench_gpu_table --yaml"):
        read_measured(path)
