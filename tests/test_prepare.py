"""scripts/text.py, scripts/reading.py and scripts/prepare.py.

Tokenizers are held against a BPE written here, shards against documents cut by hand.
"""

import functools
import gzip
import hashlib
import json
import os
import random
import re
import shlex
import signal
import socketserver
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest

from scripts import prepare, reading, text
from train import (
    BYTES_META,
    GPT2_META,
    ROOT,
    UsageError,
    command,
    open_data,
    open_shards,
    owning,
    parse_flags,
    read_meta,
)

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
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}


def fails(words, sources, out, *flags):
    """What prepare says where it ends with exit code 2: one sentence, which has the words."""
    with pytest.raises(UsageError, match=words) as caught:
        prepare.main([*map(str, sources), f"--out={out}", *flags])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def hash_of(*paths):
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


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
    rows = [("bytes", 257, 256), ("gpt2", 265, 264, "encoder.json", "vocab.bpe")]
    rows.append(("tokenizer.json", 280, 0, "tokenizer.json"))
    rows.append(("characters.json", size + 1, size, "characters.json"))
    metas = {}
    for facts in rows:
        digest = hash_of(*(tmp_path / name for name in facts[3:]))
        metas[facts[0]] = dict(zip(GPT2_META, [*facts[:3], digest], strict=True))
    return metas


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
    assert text.open_tokenizer(BYTES_META, None).decode([104, 0xC3, 105]) == "h\ufffdi"


