"""Speed and memory, by row: `python experiments/bench.py [ROW ...]`, all rows by default.

    python experiments/bench.py train_jit_lab sample_jit_lab     pictures per second, each way in turns
    python experiments/bench.py train_dit_t2i --repo ../old      ... and against the same file of another checkout
    python experiments/bench.py attention scan serpentine vae    parts, against other implementations
    python experiments/bench.py memory scale                     memory of a training step

Rows that begin with train_, sample_ or stream run the files from outside, by their command lines, so --repo may name a
checkout of another version. Whatever is compared is measured in turns within one call, so ratios hold although the
machine's load varies; times do not. Nothing here is a test.
"""

import argparse
import copy
import csv
import functools
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
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import dit_t2i  # noqa: E402
import serpentine_vae  # noqa: E402
import unet_ddpm  # noqa: E402


def report(title, medians, unit, decimals=1):
    """Print the medians, name -> number, each beside its ratio to the first."""
    print(title, flush=True)
    first = next(iter(medians.values()))
    for name, value in medians.items():
        print(f"  {name:24s} {value:10.{decimals}f} {unit}   {value / first:5.2f} x the first", flush=True)


def in_turns(ways, rounds):
    """Median result of each function, name -> function(), called in turns so that all meet the same load."""
    results = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            results[name].append(way())
    return {name: statistics.median(values) for name, values in results.items()}


def median_seconds(functions, rounds):
    """Median duration of each function, called in turns, after two calls of each to warm up."""

    def timed(function):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for function in functions.values():
        function()
        function()
    return in_turns({name: functools.partial(timed, function) for name, function in functions.items()}, rounds)


# ----------------------------------------------------------------------------------------------------------------
# Training and sampling from outside, here and in another checkout

LINES = 8  # lines of log.csv, ten steps each, that a round measures
SKIPPED = 3  # lines before them, in which the compiler works


def write_pictures(folder, size):
    """256 painted faces with captions, as a folder."""
    for i in range(256):
        common.paint_face(i, size)[0].save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a red car")


def training_speed(repo, words):
    """Pictures per second of `python FILE.py train ...` in a checkout, from its log.csv. The budget is so large that no
    samples are taken while it is measured."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "run" / "log.csv"
        end = ["--steps", "100000", "--checkpoint-every", "100000", "--out", str(log.parent)]
        command = [sys.executable, str(repo / words[0]), "train", *words[1:], *end]
        with open(Path(folder) / "errors", "w+") as errors:
            process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=errors)
            try:
                rows = []
                while process.poll() is None and len(rows) < SKIPPED + LINES:
                    time.sleep(0.1)
                    rows = list(csv.DictReader(log.read_text().splitlines())) if log.exists() else []
            finally:
                process.kill()
                process.wait()
            if len(rows) < SKIPPED + LINES:
                errors.seek(0)
                sys.exit(f"{' '.join(command)} ended: {errors.read()[-1000:]}")
    return statistics.median(float(row["images_per_second"]) for row in rows[SKIPPED : SKIPPED + LINES])


def train_row(file, *words, size, ways):
    """A row that measures `train` in several ways, name -> further words, and the first way in --repo, too."""

    def row(options):
        with tempfile.TemporaryDirectory() as folder:
            write_pictures(Path(folder), size)
            data = [file, "--data", folder, "--image-size", str(size), *words]
            runs = {name: functools.partial(training_speed, ROOT, data + more.split()) for name, more in ways.items()}
            if options.repo:
                first = next(iter(ways.values())).split()
                runs["--repo"] = functools.partial(training_speed, options.repo, data + first)
            report(f"train, {file}, {' '.join(words)}", in_turns(runs, options.rounds), "pictures/s")

    return row


WAYS = {"as it runs by default": "", "not compiled": "--no-compile", "eager fp32": "--no-compile --precision fp32"}

# Runs a file's command lines in one process: reads argument lists, prints seconds.
WORKER = """
import contextlib, importlib, io, json, sys, time
sys.path.insert(0, sys.argv[1])
module = importlib.import_module(sys.argv[2])
for line in sys.stdin:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        code = module.main(json.loads(line))
    print(json.dumps([code, time.perf_counter() - start]), flush=True)
