"""`ORTTransformer` in whole diffusers pipelines with random weights, against the PyTorch transformer that it replaces."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import ditfastattn
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, PixArtSigmaPipeline, PixArtTransformer2DModel
from ditfastattn.diffusers import ORTTransformer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "diffusers"))
from export import export  # noqa: E402

STEPS, SIZE, CHANNELS, TEXT, WIDTH = 5, 8, 4, 6, 16
TIMESTEPS = [801, 601, 401, 201, 1]
DENSE = [["full", "full"]] * STEPS
# Everything but the first step leaves something out.
THIN = [["full", "full"], ["wa-rs", "ast"], ["wa-rs+asc", "asc"], ["ast", "wa-rs"], ["ast", "ast"]]


def random_weights(module, seed):
    """Large enough that attention shows in the image; new modules have zeros in their gates."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.3 if parameter.ndim < 2 else 1.5 / parameter[0].numel() ** 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=draw))
    return module.eval()


def vae():
    return random_weights(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=CHANNELS, sample_size=SIZE), 1)


class DiT:
    cfg = "cond-first"

    def pipeline():
        transformer = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=CHANNELS, out_channels=2 * CHANNELS, num_layers=2, sample_size=SIZE,
            patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
        )  # fmt: skip
        return DiTPipeline(random_weights(transformer, 2), vae(), DDIMScheduler(steps_offset=1))

    def draw(pipe, what, guidance=4.0, seed=0):
        """Images [n, height, width, 3] from 0 to 1, one per number in `what`."""
        options = {"generator": torch.Generator().manual_seed(seed), "output_type": "np", "guidance_scale": guidance}
        return pipe(class_labels=what, num_inference_steps=STEPS, **options).images


class PixArt:
    cfg = "uncond-first"

    def pipeline():
        transformer = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=CHANNELS, out_channels=2 * CHANNELS, num_layers=2, sample_size=SIZE,
            patch_size=2, caption_channels=WIDTH, cross_attention_dim=16, norm_num_groups=4, use_additional_conditions=False,
        )  # fmt: skip
        return PixArtSigmaPipeline(None, None, vae(), random_weights(transformer, 2), DDIMScheduler(steps_offset=1))

    def draw(pipe, what, guidance=4.0, seed=0):
        texts = torch.stack([torch.randn(TEXT, WIDTH, generator=torch.Generator().manual_seed(number)) for number in what])
        mask = torch.ones(len(what), TEXT, dtype=torch.int64)
        mask[:, 4:] = 0
        return pipe(
            prompt=None, negative_prompt=None, prompt_embeds=texts, prompt_attention_mask=mask, negative_prompt_embeds=torch.zeros_like(texts),
            negative_prompt_attention_mask=mask, num_inference_steps=STEPS, guidance_scale=guidance, use_resolution_binning=False,
            height=SIZE, width=SIZE, generator=torch.Generator().manual_seed(seed), output_type="np",
        ).images  # fmt: skip


