"""Chat messages: the roles, tool calls and thinking of the dialects that data sets use, in the one form that chat templates take.

That form is OpenAI's, with `reasoning_content` for thinking and tool-call arguments as objects: {"role", "content",
"reasoning_content", "tool_calls": [{"type": "function", "id", "function": {"name", "arguments"}}]}.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from m3quant.calibration.documents import OddRecord

# Lower-case spelling -> role. Others keep their name, for the template to know or refuse.
ROLES = {
    "user": ("user", "human", "prompter", "customer", "instruction"),
    "assistant": ("assistant", "gpt", "chatgpt", "ai", "bot", "model", "bing", "bard", "function_call", "tool_call"),
    "tool": ("tool", "observation", "function", "function_response", "tool_response", "tool_result", "function_result"),
    "system": ("system", "developer"),  # OpenAI's newer name for it
}
ROLE_OF = {spelling: role for role, spellings in ROLES.items() for spelling in spellings}
CALLING = {"function_call", "tool_call"}
THINKING = ("reasoning_content", "reasoning", "thinking")
THOUGHT = re.compile(r"\s*<think(?:ing)?>(.*?)</think(?:ing)?>\s*", re.DOTALL)
CALL, CALL_END = "<tool_call>", "</tool_call>"  # the Hermes and Qwen form
ANSWER, ANSWER_END = "<tool_response>", "</tool_response>"
Message = dict[str, Any]


def parse_messages(value: object, where: str) -> tuple[Message, ...]:
    """The messages of one conversation, those without content left out. Raises OddRecord, naming the message."""
    value = from_json(value, where)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise OddRecord(f"{where} must be a list of messages.")
    if value and all(isinstance(item, str) for item in value):  # turns without roles: the user speaks first
        value = [{"role": ("user", "assistant")[number % 2], "content": item} for number, item in enumerate(value)]
    found: list[Message] = []
    for number, item in enumerate(value, 1):
        found += _parse_message(item, f"{where}, message {number}")
    # A record of which only a system prompt is left says nothing.
    return tuple(found) if any(message["role"] != "system" for message in found) else ()


def from_json(value: object, where: str) -> object:
    """A list or object out of the JSON text that CSV and some Parquet files hold; other values as they are."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise OddRecord(f"{where} is a string, but not JSON ({error}).") from error
    return value


def _parse_message(value: object, where: str) -> list[Message]:
    if not isinstance(value, Mapping):
        raise OddRecord(f'{where} is not an object with "role" and "content".')
    message = {key: item for key, item in value.items() if item is not None}
    spelled = message.pop("role", message.get("from"))
    if not isinstance(spelled, str):
        raise OddRecord(f'{where} has no "role" (or "from").')
    if "from" in message:  # the ShareGPT spelling
        del message["from"]
        message.setdefault("content", message.pop("value", ""))
    role = ROLE_OF.get(spelled.strip().lower(), spelled)
    content = message.pop("content", "")
    if not isinstance(content, str | list) or (isinstance(content, list) and not _are_parts(content)):
        raise OddRecord(f'{where}: "content" must be a string or a list of parts.')
    calls = message.pop("tool_calls", None) or []
    if not isinstance(calls, list):
        raise OddRecord(f'{where}: "tool_calls" must be a list.')
    calls = [_tool_call(call, where) for call in calls]
    if legacy := message.pop("function_call", None):  # OpenAI's form before tools
        calls.append(_tool_call(legacy, where))
    thoughts = [str(thought) for key in THINKING if (thought := message.pop(key, None))][:1]
    before: list[Message] = []
    if isinstance(content, list):
        content, more_thoughts, more_calls, before = _parts(content, where)
        thoughts, calls = thoughts + more_thoughts, calls + more_calls
    if isinstance(content, str):
        if spelled.strip().lower() in CALLING:
            content, calls = _written_calls(content, calls, where)
        content, thoughts, calls = _written_tags(role, content, thoughts, calls, where)
    whole: Message = {"role": role, "content": content, **message}
    if role == "assistant" and thoughts:
        whole["reasoning_content"] = "\n".join(thoughts)
    if calls:
        whole["tool_calls"] = calls
    has_content = bool(content.strip()) if isinstance(content, str) else bool(content)
    return [*before, *([whole] if has_content or calls or whole.get("reasoning_content") or role == "tool" else [])]


def _are_parts(content: Sequence[object]) -> bool:
    return all(isinstance(part, Mapping) for part in content)


