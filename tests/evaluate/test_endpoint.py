"""Tasks against a server: the same figures as from log-probs in hand, and each failure as one sentence."""

from __future__ import annotations

import math
import socketserver
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from m3quant.artifact.eval_record import EvalRecord
from m3quant.errors import EvaluationError
from m3quant.evaluate import needle, openai_server, position, ruler
from m3quant.evaluate.endpoint import GENERATED, evaluate_endpoint
from m3quant.evaluate.haystack import Reach
from m3quant.evaluate.task import Predictions, Task
from m3quant.running import retry
from tests.support.evaluate.double import KEY, Double, serving, toy_logprobs
from tests.support.evaluate.long_context import TEXT, config, tokenizer

REACH = Reach.of(config("tiny-m2"))
ALL = {"token_ids", "prompt_logprobs", "echo", "ids_out"}


def tasks() -> list[Task]:
    made, about = tokenizer("tiny-m2"), config("tiny-m2")
    return [
        position.make(made, about, {"text": TEXT, "length": 96, "windows": 3, "edges": [1, 32]}),
        needle.make(made, about, {"text": TEXT, "lengths": [128], "depths": [0.5], "samples": 4}),
    ]


def run(offers: set[str], chosen: list[Task] | None = None, **options: Any) -> tuple[EvalRecord, Double]:
    double = Double(tokenizer("tiny-m2"), offers)
    with serving(double) as url:
        return evaluate_endpoint(url, None, chosen or tasks(), tokenizer("tiny-m2"), REACH, **options), double


def in_hand(task: Task) -> list[Predictions]:
    """The toy model's predictions without a server."""
    out = []
    for sequence in task.sequences():
        rows = [toy_logprobs(sequence.ids[:place].tolist(), len(tokenizer("tiny-m2"))) for place in sequence.scored]
        truth = sequence.ids[sequence.scored]
        nll = np.array([-row[token] for row, token in zip(rows, truth, strict=True)], dtype=np.float32)
        out.append(Predictions(nll, np.array([int(row.argmax()) for row in rows])))
    return out


@pytest.mark.parametrize("offers", [ALL, {"token_ids", "prompt_logprobs"}, {"token_ids", "echo"}])
def test_perplexity_by_position_is_that_of_the_log_probs_in_hand(offers: set[str]) -> None:
    chosen = tasks()
    record, _ = run(offers, chosen)
    (expected,) = chosen[0].results(in_hand(chosen[0]), None)
    found = record.results[0]
    assert found.not_run is None and found.tokens == 3 * 95
    for name, value in expected.metrics.items():
        assert math.isclose(found.metrics[name], value, rel_tol=1e-6)
    assert [cell["nll"] for cell in found.cells] == pytest.approx([cell["nll"] for cell in expected.cells], rel=1e-6)
    assert record.schema_version == 1 and record.device == "endpoint" and "toy at http" in record.checkpoint.name
    assert EvalRecord.model_validate_json(record.model_dump_json()) == record


@pytest.mark.parametrize("offers", [ALL, {"token_ids"}])
def test_needles_are_generated_and_counted(offers: set[str]) -> None:
    chosen = [tasks()[1]]
    double = Double(tokenizer("tiny-m2"), offers)
    # The toy server repeats one sample's answer to every prompt: exactly that sample is right.
    third = chosen[0].sequences()[2]
    double.answers = third.ids[third.scored].tolist()
    with serving(double) as url:
        (found,) = evaluate_endpoint(url, "toy", chosen, tokenizer("tiny-m2"), REACH).results
    assert found.cells[0]["hits"] == 1 and found.cells[0]["samples"] == 4
    assert found.convention == GENERATED and "answer_nll" not in found.metrics
    # The prompt never holds the answer.
    lengths = {len(body["prompt"]) for body in double.asked if len(body["prompt"]) > 16}
    assert lengths == {128 - len(third.scored)}


def test_a_wrong_last_digit_is_a_miss() -> None:
    chosen = [tasks()[1]]
    double = Double(tokenizer("tiny-m2"), ALL)
    third = chosen[0].sequences()[2]
    double.answers = [*third.ids[third.scored][:-1].tolist(), int(third.ids[third.scored][-1]) + 1]
    with serving(double) as url:
        (found,) = evaluate_endpoint(url, "toy", chosen, tokenizer("tiny-m2"), REACH).results
    assert found.cells[0]["hits"] == 0


def test_without_log_probs_the_task_is_not_run_and_has_no_figure() -> None:
    record, _ = run({"token_ids"})
    lost, needles = record.results
    assert lost.not_run is not None and "no prompt log-probs" in lost.not_run
    assert lost.metrics == {} and lost.cells == [] and needles.not_run is None
    assert any("not offered" in note for note in record.notes)


def test_a_server_of_text_prompts_gets_text_only_where_it_means_the_same_tokens() -> None:
    made = tokenizer("tiny-m2")
    task = position.make(made, config("tiny-m2"), {"text": TEXT, "length": 64, "windows": 2})
    same = [
        made(made.decode(s.ids.tolist()), add_special_tokens=False)["input_ids"] == s.ids.tolist()
        for s in task.sequences()
    ]
    record, double = run({"prompt_logprobs"}, [task])
    (found,) = record.results
    if all(same):
        assert found.not_run is None
        assert all(isinstance(body["prompt"], str) for body in double.asked[1:])
    else:
        assert found.not_run is not None and "text prompts only" in found.not_run


