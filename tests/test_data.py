"""Pictures in and out: one reader for folders, .tar and .parquet files, shards of latents, painted pictures, charts.

Odd files are those that users of such tools have reported."""

import csv
import dataclasses
import io
import json
import math
import os
import tarfile
import unicodedata

import common
import dit_t2i
import jit_lab
from common import UserError

import numpy as np
import pyarrow.parquet
import pytest
import torch
import webdataset
from conftest import TINY
from PIL import Image, ImageCms, ImageSequence

# ---- one reader ----


@pytest.fixture
def records():
    """Twelve pictures with captions and tags: (name, bytes of a .png, caption, tags)."""
    result = []
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 6, 10, 3), dtype=np.uint8)):
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        result.append((f"{i:02d}.png", data.getvalue(), f'picture {i}, "wide"', ["noise", f"number {i}"]))
    return result


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def paint(*names, color="red", mode="RGB", size=(20, 20), **options):
    for name in names:
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        Image.new(mode, size, color).save(name, **options)


def write_metadata(*rows):
    with open("metadata.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_folder(path, records):
    path.mkdir()
    for name, data, *_ in records:
        (path / name).write_bytes(data)
    return path


def write_jsonl(path, records):
    lines = [json.dumps({"file_name": name, "text": text, "tags": tags}) for name, _, text, tags in records]
    (write_folder(path, records) / "metadata.jsonl").write_text("\n".join(lines))


def write_csv(path, records):
    with open(write_folder(path, records) / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:
        rows = [(name, text, ", ".join(tags)) for name, _, text, tags in records]
        csv.writer(file).writerows([("file_name", "caption", "tags"), *rows])


def write_tar(path, records):
    with webdataset.TarWriter(str(path)) as file:
        for name, data, text, tags in records:
            file.write({"__key__": name[:2], "png": data, "json": {"tags": tags}, "txt": text})


def write_parquet(path, records):
    """As the package `datasets` does."""
    rows = [{"image": {"bytes": data, "path": name}, "text": text, "tags": tags} for name, data, text, tags in records]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_every_kind_of_data_gives_the_same_pictures_and_words(folder, records):
    write_jsonl(folder / "jsonl", records)
    write_csv(folder / "csv", records)
    write_tar("a.tar", records)
    write_parquet("a.parquet", records)
    first, *others = (common.load_pictures([name], 6) for name in ("jsonl", "csv", "a.tar", "a.parquet"))
    assert first.names == [r[0] for r in records] and first.captions == [r[2] for r in records]
    assert first.tags == [r[3] for r in records] and not first.skipped
    pixels = np.asarray(Image.open(io.BytesIO(records[5][1])))
    assert np.array_equal(first.pictures[5].permute(1, 2, 0), pixels[:, 2:8])  # the centre square
    for other in others:
        assert torch.equal(other.pictures, first.pictures) and other.checksum() == first.checksum()
        assert (other.names, other.captions, other.tags) == (first.names, first.captions, first.tags)
    both = common.load_pictures(["jsonl", "a.tar"], 6)
    assert both.names == 2 * first.names and both.checksum() != first.checksum()
    part = common.load_pictures(["jsonl"], 6, first=2)  # --num-samples 2
    assert part.names == first.names[:2] and torch.equal(part.pictures, first.pictures[:2])


def test_captions_reach_pictures_from_files_beside_them_and_by_names_that_are_spelled_otherwise(folder, capsys):
    composed, decomposed = (unicodedata.normalize(form, "\u00e9.png") for form in ("NFC", "NFD"))
    names = ["0.png", "sub/1.png", "2.PNG", decomposed, "5.png"]
    paint(*names, "a/twice.png", "b/twice.png", "6.png", "7.png")
    (folder / "6.txt").write_text(" beside\n")
    (folder / "7.caption").write_text("beside, too")
    rows = ["0.png", "sub\\1.png", "2.png", composed, str(folder / "5.png"), "twice.png", "train/missing.png"]
    write_metadata(*({"file_name": name, "description": f"picture {n}"} for n, name in enumerate(rows)))
    pictures = common.load_pictures(["."], 8)
    captions = dict(zip(pictures.names, pictures.captions))
    assert [captions[name] for name in names] == [f"picture {n}" for n in range(5)]
    assert captions["a/twice.png"] == captions["b/twice.png"] == ""
    assert (captions["6.png"], captions["7.png"]) == ("beside", "beside, too")
    assert "2 rows of metadata match no picture, such as twice.png, which is not there" in capsys.readouterr().out


def test_fields_that_may_hold_a_caption_are_named_if_there_is_none():
    paint("0.png", "1.png", "2.png")
    write_metadata(*({"file_name": f"{n}.png", "alt": "a red square", "hash": 7} for n in range(3)))
    config = dit_t2i.Config(data=(".",), image_size=8, patch_size=4)
    with pytest.raises(UserError, match="under text, caption, prompt, description, or beside"):
        dit_t2i.TrainingData(config, torch.device("cpu"), "fp32")


def test_samples_of_a_tar_file_are_the_members_that_share_a_name(records):
    with tarfile.open("a.tar", "w") as file:
        for name, data in [
            ("./x/0001.json", b'{"prompt": "one"}'),
            ("./x/0001.seg.png", records[0][1]),  # not the picture: its kind is seg.png
            ("./x/0001.PNG", records[1][1]),
            ("./y/0001.png", records[2][1]),
            ("./y/0002.txt", b"a caption without a picture"),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    pictures = common.load_pictures(["a.tar"], 6)
    assert pictures.names == ["./x/0001.PNG", "./y/0001.png"] and pictures.captions == ["one", ""]
    assert np.array_equal(pictures.pictures[1].permute(1, 2, 0), common.read_picture(records[2][1], 6))


def test_odd_pictures_are_read_or_skipped_and_named_and_hidden_ones_left_out(folder, monkeypatch):
    paint("a.png", ".hidden.png", ".ipynb_checkpoints/c.png", "sub/.d/e.png")
    data = (folder / "a.png").read_bytes()
    (folder / "misnamed.jpg").write_bytes(data)
    paint("b.bmp", color="blue")
    paint("f.jfif", "g.jpe", color="blue", format="JPEG")
    paint("hurt.jpg", color="blue", dpi=(72, 72), exif=b"Exif\0\0 no EXIF at all")
    paint("cmyk.jpg", mode="CMYK", color=(0, 255, 255, 0))
    paint("palette.png", mode="P", color=0)
    paint("clear.png", mode="RGBA", color=(0, 0, 0, 0))
    paint("moving.gif", save_all=True, append_images=[Image.new("RGB", (20, 20), "blue")])
    paint("wide.png", color="lime", size=(60, 20))
    Image.fromarray(np.full((20, 20), 32768, np.uint16)).save("deep.png")
    turned = Image.new("L", (20, 20))
    turned.paste(255, (0, 0, 20, 10))  # white above; to be turned by 180 degrees
    orientation = Image.Exif()
    orientation[0x0112] = 3
    turned.save("turned.png", exif=orientation)
    paint("bomb.png", mode="1", color=0, size=(9000, 9000))
    broken = {"empty.png": b"", "h.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"}
    broken |= {"i.psd": b"8BPS", "sub/truncated.png": data[:50], "text.jpg": b"not a picture"}
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a: pytest.fail("Ghostscript was started"))

    pictures = common.load_pictures(["."], 8)
    middle = {name: picture[:, 4, 4].tolist() for name, picture in zip(pictures.names, pictures.pictures)}
    assert middle["a.png"] == middle["misnamed.jpg"] == [255, 0, 0]
    assert middle["clear.png"] == [255, 255, 255] and middle["wide.png"] == [0, 255, 0]
    assert middle["moving.gif"][0] > 200 and middle["moving.gif"][2] < 50  # the first frame
    assert np.abs(np.subtract(middle["cmyk.jpg"], [255, 0, 0])).max() < 10
    assert all(middle[name][2] > 200 for name in ("b.bmp", "f.jfif", "g.jpe", "hurt.jpg"))
    assert middle["palette.png"] == [0, 0, 0] and middle["deep.png"] == [128, 128, 128]
    corner = pictures.pictures[pictures.names.index("turned.png"), :, 0, 0]
    assert corner.tolist() == [0, 0, 0] and len(pictures) == 13
    assert [line.split(":")[0] for line in pictures.skipped] == ["bomb.png", *broken]
    assert "9000 x 9000 pixels are too many" in pictures.skipped[0]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_profiles_are_applied(mode):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for a, b in ((b"rXYZ", b"swap"), (b"gXYZ", b"rXYZ"), (b"swap", b"gXYZ")):  # red for green
        profile = profile.replace(a, b)
    plain = Image.new("RGB", (8, 8), (60, 180, 90))
    expected = ImageCms.profileToProfile(plain, io.BytesIO(profile), ImageCms.createProfile("sRGB")).getpixel((1, 1))
    assert expected != plain.getpixel((1, 1))
    picture = plain.quantize() if mode == "P" else plain.convert(mode)
    picture.save("a.png", icc_profile=profile)
    assert max(abs(a - b) for a, b in zip(common.open_picture("a.png").getpixel((1, 1)), expected)) <= 3
    plain.save("broken.png", icc_profile=b"no profile")
    assert common.open_picture("broken.png").getpixel((1, 1)) == (60, 180, 90)


def test_data_that_is_none_is_one_line(folder, records):
    write_folder(folder / "empty", [])
    (write_folder(folder / "broken", []) / "a.png").touch()
    (write_folder(folder / "table", records) / "metadata.csv").write_text("name,text\n00.png,one\n")
    write_tar("cut.tar", records)
    (folder / "cut.tar").write_bytes((folder / "cut.tar").read_bytes()[:1500])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"label": 1}]), "labels.parquet")
    for name, message in [
        ("missing", "missing: no such folder, .tar or .parquet file"),
        ("", "no such folder"),  # nor is it the current folder, in which there are pictures
        ("empty", "empty: it holds no pictures"),
        ("broken", r"broken: 1 files could not be read, such as a.png: "),
        ("table", r"metadata.csv is not a readable table of pictures.* \(no file_name among name, text\)"),
        ("cut.tar", "cut.tar is not a readable file of pictures"),
        ("labels.parquet", r"labels.parquet is not a readable .* \(no column of pictures among label\)"),
    ]:
        with pytest.raises(UserError, match=message) as problem:
            common.load_pictures([name], 8)
        assert "\n" not in str(problem.value)


