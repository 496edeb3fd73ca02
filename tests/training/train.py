"""Trains one fixture model on one GPU inside a wall-clock budget, exports it and measures what was exported.

    python -m tests.training.train --model tiny-m3 --data build/fixtures --out OUT --seconds 420

Phases, learning rate and the router's bias rate follow the elapsed share of the budget, so the number of steps adapts
to the GPU. Prints loss, held-out perplexity and needle accuracy on the way; writes OUT/<model>/ with figures.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.training import export, needles
from tests.training import tokenizer as tok
from tests.training.data import Shares, loader
from tests.training.model import SPECS, TinyModel


@dataclass(frozen=True)
class Phase:
    until: float  # share of the budget at which the phase ends
    length: int
    select: bool  # M3: attend to the selected blocks only
    shares: Shares


EARLY, MIDDLE, LATE = Shares(0.35, 0.30, 0.03), Shares(0.40, 0.20, 0.03), Shares(0.45, 0.10, 0.02)
PHASES = {
    "tiny-m2": [Phase(0.2, 512, True, EARLY), Phase(0.35, 1024, True, MIDDLE), Phase(1.0, 4096, True, LATE)],
    "tiny-m3": [
        Phase(0.2, 512, False, EARLY),
        Phase(0.32, 1024, False, MIDDLE),
        Phase(0.45, 4096, False, LATE),
        Phase(1.0, 4096, True, LATE),
    ],
}


def learning_rate(done: float, step: int, peak: float, warmup: int = 150) -> float:
    """Linear warm-up by steps, cosine to 2 % by the share of the budget spent."""
    return peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def optimizer(model: TinyModel, device: torch.device) -> torch.optim.Optimizer:
    decay = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embed" not in n and not n.endswith(".gate")]
    ids = {id(p) for p in decay}
    rest = [p for p in model.parameters() if id(p) not in ids]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")


class Evaluation:
    """Held-out measurements with the inference maths (BF16 autocast on a GPU, float32 on a CPU)."""

    def __init__(self, data: Path, device: torch.device) -> None:
        bpe = tok.load(data / "tokenizer.json")
        self.encode = lambda text: list(bpe.encode(text, add_special_tokens=False).ids)
        self.text = self.encode((data / "heldout.txt").read_text("utf-8"))
        self.device = device

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    @torch.no_grad()
    def perplexity(self, model: TinyModel, window: int) -> tuple[float, int, list[Tensor]]:
        """exp(mean nll), tokens scored, tokens per expert and layer; whole windows, first token of each not scored."""
        count = len(self.text) // window
        rows = torch.tensor(self.text[: count * window], device=self.device).view(count, window)
        total, loads = 0.0, []
        for row in rows.split(max(1, 16384 // window)):
            with self.autocast():
                hidden, _, load = model(row)
                logits = model.logits(hidden[:, :-1]).float()
            total += float(F.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten(), reduction="sum"))
            loads.append(torch.stack(load))
        scored = count * (window - 1)
        return math.exp(total / scored), scored, list(torch.stack(loads).sum(0))

    @torch.no_grad()
    def needle(self, model: TinyModel, length: int, count: int, seed: int, distractors: int = 0) -> float:
        """Greedy exact match: every answer token is the arg-max given the right ones before it."""
        prompts = needles.needle_prompts(self.encode, self.text, length, count, seed, distractors)
        generated: list[list[int]] = []
        for start in range(0, count, 4):
            some = prompts[start : start + 4]
            rows = torch.tensor([p.ids + p.answer for p in some], device=self.device)
            with self.autocast():
                hidden, _, _ = model(rows)
                generated += model.logits(hidden[:, -1 - needles.ANSWER_TOKENS : -1]).argmax(-1).tolist()
        return needles.exact_matches(prompts, generated)


def unpack(data: Path) -> None:
    """train.npy next to train.npz, for memory mapping; safe when two trainings start together."""
    if not (data / "train.npy").exists():
        part = data / f"train.{os.getpid()}.npy"
        np.save(part, np.load(data / "train.npz")["train"])
        part.rename(data / "train.npy")


def train(args: argparse.Namespace, model: TinyModel, evaluation: Evaluation, log: Any) -> dict[str, Any]:
    """Runs the phases; returns steps, tokens and seconds. Saves an intermediate checkpoint at 70 % of the budget."""
    device, spec = evaluation.device, model.spec
    opt = optimizer(model, device)
    for moe in model.moes():
        moe.compiled = torch.compile(moe.forward, dynamic=False) if args.compile else moe.forward
    bias_rate, steps, saved, began, last = 1e-3, 0, False, time.monotonic(), 0.0
    evals = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    done = 0.0
    for phase in PHASES[spec.name]:
        batches = iter(
            loader(args.data, phase.length, args.tokens // phase.length, phase.shares, args.seed, args.workers)
        )
        while (done := (time.monotonic() - began) / args.seconds) < phase.until:
            lr = learning_rate(done, steps, args.lr)
            for group in opt.param_groups:
                group["lr"] = lr
            tokens, weights = (t.to(device, non_blocking=True) for t in next(batches))
            tokens = tokens.long()
            with evaluation.autocast():
                hidden, kl, loads = model(tokens[:, :-1], select=phase.select, want_kl=spec.gemma, fast=True)
                logits = model.logits(hidden)
            nll = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
            w = weights.flatten()
            loss = (nll * w).sum() / w.sum()
            (loss + kl).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)
            with torch.no_grad():
                rate = bias_rate * min(1.0, 4 * (1 - done))
                for moe, load in zip(model.moes(), loads, strict=True):
                    moe.bias += rate * torch.sign(load.float().mean() - load.float())
            steps += 1
            if device.type == "cuda" and steps % 8 == 0:
                torch.cuda.synchronize()  # keeps the host from running ahead of the clock
            if time.monotonic() - last > args.log_every:
                last = time.monotonic()
                nll = nll.detach()
                plain = float(nll[w == 1].mean())
                known = w > 1
                answers = float(nll[known].mean()) if bool(known.any()) else float("nan")
                log(
                    f"{last - began:6.1f}s step {steps} L {phase.length} select {phase.select} lr {lr:.2e} "
                    f"text {plain:.3f} answers {answers:.4f} kl {float(kl.detach()):.4f} grad {float(norm):.2f}"
                )
            if evals and done >= evals[0]:
                evals.pop(0)
                model.eval()
                ppl, _, loads = evaluation.perplexity(model, 2048)
                accuracy = evaluation.needle(model, 4096, args.probe, seed=1)
                near = evaluation.needle(model, 1024, args.probe, seed=1)
                model.train()
                spread = max(float(load.max() / load.float().mean()) for load in loads)
                log(
                    f"   {done:.2f} held-out ppl {ppl:.3f} needle 1024 {near:.3f} 4096 {accuracy:.3f} top load {spread:.2f}"
                )
            if not saved and done > 0.7:
                saved = True
                export.save(model, args.out / spec.name, args.ids)
        del batches
    return {
        "steps": steps,
        "tokens_trained": steps * args.tokens,
        "training_seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=sorted(SPECS), required=True)
    parser.add_argument("--data", type=Path, default=Path("build/fixtures"))
    parser.add_argument("--out", type=Path, default=Path("build/fixtures"))
    parser.add_argument("--seconds", type=float, default=420.0, help="wall-clock budget of the training loop")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens per step")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=5)
    parser.add_argument("--probe", type=int, default=64, help="needle prompts per intermediate evaluation")
    parser.add_argument("--final", type=int, default=200, help="needle prompts per length at the end")
    parser.add_argument("--log-every", type=float, default=8.0)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    began = time.monotonic()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unpack(args.data)
    bpe = tok.load(args.data / "tokenizer.json")
    names = {"bos": tok.BOS, "eos": tok.EOS, "image": tok.IMAGE, "video": tok.VIDEO}
    args.ids = {key: bpe.token_to_id(name) for key, name in names.items()}
    model = TinyModel(SPECS[args.model]).to(device)
    evaluation = Evaluation(args.data, device)

    def log(line: str) -> None:
        print(f"[{args.model}] {line}", flush=True)

    log(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(evaluation.text):,} held-out tokens")
    run = train(args, model, evaluation, log)
    folder = args.out / args.model
    export.save(model, folder, args.ids)
    export.load(model, folder)  # from here on: the exported BF16 weights
    tok.write_files(bpe, folder, SPECS[args.model].max_position)
    model.eval()
    figures: dict[str, Any] = {
        "model": args.model,
        "weights": "BF16 as exported; BF16 autocast, float32 residual stream",
    }
    figures["heldout"] = {}
    for window in (1024, 2048, 4096):
        ppl, scored, loads = evaluation.perplexity(model, window)
        figures["heldout"][str(window)] = {"perplexity": round(ppl, 4), "tokens_scored": scored}
    meta = json.loads((args.data / "meta.json").read_text())
    figures["heldout_sha256"] = meta["heldout_sha256"]
    figures["train_text_tokens"] = meta["train_tokens"]
    figures["trigram_baseline"] = meta["trigram"]
    figures["needle_exact_match"] = {
        str(n): {"accuracy": evaluation.needle(model, n, args.final, seed=2), "prompts": args.final}
        for n in (1024, 2048, 4096)
    }
    figures["needle_exact_match_3_distractors"] = {
        "4096": {"accuracy": evaluation.needle(model, 4096, args.final, seed=3, distractors=3), "prompts": args.final}
    }
    figures["expert_load_share_of_mean"] = [
        {
            "min": round(float(load.min() / load.float().mean()), 3),
            "max": round(float(load.max() / load.float().mean()), 3),
        }
        for load in loads
    ]
    figures |= run | {
        "wall_seconds": round(time.monotonic() - began, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": args.seed,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    log(json.dumps(figures))


if __name__ == "__main__":
    main()
