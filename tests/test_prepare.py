"""scripts/text.py and scripts/prepare.py: tokenizers against a BPE written here, shards against documents cut by hand."""
import functools
import gzip
import hashlib
import http.server
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest

from scripts import prepare, text
from train import ROOT, UsageError, open_shards

needs_tokenizers = functools.partial(pytest.importorskip, "tokenizers", reason="pip install -r scripts/requirements.txt")
ODD = "héllo 中文 😀 <|endoftext|>\t\x00 \r\n  don't they'll 123\u0301  \n\nthe end \x85\xa0\u2028"
BPE = ["--tokenizer=bpe", "--vocab_size=300"]


def words(rng, num_words, letters="abcdefgh"):
    return " ".join("".join(rng.choices(letters, k=rng.randint(1, 8))) for _ in range(num_words))


def documents(seed, num_docs, num_words=40):
    rng = random.Random(seed)
    return [words(rng, rng.randint(1, num_words)) + rng.choice(["", "\n", " é😀", "\n\nmore\n"]) for _ in range(num_docs)]


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return str(path)


def run(sources, out, *flags):
    assert prepare.main([*map(str, sources), f"--out={out}", *flags]) == 0
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def tokens(out, split):
    return np.concatenate(open_shards(f"{out}/{split}_*.bin").tokens).tolist()


def is_val(document, share=0.01):
    return int(hashlib.sha256(document.encode()).hexdigest()[:16], 16) < share * 16 ** 16


# ---- Tokenizers ----

MERGES = ["t h", "th e", "Ġ the", "1 2", "l l", "' ll", "Ċ Ċ", "Ã ©"]  # the last two: newlines, é

def made_up_gpt2(folder, names=("encoder.json", "vocab.bpe")):
    """Files in GPT-2's form: the bytes in the order of the published encoder.py, some merges, the BOS last. 265 ids."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(i) for i in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    ids = {piece: i for i, piece in enumerate([*letters, *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>"])}
    folder.mkdir(exist_ok=True)
    (folder / names[0]).write_text(json.dumps(ids))
    (folder / names[1]).write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    return dict(zip([i for i in shown] + [i for i in range(256) if i not in shown], letters)), ids


def bpe_by_hand(line, letters, ids):
    """GPT-2's algorithm for ASCII text: its regular expression, then always the merge of least rank."""
    found = []
    for word in re.findall(r"'(?:[sdmt]|ll|ve|re)| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+|\s+(?!\S)|\s+", line):
        parts = [letters[byte] for byte in word.encode()]
        while pairs := [rank for rank, merge in enumerate(MERGES) if merge in map(" ".join, zip(parts, parts[1:]))]:
            left, right = MERGES[min(pairs)].split(" ")
            merged = []
            while parts:
                two = parts[:2] == [left, right]
                merged.append("".join(parts[:1 + two]))
                parts = parts[1 + two:]
            parts = merged
        found += [ids[part] for part in parts]
    return found


@pytest.fixture
def each_kind(tmp_path):
    """The meta.json of each kind of tokenizer; their files lie in tmp_path."""
    needs_tokenizers()
    made_up_gpt2(tmp_path)
    (tmp_path / "characters.json").write_text(json.dumps("".join(sorted(set(ODD)))))
    (tmp_path / "tokenizer.json").write_text(text.train_bpe([ODD, "the end of the end " * 9], 280).to_str())
    size = len(set(ODD))
    rows = [("bytes", 257, 256), ("gpt2", 265, 264), ("characters.json", size + 1, size), ("tokenizer.json", 280, 0)]
    return [dict(zip(("tokenizer", "vocab_size", "bos_id"), row)) for row in rows]


def test_every_tokenizer_spells_any_text_without_loss(each_kind, tmp_path):
    for meta in each_kind:
        tokenizer = text.open_tokenizer(meta, tmp_path)
        rng = random.Random(1)
        for line in (ODD, "", *("".join(rng.choices(ODD, k=rng.randint(1, 60))) for _ in range(50))):
            ids = tokenizer.encode(line)
            assert meta["bos_id"] not in ids and all(0 <= i < meta["vocab_size"] for i in ids)
            assert tokenizer.decode([meta["bos_id"], *ids, 0xFFFF, meta["bos_id"], meta["vocab_size"]]) == line
            assert tokenizer.token_bytes[ids].sum() == len(line.encode())
        assert len(tokenizer.token_bytes) == tokenizer.vocab_size and tokenizer.token_bytes[tokenizer.bos_id] == 0
        assert len(tokenizer.encode("<|endoftext|>")) > 1  # the letters of a text are never a BOS
    assert text.open_tokenizer(each_kind[0], None).decode([104, 0xc3, 105]) == "h\ufffdi"


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_gpt2_is_read_as_its_files_say(tmp_path, names):
    needs_tokenizers()
    letters, ids = made_up_gpt2(tmp_path, names)
    tokenizer = text.open_tokenizer({"tokenizer": "gpt2", "vocab_size": 265, "bos_id": 264}, tmp_path)
    rng = random.Random(2)
    for line in ["the then they'll 1212\n\n\nthe  the", *("".join(rng.choices("the l'12\n.,s", k=80)) for _ in range(100))]:
        assert tokenizer.encode(line) == bpe_by_hand(line, letters, ids)
    assert tokenizer.pieces[ids["Ġthe"]] == b" the" and tokenizer.pieces[ids["Ã©"]] == "é".encode()


