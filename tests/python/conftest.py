"""The product as its users meet it: the command line, the library, and an unmodified onnxruntime."""

import ctypes
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
FIXTURES = ROOT / "tests" / "fixtures"
HOST = tuple(int(n) for n in ort.__version__.split(".")[:2])
# What a host can load at all: newest ONNX opset and IR version (onnxruntime's compatibility table).
LIMITS = {17: (20, 9), 18: (21, 10), 20: (21, 10), 24: (24, 11)}


def tool(*arguments, check=True):
    result = subprocess.run([TARGET / "dfa-rewrite", *map(str, arguments)], capture_output=True, text=True)
    if check:
        assert result.returncode == 0, result.stderr
    return result


def inspect(model):
    return json.loads(tool("inspect", model, "--json").stdout)


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


def session(model, custom_ops=True, threads=2):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if custom_ops:
        options.register_custom_ops_library(str(TARGET / "libditfastattn.so"))
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


class Model:
    """A fixture: an exported model, its plan, and the inputs of a short denoising."""

    def __init__(self, path, folder):
        self.path = path
        self.name = path.name.split("__")[0]
        self.plan_path = FIXTURES / f"{self.name}.plan.json"
        self.plan = json.loads(self.plan_path.read_text())
        self.arrays = np.load(FIXTURES / f"{self.name}.npz")
        self.folder = folder
        self.steps = len(self.plan["steps"])
        self.half = "fp16" in path.name
        self.tolerance = 1e-2 if self.half else 2e-3

    def needs_host(self):
        about = inspect(self.path)["model"]
        newest = [limit for minor, limit in sorted(LIMITS.items()) if minor <= HOST[1]]
        if HOST[1] < 25 and (about["opset"] > newest[-1][0] or about["ir_version"] > newest[-1][1]):
            pytest.skip(f"onnxruntime {ort.__version__} cannot load opset {about['opset']}, IR {about['ir_version']}")
        if self.path.stem.endswith("-ort") and HOST[1] < 18:
            pytest.skip(f"onnxruntime {ort.__version__} cannot load what a newer one saved (ai.onnx.ml 5)")

    def rewrite(self, plan=None, *flags):
        """The rewritten model's path, under the fixture's plan or another."""
        plan_path = self.plan_path
        if plan is not None:
            plan_path = self.folder / "plan.json"
            plan_path.write_text(json.dumps(plan))
        model = self.path
        data = model.with_name(model.name + ".data")
        if data.exists():
            # Weights outside the file stay where they are: the rewritten model goes beside a copy of both.
            for file in (model, data):
                (self.folder / file.name).write_bytes(file.read_bytes())
            model = self.folder / model.name
        out = self.folder / f"{self.path.stem}.dfa.onnx"
        tool(model, "--plan", plan_path, "-o", out, "--force", "--quiet", *flags)
        return out

    def feed(self, session, step, **extra):
        inputs = {i.name: i.type for i in session.get_inputs()}
        feed = {k.removeprefix("fixed_"): self.arrays[k] for k in self.arrays.files if k.startswith("fixed_")}
        prefix = f"step{step}_"
        feed |= {k.removeprefix(prefix): self.arrays[k] for k in self.arrays.files if k.startswith(prefix)}
        feed.pop("out")
        for name, value in feed.items():
            if inputs[name] == "tensor(float16)":
                feed[name] = value.astype(np.float16)
        return feed | extra

    def expected(self, step):
        return self.arrays[f"step{step}_out"]

    def latents(self):
        return next(k.removeprefix("step0_") for k in self.arrays.files if k.startswith("step0_") and self.arrays[k].ndim == 4)

    def timestep(self):
        return "t" if "step0_t" in self.arrays.files else "timestep"


def distance(actual, expected):
    """Largest difference, as a fraction of the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.abs(actual - expected).max() / np.abs(expected).max()


def all_models():
    return sorted(FIXTURES.glob("*__*.onnx"))


@pytest.fixture
def load(tmp_path):
    def open_model(name):
        model = Model(FIXTURES / f"{name}.onnx", tmp_path)
        model.needs_host()
        return model

    return open_model
