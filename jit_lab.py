"""JiT in CIELAB: a plain transformer on pixels learns faces from pictures of which most have lost their colour.

The system of the post "Training a Waifu Diffusion Model with Patch Diffusion and Rectified Flow" (March 2026). As in
the post, t = 0 is NOISE and t = 1 is DATA. The network predicts the clean picture; the velocity follows from it.

    python jit_lab.py train                                  ten minutes on two CPU cores, 10,000 painted faces
    python jit_lab.py train --data DIR --color-fraction 1    your own pictures, all in colour
    python jit_lab.py sample --num 16 --gif faces.gif        from the run in runs/, else from weights/
    python jit_lab.py novelty --data DIR                     how far is each sample from the nearest training picture?

What you will see, with the demo preset on 10,000 drawings in colour (faces-80 in docs/results.md, --color-fraction 1,
--steps 1500, 12 to 15 minutes on two cores of an AMD EPYC with AVX512-BF16): coloured squares after 150 steps,
faces that anybody recognises after 450, hair that holds together after 1,000. The first command paints its own faces
and keeps the colour of one in ten.

The loss starts near 0.6 (with the colour of one in ten near 0.45): a new network outputs 0, so the first loss is the
mean of (x / (1 - t))^2, weighted as in flow_loss(). It cannot reach 0, because noise hides part of the picture: after
48,000 pictures it is near 0.023, and in eight bins of t 0.047, 0.021, 0.014, 0.013, 0.016, 0.027, 0.06 and 0.06 (few
times fall into the last). index.html shows them: small t is about shapes, large t about details.

    the post       here          shape           what it is
    x_1            x             (B, 3, H, W)    the picture, in L*a*b* scaled to about [-1, 1] (Part 2)
    x_0            noise         (B, 3, H, W)    N(0, 1), times noise_scale()
    t              t             (B,)            time in [0, 1]; sigmoid of a normal number in training
    x_t            x_t           (B, 3, H, W)    (1 - t) x_0 + t x_1 (Part 1)
    x^_1, pred_x1  x_hat         (B, 3, H, W)    model(x_t, t, y, top, left): the predicted picture (Parts 1 and 5)
    v              velocity      (B, 3, H, W)    (x^_1 - x_t) / (1 - t) (Part 1)
    m, mask        mask          (B, 3, 1, 1)    0 for the chroma of a monochrome picture, else 1 (Parts 2 and 5)
    top_idx        top, left     integers        place of a crop in the grid of patches (Parts 3 and 4)

    Part 1, rectified flow            common.flow_point; predicted_data     Part 5, masked loss       flow_loss
    Part 2, CIELAB, lost colours      rgb_to_lab, load_data, Dataset        Part 5, oversampling      Dataset.batch
    Part 3, patch diffusion           random_crop                           Part 6, sampling          sample
    Part 4, the transformer           JiT                                   Part 6, LPIPS             novelty
    Part 4, RoPE                      common.rope_2d, common.apply_rope     Part 8, weights           load_model
"""

import copy
import csv
import dataclasses
import functools
import io
import math
import sys
from pathlib import Path

import common
from common import BatchRng, UserError, autocast, flow_point, lr_factor, micro_batches, option, set_lr, update_ema

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import ImageDraw, ImageOps
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass
class Config(common.TrainConfig):
    """The options of `train`; PRESETS holds what each preset changes."""

    # Data (Parts 2, 3 and 5)
    image_size: int = option(80, "side of the pictures in pixels", low=8)
    space: str = option("lab", "colour space of the model", choices=("lab", "rgb"))
    color_fraction: float = option(0.1, "part of the pictures that keep their colour, 1 = all", low=0.0, high=1.0)
    color_weight: float = option(3.0, "how many times as often a picture in colour is taken", low=0.01)
    full_image_prob: float = option(0.2, "probability of the full picture; else one of --crop-sizes", low=0.0, high=1.0)
    crop_sizes: tuple[float, ...] = option((0.5, 0.8, 1.0), "sides of crops, as parts of the side", low=0.01, high=1.0)
    # Model (Part 4)
    patch_size: int = option(8, "side of a patch in pixels; each patch is a token", low=1)
    hidden_size: int = option(256, "width of a token", low=4)
    depth: int = option(6, "number of blocks", low=1, high=1000)
    num_heads: int = option(4, "attention heads", low=1)
    bottleneck_dim: int = option(128, "width of the bottleneck in the patch embedding", low=1)
    # Objective (Parts 1 and 5)
    predict: str = option("x", "what the network outputs: data, velocity or noise", choices=("x", "v", "eps"))
    loss: str = option("v", "what the error is measured in: velocity or data", choices=("v", "x"))
    time: str = option("logit-normal", "distribution of t in training", choices=("logit-normal", "uniform"))
    time_mean: float = option(-0.2, "mean of the normal number whose sigmoid is t; lower: more noise (JiT: -0.8)")
    time_std: float = option(1.0, "its standard deviation", low=0.0)
    noise_scale: float = option(1.0, "standard deviation of the noise; JiT takes 2 at 512 pixels", low=0.01)
    lab_noise: tuple[float, ...] = option((1.0, 1.0, 1.0), "factors of it for L*, a* and b* (not in rgb)", low=0.01)
    cfg: float = option(1.0, "guidance of the samples while training; the default of `sample`", low=0.0)
    # Optimizer (Part 5)
    optimizer: str = option("adamw", "muon learns more from each picture", choices=("adamw", "muon"))


