"""A tiny diffusion transformer as an ONNX graph with the five operators, and the same in numpy.

The graph is what the rewriter makes of a model with L layers `x = x + attention(x)·(1 + t)`, in the smallest form.
The numpy model follows the definition of the actions, not the library.
"""

import json
import os
import resource
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

LIB = os.environ["DITFASTATTN_LIB"]
# `scripts/gpu-suite` names another one.
PROVIDERS = list(dict.fromkeys([os.environ.get("DITFASTATTN_PROVIDER", "CPUExecutionProvider"), "CPUExecutionProvider"]))
# Whether it is the CPU's own operators that run: not on a GPU, nor on the device that takes its place in tests.
ON_CPU = PROVIDERS[0] == "CPUExecutionProvider" and os.environ.get("DITFASTATTN_EMULATED_CUDA") != "1"
DOMAIN = "ai.ditfastattn"
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}

if os.environ.get("DFA_NO_ARENA") == "1":
    # For scripts/sanitize: each tensor is memory of its own, whose end a sanitizer knows.
    class SessionOptions(ort.SessionOptions):
        def __init__(self):
            super().__init__()
            self.enable_cpu_mem_arena = self.enable_mem_pattern = False

    ort.SessionOptions = SessionOptions


class Tiny:
    """Weights and sizes; `core` lists the layers whose attention core only is replaced.

    `mask` is a Mask. `text` are text tokens fed to the operator as input 5. `folded`: batch and heads are one axis of q, k, v
    and o. `attributes` are further ones of DiTFastAttn.
    """

    def __init__(
        self, plan, tokens=24, heads=2, head_dim=8, dtype="float32", core=(), second_sigma=False, kv_heads=None, mask=None,
        text=None, folded=False, attributes=None,
    ):
        self.plan = plan
        self.layers = len(plan["steps"][0])
        self.tokens, self.heads, self.head_dim = tokens, heads, head_dim
        self.width = heads * head_dim
        self.dtype = dtype
        self.core = list(core)
        self.second_sigma = second_sigma
        self.kv_heads = kv_heads or heads
        self.mask, self.text, self.folded = mask, text, folded
        self.attributes = attributes or {}
        rng = np.random.default_rng(7)
        self.weights = [
            {n: (rng.standard_normal((self.width, self.width)) * 0.6 / np.sqrt(self.width)).astype(dtype) for n in "qkvo"}
            for _ in range(self.layers)
        ]
        for w in self.weights:
            w.update({n: w[n][:, : self.kv_heads * head_dim] for n in "kv"})

    # ---- the graph -------------------------------------------------------------------------------------------

    def model(self, steps_attributes=None, batch="batch"):
        el = TYPES[self.dtype]
        init, nodes, infos = [], [], []

        def const(name, value):
            init.append(numpy_helper.from_array(np.asarray(value), name))
            return name

        scalars = {
            "dfa_request_id": np.zeros([1], np.int64),
            "dfa_start": np.zeros([1], bool),
            "dfa_end": np.zeros([1], bool),
        }
        # Fed with an index that does not exist, it makes the run fail after the step op and before the layers.
        inputs_of_tests = {"trip": np.zeros([], np.int64)}
        inputs = [
            helper.make_tensor_value_info("timestep", TensorProto.FLOAT, ["timesteps"]),
            helper.make_tensor_value_info("latents", el, [batch, "tokens", self.width]),
            helper.make_tensor_value_info("prompt", TensorProto.FLOAT, [batch, 3]),
        ]
        if self.second_sigma:
            inputs.append(helper.make_tensor_value_info("sigma", TensorProto.FLOAT, [1]))
        for name, value in {**scalars, **inputs_of_tests}.items():
            inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None))
            const(name, value)
        attributes = {"plan": json.dumps(self.plan), "layers": self.layers, "contract": 1}
        if self.core:
            attributes["core_layers"] = self.core
        attributes.update(steps_attributes or {})
        step_in = ["timestep", *scalars, "latents", "prompt"] + (["sigma"] if self.second_sigma else [])
        nodes.append(
            helper.make_node(
                "DiTFastAttnStep", step_in, ["ticket"] + [f"skip_{i}" for i in range(self.layers)],
                name="step", domain=DOMAIN, **attributes,
            )
        )
        const("split", np.array([0, 0, -1, self.head_dim], np.int64))
        const("join", np.array([0, 0, self.width], np.int64))
        const("fold", np.array([-1, self.tokens, self.head_dim], np.int64))
        const("unfold", np.array([-1, self.heads, self.tokens, self.head_dim], np.int64))
        if self.mask is not None:
            init.append(self.mask.tensor("mask"))
        if self.text is not None:
            const("text", np.asarray(self.text))
        nodes += [
            helper.make_node("ReduceMean", ["timestep"], ["t_mean"], keepdims=0),
            helper.make_node("Constant", [], ["thousandth"], value_float=0.001),
            helper.make_node("Mul", ["t_mean", "thousandth"], ["t_scaled"]),
            helper.make_node("ReduceMean", ["prompt"], ["p_mean"], axes=[1], keepdims=1),
            helper.make_node("Unsqueeze", ["p_mean", const("axis2", np.array([2], np.int64))], ["p_row"]),
            helper.make_node("Add", ["t_scaled", "p_row"], ["shift32"]),
            helper.make_node("Gather", ["ticket", "trip"], ["tripped"]),
            helper.make_node("Sub", ["tripped", "tripped"], ["zero"]),
            helper.make_node("Cast", ["zero"], ["nothing"], to=el),
            helper.make_node("Cast", ["shift32"], ["shift"], to=el),
            helper.make_node("Add", ["latents", "shift"], ["shifted"]),
            helper.make_node("Add", ["shifted", "nothing"], ["x_0"]),
        ]
        for i in range(self.layers):
            for n in "qkvo":
                const(f"W{n}_{i}", self.weights[i][n])
            core = i in self.core
            body, x = [], f"x_{i}"
            if not core:
                body.append(helper.make_node("DiTFastAttnSelect", [x, "ticket"], [f"sel_{i}"], name=f"select_{i}", domain=DOMAIN, layer=i))
                x = f"sel_{i}"
            for n in "qkv":
                body.append(helper.make_node("MatMul", [x, f"W{n}_{i}"], [f"{n}p_{i}"]))
                body.append(helper.make_node("Reshape", [f"{n}p_{i}", "split"], [f"{n}_{i}"]))
            more = ["mask" if self.mask is not None else "", "text" if self.text is not None else ""]
            if self.mask is not None and self.mask.selected and not core:
                body.append(helper.make_node("DiTFastAttnSelect", ["mask", "ticket"], [f"m_{i}"], name=f"select_mask_{i}", domain=DOMAIN, layer=i))
                more[0] = f"m_{i}"
            while more and not more[-1]:
                more.pop()
            # Three layouts: q as projected, k transposed for Q·Kᵀ, v with heads first.
            body.append(helper.make_node("Transpose", [f"k_{i}"], [f"kt_{i}"], perm=[0, 2, 3, 1]))
            body.append(helper.make_node("Transpose", [f"v_{i}"], [f"vt_{i}"], perm=[0, 2, 1, 3]))
            qkv, layouts = [f"q_{i}", f"kt_{i}", f"vt_{i}"], ["BSHD", "BHDS", "BHSD", "BSHD"]
            o_dims = [batch if core else f"rows_{i}", "tokens", self.heads, self.head_dim]
            if self.folded:
                for n in "qkv":
                    body.append(helper.make_node("Transpose", [f"{n}_{i}"], [f"{n}h_{i}"], perm=[0, 2, 1, 3]))
                    body.append(helper.make_node("Reshape", [f"{n}h_{i}", "fold"], [f"{n}f_{i}"]))
                qkv, layouts = [f"{n}f_{i}" for n in "qkv"], ["BSD"] * 4
                o_dims = [f"planes_{i}", "tokens", self.head_dim]
            body.append(
                helper.make_node(
                    "DiTFastAttn", [*qkv, "ticket", *more], [f"o_{i}"], name=f"attention_{i}", domain=DOMAIN,
                    layer=i, scale=0.0, form="core" if core else "module",
                    **{f"{n}_layout": layout for n, layout in zip("qkvo", layouts)}, **self.attributes,
                )
            )
            o = f"o_{i}"
            if self.folded:
                body.append(helper.make_node("Reshape", [o, "unfold"], [f"ou_{i}"]))
                body.append(helper.make_node("Transpose", [f"ou_{i}"], [f"ot_{i}"], perm=[0, 2, 1, 3]))
                o = f"ot_{i}"
            body.append(helper.make_node("Reshape", [o, "join"], [f"oj_{i}"]))
            body.append(helper.make_node("MatMul", [f"oj_{i}", f"Wo_{i}"], [f"op_{i}"]))
            out = helper.make_tensor_value_info
            # As the rewriter does: types and shapes of everything the operators make. A dimension that may be halved has
            # a name of its own: hosts take equal names for equal sizes and reuse buffers by them.
            known = [
                out(f"sel_{i}", el, [f"rows_{i}", "tokens", self.width]),
                out(f"o_{i}", el, o_dims),
            ]
            if core:
                nodes += body
                infos.append(known[1])
                y = f"op_{i}"
            else:
                body.append(helper.make_node("DiTFastAttnShare", [f"op_{i}", "ticket"], [f"sh_{i}"], name=f"share_{i}", domain=DOMAIN, layer=i))
                dims = [batch, "tokens", self.width]
                other = helper.make_graph(body, f"compute_{i}", [], [out(f"sh_{i}", el, dims)], value_info=known)
                then = helper.make_graph(
                    [helper.make_node("DiTFastAttnReuse", [f"x_{i}", "ticket"], [f"re_{i}"], name=f"reuse_{i}", domain=DOMAIN, layer=i)],
                    f"cached_{i}", [], [out(f"re_{i}", el, dims)],
                )
                nodes.append(helper.make_node("If", [f"skip_{i}"], [f"y_{i}"], then_branch=then, else_branch=other))
                y = f"y_{i}"
            nodes.append(helper.make_node("Add", [f"x_{i}", y], [f"x_{i + 1}"]))
        nodes.append(helper.make_node("Identity", [f"x_{self.layers}"], ["out"]))
        graph = helper.make_graph(
            nodes, "tiny", inputs, [helper.make_tensor_value_info("out", el, [batch, "tokens", self.width])], init,
            value_info=infos,
        )
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)], ir_version=8
        )

    def session(self, threads=1, registrations=1, log_level=3, **kw):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = log_level
        for _ in range(registrations):
            options.register_custom_ops_library(LIB)
        return ort.InferenceSession(self.model(**kw).SerializeToString(), options, providers=PROVIDERS)

    # ---- the definition --------------------------------------------------------------------------------------

    def client(self, prompt, seed=0, batch=2, session=None, **feeds):
        return Client(self, prompt, seed, batch, session, feeds)


