"""Text and tokens: the tokenizers that shards are made with, by the name in their meta.json.

    bytes        ids 0 to 255 are bytes, 256 begins a document; no package needed
    gpt2         GPT-2's 50,257: encoder.json and vocab.bpe (or vocab.json and merges.txt) of a
                 folder, else from the Hub
    NAME.json    a file beside the shards. A JSON string is an alphabet: its characters are the ids
                 0, 1, ... and the next id is the BOS. Anything else is a byte-level BPE of Hugging
                 Face's tokenizers, as train_bpe makes them.

scripts/prepare.py makes them. Every kind spells any text that it takes without loss: the bytes of a
text's ids, one after the other, are the text. Here is also what the companions share: optional
packages, errors as one sentence, and a command line read off a table.
"""

import argparse
import contextlib
import importlib
import json
from collections.abc import Callable
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


# ---- Tokenizers ----------------------------------------------------------------------------------

BOS = "<|endoftext|>"
GPT2 = {"tokenizer": "gpt2", "vocab_size": 50257, "bos_id": 50256}
BYTES = {"tokenizer": "bytes", "vocab_size": 257, "bos_id": 256}
# OpenAI's names, and the Hub's for the same files
GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


@dataclass(frozen=True)
class Tokenizer:
    name: str  # as in meta.json
    vocab_size: int  # V
    bos_id: int
    pieces: list  # the bytes of each id, none for the BOS and ids that no text has
    encode: Callable  # str -> list of ids, without BOS. UsageError for what an alphabet lacks

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

    Raises KeyError for what is not shown in GPT-2's way.
    """
    table = byte_table()
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


def fetch_gpt2():
    """gpt2_files of the Hub's copy, in its cache. Raises UsageError."""
    from huggingface_hub import hf_hub_download

    with usage_errors(
        "GPT-2's vocabulary cannot be had from the Hub; prepare takes --gpt2=DIR, a folder of "
        "encoder.json and vocab.bpe, and --tokenizer=bytes or bpe, which need no network"
    ):
        names = GPT2_FILES[1]
        return [Path(hf_hub_download("openai-community/gpt2", name)) for name in names]


def byte_level(tokenizer):
    """Make a tokenizers.Tokenizer cut text as GPT-2 does. All of it is text, <|endoftext|> too."""
    from tokenizers import decoders, pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.encode_special_tokens = True
    return tokenizer


def train_bpe(texts, vocab_size):
    """A tokenizers.Tokenizer: a byte-level BPE of texts, with BOS as id 0.

    The same texts give the same one.
    """
    tokenizers = package("tokenizers", "a BPE")
    tokenizer = byte_level(tokenizers.Tokenizer(tokenizers.models.BPE()))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


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


def open_gpt2(folder):
    """(pieces, encode) of GPT-2's files in a folder, else of the Hub's. Raises UsageError."""
    tokenizers = package("tokenizers", "GPT-2's tokenizer")
    vocabulary, merges = (folder and gpt2_files(folder)) or fetch_gpt2()
    wanted = f"{vocabulary}: wanted GPT-2's vocabulary, and {merges.name} beside it"
    with usage_errors(wanted, Exception):
        pieces = pieces_of(json.loads(vocabulary.read_text(encoding="utf-8")))
        model = tokenizers.models.BPE.from_file(str(vocabulary), str(merges))
    return pieces, bpe_encode(byte_level(tokenizers.Tokenizer(model)))


def open_file(path):
    """(pieces, encode) of an alphabet or a BPE. Raises UsageError."""
    with usage_errors(f"{path}: wanted the tokenizer of these shards; give the folder that has it"):
        found = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(found, str):
        return [character.encode() for character in found] + [b""], alphabet_encode(found)
    tokenizers = package("tokenizers", path)
    with usage_errors(f"{path}: wanted a byte-level BPE of the package tokenizers", Exception):
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        pieces = pieces_of(tokenizer.get_vocab())
    tokenizer.encode_special_tokens = True  # the file does not say so
    return pieces, bpe_encode(tokenizer)


def open_tokenizer(meta, folder):
    """The Tokenizer of meta.json's tokenizer, vocab_size and bos_id.

    folder: where its files lie, that of the shards. Raises UsageError where they are missing or
    another's, and without the package tokenizers.
    """
    name, size, bos_id = (meta[key] for key in BYTES)
    if name == "bytes":
        pieces, encode = [bytes([i]) for i in range(256)] + [b""], bytes_encode
    elif name == "gpt2":
        pieces, encode = open_gpt2(folder)
    else:
        pieces, encode = open_file(Path(folder) / Path(name).name)  # nothing outside of the folder
    fits = len(pieces) == size and 0 <= bos_id < size and not pieces[bos_id]
    said = f"the shards' meta.json says vocab_size={size}, bos_id={bos_id}"
    require(fits, f"{folder}: the tokenizer {name} has {len(pieces)} ids, but {said}")
    return Tokenizer(name, size, bos_id, pieces, encode)
