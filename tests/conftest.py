import json
import os
import random
import shutil
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # two processes with a core each; torch reads this when it is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import common
import dit_t2i

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
ENVIRONMENT = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# A JiT so small that a run takes a second or two.
TINY = dict(image_size=16, patch_size=4, hidden_size=32, depth=2, num_heads=2, bottleneck_dim=8)
TINY_FLAGS = [word for k, v in TINY.items() for word in ("--" + k.replace("_", "-"), str(v))]


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


def random_weights(model, std=0.1):
    """The model with weights that are all random: no gate is zero and hides what lies behind it."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, std, generator=rng)
    return model.eval()


def read_fixture(name):
    return json.loads((FIXTURES / f"{name}.json").read_text())


def shapes(weights):
    return {name: list(tensor.shape) for name, tensor in weights.items()}
