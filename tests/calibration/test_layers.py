"""Layers against transformers' full models loaded from the same folder, and what layer_spec refuses."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from m3quant.calibration import ops
from m3quant.calibration.attention import rotary_embedding, rotate
from m3quant.calibration.layers import Layer, layer_shapes, layer_spec, stack_experts
from m3quant.calibration.stream import read_layer
from m3quant.errors import CheckpointError
from m3quant.families import family_of
from tests.support.calibration.tiny import (
    FolderSource,
    load_reference,
    m2_config,
    m3_config,
    make_tiny_m2,
    make_tiny_m3,
)

LENGTHS = (40, 500)


class Model:
    """A folder, as we read it and as transformers computes it in float32: the hidden states before every layer."""

    def __init__(self, folder: Path, layers: int) -> None:
        self.source = FolderSource(folder)
        self.layers = layers
        self.reference = load_reference(folder)

    def hidden(self, length: int) -> list[torch.Tensor]:
        tokens = torch.randint(0, 500, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            return list(self.reference(input_ids=tokens, output_hidden_states=True).hidden_states)

    def layer(self, index: int, **kwargs: Any) -> Layer:
        return Layer(layer_spec(self.source.config, index), read_layer(self.source, index), **kwargs)


@pytest.fixture(scope="module")
def m2(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(make_tiny_m2(tmp_path_factory.mktemp("m2"), seed=1), 2)


@pytest.fixture(scope="module")
def m3(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(make_tiny_m3(tmp_path_factory.mktemp("m3"), seed=2), 3)


@pytest.fixture(params=["m2", "m3"])
def model(request: pytest.FixtureRequest) -> Model:
    return request.getfixturevalue(request.param)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("length", LENGTHS)
def test_every_layer_equals_transformers(model: Model, length: int) -> None:
    hidden = model.hidden(length)
    # transformers' last hidden state is already normed; test_stream compares the last layer, through the losses.
    for index in range(model.layers - 1):
        error = relative(model.layer(index).forward(hidden[index]), hidden[index + 1])
        assert error < 2e-6, f"layer {index}, {length} tokens: {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_transformers_bit_for_bit(model: Model, dtype: torch.dtype) -> None:
    spec = layer_spec(model.source.config, 1)
    embedding = next(
        m for m in model.reference.modules() if type(m).__name__.endswith(("M2RotaryEmbedding", "M3VLRotaryEmbedding"))
    )
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 300, spec.head_dim, generator=generator).to(dtype) for heads in (4, 2))
    with torch.no_grad():
        cos, sin = embedding(q, torch.arange(300)[None])
    modeling = sys.modules[type(embedding).__module__]
    ours = rotary_embedding(spec, 300, torch.device("cpu"), dtype)
    assert torch.equal(ours[0], cos[0]) and torch.equal(ours[1], sin[0])
    for found, expected in zip(
        (rotate(q, ours), rotate(k, ours)), modeling.apply_rotary_pos_emb(q, k, cos, sin), strict=True
    ):
        assert torch.equal(found, expected)


def test_parts_add_up_to_the_layer(model: Model) -> None:
    x = model.hidden(300)[-2]
    layer = model.layer(model.layers - 1)
    normed = layer.attention_input(x)
    heads = layer.heads(normed)
    attended = ops.linear(heads, layer.weight("self_attn.o_proj.weight"))
    assert torch.equal(attended, layer.attention(normed))
    middle = x + attended
    assert torch.equal(middle + layer.mlp(layer.mlp_input(middle)), layer.forward(x))
    assert heads.shape == (2, 300, layer.spec.num_heads * layer.spec.head_dim)


def test_micro_batches_do_not_change_a_layer(model: Model) -> None:
    x = model.hidden(300)[0]
    layer = model.layer(0)
    one_by_one = torch.cat([layer.forward(window[None]) for window in x])
    assert relative(one_by_one, layer.forward(x)) < 1e-6


def test_routing_is_transformers_choice(model: Model) -> None:
    index = model.layers - 1
    layer = model.layer(index)
    body = model.reference.model
    block = (body.language_model if hasattr(body, "language_model") else body).layers[index].mlp
    normed = layer.mlp_input(model.hidden(300)[index - 1])
    bias = () if hasattr(block.gate, "e_score_correction_bias") else (block.e_score_correction_bias,)
    with torch.no_grad():
        _, weights, experts = block.gate(normed, *bias)
    routing = layer.routing(normed)
    order, expected = routing.experts.sort(dim=-1), experts.sort(dim=-1)
    assert torch.equal(order.values, expected.values)
    scaling = layer.spec.moe.routed_scaling if layer.spec.moe else 0.0
    found = routing.weights.gather(1, order.indices)
    assert relative(found, scaling * weights.gather(1, expected.indices)) < 1e-6


def test_bf16_compute_stays_close_to_float32(model: Model) -> None:
    x = model.hidden(300)[0]
    exact = model.layer(0).forward(x)
    rounded = model.layer(0, dtype=torch.bfloat16).forward(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert relative(rounded, exact) < 2e-2


def test_weights_stay_as_stored(model: Model) -> None:
    """On the CPU the layer holds the very tensors it was given: no second copy, no float32 copy."""
    tensors = read_layer(model.source, 1)
    layer = Layer(layer_spec(model.source.config, 1), tensors)
    layer.forward(torch.zeros(1, 8, layer.spec.hidden_size) + 0.5)
    for name in layer_shapes(layer.spec):
        assert layer.weight(name).data_ptr() == tensors[name].data_ptr(), name
        assert layer.weight(name).dtype == tensors[name].dtype


@pytest.mark.parametrize(
    "name",
    ["input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.k_norm.weight", "self_attn.o_proj.weight",
     "block_sparse_moe.gate.weight", "block_sparse_moe.experts.3.w2.weight"],
)  # fmt: skip
def test_set_weight_is_used_and_leaves_the_source_alone(model: Model, name: str) -> None:
    tensors = read_layer(model.source, 1)
    before = tensors[name].clone()
    layer = Layer(layer_spec(model.source.config, 1), tensors)
    x = model.hidden(40)[1]
    original = layer.forward(x)
    generator = torch.Generator().manual_seed(9)
    layer.set_weight(name, before.float() * (1 + 0.1 * torch.randn(before.shape, generator=generator)))
    assert relative(layer.forward(x), original) > 1e-4
    assert torch.equal(tensors[name], before)
    layer.set_weight(name, before)
    assert torch.equal(layer.forward(x), original)


def test_set_weight_refuses_another_shape(m2: Model) -> None:
    with pytest.raises(ValueError, match=r"o_proj.*\(256, 256\)"):
        m2.layer(0).set_weight("self_attn.o_proj.weight", torch.zeros(256, 128))


def test_stack_experts_keeps_order_and_dtype(m2: Model) -> None:
    tensors = read_layer(m2.source, 0)
    w1, w3, w2 = stack_experts(tensors, layer_spec(m2.source.config, 0))
    assert (w1.shape, w3.shape, w2.shape) == ((16, 128, 256), (16, 128, 256), (16, 256, 128))
    for expert in range(16):
        for name, stack in (("w1", w1), ("w3", w3), ("w2", w2)):
            assert torch.equal(stack[expert], tensors[f"block_sparse_moe.experts.{expert}.{name}.weight"])


def test_layer_shapes_are_those_of_the_checkpoint(model: Model) -> None:
    for index in range(model.layers):
        found = {name: tuple(tensor.shape) for name, tensor in read_layer(model.source, index).items()}
        assert layer_shapes(layer_spec(model.source.config, index)) == found
    assert family_of(model.source.config).layer_prefix(1) in ("model.layers.1.", "language_model.model.layers.1.")


def test_a_missing_tensor_is_named(m2: Model) -> None:
    tensors = read_layer(m2.source, 1)
    del tensors["block_sparse_moe.experts.7.w3.weight"]
    with pytest.raises(CheckpointError, match=r"layer 1 lacks tensor block_sparse_moe\.experts\.7\.w3\.weight"):
        Layer(layer_spec(m2.source.config, 1), tensors)


def test_a_wrong_shape_is_named(m3: Model) -> None:
    tensors = read_layer(m3.source, 1)
    tensors["self_attn.index_k_proj.weight"] = torch.zeros(64, 256)
    with pytest.raises(CheckpointError, match=r"index_k_proj\.weight has shape \(64, 256\).*\(128, 256\)"):
        Layer(layer_spec(m3.source.config, 1), tensors)


@pytest.mark.parametrize(
    "key",
    ["hidden_size", "rms_norm_eps", "num_attention_heads", "num_key_value_heads", "head_dim", "rotary_dim",
     "hidden_act", "num_local_experts", "num_experts_per_tok", "intermediate_size", "num_hidden_layers",
     "use_routing_bias", "rope_theta"],
)  # fmt: skip
@pytest.mark.parametrize("make", [m2_config, m3_config])
def test_a_missing_key_is_named(make: Any, key: str) -> None:
    config = make()
    text = config.get("text_config") or config
    text.pop(key)
    if key == "rotary_dim":
        text.pop("partial_rotary_factor", None)  # M3 says the same twice
    with pytest.raises(CheckpointError, match=rf"\b{key}\b"):
        layer_spec(config, 1)


@pytest.mark.parametrize(
    "key",
    ["use_gemma_norm", "moe_layer_freq", "sparse_attention_config", "routed_scaling_factor", "swiglu_alpha",
     "swiglu_limit", "shared_intermediate_size", "n_shared_experts"],
)  # fmt: skip
def test_a_missing_m3_key_is_named(key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"text_config\.{key}\b"):
        layer_spec(m3_config(**{key: None}), 1)


@pytest.mark.parametrize(
    "key",
    ["sparse_index_dim", "sparse_num_index_heads", "sparse_topk_blocks", "sparse_block_size", "sparse_local_block",
     "sparse_init_block", "sparse_attention_freq", "sparse_score_type"],
)  # fmt: skip
def test_a_missing_sparse_key_is_named(key: str) -> None:
    config = m3_config()
    config["text_config"]["sparse_attention_config"].pop(key)
    with pytest.raises(CheckpointError, match=key):
        layer_spec(config, 1)


@pytest.mark.parametrize(
    ("make", "overrides", "message"),
    [
        (m2_config, {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        (m2_config, {"qk_norm_type": "per_head"}, "qk_norm_type = 'per_head'"),
        (m2_config, {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (m2_config, {"shared_intermediate_size": 64}, "shared_intermediate_size = 64"),
        (m2_config, {"model_type": "mixtral"}, "model_type 'mixtral'"),
        (m3_config, {"attention_output_gate": True}, "attention_output_gate = True"),
        (m3_config, {"sparse_attention_config": {"sparse_score_type": "mean"}}, "sparse_score_type = 'mean'"),
        (m3_config, {"sparse_attention_config": {"sparse_num_index_heads": 4}}, "sparse_num_index_heads = 4"),
        (m3_config, {"sparse_attention_config": {"sparse_disable_index_value": [0, 0, 0]}}, "index values"),
        (m3_config, {"moe_layer_freq": [0]}, "moe_layer_freq' is .*an entry for each layer"),
    ],
)
def test_what_the_layer_maths_does_not_cover_is_refused(make: Any, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        layer_spec(make(**overrides), 1)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("partial_rotary_factor", 1.0, r"contradict one another .*rotated channels \[64, 128\]"),
        ("rope_parameters", {"rope_theta": 5e6, "partial_rotary_factor": 1.0}, r"rotated channels \[64, 64, 128\]"),
        ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, r"thetas \[5000000.0, 10000.0\]"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0}, "rope_parameters = .*scaled rotary embeddings none"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling = .*scaled rotary embeddings none"),
        ("rope_scaling", "linear", "rope_scaling' is 'linear', not an object"),
        ("rope_parameters", ["x"], r"rope_parameters' is \['x'\], not an object"),
        ("partial_rotary_factor", "0.5", "partial_rotary_factor' is '0.5', not a number above 0"),
        ("rotary_dim", "64", "rotary_dim' is '64', not a whole number"),
        ("rotary_dim", 33, "rotated channels"),
        ("rotary_dim", 256, "rotated channels"),
        ("rope_theta", 0, "rope_theta' is 0, not a number above 0"),
        ("rope_theta", "x", "rope_theta' is 'x', not a number above 0"),
    ],
)
def test_rotary_settings_that_contradict_or_scale_are_refused(key: str, value: Any, message: str) -> None:
    config = m3_config()
    text = {**config["text_config"], key: value}
    with pytest.raises(CheckpointError, match=message):
        layer_spec({**config, "text_config": text}, 1)


def test_rotary_settings_said_twice_alike_are_read() -> None:
    config = m2_config()
    said = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
        "rope_scaling": None,
    }
    assert layer_spec({**config, **said}, 0) == layer_spec(config, 0)


def test_a_layer_past_the_last_is_refused() -> None:
    with pytest.raises(CheckpointError, match="layer 2 does not exist"):
        layer_spec(m2_config(), 2)


def test_dense_and_sparse_layers_come_from_the_config() -> None:
    dense, sparse = layer_spec(m3_config(), 0), layer_spec(m3_config(), 1)
    assert (dense.moe, dense.sparse, dense.dense_intermediate_size) == (None, None, 512)
    assert sparse.moe and sparse.moe.has_shared and sparse.sparse and sparse.sparse.topk_blocks == 2
    off = m3_config(sparse_attention_config={"use_sparse_attention": False})
    assert layer_spec(off, 1).sparse is None
    assert layer_spec(m3_config(swiglu_beta=0.5), 1).activation.beta == 0.5
    assert layer_spec(m3_config(), 1).activation.beta == 1.0
