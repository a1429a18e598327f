"""Speed, as ratios of medians measured in one run: `python tests/bench.py [NAME ...]`, all of NAMES by default.

Run it on a quiet machine. Nothing here is a test: timings vary, ratios less so.
"""

import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import json
import math
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import dit_t2i  # noqa: E402
import jit_lab  # noqa: E402
import serpentine_vae  # noqa: E402
import unet_ddpm  # noqa: E402


def median_seconds(functions, rounds):
    """Median duration of each function, called by turns so that what slows the machine slows them all."""
    for function in functions.values():
        function()
        function()
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def training_step(config, precision, device, compiled=False):
    """One optimizer step of jit_lab's train(), a function of its number, on pictures of nothing."""
    torch.manual_seed(0)
    model = jit_lab.build_model(config).to(device)
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=True)
    rgb = torch.randint(0, 256, (64, 3, config.image_size, config.image_size), dtype=torch.uint8)
    data = jit_lab.Dataset(rgb, torch.ones(64, dtype=torch.bool))

    def loss():
        x, mask, top, left = jit_lab.draw_batch(config, data, 0, slice(None), device)
        t = jit_lab.draw_times(config, common.Draw(len(x), 0, device=device))
        x_t = common.flow_point(torch.randn_like(x), x, t)
        output = model(x_t, t, torch.zeros(len(x), dtype=torch.long, device=device), top, left)
        return jit_lab.flow_loss(config, output, x_t, x, t, mask), t

    return whole_step(config, precision, device, model, loss, jit_lab.hidden_parts(model))


def whole_step(config, precision, device, model, loss, hidden=()):
    """A function of its number that makes one optimizer step from loss() -> (costs (B,), times). Returns the loss."""
    ema = copy.deepcopy(model)
    config = dataclasses.replace(config, precision=precision)
    optimizer, scaler = common.make_optimizer(config, model, device, hidden)

    def step(number):
        with common.autocast(device, precision):
            costs, times = loss()
        scaler.scale(costs.mean()).backward()
        run = types.SimpleNamespace(schedule=0.5, step=number, record=lambda *columns: None)
        common.optimizer_step(config, run, model, ema, optimizer, scaler, costs.detach(), times)
        return costs.mean().item()

    return step


def text_training_step(config, precision, device, compiled=False):
    """One optimizer step of dit_t2i's train(), a function of its number, on pictures and captions of nothing."""
    torch.manual_seed(0)
    model = dit_t2i.build_model(config, 3, config.image_size, 800).to(device)
    if compiled:
        for layer in model.layers:
            layer.compile(dynamic=False)
    x = torch.rand(config.batch_size, 3, config.image_size, config.image_size, device=device)
    text = torch.randint(0, 800, (config.batch_size, 6), device=device)

    def loss():
        return dit_t2i.flow_loss(config, model, x, text, common.Draw(len(x), 0, device=device))

    return whole_step(config, precision, device, model, loss, dit_t2i.hidden_parts(model))


def unet_training_step(config, precision, device, compiled=False, channels=12, size=20):
    """One optimizer step of unet_ddpm's train(), a function of its number, on maps of nothing."""
    torch.manual_seed(0)
    model = unet_ddpm.build_model(config, channels, size).to(device)
    if precision == "fp32":  # the plain way, as a peer would
        model.to(memory_format=torch.contiguous_format)
    if compiled:
        unet_ddpm.compile_blocks(model)
    x = torch.randn(config.batch_size, channels, size, size, device=device)
    noise, u = torch.randn_like(x), torch.rand(config.batch_size, device=device)

    return whole_step(config, precision, device, model, lambda: unet_ddpm.flow_loss(config, model, x, noise, u))


