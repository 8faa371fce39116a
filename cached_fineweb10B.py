"""Fetch FineWeb-10B as GPT-2 tokens, and prove that every byte arrived.

    python cached_fineweb10B.py            # the validation shard and 8 training shards, 1.8 GB
    python cached_fineweb10B.py 103        # all there is: 104 files, 20.8 GB
    python cached_fineweb10B.py --verify   # check the shards that are here, download none

The shards are those of the dataset kjj0/fineweb10B-gpt2 on the Hugging Face Hub, 100M tokens each:
256 little-endian int32 (magic number, version, token count, zeros), then one uint16 per token.
huggingface_hub downloads to fineweb10B/.incoming. A shard gets its place only when header, size and
SHA-256 are right; hf_hub_download compares no hashes itself (its issue #3643).

After an interruption run the same command again. What verifies is skipped, the rest is fetched.
"""

import argparse
import contextlib
import hashlib
import os
import signal
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HTTPError  # the base of its network errors
from huggingface_hub.utils import WeakFileLock

REPO = "kjj0/fineweb10B-gpt2"
MAX_SHARDS = 103  # training shards in the dataset
SPEEDRUN_SHARDS = 8  # what the speedrun preset of train.py reads
SHARD_BEGIN = (20240520, 1)  # magic number, version
HEADER_BYTES = 1024
FILES_AT_ONCE = 8


class Failed(Exception):
    """One sentence for the reader: what came, what was wanted, the way out. Exit code 2."""


def shard_names(num_train):
    training = [f"fineweb_train_{i:06d}.bin" for i in range(1, num_train + 1)]
    return ["fineweb_val_000000.bin", *training]


def problem_with(path, sha256):
    """What is wrong with the shard at path, in a few words, or ""."""
    if not path.exists():
        return "missing"
    with open(path, "rb") as file:
        magic, version, num_tokens = struct.unpack("<3i", file.read(12).ljust(12, b"\0"))
        if (magic, version) != SHARD_BEGIN:
            return f"begins with {[magic, version]}, wanted {list(SHARD_BEGIN)}"
        size = path.stat().st_size
        wanted = HEADER_BYTES + 2 * num_tokens
        if size != wanted:
            return f"{size} bytes, wanted {wanted} for the {num_tokens} tokens of its header"
        file.seek(0)
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if found == sha256 else f"SHA-256 {found[:16]}, wanted {sha256[:16]}"


def problems_in(folder, hashes, pool):
    """{name: what is wrong with it} of the shards that do not verify."""
    found = pool.map(lambda name: problem_with(folder / name, hashes[name]), hashes)
    return {name: problem for name, problem in zip(hashes, found, strict=True) if problem}


def ask_hub(names):
    """{name: SHA-256}, as the hub states them."""
    files = HfApi().get_paths_info(REPO, names, repo_type="dataset")
    hashes = {file.path: file.lfs.sha256 for file in files if file.lfs}
    for name in names:
        if name not in hashes:
            raise Failed(f"{name}: the hub has no SHA-256 of it in {REPO}; check HF_ENDPOINT")
    return {name: hashes[name] for name in names}


def verify(folder, hashes, pool):
    problems = problems_in(folder, hashes, pool)
    if problems:
        listed = ", ".join(f"{name} ({problem})" for name, problem in problems.items())
        last = max(int(name[-10:-4]) for name in problems)
        raise Failed(
            f"{len(problems)} of {len(hashes)} shards do not verify: {listed}; fetch them again: "
            f"python cached_fineweb10B.py {max(1, last)} --dir={folder}"
        )
    print(f"all {len(hashes)} shards in {folder} verified")


def fetch_shard(folder, name, sha256):
    """Download a shard to the staging folder, prove it there, and only then give it its place."""
    staging = folder / ".incoming"
    staged = Path(hf_hub_download(REPO, name, repo_type="dataset", local_dir=staging))
    problem = problem_with(staged, sha256)
    if problem:
        staged.unlink()
        raise Failed(f"{name} came wrong from {REPO}: {problem}; try again, or check any proxy")
    os.replace(staged, folder / name)
    print(f"{name}: fetched and verified", flush=True)


def fetch(folder, hashes, pool):
    """Bring all shards into folder. Raises Failed where another download is at work there."""
    staging = folder / ".incoming"
    staging.mkdir(parents=True, exist_ok=True)
    lock = staging / "lock"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(lock, timeout=1))
        except TimeoutError:
            raise Failed(f"{lock} is held: wait for the other download into {folder}") from None
        for cut_off in staging.glob(".cache/huggingface/download/*.incomplete"):
            cut_off.unlink()  # nobody goes on with it: huggingface_hub names each one anew
        wanted = problems_in(folder, hashes, pool)
        list(pool.map(lambda name: fetch_shard(folder, name, hashes[name]), wanted))
    skipped = len(hashes) - len(wanted)
    print(f"all {len(hashes)} shards in {folder} verified: {len(wanted)} new, {skipped} skipped")


def parse(argv):
    def fail(message):
        raise Failed(f"{message}; see python cached_fineweb10B.py --help")

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = fail
    folder = Path(__file__).resolve().parent / "fineweb10B"
    add = parser.add_argument
    add("N", nargs="?", type=int, help=f"training shards, 1 to {MAX_SHARDS} ({SPEEDRUN_SHARDS})")
    add("--verify", action="store_true", help="check N shards, or those that are here")
    add("--dir", type=Path, default=folder, help="where the shards lie (fineweb10B, beside this)")
    args = parser.parse_args(argv)
    if args.N is not None and not 1 <= args.N <= MAX_SHARDS:
        fail(f"N is {args.N}, wanted 1 to {MAX_SHARDS}")
    return args


def run(argv):
    args = parse(argv)
    names = shard_names(args.N or SPEEDRUN_SHARDS)
    if args.verify and args.N is None:
        names = [name for name in shard_names(MAX_SHARDS) if (args.dir / name).exists()]
        if not names:
            raise Failed(f"{args.dir} has no shards; fetch some: python cached_fineweb10B.py")
    hashes = ask_hub(names)
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        act = verify if args.verify else fetch
        act(args.dir, hashes, pool)


def main(argv=None):
    try:
        run(argv)
        return 0
    except Failed as error:
        said = str(error)
    except (OSError, HTTPError, RuntimeError, ValueError) as error:  # disk, network, Xet, a proxy
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        said = f"{reason}; mend it (network, HF_ENDPOINT, HF_TOKEN, disk) and run this again"
    print(f"error: {said}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C does not wait for files under way
    sys.exit(main())
