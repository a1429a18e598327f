"""Flow matching against DDPM: one ADM U-Net, the same pictures, noise and number of steps, two objectives.

This is the system of the write-up "Toy-Diffusion", from data to comparison. Flow matching: t = 0 is NOISE and t = 1 is
DATA. DDPM: timestep 0 is nearly DATA and timestep 999 nearly NOISE. Both give the network a number from 0 to 999, flow
matching 999 t and DDPM the timestep, and the two run in opposite directions.

    python unet_ddpm.py sample --num 16 --steps 20            from the run in runs/, else the weights in weights/
    python unet_ddpm.py train                                 flow matching, ten minutes on two CPU cores, painted faces
    python unet_ddpm.py train --objective ddpm --out runs/ddpm              DDPM: the same network, data and noise
    python unet_ddpm.py compare --minutes 10                  flow matching, DDPM and DDPM with v-prediction, ten
                                                              minutes or as many steps each, then measured
    python unet_ddpm.py train --stage exclude --exclude-tags "red hair" --out runs/fine     never sees red hair, ...
    python unet_ddpm.py train --stage finetune --from runs/fine --out runs/stage2           ... and learns it afterwards
    python unet_ddpm.py train --preset paper --data DIR --vae FLUX.2-VAE    the write-up's 281M parameters

A fresh network returns 0, so the loss starts at the mean square of its target: 1.37 for flow matching on painted faces,
1 for DDPM, 0.54 for v-prediction. After 250, 500 and 2,000 steps flow matching's loss is near 0.31, 0.22 and 0.15 and
DDPM's near 0.08, 0.05 and 0.03 (losses of different targets cannot be compared). After 2,000 steps, in eight bins of
the time from 0 to 1, it is 0.15, 0.11, 0.09, 0.09, 0.09, 0.11, 0.15, 0.42 for flow matching and 0.18, 0.04, 0.02, 0.01,
0.005, 0.003, 0.002, 0.001 for DDPM, whose time runs the other way: in both, nearly clean pictures are the hardest.
2,000 steps take eight to twelve minutes on two cores with AVX512-BF16. Samples are fragments of faces after a tenth of
these steps, faces after a third, with clean lines from half on.

| in the write-up           | here          | shape        | equation                                               |
|---------------------------|---------------|--------------|--------------------------------------------------------|
| data                      | x             | (B, C, H, W) | latents of the VAE, or pixels after pixel_unshuffle    |
| noise                     | noise         | (B, C, H, W) | N(0, I)                                                |
| time of flow matching     | u, t          | (B,)         | uniform in [0, 1)                                      |
| x_t of flow matching      | x_t           | (B, C, H, W) | (1 - t) noise + t data                                 |
| velocity                  | target        | (B, C, H, W) | data - noise                                           |
| time of DDPM              | timestep      | (B,)         | floor(1000 u)                                          |
| x_t of DDPM               | x_t           | (B, C, H, W) | sqrt(alpha_bar_t) data + sqrt(1 - alpha_bar_t) noise   |
| eps                       | target, eps   | (B, C, H, W) | the noise in x_t                                       |
| v (not in the write-up)   | target        | (B, C, H, W) | sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) data   |

| part of the write-up               | where                                                                |
|------------------------------------|----------------------------------------------------------------------|
| Flow Matching; DDPM                | flow_pair, flow_sample; ddpm_pair, ddpm_sample                       |
| 281M-parameter U-Net; Usage        | UNetModel, PRESETS["paper"]; load_model                              |
| Latent space: FLUX.2's VAE         | encode, Data; common.AutoencoderKL                                   |
| standard, fine, stage2             | train --stage standard, exclude, finetune; names_left_out            |
| Key findings: FID and adaptation   | Distances, evaluate; compare                                         |

Shape letters: B pictures, C channels, H W height and width, N = H W positions, D width, h heads.
"""

import collections
import copy
import dataclasses
import difflib
import functools
import importlib.util
import itertools
import sys
from pathlib import Path

import common
from common import BatchRng, UserError, autocast, generator, load_into, load_tensors, option, zero_init

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------------------
# Configuration

STAGES = "standard", "exclude", "finetune"


@dataclasses.dataclass
class Config(common.TrainConfig):
    """The options of `train`. PRESETS holds what each preset changes."""

    # Data
    image_size: int = option(40, "side of the pictures in pixels", low=8)
    vae: str = option("", "autoencoder whose latents are learned: FLUX.2's, TAEF2 or SD's (default: none, pixels)")
    fold: int = option(2, "without a VAE: pixel_unshuffle factor, squares of fold x fold pixels become channels", low=1)
    flip: float = option(0.0, "probability that a picture is mirrored", low=0.0, high=1.0)
    # Stage
    stage: str = option("standard", "exclude: all but --exclude-tags; finetune: only what --from left out", STAGES)
    exclude_tags: tuple[str, ...] = option((), "tags whose pictures are left out")
    start: str = option("", "run of stage exclude to fine-tune; sets the model and the objective", flag="--from")
    # Objective
    objective: str = option("flow", "flow matching or DDPM", choices=("flow", "ddpm"))
    predict: str = option("eps", "what a DDPM network predicts: the noise, or Salimans & Ho's v", choices=("eps", "v"))
    # Model
    model_channels: int = option(64, "width at the highest resolution", low=16)
    channel_mult: tuple[int, ...] = option((1, 2), "width at each resolution, as a multiple of --model-channels", low=1)
    num_res_blocks: int = option(1, "residual blocks at each resolution", low=1, high=1000)
    attention_resolutions: tuple[int, ...] = option((10,), "sides of the maps that have attention", low=1)
    num_head_channels: int = option(64, "width of an attention head", low=1)
    group_channels: int = option(0, "channels per group of GroupNorm at widths below 256; 0: 32 groups always", low=0)
    dropout: float = option(0.0, "dropout within residual blocks", low=0.0, high=0.99)
    checkpointing: bool = option(False, "compute activations twice instead of keeping them: less memory, more time")
    use_scale_shift_norm: bool = option(True, "the time embedding scales and shifts the features; off: it is added")
    optimizer: str = option("adamw", "auto: adamw8bit on a GPU with torchao", ("adamw", "adamw8bit", "auto"))


