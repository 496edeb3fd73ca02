"""From documents to token windows: the checkpoint's tokenizer and chat template, cutting, hashing, held-out windows.

All windows of a run have one length. transformers is imported only when a tokenizer is loaded, torch never.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from m3quant.calibration.documents import Document, corpus_sha256, interleave
from m3quant.calibration.template import TemplateError, rendered_chat
from m3quant.calibration.tokenizing import check_growth, encode
from m3quant.checkpoint.bounded import CONFIG_BYTES, TEXT_BYTES, TOKENIZER_BYTES, check_size
from m3quant.errors import CalibrationError, CheckpointError
from m3quant.extras import need

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")

# What transformers reads whole, with the most that each may have.
TOKENIZER_LIMITS = {
    **dict.fromkeys(("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model"), TOKENIZER_BYTES),
    **dict.fromkeys(
        ("tokenizer_config.json", "config.json", "special_tokens_map.json", "added_tokens.json"), CONFIG_BYTES
    ),
    **dict.fromkeys(("chat_template.jinja", "chat_template.json"), TEXT_BYTES),
}


@dataclass(frozen=True)
class Windows:
    """Token windows for calibration, and what a run records about them."""

    ids: npt.NDArray[np.int64]
    """[S, L] int64 token ids."""
    window_kind_tokens: npt.NDArray[np.int64]
    """[S, kinds] int64: how many tokens of each kind a window has; columns as in `kinds`."""
    kinds: tuple[str, ...]
    sha256: str
    """Over the documents, the tokenizer, the parameters and the ids."""
    corpus_sha256: str
    tokenizer_sha256: str
    seed: int
    source: str
    """Where the documents came from, and how many of them were used."""
    notes: tuple[str, ...] = ()
    """What the user should know, e.g. that there was no chat template."""

    @property
    def kind_tokens(self) -> dict[str, int]:
        """Tokens of each kind in all windows together; they add up to S * L."""
        return dict(zip(self.kinds, self.window_kind_tokens.sum(axis=0).tolist(), strict=True))

    def record(self) -> dict[str, Any]:
        """JSON-able description for a run's journal, without the ids."""
        return {
            "windows": self.ids.shape[0],
            "window_tokens": self.ids.shape[1],
            "kind_tokens": self.kind_tokens,
            "seed": self.seed,
            "source": self.source,
            "notes": list(self.notes),
            "sha256": self.sha256,
            "corpus_sha256": self.corpus_sha256,
            "tokenizer_sha256": self.tokenizer_sha256,
        }


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint folder or Hub repository. Code from the repository runs only if asked for.

    Raises:
        CalibrationError: there is no tokenizer, or transformers cannot read it.
        PackageMissing: there is no transformers.
    """
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CalibrationError(
            f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the model's tokenizer files into it, "
            f"or convert without calibration (--to int4)."
        )
    if not folder.exists() and str(path).count("/") != 1:
        raise CalibrationError(f"{path} does not exist, so its tokenizer cannot be read; check the path.")
    try:
        for name, limit in TOKENIZER_LIMITS.items():
            if (folder / name).exists():
                check_size(folder / name, limit)
    except CheckpointError as error:
        raise CalibrationError(str(error)) from None
    need("convert", f"Reading the tokenizer of {path}")
    from transformers import AutoTokenizer

    # Broken tokenizer files surface as OSError, ValueError, KeyError or an exception of the Rust library.
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CalibrationError(
            f"The tokenizer of {path} cannot be read ({reason}); compare its tokenizer files with the model's own."
        ) from error
    check_growth(tokenizer, str(path))
    return tokenizer


def tokenizer_sha256(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 over what decides the ids: the tokenizer proper, the chat template and the end-of-text token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # A serialised backend carries merges and normalizer; a Python tokenizer is known by its class and vocabulary.
    core = (
        backend.to_str() if backend is not None else [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    )
    fields = [core, tokenizer.chat_template, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def render(document: Document, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The document as one string: its text, or its messages through the tokenizer's chat template.

    Without a template, messages become "role: content" paragraphs; `tokenize_windows` says so in its notes.

    Raises:
        CalibrationError: the template refuses the messages.
    """
    if document.messages is None:
        assert document.text is not None
        return document.text
    if not tokenizer.chat_template:
        return _render_plainly(document)
    tools = list(document.tools) or None
    try:
        return rendered_chat(tokenizer, list(document.messages), tools)
    except TemplateError as error:
        raise CalibrationError(
            f"{document.source}: the tokenizer's chat template refuses these messages ({error}); change or remove the "
            f"record, or give it as plain text."
        ) from None


def _render_plainly(document: Document) -> str:
    parts = [f"tools: {json.dumps(document.tools, ensure_ascii=False)}"] if document.tools else []
    for message in document.messages or ():
        if message.get("reasoning_content"):
            parts.append(f"{message['role']} thinks: {message['reasoning_content']}")
        content = message.get("content") or ""
        if isinstance(content, list):
            content = "\n".join(part.get("text", "") for part in content)
        if content:
            parts.append(f"{message['role']}: {content}")
        for call in message.get("tool_calls", ()):
            arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            parts.append(f"{message['role']} calls {call['function']['name']}: {arguments}")
    return "\n\n".join(parts)


def rendered(
    documents: Iterable[Document], tokenizer: "PreTrainedTokenizerBase", refused: list[str]
) -> Iterator[tuple[Document, str]]:
    """Each document with its text. Those that the chat template refuses are left out, their reasons put into `refused`."""
    for document in documents:
        try:
            yield document, render(document, tokenizer)
        except CalibrationError as error:
            refused.append(str(error))


