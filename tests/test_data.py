"""Shards, the plans of what each step reads, batches on devices, and the embedded corpus."""
import dataclasses
import hashlib
import itertools
import os
import re
import stat
import sysconfig
import tracemalloc

import jax
import numpy as np
import pytest

import train
from shards import BOS, documents, make_folder, meta_json, shard_bytes

SHARD = "train_000001.bin"  # the one of make_folder's that tests damage
EXCLUDED = ["test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3",
            "distutils", "turtledemo", "ensurepip", "__pycache__"]


def config(**changes):
    return train.Config(**train.PRESETS["tiny"] | dict(preset="tiny", window_short="16", window_long="0", stage_lr="1", vocab_size=257, bos_id=BOS) | changes)


def packed_config(**changes):
    return config(**dict(max_doc_len="20,50", seq_len="32,64", batch_tokens="128,256", steps=10) | changes)


def in_memory(*shards, bos=BOS):
    return train.Shards([f"shard {i}" for i in range(len(shards))], [np.asarray(tokens, "<u2") for tokens in shards],
                        {"tokenizer": "test", "vocab_size": 257, "bos_id": bos})


def distinct(*lengths):
    """Shards in which no token occurs twice, so that a token names its own place."""
    edges = np.cumsum([0, *lengths])
    return in_memory(*(np.arange(first, last) for first, last in itertools.pairwise(edges)))


def rows_of(steps):
    return [np.concatenate(row) for rows, _ in steps for row in rows]


def batches_of(steps):
    return [[np.concatenate(row).tolist() for row in rows] for rows, _ in steps]


# ---- Shard files ----

def test_a_shard_comes_back_as_it_was_written(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 1 << 16, 1000)
    path = tmp_path / "a.bin"
    train.write_shard(path, tokens)
    assert path.read_bytes() == shard_bytes(tokens)
    np.testing.assert_array_equal(train.open_shard(path), tokens)
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]  # no staging file stays
    assert type(train.open_shard(path)) is np.ndarray and isinstance(train.open_shard(path).base, np.memmap)  # mapped, not read


def test_a_shard_written_by_another_program_is_read_token_by_token(tmp_path):
    path = tmp_path / "b.bin"
    path.write_bytes(shard_bytes([0, 1, 255, 256, 50256, 65535]))
    tokens = train.open_shard(path)
    assert tokens.dtype == np.uint16 and tokens.tolist() == [0, 1, 255, 256, 50256, 65535]


def test_shards_are_read_in_the_order_of_their_names(tmp_path):
    for i in (2, 0, 10, 1):
        (tmp_path / f"train_{i:06d}.bin").write_bytes(shard_bytes([i] * 9))
    shards = train.open_shards(str(tmp_path / "train_*.bin"))
    assert [int(tokens[0]) for tokens in shards.tokens] == [0, 1, 2, 10]
    assert [path.name for path in shards.paths] == [f"train_{i:06d}.bin" for i in (0, 1, 2, 10)]


def test_shards_without_a_meta_json_are_gpt2_tokens(tmp_path):
    (tmp_path / "x.bin").write_bytes(shard_bytes([50256, 1, 2]))
    assert train.open_shards(str(tmp_path / "*.bin")).meta == {"tokenizer": "gpt2", "vocab_size": 50257, "bos_id": 50256}


GOOD = documents(2, 70)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 200001024\n"
WRONG_BYTES = {  # name: (bytes of the shard, what came, what was wanted), the last two as regular expressions
    "wrong_magic": (shard_bytes(GOOD, magic=20230000), r"20230000", r"20240520"),
    "version_2": (shard_bytes(GOOD, version=2), r"20240520, 2\b", r"20240520, 1\b"),
    "one_token_too_few": (shard_bytes(GOOD, count=len(GOOD) + 1), rf"{1024 + 2 * len(GOOD)} bytes", rf"{len(GOOD) + 1} tokens"),
    "one_token_too_many": (shard_bytes(GOOD, count=len(GOOD) - 1), rf"{1024 + 2 * len(GOOD)} bytes", rf"{len(GOOD) - 1} tokens"),
    "empty_file": (b"", r"begins with \[\]|\b0 bytes", r"20240520|1024"),
    "cut_in_the_header": (shard_bytes(GOOD)[:100], r"\b100 bytes", r"1024"),
    "cut_after_the_header": (shard_bytes(GOOD)[:1024], r"\b1024 bytes", rf"{len(GOOD)} tokens"),
    "odd_length": (shard_bytes(GOOD) + b"\0", rf"{1025 + 2 * len(GOOD)} bytes", rf"{len(GOOD)} tokens"),
    "negative_count": (shard_bytes(GOOD, count=-5), rf"{1024 + 2 * len(GOOD)} bytes", r"-5 tokens"),
    "count_of_zero": (shard_bytes([]), r"1024 bytes", r"\b0 tokens"),
    "token_past_the_vocabulary": (shard_bytes([256, 1, 257, 3] * 500), r"token 257", r"vocabulary has 257"),
    "git_lfs_pointer": (LFS, rf"begins with|{len(LFS)} bytes", r"20240520|1024"),
    "html_page": (b"<!DOCTYPE html>\n<html><body>404: not found</body></html>\n" * 40, r"begins with", r"20240520"),
}


