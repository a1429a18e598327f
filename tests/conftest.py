import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # two processes with a core each; torch reads this when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import common
import dit_t2i
import jit_lab

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
ENVIRONMENT = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# A JiT so small that a run takes a second or two.
TINY = dict(image_size=16, patch_size=4, hidden_size=32, depth=2, num_heads=2, bottleneck_dim=8)
TINY_FLAGS = [word for k, v in TINY.items() for word in ("--" + k.replace("_", "-"), str(v))]


@pytest.fixture
def tiny_config():
    return lambda **changes: jit_lab.Config(**(TINY | changes))


@pytest.fixture
def awake_model():
    """A tiny JiT whose weights are all random: no gate is zero and hides what lies behind it."""

    def make(config):
        torch.manual_seed(0)
        model = jit_lab.build_model(config)
        for p in model.parameters():
            if p.requires_grad:
                p.data.normal_(std=0.2)
        return model.eval()

    return make


@pytest.fixture
def folder(tmp_path):
    """A folder of 24 small pictures, every fourth one grey."""
    rng = np.random.default_rng(0)
    path = tmp_path / "pictures"
    path.mkdir()
    for i in range(24):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        if i % 4 == 0:
            pixels[:] = pixels[..., :1]
        Image.fromarray(pixels).resize((16, 16), Image.NEAREST).save(path / f"{i:02d}.png")
    return path


@pytest.fixture
def partners(tmp_path):
    """A tiny VAE and a tiny CLIP with the published tokenizer, as files: (VAE, folder of CLIP)."""
    save_file(common.AutoencoderKL(widths=(32, 32, 32, 32)).state_dict(), tmp_path / "vae.safetensors")
    clip = dit_t2i.ClipTextEncoder(dim=64, hidden=64, depth=1)
    folder = tmp_path / "clip"
    folder.mkdir()
    save_file({f"text_model.{k}": v for k, v in clip.state_dict().items()}, folder / "model.safetensors")
    shutil.copy(FIXTURES / "clip_merges.txt.gz", folder / "merges.txt.gz")
    return tmp_path / "vae.safetensors", folder


@pytest.fixture
def command(tmp_path):
    """Run a model file's command line as a user would, in an empty folder: (exit code, stdout, stderr)."""

    def run(*words, file):
        words = list(map(str, [sys.executable, ROOT / file, *words]))
        done = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(autouse=True)
def pictures_at_the_end_only(monkeypatch):
    """In place of six times in a run, which takes longer than the training of a tiny model."""
    monkeypatch.setattr(common, "MARKS", (1.0,))


@pytest.fixture
def all_marks(monkeypatch, marks=common.MARKS):
    monkeypatch.setattr(common, "MARKS", marks)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
