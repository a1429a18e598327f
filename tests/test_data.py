"""Pictures in and out: one reader for folders, .tar and .parquet files, shards of latents, painted pictures, charts."""

import csv
import dataclasses
import io
import json
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import webdataset
from PIL import Image
from safetensors.torch import save_file

import common
from common import UserError

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


def test_every_kind_of_data_gives_the_same_pictures_and_words(tmp_path, records):
    write_jsonl(tmp_path / "jsonl", records)
    write_csv(tmp_path / "csv", records)
    write_tar(tmp_path / "a.tar", records)
    write_parquet(tmp_path / "a.parquet", records)
    first, *others = (common.load_pictures([str(tmp_path / n)], 6) for n in ("jsonl", "csv", "a.tar", "a.parquet"))
    assert first.names == [r[0] for r in records] and first.captions == [r[2] for r in records]
    assert first.tags == [r[3] for r in records] and not first.skipped
    pixels = np.asarray(Image.open(io.BytesIO(records[5][1])))
    assert np.array_equal(first.pictures[5].permute(1, 2, 0), pixels[:, 2:8])  # the centre square
    for other in others:
        assert torch.equal(other.pictures, first.pictures) and other.checksum() == first.checksum()
        assert (other.names, other.captions, other.tags) == (first.names, first.captions, first.tags)
    both = common.load_pictures([str(tmp_path / "jsonl"), str(tmp_path / "a.tar")], 6)
    assert both.names == 2 * first.names and both.checksum() != first.checksum()


def test_captions_stand_in_text_files_beside_the_pictures(tmp_path, records):
    write_folder(tmp_path / "data", records[:3])
    (tmp_path / "data" / "00.txt").write_text(" a caption\n")
    assert common.load_pictures([str(tmp_path / "data")], 6).captions == ["a caption", "", ""]


def test_samples_of_a_tar_file_are_the_members_that_share_a_name(tmp_path, records):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
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
    pictures = common.load_pictures([str(tmp_path / "a.tar")], 6)
    assert pictures.names == ["./x/0001.PNG", "./y/0001.png"] and pictures.captions == ["one", ""]
    assert np.array_equal(pictures.pictures[1].permute(1, 2, 0), common.read_picture(records[2][1], 6))


def test_odd_pictures_are_read_or_skipped_and_named(tmp_path):
    def save(name, mode="RGB", color=0, size=(20, 20), **options):
        Image.new(mode, size, color).save(tmp_path / name, **options)

    save("a.png", color="red")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "misnamed.jpg").write_bytes(data)
    save("cmyk.jpg", "CMYK", (0, 255, 255, 0))
    save("palette.png", "P")
    save("clear.png", "RGBA", (0, 0, 0, 0))
    save("moving.gif", color="red", save_all=True, append_images=[Image.new("RGB", (20, 20), "blue")])
    save("wide.png", color="lime", size=(60, 20))
    save("hurt.jpg", color="blue", dpi=(72, 72), exif=b"Exif\0\0 no EXIF at all")
    Image.fromarray(np.full((20, 20), 32768, np.uint16)).save(tmp_path / "deep.png")
    turned = Image.new("L", (20, 20))
    turned.paste(255, (0, 0, 20, 10))  # white above; to be turned by 180 degrees
    orientation = Image.Exif()
    orientation[0x0112] = 3
    turned.save(tmp_path / "turned.png", exif=orientation)
    save("bomb.png", "1", size=(9000, 9000))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "truncated.png").write_bytes(data[:50])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not a picture")

    pictures = common.load_pictures([str(tmp_path)], 8)
    middle = {name: picture[:, 4, 4].tolist() for name, picture in zip(pictures.names, pictures.pictures)}
    assert middle["a.png"] == middle["misnamed.jpg"] == [255, 0, 0]
    assert middle["clear.png"] == [255, 255, 255] and middle["wide.png"] == [0, 255, 0]
    assert middle["moving.gif"][0] > 200 and middle["moving.gif"][2] < 50  # the first frame
    assert np.abs(np.subtract(middle["cmyk.jpg"], [255, 0, 0])).max() < 10 and middle["hurt.jpg"][2] > 200
    assert middle["palette.png"] == [0, 0, 0] and middle["deep.png"] == [128, 128, 128]
    corner = pictures.pictures[pictures.names.index("turned.png"), :, 0, 0]
    assert corner.tolist() == [0, 0, 0] and len(pictures) == 10
    broken = ["bomb.png", "empty.png", "sub/truncated.png", "text.jpg"]
    assert [line.split(":")[0] for line in pictures.skipped] == broken
    assert "9000 x 9000 pixels are too many" in pictures.skipped[0]


