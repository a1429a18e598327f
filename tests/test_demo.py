"""The pages of `demo` in a real browser, with tiny models: every picture that a page shows is compared with what the
file's own functions return, and neither the browser nor the program may ask another machine for anything."""

import contextlib
import io
import shutil
import sys
import threading
import time
from urllib.parse import urlsplit

import common
import dit_t2i
import jit_lab
import serpentine_vae
import unet_ddpm

import numpy as np
import pytest
import torch
from conftest import TINY, random_weights
from PIL import Image, ImageOps, UnidentifiedImageError

SYSTEMS = jit_lab, unet_ddpm, serpentine_vae, dit_t2i
contacted = set()  # the hosts that this program has looked up or connected to


def note_contacts(event, arguments):
    if event == "socket.getaddrinfo":
        contacted.add(str(arguments[0]))
    if event == "socket.connect" and isinstance(arguments[1], tuple):  # else a path
        contacted.add(arguments[1][0])


@pytest.fixture(scope="module")
def browser():
    needs = "the pages' tests need it: pip install gradio playwright"
    pytest.importorskip("gradio", reason=needs)
    playwright = pytest.importorskip("playwright.sync_api", reason=needs)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not chromium:
        pytest.skip("the pages' tests need Chromium: apt-get install chromium")
    sys.addaudithook(note_contacts)
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


