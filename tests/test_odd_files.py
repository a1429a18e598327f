"""What people's real files and days do to the program: each test is a fault that users of such tools have reported."""

import contextlib
import io
import json
import math
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
import unicodedata

import pytest
import torch
import toy
from conftest import ENVIRONMENT, ROOT
from PIL import Image, ImageCms
from safetensors.torch import save_file

import common
import dit_t2i
import jit_lab
from common import AutoencoderKL, UserError

TINY = (
    "--image-size 16 --patch-size 4 --hidden-size 32 --depth 1 --num-heads 2 --bottleneck-dim 8 --batch-size 4".split()
)
TINY += ["--device", "cpu", "--no-compile"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def paint(*names, color="red", **options):
    for name in names:
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        Image.new("RGB", (32, 32), color).save(name, **options)


# ---- pictures ----


def wide_gamut():
    """sRGB's profile with Adobe RGB's primaries."""
    raw = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    adobe = {
        b"rXYZ": (0.60974, 0.31111, 0.01947),
        b"gXYZ": (0.20528, 0.62567, 0.06087),
        b"bXYZ": (0.14919, 0.06322, 0.74457),
    }
    for i in range(struct.unpack(">I", raw[128:132])[0]):
        tag, offset, _ = struct.unpack(">4sII", raw[132 + 12 * i : 144 + 12 * i])
        if tag in adobe:
            raw[offset + 8 : offset + 20] = b"".join(struct.pack(">i", round(x * 65536)) for x in adobe[tag])
    return bytes(raw)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_profiles_are_applied(folder, mode):
    profile, plain = wide_gamut(), Image.new("RGB", (8, 8), (60, 180, 90))
    expected = ImageCms.profileToProfile(plain, io.BytesIO(profile), ImageCms.createProfile("sRGB")).getpixel((1, 1))
    assert expected != plain.getpixel((1, 1))
    picture = plain.quantize() if mode == "P" else plain.convert(mode)
    picture.save("a.png", icc_profile=profile)
    assert max(abs(a - b) for a, b in zip(common.open_picture("a.png").getpixel((1, 1)), expected)) <= 3
    plain.save("broken.png", icc_profile=b"no profile")
    assert common.open_picture("broken.png").getpixel((1, 1)) == (60, 180, 90)


def test_rare_suffixes_are_read_hidden_files_left_out_and_postscript_never_opened(folder, monkeypatch):
    paint("a.png", "b.bmp", ".hidden.png", ".ipynb_checkpoints/c.png", "sub/.d/e.png")
    paint("f.jfif", "g.jpe", format="JPEG")
    (folder / "h.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    (folder / "i.psd").write_bytes(b"8BPS")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a: pytest.fail("Ghostscript was started"))
    pictures = common.load_pictures(["."], 8)
    assert pictures.names == ["a.png", "b.bmp", "f.jfif", "g.jpe"]
    assert sorted(line.split(":")[0] for line in pictures.skipped) == ["h.png", "i.psd"]


# ---- captions ----


def test_captions_reach_pictures_whose_names_are_spelled_otherwise(folder, capsys):
    composed, decomposed = (unicodedata.normalize(form, "\u00e9.png") for form in ("NFC", "NFD"))
    paint("0.png", "sub/1.png", "2.PNG", decomposed, "a/twice.png", "b/twice.png", "5.png")
    named = ["0.png", "sub\\1.png", "2.png", composed, "twice.png", str(folder / "5.png"), "train/missing.png"]
    rows = [{"file_name": name, "description": f"picture {n}", "tags": ["red"]} for n, name in enumerate(named)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pictures = common.load_pictures(["."], 8)
    captions = dict(zip(pictures.names, pictures.captions))
    assert [captions[name] for name in ("0.png", "sub/1.png", "2.PNG", decomposed, "5.png")] == [
        f"picture {n}" for n in (0, 1, 2, 3, 5)
    ]
    assert captions["a/twice.png"] == captions["b/twice.png"] == ""
    assert "2 rows of metadata match no picture, such as twice.png, which is not there" in capsys.readouterr().out


def test_fields_that_are_missing_are_named_beside_those_there_are(folder):
    paint("0.png", "1.png", "2.png")
    rows = [{"file_name": f"{n}.png", "alt": "a red square", "hash": 7} for n in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = dit_t2i.Config(data=(".",), image_size=8, patch_size=4)
    with pytest.raises(UserError, match=r"under text, caption, prompt, description \(found: alt, file_name, hash\)"):
        dit_t2i.TrainingData(config, torch.device("cpu"), "fp32")
    (folder / "metadata.jsonl").write_text('{"image": "0.png"}')
    with pytest.raises(UserError, match="no file_name among image"):
        common.load_pictures(["."], 8)
    (folder / "rows.jsonl").write_text('{"link": "http://h/0.png", "alt": "red"}\n' * 3)
    with pytest.raises(
        UserError, match=r"no row of rows.jsonl can be used: no text, caption or prompt among link, alt"
    ):
        dit_t2i.Stream(dit_t2i.Config(stream="rows.jsonl", steps=1))
    with tarfile.open("a.tar", "w") as file:
        (folder / "0.json").write_text('{"alt": "a red square"}')
        file.add("0.png")
        file.add("0.json")
    with pytest.raises(UserError, match="no text, caption or prompt among alt, picture"):
        dit_t2i.Stream(dit_t2i.Config(stream="*.tar", steps=1))


def test_pictures_within_a_parquet_file_can_be_streamed(folder):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    paint("0.png")
    image = {"bytes": (folder / "0.png").read_bytes(), "path": "0.png"}
    table = pyarrow.table({"image": [image] * 3, "text": ["a red square"] * 3})
    parquet.write_table(table, "a.parquet")
    data = dit_t2i.Stream(dit_t2i.Config(stream="*.parquet", image_size=8, steps=1))
    assert data.prefetch(3) and data.counts == {"fetched": 3}
    data.close()


def test_an_empty_data_option_is_not_the_current_folder(folder):
    paint("0.png")
    with pytest.raises(UserError, match="no such folder"):
        common.load_pictures([""], 8)


def test_of_a_few_pictures_one_keeps_its_colour(folder):
    paint("0.png", "1.png", "2.png")
    data, _ = jit_lab.load_data(jit_lab.Config(data=(".",), image_size=16), "cpu")
    assert data.in_color.sum() == 1
    data, _ = jit_lab.load_data(jit_lab.Config(data=(".",), image_size=16, color_fraction=0.0), "cpu")
    assert data.in_color.sum() == 0


# ---- weights ----


def test_prefixes_of_wrappers_are_taken_off(folder):
    weights = {"a.weight": torch.ones(2), "b": torch.zeros(1)}
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod."):
        save_file({prefix + name: tensor for name, tensor in weights.items()}, "w.safetensors", {"config": "not JSON"})
        assert common.load_tensors("w.safetensors")[0].keys() == weights.keys()
    torch.save({"model_ema1": {"module." + k: v for k, v in weights.items()}, "epoch": 3}, "w.PTH")
    assert common.load_tensors("w.PTH")[0]["model_ema1"].keys() == weights.keys()


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin"])
def test_variants_of_a_vae_load_with_the_scale_of_their_configuration(folder, name):
    weights = {k: v.half() for k, v in AutoencoderKL(widths=(32,) * 4).state_dict().items()}
    (folder / name).parent.mkdir(exist_ok=True)
    torch.save(weights, name) if name.endswith("bin") else save_file(weights, name)
    assert common.load_vae(".").scale == 0.18215
    (folder / name).with_name("config.json").write_text('{"scaling_factor": 0.13025, "shift_factor": 0.5}')
    vae = common.load_vae(".")
    latent = torch.tensor([1.5])
    assert torch.allclose(vae.normalise(latent), torch.tensor([0.13025]))
    assert torch.allclose(vae.normalise(vae.normalise(latent), inverse=True), latent)


def test_an_autoencoder_never_overflows_in_fp16():
    vae, x = AutoencoderKL(widths=(32,) * 4).eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1e6)
        expected = vae.encode(x)
        with common.autocast(torch.device("cpu"), "fp16"):
            assert torch.equal(vae.encode(x), expected) and expected.isfinite().all()


def test_latents_and_samples_that_are_not_finite_are_named(folder):
    header = {"source": [], "rows": [["a.png", "", []], ["b.png", "", []]], "skipped": []}
    common.save_tensors("s/shard_00000.safetensors", {"latents": torch.tensor([[1.0], [math.nan]])}, header)
    paint("d/0.png", "d/1.png")
    config = common.EncodeConfig(data=("d",), out="t", image_size=8)
    with pytest.raises(UserError, match=r"1\.png: its latent is not finite"):
        common.write_shards(config, {}, lambda x, rows: {"latents": x / torch.tensor([1, 0]).view(2, 1, 1, 1) * 0})
    shards = common.Shards("s", ("latents",))
    assert shards.read([0])[0].item() == 1
    with pytest.raises(UserError, match=r"latent of b.png is not finite"):
        shards.read([0, 1])
    with pytest.raises(UserError, match="not finite"):
        common.write_samples(torch.full((1, 3, 8, 8), math.nan), ["a"], common.SampleConfig(out="o.png"))
    assert not (folder / "o.png").exists()


def test_shards_of_pictures_that_were_edited_are_refused(folder):
    paint("d/0.bmp", "d/1.bmp")
    config = common.EncodeConfig(data=("d",), out="s", image_size=8)
    encode = lambda pictures, rows: {"latents": pictures}  # noqa: E731
    assert common.write_shards(config, {}, encode) == common.write_shards(config, {}, encode) == (2, [])
    os.utime("d/1.bmp", (1, 1))  # the same size, another time
    with pytest.raises(
        UserError, match=r"other pictures or settings; delete it or name another --out \(1.bmp differs\)"
    ):
        common.write_shards(config, {}, encode)


# ---- the terminal ----


def test_names_are_printed_with_escapes(folder, capsys):
    paint("0.png")
    (folder / "a\n\x1b]0;title\x07\x1b[31m.png").write_text("no picture")
    (folder / os.fsdecode(b"\xff.png")).write_text("no picture")
    assert jit_lab.main(["train", "--data", ".", "--out", "run", "--steps", "1", *TINY]) == 0
    out = capsys.readouterr().out
    assert (
        "skipped 2 pictures: a\\n\\x1b]0;title\\x07\\x1b[31m.png" in out and "\\udcff.png" in out and "\x1b" not in out
    )
    save_file({"a": torch.zeros(1)}, "x.safetensors", {"config": json.dumps({"system": "\x1b[31m\nall is well"})})
    assert jit_lab.main(["sample", "--weights", "x.safetensors"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_console_of_few_characters_is_enough(folder):
    paint("0.png")
    (folder / "\u732b.png").write_text("no picture")
    words = [sys.executable, str(ROOT / "jit_lab.py"), "train", "--data", ".", "--out", "run", "--steps", "1", *TINY]
    done = subprocess.run(words, env=ENVIRONMENT | {"PYTHONIOENCODING": "cp1252"}, capture_output=True)
    assert done.returncode == 0 and b"skipped 1 pictures: \\u732b.png" in done.stdout


# ---- a run's life ----


@pytest.fixture
def run(folder):
    """Train the toy; returns the exit code."""

    def train(**changes):
        options = dict(minutes=None, steps=4, device="cpu", precision="fp32", out="run") | changes
        return toy.train(toy.Config(**options))

    return train


def test_what_a_killed_run_left_is_removed(run, folder):
    run()
    for name in (".state.safetensors.part", ".tmp1a2b3c"):
        (folder / "run" / name).write_text("half a checkpoint")
    run(steps=5, resume="")
    assert not any(path.name.startswith((".tmp", ".state")) for path in (folder / "run").iterdir())


def test_damaged_lines_of_the_log_are_left_out(run, folder):
    run(steps=10)
    log = (folder / "run" / "log.csv").read_bytes()
    damaged = [
        b"\r\n" + log,
        b"\xff\xfe" + log,
        log + b"\0" * 40 + b",,,,\n",
        log + b"abc,1,2\n",
        log + b"2,1,8,x,4,5,6" + b"," * 8,
    ]
    for n, content in enumerate(damaged):
        (folder / "run" / "log.csv").write_bytes(content)
        assert run(steps=20 + 10 * n, resume="") == 0
    steps = [int(row["step"]) for row in common.read_log(folder / "run")]
    assert steps == [10, 60]  # the log of the first ten steps, and the lines since the last damage


def test_a_damaged_checkpoint_is_one_line(run):
    run()
    tensors, header = common.load_tensors("run/state.safetensors")
    for key, value in dict(step="x", images=None, seconds=[], config=[1], best={}).items():
        common.save_tensors("run/state.safetensors", tensors, header | {key: value})
        with pytest.raises(UserError, match=r"run.state.safetensors is not a readable checkpoint"):
            run(steps=6, resume="")
    common.save_tensors("run/state.safetensors", tensors, header | {"step": -1})
    with pytest.raises(UserError, match="step -1"):
        run(steps=6, resume="")
    common.save_tensors("run/state.safetensors", {k.replace(":exp_avg", ":exp"): v for k, v in tensors.items()}, header)
    with pytest.raises(UserError, match="exp_avg"):
        run(steps=6, resume="")


def test_a_checkpoint_of_absurd_sizes_is_one_line(folder):
    config = vars(jit_lab.Config()) | {"depth": 10**9}
    save_file({"a": torch.zeros(1)}, "x.safetensors", {"config": json.dumps({"system": "jit_lab", "config": config})})
    with pytest.raises(UserError):
        jit_lab.load_model("x.safetensors", "cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no signal for the death of a parent")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_that_paint_end_with_the_run(folder, number):
    words = [sys.executable, str(ROOT / "jit_lab.py"), "train", "--image-size", "80", "--steps", "2", "--out", "run"]
    run = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def children():
        with contextlib.suppress(OSError):
            return open(f"/proc/{run.pid}/task/{run.pid}/children").read().split()
        return []

    deadline = time.monotonic() + 60
    while not (painters := children()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)
    run.send_signal(number)
    run.wait()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in painters):
        assert time.monotonic() < deadline, "a painting process outlived its run"
        time.sleep(0.1)
