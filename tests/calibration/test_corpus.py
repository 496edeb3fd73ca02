"""The bundled corpus, every form of calibration input, and every way an input can be wrong."""

import gzip
import json
import logging
import re
import subprocess
import sys
import types
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from m3quant.calibration import corpus
from m3quant.calibration.corpus import Document, interleave, load_documents
from m3quant.errors import CalibrationError
from tests.support.paths import FIXTURES, ROOT

DATA = corpus.BUNDLED_PATH.parent
FREE_LICENCES = {"Apache-2.0", "MIT", "PSF-2.0", "public-domain"}
# Characters a token, more than a 200k vocabulary was measured to need for any language of the kind (so tokens are
# underestimated): 4.7 for prose, 4.4 for code, 2.0 for Chinese, Japanese and Korean.
CJK_CHARACTERS, CODE_CHARACTERS, OTHER_CHARACTERS = 2.1, 4.6, 5.0


@pytest.fixture(scope="module")
def bundled() -> list[Document]:
    return load_documents(None)


@pytest.fixture(scope="module")
def extension() -> list[Document]:
    return list(corpus.bundled_extension())


def characters(document: Document) -> int:
    if document.text is not None:
        return len(document.text)
    return sum(len(message.get("content") or "") for message in document.messages or ())


def check_dialogues(documents: list[Document]) -> None:
    """Calls name declared tools with their required arguments, and every call is answered before anyone speaks."""
    for document in documents:
        declared = {tool["function"]["name"]: tool["function"]["parameters"] for tool in document.tools}
        open_calls: list[str] = []
        roles = [message["role"] for message in document.messages or ()]
        for first, second in pairwise(roles):  # strict templates refuse two turns of one side
            assert first != second or first == "tool", document.source
        for message in document.messages or ():
            if message["role"] == "tool":
                open_calls.remove(message["tool_call_id"])
                continue
            assert not open_calls, f"{document.source}: {message['role']} speaks before {open_calls} are answered"
            for call in message.get("tool_calls", ()):
                parameters = declared[call["function"]["name"]]
                arguments = call["function"]["arguments"]
                assert set(arguments) <= set(parameters["properties"]), document.source
                assert set(parameters.get("required", ())) <= set(arguments), document.source
                open_calls.append(call["id"])
        if document.messages:
            assert document.messages[-1]["role"] == "assistant" and not open_calls, document.source


