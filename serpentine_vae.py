"""A localized VAE, a DDPM on its latents whose U-Net scans the map along serpentine paths, and inpainting with both.

The system of the write-up "Diffusion" (a home-made diffusion model for 5 GB of GPU memory). Step 0 is the CLEAN latent
and step N - 1 is NOISE. One position of a latent map stands for a tile of 8 x 8 pixels of the picture.

    python serpentine_vae.py train                             the VAE, then the denoiser: 15 minutes on two CPU cores
    python serpentine_vae.py sample --num 16 --gif faces.gif
    python serpentine_vae.py inpaint --image face.png --mask mask.png           WHITE in the mask means KEEP
    python serpentine_vae.py leakage                           how far does one latent position reach into the picture?

What to expect of the demo preset (two cores of an AMD EPYC with AVX512-BF16, 10,000 pictures of faces): a VAE with a
PSNR of 34 dB after six minutes. Then a denoiser that predicts v (--predict v): its loss starts at 1.0, the mean square
of v, because its last layer starts at zero. After 80,000 latents it is near 0.38 and, in eight bins of t from clean to
noise, 0.49, 0.23, 0.19, 0.25, 0.37, 0.45, 0.52, 0.51: at a small t the noise is hard to find, at a large t the latent.
(With the write-up's --predict eps the last bins fall to 0.003, because there x_t is almost the noise itself.) Samples
are then faces with clean lines, most with blotches of colour; those of the shipped weights, after 192,000 latents, have
fewer. Their VAE has seen photographs, too (PSNR 36 dB for new faces, 26 dB for a new photograph).

    symbol      here                shape                   meaning
    x           x, pictures         (B, 3, H, W)            pictures; in [-1, 1] inside the VAE
    z_0         latent              (B, C, h, w)            posterior mean after VAE.normalise; h = H/8, w = W/8
    N - 1       num_timesteps                               noisy steps; with the clean step 0 there are N
    beta_t      linear_betas        (N - 1,)                part of the variance that step t replaces by noise
    abar_t      alpha_bars[t]       (N,)                    product of 1 - beta up to t; abar_0 = 1
    z_t         x_t; x in denoise   (B, C, h, w)            sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise
    eps         eps                 (B, C, h, w)            the noise in z_t, predicted or computed from v
    v, a, h     value, forget, h    (B, h w, D)             scan: h_i = a_i h_(i-1) + (1 - a_i) v_i, i along a path
    mask        keep                (H, W)                  in pixels: 1 = keep

    part of the write-up                         where
    VAE with Localized and Aligned Latents       VAE, local_decoder, SqueezeExcite, vae_loss; measured by `leakage`
    Serpentine Module                            serpentine_order, scan, Serpentine
    DDPM in the Custom Latent Space              Denoiser, train
    Noise Schedule                               noise_schedule, add_noise; drawn by `schedule`
    Generate From Random Noise                   denoise, sample
    Inpainting                                   keep_positions, clamp_known, inpaint; its borders: `seams`
"""

import copy
import dataclasses
import functools
import itertools
import math
import sys
import time
from pathlib import Path

import common
from common import BatchRng, Run, UserError, autocast, generator, make_grid, micro_batches, option, zero_init

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

STRIDE = 8  # pixels per side of the tile that a latent position stands for

# ----------------------------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass
class VAEConfig(common.TrainConfig):
    """The options of `train-vae`, the first of two stages; VAE_PRESETS holds what each preset changes."""

    out: str = option("runs/serpentine_vae-vae", "run folder")
    # Data
    image_size: int = option(80, "side of the pictures in pixels, a multiple of 8", low=16)
    flip: float = option(0.0, "how often a picture is mirrored", low=0.0, high=1.0)
    # VAE
    channels: int = option(8, "channels of the latent", low=1)
    vae_width: int = option(64, "width of the VAE at half the pictures' resolution", low=4)
    encoder_depth: int = option(1, "blocks of the encoder at each resolution", low=1, high=1000)
    decoder: str = option("local", "local: the write-up's; global: Stable Diffusion's", choices=("local", "global"))
    photos: float = option(0.0, "crops of photographs for each picture of --data, for the VAE alone", low=0.0)
    slope_weight: float = option(0.5, "weight of the error of differences between neighbouring pixels", low=0.0)
    kl_weight: float = option(2.5e-5, "weight of the KL divergence of latents from N(0, 1)", low=0.0)


@dataclasses.dataclass
class Config(VAEConfig):
    """The options of `train`, which runs both stages. minutes, steps, batch_size and lr are the denoiser's."""

    BUDGETS = (*VAEConfig.BUDGETS, ("vae_minutes", "vae_steps"))

    out: str = option("", "run folder (default: runs/serpentine_vae); the VAE's is the same with -vae added")
    vae: str = option("", "trained VAE: a run, a checkpoint, or TAEF2, FLUX.2's or SD's (default: train one first)")
    vae_minutes: float | None = option(None, "minutes of training the VAE", low=0.01)
    vae_steps: int | None = option(None, "optimizer steps of training the VAE", low=1)
    vae_batch_size: int = option(8, "pictures per optimizer step of the VAE", low=1)
    vae_lr: float = option(2e-3, "peak learning rate of the VAE", low=0.0)
    # Denoiser
    width: int = option(96, "width of the denoiser at the latent's resolution, a multiple of 8", low=8)
    multipliers: tuple[int, ...] = option((1, 2), "width at each resolution, in multiples of --width", low=1)
    depth: int = option(2, "blocks of the denoiser at each resolution, down and up", low=1, high=1000)
    num_timesteps: int = option(1000, "noisy steps, N - 1; with far fewer the last one is not yet noise", low=2)
    predict: str = option("eps", "what the denoiser predicts: the noise or the velocity v", choices=("eps", "v"))
    known_prob: float = option(0.0, "how often a part of a latent is clean, to learn inpainting", low=0.0, high=1.0)


# The write-up gives batch size 32, mixed precision, "over 10,000 iterations" and 5 GB of GPU memory. Sizes are ours.
PAPER = dict(image_size=256, flip=0.5, encoder_depth=2, checkpoint_every=1000)
VAE_PRESETS = {
    "demo": dict(minutes=6.0, batch_size=8, lr=2e-3),
    "paper": PAPER | dict(steps=50_000, batch_size=16, lr=5e-4),
}
# Near t = N - 1, predicted noise gives the latent as a small difference divided by sqrt(abar_t) = 0.006, so that its
# colours, and whether they match the kept part in inpainting, depend on small errors. An error of v is not enlarged so.
PRESETS = {
    "demo": dict(minutes=9.0, lr=1e-3, vae_minutes=6.0, predict="v", known_prob=0.5),
    "paper": PAPER
    | dict(steps=100_000, lr=2e-4, vae_steps=50_000, vae_batch_size=16, vae_lr=5e-4, width=192, multipliers=(1, 2, 3)),
}