def test_a_tokenizer_that_cannot_be_is_one_sentence(each_kind, tmp_path, monkeypatch):
    of = lambda name, **other: next(meta for meta in each_kind if meta["tokenizer"] == name) | other
    with pytest.raises(UsageError, match=r"'ß' \(U\+00DF\)"):
        text.open_tokenizer(of("characters.json"), tmp_path).encode("the ß")
    for meta, wanted in ((of("gpt2", vocab_size=50257), "has 265 ids, but"), (of("tokenizer.json", bos_id=3), "bos_id=3"),
                         (of("bytes", tokenizer="nowhere.json"), "nowhere.json"), (of("bytes", tokenizer="vocab.bpe"), "vocab.bpe")):
        with pytest.raises(UsageError, match=wanted) as caught:
            text.open_tokenizer(meta, tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_text('{"model": 7}')
    with pytest.raises(UsageError, match="wanted a byte-level BPE"):
        text.open_tokenizer(of("tokenizer.json"), tmp_path)
    def unreachable(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(UsageError, match="--gpt2=DIR, a folder of encoder.json and vocab.bpe"):
        text.open_tokenizer(of("gpt2"), tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match="pip install -r scripts/requirements.txt"):
        text.open_tokenizer(of("gpt2"), tmp_path)


# ---- What goes where ----

def test_shards_hold_every_document_once_in_order_each_side_by_its_hash(tmp_path):
    texts = documents(1, 900) + ["", "half a pair: "] + documents(1, 50)  # the last 50 are copies of the first
    run([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out", "--tokenizer=bytes", "--val=0.1", "--shard_tokens=20000")
    for split, side in (("val", True), ("train", False)):
        wanted = [token for t in texts if t and is_val(t, 0.1) == side for token in (256, *t.encode())]
        assert tokens(tmp_path / "out", split) == wanted and 0.05 < len(wanted) / sum(map(len, texts)) * (1 if side else 0.1) < 0.2
    shards = open_shards(f"{tmp_path}/out/train_*.bin")
    assert shards.meta == {"tokenizer": "bytes", "vocab_size": 257, "bos_id": 256} and len(shards.tokens) > 3
    assert all(ids[0] == 256 and 20000 <= len(ids) < 21500 for ids in shards.tokens[:-1])
    assert json.loads((tmp_path / "out/meta.json").read_text())["tokens"] == {
        path.name: len(ids) for split in ("train", "val") for path, ids in zip(*open_shards(f"{tmp_path}/out/{split}_*.bin")[:2])}


def test_every_kind_of_file_gives_the_same_shards(tmp_path):
    texts, folder = [t.replace("|", "") for t in documents(2, 300)], tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", texts[:100], "body")
    (tmp_path / "a.txt").write_text("|".join(texts[:100]), newline="")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("|".join(texts[100:]).encode()))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps({"body": t}) + "\n\n" for t in texts[100:]).encode()))
    (folder / "README.md").write_text("no data")
    wanted = [token for t in texts if not is_val(t, 0.1) for token in (256, *t.encode())]
    flags = ["--tokenizer=bytes", "--val=0.1"]
    for i, (given, more) in enumerate([([folder], "--field=body"), ([folder / "a.jsonl", f"{folder}/*.gz"], "--field=body"),
                                       ([tmp_path / "a.txt", tmp_path / "b.txt.gz"], "--separator=|")]):
        run(given, tmp_path / f"out{i}", *flags, more)
        assert tokens(tmp_path / f"out{i}", "train") == wanted
    pa = pytest.importorskip("pyarrow", reason="pip install -r scripts/requirements.txt")
    import pyarrow.parquet
    table = pa.table({"n": [*range(301)], "body": [*texts, None]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet", row_group_size=70)
    run([tmp_path / "c.parquet"], tmp_path / "out3", *flags, "--field=body")
    assert tokens(tmp_path / "out3", "train") == wanted
    with pytest.raises(UsageError, match="no column 'text'; --field can be n, body"):
        run([tmp_path / "c.parquet"], tmp_path / "out4", *flags)


def test_the_last_tenth_of_a_text_is_for_validation(tmp_path, monkeypatch, capsys):
    """As nanoGPT cuts tiny Shakespeare, here in pieces of 100 characters."""
    monkeypatch.setattr(prepare, "PIECE", 100)
    whole = "\r\n".join(documents(3, 60)) + "\nZ"
    (tmp_path / "play.txt").write_bytes(whole.encode())
    files = run([tmp_path / "play.txt"], tmp_path / "out", "--tokenizer=chars", "--val_tail=0.1", "--jobs=1")
    alphabet, first = sorted(set(whole)), int(0.9 * len(whole))
    assert set(files) == {"train_000000.bin", "val_000000.bin", "characters.json", "meta.json"}
    for split, part in (("train", whole[:first]), ("val", whole[first:])):
        assert tokens(tmp_path / "out", split) == [len(alphabet), *map(alphabet.index, part)]
    assert f"--val_tokens={len(whole) - first} " in capsys.readouterr().out
    with pytest.raises(UsageError, match="wanted one .txt that is one document, not 2"):
        run([tmp_path / "play.txt"] * 2, tmp_path / "two", "--val_tail=0.1")


def test_pieces_of_a_long_text_are_encoded_as_the_whole_would_be(tmp_path, monkeypatch):
    needs_tokenizers()
    rng = random.Random(4)
    whole = "".join(rng.choices(["the ", "end", "\n", "\n\n", " \n", "\n ", "12", "'ll", "é", ". ", "\r\n"], k=4000))
    monkeypatch.setattr(prepare, "PIECE", 150)
    (tmp_path / "a.txt").write_bytes(whole.encode())
    run([tmp_path / "a.txt"], tmp_path / "out", *BPE, "--val=0", "--jobs=1")
    tokenizer = text.open_tokenizer(open_shards(f"{tmp_path}/out/train_*.bin").meta, tmp_path / "out")
    assert tokens(tmp_path / "out", "train") == [0, *tokenizer.encode(whole)]
    cuts = [*prepare.cut(open(tmp_path / "a.txt", encoding="utf-8", newline=""))]
    assert "".join(cuts) == whole and len(cuts) > 30 and max(map(len, cuts)) < 1000
    assert [len(piece) for piece in prepare.cut(open(write_jsonl(tmp_path / "b", ["x" * 9000])))][0] == 2550  # nowhere to cut


def test_a_tokenizer_of_shards_serves_other_text(tmp_path):
    needs_tokenizers()
    one, two = (write_jsonl(tmp_path / f"{i}.jsonl", documents(i, 200)) for i in (5, 6))
    first = run([one], tmp_path / "one", *BPE)
    again = run([two], tmp_path / "two", f"--tokenizer={tmp_path}/one")
    assert first["tokenizer.json"] == again["tokenizer.json"] and open_shards(f"{tmp_path}/two/*.bin").meta["vocab_size"] == 300
    tokenizer = text.open_tokenizer(open_shards(f"{tmp_path}/two/*.bin").meta, tmp_path / "two")
    assert tokenizer.decode(tokens(tmp_path / "two", "train")) == "".join(t for t in documents(6, 200) if not is_val(t))


# ---- Stopped and continued ----

def test_missing_and_damaged_shards_are_made_again_and_no_others(tmp_path, capsys):
    source, out = write_jsonl(tmp_path / "a.jsonl", documents(7, 600)), tmp_path / "out"
    flags = ["--tokenizer=chars", "--val=0.2", "--shard_tokens=8000"]
    files = run([source], out, *flags)
    (out / "train_000001.bin").unlink()
    (out / "val_000000.bin").write_bytes(files["val_000000.bin"][:-2])
    (out / "train_000003.77777").write_bytes(b"half")  # of a run that was killed
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    capsys.readouterr()
    assert run([source], out, *flags) == files and len(files) > 7
    assert {name for name in kept if (out / name).stat().st_mtime_ns != kept[name]} == {"val_000000.bin"}
    printed = capsys.readouterr().out
    assert re.findall(r"^(\S+\.bin): \d+ tokens", printed, re.M) in (["train_000001.bin", "val_000000.bin"], ["val_000000.bin", "train_000001.bin"])
    assert f"({len(kept) - 1} were there)" in printed


def test_killed_it_continues_and_several_processes_write_what_one_writes(tmp_path, monkeypatch):
    needs_tokenizers()
    monkeypatch.setattr(prepare, "PIECE", 1 << 13)  # small: processes even for little text
    texts = documents(8, 300)
    source = write_jsonl(tmp_path / "a.jsonl", [f"{i} {t}" for i in range(300) for t in texts[i % 7::6]])
    flags, out = [*BPE, "--shard_tokens=60000", "--bpe_mib=1"], tmp_path / "killed"
    whole = run([source], tmp_path / "whole", *flags, "--jobs=1")
    driver = "import scripts.prepare as p, sys; p.PIECE = 1 << 13; p.main(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", driver, source, *flags, f"--out={out}", "--jobs=2"], cwd=ROOT,
                               start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len([*out.glob("*.bin")]) < 3:
        time.sleep(0.005)
    process.kill()
    process.wait()
    there = {path.name: path.read_bytes() for path in out.glob("*.bin")}
    assert 3 <= len(there) < len([*out.parent.glob("whole/*.bin")]) and all(whole[name] == blob for name, blob in there.items())
    for _ in range(400):  # the workers go with it
        if not alive(process.pid):
            break
        time.sleep(0.05)
    assert not alive(process.pid)
    assert run([source], out, *flags, "--jobs=1") == whole


def alive(group):
    try:
        os.killpg(group, 0)
        return True
    except (ProcessLookupError, PermissionError):
        return False


def test_another_recipe_is_refused(tmp_path):
    source, out = write_jsonl(tmp_path / "a.jsonl", documents(9, 30)), tmp_path / "out"
    files = run([source], out, "--tokenizer=bytes")
    for flags, words in ((["--tokenizer=chars"], "another tokenizer: bytes, not chars"), (["--tokenizer=bytes", "--val=0.5"], "another val: 0.01, not 0.5")):
        with pytest.raises(UsageError, match=words):
            run([source], out, *flags)
    write_jsonl(tmp_path / "a.jsonl", documents(9, 31))
    with pytest.raises(UsageError, match="another sources"):
        run([source], out, "--tokenizer=bytes")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    (out / "meta.json").unlink()
    with pytest.raises(UsageError, match="shards without a meta.json"):
        run([source], out, "--tokenizer=bytes")


# ---- The network, a fake of it ----

def test_a_dataset_of_the_hub_is_its_parquet_files_or_those_made_of_it(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow", reason="pip install -r scripts/requirements.txt")
    import pyarrow.parquet
    texts, asked = documents(10, 40), []
    for i in range(2):
        pyarrow.parquet.write_table(pa.table({"text": texts[20 * i:20 * i + 20]}), tmp_path / f"{i}.parquet")
    theirs = {"some/own": {None: ["data/train-1.parquet", "data/train-0.parquet", "data/test-0.parquet", "README.md"]},
              "some/made": {None: ["train.csv"], "refs/convert/parquet": ["default/train/0000.parquet", "default/train/0001.parquet"]}}
    class Api:
        def dataset_info(self, repo, revision=None, files_metadata=False):
            if repo not in theirs:
                raise OSError("404")
            return SimpleNamespace(sha=f"sha-{revision}", siblings=[SimpleNamespace(rfilename=name, size=9) for name in theirs[repo][revision]])
    def hf_hub_download(repo, name, repo_type, revision):
        asked.append((repo, name, repo_type, revision))
        return str(tmp_path / f"{name[-9]}.parquet")
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    wanted = [token for t in texts for token in (256, *t.encode())]
    for repo, revision, names in (("some/own", None, ["data/train-0.parquet", "data/train-1.parquet"]),
                                  ("some/made", "refs/convert/parquet", ["default/train/0000.parquet", "default/train/0001.parquet"])):
        asked.clear()
        out = tmp_path / repo.replace("/", "-")
        run([repo], out, "--tokenizer=bytes", "--val=0")
        assert tokens(out, "train") == wanted and [*dict.fromkeys(asked)] == [(repo, name, "dataset", f"sha-{revision}") for name in names]
        assert json.loads((out / "meta.json").read_text())["recipe"]["sources"][0] == [f"{repo}@sha-{revision}/{names[0]}", 9]
    for argv, words in ((["some/none"], "neither a file here nor to be had from the Hub"), (["some/own", "--files=nope"], "matches --files=nope")):
        theirs["some/own"]["refs/convert/parquet"] = []
        with pytest.raises(UsageError, match=words):
            prepare.main([*argv, f"--out={tmp_path}/none", "--tokenizer=bytes"])


def test_a_url_is_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "www").mkdir()
    (tmp_path / "www/input.txt").write_text("to be or not to be")
    class Handler(http.server.SimpleHTTPRequestHandler):
        log_message = lambda *_: None
        def do_GET(self):
            if self.path != "/short.txt":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"cut off")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path / "www")))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(UsageError, match="nothing.txt: cannot be fetched .*404"):
        run([f"{url}/nothing.txt"], tmp_path / "out", "--tokenizer=chars")
    with pytest.raises(UsageError, match="ended 93 bytes early"):
        run([f"{url}/short.txt"], tmp_path / "out", "--tokenizer=chars")
    files = run([f"{url}/input.txt"], tmp_path / "out", "--tokenizer=chars", "--val_tail=0.5")
    server.shutdown()
    server.server_close()
    assert run([f"{url}/input.txt"], tmp_path / "out", "--tokenizer=chars", "--val_tail=0.5") == files
    assert json.loads(files["characters.json"]) == " benort" and tokens(tmp_path / "out", "train") == [7, *map(" benort".index, "to be or ")]


