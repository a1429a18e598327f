"""Flow matching against DDPM: one ADM U-Net, the same pictures, noise and budget, two ways to learn.

The system of the write-up "Toy-Diffusion", from data to comparison in this one file. Flow matching: t = 0 is NOISE and
t = 1 is DATA, as in the write-up's code. DDPM: timestep 0 is nearly pure data and timestep 999 nearly pure noise.
The network is told 999 t of the one and the timestep of the other: the same range, the opposite way round.

    python unet_ddpm.py train                                  flow matching: ten minutes on two CPU cores, drawn faces
    python unet_ddpm.py train --objective ddpm --out runs/ddpm        the same network, data and noise, learned as DDPM
    python unet_ddpm.py compare --minutes 20                   both, side by side: pictures, curves, distances
    python unet_ddpm.py sample --num 16 --steps 20
    python unet_ddpm.py train --stage exclude --exclude-tags "red hair" --out runs/base      never sees red hair, ...
    python unet_ddpm.py train --stage finetune --from runs/base --out runs/fine       ... and learns it afterwards
    python unet_ddpm.py train --preset paper --data DIR --vae FLUX.2-VAE        the write-up's 281M parameters

What to expect of the demo preset (two cores of an AMD EPYC with AVX512-BF16, 130 to 160 images/s once compiled): faces
in tatters at minute 1, faces at 3, plain backgrounds and clean lines from 5 on; a loss of 0.27, 0.18 and 0.13 at
minutes 1, 3 and 10. The same with --objective ddpm: faces that can be told, in far too strong colours.
"""

import base64
import copy
import csv
import dataclasses
import difflib
import functools
import html
import importlib.util
import itertools
import json
import math
import sys
import zlib
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.checkpoint import checkpoint

import common
from common import (
    Chart,
    Draw,
    Run,
    UserError,
    alphas_cumprod,
    attention,
    autocast,
    ddim_step,
    ddpm_step,
    flow_point,
    generator,
    keep_in_range,
    linear_betas,
    load_into,
    load_tensors,
    option,
    timestep_embedding,
    zero,
)

# ----------------------------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass
class Config(common.TrainConfig):
    """What the presets have in common; PRESETS holds what each changes."""

    # Data
    image_size: int = option(40, "side of the pictures in pixels", low=8)
    vae: str = option("", "autoencoder whose latents are learned: FLUX.2's, TAEF2 or SD's (default: none, pixels)")
    fold: int = option(2, "without a VAE: squares of so many pixels a side become the channels of one cell", low=1)
    flip: float = option(0.0, "how often a picture is mirrored", low=0.0, high=1.0)
    # Stage
    stage: str = option(
        "standard",
        "standard: everything; exclude: what bears none of --exclude-tags; finetune: what --from has never seen",
        choices=("standard", "exclude", "finetune"),
    )
    exclude_tags: tuple[str, ...] = option((), "tags whose pictures are left out")
    start: str = option("", "run folder of stage exclude that is finetuned", flag="--from")
    # Objective
    objective: str = option("flow", "how noise becomes data: flow matching or DDPM", choices=("flow", "ddpm"))
    predict: str = option("eps", "what a DDPM network says: the noise, or Salimans & Ho's v", choices=("eps", "v"))
    # Model
    model_channels: int = option(64, "width at the highest resolution", low=32)
    channel_mult: tuple[int, ...] = option((1, 2), "width of each resolution, in --model-channels", low=1)
    num_res_blocks: int = option(1, "residual blocks at each resolution", low=1)
    attention_resolutions: tuple[int, ...] = option((10,), "sides of the maps whose cells attend to each other", low=1)
    num_head_channels: int = option(64, "width of an attention head", low=1)
    dropout: float = option(0.0, "share of a block's features that is dropped", low=0.0, high=0.99)
    checkpointing: bool = option(False, "keep less in memory while training, compute more")
    optimizer: str = option(
        "adamw",
        "adamw8bit, of torchao, keeps its moments in 8 bits; auto: it, on a GPU that has torchao",
        choices=("adamw", "adamw8bit", "auto"),
    )


