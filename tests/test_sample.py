"""scripts/sample.py: the cache against the full forward pass, the choice of tokens against numpy, texts, and the command line."""
import dataclasses
import functools
import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import numpy_gpt
from scripts import sample
from scripts.sample import Choice, decode, generate, prefill, write_texts
from scripts.text import BYTES, Tokenizer, alphabet_encode, open_tokenizer
from train import Config, Stage, State, UsageError, next_logits, param_specs, replace, save_checkpoint, unstack

BOS, ROWS, LENGTH = 7, 2, 40
STAGE = Stage(0.3, 64, seq_len=32, doc_len=32, short=5, long=7)
PACKED = Config(
    num_layers=4, model_dim=20, num_heads=6, num_kv_heads=2, head_dim=12, mlp_dim=37, vocab_size=131, bos_id=BOS,
    mlp_only=(2,), skips=((0, 2), (1, 3)), late_inputs=((1, 3),), backout=(1,), offset_layers=(0, 1), long_layers=(1,),
    gate_dims=5, softcap=(5, 6, 1.5), attn_scale=0.25, compute_dtype="float32",
    stages=(STAGE, replace(STAGE, end=0.6, long=9), replace(STAGE, end=1.0, long=13)), val=Stage(seq_len=64, short=4, long=11))
PLAIN = replace(PACKED, smear=False, gate_dims=0, long_layers=(), num_kv_heads=None, offset_layers=(1, 3),
                stages=tuple(replace(stage, doc_len=0) for stage in PACKED.stages))
CASES = {
    "packed, short and long windows, the long one grown, a key head per three, key offsets, a block without attention": PACKED,
    "plain, every block windowed, without smear and gates": PLAIN}
SMALL = replace(PACKED, num_layers=2, mlp_only=(), skips=(), late_inputs=(), softcap=())
each_case = pytest.mark.parametrize("cfg", CASES.values(), ids=CASES.keys())

@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)

@functools.cache
def random_weights(cfg):
    shapes = jax.tree.map(lambda spec: spec.shape, param_specs(cfg))
    return unstack(jax.tree.map(jnp.asarray, numpy_gpt.random_weights(cfg, shapes)))

def random_tokens(cfg, rows=ROWS, length=LENGTH):
    """A BOS about every eighth, the first token not one."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, cfg.vocab_size, (rows, length)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.12] = BOS
    tokens[:, 0] = 3
    return tokens


# ---- Cache ----

@each_case
def test_prompts_of_any_length_and_each_token_after_them_have_the_logits_of_the_full_forward_pass(cfg):
    """And in a cache of the row's length, and in one with room."""
    capacity = LENGTH + 9 * (cfg.num_kv_heads is None)
    weights, tokens = random_weights(cfg), random_tokens(cfg)
    whole = np.asarray(jax.jit(lambda weights, tokens: next_logits(weights, tokens, cfg))(weights, tokens))[..., :cfg.vocab_size]
    assert whole.std() > 0.5  # the comparison is not one of zeros
    first = jax.jit(lambda weights, tokens, length: prefill(weights, tokens, length, capacity, cfg))
    following = jax.jit(lambda weights, cache, token: decode(weights, cache, token, capacity, cfg))
    for length in (1, 13, 31):
        prompt = np.where(np.arange(32)[None] < length, tokens[:, :32], BOS)  # what follows the prompt does not matter
        logits, cache = first(weights, prompt, length)
        np.testing.assert_allclose(logits[:, :cfg.vocab_size], whole[:, length - 1], atol=1e-4)
        for position in range(length, LENGTH):
            logits, cache = following(weights, cache, tokens[:, position])
            np.testing.assert_allclose(logits[:, :cfg.vocab_size], whole[:, position], atol=1e-4, err_msg=f"{length} and then {position}")
        assert int(cache.position) == LENGTH and np.all(logits[:, cfg.vocab_size:] < -1e9)

def test_a_block_with_a_window_keeps_that_alone_and_never_more_than_can_come():
    for capacity, sizes in ((64, {0: 5, 1: 12, 3: 5}), (8, {0: 5, 1: 8, 3: 5})):
        cache = jax.eval_shape(lambda: prefill(random_weights(PACKED), random_tokens(PACKED), 3, capacity, PACKED))[1]
        for slots in (cache.keys, cache.values):
            assert {layer: z.shape for layer, z in slots.items()} == {layer: (ROWS * 2, size, 12) for layer, size in sizes.items()}

