"""Hostile checkpoints through the real commands: refused before the first weight is read, or carried without harm."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from m3quant import cli
from m3quant.checkpoint import Checkpoint, write_json_atomic
from tests.support import hostile
from tests.support.convert.common import config_of, files, make_source

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def m3quant(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The program in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["m3quant", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(end.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("hostile") / "m3", "m3")


@pytest.fixture
def source(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "source"))


def refuses(m3quant: Run, source: Path, out: Path, *words: str) -> None:
    code, _, err = m3quant("convert", source, out, "--to", "int4")
    assert code == 2 and [word for word in words if word not in err] == [], err
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("kind", ["aliases", "an alias in its own anchor", "merged mappings", "size"])
def test_metadata_of_a_card_that_expands(kind: str, source: Path, m3quant: Run, tmp_path: Path) -> None:
    (source / "README.md").write_text(f"---\n{hostile.YAML[kind]()}---\n# A model\n", encoding="utf-8")
    refuses(m3quant, source, tmp_path / "out", "README.md", "metadata")


@pytest.mark.parametrize("value", ["{a: b}", "[[mit]]", "x" * 5000, "[" + "mit, " * 5000 + "]"])
def test_metadata_that_is_no_text(value: str, source: Path, m3quant: Run, tmp_path: Path) -> None:
    (source / "README.md").write_text(f"---\nlicense: {value}\n---\n", encoding="utf-8")
    refuses(m3quant, source, tmp_path / "out", "README.md", "'license' of its metadata")


def test_a_card_of_gigabytes(source: Path, m3quant: Run, tmp_path: Path) -> None:
    hostile.sparse(source / "README.md", 3 * 2**30, b"---\nlicense: mit\n---\n")
    refuses(m3quant, source, tmp_path / "out", "README.md", "3,221,225,472 bytes")


def test_a_link_out_of_the_source(source: Path, m3quant: Run, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a secret")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    refuses(m3quant, source, tmp_path / "out", "notes.txt", "is a link to")


def test_odd_but_harmless_cards_are_recorded(source: Path, m3quant: Run, tmp_path: Path) -> None:
    for text, card in {
        "no block": {},
        "---\nlicense: [mit, other]\nlanguage: 2024-01-01\n---\n": {
            "license": ["mit", "other"],
            "language": "2024-01-01",
        },
        "---\nlicense: .nan\n---\n": {"license": "nan"},
        "---\n- a\n---\n": {},
    }.items():
        (source / "README.md").write_text(text, encoding="utf-8")
        from m3quant.artifact.source_record import card_facts

        assert card_facts(Checkpoint.open(source)) == card
    (source / "README.md").write_text("---\nlicense: [\n---\n", encoding="utf-8")
    assert m3quant("convert", source, tmp_path / "out", "--to", "int4")[0] == 0
    from m3quant.artifact.output import read_manifest

    assert "is not YAML" in read_manifest(tmp_path / "out")["source"]["card"]["unreadable"]


def test_a_source_in_the_hubs_cache_converts_and_its_links_become_files(
    source: Path, m3quant: Run, tmp_path: Path
) -> None:
    (source / "notes.txt").write_text("text")
    snapshot = hostile.cached(source, tmp_path / "hub")
    out = tmp_path / "out"
    assert m3quant("convert", snapshot, out, "--to", "int4")[0] == 0
    assert files(out)["notes.txt"] == b"text" and not [p for p in out.rglob("*") if p.is_symlink()]
    (out / "m3quant-report").mkdir(exist_ok=True)
    assert m3quant("verify", out)[0] == 0


@pytest.mark.parametrize(
    "name", ["LICENSE.other", "notes.txt", "recipe.yaml", "m3quant.json", "README.md", "eval.json"]
)
def test_a_link_in_an_output_is_not_followed(name: str, source: Path, m3quant: Run, tmp_path: Path) -> None:
    (source / "notes.txt").write_text("text")
    out = tmp_path / "out"
    assert m3quant("convert", source, out, "--to", "int4")[0] == 0
    aside = tmp_path / "aside"
    aside.write_bytes((out / name).read_bytes() if (out / name).exists() else b"a secret")
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(aside)
    for command in (["verify", out], ["card", out, "--check"], ["publish", out, "org/name", "--dry-run"]):
        code, _, err = m3quant(*command)
        assert code in (1, 2) and name in err and "is a link to" in err, (command, err)
    assert (out / name).is_symlink() and aside.exists()


@pytest.mark.parametrize("listed", ["../aside", "/etc/hostname", "a/../../aside"])
def test_a_manifest_that_lists_files_outside(listed: str, source: Path, m3quant: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert m3quant("convert", source, out, "--to", "int4")[0] == 0
    (tmp_path / "aside").write_text("a secret")
    from m3quant.artifact.output import read_manifest
    from m3quant.publish.files import files_to_publish

    manifest = read_manifest(out)
    for key in ("files", "shards"):
        changed = {
            **manifest,
            key: {**manifest[key], listed: "0" * 64 if key == "files" else {"size": 8, "sha256": "0" * 64}},
        }
        with pytest.raises(Exception, match="no name of a file in it"):
            files_to_publish(out, changed)
        write_json_atomic(out / "m3quant.json", changed)
        code, out_text, err = m3quant("verify", out)
        assert code == 1 and ("no name of a file in it" in out_text or f"'{listed}' is missing" in out_text), err


def test_what_lies_in_a_linked_report_folder_is_not_sent(source: Path, m3quant: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert m3quant("convert", source, out, "--to", "int4")[0] == 0
    from m3quant.artifact.output import read_manifest
    from m3quant.errors import PublishError
    from m3quant.publish.files import files_to_publish

    (tmp_path / "aside").mkdir()
    (tmp_path / "aside" / "page.html").write_text("a secret")
    for folder in ("m3quant-report", ".eval_results"):
        (out / folder).symlink_to(tmp_path / "aside")
        with pytest.raises(PublishError, match=rf"{folder} is a link to"):
            files_to_publish(out, read_manifest(out))
        (out / folder).unlink()
        (out / folder).mkdir()
        (out / folder / "page.html").symlink_to(tmp_path / "aside" / "page.html")
        with pytest.raises(PublishError, match=r"page\.html is a link to"):
            files_to_publish(out, read_manifest(out))
        shutil.rmtree(out / folder)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("vision_config", "num_hidden_layers", 10**9), ("vision_config", "num_hidden_layers", 1000),
     ("text_config", "num_local_experts", 8000), ("text_config", "num_hidden_layers", 1000)],
)  # fmt: skip
def test_counts_far_above_what_the_headers_hold(
    part: str, key: str, value: int, source: Path, m3quant: Run, tmp_path: Path
) -> None:
    config = config_of(source)
    config[part][key] = value
    if part == "text_config" and key == "num_hidden_layers":
        for lists in (config[part], config[part].get("sparse_attention_config") or {}):
            for name in ("moe_layer_freq", "sparse_attention_freq"):
                if name in lists:
                    lists[name] = [1] * value
    write_json_atomic(source / "config.json", config)
    for command in (["plan", source], ["convert", source, tmp_path / "out", "--to", "int4"]):
        code, _, err = m3quant(*command)
        assert code == 2 and (key in err or "an entry for each layer" in err), err