# ----------------------------------------------------------------------------------------------------------------
# VAE: each latent position describes its own tile ("VAE with Localized and Aligned Latents")


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels at each position of a map (B, D, H, W). Group norm, the usual choice, would average
    over the map, and so let every position influence all others."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """Scale each channel by a function of the means of all channels over the map (Hu et al. 2017, eq. 2 to 4). This is
    the only global part of the encoder: through it a latent position depends on the whole picture."""

    def __init__(self, width):
        super().__init__()
        self.squeeze, self.excite = nn.Linear(width, width // 4), nn.Linear(width // 4, width)

    def forward(self, x):
        scale = self.excite(F.silu(self.squeeze(x.mean(dim=(2, 3))))).sigmoid()  # (B, D)
        return x * (2 * scale[:, :, None, None])  # the factor 2 makes the scale about 1 at the start


class VAEBlock(nn.Module):
    """x + narrow(excite(silu(widen(norm(x))))); excite is the identity in the decoder."""

    def __init__(self, width, kernel=3, excite=False):
        super().__init__()
        self.norm = LayerNorm2d(width)
        self.widen = nn.Conv2d(width, 2 * width, kernel, padding=kernel // 2)
        self.excite = SqueezeExcite(2 * width) if excite else nn.Identity()
        self.narrow = nn.Conv2d(2 * width, width, 1)

    def forward(self, x):
        return x + self.narrow(self.excite(F.silu(self.widen(self.norm(x)))))


def local_decoder(channels, width):
    """Latents (B, channels, h, w) -> pictures (B, 3, 8h, 8w).

    Only three layers look at neighbours: a 3 x 3 kernel at 1/4 of the resolution, which adds 4 pixels on each side, and
    two at 1/2, which add 2 each. A latent position therefore changes its tile and the 8 pixels around it, nothing else.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 4 * width, 1),  # (B, 4 width, H/8, W/8)
        VAEBlock(4 * width, kernel=1),
        VAEBlock(4 * width, kernel=1),
        nn.Conv2d(4 * width, 8 * width, 1),
        nn.PixelShuffle(2),  # (B, 2 width, H/4, W/4)
        VAEBlock(2 * width),
        nn.Conv2d(2 * width, 4 * width, 1),
        nn.PixelShuffle(2),  # (B, width, H/2, W/2)
        VAEBlock(width),
        VAEBlock(width),
        LayerNorm2d(width),
        nn.Conv2d(width, 12, 1),
        nn.PixelShuffle(2),  # (B, 3, H, W)
    )


