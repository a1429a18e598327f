"""Pictures streamed from the web: every good one once, every failure counted, and none lost over kills."""

import collections
import concurrent.futures
import io
import itertools
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import time
import weakref

import pytest
import torch
from conftest import ROOT
from PIL import Image
from webserver import Server, number_of, picture, write_shards

import common
import dit_t2i
from common import UserError
from dit_t2i import Cache, Config, Fetcher, Refused, Stream

SMALL = dict(image_size=16, private_hosts=True, timeout=2.0, retries=0, cache_gb=0.0, threads=8, per_host=64)
SMALL |= dict(batch_size=8)


@pytest.fixture
def server():
    with Server() as server:
        yield server


@pytest.fixture
def stream(tmp_path):
    """Make a stream of rows, or of (kind, number) that the server is to be asked for."""
    opened = []

    def make(rows, server=None, per_shard=7, **changes):
        if server:
            rows = [{"url": f"{server.address}/{kind}/{n}", "caption": f"picture {n}"} for kind, n in rows]
        names = write_shards(tmp_path / "shards", rows, per_shard) if rows else str(tmp_path / "shards" / "*")
        config = Config(**(SMALL | dict(stream=names, out=str(tmp_path / "run")) | changes))
        opened.append(Stream(config).__enter__())
        return opened[-1]

    yield make
    for one in opened:
        one.__exit__()


def first_turn(data):
    """Every sample of the first pass over the shards: (place, number); reads on until all its lines are done with."""
    while data.next[0] == 0 or min(data.pending)[0] == 0:
        place, pixels, caption = data.sample()
        if place[0] == 0:
            assert caption == f"picture {number_of(pixels)}"
            yield place, number_of(pixels)


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_every_good_picture_comes_once_from_a_server_that_fails_in_every_way(stream, monkeypatch):
    decoded = []

    def decode(*arguments, honest=dit_t2i.decode_picture):
        made = honest(*arguments)
        decoded.append(weakref.ref(made))
        return made

    monkeypatch.setattr(dit_t2i, "decode_picture", decode)
    rng = random.Random(0)
    parts = {"500": 500, "stall": 250, "cut": 250, "text": 250, "bomb": 50}
    kinds = [kind for kind, count in parts.items() for _ in range(count)]
    kinds += ["good"] * (5000 - len(kinds))
    rng.shuffle(kinds)
    with Server() as server:
        data = stream(list(zip(kinds, range(5000))), server, 1000, timeout=2.0, threads=64)
        found, memory = [], []
        for place, number in first_turn(data):
            found.append((number, place))
            memory.append(resident_bytes())
    assert sorted(number for number, _ in found) == [n for n, kind in enumerate(kinds) if kind == "good"]
    assert len({place for _, place in found}) == len(found)
    told = {"http 500": "500", "too slow": "stall", "truncated": "cut", "no picture": "text", "too large": "bomb"}
    beyond = sum(data.counts.values()) - 5000  # lines of the second pass
    assert beyond >= 0
    for kind, name in told.items():
        assert parts[name] <= data.counts[kind] <= parts[name] + beyond
    assert sum(data.counts.values()) == 5000 + len([p for p in walked(data) if p[0] > 0])
    quarter = len(memory) // 4
    assert max(memory[3 * quarter :]) <= 1.05 * max(memory[quarter : 2 * quarter])
    assert len(decoded) > 3000 and sum(made() is not None for made in decoded) <= data.window + 64


def walked(data):
    """Places of the lines that are done with, by the stream's own account."""
    state = json.loads(json.dumps(data.state()))
    rules = dit_t2i.rules_of(state)
    turns = max(place[0] for place in rules[0]["next"]) + 1
    shards = [sum(1 for _ in dit_t2i.read_shard(name)) for name in data.names]
    for turn in range(turns):
        order = common.epoch_order(data.config.seed, turn, len(shards))
        for shard, place in enumerate(order):
            for line in range(shards[place]):
                if any(dit_t2i.is_done(rule, (turn, shard, line)) for rule in rules):
                    yield turn, shard, line


