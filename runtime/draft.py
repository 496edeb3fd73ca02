"""A draft model for speculative decoding: what it is and needs by its config.json and headers, and whether it goes with a target."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from ..artifact.source_record import card_facts
from ..checkpoint import CONFIG_NAME, DTYPE_BYTES, Checkpoint, TensorInfo
from ..checkpoint.strict_json import shown
from ..engines import Engine
from ..engines.device import Gpu
from ..engines.drafts import DFLASH, DSPARK, EAGLE3, TITLES, Draft
from ..errors import CheckpointError, OptionError
from ..families import Family
from ..families.config import MAX_LAYERS, MAX_SIZE, MAX_VOCABULARY, ConfigPart, check_values, heads_of
from ..planning.source_tensors import FLOAT_DTYPES
from .draft_format import check_stated_format
from .draft_tables import check_tables
from .fit import Ask

MAX_TOKENS = 64  # guessed in a step: the largest block of a published draft is 16
UNNAMED_TAPS = 3  # vLLM: get_eagle3_default_aux_hidden_state_layers, and llama_eagle3.py's width of fc
_ONE_CODE_A_VALUE = ("F8_E4M3", "I8")  # a matrix of these has the shape of its values; that of packed codes is another
DEFAULT_TOKENS = 3  # of an EAGLE3 draft, as on the cards of those for M2.7 and M3
_SPLIT = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
_LIKE_KV = ("k_proj", "v_proj")
_SPECULATORS = {"eagle3": EAGLE3, "dflash": DFLASH, "dflash2": DFLASH, "dspark": DSPARK}  # speculators_model_type
_SPECULATORS_CLASSES = {
    ("eagle3", "llama"): "Eagle3LlamaForCausalLM",
    ("eagle3", "qwen3"): "Eagle3Qwen3ForCausalLM",
    ("dflash", "qwen3"): "DFlashDraftModel",
    ("dflash2", "qwen3"): "DFlash2DraftModel",
    ("dspark", "qwen3"): "Qwen3DSparkModel",
}  # vLLM's transformers_utils/configs/speculators/algos.py
_CLASS = re.compile(r"\w{1,100}")
_TAPS = ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids", "target_layer_ids")


def open_draft(src: str, family: Family, tokens: int | None = None) -> Draft:
    """The draft in a folder or Hub repo, for a target of that family. tokens: guessed in a step, None for the draft's own number.

    Raises CheckpointError for what is no draft of a known kind, one whose sizes are not the target's, or one whose config.json and weights
    disagree on what is quantized.
    """
    checkpoint = Checkpoint.open(src)
    where = f"{checkpoint.root}/{CONFIG_NAME}"
    check_values(checkpoint.config, where)
    top = ConfigPart(checkpoint.config, where)
    body = top.part("transformer_layer_config") or top.part("text_config") or top
    method, architecture = _kind(top, body)
    _check_sizes(top, body, family, checkpoint)
    check_stated_format(checkpoint, body.values, family.num_layers)
    heads, kv_heads = heads_of(body, kv_needed=False)
    hidden = body.count("hidden_size", MAX_SIZE)
    split, kv, whole = _weights(checkpoint)
    return Draft(
        where=str(Path(src).expanduser().resolve()) if checkpoint.local else src.partition("@")[0],
        revision=checkpoint.revision,
        method=method,
        architecture=architecture,
        tokens=_tokens(method, top, body, tokens),
        layers=body.count("num_hidden_layers", MAX_LAYERS),
        kv_heads=kv_heads,
        head_dim=body.count("head_dim", default=max(1, hidden // heads)),
        taps=_taps(checkpoint, top, body, family, method),
        split_bytes=split,
        kv_bytes=kv,
        whole_bytes=whole,
        licence=_licence(checkpoint),
        fingerprint=checkpoint.fingerprint(),
    )


def with_draft(ask: Ask, family: Family, src: str | None, tokens: int | None) -> Ask:
    """`ask` with the draft in `src`, if one is named. Raises OptionError for tokens without a draft, and as `open_draft`."""
    if src is None:
        if tokens is not None:
            raise OptionError("--draft-tokens is of a draft: name it with --draft.")
        return ask
    return replace(ask, draft=open_draft(src, family, tokens))


def draft_notes(draft: Draft, engine: Engine, gpu: Gpu) -> list[str]:
    """What the user must know of it, and of how the engine runs it there."""
    pinned = f" at {draft.revision[:12]}" if draft.revision else ""
    licence = (
        f"its card states the licence {draft.licence}"
        if draft.licence
        else "it states no licence, so nothing says that you may use it: ask who made it"
    )
    notes = [f"draft {draft.where}{pinned}: {draft.title}, {draft.tokens} tokens a step; {licence}"]
    if draft.method != EAGLE3:
        notes.append(f"{draft.title}: window layers of a draft are planned as layers that keep every token")
    fault = engine.draft_sampling_fault(draft, gpu)
    return [*notes, fault] if fault else notes


def _kind(top: ConfigPart, body: ConfigPart) -> tuple[str, str]:
    """(method, class as vLLM resolves it)."""
    stated = top.raw("speculators_model_type")
    if stated is not None:
        key = (str(stated), str(body.raw("model_type", "llama")))
        if key not in _SPECULATORS_CLASSES:
            raise CheckpointError(
                f"{top.where}: a draft of the kind {key[0][:40]!r} with {key[1][:40]!r} layers is not known: {_NAMED}."
            )
        return _SPECULATORS[key[0]], _SPECULATORS_CLASSES[key]
    names = top.raw("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if name and not _CLASS.fullmatch(name):
        raise top.wrong("architectures", names, "the name of a class")
    low = name.lower()
    if "dspark" in low:
        qwen = name == "DSparkDraftModel" and body.raw("model_type") == "qwen3"
        return DSPARK, "Qwen3DSparkModel" if qwen else name
    if "dflash" in low or (top.has("dflash_config") and "eagle" not in low):
        return DFLASH, name if name.startswith("DFlash") or name.endswith("DFlash") else f"DFlash{name}"
    if "eagle3" in low or (name and (top.has("draft_vocab_size") or top.has("eagle_config"))):
        return EAGLE3, name if name.startswith("Eagle3") or name.endswith("Eagle3") else f"Eagle3{name}"
    raise CheckpointError(f"{top.where} describes no draft ({name or 'no architectures'}): {_NAMED}.")


_NAMED = f"give --draft a checkpoint of {', '.join(TITLES.values())}"


def _check_sizes(top: ConfigPart, body: ConfigPart, family: Family, checkpoint: Checkpoint) -> None:
    """The draft reads the target's hidden states, and shares its embedding and tokens."""
    key = next((part for part in (top, body) if part.has("target_hidden_size")), None)
    hidden = key.count("target_hidden_size", MAX_SIZE) if key else body.count("hidden_size", MAX_SIZE)
    vocabulary = body.count("vocab_size", MAX_VOCABULARY)
    for name, own, target in (
        ("hidden_size", hidden, family.hidden_size),
        ("vocab_size", vocabulary, family.vocab_size),
    ):
        if own != target:
            raise CheckpointError(
                f"{checkpoint.root} is a draft for a target of {name} {own:,}, but {family.where} says {target:,}: take a draft that was trained for this model."
            )
    layers = next(
        (part.count("num_target_layers", MAX_LAYERS) for part in _parts(top, body) if part.has("num_target_layers")),
        None,
    )
    if layers is not None and layers != family.num_layers:
        raise CheckpointError(
            f"{checkpoint.root} is a draft for a target of {layers} layers, but {family.where} says {family.num_layers}: take a draft that was trained for this model."
        )
    part = next((part for part in (top, body) if part.has("draft_vocab_size")), None)
    draft_vocabulary = part.count("draft_vocab_size", MAX_VOCABULARY) if part else vocabulary
    if draft_vocabulary > vocabulary:
        raise CheckpointError(
            f"{top.where}: draft_vocab_size {draft_vocabulary:,} is more than the target's {vocabulary:,}: take a draft that was trained for this model."
        )
    check_tables(checkpoint, draft_vocabulary, vocabulary)
    for name, rows in (("lm_head", draft_vocabulary), ("embed_tokens", vocabulary)):
        info = _matrix(checkpoint, name)
        if info is not None and info.shape[0] != rows:
            raise CheckpointError(
                f"{checkpoint.root}: {shown(info.name)} has {info.shape[0]:,} rows, but config.json says {rows:,} tokens: download it again."
            )


