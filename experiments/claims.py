"""Claims of the five posts, each measured by training the two or more variants that it compares.

    python experiments/claims.py list
    python experiments/claims.py run joint_or_dual --seeds 3     goes on where a killed run stopped
    python experiments/claims.py table                           writes the tables into docs/claims.md

Every claim is a function below. It trains one variant with one seed for a number of steps and returns what it measured.
The variants of a claim differ in one thing alone. A row for each run is kept in experiments/results/NAME.csv.

The rule, for all claims: a claim says that a measure is lower for one variant than for another. It is *reproduced* if
each seed of the one is below each seed of the other, *not reproduced* if it is the other way round, and *open* if the
seeds overlap.
"""

import argparse
import csv
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import dit_t2i  # noqa: E402

RESULTS = ROOT / "experiments/results"
CLAIMS = {}


@dataclasses.dataclass
class Claim:
    measure: Callable  # (variant, seed, steps, folder for its run) -> {name: number}, the lower the better
    post: str
    text: str
    variants: tuple[str, ...]
    steps: int
    expected: tuple[str, str, str]  # measure, variant that should be lower, variant that should be higher


def claim(post, text, variants, steps, expected):
    """Register the decorated function as the claim of its name."""

    def register(function):
        CLAIMS[function.__name__] = Claim(function, post, text, variants, steps, expected)
        return function

    return register


def train(module, folder, *options):
    """Train by a file's own command line, or go on with what is in the folder. Raises UserError if that fails."""
    resume = ["--resume"] if Path(folder, "state.safetensors").exists() else []
    if module.main(["train", "--out", str(folder), *map(str, options), *resume]):
        raise common.UserError(f"the run in {folder} did not finish")


# ----------------------------------------------------------------------------------------------------------------
# Diffusion from Scratch, and re-diffusion


TIMES = [(i + 0.5) / 8 for i in range(8)]


@torch.no_grad()
def picture_errors(folder, num=128):
    """Mean squared error of the predicted picture, z_t - t v, on `num` held-out pictures at eight times t; always with
    the same noise."""
    model, config = dit_t2i.load_model(Path(folder, "model.safetensors"), torch.device("cpu"))
    data = dit_t2i.TrainingData(config, torch.device("cpu"), "fp32", model.header)
    sums, index = dict.fromkeys(TIMES, 0.0), data.held_out[:num]
    num = len(index)
    for first in range(0, num, 32):
        rows = slice(first, min(first + 32, num))
        x, text = data.load(index[rows], common.BatchRng(num, 0, 0, 3, rows=rows))
        noise = common.BatchRng(num, 0, 0, 4, rows=rows).randn(*x.shape[1:])
        for t in TIMES:
            z_t = common.flow_point(x, noise, torch.full((len(x),), t))
            x_hat = z_t - t * model(z_t, torch.full((len(x),), t), text)
            sums[t] += (x_hat - x).square().mean(dim=(1, 2, 3)).sum().item() / num
    return {"error": statistics.mean(sums.values())} | {f"t = {t:.2f}": error for t, error in sums.items()}


@claim(
    "re-diffusion", "its joint architecture learns faster than the dual one of Diffusion from Scratch (our question)",
    ("joint", "dual"), 240, ("error", "joint", "dual"),
)  # fmt: skip
def joint_or_dual(variant, seed, steps, folder):
    """Painted scenes, the demo preset: 64 pictures a step, 14.9M (joint) and 14.6M parameters (dual)."""
    train(dit_t2i, folder, "--arch", variant, "--steps", steps, "--seed", seed)
    return picture_errors(folder)


# ----------------------------------------------------------------------------------------------------------------
# Running them, and the tables


def rows_of(name):
    """The rows of a claim's results."""
    path = RESULTS / f"{name}.csv"
    return list(csv.DictReader(path.open(newline=""))) if path.exists() else []


def run(name, seeds, steps=None):
    """Measure all variants of a claim with the seeds 0 to seeds - 1, but for those whose rows are there."""
    entry, rows = CLAIMS[name], rows_of(name)
    steps = steps or entry.steps
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    for seed in range(seeds):
        for variant in entry.variants:
            if any((row["variant"], row["seed"], row["steps"]) == (variant, str(seed), str(steps)) for row in rows):
                continue
            start, folder = time.perf_counter(), Path("runs/claims", name, f"{variant}-{seed}-{steps}")
            measured = entry.measure(variant, seed, steps, folder)
            row = {"variant": variant, "seed": seed, "steps": steps}
            row |= {key: f"{value:.5g}" for key, value in measured.items()}
            row |= {"seconds": f"{time.perf_counter() - start:.0f}", "torch": torch.__version__}
            rows.append(row | {"commit": commit.stdout.strip()})
            text = "\n".join(",".join(map(str, line)) for line in (rows[0], *(row.values() for row in rows)))
            common.save_text(RESULTS / f"{name}.csv", text + "\n")


def verdict(name, rows):
    """(text for each variant "mean ± standard deviation", the verdict by the rule above)."""
    measure, low, high = CLAIMS[name].expected
    values = {v: [float(row[measure]) for row in rows if row["variant"] == v] for v in CLAIMS[name].variants}
    spread = {v: f"{statistics.mean(x):.4g} ± {statistics.stdev(x):.2g}" for v, x in values.items() if len(x) > 1}
    if len(rows) < 4 or not (values[low] and values[high]):
        return spread, "open: too few seeds"
    if max(values[low]) < min(values[high]):
        return spread, "reproduced"
    return spread, "not reproduced" if min(values[low]) > max(values[high]) else "open: the seeds overlap"


def table():
    """Put a table of all measured claims between the two marks in docs/claims.md."""
    lines = ["| claim | steps, seeds | measure | figures | verdict |", "|---|---|---|---|---|"]
    for name, entry in CLAIMS.items():
        rows = [row for row in rows_of(name) if row["steps"] == str(entry.steps)]
        if rows:
            spread, says = verdict(name, rows)
            figures, seeds = ", ".join(f"{v} {text}" for v, text in spread.items()), len({row["seed"] for row in rows})
            cells = f"{entry.text} (`{name}`)", f"{entry.steps}, {seeds}", entry.expected[0], figures, says
            lines.append("| " + " | ".join(cells) + " |")
    path, marks = ROOT / "docs/claims.md", ("<!-- table: begin -->", "<!-- table: end -->")
    before, rest = path.read_text("utf-8").split(marks[0])
    path.write_text("\n".join((before + marks[0], *lines, marks[1] + rest.split(marks[1])[1])), "utf-8")


def main(argv=None):
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("list", "run", "table"))
    parser.add_argument("names", nargs="*", choices=[*CLAIMS, []], help="claims to run (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, help="optimizer steps in place of a claim's own")
    options = parser.parse_args(argv)
    for name in options.names or CLAIMS:
        if options.command == "run":
            run(name, options.seeds, options.steps)
        if options.command == "list":
            entry, done = CLAIMS[name], len(rows_of(name))
            print(f"{name}: {entry.text} ({entry.post}; {entry.steps} steps, {done} runs done)")
    if options.command == "table":
        table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
