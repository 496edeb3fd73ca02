"""Rounded activations and caches in a layer: put together from the unrounded layer's parts, and left off where nothing rounds."""

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F

from m3quant.calibration import attention, ops
from m3quant.calibration.awq_attention import AttentionSearch
from m3quant.calibration.awq_settings import AwqSettings
from m3quant.calibration.feedback.attention import AttentionQuantizer
from m3quant.calibration.feedback.settings import FeedbackSettings
from m3quant.calibration.layers import O_PROJ, Layer, LayerSpec
from m3quant.calibration.stream import HiddenStates
from m3quant.errors import CalibrationError
from m3quant.families.spec import STACKS
from m3quant.quant.activations import round_activations, round_cached
from m3quant.quant.formats import round_trip
from m3quant.schemes import Activations, Scheme, parse_scheme
from tests.support.calibration.planted import Tensors, linears, salient, tiny_layer

CASES = {"m2": ("m2", 1), "m3-dense": ("m3", 0), "m3-sparse": ("m3", 1)}
TOKEN = Activations()


def layer_of(name: str) -> tuple[LayerSpec, Tensors]:
    family, index = CASES[name]
    return tiny_layer(family, index, num_local_experts=6, num_experts_per_tok=2)


def schemes_of(tensors: Tensors, scheme: str) -> dict[str, Scheme]:
    return {name: parse_scheme(scheme) for name in linears(tensors)}


def reference(layer: Layer, x: torch.Tensor, kind: Activations, routed: Activations | None) -> torch.Tensor:
    """The layer from its parts, which round nothing: each product is handed what it reads."""
    spec = layer.spec
    assert not layer._rounding.by_name
    heads = layer.heads(round_activations(layer.attention_input(x), kind))
    middle = x + layer.output(round_activations(heads, kind), layer.weight(O_PROJ))
    normed = layer.mlp_input(middle)
    out = torch.zeros_like(normed).flatten(0, 1)
    if spec.moe is not None:
        rows, routing = normed.flatten(0, 1), layer.routing(normed)  # the router reads what is not rounded
        for expert in range(spec.moe.num_experts):
            token, slot = (routing.experts == expert).nonzero(as_tuple=True)
            w1, w3, w2 = (layer.weight(spec.moe.expert_name(expert, which)).float() for which in STACKS)
            read = round_activations(rows[token], routed)
            hidden = round_activations(ops.gated(read @ w1.T, read @ w3.T, spec.moe.activation), routed)
            out[token] += (hidden @ w2.T) * routing.weights[token, slot, None]
    out = out.view(normed.shape)
    prefix = "mlp." if spec.moe is None else spec.moe.shared_prefix if spec.moe.has_shared else None
    if prefix is not None:
        gate, up, down = (layer.weight(f"{prefix}{n}_proj.weight").float() for n in ("gate", "up", "down"))
        read = round_activations(normed, kind)
        out = out + round_activations(ops.gated(read @ gate.T, read @ up.T, spec.activation), kind) @ down.T
    return middle + out


@pytest.mark.parametrize("routed", ["int4-g128", "fp8-channel"])
@pytest.mark.parametrize("name", CASES)
def test_every_product_reads_what_an_engine_rounds(name: str, routed: str) -> None:
    spec, tensors = layer_of(name)
    schemes = schemes_of(tensors, "fp8-channel")
    schemes |= {n: parse_scheme(routed) for n in schemes if ".experts." in n}
    x = salient(2, 600, 256)  # longer than M3's selected blocks, so that the index projections decide
    plain, layer = Layer(spec, tensors), Layer(spec, tensors)
    layer.round_activations(schemes)
    expected = reference(plain, x, TOKEN, parse_scheme(routed).activations)
    exact = plain.forward(x)
    # A float32 sum in another order may turn a code at a tie: few tokens, and far less than what rounding does.
    off = (layer.forward(x) - expected).norm(dim=-1) / (exact - expected).norm(dim=-1)
    assert float(off.median()) < 1e-3 and float((off > 0.05).float().mean()) < 0.05