def test_bfloat16_stays_near_the_full_forward_pass(monkeypatch):
    cfg = replace(SMALL, compute_dtype="bfloat16", softcap=(15, 15, 0))
    weights, tokens = jax.tree.map(lambda w: w.astype("bfloat16") if w.ndim > 1 else w, random_weights(cfg)), random_tokens(cfg)
    for backend, dtype in (("tpu", "bfloat16"), ("cpu", "float32")):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        cache = jax.eval_shape(lambda: prefill(weights, tokens, 20, LENGTH, cfg))[1]
        assert {str(z.dtype) for z in cache.keys.values()} == {dtype}
    whole = np.asarray(jax.jit(lambda weights, tokens: next_logits(weights, tokens, cfg))(weights, tokens))[..., :cfg.vocab_size]
    _, cache = jax.jit(lambda weights, tokens: prefill(weights, tokens, 20, LENGTH, cfg))(weights, tokens)
    following = jax.jit(lambda weights, cache, token: decode(weights, cache, token, LENGTH, cfg))
    for position in range(20, LENGTH):
        logits, cache = following(weights, cache, tokens[:, position])
        assert np.sqrt(np.mean((logits[:, :cfg.vocab_size] - whole[:, position]) ** 2)) < 0.03 * whole.std()


# ---- Choice of a token ----

def oracle_probabilities(logits, temperature, top_k, top_p):
    """Float64, one token at a time: the likeliest first, until there are top_k or those so far have top_p of these together."""
    scaled = np.exp((logits - logits.max()) / temperature)
    order = sorted(range(len(logits)), key=lambda i: (-scaled[i], i))[:top_k or len(logits)]
    total, kept, sum_so_far = sum(scaled[i] for i in order), np.zeros(len(logits)), 0.0
    for i in order:
        if sum_so_far >= top_p:
            break
        kept[i], sum_so_far = scaled[i], sum_so_far + scaled[i] / total
    return kept / kept.sum()

@pytest.mark.parametrize("temperature, top_k, top_p", [
    (0.5, 0, 1.0), (2.0, 3, 1.0), (0.7, 0, 0.01), (1.5, 4, 0.8), (1.0, 99, 0.999)])
def test_tokens_are_drawn_with_the_probabilities_of_the_definition(temperature, top_k, top_p):
    logits, draws = np.array([0.3, 2.0, -1.0, 1.9, 0.3, -1e15, 1.1, -0.4]), 20_000
    rows = jnp.tile(jnp.float32(logits)[None], (draws, 1))
    chosen = np.asarray(jax.jit(sample.choose, static_argnums=3)(rows, jax.random.key(3), 5, Choice(temperature, top_k, top_p)))
    expected, found = oracle_probabilities(logits, temperature, top_k, top_p), np.bincount(chosen, minlength=8) / draws
    assert np.all(found[expected == 0] == 0)
    assert np.all(np.abs(found - expected) < 4.5 * np.sqrt(expected * (1 - expected) / draws) + 1e-12)

def test_each_row_and_each_position_has_a_draw_of_its_own():
    rows, draw = jnp.zeros((64, 8)), jax.jit(sample.choose, static_argnums=3)
    first, again, later = (np.asarray(draw(rows, jax.random.key(0), position, Choice(1.0, 0, 1.0))) for position in (3, 3, 4))
    assert np.array_equal(first, again) and 0.7 < np.mean(first != later) and len(set(first.tolist())) == 8

def test_of_equally_likely_tokens_the_lower_ids_stay_and_a_tiny_temperature_is_the_likeliest():
    rows, key, choose = jnp.tile(jnp.float32([1, 2, 2, 2])[None], (500, 1)), jax.random.key(0), jax.jit(sample.choose, static_argnums=3)
    assert set(np.asarray(choose(rows, key, 0, Choice(1.0, 2, 1.0))).tolist()) == {1, 2}
    assert set(np.asarray(choose(rows, key, 0, Choice(0.0, 0, 1.0))).tolist()) == {1}
    assert set(np.asarray(choose(rows + jnp.float32([0, 0, 0.1, 0])[None], key, 0, Choice(1e-6, 0, 1.0))).tolist()) == {2}


# ---- Generation ----

def texts(cfg, num_samples=1, seed=0, num_tokens=12, choice=Choice(1.0, 0, 1.0), prompt=(BOS, 3, 99)):
    return np.stack([*generate(random_weights(cfg), [*prompt], num_tokens, num_samples, choice, seed, cfg)], axis=1)

