"""Exit code 2 and one sentence for wrong input, whatever the command; 1 is kept for checks that fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli.shell import Shell
from tests.support.paths import FIXTURES

M2 = FIXTURES / "tiny-m2"

# command -> the arguments before and after the checkpoint
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "plan": (["plan"], []),
    "plan --on": (["plan", "--on", "1xH200"], []),
    "plan --all": (["plan", "--all"], []),
    "convert": (["convert"], ["DST"]),
    "eval": (["eval"], []),
    "verify": (["verify"], []),
    "card": (["card"], []),
    "publish": (["publish", "--dry-run"], ["org/name"]),
    "serve": (["serve", "--on", "1xH200", "--dry-run"], []),
    "bench": (["bench", "--on", "1xH200", "--dry-run"], []),
}


def call(command: str, checkpoint: object, tmp_path: Path, *options: object) -> list[object]:
    before, after = COMMANDS[command]
    return [*before, checkpoint, *(tmp_path / "dst" if part == "DST" else part for part in after), *options]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["absent", "file", "link to nowhere", "long name"])
def test_what_is_no_folder(shell: Shell, tmp_path: Path, command: str, kind: str) -> None:
    path = tmp_path / ("n" * 300 if kind == "long name" else "it")
    if kind == "file":
        path.write_text("text")
    elif kind == "link to nowhere":
        path.symlink_to(tmp_path / "nowhere")
    assert path.name[:20] in shell.refuses(*call(command, path, tmp_path))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_without_a_checkpoint(shell: Shell, tmp_path: Path, command: str) -> None:
    (tmp_path / "it").mkdir()
    shell.refuses(*call(command, tmp_path / "it", tmp_path))


# What reads the manifest of an output; `plan` and `convert` look at the weights alone.
OF_OUTPUTS = ["eval", "verify", "card", "publish", "serve"]


@pytest.mark.parametrize("command", OF_OUTPUTS)
def test_a_damaged_output_is_1_and_an_unfinished_one_2(
    shell: Shell, tmp_path: Path, outputs: dict[str, Path], command: str
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(outputs["m2"], folder)
    for text in ("{", "[]", "{}", "null", '{"shards": []}', "\ud800".encode("utf-8", "surrogatepass")):
        (folder / "m3quant.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        assert "m3quant.json" in shell.refuses(*call(command, folder, tmp_path), code=1)
    (folder / "m3quant.json").unlink()
    (folder / ".m3quant").mkdir()
    (folder / "config.json").rename(folder / "config.later")
    assert shell.refuses(*call(command, folder, tmp_path))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shard_that_was_cut_is_damage_of_an_output_and_wrong_input_of_a_source(
    shell: Shell, tmp_path: Path, outputs: dict[str, Path], command: str
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(outputs["m2"], folder)
    shard = max(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    assert shard.name in shell.refuses(*call(command, folder, tmp_path), code=1)
    (folder / "m3quant.json").unlink()
    shell.refuses(*call(command, folder, tmp_path))


@pytest.mark.parametrize(
    "arguments", [["plan", M2, "--to", "gptq"], ["plan", M2, "--no-such-option"], ["verify", "/nowhere"]]
)
def test_with_json_a_refusal_is_json_on_stdout_too(shell: Shell, arguments: list[object]) -> None:
    done = shell(*arguments, "--json")
    assert done.json["error"] == {"exit_code": done.code, "message": done.json["error"]["message"]}
    assert done.json["error"]["message"] in done.err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("options", [["--no-such-option"], ["one", "too", "many"]], ids=["option", "arguments"])
def test_what_no_command_knows(shell: Shell, tmp_path: Path, command: str, options: list[str]) -> None:
    shell.refuses(*call(command, M2, tmp_path, *options))


@pytest.mark.parametrize("command", ["plan", "plan --on", "convert", "serve"])
@pytest.mark.parametrize("text", ["a: [1", "- 1\n", "", "5", b"\xff\xfe\x00", "no_such_key: 1", "DIRECTORY", "ABSENT"])
def test_recipes(shell: Shell, tmp_path: Path, command: str, text: str | bytes) -> None:
    recipe = tmp_path / "recipe.yaml"
    if text == "DIRECTORY":
        recipe.mkdir()
    elif text != "ABSENT":
        recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
    before, after = COMMANDS[command]
    place = [tmp_path / "dst"] if after else []
    done = shell(*before, M2, *place, "--recipe", recipe)
    assert done.code == 2 and "recipe" in done.err and not done.out


@pytest.mark.parametrize("command", ["plan", "serve"])
@pytest.mark.parametrize(
    "options",
    [
        ["--on", ""], ["--on", "99xfoo"], ["--on", "0xH200"], ["--on", "2x0GiB"], ["--context", "0"], ["--context", "-1"], ["--context", "nan"],
        ["--context", "9" * 400], ["--max-num-batched-tokens", "9" * 400], ["--concurrency", "9" * 400], ["--kv-dtype", "fp3"], ["--kv-dtype", ""],
        ["--index-dtype", "int4"], ["--tp", "3"], ["--pp", "9"], ["--gpu-memory-utilization", "nan"], ["--gpu-memory-utilization", "inf"],
        ["--gpu-memory-utilization", "-1"], ["--gpu-memory-utilization", "2"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_questions_about_serving(shell: Shell, command: str, options: list[str]) -> None:
    before = ["serve", "--dry-run"] if command == "serve" else ["plan"]
    shell.refuses(*before, M2, "--on", "1xH200", *options)


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "0"], ["--port", "65536"], ["--host", ""], ["--host", "no such host"], ["--engine", "other"], ["--engine-python", "/nowhere/python"],
        ["--engine-python", "/bin/false"], ["--api-key-env", ""], ["--api-key-env", "sk-12 3"], ["--served-name", ""], ["--served-name", "a b\n"],
        ["--shutdown-timeout", "-1"], ["--start-timeout", "9" * 40], ["--recipe", "serve-9xfoo"], ["--write-compose", "/nowhere/compose.yaml"],
        ["--write-systemd", "/"], ["--on", "cpu", "--write-compose", "compose.yaml"], ["--verify"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_serve_before_the_engine_starts(shell: Shell, options: list[str]) -> None:
    shell.refuses("serve", M2, "--on", "1xH200", "--dry-run", *options)


def test_serve_without_an_engine_or_a_key(shell: Shell) -> None:
    assert "vLLM is not installed" in shell.refuses("serve", M2, "--on", "1xH200")
    assert "this variable is not set" in shell.refuses("serve", M2, "--on", "1xH200", "--api-key-env", "M3QUANT_UNSET")
    refusal = shell.refuses("serve", M2, "--on", "1xH200", "--dry-run", "--api-key-env", "sk-given-by-mistake")
    assert "mistake" not in refusal


def test_verify_says_before_it_reads_that_there_is_no_engine(shell: Shell, outputs: dict[str, Path]) -> None:
    refusal = shell.refuses("verify", outputs["m2"], "--engine", "--engine-python", "/nowhere/python")
    assert "does not run" in refusal


@pytest.mark.parametrize("command", ["card", "publish"])
@pytest.mark.parametrize(
    "options",
    [
        ["--base-repo", "nonsense"], ["--base-repo", "../up"], ["--base-repo", ""], ["--base-repo", "a/b", "--base-revision", "main"],
        ["--base-revision", ""], ["--licence-file", "/nowhere/LICENSE"], ["--licence-file", "/"], ["--licence-file", "/dev/null"],
        ["--licence-id", "wtfpl"], ["--licence-id", "other"], ["--licence-id", ""], ["--licence-name", "mine"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_words_on_the_base(
    shell: Shell, outputs: dict[str, Path], tmp_path: Path, command: str, options: list[str]
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(outputs["m2"], folder)
    shell.refuses(*call(command, folder, tmp_path, *options))
    assert not (folder / "README.md").exists()


def test_names_of_repos_and_tags(shell: Shell, outputs: dict[str, Path]) -> None:
    for name in ("", "org", "a/b/c", "../x", "org/ü", "org/name\n"):
        shell.refuses("publish", outputs["m2"], name, "--dry-run")
        shell.refuses("card", outputs["m2"], "--repo", name)
        shell.refuses("pull", name)
    for tag in ("", "main", "a b", "-x/"):
        shell.refuses("publish", outputs["m2"], "org/name", "--dry-run", f"--tag={tag}")
    assert "--check" in shell.refuses("card", outputs["m2"], "--online")


def test_a_gate_that_refuses_is_a_failed_check(shell: Shell, outputs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(outputs["m2"], folder)
    for command in (["publish", folder, "org/name", "--dry-run"], ["card", folder, "--check"]):
        done = shell(*command)
        assert done.code == 1 and "base model is unknown" in done.err


def test_a_full_disk_is_told_with_4(shell: Shell) -> None:
    serve = ("serve", M2, "--on", "1xH200", "--dry-run", "--write-systemd", "/dev/full")
    assert "No space left" in shell.refuses(*serve, code=4)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "m3quant", "plan", M2, "--all"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (4, "m3quant: the output cannot be used: No space left on device.\n")


def test_a_full_disk_under_the_log_changes_no_exit_code() -> None:
    for arguments, code in ((["plan", "/nowhere"], 2), (["no-such-command"], 2), (["plan", str(M2), "--all"], 4)):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "m3quant", *arguments], stdout=full if code == 4 else None, stderr=full
            )
        assert done.returncode == code


def test_a_context_limit_of_null_is_none_at_all(shell: Shell, tmp_path: Path) -> None:
    shutil.copytree(M2, tmp_path / "it")
    config = tmp_path / "it" / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 8192', '"max_position_embeddings": null'))
    assert shell("plan", tmp_path / "it", "--on", "1xH200").code == 0
