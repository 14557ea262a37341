"""What the paper measures, on the model of this folder: D1 to D6 searched, drawn and judged; and its ablations.

    cargo build --release
    pip install onnxruntime==1.32.0 numpy scikit-learn==1.9.1 pillow
    python examples/digits/evidence.py

Writes plans, samples and results into out/evidence (what is there already is not made again), and evidence.md and pictures into this folder.
Every configuration draws from the same noise. Takes about half an hour on two quiet cores; --images and --parts make it shorter.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
OUT = ROOT / "out" / "evidence"
MODEL = HERE / "digits-dit.onnx"
GUIDANCE = 4.0
BATCH = 32
PRESETS = ["d1", "d2", "d3", "d4", "d5", "d6"]
# Single techniques, over thresholds that reach the FLOPs of the combined plans.
SINGLE = {"ast": [0.05, 0.15, 0.3], "wa-rs": [0.05, 0.15, 0.3], "asc": [0.05, 0.15, 0.3]}


class Sampler:
    """DPM-Solver++ 2M, as `dfa-rewrite search --scheduler dpm++2m` has it."""

    def __init__(self, steps):
        kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
        self.timesteps = np.round(np.linspace(0, 999, steps + 1))[::-1][:-1].astype(np.int64)
        self.sigmas = np.append(np.sqrt((1 - kept) / kept)[self.timesteps], 0.0)
        self.before, self.step = None, 0

    def move(self, noise, x):
        now, then = self.sigmas[self.step], self.sigmas[self.step + 1]
        alpha, alpha_then = (1 / np.sqrt(1 + s * s) for s in (now, then))
        clean = (x - now * alpha * noise) / alpha
        slope = 0.0
        if self.before is not None and self.step + 1 < len(self.timesteps):
            slope = 0.5 * np.log(now / then) / np.log(self.sigmas[self.step - 1] / now)
        target = clean if slope == 0 else clean + slope * (clean - self.before)
        self.before, self.step = clean, self.step + 1
        return then / now * alpha_then / alpha * x + alpha_then * (1 - then / now) * target


def session(path, custom=True):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if custom:
        options.register_custom_ops_library(str(TARGET / "libditfastattn.so"))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def noise(images, seed=0):
    """(noise [n, 1, 32, 32], labels [n]): the same for every configuration."""
    return np.random.default_rng(seed).standard_normal((images, 1, 32, 32)), np.arange(images) % 10


def draw(model, x, labels, steps, window_only=False):
    """One image per row of noise in [-1, 1], and the seconds in the model's runs. `window_only`: R is zero wherever it is read, which
    needs a model with explicit state."""
    sampler, seconds, past = Sampler(steps), 0.0, {}
    both = np.concatenate([labels, np.full(len(labels), 10)]).astype(np.int64)
    if window_only:
        past = {i.name: np.zeros([0] + [1] * (len(i.shape) - 1), np.float32) for i in model.get_inputs() if i.name.startswith("past.")}
        for i in model.get_inputs():
            if i.name in past:
                past[i.name] = np.zeros([0] + [d if isinstance(d, int) else 1 for d in i.shape[1:]], np.float32)
    for step, t in enumerate(sampler.timesteps):
        feed = {"hidden_states": np.concatenate([x, x]).astype(np.float32), "timestep": np.full(len(both), t), "class_labels": both} | past
        if window_only:
            feed["dfa_step"] = np.array(step)
        start = time.perf_counter()
        outputs = model.run(None, feed)
        seconds += time.perf_counter() - start
        for output, value in zip(model.get_outputs(), outputs):
            if output.name.startswith("present."):
                past[output.name.replace("present", "past")] = value * 0 if output.name.endswith("residual") else value
        cond, uncond = np.split(outputs[0].astype(np.float64), 2)
        x = sampler.move(uncond + GUIDANCE * (cond - uncond), x)
    return np.clip(x, -1, 1), seconds


def search(name, steps, *arguments):
    """The plan `name`, searched if it is not there, and what the search said."""
    plan, said = OUT / f"{name}.json", OUT / f"{name}.said.json"
    if not said.exists():
        calibration = OUT / "calib.npz"
        if not calibration.exists():
            x, labels = noise(10, seed=1000)
            np.savez(calibration, hidden_states=x.astype(np.float32), class_labels=np.concatenate([labels, np.full(10, 10)]))
        runtime = Path(onnxruntime.__file__).parent / "capi"
        command = [TARGET / "dfa-rewrite", "search", MODEL, "-o", plan, "--cfg", "cond-first", "--calib", calibration, "--scheduler", "dpm++2m",
                   "--steps", steps, "--guidance", GUIDANCE, "--onnxruntime", runtime, "--force", "--json", *arguments]  # fmt: skip
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        said.write_text(result.stdout)
    return plan, json.loads(said.read_text())


def rewritten(plan, *flags):
    path = OUT / f"{plan.stem}{'.io' if flags else ''}.onnx"
    command = [TARGET / "dfa-rewrite", MODEL, "--plan", plan, "-o", path, "--force", "--quiet", *flags]
    subprocess.run(list(map(str, command)), check=True)
    return path


class Judge:
    """Classifiers that saw only real digits: one says what a sample shows, the other's hidden layer gives features."""

    def __init__(self):
        real = load_digits()
        self.reader = SVC(gamma=0.001).fit(real.data, real.target)
        self.network = MLPClassifier([32], random_state=0, max_iter=500).fit(real.data / 16, real.target)
        self.real = self.features(real.data)

    @staticmethod
    def small(images):
        """[n, 64] in 0…16, as scikit-learn's digits are."""
        return (images.reshape(-1, 8, 4, 8, 4).mean((2, 4)).reshape(-1, 64) + 1) * 8

    def features(self, small):
        return np.maximum(small / 16 @ self.network.coefs_[0] + self.network.intercepts_[0], 0)

    def accuracy(self, images, labels):
        return float((self.reader.predict(self.small(images)) == labels).mean())

    def frechet(self, images):
        """Fréchet distance between Gaussians fitted to the features of `images` and of the real digits."""
        a, b = self.features(self.small(images)), self.real
        values = np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T))
        cross = np.sqrt(np.maximum(values.real, 0)).sum()
        return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * cross)

    def perceptual(self, images, dense):
        """As LPIPS, with this small network: mean squared distance of features of unit length."""
        unit = lambda f: f / np.maximum(np.linalg.norm(f, axis=1, keepdims=True), 1e-9)
        a, b = (unit(self.features(self.small(x))) for x in (images, dense))
        return float(((a - b) ** 2).sum(1).mean())


