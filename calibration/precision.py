"""Which float32 products of a GPU may run in TF32. PyTorch has one switch for all threads; these blocks hold it while one enqueues."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Held while products are enqueued, not while they run: other threads wait for microseconds.
_SWITCH = threading.RLock()


@contextmanager
def tf32() -> Iterator[None]:
    """float32 products on the tensor cores in TF32 (10 bits of mantissa, summed in float32), within this block only."""
    with _allowed(True):
        yield


@contextmanager
def full_float32() -> Iterator[None]:
    """float32 products in float32, whatever another thread has switched on."""
    with _allowed(False):
        yield


@contextmanager
def _allowed(value: bool) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    with _SWITCH:
        before = matmul.allow_tf32
        matmul.allow_tf32 = value
        try:
            yield
        finally:
            matmul.allow_tf32 = before
