"""Our attention operator against ONNX Runtime's own three forms of attention, in one process with paired runs.

    .venv/tests/bin/python benches/attention.py [--dims 64 72 96 128] [--tokens 256 1024 4096 16384] [--threads 1 2]

Needs `cargo build --release` and the packages onnxruntime, onnx and numpy. Every form reads q, k, v `[batch, tokens, width]` as a
projection leaves them and writes such an output: what an exporter's transposes cost belongs to the form that needs them. Every
round runs every form once, in an order that changes; printed are medians over rounds of the ratios inside a round, which drift and
neighbours disturb less than times. `--clock cpu` compares CPU time in place of wall time, for a machine that others use too; threads that wait do not spin then.
"""

import argparse
import gc
import json
import platform
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
from conftest import TARGET, stats  # noqa: E402

HEADS = 16
FORMS = {
    "decomposed": [("", 17)],
    "Attention": [("", 23)],
    "MultiHeadAttention": [("", 17), ("com.microsoft", 1)],
}
# The half-width of the band in sequence lengths, as in the paper: 15/64 of all pairs.
WINDOW = 1 / 8
# Our actions: the rows of a plan, and which step of it is measured.
ACTIONS = {
    "full": (("full", "full"), 1),
    "full+capture": (("full", "wa-rs"), 0),
    "wa-rs": (("full", "wa-rs"), 1),
    "asc": (("full", "asc"), 1),
    "full+keep": (("full", "ast"), 0),
    "ast": (("full", "ast"), 1),
}


def info(name, dims, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, dims)


# Whether threads that wait spin, as they do by default; not where their CPU time is what is measured.
SPIN = True


def session(nodes, inputs, outputs, initializers, opsets, threads):
    graph = helper.make_graph(nodes, "attention", inputs, outputs, initializers)
    opsets = [helper.make_opsetid(*o) for o in opsets]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if not SPIN:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.register_custom_ops_library(str(TARGET / "libditfastattn.so"))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


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
    """Our operator under a plan of one layer."""
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


class Case:
    """One thing that is timed."""

    def __init__(self, session, tensors, shape, clock, steps=None):
        self.session, self.clock, self.steps = session, clock, steps
        self.binding = session.io_binding()
        for name, value in tensors.items():
            if steps is None:
                value = value.reshape(*value.shape[:2], -1)
            self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
        self.out = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape if steps else (*shape[:2], shape[2] * shape[3]), np.float32))
        self.binding.bind_ortvalue_output("o", self.out)
        self.times = {}

    def run(self):
        """Times of one round, by name."""
        if self.steps is None:
            return {"": self.timed()}
        times = {}
        for step, name in enumerate(self.steps):
            for key, value in (("t", np.array(1000 - step)), ("id", np.array(1)), ("start", np.array(step == 0))):
                self.binding.bind_cpu_input(key, value)
            times[name] = self.timed()
        return times

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


def matmul(threads, clock):
    """A 2048³ MatMul: a function that says how long one took."""
    n = 2048
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("MatMul", ["a", "b"], ["o"])]
    run = session(nodes, [info("a", [n, n]), info("b", [n, n])], [info("o", [n, n])], [], [("", 17)], threads)
    binding = run.io_binding()
    for name in "ab":
        binding.bind_cpu_input(name, rng.standard_normal((n, n), dtype=np.float32))
    binding.bind_ortvalue_output("o", ort.OrtValue.ortvalue_from_numpy(np.zeros((n, n), np.float32)))

    def timed():
        start = clock()
        run.run_with_iobinding(binding)
        return 2 * n**3 / (clock() - start) / 1e9

    return timed


def compare(dim, tokens, threads, rounds, clock):
    batch = 2 if tokens < 16384 else 1
    shape = (batch, tokens, HEADS, dim)
    rng = np.random.default_rng(1)
    tensors = {n: rng.standard_normal(shape, dtype=np.float32) for n in "qkv"}
    cases = {}
    for form in FORMS:
        # The forms that write out the scores would need 17 GB for them.
        if tokens < 16384 or form == "MultiHeadAttention":
            cases[form] = Case(host_form(form, batch, tokens, dim, threads), tensors, shape, clock)
    for rows in dict.fromkeys(rows for rows, _ in ACTIONS.values()):
        if batch == 1 and "asc" in rows:
            continue
        names = [next((a for a, what in ACTIONS.items() if what == (rows, t)), "") for t in range(2)]
        cases[rows] = Case(our_form(rows, batch, tokens, dim, threads), tensors, shape, clock, names)
    rate = matmul(threads, clock)
    for case in cases.values():
        case.run()
    for form in FORMS:
        if form in cases:
            error = np.abs(cases[form].out.numpy().ravel() - cases["full", "full"].out.numpy().ravel()).max()
            assert error < 1e-4, (form, error)
    rounds_of = []
    for _ in range(rounds):
        times = {"MatMul": rate()}
        for name in random.sample(list(cases), len(cases)):
            for action, t in cases[name].run().items():
                if name in FORMS:
                    times[name] = t
                elif action:
                    times[action] = t
        rounds_of.append(times)
    assert stats()["misses"] == 0, stats()
    work = 4 * batch * HEADS * tokens**2 * dim / 1e9

    def median(f):
        return statistics.median(f(times) for times in rounds_of)

    forms = {f: median(lambda t, f=f: work / t[f]) for f in FORMS if f in cases}
    fastest = max(forms, key=forms.get)
    row = [f"{dim:4} {tokens:6} {threads}", *(f"{forms[f]:6.0f}" if f in forms else "     –" for f in FORMS)]
    row.append(f"{median(lambda t: work / t['full']):6.0f}")
    row.append(f"{median(lambda t: t[fastest] / t['full']):6.3f}")
    row.append(f"{median(lambda t: work / t['full'] / t['MatMul']):6.3f}")
    row += [f"{median(lambda t, a=a: t[a] / t['full']):6.3f}" if a in rounds_of[0] else "     –" for a in list(ACTIONS)[1:]]
    print(" | ".join(row), flush=True)


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
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.processor())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    print(f"{cpu}, onnxruntime {ort.__version__}, commit {commit}, {time.strftime('%Y-%m-%d')}, {args.clock} time")
    print(f"multiply-add peak {peak():.0f} GFLOP/s a thread; 2048³ MatMul", end="")
    for threads in args.threads:
        rate = matmul(threads, time.perf_counter)
        rate()
        print(f" {statistics.median(rate() for _ in range(9)):.0f} ({threads} threads)", end="")
    print(f"\n{HEADS} heads, batch 2 (1 at 16384), float32; GFLOP/s, then ratios: speed of full over the fastest form and over the\n"
          "MatMul beside it; time of the other actions over that of full")  # fmt: skip
    names = ["decomp", "Attent", "MHA   ", "full  ", "/best ", "/MatMul", *list(ACTIONS)[1:]]
    print(" | ".join([" dim tokens threads", *names]))
    for threads in args.threads:
        for dim in args.dims:
            for tokens in args.tokens:
                rounds = args.rounds or max(3, min(25, 40 * 1024 // tokens))
                compare(dim, tokens, threads, rounds, clock)
                gc.collect()


if __name__ == "__main__":
    main()
