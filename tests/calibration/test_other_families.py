"""Llama-like dense decoders and Qwen3-MoE against transformers' full models, loaded from the same folder in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch

from m3quant.calibration.attention import frequencies
from m3quant.calibration.experts import assign_tokens
from m3quant.calibration.layers import Layer, layer_spec
from m3quant.calibration.stream import nll, read_layer
from m3quant.errors import CheckpointError
from m3quant.families import family_of
from m3quant.families.spec import Rope
from tests.support.calibration.tiny import FolderSource
from tests.support.calibration.tiny_family import CONFIGS, make_tiny, tiny_tensors


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_and_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = FolderSource(make_tiny(tmp_path, name, seed=3))
    kwargs: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, **kwargs).eval()
    tokens = torch.randint(0, 2000, (2, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = reference(input_ids=tokens, output_hidden_states=True)
    states = found.hidden_states
    for index in range(family_of(source.config).num_layers - 1):  # the last hidden state is already normed
        ours = Layer(layer_spec(source.config, index), read_layer(source, index)).forward(states[index])
        error = float((ours - states[index + 1]).norm() / states[index + 1].norm())
        assert error < 2e-6, f"layer {index}: {error:.2e}"
    expected = -found.logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    error = float((nll(source, tokens) - expected).norm() / expected.norm())
    assert error < 2e-6, f"log-probs: {error:.2e}"


@pytest.mark.parametrize("normalise", [True, False])
def test_topped_up_tokens_weigh_what_the_softmax_router_would_have_given(normalise: bool, tmp_path: Path) -> None:
    config = {**CONFIGS["qwen3_moe"], "norm_topk_prob": normalise}
    tensors = tiny_tensors(config, 5)
    layer = Layer(
        layer_spec(config, 1),
        {n.removeprefix("model.layers.1."): t for n, t in tensors.items() if n.startswith("model.layers.1.")},
    )
    h = torch.randn(60, 256, generator=torch.Generator().manual_seed(2))
    routing, scores = layer.routing(h), layer.router_scores(h)
    assert torch.allclose(scores.sum(-1), torch.ones(60)) and layer.spec.moe is not None
    assigned, ledger = assign_tokens(routing, scores, 1.0, 1, 40, normalise=normalise)
    expert = ledger.starved[0]
    added = assigned.tokens[expert][ledger.natural[expert] :]
    kept = scores[added].gather(1, routing.experts[added]).double().sum(1)
    own = scores[added, expert].double()
    weights = own / (own + kept) if normalise else own
    assert len(added) and torch.allclose(assigned.weights[expert][ledger.natural[expert] :].double(), weights)


def test_rotary_frequencies_of_llama3_leave_high_ones_and_divide_low_ones() -> None:
    plain = frequencies(Rope(64, 10000.0))
    scaled = frequencies(Rope(64, 10000.0, "llama3", 8.0, 1.0, 4.0, 64))
    assert torch.equal(scaled[0], plain[0]) and torch.equal(scaled[-1], plain[-1] / 8)
    assert bool((scaled <= plain).all()) and bool((scaled >= plain / 8).all())
    assert torch.equal(frequencies(Rope(64, 10000.0, "linear", 4.0)), plain / 4)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mistral", {"sliding_window": 4096}, "sliding_window = 4096"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types ="),
        ("llama", {"mlp_bias": True}, "mlp_bias = True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "linear, llama3 is implemented"),
        ("llama", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "contradict one another"),
        ("llama", {"partial_rotary_factor": 0.5}, "rotates 32 channels of a head's 64"),
        ("llama", {"logit_scale": 0.1}, "logit_scale = 0.1, which m3quant does not know"),
        ("llama", {"attention_multiplier": 0.5}, "attention_multiplier"),
        ("qwen3_moe", {"norm_topk_prob": None}, "no 'norm_topk_prob'"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size = 64"),
        ("qwen3_moe", {"mlp_only_layers": "1"}, "mlp_only_layers' is '1', not a list of layers"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "9 experts per token of 8"),
        ("qwen3_moe", {"num_key_value_heads": 3}, "4 attention heads do not divide among 3 KV heads"),
    ],
)
def test_what_these_families_do_not_compute_is_refused_by_name(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        family_of({**CONFIGS[name], **change})


def test_transformers5_spelling_gives_the_same_layers() -> None:
    for name, config in CONFIGS.items():
        scaling = config.get("rope_scaling") or {"rope_type": "default"}
        nested = {
            "rope_theta": config["rope_theta"],
            **{("rope_type" if k == "type" else k): v for k, v in scaling.items()},
        }
        new = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")} | {"rope_parameters": nested}
        assert family_of(new).layers == family_of(config).layers, name
