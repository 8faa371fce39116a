"""A Hugging Face Hub on loopback: one dataset of small shards, served the way the real hub serves large files.

The hub answers HEAD and GET of /datasets/<repo>/resolve/<revision>/<name> with a redirect that carries the metadata
(X-Linked-Etag: the SHA-256, X-Linked-Size, X-Repo-Commit); the bytes come from a second origin, with ranges. Faults are
queued per file name in on_head and on_get, one for each request: an HTTP status, or a tuple ("cut", n): close the
connection after n bytes; ("reset", n): the same with a TCP reset; ("hold", n): wait for `released` after n bytes.
"""

import hashlib
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPO = "kjj0/fineweb10B-gpt2"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_shard(seed, num_tokens, magic=20240520, version=1):
    """The bytes of a shard; tokens are a cheap hash stream, different for each seed."""
    tokens = hashlib.shake_128(f"shard {seed}".encode()).digest(2 * num_tokens)
    return struct.pack("<256i", magic, version, num_tokens, *[0] * 253) + tokens


class FakeHub:
    def __init__(self, num_train=3, num_tokens=1500):
        names = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, num_train + 1))]
        self.files = {name: make_shard(name, num_tokens + i) for i, name in enumerate(names)}
        self.served, self.etags = {}, {}    # name -> bytes sent, or etag told, instead of the true ones
        self.on_head, self.on_get = {}, {}  # name -> iterator of faults
        self.ranges, self.loop = True, False
        self.released = threading.Event()
        self.requests = []                  # (method, name, Range header or None, Authorization header or None)

    def __enter__(self):
        self.hub, self.cdn = (ThreadingHTTPServer(("127.0.0.1", 0), self.handler(cdn)) for cdn in (False, True))
        for server in (self.hub, self.cdn):
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in (self.hub, self.cdn))
        return self

    def __exit__(self, *exc):
        self.released.set()
        for server in (self.hub, self.cdn):
            server.shutdown()
            server.server_close()

    def bodies(self):
        """The files whose bytes were asked for, in order, with their Range headers."""
        return [(name, byte_range) for method, name, byte_range, _ in self.requests if method == "BODY"]

    def handler(hub, cdn):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def reply(self, status, headers=(), body=b""):
                self.send_response(status)
                for key, value in {"Content-Length": len(body), **dict(headers)}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def answer(self):
                *_, revision, name = self.path.split("/")
                method = "BODY" if cdn else self.command
                hub.requests.append((method, name, self.headers.get("Range"), self.headers.get("Authorization")))
                fault = next({"HEAD": hub.on_head, "BODY": hub.on_get}.get(method, {}).get(name, iter(())), None)
                if isinstance(fault, int):
                    return self.reply(fault)
                if cdn:
                    return self.send_bytes(name, fault)
                if not self.path.startswith(f"/datasets/{REPO}/resolve/"):
                    return self.reply(404, {"X-Error-Code": "RepoNotFound"})
                if revision not in ("main", COMMIT):
                    return self.reply(404, {"X-Error-Code": "RevisionNotFound"})
                if name not in hub.files:
                    return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                sha256 = hashlib.sha256(hub.files[name]).hexdigest()
                self.reply(302, {"Location": self.path if hub.loop else f"{hub.cdn_url}/objects/{revision}/{name}",
                                 "X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{hub.etags.get(name, sha256)}"',
                                 "X-Linked-Size": len(hub.files[name])})

            def send_bytes(self, name, fault):
                body, start = hub.served.get(name, hub.files[name]), 0
                if hub.ranges and "Range" in self.headers:
                    start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                what, after = fault or ("send", len(body))
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                self.send_header("Content-Length", len(body) - start)
                self.end_headers()
                self.wfile.write(body[start:start + after])
                if what == "hold":
                    hub.released.wait(20)
                    self.wfile.write(body[start + after:])
                elif what in ("cut", "reset"):
                    if what == "reset":  # with this linger, close sends RST instead of FIN
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True

            do_GET = do_HEAD = answer

            def handle(self):
                try:
                    super().handle()
                except ConnectionError:
                    pass  # the client was killed

        return Handler
