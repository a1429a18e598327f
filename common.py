"""What the systems share: mathematics (position embeddings, attention, rectified flow, DDPM), autoencoders, what every
training program needs (options, devices, processes, checkpoints, pictures, run folders), and painted pictures.
`python common.py` trains and draws the smallest diffusion model, which is at the end.

Shape letters: B batch, C channels, H W height and width, N tokens, D width, h heads.
"""

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import csv
import ctypes
import dataclasses
import functools
import hashlib
import html
import io
import itertools
import json
import math
import multiprocessing
import os
import queue
import random
import re
import shutil
import signal
import sys
import tarfile
import time
import typing
import unicodedata
import zlib
from pathlib import Path

# How long OpenMP's threads spin at a barrier before they sleep. Beside other work on the same cores, its default lets a
# training step wait for a thread whose core is taken. torch reads this when it is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageCms, ImageColor, ImageDraw, ImageFont, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------
# Positions and time


def timestep_embedding(t, dim):
    """Timesteps or positions t of any shape -> t.shape + (dim,): cosines, then sines, at dim/2 frequencies that fall
    geometrically from 1 to 1/10,000 (Vaswani et al. 2017, section 3.5). Always float32: bfloat16 would merge
    neighbouring timesteps. The caller gives t at the scale that its source uses."""
    exponent = torch.arange(dim // 2, device=t.device, dtype=torch.float32) / (dim // 2)
    angles = t.float()[..., None] * 10_000.0**-exponent
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def sincos_2d(positions, dim):
    """Fixed embedding of tokens at `positions` (N, 2): (N, dim), first half the row, second half the column."""
    return timestep_embedding(positions, dim // 2).flatten(1)


def rope_2d(positions, head_dim):
    """Rotary tables of tokens at `positions` (N, 2): cosines and sines, each (N, head_dim/2). The first half of the
    angles follows the row, the second the column (two-dimensional RoFormer, Su et al. 2021, eq. 34)."""
    return tuple(table.flatten(1) for table in timestep_embedding(positions, head_dim // 2).chunk(2, dim=-1))


def apply_rope(x, rope):
    """Rotate the channel pairs (0, 1), (2, 3), ... of x (..., N, head_dim) by the angles of `rope`, two tables
    (N, head_dim/2): (x0, x1) -> (x0 cos - x1 sin, x0 sin + x1 cos). The product q.k of two rotated vectors then depends
    only on the difference of their positions (Su et al. 2021, eq. 16)."""
    cos, sin = (table.to(x.dtype) for table in rope)
    x0, x1 = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), dim=-1).flatten(-2)


# ----------------------------------------------------------------------------------------------------------------
# Transformer parts


class TimestepEmbedder(nn.Module):
    """(B,) times -> (B, width): the sinusoid of scale * t, then a two-layer MLP."""

    def __init__(self, width, scale=1.0):
        super().__init__()
        self.scale = scale
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        return self.mlp(timestep_embedding(self.scale * t.float(), 256).to(self.mlp[0].weight.dtype))


def modulate(x, shift, scale):
    """AdaLN: x (1 + scale) + shift for x (B, N, D); shift and scale (B, D) (Peebles & Xie 2022, section 3.2)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def zero_init(module):
    """Set all parameters of a module to zero, so that the residual block it ends starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v for (B, h, N, d); every token attends to every token. On a CPU in bfloat16 the two
    plain products are two to five times as fast as torch's fused kernel (`python experiments/bench.py attention`)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


# ----------------------------------------------------------------------------------------------------------------
# Rectified flow: a straight line from `start` (t = 0) to `end` (t = 1). Each file states which end is noise.


def flow_point(start, end, t):
    """x_t = (1 - t) start + t end; t (B,) in [0, 1] (Liu et al. 2022, eq. 1)."""
    t = t.view(-1, *[1] * (start.dim() - 1))
    return (1 - t) * start + t * end


def integrate(step, x, times, callback):
    """x <- step(x, t, t_next) along `times`. callback(x, t), if given, gets all states, the first and last included."""
    callback = callback or (lambda x, t: None)
    for t, t_next in progress(itertools.pairwise(times), "steps"):
        callback(x, t)
        x = step(x, t, t_next)
    callback(x, times[-1])
    return x


def flow_euler(velocity, x, times, callback=None):
    """Integrate dx/dt = velocity(x, t) along `times` (floats, rising or falling) with Euler steps. velocity takes the
    state and a float; for callback see integrate()."""
    return integrate(lambda x, t, t_next: x + (t_next - t) * velocity(x, t), x, times, callback)


def flow_heun(velocity, x, times, callback=None):
    """As flow_euler, with Heun's second-order steps, which take the mean of the velocities at both ends (Karras et al.
    2022, algorithm 1). The last step is an Euler step: of a network that predicts the data, the velocity is the way to
    the data divided by the time left, at the end 0 / 0."""

    def step(x, t, t_next):
        v = velocity(x, t)
        if t_next != times[-1]:
            v = (v + velocity(x + (t_next - t) * v, t_next)) / 2
        return x + (t_next - t) * v

    return integrate(step, x, times, callback)


def flow_dpm(velocity, x, times, callback=None):
    """As flow_euler, with the second-order multistep solver DPM-Solver++ (Lu et al. 2022, algorithm 2). It integrates
    the predicted data, x + (end - t) velocity, which change less from step to step, and extrapolates them from the last
    two, along the logarithm of the signal-to-noise ratio. The first step is Heun's, since at pure noise that logarithm
    is minus infinity, and the last one Euler's."""
    end, last = times[-1], None

    def log_snr(noise):
        return math.log((1 - noise) / noise) if noise < 1 else -math.inf

    def step(x, t, t_next):
        nonlocal last
        noise, noise_next, v = abs(end - t), abs(end - t_next), velocity(x, t)
        (last_noise, last_data), data = last or (None, None), x + (end - t) * v
        last = noise, data
        if t_next == end:
            return data
        if last_data is None:
            return x + (t_next - t) * (v + velocity(x + (t_next - t) * v, t_next)) / 2
        ratio = (log_snr(noise_next) - log_snr(noise)) / (log_snr(noise) - log_snr(last_noise))
        data = data + ratio / 2 * (data - last_data)
        return noise_next / noise * x + (1 - noise_next / noise) * data

    return integrate(step, x, times, callback)


SOLVERS = {"euler": flow_euler, "heun": flow_heun, "dpm": flow_dpm}

# ----------------------------------------------------------------------------------------------------------------
# DDPM (Ho et al. 2020): x_t = sqrt(alpha_bar_t) data + sqrt(1 - alpha_bar_t) noise. alpha_bar, in the literature
# also alphas_cumprod, is the part of the data's variance that is left at step t; for clean data it is 1.


def linear_betas(num_steps, start=1e-4, end=2e-2):
    """(num_steps,) float32: the part of the variance that each step replaces by noise (section 4)."""
    return torch.linspace(start, end, num_steps, dtype=torch.float32)


def alphas_cumprod(betas):
    """alpha_bar_t, the product of 1 - beta over all steps up to t (section 2)."""
    return (1 - betas).cumprod(dim=0)


def ddpm_step(x, eps, alpha_bar, alpha_bar_next, noise):
    """One step from x_t towards the data, to alpha_bar_next: a sample of q(x_next | x_t, x_0) (eq. 6 and 7). The two
    alpha_bar, floats or 0-d tensors, may lie many steps apart. eps: the noise that the network predicts in x_t; noise:
    standard normal, 0 in the last step."""
    data = (x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
    alpha = alpha_bar / alpha_bar_next
    data_weight = alpha_bar_next**0.5 * (1 - alpha) / (1 - alpha_bar)
    x_weight = alpha**0.5 * (1 - alpha_bar_next) / (1 - alpha_bar)
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha)
    return data_weight * data + x_weight * x + variance**0.5 * noise


def ddim_step(x, eps, alpha_bar, alpha_bar_next, eta=0.0, noise=0):
    """As ddpm_step, but the predicted noise is added back in place of new noise (Song et al. 2020, eq. 12). eta 0 is
    deterministic; eta 1 adds as much new noise as ddpm_step."""
    data = (x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
    sigma = eta * ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)) ** 0.5
    return alpha_bar_next**0.5 * data + (1 - alpha_bar_next - sigma**2) ** 0.5 * eps + sigma * noise


def ddpm_v(data, noise, alpha_bar):
    """v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) data, which a network may predict in place of the noise (Salimans
    & Ho 2022, appendix D). alpha_bar: a number, or broadcastable to data and noise."""
    return alpha_bar**0.5 * noise - (1 - alpha_bar) ** 0.5 * data


def eps_from_v(v, x, alpha_bar):
    """The noise in x_t, from v."""
    return alpha_bar**0.5 * v + (1 - alpha_bar) ** 0.5 * x


def clip_x0(x, eps, alpha_bar, data_max):
    """The predicted noise eps, changed so that the data it implies lie in [-data_max, data_max], as in Ho et al. 2020's
    code: near alpha_bar = 0 they are a small difference divided by sqrt(alpha_bar), and would leave it."""
    data = ((x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5).clamp(-data_max, data_max)
    return (x - alpha_bar**0.5 * data) / (1 - alpha_bar) ** 0.5


# ----------------------------------------------------------------------------------------------------------------
# Autoencoders, pictures <-> the latents that the diffusion models see, and LPIPS. Each autoencoder has encode(),
# (B, 3, H, W) in [-1, 1] -> (B, latent_channels, H/stride, W/stride) of about unit variance, and decode(), the inverse.
# Parameter names are those of the published weights.


class KLResnet(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on the shortcut where the width changes."""

    def __init__(self, width_in, width):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, width, eps=1e-6)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width_in, width, 1) if width != width_in else nn.Identity()

    def forward(self, x):
        # In place: at full resolution each of these maps is the largest tensor in memory.
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(self.conv_shortcut(x))


class KLAttention(nn.Module):
    """Self-attention over all positions of the map, with one head as wide as the map."""

    def __init__(self, width):
        super().__init__()
        self.group_norm = nn.GroupNorm(32, width, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x):
        tokens = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, HW, C)
        mixed = self.to_out[0](attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)))
        return x + mixed.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])  # (B, C, H, W)


class KLMiddle(nn.Module):
    """The block at the lowest resolution: apart from group norms the only part that sees the whole picture."""

    def __init__(self, width):
        super().__init__()
        self.resnets = nn.ModuleList(KLResnet(width, width) for _ in range(2))
        self.attentions = nn.ModuleList([KLAttention(width)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class KLStage(nn.Sequential):
    """The resnets of one resolution, then the change to the next: "upsamplers", "downsamplers" or, at the end, None."""

    def __init__(self, width_in, width, depth, change):
        super().__init__()
        self.resnets = nn.Sequential(*(KLResnet(width if i else width_in, width) for i in range(depth)))
        if change:
            up = change == "upsamplers"
            resize = nn.Upsample(scale_factor=2.0) if up else nn.ZeroPad2d((0, 1, 0, 1))  # right and below only
            conv = nn.Conv2d(width, width, 3, stride=1 if up else 2, padding=1 if up else 0)
            self.add_module(change, nn.Sequential(nn.Sequential(collections.OrderedDict(resize=resize, conv=conv))))


class KLHalf(nn.Sequential):
    """The encoder (way "down": pictures to moments) or the decoder ("up"), whose stages have one resnet more."""

    def __init__(self, channels_in, channels_out, widths, way):
        first = {"conv_in": nn.Conv2d(channels_in, widths[0], 3, padding=1)}
        middle = {"mid_block": KLMiddle(widths[-1 if way == "down" else 0])}
        changes, depth = [way + "samplers"] * (len(widths) - 1) + [None], 2 if way == "down" else 3
        stages = (KLStage(*sizes, depth, change) for *sizes, change in zip((widths[0], *widths), widths, changes))
        blocks = {way + "_blocks": nn.Sequential(*stages)}
        last = {"conv_norm_out": nn.GroupNorm(32, widths[-1], eps=1e-6), "silu": nn.SiLU(inplace=True)}
        last["conv_out"] = nn.Conv2d(widths[-1], channels_out, 3, padding=1)
        path = first | blocks | middle | last if way == "down" else first | middle | blocks | last
        super().__init__(collections.OrderedDict(path))


def check_map(x, channels, multiple):
    """Raise UserError unless x is (B, channels, H, W) with sides that are multiples of `multiple`."""
    if x.dim() != 4 or x.shape[1] != channels or x.shape[2] % multiple or x.shape[3] % multiple:
        what = f"(B, {channels}, H, W) with H and W multiples of {multiple}"
        raise UserError(f"the autoencoder takes {what}, not {tuple(x.shape)}; resize or crop first")


def one_by_one(function, batch):
    """function(batch) in float32. On a CPU one picture at a time: as fast, in a fraction of the memory. Never computed
    in float16, whose largest number, 65504, the activations of published autoencoders exceed."""
    kind = batch.device.type
    parts = batch.split(1) if kind == "cpu" else [batch]
    in_fp16 = kind in ("cpu", "cuda") and torch.get_autocast_dtype(kind) == torch.float16
    with torch.autocast(kind, enabled=False) if in_fp16 else contextlib.nullcontext():
        return torch.cat([function(part).float() for part in parts])


class AutoencoderKL(nn.Module):
    """The autoencoder of latent diffusion (Rombach et al. 2022, section 3.1): SD's and, with `batch_norm`, FLUX.2's.
    SD's latents are multiplied by `scale`, one over their standard deviation on training pictures. (SDXL's file looks
    the same, but its scale is 0.13025; load_vae() reads it from the config.json beside the file.) FLUX.2's are
    normalised in 2x2 patches, each of their 4 * latent_channels channels by a batch norm's running statistics.
    widths, decoder_widths: channels at each resolution, highest first, multiples of 32."""

    def __init__(self, latent_channels=4, widths=(128, 256, 512, 512), decoder_widths=None, batch_norm=False):
        super().__init__()
        self.latent_channels, self.stride = latent_channels, 2 ** (len(widths) - 1)
        self.scale, self.shift = 0.18215, 0.0
        self.encoder = KLHalf(3, 2 * latent_channels, widths, "down")
        self.decoder = KLHalf(latent_channels, 3, (decoder_widths or widths)[::-1], "up")
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.bn = nn.BatchNorm2d(4 * latent_channels, eps=1e-4, affine=False) if batch_norm else None
        self.patch = 2 if batch_norm else 1

    def posterior(self, x):
        """x (B, 3, H, W) in [-1, 1] -> mean and log-variance of the raw latent, each (B, C, H/stride, W/stride)."""
        check_map(x, 3, self.stride * self.patch)
        mean, logvar = one_by_one(lambda part: self.quant_conv(self.encoder(part)), x).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, x):
        """x (B, 3, H, W) in [-1, 1] -> the latent that a model sees: the posterior's mean, normalised."""
        return self.normalise(self.posterior(x)[0])

    def decode(self, latent):
        """The latent that a model sees -> pictures (B, 3, H, W) in about [-1, 1]."""
        check_map(latent, self.latent_channels, self.patch)
        return one_by_one(lambda part: self.decoder(self.post_quant_conv(part)), self.normalise(latent, inverse=True))

    def normalise(self, z, inverse=False):
        """Raw latent -> the latent that a model sees, or the inverse."""
        if self.bn is None:
            return z / self.scale + self.shift if inverse else (z - self.shift) * self.scale
        z = F.pixel_unshuffle(z, 2)  # (B, 4C, H/2, W/2)
        mean = self.bn.running_mean[:, None, None]
        std = (self.bn.running_var[:, None, None] + self.bn.eps).sqrt()
        return F.pixel_shuffle(z * std + mean if inverse else (z - mean) / std, 2)  # (B, C, H, W)


class TAEBlock(nn.Module):
    """relu(x + three convolutions). With `pool`, a GroupNorm between 1x1 convolutions first adds a global part to x."""

    def __init__(self, pool=False):
        super().__init__()
        first, second, third = (nn.Conv2d(64, 64, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(True), second, nn.ReLU(True), third)
        widen, narrow = nn.Conv2d(64, 256, 1, bias=False), nn.Conv2d(256, 64, 1, bias=False)
        self.pool = nn.Sequential(widen, nn.GroupNorm(4, 256), nn.ReLU(True), narrow) if pool else None

    def forward(self, x):
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(x + self.conv(x), inplace=True)


class TAEF2(nn.Module):
    """The tiny autoencoder (2.7 million parameters, not 84) for FLUX.2's normalised latents (Ollin Boer Bohan,
    github.com/madebyollin/taesd, MIT). It has no posterior. Its own pixels are in [0, 1]; encode and decode convert."""

    latent_channels, stride, patch = 32, 8, 1

    def __init__(self):
        super().__init__()
        conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
        down = [conv(3, 64), TAEBlock()]
        for pool in (False, False, True):
            down += [conv(64, 64, stride=2, bias=False), *(TAEBlock(pool) for _ in range(3))]
        # The first layer of the published decoder has no weights: it is the soft clamp in decode().
        up = [nn.Identity(), conv(32, 64), nn.ReLU(True), *(TAEBlock(pool=True) for _ in range(3))]
        for depth in (3, 3, 1):
            up += [nn.Upsample(scale_factor=2), conv(64, 64, bias=False), *(TAEBlock() for _ in range(depth))]
        self.encoder, self.decoder = nn.Sequential(*down, conv(64, 32)), nn.Sequential(*up, conv(64, 3))

    def encode(self, x):
        check_map(x, 3, self.stride)
        return one_by_one(self.encoder, (x + 1) / 2)

    def decode(self, latent):
        check_map(latent, self.latent_channels, 1)
        return one_by_one(self.decoder, (latent / 3).tanh() * 3) * 2 - 1


# What other layouts call the parts, and what diffusers and this file call them; names on the right are never changed.
# fmt: off
VAE_NAMES = [
    # Latent diffusion, and Black Forest Labs, where the quant_convs are inside; both number the decoder from its end
    ("encoder.quant_conv.", "quant_conv."), ("decoder.post_quant_conv.", "post_quant_conv."),
    *[(f".up.{i}.", f".up_blocks.{3 - i}.") for i in range(4)], (".down.", ".down_blocks."), (".block.", ".resnets."),
    (".downsample.", ".downsamplers.0."), (".upsample.", ".upsamplers.0."), (".nin_shortcut.", ".conv_shortcut."),
    (".mid.block_1.", ".mid_block.resnets.0."), (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.norm.", ".mid_block.attentions.0.group_norm."), (".mid.attn_1.", ".mid_block.attentions.0."),
    (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."), (".proj_out.", ".to_out.0."),
    (".norm_out.", ".conv_norm_out."),
    # diffusers until May 2023, and so the file of sd-vae-ft-mse
    (".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0."),
]
# Files that a VAE's folder may hold, the best choice first. Each entry: prefix to add to the tensors' names -> file.
VAE_FOLDERS = [
    {"": f"{folder}diffusion_pytorch_model.{kind}"}
    for folder in ("", "vae/") for kind in ("safetensors", "fp16.safetensors", "bin")
] + [{f"{half}.": f"taef2_{half}.{kind}" for half in ("encoder", "decoder")} for kind in ("safetensors", "pth")]
# fmt: on


def load_vae(path):
    """The autoencoder in a file or folder, recognised by the names of its weights: AutoencoderKL with those of SD
    (diffusers new and old, latent diffusion, a whole SD checkpoint) or FLUX.2 (diffusers, Black Forest Labs), or TAEF2.
    float32; `.hash` identifies the file. Raises UserError for anything else."""
    path, files, weights = Path(path), {"": ""}, {}
    if path.is_dir():
        files = next((f for f in VAE_FOLDERS if all((path / name).is_file() for name in f.values())), None)
        if files is None:
            known = "diffusion_pytorch_model.safetensors, or taef2_encoder and taef2_decoder"
            raise UserError(f"no autoencoder in {path}; a folder should hold {known}")
    for prefix, name in files.items():
        content, _ = load_tensors(path / name)
        with reading(path / name, "autoencoder"):
            content = content.get("state_dict", content)
            weights |= {f"{prefix}{k}": v.float() for k, v in content.items() if torch.is_tensor(v)}
    whole = "first_stage_model."  # the autoencoder within a whole SD checkpoint
    weights = {k.removeprefix(whole): v for k, v in weights.items() if k.startswith(whole)} or weights
    for theirs, ours in VAE_NAMES:
        weights = {k.replace(theirs, ours): v for k, v in weights.items()}
    for k, v in weights.items():
        if ".attentions.0.to_" in k and v.dim() == 4:  # latent diffusion's attention is made of 1x1 convolutions
            weights[k] = v.flatten(1)

    def widths(stage):
        names = (f"{stage}.{i}.resnets.0.conv1.weight" for i in range(4))
        return tuple(weights[k].shape[0] for k in names if k in weights and weights[k].dim() == 4)

    down, up, batch_norm = widths("encoder.down_blocks"), widths("decoder.up_blocks"), "bn.running_mean" in weights
    channels = len(weights.get("post_quant_conv.bias", ()))
    if "encoder.11.pool.0.weight" in weights:
        vae = TAEF2()
    elif len(down) == len(up) == 4 and not any(w % 32 for w in down + up) and (channels == 4 or batch_norm):
        vae = AutoencoderKL(channels, down, up[::-1], batch_norm)
        # SD's own files also hold the networks of its training losses.
        weights = {k: v for k, v in weights.items() if hasattr(vae, k.split(".")[0])}
    else:
        found = f"{len(weights)} tensors: {', '.join(list(weights)[:3])}"
        raise UserError(f"{path} is no autoencoder of SD, FLUX.2 or TAEF2; it holds {found}")
    load_into(vae, weights, path)
    vae.hash = "-".join(file_hash(path / name) for name in files.values())
    settings = (path / name).parent / "config.json"
    if settings.is_file() and isinstance(vae, AutoencoderKL):
        with reading(settings, "configuration of an autoencoder"):
            config = json.loads(settings.read_text("utf-8"))
            vae.scale, vae.shift = config.get("scaling_factor") or vae.scale, config.get("shift_factor") or vae.shift
    # The memory format in which a CPU's bfloat16 convolutions are fastest
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def file_hash(path):
    """A short text that tells one weight file from another: of its size and its first 64 kB."""
    with open(path, "rb") as file:
        return hashlib.sha256(f"{os.path.getsize(path)}".encode() + file.read(65536)).hexdigest()[:16]


def warn_if_other(flag, hash, expected):
    """Print a warning where a VAE or CLIP is not the file that a checkpoint was trained with."""
    if expected and hash != expected:
        print(f"warning: {flag} is not the file that these weights were trained with", file=sys.stderr)


def load_matching_vae(path, header):
    """The autoencoder of a checkpoint whose header tells "latent", (C, S), and "vae", its hash. Raises UserError."""
    if not path or not Path(path).exists():
        where = f", and {path} is not here" if path else ""
        raise UserError(f"these weights work in the latents of a VAE{where}; name its weights with --vae")
    vae, channels = load_vae(path), header["latent"][0]
    if vae.latent_channels != channels:
        raise UserError(f"--vae has {vae.latent_channels} channels, these weights have {channels}; name the right one")
    warn_if_other("--vae", vae.hash, header["vae"])
    return vae


class Lpips(nn.Module):
    """LPIPS, a distance of pictures in the features of AlexNet (Zhang et al. 2018, eq. 1): rgb (B, 3, H, W) in [0, 1],
    sides at least 31 -> (B, features), whose squared distances are the LPIPS distances."""

    def __init__(self):
        super().__init__()
        # AlexNet's five convolutions under torchvision's names; its classifier is not needed.
        conv, relu, pool = nn.Conv2d, nn.ReLU(), nn.MaxPool2d(3, 2)
        layers = [conv(3, 64, 11, stride=4, padding=2), relu, pool, conv(64, 192, 5, padding=2), relu, pool]
        layers += [conv(192, 384, 3, padding=1), relu, conv(384, 256, 3, padding=1), relu]
        self.features = nn.Sequential(*layers, conv(256, 256, 3, padding=1), relu)
        # One weight for each channel of the five layers, fitted to people's judgement of similarity.
        self.heads = nn.ParameterList(torch.ones(width) for width in (64, 192, 384, 256, 256))

    @classmethod
    def load(cls, alexnet, heads=None):
        """From torchvision's AlexNet weights and LPIPS' linear heads (its package's weights/v0.1/alex.pth), .pth or
        .safetensors; layers() needs no heads. Raises UserError."""
        lpips, (trunk, _) = cls(), load_tensors(alexnet)
        trunk = {name.removeprefix("features."): t for name, t in trunk.items() if name.startswith("features.")}
        load_into(lpips.features, trunk, alexnet)
        if heads:
            linear = load_tensors(heads)[0]
            linear = {name[3]: t.flatten() for name, t in linear.items() if name.endswith(".model.1.weight")}
            load_into(lpips.heads, linear, heads)
        return lpips.eval().requires_grad_(False)

    def layers(self, rgb):
        """The outputs of the five layers, (B, C, H, W) each, normalised to length 1 over the channels."""
        shift, scale = rgb.new_tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 3, 1, 1)
        x, outputs = (rgb * 2 - 1 - shift) / scale, []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                outputs.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return outputs

    def forward(self, rgb):
        if min(rgb.shape[2:]) < 31:
            raise UserError(f"LPIPS needs pictures of at least 31 pixels, these have {min(rgb.shape[2:])}")
        parts = []
        for unit, head in zip(self.layers(rgb), self.heads):
            weight = head.view(-1, 1, 1) / unit[0, 0].numel()  # a mean over the H W positions of the layer
            parts.append((unit * weight.sqrt()).flatten(1))
        return torch.cat(parts, dim=1)


# ----------------------------------------------------------------------------------------------------------------
# Errors, options and the command line


class UserError(Exception):
    """A user's mistake: what is wrong and what to do, in one line. The command line prints it and exits with 2."""


@contextlib.contextmanager
def reading(path, what):
    """Whatever goes wrong while a file is read becomes one UserError that names the file and what it should be."""
    try:
        yield
    except Exception as problem:  # each format has its own way to fail
        if isinstance(problem, UserError):
            raise
        reason = str(problem).strip().split("\n")[0][:120] or type(problem).__name__
        raise UserError(f"{path} is not a readable {what} ({reason}); name another") from None


def printable(text):
    """The text with control characters and bytes that are no UTF-8 as escapes, such as \\x1b: the name of a file or the
    header of a checkpoint must not reach the terminal as a command."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def progress(items, what):
    """The items, one after the other; in a loop of more than a second, with a bar that tells the time left."""
    items = list(items)
    return tqdm(items, what, leave=False, delay=1, disable=len(items) == 1)


def option(default, help, choices=None, low=-math.inf, high=math.inf, flag=None, positional=False, picture=False):
    """A dataclass field that is also a command-line option. choices, low, high: the values allowed. flag: its name if
    not the field's. positional: the words that follow the subcommand. picture: it names a picture file to write."""
    limits = dict(help=help, choices=choices, low=low, high=high, flag=flag, positional=positional, picture=picture)
    return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass
class TrainConfig:
    """The options of `train` that every system has. Each file's own Config adds its data, model and objective."""

    BUDGETS = (("minutes", "steps", "epochs"),)  # a budget that is given replaces those of the preset in its group

    data: tuple[str, ...] = option(("drawn",), "drawn (painted pictures), or folders, .tar or .parquet files")
    num_samples: int | None = option(None, "take only the first pictures of --data, as many as this", low=1)
    out: str = option("", "run folder (default: runs/ and the file's name)")
    minutes: float | None = option(None, "stop after this many minutes", low=0.01)
    steps: int | None = option(None, "stop after this many optimizer steps", low=1)
    epochs: int | None = option(None, "stop after this many passes over the data", low=1)
    batch_size: int = option(32, "pictures per optimizer step, over all processes and accumulation passes", low=1)
    grad_accum: int = option(1, "forward and backward passes per optimizer step", low=1)
    lr: float = option(3e-3, "peak learning rate", low=0.0)
    warmup: float = option(0.05, "linear warm-up: part of the budget, or steps if at least 1", low=0.0)
    decay: str = option("cosine", "learning rate after the warm-up", choices=("cosine", "linear", "none"))
    beta2: float = option(0.95, "AdamW's second beta", low=0.0, high=0.9999)
    weight_decay: float = option(0.0, "AdamW's weight decay", low=0.0)
    grad_clip: float = option(1.0, "largest norm of the gradient; a longer one is scaled down", low=1e-9)
    ema: float = option(0.999, "decay of the averaged weights that are sampled from", low=0.0, high=0.999999)
    seed: int = option(0, "seed of weights, data order, noise and crops", low=0, high=2**62)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = option("auto", "of matrix products", choices=("auto", "fp32", "bf16", "fp16"))
    compile: bool | None = option(None, "torch.compile the blocks (default: if the budget is long enough to gain)")
    checkpoint_every: int = option(500, "steps between checkpoints", low=1)
    fsdp: bool = option(False, "under torchrun: shard weights, gradients and optimizer state over the processes")
    resume: str | None = option(None, "go on exactly: with --out, or with the run folder or checkpoint named")


@dataclasses.dataclass
class LoadConfig:
    """The options of every subcommand that loads weights."""

    weights: str = option("", "checkpoint or run folder (default: the run in runs/, else the file in weights/)")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))


@dataclasses.dataclass
class SampleConfig(LoadConfig):
    """The options of sampling that every system has."""

    precision: str = option("auto", "of matrix products", choices=("auto", "fp32", "bf16", "fp16"))
    num: int = option(16, "number of pictures", low=1)
    steps: int = option(50, "steps from noise to picture", low=1)
    seed: int = option(0, "picture i starts from the noise of seed + i", low=0, high=2**62)
    batch_size: int = option(64, "pictures at a time", low=1)
    out: str = option("", "picture of all samples in a grid (default: samples/ and the file's name)", picture=True)
    each: str = option("", "folder for the single pictures")
    gif: str = option("", "animation of the first pictures, from noise to data in ten frames", picture=True)


def flag_of(field):
    """ "--batch-size" for the field batch_size."""
    return field.metadata["flag"] or "--" + field.name.replace("_", "-")


def check_config(config):
    """The config, with tuples for lists, as argparse and JSON give them. Raises UserError for a value out of range."""
    for field in dataclasses.fields(config):
        value, limits, flag = getattr(config, field.name), field.metadata, flag_of(field)
        if isinstance(value, list):
            setattr(config, field.name, value := tuple(value))
        low, high = limits["low"], limits["high"]
        for v in value if isinstance(value, tuple) else (value,):
            if limits["choices"] and v not in limits["choices"]:
                raise UserError(f"{flag} {v}: choose one of {', '.join(filter(None, limits['choices']))}")
            if isinstance(v, int | float) and not (low <= v <= high and math.isfinite(v)):
                raise UserError(f"{flag} {v}: must be a number from {low} to {high}")
            if v and limits["picture"]:
                picture_format(v)
    return config


def config_from_header(config_class, header, path):
    """The Config in a checkpoint's header. Fields that are no longer options are ignored. Raises UserError."""
    with reading(path, "checkpoint of this program"):
        values = {k: v for k, v in header["config"].items() if k in config_class.__dataclass_fields__}
        if isinstance(values.get("data"), str):  # one path, in older checkpoints
            values["data"] = [values["data"]]
        return check_config(config_class(**values))


def make_config(config_class, given, presets=None, system=""):
    """The config of a subcommand: its defaults, over them the preset's values, over them the given options. With
    --resume the settings stored in the checkpoint are used instead of a preset. Raises UserError."""
    base = dict((presets or {}).get(given.pop("preset", "demo"), {}))
    if given.get("resume") is not None:
        named = Path(given["resume"] or given.get("out") or config_class.out or f"runs/{system}")
        folder = named.parent if named.suffix == ".safetensors" else named
        given["out"] = str(folder)
        if (folder / "state.safetensors").exists():
            _, header = load_tensors(folder / "state.safetensors", header_only=True)
            base = vars(config_from_header(config_class, header or {}, folder))
            base.pop("fsdp", None)  # it depends on how this process was started
    for budgets in getattr(config_class, "BUDGETS", ()):
        if given.keys() & set(budgets):
            base |= dict.fromkeys(budgets)
    config = config_class(**(base | given))
    if isinstance(config, TrainConfig | SampleConfig) and not config.out:
        config.out = f"runs/{system}" if isinstance(config, TrainConfig) else f"samples/{system}.png"
    return check_config(config)


class OneLineParser(argparse.ArgumentParser):
    """argparse, except that a mistake is one line."""

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def add_options(parser, config_class, preset):
    """One option for each field of a dataclass. Only what is given on the command line appears in the result."""
    for field in dataclasses.fields(config_class):
        limits, default, name = field.metadata, preset.get(field.name, field.default), flag_of(field)
        kind = next(iter(typing.get_args(field.type)), field.type)  # of `float | None` or tuple[float, ...], float
        arguments = {"type": kind, "metavar": "|".join(limits["choices"] or [kind.__name__.upper()])}
        if kind is bool:
            arguments = {"action": argparse.BooleanOptionalAction}
        if limits["positional"]:
            name, arguments["nargs"] = field.name, "*"
        else:
            arguments["dest"] = field.name
            if typing.get_origin(field.type) is tuple:
                arguments["nargs"] = "+"
        if field.name == "resume":
            arguments |= {"nargs": "?", "const": "", "metavar": "RUN"}
        shown = " ".join(map(str, default if isinstance(default, tuple) else [default]))
        shown = "" if shown in ("", "None", "False") else f" [{shown}]"
        help = (limits["help"] + shown).replace("%", "%%")
        parser.add_argument(name, default=argparse.SUPPRESS, help=help, **arguments)


def run_command_line(system, doc, subcommands, argv=None):
    """Run `python FILE.py SUBCOMMAND [options]` and return the exit code; here alone errors become a line on stderr.
    subcommands: name -> (function of a config, config class, presets or None, one line of help)."""
    parser = OneLineParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsers = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND")
    for name, (_, config_class, presets, help) in subcommands.items():
        sub = parsers.add_parser(name, help=help, description=help)
        if presets:
            sub.add_argument("--preset", choices=list(presets), default=argparse.SUPPRESS, help="settings [demo]")
        add_options(sub, config_class, (presets or {}).get("demo", {}))
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the terminal lacks is printed as an escape
            stream.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if argv is None else argv
    words = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word) for word in words]
    try:
        given = vars(parser.parse_args(words))
        subcommand = given.pop("subcommand")
        if subcommand is None:
            parser.print_help()
            return 0
        function, config_class, presets, _ = subcommands[subcommand]
        code = function(make_config(config_class, given, presets, system)) or 0
    except (UserError, OSError, MemoryError, RuntimeError) as problem:
        if isinstance(problem, RuntimeError) and "allocate" not in str(problem):  # torch's "Tried to allocate"
            raise
        if isinstance(problem, MemoryError | RuntimeError):
            problem = "out of memory; lower --batch-size or the pictures' size, or raise --grad-accum"
        print(f"error in process {rank()}:" if rank() else "error:", printable(problem), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    if dist.is_initialized():  # gloo's threads can abort an orderly exit
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


# ----------------------------------------------------------------------------------------------------------------
# Device, precision, random numbers


def keep_freed_memory():
    """Let Linux' C library keep freed memory instead of returning every large tensor to the kernel, which clears each
    page before it lends it again: more than half of the time of sampling on a CPU."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        for option_number in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option_number, 2**31 - 1)


def pick_device(name):
    """torch.device for auto, cpu, cuda or mps. Raises UserError where the machine has none."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if has[kind])
    if not has[name]:
        raise UserError(f"--device {name}: torch finds no such device here; leave --device out to use what there is")
    return torch.device(name)


def pick_precision(name, device):
    """fp32, bf16 or fp16; auto: bf16 where the hardware multiplies it natively, else fp16 on a GPU, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    native = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if native.get("avx512_bf16") or native.get("amx_bf16") else "fp32"


def autocast(device, precision):
    """Context in which matrix products run in `precision`; weights and losses, and on a GPU norms, stay in float32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def generator(*key, device="cpu"):
    """A torch.Generator whose state is a function of `key` (integers) alone. All random numbers of a training step come
    from the seed and the step, so that a resumed run sees the same crops, noise and order of pictures."""
    state = np.random.SeedSequence(key[0], spawn_key=key[1:]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state))


