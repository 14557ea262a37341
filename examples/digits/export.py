"""Exports the trained weights with PyTorch's ordinary TorchScript exporter; nothing in the graph is prepared for us.

    python examples/digits/export.py --weights out/digits/ema.pt --onnx examples/digits/digits-dit.onnx
"""

import argparse

import numpy as np
import onnxruntime
import torch
from diffusers import DiTTransformer2DModel

from train import CONFIG


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="out/digits/ema.pt")
    parser.add_argument("--onnx", default="examples/digits/digits-dit.onnx")
    args = parser.parse_args()

    model = DiTTransformer2DModel(**CONFIG).eval()
    model.load_state_dict(torch.load(args.weights, weights_only=True))

    torch.manual_seed(0)
    batch = (torch.randn(4, 1, 32, 32), torch.full((4,), 500), torch.tensor([3, 7, 10, 10]))
    torch.onnx.export(
        model,
        (batch[0], batch[1], batch[2], None, False),  # cross_attention_kwargs, return_dict
        args.onnx,
        dynamo=False,
        opset_version=17,
        input_names=["hidden_states", "timestep", "class_labels"],
        output_names=["out"],
        dynamic_axes={name: {0: "batch"} for name in ("hidden_states", "timestep", "class_labels", "out")},
    )

    session = onnxruntime.InferenceSession(args.onnx, providers=["CPUExecutionProvider"])
    worst = 0.0
    for rows, step in ((4, 500), (2, 999), (6, 0)):  # other batch sizes than the traced one
        x, t, c = torch.randn(rows, 1, 32, 32), torch.full((rows,), step), torch.arange(rows) % 11
        with torch.no_grad():
            expected = model(x, timestep=t, class_labels=c, return_dict=False)[0].numpy()
        feeds = {"hidden_states": x.numpy(), "timestep": t.numpy(), "class_labels": c.numpy()}
        worst = max(worst, np.abs(session.run(["out"], feeds)[0] - expected).max())
    print(f"{args.onnx}: largest difference from PyTorch {worst:.1e}")
    if worst > 1e-4:
        raise SystemExit("the exported model does not compute what PyTorch does")


if __name__ == "__main__":
    main()
