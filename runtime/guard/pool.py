"""The KV cache pool as the engine measured it, read from vLLM's own objects in the same process.

`kv_cache_size_tokens` is the pool (facts of vLLM 0.27 to 0.33: `vllm:cache_config_info` shows the same figure; blocks x block size is wrong
for hybrid caches, vllm#51163). One block is vLLM's null block and holds nothing. Reading is a few attribute look-ups, so every request
sees the present figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from m3quant.errors import GuardError

from .settings import GuardSettings


def draft_slots(guesses: int, stages: int) -> int:
    """Slots that a request may take beyond its tokens where a draft guesses `guesses` a step, over `stages` pipeline stages.

    As vLLM 0.32 schedules (v1/core/sched/scheduler.py: schedule): a step takes 1 + guesses slots, and with asynchronous scheduling one more
    is planned while as many as there are stages still run, which may all be right. In addition the draft writes ahead up to guesses + 1
    (config/vllm.py: num_lookahead_tokens). Three of these places are the request's own: of its last token and the two before it.
    """
    return (stages + 1) * (1 + guesses) + guesses + 1 - 3 if guesses else 0


@dataclass(frozen=True)
class Pool:
    """Sizes in tokens. `usable` excludes the null block and the watermark and is whole blocks."""

    tokens: int
    block_size: int
    max_model_len: int
    usable: int
    lookahead: int = 0  # slots that speculative decoding takes beyond the tokens
    default_output: int | None = None  # the server's own max_tokens default (generation config)
    output_cap: int | None = None  # the server's own ceiling on max_tokens
    prefix_caching: bool = False

    def blocks(self, tokens: int) -> int:
        """Tokens rounded up to whole blocks."""
        return -(-tokens // self.block_size) * self.block_size

    @property
    def longest(self) -> int:
        """The longest sequence, prompt and output, that this server can ever hold."""
        return min(self.max_model_len, self.usable - self.lookahead)


class PoolReader:
    """Reads the pool behind the application of an ASGI scope."""

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self._pool: Pool | None = None
        self._seen: tuple[Any, ...] = ()
        self._model: Any = None
        self._defaults: tuple[int | None, int | None] = (None, None)

    def read(self, scope: dict[str, Any]) -> Pool:
        """Raises GuardError when the server is not vLLM and the settings do not say, or when the guard cannot be right about it."""
        settings = self.settings
        config = getattr(getattr(scope.get("app"), "state", None), "vllm_config", None)
        if config is not None:
            refuse_many(config)
        cache = getattr(config, "cache_config", None)
        model = getattr(config, "model_config", None)
        tokens = settings.pool_tokens or getattr(cache, "kv_cache_size_tokens", None)
        block = settings.block_size or getattr(cache, "block_size", None)
        length = settings.max_model_len or getattr(model, "max_model_len", None)
        speculative = getattr(config, "speculative_config", None)
        guesses = getattr(speculative, "num_speculative_tokens", 0) or 0
        stages = getattr(getattr(config, "parallel_config", None), "pipeline_parallel_size", 1) or 1
        seen = (tokens, block, length, draft_slots(guesses, stages), id(model), id(cache))
        if seen == self._seen and self._pool is not None:
            return self._pool
        known = {"POOL_TOKENS": tokens, "BLOCK_SIZE": block, "MAX_MODEL_LEN": length}
        if missing := [f"M3QUANT_GUARD_{name}" for name, value in known.items() if not value]:
            raise GuardError(f"The server does not tell its KV cache pool; set {' and '.join(missing)}.")
        assert tokens and block and length
        usable = int((tokens - block) * (1 - settings.watermark)) // block * block
        if usable <= 0:
            raise GuardError(f"A KV cache of {tokens} tokens in blocks of {block} leaves nothing to serve from.")
        default, cap = self._output_defaults(model)
        self._pool, self._seen = None, seen
        self._pool = Pool(
            tokens=tokens,
            block_size=block,
            max_model_len=length,
            usable=usable,
            lookahead=seen[3],
            default_output=default,
            output_cap=cap,
            prefix_caching=bool(getattr(cache, "enable_prefix_caching", False)),
        )
        return self._pool

    def _output_defaults(self, model: Any) -> tuple[int | None, int | None]:
        """The server's own default and ceiling of max_tokens (`--generation-config`, `--override-generation-config`).

        As vLLM's `OpenAIServingChat` reads them; it does so once, when it starts, and this remembers them for the same reason: the
        call reads a file.
        """
        if model is None or not hasattr(model, "get_diff_sampling_param"):
            return None, None
        if self._model is not model:
            default = model.get_diff_sampling_param().get("max_tokens")
            override = getattr(model, "override_generation_config", None) or {}
            own_file = getattr(model, "generation_config", "auto") not in ("auto", "vllm")
            self._model, self._defaults = model, (default, default if own_file else override.get("max_new_tokens"))
        return self._defaults


def refuse_many(config: Any) -> None:
    """One guard must see every request of one pool."""
    parallel = getattr(config, "parallel_config", None)
    if (servers := getattr(parallel, "_api_process_count", 1) or 1) > 1:
        raise GuardError(
            f"{servers} API server processes share one KV cache, and each would have a guard that does not know of the others; "
            "start vLLM with --api-server-count 1."
        )
    if (replicas := getattr(parallel, "data_parallel_size", 1) or 1) > 1:
        raise GuardError(
            f"{replicas} data-parallel engines have {replicas} KV caches behind one door, and the guard counts one; "
            "start one server for each, with a router in front."
        )