def test_temperature_0_is_the_argmax_of_the_full_forward_pass_each_time():
    ids, whole = [BOS, 3, 99], jax.jit(lambda tokens: next_logits(random_weights(SMALL), tokens, SMALL))
    found = texts(SMALL, num_tokens=29, choice=Choice(0.0, 0, 1.0))
    row = np.zeros((1, 32), np.int32)
    for position in range(3, 32):
        row[0, :len(ids)] = ids
        ids.append(int(whole(row)[0, position - 1].argmax()))
    assert found.tolist() == [ids[3:]]

def test_a_seed_gives_the_same_texts_and_the_first_of_them_however_many_there_are():
    one, again, three, other = texts(SMALL), texts(SMALL), texts(SMALL, num_samples=3), texts(SMALL, seed=1)
    assert np.array_equal(one, again) and np.array_equal(one[0], three[0]) and one.shape == (1, 12) and three.shape == (3, 12)
    assert len({tuple(row) for row in [*three.tolist(), *other.tolist()]}) == 4
    assert np.array_equal(texts(SMALL, num_tokens=1), one[:, :1]) and np.array_equal(texts(SMALL, num_tokens=2), one[:, :2])

def test_texts_of_up_to_as_many_tokens_share_their_programs():
    texts(SMALL)
    before = sample.compile_programs.cache_info().misses
    texts(SMALL, num_tokens=20, prompt=(BOS, 5), seed=9)
    assert sample.compile_programs.cache_info().misses == before


# ---- Texts ----

def written(tokens, num_samples=1, prompt="", tokenizer=open_tokenizer(BYTES, None)):
    """(what write got each time, what write_texts returned) of rows of ids or texts, one per sample."""
    rows, out = [[*row.encode()] if isinstance(row, str) else row for row in tokens], []
    steps = (np.array(step, np.int32) for step in zip(*rows, strict=True))
    return out, write_texts(steps, prompt, tokenizer, num_samples, out.append)

def test_one_text_streams_token_by_token_after_its_prompt_and_a_character_comes_when_it_is_whole():
    out, counts = written(["aé€b"], prompt="> ")
    assert out == ["> a", "", "é", "", "", "€", "b", "", "\n"] and counts[:2] == (1, 6) and min(counts[2:]) >= 0

def test_bytes_that_are_no_text_are_one_replacement_and_a_character_cut_by_the_end_is_left_out():
    assert "".join(written([[97, 0xFF, 98, 0xE2, 0x82, 99]])[0]) == "a\ufffdb\ufffdc\n"
    assert "".join(written([[97, 0xE2, 0x82]])[0]) == "a\n"
    assert "".join(written([[97, 0xE2, 256, 98]])[0]) == "a\ufffd\n"  # but one that the document's end cuts is wrong
    assert "".join(written([[97, 300, 98]])[0]) == "ab\n"  # an id of a larger vocabulary than the tokenizer's

def test_a_text_ends_with_its_document_and_the_others_go_on():
    rows = [[97, 98, 256, 99, 99, 99], [100, 101, 102, 103, 256, 99]]
    out, counts = written(rows, 2, prompt="P")
    assert "".join(out) == "--- 1 of 2 ---\nPab\n--- 2 of 2 ---\nPdefg\n" and counts[:2] == (2, 6)
    assert out.index("--- 2 of 2 ---\n") < out.index("g")  # the second streams when the first has ended
    def steps():
        yield np.array([256], np.int32)
        raise AssertionError("asked for more when all had ended")
    assert write_texts(steps(), "x", open_tokenizer(BYTES, None), 1, out.append)[:2] == (1, 0)


# ---- Command line ----

