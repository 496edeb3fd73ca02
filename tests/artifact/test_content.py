"""Digests of what is read: the same whatever the pieces, their order and their threads; another for any other byte."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from m3quant.artifact.reread import current_digests, recorded_digests
from m3quant.checkpoint import Checkpoint, TensorInfo
from m3quant.checkpoint.content import CHUNK_BYTES, ReadDigests
from m3quant.errors import CheckpointError
from m3quant.running.stopping import StopFlag
from tests.support.convert.common import make_source

DATA = np.random.default_rng(0).integers(0, 256, 3 * CHUNK_BYTES + 777, dtype=np.uint8).tobytes()


def info(size: int, name: str = "t") -> TensorInfo:
    return TensorInfo(name, "U8", (size,), "shard", 0, size)


def reference(data: bytes, name: str = "t") -> str:
    """The definition, written plainly."""
    chunks = [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)]
    total = sum(xxhash.xxh3_128_intdigest(chunk, seed=n) for n, chunk in enumerate(chunks)) % 2**128
    return xxhash.xxh3_128_hexdigest(f"{name}\0{total:032x}\n".encode())


def digest(pieces: list[tuple[int, bytes]], size: int) -> str:
    digests = ReadDigests()
    for first, piece in pieces:
        digests.add(info(size), first, memoryview(piece))
    assert digests.missing([info(size)]) == []
    return digests.of([info(size)])


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, len(DATA) - 1), max_size=6), seed=st.integers(0, 99))
def test_any_pieces_in_any_order_give_the_digest_of_the_whole(cuts: set[int], seed: int) -> None:
    ends = [0, *sorted(cuts), len(DATA)]
    pieces = [(a, DATA[a:b]) for a, b in itertools.pairwise(ends)]
    np.random.default_rng(seed).shuffle(pieces)  # type: ignore[arg-type]
    assert digest(pieces, len(DATA)) == digest([(0, DATA)], len(DATA)) == reference(DATA)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_sizes_around_a_chunk(size: int) -> None:
    assert digest([(0, DATA[:size])], size) == reference(DATA[:size])


def test_another_byte_order_of_chunks_or_name_is_another_digest() -> None:
    size = 2 * CHUNK_BYTES
    data = DATA[:size]
    swapped = data[CHUNK_BYTES:] + data[:CHUNK_BYTES]
    flipped = data[:77] + bytes([data[77] ^ 1]) + data[78:]
    found = {digest([(0, d)], size) for d in (data, swapped, flipped)}
    assert len(found) == 3
    one, two = ReadDigests(), ReadDigests()
    one.add(info(size), 0, memoryview(data))
    two.add(info(size, "u"), 0, memoryview(data))
    assert one.of([info(size)]) != two.of([info(size, "u")])


def test_a_second_read_that_finds_other_bytes_is_refused() -> None:
    digests = ReadDigests()
    digests.add(info(5), 0, memoryview(b"12345"))
    digests.add(info(5), 0, memoryview(b"12345"))
    with pytest.raises(CheckpointError, match="'t' holds other bytes than when it was first read"):
        digests.add(info(5), 0, memoryview(b"12346"))


def test_threads_and_both_ways_of_reading_agree(tmp_path: Path) -> None:
    folder = make_source(tmp_path / "src", "m3")
    whole, ranges = Checkpoint.open(folder), Checkpoint.open(folder)
    infos = list(whole.tensors.values())
    whole.record_reads()
    whole.read_many(whole.tensors)
    ranges.record_reads()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: ranges.read_ranges([(i, 0, memoryview(bytearray(i.nbytes)))]), infos))
    now = current_digests(Checkpoint.open(folder), infos, StopFlag())
    assert set(now) == set(whole.shards)
    assert all(recorded_digests(c, infos) == now for c in (whole, ranges, Checkpoint.open(folder)))