"""


def sample_row(system, *words, num):
    """A row that measures `sample` with the shipped weights: loading, sampling and writing, without Python's start."""

    def row(options):
        workers, ways = [], {}
        with tempfile.TemporaryDirectory() as folder:
            weights = ["--weights", str(ROOT / "weights" / f"{system}.safetensors"), "--out", f"{folder}/x.png"]
            line = ["sample", *words, *weights]

            def ask(worker):
                worker.stdin.write(json.dumps(line) + "\n")
                worker.stdin.flush()
                code, seconds = json.loads(worker.stdout.readline())
                assert code == 0, line
                return num / seconds

            repos = {"here": ROOT} | ({"--repo": options.repo} if options.repo else {})
            for name, repo in repos.items():
                start = [sys.executable, "-c", WORKER, str(repo), system]
                pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                workers.append(subprocess.Popen(start, cwd=folder, **pipes))
                ways[name] = functools.partial(ask, workers[-1])
                ways[name]()
            report(f"sample, {system}.py, {' '.join(words)}", in_turns(ways, options.rounds + 2), "pictures/s")
            for worker in workers:
                worker.stdin.close()
                worker.wait()

    return row


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
    buffer = io.BytesIO()
    common.paint_face(0, 256)[0].save(buffer, "JPEG", quality=90)
    SlowPicture.content = buffer.getvalue()
    server = http.server.ThreadingHTTPServer(("", 0), SlowPicture)
    server.handle_error = lambda *_: None  # its clients are killed
    threading.Thread(target=server.serve_forever, daemon=True).start()
    small = "--image-size 256 --patch-size 64 --depth 1 --num-heads 1 --head-dim 8 --text-dim 8 --batch-size 8"
    with tempfile.TemporaryDirectory() as folder:
        # Two addresses, since dit_t2i.py asks one host for at most 8 pictures at a time.
        urls = [f"http://127.0.0.{1 + n % 2}:{server.server_port}/{n}" for n in range(10_000)]
        lines = [{"url": url, "caption": "a face"} for url in urls]
        (Path(folder) / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
        words = ["dit_t2i.py", "--stream", f"{folder}/lines.jsonl", "--private-hosts", "--no-compile", *small.split()]
        ways = {
            f"{threads} threads{name}": functools.partial(training_speed, repo, [*words, "--threads", str(threads)])
            for name, repo in {"": ROOT, " of --repo": options.repo}.items()
            for threads in (1, 16)
            if repo
        }
        report("train --stream, a server that takes 50 ms", in_turns(ways, 1), "pictures/s")
    server.shutdown()


# ----------------------------------------------------------------------------------------------------------------
# Parts against other implementations


def attention(options):
    for tokens in (100, 400):
        q, k, v = torch.randn(3, 16, 6, tokens, 64, device=options.device).bfloat16().unbind(0)
        for x in (q, k, v):
            x.requires_grad_()
        ways = {
            "common.attention": lambda q=q, k=k, v=v: common.attention(q, k, v).sum().backward(),
            "torch's fused kernel": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v).sum().backward(),
        }
        report(f"attention over {tokens} tokens, bf16, forward and backward", median_seconds(ways, 15), "s", 5)


def scan(options):
    """The scan against a loop over 4,096 positions."""
    a = torch.rand(1, 4096, 128, device=options.device)
    b = torch.randn(1, 4096, 128, device=options.device)

    def loop(a, b):
        h, states = torch.zeros_like(b[:, 0]), []
        for t in range(b.shape[1]):
            h = a[:, t] * h + b[:, t]
            states.append(h)
        return torch.stack(states, dim=1)

    ways = {"scan": lambda: serpentine_vae.scan(a, b), "loop": lambda: loop(a, b)}
    report("scan of 4,096 positions, forward", median_seconds(ways, 7), "s", 5)
    a.requires_grad_()
    b.requires_grad_()
    ways = {
        "scan": lambda: serpentine_vae.scan_map(a, b, 64, 64).sum().backward(),
        "loop": lambda: loop(a, b).sum().backward(),
    }
    report("forward and backward, the scan along all eight paths", median_seconds(ways, 5), "s", 5)


