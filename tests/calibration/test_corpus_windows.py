"""Token windows: rendering through the chat template, cutting, hashing, holding out, and the tokenizer's folder."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3quant.calibration import corpus
from m3quant.calibration.corpus import Document, interleave, load_documents
from m3quant.errors import CalibrationError


@pytest.fixture(scope="module")
def bundled() -> list[Document]:
    return load_documents(None)


CHAT_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
    "{% for k, v in c.function.arguments | items %}<{{ k }}>{{ v }}{% endfor %}</call>{% endfor %}<eos>{% endfor %}"
)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE, eos: str | None = "<eos>") -> Any:
    """A byte-level tokenizer without merges: one token a byte, so that tests can count."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)
    fast.chat_template = chat_template
    return fast


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def text_document(text: str, kind: str = "text") -> Document:
    return Document(kind, "en", "test", "Apache-2.0", text=text)


class TestWindows:
    def test_documents_are_joined_with_one_eos_and_cut_without_overlap(self, tokenizer: Any) -> None:
        documents = [text_document("abcdef"), text_document("ghi"), text_document("jkl<eos>\n")]
        windows = corpus.tokenize_windows(documents, tokenizer, 4, 4, seed=1)
        assert windows.ids.dtype == np.int64 and windows.ids.shape == (4, 4)
        closed = {"abcdef": "abcdef<eos>", "ghi": "ghi<eos>", "jkl<eos>\n": "jkl<eos>\n"}
        expected = "".join(closed[document.text or ""] for document in interleave(documents, seed=1))
        assert tokenizer.decode(windows.ids.reshape(-1)) == expected
        assert windows.kind_tokens == {"text": 16}

    def test_kind_tokens_are_those_of_the_windows(self, tokenizer: Any) -> None:
        documents = [text_document("a" * 40), text_document("b" * 23, kind="code")]
        windows = corpus.tokenize_windows(documents, tokenizer, 3, 20, seed=0)
        eos = tokenizer.eos_token_id
        a, b = (int((windows.ids == tokenizer.convert_tokens_to_ids(letter)).sum()) for letter in "ab")
        closings = int((windows.ids == eos).sum())
        assert sum(windows.kind_tokens.values()) == 60 == a + b + closings
        assert windows.kind_tokens["text"] in (a, a + 1) and windows.kind_tokens["code"] in (b, b + 1)
        assert windows.window_kind_tokens.sum(axis=1).tolist() == [20, 20, 20]

    def test_chat_goes_through_the_template_with_its_tools(self, tokenizer: Any) -> None:
        tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
        call = {"type": "function", "function": {"name": "add", "arguments": {"x": 2}}}
        messages = (
            {"role": "user", "content": "2?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "4"},
        )
        document = Document("tools", "en", "test", "Apache-2.0", messages=messages, tools=(tool,))
        rendered = f"<tools>[{json.dumps(tool)}]</tools><user>2?<eos><assistant><call>add<x>2</call><eos><tool>4<eos>"
        assert corpus.render(document, tokenizer) == rendered
        tokens = len(rendered.replace("<eos>", "."))  # one a byte, and no second <eos> at the end
        windows = corpus.tokenize_windows([document], tokenizer, 1, tokens, seed=0)
        assert tokenizer.decode(windows.ids[0]) == rendered
        assert windows.notes == ()

    def test_without_a_template_the_fallback_is_stated(self) -> None:
        call = {"type": "function", "function": {"name": "add", "arguments": {"x": 2}}}
        messages = (
            {"role": "user", "content": [{"type": "text", "text": "2?"}]},
            {"role": "assistant", "reasoning_content": "hm", "content": "", "tool_calls": [call]},
        )
        document = Document("chat", "en", "test", "Apache-2.0", messages=messages)
        windows = corpus.tokenize_windows([document], make_tokenizer(chat_template=None), 1, 20, seed=0)
        assert "no chat template: 1 chat" in windows.notes[0]
        rendered = corpus.render(document, make_tokenizer(chat_template=None))
        assert rendered == 'user: 2?\n\nassistant thinks: hm\n\nassistant calls add: {"x": 2}'

    def test_a_template_that_ignores_tools_is_stated(self, bundled: list[Document]) -> None:
        deaf = make_tokenizer("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}")
        windows = corpus.tokenize_windows(bundled[:40], deaf, 100, 512, seed=0)
        assert re.match(r"The chat template does not use tools: the schemas of \d+ records", windows.notes[0])

    def test_a_template_that_refuses_names_the_record(self) -> None:
        strict = make_tokenizer("{{ raise_exception('roles must alternate') }}")
        document = Document("chat", "en", "data.jsonl, line 7", "none", messages=({"role": "user", "content": "x"},))
        with pytest.raises(CalibrationError, match=r"data.jsonl, line 7: .* refuses .*roles must alternate.*remove"):
            corpus.tokenize_windows([document], strict, 1, 1, seed=0)

    def test_same_input_same_windows_and_hash(self, tokenizer: Any, bundled: list[Document]) -> None:
        first = corpus.tokenize_windows(bundled, tokenizer, 16, 128, seed=3)
        again = corpus.tokenize_windows(list(bundled), make_tokenizer(), 16, 128, seed=3)
        assert np.array_equal(first.ids, again.ids) and first.record() == again.record()
        assert json.loads(json.dumps(first.record())) == first.record()
        turned = corpus.tokenize_windows(list(reversed(bundled)), tokenizer, 16, 128, seed=3)
        assert np.array_equal(first.ids, turned.ids)

    def test_the_hash_sees_every_parameter(self, tokenizer: Any, bundled: list[Document]) -> None:
        few = bundled[:60]
        other_template = make_tokenizer(CHAT_TEMPLATE.replace("<call>", "<do>"))
        hashes = {
            windows.sha256
            for windows in (
                corpus.tokenize_windows(few, tokenizer, 8, 64, seed=0),
                corpus.tokenize_windows(few, tokenizer, 8, 64, seed=1),
                corpus.tokenize_windows(few, tokenizer, 4, 128, seed=0),
                corpus.tokenize_windows(few, tokenizer, 9, 64, seed=0),
                corpus.tokenize_windows(few[:-1], tokenizer, 8, 64, seed=0),
                corpus.tokenize_windows(few, other_template, 8, 64, seed=0),
            )
        }
        assert len(hashes) == 6

    def test_too_little_text_says_how_much_there_is_and_what_to_do(self, tokenizer: Any) -> None:
        message = (
            r"1 document gave 101 tokens, and 5 windows of 32 tokens need 160; ask for fewer windows \(at most 3\), "
            r"or shorter ones, or give more text"
        )
        with pytest.raises(CalibrationError, match=message):
            corpus.tokenize_windows([text_document("x" * 100)], tokenizer, 5, 32, seed=0)
        with pytest.raises(CalibrationError, match="ask for shorter windows"):
            corpus.tokenize_windows([text_document("x" * 100)], tokenizer, 1, 320, seed=0)
        with pytest.raises(CalibrationError, match=r"shorter windows \(at most 20 tokens\)"):
            corpus.tokenize_windows([text_document("x" * 100)], tokenizer, 5, 320, seed=0)
        assert corpus.tokenize_windows([text_document("x" * 100)], tokenizer, 5, 20, seed=0).ids.shape == (5, 20)

    @pytest.mark.parametrize(("count", "length"), [(0, 8), (8, 0), (-1, 4)])
    def test_sizes_below_one(self, tokenizer: Any, count: int, length: int) -> None:
        with pytest.raises(CalibrationError, match="both numbers must be at least 1"):
            corpus.tokenize_windows([text_document("x")], tokenizer, count, length, seed=0)

    def test_no_document_or_no_eos(self, tokenizer: Any) -> None:
        with pytest.raises(CalibrationError, match="no calibration document"):
            corpus.tokenize_windows([], tokenizer, 1, 1, seed=0)
        with pytest.raises(CalibrationError, match="no end-of-text token"):
            corpus.tokenize_windows([text_document("x")], make_tokenizer(eos=None), 1, 1, seed=0)

    def test_bundle_gives_the_default_run_and_every_kind(self, tokenizer: Any, bundled: list[Document]) -> None:
        windows = corpus.tokenize_windows(bundled, tokenizer, 128, 512, seed=0, source=corpus.BUNDLED_NAME)
        assert windows.ids.shape == (128, 512)
        assert min(windows.kind_tokens[kind] for kind in ("text", "code", "chat", "tools")) > 500
        assert windows.source.startswith("bundled corpus: ") and f"of {len(bundled)} documents" in windows.source


class TestTokenizerFolder:
    def test_round_trip(self, tmp_path: Path, tokenizer: Any) -> None:
        tokenizer.save_pretrained(tmp_path)
        loaded = corpus.load_tokenizer(tmp_path)
        assert loaded.chat_template == CHAT_TEMPLATE and loaded.eos_token_id == tokenizer.eos_token_id
        document = text_document("one two three")
        ids = [corpus.tokenize_windows([document], t, 1, 12, seed=0).ids.tolist() for t in (tokenizer, loaded)]
        assert ids[0] == ids[1]

    def test_missing_or_broken(self, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match=r"has no tokenizer .*copy the model's tokenizer files"):
            corpus.load_tokenizer(tmp_path)
        with pytest.raises(CalibrationError, match="does not exist"):
            corpus.load_tokenizer(tmp_path / "nowhere")
        (tmp_path / "tokenizer.json").write_text("{")
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        with pytest.raises(CalibrationError, match=r"tokenizer of .* cannot be read"):
            corpus.load_tokenizer(tmp_path)
