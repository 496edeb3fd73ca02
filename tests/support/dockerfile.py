"""A Dockerfile as instructions, and .dockerignore as a set of files: strict on the forms that ours uses, and on nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

INSTRUCTIONS = {"ARG", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "WORKDIR"}
# github.com/distribution/reference: name with an optional registry, tag of at most 128 characters.
IMAGE = re.compile(
    r"(?:[a-z0-9]+(?:[._-]+[a-z0-9]+)*/)*[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
)


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(instruction, arguments) of every line. Raises ValueError for what is none."""
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        if word not in INSTRUCTIONS or not rest.strip():
            raise ValueError(f"no instruction: {line}")
        yield word, rest.strip()


def stages(text: str, arguments: dict[str, str] | None = None) -> dict[str, list[tuple[str, str]]]:
    """Stage (its name, or its number) -> its instructions, FROM with its image resolved first. Raises ValueError for what a build would."""
    known = dict(arguments or {})
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] | None = None
    for word, rest in instructions(text):
        if word == "ARG" and current is None:
            name, _, default = rest.partition("=")
            known.setdefault(name, default)
        elif word == "FROM":
            image, _, name = rest.partition(" AS ")
            image = re.sub(r"\$\{(\w+)\}", lambda match: known[match[1]], image)
            if not IMAGE.fullmatch(image):
                raise ValueError(f"no image with a tag: {image}")
            current = found[name or str(len(found))] = [(word, image)]
        elif current is None:
            raise ValueError(f"{word} before FROM")
        else:
            if word == "ENTRYPOINT" and not all(isinstance(part, str) for part in json.loads(rest)):
                raise ValueError(f"no list of words: {rest}")
            current.append((word, rest))
    return found


def copied(stage: list[tuple[str, str]]) -> Iterator[tuple[str | None, list[str], str]]:
    """(stage copied from, or None for the context; sources; target) of every COPY."""
    for word, rest in stage:
        if word == "COPY":
            words = rest.split()
            origin = words.pop(0).removeprefix("--from=") if words[0].startswith("--from=") else None
            yield origin, words[:-1], words[-1]


def in_context(ignore: Path) -> set[str]:
    """Names at the top of the context that a .dockerignore of the form `*`, then `!name`, leaves in."""
    lines = [line for line in ignore.read_text().splitlines() if line and not line.startswith("#")]
    if lines[0] != "*":
        raise ValueError(f"{ignore} does not begin with *")
    return {line[1:] for line in lines if line.startswith("!")}