class TestBundle:
    def test_has_the_languages_and_kinds_it_promises(self, bundled: list[Document]) -> None:
        assert {document.kind for document in bundled} == {"text", "code", "chat", "tools"}
        prose = {document.lang for document in bundled if document.kind == "text"}
        assert {"en", "zh", "ja", "ko", "ru", "ar", "hi", "de", "fr", "es"} <= prose
        code = {document.lang for document in bundled if document.kind == "code"}
        assert code == {"python", "c", "go", "rust", "typescript", "javascript"}
        written = "".join(document.text or "" for document in bundled)
        scripts = Counter(unicodedata.name(letter, "").split(" ")[0] for letter in written if letter > "\x7f")
        for script in ["CJK", "HIRAGANA", "HANGUL", "CYRILLIC", "ARABIC", "HEBREW", "DEVANAGARI", "THAI", "GREEK"]:
            assert scripts[script] > 900, script

    def test_is_enough_for_the_default_run_by_a_low_estimate(self, bundled: list[Document]) -> None:
        tokens = 0.0
        for document in bundled:
            cjk = document.lang in ("zh", "ja", "ko")
            rate = CJK_CHARACTERS if cjk else CODE_CHARACTERS if document.kind == "code" else OTHER_CHARACTERS
            tokens += characters(document) / rate
        assert tokens > 85_000

    def test_is_small_utf8_without_control_or_replacement_characters(self) -> None:
        data = corpus.BUNDLED_PATH.read_bytes()
        assert 450_000 < len(data) < 710_000
        assert not re.search("[\x00-\x08\x0b\x0e-\x1f\ufffd\ufeff]", data.decode("utf-8"))

    def test_every_document_is_freely_licensed_and_its_source_named(self, bundled: list[Document]) -> None:
        sources = yaml.safe_load((DATA / "sources.yaml").read_text(encoding="utf-8"))
        readme = (DATA / "README.md").read_text(encoding="utf-8")
        for name, spec in sources.items():
            assert spec["licence"] in FREE_LICENCES
            row = next(line for line in readme.splitlines() if line.startswith(f"| {name} |"))
            assert spec["licence"] in row
            if spec["licence"] == "MIT":
                assert "Permission is hereby granted" in (DATA / "licences" / f"{name}.txt").read_text(encoding="utf-8")
        for document in bundled:
            own = re.fullmatch(r"written for m3quant; dialogues/(\w+\.yaml), item \d+", document.source)
            taken = re.fullmatch(r".+; ([\w-]+): \S+, characters (\d+)-(\d+)", document.source)
            if own:
                assert document.licence == "Apache-2.0" and (DATA / "dialogues" / own[1]).is_file()
            else:
                assert taken and document.licence == sources[taken[1]]["licence"], document.source
                assert int(taken[3]) - int(taken[2]) == len(document.text or "")

    def test_readme_states_the_figures_of_the_file(self, bundled: list[Document]) -> None:
        readme = (DATA / "README.md").read_text(encoding="utf-8")
        assert f"{len(bundled)} documents, {round(corpus.BUNDLED_PATH.stat().st_size / 1000)} kB" in readme
        for kind, count in Counter(document.kind for document in bundled).items():
            row = next(line for line in readme.splitlines() if line.startswith(f"| {kind} |"))
            assert row.split("|")[3].strip() == str(count)

    def test_dialogues_are_sound(self, bundled: list[Document]) -> None:
        check_dialogues(bundled)

    def test_dialogues_in_the_bundle_are_those_of_the_yaml_files(self, bundled: list[Document]) -> None:
        written = [
            item
            for path in sorted((DATA / "dialogues").glob("*.yaml"))
            for item in yaml.safe_load(path.read_text("utf-8"))
        ]
        expected = sorted(
            json.dumps([{"content": "", **message} for message in item["messages"]], sort_keys=True) for item in written
        )
        held = sorted(json.dumps(document.messages, sort_keys=True) for document in bundled if document.messages)
        assert held == expected

    @pytest.mark.parametrize("share", [0.25, 0.5])
    def test_any_prefix_is_mixed(self, bundled: list[Document], share: float) -> None:
        def shares(documents: list[Document]) -> dict[str, float]:
            sizes = Counter[str]()
            for document in documents:
                sizes[document.kind] += len(document.content_bytes())
            return {kind: size / sizes.total() for kind, size in sizes.items()}

        whole, prefix = shares(bundled), shares(bundled[: int(len(bundled) * share)])
        for kind, expected in whole.items():
            assert abs(prefix.get(kind, 0) - expected) < 0.06, (kind, expected, prefix)

    def test_the_file_is_in_the_order_that_interleave_gives(self, bundled: list[Document]) -> None:
        assert interleave(list(reversed(bundled)), seed=0) == bundled


