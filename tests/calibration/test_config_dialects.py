"""config.json as transformers 5 saves it gives the layers of the release's own; keys that change the forward pass are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from m3quant.errors import CheckpointError
from m3quant.families import family_of
from m3quant.families.spec import SWIGLUOAI
from tests.support.calibration.tiny import m2_config, m3_config


@pytest.mark.parametrize("make", [m2_config, m3_config])
def test_a_config_saved_by_transformers5_gives_the_same_layers(make: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps(make()))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "rope_theta" not in (saved.get("text_config") or saved)
    assert family_of(saved).layers == family_of(make()).layers
    assert set(family_of(saved).expected_tensors) >= {n for n in family_of(make()).expected_tensors if "layers." in n}


def test_m3_computes_swigluoai_under_either_name() -> None:
    family = family_of(m3_config(hidden_act="silu"))
    assert family.layers == family_of(m3_config()).layers
    assert family.layers[0].activation.kind == SWIGLUOAI and not family.pair_fold
    with pytest.raises(CheckpointError, match=r"text_config\.swiglu_limit"):
        family_of(m3_config(hidden_act="silu", swiglu_limit=None))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"attn_type_list": [0, 1]}, "attn_type_list"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attention_bias": True}, "attention_bias"),
        ({"n_group": 4}, "n_group"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling"),
    ],
)
def test_keys_that_change_the_forward_pass_are_refused_by_name(change: dict[str, Any], key: str) -> None:
    for make in (m2_config, m3_config):
        if make is m3_config and key == "routed_scaling_factor":
            continue  # M3 has one
        with pytest.raises(CheckpointError, match=key):
            family_of(make(**change))


def test_keys_that_say_nothing_of_it_are_let_through() -> None:
    plain = m2_config()
    extra = {"unsloth_version": "2026.1", "_name_or_path": "x", "sliding_window": None, "attention_dropout": 0.1,
             "pad_token_id": 3, "router_aux_loss_coef": 0.001, "n_group": 0}  # fmt: skip
    assert family_of({**plain, **extra}).layers == family_of(plain).layers
