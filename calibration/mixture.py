"""Calibration text from several sources in given shares: `--calibration own.jsonl=0.7 --calibration bundled=0.3`.

Windows are dealt to the sources one by one, each to the one that is furthest below its share; so any run of windows has
the shares to within one window of each source, and the held-out windows at the end have them too.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from m3quant.calibration.corpus import BUNDLED_NAME, BUNDLED_SPEC, Loaded, corpus_sha256, read_source
from m3quant.calibration.windows import Windows, tokenize_windows
from m3quant.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Part:
    """One source as the user names it, and its share of all windows; the shares of a mixture add up to 1."""

    spec: str
    share: float


def parse_mixture(values: Sequence[str]) -> tuple[Part, ...]:
    """The sources of `--calibration`, each SPEC or SPEC=WEIGHT; a weight that is not given is 1. No value: the bundled corpus.

    Raises:
        CalibrationError: a weight that is not a positive number, or a source that is named twice.
    """
    weights: dict[str, float] = {}
    for value in values or (BUNDLED_SPEC,):
        spec, weight = _split(value)
        if spec in weights:
            raise CalibrationError(f"--calibration names {spec!r} twice; give it once, with the sum of its weights.")
        weights[spec] = weight
    total = sum(weights.values())
    return tuple(Part(spec, weight / total) for spec, weight in weights.items())


def _split(value: str) -> tuple[str, float]:
    spec, mark, written = value.rpartition("=")
    if not mark or Path(value).exists():  # a file may have "=" in its name
        return value, 1.0
    try:
        weight = float(written)
    except ValueError:
        raise CalibrationError(
            f"--calibration {value!r}: {written!r} is no weight; write SOURCE=NUMBER, for instance {spec}=0.7."
        ) from None
    if not (math.isfinite(weight) and weight > 0):
        raise CalibrationError(f"--calibration {value!r}: the weight must be a number above 0.")
    return spec, weight


def mixture_sha256(parts: Sequence[Part], read: Callable[[str], Loaded] = read_source) -> str:
    """Over the first documents of every source and their shares: the same however many windows are cut from them.

    Raises CalibrationError as `read_source`.
    """
    digests = [[corpus_sha256(read(part.spec).documents), round(part.share, 12)] for part in parts]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def deal(windows: int, shares: Sequence[float], rows: Sequence[int] | None = None) -> npt.NDArray[np.int64]:
    """[windows] int64: the source of each window. After any n of them every source has n times its share, give or take one.

    rows: how many that follow one another are to have one source, for all of them; None: every one by itself.
    """
    taken = np.zeros(len(shares))
    wanted = np.asarray(shares)
    order = np.empty(windows, dtype=np.int64)
    start = 0
    for size in [1] * windows if rows is None else rows:
        chosen = int(np.argmax(wanted * (start + size) - taken))  # the first of equals
        order[start : start + size] = chosen
        taken[chosen] += size
        start += size
    return order


def mixed_windows(
    parts: Sequence[Part],
    tokenizer: "PreTrainedTokenizerBase",
    n_windows: int,
    window_length: int,
    *,
    seed: int,
    read: Callable[[str], Loaded] = read_source,
    rows: Sequence[int] | None = None,
) -> Windows:
    """Windows [n_windows, window_length] from all sources in their shares; one source gives `tokenize_windows`.

    rows: as of `deal`; those that have one source are consecutive text of it.

    Raises:
        CalibrationError: a source that cannot be read, has too little text, or whose share is less than a window.
    """
    order = deal(n_windows, [part.share for part in parts], rows)
    counts = np.bincount(order, minlength=len(parts)).tolist()
    for part, count in zip(parts, counts, strict=True):
        if count == 0:
            raise CalibrationError(
                f"--calibration {part.spec!r}: a share of {part.share:.2%} of {n_windows} windows is less than one; give it "
                f"more weight, or ask for more windows."
            )
    found = [
        _from_one(read(part.spec), tokenizer, count, window_length, seed)
        for part, count in zip(parts, counts, strict=True)
    ]
    return found[0] if len(found) == 1 else _merge(parts, order, found)


def _from_one(loaded: Loaded, tokenizer: "PreTrainedTokenizerBase", count: int, length: int, seed: int) -> Windows:
    try:
        return tokenize_windows(
            loaded.documents, tokenizer, count, length, seed=seed, source=loaded.name, more=loaded.more, notes=loaded.notes,
        )  # fmt: skip
    except CalibrationError as error:
        if loaded.name == BUNDLED_NAME:
            raise
        raise CalibrationError(f"{loaded.name}: {error}") from error


def _merge(parts: Sequence[Part], order: npt.NDArray[np.int64], found: Sequence[Windows]) -> Windows:
    kinds = tuple(sorted({kind for windows in found for kind in windows.kinds}))
    ids = np.empty((len(order), found[0].ids.shape[1]), dtype=np.int64)
    kind_tokens = np.zeros((len(order), len(kinds)), dtype=np.int64)
    for number, windows in enumerate(found):
        ids[order == number] = windows.ids
        kind_tokens[np.ix_(order == number, [kinds.index(kind) for kind in windows.kinds])] = windows.window_kind_tokens

    def over(hashes: Sequence[str]) -> str:
        pairs = [[digest, round(part.share, 12)] for part, digest in zip(parts, hashes, strict=True)]
        return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()

    return replace(
        found[0],
        ids=ids,
        window_kind_tokens=kind_tokens,
        kinds=kinds,
        sha256=over([windows.sha256 for windows in found]),
        corpus_sha256=over([windows.corpus_sha256 for windows in found]),
        source="; ".join(
            f"{part.share:.1%} {windows.source}, {len(windows.ids)} windows"
            for part, windows in zip(parts, found, strict=True)
        ),
        notes=tuple(dict.fromkeys(note for windows in found for note in windows.notes)),
    )
