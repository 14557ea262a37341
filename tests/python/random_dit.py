"""Random small diffusion transformers: as an ONNX graph in some exporter's spelling, and as the definition in numpy.

A model is a dictionary of choices, so it can be printed, kept and shrunk. The graph depends on all of them; the definition only on
those that change numbers, and it never looks at the graph. Needs numpy and the onnx package.
"""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

ACTIONS = ["full", "asc", "wa-rs", "wa-rs+asc", "ast"]
# Every choice and its plainest value, towards which failures are shrunk.
PLAIN = {
    "batch": 2, "static": False, "tokens": 8, "heads": 2, "head_dim": 4, "kv_heads": 2, "dtype": "float32", "opset": 17,
    "text": 0, "text_side": "start", "norm": "none", "modulated": False, "projection": "separate", "bias": False, "qk_norm": False,
    "layout": "bhsd", "scale": "scores-mul", "factor": 1.0, "mask": "none", "softmax": "op", "gate": False, "mlp": False,
    "cross": False, "leak": False, "cfg": "none", "window": 0.125, "listed": True, "state": "hidden",
    "steps": [["full"], ["ast"]], "seed": 0,
}  # fmt: skip


def draw(seed):
    """The choices of one model, its plan included."""
    rng = np.random.default_rng(seed)

    def one(*options):
        return options[rng.integers(len(options))]

    heads = int(rng.integers(1, 5))
    fused = one(False, False, False, True)
    spec = {
        "batch": one(2, 4), "static": one(False, False, True), "tokens": int(rng.integers(3, 41)), "heads": heads,
        "head_dim": 2 * int(rng.integers(1, 9)), "kv_heads": one(*[n for n in range(1, heads + 1) if heads % n == 0], heads, heads),
        "dtype": one("float32", "float32", "float16"), "text": one(0, 0, int(rng.integers(1, 7))), "text_side": one("start", "end"),
        "norm": one("none", "layer", "rms"), "modulated": one(False, True), "projection": one("separate", "split", "gather"),
        "bias": one(False, True), "qk_norm": one(False, True), "layout": one("bhsd", "bhsd-twice", "folded", "einsum"),
        "scale": one("scores-mul", "scores-div", "q", "k", "both", "none"), "factor": one(1.0, 1.0, 1.5),
        "mask": one("none", "none", "pair-const", "head-const", "key-bool", "key-float"), "softmax": one("op", "op", "written"),
        "gate": one(False, True), "mlp": one(False, True), "cross": one(False, False, True), "leak": one(False, False, False, True),
        "cfg": one("cond-first", "uncond-first", "none"), "window": float(one(0.05, 0.125, 0.3, 0.9)), "listed": one(True, True, False),
        "state": one("hidden", "hidden", "io"), "opset": one(14, 17, 18) , "seed": seed,
    }  # fmt: skip
    if fused:
        spec["layout"] = one("mha", "attention")
        spec["opset"] = 23 if spec["layout"] == "attention" else 17
        spec["softmax"] = "op"
        if spec["layout"] == "mha":
            spec |= {"kv_heads": heads, "qk_norm": False, "dtype": "float32", "mask": one("none", "pair-const", "key-float")}
    if spec["projection"] != "separate" and spec["kv_heads"] != heads:
        spec["kv_heads"] = heads
    if spec["dtype"] == "float16":
        # Sharper attention amplifies the rounding of its inputs beyond any limit.
        spec |= {"factor": 1.0, "scale": "q" if spec["scale"] == "none" else spec["scale"]}
    if spec["layout"] == "folded" and spec["mask"] != "none":
        # A mask with a batch does not broadcast over folded heads.
        spec["mask"] = "pair-const"
    if spec["norm"] == "layer" and spec["opset"] < 17:
        spec["norm"] = "rms"
    layers = int(rng.integers(1, 4))
    allowed = [a for a in ACTIONS if spec["cfg"] != "none" or "asc" not in a]
    first = ["full"] if spec["cfg"] == "none" else ["full", "asc"]
    rows = [[one(*first) for _ in range(layers)]]
    rows += [[one(*allowed) for _ in range(layers)] for _ in range(int(rng.integers(3, 8)))]
    spec["steps"] = rows
    return spec