def test_blocks_round_runs_of_128_channels() -> None:
    spec, tensors = layer_of("m2")
    x = salient(1, 40, 256)
    layer = Layer(spec, tensors)
    layer.round_activations(schemes_of(tensors, "fp8-block"))
    expected = reference(Layer(spec, tensors), x, Activations(128), Activations(128))
    assert float((layer.forward(x) - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("name", CASES)
def test_integers_and_nothing_round_nothing(name: str) -> None:
    spec, tensors = layer_of(name)
    x = salient(1, 100, 256)
    exact = Layer(spec, tensors).forward(x)
    layer = Layer(spec, tensors)
    for schemes in ({}, schemes_of(tensors, "int8-g128"), schemes_of(tensors, "keep")):
        layer.round_activations(schemes)
        assert torch.equal(layer.forward(x), exact)
    with layer.rounding(schemes_of(tensors, "fp8-channel")):
        assert not torch.equal(layer.forward(x), exact)
    assert torch.equal(layer.forward(x), exact)


@pytest.mark.parametrize("odd", ["mlp.gate_proj.weight", "block_sparse_moe.experts.3.w3.weight"])
def test_one_input_rounded_in_two_ways_is_refused(odd: str) -> None:
    spec, tensors = layer_of("m3-dense" if odd.startswith("mlp") else "m3-sparse")
    schemes = {**schemes_of(tensors, "fp8-channel"), odd: parse_scheme("int4-g128")}
    with pytest.raises(CalibrationError, match=f"layer {spec.index}: .*round it differently; engines fuse them"):
        Layer(spec, tensors).round_activations(schemes)


@pytest.mark.parametrize("stored", [False, True])
def test_attention_meets_keys_and_values_as_the_cache_has_them(monkeypatch: pytest.MonkeyPatch, stored: bool) -> None:
    spec, tensors = layer_of("m2")
    if stored:
        tensors["self_attn.k_proj.k_scale"] = torch.full((1,), 0.02)
        tensors["self_attn.v_proj.v_scale"] = torch.rand(spec.num_kv_heads) + 0.1
    seen: list[tuple[torch.Tensor, ...]] = []
    layer, x = Layer(spec, tensors), salient(1, 30, 256)
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F,
        "scaled_dot_product_attention",
        lambda q, k, v, **more: (seen.append((q, k, v)), plain(q, k, v, **more))[1],
    )
    layer.forward(x)
    layer.round_cache(kv=True, index=False)
    layer.forward(x)
    (q, k, v), (q8, k8, v8) = seen
    k_scale = tensors["self_attn.k_proj.k_scale"].view(1, 1, 1) if stored else 1.0
    v_scale = tensors["self_attn.v_proj.v_scale"].view(-1, 1, 1) if stored else 1.0
    assert torch.equal(q8, q) and not torch.equal(k8, k)
    assert torch.equal(k8, round_cached(k, k_scale)) and torch.equal(v8, round_cached(v, v_scale))


def test_index_keys_are_rounded_apart_from_the_cache() -> None:
    spec, tensors = layer_of("m3-sparse")
    x = salient(1, 900, 256)
    heads = {}
    for kv, index in ((False, False), (True, False), (False, True)):
        layer = Layer(spec, tensors)
        layer.round_cache(kv, index)
        heads[kv, index] = layer.heads(layer.attention_input(x))
    off = [(heads[choice] - heads[False, False]).norm(dim=-1)[0] for choice in ((True, False), (False, True))]
    assert bool((off[0] > 0).float().mean() > 0.99)  # keys and values of every token
    assert 0 < float((off[1] > 1e-6).float().mean()) < 0.9  # only where another block was selected
    assert not bool((off[1][:128] > 1e-6).any())  # one block, nothing to select


@pytest.mark.parametrize(("shape", "value"), [((3,), 1.0), ((1,), float("nan"))])
def test_cache_scales_that_fit_nothing_are_refused(shape: tuple[int, ...], value: float) -> None:
    spec, tensors = layer_of("m2")
    layer = Layer(spec, {**tensors, "self_attn.k_scale": torch.full(shape, value)})
    with pytest.raises(CalibrationError, match=r"layer 1: self_attn.k_scale holds"):
        layer.round_cache(kv=True, index=False)


def stored_attention(tensors: Tensors, weights: Mapping[str, torch.Tensor]) -> Tensors:
    return {**tensors, **{name: weight.to(torch.bfloat16) for name, weight in weights.items()}}


def test_feedback_hands_on_what_the_rounded_attention_gives() -> None:
    """And makes good in o_proj what rounding the inputs lost: the quantizer's stream is the engine's."""
    spec, tensors = layer_of("m3-sparse")
    schemes = schemes_of(tensors, "fp8-channel")
    states = HiddenStates(salient(2, 64, 256))
    layer = Layer(spec, tensors)
    weights, mid, source_mid, _ = AttentionQuantizer(layer, schemes, states, states, FeedbackSettings(rounds=0)).run()
    engine = Layer(spec, stored_attention(tensors, {n: w.dequantized() for n, w in weights.items()}))
    engine.round_activations(schemes)
    x = states.read(slice(None))
    assert torch.equal(mid.view(x.shape), x + engine.attention(engine.attention_input(x)))
    exact = Layer(spec, tensors)
    assert torch.equal(source_mid.view(x.shape), x + exact.attention(exact.attention_input(x)))
    assert torch.equal(layer.attention(layer.attention_input(x)), exact.attention(exact.attention_input(x)))


def test_awq_searches_on_what_the_rounded_attention_gives() -> None:
    spec, tensors = layer_of("m2")
    schemes = schemes_of(tensors, "fp8-channel")
    states = HiddenStates(salient(2, 64, 256))
    search = AttentionSearch(Layer(spec, tensors), spec, tensors, schemes, states, AwqSettings())
    search.run(None)
    stored = {n: round_trip(tensors[n].float(), s, name=n) for n, s in schemes.items() if n.startswith("self_attn")}
    engine = Layer(spec, stored_attention(tensors, stored))
    engine.round_activations(schemes)
    x = states.read(slice(None))
    expected = engine.mlp_input(x + engine.attention(engine.attention_input(x)))
    assert torch.equal(search.mlp_inputs().view(x.shape), expected)
