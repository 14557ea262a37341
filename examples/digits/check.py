"""Does the exported model draw the digits it is asked for? A classifier that saw only real digits says.

    python examples/digits/check.py --onnx examples/digits/digits-dit.onnx --png out/digits/samples.png
"""

import argparse
import os

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC


def sample(session, labels, seed, steps=50, guidance=4.0):
    """Denoises one image per label; the conditional half of the batch first."""
    scheduler = DPMSolverMultistepScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02)
    scheduler.set_timesteps(steps)
    rows = len(labels)
    x = torch.randn(rows, 1, 32, 32, generator=torch.Generator().manual_seed(seed))
    both = np.concatenate([labels, np.full(rows, 10)]).astype(np.int64)
    for t in scheduler.timesteps:
        feeds = {
            "hidden_states": torch.cat([x, x]).numpy(),
            "timestep": np.full(2 * rows, int(t), np.int64),
            "class_labels": both,
        }
        cond, uncond = torch.from_numpy(session.run(["out"], feeds)[0]).chunk(2)
        x = scheduler.step(uncond + guidance * (cond - uncond), t, x).prev_sample
    return x


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", default="examples/digits/digits-dit.onnx")
    parser.add_argument("--per-class", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--library", help="libditfastattn.so, when --onnx is a rewritten model")
    parser.add_argument("--png", default="out/digits/samples.png")
    args = parser.parse_args()

    options = onnxruntime.SessionOptions()
    if args.library:
        options.register_custom_ops_library(args.library)
    session = onnxruntime.InferenceSession(args.onnx, options, providers=["CPUExecutionProvider"])

    labels = np.repeat(np.arange(10), args.per_class)
    x = sample(session, labels, args.seed, args.steps, args.guidance)

    digits = load_digits()
    classifier = SVC(gamma=0.001)
    real = cross_val_score(classifier, digits.data, digits.target, cv=5).mean()
    classifier.fit(digits.data, digits.target)
    small = (F.avg_pool2d(x.clamp(-1, 1), 4) + 1) * 8
    said = classifier.predict(small.reshape(len(labels), 64).numpy())
    print(f"classifier on real digits (5-fold): {100 * real:.1f} %")
    print(f"samples it reads as the class asked for: {100 * (said == labels).mean():.1f} % of {len(labels)}")
    for digit in range(10):
        print(f"  {digit}: {100 * (said[labels == digit] == digit).mean():5.1f} %")

    shown = min(args.per_class, 12)
    grid = x.reshape(10, args.per_class, 32, 32)[:, :shown].clamp(-1, 1)
    pixels = ((grid.permute(0, 2, 1, 3).reshape(320, shown * 32) + 1) * 127.5).round().byte().numpy()
    os.makedirs(os.path.dirname(os.path.abspath(args.png)), exist_ok=True)
    Image.fromarray(pixels).resize((shown * 64, 640), Image.NEAREST).save(args.png)


if __name__ == "__main__":
    main()