class Model:
    """`spec` as weights, graph, plan, feeds and definition."""

    def __init__(self, spec):
        self.spec = spec = PLAIN | spec
        self.layers = len(spec["steps"][0])
        self.width = spec["heads"] * spec["head_dim"]
        self.kv_width = spec["kv_heads"] * spec["head_dim"]
        self.image, self.text = spec["tokens"], spec["text"]
        self.tokens = self.image + self.text
        rng = np.random.default_rng(1000 + spec["seed"])
        c = self.width

        def normal(*shape, size=1.0):
            return (rng.standard_normal(shape) * size).astype(spec["dtype"])

        self.weights = []
        for _ in range(self.layers):
            w = {"q": normal(c, c, size=1.5 * c**-0.5), "k": normal(c, self.kv_width, size=1.5 * c**-0.5),
                 "v": normal(c, self.kv_width, size=c**-0.5), "o": normal(c, c, size=c**-0.5),
                 "qb": normal(c, size=0.3), "kb": normal(self.kv_width, size=0.3), "vb": normal(self.kv_width, size=0.3), "ob": normal(c, size=0.3),
                 "norm": 1 + normal(c, size=0.1), "qn": 1 + normal(spec["head_dim"], size=0.1), "kn": 1 + normal(spec["head_dim"], size=0.1),
                 "shift": normal(4, c, size=0.3), "scale": normal(4, c, size=0.3), "gate": normal(4, c, size=0.5),
                 "up": normal(c, 2 * c, size=c**-0.5), "down": normal(2 * c, c, size=(2 * c) ** -0.5),
                 "cq": normal(c, c, size=c**-0.5), "ck": normal(c, c, size=c**-0.5), "cv": normal(c, c, size=c**-0.5)}  # fmt: skip
            self.weights.append(w)
        self.embedding = normal(4, c, size=0.3)
        self.pair_mask = np.where(rng.random((self.tokens, self.tokens)) < 0.3, -2.0, 0.5).astype(spec["dtype"])
        self.head_mask = normal(1, spec["heads"], self.tokens, self.tokens)
        self.scale = spec["factor"] * (1.0 if spec["scale"] == "none" else spec["head_dim"] ** -0.5)
        if spec["scale"] == "none":
            self.scale = 1.0

    # ---- plan and feeds -----------------------------------------------------------------------------------------

    def plan(self):
        spec = self.spec
        plan = {"format": "ditfastattn-plan", "version": 1, "cfg": spec["cfg"], "window": spec["window"], "steps": spec["steps"]}
        if spec["listed"]:
            plan["timesteps"] = [self.timestep(s) for s in range(len(spec["steps"]))]
        return plan

    def timestep(self, step):
        return 950 - 90 * step

    def feed(self, step):
        spec, b = self.spec, self.spec["batch"]
        rng = np.random.default_rng(7000 + spec["seed"])
        start = rng.standard_normal((b, self.image, self.width))
        end = rng.standard_normal((b, self.image, self.width))
        part = step / len(spec["steps"])
        feed = {"x": ((1 - part) * start + part * end).astype(spec["dtype"]), "timestep": np.full([b], self.timestep(step), np.int64)}
        if self.text or spec["cross"]:
            feed["prompt"] = rng.standard_normal((b, self.text or 3, self.width)).astype(spec["dtype"])
        visible = rng.random((b, self.tokens)) < 0.7
        visible[:, 0] = True
        if spec["mask"] == "key-bool":
            feed["visible"] = visible
        if spec["mask"] == "key-float":
            feed["key_bias"] = np.where(visible, 0.0, -3.0)[:, None, None, :].astype(spec["dtype"])
        return feed

    # ---- the graph --------------------------------------------------------------------------------------------------

    def graph(self):
        return Writer(self).model()

    # ---- the definition ---------------------------------------------------------------------------------------------

    def definition(self):
        return Definition(self)


