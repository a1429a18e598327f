"""Pictures streamed from the web: every good one once a pass, every failure counted, none lost over a kill."""

import collections
import functools
import io
import itertools
import json
import os
import random
import signal
import socket
import sys
import tarfile
import threading
import time
from pathlib import Path

import common
import dit_t2i
from common import UserError
from dit_t2i import Config, Refused, Stream, fetch

import pyarrow.parquet
import pytest
import torch
from webserver import BOMB, Server, number_of, picture

SMALL = dict(image_size=16, private_hosts=True, threads=8, batch_size=8)
WINDOW = 4 * 8 + 2 * 8


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in (("TIMEOUT", 3.0), ("CACHE_BYTES", 0), ("PER_HOST", 64)):
        monkeypatch.setattr(dit_t2i, name, value)
    with Server() as server:
        yield server


def write_shards(rows, per_shard):
    """rows, dictionaries, as shards/meta-00000.jsonl and so on."""
    Path("shards").mkdir(exist_ok=True)
    for first in range(0, len(rows), per_shard):
        lines = [json.dumps(row) + "\n" for row in rows[first : first + per_shard]]
        Path(f"shards/meta-{first // per_shard:05d}.jsonl").write_text("".join(lines))


@pytest.fixture
def stream(server, monkeypatch):
    """Make a stream of (kind, number) that the server is asked for, or of shards that are there; as one process of
    several if wanted."""
    opened = []

    def make(rows=None, per_shard=7, rank=0, world=1, **changes):
        if rows:
            write_shards(server.rows(rows), per_shard)
        with monkeypatch.context() as patch:
            patch.setattr(common, "rank", lambda: rank)
            patch.setattr(common, "world", lambda: world)
            opened.append(Stream(Config(**(SMALL | dict(stream="shards/*") | changes))))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def take(data, count):
    """Numbers of the next pictures, each with its own caption."""
    assert data.prefetch(count)
    pixels, captions = data.read(range(count))
    numbers = [number_of(picture) for picture in ((pixels + 1) * 127.5).round().permute(0, 2, 3, 1)]
    assert pixels.shape == (count, 3, 16, 16) and captions == [f"picture {n}" for n in numbers]
    return numbers


# -- one address --


PRIVATE = (
    "127.0.0.1 10.1.2.3 192.168.0.1 169.254.169.254 0.0.0.0 224.0.0.1 100.64.0.1 240.0.0.1 ::1 fd00::1 fe80::1%eth0 "
    "fec0::1 ff02::1 ::127.0.0.1 ::ffff:127.0.0.1 64:ff9b::10.0.0.1 2002:7f00:1:: 2001:db8::1".split()
)
PUBLIC = ["93.184.215.14", "2606:4700::6810:84e5", "64:ff9b::5db8:d70e", "2002:5db8::"]


@pytest.mark.parametrize("address", PRIVATE + PUBLIC)
def test_private_addresses_are_known_in_every_disguise(address):
    assert dit_t2i.is_public(address) == (address in PUBLIC)


REASONS = {  # why nothing came -> what the server does
    "too slow": "stall drip-headers drip-body drip-trailers continue",
    "too large": "endless large",
    "truncated": "cut",
    "bad address or answer": "bad-chunk bad-header nonsense",
    "http 404": "404",
    "http 500": "500",
    "no connection": "silence",
    "declined by its owner": "declined",
}
HOSTILE = {kind: reason for reason, kinds in REASONS.items() for kind in kinds.split()}


@pytest.mark.parametrize("kind", HOSTILE)
def test_every_bad_answer_ends_in_time_with_its_reason(server, kind):
    start = time.monotonic()
    with pytest.raises(Refused) as refused:
        fetch(f"{server.address}/{kind}/1", True, timeout=0.5, max_bytes=1_000_000)
    assert str(refused.value) == HOSTILE[kind] and time.monotonic() - start < 1.5


