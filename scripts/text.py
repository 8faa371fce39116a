"""Text and tokens: the tokenizers that shards are made with, by the name in their meta.json.

    bytes        ids 0 to 255 are bytes, 256 begins a document; no package needed
    gpt2         GPT-2's 50,257: encoder.json and vocab.bpe (or vocab.json and merges.txt) of a
                 folder, else from the Hub
    NAME.json    a file beside the shards, no link. A JSON string is an alphabet: its characters are
                 the ids 0, 1, ... and the next id is the BOS. Anything else is a byte-level BPE of
                 Hugging Face's tokenizers, as train_bpe makes them.

scripts/prepare.py makes them. A tokenizer is known by the SHA-256 of its files, one after the
other, which meta.json holds as tokenizer_sha256: another of its name and size is refused. Every
kind spells any text that it takes without loss: the bytes of a text's ids, one after the other, are
the text. Here is also what the companions share: optional packages, errors as one sentence, and a
command line read off a table.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train import UsageError, require

# ---- For all companions --------------------------------------------------------------------------

READING = (OSError, ValueError, LookupError, TypeError, EOFError, RecursionError)  # of any file


@contextlib.contextmanager
def usage_errors(what, kinds=READING):
    """An error of these kinds becomes a UsageError that begins with `what`."""
    try:
        yield
    except UsageError:
        raise
    except kinds as error:
        said = f"{what} ({type(error).__name__}: {error})"
        raise UsageError(" ".join(said.split())) from error


def say(line):
    """Print a line at once. The work goes on where nobody can read it any more."""
    try:
        print(line, flush=True)
    except OSError:  # a closed pipe, a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def package(name, what):
    """An optional package, imported. Raises UsageError where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        wanted = f"the package {name.split('.')[0]}: pip install -r scripts/requirements.txt"
        raise UsageError(f"{what} needs {wanted}") from error


def read_args(argv, doc, flags, positional=None):
    """A command line -> argparse's Namespace. Raises UsageError.

    flags: {name: (default, help)} or {name: (default, help, least, most)}. A value is of its
    default's type; a flag whose default is False takes none. positional: the name of a list of
    words that are no flags, at least one.
    """
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def fail(message):
        raise UsageError(f"{message}; --help lists all flags")

    parser.error = fail
    if positional:
        parser.add_argument(positional, nargs="+")
    for name, (default, text, *_) in flags.items():
        if default is False:
            parser.add_argument(f"--{name}", action="store_true", help=text)
            continue
        kind = type(default)
        said = text if default == "" else f"{text} (default: {default})"
        parser.add_argument(f"--{name}", default=default, type=kind, metavar="VALUE", help=said)
    args = parser.parse_args(argv)
    for name, (_, _, *span) in flags.items():
        value = getattr(args, name)
        if span and not span[0] <= value <= span[1]:
            raise UsageError(f"--{name}={value}: wanted {span[0]} to {span[1]}")
    return args


def remove_staging(folder, is_ours):
    """Delete what killed processes left of train.write_file's work in a folder, whose lock we hold.

    is_ours: whether we write a file of a name.
    """
    for path in list(folder.iterdir()):
        staged = re.fullmatch(r"\.(.+)\.\d+\.part", path.name)
        if staged and is_ours(staged[1]) and path.is_file() and not path.is_symlink():
            path.unlink()


# ---- Tokenizers ----------------------------------------------------------------------------------

BOS = "<|endoftext|>"
MOST_IDS = 1 << 16  # what uint16 can hold
LONGEST_WORD = 1024  # bytes of a word that a BPE is made from: a merge takes a time by its length
# OpenAI's names, and the Hub's for the same files
GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


@dataclass(frozen=True)
class Tokenizer:
    name: str  # as in meta.json
    vocab_size: int  # V
    bos_id: int
    pieces: list  # the bytes of each id, none for the BOS and ids that no text has
    encode: Callable  # str -> list of ids, without BOS. UsageError for what an alphabet lacks
    sha256: str = ""  # of its files

    def decode(self, ids):
        """The text of ids. BOS and what is no id are left out, bytes that are no UTF-8 U+FFFD."""
        known = [self.pieces[i] for i in map(int, ids) if 0 <= i < self.vocab_size]
        return b"".join(known).decode(errors="replace")

    @property
    def token_bytes(self):
        """int32 [V]: the number of UTF-8 bytes that each id stands for."""
        return np.array([len(piece) for piece in self.pieces], np.int32)


