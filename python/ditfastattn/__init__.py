"""DiTFastAttn for ONNX Runtime: rewrite an exported diffusion transformer under a plan, and run it anywhere.

    path = ditfastattn.rewrite("model.onnx", "plan.json")      # what the command `dfa-rewrite` does
    session = ditfastattn.session(path)                        # an ordinary InferenceSession with the op library
    session.run(None, {...})                                   # step by step, as before
    ditfastattn.stats()["layers_reused"]                       # how to see that it works

`ditfastattn.diffusers` stands in for the transformer of a diffusers pipeline. ONNX Runtime is not installed with this package: bring
`onnxruntime` 1.17 or later, or `pip install ditfastattn[cpu]`.
"""

from importlib.metadata import PackageNotFoundError, version

from ._library import get_library_path, reset, stats
from ._rewrite import RewriteError, get_program_path, rewrite
from ._session import session
from ._trajectory import Recorder, record_trajectory

try:
    __version__ = version("ditfastattn")
except PackageNotFoundError:  # imported from a source tree
    __version__ = "0+source"

__all__ = [
    "Recorder",
    "RewriteError",
    "__version__",
    "get_library_path",
    "get_program_path",
    "record_trajectory",
    "reset",
    "rewrite",
    "session",
    "stats",
]
