"""What a checkpoint's licence asks of its user, in one line, said before money is spent. Read from its text, or known of its repo; never assumed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.bounded import TEXT_BYTES, read_bounded
from ..checkpoint.origin import origin_of
from ..errors import M3QuantError, PublishError
from .licences import data, licence_files, recognise


@dataclass(frozen=True)
class LicenceLine:
    """text: for a person. key: of licences.yaml, None where it is not known; non_commercial: None likewise."""

    text: str
    key: str | None = None
    non_commercial: bool | None = None

    def to_json(self) -> dict[str, Any]:
        return {"key": self.key, "non_commercial": self.non_commercial, "text": self.text}


def licence_line(root: str, model_type: str) -> LicenceLine:
    """Of a folder, a Hub repo, or a config.json alone, which tells an architecture and no licence."""
    folder = Path(root).expanduser()
    if not folder.is_dir():
        return _of_repo(root.partition("@")[0], model_type)
    try:
        files = licence_files(folder)
        texts = [read_bounded(path, TEXT_BYTES, error=PublishError).decode("utf-8", errors="replace") for path in files]
    except M3QuantError as error:  # to publish it this is refused; here it is told
        return LicenceLine(f"licence: not read: {error}")
    for path, text in zip(files, texts, strict=True):
        if found := recognise(text):
            return _known(found[0], path.name, found[1])
    if files:
        return LicenceLine(
            f"licence: {files[0].name} of {folder}, which m3quant does not know: read what it asks of you"
        )
    repo = origin_of(folder, ["config.json"]).repo
    if repo:
        return _of_repo(repo, model_type)
    return LicenceLine(f"licence: {folder} holds no licence file{_released(model_type)}")


def _of_repo(repo: str, model_type: str) -> LicenceLine:
    """By what is recorded of MiniMax's own repos; of any other nothing is known."""
    known = {name.lower(): facts for name, facts in data()["bases"].items()}.get(repo.lower())
    if known is None:
        what = "a config.json does not state it" if repo.endswith(".json") else f"not known of {repo}"
        return LicenceLine(f"licence: {what}{_released(model_type)}")
    if len(known["licences"]) > 1:
        titles = " or ".join(data()["licences"][key]["title"] for key in known["licences"])
        return LicenceLine(f"licence: {titles}, by the revision of {repo}: read its LICENSE")
    return _known(known["licences"][0], f"LICENSE of {repo}", None)


def _known(key: str, where: str, display: str | None) -> LicenceLine:
    entry = data()["licences"][key]
    asks = entry["summary"].format(display=display or "the model's name")
    return LicenceLine(
        f"licence: {entry['title']} ({where}): {asks}. A summary: read the text", key, entry["non_commercial"]
    )


def _released(model_type: str) -> str:
    """The end of a sentence: which releases of this architecture are for non-commercial use."""
    restricted = [
        name
        for name, facts in data()["bases"].items()
        if facts["model_type"] == model_type
        and any(data()["licences"][key]["non_commercial"] for key in facts["licences"])
    ]
    if not restricted:
        return ": find out what its base allows"
    verb = "restricts" if len(restricted) == 1 else "restrict"
    return f": find out what its base allows; {' and '.join(restricted)} {verb} commercial use"
