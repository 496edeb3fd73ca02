"""Rounding of activations and cached keys: equal to a search among all E4M3 values, and to compressed-tensors' quantizer."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

from m3quant.planning.engine_config import compressed_tensors_group
from m3quant.quant.activations import round_activations, round_cached
from m3quant.schemes import KEEP, Activations, parse_scheme

TOKEN, GROUP = Activations(), Activations(128)
FP8 = ["fp8-channel", "fp8-block"]


def e4m3_values() -> torch.Tensor:
    """The finite E4M3 values in ascending order, float64: 4 exponent bits with bias 7, 3 mantissa bits."""
    sizes = {
        mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        for exponent in range(16)
        for mantissa in range(8)
        if (exponent, mantissa) != (15, 7)
    }
    return torch.tensor(sorted({sign * size for size in sizes for sign in (-1.0, 1.0)}), dtype=torch.float64)


def nearest(x: torch.Tensor) -> torch.Tensor:
    """x float64, each to the nearest E4M3 value, ends for what lies beyond."""
    values = e4m3_values()
    return values[(x.flatten()[:, None] - values).abs().argmin(1)].view(x.shape)


def reference(x: torch.Tensor, size: int | None, floor: float) -> torch.Tensor:
    """[T, K] in float64, run by run."""
    out = torch.empty_like(x, dtype=torch.float64)
    for row in range(len(x)):
        for start in range(0, x.shape[1], size or x.shape[1]):
            run = x[row, start : start + (size or x.shape[1])].double()
            scale = max(float(run.abs().max()) / 448, floor)
            out[row, start : start + len(run)] = nearest(run / scale) * scale
    return out


def rows(tokens: int, channels: int, seed: int) -> torch.Tensor:
    """Normal values whose rows differ in size by 1e6, with outliers that push the rest into subnormal codes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator) * 10.0 ** (
        torch.rand(tokens, 1, generator=generator) * 6 - 3
    )
    x[torch.rand(tokens, channels, generator=generator) < 0.01] *= 300
    return x


@pytest.mark.parametrize(("activations", "size", "floor"), [(TOKEN, None, 1 / (448 * 512)), (GROUP, 128, 1e-10 / 448)])
def test_equals_a_search_among_all_values(activations: Activations, size: int | None, floor: float) -> None:
    x = rows(16, 300, 3)  # the last run has 44 channels
    x[0], x[1, :150] = 0.0, 0.0
    x[2] *= 1e-12
    expected = reference(x, size, floor)
    torch.testing.assert_close(round_activations(x.double(), activations), expected, rtol=1e-12, atol=0)
    # In float32 a value that lies at a tie by a last bit may go the other way; none does here.
    torch.testing.assert_close(round_activations(x, activations).double(), expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("activations", [TOKEN, GROUP])
def test_bf16_in_bf16_out_and_every_shape(activations: Activations) -> None:
    x = rows(12, 256, 4).bfloat16()
    found = round_activations(x, activations)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, round_activations(x.float(), activations).bfloat16())
    assert torch.equal(round_activations(x.view(3, 4, 256), activations), found.view(3, 4, 256))
    assert round_activations(x[:0], activations).shape == (0, 256)


@pytest.mark.parametrize("name", FP8)
def test_equals_compressed_tensors_under_what_config_json_declares(name: str) -> None:
    scheme = parse_scheme(name)
    args = QuantizationArgs(**compressed_tensors_group(scheme)["input_activations"])
    assert args.dynamic is True
    for seed in range(5):
        x = rows(32, 512, seed).view(2, 16, 512)
        scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1))
        expected = fake_quantize(x, scale, zero, args)
        torch.testing.assert_close(round_activations(x, scheme.activations), expected, rtol=1e-6, atol=0)


def test_integer_and_kept_weights_read_what_is_there() -> None:
    x = rows(4, 128, 5)
    for scheme in (KEEP, parse_scheme("int4-g128"), parse_scheme("int8-channel")):
        assert round_activations(x, scheme.activations) is x
    assert compressed_tensors_group(parse_scheme("int8-g128"))["input_activations"] is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_so_and_alone(bad: float) -> None:
    x = rows(3, 256, 6)
    x[1, 7] = bad
    found = round_activations(x, TOKEN)
    assert not torch.isfinite(found[1]).all()
    assert torch.equal(found[[0, 2]], round_activations(x[[0, 2]], TOKEN))


def test_a_cache_saturates_and_takes_scales_of_heads() -> None:
    generator = torch.Generator().manual_seed(7)
    k = torch.randn(2, 3, 5, 8, generator=generator) * 100
    k[0, 0, 0, 0], k[0, 0, 0, 1] = 1e5, -470.0
    torch.testing.assert_close(round_cached(k).double(), nearest(k.double()), rtol=0, atol=0)
    assert round_cached(k)[0, 0, 0, :2].tolist() == [448.0, -448.0]
    scale = torch.tensor([0.03, 0.5, 7.0]).view(-1, 1, 1)
    expected = nearest(k.double() / scale.double()) * scale.double()
    torch.testing.assert_close(round_cached(k, scale).double(), expected, rtol=1e-6, atol=0)
    assert round_cached(k.bfloat16(), scale).dtype == torch.bfloat16


def test_rows_do_not_depend_on_how_many_are_rounded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(50, 256, 8).view(5, 10, 256)
    for activations in (TOKEN, GROUP):
        whole = round_activations(x, activations)
        with monkeypatch.context() as patch:
            patch.setattr("m3quant.quant.activations._ELEMENTS", 1000)
            assert torch.equal(round_activations(x, activations), whole)
