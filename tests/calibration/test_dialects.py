"""Records in the forms that data sets use: each keeps its roles, tools, calls and thinking, or is left out and counted."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from m3quant.calibration.corpus import load_tokenizer, read_source, tokenize_windows
from m3quant.calibration.dialects import parse_record
from m3quant.calibration.documents import Document, EmptyRecord, OddRecord
from m3quant.calibration.windows import render
from m3quant.errors import CalibrationError
from tests.support.paths import FIXTURES

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": speaker, "value": text} for speaker, text in pairs]


CHATS: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
    ("sharegpt", {"conversations": turns(("human", "Why?"), ("gpt", "Because."))}, [USER, ANSWER]),
    ("other names", {"conversations": turns(("Human", "Why?"), ("chatgpt", "Because."))}, [USER, ANSWER]),
    ("model", {"messages": [USER, {"role": "model", "content": "Because."}]}, [USER, ANSWER]),
    ("developer", {"messages": [{"role": "developer", "content": "Be brief."}, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    ("record's system", {"system": "Be brief.", "conversations": turns(("human", "Why?"))}, [SYSTEM, USER]),
    ("its own system wins", {"system": "Other.", "messages": [SYSTEM, USER]}, [SYSTEM, USER]),
    ("turns without roles", {"data": ["Why?", "Because."]}, [USER, ANSWER]),
    ("prompt, completion", {"prompt": "Why?", "completion": "Because."}, [USER, ANSWER]),
    ("lists", {"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
    ("preference", {"prompt": "Why?", "chosen": "Because.", "rejected": "So."}, [USER, ANSWER]),
    ("preference as messages", {"prompt": "Why?", "chosen": [ANSWER], "rejected": [USER]}, [USER, ANSWER]),
    ("whole conversation chosen", {"prompt": "Why?", "chosen": [USER, ANSWER]}, [USER, ANSWER]),
    ("instruction", {"instruction": "Why?", "input": "", "output": "Because."}, [USER, ANSWER]),
    (
        "with input and history",
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "history": [["Why?", "Because."]], "system": "Be brief."},
        [SYSTEM, USER, ANSWER, {"role": "user", "content": "Add.\n\n1 and 2"}, {"role": "assistant", "content": "3"}],
    ),
    ("question", {"question": "Why?", "answer": "Because."}, [USER, ANSWER]),
    (
        "answers of SQuAD",
        {"context": "It rains.", "question": "Why?", "answer": {"text": ["Because."], "answer_start": [0]}},
        [{"role": "user", "content": "It rains.\n\nWhy?"}, ANSWER],
    ),
    ("function_call role", {"conversations": turns(("function_call", '{"name": "add", "arguments": {"x": 1}}'))}, [CALLS]),
    ("arguments as text", {"conversations": turns(("function_call", '{"name": "add", "arguments": "{\\"x\\": 1}"}'))}, [CALLS]),
    (
        "call between tags",
        {"messages": [{"role": "assistant", "content": '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'}]},
        [CALLS],
    ),
    ("old form of OpenAI", {"messages": [{"role": "assistant", "content": None, "function_call": CALL["function"]}]}, [CALLS]),
    (
        "no arguments",
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": ""}}]}]},
        [{**CALLS, "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}],
    ),
    ("observation", {"conversations": turns(("human", "Why?"), ("observation", "3"))}, [USER, {"role": "tool", "content": "3"}]),
    (
        "parts of Anthropic",
        {"messages": [
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "I add."},
                {"type": "tool_use", "id": "t1", "name": "add", "input": {"x": 1}},
            ]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "3"}]}]},
        ]},
        [
            {"role": "assistant", "content": "I add.", "reasoning_content": "Hm.", "tool_calls": [{"id": "t1", **CALL}]},
            {"role": "tool", "content": "3", "tool_call_id": "t1"},
        ],
    ),
    (
        "thinking between tags",
        {"messages": [USER, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nBecause."}]},
        [USER, {**ANSWER, "reasoning_content": "Hm."}],
    ),
    ("thinking by another name", {"messages": [{**ANSWER, "reasoning": "Hm."}]}, [{**ANSWER, "reasoning_content": "Hm."}]),
    ("conversation before text", {"text": "<|im_start|>user", "messages": [USER]}, [USER]),
]  # fmt: skip


@pytest.mark.parametrize(("record", "expected"), [c[1:] for c in CHATS], ids=[c[0] for c in CHATS])
def test_a_known_form_becomes_the_messages_it_means(record: dict[str, Any], expected: list[dict[str, Any]]) -> None:
    assert parse_record(record, "here").messages == tuple(expected)


@pytest.mark.parametrize("tools", [
    [TOOL], [TOOL["function"]], json.dumps([TOOL["function"]]), [json.dumps(TOOL)],
    [{"name": "add", "input_schema": {"type": "object"}}],
])  # fmt: skip
def test_tools_have_one_form(tools: object) -> None:
    document = parse_record({"tools": tools, "messages": [USER]}, "here")
    assert document.tools == (TOOL,) and document.kind == "tools"


@pytest.mark.parametrize(
    ("role", "content"),
    [
        ("assistant", "<tool_call>{" * 40_000), ("assistant", "<tool_call>{}" * 40_000), ("function_call", "<tool_call>{" * 40_000),
        ("tool", "<tool_response>" + " " * 400_000 + "x"), ("tool", "<tool_response>" + (" " * 1000 + "x") * 400),
        ("assistant", "<tool_call>" + " " * 400_000), ("assistant", "<tool_call>{" + "}  " * 150_000), ("assistant", "<think>" * 60_000),
    ],
)  # fmt: skip
def test_tags_that_are_never_closed_take_linear_time(role: str, content: str) -> None:
    """Each took minutes: a scan to the end for every opening tag."""
    record = {"messages": [{"role": "user", "content": "q"}, {"role": role, "content": content}]}
    if role == "function_call":
        with pytest.raises(OddRecord, match="is not JSON"):
            parse_record(record, "here")
    else:
        document = parse_record(record, "here")
        assert document.messages and document.messages[1]["content"] == content


def test_tagged_calls_end_at_the_first_closing_tag_behind_a_brace() -> None:
    calls = '{"name": "f", "arguments": {"text": "</tool_call> <tool_call>"}}'
    content = f"before <tool_call>\n{calls}\n </tool_call> between <tool_call>{calls}</tool_call><tool_call> x"
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]}
    answer = (parse_record(record, "here").messages or ())[1]
    assert answer["content"] == "before  between <tool_call> x"
    assert [call["function"]["arguments"]["text"] for call in answer["tool_calls"]] == ["</tool_call> <tool_call>"] * 2
    for odd in (
        "<tool_call>{</tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>a}</tool_call>",
        "</tool_call>{}<tool_call>",
    ):
        record["messages"][1]["content"] = odd
        assert (parse_record(record, "here").messages or ())[1]["content"] == odd
    response = {"role": "tool", "content": " <tool_response>\n a <tool_response> b \n</tool_response>\n"}
    answered = parse_record({"messages": [{"role": "user", "content": "q"}, response]}, "here").messages or ()
    assert answered[1]["content"] == "a <tool_response> b"


def test_text_columns_and_what_describes_them() -> None:
    document = parse_record({"content": "x = 1", "lang": "python", "kind": "code", "license": "MIT"}, "here")
    assert document == Document("code", "python", "here", "MIT", text="x = 1")
    assert parse_record({"text": None, "code": "x"}, "here").kind == "code"


EMPTY: list[Any] = [
    {"text": " "}, {"text": None}, {"messages": []}, {"conversations": [{"from": "human", "value": ""}]}, {"messages": [SYSTEM]},
]  # fmt: skip
ODD: list[Any] = [
    5, "text", {"id": 1}, {"text": ["a"]}, {"messages": "hi"}, {"messages": [{"content": "no role"}]},
    {"conversations": turns(("function_call", "call add"))}, {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
    {"system": ["x"], "messages": [USER]}, {"text": "\ud800"}, {"messages": [USER], "tools": "[" * 100_000},
]  # fmt: skip


@pytest.mark.parametrize("record", EMPTY)
def test_an_empty_record_is_called_that(record: object) -> None:
    with pytest.raises(EmptyRecord, match=r"here: .*empty"):
        parse_record(record, "here")


@pytest.mark.parametrize("record", ODD, ids=range(len(ODD)))
def test_an_odd_record_is_refused_with_its_place(record: object) -> None:
    with pytest.raises(OddRecord, match=r"^here"):
        parse_record(record, "here")


def test_empty_and_odd_records_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = json.dumps({"text": "Good."})
    path.write_text(
        "\n".join([good, *(json.dumps(r) for r in EMPTY), '{"text": ', *(json.dumps(r) for r in ODD[:3]), good])
    )
    loaded = read_source(str(path))
    assert [document.text for document in loaded.documents] == ["Good.", "Good."]
    assert loaded.notes[0].startswith("data.jsonl: 9 of 11 records left out (5 empty, 4 odd); the first odd one: ")
    assert "data.jsonl, line 7 is not JSON" in loaded.notes[0]
    path.write_text("\n".join(json.dumps(r) for r in (EMPTY + ODD[:2])))
    with pytest.raises(
        CalibrationError,
        match=r"no usable record: all 7 are empty or odd, the first because: .*line 6: the record is int",
    ):
        read_source(str(path))


TABLE = [
    ["prompt", "completion", "id"],
    ["Why?", "Because,\nI say.", "1"],
    ["", "", "2"],
    ["Größe?", 'He said "5".', "3"],
]


@pytest.mark.parametrize(("name", "delimiter", "encoding"), [
    ("a.csv", ",", "utf-8"), ("a.csv", ";", "utf-8-sig"), ("a.tsv", "\t", "utf-16"), ("a.csv", ",", "utf-16"),
])  # fmt: skip
def test_tables_are_read_as_spreadsheets_write_them(tmp_path: Path, name: str, delimiter: str, encoding: str) -> None:
    written = io.StringIO()
    csv.writer(written, delimiter=delimiter).writerows(TABLE)
    (tmp_path / name).write_bytes(written.getvalue().encode(encoding))
    loaded = read_source(str(tmp_path / name))
    contents = [[message["content"] for message in document.messages or ()] for document in loaded.documents]
    assert contents == [["Why?", "Because,\nI say."], ["Größe?", 'He said "5".']]
    assert "1 of 3 records left out (1 empty)" in loaded.notes[0]


def test_a_long_cell_and_a_conversation_in_a_cell(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(
            [["text", "messages"], ["x" * 200_000, ""], ["", json.dumps([USER, ANSWER])], ["a", "", "c"]]
        )
    loaded = read_source(str(tmp_path / "a.csv"))
    assert [len(document.text or "") for document in loaded.documents] == [200_000, 0]
    assert loaded.documents[1].messages == (USER, ANSWER)
    assert "row 3 has 3 cells, and the header 2" in loaded.notes[0]


def test_parquet_gives_calls_their_own_arguments_only(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    other = {"type": "function", "function": {"name": "get", "arguments": {"y": "a"}}}
    rows = [
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]} for call in (CALL, other)
    ]
    parquet.write_table(pyarrow.Table.from_pylist([*rows, {"messages": None}]), tmp_path / "a.parquet")
    loaded = read_source(str(tmp_path / "a.parquet"))
    assert [d.messages[1]["tool_calls"][0] for d in loaded.documents if d.messages] == [CALL, other]
    assert "(1 empty)" in loaded.notes[0]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_byte_order_marks_are_honoured(tmp_path: Path, encoding: str) -> None:
    text = "Ein kühler Morgen.\r\nNoch einer.\n"
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / "a.txt").write_bytes((mark + text).encode(encoding))
    (tmp_path / "b.jsonl").write_bytes((mark + json.dumps({"text": text}, ensure_ascii=False) + "\n").encode(encoding))
    for name in ("a.txt", "b.jsonl"):
        assert [document.text for document in read_source(str(tmp_path / name)).documents] == [text], name


@pytest.mark.parametrize("text", [
    json.dumps([USER, ANSWER]), json.dumps({"data": [{"messages": [USER, ANSWER]}]}, indent=1), json.dumps([{"messages": [USER, ANSWER]}], indent=2),
    "[\n" + json.dumps({"messages": [USER, ANSWER]}) + "\n]", json.dumps([USER, ANSWER]) + "\n" + json.dumps([USER]),
    "not JSON\n" + json.dumps({"messages": [USER, ANSWER]}),
])  # fmt: skip
def test_json_in_the_shapes_that_files_have(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert read_source(str(tmp_path / "a.json")).documents[0].messages == (USER, ANSWER)


@pytest.mark.parametrize("model", ["tiny-m2", "tiny-m3"])
def test_the_models_own_template_gets_system_tools_calls_and_thinking(model: str) -> None:
    record = {
        "system": "You route tickets.",
        "tools": json.dumps([{"name": "close", "description": "closes", "parameters": {"type": "object", "properties": {}}}]),
        "conversations": [
            *turns(("human", "Close 7."), ("gpt", "<think>Ticket 7.</think>Done soon.")),
            *turns(("human", "Now."), ("function_call", '{"name": "close", "arguments": {"ticket": 7}}'), ("observation", "closed")),
        ],
    }  # fmt: skip
    text = render(parse_record(record, "here"), load_tokenizer(FIXTURES / model))
    for part in ("]~b]system\nYou route tickets.", '"name": "close"', "<think>\nTicket 7.\n</think>\n\nDone soon."):
        assert part in text
    assert '<invoke name="close">\n<parameter name="ticket">7</parameter>' in text
    assert "<response>closed</response>" in text


def test_records_that_the_template_refuses_are_left_out_and_counted() -> None:
    tokenizer = load_tokenizer(FIXTURES / "tiny-m2")
    odd = parse_record({"messages": [USER, {"role": "narrator", "content": "Meanwhile."}]}, "line 3")
    good = Document("text", "en", "here", "none", text="A sentence with some words. " * 20)
    many = [replace(good, text=f"{number}. {good.text}") for number in range(4)]
    length = sum(len(tokenizer(d.text or "")["input_ids"]) + 1 for d in many)  # all that there is
    windows = tokenize_windows([odd, odd, *many], tokenizer, 1, length, seed=0)
    assert windows.source == "documents: 4 of 6 documents (4 text)"
    # Two of one group stand apart in the order, so that one at least comes before the last text.
    assert re.match(
        r"[12] of [56] records left out, because the chat template refuses them; the first: line 3", windows.notes[0]
    )
    with pytest.raises(CalibrationError, match="line 3: the tokenizer's chat template refuses"):
        tokenize_windows([odd], tokenizer, 2, 16, seed=0)


def test_calibration_and_evaluation_take_the_same_names() -> None:
    from m3quant.calibration.corpus import HUB_ID, PUBLIC
    from m3quant.evaluate import texts

    assert set(PUBLIC) == set(texts.PUBLIC)
    for name, spec in PUBLIC.items():
        learnt, measured = HUB_ID.fullmatch(spec), texts.PUBLIC[name]
        assert learnt and learnt["name"] == measured[0] and learnt["split"] == "train" and measured[2] == "test"
