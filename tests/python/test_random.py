"""Random models in random spellings under random plans: what the product computes is what the definition says, or it says no.

Two hundred by default. `DFA_RANDOM_COUNT=5000 DFA_RANDOM_SEED=1000000` runs more, from another seed; a failure prints its seed and the
simplest model that still fails, which then belongs into random_failures.json.
"""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import HOST, NEWEST, session, tool

pytest.importorskip("onnx", reason="builds its models with the onnx package")
import random_dit  # noqa: E402

COUNT = int(os.environ.get("DFA_RANDOM_COUNT", 200))
SEED = int(os.environ.get("DFA_RANDOM_SEED", 0))
KNOWN = json.loads(Path(__file__).with_name("random_failures.json").read_text())
LIMIT = {"float32": 1e-3, "float16": 3e-2}

pytestmark = pytest.mark.skipif(HOST < NEWEST, reason="its models have operators of the newest host")


class Wrong(Exception):
    """The product answered, and not what the definition says."""


def state(planned, outputs, step, steps):
    """The feeds that carry the state of a model with explicit state: empty at first, then what came out."""
    feeds = {"dfa_step": np.array(step, np.int64)}
    for value in planned.get_inputs():
        if value.name.startswith("past."):
            present = value.name.replace("past.", "present.", 1)
            if outputs is None:
                shape = [0 if i == 0 else d if isinstance(d, int) else 1 for i, d in enumerate(value.shape)]
                feeds[value.name] = np.zeros(shape, {"tensor(float16)": np.float16}.get(value.type, np.float32))
            else:
                feeds[value.name] = outputs[present]
    return feeds


def check(spec, folder):
    """None if the product computes the model as defined, its words if it refuses to. Raises Wrong."""
    model = random_dit.Model(spec)
    path, plan, out = (folder / n for n in ("model.onnx", "plan.json", "model.dfa.onnx"))
    path.write_bytes(model.graph().SerializeToString())
    plan.write_text(json.dumps(model.plan()))
    original = session(path, custom_ops=False, threads=1)
    definition, dense = model.definition(), model.definition()
    limit = LIMIT[model.spec["dtype"]]

    def far(got, expected):
        return not np.abs(got - expected).max() <= limit * max(1.0, np.abs(expected).max())

    if far(original.run(None, model.feed(0))[0], dense.run(0, model.feed(0), dense=True)):
        raise Wrong("the graph itself is not what the definition says: the generator is wrong")
    said = tool(path, "--plan", plan, "-o", out, "--force", "--quiet", "--state", model.spec["state"], check=False)
    if said.returncode == 1:
        return said.stderr.strip()
    if said.returncode != 0:
        raise Wrong(f"exit {said.returncode}: {said.stderr[-500:]}")
    planned = session(out, threads=1)
    names = [o.name for o in planned.get_outputs()]
    outputs = None
    for step in range(len(model.spec["steps"])):
        feed = model.feed(step)
        if model.spec["state"] == "io":
            more = state(planned, outputs, step, model.spec["steps"])
        else:
            more = {"dfa_request_id": np.array(7, np.int64), "dfa_start": np.array(step == 0)}
        outputs = dict(zip(names, planned.run(None, feed | more)))
        expected = definition.run(step, feed)
        if far(outputs["out"], expected):
            worst = np.abs(outputs["out"] - expected).max()
            raise Wrong(f"step {step} differs by {worst:.3g}, largest value {np.abs(expected).max():.3g}")
    return None


def fails(folder):
    def it(spec):
        try:
            check(spec, folder)
        except Wrong:
            return True
        except Exception:
            # Another problem than the one that is shrunk, such as choices that do not go together.
            return False
        return False

    return it


@pytest.fixture(scope="module")
def refusals():
    """Reasons for which models were refused, and how many of how many."""
    found = Counter()
    yield found
    print("\nrandom models:", dict(found))


def one(seed, folder):
    spec = random_dit.draw(seed)
    try:
        return check(spec, folder)
    except Wrong as wrong:
        least = random_dit.shrunk(spec, fails(folder))
        pytest.fail(f"seed {seed}: {wrong}\nthe simplest model that fails: {json.dumps(least)}")
    except Exception as error:
        pytest.fail(f"seed {seed}: {type(error).__name__}: {str(error)[:500]}\n{json.dumps(spec)}")


@pytest.mark.parametrize("seed", range(SEED, SEED + COUNT))
def test_random_models_compute_what_the_definition_says(seed, tmp_path, refusals):
    refused = one(seed, tmp_path)
    refusals["computed" if refused is None else refused[:160]] += 1


def test_most_random_models_are_rewritten(refusals):
    """A generator that the product refuses tests nothing."""
    total = sum(refusals.values())
    if total < 20:
        pytest.skip("too few models to say")
    assert refusals["computed"] >= 0.7 * total, refusals


@pytest.mark.parametrize("spec", KNOWN, ids=[spec["why"] for spec in KNOWN])
def test_models_that_once_failed(spec, tmp_path):
    check({k: v for k, v in spec.items() if k != "why"}, tmp_path)
