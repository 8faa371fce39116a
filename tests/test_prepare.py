"""scripts/text.py and scripts/prepare.py.

Tokenizers are held against a BPE written here, shards against documents cut by hand.
"""

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
from train import ROOT, UsageError, command, open_shards

WANTED = "pip install -r scripts/requirements.txt"
needs_tokenizers = functools.partial(pytest.importorskip, "tokenizers", reason=WANTED)
ODD = "héllo 中文 😀 <|endoftext|>\t\x00 \r\n  don't they'll 123\u0301  \n\nend \x85\xa0\u2028"
BPE = ["--tokenizer=bpe", "--vocab_size=300"]


def documents(seed, num_docs, num_words=40):
    rng = random.Random(seed)
    docs = []
    for _ in range(num_docs):
        count = rng.randint(1, num_words)
        words = ("".join(rng.choices("abcdefgh", k=rng.randint(1, 8))) for _ in range(count))
        docs.append(" ".join(words) + rng.choice(["", "\n", " é😀", "\n\nmore\n"]))
    return docs


def write_jsonl(path, texts, field="text"):
    lines = [json.dumps({field: text, "id": i}) + "\n" for i, text in enumerate(texts)]
    path.write_text("".join(lines))
    return str(path)


def run(sources, out, *flags):
    """The files that prepare makes."""
    assert prepare.main([*map(str, sources), f"--out={out}", *flags]) == 0
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def tokens(out, split="train"):
    return np.concatenate(open_shards(f"{out}/{split}_*.bin").tokens).tolist()


def is_val(document, share=0.01):
    return int(hashlib.sha256(document.encode()).hexdigest()[:16], 16) < share * 16**16


def as_bytes(texts):
    """The tokens of documents with --tokenizer=bytes."""
    return [token for text in texts for token in (256, *text.encode())]


# ---- Tokenizers ----------------------------------------------------------------------------------

MERGES = ["t h", "th e", "Ġ the", "1 2", "l l", "' ll", "Ċ Ċ", "Ã ©"]  # last: newlines, é
WORD = r"'(?:[sdmt]|ll|ve|re)| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+|\s+(?!\S)|\s+"


def made_up_gpt2(folder, names=text.GPT2_FILES[0]):
    """Files in GPT-2's form: bytes in the order of the published encoder.py, merges, the BOS.

    Returns ({byte: letter}, {piece: id}), 265 ids.
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = shown + [i for i in range(256) if i not in shown]
    letters = [chr(i) for i in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    merged = [merge.replace(" ", "") for merge in MERGES]
    ids = {piece: i for i, piece in enumerate([*letters, *merged, "<|endoftext|>"])}
    folder.mkdir(exist_ok=True)
    (folder / names[0]).write_text(json.dumps(ids))
    (folder / names[1]).write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    return dict(zip(order, letters, strict=True)), ids


def bpe_by_hand(line, letters, ids):
    """GPT-2's algorithm for ASCII text: its regular expression, then the merge of least rank."""
    found = []
    for word in re.findall(WORD, line):
        parts = [letters[byte] for byte in word.encode()]
        while True:
            pairs = [f"{left} {right}" for left, right in zip(parts, parts[1:], strict=False)]
            ranks = [MERGES.index(pair) for pair in pairs if pair in MERGES]
            if not ranks:
                break
            left, right = MERGES[min(ranks)].split(" ")
            merged = []
            while parts:
                both = parts[:2] == [left, right]
                merged.append("".join(parts[: 1 + both]))
                parts = parts[1 + both :]
            parts = merged
        found += [ids[part] for part in parts]
    return found


@pytest.fixture
def each_kind(tmp_path):
    """The meta.json of each kind of tokenizer; their files lie in tmp_path."""
    needs_tokenizers()
    made_up_gpt2(tmp_path)
    (tmp_path / "characters.json").write_text(json.dumps("".join(sorted(set(ODD)))))
    trained = text.train_bpe([ODD, "the end of the end " * 9], 280)
    (tmp_path / "tokenizer.json").write_text(trained.to_str())
    size = len(set(ODD))
    rows = [("bytes", 257, 256), ("gpt2", 265, 264), ("tokenizer.json", 280, 0)]
    rows.append(("characters.json", size + 1, size))
    return {row[0]: dict(zip(text.BYTES, row, strict=True)) for row in rows}


