"""Painted scenes: every caption is true."""

import re
from collections import Counter, namedtuple

import common
from common import paint_scene

import numpy as np
import pytest
from PIL import Image, ImageColor
from scipy.ndimage import median_filter

TABLES = common.picture_tables("scenes")
COLOURS, THINGS, BACKGROUNDS = TABLES["colours"], TABLES["things"], TABLES["backgrounds"]
PLACES, RELATIONS = TABLES["places"], TABLES["relations"]
PURE = {name: np.array(ImageColor.getrgb(row["body"]), float) for name, row in COLOURS.items()}
# What the words mean on the screen, written down a second time: x to the right, y downwards.
MEANING = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "top": (0, -1), "below": (0, 1), "bottom": (0, 1)}
THING = rf"({'|'.join(COLOURS)}) ({'|'.join(THINGS)})"
GRAMMAR = re.compile(
    rf"an? (?:(small|big) )?{THING}(?: ({'|'.join(RELATIONS)}) an? {THING}| ({'|'.join(PLACES)}))?"
    rf"(?:,? ({'|'.join(BACKGROUNDS)}))?"
)
Words = namedtuple("Words", "size colour thing relation colour2 thing2 place background")


def parse(caption):
    return Words(*GRAMMAR.fullmatch(caption).groups())


def scene(seed, size=64):
    """(picture of floats, the words of its caption)"""
    picture, caption, _ = paint_scene(seed, size)
    return np.asarray(picture, np.float32), parse(caption)


def far(a, b):
    return np.abs(a - b).sum(-1)


