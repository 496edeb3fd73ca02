"""Windows of several lengths in one grid: attention sees them whole, everything else sees rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from m3quant.calibration.boundary import WindowView
from m3quant.calibration.feedback.quantizer import FeedbackQuantizer
from m3quant.calibration.feedback.settings import FeedbackSettings
from m3quant.calibration.joined import batches, joined, rows_at
from m3quant.calibration.layers import Layer, layer_shapes, layer_spec
from m3quant.calibration.mixture import deal
from m3quant.calibration.stream import HiddenStates, embed_source, read_layer, run_layer
from m3quant.checkpoint import Checkpoint
from m3quant.errors import RecipeError
from m3quant.planning.calibration_text import WindowGroup, run_groups
from m3quant.quant.reading import SourceReader
from m3quant.recipe.recipe import build_recipe, named_recipe
from m3quant.schemes import Scheme
from tests.support.convert.common import make_plan_of, run_convert, same_output
from tests.support.convert.tampering import interrupt
from tests.support.paths import FIXTURES

GROUPS = (WindowGroup(0, 3, 1), WindowGroup(3, 1, 2), WindowGroup(5, 2, 4), WindowGroup(13, 2, 1))


def test_batches_are_of_whole_windows() -> None:
    assert list(batches(5, 2, ())) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    found = list(batches(15, 2, GROUPS))
    assert found == [slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 9), slice(9, 13), slice(13, 15)]
    assert [rows_at(GROUPS, part.start) for part in found] == [1, 1, 2, 4, 4, 1]
    x = torch.randn(8, 3, 5)
    assert joined(x, 4).shape == (2, 12, 5) and joined(x, 4)[1, 3:6].equal(x[5])


def test_rows_of_a_window_come_from_one_source() -> None:
    rows = [1, 1, 1, 1, 4, 4, 4, 4]
    order = deal(20, [0.5, 0.5], rows)
    start = 0
    for size in rows:
        assert len(set(order[start : start + size])) == 1
        start += size
    assert Counter(order.tolist()) == {0: 10, 1: 10}
    assert deal(9, [0.7, 0.3]).tolist() == deal(9, [0.7, 0.3], [1] * 9).tolist()


def stream(name: str, windows: int, length: int) -> tuple[SourceReader, HiddenStates]:
    reader = SourceReader(Checkpoint.open(FIXTURES / name))
    tokens = torch.randint(0, 2000, (windows, length), generator=torch.Generator().manual_seed(1))
    return reader, embed_source(reader, tokens, torch.float32)


@pytest.mark.parametrize("name", ["tiny-m2", "tiny-m3"])
def test_a_layer_sees_joined_rows_as_one_window(name: str) -> None:
    """Past tiny-m3's selection of 512 tokens, where the two differ in what attention reads."""
    index = 1
    reader, states = stream(name, 7, 192)
    states.groups = (WindowGroup(0, 3, 1), WindowGroup(3, 1, 4))
    alone = HiddenStates(states.read(slice(0, 3)).clone())
    whole = HiddenStates(states.read(slice(3, 7)).reshape(1, 768, -1).clone())
    layer = Layer(layer_spec(reader.config, index), read_layer(reader, index), "cpu", torch.float32)
    for one in (states, alone, whole):
        run_layer(layer, one, 2)
    torch.testing.assert_close(states.read(slice(0, 3)), alone.read(slice(None)))
    torch.testing.assert_close(states.read(slice(3, 7)).reshape(1, 768, -1), whole.read(slice(None)))


def test_feedback_on_joined_rows_is_feedback_on_long_windows() -> None:
    index = 1
    reader, states = stream("tiny-m3", 8, 64)
    tensors, spec = read_layer(reader, index), layer_spec(reader.config, index)
    int4 = Scheme("int", 4, 64)
    schemes = {n: int4 for n, shape in layer_shapes(spec).items() if len(shape) == 2 and n.endswith(("_proj.weight", "w1.weight", "w2.weight", "w3.weight"))}  # fmt: skip
    noise = torch.randn(8, 64, spec.hidden_size, generator=torch.Generator().manual_seed(2)) * 0.01
    other = HiddenStates(states.read(slice(None)) + noise)
    states.groups = other.groups = (WindowGroup(0, 2, 4),)
    long = [HiddenStates(s.read(slice(None)).reshape(2, 256, -1).clone()) for s in (other, states)]
    found = []
    for quantized, source in ((other, states), long):
        views = [WindowView(s, 0, len(s)) for s in (quantized, source)]
        found.append(FeedbackQuantizer().quantize(spec, tensors, schemes, *views, FeedbackSettings(), "cpu", torch.float32))  # fmt: skip
    for name, stored in found[0].weights.items():
        same = (stored.codes == found[1].weights[name].codes).float().mean()
        assert same > 0.999, name


def test_a_run_with_mixed_lengths_continues_to_the_same_bytes(tmp_path: Path) -> None:
    source = FIXTURES / "tiny-m3"
    data = {"windows": 24, "window_length": 96, "heldout_windows": 2}
    mixed = {"data": {**data, "lengths": "mixed"}}
    groups = run_groups(make_plan_of(source, **mixed))
    assert groups[-1] == WindowGroup(24, 2, 1)
    assert sum(group.rows * group.windows for group in groups) == 26 and max(group.rows for group in groups) > 1
    run_convert(source, tmp_path / "whole", **mixed)
    interrupt(source, tmp_path / "again", "awq", 2, **mixed)
    run_convert(source, tmp_path / "again", **mixed)
    assert not same_output(tmp_path / "whole", tmp_path / "again")
    run_convert(source, tmp_path / "one", data=data)
    assert same_output(tmp_path / "whole", tmp_path / "one"), "attention read other windows"


def test_other_roundings_refuse_it() -> None:
    with pytest.raises(RecipeError, match="go with rounding: feedback"):
        build_recipe({"name": "x", "rounding": "awq", "schemes": {"routed_experts": "int4-g128"}, "data": {"lengths": "mixed"}})  # fmt: skip
    assert "lengths" not in build_recipe(named_recipe("awq")).dump()