def peak_bytes(function):
    """Most bytes of tensors that exist at a time while function() runs on the CPU, as torch's profiler counts them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def serpentine(options):
    """A serpentine layer against full self-attention of the same width, forward and backward, one map."""
    width, heads, fast, memory = 128, 4, common.pick_precision("auto", options.device), {}
    torch.manual_seed(0)
    layer, norm = serpentine_vae.Serpentine(width), serpentine_vae.LayerNorm2d(width)
    enter, leave = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
    modules = torch.nn.ModuleList([layer, norm, enter, leave]).to(options.device)

    def attend(x):
        tokens = norm(x).flatten(2).transpose(1, 2)
        q, k, v = enter(tokens).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + leave(mixed).transpose(1, 2).unflatten(2, x.shape[2:])

    for side in (32, 64, 128):
        x = torch.randn(1, width, side, side, device=options.device).to(memory_format=torch.channels_last)
        x.requires_grad_()

        def both_ways(block, x=x):
            with common.autocast(options.device, fast):
                block(x).float().sum().backward()
            modules.zero_grad()

        ways = {
            "serpentine": functools.partial(both_ways, layer),
            "torch's attention": functools.partial(both_ways, attend),
        }
        report(f"{side} x {side}, forward and backward", median_seconds(ways, 5), "s", 4)
        if options.device.type == "cpu":
            memory[side] = peak_bytes(ways["serpentine"])
            print(f"  the serpentine takes {memory[side] / 2**20:.1f} MiB")
    if memory:
        growth = math.log(memory[128] / memory[32]) / math.log(128**2 / 32**2)
        print(f"the serpentine's memory grows as positions to the power of {growth:.2f}")


@torch.no_grad()
def vae(options):
    """Four pictures of 256 pixels decoded, against diffusers with the same weights."""
    import diffusers

    widths = (128, 256, 512, 512)
    blocks = {
        f"{way}_block_types": (f"{way.title()}{part}Block2D",) * 4
        for way, part in (("down", "Encoder"), ("up", "Decoder"))
    }
    theirs = diffusers.AutoencoderKL(block_out_channels=widths, layers_per_block=2, latent_channels=4, **blocks)
    theirs = theirs.to(options.device).eval()
    ours = common.AutoencoderKL().to(options.device).eval().to(memory_format=torch.channels_last)
    ours.load_state_dict(theirs.state_dict())
    latent, fast = torch.randn(4, 4, 32, 32, device=options.device), common.pick_precision("auto", options.device)

    def decode():
        with common.autocast(options.device, fast):
            return ours.decode(latent)

    ways = {f"ours, {fast}": decode, "diffusers, fp32": lambda: theirs.decode(latent / 0.18215).sample}
    report("VAE, 4 pictures decoded", median_seconds(ways, 3), "s")
    if options.device.type == "cpu":
        for name, way in ways.items():
            print(f"  {name}: {peak_bytes(way) / 2**20:.0f} MiB beside the weights")


@torch.no_grad()
def peer(options):
    """DDIM in 20 steps against denoising-diffusion-pytorch's loop around the same network. Needs pip install --no-deps
    denoising-diffusion-pytorch ema-pytorch einops accelerate."""
    # The package imports torchvision, which its sampler does not use.
    for name in ("torchvision", "torchvision.transforms", "torchvision.utils"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
    sys.modules["torchvision"].utils = sys.modules["torchvision.utils"]
    from denoising_diffusion_pytorch import GaussianDiffusion

    model, config = unet_ddpm.load_model(ROOT / "weights" / "unet_ddpm_ddpm.safetensors", options.device)

    class Theirs(torch.nn.Module):
        """The same network as their loop calls it."""

        channels, out_dim, self_condition, random_or_learned_sinusoidal_cond = 12, 12, False, False

        def __init__(self):
            super().__init__()
            self.network = copy.deepcopy(model)

        def forward(self, x, t, x_self_cond=None):
            return self.network(x, t)

    sizes = dict(image_size=20, timesteps=1000, sampling_timesteps=20)
    theirs = GaussianDiffusion(Theirs(), objective="pred_noise", auto_normalize=False, **sizes).to(options.device)
    ways = {
        "unet_ddpm.sample": lambda: unet_ddpm.sample(model, config, num=32, steps=20),
        "their loop": lambda: theirs.sample(batch_size=32),
    }
    report("32 pictures by DDIM in 20 steps", median_seconds(ways, 5), "s")


def solvers(options):
    """Distance of dit_t2i.py's samples from the exact path, 200 steps of Heun, over 32 prompts, in units of [-1, 1]."""
    model, config = dit_t2i.load_model(ROOT / "weights" / "dit_t2i.safetensors", options.device)
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
    cpu = torch.device("cpu")

    def step(model, config, *inputs):
        optimizer, _ = common.make_optimizer(config, model, cpu)

        def once():
            with common.autocast(cpu, "bf16"):
                output = model(*inputs)
            output.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        once()  # makes the moments
        return peak_bytes(once) / 2**30

    for checkpointing in (False, True):
        config = common.make_config(
            dit_t2i.Config, {"preset": "paper", "checkpoint_activations": checkpointing}, dit_t2i.PRESETS
        )
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


