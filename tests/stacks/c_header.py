"""Writes ONNX Runtime's C header from the bindings of the crate `ort-sys`, as far as the C example needs it.

No package registry has the header itself. The crate has the same declarations in the same order, and Cargo.lock pins its hash. Members that
the example does not use are only counted: what matters of them is their place.
"""

import json
import re
import subprocess
from pathlib import Path

ENUMS = ["OrtLoggingLevel", "OrtAllocatorType", "OrtMemType", "ONNXTensorElementDataType"]
OPAQUE = ["OrtStatus", "OrtEnv", "OrtSession", "OrtSessionOptions", "OrtRunOptions", "OrtValue", "OrtMemoryInfo"]
SCALARS = {"usize": "size_t", "i64": "int64_t", "u32": "uint32_t", "core::ffi::c_char": "char", "os_char": "char", "core::ffi::c_void": "void"}


def header(used, root):
    """The header's text with the members of OrtApi in `used`, from the crate that the workspace at `root` is locked to."""
    source = re.sub(r'#\[doc = "(?:[^"\\]|\\.)*"\]', "", _bindings(root).read_text())
    lines = ["#include <stddef.h>", "#include <stdint.h>"]
    lines += [f"typedef struct {name} {name};" for name in OPAQUE]
    for name in ENUMS:
        values = re.findall(r"(\w+) = (-?\d+)", re.search(rf"pub enum {name} \{{(.*?)\n\}}", source, re.S)[1])
        lines.append(f"typedef enum {name} {{ {', '.join(f'{key} = {value}' for key, value in values)} }} {name};")
    lines.append("typedef struct OrtApi {")
    missing = set(used)
    for member, declaration in _members(source):
        missing.discard(member)
        lines.append(f"    {_function(member, declaration)};" if member in used else f"    void *{member};")
    assert not missing, f"ort-sys has no {sorted(missing)} in OrtApi"
    lines += [
        "} OrtApi;",
        "typedef struct OrtApiBase { const OrtApi *(*GetApi)(uint32_t); const char *(*GetVersionString)(void); } OrtApiBase;",
        "const OrtApiBase *OrtGetApiBase(void);",
    ]
    return "\n".join(lines) + "\n"


def _bindings(root):
    command = ["cargo", "metadata", "--format-version", "1", "--locked"]
    packages = json.loads(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout)["packages"]
    return Path(next(p["manifest_path"] for p in packages if p["name"] == "ort-sys")).parent / "src" / "lib.rs"


def _members(source):
    """(name, type) of every member of OrtApi, in order."""
    body = re.search(r"pub struct OrtApi \{(.*?)\n\}", source, re.S)[1]
    for cfg, name, declaration in re.findall(r'(#\[cfg\([^\n]*\)\]\s*)?pub (\w+):\s*(.*?)(?=,\s*(?:#\[|pub )|\s*$)', body, re.S):
        if "wasm" in cfg and not cfg.startswith("#[cfg(not("):
            continue
        yield name, declaration


def _function(name, declaration):
    parameters, result = re.fullmatch(r'unsafe extern "system" fn\((.*?)\)(?: -> (.*))?', declaration.strip(), re.S).groups()
    types = [_type(p.split(":", 1)[1]) for p in parameters.split(",") if p.strip()]
    return f"{_type(result) if result else 'void'} (*{name})({', '.join(types) or 'void'})"


def _type(rust):
    rust = rust.strip()
    if rust == "OrtStatusPtr":
        return "OrtStatus *"
    pointer = re.fullmatch(r"\*(const|mut) (.*)", rust)
    if pointer is None:
        return SCALARS.get(rust, rust)
    # C's const belongs to what is on its left.
    return f"{_type(pointer[2])}{' const' if pointer[1] == 'const' else ''} *"
