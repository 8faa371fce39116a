"""A Hugging Face Hub on loopback that holds one dataset of small shards."""

import hashlib
import json
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_shard(seed, num_tokens, version=1):
    """The bytes of a shard, from the description of the format. Tokens differ for each seed."""
    header = struct.pack("<256i", 20240520, version, num_tokens, *[0] * 253)
    return header + hashlib.shake_128(str(seed).encode()).digest(2 * num_tokens)


class FakeHub:
    """Use it in a `with`. Tests change what it holds and how it answers."""

    def __init__(self, names):
        self.files = {name: make_shard(name, 1500) for name in names}
        self.listing = None  # bytes that are sent in place of the true listing
        self.sent = {}  # name: bytes that are sent in place of the true ones
        self.without_hash = set()  # names
        self.break_after = {}  # name: bytes after which the next transfer is cut off
        self.hold_after = {}  # name: bytes after which a transfer stands still
        self.released = threading.Event()  # and goes on
        self.downloads = []  # names whose bytes were asked for, in order

    def __enter__(self):
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        loop = {"poll_interval": 0.02}
        threading.Thread(target=self.server.serve_forever, kwargs=loop, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def describe(self, name):
        """What the hub tells of a file that it keeps by its SHA-256."""
        data = self.files[name]
        facts = {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
        if name not in self.without_hash:
            sha256 = hashlib.sha256(data).hexdigest()
            facts["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
        return facts


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub = None

    def log_message(self, *words):
        pass

    def begin(self, status, length, **headers):
        self.send_response(status)
        self.send_header("Content-Length", length)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()

    def do_POST(self):
        """Of /api/datasets/REPO/paths-info/REVISION."""
        form = self.rfile.read(int(self.headers["Content-Length"])).decode()
        names = parse_qs(form)["paths"]
        answer = [self.hub.describe(name) for name in names if name in self.hub.files]
        body = json.dumps(answer).encode() if self.hub.listing is None else self.hub.listing
        self.begin(200, len(body), Content_Type="application/json")
        self.wfile.write(body)

    def do_HEAD(self):
        """Of /datasets/REPO/resolve/REVISION/NAME."""
        data = self.hub.files[self.path.split("/")[-1]]
        etag = hashlib.sha256(data).hexdigest()
        self.begin(200, len(data), ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

    def do_GET(self):
        """Of the same. A hub without ranges: what was cut off is sent again as a whole."""
        hub, name = self.hub, self.path.split("/")[-1]
        if name not in hub.files:  # huggingface_hub also asks for a list of its own
            return self.begin(404, 0)
        hub.downloads.append(name)
        body = hub.sent.get(name, hub.files[name])
        first = hub.break_after.get(name, hub.hold_after.get(name, len(body)))
        self.begin(200, len(body))
        self.wfile.write(body[:first])
        if hub.break_after.pop(name, None) is not None:
            self.close_connection = True
            return None
        if name in hub.hold_after:
            hub.released.wait(20)
        return self.wfile.write(body[first:])
