"""A localized VAE, a denoiser that reads latents along serpentine paths, and inpainting that keeps what it must keep.

The system of the write-up "Diffusion" (a home-made diffusion model for 5 GB of GPU memory), from data to inpainting in
this one file. Step 0 is the CLEAN latent, step N - 1 is NOISE. A cell of the latent map is a tile of 8 x 8 pixels.

    python serpentine_vae.py train                             the VAE, then the denoiser: 15 minutes on two CPU cores
    python serpentine_vae.py sample --num 16 --gif faces.gif
    python serpentine_vae.py inpaint --image face.png --mask mask.png           WHITE in the mask means KEEP
    python serpentine_vae.py reconstruct --image photo.png     what the VAE makes of a picture; or of --data DIR
    python serpentine_vae.py leakage                           how far does one latent cell reach into the picture?
    python serpentine_vae.py seams --data DIR                  how visible are the borders of what inpainting made?
    python serpentine_vae.py schedule                          the picture of the noise schedule
    python serpentine_vae.py train-vae --minutes 10            the first of train's two stages alone
    python serpentine_vae.py export --out small.safetensors    half a checkpoint's size, to give it away

What to expect of the demo preset (faces-80; two cores of an AMD EPYC with AVX512-BF16): a VAE of 34 dB after six
minutes; then heads in clouds of colour at minute 1, faces at 3, and at 9 faces with clean lines, some with a smudge.
"""

import copy
import dataclasses
import functools
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import common
from common import (
    Chart,
    Draw,
    Run,
    TimestepEmbedder,
    UserError,
    alphas_cumprod,
    autocast,
    ddim_step,
    generator,
    keep_in_range,
    linear_betas,
    load_into,
    load_tensors,
    option,
    zero,
)

STRIDE = 8  # pixels to a side of a latent cell's tile
RUN = "runs/serpentine_vae"  # default run folder; that of the VAE has -vae behind it
MARGIN = 8  # pixels around the tile to which a local decoder may smear

# ----------------------------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass
class VAEConfig(common.TrainConfig):
    """What the presets of the VAE, the first of two stages, have in common; VAE_PRESETS holds what each changes."""

    out: str = option("", f"run folder (default: {RUN}-vae)")
    # Data
    image_size: int = option(80, "side of the pictures in pixels, a multiple of 8", low=16)
    flip: float = option(0.0, "how often a picture is mirrored", low=0.0, high=1.0)
    # VAE
    channels: int = option(8, "channels of a latent cell", low=1)
    vae_width: int = option(64, "width of the VAE at half the pictures' resolution", low=4)
    encoder_depth: int = option(1, "blocks of the encoder at each resolution", low=1)
    decoder: str = option(
        "local",
        "local: the write-up's, without kernels or norms that reach far; global: Stable Diffusion's, to compare with",
        choices=("local", "global"),
    )
    slope_weight: float = option(0.5, "of the error of slopes between neighbouring pixels", low=0.0)
    kl_weight: float = option(2.5e-5, "of the pull of latents towards N(0, 1)", low=0.0)


@dataclasses.dataclass
class Config(VAEConfig):
    """The demo's values for both stages. --minutes, --steps, --batch-size, --lr and --grad-accum are the denoiser's,
    and those of the VAE, which comes first, begin with vae (it accumulates nothing). All others are of both."""

    out: str = option("", f"run folder (default: {RUN})")
    vae: str = option(
        "",
        "run folder or checkpoint whose VAE is used, with its own sizes (default: --out with -vae behind, trained "
        "first as the VAE's options say, which else do nothing)",
    )
    vae_minutes: float | None = option(None, "minutes of training the VAE", low=0.01)
    vae_steps: int | None = option(None, "optimizer steps of training the VAE", low=1)
    vae_batch_size: int = option(8, "pictures per optimizer step of the VAE", low=1)
    vae_lr: float = option(2e-3, "peak learning rate of the VAE", low=0.0)
    # Denoiser
    width: int = option(96, "width of the denoiser at the latents' own resolution, a multiple of 8", low=8)
    multipliers: tuple[int, ...] = option((1, 2), "width of each resolution, in --width", low=1)
    depth: int = option(2, "blocks of the denoiser at each resolution, down and up", low=1)
    levels: int = option(1001, "N: noise levels, of which 0 is the clean latent", low=3, high=5000)


@dataclasses.dataclass
class FirstStage(VAEConfig):
    """The VAE's values within train, which has other names for four of them."""

    minutes: float | None = option(None, "", low=0.01, flag="--vae-minutes")
    steps: int | None = option(None, "", low=1, flag="--vae-steps")
    batch_size: int = option(8, "", low=1, flag="--vae-batch-size")
    lr: float = option(2e-3, "", low=0.0, flag="--vae-lr")


# The write-up names batch 32, mixed precision, "over 10,000 iterations" and 5 GB of GPU memory; sizes are ours.
PAPER = dict(image_size=256, flip=0.5, encoder_depth=2, checkpoint_every=1000)
VAE_PRESETS = {
    "demo": dict(minutes=10.0, batch_size=8, lr=2e-3),
    "paper": PAPER | dict(steps=50_000, batch_size=16, lr=5e-4),
}
PRESETS = {
    "demo": dict(minutes=9.0, vae_minutes=6.0, lr=1e-3),
    "paper": PAPER
    | dict(steps=100_000, lr=2e-4, vae_steps=50_000, vae_batch_size=16, vae_lr=5e-4, width=192, multipliers=(1, 2, 3)),
}


# ----------------------------------------------------------------------------------------------------------------
# Data: pictures, some of which are never trained on


def named_pictures(data, size):
    """common.load_pictures, files being named from their folder on, so that it may move."""
    pictures, names, skipped = common.load_pictures(data, size)
    if data != "drawn":
        names = [Path(name).relative_to(data).as_posix() for name in names]
    return pictures, names, skipped


def load_data(config, unseen=()):
    """(pictures (N, 3, S, S) uint8 to train on, held-out ones, their names, lines about skipped files). Held out are
    those that are named in `unseen`; if none of them is here, one in fifty, at most 500. Raises UserError."""
    if config.image_size % STRIDE:
        raise UserError(f"--image-size {config.image_size} is no multiple of {STRIDE}; name one")
    pictures, names, skipped = named_pictures(config.data, config.image_size)
    if len(pictures) < 2:
        raise UserError(f"{config.data} holds a single picture; two is the least, one to learn from and one to check")
    unseen = set(unseen)
    held_out = [i for i, name in enumerate(names) if name in unseen]
    if len(held_out) in (0, len(names)):
        count = max(1, min(500, len(names) // 50))
        held_out = sorted(torch.randperm(len(names), generator=generator(config.seed, 7))[:count].tolist())
    chosen = sorted(set(range(len(names))) - set(held_out))
    return pictures[chosen], pictures[held_out], [names[i] for i in held_out], skipped


# ----------------------------------------------------------------------------------------------------------------
# VAE: latents that answer for their own tile ("VAE with Localized and Aligned Latents")


class CellNorm(nn.LayerNorm):
    """Layer norm over the channels of each cell of a map (B, D, H, W). It looks at no other cell; group norm, the usual
    one, would tell every cell how bright all others are."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """Scales each channel by what the means of all channels over the whole map say (Hu et al. 2017, eq. 2 to 4): the
    one place where the encoder, and with it a latent, sees the whole picture."""

    def __init__(self, width):
        super().__init__()
        self.squeeze, self.excite = nn.Linear(width, width // 4), nn.Linear(width // 4, width)

    def forward(self, x):
        scale = self.excite(F.silu(self.squeeze(x.mean(dim=(2, 3))))).sigmoid()
        return x * (2 * scale[:, :, None, None])  # about 1 at the start


class VAEBlock(nn.Module):
    """x + narrow(silu(widen(norm(x)))), in the encoder squeezed and excited before it narrows."""

    def __init__(self, width, kernel=3, excite=False):
        super().__init__()
        self.norm = CellNorm(width)
        self.widen = nn.Conv2d(width, 2 * width, kernel, padding=kernel // 2)
        self.excite = SqueezeExcite(2 * width) if excite else nn.Identity()
        self.narrow = nn.Conv2d(2 * width, width, 1)

    def forward(self, x):
        return x + self.narrow(self.excite(F.silu(self.widen(self.norm(x)))))


def local_decoder(channels, width):
    """Latents -> pictures with 3 x 3 kernels at 1/4 and 1/2 of the resolution only, and nothing that looks at more than
    a neighbour: once at 4 pixels, twice at 2, so that a cell reaches its tile and 8 pixels around it, and no further.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 4 * width, 1),
        VAEBlock(4 * width, kernel=1),
        VAEBlock(4 * width, kernel=1),
        nn.Conv2d(4 * width, 8 * width, 1),
        nn.PixelShuffle(2),  # (B, 2 width, H/4, W/4)
        VAEBlock(2 * width),
        nn.Conv2d(2 * width, 4 * width, 1),
        nn.PixelShuffle(2),  # (B, width, H/2, W/2)
        VAEBlock(width),
        VAEBlock(width),
        CellNorm(width),
        nn.Conv2d(width, 12, 1),
        nn.PixelShuffle(2),
    )