@pytest.fixture(scope="module", params=[DiT, PixArt])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(kind):
    pipeline = kind.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def exported(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "transformer.onnx"
    export(pipe.transformer, path, TEXT)
    return path


def plan(kind, steps, **other):
    return {"format": "ditfastattn-plan", "version": 1, "window": 0.25, "cfg": kind.cfg, "timesteps": TIMESTEPS, "steps": steps} | other


def swapped(kind, pipe, model):
    """A pipeline that shares everything with `pipe` but the transformer."""
    other = type(pipe)(**{**pipe.components, "transformer": pipe.transformer})
    other.set_progress_bar_config(disable=True)
    other.transformer = ORTTransformer(model, config=pipe.transformer, threads=1)
    return other


@pytest.fixture(scope="module")
def thin(kind, exported):
    return ditfastattn.rewrite(exported, plan(kind, THIN), exported.with_name("thin.onnx"))


def test_the_exported_graph_draws_what_pytorch_draws(kind, pipe, exported):
    assert np.abs(kind.draw(swapped(kind, pipe, exported), [1, 7]) - kind.draw(pipe, [1, 7])).max() < 1e-4


def test_a_dense_plan_draws_what_pytorch_draws(kind, pipe, exported):
    dense = ditfastattn.rewrite(exported, plan(kind, DENSE), exported.with_name("dense.onnx"))
    for guidance in (4.0, 1.0):
        assert np.abs(kind.draw(swapped(kind, pipe, dense), [1, 7], guidance) - kind.draw(pipe, [1, 7], guidance)).max() < 1e-4


def test_a_plan_is_followed_and_every_generation_is_its_own(kind, pipe, thin):
    planned = swapped(kind, pipe, thin)
    ditfastattn.reset()
    first = kind.draw(planned, [1, 7])
    counters = ditfastattn.stats()
    assert counters["steps"] == STEPS and counters["generations"] == 1 and counters["recomputes"] == 0 and counters["live_requests"] == 0
    assert counters["layers_reused"] == 4
    assert np.abs(first - kind.draw(pipe, [1, 7])).max() > 1e-3, "the plan leaves things out, and that shows with random weights"
    kind.draw(planned, [2, 3], seed=5)
    assert np.array_equal(kind.draw(planned, [1, 7]), first)
    assert ditfastattn.stats()["generations"] == 3 and ditfastattn.stats()["recomputes"] == 0


def test_an_abandoned_generation_leaves_nothing_to_the_next(kind, pipe, thin):
    alone = kind.draw(swapped(kind, pipe, thin), [1, 7])
    planned = swapped(kind, pipe, thin)
    transformer, calls = planned.transformer, []

    def failing(*arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return transformer(*arguments, **named)

    failing.config, failing.dtype = transformer.config, transformer.dtype
    planned.transformer = failing
    with pytest.raises(KeyboardInterrupt):
        kind.draw(planned, [2, 3])
    planned.transformer = transformer
    assert np.array_equal(kind.draw(planned, [1, 7]), alone)


def test_threads_share_a_transformer(kind, pipe, thin):
    planned = swapped(kind, pipe, thin)
    alone = {number: kind.draw(planned, [number], seed=number) for number in range(3)}
    drawn, start = {}, threading.Barrier(3)

    def one(number):
        mine = type(pipe)(**{**planned.components, "scheduler": DDIMScheduler(steps_offset=1)})
        mine.set_progress_bar_config(disable=True)
        start.wait()
        drawn[number] = kind.draw(mine, [number], seed=number)

    ditfastattn.reset()
    threads = [threading.Thread(target=one, args=[number]) for number in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(drawn[number], alone[number]) for number in alone)
    counters = ditfastattn.stats()
    assert counters["generations"] == 3 and counters["recomputes"] == 0 and counters["collisions"] == 0


def test_pictures_that_are_no_guidance_pairs_are_refused(kind, pipe, thin):
    with pytest.raises(ValueError, match="the 2 rows of latents are no such pairs"):
        kind.draw(swapped(kind, pipe, thin), [1, 7], guidance=1.0)


def test_a_plan_for_the_other_order_is_refused(kind, pipe, exported):
    other = {"cond-first": "uncond-first", "uncond-first": "cond-first"}[kind.cfg]
    model = ditfastattn.rewrite(exported, plan(kind, THIN, cfg=other), exported.with_name("other.onnx"), force=True)
    with pytest.raises(ValueError, match=f"the plan has cfg `{other}` and the pipeline feeds `{kind.cfg}`"):
        swapped(kind, pipe, model)
    assert ORTTransformer(model, config={}, cfg=other).dtype is torch.float32
    with pytest.raises(ValueError, match="`_class_name` is None"):
        ORTTransformer(model, config={})


def test_explicit_state_is_refused(kind, pipe, exported):
    model = ditfastattn.rewrite(exported, plan(kind, THIN), exported.with_name("io.onnx"), force=True, flags=["--state", "io"])
    with pytest.raises(ValueError, match="without `--state io`"):
        swapped(kind, pipe, model)


def test_arguments_and_inputs_must_meet(kind, pipe, exported):
    transformer = ORTTransformer(exported, config=pipe.transformer.config)
    latents, step = torch.zeros(2, CHANNELS, SIZE, SIZE), torch.tensor([1, 1])
    with pytest.raises(ValueError, match="the graph's input `.*` is not given"):
        transformer(latents, timestep=step)
    with pytest.raises(ValueError, match="the graph has no input `extra`"):
        transformer(latents, timestep=step, extra=step)
    with pytest.raises(ValueError, match="no `timestep` was given"):
        transformer(latents)
    with pytest.raises(ValueError, match="`extra` is a int"):
        transformer(latents, timestep=step, extra=3)
    with pytest.raises(ValueError, match="values that the graph's torch.int64 cannot hold"):
        transformer(latents, timestep=step + 0.5)
    with pytest.raises(ValueError, match="the graph has no input `pixels`"):
        ORTTransformer(exported, config={}, names={"hidden_states": "pixels"})


def test_an_argument_may_be_left_out_on_purpose(pipe, exported, kind):
    if kind is not DiT:
        pytest.skip("shown with DiT")
    transformer = ORTTransformer(exported, config=pipe.transformer.config, names={"extra": None})
    given = {"timestep": torch.tensor([9, 9]), "class_labels": torch.tensor([1, 1000])}
    latents = torch.randn(2, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    sample = transformer(latents.half(), **given, extra=torch.zeros(1)).sample
    assert sample.dtype is torch.float16 and torch.equal(sample, transformer(latents.half(), **given, return_dict=False)[0])


def test_a_pipeline_without_pytorchs_weights(kind, pipe, thin, tmp_path):
    """The way of somebody who has the rewritten model and the rest of the pipeline only; and the example's command line."""
    pipe.save_pretrained(tmp_path / "all")
    subprocess.run(
        [sys.executable, ROOT / "examples" / "diffusers" / "export.py", tmp_path / "all", tmp_path / "t.onnx", "--text-tokens", str(TEXT)], check=True
    )
    config = tmp_path / "all" / "transformer"
    without = type(pipe).from_pretrained(tmp_path / "all", transformer=None, tokenizer=None, text_encoder=None) if kind is PixArt else (
        type(pipe).from_pretrained(tmp_path / "all", transformer=None)
    )
    without.set_progress_bar_config(disable=True)
    model = ditfastattn.rewrite(tmp_path / "t.onnx", plan(kind, THIN))
    without.transformer = ORTTransformer(model, config=config, threads=1)
    assert np.abs(kind.draw(without, [1, 7]) - kind.draw(swapped(kind, pipe, thin), [1, 7])).max() < 1e-5
    with pytest.raises(FileNotFoundError, match="expected the transformer's config.json"):
        ORTTransformer(model, config=tmp_path / "nothing")


def test_a_pipeline_is_recorded_for_the_search(kind, pipe, exported, tmp_path):
    with ditfastattn.record_trajectory(pipe.transformer) as recorder:
        kind.draw(pipe, [1, 7])
    recorder.save(tmp_path / "traj.npz")
    command = [ditfastattn.get_program_path(), "search", exported, "--trajectory", tmp_path / "traj.npz", "--cfg", kind.cfg, "--threads", "1"]
    subprocess.run([*command, "--delta", "0.3", "-o", tmp_path / "plan.json"], check=True, capture_output=True)
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["timesteps"] == TIMESTEPS and len(found["steps"]) == STEPS
