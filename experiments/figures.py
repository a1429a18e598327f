"""The pictures that the posts show, and rows that show one setting at several values.

    python experiments/figures.py corruption --data data/faces-80    pairs: in colour, and made monochrome
    python experiments/figures.py crops --data data/faces-80         a picture and four crops of half its side
    python experiments/figures.py steps                              5, 10, 20, 30 and 50 steps, rows of the same noise
    python experiments/figures.py guidance                           guidance 1, 2, 4, 6 and 8, rows of the same noise
    python experiments/figures.py written --data data/faces-80       inpainting as the write-up has it, beside ours
    python experiments/figures.py novelty --system unet_ddpm --alexnet FILE --lpips FILE       LPIPS, as jit_lab.py does

Each writes assets/NAME.png, or the file that --out names. Without --data the pictures are painted.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import dit_t2i  # noqa: E402
import jit_lab  # noqa: E402
import serpentine_vae  # noqa: E402
import unet_ddpm  # noqa: E402

CPU = "cpu"


def faces(options, count):
    """The first pictures of --data, (count, 3, 80, 80) in [0, 1]."""
    return common.load_pictures(options.data, 80, first=count).pictures / 255


def corruption(options):
    """Four pairs: a picture, and what jit_lab.py trains on in its place if it is one of the 90 %."""
    rgb = faces(options, 4)
    lab = jit_lab.rgb_to_lab(rgb)
    lab[:, 1:] = 0  # zero chroma
    pairs = torch.stack((rgb, jit_lab.lab_to_rgb(lab)), dim=1).flatten(0, 1)
    return common.make_grid(pairs.repeat_interleave(2, 2).repeat_interleave(2, 3), columns=4)


def crop_config():
    """The demo's settings, with crops of half the side alone."""
    return common.make_config(jit_lab.Config, jit_lab.DEMO | dict(crop_sizes=(0.5,), full_image_prob=0.0))


def crops(options):
    """A picture four times as large, in it the places of four crops of 40 x 40 pixels, and beside it the crops."""
    picture = common.make_grid(faces(options, 1)).resize((320, 320), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (320 + 10 + 330, 330), "white")
    marked = picture.copy()
    for i, colour in enumerate(("#d9541e", "#1f77b4", "#3a923a", "#8a5bd0")):
        place = jit_lab.random_crop(crop_config(), common.generator(2, i))  # in patches of 8 x 8
        top, left, side = (4 * 8 * n for n in place)
        box = left, top, left + side - 1, top + side - 1
        ImageDraw.Draw(marked).rectangle(box, outline=colour, width=3)
        part = picture.crop((left, top, left + side, top + side))
        ImageDraw.Draw(part).rectangle((0, 0, side - 1, side - 1), outline=colour, width=3)
        sheet.paste(part, (330 + i % 2 * 170, i // 2 * 170))
    sheet.paste(marked, (0, 0))
    return sheet


def steps(options):
    """Eight samples of jit_lab.py's weights, with more steps from row to row."""
    model, config = jit_lab.load_model(common.find_weights(options.weights, "jit_lab"), CPU)
    return common.make_grid(torch.cat([jit_lab.sample(model, config, 8, n) for n in (5, 10, 20, 30, 50)]), columns=8)


def guidance(options):
    """Eight samples of one prompt of dit_t2i.py's weights, with more guidance from row to row."""
    model, config = dit_t2i.load_model(common.find_weights(options.weights, "dit_t2i"), CPU)
    rows = [dit_t2i.sample(model, config, [options.prompt], 8, cfg=cfg, steps=28) for cfg in (1.0, 2.0, 4.0, 6.0, 8.0)]
    return common.make_grid(torch.cat(rows), columns=8)


def written(options):
    """Four held-out faces whose middle is made anew: the original, then two results as the write-up has it (1,000
    ancestral steps, each made once, with the clean mean at the kept positions), then two of ours. Prints seconds."""
    model, config = serpentine_vae.load_model(options.weights, CPU)
    pictures = serpentine_vae.unseen_pictures(tuple(options.data), config)[:4]
    x = serpentine_vae.to_signed(pictures)
    keep = torch.ones(x.shape[2:])
    keep[16:64, 16:64] = 0
    columns = [x / 2 + 0.5]
    for as_written in (True, False):
        start = time.perf_counter()
        for seed in (0, 100):
            _, made = serpentine_vae.inpaint(model, config, x, keep, num=4, seed=seed, as_written=as_written)
            columns.append(made)
        way = "as written" if as_written else "as by default"
        print(f"{way}: {time.perf_counter() - start:.0f} seconds for eight results")
    return common.make_grid(torch.stack(columns, dim=1).flatten(0, 1), columns=5)


def novelty(options):
    """64 samples of a file's weights beside the nearest of the first 10,000 training pictures. Prints the medians of
    their LPIPS distances and of those between training pictures."""
    path = common.find_weights(options.weights, options.system)
    module = {"unet_ddpm": unet_ddpm, "serpentine_vae": serpentine_vae, "dit_t2i": dit_t2i}[options.system]
    model, config = module.load_model(path, CPU)
    data = common.load_pictures(options.data, config.image_size, first=10_000)
    wanted = [data.captions[i] for i in range(0, len(data), len(data) // 64)][:64]
    rgb = module.sample(model, config, **({"prompts": wanted} if module is dit_t2i else {"num": 64}))
    lpips = common.Lpips.load(options.alexnet, options.lpips)
    distances, index = jit_lab.nearest(lpips, rgb, data.pictures)
    usual = jit_lab.nearest(lpips, data.pictures[:200] / 255, data.pictures, skip_self=True)[0].median()
    print(f"median {distances.median():.4f}, least {distances.min():.4f}; between training pictures {usual:.4f}")
    return jit_lab.pair_sheet(rgb, data.pictures[index] / 255, distances)


def main(argv=None):
    """Run the command line; returns the exit code."""
    figures = {figure.__name__: figure for figure in (corruption, crops, steps, guidance, written, novelty)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=figures)
    parser.add_argument("--data", nargs="+", default=["drawn"], help="pictures, as for train")
    parser.add_argument("--weights", default="", help="checkpoint or run (default: as for sample)")
    parser.add_argument("--system", default="serpentine_vae", help="of novelty: the file whose weights are sampled")
    parser.add_argument("--alexnet", help="of novelty: torchvision's AlexNet weights")
    parser.add_argument("--lpips", help="of novelty: the heads for AlexNet, weights/v0.1/alex.pth of the LPIPS package")
    parser.add_argument("--prompt", default="a red car", help="of guidance")
    parser.add_argument("--out", help="picture to write")
    options = parser.parse_args(argv)
    out = options.out or ROOT / "assets" / f"{options.name}.png"
    common.save_picture(figures[options.name](options), out)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