def compare_training(title, config, device, rounds, training_step=training_step):
    """Each way makes four steps at a time, since every fourth averages the weights."""
    fast = common.pick_precision("auto", device)

    def four(*precision, **compiled):
        step = training_step(config, *precision, device, **compiled)
        return lambda: [step(number) for number in range(101, 105)]

    ways = {
        "eager fp32": four("fp32"),
        f"eager {fast}": four(fast),
        f"compiled {fast}": four(fast, compiled=True),
    }
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds(ways, rounds)
    print(f"{title}, batch {config.batch_size}, {device}")
    for name, s in seconds.items():
        print(f"  {name:16s} {4 * config.batch_size / s:7.1f} images/s   {seconds['eager fp32'] / s:5.2f} x eager fp32")
    if device.type == "cuda":
        print(f"  peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def bench_demo(device):
    """Whole pictures, so that every step does the same work."""
    config = common.make_config(jit_lab.Config, {"full_image_prob": 1.0, "optimizer": "muon"}, jit_lab.PRESETS)
    compare_training("demo preset, full pictures", config, device, 9)


def bench_paper(device):
    given = {"preset": "paper", "full_image_prob": 1.0, "batch_size": 8, "grad_accum": 1}
    compare_training(
        "paper preset, full pictures", common.make_config(jit_lab.Config, given, jit_lab.PRESETS), device, 3
    )
    # In a process of its own, since memory that others used before would count.
    words = [sys.executable, __file__, "one_paper_step"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    print(f"paper preset, one optimizer step at batch 2 on the CPU: {done.stdout.strip()} GiB at the process's peak")


def bench_one_paper_step(device):
    given = {"preset": "paper", "full_image_prob": 1.0, "batch_size": 2, "grad_accum": 1}
    config, cpu = common.make_config(jit_lab.Config, given, jit_lab.PRESETS), torch.device("cpu")
    training_step(config, common.pick_precision("auto", cpu), cpu)(1)
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}")


def bench_attention(device):
    for tokens in (100, 400):
        q, k, v = torch.randn(3, 16, 6, tokens, 64, device=device).bfloat16().unbind(0)
        for x in (q, k, v):
            x.requires_grad_()
        ways = {
            "ours": lambda q=q, k=k, v=v: common.attention(q, k, v).sum().backward(),
            "torch's fused kernel": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v).sum().backward(),
        }
        seconds = median_seconds(ways, 15)
        ratio = seconds["torch's fused kernel"] / seconds["ours"]
        print(
            f"attention over {tokens} tokens, bf16, forward and backward: {ratio:.2f} x torch's fused kernel, {device}"
        )


def bench_sample(device):
    with tempfile.TemporaryDirectory() as folder:
        words = [
            sys.executable,
            str(ROOT / "jit_lab.py"),
            "sample",
            "--num",
            "16",
            "--out",
            str(Path(folder) / "x.png"),
        ]
        words += ["--weights", str(ROOT / "weights" / "jit_lab.safetensors")]
        seconds = median_seconds({"sample": lambda: subprocess.run(words, check=True, capture_output=True)}, 3)
    print(f"python jit_lab.py sample --num 16, the whole process: {seconds['sample']:.1f} s")


def bench_data(device):
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom common import *\ndraw_set(paint_face, 10000, 80)",
            ],
            cwd=folder,
            check=True,
        )
    print(f"10,000 faces drawn and kept: {time.perf_counter() - start:.1f} s with Python's start")
    pictures = torch.randint(0, 256, (10_000, 3, 80, 80), dtype=torch.uint8)
    for metric in (jit_lab.MultiscalePixels(), jit_lab.Lpips().eval()):
        start = time.perf_counter()
        jit_lab.nearest(metric, pictures[:16] / 255, pictures)
        name = type(metric).__name__
        print(f"nearest of 10,000 pictures to each of 16 by {name}: {time.perf_counter() - start:.1f} s")


