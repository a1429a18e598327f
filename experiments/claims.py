"""Claims of the five posts, each measured by two or more variants that differ in one thing alone.

    python experiments/claims.py list
    python experiments/claims.py run chroma_mask --seeds 3      goes on where a killed run stopped; no name: all
    python experiments/claims.py table                          writes the table into docs/claims.md

Every claim is a function below. It measures one variant with one seed; if it trains, for a number of steps. Networks
and budgets are small, so that one claim with one seed takes minutes. A row for each run is kept in
experiments/results/NAME.csv. What a variant changes is seen in its claim: an option, or a part of a file that is
replaced while it runs.

The rule, written down with each claim before its runs: a measure is lower for one variant than for another, or than a
number. It is *reproduced* if every seed of the one is lower than every seed of the other, *not reproduced* if every
seed is higher; otherwise it *cannot be told at this size*. Rules with a margin compare means only: *reproduced* if the
mean of the one is at most (1 + margin) x that of the other. A margin of 0.1 stands for "enough", one of -1/3 for "a
third less".

Distances of samples are from new faces, whose floor (other new faces, equally many) stands beside them: the Fréchet
distance in the features of experiments/features.py, and the sliced Wasserstein distance of unet_ddpm.py.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import http.server
import io
import json
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import common  # noqa: E402
import dit_t2i  # noqa: E402
import jit_lab  # noqa: E402
import serpentine_vae  # noqa: E402
import unet_ddpm  # noqa: E402

import bench  # noqa: E402
import emoji  # noqa: E402
from features import distances, new_faces  # noqa: E402

CPU, RUNS, RESULTS = torch.device("cpu"), Path("runs/claims"), ROOT / "experiments/results"
CLAIMS, LPIPS = {}, []  # LPIPS: the files of AlexNet and of its heads, if the user names them
NUM = 300  # pictures on either side of a distance


@dataclasses.dataclass
class Claim:
    measure: Callable  # (variant, seed, steps) -> {name: number}, the lower the better; None: a file is not here
    post: str
    text: str
    variants: tuple[str, ...]
    steps: int
    expected: tuple  # measure, variant that should be lower, variant(s) or number that should be higher, [margin]


def claim(post, text, variants, steps, expected):
    """Register the decorated function as the claim of its name."""

    def register(function):
        CLAIMS[function.__name__] = Claim(function, post, text, variants, steps, expected)
        return function

    return register


# ----------------------------------------------------------------------------------------------------------------
# Training, and what is measured on samples

# What all runs of a system have in common; the rest is the demo preset's.
BASE = {
    "jit_lab": dict(
        image_size=40, patch_size=4, hidden_size=128, depth=4, num_heads=2, lab_noise=(1, 1, 1), time_mean=-0.2,
        space="lab", predict="x", loss="v", color_weight=3, color_fraction=0.1, num_samples=10_000,
        full_image_prob=0.7, cfg=1,
    ),
    "unet_ddpm": dict(objective="flow", predict="eps", lr=2e-3, batch_size=16),
    "train-vae": dict(image_size=40, decoder="local"),
    "serpentine_vae": dict(
        image_size=80, num_samples=2000, vae=RUNS / "vae.safetensors", width=64, multipliers=(1, 2),
        depth=1, predict="eps", known_prob=0, num_timesteps=1000,
    ),
    "dit_t2i": dict(
        image_size=32, patch_size=4, depth=3, num_heads=2, text_dim=128, batch_size=32, num_samples=10_000,
        optimizer="adamw", time_mean=0, time_std=1, arch="dual", decay="linear",
    ),
}  # fmt: skip
MODULES = {"jit_lab": jit_lab, "unet_ddpm": unet_ddpm, "dit_t2i": dit_t2i}


def train(module, folder, *words, subcommand="train"):
    """Train by a file's own command line, without samples on the way, or go on with what is in the folder. Raises
    UserError if that fails."""
    resume = ["--resume"] if Path(folder, "state.safetensors").exists() else []
    with mock.patch.object(common, "MARKS", ()):
        failed = module.main([subcommand, "--out", str(folder), *map(str, words), *resume])
    if failed:
        raise common.UserError(f"the run in {folder} did not finish")


def trained(system, seed, steps, part="", **changes):
    """The run folder of a system trained with BASE but for `changes`. part: the name of a part of the file that was
    replaced, too. Claims that need the same run share it."""
    settings = {name: value for name, value in changes.items() if BASE[system].get(name) != value}
    told = [f"{name}-{value}" for name, value in settings.items() if name != "from"]
    folder = RUNS / "-".join(filter(None, [system, part, *told, str(seed), str(steps)])).replace(" ", "-")
    words = ["--steps", steps, "--seed", seed, "--no-compile"]
    for name, value in (BASE[system] | settings).items():
        words += [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else [value])]
    module = MODULES.get(system, serpentine_vae)
    train(module, folder, *words, subcommand="train-vae" if system == "train-vae" else "train")
    return folder


def shipped_vae():
    """Write the shipped VAE without its denoiser, which a replaced part would not fit, for BASE["serpentine_vae"]."""
    if not (RUNS / "vae.safetensors").exists():
        tensors, header = common.load_tensors(ROOT / "weights/serpentine_vae.safetensors")
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("vae.")}
        common.save_tensors(RUNS / "vae.safetensors", tensors, header)


def replaced(wanted, module, name, part):
    """Within this block, module.name is `part`, if `wanted`."""
    return mock.patch.object(module, name, part) if wanted else contextlib.nullcontext()


# ----------------------------------------------------------------------------------------------------------------
# Training a Waifu Diffusion Model (JiT in CIELAB): jit_lab.py, 0.9M parameters, painted faces of 40 pixels

JIT_STEPS = 1000


def jit(seed, steps, part="", **changes):
    """(model, config) after training."""
    return jit_lab.load_model(trained("jit_lab", seed, steps, part, **changes) / "model.safetensors", CPU)


def jit_distances(seed, steps, part="", **changes):
    """distances() of samples in 50 steps."""
    return distances(jit_lab.sample(*jit(seed, steps, part, **changes), NUM, 50, seed))


@claim("JiT, 2", "CIELAB beats RGB when 90 % of the pictures are monochrome", ("lab", "rgb"), JIT_STEPS,
       ("frechet", "lab", "rgb"))  # fmt: skip
def lab_or_rgb(variant, seed, steps):
    """The colour space of the model. Measured against faces in colour: grey samples are far from them."""
    return jit_distances(seed, steps, space=variant)


@claim("JiT, 2 and 5", "the mask keeps chroma clean of the monochrome pictures", ("mask", "no mask"), JIT_STEPS,
       ("chroma", "mask", "no mask"))  # fmt: skip
def chroma_mask(variant, seed, steps):
    """Without the mask the zero chroma of monochrome pictures is learned as if it were theirs. chroma: the mean
    difference of the samples' chroma from that of new faces."""
    batch = jit_lab.Dataset.batch

    def unmasked(self, *args):
        x, mask, top, left = batch(self, *args)
        return x, torch.ones_like(mask), top, left

    with replaced(variant == "no mask", jit_lab.Dataset, "batch", unmasked):
        return jit_distances(seed, steps, "" if variant == "mask" else "unmasked")