def _matrix(checkpoint: Checkpoint, name: str, dtypes: Collection[str] = FLOAT_DTYPES) -> TensorInfo | None:
    """Its matrix `name` of one of these dtypes, if it has one."""
    for stored, info in checkpoint.tensors.items():
        if stored.split(".")[-2:] == [name, "weight"] and len(info.shape) == 2 and info.dtype in dtypes:
            return info
    return None


def _parts(top: ConfigPart, body: ConfigPart) -> list[ConfigPart]:
    inner = [part for key in ("dflash_config", "eagle_config", "dspark_config") if (part := top.part(key))]
    return [*inner, top, body]


def _taps(checkpoint: Checkpoint, top: ConfigPart, body: ConfigPart, family: Family, method: str) -> int:
    """Hidden states of the target that it reads: by config.json, else by the width of its first projection, else as many as engines give
    an EAGLE3 draft that names none. The first two must agree; the width is not read of packed codes."""
    fc = _matrix(checkpoint, "fc", (*FLOAT_DTYPES, *_ONE_CODE_A_VALUE))
    width = None if fc is None else fc.shape[1] // family.hidden_size
    stated = _stated_taps(top, body, family)
    if fc is not None and fc.shape[1] != (stated or max(1, width or 0)) * family.hidden_size:
        says = f"config.json names {stated} layers" if stated else "a whole number of layers is needed"
        raise CheckpointError(
            f"{checkpoint.root}: {shown(fc.name)} reads {fc.shape[1]:,} values of the target, which has {family.hidden_size:,} a layer, but {says}: download it again."
        )
    if found := stated or width:
        return found
    packed = any("fc" in name.split(".")[-2:-1] for name in checkpoint.tensors)
    if packed and method == EAGLE3:
        return UNNAMED_TAPS
    raise CheckpointError(
        f"{checkpoint.root} names no layers of the target that it reads, and holds no fc.weight"
        f"{' whose width says how many' if packed else ''}: download it again."
    )


