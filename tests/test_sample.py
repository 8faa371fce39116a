"""scripts/sample.py: the cache against the full forward pass, the choice of tokens against numpy.

And the texts, and the command line.
"""

import dataclasses
import functools
import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest

from scripts import sample
from scripts.sample import Choice, decode, generate, prefill, write_texts
from scripts.text import BYTES, Tokenizer, alphabet_encode, open_tokenizer
from train import (
    Config,
    Stage,
    State,
    UsageError,
    next_logits,
    param_specs,
    replace,
    save_checkpoint,
    unstack,
)

BOS, ROWS, LENGTH = 7, 2, 40
STAGE = Stage(0.3, 64, seq_len=32, doc_len=32, short=5, long=7)
PACKED = Config(
    num_layers=4,
    model_dim=20,
    num_heads=6,
    num_kv_heads=2,
    head_dim=12,
    mlp_dim=37,
    vocab_size=131,
    bos_id=BOS,
    mlp_only=(2,),
    skips=((0, 2), (1, 3)),
    late_inputs=((1, 3),),
    backout=(1,),
    offset_layers=(0, 1),
    long_layers=(1,),
    gate_dims=5,
    softcap=(5, 6, 1.5),
    attn_scale=0.25,
    compute_dtype="float32",
    stages=(STAGE, replace(STAGE, end=0.6, long=9), replace(STAGE, end=1.0, long=13)),
    val=Stage(seq_len=64, short=4, long=11),
)
PLAIN = replace(
    PACKED,
    smear=False,
    gate_dims=0,
    long_layers=(1,),
    num_kv_heads=None,
    offset_layers=(1, 3),
    stages=tuple(replace(stage, doc_len=0) for stage in PACKED.stages),
    val=Stage(seq_len=20, short=4),  # block 1 looks back a row's length, 20
)
SMALL = replace(PACKED, num_layers=2, mlp_only=(), skips=(), late_inputs=(), softcap=())


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def random_weights(cfg):
    shapes = jax.tree.map(lambda spec: spec.shape, param_specs(cfg))
    return unstack(jax.tree.map(jnp.asarray, numpy_gpt.random_weights(cfg, shapes)))


