"""Hostile models, and what must be said about each: external data that leads astray, bombs, contradictions.

Owns the making of the files. They are made of a small honest model and written into a folder when a test wants them; none is kept.
`python tests/python/hostile.py FOLDER` writes them all, for a look at them by hand.
"""

import os
import sys
from pathlib import Path

from onnx import AttributeProto, GraphProto, ModelProto, SparseTensorProto, TensorProto, helper

MiB = 1 << 20


def honest(layers=1, width=8, heads=2, tokens=4):
    """A diffusion transformer as small as one can be."""
    nodes, initializers = [], []

    def weight(name, *dims):
        count = 1
        for d in dims:
            count *= d
        initializers.append(helper.make_tensor(name, TensorProto.FLOAT, dims, [0.01 * (i % 7) for i in range(count)]))
        return name

    def const(name, values, kind=TensorProto.INT64, dims=None):
        initializers.append(helper.make_tensor(name, kind, [len(values)] if dims is None else dims, values))
        return name

    def node(op, inputs, output, **attributes):
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    const("heads", [0, 0, heads, width // heads])
    const("joined", [0, 0, width])
    const("axes", [1, 2])
    const("scale", [(width // heads) ** -0.5], TensorProto.FLOAT, [])
    t = node("Unsqueeze", [node("Sin", [node("Cast", ["timestep"], "tf", to=TensorProto.FLOAT)], "ts"), "axes"], "t")
    x = node("Add", ["x", t], "h")
    for i in range(layers):
        def project(role, perm, x=x, i=i):
            flat = node("MatMul", [x, weight(f"w{role}{i}", width, width)], f"{role}{i}p")
            return node("Transpose", [node("Reshape", [flat, "heads"], f"{role}{i}h")], f"{role}{i}", perm=perm)

        q, k, v = project("q", [0, 2, 1, 3]), project("k", [0, 2, 3, 1]), project("v", [0, 2, 1, 3])
        scores = node("Mul", [node("MatMul", [q, k], f"s{i}"), "scale"], f"ss{i}")
        o = node("MatMul", [node("Softmax", [scores], f"p{i}", axis=-1), v], f"o{i}")
        o = node("Reshape", [node("Transpose", [o], f"ot{i}", perm=[0, 2, 1, 3]), "joined"], f"oj{i}")
        x = node("Add", [x, node("MatMul", [o, weight(f"wo{i}", width, width)], f"y{i}")], f"x{i}")
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "small",
        [info("x", TensorProto.FLOAT, ["batch", tokens, width]), info("timestep", TensorProto.INT64, ["batch"])],
        [info(x, TensorProto.FLOAT, ["batch", tokens, width])], initializers,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def outside(location, name="secret", **more):
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2, 2], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


# ---- external data: where a tensor may hide, and what its location may be -------------------------------------------


def in_initializer(model, tensor):
    model.graph.initializer.append(tensor)


def in_sparse_values(model, tensor):
    model.graph.sparse_initializer.append(SparseTensorProto(values=tensor, dims=[4]))


def in_sparse_indices(model, tensor):
    values = helper.make_tensor("values", TensorProto.FLOAT, [2], [1.0, 2.0])
    model.graph.sparse_initializer.append(SparseTensorProto(values=values, indices=tensor, dims=[4]))


def in_attribute(model, tensor):
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def in_tensors_attribute(model, tensor):
    node = helper.make_node("Whatever", [], ["c"], domain="other")
    node.attribute.append(AttributeProto(name="all", type=AttributeProto.TENSORS, tensors=[tensor]))
    model.graph.node.append(node)


def in_sparse_attribute(model, tensor):
    node = helper.make_node("Constant", [], ["c"])
    sparse = SparseTensorProto(values=tensor, dims=[4])
    node.attribute.append(AttributeProto(name="sparse_value", type=AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse))
    model.graph.node.append(node)


def in_subgraph(model, tensor):
    inner = helper.make_graph([helper.make_node("Identity", [tensor.name], ["inner"])], "then", [], [helper.make_empty_tensor_value_info("inner")], [tensor])
    condition = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    model.graph.initializer.append(condition)
    model.graph.node.append(helper.make_node("If", ["yes"], ["c"], then_branch=inner, else_branch=inner))


def in_function(model, tensor):
    body = helper.make_node("Constant", [], ["c"], value=tensor)
    model.functions.append(helper.make_function("other", "Fun", [], ["c"], [body], [helper.make_opsetid("", 17)]))


def in_training_info(model, tensor):
    model.training_info.add().algorithm.CopyFrom(GraphProto(name="step", initializer=[tensor]))


PLACES = [in_initializer, in_sparse_values, in_sparse_indices, in_attribute, in_tensors_attribute, in_sparse_attribute, in_subgraph, in_function, in_training_info]
LOCATIONS = {
    "upwards": ("../weights", "leads upwards"),
    "upwards-later": ("a/../../weights", "leads upwards"),
    "upwards-backslash": ("a\\..\\..\\weights", "leads upwards"),
    "absolute": ("/etc/passwd", "an absolute path"),
    "drive": ("C:\\weights", "an absolute path"),
    "share": ("\\\\host\\weights", "an absolute path"),
    "empty": ("", "no name"),
    "nul": ("weights\0.bin", "NUL"),
    "memory": ("*/_ORT_MEM_ADDR_/*", "an address in memory"),
}


def external():
    """(name, bytes, words of the refusal)"""
    for place in PLACES:
        model = honest()
        place(model, outside("../weights"))
        yield f"external-{place.__name__.replace('_', '-')}", model.SerializeToString(), ["secret", "../weights", "leads upwards"]
    for name, (location, words) in LOCATIONS.items():
        model = honest()
        in_initializer(model, outside(location))
        yield f"external-{name}", model.SerializeToString(), ["secret", words]
    model = honest()
    tensor = outside("weights")
    tensor.external_data.add(key="location", value="other")
    in_initializer(model, tensor)
    yield "external-twice", model.SerializeToString(), ["secret", "elsewhere too"]


# ---- bombs: little to write, much to read --------------------------------------------------------------------------


def varint(n):
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes(out + bytes([n]))


def field(number, payload):
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def nested(depth):
    """`If` in `If` in `If`."""
    graph = b""
    for _ in range(depth):
        attribute = field(1, b"then_branch") + field(6, graph) + b"\xa0\x01\x05"
        graph = field(1, field(4, b"If") + field(5, attribute))
    return graph


def bombs(size=16 * MiB):
    """(name, bytes, words of the refusal or None where an answer is as good); each of about `size` bytes, and all well-formed."""
    base = honest().SerializeToString()
    two = size // 2

    def graph(payload):
        """The honest graph with more in it: a message that occurs again is merged by some readers, so it is one field here."""
        model = honest()
        inner = model.graph.SerializeToString() + payload
        model.ClearField("graph")
        return model.SerializeToString() + field(7, inner)

    yield "bomb-depth", field(7, nested(10_000)), ["deep"]
    yield "bomb-depth-33", graph(nested(40)), ["deep"]
    yield "bomb-model-fields", base + b"\x78\x00" * two, ["fields"]
    yield "bomb-graph-fields", graph(b"\x78\x00" * two), ["fields"]
    yield "bomb-nodes", graph(field(1, b"") * two), ["fields"]
    yield "bomb-node-inputs", graph(field(1, b"\x0a\x00" * two)), ["fields"]
    yield "bomb-inputs-of-many-nodes", graph(field(1, b"\x0a\x00" * 200_000) * (size // 400_000)), ["names and numbers"]
    yield "bomb-attributes", graph(field(1, b"\x2a\x00" * two)), ["fields"]
    yield "bomb-ints", graph(field(1, field(5, field(1, b"a") + b"\x40\x00" * two))), ["fields"]
    yield "bomb-ints-packed", graph(field(1, field(5, field(1, b"a") + field(8, b"\x00" * size)))), ["names and numbers"]
    yield "bomb-shape", graph(field(13, field(1, b"v") + field(2, field(1, field(2, b"\x0a\x00" * two))))), ["bytes"]
    yield "bomb-dims", graph(field(5, b"\x08\x00" * two)), ["initializer"]
    yield "bomb-int64-data", graph(field(5, field(1, b"\x01") + b"\x10\x07" + field(7, b"\x00" * size) + field(8, b"w"))), None
    yield "bomb-raw-data", graph(field(5, field(1, b"\x01") + b"\x10\x01" + field(9, b"\x00" * size) + field(8, b"w"))), None
    yield "bomb-group", base + b"\x7b" * (size - len(base)), ["group"]


def functions():
    """(name, bytes, words of the refusal or None where an answer is as good): calls that multiply; a few kilobytes to a megabyte each."""

    def model(*functions, calls=1):
        base = honest()
        base.opset_import.add(domain="f", version=1)
        for i in range(calls):
            base.graph.node.add(op_type="a", domain="f", input=["x"], output=[f"called{i}"])
        return base.SerializeToString() + b"".join(field(25, f) for f in functions)

    def function(name, *nodes):
        return field(1, name) + field(4, b"x") + field(5, b"y") + b"".join(field(7, n) for n in nodes) + field(10, b"f")

    def node(op, source=b"x", result=b"y", domain=b"f", more=b""):
        return field(1, source) + field(2, result) + field(4, op) + field(7, domain) + more

    def doubling(levels):
        names = [b"a"] + [b"b%d" % i for i in range(levels)]
        doubled = [function(name, node(below, b"x", b"m"), node(below, b"m")) for name, below in zip(names, names[1:])]
        return [*doubled, function(names[-1], node(b"Abs", domain=b""))]

    yield "functions-doubling", model(*doubling(31)), ["grow"]
    yield "functions-doubling-a-little", model(*doubling(15)), None
    names = [b"a"] + [b"b%d" % i for i in range(100)]
    yield "functions-deep", model(*[function(name, node(below)) for name, below in zip(names, names[1:])]), ["deep"]
    yield "functions-circle", model(function(b"a", node(b"a"))), ["calls itself"]
    yield "functions-large", model(function(b"a", node(b"Abs", domain=b"", more=field(6, b"d" * MiB))), calls=1000), ["grow"]
    yield "functions-long-names", model(function(b"a", node(b"Abs", result=b"n" * 60_000, domain=b""), node(b"Abs", domain=b"")), calls=1000), ["grow"]
    yield "functions-many-calls", model(function(b"a", node(b"Abs", domain=b"")), calls=20_000), None


def crowded(count=200_000):
    """The honest model, and a node that stands before the `count` values that it reads."""
    names = [b"many%d" % i for i in range(count)]
    reader = field(1, b"".join(field(1, name) for name in names) + field(2, b"sum") + field(4, b"Sum"))
    producers = b"".join(field(1, field(1, b"sample") + field(2, name) + field(4, b"Identity")) for name in names)
    model = honest()
    inner = model.graph.SerializeToString() + reader + producers
    model.ClearField("graph")
    return model.SerializeToString() + field(7, inner)


# ---- contradictions ---------------------------------------------------------------------------------------------------


def contradictions():
    """(name, bytes, words of the refusal or None where an answer is as good)"""
    model = honest()
    yield "two-graphs", model.SerializeToString() + field(7, model.graph.SerializeToString()), ["more than one graph"]
    model = honest()
    model.graph.node.append(model.graph.node[-1])
    yield "value-produced-twice", model.SerializeToString(), ["produced twice"]
    model = honest()
    model.graph.node[0].input[0] = model.graph.output[0].name
    yield "a-circle", model.SerializeToString(), ["need each other"]
    model = honest()
    del model.graph.node[:]
    yield "no-nodes", model.SerializeToString(), None
    for dims in ([2**62, 2**62], [-1, 4], [-(2**63)], [2**63 - 1] * 8):
        model = honest()
        model.graph.initializer[-1].dims[:] = dims
        yield f"dims-{len(dims)}-{dims[0]}", model.SerializeToString(), None
    for target in ([2**62, -1], [-(2**63), 1, 1, 1], [0, 0, 0, 0, 0, 0, 0], [-1, -1], [2**31, 2**31, 2**31]):
        model = honest()
        heads = next(i for i in model.graph.initializer if i.name == "heads")
        heads.CopyFrom(helper.make_tensor("heads", TensorProto.INT64, [len(target)], target))
        yield f"reshape-{len(target)}-{target[0]}", model.SerializeToString(), None
    for size in (0, -1, 2**63 - 1, -(2**63)):
        model = honest()
        for value in (*model.graph.input, *model.graph.output):
            for dim in value.type.tensor_type.shape.dim:
                dim.dim_value = size
        yield f"input-{size}", model.SerializeToString(), None
    for perm in ([0, 0, 0, 0], [9, 8, 7, 6], [-(2**63)] * 4, [0, 2, 1]):
        model = honest()
        for node in model.graph.node:
            if node.op_type == "Transpose":
                node.attribute[0].ints[:] = perm
        yield f"perm-{len(perm)}-{perm[0]}", model.SerializeToString(), None
    for axis in (2**63 - 1, -(2**63), 77):
        model = honest()
        next(n for n in model.graph.node if n.op_type == "Softmax").attribute[0].i = axis
        yield f"axis-{axis}", model.SerializeToString(), None


def write(folder):
    for name, data, _ in (*external(), *bombs(), *functions(), *contradictions()):
        (folder / f"{name}.onnx").write_bytes(data)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    os.makedirs(target, exist_ok=True)
    write(target)