def test_every_tokenizer_spells_any_text_without_loss(each_kind, tmp_path):
    for meta in each_kind.values():
        tokenizer = text.open_tokenizer(meta, tmp_path)
        size, bos = meta["vocab_size"], meta["bos_id"]
        rng = random.Random(1)
        lines = ["".join(rng.choices(ODD, k=rng.randint(1, 60))) for _ in range(50)]
        for line in [ODD, "", *lines]:
            ids = tokenizer.encode(line)
            assert bos not in ids and all(0 <= i < size for i in ids)
            assert tokenizer.decode([bos, *ids, 0xFFFF, bos, size]) == line
            assert tokenizer.token_bytes[ids].sum() == len(line.encode())
        assert len(tokenizer.token_bytes) == size and tokenizer.token_bytes[bos] == 0
        assert len(tokenizer.encode("<|endoftext|>")) > 1  # a text's letters are never a BOS
    assert text.open_tokenizer(text.BYTES, None).decode([104, 0xC3, 105]) == "h\ufffdi"


def test_gpt2_is_read_as_its_files_say(tmp_path):
    needs_tokenizers()
    rng = random.Random(2)
    for i, names in enumerate(text.GPT2_FILES):
        letters, ids = made_up_gpt2(tmp_path / str(i), names)
        meta = {"tokenizer": "gpt2", "vocab_size": 265, "bos_id": 264}
        tokenizer = text.open_tokenizer(meta, tmp_path / str(i))
        lines = ["".join(rng.choices("the l'12\n.,s", k=80)) for _ in range(100)]
        for line in ["the then they'll 1212\n\n\nthe  the", *lines]:
            assert tokenizer.encode(line) == bpe_by_hand(line, letters, ids)
        assert tokenizer.pieces[ids["Ã©"]] == "é".encode()


def test_a_tokenizer_that_cannot_be_opened_is_one_sentence(each_kind, tmp_path, monkeypatch):
    def refused(meta, words, folder=tmp_path):
        with pytest.raises(UsageError, match=words) as caught:
            text.open_tokenizer(meta, folder).encode("the ß")
        assert "\n" not in str(caught.value)

    refused(each_kind["characters.json"], r"'ß' \(U\+00DF\)")
    refused(each_kind["gpt2"] | {"vocab_size": 50257}, "has 265 ids, but")
    refused(each_kind["tokenizer.json"] | {"bos_id": 3}, "bos_id=3")
    refused(each_kind["bytes"] | {"tokenizer": "nowhere.json"}, "nowhere.json")
    refused(each_kind["bytes"] | {"tokenizer": "vocab.bpe"}, "vocab.bpe")
    outside = each_kind["characters.json"] | {"tokenizer": f"../{tmp_path.name}/characters.json"}
    refused(outside, "wanted the tokenizer", tmp_path / "in")
    (tmp_path / "tokenizer.json").write_text('{"model": 7}')
    refused(each_kind["tokenizer.json"], "wanted a byte-level BPE")

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    refused(each_kind["gpt2"], "--gpt2=DIR, a folder of encoder.json", tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(each_kind["gpt2"], WANTED)


# ---- What goes where -----------------------------------------------------------------------------


def test_shards_hold_every_document_once_in_order_each_side_by_its_hash(tmp_path):
    texts = documents(1, 900) + ["", "half a pair: "] + documents(1, 50)  # the last 50 are copies
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    out = tmp_path / "out"
    run([source], out, "--tokenizer=bytes", "--val=0.1", "--shard_tokens=20000")
    train = as_bytes(text for text in texts if text and not is_val(text, 0.1))
    val = as_bytes(text for text in texts if text and is_val(text, 0.1))
    assert tokens(out) == train and tokens(out, "val") == val
    assert 0.05 < len(val) / len(train) < 0.2
    shards = open_shards(f"{out}/train_*.bin")
    assert shards.meta == text.BYTES and len(shards.tokens) > 3
    for ids in shards.tokens[:-1]:
        assert ids[0] == 256 and 20000 <= len(ids) < 21500


def test_every_kind_of_file_gives_the_same_shards(tmp_path):
    texts, folder = [text.replace("|", "") for text in documents(2, 300)], tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", texts[:100], "body")
    lines = "".join(json.dumps({"body": text}) + "\n\n" for text in texts[100:])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "README.md").write_text("no data")
    (tmp_path / "a.txt").write_text("|".join(texts[:100]), newline="")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("|".join(texts[100:]).encode()))
    pa = pytest.importorskip("pyarrow", reason=WANTED)
    parquet = pytest.importorskip("pyarrow.parquet", reason=WANTED)
    table = pa.table({"n": [*range(301)], "body": [*texts, None]})
    parquet.write_table(table, tmp_path / "c.parquet", row_group_size=70)
    cases = [
        ([folder], "--field=body"),
        ([folder / "a.jsonl", f"{folder}/*.gz"], "--field=body"),
        ([tmp_path / "a.txt", tmp_path / "b.txt.gz"], "--separator=|"),
        ([tmp_path / "c.parquet"], "--field=body"),
    ]
    for i, (given, flag) in enumerate(cases):
        run(given, tmp_path / f"out{i}", "--tokenizer=bytes", "--val=0.1", flag)
        wanted = as_bytes(text for text in texts if not is_val(text, 0.1))
        assert tokens(tmp_path / f"out{i}") == wanted
    with pytest.raises(UsageError, match="no column 'text'; --field can be n, body"):
        run([tmp_path / "c.parquet"], tmp_path / "other", "--tokenizer=bytes")


