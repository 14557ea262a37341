"""Layers left out of the plan, and text that the plan says itself."""

import json

from conftest import distance, session, tool


def test_a_layer_left_out_is_a_layer_that_stays_full(load):
    """Latte under a plan for its spatial layer only: the same as a plan that keeps the temporal one full."""
    model = load("latte__ts17")
    rows = [["full"], ["wa-rs"], ["ast"], ["asc"], ["wa-rs+asc"], ["ast"]]
    both = model.plan | {"steps": [[row[0], "full"] for row in rows]}
    skipping = session(model.rewrite(model.plan | {"steps": rows}, "--skip", "*temporal*"))
    full = session(model.rewrite(both))
    for step in range(model.steps):
        a = skipping.run(None, model.feed(skipping, step))[0]
        b = full.run(None, model.feed(full, step))[0]
        assert distance(a, b) < 1e-6, f"step {step}"


def test_the_plan_may_say_what_the_graph_shows(load):
    """The prompt's tokens in the plan or read from the graph: the same numbers; a wrong number: others."""
    model = load("sd3__ts17")
    assert "text" not in model.plan
    text = model.arrays["fixed_encoder_hidden_states"].shape[1]
    shown = session(model.rewrite())
    said = session(model.rewrite(model.plan | {"text": {"tokens": text, "side": "end"}}))
    wrong = session(model.rewrite(model.plan | {"text": {"tokens": 0, "side": "end"}}))
    apart = 0
    for step in range(model.steps):
        expected = shown.run(None, model.feed(shown, step))[0]
        assert distance(said.run(None, model.feed(said, step))[0], expected) == 0
        apart = max(apart, distance(wrong.run(None, model.feed(wrong, step))[0], expected))
    assert apart > 1e-3


def test_more_text_than_tokens_is_an_error_of_the_run(load):
    model = load("sd3__ts17")
    planned = session(model.rewrite(model.plan | {"text": {"tokens": 4096, "side": "end"}}))
    try:
        planned.run(None, model.feed(planned, 0))
    except Exception as error:
        assert "4096" in str(error)
    else:
        raise AssertionError("4096 text tokens in a sequence of 22 were accepted")


def test_inspect_reports_the_text_of_every_layer(load):
    about = json.loads(tool("inspect", load("flux__dyn18").path, "--json").stdout)
    layers = [s for s in about["sites"] if "layer" in s]
    assert {s["kind"] for s in layers} == {"joint", "self"}
    assert {(s["text"]["tokens"], s["text"]["side"]) for s in layers} == {("6", "start")}


def test_halves_are_not_taken_where_the_batch_may_not_be_outermost(load):
    """Heads folded in front of the batch: half of the rows is half of the heads, so sharing them across guidance is refused."""
    model = load("heads-outside__ts17")
    shared = model.plan | {"cfg": "cond-first", "steps": [["full", "full"], ["asc", "full"]], "timesteps": [999, 899]}
    said = model.rewrite(shared, check=False)
    assert said.returncode == 1 and "batch is outermost" in said.stderr
    assert not model.output().exists()