def refusals(refused: Sequence[str], of: int) -> tuple[str, ...]:
    """What the user should know of the records that the chat template refused."""
    if not refused:
        return ()
    return (
        f"{len(refused):,} of {of:,} records left out, because the chat template refuses them; the first: {refused[0]}",
    )


@dataclass
class _Cut:
    """Tokens as they are gathered."""

    ids: list[int] = field(default_factory=list)
    used: list[tuple[Document, int]] = field(default_factory=list)
    """Each document with its tokens, the closing one included."""
    refused: list[str] = field(default_factory=list)


def tokenize_windows(
    documents: Sequence[Document],
    tokenizer: "PreTrainedTokenizerBase",
    n_windows: int,
    window_length: int,
    *,
    seed: int,
    source: str = "documents",
    more: Callable[[], Sequence[Document]] | None = None,
    notes: Sequence[str] = (),
) -> Windows:
    """Non-overlapping windows cut from the documents, joined with the tokenizer's end-of-text token between them.

    The documents are interleaved by kind and language under `seed` and read until there is enough, so that few windows
    have the mixture of the whole. No token is added at a window's start. A record that the template refuses is left out,
    and the notes say so.

    Args:
        n_windows: S.
        window_length: L, in tokens.
        source: what `Windows.source` calls the documents.
        more: further documents, read only where these are too short; so windows that these fill stay what they are.
        notes: what is known of the documents already.

    Raises:
        CalibrationError: too little text, no end-of-text token, or only records that the template refuses.
    """
    if n_windows < 1 or window_length < 1:
        raise CalibrationError(f"{n_windows} windows of {window_length} tokens: both numbers must be at least 1.")
    if not documents:
        raise CalibrationError("There is no calibration document; give a file, folder or dataset with text.")
    if tokenizer.eos_token_id is None:
        raise CalibrationError('The tokenizer has no end-of-text token; set "eos_token" in tokenizer_config.json.')
    needed = n_windows * window_length
    cut = _Cut()
    _gather(cut, interleave(documents, seed=seed), tokenizer, needed)
    if len(cut.ids) < needed and more is not None:
        further = more()
        documents = [*documents, *further]
        _gather(cut, interleave(further, seed=seed), tokenizer, needed)
    if not cut.ids and cut.refused:
        raise CalibrationError(cut.refused[0])
    if len(cut.ids) < needed:
        left_out = f" {refusal}" if (refusal := "".join(refusals(cut.refused, len(documents)))) else ""
        raise CalibrationError(_too_little(len(cut.ids), len(documents), n_windows, window_length) + left_out)
    kinds = tuple(sorted({document.kind for document in documents}))
    grid = np.array(cut.ids[:needed], dtype=np.int64).reshape(n_windows, window_length)
    repeats = [tokens for _, tokens in cut.used]
    labels = np.repeat([kinds.index(document.kind) for document, _ in cut.used], repeats)
    by_window = labels[:needed].reshape(n_windows, window_length)
    corpus, tokenizer_hash = corpus_sha256(documents), tokenizer_sha256(tokenizer)
    parameters = json.dumps([corpus, tokenizer_hash, n_windows, window_length, seed]).encode()
    used = [document for document, _ in cut.used]
    return Windows(
        ids=grid,
        window_kind_tokens=np.stack([(by_window == kind).sum(axis=1) for kind in range(len(kinds))], axis=1),
        kinds=kinds,
        sha256=hashlib.sha256(parameters + grid.astype("<i8").tobytes()).hexdigest(),
        corpus_sha256=corpus,
        tokenizer_sha256=tokenizer_hash,
        seed=seed,
        source=_describe(source, used, len(documents)),
        notes=(*notes, *refusals(cut.refused, len(used) + len(cut.refused)), *_notes(used, tokenizer)),
    )


def _gather(cut: _Cut, documents: Iterable[Document], tokenizer: "PreTrainedTokenizerBase", needed: int) -> None:
    for document, text in rendered(documents, tokenizer, cut.refused):
        tokens = encode(tokenizer, text)
        # Chat templates close with the end-of-text token, some before a newline.
        if not text.rstrip().endswith(str(tokenizer.eos_token)):
            tokens = [*tokens, tokenizer.eos_token_id]
        cut.ids += tokens
        cut.used.append((document, len(tokens)))
        if len(cut.ids) >= needed:
            return


def _too_little(tokens: int, documents: int, n_windows: int, window_length: int) -> str:
    fits = tokens // window_length
    fewer = (
        f"fewer windows (at most {fits}), or shorter ones"
        if fits
        else f"shorter windows (at most {tokens // n_windows} tokens)"
    )
    return (
        f"The calibration text is too short: {documents} document{'' if documents == 1 else 's'} gave {tokens:,} tokens, and {n_windows} windows of "
        f"{window_length} tokens need {n_windows * window_length:,}; ask for {fewer}, or give more text."
    )


def _describe(source: str, used: Sequence[Document], given: int) -> str:
    counts = Counter(document.kind for document in used)
    mixture = ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts))
    return f"{source}: {len(used)} of {given} documents ({mixture})"


def _notes(used: Sequence[Document], tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    dialogues = [document for document in used if document.messages is not None]
    with_tools = sum(bool(document.tools) for document in dialogues)
    if dialogues and not tokenizer.chat_template:
        return (
            f"The tokenizer has no chat template: {len(dialogues)} chat and tool records were rendered as plain "
            f'"role: content" paragraphs.',
        )
    if with_tools and "tools" not in str(tokenizer.chat_template):
        return (f"The chat template does not use tools: the schemas of {with_tools} records are not in the windows.",)
    return ()