def test_the_last_share_of_a_text_is_for_validation(tmp_path, monkeypatch, capsys):
    """As nanoGPT cuts tiny Shakespeare, here in small pieces, one of which may end at the cut."""
    source = tmp_path / "play.txt"
    play = "\r\n".join(documents(3, 60)) + "\nZ"
    for i, (whole, piece, share) in enumerate(((play, 100, 0.1), ("abcd\n" * 10, 5, 0.5))):
        monkeypatch.setattr(prepare, "PIECE", piece)
        source.write_bytes(whole.encode())
        out, first = tmp_path / str(i), int((1 - share) * len(whole))
        files = run([source], out, "--tokenizer=chars", f"--val_tail={share}", "--jobs=1")
        alphabet = sorted(set(whole))
        assert set(files) == {"train_000000.bin", "val_000000.bin", "characters.json", "meta.json"}
        for split, part in (("train", whole[:first]), ("val", whole[first:])):
            assert tokens(out, split) == [len(alphabet), *map(alphabet.index, part)]
        assert f"--val_tokens={len(whole) - first} " in capsys.readouterr().out
    with pytest.raises(UsageError, match="wanted one .txt that is one document"):
        run([source] * 2, tmp_path / "two", "--val_tail=0.1")


def test_pieces_of_a_long_text_are_encoded_as_the_whole_would_be(tmp_path, monkeypatch):
    needs_tokenizers()
    monkeypatch.setattr(prepare, "PIECE", 150)
    parts = ["the ", "end", "\n", "\n\n", " \n", "\n ", "12", "'ll", "é", ". ", "\r\n"]
    whole = "".join(random.Random(4).choices(parts, k=4000))
    source, out = tmp_path / "a.txt", tmp_path / "out"
    source.write_bytes(whole.encode())
    run([source], out, *BPE, "--val=0", "--jobs=1")
    tokenizer = text.open_tokenizer(open_shards(f"{out}/train_*.bin").meta, out)
    assert tokens(out) == [0, *tokenizer.encode(whole)]
    cuts = [*prepare.cut(open(source, encoding="utf-8", newline=""))]
    assert "".join(cuts) == whole and len(cuts) > 30 and max(map(len, cuts)) < 1000
    nowhere_to_cut = open(write_jsonl(tmp_path / "b", ["x" * 9000]))
    assert len(next(prepare.cut(nowhere_to_cut))) == 17 * 150


def test_a_tokenizer_of_shards_serves_other_text(tmp_path):
    needs_tokenizers()
    one = write_jsonl(tmp_path / "1.jsonl", documents(5, 200))
    two = write_jsonl(tmp_path / "2.jsonl", documents(6, 200))
    first = run([one], tmp_path / "one", *BPE)
    again = run([two], tmp_path / "two", f"--tokenizer={tmp_path}/one")
    assert first["tokenizer.json"] == again["tokenizer.json"]
    tokenizer = text.open_tokenizer(open_shards(f"{tmp_path}/two/*.bin").meta, tmp_path / "two")
    assert tokenizer.vocab_size == 300
    wanted = "".join(text for text in documents(6, 200) if not is_val(text))
    assert tokenizer.decode(tokens(tmp_path / "two")) == wanted


# ---- Stopped and continued -----------------------------------------------------------------------