@claim("JiT, 3", "crops multiply a small data set (500 pictures)", ("crops", "full pictures"), JIT_STEPS,
       ("frechet", "crops", "full pictures"))  # fmt: skip
def crops(variant, seed, steps):
    """The post's crops (--full-image-prob 0.2) or none, at equal steps, in colour. Distances are from new faces, so a
    model that learned its 500 by heart would be far."""
    share = 0.2 if variant == "crops" else 1.0
    return jit_distances(seed, steps, num_samples=500, color_fraction=1, full_image_prob=share)


@claim("JiT, 3 and 4", "shifting RoPE to a crop's place keeps crops consistent", ("shifted", "RoPE not shifted",
       "embedding not shifted"), JIT_STEPS, ("error", "shifted", "RoPE not shifted", -0.01))  # fmt: skip
def shifted_rope(variant, seed, steps):
    """Error of the predicted crops, 16 pixels from the border of new faces, at t = 0.5, with the place withheld from
    RoPE, or from the absolute embedding. The first is exact: scores of RoPE depend on differences of places only."""
    model, config = jit(seed, steps)
    x, place = jit_lab.rgb_to_lab(new_faces("a", 64)[:, :, 16:, 16:]), 16 // config.patch_size
    x_t = common.flow_point(common.noise_for(range(len(x)), x.shape[1:], CPU), x, torch.full((len(x),), 0.5))
    shift, top = {"shifted": (0, place), "RoPE not shifted": (-place, place)}.get(variant, (place, 0))
    rope = common.rope_2d
    with mock.patch.object(common, "rope_2d", lambda positions, dim: rope(positions + shift, dim)):
        x_hat = model(x_t, 0.5, torch.zeros(len(x), dtype=torch.long), top, top)
    return {"error": (x_hat - x).square().mean().sqrt().item()}


@claim("JiT, 1", "30 to 50 sampling steps suffice", ("5", "10", "20", "30", "50", "100"), JIT_STEPS,
       ("frechet", "30", "100", 0.05))  # fmt: skip
def sampling_steps(variant, seed, steps):
    """Enough: at 30 steps at most 5 % farther from real faces than at 100."""
    return distances(jit_lab.sample(*jit(seed, steps), NUM, int(variant), seed))


@claim("JiT, 1 and 5", "predicting the picture beats predicting the velocity or the noise", ("x", "v", "eps"),
       JIT_STEPS, ("frechet", "x", ("v", "eps")))  # fmt: skip
def prediction(variant, seed, steps):
    """What the network outputs; the loss is that of the velocity for all. A patch has 48 numbers and a token 128, so
    the reason that JiT gives, patches of more numbers than a token, is absent here."""
    return jit_distances(seed, steps, predict=variant)


@claim("JiT, 5", "of the three losses it names, that of the velocity is the one to train with", ("v", "x", "printed"),
       JIT_STEPS, ("frechet", "v", ("x", "printed")))  # fmt: skip
def losses(variant, seed, steps):
    """v: the error of the velocity (x_hat - x_t) / (1 - t). x: that of x_hat, which is what the post's code comes to.
    printed: (x_hat - x_t) against x_1 - x_0, as the formula of Part 5 has it, without the division."""

    def printed(config, output, x_t, x, t, mask):
        t = t.view(-1, 1, 1, 1)
        noise = (x_t - t * x) / (1 - t).clamp(min=1e-3)
        return (((output - x_t) - (x - noise)).square() * mask).mean(dim=(1, 2, 3))

    with replaced(variant == "printed", jit_lab, "flow_loss", printed):
        part, loss = ("printed", "v") if variant == "printed" else ("", variant)
        return jit_distances(seed, steps, part, loss=loss)


@claim("JiT, 5", "taking pictures in colour three times as often helps", ("x 3", "x 1"), JIT_STEPS,
       ("frechet", "x 3", "x 1"))  # fmt: skip
def oversampling(variant, seed, steps):
    """One picture in ten is in colour. See also the chroma of the samples."""
    return jit_distances(seed, steps, color_weight=int(variant[-1]))