def random_tokens(cfg):
    """A BOS about every eighth, the first token not one."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, cfg.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.12] = BOS
    tokens[:, 0] = 3
    return tokens


def whole_logits(weights, tokens, cfg):
    """The oracle: logits of whole rows."""
    logits = jax.jit(next_logits, static_argnums=2)(weights, tokens, cfg)
    return np.asarray(logits)[..., : cfg.vocab_size]


# ---- Cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg, capacity", [(PACKED, LENGTH), (PLAIN, LENGTH + 9)])
def test_logits_with_the_cache_are_those_of_the_full_forward_pass(cfg, capacity):
    """After prompts of any length, and each token after them, with documents and without."""
    weights, tokens = random_weights(cfg), random_tokens(cfg)
    whole = whole_logits(weights, tokens, cfg)
    assert whole.std() > 0.5  # the comparison is not one of zeros
    first = jax.jit(prefill, static_argnums=(3, 4))
    following = jax.jit(decode, static_argnums=(3, 4))
    for length in (1, 13, 31):
        is_prompt = np.arange(32)[None] < length
        prompt = np.where(is_prompt, tokens[:, :32], BOS)  # what follows does not matter
        logits, cache = first(weights, prompt, length, capacity, cfg)
        for position in range(length, LENGTH):
            found = logits[:, : cfg.vocab_size]
            np.testing.assert_allclose(found, whole[:, position - 1], atol=1e-4)
            logits, cache = following(weights, cache, tokens[:, position], capacity, cfg)
        np.testing.assert_allclose(logits[:, : cfg.vocab_size], whole[:, -1], atol=1e-4)
        assert int(cache.position) == LENGTH and np.all(logits[:, cfg.vocab_size :] < -1e9)


def test_a_block_with_a_window_keeps_that_alone_and_never_more_than_can_come():
    weights, tokens = random_weights(PACKED), random_tokens(PACKED)
    for capacity, sizes in ((64, {0: 5, 1: 12, 3: 5}), (8, {0: 5, 1: 8, 3: 5})):
        run = functools.partial(prefill, capacity=capacity, cfg=PACKED)
        _, cache = jax.eval_shape(run, weights, tokens, 3)
        for slots in (cache.keys, cache.values):
            shapes = {layer: z.shape for layer, z in slots.items()}
            assert shapes == {layer: (ROWS * 2, size, 12) for layer, size in sizes.items()}


def test_bfloat16_stays_near_the_full_forward_pass():
    cfg = replace(SMALL, compute_dtype="bfloat16", softcap=(15, 15, 0))

    def rounded(w):
        return w.astype("bfloat16") if w.ndim > 1 else w

    weights, tokens = jax.tree.map(rounded, random_weights(cfg)), random_tokens(cfg)
    whole = whole_logits(weights, tokens, cfg)
    _, cache = jax.jit(prefill, static_argnums=(3, 4))(weights, tokens, 20, LENGTH, cfg)
    following = jax.jit(decode, static_argnums=(3, 4))
    for position in range(20, LENGTH):
        logits, cache = following(weights, cache, tokens[:, position], LENGTH, cfg)
        error = logits[:, : cfg.vocab_size] - whole[:, position]
        assert np.sqrt(np.mean(error**2)) < 0.03 * whole.std()


# ---- Choice of a token ---------------------------------------------------------------------------

choose = jax.jit(sample.choose, static_argnums=3)


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
    logits, draws = np.array([0.3, 2.0, -1.0, 1.9, 0.3, -1e15, 1.1, -0.4]), 20_000
    rows = jnp.tile(jnp.float32(logits)[None], (draws, 1))
    for choice in ((0.5, 0, 1.0), (2.0, 3, 1.0), (0.7, 0, 0.01), (1.5, 4, 0.8), (1.0, 99, 0.999)):
        chosen = np.asarray(choose(rows, jax.random.key(3), 5, Choice(*choice)))
        expected = oracle_probabilities(logits, *choice)
        found = np.bincount(chosen, minlength=8) / draws
        assert np.all(found[expected == 0] == 0)
        error = 4.5 * np.sqrt(expected * (1 - expected) / draws)
        assert np.all(np.abs(found - expected) < error + 1e-12)


def test_each_row_and_each_position_has_a_draw_of_its_own():
    def draw(position):
        choice = Choice(1.0, 0, 1.0)
        return np.asarray(choose(jnp.zeros((64, 8)), jax.random.key(0), position, choice))

    first, again, later = draw(3), draw(3), draw(4)
    assert np.array_equal(first, again) and np.mean(first != later) > 0.7
    assert len(set(first.tolist())) == 8


def test_of_equally_likely_tokens_the_lower_ids_stay_and_a_tiny_temperature_is_the_likeliest():
    def drawn(logits, *choice):
        rows = jnp.tile(jnp.float32(logits)[None], (500, 1))
        return set(np.asarray(choose(rows, jax.random.key(0), 0, Choice(*choice))).tolist())

    assert drawn([1, 2, 2, 2], 1.0, 2, 1.0) == {1, 2}
    assert drawn([1, 2, 2, 2], 0.0, 0, 1.0) == {1}
    for temperature in (1e-6, 1e-30):
        assert drawn([1, 2, 2.1, 2], temperature, 0, 1.0) == {2}


# ---- Generation ----------------------------------------------------------------------------------


def texts(num_samples=1, seed=0, num_tokens=12, choice=Choice(1.0, 0, 1.0), prompt=(BOS, 3, 99)):
    weights = random_weights(SMALL)
    steps = generate(weights, [*prompt], num_tokens, num_samples, choice, seed, SMALL)
    return np.stack([*steps], axis=1)


def test_temperature_0_is_the_argmax_of_the_full_forward_pass_each_time():
    ids = [BOS, 3, 99]
    found = texts(num_tokens=29, choice=Choice(0.0, 0, 1.0))
    row = np.zeros((1, 32), np.int32)
    whole = jax.jit(next_logits, static_argnums=2)
    for position in range(3, 32):
        row[0, : len(ids)] = ids
        ids.append(int(whole(random_weights(SMALL), row, SMALL)[0, position - 1].argmax()))
    assert found.tolist() == [ids[3:]]


def test_a_seed_gives_the_same_texts_and_the_first_of_them_however_many_there_are():
    one, three, other = texts(), texts(num_samples=3), texts(seed=1)
    assert np.array_equal(one, texts()) and np.array_equal(one[0], three[0])
    assert one.shape == (1, 12) and three.shape == (3, 12)
    assert len({tuple(row) for row in [*three.tolist(), *other.tolist()]}) == 4
    for count in (1, 2):
        assert np.array_equal(texts(num_tokens=count), one[:, :count])
    before = sample.compile_programs.cache_info().misses  # texts of up to as many share programs
    texts(num_tokens=20, prompt=(BOS, 5), seed=9)
    assert sample.compile_programs.cache_info().misses == before


# ---- Texts ---------------------------------------------------------------------------------------


def written(rows, prompt=""):
    """(what write got each time, steps) of rows of ids or texts, one per sample."""
    rows = [[*row.encode()] if isinstance(row, str) else row for row in rows]
    steps = (np.array(step, np.int32) for step in zip(*rows, strict=True))
    tokenizer, out = open_tokenizer(BYTES, None), []
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

    assert write_texts(steps(), "x", open_tokenizer(BYTES, None), 1, out.append)[0] == 1


# ---- Command line --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run that trained nothing: random weights of a byte-level model."""
    folder = tmp_path_factory.mktemp("run")
    cfg = replace(
        SMALL,
        vocab_size=257,
        bos_id=256,
        train_files=f"{folder}/train_*.bin",
        preset="demo",
        stages=(replace(STAGE, end=1.0, batch_tokens=60, seq_len=30),),
        val=replace(SMALL.val, seq_len=30),
        val_context=10,
    )
    shapes = jax.tree.map(lambda spec: spec.shape, param_specs(cfg))
    params = jax.tree.map(jnp.asarray, numpy_gpt.random_weights(cfg, shapes))
    save_checkpoint(folder, State(jnp.int32(7), params, {}), {}, "", cfg)
    about = {"config": dataclasses.asdict(cfg), "meta": BYTES}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def test_the_command_writes_text_to_stdout_and_the_rest_to_stderr(run_folder, capsys, tmp_path):
    flags = [f"--checkpoint={run_folder}", "--max_new_tokens=9", "--num_samples=2"]
    flags += ["--temperature=1", "--top_k=20", "--top_p=0.9"]
    (tmp_path / "prompt.txt").write_text("né\n")
    assert not sample.main([*flags, f"--prompt=FILE:{tmp_path}/prompt.txt"])
    out, err = capsys.readouterr()
    assert out.startswith("--- 1 of 2 ---\nné\n") and out.count("\nné\n") == 2
    assert out.endswith("\n") and "\n--- 2 of 2 ---\n" in out
    assert "step 7" in err and "prefill: 5 tokens in" in err and "decode: " in err
    sample.main([*flags, "--prompt=né\n"])
    assert capsys.readouterr().out == out
    sample.main([*flags, "--prompt=né\n", "--seed=5"])
    assert capsys.readouterr().out != out
    sample.main([*flags[:2]])
    assert "prefill: 1 tokens" in capsys.readouterr().err  # a document begins


