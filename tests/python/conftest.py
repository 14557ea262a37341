"""The product as its users meet it: the command line, the library, and an unmodified onnxruntime."""

import ctypes
import json
import os
import platform
import resource
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
FIXTURES = ROOT / "tests" / "fixtures"
CORPUS = json.loads((FIXTURES / "corpus.json").read_text())
HOST = tuple(int(n) for n in ort.__version__.split(".")[:2])
# The host that the corpus was made with. Older ones lack operators, opsets and IR versions.
NEWEST = (1, 32)
# Of int8 products ONNX Runtime adds up pairs in 16 bits where an x86 CPU has no VNNI.
SATURATES = platform.machine() == "x86_64" and "vnni" not in Path("/proc/cpuinfo").read_text()

# `scripts/gpu-suite` names another one.
PROVIDERS = list(dict.fromkeys([os.environ.get("DITFASTATTN_PROVIDER", "CPUExecutionProvider"), "CPUExecutionProvider"]))


def tool(*arguments, check=True):
    result = subprocess.run([TARGET / "dfa-rewrite", *map(str, arguments)], capture_output=True, text=True)
    if check:
        assert result.returncode == 0, result.stderr
    return result


def inspect(model, *flags):
    return json.loads(tool("inspect", model, "--json", *flags).stdout)


def library():
    return ctypes.CDLL(str(TARGET / "libditfastattn.so"))


def stats():
    """The library's counters, for the whole process."""
    function = library().ditfastattn_stats
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    buffer = ctypes.create_string_buffer(function(None, 0) + 256)
    function(buffer, len(buffer))
    return json.loads(buffer.value)


