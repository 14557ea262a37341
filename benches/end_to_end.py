"""A DiT's generation, dense and rewritten, in one process with paired runs: what a plan costs and saves.

    .venv/tests/bin/python benches/end_to_end.py [--tokens 1024] [--layers 2] [--width 1152] [--heads 16] [--threads 2]

Needs `cargo build --release` and the packages onnxruntime, onnx and numpy. Dense is the faster of the exported graph and of the same
graph with its attention fused into ONNX Runtime's MultiHeadAttention. Each step of a generation is run by all of them, in turn; printed are
medians over generations: time relative to dense, the same as predicted by counting multiplications, and how much of what
was predicted to be saved was saved. `--clock cpu` compares CPU time in place of wall time, for a machine that others use too.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "python"))
import synthetic  # noqa: E402
from conftest import TARGET, stats, tool  # noqa: E402

# The steps of a plan, for all layers. The first of the plans of one method is full and is not measured; nor are, in
# "full + capture", those that read what was captured. The paper's plans mix methods, D6 more boldly than D3.
PLANS = {
    "all full": ["full"] * 6,
    "full + capture": ["full", "wa-rs"] * 3,
    "wa-rs": ["full"] + ["wa-rs"] * 5,
    "wa-rs+asc": ["full"] + ["wa-rs+asc"] * 5,
    "asc": ["full"] + ["asc"] * 5,
    "ast": ["full"] + ["ast"] * 5,
    "like D3": ["full", "wa-rs", "wa-rs", "asc", "full", "wa-rs", "wa-rs+asc", "ast"],
    "like D6": ["full", "wa-rs+asc", "ast", "wa-rs+asc", "ast", "full", "wa-rs+asc", "ast", "ast", "wa-rs+asc"],
}


def measured(name, steps):
    if name.startswith("like"):
        return range(len(steps))
    return range(0, len(steps), 2) if name == "full + capture" else range(1, len(steps))


def work(step, tokens, width):
    """Multiplications of one layer under a directive, for one token of width 1: of its attention module, and of the rest."""
    half = tokens // 8
    visible = sum(min(tokens, i + half + 1) - max(0, i - half) for i in range(tokens)) / tokens
    core = 2 * (visible if step.startswith("wa-rs") else tokens)
    module = (4 * width + core) * (0.5 if step.endswith("asc") else 1)
    return 0 if step == "ast" else module, 8 * width


def session(model, threads, spin):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.register_custom_ops_library(str(TARGET / "libditfastattn.so"))
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def main():
    parser = argparse.ArgumentParser()
    for name, value in (("layers", 2), ("tokens", 1024), ("width", 1152), ("heads", 16), ("threads", 2), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--plans", nargs="+", default=list(PLANS))
    args = parser.parse_args()
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    spin = args.clock == "wall"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model, fused = folder / "dit.onnx", folder / "fused.onnx"
        size = (args.layers, args.width, args.heads, args.tokens)
        synthetic.dit(model, *size)
        synthetic.dit(fused, *size, fused=True)
        sessions = {"exported": session(model, args.threads, spin), "fused": session(fused, args.threads, spin)}
        rng = np.random.default_rng(1)
        x = rng.standard_normal((2, args.tokens, args.width), dtype=np.float32)

        def timed(session, step, request=None):
            feed = {"x": x, "timestep": np.full(2, 1000 - step)}
            if request is not None:
                feed |= {"dfa_request_id": np.array(request), "dfa_start": np.array(step == 0)}
            start = clock()
            session.run(None, feed)
            return clock() - start

        cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.processor())
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        print(f"{cpu}, {args.threads} threads, onnxruntime {ort.__version__}, commit {commit}, {time.strftime('%Y-%m-%d')}, {args.clock} time")
        print(f"{args.layers} layers, width {args.width}, {args.heads} heads, {args.tokens} tokens, batch 2")
        print("plan            | /exported | /fused | /dense | predicted | saved of predicted")
        for dense in sessions.values():
            timed(dense, 0)
        for name in args.plans:
            steps = PLANS[name]
            plan = {"format": "ditfastattn-plan", "version": 1, "cfg": "cond-first", "steps": [[step] * args.layers for step in steps],
                    "timesteps": [1000 - t for t in range(len(steps))]}  # fmt: skip
            (folder / "plan.json").write_text(json.dumps(plan))
            tool(model, "--plan", folder / "plan.json", "--force", "--quiet")
            planned = session(folder / "dit.dfa.onnx", args.threads, spin)
            totals = []
            for run in range(args.runs + 1):
                total = dict.fromkeys([*sessions, "planned"], 0.0)
                for step in range(len(steps)):
                    times = {"planned": timed(planned, step, 1)}
                    if step not in measured(name, steps) or run == 0:
                        continue
                    times |= {which: timed(dense, step) for which, dense in sessions.items()}
                    for which, t in times.items():
                        total[which] += t
                if run > 0:
                    totals.append(total)
            # A plan that is not served would be measured as dense.
            assert stats()["misses"] == 0, stats()
            ratio = {d: statistics.median(t["planned"] / t[d] for t in totals) for d in sessions}
            ours = max(ratio.values())
            module, rest = zip(*(work(steps[i], args.tokens, args.width) for i in measured(name, steps)))
            full = work("full", args.tokens, args.width)
            predicted = (sum(module) + sum(rest)) / (len(module) * sum(full))
            saved = f"{(1 - ours) / (1 - predicted):6.2f}" if predicted < 1 else "     –"
            print(f"{name:15} | {ratio['exported']:9.3f} | {ratio['fused']:6.3f} | {ours:6.3f} | {predicted:9.3f} | {saved}", flush=True)
            del planned


if __name__ == "__main__":
    main()