DEMO = dict(minutes=10.0, lr=2e-3, group_channels=64)
# The write-up names most of the model, the latents, AdamW8bit at 2e-4 with 5 % of warm-up, and bfloat16. Batch, length
# (100 passes over 48,000 pictures), beta2, weight decay and EMA (0.999) are those of its author's later code. The
# constant learning rate is a choice made here.
PAPER = dict(steps=75_000, image_size=256, batch_size=64, lr=2e-4, decay="none", beta2=0.98, weight_decay=0.01)
PAPER |= dict(model_channels=256, channel_mult=(1, 1, 2, 4), num_res_blocks=2, attention_resolutions=(16, 8))
PAPER |= dict(vae="weights/flux2-vae.safetensors", optimizer="auto", checkpoint_every=1000)
PRESETS = {"demo": DEMO, "paper": PAPER}
# What build_model() passes to UNetModel, and what a fine-tuned run takes over from the one of --from
MODEL_FIELDS = ["model_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "num_head_channels"]
MODEL_FIELDS += ["group_channels", "use_scale_shift_norm"]
BASE_FIELDS = ["image_size", "fold", "objective", "predict", *MODEL_FIELDS]

# ----------------------------------------------------------------------------------------------------------------
# Two objectives. From the same data x (B, C, H, W), the same noise and the same u (B,) in [0, 1), each makes
#   x_t       the noisy data, (B, C, H, W)
#   target    what the network is to predict from x_t: the loss is the mean square of prediction - target
#   timestep  the time as the network is given it, 0 to 999, (B,)
#   t         the time from 0 to 1, (B,), by which the loss is logged

TIMESTEPS = 1000
# alpha_bar_t for t = 0 to 999: the part of the data's variance that is left (Ho et al. 2020, section 4)
ALPHA_BARS = common.alphas_cumprod(common.linear_betas(TIMESTEPS))


def flow_pair(config, x, noise, u):
    """Flow matching (Lipman et al. 2022, eq. 23 with sigma_min = 0): a point on the straight line from noise at t = 0
    to data at t = 1, and the velocity along that line."""
    # x_t = (1 - t) noise + t data
    x_t = common.flow_point(noise, x, u)
    # dx_t/dt = data - noise
    velocity = x - noise
    return x_t, velocity, (TIMESTEPS - 1) * u, u


def ddpm_pair(config, x, noise, u):
    """DDPM: noisy data, and the noise in them (Ho et al. 2020, eq. 14) or v (Salimans & Ho 2022, appendix D)."""
    timestep = (TIMESTEPS * u).long()
    alpha_bar = ALPHA_BARS.to(x.device)[timestep].view(-1, 1, 1, 1)
    # x_t = sqrt(alpha_bar_t) data + sqrt(1 - alpha_bar_t) noise
    x_t = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
    target = noise if config.predict == "eps" else common.ddpm_v(x, noise, alpha_bar)
    return x_t, target, timestep.float(), timestep / TIMESTEPS


PAIRS = {"flow": flow_pair, "ddpm": ddpm_pair}

# ----------------------------------------------------------------------------------------------------------------
# Two samplers. network(x, timestep) is the model's output at one timestep, 0 to 999, for the whole batch.

SOLVERS = {"flow": tuple(common.SOLVERS), "ddpm": ("ddim", "ancestral")}


def flow_sample(network, x, steps, solver="euler", callback=None):
    """Integrate dx/dt = velocity from noise x at t = 0 to data at t = 1. callback(x, t) gets every state."""
    times = [i / steps for i in range(steps + 1)]
    return common.SOLVERS[solver](lambda x, t: network(x, (TIMESTEPS - 1) * t), x, times, callback)


def timesteps(steps):
    """`steps` of the 1,000 timesteps, falling, evenly spaced, the first of them 999, where x_t is nearly pure noise
    (Lin et al. 2023, section 3.3)."""
    return [round(TIMESTEPS * (steps - i) / steps) - 1 for i in range(steps)]


def ddpm_sample(config, network, x, steps, noise_fn, solver="ddim", data_max=None, callback=None):
    """From noise x at timestep 999 to data, by ddim steps (Song et al. 2020, eq. 12) or ancestral ones (Ho et al. 2020,
    algorithm 2). noise_fn() -> new noise like x, for ancestral steps. callback(x, done) gets every state, done from 0
    (noise) to 1 (data).

    data_max: predicted data are clipped to [-data_max, data_max], the range of the training data (None: no clipping).
    With linear betas x_999 = 0.006 data + noise, so that the first predicted data can be far outside this range.
    """
    table = torch.cat((ALPHA_BARS, torch.ones(1)))  # table[-1] = 1: clean data

    def step(x, t, t_next):
        alpha_bar, alpha_bar_next = table[t], table[t_next]
        prediction = network(x, t)
        eps = prediction if config.predict == "eps" else common.eps_from_v(prediction, x, alpha_bar)
        if data_max is not None:
            eps = common.clip_x0(x, eps, alpha_bar, data_max)
        if solver == "ddim":
            return common.ddim_step(x, eps, alpha_bar, alpha_bar_next)
        return common.ddpm_step(x, eps, alpha_bar, alpha_bar_next, noise_fn())  # whose factor is 0 in the last step

    report = callback and (lambda x, t: callback(x, 1 - (t + 1) / TIMESTEPS))
    return common.integrate(step, x, [*timesteps(steps), -1], report)


def to_rgb(config, x, vae=None):
    """Latents, or pixels after pixel_unshuffle, -> RGB (B, 3, H, W) in [0, 1]."""
    decode = vae.decode if vae else functools.partial(F.pixel_shuffle, upscale_factor=config.fold)
    return torch.cat([decode(part) / 2 + 0.5 for part in common.progress(x.split(16), "decoding")]).clamp(0, 1)


@torch.no_grad()
def sample(
    model, config, num=16, steps=50, seed=0, solver="", clip=True, vae=None, batch_size=64,
    precision="auto", callback=None,
):  # fmt: skip
    """Pictures from noise: RGB (num, 3, H, W) in [0, 1]; latents where the model works on latents and no vae is given.

    model: with the header of load_model(). Picture i depends on seed + i only. solver: euler, heun or dpm for flow
    matching, ddim or ancestral for DDPM (default: the first). clip: whether DDPM's predicted data are clipped to the
    range of the training data. callback(x, done) gets the first batch's states. Raises UserError for a solver of the
    other objective.
    """
    solvers = SOLVERS[config.objective]
    solver = solver or solvers[0]
    if solver not in solvers:
        raise UserError(f"--solver {solver} is not for {config.objective} weights; use {' or '.join(solvers)}")
    device, (channels, size) = next(model.parameters()).device, model.header["latent"]
    data_max, results = model.header.get("range") if clip else None, []
    keep_latents = vae is None and model.header["vae"] is not None

    def network(x, timestep):
        return model(x, torch.full((len(x),), float(timestep), device=device))

    for first in common.progress(range(seed, seed + num, batch_size), "batches"):
        seeds = range(first, min(first + batch_size, seed + num))
        x, rngs = common.noise_for(seeds, (channels, size, size), device), [generator(s, 1) for s in seeds]

        def noise_fn(rngs=rngs):
            return torch.stack([torch.randn(channels, size, size, generator=rng) for rng in rngs]).to(device)

        with autocast(device, common.pick_precision(precision, device)):
            if config.objective == "flow":
                x = flow_sample(network, x, steps, solver, callback)
            else:
                x = ddpm_sample(config, network, x, steps, noise_fn, solver, data_max, callback)
            results.append(x if keep_latents else to_rgb(config, x, vae))
        callback = None
    return torch.cat(results)


# ----------------------------------------------------------------------------------------------------------------
# Model: the ADM U-Net (Dhariwal & Nichol 2021, section 3) with the parameter names of guided-diffusion


def group_norm(width, group_channels=0):
    """GroupNorm with 32 groups, as in guided-diffusion, or below width 256 with groups of at least group_channels.

    At t = 999 (linear betas) x_t is data / 157 + noise, so an error in the predicted noise is 157 times as large in the
    predicted data; an error in a channel's mean changes the colours. GroupNorm subtracts the mean of each group. At
    width 64, 32 groups have two channels each, so that most of a channel's own mean is removed. Wider groups keep it.
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
    """Half the size, where resblock_updown=False."""
    conv = nn.Conv2d(width, width, 3, stride=2, padding=1)
    return nn.Sequential(collections.OrderedDict(op=conv if use_conv else nn.AvgPool2d(2)))


def upsample(width, use_conv):
    """Twice the size, where resblock_updown=False."""
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
    model of 281M parameters. It leaves channel_mult open, which (1, 1, 2, 4) fits; the rest follows ADM's recipes.

    image_size             side of the training maps; used only to find the levels that attention_resolutions names
    attention_resolutions  sides of the maps with attention, as in the write-up (guided-diffusion's class takes
                           image_size divided by them)
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
        embed = 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, embed), nn.SiLU(), nn.Linear(embed, embed))
        self.label_emb = nn.Embedding(num_classes, embed) if num_classes else None
        norm = functools.partial(group_norm, group_channels=group_channels)

        def block(width_in, width, resample=None):
            return ResBlock(width_in, width, embed, dropout, use_scale_shift_norm, norm, resample)

        def attend(width):
            if width % num_head_channels:  # -1, for num_heads, divides all
                raise ValueError(f"width {width} is no multiple of num_head_channels {num_head_channels}")
            return AttentionBlock(width, num_heads if num_head_channels == -1 else width // num_head_channels, norm)

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
        # The output layer computes in float32: near pure noise a rounding error of bfloat16 (1 part in 256) in the
        # predicted noise would become 157 times as large in the data.
        with torch.autocast(x.device.type, enabled=False):
            return self.out(x.float())


def build_model(config, channels, size):
    """A fresh UNetModel for maps (channels, size, size). Raises UserError where the sizes do not fit."""
    sides = [size // 2**level for level in range(len(config.channel_mult))]
    if size % 2 ** (len(sides) - 1):
        raise UserError(f"maps of side {size} cannot be halved {len(sides) - 1} times; change --image-size")
    if unknown := set(config.attention_resolutions) - set(sides):
        raise UserError(f"--attention-resolutions {min(unknown)}: the maps' sides are {sides}; name some of them")
    options = {name: getattr(config, name) for name in (*MODEL_FIELDS, "dropout")}
    try:
        return UNetModel(size, channels, out_channels=channels, use_checkpoint=config.checkpointing, **options)
    except ValueError as problem:
        hint = "make --model-channels a multiple of 32, --num-head-channels and --group-channels"
        raise UserError(f"{problem}; {hint}") from None


def load_model(path, device="cpu", objective="flow", predict="eps"):
    """(UNetModel in eval mode, Config) of a checkpoint. model.header is the checkpoint's header: "latent", (C, S), is
    the shape of the model's maps, "range" the largest absolute value in a sample of its training data, "vae" the
    autoencoder's hash, None for pixels or "" if unknown. A file without a header is taken for the write-up's
    model_ema.pt, and objective and predict tell what it learned. Raises UserError."""
    weights, header = load_tensors(path)
    if header is None:
        settings = PRESETS["paper"] | dict(objective=objective, predict=predict, vae="")
        if "input_blocks.4.1.qkv.weight" not in weights:
            # The write-up's call also fits another model of 281M parameters. guided-diffusion's class reads (16, 8) as
            # factors by which the map has shrunk: only 8 occurs, at side 4. That class also has
            # use_scale_shift_norm=False by default.
            settings |= dict(attention_resolutions=[4], use_scale_shift_norm=False)
        header = {"system": "unet_ddpm", "latent": [32, 32], "vae": "", "config": settings}
    if header.get("system") != "unet_ddpm":
        raise UserError(f"{path} is no checkpoint of unet_ddpm.py; name another with --weights")
    config, device = common.config_from_header(Config, header, path), torch.device(device)
    config.device = device.type  # load_source() may encode pictures with it
    model = build_model(config, *header["latent"])
    load_into(model, weights, path)
    model.header = header
    # Contiguous on a CPU: in channels-last, GroupNorm in bfloat16 takes half of the time of sampling there.
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return model.to(device, memory_format=memory_format).eval(), config


# ----------------------------------------------------------------------------------------------------------------
# Data: pictures, or a VAE's latents of them


def encode(config):
    """Pictures to shards of latents in the folder config.out, which is set where it is empty. Shards that are there are
    kept. Raises UserError."""
    if not (config.data and config.vae):
        raise UserError("encode needs --data and --vae")
    device = common.pick_device(config.device)
    precision, vae = common.pick_precision(config.precision, device), common.load_vae(config.vae).to(device)
    name = Path(config.data[0]).resolve().stem
    count = f"-{config.num_samples}" if config.num_samples else ""
    config.out = config.out or f"data/latents-{name}{count}-{config.image_size}-{vae.hash[:8]}"

    def to_latents(pictures, rows):
        with autocast(device, precision):
            return {"latents": vae.encode(pictures.to(device))}

    done, skipped = common.write_shards(config, {"vae": vae.hash, "image_size": config.image_size}, to_latents)
    common.tell_skipped(skipped)
    print(f"{done:,} latents in {config.out}")


def load_source(config):
    """What --data names: common.Pictures or, for a folder of shards or with --vae, common.Shards of latents, which are
    encoded first where they are missing. Raises UserError."""
    if common.has_shards(config.data):
        return common.Shards(config.data[0], ("latents",))
    if not config.vae:
        return common.load_pictures(config.data, config.image_size, first=config.num_samples)
    names = "data", "vae", "image_size", "num_samples", "device", "precision"
    options = common.EncodeConfig(**{name: getattr(config, name) for name in names})
    with common.main_process_first():
        encode(options)
    return common.Shards(options.out, ("latents",))


def base_header(config):
    """The header of the run --from, which must be of stage exclude. Raises UserError."""
    path = Path(config.start) / "model.safetensors"
    header = load_tensors(path, header_only=True)[1]
    if not (header and header.get("left_out") and header["config"]["stage"] == "exclude"):
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
        # Fine-tuning trains on exactly what the base left out, so it leaves out everything else.
        base_left_out = set(base["left_out"])
        return [name for name in source.names if name not in base_left_out]
    return []


class Data:
    """The pictures or latents of `source` whose names are not in left_out. header: what a checkpoint stores about them.
    Raises UserError."""

    def __init__(self, config, source, left_out=()):
        unwanted, self.in_latents = set(left_out), isinstance(source, common.Shards)
        self.config, self.source = config, source
        self.chosen = [i for i, name in enumerate(source.names) if name not in unwanted]
        if not self.chosen:
            raise UserError("no pictures are left to train on; exclude fewer tags")
        if not self.in_latents and config.image_size % config.fold:
            raise UserError(f"--fold {config.fold} does not divide --image-size {config.image_size}")
        some = self.read(self.chosen[:: max(1, len(self.chosen) // 256)])
        self.header = {"vae": source.header["vae"] if self.in_latents else None, "data": source.checksum()}
        self.header |= {"latent": list(some.shape[1:3]), "range": some.abs().max().item(), "left_out": sorted(left_out)}

    def __len__(self):
        return len(self.chosen)

    def read(self, index, flip_rng=None):
        """Samples `index` of the source as the network sees them: latents, or pixels in [-1, 1] as
        (B, 3 fold fold, S/fold, S/fold). With flip_rng, a BatchRng, some are mirrored."""
        x = self.source.read(index)[0] if self.in_latents else self.source.pictures[index] / 127.5 - 1
        if flip_rng:
            x = common.random_flip(x, self.config.flip, flip_rng)
        return x if self.in_latents else F.pixel_unshuffle(x, self.config.fold)

    def batch(self, step, rows):
        """The rows of the batch of optimizer step `step`, a function of the seed and the step alone."""
        index = [self.chosen[i] for i in common.batch_index(self.config, len(self), step)[rows]]
        return self.read(index, BatchRng(self.config.batch_size, self.config.seed, step, 3, rows=rows))


# ----------------------------------------------------------------------------------------------------------------
# Training


def resolve(config, device):
    """A copy of config in which --optimizer auto is resolved and, for finetune, BASE_FIELDS are those of the run of
    --from. Raises UserError for options that do not fit the stage."""
    if (config.stage == "exclude") != bool(config.exclude_tags) or (config.stage == "finetune") != bool(config.start):
        raise UserError("--exclude-tags goes with --stage exclude, --from with --stage finetune; give both or neither")
    if config.optimizer == "auto":
        has_8bit = device.type == "cuda" and not config.fsdp and importlib.util.find_spec("torchao")
        config = dataclasses.replace(config, optimizer="adamw8bit" if has_8bit else "adamw")
    if config.stage == "finetune":
        base = common.config_from_header(Config, base_header(config), config.start)
        config = dataclasses.replace(config, **{name: getattr(base, name) for name in BASE_FIELDS})
    return config


def save_mark(run, ema):
    """Write the averaged weights of this step, in bfloat16, to the run's marks/, for the curves of `compare`."""
    weights = {name: tensor.bfloat16() for name, tensor in ema.state_dict().items()}
    common.save_tensors(run.folder / "marks" / f"step_{run.step:06d}.safetensors", weights, run.settings())


def train(config):
    """Train, or go on with --resume; the result is a run folder. Returns the exit code. Raises UserError."""
    device, precision = common.init_training(config)
    config = resolve(config, device)
    run = common.Run(config, "unet_ddpm", enough=25_000)
    source = load_source(config)
    data = Data(config, source, names_left_out(config, source))
    vae = common.load_matching_vae(config.vae, data.header).to(device) if data.in_latents else None
    torch.manual_seed(config.seed)
    model = build_model(config, *data.header["latent"]).to(memory_format=torch.channels_last)
    if config.stage == "finetune":
        load_into(model, load_tensors(Path(config.start) / "model.safetensors")[0], config.start)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    trained = common.parallelize(config, model, ema, device, lambda net: net.blocks)
    optimizer, scaler = common.make_optimizer(config, model, device)
    run.header = ema.header = data.header
    about = f"{len(data):,} pictures, {len(data.header['left_out']):,} left out, {precision} on {device}"
    run.start(model, ema, optimizer, scaler, about, len(data), source.skipped)
    common.compile_blocks(config, device, model.blocks)
    if config.stage == "finetune" and run.step == 0:
        save_mark(run, ema)  # where the curve of adaptation begins
    for step in run.steps():
        lr = config.lr * common.lr_factor(run.progress, step, config.warmup, config.decay)
        common.set_lr(optimizer, lr)
        for rows in common.micro_batches(config):
            # The last number of a key tells the random streams apart: 1 time and noise, 2 dropout, 3 mirroring,
            # 5 order (in common.batch_index).
            rng = BatchRng(config.batch_size, config.seed, step, 1, rows=rows)
            x = data.batch(step, rows).to(device)  # 1. a batch
            u, noise = rng.rand().to(device), rng.randn(*x.shape[1:]).to(device)  # 2. time and noise
            x_t, target, timestep, t = PAIRS[config.objective](config, x, noise, u)  # 3. the noisy picture
            # The same dropout after --resume
            torch.manual_seed(generator(config.seed, step, rows.start, 2).initial_seed())
            with autocast(device, precision):
                prediction = trained(x_t, timestep)  # 4. predict
            loss = (prediction - target).square().mean(dim=(1, 2, 3))  # 5. (B,) the loss of each picture
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
        # Along one axis, optimal transport pairs the points in their order.
        levels.append(1000 * ((a @ axes).sort(dim=0)[0] - (b @ axes).sort(dim=0)[0]).abs().mean().item())
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


def load_features(options):
    """The networks that options names: "frechet_alexnet" or "frechet_inception" -> function of RGB (n, 3, S, S) in
    [0, 1] that returns features (n, d). Raises UserError."""
    networks = {}
    if options.alexnet:
        lpips = common.Lpips.load(options.alexnet)

        def alexnet(rgb):  # the means over positions of its five layers, as LPIPS normalises them: d = 1,152
            features = [layer.mean(dim=(2, 3)) for layer in lpips.to(rgb.device).layers(rgb)]
            return 1000**0.5 * torch.cat(features, dim=1)  # so that the distance, a square, is x 1000

        networks["frechet_alexnet"] = alexnet
    if options.inception:
        with common.reading(options.inception, "Inception network in TorchScript, such as inception-2015-12-05.pt"):
            network = torch.jit.load(options.inception, map_location="cpu").eval()
            network(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), return_features=True)

        def inception(rgb):  # d = 2,048
            return network.to(rgb.device)((rgb * 255).round().byte(), return_features=True)

        networks["frechet_inception"] = inception
    return networks