def test_the_first_pictures_alone_can_be_taken(tmp_path, records):
    write_jsonl(tmp_path / "d", records)
    whole, part = (common.load_pictures([str(tmp_path / "d")], 8, first=first) for first in (None, 2))
    assert part.names == whole.names[:2] and torch.equal(part.pictures, whole.pictures[:2])
    config = common.EncodeConfig(data=(str(tmp_path / "d"),), out=str(tmp_path / "s"), image_size=8, num_samples=2)
    assert common.write_shards(config, {}, lambda pictures, rows: {"latents": pictures})[0] == 2


def test_data_that_is_none_is_one_line(tmp_path, records):
    write_folder(tmp_path / "empty", [])
    (write_folder(tmp_path / "broken", []) / "a.png").touch()
    (write_folder(tmp_path / "table", records) / "metadata.csv").write_text("name,text\n00.png,one\n")
    write_tar(tmp_path / "cut.tar", records)
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:1500])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"label": 1}]), tmp_path / "labels.parquet")
    for name, message in [
        ("missing", "missing: no such folder, .tar or .parquet file"),
        ("empty", "empty: it holds no pictures"),
        ("broken", r"broken: 1 files could not be read, such as a.png: "),
        ("table", "metadata.csv is not a readable table of pictures"),
        ("cut.tar", "cut.tar is not a readable file of pictures"),
        ("labels.parquet", r"labels.parquet is not a readable .* \(no column of pictures among label\)"),
    ]:
        with pytest.raises(UserError, match=message) as problem:
            common.load_pictures([str(tmp_path / name)], 8)
        assert "\n" not in str(problem.value)


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


def test_encoding_goes_on_after_a_kill_and_gives_the_same_files(tmp_path, records):
    broken = ("05.png", b"no picture", "", [])
    write_jsonl(tmp_path / "data", [*records[:5], broken, *records[6:]])
    config = common.EncodeConfig(data=(str(tmp_path / "data"),), image_size=8, shard_size=5, batch_size=2)
    whole, parts = (dataclasses.replace(config, out=str(tmp_path / name)) for name in ("whole", "parts"))
    extra = {"mean": torch.arange(3.0)}
    count, skipped = common.write_shards(whole, {"vae": "abc"}, encode, extra)
    assert count == 11 and [line.split(":")[0] for line in skipped] == ["05.png"]

    calls = []

    def encode_until_killed(pictures, rows):
        calls.append(len(pictures))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode(pictures, rows)

    with pytest.raises(KeyboardInterrupt):
        common.write_shards(parts, {"vae": "abc"}, encode_until_killed, extra)
    assert calls == [2, 2, 1, 2, 2] and len(list((tmp_path / "parts").iterdir())) == 1
    assert common.write_shards(parts, {"vae": "abc"}, encode_until_killed, extra) == (count, skipped)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()

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

    for header, change in [({"vae": "other"}, None), ({"vae": "abc"}, "06.png")]:
        if change:
            (tmp_path / "data" / change).unlink()
        with pytest.raises(UserError, match=r"made from other pictures or settings; delete it or name another --out"):
            common.write_shards(parts, header, encode, extra)


def test_shards_that_do_not_belong_together_are_refused(tmp_path):
    def write(number, vae="abc", rows=2):
        header = {"vae": vae, "rows": [["a", "", []]] * rows, "skipped": [], "source": []}
        common.save_tensors(tmp_path / f"shard_{number:05d}.safetensors", {"latent": torch.ones(2, 3)}, header)

    write(0)
    write(1, vae="other")
    with pytest.raises(UserError, match="made with different settings"):
        common.Shards(tmp_path, ["latent"])
    with pytest.raises(UserError, match=r"shard_00000.safetensors is not a readable shard with text"):
        common.Shards(tmp_path, ["text"])
    save_file({"a": torch.zeros(1)}, tmp_path / "shard_00000.safetensors")
    with pytest.raises(UserError, match="is not a readable shard"):
        common.Shards(tmp_path, ["latent"])


