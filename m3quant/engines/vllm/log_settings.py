"""vLLM's own settings as its log prints them: those that the prediction uses, and those that it does not cover.

vLLM prints what differs from its defaults (`non-default args: {...}`, since 0.10), all arguments (`args: Namespace(...)`, before),
and the resolved configuration (`LLM engine (v...) with config: ...`). If the first was printed, a setting that it lacks has its default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ..start_log import CACHE, OVERHEAD, WEIGHTS

START = "non-default args: "  # printed once a start

EVERYTHING = (WEIGHTS, CACHE, OVERHEAD)

# Taken over by `checklog.asked_by`.
MODELLED = frozenset({
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "decode_context_parallel_size",
    "enable_expert_parallel", "max_seq_len", "max_model_len", "kv_cache_dtype", "max_num_seqs", "max_num_batched_tokens",
    "gpu_memory_utilization", "block_size", "enforce_eager", "language_model_only", "limit_mm_per_prompt", "indexer_kv_dtype",
    "kv_cache_memory_bytes", "kv_cache_memory", "quantization",
})  # fmt: skip
_OFF = frozenset({"none", "false", "null", "{}", "[]", "()", "0", "0.0", "auto", ""})
_FLOATS = frozenset({"auto", "bfloat16", "torch.bfloat16", "float16", "torch.float16", "half"})
# setting -> the values at which it changes nothing, and what it changes otherwise
UNMODELLED: Mapping[str, tuple[frozenset[str], tuple[str, ...]]] = {
    "prefill_context_parallel_size": (_OFF | {"1"}, EVERYTHING),
    "speculative_config": (_OFF, EVERYTHING),  # a draft model has weights and a cache of its own
    "cpu_offload_gb": (_OFF, (WEIGHTS,)),
    "offload_group_size": (_OFF, (WEIGHTS,)),
    "num_redundant_experts": (_OFF, (WEIGHTS,)),
    "enable_eplb": (_OFF, (WEIGHTS, OVERHEAD)),
    "eplb_config": (_OFF, (WEIGHTS, OVERHEAD)),
    "enable_lora": (_OFF, (WEIGHTS, OVERHEAD)),
    "num_gpu_blocks_override": (_OFF - {"0"}, (CACHE,)),
    "kv_cache_dtype_skip_layers": (_OFF, (CACHE,)),
    "dtype": (_FLOATS, EVERYTHING),
    "mm_encoder_tp_mode": (_OFF | {"weights"}, (WEIGHTS,)),
    "enable_dbo": (_OFF, (OVERHEAD,)),
    "max_cudagraph_capture_size": (_OFF - {"0"}, (OVERHEAD,)),
    "cuda_graph_sizes": (_OFF - {"0"}, (OVERHEAD,)),
}
# These are not expected to affect memory; every other one is named if a line differs.
_WITHOUT_MEMORY = re.compile(
    r"model$|model_tag|served_model_name|tokenizer|skip_tokenizer_init|revision|hf_(token|config)|seed|host|port|api_|ssl_|uvicorn|allowed_|tool_|reasoning_|"
    r"enable_auto_tool|chat_template|trust_|load_format|download_dir|safetensors|disable_log|enable_log|max_log|response_role|root_path|"
    r"enable_prefix_caching|enable_chunked_prefill|config$|config_format|config_file|generation_config|override_generation|"
    r"distributed_executor|middleware|data_parallel_(address|rpc|backend|rank|start|size_local|hybrid|external)|"
    r"master_|node|shutdown|stream_|structured_outputs|guided_|scheduling_policy|watermark|async_scheduling|otlp|collect_|"
    r"show_hidden|max_queue|max_num_queued|attention_config|dcp_|default_chat|return_tokens|logits_|max_logprobs"
)
_DICTIONARY = re.compile(r"(non-default args: |args: )(?:Namespace)?[{(]|engine args: \{|\bwith config: ")
# Lines that state settings without a dictionary.
_SENTENCE = re.compile(
    r"LLM engine \(v|non-default args|Chunked prefill is enabled|engine args|MiniMax M3 indexer|Setting kv cache block size to",
    re.IGNORECASE,
)
_SETTING = re.compile(
    rf"['\"]?\b({'|'.join(sorted((MODELLED | UNMODELLED.keys()) - {'dtype'}))})\b['\"]?\s*[=:]\s*['\"]?([\w.]+)"
)
_BLOCK_SIZE = re.compile(r"Setting KV cache block size to (\d+)", re.IGNORECASE)
_PAIR = re.compile(r"['\"]?([A-Za-z_]\w*)['\"]?\s*[:=]\s*(.*)", re.DOTALL)
_OPEN, _CLOSE = "{[(", "}])"


@dataclass
class Settings:
    """values: of the settings that are modelled or known not to be, as text. given: the arguments were printed, so what is absent has
    the engine's default. others: names alone (their values may hold keys)."""

    values: dict[str, str] = field(default_factory=dict)
    given: bool = False
    others: list[str] = field(default_factory=list)


def read_settings(text: str) -> Settings:
    """Every setting of a log's lines; a later line wins."""
    found = Settings()
    for line in text.splitlines():
        if not _SENTENCE.search(line) and not _DICTIONARY.search(line):
            continue
        dictionary = _DICTIONARY.search(line)
        if dictionary is None:
            found.values |= {name: value.rstrip(".") for name, value in _SETTING.findall(line)}
            if block := _BLOCK_SIZE.search(line):
                found.values["block_size"] = block[1]
            continue
        stated = dict(pairs(line[dictionary.end() :]))
        if (attention := stated.get("attention_config")) and (bracket := re.search(r"[{(]", attention)):
            stated |= {k: v for k, v in pairs(attention[bracket.end() :]) if k == "indexer_kv_dtype"}
        known = {name: value for name, value in stated.items() if name in MODELLED or name in UNMODELLED}
        found.values |= known
        if dictionary[0].startswith(START):
            found.given = True
            found.others += [name for name in stated if name not in known and not _WITHOUT_MEMORY.match(name)]
    return found


def pairs(text: str) -> Iterator[tuple[str, str]]:
    """`key: value` and `key=value` of a dict, a Namespace or a config line, up to the bracket that closes it; what is nested stays text.
    Linear in the text."""
    depth, quote, start = 0, "", 0
    for i, char in enumerate(f"{text},"):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in _OPEN:
            depth += 1
        elif char in _CLOSE:
            depth -= 1
        if (char == "," and depth == 0 and not quote) or depth < 0 or i == len(text):
            if pair := _PAIR.fullmatch(text[start:i].strip()):
                yield pair[1], pair[2].strip("'\"")
            start = i + 1
            if depth < 0:
                return


def uncovered(values: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """`setting=value` -> what it changes of memory, for the settings that the prediction does not know."""
    out = {}
    for name, (without_effect, changes) in UNMODELLED.items():
        value = values.get(name)
        if value is not None and value.lower() not in without_effect:
            out[f"{name}={value if len(value) <= 60 else value[:57] + '...'}"] = changes
    return out


def no_images(limit: str) -> bool:
    """Whether a limit_mm_per_prompt leaves out images and videos alike, so that vLLM profiles no vision tower."""
    bracket = re.search(r"[{(]", limit)
    counts = dict(pairs(limit[bracket.end() :])) if bracket else {}
    return all(counts.get(kind) == "0" for kind in ("image", "video"))