TITLES = {  # of charts; the keys are columns of compare.csv
    "distance": "Sliced Wasserstein distance on Laplacian pyramids x 1000",
    "finest_level": "Its finest level alone, which shows sharpness",
    "frechet_alexnet": "Frechet distance in AlexNet features x 1000",
    "frechet_inception": "Inception FID",
}


class Distances:
    """distances(rgb (n, 3, S, S) in [0, 1]) -> {name in TITLES: distance from n training pictures}. floor: those of n
    other training pictures. options: of `evaluate` or `compare`. Raises UserError for too few pictures.

    Fréchet distances need the networks' files. With fewer pictures than features their covariance is singular, which
    the formula allows; compare such numbers only at equal n. With a VAE, the training pictures are decoded latents.
    """

    def __init__(self, options, data, vae, device):
        self.networks = load_features(options)
        order = torch.randperm(len(data), generator=generator(0, 9)).tolist()
        self.num = min(options.num, len(order) // 2)
        if self.num < 2:
            raise UserError(f"{len(order)} pictures are too few for a distance; it needs at least four")

        def real(numbers):
            with torch.no_grad(), autocast(device, common.pick_precision(options.precision, device)):  # as in sample()
                return to_rgb(data.config, data.read([data.chosen[i] for i in numbers]).to(device), vae)

        self.real = self.features(real(order[: self.num]))
        self.floor = self(real(order[self.num : 2 * self.num]))

    @torch.no_grad()
    def features(self, rgb):
        networks = {"rgb": lambda part: part} | self.networks
        parts = rgb.float().split(32)
        return {name: torch.cat([f(x).cpu() for x in common.progress(parts, name)]) for name, f in networks.items()}

    def __call__(self, rgb):
        made = self.features(rgb[: self.num])
        levels = sliced_wasserstein(self.real["rgb"], made["rgb"])
        results = {"distance": sum(levels) / len(levels), "finest_level": levels[0]}
        return results | {name: frechet(self.real[name], made[name]) for name in self.networks}


# ----------------------------------------------------------------------------------------------------------------
# Subcommands


@dataclasses.dataclass
class SolverConfig(common.LoadConfig):
    """The options that `sample` and `evaluate` share."""

    vae: str = option("", "autoencoder that the weights were trained with")
    steps: int = option(50, "steps from noise to picture", low=1, high=TIMESTEPS)
    seed: int = option(0, "picture i starts from the noise of seed + i", low=0, high=2**62)
    solver: str = option("", "default: euler or, for DDPM, ddim", ("", *SOLVERS["flow"], *SOLVERS["ddpm"]))
    clip: bool = option(True, "DDPM: clip the predicted data to the training data's range")
    precision: str = option("auto", "of matrix products", choices=("auto", "fp32", "bf16", "fp16"))
    objective: str = option("flow", "what weights without a header learned, such as the write-up's", ("flow", "ddpm"))
    predict: str = option("eps", "what such DDPM weights predict", choices=("eps", "v"))
    latents: str = option("normalised", "latents of such weights; raw: not normalised", ("normalised", "raw"))
    latent_mean: float = option(0.0, "with --latents raw: what was subtracted from all of them")
    latent_std: float = option(1.0, "with --latents raw: what they were then divided by", low=1e-6)


class RawLatents:
    """The VAE of a model that learned (raw latent - mean) / std, one mean and std for all channels, as the write-up's
    author does in later code. Raises UserError."""

    def __init__(self, vae, mean, std):
        if not hasattr(vae, "normalise"):
            raise UserError("--latents raw needs FLUX.2's or SD's own VAE; TAEF2 has only normalised latents")
        self.vae, self.mean, self.std = vae, mean, std

    def decode(self, z):
        return self.vae.decode(self.vae.normalise(self.std * z + self.mean))


class Trained:
    """A loaded checkpoint with its config and its VAE. options: those of `sample`, `evaluate` or `compare`."""

    def __init__(self, path, options):
        self.folder, self.options, self.device = path.parent, options, common.pick_device(options.device)
        self.model, self.config = load_model(path, self.device, options.objective, options.predict)
        self.config.vae = options.vae or self.config.vae
        self.header, self.vae = self.model.header, None
        if self.header["vae"] is not None:
            self.vae = common.load_matching_vae(self.config.vae, self.header).to(self.device)
            if isinstance(options, SolverConfig) and options.latents == "raw":
                self.vae = RawLatents(self.vae, options.latent_mean, options.latent_std)

    def sample(self, num, steps, **arguments):
        """RGB (num, 3, S, S). arguments: others of the function sample()."""
        return sample(self.model, self.config, num, steps, vae=self.vae, precision=self.options.precision, **arguments)

    def distances(self):
        """The Distances from the pictures that the model was trained on. Raises UserError."""
        data, own = Data(self.config, load_source(self.config), self.header.get("left_out", ())), self.header["latent"]
        if data.header["latent"] != own:
            raise UserError(f"--data gives maps of {data.header['latent']}, not {own}; name the training data")
        return Distances(self.options, data, self.vae, self.device)


@dataclasses.dataclass
class SampleConfig(SolverConfig, common.SampleConfig):
    """The options of `sample`."""


def sample_command(config):
    """A grid of samples, and with --each and --gif single pictures and the way from noise."""
    run = Trained(common.find_weights(config.weights, "unet_ddpm"), config)
    frames, callback = common.record_frames(lambda x: common.make_grid(to_rgb(run.config, x[:16], run.vae)), config.gif)
    way = dict(seed=config.seed, solver=config.solver, clip=config.clip, batch_size=config.batch_size)
    rgb = run.sample(config.num, config.steps, callback=callback, **way)
    common.write_samples(rgb, [f"{config.seed + i:06d}" for i in range(config.num)], config, frames)


@dataclasses.dataclass
class DistanceConfig:
    """The networks that distances are measured with."""

    inception: str = option("", "Inception's TorchScript file, for FID; TorchScript can run any code: trust its source")
    alexnet: str = option("", "torchvision's AlexNet weights, for the same distance in its features")


@dataclasses.dataclass
class EvaluateConfig(DistanceConfig, SolverConfig):
    """The options of `evaluate`."""

    data: tuple[str, ...] = option((), "pictures to compare with (default: those that were trained on)")
    num: int = option(1000, "pictures on either side", low=2)
    steps: int = option(20, "steps from noise to picture", low=1, high=TIMESTEPS)


def evaluate(config):
    """How far samples are from the pictures that were trained on."""
    run = Trained(common.find_weights(config.weights, "unet_ddpm"), config)
    run.config.data = config.data or run.config.data
    distances = run.distances()
    rgb = run.sample(distances.num, config.steps, seed=config.seed, solver=config.solver, clip=config.clip)
    for name, distance in distances(rgb).items():
        about = f"{distances.num} pictures in {config.steps} steps"
        print(f"{TITLES[name]}, {about}: {distance:.1f} (floor {distances.floor[name]:.1f})")


# ----------------------------------------------------------------------------------------------------------------
# Comparison: three objectives side by side

OBJECTIVES = {"flow": ("flow", "eps"), "ddpm": ("ddpm", "eps"), "ddpm-v": ("ddpm", "v")}  # --objective, --predict
SAMPLING_STEPS = 5, 10, 20, 50  # of the distances by sampling steps
MARK_STEPS = 20  # sampling steps of the curves by training steps


@dataclasses.dataclass
class CompareConfig(DistanceConfig, Config):
    """The options of `compare`: those of `train`, for each of the three runs (compare sets --objective, --predict and
    --resume itself), and what is measured."""

    out: str = option("runs/compare", "folder for the three runs, index.html, compare.png and compare.csv")
    runs: tuple[str, ...] = option((), "finished run folders to compare (default: three are trained here)")
    finetuned: tuple[str, ...] = option((), "run folders of stage finetune, for the curves of adaptation")
    num: int = option(256, "pictures on either side of each distance", low=2)


def train_three(config):
    """Train each of OBJECTIVES in its folder within --out, or go on with it: flow matching for the given budget, the
    other two for as many steps. Returns the exit code."""
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(Config)}
    for name, (objective, predict) in OBJECTIVES.items():
        folder = Path(config.out) / name
        own = dict(objective=objective, predict=predict, out=str(folder))
        own["resume"] = "" if (folder / "state.safetensors").exists() else None
        if config.start:  # --from names a folder of `compare`: each objective starts from its own run there
            own["start"] = f"{config.start}/{name}"
        if code := train(Config(**settings | own)):
            return code
        settings |= dict(minutes=None, epochs=None)
        settings["steps"] = load_tensors(folder / "model.safetensors", header_only=True)[1]["step"]
    return 0