def psnr(a, b):
    return float(10 * np.log10(4 / np.maximum(((a - b) ** 2).mean(), 1e-12)))


def ssim(a, b, window=8):
    """Mean structural similarity over windows of 8 × 8, range 2 (Wang et al. 2004)."""
    view = lambda x: np.lib.stride_tricks.sliding_window_view(x[:, 0], (window, window), (1, 2))[:, ::2, ::2]
    a, b = view(a), view(b)
    ma, mb = a.mean((-1, -2)), b.mean((-1, -2))
    va, vb = a.var((-1, -2)), b.var((-1, -2))
    cov = (a * b).mean((-1, -2)) - ma * mb
    c1, c2 = 0.02**2, 0.06**2
    return float(((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())


def generate(configurations, images, steps, tag):
    """Samples and seconds per configuration, batch by batch in turn, so that all see the same machine."""
    models = {}
    results = {}
    for name, (path, window_only) in configurations.items():
        file = OUT / f"{tag}-{name}-{images}.npz"
        if file.exists():
            saved = np.load(file)
            results[name] = (saved["images"], saved["seconds"])
        else:
            models[name] = (session(path, custom=name != "dense"), window_only)
    if models:
        x, labels = noise(images)
        parts = {name: ([], []) for name in models}
        for first in range(0, images, BATCH):
            rows = slice(first, first + BATCH)
            for name, (model, window_only) in models.items():
                drawn, seconds = draw(model, x[rows], labels[rows], steps, window_only)
                parts[name][0].append(drawn)
                parts[name][1].append(seconds)
            print(f"{tag}: {min(first + BATCH, images)} of {images} images", flush=True)
        for name, (drawn, seconds) in parts.items():
            results[name] = (np.concatenate(drawn), np.array(seconds))
            np.savez(OUT / f"{tag}-{name}-{images}.npz", images=results[name][0], seconds=results[name][1])
    return results


def table(results, accounts, judge, against="dense"):
    """Rows of Markdown."""
    dense, dense_seconds = results[against]
    labels = np.arange(len(dense)) % 10
    lines = ["| | attention FLOPs | module FLOPs | time | PSNR | SSIM | perceptual | read as asked | Fréchet |", "|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for name, (images, seconds) in results.items():
        attention, module = accounts.get(name, (0.0, 0.0))
        same = name == against
        lines.append(
            f"| {name} | {100 * (1 - attention):.1f} % | {100 * (1 - module):.1f} % | {np.median(seconds / dense_seconds):.2f} | "
            + ("– | – | – | " if same else f"{psnr(images, dense):.1f} dB | {ssim(images, dense):.3f} | {judge.perceptual(images, dense):.4f} | ")
            + f"{100 * judge.accuracy(images, labels):.1f} % | {judge.frechet(images):.2f} |"
        )
    return lines


def picture(path, results):
    """One row of ten digits per configuration."""
    rows = [np.concatenate(list(images[:10, 0]), 1) for images, _ in results.values()]
    pixels = np.round((np.concatenate(rows, 0) + 1) * 127.5).astype(np.uint8)
    Image.fromarray(pixels).resize((pixels.shape[1] * 2, pixels.shape[0] * 2), Image.NEAREST).save(path, optimize=True)


def account(said):
    return said["account"]["attention_flops"], said["account"]["module_flops"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="for D1 to D6")
    parser.add_argument("--ablation-images", type=int, default=64)
    parser.add_argument("--parts", default="presets,steps,single", help="which tables to make")
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    judge, parts, lines = Judge(), args.parts.split(","), []
    cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.processor())
    lines += [
        f"{datetime.date.today()}, {os.cpu_count()} cores of {cpu}, Python {platform.python_version()}, onnxruntime {onnxruntime.__version__}. "
        "Made by `python examples/digits/evidence.py`; not edited by hand.", "",
        "Searched on 10 images (one per digit, other noise than below), DPM-Solver++ 2M, guidance 4, the paper's metric (`mrae`), candidates by cost. "
        "FLOPs and time are shares of dense; time is the median over batches of 32 images of the seconds in the model's runs, in turn with dense. PSNR, SSIM and the perceptual "
        "distance compare with the dense image from the same noise. Read as asked: by an SVC that saw only real digits. Fréchet: to the real digits, on the 32 features of a small network trained on them.", "",
    ]  # fmt: skip

    if "presets" in parts:
        configurations, accounts, costs, previous = {"dense": (MODEL, False)}, {}, [], None
        for preset in PRESETS:
            reuse = ["--reuse", OUT / f"{previous}.search.jsonl"] if previous else []
            plan, said = search(preset, 50, "--preset", preset, *reuse)
            configurations[preset.upper()] = (rewritten(plan), False)
            accounts[preset.upper()] = account(said)
            counts = dict(map(tuple, said["counts"]))
            costs.append(f"| {preset.upper()} | {said['delta']} | " + " | ".join(str(counts[a]) for a in ("full", "asc", "wa-rs", "wa-rs+asc", "ast"))
                         + f" | {said['forwards']:.0f} | {said['naive_forwards']:.0f} | {said['forwards'] / said['naive_forwards']:.2f} |")  # fmt: skip
            previous = preset
        results = generate(configurations, args.images, 50, "presets")
        lines += ["## D1 to D6", "", f"50 steps, {args.images} images.", "", *table(results, accounts, judge), "",
                  "One row each, from the top: dense, D1 to D6.", "", "![dense and D1 to D6](pictures/evidence.png)", "",
                  "![the plans](pictures/plans.svg)", "",
                  "What the plans do, and what finding them took: forward passes run by the search, and by a loop that runs the whole model for every trial "
                  "(D2 to D6 start from what the losses of the plan before decide).", "",
                  "| | δ | full | asc | wa-rs | wa-rs+asc | ast | forward passes | naive | ratio |", "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|", *costs, ""]  # fmt: skip
        picture(HERE / "pictures" / "evidence.png", results)
        command = [TARGET / "dfa-rewrite", "plot", *(OUT / f"{p}.json" for p in PRESETS), "-o", HERE / "pictures" / "plans.svg", "--force"]
        subprocess.run(list(map(str, command)), check=True)

    if "steps" in parts:
        configurations, accounts = {"dense": (MODEL, False)}, {}
        for preset in ("d1", "d3", "d6"):
            plan, said = search(f"{preset}-20", 20, "--preset", preset)
            configurations[preset.upper()] = (rewritten(plan), False)
            accounts[preset.upper()] = account(said)
        results = generate(configurations, args.ablation_images, 20, "steps20")
        lines += ["## 20 steps", "", f"The same thresholds with 20 steps, {args.ablation_images} images, against dense at 20 steps: neighbouring steps differ more, so less is shared "
                  "and what is shared costs more.", "", *table(results, accounts, judge), ""]  # fmt: skip

    if "single" in parts:
        configurations, accounts = {"dense": (MODEL, False)}, {}
        for preset in ("d1", "d3", "d6"):
            plan, said = search(preset, 50, "--preset", preset)
            configurations[f"all, {preset.upper()}"] = (rewritten(plan), False)
            accounts[f"all, {preset.upper()}"] = account(said)
        for technique, deltas in SINGLE.items():
            for delta in deltas:
                plan, said = search(f"{technique}-{delta}", 50, "--delta", delta, "--candidates", technique)
                name = f"{technique} only, δ = {delta}"
                configurations[name] = (rewritten(plan), False)
                accounts[name] = account(said)
        # The same plan with and without the residual.
        for delta in SINGLE["wa-rs"]:
            name = f"wa only (R = 0), plan of wa-rs, δ = {delta}"
            configurations[name] = (rewritten(OUT / f"wa-rs-{delta}.json", "--state", "io"), True)
            accounts[name] = accounts[f"wa-rs only, δ = {delta}"]
        results = generate(configurations, args.ablation_images, 50, "single")
        lines += ["## Single techniques", "", f"50 steps, {args.ablation_images} images, ordered by the attention FLOPs that are left: compare neighbours. The last kind is a plan of `wa-rs` whose residual is "
                  "zero wherever it is read (the time of those rows has copies of the state in it and means nothing).", "",
                  *ordered(table(results, accounts, judge)), ""]  # fmt: skip
    (HERE / "evidence.md").write_text("# What was measured\n\n" + "\n".join(lines).rstrip() + "\n")


def ordered(lines):
    share = lambda line: float(line.split("|")[2].split("%")[0])
    return lines[:2] + sorted(lines[2:], key=share, reverse=True)


if __name__ == "__main__":
    main()
