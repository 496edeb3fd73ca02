"""Generated request bodies for every guarded route: what clients send, and bodies that two readers may read differently.

Each body is drawn from a seed: a route, a prompt in one of its forms, and a handful of members whose values are right, odd (null, true, "5", 5.0,
0) or wrong. Members that only another route reads are mixed in, and members are written twice now and then.
"""

from __future__ import annotations

import json
import random
from typing import Any

ROUTES = (
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/cohere/v2/chat",
    "/inference/v1/generate",
    "/invocations",
)
WORDS = [
    "It",
    "is",
    "a",
    "truth",
    "universally",
    "acknowledged,",
    "that",
    "a",
    "single",
    "man",
    "in",
    "possession",
    "of",
    "“good”",
    "fortune",
    "—",
    "café,",
    "漢字,",
    "🙂",
    "<|im_end|>",
    "must\n",
]
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks up <b>",
        "parameters": {"type": "object", "properties": {"ü": {"type": "string", "enum": ["a", "b"]}}},
    },
}


class Bodies:
    def __init__(self, seed: int, context: int, vocabulary: int) -> None:
        self.rng = random.Random(seed)
        self.context = context
        self.vocabulary = vocabulary

    def draw(self) -> tuple[str, bytes]:
        route = self.rng.choice(ROUTES)
        body = PROMPTS[route](self)
        body.update(self.members(route))
        if self.rng.random() < 0.3 or route in ("/v1/messages", "/cohere/v2/chat"):
            body["model"] = "tiny"
        items = list(body.items())
        self.rng.shuffle(items)
        pairs = [f"{json.dumps(name)}:{json.dumps(value)}" for name, value in items]
        if items and self.rng.random() < 0.1:  # the last one wins
            name, _ = self.rng.choice(items)
            pairs.insert(0, f"{json.dumps(name)}:{json.dumps(self.number())}")
        return route, ("{" + ",".join(pairs) + "}").encode()

    # Values

    def text(self, most: int = 60) -> str:
        return " ".join(self.rng.choices(WORDS, k=self.rng.randrange(1, most)))

    def ids(self) -> list[Any]:
        count = self.rng.choice((1, 3, 31, 32, 33, 200, self.context - 1))
        found: list[Any] = [self.rng.randrange(self.vocabulary) for _ in range(count)]
        if self.rng.random() < 0.1:
            found[0] = self.rng.choice(("5", 5.0, True))
        return found

    def number(self) -> Any:
        good = (1, 2, 5, 16, 17, 100, 500, self.context - 1, self.context, self.context + 1)
        odd = (None, None, True, "5", 5.0, "500", 0)
        wrong = (-1, 1.5, "x", [], {}, 2**31, 10**30)
        return self.rng.choice(self.rng.choice((good, good, good, odd, odd, wrong)))

    def small(self) -> Any:
        return self.rng.choice((1, 1, 2, 3, 8, None, "2", 2.0, True, 0))

    def members(self, route: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        names = [OUTPUT[route]] * 3 + ["max_tokens", "max_completion_tokens", "max_output_tokens"]
        for _ in range(self.rng.choice((0, 1, 1, 1, 2))):
            found[self.rng.choice(names)] = self.number()
        for name, draw in MEMBERS.items():
            if self.rng.random() < 0.08:
                found[name] = draw(self)
        if route == "/inference/v1/generate":
            inside = {"max_tokens": self.number()} if self.rng.random() < 0.7 else {}
            if self.rng.random() < 0.3:
                inside["n"] = self.small()
            found["sampling_params"] = inside
        return found

    # Prompts

    def parts(self, kind: str = "text") -> Any:
        if self.rng.random() < 0.6:
            return self.text()
        return [{"type": kind, "text": self.text(20)} for _ in range(self.rng.randrange(1, 4))]

    def chat(self) -> dict[str, Any]:
        messages: list[dict[str, Any]] = []
        if self.rng.random() < 0.3:
            messages.append({"role": "system", "content": self.text()})
        for _ in range(self.rng.randrange(1, 4)):
            messages.append({"role": "user", "content": self.parts()})
            if self.rng.random() < 0.5:
                messages.append(self.assistant())
        return {"messages": messages}

    def assistant(self) -> dict[str, Any]:
        if self.rng.random() < 0.6:
            return {"role": "assistant", "content": self.text()}
        arguments = json.dumps({word: self.number() for word in "abc"[: self.rng.randrange(1, 4)]})
        call = {"id": "c", "type": "function", "function": {"name": "look_up", "arguments": arguments}}
        return {"role": "assistant", "content": None, "tool_calls": [call]}

    def batch(self) -> dict[str, Any]:
        return {"messages": [self.chat()["messages"] for _ in range(self.rng.randrange(1, 4))]}

    def completion(self) -> dict[str, Any]:
        draws = (
            self.text,
            lambda: [self.text() for _ in range(self.rng.randrange(1, 5))],
            self.ids,
            lambda: [self.ids() for _ in range(self.rng.randrange(1, 4))],
            lambda: None,
        )
        return {"prompt": self.rng.choice(draws)()}

    def responses(self) -> dict[str, Any]:
        body: dict[str, Any] = {"input": self.text()}
        if self.rng.random() < 0.6:
            body["input"] = [{"role": "user", "content": self.parts("input_text")}]
            if self.rng.random() < 0.3:
                call = {"type": "function_call", "call_id": "c", "name": "look_up", "arguments": '{"ü": 1}'}
                body["input"] += [call, {"type": "function_call_output", "call_id": "c", "output": self.text()}]
        if self.rng.random() < 0.3:
            body["instructions"] = self.text()
        if self.rng.random() < 0.2:
            body["tools"] = [{"type": "function", **TOOL["function"]}]  # type: ignore[dict-item]
        if self.rng.random() < 0.2:
            body["truncation"] = self.rng.choice(("auto", "disabled", None))
        if self.rng.random() < 0.2:
            body["reasoning"] = {"effort": "low"}
        return body

    def messages(self) -> dict[str, Any]:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": self.parts()}], "max_tokens": 16}
        if self.rng.random() < 0.3:
            body["system"] = self.parts()
        if self.rng.random() < 0.2:
            body["tools"] = [{"name": "look_up", "description": "<b>", "input_schema": TOOL["function"]["parameters"]}]  # type: ignore[index]
        if self.rng.random() < 0.2:
            use = {"type": "tool_use", "id": "c", "name": "look_up", "input": {"ü": self.text(5), "b": [1, 2]}}
            result = {"type": "tool_result", "tool_use_id": "c", "content": self.parts()}
            body["messages"] += [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
        if self.rng.random() < 0.2:
            body["thinking"] = {"type": "enabled", "budget_tokens": 1024}
        return body

    def generate(self) -> dict[str, Any]:
        return {"token_ids": self.ids()}

    def either(self) -> dict[str, Any]:
        body: dict[str, Any] = {}
        if self.rng.random() < 0.7:
            body.update(self.completion())
        if self.rng.random() < 0.6:
            body.update(
                self.chat() if self.rng.random() < 0.6 else {"messages": self.rng.choice((None, 5, [], ["a"], [5]))}
            )
        return body


PROMPTS = {
    "/v1/chat/completions": Bodies.chat,
    "/v1/chat/completions/batch": Bodies.batch,
    "/v1/completions": Bodies.completion,
    "/v1/responses": Bodies.responses,
    "/v1/messages": Bodies.messages,
    "/cohere/v2/chat": Bodies.chat,
    "/inference/v1/generate": Bodies.generate,
    "/invocations": Bodies.either,
}
OUTPUT = {
    **dict.fromkeys(ROUTES, "max_tokens"),
    "/v1/chat/completions": "max_completion_tokens",
    "/v1/responses": "max_output_tokens",
}
MEMBERS: dict[str, Any] = {
    "n": Bodies.small,
    "best_of": Bodies.small,
    "use_beam_search": lambda self: self.rng.choice((True, False, "yes", 1)),
    "echo": lambda self: True,
    "suffix": Bodies.text,
    "min_tokens": lambda self: self.rng.choice((0, 5)),
    "truncate_prompt_tokens": lambda self: self.rng.choice((-1, 1, 5, 100, self.context, "5", None)),
    "truncation_side": lambda self: self.rng.choice(("left", "right")),
    "add_special_tokens": lambda self: self.rng.choice((True, False)),
    "add_generation_prompt": lambda self: self.rng.choice((True, False)),
    "continue_final_message": lambda self: self.rng.choice((True, False)),
    "tools": lambda self: [TOOL],
    "tool_choice": lambda self: self.rng.choice(("auto", "none", "required")),
    "documents": lambda self: [{"title": "a", "text": self.text()}],
    "chat_template": lambda self: "{{ messages }}" * 9,
    "chat_template_kwargs": lambda self: {"enable_thinking": self.rng.choice((True, False))},
    "reasoning_effort": lambda self: self.rng.choice(("low", "none")),
    "kv_transfer_params": lambda self: {"prompt_token_ids": self.ids()},
    "prompt": Bodies.text,
    "messages": lambda self: [{"role": "user", "content": self.text()}],
    "input": Bodies.text,
    "prompt_token_ids": Bodies.ids,
    "stream": lambda self: self.rng.choice((True, False)),
    "ignore_eos": lambda self: True,
    "logprobs": lambda self: self.rng.choice((True, 1, 5)),
}
