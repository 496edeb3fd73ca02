#!/bin/bash
# Conversions of real-width layers on a GPU machine: conversion_gpu.sh OUT [PART...]
# Parts: check (kernels against their reference, GPU bytes against the CPU's), m2 (one layer: fp8, int4 twice, awq three times, the
# first with nothing compiled), m2x4 (four layers: fp8, int4, awq), m3 (one layer: the same), m3x3 (three layers: awq), m2-fp8, m2x4-fp8
# and m3-mxfp8 (one layer or four from weights stored as the FP8 releases store them: awq, fp8, int4), and with
# llm-compressor on the same files, for which PEER_PYTHON is a Python that has it: peer (one M2 layer: fp8, int4, twice in
# alternation), peer-awq and peer-awq-m3 (one layer: awq), peer-awq-one (M2's with the peer's own default of one window a batch).
# PEER_LIMIT: seconds after which a run of it is stopped. WORK: a folder with 62 GB. Figures of every part are written when it is done.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
out=$1
shift
parts=${*:-check m2 m2x4 m3 m3x3 m2-fp8 m2x4-fp8 m3-mxfp8 peer peer-awq peer-awq-m3 peer-awq-one}
work=${WORK:-$(mktemp -d "$PWD/bench-work.XXXX")}
mkdir -p "$out" "$work"
run() { "$here/on_gpu_machine.sh" python3 -m tests.benchmarks.convert --work "$work" "$@" || failed=1; }
against=(--against llm-compressor --peer-python "${PEER_PYTHON:-python3}" ${PEER_LIMIT:+--peer-limit "$PEER_LIMIT"})
failed=0
for part in $parts; do
  began=$SECONDS
  figures=(--json "$out/$part.json" --chart "$out/$part.html")
  case $part in
    check)
      "$here/on_gpu_machine.sh" python3 -m tests.support.quant.kernel_check cuda || failed=1
      "$here/on_gpu_machine.sh" python3 -m pytest -q -p no:cacheprovider tests/calibration/kernel_cases.py tests/calibration/test_gpu.py || failed=1
      "$here/on_gpu_machine.sh" python3 -m pytest -q -p no:cacheprovider -k "loads or among" tests/convert/test_stacked.py || failed=1
      run --shape m2 --experts 6 --to fp8,int4,fp8-block --repeats 1 --same-bytes --json "$out/check.json"
      run --shape m2 --experts 6 --stored fp8-block --to fp8,int4 --repeats 1 --same-bytes --json "$out/check-fp8.json"
      run --shape m3 --experts 4 --stored mxfp8 --to fp8,int4 --repeats 1 --same-bytes --json "$out/check-mxfp8.json" ;;
    m2)
      run --shape m2 --layers 1 --to awq --repeats 3 --keep --json "$out/m2-awq.json" --chart "$out/m2.html"
      run --shape m2 --layers 1 --to fp8,int4 --repeats 2 --json "$out/m2.json" --chart "$out/m2.html" ;;
    m2x4) run --shape m2 --layers 4 --to awq,fp8,int4 --repeats 1 "${figures[@]}" ;;
    m3) run --shape m3 --layers 1 --to awq,fp8,int4 --repeats 1 "${figures[@]}" ;;
    m2-fp8) run --shape m2 --layers 1 --stored fp8-block --to awq,fp8,int4 --repeats 2 "${figures[@]}" ;;
    m2x4-fp8) run --shape m2 --layers 4 --stored fp8-block --to awq,fp8,int4 --repeats 1 "${figures[@]}" ;;
    m3-mxfp8) run --shape m3 --layers 1 --stored mxfp8 --to awq,fp8,int4 --repeats 1 "${figures[@]}" ;;
    m3x3) run --shape m3 --layers 3 --to awq --repeats 1 "${figures[@]}" ;;
    peer) run --shape m2 --layers 1 --to fp8,int4 --repeats 2 "${against[@]}" "${figures[@]}" ;;
    peer-awq) run --shape m2 --layers 1 --to awq --repeats 1 "${against[@]}" "${figures[@]}" ;;
    peer-awq-m3) run --shape m3 --layers 1 --to awq --repeats 1 "${against[@]}" "${figures[@]}" ;;
    peer-awq-one) run --shape m2 --layers 1 --to awq --repeats 1 --peer-batch 1 "${against[@]}" "${figures[@]}" ;;
    *) echo "no such part: $part"; failed=1 ;;
  esac
  echo "== $part: $((SECONDS - began)) s"
done
rm -rf "$work"
exit $failed
