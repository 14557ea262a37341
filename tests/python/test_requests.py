"""Whose step is it: requests with ids never mix, anonymous ones are guarded, and doubt gives dense attention."""

import random
import threading

import numpy as np
import pytest
from conftest import distance, session, stats


class Generation:
    """One image's denoising: its own noise and labels, fed step by step."""

    def __init__(self, model, seed):
        self.model = model
        rng = np.random.default_rng(seed)
        latents = model.latents()
        x = rng.standard_normal(model.arrays[f"step0_{latents}"].shape).astype(np.float32)
        self.latents = []
        for _ in range(model.steps):
            self.latents.append(x)
            x = (0.95 * x + 0.15 * rng.standard_normal(x.shape)).astype(np.float32)
        self.outputs = []

    def run(self, planned, step, **extra):
        feed = self.model.feed(planned, step, **extra)
        feed[self.model.latents()] = self.latents[step]
        return planned.run(None, feed)[0]

    def alone(self, path):
        fresh = session(path)
        return [self.run(fresh, step) for step in range(self.model.steps)]

    def from_each_step(self, path):
        """What each step gives where the caches begin at each step: all of it from this generation's own runs."""
        answers = [[] for _ in range(self.model.steps)]
        for first in range(self.model.steps):
            fresh = session(path)
            for step in range(first, self.model.steps):
                answers[step].append(self.run(fresh, step, **request(1)))
        return answers

    def dense(self):
        original = session(self.model.path, custom_ops=False)
        return [self.run(original, step) for step in range(self.model.steps)]


def request(number, shape=(), start=False, end=False):
    return {
        "dfa_request_id": np.full(shape, number, np.int64),
        "dfa_start": np.full(shape, start),
        "dfa_end": np.full(shape, end),
    }


@pytest.fixture
def dit(load):
    return load("dit__ts17")


@pytest.mark.parametrize("seed", range(6))
def test_interleaved_requests_equal_running_alone(dit, seed):
    path = dit.rewrite()
    generations = [Generation(dit, 10 * seed + i) for i in range(3)]
    alone = [g.alone(path) for g in generations]
    planned = session(path)
    order = [i for i in range(3) for _ in range(dit.steps)]
    random.Random(seed).shuffle(order)
    step = [0, 0, 0]
    for i in order:
        out = generations[i].run(planned, step[i], **request(i + 1))
        assert np.array_equal(out, alone[i][step[i]]), f"request {i}, step {step[i]}"
        step[i] += 1


def test_concurrent_requests_equal_running_alone(dit):
    path = dit.rewrite()
    generations = [Generation(dit, 100 + i) for i in range(4)]
    alone = [g.alone(path) for g in generations]
    planned = session(path)
    failures = []

    def work(i):
        for _ in range(3):
            for step in range(dit.steps):
                out = generations[i].run(planned, step, **request(i + 1, start=step == 0))
                if not np.array_equal(out, alone[i][step]):
                    failures.append((i, step))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_request_inputs_of_any_server_shape(dit, shape):
    path = dit.rewrite()
    generation = Generation(dit, 5)
    alone = generation.alone(path)
    planned = session(path)
    for step in range(dit.steps):
        out = generation.run(planned, step, **request(7, shape, start=step == 0, end=step == dit.steps - 1))
        assert np.array_equal(out, alone[step])


@pytest.mark.parametrize("seed", range(6))
def test_anonymous_interleaving_never_uses_the_others_cache(dit, seed):
    path = dit.rewrite()
    generations = [Generation(dit, 1000 + 10 * seed + i) for i in range(2)]
    # One that clearly goes on where the other has stopped is taken up again, with caches that begin there.
    own_answers = [g.from_each_step(path) for g in generations]
    dense = [g.dense() for g in generations]
    planned = session(path)
    order = [i for i in range(2) for _ in range(dit.steps)]
    random.Random(seed).shuffle(order)
    step = [0, 0]
    for i in order:
        out = generations[i].run(planned, step[i])
        own = any(np.array_equal(out, answer) for answer in own_answers[i][step[i]])
        assert own or distance(out, dense[i][step[i]]) < 1e-5, f"generation {i}, step {step[i]}"
        step[i] += 1


def test_an_anonymous_generation_after_another_follows_the_plan(dit):
    path = dit.rewrite()
    planned = session(path)
    for seed in (1, 2):
        generation = Generation(dit, seed)
        alone = generation.alone(path)
        for step in range(dit.steps):
            assert np.array_equal(generation.run(planned, step), alone[step])


