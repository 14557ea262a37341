"""Trains the example's Diffusion Transformer on scikit-learn's handwritten digits, on a CPU, in about an hour.

The model is diffusers' `DiTTransformer2DModel`, unmodified, working on pixels: 1 channel of 32x32 in [-1, 1], patches
of 2x2, 256 tokens. The larger part of the time goes into 16x16 images, four times cheaper: diffusers stretches the
position embedding of a smaller image over the same range, so the same weights serve both sizes.

    python examples/digits/train.py --minutes 60 --out out/digits/ema.pt
"""

import argparse
import copy
import os
import time

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiTTransformer2DModel
from sklearn.datasets import load_digits

CLASSES = 10  # and class 10 is "no class", for classifier-free guidance
CONFIG = dict(
    num_attention_heads=4,
    attention_head_dim=32,
    in_channels=1,
    num_layers=6,
    sample_size=32,
    patch_size=2,
    num_embeds_ada_norm=CLASSES,
)


def images():
    """(1797, 1, 32, 32) float32 in [-1, 1] and (1797,) int64."""
    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    large = F.interpolate(small, scale_factor=4, mode="bicubic", align_corners=False).clamp(-1, 1)
    return large, torch.tensor(data.target)


def build():
    model = DiTTransformer2DModel(**CONFIG)
    for block in model.transformer_blocks:
        # adaLN-Zero, as the DiT paper starts: every block is the identity.
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
        # diffusers drops the label in every block by itself; guidance needs it gone from all of them at once.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
        torch.nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    for layer in (model.proj_out_1, model.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return model


def save(model, path):
    """Whole or not at all: a cut run leaves the last good checkpoint."""
    torch.save(model.state_dict(), path + ".tmp")
    os.replace(path + ".tmp", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="wall time; the learning rate follows it")
    parser.add_argument("--small", type=float, default=0.65, help="share of the time spent on 16x16 images")
    parser.add_argument("--batch", type=int, default=64, help="images of 16x16 a step; half as many of 32x32")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--init", help="weights to start from")
    parser.add_argument("--out", default="out/digits/ema.pt")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    large, labels = images()
    small = F.avg_pool2d(large, 2)
    model = build().train()
    if args.init:
        model.load_state_dict(torch.load(args.init, weights_only=True))
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)

    schedule = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    weights = snr.clamp(max=5) / snr  # min-SNR-5 for a model that predicts the noise
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.99))

    start = logged = saved = time.monotonic()
    step, averaged, mean = 0, 0, None
    pool, batch = small, args.batch
    while (done := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        if pool is small and done >= args.small:
            # The average must not remember the other size for longer than it needs.
            pool, batch, averaged = large, args.batch // 2, 0
        pick = torch.randint(len(labels), (batch,))
        x = pool[pick]
        label = torch.where(torch.rand(batch) < 0.12, CLASSES, labels[pick])
        # stratified: the batch covers all noise levels
        t = ((torch.arange(batch) + torch.rand(batch)) * (1000 / batch)).long().clamp(max=999)
        noise = torch.randn_like(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            predicted = model(schedule.add_noise(x, noise, t), timestep=t, class_labels=label, return_dict=False)[0]
        loss = (weights[t] * (predicted.float() - noise).square().mean((1, 2, 3))).mean()
        lr = args.lr * min((step + 1) / 200, 1.0) * max(0.02, min(1.0, (1 - done) / 0.6))  # flat, then linear to 2 %
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, averaged = step + 1, averaged + 1
        keep = min(0.999, averaged / (averaged + 10))
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - keep)

        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        now = time.monotonic()
        if now - logged > 20:
            print(f"{now - start:6.0f} s  step {step:6d}  {x.shape[-1]}x{x.shape[-1]}  loss {mean:.4f}  lr {lr:.1e}", flush=True)
            logged = now
        if now - saved > 180:
            save(ema, args.out)
            saved = now
    save(ema, args.out)
    print(f"done: {step} steps, loss {mean:.4f}, {args.out}", flush=True)


if __name__ == "__main__":
    main()
