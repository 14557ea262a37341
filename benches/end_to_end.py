"""A DiT's step, dense and rewritten, in one process with paired runs: what a plan costs and saves.

    .venv/bin/python benches/end_to_end.py [--layers 2] [--tokens 1024] [--width 1152] [--heads 16] [--threads 2]

Needs `cargo build --release` and the packages onnxruntime, onnx and numpy. Prints the median ratio of paired runs; times of
different machines are not comparable, ratios are.
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
from conftest import session, stats, tool  # noqa: E402

# One row per plan, repeated over the steps; what each costs is compared with the dense graph.
PLANS = {
    "all full": ["full"],
    "full + capture": ["full", "wa-rs"],
    "wa-rs": ["wa-rs"],
    "wa-rs+asc": ["wa-rs+asc"],
    "asc": ["asc"],
    "ast": ["ast"],
}
STEPS = 12


def main():
    parser = argparse.ArgumentParser()
    for name, value in (("layers", 2), ("tokens", 1024), ("width", 1152), ("heads", 16), ("threads", 2), ("runs", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = folder / "dit.onnx"
        synthetic.dit(model, args.layers, args.width, args.heads, args.tokens)
        dense = session(model, custom_ops=False, threads=args.threads)
        rng = np.random.default_rng(1)
        x = rng.standard_normal((2, args.tokens, args.width), dtype=np.float32)

        def feed(step):
            return {"x": x, "timestep": np.full(2, 1000 - step)}

        def timed(session, step, extra):
            start = time.perf_counter()
            session.run(None, feed(step) | extra)
            return time.perf_counter() - start

        cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.processor())
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        print(f"{cpu}, {args.threads} threads, onnxruntime {ort.__version__}, commit {commit}, {time.strftime('%Y-%m-%d')}")
        print(f"{args.layers} layers, width {args.width}, {args.heads} heads, {args.tokens} tokens, batch 2; time / dense time")
        for name, rows in PLANS.items():
            steps = [["full"] * args.layers] + [[rows[t % len(rows)]] * args.layers for t in range(STEPS - 1)]
            plan = {"format": "ditfastattn-plan", "version": 1, "cfg": "cond-first", "steps": steps,
                    "timesteps": [1000 - t for t in range(STEPS)]}  # fmt: skip
            (folder / "plan.json").write_text(json.dumps(plan))
            tool(model, "--plan", folder / "plan.json", "--force", "--quiet")
            planned = session(folder / "dit.dfa.onnx", threads=args.threads)
            ratios = []
            for run in range(args.runs):
                # "full + capture" measures every other step, whose residual the next one reads.
                for step in range(STEPS):
                    extra = {"dfa_request_id": np.array(run + 1)}
                    measured = timed(planned, step, extra)
                    if step == 0 or (name == "full + capture" and step % 2 == 0):
                        continue
                    if step % 3 == 0 or name == "full + capture":
                        ratios.append(measured / timed(dense, step, {}))
            # A plan that is not served would be measured as dense.
            assert stats()["misses"] == 0, stats()
            print(f"  {name:15} {statistics.median(ratios):.3f}   ({len(ratios)} pairs)", flush=True)


if __name__ == "__main__":
    main()
