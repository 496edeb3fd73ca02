"""The verdict: does a model fit on a node, how long may a context be, how many requests at once, and what would have to change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..engines import DEFAULT, Engine, Serving, engine_named
from ..engines.device import CPU, GIB
from ..engines.drafts import Draft
from ..engines.integers import is_narrow
from ..engines.offload import Offload
from ..errors import NodeError
from .hardware import STANDARD_NODES, Node, parse_node
from .memory import Pool, Prediction, Setup, kv_dtype_of, predict
from .model import ServedModel, Subject
from .offload import expert_leaves, host_bytes, host_tokens
from .weights import Split, split_problem

MIN_CONTEXT = 4096  # tokens: a pool below this serves no useful request, so a plan without --context calls it too small


@dataclass(frozen=True)
class Ask:
    """What the user wants of a node. None: m3quant chooses."""

    context: int | None = None
    concurrency: int = 1
    kv_dtype: str = "auto"
    index_dtype: str = "bfloat16"
    tp: int | None = None
    pp: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int = DEFAULT.memory.batched_tokens
    utilization: float = DEFAULT.memory.utilization
    vision: bool | None = None  # None: text alone
    block_size: int = DEFAULT.memory.block_size
    engine: str = DEFAULT.name
    release: str | None = None  # of the engine that is installed; None: the newest that is known
    # of a log alone: m3quant plans no replicas of its own
    dp: int = 1
    dcp: int = 1
    expert_parallel: bool | None = None
    enforce_eager: bool = False
    draft: Draft | None = None
    kv_offload: int = 0  # bytes of host memory, of all ranks
    weight_offload: int = 0  # of each rank
    slow_offload: bool = False  # whether it may cost more per token than more GPUs


@dataclass(frozen=True)
class Fit:
    """The verdict for one model on one node. longest_context: one request's, in memory and within config.json; 0 if none. why_not: a
    sentence, short: the same in few words, for a table; both '' where it fits."""

    model: ServedModel
    node: Node
    ask: Ask
    setup: Setup
    prediction: Prediction
    longest_context: int
    fits: bool
    why_not: str
    loads: bool = True  # whether the engine reads the checkpoint at all
    dear: bool = False  # whether it would run, but more GPUs cost less per token
    short: str = ""

    @property
    def pool(self) -> Pool:
        """What may be promised: the pool at the high end of every overhead."""
        return self.prediction.pool("high")

    @property
    def context(self) -> int:
        """--max-model-len: what was asked, else the longest."""
        return self.ask.context or self.longest_context

    @property
    def concurrency(self) -> int:
        return self.pool.concurrency(self.context) if self.fits else 0

    @property
    def verdict(self) -> str:
        """For display."""
        if self.fits or self.dear:
            return "fits" if self.fits else "costs too much"
        return "does not fit" if self.loads else "is not loaded"

    @property
    def engine(self) -> Engine:
        return engine_named(self.ask.engine)

    @property
    def serving(self) -> Serving:
        """What the engine is given of this verdict."""
        setup, rank = self.setup, self.prediction.tightest
        return Serving(
            where=self.model.where,
            family=self.model.family,
            config=self.model.config,
            gpu=self.node.gpu,
            context=self.context,
            tp=setup.split.tp,
            pp=setup.split.pp,
            expert_parallel=setup.split.expert_parallel,
            vision=setup.split.vision,
            kv_dtype=setup.kv_dtype,
            kv_dtype_asked=self.ask.kv_dtype != "auto",
            index_dtype=setup.index_dtype,
            utilization=setup.utilization,
            static_fraction=(rank.requested - rank.activation.high - rank.graphs.high) / rank.total,
            max_num_seqs=setup.max_num_seqs,
            max_num_batched_tokens=setup.max_num_batched_tokens,
            block_size=setup.block_size,
            draft=setup.draft,
            kv_offload=setup.kv_offload,
            weight_offload=setup.weight_offload,
        )

    def command(self) -> list[str]:
        """The engine's whole command. Raises NodeError for a verdict that does not fit: there is no command that would work."""
        if not self.fits:
            raise NodeError(f"{self.model.where} {self.verdict} on {self.node.name}: {self.why_not}.")
        return self.engine.command(self.serving)


