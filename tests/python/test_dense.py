"""Dense steps by ONNX Runtime's own attention (`--dense`): the same numbers, by the exporter's nodes, only where nothing is to be left."""

import json

import numpy as np
import onnxruntime as ort
import pytest

from conftest import CORPUS, HOST, Model, NEWEST, TARGET, distance, session, tool

HOST_FLAGS = ["--dense", "host"]


def one_of_each():
    """The first model of each architecture, and all that are quantised or fused."""
    seen, chosen = set(), []
    for entry in CORPUS:
        if entry["expect"] != "rewritten":
            continue
        special = any(word in entry["dialect"] for word in ("int8", "qdq", "ort", "fp16"))
        if special or entry["architecture"] not in seen:
            chosen.append(pytest.param(entry, id=f"{entry['architecture']}:{entry['dialect']}"))
        seen.add(entry["architecture"])
    return chosen


@pytest.fixture(params=one_of_each())
def any_model(request, tmp_path):
    model = Model(request.param, tmp_path)
    model.needs_kernels()
    if HOST < NEWEST:
        # The exporter's attention is this host's business here.
        original, first = session(model.path, custom_ops=False), model.runs()[0]
        own = distance(original.run(None, model.feed(original, *first))[0], model.expected(*first))
        if own > model.tolerance:
            pytest.skip(f"onnxruntime {HOST} computes the export itself otherwise than PyTorch: {own}")
    return model


def test_a_generation_is_what_the_plan_says(any_model):
    planned = session(any_model.rewrite(None, *HOST_FLAGS))
    for step, branch in any_model.runs():
        out = planned.run(None, any_model.feed(planned, step, branch))[0]
        assert distance(out, any_model.expected(step, branch)) < any_model.tolerance, f"step {step} {branch}"


def test_all_full_equals_the_original(any_model):
    plan = any_model.plan | {"steps": [["full"] * len(row) for row in any_model.plan["steps"]]}
    original, planned = session(any_model.path, custom_ops=False), session(any_model.rewrite(plan, *HOST_FLAGS))
    limit = 1e-5 if any_model.tolerance < 1e-2 else any_model.tolerance
    for step, branch in any_model.runs()[:2]:
        dense = original.run(None, any_model.feed(original, step, branch))[0]
        assert distance(planned.run(None, any_model.feed(planned, step, branch))[0], dense) < limit


def executed(model_path, model, steps, folder):
    """Per run how many nodes of each operator it executed."""
    counts = []
    for last in range(1, steps + 1):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / f"profile{last}")
        options.register_custom_ops_library(str(TARGET / "libditfastattn.so"))
        profiled = ort.InferenceSession(str(model_path), options, providers=["CPUExecutionProvider"])
        for step in range(last):
            profiled.run(None, model.feed(profiled, step, dfa_request_id=np.array(5)))
        events = json.loads(open(profiled.end_profiling()).read())
        ops = [e["args"]["op_name"] for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
        counts.append({op: ops.count(op) for op in set(ops)})
    # What the last run added to the ones before.
    before = [{}, *counts]
    return [{op: n - b.get(op, 0) for op, n in c.items()} for b, c in zip(before, counts)]


@pytest.mark.skipif(HOST < NEWEST, reason="the names of events are this host's")
def test_the_host_computes_just_the_dense_steps(load, tmp_path):
    model = load("dit__dyn18")
    layers = len(model.plan["steps"][0])
    rows = [["full"] * layers, ["wa-rs"] + ["full"] * (layers - 1), ["full"] * layers]
    if model.plan.get("cfg", "none") != "none":
        rows.append(["asc"] * layers)
    plan = {k: v for k, v in model.plan.items() if k != "timesteps"} | {"steps": rows}
    ran = executed(model.rewrite(plan, *HOST_FLAGS), model, len(rows), tmp_path)
    ours = [counts.get("DiTFastAttn", 0) for counts in ran]
    # Step 0 leaves R for layer 0's window. Half of the batch is ours, too.
    assert ours == [1, 1, 0, layers][: len(rows)]
    theirs = [counts.get("Softmax", 0) for counts in ran]
    assert [o + t for o, t in zip(ours, theirs)] == [layers + ran[0].get("Softmax", 0) - (layers - 1)] * len(rows)


def test_what_only_the_choice_needs_is_in_the_graph_only_then(load):
    onnx = pytest.importorskip("onnx")
    model = load("dit__dyn18")

    def contract(*flags):
        nodes = onnx.load(model.rewrite(None, *flags)).graph.node
        step = next(n for n in nodes if n.op_type == "DiTFastAttnStep")
        return {a.name: a.i for a in step.attribute}["contract"], len(step.output)

    layers = len(model.plan["steps"][0])
    assert contract() == (1, 1 + layers)
    assert contract(*HOST_FLAGS) == (2, 1 + 2 * layers)


def test_models_with_dequantised_numbers_stay_ours(load):
    """ONNX Runtime ends the process when it optimises such a graph with an inner If."""
    model = load("loud__dyn18-qdqprojections")
    report = json.loads(tool(model.place(), "--plan", model.plan_path, "-o", model.output(), "--json", *HOST_FLAGS).stdout)
    assert report["dense"] == {"by": "library", "layers": []}
    session(model.output())


def test_a_measurement_decides_and_is_reported(load):
    model = load("dit__dyn18-static")
    said = tool(model.place(), "--plan", model.plan_path, "-o", model.output(), "--json", "--dense", "measure", "--threads", "1", "--onnxruntime", ort.__path__[0])
    dense = json.loads(said.stdout)["dense"]
    measured = dense["measured"]
    assert measured["library_ms"] > 0 and measured["host_ms"] > 0 and measured["rounds"] >= 1 and measured["provider"] == "CPU"
    assert dense["by"] == ("host" if measured["ratio"] < 0.98 else "library")
    assert bool(dense["layers"]) == (dense["by"] == "host")
    table = tool(model.place(), "--plan", model.plan_path, "-o", model.output(), "--force", *HOST_FLAGS).stdout
    assert "dense steps: by ONNX Runtime, with the model's own attention, in" in table


@pytest.mark.parametrize(
    "name, flags, code, words",
    [
        ("dit__dyn18", ["--dense", "host", "--state", "io"], 2, ["--dense host needs --state hidden"]),
        ("dit__dyn18-static", ["--dense", "measure", "--onnxruntime", "/nowhere"], 2, ["no ONNX Runtime in /nowhere"]),
        ("dit__dyn18-static", ["--dense", "measure", "--provider", "cuda"], 2, ["CUDA"]),
    ],
)
def test_refusals_leave_nothing(load, name, flags, code, words):
    model = load(name)
    where = ["--onnxruntime", ort.__path__[0]] if "measure" in flags and "--onnxruntime" not in flags else []
    said = tool(model.place(), "--plan", model.plan_path, "-o", model.output(), *flags, *where, check=False)
    assert said.returncode == code, said.stderr
    for word in words:
        assert word in said.stderr
    assert not model.output().exists()
