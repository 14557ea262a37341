"""What exporters and people do to attention, one small model per kind: the rewritten model computes what its plan says, or says no."""

import numpy as np
import pytest

pytest.importorskip("onnx", reason="builds its models with the onnx package")
from conftest import HOST, inspect  # noqa: E402
from graphs import HEADS, TEXT, TOKENS, WIDTH, C, denoiser  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402
from planned import PLAN, follows, rewritten, write  # noqa: E402

ANGLES = np.arange(TOKENS)[:, None] / 10 ** np.linspace(0, 2, C // 2).repeat(2)[None]
WINDOWS = PLAN | {"cfg": "none", "steps": [["full", "full"], ["wa-rs", "ast"], ["wa-rs", "wa-rs"], ["full", "wa-rs"], ["ast", "full"], ["wa-rs", "wa-rs"]]}
needs_opset_23 = pytest.mark.skipif(HOST < (1, 24), reason="needs a host with Attention of opset 23")


def rotated(g, z, cos, sin, pairs, whole):
    """A rotary embedding: neighbours as pairs of `pairs`, turned, in the shape `whole` again."""
    a, b = g("Split", g("Reshape", z, pairs), [1, 1], axis=-1, outputs=2)
    turned = g("Reshape", g("Concat", g("Neg", b), a, axis=-1), whole)
    return g("Add", g("Mul", z, cos), g("Mul", turned, sin))


# The traced batch


@pytest.mark.parametrize("tokens", [TOKENS, "n"])
def test_a_traced_batch_beside_a_size_that_is_inferred(tmp_path, tokens):
    """[2, N, H, -1, 2]: with one row of the two the -1 would become half as long."""
    cos, sin = (f(ANGLES[:, :WIDTH])[:, None] for f in (np.cos, np.sin))

    def block(g, i, h):
        n = g.norm(h)
        q, k, v = (g("Reshape", g.linear(n), [0, 0, HEADS, WIDTH]) for _ in range(3))
        q, k = (rotated(g, z, cos, sin, [2, TOKENS, HEADS, -1, 2], [2, TOKENS, HEADS, WIDTH]) for z in (q, k))
        return g("Add", h, g.merged(g.attention(*(g("Transpose", z, perm=[0, 2, 1, 3]) for z in (q, k, v)))))

    g, model = denoiser(block, tokens=tokens)
    follows(tmp_path, model, g.cores)


def test_a_traced_batch_where_heads_are_split_off(tmp_path):
    """[2, N, H, -1], a norm per head, [2, N, C]: with one row of the two a head would become half as wide."""

    def block(g, i, h):
        n = g.norm(h)
        q, k, v = (g("Reshape", g.linear(n), [2, TOKENS, HEADS, -1]) for _ in range(3))
        q, k, v = (g.heads(g("Reshape", g("Softmax", z, axis=-1), [2, TOKENS, C])) for z in (q, k, v))
        return g("Add", h, g.merged(g.attention(q, k, v)))

    g, model = denoiser(block)
    follows(tmp_path, model, g.cores)


@pytest.mark.parametrize("cfg", ["cond-first", "uncond-first"])
@pytest.mark.parametrize("rows", ["one", "equal", "different"])
@pytest.mark.parametrize("values", [False, True], ids=["qk", "qkv"])
def test_a_table_with_a_row_for_each_row_of_a_fixed_batch(tmp_path, cfg, rows, values):
    angles = {"one": ANGLES[None], "equal": np.stack([ANGLES, ANGLES]), "different": np.stack([ANGLES, 1.5 * ANGLES])}[rows]

    def block(g, i, h):
        n = g.norm(h)
        turn = lambda z: rotated(g, z, np.cos(angles), np.sin(angles), [2, TOKENS, C // 2, 2], [2, TOKENS, C])
        q, k, v = turn(g.linear(n)), turn(g.linear(n)), g.linear(n)
        v = turn(v) if values else v
        return g("Add", h, g.merged(g.attention(*(g.heads(z, 2, TOKENS) for z in (q, k, v))), 2))

    g, model = denoiser(block, rows=2)
    follows(tmp_path, model, g.cores, PLAN | {"cfg": cfg})


# Text out of sight


def unknown_axis(g, h):
    """The first token of each row, turned round: nothing changes, but nobody follows tokens through that."""
    return g("ReverseSequence", h, [1, 1], batch_axis=0, time_axis=1)


def lost(g, i, h):
    return g.attend(unknown_axis(g, h) if i == 1 else h)


def test_text_lost_behind_an_operator_is_what_the_plan_says(tmp_path):
    g, model = denoiser(lost, text=TEXT)
    plan = WINDOWS | {"text": {"tokens": TEXT, "side": "start"}}
    follows(tmp_path, model, g.cores, plan, [(TEXT, "start")] * 2)


def test_text_lost_behind_an_operator_is_asked_for(tmp_path):
    g, model = denoiser(lost, text=TEXT)
    said = rewritten(tmp_path, model, WINDOWS, check=False)
    node = next(n.name for n in model.graph.node if n.op_type == "ReverseSequence")
    assert said.returncode == 1 and "layer 1 (" in said.stderr and node in said.stderr and '"text"' in said.stderr
    assert not (tmp_path / "model.dfa.onnx").exists()


@needs_opset_23
@pytest.mark.parametrize("fused", [False, True], ids=["spelled out", "one operator"])
@pytest.mark.parametrize("said", [False, True], ids=["by the graph", "by the plan"])
def test_text_stays_in_sight_behind_cross_attention(tmp_path, fused, said):
    def block(g, i, h):
        h = g.attend(h)
        n = g.norm(h)
        q, k, v = (g.heads(g.linear(z)) for z in (n, "prompt", "prompt"))
        cross = g.fused if fused else g.attention
        return g("Add", h, g.merged(cross(q, k, v, layer=False)))

    g, model = denoiser(block, text=TEXT, opset=23)
    plan = WINDOWS | ({"text": {"tokens": TEXT, "side": "start"}} if said else {})
    follows(tmp_path, model, g.cores, plan, [(TEXT, "start")] * 2)


# Which layer is which


@pytest.mark.parametrize("turned", [False, True])
def test_layers_side_by_side_are_numbered_by_where_they_join(tmp_path, turned):
    """The same graph with the nodes of its two attentions in either order."""

    def block(g, i, h):
        n, parts, results = g.norm(h), [], []
        weights = [[g.weight() for _ in range(4)] for _ in range(2)]
        for wq, wk, wv, wo in weights:
            begin = len(g.nodes)
            o = g.attention(*(g.heads(g("MatMul", n, w)) for w in (wq, wk, wv)))
            results.append(g("MatMul", g("Reshape", g("Transpose", o, perm=[0, 2, 1, 3]), [0, 0, C]), wo))
            parts.append(g.nodes[begin:])
            del g.nodes[begin:]
            # Names are numbered by place.
            g.nodes.extend(parts[-1])
        if turned:
            a, b = (len(part) for part in parts)
            first = len(g.nodes) - a - b
            g.nodes[first:] = g.nodes[first + a :] + g.nodes[first : first + a]
        return g("Add", g("Add", h, results[0]), results[1])

    g, model = denoiser(block, layers=1)
    follows(tmp_path, model, g.cores)


# Modulations


@pytest.mark.parametrize("shifted", ["q", "k", "v", "qkv"])
def test_a_shift_by_the_time_is_no_source_of_its_own(tmp_path, shifted):
    def block(g, i, h):
        n = g.norm(h)
        q, k, v = (g("Add", g.linear(n), g.linear(g.time())) if r in shifted else g.linear(n) for r in "qkv")
        return g("Add", h, g.merged(g.attention(*(g.heads(z) for z in (q, k, v)))))

    g, model = denoiser(block)
    follows(tmp_path, model, g.cores)


# Spellings


def cast_like(g, i, h):
    """The scale in the type of q, as dynamo writes it without optimisation."""
    n = g.norm(h)
    q, k, v = (g.heads(g.linear(n)) for _ in range(3))
    root = g("CastLike", g("Sqrt", g("CastLike", np.float64(WIDTH**-0.5), q)), q)
    scores = g("MatMul", g("Mul", q, root), g("Mul", g("Transpose", k, perm=[0, 1, 3, 2]), root))
    out = g("MatMul", g("Softmax", scores, axis=-1), v)
    g.cores.append((q, k, v, out))
    return g("Add", h, g.merged(out))


def ellipsis(g, i, h):
    """Projections that leave all axes but the last unnamed."""
    linear = lambda x: g("Einsum", x, g.weight(), equation="...c,cd->...d")
    n = g.norm(h)
    o = g.attention(*(g.heads(linear(n)) for _ in range(3)))
    return g("Add", h, linear(g("Reshape", g("Transpose", o, perm=[0, 2, 1, 3]), [0, 0, C])))


def routed(g, i, h):
    """The tokens of the highest marks go through a layer of their own (mixture of depths)."""
    marks = g("ReduceSum", h, [2], keepdims=0)
    _, best = g("TopK", marks, [TOKENS // 2], axis=1, outputs=2)
    best = g("Expand", g("Unsqueeze", best, [2]), g("Concat", g("Shape", best), [C], axis=0))
    chosen = g("GatherElements", h, best, axis=1)
    return g("ScatterElements", h, best, g.attend(chosen), axis=1)


def four_bits(g, i, h):
    """Projections whose weights are numbers of four bits."""
    rng, n = np.random.default_rng(i), g.norm(h)

    def linear(x):
        packed = g.constant(rng.integers(0, 256, (C, 1, C // 2), dtype=np.uint8))
        scales = g.constant(np.full(C, 0.04))
        return g("MatMulNBits", x, packed, scales, domain="com.microsoft", K=C, N=C, bits=4, block_size=C)

    o = g.attention(*(g.heads(linear(n)) for _ in range(3)))
    return g("Add", h, linear(g("Reshape", g("Transpose", o, perm=[0, 2, 1, 3]), [0, 0, C])))


@pytest.mark.parametrize("block", [cast_like, ellipsis, routed, four_bits], ids=lambda b: b.__name__)
def test_spellings_that_are_found(tmp_path, block):
    g, model = denoiser(block, opset=18)
    path, _ = write(tmp_path, model, PLAN)
    found = inspect(path)["model"]
    assert (found["layers"], found["module_form"]) == (2, 2)
    follows(tmp_path, model, g.cores)
