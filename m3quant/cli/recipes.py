"""m3quant recipes: the recipes that ship, the schemes and the roles, as --to, --set and --scheme take them."""

from __future__ import annotations

import json
from typing import Any

import click

from ..families import QUANTIZABLE
from ..recipe.recipe import build_recipe, every_name, named_recipe, recipe_folder
from ..schemes import SCHEMES
from .options import print_table


@click.command("recipes")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """The recipes that --to names, the schemes that --set and --scheme take, and the roles they are for."""
    recipes = [_facts(name) for name in every_name()]
    if as_json:
        click.echo(json.dumps({"recipes": recipes, "roles": list(QUANTIZABLE), "schemes": SCHEMES}, indent=2))
        return
    print_table(
        [["--to", "routed experts", "attention", "rounding", ""]]
        + [[r["name"], *_shown(r), r["rounding"], r["about"]] for r in recipes]
    )
    click.echo(f"\nschemes: {SCHEMES}")
    click.echo("llm-compressor's names (--scheme): W2A16 to W8A16, W4A16_ASYM, FP8_DYNAMIC, FP8_BLOCK")
    click.echo(f"roles (--set ROLE=SCHEME): {', '.join(QUANTIZABLE)}")


def _facts(name: str) -> dict[str, Any]:
    recipe = build_recipe(named_recipe(name))
    heading = (recipe_folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    lines = [line.removeprefix("#").strip() for line in heading if line.startswith("#")]
    about = lines[0] if recipe.model else " ".join(lines).split(". ")[0].rstrip(".")
    return {
        "name": recipe.name, "about": f"made by {about}" if recipe.model else about, "format": recipe.format, "rounding": recipe.rounding,
        "schemes": recipe.schemes, "own_layers": bool(recipe.layers), "model": recipe.model.model_dump() if recipe.model else None,
    }  # fmt: skip


def _shown(recipe: dict[str, Any]) -> list[str]:
    by_layer = "by layer" if recipe["own_layers"] else "keep"
    return [
        by_layer if recipe["own_layers"] else recipe["schemes"].get(role, by_layer)
        for role in ("routed_experts", "attention")
    ]
