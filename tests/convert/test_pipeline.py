"""The data-free pipeline: batches tile the shard, and whatever their size, the bytes are those of the general path."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from m3quant.checkpoint import entry_bytes
from m3quant.convert import pipeline
from m3quant.convert.pipeline import Buffers
from m3quant.convert.units import quantize_tensor
from m3quant.errors import CheckpointError
from m3quant.planning.batches import COPY, FUSED, WHOLE, make_batches, output_ranges, working_bytes
from m3quant.planning.plan import Plan
from m3quant.quant.reading import SourceReader
from m3quant.running.progress import Silent
from tests.support.convert.common import bits, config_of, make_plan_of, make_source, rewrite, run_plan, stored
from tests.support.convert.sources import quantized_source

LIMITS = [20_000, 300_000, 1 << 30]


def plainly(plan: Plan) -> dict[str, torch.Tensor]:
    """Every output tensor by the general path, one source tensor after the other."""
    reader, out = SourceReader(plan.checkpoint, plan.sources), {}
    for tensor in plan.tensors:
        out.update(quantize_tensor(reader, tensor, plan.recipe.format, torch.device("cpu")))
    return out


def assert_same(output: Path, expected: dict[str, torch.Tensor]) -> None:
    found = stored(output)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and bits(found[name]) == bits(tensor), name


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(("family", "recipe"), [("m2", "int4"), ("m2", "fp8-block"), ("m3", "fp8")])
def test_batches_tile_the_shard_in_order(tmp_path: Path, family: str, recipe: str, limit: int) -> None:
    plan = make_plan_of(make_source(tmp_path / "src", family), recipe)
    for unit in plan.units:
        offset, read, ended = 0, 0, 0
        for batch in make_batches(unit, limit, plan.recipe.format):
            assert batch.offset == offset
            assert len(batch.items) == 1 or max(batch.bytes_in, batch.bytes_out) <= limit
            offset += batch.bytes_out
            read += batch.bytes_in
            ended += sum(item.ends for item in batch.items)
        assert offset == sum(entry_bytes(entry) for entry in unit.entries)
        assert read == unit.bytes_in and ended == len(unit.entries)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(("family", "recipe"), [("m2", "int4"), ("m2", "fp8-block"), ("m3", "fp8")])
def test_any_batch_size_writes_the_bytes_of_the_general_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, recipe: str, limit: int
) -> None:
    plan = make_plan_of(make_source(tmp_path / "src", family), recipe)
    monkeypatch.setattr(pipeline, "CPU_BATCH_BYTES", limit)
    progress = Silent()
    run_plan(plan, tmp_path / "out", progress=progress)
    assert progress.done == sum(unit.bytes_in for unit in plan.units)
    assert_same(tmp_path / "out", plainly(plan))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("settings", [[], ["attention=keep"]], ids=["all", "attention-kept"])
@pytest.mark.parametrize(
    ("kind", "family", "recipe"), [("fp8", "m2", "int4"), ("fp8", "m2", "fp8"), ("mxfp8", "m3", "int4")]
)
def test_an_fp8_source_is_rounded_from_buffer_to_buffer_too(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    family: str,
    recipe: str,
    settings: list[str],
    limit: int,
) -> None:
    """Its scales lie in a shard of their own; a projection that is kept becomes BF16."""
    bf16 = make_source(tmp_path / "src", family)
    source, _ = quantized_source(bf16, tmp_path / "quantized", kind, scales_apart=True)
    plan = make_plan_of(source, recipe, settings)
    monkeypatch.setattr(pipeline, "CPU_BATCH_BYTES", limit)
    items = [i for unit in plan.units for b in make_batches(unit, limit, plan.recipe.format) for i in b.items]
    assert {item.kind for item in items} == {COPY, FUSED}
    assert ("dequantize" in {item.planned.action for item in items}) == bool(settings)
    progress = Silent()
    run_plan(plan, tmp_path / "out", progress=progress)
    assert progress.done == sum(unit.bytes_in for unit in plan.units)
    assert_same(tmp_path / "out", plainly(plan))


@pytest.mark.parametrize("settings", [[], ["routed_experts=keep"]], ids=["quantized", "kept"])
def test_a_nan_in_an_fp8_source_is_told_by_tensor(tmp_path: Path, settings: list[str]) -> None:
    source, _ = quantized_source(make_source(tmp_path / "src", "m2"), tmp_path / "quantized", "fp8")
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    tensors = stored(source)
    tensors[name].view(torch.uint8)[-1, -1] = 0x7F
    plan = make_plan_of(rewrite(tmp_path / "bad", tensors, config_of(source)), "fp8", settings)
    with pytest.raises(CheckpointError, match=rf"NaN/Inf in {name}: 1 of"):
        run_plan(plan, tmp_path / "out")


def test_a_shard_in_another_order_than_its_plan_is_written_all_the_same(tmp_path: Path) -> None:
    """Three odd bytes before wider tensors force the widest dtypes first."""
    folder = make_source(tmp_path / "src", "m2")
    tensors = {**stored(folder), "model.layers.0.aaa_odd": torch.tensor([1, 2, 3], dtype=torch.uint8)}
    plan = make_plan_of(rewrite(tmp_path / "odd", tensors, config_of(folder)), "int4")
    unit = plan.units[1]
    assert [e[0] for e in unit.entries] != [o.name for t in unit.tensors for o in t.outputs]
    assert {i.kind for b in make_batches(unit, 1 << 20, plan.recipe.format) for i in b.items} == {WHOLE}
    run_plan(plan, tmp_path / "out")
    assert_same(tmp_path / "out", plainly(plan))


@pytest.mark.parametrize("where", ["model.embed_tokens.weight", "model.layers.1.block_sparse_moe.experts.2.w2.weight"])
def test_a_nan_in_the_middle_of_a_run_is_told_by_tensor_and_leaves_finished_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    folder = make_source(tmp_path / "src", "m2")
    tensors = stored(folder)
    tensors[where][-1, -1] = float("nan")
    plan = make_plan_of(rewrite(tmp_path / "bad", tensors, config_of(folder)), "int4")
    monkeypatch.setattr(pipeline, "CPU_BATCH_BYTES", 4096)
    with pytest.raises(CheckpointError, match=rf"NaN/Inf in {where}: 1 of {tensors[where].numel()}"):
        run_plan(plan, tmp_path / "out")
    left = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    done = 0 if "embed" in where else 2
    assert left == [unit.shard for unit in plan.units[:done]]
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_buffers_in_use_are_never_handed_out_twice_and_stay_few() -> None:
    buffers = Buffers(pinned=False)
    held = [buffers.take(size) for size in (10, 1000, 100)]
    assert len({b.data_ptr() for b in held}) == 3
    for buffer in held:
        buffers.give(buffer)
    again = buffers.take(90)
    assert again.numel() == 100
    large = buffers.take(5000)  # in place of the largest free one
    assert large.numel() == 5000
    assert buffers.take(1).numel() == 10 and buffers.take(7).numel() == 7


def test_the_estimate_counts_one_read_buffer_a_worker_and_one_write_buffer_a_batch_in_flight(tmp_path: Path) -> None:
    plan = make_plan_of(make_source(tmp_path / "src", "m2"), "int4")
    taken = [working_bytes(plan.units, False, plan.recipe.format, workers).host for workers in (1, 2, 3)]
    assert taken[2] - taken[1] == taken[1] - taken[0] > 0


def test_output_ranges_follow_one_another(tmp_path: Path) -> None:
    plan: Any = make_plan_of(make_source(tmp_path / "src", "m2"), "int4")
    items = [i for b in make_batches(plan.units[1], 1 << 30, plan.recipe.format) for i in b.items if i.kind == FUSED]
    for item in items:
        ranges = output_ranges(item, 24)
        assert ranges[0][0] == 24 and ranges[-1][1] == 24 + item.bytes_out
        assert all(a[1] == b[0] for a, b in pairwise(ranges))
