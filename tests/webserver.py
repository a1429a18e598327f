"""A web server on loopback whose pictures may fail in every way that those of the web do."""

import collections
import contextlib
import http.server
import io
import json
import threading
import time

import numpy as np
from PIL import Image

BOMB = 9000  # pixels a side: more than any picture may have, in a file of a few hundred kilobytes


# Answers that a client may stumble over.
ODD = {
    "letters": b"HTTP/1.0 200 OK\r\nContent-Length: abc\r\n\r\n",
    "negative": b"HTTP/1.0 200 OK\r\nContent-Length: -5\r\n\r\n",
    "squared": b"HTTP/1.0 503 Busy\r\nRetry-After: \xb2\r\n\r\n",
    "multipart": b"HTTP/1.0 200 OK\r\nContent-Type: multipart/x; boundary*=a; boundary*0*=b\r\n\r\n",
    "silence": b"",
    "nonsense": b"once upon a time\r\n\r\n",
}


def picture(number, size=16, kind="PNG"):
    """Bytes of a picture of one colour, which tells its number below 2**15."""
    red, green, blue = (8 * (number >> shift & 31) + 4 for shift in (0, 5, 10))
    file = io.BytesIO()
    Image.new("RGB", (size, size), (red, green, blue)).save(file, kind)
    return file.getvalue()


def number_of(pixels):
    """The number of a picture, (H, W, 3) uint8."""
    return sum(int(value) // 8 << shift for value, shift in zip(np.asarray(pixels)[4, 4], (0, 5, 10)))


class Handler(http.server.BaseHTTPRequestHandler):
    """/KIND/NUMBER[/...]: the picture of that number, or what goes wrong with it."""

    def log_message(self, *words):
        pass

    def do_GET(self):
        kind, number = self.path.strip("/").split("/")[:2]
        server = self.server
        with server.lock:
            server.asked[self.path] += 1
            server.now += 1
            server.most = max(server.most, server.now)
            times = server.asked[self.path]
        time.sleep(server.latency)
        with server.lock:
            server.now -= 1
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.serve(kind, int(number), times)

    def answer(self, content, code=200, length=None, **headers):
        self.send_response(code)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value.encode().decode("latin-1"))  # which the library writes
        self.end_headers()
        self.wfile.write(content)

    def drip(self, content):
        while not self.server.closing.wait(0.05):
            self.wfile.write(content)
            self.wfile.flush()

    def serve(self, kind, number, times):
        server = self.server
        whole = server.content(number)
        if kind == "good" or (kind == "later" and times > 1):
            self.answer(whole)
        elif kind == "later":
            self.answer(b"", 503, Retry_After="0")
        elif kind in ("404", "500"):
            self.answer(b"", int(kind))
        elif kind == "stall":
            server.closing.wait(10)
        elif kind == "drip":
            self.send_response(200)
            self.end_headers()
            self.drip(b"x")
        elif kind == "headers":  # of which there is no end
            self.wfile.write(b"HTTP/1.0 200 OK\r\nX-More: ")
            self.drip(b"x")
        elif kind == "continue":
            self.drip(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif kind == "trailers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
            self.drip(b"X-More: x\r\n")
        elif kind == "lead":  # somewhere else, with a body of which there is no end
            self.wfile.write(b"HTTP/1.0 302 Found\r\nLocation: " + server.elsewhere.encode() + b"\r\n\r\n")
            self.drip(b"x" * 1_000_000)
        elif kind in ODD:
            self.wfile.write(ODD[kind] + whole)
        elif kind == "cut":
            self.answer(whole[: len(whole) // 2], length=len(whole))
        elif kind == "half":  # cut before it was stored: the length is right
            self.answer(picture(number, 200, "JPEG")[:-200])
        elif kind == "text":
            self.answer(b"<html>no such picture</html>")
        elif kind == "bomb":
            self.answer(server.bomb)
        elif kind == "large":
            self.answer(b"x" * 3_000_000)
        elif kind == "endless":  # says nothing about its length
            self.send_response(200)
            self.end_headers()
            for _ in range(3000):
                self.wfile.write(b"x" * 1000)
        elif kind == "declined":
            self.answer(whole, X_Robots_Tag="noai")
        elif kind == "moved":
            self.answer(b"", 302, Location=server.elsewhere)


class Server(http.server.ThreadingHTTPServer):
    """Used with `with`: serves as long as the block runs. asked: path -> how often; most: requests at one time."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, latency=0.0, content=picture):
        super().__init__(("127.0.0.1", 0), Handler)
        self.latency, self.content, self.elsewhere = latency, content, ""
        self.lock, self.closing, self.asked = threading.Lock(), threading.Event(), collections.Counter()
        self.now, self.most = 0, 0
        file = io.BytesIO()
        Image.new("1", (BOMB, BOMB)).save(file, "PNG")
        self.bomb = file.getvalue()

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
