"""Files of others are read, and files that a user names are written. Needs no JAX."""

import codecs
import os
from pathlib import Path


class NotText(ValueError):
    """A file is no UTF-8 text. One sentence that names file and line."""


def read_text(path):
    """The text of a UTF-8 file, without its byte order mark, its lines ended by \\n.

    Raises NotText and OSError.
    """
    blob = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    wrong = blob.find(b"\0")  # others write UTF-16, which is full of them
    try:
        text = blob.decode()
    except UnicodeDecodeError as error:
        wrong = error.start
    if wrong >= 0:
        line = blob.count(b"\n", 0, wrong) + 1
        raise NotText(f"{path}, line {line}: no UTF-8 text; save it as UTF-8")
    return text.replace("\r\n", "\n")


def write_whole(path, blob):
    """Write a file that a user named: it is there whole, or what was there before stands.

    What is no plain file, such as a link, a pipe or /dev/stdout, is written into. Raises OSError.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_bytes(blob)
        return
    staging = path.with_name(f".writing-{os.getpid()}")
    with open(staging, "xb") as file:  # x: not over a file that is there
        try:
            file.write(blob)
            file.flush()
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)


def require_place(path):
    """Raises OSError where a file could not be made, before the work that it is to hold."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: wanted a file, this is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{path}: may not be written")