def noise_for(seeds, shape, device):
    """(len(seeds), *shape) standard normal; picture i depends on seeds[i] only, whatever the batch and the device."""
    return torch.stack([torch.randn(shape, generator=generator(seed)) for seed in seeds]).to(device)


class BatchRng:
    """Random numbers for `rows`, a slice of a batch of `count`. Every process computes those of the whole batch, so
    that a picture's do not depend on --grad-accum or on the number of processes. key: as in generator()."""

    def __init__(self, count, *key, rows=slice(None), device="cpu"):
        self.count, self.rows, self.generator = count, rows, generator(*key, device=device)

    def randn(self, *shape):
        """(rows, *shape) standard normal."""
        return torch.randn(self.count, *shape, generator=self.generator, device=self.generator.device)[self.rows]

    def rand(self, *shape):
        """(rows, *shape) uniform in [0, 1)."""
        return torch.rand(self.count, *shape, generator=self.generator, device=self.generator.device)[self.rows]


# ----------------------------------------------------------------------------------------------------------------
# Several processes: `torchrun --nproc-per-node N FILE.py train` starts N copies of the program. Each computes its rows
# of every batch, torch averages the gradients, and the first process alone prints and writes files.


def rank():
    """This process's number, 0 to world() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def init_training(config):
    """(device, precision) of this process; under torchrun, join the other processes first. Raises UserError."""
    launched = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()  # set by torchrun
    passes = config.grad_accum * (int(os.environ["WORLD_SIZE"]) if launched else 1)
    if config.batch_size % passes:
        raise UserError(f"--batch-size {config.batch_size} is no multiple of {passes}, --grad-accum times processes")
    device = pick_device(config.device)
    if launched and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    precision = pick_precision(config.precision, device)
    if config.fsdp and (not launched or precision == "fp16"):
        raise UserError("--fsdp needs torchrun --nproc-per-node N FILE.py train ..., and bf16 or fp32")
    if launched and not dist.is_initialized():
        store = {}
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ["GROUP_WORLD_SIZE"] == "1":
            # After a restart torchrun's store still holds the addresses of the processes that died. A prefix of its own
            # for each attempt keeps this one from reading them.
            keys = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            store = {"store": dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", keys)}
            store |= {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **store)
        if rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
    return device, precision


@contextlib.contextmanager
def main_process_first():
    """The other processes wait until the first one has left this block, and find what it made."""
    if rank():
        dist.barrier()
    yield
    if world() > 1 and rank() == 0:
        dist.barrier()


def all_max(*numbers):
    """The largest value of each number among the processes, so that all of them decide alike."""
    if dist.is_initialized():
        numbers = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        numbers = numbers.tolist()
    return numbers


def parallelize(config, model, ema, device, blocks):
    """Move model and ema to the device; return the module to train with: the model, or DistributedDataParallel around
    it. With --fsdp model and ema are sharded (FSDP2), each module of blocks(net) on its own."""
    if dist.is_initialized() and config.fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(device.type, (world(),))
        for net in (model, ema):
            net.to(memory_format=torch.contiguous_format)  # shards cannot be cut from channels-last weights
            for block in blocks(net):
                fully_shard(block, mesh=mesh)
            fully_shard(net, mesh=mesh, reshard_after_forward=True)
            for name in ("encode", "decode"):  # methods of an autoencoder that run beside forward()
                if hasattr(net, name):
                    register_fsdp_forward_method(net, name)
        return model
    model.to(device)
    ema.to(device)
    if not dist.is_initialized():
        return model
    torch._dynamo.config.optimize_ddp = False  # it would split the compiled blocks
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def micro_batches(config):
    """The rows of each forward and backward pass of this process, as slices of the batch."""
    passes = config.grad_accum * world()
    return [slice(part * world() + rank(), None, passes) for part in range(config.grad_accum)]


# ----------------------------------------------------------------------------------------------------------------
# Optimization


def lr_factor(progress, step, warmup, decay):
    """The learning rate as a factor of its peak. progress: part of the budget that is used, 0 to 1; step: optimizer
    steps that are done; warmup: part of the budget or, from 1 on, a number of steps."""
    rise = (step + 1) / warmup if warmup >= 1 else progress / warmup if warmup else 1.0
    start = warmup if warmup < 1 else 0.0
    passed = max(0.0, progress - start) / (1 - start)
    fall = {"none": 1.0, "linear": 1 - passed, "cosine": 0.5 + 0.5 * math.cos(math.pi * passed)}[decay]
    return min(rise, fall)


class Muon(torch.optim.Optimizer):
    """Muon for weight matrices, whose steps have all singular values near one (Jordan et al. 2024; scaled as in Liu et
    al. 2025, eq. 4, so that AdamW's learning rate fits), and AdamW for all other parameters."""

    def __init__(self, matrices, others, lr, betas, weight_decay, fused, dtype):
        # load_state_dict() reads `fused` to know on which device AdamW keeps its step counts.
        super().__init__([*matrices, *others], dict(lr=lr, fused=fused))
        self.matrices, self.weight_decay, self.dtype = matrices, weight_decay, dtype
        self.adamw = torch.optim.AdamW(others, lr, betas, weight_decay=weight_decay, fused=fused)

    @torch.no_grad()
    def step(self, closure=None):
        lr = self.param_groups[0]["lr"]
        self.adamw.state, self.adamw.param_groups[0]["lr"] = self.state, lr
        self.adamw.step()
        for matrix in (matrix for matrix in self.matrices if matrix.grad is not None):
            state = self.state[matrix]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
            momentum = state["momentum_buffer"].lerp_(matrix.grad, 0.05)
            update = self.orthogonalize(matrix.grad.lerp(momentum, 0.95))
            matrix.mul_(1 - lr * self.weight_decay).add_(update, alpha=-lr * 0.2 * max(matrix.shape) ** 0.5)

    def orthogonalize(self, matrix):
        """Nearly U V^T of a matrix U S V^T. Each of five steps x <- a x + b (x x^T) x + c (x x^T)^2 x maps every
        singular value s to a s + b s^3 + c s^5, which ends between 0.7 and 1.2."""
        a, b, c = 3.4445, -4.7750, 2.0315
        x = matrix.to(self.dtype)
        x = x if len(x) <= x.shape[1] else x.T
        x = x / x.norm().clamp(min=1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x if x.shape == matrix.shape else x.T


def make_optimizer(config, model, device, muon_modules=()):
    """(optimizer, gradient scaler for fp16). AdamW; with --optimizer muon, Muon for the matrices within muon_modules,
    which should be those of attention and MLP; with adamw8bit, torchao's AdamW. Raises UserError."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind, betas, fused = getattr(config, "optimizer", "adamw"), (0.9, config.beta2), device.type != "mps"
    if kind == "muon":
        inside = {p for module in muon_modules for p in module.parameters() if p.dim() == 2}
        matrices = [p for p in parameters if p in inside]
        others = [p for p in parameters if p not in inside]
        dtype = torch.bfloat16 if pick_precision("auto", device) == "bf16" else torch.float32
        optimizer = Muon(matrices, others, config.lr, betas, config.weight_decay, fused, dtype)
    elif kind == "adamw8bit":
        try:
            from torchao.optim import AdamW8bit
        except ImportError:
            raise UserError("--optimizer adamw8bit needs torchao: pip install torchao") from None
        optimizer = AdamW8bit(parameters, config.lr, betas, weight_decay=config.weight_decay)
    else:
        optimizer = torch.optim.AdamW(parameters, config.lr, betas, weight_decay=config.weight_decay, fused=fused)
    fp16 = pick_precision(config.precision, device) == "fp16"
    return optimizer, torch.amp.GradScaler(device.type, enabled=fp16)


def set_lr(optimizer, lr):
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"].fill_(lr) if torch.is_tensor(group["lr"]) else lr  # torchao keeps it in a tensor


@torch.no_grad()
def update_ema(ema, model, step, longest):
    """ema <- decay * ema + (1 - decay) * model. The decay grows as (1 + step) / (10 + step) up to `longest`, so that
    the random first weights are forgotten in short runs too."""
    decay = min(longest, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def compile_blocks(config, device, blocks, dynamic=False):
    """torch.compile each block in place if --compile says so or, without it, if the budget is long enough to gain from
    it (half a minute of compiling makes a step on two CPU cores a third faster)."""
    wanted = config.compile
    if wanted is None:
        has_compiler = device.type == "cuda" or any(map(shutil.which, ("c++", "g++", "clang++", "cl")))
        long_enough = (config.minutes or 5) >= 5 and (config.steps or 1000) >= 1000
        wanted = device.type != "mps" and has_compiler and long_enough
        torch._dynamo.config.suppress_errors = True  # a compiler that does not work is no reason to stop
        torch._functorch.config.force_non_lazy_backward_lowering = True
    if wanted:
        print("compiling: the first step takes half a minute or more")
        torch._dynamo.config.recompile_limit = 64  # blocks of one class share their code but not their sizes
        for block in blocks:
            block.compile(dynamic=dynamic)


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints: safetensors files whose header holds the configuration as JSON


def write_file(path, write):
    """write(temporary path), flush to disk, rename to `path`: a kill or a full disk leaves the old file whole. Of
    several processes the first writes. Raises UserError."""
    if rank():
        return
    path = Path(path)
    temporary = path.parent / f".{path.name}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as problem:
        raise UserError(f"cannot write {path}: {problem}; free some space or name another place") from None


def save_text(path, text):
    """Write a text file as write_file does."""
    write_file(path, lambda part: part.write_text(text, "utf-8", "backslashreplace"))


def save_tensors(path, tensors, header):
    """Write safetensors, with `header` as JSON under the key "config". All processes call this: it gathers shards."""
    tensors = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()} if rank() == 0 else {}
    write_file(path, lambda part: save_file(tensors, part, metadata={"config": json.dumps(header)}))


def load_tensors(path, header_only=False):
    """(name -> tensor, header or None) of a weight file or of a run folder's model.safetensors. A pickled file is read
    with weights_only, so that no code in it can run. header_only: no tensors of safetensors. Raises UserError."""
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no weights at {path}; train some first, or name a file")
    with reading(path, "weight file"):
        if path.suffix.lower() in (".pt", ".pth", ".ckpt", ".bin"):
            # Published checkpoints carry plain objects along: JiT's its options, Stable Diffusion's a callback's name.
            callback = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
            with torch.serialization.safe_globals([argparse.Namespace, (type("Callback", (), {}), callback)]):
                return plain_names(torch.load(path, map_location="cpu", weights_only=True)), None
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get("config")
        header = json.loads(header) if header and header.startswith("{") else None
        return {} if header_only else plain_names(load_file(path)), header


def plain_names(weights):
    """A state dictionary, and those within it, without torch.compile's and DistributedDataParallel's prefixes."""
    weights = {str(k).replace("_orig_mod.", "").removeprefix("module."): v for k, v in weights.items()}
    return {k: plain_names(v) if isinstance(v, dict) else v for k, v in weights.items()}


def find_weights(given, system):
    """The checkpoint to load: the file or run folder named; else the run in runs/, else the file in weights/."""
    named, own = Path(given), Path("runs") / system / "model.safetensors"
    if given:
        return named / "model.safetensors" if named.is_dir() else named
    path = own if own.exists() else Path(__file__).parent / "weights" / f"{system}.safetensors"
    print(f"weights: {path}")
    return path


def load_into(model, weights, path):
    """model.load_state_dict with a message that names the first tensors that do not fit. A sharded model takes its
    shards. Raises UserError."""
    own = model.state_dict()
    shapes, given = ({k: tuple(getattr(v, "shape", "?")) for k, v in part.items()} for part in (own, weights))
    problems = [f"{k} is missing" for k in own if k not in given] + [f"{k} is unknown" for k in given if k not in own]
    problems += [f"{k} is {given[k]}, not {shapes[k]}" for k in own if k in given and given[k] != shapes[k]]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path} does not fit this model: {'; '.join(problems[:3])}{more}")
    with reading(path, "weight file"):  # sparse and quantized tensors fail here
        model.load_state_dict({name: shard_like(tensor, own[name]) for name, tensor in weights.items()})


def shard_like(tensor, other):
    """A whole tensor, as shards if `other` is sharded. All processes have read it, and each keeps its part."""
    if not hasattr(other, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def optimizer_state(model, optimizer):
    """(torch's state dictionary, "parameter name:slot" -> each tensor in it): what the optimizer remembers of each
    parameter. torchao's 8-bit moments are several tensors each."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state, tensors = get_optimizer_state_dict(model, optimizer), {}
    for name, slots in state["state"].items():
        for slot, value in slots.items():
            if hasattr(value, "tensor_attrs"):
                tensors |= {f"{name}:{slot}.{part}": getattr(value, part) for part in value.tensor_attrs}
            else:
                tensors[f"{name}:{slot}"] = value
    return state, tensors


def load_optimizer(model, optimizer, tensors, path):
    """Put back the tensors of optimizer_state(). Raises UserError unless each is there with its own shape."""
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    state, own = optimizer_state(model, optimizer)  # a new optimizer's, all zero
    for name, tensor in own.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise UserError(f"{path}: no {name} of this model's shape; name the run that it belongs to")
        tensor.copy_(shard_like(tensors[name], tensor))
    set_optimizer_state_dict(model, optimizer, state)


# ----------------------------------------------------------------------------------------------------------------
# Pictures in: one reader for folders, webdataset's .tar and .parquet files with pictures inside

MAX_PIXELS = 64_000_000  # a picture with more is skipped before it is decoded
# Pillow's other formats are no pictures of the camera or the web, or start another program (EPS).
FORMATS = "PNG JPEG MPO WEBP AVIF GIF BMP DIB TIFF JPEG2000 PPM TGA ICO".split()
CAPTION_FIELDS = "text", "caption", "prompt", "description"


class Row(typing.NamedTuple):
    """A picture of a data set and what is written about it."""

    name: str
    picture: Path | bytes
    caption: str
    tags: list[str]


@dataclasses.dataclass
class Pictures:
    """A data set in memory. skipped: a line for each unreadable picture."""

    pictures: torch.Tensor  # (N, 3, size, size) uint8
    names: list[str]
    captions: list[str]
    tags: list[list[str]]
    skipped: list[str] = dataclasses.field(default_factory=list)

    def __len__(self):
        return len(self.names)

    def checksum(self):
        """A number that changes with the pictures, their order, captions or tags."""
        words = json.dumps([self.captions, self.tags]).encode()
        return zlib.crc32(words, zlib.crc32(self.pictures.contiguous().numpy()))


def open_picture(source, size=None):
    """A file or file object as an sRGB picture of Pillow: an animation's first frame; transparent parts white. size: a
    JPEG may be decoded at a lower resolution whose sides are at least twice that. Raises any exception."""
    Image.init()  # loads Pillow's formats, of which an old version lacks some
    with Image.open(source, formats=[kind for kind in FORMATS if kind in Image.OPEN]) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels are too many")
        if size:
            picture.draft("RGB", (2 * size, 2 * size))
        picture.load()
        if picture.mode.startswith("I;16"):  # 16 bits; Pillow would clip them at 255
            picture = picture.point(lambda value: value / 256).convert("L")
        with contextlib.suppress(Exception):  # a broken EXIF block
            picture = ImageOps.exif_transpose(picture)
        profile = picture.info.get("icc_profile")
        if picture.mode == "P" or picture.has_transparency_data:
            shown, picture = picture.convert("RGBA"), Image.new("RGB", picture.size, "white")
            picture.paste(shown, mask=shown)
        if profile:
            with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a broken profile
                colours = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
                picture = ImageCms.profileToProfile(picture, *colours, outputMode="RGB")
        return picture.convert("RGB")


def read_picture(source, size):
    """A file, or the bytes of one, as (size, size, 3) uint8: the centre square. Raises as open_picture."""
    picture = open_picture(io.BytesIO(source) if isinstance(source, bytes) else source, size)
    return np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS))


def make_row(name, picture, record, text=""):
    """A Row. Its caption is the first of CAPTION_FIELDS in the record that is not empty, or else `text`."""
    captions = [record[key] for key in CAPTION_FIELDS if isinstance(record.get(key), str)]
    caption = next(filter(None, map(str.strip, [*captions, text])), "")
    tags = record.get("tags") or []
    tags = tags.split(",") if isinstance(tags, str) else tags
    return Row(name, picture, caption, [str(tag).strip() for tag in tags])


def folder_rows(folder):
    """The pictures below a folder, sorted by name, without hidden ones. Captions are in metadata.jsonl or .csv, as in
    Hugging Face's imagefolder, or in .txt or .caption files beside the pictures. A row whose file_name is no picture
    (another folder, backslashes, other capitals or Unicode) belongs to the one that has that name in any folder."""

    def last_part(path):
        return unicodedata.normalize("NFC", re.split(r"[/\\]", str(path))[-1]).casefold()

    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    suffixes, by_name, lost = Image.registered_extensions(), collections.defaultdict(list), []
    records = {path: {} for path in files if path.suffix.lower() in suffixes}  # picture -> its row of metadata
    for path in records:
        by_name[last_part(path)].append(path)
    for path in (path for path in files if path.name in ("metadata.jsonl", "metadata.csv")):
        with reading(path, "table of pictures, with file_name and text or tags in each row"):
            lines = io.StringIO(path.read_text("utf-8-sig"))
            for record in csv.DictReader(lines) if path.suffix == ".csv" else map(json.loads, filter(str.strip, lines)):
                if not isinstance(record.get("file_name"), str):
                    raise ValueError(f"no file_name among {', '.join(record)}")
                named = path.parent / record["file_name"]
                same = [named] if named in records else by_name[last_part(named)]
                if len(same) == 1:
                    records[same[0]] = record
                else:
                    lost.append(named)
    if lost:
        print(printable(f"{len(lost)} rows of metadata match no picture, such as {lost[0]}, which is not there"))
    for path, record in records.items():
        beside = filter(Path.is_file, (path.with_suffix(".caption"), path.with_suffix(".txt")))
        text = next((file.read_text("utf-8-sig", "replace") for file in beside), "")
        yield make_row(path.relative_to(folder).as_posix(), path, record, text)


def tar_rows(path):
    """The samples of a webdataset file: members that share a name up to its first dot, a picture and .json or .txt."""
    suffixes = Image.registered_extensions()
    with tarfile.open(path) as file:
        # x/0001.seg.png -> (x/0001, .seg.png, member)
        members = ((*re.fullmatch(r"((?:.*/)?[^.]*)(.*)", m.name, re.S).groups(), m) for m in file if m.isfile())
        for _, sample in itertools.groupby(members, lambda member: member[0]):
            parts = {kind.lower(): (m.name, file.extractfile(m).read()) for _, kind, m in sample}
            record = json.loads(parts[".json"][1]) if ".json" in parts else {}
            text = parts[".txt"][1].decode("utf-8", "replace") if ".txt" in parts else ""
            for kind in list(filter(suffixes.get, parts))[:1]:
                yield make_row(*parts[kind], record, text)


def parquet_rows(path):
    """The rows of a .parquet file with pictures inside, as Hugging Face stores them: {"bytes": ..., "path": ...}."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path} needs a package that is not here: pip install pyarrow") from None
    records = (record for batch in ParquetFile(path).iter_batches(64) for record in batch.to_pylist())
    for number, record in enumerate(records):
        column = next((value for value in record.values() if isinstance(value, dict) and "bytes" in value), None)
        if not column:
            raise ValueError(f"no column of pictures among {', '.join(record)}")
        yield make_row(column.get("path") or f"{path.stem}-{number:06d}", column["bytes"] or b"", record)


def find_rows(data):
    """The Row of each picture in folders, .tar and .parquet files, always in the same order. Raises UserError."""
    for name in data:
        path = Path(name)
        kind = {".tar": tar_rows, ".parquet": parquet_rows}.get(path.suffix.lower())
        if path.is_dir() and name:  # Path("") is the current folder
            yield from folder_rows(path)
        elif kind and path.is_file():
            with reading(path, "file of pictures"):
                yield from kind(path)
        else:
            what = "no such folder, .tar or .parquet file; leave --data out for drawn pictures"
            raise UserError(f"--data {path}: {what}")


def first_rows(data, count):
    """The first `count` Rows of --data [all]. Those of folders, which hold no picture yet, are a list, whose length
    tells a bar the time left."""
    rows = itertools.islice(find_rows(data), count)
    return list(rows) if all(map(os.path.isdir, data)) else rows


def decode_rows(rows, size, skipped):
    """(row, (size, size, 3) uint8) for each Row whose picture is readable; for others `skipped` gets a line. Threads
    decode, since Pillow works outside Python's lock; few of them, since a large picture takes half a gigabyte."""

    def decode(row):
        try:
            return row, read_picture(row.picture, size)
        except Exception as problem:  # Pillow raises nearly anything on a broken file
            return f"{row.name}: {str(problem)[:100]}"

    rows = iter(rows)
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        while chunk := list(itertools.islice(rows, 64)):
            for result in pool.map(decode, chunk):
                if isinstance(result, str):
                    skipped.append(result)
                else:
                    yield result


def picture_tensor(pictures):
    """Arrays (S, S, 3) uint8 -> (N, 3, S, S) uint8."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def load_pictures(data, size, paint=None, count=10_000, first=None):
    """What --data names -> Pictures. data: paths, or ("drawn",), which is `count` pictures of `paint` [paint_face].
    first: how many of them are taken [all]. Raises UserError if no picture can be read."""
    if tuple(data) == ("drawn",):
        return paint_set(paint or paint_face, min(first or count, count), size)
    pictures, words, skipped = [], [], []
    rows = tqdm(first_rows(data, first), "reading", unit=" pictures", leave=False)
    for row, picture in decode_rows(rows, size, skipped):
        pictures.append(picture)
        words.append((row.name, row.caption, row.tags))
    if not pictures:
        what = f"{len(skipped)} files could not be read, such as {skipped[0]}" if skipped else "it holds no pictures"
        raise UserError(f"--data {' '.join(data)}: {what}")
    return Pictures(picture_tensor(pictures), *map(list, zip(*words)), skipped)


def end_with_parent():
    """In a process that paints: leave Ctrl-C to the parent process and, on Linux, end when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def paint_set(paint, count, size):
    """paint(seed, size) -> (RGB picture, caption, tags) for the seeds 0 to count - 1, as Pictures. All cores paint; the
    result is kept in data/ for the next time, under a name that changes with the tables it is painted from."""
    version = zlib.crc32(json.dumps([picture_tables("faces"), picture_tables("scenes")]).encode())
    cache = Path("data") / f"{paint.__name__}-{count}-{size}-{version:08x}.safetensors".replace("_", "-")
    with main_process_first():
        if not cache.exists():
            # Pillow's drawing holds Python's lock, so this takes processes; forked ones need not import torch again.
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
            with concurrent.futures.ProcessPoolExecutor(None, context, end_with_parent) as pool:
                painted = pool.map(paint, range(count), itertools.repeat(size), chunksize=100)
                bar = tqdm(painted, "painting", count, unit=" pictures", leave=False)
                pictures, captions, tags = zip(*((np.asarray(picture), *words) for picture, *words in bar))
            save_tensors(cache, {"pictures": picture_tensor(pictures)}, {"captions": captions, "tags": tags})
    tensors, words = load_tensors(cache)
    names = [f"{paint.__name__} {seed}" for seed in range(count)]
    return Pictures(tensors["pictures"], names, words["captions"], words["tags"])


def tell_skipped(skipped, path=None):
    """Print how many pictures were skipped and the first three; write all to `path` if it is given."""
    if skipped:
        lines = list(map(printable, skipped))
        print(f"skipped {len(lines)} pictures: {'; '.join(lines[:3])}" + (f"; all in {path}" if path else ""))
        if path:
            save_text(path, "\n".join(lines) + "\n")


def random_flip(x, probability, rng):
    """Mirror each picture or latent of x (B, C, H, W) with this probability; rng: a BatchRng of B rows."""
    return torch.where(rng.rand(1, 1, 1) < probability, x.flip(-1), x)


def batch_index(config, count, step):
    """The config.batch_size sample numbers, below count, of a step: in a new order in each epoch."""
    numbers = range(step * config.batch_size, (step + 1) * config.batch_size)
    epochs = {n // count for n in numbers}
    orders = {epoch: torch.randperm(count, generator=generator(config.seed, epoch, 5)) for epoch in epochs}
    return [int(orders[n // count][n % count]) for n in numbers]


# ----------------------------------------------------------------------------------------------------------------
# Shards of latents: a data set encoded once, some hundreds of pictures per safetensors file


@dataclasses.dataclass
class EncodeConfig:
    """The options of a subcommand that writes shards."""

    data: tuple[str, ...] = option((), "folders of pictures, .tar or .parquet files")
    num_samples: int | None = option(None, "take only the first pictures of --data, as many as this", low=1)
    out: str = option("", "folder for the shards")
    vae: str = option("", "autoencoder: a file or a folder")
    image_size: int = option(256, "side of the pictures in pixels", low=8)
    shard_size: int = option(250, "pictures per file: the most that a kill can cost", low=1)
    batch_size: int = option(16, "pictures encoded at a time", low=1)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = option("auto", "of matrix products", choices=("auto", "fp32", "bf16", "fp16"))


def version(picture):
    """What changes when the file of a picture does: its size and its time of modification."""
    if isinstance(picture, bytes):
        return len(picture), 0
    return picture.stat().st_size, picture.stat().st_mtime_ns


@torch.no_grad()
def write_shards(config, header, encode, extra=None):
    """Encode the pictures of config.data into files of config.out; after a kill the same call goes on with the first
    one missing. header: what all files have in common; encode(pictures (B, 3, S, S) in [-1, 1], rows) -> name -> tensor
    of B rows; extra: name -> tensor, in every file. Returns (number of pictures, skipped lines). Raises UserError."""
    rows = first_rows(config.data, config.num_samples)
    rows, done, skipped = iter(tqdm(rows, "encoding", unit=" pictures")), 0, []
    for number in itertools.count():
        part = list(itertools.islice(rows, config.shard_size))
        if not part:
            return done, skipped
        path = Path(config.out) / f"shard_{number:05d}.safetensors"
        about = header | {"source": [[row.name, *version(row.picture)] for row in part]}
        if path.exists():
            found = load_tensors(path, header_only=True)[1] or {}
            if any(found.get(key) != value for key, value in about.items()):
                pairs = zip(about["source"], found.get("source", []))
                stale = next((f" ({new[0]} differs)" for new, old in pairs if new != old), "")
                what = f"was made from other pictures or settings; delete it or name another --out{stale}"
                raise UserError(f"{path} {what}")
        else:
            unread, batches = [], collections.defaultdict(list)
            good = list(decode_rows(part, config.image_size, unread))
            for start in range(0, len(good), config.batch_size):
                some, pictures = zip(*good[start : start + config.batch_size])
                for name, tensor in encode(picture_tensor(pictures) / 127.5 - 1, some).items():
                    batches[name].append(tensor.bfloat16().cpu())
                    for row, value in zip(some, batches[name][-1]):
                        if not value.isfinite().all():
                            raise UserError(f"{row.name}: its latent is not finite; try --precision fp32")
            tensors = {name: torch.cat(parts) for name, parts in batches.items()}
            found = about | {"rows": [[row.name, row.caption, row.tags] for row, _ in good], "skipped": unread}
            save_tensors(path, tensors | (extra or {}), found)
        done += len(found["rows"])
        skipped += found["skipped"]


def has_shards(data):
    """Whether --data names a folder of shards."""
    return len(data) == 1 and any(Path(data[0]).glob("shard_*.safetensors"))


class Shards:
    """A folder of shards. The files are mapped into memory, so 200,000 latents and texts need 25 GB of disk but little
    memory. tensors: the names that read() returns; header: what all files have in common. Raises UserError."""

    def __init__(self, folder, tensors):
        self.tensors, self.places, self.skipped, rows, headers = tensors, [], [], [], []
        for path in sorted(Path(folder).glob("shard_*.safetensors")):
            with reading(path, f"shard with {' and '.join(tensors)}; delete it and encode again"):
                file = safe_open(path, "pt")
                header = json.loads(file.metadata()["config"])
                if header["rows"] and not set(tensors) <= set(file.keys()):
                    raise ValueError("it has other tensors")
                self.places += [(file, row) for row in range(len(header["rows"]))]
                rows += header.pop("rows")
                self.skipped += header.pop("skipped")
                header.pop("source")
                headers.append(header)
        if not rows or any(header != headers[0] for header in headers):
            what = "hold no samples or were made with different settings; encode again"
            raise UserError(f"the shards in {folder} {what}")
        self.header, (self.names, self.captions, self.tags) = headers[0], map(list, zip(*rows))

    def __len__(self):
        return len(self.names)

    def checksum(self):
        """A number that changes with the pictures' names, captions, tags or the encoder."""
        return zlib.crc32(json.dumps([self.names, self.captions, self.tags, self.header]).encode())

    def read(self, index):
        """Rows `index` of each of the tensors, float32. Raises UserError for numbers that are not finite."""
        places = [self.places[i] for i in index]
        parts = [torch.cat([f.get_slice(n)[row : row + 1] for f, row in places]).float() for n in self.tensors]
        for part in parts:
            for i in (~part.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist():
                raise UserError(f"the latent of {self.names[index[i]]} is not finite; delete its shard, encode again")
        return tuple(parts)

    def extra(self, name):
        """A tensor that every file holds."""
        return self.places[0][0].get_tensor(name).float()


# ----------------------------------------------------------------------------------------------------------------
# Pictures out


def to_uint8(rgb):
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8 numpy."""
    return (rgb.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def make_grid(rgb, columns=None):
    """(B, 3, H, W) in [0, 1] -> one PIL picture, nearly square unless `columns` says otherwise."""
    from skimage.util import montage

    columns = columns or math.ceil(math.sqrt(len(rgb)))
    shape = math.ceil(len(rgb) / columns), columns
    return Image.fromarray(montage(to_uint8(rgb), fill=(255, 255, 255), grid_shape=shape, channel_axis=-1))


def picture_format(path):
    """Pillow's name of the format that a path's suffix stands for. Raises UserError where it cannot be written."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE or Path(path).is_dir():
        raise UserError(f"{path}: name a picture file, such as a .png, or a .gif for an animation")
    return kind


def save_picture(picture, path, **options):
    """Write a PIL picture in the format of the path's suffix. Raises UserError."""
    kind = picture_format(path)
    write_file(path, lambda part: picture.save(part, format=kind, **options))


def record_frames(to_picture, wanted=True):
    """(frames, callback) for an animation of ten frames. callback(x, part), with part from 0 (noise) to 1 (data), adds
    to_picture(x) to the list when the next tenth is reached. Nothing is added unless wanted."""
    frames = []

    def callback(x, part):
        if wanted and part >= len(frames) / 9 - 1e-6:
            frames.append(to_picture(x))

    return frames, callback


def write_samples(rgb, names, config, frames=(), columns=None):
    """Write samples (B, 3, H, W) in [0, 1]: a grid to config.out, single pictures to config.each under their names, and
    the frames to config.gif. Raises UserError for numbers that are not finite, which would be black."""
    if not rgb.isfinite().all():
        raise UserError("the samples are not finite numbers; try --precision fp32, or an earlier checkpoint")
    save_picture(make_grid(rgb, columns), config.out)
    print(f"{len(rgb)} pictures in {config.out}")
    if config.each:
        for name, picture in zip(names, to_uint8(rgb)):
            save_picture(Image.fromarray(picture), Path(config.each) / f"{name}.png")
    if config.gif:
        durations = [200] * (len(frames) - 1) + [1600]  # milliseconds
        save_picture(frames[0], config.gif, save_all=True, append_images=frames[1:], duration=durations, loop=0)


CURVE_COLOURS = "#1f77b4", "#d9541e", "#3a923a", "#8a5bd0", "#b08a1e", "#c2457f", "#1f9a9a", "#777777", "#000000"


def chart(title, curves, floor=None, axes=None, size=(640, 320)):
    """Curves, name -> [(x, y > 0)], over a logarithmic y axis, as a PIL picture. floor: a level to be drawn as a curve
    of that name, such as the distance of real pictures from each other. axes: the curves that the axes must have room
    for [these ones], so that several charts can be compared. A curve named "expected" is grey, behind the others."""
    image, font = Image.new("RGB", size, "white"), ImageFont.load_default(13)
    curves = {name: curve[:: max(1, len(curve) // 400)] for name, curve in curves.items() if curve}
    points = list(itertools.chain(*(axes or curves).values()))
    last = max((x for x, _ in points), default=0) or 1
    if floor is not None:
        curves["floor"] = [(0, floor), (last, floor)]
    ys = [max(y, 1e-6) for _, y in points + curves.get("floor", [])] or [1]
    low, high = min(ys) / 1.1, max(ys) * 1.1
    pen, left, right, top, bottom = ImageDraw.Draw(image), 56, size[0] - 24, 36, size[1] - 32
    right -= 106 * (len(curves) > 1)  # room for the names

    def place(x, y):
        up = math.log(max(y, low) / low) / math.log(high / low)
        return left + x / last * (right - left), bottom - up * (bottom - top)

    pen.text((left, 8), title, "black", font)
    pen.line([(left, top), (left, bottom), (right, bottom)], "black")
    factors = (1, 2, 5) if bottom - top > 50 * math.log10(high / low) else (1,)
    for y in (a * 10.0**b for b in range(-6, 7) for a in factors):
        if low <= y <= high:
            pen.text((left - 6, place(0, y)[1]), f"{y:g}", "black", font, "rm")
    for x in (0, last / 2, last):
        pen.text((place(x, low)[0], bottom + 6), f"{x:,g}", "black", font, "ma")
    for i, (name, curve) in reversed(list(enumerate(curves.items()))):
        colour = "#aaaaaa" if name == "expected" else CURVE_COLOURS[i % len(CURVE_COLOURS)]
        pen.line([place(x, y) for x, y in curve], colour, 2)
        if len(curves) > 1:
            pen.text((right + 6, top + 18 * i), name, colour, font)
    return image


def stack_pictures(pictures):
    """PIL pictures one below the other, on white."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (0, sum(p.height for p in pictures[:i])))
    return sheet


def html_picture(picture, caption=""):
    """A PIL picture as an HTML figure that holds the picture itself. A click, or the space bar, enlarges it."""
    picture.save(data := io.BytesIO(), "PNG")
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    image = f'<label><input type="checkbox"><img src="{source}"></label>'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def html_table(rows):
    """Rows of cells as an HTML table."""
    lines = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


PAGE_STYLE = """
body {font: 15px/1.5 sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere}
div {display: grid; gap: 0 1rem; grid-template-columns: repeat(auto-fill, minmax(min(14rem, 45%), 1fr))}
figure {margin: 0 0 1rem} img {max-width: 100%; cursor: zoom-in} div img {width: 100%}
input {position: absolute; opacity: 0} :focus-visible + img {outline: 2px solid}
figure:has(:checked) {grid-column: 1 / -1} :checked + img {max-width: none; cursor: zoom-out}
div :checked + img {max-height: 95vh; object-fit: contain}
td {padding-right: 1rem; border-bottom: 1px solid #ddd}
"""


def save_page(path, title, body):
    """Write an HTML page that needs no other file and no script, and can be read on a phone. A <div> is a grid."""
    head = '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    title = html.escape(title)
    save_text(path, f"{head}<title>{title}</title><style>{PAGE_STYLE}</style><h1>{title}</h1>{body}</html>\n")


# ----------------------------------------------------------------------------------------------------------------
# Run folders: the clock, the log, checkpoints, samples and the page of one training run

NOISE_BINS = 8
LOG_EVERY = 10
LOG_COLUMNS = ["step", "seconds", "images", "loss", "lr", "grad_norm", "images_per_second"]
LOG_COLUMNS += [f"loss_bin_{k}" for k in range(NOISE_BINS)]
MARKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # parts of the budget at which pictures are sampled
# Options that may differ when a run goes on; a file adds its own. All others would change its numbers.
MAY_CHANGE = {"data", "out", "minutes", "steps", "epochs", "grad_accum", "device", "compile"}
MAY_CHANGE |= {"checkpoint_every", "fsdp", "resume", "cfg"}


def read_log(folder):
    """The lines of a run's log.csv as dictionaries of text, without damaged ones, such as one that was cut short."""
    log = folder / "log.csv"
    lines = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
    pattern = rf"\d+(,[-+.e\d]*){{{len(LOG_COLUMNS) - 1}}}"
    return list(csv.DictReader((line for line in lines if re.fullmatch(pattern, line)), LOG_COLUMNS))


def expected_run(system, config):
    """The run in assets/expected.json with the settings of this config, {"run": what it was, "settings", "neutral",
    "curve": [[pictures, loss], ...]}, or None. neutral: options that do not decide what the loss measures."""
    own = json.loads(json.dumps(vars(config))) | {"system": system}
    runs = json.loads((Path(__file__).parent / "assets" / "expected.json").read_text("utf-8"))
    return next((r for r in runs if r["settings"] == {k: v for k, v in own.items() if k not in r["neutral"]}), None)


class Run:
    """A run folder and its clock. A training loop calls start(), for each of steps() add() in each pass, log(), save()
    if checkpoint_due and save_pictures() if pictures_due; and finish(). header: what the checkpoints' headers hold
    beside system, step and config. endless: a run without a budget may go on until Ctrl-C. enough: about as many
    pictures as painted data need; a run by the clock that sees fewer says so. Raises UserError."""

    def __init__(self, config, system, may_change=(), endless=False, enough=0):
        self.config, self.system, self.folder = config, system, Path(config.out)
        self.state_path, self.may_change = self.folder / "state.safetensors", MAY_CHANGE | set(may_change)
        self.step, self.images, self.best = 0, 0, math.inf
        self.now = self.first_seconds = 0.0
        self.header, self.passes, self.window = {}, [], []
        self.enough, self.warned = enough if config.minutes else 0, False
        self.done = self.interrupted = self.pictures_due = self.checkpoint_due = False
        self.endless = not (config.minutes or config.steps or config.epochs)
        if self.endless and not endless:
            raise UserError("a run needs an end: give --minutes, --steps or --epochs")
        self.resuming = bool(all_max(self.open_folder() if rank() == 0 else False)[0])

    def open_folder(self):
        """Make the folder and lock it; returns whether the run goes on from a checkpoint."""
        has_state, restarted = self.state_path.exists(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        if self.config.resume is not None and not has_state and not restarted:
            raise UserError(f"nothing to resume in {self.folder}: no checkpoint; start a run without --resume")
        if has_state and self.config.resume is None and not restarted:
            raise UserError(f"{self.folder} holds a run; add --resume to go on with it, or name another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / ".lock", "a+")  # noqa: SIM115
        with contextlib.suppress(ImportError):  # Windows has no such lock
            import fcntl

            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.lock.seek(0)
                what = f"another run is writing to {self.folder}; name another --out"
                raise UserError(f"{what} (process {self.lock.read().strip()})") from None
        self.lock.truncate(0)
        print(os.getpid(), file=self.lock, flush=True)
        for path in [*self.folder.glob(".*.part"), *self.folder.glob(".tmp*")]:  # a run killed while it wrote
            path.unlink()
        return has_state

    def start(self, model, ema, optimizer, scaler, about, num_samples=None, skipped=()):
        """Load the state if the run goes on, and print what starts. about: data, precision and device in a few words;
        num_samples: of one epoch. Returns the state's header, {} for a fresh run. Raises UserError."""
        epoch_steps = self.config.epochs and self.config.epochs * math.ceil(num_samples / self.config.batch_size)
        self.total_steps = min(filter(None, (self.config.steps, epoch_steps)), default=None)
        self.fp16 = scaler.is_enabled()
        state = self.load(model, ema, optimizer, scaler) if self.resuming else {}
        if rank() == 0:  # drop what is later than the checkpoint
            for path in self.folder.glob("samples/step_*.png"):
                if int(path.stem[5:]) > self.step:
                    path.unlink()
            rows = [LOG_COLUMNS, *(row.values() for row in read_log(self.folder) if int(row["step"]) <= self.step)]
            save_text(self.folder / "log.csv", "".join(",".join(row) + "\n" for row in rows))
        tell_skipped(skipped, self.folder / "skipped.txt")
        size = sum(p.numel() for p in model.parameters()) / 1e6
        what = f"resumed at step {self.step}" if self.step else "fresh run"
        print(f"{what} in {self.folder}: {size:.1f}M parameters, {about}")
        return state

    @property
    def progress(self):
        """0 at the start, 1 when a budget is used up. Time counts from the end of the first step, which may include
        compiling. With a budget of steps alone no clock enters, so that every run has the same learning rates."""
        by_steps, by_time = self.step / self.total_steps if self.total_steps else 0.0, 0.0
        if self.config.minutes:
            by_time = (self.now - self.first_seconds) / max(60 * self.config.minutes - self.first_seconds, 1e-3)
        return min(1.0, max(by_steps, by_time))

    def steps(self):
        """The numbers of the steps that are left. Ctrl-C, SIGTERM and SIGHUP end the run after a step, with a save."""
        self.started, self.window_started = time.perf_counter() - self.now, self.now
        self.done = self.progress >= 1

        def interrupt(signum, frame):
            if self.interrupted and world() == 1:  # the second time; other processes must not be left waiting
                raise KeyboardInterrupt
            self.interrupted = True
            os.write(2, b"\nstopping and saving; Ctrl-C once more stops without\n")

        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        old = {number: signal.signal(number, interrupt) for number in numbers}
        try:
            while not self.done:
                yield self.step
        finally:
            print(file=sys.stderr)  # ends the line of write_line()
            # Under torchrun Ctrl-C arrives twice, the second time from torchrun; that must not end finish().
            ignored = self.interrupted and world() > 1
            for number, handler in old.items():
                signal.signal(number, signal.SIG_IGN if ignored else handler)

    def add(self, loss, times):
        """Note the loss of each picture of one pass, (B,), and its time, (B,) in [0, 1]."""
        loss = loss.detach().float()
        self.passes.append(torch.stack((loss, times.to(loss)), dim=1))

    def log(self, grad_norm, lr):
        """Count an optimizer step, write every tenth to log.csv, and decide what is due. Raises UserError if the loss
        or, without fp16's scaler, the gradient is not finite; the last checkpoint stays as it is."""
        rows = torch.cat(self.passes).cpu()  # (b, 2): loss and time of each picture
        now, stop = time.perf_counter() - self.started, self.interrupted
        if dist.is_initialized():  # the rows of all processes, and one decision for all
            parts = [torch.empty_like(rows) for _ in range(world())]
            dist.all_gather(parts, rows)
            rows = torch.cat(parts)
            now, stop = all_max(now, stop)
        grad_norm = float(grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm)
        if not rows.isfinite().all() or not (math.isfinite(grad_norm) or self.fp16):
            good = f"the last checkpoint is {self.state_path}" if self.state_path.exists() else "nothing was saved"
            what = f"loss {rows[:, 0].mean():g}, gradient {grad_norm:g} at step {self.step + 1}"
            raise UserError(f"{what}; {good}; try a lower --lr or --precision fp32")
        before = self.progress
        self.step += 1
        self.images += len(rows)
        self.now, self.passes = now, []
        self.window.append((rows, grad_norm))
        if stop:  # (not assigned otherwise: a signal may have come in between)
            self.interrupted = True
        if self.step == 1:
            self.first_seconds = self.now
        self.done = self.progress >= 1 or bool(stop)
        if self.step % LOG_EVERY == 0 or self.done:
            self.write_line(lr)
        every = self.step % self.config.checkpoint_every == 0
        self.pictures_due = any(before < mark <= self.progress for mark in MARKS) or (every and self.endless)
        self.checkpoint_due = self.pictures_due or self.done or every

    def write_line(self, lr):
        """One line of log.csv, and the line on the screen, from the steps since the last line."""
        rows, norms = zip(*self.window)
        losses, times = torch.cat(rows).unbind(dim=1)
        bins = (times * NOISE_BINS).long().clamp(0, NOISE_BINS - 1)
        by_noise = [losses[bins == k].mean().item() if (bins == k).any() else "" for k in range(NOISE_BINS)]
        speed, loss = len(losses) / (self.now - self.window_started), losses.mean().item()
        row = [self.step, self.now, self.images, loss, lr, sum(norms) / len(norms), speed, *by_noise]
        if rank() == 0:
            with open(self.folder / "log.csv", "a") as file:
                file.write(",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in row) + "\n")
            about = f"{self.progress:4.0%}, step {self.step}, loss {loss:.4f}, {speed:.0f} images/s"
            print(f"\r{about}, {self.now / 60:.1f} minutes ", end="", file=sys.stderr, flush=True)
            if self.enough and self.now > 60 and not self.warned:
                self.warned = True
                self.warn_if_few(self.images / self.progress)
        self.window, self.window_started = [], self.now

    def warn_if_few(self, images):
        """Say so if the run ends after `images` pictures and these are too few."""
        if images < self.enough:
            minutes, more = self.config.minutes, math.ceil(self.config.minutes * self.enough / images)
            what = f"{minutes:g} minutes of this machine are {images:,.0f} pictures; clear ones need {self.enough:,}"
            print(f"\n{what}: go on afterwards by the same command with --resume --minutes {more}", file=sys.stderr)

    def settings(self):
        """The header of every checkpoint."""
        return {"system": self.system, "step": self.step, "config": dataclasses.asdict(self.config)} | self.header

    def save(self, model, ema, optimizer, scaler, held_out_loss=None, **state):
        """Write model.safetensors, which sampling needs, state.safetensors, which resuming needs, and the page. With a
        held_out_loss, best.safetensors is the model.safetensors with the lowest. state: more of the state's header."""
        weights = ema.state_dict()
        save_tensors(self.folder / "model.safetensors", weights, self.settings())
        if held_out_loss is not None and held_out_loss < self.best:
            self.best = held_out_loss
            save_tensors(self.folder / "best.safetensors", weights, self.settings() | {"held_out_loss": self.best})
        tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in weights.items()}
        tensors |= {f"optimizer.{k}": v for k, v in optimizer_state(model, optimizer)[1].items()}
        clock = {"images": self.images, "seconds": self.now, "first_seconds": self.first_seconds, "best": self.best}
        save_tensors(self.state_path, tensors, self.settings() | clock | {"scaler": scaler.state_dict()} | state)
        self.write_page()

    def load(self, model, ema, optimizer, scaler):
        """Put everything back as save() found it. Returns the header. Raises UserError."""
        tensors, header = load_tensors(self.state_path)
        if not header or header.get("system") != self.system:
            raise UserError(f"{self.state_path} is not a run of {self.system}.py; name another --out")
        with reading(self.state_path, "checkpoint"):
            ours = json.loads(json.dumps(self.settings()))
            for name, value in header["config"].items():
                own = ours["config"].get(name, value)
                if name not in self.may_change and own != value:
                    flag = flag_of(self.config.__dataclass_fields__[name])
                    raise UserError(f"{self.folder} was made with {flag} {value}, not {own}; leave {flag} out")
            for name in self.header:
                if header.get(name) != ours[name] and not isinstance(ours[name], float):
                    what = f"began with another {name}; resume with the same, or name another --out"
                    raise UserError(f"{self.folder} {what}")
            self.header = {name: header.get(name) for name in self.header}
            parts = {part: {} for part in ("model", "ema", "optimizer")}
            for name, tensor in tensors.items():
                part, _, key = name.partition(".")
                parts[part][key] = tensor
            load_into(model, parts["model"], self.state_path)
            load_into(ema, parts["ema"], self.state_path)
            load_optimizer(model, optimizer, parts["optimizer"], self.state_path)
            scaler.load_state_dict(header["scaler"])
            self.step, self.images, self.best = int(header["step"]), int(header["images"]), float(header["best"])
            self.now, self.first_seconds = float(header["seconds"]), float(header["first_seconds"])
            if self.step < 0:
                raise ValueError(f"step {self.step}")
        return header

    def save_pictures(self, rgb):
        """(B, 3, H, W) in [0, 1] -> samples/step_000500.png, and into the page."""
        save_picture(make_grid(rgb), self.folder / "samples" / f"step_{self.step:06d}.png")
        self.write_page()

    def write_page(self):
        """index.html: samples, loss curves and configuration in one file without scripts."""
        if rank():
            return
        rows, samples = read_log(self.folder), ""
        for path in sorted((self.folder / "samples").glob("step_*.png")):
            with Image.open(path) as picture:
                samples += html_picture(picture, f"step {int(path.stem[5:]):,}")

        def curve(column):
            return [(int(row["images"]), float(row[column])) for row in rows if row[column]]

        curves, about = {"this run": curve("loss")}, ""
        if expected := expected_run(self.system, self.config):
            end = self.images / (self.progress or 1)  # of this run, by pictures seen
            curves["expected"] = [(x, y) for x, y in expected["curve"] if x <= end]
            about = f"Expected: {expected['run']}. Other pictures, or another length, have another loss."
        bins = {f"t {k / NOISE_BINS:g} to {(k + 1) / NOISE_BINS:g}": curve(f"loss_bin_{k}") for k in range(NOISE_BINS)}
        charts = [chart(name, {name: bins[name]}, axes=bins, size=(240, 180)) for name in bins if bins[name]]
        body = f"<p>step {self.step:,}, {self.images:,} pictures, {self.now / 60:.1f} minutes</p>"
        body += f"<h2>Samples (click to enlarge)</h2><div>{samples}</div><h2>Loss by pictures seen</h2>"
        body += html_picture(chart("mean over all times t", curves, size=(520, 300)), about)
        body += f"<div>{''.join(map(html_picture, charts))}</div>"
        body += f"<h2>Settings</h2>{html_table(vars(self.config).items())}"
        save_page(self.folder / "index.html", f"{self.system}: {self.folder}", body)

    def finish(self):
        """Print where the results are; returns the exit code, 130 after Ctrl-C."""
        told = f"stopped and saved at step {self.step}; to go on, give the same command with --resume"
        if not self.interrupted:
            minutes = self.now / 60
            told = f"{self.step} steps, {self.images:,} pictures, {minutes:.1f} minutes; open {self.folder}/index.html"
        if rank() == 0 and not self.interrupted:
            self.warn_if_few(self.images)
        print(told, flush=True)  # now, because a process that ends first can break the barrier of the others
        if world() > 1:
            dist.barrier()  # all files are written before any process ends
        return 130 if self.interrupted else 0


@dataclasses.dataclass
class ExportConfig:
    """The options of `export`."""

    weights: str = option("", "checkpoint or run folder (default: the run in runs/)")
    out: str = option("small.safetensors", "file to write")


def export(system):
    """The subcommand `export`: a run's model.safetensors in bfloat16, half as large."""

    def command(config):
        tensors, header = load_tensors(find_weights(config.weights or f"runs/{system}", system))
        save_tensors(config.out, {name: tensor.bfloat16() for name, tensor in tensors.items()}, header)
        print(f"{config.out}: {Path(config.out).stat().st_size / 1e6:.1f} MB")

    return command, ExportConfig, None, "write a run's weights in half the bytes, e.g. export --out small.safetensors"


# ----------------------------------------------------------------------------------------------------------------
# Pages: a system in the browser, by the optional package gradio


@dataclasses.dataclass
class DemoConfig(LoadConfig):
    """The options of a subcommand that opens a page."""

    port: int | None = option(None, "port on 127.0.0.1 (default: the first free one from 7860)", low=1, high=65535)


def stream(run):
    """Yield (x, t) for each state that run(callback=...) gives its callback, while it runs in a thread of its own."""
    states = queue.SimpleQueue()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        done = pool.submit(run, callback=lambda *state: states.put(state))
        done.add_done_callback(lambda _: states.put(None))
        yield from iter(states.get, None)
        done.result()  # raises what run() raised


def flow_frames(run, end, to_rgb, notes=()):
    """What a tab of open_page() shows of a run of rectified flow with the data at t = end: x_t, the data to which its
    step leads if it is continued (of an Euler step, what the network predicts), and a caption that ends with notes."""
    for i, ((x, t), (x_next, t_next)) in enumerate(itertools.pairwise(stream(run))):
        x_hat = x + (end - t) / (t_next - t) * (x_next - x)
        yield to_rgb(x), to_rgb(x_hat), "; ".join([f"step {i}, t = {t:.2f}", *notes])
    yield to_rgb(x_next), to_rgb(x_next), "; ".join([f"step {i + 1}, t = {t_next:.2f}", *notes])


def add_input(gr, label, value):
    """gradio's component for one of a tab's inputs."""
    if isinstance(value, tuple):
        return gr.Slider(*value, step=1 if isinstance(value[2], int) else 0.5, label=label, buttons=[])
    if isinstance(value, list):
        return gr.Radio(value, value=value[0], label=label)
    if isinstance(value, str):
        return gr.Textbox(value, label=label)
    brush = gr.Brush(default_size=40, colors=["#e0262b"], color_mode="fixed")
    tools = dict(type="pil", brush=brush, layers=False, transforms=(), sources=("upload",), buttons=[], height=480)
    return gr.ImageEditor(value, label=label, canvas_size=value["background"].size, **tools)


def add_tab(gr, name, panels, function, inputs, examples=(), start=False):
    """Inputs and a button; beside them the panels, a caption, and a slider over all frames. start: show frames of the
    initial values from the beginning."""

    def frames(*values):
        for *rgbs, caption in function(**dict(zip(inputs, values))):
            grids = map(make_grid, rgbs)  # a browser would show them small, as they are
            yield *(ImageOps.scale(grid, max(1, 480 // grid.width)) for grid in grids), caption

    def run(*values):
        made = []
        try:
            for frame in frames(*values):
                made.append(frame)
                yield *frame, made, gr.update(value=len(made) - 1, maximum=max(1, len(made) - 1))
        except UserError as problem:
            yield *[gr.skip()] * len(panels), f"error: {printable(problem)}", gr.skip(), gr.skip()

    with gr.Row():
        with gr.Column(scale=2):
            components = [add_input(gr, key.replace("_", " "), value) for key, value in inputs.items()]
            button = gr.Button(name, variant="primary")
            if examples:
                gr.Examples([[example] for example in examples], components[0], label="examples")
        values = (v if isinstance(v, dict) else component.value for v, component in zip(inputs.values(), components))
        made = list(frames(*values)) if start else [[None] * len(panels) + [""]]
        with gr.Column(scale=3):
            with gr.Row():
                settings = dict(format="png", interactive=False, buttons=["fullscreen"])
                shown = [gr.Image(picture, label=label, **settings) for picture, label in zip(made[-1], panels)]
            shown.append(gr.Textbox(made[-1][-1], show_label=False))
            last, kept = len(made) - 1, gr.State(made)
            slider = gr.Slider(0, max(1, last), last, step=1, label="frame", buttons=[], interactive=True)
    button.click(run, components, [*shown, kept, slider], show_progress="hidden")
    slider.input(lambda made, i: made[min(i, len(made) - 1)], [kept, slider], shown, show_progress="hidden")


def import_gradio():
    """The package gradio, whose reports are switched off. Raises UserError if it is missing."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")
    try:
        import gradio
    except ImportError:
        raise UserError("the page needs gradio: pip install gradio") from None
    return gradio


def open_page(options, title, about, *tabs):
    """Serve a page on 127.0.0.1 until Ctrl-C: no tunnel, no reports, nothing fetched from elsewhere. Raises UserError.

    about: Markdown. A tab is (name, panels, function, inputs[, examples of the first input]). function(**values of the
    inputs) yields, while it computes, RGB (B, 3, H, W) in [0, 1] for each of `panels` and a caption. inputs: name ->
    initial value: a text, a list of choices, (lowest, highest, initial), or a picture to paint on as gradio's
    ImageEditor takes it. The first tab is shown with the frames of its initial values.
    """
    gr = import_gradio()
    with gr.Blocks(title=title) as page:
        gr.Markdown(f"# {title}\n{about}")
        for tab in tabs:
            with gr.Tab(tab[0]) if tabs[1:] else contextlib.nullcontext():
                add_tab(gr, *tab, start=tab is tabs[0])
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    settings = dict(share=False, quiet=True, footer_links=[], prevent_thread_lock=True, theme=theme)
    url = page.launch(server_name="127.0.0.1", server_port=options.port, **settings)[1]
    print(f"open {url} (Ctrl-C ends it)", flush=True)
    page.block_thread()


# ----------------------------------------------------------------------------------------------------------------
# Painted pictures: faces with a caption and tags, and scenes with a caption. Picture number `seed` is the same on
# every machine, so that a data set needs no download. These are the default data (`--data drawn`).
#
# What there is to paint is in assets/faces.json and assets/scenes.json: key -> shapes, painted in their order. The key
# is what the caption calls the thing; {} stands for a colour's name. A shape is [colour, outline], an outline the
# control points [x, y] of a closed quadratic B-spline; a point given twice is a sharp corner. x grows to the right and
# y downwards, from -1 to 1. A colour is one of Pillow's or depends on the picture. "avoid" lists the backgrounds on
# which a scene's colour would not be seen.

PAINTS = {"white": (255, 255, 255), "ink": (52, 34, 56), "plum": (74, 28, 72), "rose": (235, 80, 100)}
PAINTS |= {"rust": (150, 55, 45)}


@functools.cache
def picture_tables(name):
    """assets/NAME.json: tables of colours and of things, as described above."""
    return json.loads((Path(__file__).parent / "assets" / f"{name}.json").read_text("utf-8"))


def with_article(words):
    """The words after "a" or "an"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def mix(a, b, t):
    """The colour a fraction t of the way from a to b, each (red, green, blue)."""
    return tuple(round(p + (q - p) * t) for p, q in zip(a, b))


class Painter:
    """Paints shapes on an image, all moved by (x, y), scaled and tilted (radians) alike. `colours`: name -> colour."""

    t = np.linspace(0, 1, 8, endpoint=False)[:, None]
    before, here, after = (1 - t) ** 2 / 2, 0.5 + t - t**2, t**2 / 2  # the weights of a quadratic B-spline

    def __init__(self, image, colours, x=0.0, y=0.0, scale=1.0, tilt=0.0):
        self.image, self.pen, self.colours, self.unit = image, ImageDraw.Draw(image), colours, scale * image.width / 2
        cos, sin = self.unit * math.cos(tilt), self.unit * math.sin(tilt)
        self.rotation, self.centre = np.array([[cos, sin], [-sin, cos]]), (1 + np.array([x, y])) * image.width / 2

    def curve(self, outline, down=0.0):
        """The spline of an outline, moved down by `down`, in pixels: [x, y, x, y, ...]."""
        p = (np.array([outline[-1], *outline, outline[0]]) + (0, down)) @ self.rotation + self.centre
        return (p[:-2, None] * self.before + p[1:-1, None] * self.here + p[2:, None] * self.after).ravel().tolist()

    def mask(self, curve):
        mask = Image.new("L", self.image.size)
        ImageDraw.Draw(mask).polygon(curve, fill=255)
        return mask

    def paint(self, shapes, down=0.0, inside=None):
        """Paint shapes in their order, moved down by `down`; of an outline `inside`, only the part within it."""
        for name, outline in shapes:
            colour, curve = self.colours.get(name, name), self.curve(outline, down)
            if inside:
                self.image.paste(colour, mask=ImageChops.darker(self.mask(curve), self.mask(self.curve(inside))))
            elif name == "frame":  # glasses: a line, because the eyes should be seen through them
                self.pen.line(curve + curve[:4], colour, round(0.05 * self.unit), joint="curve")
            else:
                self.pen.polygon(curve, colour)


def paint_face(seed: int, size: int = 80) -> tuple[Image.Image, str, list[str]]:
    """Face number `seed`: (RGB picture size x size, caption, tags)."""
    rng, tables = random.Random(seed), picture_tables("faces")

    def choose_colour(palette, *taken):
        """(name, colour) whose name is none of those taken; the colour varies a little around the palette's."""
        name = rng.choice([name for name in tables[palette] if name not in taken])
        return name, tuple(min(c + rng.randint(-5, 5), 255) for c in ImageColor.getrgb(tables[palette][name]))

    skin_name, skin = choose_colour("skins")
    hair_name, hair = choose_colour("hairs")
    iris_name, iris = choose_colour("irises")
    top_name, cloth = choose_colour("clothes", hair_name)
    trim_name, trim = choose_colour("clothes", hair_name, top_name, "white")
    back_name, back = choose_colour("backgrounds", hair_name, top_name)
    style, fringe, eyes, brows, mouth, cheeks, top = (
        rng.choice(list(tables[table])) for table in "styles fringes eyes brows mouths cheeks tops".split()
    )
    extra = rng.choice(["", "", "", *tables["accessories"]])
    pattern = rng.choice(list(tables["patterns"]))
    place = rng.uniform(-0.04, 0.04), rng.uniform(0.04, 0.1), rng.uniform(0.86, 0.92)  # x, y, scale
    tilt, low = rng.uniform(-0.09, 0.09), rng.uniform(-0.02, 0.02)

    base = PAINTS | {"skin": skin, "hair": hair, "iris": iris, "cloth": cloth, "trim": trim, "back": back}
    colours = base | {name: mix(base[a], base[b], t) for name, (a, b, t) in tables["shades"].items()}
    image = Image.new("RGB", (4 * size, 4 * size), back)  # four times too large: shrinking it smooths the edges
    body = Painter(image, colours, *place)
    head = Painter(image, colours, *place, tilt)  # the shoulders stay upright
    parts, [(_, skull)] = tables["parts"], tables["parts"]["head"]
    front_hair = tables["styles"][style]["dome"] + tables["fringes"][fringe]

    # From far to near.
    Painter(image, colours).paint(tables["patterns"][pattern])
    head.paint(tables["styles"][style]["behind"])
    body.paint(parts["body"] + tables["tops"][top])
    head.paint(parts["ears"] + parts["head"])
    head.paint(tables["cheeks"][cheeks] + parts["nose"] + tables["eyes"][eyes] + tables["mouths"][mouth], low)
    head.paint([("shade", front_hair)], down=0.07, inside=skull)  # the shadow of the fringe on the forehead
    head.paint([("hair", front_hair)])
    head.paint(parts["shine"], inside=front_hair)
    # Brows are painted over the fringe, as in comics: much of the mood is seen in them.
    head.paint(tables["brows"][brows] + tables["accessories"].get(extra, []))

    shown = [style.format(hair_name), eyes.format(iris_name), mouth, *filter(None, [cheeks, extra.format(trim_name)])]
    caption = f"a face with {', '.join(shown[:-1])} and {shown[-1]}, on a {back_name} background"
    tags = [style, f"{hair_name} hair", fringe, eyes, *[f"{iris_name} eyes"] * ("{}" in eyes), f"{brows} brows"]
    tags += [mouth, cheeks, extra, f"{top_name} {top}", f"{back_name} background", f"{pattern} background"]
    tags += [f"{skin_name} skin"]
    return image.reduce(4), caption, [tag.replace("{} ", "").removeprefix("a ") for tag in tags if tag]


def paint_scene(seed, size=64):
    """Scene number `seed`: (RGB picture size x size, caption, names of its things)."""
    rng, tables = random.Random(seed), picture_tables("scenes")
    white, ink = PAINTS["white"], PAINTS["ink"]

    def vary(colour, lighter):
        """The colour, lighter by `lighter` of 255 and varied a little."""
        return tuple(min(max(c + lighter + rng.randint(-3, 3), 0), 255) for c in ImageColor.getrgb(colour))

    def name(*words):
        return with_article(" ".join(filter(None, words)))

    # Half of the captions are short, a quarter say more about one thing, a quarter are about two things.
    kind = rng.choices(["short", "long", "two"], [2, 1, 1])[0]
    hues = rng.sample(list(tables["colours"]), 2 if kind == "two" else 1)
    things = [rng.choice(list(tables["things"])) for _ in hues]
    avoid = {phrase for hue in hues for phrase in tables["colours"][hue]["avoid"]}
    background = rng.choice([phrase for phrase in tables["backgrounds"] if phrase not in avoid])
    if kind == "two":
        words, (dx, dy) = rng.choice(list(tables["relations"].items()))
        caption = f"{name(hues[0], things[0])} {words} {name(hues[1], things[1])}"
        # 0.48 from the centre, with a scale of 0.42: a gap between the two, and room for a tilt at the edges.
        scale, places = 0.42, [(0.48 * dx, 0.48 * dy), (-0.48 * dx, -0.48 * dy)]
    else:
        word = rng.choices(list(tables["sizes"]), [1, 4, 1] if kind == "short" else [2, 2, 1])[0]
        central = kind == "short" or word == "big"  # a big thing fills the picture from side to side
        words = "" if central else rng.choice(list(tables["places"]))
        caption = f"{name(word, hues[0], things[0])} {words}".strip()
        (dx, dy), scale = tables["places"].get(words, (0, 0)), tables["sizes"][word]
        places = [((0.92 - scale) * dx, (0.92 - scale) * dy)]
    if kind != "short" and rng.random() < 0.8:
        caption += f"{',' * bool(words)} {background}"

    fills = [vary(fill, rng.randint(-6, 6)) for fill in tables["backgrounds"][background]["fills"]]
    ground = fills[-1]
    colours = tables["details"] | {"ground": ground, "pale": mix(ground, white, 0.5), "shadow": mix(ground, ink, 0.25)}
    image = Image.new("RGB", (4 * size, 4 * size), fills[0])  # four times too large, as in paint_face
    backdrop = Painter(image, colours, rng.uniform(-0.1, 0.1), rng.uniform(-0.06, 0.06))
    backdrop.paint(tables["backgrounds"][background]["shapes"])
    for hue, thing, (x, y) in zip(hues, things, places):
        lighter = rng.randint(-9, 9)
        body, deep = (vary(tables["colours"][hue][shade], lighter) for shade in ("body", "deep"))
        dark = max(body) < 100
        colours |= {"body": body, "deep": deep, "light": mix(body, white, 0.25 if dark else 0.45)}
        colours |= {"blush": mix((255, 140, 150), body, 0.3), "face": mix(white, body, 0.1) if dark else ink}
        x, y = x + rng.uniform(-0.02, 0.02), y + rng.uniform(-0.02, 0.02)
        painter = Painter(image, colours, x, y, scale * rng.uniform(0.96, 1), rng.uniform(-0.05, 0.05))
        painter.paint([("shadow", outline) for _, outline in tables["things"][thing]], down=0.09)
        painter.paint(tables["things"][thing])
    return image.reduce(4), caption, things


# ----------------------------------------------------------------------------------------------------------------
# `python common.py`: the smallest diffusion model. Its data are points in a plane, so that one can see them move.


def spiral(count):
    """(count, 2) random points near a spiral."""
    angle = 3 * math.pi * torch.rand(count, 1).sqrt()
    return angle / 4 * torch.cat((angle.cos(), angle.sin()), dim=1) + 0.05 * torch.randn(count, 2)


def flow_2d(steps=2000, out="samples/flow_2d.png"):
    """Learn the spiral by rectified flow, with noise at t = 0 and data at t = 1, and draw how 2,000 points of noise
    move. Returns where they end, and as many points of the spiral, each (2000, 2)."""
    torch.manual_seed(0)
    layers = [nn.Linear(2 + 32, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU()]
    network = nn.Sequential(*layers, nn.Linear(128, 2))
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def velocity(x, t):
        """Of points x (B, 2), as the network predicts it; t: (B,) or a float."""
        t = torch.as_tensor(t).expand(len(x))
        return network(torch.cat((x, timestep_embedding(100 * t, 32)), dim=1))

    for step in tqdm(range(steps), "training"):
        set_lr(optimizer, 1e-2 * lr_factor(step / steps, step, warmup=0.0, decay="linear"))
        data, noise, t = spiral(256), torch.randn(256, 2), torch.rand(256)
        x_t = flow_point(noise, data, t)
        loss = (velocity(x_t, t) - (data - noise)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    noise, states = torch.randn(2000, 2), []
    with torch.no_grad():
        end = flow_euler(velocity, noise, [i / 100 for i in range(101)], callback=lambda x, t: states.append(x))
    data = spiral(2000)
    save_picture(draw_paths(torch.stack(states), data), out)
    print(f"points of noise (t = 0) on their way to a spiral (t = 1): {out}")
    return end, data


def draw_paths(states, data):
    """The points `states` (steps + 1, N, 2), as a PIL picture: some at four times, with the paths that led there; and
    data (N, 2). A colour tells in which sixth of the noise a point began."""
    side, last, grey = 480, len(states) - 1, "#777777"  # drawn twice too large: shrinking smooths the edges
    sheet = Image.new("RGB", (5 * side, side + 40), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(26)
    sixths = (3 + 3 / math.pi * states[0, :, 1].atan2(states[0, :, 0])).long().clamp(max=5).tolist()
    for k, part in enumerate((0, 0.5, 0.75, 1, None)):
        paths = data[None] if part is None else states[: round(part * last) + 1]
        paths = paths / 6.4 * side + torch.tensor([(k + 0.5) * side, side / 2 + 40])
        pen.text(((k + 0.5) * side, 20), "data" if part is None else f"t = {part:g}", "black", font, "mm")
        for i, path in enumerate(paths[:, :500].transpose(0, 1).flatten(1).tolist()):
            colour = grey if part is None else CURVE_COLOURS[sixths[i]]
            if i < 60 and len(path) > 2:
                pen.line(path, colour)
            x, y = path[-2:]
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
    return sheet.reduce(2)


if __name__ == "__main__":
    flow_2d()