def resident():
    """Bytes of memory that this process occupies."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def session(model, custom_ops=True, threads=2):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if custom_ops:
        options.register_custom_ops_library(str(TARGET / "libditfastattn.so"))
    return ort.InferenceSession(str(model), options, providers=PROVIDERS)


class Model:
    """An entry of the corpus: an exported model, what must be found in it, its plan, and the inputs of a short denoising."""

    def __init__(self, entry, folder):
        self.entry, self.folder = entry, folder
        self.path = FIXTURES / entry["file"]
        self.tolerance, self.flags = entry["tolerance"], entry["flags"]
        self.renamed = entry.get("inputs", {})
        self.plan_path = FIXTURES / f"{entry['architecture']}.plan.json"
        if not self.plan_path.exists():
            # No layer, so no plan was made: any will do to be told why.
            self.plan_path = folder / "any.plan.json"
            self.plan_path.write_text(json.dumps({"format": "ditfastattn-plan", "version": 1, "steps": [["full"], ["ast"]]}))
        self.plan = json.loads(self.plan_path.read_text())
        self.steps = len(self.plan["steps"])
        # What the runs of a step are called in the arrays: two where guidance is.
        self.branches = ["cond_", "uncond_"] if self.plan.get("cfg") == "separate" else [""]
        arrays = FIXTURES / f"{entry['architecture']}.npz"
        self.arrays = np.load(arrays) if arrays.exists() else None

    def needs_host(self):
        """Skips what an older host cannot load, and says why."""
        try:
            session(self.path, custom_ops=False)
        except Exception as error:
            if HOST >= NEWEST:
                raise
            pytest.skip(f"onnxruntime {ort.__version__} cannot load {self.path.name}: {str(error)[-160:]}")

    def needs_kernels(self):
        self.needs_host()
        if not self.entry["runs_on_cpu"]:
            pytest.skip(f"onnxruntime's CPU provider does not compute it: {self.entry['note']}")
        if SATURATES and any(word in self.entry["dialect"] for word in ("int8", "qdq")):
            original, first = session(self.path, custom_ops=False), self.runs()[0]
            own = distance(original.run(None, self.feed(original, *first))[0], self.expected(*first))
            if own > self.tolerance:
                pytest.skip(f"a CPU without VNNI: onnxruntime computes the export itself otherwise than PyTorch: {own}")

    def place(self):
        """The model's path: weights outside the file stay where they are, so the rewritten model goes beside a copy of both."""
        data = self.path.with_name(self.path.name + ".data")
        if not data.exists():
            return self.path
        for file in (self.path, data):
            (self.folder / file.name).write_bytes(file.read_bytes())
        return self.folder / self.path.name

    def output(self):
        return self.folder / f"{self.path.stem}.dfa.onnx"

    def rewrite(self, plan=None, *flags, check=True):
        """The rewritten model's path, under the entry's plan or another; without `check` what the tool said."""
        plan_path = self.plan_path
        if plan is not None:
            plan_path = self.folder / "plan.json"
            plan_path.write_text(json.dumps(plan))
        said = tool(self.place(), "--plan", plan_path, "-o", self.output(), "--force", "--quiet", *self.flags, *flags, check=check)
        return self.output() if check else said

    def feed(self, session, step, branch="", **extra):
        """What the model is fed at a step; for `extra`, the file's own names."""
        prefix = f"step{step}_{branch}"
        feed = {k.removeprefix("fixed_"): self.arrays[k] for k in self.arrays.files if k.startswith("fixed_")}
        feed |= {k.removeprefix(prefix): self.arrays[k] for k in self.arrays.files if k.startswith(prefix)}
        feed.pop("out")
        types = {i.name: i.type for i in session.get_inputs()}
        feed = {self.renamed.get(name, name): value for name, value in feed.items()}
        for name, value in feed.items():
            if types[name] == "tensor(float16)":
                feed[name] = value.astype(np.float16)
        optional = {i.name for i in session.get_overridable_initializers()}
        if self.entry.get("request_id") and "dfa_request_id" in optional:
            # Without an id, an input that changes at each step speaks against continuing, until it is known to.
            feed["dfa_request_id"] = np.array(1)
        return feed | extra

    def runs(self):
        """(step, branch) of every run of a generation, in order."""
        return [(step, branch) for step in range(self.steps) for branch in self.branches]

    def expected(self, step, branch=""):
        return self.arrays[f"step{step}_{branch}out"]

    def trajectory(self, path, steps=None):
        """Writes what was fed, as a pipeline would record it: run by run, under separate guidance two per step."""
        first = f"step0_{self.branches[0]}"
        names = [k.removeprefix(first) for k in self.arrays.files if k.startswith(first) and not k.endswith("out")]
        fixed = {k.removeprefix("fixed_"): self.arrays[k] for k in self.arrays.files if k.startswith("fixed_")}
        runs = [(step, branch) for step, branch in self.runs() if step < (steps or self.steps)]
        np.savez(path, **fixed, **{name: np.stack([self.arrays[f"step{step}_{branch}{name}"] for step, branch in runs]) for name in names})
        return path

    def latents(self):
        return next(k.removeprefix("step0_") for k in self.arrays.files if k.startswith("step0_") and self.arrays[k].ndim == 4)

    def timestep(self):
        return "t" if "step0_t" in self.arrays.files else "timestep"


def distance(actual, expected):
    """Largest difference, as a fraction of the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.abs(actual - expected).max() / np.abs(expected).max()


def mrae(a, b):
    """Mean relative absolute error (A.2 of the paper)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    largest = np.maximum(np.abs(a), np.abs(b))
    return np.where(largest > 0, np.abs(a - b) / np.where(largest > 0, largest, 1), 0).mean()


def corpus(expect, **about):
    wanted = {"expect": expect} | about
    chosen = [e for e in CORPUS if all(e.get(k) == v for k, v in wanted.items())]
    return [pytest.param(e, id=f"{e['architecture']}:{e['dialect']}") for e in chosen]


@pytest.fixture
def load(tmp_path):
    def open_model(name):
        architecture, _, dialect = name.partition("__")
        entry = next(e for e in CORPUS if (e["architecture"], e["dialect"]) == (architecture, dialect))
        model = Model(entry, tmp_path)
        model.needs_host()
        return model

    return open_model
