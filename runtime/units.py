"""Files that run `m3quant serve` under a service manager: a systemd unit and a compose file."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from m3quant import __version__

from .fit import Fit
from .launch import KILL_GRACE_S
from .serve_recipe import ServeRecipe


def systemd_unit(program: Sequence[str], fit: Fit, recipe: ServeRecipe, api_key_env: str | None) -> str:
    """A unit that runs `program` (m3quant serve ...) where it was written: paths in it may be relative. The key comes from a file that only root reads, never from the unit."""
    key = f"# one line, mode 0600: {api_key_env}=...\nEnvironmentFile=/etc/m3quant/serve.env\n" if api_key_env else ""
    quoted = " ".join(_literal(part).replace("$", "$$") for part in map(shlex.quote, program))
    return f"""# Written by m3quant {__version__}. Install: copy to /etc/systemd/system/m3quant.service, systemctl daemon-reload, systemctl enable --now m3quant
[Unit]
Description=m3quant: {_literal(fit.model.where)} on {fit.node.name}
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=600
StartLimitBurst=3

[Service]
Type=exec
{key}WorkingDirectory={_literal(str(Path.cwd()))}
ExecStart={quoted}
Restart=on-failure
RestartSec=10
# Exit codes of m3quant that a restart cannot mend: bad input, does not fit
RestartPreventExitStatus=2 3
KillSignal=SIGTERM
KillMode=mixed
TimeoutStartSec={recipe.start_timeout}
TimeoutStopSec={int(recipe.shutdown_timeout + KILL_GRACE_S + 15)}
LimitNOFILE=65536
LimitMEMLOCK=infinity

[Install]
WantedBy=multi-user.target
"""


def _literal(text: str) -> str:
    """Without systemd's specifiers (%n, ...)."""
    return text.replace("%", "%%")


def compose_file(engine_command: Sequence[str], env: dict[str, str], secret: frozenset[str], fit: Fit, recipe: ServeRecipe, image: str,
                 api_key_env: str | None) -> str:  # fmt: skip
    """A compose file around an engine's image with m3quant in it (for the guard). The checkpoint is mounted read-only; of one on the
    Hub the cache is mounted instead, so that it is downloaded once."""
    where = fit.model.where
    local = Path(where).is_dir()
    mounted = (
        f"{_no_variable(where)}:/model:ro" if local else "${HF_HOME:-~/.cache/huggingface}:/root/.cache/huggingface"
    )
    arguments = ["/model" if local and part == where else _no_variable(part) for part in engine_command]
    environment = {
        name: (f"${{{api_key_env}:?}}" if name in secret else _no_variable(value)) for name, value in env.items()
    }
    service = {
        "build": {"dockerfile_inline": f"FROM {image}\nRUN pip install --no-deps m3quant=={__version__}\n"},
        "command": arguments,
        "environment": environment,
        "volumes": [mounted],
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


def _no_variable(text: str) -> str:
    """As compose reads it: `$NAME` would be a variable."""
    return text.replace("$", "$$")