def test_missing_and_damaged_shards_are_made_again_and_another_recipe_is_refused(tmp_path, capsys):
    source, out = write_jsonl(tmp_path / "a.jsonl", documents(7, 600)), tmp_path / "out"
    flags = ["--tokenizer=chars", "--val=0.2", "--shard_tokens=8000"]
    files = run([source], out, *flags)
    (out / "train_000001.bin").unlink()
    (out / "val_000000.bin").write_bytes(files["val_000000.bin"][:-2])
    (out / "train_000003.77777").write_bytes(b"half")  # of a run that was killed
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    capsys.readouterr()
    assert run([source], out, *flags) == files and len(files) > 7
    changed = {name for name in kept if (out / name).stat().st_mtime_ns != kept[name]}
    assert changed == {"val_000000.bin"}
    printed = capsys.readouterr().out
    made = re.findall(r"^(\S+\.bin): \d+ tokens", printed, re.M)
    assert sorted(made) == ["train_000001.bin", "val_000000.bin"]
    assert f"({len(kept) - 1} were there)" in printed

    def refused(words, *other):
        with pytest.raises(UsageError, match=words):
            run([source], out, *flags, *other)

    refused("another tokenizer: chars, not bytes", "--tokenizer=bytes")
    refused("another val: 0.2, not 0.5", "--val=0.5")
    write_jsonl(tmp_path / "a.jsonl", documents(7, 601))
    refused("another sources")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    (out / "meta.json").unlink()
    refused("shards without a meta.json")


def alive(group):
    try:
        os.killpg(group, 0)
        return True
    except (ProcessLookupError, PermissionError):
        return False


@pytest.mark.system
def test_killed_it_continues_and_several_processes_write_what_one_writes(tmp_path, monkeypatch):
    needs_tokenizers()
    monkeypatch.setattr(prepare, "PIECE", 1 << 13)  # small: processes even for little text
    texts = documents(8, 300)
    many = [f"{i} {text}" for i in range(300) for text in texts[i % 7 :: 6]]
    source, out = write_jsonl(tmp_path / "a.jsonl", many), tmp_path / "killed"
    flags = [source, *BPE, "--shard_tokens=60000", "--bpe_mib=1"]
    whole = run([], tmp_path / "whole", *flags, "--jobs=1")
    driver = "import scripts.prepare as p, sys; p.PIECE = 1 << 13; p.main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", driver, *flags, f"--out={out}", "--jobs=2"],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and len([*out.glob("*.bin")]) < 3:
        time.sleep(0.005)
    process.kill()
    process.wait()
    there = {path.name: path.read_bytes() for path in out.glob("*.bin")}
    assert 3 <= len(there) < sum(name.endswith(".bin") for name in whole)
    assert there.items() <= whole.items()
    for _ in range(400):  # the workers go with it
        if not alive(process.pid):
            break
        time.sleep(0.05)
    assert not alive(process.pid)
    assert run([], out, *flags, "--jobs=1") == whole


# ---- The network, a fake of it -------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A fake Hub: {repo: {revision: names of its files}}, whose N.parquet is tmp_path's."""
    theirs = {}

    class Api:
        def dataset_info(self, repo, revision, files_metadata):
            if repo not in theirs:
                raise OSError("404")
            names = theirs[repo].get(revision, [])
            siblings = [SimpleNamespace(rfilename=name, size=9) for name in names]
            return SimpleNamespace(sha=f"sha-{revision}", siblings=siblings)

    def hf_hub_download(repo, name, repo_type, revision):
        assert repo_type == "dataset" and revision.startswith("sha-")
        assert name in theirs[repo][None if revision == "sha-None" else revision[4:]]
        return str(tmp_path / f"{name[-9]}.parquet")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return theirs


def test_a_dataset_of_the_hub_is_its_parquet_files_or_those_made_of_it(tmp_path, hub):
    pa = pytest.importorskip("pyarrow", reason=WANTED)
    parquet = pytest.importorskip("pyarrow.parquet", reason=WANTED)
    texts = documents(10, 40)
    for i in range(2):
        table = pa.table({"text": texts[20 * i : 20 * i + 20]})
        parquet.write_table(table, tmp_path / f"{i}.parquet")
    own = ["data/train-1.parquet", "data/train-0.parquet", "data/test-0.parquet", "README.md"]
    made = ["default/train/0000.parquet", "default/train/0001.parquet"]
    hub["some/own"] = {None: own}
    hub["some/made"] = {None: ["train.csv"], "refs/convert/parquet": made}
    for repo, first in (
        ("some/own", "some/own@sha-None/data/train-0.parquet"),
        ("some/made", "some/made@sha-refs/convert/parquet/default/train/0000.parquet"),
    ):
        out = tmp_path / repo.replace("/", "-")
        run([repo], out, "--tokenizer=bytes", "--val=0")
        assert tokens(out) == as_bytes(texts)
        recipe = json.loads((out / "meta.json").read_text())["recipe"]
        assert recipe["sources"][0] == [first, 9] and len(recipe["sources"]) == 2
    for argv, words in (
        (["some/none"], "neither a file here nor to be had from the Hub"),
        (["some/own", "--files=nope"], "matches --files=nope"),
    ):
        with pytest.raises(UsageError, match=words):
            run(argv, tmp_path / "none", "--tokenizer=bytes")


