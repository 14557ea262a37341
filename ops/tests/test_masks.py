"""Masks, text tokens at run time, folded and grouped heads, and windows over everything, against the definition in numpy."""

import numpy as np
import pytest

import tiny as T
from test_ops import clean, close, edit, generation  # noqa: F401

N, H = 24, 2

# Every action, for both halves and for one.
ROWS = [["full"] * 3, ["wa-rs", "asc", "ast"], ["wa-rs+asc", "wa-rs", "full"], ["ast", "wa-rs+asc", "wa-rs"], ["full", "ast", "wa-rs+asc"],
        ["wa-rs", "full", "asc"], ["asc", "wa-rs", "wa-rs+asc"]]


def plan(cfg="cond-first", **more):
    rows = ROWS
    if cfg == "none":
        rows = [[{"asc": "full", "wa-rs+asc": "wa-rs"}.get(action, action) for action in row] for row in ROWS]
    timesteps = [float(999 - 100 * s) for s in range(len(rows))]
    return {"format": "ditfastattn-plan", "version": 1, "cfg": cfg, "steps": rows, "timesteps": timesteps, **more}


def shapes(batch):
    return [[N], [N, N], [N, 1], [1, N, N], [H, 1, N], [batch, 1, 1, N], [1, 1, N, N], [batch, 1, N, N], [batch, H, N, N], [1, H, N, 1]]


def mask(shape, kind, seed=0, selected=False, hidden=0.3):
    """Rounded so that every type holds the same numbers. Every query sees its own key."""
    rng = np.random.default_rng(seed)
    hides = rng.random(shape) < hidden
    if len(shape) == 1 or shape[-2] == 1:
        hides[..., ::4] = False
    elif shape[-1] == 1:
        hides[...] = False
    else:
        hides[..., np.arange(N), np.arange(N)] = False
    if kind == "bool":
        return T.Mask(~hides, kind)
    numbers = np.round(rng.standard_normal(shape) * 4) / 4
    return T.Mask(np.where(hides, -np.inf, numbers), kind, selected)


def follow(tiny, batch=2, seed=1):
    client = tiny.client(0.1, seed, batch=batch, session=tiny.session())
    for got, expected in generation(client):
        assert np.isfinite(got).all()
        close(got, expected, tiny.dtype)
    s = T.stats()
    assert s["misses"] == s["recomputes"] == s["non_finite"] == s["mismatches"] == 0


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "bool"])
@pytest.mark.parametrize("form", ["module", "core"])
@pytest.mark.parametrize("shape", range(len(shapes(2))))
def test_masks_of_every_shape_and_type(shape, form, kind):
    # Types of q, orders of guidance and batches take turns: all of them meet every action.
    turn = shape + len(kind)
    dtype = ["float32", "float16"][turn % 2]
    cfg = ["cond-first", "uncond-first", "none"][turn % 3]
    batch = 4 if turn % 4 == 1 else 2
    tiny = T.Tiny(plan(cfg), dtype=dtype, core=[0, 1, 2] if form == "core" else [], mask=mask(shapes(batch)[shape], kind, turn))
    follow(tiny, batch)


@pytest.mark.parametrize("cfg", ["cond-first", "uncond-first"])
def test_a_mask_may_be_selected_with_the_batch(cfg):
    follow(T.Tiny(plan(cfg), mask=mask([4, 1, N, N], "float32", selected=True)), batch=4)


@pytest.mark.parametrize("core", [[], [0, 1, 2]])
@pytest.mark.parametrize("shape", [None, [1, N, N], [4 * H, N, N], [4 * H, 1, N], [N]])
def test_heads_may_be_folded_into_the_batch(core, shape):
    given = None if shape is None else mask(shape, "float32")
    follow(T.Tiny(plan("uncond-first"), core=core, folded=True, mask=given), batch=4)


@pytest.mark.parametrize("core", [[], [0, 1, 2]])
def test_heads_may_share_keys_and_values(core):
    follow(T.Tiny(plan(), heads=4, kv_heads=2, core=core))
    follow(T.Tiny(plan(), heads=4, kv_heads=1, core=core, mask=mask([N, N], "bool")), batch=4)


@pytest.mark.parametrize("low", [-1e4, -65504.0, float(np.finfo(np.float32).min)])
def test_large_finite_numbers_hide(low):
    bias = np.zeros([2, 1, 1, N])
    # Every window has something else to see: where all is pushed down alike, only the last bits of float32 decide.
    bias[..., 21:] = low
    follow(T.Tiny(plan(), mask=T.Mask(bias)))


@pytest.mark.parametrize("kind,guard", [("bool", 0), ("bool", 1), ("float32", 1)])
def test_rows_that_see_nothing_are_zero(kind, guard):
    given = mask([N, N], kind)
    given.array[5] = False if kind == "bool" else -np.inf
    # This one sees something, but not inside its window.
    given.array[12, 2:22] = False if kind == "bool" else -np.inf
    follow(T.Tiny(plan(), mask=given, attributes={"mask_guard": guard}))


