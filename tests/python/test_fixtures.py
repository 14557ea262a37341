"""Every export of every architecture, under a random plan, against PyTorch."""

import pytest
from conftest import Model, all_models, distance, inspect, session


@pytest.fixture(params=all_models(), ids=lambda p: p.stem)
def model(request, tmp_path):
    model = Model(request.param, tmp_path)
    model.needs_host()
    return model


def test_follows_the_plan_at_every_step(model):
    planned = session(model.rewrite())
    for step in range(model.steps):
        out = planned.run(None, model.feed(planned, step))[0]
        assert distance(out, model.expected(step)) < model.tolerance, f"step {step}"


def test_the_plan_matters(model):
    """The last step under the plan is not the dense one, so the test above cannot pass by computing densely."""
    difference = distance(model.expected(model.steps - 1), model.arrays["last_step_dense_out"])
    assert difference > 2 * model.tolerance


def test_all_full_equals_the_original(model):
    plan = model.plan | {"steps": [["full"] * len(row) for row in model.plan["steps"]]}
    original = session(model.path, custom_ops=False)
    planned = session(model.rewrite(plan))
    for step in range(model.steps):
        dense = original.run(None, model.feed(original, step))[0]
        out = planned.run(None, model.feed(planned, step))[0]
        assert distance(out, dense) < (1e-2 if model.half else 1e-5), f"step {step}"


def test_every_layer_gets_the_module_form(model):
    about = inspect(model.path)
    assert about["model"]["layers"] == len(model.plan["steps"][0])
    assert about["model"]["core_form"] == 0, [s.get("reason") for s in about["sites"]]
