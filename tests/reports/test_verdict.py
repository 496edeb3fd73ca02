"""What a page concludes from its figures, and that it says so before everything else."""

from __future__ import annotations

import re
from typing import Any

import pytest

from m3quant.artifact.conversion_eval import HELDOUT_TASK
from m3quant.artifact.eval_record import EvalRecord, Result
from m3quant.evaluate.intervals import wilson
from m3quant.reports import conversion_html, evaluation_html
from m3quant.reports.comparison_html import Compared
from m3quant.reports.verdict import UNKNOWN_TEXT, Finding, Verdict, of_conversion, of_evaluation, unknown_text
from tests.convert.test_report import report
from tests.support.evaluate.sample_record import COMPUTED, sample_record


def divergence(kl: float, floor: float | None) -> list[Result]:
    metrics = {"kl_mean": kl, "kl_mean_error": kl / 100, "top1_agreement": 0.97}
    found = [Result(task="d", convention="kl-full", label="divergence", metrics=metrics)]
    if floor is not None:
        noise = {"kl_mean": floor, "top1_agreement": 0.999}
        found.append(Result(task="d", convention="noise-floor", label="noise", metrics=noise))
    return found


def perplexity(source: float | None, own: float, name: str = "perplexity") -> Result:
    theirs = None if source is None else {name: source}
    return Result(task="p", convention="windows", label="perplexity", metrics={name: own}, source_metrics=theirs)


def needles(hits: int, samples: int, source: int | None, **where: Any) -> Result:
    low, high = wilson(hits, samples)
    cell = {"length": 8192, "samples": samples, "hits": hits, "accuracy": hits / samples, "low": low, "high": high}
    cell |= where | ({} if source is None else {"hits_source": source})
    return Result(task="n", convention="greedy", label="needles", metrics={"accuracy": hits / samples}, cells=[cell])


def record(*results: Result) -> EvalRecord:
    return sample_record().model_copy(update={"results": list(results), "coverage": None, "computed": COMPUTED})


def finding(verdict: Verdict, label: str) -> Finding:
    (found,) = [one for one in verdict.findings if label in one.label]
    return found


@pytest.mark.parametrize(
    ("kl", "floor", "times", "words"),
    [
        (0.0, None, "", "cannot be told from its source"),
        (3e-5, 2e-5, "", "cannot be told from its source"),
        (5e-5, 2e-5, "2.5", "very close to its source"),
        (0.009, None, "", "very close to its source"),
        (0.02, 1e-5, "2,000", "is close to its source"),
        (0.1, 1e-5, "10,000", "clearly different from its source"),
        (3.0, 1e-5, "300,000", "far from its source"),
    ],
)
def test_the_headline_says_how_far_the_checkpoint_is_from_its_source(
    kl: float, floor: float | None, times: str, words: str
) -> None:
    verdict = of_evaluation(record(*divergence(kl, floor), perplexity(9.0, 9.1)))
    assert words in verdict.headline and verdict.headline.endswith(".") and "long context" not in verdict.headline
    said = finding(verdict, "KL divergence")
    assert f"{times} times the noise floor" in said.meaning if times else "times" not in said.meaning
    assert finding(verdict, "perplexity").value == "+1.11 %"
    assert any("noise floor" in one for one in verdict.not_tested) == (floor is None)


def test_figures_on_text_that_the_model_does_not_know_are_explained() -> None:
    verdict = of_evaluation(record(*divergence(0.02, 1e-5), perplexity(4481.0, 4704.0)))
    assert verdict.headline.startswith("No conclusion about quality")
    said = finding(verdict, "perplexity")
    assert said.bad and said.value == "+4.98 %" and "perplexity of 4,481 here: it does not know" in said.meaning
    known = of_evaluation(record(*divergence(0.02, 1e-5), perplexity(UNKNOWN_TEXT - 1, 480.0)))
    assert "close to" in known.headline and not finding(known, "perplexity").bad
    per_word = of_evaluation(record(*divergence(0.02, 1e-5), perplexity(4481.0, 4704.0, "word_perplexity")))
    assert "close to" in per_word.headline, "per word a known text may have thousands"
    assert unknown_text(None) == unknown_text(12.0) == ""


def test_a_loss_in_retrieval_is_one_that_chance_does_not_explain() -> None:
    near = divergence(0.001, 1e-5)
    few = of_evaluation(record(*near, needles(79, 80, 80)))
    assert not finding(few, "needles").bad and "no loss that 80 samples" in finding(few, "needles").meaning
    many = of_evaluation(record(*near, needles(60, 80, 80, depth=0.5)))
    assert (
        finding(many, "needles").bad
        and "Weakest: 8,192 tokens, depth 50 %, 60 of 80." in finding(many, "needles").meaning
    )
    assert many.headline.endswith("is very close to its source, and it finds less in long context.")
    alone = of_evaluation(record(*near, needles(60, 80, None)))
    assert not finding(alone, "needles").bad and "The source was not asked" in finding(alone, "needles").meaning
    both = of_evaluation(record(*near, needles(80, 80, 80), needles(70, 80, 80)))
    assert finding(both, "retrieval by length, 2 tasks").value == "150 of 160 found"
    assert "Weakest: needles at 8,192 tokens, 70 of 80." in finding(both, "retrieval by length").meaning
    grids = of_evaluation(record(*near, needles(10, 10, 10, depth=0.0), needles(9, 10, 10, depth=1.0)))
    assert finding(grids, "needles").value == "19 of 20 found", "grids of one name are one finding"


