"""scripts/sample.py: the cache against the full forward pass, the choice of tokens against numpy.

And the texts, and the command line.
"""

import functools
import io
import json
import math
import shutil
import sys

import byte_run
import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest
from shards import make_folder

from scripts import sample
from scripts.sample import (
    Choice,
    checkpoint_folder,
    decode,
    generate,
    open_checkpoint,
    prefill,
    write_texts,
)
from scripts.text import Tokenizer, alphabet_encode, open_tokenizer
from train import (
    BYTES_META,
    Config,
    NonFiniteLoss,
    Stage,
    UsageError,
    next_logits,
    param_specs,
    replace,
    unstack,
)

BOS, ROWS, LENGTH = 7, 2, 40
STAGE = Stage(0.3, 64, seq_len=32, doc_len=32, short=5, long=7)
PACKED = Config(
    num_layers=3,
    model_dim=20,
    num_heads=6,
    num_kv_heads=2,
    head_dim=12,
    mlp_dim=37,
    vocab_size=131,
    bos_id=BOS,
    mlp_only=(1,),
    skips=((0, 2),),
    late_inputs=((0, 2),),
    backout=(1,),
    offset_layers=(2,),
    long_layers=(2,),
    copy_dim=6,
    gate_dims=5,
    softcap=(5, 6, 1.5),
    attn_scale=0.25,
    compute_dtype="float32",
    stages=(STAGE, replace(STAGE, end=0.6, long=9), replace(STAGE, end=1.0, long=13)),
    val=Stage(seq_len=64, short=4, long=11),
)
PLAIN = replace(
    PACKED,
    num_layers=2,
    mlp_only=(),
    skips=(),
    late_inputs=(),
    backout=(),
    smear=False,
    gate_dims=0,
    num_kv_heads=None,
    offset_layers=(0,),
    long_layers=(1,),
    copy_dim=0,
    softcap=(15, 15, 0),
    compute_dtype="bfloat16",
    stages=tuple(replace(stage, doc_len=0) for stage in PACKED.stages),
    val=Stage(seq_len=20, short=4),  # block 1 looks back a row's length, 20
)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def random_weights(cfg):
    shapes = jax.tree.map(lambda spec: spec.shape, param_specs(cfg))
    return numpy_gpt.random_weights(cfg, shapes)