def curve_of_training(run, distances):
    """[(training step, distance)] of the weights in marks/. Afterwards run.model holds the last of them."""
    curve = []
    for path in common.progress(sorted(run.folder.glob("marks/step_*.safetensors")), "measuring"):
        load_into(run.model, load_tensors(path)[0], path)
        found = distances(run.sample(distances.num, MARK_STEPS))
        curve.append((int(path.stem.removeprefix("step_")), found["distance"]))
    return curve


def load_runs(folders, config):
    """name of the objective -> Trained, of finished run folders. The folder is added to a name that comes twice. Raises
    UserError unless all were trained on the same pictures."""
    runs = {}
    for run in (Trained(common.find_weights(folder, "unet_ddpm"), config) for folder in folders):
        name = "ddpm-v" if (run.config.objective, run.config.predict) == ("ddpm", "v") else run.config.objective
        runs[f"{name} {run.folder}" if name in runs else name] = run
        first = next(iter(runs.values()))
        if any(run.header.get(key) != first.header.get(key) for key in ("data", "latent", "left_out")):
            raise UserError(f"{first.folder} and {run.folder} were trained on different pictures; compare equals")
    return runs


def compare(config):
    """index.html, compare.png and compare.csv in --out, of three objectives that are trained here or of --runs. DDPM is
    sampled by ddim steps. Returns the exit code. Raises UserError."""
    if not config.runs and (code := train_three(config)):
        return code
    runs = load_runs(config.runs or [f"{config.out}/{name}" for name in OBJECTIVES], config)
    distances = next(iter(runs.values())).distances()
    floor = distances.floor
    curves = {key: {name: [] for name in runs} for key in floor}  # distance -> objective -> [(steps, value)]
    table, samples = [["objective", "seed", "sampling_steps", *floor, "floor"]], []
    for steps, (name, run) in common.progress(itertools.product(SAMPLING_STEPS, runs.items()), "measuring"):
        rgb = run.sample(distances.num, steps)
        found = distances(rgb)
        for key, value in found.items():
            curves[key][name].append((steps, value))
        table.append([name, run.config.seed, steps, *(f"{v:.2f}" for v in (*found.values(), floor["distance"]))])
        samples.append((f"{name}\n{steps} steps", rgb[:8]))

    charts = [(f"{TITLES[key]}, by sampling steps", curves[key], floor[key]) for key in floor]
    curves = {name: curve_of_training(run, distances) for name, run in runs.items()}
    charts.append((f"{TITLES['distance']}, by training steps", curves, floor["distance"]))
    logs = {name: common.read_log(run.folder) for name, run in runs.items()}
    curves = {name: [(int(row["step"]), float(row["loss"])) for row in log] for name, log in logs.items()}
    charts.append(("Loss (the targets differ), by training steps", curves, None))
    if config.finetuned:
        tuned = load_runs(config.finetuned, config)
        near = next(iter(tuned.values())).distances()
        curves = {name: curve_of_training(run, near) for name, run in tuned.items()}
        charts.append(("Distance from the left-out pictures, by fine-tuning steps", curves, near.floor["distance"]))
    lines = (",".join(map(str, row)) for row in table)
    common.save_text(Path(config.out) / "compare.csv", "\n".join(lines) + "\n")
    write_page(Path(config.out), runs, samples, charts, distances.num)
    print(f"open {config.out}/index.html")
    return 0


