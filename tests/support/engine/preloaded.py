"""Runs scripts in forks of one process that has imported vLLM, whose import takes longer than a tiny model's load and scoring together.

Started by running.py in the engine's Python. Each line of standard input is a JSON list [log file, script, argument, ...]; the answer is a line
with the exit code. A script finds what it would find in a new process, but modules are imported and vLLM's plugins loaded already. Nothing
here computes or starts a thread before the fork: a fork has only the thread that called it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import sys
import threading
from pathlib import Path

# Beyond `import vllm` and the plugins: what an engine in the same process imports when it is made.
MODULES = ("vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    registry = importlib.import_module("vllm.model_executor.models.registry")
    for name in MODULES:
        importlib.import_module(name)
    # vLLM inspects a model's class in a new process, to leave CUDA alone; here that is another import of vLLM.
    registry._run_in_subprocess = lambda function: function()
    gc.freeze()  # collections in the forks then pass over what was imported, and its pages stay shared
    if threading.active_count() > 1:
        raise SystemExit(f"an import started threads: {threading.enumerate()}")
    for line in sys.stdin:
        print(run(*json.loads(line)), file=answers, flush=True)
    os._exit(0)  # as probe.py ends: what the libraries do at an exit is not for a test's output


def run(log: str, script: str, *arguments: str) -> int:
    """Exit code of the script in a process of its own, in a session of its own, with its output in `log`."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
            os.dup2(file, number)
        sys.argv = [script, *arguments]
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")
        code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
