"""Algorithm 1 in NumPy, over a NumPy transformer: the whole model at every trial, float64, nothing shared with what it judges.

The transformer is the one of synthetic.py; its weights are read from the file.
"""

import math

import numpy as np
import onnx
from conftest import mrae
from onnx import numpy_helper

ORDER = ["ast", "wa-rs+asc", "wa-rs", "asc"]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Transformer:
    """A model of synthetic.dit under `cfg` (cond-first or uncond-first): whole steps, any action in any layer."""

    def __init__(self, path, layers, heads, cfg, window=0.125):
        model = onnx.load(path)
        self.weights = {i.name: numpy_helper.to_array(i).astype(np.float64) for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT}
        self.layers, self.heads, self.cfg, self.window = layers, heads, cfg, window

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def norm(self, x, name):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * self.weights[name]

    def project(self, x, name):
        """[rows, heads, tokens, channels]"""
        y = self.linear(x, name)
        return y.reshape(*y.shape[:2], self.heads, -1).transpose(0, 2, 1, 3)

    def scores(self, x, source, p):
        q, k = self.project(x, f"{p}.q"), self.project(source, f"{p}.k")
        return q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1])

    def merge(self, o):
        return o.transpose(0, 2, 1, 3).reshape(o.shape[0], o.shape[2], -1)

    def module(self, x, layer, action, memory):
        """The attention module's output. `memory`: per layer (R, output) of earlier steps; replaced by what this step leaves."""
        p, (residual, output) = f"block{layer}", memory[layer]
        if action == "ast":
            return output
        shared = action in ("asc", "wa-rs+asc")
        half = len(x) // 2
        conditional = slice(0, half) if self.cfg == "cond-first" else slice(half, None)
        rows = conditional if shared else slice(None)
        x = x[rows]
        scores, v = self.scores(x, x, p), self.project(x, f"{p}.v")
        tokens = scores.shape[-1]
        width = max(1, math.floor(self.window * tokens))
        apart = np.abs(np.arange(tokens)[:, None] - np.arange(tokens))
        o = softmax(np.where(apart <= width, scores, -np.inf)) @ v
        if action in ("full", "asc"):
            full = softmax(scores) @ v
            residual, o = full - o, full
            residual = np.concatenate([residual] * 2) if shared else residual
        else:
            o = o + residual[rows]
        output = self.linear(self.merge(o), f"{p}.out")
        output = np.concatenate([output] * 2) if shared else output
        memory[layer] = (residual, output)
        return output

    def step(self, fed, row, memory):
        """The model's output; `memory` becomes what later steps may read."""
        t = np.sin(np.asarray(fed["timestep"], np.float64)[:, None] * 0.01)
        x = np.asarray(fed["x"], np.float64) + self.linear(t, "t.embedding")[:, None]
        for layer, action in enumerate(row):
            p = f"block{layer}"
            x = x + self.module(self.norm(x, f"{p}.norm1"), layer, action, memory)
            if "prompt" in fed:
                text = np.asarray(fed["prompt"], np.float64)
                o = softmax(self.scores(x, text, f"{p}.cross")) @ self.project(text, f"{p}.cross.v")
                x = x + self.linear(self.merge(o), f"{p}.cross.out")
            x = x + self.linear(np.tanh(self.linear(self.norm(x, f"{p}.norm2"), f"{p}.up")), f"{p}.down")
        return x


def search(model, feeds, delta):
    """(rows, {(step, layer, action): loss of what was tried})"""
    full = ["full"] * model.layers
    rows, tried, memory = [full], {}, [(None, None)] * model.layers
    model.step(feeds[0], full, memory)
    for step, fed in enumerate(feeds[1:], 1):
        run = lambda row: model.step(fed, row, list(memory))
        dense = run(full)
        row = []
        for layer in range(model.layers):
            chosen = "full"
            for action in ORDER:
                tried[step, layer, action] = mrae(run([*row, action, *full[layer + 1 :]]), dense)
                if tried[step, layer, action] < (layer + 1) / model.layers * delta:
                    chosen = action
                    break
            row.append(chosen)
        rows.append(row)
        model.step(fed, row, memory)
    return rows, tried
