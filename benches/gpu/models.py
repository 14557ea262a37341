"""Writes the models that the GPU benchmarks run, without their weights. Needs numpy, onnx and `dfa-rewrite`, no GPU.

    python benches/gpu/models.py OUT [--quick]

The weights are random and of one size whatever the tokens; `run.py` makes them where it runs. `models.json` says what is what.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from onnx import TensorProto, helper

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "python"))
import synthetic  # noqa: E402

# The parts of the attention's matmul work that the paper's plans leave at 20 steps of DiT-XL/2-512 (thresholds 0.025 … 0.15).
LEFT = {"D1": 0.888, "D2": 0.766, "D3": 0.673, "D4": 0.588, "D5": 0.508, "D6": 0.443}
# Work of each action: matmuls of attention only, windows of 1/8 on either side.
WORK = {"full": 1.0, "asc": 0.5, "wa-rs": 15 / 64, "wa-rs+asc": 15 / 128, "ast": 0.0}
WIDTH, HEADS = 1152, 16


def mixed_plan(layers, steps, left):
    """A plan with about `left` of the work: cheap actions spread evenly, the later the step the more."""
    rows = [["full"] * layers for _ in range(steps)]
    cells = sorted((((layer * 7 + step * 5) % 11) / 11 - step / steps, step, layer) for step in range(1, steps) for layer in range(layers))
    total, cheap = float(layers * steps), ("ast", "wa-rs+asc", "wa-rs", "asc")
    for turn, (_, step, layer) in enumerate(cells):
        if total <= left * layers * steps:
            break
        rows[step][layer] = cheap[turn % len(cheap)]
        total -= 1 - WORK[rows[step][layer]]
    return plan(rows)


def plan(rows):
    return {"format": "ditfastattn-plan", "version": 1, "cfg": "cond-first", "steps": rows, "timesteps": [1000 - t for t in range(len(rows))]}


def single(out, op, heads, dim, tokens, rows=None):
    """One attention of float16 `[batch, tokens, heads·dim]`: `mha` is ONNX Runtime's, `dfa` ours under a plan."""
    width, half = heads * dim, TensorProto.FLOAT16
    shape, name = ["batch", tokens, width], f"{op}_d{dim}_n{tokens}"
    inputs = [helper.make_tensor_value_info(n, half, shape) for n in "qkv"]
    nodes, initializers = [], []
    if op == "mha":
        nodes.append(helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["o"], domain="com.microsoft", num_heads=heads))
    else:
        inputs += [helper.make_tensor_value_info("timestep", TensorProto.INT64, ["batch"])]
        inputs += [helper.make_tensor_value_info("latents", TensorProto.FLOAT, ["batch", 4])]
        scalars = {"dfa_request_id": TensorProto.INT64, "dfa_start": TensorProto.BOOL, "dfa_end": TensorProto.BOOL}
        inputs += [helper.make_tensor_value_info(scalar, kind, []) for scalar, kind in scalars.items()]
        nodes.append(helper.make_node("DiTFastAttnStep", ["timestep", *scalars, "latents"], ["ticket", "skip"], domain="ai.ditfastattn",
                                      plan=json.dumps(plan(rows)), layers=1, contract=1, core_layers=[0]))  # fmt: skip
        initializers.append(helper.make_tensor("split", TensorProto.INT64, [4], [0, 0, heads, dim]))
        initializers.append(helper.make_tensor("joined", TensorProto.INT64, [3], [0, 0, width]))
        nodes += [helper.make_node("Reshape", [n, "split"], [f"{n}4"]) for n in "qkv"]
        nodes.append(helper.make_node("DiTFastAttn", ["q4", "k4", "v4", "ticket"], ["o4"], domain="ai.ditfastattn", layer=0, form="core",
                                      q_layout="BSHD", k_layout="BSHD", v_layout="BSHD", o_layout="BSHD"))  # fmt: skip
        nodes.append(helper.make_node("Reshape", ["o4", "joined"], ["o"]))
    values = [helper.make_tensor_value_info("o4", half, ["batch", tokens, heads, dim])] if op == "dfa" else []
    graph = helper.make_graph(nodes, name, inputs, [helper.make_tensor_value_info("o", half, shape)], initializers, value_info=values)
    domains = [helper.make_opsetid(d, v) for d, v in (("", 17), ("com.microsoft", 1), ("ai.ditfastattn", 1))]
    (out / f"{name}.onnx").write_bytes(helper.make_model(graph, opset_imports=domains, ir_version=8).SerializeToString())
    return f"{name}.onnx"


