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
from scripts.sample import Choice, choose, decode, generate, prefill, write_texts
from scripts.text import BYTES, Tokenizer, open_tokenizer
from train import PRESETS, Config, UsageError, next_logits, param_specs, shape_of, unstack

BOS, ROWS, LENGTH = 7, 2, 40
TINY = Config(**PRESETS["tiny"] | {"vocab_size": 131, "bos_id": BOS})
PACKED = Config(
    num_layers=4, model_dim=20, num_heads=6, num_kv_heads=2, head_dim=12, mlp_dim=37, vocab_size=131, bos_id=BOS, tied_stages=0,
    mlp_only="2", skips="0>2,1>3", late_inputs="1>3", backout="1", offset_layers="0,1", gate_dims=5, softcap="5,6,1.5", rope_base=50.0,
    attn_scale=0.25, attn_block=8, compute_dtype="float32", stage_ends="0.3,0.6,1", batch_tokens="64", seq_len="32", max_doc_len="32",
    window_short="5", window_long="7,9,13", stage_lr="1", mtp="", long_layers="1", val_window_short=4, val_window_long=11)
CASES = {
    "tiny preset": TINY,
    "packed, short and long windows, the long one grown, a key head per three, key offsets, a block without attention": PACKED,
    "plain, every block windowed, without smear and gates": dataclasses.replace(
        PACKED, max_doc_len="0", smear=0, gate_dims=0, long_layers="", num_kv_heads=0, offset_layers="1,3"),
    "packed, no windows, one key head": dataclasses.replace(
        PACKED, num_kv_heads=1, val_window_short=0, val_window_long=0, window_short="0", window_long="0")}
each_case = pytest.mark.parametrize("cfg", CASES.values(), ids=CASES.keys())
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time


@functools.cache
def random_weights(cfg):
    shapes = jax.tree.map(lambda spec: shape_of(spec, cfg), param_specs(cfg))
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
    capacity = LENGTH + 9 * (cfg.num_kv_heads == 0)
    weights, tokens = random_weights(cfg), random_tokens(cfg)
    whole = np.asarray(jit(lambda weights, tokens: next_logits(weights, tokens, cfg))(weights, tokens))[..., :cfg.vocab_size]
    assert whole.std() > 0.5  # the comparison is not one of zeros
    first = jit(lambda weights, tokens, length: prefill(weights, tokens, length, capacity, cfg))
    following = jit(lambda weights, cache, token: decode(weights, cache, token, capacity, cfg))
    for length in (1, 2, 13, 31):
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

def test_bfloat16_stays_near_the_full_forward_pass():
    cfg = dataclasses.replace(PACKED, compute_dtype="bfloat16", softcap="15")
    weights, tokens = jax.tree.map(lambda w: w.astype("bfloat16") if w.ndim > 1 else w, random_weights(cfg)), random_tokens(cfg)
    whole = np.asarray(jit(lambda weights, tokens: next_logits(weights, tokens, cfg))(weights, tokens))[..., :cfg.vocab_size]
    _, cache = jit(lambda weights, tokens: prefill(weights, tokens, 20, LENGTH, cfg))(weights, tokens)
    following = jit(lambda weights, cache, token: decode(weights, cache, token, LENGTH, cfg))
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
    (1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 1, 1.0), (1.0, 0, 0.6), (0.7, 0, 0.01), (1.5, 4, 0.8), (1.0, 99, 0.999)])
def test_tokens_are_drawn_with_the_probabilities_of_the_definition(temperature, top_k, top_p):
    logits, draws = np.array([0.3, 2.0, -1.0, 1.9, 0.3, -1e15, 1.1, -0.4]), 20_000
    rows = jnp.tile(jnp.float32(logits)[None], (draws, 1))
    chosen = np.asarray(jax.jit(choose, static_argnums=3)(rows, jax.random.key(3), 5, Choice(temperature, top_k, top_p)))
    expected, found = oracle_probabilities(logits, temperature, top_k, top_p), np.bincount(chosen, minlength=8) / draws
    assert np.all(found[expected == 0] == 0)
    assert np.all(np.abs(found - expected) < 4.5 * np.sqrt(expected * (1 - expected) / draws) + 1e-12)

def test_of_equally_likely_tokens_the_lower_ids_stay_and_a_tiny_temperature_is_the_likeliest():
    rows, key = jnp.tile(jnp.float32([1, 2, 2, 2])[None], (500, 1)), jax.random.key(0)
    assert set(np.asarray(choose(rows, key, 0, Choice(1.0, 2, 1.0))).tolist()) == {1, 2}
    assert set(np.asarray(choose(rows, key, 0, Choice(0.0, 0, 1.0))).tolist()) == {1}
    assert set(np.asarray(choose(rows + jnp.float32([0, 0, 0.1, 0])[None], key, 0, Choice(1e-30, 0, 1.0))).tolist()) == {2}


# ---- Generation ----

SMALL = dataclasses.replace(PACKED, num_layers=2, mlp_only="", skips="", late_inputs="", softcap="0")

def texts(cfg, num_samples=1, seed=0, num_tokens=12, choice=Choice(1.0, 0, 1.0), prompt=(BOS, 3, 99)):
    return np.stack([*generate(random_weights(cfg), [*prompt], num_tokens, num_samples, choice, seed, cfg)], axis=1)

def test_temperature_0_is_the_argmax_of_the_full_forward_pass_each_time():
    ids, whole = [BOS, 3, 99], jit(lambda tokens: next_logits(random_weights(SMALL), tokens, SMALL))
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
