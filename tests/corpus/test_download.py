"""The Hub is a small HTTP server here, which answers as the real one does, or badly."""

import hashlib
import http.server
import io
import json
import os
import random
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from llamalet.shards import Shards, find_newest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
REPO = "roneneldan/TinyStories"
COMMIT = "c0ffee" + "0" * 34
README = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: validation
    path: data/validation-*
- config_name: small
  data_files:
  - split: train
    path: small.jsonl
---
# Stories
"""
TRAIN = [f"Story {i}. The dog saw {i} cats.\n\nThe cats saw the dog." for i in range(60)]
VAL = [f"Another story {i}. The dog saw the {i} cats." for i in range(9)]


def parquet(texts):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file)
    return file.getvalue()


def repository():
    return {
        "README.md": README.encode(),
        "data/train-00000-of-00002.parquet": parquet(TRAIN[:40]),
        "data/train-00001-of-00002.parquet": parquet(TRAIN[40:]),
        "data/validation-00000-of-00001.parquet": parquet(VAL),
        "small.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TRAIN).encode(),
        "TinyStories-train.txt": b"not to be downloaded",
    }


class Hub(http.server.ThreadingHTTPServer):
    """Serves one dataset, whose larger files lie in LFS as on the real Hub; `spoil` changes an answer about a file."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = repository()
        self.sent = []  # (path, first byte) of each file that was asked for
        self.spoil = {}  # path -> function(handler, bytes, first byte) that answers instead
        self.page = None  # answers everything
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def entry(self, path):
        data = self.files[path]
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_digest(data)}
        if path.endswith(".parquet"):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def listing(self, folder):
        inside = [path.removeprefix(folder).lstrip("/") for path in self.files if path.startswith(folder)]
        files = [self.entry(f"{folder}/{name}".lstrip("/")) for name in inside if "/" not in name]
        folders = {f"{folder}/{name.split('/')[0]}".lstrip("/") for name in inside if "/" in name}
        return files + [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders]


