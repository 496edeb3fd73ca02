"""A layer's feed-forward block as a list of GLU units, so that one search serves dense, routed and shared MLPs.

A routed expert is a unit with its own tokens and gate weights; the shared expert, or a dense layer's MLP, is a unit
that sees every token with weight 1. The block's output is the weighted sum over units. Weights are kept as stored
(BF16). On the CPU a chunk of units at a time is upcast to float32 and computed unit by unit, the reference; on a GPU a
chunk is computed as batched products (`grouped`).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from m3quant.calibration import grouped
from m3quant.calibration.experts import ExpertTokens
from m3quant.calibration.grouped import Block, PairSum, Rows, gated_rows, row_blocks, times
from m3quant.calibration.ops import gated
from m3quant.families.spec import Activation, LayerSpec, always_on_names, expert_names
from m3quant.schemes import KEEP, Activations, Scheme

# Elements of weight (gate, up and down together) of a chunk, float32 while they are searched: M3 has 57 M per expert,
# M2 14 M. On a GPU a chunk is one batch of products: 9 experts of M3, 37 of M2, and with all that is made of it 8 GB.
_CHUNK = {"cpu": 1 << 21, "cuda": 1 << 29}
_ROWS = 8192  # activation rows multiplied at once
_SHARES = 8  # GPUs of a node; the chunks, and so the sums, do not depend on how many there are


@dataclass(frozen=True)
class Unit:
    """names: (gate, up, down). tokens [n] int64, weights [n] float32: its rows; the first `natural` were routed."""

    names: tuple[str, str, str]
    schemes: tuple[Scheme, Scheme, Scheme]
    tokens: torch.Tensor
    weights: torch.Tensor
    natural: int

    @property
    def quantized(self) -> bool:
        return any(scheme.kind == "int" for scheme in self.schemes)

    @property
    def reads(self) -> tuple[Activations | None, Activations | None]:
        """How an engine rounds what gate and up read (`inputs.Rounding` refuses two ways), and what down reads."""
        return self.schemes[0].activations, self.schemes[2].activations


@dataclass(frozen=True)
class Glu:
    """Stacked weights of a chunk of units: gate and up [e, I, H], down [e, H, I]; float32, or as stored on a GPU."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class Sample:
    """A subset of tokens, and each unit's natural rows among them (positions in the subset, gate weights)."""

    h: torch.Tensor  # [n, H] float32
    rows: list[tuple[torch.Tensor, torch.Tensor]]
    blocks: dict[tuple[int, ...], list[Block]] = field(default_factory=dict)  # of a chunk, made when first asked for
    sums: dict[tuple[int, ...], PairSum] = field(default_factory=dict)


class Output:
    """A block's output on a sample, put together chunk by chunk in the order of `units`."""

    def __init__(self, block: "GluBlock", sample: Sample, units: list[int]) -> None:
        self.block, self.sample = block, sample
        self.out = torch.zeros_like(sample.h)

    def rows(self, indices: list[int], weights: Glu) -> torch.Tensor:
        """What these units add: [m, H], unit by unit a row for each of its rows in the sample, times its gate weight."""
        parts = [self.sample.h[:0]]
        for slot, index in enumerate(indices):
            rows, gates = self.sample.rows[index]
            for part, gate in zip(torch.split(rows, _ROWS), torch.split(gates, _ROWS), strict=True):
                if len(part):
                    hidden = self.block.intermediate(self.sample.h[part], weights.gate[slot], weights.up[slot])
                    parts.append(F.linear(hidden, weights.down[slot]) * gate[:, None])
        return torch.cat(parts)

    def add(self, indices: list[int], rows: torch.Tensor) -> None:
        """Add what `rows` gave, chunks in order. A token appears once per unit, so index_add_ has one order anywhere."""
        tokens = [self.sample.rows[index][0] for index in indices]
        for own, part in zip(tokens, torch.split(rows, [len(own) for own in tokens]), strict=True):
            self.out.index_add_(0, own, part)

    def total(self) -> torch.Tensor:
        return self.out


class _GroupedOutput(Output):
    """The same in batched products."""

    def __init__(self, block: "GluBlock", sample: Sample, units: list[int]) -> None:
        self.block, self.sample = block, sample
        key = tuple(units)
        if key not in sample.sums:
            sample.sums[key] = PairSum([sample.rows[i] for i in units], sample.h)
        self.sum, self.first = sample.sums[key], 0

    def rows(self, indices: list[int], weights: Glu) -> torch.Tensor:
        rows = [self.sample.rows[i] for i in indices]
        blocks = self.sample.blocks.setdefault(tuple(indices), []) or row_blocks(rows)
        self.sample.blocks[tuple(indices)] = blocks
        out = self.sample.h.new_empty(sum(len(tokens) for tokens, _ in rows), self.sample.h.shape[1])
        for block in blocks:
            hidden = self.block.hidden(self.sample.h[block.tokens], block, weights.gate, weights.up)
            outputs = times(hidden, block.of(weights.down)).mul_(block.gates[..., None])
            out[block.pairs] = outputs.flatten(0, 1)[block.kept]
        return out

    def add(self, indices: list[int], rows: torch.Tensor) -> None:
        self.sum.put(self.first, rows)
        self.first += len(rows)

    def total(self) -> torch.Tensor:
        return self.sum.total()


