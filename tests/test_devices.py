"""Every verb on a GPU, which no machine that runs these tests has: torch's meta device stands in for it. It knows no
values, only shapes, but what somebody forgot to bring to the model's device is an error there, as on a GPU."""

import contextlib
import functools
import json

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import dit_t2i
import jit_lab
import serpentine_vae
import unet_ddpm

GPU = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """Refuses what a GPU refuses: tensors of two devices in one operation, numbers, copies and indices apart; and what
    Apple's refuses, float64."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name, given = str(operation), [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        devices = {x.device.type for x in given if x.dim()}
        assert len(devices) < 2 or "copy" in name or "index" in name, f"{name} of tensors of {sorted(devices)}"
        result = operation(*args, **(kwargs or {}))
        doubles = [x for x in tree_leaves(result) if torch.is_tensor(x) and x.is_meta and x.dtype == torch.float64]
        assert not doubles, f"{name} makes float64 on the GPU"
        return result


class Generator(torch.Generator):
    """One of the CPU, whose numbers go wherever they are asked for, that says which device it was made for."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.place = torch.device(device)
        return made

    device = property(lambda self: self.place)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A function that runs a command line of one of the files on the stand-in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "pick_device", lambda name: GPU)
    monkeypatch.setattr(common, "pick_precision", lambda name, device: "fp32")
    monkeypatch.setattr(torch, "Generator", Generator)

    def autocast(kind, *more, honest=torch.autocast, **options):
        return contextlib.nullcontext() if kind == GPU.type else honest(kind, *more, **options)

    monkeypatch.setattr(torch, "autocast", autocast)
    plain = torch.optim.AdamW  # the fused one knows the real GPUs by name
    monkeypatch.setattr(torch.optim, "AdamW", lambda *more, fused, **options: plain(*more, **options))

    def answer(name, make):
        """Where a tensor of the stand-in is asked for its values, it makes some up."""
        honest = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *more: make(self) if self.is_meta else honest(self, *more))

    answer("cpu", lambda self: torch.rand(self.shape).to(self.dtype))
    answer("tolist", lambda self: torch.rand(self.shape).to(self.dtype).tolist())
    for name, value in (("item", 0.5), ("__float__", 0.5), ("__int__", 1), ("__bool__", True)):
        answer(name, lambda self, value=value: value)
    monkeypatch.setattr(common, "is_same_network", lambda mine, wanted: True)

    def run(module, *words):
        with OneDevice():
            assert module.main([str(word) for word in words]) == 0

    return run


def test_stand_in_refuses_what_a_gpu_refuses(gpu):
    with pytest.raises(AssertionError, match="of tensors of"), OneDevice():
        torch.ones(2, device=GPU) + torch.ones(2)
    with pytest.raises(AssertionError, match="float64"), OneDevice():
        torch.ones(2, device=GPU).double()


FEW = "--data pictures --batch-size 4 --steps 1".split()


def test_jit_lab(gpu, folder):
    small = "--image-size 16 --patch-size 4 --hidden-size 32 --depth 2 --num-heads 2 --bottleneck-dim 8".split()
    for out, more in (
        ("runs/jit_lab", ["--optimizer", "muon", "--grad-accum", 2]),
        ("rgb", "--space rgb --predict eps --loss x --optimizer adamw --in-context-len 4 --time uniform".split()),
    ):
        gpu(jit_lab, "train", "--out", out, *FEW, *small, *more)
    gpu(jit_lab, *"sample --num 4 --steps 2 --solver heun --clamp --gif film.gif".split())
    gpu(jit_lab, *"novelty --data pictures --num 4 --steps 2".split())


def test_dit_t2i(gpu, folder, partners, monkeypatch):
    monkeypatch.setattr(dit_t2i, "DrawConfig", functools.partial(dit_t2i.DrawConfig, steps=2))  # while training
    with open(folder / "metadata.jsonl", "w") as table:
        for path in sorted(folder.glob("*.png")):
            table.write(json.dumps({"file_name": path.name, "text": "a red car"}) + "\n")
    small = "--depth 2 --num-heads 2 --patch-size 4".split()
    gpu(dit_t2i, "train", *FEW, *small, *"--image-size 16 --grad-accum 2 --checkpoint-activations".split())
    guided = "--num 2 --cfg 3 --steps 2 --negative red --size 24 --gif film.gif".split()
    for solver in ("euler", "heun", "dpm"):
        gpu(dit_t2i, "sample", "a red car", "a car", *guided, "--solver", solver)

    latent = ["--vae", partners[0], "--clip", partners[1]]
    gpu(dit_t2i, *"prepare --data pictures --image-size 32 --out shards".split(), *latent)
    few = "--data shards --batch-size 4 --steps 1 --image-size 32 --text-dim 64 --out latent".split()
    gpu(dit_t2i, "train", *few, *small[:-1], 2, *latent)
    words = "--weights latent/model.safetensors --num 2 --steps 2 --size 48 --tile 32".split()
    gpu(dit_t2i, "sample", "a red car", *words, *latent)


def test_unet_ddpm(gpu, folder, partners):
    small = "--model-channels 32 --num-head-channels 32 --attention-resolutions 4".split()
    ddpm = "--image-size 16 --objective ddpm --predict v --checkpointing".split()
    gpu(unet_ddpm, "train", *FEW, *small, *ddpm)
    for solver in ("ancestral", "ddim"):
        gpu(unet_ddpm, *"sample --num 3 --steps 2 --gif film.gif --solver".split(), solver)
    latent = ["--vae", partners[0]]
    gpu(unet_ddpm, "train", *FEW, *small, *"--image-size 64 --flip 0.5 --out latent".split(), *latent)
    weights = ["--weights", "latent/model.safetensors"]
    gpu(unet_ddpm, *"sample --num 3 --steps 1 --solver heun".split(), *weights, *latent)
    gpu(unet_ddpm, *"evaluate --data pictures --num 4 --steps 1".split(), *weights, *latent)


def test_serpentine_vae(gpu, folder, monkeypatch):
    gpu(serpentine_vae, "train", *FEW, *"--image-size 24 --vae-steps 1".split())
    gpu(serpentine_vae, *"sample --num 2 --steps 2 --solver ancestral --gif film.gif".split())
    gpu(serpentine_vae, *"reconstruct --data pictures".split())
    gpu(serpentine_vae, "leakage")
    # A mask on the stand-in neither keeps everything nor nothing.
    monkeypatch.setattr(torch.Tensor, "all", lambda self, honest=torch.Tensor.all: not self.is_meta and honest(self))
    mask = Image.new("L", (24, 24), "white")
    mask.paste("black", (8, 8, 16, 16))
    mask.save("mask.png")
    gpu(serpentine_vae, *"inpaint --image pictures/01.png --mask mask.png --num 1 --steps 1".split())
    gpu(serpentine_vae, *"seams --data pictures --num 1 --steps 1".split())