def scale(options, gpus=8, batch=8, flops=989e12, share=0.4):
    """The table of docs/distributed.md, COMPUTED from the shapes of the dual-stream transformer: `batch` pictures on
    each GPU, of which training gets a share of its FLOP/s. Weights, gradients, two moments and averages take 20 bytes
    for each parameter."""
    print("| parameters | layers x width | one GPU, or DDP | --fsdp on 8 | and --checkpoint-activations | tokens/s |")
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
            model = dit_t2i.build_model(config, (4, 32))
        count = sum(p.numel() for p in model.parameters())
        layer = sum(p.numel() for p in model.layers[0].parameters())
        shards = 20 * count / gpus + 8 * layer  # two layers are whole at a time: one computes, the next is on its way
        row = [f"{count / 1e6:,.0f} M", f"{depth} x {64 * heads}", f"{(20 * count + kept[False]) / 2**30:.1f} GiB"]
        row += [f"{(shards + kept[twice]) / 2**30:.1f} GiB" for twice in (False, True)]
        print("|", " | ".join([*row, f"{speed:,.0f}"]), "|", flush=True)


# ----------------------------------------------------------------------------------------------------------------
# Command line

VAE_WEIGHTS = "--vae", str(ROOT / "weights" / "serpentine_vae.safetensors")
ROWS = {
    "train_jit_lab": train_row("jit_lab.py", "--color-fraction", "1", "--full-image-prob", "1", size=80, ways=WAYS),
    "train_dit_t2i": train_row("dit_t2i.py", size=64, ways=WAYS),
    "train_unet_ddpm": train_row("unet_ddpm.py", size=40, ways=WAYS),
    "train_serpentine": train_row("serpentine_vae.py", *VAE_WEIGHTS, size=80, ways=WAYS),
    "sample_jit_lab": sample_row("jit_lab", "--num", "16", num=16),
    "sample_dit_t2i": sample_row("dit_t2i", "a red car", "--num", "4", num=4),
    "sample_unet_ddpm": sample_row("unet_ddpm", "--num", "32", "--steps", "20", num=32),
    "sample_serpentine": sample_row("serpentine_vae", "--num", "16", num=16),
    "stream": stream,
    "attention": attention,
    "scan": scan,
    "serpentine": serpentine,
    "vae": vae,
    "peer": peer,
    "solvers": solvers,
    "memory": memory,
    "scale": scale,
}


def parse(words):
    """The options of a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--repo", type=Path, help="another checkout, for the rows train_*, sample_* and stream")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is measured")
    options = parser.parse_args(words)
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"no row {', '.join(unknown)}; rows: {', '.join(ROWS)}")
    options.repo = options.repo and options.repo.resolve()
    options.device = common.pick_device("auto")
    return options


if __name__ == "__main__":
    common.keep_freed_memory()
    options = parse(sys.argv[1:])
    for name in options.rows or [name for name in ROWS if name != "peer"]:
        ROWS[name](options)
