"""What each rank of an engine holds of a checkpoint's weights, from names, dtypes and shapes alone.

Tensors are gathered into groups that differ in nothing but the expert, so that 140,000 headers cost a fraction of a second.
How vLLM splits each part: vllm/model_executor/models/minimax_m2.py, models/minimax_m3/nvidia/model.py and
model_executor/layers/linear.py (0.32).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ..checkpoint import DTYPE_BYTES, Checkpoint
from ..engines.memory import MemoryModel
from ..families import QUANTIZABLE, Family, Role
from ..planning.engine_kept import PASSED_THROUGH
from ..planning.layout import tensors_of
from ..planning.source_layouts import PLAIN, SourceTensor
from ..planning.source_tensors import FLOAT_DTYPES
from ..recipe.recipe import Recipe

VOCAB_PADDING = 64  # DEFAULT_VOCAB_PADDING_SIZE of vocab_parallel_embedding.py
_ROW = ("o_proj", "down_proj", "w2")  # RowParallelLinear: split along the input
_LIKE_KV = ("k_proj", "v_proj", "index_q_proj")  # split by KV head, repeated where ranks outnumber heads
_REPLICATED_PARTS = ("index_k_proj",)  # one shared head on every rank
_SCALES = ("weight_scale", "weight_scale_inv", "scales", "qzeros", "weight_zero_point")
_UNSPLIT = (
    "weight_shape",
    "input_scale",
    "input_global_scale",
    "weight_scale_2",
    "weight_global_scale",
    "k_scale",
    "v_scale",
)  # a few numbers per tensor, on every rank
_ROUTING = ("router", "router_bias")  # float32 in the engine whatever the file holds
_TOWER = ("vision", "projector")


@dataclass(frozen=True)
class Group:
    """`count` tensors of one role, part, dtype and shape in one layer. leaf: the name's last part (weight, weight_packed, ...)."""

    role: str
    part: str
    layer: int | None
    leaf: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    per_expert: bool = False
    joined: bool = False  # as `families.base.Role.joined`

    @property
    def elements(self) -> int:
        return self.count * math.prod(self.shape)

    @property
    def engine_bytes(self) -> int:
        """Bytes of the group in the engine: floats in the model's 16-bit dtype, routing and FP8 scales in float32, codes as stored."""
        if self.role == "mtp":
            return 0  # vLLM skips these tensors unless a draft model asks for them
        if self.role in _ROUTING:
            return 4 * self.elements
        if self.dtype in FLOAT_DTYPES and (self.leaf in ("weight", "bias") or self.role not in QUANTIZABLE):
            return 2 * self.elements
        return DTYPE_BYTES[self.dtype] * self.elements


def as_kept(groups: Iterable[Group], memory: MemoryModel) -> list[Group]:
    """Groups as the engine keeps them where that is larger than on disk: zero points of experts of few bits.

    compressed-tensors packs the zero points of N rows of b bits into N b / 32 words, so b is 32 x words / rows of the codes.
    """
    found = list(groups)
    rows = {(g.layer, g.part): g.shape[0] for g in found if g.per_expert and g.leaf == "weight_packed"}
    return [_wider(g, rows.get((g.layer, g.part), 0), memory.least_zero_point_bits) for g in found]


def _wider(group: Group, rows: int, least: int) -> Group:
    if not (group.per_expert and group.leaf == "weight_zero_point" and rows):
        return group
    bits = max(1, round(32 * group.shape[0] / rows))
    kept = max(least, 1 << (bits - 1).bit_length())
    return replace(group, shape=(math.ceil(rows * kept / 32), *group.shape[1:]))