def global_decoder(channels, width):
    """For comparison, Stable Diffusion's decoder, of as many parameters: attention over all cells in its middle, group
    norms, 3 x 3 kernels at every resolution. Raises UserError."""
    if width % 64:
        raise UserError(f"--vae-width {width}: --decoder global wants a multiple of 64, for its group norms")
    return common.KLHalf(channels, 3, (3 * width // 2, width // 2, width // 2, width // 2), "up")


class VAE(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] <-> latents (B, channels, H/8, W/8), sides multiples of 8.

    `mean` and `std`, of each latent channel over the VAE's own training set, are measured when a checkpoint is written.
    """

    def __init__(self, channels=8, width=64, encoder_depth=1, decoder="local"):
        super().__init__()
        self.channels = channels
        layers, before = [], 3
        for level, wide in enumerate((width, 2 * width, 4 * width)):  # at 1/2, 1/4 and 1/8 of the resolution
            kernel = 1 if level else 3
            layers += [nn.PixelUnshuffle(2), nn.Conv2d(4 * before, wide, kernel, padding=kernel // 2)]
            layers += [VAEBlock(wide, excite=True) for _ in range(encoder_depth)]
            before = wide
        self.encoder = nn.Sequential(*layers, CellNorm(before), nn.Conv2d(before, 2 * channels, 1))
        self.decoder = {"local": local_decoder, "global": global_decoder}[decoder](channels, width)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.to(memory_format=torch.channels_last)

    def posterior(self, x):
        """-> mean, log-variance, each (B, channels, H/8, W/8). Raises UserError where sides are no multiples of 8."""
        common.check_map(x, 3, STRIDE)
        mean, logvar = self.encoder(x).float().chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, x):
        """-> the posterior's mean."""
        return self.posterior(x)[0]

    def decode(self, latent):
        common.check_map(latent, self.channels, 1)
        return self.decoder(latent).float()

    def forward(self, x, noise):
        """There and back -> (x again, mean, log-variance), with noise like the mean where the latent is drawn."""
        mean, logvar = self.posterior(x)
        return self.decode(mean + (logvar / 2).exp() * noise), mean, logvar

    def normalise(self, latent, inverse=False):
        """A latent as the VAE speaks it -> as the denoiser sees it, each channel of mean 0 and deviation 1 over
        the VAE's training set, and of about that over any other; or back."""
        mean, std = self.mean[:, None, None], self.std[:, None, None]
        return latent * std + mean if inverse else (latent - mean) / std


def vae_loss(config, vae, x, noise):
    """What each picture costs, (B,): the squared error; that of the slopes between neighbouring pixels at three scales,
    which blur would flatten; and a small pull of the posterior towards N(0, 1). Absolute errors take far longer to
    learn from."""
    remade, mean, logvar = vae(x, noise)
    error = remade - x
    cost = error.square().mean(dim=(1, 2, 3))
    for _ in range(3):
        slopes = error.diff(dim=2).square().mean(dim=(1, 2, 3)) + error.diff(dim=3).square().mean(dim=(1, 2, 3))
        cost = cost + config.slope_weight * slopes
        error = F.avg_pool2d(error, 2)
    kl = (mean.square() + logvar.exp() - 1 - logvar).mean(dim=(1, 2, 3)) / 2
    return cost + config.kl_weight * kl


# ----------------------------------------------------------------------------------------------------------------
# Serpentine scans ("Serpentine Module: Sequential Feature Processing")

DIRECTIONS = "rows", "columns", "diagonals", "antidiagonals"
DIRECTIONS += tuple(f"{name} reversed" for name in DIRECTIONS)


def serpentine_order(height, width, direction):
    """A permutation of range(height * width), cells numbered row by row: the path that snakes through the map, back and
    forth, so that cells which follow each other touch, if only at a corner where paths are diagonal. direction: one of
    DIRECTIONS. Raises ValueError if it is none."""
    if direction not in DIRECTIONS:
        raise ValueError(f"{direction!r} is none of {', '.join(DIRECTIONS)}")
    place = torch.arange(height * width).view(height, width)
    base = direction.removesuffix(" reversed")
    if base == "rows":
        lines = list(place)
    elif base == "columns":
        lines = list(place.T)
    else:
        if base == "antidiagonals":
            place = place.flip(1)
        lines = [place.diagonal(k) for k in range(1 - height, width)]
    path = torch.cat([line.flip(0) if i % 2 else line for i, line in enumerate(lines)])
    return path.flip(0) if direction != base else path


@functools.lru_cache(maxsize=64)
def all_paths(height, width, device):
    """For maps of 8 parts to a cell, seen as rows (N * 8, D/8): the numbers of the rows that lay part k of all cells
    along path k, and of those that put them back. Both (N * 8,)."""
    orders = torch.stack([serpentine_order(height, width, direction) for direction in DIRECTIONS], dim=1)  # (N, 8)
    there = (orders * len(DIRECTIONS) + torch.arange(len(DIRECTIONS))).flatten()
    return there.to(device), there.argsort().to(device)


class Reorder(torch.autograd.Function):
    """x[:, there]; the way back is back, which is faster than the sum over rows that autograd has to assume."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return x[:, there]

    @staticmethod
    def backward(ctx, grad):
        return grad[:, ctx.back], None, None


CHUNK = 16


def scan(a, b):
    """h_t = a_t h_(t-1) + b_t along dim 1 of (B, N, D), from h = 0, without a loop over positions: all chunks of 16
    take their 16 steps side by side, once to learn what each hands on. From one chunk to the next that is the same
    recurrence, N / 16 long; it tells where each chunk starts, and so they go once more and leave h behind."""
    count = b.shape[1]
    size = min(CHUNK, count)
    if count % size:
        a, b = (F.pad(x, (0, 0, 0, -count % size)) for x in (a, b))
    a, b = (x.unflatten(1, (-1, size)) for x in (a, b))  # (B, N/16, 16, D)
    h, start = torch.empty_like(b), torch.zeros_like(b[:, :, 0])
    steps = list(zip(a.unbind(2), b.unbind(2), h.unbind(2)))  # (B, N/16, D) each
    if count > size:
        end = start
        for a_t, b_t, _ in steps:
            end = torch.addcmul(b_t, a_t, end)
        start[:, 1:] = scan(a.prod(dim=2), end)[:, :-1]
    for a_t, b_t, h_t in steps:
        start = torch.addcmul(b_t, a_t, start, out=h_t)
    return h.flatten(1, 2)[:, :count]


class Scan(torch.autograd.Function):
    """scan() and, backwards, the same from the other end; nothing but a and h is kept in between."""

    @staticmethod
    def forward(ctx, a, b):
        h = scan(a, b)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx, grad):
        a, h = ctx.saved_tensors
        # g_t = grad_t + a_(t+1) g_(t+1): what h_t does to the loss, directly and through all that follows
        back = scan(F.pad(a[:, 1:], (0, 0, 0, 1)).flip(1), grad.flip(1)).flip(1)
        return back * F.pad(h[:, :-1], (0, 0, 1, 0)), back


def along_paths(a, b, height, breadth):
    """h_t = a_t h_(t-1) + b_t for maps whose cells lie row by row, (B, N, D), of which each eighth of the channels goes
    along its own path. -> (B, N, D), row by row again. No map needs padding, since paths turn where it ends."""
    there, back = all_paths(height, breadth, a.device)

    def reorder(x, there, back):
        return Reorder.apply(x.view(len(x), -1, x.shape[2] // len(DIRECTIONS)), there, back).view_as(x)

    return reorder(Scan.apply(reorder(a, there, back), reorder(b, there, back)), back, there)


class Serpentine(nn.Module):
    """Reads a map (B, D, H, W) along all eight paths at once, remembers on the way, and merges. D a multiple of 8.

    Each path carries an eighth of the channels. Along it h_t = a_t h_(t-1) + (1 - a_t) v_t, with a forget gate a_t in
    (0, 1) that the cell itself sets: a selective state-space model (Gu & Dao 2023, theorem 1) whose state is as wide as
    its input. Time and memory are linear in H W.
    """

    along_paths = staticmethod(along_paths)

    def __init__(self, width):
        super().__init__()
        self.norm = CellNorm(width)
        # To what is remembered, the forget gate, and the gate of what comes out
        self.in_proj = nn.Linear(width, 3 * width)
        # At the start the channels of a path remember over 2 to 64 cells.
        spans = torch.logspace(1, 6, width // len(DIRECTIONS), base=2).repeat(len(DIRECTIONS))
        self.span = nn.Parameter(torch.log(spans - 1))
        self.out_proj = zero(nn.Linear(width, width))

    def forward(self, x):
        height, breadth = x.shape[2:]
        cells = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, D)
        value, forget, gate = self.in_proj(cells).chunk(3, dim=-1)
        forget = (forget.float() + self.span).sigmoid()
        h = self.along_paths(forget, (1 - forget) * value.float(), height, breadth)
        merged = self.out_proj(h.to(gate.dtype) * F.silu(gate))
        return x + merged.unflatten(1, (height, breadth)).permute(0, 3, 1, 2)


# ----------------------------------------------------------------------------------------------------------------
# Denoiser: a U-Net whose blocks are convolutions for what is near and a serpentine for what is far


class Block(nn.Module):
    """x + two convolutions, told the time between them, then a serpentine."""

    def __init__(self, width_in, width, embed_dim):
        super().__init__()
        self.shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()
        self.norm1, self.conv1 = CellNorm(width_in), nn.Conv2d(width_in, width, 3, padding=1)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, 2 * width))
        self.norm2, self.conv2 = CellNorm(width), zero(nn.Conv2d(width, width, 3, padding=1))
        self.serpentine = Serpentine(width)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.serpentine(self.shortcut(x) + h)


class Denoiser(nn.Module):
    """denoiser(x_t, t) -> the noise in x_t. x_t (B, channels, H, W) of any H and W; t (B,), 1 to N - 1."""

    def __init__(self, channels=8, width=96, multipliers=(1, 2), depth=2):
        super().__init__()
        widths, embed_dim = [width * m for m in multipliers], 4 * width
        self.time_embed = TimestepEmbedder(embed_dim)
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up, skips, now = nn.ModuleList(), nn.ModuleList(), [], width
        for wide in widths:
            self.down.append(nn.ModuleList())
            for _ in range(depth):
                self.down[-1].append(Block(now, wide, embed_dim))
                now = wide
                skips.append(now)
        for wide in reversed(widths):
            self.up.append(nn.ModuleList())
            for _ in range(depth):
                self.up[-1].append(Block(now + skips.pop(), wide, embed_dim))
                now = wide
        self.norm, self.conv_out = CellNorm(now), zero(nn.Conv2d(now, channels, 3, padding=1))
        self.to(memory_format=torch.channels_last)

    def forward(self, x, t):
        emb = self.time_embed(t)
        x, skips = self.conv_in(x), []
        for level, blocks in enumerate(self.down):
            if level:
                x = F.avg_pool2d(x, 2, ceil_mode=True)  # of an odd side the last cell stays alone
            for block in blocks:
                x = block(x, emb)
                skips.append(x)
        for blocks in self.up:
            if x.shape[2:] != skips[-1].shape[2:]:
                x = F.interpolate(x, size=skips[-1].shape[2:], mode="nearest")
            for block in blocks:
                x = block(torch.cat((x, skips.pop()), dim=1), emb)
        with torch.autocast(x.device.type, enabled=False):  # a rounded answer would be too coarse where all is noise
            return self.conv_out(F.silu(self.norm(x.float())))


# ----------------------------------------------------------------------------------------------------------------
# Noise: N levels, of which 0 is the clean latent ("Noise Schedule")


@functools.cache
def alphas_bar(levels):
    """abar_t for t = 0 to N - 1: 1 for the clean latent, then the product of 1 - beta over the first t of the N - 1
    linear betas. About a thousand such steps end in noise; after far fewer, sampling would start from what training
    never saw."""
    return torch.cat((torch.ones(1), alphas_cumprod(linear_betas(levels - 1))))


def noise_loss(config, denoiser, latent, noise, u):
    """What each latent costs, (B,), and its time in [0, 1]: the error of the predicted noise at a t from 1 to N - 1,
    uniform as u in [0, 1) is (Ho et al. 2020, eq. 14)."""
    t = 1 + (u * (config.levels - 1)).long()
    abar = alphas_bar(config.levels).to(latent.device)[t].view(-1, 1, 1, 1)
    error = denoiser(abar.sqrt() * latent + (1 - abar).sqrt() * noise, t.float()) - noise
    return error.square().mean(dim=(1, 2, 3)), t / config.levels


def denoise(predict, x, levels, steps, eta=0.0, fresh=None, limit=None, clamp=None, repeat=1, watch=None):
    """From noise at step N - 1 to the clean latent at step 0, in `steps` strides ("Generate From Random Noise").

    predict(x, t) -> the noise in x. eta 0: DDIM; 1: ancestral sampling, where fresh() is the noise that a step adds,
    none in the last one. limit: the largest size of a latent's value, in which the clean latent that each step predicts
    is kept. clamp(x, t) puts known cells back, before the first step and after each. repeat: how often each stride but
    the last is made, fresh() noise leading back between two, so that what is made and what is known can agree (Lugmayr
    et al. 2022, section 4.2). watch(x, part) sees every state and how far it has come, 0 to 1.
    """
    table = alphas_bar(levels).tolist()
    times = [round((levels - 1) * (steps - i) / steps) for i in range(steps + 1)]
    x = clamp(x, times[0]) if clamp else x
    for t, t_next in itertools.pairwise(times):
        if watch:
            watch(x, 1 - t / (levels - 1))
        abar, abar_next = table[t], table[t_next]
        for again in range(repeat if t_next else 1):
            if again:  # forward from t_next to t, as q(x_t | x_t_next) does
                x = (abar / abar_next) ** 0.5 * x + (1 - abar / abar_next) ** 0.5 * fresh()
                x = clamp(x, t) if clamp else x
            eps = predict(x, t)
            if limit is not None:
                eps = keep_in_range(x, eps, abar, limit)
            x = ddim_step(x, eps, abar, abar_next, eta, fresh() if eta and t_next else 0)
            x = clamp(x, t_next) if clamp else x
    if watch:
        watch(x, 1.0)
    return x


# ----------------------------------------------------------------------------------------------------------------
# Training: the VAE, then the denoiser in its latents


class System(nn.Module):
    """What a checkpoint holds: a VAE, and the denoiser of its latents unless it is a checkpoint of train-vae."""

    def __init__(self, vae, denoiser=None):
        super().__init__()
        self.vae, self.denoiser = vae, denoiser


def build_vae(config):
    return VAE(config.channels, config.vae_width, config.encoder_depth, config.decoder)


def train_vae(config):
    """Train the VAE alone, or go on with --resume; what is left behind is a run folder. Raises UserError."""
    device, precision = common.set_up(config)
    run = Run(dataclasses.replace(config, out=config.out or f"{RUN}-vae"), "serpentine_vae")
    pictures, held_out, names, skipped = load_data(config)
    run.header = {"pictures": [len(pictures), common.checksum(pictures)], "held_out": names}
    run.tell_skipped(skipped)

    torch.manual_seed(config.seed)
    model = build_vae(config)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    trained = common.parallelize(config, model, ema, device, blocks)
    optimizer, scaler = common.make_optimizer(config, model, device)
    if run.resume:
        run.load(System(model), System(ema), optimizer, scaler)
    compile_blocks(config, model, device)
    print(run.banner(model, device, precision, f"VAE on {len(pictures):,} pictures, {len(held_out):,} held out"))

    with run.clock():
        while not run.done:
            costs, index = [], common.batch_index(config, len(pictures), run.step)
            for rows in common.microbatches(config, trained):
                draw = Draw(config.batch_size, config.seed, run.step, 1, rows=rows)
                x = common.mirror_some(pictures[index[rows]] / 127.5 - 1, config.flip, draw).to(device)
                noise = draw.randn(config.channels, x.shape[2] // STRIDE, x.shape[3] // STRIDE).to(device)
                with autocast(device, precision):
                    cost = vae_loss(config, trained, x, noise)
                scaler.scale(cost.mean() / config.grad_accum).backward()
                costs.append(cost.detach())
            costs = torch.cat(costs)
            common.optimizer_step(config, run, model, ema, optimizer, scaler, costs, torch.zeros(len(costs)))

            show, checkpoint = run.due()
            if checkpoint:
                measure_latents(ema, pictures)
                run.save(System(model), System(ema), optimizer, scaler)
            if show:
                run.save_samples(beside(ema, held_out[:8] / 127.5 - 1))
    if not run.interrupted:
        print(f"PSNR of {len(held_out)} held-out pictures: {psnr(ema, held_out).mean():.1f} dB")
    return run.farewell()


def compile_blocks(config, model, device):
    """Fuse what lies within each block, on a CPU only where asked to: there the blocks are as fast without (`python
    tests/bench.py serpentine_demo`)."""
    if common.worth_compiling(config, device) and (config.compile or device.type == "cuda"):
        torch._dynamo.config.recompile_limit = 64  # all blocks share one forward(), and each needs it compiled anew
        # One break for the compiler, not one for each step along the paths. Here, since to ask for it takes a second.
        Serpentine.along_paths = staticmethod(torch.compiler.disable(along_paths))
        for block in blocks(model):
            block.compile(dynamic=False)


def blocks(model):
    """The parts of a model that are alike."""
    return [module for module in model.modules() if isinstance(module, VAEBlock | Block)]


@torch.no_grad()
def measure_latents(vae, pictures):
    """Set the VAE's `mean` and `std` to those of each latent channel over 300 pictures of the training set."""
    some = pictures[:: max(1, len(pictures) // 300)][:300]
    latents = torch.cat([encode(vae, part / 127.5 - 1) for part in some.split(50)])
    std, mean = torch.std_mean(latents, dim=(0, 2, 3))
    vae.mean.copy_(mean)
    vae.std.copy_(std)


@torch.no_grad()
def encode(vae, x):
    """vae.encode wherever the VAE is; x (B, 3, H, W) and what is returned lie on the CPU."""
    return vae.encode(x.to(vae.mean.device)).cpu()


@torch.no_grad()
def decode(vae, latent):
    """Latents (B, C, h, w) as the VAE speaks them -> RGB (B, 3, 8h, 8w) in [0, 1], on the CPU."""
    at_once = max(1, 12_800 // latent[0, 0].numel())  # 32 pictures of 160 x 160 pixels, so that any size fits
    parts = [vae.decode(part.to(vae.mean.device)).cpu() for part in latent.split(at_once)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def beside(vae, x):
    """Pictures (B, 3, H, W) in [-1, 1], each followed by what the VAE makes of it, (2B, 3, H, W) in [0, 1]."""
    return torch.stack((x / 2 + 0.5, decode(vae, encode(vae, x))), dim=1).flatten(0, 1)


def psnr(vae, pictures):
    """Peak signal-to-noise ratio of what the VAE makes of each of the pictures (N, 3, H, W) uint8: (N,) in dB."""
    errors = []
    for part in pictures.split(32):
        original, made = beside(vae, part / 127.5 - 1).unflatten(0, (-1, 2)).unbind(1)
        errors.append((original - made).square().mean(dim=(1, 2, 3)))
    return -10 * torch.cat(errors).log10()


def vae_folder(config):
    """Run folder of the first stage, beside --out."""
    return Path(f"{Path(config.out or RUN)}-vae")


def first_stage(config, begun):
    """(VAE, header) that the denoiser's latents come from: what --vae names; else, where the denoiser has begun, that
    in its own checkpoint; else what lies in the folder beside --out, where it is trained unless that is done. None:
    training was interrupted. Raises UserError."""
    path = Path(config.vae or (config.out or RUN if begun else vae_folder(config)))
    if not config.vae and not begun:
        own = {field.name: getattr(config, field.name) for field in dataclasses.fields(VAEConfig)}
        own |= {name: getattr(config, f"vae_{name}") for name in ("minutes", "steps", "batch_size", "lr")}
        resume = (path / "state.safetensors").exists()
        try:
            if train_vae(FirstStage(**own | {"out": str(path), "resume": resume, "grad_accum": 1})):
                return None
        except UserError as problem:
            if resume:
                raise UserError(f"{problem}; or keep the VAE that is there with --vae {path}") from None
            raise
    vae, _, header = read_checkpoint(path / "model.safetensors" if path.is_dir() else path)
    return vae, header


def train(config):
    """Train the VAE, unless that is done or --vae names one, and then the denoiser. Raises UserError."""
    device, precision = common.set_up(config)
    if config.width % len(DIRECTIONS):
        raise UserError(f"--width {config.width} must be a multiple of {len(DIRECTIONS)}, one part for each path")
    begun = [(folder / "state.safetensors").exists() for folder in (Path(config.out or RUN), vae_folder(config))]
    if config.resume and not config.vae and begun == [False, True]:  # what is to be resumed is the first stage
        config = dataclasses.replace(config, resume=False)
        for name in ("log.csv", "skipped.txt"):  # of a denoiser that never reached a checkpoint
            (Path(config.out or RUN) / name).unlink(missing_ok=True)
    run = Run(config, "serpentine_vae")  # a folder that will not do should say so before the first stage
    if alphas_bar(config.levels)[-1] > 0.01:
        print(f"warning: {config.levels} levels do not end in noise, where sampling begins; take 1001", file=sys.stderr)
    first = first_stage(config, run.resume)
    if first is None:
        return 130
    vae, told = first
    of_vae = "channels", "vae_width", "encoder_depth", "decoder", "slope_weight", "kl_weight"
    config = dataclasses.replace(config, **{name: told["config"][name] for name in of_vae})
    run = Run(config, "serpentine_vae")
    pictures, _, names, skipped = load_data(config, told["held_out"])
    vae.to(device).requires_grad_(False)
    ways = [pictures, pictures.flip(-1)] if config.flip else [pictures]
    latents = [[vae.normalise(encode(vae, x / 127.5 - 1).to(device)).cpu() for x in way.split(50)] for way in ways]
    latents = [torch.cat(parts) for parts in latents]  # (N, C, S/8, S/8), all in memory: smaller than the pictures
    run.header = {"pictures": [len(pictures), common.checksum(pictures)], "held_out": names}
    run.header |= {"vae": common.fingerprint(vae), "range": latents[0].abs().max().item()}

    torch.manual_seed(config.seed)
    model = Denoiser(config.channels, config.width, config.multipliers, config.depth)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    trained = common.parallelize(config, model, ema, device, blocks)
    optimizer, scaler = common.make_optimizer(config, model, device)
    if run.resume:
        run.load(model, System(vae, ema), optimizer, scaler)
    compile_blocks(config, model, device)
    run.tell_skipped(skipped)
    print(run.banner(model, device, precision, f"denoiser on the latents of {len(pictures):,} pictures"))

    with run.clock():
        while not run.done:
            costs, times, index = [], [], common.batch_index(config, len(pictures), run.step)
            for rows in common.microbatches(config, trained):
                draw, chosen = Draw(config.batch_size, config.seed, run.step, 1, rows=rows), index[rows]
                turned = draw.rand(1, 1, 1) < config.flip
                x = torch.where(turned, latents[-1][chosen], latents[0][chosen])
                noise, u = draw.randn(*x.shape[1:]), draw.rand()
                with autocast(device, precision):
                    cost, t = noise_loss(config, trained, x.to(device), noise.to(device), u.to(device))
                scaler.scale(cost.mean() / config.grad_accum).backward()
                costs.append(cost.detach())
                times.append(t)
            common.optimizer_step(config, run, model, ema, optimizer, scaler, torch.cat(costs), torch.cat(times))

            show, checkpoint = run.due()
            if checkpoint:
                run.save(model, System(vae, ema), optimizer, scaler)
            if show:
                drawing = DrawConfig(num=25, steps=min(50, config.levels - 1), precision=precision)
                drawn = sample(vae, ema, drawing, run.settings(), latents[0].shape[1:])
                run.save_samples(decode(vae, drawn))
    return run.farewell()


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints


def read_checkpoint(path):
    """(VAE, Denoiser or None, header) from a checkpoint of this file, on the CPU and ready to use. Raises UserError if
    it is broken, of another system, or holds a VAE and a denoiser that do not belong together."""
    weights, header = load_tensors(path)
    if not isinstance(header, dict) or header.get("system") != "serpentine_vae":
        made_by = f" but of {header['system']}.py" if isinstance(header, dict) and "system" in header else ""
        raise UserError(f"{path} is no checkpoint of serpentine_vae.py{made_by}; name another")
    both = any(name.startswith("denoiser.") for name in weights)
    try:
        known = {field.name for field in dataclasses.fields(Config)}
        config = Config(**{name: value for name, value in header["config"].items() if name in known})
        common.check_config(config)
        denoiser = Denoiser(config.channels, config.width, config.multipliers, config.depth) if both else None
        system = System(build_vae(config), denoiser)
        header |= {"config": dataclasses.asdict(config), "held_out": list(header["held_out"])}
        if both and not (header["range"] > 0 and header["vae"]):
            raise ValueError("range")
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise UserError(f"{path} is no checkpoint of serpentine_vae.py (no usable {problem}); name another") from None
    load_into(system, weights, path)
    if both:
        common.check_partner(f"{path}, the VAE in it", system.vae, header["vae"])
    return system.eval().vae, denoiser, header


def load(path):
    """(VAE, Denoiser) from a checkpoint; of one that train-vae wrote, (VAE, None). Raises UserError."""
    return read_checkpoint(path)[:2]


def load_both(options):
    """(VAE, Denoiser, header) from the checkpoint that options.weights names, else the default run, else the one that
    came with the code; both on options.device. Raises UserError."""
    path = common.find_weights(options.weights, "serpentine_vae")
    vae, denoiser, header = read_checkpoint(path)
    if denoiser is None:
        raise UserError(f"{path} holds a VAE but no denoiser; name a checkpoint of the verb train with --weights")
    device = common.pick_device(options.device)
    return vae.to(device), denoiser.to(device), header


# ----------------------------------------------------------------------------------------------------------------
# Sampling


@dataclasses.dataclass
class DrawConfig(common.DrawConfig):
    """How latents are drawn, for whatever purpose."""

    steps: int = option(50, "strides from noise to picture, up to N - 1", low=1)
    solver: str = option(
        "ddim", "ddim, or the write-up's ancestral, best with --steps 1000", choices=("ddim", "ancestral")
    )
    limit: bool = option(True, "keep the clean latent that each step predicts within the range of all")


@dataclasses.dataclass
class SampleConfig(DrawConfig):
    """Options of the verb sample."""

    size: tuple[int, ...] = option((), "height and width in pixels, multiples of 8 [those of the training set]", low=8)
    out: str = option("samples/serpentine_vae.png", "picture of all samples in a grid", picture="still")
    each: str = option("", "folder for single pictures")
    gif: str = option("", "animation of the first pictures, from noise to data in at most 10 frames", picture="film")


@torch.no_grad()
def sample(vae, denoiser, options, header, shape, clamp_for=None, repeat=1, watch=None):
    """Draw options.num latents (num, *shape), as the VAE speaks them, from noise. Latent i depends on the seed
    options.seed + i only.

    header: the checkpoint's, for N and the range of latents. clamp_for(noise), if given, makes the clamp() of denoise()
    for a batch that starts from this noise; repeat is denoise()'s. watch(latents, part) sees the first batch on its
    way. Raises UserError.
    """
    levels = header["config"]["levels"]
    if options.steps > levels - 1:
        raise UserError(f"--steps {options.steps}: this denoiser has {levels - 1} noisy levels; ask for at most that")
    device, eta = next(denoiser.parameters()).device, float(options.solver == "ancestral")
    precision, limit = common.pick_precision(options.precision, device), header["range"] if options.limit else None

    def predict(x, t):
        return denoiser(x, torch.full((len(x),), float(t), device=device))

    drawn, last = [], options.seed + options.num
    with autocast(device, precision):  # one context for all steps: weights that want gradients are rounded once
        for first in range(options.seed, last, options.batch_size):
            seeds = range(first, min(first + options.batch_size, last))
            noise, draws = common.noise_for(seeds, shape, device), [generator(seed, 1) for seed in seeds]

            def fresh(draws=draws):
                return torch.stack([torch.randn(shape, generator=draw) for draw in draws]).to(device)

            def see(x, part):
                with torch.autocast(device.type, enabled=False):  # as the result will be decoded
                    watch(vae.normalise(x, inverse=True), part)

            clamp = clamp_for(noise) if clamp_for else None
            see = see if watch and first == options.seed else None
            drawn.append(denoise(predict, noise, levels, options.steps, eta, fresh, limit, clamp, repeat, see))
    return vae.normalise(torch.cat(drawn), inverse=True)


def sample_command(options):
    """Write what sample() draws: a grid, and with --each and --gif single pictures and the way there."""
    vae, denoiser, header = load_both(options)
    size = options.size or (header["config"]["image_size"],)
    if len(size) > 2 or any(side % STRIDE for side in size):
        raise UserError(f"--size {' '.join(map(str, size))}: name height and width, multiples of {STRIDE}")
    shape = vae.channels, size[0] // STRIDE, size[-1] // STRIDE
    frames, watch = common.film(lambda z: common.make_grid(common.to_uint8(decode(vae, z[:16]))), options.gif)
    drawn = sample(vae, denoiser, options, header, shape, watch=watch)
    names = [f"{options.seed + i:06d}" for i in range(options.num)]
    common.write_samples(common.to_uint8(decode(vae, drawn)), names, options, frames)


# ----------------------------------------------------------------------------------------------------------------
# Inpainting ("Inpainting"): what is kept is encoded once, to its posterior mean, and put back after every step


@dataclasses.dataclass
class InpaintConfig(DrawConfig):
    """Options of the verb inpaint. In the mask WHITE means KEEP and black is made anew; --invert for the opposite."""

    image: str = option("", "picture to change; of any size from 8 x 8 pixels on")
    mask: str = option("", "picture of the same size: WHITE is KEPT, black is made anew (the write-up says both)")
    invert: bool = option(False, "the mask is meant the other way round: black is kept, white is made anew")
    clamp: str = option(
        "noised",
        "kept cells after each step: noised to the step's own level, or, as in the write-up, the clean mean",
        choices=("noised", "mean"),
    )
    repeat: int = option(5, "how often each stride is made, so that old and new agree; the write-up: 1", low=1)
    composite: bool = option(False, "put the original's kept pixels over the result, which the VAE only comes close to")
    num: int = option(2, "pictures to make", low=1)
    out: str = option(
        "samples/inpainted.png",
        "PNG of the results; beside it come .gif, the way there, and -sheet.png",
        picture="still",
    )


def keep_cells(keep):
    """Pixels to keep, (H, W) of 0 and 1, sides multiples of 8 -> cells to keep, (H/8, W/8) bool: those whose 64 pixels
    are all kept. The write-up's nearest neighbour says the same for masks that follow the tiles, and leaks elsewhere.
    """
    return -F.max_pool2d(-keep[None, None].float(), STRIDE)[0, 0] > 0


def pad_to_tiles(pictures, keep):
    """Pictures (B, 3, H, W) and mask (H, W), continued beyond the right and lower border to multiples of 8. What is
    added to the mask is kept, so that a cell at the border is kept if its part of the picture is."""
    down, right = (-side % STRIDE for side in keep.shape)
    pictures = F.pad(pictures, (0, right, 0, down), mode="replicate")
    return pictures, F.pad(keep, (0, right, 0, down), value=1)


def clamp_known(anchor, cells, how, noise, levels):
    """clamp(x, t) for denoise(): puts the cells that are kept back in place.

    how "mean": as the clean latent at every step, as the write-up does; but a network that is told of step 900 never
    saw clean cells there. how "noised": with `noise` at the step's own level, and clean at step 0 (Lugmayr et al. 2022,
    eq. 8a, where it is drawn anew for each step; here it stays, which makes the way of a kept cell DDIM's own).
    """

    def clamp(x, t):
        abar = alphas_bar(levels)[t].item() if how == "noised" else 1.0
        return torch.where(cells, abar**0.5 * anchor + (1 - abar) ** 0.5 * noise if abar < 1 else anchor, x)

    return clamp


def inpaint(vae, denoiser, options, header, pictures, keep, watch=None):
    """Make anew what is not kept. keep (H, W): 1 where pixels are to be kept; pictures (B, 3, H, W) in [-1, 1], of any
    size from 8 x 8 on: one for all of options.num results, or one for each, all in one batch.

    Returns (latents, cells, anchor, rgb): the latents of the results (num, C, h, w); those of the pictures
    (B, C, h, w), of which results hold the kept cells (h, w) bit by bit; RGB (num, 3, H, W) in [0, 1]. Raises UserError
    where the mask leaves nothing to keep or nothing to make.
    """
    device, (height, width) = vae.mean.device, keep.shape
    padded, padded_keep = pad_to_tiles(pictures, keep)
    cells = keep_cells(padded_keep).to(device)
    if cells.all():
        raise UserError("the mask keeps everything, so that there is nothing to make; paint some of it black")
    if not cells.any():
        raise UserError(f"the mask keeps no whole tile of {STRIDE} x {STRIDE} pixels; paint more white, or use sample")
    with torch.no_grad():
        anchor = vae.encode(padded.to(device))
    clean, levels = vae.normalise(anchor), header["config"]["levels"]

    def clamp_for(noise):
        return clamp_known(clean, cells, options.clamp, noise, levels)

    drawn = sample(vae, denoiser, options, header, anchor.shape[1:], clamp_for, options.repeat, watch)
    latents = torch.where(cells, anchor, drawn)  # normalising and back has rounded the kept ones
    rgb = decode(vae, latents)[:, :, :height, :width]
    if options.composite:
        rgb = torch.where(keep > 0, pictures / 2 + 0.5, rgb)
    return latents, cells, anchor, rgb


def open_picture(path):
    """A file of any size as (3, H, W) uint8. Raises UserError."""
    try:
        picture = common.open_picture(path)
    except Exception as problem:  # each format has its own way to fail; to the user they are one
        raise UserError(f"{path} is no readable picture ({str(problem)[:100]}); name another") from None
    if min(picture.size) < STRIDE:
        size = f"{picture.width} x {picture.height}"
        raise UserError(f"{path} is {size} pixels, less than one tile of {STRIDE} x {STRIDE}; name a larger one")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def open_mask(path, height, width, invert=False):
    """A mask as (H, W) float: 1 where white, that is, where pixels are kept. One of another size but the same aspect is
    resized, and grey counts as white from 128 on, both with a warning. Raises UserError for what is not clear."""
    try:
        mask = common.open_picture(path).convert("L")
        with Image.open(path) as raw:
            clear = raw.has_transparency_data and raw.convert("RGBA").getchannel("A").getextrema()[0] < 255
    except Exception as problem:
        raise UserError(f"{path} is no readable picture ({str(problem)[:100]}); name another mask") from None
    if clear:
        raise UserError(f"{path} is transparent in places, which could mean either; paint white to keep, black to make")
    grey = sum(mask.histogram()[16:240])
    if grey:
        print(f"warning: {grey} pixels of {path} are grey; from 128 on they count as white", file=sys.stderr)
    mask = mask.point(lambda value: 255 * ((value >= 128) != invert))
    if mask.size != (width, height):
        sizes = f"the mask is {mask.width} x {mask.height} pixels, the picture {width} x {height}"
        off = 2 * abs(mask.width * height - mask.height * width)
        if off > max(width + height, mask.width + mask.height):  # more than half a pixel, which is rounding, either way
            raise UserError(f"{sizes}; bring them to one shape")
        print(f"warning: {sizes}; the mask is resized", file=sys.stderr)
        mask = mask.resize((width, height), Image.Resampling.BOX)  # all that a pixel covers must be kept
    keep = torch.from_numpy(np.array(mask) == 255).float()
    for value, what in ((1, "keeps everything"), (0, "keeps nothing")):
        if (keep == value).all():
            way = "black is kept and white" if invert else "white is kept and black"
            raise UserError(f"{path} {what}: {way} made anew; paint both, or see --invert")
    return keep


def inpaint_command(options):
    """Write the results, the way there, and original, mask and results side by side."""
    if not options.image or not options.mask:
        raise UserError("name a picture with --image and a mask with --mask; white in the mask is kept")
    out = Path(options.out)
    targets = out, out.with_suffix(".gif"), out.with_name(f"{out.stem}-sheet.png")
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: name a .png, which changes no pixel that is kept")
    if {path.resolve() for path in targets} & {Path(options.image).resolve(), Path(options.mask).resolve()}:
        raise UserError(f"--out {out}: it, {targets[1].name} or {targets[2].name} would replace what you gave")
    picture = open_picture(options.image)
    height, width = picture.shape[1:]
    keep = open_mask(options.mask, height, width, options.invert)
    vae, denoiser, header = load_both(options)

    def frame(latents):
        return common.make_grid(common.to_uint8(decode(vae, latents[:16])[:, :, :height, :width]))

    frames, watch = common.film(frame)
    made = common.to_uint8(inpaint(vae, denoiser, options, header, picture[None] / 127.5 - 1, keep, watch)[-1])
    shown = (255 * keep).byte().expand(3, -1, -1)
    sheet = np.concatenate((torch.stack((picture, shown)).permute(0, 2, 3, 1).numpy(), made))
    common.save_picture(common.make_grid(made), targets[0])
    common.save_gif(frames, targets[1])
    common.save_picture(common.make_grid(sheet, len(sheet)), targets[2])
    print(f"{len(made)} pictures in {out}; the way there in {targets[1]}; original, mask and results in {targets[2]}")


# ----------------------------------------------------------------------------------------------------------------
# What the VAE keeps of a picture


@dataclasses.dataclass
class ReconstructConfig(common.LoadConfig):
    """Options of the verb reconstruct."""

    image: str = option("", "one picture of any size, instead of --data")
    data: str = option("", "drawn, or a folder of pictures [what training held out]")
    num: int = option(16, "pictures of --data that are shown; all of them are measured", low=1)
    out: str = option("samples/reconstructed.png", "originals, each with what the VAE makes of it", picture="still")


def held_out_pictures(data, header):
    """(pictures (N, 3, S, S) uint8, a word for them) of `data`, "drawn" or a folder: those that the checkpoint's
    training held out or, where they are not all there, every one. Raises UserError."""
    data = data or header["config"]["data"]
    if data != "drawn" and not Path(data).is_dir():
        raise UserError(f"no folder {data}; name one of pictures with --data, or drawn")
    pictures, names, skipped = named_pictures(data, header["config"]["image_size"])
    common.tell_skipped(skipped)
    unseen = set(header["held_out"])
    places = [i for i, name in enumerate(names) if name in unseen]
    if not unseen or len(places) < len(unseen):  # another folder, in which such names as 00001.png mean something else
        return pictures, "pictures, all that are there"
    return pictures[places], "held-out pictures"


def reconstruct_command(options):
    """Print the signal-to-noise ratio of what the VAE makes of pictures, and show it."""
    if options.image and options.data:
        raise UserError("--image is one picture and --data many; name one of the two")
    vae, _, header = read_checkpoint(common.find_weights(options.weights, "serpentine_vae"))
    vae.to(common.pick_device(options.device))
    if options.image:
        picture = open_picture(options.image)
        height, width = picture.shape[1:]
        padded, _ = pad_to_tiles(picture[None] / 127.5 - 1, torch.ones(height, width))
        shown = beside(vae, padded)[:, :, :height, :width]
        error = (shown[0] - shown[1]).square().mean()
        print(f"PSNR of {options.image}: {-10 * error.log10():.1f} dB")
    else:
        pictures, what = held_out_pictures(options.data, header)
        print(f"PSNR of {len(pictures)} {what}: {psnr(vae, pictures).mean():.1f} dB on average")
        shown = beside(vae, pictures[: options.num] / 127.5 - 1)
    columns = 2 * math.ceil(math.sqrt(len(shown)) / 2)
    common.save_picture(common.make_grid(common.to_uint8(shown), columns), options.out)
    print(f"original and reconstruction, side by side, in {options.out}")


# ----------------------------------------------------------------------------------------------------------------
# Leakage: how far does one latent cell reach?


@dataclasses.dataclass
class LeakageConfig(common.LoadConfig):
    """Options of the verb leakage."""

    against: str = option("", "checkpoint of train-vae --decoder global, to compare with")
    published: str = option("", "published VAE to compare with: SD's or FLUX.2's, a file or a folder")
    data: str = option("", "folder of pictures [faces that are drawn here and now]")
    num: int = option(64, "pictures whose latents are disturbed", low=1)
    out: str = option("samples/leakage.png", "picture: what one cell changes, and how that falls off", picture="still")


@torch.no_grad()
def disturb(vae, x):
    """Latents of pictures x (B, 3, H, W), and the same with their middle cell moved by noise as large as each channel's
    own deviation. Returns what is decoded of both, each (B, 3, H, W), and the cell's row and column."""
    latent = vae.encode(x.to(next(vae.parameters()).device))
    row, column = latent.shape[2] // 2, latent.shape[3] // 2
    moved, std = latent.clone(), latent.std(dim=(0, 2, 3))
    moved[:, :, row, column] += std * torch.randn(latent.shape[:2], generator=generator(0)).to(std.device)
    return vae.decode(latent).cpu(), vae.decode(moved).cpu(), row, column


def away_from(row, column, height, width):
    """How many pixels each pixel lies outside the tile of a cell, across or down, whichever is more: (H, W)."""

    def along(place, count):
        pixel = torch.arange(count)
        return torch.maximum(STRIDE * place - pixel, pixel - STRIDE * (place + 1) + 1).clamp(min=0)

    return torch.maximum(along(row, height)[:, None], along(column, width))


def fall_off(change, row, column):
    """A change (H, W), a mean square for each pixel, by distance from the tile of a cell: its mean and its sum at 0
    (inside the tile), 1, 2, ... pixels, (d,) each."""
    distance = away_from(row, column, *change.shape).flatten()
    total = torch.bincount(distance, weights=change.flatten().double())
    return total / torch.bincount(distance).clamp(min=1), total


def reach(vae, channels):
    """The exact radius in pixels around its tile in which a latent's middle cell changes anything: where some pixel's
    gradient is not zero. None: all over a map of 12 x 12 cells, 40 pixels to the nearer sides."""
    latent = torch.randn(1, channels, 12, 12, generator=generator(0)).to(next(vae.parameters()).device).requires_grad_()
    picture = vae.decode(latent)
    picture = picture * torch.randn(picture.shape, generator=generator(1)).to(picture.device)  # so that none cancel
    distance = away_from(6, 6, *picture.shape[2:])
    for radius in range(40, 0, -1):
        (grad,) = torch.autograd.grad(picture[:, :, distance == radius].sum(), latent, retain_graph=True)
        if grad[0, :, 6, 6].abs().max() > 0:
            return radius if radius < 40 else None
    return 0


def leakage_command(options):
    """Print how far one latent cell reaches in one, two or three VAEs, and show it."""
    vae, _, header = read_checkpoint(common.find_weights(options.weights, "serpentine_vae"))
    vaes, side = {header["config"]["decoder"]: vae}, header["config"]["image_size"]
    if options.against:
        other, _, told = read_checkpoint(options.against)
        vaes["against" if told["config"]["decoder"] in vaes else told["config"]["decoder"]] = other
    if options.published:
        vaes["published"] = common.load_vae(options.published)
        side = max(side // 16, 1) * 16  # FLUX.2's wants multiples of 16
    if options.data:
        pictures, _, skipped = common.load_pictures(options.data, side)
        common.tell_skipped(skipped)
        x = pictures[: options.num] / 127.5 - 1
    else:
        drawn = [np.asarray(common.paint_face(1_000_000 + i, side)[0]) for i in range(options.num)]
        x = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 127.5 - 1
    device, curves, rows = common.pick_device(options.device), {}, []
    for name, one in vaes.items():
        before, after, row, column = disturb(one.to(device), x)
        change = (after - before).square().mean(dim=(0, 1))
        mean, total = fall_off(change, row, column)
        outside, beyond = (total[d + 1 :].sum() / total.sum() for d in (0, MARGIN))
        radius = reach(one, one.encode(x[:1].to(device)).shape[1])
        how_far = "all over the map" if radius is None else f"{radius} pixels"
        size = sum(p.numel() for p in one.decoder.parameters()) / 1e6
        print(
            f"{name}, decoder of {size:.2f}M: {beyond:.2%} of the change lies outside the tile and {MARGIN} pixels",
            end="",
        )
        print(f" around it, {outside:.1%} outside the tile; it reaches {how_far}")
        curves[name] = [(d, value) for d, value in enumerate((mean / mean[0]).tolist()) if value > 0]
        shown = torch.stack((before[0], after[0])) / 2 + 0.5
        rows.append((f"{name}: {beyond:.2%} beyond {MARGIN} pixels", shown, heat(change, row, column)))
    chart = Chart("Change by pixels from the tile; that inside the tile is 1", curves)
    common.save_picture(leakage_sheet(rows, chart), options.out)
    print(f"decoded, one cell disturbed, mean change, in {options.out}")


def heat(change, row, column):
    """A change (H, W) as RGB (3, H, W): black where it is greatest, white where it is a millionth of that or less; red
    around the tile and its margin."""
    value = ((change / change.max()).clamp(min=1e-6).log10() / 6 + 1).float()
    rgb, distance = (1 - value).expand(3, -1, -1).clone(), away_from(row, column, *change.shape)
    frame = (distance == 1) | (distance == MARGIN + 1)
    rgb[:, frame] = torch.tensor([0.9, 0.1, 0.1])[:, None]
    return rgb


def leakage_sheet(rows, chart):
    """Three pictures for each VAE in a row, and the curves below."""
    font, drawn = ImageFont.load_default(13), chart.draw()
    height, width = rows[0][2].shape[1:]
    times = max(1, drawn.width // (3 * width))  # small pictures grow by whole pixels
    sheet = Image.new(
        "RGB", (max(drawn.width, 3 * width * times), len(rows) * (height * times + 22) + drawn.height), "white"
    )
    for k, (label, shown, warm) in enumerate(rows):
        grid = common.make_grid(common.to_uint8(torch.cat((shown, warm[None]))), 3)
        top = k * (height * times + 22)
        ImageDraw.Draw(sheet).text((4, top + 3), label, "black", font)
        sheet.paste(grid.resize((grid.width * times, grid.height * times), Image.Resampling.NEAREST), (0, top + 22))
    sheet.paste(drawn, (0, sheet.height - drawn.height))
    return sheet


# ----------------------------------------------------------------------------------------------------------------
# Seams: how visible is the border of what inpainting made?


@dataclasses.dataclass
class SeamsConfig(DrawConfig):
    """Options of the verb seams."""

    data: str = option("", "drawn, or a folder of pictures [what training held out]")
    num: int = option(100, "pictures", low=1)
    repeat: int = option(5, "how often each stride is made", low=1)


def seam(rgb, keep):
    """Mean absolute difference of neighbouring pixels, one kept and one made, of pictures (B, 3, H, W)."""
    down = rgb.diff(dim=2).abs().mean(dim=1)[:, keep.diff(dim=0) != 0]
    across = rgb.diff(dim=3).abs().mean(dim=1)[:, keep.diff(dim=1) != 0]
    return torch.cat((down, across), dim=1).mean().item()


def face_mask(size):
    """Keep all but the middle three fifths of a picture, where faces have theirs, in whole tiles: (size, size)."""
    keep, edge = torch.ones(size, size), max(1, round(size / 5 / STRIDE)) * STRIDE
    keep[edge : size - edge, edge : size - edge] = 0
    return keep


def seams_command(options):
    """Print the step across the border of what was made, relative to that at the same place of the originals: for both
    of the write-up's cases, both clamps, with and without the original's pixels put back."""
    vae, denoiser, header = load_both(options)
    size = header["config"]["image_size"]
    if size < 3 * STRIDE:
        raise UserError(f"these weights are of pictures of {size} pixels; {3 * STRIDE} is the least that has a border")
    pictures, what = held_out_pictures(options.data, header)
    x = pictures[: options.num] / 127.5 - 1
    settings = {field.name: getattr(options, field.name) for field in dataclasses.fields(DrawConfig)}
    print(f"steps across the border, {len(x)} {what}; 1 is what the originals have at the same place")
    for case, keep in (("face made", face_mask(size)), ("background made", 1 - face_mask(size))):
        real = x / 2 + 0.5
        usual = seam(real, keep)
        if not usual:
            raise UserError(f"these {what} are flat along the border, with no step to compare with; name others")
        for clamp in ("noised", "mean"):
            made = []
            for first in range(0, len(x), options.batch_size):
                part = x[first : first + options.batch_size]
                own = settings | {"num": len(part), "seed": options.seed + first}
                own |= {"clamp": clamp, "repeat": options.repeat}
                made.append(inpaint(vae, denoiser, InpaintConfig(**own), header, part, keep)[-1])
            made = torch.cat(made)
            ratios = [seam(rgb, keep) / usual for rgb in (made, torch.where(keep > 0, real, made))]
            print(f"{case}, --clamp {clamp}: {ratios[0]:.2f}, with --composite {ratios[1]:.2f}")


# ----------------------------------------------------------------------------------------------------------------
# The noise schedule's picture ("Noise Schedule")


@dataclasses.dataclass
class ScheduleConfig(common.LoadConfig):
    """Options of the verb schedule."""

    image: str = option("", "picture to drown in noise [a face that is drawn here and now]")
    out: str = option("samples/schedule.png", "where the picture goes", picture="still")


def schedule_command(options):
    """Show a picture whose latent is noised step by step, above the curves of signal and noise."""
    vae, _, header = read_checkpoint(common.find_weights(options.weights, "serpentine_vae"))
    vae.to(common.pick_device(options.device))
    levels, size = header["config"]["levels"], header["config"]["image_size"]
    if options.image:
        picture = open_picture(options.image)
    else:
        picture = torch.from_numpy(np.array(common.paint_face(7, size)[0])).permute(2, 0, 1)
    padded, _ = pad_to_tiles(picture[None] / 127.5 - 1, torch.ones(picture.shape[1:]))
    latent = vae.normalise(encode(vae, padded).to(vae.mean.device))
    table, shown = alphas_bar(levels), [round((levels - 1) * part) for part in (0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1)]
    noise, abar = torch.randn(latent.shape, generator=generator(0)), table[shown].view(-1, 1, 1, 1)
    noised = abar.sqrt().to(latent) * latent + ((1 - abar).sqrt() * noise).to(latent)
    noised = vae.normalise(noised, inverse=True)
    curves = {
        "signal": list(enumerate(table.sqrt().tolist())),
        "noise": list(enumerate((1 - table).sqrt().tolist()))[1:],  # step 0 has none
        "beta": list(enumerate(linear_betas(levels - 1).tolist(), 1)),
    }
    chart = Chart("Parts of signal and noise in x_t, and beta, by step t", curves).draw()
    strip = common.make_grid(common.to_uint8(decode(vae, noised)), 8)
    height = max(1, round(strip.height * chart.width / strip.width))
    sheet = Image.new("RGB", (chart.width, height + 20 + chart.height), "white")
    sheet.paste(strip.resize((chart.width, height), Image.Resampling.LANCZOS))
    for i, t in enumerate(shown):
        place = ((i + 0.5) * chart.width / 8, height + 3)
        ImageDraw.Draw(sheet).text(place, f"t = {t}", "black", ImageFont.load_default(13), "ma")
    sheet.paste(chart, (0, height + 20))
    common.save_picture(sheet, options.out)
    print(f"{options.out}: what is left of a picture at eight of {levels} steps")


# ----------------------------------------------------------------------------------------------------------------
# Command line

VERBS = {
    "train": (
        train,
        Config,
        PRESETS,
        "both stages, or the second, e.g. python serpentine_vae.py train --data DIR; --minutes, --steps, --batch-size "
        "and --lr are the second's, the denoiser's; those of the first, the VAE, begin with --vae",
    ),
    "train-vae": (train_vae, VAEConfig, VAE_PRESETS, "the first stage alone, e.g. train-vae --minutes 10"),
    "sample": (sample_command, SampleConfig, None, "draw pictures, e.g. python serpentine_vae.py sample --num 16"),
    "inpaint": (
        inpaint_command,
        InpaintConfig,
        None,
        "make a part anew, WHITE in the mask is KEPT: --image A --mask B",
    ),
    "reconstruct": (reconstruct_command, ReconstructConfig, None, "what the VAE makes of pictures, e.g. --image FILE"),
    "leakage": (leakage_command, LeakageConfig, None, "how far one latent cell reaches, with numbers and a picture"),
    "seams": (seams_command, SeamsConfig, None, "how visible the borders of inpainting are, by both clamps"),
    "schedule": (schedule_command, ScheduleConfig, None, "the picture of the noise schedule"),
    "export": common.export("serpentine_vae"),
}


def main(argv=None):
    """The command line: the words after the file's name, or sys.argv's; returns the exit code."""
    return common.run_command_line(__doc__, VERBS, argv)


if __name__ == "__main__":
    sys.exit(main())