def test_counts_of_a_pass_add_up_and_name_each_kind(stream, server):
    kinds = ["good", "404", "500", "stall", "drip", "cut", "half", "text", "bomb", "large", "endless", "declined"]
    data = stream([(kind, n) for n, kind in enumerate(kinds)], server, max_mb=1.0)
    while (0, 1, 4) in data.pending or data.next[0] < 2:
        data.sample()
    while next(iter(data.pending))[0] < 2:
        data.sample()
    done = sum(place[0] < 2 for place in walked(data))
    assert done == 24 and sum(data.counts.values()) >= 24
    once = {"fetched", "http 404", "http 500", "too slow", "truncated", "no picture", "too large"}
    assert set(data.counts) == once | {"declined by its owner"}
    assert data.counts["too slow"] >= 4 and data.counts["truncated"] >= 4 and data.counts["too large"] >= 6


def test_another_try_is_made_where_it_may_help(server):
    fetch = Fetcher(("http",), private=True, timeout=0.5, retries=2)
    assert fetch(f"{server.address}/later/5") == picture(5)
    for kind, tries in (("404", 1), ("500", 3), ("cut", 3), ("large", 1)):
        with pytest.raises(Refused):
            Fetcher(("http",), True, 0.5, 1000, retries=2)(f"{server.address}/{kind}/1")
        assert server.asked[f"/{kind}/1"] == tries, kind


def test_pauses_double_and_do_not_outlast_the_end(server, monkeypatch):
    fetch, pauses = Fetcher(("http",), private=True, retries=3), []
    monkeypatch.setattr(fetch.stopped, "wait", pauses.append)
    with pytest.raises(Refused, match="http 500"):
        fetch(f"{server.address}/500/1")
    assert len(pauses) == 3
    for n, pause in enumerate(pauses):
        assert 0.25 * 2**n <= pause <= 0.75 * 2**n
    fetch.stopped.set()
    with pytest.raises(Refused):
        fetch(f"{server.address}/500/2")
    assert server.asked["/500/2"] <= 1


def test_no_private_address_unless_allowed(server, monkeypatch):
    public = Fetcher(("http", "https"), timeout=3, retries=0)
    numbers = ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1", "100.64.0.1"]
    numbers += ["::1", "::ffff:127.0.0.1", "fd00::1", "64:ff9b::10.0.0.1", "2002:7f00:1::", "fec0::1", "::127.0.0.1"]
    assert not any(map(dit_t2i.is_public, numbers))
    assert all(map(dit_t2i.is_public, ["93.184.215.14", "2606:4700::6810:84e5", "64:ff9b::5db8:d70e"]))
    for host in ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "localhost", "2130706433", "0x7f.1"]:
        with pytest.raises(Refused, match="private address"):
            public(f"http://{host}:{server.server_port}/good/1")
    assert not server.asked
    assert Fetcher(("http",), private=True)(f"{server.address}/good/1") == picture(1)


def test_names_are_resolved_once_and_every_address_is_tried(server, monkeypatch):
    """Names with public addresses, of which one leads to the test's server."""
    known = {"two.example": ["93.184.215.14", "2606:4700::1"], "both.example": ["93.184.215.14", "10.0.0.1"]}
    known |= {"turns.example": ["93.184.215.14"]}
    asked = []

    def names(host, port, *rest, **more):
        asked.append(host)
        places = known.get(host, [host])
        if host == "turns.example":
            known[host] = ["127.0.0.1"]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (place, port)) for place in places]

    def connect(address, timeout, honest=socket.create_connection):
        if address[0] == "2606:4700::1":
            raise OSError("no IPv6 here")
        return honest(("127.0.0.1", address[1]), timeout)

    monkeypatch.setattr(socket, "getaddrinfo", names)
    monkeypatch.setattr(dit_t2i.socket, "create_connection", connect)
    fetch = Fetcher(("http",), timeout=3, retries=0)
    port = server.server_port
    assert fetch(f"http://two.example:{port}/good/1") == picture(1)
    known["two.example"].reverse()
    assert fetch(f"http://two.example:{port}/good/2") == picture(2)
    with pytest.raises(Refused, match="private address"):
        fetch(f"http://both.example:{port}/good/3")
    asked.clear()
    assert fetch(f"http://turns.example:{port}/good/4") == picture(4) and asked.count("turns.example") == 1
    with pytest.raises(Refused, match="private address"):
        fetch(f"http://turns.example:{port}/good/4")
    server.elsewhere = f"http://127.0.0.1:{port}/good/5"  # a public host leads to a private one
    with pytest.raises(Refused, match="private address"):
        fetch(f"http://two.example:{port}/moved/1")
    assert "/good/5" not in server.asked and "/good/3" not in server.asked