class Client:
    """One generation: latents that move, what the library should answer, and what dense attention answers."""

    def __init__(self, tiny, prompt, seed, batch, session, feeds):
        self.tiny, self.feeds, self.session = tiny, feeds, session
        rng = np.random.default_rng(seed)
        noise = rng.standard_normal((batch, tiny.tokens, tiny.width)).astype(tiny.dtype)
        self.noise = np.broadcast_to(noise[:1], noise.shape).copy()
        self.image = np.random.default_rng(99).standard_normal(noise.shape).astype(tiny.dtype)
        self.prompt = (np.arange(batch * 3, dtype=np.float32).reshape(batch, 3) * 0.01 + prompt).astype(np.float32)
        self.reference = Reference(tiny)

    def latents(self, step):
        part = 0.8 * step / len(self.tiny.plan["steps"])
        return ((1 - part) * self.noise + part * self.image).astype(self.tiny.dtype)

    def timestep(self, step):
        listed = self.tiny.plan.get("timesteps")
        return float(listed[step] if listed else 900 - 10 * step)

    def inputs(self, step, **more):
        feeds = {
            "timestep": np.full([len(self.noise)], self.timestep(step), np.float32),
            "latents": self.latents(step),
            "prompt": self.prompt,
            **self.feeds,
            **more,
        }
        if self.tiny.second_sigma:
            feeds.setdefault("sigma", np.array([1.0 - 0.05 * step], np.float32))
        return feeds

    def run(self, step, **more):
        return self.session.run(None, self.inputs(step, **more))[0]

    def planned(self, step):
        """What the plan says, from what this client has computed so far. To be called for every step in order."""
        return self.reference.run(step, self.latents(step), self.timestep(step), self.prompt)

    def dense(self, step):
        return Reference(self.tiny).run(step, self.latents(step), self.timestep(step), self.prompt, dense=True)


