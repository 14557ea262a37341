"""A DiT's generation, dense and rewritten, in one process with paired runs: what a plan costs and saves.

    .venv/tests/bin/python benches/end_to_end.py [--tokens 1024 4096] [--threads 1 2] [--layers 1] [--width 1152] [--heads 16] [--runs 9]

Needs `cargo build --release` and the packages onnxruntime, onnx and numpy; takes some twenty minutes on two cores. Dense is the faster of the
exported graph and of the same graph with its attention fused into ONNX Runtime's MultiHeadAttention; both run before, in the middle of and
after every generation. Printed are medians over generations of a step's time relative to theirs, the same as predicted by counting
multiplications, and how much of what was predicted to be saved was saved. `--clock cpu` compares CPU time in place of wall time, for a
machine that others use too; threads that wait do not spin then.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "python"))
import host  # noqa: E402
import synthetic  # noqa: E402
from conftest import stats, tool  # noqa: E402

# The steps of plans, for all layers, and at which of them what is measured. The first has every method once; its last
# `asc` keeps its output for `ast`. The paper's plans mix methods, D6 more boldly than D3.
METHODS = ["full", "full", "wa-rs", "wa-rs+asc", "asc", "asc", "ast"]
D3 = ["full", "wa-rs", "wa-rs", "asc", "full", "wa-rs", "wa-rs+asc", "ast"]
D6 = ["full", "wa-rs+asc", "ast", "wa-rs+asc", "ast", "full", "wa-rs+asc", "ast", "ast", "wa-rs+asc"]
PLANS = [
    (METHODS, {"full": [0], "full + capture": [1], "wa-rs": [2], "wa-rs+asc": [3], "asc": [4], "ast": [6]}),
    (D3, {"like D3": range(len(D3))}),
    (D6, {"like D6": range(len(D6))}),
]


# Generations: with three of 1024 tokens, a second each, a neighbour decides what is a hundredth more or less.
RUNS = {1024: 9, 4096: 3}


def work(step, tokens, width):
    """Multiplications of one layer under a directive, for one token of width 1: of its attention module, and of the rest."""
    half = tokens // 8
    visible = sum(min(tokens, i + half + 1) - max(0, i - half) for i in range(tokens)) / tokens
    core = 2 * (visible if step.startswith("wa-rs") else tokens)
    module = (4 * width + core) * (0.5 if step.endswith("asc") else 1)
    return 0 if step == "ast" else module, 8 * width


def main():
    parser = argparse.ArgumentParser()
    for name, value in (("layers", 1), ("width", 1152), ("heads", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--runs", type=int, help=f"generations; without it as many as a size needs: {RUNS}")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(RUNS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    args = parser.parse_args()
    print(host.about(args.clock))
    print(f"layers: {args.layers}, width {args.width}, {args.heads} heads, batch 2, float32; generations: {args.runs or RUNS}\n")
    print("| tokens | threads | steps | / exported | / fused | predicted | saved / predicted | goal missed |\n|---:|---:|---|---:|---:|---:|---:|---|")
    for tokens in args.tokens:
        with tempfile.TemporaryDirectory() as folder:
            for threads in args.threads:
                compare(args, Path(folder), tokens, threads)


def compare(args, folder, tokens, threads):
    """Prints the lines of one size."""
    clock = host.clock(args.clock)
    model, fused = folder / "dit.onnx", folder / "fused.onnx"
    size = (args.layers, args.width, args.heads, tokens)
    synthetic.dit(model, *size)
    synthetic.dit(fused, *size, fused=True)
    spin = args.clock == "wall"
    dense = {"exported": host.session(str(model), threads, spin), "fused": host.session(str(fused), threads, spin)}
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, tokens, args.width), dtype=np.float32)

    last = None

    def run(session, step, request=None):
        feed = {"x": x, "timestep": np.full(2, 1000 - step)}
        if request is not None:
            feed |= {"dfa_request_id": np.array(request), "dfa_start": np.array(step == 0)}
        session.run(None, feed)

    def timed(session, step, request=None):
        nonlocal last
        if session is not last:
            time.sleep(host.PAUSE)
            # The first product after a pause takes a quarter longer, 2 % of a layer of 1024 tokens: that is not to be
            # paid by dense graphs only, whose runs always follow one.
            run(session, 0, None if request is None else request + 1)
        last = session
        start = clock()
        run(session, step, request)
        return clock() - start

    for steps, measured in PLANS:
        plan = {"format": "ditfastattn-plan", "version": 1, "cfg": "cond-first", "steps": [[step] * args.layers for step in steps],
                "timesteps": [1000 - t for t in range(len(steps))]}  # fmt: skip
        (folder / "plan.json").write_text(json.dumps(plan))
        tool(model, "--plan", folder / "plan.json", "--force", "--quiet")
        planned = host.session(str(folder / "dit.dfa.onnx"), threads, spin)
        rounds = []
        for _ in range(args.runs or RUNS.get(tokens, 3)):
            times, beside = [], {name: [] for name in dense}
            for step in range(len(steps)):
                if step in (0, len(steps) // 2):
                    for name in dense:
                        beside[name].append(timed(dense[name], step))
                times.append(timed(planned, step, 1))
            for name in dense:
                beside[name].append(timed(dense[name], 0))
            rounds.append((times, {name: statistics.median(each) for name, each in beside.items()}))
        # A plan that is not served would be measured as dense.
        assert stats()["misses"] == 0, stats()
        for name, at in measured.items():
            print(line(name, [steps[t] for t in at], at, rounds, (tokens, args.width), f"| {tokens} | {threads}"), flush=True)


def line(name, steps, at, rounds, size, head):
    """A line of the table: time relative to the dense graphs, and the saving beside what multiplications predict."""
    ratio = {
        dense: statistics.median(sum(times[t] for t in at) / len(at) / beside[dense] for times, beside in rounds)
        for dense in ("exported", "fused")
    }
    slower = max(ratio.values())
    module, rest = zip(*(work(step, *size) for step in steps))
    predicted = (sum(module) + sum(rest)) / (len(steps) * sum(work("full", *size)))
    if predicted < 1:
        share = (1 - slower) / (1 - predicted)
        saved, missed = f"{share:.2f}", "≥ 0.95" if share < 0.95 else "–"
    else:
        # What capturing may cost is a goal of the operator alone.
        saved, missed = "–", "≤ 1.00" if name == "full" and slower > 1 else "–"
    return f"{head} | {name} | {ratio['exported']:.3f} | {ratio['fused']:.3f} | {predicted:.3f} | {saved} | {missed} |"


if __name__ == "__main__":
    main()
