"""Small denoisers made node by node, for what exporters and people do to attention."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

C, HEADS, WIDTH, TOKENS, TEXT = 32, 2, 16, 32, 8


class Graph:
    """Nodes in the making. `cores` are the attentions in the order of their layers: names of q, k, v and the result, all [B, H, N, D]."""

    def __init__(self, opset=17, seed=0):
        self.nodes, self.constants, self.cores = [], [], []
        self.opset, self.rng = opset, np.random.default_rng(seed)

    def __call__(self, op, *inputs, outputs=1, name=None, domain="", **attributes):
        """One node; what is no name is a constant. The name of its result, or a list of them."""
        inputs = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        first = name or f"{op}_{len(self.nodes)}"
        names = [first, *(f"{first}_{k}" for k in range(1, outputs))]
        self.nodes.append(helper.make_node(op, inputs, names, name=f"node_{first}", domain=domain, **attributes))
        return first if outputs == 1 else names

    def constant(self, array):
        array = np.asarray(array)
        array = array.astype({"f": np.float32, "i": np.int64}.get(array.dtype.kind, array.dtype))
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, rows=C, columns=C):
        return self.constant(self.rng.standard_normal((rows, columns)) * rows**-0.5)

    def linear(self, x, rows=C, columns=C):
        return self("MatMul", x, self.weight(rows, columns))

    def norm(self, x):
        return self("LayerNormalization", x, np.ones(C), axis=-1)

    def time(self):
        """[B, 1, C]"""
        sine = self("Sin", self("Mul", self("Unsqueeze", "t", [1]), np.linspace(0.001, 0.03, C)[None]))
        return self("Unsqueeze", self.linear(sine), [1])

    def heads(self, x, rows=0, tokens=0):
        return self("Transpose", self("Reshape", x, [rows, tokens, HEADS, WIDTH]), perm=[0, 2, 1, 3])

    def merged(self, o, rows=0):
        """The heads side by side again, and projected."""
        return self.linear(self("Reshape", self("Transpose", o, perm=[0, 2, 1, 3]), [rows, -1, C]))

    def attention(self, q, k, v, layer=True):
        """Spelled out, of heads; `layer`: a column of the plan."""
        scores = self("Mul", self("MatMul", q, self("Transpose", k, perm=[0, 1, 3, 2])), np.float32(WIDTH**-0.5))
        out = self("MatMul", self("Softmax", scores, axis=-1), v)
        if layer:
            self.cores.append((q, k, v, out))
        return out

    def fused(self, q, k, v, layer=True):
        """The same as one operator."""
        out = self("Attention", q, k, v)
        if layer:
            self.cores.append((q, k, v, out))
        return out

    def attend(self, h, turn=lambda z: z):
        """`h` after a layer; `turn` is done to q and k before their heads are split."""
        n = self.norm(h)
        q, k, v = turn(self.linear(n)), turn(self.linear(n)), self.linear(n)
        return self("Add", h, self.merged(self.attention(*(self.heads(z) for z in (q, k, v)))))


def denoiser(block, layers=2, rows="b", tokens=TOKENS, text=0, side="start", opset=17):
    """Layers of `block(graph, index, h)`, with `text` tokens of a prompt at one side. The graph and its model."""
    g = Graph(opset)
    h = g("Add", g.linear("x", 8), g.time())
    inputs = {"x": [rows, tokens, 8], "t": [rows]}
    if text:
        prompt = g.linear("prompt")
        h = g("Concat", *([prompt, h] if side == "start" else [h, prompt]), axis=1)
        inputs["prompt"] = [rows, text, C]
    for i in range(layers):
        h = block(g, i, h)
    if text:
        first = text if side == "start" else 0
        h = g("Slice", h, [first], [first + TOKENS], [1])
    g("MatMul", h, g.weight(C, 8), name="out")
    info = lambda values: [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in values.items()]
    graph = helper.make_graph(g.nodes, "g", info(inputs), info({"out": [rows, tokens, 8]}), g.constants)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return g, helper.make_model(graph, opset_imports=imports, ir_version=10 if opset > 18 else 8)