PRESETS = {
    "demo": dict(minutes=10.0, lr=2e-3),
    # The write-up names the model, the latents, AdamW at 2e-4 with 5 % of warm-up, and bfloat16. Batch, length, EMA
    # (0.999, the default), beta2 and weight decay are those of its author's later code, with 100 passes over 48,000
    # pictures; that the learning rate does not fall is ours.
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

# ----------------------------------------------------------------------------------------------------------------
# Data: pictures, or a VAE's latents of them, with their names and tags


@dataclasses.dataclass
class EncodeConfig(common.ShardConfig):
    """Options of the verb encode."""

    out: str = option("", "folder for the shards (default: in data/, named after the folder, the VAE and the size)")


def encode_folder(options, vae=None):
    """Encode a folder of pictures into shards of latents, each once; returns the shards' folder. vae: what --vae names,
    where it has been loaded. Raises UserError."""
    if not (options.data and options.vae):
        raise UserError("encode needs --data and --vae")
    device = common.pick_device(options.device)
    precision = common.pick_precision(options.precision, device)
    vae = (vae or common.load_vae(options.vae)).to(device)
    if options.image_size % (cell := vae.stride * getattr(vae, "patch", 1)):
        raise UserError(f"--image-size {options.image_size} is no multiple of {cell}, as this autoencoder wants it")
    paths = common.picture_paths(options.data)
    about = {"vae": common.fingerprint(vae), "image_size": options.image_size}
    # The default name tells folders apart that are called the same, and what was made of one with different VAEs or
    # from other pictures.
    files = [(str(path.relative_to(options.data)), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    place = zlib.crc32(json.dumps([str(Path(options.data).resolve()), about, files]).encode())
    out = options.out or f"data/latents-{Path(options.data).name}-{options.image_size}-{place:08x}"

    def encode(pictures, rows):
        with autocast(device, precision):
            return {"latents": vae.encode(pictures.to(device))}

    rows = {path: {"tags": tags} for path, (_, tags) in common.read_metadata(paths, options.data, texts=False).items()}
    done, skipped = common.write_shards(dataclasses.replace(options, out=out), paths, about, rows, encode, {})
    common.tell_skipped(skipped)
    if not done:
        raise UserError(f"no readable picture in {options.data}; it should hold files such as .png or .jpg")
    print(f"{done:,} latents in {out}")
    return out


def encode_command(options):
    """The verb encode."""
    encode_folder(options)


class Pixels:
    """Pictures in memory as the network sees them without a VAE: fold x fold pixels become the channels of a cell."""

    def __init__(self, pictures, names, tags, fold, flip):
        if pictures.shape[-1] % fold:
            raise UserError(f"--fold {fold} does not divide --image-size {pictures.shape[-1]}")
        self.pictures, self.names, self.tags, self.fold, self.flip = pictures, names, tags, fold, flip
        # What tells one set from another: how many, their pixels, their names in this order.
        told = [len(pictures), int(pictures.sum()), zlib.crc32("\n".join(names).encode(errors="surrogateescape"))]
        self.header = {"vae": None, "data": told}

    def batch(self, index, draw=None):
        """Pictures `index` -> (B, 3 fold fold, S/fold, S/fold) in [-1, 1]; with a Draw, some of them mirrored."""
        x = self.pictures[index] / 127.5 - 1
        return F.pixel_unshuffle(common.mirror_some(x, self.flip, draw) if draw else x, self.fold)


class Latents:
    """The shards that `encode` wrote, read from disk as they are asked for."""

    def __init__(self, folder, flip):
        self.shards, self.flip = common.Shards(folder, ("latents",), ("tags",), ("vae", "image_size")), flip
        self.names = [row["file"] for row in self.shards.rows]
        self.tags = [row["tags"] for row in self.shards.rows]
        self.image_size = self.shards.header["image_size"]
        self.header = {"vae": self.shards.header["vae"], "data": [len(self.names), self.shards.checksum()]}

    def batch(self, index, draw=None):
        """Latents `index`, (B, C, H, W); with a Draw, some of them mirrored."""
        (x,) = self.shards.read(index)
        return common.mirror_some(x, self.flip, draw) if draw else x


def load_data(config):
    """What --data names, as Pixels or Latents, and lines about skipped files. Raises UserError."""
    shards = config.data if any(Path(config.data).glob("shard_*.safetensors")) else ""
    if config.vae and not shards:
        if config.data == "drawn":
            raise UserError("--vae wants pictures large enough for its latents; name a folder with --data")
        if common.world() > 1:
            how = "python unet_ddpm.py encode --data ... --vae ..., then the folder that it prints as --data"
            raise UserError(f"encode the folder first, in one process: {how}")
        vae = common.load_vae(config.vae)
        with torch.device("meta"):  # sizes that do not go together should be told before hours of encoding
            build_model(config, vae.latent_channels, config.image_size // vae.stride)
        same = {name: getattr(config, name) for name in ("data", "vae", "image_size", "device", "precision")}
        shards = encode_folder(EncodeConfig(**same), vae)
    if shards:
        data = Latents(shards, config.flip)
        if data.image_size != config.image_size:
            raise UserError(f"{shards} holds latents of pictures of {data.image_size} pixels; say --image-size so")
        return data, data.shards.skipped
    if config.data == "drawn":
        drawn, skipped = common.draw_set(common.paint_face, 10_000, config.image_size), []
        pictures, tags = drawn.pictures, drawn.tags
        names = [f"drawn face {i}" for i in range(len(tags))]
    else:
        pictures, paths, skipped = common.read_folder(config.data, config.image_size)
        known = common.read_metadata(paths, config.data, texts=False)
        names = [str(path.relative_to(config.data)) for path in paths]
        tags = [known[path][1] for path in paths]
    return Pixels(pictures, names, tags, config.fold, config.flip), skipped


def choose(config, data, new=()):
    """The stage's part of the data -> (numbers of the pictures to train on, names of all others, which go into the
    checkpoint). new: for stage finetune, names of what its base has never seen.

    Raises UserError where a tag is unknown or nothing is left.
    """
    names = data.names
    if config.stage == "standard":
        unwanted = set()
    elif config.stage == "exclude":
        tags, known = set(config.exclude_tags), {tag for tags in data.tags for tag in tags}
        if strangers := sorted(tags - known):
            near = difflib.get_close_matches(strangers[0], known, 3, 0.4)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise UserError(f"no picture bears the tag {strangers[0]!r}{hint}")
        unwanted = {name for name, own in zip(names, data.tags) if not tags.isdisjoint(own)}
        if len(unwanted) == len(names):
            raise UserError("every picture bears one of --exclude-tags: nothing is left to train on; name fewer")
    else:
        unwanted = set(names) - set(new)
    return [i for i, name in enumerate(names) if name not in unwanted], sorted(unwanted)


# What a model and its latents are made of: a finetuned network is the same one.
MODEL_FIELDS = "model_channels channel_mult num_res_blocks attention_resolutions num_head_channels".split()
SAME_FIELDS = ["image_size", "fold", "objective", "predict", *MODEL_FIELDS]


def start_of(config, data):
    """The checkpoint that is finetuned: (weights, header). Raises UserError if it does not go with config or data."""
    path = Path(config.start) / "model.safetensors"
    weights, header = load_tensors(path)
    if not header or header.get("system") != "unet_ddpm":
        raise UserError(f"{path} is no checkpoint of unet_ddpm.py; name a run of stage exclude with --from")
    theirs = header["config"]
    if theirs.get("stage") != "exclude" or "left_out" not in header:
        raise UserError(f"{config.start} is not of stage exclude: nothing is known to be new to it; name one that is")
    if asked := common.differences(config, theirs, SAME_FIELDS):
        raise UserError(f"{config.start} was trained with {asked}; give the same")
    for key, what in (("vae", "another autoencoder"), ("data", "other pictures")):
        if header[key] != data.header[key]:
            raise UserError(f"{config.start} was trained with {what}; give the same --{key}, or another --from")
    return weights, header


def partner(vae, header, device):
    """The autoencoder in `vae`, a path, whose latents header["vae"] tells of; None for pixels. Raises UserError where
    it is another, not given, or of no use."""
    if header["vae"] is not None:
        return common.load_vae_of(header, vae).to(device)
    if vae:
        raise UserError("these weights work in pixels; leave --vae out")
    return None


# ----------------------------------------------------------------------------------------------------------------
# Model: the ADM U-Net (Dhariwal & Nichol 2021, section 3), with the names of guided-diffusion's parameters
# B pictures, C channels, N = H W cells, D width, h heads


class GroupNorm(nn.GroupNorm):
    """torch's, followed by a scale (1 + scale) and a shift (B, C, 1, 1) where they are given: adaptive group norm
    (Dhariwal & Nichol 2021, eq. 3). torch's kernel for bfloat16 in channels-last takes more than half of a forward pass
    on a CPU; for sampling there, the same from means over cells: one scale and one shift for each channel of each
    picture, in which those that are given are included."""

    def forward(self, x, scale=None, shift=None):
        if x.device.type != "cpu" or x.dtype != torch.bfloat16 or torch.is_grad_enabled():
            x = super().forward(x)
            return x if scale is None else torch.addcmul(shift, x, 1 + scale)
        cells = x.flatten(2).transpose(1, 2).float()  # (B, N, C), as they lie in memory; a copy
        means = cells.mean(dim=1), cells.square_().mean(dim=1)  # (B, C)
        centre, square = (part.unflatten(1, (self.num_groups, -1)).mean(dim=2, keepdim=True) for part in means)
        variance = square - centre.square()  # (B, groups, 1)
        slope = self.weight.view(self.num_groups, -1) * (variance.clamp(min=0) + self.eps).rsqrt()
        offset = self.bias.view(self.num_groups, -1) - centre * slope
        slope, offset = (part.flatten(1)[..., None, None] for part in (slope, offset))  # (B, C, 1, 1)
        if scale is not None:
            slope, offset = slope * (1 + scale), offset * (1 + scale) + shift
        return torch.addcmul(offset.to(x.dtype), x, slope.to(x.dtype))


def norm(width):
    return GroupNorm(32, width)


def silu(x):
    """In place, for it always comes after a norm, unless a gradient will need what was there."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class Conv(nn.Conv2d):
    """3 x 3, with a border of zeros. On a CPU, where a batch has fewer cells than channels, most of the time goes into
    laying out the weights anew, forward and twice backward; there it is one matrix product of each cell's neighbourhood
    with the weights as they lie in channels-last."""

    def __init__(self, width_in, width):
        super().__init__(width_in, width, 3, padding=1)

    def forward(self, x):
        count, _, height, width = x.shape
        laid_out = self.weight.is_contiguous(memory_format=torch.channels_last)
        if x.device.type != "cpu" or count * height * width >= self.in_channels or not laid_out:
            return super().forward(x)
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (B, H + 2, W + 2, C)
        around = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (D, 9 C), no copy
        return F.linear(torch.cat(around, dim=3), weight, self.bias).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); between the two halves the time scales and shifts what passes.

    resample: None, or a function that changes the size of a map; it is applied to both branches.
    """

    def __init__(self, width_in, width, embed_dim, dropout, scale_shift, resample=None):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(norm(width_in), nn.SiLU(), Conv(width_in, width))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, 2 * width if scale_shift else width))
        self.out_layers = nn.Sequential(norm(width), nn.SiLU(), nn.Dropout(dropout), zero(Conv(width, width)))
        self.skip_connection = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x, emb):
        h = silu(self.in_layers[0](x))
        if self.resample:
            h, x = self.resample(h), self.resample(x)
        h = self.in_layers[2](h)
        emb = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[0](h, scale, shift)
        else:
            h = self.out_layers[0](h + emb)
        return self.skip_connection(x) + self.out_layers[2:](silu(h))


class AttentionBlock(nn.Module):
    """Every cell of the map attends to all others, beside a shortcut."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm = norm(width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = zero(nn.Conv1d(width, width, 1))

    def forward(self, x):
        # A convolution of length 1 over cells is a linear layer, and as such several times as fast in channels-last.
        cells = self.norm(x).flatten(2).transpose(1, 2)  # (B, N, D)
        qkv = F.linear(cells, self.qkv.weight.squeeze(2), self.qkv.bias)
        # Within a head come its query, key and value: guided-diffusion's older order, which its published weights have.
        q, k, v = qkv.unflatten(2, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)  # (B, h, N, D/h) each
        mixed = attention(q, k, v).transpose(1, 2).flatten(2)
        mixed = F.linear(mixed, self.proj_out.weight.squeeze(2), self.proj_out.bias)
        return x + mixed.transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = Conv(width, width)

    def forward(self, x):
        return self.conv(double(x))


def halve(x):
    return F.avg_pool2d(x, 2)


def double(x):
    return F.interpolate(x, scale_factor=2, mode="nearest")


class TimedSequential(nn.Sequential):
    """Layers one after the other; those that want the time get it."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNetModel(nn.Module):
    """ADM's U-Net. Its constructor takes guided-diffusion's arguments, and `UNetModel(in_channels=32, out_channels=32)`
    is the write-up's model of 281M parameters: what the write-up leaves open has ADM's own habits as its default.

    image_size             side of the training maps; only attention_resolutions depend on it
    attention_resolutions  sides of the maps on which cells attend to each other (guided-diffusion's class wants
                           image_size divided by them; its command line, like the write-up and we, the sides)
    channel_mult           width of each resolution, highest first, in model_channels
    num_head_channels      width of a head; -1: num_heads of them at every width

    model(x, timesteps, y=None) -> (B, out_channels, H, W). x (B, in_channels, H, W) with sides that can be halved
    len(channel_mult) - 1 times; timesteps (B,), 0 to 999, not only whole ones; y (B,) class numbers.
    """

    def __init__(
        self,
        image_size=32,
        in_channels=3,
        model_channels=256,
        out_channels=3,
        num_res_blocks=2,
        attention_resolutions=(16, 8),
        dropout=0.0,
        channel_mult=(1, 1, 2, 4),
        num_classes=None,
        num_heads=1,
        num_head_channels=64,
        use_scale_shift_norm=True,
        resblock_updown=True,
    ):
        super().__init__()
        self.model_channels, self.checkpointing = model_channels, False
        embed_dim = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim)
        )
        self.label_emb = nn.Embedding(num_classes, embed_dim) if num_classes else None

        def block(width_in, width, resample=None):
            return ResBlock(width_in, width, embed_dim, dropout, use_scale_shift_norm, resample)

        def attend(width):
            return AttentionBlock(width, num_heads if num_head_channels == -1 else width // num_head_channels)

        def attention_at(size, width):
            return [attend(width)] if size in attention_resolutions else []

        # Down: at each resolution blocks of the same width, then half the size. What each leaves behind is a skip.
        widths = [int(model_channels * mult) for mult in channel_mult]
        width, size, skips = widths[0], image_size, [widths[0]]
        self.input_blocks = nn.ModuleList([TimedSequential(Conv(in_channels, width))])
        for level, level_width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.input_blocks.append(TimedSequential(block(width, level_width), *attention_at(size, level_width)))
                width = level_width
                skips.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(
                    TimedSequential(block(width, width, halve) if resblock_updown else Downsample(width))
                )
                skips.append(width)
                size //= 2

        self.middle_block = TimedSequential(block(width, width), attend(width), block(width, width))

        # Up: the mirror image, one block more at each resolution, since each takes in one skip, last in first out.
        self.output_blocks = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                layers = [block(width + skips.pop(), level_width), *attention_at(size, level_width)]
                width = level_width
                if level and i == num_res_blocks:
                    layers.append(block(width, width, double) if resblock_updown else Upsample(width))
                    size *= 2
                self.output_blocks.append(TimedSequential(*layers))
        self.out = nn.Sequential(norm(width), nn.SiLU(), zero(Conv(width, out_channels)))
        self.to(memory_format=torch.channels_last)

    def forward(self, x, timesteps, y=None):
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(self.time_embed[0].weight.dtype))
        if self.label_emb is not None:
            emb = emb + self.label_emb(y)

        def run(block, x):
            if self.checkpointing and self.training:  # forget what lies within a block, compute it again going back
                return checkpoint(block, x, emb, use_reentrant=False)
            return block(x, emb)

        skips = []  # channels-last weights make channels-last maps
        for block in self.input_blocks:
            x = run(block, x)
            skips.append(x)
        x = run(self.middle_block, x)
        for block in self.output_blocks:
            x = run(block, torch.cat((x, skips.pop()), dim=1))
        with torch.autocast(x.device.type, enabled=False):  # a rounded answer would be too coarse where all is noise
            return self.out(x.to(self.out[2].weight.dtype))