@pytest.fixture
def error_of(tmp_path, monkeypatch):
    """error_of(*flags) -> the message of the DataError that main raises, before it compiles or writes anything."""
    monkeypatch.setattr(train, "compile_all", lambda *_: pytest.fail("compiled before the data were checked"))

    def error_of(*flags):
        with pytest.raises(train.DataError) as caught:
            train.main(["--preset=tiny", f"--log_dir={tmp_path}/logs", *flags])
        assert not (tmp_path / "logs").exists()
        return str(caught.value)
    return error_of


@pytest.mark.parametrize("case", WRONG_BYTES)
def test_a_bad_shard_is_named_with_what_came_and_what_was_wanted_before_anything_is_compiled(case, tmp_path, error_of):
    blob, came, wanted = WRONG_BYTES[case]
    flags = make_folder(tmp_path / "data")
    (tmp_path / "data" / SHARD).write_bytes(blob)
    message = error_of(*flags)
    assert str(tmp_path / "data" / SHARD) in message
    assert re.search(came, message) and re.search(wanted, message), message


@pytest.mark.parametrize("case", ["wrong_magic", "one_token_too_few", "token_past_the_vocabulary"])
def test_the_validation_shard_is_checked_like_the_others(case, tmp_path, error_of):
    flags = make_folder(tmp_path / "data")
    (tmp_path / "data" / "val_000000.bin").write_bytes(WRONG_BYTES[case][0])
    message = error_of(*flags)
    assert "val_000000.bin" in message and re.search(WRONG_BYTES[case][1], message), message


def test_missing_validation_shards_are_named_by_their_pattern(tmp_path, error_of):
    flags = make_folder(tmp_path / "data")
    (tmp_path / "data" / "val_000000.bin").unlink()
    message = error_of(*flags)
    assert f"{tmp_path}/data/val_*.bin" in message and "python cached_fineweb10B.py" in message


def test_no_shards_at_all_names_the_pattern_and_both_ways_out(tmp_path, error_of):
    message = error_of(f"--train_files={tmp_path}/none/train_*.bin", f"--val_files={tmp_path}/none/val_*.bin")
    assert f"{tmp_path}/none/train_*.bin" in message
    assert f"python cached_fineweb10B.py {train.SPEEDRUN_SHARDS}" in message and "--preset=demo" in message


@pytest.mark.parametrize("kind", ["folder", "dangling_link", "forbidden"])
def test_a_shard_that_cannot_be_opened_is_named(kind, tmp_path, error_of):
    flags, path = make_folder(tmp_path / "data"), tmp_path / "data" / SHARD
    if kind == "forbidden":
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
    else:
        path.unlink()
        path.mkdir() if kind == "folder" else path.symlink_to(tmp_path / "gone")
    message = error_of(*flags)
    assert str(path) in message and "cannot be read" in message


@pytest.mark.parametrize("text", [
    "", "{", "<html>", "[]", "null", "{}", '{"tokenizer": "test", "vocab_size": 257}', '"tokenizer vocab_size bos_id"',
    '{"tokenizer": "test", "vocab_size": "many", "bos_id": 256}', '{"tokenizer": "test", "vocab_size": null, "bos_id": 256}'])
def test_a_meta_json_that_says_too_little_is_named_with_the_keys_it_needs(text, tmp_path, error_of):
    flags = make_folder(tmp_path / "data")
    (tmp_path / "data" / "meta.json").write_text(text)
    message = error_of(*flags)
    assert str(tmp_path / "data" / "meta.json") in message
    assert all(key in message for key in ("tokenizer", "vocab_size", "bos_id"))