def test_what_was_not_tested_is_listed() -> None:
    bare = record(perplexity(None, 9.0)).model_copy(update={"source": None})
    verdict = of_evaluation(bare)
    assert "without a divergence from its source" in verdict.headline and verdict.note == ""
    said = " / ".join(verdict.not_tested)
    assert "give --source" in said and "--suite full does" in said and "an engine's kernels" in said
    short = of_evaluation(record(*divergence(0.1, 1e-5), needles(8, 8, 8, exercises_msa=False)))
    said = " / ".join(short.not_tested)
    assert "contexts of more than 8,192 tokens" in said and "MSA" in said and "--source" not in said
    full = sample_record()
    said = " / ".join(of_evaluation(full).not_tested)
    assert "perplexity-llama-cpp: the server offers no prompt log-probs" in said and "MSA" not in said
    served = full.model_copy(update={"computed": None})
    assert "kernels" not in " ".join(of_evaluation(served).not_tested)


def test_a_divergence_of_the_conversions_own_pass_is_said_to_flatter() -> None:
    """It stands in the record of every calibrated output, measured on other text than the suite's."""
    (own,) = divergence(0.004, None)
    own.task = HELDOUT_TASK
    alone = of_evaluation(record(perplexity(None, 9.0), own))
    assert "it flatters" in finding(alone, "KL").meaning and any("KL divergence" in one for one in alone.not_tested)
    both = of_evaluation(record(*divergence(0.1, 1e-5), perplexity(9.0, 9.1), own))
    assert "clearly different" in both.headline and "flatters" not in finding(both, "KL").meaning
    assert Compared("a", 1, record(own)).kl is None


def test_a_conversion_has_a_verdict_too() -> None:
    facts = report().facts
    verdict = of_conversion(facts["heldout"], facts["coverage"])
    assert verdict.headline == "The output is close to its source."
    assert "A conversion measures no noise floor" in finding(verdict, "KL").meaning
    assert finding(verdict, "coverage").bad and "starved" in finding(verdict, "coverage").value
    unknown = of_conversion({**facts["heldout"], "perplexity_source": 4481.0}, None)
    assert "does not know the held-out text" in unknown.headline and finding(unknown, "perplexity").bad
    nothing = of_conversion(None, None)
    assert nothing.headline.startswith("Not measured") and nothing.findings == []


EVALUATION, CONVERSION = evaluation_html.page(sample_record()), conversion_html.page(report())


@pytest.mark.parametrize("html", [EVALUATION, CONVERSION], ids=["evaluation", "conversion"])
def test_a_page_is_the_verdict_then_pictures_then_tables(html: str) -> None:
    body = html[html.index("<body>") :]
    verdict, first = body.index('class="verdict"'), body.index("<h2>")
    assert body.index("<h1>") < verdict < first and "Not tested" in body[verdict:first]
    pictures = [found.start() for found in re.finditer('<svg|class="heat"', body)]
    tables = [found.start() for found in re.finditer('<table class="(?:few|many|pairs)"', body)]
    assert len(pictures) > 2 and len(tables) > 2 and max(pictures) < min(tables)


@pytest.mark.parametrize("html", [EVALUATION, CONVERSION], ids=["evaluation", "conversion"])
def test_every_chart_has_a_legend_and_a_hint_that_it_scrolls(html: str) -> None:
    charts = re.findall(r"(<p class=\"soft key\">[^\n]*\n)?<figure>(.*?)</figure>", html, re.S)
    assert len(charts) == html.count("<svg") > 2
    for key, figure in charts:
        assert 'class="chip' in key or "(logarithmic)" in figure, figure[:200]
        assert '<div class="scroll" tabindex="0"><svg' in figure and 'class="hint"' in figure
    grids = re.findall(r'<table class="heat">.*?</table></div>\n(.*?)\n', html, re.S)
    assert all(key.count('class="patch') == 7 for key in grids) and len(grids) == (2 if html is EVALUATION else 0)


@pytest.mark.parametrize("html", [EVALUATION, CONVERSION], ids=["evaluation", "conversion"])
def test_a_wide_table_keeps_the_name_of_every_column_on_a_phone(html: str) -> None:
    """There each row becomes a list of names and cells: a cell without its name would be a bare number."""
    wide = re.findall(r'<table class="many">.*?</table>', html, re.S)
    assert wide
    for table in wide:
        head = re.findall(r"<th(?: [^>]*)?>(.*?)</th>", table)
        for row in re.findall(r"<tr>(<td.*?)</tr>", table):
            assert re.findall(r'data-label="(.*?)"', row) == head
    for table in re.findall(r'<table class="few">.*?</table>', html, re.S):
        assert len(re.findall("<th[ >]", table)) <= 4