# ----------------------------------------------------------------------------------------------------------------
# Two objectives over one network. Each takes the same clean data x, the same noise and the same u in [0, 1), and says
# what each picture costs and at which time, 0 to 1 in its own direction.

TIMESTEPS = 1000


@functools.cache
def signal(device):
    """abar_t for t = 0 to 999: the part of the data's variance that is left after t + 1 steps of noise."""
    return alphas_cumprod(linear_betas(TIMESTEPS)).to(device)


def flow_loss(config, model, x, noise, u):
    """Straight paths: the network learns the velocity data - noise at x_t = (1 - t) noise + t data, t = u (Lipman et
    al. 2022, eq. 23 with sigma_min 0)."""
    error = model(flow_point(noise, x, u), (TIMESTEPS - 1) * u) - (x - noise)
    return error.square().mean(dim=(1, 2, 3)), u


def ddpm_loss(config, model, x, noise, u):
    """x_t = sqrt(abar_t) data + sqrt(1 - abar_t) noise; the network learns the noise (Ho et al. 2020, eq. 14), or v =
    sqrt(abar_t) noise - sqrt(1 - abar_t) data (Salimans & Ho 2022, appendix D)."""
    t = (TIMESTEPS * u).long()
    abar = signal(x.device)[t].view(-1, 1, 1, 1)
    x_t = abar.sqrt() * x + (1 - abar).sqrt() * noise
    target = noise if config.predict == "eps" else abar.sqrt() * noise - (1 - abar).sqrt() * x
    error = model(x_t, t.float()) - target
    return error.square().mean(dim=(1, 2, 3)), t / TIMESTEPS


