"""Flow matching against DDPM: one ADM U-Net, the same pictures, noise and number of steps, two objectives.

This is the system of the write-up "Toy-Diffusion", from data to comparison. Flow matching: t = 0 is NOISE and t = 1 is
DATA, as in the write-up's code. DDPM: timestep 0 is nearly DATA and timestep 999 nearly NOISE. The network is given
999 t of the one and the timestep of the other: the same range, in opposite directions.

    python unet_ddpm.py sample --num 16 --steps 20            from the run in runs/, else the weights in weights/
    python unet_ddpm.py train                                 flow matching, ten minutes on two CPU cores, painted faces
    python unet_ddpm.py train --objective ddpm --out runs/ddpm              DDPM: the same network, data and noise
    python unet_ddpm.py compare --minutes 10                  flow matching, DDPM and DDPM with v-prediction, measured
    python unet_ddpm.py train --stage exclude --exclude-tags "red hair" --out runs/base     never sees red hair, ...
    python unet_ddpm.py train --stage finetune --from runs/base --out runs/fine             ... and learns it afterwards
    python unet_ddpm.py train --preset paper --data DIR --vae FLUX.2-VAE    the write-up's 281M parameters

A fresh network returns 0, so the loss starts at the mean square of its target: 1.37 for flow matching on painted faces,
1 for DDPM, 0.54 for v-prediction. After 250, 500 and 2,000 steps flow matching's loss is near 0.31, 0.22 and 0.17 and
DDPM's near 0.08, 0.05 and 0.04 (losses of different targets do not compare). 2,000 steps take about eight minutes on
two cores with AVX512-BF16. Samples are faces in tatters after one minute, faces after three, with clean lines from five
on.

| in the write-up         | here     | shape        | equation                                               |
|-------------------------|----------|--------------|--------------------------------------------------------|
| data                    | x        | (B, C, H, W) | latents of the VAE, or pixels after pixel_unshuffle    |
| noise                   | noise    | (B, C, H, W) | N(0, I)                                                |
| t of flow matching      | u        | (B,)         | uniform in [0, 1)                                      |
| x_t of flow matching    | x_t      | (B, C, H, W) | (1 - t) noise + t data                                 |
| velocity                | velocity | (B, C, H, W) | data - noise                                           |
| t of DDPM               | t        | (B,)         | floor(1000 u)                                          |
| x_t of DDPM             | x_t      | (B, C, H, W) | sqrt(alpha_bar_t) data + sqrt(1 - alpha_bar_t) noise   |
| eps                     | eps      | (B, C, H, W) | the noise in x_t                                       |
| v (not in the write-up) | target   | (B, C, H, W) | sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) data   |

| part of the write-up               | where                                                                |
|------------------------------------|----------------------------------------------------------------------|
| Flow Matching; DDPM                | flow_loss, flow_sample; ddpm_loss, ddpm_sample                       |
| Model: 281M-parameter U-Net, AdamW | UNetModel; PRESETS["paper"]                                          |
| Latent space: FLUX.2's VAE         | encode, Data; common.AutoencoderKL                                   |
| standard, fine, stage2             | train --stage standard, exclude, finetune; names_left_out            |
| Key findings: FID and adaptation   | Distances, evaluate; compare                                         |
| Usage                              | load_model                                                           |

Shape letters: B pictures, C channels, H W height and width, N = H W positions, D width, h heads.
"""

import collections
import copy
import csv
import dataclasses
import difflib
import functools
import importlib.util
import io
import itertools
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.checkpoint import checkpoint

import common
from common import BatchRng, UserError, autocast, generator, load_into, load_tensors, option, zero_init

# ----------------------------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass
class Config(common.TrainConfig):
    """The options of `train`. PRESETS holds what each preset changes."""

    # Data
    image_size: int = option(40, "side of the pictures in pixels", low=8)
    vae: str = option("", "autoencoder whose latents are learned: FLUX.2's, TAEF2 or SD's (default: none, pixels)")
    fold: int = option(2, "without a VAE: pixel_unshuffle factor, squares of fold x fold pixels become channels", low=1)
    flip: float = option(0.0, "part of the pictures that are mirrored", low=0.0, high=1.0)
    # Stage
    stage: str = option(
        "standard",
        "standard: all pictures; exclude: those with none of --exclude-tags; finetune: those --from left out",
        choices=("standard", "exclude", "finetune"),
    )
    exclude_tags: tuple[str, ...] = option((), "tags whose pictures are left out")
    start: str = option("", "run of stage exclude to fine-tune; sets the model and the objective", flag="--from")
    # Objective
    objective: str = option("flow", "flow matching or DDPM", choices=("flow", "ddpm"))
    predict: str = option("eps", "what a DDPM network predicts: the noise, or Salimans & Ho's v", choices=("eps", "v"))
    betas: str = option("linear", "noise of DDPM's steps: Ho et al.'s or SD's", choices=("linear", "scaled-linear"))
    # Model
    model_channels: int = option(64, "width at the highest resolution", low=16)
    channel_mult: tuple[int, ...] = option((1, 2), "width at each resolution, as a multiple of --model-channels", low=1)
    num_res_blocks: int = option(1, "residual blocks at each resolution", low=1)
    attention_resolutions: tuple[int, ...] = option((10,), "sides of the maps that have attention", low=1)
    num_head_channels: int = option(64, "width of an attention head", low=1)
    group_channels: int = option(0, "channels per group of GroupNorm at widths below 256; 0: 32 groups always", low=0)
    dropout: float = option(0.0, "dropout within residual blocks", low=0.0, high=0.99)
    checkpointing: bool = option(False, "compute activations twice instead of keeping them: less memory, more time")
    optimizer: str = option(
        "adamw",
        "adamw8bit is torchao's; auto: it, on a GPU that has torchao",
        choices=("adamw", "adamw8bit", "auto"),
    )


PRESETS = {
    "demo": dict(minutes=10.0, lr=2e-3, group_channels=64),
    # The write-up names the model, the latents, AdamW at 2e-4 with 5 % of warm-up, and bfloat16. Batch, length, EMA
    # (0.999, the default), beta2 and weight decay are those of its author's later code, with 100 passes over 48,000
    # pictures. The constant learning rate is a choice made here.
    "paper": dict(
        vae="weights/flux2-vae.safetensors",
        image_size=256,
        steps=75_000,
        batch_size=64,
        lr=2e-4,
        warmup=0.05,
        decay="none",
        beta2=0.98,
        weight_decay=0.01,
        model_channels=256,
        channel_mult=(1, 1, 2, 4),
        num_res_blocks=2,
        attention_resolutions=(16, 8),
        optimizer="auto",
        checkpoint_every=1000,
    ),
}
# What a fine-tuned network takes over from its base.
MODEL_FIELDS = "model_channels channel_mult num_res_blocks attention_resolutions num_head_channels group_channels"
MODEL_FIELDS = MODEL_FIELDS.split()
BASE_FIELDS = ["image_size", "fold", "objective", "predict", "betas", *MODEL_FIELDS]

