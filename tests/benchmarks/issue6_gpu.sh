#!/bin/bash
# Data-free conversion on a GPU machine, in about 200 s on one H200: issue6_gpu.sh OUT [PART...]
# Parts: check (kernels against their reference, GPU bytes against the CPU's), m2 (one layer, fp8 and int4), m2x4 (four layers,
# fp8), m3 (one layer, fp8). PEER_PYTHON: a Python with llmcompressor, to run it in alternation. WORK: a folder with 50 GB.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
out=$1
shift
parts=${*:-check m2 m2x4 m3}
work=${WORK:-$(mktemp -d "$PWD/bench-work.XXXX")}
mkdir -p "$out"
run=$here/on_gpu_machine.sh
against=()
[ -n "${PEER_PYTHON:-}" ] && against=(--against llm-compressor --peer-python "$PEER_PYTHON")
failed=0
for part in $parts; do
  began=$SECONDS
  case $part in
    check)
      "$run" python3 tests/quant/kernel_check.py cuda || failed=1
      "$run" python3 -m tests.benchmarks.convert --shape m2 --experts 6 --to fp8,int4,fp8-block --repeats 1 --same-bytes \
        --work "$work" --json "$out/check.json" | grep -v '^ ' || failed=1 ;;
    m2) "$run" python3 -m tests.benchmarks.convert --shape m2 --layers 1 --to fp8,int4 --repeats 2 "${against[@]}" \
      --work "$work" --json "$out/m2x1.json" --chart "$out/m2x1.html" || failed=1 ;;
    m2x4) "$run" python3 -m tests.benchmarks.convert --shape m2 --layers 4 --to fp8 --repeats 1 "${against[@]}" \
      --work "$work" --json "$out/m2x4.json" --chart "$out/m2x4.html" || failed=1 ;;
    m3) "$run" python3 -m tests.benchmarks.convert --shape m3 --layers 1 --to fp8 --repeats 1 "${against[@]}" \
      --work "$work" --json "$out/m3x1.json" --chart "$out/m3x1.html" || failed=1 ;;
    *) echo "no such part: $part"; failed=1 ;;
  esac
  echo "== $part: $((SECONDS - began)) s"
done
rm -rf "$work"
exit $failed