def bench_text_demo(device):
    """Where the time of a compiled step goes, beside the ratios: matrix products by oneDNN and by BLAS."""
    config = common.make_config(dit_t2i.Config, {"optimizer": "muon"}, dit_t2i.PRESETS)
    compare_training("text to image, demo preset", config, device, 9, text_training_step)
    step = text_training_step(config, common.pick_precision("auto", device), device, compiled=True)
    for number in range(3):
        step(number)
    with torch.profiler.profile() as profile:
        for number in range(101, 105):  # every fourth averages the weights
            step(number)
    events = profile.key_averages()
    whole = sum(event.self_device_time_total or event.self_cpu_time_total for event in events)
    products = ("mm", "bmm", "linear", "addmm", "convolution", "gemm")
    matrix = sum(e.self_device_time_total or e.self_cpu_time_total for e in events if any(p in e.key for p in products))
    print(f"  {matrix / whole:.0%} of the compiled step is in matrix products")


@torch.no_grad()
def bench_text_paper(device):
    """One prompt through the 258M model, 28 steps of guidance, and the VAE; random weights take as long as any."""
    torch.manual_seed(0)
    config = common.make_config(dit_t2i.Config, {"preset": "paper"}, dit_t2i.PRESETS)
    model = dit_t2i.build_model(config, 4, 32, 0).to(device).eval()
    vae = common.AutoencoderKL().to(device).eval()
    fast, fast_vae = copy.deepcopy(model).bfloat16(), vae.to(memory_format=torch.channels_last)
    text, null = torch.randn(1, 77, 768, device=device), torch.randn(1, 77, 768, device=device)
    options = dit_t2i.SampleConfig(num=1, cfg=4.0, precision="bf16")

    def ours():
        latent = dit_t2i.sample(fast, options, text, null, (4, 32, 32))
        with common.autocast(device, "bf16"):
            return dit_t2i.to_rgb(fast_vae, latent)

    def plain():
        z, t = common.noise_for([0], (4, 32, 32), device), torch.ones(1, device=device)
        for i in range(28):
            with_text, without = model(z, t * (1 - i / 28), text), model(z, t * (1 - i / 28), null)
            z = z - (without + 4 * (with_text - without)) / 28
        return dit_t2i.to_rgb(vae, z)

    seconds = median_seconds({"ours": ours, "plain": plain}, 2)
    ratio = seconds["plain"] / seconds["ours"]
    print(f"258M model, 28 steps, cfg 4, and decoding: {seconds['ours']:.1f} s, {ratio:.2f} x eager fp32 in two passes")


def bench_text_memory(device):
    """A whole optimizer step of the 258M model at batch 4, with and without its activations: memory, counted on the
    CPU, and time."""
    for checkpointing in (False, True):
        given = {"preset": "paper", "precision": "bf16", "checkpoint_activations": checkpointing}
        config = common.make_config(dit_t2i.Config, given, dit_t2i.PRESETS)
        torch.manual_seed(0)
        model, cpu = dit_t2i.build_model(config, 4, 32, 0), torch.device("cpu")
        if checkpointing:
            common.narrow_gradients(config, model, cpu)
        x, text = torch.randn(4, 4, 32, 32), torch.randn(4, 77, 768)

        def loss(model=model, config=config, x=x, text=text):
            return dit_t2i.flow_loss(config, model, x, text, common.Draw(len(x), 0))

        step = whole_step(config, "bf16", cpu, model, loss)
        step(101)  # makes the moments
        start = time.perf_counter()
        step(102)
        seconds = time.perf_counter() - start
        losses = []
        peak = peak_bytes(lambda step=step, losses=losses: losses.append(step(104))) / 2**30
        activations = kept_for_backward(config, 4)[0] / 2**30
        print(
            f"--checkpoint-activations {checkpointing}: loss {losses[0]:.9f}, {4 * 256 / seconds:.0f} image tokens/s,"
        )
        print(f"{peak:.2f} GiB beside weights, moments and averages; computed: {activations:.2f} GiB kept for backward")


