"""Emoji as training data, and a test of colours and things that were never shown together.

A colour font holds hundreds of pictures that have names. `paint` writes them as a captioned folder, in their own
colours and tinted in eleven others. 25 of the things are never painted in eight of the colours. `evaluate` samples
these 200 pairs from a trained model and measures how many pictures have the right hue and show the right thing. It
needs no training run: the default is weights/dit_t2i.safetensors.

    python experiments/emoji.py paint --out data/emoji         needs a font (Debian, Ubuntu: fonts-noto-color-emoji)
    python dit_t2i.py train --data data/emoji
    python experiments/emoji.py evaluate                       two minutes on one CPU core; needs the font, too
"""

import dataclasses
import functools
import json
import random
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont
from skimage.color import rgb2hsv
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import dit_t2i
from common import UserError, option, with_article

COLOURS = {"red": "#e0262b", "orange": "#f5841f", "yellow": "#f6d21b", "green": "#35a83a", "teal": "#12b5ae"}
COLOURS |= {"blue": "#2b62e3", "purple": "#8a3fd1", "pink": "#f562b4"}
HUES = list(COLOURS)  # the eight that differ by hue alone
COLOURS |= {"brown": "#7d4a26", "grey": "#8c8c8c", "black": "#1f1f23"}
EMOJI_FONTS = ("NotoColorEmoji.ttf", 109), ("Apple Color Emoji.ttc", 160), ("seguiemj.ttf", 109)

# Things that are never painted in any of HUES: `evaluate` samples these.
HELD_OUT = (
    "dog elephant owl butterfly snail mushroom strawberry pear carrot cactus tulip key bell hammer guitar umbrella "
    "balloon sailboat helicopter bicycle teapot crown scarf chair candle".split()
)


@functools.cache
def emoji_font():
    """The system's colour-emoji font. Raises UserError where there is none."""
    for name, size in EMOJI_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    raise UserError("no colour-emoji font found; install the package fonts-noto-color-emoji (Debian and Ubuntu)")


def emoji_name(character):
    """The common name of an emoji. "" for one that is left out: it shows no thing, or its Unicode name is long, names a
    colour or tells left from right.

    assets/emoji.json: the words of such names, and Unicode's names with the common ones. A word should stand for one
    look: a "hot dog" that is a sausage would make all dogs worse.
    """
    tables, name = common.picture_tables("emoji"), unicodedata.name(character, "").lower()
    if name in tables["called"]:
        return tables["called"][name]
    words = re.findall(r"[a-z]+|[0-9]", name)
    return "" if len(words) > 2 or not set(words).isdisjoint(tables["no_things"]) else " ".join(words)


