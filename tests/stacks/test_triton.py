"""A real tritonserver (of the nvidia-pytriton wheel) with the configuration that `--emit-triton-config` writes.

The wheel has the Python backend only, so examples/triton/model.py runs the model; sequences are Triton's own business.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import pytriton
import tritonclient.grpc as triton
import tritonclient.grpc.model_config_pb2 as triton_pb
from conftest import LAYERS, LIBRARY, ROOT, STEPS, generate, rewrite
from google.protobuf import text_format
from tritonclient.utils import InferenceServerException

WHEEL = Path(pytriton.__file__).parent / "tritonserver"


def config_of(folder):
    return text_format.Parse((folder / "config.pbtxt").read_text(), triton_pb.ModelConfig())


def add_model(repository, name, instances=1, idle_microseconds=3_600_000_000):
    """A model of the repository, as its user makes it. The idle limit is out of reach, however slow the machine is."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    rewrite("-o", version / "model.onnx", "--emit-triton-config", "--quiet")
    config = config_of(version.parent)
    config.backend = "python"
    config.ClearField("default_model_filename")
    config.instance_group.add(count=instances, kind=triton_pb.ModelInstanceGroup.KIND_CPU)
    config.sequence_batching.max_sequence_idle_microseconds = idle_microseconds
    (version.parent / "config.pbtxt").write_text(text_format.MessageToString(config))
    shutil.copy(ROOT / "examples" / "triton" / "model.py", version)


class Server:
    def __init__(self, folder):
        self.folder = folder
        backends = folder / "backends"
        shutil.copytree(WHEEL / "backends", backends)
        stub = f"{sys.version_info.major}.{sys.version_info.minor}"
        for file in (WHEEL / "python_backend_stubs" / stub).iterdir():
            shutil.copy(file, backends / "python")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.client = triton.InferenceServerClient(f"127.0.0.1:{port}")
        self.log = folder / "triton.log"
        command = [WHEEL / "bin" / "tritonserver", f"--model-repository={folder / 'models'}", f"--backend-directory={backends}"]
        command += ["--grpc-address=127.0.0.1", f"--grpc-port={port}", "--allow-http=false", "--allow-metrics=false"]
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            # The backend's stub finds the wheel's libraries only so.
            "LD_LIBRARY_PATH": str(WHEEL.parents[1] / "nvidia_pytriton.libs"),
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    def wait(self):
        for _ in range(3000):
            if self.process.poll() is not None:
                break
            try:
                if self.client.is_server_ready():
                    return
            except Exception:
                pass
            time.sleep(0.2)
        raise AssertionError(f"tritonserver did not come up:\n{self.log.read_text()[-4000:]}")

    def stop(self):
        """Ends it, and returns the counters of every instance."""
        self.client.close()
        self.process.terminate()
        self.process.wait()
        # Triton's log escapes quotes.
        said = self.log.read_text().replace('\\"', '"')
        found = re.findall(r"counters of (\S+): (\{.*?\})", said)
        assert found, self.log.read_text()[-4000:]
        return {instance: json.loads(counters) for instance, counters in found}


@pytest.fixture
def server(tmp_path):
    servers = []

    def start(**models):
        (tmp_path / "models").mkdir()
        for name, settings in models.items():
            add_model(tmp_path / "models", name, **settings)
        servers.append(Server(tmp_path))
        servers[0].wait()
        return servers[0]

    yield start
    for running in servers:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


def stepper(server, model, sequence):
    """Steps of one sequence, as a Triton client sends them: start, end and the id are flags of the request."""
    types = {np.dtype(np.float32): "FP32", np.dtype(np.int64): "INT64"}

    def step(number, feed):
        inputs = []
        for name, value in feed.items():
            inputs.append(triton.InferInput(name, value.shape, types[value.dtype]))
            inputs[-1].set_data_from_numpy(value)
        answer = server.client.infer(
            model,
            inputs,
            sequence_id=sequence,
            sequence_start=number == 0,
            sequence_end=number == STEPS - 1,
        )
        return answer.as_numpy("out")

    return step