@torch.no_grad()
def bench_text_vae(device):
    """Four pictures at 256 pixels, against diffusers on equal weights; peak memory in a process for each."""
    import diffusers

    theirs = diffusers.AutoencoderKL(**dit_sd_config()).to(device).eval()
    ours = common.AutoencoderKL().to(device).eval().to(memory_format=torch.channels_last)
    ours.load_state_dict(theirs.state_dict())
    latent = torch.randn(4, 4, 32, 32, device=device)

    def decode():
        with common.autocast(device, common.pick_precision("auto", device)):
            return ours.decode(latent)

    seconds = median_seconds({"ours": decode, "theirs": lambda: theirs.decode(latent / 0.18215).sample}, 3)
    print(
        f"VAE, 4 pictures decoded: {seconds['ours']:.1f} s, {seconds['theirs'] / seconds['ours']:.2f} x diffusers fp32"
    )
    for name in ("ours", "theirs"):
        words = [sys.executable, __file__, f"vae_memory_{name}"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        print(f"  decoding with {name} takes {done.stdout.strip().splitlines()[-1]} MiB more than the weights")


def dit_sd_config():
    widths = (128, 256, 512, 512)
    blocks = {
        f"{way}_block_types": (f"{way.title()}{part}Block2D",) * 4
        for way, part in (("down", "Encoder"), ("up", "Decoder"))
    }
    return dict(block_out_channels=widths, layers_per_block=2, latent_channels=4, sample_size=256) | blocks


def extra_memory(function):
    """MiB by which the process grows, at most, while function() runs (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far

    def status(key):
        return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    before = status("VmRSS")
    function()
    return status("VmHWM") - before


@torch.no_grad()
def bench_vae_memory_ours(device):
    vae, latent = common.AutoencoderKL().eval().to(memory_format=torch.channels_last), torch.randn(4, 4, 32, 32)
    with common.autocast(torch.device("cpu"), common.pick_precision("auto", torch.device("cpu"))):
        print(f"{extra_memory(lambda: vae.decode(latent)):.0f}")


@torch.no_grad()
def bench_vae_memory_theirs(device):
    import diffusers

    vae, latent = diffusers.AutoencoderKL(**dit_sd_config()).eval(), torch.randn(4, 4, 32, 32)
    print(f"{extra_memory(lambda: vae.decode(latent)):.0f}")


def bench_text_sample(device):
    words = [sys.executable, str(ROOT / "dit_t2i.py"), "sample", "a red car", "--num", "4"]
    words += ["--weights", str(ROOT / "weights" / "dit_t2i.safetensors")]
    with tempfile.TemporaryDirectory() as folder:
        words += ["--out", str(Path(folder) / "x.png")]
        seconds = median_seconds({"sample": lambda: subprocess.run(words, check=True, capture_output=True)}, 3)
    print(f'python dit_t2i.py sample "a red car" --num 4, the whole process: {seconds["sample"]:.1f} s')


def bench_text_solvers(device):
    """Distance to the solution, 200 steps of Heun, over 32 prompts, without rounding."""
    model, config, header = dit_t2i.load_model(ROOT / "weights" / "dit_t2i.safetensors", device)
    words = dit_t2i.Words(header["text"]["words"], header["text"]["length"])
    things = "car", "fish", "house", "apple"
    text, null = words([f"a {colour} {thing}" for thing in things for colour in dit_t2i.HUES]), words([""])

    def draw(solver, steps, shift=1.0):
        options = dit_t2i.SampleConfig(num=1, cfg=config.cfg, precision="fp32", batch_size=32)
        options = dataclasses.replace(options, solver=solver, steps=steps, shift=shift)
        return dit_t2i.sample(model, options, text, null, (3, config.image_size, config.image_size))

    exact = draw("heun", 200, 1.4)
    for solver in ("euler", "dpm", "heun"):
        for steps in (14, 28):
            for shift in (1.0, 1.4):
                away = (draw(solver, steps, shift) - exact).square().mean().sqrt()
                print(f"{solver} in {steps} steps, --shift {shift}: {away:.4f} from the solution", flush=True)


def bench_unet_demo(device):
    config = common.make_config(unet_ddpm.Config, {}, unet_ddpm.PRESETS)
    compare_training("U-Net, demo preset", config, device, 7, unet_training_step)


def bench_unet_paper(device):
    """Forward and backward of the 281M model at batch 8, and the memory of a whole step at batch 2."""
    config = common.make_config(unet_ddpm.Config, {"preset": "paper", "batch_size": 8}, unet_ddpm.PRESETS)
    fast = common.pick_precision("auto", device)
    x, t = torch.randn(8, 32, 32, 32, device=device), torch.rand(8, device=device) * 999
    model = unet_ddpm.build_model(config, 32, 32).to(device)
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)

    def ours():
        with common.autocast(device, fast):
            model(x, t).square().mean().backward()
        model.zero_grad()

    def theirs():
        plain(x, t).square().mean().backward()
        plain.zero_grad()

    seconds = median_seconds({"ours": ours, "theirs": theirs}, 3)
    ratio = seconds["theirs"] / seconds["ours"]
    print(f"281M U-Net, forward and backward at batch 8: {seconds['ours']:.1f} s, {ratio:.2f} x eager fp32 in NCHW")
    words = [sys.executable, __file__, "one_unet_step"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    print(f"281M U-Net, one optimizer step at batch 2 on the CPU: {done.stdout.strip()} GiB at the process's peak")


def bench_one_unet_step(device):
    given = {"preset": "paper", "batch_size": 2}
    config, cpu = common.make_config(unet_ddpm.Config, given, unet_ddpm.PRESETS), torch.device("cpu")
    unet_training_step(config, common.pick_precision("auto", cpu), cpu, channels=32, size=32)(1)
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}")


@torch.no_grad()
def bench_unet_peer(device):
    """DDIM in 20 steps against denoising-diffusion-pytorch's own loop, around the same network with equal weights, and
    around its own U-Net of about as many parameters."""
    # Its package imports torchvision, and its sampler makes no use of it.
    sys.modules["torchvision"] = types.ModuleType("torchvision")
    sys.modules["torchvision.transforms"] = sys.modules["torchvision"].transforms = types.ModuleType("transforms")
    sys.modules["torchvision.utils"] = sys.modules["torchvision"].utils = types.ModuleType("utils")
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet  # pip install denoising-diffusion-pytorch

    config = common.make_config(unet_ddpm.Config, {"objective": "ddpm"}, unet_ddpm.PRESETS)
    torch.manual_seed(0)
    model = unet_ddpm.build_model(config, 12, 20).to(device).eval()

    class Theirs(torch.nn.Module):
        """The same network as their loop wants it."""

        channels, out_dim, self_condition, random_or_learned_sinusoidal_cond = 12, 12, False, False

        def __init__(self):
            super().__init__()
            self.network = copy.deepcopy(model).to(memory_format=torch.contiguous_format)

        def forward(self, x, t, x_self_cond=None):
            return self.network(x, t)

    own = Unet(dim=64, dim_mults=(1, 2), channels=12).eval()
    sizes = dict(image_size=20, timesteps=1000, sampling_timesteps=20)
    loops = [GaussianDiffusion(net, objective="pred_noise", auto_normalize=False, **sizes) for net in (Theirs(), own)]
    same, other = (loop.to(device) for loop in loops)
    options = unet_ddpm.DrawConfig(num=32, steps=20, batch_size=32)
    ways = {
        "ours": lambda: unet_ddpm.sample(model, config, options, {"latent": (12, 20), "range": 1.0}),
        "same": lambda: same.sample(batch_size=32),
        "other": lambda: other.sample(batch_size=32),
    }
    seconds = median_seconds(ways, 5)
    rate, ratios = 32 / seconds["ours"], {name: s / seconds["ours"] for name, s in seconds.items()}
    counts = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (model, own)]
    print(f"32 pictures by DDIM in 20 steps: {rate:.1f} images/s; against denoising-diffusion-pytorch's loop")
    print(f"  around the same network, {counts[0]:.1f}M parameters: {ratios['same']:.2f} x")
    print(f"  around its own U-Net, {counts[1]:.1f}M parameters: {ratios['other']:.2f} x")


def serpentine_training_step(config, precision, device, compiled=False):
    """One optimizer step of the second stage of serpentine_vae's train(), a function of its number, on latents of
    nothing."""
    torch.manual_seed(0)
    model = serpentine_vae.Denoiser(config.channels, config.width, config.multipliers, config.depth).to(device)
    if precision == "fp32":  # the plain way, as a peer would
        model.to(memory_format=torch.contiguous_format)
    if compiled:
        serpentine_vae.compile_blocks(dataclasses.replace(config, compile=True), model, device)
    cells = config.image_size // serpentine_vae.STRIDE
    latent = torch.randn(config.batch_size, config.channels, cells, cells, device=device)
    noise, u = torch.randn_like(latent), torch.rand(config.batch_size, device=device)

    def loss():
        return serpentine_vae.noise_loss(config, model, latent, noise, u)

    return whole_step(config, precision, device, model, loss)


def bench_serpentine_demo(device):
    config = common.make_config(serpentine_vae.Config, {}, serpentine_vae.PRESETS)
    compare_training("serpentine denoiser, demo preset", config, device, 7, serpentine_training_step)


def peak_bytes(function):
    """Most bytes of tensors that live at a time while function() runs on the CPU, as torch's profiler counts them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def bench_serpentine_paper(device):
    """A whole optimizer step of the paper preset at its own batch of 32."""
    config, cpu = common.make_config(serpentine_vae.Config, {"preset": "paper"}, serpentine_vae.PRESETS), "cpu"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        serpentine_training_step(config, common.pick_precision("auto", device), device)(1)
        print(f"paper preset, batch 32: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB at the GPU's peak")
    peak = peak_bytes(lambda: serpentine_training_step(config, "bf16", torch.device(cpu))(1))
    print(f"paper preset, batch 32: {peak / 2**30:.2f} GiB of tensors at the peak, counted on the CPU")


def bench_serpentine_block(device):
    """A serpentine against full self-attention of the same width, forward and backward, one map."""
    width, heads, fast, sides, memory = 128, 4, common.pick_precision("auto", device), (32, 64, 128), {}
    torch.manual_seed(0)
    serpentine, norm = serpentine_vae.Serpentine(width), serpentine_vae.CellNorm(width)
    enter, leave = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
    modules = torch.nn.ModuleList([serpentine, norm, enter, leave]).to(device)

    def attend(kernel, x):
        cells = norm(x).flatten(2).transpose(1, 2)
        q, k, v = enter(cells).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return x + leave(kernel(q, k, v).transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, x.shape[2:])

    for side in sides:
        x = torch.randn(1, width, side, side, device=device).to(memory_format=torch.channels_last).requires_grad_()

        def both_ways(block, x=x):
            with common.autocast(device, fast):
                block(x).float().sum().backward()
            modules.zero_grad()

        ways = {
            "serpentine": lambda: both_ways(serpentine),
            "torch's attention": lambda: both_ways(functools.partial(attend, F.scaled_dot_product_attention)),
        }
        if side < 128:  # two matrix products, quadratic in memory
            ways["plain attention"] = lambda: both_ways(functools.partial(attend, common.attention))
        seconds = median_seconds(ways, 5)
        memory[side] = {name: peak_bytes(way) for name, way in ways.items()} if device.type == "cpu" else {}
        for name, s in seconds.items():
            ratio, mib = s / seconds["serpentine"], memory[side].get(name, 0) / 2**20
            print(f"{side} x {side}, {name}: {1000 * s:.1f} ms, {ratio:.2f} x the serpentine's, {mib:.1f} MiB")
    if device.type == "cpu":
        growth = [math.log(memory[side]["serpentine"]) for side in sides]
        positions = torch.tensor([math.log(side**2) for side in sides])
        slope = ((positions - positions.mean()) * torch.tensor(growth)).sum() / positions.var() / (len(sides) - 1)
        print(f"the serpentine's memory grows as positions to the power of {slope.item():.2f}")


def bench_serpentine_scan(device):
    """The scan against a loop over 4,096 positions, forward alone and with the way back."""
    a = torch.rand(1, 4096, 128, device=device, requires_grad=True)
    b = torch.randn(1, 4096, 128, device=device, requires_grad=True)

    def loop(a, b):
        h, states = torch.zeros_like(b[:, 0]), []
        for t in range(b.shape[1]):
            h = a[:, t] * h + b[:, t]
            states.append(h)
        return torch.stack(states, dim=1)

    with torch.no_grad():
        ways = {"scan": lambda: serpentine_vae.scan(a, b), "loop": lambda: loop(a, b)}
        forward = median_seconds(ways, 7)
    ways = {
        "scan": lambda: serpentine_vae.Scan.apply(a, b).sum().backward(),
        "loop": lambda: loop(a, b).sum().backward(),
    }
    both = median_seconds(ways, 5)
    print(
        f"scan of 4,096 positions: {1000 * forward['scan']:.1f} ms, {forward['loop'] / forward['scan']:.0f} x a loop; ",
        end="",
    )
    print(f"with the way back {1000 * both['scan']:.1f} ms, {both['loop'] / both['scan']:.0f} x")


SERVER = """
import sys, time
sys.path.insert(0, "tests")
from webserver import Server
content = open(sys.argv[1], "rb").read()
with Server(latency=0.05, content=lambda number: content) as server:
    print(server.address, flush=True)
    time.sleep(600)
"""


def bench_stream(device):
    """Pictures of 256 pixels a second from a server that takes 50 ms to answer, fetched by one thread and by 16; and
    decoded, without any web."""
    with tempfile.TemporaryDirectory() as folder:
        path, names = Path(folder) / "face.jpg", f"{folder}/lines.jsonl"
        common.paint_face(0, 256)[0].save(path, quality=90)
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        address, speed = server.stdout.readline().strip(), {}
        try:
            lines = [{"url": f"{address}/good/{n}", "caption": "a face"} for n in range(10_000)]
            Path(names).write_text("\n".join(map(json.dumps, lines)))
            for threads in (1, 16):
                config = dit_t2i.Config(stream=names, image_size=256, threads=threads, per_host=threads, cache_gb=0.0)
                config.private_hosts = True
                with contextlib.closing(dit_t2i.Stream(config)) as stream:
                    for _ in range(5 * threads):
                        stream.sample()
                    start, count = time.perf_counter(), 60 * threads
                    for _ in range(count):
                        stream.sample()
                    speed[threads] = count / (time.perf_counter() - start)
                    print(f"{threads} threads: {speed[threads]:.0f} pictures/s")
        finally:
            server.kill()
        content = path.read_bytes()
        pool = concurrent.futures.ThreadPoolExecutor(16)
        start = time.perf_counter()
        list(pool.map(lambda _: dit_t2i.decode_picture(content, 256), range(2000)))
        print(f"decoded from memory: {2000 / (time.perf_counter() - start):.0f} pictures/s")
    print(f"16 threads fetch {speed[16] / speed[1]:.1f} x what one does")


def bench_restarts(device):
    """kill -9 of one of two processes at random moments, 20 times, under torchrun --max-restarts."""
    kills, every, steps, rng = 20, 10, 12_000, random.Random(0)
    small = "--image-size 16 --depth 2 --num-heads 2 --head-dim 8 --text-dim 16 --batch-size 8 --precision fp32"
    with tempfile.TemporaryDirectory() as folder:
        state, data = Path(folder) / "run" / "state.safetensors", Path(folder) / "data"
        data.mkdir()
        for i in range(32):
            common.paint_face(i, 16)[0].save(data / f"{i}.png")
            (data / f"{i}.txt").write_text("a face")
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        words += [f"--max-restarts={kills}", str(ROOT / "dit_t2i.py"), "train", *small.split(), f"--data={data}"]
        words += [f"--out={state.parent}", f"--steps={steps}", f"--checkpoint-every={every}", "--device=cpu"]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        with open(Path(folder) / "log", "w") as log:
            job = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)

        def attempts():
            return re.findall(r"(fresh run|resumed at step \d+)", (Path(folder) / "log").read_text())

        reached, lost, begun = 0, [], 0

        def note_attempts():
            nonlocal begun
            for told in attempts()[begun:]:
                lost.append(reached - int(told.split()[-1]) if "resumed" in told else 0)
            begun = len(attempts())

        for _ in range(kills):
            early = rng.random() < 0.2  # while the processes still look for each other
            while job.poll() is None and not early and len(attempts()) == begun:
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 4))
            note_attempts()
            workers = subprocess.run(["ps", "-o", "pid=", "--ppid", str(job.pid)], capture_output=True, text=True)
            if job.poll() is None and workers.stdout.split():
                os.kill(int(rng.choice(workers.stdout.split())), signal.SIGKILL)
                time.sleep(0.3)
                reached = common.load_tensors(state)[1]["step"] if state.exists() else 0
        code = job.wait()
        note_attempts()
        step = common.load_tensors(state)[1]["step"]
        print(f"{kills} kills, {begun} attempts that began to train; exit code {code} at step {step} of {steps};")
        print(f"steps between the last checkpoint and where the next attempt went on: at most {max(map(abs, lost))}")