def git_digest(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self):
        hub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        path = urllib.parse.unquote(self.path.partition("?")[0])
        api = f"/api/datasets/{REPO}"
        if hub.page is not None:
            self.answer(200, hub.page, Content_Type="text/html")
        elif path == api or path.startswith(f"{api}/revision/"):
            files = [{"rfilename": name} for name in hub.files]
            self.json({"_id": "1", "id": REPO, "sha": COMMIT, "private": False, "tags": [], "siblings": files})
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            self.json(hub.listing(path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")))
        elif path == f"{api}/paths-info/{COMMIT}":
            wanted = json.loads(body)["paths"] if body.startswith("{") else urllib.parse.parse_qs(body)["paths"]
            self.json([hub.entry(name) for name in wanted if name in hub.files])
        elif path.startswith(f"/datasets/{REPO}/resolve/"):
            name = path.split("/", 6)[6]
            if name.endswith(".parquet"):  # large files lie elsewhere
                self.answer(302, b"", Location=f"{hub.url}/cdn/{name}?signature=1", X_Repo_Commit=COMMIT)
            else:
                self.file(name)
        elif path.startswith("/cdn/"):
            self.file(path.removeprefix("/cdn/"))
        else:
            self.answer(404, b'{"error": "Repository not found"}', X_Error_Code="RepoNotFound")

    do_HEAD = do_POST = do_GET

    def file(self, name):
        data = self.server.files.get(name)
        if data is None:
            return self.answer(404, b"", X_Error_Code="EntryNotFound")
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if self.command == "GET":
            self.server.sent.append((name, first))
            if name in self.server.spoil:
                return self.server.spoil[name](self, data, first)
        self.whole(data, first)

    def whole(self, data, first):
        headers = {"ETag": f'"{git_digest(data)}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if first >= len(data) > 0:
            self.answer(416, b"", **headers)
        elif first:
            headers["Content_Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            self.answer(206, data[first:], **headers)
        else:
            self.answer(200, data, **headers)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


def start(hub, *argv, **environment):
    """Start a command that knows no Hub but this one."""
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(Path("hf_home").resolve()),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.Popen(
        [sys.executable, ROOT / "tinystories.py", *argv],
        env=os.environ | settings | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def call(hub, *argv, **environment):
    process = start(hub, *argv, **environment)
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    return process.returncode, out, err


def fails(hub, *words, **environment):
    """Download, and expect one line of error and no declaration that the source is complete."""
    code, _, err = call(hub, "download", **environment)
    last = err.strip().splitlines()[-1]
    assert code == 3 and last.startswith("error: ") and all(word in last for word in words), err
    assert not Path("data/TinyStories/source.json").exists()
    return last


FIRST = "data/train-00000-of-00002.parquet"
LOCAL = Path("data/TinyStories/download") / FIRST


def test_download_then_pretokenize_and_nothing_between(hub):
    code, out, err = call(hub, "download")
    assert (code, "next: python tinystories.py pretokenize\n" in out) == (0, True), err
    wanted = [name for name in hub.files if name.endswith(".parquet")]
    assert sorted(name for name, _ in hub.sent if name != "README.md") == sorted(wanted)
    for name in wanted:
        assert (Path("data/TinyStories/download") / name).read_bytes() == hub.files[name]
    assert call(hub, "pretokenize")[0] == 0
    real = Shards.open(find_newest("data"), verify=True)
    assert (real.meta.source, real.meta.splits["train"].documents, real.meta.splits["val"].documents) == (REPO, 60, 9)
    # A local folder of the same files, and of the same texts in one .jsonl, gives the same tokens.
    vocab = f"--vocab={real.tokenizer_path}"
    assert call(hub, "pretokenize", "data/TinyStories/download/data", vocab, "--data-dir=local")[0] == 0
    local = Shards.open(find_newest("local"), verify=True)
    assert local.meta.splits == real.meta.splits
    # Once more: everything is checked and kept, but for a file that has changed.
    hub.sent.clear()
    LOCAL.write_bytes(LOCAL.read_bytes()[:-1] + b"x")
    code, out, _ = call(hub, "download")
    assert code == 0 and out.count("already there, checked") == 2 and out.count("downloaded, checked") == 1
    assert [sent for sent in hub.sent if sent[0] != "README.md"] == [(FIRST, 0)]
    assert LOCAL.read_bytes() == hub.files[FIRST]


def test_a_configuration_with_a_small_text_file_and_no_validation(hub):
    code, out, err = call(hub, "download", f"--source={REPO}:small", "--max-files=1")
    assert code == 0, err
    assert f"next: python tinystories.py pretokenize --source={REPO}:small" in out
    assert Path("data/TinyStories-small/download/small.jsonl").read_bytes() == hub.files["small.jsonl"]
    assert call(hub, "pretokenize", f"--source={REPO}:small")[0] == 0
    assert Shards.open(find_newest("data")).meta.splits["val"].documents == 3


def test_a_killed_download_goes_on_where_it_stopped(hub):
    megabytes = random.Random(1).randbytes(13 << 20)
    hub.files[FIRST] = megabytes
    stalled = threading.Event()

    def stall(handler, data, first):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: 12 << 20])
        handler.wfile.flush()
        stalled.wait(60)
        handler.close_connection = True

    hub.spoil[FIRST] = stall
    process = start(hub, "download")
    part = LOCAL.with_name(LOCAL.name + ".part")
    deadline = time.monotonic() + 60
    while not (part.is_file() and part.stat().st_size >= 10 << 20) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    stalled.set()
    n_bytes = part.stat().st_size
    assert 0 < n_bytes < len(megabytes) and not LOCAL.exists()
    code, out, err = call(hub, "pretokenize")
    assert code == 3 and "not downloaded yet" in err

    def cut_once(handler, data, first):
        del hub.spoil[FIRST]
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        handler.send_header("Content-Length", str(len(data) - first))
        handler.end_headers()
        handler.wfile.write(data[first : first + 1000])
        handler.close_connection = True

    hub.spoil[FIRST] = cut_once
    hub.sent.clear()
    code, out, err = call(hub, "download")
    assert code == 0, err
    starts = [first for name, first in hub.sent if name == FIRST]
    assert len(starts) == 2 and starts[0] == n_bytes and starts[1] >= n_bytes
    assert LOCAL.read_bytes() == megabytes and not part.exists()


def html(handler, data, first):
    handler.answer(200, b"<html>Please log in to this network</html>", Content_Type="text/html")


def short(handler, data, first):
    handler.answer(200, data[:-100])


def long(handler, data, first):
    handler.answer(200, data + b"more")


def one_bit(handler, data, first):
    handler.whole(data[:500] + bytes([data[500] ^ 1]) + data[501:], first)


@pytest.mark.parametrize("spoil", [html, short, long, one_bit])
def test_a_file_that_is_not_the_hubs_never_counts(hub, spoil):
    hub.spoil[FIRST] = spoil
    fails(hub, REPO, FIRST, "where the Hub has", "2 times")
    assert not LOCAL.exists()
    if spoil is html:
        hub.spoil.clear()
        code, _, err = call(hub, "download")
        assert code == 0 and LOCAL.read_bytes() == hub.files[FIRST], err


def test_a_wrong_beginning_is_thrown_away(hub):
    LOCAL.parent.mkdir(parents=True)
    LOCAL.with_name(LOCAL.name + ".part").write_bytes(b"<html>")
    code, _, err = call(hub, "download")
    assert code == 0 and LOCAL.read_bytes() == hub.files[FIRST], err
    assert [first for name, first in hub.sent if name == FIRST] == [6, 0]


def test_a_page_instead_of_the_hub(hub):
    hub.page = b"<html>Please log in to this network</html>"
    fails(hub, REPO, "type the command again")


def test_no_such_dataset_and_no_network(hub):
    code, _, err = call(hub, "download", "--source=nobody/nothing")
    assert code == 3 and "nobody/nothing" in err.strip().splitlines()[-1]
    fails(hub, REPO, "python tinystories.py synthesize", HF_HUB_OFFLINE="1")  # a dead network takes half a minute


def test_files_of_another_kind(hub):
    hub.files = {"README.md": b"", "train.csv": b"text\nstory\n"}
    fails(hub, "train.csv", "only .txt, .jsonl, .parquet")