class Site(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path != "/short.txt":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"cut off")


def test_a_url_is_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "www").mkdir()
    (tmp_path / "www/input.txt").write_text("to be or not to be")
    handler = functools.partial(Site, directory=str(tmp_path / "www"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url, out = f"http://127.0.0.1:{server.server_port}", tmp_path / "out"
    flags = ["--tokenizer=chars", "--val_tail=0.5"]
    with pytest.raises(UsageError, match="nothing.txt: cannot be fetched .*404"):
        run([f"{url}/nothing.txt"], out, *flags)
    with pytest.raises(UsageError, match="ended 93 bytes early"):
        run([f"{url}/short.txt"], out, *flags)
    files = run([f"{url}/input.txt"], out, *flags)
    server.shutdown()
    server.server_close()
    assert run([f"{url}/input.txt"], out, *flags) == files
    assert json.loads(files["characters.json"]) == " benort"
    assert tokens(out) == [7, *map(" benort".index, "to be or ")]


# ---- Report, errors ------------------------------------------------------------------------------


def test_the_report_counts_validation_text(tmp_path, capsys, monkeypatch):
    needs_tokenizers()
    letters, ids = made_up_gpt2(tmp_path / "gpt2")
    monkeypatch.setattr(prepare, "GPT2", text.GPT2 | {"vocab_size": 265, "bos_id": 264})
    texts = documents(11, 400, 30)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    prepare.main([source, "--report=bytes,chars,bpe:290", f"--gpt2={tmp_path}/gpt2", "--val=0.3"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    val = [text for text in texts if is_val(text, 0.3)]
    size, chars = sum(len(text.encode()) for text in val), sum(map(len, val))
    gpt2 = 0
    for doc in val:  # " é😀" is a space, one merged pair and four bytes
        gpt2 += len(bpe_by_hand(doc.replace(" é😀", ""), letters, ids)) + 6 * (" é" in doc)
    alphabet = str(len(set("".join(texts))) + 1)
    assert rows[0] == ["gpt2", "265", str(gpt2), f"{size / gpt2:.3f}", "1.000"]
    assert rows[1] == ["bytes", "257", str(size), "1.000", f"{size / gpt2:.3f}"]
    assert rows[2] == ["chars", alphabet, str(chars), f"{size / chars:.3f}", f"{chars / gpt2:.3f}"]
    assert rows[3][:2] == ["bpe:290", "290"] and int(rows[3][2]) < size
    assert {path.name for path in tmp_path.iterdir()} == {"gpt2", "a.jsonl"}


def test_what_cannot_be_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    def refused(content, name, words, *flags):
        (tmp_path / name).write_bytes(content)
        out = f"--out={tmp_path}/out{len([*tmp_path.iterdir()])}"  # a new one
        argv = [f"{tmp_path}/{name}", out, "--tokenizer=bytes", *flags]
        assert command(lambda: prepare.main(argv)) == 2
        said = capsys.readouterr().err
        assert re.match(f"error: .*({words})", said) and said.count("\n") == 1
        assert not [*tmp_path.glob("out*/*.bin")]

    refused(b'{"text": 3}\n', "a.jsonl", "line 1: no text 'text'")
    refused(b'{"text": "x"}\n{"te', "a.jsonl", "cannot be read")
    refused(b"\xff\xfe", "a.txt", "a.txt: cannot be read")
    refused(b"", "a.txt", "no training text")
    refused(b"x", "a.csv", "wanted .txt")
    refused(b"not gzip", "a.txt.gz", "cannot be read")
    refused(b"x", "a.txt", "--tokenizer=/nowhere", "--tokenizer=/nowhere")
    refused(b"x", "a.txt", "--gpt2=/nowhere|pip install", "--tokenizer=gpt2", "--gpt2=/nowhere")
    refused(b"x", "a.txt", "--vocab_size=9: wanted 257 to 65534", "--vocab_size=9")
    refused(b"x", "a.txt", "--files", "--files=(")
    refused(b"x", "a.txt", "--job=1", "--job=1")
    assert command(lambda: prepare.main(["nowhere.txt", "--out=x"])) == 2
    assert capsys.readouterr().err.startswith("error: nowhere.txt: no file")
