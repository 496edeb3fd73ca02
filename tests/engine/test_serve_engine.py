"""`m3quant serve` with the real vLLM on the CPU: converted fixtures, an OpenAI client, a clean end.

One server per model, because each takes half a minute to start.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import CliRunner

from m3quant.cli import cli
from tests.support.engine.running import ENV, NEEDS_ENGINE
from tests.support.paths import FIXTURES

pytestmark = NEEDS_ENGINE

KEY = "secret-of-the-test"
CONTEXT = 2048
START_S = 240
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Paris"]}}, "required": ["city"]},
    },
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def converted(model: str, tmp_path: Path) -> Path:
    output = tmp_path / model
    done = CliRunner().invoke(
        cli, ["convert", str(FIXTURES / f"tiny-{model}"), str(output), "--to=int4", "--device=cpu"]
    )
    assert done.exit_code == 0, (done.output, done.exception)
    return output


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], list[dict[str, Any]]]]:
    """A running `m3quant serve --json`; the events it has printed up to `ready`."""
    command = [
        sys.executable,
        "-m",
        "m3quant",
        "serve",
        str(folder),
        "--on=cpu:1GiB",
        f"--port={free_port()}",
        f"--context={CONTEXT}",
        "--json",
    ]
    command += [
        "--served-name=tiny",
        "--api-key-env=TEST_KEY",
        f"--start-timeout={START_S}",
        "--shutdown-timeout=10",
        f"--log={folder}.log",
    ]
    environment = {**os.environ, **ENV, "TEST_KEY": KEY, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with subprocess.Popen(
        [*command, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        events = []
        try:
            assert process.stdout is not None and process.stderr is not None
            for line in process.stdout:
                events.append(json.loads(line))
                if events[-1]["event"] == "ready":
                    break
            else:
                pytest.fail(f"serve ended early: {process.stderr.read()}\n{Path(f'{folder}.log').read_text()[-3000:]}")
            yield process, events
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=60)


def tool_call_options(model: str) -> dict[str, Any]:
    """What makes a model of a few million parameters call the tool.

    vLLM forces M2's named call as JSON, with whatever arguments; M3's parser reads M3's own markup only, so here the grammar is that text.
    """
    if model == "m2":
        return {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}}
    tag = "]<]minimax[>["
    text = f'{tag}<tool_call>\n{tag}<invoke name="get_weather">\n{tag}<city>Paris{tag}</city>\n{tag}</invoke>\n{tag}</tool_call>'
    return {"tool_choice": "auto", "extra_body": {"structured_outputs": {"choice": [text]}}}


@pytest.mark.parametrize("model", ["m2", "m3"])
def test_an_openai_client_is_served(model: str, tmp_path: Path) -> None:
    folder = converted(model, tmp_path)
    with serving(folder) as (process, (decided, ready)):
        assert KEY not in json.dumps(decided) and all(KEY not in part for part in decided["command"])
        assert ready["max_model_len"] == CONTEXT and ready["pool_tokens"] >= decided["pool_tokens"]
        (cache,) = [line for line in ready["compared"] if line["unit"] == "tokens"]
        # The CPU plugin keeps M3's index keys outside vLLM's cache (cpu_plugin/.../minimax_m3.py), so there the pool is larger.
        assert cache["holds"] if model == "m2" else cache["measured"] > cache["predicted"]
        client = openai.OpenAI(base_url=ready["url"], api_key=KEY, max_retries=0, timeout=120)
        assert client.models.list().data[0].id == "tiny"
        hello = [{"role": "user", "content": "hello"}]

        # A busy engine joins tokens into one chunk, so chunks are not counted, but the tokens that it says it made.
        *chat, last = client.chat.completions.create(
            model="tiny", messages=hello, max_tokens=8, stream=True, temperature=0,
            stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
        )  # fmt: skip
        assert chat and chat[-1].choices[0].finish_reason == "length"
        assert last.usage is not None and last.usage.completion_tokens == 8

        pieces = list(
            client.completions.create(model="tiny", prompt="the city of", max_tokens=8, stream=True, temperature=0)
        )
        assert "".join(piece.choices[0].text for piece in pieces)

        calls = client.chat.completions.create(
            model="tiny",
            messages=hello,
            tools=[WEATHER],
            max_tokens=200,
            stream=True,
            temperature=0,
            **tool_call_options(model),
        )
        deltas = [call for chunk in calls if chunk.choices for call in (chunk.choices[0].delta.tool_calls or [])]
        assert deltas[0].function.name == "get_weather"
        arguments = json.loads("".join(d.function.arguments or "" for d in deltas))
        assert arguments == {"city": "Paris"} if model == "m3" else arguments.keys() <= {"city"}

        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="tiny", prompt=list(range(5, 500)) * 5, max_tokens=1)
        assert f"{CONTEXT} tokens" in str(refused.value)
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=ready["url"], api_key="wrong", max_retries=0).models.list()

        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"event": "stopped", "exit": 0}
        assert process.wait(timeout=30) == 0
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
    assert KEY not in Path(f"{folder}.log").read_text(encoding="utf-8")


def test_an_engine_that_cannot_start_is_one_sentence(tmp_path: Path) -> None:
    """More cache than the machine has memory: vLLM itself, not our checks, meets it."""
    folder = converted("m2", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "m3quant", "serve", str(folder), "--on=cpu:900GiB", "--no-guard", f"--port={free_port()}", f"--log={folder}.log", "--quiet"],
        env={**os.environ, **ENV, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=START_S,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("m3quant: the engine ended with exit code") and f"{folder}.log" in last
