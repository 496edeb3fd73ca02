"""The card states what the output's files say, says what is missing, and is refused where a gate refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard

from m3quant.api.calibration_text import calibration_windows
from m3quant.artifact.conversion_eval import output_fingerprint
from m3quant.artifact.eval_record import Data, EvalRecord, Measured, Result
from m3quant.calibration.mixture import parse_mixture
from m3quant.checkpoint import Checkpoint
from m3quant.cli import cli
from m3quant.engines.drafts import Draft
from m3quant.errors import PublishError
from m3quant.evaluate.haystack import Reach
from m3quant.evaluate.metrics import by_position
from m3quant.evaluate.position import EDGES, PositionTask
from m3quant.evaluate.task import Predictions, ScoredSequence
from m3quant.publish.card import NOTES_BEGIN, check_metadata, scheme_text
from m3quant.publish.gates import Asked, Prepared, check, make_card, prepare
from m3quant.publish.licences import GivenLicence
from m3quant.runtime.serving_table import MeasuredSpeed
from tests.support.convert.common import make_plan_of
from tests.support.publish.outputs import COMMIT, TEXTS, converted, manifest_of, serving, source_like

BASE = "MiniMaxAI/MiniMax-M3"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source, output) of M3's fixture with its base's licence, card and download records; copied by `out`."""
    folder = tmp_path_factory.mktemp("made")
    source = source_like(folder / "m3")
    return source, converted(source, folder / "MiniMax-M3-int4")


@pytest.fixture
def out(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / made[1].name))


def asked(out: Path, **changes: Any) -> Asked:
    return Asked(**{"base_repo": BASE, "repo": "someone/MiniMax-M3-int4", "serving": serving(out), **changes})


def test_a_long_prefill_counts_as_tested_context(out: Path) -> None:
    """Buckets of positions reach as far as the window; those of a divergence may end beyond it."""
    nothing = Data(name="text", sha256="0" * 64)
    window = ScoredSequence(np.arange(3000), np.arange(1, 3000))
    said = [Predictions(np.ones(2999, np.float32), np.zeros(2999, np.int64), np.ones(2999, np.float32))]
    prefill = PositionTask("position", [window], EDGES, nothing, Reach(None, 0)).results(said, None)
    cells = by_position([window.scored], said, said)
    assert cells[-1]["stop"] > 3000
    close = Result(
        task="d", convention="kl-full-vocabulary-windows-3000", label="l", metrics={"kl_mean": 1.0}, cells=cells
    )
    record(out, [*prefill, close])
    text = make_card(out, asked(out)).card_path.read_text()
    assert "| longest context measured here | 3,000 tokens |" in text and "Not tested beyond 3,000 tokens" in text
    record(out, prefill)
    assert "Not tested beyond 3,000 tokens" in make_card(out, asked(out)).card_path.read_text()


def record(out: Path, results: list[Result], fingerprint: str | None = None) -> None:
    """Write eval.json of this output."""
    own = output_fingerprint(Checkpoint.open(out), manifest_of(out))
    measured = EvalRecord(
        m3quant="0",
        finished="2026-01-01T00:00:00+00:00",
        seconds=1.0,
        device="cpu",
        versions={},
        checkpoint=Measured(name="x", fingerprint=fingerprint or own),
        suite="quick",
        results=results,
    )
    (out / "eval.json").write_text(measured.model_dump_json(), encoding="utf-8")


DATA = Data(name="held-out text", sha256="ab" * 32)
PERPLEXITY = Result(
    task="perplexity",
    convention="gptq-windows-2048",
    label="perplexity, GPTQ/AWQ convention",
    data=DATA,
    tokens=2047,
    metrics={"perplexity": 11.34},
    source_metrics={"perplexity": 11.18},
)
NEEDLE = Result(
    task="needle",
    convention="greedy exact match, teacher-forced",
    label="needle grid",
    data=DATA,
    tokens=40,
    metrics={"accuracy": 0.975},
    cells=[{"length": 1024, "depth": 0.5}, {"length": 4096, "depth": 0.5}],
)


