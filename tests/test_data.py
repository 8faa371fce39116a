"""Shards, the plans of what each step reads, batches on devices, and the embedded corpus."""

import functools
import hashlib
import itertools
import re
import stat
import sysconfig
import time

import jax
import numpy as np
import pytest
from shards import BOS, TINY, documents, make_folder, meta_json, shard_bytes

import train
from train import Stage, replace

EXCLUDED = """test tests idle_test site-packages dist-packages encodings pydoc_data lib2to3
 distutils turtledemo ensurepip __pycache__""".split()
CFG = replace(train.parse_flags([TINY]), vocab_size=257, bos_id=BOS)


def config(*stages, **changes):
    """The tiny config with other stages: Stage(end, batch_tokens, seq_len, doc_len)."""
    return replace(CFG, stages=stages, **changes)


def in_memory(*shards, bos=BOS):
    tokens = [np.asarray(tokens, "<u2") for tokens in shards]
    return train.Shards([], tokens, {"tokenizer": "test", "vocab_size": 257, "bos_id": bos})


def distinct(*lengths):
    """Shards in which no token occurs twice, so that a token names its own place."""
    edges = np.cumsum([0, *lengths])
    return in_memory(*(np.arange(first, last) for first, last in itertools.pairwise(edges)))


def rows_of(steps):
    return [np.concatenate(row) for rows, _ in steps for row in rows]


# ---- Shard files ----


def test_a_shard_comes_back_as_it_was_written(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 1 << 16, 1000)
    path = tmp_path / "a.bin"
    train.write_shard(path, tokens)
    assert path.read_bytes() == shard_bytes(tokens)
    found = train.open_shard(path)
    np.testing.assert_array_equal(found, tokens)
    assert found.dtype == np.uint16 and isinstance(found.base, np.memmap)  # mapped, not read
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]  # no staging file stays


def test_shards_are_read_in_the_order_of_their_names_and_without_a_meta_json_are_gpt2s(tmp_path):
    blobs = {i: shard_bytes([i] * 9) for i in (2, 0, 10, 1)}
    for i, blob in blobs.items():
        (tmp_path / f"train_{i:06d}.bin").write_bytes(blob)
    shards = train.open_shards(str(tmp_path / "train_*.bin"))
    assert [int(tokens[0]) for tokens in shards.tokens] == [0, 1, 2, 10]
    assert [path.name for path in shards.paths] == [f"train_{i:06d}.bin" for i in (0, 1, 2, 10)]
    assert list(shards.sha256) == [hashlib.sha256(blobs[i]).hexdigest() for i in (0, 1, 2, 10)]
    *meta, digest = shards.meta.values()
    # of encoder.json and vocab.bpe, one after the other, as OpenAI published them
    assert meta == ["gpt2", 50257, 50256] and digest.startswith("00f404d36600411e497efb3df08d3b4e")


GOOD = documents(2, 70)
WRONG_BYTES = {
    "wrong_magic": shard_bytes(GOOD, magic=20230000),
    "version_2": shard_bytes(GOOD, version=2),
    "one_token_too_few": shard_bytes(GOOD, count=len(GOOD) + 1),
    "one_token_too_many": shard_bytes(GOOD, count=len(GOOD) - 1),
    "empty_file": b"",
    "cut_after_the_header": shard_bytes(GOOD)[:1024],
    "odd_length": shard_bytes(GOOD) + b"\0",
    "negative_count": shard_bytes(GOOD, count=-5),
    "count_of_zero": shard_bytes([]),
    "token_past_the_vocabulary": shard_bytes([256, 1, 257, 3] * 500),
    "html_page": b"<!DOCTYPE html>\n<html><body>404: not found</body></html>\n" * 40,
}


@pytest.fixture
def error_of(tmp_path, monkeypatch):
    """error_of(*flags) -> the message of main's UsageError, before it compiles or writes."""
    monkeypatch.setattr(train, "compile_all", lambda *_: pytest.fail("compiled before the check"))

    def error_of(*flags):
        with pytest.raises(train.UsageError) as caught:
            train.main([TINY, f"--log_dir={tmp_path}/logs", *flags])
        assert not (tmp_path / "logs").exists()
        return str(caught.value)

    return error_of


