"""Every file of the corpus: what must be found in it, and under a random plan what PyTorch says it computes."""

from collections import Counter

import numpy as np
import pytest
from conftest import CORPUS, FIXTURES, HOST, NEWEST, Model, corpus, distance, inspect, session


@pytest.fixture(params=corpus("rewritten"))
def found(request, tmp_path):
    """A file that can be read; whether anything can run it does not matter."""
    return Model(request.param, tmp_path)


@pytest.fixture(params=corpus("rewritten"))
def model(request, tmp_path):
    model = Model(request.param, tmp_path)
    model.needs_kernels()
    return model


@pytest.fixture(params=corpus("refused"))
def refused(request, tmp_path):
    return Model(request.param, tmp_path)


def test_every_attention_is_found(found):
    """As many as the architecture's configuration says."""
    about = inspect(found.path, *found.flags)
    kinds = Counter(site["kind"] for site in about["sites"])
    reasons = [(site["node"], site["kind"], site.get("reason")) for site in about["sites"]]
    assert about["model"]["layers"] == found.entry["layers"], reasons
    assert kinds["cross"] == found.entry["cross"], reasons


def test_every_module_is_isolated(found):
    """So that AST saves the projections too; where only cores can be replaced, each says why."""
    about = inspect(found.path, *found.flags)
    core = [site for site in about["sites"] if site.get("form") == "core"]
    if found.entry.get("core_form"):
        assert core and all(site["reason"] for site in core)
    else:
        assert not core, [site["reason"] for site in core]


def test_it_can_be_rewritten(found):
    """Also what this host cannot run."""
    assert found.rewrite().stat().st_size > 0


def test_follows_the_plan_at_every_step(model):
    planned = session(model.rewrite())
    for step, branch in model.runs():
        out = planned.run(None, model.feed(planned, step, branch))[0]
        assert distance(out, model.expected(step, branch)) < model.tolerance, f"step {step} {branch}"


def test_all_full_equals_the_original(model):
    plan = model.plan | {"steps": [["full"] * len(row) for row in model.plan["steps"]]}
    original = session(model.path, custom_ops=False)
    planned = session(model.rewrite(plan))
    # Quantised activations may fall on the other side of a step.
    limit = 1e-5 if model.tolerance < 1e-2 else model.tolerance
    first = model.runs()[0]
    own = distance(original.run(None, model.feed(original, *first))[0], model.expected(*first))
    if HOST < NEWEST and own > model.tolerance:
        pytest.skip(f"onnxruntime {HOST} computes the export itself otherwise than PyTorch: {own}")
    for step, branch in model.runs():
        dense = original.run(None, model.feed(original, step, branch))[0]
        out = planned.run(None, model.feed(planned, step, branch))[0]
        assert distance(out, dense) < limit, f"step {step} {branch}"


def test_what_cannot_be_rewritten_is_refused_with_a_reason(refused):
    said = refused.rewrite(check=False)
    assert said.returncode == 1, said.stderr
    assert said.stderr.strip()
    assert not refused.output().exists()


@pytest.mark.parametrize("architecture", sorted({e["architecture"] for e in CORPUS if e["expect"] == "rewritten"}))
def test_the_plan_matters(architecture):
    """The last step under the plan is not the dense one, so following the plan cannot be passed by computing densely."""
    entries = [e for e in CORPUS if e["architecture"] == architecture]
    arrays = np.load(FIXTURES / f"{architecture}.npz")
    last = max((k for k in arrays.files if k.endswith("_out") and k.startswith("step")), key=run_number)
    difference = distance(arrays[last], arrays["last_step_dense_out"])
    assert difference > 2 * max(e["tolerance"] for e in entries)


def run_number(key):
    """Of `stepT_out`, `stepT_cond_out` or `stepT_uncond_out`: the unconditional run is the later one."""
    return int(key.removeprefix("step").split("_")[0]), "uncond" in key


def test_every_file_is_listed_and_every_listed_file_is_there():
    listed = {e["file"] for e in CORPUS}
    assert listed == {p.name for p in FIXTURES.glob("*__*.onnx")}
