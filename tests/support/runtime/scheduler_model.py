"""A model of vLLM's scheduler in steps, without an engine: first come first served, a block more at every block's end, preemption of the last.

For what depends on the order of events only (how many requests run at once, how many are preempted); a step is a unit of time.
As vLLM 0.32 schedules (v1/core/sched/scheduler.py: schedule): running requests first, and no new ones in a step that preempted one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

BLOCK, BLOCKS, SEQUENCES = 32, 64, 16


@dataclass(eq=False)
class Sequence:
    """`length`: output tokens after which it ends."""

    prompt: int
    length: int
    written: int = 0
    blocks: int = 0
    preempted: int = 0


class Scheduler:
    """`on_end` is called with each sequence that ends. `gauges` are named as vLLM's."""

    def __init__(self, on_end: Callable[[Sequence], None], blocks: int = BLOCKS, sequences: int = SEQUENCES) -> None:
        self.on_end = on_end
        self.total = blocks
        self.sequences = sequences
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.written = self.preempted = 0

    @property
    def used(self) -> int:
        return sum(sequence.blocks for sequence in self.running)

    def gauges(self) -> dict[str, float]:
        return {
            "vllm:num_requests_waiting": len(self.waiting),
            "vllm:num_requests_running": len(self.running),
            "vllm:kv_cache_usage_perc": self.used / self.total,
            "vllm:num_preemptions_total": self.preempted,
            "vllm:generation_tokens_total": self.written,
        }

    def step(self) -> None:
        before = self.preempted
        for sequence in list(self.running):
            while sequence in self.running and self._lacks(sequence) > self.total - self.used:
                self._preempt()
            sequence.blocks += self._lacks(sequence) if sequence in self.running else 0
        while self.preempted == before and self.waiting and len(self.running) < self.sequences:
            if self._lacks(self.waiting[0]) > self.total - self.used:
                break
            sequence = self.waiting.pop(0)
            sequence.blocks = self._lacks(sequence)
            self.running.append(sequence)
        for sequence in list(self.running):
            sequence.written += 1
            self.written += 1
            if sequence.written >= sequence.length:
                self.running.remove(sequence)
                self.on_end(sequence)

    def _lacks(self, sequence: Sequence) -> int:
        return max(0, -(-(sequence.prompt + sequence.written + 1) // BLOCK) - sequence.blocks)

    def _preempt(self) -> None:
        last = self.running.pop()
        last.blocks = 0
        last.preempted += 1
        self.preempted += 1
        self.waiting.insert(0, last)