def write_page(out, runs, samples, charts, num):
    """compare.png: samples, [(label, rgb)], one row each, and the charts beside them. index.html: the same, and the
    charts' numbers."""
    rows = []
    for label, rgb in samples:
        rows.append(Image.new("RGB", (730, 84), "white"))
        rows[-1].paste(common.make_grid(rgb, 8).resize((640, 80), Image.Resampling.BOX), (80, 0))
        ImageDraw.Draw(rows[-1]).text((4, 20), label, "black", ImageFont.load_default(13))
    *first, last = (common.chart(*chart) for chart in charts)
    left, right = common.stack_pictures([*rows, last]), common.stack_pictures(first)
    sheet = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), "white")
    sheet.paste(left)
    sheet.paste(right, (left.width, 0))
    common.save_picture(sheet, out / "compare.png")

    body = common.html_table([[name, run.folder, f"{run.header['step']:,} steps"] for name, run in runs.items()])
    body += common.html_picture(sheet) + f"<p>Distances of {num} samples from as many training pictures; the floor is "
    body += f"that of other training pictures. Curves by training steps: {MARK_STEPS} sampling steps.</p>"
    for title, curves, floor in charts:
        if floor is not None:
            cells = [[name, *(f"{x}: {y:.1f}" for x, y in curve)] for name, curve in curves.items()]
            body += f"<h2>{title}</h2>" + common.html_table([*cells, ["floor", f"{floor:.1f}"]])
    common.save_page(out / "index.html", "Flow matching against DDPM", body)


