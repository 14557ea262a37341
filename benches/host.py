"""What the benchmarks of the CPU share: sessions with the op library, a clock, and what they say of the machine."""

import platform
import subprocess
import time

import onnxruntime as ort
from conftest import ROOT, TARGET

# Seconds between runs of two sessions: the threads of one spin for a while after its run, on the cores that the next one wants.
PAUSE = 0.03


def session(model, threads, spin):
    """`model`: a path, or a file's bytes. `spin`: whether threads that wait spin, as they do by default; not where CPU time is measured."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.register_custom_ops_library(str(TARGET / "libditfastattn.so"))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def clock(name):
    """`wall` or `cpu`: a function that returns seconds."""
    return time.perf_counter if name == "wall" else time.process_time


def about(clock_name):
    """The machine, versions, date and clock of a run, in a line."""
    cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.processor())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return f"{cpu}, onnxruntime {ort.__version__}, commit {commit}, {time.strftime('%Y-%m-%d')}, {clock_name} time"