def test_gpt2_is_read_as_its_files_say(tmp_path):
    needs_tokenizers()
    rng = random.Random(2)
    for i, names in enumerate(text.GPT2_FILES):
        letters, ids = made_up_gpt2(tmp_path / str(i), names)
        digest = hash_of(*(tmp_path / str(i) / name for name in names))
        meta = dict(zip(GPT2_META, ("gpt2", 265, 264, digest), strict=True))
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
    (tmp_path / "tokenizer.json").write_text('{"model": 7}')
    refused(each_kind["tokenizer.json"], "another tokenizer")
    refused(each_kind["tokenizer.json"] | {"tokenizer_sha256": ""}, "wanted a byte-level BPE")
    odd = {"bytes": "\xff", "alphabet": '"\\ud800"', "list": "[1]", "number": '{"a": 1e9}'}
    odd["prefix"] = '{"model": {"type": "BPE", "continuing_subword_prefix": "longer than a merge"}}'
    for name, content in odd.items():
        (tmp_path / f"{name}.json").write_text(content, encoding="latin-1")
        refused({"tokenizer": f"{name}.json", "vocab_size": 9, "bos_id": 0}, f"{name}.json: wanted")
    (tmp_path / "encoder.json").write_text('{"a": 99999999}')  # no list of so many is made
    refused(each_kind["gpt2"] | {"tokenizer_sha256": ""}, "wanted GPT-2's vocabulary")

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    refused(each_kind["gpt2"], "--gpt2=DIR, a folder of encoder.json", tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(each_kind["gpt2"] | {"tokenizer_sha256": ""}, WANTED)


OUTSIDE = ("../dot", "../x.json", "/etc/x.json", "a/x.json", "..", "", "a\\x.json", "\0.json")
NOT_OURS = (".x.json", "meta.json", "train_000000.bin", "link.json")


def test_a_tokenizer_is_a_file_beside_its_shards_or_it_is_neither_read_nor_written(tmp_path):
    package, out = tmp_path / "package", tmp_path / "home/out"
    (package / "shards/a").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/dot").write_text("mine")
    for path in ("dot", "x.json", "shards/a/x.json", "shards/.x.json", "shards/real.jsn"):
        (package / path).write_text('"abc"')
    (package / "shards/link.json").symlink_to("real.jsn")
    (tmp_path / "a.txt").write_text("abcabc")

    def refuse(name):
        meta = dict(zip(GPT2_META, (name, 4, 3, hash_of(package / "dot")), strict=True))
        (package / "shards/meta.json").write_text(json.dumps(meta))
        words = re.escape(repr(name)) + "|a link"
        fails(words, [tmp_path / "a.txt"], out, f"--tokenizer={package}/shards")
        with pytest.raises(UsageError, match=words):
            text.open_tokenizer(meta, package / "shards")

    for name in OUTSIDE + NOT_OURS:
        refuse(name)
    assert not out.exists() and (tmp_path / "home/dot").read_text() == "mine"
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["dot"]


def test_another_tokenizer_of_the_same_name_and_size_is_refused(tmp_path, capsys):
    """A tokenizer is its files: meta.json holds their SHA-256."""
    needs_tokenizers()
    made_up_gpt2(tmp_path / "gpt2")
    kinds = {"bytes": [], "chars": ["characters.json"], "bpe": ["tokenizer.json"]}
    for seed in "12":
        texts = documents(int(seed), 100) + list("(){}[]" + seed)
        source = write_jsonl(tmp_path / f"{seed}.jsonl", texts)
        for kind, names in kinds.items():
            out = tmp_path / (kind + seed)
            run([source], out, f"--tokenizer={kind}", "--vocab_size=300", "--val=0.3")
            meta = read_meta(out / "meta.json")
            assert meta["tokenizer_sha256"] == hash_of(*(out / name for name in names))
    for kind, names in list(kinds.items())[1:]:
        one, two = (tmp_path / f"{kind}{seed}" for seed in "12")
        meta, other = (read_meta(folder / "meta.json") for folder in (one, two))
        assert meta | {"tokenizer_sha256": 0} == other | {"tokenizer_sha256": 0} and meta != other
        with pytest.raises(UsageError, match="another tokenizer.*SHA-256"):
            text.open_tokenizer(meta, two)
        capsys.readouterr()
        older = text.open_tokenizer(meta | {"tokenizer_sha256": ""}, two)
        assert older.sha256 == other["tokenizer_sha256"]
        assert capsys.readouterr().err.startswith("warning: ")
        (one / names[0]).write_bytes((two / names[0]).read_bytes())  # in place of its own
        (one / "train_000000.bin").unlink()
        fails("another tokenizer", [source], tmp_path / "copy", f"--tokenizer={one}")
        flags = [f"--tokenizer={kind}", "--vocab_size=300", "--val=0.3"]
        fails("another tokenizer", [tmp_path / "1.jsonl"], one, *flags)
        assert not (one / "train_000000.bin").exists() and not (tmp_path / "copy").exists()


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
    assert shards.meta == BYTES_META and len(shards.tokens) > 3
    for ids in shards.tokens[:-1]:
        assert ids[0] == 256 and 20000 <= len(ids) < 21500


def test_every_kind_of_file_gives_the_same_shards(tmp_path, capsys):
    texts, folder = [text.replace("|", "") for text in documents(2, 300)], tmp_path / "in"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", texts[:100], "body")
    lines = "".join(json.dumps({"body": text}) + "\n\n" for text in [*texts[100:], None, ""])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "README.md").write_text("no data")
    (tmp_path / "a.txt").write_text("|".join(texts[:100]), newline="")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("|".join(texts[100:]).encode()))
    pa = pytest.importorskip("pyarrow", reason=WANTED)
    parquet = pytest.importorskip("pyarrow.parquet", reason=WANTED)
    table = pa.table({"n": [*range(302)], "body": [*texts, None, ""]})
    parquet.write_table(table, tmp_path / "c.parquet", row_group_size=70)
    cases = [
        ([folder], "--field=body"),
        ([folder / "a.jsonl", f"{folder}/*.gz"], "--field=body"),
        ([tmp_path / "a.txt", tmp_path / "b.txt.gz"], "--separator=|"),
        ([tmp_path / "c.parquet"], "--field=body"),
    ]
    for i, (given, flag) in enumerate(cases):
        capsys.readouterr()
        run(given, tmp_path / f"out{i}", "--tokenizer=bytes", "--val=0.1", flag)
        wanted = as_bytes(text for text in texts if not is_val(text, 0.1))
        assert tokens(tmp_path / f"out{i}") == wanted
        passed = 0 if ".txt" in str(given) else 2  # between separators nothing is a document
        assert f"documents: 300 ({passed} null or empty" in capsys.readouterr().out
    for name, kind in (("text", "not there"), ("n", "int64")):
        flags = ["--tokenizer=bytes", f"--field={name}"]
        words = f"'{name}' is {kind}.*--field can be body"
        fails(words, [tmp_path / "c.parquet"], tmp_path / "other", *flags)


