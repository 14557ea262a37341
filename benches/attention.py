"""Our attention operator against ONNX Runtime's own three forms of attention, in one process with paired runs.

    .venv/tests/bin/python benches/attention.py [--dims 64 72 96 128] [--tokens 256 1024 4096 16384] [--threads 1 2]

Needs `cargo build --release` and the packages onnxruntime, onnx and numpy; takes a quarter of an hour on two cores. Every form reads q, k, v
`[batch, tokens, width]` as a projection leaves them and writes such an output: what an exporter's transposes cost belongs to the form that needs
them. Every round runs every form once, in an order that changes; printed are medians over rounds of the ratios inside a round, which drift and
neighbours disturb less than times. `--clock cpu` compares CPU time in place of wall time, for a machine that others use too; threads that wait
do not spin then.
"""

import argparse
import gc
import json
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "python"))
import host  # noqa: E402
from conftest import stats  # noqa: E402

HEADS = 16
FORMS = {
    "decomposed": [("", 17)],
    "Attention": [("", 23)],
    "MultiHeadAttention": [("", 17), ("com.microsoft", 1)],
}
# The half-width of the band in sequence lengths, as in the paper: 15/64 of all pairs.
WINDOW = 1 / 8
# Our actions: the steps of a plan, and what is measured at each. The fourth step keeps its output for the fifth.
STEPS = [("full", "full"), ("full", "capture"), ("wa-rs", "wa-rs"), ("wa-rs", ""), ("ast", "reuse"), ("asc", "asc")]
# Rounds that count; one goes before, but at 16384 tokens, where a run takes 3 to 20 seconds.
ROUNDS = {256: 25, 1024: 9, 4096: 3, 16384: 1}


def info(name, dims, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, dims)


# Up to so many tokens runs go before those that are timed: it takes milliseconds until all threads are awake.
SHORT = 1024
# Whether threads that wait spin, as they do by default; not where their CPU time is what is measured.
SPIN = True


def session(nodes, inputs, outputs, initializers, opsets, threads):
    graph = helper.make_graph(nodes, "attention", inputs, outputs, initializers)
    opsets = [helper.make_opsetid(*o) for o in opsets]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return host.session(model.SerializeToString(), threads, SPIN)


