"""m3quant fit and convert --budget on the command line: answers, files, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from m3quant.planning import choices
from tests.support.cli.shell import Shell
from tests.support.convert.common import add_tokenizer, make_source
from tests.support.paths import DATA, FIXTURES

TINY_M3 = FIXTURES / "tiny-m3"
M3 = DATA / "minimax-m3" / "config.json"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few candidates, for measuring in seconds."""
    monkeypatch.setattr(choices, "BULK_CANDIDATES", ("int2-g128-asym", "int4-g128"))
    monkeypatch.setattr(choices, "OTHER_CANDIDATES", ("int8-g128",))


def test_a_budget_by_bytes_alone(shell: Shell, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    done = shell("fit", TINY_M3, "--budget", "8MB", "--recipe-out", recipe, "--json")
    assert done.code == 0, done.err
    chosen = done.json["chosen"]
    assert chosen["output_bytes"] <= 8_000_000 and chosen["predicted_kl"] is None
    assert "no sensitivity was measured" in done.json["rule"]
    document = yaml.safe_load(recipe.read_text())
    assert document == chosen["recipe"] and document["rounding"] == "feedback" and document["layers"]
    planned = shell("plan", TINY_M3, "--recipe", recipe, "--json").json
    assert planned["output_bytes"] == chosen["output_bytes"]
    shown = shell("fit", TINY_M3, "--budget", "8MB").out
    assert "bytes alone" in shown and "of 8,000,000 allowed" in shown


def test_a_budget_below_the_least_says_what_is_missing_and_where_it_would_fit(shell: Shell) -> None:
    said = shell.refuses("fit", TINY_M3, "--budget", "5MB")
    assert "bytes are missing" in said and "1xH200" in said
    least = int(said.split(" bytes (")[0].split()[-1].replace(",", ""))
    assert f"{least - 5_000_000:,} bytes are missing" in said
    assert shell("fit", TINY_M3, "--budget", least).code == 0
    assert "so that 1 bytes are missing" in shell.refuses("fit", TINY_M3, "--budget", least - 1)


def test_a_node_from_config_json_alone(shell: Shell) -> None:
    done = shell("fit", M3, "--on", "1xH200", "--context", "131072", "--kv-dtype", "fp8", "--json")
    assert done.code == 0, done.err
    chosen = done.json["chosen"]
    assert chosen["longest_context"] >= 131_072 and chosen["node"] == "1xH200"
    assert {own.get("routed_experts", "int2-g128-asym") for own in chosen["layers"]} == {"int2-g128-asym"}
    assert len({own["attention"] for own in chosen["layers"]}) == 2  # no room for eight bits in every layer
    assert "on 1xA100" not in done.err


def test_a_node_with_a_release_of_the_engine(shell: Shell, tmp_path: Path) -> None:
    m27, recipe = DATA / "minimax-m2.7" / "config.json", tmp_path / "r.yaml"
    asked = ("fit", m27, "--on", "1xH200", "--kv-dtype", "fp8", "--json")
    newest, older = shell(*asked).json, shell(*asked, "--engine-release", "0.31.0", "--recipe-out", recipe).json
    assert (newest["chosen"]["engine_release"], older["chosen"]["engine_release"]) == (None, "0.31.0")
    assert older["chosen"]["output_bytes"] < newest["chosen"]["output_bytes"], "0.31 keeps more memory for itself"
    assert "# For 1xH200: 1 x 32,768 tokens of fp8 cache in vLLM 0.31.0.\n" in recipe.read_text()
    planned = shell(
        "plan", m27, "--recipe", recipe, *asked[2:], "--engine-release", "0.31.0", "--context", "32768"
    ).json
    assert planned["fits"] and planned["pool_tokens"]["low"] == older["chosen"]["pool_tokens"]


def test_what_a_release_does_not_read_is_not_chosen(shell: Shell) -> None:
    asked = ("fit", M3, "--on", "4xH100", "--kv-dtype", "fp8")
    found = shell(*asked, "--engine-release", "0.26.0", "--json").json
    experts = {own["routed_experts"] for own in found["chosen"]["layers"] if "routed_experts" in own}
    assert experts == {"int4-g32", "int8-g128"}
    refused = {one["scheme"]: one["why"] for one in found["refused"]}
    assert "int2-g128-asym" in refused and "0.26.0 does not read it, 0.29.0 is the first" in refused["int6-g128"]
    unknown = shell(*asked, "--engine-release", "0.99", "--json").json["chosen"]
    assert any("vLLM 0.99 is outside the releases" in note for note in unknown["notes"])
    assert "0.24.0 is the first that does" in shell.refuses(*asked, "--engine-release", "0.20.0", code=3)
    for text in ("newest", "9" * 5000):  # more digits than Python makes a number of
        assert f"--engine-release '{text[:40]}' is no version" in shell.refuses(*asked, "--engine-release", text)
    small = shell.refuses("fit", DATA / "minimax-m2.7" / "config.json", "--on", "1xH100", "--kv-dtype", "fp8", "--engine-release", "0.26.0", code=3)  # fmt: skip
    assert (
        "Not tried: routed_experts int2-g128-asym, " in small
        and "0.26.0 does not read it, 0.29.0 is the first" in small
    )
    assert "--engine-release says how a node serves: add --on NODE" in shell.refuses(
        "fit", M3, "--engine-release", "0.26.0"
    )


def test_what_cannot_be_asked_is_refused_with_a_sentence(shell: Shell, tmp_path: Path) -> None:
    assert "give one" in shell.refuses("fit", TINY_M3, "--budget", "8MB", "--on", "1xH200")
    assert "add --on NODE" in shell.refuses("fit", TINY_M3, "--budget", "8MB", "--context", "4096")
    assert "no size" in shell.refuses("fit", TINY_M3, "--budget", "8 apples")
    assert "config.json allows 8,192 tokens" in shell.refuses("fit", TINY_M3, "--on", "1xH200", "--context", "8193")
    assert "does not hold the smallest recipe" in shell.refuses(
        "fit", TINY_M3, "--on", "1x0.5GiB", "--context", "4096", code=3
    )
    assert "add --measure" in shell.refuses("fit", TINY_M3, "--windows", "4")
    assert "give --budget or --on" in shell.refuses("fit", TINY_M3, "--recipe-out", tmp_path / "r.yaml")
    assert "was not measured" in shell.refuses("fit", TINY_M3, "--budget", "8MB", "--chart", tmp_path / "c.html")
    assert "cannot be read" in shell.refuses("fit", TINY_M3, "--sensitivity", tmp_path / "none.json")
    assert "reads every weight" in shell.refuses("fit", M3, "--measure", "--sensitivity", tmp_path / "s.json")
    out = tmp_path / "out"
    assert "make the recipe" in shell.refuses("convert", TINY_M3, out, "--budget", "8MB", "--to", "awq")
    assert "give one" in shell.refuses("convert", TINY_M3, out, "--budget", "8MB", "--fit", "1xH200")
    assert "give --fit NODE" in shell.refuses("convert", TINY_M3, out, "--budget", "8MB", "--context", "4096")
    assert "about fitting" in shell.refuses("convert", TINY_M3, out, "--context", "4096")
    assert "bytes are missing" in shell.refuses("convert", TINY_M3, out, "--budget", "5MB")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("few")
def test_convert_measures_chooses_and_converts(shell: Shell, tmp_path: Path) -> None:
    source = add_tokenizer(make_source(tmp_path / "src", "m2", vocab_size=512))
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("A line of text that is long enough for a window.\n" * 400)
    sizes = [row["output_bytes"] for row in shell("fit", source, "--json").json["frontier"]]
    budget = (4 * sizes[0] + 6 * sizes[-1]) // 10
    more = ("--calibration", text, "--windows", 2, "--window-length", 64, "--min-expert-tokens", 4, "--device", "cpu")
    done = shell("convert", source, out, "--budget", budget, *more)
    assert done.code == 0, done.err
    assert "two passes over the weights" in done.err and "KL divergence: predicted" in done.out
    manifest = json.loads((out / "m3quant.json").read_text())
    assert manifest["output_bytes"] <= budget and manifest["recipe"]["name"] == "fit"
    experts = {
        manifest["recipe"]["schemes"]["routed_experts"],
        *(o["routed_experts"] for o in manifest["recipe"]["layers"].values()),
    }
    assert experts == {"int2-g128-asym", "int4-g128"}

    measured = tmp_path / "out.sensitivity.json"
    again = shell("convert", source, out, "--budget", budget, *more)  # reads the file, finds the output complete
    assert again.code == 0 and "already complete" in again.err and "two passes" not in again.err
    chart = tmp_path / "chart.html"
    asked = ("fit", source, "--sensitivity", measured, "--budget", budget, "--chart", chart)
    assert "predicted KL" in shell(*asked).out
    assert chart.read_text().count("<circle") >= 3
    found = shell(*asked, "--json").json
    assert found["chosen"]["recipe"]["schemes"] == manifest["recipe"]["schemes"]
    assert "with another text" in shell.refuses(*asked, "--calibration", "bundled")
    assert "another source" in shell.refuses("fit", TINY_M3, "--sensitivity", measured)
