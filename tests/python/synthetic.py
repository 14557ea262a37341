"""Diffusion transformers of any size with random weights, in the shape that the TorchScript exporter gives them.

For benchmarks and size tests; needs numpy and the onnx package, no PyTorch.
"""

import numpy as np
from onnx import TensorProto, helper


def dit(path, layers, width, heads, tokens, sparse=False, half=False, fused=False, mlp=True):
    """Writes a DiT of `layers` layers. `sparse`: the weights are a hole in `path.data`; else random numbers in it.
    `fused`: the attention is one `com.microsoft.MultiHeadAttention`, as ONNX Runtime's own optimizer would have it.
    `half`: float16. `mlp`: False leaves it out.

    Inputs: `x` [batch, tokens, width], `timestep` [batch]. Returns the weights' size in bytes.
    """
    kind, dtype = (TensorProto.FLOAT16, np.float16) if half else (TensorProto.FLOAT, np.float32)
    initializers, nodes, offset = [], [], 0
    data = open(path.with_name(path.name + ".data"), "wb")
    rng = np.random.default_rng(0)

    def weight(name, *dims):
        nonlocal offset
        size = dtype().nbytes * int(np.prod(dims))
        tensor = TensorProto(name=name, data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", path.name + ".data"), ("offset", offset), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        if not sparse:
            data.write((rng.standard_normal(dims, dtype=np.float32) * np.float32(dims[0] ** -0.5)).astype(dtype).tobytes())
        offset += size
        initializers.append(tensor)
        return name

    def const(name, values, dims=None, kind=TensorProto.INT64):
        initializers.append(helper.make_tensor(name, kind, [len(values)] if dims is None else dims, values))
        return name

    def node(op, inputs, output, **attributes):
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def linear(x, name, rows, columns):
        product = node("MatMul", [x, weight(f"{name}.weight", rows, columns)], f"{name}.product")
        return node("Add", [product, weight(f"{name}.bias", columns)], name)

    const("heads", [0, 0, heads, width // heads])
    const("joined", [0, 0, width])
    const("axis", [1])
    const("root_scale", [(width // heads) ** -0.25], [], kind)
    const("frequency", [0.01], [], kind)
    column = node("Unsqueeze", [node("Cast", ["timestep"], "t.float", to=kind), "axis"], "t.column")
    t = linear(node("Sin", [node("Mul", [column, "frequency"], "t.angle")], "t.sin"), "t.embedding", 1, width)
    x = node("Add", ["x", node("Unsqueeze", [t, "axis"], "t.row")], "h")
    for i in range(layers):
        p = f"block{i}"
        n = node("LayerNormalization", [x, weight(f"{p}.norm1", width)], f"{p}.n1")

        def project(role, perm):
            flat = linear(n, f"{p}.{role}", width, width)
            if fused:
                return flat
            split = node("Reshape", [flat, "heads"], f"{p}.{role}.heads")
            return node("Transpose", [split], f"{p}.{role}.transposed", perm=perm)

        q, k, v = project("q", [0, 2, 1, 3]), project("k", [0, 2, 3, 1]), project("v", [0, 2, 1, 3])
        if fused:
            o = node("MultiHeadAttention", [q, k, v], f"{p}.attention", domain="com.microsoft", num_heads=heads)
        else:
            q, k = (node("Mul", [a, "root_scale"], f"{a}.scaled") for a in (q, k))
            weights = node("Softmax", [node("MatMul", [q, k], f"{p}.scores")], f"{p}.softmax", axis=-1)
            o = node("Transpose", [node("MatMul", [weights, v], f"{p}.pv")], f"{p}.merged", perm=[0, 2, 1, 3])
            o = node("Reshape", [o, "joined"], f"{p}.joined")
        o = linear(o, f"{p}.out", width, width)
        x = node("Add", [x, o], f"{p}.attended")
        if not mlp:
            continue
        n = node("LayerNormalization", [x, weight(f"{p}.norm2", width)], f"{p}.n2")
        up = node("Tanh", [linear(n, f"{p}.up", width, 4 * width)], f"{p}.activated")
        x = node("Add", [x, linear(up, f"{p}.down", 4 * width, width)], f"{p}.result")
    shape = ["batch", tokens, width]
    graph = helper.make_graph(
        nodes, "dit",
        [helper.make_tensor_value_info("x", kind, shape),
         helper.make_tensor_value_info("timestep", TensorProto.INT64, ["batch"])],
        [helper.make_tensor_value_info(x, kind, shape)],
        initializers,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17)] + [helper.make_opsetid("com.microsoft", 1)] * fused
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    path.write_bytes(model.SerializeToString())
    data.truncate(offset)
    data.close()
    return offset
