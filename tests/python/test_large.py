"""A model with 10 GB of weights beside it is rewritten without reading them."""

import json
import os
import subprocess
import time

import pytest
from conftest import TARGET

pytest.importorskip("onnx", reason="builds its model with the onnx package")
import synthetic  # noqa: E402

MEMORY = 200 << 20


def test_ten_gigabytes_beside_the_model_are_never_read(tmp_path):
    model, plan = tmp_path / "large.onnx", tmp_path / "plan.json"
    size = synthetic.dit(model, layers=28, width=2816, heads=22, tokens=1024, sparse=True)
    assert size > 10e9
    steps = [["full"] * 28] * 50
    plan.write_text(json.dumps({"format": "ditfastattn-plan", "version": 1, "cfg": "cond-first", "steps": steps}))
    start = time.perf_counter()
    pid = os.posix_spawn(TARGET / "dfa-rewrite", ["dfa-rewrite", str(model), "--plan", str(plan), "--quiet"], os.environ)
    _, status, usage = os.wait4(pid, 0)
    elapsed = time.perf_counter() - start
    # Shown with `pytest -s`: time is not asserted, memory is.
    print(f"{size / 1e9:.1f} GB of weights: rewritten in {elapsed:.2f} s with {usage.ru_maxrss / 1024:.0f} MiB")
    assert os.waitstatus_to_exitcode(status) == 0
    assert usage.ru_maxrss * 1024 < MEMORY
    assert (tmp_path / "large.dfa.onnx").stat().st_size < 1 << 20
    about = subprocess.run([TARGET / "dfa-rewrite", "inspect", model], capture_output=True, text=True, check=True)
    assert "28 in module form" in about.stdout
