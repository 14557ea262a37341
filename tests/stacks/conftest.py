"""Serving stacks for real: what each serves is compared with the same generation run alone in a session of its own.

The sampler is a closed loop, so that an image depends on everything that every step returned.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
LIBRARY = TARGET / "libditfastattn.so"
FIXTURES = ROOT / "tests" / "fixtures"
PLAN = json.loads((FIXTURES / "dit.plan.json").read_text())
STEPS = len(PLAN["steps"])
LAYERS = len(PLAN["steps"][0])
sys.path.insert(0, str(ROOT))

from examples.denoiser import Denoiser  # noqa: E402


def rewrite(*arguments):
    """The tiny DiT of the corpus under its plan: 2 layers, 10 steps, guidance in one batch."""
    command = [TARGET / "dfa-rewrite", FIXTURES / "dit__ts17.onnx", "--plan", FIXTURES / "dit.plan.json", *arguments]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def generate(seed, step, until=STEPS, since=0, latents=None):
    """Denoises one image: `step(number, feed)` returns the model's prediction. Returns the latents, float32 [2, 4, 8, 8]."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, 4, 8, 8)).astype(np.float32)
    x = np.concatenate([x, x]) if latents is None else latents
    labels = np.array([seed % 10, 10])
    for number in range(since, until):
        timestep = np.full(2, int(PLAN["timesteps"][number]))
        predicted = step(number, {"hidden_states": x, "timestep": timestep, "class_labels": labels})
        guided = predicted[1] + 2 * (predicted[0] - predicted[1])
        x = (0.97 * x - 0.1 * guided).astype(np.float32)
    return x


class Alone:
    """Solo runs: every generation in a session of its own."""

    def __init__(self, folder):
        self.path = folder / "solo.onnx"
        rewrite("-o", self.path, "--quiet")

    def session(self):
        return Denoiser(self.path, LIBRARY)

    def image(self, seed):
        denoiser = self.session()
        return generate(seed, lambda number, feed: denoiser.step(seed + 1, feed, start=number == 0)["out"])


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    return Alone(tmp_path_factory.mktemp("solo"))