def _parts(content: list[Any], where: str) -> tuple[str | list[Any], list[str], list[Message], list[Message]]:
    """(content, thoughts, tool calls, tool results) of a list of parts, Anthropic's among them. Images stay parts."""
    kept: list[Any] = []
    thoughts: list[str] = []
    calls: list[Message] = []
    results: list[Message] = []
    for part in content:
        kind = part.get("type")
        if kind in ("thinking", "reasoning"):
            thoughts.append(str(part.get("thinking") or part.get("text") or part.get("content") or ""))
        elif kind == "tool_use":
            calls.append(_tool_call({**part, "type": "function", "arguments": part.get("input", {})}, where))
        elif kind == "tool_result":
            name = {"tool_call_id": part["tool_use_id"]} if isinstance(part.get("tool_use_id"), str) else {}
            results += [{**answer, **name} for answer in _parse_message({**part, "role": "tool"} | _RESULT, where)]
        else:
            kept.append(dict(part))
    if all(isinstance(part.get("text"), str) for part in kept):
        return "\n".join(part["text"] for part in kept), [t for t in thoughts if t], calls, results
    return kept, [t for t in thoughts if t], calls, results


_RESULT = {"type": None, "tool_use_id": None, "is_error": None}  # of a tool result's part, no business of a message


def _written_calls(content: str, calls: list[Message], where: str) -> tuple[str, list[Message]]:
    """The calls that a message of role function_call holds as JSON; content that is not JSON is refused, not made prose."""
    if not content.strip():
        return content, calls
    found = [text for _, _, text in _tagged_calls(content)] or [content]
    try:
        values = [json.loads(text) for text in found]
    except (ValueError, RecursionError) as error:
        raise OddRecord(f"{where}: its function call is not JSON ({error}).") from error
    flat = [call for value in values for call in (value if isinstance(value, list) else [value])]
    return "", calls + [_tool_call(call, where) for call in flat]


def _written_tags(
    role: str, content: str, thoughts: list[str], calls: list[Message], where: str
) -> tuple[str, list[str], list[Message]]:
    """Thinking and calls in the content between tags; what is not between tags stays content."""
    if role == "tool" and (whole := content.strip()).startswith(ANSWER) and whole.endswith(ANSWER_END):
        return whole.removeprefix(ANSWER).removesuffix(ANSWER_END).strip(), thoughts, calls
    if role != "assistant":
        return content, thoughts, calls
    if thought := THOUGHT.match(content):
        content = content[thought.end() :]
        thoughts = thoughts or [thought[1].strip()]
    if written := list(_tagged_calls(content)):
        try:
            values = [json.loads(text) for _, _, text in written]
        except (ValueError, RecursionError):
            return content, thoughts, calls  # tags in prose, an explanation of them for instance
        if all(isinstance(value, dict) and isinstance(value.get("name"), str) for value in values):
            ends = [0, *(end for _, end, _ in written)]
            starts = [*(start for start, _, _ in written), len(content)]
            rest = "".join(content[end:start] for end, start in zip(ends, starts, strict=True))
            return rest.strip(), thoughts, calls + [_tool_call(v, where) for v in values]
    return content, thoughts, calls


def _tagged_calls(content: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, text) of every {...} between tags: up to the first closing tag that follows a }. Linear, which a regex is not."""
    at = 0
    while (start := content.find(CALL, at)) >= 0:
        first = at = start + len(CALL)
        while content[first : first + 1].isspace():
            first += 1
        if content[first : first + 1] != "{":
            continue
        close = first
        while (close := content.find(CALL_END, close)) >= 0:
            last = close
            while last > first and content[last - 1].isspace():
                last -= 1
            if last - 1 > first and content[last - 1] == "}":
                break
            close += len(CALL_END)
        if close < 0:  # and none for any later one
            return
        at = close + len(CALL_END)
        yield start, at, content[first:last]


def _tool_call(value: object, where: str) -> Message:
    value = from_json(value, where)
    call = value if isinstance(value, Mapping) else {}
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise OddRecord(f'{where}: a tool call needs "function" with "name" and "arguments".')
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):  # the wire form of the OpenAI API; chat templates want the object
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise OddRecord(f"{where}: the arguments of {function['name']} are not JSON ({error}).") from error
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise OddRecord(f"{where}: the arguments of {function['name']} are {type(arguments).__name__}, not an object.")
    outer = {key: item for key, item in call.items() if key in ("id", "type") and item is not None}
    return {"type": "function", **outer, "function": {"name": function["name"], "arguments": dict(arguments)}}


def parse_tools(value: object, where: str) -> tuple[dict[str, Any], ...]:
    """Function schemas, as {"type": "function", "function": {...}} whichever way they were written. Raises OddRecord."""
    value = from_json(value or (), f'{where}: "tools"')
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise OddRecord(f'{where}: "tools" must be a list of function schemas.')
    schemas = [from_json(tool, f'{where}: "tools"') for tool in value]
    if not all(isinstance(tool, Mapping) for tool in schemas):
        raise OddRecord(f'{where}: "tools" must be a list of function schemas.')
    return tuple(_schema(dict(tool)) for tool in schemas if isinstance(tool, Mapping))


def _schema(tool: dict[str, Any]) -> dict[str, Any]:
    if "function" in tool or "name" not in tool:
        return tool
    if "parameters" not in tool and "input_schema" in tool:  # Anthropic's name for it
        tool["parameters"] = tool.pop("input_schema")
    tool.pop("type", None)
    return {"type": "function", "function": tool}
