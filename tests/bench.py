"""Speed, as ratios of medians measured in one run: `python tests/bench.py [attention] [demo] [paper] [sample] [data]`.

Run it on a quiet machine; with no name it measures everything. Nothing here is a test: timings vary, ratios less so.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import jit_lab  # noqa: E402


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
    """One optimizer step of jit_lab's train(), as a function without arguments."""
    torch.manual_seed(0)
    model = jit_lab.build_model(config).to(device)
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    rgb = torch.randint(0, 256, (64, 3, config.image_size, config.image_size), dtype=torch.uint8)
    data = jit_lab.Dataset(rgb, torch.ones(64, dtype=torch.bool))

    def step():
        x, mask, top, left = jit_lab.draw_batch(config, data, 0, 0, device)
        t = jit_lab.draw_times(config, len(x), common.generator(0, device=device))
        x_t = common.flow_point(torch.randn_like(x), x, t)
        with common.autocast(device, precision):
            output = model(x_t, t, torch.zeros(len(x), dtype=torch.long, device=device), top, left)
        jit_lab.flow_loss(config, output, x_t, x, t, mask).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare_training(title, config, device, rounds):
    fast = common.pick_precision("auto", device)
    ways = {
        "eager fp32": training_step(config, "fp32", device),
        f"eager {fast}": training_step(config, fast, device),
        f"compiled {fast}": training_step(config, fast, device, compiled=True),
    }
    seconds = median_seconds(ways, rounds)
    print(f"{title}, batch {config.batch_size}, {device}")
    for name, s in seconds.items():
        print(f"  {name:16s} {config.batch_size / s:7.1f} images/s   {seconds['eager fp32'] / s:5.2f} x eager fp32")
    if device.type == "cuda":
        print(f"  peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def bench_demo(device):
    """Whole pictures, so that every step does the same work."""
    config = common.make_config(jit_lab.Config, {"full_image_prob": 1.0}, jit_lab.PRESETS)
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
    training_step(config, common.pick_precision("auto", cpu), cpu)()
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
                f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common; common.draw_faces(10000, 80)",
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


if __name__ == "__main__":
    common.keep_freed_memory()
    chosen = sys.argv[1:] or ["attention", "demo", "paper", "sample", "data"]
    for name in chosen:
        globals()[f"bench_{name}"](common.pick_device("auto"))