@dataclasses.dataclass
class DemoConfig(common.DemoConfig):
    weights: tuple[str, ...] = option((), "runs or checkpoints to compare (default: your run, or the two in weights/)")
    vae: str = option("", "autoencoder that the weights were trained with")


def demo(options):
    """A page: samples of several runs, side by side from the same noise."""
    shipped = [Path(__file__).parent / "weights" / f"{name}.safetensors" for name in ("unet_ddpm", "unet_ddpm_ddpm")]
    own = Path("runs/unet_ddpm/model.safetensors")
    paths = options.weights or ([own] if own.exists() else shipped)
    runs = load_runs(paths, SolverConfig(vae=options.vae, device=options.device))

    def compare(seed, steps):
        ways = [common.stream(functools.partial(run.sample, 9, steps, seed=seed)) for run in runs.values()]
        for i, states in enumerate(zip(*ways, strict=True)):
            rgbs = (to_rgb(run.config, x, run.vae) for run, (x, _) in zip(runs.values(), states))
            yield *rgbs, f"step {i} of {steps}"

    about = "The same network, data, noise and number of steps."
    if len(runs) == 1:
        about = "One run. `python unet_ddpm.py compare` makes others; then name two or more with `demo --weights`."
    inputs = {"seed": (0, 999, 0), "steps": (1, 50, 10)}
    common.open_page(options, "Flow matching and DDPM", about, ("Sample", list(runs), compare, inputs))


SUBCOMMANDS = {
    "train": (train, Config, PRESETS, "train, e.g. python unet_ddpm.py train --objective ddpm"),
    "sample": (sample_command, SampleConfig, None, "sample pictures, e.g. python unet_ddpm.py sample --steps 20"),
    "evaluate": (evaluate, EvaluateConfig, None, "distance of samples from the training set"),
    "compare": (compare, CompareConfig, PRESETS, "three objectives side by side, e.g. compare --minutes 10"),
    "encode": (encode, common.EncodeConfig, None, "a folder's latents, e.g. encode --data DIR --vae FILE --out SHARDS"),
    "demo": (demo, DemoConfig, None, "a page in the browser: flow matching and DDPM side by side"),
    "export": common.export("unet_ddpm"),
}


def main(argv=None):
    """The command line: argv or, by default, the words after the file's name. Returns the exit code."""
    return common.run_command_line("unet_ddpm", __doc__, SUBCOMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
