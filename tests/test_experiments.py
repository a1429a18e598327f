"""experiments/claims.py, expected.py and figures.py: what they measure and show, on a few painted pictures."""

import csv
import dataclasses
import importlib
import json
import sys

import common

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "experiments"))
import claims
import expected
import figures


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch, tmp_path, honest=common.paint_set):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "paint_set", lambda paint, count, size: honest(paint, min(count, 100), size))
    monkeypatch.setattr(claims, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(claims.dit_t2i, "preview", lambda *args: torch.zeros(1, 3, 8, 8))  # takes longer than training


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_each_claim_runs_and_goes_on_after_what_is_there(name, tmp_path, monkeypatch):
    entry, path = claims.CLAIMS[name], tmp_path / "results" / f"{name}.csv"
    assert claims.main(["run", name, "--seeds", "1", "--steps", "2"]) == 0
    text = path.read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["variant"] for row in rows] == list(entry.variants)
    measures = [np.float64(row[entry.expected[0]]) for row in rows]
    assert np.isfinite(measures).all() and len(set(measures)) == len(rows)
    path.write_text("\n".join(text.splitlines()[:-1]) + "\n")  # as if it had been killed before the last row
    monkeypatch.setattr(claims, "train", lambda module, folder, *options: None)  # its training was over
    claims.main(["run", name, "--seeds", "1", "--steps", "2"])
    again = list(csv.DictReader(path.read_text().splitlines()))
    assert again[:-1] == rows[:-1] and again[-1][entry.expected[0]] == rows[-1][entry.expected[0]]


@pytest.mark.parametrize(
    "low, high, says",
    [
        ((1, 2, 3), (4, 5, 6), "reproduced"),
        ((4, 5, 6), (1, 2, 3), "not reproduced"),
        ((1, 2, 4), (3, 5, 6), "open: the seeds overlap"),
        ((1,), (2,), "open: too few seeds"),
    ],
)
def test_the_verdict_is_that_of_all_seeds(low, high, says):
    measure, *variants = claims.CLAIMS["joint_or_dual"].expected
    rows = [{"variant": v, measure: str(x)} for v, part in zip(variants, (low, high)) for x in part]
    assert claims.verdict("joint_or_dual", rows)[1] == says


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


EXPECTED = json.loads((ROOT / "assets" / "expected.json").read_text())


@pytest.mark.parametrize("run", EXPECTED, ids=lambda run: run["settings"]["system"])
def test_demo_runs_and_no_others_know_what_loss_to_expect(run):
    module = importlib.import_module(run["settings"]["system"])
    given = {"objective": run["settings"].get("objective", "flow")} if module.__name__ == "unet_ddpm" else {}
    config = common.make_config(module.Config, given | {"minutes": 3.0, "seed": 5}, module.PRESETS)
    assert common.expected_run(module.__name__, config) == run
    assert common.expected_run("toy", config) is None
    others = [{"image_size": 16}, {"lr": 1e-5}, {"batch_size": 4}]
    others += {"jit_lab": [{"color_fraction": 1.0}], "serpentine_vae": [{"known_prob": 0.0}]}.get(module.__name__, [])
    others += {"dit_t2i": [{"start": "run"}, {"arch": "joint"}], "unet_ddpm": [{"vae": "v"}]}.get(module.__name__, [])
    for other in others:
        assert common.expected_run(module.__name__, dataclasses.replace(config, **other)) is None, other
    pictures, losses = zip(*run["curve"])
    assert 30 <= len(losses) <= 40 and list(pictures) == sorted(set(pictures)) and losses[0] > 3 * losses[-1] > 0


def test_a_thinned_log_has_the_mean_loss_of_each_part():
    rows = [{"images": f"{32 * i}", "loss": f"{32 * i}"} for i in range(1, 1001)]
    curve = expected.thin(rows)
    assert 38 < len(curve) <= 40 and all(y == pytest.approx(x, rel=1e-3) for x, y in curve)
    assert curve[0][0] < 100 and curve[-1][0] == pytest.approx(32_000 * (1 + (39 / 40) ** 2) / 2, rel=0.01)
