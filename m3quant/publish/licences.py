"""Under which licence an output may be published: decided by the base repo and its licence text, never by default."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..checkpoint import sha256_file
from ..checkpoint.bounded import TEXT_BYTES, parse_yaml, read_bounded
from ..checkpoint.links import require_regular
from ..checkpoint.strict_json import described
from ..errors import OptionError, PublishError
from .base import Base
from .files import LICENCE_FILE

DATA = "licences.yaml"


@dataclass(frozen=True)
class GivenLicence:
    """What the user says of the licence: a file with its text, and for a base that m3quant does not know, its Hub identifier."""

    file: Path | None = None
    identifier: str | None = None  # as the Hub's `license` field has it: apache-2.0, other, ...
    name: str | None = None  # the Hub's `license_name`, with identifier other


@dataclass(frozen=True)
class Licence:
    """The licence of an output. file: its name in the output; sha256: of its bytes; carried: whether the base had the file.

    identifier, name: the Hub's `license` and `license_name`. notice: a sentence that NOTICE must hold. built_with: words to
    show on the card. key is None for a licence that m3quant's data does not know.
    """

    key: str | None
    title: str
    identifier: str
    name: str | None
    file: str
    sha256: str
    carried: bool
    non_commercial: bool = False
    built_with: str | None = None
    notice: str | None = None
    obligations: tuple[str, ...] = ()
    prohibited: tuple[str, ...] = ()
    source: str | None = None
    second_hand: bool = False


@cache
def data() -> dict[str, Any]:
    """licences.yaml, parsed."""
    text = importlib.resources.files(__package__).joinpath(DATA).read_text(encoding="utf-8")
    parsed: dict[str, Any] = parse_yaml(text, DATA)
    return parsed


def licence_files(folder: Path) -> list[Path]:
    """Licence texts at the top of a folder, the one for the model before the others. Raises PublishError for a link."""
    found = [require_regular(folder, p.name, PublishError) for p in folder.iterdir() if LICENCE_FILE.fullmatch(p.name)]
    return sorted(found, key=lambda p: ("MODEL" not in p.name.upper(), len(p.name), p.name))


def recognise(text: str) -> tuple[str, str | None] | None:
    """(key, words to display) of the MiniMax licence that a text is, or None."""
    flat = _flat(text)
    for key, entry in data()["licences"].items():
        matches = [re.search(pattern, flat, re.IGNORECASE) for pattern in entry["recognise"]]
        if all(matches) and not any(re.search(p, flat, re.IGNORECASE) for p in entry.get("reject", ())):
            named = [m["display"] for m in matches if m and "display" in m.re.groupindex]
            return key, named[0] if named else None
    return None


def check_given(given: GivenLicence) -> None:
    """Raise OptionError for words on a licence that no base could make right."""
    common = data()["common"]
    if given.identifier == "other":
        if not given.name:
            raise OptionError("--licence-id other needs --licence-name NAME, the Hub's license_name of the base.")
    elif given.identifier is not None and given.identifier not in common:
        raise OptionError(
            f"--licence-id {given.identifier}: m3quant can compare a text with {', '.join(common)}; for others give other and --licence-name."
        )
    elif given.name is not None:
        raise OptionError(f"--licence-name {given.name} goes with --licence-id other: give both, or leave it out.")
    if given.file is not None:
        _given_text(given.file)


def _given_text(file: Path) -> bytes:
    try:
        content = read_bounded(file, TEXT_BYTES, error=OptionError, follow=True)
    except OptionError as error:
        raise OptionError(f"--licence-file: {error}") from None
    if not content.strip():
        raise OptionError(f"--licence-file {file} is empty: give the licence text of the base.")
    return content


def resolve_licence(
    out: Path, manifest: Mapping[str, Any], config: Mapping[str, Any], base: Base, given: GivenLicence
) -> Licence:
    """The licence of `out`, whose base is `base`. Copies `given.file` into it as LICENSE where the base had none.

    Raises OptionError for words that cannot be right; PublishError: no licence text, a text that is not this base's, a base
    card or config.json that says another, or a base that m3quant does not know without what the user must then supply.
    """
    check_given(given)
    known = {name.lower(): facts for name, facts in data()["bases"].items()}.get(base.repo.lower())
    if known and config.get("model_type") != known["model_type"]:
        raise PublishError(
            f"{base.repo} is a {known['model_type']}, but this checkpoint is a {config.get('model_type')}: give the base it was made from."
        )
    if given.file:
        supply(out, given.file)
    texts = licence_files(out)
    if not texts:
        raise PublishError(_missing(base))
    for path in texts:
        if (found := recognise(_text(path))) is not None:
            break
    else:
        path, found = texts[0], None
    _check_untouched(path, manifest)
    if known and (found is None or found[0] not in known["licences"]):
        titles = " or the ".join(data()["licences"][key]["title"] for key in known["licences"])
        what = f"the {data()['licences'][found[0]]['title']}" if found else "none that m3quant knows"
        raise PublishError(
            f"{path.name} should be the {titles}, which {base.repo} carries, but is {what}: take the licence from {base.url}."
        )
    licence = _known(found[0], found[1], path, manifest) if found else _custom(path, manifest, base, given)
    _check_statements(licence, manifest, config, base)
    return licence


def supply(out: Path, file: Path) -> None:
    """Copy a licence text into an output that has none. Raises OptionError for another one there, or an unreadable file."""
    content = _given_text(file)
    present = licence_files(out)
    if any(read_bounded(p, TEXT_BYTES, error=PublishError) == content for p in present):
        return
    if present:
        raise OptionError(
            f"{out / present[0].name} is there already and differs from --licence-file {file}: leave the option out."
        )
    (out / "LICENSE").write_bytes(content)


def obligations(licence: Licence, base: Base) -> list[str]:
    """What publishing requires of the user, in plain sentences, the most important first."""
    lines = [
        f"{base.repo} is under the {licence.title} ({licence.file}). Read it: what follows is a summary, not the licence."
    ]
    if licence.non_commercial:
        lines.append("It restricts COMMERCIAL USE.")
    lines += licence.obligations
    if licence.key is None:
        lines.append(
            "You name this licence, and m3quant has no summary of it. Weights that derive from MiniMax's are under MiniMax's too."
        )
    if licence.prohibited:
        lines.append(f"Prohibited: {'; '.join(licence.prohibited)}.")
    if licence.second_hand:
        lines.append(f"This summary was not made from the whole licence text (source: {licence.source}).")
    if not licence.carried:
        lines.append(
            f"The base carried no licence file; {licence.file} was supplied by you: compare it with {base.url}."
        )
    return lines


def _text(path: Path) -> str:
    return read_bounded(path, TEXT_BYTES, error=PublishError).decode("utf-8", errors="replace")


def _flat(text: str) -> str:
    """One space between words, straight quotation marks."""
    return " ".join(re.sub("[\u201c\u201d]", '"', re.sub("[\u2018\u2019]", "'", text)).split())


def _missing(base: Base) -> str:
    texts = {name.lower(): url for name, url in data()["texts"].items()}
    where = texts.get(base.repo.lower(), base.url)
    return f"the source carries no licence file: take the licence of {base.repo} from {where} and give it with --licence-file FILE."


def _check_untouched(path: Path, manifest: Mapping[str, Any]) -> None:
    facts = manifest["source"].get("files", {}).get(path.name)
    if facts and sha256_file(path) != facts["sha256"]:
        raise PublishError(f"{path} is not the file that the source carried: copy it from the source byte for byte.")
    if facts and facts["as_on_hub"] is False:
        raise PublishError(
            f"{path.name} of the source was changed after its download: download it again and convert again."
        )


def _known(key: str, display: str | None, path: Path, manifest: Mapping[str, Any]) -> Licence:
    entry = data()["licences"][key]
    card_name = (manifest["source"].get("card") or {}).get("license_name")
    return Licence(
        key=key,
        title=entry["title"],
        identifier="other",
        name=card_name if card_name in entry["card_names"] else entry["name"],
        file=path.name,
        sha256=sha256_file(path),
        carried=path.name in manifest["source"].get("files", {}),
        non_commercial=entry["non_commercial"],
        built_with=entry.get("built_with"),
        notice=entry.get("notice"),
        obligations=tuple(o.format(display=display) for o in entry["obligations"]),
        prohibited=tuple(entry.get("prohibited", ())),
        source=entry["source"],
        second_hand=entry["second_hand"],
    )


def _custom(path: Path, manifest: Mapping[str, Any], base: Base, given: GivenLicence) -> Licence:
    """A licence that m3quant does not know, of a base that it does not know either: the user must name it."""
    if given.identifier is None:
        raise PublishError(
            f"m3quant does not know the licence of {base.repo} ({path.name}): name it with --licence-id, as the Hub does "
            "(apache-2.0, mit, ...), or with --licence-id other --licence-name NAME."
        )
    patterns = data()["common"].get(given.identifier, ())  # "other" has none
    if not all(re.search(p, _flat(_text(path)), re.IGNORECASE) for p in patterns):
        raise PublishError(f"{path.name} does not read like {given.identifier}: give the licence that the base has.")
    return Licence(
        key=None,
        title=f"{given.name or given.identifier} licence",
        identifier=given.identifier,
        name=given.name if given.identifier == "other" else None,
        file=path.name,
        sha256=sha256_file(path),
        carried=path.name in manifest["source"].get("files", {}),
    )


def _check_statements(licence: Licence, manifest: Mapping[str, Any], config: Mapping[str, Any], base: Base) -> None:
    for where, facts in _statements(manifest, config):
        stated, name = facts.get("license"), facts.get("license_name")
        entry = data()["licences"].get(
            licence.key, {"card_license": [licence.identifier], "card_names": [licence.name]}
        )
        others = {n for key, e in data()["licences"].items() if key != licence.key for n in e["card_names"]}
        wrong_name = name is not None and name not in entry["card_names"] and (licence.key is None or name in others)
        if (stated is not None and stated not in entry["card_license"]) or wrong_name:
            raise PublishError(
                f"{where} of {base.repo} says {' '.join(str(x) for x in (stated, name) if x)}, but {licence.file} is the "
                f"{licence.title}: find out which holds before you publish."
            )


def _statements(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(what says it, its words on the licence)."""
    for where, facts in (("the model card", manifest["source"].get("card") or {}), ("config.json", config)):
        stated = {key: facts[key] for key in ("license", "license_name") if facts.get(key) is not None}
        if odd := [key for key, value in stated.items() if not isinstance(value, str)]:
            raise PublishError(f"{where} states {odd[0]} as {described(stated[odd[0]])}, which is no text: correct it.")
        yield where, stated
