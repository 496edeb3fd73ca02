#!/bin/bash
# Run a command with this tree importable as m3quant, without installing it: on_gpu_machine.sh COMMAND...
# For GPU machines whose Python already has torch, transformers and pydantic but no index to install from.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
site=$(mktemp -d)
cp -r "$root/m3quant" "$site/"
cp -r "$root/calibration" "$root/recipes" "$root/runtime" "$site/m3quant/"
export PYTHONPATH="$site:$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONSAFEPATH=1 # the tree itself, which has no m3quant/calibration, must come last, for tests
exec "$@"