def byte_table():
    """{character: byte} of GPT-2's way to show any bytes as printable text."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # they stand for themselves
    table = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in plain]  # the characters from 256 on
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


def pieces_of(ids):
    """The bytes of each id, from {shown text: id}; the BOS and gaps have none.

    Raises LookupError, ValueError or TypeError for what is not shown in GPT-2's way.
    """
    table = byte_table()
    ids = dict(ids)
    if not all(0 <= number < MOST_IDS for number in ids.values()):
        raise ValueError(f"an id is not from 0 to {MOST_IDS - 1}")
    pieces = [b""] * (max(ids.values()) + 1)
    for shown, number in ids.items():
        if shown != BOS:
            pieces[number] = bytes(table[character] for character in shown)
    return pieces


def gpt2_files(folder):
    """Paths of GPT-2's (vocabulary, merges) in a folder; None where it has no pair of them."""
    for names in GPT2_FILES:
        paths = [Path(folder) / name for name in names]
        if all(path.is_file() for path in paths):
            return paths
    return None


@contextlib.contextmanager
def hub_errors(what):
    """What huggingface_hub raises, its import too, becomes a UsageError that begins with `what`."""
    with usage_errors(what, ValueError):  # HF_ENDPOINT may be no URL
        errors = package("huggingface_hub.errors", what)
    network = importlib.import_module(errors.HTTPError.__module__)
    refused = (OSError, errors.HTTPError, errors.EntryNotFoundError, network.InvalidURL)
    other = (RuntimeError, ValueError, LookupError, TypeError, AttributeError)  # of odd answers
    with usage_errors(what, refused + other):
        yield


def fetch_gpt2():
    """gpt2_files of the Hub's copy, in its cache. Raises UsageError."""
    with hub_errors(
        "GPT-2's vocabulary cannot be had from the Hub; prepare and its --report take "
        "--gpt2=DIR, a folder of encoder.json and vocab.bpe; bytes, chars and bpe need none"
    ):
        from huggingface_hub import hf_hub_download

        names = GPT2_FILES[1]
        return [Path(hf_hub_download("openai-community/gpt2", name)) for name in names]


def tokenizer_files(name, folder):
    """Paths of the files of the tokenizer that a folder's meta.json names.

    Raises UsageError for a name that leads out of the folder, by a link too.
    """
    if name == "bytes":
        return []
    if name == "gpt2":
        paths = folder and gpt2_files(folder)
        if not paths:
            return fetch_gpt2()
    else:
        is_bare = re.fullmatch(r"[^./\\\0][^/\\\0]*\.json", name) and name != "meta.json"
        wanted = "wanted bytes, gpt2, or NAME.json of a file beside it"
        require(is_bare, f"{folder}: its meta.json names the tokenizer {name!r}; {wanted}")
        paths = [Path(folder) / name]
    for path in paths:
        require(not path.is_symlink(), f"{path}: a link; wanted the tokenizer's file itself")
    return paths


def sha256_of(blobs):
    """SHA-256 of a tokenizer's files, one after the other, in hex."""
    return hashlib.sha256(b"".join(blobs)).hexdigest()


def read_tokenizer(meta, folder):
    """(paths, bytes) of the files of a meta.json's tokenizer.

    Raises UsageError where they are missing, not in the folder, or another's by SHA-256. An older
    meta.json has none: there is a warning then, and the name counts.
    """
    name, wanted = meta["tokenizer"], meta.get("tokenizer_sha256", "")
    paths = tokenizer_files(name, folder)
    for path in paths:
        missing = "wanted the tokenizer of these shards; give the folder that has it"
        require(path.is_file(), f"{path}: {missing}")
    blobs = [path.read_bytes() for path in paths]
    if paths and not wanted:
        said = "no SHA-256 of the tokenizer in meta.json, so its name and size are compared"
        print(f"warning: {folder}: {said}", file=sys.stderr, flush=True)
    found = sha256_of(blobs)
    other = f"another tokenizer: its files have the SHA-256 {found}, the shards' meta.json {wanted}"
    require(wanted in ("", found), f"{folder}: {name} is {other}. Wanted the files of these shards")
    return paths, blobs


def byte_level(tokenizer):
    """Make a tokenizers.Tokenizer cut text as GPT-2 does. All of it is text, <|endoftext|> too."""
    from tokenizers import decoders, pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.encode_special_tokens = True
    return tokenizer


def hearing_ctrl_c(work, texts):
    """work(texts), in a thread: a library of Rust does not hear Ctrl-C, this thread does.

    The work may go on when this has raised KeyboardInterrupt, but it takes no more texts.
    """
    stopped, fed, done = threading.Event(), threading.Event(), Future()

    def feed():
        try:
            for text in texts:
                if stopped.is_set():
                    raise InterruptedError("Ctrl-C")
                yield text
        finally:
            fed.set()

    def run():
        try:
            done.set_result(work(feed()))
        except BaseException as error:  # it is raised where it is waited for
            done.set_exception(error)
        finally:
            fed.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        return done.result()
    except KeyboardInterrupt:
        stopped.set()
        fed.wait()
        thread.join(0.5)  # near its end it should not meet that of Python
        raise


