"""The licence gate: which licence holds is decided by base and text, and everything doubtful is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from m3quant.errors import OptionError, PublishError
from m3quant.publish.base import Base, resolve_base
from m3quant.publish.licences import GivenLicence, Licence, data, obligations, recognise, resolve_licence
from tests.support.publish.outputs import COMMIT, TEXTS

TYPES = {"MiniMaxAI/MiniMax-M3": "minimax_m3_vl"}


def manifest(**source: Any) -> dict[str, Any]:
    return {"source": {"repo": None, "revision": COMMIT, "files": {}, "card": None, **source}, "files": {}}


def resolved(
    folder: Path,
    base: str,
    text: str | None = None,
    given: GivenLicence | None = None,
    card: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    file: str = "LICENSE",
) -> Licence:
    if text is not None:
        (folder / file).write_text(text, encoding="utf-8")
    config = {"model_type": TYPES.get(base, "minimax_m2"), **(config or {})}
    return resolve_licence(folder, manifest(card=card), config, Base(base, COMMIT, True), given or GivenLicence())


@pytest.mark.parametrize("base", sorted(TEXTS))
def test_every_release_is_known_by_its_licence(base: str, tmp_path: Path) -> None:
    licence = resolved(tmp_path, base, TEXTS[base])
    assert licence.identifier == "other" and licence.name and licence.source
    stated = obligations(licence, Base(base, COMMIT, True))
    assert base in stated[0] and len(stated) > 2


@pytest.mark.parametrize("base", sorted(TEXTS))
@pytest.mark.parametrize("other", sorted(TEXTS))
def test_the_licence_of_another_release_is_refused(base: str, other: str, tmp_path: Path) -> None:
    allowed = data()["bases"][base]["licences"]
    found = recognise(TEXTS[other])
    assert found is not None
    if found[0] in allowed:
        resolved(tmp_path, base, TEXTS[other])
    else:
        with pytest.raises(PublishError, match="should be the"):
            resolved(tmp_path, base, TEXTS[other])


def test_m2_names_the_words_and_thresholds(tmp_path: Path) -> None:
    stated = obligations(
        resolved(tmp_path, "MiniMaxAI/MiniMax-M2", TEXTS["MiniMaxAI/MiniMax-M2"]), Base("a/b", COMMIT, True)
    )
    assert any("100 million" in line and "US$30 million" in line and '"MiniMax M2"' in line for line in stated)
    assert not any("COMMERCIAL USE" in line for line in stated)


def test_m2_1_shows_the_words_of_its_own_text(tmp_path: Path) -> None:
    licence = resolved(tmp_path, "MiniMaxAI/MiniMax-M2.1", TEXTS["MiniMaxAI/MiniMax-M2.1"])
    assert any('"MiniMax M2.1"' in line for line in licence.obligations)


def test_m2_5_needs_its_notice_sentence_and_change_notices(tmp_path: Path) -> None:
    licence = resolved(tmp_path, "MiniMaxAI/MiniMax-M2.5", TEXTS["MiniMaxAI/MiniMax-M2.5"])
    assert licence.notice and licence.notice.startswith("MiniMax AI model is licensed under the MiniMax Model License")
    assert any("changed" in line for line in licence.obligations) and licence.prohibited


def test_m2_5_at_its_first_revisions_had_a_modified_mit_licence(tmp_path: Path) -> None:
    text = (
        "MIT License\nCopyright 2025 MiniMax AI.\nOur only modification is that, if it is used for any of your commercial\n"
        "products or services, you shall prominently\ndisplay “MiniMax M2.5” there.\n"
    )
    licence = resolved(tmp_path, "MiniMaxAI/MiniMax-M2.5", text)
    assert licence.name == "modified-mit" and licence.notice is None
    assert any('"MiniMax M2.5"' in line for line in licence.obligations)


def test_m2_5_takes_the_model_licence_before_the_code_licence(tmp_path: Path) -> None:
    (tmp_path / "LICENSE-CODE").write_text("MIT License\nCopyright 2025 MiniMax AI.\n", encoding="utf-8")
    licence = resolved(tmp_path, "MiniMaxAI/MiniMax-M2.5", TEXTS["MiniMaxAI/MiniMax-M2.5"], file="LICENSE-MODEL")
    assert licence.file == "LICENSE-MODEL"


def test_m2_7_is_non_commercial(tmp_path: Path) -> None:
    licence = resolved(tmp_path, "MiniMaxAI/MiniMax-M2.7", TEXTS["MiniMaxAI/MiniMax-M2.7"])
    assert licence.non_commercial and any("military" in line for line in licence.prohibited)
    assert any("authorization" in line and "hosted service" in line for line in licence.obligations)


def test_m3_is_built_with_and_second_hand(tmp_path: Path) -> None:
    licence = resolved(tmp_path, "MiniMaxAI/MiniMax-M3", TEXTS["MiniMaxAI/MiniMax-M3"])
    assert licence.built_with == "Built with MiniMax M3" and licence.non_commercial and licence.second_hand
    assert any("US$20 million" in line for line in licence.obligations)
    assert any("not made from the whole licence" in line for line in obligations(licence, Base("a/b", COMMIT, True)))


def test_no_licence_text_is_refused_with_where_to_find_it(tmp_path: Path) -> None:
    with pytest.raises(
        PublishError, match=r"carries no licence file.*github.com/MiniMax-AI/MiniMax-M2/.*--licence-file"
    ):
        resolved(tmp_path, "MiniMaxAI/MiniMax-M2")


def test_a_supplied_licence_is_copied_byte_for_byte_and_said_to_be_supplied(tmp_path: Path) -> None:
    text = tmp_path / "from-github.txt"
    text.write_bytes(TEXTS["MiniMaxAI/MiniMax-M2"].encode().replace(b"\n", b"\r\n"))
    out = tmp_path / "out"
    out.mkdir()
    licence = resolved(out, "MiniMaxAI/MiniMax-M2", given=GivenLicence(text))
    assert (out / "LICENSE").read_bytes() == text.read_bytes() and not licence.carried
    assert any("supplied by you" in line for line in obligations(licence, Base("a/b", COMMIT, True)))


def test_a_supplied_licence_of_another_release_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "wrong"
    text.write_text("Permission is hereby granted, free of charge, to everyone.\n", encoding="utf-8")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(PublishError, match="none that m3quant knows"):
        resolved(out, "MiniMaxAI/MiniMax-M3", given=GivenLicence(text))


@pytest.mark.parametrize(
    "card",
    [{"license": "mit"}, {"license": "apache-2.0"}, {"license": "other", "license_name": "modified-mit"}],
)
def test_a_base_card_that_says_another_licence_is_refused(card: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="the model card of MiniMaxAI/MiniMax-M3 says"):
        resolved(tmp_path, "MiniMaxAI/MiniMax-M3", TEXTS["MiniMaxAI/MiniMax-M3"], card=card)


def test_a_config_that_says_another_licence_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match=r"config.json of .* says apache-2.0"):
        resolved(tmp_path, "MiniMaxAI/MiniMax-M3", TEXTS["MiniMaxAI/MiniMax-M3"], config={"license": "apache-2.0"})


def test_the_wrong_architecture_for_a_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="is a minimax_m3_vl, but this checkpoint is a minimax_m2"):
        resolved(tmp_path, "MiniMaxAI/MiniMax-M3", TEXTS["MiniMaxAI/MiniMax-M3"], config={"model_type": "minimax_m2"})


def test_an_unknown_base_has_no_default(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="--licence-id"):
        resolved(tmp_path, "someone/tiny", "Apache License\nVersion 2.0\n")
    licence = resolved(tmp_path, "someone/tiny", given=GivenLicence(identifier="apache-2.0"))
    assert (licence.identifier, licence.name) == ("apache-2.0", None)


def test_an_unknown_base_must_agree_with_its_text_and_card(tmp_path: Path) -> None:
    text = "Apache License\nVersion 2.0\n"
    with pytest.raises(PublishError, match="does not read like mit"):
        resolved(tmp_path, "someone/tiny", text, GivenLicence(identifier="mit"))
    with pytest.raises(OptionError, match="needs --licence-name"):
        resolved(tmp_path, "someone/tiny", text, GivenLicence(identifier="other"))
    with pytest.raises(OptionError, match="can compare a text with"):
        resolved(tmp_path, "someone/tiny", text, GivenLicence(identifier="wtfpl"))
    with pytest.raises(PublishError, match="the model card of someone/tiny says mit"):
        resolved(tmp_path, "someone/tiny", text, GivenLicence(identifier="apache-2.0"), card={"license": "mit"})


def test_a_derivative_of_a_minimax_model_keeps_its_licence(tmp_path: Path) -> None:
    licence = resolved(
        tmp_path, "someone/M3-tuned", TEXTS["MiniMaxAI/MiniMax-M3"], config={"model_type": "minimax_m3_vl"}
    )
    assert licence.key == "minimax-community" and licence.built_with


def test_a_licence_that_was_changed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text(TEXTS["MiniMaxAI/MiniMax-M3"], encoding="utf-8")
    config = {"model_type": "minimax_m3_vl"}
    base = Base("MiniMaxAI/MiniMax-M3", COMMIT, True)
    after = manifest(files={"LICENSE": {"size": 1, "sha256": "0" * 64, "as_on_hub": True}})
    with pytest.raises(PublishError, match="is not the file that the source carried"):
        resolve_licence(tmp_path, after, config, base, GivenLicence())
    from m3quant.checkpoint import sha256_file

    before = manifest(files={"LICENSE": {"size": 1, "sha256": sha256_file(tmp_path / "LICENSE"), "as_on_hub": False}})
    with pytest.raises(PublishError, match="changed after its download"):
        resolve_licence(tmp_path, before, config, base, GivenLicence())


OTHER = "f" * 40


@pytest.mark.parametrize(
    ("recorded", "given", "refusal"),
    [
        ((None, None), (None, None), "the base model is unknown.*--base-repo"),
        ((None, None), ("a/b", None), "the revision of a/b is unknown.*--base-revision"),
        ((None, COMMIT), ("nonsense", None), "is no Hub repo"),
        ((None, None), ("a/b", "main"), "branches and tags move"),
        ((None, COMMIT), ("a/b", OTHER), "the download recorded"),
        (("a/c", COMMIT), ("a/b", None), "the source came from a/c"),
    ],
)
def test_a_base_is_never_guessed(
    recorded: tuple[str | None, str | None], given: tuple[str | None, str | None], refusal: str
) -> None:
    kind = PublishError if "unknown" in refusal else OptionError  # not known yet, or wrong
    with pytest.raises(kind, match=refusal):
        resolve_base(manifest(repo=recorded[0], revision=recorded[1]), *given)


def test_a_base_recorded_by_its_download_needs_no_option() -> None:
    assert resolve_base(manifest(repo="a/b"), None, None) == Base("a/b", COMMIT, True)
    assert resolve_base(manifest(revision=None), "a/b", OTHER) == Base("a/b", OTHER, False)