def without(seed, blank=None):
    """The picture with some things, or all, left out: the same random numbers, empty outlines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TABLES, "things", {name: [] if blank in (None, name) else row for name, row in THINGS.items()})
        return np.asarray(paint_scene(seed)[0], np.float32)


@pytest.fixture(scope="module")
def scenes():
    """(picture, the same without its things, the words of its caption) of 600 scenes."""
    return [(picture, without(seed), words) for seed in range(600) for picture, words in [scene(seed)]]


def test_a_scene_is_a_function_of_its_number_alone_and_no_two_are_equal():
    one, caption, _ = paint_scene(5)
    paint_scene(6)
    again, words, _ = paint_scene(5)
    assert one.size == (64, 64) and one.mode == "RGB" and one.tobytes() == again.tobytes() and caption == words
    assert paint_scene(5, 32)[1] == caption
    assert np.abs(scene(5, 32)[0] - np.asarray(paint_scene(5, 128)[0].reduce(4), float)).mean() < 4
    assert len({paint_scene(seed, 32)[0].tobytes() for seed in range(1500)}) > 1495


def test_captions_follow_the_grammar_use_everything_and_are_short_and_plain():
    captions = [paint_scene(seed, 16)[1] for seed in range(3000)]
    seen = Words(*(Counter(column) for column in zip(*map(parse, captions))))
    assert set(seen.size) == {None, "small", "big"} and set(seen.relation) == {None, *RELATIONS}
    assert set(seen.colour) == set(COLOURS) and set(seen.colour2) == {None, *COLOURS}
    assert set(seen.thing) == set(THINGS) and set(seen.thing2) == {None, *THINGS}
    assert set(seen.place) == {None, *PLACES} and set(seen.background) == {None, *BACKGROUNDS}
    assert min(seen.colour.values()) > 180 and min(seen.thing.values()) > 70  # none is rare
    assert len(THINGS) >= 15 and len(COLOURS) >= 11 and len(BACKGROUNDS) >= 12
    words = {word for caption in captions for word in caption.replace(",", "").split()}
    assert len(words) <= 60 and all(word.isalpha() and word.islower() for word in words)
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", caption) for caption in captions)
    lengths = np.array([len(caption.split()) for caption in captions])
    assert 0.4 < np.mean(lengths <= 4) < 0.65 and max(lengths) <= 14
    assert 0.22 < 1 - seen.relation[None] / 3000 < 0.28 and 0.3 < 1 - seen.background[None] / 3000 < 0.55


def test_colour_and_size_of_a_thing_are_those_of_its_caption(scenes):
    extents = {"small": [], None: [], "big": []}
    for picture, empty, words in scenes:
        if not words.relation:
            drawn = far(picture, empty) > 20
            share = {name: (far(picture[drawn], pure) < 50).mean() for name, pure in PURE.items()}
            assert share[words.colour] > 0.2 and share[words.colour] == max(share.values()), (words, share)
            rows, columns = np.nonzero(drawn)
            extents[words.size].append(max(np.ptp(rows), np.ptp(columns)))
    assert sum(map(len, extents.values())) > 400
    assert max(extents["small"]) < min(extents[None]) and max(extents[None]) < min(extents["big"])


def test_things_are_where_the_caption_says(monkeypatch):
    monkeypatch.setitem(TABLES, "details", dict.fromkeys(TABLES["details"], (0, 255, 0)))  # only bodies are left to see
    rows, columns = np.mgrid[-1:1:64j, -1:1:64j]
    checked = Counter()
    for seed in range(1200):
        picture, words = scene(seed)
        drawn = far(picture, without(seed)) > 20
        if words.relation:  # by the centroids of the two colours
            first, second = (drawn & (far(picture, PURE[name]) < 42) for name in (words.colour, words.colour2))
            away = np.array([columns[first].mean() - columns[second].mean(), rows[first].mean() - rows[second].mean()])
            step = np.array(MEANING[words.relation.split()[0]])
            assert away @ step > 0.5 and abs(away @ step[::-1]) < 0.4, (seed, words)
        else:  # by the middle of all that is drawn
            x, y = columns[drawn], rows[drawn]
            middle = np.array([x.min() + x.max(), y.min() + y.max()]) / 2
            step = np.array(MEANING[words.place.split()[-1]] if words.place else (0, 0))
            assert middle @ step > 0.2 or not words.place, (seed, words)
            assert np.abs(middle * (step == 0)).max() < 0.2, (seed, words)  # and nowhere else than there
        checked[words.relation or words.place] += 1
    assert min(checked.values()) > 24 and len(checked) == 9


def test_two_things_never_touch_and_differ():
    pairs = 0
    for seed in range(1000):
        words = parse(paint_scene(seed)[1])
        assert not words.relation or words.colour != words.colour2
        if words.relation and words.thing != words.thing2:
            empty = without(seed)
            first = far(without(seed, blank=words.thing2), empty) > 45  # a shadow is not a touch
            second = far(without(seed, blank=words.thing), empty) > 45
            assert first.any() and second.any() and (first & second).sum() <= 2, (seed, words)
            pairs += 1
    assert pairs > 150


def test_every_thing_stays_inside_its_frame():
    for name, shapes in THINGS.items():
        image = Image.new("RGB", (240, 240), "white")
        common.Painter(image, {}, scale=1 / 1.2).paint([("black", outline) for _, outline in shapes])
        left, top, right, bottom = (v / 100 - 1.2 for v in image.convert("L").point(lambda v: 255 - v).getbbox())
        assert min(left, top) > -1.06 and max(right, bottom) < 1.06, name
        assert max(right - left, bottom - top) > 1.7, name  # or "small" would not mean the same for all


def test_things_stand_out_from_their_background(scenes):
    seen_on = {colour: set(BACKGROUNDS) - set(row["avoid"]) for colour, row in COLOURS.items()}
    for colour, phrases in seen_on.items():
        assert len(phrases) >= 3 and not any(colour in phrase.split() for phrase in phrases)
        for other, others in seen_on.items():
            assert phrases & others, (colour, other)  # every pair of colours has a background
    for picture, empty, words in scenes:
        away = far(picture, median_filter(empty, (5, 5, 1)))  # without the stars of the night, which are single pixels
        assert away[(far(picture, PURE[words.colour]) < 42) & (away > 20)].min() > 40, words