# ----------------------------------------------------------------------------------------------------------------
# Two losses. Each takes the same data x, the same noise and the same u in [0, 1), and returns the loss of each picture
# and its time, from 0 to 1, both (B,).

TIMESTEPS = 1000


@functools.cache
def alpha_bars(betas):
    """alpha_bar_t for t = 0 to 999: the part of the data's variance that is left. betas: linear (Ho et al. 2020,
    section 4), or scaled-linear as in Stable Diffusion."""
    if betas == "linear":
        return common.alphas_cumprod(common.linear_betas(TIMESTEPS))
    return common.alphas_cumprod(common.linear_betas(TIMESTEPS, 0.00085**0.5, 0.012**0.5).square())


def flow_loss(config, model, x, noise, u):
    """Flow matching (Lipman et al. 2022, eq. 23 with sigma_min = 0): the network learns the velocity of a straight line
    from noise at t = 0 to data at t = 1."""
    # x_t = (1 - t) noise + t data
    x_t = common.flow_point(noise, x, u)
    # dx_t/dt = data - noise
    velocity = x - noise
    return (model(x_t, (TIMESTEPS - 1) * u) - velocity).square().mean(dim=(1, 2, 3)), u


def ddpm_loss(config, model, x, noise, u):
    """DDPM: the network learns the noise in x_t (Ho et al. 2020, eq. 14), or v (Salimans & Ho 2022, appendix D)."""
    t = (TIMESTEPS * u).long()
    alpha_bar = alpha_bars(config.betas).to(x.device)[t].view(-1, 1, 1, 1)
    # x_t = sqrt(alpha_bar_t) data + sqrt(1 - alpha_bar_t) noise
    x_t = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
    # v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) data
    target = noise if config.predict == "eps" else alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x
    return (model(x_t, t.float()) - target).square().mean(dim=(1, 2, 3)), t / TIMESTEPS


LOSSES = {"flow": flow_loss, "ddpm": ddpm_loss}

# ----------------------------------------------------------------------------------------------------------------
# Two samplers. network(x, t) is the model at one timestep for the whole batch.


def flow_sample(network, x, steps, solver="euler", callback=None):
    """Integrate dx/dt = velocity from noise x at t = 0 to data at t = 1. callback(x, t) sees every state."""
    times = [i / steps for i in range(steps + 1)]
    return common.SOLVERS[solver](lambda x, t: network(x, (TIMESTEPS - 1) * t), x, times, callback)


def timesteps(steps):
    """`steps` of the 1,000 timesteps, falling, evenly spaced, the first of them 999, where x_t is nearly pure noise
    (Lin et al. 2023, section 3.3)."""
    return [round(TIMESTEPS * (steps - i) / steps) - 1 for i in range(steps)]


def ddpm_sample(config, network, x, steps, noise_fn, solver="ddim", eta=0.0, limit=None, callback=None):
    """From noise x at timestep 999 to data, by ddim steps (Song et al. 2020, eq. 12) or ancestral ones (Ho et al. 2020,
    algorithm 2). noise_fn() -> new noise like x; callback(x, part) sees every state, part from 0 (noise) to 1 (data).

    limit: the largest absolute value in the training data, to which the predicted data are clipped. At timestep 999,
    x = 0.006 data + noise, so an error of the predicted noise becomes one 157 times as large in the data.
    """
    table = torch.cat((alpha_bars(config.betas), torch.ones(1)))  # entry -1 is that of the data
    for t, t_next in itertools.pairwise([*timesteps(steps), -1]):
        if callback:
            callback(x, 1 - (t + 1) / TIMESTEPS)
        alpha_bar, alpha_bar_next = table[t], table[t_next]
        eps = network(x, t)
        if config.predict == "v":  # eps = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x
            eps = alpha_bar.sqrt() * eps + (1 - alpha_bar).sqrt() * x
        if limit is not None:
            eps = common.clip_x0(x, eps, alpha_bar, limit)
        noise = noise_fn() if t_next >= 0 and (solver == "ancestral" or eta) else 0
        if solver == "ancestral":
            x = common.ddpm_step(x, eps, alpha_bar, alpha_bar_next, noise)
        else:
            x = common.ddim_step(x, eps, alpha_bar, alpha_bar_next, eta, noise)
    if callback:
        callback(x, 1.0)
    return x


def to_rgb(config, x, vae=None):
    """Maps as the network sees them -> RGB (B, 3, H, W) in [0, 1]."""
    decode = vae.decode if vae else functools.partial(F.pixel_shuffle, upscale_factor=config.fold)
    return torch.cat([decode(part) / 2 + 0.5 for part in x.split(16)]).clamp(0, 1)


@torch.no_grad()
def sample(
    model, config, num=16, steps=50, seed=0, solver="", eta=0.0, clip=True, vae=None, batch_size=64,
    precision="auto", callback=None,
):  # fmt: skip
    """Pictures from noise: RGB (num, 3, H, W) in [0, 1]; latents where the model works on latents and no vae is given.

    Picture i depends on seed + i only. solver: euler, heun or dpm for flow matching, ddim or ancestral for DDPM
    (default: the first). eta, clip: DDPM's, see ddpm_sample. callback(x, part) sees the first batch's states, part from
    0 (noise) to 1 (data). Raises UserError for a solver of the other objective.
    """
    solvers = tuple(common.SOLVERS) if config.objective == "flow" else ("ddim", "ancestral")
    solver = solver or solvers[0]
    if solver not in solvers:
        raise UserError(
            f"--solver {solver} is not for weights that learned {config.objective}; use {' or '.join(solvers)}"
        )
    device = next(model.parameters()).device
    channels, size = model.header["latent"]
    limit, results = model.header.get("range") if clip else None, []

    def network(x, t):
        return model(x, torch.full((len(x),), float(t), device=device))

    for first in range(seed, seed + num, batch_size):
        seeds = range(first, min(first + batch_size, seed + num))
        x = common.noise_for(seeds, (channels, size, size), device)
        rngs, watch = [generator(s, 1) for s in seeds], callback if first == seed else None

        def noise_fn(rngs=rngs):
            return torch.stack([torch.randn(channels, size, size, generator=rng) for rng in rngs]).to(device)

        with autocast(device, common.pick_precision(precision, device)):
            if config.objective == "flow":
                x = flow_sample(network, x, steps, solver, watch)
            else:
                x = ddpm_sample(config, network, x, steps, noise_fn, solver, eta, limit, watch)
            in_latents = vae is None and model.header["vae"] is not None
            results.append(x if in_latents else to_rgb(config, x, vae))
    return torch.cat(results)