def test_redirects_are_followed_within_what_is_allowed(server, tmp_path):
    fetch = Fetcher(("http",), private=True, timeout=3, retries=0)
    for place in (f"{server.address}/good/7", "/good/7", "../good/7"):
        server.elsewhere = place
        assert fetch(f"{server.address}/moved/1") == picture(7)
    (tmp_path / "secret.png").write_bytes(picture(3))
    server.elsewhere = "/good/7/é%20?x=ü"  # as bytes of UTF-8, which http.client reads as latin-1
    assert fetch(f"{server.address}/moved/1") == picture(7)
    assert "/good/7/%C3%A9%20?x=%C3%BC" in server.asked
    for place in (f"file://{tmp_path}/secret.png", f"https://127.0.0.1:{server.server_port}/", "ftp://127.0.0.1/x"):
        server.elsewhere = place
        for schemes in (("http",), ("http", "file")):  # no server may lead to a file, whatever the shards may
            with pytest.raises(Refused, match=r"scheme not allowed"):
                Fetcher(schemes, private=True, timeout=3, retries=0)(f"{server.address}/moved/2")
    server.elsewhere = "/moved/3"
    with pytest.raises(Refused, match="too many redirects"):
        fetch(f"{server.address}/moved/3")
    assert server.asked["/moved/3"] == 6


@pytest.mark.parametrize("kind", ["stall", "drip", "headers", "continue", "trailers"])
def test_no_server_takes_longer_than_it_may(server, kind):
    start = time.perf_counter()
    with pytest.raises(Refused, match="too slow"):
        Fetcher(("http",), private=True, timeout=0.4, retries=0)(f"{server.address}/{kind}/1")
    assert 0.3 < time.perf_counter() - start < 2


def test_no_answer_is_larger_than_it_may_be_and_redirects_are_not_read(server):
    fetch = Fetcher(("http",), private=True, timeout=5, max_bytes=1_000_000, retries=0)
    for kind in ("large", "endless"):
        with pytest.raises(Refused, match="too large"):
            fetch(f"{server.address}/{kind}/1")
    server.elsewhere = "/good/8"
    assert fetch(f"{server.address}/lead/1") == picture(8)
    assert Fetcher(("http",), True, 5, len(picture(9)))(f"{server.address}/good/9") == picture(9)


def test_odd_answers_and_addresses_end_no_run(server):
    fetch = Fetcher(("http",), private=True, timeout=3, retries=0)
    for kind, end in (("squared", "http 503"), ("multipart", "odd answer"), ("silence", "no connection")):
        with pytest.raises(Refused, match=end):
            fetch(f"{server.address}/{kind}/1")
    with pytest.raises(Refused, match="no connection"):
        fetch(f"{server.address}/nonsense/1")
    for kind in ("letters", "negative"):
        assert fetch(f"{server.address}/{kind}/6") == picture(6)
    assert fetch(f"{server.address}/good/5/ä ö%20?x=ü y") == picture(5)
    for url in ("http://", "http://[", "http://127.0.0.1:99999/", "http:// /", "http://a..b/"):
        with pytest.raises(Refused, match=r"bad address|no connection"):
            fetch(url)
    with pytest.raises(Refused, match="no connection"):
        fetch("http://127.0.0.1:1/x")
    half = "\ud800"  # of a character
    rows = [{"url": f"http://h/{half}", "caption": "a"}, {"url": b"http://h/", "caption": "a"}]
    rows += [{"url": "http://h/", "caption": b"a"}, {"url": "http://h/", "caption": half}, {}, None]
    for row in rows:
        with pytest.raises(Refused, match="broken line"):
            dit_t2i.understand(row)
    line = dit_t2i.understand(
        {"url": " http://H:80/ ", "caption": "a", "aesthetic": 10**400, "width": "1000", "height": "90"}
    )
    assert (line.host, line.score, line.side) == ("h", None, 90.0)
    assert dit_t2i.parse("[" * 100_000) is None and dit_t2i.parse('{"a": NaN}')