def test_without_a_guard_a_row_that_sees_nothing_is_nan_and_nothing_of_it_is_kept():
    given = mask([N, N], "float32")
    given.array[5] = -np.inf
    tiny = T.Tiny(plan(), mask=given)
    client = tiny.client(0.1, session=tiny.session())
    for step in range(len(ROWS)):
        assert np.isnan(client.run(step)[:, 5]).all()
    s = T.stats()
    assert s["non_finite"] > 0 and s["layers_window"] == s["layers_reused"] == 0


@pytest.mark.parametrize("side", ["start", "end"])
@pytest.mark.parametrize("shape", [[], [1]])
def test_text_tokens_at_run_time(side, shape):
    follow(T.Tiny(plan(), text=np.full(shape, 5), attributes={"text_side": side}))
    follow(T.Tiny(plan(), text=np.full(shape, 5), mask=mask([2, 1, 1, N], "bool"), attributes={"text_side": side}))


@pytest.mark.parametrize("joint", [0, 1])
@pytest.mark.parametrize("fed", [None, 3])
@pytest.mark.parametrize("planned", [None, 7])
def test_the_plan_comes_before_the_graph_and_run_time_before_rewriting(planned, fed, joint):
    more = {} if planned is None else {"text": {"tokens": planned, "side": "start"}}
    attributes = {"text": 5, "text_side": "end", "joint": joint}
    follow(T.Tiny(plan(**more), text=fed, attributes=attributes))


@pytest.mark.parametrize(
    "more,given,words",
    [
        ({"text": {"tokens": 25, "side": "end"}}, {}, "the plan says that 25 tokens are text, the sequence has 24"),
        ({}, {"text": 99}, "input 5 says that 99"),
        ({}, {"text": -1}, "input 5 says that -1"),
        ({}, {"text": [1, 2]}, r"input 5.*int64 \[2\], expected one int64"),
        ({}, {"attributes": {"text": 25}}, "attribute `text` says that 25"),
    ],
)
def test_more_text_than_tokens_is_an_error(more, given, words):
    tiny = T.Tiny(plan(**more), **given)
    client = tiny.client(0.1, session=tiny.session(log_level=4))
    with pytest.raises(Exception, match=f"attention_0.*{words}"):
        client.run(0)


@pytest.mark.parametrize(
    "given,words",
    [
        (T.Mask(np.zeros([3, 1, 1, N])), r"\[3, 1, 1, 24\].*does not broadcast to \[2, 2, 24, 24\]"),
        (T.Mask(np.zeros([2, N])), r"\[2, 24\].*does not broadcast"),
        (T.Mask(np.zeros([])), r"\[\].*does not broadcast"),
        (T.Mask(np.zeros([4, 1, 1, N])), r"does not broadcast"),
        (T.Mask(np.zeros([N]), "float64"), "of type double, expected float, float16, bfloat16 or bool"),
        (T.Mask(np.zeros([N]), "int64"), "of type int64"),
    ],
)
def test_masks_that_do_not_fit_are_refused_by_name(given, words):
    tiny = T.Tiny(plan(), mask=given)
    client = tiny.client(0.1, session=tiny.session(log_level=4))
    with pytest.raises(Exception, match=f"attention_0.*{words}"):
        client.run(0)


def test_an_empty_mask_is_no_mask():
    tiny = T.Tiny(plan())
    session = edit(tiny, "DiTFastAttn", lambda node: node.input.append(""))
    client = tiny.client(0.1, session=session)
    for got, expected in generation(client):
        close(got, expected)


@pytest.mark.parametrize("more,given", [
    ({"window": 1.0}, {}),
    ({}, {"text": 22}),
    ({}, {"text": 24}),
    ({"window": 1.0}, {"mask": mask([2, 1, N, N], "bool")}),
    ({"window": 1.0}, {"core": [0, 1, 2]}),
])
def test_a_window_over_everything_is_full_attention(more, given):
    whole = plan(**more)
    tiny = T.Tiny(whole, **given)
    client = tiny.client(0.1, session=tiny.session())
    got = [client.run(step) for step in range(len(ROWS))]
    s = T.stats()
    assert s["layers_window"] == 0
    assert s["layers_full"] == sum(action != "ast" for row in ROWS for action in row)
    assert s["misses"] == s["recomputes"] == s["mismatches"] == s["over_budget"] == 0

    T.reset()
    whole["steps"] = [[{"wa-rs": "full", "wa-rs+asc": "asc"}.get(action, action) for action in row] for row in ROWS]
    client = T.Tiny(whole, **given)
    client = client.client(0.1, session=client.session())
    for step, mine in enumerate(got):
        np.testing.assert_array_equal(mine, client.run(step))


def test_a_window_over_everything_keeps_no_residual():
    rows = [["full"] * 3] + [["wa-rs"] * 3] * 3
    tiny = T.Tiny({"format": "ditfastattn-plan", "version": 1, "steps": rows, "window": 1.0})
    client = tiny.client(0.1, session=tiny.session())
    for got, expected in generation(client):
        close(got, expected)
    s = T.stats()
    assert s["peak_bytes"] == s["bytes"] == s["misses"] == 0 and s["layers_full"] == 12
