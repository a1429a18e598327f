"""experiments/: claims.py, features.py, figures.py and scenes.py, on a few painted pictures."""

import csv
import dataclasses
import functools
import sys

import common

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "experiments"))
import claims
import features
import figures
import scenes
from claims import dit_t2i, jit_lab, serpentine_vae, unet_ddpm


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One folder for all claims, of which many share a run."""
    return tmp_path_factory.mktemp("claims")


TINY = {
    "jit_lab": dict(hidden_size=32, depth=1, num_heads=1, batch_size=8),
    "unet_ddpm": dict(
        model_channels=32, num_head_channels=32, channel_mult=(1,), attention_resolutions=(20,), batch_size=4
    ),
    "train-vae": dict(batch_size=2),
    "serpentine_vae": dict(width=16, batch_size=4),
    "dit_t2i": dict(depth=2, num_heads=1, head_dim=16, text_dim=16, batch_size=8),
}


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch, shared, paint_set=common.paint_set):
    """Few and small pictures, tiny networks, few sampling steps."""
    monkeypatch.chdir(shared)
    monkeypatch.setattr(common, "paint_set", lambda paint, count, size: paint_set(paint, min(count, 100), size))
    monkeypatch.setattr(common, "MARKS", ())  # no pictures while training
    monkeypatch.setattr(common, "compile_blocks", lambda *args, **options: None)
    monkeypatch.setattr(claims, "RESULTS", shared / "results")
    monkeypatch.setattr(claims, "NUM", 8)
    monkeypatch.setattr(claims.emoji, "HUES", ["red"])
    faces = functools.partial(lambda make, first, count, side=40: make(first, min(count, 8), side), claims.new_faces)
    monkeypatch.setattr(claims, "new_faces", faces)
    monkeypatch.setattr(unet_ddpm, "SAMPLING_STEPS", (1, 2))
    for name, sizes in TINY.items():
        monkeypatch.setitem(claims.BASE, name, claims.BASE[name] | sizes)
    monkeypatch.setitem(jit_lab.PRESETS, "demo", jit_lab.DEMO | dict(hidden_size=32, depth=1))
    for module, name in ((dit_t2i, "dit_t2i"), (unet_ddpm, "unet_ddpm")):
        monkeypatch.setitem(module.PRESETS, "demo", module.DEMO | TINY[name])
    monkeypatch.setitem(serpentine_vae.PRESETS, "paper", dict(steps=2, width=16))
    for module in (jit_lab, unet_ddpm):  # a ninth of the sampling steps, or two
        few = functools.partial(
            lambda sample, m, c, num, n, *a, **k: sample(m, c, num, n // 9 + 1, *a, **k), module.sample
        )
        monkeypatch.setattr(module, "sample", few)
    for module in (serpentine_vae, dit_t2i):
        two = functools.partial(lambda sample, *a, **k: sample(*a, **k | {"steps": 2}), module.sample)
        monkeypatch.setattr(module, "sample", two)


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_each_claim_runs_and_goes_on_after_what_is_there(name, shared, monkeypatch):
    entry, path = claims.CLAIMS[name], shared / "results" / f"{name}.csv"
    assert claims.main(["run", name, "--seeds", "1", "--steps", "2"]) == 0
    text = path.read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["variant"] for row in rows] == [v for v in entry.variants if v != "taef2"]
    measures = [np.float64(row[entry.expected[0]]) for row in rows]
    assert np.isfinite(measures).all()
    path.write_text("\n".join(text.splitlines()[:-1]) + "\n")  # as if it had been killed before the last row
    monkeypatch.setattr(claims, "train", lambda *args, **options: None)  # its training was over
    claims.main(["run", name, "--seeds", "1", "--steps", "2"])
    again = list(csv.DictReader(path.read_text().splitlines()))
    assert again[:-1] == rows[:-1]
    if entry.expected[0] != "time":
        assert float(again[-1][entry.expected[0]]) == pytest.approx(measures[-1], rel=0.05 if name == "memory" else 0)


def test_what_is_put_in_place_of_a_part_differs_from_it_as_said():
    config = dataclasses.replace(dit_t2i.Config(), image_size=16, arch="joint", **TINY["dit_t2i"])
    txt, vis, condition = torch.randn(1, 3, 16), torch.randn(1, 4, 16), torch.randn(1, 16)
    for part, same in ((dit_t2i.DiT, True), (claims.OpenGates, False), (claims.RandomModulation, False)):
        with claims.replaced(True, dit_t2i, "DiT", part):
            layer = dit_t2i.build_model(config, (3, 16), 5).layers[0]
        assert torch.equal(layer(txt, vis, condition, None)[1], vis) == same
    schedule = claims.cosine_schedule(100)
    assert schedule[0] == 1 and schedule[-1] < 1e-4 and (schedule.diff() <= 0).all()
    x, layer = torch.randn(1, 16, 3, 3), claims.bench.Attention(16)
    torch.nn.init.normal_(layer.leave.weight)
    mixed = torch.randperm(9)
    moved = layer(x.flatten(2)[:, :, mixed].unflatten(2, (3, 3))).flatten(2)
    assert torch.allclose(moved, layer(x).flatten(2)[:, :, mixed], atol=1e-5)  # it has no positions


@pytest.mark.parametrize(
    "name, low, high, says",
    [
        ("joint_or_dual", (1, 2, 3), (4, 5, 6), "reproduced"),
        ("joint_or_dual", (4, 5, 6), (1, 2, 3), "not reproduced"),
        ("joint_or_dual", (1, 2, 4), (3, 5, 6), "cannot be told at this size: the seeds overlap"),
        ("joint_or_dual", (1,), (2,), "open: too few seeds"),
        ("sampling_steps", (1.0, 1.1), (1.1, 1.0), "reproduced"),  # its margin: at most 5 % more is enough
        ("sampling_steps", (1.2, 1.2), (1.1, 1.0), "not reproduced"),
    ],
)
def test_the_verdict_is_that_of_all_seeds_or_of_a_margin(name, low, high, says):
    measure, one, other, *margin = claims.CLAIMS[name].expected
    rows = [{"variant": v, measure: str(x)} for v, part in ((one, low), (other, high)) for x in part]
    assert margin == [0.05] * (name == "sampling_steps") and claims.verdict(name, rows)[1] == says


def test_the_feature_network_knows_new_faces_and_its_distance_rises_with_damage():
    faces = [common.paint_face(1_000_000 + i, 40) for i in range(400)]
    rgb = common.picture_tensor([np.asarray(picture) for picture, *_ in faces]) / 255
    net, (real, made) = features.load(), rgb.chunk(2)
    wanted = torch.tensor([[float(tag in tags) for tag in net.tags] for *_, tags in faces])
    recall, precision = features.tags_found(net, rgb, wanted)
    assert recall > 0.6 and precision > 0.9
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(made.shape, generator=rng)
    damaged = {
        "blur": [F.avg_pool2d(made, k, 1, k // 2, count_include_pad=False) for k in (1, 3, 5, 7)],
        "noise": [(made + std * noise).clamp(0, 1) for std in (0, 0.1, 0.2, 0.3)],
        "modes": [made[:count].repeat(200 // count, 1, 1, 1) for count in (200, 50, 10, 4)],
    }
    for kind, sets in damaged.items():
        found = [features.frechet(net, real, pictures) for pictures in sets]
        assert found == sorted(found) and found[1] > 1.1 * found[0], (kind, found)


def test_figures_show_pictures_without_their_colours_and_the_places_of_crops(tmp_path):
    for name in ("corruption", "crops"):
        assert figures.main([name, "--out", f"{name}.png"]) == 0
    pairs, sheet = (np.array(Image.open(f"{name}.png")).astype(int) for name in ("corruption", "crops"))
    columns = np.ptp(pairs, axis=2).reshape(320, 4, 160).max(axis=(0, 2))  # largest minus smallest of R, G and B
    assert (columns[[0, 2]] > 50).all() and (columns[[1, 3]] < 4).all()
    assert sheet.shape == (330, 660, 3)
    top, left, _ = (32 * n for n in figures.jit_lab.random_crop(figures.crop_config(), common.generator(2, 0)))
    picture = np.array(Image.open("corruption.png"))[:160, :160].repeat(2, 0).repeat(2, 1)  # the same face
    inside = slice(3, 157)
    assert (sheet[:160, 330:490][inside, inside] == picture[top : top + 160, left : left + 160][inside, inside]).all()


# ---- scenes ----


def test_labels_are_what_a_caption_of_one_thing_names():
    def names(caption):
        return [words[k] if k >= 0 else None for k, words in zip(scenes.labels_of(caption), scenes.HEADS.values())]

    assert names("a red car") == ["car", "red", "", None]
    assert names("a small pink fish at the top, on a blue background") == [
        "fish", "pink", "at the top", "on a blue background"
    ]  # fmt: skip
    assert names("a big black moon at night") == ["moon", "black", "", "at night"]
    assert scenes.labels_of("a red car left of a blue house") is None


def test_shares_count_what_is_named_and_right():
    logits = [
        F.one_hot(torch.tensor(row), 4).float() for row in ([0, 1, 2, 3], [1, 1, 1, 1], [0, 0, 0, 0], [2, 2, 2, 2])
    ]
    labels = torch.tensor([[0, 1, -1, 2], [1, 0, -1, 2], [2, 1, 0, -1], [0, 0, 1, -1]])
    shares = scenes.shares_right(lambda rgb: logits, torch.zeros(4, 3, 64, 64), labels)
    assert shares == {"thing": 0.75, "colour": 0.5, "place": 0.5, "background": 1.0}


def test_classifier_learns_to_tell_scenes_and_is_kept(tmp_path, monkeypatch):
    """Trained for long on few scenes it knows these; the file gives the same network again."""
    monkeypatch.setattr(scenes, "disturb", lambda rgb, rng: rgb)
    monkeypatch.setattr(scenes, "Classifier", functools.partial(scenes.Classifier, 8))
    scenes.train_classifier(tmp_path / "c.safetensors", count=16, epochs=60, batch_size=16)
    net = scenes.load_classifier(tmp_path / "c.safetensors")
    pictures, captions, labels = scenes.scenes_of_one_thing(0, 16)
    assert min(scenes.shares_right(net, pictures / 255, labels).values()) == 1.0
    assert [scenes.labels_of(caption) for caption in captions] == labels.tolist()