class Writer:
    """Writes the graph in the spelling that the model's choices name."""

    def __init__(self, model):
        self.m, self.spec = model, model.spec
        self.el = helper.np_dtype_to_tensor_dtype(np.dtype(self.spec["dtype"]))
        self.nodes, self.init, self.count = [], {}, 0

    def const(self, array, dtype=None):
        array = np.asarray(array, dtype or self.spec["dtype"])
        name = f"c{len(self.init)}"
        self.init[name] = numpy_helper.from_array(array, name)
        return name

    def ints(self, *values):
        return self.const(values, np.int64)

    def op(self, kind, *inputs, outputs=1, **attributes):
        self.count += 1
        names = [f"v{self.count}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=f"n{self.count}", **attributes))
        return names[0] if outputs == 1 else names

    def mean(self, x):
        if self.spec["opset"] >= 18:
            return self.op("ReduceMean", x, self.ints(-1), keepdims=1)
        return self.op("ReduceMean", x, axes=[-1], keepdims=1)

    def rms(self, x, weight):
        power = self.op("Add", self.mean(self.op("Mul", x, x)), self.const(1e-3))
        return self.op("Mul", self.op("Div", x, self.op("Sqrt", power)), self.const(weight))

    def linear(self, x, weight, bias=None):
        y = self.op("MatMul", x, self.const(weight))
        return y if bias is None else self.op("Add", y, self.const(bias))

    def split(self, x, sizes):
        if self.spec["opset"] >= 13:
            return self.op("Split", x, self.ints(*sizes), outputs=len(sizes), axis=-1)
        return self.op("Split", x, outputs=len(sizes), axis=-1, split=sizes)

    def model(self):
        m, spec = self.m, self.spec
        b = spec["batch"] if spec["static"] else "batch"
        info = helper.make_tensor_value_info
        inputs = [info("x", self.el, [b, m.image, m.width]), info("timestep", TensorProto.INT64, [b])]
        if m.text or spec["cross"]:
            inputs.append(info("prompt", self.el, [b, m.text or 3, m.width]))
        if spec["mask"] == "key-bool":
            inputs.append(info("visible", TensorProto.BOOL, [b, m.tokens]))
        if spec["mask"] == "key-float":
            inputs.append(info("key_bias", self.el, [b, 1, 1, m.tokens]))
        t = self.op("Cast", "timestep", to=TensorProto.FLOAT)
        t = self.op("Mul", self.op("Unsqueeze", t, self.ints(1)), self.const([[0.01, 0.003, 0.001, 0.0003]], np.float32))
        t = self.op("Cast", self.op("Sin", t), to=self.el)
        self.t = self.op("Unsqueeze", t, self.ints(1))
        h = "x"
        if m.text:
            parts = ["prompt", "x"] if spec["text_side"] == "start" else ["x", "prompt"]
            h = self.op("Concat", *parts, axis=1)
        # The denoiser is what depends on the timestep.
        h = self.op("Add", h, self.linear(self.t, m.embedding))
        for i in range(m.layers):
            h = self.block(h, m.weights[i])
        if m.text:
            begin = m.text if spec["text_side"] == "start" else 0
            h = self.op("Slice", h, self.ints(begin), self.ints(begin + m.image), self.ints(1))
        self.nodes.append(helper.make_node("Identity", [h], ["out"]))
        graph = helper.make_graph(self.nodes, "random", inputs, [info("out", self.el, [b, m.image, m.width])], list(self.init.values()))
        imports = [helper.make_opsetid("", spec["opset"])]
        if spec["layout"] == "mha":
            imports.append(helper.make_opsetid("com.microsoft", 1))
        return helper.make_model(graph, opset_imports=imports, ir_version=8 if spec["opset"] < 23 else 10)

    def block(self, x, w):
        spec = self.spec
        h = x
        if spec["norm"] == "layer":
            h = self.op("LayerNormalization", h, self.const(w["norm"]), axis=-1, epsilon=1e-3)
        elif spec["norm"] == "rms":
            h = self.rms(h, w["norm"])
        if spec["modulated"]:
            one = self.op("Add", self.linear(self.t, w["scale"]), self.const(1.0))
            h = self.op("Add", self.op("Mul", h, one), self.linear(self.t, w["shift"]))
        y, leaked = self.attention(h, w)
        if spec["gate"]:
            y = self.op("Mul", y, self.linear(self.t, w["gate"]))
        x = self.op("Add", x, y)
        if leaked:
            x = self.op("Add", x, self.op("Mul", leaked, self.const(0.1)))
        if spec["cross"]:
            x = self.op("Add", x, self.cross(x, w))
        if spec["mlp"]:
            x = self.op("Add", x, self.linear(self.op("Tanh", self.linear(x, w["up"])), w["down"]))
        return x

    def heads(self, flat, heads):
        return self.op("Reshape", flat, self.ints(0, self.m.tokens, heads, self.spec["head_dim"]))

    def project(self, h, w):
        """q, k and v, each flat, or None for those that `gather` has given heads already, with them."""
        spec = self.spec
        biases = [w[f"{n}b"] if spec["bias"] else None for n in "qkv"]
        if spec["projection"] == "separate":
            return [self.linear(h, w[n], b) for n, b in zip("qkv", biases)], None
        bias = np.concatenate(biases) if spec["bias"] else None
        joint = self.linear(h, np.concatenate([w[n] for n in "qkv"], axis=1), bias)
        if spec["projection"] == "split" or spec["layout"] in ("mha", "attention"):
            return self.split(joint, [self.m.width] * 3), None
        # [B, N, 3, H, D] → [3, B, N, H, D], one of them at a time.
        five = self.op("Reshape", joint, self.ints(0, self.m.tokens, 3, spec["heads"], spec["head_dim"]))
        five = self.op("Transpose", five, perm=[2, 0, 1, 3, 4])
        return None, [self.op("Gather", five, self.const(i, np.int64), axis=0) for i in range(3)]

    def attention(self, h, w):
        spec, m = self.spec, self.m
        flat, headed = self.project(h, w)
        leaked = flat[0] if spec["leak"] and flat else None
        if spec["layout"] == "mha":
            bias = self.mask_to_add()
            o = self.op("MultiHeadAttention", *flat, *(["", "", bias] if bias else []), domain="com.microsoft", num_heads=spec["heads"], scale=float(m.scale))
            return self.linear(o, w["o"], w["ob"] if spec["bias"] else None), leaked
        q, k, v = headed or [self.heads(f, n) for f, n in zip(flat, [spec["heads"], spec["kv_heads"], spec["kv_heads"]])]
        if spec["qk_norm"]:
            q, k = self.rms(q, w["qn"]), self.rms(k, w["kn"])
        if spec["layout"] == "attention":
            q, k, v = (self.op("Transpose", a, perm=[0, 2, 1, 3]) for a in (q, k, v))
            bias = self.mask_to_add()
            o = self.op("Attention", q, k, v, *([bias] if bias else []), scale=float(m.scale))
            o = self.op("Transpose", o, perm=[0, 2, 1, 3])
        else:
            o = self.products(q, k, v)
        o = self.op("Reshape", o, self.ints(0, m.tokens, m.width))
        return self.linear(o, w["o"], w["ob"] if spec["bias"] else None), leaked

    def repeat(self, a):
        """[B, N, KV, D] → [B, N, H, D]"""
        spec, groups = self.spec, self.spec["heads"] // self.spec["kv_heads"]
        if groups == 1:
            return a
        a = self.op("Unsqueeze", a, self.ints(3))
        a = self.op("Expand", a, self.ints(1, 1, 1, groups, 1))
        return self.op("Reshape", a, self.ints(0, self.m.tokens, spec["heads"], spec["head_dim"]))

    def products(self, q, k, v):
        """softmax(scale · q·kᵀ + mask)·v as [B, N, H, D]."""
        spec, m = self.spec, self.m
        k, v = self.repeat(k), self.repeat(v)
        where = spec["scale"]
        if where == "q":
            q = self.op("Mul", q, self.const(m.scale))
        elif where == "k":
            k = self.op("Mul", k, self.const(m.scale))
        elif where == "both":
            q, k = (self.op("Mul", a, self.const(m.scale**0.5)) for a in (q, k))
        layout = spec["layout"]
        if layout == "einsum":
            scores = self.op("Einsum", q, k, equation="bihd,bjhd->bhij")
        elif layout == "folded":
            q, k, v = (self.op("Reshape", self.op("Transpose", a, perm=[0, 2, 1, 3]), self.ints(-1, m.tokens, spec["head_dim"])) for a in (q, k, v))
            scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 2, 1]))
        else:
            q, v = (self.op("Transpose", a, perm=[0, 2, 1, 3]) for a in (q, v))
            if layout == "bhsd":
                k = self.op("Transpose", k, perm=[0, 2, 3, 1])
            else:
                k = self.op("Transpose", self.op("Transpose", k, perm=[0, 2, 1, 3]), perm=[0, 1, 3, 2])
            scores = self.op("MatMul", q, k)
        if where == "scores-mul":
            scores = self.op("Mul", scores, self.const(m.scale))
        elif where == "scores-div":
            scores = self.op("Div", scores, self.const(1 / m.scale))
        p = self.softmax(self.masked(scores))
        if layout == "einsum":
            return self.op("Einsum", p, v, equation="bhij,bjhd->bihd")
        o = self.op("MatMul", p, v)
        if layout == "folded":
            o = self.op("Reshape", o, self.ints(-1, spec["heads"], m.tokens, spec["head_dim"]))
        return self.op("Transpose", o, perm=[0, 2, 1, 3])

    def mask_to_add(self):
        spec, m = self.spec, self.m
        if spec["mask"] == "pair-const":
            # MultiHeadAttention takes four axes and broadcasts the first two only.
            return self.const(m.pair_mask[None, None] if spec["layout"] == "mha" else m.pair_mask)
        if spec["mask"] == "head-const":
            return self.const(m.head_mask)
        if spec["mask"] == "key-float":
            return self.whole("key_bias")
        if spec["mask"] == "key-bool":
            seen = self.op("Unsqueeze", "visible", self.ints(1, 2))
            return self.whole(self.op("Where", seen, self.const(0.0), self.const(-np.inf)))
        return None

    def whole(self, bias):
        """The fused operators do not broadcast over the queries."""
        if self.spec["layout"] not in ("mha", "attention"):
            return bias
        return self.op("Add", bias, self.const(np.zeros((1, 1, self.m.tokens, 1))))

    def masked(self, scores):
        bias = self.mask_to_add()
        return scores if bias is None else self.op("Add", scores, bias)

    def softmax(self, scores):
        if self.spec["softmax"] == "op":
            return self.op("Softmax", scores, axis=-1)
        if self.spec["opset"] >= 18:
            top = self.op("ReduceMax", scores, self.ints(-1), keepdims=1)
        else:
            top = self.op("ReduceMax", scores, axes=[-1], keepdims=1)
        e = self.op("Exp", self.op("Sub", scores, top))
        return self.op("Div", e, self.op("ReduceSum", e, self.ints(-1), keepdims=1))

    def cross(self, x, w):
        spec = self.spec
        q, k, v = self.linear(x, w["cq"]), self.linear("prompt", w["ck"]), self.linear("prompt", w["cv"])
        scores = self.op("MatMul", self.op("Mul", q, self.const(self.m.width**-0.5)), self.op("Transpose", k, perm=[0, 2, 1]))
        p = self.op("Softmax", scores, axis=-1)
        return self.op("MatMul", p, v)


