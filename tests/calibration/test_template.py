"""Chat templates: the worker's text is transformers' own, and a template beyond its bounds is ended and named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from m3quant.calibration import template
from m3quant.calibration.corpus import load_documents, load_tokenizer, render
from m3quant.calibration.documents import Document
from m3quant.calibration.template import Renderer, TemplateError
from m3quant.errors import CalibrationError
from tests.support.paths import FIXTURES

CHAT = [{"role": "user", "content": "a question"}]


@pytest.mark.parametrize("family", ["tiny-m2", "tiny-m3"])
def test_the_text_is_what_transformers_gives(family: str) -> None:
    tokenizer = load_tokenizer(FIXTURES / family)
    chats = [d for d in load_documents(None) if d.messages is not None]
    assert any(d.tools for d in chats)
    for document in chats[::7]:
        tools: Any = list(document.tools) or None
        expected = tokenizer.apply_chat_template(list(document.messages or ()), tools=tools, tokenize=False)
        assert render(document, tokenizer) == expected


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    worker = Renderer(cpu_seconds=0.5)
    yield worker
    worker.close()


HOSTILE = {
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "processor time"),
    "loops that write": ("{% for a in range(3000) %}{% for b in range(3000) %}x{% endfor %}{% endfor %}", "characters|processor"),
    "a recursive macro": ("{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}", "recursion|processor"),
    "a text of gigabytes": ("{{ 'x' * 4000000000 }}", "memory"),
    "one of gigabytes, later": ("{{ ('x' * (messages | length * 4000000000)) | length }}", "memory"),
    "a wide format": ("{{ '%4000000000d' % (messages | length) }}", "memory|too big|width"),
    "a wide filter": ("{{ messages[0].role | center(4000000000) }}", "memory"),
    "a large power": ("{{ (messages | length + 9) ** 9999999999 }}", "processor time|memory"),
    "a list of lists": ("{% set l = namespace(v=[1]) %}{% for i in range(60) %}{% set l.v = l.v + l.v %}{% endfor %}", "memory|processor"),
    "its own refusal": ("{{ raise_exception('no system role') }}", "no system role"),
    "a long refusal": ("{{ raise_exception('x' * 1000000) }}", "^x{300}$"),
    "no template": ("{% if %}", "."),
    "the machine": ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_template_beyond_its_bounds_is_refused(kind: str, renderer: Renderer) -> None:
    text, words = HOSTILE[kind]
    with pytest.raises(TemplateError, match=words):
        renderer.render(text, {}, CHAT, None)
    assert renderer.render("{{ messages[0].content }}{{ eos_token }}", {"eos_token": "."}, CHAT, None) == "a question."


def test_a_worker_that_was_ended_is_replaced_and_the_record_is_named(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "_worker", (os.getpid(), renderer))
    tokenizer = load_tokenizer(FIXTURES / "tiny-m2")
    tokenizer.chat_template = "{% if messages[0].content == 'stop' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}{{ messages[0].content }}"

    def document(content: str) -> Document:
        return Document("chat", "en", f"record {content}", "none", messages=({"role": "user", "content": content},))

    assert render(document("first"), tokenizer) == "first"
    with pytest.raises(CalibrationError, match=r"^record stop: .*more than 0\.5 s of processor time"):
        render(document("stop"), tokenizer)
    assert render(document("second"), tokenizer) == "second"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_tokenizer_files_of_gigabytes_are_not_read(name: str, tmp_path: Path) -> None:
    from tests.support import hostile

    (tmp_path / "tokenizer.json").write_text("{}")
    hostile.sparse(tmp_path / name, 3 * 2**30, b"{}")
    with pytest.raises(CalibrationError, match=rf"{name} has 3,221,225,472 bytes, more than"):
        load_tokenizer(tmp_path)


def test_a_system_that_limits_no_memory_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(template, "STATUS", tmp_path / "absent")
    with pytest.raises(CalibrationError, match=r"run this on Linux .*--calibration FILE"):
        Renderer()
