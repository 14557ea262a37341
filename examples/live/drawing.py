"""Draws digits under a plan beside the same digits dense, and tells after every step how it went.

Owns the models and the loop; knows nothing of HTTP.
"""

import base64
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import ditfastattn
import numpy as np

DIGITS = Path(__file__).resolve().parents[1] / "digits"
sys.path.insert(0, str(DIGITS))
import sampling  # noqa: E402

MODEL = DIGITS / "digits-dit.onnx"
LABELS = np.arange(10)


class Studio:
    """The dense model and one rewritten model per plan.

    `plans`: plan files. Each is rewritten into a temporary folder and loaded when it is first asked for.
    Raises ditfastattn.RewriteError where a plan does not fit the model.
    """

    def __init__(self, plans, threads=None):
        self.threads = threads
        self.folder = tempfile.TemporaryDirectory(prefix="ditfastattn-live-")
        self.plans = {path.stem: _describe(path) for path in plans}
        self.files = {path.stem: path for path in plans}
        self.sessions = {}
        self.loading = threading.Lock()
        self.requests = itertools.count(1)
        # Set: drawings end after the step that they are in.
        self.closed = threading.Event()

    def _session(self, name):
        with self.loading:
            if name not in self.sessions:
                model = MODEL if name is None else ditfastattn.rewrite(MODEL, self.files[name], Path(self.folder.name) / f"{name}.onnx")
                self.sessions[name] = ditfastattn.session(model, threads=self.threads)
            return self.sessions[name]

    def draw(self, name, seed):
        """Yields a dict per step: pictures (see `_pixels`), seconds of both models so far, PSNR in dB (None: equal), this process's counters.

        Ten images, one per digit. Dense and planned steps take turns, so both see the same machine. Raises KeyError for an unknown plan.
        """
        steps = len(self.plans[name]["steps"])
        dense, planned = _Drawing(self._session(None), steps, seed), _Drawing(self._session(name), steps, seed)
        request = {"dfa_request_id": np.int64(next(self.requests))}
        for step in range(steps):
            if self.closed.is_set():
                return
            dense.step({})
            # Its own request, so that other windows of the page do not disturb it, and an end, so that its memory is freed.
            planned.step({k: np.asarray(v) for k, v in {**request, "dfa_start": step == 0, "dfa_end": step == steps - 1}.items()})
            error = float(((dense.clean() - planned.clean()) ** 2).mean())
            yield {
                "step": step,
                "dense": _pixels(dense.clean()),
                "planned": _pixels(planned.clean()),
                # Four times as strong as it is.
                "difference": _pixels(np.abs(dense.clean() - planned.clean()) * 4 - 1),
                "seconds": {"dense": dense.seconds, "planned": planned.seconds},
                "psnr": 10 * np.log10(4 / error) if error > 0 else None,
                "counters": ditfastattn.stats(),
            }


class _Drawing:
    def __init__(self, session, steps, seed):
        self.session, self.sampler, self.seconds = session, sampling.Sampler(steps), 0.0
        self.x = sampling.noise(len(LABELS), seed)

    def step(self, request):
        feed = sampling.feed(self.x, self.sampler.timesteps[self.sampler.step], LABELS) | request
        start = time.perf_counter()
        (out,) = self.session.run(None, feed)
        self.seconds += time.perf_counter() - start
        self.x = self.sampler.move(sampling.guided(out), self.x)

    def clean(self):
        """The image that the last step aims at, [10, 1, 32, 32] in [-1, 1]."""
        return np.clip(self.sampler.before, -1, 1)


def _pixels(images):
    """Ten images side by side, 320 × 32 grey bytes from -1…1, in base64."""
    row = np.concatenate(list(np.clip(images[:, 0], -1, 1)), axis=1)
    return base64.b64encode(np.round((row + 1) * 127.5).astype(np.uint8).tobytes()).decode()


def _describe(path):
    """What the page shows of a plan: its actions, and the account that `dfa-rewrite inspect` makes of it."""
    command = [ditfastattn.get_program_path(), "inspect", str(MODEL), "--plan", str(path), "--json"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode != 0:
        raise ditfastattn.RewriteError(said.stderr.strip(), said.returncode)
    report = json.loads(said.stdout)["plan"]
    plan = json.loads(path.read_text(encoding="utf-8"))
    return {
        "name": plan.get("name", path.stem),
        "delta": plan.get("delta"),
        "steps": plan["steps"],
        "attention_saved": report["saved"]["attention_flops"],
        "module_saved": report["saved"]["module_flops"],
        "cache_bytes": report["saved"]["peak_cache_bytes"],
    }