class Visitor:
    """A page, by what a person sees of it. Everything waits until it comes true, for at most two minutes."""

    def __init__(self, page):
        self.page = page
        page.set_default_timeout(120_000)

    def until(self, condition):
        from playwright.sync_api import Error

        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(UnidentifiedImageError, Error):  # a frame that the next one has just replaced
                if condition():
                    return
            assert time.monotonic() < end, f"not within two minutes; the page shows {self.caption()!r}"
            self.page.wait_for_timeout(50)

    def picture(self, panel=0):
        image = self.page.locator(".image-frame img:visible").nth(panel)
        self.page.wait_for_function("image => image.complete", arg=image.element_handle())
        source = self.page.request.get(image.get_attribute("src")).body()
        return np.asarray(Image.open(io.BytesIO(source)).convert("RGB")).astype(float)

    def shows(self, rgb, panel=0):
        """Wait until a panel shows these pictures, (B, 3, H, W) in [0, 1]."""
        grid = common.make_grid(rgb)
        expected = np.asarray(ImageOps.scale(grid, 480 // grid.width)).astype(float)
        self.until(lambda: (p := self.picture(panel)).shape == expected.shape and abs(p - expected).mean() < 0.5)

    def caption(self):
        return self.page.locator("[data-testid=textbox]:visible").last.input_value()

    def set(self, **numbers):
        for name, value in numbers.items():
            box = self.page.locator(f"[aria-label='number input for {name}']:visible")
            box.fill(str(value))
            box.press("Enter")

    def press(self, name):
        self.page.locator("button.primary:visible", has_text=name).click()


@pytest.fixture
def visit(browser, monkeypatch, tmp_path):
    """visit(system, *words) runs `demo` with these words and opens its page."""
    import gradio

    served, asked = [], []
    contacted.clear()
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda page: served.append(page))  # it would wait for Ctrl-C
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    context.on("request", lambda request: asked.append(urlsplit(request.url)))

    def open_page(system, *words):
        assert system.main(["demo", *map(str, words)]) == 0
        page = context.new_page()
        page.goto(served[-1].local_url)
        return Visitor(page)

    yield open_page
    context.close()
    for page in served:
        page.close()
    assert {url.hostname for url in asked if url.scheme not in ("data", "blob")} == {"127.0.0.1"}
    assert "127.0.0.1" in contacted and contacted <= {"127.0.0.1", "localhost", "None"}


def save(path, system, model, config, **header):
    common.save_tensors(path, model.state_dict(), {"system": system, "config": vars(config), **header})
    return path


def test_jit_lab_s_page(visit, tmp_path, folder):
    config = jit_lab.Config(**TINY, data=("gone",))
    path = save(tmp_path / "jit.safetensors", "jit_lab", random_weights(jit_lab.build_model(config)), config)
    model, config = jit_lab.load_model(path, "cpu")
    page = visit(jit_lab, "--weights", path, "--data", folder)
    page.shows(jit_lab.sample(model, config, 9, 20), 0)  # before any button is pressed

    page.set(seed=5, steps=3)
    page.press("Sample")
    for panel in (0, 1):
        page.shows(jit_lab.sample(model, config, 9, 3, 5), panel)
    page.set(frame=0)
    noise = common.noise_for(range(5, 14), (3, 16, 16), "cpu") * jit_lab.noise_scale(config, "cpu")
    with torch.no_grad():
        x_hat = model(noise, 0.0, torch.zeros(9, dtype=torch.long))
    page.shows(jit_lab.to_rgb(config, noise), 0)
    page.shows(jit_lab.to_rgb(config, x_hat), 1)
    assert page.caption() == "step 0, t = 0.00"

    page.page.get_by_role("tab", name="Few steps").click()
    page.set(seed=2, steps=1)
    page.press("Few steps")
    page.shows(jit_lab.sample(model, config, 4, 50, 2), 1)
    page.shows(jit_lab.sample(model, config, 4, 1, 2), 0)

    page.page.get_by_role("tab", name="Morph").click()
    page.set(seed=3, steps=2)
    page.set(**{"other seed": 8})
    page.press("Morph")
    page.shows(jit_lab.sample(model, config, 1, 2, 8))
    page.until(lambda: page.caption() == "90 of 90 degrees")
    page.set(frame=0)
    page.shows(jit_lab.sample(model, config, 1, 2, 3))

    page.page.get_by_role("tab", name="nearest").click()
    page.press("nearest")
    data, rgb = common.load_pictures((str(folder),), 16).pictures / 255, jit_lab.sample(model, config, 9, 20)
    features = jit_lab.pixel_features(data), jit_lab.pixel_features(rgb)
    index = [min(range(len(data)), key=lambda k: (features[0][k] - own).square().sum()) for own in features[1]]
    page.shows(data[index], 1)
    page.shows(rgb, 0)


def test_dit_t2i_s_page(visit, tmp_path, capsys):
    config = dit_t2i.Config(image_size=16, patch_size=4, depth=2, num_heads=2, head_dim=8, text_dim=16, cfg=2.0)
    header = {"latent": [3, 16], "vae": None, "text": {"words": ["blue", "car", "red"], "length": 4}}
    model = random_weights(dit_t2i.build_model(config, (3, 16), 3))
    path = save(tmp_path / "dit.safetensors", "dit_t2i", model, config, **header)
    model, config = dit_t2i.load_model(path, "cpu")

    precision = common.pick_precision("auto", torch.device("cpu"))

    def sample(prompt, **settings):
        settings = dict(steps=4, cfg=5.0, seed=7, precision=precision) | settings
        return dit_t2i.sample(model, config, [prompt], **settings)

    page = visit(dit_t2i, "--weights", path)
    page.shows(sample("a red car", steps=28, cfg=2.0, seed=0), 0)
    assert "3 words" in page.page.locator("summary").inner_text()
    page.set(steps=4, guidance=5, seed=7)
    prompt = page.page.get_by_label("prompt")
    prompt.fill("a blue car")
    page.press("Sample")
    for panel in (0, 1):
        page.shows(sample("a blue car"), panel)
    page.set(frame=0)
    page.shows(common.noise_for([7], (3, 16, 16), "cpu") / 2 + 0.5, 0)
    page.page.get_by_text("dpm").click()
    page.press("Sample")
    page.shows(sample("a blue car", solver="dpm"), 0)

    prompt.fill("a red zebra")
    page.press("Sample")
    page.shows(sample("a red", solver="dpm"), 0)
    page.until(lambda: page.caption() == "step 4, t = 0.00; unknown word 'zebra'")
    prompt.fill("a zebra")
    page.press("Sample")
    capsys.readouterr()
    assert dit_t2i.main(["sample", "a zebra", "--weights", str(path)]) == 2
    line = capsys.readouterr().err.strip()
    page.until(lambda: page.caption() == line)


def test_unet_ddpm_s_page(visit, tmp_path):
    sizes = dict(image_size=16, fold=2, model_channels=32, attention_resolutions=(4,), num_head_channels=16)
    header = {"latent": [12, 8], "vae": None, "data": [1], "range": 1.0, "left_out": []}
    paths, models = [], []
    for objective in ("flow", "ddpm"):
        config = unet_ddpm.Config(**sizes, objective=objective)
        model = random_weights(unet_ddpm.build_model(config, 12, 8), 0.05)
        paths.append(save(tmp_path / f"{objective}.safetensors", "unet_ddpm", model, config, **header))
        models.append(unet_ddpm.load_model(paths[-1]))
    page = visit(unet_ddpm, "--weights", *paths)
    for panel, model in enumerate(models):
        page.shows(unet_ddpm.sample(*model, 9, 10), panel)
    page.set(seed=4, steps=2)
    page.press("Sample")
    for panel, model in enumerate(models):
        page.shows(unet_ddpm.sample(*model, 9, 2, 4), panel)
    page.set(frame=0)
    noise = common.noise_for(range(4, 13), (12, 8, 8), "cpu")
    for panel, (_, config) in enumerate(models):
        page.shows(unet_ddpm.to_rgb(config, noise), panel)  # both start from the same

    page = visit(unet_ddpm, "--weights", paths[1])
    page.shows(unet_ddpm.sample(*models[1], 9, 10))
    assert "unet_ddpm.py compare" in page.page.locator(".prose").first.inner_text()


def test_serpentine_vae_s_page(visit, tmp_path):
    sizes = dict(image_size=32, vae_width=8, channels=4, width=16, depth=1, known_prob=0.5)
    config = serpentine_vae.Config(**sizes)
    model = serpentine_vae.LatentDiffusion(serpentine_vae.build_vae(config), serpentine_vae.build_denoiser(config), 3.0)
    path = save(tmp_path / "serp.safetensors", "serpentine_vae", random_weights(model), config, range=3.0)
    page = visit(serpentine_vae, "--weights", path)
    canvas = page.page.locator("canvas").first

    def red():
        """The part of the editor that is painted over."""
        pixels = np.asarray(Image.open(io.BytesIO(canvas.screenshot()))).astype(int)
        return (abs(pixels[..., :3] - (0xE0, 0x26, 0x2B)).max(axis=2) < 8).mean()

    def paint():
        """Two strokes from top to bottom, over about the columns 16 to 26 of 32; what is red afterwards."""
        box, mouse = canvas.bounding_box(), page.page.mouse
        for part in (0.6, 0.7):
            x = box["x"] + part * box["width"]
            mouse.move(x, box["y"] + 0.1 * box["height"])
            mouse.down()
            mouse.move(x, box["y"] + 0.9 * box["height"], steps=3)
            mouse.up()
        return red()

    def make(seed):
        """The result for a seed as (32, 32, 3)."""
        before = page.picture()
        page.set(seed=seed, steps=2)
        page.press("Inpaint")
        page.until(lambda: page.caption() == "step 2" and (page.picture() != before).any())
        return page.picture()[7::15, 7::15]

    page.until(lambda: red() > 0.05)  # what the page has painted
    page.page.locator(".gallery-item").nth(3).click()
    page.until(lambda: red() < 0.01)
    page.press("Inpaint")
    page.until(lambda: page.caption().startswith("error: the mask keeps everything"))

    page.until(lambda: paint() > 0.2)
    face = np.asarray(common.paint_face(1_000_000, 32)[0]).astype(float)
    results = [make(seed) for seed in (1, 2)]
    columns = abs(results[0] - face).mean(axis=(0, 2))  # how much has changed, from left to right
    assert columns[:15].max() < 10 and columns[28:].max() < 10 and columns[18:26].min() > 15
    fresh = (results[0] != results[1]).any(axis=(0, 2)).nonzero()[0]  # what depends on the seed
    assert fresh.min() >= 15 and fresh.max() <= 27 and len(fresh) > 8
    page.page.get_by_text("is kept").click()
    columns = abs(make(3) - face).mean(axis=(0, 2))
    assert columns[:12].min() > 15 and columns[18:26].max() < 10


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.__name__)
def test_without_gradio_a_line_names_the_package(system, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert system.main(["demo"]) == 2
    assert capsys.readouterr().err == "error: the page needs gradio: pip install gradio\n"


@pytest.mark.parametrize("solver", common.SOLVERS)
def test_a_frame_s_predicted_data_are_those_of_the_velocity(solver):
    data, noise = torch.ones(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    times = [0.0, 0.1, 0.5, 1.0]  # t = 1: data

    def run(callback):
        common.SOLVERS[solver](lambda x, t: (data - x) / (1 - t), noise, times, callback)

    frames = list(common.flow_frames(run, 1.0, lambda x: x, ["a note"]))
    assert [line for *_, line in frames] == [f"step {i}, t = {t:.2f}; a note" for i, t in enumerate(times)]
    for (x_t, x_hat, _), t in zip(frames, times):
        torch.testing.assert_close(x_t, (1 - t) * noise + t * data)
        torch.testing.assert_close(x_hat, data)


def test_states_come_while_a_run_goes_on_and_its_mistake_is_raised():
    shown = threading.Event()

    def run(callback):
        callback(1, 0.0)
        assert shown.wait(60)  # only if the first state was shown before
        raise common.UserError("wrong")

    states = common.stream(run)
    assert next(states) == (1, 0.0)
    shown.set()
    with pytest.raises(common.UserError, match="wrong"):
        next(states)