@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run that trained nothing: random weights of a byte-level model."""
    folder = tmp_path_factory.mktemp("run")
    row = replace(STAGE, end=1.0, batch_tokens=60, seq_len=30)
    cfg = replace(SMALL, vocab_size=257, bos_id=256, train_files=f"{folder}/train_*.bin", preset="demo", stages=(row,),
                  val=replace(SMALL.val, seq_len=30), val_context=10)
    params = numpy_gpt.random_weights(cfg, jax.tree.map(lambda spec: spec.shape, param_specs(cfg)))
    save_checkpoint(folder, State(jnp.int32(7), jax.tree.map(jnp.asarray, params), {}), {}, "", cfg)
    (folder / "config.json").write_text(json.dumps({"config": dataclasses.asdict(cfg), "meta": BYTES}))
    return folder

def test_the_command_writes_text_to_stdout_and_the_rest_to_stderr(run_folder, capsys, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("né\n")
    flags = [f"--checkpoint={run_folder}", "--max_new_tokens=9", "--num_samples=2", "--temperature=1", "--top_k=20", "--top_p=0.9"]
    assert not sample.main([*flags, f"--prompt=FILE:{tmp_path}/prompt.txt"])
    out, err = capsys.readouterr()
    assert out.startswith("--- 1 of 2 ---\nné\n") and out.count("\nné\n") == 2 and out.endswith("\n") and "\n--- 2 of 2 ---\n" in out
    assert "step 7" in err and "tokenizer bytes" in err and "prefill: 5 tokens in" in err and "decode: " in err and err.count("tokens/s") == 2
    assert "note" not in err
    assert not sample.main([*flags, "--prompt=né\n"]) and capsys.readouterr().out == out
    assert not sample.main([*flags, "--prompt=né\n", "--seed=5"]) and capsys.readouterr().out != out
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\nab\n"))
    assert not sample.main([*flags, "--interactive"])
    first, second = capsys.readouterr().out.split("--- 1 of 2 ---")[1:]
    assert first != second  # each prompt has a seed of its own

def test_interactive_reads_prompts_from_a_pipe_up_to_an_empty_line(run_folder, capsys, monkeypatch):
    flags = [f"--checkpoint={run_folder}", "--max_new_tokens=3", "--top_k=1"]  # the likeliest: no seed matters
    assert not sample.main([*flags, "--prompt=ab"])
    alone = capsys.readouterr().out
    for text in ("xyz\nab\n\nnot read\n", "xyz\nab"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert not sample.main([*flags, "--interactive"])
        out, err = capsys.readouterr()
        assert out.startswith("xyz") and out.endswith(alone) and out.count("\n") == 2 and err.count("decode: ") == 2 and "prompt>" not in err

def test_interactive_says_which_character_a_model_lacks_and_goes_on(run_folder, capsys, monkeypatch):
    letters = Tokenizer("letters.json", 257, 256, [bytes([i]) for i in range(256)] + [b""], lambda text: alphabet_encode("ab")(text))
    monkeypatch.setattr(sample, "open_tokenizer", lambda meta, folder: letters)
    monkeypatch.setattr(sys, "stdin", io.StringIO("z\na\n"))
    assert not sample.main([f"--checkpoint={run_folder}", "--interactive", "--max_new_tokens=28", "--top_k=1"])
    out, err = capsys.readouterr()
    assert "error: 'z' (U+007A)" in err and err.count("decode: ") == 1 and out.startswith("a")
    assert "note" not in err
    with pytest.raises(UsageError, match="'z'"):
        sample.main([f"--checkpoint={run_folder}", "--prompt=z"])

def test_without_a_prompt_a_document_begins_and_past_the_longest_row_there_is_a_note(run_folder, capsys):
    assert not sample.main([f"--checkpoint={run_folder}", "--max_new_tokens=30", "--top_k=1"])
    err = capsys.readouterr().err
    assert "prefill: 1 tokens" in err and "note: 1 tokens and 30 more pass 30, the longest row" in err

@pytest.mark.parametrize("flags, words", [
    ([], "--checkpoint=None"), (["--checkpoint=nowhere"], "no checkpoint there"), (["--temperature=-1"], "--temperature=-1"),
    (["--temperature=nan"], "--temperature"), (["--top_p=0"], "--top_p"), (["--num_samples=0"], "--num_samples"),
    (["--prompt=a", "--interactive"], "--interactive"), (["--sead=1"], "--sead=1"),
    (["--prompt=FILE:nowhere.txt"], "--prompt=FILE:nowhere.txt"), (["--seed=-1"], "--seed")])
def test_wrong_flags_are_one_sentence_with_the_way_out(run_folder, flags, words):
    with pytest.raises(UsageError) as caught:
        sample.main(flags if not flags or "checkpoint" in flags[0] else [f"--checkpoint={run_folder}", *flags])
    assert words in str(caught.value) and "\n" not in str(caught.value)

def test_the_bench_prints_both_times_and_their_ratio(run_folder, capsys):
    assert not sample.main([f"--checkpoint={run_folder}", "--bench=20", "--top_k=1"])
    out, err = capsys.readouterr()
    assert out.count("ms per token") == 2 and "times faster" in out and "a row of 20 tokens" in err
