"""Exports the transformer of a DiT or PixArt-Sigma pipeline for `dfa-rewrite`, with PyTorch's ordinary exporter.

    python examples/diffusers/export.py PIPELINE transformer.onnx

PIPELINE is what `DiffusionPipeline.from_pretrained` takes. The batch is dynamic; height and width are the transformer's `sample_size`.
"""

import argparse
import contextlib

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, PixArtTransformer2DModel

ROWS = 2


class Sample(torch.nn.Module):
    """The transformer with its arguments by position, and nothing but the prediction."""

    def __init__(self, transformer, names):
        super().__init__()
        self.transformer, self.names = transformer, names

    def forward(self, *values):
        fixed = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if "encoder_hidden_states" in self.names else {}
        return self.transformer(**dict(zip(self.names, values)), **fixed, return_dict=False)[0]


def example(transformer, text_tokens):
    """One step's inputs, by the names of the pipeline's arguments."""
    config = transformer.config
    latents = torch.randn(ROWS, config.in_channels, config.sample_size, config.sample_size, dtype=transformer.dtype)
    timestep = torch.full((ROWS,), 500)
    if isinstance(transformer, DiTTransformer2DModel):
        return {"hidden_states": latents, "timestep": timestep, "class_labels": torch.zeros(ROWS, dtype=torch.int64)}
    if isinstance(transformer, PixArtTransformer2DModel) and not config.use_additional_conditions:
        text = torch.randn(ROWS, text_tokens, config.caption_channels, dtype=transformer.dtype)
        mask = torch.ones(ROWS, text_tokens, dtype=torch.int64)
        return {"hidden_states": latents, "encoder_hidden_states": text, "timestep": timestep, "encoder_attention_mask": mask}
    raise TypeError(f"cannot export a {type(transformer).__name__}: expected the transformer of DiTPipeline or PixArtSigmaPipeline")


@contextlib.contextmanager
def kept_tokens():
    """Makes `squeeze(1)` of several tokens the nothing that it is: the exporter makes an `If` of it that ONNX Runtime refuses."""
    squeeze = torch.Tensor.squeeze

    def patched(tensor, *dims):
        return tensor if dims == (1,) and tensor.ndim == 3 and tensor.shape[1] != 1 else squeeze(tensor, *dims)

    torch.Tensor.squeeze = patched
    try:
        yield
    finally:
        torch.Tensor.squeeze = squeeze


def export(transformer, path, text_tokens=300):
    """Writes the transformer to `path`, with its arguments' names for inputs. `text_tokens`: the length that prompts are padded to."""
    inputs = example(transformer, text_tokens)
    axes = {name: {0: "batch"} for name in [*inputs, "sample"]}
    # The exporter puts the mode of the outermost module into everything below it when it is done.
    module = Sample(transformer, list(inputs)).eval()
    with kept_tokens():
        torch.onnx.export(
            module, tuple(inputs.values()), str(path), dynamo=False, opset_version=17,
            input_names=list(inputs), output_names=["sample"], dynamic_axes=axes,
        )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("onnx")
    parser.add_argument("--text-tokens", type=int, default=300, help="PixArt: the length that prompts are padded to [default: 300]")
    arguments = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(arguments.pipeline)
    export(pipe.transformer, arguments.onnx, arguments.text_tokens)


if __name__ == "__main__":
    main()