class Reference:
    """The actions as the plan format defines them, in float64 but for what is stored."""

    def __init__(self, tiny):
        self.tiny = tiny
        self.residual, self.output = {}, {}

    def run(self, step, latents, timestep, prompt, dense=False):
        tiny = self.tiny
        x = latents.astype(np.float64) + timestep * 0.001 + prompt.mean(1)[:, None, None]
        for layer in range(tiny.layers):
            action = "full" if dense else tiny.plan["steps"][step][layer]
            x = x + self.layer(layer, action, x)
        return x

    def layer(self, layer, action, x):
        tiny = self.tiny
        rows, n = len(x), x.shape[1]
        if action == "ast":
            return self.output[layer]
        cfg = tiny.plan.get("cfg", "none")
        half = slice(0, rows // 2) if cfg == "cond-first" else slice(rows // 2, rows)
        halved = "asc" in action and rows % 2 == 0
        rows_now = half if halved else slice(0, rows)
        q, k, v = (self.project(x[rows_now], layer, name) for name in "qkv")
        text, side = self.text()
        window = max(1, int(np.floor(tiny.plan.get("window", 0.125) * (n - text))))
        i = np.arange(n)
        is_text = i < text if side == "start" else i >= n - text
        band = (np.abs(i[:, None] - i[None, :]) <= window) | is_text[:, None] | is_text[None, :]
        scores = np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(tiny.head_dim)
        if tiny.mask is not None:
            scores = scores + tiny.mask.bias(rows, tiny)[rows_now]
        windowed = attend(np.where(band, scores, -np.inf), v)
        if action.startswith("wa-rs"):
            o = windowed + self.residual[layer][rows_now]
        else:
            o = attend(scores, v)
            r = o - windowed
            self.residual[layer] = np.concatenate([r, r]) if halved else r
        y = o.reshape(len(o), n, tiny.width) @ tiny.weights[layer]["o"].astype(np.float64)
        if halved:
            y = np.concatenate([y, y])
        self.output[layer] = y
        return y

    def text(self):
        """Text tokens and where they are: what the plan says, else what the graph says."""
        tiny = self.tiny
        text = tiny.plan.get("text")
        if text and tiny.attributes.get("joint", 1):
            return text["tokens"], text["side"]
        side = tiny.attributes.get("text_side", "end")
        if tiny.text is not None:
            return int(np.asarray(tiny.text).item()), side
        return tiny.attributes.get("text", 0), side

    def project(self, x, layer, name):
        w = self.tiny.weights[layer][name].astype(np.float64)
        heads = (x @ w).reshape(*x.shape[:2], -1, self.tiny.head_dim)
        return heads.repeat(self.tiny.heads // heads.shape[2], axis=2)


def attend(scores, v):
    """A row that sees nothing is 0."""
    top = scores.max(-1, keepdims=True)
    p = np.exp(scores - np.where(np.isinf(top), 0, top))
    return np.einsum("bhij,bjhd->bihd", p / np.maximum(p.sum(-1, keepdims=True), 1e-300), v)


class Mask:
    """An array of numbers to add, or of booleans, and the type that the operator gets it in."""

    def __init__(self, array, kind="float32", selected=False):
        self.array, self.kind, self.selected = array, kind, selected

    def tensor(self, name):
        if self.kind == "bfloat16":
            array = self.array.astype(np.float32)
            return helper.make_tensor(name, TensorProto.BFLOAT16, array.shape, array.flatten().tolist())
        return numpy_helper.from_array(self.array.astype(self.kind), name)

    def bias(self, rows, tiny):
        """What is added to the scores, `[rows, heads, tokens, tokens]`."""
        array = self.array
        if array.dtype == bool:
            array = np.where(array, 0.0, -np.inf)
        if tiny.folded and array.ndim == 3:
            array = array.reshape(-1, tiny.heads if len(array) > 1 else 1, *array.shape[1:])
        return np.broadcast_to(array.astype(np.float64), (rows, tiny.heads, tiny.tokens, tiny.tokens))


def resident():
    """Bytes of memory that this process occupies."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def stats():
    """The counters of this process."""
    import ctypes

    lib = ctypes.CDLL(LIB)
    lib.ditfastattn_stats.restype = ctypes.c_size_t
    lib.ditfastattn_stats.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    buffer = ctypes.create_string_buffer(lib.ditfastattn_stats(None, 0) + 64)
    lib.ditfastattn_stats(buffer, len(buffer))
    return json.loads(buffer.value)


def reset():
    import ctypes

    ctypes.CDLL(LIB).ditfastattn_reset()


def random_plan(seed, steps=8, layers=3, cfg="cond-first", timesteps=True):
    rng = np.random.default_rng(seed)
    actions = ["full", "ast", "wa-rs"] + (["asc", "wa-rs+asc"] if cfg != "none" else [])
    rows = [["full"] * layers] + [[str(rng.choice(actions)) for _ in range(layers)] for _ in range(steps - 1)]
    plan = {"format": "ditfastattn-plan", "version": 1, "cfg": cfg, "steps": rows}
    if timesteps:
        plan["timesteps"] = [float(999 - 100 * s) for s in range(steps)]
    return plan
