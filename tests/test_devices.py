"""Subcommands on a GPU that is not there: torch's meta device stands in for it. It knows shapes but no values, and a
tensor that was not moved to the model's device is an error there, as on a GPU."""

import contextlib
import importlib
import json

import common

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """Refuses what a GPU refuses: tensors of two devices in one operation, except numbers, copies and indices; and what
    Apple's GPUs refuse, float64."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name, given = str(operation), [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        devices = {x.device.type for x in given if x.dim()}
        assert len(devices) < 2 or "copy" in name or "index" in name, f"{name} of tensors of {sorted(devices)}"
        result = operation(*args, **(kwargs or {}))
        doubles = [x for x in tree_leaves(result) if torch.is_tensor(x) and x.is_meta and x.dtype == torch.float64]
        assert not doubles, f"{name} makes float64 on the GPU"
        return result


class Generator(torch.Generator):
    """A generator of the CPU that names the device it was made for; its numbers go wherever they are wanted."""

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
        """Where the values of a tensor of the stand-in are wanted, they are made up."""
        honest = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *more: make(self) if self.is_meta else honest(self, *more))

    answer("cpu", lambda self: torch.rand(self.shape).to(self.dtype))
    answer("tolist", lambda self: self.cpu().tolist())
    for name, value in (("item", 0.5), ("__float__", 0.5), ("__int__", 1), ("__bool__", True)):
        answer(name, lambda self, value=value: value)

    def run(line):
        file, *words = line.split()
        with OneDevice():
            assert importlib.import_module(file).main(words) == 0
        if words[0] == "train":  # pictures are sampled in a file's first training only
            monkeypatch.setattr(common, "MARKS", ())

    return run


def test_stand_in_refuses_what_a_gpu_refuses(gpu):
    with pytest.raises(AssertionError, match="of tensors of"), OneDevice():
        torch.ones(2, device=GPU) + torch.ones(2)
    with pytest.raises(AssertionError, match="float64"), OneDevice():
        torch.ones(2, device=GPU).double()


FEW = "--data pictures --batch-size 4 --steps 1 --no-compile"


def test_jit_lab(gpu, folder):
    small = f"jit_lab train {FEW} --image-size 16 --patch-size 4 --hidden-size 32 --depth 2 --num-heads 2"
    gpu(f"{small} --optimizer muon --grad-accum 2")
    gpu(f"{small} --space rgb --predict eps --loss x --optimizer adamw --time uniform --out rgb")
    gpu("jit_lab sample --num 4 --steps 2 --solver heun --gif film.gif")
    gpu("jit_lab novelty --data pictures --num 4 --steps 2")


def test_dit_t2i(gpu, folder, partners):
    lines = [{"file_name": path.name, "text": "a red car"} for path in sorted(folder.glob("*.png"))]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    small = "--depth 2 --num-heads 2"
    gpu(f"dit_t2i train {FEW} {small} --patch-size 4 --image-size 16 --grad-accum 2")
    for solver in ("euler", "heun", "dpm"):
        gpu(f"dit_t2i sample red car --num 2 --cfg 3 --steps 2 --size 24 --gif film.gif --solver {solver}")
    latent = f"--vae {partners[0]} --clip {partners[1]}"
    gpu(f"dit_t2i prepare --data pictures --image-size 32 --out shards {latent}")
    few = FEW.replace("pictures", "shards")
    gpu(f"dit_t2i train {few} {small} --patch-size 2 --image-size 32 --text-dim 64 --out latent {latent}")
    gpu(f"dit_t2i sample red car --weights latent --num 2 --steps 2 {latent}")


def test_unet_ddpm(gpu, folder, partners):
    small = "--model-channels 32 --num-head-channels 32 --attention-resolutions 4"
    gpu(f"unet_ddpm train {FEW} {small} --image-size 16 --objective ddpm --predict v")
    for solver in ("ancestral", "ddim"):
        gpu(f"unet_ddpm sample --num 3 --steps 2 --gif film.gif --solver {solver}")
    gpu(f"unet_ddpm train {FEW} {small} --image-size 64 --flip 0.5 --out latent --vae {partners[0]}")
    gpu(f"unet_ddpm sample --num 3 --steps 1 --solver heun --weights latent --vae {partners[0]}")
    gpu(f"unet_ddpm evaluate --data pictures --num 4 --steps 1 --weights latent --vae {partners[0]}")


def test_serpentine_vae(gpu, folder):
    gpu(f"serpentine_vae train {FEW} --image-size 24 --vae-steps 1")
    gpu("serpentine_vae sample --num 2 --steps 2 --gif film.gif")
    gpu("serpentine_vae reconstruct --data pictures")
