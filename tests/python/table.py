"""Writes the table of docs/models.md: what is found in every export of the corpus, and how far its outputs are from PyTorch's.

    .venv/tests/bin/python tests/python/table.py        (after scripts/test has made the environment and the programs)
"""

import tempfile
from pathlib import Path

import onnxruntime
from conftest import CORPUS, HOST, ROOT, Model, distance, inspect, session

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
# What the short names of the corpus stand for, in the order of the table.
NAMES = {
    "dit": "DiT (diffusers)", "dit-late": "DiT, converted or fused", "dit-separate": "DiT, guidance in two runs", "fbdit": "facebookresearch/DiT",
    "fbdit-explicit": "… attention written out", "fbdit-qknorm": "… with q/k norms", "fbdit-cfg": "… `forward_with_cfg` in the graph",
    "pixart": "PixArt-Σ", "pixart-alpha": "PixArt-α", "sd3": "SD3", "sd35": "SD3.5 (dual attention)", "flux": "Flux",
    "flux-separate": "Flux, true CFG", "auraflow": "AuraFlow", "hunyuan": "Hunyuan-DiT", "cogvideox": "CogVideoX",
    "cogvideox-text": "… text said by the plan", "latte": "Latte", "stdit": "Open-Sora STDiT", "wan": "Wan", "ltx": "LTX-Video",
    "sana": "Sana (linear attention)", "pipeline": "text encoder + DiT + decoder", "unnamed": "DiT, inputs without names",
    "sigma": "DiT fed with σ", "registers": "class, time and register tokens", "mha": "`nn.MultiheadAttention`", "einsum": "einsum",
    "bmm": "baddbmm on (B·H, N, d)", "expsum": "softmax as exp / sum", "expsum-raw": "… without the maximum", "gqa": "grouped-query attention",
    "gqa-expand": "… k and v expanded", "gqa-repeat": "… k and v repeated", "mask-key-float": "mask [B,1,1,N], float",
    "mask-key-bool": "mask [B,1,1,N], bool", "mask-pair-float": "mask [B,1,N,N], float", "mask-pair-bool": "mask [B,1,N,N], bool",
    "mask-where": "mask by `masked_fill`", "mask-bias": "bias [N,N], constant", "mask-const-bool": "mask [1,1,N,N], constant",
    "plain": "fused operators", "loud": "int8", "interval": "flow map, two times", "uvit": "U-ViT", "unet": "U-Net", "lora": "low-rank adapters",
    "temperature": "cosine attention, a factor per head", "one-key": "multi-query attention", "channels": "1×1 convolutions, folded einsum",
    "talking-heads": "talking heads", "heads-outside": "heads folded in front of the batch", "sequence-first": "[N, B, C] throughout",
}  # fmt: skip


def measure(entry, folder):
    """(layers, in module form, worst difference or None) of one export."""
    model = Model(entry, folder)
    about = inspect(model.path, *model.flags)["model"]
    found = (about["layers"], about["module_form"])
    if entry["expect"] == "refused" or not entry["runs_on_cpu"]:
        return *found, None
    planned = session(model.rewrite())
    runs = ((planned.run(None, model.feed(planned, *run))[0], model.expected(*run)) for run in model.runs())
    return *found, max(distance(out, expected) for out, expected in runs)


def rows():
    for name in dict.fromkeys([*NAMES, *(e["architecture"] for e in CORPUS)]):
        entries = [e for e in CORPUS if e["architecture"] == name]
        with tempfile.TemporaryDirectory() as folder:
            for entry, (layers, module, worst) in [(e, measure(e, Path(folder))) for e in entries]:
                form = "—" if not layers else "module" if module == layers else f"module {module}, core {layers - module}"
                near = "not run" if worst is None else f"{worst:.0e}"
                if entry["expect"] == "refused":
                    near = "refused"
                yield f"| {NAMES.get(name, name)} | {entry['dialect']} | {layers} of {entry['layers']} | {form} | {near} |"


def main():
    assert HOST >= (1, 32), "the newest host computes the most"
    lines = ["| model | export | layers found | form | worst difference |", "|---|---|---|---|---|", *rows()]
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    note = f"onnxruntime {onnxruntime.__version__}, CPU."
    PAGE.write_text("\n".join([before + BEGIN, "", *lines, "", note, "", END + after]))


if __name__ == "__main__":
    main()