def test_each_file_is_read_once_however_it_is_reached(tmp_path, capsys, monkeypatch):
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "b/c").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    write_jsonl(folder / "a.jsonl", ["one"])
    write_jsonl(folder / "b/c/z.jsonl", ["two"])
    write_jsonl(folder / ".hidden/x.jsonl", ["three"])
    (folder / "README.md").write_text("no data")
    (folder / "b/c/up").symlink_to(folder)  # a loop
    (folder / "self").symlink_to(".")
    (folder / "link.jsonl").symlink_to("a.jsonl")
    os.link(folder / "a.jsonl", folder / "hard.jsonl")
    (folder / "gone.jsonl").symlink_to("nowhere")
    (folder / "round.jsonl").symlink_to("round.jsonl")
    monkeypatch.chdir(tmp_path)
    given = [folder, "in", f"{folder}/", "in/a.jsonl", f"{folder}/*.jsonl", folder / "self/self"]
    run(given, out, "--tokenizer=bytes", "--val=0")
    assert tokens(out) == as_bytes(["one", "two"])
    said = capsys.readouterr().out
    assert "\n2 files" in said
    for why in ("hidden", "of another kind", "reached before", "no file, or a link to none"):
        assert f"passed over, {why}: " in said
    fails("Only the last part of a path is a pattern", [f"{tmp_path}/i?/*.jsonl"], tmp_path / "no")


AWKWARD = ("data[1]", "a 'b' \"c\"", "*?", "d\u00e9\u4e2d $HOME `x`", "-x;#")


def test_awkward_folders_are_read_and_the_printed_command_names_them(tmp_path, capsys):
    for i, name in enumerate(AWKWARD):
        folder = tmp_path / str(i) / name
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text("right one|" * 200 + "right two|" * 200)
        for other in ("data1", "xx"):  # which the name as a pattern would match
            (tmp_path / str(i) / other).mkdir()
            (tmp_path / str(i) / other / "a.txt").write_text("wrong|" * 400)
        out = folder / name
        run([folder], out, "--tokenizer=bytes", "--val_tail=0.5")
        said = capsys.readouterr().out
        python, file, *flags = shlex.split(re.search("^next: (.*)", said, re.M)[1])
        cfg = parse_flags(flags)
        assert (python, file, cfg.preset) == ("python", "train.py", "demo")
        train, val, cfg, note = open_data(cfg)  # it is enough for a run of the demo
        assert cfg.val_tokens == 2000 and "tokens read" in note
        for shards, half in ((train, "right one|"), (val, "right two|")):
            assert shards.tokens[0].tolist() == as_bytes([half * 200])


def test_tens_of_thousands_of_files_make_a_folder_that_is_read_again(tmp_path):
    """A meta.json of more than a MiB, here of long names in JSON."""
    (tmp_path / "in").mkdir()
    for i in range(1500):
        (tmp_path / "in" / ("\u00e9" * 120 + f"{i}.txt")).write_text(f"document {i}")
    files = run([tmp_path / "in"], tmp_path / "out", "--tokenizer=bytes", "--val=0.05")
    assert len(files["meta.json"]) > 1 << 20
    shards = open_shards(f"{tmp_path}/out/*.bin")
    assert shards.meta == BYTES_META and sum(map(len, shards.tokens)) > 1500 * 10


