"""JiT in CIELAB: faces from a plain transformer on pixels, learned from pictures that have mostly lost their colour.

The system of the post "Training a Waifu Diffusion Model with Patch Diffusion and Rectified Flow" (March 2026), from
data to picture in this one file. t = 0 is NOISE and t = 1 is DATA, as in the post; the network predicts the clean
picture x_hat, and the velocity follows from it.

    python jit_lab.py train                                    ten minutes on two CPU cores, drawn faces
    python jit_lab.py train --data DIR --color-fraction 1      your own pictures, all in colour
    python jit_lab.py sample --num 16 --gif faces.gif          from the run's weights, else from weights/
    python jit_lab.py novelty --data DIR                       how far is each sample from the training set?

What to expect of the demo preset on 10,000 coloured faces (two cores of an AMD EPYC with AVX512-BF16, 120 images/s once
compiled): patches with eyes at minute 1, faces at 2, hair that holds together at 5; a loss of 0.11 at minute 1, of 0.03
at minute 10, when the learning rate has come down to zero.
"""

import copy
import csv
import dataclasses
import io
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import common
from common import (
    Draw,
    RMSNorm,
    Run,
    TimestepEmbedder,
    UserError,
    apply_rope,
    attention,
    autocast,
    flow_point,
    generator,
    modulate,
    option,
    rms_norm,
    rope_2d,
    sincos_2d,
    unpair,
)

# ----------------------------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass
class Config(common.TrainConfig):
    """What the presets have in common; PRESETS holds what each changes."""

    # Data (Parts 2, 3 and 5 of the post)
    image_size: int = option(80, "side of the training pictures in pixels", low=8)
    space: str = option("lab", "colour space that the model works in", choices=("lab", "rgb"))
    color_fraction: float = option(0.1, "part of the pictures that keep their colour, 1 = all", low=0.0, high=1.0)
    color_weight: float = option(3.0, "how much oftener a picture in colour is drawn", low=0.01)
    full_image_prob: float = option(
        0.2, "how often the whole picture is taken without a look at --crop-sizes", low=0.0, high=1.0
    )
    crop_sizes: tuple[float, ...] = option(
        (0.5, 0.8, 1.0), "sides of the crops, as parts of the picture's", low=0.01, high=1.0
    )
    # Model (Part 4)
    patch_size: int = option(8, "side of a token's patch in pixels", low=1)
    hidden_size: int = option(256, "width of a token", low=4)
    depth: int = option(6, "number of blocks", low=1)
    num_heads: int = option(4, "attention heads", low=1)
    bottleneck_dim: int = option(128, "waist of the patch embedding", low=1)
    num_classes: int = option(
        1, "class labels of loaded weights; training has one, as the post, so no condition", low=1
    )
    in_context_len: int = option(0, "class tokens in the sequence", low=0)
    in_context_start: int = option(0, "block at which they join it", low=0)
    # Objective (Parts 1 and 5)
    predict: str = option("x", "what the network's output is: data, velocity or noise", choices=("x", "v", "eps"))
    loss: str = option("v", "what the error is measured in: velocity or data", choices=("v", "x"))
    time: str = option("logit-normal", "how training times are drawn", choices=("logit-normal", "uniform"))
    time_mean: float = option(-0.2, "of the normal whose sigmoid is t; below 0: mostly noise (JiT: -0.8)")
    time_std: float = option(1.0, "its spread", low=0.0)
    noise_scale: float = option(1.0, "standard deviation of the noise; JiT takes 2 at 512 pixels", low=0.01)
    lab_noise: tuple[float, ...] = option(
        (1.0, 1.0, 1.0), "in --space lab the same in L*, a* and b* each, times --noise-scale", low=0.01
    )
    eps_train: float = option(
        0.05, "least 1 - t that a training velocity is divided by, and with --predict eps least t", low=1e-6, high=1.0
    )
    eps_sample: float = option(
        0.01, "least 1 - t that a sampling velocity is divided by, the last step apart", low=1e-6, high=1.0
    )
    # Optimizer (Part 5)
    optimizer: str = option(
        "adamw",
        "adamw; muon for the matrices of attention and MLP, adamw for the rest; auto: muon where bfloat16 is fast",
        choices=("adamw", "muon", "auto"),
    )


