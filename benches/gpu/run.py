"""Benchmarks on a GPU: our modes against ONNX Runtime's attention and PyTorch's, modules, whole models.

    python benches/gpu/run.py MODELS --library libditfastattn.so --kernels-json FILE --out DIR [--provider …] [--quick]

MODELS is what `models.py` wrote. Writes `DIR/gpu.json`; `report.py` makes tables of it. All tensors stay on the device
(IOBinding); times are medians of runs between two waits, compared within one process.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

PROBE = "--probe-mha"
BATCH = 2


class Bound:
    """A session whose inputs and outputs lie on the device; what changes from run to run is fed from the host."""

    def __init__(self, model, args, custom_ops=True):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if custom_ops:
            options.register_custom_ops_library(str(args.library))
        self.session = ort.InferenceSession(str(model), options, providers=list(dict.fromkeys([args.provider, "CPUExecutionProvider"])))
        if args.provider not in self.session.get_providers():
            raise SystemExit(f"{args.provider} is not there: onnxruntime has {self.session.get_providers()}")
        self.device = "cuda" if args.provider.startswith("CUDA") else "cpu"
        self.binding = self.session.io_binding()
        rng = np.random.default_rng(0)
        for info in self.session.get_inputs():
            if info.type == "tensor(float16)":
                shape = [d if isinstance(d, int) else BATCH for d in info.shape]
                value = rng.standard_normal(shape, dtype=np.float32).astype(np.float16)
                self.binding.bind_ortvalue_input(info.name, ort.OrtValue.ortvalue_from_numpy(value, self.device, 0))
        for info in self.session.get_outputs():
            self.binding.bind_output(info.name, self.device)
        self.names = {info.name for info in self.session.get_inputs()}

    def run(self, step=0, request=1):
        feeds = {"timestep": np.full(BATCH, 1000 - step), "dfa_request_id": np.array(request)}
        feeds |= {"dfa_start": np.array(step == 0), "dfa_end": np.array(False), "latents": np.zeros((BATCH, 4), np.float32)}
        for name, value in feeds.items():
            if name in self.names:
                self.binding.bind_cpu_input(name, value)
        self.binding.synchronize_inputs()
        start = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        self.binding.synchronize_outputs()
        return time.perf_counter() - start


def milliseconds(times):
    return round(statistics.median(times) * 1e3, 4)


def steady(bound, args, step=0):
    for _ in range(2 if args.quick else 5):
        bound.run(step)
    return milliseconds([bound.run(step) for _ in range(3 if args.quick else 20)])


def by_step(bound, steps, args):
    """Times of every step of a generation; medians over generations, the first of which warms up."""
    generations = [[bound.run(step, request) for step in range(steps)] for request in range(1, 3 if args.quick else 6)]
    return [milliseconds(times) for times in zip(*generations[1:])]


def probe_mha(model, args):
    """Which kernel ONNX Runtime chooses: it says so on its standard output."""
    command = [sys.executable, __file__, str(args.models), "--library", str(args.library), "--provider", args.provider, PROBE, str(model)]
    environment = {"ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO": "1"}
    import os

    output = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    found = re.findall(r"SdpaKernel=(\w+)", output.stdout + output.stderr)
    return found[-1] if found else "unknown"


def torch_sdpa(heads, dim, tokens, quick):
    """PyTorch's attention by backend, in milliseconds; what is not there is left out."""
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    q, k, v = (torch.randn(BATCH, heads, tokens, dim, device="cuda", dtype=torch.float16) for _ in range(3))
    result = {}
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
        times = []
        try:
            with sdpa_kernel([getattr(SDPBackend, name)]):
                for run in range(25):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    torch.nn.functional.scaled_dot_product_attention(q, k, v)
                    torch.cuda.synchronize()
                    times.append(time.perf_counter() - start)
        except RuntimeError as error:
            result[name.lower()] = f"refused: {str(error).splitlines()[0]}"
            continue
        result[name.lower()] = milliseconds(times[5:])
    return result


def attention(index, args):
    rows = []
    for entry in index["attention"]:
        folder = args.models
        row = {"head_dim": entry["head_dim"], "tokens": entry["tokens"], "batch": BATCH, "heads": index["heads"]}
        row["ort_mha_ms"] = steady(Bound(folder / entry["mha"], args, custom_ops=False), args)
        row["ort_mha_kernel"] = probe_mha(folder / entry["mha"], args)
        row["full_ms"] = milliseconds_of(by_step(Bound(folder / entry["full"], args), 6, args)[1:])
        times = by_step(Bound(folder / entry["window"], args), 6, args)
        row["capture_ms"], row["window_ms"] = milliseconds_of(times[2::2]), milliseconds_of(times[1::2])
        row["torch_ms"] = torch_sdpa(index["heads"], entry["head_dim"], entry["tokens"], args.quick)
        rows.append(row)
        print(row, flush=True)
    return rows


def milliseconds_of(times):
    return statistics.median(times)


def weights(entry, args, rng):
    """Random weights beside the models of an entry: one file under all the names."""
    size = entry["weights"]
    place = args.models / f"weights_{size}.data"
    if not place.exists():
        with open(place, "wb") as file:
            for start in range(0, size, 1 << 26):
                count = min(1 << 26, size - start) // 2
                file.write((rng.standard_normal(count, dtype=np.float32) * np.float32(0.03)).astype(np.float16).tobytes())
    for name in ("dense", "exported"):
        link = args.models / f"{entry[name]}.data"
        link.unlink(missing_ok=True)
        link.hardlink_to(place)


def transformers(index, args, only=None):
    rows, rng = [], np.random.default_rng(0)
    for entry in index:
        weights(entry, args, rng)
        row = {"layers": entry["layers"], "tokens": entry["tokens"], "width": entry["width"], "batch": BATCH, "planned_ms": {}}
        row["dense_ms"] = steady(Bound(args.models / entry["dense"], args, custom_ops=False), args)
        for label, planned in entry["planned"].items():
            times = by_step(Bound(args.models / planned["model"], args), planned["steps"], args)
            row["planned_ms"][label] = statistics.median(times[1:]) if only == "step" else round(sum(times), 4)
            row["steps"] = planned["steps"]
        rows.append(row)
        print(row, flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--provider", default="CUDAExecutionProvider")
    parser.add_argument("--kernels-json", type=Path, help="what `gpu_check device` and `gpu_check time` printed, one JSON per line")
    parser.add_argument("--commit", default="unknown", help="the commit that was packed")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(PROBE, type=Path, dest="probe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        Bound(args.probe, args, custom_ops=False).run()
        return
    index = json.loads((args.models / "models.json").read_text())
    lines = args.kernels_json.read_text().splitlines() if args.kernels_json else []
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": args.commit,
        "onnxruntime": ort.__version__,
        "provider": args.provider,
        "python": platform.python_version(),
        "kernels": [json.loads(line) for line in lines],
        "attention": attention(index, args),
        "table2": transformers(index["table2"], args, only="step"),
        "end_to_end": transformers(index["end_to_end"], args),
        "host": transformers([index["host"]], args),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    print(args.out / "gpu.json")


if __name__ == "__main__":
    main()