# Muon learns from 70,000 pictures nearly what AdamW learns from 120,000 (docs/results.md), so ema averages over fewer
# steps. 10,000 pictures are not few for a run of ten minutes, which sees each five times: it learns more from full
# pictures than from crops.
DEMO = dict(minutes=10.0, optimizer="muon", decay="linear", ema=0.995, full_image_prob=1.0, cfg=1.25)
# L* spreads over most of the scale [-1, 1], a* and b* over little of it, so noise of 1 hides colour until t is near 1.
# These values are about the spread that noise of 1 in RGB has in L*a*b*. Less noise hides less at the same t, so times
# are lower (nearer to noise) on average.
DEMO |= dict(lab_noise=(0.6, 0.35, 0.35), time_mean=-0.9)

# The post's model and training: 1,280 epochs of 10,000 pictures at batch 256 are 50,000 steps. (It used fp16.)
PAPER = dict(patch_size=4, hidden_size=768, depth=12, num_heads=12)
PAPER |= dict(steps=50_000, batch_size=256, grad_accum=4, lr=3e-4, checkpoint_every=1000)
# What the post does not state is JiT's. (Warm-ups and gradient clipping are ours.)
PAPER |= dict(time_mean=-0.8, time_std=0.8, ema=0.9999, decay="none")

PRESETS = {"demo": DEMO, "paper": PAPER}


# ----------------------------------------------------------------------------------------------------------------
# Model: the JiT transformer (Li & He 2025; Part 4 of the post)
# B pictures, C channels, N = (H / patch_size)(W / patch_size) tokens, D hidden_size, h heads


class PatchEmbed(nn.Module):
    """Patches -> tokens, (B, C, H, W) -> (B, N, D), through a bottleneck: a patch has patch_size^2 C numbers, but those
    of pictures lie near a space of far fewer dimensions (JiT, section 4.3)."""

    def __init__(self, patch_size, in_channels, bottleneck_dim, hidden_size):
        super().__init__()
        self.proj1 = nn.Conv2d(in_channels, bottleneck_dim, patch_size, stride=patch_size, bias=False)
        self.proj2 = nn.Conv2d(bottleneck_dim, hidden_size, 1)

    def forward(self, x):
        # Contiguous, because later layers would keep the convolution's channels-first memory and take twice the time.
        return self.proj2(self.proj1(x)).flatten(2).transpose(1, 2).contiguous()