class TestExtension:
    """What longer runs read after the first part."""

    def test_with_it_the_bundle_feeds_a_million_tokens_by_a_low_estimate(
        self, bundled: list[Document], extension: list[Document]
    ) -> None:
        size = sum(len(document.content_bytes()) for document in [*bundled, *extension])
        assert size / OTHER_CHARACTERS > 900_000
        assert (DATA / "extension.jsonl.gz").stat().st_size < 2_000_000

    def test_has_the_kinds_and_languages_it_promises(self, extension: list[Document]) -> None:
        assert {document.kind for document in extension} == {"text", "code", "chat", "tools"}
        code = {document.lang for document in extension if document.kind == "code"}
        assert {"python", "cpp", "go", "rust", "typescript", "javascript", "java", "kotlin", "swift", "objective-c", "ruby", "php", "lua"} == code  # fmt: skip
        assert len({document.lang for document in extension if document.kind == "text"}) >= 24
        assert len({document.lang for document in extension if document.kind == "chat"}) >= 14
        long = [document for document in extension if len(document.text or "") > 30_000]
        assert len(long) >= 8, "documents that fill a window past M3's selection"
        thinking = [m for d in extension for m in d.messages or () if m.get("reasoning_content")]
        calls = [m for d in extension if d.kind == "tools" for m in d.messages or () if m.get("tool_calls")]
        assert len(thinking) > 500 and len(calls) >= 250

    def test_every_document_is_freely_licensed_and_its_source_named(self, extension: list[Document]) -> None:
        sources = yaml.safe_load((DATA / "extension.yaml").read_text(encoding="utf-8"))
        readme = (DATA / "README.md").read_text(encoding="utf-8")
        for name, spec in sources.items():
            assert spec["licence"] in FREE_LICENCES | {"BSD-3-Clause", "PostgreSQL"}
            assert f"| {name} |" in readme and re.fullmatch("[0-9a-f]{64}", spec["sha256"])
            assert spec["licence"] in ("PSF-2.0", "Apache-2.0", "public-domain") or (DATA / "licences" / f"{name}.txt").is_file()  # fmt: skip
        for document in extension:
            found = re.match(r"(?:made from )?([\w-]+): \S+", document.source)
            assert found and document.licence == sources[found[1]]["licence"], document.source
        assert set(sources) == {re.match(r"(?:made from )?([\w-]+):", d.source)[1] for d in extension}  # type: ignore[index]

    def test_shares_no_passage_with_the_texts_that_are_judged(self, extension: list[Document]) -> None:
        def grams(text: str) -> set[int]:
            words = re.findall(r"\w+", text.lower())
            return set(map(hash, zip(*(words[i:] for i in range(13)), strict=False)))

        evaluation = ROOT / "m3quant" / "evaluate" / "data" / "texts.jsonl"
        judged = [json.loads(line)["text"] for line in evaluation.read_text(encoding="utf-8").splitlines()]
        judged.append((FIXTURES / "heldout.txt").read_text(encoding="utf-8"))
        known = set().union(*map(grams, judged))
        assert len(known) > 50_000
        for document in extension:
            said = [document.text or "", *(str(message["content"]) for message in document.messages or ())]
            assert not any(grams(text) & known for text in said), document.source

    def test_dialogues_are_sound(self, extension: list[Document]) -> None:
        check_dialogues(extension)

    def test_readme_states_its_figures(self, extension: list[Document]) -> None:
        readme = (DATA / "README.md").read_text(encoding="utf-8")
        assert f"{len(extension)} documents" in readme
        for kind, count in Counter(document.kind for document in extension).items():
            assert re.search(rf"^\| {kind} \|[^|]*\| {count} \|", readme, re.MULTILINE), kind

    def test_the_file_is_in_the_order_that_interleave_gives(self, extension: list[Document]) -> None:
        assert interleave(list(reversed(extension)), seed=0) == extension

    def test_both_models_templates_take_every_record(self, extension: list[Document]) -> None:
        for model in ("tiny-m2", "tiny-m3"):
            tokenizer = corpus.load_tokenizer(FIXTURES / model)
            for document in extension[::7]:
                assert corpus.render(document, tokenizer)


