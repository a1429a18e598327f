"""Speed and memory, by row: `python experiments/bench.py [ROW ...]`, all rows by default.

    python experiments/bench.py train_jit_lab sample_jit_lab     pictures per second, each way in turns
    python experiments/bench.py train_dit_t2i --repo ../old      ... and against the same file of another checkout
    python experiments/bench.py attention scan serpentine vae    parts on the CPU, against other implementations
    python experiments/bench.py memory scale                     memory of a training step

Rows that begin with train_, sample_ or stream run the files from outside, by their command lines, so --repo may name a
checkout of another version. Whatever is compared is measured in turns within one call, so ratios hold although the
machine's load varies; times do not. Nothing here is a test.
"""

import argparse
import csv
import http.server
import io
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import dit_t2i  # noqa: E402
import serpentine_vae  # noqa: E402
import unet_ddpm  # noqa: E402

CPU = torch.device("cpu")


def compare(title, ways, rounds, unit="s"):
    """Call each of `ways`, name -> function(), in turns, so that all meet the same load. Print the median of each one's
    results, or of its durations in seconds after two calls to warm up, and the ratio to the first."""
    results = {name: [] for name in ways}
    warm_up = 2 if unit == "s" else 0
    for _ in range(warm_up + rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            result = way()
            results[name].append(time.perf_counter() - start if unit == "s" else result)
    medians = {name: statistics.median(values[warm_up:]) for name, values in results.items()}
    print(title, flush=True)
    first = next(iter(medians.values()))
    for name, value in medians.items():
        print(f"  {name:24s} {value:10.4g} {unit}   {value / first:5.2f} x the first", flush=True)


# ----------------------------------------------------------------------------------------------------------------
# Training and sampling from outside, here and in another checkout

LINES = 8  # lines of log.csv, ten steps each, that a round measures
SKIPPED = 3  # lines before them, in which the compiler works


def training_speed(repo, words):
    """Pictures per second of `python FILE.py train ...` in a checkout, from its log.csv. The budget is so large that no
    samples are taken while it is measured."""
    with tempfile.TemporaryDirectory() as folder:
        log, rows = Path(folder) / "run" / "log.csv", []
        end = ["--steps", "100000", "--checkpoint-every", "100000", "--out", str(log.parent)]
        command = [sys.executable, str(repo / words[0]), "train", *words[1:], *end]
        pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        with subprocess.Popen(command, cwd=folder, **pipes) as process:
            try:
                while len(rows) < SKIPPED + LINES:
                    if process.poll() is not None:
                        sys.exit(f"{' '.join(command)} ended: {process.stderr.read()[-1000:]}")
                    time.sleep(0.1)
                    rows = list(csv.DictReader(log.read_text().splitlines())) if log.exists() else []
            finally:
                process.kill()
    return statistics.median(float(row["images_per_second"]) for row in rows[SKIPPED : SKIPPED + LINES])


def train(file, size, words, options):
    """`train` on 256 painted faces, as it runs by default, in two plainer ways and in --repo."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(256):
            common.paint_face(i, size)[0].save(f"{folder}/{i}.png")
            Path(f"{folder}/{i}.txt").write_text("a red car")
        shared = [file, "--data", folder, "--image-size", str(size), *words]
        ways = {name: partial(training_speed, repo, shared) for name, repo in options.repos.items()}
        for name, more in (("not compiled", ""), ("eager fp32", "--precision fp32")):
            ways[name] = partial(training_speed, ROOT, [*shared, "--no-compile", *more.split()])
        compare(f"train, {file} {' '.join(words)}", ways, options.rounds, "pictures/s")


# Runs a command line twice in one process and prints the seconds of the second time, without Python's start.
TWICE = """
import importlib, sys, time
sys.path.insert(0, sys.argv[1])
module = importlib.import_module(sys.argv[2])
for _ in range(2):
    start = time.perf_counter()
    assert module.main(sys.argv[3:]) == 0
print(time.perf_counter() - start)
"""


def sample(system, num, words, options):
    """`sample` with the shipped weights, here and in --repo: loading, sampling and writing."""
    words = ["sample", *words, "--num", str(num), "--weights", f"{ROOT}/weights/{system}.safetensors"]

    def speed(repo):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", TWICE, str(repo), system, *words, "--out", f"{folder}/x.png"]
            done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        return num / float(done.stdout.split()[-1])

    ways = {name: partial(speed, repo) for name, repo in options.repos.items()}
    compare(f"sample, {system}.py, {num} pictures", ways, options.rounds + 2, "pictures/s")


# ----------------------------------------------------------------------------------------------------------------
# Streaming


class SlowPicture(http.server.BaseHTTPRequestHandler):
    """Answers every request with the same picture after 50 ms."""

    protocol_version, content = "HTTP/1.1", b""

    def do_GET(self):
        time.sleep(0.05)
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_):
        pass


def stream(options):
    """Pictures of 256 pixels per second that a very small model is trained on, fetched by 1 thread and by 16."""
    common.paint_face(0, 256)[0].save(buffer := io.BytesIO(), "JPEG", quality=90)
    SlowPicture.content = buffer.getvalue()
    server = http.server.ThreadingHTTPServer(("", 0), SlowPicture)
    server.handle_error = lambda *_: None  # its clients are killed
    threading.Thread(target=server.serve_forever, daemon=True).start()
    small = "--image-size 256 --patch-size 64 --depth 1 --num-heads 1 --head-dim 8 --text-dim 8 --batch-size 8"
    with tempfile.TemporaryDirectory() as folder:
        # Two addresses, since dit_t2i.py asks one host for at most 8 pictures at a time.
        urls = [f"http://127.0.0.{1 + n % 2}:{server.server_port}/{n}" for n in range(10_000)]
        lines = [json.dumps({"url": url, "caption": "a face"}) for url in urls]
        Path(f"{folder}/lines.jsonl").write_text("\n".join(lines))
        words = ["dit_t2i.py", "--stream", f"{folder}/lines.jsonl", "--private-hosts", "--no-compile", *small.split()]
        ways = {
            f"{threads} threads, {name}": partial(training_speed, repo, [*words, "--threads", str(threads)])
            for name, repo in options.repos.items()
            for threads in (1, 16)
        }
        compare("train --stream, a server that takes 50 ms", ways, 1, "pictures/s")
    server.shutdown()


# ----------------------------------------------------------------------------------------------------------------
# Parts against other implementations


def attention(options):
    for tokens in (100, 400):
        q, k, v = torch.randn(3, 16, 6, tokens, 64).bfloat16().unbind(0)
        for x in (q, k, v):
            x.requires_grad_()
        ways = {
            "common.attention": lambda q=q, k=k, v=v: common.attention(q, k, v).sum().backward(),
            "torch's fused kernel": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v).sum().backward(),
        }
        compare(f"attention over {tokens} tokens, bf16, forward and backward", ways, 15)


def scan(options):
    """The scan along all eight paths against a loop over 4,096 positions."""
    a = torch.rand(1, 4096, 128, requires_grad=True)
    b = torch.randn(1, 4096, 128, requires_grad=True)

    def loop():
        h, states = torch.zeros_like(b[:, 0]), []
        for t in range(b.shape[1]):
            h = a[:, t] * h + b[:, t]
            states.append(h)
        return torch.stack(states, dim=1)

    ways = {
        "scan": lambda: serpentine_vae.scan_map(a, b, 64, 64).sum().backward(),
        "loop": lambda: loop().sum().backward(),
    }
    compare("scan of 4,096 positions, forward and backward", ways, 5)


def peak_bytes(function):
    """Most bytes of tensors that exist at a time while function() runs on the CPU, as torch's profiler counts them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


class Attention(nn.Module):
    """Full self-attention over a map (B, D, h, w), in the place of a Serpentine."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.enter = serpentine_vae.LayerNorm2d(width), nn.Linear(width, 3 * width)
        self.leave = common.zero_init(nn.Linear(width, width))

    def forward(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, N, D)
        q, k, v = self.enter(tokens).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)  # (B, 4, N, D/4) each
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.leave(mixed).transpose(1, 2).unflatten(2, x.shape[2:])


def serpentine(options):
    """A serpentine layer against full self-attention of the same width, forward and backward, one map."""
    width, fast, memory = 128, common.pick_precision("auto", CPU), {}
    torch.manual_seed(0)
    layers = {"serpentine": serpentine_vae.Serpentine(width), "torch's attention": Attention(width)}
    for side in (32, 64, 128):
        x = torch.randn(1, width, side, side).to(memory_format=torch.channels_last).requires_grad_()

        def both_ways(layer, x=x):
            with common.autocast(CPU, fast):
                layer(x).float().sum().backward()
            layer.zero_grad()

        ways = {name: partial(both_ways, layer) for name, layer in layers.items()}
        compare(f"{side} x {side}, forward and backward", ways, 5)
        memory[side] = peak_bytes(ways["serpentine"])
        print(f"  the serpentine takes {memory[side] / 2**20:.1f} MiB")
    growth = math.log(memory[128] / memory[32]) / math.log(128**2 / 32**2)
    print(f"the serpentine's memory grows as positions to the power of {growth:.2f}")


@torch.no_grad()
def vae(options):
    """Four pictures of 256 pixels decoded, against diffusers with the same weights."""
    import diffusers

    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    sizes = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4)
    theirs = diffusers.AutoencoderKL(**blocks, **sizes).eval()
    ours = common.AutoencoderKL().eval().to(memory_format=torch.channels_last)
    ours.load_state_dict(theirs.state_dict())
    latent, fast = torch.randn(4, 4, 32, 32), common.pick_precision("auto", CPU)

    def decode():
        with common.autocast(CPU, fast):
            return ours.decode(latent)

    ways = {f"ours, {fast}": decode, "diffusers, fp32": lambda: theirs.decode(latent / 0.18215).sample}
    compare("VAE, 4 pictures decoded", ways, 3)
    for name, way in ways.items():
        print(f"  {name}: {peak_bytes(way) / 2**20:.0f} MiB beside the weights")


@torch.no_grad()
def peer(options):
    """DDIM in 20 steps against denoising-diffusion-pytorch's loop around the same network. Needs pip install --no-deps
    denoising-diffusion-pytorch ema-pytorch einops accelerate."""
    # The package imports torchvision, which its sampler does not use.
    for name in ("torchvision", "torchvision.transforms", "torchvision.utils"):
        sys.modules[name] = types.ModuleType(name)
    from denoising_diffusion_pytorch import GaussianDiffusion

    model, config = unet_ddpm.load_model(ROOT / "weights" / "unet_ddpm_ddpm.safetensors", "cpu")
    # What their loop asks of a network.
    model.channels = model.out_dim = 12
    model.self_condition = model.random_or_learned_sinusoidal_cond = False
    sizes = dict(image_size=20, timesteps=1000, sampling_timesteps=20)
    theirs = GaussianDiffusion(model, objective="pred_noise", auto_normalize=False, **sizes)
    ways = {
        "unet_ddpm.sample": lambda: unet_ddpm.sample(model, config, num=32, steps=20),
        "their loop": lambda: theirs.sample(batch_size=32),
    }
    compare("32 pictures by DDIM in 20 steps", ways, 5)


def solvers(options):
    """Distance of dit_t2i.py's samples from the exact path, 200 steps of Heun, over 32 prompts, in units of [-1, 1]."""
    model, config = dit_t2i.load_model(ROOT / "weights" / "dit_t2i.safetensors", "cpu")
    encoder = dit_t2i.load_text_encoder(model, "")
    colours = "red orange yellow green teal blue purple pink".split()
    text = encoder([f"a {colour} {thing}" for thing in ("car", "fish", "house", "apple") for colour in colours])
    shape = (3, config.image_size, config.image_size)

    def sample(solver, steps):
        settings = dict(steps=steps, solver=solver, cfg=config.cfg, batch_size=32)
        return dit_t2i.sample_latents(model, text, encoder([""]), shape, **settings)

    exact = sample("heun", 200)
    for solver, steps in itertools.product(("euler", "dpm", "heun"), (14, 28)):
        distance = (sample(solver, steps) - exact).square().mean().sqrt()
        print(f"{solver} in {steps} steps: {distance:.4f} from the exact path", flush=True)


# ----------------------------------------------------------------------------------------------------------------
# Memory


def memory(options):
    """Bytes of tensors in one whole optimizer step of a paper preset in bf16, counted on the CPU, beside the weights,
    AdamW's moments and the averaged weights."""

    def step(model, config, *inputs):
        optimizer, _ = common.make_optimizer(config, model, CPU)

        def once():
            with common.autocast(CPU, "bf16"):
                output = model(*inputs)
            output.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        once()  # makes the moments
        return peak_bytes(once) / 2**30

    for checkpointing in (False, True):
        given = dict(preset="paper", checkpoint_activations=checkpointing)
        config = common.make_config(dit_t2i.Config, given, dit_t2i.PRESETS)
        inputs = torch.randn(4, 4, 32, 32), torch.rand(4), torch.randn(4, 77, 768)
        peak = step(dit_t2i.build_model(config, (4, 32)), config, *inputs)
        print(f"dit_t2i, 258M, batch 4, --checkpoint-activations {checkpointing}: {peak:.2f} GiB", flush=True)
    config = common.make_config(serpentine_vae.Config, {"preset": "paper"}, serpentine_vae.PRESETS)
    inputs = torch.randn(32, config.channels, 32, 32), torch.rand(32) * 999
    peak = step(serpentine_vae.build_denoiser(config), config, *inputs)
    print(f"serpentine_vae, paper preset, batch 32 of 256 pixels: {peak:.2f} GiB", flush=True)


def kept_for_backward(config, batch):
    """(bytes that a training step of `batch` pictures keeps for its backward pass beside the float32 weights, FLOPs of
    both passes), from shapes alone: nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    kept = {}
    for function in [*vars(common).values(), *vars(dit_t2i).values()]:  # cached tables of another fake mode
        if hasattr(function, "cache_clear"):
            function.cache_clear()

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = dit_t2i.build_model(config, (4, 32))
        x, t, text = torch.randn(batch, 4, 32, 32), torch.rand(batch), torch.randn(batch, 77, 768)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu"):
            loss = model(x, t, text).square().mean()
        for p in model.parameters():
            kept.pop(p.untyped_storage()._cdata, None)
        loss.backward()
    return sum(kept.values()), counter.get_total_flops()


def scale(options):
    """The table of docs/distributed.md, COMPUTED from the shapes of the dual-stream transformer: 8 pictures on each of
    8 GPUs, of whose 989 TFLOP/s training gets 40 %. Weights, gradients, two moments and averages take 20 bytes for each
    parameter."""
    print("| parameters | layers x width | one GPU, or DDP | --fsdp on 8 | and --checkpoint-activations | tokens/s |")
    for depth, heads in ((12, 12), (16, 16), (24, 20), (28, 28)):
        given = dict(preset="paper", depth=depth, num_heads=heads)
        config = common.make_config(dit_t2i.Config, given, dit_t2i.PRESETS)
        kept = {}
        for twice in (False, True):
            config.checkpoint_activations = twice
            (one, work), (two, _) = (kept_for_backward(config, batch) for batch in (1, 2))
            kept[twice] = one + 7 * (two - one)
            if not twice:
                speed = 256 * 0.4 * 989e12 / work
        with torch.device("meta"):
            model = dit_t2i.build_model(config, (4, 32))
        count = sum(p.numel() for p in model.parameters())
        layer = sum(p.numel() for p in model.layers[0].parameters())
        shards = 20 * count / 8 + 8 * layer  # two layers are whole at a time: one computes, the next is on its way
        row = [f"{count / 1e6:,.0f} M", f"{depth} x {64 * heads}", f"{(20 * count + kept[False]) / 2**30:.1f} GiB"]
        row += [f"{(shards + kept[twice]) / 2**30:.1f} GiB" for twice in (False, True)]
        print("|", " | ".join([*row, f"{speed:,.0f}"]), "|", flush=True)


# ----------------------------------------------------------------------------------------------------------------
# Command line

VAE_WEIGHTS = "--vae", f"{ROOT}/weights/serpentine_vae.safetensors"
ROWS = {
    "train_jit_lab": partial(train, "jit_lab.py", 80, ["--color-fraction", "1", "--full-image-prob", "1"]),
    "train_dit_t2i": partial(train, "dit_t2i.py", 64, ["--batch-size", "64"]),
    "train_unet_ddpm": partial(train, "unet_ddpm.py", 40, []),
    "train_serpentine": partial(train, "serpentine_vae.py", 80, VAE_WEIGHTS),
    "sample_jit_lab": partial(sample, "jit_lab", 16, []),
    "sample_dit_t2i": partial(sample, "dit_t2i", 4, ["a red car"]),
    "sample_unet_ddpm": partial(sample, "unet_ddpm", 32, ["--steps", "20"]),
    "sample_serpentine": partial(sample, "serpentine_vae", 16, []),
}
ROWS |= {row.__name__: row for row in (stream, attention, scan, serpentine, vae, peer, solvers, memory, scale)}


def parse(words):
    """The options of a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--repo", type=Path, help="another checkout, for the rows train_*, sample_* and stream")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is measured")
    options = parser.parse_args(words)
    options.repos = {"this code": ROOT} | ({"--repo": options.repo.resolve()} if options.repo else {})
    return options


if __name__ == "__main__":
    common.keep_freed_memory()
    options = parse(sys.argv[1:])
    for name in options.rows or [name for name in ROWS if name != "peer"]:
        ROWS[name](options)