def host_form(form, batch, tokens, dim, threads):
    """One of ONNX Runtime's own forms."""
    width, scale = HEADS * dim, dim**-0.5
    qkv = [info(n, [batch, tokens, width]) for n in "qkv"]
    initializers = []
    if form == "MultiHeadAttention":
        nodes = [helper.make_node(form, ["q", "k", "v"], ["o"], domain="com.microsoft", num_heads=HEADS, scale=scale)]
    elif form == "Attention":
        nodes = [helper.make_node(form, ["q", "k", "v"], ["o"], q_num_heads=HEADS, kv_num_heads=HEADS, scale=scale)]
    else:
        for name, values in (("heads", [0, 0, HEADS, dim]), ("joined", [0, 0, width])):
            initializers.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        initializers.append(helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]))
        nodes = []
        for name, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
            nodes.append(helper.make_node("Reshape", [name, "heads"], [f"{name}4"]))
            nodes.append(helper.make_node("Transpose", [f"{name}4"], [f"{name}t"], perm=perm))
        nodes += [
            helper.make_node("MatMul", ["qt", "kt"], ["scores"]),
            helper.make_node("Mul", ["scores", "scale"], ["scaled"]),
            helper.make_node("Softmax", ["scaled"], ["weights"], axis=-1),
            helper.make_node("MatMul", ["weights", "vt"], ["ot"]),
            helper.make_node("Transpose", ["ot"], ["o4"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", ["o4", "joined"], ["o"]),
        ]
    return session(nodes, qkv, [info("o", [batch, tokens, width])], initializers, FORMS[form], threads)


def our_form(rows, batch, tokens, dim, threads):
    """Our operator under a plan of one layer, a row for each step."""
    plan = {"format": "ditfastattn-plan", "version": 1, "cfg": "cond-first", "window": WINDOW,
            "steps": [[row] for row in rows], "timesteps": [1000 - t for t in range(len(rows))]}  # fmt: skip
    shape = [batch, tokens, HEADS, dim]
    inputs = [info(n, shape) for n in "qkv"] + [info("t", [], TensorProto.INT64), info("id", [], TensorProto.INT64)]
    flags = [helper.make_tensor("no", TensorProto.BOOL, [], [False])]
    step = ["t", "id", "start", "no", "q"]
    inputs.append(info("start", [], TensorProto.BOOL))
    layouts = {f"{n}_layout": "BSHD" for n in "qkvo"}
    nodes = [
        helper.make_node("DiTFastAttnStep", step, ["ticket", "skip"], domain="ai.ditfastattn",
                         contract=1, layers=1, plan=json.dumps(plan), core_layers=[0]),
        helper.make_node("DiTFastAttn", ["q", "k", "v", "ticket"], ["o"], domain="ai.ditfastattn",
                         layer=0, form="core", **layouts),
    ]  # fmt: skip
    return session(nodes, inputs, [info("o", shape)], flags, [("", 17), ("ai.ditfastattn", 1)], threads)


def host_value(value):
    """A tensor where the host's allocator puts those between two nodes: on a cache line, as numpy's rarely are."""
    memory = np.empty(value.size + 16, np.float32)
    start = -memory.ctypes.data % 64 // 4
    aligned = memory[start : start + value.size].reshape(value.shape)
    aligned[...] = value
    return ort.OrtValue.ortvalue_from_numpy(aligned)


class Case:
    """A session and its tensors. `steps`: what is measured at each step of our plan; `None` for the host's forms."""

    def __init__(self, session, tensors, clock, steps=None):
        self.session, self.clock, self.steps = session, clock, steps
        self.short = tensors["q"].shape[1] <= SHORT
        self.binding = session.io_binding()
        for name, value in tensors.items():
            if steps is None:
                value = value.reshape(*value.shape[:2], -1)
            self.binding.bind_ortvalue_input(name, host_value(value))
        # The output has the shape of each input.
        self.out = host_value(np.zeros_like(value))
        self.binding.bind_ortvalue_output("o", self.out)

    def run(self, name):
        """The times of one round, by what was measured."""
        time.sleep(host.PAUSE)
        if self.short:
            self.step(0)
            start = time.perf_counter()
            while time.perf_counter() < start + host.PAUSE:
                self.timed()
        if self.steps is None:
            return {name: self.timed()}
        times = {}
        for step, what in enumerate(self.steps):
            self.step(step)
            times[what] = self.timed()
            if what == "full":
                self.full = self.out.numpy().copy()
        return times

    def step(self, step):
        """What the next run is fed, which only our steps differ in."""
        if self.steps is not None:
            for key, value in (("t", np.array(1000 - step)), ("id", np.array(1)), ("start", np.array(step == 0))):
                self.binding.bind_cpu_input(key, value)

    def timed(self):
        start = self.clock()
        self.session.run_with_iobinding(self.binding)
        return self.clock() - start


def peak():
    """GFLOP/s of a thread that does nothing but fused multiply-adds."""
    command = ["cargo", "bench", "-q", "-p", "ditfastattn-kernels", "--", "--threads", "1", "--rounds", "9", "nothing"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    found = re.search(r"peak of a thread: (\d+)", text)
    return float(found.group(1)) if found else float("nan")


# The side of the matrices that the MatMul beside us multiplies.
MATMUL = 2048


def matmul(threads, clock):
    """A function that multiplies and says how many FLOP/s that were."""
    n = MATMUL
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("MatMul", ["a", "b"], ["o"])]
    run = session(nodes, [info("a", [n, n]), info("b", [n, n])], [info("o", [n, n])], [], [("", 17)], threads)
    binding = run.io_binding()
    for name in "ab":
        binding.bind_ortvalue_input(name, host_value(rng.standard_normal((n, n), dtype=np.float32)))
    binding.bind_ortvalue_output("o", host_value(np.zeros((n, n), np.float32)))

    def timed():
        time.sleep(host.PAUSE)
        start = clock()
        run.run_with_iobinding(binding)
        return 2 * n**3 / (clock() - start)

    return timed


def compare(dim, tokens, threads, rounds, clock):
    """The rounds of one shape: times by name."""
    batch = 2 if tokens < 16384 else 1
    rng = np.random.default_rng(1)
    tensors = {n: rng.standard_normal((batch, tokens, HEADS, dim), dtype=np.float32) for n in "qkv"}
    cases = {}
    for form in FORMS:
        # The forms that write out the scores would need 17 GB for them.
        if tokens < 16384 or form == "MultiHeadAttention":
            cases[form] = Case(host_form(form, batch, tokens, dim, threads), tensors, clock)
    steps = [(row, what) for row, what in STEPS if batch > 1 or row != "asc"]
    rows, names = zip(*steps)
    ours = cases["ours"] = Case(our_form(rows, batch, tokens, dim, threads), tensors, clock, names)
    rate = matmul(threads, clock)
    rate()
    result = []
    for warm in [True] * (tokens < 16384) + [False] * rounds:
        times = {"MatMul": rate()}
        for name in random.sample(list(cases), len(cases)):
            times |= cases[name].run(name)
        if not warm:
            result.append(times)
    for form in FORMS:
        if form in cases:
            error = np.abs(cases[form].out.numpy().ravel() - ours.full.ravel()).max()
            assert error < 1e-4, (form, error)
    # A plan that is not served would be measured as dense.
    assert stats()["misses"] == 0, stats()
    return result


# What is printed of a shape, and the goal for it at some number of tokens: at most so much, at least if negative.
COLUMNS = {
    "decomposed": None,
    "Attention": None,
    "MultiHeadAttention": None,
    "full / fastest": lambda tokens: -1.0,
    "full / MatMul": lambda tokens: -0.9,
    "full / peak": None,
    "capture": lambda tokens: {256: None, 1024: 1.12}.get(tokens, 1.06),
    "wa-rs": lambda tokens: 0.27 if tokens >= 1024 else None,
    "asc": lambda tokens: 0.52,
    "reuse / module": lambda tokens: 0.01,
}


def line(dim, tokens, threads, rounds, peak):
    """A line of the table. `peak`: FLOP/s of the threads by the clock in use."""
    batch = 2 if tokens < 16384 else 1
    work = 4 * batch * HEADS * tokens**2 * dim

    def median(f):
        return statistics.median(f(times) for times in rounds)

    over_full = {name: median(lambda t, n=name: t[n] / t["full"]) for name in rounds[0] if name}
    speed = {form: 1 / over_full[form] for form in FORMS if form in over_full}
    # The module has four projections, whose multiplications are counted at the speed of the attention.
    module = 1 + 2 * HEADS * dim / tokens
    values = speed | {
        "full / fastest": min(over_full[form] for form in speed),
        "full / MatMul": median(lambda t: work / t["full"] / t["MatMul"]),
        "full / peak": median(lambda t: work / t["full"]) / peak,
        "reuse / module": over_full["reuse"] / module,
    }
    values |= {name: over_full[name] for name in ("capture", "wa-rs", "asc") if name in over_full}
    missed = []
    for name, goal in COLUMNS.items():
        limit = goal and goal(tokens)
        if limit and name in values and round(values[name], 4) * np.sign(limit) > limit:
            missed.append(f"{name} {'≥' if limit < 0 else '≤'} {abs(limit):g}")
    shown = [f"{values[name]:.{4 if 'reuse' in name else 3}f}" if name in values else "–" for name in COLUMNS]
    return f"| {dim} | {tokens} | {threads} | {' | '.join(shown)} | {', '.join(missed) or '–'} |"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 72, 96, 128])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, help="default: by the number of tokens")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    args = parser.parse_args()
    global SPIN
    SPIN = args.clock == "wall"
    clock = host.clock(args.clock)
    print(host.about(args.clock))
    one = peak()
    print(f"multiply-add peak {one:.0f} GFLOP/s a thread; {HEADS} heads, batch 2 (1 at 16384), float32\n")
    head = ["head dim", "tokens", "threads", *COLUMNS, "goals missed"]
    print(f"| {' | '.join(head)} |\n|{'---:|' * (len(head) - 1)}---|")
    for tokens in args.tokens:
        for threads in args.threads:
            for dim in args.dims:
                rounds = compare(dim, tokens, threads, args.rounds or ROUNDS.get(tokens, 3), clock)
                # CPU time is that of all threads together.
                peak_here = one * 1e9 * (threads if args.clock == "wall" else 1)
                print(line(dim, tokens, threads, rounds, peak_here), flush=True)
                gc.collect()


if __name__ == "__main__":
    main()
