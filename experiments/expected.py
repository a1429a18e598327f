"""The curves that index.html of a run draws in grey: losses of finished runs of the demo presets, 40 points of each.

    python experiments/expected.py runs/faces-mono runs/serpentine_vae runs/scenes runs/compare/flow runs/compare/ddpm

writes assets/expected.json. docs/results.md has the commands that made these runs.
"""

import collections
import importlib
import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

# Options that do not decide what the loss measures; of the data, `run` tells the name. What a VAE was trained on hardly
# changes the loss in its latents.
NEUTRAL = common.MAY_CHANGE | {"seed", "num_samples", "precision", "optimizer"}
OWN_NEUTRAL = {"serpentine_vae": {"vae", "vae_minutes", "vae_steps"}}


def thin(rows, count=40):
    """[[pictures, loss], ...]: the means of up to `count` parts of a log, short at first, where the loss falls fast."""
    parts, last = collections.defaultdict(list), int(rows[-1]["images"])
    for row in rows:
        parts[math.ceil(count * (int(row["images"]) / last) ** 0.5)].append((int(row["images"]), float(row["loss"])))
    means = ((sum(column) / len(part) for column in zip(*part)) for part in parts.values())
    return [[round(x), float(f"{y:.4g}")] for x, y in means]


def entry(folder):
    """What common.expected_run() looks for."""
    header = common.load_tensors(folder, header_only=True)[1]
    system, neutral = header["system"], NEUTRAL | OWN_NEUTRAL.get(header["system"], set())
    config = common.config_from_header(importlib.import_module(system).Config, header, folder)
    settings = {name: value for name, value in vars(config).items() if name not in neutral}
    data = "painted pictures" if config.data == ("drawn",) else Path(config.data[0]).name
    what = f"{header['step']:,} steps of {config.batch_size} on {data}"
    settings["system"] = system
    return {"run": what, "settings": settings, "neutral": sorted(neutral), "curve": thin(common.read_log(Path(folder)))}


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(entry(folder)) for folder in sys.argv[1:])
    common.save_text(ROOT / "assets" / "expected.json", f"[\n{lines}\n]\n")