@claim("JiT, 5", "torch.compile makes training 1.5 to 2 times as fast", ("compiled", "eager"), 20,
       ("time", "compiled", "eager", -1 / 3))  # fmt: skip
def compiled(variant, seed, steps):
    """Median seconds of forward and backward passes of the demo's network, 32 pictures, after two to warm up."""
    config = common.make_config(jit_lab.Config, {}, jit_lab.PRESETS)
    torch.manual_seed(seed)
    model, durations = jit_lab.build_model(config), []
    config.compile = variant == "compiled"
    common.compile_blocks(config, CPU, model.blocks, dynamic=True)
    x, t, y = torch.randn(32, 3, 80, 80), torch.rand(32), torch.zeros(32, dtype=torch.long)
    for _ in range(2 + steps):
        start = time.perf_counter()
        with common.autocast(CPU, common.pick_precision("auto", CPU)):
            output = model(x, t, y)
        output.square().mean().backward()
        durations.append(time.perf_counter() - start)
    return {"time": statistics.median(durations[2:])}


@claim("JiT, 6", "samples are new pictures", ("100", "1000", "10000"), JIT_STEPS, ("copying", "10000", 1.1))
def novelty(variant, seed, steps):
    """Trained on so many pictures, in colour. Median distance of new faces from their nearest training picture, divided
    by that of samples: 1 if samples are as new as new faces are, large if they are copies."""
    model, config = jit(seed, steps, num_samples=int(variant), color_fraction=1)
    pictures = common.load_pictures(config.data, config.image_size, first=config.num_samples).pictures
    made, found = jit_lab.sample(model, config, 64, 50, seed), {}
    metrics = {"copying": jit_lab.pixel_features} | ({"copying LPIPS": common.Lpips.load(*LPIPS)} if LPIPS else {})
    for name, metric in metrics.items():
        new, ours = (jit_lab.nearest(metric, rgb, pictures)[0].median().item() for rgb in (new_faces("a", 64), made))
        found[name] = new / ours
    return found


# ----------------------------------------------------------------------------------------------------------------
# Toy-Diffusion: unet_ddpm.py

OBJECTIVES = "flow", "ddpm", "ddpm-v"  # flow matching, DDPM, and DDPM that predicts v, which the write-up does not have


def compared(variant, seed, steps):
    """The row of one objective in the compare.csv of `unet_ddpm.py compare`, which trains all three."""
    path = RUNS / f"compare-{seed}-{steps}" / "compare.csv"
    words = ["compare", "--out", str(path.parent), "--steps", str(steps), "--seed", str(seed), "--no-compile"]
    if not path.exists() and unet_ddpm.main(words):
        raise common.UserError(f"the runs in {path.parent} did not finish")
    row = next(row for row in reversed(list(csv.DictReader(path.open()))) if row["objective"] == variant)
    return {name: float(row[name]) for name in ("distance", "finest_level", "floor")}


@claim("Toy-Diffusion", "flow matching has the lower distance to the training samples", OBJECTIVES, 2000,
       ("distance", "flow", "ddpm"))  # fmt: skip
def flow_distance(variant, seed, steps):
    """Sliced Wasserstein distance of 256 samples in 50 steps from training pictures, as the write-up's FID is."""
    return compared(variant, seed, steps)


@claim("Toy-Diffusion", "flow matching is sharper", OBJECTIVES, 2000, ("finest_level", "flow", "ddpm"))
def flow_sharpness(variant, seed, steps):
    """The finest level of the pyramid alone: lines and edges. The runs are those of flow_distance."""
    return compared(variant, seed, steps)


def unet(variant):
    """The options of unet_ddpm.py for one of OBJECTIVES."""
    return dict(objective=variant[:4], predict="v" if variant == "ddpm-v" else "eps")


