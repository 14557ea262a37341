"""The op library: where it is, and its counters."""

import ctypes
import json
from pathlib import Path

# A request may begin between asking for the length and asking for the text, and make it a little longer.
_SLACK = 256


def get_library_path() -> str:
    """The path of the op library, for `SessionOptions.register_custom_ops_library` and for hosts that are not Python.

    Raises FileNotFoundError where the package was installed without it.
    """
    path = Path(__file__).with_name("libditfastattn.so")
    if not path.is_file():
        raise FileNotFoundError(f"no op library at {path}: expected the one that the wheel of ditfastattn brings; install the wheel, not the source tree")
    return str(path)


def stats() -> dict[str, int]:
    """The counters of this process, over all sessions, by name: counts since the start or the last `reset`, and bytes.

    They are those of the library at `get_library_path()`; a copy of the file that was registered under another path counts for itself.
    docs/operations.md says what each counts.
    """
    function = _load().ditfastattn_stats
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    buffer = ctypes.create_string_buffer(function(None, 0) + _SLACK)
    function(buffer, len(buffer))
    counters: dict[str, int] = json.loads(buffer.value)
    return counters


def reset() -> None:
    """Sets the counters of this process to zero. What is cached, and what is in flight, stays and stays counted."""
    function = _load().ditfastattn_reset
    function.restype = None
    function.argtypes = []
    function()


def _load() -> ctypes.CDLL:
    # The loader hands out the library that ONNX Runtime has loaded: the same file is loaded once.
    return ctypes.CDLL(get_library_path())