def random_tokens(cfg):
    """A BOS about every eighth, the first token not one."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, cfg.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.12] = BOS
    tokens[:, 0] = 3
    return tokens


def cached_logits(weights, tokens, length, capacity, cfg):
    """Yield (place, logits there) after a prompt of some length and after each token behind it."""
    prefilled = jax.jit(prefill, static_argnums=(3, 4))
    following = jax.jit(decode, static_argnums=(3, 4))
    is_prompt = np.arange(32)[None] < length
    prompt = np.where(is_prompt, tokens[:, :32], BOS)  # what follows does not matter
    logits, cache = prefilled(weights, prompt, length, capacity, cfg)
    for place in range(length, LENGTH):
        yield place - 1, logits
        logits, cache = following(weights, cache, tokens[:, place], capacity, cfg)
    yield LENGTH - 1, logits
    assert int(cache.position) == LENGTH


# ---- Cache ---------------------------------------------------------------------------------------


def test_logits_with_the_cache_are_those_of_whole_rows_in_float64():
    """With all that the model has, after prompts of any length and each token after them."""
    weights, tokens = random_weights(PACKED), random_tokens(PACKED)
    longs = [stage.long for stage in PACKED.stages]
    whole = numpy_gpt.logits(weights, tokens, (4, 0, 11), longs, PACKED, packed=True)
    assert whole.std() > 0.5  # the comparison is not one of zeros
    copies = unstack(jax.tree.map(jnp.asarray, weights))
    for length in (1, 13, 31):
        for place, logits in cached_logits(copies, tokens, length, LENGTH, PACKED):
            np.testing.assert_allclose(logits[:, :131], whole[:, place], atol=2e-4)
            assert np.all(logits[:, 131:] < -1e9)


def test_logits_with_the_cache_stay_near_the_full_forward_pass_in_bfloat16():
    """Without documents, smear and gates, and with room in the cache."""

    def rounded(w):
        return jnp.asarray(w, "bfloat16" if w.ndim > 1 else "float32")

    weights = unstack(jax.tree.map(rounded, random_weights(PLAIN)))
    tokens = random_tokens(PLAIN)
    whole = jax.jit(next_logits, static_argnums=2)(weights, tokens, PLAIN)
    spread = np.std(whole[..., :131])
    for place, logits in cached_logits(weights, tokens, 13, LENGTH + 9, PLAIN):
        error = (logits - whole[:, place])[:, :131]
        assert np.sqrt(np.mean(error**2)) < 0.03 * spread


def test_a_block_with_a_window_keeps_that_alone_and_never_more_than_can_come():
    weights, tokens = unstack(random_weights(PACKED)), random_tokens(PACKED)
    for capacity, sizes in ((64, {0: 5, 2: 12}), (8, {0: 5, 2: 8})):
        run = functools.partial(prefill, capacity=capacity, cfg=PACKED)
        _, cache = jax.eval_shape(run, weights, tokens, 3)
        for slots in (cache.keys, cache.values):
            shapes = {layer: z.shape for layer, z in slots.items()}
            assert shapes == {layer: (ROWS * 2, size, 12) for layer, size in sizes.items()}


# ---- Choice of a token ---------------------------------------------------------------------------

choose = jax.jit(sample.choose, static_argnums=3)
DRAWS = 10_000


def oracle_probabilities(logits, temperature, top_k, top_p):
    """Float64, the likeliest first, until there are top_k or those so far have top_p of these."""
    scaled = np.exp((logits - logits.max()) / temperature)
    order = sorted(range(len(logits)), key=lambda i: (-scaled[i], i))[: top_k or len(logits)]
    total, kept, sum_so_far = sum(scaled[i] for i in order), np.zeros(len(logits)), 0.0
    for i in order:
        if sum_so_far >= top_p:
            break
        kept[i] = scaled[i]
        sum_so_far += scaled[i] / total
    return kept / kept.sum()


def test_tokens_are_drawn_with_the_probabilities_of_the_definition():
    """Of the equally likely ones, at 0.3, the lower id stays."""
    logits = np.array([0.3, 2.0, -1.0, 1.9, 0.3, -1e15, 1.1, -0.4])
    rows = jnp.tile(jnp.float32(logits)[None], (DRAWS, 1))
    for choice in ((0.5, 0, 1.0), (2.0, 4, 1.0), (1.5, 99, 0.8)):
        chosen = np.asarray(choose(rows, jax.random.key(3), 5, Choice(*choice)))
        expected = oracle_probabilities(logits, *choice)
        found = np.bincount(chosen, minlength=8) / DRAWS
        assert np.all(found[expected == 0] == 0)
        error = 4.5 * np.sqrt(expected * (1 - expected) / DRAWS)
        assert np.all(np.abs(found - expected) < error + 1e-12)
    tied = jnp.float32([[1, 2, 2, 2]])
    for temperature in (0.0, 1e-30):
        chosen = choose(tied, jax.random.key(0), 0, Choice(temperature, 0, 1.0))
        assert chosen.tolist() == [1]


def test_each_row_and_each_position_has_a_draw_of_its_own():
    def draw(position):
        choice = Choice(0.5, 0, 1.0)
        return np.asarray(choose(jnp.zeros((DRAWS, 8)), jax.random.key(0), position, choice))

    first, again, later = draw(3), draw(3), draw(4)
    assert np.array_equal(first, again) and np.mean(first != later) > 0.7
    assert len(set(first[:64].tolist())) == 8


# ---- Generation ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of random weights, a byte-level model."""
    return byte_run.make_run(tmp_path_factory.mktemp("run"))