def unet_distances(folder):
    """(the trained run, its unet_ddpm.Distances from the pictures that it learned)."""
    run = unet_ddpm.Trained(folder / "model.safetensors", unet_ddpm.CompareConfig(num=NUM // 2))
    return run, run.distances()


@claim("Toy-Diffusion", "flow matching adapts faster to what was left out", OBJECTIVES, 400,
       ("left", "flow", "ddpm"))  # fmt: skip
def flow_adapts(variant, seed, steps):
    """Trained without the faces with red hair, then for a twentieth of the steps on these alone. The part that is left
    of the distance from them, above its floor."""
    base = trained("unet_ddpm", seed, steps, stage="exclude", exclude_tags=("red hair",), **unet(variant))
    start = {"stage": "finetune", "from": base, "lr": 5e-4}
    tuned = trained("unet_ddpm", seed, max(2, steps // 20), f"tuned-{variant}-{steps}", **start)
    run, near = unet_distances(tuned)
    after = near(run.sample(near.num, 20))["distance"]
    common.load_into(run.model, common.load_tensors(base)[0], base)
    before, floor = near(run.sample(near.num, 20))["distance"], near.floor["distance"]
    return {"left": (after - floor) / (before - floor), "before": before, "after": after, "floor": floor}


@claim("Toy-Diffusion", "DDPM is more robust for pre-training", OBJECTIVES, 200, ("worst", "ddpm", "flow"))
def ddpm_sturdier(variant, seed, steps):
    """Three learning rates: the demo's, a quarter and four times of it. The largest of the three distances, and their
    spread, the largest divided by the least."""
    found = []
    for lr in (5e-4, 2e-3, 8e-3):
        run, near = unet_distances(trained("unet_ddpm", seed, steps, lr=lr, **unet(variant)))
        found.append(near(run.sample(near.num, 20))["distance"])
    return {"worst": max(found), "spread": max(found) / min(found), "floor": near.floor["distance"]}


@claim("Toy-Diffusion", "flow matching maps noise to pictures deterministically, DDPM does not", ("flow", "ddim",
       "ancestral"), 10, ("difference", "flow", "ancestral"))  # fmt: skip
def deterministic(variant, seed, steps):
    """Two samplings from the same noise with the shipped weights, root mean square difference. ddim and ancestral use
    the same DDPM weights: it is the sampler that decides."""
    file = "unet_ddpm" if variant == "flow" else "unet_ddpm_ddpm"
    model, config = unet_ddpm.load_model(ROOT / f"weights/{file}.safetensors")
    (channels, side), made = model.header["latent"], []
    x = common.noise_for(range(4 * seed, 4 * seed + 4), (channels, side, side), CPU)
    for number in range(2):
        rng = common.generator(seed, number, 9)

        def network(x, t):
            return model(x, torch.full((len(x),), float(t)))

        if variant == "flow":
            made.append(unet_ddpm.flow_sample(network, x, steps))
        else:
            noise_fn = functools.partial(torch.randn, x.shape, generator=rng)
            made.append(unet_ddpm.ddpm_sample(config, network, x, steps, noise_fn, variant))
    return {"difference": (made[0] - made[1]).square().mean().sqrt().item()}


# ----------------------------------------------------------------------------------------------------------------
# Diffusion (serpentine DDPM): serpentine_vae.py


def vae_of(seed, steps, part="", **changes):
    """A VAE of 40-pixel faces after training."""
    return serpentine_vae.load_model(trained("train-vae", seed, steps, part, **changes))[0].vae


def vae_errors(vae):
    """Reconstructions of new faces. error: root mean square; detail: the part of the energy of the finest pyramid
    level, edges and lines, that is missing or wrong: 0 for a perfect and 1 for a very blurred picture."""
    rgb = new_faces("a", 100)
    remade = serpentine_vae.decode(vae, serpentine_vae.encode(vae, 2 * rgb - 1))
    fine, ours = (unet_ddpm.laplacian_pyramid(x)[0] for x in (rgb, remade))
    detail = (ours - fine).square().mean() / fine.square().mean()
    return {"error": (remade - rgb).square().mean().sqrt().item(), "detail": detail.item()}


@claim("Diffusion", "its decoder leaks less between pixels", ("local", "global", "taef2"), 600,
       ("outside the tile", "local", ("global", "taef2")))  # fmt: skip
def decoder_leaks(variant, seed, steps):
    """Parts of the change by one disturbed latent position that lie outside its tile, and beyond 8 pixels. global:
    Stable Diffusion's decoder with as many parameters. taef2: FLUX.2's tiny one, from data/taef2, if it is there."""
    if variant == "taef2" and not Path("data/taef2").exists():
        return None
    taef2 = variant == "taef2"
    vae = serpentine_vae.PublishedVAE("data/taef2", CPU) if taef2 else vae_of(seed, steps, decoder=variant)
    *_, outside, far = serpentine_vae.leakage(vae, 2 * new_faces("a", 64, 80)[16 * seed :] - 1)
    return {"outside the tile": outside, "beyond 8 pixels": far}


@claim("Diffusion", "its decoder blurs less at equal steps", ("local", "global"), 600, ("detail", "local", "global"))
def less_blur(variant, seed, steps):
    """The VAEs of decoder_leaks. See vae_errors()."""
    return vae_errors(vae_of(seed, steps, decoder=variant))


@claim("Diffusion", "Squeeze-and-Excitation helps the latents without cost to locality", ("SE", "no SE"), 600,
       ("error", "SE", "no SE"))  # fmt: skip
def se_context(variant, seed, steps):
    """error of reconstructions; outside: leakage of the decoder; context: how much a latent position changes, in its
    standard deviations, if everything more than 16 pixels from its tile, the reach of the encoder's convolutions, is
    another face's."""
    with replaced(variant == "no SE", serpentine_vae, "SqueezeExcite", lambda width: nn.Identity()):
        vae = vae_of(seed, steps, "" if variant == "SE" else "no-se")
    x = 2 * new_faces("a", 64, 80) - 1
    other = x.roll(1, dims=0)
    other[:, :, 24:64, 24:64] = x[:, :, 24:64, 24:64]
    one, two = (serpentine_vae.encode(vae, part) for part in (x, other))
    context = (one - two)[:, :, 5, 5].square().mean().sqrt() / one[:, :, 5, 5].std()
    return vae_errors(vae) | {"context": context.item(), "outside": serpentine_vae.leakage(vae, x)[3]}


SERPENTINES = {"serpentine": serpentine_vae.Serpentine, "attention": bench.Attention, "none": nn.Identity}


@claim("Diffusion", "a serpentine costs less than full self-attention", ("serpentine", "attention"), 10,
       ("time", "serpentine", "attention"))  # fmt: skip
def scan_cheaper(variant, seed, steps):
    """Median seconds, forward and backward, for one map of 64 x 64, width 128, and the most bytes of tensors meanwhile.
    `python experiments/bench.py serpentine` has other sizes."""
    torch.manual_seed(seed)
    layer, durations = SERPENTINES[variant](128), []
    x = torch.randn(1, 128, 64, 64).to(memory_format=torch.channels_last).requires_grad_()

    def once():
        start = time.perf_counter()
        with common.autocast(CPU, common.pick_precision("auto", CPU)):
            layer(x).float().square().sum().backward()
        durations.append(time.perf_counter() - start)

    for _ in range(2 + steps):
        once()
    return {"time": statistics.median(durations[2:]), "MiB": bench.peak_bytes(once) / 2**20}


@claim("Diffusion", "the scan sees further than convolutions alone", ("serpentine", "attention", "none"), 800,
       ("error", "serpentine", "none"))  # fmt: skip
def scan_sees_further(variant, seed, steps):
    """A denoiser at one resolution, whose convolutions reach 6 positions, on maps of 10 x 10: with its serpentines,
    with attention in their place, with nothing. Mean square error of the predicted noise in latents of new faces at
    eight steps; reach: the part of a 32 x 32 map that the middle of the output depends on."""
    shipped_vae()
    with replaced(True, serpentine_vae, "Serpentine", SERPENTINES[variant]):
        folder = trained("serpentine_vae", seed, steps, variant, multipliers=(1,))
        model, config = serpentine_vae.load_model(folder)
    with torch.no_grad():
        latent = model.vae.normalise(serpentine_vae.encode(model.vae, 2 * new_faces("a", 64, 80) - 1))
    noise, errors = common.noise_for(range(len(latent)), latent.shape[1:], CPU), []
    for i in range(8):
        t = round((i + 0.5) / 8 * config.num_timesteps)
        x_t = serpentine_vae.add_noise(latent, noise, serpentine_vae.noise_schedule(config.num_timesteps)[t])
        with torch.no_grad():
            errors.append((model.denoiser(x_t, torch.full((len(x_t),), float(t))) - noise).square().mean().item())
    wide = torch.randn(1, latent.shape[1], 32, 32, generator=common.generator(seed)).requires_grad_()
    model.denoiser(wide, torch.full((1,), 500.0))[:, :, 16, 16].sum().backward()
    reach = (wide.grad.abs().sum(dim=1) > 0).float().mean().item()
    return {"error": statistics.mean(errors), "reach": reach}


@claim("Diffusion", "batch 32 fits into about 5 GB", ("batch 32",), 1, ("GiB", "batch 32", 5.0))
def memory(variant, seed, steps):
    """Bytes of tensors in an optimizer step of the paper preset's denoiser (256 pixels, bf16), counted on the CPU for 4
    and 8 pictures and continued to 32 (below 4 the largest moment is another one, that of the weights' gradients); with
    weights, gradients, AdamW's moments and averages. The post's sizes are not known. `python experiments/bench.py
    memory` counts all 32."""
    config = common.make_config(serpentine_vae.Config, {"preset": "paper"}, serpentine_vae.PRESETS)
    model, peaks = serpentine_vae.build_denoiser(config), []
    for batch in (4, 8):
        x, t = torch.randn(batch, config.channels, 32, 32), torch.rand(batch) * 999

        def once(x=x, t=t):
            with common.autocast(CPU, "bf16"):
                output = model(x, t)
            output.square().mean().backward()

        peaks.append(bench.peak_bytes(once))
        model.zero_grad()
    weights = sum(p.numel() for p in model.parameters())
    # The peaks contain the gradients; 16 bytes: weight, two moments and average.
    return {"GiB": (peaks[0] + 28 * (peaks[1] - peaks[0]) / 4 + 16 * weights) / 2**30}


@claim("Diffusion", "what is kept in inpainting is preserved exactly", ("latents", "pixels", "pixels, --composite"), 4,
       ("difference", "pixels", 1 / 510))  # fmt: skip
def kept_exact(variant, seed, steps):
    """Largest difference at what the mask keeps, with the shipped weights, four steps, of the latents, and of pixels in
    [0, 1]; half a step of 8 bits would not be seen. Of the latents the claim is exact; pixels pass the VAE."""
    model, config = serpentine_vae.load_model(ROOT / "weights/serpentine_vae.safetensors")
    x, keep = 2 * new_faces("a", 4, 80)[seed : seed + 1] - 1, torch.ones(80, 80)
    keep[16:64, 16:64] = 0
    settings = dict(num=1, steps=steps, seed=seed, composite=variant.endswith("composite"))
    latents, rgb = serpentine_vae.inpaint(model, config, x, keep, **settings)
    if variant == "latents":
        clean, positions = serpentine_vae.encode(model.vae, x), serpentine_vae.keep_positions(keep)
        return {"difference": ((latents - clean) * positions).abs().max().item()}
    return {"difference": ((rgb - (x / 2 + 0.5)) * keep).abs().max().item()}


@functools.cache
def cosine_schedule(num_timesteps):
    """abar_t of Nichol & Dhariwal 2021, eq. 17, for t = 0 to num_timesteps."""
    angles = (torch.arange(num_timesteps + 1) / num_timesteps + 0.008) / 1.008 * math.pi / 2
    return (angles.cos() / angles[0].cos()).square().clamp(min=4e-5)


@claim("Diffusion", "the gentle linear schedule suffices", ("linear", "cosine", "linear, 200 steps",
       "linear, 100 steps"), 800, ("frechet", "linear", "cosine", 0.1))  # fmt: skip
def gentle_schedule(variant, seed, steps):
    """Enough: at most 10 % farther from real faces than with the cosine schedule. With 200 or 100 steps of the same
    betas the last one is not yet noise, from which sampling starts. Samples in 50 DDIM steps."""
    shipped_vae()
    count = 1000 if variant in ("linear", "cosine") else int(variant.split()[1])
    with replaced(variant == "cosine", serpentine_vae, "noise_schedule", cosine_schedule):
        part = "cosine" if variant == "cosine" else ""
        model, config = serpentine_vae.load_model(trained("serpentine_vae", seed, steps, part, num_timesteps=count))
        return distances(serpentine_vae.sample(model, config, num=NUM, steps=50, seed=seed))


# ----------------------------------------------------------------------------------------------------------------
# Diffusion from Scratch, and re-diffusion: dit_t2i.py, about 1M parameters, painted scenes of 32 pixels

TIMES = [(i + 0.5) / 8 for i in range(8)]
DIT_STEPS = 1000


@torch.no_grad()
def picture_errors(model, config, num=128, size=None):
    """Mean squared error of the predicted picture, z_t - t v, on `num` held-out pictures at eight times t; always with
    the same noise. size: the same pictures, painted so large [as trained]."""
    data = dit_t2i.TrainingData(config, CPU, "fp32", model.header)
    sums, index = dict.fromkeys(TIMES, 0.0), data.held_out[:num]
    num = len(index)
    for first in range(0, num, 32):
        rows = slice(first, min(first + 32, num))
        x, text = data.load(index[rows], common.BatchRng(num, 0, 0, 3, rows=rows))
        if size:
            x = common.picture_tensor([np.asarray(common.paint_scene(i, size)[0]) for i in index[rows]]) / 127.5 - 1
        noise = common.BatchRng(num, 0, 0, 4, rows=rows).randn(*x.shape[1:])
        for t in TIMES:
            z_t = common.flow_point(x, noise, torch.full((len(x),), t))
            x_hat = z_t - t * model(z_t, torch.full((len(x),), t), text)
            sums[t] += (x_hat - x).square().mean(dim=(1, 2, 3)).sum().item() / num
    return {"error": statistics.mean(sums.values())} | {f"t = {t:.2f}": error for t, error in sums.items()}


def scene_distance(model, config, seed):
    """Sliced Wasserstein distance of samples for held-out captions, without guidance, from the pictures of these."""
    data = dit_t2i.TrainingData(config, CPU, "fp32", model.header)
    index = data.held_out[: NUM // 2]
    real, captions = data.source.read(index)
    made = dit_t2i.sample(model, config, captions, cfg=1, steps=28, seed=seed, seed_stride=1)
    return {"wasserstein": statistics.mean(unet_ddpm.sliced_wasserstein(real / 2 + 0.5, made))}


def dit(seed, steps, part="", **changes):
    """(model, config) after training."""
    return dit_t2i.load_model(trained("dit_t2i", seed, steps, part, **changes) / "model.safetensors", CPU)


class OpenGates(dit_t2i.DiT):
    """Gates that are 1 at first, in place of 0."""

    def initialize_weights(self):
        super().initialize_weights()
        for mod in (mod for layer in self.layers for mod in (layer.vis_mod, layer.txt_mod)):
            for gate in mod[1].bias.data.chunk(6)[2::3]:
                gate.fill_(1.0)


class RandomModulation(dit_t2i.DiT):
    """AdaLN whose weights are random at first, as other linear layers' are, in place of 0."""

    def initialize_weights(self):
        super().initialize_weights()
        for mod in (mod for layer in self.layers for mod in (layer.vis_mod, layer.txt_mod)):
            nn.init.xavier_uniform_(mod[1].weight)


def steadiness(folder):
    """gradient: the largest gradient norm in log.csv, before clipping; the mean of ten steps each."""
    return {"gradient": max(float(row["grad_norm"]) for row in common.read_log(folder))}


@claim("Diffusion from Scratch", "gates that start at zero keep early training stable", ("zero", "open"), 300,
       ("error", "zero", "open"))  # fmt: skip
def zero_gates(variant, seed, steps):
    """The error after a short training; see also the largest gradient."""
    part = "" if variant == "zero" else "open-gates"
    with replaced(variant == "open", dit_t2i, "DiT", OpenGates):
        folder = trained("dit_t2i", seed, steps, part)
        return picture_errors(*dit_t2i.load_model(folder / "model.safetensors", CPU)) | steadiness(folder)


@claim("Diffusion from Scratch", "positions centred at the origin help at a higher resolution", ("centred", "corner"),
       DIT_STEPS, ("error at 64 pixels", "centred", "corner"))  # fmt: skip
def centred_positions(variant, seed, steps):
    """Trained at 32 pixels, measured at 64. Only the fixed embedding that this file adds differs: RoPE's scores depend
    on differences of positions, and the text moves along with the image, so that its centre changes nothing (exact)."""

    def corner(height, width, dim, device):
        return common.sincos_2d(torch.cartesian_prod(torch.arange(height), torch.arange(width)), dim)

    with replaced(variant == "corner", dit_t2i, "grid_embedding", corner):
        model, config = dit(seed, steps, "" if variant == "centred" else "corner")
        found = {"error at 64 pixels": picture_errors(model, config, size=64)["error"]}
        return found | {"error": picture_errors(model, config)["error"]}


@claim("Diffusion from Scratch", "logit-normal times help", ("logit-normal", "uniform"), DIT_STEPS,
       ("wasserstein", "logit-normal", "uniform"))  # fmt: skip
def logit_normal(variant, seed, steps):
    """Measured on samples, because the mean error over even times would favour even times."""

    def uniform(config, rng, time_min, progress):
        return time_min + (1 - time_min) * rng.rand()

    with replaced(variant == "uniform", dit_t2i, "sample_times", uniform):
        model, config = dit(seed, steps, "uniform" if variant == "uniform" else "")
    return scene_distance(model, config, seed) | picture_errors(model, config)


@functools.cache
def guided(variant, seed, steps):
    """Four samples each for sixteen prompts with the shipped weights, in `steps` steps of dpm."""
    model, config = dit_t2i.load_model(ROOT / "weights/dit_t2i.safetensors", CPU)
    prompts = [f"a {colour} {thing}" for colour in emoji.HUES for thing in ("car", "fish")]
    settings = dict(cfg=float(variant), steps=steps, solver="dpm", seed=1000 * seed, seed_stride=4)
    return dit_t2i.sample(model, config, prompts, 4, **settings)


GUIDANCE = "1", "2", "4", "8"


@claim("Diffusion from Scratch", "higher guidance: closer to the prompt", GUIDANCE, 14, ("off", "4", "1"))
def guidance_closer(variant, seed, steps):
    """The part of the colour in a picture, pixels weighted by chroma, whose hue is more than 1/16 of the circle away
    from the one that the prompt names."""
    turn, chroma = emoji.hue(guided(variant, seed, steps))
    asked = emoji.hue(emoji.rgb_of(emoji.HUES))[0].flatten().repeat_interleave(8).view(-1, 1, 1)
    away, weight = (turn - asked).abs(), chroma * (chroma > 0.15)
    return {"off": (weight * (torch.minimum(away, 1 - away) > 1 / 16)).sum().item() / weight.sum().item()}


@claim("Diffusion from Scratch", "higher guidance: less diverse", GUIDANCE, 14, ("diversity", "4", "1"))
def guidance_diversity(variant, seed, steps):
    """Mean distance (jit_lab.pixel_features) between the four samples of a prompt."""
    parts = jit_lab.pixel_features(guided(variant, seed, steps)).unflatten(0, (-1, 4))
    return {"diversity": (torch.cdist(parts, parts).sum(dim=(1, 2)) / 12).mean().item()}


@claim("re-diffusion, 4.3", "AdaLN-Zero steadies training", ("zero", "random"), 300, ("gradient", "zero", "random"))
def adaln_zero(variant, seed, steps):
    """The largest gradient norm, for "reduced gradient explosion"; see also the error after a short training."""
    part = "" if variant == "zero" else "random-modulation"
    with replaced(variant == "random", dit_t2i, "DiT", RandomModulation):
        folder = trained("dit_t2i", seed, steps, part, arch="joint")
        return steadiness(folder) | picture_errors(*dit_t2i.load_model(folder / "model.safetensors", CPU))


@claim("re-diffusion, 4.4", "symmetric attention beats asymmetric attention to the text", ("joint", "asymmetric"),
       DIT_STEPS, ("error", "joint", "asymmetric"))  # fmt: skip
def joint_attention(variant, seed, steps):
    """asymmetric: in every layer, as else in the last, image tokens read the text, and text tokens stay as they are."""
    layer = dit_t2i.DualStreamLayer
    with replaced(variant == "asymmetric", dit_t2i, "DualStreamLayer", lambda h, d, last, mlp: layer(h, d, True, mlp)):
        return picture_errors(*dit(seed, steps, "" if variant == "joint" else "asymmetric", arch="joint"))


@claim("re-diffusion, 5", "an exponential moving average of the weights helps", ("averaged", "last"), DIT_STEPS,
       ("error", "averaged", "last"))  # fmt: skip
def ema(variant, seed, steps):
    """Of one run each, at a constant learning rate: its averaged weights, and those of its last step."""
    model, config = dit(seed, steps, arch="joint", decay="none")
    if variant == "last":
        path = trained("dit_t2i", seed, steps, arch="joint", decay="none") / "state.safetensors"
        tensors, _ = common.load_tensors(path)
        last = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        common.load_into(model, last, path)
    return picture_errors(model, config) | scene_distance(model, config, seed)


@claim("re-diffusion, 6", "training scales linearly with the number of processes", ("1", "2"), 60,
       ("time", "2", "1", -0.45))  # fmt: skip
def linear_scaling(variant, seed, steps):
    """Seconds for 1,000 pictures: one process on one core, or two on two (needs two free cores, Linux). Linear would be
    half the time; the rule asks for at most 0.55 of it. Not measured on GPUs."""
    program = "import sys, common, dit_t2i; common.MARKS = (); sys.exit(dit_t2i.main(sys.argv[1:]))"
    folder = RUNS / f"scaling-{variant}-{seed}-{steps}"
    words = f"train --steps {steps} --batch-size 64 --seed {seed} --no-compile --num-samples 1000 --image-size 32"
    words += f" --patch-size 4 --depth 4 --optimizer adamw --out {folder}" + " --resume" * folder.exists()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WORLD_SIZE": variant}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    cores, jobs = sorted(os.sched_getaffinity(0)), []
    for rank in range(int(variant)):
        pin = functools.partial(os.sched_setaffinity, 0, {cores[rank % len(cores)]})
        env = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        jobs.append(subprocess.Popen([sys.executable, "-c", program, *words.split()], env=env, preexec_fn=pin))
    if max([job.wait() for job in jobs]):
        raise common.UserError("a process of linear_scaling failed")
    speeds = [float(row["images_per_second"]) for row in common.read_log(folder)]
    return {"time": 1000 / statistics.median(speeds)}


@claim("re-diffusion, 6", "training is robust to failed URL fetches", ("failing", "sound"), 64,
       ("lost", "failing", 0.5))  # fmt: skip
def failed_fetches(variant, seed, steps):
    """Good pictures that a pass over `steps` rows does not give, if the server fails at a quarter of the others.
    `pytest tests/test_stream.py` has eight ways to fail."""
    bad = set(random.Random(seed).sample(range(steps), steps // 4)) if variant == "failing" else set()
    common.paint_face(0, 16)[0].save(content := io.BytesIO(), "PNG")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(500 if int(self.path[1:]) in bad else 200)
            self.end_headers()
            self.wfile.write(content.getvalue())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        rows = [{"url": f"http://127.0.0.1:{server.server_port}/{i}", "caption": f"face {i}"} for i in range(steps)]
        common.save_text(RUNS / "rows.jsonl", "\n".join(map(json.dumps, rows)))
        config = dit_t2i.Config(stream=str(RUNS / "rows.jsonl"), private_hosts=True, image_size=16, batch_size=8)
        stream = dit_t2i.Stream(config)
        stream.prefetch(steps - len(bad))
        given = set(stream.read(range(steps - len(bad)))[1])
        stream.close()
        server.shutdown()
    return {"lost": steps - len(bad) - len(given)}


@claim("re-diffusion", "its joint architecture learns faster than the dual one of Diffusion from Scratch (our "
       "question)", ("joint", "dual"), 240, ("error", "joint", "dual"))  # fmt: skip
def joint_or_dual(variant, seed, steps):
    """Painted scenes, the demo preset, but 64 pictures a step; 14.9M (joint) and 14.6M parameters (dual)."""
    folder = RUNS / "joint_or_dual" / f"{variant}-{seed}-{steps}"
    train(dit_t2i, folder, "--arch", variant, "--batch-size", 64, "--steps", steps, "--seed", seed)
    return picture_errors(*dit_t2i.load_model(folder / "model.safetensors", CPU))


# ----------------------------------------------------------------------------------------------------------------
# Running them, and the table


def rows_of(name):
    """The rows of a claim's results."""
    path = RESULTS / f"{name}.csv"
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def run(name, seeds, steps=None):
    """Measure all variants of a claim with the seeds 0 to seeds - 1, but for those whose rows are there."""
    entry, rows = CLAIMS[name], rows_of(name)
    steps = steps or entry.steps
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    for seed in range(seeds):
        for variant in entry.variants:
            if any((row["variant"], row["seed"], row["steps"]) == (variant, str(seed), str(steps)) for row in rows):
                continue
            start = time.perf_counter()
            measured = entry.measure(variant, seed, steps)
            if measured is None:
                print(f"{name}: {variant} needs files that are not here")
                continue
            row = {"variant": variant, "seed": seed, "steps": steps}
            row |= {key: f"{value:.5g}" for key, value in measured.items()}
            row |= {"seconds": f"{time.perf_counter() - start:.0f}", "torch": torch.__version__}
            rows.append(row | {"commit": commit.stdout.strip()})
            names = dict.fromkeys(name for row in rows for name in row)
            lines = csv.DictWriter(text := io.StringIO(), names, lineterminator="\n")
            lines.writeheader()
            lines.writerows(rows)
            common.save_text(RESULTS / f"{name}.csv", text.getvalue())


def verdict(name, rows):
    """(text for each variant "mean ± standard deviation", the verdict by the rule above)."""
    (measure, low, high, *margin), spread = CLAIMS[name].expected, {}
    values = {v: [float(row[measure]) for row in rows if row["variant"] == v] for v in CLAIMS[name].variants}
    for v, x in values.items():
        if x:
            spread[v] = f"{statistics.mean(x):.4g}" + (f" ± {statistics.stdev(x):.2g}" if len(x) > 1 else "")
    names = high if isinstance(high, tuple) else (high,)
    lows, others = values[low], [x for name in names for x in values.get(name, 2 * [name])]  # name: perhaps a number
    if min(len(lows), len(others)) < 2:
        return spread, "open: too few seeds"
    if margin:
        enough = statistics.mean(lows) <= (1 + margin[0]) * statistics.mean(others)
        return spread, "reproduced" if enough else "not reproduced"
    if max(lows) < min(others):
        return spread, "reproduced"
    return spread, "not reproduced" if min(lows) > max(others) else "cannot be told at this size: the seeds overlap"


def rule(entry):
    """A claim's rule in a few words; variants are in `marks`, because some of their names are numbers."""
    measure, low, high, *margin = entry.expected
    names = high if isinstance(high, tuple) else (high,)
    high = ", ".join(f"`{name}`" if isinstance(name, str) else f"{name:.3g}" for name in names)
    return f"{measure}: `{low}` below {f'{1 + margin[0]:.2f} x ' if margin else ''}{high}"


def table():
    """Put a table of all claims between the two marks in docs/claims.md."""
    lines = ["| claim (`name`) | rule | steps, seeds | figures | verdict |", "|---|---|---|---|---|"]
    for name, entry in CLAIMS.items():
        rows = [row for row in rows_of(name) if row["steps"] == str(entry.steps)]
        spread, says = verdict(name, rows)
        figures = ", ".join(f"`{v}` {text}" for v, text in spread.items())
        seeds = min(sum(row["variant"] == variant for row in rows) for variant in entry.variants)
        claimed, steps = f"{entry.post}: {entry.text} (`{name}`)", f"{entry.steps}, {seeds}"
        cells = claimed, rule(entry), steps, figures, says
        lines.append("| " + " | ".join(cells) + " |")
    path, marks = ROOT / "docs/claims.md", ("<!-- table: begin -->", "<!-- table: end -->")
    before, rest = path.read_text("utf-8").split(marks[0])
    path.write_text("\n".join((before + marks[0], *lines, marks[1] + rest.split(marks[1])[1])), "utf-8")


def main(argv=None):
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("list", "run", "table"))
    parser.add_argument("names", nargs="*", choices=[*CLAIMS, []], help="claims (default: all, short ones first)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, help="steps in place of a claim's own")
    parser.add_argument("--lpips", nargs=2, default=[], help="for novelty: the files of AlexNet and of LPIPS' heads")
    options = parser.parse_args(argv)
    LPIPS[:] = options.lpips
    for name in options.names or sorted(CLAIMS, key=lambda name: CLAIMS[name].steps * len(CLAIMS[name].variants)):
        if options.command == "run":
            run(name, options.seeds, options.steps)
        if options.command == "list":
            entry, done = CLAIMS[name], len(rows_of(name))
            print(f"{name}: {entry.text} ({entry.post}; {rule(entry)}; {entry.steps} steps, {done} runs done)")
    if options.command == "table":
        table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