def gather(family: Family, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> list[Group]:
    """Groups of the tensors (name, dtype, shape) of a checkpoint."""
    counts: dict[tuple[str, str, str, tuple[int, ...]], int] = {}
    for name, dtype, shape in tensors:
        before, dot, after = name.partition(".experts.")
        key = (before, after.partition(".")[2] if dot else "", dtype, shape)
        counts[key] = counts.get(key, 0) + 1
    roles: dict[tuple[str, str], tuple[Role, str]] = {}
    merged: dict[tuple[str, str, int | None, str, str, tuple[int, ...], bool, bool], int] = {}
    for (before, tail, dtype, shape), count in counts.items():
        found = roles.get((before, tail))
        if found is None:
            name = f"{before}.experts.0.{tail}" if tail else before
            found = roles[(before, tail)] = (family.role(name), name.rpartition(".")[2])
        role, leaf = found
        group = (role.kind, role.part, role.layer, leaf, dtype, shape, bool(tail), role.joined)
        merged[group] = merged.get(group, 0) + count
    return [
        Group(r, part, layer, leaf, dtype, shape, n, expert, joined)
        for (r, part, layer, leaf, dtype, shape, expert, joined), n in merged.items()
    ]


def checkpoint_groups(checkpoint: Checkpoint, family: Family) -> list[Group]:
    """Groups of a checkpoint as it is stored."""
    return gather(family, ((t.name, t.dtype, t.shape) for t in checkpoint.tensors.values()))


def model_groups(tensors: Iterable[SourceTensor], family: Family) -> list[Group]:
    """Groups of a source's tensors as a conversion reads them: dense, but for those that it passes through as they are stored."""

    def entries() -> Iterator[tuple[str, str, tuple[int, ...]]]:
        for source in tensors:
            if source.kind == PLAIN:
                yield source.name, source.info.dtype, source.shape
            elif family.role(source.name).kind in PASSED_THROUGH:
                yield from ((part.name, part.dtype, part.shape) for part in source.stored)
            else:
                yield source.name, "BF16", source.shape

    return gather(family, entries())


def converted_groups(groups: Iterable[Group], recipe: Recipe) -> list[Group]:
    """Groups after a conversion by `recipe` of the tensors that `model_groups` or `bf16_release` gives; the same sizes as `m3quant.planning.plan.make_plan` gives.

    Raises PlanError where a shape does not divide.
    """
    out = []
    for group in groups:
        scheme = recipe.scheme(group.role, group.layer) if group.role in QUANTIZABLE else None
        if scheme is None or not scheme.quantizes or group.leaf != "weight":
            out.append(group)
            continue
        stored = tensors_of(group.shape, scheme, recipe.format, group.joined)
        out += [_with(group, leaf, dtype, tuple(shape)) for leaf, (dtype, shape) in stored.items()]
    return out


def _with(group: Group, leaf: str, dtype: str, shape: tuple[int, ...]) -> Group:
    return Group(group.role, group.part, group.layer, leaf, dtype, shape, group.count, group.per_expert)


def stored_bytes(groups: Iterable[Group]) -> int:
    """Bytes of all tensors on disk."""
    return sum(DTYPE_BYTES[g.dtype] * g.elements for g in groups)


def bf16_release(family: Family) -> list[Group]:
    """Groups of the BF16 weights that a config.json describes."""
    wanted = family.expected_tensors
    return gather(family, ((n, "F32" if e.float32 else "BF16", e.shape) for n, e in wanted.items()))


@dataclass(frozen=True)
class Split:
    """How an engine divides the model: tp ranks a stage, pp stages, experts whole (expert_parallel) or split like the rest.

    dp: replicas of everything but the routed experts, which all tp x dp ranks of a stage share (vLLM's
    fused_moe/config.py: FusedMoEParallelConfig.make). dcp: tp ranks that share the tokens of the cache among them.
    """

    tp: int = 1
    pp: int = 1
    expert_parallel: bool = False
    vision: bool = False
    dp: int = 1
    dcp: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def expert_ranks(self) -> int:
        return self.tp * self.dp


def stage_of_layers(layers: int, pp: int) -> list[range]:
    """Layers of each pipeline stage, as vLLM's `get_pp_indices` divides them (distributed/utils.py)."""
    sizes = [layers // pp] * pp
    remaining = layers % pp
    for i in range(2, remaining + 2):
        sizes[-i] += 1
    starts = [sum(sizes[:i]) for i in range(pp)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def rank_weights(groups: Iterable[Group], split: Split, kv_heads: int, layers: int) -> list[dict[str, int]]:
    """Per pipeline stage: bytes that one rank holds, by role. All tensor-parallel ranks of a stage hold the same."""
    stages = stage_of_layers(layers, split.pp)
    stage_by_layer = {layer: i for i, stage in enumerate(stages) for layer in stage}
    totals: list[dict[str, int]] = [{} for _ in stages]
    for group in groups:
        if group.role in _TOWER and not split.vision:
            continue
        size = rank_share(group, split, kv_heads)
        if group.layer is not None and group.layer in stage_by_layer:
            where = [stage_by_layer[group.layer]]
        elif group.role == "embedding":
            where = [0]
        elif group.role in ("lm_head", "norm"):
            where = [len(stages) - 1]
        else:
            where = list(range(len(stages)))  # the vision tower is built on every stage; unknown extras likewise
        for stage in where:
            totals[stage][group.role] = totals[stage].get(group.role, 0) + size
    return totals


def rank_share(group: Group, split: Split, kv_heads: int) -> int:
    """Bytes of the group on one rank of its stage."""
    whole, tp = group.engine_bytes, split.expert_ranks if group.per_expert else split.tp
    if group.role in ("embedding", "lm_head"):
        rows = group.shape[0]
        padded = math.ceil(rows / VOCAB_PADDING) * VOCAB_PADDING
        return whole // rows * math.ceil(padded / tp)
    if group.role in _TOWER:
        return math.ceil(whole / tp) if len(group.shape) == 2 else whole
    if group.role not in QUANTIZABLE or group.part in _REPLICATED_PARTS or group.leaf in _UNSPLIT:
        return whole
    if group.part in _LIKE_KV:
        return math.ceil(whole / min(tp, kv_heads))
    if group.per_expert and split.expert_parallel:
        return math.ceil(whole / tp)
    if group.part in _ROW and group.leaf in _SCALES and _one_input_group(group):
        return whole  # one scale per output row: every rank that holds part of the inputs needs it
    return math.ceil(whole / tp)


def _one_input_group(group: Group) -> bool:
    if group.leaf in ("scales", "qzeros"):  # AutoAWQ keeps [groups, out]
        return group.shape[0] == 1
    return len(group.shape) < 2 or group.shape[-1] == 1


def split_problem(groups: Iterable[Group], split: Split, family: Family) -> str:
    """Why this model cannot be divided so, or ''. Only what names and shapes tell: heads, groups and FP8 blocks."""
    heads, kv = family.num_heads, family.kv_geometry.kv_heads
    if heads % split.tp:
        return f"{heads} attention heads do not divide by TP {split.tp}"
    if max(kv, split.tp) % min(kv, split.tp):
        return f"{kv} KV heads and TP {split.tp} do not divide"
    if split.pp > family.num_layers:
        return f"PP {split.pp} exceeds the {family.num_layers} layers"
    for group in groups:
        if group.role not in QUANTIZABLE or group.part in ("", *_REPLICATED_PARTS) or group.leaf in _UNSPLIT:
            continue
        if group.per_expert and split.expert_parallel:
            if family.moe and family.moe.num_experts % split.expert_ranks:
                return f"{family.moe.num_experts} experts do not divide by {split.expert_ranks} ranks"
            continue
        ranks = split.expert_ranks if group.per_expert else split.tp
        ways = min(ranks, kv) if group.part in _LIKE_KV else ranks
        pieces = _pieces(group)
        if pieces % ways and pieces != 1:
            return f"{group.role} {group.part}: its {pieces} {_piece_name(group)} do not divide by TP {ranks}"
    return ""


def _pieces(group: Group) -> int:
    """Along the axis that is split: rows or columns of a weight; blocks or groups of a scale, none of which may be cut."""
    transposed = group.leaf in ("scales", "qzeros", "qweight")  # AutoAWQ keeps [in, out]
    if len(group.shape) < 2:
        return 1 if group.part in _ROW or not group.shape else group.shape[0]
    return group.shape[-1 if (group.part in _ROW) != transposed else 0]


def _piece_name(group: Group) -> str:
    return "scale blocks or groups" if group.leaf in _SCALES else "rows or columns"
