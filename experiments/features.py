"""A small network that tells the painted faces' tags apart, and distances between sets of pictures in its features.

    python experiments/features.py      trains it, some minutes on one core, and writes experiments/features.safetensors

Anybody can repeat it: the pictures are painted, and no file is downloaded. FID's Inception network was trained on
photographs; this one knows what differs between these faces: hair, eyes, mouth, cheeks, clothes, colours.
"""

import functools
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import jit_lab  # noqa: E402
import unet_ddpm  # noqa: E402

WEIGHTS = Path(__file__).with_suffix(".safetensors")
SIDE, COUNT, HELD_OUT = 40, 10_000, 1_000  # of COUNT painted faces, the last HELD_OUT are not trained on
BATCH, STEPS, LR = 64, 1_500, 3e-3


class TagNet(nn.Module):
    """RGB (B, 3, 40, 40) in [0, 1] -> logits (B, tags). features(): what the last layer reads, (B, 128)."""

    def __init__(self, tags):
        super().__init__()
        self.tags, layers = list(tags), [nn.PixelUnshuffle(2)]
        for width_in, width, stride in ((12, 48, 1), (48, 64, 2), (64, 96, 1), (96, 128, 2)):  # maps of 20, 10, 10, 5
            layers += [nn.Conv2d(width_in, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.SiLU()]
        self.convolutions, self.head = nn.Sequential(*layers), nn.Linear(128, len(self.tags))

    def features(self, rgb):
        rgb = rgb if rgb.shape[-1] == SIDE else F.interpolate(rgb, (SIDE, SIDE), mode="area")
        return self.convolutions(2 * rgb - 1).mean(dim=(2, 3))

    def forward(self, rgb):
        return self.head(self.features(rgb))


def load(path=WEIGHTS):
    """The trained network. Raises UserError."""
    weights, header = common.load_tensors(path)
    net = TagNet(header["tags"])
    common.load_into(net, {name: tensor.float() for name, tensor in weights.items()}, path)
    return net.eval().requires_grad_(False)


def frechet(net, a, b):
    """Fréchet distance of two sets of pictures (n, 3, S, S) in [0, 1] in the features of `net`."""
    parts = (torch.cat([net.features(part) for part in rgb.split(100)]) for rgb in (a, b))
    return unet_ddpm.frechet(*parts)


def tags_found(net, rgb, wanted):
    """(recall, precision): the part of the pictures' tags that the network names, and of those named that are right.
    rgb (n, 3, S, S) in [0, 1]; wanted (n, tags) of 0 and 1."""
    named = torch.cat([net(part) > 0 for part in rgb.split(100)])
    right = (named * wanted).sum()
    return (right / wanted.sum()).item(), (right / named.sum().clamp(min=1)).item()


@functools.cache
def new_faces(first, count, side=40):
    """Painted faces that no training set contains, (count, 3, side, side) in [0, 1]; first: a letter, one set each."""
    start = {"a": 1_000_000, "b": 2_000_000}[first]
    return common.picture_tensor([np.asarray(common.paint_face(start + i, side)[0]) for i in range(count)]) / 255


def chroma(rgb):
    """The mean chroma of each picture, (B,), in units of L*a*b*."""
    return 128 * jit_lab.rgb_to_lab(rgb)[:, 1:].norm(dim=1).mean(dim=(1, 2))


def distances(rgb):
    """How far samples of faces are from new faces. chroma: the mean difference of the sorted chroma of the pictures; in
    colour: the part of samples with more than half of the real pictures' median chroma."""
    real, others = (new_faces(first, len(rgb), rgb.shape[-1]) for first in "ab")
    net, found = load(), {}
    for name, distance in {
        "frechet": lambda a, b: frechet(net, a, b),
        "wasserstein": lambda a, b: statistics.mean(unet_ddpm.sliced_wasserstein(a, b)),
        "chroma": lambda a, b: (chroma(a).sort()[0] - chroma(b).sort()[0]).abs().mean().item(),
    }.items():
        found |= {name: distance(real, rgb), f"{name} floor": distance(real, others)}
    return found | {"in colour": (chroma(rgb) > chroma(real).median() / 2).float().mean().item()}


def main():
    """Train the network, print how well it does on held-out faces, and write its weights."""
    data = common.paint_set(common.paint_face, COUNT, SIDE)
    tags = sorted({tag for row in data.tags for tag in row})
    wanted = torch.tensor([[float(tag in row) for tag in tags] for row in data.tags])
    torch.manual_seed(0)
    net = TagNet(tags)
    optimizer = torch.optim.AdamW(net.parameters(), LR, weight_decay=0.05)
    for step in range(STEPS):
        common.set_lr(optimizer, LR * common.lr_factor(step / STEPS, step, 0.05, "cosine"))
        index = torch.randint(COUNT - HELD_OUT, (BATCH,), generator=common.generator(0, step))
        # Every tag is a question of its own: yes or no.
        loss = F.binary_cross_entropy_with_logits(net(data.pictures[index] / 255), wanted[index])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1}, loss {loss:.4f}", flush=True)
    with torch.no_grad():
        found = tags_found(net.eval(), data.pictures[-HELD_OUT:] / 255, wanted[-HELD_OUT:])
    print("of the tags of {} new faces, {:.1%} are found; {:.1%} of those named are right".format(HELD_OUT, *found))
    weights = {name: tensor.bfloat16() for name, tensor in net.state_dict().items()}
    common.save_tensors(WEIGHTS, weights, {"tags": tags})
    print(f"{WEIGHTS}: {WEIGHTS.stat().st_size / 1e6:.2f} MB, {sum(p.numel() for p in net.parameters()):,} parameters")


if __name__ == "__main__":
    main()