def test_a_meta_json_that_is_not_text_is_named(tmp_path, error_of):
    flags = make_folder(tmp_path / "data")
    (tmp_path / "data" / "meta.json").write_bytes(b"\xff\xfe\x00\x80")
    assert str(tmp_path / "data" / "meta.json") in error_of(*flags)


def test_validation_shards_of_another_tokenizer_are_refused_with_both_named(tmp_path, error_of):
    train_flag, _ = make_folder(tmp_path / "a", tokenizer="this")
    _, val_flag = make_folder(tmp_path / "b", tokenizer="that")
    message = error_of(train_flag, val_flag)
    assert str(tmp_path / "b" / "val_000000.bin") in message and "'this'" in message and "'that'" in message


def test_a_validation_shard_that_is_too_short_names_how_many_targets_fit_and_they_do(tmp_path, error_of):
    flags = make_folder(tmp_path / "data", val=documents(3, 5))
    message = error_of(*flags, "--val_tokens=5000")
    assert "val_000000.bin" in message and "--val_tokens=5000" in message
    fits = int(re.search(r"(\d+) fit", message)[1])
    cfg = train.configure(["--preset=tiny", "--steps=2", *flags])[0]
    train.open_data(dataclasses.replace(cfg, val_tokens=fits))
    with pytest.raises(train.DataError):
        train.open_data(dataclasses.replace(cfg, val_tokens=fits + 1))


def test_vocabulary_and_bos_come_from_meta_json_unless_a_flag_gives_them(tmp_path):
    flags = make_folder(tmp_path / "data")
    (tmp_path / "data" / "meta.json").write_text(meta_json(vocab_size=300, bos_id=7))
    cfg = train.open_data(train.configure(["--preset=tiny", "--steps=2", *flags])[0])[-1]
    assert (cfg.vocab_size, cfg.bos_id) == (300, 7)
    cfg = train.open_data(train.configure(["--preset=tiny", "--steps=2", *flags, "--vocab_size=400", "--bos_id=0"])[0])[-1]
    assert (cfg.vocab_size, cfg.bos_id) == (400, 0)


def test_a_bos_that_is_no_id_of_the_vocabulary_is_refused(tmp_path, error_of):
    flags = make_folder(tmp_path / "data")
    assert "--bos_id=9999: wanted an id of the vocabulary" in error_of(*flags, "--bos_id=9999")


# ---- The plain stream ----

def test_the_plain_stream_reads_each_token_once_and_in_order():
    cfg = config(seq_len="8", stage_ends="1", batch_tokens="32", shuffle=0, steps=12)
    shards = distinct(201, 203)  # 25 blocks of 8 with a token to spare; 25, whose last 2 tokens have no block
    rows = rows_of(train.plan_stream(shards, cfg))
    assert len(rows) == 48
    np.testing.assert_array_equal(np.concatenate([row[:-1] for row in rows]), np.r_[0:200, 201:201 + 184])
    for row in rows:
        np.testing.assert_array_equal(row, np.arange(row[0], row[0] + 9))  # its targets follow its inputs


def test_the_plain_stream_ends_with_the_last_whole_block_that_has_a_target():
    cfg = config(seq_len="8", stage_ends="1", batch_tokens="8", shuffle=0, steps=100)
    count = lambda *lengths: len(list(train.plan_stream(distinct(*lengths), cfg)))
    assert [count(n) for n in (8, 9, 16, 17, 18)] == [0, 1, 1, 2, 2]
    assert count(17, 4, 9) == 3  # a shard shorter than a block is passed over


def test_a_shuffled_epoch_reads_each_block_once_and_the_next_epoch_in_another_order():
    cfg = config(seq_len="8", stage_ends="1", batch_tokens="40", shuffle=1, steps=20, max_epochs=2)
    shards = distinct(201, 206)
    rows = rows_of(train.plan_stream(shards, cfg))
    starts = np.array([row[0] for row in rows])
    every_block = [*range(0, 200, 8), *range(201, 401, 8)]
    assert len(starts) == 100
    assert sorted(starts[:50]) == sorted(starts[50:]) == every_block
    assert (starts[:50] != every_block).any() and (starts[:50] != starts[50:]).any()
    assert all((row == np.arange(row[0], row[0] + 9)).all() for row in rows)


def test_the_order_of_a_shuffled_stream_is_a_function_of_the_seed():
    shards = distinct(4000)
    order = lambda seed: [row[0] for row in rows_of(train.plan_stream(shards, config(seed=seed, steps=4)))]
    assert order(0) == order(0)
    assert order(0) != order(1)


