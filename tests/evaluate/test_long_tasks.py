"""The long-context tasks: prompts are what they claim, the exact match equals greedy decoding, figures are counted right."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from m3quant.errors import EvaluationError
from m3quant.evaluate import needle, position, ruler
from m3quant.evaluate.haystack import Haystack
from m3quant.evaluate.phrasing import CODE
from m3quant.evaluate.retrieval import RetrievalTask
from m3quant.evaluate.task import Predictions
from tests.support.evaluate.long_context import TEXT, config, generated, teacher_forced, tokenizer
from tests.training.needles import query

MODELS = ("tiny-m2", "tiny-m3")
VARIANTS = (*ruler.VARIANTS, "vt")


def grid(name: str, **params: Any) -> RetrievalTask:
    return needle.make(tokenizer(name), config(name), {"text": TEXT, "text_name": "heldout", **params})


def ruled(name: str, variant: str, **params: Any) -> RetrievalTask:
    return ruler.make(tokenizer(name), config(name), {"text": TEXT, "variant": variant, **params})


def said(task: RetrievalTask, wrong: set[int] = frozenset(), token: int = 0) -> list[Predictions]:  # type: ignore[assignment]
    """Predictions that are all right, except answer token number `token` of the samples in `wrong`."""
    out = []
    for index, sequence in enumerate(task.sequences()):
        best = sequence.ids[sequence.scored].copy()
        if index in wrong:
            best[token] += 1
        out.append(Predictions(np.full(len(best), 0.5, dtype=np.float32), best))
    return out


@pytest.mark.parametrize("name", MODELS)
def test_exact_match_is_what_greedy_decoding_generates(name: str) -> None:
    """Found, half found and not found: the code sentence, the same with words the model never saw, other variants."""
    unseen = {**CODE.model_dump(), "nouns": ["spoon", "canyon", "winter"]}
    tasks = [
        grid(name, lengths=[256, 600], depths=[0, 0.7], samples=2),
        grid(name, lengths=[300], depths=[0.4], samples=6, phrasing=unseen),
        ruled(name, "niah_multivalue", lengths=[400], samples=1, phrasing="code"),
        ruled(name, "vt", lengths=[600], samples=1),
    ]
    outcomes = set()
    for task in tasks:
        predictions = teacher_forced(name, list(task.sequences()))
        for sample, one in zip(task.samples, predictions, strict=True):
            ids, scored = sample.sequence.ids, sample.sequence.scored
            made = generated(name, ids[: scored[0]], len(scored))
            (result,) = RetrievalTask("needle", "one", "", [sample], task.data, task.reach).results([one], None)
            assert result.metrics["accuracy"] == (made == ids[scored].tolist())
            # Up to its first wrong token the generated answer is the teacher-forced one, that token included.
            wrong = np.flatnonzero(one.best != ids[scored])
            upto = int(wrong[0]) + 1 if len(wrong) else len(scored)
            assert made[:upto] == one.best[:upto].tolist()
            outcomes.add("found" if not len(wrong) else "begun" if wrong[0] else "not found")
    assert {"found", "begun"} <= outcomes, outcomes


@pytest.mark.parametrize("name", MODELS)
def test_prompts_are_their_length_and_the_fact_is_at_its_depth(name: str) -> None:
    task = grid(name, lengths=[512, 2048], depths=[0, 0.5, 1], samples=10, distractors=2)
    assert len(task.sequences()) == 2 * 3 * 10
    decode = tokenizer(name).decode
    for sample in task.samples:
        ids, scored = sample.sequence.ids, sample.sequence.scored
        assert len(ids) == sample.length and scored[-1] == sample.length - 1
        prompt, answer = decode(ids[: scored[0]]), decode(ids[scored])
        key = prompt[prompt.rindex("\nThe secret code of the ") :].removeprefix("\nThe secret code of the ")
        adjective, noun, _ = key.split()
        assert prompt.endswith(query(adjective, noun))
        stated = query(adjective, noun) + answer + ".\n"
        assert prompt.count(stated) == 1 and prompt.count("The secret code of the") == 4
        before = len(tokenizer(name)(prompt[: prompt.index(stated)], add_special_tokens=False)["input_ids"])
        assert abs(before / sample.length - sample.depth) < 0.2, (sample.depth, before, sample.length)


def test_samples_are_fixed_by_the_seed_and_differ_from_each_other() -> None:
    first, again, other = (grid("tiny-m2", lengths=[256], depths=[0.5], samples=10, seed=s) for s in (1, 1, 2))
    rows = [[one.ids.tolist() for one in task.sequences()] for task in (first, again, other)]
    assert rows[0] == rows[1] and rows[0] != rows[2]
    assert len({tuple(row) for row in rows[0]}) == 10
    # A cell does not depend on which other cells are asked for.
    alone = grid("tiny-m2", lengths=[512, 256], depths=[1, 0.5], samples=10, seed=1)
    cell = [s.sequence.ids.tolist() for s in alone.samples if (s.length, s.depth) == (256, 0.5)]
    assert cell == rows[0]


def test_facts_stand_between_sentences() -> None:
    task = grid("tiny-m2", lengths=[1024], depths=[0.25, 0.5, 0.75], samples=10)
    ends = 0
    for sample in task.samples:
        text = tokenizer("tiny-m2").decode(sample.sequence.ids)
        before = text[: text.index("\nThe secret code of the")]
        ends += before.rstrip(" \"'").endswith((".", "!", "?", "\n"))
    assert ends == len(task.samples)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ruler_prompts_hold_what_is_asked_for(variant: str) -> None:
    task = ruled("tiny-m2", variant, lengths=[1024, 1500], samples=3)
    chosen = ruler.VARIANTS.get(variant)
    decode = tokenizer("tiny-m2").decode
    for sample in task.samples:
        ids, scored = sample.sequence.ids, sample.sequence.scored
        assert len(ids) == sample.length
        answer = ids[scored]
        values = [decode(answer[span.start : span.stop]).strip() for span in sample.spans]
        prompt = decode(ids[: scored[0]])
        if chosen is None:
            assert len(values) == 5 and f"VAR {values[0]} = " in prompt
            for one, before in zip(values[1:], values, strict=False):
                assert f"VAR {one} = VAR {before}\n" in prompt
            assert prompt.index(f"VAR {values[1]} = ") < prompt.index(f"VAR {values[4]} = ")
            continue
        assert len(values) == max(chosen.values, chosen.queries)
        question = prompt[prompt.rindex("\nWhat") :]
        facts = [f"for {key} is: {value}. " for key in _keys(question) for value in values]
        stated = [fact for fact in facts if fact in prompt]
        assert len(stated) == len(values)
        places = [prompt.index(f" is: {value}. ") for value in values]
        if chosen.values > 1:
            assert places == sorted(places)
        total = prompt.count("One of the special magic")
        assert total == chosen.keys + chosen.values - 1 if not chosen.filled else total > 8


def _keys(question: str) -> list[str]:
    asked = question.split(" for ", 1)[1].split(" mentioned ")[0]
    return [key.removeprefix("and ") for key in asked.split(", ")]


def test_counts_intervals_and_cells() -> None:
    task = grid("tiny-m3", lengths=[256, 1024], depths=[0, 1], samples=10)
    # Samples 0..9 are (256, 0), 10..19 (256, 1), 20..29 (1024, 0), 30..39 (1024, 1).
    (result,) = task.results(said(task, {0, 1, 25}, token=5), said(task))
    assert [(c["length"], c["depth"], c["hits"]) for c in result.cells] == [
        (256, 0, 8), (256, 1, 10), (1024, 0, 9), (1024, 1, 10),
    ]  # fmt: skip
    assert all(c["hits_source"] == c["samples"] == 10 and c["low"] < c["accuracy"] <= c["high"] for c in result.cells)
    assert result.metrics["accuracy"] == 37 / 40 and result.metrics["accuracy@256"] == 18 / 20
    assert result.source_metrics is not None and list(result.source_metrics) == list(result.metrics)
    assert result.source_metrics["accuracy"] == 1 and math.isclose(result.metrics["answer_nll"], 0.5)
    assert [c["exercises_msa"] for c in result.cells] == [False, False, True, True]
    assert "does not exercise MSA: 256 tokens" in " ".join(result.notes)
    m2 = grid("tiny-m2", lengths=[256])
    (plain,) = m2.results(said(m2), None)
    assert "MSA" not in plain.label + " ".join(plain.notes) and plain.cells[0]["exercises_msa"] is None


def test_values_given_the_prefix_count_each_value_by_itself() -> None:
    task = ruled("tiny-m2", "niah_multivalue", lengths=[512], samples=10)
    (result,) = task.results(said(task, {3}, token=0), None)
    assert result.metrics["accuracy"] == 0.9 and math.isclose(result.metrics["values_given_prefix"], 39 / 40)
    separator = task.samples[0].spans[0].stop
    (result,) = task.results(said(task, {3}, token=separator), None)
    # A wrong comma breaks the list, not a value.
    assert result.metrics["accuracy"] == 0.9 and result.metrics["values_given_prefix"] == 1


def test_a_predictor_without_probabilities_gives_no_answer_nll() -> None:
    task = grid("tiny-m2", lengths=[256])
    blind = [Predictions(np.full_like(p.nll, np.nan), p.best) for p in said(task)]
    (result,) = task.results(blind, None)
    assert "answer_nll" not in result.metrics and result.metrics["accuracy"] == 1


def test_position_buckets_average_their_own_positions() -> None:
    task = position.make(tokenizer("tiny-m3"), config("tiny-m3"), {"text": TEXT, "length": 1024, "windows": 3})
    rng = np.random.default_rng(5)
    nll = rng.gamma(2.0, 1.0, (3, 1023)).astype(np.float32)
    kl = rng.random((3, 1023)).astype(np.float32)
    best = np.zeros(1023, dtype=np.int64)
    (result,) = task.results(
        [Predictions(a, best, b) for a, b in zip(nll, kl, strict=True)], [Predictions(a / 2, best) for a in nll]
    )
    assert [(c["start"], c["stop"]) for c in result.cells] == [(1, 64), (64, 256), (256, 1024)]
    assert sum(c["tokens"] for c in result.cells) == nll.size == result.tokens
    by_hand = [nll[:, p - 1] for p in range(64, 256)]
    assert math.isclose(result.cells[1]["nll"], np.mean(by_hand), rel_tol=1e-5)
    assert math.isclose(result.cells[2]["kl_mean"], kl[:, 255:].mean(), rel_tol=1e-5)
    assert math.isclose(result.metrics["perplexity@64-255"], math.exp(np.mean(by_hand)), rel_tol=1e-5)
    assert result.source_metrics is not None and list(result.source_metrics) == list(result.metrics)
    assert [c["exercises_msa"] for c in result.cells] == [False, False, True]


def test_position_perplexity_is_the_windows_own() -> None:
    task = position.make(tokenizer("tiny-m2"), config("tiny-m2"), {"text": TEXT, "length": 300, "windows": 2})
    predictions = teacher_forced("tiny-m2", list(task.sequences()))
    (result,) = task.results(predictions, None)
    losses = np.concatenate([p.nll for p in predictions]).astype(np.float64)
    assert math.isclose(result.metrics["perplexity"], math.exp(losses.mean()), rel_tol=1e-9)
    assert 5 < result.metrics["perplexity"] < 30  # the trained model's own range


@pytest.mark.parametrize(
    ("make", "params", "words"),
    [
        (needle.make, {"lengths": [8193]}, ["8,193", "max_position_embeddings of 8,192"]),
        (needle.make, {"lengths": [20]}, ["20 tokens do not hold"]),
        (needle.make, {"lengths": [512], "depths": [1.5]}, ["depths", "between 0"]),
        (needle.make, {"lengths": [512], "dephts": [1]}, ["dephts", "it takes"]),
        (needle.make, {}, ["lengths"]),
        (needle.make, {"lengths": [512], "text": "short"}, ["tokens", "some pages"]),
        (needle.make, {"lengths": [512], "phrasing": {"fact": "{key}", "question": "x {key}"}}, ["{value}"]),
        *(
            (
                needle.make,
                {"lengths": [512], "phrasing": {"fact": "{key} {value}", "question": "{key}", **one}},
                ["{kind}", *one],
            )
            for one in (
                {"question": "{key} {other}"},
                {"intro": "{"},
                {"intro": "{key}"},
                {"fact": "{key} {value} {0}"},
            )
        ),
        (
            needle.make,
            {
                "lengths": [512],
                "distractors": 4,
                "phrasing": {
                    "fact": "{key} {value}",
                    "question": "{key}",
                    "adjectives": ["a", "b"],
                    "nouns": ["c", "d"],
                },
            },
            ["4 distractors", "4 pairs"],
        ),
        (ruler.make, {"lengths": [512], "variant": "cwe"}, ["variant"]),
        (ruler.make, {"lengths": [60], "variant": "vt"}, ["do not hold"]),
        (ruler.make, {"lengths": [512, 512], "variant": "vt"}, ["distinct"]),
        (position.make, {"length": 100000}, ["max_position_embeddings"]),
        (position.make, {"length": 4096, "text": "A short text. " * 20}, ["tokens, a window 4,096"]),
        (position.make, {"length": 512, "edges": [5, 2]}, ["ascending"]),
    ],
)
def test_wrong_parameters_are_refused_in_one_sentence(make: Any, params: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(EvaluationError) as refused:
        make(tokenizer("tiny-m3"), config("tiny-m3"), {"text": TEXT, **params})
    assert str(refused.value).startswith("task ") and all(word in str(refused.value) for word in words), refused.value


def test_a_text_shorter_than_the_prompt_is_repeated_and_said() -> None:
    task = grid("tiny-m2", lengths=[2048], text=TEXT[:3000])
    (result,) = task.results(said(task), None)
    assert any("repeated up to" in note for note in result.notes)
    assert all(len(s.ids) == 2048 for s in task.sequences())


def test_a_text_as_long_as_the_room_is_used_whole_and_not_repeated() -> None:
    haystack = Haystack(tokenizer("tiny-m2"), TEXT[:600], "needle")
    (piece,) = haystack.place(len(haystack.ids), [], random.Random(3))
    assert piece.tolist() == haystack.ids.tolist() and haystack.notes() == []
    haystack.place(len(haystack.ids) + 1, [], random.Random(3))
    assert "repeated up to 2 times" in haystack.notes()[0]
