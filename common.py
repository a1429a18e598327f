"""What two or more of the five systems share: first the maths, then the plumbing.

The maths is what the write-ups have in common: positions (RoPE, sin-cos tables), the timestep embedding, AdaLN's
modulation, attention, and rectified flow. The plumbing is what no reader opened this repository for and every user
leans on: options, data, precision, checkpoints, run folders, pictures. Each model file imports from here and from
nowhere else in the repository.

Shape letters: B batch, C channels, H W height and width, N tokens, D width, h heads.
"""

import argparse
import base64
import concurrent.futures
import contextlib
import csv
import ctypes
import dataclasses
import functools
import html
import itertools
import json
import math
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import types
import typing
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------
# Positions and time


def sincos_table(positions, dim, period=10_000.0):
    """Sinusoids of `positions` (any shape, float) at dim/2 frequencies from 1 down to 1/period.

    Returns (angle cosines, angle sines), each positions.shape + (dim/2,), float32. Every position code of this
    repository is built from these two: the timestep embedding, fixed position embeddings, RoPE (Vaswani et al. 2017).
    """
    exponent = torch.arange(dim // 2, device=positions.device, dtype=torch.float32) / (dim // 2)
    angles = positions.float()[..., None] * period**-exponent
    return angles.cos(), angles.sin()


def timestep_embedding(t, dim):
    """(B,) timesteps -> (B, dim): cosines first, then sines, always in float32.

    Under autocast a bfloat16 sinusoid would mangle t; the caller feeds t at the scale its source uses.
    """
    return torch.cat(sincos_table(t, dim), dim=-1)


def sincos_2d(rows, columns, dim):
    """Fixed position embedding of a map of tokens, (len(rows) * len(columns), dim), row-major: cosines and sines of the
    row, then cosines and sines of the column. rows, columns: 1-D tensors of positions."""
    by_row, by_column = (torch.cat(sincos_table(positions, dim // 2), dim=-1) for positions in (rows, columns))
    shape = (len(rows), len(columns), dim // 2)
    return torch.cat((by_row[:, None].expand(shape), by_column[None, :].expand(shape)), dim=-1).flatten(0, 1)


def rope_2d(rows, columns, head_dim):
    """Rotary tables for a map of tokens: cos and sin, each (len(rows) * len(columns), head_dim/2), row-major.

    rows, columns: 1-D tensors of positions. The first half of each head turns with the row, the second half with the
    column (the 2-D form of RoFormer, Su et al. 2021, eq. 34).
    """
    shape = (len(rows), len(columns), head_dim // 4)
    tables = []
    for by_row, by_column in zip(sincos_table(rows, head_dim // 2), sincos_table(columns, head_dim // 2)):
        both = by_row[:, None].expand(shape), by_column[None, :].expand(shape)
        tables.append(torch.cat(both, dim=-1).flatten(0, 1))
    return tuple(tables)


def unpair(x, head_dim):
    """(heads * head_dim, ...), rows of what makes queries or keys -> the same with those of each head in the order
    0 2 4 ... 1 3 5 ...

    Published weights mean RoPE to turn neighbouring channels, 0 and 1, 2 and 3, .... To pick these apart in each token
    is slow (a fifth of an attention layer's training on a CPU), and q.k does not ask for the order of channels.
    """
    return x.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def apply_rope(x, rope):
    """Rotate pairs of channels of x (..., N, head_dim) by the angles of `rope`, two tables (N, head_dim/2). A pair is a
    channel of the first half and its counterpart in the second: what `unpair` makes of neighbours.

    (x0, x1) -> (x0 cos - x1 sin, x0 sin + x1 cos): q.k then depends on the difference of two positions only.
    """
    cos, sin = (table.to(x.dtype) for table in rope)
    x0, x1 = x.chunk(2, dim=-1)
    return torch.cat((x0 * cos - x1 * sin, x0 * sin + x1 * cos), dim=-1)


# ----------------------------------------------------------------------------------------------------------------
# Transformer parts


def rms_norm(x, weight):
    """x / rms(x) * weight over the last axis, computed in float32 (Zhang & Sennrich 2019, eq. 4)."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6) * weight).to(x.dtype)


class RMSNorm(nn.Module):
    """rms_norm with a weight of its own."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return rms_norm(x, self.weight)


class TimestepEmbedder(nn.Module):
    """(B,) times -> (B, width): sinusoid of `scale` times t, then a two-layer MLP."""

    def __init__(self, width, scale=1.0):
        super().__init__()
        self.scale = scale
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        return self.mlp(timestep_embedding(self.scale * t.float(), 256).to(self.mlp[0].weight.dtype))


def modulate(x, shift, scale):
    """AdaLN: x (B, N, D), scaled and shifted as the condition says by (B, D) each (Peebles & Xie 2022, section 3.2)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def zero(module):
    """A module that says 0 until it has learned otherwise: each block then starts as its shortcut."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v for (B, h, N, d), every token attending to every token.

    On a GPU torch's fused kernel. On a CPU in bfloat16 the two plain matrix products are two to five times as fast as
    that kernel at the 100 to 400 tokens we use (`python tests/bench.py attention`).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


# ----------------------------------------------------------------------------------------------------------------
# Rectified flow: a straight line from `start` (t = 0) to `end` (t = 1). Which end is noise is each file's to say.


def flow_point(start, end, t):
    """x_t = (1 - t) start + t end; t (B,) in [0, 1] (Liu et al. 2022, eq. 1)."""
    t = t.view(-1, *[1] * (start.dim() - 1))
    return (1 - t) * start + t * end


def flow_euler(velocity, x, times, watch=None):
    """Integrate dx/dt = velocity(x, t) along `times` (floats, rising or falling) with Euler's steps.

    velocity(x, t) takes the state and a float. watch(x, t), if given, sees every state, the first and last included.
    """
    for t, t_next in itertools.pairwise(times):
        if watch:
            watch(x, t)
        x = x + (t_next - t) * velocity(x, t)
    if watch:
        watch(x, times[-1])
    return x


def flow_heun(velocity, x, times, watch=None):
    """As flow_euler, with Heun's second-order steps; the last one is Euler's, since at the end of the line
    (end - x_t) / (1 - t) is 0 / 0 for a network that predicts the end point (Karras et al. 2022, algorithm 1)."""
    for t, t_next in itertools.pairwise(times):
        if watch:
            watch(x, t)
        v = velocity(x, t)
        if t_next != times[-1]:
            v = (v + velocity(x + (t_next - t) * v, t_next)) / 2
        x = x + (t_next - t) * v
    if watch:
        watch(x, times[-1])
    return x


def flow_dpm(velocity, x, times, watch=None):
    """As flow_euler, with the second-order steps of DPM-Solver++ (Lu et al. 2022, algorithm 2). What is followed is the
    data that the network sees, x + (end - t) velocity, which changes less than the velocity does: its value for a step
    is read off the straight line through the last two, drawn over the logarithm of signal to noise. One call of
    velocity per step, like Euler, and one more in the first step, which is Heun's: on that scale pure noise is
    infinitely far away, and no line can be drawn from there. Nor to the end, whose step is Euler's."""

    def log_signal_to_noise(noise):
        return math.log((1 - noise) / noise) if noise < 1 else -math.inf

    end, before = times[-1], None
    for t, t_next in itertools.pairwise(times):
        if watch:
            watch(x, t)
        noise, noise_next, v = abs(end - t), abs(end - t_next), velocity(x, t)
        data = x + (end - t) * v
        if before is None and t_next != end:
            x = x + (t_next - t) * (v + velocity(x + (t_next - t) * v, t_next)) / 2
        else:
            guess, here = data, log_signal_to_noise(noise)
            if t_next != end:
                width, width_before = log_signal_to_noise(noise_next) - here, here - log_signal_to_noise(before[0])
                guess = data + width / width_before / 2 * (data - before[1])
            x = noise_next / noise * x + (1 - noise_next / noise) * guess
        before = noise, data
    if watch:
        watch(x, times[-1])
    return x


SOLVERS = {"euler": flow_euler, "heun": flow_heun, "dpm": flow_dpm}

# ----------------------------------------------------------------------------------------------------------------
# DDPM: noise in a thousand small steps (Ho et al. 2020). abar is the part of the data's variance that is left:
# x_t = sqrt(abar_t) data + sqrt(1 - abar_t) noise. After the last step back abar is 1.


def linear_betas(num_steps, start=1e-4, end=2e-2):
    """(num_steps,) float32: the part of the variance that each step replaces by noise (section 4)."""
    return torch.linspace(start, end, num_steps, dtype=torch.float32)


def alphas_cumprod(betas):
    """abar_t = product of 1 - beta over the steps up to t (section 2)."""
    return (1 - betas).cumprod(dim=0)


def ddpm_step(x, eps, abar, abar_next, noise):
    """From x_t towards data, down to abar_next: a draw from the posterior q(x_next | x_t, x_0) (eq. 6 and 7).

    eps: the noise that the network sees in x_t; noise: fresh, standard normal, 0 in the last step. abar, abar_next:
    floats or 0-d tensors. Whether one or many of the thousand steps lie between the two makes no difference.
    """
    data = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
    alpha = abar / abar_next  # of the one step that leads from there to here
    of_data, of_x = abar_next**0.5 * (1 - alpha) / (1 - abar), alpha**0.5 * (1 - abar_next) / (1 - abar)
    variance = (1 - abar_next) / (1 - abar) * (1 - alpha)
    return of_data * data + of_x * x + variance**0.5 * noise


def ddim_step(x, eps, abar, abar_next, eta=0.0, noise=0):
    """As ddpm_step, but the noise that is taken out is put back in (Song et al. 2020, eq. 12). eta 0: nothing is
    random; eta 1: as much fresh noise as in ddpm_step."""
    data = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
    sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
    return abar_next**0.5 * data + (1 - abar_next - sigma**2) ** 0.5 * eps + sigma * noise


def keep_in_range(x, eps, abar, limit):
    """The noise eps that a network sees in x_t, led back to where the data it leaves lie in [-limit, limit].

    Where abar is next to 0 the data are a small difference of large numbers, and an error in eps is many times as large
    in them (led back in the code of Ho et al. 2020, and since).
    """
    data = ((x - (1 - abar) ** 0.5 * eps) / abar**0.5).clamp(-limit, limit)
    return (x - abar**0.5 * data) / (1 - abar) ** 0.5


# ----------------------------------------------------------------------------------------------------------------
# Errors and options


class UserError(Exception):
    """A user's mistake: what is wrong and what to do, in one line. The command line prints it and exits with 2."""


def option(default, help, choices=None, low=None, high=None, positional=False, flag=None, picture=""):
    """A dataclass field that is also a command line option: its reason, and the values it may take. A positional one
    takes the words that follow the verb; `flag` is its name where that is not the field's; `picture` says that it names
    a file for a "still" or a "film"."""
    limits = {"help": help, "choices": choices, "low": low, "high": high, "picture": picture}
    return dataclasses.field(default=default, metadata=limits | {"positional": positional, "flag": flag})


@dataclasses.dataclass
class TrainConfig:
    """What every system's training shares. Each file's own Config adds its data, model and objective."""

    data: str = option("drawn", "drawn: faces that Pillow draws here and now; or a folder of pictures")
    out: str = option("", "run folder (default: runs/ and the file's name)")
    minutes: float | None = option(None, "stop after this many minutes of training", low=0.01)
    steps: int | None = option(None, "stop after this many optimizer steps; given alone, no clock counts", low=1)
    batch_size: int = option(32, "pictures per optimizer step, accumulation included", low=1)
    grad_accum: int = option(1, "passes that one optimizer step is divided into", low=1)
    lr: float = option(3e-3, "peak learning rate", low=0.0)
    warmup: float = option(0.05, "rise of the learning rate: part of the budget, or, from 1 on, steps", low=0.0)
    decay: str = option(
        "cosine",
        "after the warm-up: fall to zero along a cosine or a line, or stay",
        choices=("cosine", "linear", "none"),
    )
    beta2: float = option(0.95, "AdamW's memory for squared gradients", low=0.0, high=0.9999)
    weight_decay: float = option(0.0, "the optimizer's pull of weights towards zero", low=0.0)
    grad_clip: float = option(1.0, "longest gradient that is not shortened", low=1e-9)
    ema: float = option(0.999, "longest memory of the averaged weights that are sampled from", low=0.0, high=0.999999)
    seed: int = option(0, "of weights, data order, noise and crops", low=0, high=2**63)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = option("auto", "of the matrix products", choices=("auto", "fp32", "bf16", "fp16"))
    compile: bool | None = option(None, "fuse the blocks with torch.compile (default: where it pays within the budget)")
    checkpoint_every: int = option(500, "steps between checkpoints", low=1)
    fsdp: bool = option(False, "under torchrun: shard weights, gradients, moments and averages over the processes")
    resume: bool = option(False, "go on from the last checkpoint in --out, exactly")


@dataclasses.dataclass
class LoadConfig:
    """What every verb asks that needs weights."""

    weights: str = option("", "checkpoint (default: that in runs/ and the file's name, else that in weights/)")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))


@dataclasses.dataclass
class DrawConfig(LoadConfig):
    """What drawing pictures from weights shares. Each file's own DrawConfig adds its ways to draw."""

    precision: str = option("auto", "of the matrix products", choices=("auto", "fp32", "bf16", "fp16"))
    num: int = option(16, "pictures", low=1)
    steps: int = option(50, "steps from noise to picture", low=1)
    seed: int = option(0, "picture i starts from the noise of seed + i", low=0, high=2**62)
    batch_size: int = option(64, "pictures at a time", low=1)


def flag_of(field):
    return field.metadata["flag"] or "--" + field.name.replace("_", "-")


def flag_named(config, name):
    """What sets the field `name` of a config on the command line."""
    return next(flag_of(field) for field in dataclasses.fields(config) if field.name == name)


def check_config(config):
    """Raise UserError for a value out of its range, naming the option."""
    for field in dataclasses.fields(config):
        value, limits = getattr(config, field.name), field.metadata
        values = value if isinstance(value, tuple | list) else (value,)
        for v in values:
            flag = flag_of(field)
            if limits["choices"] and v not in limits["choices"]:
                raise UserError(f"{flag} {v}: choose one of {', '.join(limits['choices'])}")
            # Written so that nan, which is neither small nor large, fails too.
            if v is not None and limits["low"] is not None and not v >= limits["low"]:
                raise UserError(f"{flag} {v}: must be at least {limits['low']}")
            if v is not None and limits["high"] is not None and not v <= limits["high"]:
                raise UserError(f"{flag} {v}: must be at most {limits['high']}")
            if isinstance(v, float) and not math.isfinite(v):
                raise UserError(f"{flag} {v}: must be a finite number")
            if v and limits["picture"]:  # now, rather than when all is drawn
                picture_format(v, limits["picture"] == "film")


def differences(config, before, names):
    """Where `before`, the config in a checkpoint's header, is not ours, in fields that `names` has: at most three of
    them, as "--depth 6 (not 12), --patch-size 8 (not 4)". An option that is younger than the checkpoint was at its
    default."""
    fields = [field for field in dataclasses.fields(config) if field.name in names]
    then, now = {field.name: field.default for field in fields}, dataclasses.asdict(config)
    then, now = json.loads(json.dumps([then | before, now]))  # as a header has them, without tuples
    changed = [field for field in fields if then[field.name] != now[field.name]]

    def shown(value):
        return "none" if value in ("", None, []) else value

    return ", ".join(f"{flag_of(f)} {shown(then[f.name])} (not {shown(now[f.name])})" for f in changed[:3])


class OneLineParser(argparse.ArgumentParser):
    """argparse, except that a mistake is one line."""

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def add_options(parser, config_class, preset):
    """One --flag per field of a dataclass; only what is given on the command line ends up in the namespace. preset: the
    values that stand in for the fields' defaults."""
    for field in dataclasses.fields(config_class):
        kind, extra = field.type, {}
        if isinstance(kind, types.UnionType):  # `float | None` is a float that may be absent
            kind = typing.get_args(kind)[0]
        if typing.get_origin(kind) is tuple:
            kind, extra = typing.get_args(kind)[0], {"nargs": "+"}
        if kind is bool:
            extra = {"action": argparse.BooleanOptionalAction}
        else:
            extra |= {"type": kind, "metavar": "|".join(field.metadata["choices"] or [kind.__name__.upper()])}
        default = preset.get(field.name, field.default)
        shown = f" [{default}]" if default or (default == 0 and default is not False) else ""
        help = (field.metadata["help"] + shown).replace("%", "%%")
        name = flag_of(field)
        if field.metadata["positional"]:
            name, extra = field.name, {"nargs": "*"}
        elif field.metadata["flag"]:
            extra["dest"] = field.name
        parser.add_argument(name, default=argparse.SUPPRESS, help=help, **extra)


def make_config(config_class, given, presets=None):
    """Config from a preset's values and, over them, the given ones. A budget that is given lifts the preset's."""
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    preset = dict((presets or {}).get(given.pop("preset", "demo"), {}))
    for budgets in ({"minutes", "steps", "epochs"}, {"vae_minutes", "vae_steps"}):
        if budgets & given.keys():
            preset = {k: v for k, v in preset.items() if k not in budgets}
    config = config_class(**(preset | given))
    check_config(config)
    return config


def run_command_line(doc, verbs, argv=None):
    """Run `python FILE.py VERB [options]` and return the exit code.

    verbs: name -> (function of a config, config class, presets or None, one line of help).
    """
    parser = OneLineParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsers = parser.add_subparsers(dest="verb", metavar="VERB")
    for name, (_, config_class, presets, help) in verbs.items():
        sub = parsers.add_parser(name, help=help, description=help)
        if presets:
            sub.add_argument("--preset", choices=list(presets), default="demo", help="sizes and settings [demo]")
        add_options(sub, config_class, (presets or {}).get("demo", {}))
    keep_freed_memory()
    try:
        given = vars(parser.parse_args(argv))
        verb = given.pop("verb")
        if verb is None:
            parser.print_help()
            return 0
        function, config_class, presets, _ = verbs[verb]
        if "TORCHELASTIC_RUN_ID" in os.environ and verb not in ("train", "train-vae"):
            raise UserError(f"{verb} runs in one process; start it with python instead of torchrun")
        code = function(make_config(config_class, given, presets)) or 0
    except (UserError, OSError) as problem:  # an OSError that nobody foresaw, such as a disk that fills up meanwhile
        code = fail(problem, problem)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as problem:
        if is_out_of_memory(problem):
            code = fail(problem, "out of memory; lower --batch-size or the pictures' size, or raise --grad-accum")
        elif has_lost_the_others(problem):
            reason = str(problem).strip().split("\n")[0][:200]
            code = fail(problem, f"lost the other processes ({reason}); if one of them ended, it has said why")
        else:
            raise
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    if dist.is_initialized():  # gloo's threads now and then abort an orderly end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def is_out_of_memory(problem):
    """On a CPU torch says so in a plain RuntimeError."""
    return isinstance(problem, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(problem)


def has_lost_the_others(problem):
    """So does gloo: "[.../gloo/transport/tcp/pair.cc:547] Connection closed by peer"."""
    return "RANK" in os.environ and (isinstance(problem, dist.DistError) or "gloo" in str(problem).lower())


def fail(problem, line):
    """Say why the program ends, to the user and, under torchrun, to it for its report. Returns the exit code."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # which ends all once one has ended, and stumbles over half a report
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    get_error_handler().record_exception(problem)
    # Before the processes have met, those of a host have the same to say, and its first one says it.
    if dist.is_initialized() or "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["LOCAL_RANK"] == "0":
        print(f"error in process {rank()}: {line}" if rank() else f"error: {line}", file=sys.stderr)
    return 2


# ----------------------------------------------------------------------------------------------------------------
# Device, precision, randomness


def keep_freed_memory():
    """On Linux, tell the C library to keep freed memory. It would hand each large tensor back to the kernel, which
    clears every page before it lends it again: more than half of the time of sampling on a CPU."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**31 - 1)


def pick_device(name):
    """torch.device for auto, cpu, cuda or mps. Raises UserError where the machine has none."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if has[kind])
    if not has[name]:
        raise UserError(f"--device {name}: torch finds no such device here; leave --device out to use what there is")
    return torch.device(name)


def pick_precision(name, device):
    """fp32, bf16 or fp16; auto is bf16 wherever the hardware multiplies it natively, else fp16 on a GPU, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        native = getattr(torch.cpu, "get_capabilities", dict)()  # a torch too old to say gets fp32
        return "bf16" if native.get("avx512_bf16") or native.get("amx_bf16") else "fp32"
    return "fp32"


def autocast(device, precision):
    """Context in which matrix products run in `precision`; weights, norms and losses stay in float32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def generator(*key, device="cpu"):
    """A torch.Generator that is a function of `key` (whole numbers) alone.

    Every draw of a training step comes from generator(seed, step, ...): the step number is then the whole random
    state, and a resumed run sees the crops, the noise and the order of pictures that it would have seen.
    """
    state = np.random.SeedSequence(key[0], spawn_key=key[1:]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state))


def noise_for(seeds, shape, device):
    """(len(seeds), *shape) standard normal; picture i depends on seeds[i] only, whatever the batch and the device."""
    return torch.stack([torch.randn(shape, generator=generator(seed)) for seed in seeds]).to(device)


class Draw:
    """Random numbers for a whole batch, of which one pass of one process keeps its own rows: what a picture meets
    depends on its place in the batch alone, whatever --grad-accum and the number of processes.

    count: pictures in the batch; rows: a slice of them, else all; key and device as in generator().
    """

    def __init__(self, count, *key, rows=slice(None), device="cpu"):
        self.count, self.rows, self.generator = count, rows, generator(*key, device=device)

    def randn(self, *shape):
        """(rows, *shape) standard normal."""
        return self.own(torch.randn, self.count, *shape)

    def rand(self, *shape):
        """(rows, *shape) uniform in [0, 1)."""
        return self.own(torch.rand, self.count, *shape)

    def randint(self, high):
        """(rows,) whole numbers below `high`."""
        return self.own(torch.randint, high, (self.count,))

    def own(self, law, *shape):
        return law(*shape, generator=self.generator, device=self.generator.device)[self.rows]


# ----------------------------------------------------------------------------------------------------------------
# Many processes. `torchrun --nproc-per-node N FILE.py train` starts N copies of the program. Each goes through the
# same steps with its rows of every batch; torch exchanges the gradients; the first one alone prints and writes. What
# exchanges something (all_gather, all_reduce_max, full_tensors, and with them a Run's due, save and farewell) must be
# called by all, so nothing that processes may see differently, such as a clock or a Ctrl-C, may decide whether it is.


def rank():
    """This process's number, 0 to world() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def set_up(config):
    """(device, precision) that this process trains with; under torchrun, meet the others first. Raises UserError."""
    # A cluster may set some of these for its own ends; torchrun sets them all.
    launched = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= os.environ.keys()
    if not launched and os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("WORLD_SIZE is set, but not by torchrun; start the processes with torchrun, or unset it")
    if config.fsdp and not launched:
        raise UserError("--fsdp shards over processes; start them with torchrun --nproc-per-node N FILE.py train ...")
    passes = config.grad_accum * (int(os.environ["WORLD_SIZE"]) if launched else 1)
    if config.batch_size % passes:
        batch = f"{flag_named(config, 'batch_size')} {config.batch_size}"
        raise UserError(f"{batch} is no multiple of {passes}, --grad-accum times processes")
    device = pick_device(config.device)
    if launched:
        device = place_of_process(device)
    precision = pick_precision(config.precision, device)
    if config.fsdp and precision == "fp16":
        raise UserError("--fsdp does not go with fp16, whose scaler knows no shards; take --precision bf16 or fp32")
    if launched and not dist.is_initialized():
        join_process_group(device)
    return device, precision


def place_of_process(device):
    """The device of this process among those of its host. Raises UserError."""
    if device.type == "mps":
        raise UserError("several processes cannot share this GPU; add --device cpu")
    if device.type != "cuda":
        return device
    if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
        raise UserError(f"torchrun --nproc-per-node: there are {torch.cuda.device_count()} GPUs; or add --device cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def join_process_group(device):
    """Join the other processes. Gradients of GPUs go by nccl; words between processes (the clock, Ctrl-C, what to log)
    by gloo, so that they wait for no GPU."""
    where, notes = {}, agent_store()
    if notes is not None and os.environ["GROUP_WORLD_SIZE"] == "1":
        # The addresses of an earlier attempt still stand there; no process must look for another at one of them.
        where = {"store": dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", notes)}
        where |= {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **where)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)


@contextlib.contextmanager
def main_process_first():
    """The others wait, and find what the first one made."""
    if rank():
        dist.barrier()
    yield
    if world() > 1 and rank() == 0:
        dist.barrier()


def all_reduce_max(*numbers):
    """Each number's largest value among the processes."""
    if world() == 1:
        return numbers
    numbers = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


def all_gather(rows):
    """(n, ...) of each process -> (world() n, ...) on the CPU, the same for all."""
    rows = rows.cpu().contiguous()
    if world() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def all_gather_objects(thing):
    """A thing of each process, in a list that all have."""
    things = [thing] * world()
    if world() > 1:
        dist.all_gather_object(things, thing)
    return things


def parallelize(config, model, ema, device, blocks):
    """Bring model and ema to the device; returns the model as it is trained, in whose place `model` stays for all else.
    That is itself; under torchrun DistributedDataParallel, which averages the gradients over the processes; with --fsdp
    itself again, it and ema in shards.

    blocks(net): the modules whose weights are put together and let go of one after the other.
    """
    if dist.is_initialized() and config.fsdp:
        shard(model, ema, device, blocks)
        return model
    model.to(device)
    ema.to(device)
    if not dist.is_initialized():
        return model
    torch._dynamo.config.optimize_ddp = False  # which would cut compiled blocks to pieces, to no gain here
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, devices, gradient_as_bucket_view=True)


def shard(model, ema, device, blocks):
    """Leave each process its part of every weight (FSDP2). A block is put together while it is computed with."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world(),))
    for net in (model, ema):
        net.to(memory_format=torch.contiguous_format)  # shards cannot be cut from channels-last weights
        for block in blocks(net):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    fully_shard(ema, mesh=mesh, reshard_after_forward=True)  # so that update_ema always finds shards
    for name in ("encode", "decode"):  # a VAE's ways beside forward()
        if hasattr(ema, name):
            register_fsdp_forward_method(ema, name)


def microbatches(config, model):
    """The passes of one optimizer step, each as the rows of the batch that it takes in this process. Gradients are
    exchanged in the last one only."""
    count = config.grad_accum * world()
    for part in range(config.grad_accum):
        last = part == config.grad_accum - 1
        if hasattr(model, "set_requires_gradient_sync"):  # sharded
            model.set_requires_gradient_sync(last)
        quiet = isinstance(model, DistributedDataParallel) and not last
        with model.no_sync() if quiet else contextlib.nullcontext():
            yield slice(part * world() + rank(), None, count)


def is_sharded(tensor):
    """Is it a DTensor? Asked in this way because to import that class takes half a second, which whoever has but one
    process, or wants a picture, should not wait for."""
    return hasattr(tensor, "full_tensor")


def full_tensors(tensors):
    """name -> tensor, put together from its shards, on the CPU. The first process has the result; the others, which
    gave their shards, have nothing."""
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
        if rank() == 0:
            result[name] = tensor.detach().cpu().contiguous()
    return result


def shard_like(tensor, other):
    """A whole tensor, in shards if `other` is."""
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Each process has read the file and cuts out what is its own.
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def local_shard(tensor):
    """What of a tensor lies in this process."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def agent_store():
    """What torchrun remembers for as long as the job lasts, over all its restarts: a store of keys, or None."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=dist.default_pg_timeout)


# ----------------------------------------------------------------------------------------------------------------
# Optimisation


def lr_factor(progress, step, warmup, decay):
    """Factor of the peak learning rate at `progress` (0..1) of the budget: a straight rise, then a fall to zero along a
    cosine or a line, or none.

    warmup: the rise's part of the budget, or, from 1 on, its optimizer steps (`step` of them are done).
    """
    rise = (step + 1) / warmup if warmup >= 1 else progress / warmup if warmup else 1.0
    start = warmup if warmup < 1 else 0.0
    passed = max(0.0, progress - start) / (1 - start)
    fall = {"none": 1.0, "linear": 1 - passed, "cosine": 0.5 + 0.5 * math.cos(math.pi * passed)}[decay]
    return min(rise, fall)


class Muon(torch.optim.Optimizer):
    """Muon for weight matrices, which makes all directions of a step equally long (Jordan et al. 2024; scaled as in Liu
    et al. 2025, eq. 4, so that AdamW's learning rate serves), and AdamW for all other parameters."""

    def __init__(self, matrices, others, lr, betas, weight_decay, fused):
        # load_state_dict() asks for `fused` to know where AdamW's counts of steps belong.
        super().__init__([*matrices, *others], dict(lr=lr, fused=fused))
        self.parts = (
            torch.optim.Muon(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr, betas, weight_decay=weight_decay, fused=fused),
        )

    def step(self):
        for part in self.parts:
            part.state = self.state  # what checkpoints keep
            part.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            part.step()


def settle_optimizer(config, device):
    """config with `auto` of an --optimizer that offers Muon decided: its iterations are in bfloat16, and take a hundred
    times as long where that is emulated."""
    if config.optimizer != "auto":
        return config
    fast = pick_precision("auto", device) == "bf16"
    return dataclasses.replace(config, optimizer="muon" if fast else "adamw")


def make_optimizer(config, model, device, hidden=()):
    """AdamW over what is to be trained, and fp16's scaler. With --optimizer muon, Muon for the weights (m, n) within
    the modules `hidden`, through which every token passes; what embeds, modulates or reads out stays with AdamW."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    betas, fused = (0.9, config.beta2), device.type != "mps"
    if hidden and config.optimizer == "muon":
        matrices = [p for module in hidden for p in module.parameters() if p.dim() == 2 and p.requires_grad]
        chosen = set(matrices)
        others = [p for p in parameters if p not in chosen]
        optimizer = Muon(matrices, others, config.lr, betas, config.weight_decay, fused)
    else:
        optimizer = torch.optim.AdamW(parameters, config.lr, betas, weight_decay=config.weight_decay, fused=fused)
    scaler = torch.amp.GradScaler(device.type, enabled=pick_precision(config.precision, device) == "fp16")
    return optimizer, scaler


def narrow_gradients(config, model, device):
    """Have linear layers keep the gradient of their weight in bfloat16, as `weight.narrow_grad`: half the memory.

    Nothing is lost, since in bf16 autocast computes it so and only then widens it. That holds for layers called once in
    a step; where gradients are added up (--grad-accum, torchrun), they stay as they are.
    """
    if pick_precision(config.precision, device) != "bf16" or config.grad_accum > 1 or dist.is_initialized():
        return

    def put_aside(weight):
        weight.narrow_grad, weight.grad = weight.grad.bfloat16(), None

    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad:
            module.weight.register_post_accumulate_grad_hook(put_aside)


def optimizer_step(config, run, model, ema, optimizer, scaler, costs, times):
    """One step from the gradients that have been gathered: clip, check, step, average.

    costs (B,): what each picture of this process cost; times (B,) in [0, 1]. Raises UserError on a loss or a gradient
    that is not finite, with weights and checkpoint as they were.
    """
    lr = config.lr * lr_factor(run.schedule, run.step, config.warmup, config.decay)
    for group in optimizer.param_groups:
        group["lr"] = group["lr"].fill_(lr) if torch.is_tensor(group["lr"]) else lr  # torchao keeps it in a tensor
    scaler.unscale_(optimizer)
    parameters = optimizer.param_groups[0]["params"]
    narrow = [p for p in parameters if hasattr(p, "narrow_grad")]
    # The length of a narrow gradient stands for it, in its place, so that the sum is that of wide ones to the bit.
    lengths = {p: torch.linalg.vector_norm(p.narrow_grad, dtype=torch.float32) for p in narrow}
    gradients = [lengths.get(p, p.grad) for p in parameters]
    grad_norm = nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
    nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, grad_norm)
    grad_norm = grad_norm.full_tensor() if is_sharded(grad_norm) else grad_norm
    # A GradScaler skips steps that overflow; without one they must not be made.
    run.record(all_gather(costs), all_gather(times), grad_norm, lr, scaler.is_enabled() or bool(grad_norm.isfinite()))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    for weight in narrow:  # widened one by one; AdamW passes over what has no gradient
        weight.grad = weight.narrow_grad.float()
        nn.utils.clip_grads_with_norm_(weight, config.grad_clip, grad_norm)
        optimizer.step()
        weight.grad = None
        del weight.narrow_grad
    update_ema(ema, model, run.step, config.ema)


@torch.no_grad()
def update_ema(ema, model, step, longest):
    """ema <- decay * ema + (1 - decay) * model, with a decay that grows from a fifth to `longest`, so that the random
    start is forgotten in short runs too. After the first hundred steps four are taken at once, every fourth step,
    unless its memory is short: the average comes out all but the same, and its way through all weights is a few percent
    of a step on a CPU."""
    stride = 1 if step <= 100 or longest < 0.9 else 4
    if step % stride == 0:
        decay = min(longest, (1 + step) / (10 + step)) ** stride
        averages, weights = ([local_shard(p) for p in net.parameters()] for net in (ema, model))
        torch._foreach_lerp_(averages, weights, 1 - decay)


def has_compiler():
    """Is there a C++ compiler, which torch.compile needs on a CPU?"""
    return any(map(shutil.which, ("c++", "g++", "clang++", "cl")))


def worth_compiling(config, device):
    """--compile or --no-compile if given; else only where what it gains (a third, on two CPU cores) pays within the
    budget for what it costs (half a minute), and where there is a C++ compiler to do it."""
    if config.compile and device.type == "cpu" and not has_compiler():
        raise UserError("--compile needs a C++ compiler, such as g++; install one, or leave --compile out")
    if config.compile is not None:
        return config.compile
    if device.type == "mps" or (device.type == "cpu" and not has_compiler()):
        return False
    if (config.minutes or 5) < 5 or (config.steps or 1000) < 1000:
        return False
    # Nobody asked for it, so a compiler that is there but does not work, or that was killed and left half a file in its
    # cache, is no reason to stop; nor in the backward pass, which is compiled with the forward pass to that end.
    torch._dynamo.config.suppress_errors = True
    torch._functorch.config.force_non_lazy_backward_lowering = True
    return True


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_atomically(path, write):
    """write(temporary path), flush to disk, rename to `path`: at any moment either the old or the new file is whole. Of
    several processes the first writes."""
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
    except (OSError, ValueError, SafetensorError) as problem:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {problem}; free some space or name another place") from None


def save_text(path, text):
    """A text file; what UTF-8 has no bytes for, such as half a character in a file's name, is spelt out."""
    save_atomically(path, lambda part: part.write_text(text, "utf-8", "backslashreplace"))


def save_tensors(path, tensors, header):
    """Safetensors file with `header`, any JSON value, under the metadata key "config". All processes must call it."""
    tensors = full_tensors(tensors)
    save_atomically(path, lambda part: save_file(tensors, part, metadata={"config": json.dumps(header)}))


def load_tensors(path, header_only=False):
    """Weights from a file: (name -> tensor, header or None). Safetensors by preference; a file that ends in .pt, .pth,
    .ckpt or .bin is unpickled with weights_only, so that nothing in it can run. header_only: read no tensors of a
    safetensors file. Raises UserError if it is neither."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}; train some first, or name a file")
    try:
        if path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
            # What published checkpoints carry along must be allowed: JiT's their argparse.Namespace, plain data, and
            # Stable Diffusion's the name of a class of their trainer, for which an empty one stands.
            callback = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
            with torch.serialization.safe_globals([argparse.Namespace, (type("Callback", (), {}), callback)]):
                content = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(content, dict):
                raise ValueError("no table of tensors")
            return content, None
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("config") or "null")
        return {} if header_only else load_file(path), header if isinstance(header, dict) else None
    except Exception as problem:  # each format has its own way to fail; to the user they are one
        reason = str(problem).split("\n")[0][:120]
        raise UserError(f"{path} is not a readable weight file ({reason}); get it anew or name another") from None


def find_weights(given, system):
    """The checkpoint to sample from: the one named, else that of the run in the default place, else the one that came
    with the code; which of the two is printed."""
    if given:
        return Path(given)
    own = Path("runs") / system / "model.safetensors"
    path = own if own.exists() else Path(__file__).parent / "weights" / f"{system}.safetensors"
    print(f"weights: {path}")
    return path


@dataclasses.dataclass
class ExportConfig:
    """Options of the verb export."""

    weights: str = option("", "checkpoint (default: that in runs/ and the file's name)")
    out: str = option("", "safetensors file to write, e.g. weights/NAME.safetensors")


def export(system):
    """The verb export of a system, as run_command_line wants it: a checkpoint in bfloat16, half as large."""

    def command(options):
        if not options.out:
            raise UserError("name the file to write with --out")
        path = options.weights or f"runs/{system}/model.safetensors"
        tensors, header = load_tensors(path)
        if (header or {}).get("system") != system or any(name.startswith("optimizer.") for name in tensors):
            raise UserError(f"{path} is no model.safetensors of {system}.py; name one with --weights")
        save_tensors(options.out, {name: tensor.bfloat16() for name, tensor in tensors.items()}, header)
        print(f"{options.out}: {Path(options.out).stat().st_size / 1e6:.1f} MB")

    return command, ExportConfig, None, "keep a run's weights in half the bytes, e.g. export --out small.safetensors"


def load_into(model, weights, path):
    """model.load_state_dict, with a message that names the first few tensors that do not fit. A model that was built on
    torch.device("meta"), which spares the time that random weights take, comes to the CPU. Raises UserError."""
    own = model.state_dict()
    strangers = [str(k) for k, v in weights.items() if not torch.is_tensor(v)]
    if strangers:
        raise UserError(f"{path} holds more than weights ({', '.join(strangers[:3])}); name a file of tensors alone")
    problems = [f"{k} is missing" for k in own if k not in weights]
    problems += [f"{k} is unknown" for k in weights if k not in own]
    shapes = {k: (tuple(own[k].shape), tuple(weights[k].shape)) for k in own if k in weights}
    problems += [f"{k} is {theirs}, not {mine}" for k, (mine, theirs) in shapes.items() if mine != theirs]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{path} does not fit this model: {'; '.join(problems[:3])}{more}")
    if any(tensor.is_meta for tensor in own.values()):
        own = model.to_empty(device="cpu").state_dict()
    model.load_state_dict({name: shard_like(tensor, own[name]) for name, tensor in weights.items()})


def pack_state(model, ema, optimizer, scaler):
    """Everything of a training run that lives in tensors, under flat names, for one safetensors file."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            if hasattr(value, "tensor_attrs"):  # torchao's 8-bit moments: codes, scales and their common table
                parts = {part: getattr(value, part).clone() for part in value.tensor_attrs}
                tensors |= {f"optimizer.{index}.{slot}.{part}": tensor for part, tensor in parts.items()}
            else:
                tensors[f"optimizer.{index}.{slot}"] = value
    tensors |= {f"scaler.{k}": torch.tensor(v, dtype=torch.float64) for k, v in scaler.state_dict().items()}
    return tensors


def unpack_state(tensors, path, model, ema, optimizer, scaler):
    """The inverse of pack_state: fill the four from the tensors. Raises UserError where they do not fit."""
    parts = {"model": {}, "ema": {}, "optimizer": {}, "scaler": {}}
    for name, tensor in tensors.items():
        part, key = name.split(".", 1)
        parts[part][key] = tensor
    load_into(model, parts["model"], path)
    load_into(ema, parts["ema"], path)
    slots, parameters = {}, optimizer.param_groups[0]["params"]
    for key, tensor in parts["optimizer"].items():
        index, slot, *part = key.split(".")
        if part:  # of 8-bit moments: the optimizer makes empty ones to be filled
            if not hasattr(optimizer, "_new_buffer"):
                needs = "torchao (pip install torchao), the same kind of --device, and no --fsdp"
                raise UserError(f"{path} is of a run with 8-bit AdamW; to go on with it takes {needs}")
            own = slots.setdefault(int(index), {})
            if slot not in own:
                own[slot] = optimizer._new_buffer(parameters[int(index)], slot == "exp_avg")
            getattr(own[slot], part[0]).copy_(tensor)
            continue
        if tensor.shape == parameters[int(index)].shape:
            # The fused optimizer walks through memory, so that moments must lie as their weights do (channels-last).
            like = parameters[int(index)]
            tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(shard_like(tensor, like))
        slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    if parts["scaler"]:  # a run without fp16 has none
        scaler.load_state_dict({k: type(v)(parts["scaler"][k].item()) for k, v in scaler.state_dict().items()})


# ----------------------------------------------------------------------------------------------------------------
# Autoencoders: pictures <-> the latents that the diffusion models see. Each has the same face:
#   encode  (B, 3, H, W) in [-1, 1] -> (B, latent_channels, H/stride, W/stride), about unit variance
#   decode  the way back
# Parameter names are those of the published weights, and no parameter wants a gradient; gradients still flow
# through, for whoever needs a loss on decoded pictures.


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
        # At full resolution each of these maps is the largest thing in memory; silu and the sum need no second one.
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(self.conv_shortcut(x))


class KLAttention(nn.Module):
    """Each cell of the map attends to all others, with one head as wide as the map."""

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
    """The block at the lowest resolution: the only one, but for the group norms, that sees the whole picture."""

    def __init__(self, width):
        super().__init__()
        self.resnets = nn.ModuleList(KLResnet(width, width) for _ in range(2))
        self.attentions = nn.ModuleList([KLAttention(width)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class KLStage(nn.Module):
    """All resnets of one resolution, then the way to the next: "downsamplers", "upsamplers" or None."""

    def __init__(self, width_in, width, depth, resample):
        super().__init__()
        self.resnets = nn.ModuleList(KLResnet(width if i else width_in, width) for i in range(depth))
        self.resample = resample
        if resample:
            conv = nn.Conv2d(width, width, 3, *((2, 0) if resample == "downsamplers" else (1, 1)))
            self.add_module(resample, nn.ModuleList([nn.ModuleDict({"conv": conv})]))

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        if self.resample == "downsamplers":
            return self.downsamplers[0]["conv"](F.pad(x, (0, 1, 0, 1)))  # (B, C, H/2, W/2); pads right and below only
        if self.resample == "upsamplers":
            return self.upsamplers[0]["conv"](F.interpolate(x, scale_factor=2.0))  # (B, C, 2H, 2W)
        return x


class KLHalf(nn.Module):
    """The encoder, down from pictures to moments, or the decoder, up from latents to pictures. Widths in the order of
    the stages; the decoder's are one resnet deeper."""

    def __init__(self, channels_in, channels_out, widths, way):
        super().__init__()
        self.conv_in = nn.Conv2d(channels_in, widths[0], 3, padding=1)
        self.mid_block = KLMiddle(widths[-1 if way == "down" else 0])
        before, resample = (widths[0], *widths), [way + "samplers"] * (len(widths) - 1) + [None]
        depth = 2 if way == "down" else 3
        stages = nn.ModuleList(KLStage(*sizes, depth, how) for *sizes, how in zip(before, widths, resample))
        self.way = way
        self.add_module(way + "_blocks", stages)
        self.conv_norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], channels_out, 3, padding=1)

    def forward(self, x):
        path = [*self.down_blocks, self.mid_block] if self.way == "down" else [self.mid_block, *self.up_blocks]
        x = self.conv_in(x)
        for block in path:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))


def check_map(x, channels, multiple):
    """Raise UserError unless x is (B, channels, H, W) with sides that are multiples of `multiple`."""
    if x.dim() != 4 or x.shape[1] != channels or x.shape[2] % multiple or x.shape[3] % multiple:
        what = f"(B, {channels}, H, W) with H and W multiples of {multiple}"
        raise UserError(f"the autoencoder takes {what}, not {tuple(x.shape)}; resize or crop first")


def one_by_one(function, batch):
    """function(batch) in float32, also under autocast. On a CPU one picture at a time: no slower, a fraction of the
    memory, and every result the same to the bit whatever batch it comes in."""
    parts = batch.split(1) if batch.device.type == "cpu" else [batch]
    return torch.cat([function(part).float() for part in parts])


class AutoencoderKL(nn.Module):
    """The autoencoder of latent diffusion (Rombach et al. 2022, section 3.1): SD's and, with `batch_norm`, FLUX.2's.

    SD's latents are multiplied by `scale`. 0.18215 is one over their standard deviation, measured over a batch of
    training pictures. (SDXL's file looks the same, but its scale is 0.13025: set `vae.scale`.) FLUX.2's are normalised
    in 2x2 patches, channel by channel of 4 * latent_channels, by the statistics of a batch norm that came with the
    weights, and unfolded again.

    widths, decoder_widths: channels at each resolution, highest first, multiples of 32. Under bfloat16 autocast a CPU
    decodes twice as fast, with an rms error of one to three percent of the picture's standard deviation.
    """

    def __init__(self, latent_channels=4, widths=(128, 256, 512, 512), decoder_widths=None, batch_norm=False):
        super().__init__()
        self.latent_channels, self.stride, self.scale = latent_channels, 2 ** (len(widths) - 1), 0.18215
        self.encoder = KLHalf(3, 2 * latent_channels, widths, "down")
        self.decoder = KLHalf(latent_channels, 3, (decoder_widths or widths)[::-1], "up")
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.bn = nn.BatchNorm2d(4 * latent_channels, eps=1e-4, affine=False) if batch_norm else None
        self.patch = 2 if batch_norm else 1

    def posterior(self, x):
        """x (B, 3, H, W) in [-1, 1] -> mean, log-variance of the raw latent, each (B, C, H/stride, W/stride)."""
        check_map(x, 3, self.stride * self.patch)
        mean, logvar = one_by_one(lambda part: self.quant_conv(self.encoder(part)), x).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, x, generator=None):
        """x (B, 3, H, W) in [-1, 1] -> the latent a model sees: the posterior's mean, which is also its mode; with a
        generator, a sample from it."""
        z, logvar = self.posterior(x)
        if generator is not None:
            noise = torch.randn(z.shape, generator=generator, device=generator.device).to(z.device)
            z = z + (logvar / 2).exp() * noise
        return self.normalise(z)

    def decode(self, latent):
        """The latent a model sees -> pictures (B, 3, H, W) in about [-1, 1]."""
        check_map(latent, self.latent_channels, self.patch)
        return one_by_one(lambda part: self.decoder(self.post_quant_conv(part)), self.normalise(latent, inverse=True))

    def normalise(self, z, inverse=False):
        """Raw latent -> the latent a model sees, or back."""
        if self.bn is None:
            return z / self.scale if inverse else z * self.scale
        z = F.pixel_unshuffle(z, 2)  # (B, 4C, H/2, W/2)
        mean = self.bn.running_mean[:, None, None]
        std = (self.bn.running_var[:, None, None] + self.bn.eps).sqrt()
        return F.pixel_shuffle(z * std + mean if inverse else (z - mean) / std, 2)  # (B, C, H, W)


class TAEBlock(nn.Module):
    """relu(x + three convolutions). With `pool`, x first takes in what a GroupNorm knows of the whole map."""

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
    """The tiny autoencoder for FLUX.2's latents (Ollin Boer Bohan, github.com/madebyollin/taesd, MIT): 2.7 million
    parameters instead of 84. It speaks the normalised latents that AutoencoderKL makes of FLUX.2's weights, so that
    one can stand in for the other. It has no posterior. Its own pixels are in [0, 1]; ours, as ever, in [-1, 1]."""

    latent_channels, stride = 32, 8

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
        """x (B, 3, H, W) in [-1, 1] -> (B, 32, H/8, W/8)."""
        check_map(x, 3, self.stride)
        return one_by_one(self.encoder, (x + 1) / 2)

    def decode(self, latent):
        """(B, 32, H, W) -> pictures (B, 3, 8H, 8W) in about [-1, 1]."""
        check_map(latent, self.latent_channels, 1)
        return one_by_one(self.decoder, (latent / 3).tanh() * 3) * 2 - 1


def decode_tiled(vae, latent, tile=64, overlap=16):
    """vae.decode(latent) for pictures that do not fit in memory: in tiles of tile x tile latent cells, neighbours
    sharing at least `overlap`, where one fades linearly into the other. Both numbers are even.

    A latent no larger than a tile decodes as ever. A larger one does not give the same picture: attention and the group
    norms see the whole of what they are given, so each tile is judged on its own, and brightness and contrast drift.
    The fade makes that a slope instead of a seam; large tiles make it small. TAEF2, whose few layers lean most on such
    norms, rebuilds a photo of 64 x 64 cells with 31 dB whole, 28 in tiles of 48, 25 in tiles of 32.
    """
    if tile % 2 or overlap % 2 or not 0 < overlap < tile:
        raise UserError(f"tile {tile}, overlap {overlap}: both must be even, and the overlap between 0 and the tile")
    check_map(latent, vae.latent_channels, 1)
    height, width = latent.shape[2:]
    if max(height, width) <= tile:
        return vae.decode(latent)

    def starts(size):  # the last tile ends where the latent does
        return [min(start, max(size - tile, 0)) for start in range(0, max(size - overlap, 1), tile - overlap)]

    def fade(size):  # the distance from the nearer edge; where two tiles meet, their shares are then linear
        distance = torch.arange(size, device=latent.device) + 0.5
        return torch.minimum(distance, size - distance)

    total = latent.new_zeros(len(latent), 3, height * vae.stride, width * vae.stride, dtype=torch.float32)
    weights = torch.zeros_like(total[0, 0])
    for top, left in itertools.product(starts(height), starts(width)):
        part = vae.decode(latent[..., top : top + tile, left : left + tile])
        weight = fade(part.shape[2])[:, None] * fade(part.shape[3])
        y, x = top * vae.stride, left * vae.stride
        here = ..., slice(y, y + part.shape[2]), slice(x, x + part.shape[3])
        total[here] += weight * part
        weights[here] += weight
    return total.div_(weights)


# What other layouts call the parts, and what diffusers and we call them. No name on the left occurs in one on the
# right, so the same pass that brings another layout here leaves this one as it is.
# fmt: off
VAE_NAMES = [
    # Latent diffusion, and Black Forest Labs, where the quant_convs are inside; both count the decoder from its end
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
# What a folder may hold, best first: the prefix that its names need, and the file.
VAE_FOLDERS = [
    {"": "diffusion_pytorch_model.safetensors"}, {"": "diffusion_pytorch_model.bin"},
    {"encoder.": "taef2_encoder.safetensors", "decoder.": "taef2_decoder.safetensors"},
    {"encoder.": "taef2_encoder.pth", "decoder.": "taef2_decoder.pth"},
    {"": "vae/diffusion_pytorch_model.safetensors"},
]
# fmt: on


def read_vae_weights(path):
    """The tensors of an autoencoder's file or folder, in float32 and under diffusers' names. Raises UserError."""
    files = {"": ""}
    if not path.exists():
        raise UserError(f"no weights at {path}; name an autoencoder's file or folder with --vae")
    if path.is_dir():
        files = next((f for f in VAE_FOLDERS if all((path / name).is_file() for name in f.values())), None)
        if files is None:
            known = ", ".join(" and ".join(f.values()) for f in VAE_FOLDERS)
            raise UserError(f"no autoencoder in {path}; a folder should hold {known}")
    weights = {}
    for prefix, name in files.items():
        content, _ = load_tensors(path / name)
        content = content.get("state_dict", content)
        weights |= {f"{prefix}{k}": v for k, v in content.items() if torch.is_tensor(v)}
    whole = "first_stage_model."  # what a whole SD checkpoint calls its autoencoder
    if any(k.startswith(whole) for k in weights):
        weights = {k.removeprefix(whole): v for k, v in weights.items() if k.startswith(whole)}
    for theirs, ours in VAE_NAMES:
        weights = {k.replace(theirs, ours): v for k, v in weights.items()}
    for k, v in weights.items():
        if ".attentions.0.to_" in k and v.dim() == 4:  # latent diffusion's attention is of 1x1 convolutions
            weights[k] = v.flatten(1)
    return {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}


def load_vae(path):
    """The autoencoder in a file or folder, known by the names of its weights: AutoencoderKL with those of SD (diffusers
    new and old, latent diffusion, a whole SD checkpoint) or FLUX.2 (diffusers, Black Forest Labs), or TAEF2. In float32
    and eval mode, its parameters without gradients. Raises UserError for anything else."""
    path = Path(path)
    weights = read_vae_weights(path)

    def widths(stage):
        names = (f"{stage}.{i}.resnets.0.conv1.weight" for i in range(4))
        return tuple(weights[k].shape[0] for k in names if k in weights and weights[k].dim() == 4)

    down, up, batch_norm = widths("encoder.down_blocks"), widths("decoder.up_blocks"), "bn.running_mean" in weights
    channels = weights.get("post_quant_conv.bias", torch.empty(0)).numel()
    known_scale = channels == 4 or (channels and batch_norm)
    if "encoder.11.pool.0.weight" in weights:
        with torch.device("meta"):
            vae = TAEF2()
    elif len(down) == len(up) == 4 and not any(w % 32 for w in down + up) and known_scale:
        with torch.device("meta"):
            vae = AutoencoderKL(channels, down, up[::-1], batch_norm)
        # SD's published files also hold the losses that it was trained with, and their weights
        weights = {k: v for k, v in weights.items() if hasattr(vae, k.split(".")[0])}
    else:
        names = ", ".join(list(weights)[:3]) or "none by name"
        raise UserError(f"{path} is no autoencoder of SD, FLUX.2 or TAEF2; it holds {len(weights)} tensors: {names}...")
    load_into(vae, weights, path)
    # The memory format that a CPU's bfloat16 convolutions like best
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def fingerprint(module):
    """Mean sizes of the weights in a few layers, and of statistics such as a batch norm's: they tell a network from
    others, in whatever precision it is kept."""
    parameters = list(module.parameters())
    some = parameters[:: max(1, len(parameters) // 8)] + [b for b in module.buffers() if b.is_floating_point()]
    return [round(tensor.detach().cpu().double().abs().mean().item(), 6) for tensor in some]


def is_same_network(mine, wanted):
    """Whether two fingerprints are of the same weights, perhaps in another precision."""
    return len(mine) == len(wanted) and all(abs(a - b) <= 1e-5 + 0.005 * abs(b) for a, b in zip(mine, wanted))


def check_partner(flag, module, wanted):
    """Raise UserError if the VAE or CLIP that was given is not the one that training had."""
    if module is not None and wanted and not is_same_network(fingerprint(module), wanted):
        raise UserError(f"{flag}: these are not the weights that this model was trained with; name those")


def load_vae_of(header, path):
    """The autoencoder in the file or folder `path` if it is the one whose latents a checkpoint was trained on, of which
    its header tells. Raises UserError if it is another, or not there."""
    if not path or not Path(path).exists():
        missing = f", and {path} is not here" if path else ""
        raise UserError(f"these weights work in a VAE's latents{missing}; name its weights with --vae")
    vae = load_vae(path)
    if vae.latent_channels != header["latent"][0]:
        what = f"--vae has {vae.latent_channels} channels, this model has {header['latent'][0]}"
        raise UserError(f"{what}; name the right one")
    check_partner("--vae", vae, header["vae"])
    return vae


# ----------------------------------------------------------------------------------------------------------------
# Pictures in

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MAX_PIXELS = 64_000_000  # a larger file is taken for a decompression bomb and skipped before it is decoded


def open_picture(path, size=None):
    """A file as a PIL picture, RGB. Raises an exception if it is no readable picture.

    The content decides, not the name. Of an animation the first frame counts; transparency lies on white. size: what
    sides are enough, where not all pixels are wanted.
    """
    with Image.open(path) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels are too many")
        if size:
            picture.draft("RGB", (2 * size, 2 * size))  # a JPEG of a camera is decoded at a fraction of its size
        picture.load()  # what is cut short says so here
        with contextlib.suppress(Exception):  # a broken EXIF block turns nothing, but the pixels are there
            picture = ImageOps.exif_transpose(picture)
        if picture.mode == "F":
            raise ValueError("floating-point pixels, of which nobody knows what is white")
        if picture.mode.startswith("I"):  # 16 bits, which Pillow's convert would clip instead of scale
            picture = Image.fromarray((np.asarray(picture).clip(0, 65535) / 257).round().astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


def read_picture(path, size):
    """One file -> (size, size, 3) uint8, the centre square. Raises as open_picture."""
    return np.asarray(ImageOps.fit(open_picture(path, size), (size, size), Image.Resampling.LANCZOS))


def files_below(folder):
    """Paths of all files below `folder`, then of those behind its links to folders; each folder once, by whichever way
    comes first, so that links may lead round in circles."""
    starts, seen = [folder], set()
    for start in starts:
        for place, folders, names in os.walk(start):
            if (real := os.path.realpath(place)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()  # of two links to a folder, every machine takes the same
            starts += filter(os.path.islink, [os.path.join(place, name) for name in folders])
            yield from (Path(place, name) for name in names)


def picture_paths(folder):
    """All files below `folder` that should be pictures, sorted, so that picture number i is the same on every machine;
    those within run folders, which training drew, are none. Raises UserError if there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; name a folder of pictures, or leave --data out for drawn ones")
    files = [path for path in files_below(folder) if path.is_file()]
    runs = {path.parent for path in files if path.name == "state.safetensors"}
    paths = sorted(p for p in files if p.suffix.lower() in PICTURE_SUFFIXES and runs.isdisjoint(p.parents))
    if not paths:
        raise UserError(f"no pictures in {folder}; it should hold files such as .png or .jpg")
    return paths


def read_pictures(paths, folder, size, progress=False):
    """(n, 3, size, size) uint8 of the readable ones among `paths`, their places in it, a line for each file skipped."""

    def read_or_explain(path):
        try:
            return read_picture(path, size)
        except Exception as problem:  # Pillow raises nearly anything on a broken file; one file must not end the run
            return f"{path.relative_to(folder)}: {str(problem)[:100]}"

    # Pillow decodes and resizes outside Python's lock, so threads are enough; map keeps the order.
    with warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is below Pillow's own limit
        read = pool.map(read_or_explain, paths)
        results = list(tqdm(read, "reading", len(paths), unit=" pictures", leave=False, disable=not progress))
    skipped = [result for result in results if isinstance(result, str)]
    good = [i for i, result in enumerate(results) if not isinstance(result, str)]
    pictures = torch.from_numpy(np.stack([results[i] for i in good])) if good else torch.zeros(0, size, size, 3).byte()
    return pictures.permute(0, 3, 1, 2).contiguous(), good, skipped


def read_folder(folder, size):
    """All pictures below `folder` -> ((N, 3, size, size) uint8 tensor, their paths, a line for each file skipped).
    Raises UserError if there is none."""
    paths = picture_paths(folder)
    pictures, good, skipped = read_pictures(paths, folder, size, progress=True)
    if not good:
        raise UserError(f"none of the {len(paths)} files in {folder} is a readable picture, {skipped[0]}")
    return pictures, [paths[i] for i in good], skipped


def load_pictures(data, size):
    """What --data names, "drawn" or a folder -> ((N, 3, size, size) uint8, their names, lines about skipped files)."""
    if data == "drawn":
        pictures = draw_set(paint_face, 10_000, size).pictures
        return pictures, [f"drawn face {i}" for i in range(len(pictures))], []
    pictures, paths, skipped = read_folder(data, size)
    return pictures, [str(path) for path in paths], skipped


def checksum(pictures, words=()):
    """What tells one set of pictures (N, C, H, W) uint8, in this order and with these words, from another."""
    return zlib.crc32(json.dumps(list(words)).encode(), zlib.crc32(pictures.contiguous().numpy()))


def read_metadata(paths, folder, texts=True):
    """What is written about pictures: path -> (text, tags), "" and [] where nothing is. From each metadata.jsonl below
    `folder` in the imagefolder convention (lines with "file_name" and "text", "tags" or both); a text that they lack
    from the .txt beside a picture, unless no `texts` are wanted. Raises UserError on a file that is not UTF-8 and on a
    line of another kind."""

    def read(path):
        try:
            return path.read_text("utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from None

    known = {path: ("", []) for path in paths}
    for path in paths:
        if texts and path.with_suffix(".txt").is_file():
            known[path] = read(path.with_suffix(".txt")).strip(), []
    for path in sorted(path for path in files_below(folder) if path.name == "metadata.jsonl"):
        for number, line in enumerate(read(path).split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name, tags = row["file_name"], row.get("tags", [])
                text = row.get("text", known.get(path.parent / name, ("", []))[0])
                words = isinstance(tags, list) and all(isinstance(word, str) for word in (name, text, *tags))
                if not (words and row.keys() & {"text", "tags"}):
                    raise ValueError
            except (ValueError, KeyError, TypeError, AttributeError):
                what = 'a line should read {"file_name": "1.png", "text": "a red car", "tags": ["red", "car"]}'
                raise UserError(f"{path}, line {number}: {what}") from None
            known[path.parent / name] = text.strip(), tags
    return known


@dataclasses.dataclass
class DrawnSet:
    """pictures (N, 3, size, size) uint8; a caption and a list of tags for each."""

    pictures: torch.Tensor
    captions: list[str]
    tags: list[list[str]]


def draw_set(draw, count, size):
    """draw(seed, size) -> (RGB picture, caption, tags), for the seeds 0 to count - 1, as DrawnSet.

    All cores draw, and what they drew is kept in data/ and read from there the next time. A few, spread over the set,
    are drawn anew each time and must equal the kept ones, so that a change to the drawing shows.
    """
    cache = Path("data") / f"{draw.__name__}-{count}-{size}.safetensors".replace("_", "-")

    def collect(drawn):
        pictures, captions, tags = zip(*drawn)
        pictures = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
        return DrawnSet(pictures.permute(0, 3, 1, 2).contiguous(), list(captions), list(tags))

    probes = range(0, count, max(1, count // 64))
    probe = collect(draw(seed, size) for seed in probes)
    with main_process_first():
        if cache.exists():
            with contextlib.suppress(UserError, KeyError, TypeError, IndexError):
                tensors, words = load_tensors(cache)
                kept = DrawnSet(tensors["pictures"], words["captions"], words["tags"])
                same = torch.equal(kept.pictures[list(probes)], probe.pictures)
                said = [(kept.captions[i], kept.tags[i]) for i in probes]
                if same and said == list(zip(probe.captions, probe.tags)):
                    return kept
        # Pillow's drawing holds Python's lock, so this takes processes; forking spares each its own import of torch.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear
        with concurrent.futures.ProcessPoolExecutor(None, context, signal.signal, ignore) as pool:
            drawn = pool.map(draw, range(count), itertools.repeat(size), chunksize=100)
            made = collect(tqdm(drawn, "drawing", count, unit=" pictures", leave=False))
        with contextlib.suppress(UserError):  # no place to keep them: they are drawn again the next time
            save_tensors(cache, {"pictures": made.pictures}, {"captions": made.captions, "tags": made.tags})
        return made


def mirror_some(x, part, draw):
    """Turn about `part` of the pictures, or latents, left to right; draw: a Draw of so many rows."""
    turned = draw.rand() < part
    return torch.where(turned.view(-1, 1, 1, 1), x.flip(-1), x)


def batch_index(config, count, step):
    """Samples of optimizer step `step`: the data in a new order each epoch, as a function of the step alone."""
    first = step * config.batch_size
    return [epoch_order(config.seed, n // count, count)[n % count] for n in range(first, first + config.batch_size)]


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, count):
    return torch.randperm(count, generator=generator(seed, epoch, 5)).tolist()


# ----------------------------------------------------------------------------------------------------------------
# Shards: what an encoder made of a folder of pictures, some hundreds in a file


@dataclasses.dataclass
class ShardConfig:
    """What every verb that writes shards asks."""

    data: str = option("", "folder of pictures")
    out: str = option("", "folder for the shards")
    vae: str = option("", "autoencoder: a file or a folder")
    image_size: int = option(256, "side to which the pictures are brought", low=8)
    shard: int = option(250, "pictures in a shard, and the most that a kill can cost", low=1)
    batch_size: int = option(16, "pictures encoded at a time", low=1)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = option("auto", "of the matrix products", choices=("auto", "fp32", "bf16", "fp16"))


def write_shards(options, paths, about, rows, encode, extra):
    """Encode pictures into options.out, options.shard of them in each file. A file is written whole or not at all, so
    that the same call goes on after a kill with the first one that is missing.

    options: a ShardConfig; paths: the pictures; about: what the whole folder has in common, for the files' headers;
    rows: path -> what is to be known of a picture, JSON; encode(pictures (B, 3, S, S) in [-1, 1], their rows) -> name
    -> tensor of B rows; extra: name -> tensor, in every file. Returns (number of pictures encoded, a line for each
    skipped). Raises UserError.
    """
    done, skipped = 0, []
    try:  # before the first hour's work rather than after it
        Path(options.out).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.out):
            pass
    except OSError as problem:
        raise UserError(f"cannot write into {options.out}: {problem.strerror}; name another --out") from None
    parts = [paths[first : first + options.shard] for first in range(0, len(paths), options.shard)]
    targets = [Path(options.out) / f"shard_{number:05d}.safetensors" for number in range(len(parts))]
    if strays := set(Path(options.out).glob("shard_*.safetensors")) - set(targets):  # training would read them, too
        raise UserError(f"{min(strays)} was made from other pictures or settings; name another --out")
    bar = tqdm(total=len(paths), desc="encoding", unit=" pictures")
    for part, target in zip(parts, targets):
        asked = [str(path.relative_to(options.data)) for path in part]
        sizes = [path.stat().st_size for path in part]  # of files, by which one that was replaced is known
        told = {name: {"file": name} | rows[path] for name, path in zip(asked, part)}
        if target.exists():
            header = open_shard(target)[1]
            if header["asked"] != asked or any(header.get(key) != value for key, value in about.items()):
                raise UserError(f"{target} was made from other pictures or settings; name another --out")
            others = header.get("sizes", sizes) != sizes
            if others or any(row != told.get(row.get("file")) for row in header["rows"]):
                raise UserError(
                    f"pictures, captions or tags have changed since {target} was made; delete its folder to encode anew"
                )
            bar.update(len(part))
        else:
            header = about | {"asked": asked, "sizes": sizes, "rows": [], "skipped": [], "checksum": 0}
            batches = []
            for start in range(0, len(part), options.batch_size):
                chunk = part[start : start + options.batch_size]
                pictures, good, bad = read_pictures(chunk, options.data, options.image_size)
                header["skipped"] += bad
                if good:
                    header["checksum"] = zlib.crc32(pictures.numpy(), header["checksum"])
                    known = [told[asked[start + i]] for i in good]
                    with torch.no_grad():
                        encoded = encode(pictures / 127.5 - 1, known)
                    header["rows"] += known
                    batches.append({name: tensor.bfloat16().cpu() for name, tensor in encoded.items()})
                bar.update(len(chunk))
            if batches:
                tensors = {name: torch.cat([encoded[name] for encoded in batches]) for name in batches[0]}
                save_tensors(target, tensors | extra, header)
        done += len(header["rows"])
        skipped += header["skipped"]
    bar.close()
    return done, skipped


def open_shard(path):
    """A file that write_shards made -> (it, open and mapped, its header). Raises UserError if it is cut short."""
    try:
        file = safe_open(path, "pt")
        header = json.loads(file.metadata()["config"])
        if not {"rows", "asked", "skipped"} <= header.keys():
            raise ValueError("no table of pictures")
        return file, header
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as problem:
        reason = str(problem)[:100]
        raise UserError(f"{path} is no readable shard ({reason}); delete it and encode the folder again") from None


class Shards:
    """A folder of shards, read from disk as rows are asked for.

    safetensors maps the files into memory and reads the rows of a batch alone: 200,000 latents and texts take 27 GB of
    disk and next to nothing of memory.

    names: tensors with one row for each picture; known: what must be known of each; same: keys of the header that all
    files must agree on; extra: tensors that every file has as a whole. `rows` is what is known of each picture,
    `skipped` lines about those that could not be read, `header` that of the first file, `shapes` name -> shape of a
    row, `extra` name -> tensor. Raises UserError.
    """

    def __init__(self, folder, names, known, same, extra=()):
        self.names, self.rows, self.places, self.skipped, self.sums = names, [], [], [], []
        headers, shapes = [], []
        for path in sorted(Path(folder).glob("shard_*.safetensors")):
            file, header = open_shard(path)
            missing = sorted({*names, *extra} - set(file.keys()))
            missing += [key for key in same if key not in header]
            missing += [key for key in known if any(key not in row for row in header["rows"])]
            if missing:
                raise UserError(
                    f"{path} holds no {' and no '.join(missing)}: it was encoded for another system or purpose"
                )
            here = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            if any(shape[0] != len(header["rows"]) for shape in here.values()):
                raise UserError(f"{path}: its tensors and its header disagree; delete it and encode the folder again")
            headers.append(header)
            shapes.append({name: shape[1:] for name, shape in here.items()})
            self.places += [(file, row) for row in range(len(header["rows"]))]
            self.rows += header["rows"]
            self.skipped += header["skipped"]
            self.sums.append(header.get("checksum"))
        if not self.places:
            raise UserError(f"no samples in the shards of {folder}; encode the folder again")
        self.header, self.shapes = headers[0], shapes[0]
        differing = [key for key in same if any(header[key] != self.header[key] for header in headers)]
        if differing or any(other != self.shapes for other in shapes):
            what = " and ".join(differing) or "shape"
            raise UserError(f"the shards in {folder} differ in {what}; encode the folder anew")
        self.extra = {name: self.places[0][0].get_tensor(name) for name in extra}

    def __len__(self):
        return len(self.rows)

    def checksum(self):
        """Of what is known of the pictures, and of their pixels, unless the shards are older than such sums."""
        return zlib.crc32(json.dumps([self.rows, *self.sums] if any(self.sums) else self.rows).encode())

    def read(self, index):
        """Rows `index` of each tensor, float32."""
        places = [self.places[i] for i in index]
        return tuple(
            torch.cat([file.get_slice(name)[row : row + 1] for file, row in places]).float() for name in self.names
        )


# ----------------------------------------------------------------------------------------------------------------
# Pictures out


def to_uint8(rgb):
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8 numpy."""
    return (rgb.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def make_grid(pictures, columns=None):
    """(B, H, W, 3) uint8 -> one PIL picture, as square as can be unless `columns` says otherwise."""
    count, height, width, _ = pictures.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(picture), (i % columns * width, i // columns * height))
    return sheet


def picture_format(path, film=False):
    """Pillow's name for what a path's suffix asks for. Raises UserError where it can write no such picture, or film."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in (Image.SAVE_ALL if film else Image.SAVE):
        raise UserError(f"{path}: name a picture file that can be written, .png, or .gif for an animation")
    return kind


def save_picture(picture, path, **options):
    """Write a PIL picture; the format is the path's. Raises UserError where that cannot be."""
    kind = picture_format(path, options.get("save_all"))
    save_atomically(path, lambda part: picture.save(part, format=kind, **options))


def save_gif(frames, path, milliseconds=200):
    """PIL pictures -> an animation that rests on the last one."""
    durations = [milliseconds] * (len(frames) - 1) + [8 * milliseconds]
    save_picture(frames[0], path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def film(draw, wanted=True):
    """(frames, watch) for an animation of at most ten frames: watch(x, part) adds draw(x) to the list at the start, at
    the end and eight times between; part, 0 to 1, is how far x has come. If it is not wanted, the list stays empty."""
    frames = []

    def watch(x, part):
        if wanted and part >= len(frames) / 9 - 1e-6:
            frames.append(draw(x))

    return frames, watch


def write_samples(pictures, names, options, frames, columns=None):
    """What the verb sample leaves behind: pictures (B, H, W, 3) uint8 as a grid in options.out, with options.each one
    by one under their names, with options.gif the frames of the way there."""
    save_picture(make_grid(pictures, columns), options.out)
    print(f"{len(pictures)} pictures in {options.out}")
    if options.each:
        for name, picture in zip(names, pictures):
            save_picture(Image.fromarray(picture), Path(options.each) / f"{name}.png")
    if options.gif:
        save_gif(frames, options.gif)


COLOURS = "#1f77b4", "#d9541e", "#3a923a", "#8a5bd0"  # of a chart's curves


@dataclasses.dataclass
class Chart:
    """Curves, name -> [(x, y > 0)]; where y is a distance, `floor` is that of real pictures from each other."""

    title: str
    curves: dict
    floor: float | None = None
    colours: dict | None = None  # name -> colour [COLOURS in turn]

    def draw(self, width=640, height=320):
        """As a PIL picture, y on a logarithmic axis."""
        image, font = Image.new("RGB", (width, height), "white"), ImageFont.load_default(13)
        pen, left, right, top, bottom = ImageDraw.Draw(image), 56, width - 96, 36, height - 32
        pen.text((left, 8), self.title, "black", font)
        points = [point for curve in self.curves.values() for point in curve]
        if not points:
            return image
        xs, ys = zip(*points)
        ys = [*ys, ys[0] if self.floor is None else self.floor]
        low, high, last = max(min(ys), 1e-6) / 1.1, max(*ys, 1e-6) * 1.1, max(*xs, 1)

        def place(x, y):
            up = math.log(max(y, low) / low) / math.log(high / low)
            return left + x / last * (right - left), bottom - up * (bottom - top)

        pen.line([(left, top), (left, bottom), (right, bottom)], "black")
        for y in (a * 10.0**b for b in range(-6, 7) for a in (1, 2, 5)):
            if low <= y <= high:
                pen.text((left - 6, place(0, y)[1]), f"{y:g}", "black", font, "rm")
                pen.line([(left - 3, place(0, y)[1]), (left, place(0, y)[1])], "black")
        marked = sorted(set(xs)) if len(set(xs)) < 6 else [0, last // 2, last]
        for x in marked:
            pen.text((place(x, low)[0], bottom + 6), f"{x:,}", "black", font, "ma")
        if self.floor is not None:
            across = place(0, self.floor)[1]
            for x in range(left, right, 10):
                pen.line([(x, across), (x + 5, across)], "grey")
            pen.text((right + 6, across), "floor", "grey", font, "lm")
        for i, (name, curve) in enumerate(self.curves.items()):
            colour = (self.colours or {}).get(name) or COLOURS[i % len(COLOURS)]
            pen.line([place(x, y) for x, y in curve], colour, 2)
            pen.text((right + 6, top + 18 * i), name, colour, font)
        return image

    def table(self):
        """As an HTML table; long curves have none."""
        xs = sorted({x for curve in self.curves.values() for x, _ in curve})
        if len(xs) > 20:
            return ""
        lines = [["", *(f"{x:,}" for x in xs)]]
        for name, curve in self.curves.items():
            known = {x: f"{y:.1f}" if y >= 10 else f"{y:.3g}" for x, y in curve}
            lines.append([name, *(known.get(x, "") for x in xs)])
        if self.floor is not None:
            lines.append(["real against real", f"{self.floor:.1f}"])
        rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
        return f"<h2>{html.escape(self.title)}</h2><table>{rows}</table>"


# ----------------------------------------------------------------------------------------------------------------
# Run folders

# May differ between a run and its resumption: how long, where (also the data, which checksums tell), and how often to
# save. All else would change the run.
MAY_CHANGE = set(
    "data out minutes steps epochs vae clip device compile checkpoint_every resume vae_minutes vae_steps "
    "checkpointing checkpoint_activations grad_accum fsdp cache_gb stream threads per_host timeout "
    "max_mb private_hosts start".split()
)
PROGRESS_BAR = "{percentage:3.0f}% {bar} {elapsed} passed, {remaining} left{postfix}"
NOISE_BINS = 8
LOG_COLUMNS = ["step", "seconds", "images", "loss", "lr", "grad_norm", "images_per_second"]
LOG_COLUMNS += [f"loss_bin_{k}" for k in range(NOISE_BINS)]
# Pictures are drawn at these parts of the budget: minutes 1, 2, 3, 5, 7 and 10 of ten.
MARKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
LOG_EVERY = 10


def tell_skipped(skipped, path=None):
    """Name the files that could not be used: the first few here, all of them, if a path is given, there."""
    # A name need not be UTF-8.
    lines = [line.encode(errors="backslashreplace").decode() for line in skipped]
    if lines:
        where = f", listed in {path}" if path else ""
        if path:
            save_text(path, "\n".join(lines) + "\n")
        print(f"skipped {len(lines)} files{where}: {'; '.join(lines[:3])}{'; ...' if len(lines) > 3 else ''}")


class Run:
    """A run folder and the clock that goes with it: log.csv, checkpoints, samples, index.html, Ctrl-C.

    It holds no model and decides nothing about training; the loop in each file's train() asks it what time it is.
    `step` and `images` count what has been done, `progress` is the part of the budget that is used up.
    """

    def __init__(self, config, system):
        self.config, self.system = config, system
        self.folder = Path(config.out or f"runs/{system}")
        self.step, self.images, self.seconds_before, self.best = 0, 0, 0.0, math.inf
        self.first_seconds = 0.0  # what the clock showed at the end of the first step
        self.done, self.interrupted, self.asked_to_stop = False, False, False
        self.header = {}  # what the checkpoints' headers say beside system, step and config
        self.window = []  # (costs, times, loss, gradient norm, lr) of each step since the last line of the log
        check_config(config)
        if not config.minutes and not config.steps:
            raise UserError("a run needs an end: give --minutes or --steps")
        resume = self.open_folder() if rank() == 0 else False
        self.resume = bool(all_reduce_max(resume)[0])

    def open_folder(self):
        """Make the folder, or check it; returns whether the run goes on from a checkpoint. Raises UserError."""
        begun, notes, key = self.state_path.exists(), agent_store(), f"began {self.folder}"
        if notes is not None and notes.check([key]):
            # A folder that this very job made: torchrun has started the processes anew after one died.
            if not begun:
                (self.folder / "log.csv").unlink(missing_ok=True)
            return begun
        if self.config.resume:
            if not begun:
                raise UserError(f"nothing to resume in {self.folder}: no checkpoint; start a run without --resume")
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            if not begun:
                raise UserError(f"{self.folder} holds files but no checkpoint; empty it, or name another --out")
            raise UserError(f"{self.folder} is not empty; add --resume to go on with it, or name another --out")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise UserError(f"cannot make {self.folder}: {problem.strerror}; name another --out") from None
        if notes is not None:
            notes.set(key, "yes")
        return self.config.resume

    @property
    def state_path(self):
        return self.folder / "state.safetensors"

    # -- what is said --

    def tell_skipped(self, skipped):
        tell_skipped(skipped, self.folder / "skipped.txt")

    def banner(self, model, device, precision, data):
        """The line that opens a run."""
        size = sum(p.numel() for p in model.parameters()) / 1e6
        start = f"resumed at step {self.step}" if self.step else "fresh run"
        return f"{start} in {self.folder}: {size:.1f}M parameters, {data}, {precision} on {device}"

    def farewell(self):
        """Say where things are; returns the exit code, 130 after Ctrl-C as a shell expects."""
        if world() > 1:
            dist.barrier()  # whoever goes on finds all that the first one wrote
        if self.interrupted:
            print(f"stopped and saved at step {self.step}; to go on: {self.command()}")
            return 130
        done = f"{self.step} steps, {self.images:,} images, {self.seconds / 60:.1f} minutes"
        print(f"{done}; open {self.folder}/index.html")
        return 0

    def command(self):
        """The line that goes on with this run; where its budget is used up, with twice as much (but of compare, which
        divides its own)."""
        start, more = ["python"], []
        if dist.is_initialized():
            start = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
        for budget in ("minutes", "epochs", "steps"):
            if self.progress >= 1 and sys.argv[1:2] != ["compare"] and (value := getattr(self.config, budget, None)):
                more += [flag_named(self.config, budget), str(2 * value)]
        return shlex.join([*start, *[word for word in sys.argv if word != "--resume"], *more, "--resume"])

    # -- the clock --

    @contextlib.contextmanager
    def clock(self):
        """Start counting, and turn Ctrl-C (or a polite kill) into a flag, so that no step is cut in half."""
        self.started = time.perf_counter()
        self.now = self.window_started = self.seconds_before
        self.marks_passed = sum(self.progress >= mark for mark in MARKS)
        self.done = self.progress >= 1  # a finished run that is resumed has nothing left to do

        def interrupt(signum, frame):
            if self.asked_to_stop and not dist.is_initialized():  # in a hurry; other processes would be left waiting
                raise KeyboardInterrupt
            self.asked_to_stop = True
            if signum == signal.SIGINT and not dist.is_initialized():
                # The bar may be in the middle of its own printing, into which print() must not break.
                os.write(2, b"\nstopping and saving; Ctrl-C once more stops without\n")

        agreed = {key: value for key, value in self.header.items() if not isinstance(value, float)}
        if len(set(all_gather_objects(json.dumps([self.step, agreed])))) > 1:
            raise UserError("the processes see different data or checkpoints; give all hosts the same folders")
        before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        total = self.config.steps or 60 * self.config.minutes
        passed = self.step if self.config.steps else self.seconds_before
        self.bar = tqdm(total=total, initial=min(total, passed), bar_format=PROGRESS_BAR)
        try:
            yield self
        finally:
            self.bar.close()
            quiet = self.interrupted and dist.is_initialized()  # a second signal must not cut the last words short
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if quiet else handler)

    @property
    def seconds(self):
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def progress(self):
        """0 at the start, 1 when a budget is used up, as the clock stood after the last step. With steps as the only
        budget no clock enters: the learning rate is then the same to the bit in every run."""
        by_steps = self.step / self.config.steps if self.config.steps else 0.0
        by_time = self.now / (60 * self.config.minutes) if self.config.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    @property
    def schedule(self):
        """What the learning rate follows: progress, by the clock from the end of the first step on, in which a compiler
        may be at work for longer than a whole warm-up."""
        if self.config.steps:
            return self.progress
        first = self.first_seconds / (60 * self.config.minutes)  # as part of the budget that the run has now
        return (self.progress - first) / (1 - first) if first < 1 else 1.0

    def should_end(self):
        """Whether due() would call the run done, for those who wait for something within a step; not where other
        processes would be left waiting."""
        late = self.config.minutes and self.seconds >= 60 * self.config.minutes
        return not dist.is_initialized() and bool(self.asked_to_stop or late)

    def due(self):
        """(pictures, checkpoint): is it time for samples, and is it time to save?

        Here alone it is decided that a run is done, so that none ends, not even by Ctrl-C, without a last checkpoint;
        and here processes agree on the time, and on whether one was interrupted.
        """
        self.now, stop = all_reduce_max(self.seconds, self.asked_to_stop)
        self.interrupted = bool(stop)
        progress = self.progress
        if self.step == 1 and not self.first_seconds:
            self.first_seconds = self.now
        self.done = progress >= 1 or self.interrupted
        marks = sum(progress >= mark for mark in MARKS)
        pictures, self.marks_passed = marks > self.marks_passed, marks
        if self.done and self.window:
            self.write_line()
        return pictures, pictures or self.done or self.step % self.config.checkpoint_every == 0

    # -- what is written --

    def record(self, costs, times, grad_norm, lr, gradient_is_finite):
        """Count one optimizer step of learning rate lr; every LOG_EVERY steps it goes into log.csv.

        costs (B,): what each picture cost; times (B,) in [0, 1]. Raises UserError on a loss or a gradient that is not
        finite, before anything of that step can be saved.
        """
        loss = costs.mean().item()
        if not (math.isfinite(loss) and gradient_is_finite):
            what = f"loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
            advice = f"try a lower {flag_named(self.config, 'lr')} or --precision fp32"
            raise UserError(f"{what} at step {self.step + 1}; {self.last_good()}; {advice}")
        self.step += 1
        self.images += len(costs)
        self.window.append((costs.float().cpu(), times.cpu(), loss, float(grad_norm), lr))
        if self.step % LOG_EVERY == 0:
            self.write_line()

    def write_line(self):
        """One line of log.csv, and the progress bar, from the steps since the last one."""
        costs, times, losses, norms, rates = zip(*self.window)
        costs, bins = torch.cat(costs), (torch.cat(times) * NOISE_BINS).long().clamp(0, NOISE_BINS - 1)
        by_noise = [costs[bins == k].mean().item() if (bins == k).any() else None for k in range(NOISE_BINS)]
        now = self.seconds
        rate = len(costs) / (now - self.window_started)
        loss = sum(losses) / len(losses)
        row = [self.step, now, self.images, loss, rates[-1], sum(norms) / len(norms), rate]
        if rank() == 0:
            log = self.folder / "log.csv"
            try:
                with open(log, "a", newline="") as file:
                    if file.tell() == 0:
                        csv.writer(file).writerow(LOG_COLUMNS)
                    csv.writer(file).writerow([f"{v:.6g}" if isinstance(v, float) else v for v in row + by_noise])
            except OSError as problem:
                reason = f"cannot write {log}: {problem.strerror}; {self.last_good()}"
                raise UserError(f"{reason}; free some space and add --resume") from None
        self.window, self.window_started = [], now
        self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")
        self.bar.n = self.step if self.config.steps else min(now, self.bar.total)
        self.bar.refresh()

    def last_good(self):
        return f"the last good checkpoint is {self.state_path}" if self.state_path.exists() else "nothing was saved"

    def settings(self):
        """The header of every checkpoint."""
        return {"system": self.system, "step": self.step, "config": dataclasses.asdict(self.config)} | self.header

    def save(self, model, ema, optimizer, scaler, held_out_loss=None, also=None):
        """model.safetensors, all that sampling needs, then state.safetensors, all that resuming needs, and the page.

        With a held_out_loss, best.safetensors is the model.safetensors at which it was least. also: what the header of
        state.safetensors is to say beside, for load() to return.
        """
        settings = self.settings()
        held_out_loss = (
            None if held_out_loss is None else all_reduce_max(held_out_loss)[0]
        )  # to the last bit the same for all
        save_tensors(self.folder / "model.safetensors", ema.state_dict(), settings)
        if held_out_loss is not None and held_out_loss < self.best:
            self.best = held_out_loss
            save_tensors(self.folder / "best.safetensors", ema.state_dict(), settings | {"held_out_loss": self.best})
        clock = {"images": self.images, "seconds": self.seconds, "first_seconds": self.first_seconds, "best": self.best}
        save_tensors(self.state_path, pack_state(model, ema, optimizer, scaler), settings | clock | (also or {}))
        if rank() == 0:
            self.write_page()

    def load(self, model, ema, optimizer, scaler):
        """Put everything back where save() found it, and forget the log's lines that came after. Returns the header.
        Raises UserError."""
        tensors, header = load_tensors(self.state_path)
        if not header or header.get("system") != self.system:
            raise UserError(f"{self.state_path} is no run of {self.system}.py; name another --out")
        names = {field.name for field in dataclasses.fields(self.config)} - MAY_CHANGE
        if asked := differences(self.config, header["config"], names):
            raise UserError(f"{self.folder} was made with {asked}; resume with the same options, or name another --out")
        measured = {key: value for key, value in header.items() if isinstance(value, float) and key in self.header}
        self.header |= measured  # for another machine measures a little otherwise
        other = [key for key, value in self.header.items() if header.get(key) != value]
        if other:
            raise UserError(f"{self.folder} began with another {other[0]}; resume with the same, or name another --out")
        unpack_state(tensors, self.state_path, model, ema, optimizer, scaler)
        self.step, self.images, self.seconds_before = header["step"], header["images"], header["seconds"]
        self.best, self.first_seconds = header["best"], header.get("first_seconds", 0.0)
        log = self.folder / "log.csv"
        if rank():
            return header
        for path in [*self.folder.glob("samples/step_*.png"), *self.folder.glob("marks/step_*.safetensors")]:
            if path.stem[5:].isdigit() and int(path.stem[5:]) > self.step:  # such steps are about to be made again
                path.unlink()
        if log.exists() and log.stat().st_size:
            head, *lines = log.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n") and line.count(",") == head.count(",")]
            kept = [line for line in whole if int(line.split(",")[0]) <= self.step]
            save_text(log, head + "".join(kept))
        return header

    def keep(self, ema):
        """marks/step_000500.safetensors: the averaged weights at a mark of the budget, for curves drawn afterwards."""
        tensors = {name: tensor.bfloat16() for name, tensor in ema.state_dict().items()}
        save_tensors(self.folder / "marks" / f"step_{self.step:06d}.safetensors", tensors, self.settings())

    def save_samples(self, rgb):
        """(B, 3, H, W) in [0, 1] -> samples/step_000500.png, and into the page. To be called after save(): whatever
        goes wrong in drawing, which takes long, then costs no step."""
        save_picture(make_grid(to_uint8(rgb)), self.folder / "samples" / f"step_{self.step:06d}.png")
        if rank() == 0:
            self.write_page()

    def write_page(self):
        """index.html: the run at a glance in one file without scripts, so that it opens from disk in any browser."""
        log = self.folder / "log.csv"
        rows = list(csv.DictReader(log.read_text().splitlines())) if log.exists() else []

        def series(column):
            return [(int(row["images"]), float(row[column])) for row in rows if row[column]]

        edges = [f"{k / NOISE_BINS:.3f}" for k in range(NOISE_BINS + 1)]
        noise = {f"t {edges[k]} to {edges[k + 1]}": series(f"loss_bin_{k}") for k in range(NOISE_BINS)}
        knows_time = sum(map(bool, noise.values())) > 1  # an autoencoder's training does not
        strip = ""
        for path in sorted((self.folder / "samples").glob("step_*.png")):
            if not path.stem[5:].isdigit():  # a copy that somebody made
                continue
            data = base64.b64encode(path.read_bytes()).decode()
            strip += f'<figure><img src="data:image/png;base64,{data}" alt="samples">'
            strip += f"<figcaption>step {int(path.stem[5:]):,}</figcaption></figure>"
        config = "".join(
            f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>"
            for k, v in dataclasses.asdict(self.config).items()
        )
        page = PAGE.format(
            title=html.escape(f"{self.system}: {self.folder}"),
            summary=f"step {self.step}, {self.images:,} images, {self.seconds / 60:.1f} minutes",
            command=html.escape(self.command()),
            loss=svg_chart({"loss": series("loss")}),
            noise=f"<h2>Loss by time</h2>{svg_chart(noise)}" if knows_time else "",
            strip=strip,
            config=config,
        )
        save_text(self.folder / "index.html", page)


PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
figure {{ display: inline-block; margin: 0 .5rem 1rem 0 }} figcaption {{ color: #666 }} img {{ width: 10.5rem }}
table {{ border-collapse: collapse }} td {{ padding: 0 1rem 0 0; border-bottom: 1px solid #ddd }}
code {{ background: #f3f3f3; padding: .2rem .4rem }}
</style>
<h1>{title}</h1><p>{summary}. To go on: <code>{command}</code></p>
<h2>Pictures by the averaged weights, always from the same start</h2>{strip}
<h2>Loss</h2>{loss}{noise}
<h2>Configuration</h2><table>{config}</table>
</html>
"""


def svg_chart(curves, width=760, height=260, points=400):
    """Curves, name -> [(x, y > 0)], on a logarithmic y axis, as an SVG element with a legend."""
    curves = {name: xy[:: max(1, len(xy) // points)] for name, xy in curves.items() if xy}
    if not curves:
        return "<p>nothing logged yet</p>"
    x_max = max(x for xy in curves.values() for x, _ in xy)
    heights = [math.log10(max(y, 1e-12)) for xy in curves.values() for _, y in xy]
    low, high = min(heights), max(max(heights), min(heights) + 0.01)

    def place(x, y):
        up = (math.log10(max(y, 1e-12)) - low) / (high - low)
        return f"{50 + x / x_max * (width - 200):.1f},{height - 30 - up * (height - 40):.1f}"

    def text(x, y, words, colour="#222"):
        return f'<text x="{x}" y="{y}" fill="{colour}">{words}</text>'

    parts = [text(0, 18, f"{10**high:.3g}"), text(0, height - 30, f"{10**low:.3g}")]
    parts += [text(50, height - 8, 0), text(width - 230, height - 8, f"{x_max:,} images")]
    for i, (name, xy) in enumerate(curves.items()):
        colour = f"hsl({i * 300 // len(curves)} 65% 45%)"
        line = " ".join(place(x, y) for x, y in xy)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(text(width - 135, 20 + 18 * i, name, colour))
    return f'<svg viewBox="0 0 {width} {height}" font-size="13" style="max-width: {width}px">{"".join(parts)}</svg>'


# ----------------------------------------------------------------------------------------------------------------
# Painted pictures: faces with a caption and tags, and scenes with a caption. Picture number `seed` is the same on
# every machine, so that a data set needs no download. These are the default data (`--data drawn`).
#
# What there is to paint stands in assets/faces.json and assets/scenes.json. A thing is a list of shapes, painted in
# this order. A shape is [colour, outline]. An outline is a list of points [x, y], the control points of a closed
# quadratic B-spline: the curve runs from the middle of one side of their polygon to the middle of the next, and a
# point given twice is a sharp corner. x grows to the right and y downwards, and (0, 0) is the centre. The picture
# reaches from -1 to 1 both ways, and so does a thing of a scene in its own frame.
#
# To add a thing, add an entry to its table: the key is what the caption says ("a grin", "rocket"; {} stands for a
# colour's name), the value its shapes. The order of the keys decides what a seed gives. The colour of a shape is one of
# Pillow's (a name or "#rrggbb") or a name that depends on the picture:
#   in faces.json   skin, hair, cloth, trim (of accessories), and the mixtures listed under "shades"
#   in scenes.json  body (the colour in the caption), deep (its shade), light, blush, face (the ink of eyes and mouth),
#                   the colours under "details", and in backgrounds ground and pale
# In faces.json a hair style has two layers, "behind" the head and the outline "dome" in front of it, whose lower edge
# is a fringe. In scenes.json a colour lists under "avoid" the backgrounds on which it would not be seen.

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
    """Scene number `seed`: (RGB picture size x size, caption, names of its things).

    Captions leave things out, but all that they say is true.
    """
    rng, tables = random.Random(seed), picture_tables("scenes")

    def vary(colour, lighter):
        """The colour, lighter by `lighter` of 255 and varied a little."""
        return tuple(min(max(c + lighter + rng.randint(-3, 3), 0), 255) for c in ImageColor.getrgb(colour))

    def name(*words):
        return with_article(" ".join(filter(None, words)))

    # Half of the captions are short, as people's prompts are. A quarter say more about one thing, a quarter are about
    # two things.
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
        dx, dy = tables["places"].get(words, (0, 0))
        scale = tables["sizes"][word]
        places = [((0.92 - scale) * dx, (0.92 - scale) * dy)]
    if kind != "short" and rng.random() < 0.8:
        caption += f"{',' * bool(words)} {background}"

    white, ink = PAINTS["white"], PAINTS["ink"]
    fills = [vary(fill, rng.randint(-6, 6)) for fill in tables["backgrounds"][background]["fills"]]
    colours = tables["details"] | {
        "ground": fills[-1],
        "pale": mix(fills[-1], white, 0.5),
        "shadow": mix(fills[-1], ink, 0.25),
    }
    image = Image.new("RGB", (4 * size, 4 * size), fills[0])  # four times too large, as in paint_face
    backdrop = Painter(image, colours, rng.uniform(-0.1, 0.1), rng.uniform(-0.06, 0.06))
    backdrop.paint(tables["backgrounds"][background]["shapes"])
    for hue, thing, (x, y) in zip(hues, things, places):
        lighter = rng.randint(-9, 9)
        body, deep = (vary(tables["colours"][hue][shade], lighter) for shade in ("body", "deep"))
        dark = max(body) < 100
        colours |= {
            "body": body,
            "deep": deep,
            "light": mix(body, white, 0.25 if dark else 0.45),
            "blush": mix((255, 140, 150), body, 0.3),
            "face": mix(white, body, 0.1) if dark else ink,
        }
        x, y = x + rng.uniform(-0.03, 0.03), y + rng.uniform(-0.03, 0.03)
        painter = Painter(image, colours, x, y, scale * rng.uniform(0.94, 1), rng.uniform(-0.12, 0.12))
        painter.paint([("shadow", outline) for _, outline in tables["things"][thing]], down=0.09)
        painter.paint(tables["things"][thing])
    return image.reduce(4), caption, things