PRESETS = {
    # lab_noise: a picture's lightness fills its scale and its chroma does not, so that noise of 1 buries colour until
    # the last steps; these values are about what noise of 1 in RGB comes to in L*, a* and b*.
    # time_mean: since such noise leaves more to be seen at any t, times lie nearer to t = 0.
    # optimizer, decay: from 70,000 pictures Muon and a straight fall of the learning rate learn about what AdamW and a
    # cosine learn from 120,000. ema: an average of the weights as long as theirs would lag behind.
    # full_image_prob: Muon's own share of a step is as large for a crop as for a whole picture, so whole pictures, the
    # better teachers, come oftener than in the post.
    "demo": dict(
        minutes=10.0,
        full_image_prob=0.7,
        time_mean=-0.9,
        lab_noise=(0.6, 0.35, 0.35),
        optimizer="auto",
        decay="linear",
        ema=0.995,
    ),
    # The post's own: 1,280 epochs of 10,000 pictures at batch 256 are 50,000 steps. It trains in fp16, which is
    # --precision fp16 here; it is silent on the time law, EMA, betas and decay, which are JiT's here; the warm-ups of
    # learning rate and EMA and the clipping of gradients are ours.
    "paper": dict(
        steps=50_000,
        batch_size=256,
        grad_accum=4,
        lr=3e-4,
        decay="none",
        ema=0.9999,
        time_mean=-0.8,
        time_std=0.8,
        patch_size=4,
        hidden_size=768,
        depth=12,
        num_heads=12,
        checkpoint_every=1000,
    ),
}


# ----------------------------------------------------------------------------------------------------------------
# Colour (Part 2): L* a* b* keeps what a picture shows (L*) apart from its colours (a*, b*). A picture that has lost
# its colours can then teach the first and keep silent about the second.

# Linear sRGB -> CIE XYZ, and the white of daylight (D65, 2 degree observer), as in scikit-image.
XYZ_FROM_RGB = torch.tensor(
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
)
RGB_FROM_XYZ = torch.linalg.inv(XYZ_FROM_RGB.double()).float()
DAYLIGHT = torch.tensor([0.95047, 1.0, 1.08883]).view(3, 1, 1)


def rgb_to_lab(x):
    """RGB in [0, 1] -> (L* / 50 - 1, a* / 128, b* / 128), both (B, 3, H, W) float32; a grey has zero chroma."""
    x = x.float()
    linear = torch.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    xyz = torch.einsum("ij,bjhw->bihw", XYZ_FROM_RGB.to(x.device), linear) / DAYLIGHT.to(x.device)
    # The cube root of CIE 1976, with its straight piece near black where the root would be too steep.
    fx, fy, fz = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(1)
    return torch.stack(((116 * fy - 16) / 50 - 1, 500 * (fx - fy) / 128, 200 * (fy - fz) / 128), dim=1)


def lab_to_rgb(x):
    """The inverse of rgb_to_lab; colours that no screen can show are clipped to [0, 1]."""
    lightness, a, b = x.float().unbind(1)
    fy = ((lightness + 1) * 50 + 16) / 116
    f = torch.stack((fy + a * 128 / 500, fy, (fy - b * 128 / 200).clamp(min=0)), dim=1)
    xyz = torch.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787) * DAYLIGHT.to(x.device)
    linear = torch.einsum("ij,bjhw->bihw", RGB_FROM_XYZ.to(x.device), xyz)
    rgb = torch.where(linear > 0.0031308, 1.055 * linear.clamp(min=1e-8) ** (1 / 2.4) - 0.055, 12.92 * linear)
    return rgb.clamp(0, 1)


# ----------------------------------------------------------------------------------------------------------------
# Data (Parts 2, 3 and 5)


@dataclasses.dataclass
class Dataset:
    """The whole training set in memory: rgb (N, 3, S, S) uint8, and which pictures are in colour, (N,) bool."""

    rgb: torch.Tensor
    in_color: torch.Tensor


def has_color(rgb):
    """(N, 3, S, S) uint8 -> (N,) bool: False where the channels agree on nearly every pixel, as in a scanned photograph
    or a grey JPEG that was stored with three channels."""
    spread = rgb.amax(dim=1) - rgb.amin(dim=1)  # (N, S, S)
    return (spread > 8).flatten(1).float().mean(dim=1) > 0.005


def load_dataset(config):
    """Read or draw the pictures and decide which keep their colour. Returns (Dataset, lines about skipped files)."""
    rgb, _, skipped = common.load_pictures(config.data, config.image_size)
    # A function of the seed and the number of pictures alone: the same tenth keeps its colour in every run.
    keep = torch.randperm(len(rgb), generator=generator(config.seed))[: round(config.color_fraction * len(rgb))]
    kept = torch.zeros(len(rgb), dtype=torch.bool)
    kept[keep] = True
    own = torch.cat([has_color(part) for part in rgb.split(512)])
    return Dataset(rgb, own & kept), skipped


def random_crop(config, draw):
    """(top, left, side) in patches, one place for the whole batch (Part 3).

    The post says "20 % full images" and "21 positions" for a crop of 40. Its code does this: a crop size may be 1.0,
    so the full picture comes with probability 0.2 + 0.8 / 3 = 47 %; and in a 20 x 20 grid of patches a side of 10 has
    11 x 11 = 121 places, one of 16 has 25.
    """
    grid = config.image_size // config.patch_size
    side = grid
    if torch.rand((), generator=draw) >= config.full_image_prob:
        part = config.crop_sizes[torch.randint(len(config.crop_sizes), (), generator=draw)]
        side = max(1, round(part * grid))
    top, left = torch.randint(grid - side + 1, (2,), generator=draw).tolist()
    return top, left, side


