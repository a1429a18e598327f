"""Shipped weights sample the pictures they always did, and a resumed run ends with the same bits.

These tests call the command lines only, no function or class inside the files.

The reference pictures are at half size. To make them anew after weights have been replaced, and only then:
    python tests/test_frozen.py
"""

import importlib
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
PROMPTS = ["a red car", "a blue teapot", "a green cactus", "a purple pear"]

# The options these tests need. If one is renamed, it is renamed here.
SAMPLE = "--steps 8 --precision fp32 --device cpu"
REFERENCES = {  # reference picture -> file, subcommand and options
    "jit_lab": f"jit_lab sample --num 4 {SAMPLE}",
    "jit_lab_heun": f"jit_lab sample --num 4 --solver heun {SAMPLE}",
    "serpentine_vae": f"serpentine_vae sample --num 4 {SAMPLE}",
    "dit_t2i": f"dit_t2i sample --num 1 {SAMPLE}",
    "inpaint": f"serpentine_vae inpaint --num 2 --solver ddim {SAMPLE}",
}
STEPS = 4
TRAIN = f"--steps {STEPS} --batch-size 8 --grad-accum 2 --precision fp32 --device cpu"
TINY = {  # the smallest model of each file
    "jit_lab": "--image-size 16 --patch-size 4 --hidden-size 32 --depth 2 --num-heads 2 --bottleneck-dim 8"
    " --optimizer adamw",
    "serpentine_vae": "--image-size 16 --channels 4 --vae-width 8 --width 16 --depth 1 --multipliers 1 --flip 0.5"
    f" --vae-steps {STEPS}",
    "dit_t2i": "--image-size 16 --depth 2 --num-heads 2 --head-dim 8 --text-dim 16 --optimizer adamw --flip 0.5",
    "unet_ddpm": "--image-size 16 --model-channels 32 --num-head-channels 32 --num-res-blocks 1 --channel-mult 1"
    " --attention-resolutions 8 --dropout 0.1 --flip 0.5",
}


def run(words):
    """Exit code of a command line, such as ["jit_lab", "sample", "--num", "4"], in this process."""
    return importlib.import_module(words[0]).main([str(word) for word in words[1:]])


# ---- shipped weights ----


def sampled(name, folder, *more):
    """The picture of a command of REFERENCES, with `more` options, at half size: (H, W, 3) floats in [0, 255]."""
    words = REFERENCES[name].split()
    words += ["--weights", ROOT / "weights" / f"{words[0]}.safetensors", "--out", folder / "out.png", *more]
    if name == "dit_t2i":
        words[2:2] = PROMPTS
    if name == "inpaint":
        words += ["--image", FIXTURES / "inpaint_face.png", "--mask", FIXTURES / "inpaint_mask.png"]
    assert run(words) == 0
    return np.asarray(Image.open(folder / "out.png").convert("RGB").reduce(2), np.float32)


def difference(picture, name):
    """Mean absolute difference from a reference picture, of 255."""
    reference = np.asarray(Image.open(FIXTURES / f"reference_{name}.png"), np.float32)
    assert picture.shape == reference.shape
    return np.abs(picture - reference).mean()


@pytest.mark.parametrize("name", REFERENCES)
def test_shipped_weights_sample_the_same_pictures(name, tmp_path):
    """The order of sums changes hardly a pixel (0.00 of 255); bfloat16 in place of float32 changes them by 0.2."""
    assert difference(sampled(name, tmp_path), name) < 0.1


@pytest.mark.parametrize(
    "name, change",
    [("jit_lab", "--seed 1"), ("jit_lab", "--solver heun"), ("dit_t2i", "--cfg 2.5"), ("inpaint", "--seed 2")],
)
def test_another_noise_solver_or_guidance_is_another_picture(name, change, tmp_path):
    """Each change is at least ten times as large as the bound above."""
    assert difference(sampled(name, tmp_path, *change.split()), name) > 1.0


# ---- exact resume ----


@pytest.fixture
def pictures(tmp_path):
    """24 captioned pictures of coarse noise."""
    folder, rng, rows = tmp_path / "pictures", np.random.default_rng(0), []
    folder.mkdir()
    for i in range(24):
        tile = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        tile.resize((16, 16), Image.NEAREST).save(folder / f"{i:02d}.png")
        rows.append(json.dumps({"file_name": f"{i:02d}.png", "text": f"a {'red green blue'.split()[i % 3]} tile"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def train(words, interrupt_at=None):
    """(exit code, optimizer steps made) of a training; Ctrl-C arrives in the optimizer step `interrupt_at`."""
    steps = []

    def count(optimizer, arguments, keywords):
        # A step without gradients is not training: torch makes one to find out what an optimizer remembers.
        if any(p.grad is not None and p.grad.any() for group in optimizer.param_groups for p in group["params"]):
            steps.append(optimizer)
        if len(steps) == interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)

    hook = register_optimizer_step_post_hook(count)
    try:
        return run(words), len(steps)
    finally:
        hook.remove()


# serpentine_vae has two trainings, one after the other: the VAE's, then the denoiser's, whose steps are numbered on.
@pytest.mark.parametrize(
    "system, stop",
    [("jit_lab", 2), ("dit_t2i", 2), ("unet_ddpm", 2), ("serpentine_vae", 2), ("serpentine_vae", STEPS + 2)],
)
def test_interrupted_run_resumes_to_the_same_bits(system, stop, pictures, tmp_path):
    total = 2 * STEPS if system == "serpentine_vae" else STEPS
    words = [system, "train", "--data", pictures, *TRAIN.split(), *TINY[system].split()]
    assert train([*words, "--out", tmp_path / "whole"]) == (0, total)
    halves = [*words, "--out", tmp_path / "halves"]
    assert train(halves, interrupt_at=stop) == (130, stop)
    assert train([*halves, "--resume"]) == (0, total - stop)
    for ending in ("", "-vae") if system == "serpentine_vae" else ("",):
        for file in ("model.safetensors", "state.safetensors"):
            one, other = (load_file(tmp_path / (name + ending) / file) for name in ("whole", "halves"))
            assert one.keys() == other.keys() and len(one) > 10
            for key in one:
                assert torch.equal(one[key], other[key]), f"{file}: {key}"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as scratch:
        for name in REFERENCES:
            picture = sampled(name, Path(scratch)).astype(np.uint8)
            Image.fromarray(picture).save(FIXTURES / f"reference_{name}.png", optimize=True)