def test_a_byte_order_mark_is_no_text_and_a_separator_matches_both_line_ends(tmp_path):
    bom, lines = b"\xef\xbb\xbf", "one\r\n\r\ntwo\r\nmore\r\n\r\n\r\nthr\ufeffee\n\nfour\r\n"
    wanted = ["one", "two\r\nmore", "\r\nthr\ufeffee", "four\r\n"]
    packed = gzip.compress(bom + lines.encode())
    rows = [json.dumps({"text": text}).encode() for text in wanted]
    for i, (name, content) in enumerate(
        {
            "a.txt": bom + lines.encode(),
            "a.txt.gz": packed,
            "a.jsonl": bom + b"\r\n".join(rows),
        }.items()
    ):
        (tmp_path / name).write_bytes(content)
        for separator in (r"\n\n", r"\r\n\r\n", "\n\n"):
            out = tmp_path / f"{i}{len(separator)}"
            flags = ["--tokenizer=bytes", f"--separator={separator}", "--val=0"]
            run([tmp_path / name], out, *flags)
            assert tokens(out) == as_bytes(wanted)
    run([tmp_path / "a.txt"], tmp_path / "whole", "--tokenizer=chars", "--val=0")
    alphabet = sorted(set(lines))
    wanted = [len(alphabet), *map(alphabet.index, lines)]
    assert tokens(tmp_path / "whole") == wanted


def test_the_last_share_of_a_text_is_for_validation(tmp_path, monkeypatch, capsys):
    """As nanoGPT cuts tiny Shakespeare, here in small pieces, one of which may end at the cut."""
    source = tmp_path / "play.txt"
    play = "\r\n".join(documents(3, 60)) + "\nZ"
    for i, (whole, piece, share) in enumerate(((play, 100, 0.1), ("abcd\n" * 10, 5, 0.5))):
        monkeypatch.setattr(reading, "PIECE", piece)
        source.write_bytes(whole.encode())
        out, first = tmp_path / str(i), int((1 - share) * len(whole))
        files = run([source], out, "--tokenizer=chars", f"--val_tail={share}", "--jobs=1")
        alphabet = sorted(set(whole))
        assert set(files) == {"train_000000.bin", "val_000000.bin", "characters.json", "meta.json"}
        for split, part in (("train", whole[:first]), ("val", whole[first:])):
            assert tokens(out, split) == [len(alphabet), *map(alphabet.index, part)]
        assert f"--val_tokens={len(whole) - first} " in capsys.readouterr().out
    (tmp_path / "other.txt").write_text("a second")
    two = [source, tmp_path / "other.txt"]
    fails("wanted one .txt that is one document", two, tmp_path / "two", "--val_tail=0.1")


def test_pieces_of_a_long_text_are_encoded_as_the_whole_would_be(tmp_path, monkeypatch):
    needs_tokenizers()
    monkeypatch.setattr(reading, "PIECE", 150)
    parts = ["the ", "end", "\n", "\n\n", " \n", "\n ", "12", "'ll", "é", ". ", "\r\n"]
    whole = "".join(random.Random(4).choices(parts, k=4000))
    source, out = tmp_path / "a.txt", tmp_path / "out"
    source.write_bytes(whole.encode())
    run([source], out, *BPE, "--val=0", "--jobs=1")
    tokenizer = text.open_tokenizer(open_shards(f"{out}/train_*.bin").meta, out)
    assert tokens(out) == [0, *tokenizer.encode(whole)]
    cuts = [*reading.cut(reading.in_blocks(whole))]
    assert "".join(cuts) == whole and len(cuts) > 30 and max(map(len, cuts)) < 1000
    assert len(next(reading.cut(reading.in_blocks("x" * 9000)))) == 17 * 150


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


