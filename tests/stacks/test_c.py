"""The C example, compiled against the wheel's libonnxruntime."""

import json
import os
import re
import subprocess
from pathlib import Path

import ditfastattn
import numpy as np
import onnxruntime
import pytest
from c_header import header

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "c" / "denoise.c"
DIGITS = ROOT / "examples" / "digits"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("c")
    used = set(re.findall(r"ort->(\w+)", EXAMPLE.read_text()))
    (folder / "onnxruntime_c_api.h").write_text(header(used, ROOT))
    runtime = Path(onnxruntime.__file__).parent / "capi" / f"libonnxruntime.so.{onnxruntime.__version__}"
    # The wheel has the library under its full name only; what is linked with it asks for the major version.
    (folder / "libonnxruntime.so.1").symlink_to(runtime)
    flags = ["-std=c11", "-D_DEFAULT_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror", f"-Wl,-rpath,{folder}"]
    command = ["cc", *flags, "-I", folder, EXAMPLE, folder / "libonnxruntime.so.1", "-lm", "-ldl", "-o", folder / "denoise"]
    subprocess.run(command, check=True)
    return folder / "denoise"


def draw(program, model, digit, folder):
    """A digit's pixels, 0 to 255, and the counters."""
    picture = folder / f"{Path(model).stem}.pgm"
    said = subprocess.run([program, model, ditfastattn.get_library_path(), str(digit), picture], check=True, capture_output=True, text=True)
    content = picture.read_bytes()
    assert content.startswith(b"P5\n32 32\n255\n")
    return np.frombuffer(content[-1024:], np.uint8).astype(float), json.loads(said.stdout)


def test_a_digit_is_drawn_under_a_plan(program, tmp_path):
    planned = ditfastattn.rewrite(DIGITS / "digits-dit.onnx", DIGITS / "plan.json", tmp_path / "digits.dfa.onnx")
    dense, idle = draw(program, DIGITS / "digits-dit.onnx", 3, tmp_path)
    picture, counters = draw(program, planned, 3, tmp_path)
    assert idle["steps"] == 0
    assert counters["steps"] == 50 and counters["layers_reused"] == 114 and counters["recomputes"] == 0
    error = np.mean((picture - dense) ** 2)
    assert 0 < error and 10 * np.log10(255**2 / error) > 30, error
    assert dense.std() > 30, "a digit is neither blank nor grey"


def test_another_digit_is_another_picture(program, tmp_path):
    three, _ = draw(program, DIGITS / "digits-dit.onnx", 3, tmp_path)
    one, _ = draw(program, DIGITS / "digits-dit.onnx", 1, tmp_path)
    assert np.mean((three - one) ** 2) > 1000


@pytest.mark.parametrize(("model", "said"), [("nothing.onnx", "nothing.onnx"), (None, "usage")])
def test_what_is_wrong_is_said(program, model, said):
    arguments = [] if model is None else [model, ditfastattn.get_library_path(), "3", os.devnull]
    result = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert result.returncode == 2 and said in result.stderr