class TestInputs:
    @pytest.fixture
    def records(self) -> list[dict[str, Any]]:
        return [
            {"text": "Первый документ."},
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        ]

    def check(self, documents: list[Document]) -> None:
        assert documents[0].text == "Первый документ."
        assert documents[1].messages == documents[2].messages
        assert documents[2].messages is not None and documents[2].messages[0]["role"] == "user"
        assert [document.kind for document in documents] == ["text", "chat", "chat"]

    def test_json_lines(self, tmp_path: Path, records: list[dict[str, Any]]) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text("\ufeff" + "\r\n\r\n".join(json.dumps(record) for record in records), encoding="utf-8")
        self.check(load_documents(str(path)))

    def test_json_lines_gz(self, tmp_path: Path, records: list[dict[str, Any]]) -> None:
        path = tmp_path / "data.jsonl.gz"
        path.write_bytes(gzip.compress("\n".join(json.dumps(record) for record in records).encode()))
        self.check(load_documents(str(path)))

    def test_json_array(self, tmp_path: Path, records: list[dict[str, Any]]) -> None:
        path = tmp_path / "data.json"
        path.write_text("\n" + json.dumps(records, indent=1), encoding="utf-8")
        self.check(load_documents(str(path)))

    def test_parquet(self, tmp_path: Path, records: list[dict[str, Any]]) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        path = tmp_path / "data.parquet"
        parquet.write_table(pyarrow.Table.from_pylist([{**records[0], "messages": None}, records[1]]), path)
        documents = load_documents(str(path))
        assert documents[0].text == "Первый документ."
        assert documents[1].messages == tuple(records[1]["messages"])

    @pytest.mark.parametrize(
        ("name", "kind"), [("a.txt", "text"), ("b.md", "text"), ("c.py", "code"), ("d.rs", "code")]
    )
    def test_plain_text(self, tmp_path: Path, name: str, kind: str) -> None:
        (tmp_path / name).write_text("größer\n", encoding="utf-8")
        (document,) = load_documents(str(tmp_path / name))
        assert (document.kind, document.text, document.source) == (kind, "größer\n", str(tmp_path / name))

    def test_folder_is_read_in_order_and_says_what_it_leaves_out(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "sub").mkdir()
        for name in ("z.txt", "sub/b.txt", "a.txt"):
            (tmp_path / name).write_text(name)
        (tmp_path / "picture.png").write_bytes(b"\x89PNG")
        (tmp_path / ".hidden.txt").write_text("not me")
        with caplog.at_level(logging.WARNING):
            assert [document.text for document in load_documents(str(tmp_path))] == ["a.txt", "sub/b.txt", "z.txt"]
        assert "picture.png" in caplog.text

    def test_arguments_as_a_json_string_become_an_object(self, tmp_path: Path) -> None:
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
        tools = [{"type": "function", "function": {"name": "add"}}]
        messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
        path = tmp_path / "data.jsonl"
        path.write_text(json.dumps({"messages": messages, "tools": json.dumps(tools)}))
        (document,) = load_documents(str(path))
        assert document.kind == "tools" and document.tools == tuple(tools) and document.messages
        assert document.messages[0]["content"] == ""
        assert document.messages[0]["tool_calls"][0]["function"]["arguments"] == {"a": 1}

    def test_reading_stops_at_the_limit_and_says_so(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(json.dumps({"text": "x" * 100}) for _ in range(50)))
        with caplog.at_level(logging.WARNING):
            assert len(load_documents(str(path), max_characters=950)) == 10
        assert "stopped after 10 documents" in caplog.text


