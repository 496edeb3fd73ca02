"""The machine's own rates, in bytes per second, measured in the folder where a conversion runs: what each stage cannot beat."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

PIECE = 16 * 2**20
READERS = 8
PINNED = 256 * 2**20
SAMPLE = 5 * 10**9
SYNC_EVERY = 32 * 2**20


def drop_from_cache(folder: Path) -> None:
    """Have the kernel forget a folder's files, where it lets us: the next reads come from the disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_all(paths: list[Path], limit: int | None = None) -> tuple[int, float]:
    """Read files (at most `limit` bytes) with READERS threads into buffers that are used again: bytes, seconds."""
    pieces = [(path, at) for path in paths for at in range(0, path.stat().st_size, PIECE)]
    pieces = pieces[: max(1, limit // PIECE)] if limit else pieces
    local = threading.local()

    def one(piece: tuple[Path, int]) -> int:
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(PIECE)
        descriptor = os.open(piece[0], os.O_RDONLY)
        try:
            return os.preadv(descriptor, [local.buffer], piece[1])
        finally:
            os.close(descriptor)

    started = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        count = sum(pool.map(one, pieces))
    return count, time.perf_counter() - started


def write_bytes(path: Path, size: int) -> float:
    """Seconds to write `size` random bytes and sync them, with the disk asked to begin as they come."""
    block = np.random.default_rng(0).integers(0, 256, SYNC_EVERY, dtype=np.uint8).data
    started = time.perf_counter()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for at in range(0, size, SYNC_EVERY):
            os.write(descriptor, block[: min(SYNC_EVERY, size - at)])
            os.posix_fadvise(descriptor, at, SYNC_EVERY, os.POSIX_FADV_DONTNEED)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def both_at_once(paths: list[Path], scratch: Path, size: int, limit: int) -> float:
    """Seconds to read at most `limit` bytes and, at the same time, to write and sync `size` bytes."""
    started = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write_bytes, scratch, size)
        read_all(paths, limit)
        writing.result()
    return time.perf_counter() - started


def disk_floor(source: Path, scratch: Path, written: int) -> dict[str, Any]:
    """Read alone, write alone and both at once, the cache dropped before, and what a conversion from `source` to `written`
    bytes needs at those rates. Of large checkpoints a part of at most SAMPLE bytes is read, and as large a part written.
    """
    shards = sorted(source.glob("*.safetensors"))
    whole = sum(path.stat().st_size for path in shards)
    share = min(1.0, SAMPLE / whole)
    limit, size = int(whole * share), int(written * share)
    drop_from_cache(source)
    count, read = read_all(shards, limit)
    _, cached = read_all(shards, limit)
    write = write_bytes(scratch / "floor.bin", size)
    drop_from_cache(source)
    both = both_at_once(shards, scratch / "floor.bin", size, limit)
    return {
        "read": count / read, "cached_read": count / cached, "write": size / write, "bytes_in": whole, "bytes_out": written,
        "sampled": share, "read_seconds": whole * read / count, "write_seconds": write / share, "both_seconds": both / share,
    }  # fmt: skip


def rates(device: torch.device) -> dict[str, float]:
    """Bytes per second of what needs no disk: hashing, host to device and back, and FLOP/s of an expert's GEMM in BF16."""
    block = np.random.default_rng(0).integers(0, 256, 1 << 26, dtype=np.uint8).data
    out = {"hash": block.nbytes / _best(lambda: hashlib.sha256(block).digest(), 2)}
    if device.type != "cuda":
        return out
    pinned = torch.empty(PINNED, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(PINNED, dtype=torch.uint8, device=device)
    out["h2d"] = PINNED / _best(lambda: _done(there.copy_(pinned, non_blocking=True)), 5)
    out["d2h"] = PINNED / _best(lambda: _done(pinned.copy_(there, non_blocking=True)), 5)
    copy = torch.empty_like(there)
    out["device_copy"] = 2 * PINNED / _best(lambda: _done(copy.copy_(there)), 10)
    x = torch.randn(8192, 3072, device=device, dtype=torch.bfloat16)
    w = torch.randn(1536, 3072, device=device, dtype=torch.bfloat16)
    out["gemm_flops"] = 2 * 8192 * 3072 * 1536 / _best(lambda: _done([x @ w.T for _ in range(20)][-1]), 5) * 20
    return out


def pack_rate(scheme_name: str, fmt: str, device: torch.device) -> float:
    """BF16 bytes per second that one call of the rounding itself takes in, everything in place: on a GPU the kernel, on a CPU one thread."""
    from m3quant.planning.layout import stored_bytes, stored_tensors
    from m3quant.quant.formats import TORCH_DTYPES
    from m3quant.quant.fused import compress_into
    from m3quant.schemes import parse_scheme

    shape, scheme = (1536, 3072), parse_scheme(scheme_name)
    if device.type == "cuda":
        from m3quant.quant.gpu_kernels import compress_group

        weights, nbytes = 64, shape[0] * shape[1] * 2
        source = torch.randn(weights, *shape, device=device, dtype=torch.bfloat16).view(torch.uint8).view(-1)
        size = stored_bytes(shape, scheme, fmt)
        codes = next(iter(stored_tensors(shape, scheme, fmt).values()))
        first = int(np.prod(codes[1])) * {"F8_E4M3": 1, "I32": 4}[codes[0]]
        table = torch.tensor([[i * nbytes, i * size, i * size + first, 0] for i in range(weights)], device=device)
        out, flags = (
            torch.empty(weights * size, dtype=torch.uint8, device=device),
            torch.zeros(weights, dtype=torch.int32, device=device),
        )
        call = lambda: _done(compress_group(source, out, table, flags, shape, scheme))  # noqa: E731
        call()
        return weights * nbytes / _best(call, 10)
    weight = torch.randn(shape, dtype=torch.bfloat16)
    parts = {
        suffix: torch.empty(dims, dtype=TORCH_DTYPES[code])
        for suffix, (code, dims) in stored_tensors(shape, scheme, fmt).items()
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return weight.nbytes / _best(lambda: compress_into(weight, scheme, fmt, parts), 5)
    finally:
        torch.set_num_threads(threads)


def _done(_: Any) -> None:
    torch.cuda.synchronize()


def _best(call: Any, times: int) -> float:
    best = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best
