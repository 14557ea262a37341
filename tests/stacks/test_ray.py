"""Ray Serve with session affinity, and a replica that dies in the middle of generations.

What is expected of a generation, wherever its steps ran: for each replica a session that has not run anything else, fed the
steps that this replica served. Bit for bit: affinity is worth time, and nothing else.
"""

import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import onnxruntime as ort
import pytest
import ray
from conftest import FIXTURES, LIBRARY, ROOT, STEPS, generate
from examples.client import Client
from examples.ray.app import Replica
from ray import serve

SEEDS = range(12)
HALF = STEPS // 2


@pytest.fixture(scope="module")
def url(alone):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Ray gives its parts seconds to come up, and a machine under load may need more.
    for patience in ("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S"):
        os.environ[patience] = "600"
    # Replicas import the example as their driver does.
    os.environ["PYTHONPATH"] = str(ROOT)
    start_ray()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Replica.options(num_replicas=2).bind(str(alone.path), str(LIBRARY)))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def start_ray(attempts=5):
    """A cluster of this machine.

    Ray waits a quarter of a minute for the agents of its dashboard, which no setting changes. The small agent, that of a Ray
    without the dashboard's dependencies, is up sooner; and on a machine under load it is tried again.
    """
    small = mock.patch("ray._private.utils.get_dashboard_dependency_error", return_value=ImportError())
    for attempt in range(attempts):
        try:
            with small:
                return ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
        except Exception as error:
            if "timed out during startup" not in str(error) or attempt == attempts - 1:
                raise
            ray.shutdown()


class Generation:
    """One image over HTTP, and which replica served each of its steps."""

    def __init__(self, url, seed):
        self.client, self.seed, self.served, self.predictions = Client(url), seed, [], []

    def step(self, number, feed):
        answer = self.client.step(self.seed + 1, feed, start=number == 0, end=number == STEPS - 1)["out"]
        self.served.append(int(self.client.headers["x-replica-pid"]))
        self.predictions.append((feed, answer))
        return answer

    def replay(self, alone):
        """The image, from one fresh session per replica."""
        sessions = {pid: alone.session() for pid in set(self.served)}

        def step(number, feed):
            denoiser = sessions[self.served[number]]
            return denoiser.step(self.seed + 1, feed, start=number == 0, end=number == STEPS - 1)["out"]

        return generate(self.seed, step)


def together(work, generations):
    with ThreadPoolExecutor(len(generations)) as pool:
        return list(pool.map(work, generations))


def test_every_generation_stays_on_its_replica(url, alone):
    generations = [Generation(url, 100 + seed) for seed in SEEDS]
    images = together(lambda g: generate(g.seed, g.step), generations)
    for generation, image in zip(generations, images):
        assert len(set(generation.served)) == 1, generation.served
        assert np.array_equal(image, alone.image(generation.seed))
    assert len({g.served[0] for g in generations}) == 2, "only one replica worked"


def test_a_replica_dies_and_its_generations_go_on_elsewhere(url, alone):
    generations = [Generation(url, seed) for seed in SEEDS]
    halfway = together(lambda g: generate(g.seed, g.step, until=HALF), generations)
    victim = generations[0].served[0]
    assert any(g.served[0] != victim for g in generations), "only one replica worked"
    os.kill(victim, signal.SIGKILL)
    finish = lambda pair: generate(pair[0].seed, pair[0].step, since=HALF, latents=pair[1])  # noqa: E731
    images = together(finish, list(zip(generations, halfway)))

    dense = dense_session()
    moved = [g for g in generations if len(set(g.served)) > 1]
    assert moved and victim not in {pid for g in generations for pid in g.served[HALF:]}
    for generation, image in zip(generations, images):
        assert np.array_equal(image, generation.replay(alone)), f"image {generation.seed}, replicas {generation.served}"
        if generation not in moved:
            assert np.array_equal(image, alone.image(generation.seed))
    for generation in moved:
        # The step that found nothing cached is what the model itself computes.
        first = next(n for n in range(STEPS) if generation.served[n] != generation.served[0])
        feed, answer = generation.predictions[first]
        expected = dense.run(None, feed)[0]
        assert np.abs(answer - expected).max() < 1e-5 * np.abs(expected).max()


def dense_session():
    return ort.InferenceSession(str(FIXTURES / "dit__ts17.onnx"), providers=["CPUExecutionProvider"])