def test_good_answers_come_whole(server):
    assert fetch(f"{server.address}/good/9", True, 3, len(picture(9))) == picture(9)  # of just the allowed size
    assert fetch(f"{server.address}/good/7/ä ö%20?x=ü y", True) == picture(7)
    assert "/good/7/%C3%A4%20%C3%B6%20?x=%C3%BC%20y" in server.asked


def test_bad_addresses_are_refused():
    for url in ("", "cat.png", "http://", "http://[", "ftp://a/b", "file:///etc/hosts", "http://h:99999/"):
        with pytest.raises(Refused, match="bad address"):
            fetch(url, private=True)


def test_redirects_are_checked_and_counted(server):
    start = f"{server.address}/moved/1"
    for place in (f"{server.address}/good/7", "/good/7", "../good/7", "/good/7/é%20?x=ü"):
        server.elsewhere = place
        assert fetch(start, private=True) == picture(7)
    assert "/good/7/%C3%A9%20?x=%C3%BC" in server.asked
    server.elsewhere = "file:///etc/hosts"
    with pytest.raises(Refused, match="bad address"):
        fetch(start, private=True)
    server.elsewhere = "/moved/2"
    with pytest.raises(Refused, match="too many redirects"):
        fetch(f"{server.address}/moved/2", private=True)
    assert server.asked["/moved/2"] == 1 + 5


def test_names_are_resolved_once_and_the_checked_address_is_dialled(server, monkeypatch):
    """Names with public addresses, each of which leads to the test's server. A second look-up of a name gives a
    private one."""
    known = {"two.example": ["2606:4700::1", "93.184.215.14"], "both.example": ["93.184.215.14", "10.0.0.1"]}
    known |= {"turns.example": ["93.184.215.14"], "moved.example": ["93.184.215.14"]}
    asked, dialled = [], []

    def lookup(host, port, **more):
        found = ["127.0.0.1"] if host in asked else known.get(host, [host])
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (place, port)) for place in found]

    def dial(address, timeout):
        dialled.append(address[0])
        if ":" in address[0]:
            raise OSError("no IPv6 here")
        sock = socket.socket()
        sock.connect(("127.0.0.1", address[1]))
        return sock

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(socket, "create_connection", dial)
    port = server.server_port
    assert fetch(f"http://two.example:{port}/good/1") == picture(1)
    assert dialled == ["2606:4700::1", "93.184.215.14"]
    assert fetch(f"http://turns.example:{port}/good/4") == picture(4) and asked.count("turns.example") == 1
    server.elsewhere = f"http://127.0.0.1:{port}/good/5"
    for place in ("both.example/good/3", "turns.example/good/3", "[::ffff:127.0.0.1]/good/3", "moved.example/moved/1"):
        with pytest.raises(Refused, match="private address"):
            fetch(f"http://{place.replace('/', f':{port}/', 1)}")
    assert not {"/good/3", "/good/5"} & set(server.asked)


def test_encrypted_connections_name_the_host_and_untrusted_ones_are_refused(server, monkeypatch):
    seen = []

    class Trusted:
        def wrap_socket(self, sock, server_hostname):
            seen.append((sock.getpeername(), server_hostname))
            return sock

    with pytest.raises(Refused, match="no connection"):  # the server speaks no TLS
        fetch(f"https://localhost:{server.server_port}/good/4", private=True)
    monkeypatch.setattr(dit_t2i, "trusted", Trusted)
    assert fetch(f"https://localhost:{server.server_port}/good/4", private=True) == picture(4)
    assert seen == [(("127.0.0.1", server.server_port), "localhost")]


def test_pictures_of_a_wrong_size_or_kind_are_refused_before_they_are_decoded(monkeypatch):
    assert dit_t2i.decode_picture(picture(3), 16, min_side=16).shape == (16, 16, 3)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **more: pytest.fail("a program was started"))
    with pytest.raises(Refused, match="broken picture"):
        dit_t2i.decode_picture(picture(1, kind="EPS"), 16)
    monkeypatch.setattr(common, "read_picture", lambda *_: pytest.fail("decoded"))
    for content, side, reason in ((BOMB, 0, "too large"), (picture(1), 17, "too small"), (b"<html>", 0, "broken")):
        with pytest.raises(Refused, match=reason):
            dit_t2i.decode_picture(content, 16, side)


