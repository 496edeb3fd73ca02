#!/bin/bash
# Run a command with this tree importable as m3quant, without installing it: on_gpu_machine.sh COMMAND...
# For GPU machines whose Python already has torch, transformers and pydantic but no index to install from.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$@"