def test_certificate_that_is_not_right_is_not_tried_again(monkeypatch):
    asked = []

    def ask(*arguments):
        asked.append(arguments)
        raise ssl.SSLCertVerificationError("expired")

    fetch = Fetcher(("https",), retries=3)
    monkeypatch.setattr(fetch, "ask", ask)
    with pytest.raises(Refused, match="no connection"):
        fetch("https://example.org/")
    assert len(asked) == 1


def test_encrypted_pictures_come_over_a_checked_address(monkeypatch):
    """The client's side of TLS, without a certificate authority: what is wrapped, for which host, and the port."""
    seen = []

    class Trusted:
        def wrap_socket(self, sock, server_hostname):
            seen.append((sock.getpeername(), server_hostname))
            return sock

    with Server() as server:
        fetch = Fetcher(("https",), private=True, timeout=3, retries=0)
        fetch.trusted = Trusted()
        assert fetch(f"https://localhost:{server.server_port}/good/4") == picture(4)
    assert seen == [(("127.0.0.1", server.server_port), "localhost")]
    ports = []
    monkeypatch.setattr(fetch, "connect", lambda host, port, deadline: ports.append((host, port)) or 1 / 0)
    for url, expected in (
        ("https://[2606:4700::1111]/x", 443),
        ("https://a.example/", 443),
        ("https://b.example:8/", 8),
    ):
        with pytest.raises(Refused, match="odd answer"):
            fetch(url)
        assert ports[-1][1] == expected
    assert ports[0][0] == "2606:4700::1111"


def test_pictures_that_would_not_fit_in_memory_are_decoded_two_at_a_time(monkeypatch):
    now, most, lock = [0], [0], threading.Lock()

    def read(file, size):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1

    monkeypatch.setattr(common, "read_picture", read)
    for side, expected in ((3000, 2), (100, None)):
        file, most[0] = io.BytesIO(), 0
        Image.new("1", (side, side)).save(file, "PNG")
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(dit_t2i.decode_picture, [file.getvalue()] * 8, [16] * 8))
        assert most[0] == expected or (expected is None and most[0] > 2)
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "EPS")  # would be read by a program of its own
    with pytest.raises(Refused, match="no picture"):
        dit_t2i.decode_picture(file.getvalue(), 16)


def test_kinds_of_address_are_followed_as_allowed(server, tmp_path):
    (tmp_path / "ä b.png").write_bytes(picture(3))
    address = (tmp_path / "ä b.png").as_uri()
    assert Fetcher(("file",))(address) == picture(3)
    for schemes, url in ((("http", "https"), address), (("file",), f"{server.address}/good/1"), (("file",), "cat.png")):
        with pytest.raises(Refused, match="scheme not allowed"):
            Fetcher(schemes, private=True)(url)
    for url in (tmp_path.as_uri(), "file:///dev/zero", (tmp_path / "none.png").as_uri()):
        with pytest.raises(Refused, match="no such file"):
            Fetcher(("file",))(url)
    with pytest.raises(Refused, match="too large"):
        Fetcher(("file",), max_bytes=10)(address)


