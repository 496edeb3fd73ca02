"""A systemd unit that runs `m3quant serve`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from m3quant import __version__

from .fit import Fit
from .launch import KILL_GRACE_S
from .serve_recipe import ServeRecipe


def systemd_unit(
    program: Sequence[str], fit: Fit, recipe: ServeRecipe, api_key_env: str | None, env: Mapping[str, str]
) -> str:
    """A unit that runs `program` (m3quant serve ...) with `env` where it was written: paths in it may be relative. The key comes from a
    file that only root reads, never from the unit."""
    key = f"# one line, mode 0600: {api_key_env}=...\nEnvironmentFile=/etc/m3quant/serve.env\n" if api_key_env else ""
    quoted = " ".join(_word(part).replace("$", "$$") for part in program)
    variables = "".join(f"Environment={_word(f'{name}={value}')}\n" for name, value in env.items())
    return f"""# Written by m3quant {__version__}. Install: copy to /etc/systemd/system/m3quant.service, systemctl daemon-reload, systemctl enable --now m3quant
[Unit]
Description=m3quant: {_literal(fit.model.where)} on {fit.node.name}
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=600
StartLimitBurst=3

[Service]
Type=exec
{key}{variables}WorkingDirectory={_literal(str(Path.cwd()))}
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


def _word(text: str) -> str:
    """One word of a command line as systemd reads it (systemd.syntax(7), Quoting): its escapes, which are not the shell's."""
    if text and all(c.isalnum() or c in "_@%+=:,./-" for c in text):
        return _literal(text)
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{_literal(escaped)}"'