@pytest.mark.parametrize("shuffle", [0, 1])
@pytest.mark.parametrize("rows_before", [6, 5])  # with 5 the first stage ends in the middle of a block
def test_stages_of_different_row_lengths_continue_one_stream(shuffle, rows_before):
    cfg = config(seq_len="8,16,4", stage_ends="0.25,0.5,1", batch_tokens=f"{8 * rows_before},64,16", steps=4, shuffle=shuffle)
    shards = distinct(209, 225)
    rows = rows_of(train.plan_stream(shards, cfg))
    assert [len(row) for row in rows] == [9] * rows_before + [17] * 4 + [5] * 8
    inputs = np.concatenate([row[:-1] for row in rows])
    assert len(set(inputs.tolist())) == len(inputs)
    assert all((row == np.arange(row[0], row[0] + len(row))).all() for row in rows)
    if rows_before == 6:
        blocks = inputs.reshape(-1, 16)
        np.testing.assert_array_equal(blocks, blocks[:, :1] + np.arange(16)[None])
        assert shuffle or (inputs == np.arange(len(inputs))).all()


def test_epochs_that_are_never_reached_cost_nothing():
    cfg, shards = packed_config(max_epochs=999_999, steps=1, bos_id=BOS), in_memory([BOS, 1, 2, 3] * 99)
    tracemalloc.start()
    try:
        assert len([*train.plan(shards, cfg)]) == 1 and tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shuffle", [0, 1])
@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_training_tokens_are_read_at_most_max_epochs_times(epochs, shuffle):
    cfg = config(seq_len="8", stage_ends="1", batch_tokens="16", shuffle=shuffle, steps=1000, max_epochs=epochs)
    rows = rows_of(train.plan_stream(distinct(97), cfg))
    tokens, times = np.unique(np.concatenate([row[:-1] for row in rows]), return_counts=True)
    np.testing.assert_array_equal(tokens, np.arange(96))
    assert set(times) == {epochs}


@pytest.mark.parametrize("seq_len,batch", [("32,64", "512,1024"), ("64", "128")])
def test_the_stream_reports_the_tokens_it_has_read(seq_len, batch):
    cfg = config(seq_len=seq_len, batch_tokens=batch, steps=8)
    reads = [read for _, read in train.plan_stream(distinct(9000), cfg)]
    assert reads == [train.tokens_before(step + 1, train.stages(cfg)) for step in range(8)]


# ---- Packed documents ----

def uneven_documents():
    """In two shards: 400 documents whose tokens, BOS aside, name the document and the place in it; and a list of them."""
    lengths = np.random.default_rng(0).integers(2, 90, 400)
    whole = [np.r_[60000, 150 * i + 1 + np.arange(length - 1)] for i, length in enumerate(lengths)]
    return in_memory(np.concatenate(whole[:150]), np.concatenate(whole[150:]), bos=60000), whole


PACKED = dict(bos_id=60000, vocab_size=60001)


def slices_of(steps):
    return [part for rows, _ in steps for row in rows for part in row]


def document_of(part):
    return (int(part[1]) - 1) // 150 if len(part) > 1 else None


def test_packed_rows_hold_exactly_their_tokens_and_each_slice_is_a_beginning_of_a_document():
    shards, whole = uneven_documents()
    cfg = packed_config(**PACKED)
    steps = list(train.plan_packed(shards, cfg))
    assert len(steps) == cfg.steps
    for step, (rows, _) in enumerate(steps):
        seq_len, longest = (32, 20) if step < 5 else (64, 50)
        assert len(rows) == 4
        for row in rows:
            assert sum(map(len, row)) == seq_len + 1
            for part in row:
                assert part[0] == 60000 and 1 <= len(part) <= longest
                if len(part) > 1:
                    np.testing.assert_array_equal(part, whole[document_of(part)][:len(part)])


@pytest.mark.parametrize("epochs", [1, 2])
def test_packing_uses_no_document_twice_in_an_epoch_and_only_the_pool_stays_unread(epochs):
    shards, whole = uneven_documents()
    cfg = packed_config(**PACKED, max_epochs=epochs, steps=10_000, max_doc_len="40", seq_len="64", batch_tokens="64",
                        stage_ends="1")
    used = [document_of(part) for part in slices_of(train.plan_packed(shards, cfg)) if len(part) > 1]
    counts = np.bincount(used, minlength=400)
    assert counts.max() <= epochs
    assert counts.sum() >= 400 * epochs - 10  # what is in a row that no document is left to fill is lost