def test_other_labels_are_another_generation(dit):
    """Same noise, other conditioning, in the middle of a generation: dense, not the other image's cache."""
    path = dit.rewrite()
    generation = Generation(dit, 3)
    planned = session(path)
    original = session(dit.path, custom_ops=False)
    for step in range(4):
        generation.run(planned, step)
    other = {"class_labels": np.array([5, 10])}
    out = generation.run(planned, 4, **other)
    assert distance(out, generation.run(original, 4, **other)) < 1e-5


@pytest.mark.parametrize("identify", [{}, request(9)], ids=["anonymous", "id"])
def test_a_missing_step_is_computed_densely_and_counted(dit, identify):
    planned = session(dit.rewrite())
    generation = Generation(dit, 4)
    dense = generation.dense()
    before = stats()
    for step in (0, 1, 2):
        generation.run(planned, step, **identify)
    out = generation.run(planned, 5, **identify)
    assert distance(out, dense[5]) < 1e-5
    assert stats()["dense_steps"] > before["dense_steps"]


def test_a_request_that_lost_a_step_goes_on_under_the_plan(dit):
    planned = session(dit.rewrite())
    generation = Generation(dit, 4)
    dense = generation.dense()
    for step in (0, 1, 2, 5):
        generation.run(planned, step, **request(3))
    later = [generation.run(planned, step, **request(3)) for step in range(6, dit.steps)]
    assert any(distance(out, dense[6 + i]) > 1e-4 for i, out in enumerate(later)), "the plan never came back"


def test_an_unknown_timestep_is_computed_densely(dit):
    planned = session(dit.rewrite())
    original = session(dit.path, custom_ops=False)
    generation = Generation(dit, 6)
    generation.run(planned, 0, **request(2))
    odd = {dit.timestep(): np.array([951, 951])}
    out = generation.run(planned, 1, **odd, **request(2))
    assert distance(out, generation.run(original, 1, **odd)) < 1e-5


def test_rows_at_different_timesteps_are_computed_densely(dit):
    planned = session(dit.rewrite())
    original = session(dit.path, custom_ops=False)
    generation = Generation(dit, 6)
    generation.run(planned, 0, **request(2))
    mixed = {dit.timestep(): np.array([899, 499])}
    out = generation.run(planned, 1, **mixed, **request(2))
    assert distance(out, generation.run(original, 1, **mixed)) < 1e-5


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_another_batch_midway_is_computed_densely(dit, rows):
    planned = session(dit.rewrite())
    original = session(dit.path, custom_ops=False)
    generation = Generation(dit, 8)
    for step in range(3):
        generation.run(planned, step, **request(4))
    feed = dit.feed(planned, 3, **request(4))
    for name in (dit.latents(), dit.timestep(), "class_labels"):
        feed[name] = np.resize(feed[name], (rows, *feed[name].shape[1:]))
    out = planned.run(None, feed)[0]
    for name in request(4):
        feed.pop(name)
    assert distance(out, original.run(None, feed)[0]) < 1e-5


def test_a_single_row_has_no_halves(dit):
    """Without guidance the batch is one row: ASC computes it normally, the rest of the plan stands."""
    planned = session(dit.rewrite())
    for step in range(dit.steps):
        feed = dit.feed(planned, step, **request(11))
        feed = {n: v[:1] if v.ndim and len(v) == 2 else v for n, v in feed.items()}
        out = planned.run(None, feed)[0]
        assert out.shape[0] == 1 and np.isfinite(out).all()


def test_end_releases_everything(dit):
    planned = session(dit.rewrite())
    generation = Generation(dit, 9)
    before = stats()
    for step in range(5):
        generation.run(planned, step, **request(21, start=step == 0, end=step == 4))
    after = stats()
    assert after["live_requests"] == before["live_requests"]
    assert after["bytes"] == before["bytes"]


def test_required_request_inputs_must_be_fed(dit):
    path = dit.rewrite(None, "--request-inputs", "required")
    planned = session(path)
    generation = Generation(dit, 9)
    with pytest.raises(Exception, match="dfa_request_id|Required inputs"):
        generation.run(planned, 0)
    alone = generation.alone(dit.rewrite())
    assert np.array_equal(generation.run(planned, 0, **request(1, (1,), start=True)), alone[0])


def test_two_sessions_do_not_share_requests(dit):
    path = dit.rewrite()
    first, second = session(path), session(path)
    a, b = Generation(dit, 31), Generation(dit, 32)
    alone = a.alone(path), b.alone(path)
    for step in range(dit.steps):
        assert np.array_equal(a.run(first, step, **request(1)), alone[0][step])
        assert np.array_equal(b.run(second, step, **request(1)), alone[1][step])