def global_decoder(channels, width):
    """Stable Diffusion's decoder with about as many parameters, to compare with: attention over all positions, group
    norms, and 3 x 3 kernels at every resolution. Raises UserError."""
    if width % 64:
        raise UserError(f"--vae-width {width}: --decoder global needs a multiple of 64, for its group norms")
    return common.KLHalf(channels, 3, (3 * width // 2, width // 2, width // 2, width // 2), "up")


class VAE(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] <-> latents (B, channels, H/8, W/8); H and W multiples of 8. mean and std are
    those of each latent channel over 300 pictures of the training set, measured before each checkpoint is written."""

    def __init__(self, channels=8, width=64, encoder_depth=1, decoder="local"):
        super().__init__()
        self.channels = channels
        layers, widths = [], (3, width, 2 * width, 4 * width)  # channels at 1, 1/2, 1/4 and 1/8 of the sides
        for level, (width_in, wide) in enumerate(itertools.pairwise(widths)):
            kernel = 1 if level else 3
            layers += [nn.PixelUnshuffle(2), nn.Conv2d(4 * width_in, wide, kernel, padding=kernel // 2)]
            layers += [VAEBlock(wide, excite=True) for _ in range(encoder_depth)]
        self.encoder = nn.Sequential(*layers, LayerNorm2d(4 * width), nn.Conv2d(4 * width, 2 * channels, 1))
        self.decoder = {"local": local_decoder, "global": global_decoder}[decoder](channels, width)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.to(memory_format=torch.channels_last)

    def posterior(self, x):
        """Mean and log-variance of the latent, each (B, channels, H/8, W/8). Raises UserError for other sizes."""
        common.check_map(x, 3, STRIDE)
        mean, logvar = self.encoder(x).float().chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, x):
        """Pictures -> the posterior's mean."""
        return self.posterior(x)[0]

    def decode(self, latent):
        """Latents -> pictures in about [-1, 1]."""
        common.check_map(latent, self.channels, 1)
        return self.decoder(latent).float()

    def forward(self, x, noise):
        """(reconstruction, mean, log-variance); the decoder gets a sample of the posterior, mean + std * noise."""
        mean, logvar = self.posterior(x)
        return self.decode(mean + (logvar / 2).exp() * noise), mean, logvar

    def normalise(self, latent, inverse=False):
        """The VAE's latent -> the latent that the denoiser sees, whose channels have mean 0 and standard deviation 1,
        as the noise schedule assumes; or the inverse."""
        mean, std = self.mean[:, None, None], self.std[:, None, None]
        return latent * std + mean if inverse else (latent - mean) / std


def vae_loss(config, x, remade, mean, logvar):
    """(B,) loss of each picture: squared error, squared error of the differences between neighbouring pixels at three
    scales, which penalises blur, and with a small weight the KL divergence of the posterior from N(0, 1), as a mean
    over its elements (Kingma & Welling 2013)."""
    error = remade - x
    loss = error.square().mean(dim=(1, 2, 3))
    for _ in range(3):
        slopes = sum(error.diff(dim=axis).square().mean(dim=(1, 2, 3)) for axis in (2, 3))
        loss = loss + config.slope_weight * slopes
        error = F.avg_pool2d(error, 2)
    kl = (mean.square() + logvar.exp() - 1 - logvar).mean(dim=(1, 2, 3)) / 2
    return loss + config.kl_weight * kl


# ----------------------------------------------------------------------------------------------------------------
# Serpentine scans ("Serpentine Module: Sequential Feature Processing")

DIRECTIONS = "rows", "columns", "diagonals", "antidiagonals"
DIRECTIONS += tuple(f"{name} reversed" for name in DIRECTIONS)


def serpentine_order(height, width, direction):
    """A path through a map, as a permutation of its positions 0 to height * width - 1, which are numbered row by row.
    It goes along one line of the map and back along the next, so consecutive positions always touch, those of one
    diagonal at a corner. direction: one of DIRECTIONS."""
    numbers = torch.arange(height * width).view(height, width)
    lines = {
        "rows": numbers,
        "columns": numbers.T,
        "diagonals": [numbers.diagonal(k) for k in range(1 - height, width)],
        "antidiagonals": [numbers.flip(1).diagonal(k) for k in range(1 - height, width)],
    }[direction.removesuffix(" reversed")]
    path = torch.cat([line.flip(0) if i % 2 else line for i, line in enumerate(lines)])
    return path.flip(0) if direction.endswith(" reversed") else path


@functools.lru_cache(maxsize=64)
def all_orders(height, width, device):
    """(order, inverse), both (8 N,) for N = height * width positions: order[8 i + k] = 8 p + k, where p is place i of
    the k-th path. inverse is the same of the inverse permutations."""
    orders = torch.stack([serpentine_order(height, width, direction) for direction in DIRECTIONS], dim=1)  # (N, 8)
    paths = torch.arange(len(DIRECTIONS))
    return tuple((len(paths) * order + paths).flatten().to(device) for order in (orders, orders.argsort(dim=0)))


def reorder(x, order):
    """Permute the positions of x (B, N, D): the k-th eighth of the channels along path k, or back with the inverse."""
    eighths = x.unflatten(2, (len(DIRECTIONS), -1)).flatten(1, 2)  # (B, 8 N, D/8)
    return eighths.index_select(1, order).view(x.shape)


def scan(a, b):
    """h_i = a_i h_(i-1) + b_i along dim 1 of (B, N, D), starting from h = 0.

    The plain form is a loop of N steps. Here the path is cut into N/16 chunks, and every step works on all of them.
    1. Scan each chunk from zero, in 16 steps, and keep its last state. 2. The true last states obey the same recurrence
    from chunk to chunk, with the product of a over a chunk as a and the states of 1. as b: scan() calls itself. 3. Scan
    each chunk again, in 16 steps, from the true last state of the chunk before.
    """
    count = b.shape[1]
    size = min(16, count)
    if count % size:
        a, b = (F.pad(x, (0, 0, 0, -count % size)) for x in (a, b))
    a, b = (x.unflatten(1, (-1, size)) for x in (a, b))  # (B, N/16, 16, D)
    h, state = torch.empty_like(b), torch.zeros_like(b[:, :, 0])
    steps = list(zip(a.unbind(2), b.unbind(2), h.unbind(2)))  # each (B, N/16, D)
    if count > size:
        last = state
        for a_i, b_i, _ in steps:
            last = torch.addcmul(b_i, a_i, last)
        state[:, 1:] = scan(a.prod(dim=2), last)[:, :-1]
    for a_i, b_i, h_i in steps:
        state = torch.addcmul(b_i, a_i, state, out=h_i)
    return h.flatten(1, 2)[:, :count]


class Scan(torch.autograd.Function):
    """scan() along the paths of all_orders(). Its gradient is written by hand, because autograd would record every step
    of the loop: it is a scan in the opposite direction, which needs a and h only."""

    @staticmethod
    def forward(ctx, a, b, order, inverse):
        a, b = reorder(a, order), reorder(b, order)
        h = scan(a, b)
        ctx.save_for_backward(a, h, order, inverse)
        return reorder(h, inverse)

    @staticmethod
    def backward(ctx, grad):
        a, h, order, inverse = ctx.saved_tensors
        grad = reorder(grad, order)
        # g_i = grad_i + a_(i+1) g_(i+1) is the derivative of the loss with respect to h_i, directly and through all
        # later states.
        g = scan(F.pad(a[:, 1:], (0, 0, 0, 1)).flip(1), grad.flip(1)).flip(1)
        grad_a = g * F.pad(h[:, :-1], (0, 0, 1, 0))  # g_i h_(i-1)
        return reorder(grad_a, inverse), reorder(g, inverse), None, None


def scan_map(a, b, height, width):
    """scan() along all eight paths, an eighth of the channels D on each. a, b and the result are (B, height width, D),
    with positions numbered row by row whatever the path."""
    return Scan.apply(a, b, *all_orders(height, width, a.device))


class Serpentine(nn.Module):
    """Scan a map (B, D, h, w) along all eight paths at once and merge the results. Along each path
    h_i = a_i h_(i-1) + (1 - a_i) v_i, where the forget gate a_i in (0, 1) depends on the input at i: a selective
    state-space model (Gu & Dao 2023, theorem 1) whose state has one number for each channel. The output is gated, too.
    Time and memory are linear in h w; those of self-attention are quadratic."""

    def __init__(self, width):
        super().__init__()
        self.norm = LayerNorm2d(width)
        self.in_proj = nn.Linear(width, 3 * width)  # to the value, the forget gate and the output gate
        # A second bias of the forget gate, log(s - 1), added in float32. sigmoid(log(s - 1)) = 1 - 1 / s is the gate of
        # a state that remembers about s positions; at the start s is 2 to 64 among the channels of each path.
        spans = torch.logspace(1, 6, width // len(DIRECTIONS), base=2).repeat(len(DIRECTIONS))
        self.span = nn.Parameter(torch.log(spans - 1))
        self.out_proj = zero_init(nn.Linear(width, width))

    def forward(self, x):
        height, width = x.shape[2:]
        tokens = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, D)
        value, forget, gate = self.in_proj(tokens).chunk(3, dim=-1)
        forget = (forget.float() + self.span).sigmoid()
        h = scan_map(forget, (1 - forget) * value.float(), height, width)
        merged = self.out_proj(h.to(gate.dtype) * F.silu(gate))
        return x + merged.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # (B, D, h, w)


# ----------------------------------------------------------------------------------------------------------------
# Denoiser: a U-Net. Each block has two convolutions, for near positions, and a serpentine, for distant ones


class Block(nn.Module):
    """shortcut(x) + two convolutions, with scale and shift from the timestep between them (AdaLN), then a serpentine.
    Where known is 1, scale and shift are those of time 0."""

    def __init__(self, width_in, width, embed_dim):
        super().__init__()
        self.shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()
        self.norm1, self.conv1 = LayerNorm2d(width_in), nn.Conv2d(width_in, width, 3, padding=1)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, 2 * width))
        self.norm2, self.conv2 = LayerNorm2d(width), zero_init(nn.Conv2d(width, width, 3, padding=1))
        self.serpentine = Serpentine(width)

    def forward(self, x, emb, clean_emb, known):
        h = self.conv1(F.silu(self.norm1(x)))
        noisy, clean = (self.modulation(time)[:, :, None, None] for time in (emb, clean_emb))
        modulation = noisy + known.to(noisy.dtype) * (clean - noisy)  # each position has its own time
        scale, shift = modulation.chunk(2, dim=1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.serpentine(self.shortcut(x) + h)


class Denoiser(nn.Module):
    """denoiser(x_t, t, known) -> the noise in x_t, or v. x_t (B, channels, h, w), any h and w; t (B,) from 1 to N - 1;
    known (B or 1, 1, h, w): 1 where x_t holds the clean latent, whose time is 0 (TD-Paint, Mayet et al. 2024), so that
    inpainting can show the network what is kept; no position if None. Raises UserError for a width that the eight paths
    cannot share."""

    def __init__(self, channels=8, width=96, multipliers=(1, 2), depth=2):
        super().__init__()
        if width % len(DIRECTIONS):
            raise UserError(f"--width {width} must be a multiple of {len(DIRECTIONS)}, an equal part for each path")
        widths, embed_dim = [width * m for m in multipliers], 4 * width
        self.time_embed = common.TimestepEmbedder(embed_dim)
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for width_in, wide in zip([width, *widths], widths):
            self.down.append(nn.ModuleList([Block(wide if i else width_in, wide, embed_dim) for i in range(depth)]))
        for width_in, wide in zip([widths[-1], *widths[::-1]], widths[::-1]):
            # + wide: each block of `up` also gets the output of a block of `down`
            stage = [Block((wide if i else width_in) + wide, wide, embed_dim) for i in range(depth)]
            self.up.append(nn.ModuleList(stage))
        self.norm, self.conv_out = LayerNorm2d(widths[0]), zero_init(nn.Conv2d(widths[0], channels, 3, padding=1))
        self.to(memory_format=torch.channels_last)

    def forward(self, x, t, known=None):
        times = self.time_embed(t), self.time_embed(torch.zeros_like(t[:1]))
        known = x.new_zeros(1, 1, 1, 1) if known is None else known.to(x.dtype)
        x, skips = self.conv_in(x), []
        for level, blocks in enumerate(self.down):
            if level:  # to (B, D, ceil(h/2), ceil(w/2)), so that any size fits
                x, known = (F.avg_pool2d(part, 2, ceil_mode=True) for part in (x, known))
            for block in blocks:
                x = block(x, *times, known)
                skips.append((x, known))
        for blocks in self.up:
            if x.shape[2:] != skips[-1][0].shape[2:]:
                x = F.interpolate(x, size=skips[-1][0].shape[2:])
            for block in blocks:  # (there is no middle block: the first of these gets x twice)
                skip, known = skips.pop()
                x = block(torch.cat((x, skip), dim=1), *times, known)
        # In float32: where x_t is nearly all noise, a rounding error of predicted noise is a large one of the latent.
        with torch.autocast(x.device.type, enabled=False):
            return self.conv_out(F.silu(self.norm(x.float())))


class LatentDiffusion(nn.Module):
    """What a checkpoint holds: a VAE and the denoiser of its latents, or after `train-vae` the VAE alone. latent_range:
    the largest absolute value of the training set's normalised latents."""

    def __init__(self, vae, denoiser=None, latent_range=None):
        super().__init__()
        self.vae, self.denoiser, self.latent_range = vae, denoiser, latent_range


def build_vae(config):
    return VAE(config.channels, config.vae_width, config.encoder_depth, config.decoder)


class PublishedVAE(nn.Module):
    """A VAE in a layout that common.load_vae reads, with the methods of VAE. Its weights stay in their own file; a
    checkpoint holds mean and std alone."""

    def __init__(self, path, device):
        super().__init__()
        vae = common.load_vae(path).to(device)
        self.channels, self.hash, self.encode, self.decode = vae.latent_channels, vae.hash, vae.encode, vae.decode
        self.register_buffer("mean", torch.zeros(self.channels))
        self.register_buffer("std", torch.ones(self.channels))

    normalise = VAE.normalise


def build_denoiser(config):
    return Denoiser(config.channels, config.width, config.multipliers, config.depth)


def load_model(path="", device="cpu"):
    """(model, config) of a checkpoint or run folder; "" is the run in runs/, else the file in weights/."""
    path = common.find_weights(path, "serpentine_vae")
    weights, header = common.load_tensors(path)
    if not header or header.get("system") != "serpentine_vae":
        raise UserError(f"{path} is not a checkpoint of serpentine_vae.py; name another")
    config = common.config_from_header(Config, header, path)
    has_denoiser = any(name.startswith("denoiser.") for name in weights)
    vae = PublishedVAE(config.vae, device) if header.get("published") else build_vae(config)
    model = LatentDiffusion(vae, build_denoiser(config) if has_denoiser else None, header.get("range"))
    common.load_into(model, weights, path)
    return model.eval().to(device), config


def load(path):
    """(vae, denoiser) of a checkpoint, on the CPU; the denoiser is None after `train-vae`. Raises UserError."""
    model, _ = load_model(path)
    return model.vae, model.denoiser


# ----------------------------------------------------------------------------------------------------------------
# Noise and sampling ("Noise Schedule", "Generate From Random Noise")


@functools.cache
def noise_schedule(num_timesteps):
    """abar_t for t = 0 to num_timesteps, (num_timesteps + 1,): 1 for the clean latent at t = 0, then the product of
    1 - beta over linear betas. After 1000 steps abar is 4e-5: practically noise, from which sampling starts."""
    return torch.cat((torch.ones(1), common.alphas_cumprod(common.linear_betas(num_timesteps))))


def add_noise(latent, noise, alpha_bar):
    """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise; alpha_bar (B,) or 0-d (Ho et al. 2020, eq. 4)."""
    alpha_bar = alpha_bar.to(latent).view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * latent + (1 - alpha_bar).sqrt() * noise


def denoise(
    predict, x, alpha_bars, steps, solver="ddim", noise_fn=None, data_max=None, clamp=None, resample_steps=1,
    callback=None,
):  # fmt: skip
    """From noise x at t = N - 1 to the clean latent at t = 0 in `steps` steps. alpha_bars: noise_schedule().

    predict(x, t) returns the noise in x. solver: "ddim", or "ancestral", the write-up's, which adds noise_fn() in all
    steps but the last. data_max: the largest absolute value of the clean latent that a step may predict. clamp(x, t)
    puts back what is known, before the first step and after each one. resample_steps: how often each step but the last
    is made, with noise added in between to get from t_next back to t, so that new and known content can adapt to each
    other (RePaint, Lugmayr et al. 2022, section 4.2). callback(x, part) gets every state, with part from 0 to 1.
    """
    last, alpha_bars = len(alpha_bars) - 1, alpha_bars.tolist()
    times = [round(last * (steps - i) / steps) for i in range(steps + 1)]
    clamp, callback = clamp or (lambda x, t: x), callback or (lambda x, part: None)
    x = clamp(x, last)
    for t, t_next in common.progress(itertools.pairwise(times), "steps"):
        callback(x, 1 - t / last)
        alpha_bar, alpha_bar_next = alpha_bars[t], alpha_bars[t_next]
        for repetition in range(resample_steps if t_next else 1):
            if repetition:  # the forward process from t_next to t: x_t = sqrt(alpha) x_t_next + sqrt(1 - alpha) noise
                alpha = alpha_bar / alpha_bar_next
                x = clamp(alpha**0.5 * x + (1 - alpha) ** 0.5 * noise_fn(), t)
            eps = predict(x, t)
            if data_max is not None:
                eps = common.clip_x0(x, eps, alpha_bar, data_max)
            if solver == "ddim":
                x = common.ddim_step(x, eps, alpha_bar, alpha_bar_next)
            else:
                x = common.ddpm_step(x, eps, alpha_bar, alpha_bar_next, noise_fn() if t_next else 0)
            x = clamp(x, t_next)
    callback(x, 1.0)
    return x


@dataclasses.dataclass
class SampleConfig(common.SampleConfig):
    solver: str = option("ddim", "ancestral is the write-up's; give it --steps 1000", choices=("ddim", "ancestral"))


@torch.no_grad()
def sample_latents(model, config, options, shape, clamp_for=None, resample_steps=1, callback=None, known=None):
    """Sample latents (options.num, *shape) in the VAE's scale. Latent i depends on the seed options.seed + i only.
    clamp_for(noise, rows) returns the clamp() of denoise() for these rows of the result, which start from this noise.
    known: as for Denoiser. callback(latents, part) gets the states of the first batch. Raises UserError."""
    if model.denoiser is None:
        raise UserError("these weights are a VAE without a denoiser; name those of `train` with --weights")
    if options.steps > config.num_timesteps:
        raise UserError(f"--steps {options.steps}: the denoiser has {config.num_timesteps} steps; ask for at most that")
    device, alpha_bars = model.vae.mean.device, noise_schedule(config.num_timesteps)
    latents = []

    def predict(x, t):
        output = model.denoiser(x, torch.full((len(x),), float(t), device=device), known)
        return output if config.predict == "eps" else common.eps_from_v(output, x, alpha_bars[t])

    def show(x, part):
        if callback and not latents:
            callback(model.vae.normalise(x, inverse=True), part)

    with autocast(device, common.pick_precision(options.precision, device)):
        for rows in common.progress(torch.arange(options.num).split(options.batch_size), "batches"):
            seeds = [options.seed + i for i in rows.tolist()]
            noise, rngs = common.noise_for(seeds, shape, device), [generator(seed, 1) for seed in seeds]

            def noise_fn(rngs=rngs):
                return torch.stack([torch.randn(shape, generator=rng) for rng in rngs]).to(device)

            clamp = clamp_for(noise, rows) if clamp_for else None
            settings = dict(data_max=model.latent_range, clamp=clamp, resample_steps=resample_steps, callback=show)
            latents.append(denoise(predict, noise, alpha_bars, options.steps, options.solver, noise_fn, **settings))
    return model.vae.normalise(torch.cat(latents), inverse=True)


def sample(model, config, callback=None, **options):
    """Sample RGB pictures (num, 3, H, W) in [0, 1] on the CPU. options: the fields of SampleConfig, such as num, steps,
    seed, solver. callback(latents, part) gets the states of the first batch. Raises UserError."""
    side = config.image_size // STRIDE
    shape = model.vae.channels, side, side
    return decode(model.vae, sample_latents(model, config, SampleConfig(**options), shape, callback=callback))


@torch.no_grad()
def encode(vae, x):
    """Pictures (B, 3, H, W) in [-1, 1] -> latents on the VAE's device; 32 at a time, to save memory. Sides that are no
    multiples of 8 are extended to the right and below by repeating the border."""
    down, right = (-side % STRIDE for side in x.shape[2:])
    x = F.pad(x, (0, right, 0, down), mode="replicate")
    return torch.cat([vae.encode(part.to(vae.mean.device)) for part in x.split(32)])


@torch.no_grad()
def decode(vae, latent, size=(None, None)):
    """Latents -> RGB (B, 3, H, W) in [0, 1] on the CPU; 32 at a time. size: (H, W) before encode() extended them."""
    parts = [vae.decode(part.to(vae.mean.device)).cpu() for part in latent.split(32)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)[:, :, : size[0], : size[1]]


# ----------------------------------------------------------------------------------------------------------------
# Inpainting ("Inpainting"): the picture is encoded once; its latent is put back at the kept positions after each step


def keep_positions(keep):
    """Mask in pixels (H, W), 1 = keep -> latent positions to keep, (H/8, W/8) rounded up, bool: those whose pixels are
    all kept. The write-up takes the nearest pixel, which is the same for masks that follow the tiles; with another mask
    it could keep a position although a part of its tile is to change."""
    return -F.max_pool2d(-keep[None, None].float(), STRIDE, ceil_mode=True)[0, 0] > 0  # the smallest of each tile


def clamp_known(latent, positions, how, noise, alpha_bars):
    """clamp(x, t) for denoise(): the known normalised latent at the kept positions, x elsewhere.

    how "mean" is the write-up's rule: the clean latent (the posterior's mean) at every step. A denoiser that was
    trained without --known-prob never saw clean positions at a large t, though. "clean" is the same for one that was
    trained with it, and that gets the time 0 for these positions. "noised" adds the noise of step t, none at t = 0
    (Lugmayr et al. 2022, eq. 8a). The noise is the same at all steps, as in DDIM's deterministic path.
    """

    def clamp(x, t):
        known = add_noise(latent, noise, alpha_bars[t]) if how == "noised" and t else latent
        return torch.where(positions, known, x)

    return clamp


def blend(original, made, keep):
    """`original` where keep (H, W) is 1, elsewhere `made`, both (B, 3, H, W) in [0, 1]. So that there is no step at the
    border, the difference of the two there is added to the next 8 pixels, 15 % less at each after the first."""
    kernel = torch.tensor([[1.0, 4.0, 1.0], [4.0, 0.0, 4.0], [1.0, 4.0, 1.0]])[None, None]

    def around(x):  # the weighted sum of each pixel's eight neighbours
        return F.conv2d(x.flatten(0, 1).unsqueeze(1), kernel, padding=1).view(x.shape)

    keep = keep[None, None].float()
    difference, known = (original - made) * keep, keep
    for distance in range(STRIDE):
        weight = around(known)
        ring = (weight > 0) & (known == 0)  # the pixels next to the known ones
        difference = torch.where(ring, around(difference) / weight.clamp(min=1) * (0.85 if distance else 1), difference)
        known = known + ring
    return torch.where(keep > 0, original, (made + difference).clamp(0, 1))


@dataclasses.dataclass
class InpaintConfig(SampleConfig):
    image: str = option("", "picture to change, of any size")
    mask: str = option("", "picture of the same size: WHITE is KEPT, black is made anew (the write-up has both senses)")
    invert: bool = option(False, "black is kept and white is made anew")
    clamp: str = option(
        "auto",
        "kept positions: clean and marked as such, noised, or clean (mean); auto: clean if trained with --known-prob",
        choices=("auto", "clean", "noised", "mean"),
    )
    solver: str = option("auto", "auto: ancestral with --clamp clean, else ddim", ("auto", "ddim", "ancestral"))
    steps: int | None = option(None, "steps from noise to picture (default: 12 with --clamp clean, else 50)", low=1)
    resample_steps: int | None = option(None, "how often each step is made (default: 1 with clean, else 5)", low=1)
    composite: bool = option(False, "put the kept pixels, which the VAE does not return exactly, into the result")
    as_written: bool = option(False, "the write-up's own way: 1,000 ancestral steps, each once, with the clean mean")
    num: int = option(2, "pictures to make", low=1)
    out: str = option("samples/inpainted.png", "the results; with original and mask in NAME-sheet.png", picture=True)


def inpaint(model, config, x, keep, callback=None, **options):
    """Sample new content at the latent positions that a mask does not keep.

    x: pictures (1 or num, 3, H, W) in [-1, 1], of any H and W. keep (H, W): 1 where pixels are kept. options: the
    fields of InpaintConfig. Returns the latents (num, C, h, w), which equal encode(vae, x) bit for bit at the kept
    positions, and RGB (num, 3, H, W) in [0, 1]. callback(latents, part) gets the states of the first batch. Raises
    UserError where the mask keeps everything or no whole tile.
    """
    options = InpaintConfig(**options)
    if options.as_written:
        written = dict(solver="ancestral", steps=config.num_timesteps, resample_steps=1, clamp="mean")
        options = dataclasses.replace(options, **written)
    how = options.clamp
    if how == "auto":
        how = "clean" if config.known_prob else "noised"
    # The noise that ancestral steps add brings results nearer to the originals than DDIM does in as many steps.
    solver, steps, repeats = ("ancestral", 12, 1) if how == "clean" else ("ddim", 50, 5)
    solver = solver if options.solver == "auto" else options.solver
    steps, repeats = options.steps or steps, options.resample_steps or repeats
    options = dataclasses.replace(options, solver=solver, steps=steps)
    positions = keep_positions(keep).to(model.vae.mean.device)
    if positions.all():
        raise UserError("the mask keeps everything; paint black what is to be made anew (or see --invert)")
    if not positions.any():
        raise UserError(f"the mask keeps no whole tile of {STRIDE} x {STRIDE} pixels; paint more of it white")
    clean = encode(model.vae, x).expand(options.num, -1, -1, -1)
    normal, alpha_bars = model.vae.normalise(clean), noise_schedule(config.num_timesteps)

    def clamp_for(noise, rows):
        return clamp_known(normal[rows], positions, how, noise, alpha_bars)

    known = positions[None, None] if how == "clean" else None
    sampled = sample_latents(model, config, options, clean.shape[1:], clamp_for, repeats, callback, known)
    latents = torch.where(positions, clean, sampled)  # normalising and its inverse have rounded the kept ones
    rgb = decode(model.vae, latents, x.shape[2:])
    return latents, blend(x / 2 + 0.5, rgb, keep) if options.composite else rgb


# ----------------------------------------------------------------------------------------------------------------
# Data and training: the VAE, then the denoiser of its latents


PHOTOGRAPHS = "chelsea coffee rocket hubble_deep_field retina immunohistochemistry camera coins moon brick grass"


def photographs(names):
    """scikit-image's own photographs (Van der Walt et al. 2014), each as (1, 3, H, W) uint8."""
    import skimage.data

    pictures = (Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in names.split())
    return [common.picture_tensor([np.array(picture)]) for picture in pictures]


def photo_crops(count, size):
    """(count, 3, size, size) uint8: random squares of PHOTOGRAPHS, half of them mirrored, of sides from `size` to the
    whole picture. The photograph `astronaut` is not among them, so that VAEs can be measured on it."""
    rng, photos, crops = np.random.default_rng(0), photographs(PHOTOGRAPHS), []
    for i in common.progress(range(count), "cutting photographs"):
        photo = photos[i % len(photos)]
        side = min(int(size * (min(photo.shape[2:]) / size) ** rng.random()), *photo.shape[2:])
        top, left = (rng.integers(length - side + 1) for length in photo.shape[2:])
        crop = photo[:, :, top : top + side, left : left + side].float()
        crops.append(F.interpolate(crop.flip(-1) if i // len(photos) % 2 else crop, (size, size), mode="area"))
    return torch.cat(crops).round().byte()


def to_signed(pictures):
    """uint8 -> [-1, 1]."""
    return pictures / 127.5 - 1


def load_data(config):
    """(pictures to train on, pictures held out to measure with, all as common.Pictures); the first two (N, 3, S, S)
    uint8, in random order. One in fifty is held out, at most 500. Which ones depends on the number of pictures only, so
    both stages and all measurements of a data set agree. Raises UserError."""
    if config.image_size % STRIDE:
        raise UserError(f"--image-size {config.image_size} is not a multiple of {STRIDE}; name one")
    loaded = common.load_pictures(config.data, config.image_size, first=config.num_samples)
    if len(loaded) < 2:
        raise UserError("one picture is not enough: at least one to train on and one to measure with")
    order, count = torch.randperm(len(loaded), generator=generator(0, 7)), max(1, min(500, len(loaded) // 50))
    return loaded.pictures[order[count:]], loaded.pictures[order[:count]], loaded


def random_known(rng, height, width, probability):
    """(B, 1, h, w) bool for the rows of a BatchRng: with this probability the inside or the outside of a random
    rectangle, else no position."""
    inside = torch.ones(1, 1, 1, dtype=torch.bool)
    for axis, length in ((2, height), (1, width)):
        low, high = rng.rand(2, 1).sort(dim=1)[0].unbind(1)  # (B, 1)
        places = torch.arange(length)
        line = (places >= (low * length).floor()) & (places < (high * length).ceil())  # (B, length)
        inside = inside & line.unsqueeze(axis)
    outside, used = (rng.rand(1, 1) < 0.5), (rng.rand(1, 1) < probability)
    return ((inside ^ outside) & used).unsqueeze(1)


def encode_all(vae, pictures):
    """Pictures (N, 3, S, S) uint8 -> normalised latents (N, C, h, w) on the CPU."""
    parts = common.progress(pictures.split(32), "encoding")
    return torch.cat([vae.normalise(encode(vae, to_signed(part))).cpu() for part in parts])


def blocks(model):
    """The blocks of a VAE or denoiser, which are compiled, and sharded under --fsdp, one by one."""
    return [module for module in model.modules() if isinstance(module, VAEBlock | Block)]


def compile_blocks(config, device, model):
    """common.compile_blocks; on a CPU only with --compile, because these blocks are no faster there. The scan is not
    compiled, since the compiler would unroll its loops; it is wrapped here and not where it is defined, because
    torch.compiler imports the whole compiler."""
    global scan_map
    if config.compile or device.type == "cuda":
        scan_map = torch.compiler.disable(scan_map)
        common.compile_blocks(config, device, blocks(model))


def train_vae(config):
    """Train the VAE alone; the result is a run folder. Returns the exit code. Raises UserError."""
    device, precision = common.init_training(config)
    run = Run(config, "serpentine_vae")
    pictures, held_out, loaded = load_data(config)
    if config.photos:
        pictures = torch.cat((pictures, photo_crops(round(config.photos * len(pictures)), config.image_size)))
    torch.manual_seed(config.seed)
    model = build_vae(config)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    trained = common.parallelize(config, model, ema, device, blocks)
    optimizer, scaler = common.make_optimizer(config, model, device)
    saved = LatentDiffusion(model), LatentDiffusion(ema), optimizer, scaler
    run.header = {"checksum": loaded.checksum()}
    about = f"VAE on {len(pictures):,} pictures, {precision} on {device}"
    run.start(*saved, about, len(pictures), loaded.skipped)
    compile_blocks(config, device, model)
    side = config.image_size // STRIDE
    for step in run.steps():
        lr = config.lr * common.lr_factor(run.progress, step, config.warmup, config.decay)
        common.set_lr(optimizer, lr)
        for rows in micro_batches(config):
            rng = BatchRng(config.batch_size, config.seed, step, 1, rows=rows)
            index = common.batch_index(config, len(pictures), step)[rows]
            x = common.random_flip(to_signed(pictures[index]), config.flip, rng).to(device)  # 1. pictures
            noise = rng.randn(config.channels, side, side).to(device)  # 2. noise for a sample of the posterior
            with autocast(device, precision):
                remade, mean, logvar = trained(x, noise)  # 3. encode, sample, decode
            loss = vae_loss(config, x, remade, mean, logvar)  # 4. (B,) loss of each picture
            scaler.scale(loss.mean() / config.grad_accum).backward()  # 5. gradients
            run.add(loss, torch.zeros(len(loss)))  # a VAE has no timesteps
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        common.update_ema(ema, model, step, config.ema)
        run.log(grad_norm, lr)
        if run.checkpoint_due:
            measure_latents(ema, pictures)  # of --data, without the photographs that follow
            run.save(*saved)
        if run.pictures_due:
            run.save_pictures(torch.stack(reconstruct(ema, held_out[:8]), dim=1).flatten(0, 1))
    if not run.interrupted:
        print("{} held-out pictures: PSNR {:.1f} dB, SSIM {:.3f}".format(len(held_out), *psnr_and_ssim(ema, held_out)))
    return run.finish()


def measure_latents(vae, pictures):
    """Set the VAE's mean and std to those of each latent channel over the first 300 pictures (N, 3, S, S) uint8."""
    latents = encode(vae, to_signed(pictures[:300]))
    std, mean = torch.std_mean(latents, dim=(0, 2, 3))
    vae.mean.copy_(mean)
    vae.std.copy_(std)


def vae_stage(config):
    """The config of the VAE stage: the shared options, with --vae-minutes, --vae-steps, --vae-batch-size and --vae-lr
    as its own. If OUT-vae holds a checkpoint, its training is resumed, also without --resume."""
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(VAEConfig)}
    own = {name: getattr(config, f"vae_{name}") for name in ("minutes", "steps", "batch_size", "lr")}
    begun = Path(f"{config.out}-vae", "state.safetensors").exists()
    own |= dict(out=f"{config.out}-vae", epochs=None, grad_accum=1, resume="" if begun else config.resume)
    return VAEConfig(**shared | own)


def trained_vae(path, config, device):
    """(VAE, config with its sizes); path: a run or checkpoint of this program, or a published VAE."""
    file = common.find_weights(path, "serpentine_vae")
    own = file.suffix == ".safetensors" and file.is_file() and common.load_tensors(file, header_only=True)[1]
    if not (own and own.get("system") == "serpentine_vae"):
        vae = PublishedVAE(path, device).to(device)
        return vae, dataclasses.replace(config, channels=vae.channels)
    model, own = load_model(path, device)
    sizes = {name: getattr(own, name) for name in ("channels", "vae_width", "encoder_depth", "decoder")}
    return model.vae.requires_grad_(False), dataclasses.replace(config, **sizes)


def train(config):
    """Train the VAE, unless --vae names one, then the denoiser. Returns the exit code. Raises UserError."""
    device, precision = common.init_training(config)
    with torch.device("meta"):
        build_denoiser(config)  # reports sizes that do not fit before the VAE is trained
    begun = Path(config.out, "state.safetensors").exists()  # a denoiser's checkpoint contains its VAE
    if not config.vae and not begun:
        if code := train_vae(vae_stage(config)):
            return code
        config = dataclasses.replace(config, resume=None)  # the denoiser's run is new
    vae, config = trained_vae(config.out if begun else config.vae or f"{config.out}-vae", config, device)
    run = Run(config, "serpentine_vae", may_change={"vae", "vae_minutes", "vae_steps"}, enough=50_000)
    pictures, _, loaded = load_data(config)
    if isinstance(vae, PublishedVAE) and not begun:
        measure_latents(vae, pictures)
    latents = encode_all(vae, pictures)
    mirrored = encode_all(vae, pictures.flip(-1)) if config.flip else latents  # not the same as latents.flip(-1)
    alpha_bars = noise_schedule(config.num_timesteps)
    torch.manual_seed(config.seed)
    model = build_denoiser(config)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    trained = common.parallelize(config, model, ema, device, blocks)
    optimizer, scaler = common.make_optimizer(config, model, device)
    largest = max(latents.abs().max(), mirrored.abs().max()).item()
    run.header = {"checksum": loaded.checksum(), "range": largest, "published": getattr(vae, "hash", None)}
    whole = LatentDiffusion(vae, ema, largest)
    about = f"denoiser on the latents of {len(latents):,} pictures, {precision} on {device}"
    run.start(model, whole, optimizer, scaler, about, len(latents), loaded.skipped)
    compile_blocks(config, device, model)
    for step in run.steps():
        lr = config.lr * common.lr_factor(run.progress, step, config.warmup, config.decay)
        common.set_lr(optimizer, lr)
        for rows in micro_batches(config):
            rng = BatchRng(config.batch_size, config.seed, step, 1, rows=rows)
            index = common.batch_index(config, len(latents), step)[rows]
            latent = torch.where(rng.rand(1, 1, 1) < config.flip, mirrored[index], latents[index])  # 1. clean latents
            t, noise = 1 + (rng.rand() * config.num_timesteps).long(), rng.randn(*latent.shape[1:])  # 2. time and noise
            known = random_known(rng, *latent.shape[2:], config.known_prob)  # (B, 1, h, w)
            x_t = torch.where(known, latent, add_noise(latent, noise, alpha_bars[t]))  # 3. the noisy latents
            with autocast(device, precision):
                output = trained(x_t.to(device), t.to(device).float(), known.to(device))  # 4. predict noise or v
            # 5. (B,) loss (Ho et al. 2020, eq. 14): the mean over the positions that hold noise
            target = noise if config.predict == "eps" else common.ddpm_v(latent, noise, alpha_bars[t].view(-1, 1, 1, 1))
            error, noisy = (output - target.to(device)).square().mean(dim=1), ~known[:, 0].to(device)
            loss = (error * noisy).sum(dim=(1, 2)) / noisy.sum(dim=(1, 2)).clamp(min=1)
            scaler.scale(loss.mean() / config.grad_accum).backward()  # 6. gradients
            run.add(loss, t / config.num_timesteps)
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        common.update_ema(ema, model, step, config.ema)
        run.log(grad_norm, lr)
        if run.checkpoint_due:
            run.save(model, whole, optimizer, scaler)
        if run.pictures_due:
            run.save_pictures(sample(whole, config, num=25, steps=min(50, config.num_timesteps), precision=precision))
    return run.finish()


# ----------------------------------------------------------------------------------------------------------------
# Subcommands


def sample_command(options):
    """Write samples as a grid, and with --each and --gif as single pictures and an animation."""
    model, config = load_model(options.weights, common.pick_device(options.device))
    frames, callback = common.record_frames(lambda z: make_grid(decode(model.vae, z[:16])), options.gif)
    rgb = sample(model, config, callback, **vars(options))
    common.write_samples(rgb, [f"{options.seed + i:06d}" for i in range(options.num)], options, frames)


def read_image(path, mode="RGB"):
    """A picture file as (1, C, H, W) uint8; C is 3, or 1 in mode "L". Raises UserError."""
    with common.reading(path, "picture"):
        pixels = np.array(common.open_picture(path).convert(mode))
    return common.picture_tensor([np.atleast_3d(pixels)])


def inpaint_command(options):
    """Write the results, and beside them NAME-sheet.png: original, what is kept in white, and results."""
    if not options.image or not options.mask:
        raise UserError("name a picture with --image and a mask with --mask; white in the mask is kept")
    x, mask = to_signed(read_image(options.image)), read_image(options.mask, "L")[0, 0]
    if mask.shape != x.shape[2:]:
        sizes = "the mask is {1} x {0} pixels, the picture {3} x {2}".format(*mask.shape, *x.shape[2:])
        raise UserError(f"{sizes}; resize the mask")
    keep = ((mask >= 128) != options.invert).float()
    model, config = load_model(options.weights, common.pick_device(options.device))
    frames, callback = common.record_frames(lambda z: make_grid(decode(model.vae, z[:16], mask.shape)), options.gif)
    _, rgb = inpaint(model, config, x, keep, callback, **vars(options))
    common.write_samples(rgb, [f"{options.seed + i:06d}" for i in range(options.num)], options, frames)
    sheet, out = torch.cat((x / 2 + 0.5, keep.expand(1, 3, -1, -1), rgb)), Path(options.out)
    common.save_picture(make_grid(sheet, len(sheet)), out.with_name(f"{out.stem}-sheet.png"))


@dataclasses.dataclass
class ReconstructConfig(common.LoadConfig):
    image: str = option("", "one picture of any size (default: scikit-image's photograph `astronaut`)")
    data: tuple[str, ...] = option((), "as in train; of the data trained on, only what was held out")
    num: int = option(16, "pictures of --data that are shown; all of them are measured", low=1)
    out: str = option("samples/reconstructed.png", "each original and its reconstruction", picture=True)


def unseen_pictures(data, config):
    """Pictures (N, 3, S, S) uint8 that weights with this config were not trained on: the held-out part if `data` is
    what the config names, or drawn; else all of them. (Names are compared, not files.)"""
    _, held_out, loaded = load_data(dataclasses.replace(config, data=data))
    common.tell_skipped(loaded.skipped)
    return held_out if data in (config.data, ("drawn",)) else loaded.pictures


def reconstruct(vae, pictures):
    """(originals, reconstructions) of pictures (N, 3, H, W) uint8 of any size, both RGB in [0, 1]."""
    x = to_signed(pictures)
    return x / 2 + 0.5, decode(vae, encode(vae, x), x.shape[2:])


def psnr_and_ssim(vae, pictures):
    """Means of PSNR in dB, -10 log10(mean squared error), and of SSIM (Wang et al. 2004) over the reconstructions of
    pictures (N, 3, H, W) uint8."""
    from skimage import metrics

    parts = common.progress(pictures.split(32), "measuring")
    pairs = [(a.numpy(), b.numpy()) for part in parts for a, b in zip(*reconstruct(vae, part))]
    psnr = [metrics.peak_signal_noise_ratio(a, b, data_range=1) for a, b in pairs]
    ssim = [metrics.structural_similarity(a, b, channel_axis=0, data_range=1) for a, b in pairs]
    return float(np.mean(psnr)), float(np.mean(ssim))


def reconstruct_command(options):
    """Print how close reconstructions come to their originals, and show them side by side."""
    model, config = load_model(options.weights, common.pick_device(options.device))
    if options.data:
        pictures = unseen_pictures(options.data, config)
        what = f"{len(pictures)} unseen pictures"
    else:
        pictures = read_image(options.image) if options.image else photographs("astronaut")[0]
        what = options.image or "scikit-image's astronaut"
    print("{}: PSNR {:.1f} dB, SSIM {:.3f}".format(what, *psnr_and_ssim(model.vae, pictures)))
    shown = torch.stack(reconstruct(model.vae, pictures[: options.num]), dim=1).flatten(0, 1)
    common.save_picture(make_grid(shown, 2 * math.ceil(len(shown) ** 0.5 / 2)), options.out)  # even: pairs
    print(f"original and reconstruction, side by side, in {options.out}")


@dataclasses.dataclass
class LeakageConfig(common.LoadConfig):
    against: str = option("", "checkpoint of train-vae --decoder global, to compare with")
    num: int = option(64, "drawn faces whose latents are changed", low=1)
    out: str = option("samples/leakage.png", "picture of what one position changes", picture=True)


def new_faces(count, size):
    """(count, 3, size, size) in [-1, 1]: painted faces that --data drawn does not contain."""
    faces = [np.asarray(common.paint_face(1_000_000 + i, size)[0]) for i in range(count)]
    return to_signed(common.picture_tensor(faces))


@torch.no_grad()
def leakage(vae, x):
    """Decode the latents of pictures x (B, 3, H, W), then the same with the middle position changed by noise as large
    as each channel's standard deviation. Returns both, each (B, 3, H, W), the mean square change of each pixel (H, W),
    and the parts of it outside the position's tile and more than 8 pixels outside."""
    latent = encode(vae, x)
    row, column = latent.shape[2] // 2, latent.shape[3] // 2
    moved, std = latent.clone(), latent.std(dim=(0, 2, 3))
    moved[:, :, row, column] += std * torch.randn(latent.shape[:2], generator=generator(0)).to(std.device)
    before, after = vae.decode(latent).cpu(), vae.decode(moved).cpu()
    change = (after - before).square().mean(dim=(0, 1))
    parts, top, left = [], STRIDE * row, STRIDE * column
    for margin in (0, 8):
        outside = change.clone()
        outside[top - margin : top + STRIDE + margin, left - margin : left + STRIDE + margin] = 0
        parts.append((outside.sum() / change.sum()).item())
    return before, after, change, *parts


def leakage_command(options):
    """Print and show how far a change of one latent position reaches into the picture, in one or two VAEs."""
    shown, size = [], None
    for weights in (options.weights, options.against) if options.against else (options.weights,):
        model, config = load_model(weights, common.pick_device(options.device))
        size = size or config.image_size
        before, after, change, outside, far = leakage(model.vae, new_faces(options.num, size))
        print(f"{config.decoder} decoder: {outside:.1%} of the change is outside the tile, {far:.2%} beyond 8 pixels")
        heat = -(change / change.max()).clamp(min=1e-6).log10() / 6  # black: the greatest; white: a millionth of that
        shown += [before[0] / 2 + 0.5, after[0] / 2 + 0.5, heat.expand(3, -1, -1)]
    common.save_picture(make_grid(F.interpolate(torch.stack(shown), scale_factor=3), 3), options.out)
    print(f"decoded, decoded with one position changed, and the mean change, a row for each VAE: {options.out}")


@dataclasses.dataclass
class SeamsConfig(common.LoadConfig):
    data: tuple[str, ...] = option(("drawn",), "as in train; of the data trained on, only what was held out")
    num: int = option(100, "pictures to inpaint", low=1)
    tries: int = option(1, "results of each picture: the best LPIPS counts, and the last border", low=1)
    clamp: str = option("auto", "as in inpaint, like the next four", choices=("auto", "clean", "noised", "mean"))
    solver: str = option("auto", "how a step is made", choices=("auto", "ddim", "ancestral"))
    steps: int | None = option(None, "steps from noise to picture", low=1)
    resample_steps: int | None = option(None, "how often each step is made", low=1)
    as_written: bool = option(False, "the write-up's own way")
    alexnet: str = option("", "for LPIPS: torchvision's AlexNet weights")
    lpips: str = option("", "for LPIPS: the heads for AlexNet, weights/v0.1/alex.pth of its package")


def seam(rgb, keep):
    """Mean absolute difference of rgb (B, 3, H, W) between the pixels on the two sides of the mask's border."""
    down = rgb.diff(dim=2).abs().mean(dim=1)[:, keep.diff(dim=0) != 0]
    across = rgb.diff(dim=3).abs().mean(dim=1)[:, keep.diff(dim=1) != 0]
    return torch.cat((down, across), dim=1).mean().item()


def seams_command(options):
    """For the write-up's two cases, print the difference across the border of what is new, relative to that at the same
    place of the originals, with and without --composite; and the LPIPS distance of the latter from the originals."""
    model, config = load_model(options.weights, common.pick_device(options.device))
    x = to_signed(unseen_pictures(options.data, config)[: options.num])
    size, edge = config.image_size, max(1, round(config.image_size / 5 / STRIDE)) * STRIDE
    face = torch.zeros(size, size)  # 1 in the middle three fifths, in whole tiles, where the pictures have their faces
    face[edge : size - edge, edge : size - edge] = 1
    lpips = common.Lpips.load(options.alexnet, options.lpips) if options.lpips else None
    settings = {name: getattr(options, name) for name in ("clamp", "solver", "steps", "resample_steps", "as_written")}
    print(f"difference across the border, {len(x)} unseen pictures; 1 is that of the originals at the same place")
    for case, keep in (("face made", 1 - face), ("background made", face)):
        start, usual, distances = time.perf_counter(), seam(x / 2 + 0.5, keep), []
        for i in range(options.tries):
            _, made = inpaint(model, config, x, keep, num=len(x), seed=i * len(x), **settings)
            composite = blend(x / 2 + 0.5, made, keep)
            ratios = seam(made, keep) / usual, seam(composite, keep) / usual
            if lpips:
                pairs = zip((x / 2 + 0.5).split(25), composite.split(25))
                distances.append(torch.cat([(lpips(a) - lpips(b)).square().sum(dim=1) for a, b in pairs]))
        line = "{}: {:.2f}, with --composite {:.2f}".format(case, *ratios)
        if lpips:
            line += f", LPIPS {torch.stack(distances).min(dim=0)[0].mean():.4f}"
        print(f"{line} ({time.perf_counter() - start:.0f} s)")


@dataclasses.dataclass
class ScheduleConfig(common.LoadConfig):
    out: str = option("samples/schedule.png", "where the picture goes", picture=True)


def schedule_command(options):
    """Show one face decoded from z_t at eight steps t, above the curves of sqrt(abar_t) and sqrt(1 - abar_t)."""
    model, config = load_model(options.weights, common.pick_device(options.device))
    latent = model.vae.normalise(encode(model.vae, new_faces(1, config.image_size)))
    alpha_bars, last = noise_schedule(config.num_timesteps), config.num_timesteps
    times = [round(last * part) for part in (0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1)]
    noise = torch.randn(latent.shape, generator=generator(0)).to(latent)
    noisy = model.vae.normalise(add_noise(latent, noise, alpha_bars[times]), inverse=True)
    parts = {"signal": alpha_bars.sqrt(), "noise": (1 - alpha_bars).sqrt()}
    # Without step 0, where the noise is 0: the y axis is logarithmic.
    curves = {name: list(enumerate(part.tolist()))[1:] for name, part in parts.items()}
    chart = common.chart("Factors of the clean latent and of the noise in z_t, by step t", curves)
    common.save_picture(common.stack_pictures([make_grid(decode(model.vae, noisy), 8), chart]), options.out)
    print(f"{options.out}: a picture at t = {', '.join(map(str, times))}")


def demo(options):
    """A page: paint on a picture what is to be made anew, or kept."""
    common.import_gradio()  # if it is missing, say so before the examples are sampled
    model, config = load_model(options.weights, common.pick_device(options.device))
    size = config.image_size, config.image_size

    def to_paint_on(rgb, *layers):
        shown = make_grid(rgb[None]).resize((480, 480), Image.Resampling.BICUBIC)
        return {"background": shown, "layers": layers, "composite": shown}

    def change(picture, what_is_painted, **settings):
        if picture["background"] is None:
            raise UserError("no picture; upload one, or choose an example")
        x = to_signed(common.picture_tensor([np.array(ImageOps.fit(picture["background"].convert("RGB"), size))]))
        layers = [np.array(ImageOps.fit(layer.getchannel("A"), size)) for layer in picture["layers"]]  # 0: transparent
        paint = np.maximum.reduce([np.zeros(size), *layers]) > 0
        keep = torch.from_numpy(paint == (what_is_painted == "is kept")).float()
        run = functools.partial(inpaint, model, config, x, keep, num=1, **settings)
        for i, (latent, _) in enumerate(common.stream(run)):
            yield blend(x / 2 + 0.5, decode(model.vae, latent), keep), f"step {i}"

    faces = torch.cat((sample(model, config, num=3, steps=20, seed=18), new_faces(3, size[0]) / 2 + 0.5))
    layer = Image.new("RGBA", (480, 480))
    ImageDraw.Draw(layer).ellipse((60, 40, 420, 220), "#e0262b")
    inputs = {"picture": to_paint_on(faces[0], layer), "what_is_painted": ["is made anew", "is kept"]}
    inputs |= {"steps": (1, 50, 12), "seed": (0, 999, 0)}
    about = "Paint with the mouse. The examples are three samples of these weights and three painted faces."
    tab = "Inpaint", ("result",), change, inputs, list(map(to_paint_on, faces))
    common.open_page(options, "Inpainting", about, tab)


# ----------------------------------------------------------------------------------------------------------------
# Command line

SUBCOMMANDS = {
    "train": (train, Config, PRESETS, "the VAE, then the denoiser (alone: --vae RUN), e.g. train --data DIR"),
    "train-vae": (train_vae, VAEConfig, VAE_PRESETS, "the VAE alone, e.g. train-vae --minutes 10"),
    "sample": (sample_command, SampleConfig, None, "sample pictures, e.g. sample --num 16 --gif faces.gif"),
    "inpaint": (inpaint_command, InpaintConfig, None, "make a part anew, WHITE is KEPT: inpaint --image A --mask B"),
    "reconstruct": (reconstruct_command, ReconstructConfig, None, "PSNR of the VAE, e.g. reconstruct --image FILE"),
    "leakage": (leakage_command, LeakageConfig, None, "how far a change of one latent position reaches"),
    "seams": (seams_command, SeamsConfig, None, "how visible the borders of inpainting are, and LPIPS"),
    "schedule": (schedule_command, ScheduleConfig, None, "the picture of the noise schedule"),
    "demo": (demo, common.DemoConfig, None, "a page in the browser: paint on a picture what is made anew"),
    "export": common.export("serpentine_vae"),
}


def main(argv=None):
    """The command line: the words after the file's name, or sys.argv's; returns the exit code."""
    return common.run_command_line("serpentine_vae", __doc__, SUBCOMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