def test_documents_come_in_order_as_far_as_the_pool_lets_them():
    shards, _ = uneven_documents()
    used = [document_of(part) for part in slices_of(train.plan_packed(shards, packed_config(**PACKED))) if len(part) > 1]
    assert all(document < place + train.POOL for place, document in enumerate(used, 2))  # a BOS alone is not in `used`
    assert len(set(used)) == len(used)


def test_packing_takes_the_longest_document_that_fits_and_cuts_only_where_none_does():
    shards, whole = uneven_documents()
    cfg = packed_config(**PACKED, max_doc_len="40", seq_len="64", batch_tokens="128", stage_ends="1", steps=20)
    pool, unread, seen = [], list(range(400)), 0
    for row in (row for rows, _ in train.plan_packed(shards, cfg) for row in rows):
        room = 65
        for part in row:
            while len(pool) < 64 and unread:
                pool.append(unread.pop(0))
            fitting = [n for n in (min(len(whole[i]), 40) for i in pool) if n <= room]
            wanted = max(fitting) if fitting else room
            assert len(part) == wanted
            candidates = [i for i in pool if whole[i][:wanted].tolist() == part.tolist()
                          and min(len(whole[i]), 40) == (wanted if fitting else min(len(whole[j]) for j in pool))]
            assert candidates  # where none fits, the shortest gives its beginning
            pool.remove(candidates[0])
            room, seen = room - len(part), seen + 1
        assert room == 0
    assert seen > 60


def test_the_waste_the_log_reports_is_that_of_an_independent_count(tmp_path):
    flags = make_folder(tmp_path / "data")
    lengths = []
    for name in ("train_000000.bin", "train_000001.bin"):
        tokens = np.fromfile(tmp_path / "data" / name, "<u2", offset=1024)
        edges = [*np.nonzero(tokens == BOS)[0], len(tokens)]
        lengths += [last - first for first, last in itertools.pairwise(edges)]
    cfg = train.configure(["--preset=tiny", *flags, "--max_doc_len=30", "--steps=4", "--batch_tokens=512"])[0]
    shards, _, note, cfg = train.open_data(cfg)
    picks = len(slices_of(train.plan(shards, cfg)))
    read = sum(lengths[:picks + 64 - 1])  # the pool was full before the last pick
    assert f"{read} tokens read for {4 * 512} trained on" in note
    assert float(re.search(r"([\d.]+)% cut off", note)[1]) == pytest.approx(100 * (1 - 4 * 512 / read), abs=0.051)


def test_packing_by_best_fit_cuts_fewer_tokens_than_first_come():
    shards, whole = uneven_documents()
    cfg = packed_config(**PACKED, max_doc_len="80", seq_len="128", batch_tokens="256", stage_ends="1", steps=30)
    rows = [row for rows, _ in train.plan_packed(shards, cfg) for row in rows]
    best_fit = sum(min(len(whole[document_of(part)]), 80) - len(part) for row in rows for part in row if len(part) > 1)
    queue, first_come = iter(whole), 0
    for _ in rows:
        room = 129
        while room:
            length = min(len(next(queue)), 80)
            first_come += max(0, length - room)
            room -= min(length, room)
    assert best_fit < first_come / 4


# ---- What a step reads ----

PLANS = {
    "stream": (dict(seq_len="8,16", stage_ends="0.5,1", batch_tokens="80,64", steps=10, shuffle=1, max_epochs=2), distinct(401, 225)),
    "packed": (dict(seq_len="8,16", stage_ends="0.5,1", batch_tokens="80,64", steps=10, max_doc_len="6,11", **PACKED),
               uneven_documents()[0]),
}


def mesh_of(num_devices):
    return train.make_mesh(jax.devices()[:num_devices])


def tokens_in(batch):
    """A batch's rows that hold tokens, in order."""
    rows = np.asarray(batch).reshape(-1, batch.shape[-1])
    return [row.tolist() for row in rows if (row != train.NO_TOKEN).any()]


@pytest.mark.parametrize("kind", PLANS)
def test_batches_started_at_a_step_are_the_tail_of_those_started_at_zero(kind):
    changes, shards = PLANS[kind]
    cfg, mesh = config(**changes), mesh_of(2)
    whole = [np.asarray(batch) for batch in train.train_batches(shards, 0, mesh, cfg)]
    assert [batch.shape for batch in whole] == [(1, 10, 9)] * 5 + [(1, 4, 17)] * 5
    for first in (1, 4, 5, 6, 9, 10):
        tail = [np.asarray(batch) for batch in train.train_batches(shards, first, mesh, cfg)]
        assert len(tail) == 10 - first
        for a, b in zip(tail, whole[first:]):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