# ---- painted pictures ----


def test_painted_face_is_a_function_of_its_number():
    one, again = common.paint_face(3), common.paint_face(3)
    assert one[0].tobytes() == again[0].tobytes() and one[1:] == again[1:]
    faces = [common.paint_face(seed, 20) for seed in range(200)]
    assert len({picture.tobytes() for picture, *_ in faces}) == 200 and len({caption for _, caption, _ in faces}) > 190
    large, small = common.paint_face(11, 160)[0].reduce(4), common.paint_face(11, 40)[0]
    assert np.abs(np.asarray(small, int) - np.asarray(large, int)).mean() < 4


def test_painted_pictures_are_kept_and_painted_anew_when_the_tables_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    faces = common.load_pictures(("drawn",), 16, count=6)
    (kept,) = (tmp_path / "data").iterdir()
    assert np.array_equal(faces.pictures[4].permute(1, 2, 0), np.asarray(common.paint_face(4, 16)[0]))
    assert (faces.captions[4], faces.tags[4]) == common.paint_face(4, 16)[1:] and len(faces) == 6
    stamp = kept.stat().st_mtime_ns
    again = common.load_pictures(("drawn",), 16, count=6)
    assert again.checksum() == faces.checksum() and kept.stat().st_mtime_ns == stamp
    monkeypatch.setattr(common, "picture_tables", lambda name, old=common.picture_tables: old(name) | {"new": 1})
    common.load_pictures(("drawn",), 16, count=6)
    assert len(list((tmp_path / "data").iterdir())) == 2


# ---- pictures out ----


def test_grid_holds_every_picture_in_its_place():
    rgb = torch.arange(5).view(5, 1, 1, 1).expand(5, 3, 4, 4) / 10
    sheet = np.asarray(common.make_grid(rgb))
    assert sheet.shape == (8, 12, 3) and np.asarray(common.make_grid(rgb, columns=5)).shape == (4, 20, 3)
    assert sheet[1::4, 1::4, 0].tolist() == [[0, 26, 51], [76, 102, 255]]


def test_samples_are_written_as_grid_single_pictures_and_animation(tmp_path):
    frames, callback = common.record_frames(lambda x: Image.new("L", (4, 4), int(x)))
    for step in range(51):
        callback(step, step / 50)
    config = common.SampleConfig(out=f"{tmp_path}/grid.png", each=f"{tmp_path}/each", gif=f"{tmp_path}/a.gif")
    common.write_samples(torch.rand(3, 3, 4, 4), ["000004", "000005", "000006"], config, frames)
    assert sorted(p.name for p in (tmp_path / "each").iterdir()) == ["000004.png", "000005.png", "000006.png"]
    assert Image.open(tmp_path / "grid.png").size == (8, 8)
    film, shown = Image.open(tmp_path / "a.gif"), []
    for number in range(film.n_frames):
        film.seek(number)
        shown.append(film.convert("L").getpixel((0, 0)))
    assert shown == [0, 6, 12, 17, 23, 28, 34, 39, 45, 50]


def test_chart_puts_large_values_high_and_late_ones_right():
    image = np.asarray(common.chart("loss", {"loss": [(0, 1.0), (10, 0.1), (20, 0.01)]}), int)
    blue = (image - common.ImageColor.getrgb(common.CURVE_COLOURS[0])).any(axis=2) == 0
    rows, columns = np.nonzero(blue[:, : image.shape[1] - 130])
    heights = [rows[columns == x].mean() for x in np.linspace(columns.min() + 1, columns.max() - 1, 9).astype(int)]
    assert np.all(np.diff(heights) > 0) and np.ptp(np.diff(heights)) < 3  # downwards; straight on a logarithmic axis