# The plan that leaves everything full, with ONNX Runtime's attention in the rewritten model.
HOST_DENSE = "full by host"


def transformer(out, tool, name, layers, tokens, plans, mlp=True):
    """A transformer with ONNX Runtime's attention, and the exporter's form of it rewritten under each plan; under the plan `full`
    also the first one, whose dense steps ONNX Runtime computes (`--dense host`)."""
    entry = {"layers": layers, "tokens": tokens, "width": WIDTH, "planned": {}}
    for kind, fused in (("dense", True), ("exported", False)):
        path = out / f"{name}_{kind}.onnx"
        entry["weights"] = synthetic.dit(path, layers, WIDTH, HEADS, tokens, sparse=True, half=True, fused=fused, mlp=mlp)
        entry[kind] = path.name
    forms = [(label, rows, "exported", "library") for label, rows in plans.items()]
    if "full" in plans:
        forms.append((HOST_DENSE, plans["full"], "dense", "host"))
    for label, rows, source, dense in forms:
        (out / "plan.json").write_text(json.dumps(rows))
        planned = out / f"{name}_{label.replace('+', '-').replace(' ', '-')}.onnx"
        # IOBinding binds inputs only, not what has a default.
        subprocess.run([tool, out / entry[source], "--plan", out / "plan.json", "-o", planned, "--dense", dense,
                        "--request-inputs", "required", "--force", "--quiet"], check=True)  # fmt: skip
        entry["planned"][label] = {"model": planned.name, "steps": len(rows["steps"])}
    return entry


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tool", type=Path, default=ROOT / "target" / "release" / "dfa-rewrite")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    heads, lengths, layers, steps = (2, (64, 128), 2, 4) if args.quick else (HEADS, (1024, 4096, 16384), 28, 20)
    modes = {"full": [["full"]] * 6, "window": [["full"], ["wa-rs"], ["full"], ["wa-rs"], ["full"], ["wa-rs"]]}
    index = {"attention": [], "table2": [], "end_to_end": [], "heads": heads}
    for dim in (64, 72, 128):
        for tokens in lengths:
            entry = {"head_dim": dim, "tokens": tokens, "mha": single(args.out, "mha", heads, dim, tokens)}
            for mode, rows in modes.items():
                path = args.out / single(args.out, "dfa", heads, dim, tokens, rows)
                entry[mode] = path.rename(path.with_stem(f"{path.stem}_{mode}")).name
            index["attention"].append(entry)
    actions = {action: plan([["full"]] + [[action]] * 5) for action in WORK}
    for tokens in lengths:
        index["table2"].append(transformer(args.out, args.tool, f"module_n{tokens}", 1, tokens, actions, mlp=False))
        plans = {"full": plan([["full"] * layers] * steps)}
        plans |= {name: mixed_plan(layers, steps, left) for name, left in LEFT.items()}
        index["end_to_end"].append(transformer(args.out, args.tool, f"dit_n{tokens}", layers, tokens, plans))
    # Short sequences leave nothing but the host's work: what an If and four small operators per layer cost there.
    index["host"] = transformer(args.out, args.tool, "host", layers, 64, {"full": plan([["full"] * layers] * steps)})
    (args.out / "models.json").write_text(json.dumps(index, indent=1))
    for data in args.out.glob("*.data"):
        data.unlink()


if __name__ == "__main__":
    main()
