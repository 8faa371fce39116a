"""A user's own files in a folder that a program writes to."""

import os

TEXTS = (
    "essays.2023.txt backup.7z meta.json.12345 train_000000.99 report.v1 report.html.bak -rf it's"
    " *.bin [a-z]? é日本 .writing-1 .hidden notes.incomplete lock.mine step-1 step-000001.bak"
).split()


def contents(folder):
    """{path: bytes, where a link points to, or "folder"}. Links are not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        what = "folder"
        if path.is_symlink():
            what = os.readlink(path)
        elif path.is_file():
            what = path.read_bytes()
        found[path] = what
    return found


def fill(folder):
    """Put files, folders and links there. Returns a function: assert that all is as it was."""
    outside = folder.parent / f"outside of {folder.name}"
    older = contents(folder) | contents(outside)
    for where in (folder, folder / "a b", folder / "seed1", outside):
        where.mkdir(parents=True, exist_ok=True)
        for name in TEXTS:
            (where / name).write_text(f"mine: {name}")
    (folder / os.fsdecode(b"caf\xe9")).write_text("mine")
    (folder / "to a file").symlink_to(outside / "it's")
    (folder / "to a folder").symlink_to(outside)
    (folder / "to itself").symlink_to("to itself")
    (folder / "to nothing").symlink_to("nothing")
    filled = contents(folder) | contents(outside)
    before = {path: what for path, what in filled.items() if path not in older}

    def is_as_it_was():
        now = contents(folder) | contents(outside)
        assert {path: now.get(path) for path in before} == before

    return is_as_it_was
