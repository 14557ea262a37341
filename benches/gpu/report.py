"""Makes tables of what `run.py` measured: `python benches/gpu/report.py DIR/gpu.json` writes `DIR/gpu.md`."""

import json
import sys
from pathlib import Path


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---:|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]) + "\n"


def ratio(a, b):
    return f"{a / b:.2f}" if isinstance(a, (int, float)) and b else "–"


def attention(rows):
    backends = sorted({name for row in rows for name in row["torch_ms"]})
    head = ["head dim", "tokens", "ONNX Runtime's", "kernel", *backends, "full", "full + capture", "window + R", "full / best", "window / best"]
    body = []
    for row in rows:
        others = [row["torch_ms"].get(name, "–") for name in backends]
        best = min([row["ort_mha_ms"], *(time for time in others if isinstance(time, (int, float)))])
        ours = [row[f"{mode}_ms"] for mode in ("full", "capture", "window")]
        body.append([row["head_dim"], row["tokens"], row["ort_mha_ms"], row["ort_mha_kernel"], *others, *ours,
                     ratio(ours[0], best), ratio(ours[2], best)])  # fmt: skip
    return table(head, body)


def module(rows):
    actions = list(rows[0]["planned_ms"])
    return table(["tokens", "dense", *actions], [
        [row["tokens"], row["dense_ms"], *(ratio(row["planned_ms"][action], row["dense_ms"]) for action in actions)] for row in rows
    ])  # fmt: skip


def whole(rows):
    plans = list(rows[0]["planned_ms"])
    return table(["tokens", "steps", "dense generation", *plans], [
        [row["tokens"], row["steps"], round(row["dense_ms"] * row["steps"], 1),
         *(ratio(row["dense_ms"] * row["steps"], row["planned_ms"][plan]) for plan in plans)] for row in rows
    ])  # fmt: skip


def main():
    path = Path(sys.argv[1])
    result = json.loads(path.read_text())
    device = result["kernels"][0] if result["kernels"] else {"name": "unknown"}
    host = result["host"][0]
    per_layer, with_choice = (
        (host["planned_ms"][label] / host["steps"] - host["dense_ms"]) / host["layers"] * 1e3 for label in ("full", "full by host")
    )
    kernels = [line for line in result["kernels"] if "milliseconds" in line]
    text = f"""# {device['name']}, {result['date']}

Commit {result['commit']}, onnxruntime {result['onnxruntime']}, provider {result['provider']}, driver {device.get('driver')}. Made by
`scripts/gpu-suite`; times are milliseconds.

## Attention, float16, batch 2

{attention(result['attention'])}
## The kernels alone, bfloat16

{table(['head dim', 'tokens', 'mode', 'milliseconds', 'TFLOP/s of full attention'], [
    [k['head_dim'], k['tokens'], k['mode'], round(k['milliseconds'], 3), round(k['tflops_of_full_attention'])] for k in kernels])}
## A module, time / dense (the paper's Table 2)

{module(result['table2'])}
## Whole models with random weights, dense / planned (the paper's Table 4)

The geometry of DiT-XL/2-512, PixArt at 1K and at 2K: 28 layers of width 1152, without cross-attention. D1 to D6 leave the part of
the attention's work that the paper's plans leave, in a mixture of all actions. In *full by host* ONNX Runtime's own attention computes
the dense steps (`--dense host`); where it is above *full*, that is the better choice.

{whole(result['end_to_end'])}
## What the form costs on the host

Per layer and step, at 64 tokens, where the device has next to nothing to do: {per_layer:.1f} µs (If, four operators, Step); with a second If, which lets ONNX
Runtime's attention compute the step, {with_choice:.1f} µs.
"""
    path.with_suffix(".md").write_text(text)
    print(path.with_suffix(".md"))


if __name__ == "__main__":
    main()
