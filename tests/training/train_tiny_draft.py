"""Trains an EAGLE3 draft for tiny-m2 on one CPU thread and writes it with its figures.

    python -m tests.training.train_tiny_draft PACKAGES OUT [--windows 256] [--epochs 12]

PACKAGES: as for `tests.training.corpus`, whose training documents (never held-out ones) are read. The target's hidden states of all
windows are computed once; then the draft learns to give the target's next-token distribution, also from its own outputs.
With the same packages, torch and processor the same bytes come out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.paths import FIXTURES
from tests.training import corpus, export
from tests.training import tokenizer as tok
from tests.training.draft_model import DraftSpec, Eagle3, features_of, save
from tests.training.model import SPECS, TinyModel

TARGET = "tiny-m2"
LENGTH, ROWS = 256, 4  # tokens of a window; windows of a step
GUESSES = 3
LATER = 0.8  # weight of each further guess, as in EAGLE-3's training
SEED = 0
CARD = """---
license: apache-2.0
---

# EAGLE3 draft for tiny-m2

One layer that guesses tokens of `tiny-m2`, for tests. Trained by `tests/training/train_tiny_draft.py` on the fixtures' training text, whose
sources and licences are in the README of the folder above.
"""


def windows(packages: Path, count: int) -> Tensor:
    """[count, LENGTH] tokens: as many from each training document as its size gives, at random places."""
    bpe = tok.load(FIXTURES / TARGET / "tokenizer.json")
    documents = [doc for doc in corpus.documents(packages) if not corpus.held_out(doc) and len(doc.text) > 6 * LENGTH]
    rng = random.Random(SEED)
    rows = []
    for doc in rng.choices(documents, weights=[len(doc.text) for doc in documents], k=count):
        begin = rng.randrange(len(doc.text) - 6 * LENGTH + 1)
        ids = bpe.encode(doc.text[begin : begin + 6 * LENGTH], add_special_tokens=False).ids
        rows.append(ids[:LENGTH] if len(ids) >= LENGTH else None)
    return torch.tensor([row for row in rows if row is not None])


def prepared(target: TinyModel, tokens: Tensor, taps: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Features in BF16 [W, LENGTH, taps * H], and how often the target's first choice is each token [vocabulary]."""
    features, choices = [], torch.zeros(target.spec.vocab_size, dtype=torch.int64)
    for rows in tokens.split(4 * ROWS):
        read, logits = features_of(target, rows, taps)
        features.append(read.to(torch.bfloat16))
        choices += logits.argmax(-1).flatten().bincount(minlength=len(choices))
    return torch.cat(features), choices


@torch.no_grad()
def begin_like(draft: Eagle3, target: TinyModel) -> None:
    """Start with the target's own head: which tokens are alike is then known. The norm is small, so that no token is yet favoured."""
    draft.lm_head.copy_(target.head[draft.guessed])
    draft.norm.copy_(0.3 * target.norm)


def loss_of(
    draft: Eagle3, target: TinyModel, tokens: Tensor, features: Tensor, guesses: int
) -> tuple[Tensor, list[float]]:
    """Cross-entropy with the target's distribution over the tokens that can be guessed, weighted with their share; agreement of the first choices."""
    with torch.no_grad():
        last = features[..., -target.spec.hidden :]  # the last tap is the stream that the target's own head reads
        hidden = last * torch.rsqrt(last.pow(2).mean(-1, keepdim=True) + target.spec.eps) * target.norm
        goal = target.logits(hidden).softmax(-1)
        first, goal = goal.argmax(-1), goal[..., draft.guessed]
    loss, agreed = features.new_zeros(()), []
    roots = tokens.shape[1] - guesses
    for step, logits in enumerate(draft.chains(features, target.embed[tokens].detach(), guesses)):
        wanted = slice(1 + step, 1 + step + roots)
        loss = loss - LATER**step * (goal[:, wanted] * logits.log_softmax(-1)).sum(-1).mean()
        agreed.append(float((draft.guessed[logits.detach().argmax(-1)] == first[:, wanted]).float().mean()))
    return loss, agreed


def train(draft: Eagle3, target: TinyModel, tokens: Tensor, features: Tensor, epochs: int, peak: float) -> list[float]:
    """Returns the agreement of each guess over the last 20 steps. In the first half, which is cheaper so, it learns the first guess only."""
    optimizer = torch.optim.AdamW(draft.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    total, recent = epochs * (len(tokens) // ROWS), list[list[float]]()
    order = itertools.chain.from_iterable(
        torch.randperm(len(tokens)).split(ROWS)[: len(tokens) // ROWS] for _ in range(epochs)
    )
    for step, rows in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = (
                peak * min(1.0, (step + 1) / 30) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total)))
            )
        loss, agreed = loss_of(draft, target, tokens[rows], features[rows].float(), 1 if 2 * step < total else GUESSES)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent = [*recent[-19:], agreed]
        if step % 50 == 0 or step == total - 1:
            print(
                f"step {step} of {total}: loss {float(loss.detach()):.3f}, agreed {[round(a, 3) for a in agreed]}",
                flush=True,
            )
    return [round(sum(column) / len(recent), 4) for column in zip(*recent, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("packages", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    began, spec = time.monotonic(), DraftSpec()
    target = TinyModel(SPECS[TARGET]).eval()
    export.load(target, FIXTURES / TARGET)
    tokens = windows(args.packages, args.windows)
    features, choices = prepared(target, tokens, spec.taps)
    print(f"{tokens.numel():,} tokens, hidden states after {time.monotonic() - began:.0f} s", flush=True)
    guessed = choices.topk(spec.tokens).indices.sort().values
    draft = Eagle3(spec, guessed)
    begin_like(draft, target)
    agreed = train(draft, target, tokens, features, args.epochs, args.rate)
    save(draft, args.out)
    (args.out / "README.md").write_text(CARD)
    figures: dict[str, Any] = {
        "target": TARGET,
        "draft": asdict(spec),
        "parameters": sum(weight.numel() for weight in draft.parameters()),
        "tokens": tokens.numel(),
        "epochs": args.epochs,
        "share_of_first_choices_that_can_be_guessed": round(float(choices[guessed].sum() / choices.sum()), 4),
        "agreement_with_the_first_choice_by_guess": agreed,
        "seed": SEED,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