def test_lines_are_understood_in_both_dialects_and_broken_ones_counted(stream, server, tmp_path):
    good = f"{server.address}/good"
    rows = [
        {"url": f"{good}/1", "caption": "picture 1", "aesthetic": 5.5, "width": 640.0, "height": 480.0},
        {"URL": f"{good}/2", "TEXT": "picture 2", "AESTHETIC_SCORE": 6.0, "WIDTH": 640, "HEIGHT": 480},
        {"url": f"{good}/3", "caption": "low", "aesthetic": 4.9},
        {"url": f"{good}/4", "caption": "no score"},
        {"url": f"{good}/5", "caption": "small", "aesthetic": 6, "width": 100, "height": 15},
        {"url": f"{good}/6", "caption": "", "aesthetic": 6},
        {"url": None, "caption": "nowhere", "aesthetic": 6},
        {"url": 7, "caption": ["no", "text"], "aesthetic": 6},
        {"url": "http://[", "caption": "no address", "aesthetic": 6},
        ["no", "row"],
    ]
    data = stream(rows, per_shard=100, min_score=5.0, min_side=16)
    path = tmp_path / "shards" / "meta-00000.jsonl"
    path.write_text(path.read_text() + '{"url": "cut sh')
    assert sorted(number for _, number in first_turn(data)) == [1, 2]
    assert data.counts["low score"] >= 2 and data.counts["too small"] >= 1 and data.counts["broken line"] >= 6
    assert data.counts["low score"] * 3 == data.counts["broken line"]
    assert not {f"/good/{n}" for n in (3, 4, 5, 6)} & set(server.asked)
    wide = stream(rows[:1], per_shard=100, min_side=17)
    with pytest.raises(UserError, match=r"gave no picture: .* too small"):  # 480 says the line, 16 has the picture
        wide.sample()


def test_nothing_but_failures_is_an_error_that_says_why(stream, server):
    with pytest.raises(UserError, match=r"a whole pass over .* gave no picture: .*http 404"):
        stream([("404", n) for n in range(10)], server).sample()
    with pytest.raises(UserError, match=r"gave no picture: .*private address"):
        stream([("good", n) for n in range(10)], server, private_hosts=False).sample()
    with pytest.raises(UserError, match="no shards at"):
        Stream(Config(stream="nowhere/*.jsonl"))