def test_attention_and_micro_steps_are_this_machines_and_not_those_of_the_training(run_folder):
    theirs = open_checkpoint(run_folder).cfg
    ours = sample.start_jax(replace(theirs, attention="cudnn", micro_tokens=32768))
    assert (ours.attention, ours.micro_tokens) == ("xla", None)


@pytest.fixture(scope="module")
def model(run_folder):
    """(weights, config) of the run."""
    trained = open_checkpoint(run_folder)
    return trained.weights(), trained.cfg


def texts(model, num_samples=1, seed=0, num_tokens=12, temperature=1.0, prompt=(256, 3, 99)):
    weights, cfg = model
    choice = Choice(temperature, 0, 1.0)
    steps = generate(weights, [*prompt], num_tokens, num_samples, choice, seed, cfg)
    return np.stack([*steps], axis=1)


def test_temperature_0_is_the_argmax_of_the_full_forward_pass_each_time(model):
    ids = [256, 3, 99, *texts(model, num_tokens=40, temperature=0.0)[0].tolist()]
    logits = jax.jit(next_logits, static_argnums=2)(model[0], np.array([ids], np.int32), model[1])
    assert ids[3:] == logits[0, 2:-1].argmax(axis=1).tolist()


def test_a_seed_gives_the_same_texts_and_the_first_of_them_however_many_there_are(model):
    one, three, other = texts(model), texts(model, num_samples=3), texts(model, seed=1)
    assert np.array_equal(one, texts(model)) and np.array_equal(one[0], three[0])
    assert one.shape == (1, 12) and three.shape == (3, 12)
    assert len({tuple(row) for row in [*three.tolist(), *other.tolist()]}) == 4
    for count in (1, 2):
        assert np.array_equal(texts(model, num_tokens=count), one[:, :count])
    before = sample.compile_programs.cache_info().misses  # texts of up to as many share programs
    texts(model, num_tokens=20, prompt=(256, 5), seed=9)
    assert sample.compile_programs.cache_info().misses == before


# ---- Texts ---------------------------------------------------------------------------------------


def written(rows, prompt=""):
    """(what write got each time, steps) of rows of ids or texts, one per sample."""
    rows = [[*row.encode()] if isinstance(row, str) else row for row in rows]
    steps = (np.array(step, np.int32) for step in zip(*rows, strict=True))
    tokenizer, out = open_tokenizer(BYTES_META, None), []
    count, *_ = write_texts(steps, prompt, tokenizer, len(rows), out.append)
    return out, count


def test_one_text_streams_token_by_token_and_a_character_comes_when_it_is_whole():
    out, count = written(["aé€b"], "> ")
    assert out == ["> ", "a", "", "é", "", "", "€", "b", "\n"] and count == 7
    out, _ = written([[97, 0xFF, 98, 0xE2, 0x82, 99, 300, 0xE2]])  # 300: no id of the tokenizer
    assert "".join(out) == "a\ufffdb\ufffdc\n"  # what the end cut is left out


def test_several_texts_end_with_their_documents_and_come_one_after_the_other():
    rows = [[97, 98, 256, 120, 120], [100, 101, 102, 103, 256]]
    out, count = written(rows, "P")
    assert "".join(out) == "--- 1 of 2 ---\nPab\n--- 2 of 2 ---\nPdefg\n" and count == 5

    def steps():
        yield np.array([256], np.int32)
        raise AssertionError("asked for more when all had ended")

    assert write_texts(steps(), "x", open_tokenizer(BYTES_META, None), 1, out.append)[0] == 1


# ---- Command line --------------------------------------------------------------------------------


