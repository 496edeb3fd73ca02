"""ASGI middleware for a real vLLM: the guard, and what the engine was asked for behind it. Nothing is generated.

    vllm serve CKPT --middleware guard_recorder.Recorder

`GET /recorded` tells of the request before: `reserved`, the tokens that the guard held when the engine was first asked, -1 if it never
was, and `used`, the most that the engine may use for what it was asked: prompt and max_tokens, at most the context, in whole blocks, for every sequence. One request at a time.
"""

from __future__ import annotations

import json
from typing import Any

from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin

from m3quant.runtime.guard import Guard
from m3quant.runtime.guard.replies import send_json


class Recorder:
    def __init__(self, app: Any) -> None:
        self.guard = Guard(app)
        self.used = 0
        self.reserved = -1
        self.block = self.context = 0
        self.client: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.guard(scope, receive, send)
        if scope["path"] == "/recorded":
            return await send_json(send, 200, json.dumps({"used": self.used, "reserved": self.reserved}).encode())
        self.watch(scope["app"].state)
        self.used, self.reserved = 0, -1
        await self.guard(scope, receive, send)

    def watch(self, state: Any) -> None:
        if self.client is state.engine_client:
            return
        self.client = state.engine_client
        self.block = state.vllm_config.cache_config.block_size
        self.context = state.vllm_config.model_config.max_model_len

        def generate(prompt: Any, sampling_params: Any, request_id: str, **_: Any) -> Any:
            self.record(prompt, sampling_params.max_tokens, sampling_params.n)
            return refuse()

        def beam_search(_: Any, prompt: Any, request_id: str, params: Any, **__: Any) -> Any:
            self.record(prompt, params.max_tokens, params.beam_width)
            return refuse()

        self.client.generate = generate
        BeamSearchOnlineMixin.beam_search = beam_search

    def record(self, prompt: Any, max_tokens: int | None, sequences: int) -> None:
        if self.reserved < 0:
            self.reserved = self.guard.admission.ledger.reserved
        ids = prompt.get("prompt_token_ids")
        length = len(ids) if ids is not None else len(prompt["prompt_embeds"])
        whole = self.context if max_tokens is None else min(length + max_tokens, self.context)
        self.used += -(-whole // self.block) * self.block * sequences


async def refuse() -> Any:
    raise ValueError("recorded, not generated")
    yield
