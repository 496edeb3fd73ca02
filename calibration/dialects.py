"""From one record of a data set to a document: the usual field names, and what each means.

A record is read as the first of these that it has: a conversation, a prompt with its answer, a text. Empty records and
the kinds of odd records are distinguished (`EmptyRecord`, `OddRecord`); readers leave both out and count them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from m3quant.calibration.documents import Document, EmptyRecord, OddRecord
from m3quant.calibration.messages import Message, parse_messages, parse_tools

CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns", "chosen", "data")
SYSTEM = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions", "available_tools")
# (what is asked, context that belongs to it, what is answered)
PAIRS = (
    ("prompt", None, ("completion", "response", "answer", "output", "chosen")),  # TRL, and preference data
    ("instruction", "input", ("output", "response", "answer", "completion")),  # Alpaca
    ("instruction", "context", ("response", "output")),  # Dolly
    ("question", "context", ("answer", "response", "output", "solution")),
    ("query", None, ("response", "answer", "output")),
    ("problem", None, ("solution", "answer")),
    ("inputs", None, ("targets", "target", "outputs")),
    ("input", None, ("output", "target", "response")),
)
TEXTS = ("text", "content", "document", "article", "page", "body", "passage", "code", "markdown", "raw_content")
FIELDS = (
    'a string "text", a list "messages" or "conversations", or a pair such as "prompt" and "completion", "instruction" '
    'and "output", "question" and "answer"'
)
KNOWN = frozenset(CONVERSATIONS) | frozenset(TEXTS) | {name for pair in PAIRS for name in (pair[0], *pair[2])}


def parse_record(record: object, where: str) -> Document:
    """A document from one JSON, CSV or Parquet record; `where` names file and line in errors and as the default source.

    Raises:
        EmptyRecord: its fields are known and hold nothing.
        OddRecord: the record is no object, has none of the fields that we read, a malformed one, or half of a surrogate
            pair, which JSON can escape and no tokenizer takes.
    """
    document = _record(record, where)
    try:
        document.content_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise OddRecord(
            f"{where} holds half of a surrogate pair (\\ud800 to \\udfff): write the character whole."
        ) from None
    except RecursionError:
        raise OddRecord(f"{where} is nested too deeply.") from None
    return document


def _record(record: object, where: str) -> Document:
    if isinstance(record, Sequence) and not isinstance(record, str | bytes):  # one conversation, and nothing around it
        record = {"messages": record}
    if not isinstance(record, Mapping):
        raise OddRecord(f"{where}: the record is {type(record).__name__}, not an object with {FIELDS}.")
    given = {key: value for key, value in record.items() if value is not None and value != ""}
    about = (str(given.get("lang") or "und"), str(given.get("source") or where), _licence(given))
    kind = given.get("kind")
    for name in CONVERSATIONS:  # "data" is UltraChat's name for it
        if isinstance(given.get(name), list | tuple) or (isinstance(given.get(name), str) and given[name][:1] == "["):
            messages = parse_messages(given[name], f'{where}: "{name}"')
            return _chat(given, _opening(given, messages, where) + messages, kind, about, where)
    if "messages" in given:
        raise OddRecord(f'{where}: "messages" must be a list of messages.')
    if "content" in given and ("role" in given or "from" in given):  # a message by itself
        return _chat(given, parse_messages([dict(given)], where), kind, about, where)
    if (pair := _pair(given, where)) is not None:
        return _chat(given, pair, kind, about, where)
    for name in TEXTS:
        if name in given:
            text = given[name]
            if not isinstance(text, str):
                raise OddRecord(f'{where}: "{name}" is {type(text).__name__}, not a string.')
            if not text.strip():
                raise EmptyRecord(f'{where}: "{name}" is empty; give it text or remove the record.')
            return Document(str(kind or ("code" if name == "code" else "text")), *about, text=text)
    known = [name for name in record if name in KNOWN]
    if known and not KNOWN & set(given):
        named = ", ".join(f'"{name}"' for name in known)
        raise EmptyRecord(f"{where}: {named} is empty; give it text or remove the record.")
    present = ", ".join(list(map(str, record))[:20]) or "nothing"
    raise OddRecord(f"{where}: the record has the fields {present}, but none that we read: it needs {FIELDS}.")


def _licence(given: Mapping[str, Any]) -> str:
    return str(given.get("licence") or given.get("license") or "not stated")


def _chat(
    given: Mapping[str, Any], messages: tuple[Message, ...], kind: object, about: tuple[str, str, str], where: str
) -> Document:
    tools = parse_tools(next((given[name] for name in TOOLS if name in given), ()), where)
    if not messages or all(message["role"] == "system" for message in messages):
        raise EmptyRecord(f"{where}: the conversation is empty; give it messages or remove the record.")
    if messages[0]["role"] != "system" and (system := _system(given, where)):
        messages = ({"role": "system", "content": system}, *messages)
    return Document(str(kind or ("tools" if tools else "chat")), *about, messages=messages, tools=tools)


def _system(given: Mapping[str, Any], where: str) -> str:
    system = next((given[name] for name in SYSTEM if name in given), "")
    if not isinstance(system, str):
        raise OddRecord(f'{where}: "system" is {type(system).__name__}, not a string.')
    return system if system.strip() else ""


def _opening(given: Mapping[str, Any], messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """The prompt's messages where the conversation holds only what follows them."""
    prompt = given.get("prompt")
    if messages and messages[0]["role"] == "assistant" and isinstance(prompt, list | tuple):
        return parse_messages(prompt, f'{where}: "prompt"')
    if messages and messages[0]["role"] == "assistant" and isinstance(prompt, str) and prompt.strip():
        return ({"role": "user", "content": prompt},)
    return ()


def _pair(given: Mapping[str, Any], where: str) -> tuple[Message, ...] | None:
    """A question and its answer as messages, with the turns before them; None where the record is no such pair."""
    for asked, context, answers in PAIRS:
        answer = next((name for name in answers if name in given), None)
        if asked not in given or answer is None:
            continue
        before = _history(given.get("history"), where)
        question = _turns(given[asked], "user", f'{where}: "{asked}"')
        if context and question and isinstance(more := given.get(context), str) and more.strip():
            first, second = (
                (question[-1]["content"], more) if asked == "instruction" else (more, question[-1]["content"])
            )
            question = (*question[:-1], {**question[-1], "content": f"{first}\n\n{second}"})
        return before + question + _turns(given[answer], "assistant", f'{where}: "{answer}"')
    return None


def _turns(value: object, role: str, where: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return parse_messages([{"role": role, "content": value}], where)
    if isinstance(value, Mapping) and isinstance(value.get("text"), list) and value["text"]:  # SQuAD's answers
        value = [{"role": role, "content": str(value["text"][0])}]
    return parse_messages(value, where)


def _history(value: object, where: str) -> tuple[Message, ...]:
    """Alpaca's "history": pairs of what was asked and answered before."""
    if not isinstance(value, list | tuple):
        return ()
    turns = [turn for pair in value if isinstance(pair, list | tuple) for turn in pair]
    return parse_messages(turns, f'{where}: "history"')