# -- rows --


def test_rows_are_read_in_both_dialects():
    parse = dit_t2i.parse_row
    assert parse('{"url": " http://h/1 ", "caption": "a"}') == ("http://h/1", "a", None)
    laion = {"URL": "http://h/2", "TEXT": "b", "AESTHETIC_SCORE": 6.0, "WIDTH": 640, "HEIGHT": 480, "NSFW": None}
    assert parse(laion, 6.0, 480) == ("http://h/2", "b", None)
    assert parse({"prompt": "c", "picture": {"bytes": b"x"}}) == ("", "c", b"x")
    broken = ['{"url": "cut sh', "[" * 100_000, '["no", "row"]', laion | {"URL": 7}, laion | {"WIDTH": "wide"}]
    for reason, filters, rows in (
        ("broken row", (), broken + [laion | {"TEXT": text} for text in (["a"], "\ud800")]),
        ("empty caption", (), [laion | {"TEXT": text} for text in ("", None)]),
        ("no url or picture among url, text", (), [laion | {"URL": None}]),
        ("among link, alt", (), [{"link": "x", "alt": "y"}]),
        ("low score", (6.0, 480), [laion | {"AESTHETIC_SCORE": score} for score in (5.9, None)]),
        ("too small", (6.0, 480), [laion | {"HEIGHT": 479}]),
    ):
        for row in rows:
            with pytest.raises(Refused, match=reason):
                parse(row, *filters)


def test_all_kinds_of_shard_give_the_same_rows_and_broken_ones_are_counted(stream, server):
    rows = server.rows(("good", n) for n in range(20))
    write_shards(rows[10:], 10)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:10]), "shards/a.parquet")
    with tarfile.open("shards/c.tar", "w") as file:
        for n in range(20, 30):
            about = (".json", json.dumps(rows[0] | {"caption": f"picture {n}"})) if n % 2 else (".txt", f"picture {n}")
            for suffix, content in ((".png", picture(n)), (about[0], about[1].encode())):
                entry = tarfile.TarInfo(f"{n:05d}{suffix}")
                entry.size = len(content)
                file.addfile(entry, io.BytesIO(content))
    for name in ("x.parquet", "y.tar"):
        Path("shards", name).write_bytes(b"no such thing")
    os.symlink("nowhere", "shards/z.jsonl")
    data = stream()
    assert data.captions == [f"picture {n}" for n in (*range(10), *range(20, 30), *range(10, 20))]
    assert sorted(take(data, 30)) == list(range(30)) and len(server.asked) == 20
    take(data, 1)  # of the second pass
    assert data.counts["broken shard"] in (3, 4, 5, 6)


# -- the stream --


