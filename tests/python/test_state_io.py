"""Explicit state (`--state io`): the same numbers, bit for bit, as with the library's hidden memory."""

import json

import numpy as np
import pytest

from conftest import HOST, session


def empty(value):
    """A past that holds nothing: no rows."""
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    return np.zeros([0] + [d if isinstance(d, int) else 1 for d in value.shape[1:]], types[value.type])


def follow(model, plan, extra=()):
    """Outputs of every step, hidden and explicit, and the present of the last step."""
    hidden = session(model.rewrite(plan, *extra))
    expected = [hidden.run(None, model.feed(hidden, step))[0] for step in range(model.steps)]
    explicit = session(model.rewrite(plan, "--state", "io", *extra))
    past = {i.name: empty(i) for i in explicit.get_inputs() if i.name.startswith("past.")}
    names = [o.name for o in explicit.get_outputs()]
    actual = []
    for step in range(model.steps):
        values = explicit.run(None, model.feed(explicit, step, dfa_step=np.array(step)) | past)
        state = {n: v for n, v in zip(names, values) if n.startswith("present.")}
        past = {n.replace("present.", "past."): v for n, v in state.items()}
        actual.append(values[0])
    return expected, actual, state


@pytest.mark.parametrize(
    "name",
    ["dit__ts17", "dit__dyn18", "pixart__ts17", "fbdit__dyn18", "sd3__ts17", "flux__ts17-static-slim", "dit__ts17-fp16", "mask-bias__ts17", "latte__ts17"],
)
def test_the_numbers_are_those_of_the_hidden_state(load, name):
    if HOST < (1, 18) and name.startswith("flux"):
        pytest.skip("onnxruntime 1.17 does not infer the type of an operator without its optional mask (docs/operations.md)")
    model = load(name)
    expected, actual, state = follow(model, model.plan)
    for step, (hidden, explicit) in enumerate(zip(expected, actual)):
        assert np.array_equal(hidden, explicit), f"step {step}"
    # After the last step nothing is read any more, and nothing is handed on.
    assert all(value.shape[0] == 0 for value in state.values()), {n: v.shape for n, v in state.items()}


def test_a_lost_residual_costs_speed_only(load):
    model = load("dit__ts17")
    plan = dict(model.plan, steps=[["full", "full"]] + [["wa-rs", "full"]] * (model.steps - 1))
    _, actual, _ = follow(model, plan)
    dense = session(model.path, custom_ops=False)
    explicit = session(model.rewrite(plan, "--state", "io"))
    past = {i.name: empty(i) for i in explicit.get_inputs() if i.name.startswith("past.")}
    lost = explicit.run(None, model.feed(explicit, 1, dfa_step=np.array([1])) | past)[0]
    full = dense.run(None, model.feed(dense, 1))[0]
    assert np.abs(lost - full).max() < 1e-4 * np.abs(full).max()
    assert np.abs(actual[1] - full).max() > np.abs(lost - full).max()


def test_a_lost_output_is_an_error_that_says_so(load):
    model = load("dit__ts17")
    plan = dict(model.plan, steps=[["full", "full"]] + [["ast", "ast"]] * (model.steps - 1))
    explicit = session(model.rewrite(plan, "--state", "io"))
    past = {i.name: empty(i) for i in explicit.get_inputs() if i.name.startswith("past.")}
    with pytest.raises(Exception, match="feed the present output"):
        explicit.run(None, model.feed(explicit, 1, dfa_step=np.array(1)) | past)


def test_the_file_says_that_its_state_is_explicit(load):
    model = load("pixart__ts17")
    explicit = session(model.rewrite(None, "--state", "io"))
    metadata = explicit.get_modelmeta().custom_metadata_map
    assert metadata["ditfastattn.state"] == "io"
    assert json.loads(metadata["ditfastattn.plan"])["steps"] == model.plan["steps"]