class TestHub:
    def install(self, monkeypatch: pytest.MonkeyPatch, load_dataset: Any) -> None:
        module = types.ModuleType("datasets")
        module.load_dataset = load_dataset  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)

    @pytest.mark.parametrize(
        ("spec", "expected"),
        [
            ("org/name", ("org/name", None, "train")),
            ("org/name:wiki-v1", ("org/name", "wiki-v1", "train")),
            ("org/name:wiki:test", ("org/name", "wiki", "test")),
            ("org/name::validation[:5%]", ("org/name", None, "validation[:5%]")),
        ],
    )
    def test_id_config_and_split(self, monkeypatch: pytest.MonkeyPatch, spec: str, expected: tuple[Any, ...]) -> None:
        asked: list[tuple[Any, ...]] = []

        def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
            asked.append((name, config, split))
            assert streaming
            return [{"text": "one"}, {"text": "two"}]

        self.install(monkeypatch, load_dataset)
        assert [document.text for document in load_documents(spec)] == ["one", "two"]
        assert asked == [expected]

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(CalibrationError, match=r"org/name.*pip install 'm3quant\[data\]'"):
            load_documents("org/name")

    def test_offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load_dataset(*args: Any, **kwargs: Any) -> None:
            raise ConnectionError("Couldn't reach the Hub\nsecond line")

        self.install(monkeypatch, load_dataset)
        with pytest.raises(CalibrationError, match=r"'org/name', split 'train'.*Couldn't reach the Hub\).*network"):
            load_documents("org/name")

    def test_record_without_text(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.install(monkeypatch, lambda *args, **kwargs: [{"text": "fine"}, {"x": "x", "y": "y"}])
        loaded = corpus.read_source("org/name")
        assert [document.text for document in loaded.documents] == ["fine"]
        assert re.search(
            r"1 of 2 records left out \(1 odd\).*org/name, split train, record 2.*fields x, y", loaded.notes[0]
        )


BAD_FILES: list[tuple[str, bytes, str]] = [
    ("latin.txt", "gut\nschön\n".encode("latin-1"), r"latin.txt, line 2: byte 3 \(0xf6\) is not UTF-8; convert"),
    ("latin.jsonl", b'{"text": "a"}\n{"text": "\xf6"}\n', r"latin.jsonl, line 2: byte 10 .* not UTF-8"),
    ("empty.jsonl", b"", "empty.jsonl is empty; give"),
    ("empty.parquet", b"", "empty.parquet is empty; give"),
    ("nul.txt", "ab".encode("utf-16-le") * 9, "nul.txt has NUL bytes .*iconv -f UTF-16LE"),
    ("late.txt", b"first\nsecond\0\n", "late.txt, line 2 has a NUL byte"),
    ("half.txt", b"\xff\xfea\0b", "half.txt begins with the byte-order mark of UTF-16 and is not"),
    ("unknown.csv", b"a,b\n1,2\n", "unknown.csv: its first line, 'a,b', names no column"),
    ("quote.csv", b'text\n"never closed', r"quote.csv, row 1: unexpected end of data"),
    ("blank.txt", b" \n\n", "blank.txt holds only white space"),
    ("blank.jsonl", b"\n \n", "blank.jsonl holds no record"),
    ("broken.jsonl", b'{"text": \n', r"broken.jsonl, line 1 is not JSON .*; give one object a line"),
    ("deep.jsonl", b"[" * 100_000, "deep.jsonl, line 1 is not JSON"),
    ("number.jsonl", b"17\n", r"number.jsonl, line 1: the record is int, not an object"),
    (
        "fields.jsonl",
        b'{"prompt": "a", "id": 1}\n',
        r"fields.jsonl, line 1: .* fields prompt, id, but none .*\"messages\"",
    ),
    ("hollow.jsonl", b'{"text": "  "}\n', 'hollow.jsonl, line 1: "text" is empty'),
    ("typed.jsonl", b'{"text": 5}\n', 'typed.jsonl, line 1: "text" is int, not a string'),
    ("none.jsonl", b'{"messages": []}\n', "none.jsonl, line 1: the conversation is empty"),
    ("string.jsonl", b'{"messages": "hi"}\n', r'string.jsonl, line 1: "messages" must be a list'),
    ("item.jsonl", b'{"messages": ["hi", 5]}\n', r'item.jsonl, line 1: "messages", message 1 is not an object'),
    ("role.jsonl", b'{"messages": [{"content": "hi"}]}\n', r'role.jsonl, line 1: .*message 1 has no "role"'),
    ("content.jsonl", b'{"messages": [{"role": "user"}]}\n', "content.jsonl, line 1: the conversation is empty"),
    ("parts.jsonl", b'{"messages": [{"role": "user", "content": ["hi"]}]}\n', r'message 1: "content" must be a string'),
    ("calls.jsonl", b'{"messages": [{"role": "user", "tool_calls": 5}]}\n', r'message 1: "tool_calls" must be a list'),
    ("from.jsonl", b'{"messages": [{"from": [], "value": "a"}]}\n', r'message 1 has no "role" \(or "from"\)'),
    ("half.jsonl", rb'{"messages": [{"role": "user", "content": "\udfff"}]}', "line 1 holds half of a surrogate pair"),
    ("kind.jsonl", b'{"messages": [{"role": "user", "content": 3}]}\n', r'message 1: "content" must be a string'),
    ("call.jsonl", b'{"messages": [{"role": "a", "tool_calls": [{"id": 1}]}]}\n', 'a tool call needs "function"'),
    (
        "arguments.jsonl",
        b'{"messages": [{"role": "a", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}\n',
        "the arguments of f are not JSON",
    ),
    (
        "tools.jsonl",
        b'{"messages": [{"role": "u", "content": ""}], "tools": "["}\n',
        '"tools" is a string, but not JSON',
    ),
    ("schema.jsonl", b'{"messages": [{"role": "u", "content": ""}], "tools": 4}\n', '"tools" must be a list'),
    ("bad.parquet", b"PAR1 nothing PAR1", "bad.parquet is not a readable Parquet file"),
    ("plain.txt.gz", b"not compressed", "plain.txt.gz cannot be read"),
    ("cut.txt.gz", gzip.compress(b"hello" * 1000)[:-12], "cut.txt.gz cannot be read"),
    ("flipped.txt.gz", gzip.compress(b"hello" * 1000)[:12] + b"\xff\xff\xff\xff", "flipped.txt.gz cannot be read"),
    ("model.safetensors", b"x", "model.safetensors: this kind of file is not read; give JSONL"),
]


class TestBadInput:
    @pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=[name for name, _, _ in BAD_FILES])
    def test_one_sentence_with_file_line_and_remedy(
        self, tmp_path: Path, name: str, content: bytes, message: str
    ) -> None:
        if name.endswith("bad.parquet"):
            pytest.importorskip("pyarrow")
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CalibrationError, match=message) as caught:
            load_documents(str(path))
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("spec", ["no/such/file", "missing.jsonl", "folder/missing.txt", "/nowhere"])
    def test_nothing_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CalibrationError, match="no such file or folder"):
            load_documents(spec)

    def test_empty_folder_and_empty_name(self, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match="has no file that we read; put JSONL"):
            load_documents(str(tmp_path))
        with pytest.raises(CalibrationError, match="name of the calibration data is empty"):
            load_documents(" ")

    def test_parquet_without_our_columns_or_rows(self, tmp_path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"a": [1], "b": ["x"]}), tmp_path / "a.parquet")
        with pytest.raises(CalibrationError, match=r"a.parquet has the columns a, b; it needs"):
            load_documents(str(tmp_path / "a.parquet"))
        parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "b.parquet")
        with pytest.raises(CalibrationError, match=r"b.parquet has no rows"):
            load_documents(str(tmp_path / "b.parquet"))

    def test_parquet_without_pyarrow(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a.parquet").write_bytes(b"PAR1")
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(CalibrationError, match=r"a.parquet: .*pip install 'm3quant\[data\]'"):
            load_documents(str(tmp_path / "a.parquet"))


def test_corpus_hash_sees_text_order_and_kind() -> None:
    first, second = (Document("text", "en", "s", "l", text=text) for text in ("a", "b"))
    hashes = {
        corpus.corpus_sha256(documents)
        for documents in (
            [first, second],
            [second, first],
            [first],
            [Document("code", "en", "s", "l", text="a"), second],
            [Document("text", "en", "s", "l", text="ab")],
        )
    }
    assert len(hashes) == 5
    renamed = Document("text", "en", "elsewhere", "other", text="a")
    assert corpus.corpus_sha256([renamed]) == corpus.corpus_sha256([first])


def test_reading_documents_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from m3quant.calibration.corpus import load_documents; assert load_documents(None);"
        "assert not {'torch', 'transformers', 'pyarrow', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_build_is_what_made_the_bundle(bundled: list[Document]) -> None:
    """Without the archives: every excerpt belongs to an entry of sources.yaml, and every entry gave one."""
    sources = yaml.safe_load((DATA / "sources.yaml").read_text(encoding="utf-8"))
    entries = {f"{e['title']}; {name}: {e['member']}" for name, spec in sources.items() for e in spec["excerpts"]}
    held = {document.source.rsplit(", characters", 1)[0] for document in bundled if document.text is not None}
    assert held == entries
    assert all(re.fullmatch("[0-9a-f]{64}", spec["sha256"]) for spec in sources.values())