# ---- Report, errors ----

def test_the_report_counts_validation_text(tmp_path, capsys):
    needs_tokenizers()
    letters, ids = made_up_gpt2(tmp_path / "gpt2")
    texts = documents(11, 400, 30)
    write_jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(UsageError, match="has 265 ids"):
        prepare.main([f"{tmp_path}/a.jsonl", "--report=bytes", f"--gpt2={tmp_path}/gpt2", "--val=0.3"])
    prepare.GPT2, before = {"tokenizer": "gpt2", "vocab_size": 265, "bos_id": 264}, prepare.GPT2
    try:
        prepare.main([f"{tmp_path}/a.jsonl", "--report=bytes,chars,bpe:290", f"--gpt2={tmp_path}/gpt2", "--val=0.3"])
    finally:
        prepare.GPT2 = before
    rows = [[*map(str.strip, line.split("|")[1:-1])] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    val = [t for t in texts if is_val(t, 0.3)]
    size, chars = sum(len(t.encode()) for t in val), sum(map(len, val))
    gpt2 = sum(len(bpe_by_hand(part, letters, ids)) for t in val for part in [t.replace(" é😀", "")]) + sum((" é" in t) * 6 for t in val)
    assert rows[0] == ["gpt2", "265", str(gpt2), f"{size / gpt2:.3f}", "1.000"]
    assert rows[1] == ["bytes", "257", str(size), "1.000", f"{size / gpt2:.3f}"]
    assert rows[2] == ["chars", str(len(set("".join(texts))) + 1), str(chars), f"{size / chars:.3f}", f"{chars / gpt2:.3f}"]
    assert rows[3][:2] == ["bpe:290", "290"] and int(rows[3][2]) < size and {path.name for path in tmp_path.iterdir()} == {"gpt2", "a.jsonl"}


@pytest.mark.parametrize("content, name, flags, words", [
    (b'{"text": 3}\n', "a.jsonl", [], "line 1: no text 'text'"), (b'{"text": "x"}\n{"te', "a.jsonl", [], "cannot be read"),
    (b"\xff\xfe", "a.txt", [], "a.txt: cannot be read"), (b"", "a.txt", [], "no training text"), (b"x", "a.csv", [], "wanted .txt"),
    (b"not gzip", "a.txt.gz", [], "cannot be read"), (b"not parquet", "a.parquet", [], "cannot be read|pip install"),
    (b"x", "a.txt", ["--tokenizer=/nowhere"], "--tokenizer"), (b"x", "a.txt", ["--tokenizer=gpt2", "--gpt2=/nowhere"], "--gpt2=/nowhere|pip install"),
    (b"x", "a.txt", ["--vocab_size=9"], "--vocab_size=9"), (b"x", "a.txt", ["--val=0.1", "--val_tail=0.1"], "--val"),
    (b"x", "a.txt", ["--files=("], "--files"), (b"x", "a.txt", ["--job=1"], "--job")])
def test_what_cannot_be_is_one_sentence(tmp_path, content, name, flags, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=words) as caught:
        prepare.main([str(tmp_path / name), f"--out={tmp_path}/out", "--tokenizer=bytes", *flags])
    assert "\n" not in str(caught.value) and not [*tmp_path.glob("out/*.bin")]


def test_a_missing_source_ends_with_exit_code_2():
    done = subprocess.run([sys.executable, "-m", "scripts.prepare", "nowhere.txt", "--out=x"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere.txt: no file") and done.stderr.count("\n") == 1 and not done.stdout