def draw_batch(config, data, step, rows, device):
    """Rows of the batch of optimizer step `step`: (x (B, 3, H, W), mask (B, 3, 1, 1), top, left).

    The mask is 0 for the chroma of pictures without colour, 1 elsewhere; top and left count patches.
    """
    draw = generator(config.seed, step, 0)
    # Part 5: pictures in colour come three times as often, with replacement, as in WeightedRandomSampler.
    weights = 1 + (config.color_weight - 1) * data.in_color.float()
    index = torch.multinomial(weights, config.batch_size, replacement=True, generator=draw)[rows]
    top, left, side = random_crop(config, draw)
    p = config.patch_size
    rgb = data.rgb[index, :, top * p : (top + side) * p, left * p : (left + side) * p].to(device) / 255
    in_color = data.in_color[index].to(device).view(-1, 1, 1, 1)

    x = rgb_to_lab(rgb)
    x[:, 1:] *= in_color
    mask = torch.ones(len(x), 3, 1, 1, device=device)
    if config.space == "rgb":
        # A grey picture in RGB is grey in all three channels: nothing can be masked, and that is the post's point.
        return lab_to_rgb(x) * 2 - 1, mask, top, left
    if data.in_color.any():  # in a set without any colour, "no colour" is the lesson
        mask[:, 1:] *= in_color
    return x, mask, top, left


def to_rgb(config, x):
    """What the model sees, (B, 3, H, W) in its colour space -> RGB in [0, 1]."""
    x = x.clamp(-1, 1)
    return lab_to_rgb(x) if config.space == "lab" else (x + 1) / 2


# ----------------------------------------------------------------------------------------------------------------
# Model: the JiT transformer (Li & He 2025; Part 4 of the post)
# B pictures, C channels, N = (H / patch_size)(W / patch_size) tokens, D hidden_size, h heads


class PatchEmbed(nn.Module):
    """Pixels -> tokens through a narrow waist: a picture is far from filling its patch_size^2 * C dimensions, so
    `bottleneck_dim` of them carry it (JiT, section 4.3). (B, C, H, W) -> (B, N, D)."""

    def __init__(self, patch_size, in_channels, bottleneck_dim, hidden_size):
        super().__init__()
        self.proj1 = nn.Conv2d(in_channels, bottleneck_dim, patch_size, stride=patch_size, bias=False)
        self.proj2 = nn.Conv2d(bottleneck_dim, hidden_size, 1)

    def forward(self, x):
        # Contiguous, or every later layer would inherit the convolution's channels-first memory and run at half speed.
        return self.proj2(self.proj1(x)).flatten(2).transpose(1, 2).contiguous()


class LabelEmbedder(nn.Module):
    """Class label -> (B, D). The last row of the table, number num_classes, is the null label of guidance."""

    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y):
        return self.embedding_table(y)


