"""Thousands of requests in one process: every output is right, the counters add up, and the memory comes back.

Limits are read from the environment when the library is loaded, so each scenario runs in a process of its own and prints what
it saw.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import CORPUS, Model, distance, resident, session, stats
from test_requests import Generation, request

PLAN = {
    "format": "ditfastattn-plan",
    "version": 1,
    "window": 0.125,
    "cfg": "cond-first",
    "timesteps": [999, 899, 799],
    "steps": [["full", "full"], ["wa-rs+asc", "ast"], ["ast", "wa-rs"]],
}
STEPS, LAYERS = 3, 2
SEEDS = 8


class Place:
    """The tiny DiT under PLAN, and what each step of each seed's generation returns: under the plan alone, and densely."""

    def __init__(self, folder):
        entry = next(e for e in CORPUS if e["file"] == "dit__ts17.onnx")
        model = Model(entry, Path(folder))
        self.session = session(model.output(), threads=1)
        model.steps = STEPS
        self.generations = [Generation(model, seed) for seed in range(SEEDS)]
        solo = np.load(Path(folder) / "solo.npy")
        self.alone, self.dense = solo

    def step(self, number, step, identity=None, **flags):
        """Runs one step of the generation `number`. Returns whether it is the planned output, the dense one, and at all its own."""
        seed = number % SEEDS
        whose = request(number + 1 if identity is None else identity, **flags)
        out = self.generations[seed].run(self.session, step, **whose)
        planned = np.array_equal(out, self.alone[seed][step])
        distances = [distance(out, dense[step]) for dense in self.dense]
        return planned, distances[seed] < 1e-5, min(distances) == distances[seed]


def interleaved(place):
    """2000 requests, 50 at a time, in random order; each ends."""
    dice = random.Random(1)
    live, coming, wrong, memory, one = {}, iter(range(2000)), 0, [], 0
    while True:
        while len(live) < 50 and (number := next(coming, None)) is not None:
            live[number] = 0
            if number % 500 == 499:
                memory.append(resident())
        if not live:
            break
        number = dice.choice(list(live))
        planned, *_ = place.step(number, live[number], end=live[number] == STEPS - 1)
        wrong += not planned
        one = one or stats()["bytes"]
        live[number] += 1
        if live[number] == STEPS:
            del live[number]
    return {"wrong": wrong, "memory": [*memory, resident()], "one": one}


def abandoned(place):
    """2000 requests that stop after a step or two, without a word, under a budget that holds few of them."""
    wrong, memory, most = 0, [], 0
    for number in range(2000):
        for step in range(1 + number % 2):
            wrong += not any(place.step(number, step)[:2])
        if number % 500 == 499:
            memory.append(resident())
            most = max(most, stats()["bytes"])
    return {"wrong": wrong, "memory": memory, "most": most}


def crowded(place):
    """40 requests at a time, more than the budget holds: those that went longest without a step lose their caches."""
    dice, wrong = random.Random(2), 0
    for begin in range(0, 400, 40):
        for step in range(STEPS):
            for number in dice.sample(range(begin, begin + 40), 40):
                # One layer may find its cache and the other not, and after a loss a request goes on under the plan from what
                # it then computed densely: neither the planned output nor the dense one, but never near another image.
                wrong += not any(place.step(number, step, end=step == STEPS - 1))
    return {"wrong": wrong}


def idle(place):
    """500 requests that stop after a step; then another runs until the idle limit has taken them all."""
    for number in range(500):
        place.step(number, 0)
    held = stats()
    tries = 0
    # No clock decides: the limit has passed at some time, and until then there is another try.
    while stats()["idle_reclaims"] < 500 and tries < 5000:
        place.step(0, 0, identity=10**6, start=True, end=True)
        time.sleep(0.01)
        tries += 1
    return {"held": held["bytes"], "known": held["live_requests"] + held["idle_reclaims"]}


@pytest.fixture
def scenario(tmp_path, load):
    model = load("dit__ts17")
    path = model.rewrite(PLAN)
    model.steps = STEPS
    generations = [Generation(model, seed) for seed in range(SEEDS)]
    np.save(tmp_path / "solo.npy", [[g.alone(path) for g in generations], [g.dense() for g in generations]])

    def run(name, **environment):
        command = [sys.executable, __file__, name, str(tmp_path)]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def flat(memory, allowed=4 << 20):
    """Whether resident memory stays where it was once the process had warmed up."""
    return memory[-1] <= memory[1] + allowed


def test_thousands_of_interleaved_requests(scenario):
    seen = scenario("interleaved")
    assert seen["wrong"] == 0
    assert (seen["generations"], seen["steps"]) == (2000, 2000 * STEPS)
    assert seen["layers_full"] + seen["layers_window"] + seen["layers_reused"] == 2000 * STEPS * LAYERS
    # Per generation: two layers in full, one in windows of one half, one in windows, two reused.
    assert seen["layers_full"] == seen["layers_window"] == seen["layers_reused"] == 2000 * 2
    assert seen["misses"] == seen["recomputes"] == seen["dense_steps"] == seen["evictions"] == 0
    assert seen["bytes"] == seen["live_requests"] == seen["runs_in_flight"] == 0
    # Never more was held than fifty requests need.
    assert 0 < seen["one"] <= seen["peak_bytes"] <= 50 * 2 * seen["one"]
    assert flat(seen["memory"]), seen["memory"]


def test_abandoned_generations_stay_within_the_budget(scenario):
    budget = 64 * 1024
    seen = scenario("abandoned", DITFASTATTN_CACHE_BYTES=str(budget))
    assert seen["wrong"] == 0
    assert 0 < seen["peak_bytes"] <= budget and seen["most"] <= budget
    # What did not fit was left out, said, and computed densely where it was missed.
    assert seen["over_budget"] > 0 and seen["misses"] > 0 and seen["recomputes"] > 0
    assert flat(seen["memory"]), seen["memory"]


def test_more_requests_than_the_budget_holds(scenario):
    seen = scenario("crowded", DITFASTATTN_CACHE_BYTES=str(64 * 1024))
    assert seen["wrong"] == 0
    assert seen["evictions"] > 0 and seen["over_budget"] > 0
    assert seen["bytes"] == seen["live_requests"] == 0


def test_the_idle_limit_takes_what_was_abandoned(scenario):
    seen = scenario("idle", DITFASTATTN_IDLE_SECONDS="2")
    # A slow machine has reclaimed some before the last was begun.
    assert seen["held"] > 0 and seen["known"] == 500
    assert seen["idle_reclaims"] == 500
    assert seen["bytes"] == seen["live_requests"] == 0


if __name__ == "__main__":
    name, folder = sys.argv[1:]
    place = Place(folder)
    seen = globals()[name](place)
    print(json.dumps(stats() | seen))