def test_a_bad_shard_is_named_before_anything_is_compiled(tmp_path, error_of):
    flags = make_folder(tmp_path)
    for name in ("train_000001.bin", "val_000000.bin"):
        path = tmp_path / name
        good = path.read_bytes()
        for case, blob in WRONG_BYTES.items():
            path.write_bytes(blob)
            assert str(path) in error_of(*flags), case
        path.unlink()
        path.mkdir()
        assert str(path) in error_of(*flags)
        path.rmdir()
        path.symlink_to(tmp_path / "gone")
        message = error_of(*flags)
        assert "val_*.bin" in message or str(path) in message
        path.unlink()
        path.write_bytes(good)


WRONG_META = [b"", b"{", b"[]", b"null", b"\xff\xfe\x00\x80", b'{"vocab_size": 257}']
WRONG_META += [b'{"tokenizer": "test", "vocab_size": null, "bos_id": 256}']


def test_a_meta_json_that_says_too_little_is_named_with_the_keys_it_needs(tmp_path, error_of):
    flags = make_folder(tmp_path)
    for text in WRONG_META:
        (tmp_path / "meta.json").write_bytes(text)
        message = error_of(*flags)
        for part in (str(tmp_path / "meta.json"), "tokenizer", "vocab_size", "bos_id"):
            assert part in message, text


def test_validation_shards_must_be_of_the_same_tokenizer_and_hold_all_targets_and_one_token_more(
    tmp_path, error_of
):
    val = documents(3, 5)
    this = make_folder(tmp_path / "a", tokenizer="this", val=val)
    cfg = replace(train.parse_flags([TINY, "--steps=2", *this]), val_tokens=len(val) - 1)
    train.open_data(cfg)
    message = error_of(*this, f"--val_tokens={len(val)}")
    assert "val_000000.bin" in message and f"--val_tokens={len(val)}" in message
    that = make_folder(tmp_path / "b", tokenizer="that")
    message = error_of(this[0], that[1])
    for part in (str(tmp_path / "b" / "val_000000.bin"), "'this'", "'that'"):
        assert part in message


def test_tokenizers_are_told_apart_by_their_hash_and_without_one_by_their_sizes(
    tmp_path, error_of, capsys
):
    train_flag, val_flag = make_folder(tmp_path / "train")[0], make_folder(tmp_path / "val")[1]
    flags = [TINY, "--steps=2", train_flag, val_flag]
    metas = [tmp_path / "train/meta.json", tmp_path / "val/meta.json"]
    for ours, theirs in (("a" * 64, "a" * 64), ("a" * 64, ""), ("", "")):
        for meta, digest in zip(metas, (ours, theirs), strict=True):
            meta.write_text(meta_json(sha256=digest))
        train.open_data(train.parse_flags(flags))
        assert ("warning" in capsys.readouterr().err) == (theirs == ""), theirs
    metas[0].write_text(meta_json(sha256="a" * 64))
    metas[1].write_text(meta_json(sha256="b" * 64))
    message = error_of(*flags)
    assert all(part in message for part in ("val_000000.bin", "a" * 64, "b" * 64))
    metas[1].write_text(meta_json(vocab_size=258, sha256=""))  # no hash, but another size
    assert "258" in error_of(*flags)


def test_no_shard_is_trained_on_twice_or_scored_too_whatever_it_is_called(tmp_path, error_of):
    flags = make_folder(tmp_path)
    message = error_of(f"--train_files={tmp_path}/*.bin", flags[1])
    assert "val_000000.bin" in message
    (tmp_path / "train_000009.bin").symlink_to(tmp_path / "train_000001.bin")
    message = error_of(*flags)
    assert "train_000009.bin" in message and "train_000001.bin" in message


def test_a_folder_may_be_called_anything(tmp_path):
    for i, name in enumerate(("a[1]", "a1", "*", "b ?'\"", "ü/[x]")):
        make_folder(tmp_path / name, val=documents(i, 40))
    for i, name in enumerate(("a[1]", "a1", "*", "b ?'\"", "ü/[x]")):
        shards = train.open_shards(f"{tmp_path / name}/val_*.bin")
        assert shards.paths == [tmp_path / name / "val_000000.bin"]
        np.testing.assert_array_equal(shards.tokens[0], documents(i, 40))


