"""Text to image: a diffusion transformer with two streams of tokens, text and image, trained by rectified flow.

This is the system of the post "Diffusion From Scratch", from data to picture, and with --arch joint and --stream that
of "re-diffusion". t = 0 is DATA and t = 1 is NOISE, as in both posts.

    python dit_t2i.py sample "a red car" --num 4               from the run in runs/, else the weights in weights/
    python dit_t2i.py train                                    ten minutes on two CPU cores, on painted scenes
    python dit_t2i.py train --data DIR                         your own pictures, each with a caption
    python dit_t2i.py prepare --data DIR --out SHARDS --vae VAE --clip CLIP
    python dit_t2i.py train --preset paper --data SHARDS       the post's 258M parameters, on prepared latents
    torchrun --nproc-per-node 8 dit_t2i.py train --preset paper --arch joint --stream 'shards/*.jsonl' --steps 100000 \\
        --clip CLIP --vae VAE                                  "re-diffusion": pictures fetched during training

Without --clip a table of word vectors is trained with the model, and without --vae the model works on pixels: so the
default run needs no download. At step 0 the model predicts data of zero and the loss is the mean of (x / t)^2, about
0.9. After 41,000 pictures (1,280 steps) it is near 0.06 on held-out scenes, and in training, in eight bins of t from
data to noise, 1.0, 0.21, 0.10, 0.06, 0.05, 0.04, 0.04 and 0.05: an error of the data is divided by t.

| in the posts                 | here             | shape            | equation                                        |
|------------------------------|------------------|------------------|-------------------------------------------------|
| x_0 (re-diffusion: z0)       | x                | (B, C, H, W)     | data: a latent, or pixels in [-1, 1]            |
| noise (re-diffusion: z1)     | noise            | (B, C, H, W)     | N(0, I)                                         |
| t                            | t                | (B,)             | sigmoid(randn()); re-diffusion: uniform         |
| z_t                          | z_t              | (B, C, H, W)     | (1 - t) x_0 + t noise                           |
| v, v_theta                   | v, v_hat         | (B, C, H, W)     | noise - x_0                                     |
| text embeddings, c           | text             | (B, T, text_dim) | CLIP's states; or word numbers, (B, T)          |
| null embedding               | null             | (1, T, text_dim) | the encoding of ""                              |
| Dual-Stream Blocks; 4.3-4.5  | DualStreamLayer  |                  | x + gate * part(LN(x) (1 + scale) + shift)      |
| MSRoPE                       | msrope           | (T + N, d/2)     | image on a centred grid, text on its diagonal   |
| Rectified Flow; 2 and 5      | flow_loss, train |                  | mean of (v_hat - v)^2                           |
| Guidance; cfg_scale          | guided; cfg      |                  | v_uncond + cfg_scale (v_cond - v_uncond)        |
| Generate                     | sample_latents   |                  | z - dt v, 28 Euler steps from t = 1 to t = 0    |
| Prepare the dataset; 3       | prepare          |                  | latents and CLIP states, encoded once           |
| 4.1, 4.2                     | DiT.embed        |                  | W_t Emb(t) + W_c mean(c)                        |
| 6 Distributed Streaming      | Stream           |                  | pictures fetched while training                 |

Numbers such as 4.3 are the parts of re-diffusion. Shape letters: B pictures, C channels, T text tokens, N image
tokens = (H / patch_size) (W / patch_size), h heads of width d = head_dim, D = h d.
"""

import collections
import concurrent.futures
import copy
import dataclasses
import difflib
import functools
import glob
import gzip
import http.client
import io
import ipaddress
import itertools
import json
import math
import os
import random
import re
import socket
import ssl
import string
import sys
import threading
import time
import unicodedata
import urllib.parse
import zlib
from pathlib import Path

import common
from common import BatchRng, UserError, apply_rope, attention, autocast, flow_point, load_into, load_tensors, option

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass
class Config(common.TrainConfig):
    """The options of `train`; PRESETS holds what the two presets set."""

    BUDGETS = (("minutes", "steps", "epochs", "stream"),)  # of these, only what is given: a stream alone has no end

    # Data
    image_size: int = option(64, "side of the training pictures in pixels (shards have their own)", low=8)
    vae: str = option("", "autoencoder, to train in its latents (default: on pixels); with shards, to show samples")
    clip: str = option("", "folder of CLIP ViT-L/14, to encode captions (default: a table of words that is learned)")
    flip: float = option(0.0, "probability that a picture is mirrored (its caption stays as it is)", low=0.0, high=1.0)
    start: str = option("", "weights to start from, such as weights/dit_t2i.safetensors", flag="--from")
    # Pictures from the web
    stream: str | None = option(None, "in place of --data: lists of addresses, e.g. 'shards/*.jsonl' (.parquet, .tar)")
    threads: int = option(16, "pictures that each process fetches at a time", low=1)
    private_hosts: bool = option(False, "fetch from private networks and from this machine too")
    min_score: float = option(0.0, "smallest aesthetic score of a picture", low=0.0)
    min_side: int = option(0, "smallest length of a picture's shorter side in pixels", low=0)
    # Model
    arch: str = option("dual", "dual: Diffusion From Scratch; joint: re-diffusion", choices=("dual", "joint"))
    patch_size: int = option(8, "side of a token's patch, in pixels or latent positions", low=1)
    depth: int = option(6, "number of dual-stream layers", low=1, high=1000)
    num_heads: int = option(4, "attention heads", low=1)
    head_dim: int = option(64, "width of a head, a multiple of 4", low=4)
    text_dim: int = option(256, "width of a text token as the text encoder gives it; CLIP's is 768", low=1)
    # Objective
    predict: str = option("data", "what the last layer predicts; data is better for pixels", ("data", "velocity"))
    # At first t is mostly near 1, where colour and shape are learned from the words; later near 1/2, where details are.
    time_mean: tuple[float, ...] = option((2.5, 0.5), "mean of logit(t) as the run starts and ends; 0 is t = 1/2")
    time_std: float = option(1.5, "deviation of logit(t), which is normal (--arch joint: t is uniform)", low=0.0)
    # Optimizer and sampling
    optimizer: str = option("adamw", "muon learns more from each picture", choices=("adamw", "muon"))
    checkpoint_activations: bool = option(False, "less memory: compute activations again in the backward pass")
    cfg: float = option(3.0, "guidance of the samples while training; the default of `sample`", low=0.0)


DEMO = dict(minutes=10.0, lr=2e-3, optimizer="muon", decay="linear", ema=0.995)
# The post's: batch 128, 200 epochs, AdamW at 1e-4 after 2,000 steps of warm-up, EMA 0.9995, t = sigmoid(randn()).
PAPER = dict(epochs=200, image_size=256, batch_size=128, lr=1e-4, warmup=2000.0, decay="none", beta2=0.999, ema=0.9995)
PAPER |= dict(patch_size=2, depth=12, num_heads=12, text_dim=768, predict="velocity", time_mean=(0.0,), time_std=1.0)
PAPER |= dict(flip=0.5, cfg=4.0, checkpoint_every=1000)
PRESETS = {"demo": DEMO, "paper": PAPER}

# ----------------------------------------------------------------------------------------------------------------
# Model