def test_the_command_writes_text_to_stdout_and_the_rest_to_stderr(run_folder, capsys, tmp_path):
    flags = [f"--checkpoint={run_folder}", "--max_new_tokens=9", "--temperature=1"]
    three = [*flags, "--num_samples=3"]
    (tmp_path / "prompt.txt").write_text("né\n")
    assert not sample.main([*three, f"--prompt=FILE:{tmp_path}/prompt.txt"])
    out, err = capsys.readouterr()
    assert out.startswith("--- 1 of 3 ---\nné\n") and out.count("\nné\n") == 3
    assert out.endswith("\n") and "\n--- 3 of 3 ---\n" in out
    assert f"step {byte_run.STEP}" in err and "prefill: 5 tokens in" in err and "decode: " in err
    sample.main([*three, "--prompt=né\n"])
    assert capsys.readouterr().out == out
    sample.main([*three, "--prompt=né\n", "--seed=5"])
    assert capsys.readouterr().out != out
    sample.main(flags)
    assert "prefill: 1 tokens" in capsys.readouterr().err  # a document begins


def test_flags_say_how_a_token_is_chosen(run_folder, monkeypatch):
    chosen = []

    def generate(weights, ids, num_tokens, num_samples, choice, seed, cfg):
        chosen.append((num_tokens, num_samples, choice, seed))
        return iter([np.full(num_samples, 256)])

    monkeypatch.setattr(sample, "generate", generate)
    flags = ["--max_new_tokens=9", "--num_samples=2", "--top_k=20", "--top_p=0.9", "--seed=5"]
    sample.main([f"--checkpoint={run_folder}", "--temperature=1.5", *flags])
    sample.main([f"--checkpoint={run_folder}"])
    assert chosen == [(9, 2, Choice(1.5, 20, 0.9), 5), (256, 1, Choice(0.7, 0, 1.0), 0)]


def test_interactive_reads_prompts_from_a_pipe_to_its_end(run_folder, capsys, monkeypatch):
    flags = [f"--checkpoint={run_folder}", "--max_new_tokens=3", "--temperature=1"]

    def ask(blob):
        stdin = io.TextIOWrapper(io.BytesIO(blob), encoding="ascii")  # of a narrow console
        monkeypatch.setattr(sys, "stdin", stdin)
        sample.main([*flags, "--interactive"])

    sample.main([*flags, "--prompt=ab", "--seed=1"])
    alone = capsys.readouterr().out
    # the second has the next seed; an empty line is a prompt of nothing
    for blob, first in (b"xyz\nab\n", "xyz"), (b"\xef\xbb\xbfxyz\r\nab", "xyz"), (b"\nab", ""):
        ask(blob)
        out, err = capsys.readouterr()
        assert out.startswith(first) and out.endswith(alone)
        assert err.count("decode: ") == 2 and "prompt>" not in err

    # what is no text is named, and what the model lacks, and the next prompt is answered
    with pytest.raises(UsageError, match="1 of 3 prompts"):
        ask(b"\xc3\xa9\ncaf\xe9\na\n")
    out, err = capsys.readouterr()
    assert "error: stdin, line 2: wanted UTF-8" in err and out.startswith("é") and "\na" in out
    pieces = [bytes([i]) for i in range(256)] + [b""]
    letters = Tokenizer("letters.json", 257, 256, pieces, alphabet_encode("ab"))
    monkeypatch.setattr(sample, "open_tokenizer", lambda meta, folder: letters)
    with pytest.raises(UsageError, match="1 of 2 prompts"):
        ask(b"z\na\n")
    out, err = capsys.readouterr()
    assert "error: 'z' (U+007A)" in err and err.count("decode: ") == 1 and out.startswith("a")
    with pytest.raises(UsageError, match="'z'"):
        sample.main([*flags, "--prompt=z"])


