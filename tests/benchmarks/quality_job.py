"""What `quality` asks of another program: JOB.json, the only argument of the modules that run in their environments."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def read_job() -> dict[str, Any]:
    """The job. Hides the GPUs from this process if it is for the CPU, so it comes before torch is imported."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    if job["device"] == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return job