def test_a_bpe_of_long_words_takes_seconds_and_of_ordinary_text_is_the_plain_one():
    tokenizers = needs_tokenizers()
    texts = documents(12, 300) + [ODD, "\u4e2d\u6587" * 80]
    ours = text.train_bpe(texts, 400)
    plain = tokenizers.ByteLevelBPETokenizer()  # the library's own; its id 0 is a letter
    plain.train_from_iterator(texts, 400, min_frequency=0, show_progress=False)
    pieces = [piece for piece, _ in sorted(ours.get_vocab().items(), key=lambda item: item[1])]
    others = [piece for piece, _ in sorted(plain.get_vocab().items(), key=lambda item: item[1])]
    assert pieces[257:] == others[256:-1] and len(pieces) == 400
    dna = "".join(random.Random(13).choices("ACGT", k=400_000))
    began = time.perf_counter()
    tokenizer = text.train_bpe([dna, " " * 400_000], 400)
    assert time.perf_counter() - began < 60  # 100 s and more where a word has no bound
    assert tokenizer.decode(tokenizer.encode(dna[:5000]).ids) == dna[:5000]


def test_ctrl_c_is_heard_while_a_library_works():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    taken, working = [], threading.Event()

    def endless():
        while True:
            time.sleep(0.01)
            yield taken.append(0)

    def busy(texts):
        working.set()
        time.sleep(20 + len(list(texts)))

    for work in (list, busy):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        began = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            text.hearing_ctrl_c(work, endless() if work is list else [])
        assert time.perf_counter() - began < 10
    count = len(taken)
    time.sleep(0.1)
    assert len(taken) == count > 0 and working.is_set()


# ---- Stopped and continued -----------------------------------------------------------------------


def test_missing_and_damaged_shards_are_made_again_and_another_recipe_is_refused(tmp_path, capsys):
    source, out = write_jsonl(tmp_path / "a.jsonl", documents(7, 600)), tmp_path / "out"
    flags = ["--tokenizer=chars", "--val=0.2", "--shard_tokens=8000"]
    files = run([source], out, *flags)
    (out / "train_000001.bin").unlink()
    (out / "val_000000.bin").write_bytes(files["val_000000.bin"][:-2])
    (out / ".train_000003.bin.77777.part").write_bytes(b"half")  # of a run that was killed
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
    refused("holds characters.json without a meta.json")