class GluBlock:
    """The units of one layer over normed inputs h [T, H] of any float dtype; everything is computed where h is."""

    def __init__(
        self,
        spec: LayerSpec,
        tensors: Mapping[str, torch.Tensor],
        schemes: Mapping[str, Scheme],
        h: torch.Tensor,
        assigned: ExpertTokens | None,
        stacks: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """stacks: w1, w3, w2 of all routed experts if each is one piece of memory (`Layer.expert_stacks`)."""
        self.spec, self.tensors, self.h = spec, tensors, h
        self.grouped = grouped.batched_on(h)
        self.stacks = stacks if self.grouped else None
        self.activation: Activation = spec.activation
        self.units: list[Unit] = []
        self._input_moments: dict[int, torch.Tensor] = {}
        self._blocks: dict[tuple[int, ...], list[Block]] = {}
        routed = expert_names(spec)
        if routed:
            assert assigned is not None, "a layer with experts needs its token assignment"
            for names, tokens, weights, natural in zip(
                routed, assigned.tokens, assigned.weights, assigned.natural, strict=True
            ):
                self.units.append(Unit(names, _schemes(names, schemes), tokens, weights, natural))
        always_on = always_on_names(spec)
        if always_on:
            everything = torch.arange(len(h), device=h.device)
            ones = torch.ones(len(h), device=h.device)
            self.units.append(Unit(always_on, _schemes(always_on, schemes), everything, ones, len(h)))

    def sample(self, tokens: torch.Tensor) -> Sample:
        """Restrict the block to `tokens` (int64, distinct)."""
        tokens = tokens.to(self.h.device)
        position = torch.full((len(self.h),), -1, device=self.h.device)
        position[tokens] = torch.arange(len(tokens), device=self.h.device)
        # All units at once: one by one, 257 units would wait for the GPU 514 times.
        sizes = torch.tensor([unit.natural for unit in self.units])
        where = position[torch.cat([unit.tokens[: unit.natural] for unit in self.units])]
        gates = torch.cat([unit.weights[: unit.natural] for unit in self.units])
        unit_of = torch.arange(len(sizes)).repeat_interleave(sizes).to(self.h.device)
        found = where >= 0
        counts = torch.bincount(unit_of[found], minlength=len(sizes)).tolist()
        rows = list(zip(torch.split(where[found], counts), torch.split(gates[found], counts), strict=True))
        return Sample(self.h[tokens].float(), rows)

    def chunks(self, quantized: bool | None = None) -> Iterator[tuple[list[int], Glu]]:
        """Runs of units of one shape and scheme: (indices, weights). quantized: only units that are, or are not."""
        limit = _CHUNK["cuda" if self.h.is_cuda else "cpu"]
        wanted = [i for i, unit in enumerate(self.units) if quantized is None or unit.quantized == quantized]
        start = 0
        while start < len(wanted):
            stop = start + 1
            while stop < len(wanted) and self._alike(wanted[start], wanted[stop]):
                stop += 1
            most = max(1, limit // (3 * self.tensors[self.units[wanted[start]].names[0]].numel()))
            if self.grouped:
                most = even_chunk(stop - start, most)
            for at in range(start, stop, most):
                indices = wanted[at : min(at + most, stop)]
                yield indices, self._stack(indices)
            start = stop

    def _alike(self, one: int, other: int) -> bool:
        a, b = self.units[one], self.units[other]
        return a.schemes == b.schemes and self.tensors[a.names[0]].shape == self.tensors[b.names[0]].shape

    def _stack(self, indices: list[int]) -> Glu:
        routed = self.spec.moe.num_experts if self.spec.moe else 0
        if self.stacks is not None and indices[-1] < routed and indices[-1] - indices[0] == len(indices) - 1:
            return Glu(
                *(stack[indices[0] : indices[-1] + 1] for stack in (self.stacks[0], self.stacks[1], self.stacks[2]))
            )
        parts = []
        for role in range(3):
            names = [self.units[i].names[role] for i in indices]
            part = torch.stack([self.tensors[name].to(self.h.device) for name in names])
            parts.append(part if self.grouped else part.float())
        return Glu(*parts)

    def collect(self, sample: Sample, quantized: bool | None = None) -> Output:
        """Where the outputs of `chunks(quantized)` are added up, in that order."""
        units = [i for i, unit in enumerate(self.units) if quantized is None or unit.quantized == quantized]
        return (_GroupedOutput if self.grouped and units else Output)(self, sample, units)

    def output(
        self, sample: Sample, change: Callable[[list[int], Glu], Glu] | None = None, quantized: bool | None = None
    ) -> torch.Tensor:
        """Sum over units on the sample, [n, H] float32, with weights replaced by change(indices, weights) if given."""
        out = self.collect(sample, quantized)
        for indices, weights in self.chunks(quantized):
            out.add(indices, out.rows(indices, change(indices, weights) if change else weights))
        return out.total()

    def intermediate(self, h: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """What the down-projection reads: h [n, H] -> [n, I]."""
        return gated(F.linear(h, gate), F.linear(h, up), self.activation)

    def hidden(self, h: torch.Tensor, block: Block, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """What the down-projections of a block's units read: h [u, n, H] float32, stacks [e, I, H] -> [u, n, I]."""
        return gated_rows(h, block.of(gate), block.of(up), self.activation)

    def input_moments(self, indices: list[int]) -> torch.Tensor:
        """E[h^2] over each unit's rows, weighted by gate^2, as an error counts in the block's output.

        [e, H] float32; zeros for a unit without rows.
        """
        missing = [i for i in indices if i not in self._input_moments]
        if missing and self.grouped:
            found = self._grouped_moments(missing, self.h.shape[1], lambda h, block: h)
            self._input_moments.update(zip(missing, found, strict=True))
        elif missing:
            self._input_moments.update({i: self._moment(i, lambda h: h) for i in missing})
        return torch.stack([self._input_moments[i] for i in indices])

    def down_moments(self, indices: list[int], gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The same for the inputs of the units' down-projections under gate and up [e, I, H]: [e, I] float32."""
        if self.grouped:
            return self._grouped_moments(indices, gate.shape[1], lambda h, block: self.hidden(h, block, gate, up))
        reads = [partial(self.intermediate, gate=gate[slot], up=up[slot]) for slot in range(len(indices))]
        return torch.stack([self._moment(i, read) for i, read in zip(indices, reads, strict=True)])

    def _moment(self, index: int, read: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        unit = self.units[index]
        width = read(self.h[:1].float()).shape[-1]
        total, mass = torch.zeros(width, dtype=torch.float64, device=self.h.device), 0.0
        for tokens, gates in zip(torch.split(unit.tokens, _ROWS), torch.split(unit.weights, _ROWS), strict=True):
            if len(tokens):
                squared = gates.square()
                total = total + (read(self.h[tokens].float()).square() * squared[:, None]).sum(0, dtype=torch.float64)
                mass += float(squared.sum(dtype=torch.float64))
        return (total / mass if mass else total).float()

    def _grouped_moments(
        self, indices: list[int], width: int, read: Callable[[torch.Tensor, Block], torch.Tensor]
    ) -> torch.Tensor:
        """`_moment` of several units at once; read(h [u, n, H], block) -> [u, n, width] float32, its own to overwrite."""
        total = torch.zeros(len(indices), width, dtype=torch.float64, device=self.h.device)
        mass = torch.zeros(len(indices), dtype=torch.float64, device=self.h.device)
        for block in self._all_rows(indices):
            values = read(self.h[block.tokens].float(), block).square_().mul_(block.gates.square()[..., None])
            units = slice(None) if block.units is None else block.units
            total[units] += values.sum(1, dtype=torch.float64)
            mass[units] += block.gates.square().sum(1, dtype=torch.float64)
        return (total / torch.where(mass > 0, mass, 1.0)[:, None]).float()

    def _all_rows(self, indices: list[int]) -> list[Block]:
        key = tuple(indices)
        if key not in self._blocks:
            rows: Rows = [(self.units[i].tokens, self.units[i].weights) for i in indices]
            self._blocks[key] = row_blocks(rows)
        return self._blocks[key]


def even_chunk(units: int, most: int) -> int:
    """Units of a chunk, at most `most`, so that the chunks of `units` divide among 2, 4 or 8 ranks."""
    if units <= most:
        return most
    chunks = _SHARES
    while -(-units // chunks) > most:
        chunks += _SHARES
    return -(-units // chunks)


def _schemes(names: tuple[str, str, str], schemes: Mapping[str, Scheme]) -> tuple[Scheme, Scheme, Scheme]:
    gate, up, down = (schemes.get(name, KEEP) for name in names)
    return gate, up, down
