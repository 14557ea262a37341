"""A rewritten model under Triton's Python backend, where the server has no ONNX Runtime backend.

Goes into NAME/1/ beside model.onnx. `config.pbtxt` is the one that `--emit-triton-config` writes, with `backend: "python"`
and without its `default_model_filename`.
"""

import ctypes
import json
from pathlib import Path

import onnxruntime as ort
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.instance = args["model_instance_name"]
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.libraries = config["model_operations"]["op_library_filename"]
        for library in self.libraries:
            options.register_custom_ops_library(library)
        model = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        # The sequence controls dfa_start, dfa_end and dfa_request_id come with the request, as tensors of one element.
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def execute(self, requests):
        return [self.step(request) for request in requests]

    def step(self, request):
        feed = {name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
        try:
            results = self.session.run(None, feed)
        except Exception as error:
            return triton.InferenceResponse(error=triton.TritonError(str(error)))
        return triton.InferenceResponse([triton.Tensor(name, value) for name, value in zip(self.outputs, results)])

    def finalize(self):
        stats = ctypes.CDLL(self.libraries[0]).ditfastattn_stats
        stats.restype, stats.argtypes = ctypes.c_size_t, [ctypes.c_char_p, ctypes.c_size_t]
        buffer = ctypes.create_string_buffer(4096)
        stats(buffer, len(buffer))
        triton.Logger.log_info(f"counters of {self.instance}: {buffer.value.decode()}")
