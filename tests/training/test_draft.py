"""The draft's arithmetic for training against generation one token at a time, and the committed draft against its target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m3quant.runtime.draft import open_draft
from m3quant.runtime.model import open_subject
from tests.support.draft_prompts import prompts
from tests.support.paths import FIXTURES
from tests.training import draft_model, export
from tests.training import tokenizer as tok
from tests.training.draft_model import DraftSpec, Eagle3
from tests.training.model import SPECS, TinyModel, rms_norm

M2, DRAFT = FIXTURES / "tiny-m2", FIXTURES / "tiny-m2-eagle3"
STEPS = 3


@pytest.fixture(scope="module")
def target() -> TinyModel:
    model = TinyModel(SPECS["tiny-m2"]).eval()
    export.load(model, M2)
    return model


def random_draft(seed: int) -> Eagle3:
    """Random weights; norms too, so that a swapped one shows."""
    torch.manual_seed(seed)
    draft = Eagle3(DraftSpec(tokens=128), torch.randperm(2048)[:128].sort().values)
    with torch.no_grad():
        for name, weight in draft.named_parameters():
            if name.endswith("norm"):
                weight.uniform_(0.5, 1.5)
    return draft


class OneByOne:
    """The same layer with a list of keys and values, as an engine runs it: one token at a time, at a position."""

    def __init__(self, draft: Eagle3) -> None:
        self.w = {name: weight.detach().double() for name, weight in draft.named_parameters()}
        self.spec = draft.spec

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.w[name], self.spec.eps, gemma=False).double()

    def turn(self, x: Tensor, position: int) -> Tensor:
        """x [heads, D]: pairs (i, i + D/2) as complex numbers, times exp(i * position * frequency)."""
        half = self.spec.head_dim // 2
        angle = position * self.spec.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag), -1)

    def __call__(self, x: Tensor, embedded: Tensor, position: int, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        """x, embedded [H] -> the stream [H] after the layer; its key and value are added to `past`."""
        inputs = torch.cat((self.norm(embedded, "input_layernorm"), self.norm(x, "hidden_norm")))
        heads = {part: (self.w[f"{part}_proj"] @ inputs).view(-1, self.spec.head_dim) for part in "qkv"}
        past.append((self.turn(heads["k"], position), heads["v"]))
        keys, values = (torch.stack(part, 1) for part in zip(*past, strict=True))  # [KV heads, T, D]
        group = self.spec.heads // self.spec.kv_heads
        mixed = []
        for head, query in enumerate(self.turn(heads["q"], position)):
            scores = keys[head // group] @ query / self.spec.head_dim**0.5
            mixed.append(scores.softmax(0) @ values[head // group])
        x = x + self.w["o_proj"] @ torch.cat(mixed)
        y = self.norm(x, "post_attention_layernorm")
        return x + self.w["down_proj"] @ (F.silu(self.w["gate_proj"] @ y) * (self.w["up_proj"] @ y))


def test_chains_are_what_generation_computes() -> None:
    draft, generator = random_draft(1), torch.Generator().manual_seed(2)
    features = torch.randn(1, 12, 768, generator=generator)
    embedded = torch.randn(1, 12, 256, generator=generator)
    found = [logits.detach()[0] for logits in draft.chains(features, embedded, STEPS)]
    run = OneByOne(draft)
    known: list[tuple[Tensor, Tensor]] = []
    for root in range(12 - STEPS):
        x = run(run.w["fc"] @ features[0, root].double(), embedded[0, root + 1].double(), root, known)
        past = list(known)  # guesses after the first leave with the chain
        for step in range(STEPS):
            if step:
                x = run(x, embedded[0, root + 1 + step].double(), root + step, past)
            expected = run.w["lm_head"] @ run.norm(x, "norm")
            torch.testing.assert_close(found[step][root].double(), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def greedy(target: TinyModel, prompt: list[int], count: int) -> Tensor:
    tokens = torch.tensor(prompt)
    for _ in range(count):
        hidden, _, _ = target(tokens[None])
        tokens = torch.cat((tokens, target.logits(hidden[:, -1]).argmax(-1)))
    return tokens


def drafted(draft: Eagle3, target: TinyModel, tokens: Tensor, prompt: int) -> list[int]:
    """Accepted guesses of each step, by guessing from its own guesses and comparing."""
    features, _ = draft_model.features_of(target, tokens[None], draft.spec.taps)
    run, embed = OneByOne(draft), target.embed.detach().double()
    known: list[tuple[Tensor, Tensor]] = []
    counts, root, done = [], prompt - 1, 0
    while root + 1 + STEPS < len(tokens):
        for place in range(done, root + 1):
            x = run(run.w["fc"] @ features[0, place].double(), embed[tokens[place + 1]], place, known)
        done, past, guesses = root + 1, list(known), list[int]()
        for step in range(STEPS):
            if step:
                x = run(x, embed[guesses[-1]], root + step, past)
            guesses.append(int(draft.guessed[(run.w["lm_head"] @ run.norm(x, "norm")).argmax()]))
        wanted = tokens[root + 2 : root + 2 + STEPS].tolist()
        counts.append(next((n for n in range(STEPS) if guesses[n] != wanted[n]), STEPS))
        root += counts[-1] + 1
    return counts


def test_the_committed_draft_guesses_what_its_target_says(target: TinyModel) -> None:
    draft, bpe = draft_model.load(DRAFT), tok.load(M2 / "tokenizer.json")
    every = list[int]()
    for text in prompts(4):
        prompt = list(bpe.encode(text, add_special_tokens=False).ids)
        tokens = greedy(target, prompt, 40)
        counts = draft_model.accepted_per_step(draft, target, tokens, len(prompt), STEPS)
        assert counts == drafted(draft, target, tokens, len(prompt))
        every += counts
    print(f"tokens a step: {1 + sum(every) / len(every):.3f}")
    assert 1 + sum(every) / len(every) > 1.2


def test_the_committed_draft_is_laid_out_as_published_ones(tmp_path: Path) -> None:
    found = open_draft(str(DRAFT), open_subject(str(M2)).family)
    assert (found.method, found.architecture, found.tokens, found.taps) == ("eagle3", "LlamaForCausalLMEagle3", 3, 3)
    assert found.licence == "apache-2.0"
    assert json.loads((DRAFT / "config.json").read_text()) == draft_model.config(DraftSpec())
    draft_model.save(draft_model.load(DRAFT), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (DRAFT / "model.safetensors").read_bytes()
    assert sum(file.stat().st_size for file in DRAFT.iterdir()) < 1_500_000