def kept_for_backward(config, batch):
    """(bytes that a training step of `batch` pictures keeps for its way back beside the float32 weights, FLOPs there
    and back), from shapes alone: nothing is computed."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = dit_t2i.build_model(config, 4, 32, 0)
        x, t, text = torch.randn(batch, 4, 32, 32), torch.rand(batch), torch.randn(batch, 77, 768)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu"):
            loss = model(x, t, text).square().mean()
        for p in model.parameters():
            kept.pop(p.untyped_storage()._cdata, None)
        loss.backward()
    return sum(kept.values()), counter.get_total_flops()


def bench_scale(device, gpus=8, batch=8, flops=989e12, share=0.4):
    """What sizes of the dual-stream transformer cost: COMPUTED from its shapes, for `batch` pictures on each GPU as
    latents of 32 x 32 with 77 tokens of text, on GPUs of so many FLOP/s of which training gets a share. Weights,
    gradients, two moments and averages take 20 bytes a parameter."""
    print(
        f"| parameters | layers x width | 1 GPU, or DDP | FSDP on {gpus} | ... layers computed twice | image tokens/s |"
    )
    for depth, heads in ((12, 12), (16, 16), (24, 20), (28, 28)):
        given = dict(preset="paper", depth=depth, num_heads=heads)
        config = common.make_config(dit_t2i.Config, given, dit_t2i.PRESETS)
        kept = {}
        for twice in (False, True):
            config.checkpoint_activations = twice
            one, work = kept_for_backward(config, 1)
            more, _ = kept_for_backward(config, 2)
            kept[twice] = one + (batch - 1) * (more - one)
            if not twice:
                speed = 256 * flops * share / work
        with torch.device("meta"):
            model = dit_t2i.build_model(config, 4, 32, 0)
        count = sum(p.numel() for p in model.parameters())
        layer = sum(p.numel() for p in model.layers[0].parameters())
        shards = 20 * count / gpus + 8 * layer  # two layers are whole at a time, one at work and one on its way
        cells = [f"{count / 1e6:,.0f} M", f"{depth} x {64 * heads}", f"{(20 * count + kept[False]) / 2**30:.1f} GiB"]
        cells += [f"{(shards + kept[twice]) / 2**30:.1f} GiB" for twice in (False, True)]
        print("|", " | ".join([*cells, f"{speed:,.0f}"]), "|")


NAMES = "attention demo paper sample data text_demo text_paper text_memory text_vae text_sample text_solvers"
NAMES += " unet_demo unet_paper serpentine_demo serpentine_paper serpentine_block serpentine_scan"
NAMES += " stream restarts scale unet_peer"  # the last wants packages that the tests do without

if __name__ == "__main__":
    common.keep_freed_memory()
    chosen = sys.argv[1:] or NAMES.split()
    for name in chosen:
        globals()[f"bench_{name}"](common.pick_device("auto"))