def paint_emoji(character, size):
    """RGBA picture size x size of an emoji, centred, 94 % of the side long."""
    width = 2 * emoji_font().size
    glyph = Image.new("RGBA", (width, width))
    ImageDraw.Draw(glyph).text((width // 2,) * 2, character, font=emoji_font(), embedded_color=True, anchor="mm")
    glyph = glyph.crop(glyph.getbbox())
    side = round(max(glyph.size) / 0.94)
    picture = Image.new("RGBA", (side, side))
    picture.paste(glyph, tuple((side - length) // 2 for length in glyph.size))
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def all_emoji(size):
    """All emoji that the font has and that have a name: (names, RGBA pictures (N, 4, size, size) in [0, 1])."""
    characters = map(chr, [*range(0x2300, 0x2C00), *range(0x1F300, 0x1FB00)])
    named = [(character, emoji_name(character)) for character in characters]
    named = [(character, name) for character, name in named if name and emoji_font().getmask(character).getbbox()]
    pictures = [np.asarray(paint_emoji(character, size)) for character, _ in tqdm(named, "emoji", leave=False)]
    return [name for _, name in named], torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255


def pairs_to_paint(names):
    """[(index of a thing, colour or None for its own)] for the folder; none of a held-out thing in one of HUES.

    The own colours are listed four times, so that they are a quarter of the pictures. A name that contains a held-out
    word is held out, too: a red "dog face" would be a red dog.
    """
    held_out = [not set(name.split()).isdisjoint(HELD_OUT) for name in names]
    pairs = [(i, colour) for i in range(len(names)) for colour in [None] * 4 + list(COLOURS)]
    return [(i, colour) for i, colour in pairs if not (held_out[i] and colour in HUES)]


# ----------------------------------------------------------------------------------------------------------------
# Colour


def rgb_of(names):
    """Names of COLOURS -> (B, 3, 1, 1) in [0, 1]."""
    return torch.tensor([ImageColor.getrgb(COLOURS[name]) for name in names]).view(-1, 3, 1, 1) / 255


def luma(rgb):
    """(B, 3, H, W) -> (B, 1, H, W): brightness as the eye sees it (ITU-R BT.601)."""
    return (rgb * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)


def on_ground(rgba, ground):
    """Pictures (B, 4, H, W) in front of a ground (B or 1, 3, 1, 1) -> (B, 3, H, W)."""
    return ground + rgba[:, 3:] * (rgba[:, :3] - ground)


def tint(rgba, colour):
    """Pictures (B, 4, H, W) in [0, 1] in a colour (B, 3, 1, 1). Shading is kept, and grey parts stay grey.

    The mean brightness of the coloured part is mapped to the colour itself, darker parts towards black and brighter
    ones towards white. A picture with next to no colour of its own is tinted all over.
    """
    rgb, alpha = rgba[:, :3], rgba[:, 3:]
    coloured = (4 * (rgb.amax(dim=1, keepdim=True) - rgb.amin(dim=1, keepdim=True))).clamp(max=1)  # (B, 1, H, W)
    enough = (coloured * alpha).sum(dim=(2, 3), keepdim=True) > 0.3 * alpha.sum(dim=(2, 3), keepdim=True)
    coloured = torch.where(enough, coloured, 1.0)
    weight, bright = coloured * alpha, luma(rgb)
    pivot = (bright * weight).sum(dim=(2, 3), keepdim=True) / weight.sum(dim=(2, 3), keepdim=True)
    pivot = pivot.clamp(0.1, 0.9)
    # level is -1 at black, 0 at the colour and 1 at white. Both ends keep some of the colour, so that its hue is seen.
    level = torch.where(bright < pivot, bright / pivot - 1, (bright - pivot) / (1 - pivot))
    end = torch.where(level < 0, 0.25 * colour, 0.2 * colour + 0.8)
    return torch.cat((torch.lerp(rgb, torch.lerp(colour, end, level.abs()), coloured), alpha), dim=1)


def hue(rgb):
    """(B, 3, H, W) -> hue in turns and chroma, each (B, H, W), as in HSV."""
    turn, saturation, value = torch.from_numpy(rgb2hsv(rgb.numpy(), channel_axis=1)).unbind(1)
    return turn, saturation * value


# ----------------------------------------------------------------------------------------------------------------
# Paint


@dataclasses.dataclass
class PaintConfig:
    """Options of paint."""

    out: str = option("data/emoji", "folder to write: PNG files and metadata.jsonl")
    size: int = option(64, "side of the pictures in pixels", low=8)
    count: int = option(24_000, "pictures; 11,000 show each pair once, 24,000 twice", low=1)


def paint_picture(rgba, name, colour, rng):
    """A thing (1, 4, S, S) in a colour, or None for its own -> (RGB (3, S, S) in [0, 1], caption, tags).

    Half are mirrored. Half are on white, the others on a pastel ground of another colour than the thing's.
    """
    rgba = rgba.flip(-1) if rng.random() < 0.5 else rgba
    rgba = tint(rgba, rgb_of([colour])) if colour else rgba
    ground, caption = torch.ones(1, 3, 1, 1), with_article(f"{colour} {name}" if colour else name)
    ground_name = rng.choice([None] * len(HUES) + HUES)
    if ground_name in (None, colour):
        ground_name = "white"
    else:
        ground = 0.45 * rgb_of([ground_name]) + 0.55
        caption += f" on {with_article(ground_name)} background"
    tags = [name, *filter(None, [colour]), f"{ground_name} background"]
    return on_ground(rgba, ground)[0], caption, tags


def paint(options):
    """Write the captioned folder. The pairs come in a random order, again and again until there are enough."""
    names, rgba = all_emoji(options.size)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    pairs, lines = pairs_to_paint(names), []
    random.Random(0).shuffle(pairs)
    for number in tqdm(range(options.count), "painting", unit=" pictures"):
        i, colour = pairs[number % len(pairs)]
        rgb, caption, tags = paint_picture(rgba[i : i + 1], names[i], colour, random.Random(number))
        file_name = f"{number:06d}.png"
        Image.fromarray(common.to_uint8(rgb[None])[0]).save(folder / file_name)
        lines.append(json.dumps({"file_name": file_name, "text": caption, "tags": tags}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), "utf-8")
    print(f"{options.count:,} pictures of {len(names)} things; next: python dit_t2i.py train --data {options.out}")


# ----------------------------------------------------------------------------------------------------------------
# Evaluate


def colour_seen(rgb):
    """Which of HUES each picture (B, 3, H, W) mostly has, None if it is grey. Pixels are weighted by their chroma."""
    turn, chroma = hue(rgb)
    known = hue(rgb_of(HUES))[0].flatten()  # (8,)
    away = (turn.flatten(1).unsqueeze(-1) - known).abs()
    nearest = torch.minimum(away, 1 - away).argmin(dim=-1)  # (B, H W)
    weight = chroma.flatten(1) * (chroma.flatten(1) > 0.15)
    sums = torch.zeros(len(rgb), len(HUES)).scatter_add_(1, nearest, weight)
    return [HUES[k] if most else None for most, k in zip(sums.amax(dim=1).tolist(), sums.argmax(dim=1).tolist())]


def structure(rgb):
    """(B, 3, H, W) -> (B, features): brightness at three scales, of mean 0 and deviation 1. No colour is left."""
    grey = luma(rgb)
    levels = [F.avg_pool2d(grey, k).flatten(1) for k in (1, 2, 4)]
    levels = [(level - level.mean(1, keepdim=True)) / level.std(1, keepdim=True) for level in levels]
    return torch.cat([level / level.shape[1] ** 0.5 for level in levels], dim=1)


def things_seen(rgb, names, rgba):
    """The name of the emoji (names, rgba) whose structure is nearest to that of each picture (B, 3, S, S)."""
    known = torch.cat((rgba, rgba.flip(-1)))
    grey = torch.cat([tint(part, rgb_of(["grey"])) for part in known.split(256)])
    nearest = torch.cdist(structure(rgb), structure(on_ground(grey, torch.ones(1, 3, 1, 1)))).argmin(dim=1)
    return [names[i % len(names)] for i in nearest.tolist()]


@dataclasses.dataclass
class EvaluateConfig(common.LoadConfig):
    """Options of evaluate."""

    num: int = option(1, "pictures of each pair", low=1)
    steps: int = option(28, "steps from noise to picture", low=1)
    cfg: float | None = option(None, "guidance (default: the weights')", low=0.0)
    precision: str = option("auto", "of matrix products", choices=("auto", "fp32", "bf16", "fp16"))
    out: str = option("samples/dit_t2i_unseen.png", "sheet of all pairs, a row for each thing", picture=True)


def evaluate(options):
    """Sample each thing of HELD_OUT in each colour of HUES, and measure how many pictures are right."""
    device = common.pick_device(options.device)
    model, config = dit_t2i.load_model(common.find_weights(options.weights, "dit_t2i"), device)
    names, rgba = all_emoji(config.image_size)
    pairs = [(colour, thing) for thing in HELD_OUT for colour in HUES]
    prompts = [f"a {colour} {thing}" for colour, thing in pairs]
    settings = {"steps": options.steps, "cfg": options.cfg, "seed_stride": options.num}  # each pair has its own noise
    precision = common.pick_precision(options.precision, device)
    rgb = dit_t2i.sample(model, config, prompts, options.num, precision=precision, **settings)
    common.save_picture(common.make_grid(rgb, len(HUES) * options.num), options.out)
    wanted = [pair for pair in pairs for _ in range(options.num)]
    hues = np.mean([seen == colour for seen, (colour, _) in zip(colour_seen(rgb), wanted)])
    things = np.mean([seen == thing for seen, (_, thing) in zip(things_seen(rgb, names, rgba), wanted)])
    print(f"of {len(wanted)} pictures of {len(HELD_OUT)} things in {len(HUES)} colours that were never shown together,")
    print(f"{hues:.1%} have the right hue and {things:.1%} look most like the right thing; see {options.out}")


COMMANDS = {
    "paint": (paint, PaintConfig, None, "write a captioned folder, e.g. paint --out data/emoji"),
    "evaluate": (evaluate, EvaluateConfig, None, "test colours of things that were never shown together"),
}


def main(argv=None):
    """The command line: the words after the file's name, or sys.argv's; returns the exit code."""
    return common.run_command_line("emoji", __doc__, COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