def test_vocabulary_and_bos_come_from_meta_json_unless_a_flag_gives_them(tmp_path, error_of):
    flags = [TINY, "--steps=2", *make_folder(tmp_path / "data")]
    (tmp_path / "data" / "meta.json").write_text(meta_json(vocab_size=300, bos_id=7))
    for more, wanted in ([], (300, 7)), (["--vocab_size=400", "--bos_id=0"], (400, 0)):
        cfg = train.open_data(train.parse_flags([*flags, *more]))[2]
        assert (cfg.vocab_size, cfg.bos_id) == wanted
    assert "--bos_id=300" in error_of(*flags, "--bos_id=300")
    few = error_of(*flags, "--steps=9999")  # the epochs that it names are enough
    assert len(
        train.open_data(train.parse_flags([*flags, "--steps=9999", f"--{few.split('--')[-1]}"]))
    )


# ---- The plain stream ----


def test_the_plain_stream_reads_each_token_once_and_in_order():
    cfg = config(Stage(1.0, 32, 8), shuffle=False, steps=12)
    shards = distinct(201, 203)  # 25 blocks of 8 and a token; 25, whose last 2 tokens have no block
    rows = rows_of(train.plan_stream(shards, cfg))
    assert len(rows) == 48
    inputs = np.concatenate([row[:-1] for row in rows])
    np.testing.assert_array_equal(inputs, np.r_[0:200, 201 : 201 + 184])
    for row in rows:
        np.testing.assert_array_equal(row, np.arange(row[0], row[0] + 9))  # targets follow inputs


def test_the_plain_stream_ends_with_the_last_whole_block_that_has_a_target():
    cfg = config(Stage(1.0, 8, 8), shuffle=False, steps=100)
    for lengths, count in ((8,), 0), ((9,), 1), ((16,), 1), ((17,), 2), ((18,), 2), ((17, 4, 9), 3):
        assert len(list(train.plan_stream(distinct(*lengths), cfg))) == count


def test_a_shuffled_epoch_reads_each_block_once_in_an_order_of_its_own_that_the_seed_gives():
    cfg = config(Stage(1.0, 40, 8), shuffle=True, steps=20, max_epochs=2)
    rows = rows_of(train.plan_stream(distinct(201, 206), cfg))
    starts = np.array([row[0] for row in rows])
    every_block = [*range(0, 200, 8), *range(201, 401, 8)]
    assert len(starts) == 100
    assert sorted(starts[:50]) == sorted(starts[50:]) == every_block
    assert (starts[:50] != every_block).any() and (starts[:50] != starts[50:]).any()
    assert all((row == np.arange(row[0], row[0] + 9)).all() for row in rows)
    again, other = (
        [row[0] for row in rows_of(train.plan_stream(distinct(201, 206), replace(cfg, seed=seed)))]
        for seed in (cfg.seed, cfg.seed + 1)
    )
    assert again == starts.tolist() != other


@pytest.mark.parametrize("shuffle", [False, True])
def test_stages_of_different_row_lengths_continue_one_stream(shuffle):
    for rows_before in (6, 5):  # with 5 the first stage ends inside a block
        stages = Stage(0.25, 8 * rows_before, 8), Stage(0.5, 64, 16), Stage(1.0, 16, 4)
        cfg = config(*stages, steps=4, shuffle=shuffle)
        rows = rows_of(train.plan_stream(distinct(209, 225), cfg))
        assert [len(row) for row in rows] == [9] * rows_before + [17] * 4 + [5] * 8
        inputs = np.concatenate([row[:-1] for row in rows])
        assert len(set(inputs.tolist())) == len(inputs)
        assert all((row == np.arange(row[0], row[0] + len(row))).all() for row in rows)
        if rows_before == 6:
            blocks = inputs.reshape(-1, 16)
            np.testing.assert_array_equal(blocks, blocks[:, :1] + np.arange(16)[None])
            assert shuffle or (inputs == np.arange(len(inputs))).all()


def test_training_tokens_are_read_at_most_max_epochs_times():
    for shuffle, epochs in itertools.product((False, True), (1, 3)):
        cfg = config(Stage(1.0, 16, 8), shuffle=shuffle, steps=1000, max_epochs=epochs)
        rows = rows_of(train.plan_stream(distinct(97), cfg))
        tokens, times = np.unique([row[:-1] for row in rows], return_counts=True)
        np.testing.assert_array_equal(tokens, np.arange(96))
        assert set(times) == {epochs}, shuffle


