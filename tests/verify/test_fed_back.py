"""verify on outputs of `rounding: feedback`, whose codes no rule derives one by one: what it passes and what it names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from m3quant.quant.packing import pack_rows, unpack_rows
from m3quant.verify.fed_back import defect
from tests.support.convert.common import make_source, run_convert, stored
from tests.verify.test_verify import Tensors, check, each, first_row_times, swap_rows, tamper

LAYER = "model.layers.1."
EXPERT = f"{LAYER}block_sparse_moe.experts.1."
BITS = (2, 3, 4, 8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source") / "m2", "m2")


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Bits of the routed experts -> output; attention in int8, or FP8 with the experts in 8 bits."""
    folder = tmp_path_factory.mktemp("fed-back")
    for bits in BITS:
        schemes = {"routed_experts": f"int{bits}-g32", "attention": "fp8-channel" if bits == 8 else "int8-g32"}
        run_convert(source, folder / str(bits), "int4", calibration="text", rounding="feedback", schemes=schemes)
    return {bits: folder / str(bits) for bits in BITS}


def corrupt(share: float, bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Every 1 / share-th code, and at least one, replaced by another."""

    def change(packed: torch.Tensor) -> torch.Tensor:
        columns = packed.shape[-1] * 32 // bits
        codes = unpack_rows(packed, bits, columns).flatten()
        step = max(1, round(1 / share))
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        codes[::step] = torch.where(codes[::step] == high, low, codes[::step] + 1)
        return pack_rows(codes.view(-1, columns), bits)

    return change


def one_step(scale: torch.Tensor) -> torch.Tensor:
    """The first scale one BF16 step larger."""
    scale.view(torch.int16).view(-1)[0] += 1
    return scale


@pytest.mark.parametrize("bits", BITS)
def test_what_convert_wrote_passes(made: dict[int, Path], source: Path, bits: int) -> None:
    status, said = check(made[bits], source)
    assert status == 0, said


PACKED = ("weight_packed", "weight_scale")
DAMAGE: list[tuple[str, Callable[[int], Callable[[Tensors], None]]]] = [
    ("w1.weight", lambda bits: each(f"{EXPERT}w1.", swap_rows, *PACKED)),
    ("w2.weight", lambda bits: each(f"{EXPERT}w2.weight_scale", first_row_times(-1))),
    ("w3.weight", lambda bits: each(f"{EXPERT}w3.weight_packed", corrupt(1e-3, bits))),
    ("w1.weight", lambda bits: each(f"{EXPERT}w1.weight_scale", one_step)),
    ("w2.weight", lambda bits: each(f"{EXPERT}w2.weight_scale", lambda scale: scale * 2)),
]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("name", "change"), DAMAGE, ids=["rows swapped", "sign", "codes", "scale step", "scale"])
def test_damage_is_named(
    made: dict[int, Path],
    source: Path,
    tmp_path: Path,
    bits: int,
    name: str,
    change: Callable[[int], Callable[[Tensors], None]],
) -> None:
    status, said = check(tamper(made[bits], tmp_path / "bad", change(bits)), source)
    assert status == 1 and f"tensor '{EXPERT}{name}'" in said, said


@pytest.mark.parametrize("bits", BITS)
def test_an_expert_in_anothers_place(made: dict[int, Path], source: Path, tmp_path: Path, bits: int) -> None:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(EXPERT)]:
            other = name.replace("experts.1.", "experts.2.")
            tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()

    status, said = check(tamper(made[bits], tmp_path / "bad", change), source)
    assert status == 1 and all(f"tensor '{EXPERT}{part}.weight'" in said for part in ("w1", "w2", "w3")), said


@pytest.mark.parametrize("which", ["block_sparse_moe.gate.weight", "post_attention_layernorm.weight"])
def test_a_router_or_norm_that_changed(made: dict[int, Path], source: Path, tmp_path: Path, which: str) -> None:
    status, said = check(tamper(made[4], tmp_path / "bad", each(LAYER + which, lambda t: t * 1.01)), source)
    assert status == 1 and f"tensor '{LAYER}{which}' should be a byte-for-byte copy" in said, said


def test_one_tensor_rounded_from_another_source(made: dict[int, Path], tmp_path: Path, source: Path) -> None:
    other = make_source(tmp_path / "other", "m2", seed=1)
    schemes = {"routed_experts": "int4-g32", "attention": "int8-g32"}
    run_convert(other, tmp_path / "foreign", "int4", calibration="text", rounding="feedback", schemes=schemes)
    theirs = stored(tmp_path / "foreign")

    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(f"{EXPERT}w1.")]:
            tensors[name] = theirs[name].clone()

    status, said = check(tamper(made[4], tmp_path / "bad", change), source)
    assert status == 1 and f"tensor '{EXPERT}w1.weight'" in said, said


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_reader_that_was_not_compensated(bits: int) -> None:
    """One input channel four times too large, as behind a norm that was divided by four: in every row, so in no row's
    direction alone."""
    generator = torch.Generator().manual_seed(bits)
    source = torch.randn(256, 128, generator=generator)
    noise = torch.randn(256, 128, generator=generator)
    stored = source + noise * {2: 0.5, 3: 0.25, 4: 0.12, 8: 0.01}[bits]
    recorded = float((stored - source).square().sum(dtype=torch.float64))
    assert defect(source, stored, recorded) == ""
    stored[:, 17] *= 4
    assert defect(source, stored, recorded) == "has 1 columns that are scaled or replaced, first column 17"


def test_an_output_without_its_record(made: dict[int, Path], source: Path, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(made[4], tmp_path / "bad")
    path = tmp_path / "bad" / "m3quant.json"
    manifest = json.loads(path.read_text())
    del manifest["rounding_error"]
    path.write_text(json.dumps(manifest))
    status, said = check(tmp_path / "bad", source)
    assert status == 1 and "has no rounding error in the manifest" in said, said
