"""Text and tokens: the tokenizers that shards are made with, by the name in their meta.json.

    bytes             ids 0 to 255 are bytes, 256 begins a document; no package needed
    gpt2              GPT-2's 50,257; encoder.json and vocab.bpe (or vocab.json and merges.txt) from a folder, else from the Hub
    NAME.json         a file that lies beside the shards: a JSON string is an alphabet, its characters the ids 0, 1, ... and the
                      next id the BOS; anything else a byte-level BPE of Hugging Face's tokenizers, as train_bpe makes them
scripts/prepare.py makes them.

Every kind spells any text that it takes without loss: the bytes of a text's ids, one after the other, are the text.
"""
import contextlib, dataclasses, importlib, json
from pathlib import Path
from typing import Callable

import numpy as np

from train import UsageError, find_shards

BOS = "<|endoftext|>"
GPT2 = {"tokenizer": "gpt2", "vocab_size": 50257, "bos_id": 50256}
BYTES = {"tokenizer": "bytes", "vocab_size": 257, "bos_id": 256}
GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # OpenAI's names, and the Hub's for the same files

@dataclasses.dataclass(frozen=True)
class Tokenizer:
    name: str          # as in meta.json
    vocab_size: int    # V
    bos_id: int
    pieces: list       # the bytes of each id, none for the BOS and ids that no text has
    encode: Callable   # str -> list of ids, without BOS. Raises UsageError for a character that an alphabet lacks

    def decode(self, ids):
        """The text of ids; BOS and what is no id are left out, bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.pieces[i] for i in map(int, ids) if 0 <= i < self.vocab_size).decode(errors="replace")

    @property
    def token_bytes(self):
        """int32 [V]: the number of UTF-8 bytes that each id stands for."""
        return np.array([*map(len, self.pieces)], np.int32)

def package(name, what):
    """An optional package, imported. Raises UsageError where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(f"{what} needs the package {name.split('.')[0]}: pip install -r scripts/requirements.txt") from None

READING = (OSError, ValueError, LookupError, TypeError, EOFError, RecursionError)  # of files that others wrote

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

def byte_table():
    """{character: byte} of GPT-2's way to show any bytes as printable text."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these stand for themselves, the others for 256, 257, ...
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}

def pieces_of(ids):
    """The bytes of each id, from {shown text: id}; the BOS and gaps have none. KeyError for what is not of GPT-2's way."""
    table = byte_table()
    shown = {number: text for text, number in ids.items() if text != BOS}
    return [bytes(map(table.__getitem__, shown.get(i, ""))) for i in range(max(ids.values()) + 1)]

def gpt2_files(folder):
    """(vocabulary, merges) of GPT-2: paths in the folder, or None where it has no pair of them."""
    pairs = [tuple(Path(folder) / name for name in names) for names in GPT2_FILES]
    return next((pair for pair in pairs if all(path.is_file() for path in pair)), None)

def fetch_gpt2():
    """gpt2_files of the Hub's copy, in its cache. Raises UsageError."""
    from huggingface_hub import hf_hub_download
    with usage_errors("GPT-2's vocabulary cannot be had from the Hub; prepare takes --gpt2=DIR, a folder of "
            "encoder.json and vocab.bpe, and --tokenizer=bytes or bpe, which need no network"):
        return tuple(Path(hf_hub_download("openai-community/gpt2", name)) for name in GPT2_FILES[1])

def gpt2_bytes(folder):
    """The bytes of each GPT-2 token, by id, from encoder.json. Raises UsageError."""
    with usage_errors(f"{folder}: wanted GPT-2's encoder.json"):
        return pieces_of(json.loads((Path(folder) / "encoder.json").read_text()))

def byte_level(tokenizer):
    """Make a tokenizers.Tokenizer cut text as GPT-2 does, every letter of it a text's, also <|endoftext|>."""
    from tokenizers import decoders, pre_tokenizers
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.encode_special_tokens = True
    return tokenizer

def train_bpe(texts, vocab_size):
    """A tokenizers.Tokenizer: a byte-level BPE of an iterable of texts, with BOS. The same texts give the same one."""
    tokenizers = package("tokenizers", "a BPE")
    tokenizer = byte_level(tokenizers.Tokenizer(tokenizers.models.BPE()))
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[BOS], show_progress=False,
                                             initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer

def texts_of(tokens, table, bos):
    """Yield the documents of a shard. What stands before the first BOS is one; bytes that are no UTF-8, by a cut, become U+FFFD."""
    edges = [0, *np.flatnonzero(tokens == bos).tolist(), len(tokens)]
    for first, last in zip(edges, edges[1:]):
        if last > first:
            yield b"".join(map(table.__getitem__, tokens[first:last].tolist())).decode(errors="replace")

def alphabet_encode(characters):
    """encode of an alphabet: each character its place in the string."""
    ids = {character: i for i, character in enumerate(characters)}
    def encode(text):
        try:
            return [*map(ids.__getitem__, text)]
        except KeyError as missing:
            character = missing.args[0]
            raise UsageError(f"{character!r} (U+{ord(character):04X}) is not one of this model's {len(ids)} characters") from None
    return encode

def bpe_encode(tokenizer):
    return lambda text: tokenizer.encode_batch_fast([text])[0].ids  # without offsets: 1.4 times as fast as encode

def open_tokenizer(meta, folder):
    """The Tokenizer of meta.json's tokenizer, vocab_size and bos_id. folder: where its files lie, that of the shards.
    Raises UsageError where they are missing or another's, and without the package tokenizers."""
    name, size, bos_id = meta["tokenizer"], meta["vocab_size"], meta["bos_id"]
    if name == "bytes":
        pieces, encode = [bytes([i]) for i in range(256)] + [b""], lambda text: [*text.encode()]
    elif name == "gpt2":
        tokenizers = package("tokenizers", "GPT-2's tokenizer")
        vocabulary, merges = folder and gpt2_files(folder) or fetch_gpt2()
        with usage_errors(f"{vocabulary}: wanted GPT-2's vocabulary, and {merges.name} beside it", Exception):
            pieces = pieces_of(json.loads(vocabulary.read_text(encoding="utf-8")))
            encode = bpe_encode(byte_level(tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocabulary), str(merges)))))
    else:
        path = Path(folder) / name
        with usage_errors(f"{path}: wanted the tokenizer of these shards; give the folder that has it"):
            found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, str):
            pieces, encode = [character.encode() for character in found] + [b""], alphabet_encode(found)
        else:
            tokenizers = package("tokenizers", path)
            with usage_errors(f"{path}: wanted a byte-level BPE of tokenizers {tokenizers.__version__}", Exception):
                backend = tokenizers.Tokenizer.from_file(str(path))
                pieces = pieces_of(backend.get_vocab())
            backend.encode_special_tokens = True
            encode = bpe_encode(backend)
    if len(pieces) != size or not 0 <= bos_id < size or pieces[bos_id]:
        raise UsageError(f"{folder}: the tokenizer {name} has {len(pieces)} ids, but the shards' meta.json says vocab_size={size}, "
                        f"bos_id={bos_id}")
    return Tokenizer(name, size, bos_id, pieces, encode)

def folder_of_run(cfg):
    """The folder of a run's training shards."""
    found = find_shards(cfg.train_files)
    return found[0].parent if found else Path(cfg.train_files).parent