def test_what_cannot_be_sampled_is_one_sentence_with_the_way_out(run_folder, tmp_path, monkeypatch):
    def refused(words, *flags):
        with pytest.raises(UsageError) as caught:
            sample.main([*flags])
        assert words in str(caught.value) and "\n" not in str(caught.value)

    run = f"--checkpoint={run_folder}"
    refused("--checkpoint=: wanted")
    refused("no checkpoint there", "--checkpoint=nowhere")
    for flag in ("--temperature=-1", "--temperature=nan", "--top_p=0", "--num_samples=0"):
        refused(flag.split("=")[0], run, flag)
    monkeypatch.setattr(sample, "generate", None)  # what follows is found out before
    refused("--interactive", run, "--prompt=a", "--interactive")
    refused("--sead=1", run, "--sead=1")
    refused("--prompt=FILE:nowhere.txt", run, "--prompt=FILE:nowhere.txt")
    refused("--prompt, line 1: wanted UTF-8", run, "--prompt=caf\udce9")
    (tmp_path / "latin.txt").write_bytes(b"one\r\ncaf\xe9\r\n")
    refused("latin.txt, line 2: wanted UTF-8", run, f"--prompt=FILE:{tmp_path}/latin.txt")
    refused("no such folder", run, f"--tokenizer={tmp_path}/nowhere")
    make_folder(tmp_path / "shards", "test")
    refused("meta.json: of another tokenizer", run, f"--tokenizer={tmp_path}/shards")
    monkeypatch.setattr(sys, "stdin", None)  # closed
    refused("stdin is closed", run, "--interactive")


def test_a_damaged_manifest_is_one_sentence_and_a_spoilt_weight_no_text(run_folder, tmp_path):
    (saved,) = run_folder.glob("ckpt/step-*/manifest.json")
    whole = json.loads(saved.read_text())

    def opened(about, words):
        other = byte_run.changed(run_folder, tmp_path / "run")
        next(other.glob("ckpt/*/manifest.json")).write_text(json.dumps(about))
        with pytest.raises(UsageError, match=words) as caught:
            open_checkpoint(other)
        assert str(other) in str(caught.value) and "\n" not in str(caught.value)
        shutil.rmtree(other)

    config = whole["config"]
    for name, value in (
        ("num_layers", "1"),
        ("vocab_size", 1.5),
        ("attn_scale", math.nan),
        ("skips", [{}]),
        ("val", 7),
        ("stages", [{"end": 1.0, "speed": 2}]),
        ("mlp_only", [[0]]),
        ("stages", [config["stages"][0] | {"ahead": [{}]}]),
    ):
        opened(whole | {"config": config | {name: value}}, "manifest.json: its config cannot be")
    opened(whole | {"config": []}, "manifest.json: its config cannot be read")
    opened(whole | {"step": None}, "manifest.json: its config cannot be read")
    opened([whole], "manifest.json: its config cannot be read")
    for meta in (None, {"bos_id": "x"}, {"tokenizer": "../mine.json"}):
        meta = meta and whole["meta"] | meta
        opened(whole | {"meta": meta}, "manifest.json: wanted the tokenizer")
    del whole["meta"]
    opened(whole, "config.json: wanted the tokenizer")

    spoilt = byte_run.changed(run_folder, tmp_path / "spoilt", byte_run.spoil)
    for temperature in (0, 1):
        with pytest.raises(NonFiniteLoss):
            sample.main([f"--checkpoint={spoilt}", f"--temperature={temperature}"])


def test_the_newest_checkpoint_is_that_of_the_greatest_number(tmp_path):
    """What only looks like one is none. A path may hold characters of patterns."""
    run = tmp_path / "r[1]*? 'é"
    for name in ("step-000007", "step-999999", "step-1000000", "step-9", "step-999999.bak"):
        (run / "ckpt" / name).mkdir(parents=True)
    assert checkpoint_folder(run) == run / "ckpt/step-1000000"
    (run / "ckpt/step-000007/manifest.json").touch()
    assert checkpoint_folder(run / "ckpt/step-000007").name == "step-000007"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="no checkpoint there"):
        checkpoint_folder(tmp_path / "loop")


def test_the_bench_prints_both_times_and_their_ratio(run_folder, capsys):
    assert not sample.main([f"--checkpoint={run_folder}", "--bench=20", "--temperature=1"])
    out, err = capsys.readouterr()
    assert out.count("ms per token") == 2 and "of the time" in out
    assert "a row of 20 tokens" in err