def test_prepare_gives_every_file_with_its_hash(out: Path, made: tuple[Path, Path]) -> None:
    (out / "scratch.txt").write_text("mine\n", encoding="utf-8")
    prepared = prepare(out, asked(out, source=str(made[0])))
    assert isinstance(prepared, Prepared) and prepared.not_sent == ["scratch.txt"]
    names = {f.path_in_repo for f in prepared.files}
    assert {"README.md", "LICENSE", "NOTICE", "SHA256SUMS", "m3quant.json", "recipe.yaml", "config.json"} <= names
    assert {f.path_in_repo for f in prepared.files if f.base_copy} == set(manifest_of(out)["source"]["files"]) - {
        "README.md"
    }  # type: ignore[index]
    sums = subprocess.run(
        ["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=out, capture_output=True, text=True, check=False
    )
    assert sums.returncode == 0, sums.stdout
    listed = {line.split("  ")[1] for line in (out / "SHA256SUMS").read_text(encoding="utf-8").splitlines()}
    assert listed == names - {"README.md", "SHA256SUMS"}


def test_the_metadata_names_base_licence_and_format(out: Path) -> None:
    record(out, [PERPLEXITY])
    text = prepare(out, asked(out)).card_path.read_text(encoding="utf-8")
    data = ModelCard(text).data
    facts = data.to_dict()
    assert facts["base_model"] == BASE and facts["base_model_relation"] == "quantized"
    assert (facts["license"], facts["license_name"], facts["license_link"]) == ("other", "minimax-community", "LICENSE")
    assert facts["pipeline_tag"] == "image-text-to-text" and {"compressed-tensors", "moe"} <= set(facts["tags"])
    assert data.eval_results and data.eval_results[0].metric_value == 11.34
    assert check_metadata(text, out) == []


def test_the_text_says_what_was_done(out: Path) -> None:
    text = prepare(out, asked(out)).card_path.read_text(encoding="utf-8")
    manifest: dict[str, Any] = manifest_of(out)
    assert COMMIT in text and "**Built with MiniMax M3.**" in text and "Commercial use is restricted" in text
    for row in manifest["roles"]:
        assert re.search(rf"\| {row['tensors']:,} \|", text)
    for facts in manifest["shards"].values():
        assert facts["sha256"] in text
    assert (out / "recipe.yaml").read_text(encoding="utf-8").strip() in text
    assert f"hf download {BASE} --revision {COMMIT}" in text
    for module in Checkpoint.open(out).config["quantization_config"]["ignore"]:
        assert f"`{module}`" in text
    assert str(out) not in text and str(out.parent) not in text


def test_serving_rows_name_the_repo_and_say_what_does_not_fit(out: Path) -> None:
    text = make_card(out, asked(out)).card_path.read_text(encoding="utf-8")
    assert "| 1xH100 | fp8 | does not fit: weights of 230.4 GB exceed 80 GB |" in text
    assert "| 2xH200 | fp8 | 800,000 | 800,000 |" in text
    assert (
        "vllm serve someone/MiniMax-M3-int4 --max-model-len 8192 --tool-call-parser minimax_m3 --kv-cache-dtype fp8"
        in text
    )
    assert "m3quant serve someone/MiniMax-M3-int4 --on 2xH200" in text


def test_speeds_are_shown_with_their_source_where_something_near_was_measured(out: Path) -> None:
    assert "tokens/s" not in make_card(out, asked(out)).card_path.read_text(encoding="utf-8")
    speeds = (
        MeasuredSpeed(1, 4096, 122.4, 146.6, ("vLLM 0.33.0, one day",)),
        MeasuredSpeed(16, 4096, 915.2, 1100.4, ("vLLM 0.33.0, one day", "another day")),
    )
    rows = [replace(row, speeds=speeds) if row.kv_dtype == "fp8" and row.fits else row for row in serving(out)]
    text = make_card(out, asked(out, serving=rows)).card_path.read_text(encoding="utf-8")
    assert "| 2xH200 | fp8 | 1 | 4,096 | 122 to 147 |\n| 2xH200 | fp8 | 16 | 4,096 | 915 to 1,100 |\n" in text
    assert text.count("- vLLM 0.33.0, one day\n") == 1 and "- another day\n" in text
    assert 'where the list below says "not on", another of the same chip' in text
    assert "On the smallest of them, 2xH200" in text


def test_without_an_evaluation_the_card_says_so(out: Path) -> None:
    text = make_card(out, asked(out)).card_path.read_text(encoding="utf-8")
    assert (
        "**Not measured by `m3quant eval`:** perplexity, KL divergence from the base" in text
        and "There is no eval.json." in text
    )
    assert "Not tested at any context length" in text and "model-index" not in text


def test_evaluations_are_shown_with_their_convention_and_reach(out: Path) -> None:
    record(
        out,
        [
            PERPLEXITY,
            NEEDLE,
            NEEDLE.model_copy(update={"metrics": {}, "not_run": "no prompt logprobs", "label": "multi-key"}),
        ],
    )
    text = make_card(out, asked(out)).card_path.read_text(encoding="utf-8")
    assert "| perplexity | 11.34 | 11.18 | +1.43% |" in text and "`gptq-windows-2048`" in text
    assert "| accuracy | 0.975 |" in text and "Not run: no prompt logprobs." in text
    assert "Not tested beyond 4,096 tokens of context, of the model's 8,192." in text
    assert (
        "**Not measured by `m3quant eval`:** KL divergence from the base, the noise floor of that divergence, perplexity by position."
        in text
    )


def test_figures_of_another_checkpoint_are_refused(out: Path) -> None:
    record(out, [PERPLEXITY], fingerprint="0" * 64)
    with pytest.raises(PublishError, match="measured another checkpoint"):
        make_card(out, asked(out))
    (out / "eval.json").write_text('{"results": 3}', encoding="utf-8")
    with pytest.raises(PublishError, match=r"eval.json cannot be read"):
        make_card(out, asked(out))


def test_notes_of_a_person_stay_and_a_foreign_card_is_never_overwritten(out: Path) -> None:
    card = make_card(out, asked(out)).card_path
    text = card.read_text(encoding="utf-8")
    card.write_text(text.replace(NOTES_BEGIN, f"{NOTES_BEGIN}\nRuns well on our two nodes."), encoding="utf-8")
    again = make_card(out, asked(out)).card_path.read_text(encoding="utf-8")
    assert again == text.replace(f"{NOTES_BEGIN}\n\n", f"{NOTES_BEGIN}\nRuns well on our two nodes.\n")
    card.write_text("# My own card\n", encoding="utf-8")
    with pytest.raises(PublishError, match="was not written by m3quant"):
        make_card(out, asked(out))


def test_an_unknown_base_is_stated_as_missing_and_refused_by_check(out: Path) -> None:
    written = make_card(out, asked(out, base_repo=None))
    text = written.card_path.read_text(encoding="utf-8")
    assert "**Its base model is not stated:**" in text and "Do not redistribute" in text
    assert "license" not in ModelCard(text).data.to_dict() and not (out / "NOTICE").exists()
    assert any("base model is unknown" in p for p in check(out, written, asked(out), lambda line: None).problems)
    with pytest.raises(PublishError, match="base model is unknown"):
        prepare(out, asked(out, base_repo=None))


def test_a_licence_that_was_carried_and_is_gone_is_refused(out: Path) -> None:
    (out / "LICENSE").unlink()
    refused(out, "LICENSE is missing")


def refused(out: Path, match: str, **changes: Any) -> None:
    with pytest.raises(PublishError, match=match) as caught:
        prepare(out, asked(out, **changes))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1


def test_a_damaged_shard_fails_verify(out: Path) -> None:
    shard = sorted(out.glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    refused(out, "verify, hashes.*sha256 differs")


def test_a_missing_tokenizer_is_refused(out: Path) -> None:
    (out / "tokenizer.json").unlink()
    refused(out, r"tokenizer.json is missing")


def test_a_chat_template_that_was_edited_is_refused(out: Path) -> None:
    with (out / "chat_template.jinja").open("a", encoding="utf-8") as file:
        file.write("{# mine #}")
    refused(out, r"chat_template.jinja")


def test_code_that_config_json_names_must_be_there(out: Path, made: tuple[Path, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(made[0], tmp_path / "coded"))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "configuration_minimax_m3_vl.Config", "AutoModel": "other/repo--modeling.Model"}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused(converted(source, tmp_path / "coded-int4"), "names the code configuration_minimax_m3_vl.py, which")


def test_a_file_of_the_source_that_was_not_carried_is_refused(
    out: Path, made: tuple[Path, Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(made[0], tmp_path / "newer"))
    (source / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    refused(out, "1 files of the source were not carried over, first preprocessor_config.json", source=str(source))


@pytest.mark.parametrize("left", [".m3quant/job.json", ".model-00001-of-00004.safetensors.tmp"])
def test_a_journal_or_temporary_file_is_refused(left: str, out: Path) -> None:
    (out / left).parent.mkdir(exist_ok=True)
    (out / left).write_text("{}", encoding="utf-8")
    refused(out, "is left of an interrupted run")


def test_a_secret_in_the_report_is_refused_without_being_repeated(out: Path) -> None:
    token = "hf_" + "aB3dE5fG7h" * 4
    (out / "m3quant-report").mkdir()
    (out / "m3quant-report" / "report.html").write_text(f"<p>{token}</p>", encoding="utf-8")
    with pytest.raises(PublishError, match=r"m3quant-report/report.html, line 1: Hugging Face token") as caught:
        prepare(out, asked(out))
    assert token not in str(caught.value)


def test_a_machine_path_in_notes_is_refused(out: Path) -> None:
    card = make_card(out, asked(out)).card_path
    text = card.read_text(encoding="utf-8")
    card.write_text(text.replace(NOTES_BEGIN, f"{NOTES_BEGIN}\nMade from /home/someone/models/m3."), encoding="utf-8")
    refused(out, r"README.md, line \d+: machine path")


def test_the_manifest_records_the_download_and_no_path(made: tuple[Path, Path]) -> None:
    manifest: dict[str, Any] = manifest_of(made[1])
    assert manifest["source"]["revision"] == COMMIT and manifest["source"]["repo"] is None
    assert all(facts["as_on_hub"] for facts in manifest["source"]["files"].values())
    assert manifest["source"]["card"]["license_name"] == "minimax-community"
    assert str(made[0].parent) not in (made[1] / "m3quant.json").read_text(encoding="utf-8")


def test_neither_warnings_nor_the_calibration_file_bring_paths_into_the_manifest(tmp_path: Path) -> None:
    source = source_like(tmp_path / "m3")
    index = json.loads((source / "model.safetensors.index.json").read_text(encoding="utf-8"))
    index["metadata"]["total_size"] = 1
    (source / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    out = converted(source, tmp_path / "out")
    assert any("total_size" in note for note in manifest_of(out)["notes"])  # type: ignore[attr-defined]
    assert str(tmp_path) not in (out / "m3quant.json").read_text(encoding="utf-8")
    corpus = tmp_path / "mine.txt"
    corpus.write_text("\n\n".join(f"Sentence {i} about nothing in particular." for i in range(400)), encoding="utf-8")
    windows = calibration_windows(make_plan_of(source), parse_mixture((str(corpus),)))
    assert windows.source.startswith("mine.txt") and str(tmp_path) not in json.dumps(windows.record())


def test_a_notice_of_the_base_is_kept_beside_ours_and_stale_records_stay_behind(tmp_path: Path) -> None:
    source = source_like(tmp_path / "m3")
    (source / "NOTICE").write_text("of the base\n", encoding="utf-8")
    (source / "SHA256SUMS").write_text("of the base's files\n", encoding="utf-8")
    out = converted(source, tmp_path / "out")
    prepared = prepare(out, asked(out, source=str(source), base_revision=COMMIT))
    assert (out / "NOTICE").read_text(encoding="utf-8") == "of the base\n"
    assert "CHANGED by" in (out / "NOTICE.m3quant").read_text(encoding="utf-8")
    assert "NOTICE.m3quant" in {f.path_in_repo for f in prepared.files}
    assert "- `SHA256SUMS`: describes the source" in prepared.card_path.read_text(encoding="utf-8")


def test_files_of_two_commits_have_no_revision(tmp_path: Path) -> None:
    from tests.support.publish.outputs import record_download

    source = source_like(tmp_path / "m3")
    lone = next((source / ".cache").rglob("config.json.metadata"))
    lone.write_text(lone.read_text(encoding="utf-8").replace(COMMIT, "f" * 40), encoding="utf-8")
    assert manifest_of(converted(source, tmp_path / "a"))["source"]["revision"] is None  # type: ignore[index]
    record_download(source)
    lone.unlink()
    assert manifest_of(converted(source, tmp_path / "b"))["source"]["revision"] is None  # type: ignore[index]


def test_a_snapshot_of_the_hubs_cache_names_its_repo(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--MiniMaxAI--MiniMax-M3" / "snapshots" / COMMIT
    source_like(snapshot, downloaded=False)
    out = converted(snapshot, tmp_path / "out")
    prepared = prepare(out, Asked(serving=serving(out)))
    assert (prepared.base.repo, prepared.base.revision) == (BASE, COMMIT)


def test_m2_with_a_supplied_licence_and_a_readable_notice(tmp_path: Path) -> None:
    source = source_like(tmp_path / "m2", "m2", None)
    out = converted(source, tmp_path / "out")
    text = tmp_path / "licence.txt"
    text.write_text(TEXTS["MiniMaxAI/MiniMax-M2.5"], encoding="utf-8")
    prepared = prepare(out, Asked("MiniMaxAI/MiniMax-M2.5", licence=GivenLicence(text), serving=[], source=str(source)))
    assert prepared.card_path.read_text(encoding="utf-8").count("base's download did not carry") == 1
    notice = (out / "NOTICE").read_text(encoding="utf-8")
    assert notice.startswith("MiniMax AI model is licensed under the MiniMax Model License") and "CHANGED by" in notice
    assert ModelCard.load(prepared.card_path).data.to_dict()["pipeline_tag"] == "text-generation"


def test_a_base_without_a_licence_file_is_stated_and_refused(tmp_path: Path) -> None:
    out = converted(source_like(tmp_path / "m3", base=None), tmp_path / "out")
    text = make_card(out, asked(out)).card_path.read_text(encoding="utf-8")
    assert "**Not stated:** The source carries no licence file" in text and f"base_model: {BASE}" in text
    assert "license" not in ModelCard(text).data.to_dict()
    refused(out, "carries no licence file")


class Validator(BaseHTTPRequestHandler):
    """The Hub's card validation as far as it is written down: license is stated, and other has a name and a link."""

    seen: list[dict[str, Any]] = []  # noqa: RUF012 - one server per test

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        data = ModelCard(body["content"], ignore_metadata_errors=False).data.to_dict()
        good = self.path == "/api/validate-yaml" and data.get("license") and data.get("license_name")
        self.send_response(200 if good else 400)
        self.end_headers()
        self.wfile.write(b"{}" if good else b"license is required")

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    server = HTTPServer(("127.0.0.1", 0), Validator)
    Validator.seen.clear()
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield Validator.seen
    server.shutdown()
    server.server_close()


def test_model_card_validate_takes_the_card_and_refuses_one_without_licence(
    out: Path, hub: list[dict[str, Any]]
) -> None:
    card = ModelCard.load(prepare(out, asked(out)).card_path)
    card.validate()
    assert hub[0]["repoType"] == "model" and "base_model_relation: quantized" in hub[0]["content"]
    with pytest.raises(ValueError, match="license is required"):
        ModelCard.load(make_card(out, asked(out, base_repo=None)).card_path).validate()


def test_the_command_writes_the_card_and_check_sets_the_exit_code(out: Path, made: tuple[Path, Path]) -> None:
    run = CliRunner().invoke(cli, ["card", str(out)])
    assert run.exit_code == 0 and "README.md is written" in run.output and "base model is unknown" in run.output
    run = CliRunner().invoke(cli, ["card", str(out), "--check"])
    assert run.exit_code == 1 and "FAIL: the base model is unknown" in run.output
    args = ["card", str(out), "--check", "--base-repo", BASE, "--source", str(made[0]), "--json"]
    run = CliRunner().invoke(cli, args)
    facts = json.loads(run.stdout)
    assert run.exit_code == 0, facts["problems"]
    assert (
        facts["base"]["revision"] == COMMIT and facts["licence"]["key"] == "minimax-community" and facts["obligations"]
    )


def test_a_scheme_of_some_layers_names_them() -> None:
    row = {"action": "quantize", "scheme": "int3-g128-asym", "layers": "3-6,59"}
    assert scheme_text(row) == "int3-g128-asym in layers 3-6,59"
    assert scheme_text({"action": "quantize", "scheme": "int4-g128"}) == "int4-g128"


def test_a_card_points_to_drafts_by_commit_and_licence(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = Draft("org/draft", COMMIT, "eagle3", "LlamaForCausalLMEagle3", 3, 1, 4, 128, 3, 0, 0, 0, "apache-2.0")
    found = {"org/draft@main": draft, "org/silent": replace(draft, licence=""), "folder": replace(draft, revision=None)}
    monkeypatch.setattr("m3quant.publish.drafts.open_draft", lambda name, family: found[name])
    text = make_card(out, asked(out, drafts=("org/draft@main",))).card_path.read_text()
    row = f"| [org/draft](https://huggingface.co/org/draft/tree/{COMMIT}) | EAGLE3, 3 tokens a step | `{COMMIT[:12]}` | apache-2.0 |"
    assert row in text and f"--draft org/draft@{COMMIT}" in text
    assert ModelCard(text).data.to_dict()["draft_models"] == [
        {"repo": "org/draft", "revision": COMMIT, "license": "apache-2.0", "algorithm": "EAGLE3"}
    ]
    without = make_card(out, asked(out)).card_path.read_text()
    assert "Draft models" not in without and "draft_models" not in without
    for name, message in (("org/silent", "states no licence in its card"), ("folder", "is a folder: a card points to")):
        with pytest.raises(PublishError, match=message):
            make_card(out, asked(out, drafts=(name,)))
    done = CliRunner().invoke(cli, ["card", str(out), "--draft", "folder"])
    assert isinstance(done.exception, PublishError) and "is a folder" in str(done.exception)
