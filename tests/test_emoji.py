"""experiments/emoji.py: the folder that it paints, its measures, and the shipped weights on unseen pairs."""

import random

import dit_t2i
from common import UserError
from experiments import emoji

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw

NAMES = ["car", "fish", "dog", "owl", "pear", "dog face"]
WHITE = torch.ones(1, 3, 1, 1)
SHIPPED = ROOT / "weights" / "dit_t2i.safetensors"


def shape(index, size):
    """In place of an emoji, so that no font is needed: each thing has another arrangement of a red body and a grey
    detail."""
    picture = Image.new("RGBA", (size, size))
    pen = ImageDraw.Draw(picture)
    pen.rectangle([size // 8, size // 4, size // 8 + (index + 2) * size // 10, size * 3 // 4], "#c04020")
    pen.ellipse([size // 2, index * size // 12, size * 3 // 4, index * size // 12 + size // 4], "#303030")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


@pytest.fixture
def shapes(monkeypatch, tmp_path):
    """What emoji.py takes for the font's emoji, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(emoji, "all_emoji", lambda size: (NAMES, torch.stack([shape(i, size) for i in range(6)])))


def tinted(name, colour, ground=WHITE):
    """A thing (1, 3, 32, 32) in a colour, or None for its own."""
    rgba = shape(NAMES.index(name), 32)[None]
    return emoji.on_ground(emoji.tint(rgba, emoji.rgb_of([colour])) if colour else rgba, ground)


def test_the_painted_folder_is_read_by_training_and_its_captions_are_true(shapes):
    assert emoji.main(["paint", "--out", "folder", "--size", "32", "--count", "300"]) == 0
    everything = dit_t2i.PictureSource(dit_t2i.Config(data=("folder",), image_size=32))
    assert len(everything.captions) == 300
    mirrored, shown = 0, set()
    for picture, caption in zip(everything.pictures / 255, everything.captions):
        thing, _, ground = caption.partition(" on ")
        ground = ground.split()[-2] if ground else None
        _, *words = thing.split()
        colour = words.pop(0) if words[0] in emoji.COLOURS else None
        name = " ".join(words)
        shown.add((name, colour))
        assert ground is None or ground != colour  # never blue on blue
        true = tinted(name, colour, 0.45 * emoji.rgb_of([ground]) + 0.55 if ground else WHITE)[0]
        differences = [(picture - either).abs().max() for either in (true, true.flip(-1))]
        assert min(differences) < 0.01, caption
        mirrored += differences[1] < differences[0]
    assert 100 < mirrored < 200
    assert 100 < sum(" on " in caption for caption in everything.captions) < 200
    held_out = {(thing, hue) for thing in ("dog", "owl", "pear", "dog face") for hue in emoji.HUES}
    assert shown == {(name, colour) for name in NAMES for colour in (None, *emoji.COLOURS)} - held_out


def test_tint_keeps_shading_greys_and_transparency():
    rgba = torch.zeros(1, 4, 4, 4)
    rgba[:, :3, :3] = torch.tensor([0.8, 0.2, 0.2]).view(3, 1, 1) * torch.tensor([0.5, 0.8, 1.0]).view(3, 1)
    rgba[:, :3, 3] = 0.4  # a grey row
    rgba[:, 3, :, 1:] = 1
    blue = emoji.tint(rgba, emoji.rgb_of(["blue"]))
    assert torch.equal(blue[:, 3], rgba[:, 3]) and torch.equal(blue[:, :3, 3], rgba[:, :3, 3])
    brightness = emoji.luma(blue[:, :3])[0, 0, :3, 2]
    assert brightness[0] < brightness[1] < brightness[2]
    turn, _ = emoji.hue(blue[:, :3, :3])
    assert torch.allclose(turn, emoji.hue(emoji.rgb_of(["blue"]))[0].expand_as(turn), atol=0.02)
    skull = torch.ones(1, 4, 4, 4)  # no colour of its own: tinted all over
    assert emoji.colour_seen(emoji.tint(skull * 0.6, emoji.rgb_of(["green"]))[:, :3]) == ["green"]
    assert emoji.colour_seen(skull[:, :3] * 0.5) == [None]
    assert emoji.colour_seen(torch.tensor([1, 0.02, 0]).view(1, 3, 1, 1)) == ["red"]  # hues are a circle


def test_names_of_emoji_are_plain_words():
    names = {"\N{AUTOMOBILE}": "car", "\N{FISH}": "fish", "\N{HOT BEVERAGE}": "coffee", "\N{TOP HAT}": "top hat"}
    assert {character: emoji.emoji_name(character) for character in names} == names
    nothing = "\N{CLOCK FACE TWO OCLOCK}", "\N{GREEN BOOK}", "\N{LEFT RIGHT ARROW}", "\N{SQUARED OK}", "A", "\ue000"
    assert [emoji.emoji_name(character) for character in nothing] == [""] * len(nothing)


def test_a_missing_font_is_reported_with_the_package_to_install(monkeypatch):
    monkeypatch.setattr(emoji, "EMOJI_FONTS", (("no such font.ttf", 12),))
    emoji.emoji_font.cache_clear()
    with pytest.raises(UserError, match="fonts-noto-color-emoji"):
        emoji.emoji_font()


@pytest.mark.parametrize("shift, hues, things", [(0, "100.0%", "100.0%"), (2, "0.0%", "87.5%")])
def test_evaluate_counts_right_pictures(shapes, monkeypatch, capsys, shift, hues, things):
    """True pictures in place of samples, half of them mirrored, are all right. Moved on by one pair, they are mostly
    wrong."""
    monkeypatch.setattr(emoji, "HELD_OUT", NAMES)
    monkeypatch.setattr(dit_t2i, "load_model", lambda path, device: (path, dit_t2i.Config(image_size=32)))

    def true_pictures(model, config, prompts, num, seed_stride, **settings):
        assert model == SHIPPED and seed_stride == num == 2  # each pair has noise of its own
        pairs = [(thing, hue) for thing in NAMES for hue in emoji.HUES]
        assert prompts == [f"a {hue} {thing}" for thing, hue in pairs]
        rgb = torch.cat([tinted(thing, hue) for thing, hue in pairs]).repeat_interleave(2, dim=0)
        rgb[::2] = rgb[::2].flip(-1)
        return rgb.roll(shift, dims=0)

    monkeypatch.setattr(dit_t2i, "sample", true_pictures)
    assert emoji.main(["evaluate", "--num", "2"]) == 0
    assert "of 96 pictures" in (out := capsys.readouterr().out)
    assert f"{hues} have the right hue and {things} look" in out


def test_shipped_weights_paint_unseen_pairs_in_the_right_hue():
    assert SHIPPED.stat().st_size < 60e6
    model, config = dit_t2i.load_model(SHIPPED, "cpu")
    things = random.Random(0).sample(emoji.HELD_OUT, len(emoji.HUES))
    prompts = [f"a {colour} {thing}" for colour, thing in zip(emoji.HUES, things)]
    seen = emoji.colour_seen(dit_t2i.sample(model, config, prompts, steps=10))
    assert sum(a == b for a, b in zip(seen, emoji.HUES)) >= 7
