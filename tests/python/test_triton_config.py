"""The sizes in `--emit-triton-config` are those that ONNX Runtime tells Triton's backend, which compares them."""

import re

import pytest
from conftest import Model, corpus, session, tool

TYPES = {
    "tensor(float)": "TYPE_FP32",
    "tensor(float16)": "TYPE_FP16",
    "tensor(int64)": "TYPE_INT64",
    "tensor(bool)": "TYPE_BOOL",
}
TENSOR = re.compile(r'  \{ name: "(.*)" data_type: (\w+) dims: \[ (.*) \] \}')


def declared(text, place):
    """What the configuration says of each input or output: name to (type, sizes)."""
    block = re.search(rf"^{place} \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]
    return {name: (kind, [int(d) for d in dims.split(", ")]) for name, kind, dims in TENSOR.findall(block)}


def told(values):
    """The same, from ONNX Runtime: open sizes are -1, and a scalar is one element."""
    sizes = {v.name: [d if isinstance(d, int) else -1 for d in v.shape] for v in values}
    return {v.name: (TYPES[v.type], sizes[v.name] or [1]) for v in values}


# Every architecture, from both exporters.
DIALECTS = [entry for dialect in ("ts17", "dyn18") for entry in corpus("rewritten", runs_on_cpu=True, dialect=dialect)]


@pytest.mark.parametrize("entry", DIALECTS)
def test_the_sizes_are_what_the_backend_compares(entry, tmp_path):
    model = Model(entry, tmp_path)
    model.needs_host()
    text_path = tmp_path / "config.pbtxt"
    model.rewrite(None, f"--emit-triton-config={text_path}")
    rewritten = session(model.output())
    text = text_path.read_text()
    fed = told(rewritten.get_inputs())
    # The backend refuses controls of any other shape, or with a default.
    assert fed.pop("dfa_request_id") == ("TYPE_INT64", [1])
    for flag in ("dfa_start", "dfa_end"):
        assert fed.pop(flag) == ("TYPE_BOOL", [1])
    assert declared(text, "input") == fed
    assert declared(text, "output") == told(rewritten.get_outputs())
