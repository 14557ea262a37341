"""A rewritten model behind a server: one step of one generation per call, arrays as .npz.

Knows no server. `examples/http` and `examples/ray` put it on the network, `examples/client.py` talks to both.
"""

import ctypes
import io
import json

import numpy as np
import onnxruntime as ort


def pack(arrays):
    """Arrays by name as the bytes of an .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def unpack(data):
    """The arrays of `pack`. Raises ValueError for anything else; pickles are refused."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:
        raise ValueError(f"expected the bytes of an .npz file, found {len(data)} bytes that are none: {error}") from error


class Denoiser:
    """A session of `model` (a path) with the op library at `library`; safe to call from many threads."""

    def __init__(self, model, library, threads=1):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.register_custom_ops_library(str(library))
        self.session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.library = ctypes.CDLL(str(library))
        self.library.ditfastattn_stats.restype = ctypes.c_size_t
        self.library.ditfastattn_stats.argtypes = [ctypes.c_char_p, ctypes.c_size_t]

    def step(self, request, feed, start=False, end=False):
        """The model's outputs by name for its inputs `feed`, at the next step of the generation `request` (an int, not 0).

        `start`: the first step of a generation. `end`: the last one; what was cached for it is freed.
        """
        whose = {"dfa_request_id": np.array(request, np.int64), "dfa_start": np.array(start), "dfa_end": np.array(end)}
        return dict(zip(self.outputs, self.session.run(None, feed | whose)))

    def step_bytes(self, request, data, start=False, end=False):
        """As `step`, from the bytes of an .npz file to those of another."""
        return pack(self.step(request, unpack(data), start, end))

    def stats(self):
        """The library's counters, for the whole process (docs/operations.md)."""
        buffer = ctypes.create_string_buffer(4096)
        self.library.ditfastattn_stats(buffer, len(buffer))
        return json.loads(buffer.value)
