"""A web server on loopback whose answers fail in the ways that those of the web do."""

import collections
import http.server
import io
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
    "drip-headers": (HEAD + b"X-More: ", b"x"),
    "drip-body": (HEAD + b"\r\n", b"x"),
    "drip-trailers": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X-More: x\r\n"),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "endless": (HEAD + b"\r\n", b"x" * 500_000),
    "nonsense": (b"once upon a time\r\n\r\n", None),
    "silence": (b"", None),
    "bad-header": (HEAD + b"Content-Type: multipart/x; boundary*=a; boundary*0*=b\r\n\r\n", None),
    "bad-chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", None),
}


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
        time.sleep(server.latency)
        with server.lock:
            server.now -= 1
        self.send(*RAW[kind] if kind in RAW else (self.answer(kind, picture(int(number))), None))

    def send(self, beginning, repeated):
        self.wfile.write(beginning)
        while repeated is not None and not self.server.closing.wait(0.05):
            self.wfile.write(repeated)

    def answer(self, kind, whole):
        bodies = {"text": b"<html>no such picture</html>", "bomb": BOMB, "large": b"x" * 3_000_000}
        bodies["half"] = picture(1, 200, "JPEG")[:-200]  # cut before it was stored: the length is right
        bodies["cut"] = whole[: len(whole) // 2]
        body = bodies.get(kind, whole)
        code = {"404": "404", "500": "500", "moved": "302"}.get(kind, "200")
        more = {"moved": f"Location: {self.server.elsewhere}", "declined": "X-Robots-Tag: noai"}.get(kind, "X-More: x")
        length = len(whole if kind == "cut" else body)
        return f"HTTP/1.1 {code} x\r\nContent-Length: {length}\r\n{more}\r\n\r\n".encode() + body


class Server(http.server.ThreadingHTTPServer):
    """Used with `with`: serves as long as the block runs. asked: path -> how often; most: requests at one time."""

    daemon_threads = True
    request_queue_size = 128
    latency, elsewhere, now, most = 0.0, "", 0, 0  # seconds before each answer; where `moved` leads

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.lock, self.closing, self.asked = threading.Lock(), threading.Event(), collections.Counter()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __exit__(self, *problem):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Clients that give up are expected."""

    def rows(self, kinds):
        """Rows of metadata for pictures (kind, number)."""
        return [{"url": f"{self.address}/{kind}/{n}", "caption": f"picture {n}"} for kind, n in kinds]