def centred_grid(height, width, device):
    """Positions of the image tokens, (N, 2): 16 rows are -8 to 7, so that a larger picture has the trained positions in
    its middle."""
    return torch.cartesian_prod(*(torch.arange(count, device=device) - count // 2 for count in (height, width)))


@functools.lru_cache(maxsize=16)
def msrope(height, width, text_len, head_dim, device):
    """Rotary tables of all tokens, text first: cosines and sines, each (T + N, head_dim/2).

    Image tokens have the positions of a centred grid, (-8, -8) to (7, 7) for 16 x 16. Text tokens continue on its
    diagonal: (8, 8), (9, 9), ... (With an odd side the first one shares a position, as in the post's code.) The first
    half of the angles follows the row, the second half the column ("MSRoPE" in the post; Wu et al. 2025, section 2.4).
    """
    diagonal = torch.arange(text_len, device=device) + max(height // 2, width // 2)
    positions = torch.cat((torch.stack((diagonal, diagonal), dim=1), centred_grid(height, width, device)))
    return common.rope_2d(positions, head_dim)


@functools.lru_cache(maxsize=16)
def grid_embedding(height, width, dim, device):
    """Fixed embedding of the positions of a centred grid, (N, dim)."""
    return common.sincos_2d(centred_grid(height, width, device), dim)


def ada_norm(x, shift, scale):
    """LN(x) (1 + scale) + shift for x (B, N, D), shift and scale (B, D) (re-diffusion 4.3: beta and gamma)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def feed_forward(width):
    """Two layers with a GELU between them, four times as wide inside."""
    net = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
    return nn.Sequential(collections.OrderedDict(net=net))


class SwiGLU(nn.Module):
    """value * silu(gate) between two layers (Shazeer 2020, eq. 6), with about as many parameters as feed_forward."""

    def __init__(self, width):
        super().__init__()
        inside = math.ceil(8 * width / 3 / 64) * 64
        self.enter, self.leave = nn.Linear(width, 2 * inside), nn.Linear(inside, width)

    def forward(self, x):
        value, gate = self.enter(x).chunk(2, dim=-1)
        return self.leave(value * F.silu(gate))


class JointAttention(nn.Module):
    """Each stream has its own queries, keys and values; then all tokens, text first, attend to all tokens."""

    def __init__(self, num_heads, head_dim):
        super().__init__()
        self.num_heads, width = num_heads, num_heads * head_dim
        for stream in ("vis", "txt"):
            for name in "qkvo":
                self.add_module(f"{stream}_{name}_proj", nn.Linear(width, width))
            for name in "qk":
                self.add_module(f"{stream}_{name}_norm", nn.RMSNorm(head_dim, eps=1e-6))

    def project(self, name, txt, vis, rope):
        """q, k or v of all tokens: (B, h, T + N, head_dim); q and k are normalised and rotated, in float32."""
        streams = []
        for stream, tokens in (("txt", txt), ("vis", vis)):
            heads = getattr(self, f"{stream}_{name}_proj")(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            if name in "qk":
                heads = getattr(self, f"{stream}_{name}_norm")(heads.float())
            streams.append(heads)  # (B, h, T or N, head_dim)
        heads = torch.cat(streams, dim=2)
        return apply_rope(heads, rope) if name in "qk" and rope is not None else heads

    def forward(self, txt, vis, rope):
        """txt (B, T, D), vis (B, N, D) -> what each stream takes from all tokens, of the same shapes."""
        q, k, v = (self.project(name, txt, vis, rope) for name in "qkv")
        x = attention(q.to(v.dtype), k.to(v.dtype), v).transpose(1, 2).flatten(2)  # (B, T + N, D)
        txt, vis = x.split((txt.shape[1], vis.shape[1]), dim=1)
        return self.txt_o_proj(txt), self.vis_o_proj(vis)


class DualStreamLayer(nn.Module):
    """Joint attention, then a feed-forward network for each stream. The condition, the time and in some models the
    caption, gives each stream a shift, scale and gate for both (adaLN-Zero); the gates start at zero, so that a fresh
    layer is the identity.

    Nothing reads the text of the last layer, so its text queries, output and feed-forward network are never trained
    (5.9M of the post's 258M parameters). They exist because the published checkpoints hold them.
    """

    def __init__(self, num_heads, head_dim, last, mlp=feed_forward):
        super().__init__()
        width = num_heads * head_dim
        self.last = last
        self.vis_mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.vis_ff = mlp(width)
        self.txt_mod = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.txt_ff = mlp(width)
        self.attn = JointAttention(num_heads, head_dim)
        if last:
            for part in (self.txt_ff, self.attn.txt_q_proj, self.attn.txt_q_norm, self.attn.txt_o_proj):
                part.requires_grad_(False)

    def forward(self, txt, vis, condition, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.vis_mod(condition).chunk(6, dim=-1)  # (B, D) each
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(condition).chunk(6, dim=-1)
        txt_in, vis_in = ada_norm(txt, txt_shift1, txt_scale1), ada_norm(vis, shift1, scale1)
        from_txt, from_vis = self.attn(txt_in, vis_in, rope)
        vis = vis + gate1.unsqueeze(1) * from_vis
        vis = vis + gate2.unsqueeze(1) * self.vis_ff(ada_norm(vis, shift2, scale2))
        if not self.last:
            txt = txt + txt_gate1.unsqueeze(1) * from_txt
            txt = txt + txt_gate2.unsqueeze(1) * self.txt_ff(ada_norm(txt, txt_shift2, txt_scale2))
        return txt, vis


class DiT(nn.Module):
    """model(z_t, t, text) -> velocity (noise - data), (B, C, H, W). t (B,) in [0, 1], 1 = noise; text
    (B, T, text_dim), or (B, T) word numbers if the model has a word table. Raises ValueError if patch_size does not
    divide H and W.

    arch="dual" is "Diffusion From Scratch". "joint" is what re-diffusion describes: learned positions (4.1) and the
    captions' mean added to the time (4.2), with the SwiGLU of its code. What it leaves open is as in "dual": gates, a
    norm of q and k in each head, t times 1000.

    latent_size: side of the training latents, for the learned positions. vocabulary: words in the model's own table; 0:
    text comes encoded. predict: "velocity", or "data", from which the velocity (z_t - data) / t follows.
    """

    def __init__(
        self, patch_size=2, in_channels=4, depth=12, num_heads=12, head_dim=64, text_dim=768, latent_size=32,
        vocabulary=0, predict="velocity", arch="dual",
    ):  # fmt: skip
        super().__init__()
        width, grid = num_heads * head_dim, latent_size // patch_size
        self.patch_size, self.head_dim, self.predict, self.joint = patch_size, head_dim, predict, arch == "joint"
        # Smallest t in training: the velocity is (z_t - data) / t, so that an error of the data is divided by t.
        self.time_min = 0.05 if predict == "data" else 0.0
        self.checkpointing = False
        self.words = nn.Embedding(vocabulary + 1, text_dim) if vocabulary else None
        self.patch_embed = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.step_embed = common.TimestepEmbedder(width, scale=1000)
        self.text_norm = nn.RMSNorm(text_dim, eps=1e-6)
        self.text_proj = nn.Linear(text_dim, width)
        if self.joint:
            self.positions = nn.Parameter(torch.zeros(1, width, grid, grid))
            self.caption_embed = nn.Linear(text_dim, width)
        mlp = SwiGLU if self.joint else feed_forward
        self.layers = nn.ModuleList(DualStreamLayer(num_heads, head_dim, i == depth - 1, mlp) for i in range(depth))
        self.output_norm = nn.ModuleDict({"linear": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))})
        self.output_proj = nn.Linear(width, patch_size**2 * in_channels)
        self.initialize_weights()

    def initialize_weights(self):
        """Xavier for linear layers; N(0, 0.02) for those that embed time and text; zero for modulation and output, so
        that a fresh model predicts 0 (velocity or data)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        embeddings = [self.step_embed.mlp[0].weight, self.step_embed.mlp[2].weight, self.text_proj.weight]
        for weight in embeddings + ([self.caption_embed.weight, self.positions] if self.joint else []):
            nn.init.normal_(weight, std=0.02)
        if self.words is not None:  # short vectors change direction faster; text_norm sets their length
            nn.init.normal_(self.words.weight, std=0.1)
        modulations = [mod for layer in self.layers for mod in (layer.vis_mod, layer.txt_mod)]
        for module in (*modulations, self.output_norm, self.output_proj):
            common.zero_init(module)

    def embed(self, z_t, t, text, grid):
        """Condition (B, D), text tokens (B, T, D) and image tokens (B, N, D), the tokens in float32."""
        states = self.text_norm(text if self.words is None else self.words(text))  # (B, T, text_dim)
        txt = self.text_proj(states).float()
        vis = self.patch_embed(z_t).flatten(2).transpose(1, 2).float()
        condition = self.step_embed(t)
        if self.joint:
            positions = self.positions
            if positions.shape[2:] != grid:
                positions = F.interpolate(positions, grid, mode="bicubic")
            vis = vis + positions.flatten(2).transpose(1, 2)
            present = torch.ones_like(states[..., :1]) if self.words is None else (text > 0).unsqueeze(-1)
            mean = (states * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
            condition = condition + self.caption_embed(mean)  # W_t Emb(t) + W_c mean(c)
            if self.words is not None:  # CLIP's states contain the order of words, a table's do not
                order = torch.arange(text.shape[1], device=text.device)
                txt = txt + common.timestep_embedding(order, txt.shape[-1])
        elif self.words is not None:
            # Not in the post: a table of words starts untrained, and through attention alone its words are learned too
            # slowly for ten minutes. So the sum of the words is added to the time, as pooled text is in Stable
            # Diffusion 3 (Esser et al. 2024, section 4), and a fixed position embedding to the image tokens.
            condition = condition + (txt * (text > 0).unsqueeze(-1)).sum(dim=1)
            vis = vis + grid_embedding(*grid, vis.shape[-1], z_t.device)
        return condition, txt, vis

    def forward(self, z_t, t, text):
        p, (channels, height, width) = self.patch_size, z_t.shape[1:]
        if height % p or width % p:
            raise ValueError(f"{height} x {width} is no multiple of the patch size {p}")
        grid = height // p, width // p
        condition, txt, vis = self.embed(z_t, t, text, grid)
        rope = None if self.joint else msrope(*grid, txt.shape[1], self.head_dim, z_t.device)
        for layer in self.layers:
            if self.checkpointing and self.training:  # activations are computed again in the backward pass
                txt, vis = checkpoint(layer, txt, vis, condition, rope, use_reentrant=False)
            else:
                txt, vis = layer(txt, vis, condition, rope)
        shift, scale = self.output_norm["linear"](condition).chunk(2, dim=-1)  # (B, D) each
        out = self.output_proj(ada_norm(vis, shift, scale)).float()  # (B, N, p p C)
        out = out.unflatten(1, grid).unflatten(-1, (p, p, channels))  # (B, H/p, W/p, p, p, C)
        out = out.permute(0, 5, 1, 3, 2, 4).reshape(z_t.shape)  # (B, C, H, W)
        if self.predict == "velocity":
            return out
        # z_t = data + t (noise - data), therefore the velocity is (z_t - data) / t.
        return (z_t - out) / t.view(-1, 1, 1, 1).clamp(min=1e-3)


def build_model(config, latent, vocabulary=0):
    """A fresh DiT for latents (or pixels) of shape latent = (C, S): C channels, side S. Raises UserError."""
    channels, size = latent
    if size % config.patch_size:
        raise UserError(f"--patch-size {config.patch_size} does not divide {size}, the side of the model's pictures")
    if config.head_dim % 4:
        raise UserError(f"--head-dim {config.head_dim} must be a multiple of 4")
    sizes = config.patch_size, channels, config.depth, config.num_heads, config.head_dim, config.text_dim, size
    model = DiT(*sizes, vocabulary, config.predict, config.arch)
    model.checkpointing = config.checkpoint_activations
    return model


# ----------------------------------------------------------------------------------------------------------------
# Loss and sampler


def sample_times(config, rng, time_min, progress):
    """t (B,) of a training batch: the sigmoid of a normal; with --arch joint uniform (re-diffusion 2). progress, 0 to
    1: the part of the run that is over."""
    if config.arch == "joint":
        return time_min + (1 - time_min) * rng.rand()
    mean = config.time_mean[0] + progress * (config.time_mean[-1] - config.time_mean[0])
    # t = sigmoid(randn()), here with a mean and a standard deviation
    return torch.sigmoid(mean + config.time_std * rng.randn()).clamp(min=time_min)


def flow_loss(v_hat, x, noise):
    """(B,): the squared error of the velocity, ||v_hat - v||^2 per value ("Rectified Flow"; re-diffusion 5)."""
    # v = noise - x_0
    v = noise - x
    return (v_hat - v).square().mean(dim=(1, 2, 3))


def guided(model, text, null, cfg):
    """velocity(z, t) with classifier-free guidance (Ho & Salimans 2022, eq. 6), both terms from one doubled batch. cfg
    1: conditional, from a single pass; 0: unconditional. text (B, ...), null (1, ...)."""

    def velocity(z, t):
        times = torch.full((len(z),), t, device=z.device)
        if cfg == 1:
            return model(z, times, text)
        both = torch.cat((text, null.expand_as(text)))
        v_cond, v_uncond = model(z.repeat(2, 1, 1, 1), times.repeat(2), both).chunk(2)
        # v = v_uncond + cfg_scale * (v_cond - v_uncond)
        return v_uncond + cfg * (v_cond - v_uncond)

    return velocity


@torch.no_grad()
def sample_latents(
    model, text, null, latent, num=1, steps=28, cfg=4.0, seed=0, solver="euler", batch_size=16, precision="fp32",
    seed_stride=0, callback=None,
):  # fmt: skip
    """`num` samples for each row of text -> (rows * num, C, H, W), the samples of the first row first.

    From noise at t = 1 to data at t = 0 ("28 Euler steps"). text (rows, ...), null (1, ...); latent: (C, H, W). Sample
    i of row r starts from the noise of seed + seed_stride r + i. callback(z, t) is given the states of the first batch.
    """
    device, least = next(model.parameters()).device, model.time_min
    times = [1 - i / steps for i in range(steps)] + [0.0]
    if least and steps > 1:  # predicts data, trained with t >= time_min: the last step is from there to those data
        times = [1 - (1 - least) * i / (steps - 1) for i in range(steps)] + [0.0]
    jobs = [(row, seed + seed_stride * row + i) for row in range(len(text)) for i in range(num)]
    text, null, samples = text.to(device), null.to(device), []
    for first in common.progress(range(0, len(jobs), batch_size), "batches"):
        rows, seeds = zip(*jobs[first : first + batch_size])
        noise = common.noise_for(seeds, latent, device)
        with autocast(device, precision):
            velocity = guided(model, text[list(rows)], null, cfg)
            # z <- z - dt v
            z = common.SOLVERS[solver](velocity, noise, times, callback if first == 0 else None)
        samples.append(z)
    return torch.cat(samples)


def to_rgb(vae, x):
    """What the model sees -> RGB in [0, 1]. Without the latents' VAE, their first three channels."""
    return ((vae.decode(x) if vae else x[:, :3]) / 2 + 0.5).clamp(0, 1)


def sample(model, config, prompts, num=1, *, size=None, encoder=None, vae=None, negative="", cfg=None, **settings):
    """RGB (len(prompts) * num, 3, size, size) in [0, 1] for a list of prompts; model and config from load_model().

    size: in pixels, as trained if None; cfg: guidance, the run's if None; negative: the prompt that guidance leads away
    from. encoder, vae: loaded from config.clip and config.vae if None. settings: of sample_latents. Raises UserError.
    """
    encoder = encoder or load_text_encoder(model, config.clip)
    channels, side = model.header["latent"]
    if vae is None and channels != 3:
        vae = common.load_matching_vae(config.vae, model.header).to(next(model.parameters()).device)
    stride = vae.stride if vae else 1
    size = size or side * stride
    if size % (step := stride * math.lcm(config.patch_size, vae.patch if vae else 1)):
        raise UserError(f"--size {size} is no multiple of {step}")
    shape, cfg = (channels, size // stride, size // stride), config.cfg if cfg is None else cfg
    z = sample_latents(model, encoder(prompts), encoder([negative]), shape, num, cfg=cfg, **settings)
    return torch.cat([to_rgb(vae, part).cpu() for part in common.progress(z.split(16), "decoding")])


# ----------------------------------------------------------------------------------------------------------------
# Text encoders: encoder(captions) -> (B, T) word numbers, or (B, T, text_dim) states. The encoding of "" is the null
# caption of guidance.

MAX_WORDS = 16  # of a caption, for a table of words


class Words:
    """Captions as word numbers, (B, length), which the model's own table turns into vectors. Articles and unknown words
    are left out. Captions are padded with 0, so "" is all zeros."""

    def __init__(self, vocabulary, length):
        self.vocabulary, self.length = list(vocabulary), length
        self.number = {word: i for i, word in enumerate(self.vocabulary, 1)}

    @staticmethod
    def split(caption):
        return [word for word in re.findall(r"[^\W_]+", caption.lower()) if word not in ("a", "an", "the")]

    @classmethod
    def learn(cls, captions, known=(), length=0):
        """The words of captions. known, length: of earlier weights, whose words keep their numbers."""
        captions = [cls.split(caption) for caption in captions]
        if not any(captions):
            raise UserError("the captions hold no words; write captions such as: a red car")
        new = sorted({word for words in captions for word in words}.difference(known))
        return cls([*known, *new], max(length, min(MAX_WORDS, max(map(len, captions)))))

    def __call__(self, captions):
        rows = [[self.number[word] for word in self.split(caption) if word in self.number] for caption in captions]
        return torch.tensor([(row + [0] * self.length)[: self.length] for row in rows])

    def warnings(self, caption):
        """Lines about the words of a prompt that are not used. Raises UserError if none is known."""
        words, lines = self.split(caption), []
        for word in words:
            if word not in self.number:
                near = difflib.get_close_matches(word, self.vocabulary)
                lines.append(f"unknown word {word!r}" + (f"; similar: {', '.join(near)}" if near else ""))
        known = sum(word in self.number for word in words)
        if caption.strip() and not known:
            raise UserError("; ".join([f"these weights know no word of {caption!r}", *lines]))
        if known > self.length:
            lines.append(f"only the first {self.length} of {known} words of {caption!r} are used")
        return lines


# CLIP: the text half of ViT-L/14 (Radford et al. 2021, section 2.4) turns a caption into 77 vectors of width 768; it is
# not trained. ClipTokenizer cuts the caption into ids, ClipTextEncoder makes vectors of them; both read the files that
# CLIP_SOURCE, on Hugging Face, holds.

CLIP_SOURCE = "openai/clip-vit-large-patch14"
CLIP_LENGTH = 77  # tokens of a caption, start and end included
CLIP_MERGES = 48_894
CLIP_SPECIAL = ["<|startoftext|>", "<|endoftext|>"]


def byte_symbols():
    """byte -> one visible character, in the order of their ids: printable Latin-1 characters stand for themselves, the
    68 others are written as U+0100 and up. So any bytes can be written as text."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


@functools.cache
def clip_word():
    """CLIP's pattern of a word: a contraction such as 's, a run of letters, one number, or a run of other characters
    that are not spaces. `re` lacks Unicode's class of numbers, \\p{N}, so they are listed (all are below U+20000); \\w
    without them and without the underscore is the class of letters, \\p{L}."""
    numbers = "".join(c for c in map(chr, range(0x20000)) if unicodedata.category(c)[0] == "N")
    return re.compile(rf"'(?:s|t|re|ve|m|ll|d)|[^\W_{numbers}]+|[{numbers}]|(?:[^\s\w]|[_\x1c-\x1f])+")


class ClipTokenizer:
    """Text to ids by byte-pair encoding (Sennrich et al. 2016) with CLIP's published merges. path: merges.txt,
    merges.txt.gz or tokenizer.json, or a folder with one of them. (vocab.json is not needed.) Raises UserError."""

    def __init__(self, path):
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        folders = folder, folder / "tokenizer", folder.parent / "tokenizer"  # the last two: of a whole pipeline
        places = [f / name for f in folders for name in ("merges.txt", "merges.txt.gz", "tokenizer.json")]
        if str(path).endswith((".txt", ".gz", "tokenizer.json")):
            places = [Path(path)]
        file = next(filter(Path.is_file, places), None)
        if file is None:
            raise UserError(f"no tokenizer in {path}: put merges.txt or tokenizer.json of {CLIP_SOURCE} there")
        with common.reading(file, f"tokenizer of {CLIP_SOURCE}"):
            merges = self.read_merges(file)
            if len(merges) < CLIP_MERGES or any(len(pair) != 2 for pair in merges):
                raise ValueError(f"{len(merges)} merges of two symbols, not {CLIP_MERGES}")
        self.symbols, self.ranks = byte_symbols(), {pair: rank for rank, pair in enumerate(merges)}
        # An id is a place in this list: bytes inside a word, bytes at its end, the results of merges, special tokens.
        base = list(self.symbols.values())
        order = [*base, *(symbol + "</w>" for symbol in base), *map("".join, merges), *CLIP_SPECIAL]
        self.ids = {symbol: i for i, symbol in enumerate(order)}
        self.start, self.end = (self.ids[token] for token in CLIP_SPECIAL)
        self.word_ids = functools.lru_cache(100_000)(self.word_ids)

    @staticmethod
    def read_merges(file):
        """Pairs of symbols in the order in which they are merged. (OpenAI's own file has more than are used.)"""
        if file.suffix == ".json":
            merges = json.loads(file.read_text("utf-8"))["model"]["merges"]  # ["a", "b"], or "a b" in old files
            return [tuple(merge.split() if isinstance(merge, str) else merge) for merge in merges]
        text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        lines = text.decode("utf-8").splitlines()
        return [tuple(line.split()) for line in lines if line and "#version" not in line][:CLIP_MERGES]

    def __call__(self, texts):
        """B strings -> (B, 77) int64: the start token, at most 75 tokens of the text, and end tokens."""
        ids = torch.full((len(texts), CLIP_LENGTH), self.end)
        for row, text in zip(ids, texts):
            tokens = [self.start, *self.encode(text)[: CLIP_LENGTH - 2]]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids

    def encode(self, text):
        """All ids of a text, without start and end. A special token that is written in the text becomes that token."""
        ids = []
        for part in re.split(f"({'|'.join(map(re.escape, CLIP_SPECIAL))})", text):
            if part in CLIP_SPECIAL:
                ids.append(self.ids[part])
            else:
                ids += itertools.chain.from_iterable(map(self.word_ids, self.split(part)))
        return ids

    @staticmethod
    def split(text):
        """The words of a text, composed (NFC) and in lower case."""
        # Letter by letter: lower() of a whole string writes a Greek sigma at a word's end differently.
        text = "".join(map(str.lower, unicodedata.normalize("NFC", text)))
        return clip_word().findall(text)

    def word_ids(self, word):
        """Byte-pair encoding: merge the neighbours that are first in the list of merges, until none is in it."""
        symbols = [self.symbols[byte] for byte in word.encode("utf-8", "replace")]
        symbols[-1] += "</w>"
        while len(symbols) > 1:
            rank, i = min((self.ranks.get(pair, math.inf), i) for i, pair in enumerate(itertools.pairwise(symbols)))
            if rank == math.inf:
                break
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        return [self.ids[symbol] for symbol in symbols]


class ClipLayer(nn.Module):
    """A pre-norm transformer block: x += attention(norm(x)), x += mlp(norm(x)). Heads are 64 wide in every CLIP."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(dim, dim) for name in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, x, mask):
        normed = self.layer_norm1(x)
        q, k, v = (self.self_attn[f"{name}_proj"](normed).unflatten(-1, (-1, 64)).transpose(1, 2) for name in "qkv")
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, h, T, 64)
        x = x + self.self_attn["out_proj"](mixed.transpose(1, 2).flatten(2))  # (B, T, D)
        hidden = self.mlp["fc1"](self.layer_norm2(x))  # (B, T, 4D)
        return x + self.mlp["fc2"](hidden * torch.sigmoid(1.702 * hidden))  # quick GELU


class ClipTextEncoder(nn.Module):
    """CLIP's causal text transformer, by default ViT-L/14's. Parameter names are the published ones without the prefix
    `text_model.`, as transformers 5 saves them."""

    def __init__(self, vocab=49_408, length=CLIP_LENGTH, dim=768, hidden=3072, depth=12):
        super().__init__()
        tables = {"token_embedding": nn.Embedding(vocab, dim), "position_embedding": nn.Embedding(length, dim)}
        self.embeddings = nn.ModuleDict(tables)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(ClipLayer(dim, hidden) for _ in range(depth))})
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(self, ids, mask_padding=False):
        """ids (B, T) -> the last hidden state after the final norm, (B, T, D). mask_padding hides the tokens after the
        first end token, which changes the states of the padding only; but the image model reads those, too. Stable
        Diffusion has it off, the post's code on."""
        tokens = self.embeddings["token_embedding"]
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()  # (T, T)
        if mask_padding:
            is_end = (ids == tokens.num_embeddings - 1).int()
            mask = mask & (is_end.cumsum(1) - is_end == 0)[:, None, None, :]  # (B, 1, T, T)
        x = tokens(ids) + self.embeddings["position_embedding"].weight[: ids.shape[1]]  # (B, T, D)
        for layer in self.encoder["layers"]:
            x = layer(x, mask)
        return self.final_layer_norm(x)

    @classmethod
    def load(cls, path):
        """From a Hugging Face folder or a weight file: the text half alone, a whole CLIP, or a Stable Diffusion
        checkpoint. float32, without gradients; `.hash` identifies the file. Raises UserError."""
        names = "model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"
        places = [Path(path), *(Path(path, part, name) for part in ("", "text_encoder") for name in names)]
        file = next(filter(Path.is_file, places), None)
        if file is None:
            raise UserError(f"no CLIP weights in {path}: put model.safetensors of {CLIP_SOURCE} there")
        content, _ = load_tensors(file)
        with common.reading(file, f"text encoder of {CLIP_SOURCE}"):
            content = content.get("state_dict", content)
            text = {k.rpartition("text_model.")[2]: w for k, w in content.items() if "text_model." in k} or content
            weights = {k: w.float() for k, w in text.items() if not k.endswith(("position_ids", "projection.weight"))}
            vocab, dim = weights["embeddings.token_embedding.weight"].shape
            length = len(weights["embeddings.position_embedding.weight"])
            hidden = len(weights["encoder.layers.0.mlp.fc1.weight"])
            depth = sum(name.endswith("layer_norm1.weight") for name in weights)
        model = cls(vocab, length, dim, hidden, depth)
        load_into(model, weights, file)
        model.hash = common.file_hash(file)
        return model.eval().requires_grad_(False)


class Clip:
    """Captions -> CLIP's states (B, 77, 768), with the padding masked as in the post's code."""

    def __init__(self, path, device="cpu"):
        if not path:
            raise UserError(f"these weights read captions through CLIP; name the folder of {CLIP_SOURCE} with --clip")
        self.tokenizer, self.model = ClipTokenizer(path), ClipTextEncoder.load(path).to(device)
        self.device, self.hash = device, self.model.hash

    @torch.no_grad()
    def __call__(self, captions):
        return self.model(self.tokenizer(captions).to(self.device), mask_padding=True).cpu()

    def warnings(self, caption):
        cut = len(self.tokenizer.encode(caption)) + 2 - CLIP_LENGTH
        if cut <= 0:
            return []
        return [f"CLIP reads {CLIP_LENGTH} tokens; the last {cut} of {caption[:40]!r}... are left out"]


def load_text_encoder(model, clip, device="cpu"):
    """The text encoder that a model from load_model() was trained with; clip: CLIP's folder. Raises UserError."""
    text = model.header["text"]
    if "words" in text:
        return Words(text["words"], text["length"])
    encoder = Clip(clip, device)
    common.warn_if_other("--clip", encoder.hash, text["clip"])
    return encoder


# ----------------------------------------------------------------------------------------------------------------
# Data. A source is captioned pictures in memory (PictureSource), shards that `prepare` wrote (common.Shards) or a
# Stream. read(index) returns pictures (B, 3, S, S) in [-1, 1] and their captions; from shards latents and CLIP states.


class PictureSource(common.Pictures):
    """The pictures of --data in memory."""

    def __init__(self, config):
        painted = common.paint_scene, 20_000
        super().__init__(**vars(common.load_pictures(config.data, config.image_size, *painted, config.num_samples)))

    def read(self, index):
        return self.pictures[index] / 127.5 - 1, [self.captions[i] for i in index]


# ----------------------------------------------------------------------------------------------------------------
# Streams: pictures fetched from the web during training ("Distributed Streaming Training" of re-diffusion). The rows of
# metadata shards hold a picture's address and its caption. Each process takes its part of the rows, again and again,
# and fetches and decodes the pictures in threads. Rows that give no picture are left out and counted by reason.

USER_AGENT = "dit_t2i (training of a text-to-image model)"
TIMEOUT = 10.0  # seconds for a picture, redirects included
MAX_REDIRECTS = 5
MAX_BYTES = 20_000_000  # of a picture's file
PER_HOST = 8  # pictures that a process fetches from one host at a time
CACHE_BYTES = 1_000_000_000  # of decoded pictures in the memory of each machine
STREAM_PIXELS = 32_000_000  # a larger picture is not decoded: many threads decode at the same time
trusted = functools.cache(ssl.create_default_context)  # loading the certificates takes a while


class Refused(Exception):
    """A row that gives no picture. Its text is the reason, under which it is counted."""


def is_public(address):
    """Whether an IP address belongs to the public internet. IPv6 forms that hold an IPv4 address count as that one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 4:
        return ip.is_global and not ip.is_multicast
    nat64 = ip in ipaddress.ip_network("64:ff9b::/96")
    inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if nat64 else ip.ipv4_mapped or ip.sixtofour
    return is_public(str(inner)) if inner else ip.is_global and ip in ipaddress.ip_network("2000::/3")


def seconds_left(deadline):
    if (seconds := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return seconds


class DeadlineReader(io.RawIOBase):
    """Reads a socket until a time.monotonic(). A socket's own timeout starts anew with every packet, so a server that
    sends a byte a second could occupy a thread for hours."""

    def __init__(self, sock, deadline):
        self.sock, self.deadline = sock, deadline

    def makefile(self, mode):  # the only method of a socket that HTTPResponse calls
        return io.BufferedReader(self)

    def readable(self):
        return True

    def readinto(self, buffer):
        self.sock.settimeout(seconds_left(self.deadline))
        return self.sock.recv_into(buffer)


def connect(url, deadline, private):
    """A socket to the host of a URL (from urlsplit). Its name is resolved once, and the addresses that were checked are
    the ones that are used: a second look-up might give others."""
    secure = url.scheme == "https"
    found = socket.getaddrinfo(url.hostname, url.port or (443 if secure else 80), type=socket.SOCK_STREAM)
    places = [place[:2] for *_, place in found]  # (address, port)
    if not private and not all(is_public(address) for address, _ in places):
        raise Refused("private address")
    for place in places:
        try:
            sock = socket.create_connection(place, seconds_left(deadline))
            return trusted().wrap_socket(sock, server_hostname=url.hostname) if secure else sock
        except OSError:  # for example IPv6 where there is none
            if place == places[-1]:
                raise


def request(url, deadline, max_bytes, private):
    """One HTTP request: (the bytes of the answer, None), or (None, the URL that it redirects to)."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Refused("bad address")
    target = urllib.parse.quote(f"{parts.path or '/'}{parts.query and '?' + parts.query}", safe=string.punctuation)
    host = parts.netloc.rpartition("@")[2].encode("idna").decode()
    lines = [f"GET {target} HTTP/1.1", f"Host: {host}", f"User-Agent: {USER_AGENT}", "Connection: close", "", ""]
    with connect(parts, deadline, private) as sock:
        sock.sendall("\r\n".join(lines).encode())
        response = http.client.HTTPResponse(DeadlineReader(sock, deadline))
        response.begin()
        location = response.headers["Location"]
        if location and response.status in (301, 302, 303, 307, 308):
            # http.client reads a header's bytes, which are mostly UTF-8, as latin-1.
            location = urllib.parse.quote(location.strip(), safe=string.punctuation, encoding="latin-1")
            return None, urllib.parse.urljoin(url, location)
        if response.status != 200:
            raise Refused(f"http {response.status}")
        if re.search("no(image)?ai", str(response.headers.get_all("X-Robots-Tag")).lower()):
            raise Refused("declined by its owner")  # the header asks not to train on the picture
        content = response.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise Refused("too large")
        if response.length:  # the bytes that are missing
            raise Refused("truncated")
        return content, None


def fetch(url, private=False, timeout=None, max_bytes=MAX_BYTES):
    """The bytes behind an http(s) URL, within `timeout` seconds [TIMEOUT], if the look-up of the host's name takes no
    longer. private: as --private-hosts. Whatever goes wrong raises Refused."""
    deadline = time.monotonic() + (timeout or TIMEOUT)
    try:
        for _ in range(1 + MAX_REDIRECTS):
            content, url = request(url, deadline, max_bytes, private)
            if content is not None:
                return content
    except Refused:
        raise
    except TimeoutError:
        raise Refused("too slow") from None
    except OSError:
        raise Refused("no connection") from None
    except Exception:  # the libraries raise nearly anything on a broken URL or header
        raise Refused("bad address or answer") from None
    raise Refused("too many redirects")


def decode_picture(content, size, min_side=0):
    """Bytes of a picture file -> (size, size, 3) uint8, the centre square. Raises Refused."""
    try:
        with Image.open(io.BytesIO(content)) as picture:  # reads the header, not the pixels
            width, height = picture.size
        many_scans = content.count(b"\xff\xda") > 200  # of a JPEG, which then takes minutes
        too_large = width * height > STREAM_PIXELS or many_scans
        if not too_large and min(width, height) >= min_side:
            return common.read_picture(content, size)
    except Exception:  # Pillow raises nearly anything on a broken file
        raise Refused("broken picture") from None
    raise Refused("too large" if too_large else "too small")


def read_metadata(path):
    """The rows of a .jsonl, .parquet or .tar shard: JSON or dictionaries. A shard that cannot be read, or not to its
    end, ends with None. Raises UserError if pyarrow is missing."""
    try:
        if path.endswith(".parquet"):
            from pyarrow import parquet

            for batch in parquet.ParquetFile(path).iter_batches(1000):
                yield from batch.to_pylist()
        elif path.endswith(".tar"):  # webdataset: the pictures are inside
            for row in common.tar_rows(Path(path)):
                yield {"caption": row.caption, "picture": {"bytes": row.picture}}
        else:
            with open(path, encoding="utf-8-sig", errors="replace") as file:
                yield from file
    except ImportError:
        raise UserError(".parquet shards need a package that is not here: pip install pyarrow") from None
    except Exception:  # each format fails in its own way
        yield None


def parse_row(row, min_score=0.0, min_side=0):
    """A row of read_metadata -> (URL, caption, the picture file's bytes or None), by our names or LAION's (URL, TEXT,
    AESTHETIC_SCORE, ...). A picture within the row is {"bytes": ...}, as Hugging Face stores it. Raises Refused."""
    if row is None:
        raise Refused("broken shard")
    try:
        row = json.loads(row) if isinstance(row, str) else row
        row = {key.lower(): value for key, value in row.items()}
        url = (row.get("url") or "").strip()
        content = next((v["bytes"] for v in row.values() if isinstance(v, dict) and "bytes" in v), None)
        caption = next((row[key] for key in common.CAPTION_FIELDS if row.get(key)), "").strip()
        caption.encode()  # fails on half a surrogate pair, which no text encoder can read
        score = float(row.get("aesthetic_score") or row.get("aesthetic") or 0)
        side = min(float(row.get(key) or math.inf) for key in ("width", "height"))
    except Exception:  # a row can be anything
        raise Refused("broken row") from None
    if not caption and row.keys() & set(common.CAPTION_FIELDS):
        raise Refused("empty caption")
    if not caption or not (url or content):
        what = "url or picture" if caption else "text, caption or prompt"
        raise Refused(f"no {what} among {', '.join(row)}"[:200])
    if min_score and not score >= min_score:  # also refuses NaN
        raise Refused("low score")
    if side < min_side:
        raise Refused("too small")
    return url, caption, content


def first_captions(names, count):
    """The first captions in metadata shards, at most `count`. Raises UserError with the reasons if there is none."""
    captions, reasons = [], {}
    for row in itertools.chain.from_iterable(map(read_metadata, names)):
        try:
            captions.append(parse_row(row)[1])
        except Refused as problem:
            reasons[str(problem)] = None
        if len(captions) == count:
            break
    if not captions:
        raise UserError(f"no row of {names[0]} can be used: {', '.join(reasons) or 'there is none'}"[:300])
    return captions


class Stream:
    """Captioned pictures from metadata shards, without end: pass after pass, with the shards in a new order each time.
    The rows within a shard keep their order: shuffle them when you write it.

    Row i of file f belongs to the process with (f + i) % world == rank in every pass, so that its picture is in that
    process's cache. Threads load a window of rows at once, but samples are given out in the order of the rows, so that
    a checkpoint need only hold a place (pass, shard in the pass's order, row). counts: number of rows by outcome,
    "fetched", "from the cache" or the reason of a refusal. Raises UserError.
    """

    def __init__(self, config):
        self.config, self.rank, self.world = config, common.rank(), common.world()
        self.names = sorted(glob.glob(config.stream, recursive=True))
        unknown = [name for name in self.names if not name.endswith((".jsonl", ".parquet", ".tar"))]
        if unknown or not self.names:
            what = f"{unknown[0]} is no shard" if unknown else f"no shards at {config.stream}"
            raise UserError(f"{what}; name .jsonl, .parquet or .tar files, e.g. --stream 'shards/*.jsonl'")
        if config.epochs:
            raise UserError("a stream has no epochs; give --steps or --minutes")
        Image.init()  # loads Pillow's formats, before several threads would at the same time
        self.pool = concurrent.futures.ThreadPoolExecutor(config.threads)
        self.gates = [threading.Semaphore(PER_HOST) for _ in range(1024)]  # one for each host, by a hash of its name
        budget = CACHE_BYTES // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.cache, self.cache_size = {}, budget // (3 * config.image_size**2)  # URL -> decoded picture, oldest first
        # Rows under way: enough that the threads have work during a step, few enough to fit into memory.
        self.window = 4 * config.threads + 2 * config.batch_size // (config.grad_accum * self.world)
        count = SHOWN if config.clip else 20_000  # from which a table of words is learned
        self.captions, self.skipped = first_captions(self.names, count), []
        self.resume([{"place": (0, 0, 0), "counts": {}}])

    def walk(self, first_pass, shard, first_row):
        """Without end, (place after the row, row) for each row of this process, beginning at the given place."""
        for pass_number in itertools.count(first_pass):
            order, found = list(range(len(self.names))), False
            random.Random(f"{self.config.seed} {pass_number}").shuffle(order)
            for place, file in list(enumerate(order))[shard:]:
                for i, row in enumerate(read_metadata(self.names[file])):
                    if i >= first_row and (file + i) % self.world == self.rank:
                        found = True
                        yield (pass_number, place, i + 1), row
                first_row = 0
            if not found and pass_number > first_pass:
                raise UserError(f"{self.config.stream} has no rows for process {self.rank + 1} of {self.world}")
            shard = 0

    def load(self, row):
        """In a thread: (outcome, URL, (S, S, 3) uint8 or None, caption) of a row."""
        config = self.config
        try:
            url, caption, content = parse_row(row, config.min_score, config.min_side)
            picture = self.cache.get(url)
            if picture is not None:
                return "from the cache", url, picture, caption
            if content is None:
                host = url.partition("://")[2].partition("/")[0].lower()
                with self.gates[zlib.crc32(host.encode()) % len(self.gates)]:
                    content = fetch(url, config.private_hosts)
            return "fetched", url, decode_picture(content, config.image_size, config.min_side), caption
        except Refused as problem:
            return str(problem), None, None, None

    def prefetch(self, count, stopped=lambda: False):
        """Have the next `count` samples ready for read(); False if stopped() became true before. Raises UserError if
        two passes gave no picture."""
        self.before = self.state()
        while len(self.ready) < count:
            while len(self.ahead) < self.window:
                place, row = next(self.rows)
                self.ahead.append((place, self.pool.submit(self.load, row)))
            if stopped():
                return False
            place, task = self.ahead[0]
            if not concurrent.futures.wait([task], timeout=0.5).done:
                continue
            self.ahead.popleft()
            outcome, url, picture, caption = task.result()
            self.place = place
            self.counts[outcome] += 1
            if picture is not None:
                self.good_pass = place[0]
                self.ready.append((picture, caption))
                if url:  # not a picture from inside a shard
                    self.cache[url] = picture
                    if len(self.cache) > self.cache_size:
                        del self.cache[next(iter(self.cache))]
            elif place[0] > self.good_pass + 1:
                self.close()
                reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.counts.most_common(4))
                raise UserError(f"two passes over {self.config.stream} gave no picture: {reasons}")
        return True

    def read(self, index):
        """As many samples as `index` is long: (B, 3, S, S) in [-1, 1], captions."""
        pictures, captions = zip(*(self.ready.pop(0) for _ in index))
        return common.picture_tensor(pictures) / 127.5 - 1, list(captions)

    def state(self):
        """This process's place and counts, for a checkpoint. Samples that are ready but not read come again."""
        return self.before if self.ready else {"place": self.place, "counts": dict(self.counts)}

    def resume(self, states):
        """Go on from the states in a checkpoint, one per process. With the same number of processes each goes on from
        its own place. With another number all go on from the earliest place: some rows come twice, none is left out."""
        places = [tuple(state["place"]) for state in states]
        self.place = places[self.rank] if len(places) == self.world else min(places)
        counts = [collections.Counter(state["counts"]) for state in states]
        self.counts = sum([] if self.rank else counts, collections.Counter())
        self.rows, self.ahead, self.ready = self.walk(*self.place), collections.deque(), []
        self.good_pass = self.place[0]

    def close(self):
        """End the threads after the fetches that they are at."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def checksum(self):
        return zlib.crc32(json.dumps([Path(name).name for name in self.names]).encode())


# ----------------------------------------------------------------------------------------------------------------
# Training

NULL_PROB = 0.1  # of captions that are replaced by the null caption ("Classifier Free Guidance")
SHOWN = 16  # captions that are sampled during training
MODEL_FIELDS = "arch patch_size depth num_heads head_dim text_dim predict".split()


class TrainingData:
    """The batches of any source, encoded: batch(step, rows) -> x (B, C, H, W) and text, both on the device. One sample
    in fifty is held out, at least one and at most 1,000; of a stream none. Raises UserError.

    known: the header of the weights that a run starts or resumes from. header: what sampling from a checkpoint needs;
    null: the encoding of ""; shown: of captions to sample during training; rows_at_once: rows of a pass.
    """

    def __init__(self, config, device, precision, known=None):
        self.config, self.device, self.precision, self.encoder = config, device, precision, None
        self.rows_at_once = config.batch_size // (config.grad_accum * common.world())
        self.vae = common.load_vae(config.vae).to(device) if config.vae else None
        self.stream = Stream(config) if config.stream else None
        self.prepared = not self.stream and common.has_shards(config.data)
        shards = common.Shards(config.data[0], ("latents", "text")) if self.prepared else None
        source = self.source = self.stream or shards or PictureSource(config)
        good = [i for i, caption in enumerate(source.captions) if caption]
        order = [good[i] for i in torch.randperm(len(good), generator=common.generator(config.seed, 7)).tolist()]
        count = 0 if self.stream else max(1, min(1000, len(order) // 50))
        self.train, self.held_out = order[count:], order[:count]
        if not self.train:
            what = f"{len(good)} captions in {' '.join(config.data)}, and two are needed, one to hold out"
            where = f"under {', '.join(common.CAPTION_FIELDS)}, or beside each picture as .txt"
            raise UserError(f"{what}; write them into metadata.jsonl {where}")
        missing = [name for name, caption in zip(source.names, source.captions) if not caption]
        self.skipped = source.skipped + [f"{name}: no caption" for name in missing]
        self.header = {"data": [len(order), source.checksum()], "vae": None, "latent": [3, config.image_size]}
        if self.prepared:
            self.header |= {"latent": list(source.read([0])[0].shape[1:3]), "vae": source.header["vae"]}
            self.header["text"], self.null = {"clip": source.header["clip"]}, source.extra("null")
            if self.vae:
                common.warn_if_other("--vae", self.vae.hash, source.header["vae"])
        elif config.clip:
            self.encoder = Clip(config.clip, device)
            self.header["text"] = {"clip": self.encoder.hash}
        else:
            old = (known or {}).get("text", {})
            captions = [source.captions[i] for i in self.train]
            self.encoder = Words.learn(captions, old.get("words", []), old.get("length", 0))
            self.header["text"] = {"words": self.encoder.vocabulary, "length": self.encoder.length}
        if self.vae and not self.prepared:
            latent = [self.vae.latent_channels, config.image_size // self.vae.stride]
            self.header |= {"latent": latent, "vae": self.vae.hash}
        if self.encoder:
            self.null = self.encoder([""])
        if self.null.is_floating_point() and self.null.shape[-1] != config.text_dim:
            raise UserError(f"--text-dim {config.text_dim}: this CLIP's states have width {self.null.shape[-1]}")
        shown = (self.held_out or self.train)[:SHOWN]
        self.shown = self.encoder([source.captions[i] for i in shown]) if self.encoder else source.read(shown)[1]

    def __len__(self):
        return 0 if self.stream else len(self.train)

    def load(self, index, rng):
        """Samples by their numbers -> x, text: flipped, encoded, some captions replaced by the null caption. rng: a
        BatchRng of as many rows."""
        x, text = self.source.read(index)
        if self.config.flip:
            x = common.random_flip(x, self.config.flip, rng)
        text = self.encoder(text) if self.encoder else text
        text[rng.rand() < NULL_PROB] = self.null[0]
        x, text = x.to(self.device), text.to(self.device)
        if self.vae and not self.prepared:
            with torch.no_grad(), autocast(self.device, self.precision):
                x = self.vae.encode(x)
        return x, text

    def batch(self, step, rows):
        """The rows of the batch of optimizer step `step`; of a stream, the next ones."""
        config = self.config
        index = common.batch_index(config, len(self.train), step)[rows]
        rng = BatchRng(config.batch_size, config.seed, step, 2, rows=rows)
        return self.load([self.train[i] for i in index], rng)

    def wait_for_stream(self, run):
        """Wait until a stream has the pictures of the next step; False if the run was interrupted before."""
        if not self.stream:
            return True
        there = self.stream.prefetch(self.config.batch_size // common.world(), lambda: run.interrupted)
        return not common.all_max(not there)[0]

    def state(self):
        """What a checkpoint must hold to go on with a stream: the places of all processes."""
        if not self.stream:
            return {}
        states = [self.stream.state()] * common.world()
        if common.world() > 1:
            torch.distributed.all_gather_object(states, self.stream.state())
        return {"stream": states}


def resolve(config):
    """(config, start): the config that training follows, and the model of --from, whose sizes it takes over; None for a
    run that resumes. A stream without a budget goes on until Ctrl-C, at a constant learning rate and the times of the
    end of a run (re-diffusion 6)."""
    start = None
    if config.stream and not (config.minutes or config.steps or config.epochs):
        warmup = config.warmup if config.warmup >= 1 else 100.0
        config = dataclasses.replace(config, decay="none", warmup=warmup, time_mean=config.time_mean[-1:])
    if config.start and config.resume is None:
        start, old = load_model(config.start, "cpu")
        config = dataclasses.replace(config, **{name: getattr(old, name) for name in MODEL_FIELDS})
    return config, start


def copy_weights(start, model, header):
    """Copy the weights of --from into a model that may know more words. Raises UserError."""
    weights = start.state_dict()
    if model.words is not None and start.words is not None:  # new words keep their random vectors
        known = weights["words.weight"]
        weights["words.weight"] = torch.cat((known, model.words.weight.detach()[len(known) :]))
    common.warn_if_other("--vae", header["vae"], start.header["vae"])
    load_into(model, weights, "--from")


@torch.no_grad()
def held_out_loss(config, data, model):
    """Mean loss of up to 256 held-out samples at fixed noise and times, those of the run's start; None for a stream."""
    index, losses = data.held_out[:256], []
    for first in range(0, len(index), data.rows_at_once):
        rows = slice(first, min(first + data.rows_at_once, len(index)))
        x, text = data.load(index[rows], BatchRng(len(index), config.seed, 0, 3, rows=rows))
        rng = BatchRng(len(index), config.seed, 0, 4, rows=rows, device=data.device)
        t, noise = sample_times(config, rng, model.time_min, 0.0), rng.randn(*x.shape[1:])
        with autocast(data.device, data.precision):
            v_hat = model(flow_point(x, noise, t), t, text)
        losses.append(flow_loss(v_hat, x, noise))
    return torch.cat(losses).mean().item() if losses else None


def preview(config, data, model):
    """RGB samples for the captions data.shown, from the same noise, half as many at a time as in a training pass."""
    channels, size = data.header["latent"]
    settings = dict(cfg=config.cfg, precision=data.precision, batch_size=max(1, min(SHOWN, data.rows_at_once // 2)))
    z = sample_latents(model, data.shown, data.null, (channels, size, size), **settings)
    return torch.cat([to_rgb(data.vae, part) for part in z.split(settings["batch_size"])])


def train(config):
    """Train, or go on with --resume; the result is a run folder. Raises UserError."""
    device, precision = common.init_training(config)
    config, start = resolve(config)
    may_change = "vae", "clip", "stream", "threads", "private_hosts", "start"
    run = common.Run(config, "dit_t2i", may_change, endless=bool(config.stream), enough=30_000)
    known = load_tensors(run.state_path, header_only=True)[1] if run.resuming else start.header if start else None
    data = TrainingData(config, device, precision, known)
    torch.manual_seed(config.seed)
    model = build_model(config, data.header["latent"], len(data.header["text"].get("words", ())))
    if start:
        copy_weights(start, model, data.header)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    trained = common.parallelize(config, model, ema, device, lambda net: net.layers)
    muon_modules = [part for layer in model.layers for part in (layer.attn, layer.vis_ff, layer.txt_ff)]
    optimizer, scaler = common.make_optimizer(config, model, device, muon_modules)
    run.header = data.header
    amount = f"{len(data):,} samples and {len(data.held_out):,} held out" if len(data) else config.stream
    about = f"{amount}, {precision} on {device}"
    state = run.start(model, ema, optimizer, scaler, about, len(data), data.skipped)
    if "stream" in state:
        data.stream.resume(state["stream"])
    common.compile_blocks(config, device, model.layers)
    passes = common.micro_batches(config)
    for step in run.steps():
        if not data.wait_for_stream(run):  # a stream that was interrupted while it waited for pictures
            break
        lr = config.lr * common.lr_factor(run.progress, step, config.warmup, config.decay)
        common.set_lr(optimizer, lr)
        for rows in passes:  # this process's rows of the batch
            rng = BatchRng(config.batch_size, config.seed, step, 1, rows=rows, device=device)
            x, text = data.batch(step, rows)
            t = sample_times(config, rng, model.time_min, run.progress)
            # z_t = (1 - t) * x_0 + t * noise
            noise = rng.randn(*x.shape[1:])
            z_t = flow_point(x, noise, t)
            with autocast(device, precision):
                v_hat = trained(z_t, t, text)
            loss = flow_loss(v_hat, x, noise)  # (B,)
            scaler.scale(loss.mean() / config.grad_accum).backward()
            run.add(loss, t)
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        common.update_ema(ema, model, step, config.ema)
        run.log(grad_norm, lr)
        if run.checkpoint_due:
            run.save(model, ema, optimizer, scaler, held_out_loss(config, data, ema), **data.state())
        if run.pictures_due:
            run.save_pictures(preview(config, data, ema))
    if data.stream:
        data.stream.close()
        if not run.done:
            run.save(model, ema, optimizer, scaler, **data.state())
        counts = sum((collections.Counter(state["counts"]) for state in data.state()["stream"]), collections.Counter())
        print(f"rows until step {run.step}: " + ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common()))
    return run.finish()


# ----------------------------------------------------------------------------------------------------------------
# Subcommands


def load_model(path, device="cpu"):
    """(DiT in eval mode, Config) from our own checkpoint, or one of the post's repository (.pt). model.header holds the
    shape "latent" (C, S), "text", {"words", "length"} or {"clip"}, and the hash "vae". Raises UserError."""
    weights, header = load_tensors(path)
    if header and header.get("system") != "dit_t2i":
        raise UserError(f"{path} is a checkpoint of {header.get('system', 'another program')}; name one of dit_t2i.py")
    with common.reading(path, "checkpoint of dit_t2i.py"):
        if not header:
            weights = weights.get("ema_model", weights)
            width, channels, patch, _ = weights["patch_embed.weight"].shape
            sizes = {"patch_size": patch, "text_dim": len(weights["text_norm.weight"])}
            sizes["head_dim"] = len(weights["layers.0.attn.vis_q_norm.weight"])
            sizes["num_heads"] = width // sizes["head_dim"]
            sizes["depth"] = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
            header = {"config": PRESETS["paper"] | sizes, "latent": [channels, 32], "text": {"clip": None}, "vae": None}
        config = common.config_from_header(Config, header, path)
        model = build_model(config, header["latent"], len(header["text"].get("words", ())))
    load_into(model, weights, path)
    model.header = header
    return model.to(device).eval().requires_grad_(False), config


def load_for_prompts(options, precision):
    """(DiT, Config, {"precision", "encoder", "vae"} for sample()) that the options name. Raises UserError."""
    device = common.pick_device(options.device)
    model, config = load_model(common.find_weights(options.weights, "dit_t2i"), device)
    parts = {"precision": common.pick_precision(precision, device), "vae": None}
    parts["encoder"] = load_text_encoder(model, options.clip or config.clip, device)
    if model.header["latent"][0] != 3:
        parts["vae"] = common.load_matching_vae(options.vae or config.vae, model.header).to(device)
    return model, config, parts


@dataclasses.dataclass
class SampleConfig(common.SampleConfig):
    """The options of `sample`."""

    texts: tuple[str, ...] = option((), 'prompts, e.g. "a red car"; each makes a row of pictures', positional=True)
    prompt: tuple[str, ...] = option((), "the same, as an option")
    prompts: str = option("", "file with a prompt in each line")
    negative: str = option("", "prompt that guidance leads away from (default: the empty caption)")
    num: int = option(4, "pictures of each prompt", low=1)
    cfg: float | None = option(None, "guidance: 1 conditional, 0 unconditional (default: the weights')", low=0.0)
    steps: int = option(28, "steps from noise to picture", low=1)
    solver: str = option("euler", "order 1: euler; order 2: heun, dpm", choices=tuple(common.SOLVERS))
    size: int | None = option(None, "side of the pictures in pixels (default: as trained)", low=8)
    batch_size: int = option(16, "pictures at a time", low=1)
    clip: str = option("", "folder of CLIP (default: the one of the training run)")
    vae: str = option("", "autoencoder (default: the one of the training run)")


def sample_command(options):
    """Write the samples of all prompts: a grid, with --each single pictures, with --gif their way from noise."""
    prompts = [*options.texts, *options.prompt]
    if options.prompts:
        with common.reading(options.prompts, "list of prompts"):
            prompts += filter(str.strip, Path(options.prompts).read_text("utf-8-sig").splitlines())
    if not prompts or not all(map(str.strip, prompts)):
        raise UserError('no prompt; give one, e.g. sample "a red car"')
    model, config, parts = load_for_prompts(options, options.precision)
    for line in itertools.chain.from_iterable(map(parts["encoder"].warnings, [*prompts, options.negative])):
        print(f"warning: {line}", file=sys.stderr)
    frames, callback = common.record_frames(lambda z: common.make_grid(to_rgb(parts["vae"], z[:16])), options.gif)
    names = "num size negative cfg steps seed solver batch_size".split()
    settings = {name: getattr(options, name) for name in names} | parts | {"callback": lambda z, t: callback(z, 1 - t)}
    rgb = sample(model, config, prompts, **settings)
    names = [f"{row:03d}_{options.seed + i:06d}" for row in range(len(prompts)) for i in range(options.num)]
    common.write_samples(rgb, names, options, frames, options.num if len(prompts) > 1 else None)


@dataclasses.dataclass
class DemoConfig(common.DemoConfig):
    clip: str = option("", "folder of CLIP (default: the one of the training run)")
    vae: str = option("", "autoencoder (default: the one of the training run)")


def demo(options):
    """A page: a prompt becomes a picture, step by step."""
    model, config, parts = load_for_prompts(options, "auto")

    def show(prompt, guidance, **settings):
        run = functools.partial(sample, model, config, [prompt], cfg=guidance, **settings, **parts)
        notes = parts["encoder"].warnings(prompt)
        return common.flow_frames(run, 0.0, functools.partial(to_rgb, parts["vae"]), notes)

    words = sorted(model.header["text"].get("words", ()))
    prompts = (Path(__file__).parent / "assets" / "prompts.txt").read_text().splitlines()
    prompts = [prompt for prompt in prompts if not words or set(Words.split(prompt)) <= set(words)] or words[:8]
    inputs = {"prompt": prompts[0], "steps": (1, 50, 28), "guidance": (0.0, 10.0, config.cfg), "seed": (0, 999, 0)}
    tab = "Sample", ("z_t", "predicted picture"), show, inputs | {"solver": list(common.SOLVERS)}, prompts
    about = f"<details><summary>The {len(words)} words that are known</summary>{', '.join(words)}</details>"
    common.open_page(options, "Text to image", about if words else "", tab)


@dataclasses.dataclass
class PrepareConfig(common.EncodeConfig):
    """The options of `prepare`."""

    clip: str = option("", "folder of CLIP ViT-L/14")


def prepare_command(options):
    """Encode captioned pictures into shards of latents and CLIP states. After a kill the same command goes on with the
    first shard that is missing. Raises UserError."""
    if not (options.data and options.out and options.vae and options.clip):
        raise UserError("prepare needs --data, --out, --vae and --clip")
    device = common.pick_device(options.device)
    precision = common.pick_precision(options.precision, device)
    vae, clip = common.load_vae(options.vae).to(device), Clip(options.clip, device)
    header = {"vae": vae.hash, "clip": clip.hash, "image_size": options.image_size}

    def encode(pictures, rows):
        with autocast(device, precision):
            latents = vae.encode(pictures.to(device))
        return {"latents": latents, "text": clip([row.caption for row in rows])}

    done, skipped = common.write_shards(options, header, encode, {"null": clip([""]).bfloat16()})
    common.tell_skipped(skipped)
    if not done:
        raise UserError(f"no readable picture in {' '.join(options.data)}")
    print(f"{done:,} samples in {options.out}; now: python dit_t2i.py train --preset paper --data {options.out}")


SUBCOMMANDS = {
    "train": (train, Config, PRESETS, "train, e.g. train --data DIR"),
    "sample": (sample_command, SampleConfig, None, 'sample pictures, e.g. sample "a red car" --num 4'),
    "prepare": (prepare_command, PrepareConfig, None, "encode pictures: --data DIR --out SHARDS --vae VAE --clip CLIP"),
    "demo": (demo, DemoConfig, None, "a page in the browser: prompts become pictures, step by step"),
    "export": common.export("dit_t2i"),
}


def main(argv=None):
    """The command line: the words after the file's name, or sys.argv's; returns the exit code."""
    return common.run_command_line("dit_t2i", __doc__, SUBCOMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