def test_interactive_reads_prompts_from_a_pipe_up_to_an_empty_line(run_folder, capsys, monkeypatch):
    flags = [f"--checkpoint={run_folder}", "--max_new_tokens=3"]
    sample.main([*flags, "--prompt=ab", "--seed=1"])
    alone = capsys.readouterr().out
    for text in ("xyz\nab\n\nnot read\n", "xyz\nab"):  # the second prompt has the next seed
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        sample.main([*flags, "--interactive"])
        out, err = capsys.readouterr()
        assert out.startswith("xyz") and out.endswith(alone)
        assert err.count("decode: ") == 2 and "prompt>" not in err


def test_interactive_says_which_character_a_model_lacks_and_goes_on(
    run_folder, capsys, monkeypatch
):
    pieces = [bytes([i]) for i in range(256)] + [b""]
    letters = Tokenizer("letters.json", 257, 256, pieces, alphabet_encode("ab"))
    monkeypatch.setattr(sample, "open_tokenizer", lambda meta, folder: letters)
    monkeypatch.setattr(sys, "stdin", io.StringIO("z\na\n"))
    sample.main([f"--checkpoint={run_folder}", "--interactive", "--max_new_tokens=28"])
    out, err = capsys.readouterr()
    assert "error: 'z' (U+007A)" in err and err.count("decode: ") == 1 and out.startswith("a")
    with pytest.raises(UsageError, match="'z'"):
        sample.main([f"--checkpoint={run_folder}", "--prompt=z"])


def test_wrong_flags_are_one_sentence_with_the_way_out(run_folder):
    def refused(words, *flags):
        with pytest.raises(UsageError) as caught:
            sample.main([*flags])
        assert words in str(caught.value) and "\n" not in str(caught.value)

    run = f"--checkpoint={run_folder}"
    refused("--checkpoint=: wanted")
    refused("no checkpoint there", "--checkpoint=nowhere")
    for flag in ("--temperature=-1", "--temperature=nan", "--top_p=0", "--num_samples=0"):
        refused(flag.split("=")[0], run, flag)
    refused("--interactive", run, "--prompt=a", "--interactive")
    refused("--sead=1", run, "--sead=1")
    refused("--prompt=FILE:nowhere.txt", run, "--prompt=FILE:nowhere.txt")


def test_the_bench_prints_both_times_and_their_ratio(run_folder, capsys):
    assert not sample.main([f"--checkpoint={run_folder}", "--bench=20", "--top_k=1"])
    out, err = capsys.readouterr()
    assert out.count("ms per token") == 2 and "times faster" in out
    assert "a row of 20 tokens" in err