class Attention(nn.Module):
    """Self-attention. Queries and keys are normalised (QK-norm), then rotated by their positions (RoPE)."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q_norm = nn.RMSNorm(hidden_size // num_heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(hidden_size // num_heads, eps=1e-6)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x, rope):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, h, N, D/h)
        q = common.apply_rope(self.q_norm(q.float()), rope).to(v.dtype)
        k = common.apply_rope(self.k_norm(k.float()), rope).to(v.dtype)
        return self.proj(common.attention(q, k, v).transpose(1, 2).flatten(2))  # (B, N, D)


class SwiGLU(nn.Module):
    """w3(silu(x1) * x2) with x1, x2 = w12(x) (Shazeer 2020, eq. 6). Its inner width is 2/3 of the usual 4 D, so that
    its three matrices have as many parameters as the usual two."""

    def __init__(self, hidden_size):
        super().__init__()
        inner = int(4 * hidden_size * 2 / 3)
        self.w12 = nn.Linear(hidden_size, 2 * inner)
        self.w3 = nn.Linear(inner, hidden_size)

    def forward(self, x):
        x1, x2 = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(x1) * x2)


class Block(nn.Module):
    """Attention, then SwiGLU. The condition (B, D) gives shift and scale after each norm and a gate on each branch; the
    gates start at zero, so a new block is the identity (adaLN-Zero; Peebles & Xie 2022, section 3.2)."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.norm1 = nn.RMSNorm(hidden_size, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.RMSNorm(hidden_size, eps=1e-6)
        self.mlp = SwiGLU(hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, condition, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate1.unsqueeze(1) * self.attn(common.modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2.unsqueeze(1) * self.mlp(common.modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens -> the pixels of their patches, (B, N, D) -> (B, N, patch_size^2 C). Its linear layers start at zero."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.RMSNorm(hidden_size, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, condition):
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(common.modulate(self.norm_final(x), shift, scale))


class JiT(nn.Module):
    """ "Just image Transformer": a plain vision transformer on pixels that predicts the clean picture (Part 4).

    model(x_t, t, y, top_idx=0, left_idx=0) -> x_hat (B, C, H, W). x_t (B, C, H, W): H and W are multiples of patch_size
    and fit in the grid of input_size / patch_size patches from the place (top_idx, left_idx), in patches. t: a float, a
    0-d or a (B,) tensor in [0, 1], 1 = data. y: (B,) class labels from 0 to num_classes - 1; the label num_classes
    means "no class"; of a distilled model y is the place of its number of steps in FEW_STEPS. in_context_len: number of
    class tokens put before the picture's tokens at block in_context_start; official JiT checkpoints have 32, the post's
    has none. skip: the number of a block to leave out, for guided_data(). Raises ValueError if a picture does not fit.
    """

    distilled = False

    def __init__(
        self,
        input_size=80,
        patch_size=4,
        in_channels=3,
        hidden_size=768,
        depth=12,
        num_heads=12,
        num_classes=1,
        bottleneck_dim=128,
        in_context_len=0,
        in_context_start=0,
    ):
        super().__init__()
        self.patch_size, self.grid, self.num_classes = patch_size, input_size // patch_size, num_classes
        self.head_dim, self.in_context_start = hidden_size // num_heads, in_context_start
        # Never trained. A parameter, as in the published models, so that the number of parameters is theirs too. Their
        # order is (column sines, column cosines, row sines, row cosines), the reverse of sincos_2d's.
        positions = torch.cartesian_prod(torch.arange(self.grid), torch.arange(self.grid))
        quarters = common.sincos_2d(positions, hidden_size).chunk(4, dim=-1)
        self.pos_embed = nn.Parameter(torch.cat(quarters[::-1], dim=-1).unsqueeze(0), requires_grad=False)
        self.in_context_posemb = nn.Parameter(torch.empty(1, in_context_len, hidden_size)) if in_context_len else None
        self.t_embedder = common.TimestepEmbedder(hidden_size)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, hidden_size)})
        self.x_embedder = PatchEmbed(patch_size, in_channels, bottleneck_dim, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self.initialize_weights()

    def initialize_weights(self):
        """Xavier for matrices; N(0, 0.02^2) for the embedders of label and time; zero for all AdaLN and the output: a
        new model outputs 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in (self.y_embedder["embedding_table"], self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(module.weight, std=0.02)
        if self.in_context_posemb is not None:
            nn.init.normal_(self.in_context_posemb, std=0.02)
        for module in [*self.blocks, self.final_layer]:
            common.zero_init(module.adaLN_modulation[1])
        common.zero_init(self.final_layer.linear)

    def train(self, mode=True):
        """As nn.Module.train(); in eval mode no parameter requires a gradient, because the post's sampling code (Part
        8) calls .numpy() on the output without torch.no_grad()."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(mode and name != "pos_embed")
        return super().train(mode)

    def forward(self, x_t, t, y, top_idx=0, left_idx=0, skip=None):
        p, (batch, channels, height, width) = self.patch_size, x_t.shape
        bottom, right = top_idx + height // p, left_idx + width // p
        if height % p or width % p or min(top_idx, left_idx) < 0 or max(bottom, right) > self.grid:
            picture = f"{height} x {width} pixels at patch ({top_idx}, {left_idx})"
            raise ValueError(f"{picture} do not fit a grid of {self.grid} x {self.grid} patches of {p}")
        # The place of a crop reaches the network only through its slice of the absolute embedding. RoPE is given the
        # same place, as in the post, but its scores depend on differences of positions only: it cannot show where a
        # crop lies, although the post's Part 3 hopes so.
        position = self.pos_embed.unflatten(1, (self.grid, self.grid))[:, top_idx:bottom, left_idx:right].flatten(1, 2)
        rows, columns = (torch.arange(*ends, device=x_t.device) for ends in ((top_idx, bottom), (left_idx, right)))
        rope = common.rope_2d(torch.cartesian_prod(rows, columns), self.head_dim)

        t = torch.as_tensor(t, dtype=torch.float32, device=x_t.device).expand(batch)
        label = self.y_embedder["embedding_table"](y)
        condition = self.t_embedder(t) + label  # (B, D)
        x = self.x_embedder(x_t) + position  # (B, N, D)
        context_len = 0
        for i, block in enumerate(self.blocks):
            if self.in_context_posemb is not None and i == self.in_context_start:
                context = label.unsqueeze(1) + self.in_context_posemb
                context_len = context.shape[1]
                x = torch.cat((context, x), dim=1)  # (B, context_len + N, D)
                # Class tokens have no position: cosine 1 and sine 0 leave them as they are.
                cos, sin = rope
                rope = F.pad(cos, (0, 0, context_len, 0), value=1.0), F.pad(sin, (0, 0, context_len, 0), value=0.0)
            x = x if i == skip else block(x, condition, rope)
        x = self.final_layer(x[:, context_len:], condition)  # (B, N, p p C)
        x = x.unflatten(1, (height // p, width // p)).unflatten(-1, (p, p, channels))  # (B, H/p, W/p, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x_t.shape).float()  # (B, C, H, W)


# ----------------------------------------------------------------------------------------------------------------
# Loss (Part 5) and sampler (Part 6)

MIN_TIME = 0.05  # JiT's bound for 1 - t in the training loss; with --predict eps for t, in sampling too


def predicted_data(config, output, x_t, t):
    """x_hat from the network's output; output and x_t (B, C, H, W), t (B, 1, 1, 1) or a float."""
    if config.predict == "x":
        return output
    if config.predict == "v":
        return x_t + (1 - t) * output
    return (x_t - (1 - t) * output) / torch.as_tensor(t).clamp(min=MIN_TIME)


def flow_loss(config, output, x_t, x, t, mask):
    """The loss of each picture, (B,); output, x_t and x (B, C, H, W), t (B,), mask (B, C, 1, 1) (Part 5).

    --loss v is the formula of Part 5 with v_theta = (x_hat - x_t) / (1 - t), as in Part 1. (Part 5 prints v_theta
    without the division; then it would not match the target x_1 - x_0.) --loss x is the code of Part 5: x_0 is
    subtracted on both sides and cancels, which leaves x_hat - x_1. The two differ by the weight 1 / (1 - t)^2.
    """
    t = t.view(-1, 1, 1, 1)
    error = predicted_data(config, output, x_t, t) - x
    if config.loss == "v":
        # v_hat - v = (x_hat - x_t) / (1 - t) - (x - x_t) / (1 - t) = (x_hat - x) / (1 - t)
        error = error / (1 - t).clamp(min=MIN_TIME)
    # A channel that gets half the noise of L* (--lab-noise) gets twice the weight, so that it counts as much as L*.
    scale = noise_scale(config, t.device)
    error = error * (scale[0] / scale)
    # L = |v_hat - v|^2 * m. As in the post the mean counts masked elements too: a monochrome picture's loss is smaller.
    return (error.square() * mask).mean(dim=(1, 2, 3))


def noise_scale(config, device):
    """Standard deviation of the noise in each channel, (3, 1, 1)."""
    channels = config.lab_noise if config.space == "lab" else (1.0, 1.0, 1.0)
    return config.noise_scale * torch.tensor(channels, device=device).view(3, 1, 1)


def training_times(config, rng):
    """Times of the rows of a BatchRng, (B,): logit-normal (Esser et al. 2024, section 3.1) or uniform."""
    if config.time == "uniform":
        return rng.rand()
    return torch.sigmoid(config.time_mean + config.time_std * rng.randn())


@dataclasses.dataclass
class SampleConfig(common.SampleConfig):
    """The options of `sample`."""

    solver: str = option("euler", "how a step is made", choices=tuple(common.SOLVERS))
    label: int = option(0, "class, for checkpoints with several", low=0)
    cfg: float | None = option(None, "guidance, 1 = none; see guided_data() (default: the weights')", low=0.0)


def guided_data(model, config, x_t, t, label, cfg):
    """x_hat (B, C, H, W), led away from a worse prediction by the factor cfg (1: not). With several classes the worse
    one is made without the label (classifier-free guidance, Ho & Salimans 2022, eq. 6). With one class it is made
    without the second-to-last block (skip guidance, Hyung et al. 2024; after autoguidance, Karras et al. 2024). Both
    have the same kinds of error, the worse one has more of them, so their difference leads away from errors."""

    def predict(label, skip=None):
        y = torch.full((len(x_t),), label, device=x_t.device)
        return predicted_data(config, model(x_t, t, y, skip=skip), x_t, t)

    x_hat = predict(label)
    if cfg == 1:
        return x_hat
    worse = predict(model.num_classes) if model.num_classes > 1 else predict(label, skip=len(model.blocks) - 2)
    return worse + cfg * (x_hat - worse)


@torch.no_grad()
def sample(model, config, num=16, steps=50, seed=0, *, noise=None, callback=None, **options):
    """num pictures, RGB in [0, 1], (num, 3, S, S) (Part 6). Picture i depends on seed + i only, or on noise[i] if
    `noise` is given. options: the other fields of SampleConfig. callback(x_t, t) gets the states of the first batch."""
    options, device = SampleConfig(num=num, steps=steps, seed=seed, **options), next(model.parameters()).device
    precision = common.pick_precision(options.precision, device)
    cfg = config.cfg if options.cfg is None else options.cfg

    def velocity(x_t, t):
        with autocast(device, precision):
            x_hat = guided_data(model, config, x_t, t, options.label, cfg)
        # v = (x_hat - x_t) / (1 - t). No solver calls this at t = 1: its last t is 1 - 1/steps. (The post's bound,
        # max(1 - t, 0.01), acts only above 100 steps.) In the last Euler step 1 - t is the step size, so that the step
        # ends at x_hat, which the post returns.
        return (x_hat - x_t) / (1 - t)

    pictures, times, solver = [], [i / steps for i in range(steps + 1)], common.SOLVERS[options.solver]
    if model.distilled:
        if steps not in FEW_STEPS:
            known = ", ".join(map(str, FEW_STEPS))
            raise UserError(f"--steps {steps}: a distilled model takes {known}; name one of them")
        times, solver = few_times(steps), common.flow_euler
        options.label = FEW_STEPS.index(steps)
    if noise is None:
        noise = common.noise_for(range(seed, seed + num), (3, config.image_size, config.image_size), "cpu")
    for first in common.progress(range(0, num, options.batch_size), "batches"):
        start = noise_scale(config, device) * noise[first : first + options.batch_size].to(device)
        x = solver(velocity, start, times, callback if first == 0 else None)
        pictures.append(to_rgb(config, x))
    return torch.cat(pictures)


# ----------------------------------------------------------------------------------------------------------------
# Colour (Part 2): L*a*b* separates what a picture shows (L*) from its colours (a*, b*). A picture that has lost its
# colours can still teach L*.

# Linear sRGB -> CIE XYZ, and XYZ of white (D65, 2 degree observer), as in scikit-image.
XYZ_FROM_RGB = torch.tensor(
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
)
RGB_FROM_XYZ = torch.linalg.inv(XYZ_FROM_RGB.double()).float()
WHITE = torch.tensor([0.95047, 1.0, 1.08883]).view(3, 1, 1)


def rgb_to_lab(x):
    """RGB in [0, 1] -> (L* / 50 - 1, a* / 128, b* / 128), (B, 3, H, W) float32. A grey's chroma is below 1e-4."""
    x = x.float()
    linear = torch.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    xyz = torch.einsum("ij,bjhw->bihw", XYZ_FROM_RGB.to(x.device), linear) / WHITE.to(x.device)
    # The cube root of CIE 1976; near black, where its slope is infinite, a straight line.
    fx, fy, fz = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(1)
    return torch.stack(((116 * fy - 16) / 50 - 1, 500 * (fx - fy) / 128, 200 * (fy - fz) / 128), dim=1)


def lab_to_rgb(x):
    """The inverse of rgb_to_lab; colours outside sRGB are clipped to [0, 1]."""
    lightness, a, b = x.float().unbind(1)
    fy = ((lightness + 1) * 50 + 16) / 116
    f = torch.stack((fy + a * 128 / 500, fy, (fy - b * 128 / 200).clamp(min=0)), dim=1)
    xyz = torch.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787) * WHITE.to(x.device)
    linear = torch.einsum("ij,bjhw->bihw", RGB_FROM_XYZ.to(x.device), xyz)
    rgb = torch.where(linear > 0.0031308, 1.055 * linear.clamp(min=1e-8) ** (1 / 2.4) - 0.055, 12.92 * linear)
    return rgb.clamp(0, 1)


def to_rgb(config, x):
    """Pictures in the model's colour space (B, 3, H, W) -> RGB in [0, 1]."""
    x = x.clamp(-1, 1)
    return lab_to_rgb(x) if config.space == "lab" else (x + 1) / 2


# ----------------------------------------------------------------------------------------------------------------
# Data (Parts 2, 3 and 5)


def has_color(rgb):
    """(N, 3, S, S) uint8 -> (N,) bool: False where the channels are nearly equal at nearly every pixel, as in a scanned
    black-and-white photograph or a grey JPEG with three channels."""
    spread = rgb.amax(dim=1) - rgb.amin(dim=1)  # (N, S, S)
    return (spread > 8).flatten(1).float().mean(dim=1) > 0.005


def random_crop(config, rng):
    """(top, left, side) in patches; one place for the whole batch (Part 3). rng: a torch.Generator.

    As in the post's code, whose numbers differ from its text. With its settings (--preset paper) the full picture has
    the probability 0.2 + 0.8 / 3 = 47 %, not 20 %, because one of the three crop sizes is the full side. A crop of
    10 x 10 patches in the grid of 20 x 20 has 11 x 11 = 121 places, not 21; one of 16 x 16 has 5 x 5 = 25.
    """
    grid = config.image_size // config.patch_size
    side = grid
    if torch.rand((), generator=rng) >= config.full_image_prob:
        part = config.crop_sizes[torch.randint(len(config.crop_sizes), (), generator=rng)]
        side = max(1, round(part * grid))
    top, left = torch.randint(grid - side + 1, (2,), generator=rng).tolist()
    return top, left, side


class Dataset:
    """The training set in memory. rgb: (N, 3, S, S) uint8; in_color: (N,) bool, which pictures are in colour."""

    def __init__(self, config, rgb, in_color, device="cpu", skipped=()):
        self.config, self.rgb, self.in_color, self.device, self.skipped = config, rgb, in_color, device, skipped

    def __len__(self):
        return len(self.rgb)

    def batch(self, step, rows=slice(None)):
        """Rows of the batch of optimizer step `step`: x (B, 3, H, W), mask (B, 3, 1, 1), and top and left of the crop
        in patches."""
        config, rng = self.config, common.generator(self.config.seed, step, 0)
        # Oversampling (Part 5), as WeightedRandomSampler does it: pictures in colour have three times the weight.
        weights = 1 + (config.color_weight - 1) * self.in_color.float()
        index = torch.multinomial(weights, config.batch_size, replacement=True, generator=rng)[rows]
        top, left, side = random_crop(config, rng)
        p = config.patch_size
        rgb = self.rgb[index, :, top * p : (top + side) * p, left * p : (left + side) * p]
        in_color = self.in_color[index].to(self.device).view(-1, 1, 1, 1)

        x = rgb_to_lab(rgb.to(self.device) / 255)
        x[:, 1:] *= in_color  # monochrome: zero chroma (Part 2) ...
        mask = torch.ones(len(x), 3, 1, 1, device=self.device)
        if config.space == "rgb":  # grey in all three channels, none of which can be masked: why the post takes L*a*b*
            x = lab_to_rgb(x) * 2 - 1
        elif self.in_color.any():  # (with no picture in colour, zero chroma is what should be learned)
            mask[:, 1:] *= in_color  # ... and no gradient
        return x, mask, top, left


def load_data(config, device):
    """(Dataset, checksum): reads or paints the pictures and decides which of them keep their colour."""
    data = common.load_pictures(config.data, config.image_size, first=config.num_samples)
    # Depends on --seed and the number of pictures only, so that a resumed run keeps the same ones.
    order = torch.randperm(len(data), generator=common.generator(config.seed))
    kept = torch.zeros(len(data), dtype=torch.bool)
    count = config.color_fraction * len(data)
    kept[order[: round(count) or math.ceil(count)]] = True  # of a few pictures, at least one
    colored = torch.cat([has_color(part) for part in data.pictures.split(512)])
    return Dataset(config, data.pictures, kept & colored, device, data.skipped), data.checksum()


# ----------------------------------------------------------------------------------------------------------------
# Training (Part 5)


def build_model(config):
    """A new JiT of the config's sizes. Raises UserError for sizes that do not divide, or other than three lab_noise."""
    if config.image_size % config.patch_size:
        raise UserError(f"--patch-size {config.patch_size} does not divide --image-size {config.image_size}")
    if config.hidden_size % (4 * config.num_heads):
        raise UserError(f"--hidden-size {config.hidden_size} must be a multiple of 4 x --num-heads {config.num_heads}")
    if len(config.lab_noise) != 3:
        raise UserError("--lab-noise: give three numbers, for L*, a* and b*")
    sizes = {name: getattr(config, name) for name in ("patch_size", "hidden_size", "depth", "num_heads")}
    return JiT(config.image_size, **sizes, bottleneck_dim=config.bottleneck_dim)


def train(config):
    """Train a model in the run folder config.out, or go on with --resume; returns the exit code. Raises UserError."""
    device, precision = common.init_training(config)
    run = common.Run(config, "jit_lab", enough=25_000)
    data, checksum = load_data(config, device)
    torch.manual_seed(config.seed)
    model = build_model(config)
    ema = copy.deepcopy(model).eval()
    trained = common.parallelize(config, model, ema, device, lambda net: net.blocks)
    muon_modules = [module for block in model.blocks for module in (block.attn, block.mlp)]
    optimizer, scaler = common.make_optimizer(config, model, device, muon_modules)
    run.header = {"data": [len(data), checksum]}
    about = f"{len(data):,} pictures, {int(data.in_color.sum()):,} in colour, {precision} on {device}"
    run.start(model, ema, optimizer, scaler, about, len(data), data.skipped)
    common.compile_blocks(config, device, model.blocks, dynamic=True)  # crops have several sizes

    for step in run.steps():
        lr = config.lr * lr_factor(run.progress, step, config.warmup, config.decay)
        set_lr(optimizer, lr)
        for rows in micro_batches(config):
            rng = BatchRng(config.batch_size, config.seed, step, 1, rows=rows, device=device)
            x, mask, top, left = data.batch(step, rows)  # 1. a batch
            t = training_times(config, rng)  # 2. time and noise
            noise = noise_scale(config, device) * rng.randn(*x.shape[1:])
            x_t = flow_point(noise, x, t)  # 3. the noisy picture
            y = torch.zeros(len(x), dtype=torch.long, device=device)  # one class: the model is unconditional
            with autocast(device, precision):
                output = trained(x_t, t, y, top, left)  # 4. predict
            loss = flow_loss(config, output, x_t, x, t, mask)  # 5. (B,) the loss of each picture
            scaler.scale(loss.mean() / config.grad_accum).backward()  # 6. gradients
            run.add(loss, t)
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        update_ema(ema, model, step, config.ema)
        run.log(grad_norm, lr)
        if run.checkpoint_due:
            run.save(model, ema, optimizer, scaler)
        if run.pictures_due:
            run.save_pictures(sample(ema, config, num=25, steps=12, solver="dpm", precision=precision))
    return run.finish()


# ----------------------------------------------------------------------------------------------------------------
# Few steps. A copy of a trained model learns to take a quarter, a half or all of the way from noise to picture at once.
# It is shown ways that the trained model takes in many steps, and needs no pictures (progressive distillation, Salimans
# & Ho 2022; for a single step Luhman & Luhman 2021). The number of steps reaches it as its class label.

FEW_STEPS = 4, 2, 1


def few_times(steps):
    """Times of few steps: shorter ones near noise, where the ways bend most."""
    return [(i / steps) ** 1.5 for i in range(steps + 1)]


def jumps(states):
    """All steps that a distilled model takes, of the `states` (B, C, H, W) at a way's few_times(len(states) - 1):
    x_t, x_next (7 B, C, H, W), t, t_next and the label (7 B,)."""
    times, last = few_times(len(states) - 1), len(states) - 1
    spans = [(i * last // n, (i + 1) * last // n, k) for k, n in enumerate(FEW_STEPS) for i in range(n)]
    x_t, x_next = (torch.cat([states[span[end]] for span in spans]) for end in (0, 1))
    numbers = torch.tensor([(times[a], times[b], k) for a, b, k in spans]).to(x_t).repeat_interleave(len(states[0]), 0)
    t, t_next, label = numbers.unbind(1)
    return x_t, x_next, t, t_next, label.long()


@dataclasses.dataclass
class DistillConfig(common.LoadConfig):
    """The options of `distill`."""

    steps: int = option(200, "optimizer steps", low=1)
    batch_size: int = option(4, "ways from noise to picture per optimizer step", low=1)
    lr: float = option(1e-3, "peak learning rate", low=0.0)
    cfg: float = option(1.25, "guidance of the trained model, as sample's; with 1 each step takes less time", low=0.0)
    seed: int = option(0, "seed of the noise", low=0, high=2**62)
    out: str = option("runs/jit_lab-distilled.safetensors", "the new weights")


def distill(options):
    """Write weights that sample in one, two or four steps. Raises UserError."""
    device, path = common.pick_device(options.device), common.find_weights(options.weights, "jit_lab")
    teacher, config = load_model(path, device)
    if teacher.num_classes > 1:
        raise UserError(f"{path} has several classes, or is distilled already; name a model of one class")
    # AdamW is enough for these few steps, whatever trained the model.
    config = dataclasses.replace(config, lr=options.lr, optimizer="adamw", precision="auto", cfg=1.0)
    precision, weights = common.pick_precision("auto", device), teacher.state_dict()
    table = "y_embedder.embedding_table.weight"
    weights[table] = weights[table][:1].repeat(1 + len(FEW_STEPS), 1)
    student = JiT(**sizes_of_weights(weights)).to(device)
    student.load_state_dict(weights)
    ema = copy.deepcopy(student)
    optimizer, scaler = common.make_optimizer(config, student, device)
    scale = noise_scale(config, device)

    def velocity(x_t, t):
        return (guided_data(teacher, config, x_t, t, 0, options.cfg) - x_t) / (1 - t)

    @torch.no_grad()
    def way(noise):
        """The states at few_times(4) of the trained model's way from noise, which it takes in twice as many steps."""
        states = []
        common.flow_dpm(velocity, noise, few_times(2 * max(FEW_STEPS)), lambda x, t: states.append(x))
        return states[::2]

    for step in (bar := tqdm(range(options.steps), "distilling")):
        set_lr(optimizer, options.lr * lr_factor(step / options.steps, step, 0.05, "linear"))
        rng = BatchRng(options.batch_size, options.seed, step, 1, device=device)
        with autocast(device, precision):
            states = way(scale * rng.randn(3, config.image_size, config.image_size))
            x_t, x_next, t, t_next, label = jumps(states)
            output = student(x_t, t, label)
        t, t_next = t.view(-1, 1, 1, 1), t_next.view(-1, 1, 1, 1)
        # The velocity of a step, (x_hat - x_t) / (1 - t), should lead from x_t to x_next.
        x_hat = predicted_data(config, output, x_t, t)
        error = ((x_hat - x_t) / (1 - t) - (x_next - x_t) / (t_next - t)) * (scale[0] / scale)
        loss = error.square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        update_ema(ema, student, step, 0.98)
        bar.set_postfix(loss=f"{loss.item():.4f}")
    header = {"system": "jit_lab", "distilled": True, "config": dataclasses.asdict(config)}
    common.save_tensors(options.out, ema.state_dict(), header)
    print(f"{options.out}; next: python jit_lab.py sample --steps 4 --weights {options.out}")


# ----------------------------------------------------------------------------------------------------------------
# Weights (Part 8)


def sizes_of_weights(weights):
    """The arguments of JiT() that the shapes of a checkpoint's tensors imply."""
    labels, hidden_size = weights["y_embedder.embedding_table.weight"].shape
    bottleneck_dim, in_channels, patch_size, _ = weights["x_embedder.proj1.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    return dict(
        input_size=patch_size * math.isqrt(weights["pos_embed"].shape[1]),
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=hidden_size // weights["blocks.0.attn.q_norm.weight"].shape[0],
        num_classes=labels - 1,
        bottleneck_dim=bottleneck_dim,
        in_context_len=weights["in_context_posemb"].shape[1] if "in_context_posemb" in weights else 0,
        in_context_start={12: 4, 24: 8, 32: 10}.get(depth, 0),  # JiT-B, -L and -H; the weights do not tell
    )


def load_model(path, device="cpu"):
    """(JiT in eval mode, Config) of a checkpoint of this program, of the post's safetensors file or of an official JiT
    .pth. Raises UserError if the file is broken or of another model."""
    weights, header = common.load_tensors(path)
    if header and header.get("system") != "jit_lab":
        raise UserError(f"{path} is a checkpoint of {header.get('system')}; name one of jit_lab.py's with --weights")
    with common.reading(path, "checkpoint of a JiT"):
        if "model_ema1" in weights:  # the official file holds two averages; its author samples from this one
            weights = {name.removeprefix("net."): tensor for name, tensor in weights["model_ema1"].items()}
        sizes = sizes_of_weights(weights)
    if header:
        config = common.config_from_header(Config, header, path)
    else:  # The post's model has one class and L*a*b*; the official ones have ImageNet's 1,000 classes and RGB.
        size, named = sizes["input_size"], {name: sizes[name] for name in sizes if hasattr(Config, name)}
        space = "lab" if sizes["num_classes"] == 1 else "rgb"
        config = Config(data=(), image_size=size, space=space, noise_scale=2.0 if size == 512 else 1.0, **named)
    model = JiT(**sizes)
    common.load_into(model, weights, path)
    model.distilled = "distilled" in (header or {})
    return model.to(device).eval(), config


# ----------------------------------------------------------------------------------------------------------------
# Subcommands: sample and novelty (Part 6)


def sample_command(options):
    """Write a grid of samples and, if asked for, single pictures and an animation."""
    path = common.find_weights(options.weights, "jit_lab")
    model, config = load_model(path, common.pick_device(options.device))
    if options.label >= model.num_classes:
        raise UserError(f"--label {options.label}: this checkpoint has the labels 0 to {model.num_classes - 1}")
    if options.cfg not in (None, 1) and model.distilled:
        raise UserError("--cfg: a distilled model has learned its guidance; leave it out, or name it with distill")
    frames, callback = common.record_frames(lambda x: common.make_grid(to_rgb(config, x[:16])), options.gif)
    rgb = sample(model, config, callback=callback, **vars(options))
    common.write_samples(rgb, [f"{options.seed + i:06d}" for i in range(options.num)], options, frames)


# Is a sample a new face, or a copy from the training set? nearest() needs the distance of every sample to every
# training picture. Both distances below are sums of squared differences, so a metric returns a vector of features
# for each picture, (B, 3, H, W) in [0, 1] -> (B, features), and |features(a) - features(b)|^2 is the distance of a, b.


def pixel_features(rgb):
    """The metric without LPIPS weights: the mean squared difference of pixels, averaged over three scales."""
    scales = [F.avg_pool2d(rgb, k) for k in (1, 2, 4)]
    return torch.cat([scale.flatten(1) / (3 * scale[0].numel()) ** 0.5 for scale in scales], dim=1)


def nearest(metric, queries, pictures, skip_self=False, batch_size=250):
    """For each of queries (Q, 3, S, S) in [0, 1] the nearest of pictures (N, 3, S, S) uint8: (distances (Q,), indices
    (Q,)). skip_self: the queries are the first Q of the pictures, and each is compared with the others only."""
    a, parts = metric(queries), []
    for start in tqdm(range(0, len(pictures), batch_size), "searching", leave=False):
        b = metric(pictures[start : start + batch_size].to(queries.device) / 255)
        # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b
        parts.append((a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0).cpu())
    distances = torch.cat(parts, dim=1)  # (Q, N)
    if skip_self:
        distances.fill_diagonal_(math.inf)
    return distances.min(dim=1)


def training_pictures(options, config):
    """common.Pictures of --data or, without it, of the run's. Raises UserError."""
    paths = options.data or config.data
    if not paths or (paths != ("drawn",) and not all(Path(path).exists() for path in paths)):
        named = " ".join(paths) or "this checkpoint names none"
        raise UserError(f"the training pictures ({named}) are not here; name them with --data")
    data = common.load_pictures(paths, config.image_size, first=config.num_samples if paths == config.data else None)
    common.tell_skipped(data.skipped)
    return data


@dataclasses.dataclass
class NoveltyConfig(common.LoadConfig):
    """The options of `novelty`."""

    data: tuple[str, ...] = option((), "the training pictures (default: what the checkpoint names)")
    alexnet: str = option("", "for LPIPS: torchvision's AlexNet weights, alexnet-owt-7be5be79.pth")
    lpips: str = option("", "for LPIPS: the heads for AlexNet, weights/v0.1/alex.pth of its package")
    num: int = option(16, "number of samples", low=1)
    steps: int = option(50, "steps from noise to picture", low=1)
    seed: int = option(0, "sample i starts from the noise of seed + i", low=0, high=2**62)
    out: str = option("samples/jit_lab_novelty.png", "sheet of pairs; the distances in a .csv beside it", picture=True)


def novelty(options):
    """Pair each sample with its nearest training picture: a sheet, a table, and a line that sums it up."""
    if bool(options.alexnet) != bool(options.lpips):
        raise UserError("LPIPS needs two files: give both --alexnet and --lpips, or neither")
    device = common.pick_device(options.device)
    name, metric = "pixel distance (for LPIPS see --help)", pixel_features
    if options.alexnet:
        name, metric = "LPIPS", common.Lpips.load(options.alexnet, options.lpips).to(device)
    model, config = load_model(common.find_weights(options.weights, "jit_lab"), device)
    data = training_pictures(options, config)
    rgb = sample(model, config, options.num, options.steps, options.seed)
    distances, index = nearest(metric, rgb, data.pictures)
    # For comparison: how near are training pictures to each other? A copy is much nearer.
    first = data.pictures[:200].to(device) / 255
    usual = nearest(metric, first, data.pictures, skip_self=True)[0].median()

    common.save_picture(pair_sheet(rgb.cpu(), data.pictures[index] / 255, distances), options.out)
    text, table = io.StringIO(), Path(options.out).with_suffix(".csv")
    rows = [[options.seed + i, data.names[k], f"{distances[i]:.5f}"] for i, k in enumerate(index)]
    csv.writer(text).writerows([["seed", "nearest", "distance"], *rows])
    common.save_text(table, text.getvalue())
    print(f"{name} to the nearest of {len(data):,} training pictures:")
    print(f"median {distances.median():.4f}, least {distances.min():.4f}; between training pictures {usual:.4f}")
    if options.alexnet:
        print(f"{int((distances >= 0.25).sum())} of {options.num} at 0.25 or more, the post's threshold for a new face")
    print(f"see {options.out} and {table}")


def pair_sheet(rgb, neighbours, distances):
    """A picture of all pairs of a sample and its neighbour, (B, 3, S, S) each, with their distance below."""
    tiles = []
    for sample_, neighbour, distance in zip(rgb, neighbours, distances):
        tile = ImageOps.expand(common.make_grid(torch.stack((sample_, neighbour)), columns=2), (0, 0, 8, 14), "white")
        ImageDraw.Draw(tile).text((2, tile.height - 13), f"{distance:.4f}", "black")
        tiles.append(np.array(tile))
    return common.make_grid(common.picture_tensor(tiles) / 255)


@dataclasses.dataclass
class DemoConfig(common.DemoConfig):
    data: tuple[str, ...] = option((), "the training pictures (default: what the checkpoint names)")


def demo(options):
    """A page: samples, few steps beside fifty, the way from one face to another, the nearest training pictures."""
    model, config = load_model(common.find_weights(options.weights, "jit_lab"), common.pick_device(options.device))

    def show(num=9, **settings):
        run = functools.partial(sample, model, config, num, **settings)
        return common.flow_frames(run, 1.0, functools.partial(to_rgb, config))

    def compare(steps, **settings):
        few = sample(model, config, 4, steps, **settings)
        return ((few, rgb, line) for _, rgb, line in show(num=4, steps=50, **settings))

    def morph(seed, other_seed, steps):
        a, b = common.noise_for((seed, other_seed), (1, 3, config.image_size, config.image_size), "cpu")
        for angle in range(0, 91, 6):  # spherical interpolation (Shoemake 1985), as independent noises are orthogonal
            noise = math.cos(math.radians(angle)) * a + math.sin(math.radians(angle)) * b
            yield sample(model, config, 1, steps, noise=noise), f"{angle} of 90 degrees"

    def neighbours(seed, steps):
        pictures, rgb = training_pictures(options, config).pictures, sample(model, config, 9, steps, seed)
        distances, index = nearest(pixel_features, rgb, pictures)
        yield rgb, pictures[index] / 255, f"mean squared difference of pixels: {distances.median():.4f} (median)"

    steps, solver = (1, 50, 4 if model.distilled else 20), {"solver": list(common.SOLVERS)}
    inputs = {"seed": (0, 999, 0), "steps": steps}
    tabs = [("Sample", ("x_t", "predicted pictures"), show, inputs | solver)]
    if not model.distilled:  # it cannot take fifty
        tabs += [("Few steps beside fifty", ("few", "fifty"), compare, inputs | {"steps": (1, 50, 5)} | solver)]
    tabs += [("Morph", ("picture",), morph, {"seed": (0, 999, 0), "other_seed": (0, 999, 1), "steps": steps})]
    tabs += [("Find nearest training pictures", ("samples", "training pictures"), neighbours, inputs)]
    common.open_page(options, "JiT", "Rectified flow in pixel space, from noise at t = 0 to pictures at t = 1.", *tabs)


# ----------------------------------------------------------------------------------------------------------------
# Command line

SUBCOMMANDS = {
    "train": (train, Config, PRESETS, "train, e.g. python jit_lab.py train --minutes 3"),
    "sample": (sample_command, SampleConfig, None, "sample pictures, e.g. python jit_lab.py sample --num 16"),
    "novelty": (novelty, NoveltyConfig, None, "pair samples with training pictures, e.g. novelty --num 8"),
    "distill": (distill, DistillConfig, None, "weights that need 1, 2 or 4 steps, e.g. distill, then sample --steps 4"),
    "demo": (demo, DemoConfig, None, "a page in the browser: samples step by step, few steps, morphs, novelty"),
    "export": common.export("jit_lab"),
}


def main(argv=None):
    """Run the command line, argv or sys.argv; returns the exit code."""
    return common.run_command_line("jit_lab", __doc__, SUBCOMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
