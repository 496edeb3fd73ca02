#!/bin/bash
# Builds the sdist and, from it, the wheel of the committed tree into dist/, and tries the wheel in a new environment.
#
#   scripts/release.sh [REVISION]      # default HEAD
#   PYTHON=python3.12 TORCH=torch==2.13.0 scripts/release.sh v0.1.0
#
# Publishes nothing. Upload dist/* with twine once this has passed.
set -euo pipefail
cd "$(dirname "$0")/.."
revision=${1:-HEAD}
python=${PYTHON:-python3}
dist=$PWD/dist
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Only what is committed is released: an export of the revision, not the working tree.
mkdir "$work/tree" "$work/elsewhere"
git archive "$revision" | tar -x -C "$work/tree"
commit=$(git rev-parse --short "$revision")

"$python" -m venv "$work/build"
"$work/build/bin/pip" install --quiet --disable-pip-version-check build twine
rm -rf "$dist"
"$work/build/bin/python" -m build --outdir "$dist" "$work/tree" > "$work/build.log" 2>&1 || { cat "$work/build.log" >&2; exit 1; }
"$work/build/bin/twine" check --strict "$dist"/*
"$work/build/bin/python" "$work/tree/scripts/check_dist.py" "$work/tree" "$dist"

# The wheel alone, in a folder without the checkout. TORCH, if it is set, is installed first, so that pip takes that build.
"$python" -m venv "$work/use"
if [ -n "${TORCH:-}" ]; then "$work/use/bin/pip" install --quiet --disable-pip-version-check "$TORCH"; fi
"$work/use/bin/pip" install --quiet --disable-pip-version-check "$dist"/*.whl
cp "$work/tree/tests/data/minimax-m3/config.json" "$work/elsewhere/config.json"
cd "$work/elsewhere"
"$work/use/bin/m3quant" --version
"$work/use/bin/m3quant" plan config.json
"$work/use/bin/python" -m pip check
echo "dist/ holds the release of $commit:"
ls -l "$dist"