# ----------------------------------------------------------------------------------------------------------------
# Model: the ADM U-Net (Dhariwal & Nichol 2021, section 3) with the parameter names of guided-diffusion


def group_norm(width, group_channels=0):
    """GroupNorm with 32 groups, as in guided-diffusion, or below width 256 with groups of at least group_channels.

    At t = 999 a DDPM network sees 1/157 data + noise, so it must predict the mean of each channel of the noise to
    better than 1 part in 157, or the predicted data have wrong colours. GroupNorm subtracts the mean of a group: with
    two channels per group, which 32 groups are at width 64, little of each channel's own mean is left.
    """
    groups = max(1, width // group_channels) if group_channels and width < 256 else 32
    return nn.GroupNorm(groups, width)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))). The time scales and shifts the second norm's output (adaptive group
    norm, Dhariwal & Nichol 2021, eq. 3) or, without scale_shift, is added before it.

    norm: function width -> module; resample: None, or a module that changes the size of a map, for both branches.
    """

    def __init__(self, width_in, width, embed_dim, dropout, scale_shift, norm, resample=None):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(norm(width_in), nn.SiLU(), nn.Conv2d(width_in, width, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, 2 * width if scale_shift else width))
        last = zero_init(nn.Conv2d(width, width, 3, padding=1))
        self.out_layers = nn.Sequential(norm(width), nn.SiLU(), nn.Dropout(dropout), last)
        self.skip_connection = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x, emb):
        h = self.in_layers[:2](x)
        if self.resample:
            h, x = self.resample(h), self.resample(x)
        h = self.in_layers[2](h)
        emb = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + emb)
        return self.skip_connection(x) + self.out_layers[1:](h)


class AttentionBlock(nn.Module):
    """x + attention between all positions of the map."""

    def __init__(self, width, num_heads, norm):
        super().__init__()
        self.num_heads = num_heads
        self.norm = norm(width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = zero_init(nn.Conv1d(width, width, 1))

    def forward(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, N, D)
        qkv = F.linear(tokens, self.qkv.weight.squeeze(2), self.qkv.bias)
        # Each head's query, key and value are neighbours: the order of guided-diffusion's published weights.
        q, k, v = qkv.unflatten(2, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)  # (B, h, N, D/h) each
        mixed = common.attention(q, k, v).transpose(1, 2).flatten(2)  # (B, N, D)
        mixed = F.linear(mixed, self.proj_out.weight.squeeze(2), self.proj_out.bias)
        return x + mixed.transpose(1, 2).unflatten(2, x.shape[2:])


def downsample(width, use_conv):
    """Half the size, where resblock_updown is off."""
    conv = nn.Conv2d(width, width, 3, stride=2, padding=1)
    return nn.Sequential(collections.OrderedDict(op=conv if use_conv else nn.AvgPool2d(2)))


def upsample(width, use_conv):
    """Twice the size, where resblock_updown is off."""
    conv = nn.Conv2d(width, width, 3, padding=1) if use_conv else nn.Identity()
    return nn.Sequential(collections.OrderedDict(enlarge=nn.Upsample(scale_factor=2), conv=conv))


class TimedSequential(nn.Sequential):
    """Layers in sequence; ResBlocks get the time."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNetModel(nn.Module):
    """ADM's U-Net with guided-diffusion's arguments. `UNetModel(in_channels=32, out_channels=32)` is the write-up's
    model of 281M parameters: what the write-up leaves open has the values of ADM's own recipes as its default.

    image_size             side of the training maps; only attention_resolutions depend on it
    attention_resolutions  sides of the maps with attention, as in guided-diffusion's command line and in the write-up
                           (guided-diffusion's class takes image_size divided by them)
    channel_mult           width at each resolution, highest first, as a multiple of model_channels
    num_head_channels      width of a head; -1: num_heads heads at every width
    group_channels         not guided-diffusion's: see group_norm

    model(x, timesteps, y=None) -> (B, out_channels, H, W). x (B, in_channels, H, W) with sides that can be halved
    len(channel_mult) - 1 times; timesteps (B,), 0 to 999, fractions allowed; y (B,) class numbers. Raises ValueError.
    """

    def __init__(
        self, image_size=32, in_channels=3, model_channels=256, out_channels=3, num_res_blocks=2,
        attention_resolutions=(16, 8), dropout=0.0, channel_mult=(1, 1, 2, 4), conv_resample=True, dims=2,
        num_classes=None, use_checkpoint=False, use_fp16=False, num_heads=1, num_head_channels=64,
        num_heads_upsample=-1, use_scale_shift_norm=True, resblock_updown=True, use_new_attention_order=False,
        group_channels=0,
    ):  # fmt: skip
        super().__init__()
        if (dims, use_fp16, num_heads_upsample, use_new_attention_order) != (2, False, -1, False):
            raise ValueError("dims, use_fp16, num_heads_upsample, use_new_attention_order: only 2, False, -1, False")
        self.model_channels, self.use_checkpoint = model_channels, use_checkpoint
        embed_dim = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim)
        )
        self.label_emb = nn.Embedding(num_classes, embed_dim) if num_classes else None
        norm = functools.partial(group_norm, group_channels=group_channels)

        def block(width_in, width, resample=None):
            return ResBlock(width_in, width, embed_dim, dropout, use_scale_shift_norm, norm, resample)

        def attend(width):
            heads = num_heads if num_head_channels == -1 else width // num_head_channels
            if not heads or width % heads or (num_head_channels != -1 and width % num_head_channels):
                raise ValueError(f"width {width} is no multiple of num_head_channels {num_head_channels}")
            return AttentionBlock(width, heads, norm)

        def attention_at(size, width):
            return [attend(width)] if size in attention_resolutions else []

        # Down: at each resolution num_res_blocks blocks, then half the size. The output of each is kept as a skip.
        widths = [int(model_channels * mult) for mult in channel_mult]
        width, size, skips = widths[0], image_size, [widths[0]]
        self.input_blocks = nn.ModuleList([TimedSequential(nn.Conv2d(in_channels, width, 3, padding=1))])
        for level, level_width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.input_blocks.append(TimedSequential(block(width, level_width), *attention_at(size, level_width)))
                width = level_width
                skips.append(width)
            if level < len(widths) - 1:
                shrink = block(width, width, nn.AvgPool2d(2)) if resblock_updown else downsample(width, conv_resample)
                self.input_blocks.append(TimedSequential(shrink))
                skips.append(width)
                size //= 2

        self.middle_block = TimedSequential(block(width, width), attend(width), block(width, width))

        # Up: the mirror image with one block more at each resolution. Each takes one skip, the last one first.
        self.output_blocks = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                layers = [block(width + skips.pop(), level_width), *attention_at(size, level_width)]
                width = level_width
                if level and i == num_res_blocks:
                    enlarge = nn.Upsample(scale_factor=2)
                    layers.append(block(width, width, enlarge) if resblock_updown else upsample(width, conv_resample))
                    size *= 2
                self.output_blocks.append(TimedSequential(*layers))
        self.out = nn.Sequential(norm(width), nn.SiLU(), zero_init(nn.Conv2d(width, out_channels, 3, padding=1)))

    @property
    def blocks(self):
        """The parts that are compiled, sharded and checkpointed one by one."""
        return [*self.input_blocks, self.middle_block, *self.output_blocks]

    def forward(self, x, timesteps, y=None):
        emb = self.time_embed(common.timestep_embedding(timesteps, self.model_channels))  # (B, 4 model_channels)
        if self.label_emb is not None:
            emb = emb + self.label_emb(y)

        def run(block, x):
            if self.use_checkpoint and torch.is_grad_enabled():
                return checkpoint(block, x, emb, use_reentrant=False)
            return block(x, emb)

        skips = []
        for block in self.input_blocks:
            x = run(block, x)
            skips.append(x)
        x = run(self.middle_block, x)
        for block in self.output_blocks:
            x = run(block, torch.cat((x, skips.pop()), dim=1))
        with torch.autocast(x.device.type, enabled=False):  # at t = 999 bfloat16's 3 digits are too few for the noise
            return self.out(x.float())


