"""What `bench_gpu` measured, as the tables of docs/serving.md and as sets of runtime/measured.yaml.

    python -m tests.benchmarks.bench_gpu_table                       # the tables, of tests/benchmarks/figures/h200*_bench_*.json
    python -m tests.benchmarks.bench_gpu_table --into docs/serving.md        # written between the page's two marks
    python -m tests.benchmarks.bench_gpu_table --yaml                # the sets for runtime/measured.yaml

Files of one preset make one table and one set, a point measured later (on one day: of the later file) in place of an earlier one. A start that
gave no figure, a rehearsal, and a point whose requests had to wait for the cache, are in no set.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from m3quant.recipe.recipe import build_recipe, named_recipe
from m3quant.runtime.cost import decode_bound
from m3quant.runtime.fit import Ask, assess
from m3quant.runtime.hardware import parse_node
from m3quant.runtime.measured import measured_sets
from m3quant.runtime.model import open_subject
from tests.benchmarks.bench_gpu import PRESETS, THROUGH
from tests.support.paths import TESTS

FIGURES = TESTS / "benchmarks" / "figures"
BEGIN, END = "<!-- bench_gpu_table -->", "<!-- end of bench_gpu_table -->"


def figure_files() -> list[Path]:
    """What `bench_gpu` measured and is kept."""
    return sorted(FIGURES.glob("h200*_bench_*.json"))


def good_rows(start: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that say how fast the engine is, short contexts first."""
    rows = [row for row in start["rows"] if not row["rehearsal"] and not row["queued"]]
    return sorted(rows, key=lambda row: (row["context"], row["concurrency"]))


SERVER = ("pool_tokens", "kv_dtype", "max_num_seqs", "max_num_batched_tokens")  # what starts of one name share


