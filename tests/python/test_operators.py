"""What the rewriter knows of operators, against what operators give: ONNX's own cases, one operator each, with data.

A rule may leave a size open; what it says must be true.
"""

import json
import subprocess
import warnings

import numpy as np
import pytest

from conftest import ROOT

onnx = pytest.importorskip("onnx", reason="ONNX's cases are needed; the newest host's environment has them")

SMALL = 64


def cases():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        return [c for c in collect_testcases(None) if c.model is not None and c.data_sets]


def with_constants(case):
    """The model with its small vectors (shapes, axes, scales) as constants, as exporters write them, and what it returns."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    inputs, outputs = case.data_sets[0]
    for value, array in zip(list(model.graph.input), inputs, strict=False):
        array = np.asarray(array) if isinstance(array, np.generic) else array
        if isinstance(array, np.ndarray) and array.ndim <= 1 and array.size <= SMALL and array.dtype.kind in "if":
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
            model.graph.input.remove(value)
    del model.graph.value_info[:]
    for output in model.graph.output:
        # What is declared is not what is inferred.
        output.ClearField("type")
    return model, outputs


def facts(paths):
    command = ["cargo", "run", "--release", "--quiet", "--package", "ditfastattn-rewriter", "--example", "facts", "--"]
    done = subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def contradiction(fact, array):
    """What `fact` says of `array` that is not so."""
    if not isinstance(array, np.ndarray):
        return None
    if fact["type"] and fact["type"] != onnx.helper.np_dtype_to_tensor_dtype(array.dtype):
        return f"type {fact['type']}, not {array.dtype}"
    if fact["shape"] is None:
        return None
    if len(fact["shape"]) != array.ndim or any(
        d is not None and d != n for d, n in zip(fact["shape"], array.shape, strict=False)
    ):
        return f"shape {fact['shape']}, not {list(array.shape)}"
    elements = fact["elements"]
    if elements is None:
        return None
    real = array.astype(np.float64).ravel()
    said = np.array([np.nan if e is None else e for e in elements], np.float64)
    open_ = np.isnan(said)
    if said.shape != real.shape or not np.allclose(said[~open_], real[~open_], rtol=1e-3):
        return f"elements {elements}, not {real.tolist()}"
    return None


def test_rules_say_nothing_that_is_not_so(tmp_path):
    paths, outputs, names = [], [], []
    for i, case in enumerate(cases()):
        if len({n.op_type for n in case.model.graph.node}) != 1:
            continue
        model, given = with_constants(case)
        path = tmp_path / f"{i}.onnx"
        path.write_bytes(model.SerializeToString())
        paths.append(str(path))
        outputs.append((model, given))
        names.append(case.name)
    assert len(paths) > 1000
    wrong, said, known = [], set(), {}
    for name, (model, given), values in zip(names, outputs, facts(paths), strict=True):
        op = model.graph.node[0].op_type
        for output, array in zip(model.graph.output, given, strict=False):
            fact = values.get(output.name, {"type": 0, "shape": None, "elements": None})
            what = contradiction(fact, array)
            if what:
                wrong.append(f"{name} ({op}): {what}")
            if fact["shape"] is not None:
                said.add(op)
                known[op] = known.get(op, False) or None not in fact["shape"]
    assert not wrong, "\n".join(wrong)
    # The cases reach the rules: most operators are met, and of those most are known to the last size.
    assert len(said) > 140, sorted(said)
    assert sum(known.values()) > 130, sorted(op for op in said if not known[op])