class Definition:
    """The actions as the plan format defines them, in float64. Keeps what one generation keeps."""

    def __init__(self, model):
        self.m, self.spec = model, model.spec
        self.w = [{n: a.astype(np.float64) for n, a in w.items()} for w in model.weights]
        self.residual, self.output = {}, {}

    def run(self, step, feed, dense=False):
        """The model's output at `step`, and whether every number on the way was finite."""
        m, spec = self.m, self.spec
        self.feed = {n: a.astype(np.float64) if a.dtype.kind == "f" else a for n, a in feed.items()}
        t = np.sin(self.feed["timestep"].astype(np.float64)[:, None] * np.array([[0.01, 0.003, 0.001, 0.0003]]))
        self.t = t[:, None]
        x = self.feed["x"]
        if m.text:
            parts = [self.feed["prompt"], x] if spec["text_side"] == "start" else [x, self.feed["prompt"]]
            x = np.concatenate(parts, axis=1)
        x = x + self.t @ m.embedding.astype(np.float64)
        for layer in range(m.layers):
            x = self.block(layer, "full" if dense else spec["steps"][step][layer], x)
        if m.text:
            x = x[:, m.text :] if spec["text_side"] == "start" else x[:, : m.image]
        return x

    def block(self, layer, action, x):
        spec, w = self.spec, self.w[layer]
        h = x
        if spec["norm"] == "layer":
            h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-3) * w["norm"]
        elif spec["norm"] == "rms":
            h = rms(h, w["norm"])
        if spec["modulated"]:
            h = h * (self.t @ w["scale"] + 1) + self.t @ w["shift"]
        y = self.module(layer, action, h)
        x = x + (y * (self.t @ w["gate"]) if spec["gate"] else y)
        if spec["leak"] and not (spec["projection"] == "gather" and spec["layout"] not in ("mha", "attention")):
            x = x + 0.1 * self.project(h, w, "q")
        if spec["cross"]:
            scores = self.m.width**-0.5 * (x @ w["cq"]) @ (self.feed["prompt"] @ w["ck"]).swapaxes(1, 2)
            x = x + soft(scores) @ (self.feed["prompt"] @ w["cv"])
        if spec["mlp"]:
            x = x + np.tanh(x @ w["up"]) @ w["down"]
        return x

    def project(self, h, w, name):
        return h @ w[name] + (w[f"{name}b"] if self.spec["bias"] else 0)

    def module(self, layer, action, h):
        spec, m, w = self.spec, self.m, self.w[layer]
        if action == "ast":
            return self.output[layer]
        b, n = h.shape[:2]
        halved = "asc" in action
        rows = slice(0, b)
        if halved:
            rows = slice(0, b // 2) if spec["cfg"] == "cond-first" else slice(b // 2, b)
        q, k, v = (self.project(h[rows], w, name).reshape(-1, n, w[name].shape[1] // spec["head_dim"], spec["head_dim"]) for name in "qkv")
        if spec["qk_norm"]:
            q, k = rms(q, w["qn"]), rms(k, w["kn"])
        k, v = (a.repeat(spec["heads"] // spec["kv_heads"], axis=2) for a in (k, v))
        scores = m.scale * np.einsum("bihd,bjhd->bhij", q, k) + self.bias(b)[rows]
        i = np.arange(n)
        text = (i < m.text) if spec["text_side"] == "start" else (i >= m.image)
        width = max(1, int(np.floor(spec["window"] * m.image)))
        band = (np.abs(i[:, None] - i[None, :]) <= width) | text[:, None] | text[None, :]
        window = np.einsum("bhij,bjhd->bihd", soft(np.where(band, scores, -np.inf)), v)
        if action.startswith("wa-rs"):
            o = window + self.residual[layer][rows]
        else:
            o = np.einsum("bhij,bjhd->bihd", soft(scores), v)
            r = o - window
            self.residual[layer] = np.concatenate([r, r]) if halved else r
        y = o.reshape(len(o), n, -1) @ w["o"] + (w["ob"] if spec["bias"] else 0)
        if halved:
            y = np.concatenate([y, y])
        self.output[layer] = y
        return y

    def bias(self, b):
        m, kind = self.m, self.spec["mask"]
        if kind == "pair-const":
            bias = m.pair_mask
        elif kind == "head-const":
            bias = m.head_mask
        elif kind == "key-float":
            bias = self.feed["key_bias"]
        elif kind == "key-bool":
            bias = np.where(self.feed["visible"], 0.0, -np.inf)[:, None, None, :]
        else:
            bias = np.zeros(())
        return np.broadcast_to(bias.astype(np.float64), (b, self.spec["heads"], m.tokens, m.tokens))


def rms(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-3) * weight


def soft(scores):
    """Over the last axis; a row that sees nothing is 0, as masks and bands in the library are."""
    top = scores.max(-1, keepdims=True)
    p = np.exp(scores - np.where(np.isinf(top), 0, top))
    return p / np.maximum(p.sum(-1, keepdims=True), 1e-300)


def shrunk(spec, fails):
    """A spec that still fails, as near to PLAIN as single changes get it."""
    spec = PLAIN | spec
    changed = True
    while changed:
        changed = False
        for key, plain in PLAIN.items():
            if key in ("steps", "seed") or spec[key] == plain:
                continue
            changes = {key: plain} | ({"kv_heads": spec["heads"]} if key == "heads" else {})
            if key == "heads":
                changes = {"heads": plain, "kv_heads": plain}
            if key == "cfg":
                strip = {"asc": "full", "wa-rs+asc": "wa-rs"}
                changes["steps"] = [[strip.get(a, a) for a in row] for row in spec["steps"]]
            if fails(spec | changes):
                spec, changed = spec | changes, True
        for drop in range(len(spec["steps"]) - 1, 0, -1):
            rows = spec["steps"][:drop] + spec["steps"][drop + 1 :]
            if len(rows) > 1 and fails(spec | {"steps": rows}):
                spec, changed = spec | {"steps": rows}, True
        while len(spec["steps"][0]) > 1:
            fewer = next((c for c in ([r[1:] for r in spec["steps"]], [r[:-1] for r in spec["steps"]]) if fails(spec | {"steps": c})), None)
            if fewer is None:
                break
            spec, changed = spec | {"steps": fewer}, True
    return {key: value for key, value in spec.items() if value != PLAIN[key] or key == "steps"}