def test_every_good_row_comes_once_a_pass_and_every_bad_one_is_counted(stream, world=2):
    """Two passes over rows of which a quarter fail in every way; every process's last row of a shard is good, so that
    its last picture ends a pass and the counts are exact."""
    parts = {"good": 160, "500": 15, "404": 15, "cut": 10, "text": 10, "half": 5, "stall": 2, "bomb": 2, "declined": 3}
    mixed = list(collections.Counter(parts).elements())
    random.Random(0).shuffle(mixed)
    kinds = [mixed.pop() if n % 40 < 37 else "good" for n in range(240)]
    counts, found = collections.Counter(), []
    for rank in range(world):
        data = stream(list(zip(kinds, range(240))), 40, rank, world, threads=16)
        mine = [n for n in range(240) if kinds[n] == "good" and (n // 40 + n % 40) % world == rank]
        first, second = take(data, len(mine)), take(data, len(mine))
        assert sorted(first) == sorted(second) == mine and first != second  # the same rows in another order
        counts.update(data.counts)
        found += first
    assert sorted(found) == [n for n, kind in enumerate(kinds) if kind == "good"]
    names = HOSTILE | {"good": "fetched", "text": "broken picture", "half": "broken picture", "bomb": "too large"}
    assert counts == collections.Counter(names[kind] for kind in kinds * 2)


@pytest.mark.parametrize("worlds", [[1, 1, 1], [3, 3, 3], [1, 3, 2], [4, 1, 3]])
def test_after_kills_no_row_is_lost_and_few_come_again(stream, worlds):
    """Jobs of so many processes, each killed after a checkpoint; what was read since then is lost with the weights."""
    rng, rows, kept, states = random.Random(1), [("404" if n % 7 == 3 else "good", n) for n in range(300)], [], None
    for job, world in enumerate(worlds):
        streams = [stream(rows, 41, rank, world) for rank in range(world)]
        if states:
            for data in streams:
                data.resume(json.loads(json.dumps(states)))
        last = job == len(worlds) - 1
        for data in streams:
            for _ in range(1000 if last else 60 // world + rng.randrange(3)):
                number = take(data, 1)[0]
                if data.place[0] > 0:
                    break
                kept.append(number)
        states = [data.state() for data in streams]
        for data in streams:  # handed out after the last step that was made
            take(data, 5)
    assert set(kept) == {n for kind, n in rows if kind == "good"}
    if len(set(worlds)) == 1:
        assert len(kept) == len(set(kept))
        assert sum(state["counts"]["fetched"] for state in states) == len(kept) + worlds[0]
    else:  # the processes are a few rows apart
        assert len(kept) - len(set(kept)) <= WINDOW


def test_pictures_come_again_from_memory(stream, server, monkeypatch):
    monkeypatch.setattr(dit_t2i, "CACHE_BYTES", 1_000_000)
    data = stream([("good", n) for n in range(60)], threads=2, batch_size=2)  # a window of 12 rows
    assert len(set(take(data, 180))) == 60
    again = sum(server.asked.values()) - 60  # rows that are under way in two passes at once
    assert again <= 3 * 12 and data.counts["from the cache"] >= 120 - again
    assert data.counts["from the cache"] + data.counts["fetched"] == 180


def test_cache_stays_within_its_budget(stream, monkeypatch):
    monkeypatch.setattr(dit_t2i, "CACHE_BYTES", 5 * 16 * 16 * 3 + 1)
    data = stream([("good", n) for n in range(20)])
    take(data, 20)
    assert len(data.cache) == 5
    assert all(number_of(pixels) == int(url.split("/")[-1]) for url, pixels in data.cache.items())


def test_a_host_is_not_asked_for_more_at_a_time_than_allowed(stream, server, monkeypatch):
    server.latency = 0.02
    for limit in (3, 64):
        server.most = 0
        monkeypatch.setattr(dit_t2i, "PER_HOST", limit)
        take(stream([("good", n) for n in range(60)], threads=16), 50)
        assert server.most == 3 if limit == 3 else server.most > 3


def test_nothing_but_failures_is_an_error_that_says_why(stream):
    rows = [("404", n) for n in range(10)]
    with pytest.raises(UserError, match=r"two passes over .* gave no picture: 2\d http 404$"):
        stream(rows).prefetch(1)
    with pytest.raises(UserError, match="private address"):
        stream(rows, private_hosts=False).prefetch(1)
    with pytest.raises(UserError, match="no rows for process 12 of 12"):
        stream(rows, rank=11, world=12, per_shard=10).prefetch(1)


# -- training --

TRAIN = "--image-size 16 --depth 2 --num-heads 2 --head-dim 8 --text-dim 16 --device cpu --precision fp32".split()
TRAIN += "--private-hosts --batch-size 4 --checkpoint-every 5 --threads 4 --optimizer adamw".split()


press_ctrl_c = functools.partial(os.kill, os.getpid(), signal.SIGINT)


def train(server, kinds, *more, out="run"):
    """Train on a stream of pictures (kind, number); returns the exit code."""
    write_shards(server.rows(kinds), 50)
    return dit_t2i.main(["train", *TRAIN, "--stream", "shards/*", "--out", out, *more])


def before_step(monkeypatch, n, action, honest=Stream.prefetch):
    """Call `action` before the n-th step waits for its pictures."""
    steps = itertools.count(1)

    def prefetch(self, *more):
        if next(steps) == n:
            action()
        return honest(self, *more)

    monkeypatch.setattr(Stream, "prefetch", prefetch)


def test_training_that_was_killed_goes_on_as_if_it_had_not_been(server, monkeypatch, capsys):
    """Killed at step 8, resumed from step 5: the same weights to the bit as in one go, and the same counts."""
    kinds = [("good" if n % 5 else "404", n) for n in range(60)]
    assert train(server, kinds, "--steps", "12", out="whole") == 0
    before_step(monkeypatch, 9, pytest.fail)
    with pytest.raises(pytest.fail.Exception):  # no Exception, but a BaseException: nothing in the program handles it
        train(server, kinds, "--steps", "12")
    assert train(server, kinds, "--steps", "12", "--resume") == 0
    assert "resumed at step 5" in capsys.readouterr().out
    (whole, one), (run, two) = (common.load_tensors(f"{name}/state.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], run[name]) for name in whole) and one["step"] == two["step"] == 12
    assert one["stream"] == two["stream"] and one["stream"][0]["counts"]["fetched"] == 48
    Path("shards/meta-00000.jsonl").rename("shards/other.jsonl")
    assert train(server, kinds[:50], "--steps", "12", "--resume") == 2  # other shards are another run
    assert "began with another data" in capsys.readouterr().err


def test_a_stream_without_a_budget_goes_on_until_ctrl_c_at_a_constant_learning_rate(server, monkeypatch):
    kinds = [("good", n) for n in range(60)]
    before_step(monkeypatch, 12, press_ctrl_c)
    monkeypatch.setattr(common.time, "perf_counter", lambda honest=time.perf_counter: 1000 * honest())  # over a minute
    assert train(server, kinds, "--warmup", "2") == 130
    assert [float(row["lr"]) for row in common.read_log(Path("run"))] == [0.002]
    assert {path.name for path in Path("run/samples").iterdir()} >= {"step_000005.png", "step_000010.png"}
    assert train(server, kinds, "--warmup", "2", "--resume", "--steps", "14") == 0  # and then it may end


def test_ctrl_c_saves_though_nothing_comes(server, monkeypatch):
    """The server answers ten times and then no more, within the third batch of four: the two steps that were made are
    saved, and all rows but theirs are still to come."""
    monkeypatch.setattr(dit_t2i, "TIMEOUT", 30)
    before_step(monkeypatch, 3, lambda: threading.Timer(0.3, press_ctrl_c).start())
    assert train(server, [("good" if n < 10 else "stall", n) for n in range(40)], "--steps", "60") == 130
    _, header = common.load_tensors("run/state.safetensors")
    assert header["step"] == 2 and header["stream"] == [{"place": [0, 0, 8], "counts": {"fetched": 8}}]


def test_stream_mistakes_are_told(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("cat.png", "cat.parquet"):
        Path(name).write_bytes(picture(1))
    Path("rows.jsonl").write_text('{"link": "http://h/0.png", "alt": "red"}\n' * 3)
    write_shards([{"url": "http://a/b", "caption": "a red car"}], 1)
    for words, line in (
        ("--epochs 3 --stream shards/*.jsonl", "error: a stream has no epochs; give --steps or --minutes"),
        ("--steps 1 --stream none/*.jsonl", "error: no shards at none/*.jsonl"),
        ("--steps 1 --stream rows.jsonl", "error: no row of rows.jsonl can be used: no text, caption or prompt among"),
        ("--steps 1 --stream cat.png", "error: cat.png is no shard; name .jsonl, .parquet or .tar files"),
        (
            "--steps 1 --stream cat.parquet",
            "error: .parquet shards need a package that is not here: pip install pyarrow",
        ),
    ):
        assert dit_t2i.main(["train", *words.split()]) == 2 and line in capsys.readouterr().err