def snapshot(folder):
    """All that lies in a folder, links not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        is_file = path.is_file() and not path.is_symlink()
        what = path.read_bytes() if is_file else os.readlink(path) if path.is_symlink() else None
        found[str(path.relative_to(folder))] = what
    return found


THEIRS = (
    "essays.2023.txt backup.7z train_000000.77777 train_000000.bin.77777 .train_000000.bin.5 "
    ".notes.txt.77777.part .train_0.bin.7.part train.bin train_x.bin val_000000.bin~ x.bin "
    ".meta.json.part .meta.json.1.part.bak meta.json.bak step-000001 .tokenizer.json.1.PART"
).split()


def test_what_others_have_put_into_the_folder_stays_as_it_is(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    source = write_jsonl(tmp_path / "a.jsonl", documents(14, 60))
    for name in THEIRS:
        (out / name).write_text(f"of the user: {name}")
    (out / ".val_000000.bin.7.part").mkdir()  # a folder of a name of ours
    (out / ".meta.json.7.part").symlink_to(tmp_path / "a.jsonl")  # and a link
    (out / "deep.5").mkdir()
    (out / "deep.5/train_000000.bin").write_text("mine")
    (out / "gone.5").symlink_to("nowhere")
    theirs = snapshot(out)
    flags = ["--tokenizer=chars", "--val=0.4"]
    (out / ".train_000000.bin.77777.part").write_text("of a killed process")
    run([source], out, *flags)
    run([source], out, *flags)
    made = {"train_000000.bin", "val_000000.bin", "characters.json", "meta.json"}
    assert {name: what for name, what in snapshot(out).items() if name not in made} == theirs
    (tmp_path / "b.jsonl").write_text("no json")
    fails("line 1", [tmp_path / "b.jsonl"], tmp_path / "new/folder", *flags)
    assert not (tmp_path / "new/folder").exists()
    for name in ("characters.json", "tokenizer.json", "train_000000.bin", "meta.json"):
        other = tmp_path / f"of {name}"
        other.mkdir()
        (other / name).symlink_to(out / name)  # tokenizer.json leads nowhere
        (other / "essay.1").write_text("mine")
        theirs = snapshot(other)
        fails(name, [source], other, *flags)
        assert snapshot(other) == theirs


def test_a_console_that_is_gone_does_not_stop_the_work(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", documents(16, 30))
    flags = ["--tokenizer=bytes", "--val=0.5"]
    whole = run([source], tmp_path / "whole", *flags)
    for name, closes in (("pipe", "| true"), ("closed", ">&-")):
        out = tmp_path / name
        argv = shlex.join([sys.executable, "-m", "scripts.prepare", source, f"--out={out}", *flags])
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {argv} {closes}"], cwd=ROOT, capture_output=True
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_a_second_process_in_the_same_folder_is_refused(tmp_path):
    source, out = write_jsonl(tmp_path / "a.jsonl", ["one"]), tmp_path / "out"
    with owning(out):
        fails("another process", [source], out, "--tokenizer=bytes", "--val=0")
        assert not [*out.iterdir()]
    run([source], out, "--tokenizer=bytes", "--val=0")


def alive(group):
    try:
        os.killpg(group, 0)
        return True
    except (ProcessLookupError, PermissionError):
        return False


@pytest.mark.system
def test_killed_it_continues_and_several_processes_write_what_one_writes(tmp_path, monkeypatch):
    needs_tokenizers()
    monkeypatch.setattr(reading, "PIECE", 1 << 13)  # small: processes even for little text
    texts = documents(8, 300)
    many = [f"{i} {text}" for i in range(300) for text in texts[i % 7 :: 6]]
    source, out = write_jsonl(tmp_path / "a.jsonl", many), tmp_path / "killed"
    flags = [source, *BPE, "--shard_tokens=60000", "--bpe_mib=1"]
    whole = run([], tmp_path / "whole", *flags, "--jobs=1")
    driver = "import scripts.prepare as p, sys; p.reading.PIECE = 1 << 13; p.main(sys.argv[1:])"
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
    for name in ("/etc/train.parquet", "../train.parquet", "a/../../train.parquet"):
        hub["some/out"] = {None: [name]}
        fails("named as one outside of it", ["some/out"], tmp_path / "none")
    for argv, words in (
        (["some/none"], "neither a file here nor to be had from the Hub"),
        (["some/own", "--files=nope"], "matches --files=nope"),
    ):
        with pytest.raises(UsageError, match=words):
            run(argv, tmp_path / "none", "--tokenizer=bytes")


TEXT = b"to be or not to be"
PACKED = gzip.compress(TEXT)
ANSWERS = {  # path: what the server sends
    "/gone.txt": b"HTTP/1.1 404 Not Found\r\n\r\n",
    "/short.txt": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\ncut off",
    "/chunk.txt": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\ncut off",
    "/size.txt": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n",
    "/ssh.txt": b"SSH-2.0-OpenSSH_9\r\n",
    "/none.txt": b"",
    "/head.txt": b"HTTP/1.1 200 OK\r\n" + b"X" * 99999,
    "/cut.txt": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + PACKED[:-9],
    "/bad.txt": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + TEXT,
    "/br.txt": b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\n\r\n" + TEXT,
    "/page.txt": b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html>Sign in",
    "/loop.txt": b"HTTP/1.1 302 Found\r\nLocation: /loop.txt\r\n\r\n",
    "/port.txt": b"HTTP/1.1 302 Found\r\nLocation: http://[::1/\r\n\r\n",
}
GOOD = {
    "/input.txt": b"HTTP/1.1 200 OK\r\n\r\n" + TEXT,
    "/gz.txt": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + PACKED,
    "/a.txt.gz": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + PACKED,
    "/my%20%C3%A9.txt?a=%20b/c": b"HTTP/1.1 200 OK\r\n\r\n" + TEXT,
    "/..%2F..%2Fup.txt": b"HTTP/1.1 200 OK\r\n\r\n" + TEXT,
    "/get?file=../../x.txt": b"HTTP/1.1 200 OK\r\n\r\n" + TEXT,
}


class Site(socketserver.StreamRequestHandler):
    def handle(self):
        path = self.rfile.readline().split()[1].decode()
        while self.rfile.readline().strip():
            pass
        self.server.asked.append(path)
        self.wfile.write((ANSWERS | GOOD)[path])


def test_a_url_is_fetched_once_whole_or_not_at_all(tmp_path, monkeypatch):
    cache = tmp_path / "ca[c]he"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Site)
    server.asked, server.daemon_threads = [], True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    base, out = f"http://127.0.0.1:{server.server_address[1]}", tmp_path / "out"
    flags = ["--tokenizer=chars", "--val_tail=0.5"]
    for path in ANSWERS:
        fails(f"{base}{path}: cannot be fetched", [base + path], out, *flags)
    fails("wanted .txt", [f"{base}/index.html"], out, *flags)
    for url in (
        "http:///x.txt",
        "http://[::1/x.txt",
        "https://a..b/x.txt",
        "http://127.0.0.1:x/a.txt",
    ):
        fails(".*: cannot be fetched", [url], out, *flags)
    assert not [path for path in cache.rglob("*") if path.is_file()] and not out.exists()
    for i, path in enumerate(GOOD):
        given = "/my \u00e9.txt?a= b/c" if "my" in path else path
        server.asked.clear()
        for _ in range(2):
            files = run([base + given], tmp_path / f"out{i}", *flags)
        assert server.asked == [path]
        assert json.loads(files["characters.json"]) == " benort"
        assert tokens(tmp_path / f"out{i}") == [7, *map(" benort".index, "to be or ")]
    server.shutdown()
    server.server_close()
    kept = [path for path in cache.rglob("*") if path.is_file()]
    assert len(kept) == len(GOOD) and {path.parents[1].name for path in kept} == {"text"}
    assert not [path for path in tmp_path.rglob("*.part")]


# ---- Report, errors ------------------------------------------------------------------------------


def test_the_report_counts_validation_text(tmp_path, capsys, monkeypatch):
    needs_tokenizers()
    letters, ids = made_up_gpt2(tmp_path / "gpt2")
    monkeypatch.setattr(prepare, "GPT2_META", GPT2_META | {"vocab_size": 265, "bos_id": 264})
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
        argv = [f"{tmp_path}/{name}", f"--out={tmp_path}/out", "--tokenizer=bytes", *flags]
        assert command(lambda: prepare.main(argv)) == 2
        said = capsys.readouterr().err
        assert re.match(f"error: .*({words})", said) and said.count("\n") == 1
        assert not [*tmp_path.glob("out*")]  # another try with the same --out is welcome

    rows = b"".join(b'{"text": "document %d"}\n' % i for i in range(9))
    packed, rng = gzip.compress(rows), random.Random(15)
    many_rows = b"".join(b'{"text": "%x"}\n' % rng.getrandbits(99) for _ in range(5000))
    large = gzip.compress(many_rows)
    broken = packed[:10] + b"\x07" + packed[11:]  # a block of a kind that there is not
    refused(b'{"text": 3}\n', "a.jsonl", "a.jsonl, line 1: no text 'text'")
    refused(rows + b'{"body": "x"}\n', "a.jsonl", "line 10: no text 'text'.*here is body")
    refused(rows[:150] + rows[160:], "a.jsonl", r"a.jsonl, line 7: wanted JSON.*character \d+\)$")
    refused(rows + b'{"text": "\xff"}\n', "a.jsonl", "a.jsonl, line 10: wanted JSON in UTF-8")
    refused(rows + b"[" * 100_000, "a.jsonl", "line 10: wanted JSON.*Recursion")
    refused(rows + b"1" * 5000, "a.jsonl", "line 10: wanted JSON")
    refused(rows + b"null", "a.jsonl", "line 10: no text")
    refused(packed[:-12], "a.jsonl.gz", r"a.jsonl.gz, line \d+: cannot be read \(EOFError")
    refused(large[: len(large) // 2], "a.jsonl.gz", r"a.jsonl.gz, line [1-4]\d\d\d: cannot be read")
    refused(broken, "a.jsonl.gz", r"a.jsonl.gz, line 1: cannot be read \(error")
    refused(packed[:-12], "a.txt.gz", r"a.txt.gz, after byte \d+ of the text: cannot be read")
    refused(b"\xff\xfe", "a.txt", "a.txt, byte 0: wanted UTF-8")
    many = "\u00e9\n".encode() * 50_000
    refused(b"\xef\xbb\xbf" + many + b"\xe9t", "a.txt", "a.txt, byte 150003: wanted UTF-8")
    refused(gzip.compress(many + b"\xc3"), "a.txt.gz", "a.txt.gz, byte 150000: wanted UTF-8")
    refused(many[:-2], "a.txt", "byte 149997: wanted UTF-8", r"--separator=\n")
    refused(b"", "a.txt", "no training text")
    refused(b"x", "a.csv", "wanted .txt")
    refused(b"not gzip", "a.txt.gz", "a.txt.gz, after byte 0 of the text: cannot be read")
    refused(b"x", "a.txt", "--tokenizer=/nowhere", "--tokenizer=/nowhere")
    refused(b"x", "a.txt", "--gpt2=/nowhere|pip install", "--tokenizer=gpt2", "--gpt2=/nowhere")
    refused(b"x", "a.txt", "--vocab_size=9: wanted 257 to 65534", "--vocab_size=9")
    refused(b"x", "a.txt", "--files", "--files=(")
    refused(b"x", "a.txt", "--job=1", "--job=1")
    assert command(lambda: prepare.main(["nowhere.txt", "--out=x"])) == 2
    assert capsys.readouterr().err.startswith("error: nowhere.txt: no file or folder")


def test_a_parquet_file_that_is_no_text_is_refused_with_its_row(tmp_path):
    pa = pytest.importorskip("pyarrow", reason=WANTED)
    parquet = pytest.importorskip("pyarrow.parquet", reason=WANTED)
    wrong = pa.array([b"good"] * 600 + [b"\xff"] + [b"good"] * 9).view(pa.string())
    kinds = {"text": wrong, "binary": wrong.view(pa.binary()), "list": [["a"]] * 610}
    path, out = tmp_path / "a.parquet", tmp_path / "out"
    parquet.write_table(pa.table(kinds | {"some": ["a"] * 600 + [None] * 10}), path)
    flags = ["--tokenizer=bytes", "--val=0"]
    fails("a.parquet, row 601: cannot be read", [path], out, *flags)
    for name in ("binary", "list"):
        fails(f"'{name}' is {name}.*can be text, some$", [path], out, *flags, f"--field={name}")
    blob = path.read_bytes()
    for i, damaged in enumerate((blob[:-9], b"", blob[:4] + bytes(len(blob) - 12) + blob[-8:])):
        (tmp_path / f"{i}.parquet").write_bytes(damaged)
        fails(f"{i}.parquet: cannot be read", [tmp_path / f"{i}.parquet"], out, *flags)
    assert not out.exists()
    values = pa.array(["one", None, "two"])
    for i, column in enumerate((values.dictionary_encode(), values.cast(pa.large_string()))):
        parquet.write_table(pa.table({"text": column}), path)
        run([path], tmp_path / str(i), *flags)
        assert tokens(tmp_path / str(i)) == as_bytes(["one", "two"])
