"""A web server on loopback whose answers fail in the ways that those of the web do."""

import collections
import contextlib
import http.server
import io
import json
import threading
import time

import numpy as np
from PIL import Image


def picture(number, size=16, kind="PNG", mode="RGB"):
    """Bytes of a picture of one colour, which tells its number below 2**15."""
    file = io.BytesIO()
    colour = tuple(8 * (number >> shift & 31) + 4 for shift in (0, 5, 10)) if mode == "RGB" else 0
    Image.new(mode, (size, size), colour).save(file, kind)
    return file.getvalue()


def number_of(pixels):
    """The number of a picture, (H, W, 3) uint8."""
    return sum(int(value) // 8 << shift for value, shift in zip(np.asarray(pixels)[4, 4], (0, 5, 10)))


BOMB = picture(0, 9000, mode="1")  # a small file of 81 million pixels
HEAD = b"HTTP/1.1 200 OK\r\n"
# What is sent as it stands: (the beginning, what is sent again every 50 ms until the client gives up).
RAW = {
    "stall": (b"", b""),
    "drip headers": (HEAD + b"X-More: ", b"x"),
    "drip body": (HEAD + b"\r\n", b"x"),
    "drip trailers": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X-More: x\r\n"),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "endless": (HEAD + b"\r\n", b"x" * 500_000),
    "nonsense": (b"once upon a time\r\n\r\n", None),
    "silence": (b"", None),
    "bad header": (HEAD + b"Content-Type: multipart/x; boundary*=a; boundary*0*=b\r\n\r\n", None),
    "bad chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", None),
}


class Handler(http.server.BaseHTTPRequestHandler):
    """/KIND/NUMBER[/...]: the picture of that number, or what goes wrong with it."""

    def log_message(self, *words):
        pass

    def do_GET(self):
        kind, number = self.path.strip("/").replace("%20", " ").split("/")[:2]
        server = self.server
        with server.lock:
            server.asked[self.path] += 1
            server.now += 1
            server.most = max(server.most, server.now)
        time.sleep(server.latency)
        with server.lock:
            server.now -= 1
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_raw(*RAW[kind]) if kind in RAW else self.send_kind(kind, server.content(int(number)))

    def send_raw(self, beginning, repeated):
        self.wfile.write(beginning)
        while repeated is not None and not self.server.closing.wait(0.05):
            self.wfile.write(repeated)

    def send_kind(self, kind, whole):
        code, length, headers = 200, None, {}
        if kind in ("404", "500"):
            code = int(kind)
        elif kind == "moved":
            code, headers = 302, {"Location": self.server.elsewhere.encode().decode("latin-1")}  # as http.server wants
        elif kind == "declined":
            headers = {"X-Robots-Tag": "noai"}
        elif kind == "cut":
            whole, length = whole[: len(whole) // 2], len(whole)
        else:
            bodies = {"text": b"<html>no such picture</html>", "bomb": BOMB, "large": b"x" * 3_000_000}
            bodies["half"] = picture(1, 200, "JPEG")[:-200]  # cut before it was stored: the length is right
            whole = bodies.get(kind, whole)
        self.send_response(code)
        for key, value in {"Content-Length": str(length or len(whole)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(whole)


class Server(http.server.ThreadingHTTPServer):
    """Used with `with`: serves as long as the block runs. asked: path -> how often; most: requests at one time."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, latency=0.0, content=picture):
        super().__init__(("127.0.0.1", 0), Handler)
        self.latency, self.content, self.elsewhere = latency, content, ""
        self.lock, self.closing, self.asked = threading.Lock(), threading.Event(), collections.Counter()
        self.now, self.most = 0, 0

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *problem):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass


def write_shards(folder, rows, per_shard):
    """rows, dictionaries, as folder/meta-00000.jsonl and so on; returns what --stream is to name."""
    folder.mkdir(exist_ok=True)
    for first in range(0, len(rows), per_shard):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows[first : first + per_shard]]
        (folder / f"meta-{first // per_shard:05d}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return f"{folder}/*.jsonl"
