"""Sessions with the op library."""

import os
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ._library import get_library_path

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

# ONNX Runtime's table of operator domains is not guarded: of two first sessions created at once, one can fail.
_CREATING = threading.Lock()


def session(
    model: str | os.PathLike[str] | bytes,
    *,
    providers: Sequence[str | tuple[str, Mapping[str, Any]]] = ("CPUExecutionProvider",),
    threads: int | None = None,
    options: "SessionOptions | None" = None,
) -> "InferenceSession":
    """An `onnxruntime.InferenceSession` of a rewritten model, with the op library registered. Models that are not rewritten run, too.

    `model`: a file, or the bytes of one that has its weights inside. `providers`: as ONNX Runtime takes them; the operators run on the CPU.
    `threads`: for one run; None lets ONNX Runtime choose. `options`: your own settings; the library is registered on them, so give them
    to one call only.

    Raises ImportError without ONNX Runtime, FileNotFoundError for a missing file, ValueError for a number of threads below 1, and
    ONNX Runtime's own errors for what it does not load.
    """
    try:
        import onnxruntime
    except ImportError as error:
        if error.name != "onnxruntime":
            raise ImportError(f"onnxruntime is installed and does not import: {error!r}; 1.17 and 1.18 need NumPy 1: pip install 'numpy<2'") from error
        raise ImportError("ditfastattn.session needs ONNX Runtime 1.17 or later: pip install onnxruntime (or ditfastattn[cpu])") from error

    if not isinstance(model, bytes):
        model = os.fspath(model)
        if not os.path.isfile(model):
            raise FileNotFoundError(f"no model at {model}: expected an ONNX file, as `dfa-rewrite` or `ditfastattn.rewrite` writes it")
    options = options if options is not None else onnxruntime.SessionOptions()
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads is {threads}: expected at least 1, or None for ONNX Runtime's choice")
        options.intra_op_num_threads = threads
    with _CREATING:
        options.register_custom_ops_library(get_library_path())
        return onnxruntime.InferenceSession(model, options, providers=list(providers))