@pytest.mark.parametrize("worlds", [[1, 1, 1], [1, 3, 2], [4, 1, 3]])
def test_none_is_lost_and_none_comes_twice_over_kills_and_other_numbers_of_processes(
    stream, server, monkeypatch, worlds
):
    """Three jobs of so many processes each, killed at any moment after a checkpoint; pictures between checkpoint and
    kill are taken back with the weights."""
    rng, total, kept, state = random.Random(1), 300, [], None
    lines = [("404" if n % 7 == 3 else "good", n) for n in range(total)]
    for job, world in enumerate(worlds):
        monkeypatch.setattr(common, "world", lambda world=world: world)
        streams = []
        for rank in range(world):
            monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
            streams.append(stream(lines if job == rank == 0 else None, server if job == rank == 0 else None, 41))
            if state:
                streams[-1].restore(json.loads(json.dumps(state)))

        def tell(_, streams=streams):
            return [(one.next, list(one.pending), one.counts) for one in streams]

        monkeypatch.setattr(common, "all_gather_objects", tell)
        for _ in range(60 // world):
            kept += [one.sample() for one in streams for _ in range(rng.choice([1, 1, 1, 2]))]
        state = streams[0].state()
        assert len(kept) + sum(n for kind, n in state["counts"].items() if kind != "fetched") == sum(
            state["counts"].values()
        )
        for one in streams:  # seen after the checkpoint, and lost with the weights that saw them
            one.sample()
    monkeypatch.setattr(common, "world", lambda: 1)
    monkeypatch.setattr(common, "rank", lambda: 0)
    last = stream(None)
    last.restore(json.loads(json.dumps(state)))
    monkeypatch.undo()
    while min([*last.pending, (9,)])[0] == 0 or last.next[0] == 0:
        kept.append(last.sample())
    first = [number_of(pixels) for place, pixels, _ in kept if place[0] == 0]
    assert sorted(first) == [n for kind, n in lines if kind == "good"]


def test_processes_share_the_lines_out(stream, server, monkeypatch):
    seen = collections.Counter()
    monkeypatch.setattr(common, "world", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        data = stream([("good", n) for n in range(31)], server)
        while data.next[0] == 0 or min(data.pending)[0] == 0:
            place, pixels, _ = data.sample()
            seen[number_of(pixels)] += place[0] == 0
    assert seen == dict.fromkeys(range(31), 1)


def test_host_is_not_asked_for_more_at_a_time_than_allowed(stream):
    with Server(latency=0.02) as server:
        data = stream([("good", n) for n in range(60)], server, threads=16, per_host=3)
        for _ in range(50):
            data.sample()
        assert server.most <= 3
        assert not data.busy or max(data.busy.values()) <= 3
    with Server(latency=0.02) as server:
        data = stream([("good", n) for n in range(60)], server, threads=16, per_host=64)
        for _ in range(50):
            data.sample()
        assert server.most > 3


def test_second_pass_comes_from_memory(stream, server):
    data = stream([("good", n) for n in range(20)], server, cache_gb=0.001, threads=2, batch_size=2)
    seen = [data.sample() for _ in range(60)]
    assert len({number_of(pixels) for _, pixels, _ in seen}) == 20
    assert all(caption == f"picture {number_of(pixels)}" for _, pixels, caption in seen)
    # One that ends the first pass and begins the second may be under way twice.
    assert sum(server.asked.values()) <= 20 + 4 and data.counts["from the cache"] >= 36
    folder = data.cache.folder
    assert (
        str(folder).startswith("/dev/shm" if os.path.isdir("/dev/shm") else "/") and len(list(folder.iterdir())) == 20
    )
    data.__exit__()
    assert not folder.exists()


def test_cache_keeps_what_was_asked_for_last_within_its_budget(tmp_path):
    cache = Cache(tmp_path / "cache", 350)
    for name in "abc":
        cache.put(name, name.encode() * 100)
    assert cache.get("a") == b"a" * 100  # now b is the oldest
    cache.put("d", b"d" * 100)
    assert cache.get("b") is None and [cache.get(name)[:1] for name in "acd"] == [b"a", b"c", b"d"]
    cache.put("e", b"e" * 340)
    assert cache.get("e") and all(cache.get(name) is None for name in "acd")
    cache.put("f", b"f" * 400)  # more than all of it
    assert cache.get("f") is None
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) == sum(cache.sizes.values()) <= 350
    again = Cache(tmp_path / "cache", 350)  # what a killed run left is used, and counted
    assert again.get("e") == b"e" * 340
    (again.folder / next(iter(again.sizes))).unlink()  # somebody tidied up
    assert again.get("e") is None


def test_parquet_holds_what_jsonl_holds(server, tmp_path, stream):
    rows = [{"url": f"{server.address}/good/{n}", "caption": f"picture {n}", "aesthetic": 5.0} for n in range(20)]
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "more").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "more" / "a.parquet")
    data = stream(None, stream=str(tmp_path / "more" / "*.parquet"))
    assert sorted(number for _, number in first_turn(data)) == list(range(20))


def test_tar_shards_bring_their_pictures(tmp_path, stream):
    pytest.importorskip("webdataset")
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as file:
            for n in range(10 * shard, 10 * shard + 10):
                told = {"json": json.dumps({"caption": f"picture {n}"}).encode()} if n % 2 else {}
                told |= {} if n % 2 else {"txt": f"picture {n}".encode()}
                for kind, content in ({"png": picture(n)} | told).items():
                    entry = tarfile.TarInfo(f"{n:05d}.{kind}")
                    entry.size = len(content)
                    file.addfile(entry, io.BytesIO(content))
    data = stream(None, stream=str(tmp_path / "*.tar"))
    assert sorted(number for _, number in first_turn(data)) == list(range(20))
    told = [row["caption"] for row in dit_t2i.read_shard(str(tmp_path / "0.tar"))]
    assert told == [f"picture {n}" for n in range(10)]
    (tmp_path / "1.tar").write_bytes(b"no tar")
    with pytest.raises(Refused, match="broken shard"):
        list(dit_t2i.read_shard(str(tmp_path / "1.tar")))