def test_the_shares_of_the_devices_make_up_the_batch_with_every_token_once(kind, num_devices):
    changes, shards = PLANS[kind]
    cfg, mesh = config(**changes), mesh_of(num_devices)
    wanted = batches_of(train.plan(shards, cfg))
    for batch, rows in zip(train.train_batches(shards, 0, mesh, cfg), wanted, strict=True):
        assert len(batch.addressable_shards) == num_devices
        assert tokens_in(batch) == rows
        shares = [row for share in batch.addressable_shards for row in tokens_in(share.data)]
        assert sorted(shares) == sorted(rows)
        assert np.asarray(batch).size == sum(share.data.size for share in batch.addressable_shards)


@pytest.mark.parametrize("micro_tokens", [0, 16, 48])
def test_micro_steps_divide_a_batch_without_losing_a_row(micro_tokens):
    cfg = config(seq_len="16", stage_ends="1", batch_tokens="1120", shuffle=0, steps=1, micro_tokens=micro_tokens)
    (rows, _), stage = next(train.plan_stream(distinct(2000), cfg)), train.stages(cfg)[0]
    for num_devices in (1, 2, 4, 8):
        num_micro, num_rows, width = train.batch_shape(stage, num_devices, cfg)
        per_device = num_rows // num_devices
        assert width == 17 and per_device * 16 <= (micro_tokens or 1120)
        assert num_micro * num_rows >= 70 > (num_micro - 1) * num_rows
        batch = train.to_devices(rows, stage, mesh_of(num_devices), cfg)
        assert batch.shape == (num_micro, num_rows, width)
        assert tokens_in(batch) == [np.concatenate(row).tolist() for row in rows]


class Recording(list):
    """Rows that note which of them are looked at."""
    def __init__(self, rows):
        super().__init__(rows)
        self.read = []

    def __getitem__(self, i):
        self.read.append(i)
        return super().__getitem__(i)