def test_the_configuration_is_triton_s(tmp_path):
    """Parsed by Triton's own protobuf, which refuses fields and values that it does not know."""
    (tmp_path / "dit" / "1").mkdir(parents=True)
    rewrite("-o", tmp_path / "dit" / "1" / "model.onnx", "--emit-triton-config", "--quiet")
    config = config_of(tmp_path / "dit")
    assert (config.backend, config.max_batch_size) == ("onnxruntime", 0)
    assert list(config.model_operations.op_library_filename) == [str(LIBRARY)]
    batching = config.sequence_batching
    controls = {c.name: c.control[0] for c in batching.control_input}
    kinds = triton_pb.ModelSequenceBatching.Control
    assert controls["dfa_start"].kind == kinds.CONTROL_SEQUENCE_START
    assert controls["dfa_end"].kind == kinds.CONTROL_SEQUENCE_END
    assert controls["dfa_request_id"].kind == kinds.CONTROL_SEQUENCE_CORRID
    assert controls["dfa_request_id"].data_type == triton_pb.TYPE_INT64
    for flag in ("dfa_start", "dfa_end"):
        assert list(controls[flag].bool_false_true) == [False, True]
    assert batching.max_sequence_idle_microseconds >= 10**7
    assert {i.name: list(i.dims) for i in config.input} == {
        "hidden_states": [-1, 4, 8, 8],
        "timestep": [-1],
        "class_labels": [-1],
    }
    assert [(o.name, list(o.dims)) for o in config.output] == [("out", [-1, 4, 8, 8])]


def test_sequences_interleave_on_one_instance(server, alone):
    running = server(dit={})
    seeds = range(12)
    with ThreadPoolExecutor(len(seeds)) as pool:
        images = list(pool.map(lambda seed: generate(seed, stepper(running, "dit", seed + 1)), seeds))
    for seed, image in zip(seeds, images):
        assert np.array_equal(image, alone.image(seed)), f"sequence {seed + 1}"
    (counters,) = running.stop().values()
    assert (counters["steps"], counters["generations"]) == (12 * STEPS, 12)
    assert counters["layers_full"] + counters["layers_window"] + counters["layers_reused"] == 12 * STEPS * LAYERS
    assert counters["misses"] == counters["recomputes"] == counters["discontinuities"] == 0
    # Every sequence ended, and nothing of it is left.
    assert counters["live_requests"] == counters["bytes"] == 0


def test_two_instances_each_keep_their_own_sequences(server, alone):
    running = server(pair={"instances": 2})
    seeds = range(8)
    with ThreadPoolExecutor(len(seeds)) as pool:
        images = list(pool.map(lambda seed: generate(seed, stepper(running, "pair", seed + 1)), seeds))
    for seed, image in zip(seeds, images):
        assert np.array_equal(image, alone.image(seed)), f"sequence {seed + 1}"
    counters = running.stop()
    assert len(counters) == 2
    # Both worked, and no step came to the instance that did not have its sequence.
    assert all(c["generations"] > 0 for c in counters.values()), counters
    assert sum(c["generations"] for c in counters.values()) == len(seeds)
    assert sum(c["steps"] for c in counters.values()) == len(seeds) * STEPS
    assert all(c["discontinuities"] == c["misses"] == 0 for c in counters.values())


def test_a_sequence_that_expired_begins_again(server, alone):
    running = server(brief={"idle_microseconds": 1_000_000})
    step = stepper(running, "brief", 7)
    latents = generate(3, step, until=4)
    patience = 2
    while True:
        # Each step that is still accepted begins the idle time anew, so wait longer for the next.
        time.sleep(patience)
        try:
            latents = generate(3, step, since=4, until=5, latents=latents)
        except InferenceServerException as error:
            assert "must specify the START flag" in str(error)
            break
        patience *= 2
        assert patience < 200, "the sequence never expired"
    # The id is free again: for the same image from its beginning.
    once_more = stepper(running, "brief", 7)
    tries = 0
    while True:
        try:
            image = generate(3, once_more)
            break
        except InferenceServerException as error:
            # On a machine under load the short limit may pass between two steps.
            assert "must specify the START flag" in str(error) and tries < 100
            tries += 1
    assert np.array_equal(image, alone.image(3))