def test_of_a_few_pictures_one_keeps_its_colour():
    paint("0.png", "1.png", "2.png")
    for fraction, count in ((0.1, 1), (0.0, 0)):
        config = jit_lab.Config(data=(".",), image_size=16, color_fraction=fraction)
        assert jit_lab.load_data(config, "cpu")[0].in_color.sum() == count


# ---- order ----


def test_every_epoch_is_a_new_permutation_and_a_function_of_the_step():
    config = common.TrainConfig(batch_size=4, seed=1)
    order = [i for step in range(15) for i in common.batch_index(config, 10, step)]
    epochs = [order[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) == 6
    assert common.batch_index(config, 10, 7) == order[28:32]
    assert common.batch_index(dataclasses.replace(config, seed=2), 10, 7) != order[28:32]


# ---- shards ----


def encode(pictures, rows):
    return {"latent": pictures.mean(dim=(2, 3)), "half": pictures[:, :, ::2, ::2]}


def test_encoding_goes_on_after_a_kill_and_gives_the_same_files(folder, records):
    broken = ("05.png", b"no picture", "", [])
    write_jsonl(folder / "data", [*records[:5], broken, *records[6:]])
    config = common.EncodeConfig(data=("data",), image_size=8, shard_size=5, batch_size=2)
    whole, parts = (dataclasses.replace(config, out=name) for name in ("whole", "parts"))
    extra = {"mean": torch.arange(3.0)}
    count, skipped = common.write_shards(whole, {"vae": "abc"}, encode, extra)
    assert count == 11 and [line.split(":")[0] for line in skipped] == ["05.png"]
    assert common.write_shards(dataclasses.replace(config, out="part", num_samples=2), {}, encode) == (2, [])

    calls = []

    def encode_until_killed(pictures, rows):
        calls.append(len(pictures))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode(pictures, rows)

    with pytest.raises(KeyboardInterrupt):
        common.write_shards(parts, {"vae": "abc"}, encode_until_killed, extra)
    assert calls == [2, 2, 1, 2, 2] and len(os.listdir("parts")) == 1
    assert common.write_shards(parts, {"vae": "abc"}, encode_until_killed, extra) == (count, skipped)
    for path in (folder / "whole").iterdir():
        assert path.read_bytes() == (folder / "parts" / path.name).read_bytes()

    assert common.has_shards([whole.out]) and not common.has_shards(config.data)
    shards = common.Shards(whole.out, ["latent", "half"])
    good = [record for i, record in enumerate(records) if i != 5]
    assert (shards.names, shards.captions, shards.tags) == tuple(map(list, zip(*((r[0], *r[2:]) for r in good))))
    assert (shards.header, len(shards), len(shards.skipped)) == ({"vae": "abc"}, 11, 1)
    latent, _ = shards.read([9, 0, 9])
    expected = torch.from_numpy(common.read_picture(good[9][1], 8) / 127.5 - 1).mean(dim=(0, 1))
    torch.testing.assert_close(latent[0].double(), expected, atol=1e-2, rtol=0)
    assert torch.equal(latent[0], latent[2]) and not torch.equal(latent[0], latent[1])
    assert torch.equal(shards.extra("mean"), extra["mean"])

    for header, change, named in [
        ({"vae": "other"}, lambda: None, ""),
        ({"vae": "abc"}, lambda: os.utime("data/00.png", (1, 1)), r" \(00.png differs\)"),  # edited, at the same size
        ({"vae": "abc"}, lambda: os.remove("data/00.png"), r" \(01.png differs\)"),
    ]:
        change()
        message = f"made from other pictures or settings; delete it or name another --out{named}$"
        with pytest.raises(UserError, match=message):
            common.write_shards(parts, header, encode, extra)


def test_shards_that_do_not_belong_together_are_refused(folder):
    def write(number, vae="abc"):
        header = {"vae": vae, "rows": [["a", "", []]] * 2, "skipped": [], "source": []}
        common.save_tensors(f"shard_{number:05d}.safetensors", {"latent": torch.ones(2, 3)}, header)

    write(0)
    write(1, vae="other")
    with pytest.raises(UserError, match="made with different settings"):
        common.Shards(folder, ["latent"])
    with pytest.raises(UserError, match=r"shard_00000.safetensors is not a readable shard with text"):
        common.Shards(folder, ["text"])


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


# ---- painted pictures ----


def test_painted_face_is_a_function_of_its_number():
    one, again = common.paint_face(3), common.paint_face(3)
    assert one[0].tobytes() == again[0].tobytes() and one[1:] == again[1:]
    faces = [common.paint_face(seed, 20) for seed in range(200)]
    assert len({picture.tobytes() for picture, *_ in faces}) == 200 and len({caption for _, caption, _ in faces}) > 190
    large, small = common.paint_face(11, 160)[0].reduce(4), common.paint_face(11, 40)[0]
    assert np.abs(np.asarray(small, int) - np.asarray(large, int)).mean() < 4


def test_painted_pictures_are_kept_and_painted_anew_when_the_tables_change(folder, monkeypatch):
    faces = common.load_pictures(("drawn",), 16, count=6)
    (kept,) = (folder / "data").iterdir()
    assert np.array_equal(faces.pictures[4].permute(1, 2, 0), np.asarray(common.paint_face(4, 16)[0]))
    assert (faces.captions[4], faces.tags[4]) == common.paint_face(4, 16)[1:] and len(faces) == 6
    stamp = kept.stat().st_mtime_ns
    again = common.load_pictures(("drawn",), 16, count=6)
    assert again.checksum() == faces.checksum() and kept.stat().st_mtime_ns == stamp
    monkeypatch.setattr(common, "picture_tables", lambda name, old=common.picture_tables: old(name) | {"new": 1})
    common.load_pictures(("drawn",), 16, count=6)
    assert len(os.listdir("data")) == 2


# ---- pictures out ----


def test_grid_holds_every_picture_in_its_place():
    rgb = torch.arange(5).view(5, 1, 1, 1).expand(5, 3, 4, 4) / 10
    sheet = np.asarray(common.make_grid(rgb))
    assert sheet.shape == (8, 12, 3) and np.asarray(common.make_grid(rgb, columns=5)).shape == (4, 20, 3)
    assert sheet[1::4, 1::4, 0].tolist() == [[0, 26, 51], [76, 102, 255]]


def test_samples_are_written_as_grid_single_pictures_and_animation():
    frames, callback = common.record_frames(lambda x: Image.new("L", (4, 4), int(x)))
    for step in range(51):
        callback(step, step / 50)
    config = common.SampleConfig(out="grid.png", each="each", gif="a.gif")
    common.write_samples(torch.rand(3, 3, 4, 4), ["000004", "000005", "000006"], config, frames)
    assert sorted(os.listdir("each")) == ["000004.png", "000005.png", "000006.png"]
    assert Image.open("grid.png").size == (8, 8)
    shown = [frame.convert("L").getpixel((0, 0)) for frame in ImageSequence.Iterator(Image.open("a.gif"))]
    assert shown == [0, 6, 12, 17, 23, 28, 34, 39, 45, 50]


def test_chart_puts_large_values_high_and_late_ones_right():
    image = np.asarray(common.chart("loss", {"loss": [(0, 1.0), (10, 0.1), (20, 0.01)]}), int)
    blue = (image - common.ImageColor.getrgb(common.CURVE_COLOURS[0])).any(axis=2) == 0
    rows, columns = np.nonzero(blue[:, : image.shape[1] - 130])
    heights = [rows[columns == x].mean() for x in np.linspace(columns.min() + 1, columns.max() - 1, 9).astype(int)]
    assert np.all(np.diff(heights) > 0) and np.ptp(np.diff(heights)) < 3  # downwards; straight on a logarithmic axis


def test_charts_with_the_same_axes_put_a_point_in_the_same_place_and_what_is_expected_behind():
    def places(colour, curves, **options):
        image = np.asarray(common.chart("loss", curves, **options), int)[36:, 57:-130]
        return set(zip(*np.nonzero((image == common.ImageColor.getrgb(colour)).all(axis=2))))

    whole, part = {"loss": [(0, 100.0), (10, 1.0), (20, 0.01)]}, {"loss": [(10, 1.0), (20, 0.01)]}
    blue, grey = common.CURVE_COLOURS[0], "#aaaaaa"
    assert 50 < len(places(blue, part, axes=whole)) < len(places(blue, whole))
    assert places(blue, part, axes=whole) < places(blue, whole) and not places(blue, part) < places(blue, whole)
    assert places(blue, whole | {"expected": whole["loss"]}) and not places(grey, whole | {"expected": whole["loss"]})
    assert places(grey, whole | {"expected": [(0, 1.0), (20, 1.0)]})


def test_bars_know_how_many_pictures_batches_and_steps_there_are(monkeypatch):
    bars = []
    monkeypatch.setattr(common, "tqdm", lambda items, what, **options: bars.append((what, len(items))) or items)
    paint(*(f"pictures/{i}.png" for i in range(7)))
    common.load_pictures(["pictures"], 16)
    common.load_pictures(["pictures"], 16, first=6)
    config = common.EncodeConfig(data=["pictures"], num_samples=5, out="shards", image_size=16)
    common.write_shards(config, {}, lambda pictures, rows: {"x": pictures})
    config = jit_lab.Config(**TINY)
    jit_lab.sample(jit_lab.build_model(config).eval(), config, num=5, steps=4, batch_size=2)
    assert bars == [("reading", 7), ("reading", 6), ("encoding", 5), ("batches", 3), *[("steps", 4)] * 3]