def test_the_stream_reports_the_tokens_it_has_read():
    reads = [read for _, read in train.plan_stream(distinct(30000), CFG)]
    assert reads == [train.tokens_before(step + 1, CFG) for step in range(30)]


# ---- Packed documents ----


def uneven_documents():
    """Two shards of 400 documents whose tokens, BOS aside, name document and place; and a list."""
    lengths = np.random.default_rng(0).integers(2, 90, 400)
    whole = [np.r_[60000, 150 * i + 1 + np.arange(length - 1)] for i, length in enumerate(lengths)]
    return in_memory(np.concatenate(whole[:150]), np.concatenate(whole[150:]), bos=60000), whole


def packed(*stages, **changes):
    return config(*stages, **dict(bos_id=60000, vocab_size=60001) | changes)


def slices_of(steps):
    return [part for rows, _ in steps for row in rows for part in row]


def test_packing_uses_no_document_twice_in_an_epoch_and_only_the_pool_stays_unread():
    for epochs in (1, 2):
        cfg = packed(Stage(1.0, 64, 64, 40), max_epochs=epochs, steps=10_000)
        parts = slices_of(train.plan_packed(uneven_documents()[0], cfg))
        used = [(int(part[1]) - 1) // 150 for part in parts if len(part) > 1]  # a BOS names none
        counts = np.bincount(used, minlength=400)
        assert counts.max() <= epochs
        assert counts.sum() >= 400 * epochs - 10  # those of a row that is not filled are lost


def test_rows_are_filled_with_the_longest_document_that_fits_cut_only_where_none_does():
    """The rule once more: each part is the beginning of the document that it is the turn of."""
    shards, whole = uneven_documents()
    cfg = packed(Stage(0.5, 128, 32, 20), Stage(1.0, 256, 64, 50), steps=40)
    pool, unread = [], list(range(400))
    for step, (rows, _) in enumerate(train.plan_packed(shards, cfg)):
        seq_len, longest = (32, 20) if step < 20 else (64, 50)
        assert [sum(map(len, row)) for row in rows] == [seq_len + 1] * 4
        for row in rows:
            room = seq_len + 1
            for part in row:
                while len(pool) < 64 and unread:
                    pool.append(unread.pop(0))
                lengths = {i: min(len(whole[i]), longest) for i in pool}
                fitting = [n for n in lengths.values() if n <= room]
                wanted = max(fitting, default=min(lengths.values()))  # else the shortest, cut
                assert len(part) == min(wanted, room)
                taken = [i for i in pool if lengths[i] == wanted]
                pool.remove(next(i for i in taken if np.array_equal(whole[i][: len(part)], part)))
                room -= len(part)
    assert step == 39 and len(unread) < 150


def test_the_waste_the_log_reports_is_that_of_an_independent_count(tmp_path):
    flags = make_folder(tmp_path / "data")
    lengths = []
    for name in ("train_000000.bin", "train_000001.bin"):
        tokens = np.fromfile(tmp_path / "data" / name, "<u2", offset=1024)
        lengths += np.diff([*np.nonzero(tokens == BOS)[0], len(tokens)]).tolist()
    flags += ["--stages.doc_len=30", "--steps=4", "--stages.batch_tokens=512"]
    shards, _, cfg, note = train.open_data(train.parse_flags([TINY, *flags]))
    picks = len(slices_of(train.plan(shards, cfg)))
    read = sum(lengths[: picks + 64 - 1])  # the pool was full before the last pick
    assert f"{read} tokens read for {4 * 512} trained on" in note
    cut = float(re.search(r"([\d.]+)% cut off", note)[1])
    assert cut == pytest.approx(100 * (1 - 4 * 512 / read), abs=0.051)


# ---- What a step reads ----


def plans():
    """(config, shards) of a plain stream and of packed documents."""
    stages = Stage(0.5, 80, 8), Stage(1.0, 64, 16)
    yield config(*stages, steps=10, max_epochs=2), distinct(401, 225)
    stages = Stage(0.5, 80, 8, 6), Stage(1.0, 64, 16, 11)
    yield packed(*stages, steps=10), uneven_documents()[0]


def mesh_of(num_devices):
    return train.make_mesh(jax.devices()[:num_devices])


def tokens_in(batch):
    """A batch's rows that hold tokens, in order."""
    rows = np.asarray(batch).reshape(-1, batch.shape[-1])
    return [row.tolist() for row in rows if (row != train.NO_TOKEN).any()]


def test_every_step_has_its_tokens_once_over_the_devices_and_whatever_step_is_begun_with():
    for (cfg, shards), num_devices in itertools.product(plans(), (1, 2, 8)):
        mesh = mesh_of(num_devices)
        whole = [batch["tokens"] for batch in train.train_batches(shards, 0, mesh, cfg)]
        for batch, (rows, _) in zip(whole, train.plan(shards, cfg), strict=True):
            wanted = [np.concatenate(row).tolist() for row in rows]
            assert batch.dtype == np.uint16 and tokens_in(batch) == wanted
            shares = [tokens_in(share.data) for share in batch.addressable_shards]
            assert len(shares) == num_devices
            assert sorted(itertools.chain(*shares)) == sorted(wanted)
        for first in (1, 5, 6, 10):
            tail = train.train_batches(shards, first, mesh, cfg)
            for batch, wanted in zip(tail, whole[first:], strict=True):
                np.testing.assert_array_equal(batch["tokens"], wanted)


def test_micro_steps_divide_a_batch_without_losing_a_row():
    for micro_tokens, num_devices in itertools.product((1, 16, 48), (1, 4, 8)):
        cfg = config(Stage(1.0, 1120, 16), shuffle=False, steps=1, micro_tokens=micro_tokens)
        (rows, _), stage = next(train.plan_stream(distinct(2000), cfg)), cfg.stages[0]
        num_micro, num_rows, width = shape = train.batch_shape(stage, num_devices, cfg)
        assert width == 17 and num_rows // num_devices * 16 <= max(16, micro_tokens)
        assert num_micro * num_rows >= 70 > (num_micro - 1) * num_rows
        batch = train.to_devices(rows, stage, mesh_of(num_devices), cfg)["tokens"]
        assert batch.shape == shape
        shares = [tokens_in(share.data) for share in batch.addressable_shards]
        assert sum(shares, []) == [np.concatenate(row).tolist() for row in rows]  # in order


def test_a_few_more_micro_steps_are_taken_where_they_leave_no_place_empty():
    for num_rows, at_once, wanted in ((80, 12, (8, 10, 17)), (214, 4, (54, 4, 17))):
        stage = Stage(1.0, 16 * num_rows, 16)
        cfg = config(stage, micro_tokens=16 * at_once)
        assert train.batch_shape(stage, 1, cfg) == wanted


def test_an_error_in_the_prefetch_thread_is_raised_in_the_loop(monkeypatch):
    cfg, shards = next(plans())
    made, real = itertools.count(1), train.to_devices

    def fails_at_step_five(*arguments):
        if next(made) == 5:
            raise OSError("the disk is gone")
        return real(*arguments)

    monkeypatch.setattr(train, "to_devices", fails_at_step_five)
    batches = train.train_batches(shards, 0, mesh_of(2), cfg)
    assert len(list(itertools.islice(batches, 4))) == 4
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_batches_are_made_ahead_but_not_further_than_asked(monkeypatch):
    cfg, shards = next(plans())
    made = []

    def make(rows, stage, *_):
        made.append(stage)
        return len(made)

    monkeypatch.setattr(train, "to_devices", make)
    batches = train.train_batches(shards, 0, None, cfg, depth=2)
    assert made == []
    assert next(batches) == 1
    time.sleep(0.1)  # in which the thread could make more
    assert len(made) == 3
    assert list(batches) == list(range(2, 11)) and made == [cfg.stages[0]] * 5 + [cfg.stages[1]] * 5


# ---- Validation rows ----


def test_validation_scores_each_of_its_targets_once_after_the_right_context():
    split = jax.jit(functools.partial(train.inputs_and_targets, cfg=packed()))
    for (val_tokens, context), num_devices in itertools.product(
        [(500, 11), (16, 0), (17, 0), (1, 8), (7, 15)], (1, 8)
    ):
        cfg = packed(val_tokens=val_tokens, val=Stage(seq_len=16), val_context=context)
        rows = train.plan_val(distinct(3000, 100), cfg)
        batch = train.to_devices(rows, cfg.val, mesh_of(num_devices), cfg)["tokens"]
        places = np.full((104, 17), train.NO_TOKEN, np.uint16)  # one shape for one program
        places[: batch.size // 17] = np.reshape(batch, (-1, 17))
        batch = jax.device_get(split({"tokens": places}))
        tokens, targets = batch["tokens"], batch["targets"]
        scored = (batch["weights"] > 0) & (np.arange(16)[None] >= context)
        assert sorted(targets[scored].tolist()) == list(range(1, val_tokens + 1)), context
        for row, place in np.argwhere(scored):
            seen, target = tokens[row, : place + 1].tolist(), targets[row, place]
            wanted = list(range(target))[-len(seen) :]  # a token is its own index
            assert seen == [60000] * (len(seen) - len(wanted)) + wanted


# ---- Too few shards ----


def test_too_few_shards_name_the_steps_they_yield_and_a_further_epoch_is_a_way_out(
    tmp_path, error_of
):
    data = make_folder(tmp_path / "data")
    stream = ["--stages.batch_tokens=96", "--stages.seq_len=32"]
    docs = "--stages.batch_tokens=128 --stages.seq_len=64 --stages.doc_len=40 --max_epochs=2"
    for flags in (data + stream, data + docs.split()):
        message = error_of(*flags, "--steps=1000")
        assert "--steps=1000" in message and "--max_epochs=" in message
        count = int(re.search(r"yield (\d+) steps", message)[1])
        cfg = train.parse_flags([TINY, *flags, f"--steps={count}"])
        train.open_data(cfg)
        more = replace(cfg, steps=count + 1)
        with pytest.raises(train.UsageError, match=f"--steps={count + 1}"):
            train.open_data(more)
        train.open_data(replace(more, max_epochs=cfg.max_epochs + 1))


# ---- The embedded corpus ----


@pytest.fixture
def library(tmp_path, monkeypatch):
    """(folder, names): a standard library with 300 files that count, and others that do not."""
    root = tmp_path / "lib"
    names = "a/b.py a-b.py a.py a/c/d.py Z.py a/testing.py latest/x.py a/_sysconfig.py".split()
    names += [f"pkg{i % 7}/module_{i}.py" for i in range(299 - len(names))]
    wrong = [f"{top}{folder}/no.py" for folder in EXCLUDED for top in ("", "a/", "a/b/")]
    wrong += ["_sysconfigdata_x.py", "a/_sysconfigdata__linux.py", "a/data.txt", "a/b.pyc"]
    for name in names + wrong:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(f"# {name}\n".encode() + b"\x00\xff\r\n")
    (root / "large.py").write_bytes(b"x" * 200_000)
    (root / "too_large.py").write_bytes(b"x" * 200_001)
    (root / "sitecustomize.py").symlink_to("/nowhere/sitecustomize.py")
    (root / "folder.py").mkdir()
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_: {"stdlib": str(root)})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return root, [*names, "large.py"]


def test_the_embedded_corpus_follows_its_written_rule_and_is_written_again_where_damaged(library):
    root, names = library
    wanted = {"train": [], "val": []}
    for name in sorted(names):
        is_val = hashlib.sha256(name.encode()).digest()[0] < 13
        wanted["val" if is_val else "train"] += [BOS, *(root / name).read_bytes()]
    for _ in range(2):  # the second time over damaged shards
        for tokens, pattern in zip(wanted.values(), train.embedded_corpus(), strict=True):
            shards = train.open_shards(pattern)
            assert len(shards.tokens) == 1 and shards.tokens[0].tolist() == tokens
            nothing = hashlib.sha256(b"").hexdigest()
            assert list(shards.meta.values()) == ["bytes", 257, 256, nothing]
            blob = shards.paths[0].read_bytes()
            shards.paths[0].write_bytes(blob[:2000] + b"\x01" + blob[2001:])
    assert stat.S_IMODE(train.cache_dir().stat().st_mode) == 0o700  # the user's alone


def test_a_library_of_fewer_than_300_files_is_no_corpus(library):
    (library[0] / "large.py").unlink()
    with pytest.raises(train.UsageError, match="299.*300"):
        train.embedded_corpus()