def train_bpe(texts, vocab_size):
    """A tokenizers.Tokenizer: a byte-level BPE of texts, with BOS as id 0.

    The same texts give the same one. Words are cut at LONGEST_WORD bytes: a text without spaces,
    DNA for instance, takes seconds too.
    """
    tokenizers = package("tokenizers", "a BPE")
    tokenizer = byte_level(tokenizers.Tokenizer(tokenizers.models.BPE()))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    longest = tokenizers.Regex(f".{{{LONGEST_WORD}}}")
    shorter = tokenizers.pre_tokenizers.Split(longest, "isolated")
    both = [tokenizer.pre_tokenizer, shorter]
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(both)
    hearing_ctrl_c(lambda texts: tokenizer.train_from_iterator(texts, trainer), texts)
    return byte_level(tokenizer)


def alphabet_encode(characters):
    """encode of an alphabet: each character is its place in the string."""
    ids = {character: i for i, character in enumerate(characters)}

    def encode(text):
        try:
            return [ids[character] for character in text]
        except KeyError as missing:
            lacks = missing.args[0]
            said = f"{lacks!r} (U+{ord(lacks):04X}) is not one of this model's"
            raise UsageError(f"{said} {len(ids)} characters") from missing

    return encode


def bpe_encode(tokenizer):
    """encode of a tokenizers.Tokenizer."""

    def encode(text):
        return tokenizer.encode_batch_fast([text])[0].ids  # 1.4 times as fast as encode

    return encode


def bytes_encode(text):
    return list(text.encode())


def open_gpt2(paths):
    """(pieces, encode) of GPT-2's files. Raises UsageError."""
    tokenizers = package("tokenizers", "GPT-2's tokenizer")
    vocabulary, merges = paths
    wanted = f"{vocabulary}: wanted GPT-2's vocabulary, and {merges.name} beside it"
    with usage_errors(wanted):
        pieces = pieces_of(json.loads(vocabulary.read_bytes()))
    with usage_errors(wanted, Exception):  # of no narrower type
        model = tokenizers.models.BPE.from_file(str(vocabulary), str(merges))
    return pieces, bpe_encode(byte_level(tokenizers.Tokenizer(model)))


def open_bpe(blob, what):
    """A tokenizers.Tokenizer from the bytes of its file. Raises UsageError."""
    tokenizers = package("tokenizers", what)
    wanted = f"{what}: wanted a byte-level BPE of the package tokenizers"
    with usage_errors(wanted):
        text = blob.decode()
        model = dict(json.loads(text)["model"])
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        require(not model.get(name), f"{wanted} without {name}")  # one makes the package abort
    with usage_errors(wanted, Exception):  # of no narrower type
        tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = True  # the file does not say so
    return tokenizer


def open_file(path, blob):
    """(pieces, encode) of an alphabet or a BPE. Raises UsageError."""
    with usage_errors(f"{path}: wanted an alphabet or a BPE"):
        found = json.loads(blob)
        if isinstance(found, str):
            return [character.encode() for character in found] + [b""], alphabet_encode(found)
    tokenizer = open_bpe(blob, path)
    with usage_errors(f"{path}: wanted a byte-level BPE of the package tokenizers"):
        pieces = pieces_of(tokenizer.get_vocab())
    return pieces, bpe_encode(tokenizer)


def open_tokenizer(meta, folder):
    """The Tokenizer of meta.json's tokenizer, vocab_size, bos_id and tokenizer_sha256.

    folder: where its files lie, that of the shards. Raises UsageError where they are missing or
    another's, and without the package tokenizers.
    """
    name, size, bos_id = (meta[key] for key in ("tokenizer", "vocab_size", "bos_id"))
    paths, blobs = read_tokenizer(meta, folder)
    if name == "bytes":
        pieces, encode = [bytes([i]) for i in range(256)] + [b""], bytes_encode
    elif name == "gpt2":
        pieces, encode = open_gpt2(paths)
    else:
        pieces, encode = open_file(paths[0], blobs[0])
    fits = len(pieces) == size <= MOST_IDS and 0 <= bos_id < size and not pieces[bos_id]
    said = f"the shards' meta.json says vocab_size={size}, bos_id={bos_id}"
    require(fits, f"{folder}: the tokenizer {name} has {len(pieces)} ids, but {said}")
    return Tokenizer(name, size, bos_id, pieces, encode, sha256_of(blobs))
