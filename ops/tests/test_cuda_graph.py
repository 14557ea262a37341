"""CUDA graphs (F22): a replayed graph would do one step for ever, so a session that asks for them must not run."""

import numpy as np
import onnxruntime as ort
import pytest

import tiny as T

CUDA = "CUDAExecutionProvider"


@pytest.mark.skipif(T.PROVIDERS[0] != CUDA, reason="needs the CUDA provider: scripts/gpu-suite run ops")
def test_a_session_with_cuda_graphs_does_not_run():
    tiny = T.Tiny(T.random_plan(1))
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(T.LIB)
    with pytest.raises(Exception) as error:
        # ONNX Runtime refuses control flow and nodes on the CPU under capture; if it ever does not, our operators do.
        session = ort.InferenceSession(tiny.model().SerializeToString(), options, providers=[(CUDA, {"enable_cuda_graph": "1"})])
        client = tiny.client(0.1, session=session, dfa_request_id=np.array(1, np.int64))
        for _ in range(3):
            client.run(0)
    assert "graph" in str(error.value).lower()
