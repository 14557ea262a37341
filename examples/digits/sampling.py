"""How images are drawn from the digits model: noise, labels, guidance, DPM-Solver++ 2M. Needs numpy only.

Knows neither ONNX Runtime nor plans. The scheduler is the one of `dfa-rewrite search --scheduler dpm++2m`.
"""

import numpy as np

GUIDANCE = 4.0
SIDE = 32
NO_CLASS = 10


class Sampler:
    """DPM-Solver++ 2M (Lu et al. 2022) with `steps` steps over 1000 linear betas. Call `move` once per entry of `timesteps`, in order."""

    def __init__(self, steps):
        kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
        self.timesteps = np.round(np.linspace(0, 999, steps + 1))[::-1][:-1].astype(np.int64)
        self.sigmas = np.append(np.sqrt((1 - kept) / kept)[self.timesteps], 0.0)
        self.before, self.step = None, 0

    def move(self, noise, x):
        """Latents of the next step from this step's predicted noise, both [n, 1, 32, 32]."""
        now, then = self.sigmas[self.step], self.sigmas[self.step + 1]
        alpha, alpha_then = (1 / np.sqrt(1 + s * s) for s in (now, then))
        clean = (x - now * alpha * noise) / alpha
        slope = 0.0
        if self.before is not None and self.step + 1 < len(self.timesteps):
            slope = 0.5 * np.log(now / then) / np.log(self.sigmas[self.step - 1] / now)
        target = clean if slope == 0 else clean + slope * (clean - self.before)
        self.before, self.step = clean, self.step + 1
        return then / now * alpha_then / alpha * x + alpha_then * (1 - then / now) * target


def noise(images, seed=0):
    """Initial latents [images, 1, 32, 32] in float64: the same for every configuration."""
    return np.random.default_rng(seed).standard_normal((images, 1, SIDE, SIDE))


def feed(x, t, labels):
    """The model's inputs for both halves of guidance, conditional first: x [n, 1, 32, 32], labels [n]."""
    labels = np.concatenate([labels, np.full(len(labels), NO_CLASS)]).astype(np.int64)
    return {"hidden_states": np.concatenate([x, x]).astype(np.float32), "timestep": np.full(len(labels), t), "class_labels": labels}


def guided(out, guidance=GUIDANCE):
    """The noise to follow, [n, 1, 32, 32], from the model's output for both halves, [2n, 1, 32, 32]."""
    cond, uncond = np.split(out.astype(np.float64), 2)
    return uncond + guidance * (cond - uncond)
