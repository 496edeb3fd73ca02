"""The range search: against brute force in float64, against rounding to nearest, and in its corner cases."""

import pytest
import torch

from m3quant.calibration import ranges
from m3quant.calibration.ranges import FACTORS, blend, fake_quantize, qparams, search_range, weighted_error
from m3quant.quant import integer
from m3quant.schemes import parse_scheme
from tests.support.calibration.planted import salient

SCHEMES = ["int4-g128", "int4-g32", "int4-g32-asym", "int4-channel", "int4-channel-asym", "int8-g64", "int8-channel"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_qparams_are_those_of_the_quant_package(name: str, scale_dtype: torch.dtype) -> None:
    scheme, weight = parse_scheme(name), normal(2, 8, 256).bfloat16()
    groups = ranges.group_count(256, scheme)
    for shrink in (1.0, 0.8, 0.5 + 0.5 * torch.rand(2, 8, groups, generator=torch.Generator().manual_seed(1))):
        ours, theirs = (f(weight, scheme, shrink, scale_dtype=scale_dtype) for f in (qparams, integer.int_qparams))
        assert torch.equal(ours[0], theirs[0])
        assert (ours[1] is None and theirs[1] is None) or torch.equal(ours[1], theirs[1])
        assert torch.equal(
            fake_quantize(weight, scheme, shrink, scale_dtype),
            integer.fake_quantize(weight, scheme, shrink, scale_dtype=scale_dtype),
        )


def rounded_in_float64(group: torch.Tensor, factor: float, bits: int, symmetric: bool) -> torch.Tensor:
    """One group [g] rounded by the formulas of quant.integer, written out for scalars; a negative factor turns the grid."""
    if factor < 0:
        return -rounded_in_float64(-group, -factor, bits, symmetric)
    low, high = min(float(group.min()), 0.0) * factor, max(float(group.max()), 0.0) * factor
    steps, least = 2**bits - 1, -(2 ** (bits - 1))
    wanted = max(-low, high) / (steps / 2) if symmetric else (high - low) / steps
    scale = float(torch.tensor(wanted).bfloat16())
    zero = 0 if symmetric else max(min(round(least - low / scale), least + steps), least)
    codes = torch.round(torch.clamp(group / scale + zero, least, least + steps))
    return (codes - zero) * scale


@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-asym", "int8-g64"])
def test_the_search_finds_what_brute_force_in_float64_finds(name: str) -> None:
    scheme = parse_scheme(name)
    weight, moment = normal(6, 128), salient(8, 128).square().mean(0)
    shrink = search_range(weight, scheme, moment)
    size = scheme.group_size or 128
    for row in range(6):
        for group in range(128 // size):
            part = slice(group * size, (group + 1) * size)
            w, m = weight[row, part].double(), moment[part].double()
            sign = -1.0 if scheme.symmetric and float(w.max()) > -float(w.min()) else 1.0
            errors = {
                f: float((m * (w - rounded_in_float64(w, f, scheme.bits, scheme.symmetric)).square()).sum())
                for f in (1.0, *(round(sign * f, 3) for f in FACTORS))
            }
            assert errors[round(float(shrink[row, group]), 3)] <= min(errors.values()) * (1 + 1e-4)


def test_a_negative_scale_puts_a_large_positive_weight_on_the_longer_side() -> None:
    scheme, weight = parse_scheme("int4-g32"), normal(64, 128)
    positive = search_range(weight, parse_scheme("int4-g32"), torch.ones(128), FACTORS)
    turned = torch.where(positive < 0, 1.0, 0.0)
    groups = weight.unflatten(-1, (-1, 32))
    assert bool((groups.amax(-1) > -groups.amin(-1))[turned.bool()].all())
    assert 0.2 < float(turned.mean()) < 0.6
    error = (weight - fake_quantize(weight, scheme, positive)).square().sum()
    unsigned = torch.stack(
        [(weight - fake_quantize(weight, scheme, f)).square().unflatten(-1, (-1, 32)).sum(-1) for f in FACTORS]
    )
    assert float(error) < 0.95 * float(unsigned.amin(0).sum())


@pytest.mark.parametrize("name", SCHEMES)
def test_no_group_gets_worse_than_at_full_range(name: str) -> None:
    scheme = parse_scheme(name)
    weight, moment = normal(3, 16, 256), salient(3, 256).square()
    shrink = search_range(weight, scheme, moment)
    assert shrink.shape == (3, 16, ranges.group_count(256, scheme))
    full, chosen = fake_quantize(weight, scheme), fake_quantize(weight, scheme, shrink)
    before = weighted_error(weight, full, moment[:, None], scheme)
    after = weighted_error(weight, chosen, moment[:, None], scheme)
    assert bool((after <= before).all())
    assert float(after.sum()) < 0.9 * float(before.sum())


def test_salient_channels_cut_the_output_error_on_other_tokens() -> None:
    scheme, weight = parse_scheme("int4-g128"), normal(128, 512)
    x = salient(4096, 512)
    seen, unseen = x[:2048], x[2048:]
    shrink = search_range(weight, scheme, seen.square().mean(0))
    errors = [float((unseen @ (fake_quantize(weight, scheme, s) - weight).T).square().sum()) for s in (1.0, shrink)]
    unweighted = search_range(weight, scheme, torch.ones(512))
    by_weight_alone = float((unseen @ (fake_quantize(weight, scheme, unweighted) - weight).T).square().sum())
    assert errors[1] < 0.6 * errors[0]
    assert errors[1] < 0.7 * by_weight_alone


def test_a_weight_that_full_range_stores_exactly_keeps_it() -> None:
    codes = torch.randint(-8, 8, (4, 64), generator=torch.Generator().manual_seed(0))
    codes[:, ::32], codes[:, 1::32] = -8, 7
    weight = codes * 0.25
    shrink = search_range(weight, parse_scheme("int4-g32-asym"), torch.ones(64))
    assert bool((shrink == 1).all())


def test_nothing_to_choose_from_keeps_the_full_range() -> None:
    scheme = parse_scheme("int4-g32")
    assert bool((search_range(normal(4, 64), scheme, torch.zeros(64)) == 1).all())
    assert bool((search_range(torch.zeros(4, 64), scheme, torch.ones(64)) == 1).all())


@pytest.mark.parametrize("limit", [1, 256, 1024, 4000])
def test_the_result_does_not_depend_on_chunks(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, weight, moment = parse_scheme("int4-g32"), normal(5, 7, 128), salient(5, 128).square()
    whole = search_range(weight, scheme, moment)
    one_by_one = torch.stack([search_range(weight[i], scheme, moment[i]) for i in range(5)])
    monkeypatch.setitem(ranges._CHUNK, "cpu", limit)
    assert torch.equal(search_range(weight, scheme, moment), whole)
    assert torch.equal(one_by_one, whole)


def test_a_few_tokens_are_not_trusted_alone() -> None:
    own, prior = torch.tensor([0.0, 4.0]), torch.tensor([1.0, 1.0])
    assert torch.equal(blend(own, prior, tokens=0, prior_tokens=32), prior)
    assert torch.allclose(blend(own, prior, tokens=32, prior_tokens=32), torch.tensor([0.5, 2.5]))
    assert torch.allclose(blend(own, prior, tokens=1e6, prior_tokens=32), own, atol=1e-3)


def test_scales_stay_positive_where_asked() -> None:
    scheme, weight = parse_scheme("int4-g32"), normal(64, 128)
    assert bool((search_range(weight, scheme, torch.ones(128)) < 0).any())
    assert bool((search_range(weight, scheme, torch.ones(128), signed=False) > 0).all())