LOSSES = {"flow": flow_loss, "ddpm": ddpm_loss}


def predicted_noise(config, output, x_t, abar):
    """What a DDPM network's output says of the noise in x_t."""
    if config.predict == "eps":
        return output
    return abar**0.5 * output + (1 - abar) ** 0.5 * x_t


# ----------------------------------------------------------------------------------------------------------------
# Training


def build_model(config, channels, size):
    """A fresh UNetModel for maps (channels, size, size). Raises UserError where the sizes do not go together."""
    sides = [size // 2**level for level in range(len(config.channel_mult))]
    if size % 2 ** (len(sides) - 1):
        raise UserError(f"maps of side {size} cannot be halved {len(sides) - 1} times; change --image-size")
    if strangers := set(config.attention_resolutions) - set(sides):
        found = ", ".join(map(str, sides))
        raise UserError(f"--attention-resolutions {min(strangers)}: the maps' sides are {found}; name one of them")
    if config.model_channels % 32 or config.model_channels % config.num_head_channels:
        raise UserError(f"--model-channels {config.model_channels} must be a multiple of 32 and of --num-head-channels")
    sizes = {name: getattr(config, name) for name in (*MODEL_FIELDS, "dropout")}
    model = UNetModel(size, in_channels=channels, out_channels=channels, **sizes)
    model.checkpointing = config.checkpointing
    return model


def blocks(model):
    """The parts that forward() runs one after the other, but for the embedding of the time and the last layer."""
    return *model.input_blocks, model.middle_block, *model.output_blocks


def compile_blocks(model):
    """Fuse what lies within each block: norms, silu, scale and shift become one pass over the map."""
    torch._dynamo.config.recompile_limit = 64  # all blocks share one forward(), and each needs it compiled anew
    for block in blocks(model):
        block.compile(dynamic=False)


def settle_optimizer(config, device):
    """config with --optimizer auto decided, so that the run's record says which it was."""
    if config.optimizer != "auto":
        return config
    eight = device.type == "cuda" and not config.fsdp and importlib.util.find_spec("torchao")
    return dataclasses.replace(config, optimizer="adamw8bit" if eight else "adamw")


def make_optimizer(config, model, device):
    """AdamW and the scaler that fp16 needs; the write-up's 8-bit AdamW where it is asked for. Raises UserError where
    what that needs is missing."""
    optimizer, scaler = common.make_optimizer(config, model, device)
    if config.optimizer == "adamw8bit":
        if config.fsdp:
            raise UserError("--optimizer adamw8bit does not go with --fsdp; take adamw")
        try:
            from torchao.optim import AdamW8bit
        except ImportError:
            raise UserError("--optimizer adamw8bit needs a package that is not here: pip install torchao") from None
        if device.type == "cpu" and not common.has_compiler():
            raise UserError(
                "--optimizer adamw8bit compiles its step; install a C++ compiler, such as g++, or take adamw"
            )
        parameters, betas = optimizer.param_groups[0]["params"], (0.9, config.beta2)
        optimizer = AdamW8bit(parameters, config.lr, betas, weight_decay=config.weight_decay)
    return optimizer, scaler


def train(config):
    """Train from nothing, or go on with --resume; what is left behind is a run folder. Raises UserError."""
    device, precision = common.set_up(config)
    config = settle_optimizer(config, device)
    for given, stage, flag, wanted in (
        (config.exclude_tags, "exclude", "--exclude-tags", 'tags, such as --exclude-tags "red hair" "blue hair"'),
        (config.start, "finetune", "--from", "a run of stage exclude, such as --from runs/base"),
    ):
        if given and config.stage != stage:
            raise UserError(f"{flag} goes with --stage {stage}; add it, or leave {flag} out")
        if config.stage == stage and not given:
            raise UserError(f"--stage {stage} wants {wanted}")
    if config.objective == "flow" and config.predict != "eps":
        raise UserError(f"--predict {config.predict} goes with --objective ddpm; add it, or leave --predict out")
    run = Run(config, "unet_ddpm")
    data, skipped = load_data(config)
    weights, new = None, ()
    if config.stage == "finetune" and run.resume:  # the run knows itself what was new, and needs its base no more
        told = load_tensors(run.state_path, header_only=True)[1] or {}
        new = set(data.names) - set(told.get("left_out", ()))
    elif config.stage == "finetune":
        weights, base = start_of(config, data)
        new = base["left_out"]
    chosen, left_out = choose(config, data, new)
    some = data.batch(chosen[:: max(1, len(chosen) // 256)])
    channels, size = some.shape[1:3]
    run.header = data.header | {"latent": [channels, size], "range": some.abs().max().item(), "left_out": left_out}
    vae = partner(config.vae, run.header, device)

    torch.manual_seed(config.seed)
    model = build_model(config, channels, size)
    if weights:
        load_into(model, weights, config.start)
    del weights
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    trained = common.parallelize(config, model, ema, device, blocks)
    optimizer, scaler = make_optimizer(config, model, device)
    if run.resume:
        run.load(model, ema, optimizer, scaler)
    if common.worth_compiling(config, device):
        compile_blocks(model)
    run.tell_skipped(skipped)
    print(run.banner(model, device, precision, f"{len(chosen):,} pictures, {len(left_out):,} left out"))
    if config.stage == "finetune" and run.step == 0:
        run.keep(ema)  # where the curve of adaptation begins

    with run.clock():
        while not run.done:
            costs, times = [], []
            index = common.batch_index(config, len(chosen), run.step)
            for rows in common.microbatches(config, trained):
                # Neither data nor noise knows the objective: both learn from the same.
                draw = Draw(config.batch_size, config.seed, run.step, 1, rows=rows)
                x = data.batch([chosen[i] for i in index[rows]], draw)
                noise, u = draw.randn(*x.shape[1:]), draw.rand()
                torch.manual_seed(generator(config.seed, run.step, rows.start, 2).initial_seed())  # dropout's
                with autocast(device, precision):
                    cost, t = LOSSES[config.objective](config, trained, x.to(device), noise.to(device), u.to(device))
                scaler.scale(cost.mean() / config.grad_accum).backward()
                costs.append(cost.detach())
                times.append(t)
            common.optimizer_step(config, run, model, ema, optimizer, scaler, torch.cat(costs), torch.cat(times))

            pictures, checkpoint = run.due()
            if pictures:
                run.keep(ema)
            if checkpoint:
                run.save(model, ema, optimizer, scaler)
            if pictures:
                drawn = sample(ema, config, DrawConfig(num=25, steps=20, precision=precision), run.header)
                run.save_samples(to_rgb(config, vae, drawn))
    return run.farewell()


# ----------------------------------------------------------------------------------------------------------------
# Sampling


@dataclasses.dataclass
class DrawConfig(common.DrawConfig):
    """How pictures are drawn from weights, for whatever purpose."""

    objective: str = option(
        "", "what weights without a header have learned, such as the write-up's [flow]", choices=("", "flow", "ddpm")
    )
    predict: str = option("", "what such DDPM weights predict [eps]", choices=("", "eps", "v"))
    vae: str = option("", "autoencoder that the weights were trained with")
    steps: int = option(50, "steps from noise to picture; ancestral may take up to 1000", low=1, high=TIMESTEPS)
    solver: str = option(
        "",
        "euler, heun or dpm for flow matching, ddim or ancestral for DDPM (default: the first)",
        choices=("", *common.SOLVERS, "ddim", "ancestral"),
    )
    eta: float = option(0.0, "ddim: fresh noise in its steps, 0 none, 1 as much as ancestral", low=0.0, high=1.0)
    clamp: bool | None = option(
        None, "DDPM: keep the data that each step predicts in the training data's range [where the checkpoint tells it]"
    )


@dataclasses.dataclass
class SampleConfig(DrawConfig):
    """Options of the verb sample."""

    out: str = option("samples/unet_ddpm.png", "picture of all samples in a grid", picture="still")
    each: str = option("", "folder for single pictures")
    gif: str = option("", "animation of the first pictures, from noise to data in at most 10 frames", picture="film")


def timesteps(steps):
    """`steps` of the 1,000 timesteps, falling, evenly spaced, 999 among them: the start really is noise (Lin et al.
    2023, section 3.3)."""
    return [round(TIMESTEPS * (steps - i) / steps) - 1 for i in range(steps)]


def ddpm_sample(predict, x, options, fresh, limit=None, watch=None):
    """From noise x at timestep 999 to data. predict(x, t, abar) -> the noise in x; fresh() -> noise for one step;
    options tell steps, solver and eta. watch(x, part) sees every state and how far it has come, 0 to 1.

    limit: the largest value that data take, as far as training looked. At timestep 999 the data's part in x is 0.006,
    and so whatever a network gets wrong about the noise is 160 times as wrong about the data: what leads out of their
    range is led back.
    """
    table = torch.cat((signal(torch.device("cpu")), torch.ones(1)))  # so that number -1 is the data
    for t, t_next in itertools.pairwise([*timesteps(options.steps), -1]):
        if watch:
            watch(x, 1 - (t + 1) / TIMESTEPS)
        abar, abar_next = table[t], table[t_next]
        eps = predict(x, t, abar)
        if limit is not None:
            eps = keep_in_range(x, eps, abar, limit)
        noise = fresh() if t_next >= 0 and (options.solver == "ancestral" or options.eta) else 0
        if options.solver == "ancestral":
            x = ddpm_step(x, eps, abar, abar_next, noise)
        else:
            x = ddim_step(x, eps, abar, abar_next, options.eta, noise)
    if watch:
        watch(x, 1.0)
    return x


def check_solver(config, options, header):
    """options with the solver filled in. Raises UserError where it, --eta or --clamp do nothing for these weights."""
    own = tuple(common.SOLVERS) if config.objective == "flow" else ("ddim", "ancestral")
    solver = options.solver or own[0]
    if solver not in own:
        why = f"--solver {solver} is not for these weights, which learned {config.objective}"
        raise UserError(f"{why}; use {' or '.join(own)}")
    if options.eta and solver != "ddim":
        raise UserError(f"--eta goes with --solver ddim, not {solver}; leave it out")
    if options.clamp is not None and config.objective == "flow":
        raise UserError("--clamp and --no-clamp are for DDPM; leave them out")
    if options.clamp and "range" not in header:
        raise UserError("--clamp: these weights do not say how far their data reach; leave it out")
    return dataclasses.replace(options, solver=solver)


@torch.no_grad()
def sample(model, config, options, header, watch=None):
    """Draw options.num maps (num, C, S, S) from noise; header tells "latent", (C, S), and the "range" of the data. Map
    i depends on the seed options.seed + i only. watch(x, part) sees the states of the first batch and how far each has
    come, 0 to 1. Raises UserError for options of the other objective."""
    device, options = next(model.parameters()).device, check_solver(config, options, header)
    precision = common.pick_precision(options.precision, device)
    channels, size = header["latent"]
    shape, limit = (channels, size, size), None if options.clamp is False else header.get("range")

    def ask(x, t):
        return model(x, torch.full((len(x),), float(t), device=device))

    drawn, last = [], options.seed + options.num
    with autocast(device, precision):  # one context for all steps: weights that want gradients are rounded once
        for first in range(options.seed, last, options.batch_size):
            seeds = range(first, min(first + options.batch_size, last))
            x, see = common.noise_for(seeds, shape, device), watch if first == options.seed else None
            if config.objective == "flow":
                times = [i / options.steps for i in range(options.steps + 1)]
                x = common.SOLVERS[options.solver](lambda x, t: ask(x, (TIMESTEPS - 1) * t), x, times, see)
            else:
                draws = [generator(seed, 1) for seed in seeds]

                def fresh(draws=draws):
                    return torch.stack([torch.randn(shape, generator=draw) for draw in draws]).to(device)

                def predict(x, t, abar):
                    return predicted_noise(config, ask(x, t), x, abar)

                x = ddpm_sample(predict, x, options, fresh, limit, see)
            drawn.append(x)
    return torch.cat(drawn)


def to_rgb(config, vae, x):
    """Maps as the network sees them -> RGB (B, 3, H, W) in [0, 1]."""
    if vae is None:
        pictures = F.pixel_shuffle(x, config.fold)
    else:
        with autocast(x.device, common.pick_precision(config.precision, x.device)):
            pictures = torch.cat([vae.decode(part) for part in x.split(16)])
    return (pictures / 2 + 0.5).clamp(0, 1)


def load_model(path, options):
    """(UNetModel in eval mode, Config, header) from a checkpoint of ours, or from a bare state dict of this layout, as
    the write-up's model_ema.pt; options tell the device, and of a bare one what it learned. Raises UserError if the
    file is broken, of another model, or learned something else than the options say."""
    weights, header = load_tensors(path)
    if header is None:
        if options.predict and options.objective != "ddpm":
            raise UserError(f"--predict {options.predict} goes with --objective ddpm; add it, or leave --predict out")
        first = weights.get("input_blocks.0.0.weight")
        channels = first.shape[1] if torch.is_tensor(first) and first.dim() == 4 else 32
        learned = {"objective": options.objective or "flow", "predict": options.predict or "eps", "vae": options.vae}
        settings = PRESETS["paper"] | learned
        header = {"system": "unet_ddpm", "latent": [channels, 32], "vae": [], "config": settings, "step": 0}
    if header.get("system") != "unet_ddpm":
        made_by = header.get("system", "another program")
        raise UserError(f"{path} is a checkpoint of {made_by}; name one of unet_ddpm.py's with --weights")
    try:
        config = Config(**header["config"])
        config = dataclasses.replace(config, device=options.device, precision=options.precision)
        common.check_config(config)
        channels, size = header["latent"]
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise UserError(f"{path} is no checkpoint of unet_ddpm.py (no usable {problem}); name another") from None
    for name in ("objective", "predict"):
        asked = getattr(options, name)
        if asked and asked != getattr(config, name):
            raise UserError(f"{path} learned --{name} {getattr(config, name)}, not {asked}; leave the option out")
    with torch.device("meta"):
        model = build_model(config, channels, size)
    load_into(model, weights, path)
    return model.to(common.pick_device(options.device)).eval(), config, header


def sample_command(options):
    """Write what sample() draws: a grid, and with --each and --gif single pictures and the way there."""
    model, config, header = load_model(common.find_weights(options.weights, "unet_ddpm"), options)
    vae = partner(options.vae or config.vae, header, next(model.parameters()).device)
    frames, watch = common.film(lambda x: common.make_grid(common.to_uint8(to_rgb(config, vae, x[:16]))), options.gif)
    pictures = common.to_uint8(to_rgb(config, vae, sample(model, config, options, header, watch)))
    common.write_samples(pictures, [f"{options.seed + i:06d}" for i in range(options.num)], options, frames)


# ----------------------------------------------------------------------------------------------------------------
# How far from the training set? The write-up measures against the set that was trained on: how well it was learned,
# not how much more than it.


def blur(x):
    """The binomial 5 x 5 filter of Laplacian pyramids (Burt & Adelson 1983), mirrored at the borders."""
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = (line[:, None] * line).expand(x.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=x.shape[1])


def laplacian_pyramid(x, smallest=16):
    """(B, C, S, S) -> what each resolution adds to the next lower one, finest first, and last the lowest itself: the
    first that is not larger than `smallest`, or that cannot be halved."""
    levels = []
    while x.shape[-1] > smallest and x.shape[-1] % 2 == 0:
        half = blur(x)[..., ::2, ::2]
        back = torch.zeros_like(x)
        back[..., ::2, ::2] = 4 * half
        levels.append(x - blur(back))
        x = half
    return [*levels, x]


def neighbourhoods(level, draw, count=128, side=7):
    """`count` random 7 x 7 patches of each picture of a level (B, 3, S, S) -> (B count, 147), each channel brought to
    mean 0 and deviation 1 over the whole set."""
    batch, _, size, _ = level.shape
    top, left = (torch.randint(size - side + 1, (batch, count), generator=draw) for _ in range(2))
    patches = level.unfold(2, side, 1).unfold(3, side, 1)  # (B, 3, S - 6, S - 6, 7, 7), a view
    patches = patches[torch.arange(batch)[:, None], :, top, left].flatten(0, 1)  # (B count, 3, 7, 7)
    std, mean = torch.std_mean(patches, dim=(0, 2, 3), keepdim=True)
    return ((patches - mean) / std.clamp(min=1e-6)).flatten(1)  # plain areas have none


def sliced_wasserstein(real, made, directions=128):
    """How far apart are two sets of equally many pictures (n, 3, S, S) in [0, 1]? The sliced Wasserstein distance of
    random patches times 1000, at each level of a Laplacian pyramid, finest first (Karras et al. 2018, section 5)."""
    levels = []
    for a, b in zip(laplacian_pyramid(real), laplacian_pyramid(made), strict=True):
        a, b = neighbourhoods(a, generator(0)), neighbourhoods(b, generator(0))
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


class Distance:
    """distance(pictures (n, 3, S, S) in [0, 1]) from n real ones; `floor`, that of n other real ones, and `floors`,
    what it is the mean of.

    Inception FID with the TorchScript file that the field shares (StyleGAN2-ADA's inception-2015-12-05.pt, which takes
    uint8 pictures and returns 2,048 features), else the sliced Wasserstein distance, the mean of its levels.
    """

    def __init__(self, data, real, num, inception=""):
        """data: numbers of pictures; real: function of such numbers -> RGB; num: pictures to compare. Raises UserError
        if they are too few."""
        order = torch.randperm(len(data), generator=generator(0, 9)).tolist()
        self.num = min(num, len(order) // 2)
        if self.num < 2:
            raise UserError(f"{len(order)} pictures are too few to measure a distance with; four is the least")
        self.network = load_inception(inception) if inception else None
        self.name = "Inception FID" if inception else "Sliced Wasserstein distance on Laplacian pyramids x 1000"
        self.real = self.features(real([data[i] for i in order[: self.num]]))
        self.floors = self.levels(real([data[i] for i in order[self.num : 2 * self.num]]))
        self.floor = sum(self.floors) / len(self.floors)

    def features(self, rgb):
        if self.network is None:
            return rgb.float().cpu()
        parts = [(part * 255).round().byte() for part in rgb.cpu().split(32)]
        with torch.no_grad():
            return torch.cat([self.network(part, return_features=True) for part in parts])

    def levels(self, rgb):
        """What the distance is the mean of: one number for each level of the pyramid, finest first."""
        compare = sliced_wasserstein if self.network is None else lambda a, b: [frechet(a, b)]
        return compare(self.real, self.features(rgb[: self.num]))

    def __call__(self, rgb):
        levels = self.levels(rgb)
        return sum(levels) / len(levels)


def load_inception(path):
    """The TorchScript feature network. Raises UserError if the file is none."""
    try:
        network = torch.jit.load(path, map_location="cpu").eval()
        with torch.no_grad():
            if network(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), return_features=True).dim() != 2:
                raise ValueError("it returns no table of features")
        return network
    except (RuntimeError, ValueError, OSError, AttributeError) as problem:
        reason = str(problem).strip().split("\n")[0][:100]
        raise UserError(f"{path} is no Inception network ({reason}); it should be inception-2015-12-05.pt") from None


def distance_for(config, vae, header, options, device):
    """The Distance to the pictures that a run was trained on, or to all of config.data if that is something else. With
    a VAE the real pictures, too, have been through it."""
    data, _ = load_data(config)
    if vae is not None and not common.is_same_network(common.fingerprint(vae), data.header["vae"]):
        raise UserError(f"{config.data} holds latents of another VAE than --vae; encode the pictures with this one")
    unseen = set(header.get("left_out", ()))
    if header.get("data") != data.header["data"]:
        print(f"note: {config.data} is not what these weights were trained on; all of it counts", file=sys.stderr)
        unseen = set()
    if list(data.batch([0]).shape[1:3]) != header["latent"]:
        raise UserError(f"the pictures of {config.data} do not come out at this model's size; name others with --data")
    chosen = [i for i, name in enumerate(data.names) if name not in unseen]
    return Distance(chosen, lambda i: to_rgb(config, vae, data.batch(i).to(device)), options.num, options.inception)


# ----------------------------------------------------------------------------------------------------------------
# Evaluation and comparison


@dataclasses.dataclass
class EvaluateConfig(DrawConfig):
    """Options of the verb evaluate."""

    data: str = option("", "pictures to compare with (default: those that were trained on)")
    num: int = option(1000, "pictures on either side", low=2)
    steps: int = option(20, "steps from noise to picture", low=1, high=TIMESTEPS)
    inception: str = option("", "TorchScript file of Inception features, for FID (default: sliced Wasserstein)")


def evaluate_command(options):
    """Print how far samples of a checkpoint are from the pictures that it was trained on."""
    model, config, header = load_model(common.find_weights(options.weights, "unet_ddpm"), options)
    check_solver(config, options, header)  # before anything is encoded or measured
    device = next(model.parameters()).device
    config = dataclasses.replace(config, data=options.data or config.data, vae=options.vae or config.vae)
    vae = partner(config.vae, header, device)
    distance = distance_for(config, vae, header, options, device)
    drawn = sample(model, config, dataclasses.replace(options, num=distance.num), header)
    away = distance(to_rgb(config, vae, drawn))
    print(f"{distance.name}, {distance.num} pictures in {options.steps} steps: {away:.1f} (floor {distance.floor:.1f})")


@dataclasses.dataclass
class CompareConfig(Config):
    """Options of the verb compare: those of train, for both, and what is measured."""

    out: str = option("runs/compare", "folder for both runs, the page and its picture")
    flow: str = option("", "run folder of flow matching (default: trained here)")
    ddpm: str = option("", "run folder of DDPM (default: trained here)")
    finetuned: tuple[str, ...] = option((), "run folders of stage finetune, for their curves of adaptation")
    num: int = option(256, "pictures on either side of each distance", low=2)
    inception: str = option("", "TorchScript file of Inception features, for FID (default: sliced Wasserstein)")


SAMPLING_STEPS, TRAINING_STEPS = (5, 10, 20, 50), 20  # for the curves by sampling step, and for all others


class Trained:
    """A run folder that is done: pictures from any of its marks, and how far they are from what it was trained on."""

    def __init__(self, folder, options):
        self.folder, self.options = Path(folder), options
        self.drawing = DrawConfig(device=options.device, precision=options.precision)
        self.model, config, self.header = load_model(self.folder / "model.safetensors", self.drawing)
        if not {"data", "left_out"} <= self.header.keys():
            raise UserError(f"{folder} is no run folder of train: its weights do not say what they learned from")
        self.config = dataclasses.replace(config, vae=options.vae or config.vae)
        self.device = next(self.model.parameters()).device
        self.vae = partner(self.config.vae, self.header, self.device)

    def distance(self):
        return distance_for(self.config, self.vae, self.header, self.options, self.device)

    def draw(self, path, steps, num):
        """RGB (num, 3, S, S) from the checkpoint at `path`, always from the same noise."""
        load_into(self.model, load_tensors(path)[0], path)
        options = dataclasses.replace(self.drawing, num=num, steps=steps)
        return to_rgb(self.config, self.vae, sample(self.model, self.config, options, self.header))

    def by_training(self, distance):
        """[(training step, distance)] of the averaged weights that were kept at marked parts of the budget."""
        marks = [path for path in sorted(self.folder.glob("marks/step_*.safetensors")) if path.stem[5:].isdigit()]
        return [(int(path.stem[5:]), distance(self.draw(path, TRAINING_STEPS, distance.num))) for path in marks]

    def losses(self):
        log = self.folder / "log.csv"
        if not log.exists():
            raise UserError(f"{self.folder} has no log.csv, of which the curve of its loss is drawn; bring it back")
        rows = csv.DictReader(log.read_text().splitlines())
        whole = [row for row in rows if None not in row.values()]  # a last line may have been cut short
        return [(int(row["step"]), float(row["loss"])) for row in whole]


MAY_DIFFER = "objective predict out minutes resume start device precision compile checkpoint_every".split()
HEEDED = set("out device precision vae predict resume".split())  # of train's options, beside --flow or --ddpm


def must_agree(runs):
    """Raise UserError unless all runs worked on the same pictures at one size; say what else differs."""
    parts = {"vae": "autoencoders", "data": "pictures", "latent": "sizes", "left_out": "left-out pictures"}
    first, *others = runs
    for other in others:
        for key, what in parts.items():
            if first.header[key] != other.header[key]:
                raise UserError(f"{first.folder} and {other.folder} had different {what}; compare equals")
        ours, theirs = (dataclasses.asdict(run.config) | {"steps": run.header["step"]} for run in (first, other))
        for key in ours:
            if key not in MAY_DIFFER and ours[key] != theirs[key]:
                names = f"{first.folder} and {other.folder}"
                print(f"note: {names} differ in --{key.replace('_', '-')}: {ours[key]}, {theirs[key]}", file=sys.stderr)


def given_runs(config):
    """The runs that --flow and --ddpm name, by objective, and those of --finetuned. Raises UserError where they do not
    go together, before anything is trained."""
    if config.inception:
        load_inception(config.inception)
    if config.objective != "flow":
        raise UserError("compare is of both objectives; leave --objective out")
    if config.stage == "finetune":
        raise UserError("compare takes runs of stage finetune by --finetuned; train them first, one of each objective")
    if config.fsdp:
        raise UserError("compare draws in one process; leave --fsdp out")
    runs = {name: Trained(getattr(config, name), config) for name in LOSSES if getattr(config, name)}
    plain = dataclasses.asdict(common.make_config(CompareConfig, {}, PRESETS))
    if runs and (idle := common.differences(config, plain, {f.name for f in dataclasses.fields(Config)} - HEEDED)):
        raise UserError(f"options of training do nothing beside a run that is there, which sets them; keep to {idle}")
    for name, run in runs.items():
        if run.config.objective != name:
            raise UserError(f"{run.folder} learned {run.config.objective}; name a run of {name} with --{name}")
    adapting = [Trained(folder, config) for folder in config.finetuned]
    for run in adapting:
        if run.config.stage != "finetune":
            raise UserError(f"{run.folder} is of stage {run.config.stage}; --finetuned wants runs of stage finetune")
    if len({run.config.objective for run in adapting}) < len(adapting):
        raise UserError("--finetuned takes one run of each objective; leave one out")
    if adapting:
        must_agree(adapting)
    if len(runs) == 1:  # the other will be trained on what is there now
        (run,) = runs.values()
        if load_data(run.config)[0].header["data"] != run.header["data"]:
            raise UserError(f"{run.config.data} is not what {run.folder} was trained on; bring its pictures back")
    return runs, adapting


def compare_command(config):
    """Train both objectives with one budget, or take two runs, and write index.html and compare.png into --out.

    Flow matching goes first, in half of --minutes if the budget is one of time; DDPM then makes as many steps, on the
    same pictures with the same noise. Where one run is given, the other is trained with its settings, --predict apart.
    """
    runs, adapting = given_runs(config)
    near = adapting[0].distance() if adapting else None
    out, settings = Path(config.out), Config(**{f.name: getattr(config, f.name) for f in dataclasses.fields(Config)})
    budget = dict(minutes=config.minutes and config.minutes / 2, steps=config.steps)
    for name in [name for name in LOSSES if name not in runs]:
        if runs:  # the one that is there sets the measure
            told = next(iter(runs.values())).header
            settings, budget = Config(**told["config"]), dict(minutes=None, steps=told["step"])
        folder = out / name
        begun = (folder / "state.safetensors").exists()
        own = dict(objective=name, out=str(folder), resume=config.resume and begun, device=config.device, fsdp=False)
        own |= dict(vae=config.vae or settings.vae, predict=config.predict if name == "ddpm" else "eps")
        code = train(dataclasses.replace(settings, **budget | own))
        if code:
            return code
        runs[name] = Trained(folder, config)
    runs = {name: runs[name] for name in LOSSES}
    must_agree(list(runs.values()))
    losses = {name: run.losses() for name, run in runs.items()}

    distance = runs["flow"].distance()
    rows, by_sampling, finest = [], {}, {}
    for name, run in runs.items():
        by_sampling[name], finest[name] = [], []
        for steps in SAMPLING_STEPS:
            rgb = run.draw(run.folder / "model.safetensors", steps, distance.num)
            levels = distance.levels(rgb)
            by_sampling[name].append((steps, sum(levels) / len(levels)))
            finest[name].append((steps, levels[0]))
            rows.append((f"{name}, {steps} steps", common.to_uint8(rgb[:8])))
    by_training = {name: run.by_training(distance) for name, run in runs.items()}
    charts = [
        Chart(f"{distance.name}, by sampling steps", by_sampling, distance.floor),
        Chart(f"{distance.name}, by training steps", by_training, distance.floor),
    ]
    if not config.inception:
        title = "Its finest level alone, which tells how sharp pictures are, by sampling steps"
        charts.append(Chart(title, finest, distance.floors[0]))
    charts.append(Chart("Loss, of two different targets, by training steps", losses))
    if adapting:
        curves = {run.config.objective: run.by_training(near) for run in adapting}
        title = f"Distance from {near.num} of the left-out pictures, by finetuning steps"
        charts.append(Chart(title, curves, near.floor, dict(zip(LOSSES, common.COLOURS))))
    common.save_picture(poster(rows, charts), out / "compare.png")
    write_report(out, runs, distance, charts)
    print(f"open {out}/index.html")


def poster(rows, charts):
    """Rows of samples, [(label, pictures)], the first half on the left and the other on the right, above the charts."""
    half, font, drawn = len(rows) // 2, ImageFont.load_default(13), [chart.draw() for chart in charts]
    grids = [common.make_grid(pictures, 8) for _, pictures in rows]
    width, way = drawn[0].width, Image.Resampling
    times = width // grids[0].width or width / grids[0].width  # small pictures grow by whole pixels, large ones shrink
    size = round(times * grids[0].width), round(times * grids[0].height)
    grids = [grid.resize(size, way.NEAREST if times >= 1 else way.LANCZOS) for grid in grids]
    across, down = max(grids[0].width, drawn[0].width) + 16, grids[0].height + 22
    sheet = Image.new("RGB", (2 * across, half * down + math.ceil(len(drawn) / 2) * drawn[0].height + 16), "white")
    pen = ImageDraw.Draw(sheet)
    for k, ((label, _), grid) in enumerate(zip(rows, grids)):
        x, y = k // half * across, k % half * down
        pen.text((x + 4, y + 3), label, "black", font)
        sheet.paste(grid, (x, y + 22))
    for k, chart in enumerate(drawn):
        sheet.paste(chart, (k % 2 * across, half * down + 16 + k // 2 * chart.height))
    return sheet


REPORT = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>Flow matching against DDPM</title>
<style>body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #222 }} img {{ max-width: 100% }}
td {{ padding: 0 1rem 0 0; text-align: right }}</style>
<h1>Flow matching against DDPM</h1><p>{what}</p><p>{measure}: {num} samples against as many training pictures, which
have been through the VAE where there is one. Curves by training and finetuning steps: {steps} sampling steps.</p>
{tables}
<p><img src="data:image/png;base64,{picture}" alt="samples and curves"></p></html>
"""


def write_report(out, runs, distance, charts):
    """index.html: compare.png and its numbers in one file, without scripts."""
    what = "; ".join(f"{name}: {run.folder}, {run.header['step']:,} steps" for name, run in runs.items())
    page = REPORT.format(
        what=html.escape(what),
        measure=html.escape(distance.name),
        num=distance.num,
        steps=TRAINING_STEPS,
        tables="".join(chart.table() for chart in charts),
        picture=base64.b64encode((out / "compare.png").read_bytes()).decode(),
    )
    common.save_text(out / "index.html", page)


# ----------------------------------------------------------------------------------------------------------------
# Command line

VERBS = {
    "train": (train, Config, PRESETS, "train, e.g. python unet_ddpm.py train --objective ddpm"),
    "sample": (sample_command, SampleConfig, None, "draw pictures, e.g. python unet_ddpm.py sample --steps 20"),
    "evaluate": (evaluate_command, EvaluateConfig, None, "distance of samples from the training set"),
    "compare": (compare_command, CompareConfig, PRESETS, "both objectives side by side, e.g. compare --minutes 20"),
    "encode": (encode_command, EncodeConfig, None, "a folder's latents, once, e.g. encode --data DIR --vae FILE"),
    "export": common.export("unet_ddpm"),
}


def main(argv=None):
    """The command line: the words after the file's name, or sys.argv's; returns the exit code."""
    return common.run_command_line(__doc__, VERBS, argv)


if __name__ == "__main__":
    sys.exit(main())