def merged(documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One document a preset for the points, one for the flags, whose first line is the points' start where `base` was not measured.

    Raises ValueError for files of one preset that are of different recipes, nodes, engines or servers.
    """
    found = dict[tuple[str, bool], dict[str, Any]]()
    for document in sorted(documents, key=lambda document: document["measured"]):
        if not document["starts"]:
            continue
        whole = found.setdefault((document["preset"], is_grid(document)), {**document, "starts": []})
        for key in ("recipe", "machine"):
            if whole[key] != document[key]:
                raise ValueError(
                    f"{document['preset']}: measured with {key} {whole[key]} and {document[key]}: give one file of them"
                )
        whole["measured"] = document["measured"]
        starts = {start["name"]: start for start in whole["starts"]}
        for start in document["starts"]:
            starts[start["name"]] = _joined(starts.get(start["name"]), start, document["preset"])
        whole["starts"] = list(starts.values())
    for (preset, grid), document in found.items():
        if not grid and not any(start["name"] == "base" for start in document["starts"]):
            points = found.get((preset, True), {"starts": []})["starts"]
            document["starts"][:0] = [{**start, "name": "base"} for start in points if start["name"] == "guard"]
    return list(found.values())


def _joined(known: dict[str, Any] | None, start: dict[str, Any], preset: str) -> dict[str, Any]:
    """The points of two starts of one name, `start` the later. One without a figure failed, perhaps by what it was given: the other counts."""
    if known is None or not good_rows(known):
        return start
    if not good_rows(start):
        return known
    if any(known.get(key) != start.get(key) for key in SERVER):
        raise ValueError(
            f"{preset}, start {start['name']}: measured with different caches or limits: give one file of them"
        )
    points = {(row["concurrency"], row["context"]): row for row in [*good_rows(known), *good_rows(start)]}
    return {**known, "rows": list(points.values())}


def shipped_table() -> list[str]:
    """The figures of runtime/measured.yaml, by which `plan` and the card estimate."""
    lines = [
        "| output, node | requests | tokens of each | decoding, tokens/s | of bound |",
        "|---|---:|---:|---:|---:|",
    ]
    for known in measured_sets():
        for requests, context, speed, bound in known.figures:
            cells = (f"`{known.recipe}`, {known.gpus}x{known.gpu}", requests, f"{context:,}", f"{speed:,.0f}", f"{speed / bound:.0%}")  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def grid_table(document: dict[str, Any]) -> list[str]:
    """Every point through the guard, with what the engine gave without it; latencies are of the guard's start where it has the point."""
    starts = {start["name"]: start for start in document["starts"]}
    guarded, alone = (
        {(row["context"], row["concurrency"]): row for row in good_rows(starts.get(name, {"rows": []}))}
        for name in ("guard", "engine")
    )
    lines = [
        _caption(document, starts.get("guard") or starts["engine"]),
        "",
        "| at once | context | tokens/s | of bound | without the guard | TTFT p50, ms | ITL p50 | ITL p99 |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for point in sorted({*guarded, *alone}):
        own, other = guarded.get(point), alone.get(point)
        row = own or alone[point]
        bound = row["bound_tokens_per_s"]
        cells = [
            f"{row['concurrency']}", f"{row['context']:,}", f"{own['steady_tokens_per_s']:,.0f}" if own else "",
            f"{own['steady_tokens_per_s'] / bound:.0%}" if own and bound else "", f"{other['steady_tokens_per_s']:,.0f}" if other else "",
            f"{row['ttft_ms']['50']:,.0f}", f"{row['itl_ms']['50']:.1f}", f"{row['itl_ms']['99']:.1f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def flags_table(document: dict[str, Any]) -> list[str]:
    """One line a start of `--flags`: its pool, and speed and time to the first token at every point."""
    starts = document["starts"]
    changed = [start for start in starts if start["name"] != "base"] or starts
    points = sorted({(row["context"], row["concurrency"]) for start in changed for row in good_rows(start)})
    heads = [f"tokens/s at {requests}, TTFT p50 in ms" for _, requests in points]
    lines = [
        _caption(document, starts[0]),
        "",
        "| start | KV tokens | ready after, s | " + " | ".join(heads) + " |",
        "|---|---:|---:|" + "---:|" * len(points),
    ]
    for start in starts:
        rows = {(row["context"], row["concurrency"]): row for row in good_rows(start)}
        cells = [start["name"], f"{start.get('pool_tokens') or 0:,}" if rows else "", f"{start.get('ready_s', '')}"]
        for point in points:
            row = rows.get(point)
            cells.append(f"{row['steady_tokens_per_s']:,.0f}, {row['ttft_ms']['50']:,.0f}" if row else "not measured")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _caption(document: dict[str, Any], start: dict[str, Any]) -> str:
    machine = document["machine"]
    pool = f"{start['pool_tokens']:,} KV tokens" if start.get("pool_tokens") else "no KV cache"
    cells = f"{start['max_num_batched_tokens']:,} tokens a step, at most {start['max_num_seqs']} requests"
    return (
        f"`{document['recipe']}` ({document['preset']}) on {machine['node']}, vLLM {machine['engine']}, {document['measured']}: "
        f"{start['kv_dtype']} cache, {pool}, {cells}."
    )


def is_grid(document: dict[str, Any]) -> bool:
    return {start["name"] for start in document["starts"]} <= set(THROUGH)


def tables(documents: Sequence[dict[str, Any]]) -> str:
    """All of the page between its marks."""
    parts = [shipped_table(), *(grid_table(d) if is_grid(d) else flags_table(d) for d in merged(documents))]
    return "\n\n".join("\n".join(part) for part in parts)


def with_tables(page: str, text: str) -> str:
    """The page with `text` between its marks. Raises ValueError where they are not there, once each and in order."""
    before, mark, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end or BEGIN in rest or END in after:
        raise ValueError(f"the page needs the lines {BEGIN} and {END}, once each.")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def measured_set(document: dict[str, Any]) -> dict[str, Any]:
    """A set of runtime/measured.yaml, from the start through the guard. The bound is that of the prompt, before the answer.

    Raises ValueError where there is no such start, or no point of it is a figure.
    """
    preset = PRESETS[document["preset"]]
    start = next((start for start in document["starts"] if start["name"] == "guard" and good_rows(start)), None)
    if start is None:
        raise ValueError(
            f"{document['preset']} of {document['measured']} has no figure through the guard: measure it with --through guard"
        )
    model = open_subject(str(preset.source / "config.json")).converted(build_recipe(named_recipe(preset.recipe)))
    node = parse_node(document["machine"]["node"])
    fit = assess(model, node, Ask(kv_dtype=start["kv_dtype"]))
    figures = [
        [row["concurrency"], row["prompt"], round(row["steady_tokens_per_s"], 1), round(decode_bound(fit, row["prompt"], row["concurrency"]), 1)]
        for row in good_rows(start)
    ]  # fmt: skip
    return {
        "model_type": model.family.model_type,
        "recipe": preset.recipe,
        "weights": "int" if any(scheme.kind == "int" for scheme in model.schemes) else "float",
        "stored_bytes": model.stored_bytes,
        "gpu": node.gpu.name,
        "gpus": node.count,
        "source": f"vLLM {document['machine']['engine']}, {document['measured']}, through the guard, max_num_seqs {start['max_num_seqs']}",
        "figures": figures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, nargs="*", help="[tests/benchmarks/figures/h200*_bench_*.json]")
    parser.add_argument("--into", type=Path, help="a page that has the two marks")
    parser.add_argument("--yaml", action="store_true")
    arguments = parser.parse_args()
    paths = arguments.figures or figure_files()
    documents = []
    for path in paths:
        try:
            documents.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            parser.error(f"{path} cannot be read ({error}): give what bench_gpu wrote with --out")
        if (
            not isinstance(documents[-1], dict)
            or not {"preset", "recipe", "measured", "starts", "machine"} <= documents[-1].keys()
        ):
            parser.error(f"{path} is no result of bench_gpu: give what it wrote with --out")
    try:
        if arguments.yaml:
            sets = [measured_set(document) for document in merged(documents) if is_grid(document)]
            print(yaml.safe_dump(sets, sort_keys=False, default_flow_style=None, width=140))
        elif arguments.into:
            page = arguments.into.read_text(encoding="utf-8")
            arguments.into.write_text(with_tables(page, tables(documents)), encoding="utf-8")
        else:
            print(tables(documents))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
