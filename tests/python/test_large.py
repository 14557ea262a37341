"""A model with 10 GB of weights beside it is rewritten without reading them."""

import json
import subprocess
import sys

import pytest
from conftest import TARGET

pytest.importorskip("onnx", reason="builds its model with the onnx package")
import synthetic  # noqa: E402

MEMORY = 200 << 20

# Linux counts what a process had before `exec`, its parent's memory, so a small one runs the command: its time and most memory.
MEASURE = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True)
print(json.dumps([time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024]))
"""


def test_ten_gigabytes_beside_the_model_are_never_read(tmp_path):
    model, plan = tmp_path / "large.onnx", tmp_path / "plan.json"
    size = synthetic.dit(model, layers=28, width=2816, heads=22, tokens=1024, sparse=True)
    assert size > 10e9
    steps = [["full"] * 28] * 50
    plan.write_text(json.dumps({"format": "ditfastattn-plan", "version": 1, "cfg": "cond-first", "steps": steps}))
    command = [sys.executable, "-c", MEASURE, TARGET / "dfa-rewrite", model, "--plan", plan, "--quiet"]
    elapsed, memory = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    # Shown with `pytest -s`: time is not asserted, memory is.
    print(f"{size / 1e9:.1f} GB of weights: rewritten in {elapsed:.2f} s with {memory / 2**20:.0f} MiB")
    assert memory < MEMORY
    assert (tmp_path / "large.dfa.onnx").stat().st_size < 1 << 20
    about = subprocess.run([TARGET / "dfa-rewrite", "inspect", model], capture_output=True, text=True, check=True)
    assert "28 in module form" in about.stdout