class Attention(nn.Module):
    """Self-attention whose queries and keys are normalised (QK-norm) and then turned by their place (RoPE)."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.q_norm = RMSNorm(self.head_dim)
        self.k_norm = RMSNorm(self.head_dim)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x, rope):
        def for_rope(rows):  # queries' and keys', in the order of channels that apply_rope wants; values have none
            q, k, v = rows.chunk(3)
            return torch.cat((unpair(q, self.head_dim), unpair(k, self.head_dim), v))

        qkv = F.linear(x, for_rope(self.qkv.weight), for_rope(self.qkv.bias)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in qkv)  # each (B, h, N, D/h)
        q = apply_rope(rms_norm(q, unpair(self.q_norm.weight, self.head_dim)), rope)
        k = apply_rope(rms_norm(k, unpair(self.k_norm.weight, self.head_dim)), rope)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))  # (B, N, D)


class SwiGLU(nn.Module):
    """w3(silu(x1) * x2) with x1, x2 = w12(x) (Shazeer 2020). Two thirds of the width pays for the gate."""

    def __init__(self, hidden_size):
        super().__init__()
        inner = int(4 * hidden_size * 2 / 3)
        self.w12 = nn.Linear(hidden_size, 2 * inner)
        self.w3 = nn.Linear(inner, hidden_size)

    def forward(self, x):
        x1, x2 = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(x1) * x2)


class Block(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm that the condition shifts and scales and a gate that it opens.

    The gates start at zero, so that a fresh block is the identity (adaLN-Zero; Peebles & Xie 2022, section 3.2).
    """

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.norm1 = RMSNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = RMSNorm(hidden_size)
        self.mlp = SwiGLU(hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, condition, rope):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens -> the pixels of their patches, (B, N, D) -> (B, N, patch_size^2 * C). Zero at the start."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = RMSNorm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, condition):
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class JiT(nn.Module):
    """ "Just image Transformer": a plain ViT on pixels that predicts the clean picture (Part 4 of the post).

    input_size      side of the training pictures; with patch_size it fixes the grid of positions
    num_classes     labels run from 0 to num_classes - 1; one more stands for "no label"
    bottleneck_dim  width of the patch embedding's waist
    in_context_len  class tokens that join the sequence from block in_context_start on; 0 means none

    model(x_t, t, y, top_idx=0, left_idx=0) -> x_hat, like x_t (B, C, H, W), any H and W that are multiples of
    patch_size and fit in the grid from the place (top_idx, left_idx), counted in patches. t: a float, a 0-d or a (B,)
    tensor in [0, 1], 1 = data. y: (B,) labels. Raises ValueError if the picture does not fit.

    In eval() mode the parameters ask for no gradient, so that sampling builds no graph: the post's "Quick inference"
    has no torch.no_grad() and calls .numpy() on what the model returns.
    """

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
        self.patch_size = patch_size
        self.grid = input_size // patch_size
        self.head_dim = hidden_size // num_heads
        self.in_context_start = in_context_start
        # Frozen, but part of the published checkpoints, hence a parameter and not a buffer.
        # MAE, DiT and JiT write the four quarters of the embedding the other way round; so do their checkpoints.
        quarters = sincos_2d(torch.arange(self.grid), torch.arange(self.grid), hidden_size).chunk(4, dim=-1)
        self.pos_embed = nn.Parameter(torch.cat(quarters[::-1], dim=-1).unsqueeze(0), requires_grad=False)
        self.in_context_posemb = nn.Parameter(torch.empty(1, in_context_len, hidden_size)) if in_context_len else None
        self.t_embedder = TimestepEmbedder(hidden_size)  # of t as it is: the source does not scale it
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.x_embedder = PatchEmbed(patch_size, in_channels, bottleneck_dim, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self.initialize_weights()

    def initialize_weights(self):
        """Xavier for what multiplies, N(0, 0.02) for what embeds, zero for gates and output: a fresh model says 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        small = [self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]]
        for weight in [module.weight for module in small] + [self.in_context_posemb]:
            if weight is not None:
                nn.init.normal_(weight, std=0.02)
        for module in [*self.blocks, self.final_layer]:
            nn.init.zeros_(module.adaLN_modulation[1].weight)
            nn.init.zeros_(module.adaLN_modulation[1].bias)
        nn.init.zeros_(self.final_layer.linear.weight)

    def train(self, mode=True):
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(mode and name != "pos_embed")
        return super().train(mode)

    def forward(self, x_t, t, y, top_idx=0, left_idx=0):
        p, (batch, channels, height, width) = self.patch_size, x_t.shape
        ends = top_idx + height // p, left_idx + width // p
        if height % p or width % p or min(top_idx, left_idx) < 0 or max(ends) > self.grid:
            at = f"{height} x {width} pixels at patch ({top_idx}, {left_idx})"
            raise ValueError(f"{at} do not fit a grid of {self.grid} x {self.grid} patches of {p}")
        rows = torch.arange(top_idx, top_idx + height // p, device=x_t.device)
        columns = torch.arange(left_idx, left_idx + width // p, device=x_t.device)
        # The slice of the absolute embedding is what tells a crop where it lies. RoPE starts at the same place, but
        # only differences of positions reach its scores: shifting them all changes nothing (the post hopes it does),
        # unless there are class tokens, which are not turned.
        place = self.pos_embed.unflatten(1, (self.grid, self.grid))[:, rows][:, :, columns].flatten(1, 2)
        rope = rope_2d(rows, columns, self.head_dim)

        t = torch.as_tensor(t, dtype=torch.float32, device=x_t.device).expand(batch)
        label = self.y_embedder(y)
        condition = self.t_embedder(t) + label  # (B, D)
        x = self.x_embedder(x_t) + place  # (B, N, D)
        context_len = 0
        for i, block in enumerate(self.blocks):
            if self.in_context_posemb is not None and i == self.in_context_start:
                context = label.unsqueeze(1) + self.in_context_posemb
                context_len = context.shape[1]
                x = torch.cat((context, x), dim=1)  # (B, context + N, D)
                # Class tokens have no place: cos 1, sin 0 turns them by nothing.
                rope = tuple(F.pad(table, (0, 0, context_len, 0), value=one) for table, one in zip(rope, (1.0, 0.0)))
            x = block(x, condition, rope)
        x = self.final_layer(x[:, context_len:], condition)  # (B, N, p p C)
        x = x.unflatten(1, (height // p, width // p)).unflatten(-1, (p, p, channels))  # (B, H/p, W/p, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x_t.shape).float()


def build_model(config):
    """A fresh JiT of the config's sizes. Raises UserError where they do not go together."""
    if config.image_size % config.patch_size:
        raise UserError(f"--patch-size {config.patch_size} does not divide --image-size {config.image_size}")
    if len(config.lab_noise) != 3:
        given = " ".join(map(str, config.lab_noise))
        raise UserError(f"--lab-noise {given}: give three numbers, for L*, a* and b*")
    if config.in_context_len and config.in_context_start >= config.depth:
        raise UserError(f"--in-context-start {config.in_context_start} must be below --depth {config.depth}")
    if config.hidden_size % (4 * config.num_heads):
        raise UserError(f"--hidden-size {config.hidden_size} must be a multiple of 4 x --num-heads {config.num_heads}")
    sizes = ("patch_size", "hidden_size", "depth", "num_heads", "num_classes")
    sizes += ("bottleneck_dim", "in_context_len", "in_context_start")
    return JiT(config.image_size, **{name: getattr(config, name) for name in sizes})


# ----------------------------------------------------------------------------------------------------------------
# Rectified flow with x-prediction (Parts 1 and 5): x_t = (1 - t) noise + t data, velocity = data - noise


def noise_scale(config, device):
    """Standard deviation of the noise in each channel, (3, 1, 1)."""
    channels = config.lab_noise if config.space == "lab" else (1.0, 1.0, 1.0)
    return config.noise_scale * torch.tensor(channels, device=device).view(3, 1, 1)


def predicted_data(config, output, x_t, t):
    """x_hat from the network's output, whatever it predicts; t (B, 1, 1, 1) or a float."""
    if config.predict == "x":
        return output
    if config.predict == "v":
        return x_t + (1 - t) * output
    return (x_t - (1 - t) * output) / torch.as_tensor(t).clamp(min=config.eps_train)


def velocity(x_hat, x_t, t, eps):
    """(x_hat - x_t) / (1 - t), the direction from here to there; eps keeps its end from dividing by zero."""
    return (x_hat - x_t) / torch.as_tensor(1 - t).clamp(min=eps)


def flow_loss(config, output, x_t, x, t, mask):
    """What each picture of the batch costs, (B,); output, x_t and x (B, C, H, W), t (B,), mask (B, C, 1, 1).

    The post contradicts itself. Its text asks for the error of the velocity, (x_hat - x_t) / (1 - t) against
    x - noise: --loss v. Its code subtracts the noise from x_hat and from x, where it cancels: --loss x. The two differ
    by the weight 1 / (1 - t)^2. Like the post we divide by all elements, masked ones too, so a picture without colour
    weighs as much as its lightness does in any other. Where the channels' noise differs (--lab-noise), an error is
    measured against the noise that hides it, relative to the first channel's.
    """
    t = t.view(-1, 1, 1, 1)
    error = predicted_data(config, output, x_t, t) - x
    if config.loss == "v":  # (x_hat - x_t) / (1 - t) against (x - x_t) / (1 - t): x_t cancels
        error = error / (1 - t).clamp(min=config.eps_train)
    scale = noise_scale(config, t.device)
    error = error * (scale[0] / scale)
    return (error.square() * mask).mean(dim=(1, 2, 3))


def draw_times(config, draw):
    """(B,) training times from a Draw: logit-normal (Esser et al. 2024, section 3.1) or uniform."""
    if config.time == "uniform":
        return draw.rand()
    return torch.sigmoid(config.time_mean + config.time_std * draw.randn())


# ----------------------------------------------------------------------------------------------------------------
# Training (Part 5)


def hidden_parts(model):
    """The modules whose matrices --optimizer muon steps."""
    return [part for block in model.blocks for part in (block.attn, block.mlp)]


def train(config):
    """Train from nothing, or go on with --resume; what is left behind is a run folder. Raises UserError."""
    if config.num_classes > 1:
        raise UserError(f"--num-classes {config.num_classes}: no data here has labels; leave it out")
    device, precision = common.set_up(config)
    config = common.settle_optimizer(config, device)
    torch.manual_seed(config.seed)
    model = build_model(config)
    run = Run(config, "jit_lab")
    data, skipped = load_dataset(config)
    run.header = {"data": [len(data.rgb), common.checksum(data.rgb)]}
    ema = copy.deepcopy(model).eval()
    trained = common.parallelize(config, model, ema, device, lambda net: net.blocks)
    optimizer, scaler = common.make_optimizer(config, model, device, hidden_parts(model))
    if run.resume:
        run.load(model, ema, optimizer, scaler)
    if common.worth_compiling(config, device):
        for block in model.blocks:  # one block, compiled once for crops of any size, serves all
            block.compile(dynamic=True)
    run.tell_skipped(skipped)
    print(run.banner(model, device, precision, f"{len(data.rgb):,} pictures, {int(data.in_color.sum()):,} in colour"))

    with run.clock():
        while not run.done:
            costs, times = [], []
            for rows in common.microbatches(config, trained):
                x, mask, top, left = draw_batch(config, data, run.step, rows, device)
                draw = Draw(config.batch_size, config.seed, run.step, 1, rows=rows, device=device)
                t = draw_times(config, draw)
                noise = noise_scale(config, device) * draw.randn(*x.shape[1:])
                x_t = flow_point(noise, x, t)
                y = torch.zeros(len(x), dtype=torch.long, device=device)
                with autocast(device, precision):
                    output = trained(x_t, t, y, top, left)
                cost = flow_loss(config, output, x_t, x, t, mask)
                scaler.scale(cost.mean() / config.grad_accum).backward()
                costs.append(cost.detach())
                times.append(t)

            common.optimizer_step(config, run, model, ema, optimizer, scaler, torch.cat(costs), torch.cat(times))
            pictures, checkpoint = run.due()
            if checkpoint:
                run.save(model, ema, optimizer, scaler)
            if pictures:
                run.save_samples(sample(ema, config, DrawConfig(num=25, steps=25, precision=precision)))
    return run.farewell()


# ----------------------------------------------------------------------------------------------------------------
# Sampling (Part 6)


@dataclasses.dataclass
class DrawConfig(common.DrawConfig):
    """How pictures are drawn from weights, for whatever purpose."""

    solver: str = option("euler", "how a step is made", choices=tuple(common.SOLVERS))
    clamp: bool = option(False, "keep x_hat within the range of the data at every step")
    label: int = option(0, "class, for checkpoints that have several", low=0)
    cfg: float = option(1.0, "guidance: 1 conditional, 0 unconditional, above 1 guided", low=0.0)


@dataclasses.dataclass
class SampleConfig(DrawConfig):
    """Options of the verb sample."""

    out: str = option("samples/jit_lab.png", "picture of all samples in a grid", picture="still")
    each: str = option("", "folder for single pictures")
    gif: str = option("", "animation of the first pictures, from noise to data in at most 10 frames", picture="film")


@torch.no_grad()
def sample(model, config, options, watch=None):
    """Draw options.num pictures -> (num, 3, S, S) RGB in [0, 1], from noise at t = 0 to data at t = 1.

    Picture i depends on the seed options.seed + i only. Guidance: 1 = conditional, 0 = unconditional, above 1 = guided
    (Ho & Salimans 2022, eq. 6; of x_hat, which comes to the same). watch(x, t) sees the states of the first batch.
    """
    device = next(model.parameters()).device
    precision = common.pick_precision(options.precision, device)
    times = [i / options.steps for i in range(options.steps + 1)]

    def predict(x_t, t, y):
        with autocast(device, precision):
            output = model(x_t, t, y)
        return predicted_data(config, output, x_t, t)

    def guided_velocity(x_t, t):
        y = torch.full((len(x_t),), options.label, device=device)
        if options.cfg == 1:
            x_hat = predict(x_t, t, y)
        else:
            both = torch.cat((y, torch.full_like(y, config.num_classes)))
            with_label, without = predict(torch.cat((x_t, x_t)), t, both).chunk(2)
            x_hat = without + options.cfg * (with_label - without)
        # The last step lands exactly on x_hat, which is what the post returns, for any number of steps.
        eps = config.eps_sample if t < times[-2] else 1 / options.steps
        return velocity(x_hat.clamp(-1, 1) if options.clamp else x_hat, x_t, t, eps)

    pictures, last = [], options.seed + options.num
    for first in range(options.seed, last, options.batch_size):
        seeds = range(first, min(first + options.batch_size, last))
        x = common.noise_for(seeds, (3, config.image_size, config.image_size), device)
        solve = common.SOLVERS[options.solver]
        x = solve(guided_velocity, noise_scale(config, device) * x, times, watch if first == options.seed else None)
        pictures.append(to_rgb(config, x))
    return torch.cat(pictures)


def config_of_weights(weights):
    """The Config behind a checkpoint that brings none: its shapes tell the sizes, its author's habits the rest."""
    labels, hidden = weights["y_embedder.embedding_table.weight"].shape
    bottleneck, _, patch, _ = weights["x_embedder.proj1.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    context = weights["in_context_posemb"].shape[1] if "in_context_posemb" in weights else 0
    size = patch * math.isqrt(weights["pos_embed"].shape[1])
    return Config(
        data="",  # which nobody knows
        image_size=size,
        # The post's model has one class and speaks L*a*b*; JiT's own were trained on ImageNet's thousand in RGB.
        space="lab" if labels == 2 else "rgb",
        patch_size=patch,
        hidden_size=hidden,
        depth=depth,
        num_heads=hidden // weights["blocks.0.attn.q_norm.weight"].shape[0],
        bottleneck_dim=bottleneck,
        num_classes=labels - 1,
        in_context_len=context,
        in_context_start={12: 4, 24: 8, 32: 10}.get(depth, 0) if context else 0,  # JiT-B, -L and -H
        noise_scale=2.0 if size == 512 else 1.0,
    )


def load_model(path, device):
    """(JiT in eval mode, Config) from our own checkpoint, the post's safetensors, or an official JiT .pth.

    Raises UserError if the file is broken or of another model.
    """
    weights, header = common.load_tensors(path)
    if header and header.get("system") != "jit_lab":
        other = header.get("system") or "something else"
        raise UserError(f"{path} is a checkpoint of {other}; name one of jit_lab.py's with --weights")
    try:
        if "model_ema1" in weights:  # official JiT keeps two averages; this is the one that its author samples from
            weights = {name.removeprefix("net."): tensor for name, tensor in weights["model_ema1"].items()}
        config = Config(**header["config"]) if header else config_of_weights(weights)
        common.check_config(config)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as problem:
        raise UserError(f"{path} is no JiT checkpoint (no usable {problem}); name another with --weights") from None
    model = build_model(config)
    common.load_into(model, weights, path)
    return model.to(device).eval(), config


def model_for(options):
    """The model and Config that `options` ask for. Raises UserError."""
    model, config = load_model(common.find_weights(options.weights, "jit_lab"), common.pick_device(options.device))
    if options.label >= config.num_classes:
        raise UserError(f"--label {options.label}: this checkpoint knows the labels 0 to {config.num_classes - 1}")
    if options.cfg != 1 and config.num_classes == 1:
        raise UserError(f"--cfg {options.cfg}: this checkpoint has one class, from which nothing differs; leave it out")
    return model, config


def sample_command(options):
    """Write what sample() draws: a grid, and with --each and --gif single pictures and the way there."""
    model, config = model_for(options)
    # Part 6: ten frames from pure noise, t = 0, to the final picture, t = 1.
    frames, watch = common.film(lambda x: common.make_grid(common.to_uint8(to_rgb(config, x[:16]))), options.gif)
    pictures = common.to_uint8(sample(model, config, options, watch))
    common.write_samples(pictures, [f"{options.seed + i:06d}" for i in range(options.num)], options, frames)


# ----------------------------------------------------------------------------------------------------------------
# Novelty (Part 6): is it a new face, or one of the training set?
# Both distances are squared lengths between two descriptions of a picture, so that the nearest of 10,000 is found
# with matrix products.


class Lpips(nn.Module):
    """LPIPS (Zhang et al. 2018, eq. 1) with AlexNet: distances between what a network trained on ImageNet sees.

    describe(rgb (B, 3, H, W) in [0, 1]) -> (B, features) whose squared distances are LPIPS. H, W at least 31.
    """

    def __init__(self):
        super().__init__()
        # AlexNet's five convolutions under torchvision's names, up to the last ReLU: the classifier is not needed.
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
        )
        # One weight per channel and layer: how much people notice it.
        self.heads = nn.ParameterList(torch.ones(width) for width in (64, 192, 384, 256, 256))

    @classmethod
    def load(cls, alexnet, heads):
        """From torchvision's AlexNet weights and the LPIPS heads ("lin0.model.1.weight", ...), .safetensors or .pth."""
        lpips, (trunk, _), (linear, _) = cls(), common.load_tensors(alexnet), common.load_tensors(heads)
        trunk = {name: tensor for name, tensor in trunk.items() if str(name).startswith("features.")}
        common.load_into(lpips.features, {name.removeprefix("features."): t for name, t in trunk.items()}, alexnet)
        names = [f"lin{k}.model.1.weight" for k in range(5)]
        if missing := [name for name in names if name not in linear]:
            raise UserError(f"{heads} holds no {missing[0]}; it should be LPIPS' heads for AlexNet, its v0.1/alex.pth")
        common.load_into(lpips.heads, {str(k): linear[name].flatten() for k, name in enumerate(names)}, heads)
        return lpips.eval()

    def describe(self, rgb):
        # LPIPS' own shift and scale: ImageNet's mean and deviation, said of pixels in [-1, 1].
        shift = rgb.new_tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
        scale = rgb.new_tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        x, seen = (rgb * 2 - 1 - shift) / scale, []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                unit = x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
                weight = self.heads[len(seen)].view(-1, 1, 1) / unit[0, 0].numel()
                seen.append((unit * weight.sqrt()).flatten(1))
        return torch.cat(seen, dim=1)


class MultiscalePixels:
    """Stand-in where no LPIPS weights are: mean squared pixel difference, averaged over three scales."""

    def describe(self, rgb):
        levels = [F.avg_pool2d(rgb, k) if k > 1 else rgb for k in (1, 2, 4)]
        return torch.cat([level.flatten(1) / (3 * level[0].numel()) ** 0.5 for level in levels], dim=1)


@torch.no_grad()
def nearest(metric, queries, pictures, skip_self=False, batch_size=250):
    """For each query (Q, 3, S, S) in [0, 1] the nearest of pictures (N, 3, S, S) uint8: (distances (Q,), indices (Q,)).

    skip_self: queries are the first Q of the pictures, and none may find itself.
    """
    mine = metric.describe(queries)
    best, index = torch.full((len(mine),), math.inf), torch.zeros(len(mine), dtype=torch.long)
    for start in tqdm(range(0, len(pictures), batch_size), "searching", leave=False):
        theirs = metric.describe(pictures[start : start + batch_size].to(queries.device) / 255)
        # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b
        distance = mine.square().sum(1)[:, None] + theirs.square().sum(1) - 2 * mine @ theirs.T
        if skip_self and start < len(mine):
            own = torch.arange(start, min(start + len(theirs), len(mine)))
            distance[own, own - start] = math.inf
        closest, where = distance.clamp(min=0).cpu().min(dim=1)
        index = torch.where(closest < best, where + start, index)
        best = torch.minimum(best, closest)
    return best, index


@dataclasses.dataclass
class NoveltyConfig(DrawConfig):
    """Options of the verb novelty: how to draw, and what to compare with."""

    data: str = option(
        "", "training pictures, a folder or drawn (default: what the checkpoint was trained on, all in colour)"
    )
    alexnet: str = option("", "torchvision's AlexNet weights, alexnet-owt-7be5be79.pth, for LPIPS")
    lpips: str = option("", "LPIPS' linear heads for AlexNet, its package's weights/v0.1/alex.pth")
    out: str = option(
        "samples/jit_lab_novelty.png", "sheet of pairs; a .csv of the distances lies beside it", picture="still"
    )


# The post's reading of an LPIPS distance.
LPIPS_SCALE = ((0.05, "the same"), (0.15, "very similar"), (0.25, "somewhat distinct"), (math.inf, "novel"))


def novelty_command(options):
    """Pair each sample with its nearest training picture: a sheet, a CSV, and a line that sums it up."""
    if bool(options.alexnet) != bool(options.lpips):
        raise UserError("LPIPS needs two files: give both --alexnet and --lpips, or neither")
    if options.alexnet:
        name, metric = "LPIPS", Lpips.load(options.alexnet, options.lpips)
    else:
        name, metric = "multi-scale pixel distance", MultiscalePixels()
        print(f"no weights for LPIPS (--alexnet, --lpips): measuring {name}, to which the post's scale does not apply")
    model, config = model_for(options)
    if not (options.data or config.data):
        raise UserError("this checkpoint does not say what it was trained on; name its pictures with --data")
    if not options.data and config.data != "drawn" and not Path(config.data).is_dir():
        raise UserError(
            f"this checkpoint was trained on {config.data}, which is not here; name its pictures with --data"
        )
    if options.alexnet and config.image_size < 31:
        raise UserError(f"LPIPS needs pictures of 31 pixels or more, these have {config.image_size}")
    pictures, names, skipped = common.load_pictures(options.data or config.data, config.image_size)
    common.tell_skipped(skipped)
    rgb = sample(model, config, options).cpu()
    distances, index = nearest(metric, rgb, pictures)
    # How near are training pictures to each other? A sample that copies lies far below this.
    usual = nearest(metric, pictures[:200] / 255, pictures, skip_self=True)[0].median().item()

    pairs = torch.stack((rgb, pictures[index] / 255), dim=1).flatten(0, 1)
    common.save_picture(labelled_pairs(common.to_uint8(pairs), distances.tolist()), options.out)
    table = Path(options.out).with_suffix(".csv")
    rows = [["seed", "nearest", "distance", "metric", "reading"]]
    for i, (distance, where) in enumerate(zip(distances.tolist(), index.tolist())):
        reading = next(word for limit, word in LPIPS_SCALE if distance < limit) if options.alexnet else ""
        rows.append([options.seed + i, names[where], f"{distance:.5f}", name, reading])
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    common.save_text(table, text.getvalue())
    print(
        f"{name} to the nearest of {len(pictures):,} training pictures: median {distances.median():.4f}, least "
        f"{distances.min():.4f}; between training pictures: median {usual:.4f}. See {options.out} and {table}"
    )


def labelled_pairs(pictures, distances, columns=4):
    """(2B, S, S, 3) uint8, sample and neighbour by turns, -> a sheet with the distance below each pair."""
    size, gap, line = pictures.shape[1], 8, 14
    rows = math.ceil(len(distances) / columns)
    sheet = Image.new("RGB", (columns * (2 * size + gap) - gap, rows * (size + line)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, distance in enumerate(distances):
        x, y = i % columns * (2 * size + gap), i // columns * (size + line)
        sheet.paste(Image.fromarray(pictures[2 * i]), (x, y))
        sheet.paste(Image.fromarray(pictures[2 * i + 1]), (x + size, y))
        draw.text((x + 2, y + size + 1), f"{distance:.4f}", fill="black")
    return sheet


# ----------------------------------------------------------------------------------------------------------------
# Command line

VERBS = {
    "train": (train, Config, PRESETS, "train, e.g. python jit_lab.py train --minutes 3"),
    "sample": (sample_command, SampleConfig, None, "draw pictures, e.g. python jit_lab.py sample --num 16"),
    "export": common.export("jit_lab"),
    "novelty": (
        novelty_command,
        NoveltyConfig,
        None,
        "pair samples with training pictures, e.g. novelty --num 8",
    ),
}


def main(argv=None):
    """The command line: the words after the file's name, or sys.argv's; returns the exit code."""
    return common.run_command_line(__doc__, VERBS, argv)


if __name__ == "__main__":
    sys.exit(main())