def _stated_taps(top: ConfigPart, body: ConfigPart, family: Family) -> int | None:
    """How many layers config.json names, None if none. vLLM sorts them and drops the second of two equal ones, so they must be ascending."""
    for part in _parts(top, body):
        for key in _TAPS:
            if not part.has(key):
                continue
            ids = part.raw(key)
            known = isinstance(ids, list) and ids and all(type(i) is int and 0 <= i <= family.num_layers for i in ids)
            if not known or any(a >= b for a, b in pairwise(ids)):
                raise part.wrong(
                    key, ids, f"an ascending list of different layers of the target, which has {family.num_layers}"
                )
            return len(ids)
    return None


def _tokens(method: str, top: ConfigPart, body: ConfigPart, asked: int | None) -> int:
    """As asked, else what the draft was trained for: DFlash's block holds the token before its guesses, DSpark's does not."""
    if asked is not None:
        return asked
    speculators = top.part("speculators_config")
    methods = speculators.raw("proposal_methods") if speculators else None
    if isinstance(methods, list) and methods and isinstance(methods[0], Mapping):
        proposal = ConfigPart(methods[0], top.where, "speculators_config.proposal_methods")
        return proposal.count("speculative_tokens", MAX_TOKENS)
    if method == EAGLE3:
        return DEFAULT_TOKENS
    for part in _parts(top, body):
        for key in ("block_size", "dspark_block_size"):
            if part.has(key):
                return part.count(key, MAX_TOKENS, least=2) - (method == DFLASH)
    raise CheckpointError(
        f"{top.where} states no block_size: say with --draft-tokens how many tokens it guesses in a step."
    )


def _weights(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """Bytes that tensor parallelism divides, that it divides by KV head, and that every rank holds. Floats take 16 bits in the engine."""
    split = kv = whole = 0
    for info in checkpoint.tensors.values():
        size = _engine_bytes(info)
        parts = info.name.split(".")
        if any(part in _LIKE_KV for part in parts):
            kv += size
        elif any(part in _SPLIT for part in parts):
            split += size
        else:
            whole += size
    return split, kv, whole


def _engine_bytes(info: TensorInfo) -> int:
    elements = info.nbytes // DTYPE_BYTES[info.dtype]
    return 2 * elements if info.dtype in FLOAT_DTYPES else info.nbytes


def _licence(checkpoint: Checkpoint) -> str:
    """What its card's metadata states."""
    facts = card_facts(checkpoint) or {}
    named = [facts[key] for key in ("license", "license_name") if isinstance(facts.get(key), str)]
    text = " ".join(dict.fromkeys(named))
    return text if len(text) <= 120 and text.isprintable() else shown(text, 120)