def assess(model: ServedModel, node: Node, ask: Ask) -> Fit:
    """Judge one model on one node. Raises NodeError for a request that makes no sense anywhere."""
    if ask.concurrency < 1 or (ask.context is not None and ask.context < 1):
        raise NodeError("--context and --concurrency must be at least 1.")
    split, problem = _split(model, node, ask)
    memory = engine_named(ask.engine).memory_of(ask.release)
    setup = Setup(
        split=split,
        kv_dtype=memory.kv_name(kv_dtype_of(model.config, ask.kv_dtype)),
        index_dtype=memory.index_name(ask.index_dtype),
        utilization=ask.utilization,
        max_num_seqs=ask.max_num_seqs or max(memory.num_seqs, ask.concurrency),
        max_num_batched_tokens=ask.max_num_batched_tokens,
        block_size=ask.block_size,
        enforce_eager=ask.enforce_eager,
        engine=ask.engine,
        release=ask.release,
        draft=ask.draft,
        kv_offload=ask.kv_offload,
        weight_offload=ask.weight_offload,
    )
    prediction = predict(node, model.family, model.groups, setup)
    pool = prediction.pool("high")
    in_memory = max(0, pool.blocks - 1) // ask.concurrency * pool.block_size
    longest = min(in_memory, model.max_positions or in_memory)
    engine = engine_named(ask.engine)
    refusal = model.problem or engine.checkpoint_refusal(model.config, ask.release)
    refusal = refusal or engine.release_refusal(model.family, model.schemes, ask.release)
    check = "the split over GPUs"
    if setup.index_dtype != "bfloat16" and model.family.kv_geometry.index_layers and not (refusal or problem):
        check, problem = "--index-dtype", engine.index_refusal(node.gpu, ask.release)
    if ask.draft is not None and not (refusal or problem):
        check, problem = "--draft", engine.draft_refusal(ask.draft, model.family, node.gpu, split.pp, ask.release)
    if (ask.kv_offload or ask.weight_offload) and not (refusal or problem):
        check, problem = "weights or cache in host memory", _offload_problem(model, ask, prediction)
    if refusal or problem:
        short, why = ("the engine does not read it", refusal) if refusal else (check, problem)
    else:
        short, why = _why_not(model, ask, setup, prediction, longest)
    return Fit(model, node, ask, setup, prediction, 0 if problem else longest, not why, why, not refusal, short=short)


