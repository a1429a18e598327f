"""Painted scenes: every caption is true."""

import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageColor

import common
from common import paint_scene

TABLES = common.picture_tables("scenes")
COLOURS, THINGS, BACKGROUNDS = TABLES["colours"], TABLES["things"], TABLES["backgrounds"]
PLACES, RELATIONS = TABLES["places"], TABLES["relations"]
PURE = {name: np.array(ImageColor.getrgb(row["body"]), float) for name, row in COLOURS.items()}
# What the words mean on the screen, written down a second time: x to the right, y downwards.
MEANING = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "top": (0, -1), "below": (0, 1), "bottom": (0, 1)}
COLOUR, THING_NAME = "|".join(COLOURS), "|".join(THINGS)
THING = rf"an? (?:(small|big) )?({COLOUR}) ({THING_NAME})"
GRAMMAR = re.compile(
    rf"{THING}(?: ({'|'.join(RELATIONS)}) {THING}| ({'|'.join(PLACES)}))?"
    rf"(?:,? ({'|'.join(BACKGROUNDS)}))?"
)


def parse(caption):
    size, colour, thing, relation, _, colour2, thing2, place, background = GRAMMAR.fullmatch(caption).groups()
    return size, colour, thing, relation, colour2, thing2, place, background


def array(seed, size=64):
    return np.asarray(paint_scene(seed, size)[0], float)


def far(a, b):
    return np.abs(a - b).sum(-1)


def without(monkeypatch, seed, blank=None, size=64):
    """The picture with some things, or all, left out: the same random numbers, empty outlines."""
    with monkeypatch.context() as patch:
        rest = {name: [] if blank in (None, name) else row for name, row in THINGS.items()}
        patch.setitem(TABLES, "things", rest)
        return array(seed, size)


@pytest.fixture(scope="module")
def captions():
    return [paint_scene(seed, 16)[1] for seed in range(3000)]


def test_a_scene_is_a_function_of_its_number_alone():
    one, caption, _ = paint_scene(5)
    paint_scene(6)
    again, words, _ = paint_scene(5)
    assert one.size == (64, 64) and one.mode == "RGB" and one.tobytes() == again.tobytes() and caption == words
    assert paint_scene(5, 32)[1] == caption
    assert np.abs(array(5, 32) - np.asarray(paint_scene(5, 128)[0].reduce(4), float)).mean() < 4


def test_no_two_scenes_are_equal():
    assert len({paint_scene(seed, 32)[0].tobytes() for seed in range(1500)}) > 1495


def test_captions_follow_the_grammar_and_use_everything(captions):
    seen = [Counter(column) for column in zip(*map(parse, captions))]
    assert set(seen[0]) == {None, "small", "big"}
    assert set(seen[1]) == set(COLOURS) and set(seen[4]) == {None, *COLOURS}
    assert set(seen[2]) == set(THINGS) and set(seen[5]) == {None, *THINGS}
    assert set(seen[3]) == {None, *RELATIONS}
    assert set(seen[6]) == {None, *PLACES} and set(seen[7]) == {None, *BACKGROUNDS}
    assert min(seen[1].values()) > 180 and min(seen[2].values()) > 70  # none is rare
    assert len(THINGS) >= 18 and len(COLOURS) >= 11 and len(BACKGROUNDS) >= 12


def test_captions_are_short_plain_and_spelt_right(captions):
    words = {word for caption in captions for word in caption.replace(",", "").split()}
    assert len(words) <= 60 and all(word.isalpha() and word.islower() for word in words)
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", caption) for caption in captions)
    lengths = [len(caption.split()) for caption in captions]
    assert 0.4 < np.mean(np.array(lengths) <= 4) < 0.65 and max(lengths) <= 14
    assert 0.22 < np.mean([bool(parse(caption)[3]) for caption in captions]) < 0.28
    assert 0.3 < np.mean([bool(parse(caption)[7]) for caption in captions]) < 0.55


def test_the_colour_in_the_caption_is_the_colour_of_the_thing(monkeypatch):
    singles = 0
    for seed in range(600):
        picture, caption, _ = paint_scene(seed)
        _, colour, _, relation, *_ = parse(caption)
        if relation:
            continue
        picture = np.asarray(picture, float)
        area = picture[far(picture, without(monkeypatch, seed)) > 20]
        share = {name: (far(area, pure) < 50).mean() for name, pure in PURE.items()}
        assert share[colour] > 0.2 and share[colour] == max(share.values()), (seed, caption, share)
        singles += 1
    assert singles > 400