def test_broken_shard_is_counted_and_left_out(stream, server, tmp_path):
    data = stream([("good", n) for n in range(21)], server, 7)
    (tmp_path / "shards" / "meta-00001.jsonl").unlink()  # since the stream looked which there are
    found = [number for _, number in first_turn(data)]
    assert sorted(found) == [*range(7), *range(14, 21)] and data.counts["broken shard"] >= 1
    assert len(data.captions(100)) == 14
    for path in (tmp_path / "shards").iterdir():
        path.unlink()
    with pytest.raises(dit_t2i.Exhausted, match=r"gave no picture: .*broken shard"):
        while True:
            data.sample()


def test_steps_that_were_made_outlive_the_network(server, tmp_path, monkeypatch, capsys):
    rows = [{"url": f"{server.address}/good/{n}", "caption": f"picture {n}"} for n in range(60)]
    names, asked = write_shards(tmp_path / "shards", rows, 60), itertools.count()

    def fetch(self, url, honest=Fetcher.__call__):
        if next(asked) < 10:
            return honest(self, url)
        raise Refused("no answer")

    monkeypatch.setattr(Fetcher, "__call__", fetch)
    words = ["train", *TRAIN, "--stream", names, "--out", str(tmp_path / "run"), "--cache-gb", "0"]
    assert dit_t2i.main([*words, "--steps", "5", "--checkpoint-every", "100"]) == 2
    assert "gave no picture: " in capsys.readouterr().err
    _, header = common.load_tensors(tmp_path / "run" / "state.safetensors")
    assert header["step"] == 2 and header["stream"]["counts"]["fetched"] == 10  # four pictures to a step
    monkeypatch.undo()
    assert dit_t2i.main([*words, "--steps", "5", "--checkpoint-every", "100", "--resume"]) == 0


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        next(dit_t2i.read_shard("a.parquet"))


TRAIN = "--image-size 16 --depth 2 --num-heads 2 --head-dim 8 --text-dim 16 --device cpu --precision fp32".split()
TRAIN += "--private-hosts --retries 0 --timeout 10 --batch-size 4 --checkpoint-every 5 --threads 4".split()


def test_train_on_a_stream_goes_on_after_a_kill(server, tmp_path, command):
    rows = [("404" if n % 5 == 0 else "good", n) for n in range(400)]
    rows = [{"url": f"{server.address}/{kind}/{n}", "caption": f"picture {n}"} for kind, n in rows]
    names = write_shards(tmp_path / "shards", rows, 50)
    words = ["train", *TRAIN, "--stream", names, "--out", "run", "--cache-gb", "0"]
    server.latency = 0.01
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    start = [sys.executable, str(ROOT / "dit_t2i.py"), *words, "--steps", "60"]
    process = subprocess.Popen(start, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    state = tmp_path / "run" / "state.safetensors"
    deadline = time.time() + 60
    while not state.exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, header = common.load_tensors(state)
    done = header["stream"]["counts"]
    assert done["fetched"] == 4 * header["step"]
    places = [(0, i, line) for i in range(8) for line in range(50)]
    (rule,), order = dit_t2i.rules_of(header["stream"]), common.epoch_order(0, 0, 8)
    numbers = [50 * order[i] + line for turn, i, line in places if dit_t2i.is_done(rule, (turn, i, line))]
    settled = {f"/{'good' if n % 5 else '404'}/{n}" for n in numbers}
    assert len(settled) == sum(done.values())
    server.asked.clear()
    code, out, err = command(*words, "--steps", "60", "--resume", file="dit_t2i.py")
    assert code == 0, err
    _, header = common.load_tensors(state)
    assert header["step"] == 60 and header["stream"]["counts"]["fetched"] == 240
    assert "step 60: " in out and "http 404" in out
    assert len(server.asked) >= 240 - done["fetched"] and settled.isdisjoint(server.asked)
    # Steps before which all is the same take the same words from the shards; other shards are another run.
    (tmp_path / "shards" / "meta-00000.jsonl").rename(tmp_path / "shards" / "other.jsonl")
    code, _, err = command(*words, "--steps", "70", "--resume", file="dit_t2i.py")
    assert code == 2 and "began with another data" in err


def test_ctrl_c_saves_though_nothing_comes(server, tmp_path, monkeypatch):
    """The web answers ten times and then no more, within the third batch of four: the two steps that were made are
    saved, and all lines but theirs are still to come."""
    rows = [{"url": f"{server.address}/good/{n}", "caption": f"picture {n}"} for n in range(60)]
    names, asked, steps = write_shards(tmp_path / "shards", rows, 60), itertools.count(), itertools.count(1)

    def fetch(self, url, honest=Fetcher.__call__):
        if next(asked) < 10:
            return honest(self, url)
        self.stopped.wait(60)
        raise Refused("too slow")

    def settle(self, honest=Stream.settle):
        honest(self)
        if next(steps) == 2:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Fetcher, "__call__", fetch)
    monkeypatch.setattr(Stream, "settle", settle)
    words = ["train", *TRAIN, "--stream", names, "--out", "run", "--steps", "60"]
    began = time.time()
    assert dit_t2i.main(words) == 130 and time.time() - began < 45
    _, header = common.load_tensors(tmp_path / "run" / "state.safetensors")
    (rule,) = header["stream"]["rules"]
    turn, shard, line = rule["next"][0]
    assert header["step"] == 2 and (turn, shard) == (0, 0) and line - len(rule["pending"]) == 8