def _split(model: ServedModel, node: Node, ask: Ask) -> tuple[Split, str]:
    """The split asked for, or the first that the model allows: TP over the node, then with whole experts, then with stages."""
    count = node.count // ask.dp
    if ask.tp or ask.pp:
        tp = ask.tp or max(1, count // (ask.pp or 1))
        pp = ask.pp or max(1, count // tp)
        ranks = tp * pp * ask.dp
        if min(tp, pp, ask.dp) < 1 or ranks != node.count:
            replicas = f" x DP {ask.dp}" if ask.dp > 1 else ""
            raise NodeError(
                f"TP {tp} x PP {pp}{replicas} is {ranks} ranks, but {node.name} has {node.count} GPUs: choose factors of {node.count}."
            )
        shapes = [(tp, pp)]
    else:
        # More ranks than KV heads save no cache (each keeps a head of its own), stages do: those splits come last.
        heads = model.family.kv_geometry.kv_heads
        divisors = [n for n in range(count, 0, -1) if count % n == 0]
        shapes = sorted(((tp, count // tp) for tp in divisors), key=lambda shape: shape[0] > heads)
    first, vision = "", bool(ask.vision) and model.has_vision
    for tp, pp in shapes:
        choices = (False, True) if tp * ask.dp > 1 else (False,)
        for whole_experts in choices if ask.expert_parallel is None else (ask.expert_parallel,):
            split = Split(tp, pp, whole_experts, vision, ask.dp, ask.dcp)
            problem = split_problem(model.groups, split, model.family)
            if not problem:
                return split, ""
            first = first or problem
    return Split(*shapes[0], bool(ask.expert_parallel), vision, ask.dp, ask.dcp), first


def _offload_problem(model: ServedModel, ask: Ask, prediction: Prediction) -> str:
    """Why host memory cannot be used as asked, and what to do; '' where it can."""
    node, setup = prediction.node, prediction.setup
    if node.gpu.name == CPU:
        return "on the CPU weights and cache are in host memory already: leave --kv-offload and --weight-offload out"
    if node.gpu.shared:
        return f"the memory of {node.gpu.name} is the host's: leave --kv-offload and --weight-offload out"
    stored = expert_leaves(model.groups)
    narrow = any(map(is_narrow, model.schemes))
    asked = Offload(ask.kv_offload, ask.weight_offload, stored, narrow, node.gpu, ask.release)
    if problem := engine_named(ask.engine).offload_refusal(asked):
        return problem
    per_token = [rank.bytes_per_token for rank in prediction.ranks]
    if setup.kv_offload and not host_tokens(setup.kv_offload, per_token, setup.block_size, setup.split):
        return f"--kv-offload {setup.kv_offload:,} bytes hold no block of {setup.block_size} tokens: give more, for example 100GiB"
    need = host_bytes(setup.kv_offload, [rank.moved for rank in prediction.ranks], setup.split)
    have = node.count * node.gpu.host_bytes
    if have and need > have:
        rounded = " (torch rounds pinned tensors up)" if setup.weight_offload else ""
        options = " or ".join(
            o for o, n in (("--kv-offload", setup.kv_offload), ("--weight-offload", setup.weight_offload)) if n
        )
        return f"{need / GIB:.0f} GiB of host memory are needed{rounded}, {node.name} has about {have / GIB:.0f}: give less to {options}"
    return ""


def _why_not(model: ServedModel, ask: Ask, setup: Setup, prediction: Prediction, longest: int) -> tuple[str, str]:
    """In few words, and as a sentence; ('', '') where it fits."""
    rank, pool = prediction.tightest, prediction.pool("high")
    left = rank.kv_bytes(rank.overhead.high)
    if left <= 0:
        return (
            f"{_gib(-left)} GiB too much per GPU before any cache",
            f"weights take {rank.weight_bytes / GIB:.1f} GiB and overhead up to {rank.overhead.high / GIB:.1f} GiB of the "
            f"{rank.requested / GIB:.1f} GiB per GPU that utilization {setup.utilization:g} allows: {-left / GIB:.1f} GiB too much, before any KV cache",
        )
    if ask.context and model.max_positions and ask.context > model.max_positions:
        return (
            f"config.json allows {model.max_positions:,} tokens",
            f"config.json allows {model.max_positions:,} tokens (max_position_embeddings), {ask.context:,} were asked for",
        )
    if batch := engine_named(ask.engine).batch_refusal(setup.max_num_seqs, setup.max_num_batched_tokens):
        return "--max-num-seqs above --max-num-batched-tokens", batch
    if setup.max_num_seqs < ask.concurrency:
        return (
            "--max-num-seqs below --concurrency",
            f"--max-num-seqs {setup.max_num_seqs} is less than the {ask.concurrency} requests asked for",
        )
    wanted = ask.context or min(MIN_CONTEXT, model.max_positions or MIN_CONTEXT)
    if pool.concurrency(wanted) < ask.concurrency:
        blocks = 1 + ask.concurrency * math.ceil(wanted / pool.block_size) - pool.blocks  # one holds nothing
        return (
            f"{_gib(blocks * setup.block_size * rank.bytes_per_token)} GiB of KV cache missing per GPU",
            f"{ask.concurrency} x {wanted:,} tokens need {ask.concurrency * wanted * rank.bytes_per_token / GIB:.1f} GiB of KV cache per GPU, "
            f"{left / GIB:.1f} GiB are left: {pool.tokens:,} tokens in all, {longest:,} for each",
        )
    return "", ""


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f}" if nbytes >= GIB / 20 else "less than 0.1"


@dataclass(frozen=True)
class Remedy:
    """One change that was tried and makes it fit."""

    change: str
    fit: Fit


def remedies(fit: Fit, subject: Subject | None = None) -> list[Remedy]:
    """What would have to change for a model that does not fit: smallest change first, each evaluated like the original.

    Of recipes and of nodes, the two nearest that fit are named.
    """
    small = _smallest_cache(fit)
    found = [*_judged(_flag_changes(fit, small), 9)]
    found += _judged(_recipe_changes(fit, small, subject) if subject else iter(()), 2)
    return found + _judged(_node_changes(fit, small), 2)


Change = tuple[str, ServedModel, Node, Ask]


def _judged(changes: Iterator[Change], limit: int) -> list[Remedy]:
    found: list[Remedy] = []
    for change, model, node, ask in changes:
        try:
            tried = assess(model, node, ask)
        except NodeError:
            continue
        repeated = limit <= 2 and any(r.fit.model is model and r.fit.node == node for r in found)
        if tried.fits and not repeated and len(found) < limit:
            found.append(Remedy(change, tried))
    return found


def _smallest_cache(fit: Fit) -> Ask:
    has_index = fit.model.family.kv_geometry.index_layers > 0
    return replace(fit.ask, kv_dtype="fp8", index_dtype="fp8" if has_index else fit.ask.index_dtype)


def _cache_flags(ask: Ask, small: Ask) -> str:
    flags = " --kv-dtype fp8" if ask.kv_dtype != small.kv_dtype else ""
    return flags + (" --index-dtype fp8" if ask.index_dtype != small.index_dtype else "")


def _flag_changes(fit: Fit, small: Ask) -> Iterator[Change]:
    model, node, ask = fit.model, fit.node, fit.ask
    if ask.draft is not None and fit.setup.split.pp > 1:
        yield f"--tp {node.count} --pp 1", model, node, replace(ask, tp=node.count, pp=1)
    if ask.draft is not None:
        yield "no --draft", model, node, replace(ask, draft=None)
    if ask.kv_offload or ask.weight_offload:
        yield "no --kv-offload and no --weight-offload", model, node, replace(ask, kv_offload=0, weight_offload=0)
    if fit.setup.memory.kv_bytes[fit.setup.kv_dtype] > 1:
        yield "--kv-dtype fp8", model, node, replace(ask, kv_dtype="fp8")
    if small.index_dtype != ask.index_dtype:
        yield _cache_flags(ask, small).strip(), model, node, small
    if ask.context and fit.longest_context >= MIN_CONTEXT:
        yield (
            f"--context {fit.longest_context} in place of {ask.context}",
            model,
            node,
            replace(ask, context=fit.longest_context),
        )
    if ask.concurrency > 1:
        yield f"--concurrency 1 in place of {ask.concurrency}", model, node, replace(ask, concurrency=1)


def _recipe_changes(fit: Fit, small: Ask, subject: Subject) -> Iterator[Change]:
    for other in subject.precisions()[0]:
        if other.stored_bytes < fit.model.stored_bytes:
            change = (
                f"--to {other.label} ({other.stored_bytes / 1e9:.3g} GB in place of {fit.model.stored_bytes / 1e9:.3g})"
            )
            yield change, other, fit.node, fit.ask
            yield change + _cache_flags(fit.ask, small), other, fit.node, small


def _node_changes(fit: Fit, small: Ask) -> Iterator[Change]:
    for name in STANDARD_NODES if fit.node.gpu.name != CPU else ():
        larger = parse_node(name)
        if larger.count * larger.gpu.total_bytes > fit.node.count * fit.node.gpu.total_bytes:
            yield f"--on {name}", fit.model, larger, replace(fit.ask, tp=None, pp=None, weight_offload=0)
            yield (
                f"--on {name}{_cache_flags(fit.ask, small)}",
                fit.model,
                larger,
                replace(small, tp=None, pp=None, weight_offload=0),
            )