def build_model(config, channels, size):
    """A fresh UNetModel for maps (channels, size, size). Raises UserError where the sizes do not fit."""
    sides = [size // 2**level for level in range(len(config.channel_mult))]
    if size % 2 ** (len(sides) - 1):
        raise UserError(f"maps of side {size} cannot be halved {len(sides) - 1} times; change --image-size")
    if unknown := set(config.attention_resolutions) - set(sides):
        found = ", ".join(map(str, sides))
        raise UserError(f"--attention-resolutions {min(unknown)}: the maps' sides are {found}; name some of them")
    options = {name: getattr(config, name) for name in (*MODEL_FIELDS, "dropout")}
    try:
        return UNetModel(size, channels, out_channels=channels, use_checkpoint=config.checkpointing, **options)
    except ValueError as problem:
        hint = "make --model-channels a multiple of 32, --num-head-channels and --group-channels"
        raise UserError(f"{problem}; {hint}") from None


def load_model(path, device="cpu", objective="flow", predict="eps"):
    """(UNetModel in eval mode, Config) of a checkpoint. model.header is the checkpoint's header: "latent", (C, S), is
    the shape of the model's maps, "range" the largest absolute value in its training data, "vae" the autoencoder's hash
    or None. A file without a header, such as the write-up's model_ema.pt, is read as one of preset paper, and objective
    and predict tell what it learned. Raises UserError."""
    weights, header = load_tensors(path)
    if header is None:
        settings = PRESETS["paper"] | dict(objective=objective, predict=predict, vae="")
        header = {"system": "unet_ddpm", "latent": [32, 32], "vae": "", "config": settings}
    if header.get("system") != "unet_ddpm":
        raise UserError(f"{path} is no checkpoint of unet_ddpm.py; name another with --weights")
    config, device = common.config_from_header(Config, header, path), common.pick_device(device)
    config.device = device.type
    with torch.device("meta"):
        model = build_model(config, *header["latent"])
    load_into(model, weights, path)
    model.header = header
    # On a CPU, GroupNorm in bfloat16 takes half of the time of a sample in channels-last, and little otherwise.
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return model.to(device, memory_format=memory_format).eval(), config


def matching_vae(path, header, device):
    """The autoencoder at `path` for latents that header["vae"] describes, or None for pixels. Raises UserError."""
    return None if header["vae"] is None else common.load_matching_vae(path, header).to(device)


# ----------------------------------------------------------------------------------------------------------------
# Data: pictures, or a VAE's latents of them


@torch.no_grad()
def encode_pictures(config):
    """Pictures to shards of latents. After a kill the same call goes on with the first missing shard. Returns the
    shards' folder. Raises UserError."""
    if not (config.data and config.vae):
        raise UserError("encode needs --data and --vae")
    device, vae = common.pick_device(config.device), common.load_vae(config.vae)
    precision = common.pick_precision(config.precision, device)
    name = Path(config.data[0]).resolve().stem
    out = config.out or f"data/latents-{name}-{config.image_size}-{vae.hash[:8]}"
    vae.to(device)

    def to_latents(pictures, rows):
        with autocast(device, precision):
            return {"latents": vae.encode(pictures.to(device))}

    header = {"vae": vae.hash, "image_size": config.image_size}
    done, skipped = common.write_shards(dataclasses.replace(config, out=out), header, to_latents)
    common.tell_skipped(skipped)
    print(f"{done:,} latents in {out}")
    return out


def encode(config):
    """The subcommand `encode`."""
    encode_pictures(config)


def load_source(config):
    """What --data names: common.Pictures, or with a VAE common.Shards of its latents, encoded first where they are
    missing. Raises UserError."""
    folder = config.data[0]
    if not common.has_shards(config.data):
        if not config.vae:
            return common.load_pictures(config.data, config.image_size)
        if config.data == ("drawn",):
            raise UserError("--vae needs pictures that are large enough for latents; name them with --data")
        vae = common.load_vae(config.vae)
        with torch.device("meta"):  # sizes that do not fit are found before hours of encoding
            build_model(config, vae.latent_channels, config.image_size // vae.stride)
        same = {name: getattr(config, name) for name in ("data", "vae", "image_size", "device", "precision")}
        with common.main_process_first():
            folder = encode_pictures(common.EncodeConfig(**same))
    shards = common.Shards(folder, ("latents",))
    if shards.header["image_size"] != config.image_size:
        raise UserError(f"{folder} has latents of --image-size {shards.header['image_size']}; give the same")
    return shards


def base_header(config):
    """The header of the run of stage exclude that is fine-tuned. Raises UserError."""
    path = Path(config.start) / "model.safetensors"
    header = load_tensors(path, header_only=True)[1] or {}
    if header.get("system") != "unet_ddpm" or not header.get("left_out") or header["config"]["stage"] != "exclude":
        raise UserError(f"{path} is no run of stage exclude; name one with --from")
    return header


def names_left_out(config, source):
    """The names of the pictures that this stage does not train on. Raises UserError."""
    if config.stage == "exclude":
        tags, known = set(config.exclude_tags), set(itertools.chain(*source.tags))
        if unknown := tags - known:
            near = ", ".join(difflib.get_close_matches(min(unknown), known, 3, 0.4))
            raise UserError(f"no picture has the tag {min(unknown)!r}" + (f"; similar tags: {near}" if near else ""))
        return [name for name, own in zip(source.names, source.tags) if not tags.isdisjoint(own)]
    if config.stage == "finetune":
        base = base_header(config)
        if base["data"] != source.checksum():
            raise UserError(f"{config.start} was trained with other pictures; give the same --data")
        new = set(base["left_out"])
        return [name for name in source.names if name not in new]
    return []


class Data:
    """The pictures or latents of one stage. header: what a checkpoint must know of them. Raises UserError."""

    def __init__(self, config, source, left_out=()):
        unwanted = set(left_out)
        self.config, self.source = config, source
        self.chosen = [i for i, name in enumerate(source.names) if name not in unwanted]
        if not self.chosen:
            raise UserError("no pictures are left to train on; exclude fewer tags")
        if not isinstance(source, common.Shards) and config.image_size % config.fold:
            raise UserError(f"--fold {config.fold} does not divide --image-size {config.image_size}")
        some = self.read(self.chosen[:: max(1, len(self.chosen) // 256)])
        vae = source.header["vae"] if isinstance(source, common.Shards) else None
        self.header = {"vae": vae, "data": source.checksum(), "latent": [some.shape[1], some.shape[2]]}
        self.header |= {"range": some.abs().max().item(), "left_out": sorted(left_out)}

    def __len__(self):
        return len(self.chosen)

    def read(self, index, flip_rng=None):
        """Samples `index` of the source as the network sees them: latents, or pixels in [-1, 1] as
        (B, 3 fold fold, S/fold, S/fold). With flip_rng, a BatchRng, some are mirrored."""
        in_latents = isinstance(self.source, common.Shards)
        x = self.source.read(index)[0] if in_latents else self.source.pictures[index] / 127.5 - 1
        if flip_rng:
            x = common.random_flip(x, self.config.flip, flip_rng)
        return x if in_latents else F.pixel_unshuffle(x, self.config.fold)

    def batch(self, step, rows):
        """The rows of the batch of optimizer step `step`, a function of the seed and the step alone."""
        config = self.config
        index = [self.chosen[i] for i in common.batch_index(config, len(self), step)[rows]]
        return self.read(index, BatchRng(config.batch_size, config.seed, step, 3, rows=rows))


def load_data(config):
    """The Data of config's stage. Raises UserError."""
    source = load_source(config)
    return Data(config, source, names_left_out(config, source))


# ----------------------------------------------------------------------------------------------------------------
# Training


def settle(config, device):
    """config with what depends on the device or on the fine-tuned run, so that the run's record has it. Raises
    UserError."""
    if (config.stage == "exclude") != bool(config.exclude_tags) or (config.stage == "finetune") != bool(config.start):
        raise UserError(
            "--exclude-tags goes with --stage exclude, and --from with --stage finetune; give both or neither"
        )
    if config.optimizer == "auto":
        has_8bit = device.type == "cuda" and not config.fsdp and importlib.util.find_spec("torchao")
        config = dataclasses.replace(config, optimizer="adamw8bit" if has_8bit else "adamw")
    if config.stage == "finetune":
        base = common.config_from_header(Config, base_header(config), config.start)
        config = dataclasses.replace(config, **{name: getattr(base, name) for name in BASE_FIELDS})
    return config


def save_mark(run, ema):
    """Keep the averaged weights of this step, in half the bytes, for the curves of `compare`."""
    weights = {name: tensor.bfloat16() for name, tensor in ema.state_dict().items()}
    common.save_tensors(run.folder / "marks" / f"step_{run.step:06d}.safetensors", weights, run.settings())


def train(config):
    """The subcommand `train`: a run folder from nothing, or on with --resume. Raises UserError."""
    device, precision = common.init_training(config)
    config = settle(config, device)
    run = common.Run(config, "unet_ddpm")
    data = load_data(config)
    vae = matching_vae(config.vae, data.header, device)
    torch.manual_seed(config.seed)
    model = build_model(config, *data.header["latent"]).to(memory_format=torch.channels_last)
    if config.stage == "finetune":
        load_into(model, load_tensors(Path(config.start) / "model.safetensors")[0], config.start)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    trained = common.parallelize(config, model, ema, device, lambda net: net.blocks)
    optimizer, scaler = common.make_optimizer(config, model, device)
    run.header = ema.header = data.header
    about = f"{len(data):,} pictures, {len(data.header['left_out']):,} left out, {precision} on {device}"
    run.start(model, ema, optimizer, scaler, about, len(data), data.source.skipped)
    common.compile_blocks(config, device, model.blocks)
    if config.stage == "finetune" and run.step == 0:
        save_mark(run, ema)  # where the curve of adaptation begins
    for step in run.steps():
        lr = config.lr * common.lr_factor(run.progress, step, config.warmup, config.decay)
        common.set_lr(optimizer, lr)
        for rows in common.micro_batches(config):
            rng = BatchRng(config.batch_size, config.seed, step, 1, rows=rows)
            x = data.batch(step, rows).to(device)  # 1. a batch, the same for both objectives
            u, noise = rng.rand().to(device), rng.randn(*x.shape[1:]).to(device)  # 2. time and noise, the same
            torch.manual_seed(generator(config.seed, step, rows.start, 2).initial_seed())  # for dropout
            with autocast(device, precision):
                loss, t = LOSSES[config.objective](config, trained, x, noise, u)  # 3. to 5. x_t, prediction, loss
            scaler.scale(loss.mean() / config.grad_accum).backward()  # 6. gradients
            run.add(loss, t)
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        common.update_ema(ema, model, step, config.ema)
        run.log(grad_norm, lr)
        if run.checkpoint_due:
            run.save(model, ema, optimizer, scaler)
        if run.pictures_due:
            save_mark(run, ema)
            run.save_pictures(sample(ema, config, num=25, steps=20, vae=vae, precision=precision))
    return run.finish()


# ----------------------------------------------------------------------------------------------------------------
# Distances from the training set. The write-up's FID is against the pictures that were trained on: it measures how well
# they were learned, not how general the result is.


def blur(x):
    """The binomial 5 x 5 filter of Laplacian pyramids (Burt & Adelson 1983), mirrored at the borders."""
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = (line[:, None] * line).expand(x.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=x.shape[1])


def laplacian_pyramid(x, smallest=16):
    """(B, C, S, S) -> what each resolution adds to the next lower one, finest first, then the lowest itself: the first
    that is not larger than `smallest` or cannot be halved."""
    levels = []
    while x.shape[-1] > smallest and x.shape[-1] % 2 == 0:
        half = blur(x)[..., ::2, ::2]
        back = torch.zeros_like(x)
        back[..., ::2, ::2] = 4 * half
        levels.append(x - blur(back))
        x = half
    return [*levels, x]


def random_patches(level, rng, count=128, side=7):
    """`count` random 7 x 7 patches of each picture of a level (B, 3, S, S) -> (B count, 147), each channel normalised
    to mean 0 and deviation 1 over the whole set."""
    batch, _, size, _ = level.shape
    top, left = (torch.randint(size - side + 1, (batch, count), generator=rng) for _ in range(2))
    patches = level.unfold(2, side, 1).unfold(3, side, 1)  # (B, 3, S - 6, S - 6, 7, 7), a view
    patches = patches[torch.arange(batch)[:, None], :, top, left].flatten(0, 1)  # (B count, 3, 7, 7)
    std, mean = torch.std_mean(patches, dim=(0, 2, 3), keepdim=True)
    return ((patches - mean) / std.clamp(min=1e-6)).flatten(1)


def sliced_wasserstein(real, made, directions=128):
    """Sliced Wasserstein distance x 1000 of random patches of two sets of equally many pictures (n, 3, S, S) in [0, 1]:
    one number for each level of the Laplacian pyramid, finest first (Karras et al. 2018, section 5)."""
    levels = []
    for a, b in zip(laplacian_pyramid(real), laplacian_pyramid(made), strict=True):
        a, b = random_patches(a, generator(0)), random_patches(b, generator(0))
        axes = F.normalize(torch.randn(a.shape[1], directions, generator=generator(1)), dim=0)
        parts = [((a @ part).sort(dim=0)[0] - (b @ part).sort(dim=0)[0]).abs().mean() for part in axes.split(32, dim=1)]
        levels.append(1000 * torch.stack(parts).mean().item())
    return levels


def frechet(a, b):
    """Fréchet distance of two sets of features (n, d), taken for Gaussians: |mean - mean|^2 + tr(A + B - 2 sqrt(AB))
    (Heusel et al. 2017, eq. 6)."""
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # sqrt(A); AB and sqrt(A) B sqrt(A) share eigenvalues
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def load_inception(path):
    """The TorchScript network of FID. Raises UserError if the file is none."""
    with common.reading(path, "Inception network in TorchScript, such as inception-2015-12-05.pt"):
        network = torch.jit.load(path, map_location="cpu").eval()
        if network(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), return_features=True).dim() != 2:
            raise ValueError("it returns no table of features")
        return network


def inception_features(network, rgb):
    """(n, 3, S, S) in [0, 1] -> (n, 2048)."""
    return network.to(rgb.device)((rgb * 255).round().byte(), return_features=True).cpu()


def alexnet_features(lpips, rgb):
    """(n, 3, S, S) in [0, 1] -> (n, 1152): the means over positions of AlexNet's five layers, as LPIPS normalises
    them."""
    return torch.cat([layer.mean(dim=(2, 3)) for layer in lpips.to(rgb.device).layers(rgb)], dim=1).cpu()


TITLES = {
    "swd": "Sliced Wasserstein distance on Laplacian pyramids x 1000",
    "finest": "Its finest level alone, which shows sharpness",
    "alexnet": "Fréchet distance in AlexNet features x 1000",
    "inception": "Inception FID",
}
CSV_COLUMNS = {
    "swd": "distance",
    "finest": "finest_level",
    "alexnet": "frechet_alexnet",
    "inception": "frechet_inception",
}


class Distances:
    """distances(rgb (n, 3, S, S) in [0, 1]) -> {name in TITLES: distance from n training pictures}. floor: the same of
    n other training pictures.

    Fréchet distances are measured where config names the networks' files. With fewer pictures than features their
    covariance is singular, which the formula allows; compare such numbers only at equal n. With a VAE, the training
    pictures too have been decoded from latents. Raises UserError for too few pictures.
    """

    def __init__(self, config, data, vae, device):
        self.networks = {}
        if config.alexnet or config.lpips:
            lpips = common.Lpips.load(config.alexnet, config.lpips)
            self.networks["alexnet"] = functools.partial(alexnet_features, lpips), 1000
        if config.inception:
            self.networks["inception"] = functools.partial(inception_features, load_inception(config.inception)), 1
        order = torch.randperm(len(data), generator=generator(0, 9)).tolist()
        self.num = min(config.num, len(order) // 2)
        if self.num < 2:
            raise UserError(f"{len(order)} pictures are too few for a distance; it needs at least four")

        def real(numbers):
            return to_rgb(data.config, data.read([data.chosen[i] for i in numbers]).to(device), vae)

        self.real = self.features(real(order[: self.num]))
        self.floor = self(real(order[self.num : 2 * self.num]))

    @torch.no_grad()
    def features(self, rgb):
        features = {"swd": rgb.float().cpu()}
        for name, (network, _) in self.networks.items():
            features[name] = torch.cat([network(part) for part in rgb.float().split(32)])
        return features

    def __call__(self, rgb):
        made = self.features(rgb[: self.num])
        levels = sliced_wasserstein(self.real["swd"], made["swd"])
        results = {"swd": sum(levels) / len(levels), "finest": levels[0]}
        for name, (_, factor) in self.networks.items():
            results[name] = factor * frechet(self.real[name], made[name])
        return results


# ----------------------------------------------------------------------------------------------------------------
# Subcommands


@dataclasses.dataclass
class SolverConfig:
    """The options of `sample` and `evaluate` that are this system's own."""

    vae: str = option("", "autoencoder that the weights were trained with")
    solver: str = option(
        "",
        "euler, heun or dpm for flow matching, ddim or ancestral for DDPM (default: the first)",
        choices=("", *common.SOLVERS, "ddim", "ancestral"),
    )
    eta: float = option(0.0, "ddim: new noise in its steps, 0 none, 1 as much as ancestral", low=0.0, high=1.0)
    clip: bool = option(True, "DDPM: clip the predicted data to the training data's range")
    objective: str = option("flow", "what weights without a header learned, such as the write-up's", ("flow", "ddpm"))
    predict: str = option("eps", "what such DDPM weights predict", choices=("eps", "v"))

    def load(self):
        """(model, Config, VAE or None) of --weights. Raises UserError."""
        path = common.find_weights(self.weights, "unet_ddpm")
        model, config = load_model(path, self.device, self.objective, self.predict)
        config.vae = self.vae or config.vae
        return model, config, matching_vae(config.vae, model.header, next(model.parameters()).device)


@dataclasses.dataclass
class SampleConfig(SolverConfig, common.SampleConfig):
    """The options of `sample`."""

    steps: int = option(50, "steps from noise to picture", low=1, high=TIMESTEPS)


def sample_command(config):
    """The subcommand `sample`: a grid, and with --each and --gif single pictures and the way from noise."""
    model, trained, vae = config.load()
    frames, callback = common.record_frames(lambda x: common.make_grid(to_rgb(trained, x[:16], vae)), config.gif)
    same = {name: getattr(config, name) for name in "num steps seed solver eta clip batch_size precision".split()}
    rgb = sample(model, trained, vae=vae, callback=callback, **same)
    common.write_samples(rgb, [f"{config.seed + i:06d}" for i in range(config.num)], config, frames)


@dataclasses.dataclass
class DistanceConfig:
    """The networks that distances are measured with."""

    inception: str = option("", "Inception's TorchScript file, for FID; TorchScript can run any code: trust its source")
    alexnet: str = option("", "torchvision's AlexNet weights, for the Fréchet distance in its features; with --lpips")
    lpips: str = option("", "LPIPS' linear heads for AlexNet, its package's weights/v0.1/alex.pth")


@dataclasses.dataclass
class EvaluateConfig(DistanceConfig, SolverConfig, common.LoadConfig):
    """The options of `evaluate`."""

    data: tuple[str, ...] = option((), "pictures to compare with (default: those that were trained on)")
    num: int = option(1000, "pictures on either side", low=2)
    steps: int = option(20, "steps from noise to picture", low=1, high=TIMESTEPS)
    seed: int = option(0, "sample i starts from the noise of seed + i", low=0, high=2**62)
    precision: str = option("auto", "of matrix products", choices=("auto", "fp32", "bf16", "fp16"))


def evaluate(config):
    """The subcommand `evaluate`: how far samples are from the pictures that were trained on."""
    model, trained, vae = config.load()
    device = next(model.parameters()).device
    trained.data = config.data or trained.data
    data = Data(trained, load_source(trained), model.header.get("left_out", ()))
    distances = Distances(config, data, vae, device)
    same = {name: getattr(config, name) for name in "steps seed solver eta clip precision".split()}
    for name, distance in distances(sample(model, trained, distances.num, vae=vae, **same)).items():
        about = f"{distances.num} pictures in {config.steps} steps"
        print(f"{TITLES[name]}, {about}: {distance:.1f} (floor {distances.floor[name]:.1f})")


# ----------------------------------------------------------------------------------------------------------------
# Comparison: three objectives side by side

OBJECTIVES = {
    "flow": dict(objective="flow", predict="eps"),
    "ddpm": dict(objective="ddpm", predict="eps"),
    "ddpm-v": dict(objective="ddpm", predict="v"),
}
SAMPLING_STEPS, TRAINING_STEPS = (5, 10, 20, 50), 20  # for the curves by sampling steps, and for all others


@dataclasses.dataclass
class CompareConfig(DistanceConfig, Config):
    """The options of `compare`: those of `train`, for each of the three runs, and what is measured."""

    out: str = option("runs/compare", "folder for the three runs, index.html, compare.png and compare.csv")
    runs: tuple[str, ...] = option((), "finished run folders to compare (default: three are trained here)")
    finetuned: tuple[str, ...] = option((), "run folders of stage finetune, for the curves of adaptation")
    num: int = option(256, "pictures on either side of each distance", low=2)


def train_three(config):
    """Train each of OBJECTIVES in its folder within --out -> (folders, exit code). What is there already goes on where
    it ended, so a finished run is left as it is. All make as many steps as flow matching, which has the budget."""
    settings, folders = {field.name: getattr(config, field.name) for field in dataclasses.fields(Config)}, []
    for name, objective in OBJECTIVES.items():
        folder = Path(config.out) / name
        has_weights, has_state = ((folder / f"{file}.safetensors").exists() for file in ("model", "state"))
        if has_state or not has_weights:
            if folders:
                flow = load_tensors(folders[0] / "model.safetensors", header_only=True)[1]
                settings |= dict(minutes=None, epochs=None, steps=flow["step"])
            if config.start:  # of a base that compare made, the run with the same objective
                settings |= dict(start=f"{config.start}/{name}")
            code = train(Config(**settings | objective | dict(out=str(folder), resume="" if has_state else None)))
            if code:
                return folders, code
        folders.append(folder)
    return folders, 0


class Trained:
    """A finished run folder: its samples at any mark, and its loss."""

    def __init__(self, folder, config):
        self.folder, self.precision = Path(folder), config.precision
        self.model, self.config = load_model(self.folder / "model.safetensors", config.device)
        self.config.vae = config.vae or self.config.vae
        self.device, self.header = next(self.model.parameters()).device, self.model.header
        self.vae = matching_vae(self.config.vae, self.header, self.device)
        learned = self.config.objective, self.config.predict
        self.name = "ddpm-v" if learned == ("ddpm", "v") else self.config.objective

    def distances(self, config):
        data = Data(self.config, load_source(self.config), self.header["left_out"])
        return Distances(config, data, self.vae, self.device)

    def sample(self, num, steps, path=None):
        """RGB (num, 3, S, S) of the final weights or those at `path`, from noise that is the same for all runs."""
        load_into(self.model, load_tensors(path or self.folder / "model.safetensors")[0], path)
        return sample(self.model, self.config, num, steps, vae=self.vae, precision=self.precision)

    def by_training(self, distances):
        """[(training step, distance)] of the weights that were kept at marked parts of the budget."""
        marks = sorted(self.folder.glob("marks/step_*.safetensors"))
        steps = [int(path.stem.removeprefix("step_")) for path in marks]
        return [(n, distances(self.sample(distances.num, TRAINING_STEPS, p))["swd"]) for n, p in zip(steps, marks)]

    def losses(self):
        rows = csv.DictReader((self.folder / "log.csv").read_text().splitlines())
        return [(int(row["step"]), float(row["loss"])) for row in rows if None not in row.values()]


def by_name(folders, config):
    """{name of the objective: Trained}; the folder is added to a name that comes twice. Raises UserError unless all
    were trained on the same pictures."""
    runs = {}
    for run in (Trained(folder, config) for folder in folders):
        runs[f"{run.name} {run.folder}" if run.name in runs else run.name] = run
        first = next(iter(runs.values()))
        if any(first.header[key] != run.header[key] for key in ("data", "latent", "left_out")):
            raise UserError(f"{first.folder} and {run.folder} were trained on different pictures; compare equals")
    return runs


def compare(config):
    """The subcommand `compare`: index.html, compare.png and compare.csv in --out, of three objectives that are trained
    here or of --runs. Returns the exit code. Raises UserError."""
    folders, code = (config.runs, 0) if config.runs else train_three(config)
    if code:
        return code
    runs, adapting = by_name(folders, config), by_name(config.finetuned, config)
    distances = next(iter(runs.values())).distances(config)
    measured, samples = {name: {} for name in runs}, []  # name -> sampling steps -> distances
    for steps in SAMPLING_STEPS:
        for name, run in runs.items():
            rgb = run.sample(distances.num, steps)
            measured[name][steps] = distances(rgb)
            samples.append((f"{name}\n{steps} steps", rgb[:8]))

    charts = []  # (title, name -> [(x, y)], floor)
    for key, floor in distances.floor.items():
        curves = {name: [(steps, values[key]) for steps, values in own.items()] for name, own in measured.items()}
        charts.append((f"{TITLES[key]}, by sampling steps", curves, floor))
    curves = {name: run.by_training(distances) for name, run in runs.items()}
    charts.append((f"{TITLES['swd']}, by training steps", curves, distances.floor["swd"]))
    charts.append(("Loss (the targets differ), by training steps", {k: run.losses() for k, run in runs.items()}, None))
    if adapting:
        near = next(iter(adapting.values())).distances(config)
        curves = {name: run.by_training(near) for name, run in adapting.items()}
        charts.append(("Distance from the left-out pictures, by fine-tuning steps", curves, near.floor["swd"]))

    keys = ["swd", "finest", *[key for key in TITLES if key in distances.networks]]
    rows = [["objective", "seed", "sampling_steps", *(CSV_COLUMNS[key] for key in keys), "floor"]]
    for name, own in measured.items():
        for steps, values in own.items():
            numbers = [f"{value:.2f}" for value in (*(values[key] for key in keys), distances.floor["swd"])]
            rows.append([name, runs[name].config.seed, steps, *numbers])
    csv.writer(table := io.StringIO(), lineterminator="\n").writerows(rows)
    common.save_text(Path(config.out) / "compare.csv", table.getvalue())
    write_page(Path(config.out), runs, samples, charts, distances.num)
    print(f"open {config.out}/index.html")
    return 0


def write_page(out, runs, samples, charts, num):
    """compare.png: samples, [(label, rgb)], one row each, on the left, and the charts on the right. index.html: the
    same, and the charts' numbers."""
    # Pillow's font has no é.
    side = common.stack_pictures([common.chart(title.replace("é", "e"), *rest) for title, *rest in charts])
    height, width = 84, 80 + 8 * 80
    sheet = Image.new("RGB", (width + 10 + side.width, max(height * len(samples), side.height)), "white")
    sheet.paste(side, (width + 10, 0))
    for i, (label, rgb) in enumerate(samples):
        sheet.paste(common.make_grid(rgb, 8).resize((8 * 80, 80), Image.Resampling.BOX), (80, height * i))
        ImageDraw.Draw(sheet).text((4, height * i + 20), label, "black", ImageFont.load_default(13))
    common.save_picture(sheet, out / "compare.png")

    body = common.html_table([[name, run.folder, f"{run.header['step']:,} steps"] for name, run in runs.items()])
    body += common.html_picture(sheet) + f"<p>Distances of {num} samples from as many training pictures; the floor is "
    body += f"that of other training pictures. Curves by training steps: {TRAINING_STEPS} sampling steps.</p>"
    for title, curves, floor in charts:
        xs = sorted({x for curve in curves.values() for x, _ in curve})
        rows = [["", *xs], *[[name, *(dict(curve).get(x, "") for x in xs)] for name, curve in curves.items()]]
        rows += [["floor", *[floor] * len(xs)]]
        rows = [[f"{cell:.1f}" if isinstance(cell, float) else cell for cell in row] for row in rows]
        if floor is not None:
            body += f"<h2>{title}</h2>{common.html_table(rows)}"
    common.save_page(out / "index.html", "Flow matching against DDPM", body)


# ----------------------------------------------------------------------------------------------------------------
# Command line

SUBCOMMANDS = {
    "train": (train, Config, PRESETS, "train, e.g. python unet_ddpm.py train --objective ddpm"),
    "sample": (sample_command, SampleConfig, None, "sample pictures, e.g. python unet_ddpm.py sample --steps 20"),
    "evaluate": (evaluate, EvaluateConfig, None, "distance of samples from the training set"),
    "compare": (compare, CompareConfig, PRESETS, "three objectives side by side, e.g. compare --minutes 10"),
    "encode": (encode, common.EncodeConfig, None, "a folder's latents, e.g. encode --data DIR --vae FILE --out SHARDS"),
    "export": common.export("unet_ddpm"),
}


def main(argv=None):
    """The command line: argv or, by default, the words after the file's name. Returns the exit code."""
    return common.run_command_line("unet_ddpm", __doc__, SUBCOMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