def test_text_that_is_tokenized_otherwise_is_not_scored() -> None:
    made = tokenizer("tiny-m2")
    task = position.make(made, config("tiny-m2"), {"text": TEXT, "length": 64, "windows": 1})
    ids = task.sequences()[0].ids.copy()
    task = replace(task, windows=[replace(task.windows[0], ids=ids)])
    ids[10:12] = made(" a", add_special_tokens=False)["input_ids"][-1]  # a pair that no tokenizer would write
    split = made.convert_tokens_to_ids(["t", "h", "e"])
    ids[20:23] = split
    record, _ = run({"prompt_logprobs"}, [task])
    assert record.results[0].not_run is not None and "text prompts only" in record.results[0].not_run


def test_a_server_that_truncates_is_found_out() -> None:
    double = Double(tokenizer("tiny-m2"), ALL)
    whole = double.complete
    double.complete = lambda body: whole({**body, "prompt": body["prompt"][:50]})  # type: ignore[method-assign]
    with serving(double) as url:
        found = evaluate_endpoint(url, None, tasks()[:1], tokenizer("tiny-m2"), REACH).results[0]
    assert found.not_run is not None and "log-probs of 50 tokens" in found.not_run and not found.metrics


def test_a_refused_prompt_is_not_run_with_the_servers_own_words() -> None:
    double = Double(tokenizer("tiny-m2"), ALL)
    said = "This model's maximum context length is 100 tokens."
    double.before = lambda path, body, number: (400, said, {}) if len(body.get("prompt", "")) > 100 else None
    with serving(double) as url:
        lost, needles = evaluate_endpoint(url, None, tasks(), tokenizer("tiny-m2"), REACH).results
    assert lost.not_run is None and needles.not_run is not None and said in needles.not_run


def test_chat_only_servers_run_nothing() -> None:
    double = Double(tokenizer("tiny-m2"), ALL)
    double.before = lambda path, body, number: (404, "no such route", {}) if "completions" in path else None
    with serving(double) as url:
        record = evaluate_endpoint(url, None, tasks(), tokenizer("tiny-m2"), REACH)
    assert all(result.not_run and not result.metrics for result in record.results)


def test_a_busy_server_is_asked_again_and_a_broken_one_is_given_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", waits.append)
    double = Double(tokenizer("tiny-m2"), ALL)
    double.before = lambda path, body, number: (429, "full", {"Retry-After": "7"}) if number in (2, 9) else None
    with serving(double) as url:
        record = evaluate_endpoint(url, None, tasks(), tokenizer("tiny-m2"), REACH, concurrency=1)
    assert waits == [7.0, 7.0] and all(result.not_run is None for result in record.results)
    assert capsys.readouterr().err.splitlines() == [f"{url} answered 429; again in 7 s"] * 2
    double.before = lambda path, body, number: (429, "full", {"Retry-After": "3600"}) if body else None
    with serving(double) as url, pytest.raises(EvaluationError, match="answered 429 and asks to wait 3600 s: full"):
        evaluate_endpoint(url, None, tasks(), tokenizer("tiny-m2"), REACH)
    double.before = lambda path, body, number: (503, "dead engine", {}) if body else None
    with serving(double) as url, pytest.raises(EvaluationError, match="503 4 times: dead engine"):
        evaluate_endpoint(url, None, tasks(), tokenizer("tiny-m2"), REACH)


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    double = Double(tokenizer("tiny-m2"), ALL, key=KEY)
    with serving(double) as url:
        with pytest.raises(EvaluationError, match="refuses the API key"):
            evaluate_endpoint(url, None, tasks(), tokenizer("tiny-m2"), REACH)
        with pytest.raises(EvaluationError, match="TOY_KEY: that variable is not set"):
            evaluate_endpoint(url, None, tasks(), tokenizer("tiny-m2"), REACH, api_key_env="TOY_KEY")
        monkeypatch.setenv("TOY_KEY", KEY + "\n")  # as read from a file
        with pytest.raises(EvaluationError, match="TOY_KEY: that variable holds a line break") as refused:
            evaluate_endpoint(url, None, tasks(), tokenizer("tiny-m2"), REACH, api_key_env="TOY_KEY")
        assert KEY not in str(refused.value)
        monkeypatch.setenv("TOY_KEY", KEY)
        record = evaluate_endpoint(url, None, tasks(), tokenizer("tiny-m2"), REACH, api_key_env="TOY_KEY")
    assert KEY not in record.model_dump_json() and record.results[0].not_run is None


class Greeter(socketserver.BaseRequestHandler):
    """Speaks another protocol."""

    def handle(self) -> None:
        self.request.recv(1000)
        self.request.sendall(b"SSH-2.0-OpenSSH_9\r\n")


