"""The operators inside ONNX Runtime, against the definition in numpy (tiny.py).

Needs DITFASTATTN_LIB, the path of libditfastattn.so, and the Python packages onnxruntime (1.17 or newer), onnx, numpy.
"""

import concurrent.futures
import gc
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

import tiny as T

CLOSE = {"float32": 2e-4, "float16": 3e-2}


def close(got, expected, dtype="float32"):
    np.testing.assert_allclose(got.astype(np.float64), expected, atol=CLOSE[dtype], rtol=0)


@pytest.fixture(autouse=True)
def clean():
    T.reset()
    yield
    s = T.stats()
    assert s["runs_in_flight"] == 0


def generation(client, **feeds):
    steps = len(client.tiny.plan["steps"])
    return [(client.run(s, **feeds), client.planned(s)) for s in range(steps)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("cfg", ["cond-first", "uncond-first", "none"])
@pytest.mark.parametrize("seed", range(4))
def test_a_generation_is_what_the_plan_says(dtype, cfg, seed):
    tiny = T.Tiny(T.random_plan(seed, cfg=cfg), dtype=dtype)
    client = tiny.client(0.1, seed, session=tiny.session())
    for repeat in range(2):
        client.reference = T.Reference(tiny)
        for got, expected in generation(client):
            close(got, expected, dtype)
    s = T.stats()
    assert s["contested"] == s["misses"] == s["recomputes"] == 0
    assert s["steps"] == 16 and s["generations"] == 2


@pytest.mark.parametrize("seed", range(4))
def test_the_core_form_gives_the_same_numbers(seed):
    plan = T.random_plan(seed + 10)
    tiny = T.Tiny(plan, core=[0, 2])
    client = tiny.client(0.1, seed, batch=4, session=tiny.session(threads=2))
    for got, expected in generation(client):
        close(got, expected)


@pytest.mark.parametrize("side", ["start", "end"])
def test_text_tokens_see_all_and_are_seen_by_all(side):
    plan = T.random_plan(3)
    plan["text"] = {"tokens": 5, "side": side}
    tiny = T.Tiny(plan)
    client = tiny.client(0.1, session=tiny.session())
    for got, expected in generation(client):
        close(got, expected)


def test_without_a_list_of_timesteps_steps_are_counted():
    tiny = T.Tiny(T.random_plan(5, timesteps=False))
    client = tiny.client(0.1, session=tiny.session())
    for _ in range(2):
        client.reference = T.Reference(tiny)
        for got, expected in generation(client):
            close(got, expected)
    assert T.stats()["generations"] == 2


@pytest.mark.parametrize("shape", [[], [1], [1, 1]])
def test_requests_interleave(shape):
    tiny = T.Tiny(T.random_plan(1))
    session = tiny.session()
    clients = [
        tiny.client(0.1, 1, session=session, dfa_request_id=np.full(shape, 7, np.int64)),
        tiny.client(0.2, 2, session=session, dfa_request_id=np.full(shape, -8, np.int64)),
    ]
    for step in range(8):
        for client in clients:
            close(client.run(step), client.planned(step))
    s = T.stats()
    assert s["misses"] == s["contested"] == s["collisions"] == 0
    assert s["live_requests"] == 2
    assert s["bytes"] == 0, "nothing is live after the last step"


def test_start_and_end_flags():
    tiny = T.Tiny(T.random_plan(1))
    client = tiny.client(0.1, session=tiny.session(), dfa_request_id=np.array([5], np.int64))
    yes = np.array([True])
    for step in range(4):
        client.run(step)
    client.reference = T.Reference(tiny)
    for step in range(8):
        got = client.run(step, dfa_start=yes if step == 0 else ~yes, dfa_end=yes if step == 7 else ~yes)
        close(got, client.planned(step))
    assert T.stats()["live_requests"] == 0


def test_concurrent_requests_equal_serial_ones():
    tiny = T.Tiny(T.random_plan(2), tokens=64)
    session = tiny.session(threads=2)

    def generate(i):
        client = tiny.client(0.1 * i, i, session=session, dfa_request_id=np.array([i], np.int64))
        return max(np.abs(got - expected).max() for got, expected in generation(client))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        errors = list(pool.map(generate, range(1, 25)))
    assert max(errors) < CLOSE["float32"]
    s = T.stats()
    assert s["collisions"] == s["misses"] == s["recomputes"] == 0


@pytest.mark.parametrize("same_prompt", [False, True])
def test_interleaved_anonymous_generations_never_mix(same_prompt):
    plan = T.random_plan(1)
    plan["steps"][1:] = [["ast"] * 3, ["wa-rs"] * 3, ["asc"] * 3, ["ast"] * 3, ["wa-rs+asc"] * 3, ["ast"] * 3, ["wa-rs"] * 3]
    tiny = T.Tiny(plan)
    session = tiny.session()
    a = tiny.client(0.1, 1, session=session)
    b = tiny.client(0.1 if same_prompt else 0.2, 2, session=session)
    # The one that began last has the caches, the other is dense. Of one prompt their images come near each other in the end.
    last = 6 if same_prompt else 8
    for step in range(8):
        close(a.run(step), a.dense(step))
        got, expected = b.run(step), b.planned(step)
        close(got, expected if step < last else b.dense(step))
    assert T.stats()["contested"] == 7
    # Alone again: served again, but for a step that another one of this seed was at.
    for step, (got, expected) in enumerate(generation(a)):
        close(got, a.dense(step) if same_prompt and step == 7 else expected)


def test_a_lost_step_is_recomputed_and_the_rest_goes_on():
    plan = T.random_plan(1)
    plan["steps"][1:] = [["ast"] * 3, ["wa-rs"] * 3, ["ast"] * 3, ["wa-rs"] * 3, ["wa-rs+asc"] * 3, ["ast"] * 3, ["wa-rs"] * 3]
    tiny = T.Tiny(plan)
    client = tiny.client(0.1, session=tiny.session(), dfa_request_id=np.array(3, np.int64))
    for step in (0, 1, 2):
        close(client.run(step), client.planned(step))
    close(client.run(4), client.dense(4))
    client.reference = T.Reference(tiny)
    plan["steps"][4] = ["full"] * 3
    client.planned(4)
    for step in (5, 6, 7):
        close(client.run(step), client.planned(step))
    assert T.stats()["discontinuities"] == 1


@pytest.mark.parametrize("timestep", [[123.0, 123.0], [899.0, 799.0], [np.nan, np.nan], [np.inf, np.inf]])
def test_unplanned_timesteps_are_computed_densely(timestep):
    tiny = T.Tiny(T.random_plan(1))
    client = tiny.client(0.1, session=tiny.session(), dfa_request_id=np.array(3, np.int64))
    close(client.run(0), client.planned(0))
    t = np.array(timestep, np.float32)
    got = client.run(1, timestep=t)
    expected = T.Reference(tiny).run(1, client.latents(1), float(np.mean(timestep)), client.prompt, dense=True)
    if np.isfinite(timestep).all():
        close(got, expected)
    assert T.stats()["unplanned"] == 1
    # The generation goes on as if nothing had happened.
    close(client.run(1), client.planned(1))


def test_timestep_types_and_rounding():
    tiny = T.Tiny(T.random_plan(1))
    model = tiny.model()
    for name, dtype in [("float16", np.float16), ("double", np.float64), ("int64", np.int64), ("int32", np.int32)]:
        model = tiny.model()
        for i in model.graph.input:
            if i.name == "timestep":
                i.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        cast = helper.make_node("Cast", ["timestep"], ["timestep32"], to=1)
        for node in model.graph.node:
            if node.op_type == "ReduceMean" and node.input[0] == "timestep":
                node.input[0] = "timestep32"
        model.graph.node.insert(0, cast)
        options = ort.SessionOptions()
        options.register_custom_ops_library(T.LIB)
        session = ort.InferenceSession(model.SerializeToString(), options, providers=T.PROVIDERS)
        client = tiny.client(0.1, session=session)
        for step in range(8):
            t = np.full([2], client.timestep(step), dtype)
            close(client.run(step, timestep=t), client.planned(step))
    assert T.stats()["unplanned"] == 0


def test_a_change_of_shape_is_never_served():
    plan = T.random_plan(1)
    plan["steps"][1:] = [["ast"] * 3] * 3 + [["wa-rs"] * 3] * 4
    tiny = T.Tiny(plan)
    session = tiny.session()
    rid = np.array(3, np.int64)
    two, four = (tiny.client(0.1, batch=b, session=session, dfa_request_id=rid) for b in (2, 4))
    close(two.run(0), two.planned(0))
    close(four.run(1), four.dense(1))
    assert T.stats()["shape_changes"] == 1
    close(two.run(4), two.dense(4))


def test_odd_batches_have_no_halves():
    plan = T.random_plan(1)
    plan["steps"][1:] = [["asc"] * 3, ["wa-rs+asc"] * 3, ["ast"] * 3, ["asc"] * 3] + [["wa-rs+asc"] * 3] * 3
    tiny = T.Tiny(plan)
    for batch in (1, 3):
        client = tiny.client(0.1, batch=batch, session=tiny.session())
        for got, expected in generation(client):
            close(got, expected)


def test_separate_guidance_keeps_two_branches():
    rows = [["full"] * 3, ["asc", "wa-rs", "ast"], ["wa-rs", "wa-rs+asc", "full"], ["ast", "ast", "wa-rs+asc"],
            ["wa-rs+asc", "asc", "ast"], ["ast", "wa-rs", "asc"], ["full", "ast", "wa-rs"], ["wa-rs+asc", "wa-rs", "ast"]]
    plan = {"format": "ditfastattn-plan", "version": 1, "cfg": "separate", "steps": rows,
            "timesteps": [float(999 - 100 * s) for s in range(8)]}
    tiny = T.Tiny(plan)
    session = tiny.session()
    for rid in (0, 4):
        feeds = {"dfa_request_id": np.array(rid, np.int64)}
        cond = tiny.client(0.1, 1, batch=1, session=session, **feeds)
        uncond = tiny.client(0.9, 1, batch=1, session=session, **feeds)
        for step in range(8):
            expected_cond = cond.planned(step)
            # What the second run does, in terms of one that owns its residuals and outputs.
            ref, first = uncond.reference, cond.reference
            x = uncond.latents(step).astype(np.float64) + uncond.timestep(step) * 0.001 + uncond.prompt.mean(1)[:, None, None]
            for layer, action in enumerate(rows[step]):
                if action in ("asc", "wa-rs+asc"):
                    y = ref.output[layer] = first.output[layer]
                    if action == "asc":
                        ref.residual[layer] = first.residual[layer]
                else:
                    y = ref.layer(layer, action, x)
                x = x + y
            close(cond.run(step), expected_cond)
            close(uncond.run(step), x)
    s = T.stats()
    assert s["contested"] == s["misses"] == s["discontinuities"] == 0 and s["steps"] == 32


def test_nan_is_never_cached():
    plan = T.random_plan(1)
    plan["steps"][1:] = [["ast"] * 3, ["wa-rs"] * 3] + [["full"] * 3] + [["wa-rs"] * 3] * 4
    tiny = T.Tiny(plan)
    client = tiny.client(0.1, session=tiny.session(), dfa_request_id=np.array(3, np.int64))
    bad = client.latents(0)
    bad[0, 0, 0] = np.nan
    assert np.isnan(client.run(0, latents=bad)).any()
    close(client.run(1), client.dense(1))
    s = T.stats()
    assert s["non_finite"] > 0 and s["misses"] == 3
    plan["steps"][1] = ["full"] * 3
    client.planned(1)
    close(client.run(2), client.planned(2))


def test_a_second_sigma_is_learnt():
    tiny = T.Tiny(T.random_plan(1), second_sigma=True)
    client = tiny.client(0.1, session=tiny.session())
    for step in range(8):
        got = client.run(step)
        if step == 0:
            close(got, client.planned(0))
        else:
            close(got, client.dense(step))
    assert T.stats()["contested"] == 7
    client.reference = T.Reference(tiny)
    for got, expected in generation(client):
        close(got, expected)
    assert T.stats()["contested"] == 7


def test_caches_are_bounded_by_the_budget_and_empty_after_the_last_step():
    tiny = T.Tiny(T.random_plan(1))
    client = tiny.client(0.1, session=tiny.session())
    peaks = [T.stats()["bytes"] for step in range(8) if client.run(step) is not None]
    assert max(peaks) > 0 and peaks[-1] == 0
    s = T.stats()
    assert s["peak_bytes"] >= max(peaks)


@pytest.mark.parametrize("registrations", [1, 2, 3])
def test_registering_the_library_again_is_harmless(registrations):
    tiny = T.Tiny(T.random_plan(1))
    options = ort.SessionOptions()
    for _ in range(registrations):
        options.register_custom_ops_library(T.LIB)
    for _ in range(2):
        session = ort.InferenceSession(tiny.model().SerializeToString(), options, providers=T.PROVIDERS)
        client = tiny.client(0.1, session=session)
        close(client.run(0), client.planned(0))


def test_sessions_do_not_share_state():
    tiny = T.Tiny(T.random_plan(1))
    rid = np.array(3, np.int64)
    clients = [tiny.client(0.1 * i, i, session=tiny.session(), dfa_request_id=rid) for i in range(1, 3)]
    for step in range(8):
        for client in clients:
            close(client.run(step), client.planned(step))
    assert T.stats()["misses"] == 0


@pytest.mark.parametrize(
    "change,words",
    [
        ({"plan": "{"}, ["step", "plan", "line 1"]),
        ({"layers": 4}, ["`layers` is 4"]),
        ({"contract": 4}, ["version 4"]),
        ({"schedule": "some"}, ["`schedule` is some, expected planned or any"]),
        ({"core_layers": [7]}, ["layer 7 of 3"]),
    ],
)
def test_bad_attributes_are_refused_when_the_session_is_made(change, words):
    tiny = T.Tiny(T.random_plan(1))
    with pytest.raises(Exception) as error:
        tiny.session(steps_attributes=change)
    for word in words:
        assert word in str(error.value)


def edit(tiny, op_type, change):
    model = tiny.model()
    graphs = [model.graph] + [a.g for n in model.graph.node for a in n.attribute if a.HasField("g")]
    for graph in graphs:
        for node in graph.node:
            if node.op_type == op_type:
                change(node)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(T.LIB)
    return ort.InferenceSession(model.SerializeToString(), options, providers=T.PROVIDERS)


def set_attribute(name, value):
    def change(node):
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend(kept + ([helper.make_attribute(name, value)] if value is not None else []))

    return change


@pytest.mark.parametrize(
    "op,name,value,words",
    [
        ("DiTFastAttn", "q_layout", "BXSD", ["q_layout", "BXSD"]),
        ("DiTFastAttn", "form", "other", ["form", "other"]),
        ("DiTFastAttn", "layer", None, ["layer"]),
        ("DiTFastAttnSelect", "layer", -1, ["layer", "-1"]),
        ("DiTFastAttnShare", "sink", 3, ["sink"]),
    ],
)
def test_bad_nodes_are_refused_when_the_session_is_made(op, name, value, words):
    with pytest.raises(Exception) as error:
        edit(T.Tiny(T.random_plan(1)), op, set_attribute(name, value))
    for word in words:
        assert word in str(error.value)


def test_a_layer_that_the_plan_does_not_have_is_an_error_and_the_session_survives():
    tiny = T.Tiny(T.random_plan(1))
    session = edit(tiny, "DiTFastAttn", lambda node: node.name == "attention_2" and set_attribute("layer", 9)(node))
    client = tiny.client(0.1, session=session)
    for _ in range(3):
        with pytest.raises(Exception, match="attention_2.*layer 9"):
            client.run(0)
    s = T.stats()
    assert s["aborted"] == 3 and s["runs_in_flight"] == 0 and s["bytes"] == 0


def test_a_failed_run_loses_its_caches_and_nothing_else():
    plan = T.random_plan(1)
    plan["steps"][1:] = [["ast"] * 3, ["wa-rs"] * 3] + [["wa-rs"] * 3] * 5
    tiny = T.Tiny(plan)
    client = tiny.client(0.1, session=tiny.session(), dfa_request_id=np.array(3, np.int64))
    close(client.run(0), client.planned(0))
    with pytest.raises(Exception, match="(?i)gather|indices"):
        client.run(1, trip=np.array(99, np.int64))
    # The run never finished. The next one meets it in flight, sees that it is dead, and takes its place.
    close(client.run(1), client.dense(1))
    client.reference = T.Reference(tiny)
    plan["steps"][1] = ["full"] * 3
    client.planned(1)
    for step in range(2, 8):
        close(client.run(step), client.planned(step))
    s = T.stats()
    assert s["aborted"] == s["collisions"] == 1
    assert s["runs_in_flight"] == 1
    # What the dead run still holds goes with the session, or after a minute.
    del client
    gc.collect()
    s = T.stats()
    assert s["runs_in_flight"] == s["bytes"] == 0


@pytest.mark.parametrize("feed", [np.array([1, 2], np.int64), np.zeros([0], np.int64)])
def test_a_request_id_is_one_number(feed):
    tiny = T.Tiny(T.random_plan(1))
    client = tiny.client(0.1, session=tiny.session())
    with pytest.raises(Exception, match="dfa_request_id"):
        client.run(0, dfa_request_id=feed)


def child(code, **env):
    """Runs code in a process of its own, where environment variables and exits count."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=os.path.dirname(__file__),
        env={**os.environ, **env}, capture_output=True, text=True, timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result


GENERATE = """
    import numpy as np, tiny as T, json, gc
    t = T.Tiny(T.random_plan(1)); session = t.session(log_level={level})
    client = t.client(0.1, session=session)
    for step in range(8):
        got, want = client.run(step), client.{what}(step)
        assert np.abs(got - want).max() < 2e-4, step
    print(json.dumps(T.stats()))
    del session, client; gc.collect()
"""


def test_without_memory_everything_is_dense():
    plan = T.random_plan(1)
    dense = all(a != "asc" for row in plan["steps"] for a in row)
    code = GENERATE.format(level=3, what="dense") if dense else GENERATE.format(level=3, what="planned").replace("2e-4", "1e9")
    s = json.loads(child(code, DITFASTATTN_CACHE_BYTES="0").stdout)
    assert s["over_budget"] > 0 and s["peak_bytes"] == 0 and s["layers_window"] == s["layers_reused"] == 0


def test_statistics_are_written_and_logged_when_a_session_ends(tmp_path):
    path = tmp_path / "stats.json"
    result = child(GENERATE.format(level=1, what="planned"), DITFASTATTN_STATS=str(path))
    s = json.loads(path.read_text())
    assert s["steps"] == 8 and s["layers_reused"] > 0
    assert "ditfastattn: session ends: steps=8" in result.stderr


def test_sessions_come_and_go_and_the_library_stays():
    child("""
        import gc, threading, tiny as T
        t = T.Tiny(T.random_plan(1))
        loaded = lambda: sum("libditfastattn" in line for line in open("/proc/self/maps"))
        for i in range(50):
            session = t.session()
            client = t.client(0.1, i, session=session)
            threads = [threading.Thread(target=client.run, args=(0,)) for _ in range(3)]
            [x.start() for x in threads]; [x.join() for x in threads]
            del session, client, threads; gc.collect()
            assert loaded() > 0
        assert T.stats()["sessions"] == 0
    """)


@pytest.mark.skipif(sys.platform != "linux", reason="needs nm")
def test_three_symbols_are_exported():
    out = subprocess.run(["nm", "-D", "--defined-only", T.LIB], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].split("@")[0] for line in out.splitlines()}
    assert names == {"RegisterCustomOps", "ditfastattn_stats", "ditfastattn_reset"}


@pytest.mark.parametrize("kind,tolerance", [("FLOAT", 1e-5), ("FLOAT16", 4e-3), ("BFLOAT16", 3e-2)])
@pytest.mark.parametrize("layout", ["BHSD", "BSHD", "BSD"])
def test_every_element_type_and_folded_heads(kind, tolerance, layout):
    """One core-form layer whose q, k, v are the latents: full with capture, window with residual, reuse."""
    el = getattr(TensorProto, kind)
    plan = {"format": "ditfastattn-plan", "version": 1, "steps": [["full"], ["wa-rs"], ["ast"]], "timesteps": [9, 5, 1]}
    info = helper.make_tensor_value_info
    dims = ["b", "h", "s", "d"][: len(layout)]
    zero = {"id": np.zeros([1], np.int64), "start": np.zeros([1], bool), "end": np.zeros([1], bool)}
    graph = helper.make_graph(
        [
            helper.make_node("DiTFastAttnStep", ["t", "id", "start", "end", "x"], ["ticket", "skip"], domain=T.DOMAIN,
                             plan=json.dumps(plan), layers=1, core_layers=[0]),
            helper.make_node("Cast", ["x"], ["q"], to=el),
            helper.make_node("DiTFastAttn", ["q", "q", "q", "ticket"], ["o"], domain=T.DOMAIN, layer=0, form="core",
                             scale=0.5, **{f"{n}_layout": layout for n in "qkvo"}),
            helper.make_node("Cast", ["o"], ["y"], to=TensorProto.FLOAT),
        ],
        "g", [info("t", TensorProto.FLOAT, [1]), info("x", TensorProto.FLOAT, dims)], [info("y", TensorProto.FLOAT, dims)],
        [numpy_helper.from_array(v, n) for n, v in zero.items()], value_info=[info("o", el, dims)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(T.DOMAIN, 1)], ir_version=8)
    options = ort.SessionOptions()
    options.register_custom_ops_library(T.LIB)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=T.PROVIDERS)
    shape = {"BHSD": (2, 3, 16, 8), "BSHD": (2, 16, 3, 8), "BSD": (6, 16, 8)}[layout]
    base = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    residual = None
    for step, t in enumerate([9, 5, 1]):
        x = (base * (1 - 0.05 * step)).astype(np.float32)
        got = session.run(None, {"t": np.array([t], np.float32), "x": x})[0]
        q = (x.transpose(0, 2, 1, 3) if layout == "BSHD" else x).astype(np.float64)
        scores = 0.5 * q @ q.swapaxes(-1, -2)
        i = np.arange(16)
        soft = lambda s: np.exp(s - s.max(-1, keepdims=True)) / np.exp(s - s.max(-1, keepdims=True)).sum(-1, keepdims=True)
        full = soft(scores) @ q
        window = soft(np.where(np.abs(i[:, None] - i) <= 2, scores, -np.inf)) @ q
        if step == 0:
            expected, residual = full, full - window
        elif step == 1:
            expected = window + residual
        if layout == "BSHD" and step < 2:
            expected = expected.transpose(0, 2, 1, 3)
        np.testing.assert_allclose(got, expected, atol=tolerance, rtol=0)
    s = T.stats()
    assert (s["layers_full"], s["layers_window"], s["layers_reused"]) == (1, 1, 1)


OUTPUTS = """
    import tiny as T
    for dtype in ["float32", "float16"]:
        t = T.Tiny(T.random_plan(1), dtype=dtype, tokens=200, head_dim=24)
        client = t.client(0.1, session=t.session())
        for step in range(8):
            got, want = client.run(step), client.planned(step)
            assert abs(got - want).max() < {"float32": 2e-4, "float16": 3e-2}[dtype], step
            print(dtype, got.tobytes().hex())
"""


@pytest.mark.skipif(not T.ON_CPU, reason="the choice is for the CPU")
def test_products_in_bfloat16_are_chosen_by_the_environment():
    def outputs(**env):
        lines = child(OUTPUTS, **env).stdout.splitlines()
        return [line for line in lines if line.startswith("float32")], [line for line in lines if line.startswith("float16")]

    plain = outputs(DITFASTATTN_BF16_DOT="")
    assert outputs(DITFASTATTN_BF16_DOT="0") == plain
    singles, halves = outputs(DITFASTATTN_BF16_DOT="1")
    assert singles == plain[0]
    flags = open("/proc/cpuinfo").read() if sys.platform == "linux" else ""
    there = "avx512_bf16" in flags
    if not there:
        print("skipped: products in bfloat16, which need AVX-512 BF16")
    assert (halves != plain[1]) == there
    # bfloat16 tensors, in every layout.
    child("""
        import test_ops
        for layout in ["BHSD", "BSHD", "BSD"]:
            test_ops.T.reset()
            test_ops.test_every_element_type_and_folded_heads("BFLOAT16", 3e-2, layout)
    """, DITFASTATTN_BF16_DOT="1")