@pytest.mark.parametrize("num_processes", [2, 4])
def test_a_process_reads_only_the_rows_of_its_own_devices(num_processes, monkeypatch):
    changes, shards = PLANS["packed"]
    cfg, mesh = config(**changes | dict(micro_tokens=16)), mesh_of(8)
    rows, stage = list(train.plan(shards, cfg))[0][0], train.stages(cfg)[0]
    calls = []
    monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, sharding, local: calls.append((shape, sharding, local)))
    recording = Recording(rows)
    train.to_devices(recording, stage, mesh, cfg)
    (shape, sharding, local), = calls
    places = sharding.devices_indices_map(shape)
    read, per_process = [], 8 // num_processes
    for process in range(num_processes):
        recording.read.clear()
        for device in jax.devices()[process * per_process:][:per_process]:
            share = local(places[device])
            assert share.dtype == np.uint16 and share.shape == (shape[0], shape[1] // 8, shape[2])
        assert len(set(recording.read)) <= shape[0] * shape[1] // num_processes
        read.append(set(recording.read))
    assert sorted(itertools.chain(*read)) == list(range(len(rows)))  # every row by one process, none by two


def test_a_batch_is_one_uint16_array_from_which_the_device_derives_inputs_and_targets():
    cfg, shards = config(seq_len="8", stage_ends="1", batch_tokens="24", steps=1, shuffle=0), distinct(200)
    batch, = train.train_batches(shards, 0, mesh_of(2), cfg)
    assert isinstance(batch, jax.Array) and batch.dtype == np.uint16 and batch.shape == (1, 4, 9)
    tokens, targets, weights = map(np.asarray, jax.jit(lambda rows: train.inputs_and_targets(rows, cfg))(batch[0]))
    np.testing.assert_array_equal(tokens[:3], np.arange(24).reshape(3, 8))
    np.testing.assert_array_equal(targets[:3], np.arange(1, 25).reshape(3, 8))
    assert (weights[:3] == 1).all() and (weights[3] == 0).all()
    assert (tokens[3] == BOS).all()  # a place without a row is read as BOS


def test_an_error_in_the_prefetch_thread_is_raised_in_the_loop(monkeypatch):
    changes, shards = PLANS["stream"]
    cfg, made, real = config(**changes), [], train.to_devices

    def fails_at_step_four(*arguments):
        made.append(1)
        if len(made) == 5:
            raise OSError("the disk is gone")
        return real(*arguments)
    monkeypatch.setattr(train, "to_devices", fails_at_step_four)
    batches = train.train_batches(shards, 0, mesh_of(2), cfg)
    for _ in range(4):
        next(batches)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_batches_are_made_ahead_but_not_further_than_asked(monkeypatch):
    changes, shards = PLANS["stream"]
    made = []
    monkeypatch.setattr(train, "to_devices", lambda rows, stage, *_: made.append(stage.index) or len(made))
    batches = train.train_batches(shards, 0, None, config(**changes), depth=2)
    assert made == []
    assert next(batches) == 1 and len(made) <= 3
    assert list(batches) == list(range(2, 11)) and made == [0] * 5 + [1] * 5


# ---- Validation rows ----

@pytest.mark.parametrize("val_tokens,seq_len,context", [(500, 40, 11), (2048, 64, 32), (64, 64, 0), (65, 64, 0), (1, 16, 8), (7, 16, 15)])
def test_validation_scores_each_of_its_targets_once_after_the_right_context(val_tokens, seq_len, context):
    cfg = config(val_tokens=val_tokens, val_seq_len=seq_len, val_context=context, vocab_size=60001, bos_id=60000)
    shards = distinct(3000, 100)
    rows, stage = train.plan_val(shards, cfg), train.val_stage(cfg)
    assert len(rows) == stage.batch_tokens // stage.seq_len
    scored = []
    for mesh in (mesh_of(1), mesh_of(8)):
        batch = np.asarray(train.to_devices(rows, stage, mesh, cfg)).reshape(-1, seq_len + 1)
        tokens, targets, weights = map(np.asarray, train.inputs_and_targets(batch, cfg))
        weights = weights * (np.arange(seq_len)[None] >= context)
        scored.append(sorted(targets[weights > 0].tolist()))
        for row, (inputs, outputs, weight) in enumerate(zip(tokens, targets, weights)):
            for place in np.flatnonzero(weight):
                seen = inputs[:place + 1].tolist()
                begin = max(0, outputs[place] - len(seen))  # a token is its own index
                assert seen == [60000] * (len(seen) - outputs[place] + begin) + list(range(begin, outputs[place]))
    assert scored[0] == scored[1] == list(range(1, val_tokens + 1))


# ---- Too few shards ----

TOO_FEW = {
    "stream": ["--seq_len=32", "--batch_tokens=96", "--stage_ends=1"],
    "stream_two_epochs": ["--max_epochs=2"],
    "stream_in_stages": ["--seq_len=16,64", "--batch_tokens=64,256", "--stage_ends=0.4,1"],
    "packed": ["--max_doc_len=40", "--batch_tokens=128", "--seq_len=64"],
    "packed_in_stages": ["--max_doc_len=40,70", "--batch_tokens=128,320", "--seq_len=32,64", "--max_epochs=2"],
}


@pytest.mark.parametrize("case", TOO_FEW)
def test_too_few_shards_name_the_largest_steps_that_fit_and_one_more_does_not(case, tmp_path, error_of):
    flags = [*make_folder(tmp_path / "data"), "--window_short=16", "--window_long=0", "--stage_lr=1", *TOO_FEW[case]]
    message = error_of(*flags, "--steps=1000")
    assert "1000 steps" in message and f"{len(documents(1, 90)) + len(documents(2, 70))} training tokens" in message
    fits = int(re.search(r"--steps=(\d+) fits", message)[1])
    assert fits > 2
    cfg = train.configure(["--preset=tiny", *flags])[0]
    train.open_data(dataclasses.replace(cfg, steps=fits))
    with pytest.raises(train.DataError, match=f"--steps={fits} fits"):
        train.open_data(dataclasses.replace(cfg, steps=fits + 1))
    with pytest.raises(train.DataError, match="not one fits"):
        train.open_data(dataclasses.replace(cfg, batch_tokens="1048576"))


def test_the_other_way_out_of_too_few_shards_is_a_further_epoch_and_it_works(tmp_path, error_of):
    flags = [*make_folder(tmp_path / "data"), "--batch_tokens=512", "--seq_len=32"]
    message = error_of(*flags, "--steps=30")
    assert "--max_epochs=2" in message
    train.open_data(train.configure(["--preset=tiny", *flags, "--steps=30", "--max_epochs=2"])[0])


# ---- The embedded corpus ----

def corpus_by_hand(root):
    """The written rule once more: {"train": bytes of the shard, "val": ...}, and how many files there are."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in EXCLUDED]
        for file in files:
            path = os.path.join(folder, file)
            if file.endswith(".py") and not file.startswith("_sysconfigdata") and os.stat(path).st_size <= 200_000:
                names.append(os.path.relpath(path, root).replace(os.sep, "/"))
    tokens = {"train": [], "val": []}
    for name in sorted(names):
        digest = hashlib.sha256(name.encode()).hexdigest()
        with open(os.path.join(root, name), "rb") as file:
            tokens["val" if int(digest[:2], 16) < 13 else "train"] += [BOS, *file.read()]
    return tokens, len(names)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def library(tmp_path, monkeypatch):
    """library(number of files that count) -> a folder that stands for the standard library, with files that do not."""
    root = tmp_path / "lib"

    def library(num_files):
        names = ["a/b.py", "a-b.py", "a.py", "a/c/d.py", "Z.py", "a/testing.py", "latest/x.py", "a/_sysconfig.py", "large.py"]
        names += [f"pkg{i % 7}/module_{i}.py" for i in range(num_files - len(names))]
        wrong = [f"{folder}/no.py" for folder in EXCLUDED] + [f"a/{folder}/b/no.py" for folder in EXCLUDED]
        wrong += ["_sysconfigdata_x.py", "a/_sysconfigdata__linux.py", "too_large.py", "a/data.txt", "a/b.pyc", "a/c.pyi"]
        for name in names + wrong:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(f"# {name}\n".encode() + b"\x00\xff\r\n")
        (root / "large.py").write_bytes(b"x" * 200_000)
        (root / "too_large.py").write_bytes(b"x" * 200_001)
        monkeypatch.setattr(sysconfig, "get_paths", lambda *_: {"stdlib": str(root)})
        return root
    return library


def corpus_shards():
    return {split: train.open_shards(pattern) for split, pattern in zip(("train", "val"), train.embedded_corpus())}


def test_the_embedded_corpus_follows_its_written_rule(library, own_cache):
    tokens, count = corpus_by_hand(library(330))
    assert count == 330
    for split, shards in corpus_shards().items():
        assert len(shards.tokens) == 1 and shards.tokens[0].tolist() == tokens[split]
        assert shards.meta == {"tokenizer": "bytes", "vocab_size": 257, "bos_id": 256}


def test_a_link_to_nowhere_and_a_folder_named_like_a_file_are_not_in_the_corpus(library, own_cache):
    root = library(330)
    tokens, _ = corpus_by_hand(root)
    (root / "sitecustomize.py").symlink_to("/nowhere/sitecustomize.py")
    (root / "folder.py").mkdir()
    assert {split: shards.tokens[0].tolist() for split, shards in corpus_shards().items()} == tokens


def test_this_pythons_library_is_a_corpus_by_the_same_rule(own_cache):
    tokens, count = corpus_by_hand(sysconfig.get_paths()["stdlib"])
    assert count >= 300
    for split, shards in corpus_shards().items():
        assert np.array_equal(shards.tokens[0], np.array(tokens[split], np.uint16))
    assert 0.01 < len(tokens["val"]) / len(tokens["train"]) < 0.15


def test_a_library_of_fewer_than_300_files_is_no_corpus(library, own_cache, error_of):
    library(299)
    message = error_of()
    assert "299" in message and "300" in message and "--train_files" in message and "--val_files" in message


def test_300_files_are_a_corpus(library, own_cache):
    library(300)
    assert corpus_shards()["train"].tokens[0].size > 200_000


def test_the_corpus_is_written_once_and_a_damaged_file_is_written_again(library, own_cache):
    library(310)
    stamps = lambda: {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in own_cache.rglob("*.bin")}
    corpus_shards()
    first, whole = stamps(), {path: path.read_bytes() for path in own_cache.rglob("*.bin")}
    assert len(first) == 2
    corpus_shards()
    assert stamps() == first
    for path, damage in zip(first, (lambda blob: blob[:-7], lambda blob: blob[:2000] + b"\x01" + blob[2001:])):
        path.write_bytes(damage(path.read_bytes()))
    corpus_shards()
    assert {path: path.read_bytes() for path in own_cache.rglob("*.bin")} == whole


def test_the_cache_folder_is_private_to_the_user(own_cache):
    assert stat.S_IMODE(train.cache_dir().stat().st_mode) == 0o700