def test_wrong_servers_are_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tokenizer("tiny-m2")
    for url, words in (
        ("localhost:8000", "not a URL"),
        ("http://user:secret@localhost:1", "out of the URL"),
        ("http://127.0.0.1:9", "cannot be reached"),
        ("http://127.0.0.1:port", "not a URL"),
        ("http://127.0.0.1:99999", "not a URL"),
        ("http://127.0.0.1:8000/a\x00b", "not a URL"),
        ("http://user:secret@local host:1", "out of the URL"),
    ):
        with pytest.raises(EvaluationError, match=words) as refused:
            evaluate_endpoint(url, None, tasks(), made, REACH)
        assert "secret" not in str(refused.value)
    monkeypatch.setattr(retry.time, "sleep", lambda seconds: None)
    with socketserver.TCPServer(("127.0.0.1", 0), Greeter) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(EvaluationError, match="does not answer in HTTP"):
            evaluate_endpoint(f"http://127.0.0.1:{server.server_address[1]}", None, tasks(), made, REACH)
        server.shutdown()
    with serving(Double(made, ALL)) as url, pytest.raises(EvaluationError, match="does not serve other; it serves toy"):
        evaluate_endpoint(url, "other", tasks(), made, REACH)


def test_a_proxy_is_not_asked_for_a_server_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    record, _ = run(ALL)
    assert all(result.not_run is None for result in record.results)
    monkeypatch.setenv("all_proxy", "gopher://127.0.0.1:9")
    with pytest.raises(EvaluationError, match=r"the proxy of .* cannot be used"):
        evaluate_endpoint("http://elsewhere.invalid", None, tasks(), tokenizer("tiny-m2"), REACH)
    monkeypatch.delenv("all_proxy")
    with pytest.raises(
        EvaluationError, match=r"elsewhere\.invalid cannot be reached .*refused"
    ):  # by the proxy: it is asked
        evaluate_endpoint("http://elsewhere.invalid", None, tasks(), tokenizer("tiny-m2"), REACH)


@pytest.mark.parametrize(
    "rows", [[None, [1]], [None, {"x": {"logprob": 0}}], [None, {"1": {}}], [None, {"1": {"logprob": None}}]]
)
def test_log_probs_of_another_form_are_one_sentence(rows: list[Any]) -> None:
    with pytest.raises(EvaluationError, match="prompt_logprobs in a form that is not known"):
        openai_server.prompt_scores({"prompt_logprobs": rows}, "prompt_logprobs")
    for token_logprobs in ([None, "x", 1.0], 5):
        with pytest.raises(EvaluationError, match="echo in a form that is not known"):
            openai_server.prompt_scores(
                {"logprobs": {"token_logprobs": token_logprobs, "top_logprobs": [None, {"a": 1.0}]}}, "echo"
            )


def test_texts_of_tokens_are_not_taken_for_ids() -> None:
    ids = openai_server.generated_ids
    assert ids({"token_ids": [5, 6]}) == ids({"logprobs": {"tokens": ["token_id:5", "token_id:6"]}}) == [5, 6]
    for tokens in (["5", "6"], ["token_id:5", "6"], ["x token_id:5"], [], None, "56"):
        assert ids({"logprobs": {"tokens": tokens}}) is None
    assert ids({"logprobs": [5]}) is None and ids({"token_ids": ["a"]}) is None
    assert ids({"token_ids": ["9" * 5000]}) is None


class Odd(socketserver.BaseRequestHandler):
    """Answers in HTTP with what no server of models says."""

    body = b""

    def handle(self) -> None:
        self.request.recv(10_000)
        self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(self.body), self.body))


@pytest.mark.parametrize(
    ("body", "words"),
    [(b"[" * 100_000, "does not answer in JSON"), (b'{"data": 1' + b" " * 5000 + b"}", "answers with more than 4,000 bytes"),
     (b'{"data": ' + b"9" * 3000 + b"}", "serves no model")],
)  # fmt: skip
def test_answers_without_bound_are_one_sentence(body: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_server, "ANSWER_BYTES", 4000 if b"data" in body else 2**20)
    monkeypatch.setattr(Odd, "body", body)
    with socketserver.TCPServer(("127.0.0.1", 0), Odd) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(EvaluationError, match=words):
            openai_server.Server(f"http://127.0.0.1:{server.server_address[1]}", None)
        server.shutdown()


def test_choices_that_are_no_list_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    server = openai_server.Server.__new__(openai_server.Server)
    server.model, server.url = "m", "http://x"
    for choices in ({"0": 1}, "ab", [5], None, {}):
        monkeypatch.setattr(server, "_request", lambda *_, choices=choices: {"choices": choices})
        with pytest.raises(EvaluationError, match="answers without choices"):
            server.complete("a")


def test_several_values_need_the_true_prefix_only_where_it_is_known() -> None:
    task = ruler.make(
        tokenizer("tiny-m2"), config("tiny-m2"), {"text": TEXT, "variant": "niah_multivalue", "lengths": [700], "samples": 2}
    )  # fmt: skip
    record, _ = run(ALL, [task])
    assert "accuracy" in record.results[0].metrics and "values_given_prefix" not in record.results[0].metrics
