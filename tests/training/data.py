"""Training batches: plain text windows, text with facts and repeated mentions, dense fact lists, and chat turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tests.training import needles
from tests.training import tokenizer as tok

ANSWER_WEIGHT = 5.0  # loss weight of digits that can be known; digits that cannot be known weigh 0
TEMPLATE_WEIGHT = 0.3


@dataclass(frozen=True)
class Shares:
    """Shares of rows: facts in running text, dense fact lists, chat; the rest is plain text."""

    filler: float
    dense: float
    chat: float


class Facts:
    """Facts as token pieces with loss weights."""

    def __init__(self, tokenizer_file: Path) -> None:
        bpe = tok.load(tokenizer_file)
        self.parts = tok.split_facts(bpe)
        self.digits = np.array([self.parts[d][0] for d in "0123456789"])
        user, assistant, end = (
            list(bpe.encode(text, add_special_tokens=False).ids)
            for text in (f"{tok.ROLE}user\n", f"{tok.ROLE}ai\n", f"{tok.EOS}\n")
        )
        self.turns = [user, end + assistant, end + user]

    def keys(self, rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
        nouns = len(needles.NOUNS)
        flat = rng.choice(len(needles.ADJECTIVES) * nouns, count, replace=False)
        return [(needles.ADJECTIVES[i // nouns], needles.NOUNS[i % nouns]) for i in flat]

    def mention(self, key: tuple[str, str], code: np.ndarray, known: bool) -> tuple[list[int], list[float]]:
        """Tokens and loss weights of one sentence; `known`: the code was stated before, so its digits are the lesson."""
        p = self.parts
        head = [*p[needles.LEAD], *p[" " + key[0]], *p[" " + key[1]], *p[" is"]]
        body = [*p[" "], *self.digits[code].tolist()]
        ids = head + body + p[".\n"]
        weights = [TEMPLATE_WEIGHT] * len(head) + [ANSWER_WEIGHT if known else 0.0] * len(body)
        return ids, weights + [TEMPLATE_WEIGHT] * len(p[".\n"])


def _mentions(facts: Facts, rng: np.random.Generator, count: int, total: int) -> list[tuple[list[int], list[float]]]:
    """`total` mentions of `count` keys in random order, every key at least once; the last one repeats an earlier key."""
    keys = facts.keys(rng, count)
    codes = rng.integers(0, 10, (count, needles.CODE_DIGITS))
    order = np.concatenate([rng.permutation(count), rng.integers(0, count, total - count)])
    order[:-1] = rng.permutation(order[:-1])
    seen: set[int] = set()
    out = []
    for i in order.tolist():
        out.append(facts.mention(keys[i], codes[i], i in seen))
        seen.add(i)
    return out


def filler_row(facts: Facts, text: np.ndarray, rng: np.random.Generator, length: int) -> tuple[list[int], list[float]]:
    """Running text with facts at random places, a mention of an earlier fact at the very end."""
    count = 1 if rng.random() < 0.4 else int(rng.integers(2, max(3, length // 160)))
    total = count + int(rng.integers(1, 2 + count))
    pieces = _mentions(facts, rng, count, total)
    room = length - sum(len(ids) for ids, _ in pieces)
    start = int(rng.integers(0, text.size - room))
    cuts = [*np.sort(rng.integers(0, room + 1, total - 1)).tolist(), room]
    row: list[int] = []
    weights: list[float] = []
    done = 0
    for cut, (ids, w) in zip(cuts, pieces, strict=True):
        row += text[start + done : start + cut].tolist() + ids
        weights += [1.0] * (cut - done) + w
        done = cut
    return row, weights


def dense_row(facts: Facts, rng: np.random.Generator, length: int, chat: bool) -> tuple[list[int], list[float]]:
    """Facts back to back (optionally as chat turns: the user states or asks, the assistant repeats)."""
    row: list[int] = []
    weights: list[float] = []
    total = length // (19 if chat else 12) + 2  # no mention is shorter; the row is cut to length
    count = max(2, min(int(total * rng.uniform(0.05, 0.5)), 400))
    for n, (ids, w) in enumerate(_mentions(facts, rng, count, max(total, count + 1))):
        if chat:
            turn = facts.turns[(2 if n % 2 == 0 else 1) if n else 0]
            row += turn
            weights += [TEMPLATE_WEIGHT] * len(turn)
        row += ids
        weights += w
    return row[:length], weights[:length]


class Mixture(IterableDataset):
    """Yields (tokens [B, L+1] int32, target weights [B, L] float32) forever; each worker has its own generator."""

    def __init__(self, data: Path, length: int, rows: int, shares: Shares, seed: int) -> None:
        self.text = np.load(data / "train.npy", mmap_mode="r")
        self.facts = Facts(data / "tokenizer.json")
        self.length, self.rows, self.shares, self.seed = length, rows, shares, seed

    def row(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        size, draw, s = self.length + 1, rng.random(), self.shares
        if draw < s.filler:
            ids, weights = filler_row(self.facts, self.text, rng, size)
        elif draw < s.filler + s.dense + s.chat:
            ids, weights = dense_row(self.facts, rng, size, chat=draw >= s.filler + s.dense)
        else:
            start = int(rng.integers(0, self.text.size - size))
            return np.asarray(self.text[start : start + size], np.int32), np.ones(self.length, np.float32)
        return np.asarray(ids, np.int32), np.asarray(weights[1:], np.float32)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        info = get_worker_info()
        rng = np.random.default_rng([self.seed, self.length, info.id if info else 0])
        while True:
            ids, weights = zip(*(self.row(rng) for _ in range(self.rows)), strict=True)
            yield torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(weights))


def loader(data: Path, length: int, rows: int, shares: Shares, seed: int, workers: int) -> DataLoader:
    return DataLoader(
        Mixture(data, length, rows, shares, seed),
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=8 if workers else None,
    )
