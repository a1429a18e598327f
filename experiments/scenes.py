"""Do painted scenes show what was asked for? A classifier tells the thing, colour, place and background of a sample.

    python dit_t2i.py train --out runs/scenes                  ten minutes of painted scenes
    python experiments/scenes.py evaluate --weights runs/scenes    trains the classifier once (four minutes on one core)

The classifier sees painted scenes only, moved, blurred and with noise, so that it does not need their exact edges. The
prompts are captions of one thing that no training run of dit_t2i.py has seen; what a caption does not name, such as a
background, is not counted.
"""

import dataclasses
import itertools
import re
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import dit_t2i
from common import option

TABLES = common.picture_tables("scenes")
HEADS = {"thing": list(TABLES["things"]), "colour": list(TABLES["colours"])}
HEADS |= {"place": ["", *TABLES["places"]], "background": list(TABLES["backgrounds"])}
TRAINED_ON = 20_000  # the seeds that dit_t2i.py paints; the prompts come after them


def labels_of(caption):
    """The number of each of HEADS that a caption of one thing names, -1 for none; None for a caption of two things."""
    if any(relation in caption for relation in TABLES["relations"]):
        return None
    found = {head: [w for w in words if w and re.search(rf"\b{w}\b", caption)] for head, words in HEADS.items()}
    # "a pink car on a green background" names two colours; the thing's comes first
    found["colour"].sort(key=caption.index)
    found["place"] = found["place"] or [""]  # not named: in the middle
    return [words.index(found[head][0]) if found[head] else -1 for head, words in HEADS.items()]


class Classifier(nn.Module):
    """(B, 3, 64, 64) in [0, 1] -> one row of logits for each of HEADS."""

    def __init__(self, width=32):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 4 * width]
        blocks = [
            nn.Sequential(
                nn.Conv2d(a, b, 3, 2, 1),
                nn.BatchNorm2d(b),
                nn.SiLU(),
                nn.Conv2d(b, b, 3, 1, 1),
                nn.BatchNorm2d(b),
                nn.SiLU(),
            )
            for a, b in itertools.pairwise(widths)
        ]
        self.body = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4 * width * 16, 256), nn.SiLU())
        self.heads = nn.ModuleList(nn.Linear(256, len(words)) for words in HEADS.values())

    def forward(self, rgb):
        x = self.body(2 * rgb - 1)
        return [head(x) for head in self.heads]


def scenes_of_one_thing(first, count):
    """Scenes of one thing from seed `first` on: RGB (count, 3, 64, 64) uint8, their captions, labels (count, 4)."""
    pictures, captions, labels = [], [], []
    for seed in itertools.count(first):
        if len(captions) == count:
            return common.picture_tensor(pictures), captions, torch.tensor(labels)
        picture, caption, _ = common.paint_scene(seed)
        if (numbers := labels_of(caption)) is not None:
            pictures, captions, labels = [*pictures, picture], [*captions, caption], [*labels, numbers]


def disturb(rgb, rng):
    """Pictures (B, 3, 64, 64) moved by up to 2 pixels, half of them blurred, with noise: what samples may look like."""
    down, right = torch.randint(5, (2,), generator=rng).tolist()
    rgb = F.pad(rgb, (2, 2, 2, 2), mode="replicate")[:, :, down : down + 64, right : right + 64]
    blurred = F.avg_pool2d(F.pad(rgb, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    rgb = rgb.lerp(blurred, torch.rand(len(rgb), 1, 1, 1, generator=rng).mul(2).sub(1).clamp(min=0))
    return rgb + 0.05 * torch.rand(len(rgb), 1, 1, 1, generator=rng) * torch.randn(rgb.shape, generator=rng)


def train_classifier(path, count=14_000, epochs=8, batch_size=64):
    """Train a Classifier on painted scenes and keep it at `path`."""
    pictures, _, labels = scenes_of_one_thing(0, count)
    torch.manual_seed(0)
    net, rng, steps = Classifier(), common.generator(0), epochs * (count // batch_size)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in tqdm(range(steps), "training the classifier"):
        if step % (count // batch_size) == 0:
            order = torch.randperm(count, generator=rng)
        index = order.roll(-batch_size * step)[:batch_size]
        logits = net(disturb(pictures[index] / 255, rng))
        losses = [F.cross_entropy(x, y, ignore_index=-1) for x, y in zip(logits, labels[index].T)]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        schedule.step()
    common.save_tensors(path, net.state_dict(), {"heads": HEADS})


@torch.no_grad()
def shares_right(net, rgb, labels):
    """{head: share of pictures (B, 3, 64, 64) in [0, 1] whose label, of those that are named, the classifier tells}."""
    guesses = torch.stack([torch.cat(x) for x in zip(*([h.argmax(1) for h in net(part)] for part in rgb.split(100)))])
    right = [((guess == label) & (label >= 0)).sum() / (label >= 0).sum() for guess, label in zip(guesses, labels.T)]
    return dict(zip(HEADS, map(float, right)))


def load_classifier(path="runs/scenes-classifier.safetensors"):
    """The Classifier in eval mode, trained first if it is not there."""
    if not Path(path).exists():
        train_classifier(path)
    net = Classifier()
    common.load_into(net, common.load_tensors(path)[0], path)
    return net.eval()


@dataclasses.dataclass
class EvaluateConfig(common.LoadConfig):
    """Options of evaluate."""

    num: int = option(400, "number of prompts", low=1)
    steps: int = option(28, "steps from noise to picture", low=1)
    solver: str = option("euler", "how a step is made", choices=tuple(common.SOLVERS))
    cfg: float | None = option(None, "guidance (default: the weights')", low=0.0)
    out: str = option("samples/scenes.png", "sheet of the first 64 samples", picture=True)


def evaluate(options):
    """Sample a picture for each prompt and print how many are right, beside painted scenes of the same prompts."""
    net = load_classifier()
    real, prompts, labels = scenes_of_one_thing(TRAINED_ON, options.num)
    labels[labels[:, 2] == 0, 2] = -1  # count the places that are named, not the middle
    model, config = dit_t2i.load_model(common.find_weights(options.weights, "dit_t2i"), torch.device("cpu"))
    precision = common.pick_precision("auto", torch.device("cpu"))
    settings = dict(steps=options.steps, solver=options.solver, cfg=options.cfg, precision=precision, seed_stride=1)
    rgb = dit_t2i.sample(model, config, prompts, **settings)
    common.save_picture(common.make_grid(rgb[:64]), options.out)
    for name, pictures in {"painted": real / 255, "sampled": rgb}.items():
        print(name, ", ".join(f"{head} {share:.1%}" for head, share in shares_right(net, pictures, labels).items()))


COMMANDS = {"evaluate": (evaluate, EvaluateConfig, None, "sample prompts and classify the pictures")}


def main(argv=None):
    """Run the command line, argv or sys.argv; returns the exit code."""
    return common.run_command_line("scenes", __doc__, COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