def test_things_are_where_the_caption_says(monkeypatch):
    monkeypatch.setitem(TABLES, "details", dict.fromkeys(TABLES["details"], (0, 255, 0)))  # only bodies are left to see
    rows, columns = np.mgrid[-1:1:64j, -1:1:64j]
    checked = Counter()
    for seed in range(1200):
        picture, caption, _ = paint_scene(seed)
        picture = np.asarray(picture, float)
        _, colour, _, relation, colour2, _, place, _ = parse(caption)
        drawn = far(picture, without(monkeypatch, seed)) > 20
        if relation:  # by the centroids of the two colours
            first, second = (drawn & (far(picture, PURE[name]) < 42) for name in (colour, colour2))
            away = np.array([columns[first].mean() - columns[second].mean(), rows[first].mean() - rows[second].mean()])
            step = np.array(MEANING[relation.split()[0]])
            assert away @ step > 0.5 and abs(away @ step[::-1]) < 0.4, (seed, caption)
        else:  # by the middle of all that is drawn
            x, y = columns[drawn], rows[drawn]
            middle = np.array([x.min() + x.max(), y.min() + y.max()]) / 2
            step = np.array(MEANING[place.split()[-1]] if place else (0, 0))
            assert middle @ step > 0.2 or not place, (seed, caption)
            assert np.abs(middle * (step == 0)).max() < 0.2, (seed, caption)  # and nowhere else than there
        checked[relation or place] += 1
    assert min(checked.values()) > 24 and len(checked) == 9


def test_sizes_can_be_told_apart(monkeypatch):
    extents = {"small": [], None: [], "big": []}
    for seed in range(400):
        size, _, _, relation, *_ = parse(paint_scene(seed)[1])
        if not relation:
            drawn = far(array(seed), without(monkeypatch, seed)) > 20
            rows, columns = np.nonzero(drawn)
            extents[size].append(max(np.ptp(rows), np.ptp(columns)))
    assert max(extents["small"]) < min(extents[None]) and max(extents[None]) < min(extents["big"])


def test_two_things_never_touch_and_differ(monkeypatch):
    pairs = 0
    for seed in range(1000):
        caption = paint_scene(seed)[1]
        _, colour, thing, relation, colour2, thing2, *_ = parse(caption)
        if not relation:
            continue
        assert colour != colour2
        if thing != thing2:
            empty = without(monkeypatch, seed)
            first = far(without(monkeypatch, seed, blank=thing2), empty) > 45  # a shadow is not a touch
            second = far(without(monkeypatch, seed, blank=thing), empty) > 45
            assert first.any() and second.any() and (first & second).sum() <= 2, (seed, caption)
            pairs += 1
    assert pairs > 150


def test_every_thing_stays_inside_its_frame():
    for name, shapes in THINGS.items():
        image = Image.new("RGB", (240, 240), "white")
        common.Painter(image, {}, scale=1 / 1.2).paint([("black", outline) for _, outline in shapes])
        left, top, right, bottom = (v / 100 - 1.2 for v in image.convert("L").point(lambda v: 255 - v).getbbox())
        assert min(left, top) > -1.06 and max(right, bottom) < 1.06, name
        assert max(right - left, bottom - top) > 1.7, name  # or "small" would not mean the same for all


def test_things_stand_out_from_their_background(monkeypatch):
    seen_on = {colour: set(BACKGROUNDS) - set(row["avoid"]) for colour, row in COLOURS.items()}
    for colour, phrases in seen_on.items():
        assert len(phrases) >= 3 and not any(colour in phrase.split() for phrase in phrases)
        for other, others in seen_on.items():
            assert phrases & others, (colour, other)  # every pair of colours has a background
    for seed in range(600):
        picture, caption, _ = paint_scene(seed)
        picture, empty = np.asarray(picture, float), without(monkeypatch, seed)
        body = far(picture, PURE[parse(caption)[1]]) < 42
        assert far(picture, empty)[body & (far(picture, empty) > 20)].min() > 40, (seed, caption)


def test_a_new_entry_is_a_new_thing(monkeypatch):
    diamond = [[0, -1], [1, 0], [0, 1], [-1, 0]]
    monkeypatch.setitem(TABLES, "things", {"pebble": [["body", diamond]]})
    crimson = {"body": "#b00030", "deep": "#800020", "avoid": []}
    monkeypatch.setitem(TABLES, "colours", COLOURS | {"crimson": crimson})
    captions = {paint_scene(seed, 16)[1] for seed in range(200)}
    assert "a crimson pebble" in captions and all("pebble" in caption for caption in captions)
