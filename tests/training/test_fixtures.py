"""The trained fixture models are what they claim: official layout, loadable, far better than a trigram, able to retrieve.

Each check runs on the committed files on a CPU; the full figures (200 prompts per length) are in figures.json.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from tests.support.paths import FIXTURES
from tests.training import corpus, export, needles
from tests.training import tokenizer as tok
from tests.training.model import SPECS, TinyModel

NAMES = sorted(SPECS)


def read_json(name: str, file: str) -> Any:
    return json.loads((FIXTURES / name / file).read_text())


def encode(text: str) -> list[int]:
    return list(tok.load(FIXTURES / "tiny-m2" / "tokenizer.json").encode(text, add_special_tokens=False).ids)


@pytest.fixture(scope="module")
def heldout() -> list[int]:
    return encode((FIXTURES / "heldout.txt").read_text("utf-8"))


@pytest.fixture(scope="module", params=NAMES)
def loaded(request: pytest.FixtureRequest) -> tuple[str, Any, dict[str, Any]]:
    """(name, transformers model in float32, loading info)"""
    import transformers

    cls: Any = (
        transformers.AutoModelForCausalLM if request.param == "tiny-m2" else transformers.AutoModelForImageTextToText
    )
    model, info = cls.from_pretrained(
        FIXTURES / request.param, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    return request.param, model.eval(), info


@torch.no_grad()
def answers(model: Any, prompts: list[needles.NeedlePrompt]) -> list[list[int]]:
    """Greedy answers, read off one forward pass: right tokens before a wrong one do not change whether all match."""
    rows = torch.tensor([p.ids + p.answer for p in prompts])
    keep = needles.ANSWER_TOKENS + 1
    return model(input_ids=rows, logits_to_keep=keep).logits[:, :-1].argmax(-1).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_layout_is_the_official_one(name: str) -> None:
    folder, spec = FIXTURES / name, SPECS[name]
    index = read_json(name, "model.safetensors.index.json")
    stored: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        assert shard.stat().st_size <= 15_000_000
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for key in file.keys():  # noqa: SIM118
                assert index["weight_map"][key] == shard.name
                stored[key] = file.get_tensor(key)
    assert set(stored) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in stored.values())
    for key, tensor in stored.items():
        assert tensor.dtype == export.stored_dtype(key), key
        assert tensor.isfinite().all(), key
    root = "language_model.model" if name == "tiny-m3" else "model"
    moe = f"{root}.layers.2.block_sparse_moe"
    assert stored[f"{moe}.experts.{spec.num_experts - 1}.w2.weight"].shape == (256, 256)
    assert stored[f"{moe}.gate.weight"].dtype == stored[f"{moe}.e_score_correction_bias"].dtype == torch.float32
    q_norm = stored[f"{root}.layers.1.self_attn.q_norm.weight"]
    assert q_norm.shape == ((128,) if name == "tiny-m3" else (256,))  # per head; over all heads
    if name == "tiny-m3":
        assert f"{root}.layers.0.mlp.gate_proj.weight" in stored
        assert f"{root}.layers.0.self_attn.index_q_proj.weight" not in stored
        assert stored[f"{root}.layers.1.self_attn.index_q_proj.weight"].shape == (256, 256)
        assert abs(float(q_norm.float().mean())) < 0.9  # stored as an offset from 1
        patch = stored["vision_tower.vision_model.embeddings.patch_embedding.weight"]
        assert (patch.dtype, tuple(patch.shape)) == (torch.float32, (64, 3, 2, 14, 14))


def test_both_folders_fit_the_budget() -> None:
    assert sum(f.stat().st_size for n in NAMES for f in (FIXTURES / n).iterdir()) <= 54_000_000


@pytest.mark.parametrize("name", NAMES)
def test_config_is_the_original_form(name: str) -> None:
    config = read_json(name, "config.json")
    assert "quantization_config" not in config and "auto_map" not in config
    ids = {k: tok.load(FIXTURES / name / "tokenizer.json").token_to_id(t) for k, t in _special().items()}
    assert config == export.config(SPECS[name], ids)
    text = config.get("text_config", config)
    assert text["hidden_act"] == ("swigluoai" if name == "tiny-m3" else "silu")
    if name == "tiny-m3":
        assert config["image_token_index"] == ids["image"] and config["video_token_index"] == ids["video"]


def _special() -> dict[str, str]:
    return {"bos": tok.BOS, "eos": tok.EOS, "image": tok.IMAGE, "video": tok.VIDEO}


def test_calibration_text_is_neither_training_nor_heldout_text() -> None:
    records = [json.loads(line) for line in (FIXTURES / "calibration.jsonl").read_text("utf-8").splitlines()]
    judged = corpus.grams((FIXTURES / "heldout.txt").read_text("utf-8"))
    for record in records:
        source, _, name = record["source"].partition("/")
        document = corpus.Document(source, name.rpartition(", characters")[0], record["text"])
        # Held out by the rule of the split; the novel is no source of the training text.
        assert source == "melville" or corpus.held_out(document), record["source"]
        assert not corpus.grams(record["text"]) & judged, record["source"]
    assert 60_000 < sum(len(encode(record["text"])) for record in records) < 90_000
    assert corpus.held_out(corpus.Document("austen", "Persuasion", "")), "the rule names what heldout.txt has"
    assert not corpus.held_out(corpus.Document("austen", "Emma", "")), "and lets training text through"


@pytest.mark.parametrize("name", NAMES)
def test_figures_meet_the_targets_on_the_shipped_text(name: str, heldout: list[int]) -> None:
    figures = read_json(name, "figures.json")
    assert figures["heldout_sha256"] == hashlib.sha256((FIXTURES / "heldout.txt").read_bytes()).hexdigest()
    assert figures["trigram_baseline"]["tokens"] == len(heldout) - 2
    assert figures["heldout"]["4096"]["perplexity"] < 0.5 * figures["trigram_baseline"]["perplexity"]
    assert all(n["accuracy"] >= 0.9 and n["prompts"] >= 100 for n in figures["needle_exact_match"].values())


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_and_chat_template(name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(FIXTURES / name)
    text = "def f(x):\n    return [x, 1024]  # naïve π\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("1024")) == 4
    assert tokenizer.eos_token_id == SPECS[name].vocab_size - 10
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How is Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
    ]
    out = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, tools=[call])
    assert out.startswith("]~!b[]~b]system\nBe brief.") and out.endswith("<response>rain</response>[e~[\n]~b]ai\n")
    assert '<invoke name="weather">\n<parameter name="city">Oslo</parameter>\n</invoke>' in out


def test_prompts_have_exact_length_and_spread_depth(heldout: list[int]) -> None:
    prompts = needles.needle_prompts(encode, heldout, 1024, 20, seed=4, distractors=2)
    assert {len(p.ids) + len(p.answer) for p in prompts} == {1024}
    assert {len(p.answer) for p in prompts} == {needles.ANSWER_TOKENS}
    assert [int(p.depth * 20) for p in prompts] == list(range(20))
    stated = encode(needles.fact(*prompts[0].key, prompts[0].code))
    ids = prompts[0].ids
    assert any(ids[i : i + len(stated)] == stated for i in range(len(ids)))
    assert needles.exact_matches(prompts, [p.answer for p in prompts]) == 1.0
    assert needles.exact_matches(prompts, [[0] * 6] * 20) == 0.0
    with pytest.raises(ValueError, match="filler"):
        needles.needle_prompts(encode, heldout[:100], 1024, 1)


def test_transformers_finds_every_tensor(loaded: tuple[str, Any, dict[str, Any]]) -> None:
    _, _, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_transformers_computes_what_was_trained(loaded: tuple[str, Any, dict[str, Any]], heldout: list[int]) -> None:
    """Six blocks of 128, so that M3's selection of four is part of the comparison."""
    name, theirs, _ = loaded
    ours = TinyModel(SPECS[name]).eval()
    export.load(ours, FIXTURES / name)
    rows = torch.tensor([heldout[start : start + 700] for start in range(0, len(heldout) - 700, len(heldout) // 4)])
    with torch.no_grad():
        expected = theirs(input_ids=rows).logits
        hidden, _, loads = ours(rows)
        torch.testing.assert_close(ours.logits(hidden), expected, atol=2e-3, rtol=0)
        perplexity = F.cross_entropy(expected[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).exp()
    assert perplexity < 0.6 * read_json(name, "figures.json")["trigram_baseline"]["perplexity"]
    for moe, load in zip(ours.moes(), loads, strict=True):
        assert load.min() > 0, "a dead expert"
        assert load.sum() == rows.numel() * SPECS[name].top_k
        assert moe.bias.std() > 0.01  # the selection bias was really used


def test_needles_are_found(loaded: tuple[str, Any, dict[str, Any]], heldout: list[int]) -> None:
    name, model, _ = loaded
    prompts = needles.needle_prompts(encode, heldout, 1280, 3, seed=11)
    assert needles.exact_matches(prompts, answers(model, prompts)) == 1.0
    if name == "tiny-m3":  # the answer comes through the index branch: random index queries lose it
        projections = [layer.self_attn.indexer.q_proj for layer in model.model.language_model.layers[1:]]
        kept = [p.weight.clone() for p in projections]
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in projections:
                p.weight.normal_(generator=generator)
            lost = needles.exact_matches(prompts, answers(model, prompts))
            for p, weight in zip(projections, kept, strict=True):
                p.weight.copy_(weight)
        assert lost < 1.0