def test_streamed_pictures_become_the_vaes_latents_and_clips_states(server, tmp_path, partners, monkeypatch):
    rows = [{"url": f"{server.address}/good/{n}", "caption": f"picture {n}"} for n in range(8)]
    names, seen = write_shards(tmp_path / "shards", rows, 8), []

    def spy(config, model, x, text, *more, honest=dit_t2i.flow_loss):
        seen.append((x.clone(), text.clone()))
        return honest(config, model, x, text, *more)

    monkeypatch.setattr(dit_t2i, "flow_loss", spy)
    words = ["train", *TRAIN, "--stream", names, "--out", str(tmp_path / "run"), "--steps", "2", "--encoder", "clip"]
    words += ["--vae", str(partners[0]), "--clip", str(partners[1]), "--text-dim", "64", "--patch-size", "1"]
    assert dit_t2i.main([*words, "--null-prob", "0"]) == 0
    vae, clip = common.load_vae(partners[0]), dit_t2i.Clip(partners[1])
    known = {}
    for n in range(8):
        pixels = common.read_picture(io.BytesIO(picture(n)), 16)
        known[n] = vae.encode(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1)[0]
    states = clip([f"picture {n}" for n in range(8)])
    found = []
    for x, text in seen:
        assert x.shape == (4, 4, 2, 2) and text.shape == (4, 77, 64)
        for latent, state in zip(x, text):
            n = min(known, key=lambda n, latent=latent: (known[n] - latent).abs().max())
            assert torch.allclose(latent, known[n], atol=1e-5) and torch.allclose(state, states[n], atol=1e-5)
            found.append(n)
    assert len(set(found[:4])) == 4
    _, header = common.load_tensors(tmp_path / "run" / "model.safetensors")
    assert header["vae"] and header["latent"] == [4, 2]


def test_stream_mistakes_are_told(tmp_path, command):
    code, _, err = command("train", "--preset", "paper", "--stream", "none/*.jsonl", "--clip", "x", file="dit_t2i.py")
    assert code == 2 and "a stream has no end and no epochs; give --steps or --minutes" in err
    code, _, err = command("train", "--stream", "none/*.jsonl", "--steps", "1", file="dit_t2i.py")
    assert code == 2 and err.startswith("error: no shards at none/*.jsonl")
    (tmp_path / "cat.png").write_bytes(picture(1))
    code, _, err = command("train", "--stream", "cat.png", "--steps", "1", file="dit_t2i.py")
    assert code == 2 and err.startswith("error: cat.png is no shard; name .jsonl, .parquet or .tar files")
