"""A compose file that runs what `m3quant serve` would start, in an engine's container image with m3quant in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import m3quant
from m3quant import __version__

from .fit import Fit
from .launch import KILL_GRACE_S
from .serve_recipe import ServeRecipe

IN_IMAGE = "/opt/m3quant"  # as in the Dockerfile
HUB_CACHE = "${HF_HOME:-~/.cache/huggingface}:/root/.cache/huggingface"


def compose_file(engine_command: Sequence[str], env: dict[str, str], secret: frozenset[str], fit: Fit, recipe: ServeRecipe, image: str,
                 api_key_env: str | None) -> str:  # fmt: skip
    """engine_command: what follows the image's entry point. Folders are mounted read-only under their own names, so that the arguments and
    the model's name stay; for a checkpoint or draft on the Hub the cache is mounted, so that it is downloaded once."""
    environment = {
        name: (f"${{{api_key_env}:?}}" if name in secret else _no_variable(value)) for name, value in env.items()
    }
    built, volumes = _with_m3quant(image)
    models = [fit.model.where, *([fit.setup.draft.where] if fit.setup.draft else [])]
    folders = [model for model in models if Path(model).is_dir()]
    volumes += [_mount(folder, folder) for folder in folders]
    if len(folders) < len(models):
        volumes.append(HUB_CACHE)
    service = {
        **built,
        "command": [_no_variable(part) for part in engine_command],
        "environment": {"PYTHONPATH": IN_IMAGE} | environment,
        "volumes": volumes,
        "ports": [f"127.0.0.1:{recipe.port}:{recipe.port}"],
        "ipc": "host",
        "stop_grace_period": f"{int(recipe.shutdown_timeout + KILL_GRACE_S)}s",
        "restart": "on-failure:3",
        "deploy": {"resources": {"reservations": {"devices": [{"driver": "nvidia", "count": fit.node.count, "capabilities": ["gpu"]}]}}},
        "healthcheck": {
            "test": ["CMD", "curl", "-sf", f"http://127.0.0.1:{recipe.port}/health"],
            "interval": "10s", "timeout": "5s", "start_period": f"{recipe.start_timeout}s",
        },
    }  # fmt: skip
    head = f"# Written by m3quant {__version__}: docker compose up. {fit.node.name}, {fit.pool.tokens:,} KV tokens planned.\n"
    return head + yaml.safe_dump({"services": {"m3quant": service}}, sort_keys=False, width=1000)


def _with_m3quant(image: str) -> tuple[dict[str, Any], list[Any]]:
    """The image, built with the checkout's Dockerfile; from a wheel, the engine's own with the installed package mounted: it is pure Python."""
    package = Path(next(iter(m3quant.__path__))).resolve()
    if (package.parent / "Dockerfile").is_file():
        return {"build": {"context": _no_variable(str(package.parent)), "args": {"BASE": image}}}, []
    return {"image": image}, [_mount(str(package), f"{IN_IMAGE}/m3quant")]


def _mount(source: str, target: str) -> dict[str, Any]:
    return {"type": "bind", "source": _no_variable(source), "target": _no_variable(target), "read_only": True}


def _no_variable(text: str) -> str:
    """As compose reads it: `$NAME` would be a variable."""
    return text.replace("$", "$$")
