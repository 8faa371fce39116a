"""The weight table and the model, against the float64 GPT of numpy_gpt.py and against what each part promises."""
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import numpy_gpt
from jaxprs import equations
from train import (
    SCALARS, Config, Model, Spec, attention_xla, capped, constant, count_params, forward, gather, init_params, log_partition, lookup,
    loss_fn, loss_shares, make_init, make_mesh, make_train_step, matmul, name_of, next_logits, normal, offset_keys, optimizer_rules,
    param_specs, restack, rms_norm, rotary, rotate, shape_of, softcapped_logits, softmax_average, stages, unstack, val_stage)

BOS, ROWS, LENGTH = 7, 2, 22
BASE = Config(
    num_layers=3, model_dim=20, num_heads=6, num_kv_heads=2, head_dim=12, mlp_dim=37, vocab_size=131, bos_id=BOS, tied_stages=0,
    mlp_only="", skips="0>2", late_inputs="0>2", backout="1", offset_layers="", gate_dims=5, softcap="5,6,1.5", rope_base=50.0,
    attn_scale=0.25, attn_block=11, compute_dtype="float32", stage_ends="1", batch_tokens="44", seq_len="22", max_doc_len="0",
    window_short="0", window_long="0", stage_lr="1", mtp="", long_layers="1", val_window_short=0, val_window_long=0)
config = functools.partial(dataclasses.replace, BASE)
WITHOUT = dict(skips="", late_inputs="", backout="", gate_dims=0, smear=0, softcap="5")
CASES = {
    "plain, a key head per query head, without what is optional, key offsets": config(**WITHOUT, num_kv_heads=0, offset_layers="0,2"),
    "packed, one key head, deep, a block without attention, two skips, two more tokens ahead": config(
        num_layers=4, num_kv_heads=1, mlp_only="2", skips="0>2,1>3", late_inputs="1>3", max_doc_len="22", mtp="0.5,0.25"),
    "packed, short and long windows, the long one grown, key offsets": config(
        max_doc_len="22", stage_ends="0.3,0.6,1", window_short="5", window_long="7,9,13", val_window_short=4, val_window_long=11,
        offset_layers="1,2"),
    "no softcap, default scale, whole attention, key offsets, two skips into one block, no gates, one more token ahead": config(
        num_kv_heads=3, gate_dims=0, softcap="0", attn_scale=0.0, attn_block=0, skips="0>2,1>2", late_inputs="0>1,0>2", backout="0",
        offset_layers="1,2", window_short="4", mtp="0.5"),
}
PLAIN, PACKED, WINDOWS, UNGATED = CASES.values()
LONGS = {WINDOWS: (7, 9, 13)}  # of the stages up to the last, where there are several
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
each_case = pytest.mark.parametrize("cfg", CASES.values(), ids=CASES.keys())


def shapes(cfg):
    return jax.tree.map(lambda spec: shape_of(spec, cfg), param_specs(cfg))

@functools.cache
def compiled_init(cfg):
    return jit(lambda seed: init_params(jax.random.key(seed), param_specs(cfg), cfg))

def random_weights(cfg, seed=0):
    return numpy_gpt.random_weights(cfg, shapes(cfg), seed)

def on_device(weights):
    return unstack(jax.tree.map(jnp.asarray, weights))

def random_tokens(cfg, rows=ROWS, length=LENGTH, seed=1):
    """Tokens with a BOS about every sixth, the first token not one."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, cfg.vocab_size, (rows, length))
    tokens[rng.random(tokens.shape) < 0.16] = BOS
    tokens[:, 0] = 3
    return tokens

@functools.cache
def compiled(cfg):
    """(stacked weights, tokens, targets, target weights) -> (logits, loss, gradients), all in one program, of the last stage; its loss
    with the first one's tokens ahead."""
    stage, ahead = stages(cfg)[-1], {"ahead": loss_shares(0, stages(cfg)[0], cfg)}
    def run(weights, tokens_BT, target_BT, weight_BT):
        copies = lambda weights: unstack(gather(weights, param_specs(cfg), 1, cfg))
        x_ND = forward(copies(weights), tokens_BT, stage, cfg).reshape(-1, cfg.model_dim)
        logits = softcapped_logits(x_ND, copies(weights)["head"], cfg)
        loss, grads = jax.value_and_grad(lambda w: loss_fn(copies(w) | ahead, tokens_BT, target_BT, weight_BT, stage, cfg))(weights)
        return logits.reshape(*tokens_BT.shape, -1), loss, grads
    return jit(run)

@functools.cache
def compiled_logits(cfg):
    return jit(lambda weights, tokens: softcapped_logits(
        forward(unstack(weights), tokens, stages(cfg)[-1], cfg).reshape(-1, cfg.model_dim), weights["head"], cfg))

def model_logits(weights, tokens, cfg):
    return np.array(compiled_logits(cfg)(weights, tokens)).reshape(*tokens.shape, -1)

def oracle_logits(weights, tokens, cfg):
    return numpy_gpt.logits(weights, tokens, stages(cfg)[-1].windows, LONGS.get(cfg, ()), cfg, packed=cfg.max_doc_len != "0")

def oracle_loss(weights, tokens, targets, weight, cfg):
    return numpy_gpt.loss(oracle_logits(weights, tokens, cfg), targets, weight, numpy_gpt.numbers(cfg.mtp, float))

def dots(function, *args):
    return [e for e in equations(jax.make_jaxpr(function)(*args).jaxpr) if e.primitive.name == "dot_general"]


# ---- The whole model -------------------------------------------------------------------------------------------------

@each_case
def test_logits_and_loss_are_those_of_a_plain_float64_gpt(cfg):
    weights, tokens, targets = random_weights(cfg), random_tokens(cfg), random_tokens(cfg, seed=2)
    weight = np.random.default_rng(3).choice([0.0, 0.5, 1.0], tokens.shape).astype(np.float32)
    logits, loss, _ = compiled(cfg)(weights, tokens, targets, weight)
    expected = oracle_logits(weights, tokens, cfg)
    assert expected.std() > 0.5  # the comparison is not one of zeros
    np.testing.assert_allclose(logits[..., :cfg.vocab_size], expected, atol=2e-4)
    assert np.all(logits[..., cfg.vocab_size:] < -1e9)
    np.testing.assert_allclose(loss, numpy_gpt.loss(expected, targets, weight, numpy_gpt.numbers(cfg.mtp, float)), rtol=1e-5)

@each_case
def test_the_gradient_of_every_weight_is_the_slope_of_the_float64_loss(cfg):
    weights, tokens, targets = random_weights(cfg), random_tokens(cfg), random_tokens(cfg, seed=2)
    grads = compiled(cfg)(weights, tokens, targets, np.ones(tokens.shape, np.float32))[2]
    leaves, tree = jax.tree.flatten(weights)
    rng, step = np.random.default_rng(4), 1e-5
    for i, (path, grad) in enumerate(jax.tree.leaves_with_path(grads)):
        direction = rng.standard_normal(grad.shape)
        def loss_at(distance):
            moved = [leaf + distance * direction if j == i else leaf for j, leaf in enumerate(leaves)]
            return oracle_loss(tree.unflatten(moved), tokens, targets, np.ones(tokens.shape), cfg)
        slope, size = (loss_at(step) - loss_at(-step)) / (2 * step), np.linalg.norm(grad)
        assert size > 1e-3, name_of(path)
        np.testing.assert_allclose(np.vdot(grad, direction), slope, atol=1e-3 * size, err_msg=name_of(path))

def test_bfloat16_stays_near_the_float64_gpt():
    cfg = dataclasses.replace(WINDOWS, compute_dtype="bfloat16", softcap="15")
    LONGS[cfg] = LONGS[WINDOWS]
    weights, tokens, targets = random_weights(cfg), random_tokens(cfg), random_tokens(cfg, seed=2)
    logits, loss, grads = compiled(cfg)(weights, tokens, targets, np.ones(tokens.shape, np.float32))
    expected = oracle_logits(weights, tokens, cfg)
    assert np.sqrt(np.mean((logits[..., :cfg.vocab_size] - expected) ** 2)) < 0.03 * expected.std()
    np.testing.assert_allclose(loss, numpy_gpt.nats(expected, targets).sum(), rtol=0.005)
    assert {grad.dtype.name for grad in jax.tree.leaves(grads)} == {"float32"}  # of the float32 masters

def test_the_gradient_of_every_weight_comes_within_three_steps_of_the_first_values():
    """At first the MLPs give 0 and nothing is smeared, so what goes into these gets none."""
    cfg, tokens, targets = config(num_layers=4, mlp_only="2", mtp="0.5,0.25"), random_tokens(BASE), random_tokens(BASE, seed=2)
    weights, run = compiled_init(cfg)(0), compiled(cfg)
    for step in range(3):
        grads = run(weights, tokens, targets, np.ones(tokens.shape, np.float32))[2]
        without = {name_of(path) for path, grad in jax.tree.leaves_with_path(grads) if not np.any(grad)}
        assert without == ({"blocks/w_up", "blocks/y_mix", "smear_gate"} if step == 0 else set())
        weights = jax.tree.map(lambda w, grad: w - 0.01 / (step + 1) * np.sign(grad), weights, grads)


# ---- Its first values ------------------------------------------------------------------------------------------------

FIRST = {  # what the recipe starts from where it is not random
    "attention": {"gate": 0.0, "x_mix": 1.1 ** 0.5, "y_mix": 1.0, "x0_mix": 0.0},
    "blocks": {"w_down": 0.0, "x_mix": 1.1 ** 0.5, "y_mix": 1.0},
    "skip_gate": 0.0, "skip_mix": -1.5, "smear_gate": 0.0, "smear_mix": 0.0, "backout_mix": 0.5}

def with_recipe_values(weights, values=FIRST):
    """Float32 weights, those that are no random matrices replaced."""
    return {name: with_recipe_values(w, values.get(name, {})) if isinstance(w, dict) else
            np.full(w.shape, values[name], np.float32) if name in values else np.asarray(w) for name, w in weights.items()}

def test_the_first_logits_are_those_of_the_recipes_first_values():
    cfg = config(num_layers=4, mlp_only="2", max_doc_len="22")
    weights, tokens = compiled_init(cfg)(5), random_tokens(cfg)
    expected = oracle_logits(with_recipe_values(weights), tokens, cfg)
    assert expected.std() > 0.01
    np.testing.assert_allclose(model_logits(weights, tokens, cfg)[..., :131], expected, atol=3e-6)

@pytest.mark.parametrize("tied", [0, 1])
def test_the_first_steps_loss_is_that_of_the_recipes_first_values(tied):
    """Of the program that trains: with the tokens ahead, and while they are tied with the head for an embedding."""
    cfg = config(num_layers=3, mlp_only="1", max_doc_len="22", mtp="0.5,0.25", tied_stages=tied, embed_std=0.5, optimizer="adamw")
    mesh, rows = make_mesh(jax.devices()[:1]), random_tokens(cfg, length=LENGTH + 1)
    state = make_init(Model(), mesh, cfg)()
    weights = with_recipe_values(state.params)
    weights |= {"embed": weights["head"]} if tied else {}
    batch, step = jnp.asarray(rows[None], jnp.uint16), make_train_step(stages(cfg)[0], Model(), mesh, cfg)
    _, loss = step.lower(state, batch).compile(compiler_options={"xla_backend_optimization_level": 0})(state, batch)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    np.testing.assert_allclose(loss, oracle_loss(weights, inputs, targets, np.ones(inputs.shape), cfg) / inputs.size, rtol=1e-6)

def test_the_first_loss_is_near_the_log_of_the_vocabulary_size():
    weights, tokens = compiled_init(PLAIN)(5), random_tokens(PLAIN)
    _, loss, _ = compiled(PLAIN)(weights, tokens, random_tokens(PLAIN, seed=6), np.ones(tokens.shape, np.float32))
    np.testing.assert_allclose(loss / tokens.size, math.log(PLAIN.vocab_size), atol=0.01)


# ---- What each part computes -----------------------------------------------------------------------------------------

ALONE = {  # one part on top of WITHOUT, with the weights that the oracle has and the one without it has not
    "attention gate": dict(gate_dims=5),
    "gate of all dims": dict(gate_dims=20),
    "gated skip": dict(gate_dims=5, skips="0>2"),
    "skip": dict(skips="0>2"),
    "two skips, one into the first's source": dict(skips="0>1,1>2"),
    "smear": dict(smear=1),
    "gated smear": dict(smear=1, gate_dims=5),
    "backout": dict(backout="1"),
    "backout of the first block": dict(backout="0"),
    "late input": dict(late_inputs="0>2"),
    "key offset": dict(offset_layers="0,1"),
    "shifted softcap": dict(softcap="11.5,15,5"),
    "no softcap": dict(softcap="0"),
    "windows": dict(window_short="3", window_long="9")}

@pytest.mark.parametrize("part", ALONE)
def test_each_part_alone_computes_what_its_equation_says(part):
    bare, cfg, tokens = config(**WITHOUT), config(**WITHOUT | ALONE[part]), random_tokens(BASE)
    weights = random_weights(config(**WITHOUT | dict(skips="0>1,1>2", smear=1, backout="1") | ALONE[part]))
    expected = oracle_logits(weights, tokens, cfg)
    assert np.abs(expected - oracle_logits(weights, tokens, bare)).max() > 0.1
    np.testing.assert_allclose(model_logits(weights, tokens, cfg)[..., :131], expected, atol=2e-4)

def test_the_default_softcap_is_the_shifted_sigmoid_of_the_recipe_less_a_constant():
    z = np.linspace(-60, 60, 241)
    np.testing.assert_allclose(capped(jnp.float32(z), Config()), 23 / (1 + np.exp(-(z + 5) / 7.5)) - 11.5, atol=2e-5)

def test_a_single_number_caps_logits_between_plus_and_minus_it():
    z = np.linspace(-60, 60, 241)
    np.testing.assert_allclose(capped(jnp.float32(z), config(softcap="15")), 15 * np.tanh(z / 15), atol=2e-5)
    assert np.array_equal(capped(jnp.float32(z), config(softcap="0")), np.float32(z))

def test_with_tokens_ahead_the_loss_is_the_mean_of_what_each_next_token_costs():
    weights, tokens = random_weights(BASE), random_tokens(BASE)
    targets, weight = random_tokens(BASE, seed=2), np.random.default_rng(3).choice([0.0, 0.5, 1.0], tokens.shape).astype(np.float32)
    later = lambda z, k: np.concatenate([z[:, k:], 0 * z[:, :k]], axis=1)
    run = jit(lambda ahead, targets, weight: loss_fn(on_device(weights) | {"ahead": ahead}, tokens, targets, weight, stages(BASE)[0], BASE))
    first, second, third = (run([], later(targets, k), later(weight, k)) for k in range(3))
    np.testing.assert_allclose(run([0.5, 0.25], targets, weight), (first + 0.5 * second + 0.25 * third) / 1.75, rtol=1e-6)
    np.testing.assert_allclose(run([0.0], targets, weight), first, rtol=1e-6)
    assert abs(second - first) > 0.01 * first

def test_the_tokens_ahead_leave_the_loss_one_stage_after_the_other_the_last_first():
    cfg = config(steps=100, stage_ends="0.2,0.6,1", mtp="0.5,0.25")
    table = stages(cfg)
    shares = {step: loss_shares(step, table[index], cfg) for index, step in ((0, 0), (0, 10), (0, 19), (1, 20), (1, 50), (2, 60), (2, 99))}
    expected = {0: [0.5, 0.25], 10: [0.5, 0.125], 19: [0.5, 0.0125], 20: [0.5], 50: [0.125], 60: [], 99: []}
    assert shares.keys() == expected.keys()
    for step in shares:
        np.testing.assert_allclose(shares[step], expected[step], atol=1e-12)
    assert loss_shares(0, table[0], config(mtp="")) == []

def test_a_late_input_is_read_by_attention_and_its_gate_alone():
    """With nothing from attention the stream is as without it; and the gate reads what attention reads."""
    cfg, tokens = config(**WITHOUT | dict(late_inputs="0>2", gate_dims=5)), random_tokens(BASE)
    early, weights = dataclasses.replace(cfg, late_inputs=""), random_weights(cfg)
    assert np.abs(model_logits(weights, tokens, cfg) - model_logits(weights, tokens, early)).max() > 0.1
    weights["attention"]["w_out"][2] = 0
    assert np.array_equal(model_logits(weights, tokens, cfg), model_logits(weights, tokens, early))

def test_next_logits_have_evaluations_windows_and_the_rotation_of_the_last_stage():
    weights, tokens = random_weights(WINDOWS), random_tokens(WINDOWS)
    found = jit(lambda weights, tokens: next_logits(unstack(weights), tokens, WINDOWS))(weights, tokens)
    assert found.shape == (ROWS, LENGTH, 256) and found.dtype == jnp.float32 and np.all(found[..., 131:] < -1e9)
    expected = numpy_gpt.logits(weights, tokens, (4, 11, 4), LONGS[WINDOWS], WINDOWS, packed=True)
    np.testing.assert_allclose(found[..., :131], expected, atol=2e-4)

def cached_attention(start, cache, starts_BS, stage, cfg):
    """attend of a chunk that begins at `start` with a token that was there before: a cache of raw keys and values."""
    length = starts_BS.shape[1]
    *table, scale = rotary(length, stage, cfg)
    def attend(layer, q_BTN, k_BTN, v_BTN, gate_BTH):
        if layer in cache:  # the repeated token had no token before it: its first keys and values are the right ones
            k_BTN, v_BTN = (jnp.concatenate([old, new[:, 1:]], axis=1) for old, new in zip(cache[layer], (k_BTN, v_BTN)))
        cache[layer], stop, window = (k_BTN, v_BTN), k_BTN.shape[1], stage.windows[layer]
        if str(layer) in cfg.offset_layers.split(","):
            k_BTN = offset_keys(k_BTN, starts_BS[:, :stop] == np.arange(stop)[None], cfg)
        heads = lambda z: z.reshape(ROWS, z.shape[1], -1, cfg.head_dim)
        q_BTHK = rotate(rms_norm(heads(q_BTN)), [t[start:stop] for t in table]) * scale
        k_BGSK = rotate(rms_norm(heads(k_BTN)), [t[:stop] for t in table]).swapaxes(1, 2)
        t, s = np.arange(start, stop)[None, :, None], np.arange(stop)[None, None]
        visible_BTS = (s <= t) & (s >= starts_BS[:, start:stop, None]) & (s >= t - (window or length))
        q_BGNK = q_BTHK.reshape(ROWS, stop - start, cfg.num_kv_heads, -1, cfg.head_dim).transpose(0, 2, 3, 1, 4)
        y_BGNK = softmax_average(q_BGNK.reshape(ROWS, cfg.num_kv_heads, -1, cfg.head_dim), k_BGSK, heads(v_BTN).swapaxes(1, 2), visible_BTS)
        y_BTHK = y_BGNK.reshape(q_BGNK.shape).transpose(0, 3, 1, 2, 4).reshape(ROWS, stop - start, -1, cfg.head_dim)
        return (y_BTHK * gate_BTH[..., None]).reshape(q_BTN.shape)
    return attend

@pytest.mark.parametrize("cfg", [PACKED, WINDOWS], ids=["packed, a block without attention", "packed, windows, key offsets"])
def test_with_an_attend_that_keeps_a_cache_two_chunks_give_the_activations_of_the_whole_row(cfg):
    """Of the raw projections; smear needs the token before, so the second chunk repeats one."""
    weights, tokens, stage = random_weights(cfg), random_tokens(cfg), stages(cfg)[-1]
    starts = np.maximum.accumulate(np.where(tokens == BOS, np.arange(LENGTH)[None], 0), axis=1)
    @functools.partial(jit, static_argnums=2)
    def chunk(cache, tokens_BT, start):
        attend = cached_attention(start, cache, starts, stage, cfg)
        return forward(on_device(weights), tokens_BT, stage, cfg, attend), cache
    whole = jit(lambda tokens: forward(on_device(weights), tokens, stage, cfg))(tokens)
    first, cache = chunk({}, tokens[:, :9], 0)
    assert sorted(cache) == [layer for layer in range(cfg.num_layers) if str(layer) not in cfg.mlp_only]
    second, cache = chunk(cache, tokens[:, 8:], 8)
    np.testing.assert_allclose(np.concatenate([first, second[:, 1:]], axis=1), whole, atol=1e-4)
    assert {z.shape for pair in cache.values() for z in pair} == {(ROWS, LENGTH, 12 * cfg.num_kv_heads)}


# ---- Which token sees which ------------------------------------------------------------------------------------------

def positions_changed_by(place, weights, tokens, cfg):
    """Positions of row 0 whose logits change when its token at `place` does; no other row may change."""
    other = tokens.copy()
    other[0, place] = tokens[0, place] + 1 if tokens[0, place] + 1 not in (BOS, cfg.vocab_size) else 0
    changed = np.any(model_logits(weights, tokens, cfg) != model_logits(weights, other, cfg), axis=-1)
    assert not changed[1:].any(), "rows of a batch depend on each other"
    return set(np.flatnonzero(changed[0]))

@each_case
def test_a_later_token_cannot_change_an_earlier_logit(cfg):
    weights, tokens = random_weights(cfg), random_tokens(cfg)
    for place in np.flatnonzero(tokens[0] != BOS):
        assert min(positions_changed_by(place, weights, tokens, cfg)) == place

def test_a_later_bos_cannot_change_an_earlier_logit():
    weights, tokens = random_weights(PACKED), random_tokens(PACKED)
    other = tokens.copy()
    other[:, 15] = BOS
    before, after = model_logits(weights, tokens, PACKED), model_logits(weights, other, PACKED)
    assert np.array_equal(before[:, :15], after[:, :15]) and np.all(np.any(before[:, 15] != after[:, 15], axis=-1))

@pytest.mark.parametrize("smear", [0, 1])
@pytest.mark.parametrize("offset_layers", ["", "0"])
def test_one_layer_sees_a_token_at_the_windows_edge_and_one_more_with_a_key_offset_and_one_with_smear(offset_layers, smear):
    window, cfg = 5, config(num_layers=1, **WITHOUT | {"smear": smear}, long_layers="", window_short="5", offset_layers=offset_layers)
    weights, tokens, reach = random_weights(cfg), random_tokens(cfg), window + len(offset_layers) + smear
    for place in np.flatnonzero(tokens[0] != BOS):
        seen_by = set(range(place, min(place + reach, LENGTH - 1) + 1))
        assert positions_changed_by(place, weights, tokens, cfg) == seen_by

@pytest.mark.parametrize("offset_layers", ["", "1,3"])
@pytest.mark.parametrize("smear", [0, 1])
def test_when_documents_are_packed_a_token_changes_its_own_and_by_smear_alone_the_next_documents_first(offset_layers, smear):
    """Which the rest of that document attends to; attention, skips and key offsets cross no border."""
    cfg = dataclasses.replace(PACKED, offset_layers=offset_layers, smear=smear)
    weights, tokens = random_weights(cfg), random_tokens(cfg)
    borders = [*np.flatnonzero(tokens[0] == BOS), LENGTH, LENGTH]
    assert len(borders) >= 5
    for place in np.flatnonzero(tokens[0] != BOS):
        last = next(i for i, border in enumerate(borders) if border > place)
        end = borders[last + (smear and place + 1 == borders[last])]
        assert positions_changed_by(place, weights, tokens, cfg) == set(range(place, end))

def test_in_a_plain_stream_a_token_changes_later_documents_too():
    weights, tokens = random_weights(PLAIN), random_tokens(PLAIN)
    for place in np.flatnonzero(tokens[0] != BOS):
        assert positions_changed_by(place, weights, tokens, PLAIN) == set(range(place, LENGTH))


# ---- Rotary positions ------------------------------------------------------------------------------------------------

def rotated_copies(vector, positions, cfg):
    """One vector at each of these positions: [T, K]."""
    x_BTHK = jnp.tile(jnp.asarray(vector, jnp.float32)[None, None, None], (1, len(positions), 1, 1))
    table = [t[list(positions)] for t in rotary(max(positions) + 1, stages(cfg)[0], cfg)[:2]]
    return np.float64(rotate(x_BTHK, table))[0, :, 0]

def test_rotated_q_dot_k_depends_on_the_difference_of_positions_only():
    rng, cfg, positions = np.random.default_rng(0), config(head_dim=20), range(40)
    q, k = (rotated_copies(rng.standard_normal(20), positions, cfg) for _ in "qk")
    score = q @ k.T
    for difference in range(-39, 40):
        diagonal = np.diagonal(score, difference)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
    assert np.std([score[0, s] for s in range(40)]) > 0.5

def test_half_of_the_dims_do_not_rotate_and_the_others_turn_at_rates_from_one_to_one_over_base():
    vector, cfg, positions = np.random.default_rng(1).standard_normal(20), config(head_dim=20), [0, 1, 17, 4099]
    found = rotated_copies(vector, positions, cfg)
    expected = np.array([numpy_gpt.rotated(vector, position, numpy_gpt.turning(cfg, ())[0]) for position in positions])
    np.testing.assert_allclose(found, expected, atol=1e-3)
    still = [*range(5, 10), *range(15, 20)]
    assert np.array_equal(found[:, still], np.float32(vector)[None, still].repeat(4, axis=0))
    turning = rotated_copies(vector, range(60), cfg)
    for j, rate in [(0, 1.0), (4, 1 / cfg.rope_base)]:
        angle = np.unwrap(np.angle(turning[:, j] + 1j * turning[:, j + 10]))
        np.testing.assert_allclose(np.diff(angle), rate, atol=1e-5)

YARN = {  # long window of a stage: the rates of pairs 0, 3, 10, 20 and 31 of 32, and the scale of q.k, by hand
    384: ([1, 0.511306, 0.10689, 0.0114254, 0.000976562], 0.1),
    896: ([1, 0.504225, 0.0567108, 0.0048966, 0.000418527], 0.11695),
    1408: ([1, 0.504225, 0.0408033, 0.00311602, 0.000266335], 0.12752),
    1664: ([1, 0.504225, 0.0361749, 0.00263663, 0.000225361], 0.13178)}

def test_where_the_long_window_grows_yarn_slows_the_slow_rates_and_sharpens_the_scores():
    """The recipe's windows and heads; evaluation has the last stage's, though its window is wider."""
    cfg = dataclasses.replace(Config(), head_dim=128, rope_base=1024.0, attn_scale=0.1)
    assert [max(stage.windows) for stage in stages(cfg)] == list(YARN)
    for stage, (rates, scale) in zip((*stages(cfg), val_stage(cfg)), (*YARN.values(), YARN[1664])):
        cos, sin, found = rotary(2, stage, cfg)
        angle = np.arctan2(sin, cos)[1]
        assert angle.shape == (64,) and not np.any(angle[32:]) and (cos.dtype, sin.dtype) == (np.float32, np.float32)
        np.testing.assert_allclose(angle[[0, 3, 10, 20, 31]], rates, rtol=1e-5)
        np.testing.assert_allclose(found, scale, rtol=5e-5)

def test_a_long_window_without_limit_counts_for_yarn_as_the_row():
    cfg = config(stage_ends="0.5,1", batch_tokens="64", seq_len="16,64", window_short="4", window_long="0")
    _, _, scale = rotary(1, stages(cfg)[1], cfg)
    np.testing.assert_allclose(scale, 0.25 * (1 + 0.2 * math.log(4)))

def test_a_long_window_that_shrinks_leaves_the_rotation_as_it_was_until_it_grows_past_the_largest():
    cfg = config(stage_ends="0.25,0.5,0.75,1", batch_tokens="64", seq_len="64", window_short="4", window_long="32,8,32,48")
    *before, after = (rotary(30, stage, cfg) for stage in stages(cfg))
    for found in before[1:]:
        assert all(np.array_equal(x, y) for x, y in zip(found, before[0]))
    np.testing.assert_allclose(after[2] / before[0][2], 1 + 0.2 * math.log(1.5))

def test_while_the_long_window_stays_the_rotation_does_whatever_the_short_one_and_the_batch_do():
    cfg = config(stage_ends="0.5,1", batch_tokens="44,88", window_short="4,9", window_long="13")
    for first, second in zip(rotary(30, stages(cfg)[0], cfg), rotary(30, stages(cfg)[1], cfg)):
        assert np.array_equal(first, second)


# ---- Attention -------------------------------------------------------------------------------------------------------

def attention_and_gradients(block, window, length=24):
    """(q, k, v, gate, first, cotangent) -> (output, gradients of output . cotangent)."""
    def run(q_BTN, k_BSN, v_BSN, gate_BTH, first_BT, g_BTN):
        cfg = config(attn_block=block)
        attend = lambda *given: attention_xla(*given, first_BT, rotary(length, stages(cfg)[0], cfg), window, cfg)
        y, pull = jax.vjp(attend, q_BTN, k_BSN, v_BSN, gate_BTH)
        return y, pull(g_BTN)
    return run

@functools.cache
def compiled_attention(block, window):
    return jit(attention_and_gradients(block, window))

def attention_inputs(window, length=24):
    rng = np.random.default_rng(0)
    q, g, k, v = (np.float32(rng.standard_normal((2, length, heads * 12))) for heads in (6, 6, 2, 2))
    begins = rng.random((2, length)) < 0.15
    first = np.maximum.accumulate(np.where(begins, np.arange(length)[None], 0), axis=1)
    return q, k, v, np.float32(rng.random((2, length, 6))), np.maximum(first, np.arange(length)[None] - window) if window else first, g

@pytest.mark.parametrize("window", [0, 7])
def test_blocks_of_queries_change_neither_attention_nor_its_gradients(window):
    inputs = attention_inputs(window)
    whole = compiled_attention(0, window)(*inputs)
    for block in (8, 5):  # 5 does not divide the length
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), compiled_attention(block, window)(*inputs), whole)

def test_attention_and_its_gradients_are_those_written_out_in_float64():
    """From raw queries and keys: their norm, rotation, softmax and average, and all of it backward."""
    inputs = attention_inputs(7)
    expected = numpy_gpt.attention_and_gradients(*inputs, BASE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), compiled_attention(8, 7)(*inputs), expected)

def test_blocks_do_not_compute_the_keys_that_causality_and_window_put_out_of_reach():
    def scores(block, window):
        made = [dot.outvars[0].aval for dot in dots(attention_and_gradients(block, window), *attention_inputs(window))]
        return sum(array.size for array in made if 12 not in array.shape)  # 12: the head's width
    keys = lambda block, window: sum(min(start, window or start) + block for start in range(0, 24, block)) * block
    for block, window in [(8, 0), (8, 7)]:
        assert scores(block, window) * 24 * 24 == scores(0, window) * keys(block, window)

def test_softmax_average_has_the_gradients_of_plain_autodiff():
    rng = np.random.default_rng(0)
    q_BGNK, k_BGSK, v_BGSK, g_BGNK = (np.float32(rng.standard_normal((2, 3, n, 4))) for n in (2 * 5, 7, 7, 2 * 5))
    visible_BTS = rng.random((2, 5, 7)) < 0.5
    visible_BTS[..., 2] = True
    def plain(q, k, v):
        score = jnp.einsum("BGRTK,BGSK->BGRTS", q.reshape(2, 3, 2, 5, 4), k)
        p = jax.nn.softmax(jnp.where(visible_BTS[:, None, None], score, -jnp.inf))
        return jnp.einsum("BGRTS,BGSK->BGRTK", p, v).reshape(2, 3, 10, 4)
    def run(f):
        y, pull = jax.vjp(f, q_BGNK, k_BGSK, v_BGSK)
        return y, pull(g_BGNK)
    both = [jit(lambda: run(f))() for f in (lambda *qkv: softmax_average(*qkv, visible_BTS), plain)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), *both)


# ---- Matmul and cross-entropy ----------------------------------------------------------------------------------------

def test_matmul_has_the_gradients_of_plain_autodiff():
    rng = np.random.default_rng(0)
    x, w, g = (np.float32(rng.standard_normal(shape)) for shape in ((2, 3, 5), (5, 7), (2, 3, 7)))
    y, pull = jax.vjp(functools.partial(matmul, "BTD,DF->BTF"), x, w)
    expected_y, expected = jax.vjp(lambda x, w: jnp.einsum("btd,df->btf", x, w), x, w)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), (y, pull(g)), (expected_y, expected(g)))

@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
def test_matmul_multiplies_bfloat16_operands_and_returns_gradients_in_the_operands_dtypes(x_dtype):
    rng = np.random.default_rng(0)
    x, w, g = (jnp.asarray(rng.standard_normal(shape), dtype) for shape, dtype in
               (((2, 30, 50), x_dtype), ((50, 70), "bfloat16"), ((2, 30, 70), x_dtype)))
    run = lambda x, w, g: (lambda y, pull: (y, *pull(g)))(*jax.vjp(functools.partial(matmul, "BTD,DF->BTF"), x, w))
    y, dx, dw = run(x, w, g)
    assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, w.dtype)
    x, w, g = (np.float64(z.astype(jnp.bfloat16)) for z in (x, w, g))  # what the operands are, to the last bit
    for found, exact in [(y, x @ w), (dx, g @ w.T), (dw, np.einsum("btd,btf->df", x, g))]:
        one_rounding = 2.0 ** -8 * np.abs(exact) + 1e-4
        assert np.all(np.abs(np.float64(found) - exact) <= one_rounding)
    for dot in dots(run, jnp.asarray(x, x_dtype), jnp.asarray(w, jnp.bfloat16), jnp.asarray(g, x_dtype)):
        assert [v.aval.dtype.name for v in (*dot.invars, *dot.outvars)] == ["bfloat16", "bfloat16", "float32"]

def test_matmul_can_return_float32_from_bfloat16():
    x, w = jnp.full((1, 3), 1 + 2 ** -7, jnp.bfloat16), jnp.full((3, 1), 1 + 2 ** -7, jnp.bfloat16)
    assert float(matmul("ND,DV->NV", x, w, jnp.float32)[0, 0]) == 3 * (1 + 2 ** -7) ** 2

@pytest.mark.parametrize("residual", ["auto", "float32"])
def test_no_matmul_of_a_bfloat16_training_loss_has_a_float32_operand(residual):
    cfg = config(compute_dtype="bfloat16", residual_dtype=residual, max_doc_len="22", window_short="5", window_long="7")
    tokens, weights = random_tokens(cfg), random_weights(cfg)
    loss = lambda w: loss_fn(unstack(gather(w, param_specs(cfg), 1, cfg)) | {"ahead": [0.5, 0.25]}, tokens, tokens,
                             jnp.ones(tokens.shape), stages(cfg)[0], cfg)
    found = dots(jax.value_and_grad(loss), weights)
    assert len(found) >= 3 * (6 * cfg.num_layers + 1)
    assert {v.aval.dtype.name for dot in found for v in dot.invars} == {"bfloat16"}
    assert {v.aval.dtype.name for dot in found for v in dot.outvars} == {"float32"}
    assert sum(any(cfg.padded_vocab in v.aval.shape for v in dot.invars + dot.outvars) for dot in found) == 3

def head_inputs(cfg, scale=1.0):
    rng = np.random.default_rng(0)
    x_ND, head_VD = (np.float32(scale * rng.standard_normal(shape)) for shape in ((21, 20), (cfg.padded_vocab, 20)))
    return x_ND, head_VD, rng.integers(0, cfg.vocab_size, 21), np.float32(rng.choice([0, 0.3, 1], 21))

def cross_entropy(x_ND, head_VD, target_N, weight_N, cfg):
    """As loss_fn puts it together: the partition less the label's logit, which is looked up."""
    label_N = jnp.sum(x_ND * lookup({"head": head_VD}, "head", target_N, "targets"), axis=-1)
    return log_partition(x_ND, head_VD, weight_N, cfg) - jnp.sum(weight_N * capped(label_N, cfg))

each_head = pytest.mark.parametrize("softcap,vocab_size,head_block", [  # three blocks, one, and one that is uneven
    ("5,6,1.5", 131, 7), ("5,6,1.5", 128, 8), ("5", 128, 0), ("0", 131, 7), ("0", 128, 0), ("0", 128, 8)])

def cap_and_slope(z, softcap, tanh):
    """The cap's value and derivative at z."""
    height, width, shift = {"5,6,1.5": (5, 6, 1.5), "5": (5, 5, 0), "0": (0, 1, 0)}[softcap]
    t = tanh((z + shift) / width)
    return (height * t, height / width * (1 - t ** 2)) if height else (z, 1.0)

@each_head
def test_cross_entropy_and_its_gradients_are_those_of_plain_autodiff(vocab_size, head_block, softcap):
    cfg = config(softcap=softcap, vocab_size=vocab_size, head_block=head_block)
    x_ND, head_VD, target_N, weight_N = head_inputs(cfg)
    def plain(x, head):
        z, _ = cap_and_slope((x @ head.T)[:, :vocab_size], softcap, jnp.tanh)
        return jnp.sum(-jax.nn.log_softmax(z)[np.arange(21), target_N] * weight_N)
    found, expected = (jit(jax.value_and_grad(lambda x, head: 3.7 * f(x, head), argnums=(0, 1)))(x_ND, head_VD) for f in
                       (lambda x, head: cross_entropy(x, head, target_N, weight_N, cfg), plain))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected)
    only_loss = jit(lambda: cross_entropy(x_ND, head_VD, target_N, weight_N, cfg))()
    np.testing.assert_allclose(3.7 * only_loss, expected[0], rtol=1e-5)

@each_head
def test_the_log_partition_and_its_gradients_are_those_of_float64(vocab_size, head_block, softcap):
    cfg = config(softcap=softcap, vocab_size=vocab_size, head_block=head_block)
    x_ND, head_VD, _, weight_N = head_inputs(cfg)
    x, head = np.float64(x_ND), np.float64(head_VD[:vocab_size])
    z, slope = cap_and_slope(x @ head.T, softcap, np.tanh)
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    dz = -1.3 * weight_N[:, None] * p * slope
    loss, (dx, dhead) = jit(jax.value_and_grad(lambda x, head: -1.3 * log_partition(x, head, weight_N, cfg), argnums=(0, 1)))(x_ND, head_VD)
    np.testing.assert_allclose(loss, -1.3 * (weight_N * np.log(np.exp(z).sum(axis=1))).sum(), rtol=1e-6)
    np.testing.assert_allclose(dx, dz @ head, atol=1e-5)
    np.testing.assert_allclose(dhead[:vocab_size], dz.T @ x, atol=1e-5)
    assert not np.any(dhead[vocab_size:])  # the ids that pad the table

def test_the_log_partition_of_bfloat16_has_gradients_within_its_rounding():
    x_ND, head_VD, _, weight_N = (jnp.asarray(x, jnp.bfloat16) if i < 2 else x for i, x in enumerate(head_inputs(BASE)))
    x, head = (np.float64(np.float32(z)) for z in (x_ND, head_VD[:131]))
    z, slope = cap_and_slope(x @ head.T, "5,6,1.5", np.tanh)
    dz = weight_N[:, None] * np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) * slope
    loss, (dx, dhead) = jit(jax.value_and_grad(lambda x, head: log_partition(x, head, weight_N, BASE), argnums=(0, 1)))(x_ND, head_VD)
    assert (loss.dtype, dx.dtype, dhead.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(loss, (weight_N * np.log(np.exp(z).sum(axis=1))).sum(), rtol=1e-4)
    for found, exact in ((dx, dz @ head), (dhead[:131], dz.T @ x)):  # the softmax, its scaled other side and the result are rounded
        assert np.linalg.norm(np.float64(np.float32(found)) - exact) < 2 ** -8 * np.linalg.norm(exact)

@pytest.mark.parametrize("tied", [0, 1])
def test_the_gradient_of_a_lookup_is_the_same_in_total_whichever_way_it_goes(tied):
    """To the table, or row by row to the zeros that stand beside it; one table may be both."""
    cfg = config(num_layers=1, **WITHOUT | {"smear": 1})
    weights, tokens, targets = random_weights(cfg), random_tokens(cfg), random_tokens(cfg, seed=2)
    weight = np.random.default_rng(3).choice([0.0, 0.5, 1.0], tokens.shape).astype(np.float32)
    stage, apart = stages(cfg)[0], unstack(weights)
    rows = {use: np.zeros((*tokens.shape, 20), np.float32) for use in ("inputs", "targets")}
    def loss(weights, rows):
        weights = weights | {"ahead": [0.5, 0.25]} | rows | ({"embed": weights["head"]} if tied else {})
        return loss_fn(weights, tokens, targets, weight, stage, cfg)
    plain_loss, plain = jit(jax.value_and_grad(lambda w: loss(w, {})))(apart)
    row_loss, (found, by_row) = jit(jax.value_and_grad(loss, argnums=(0, 1)))(apart, rows)
    assert float(plain_loss) == float(row_loss)
    found = jax.tree.map(np.array, found)
    for use, ids, name in (("inputs", tokens, "head" if tied else "embed"), ("targets", targets, "head")):
        assert np.any(by_row[use])
        np.add.at(found[name], ids, by_row[use])
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, jax.tree.map(np.array, plain))

@pytest.mark.parametrize("head_block", [0, 7])
def test_where_no_gradient_is_wanted_the_compiled_loss_multiplies_by_the_head_once(head_block):
    cfg = config(head_block=head_block)
    loss = lambda *inputs: cross_entropy(*inputs, cfg)
    count = lambda f: len(re.findall(r" = \S+ dot\(", jit(f).lower(*head_inputs(cfg)).compile().as_text()))
    assert (count(loss), count(jax.value_and_grad(loss, argnums=(0, 1)))) == (1, 3)

def assert_finite_and_exact(x_ND, head_VD, target_N, weight_N, cfg):
    z = (np.float64(x_ND) @ np.float64(head_VD).T)[:, :cfg.vocab_size]
    expected = numpy_gpt.nats(z, target_N)
    loss, grads = jit(jax.value_and_grad(lambda *xs: cross_entropy(*xs, target_N, weight_N, cfg), argnums=(0, 1)))(x_ND, head_VD)
    np.testing.assert_allclose(loss, (expected * weight_N).sum(), rtol=1e-4)
    p = np.exp(z - z.max(axis=1, keepdims=True))
    g = (p / p.sum(axis=1, keepdims=True) - np.eye(cfg.vocab_size)[target_N]) * weight_N[:, None]
    np.testing.assert_allclose(grads[0], g @ head_VD[:cfg.vocab_size], atol=0.05, rtol=1e-3)
    return expected

def test_cross_entropy_of_logits_far_apart_is_large_and_not_infinite():
    cfg = config(softcap="0")
    assert assert_finite_and_exact(*head_inputs(cfg, scale=7.0), cfg).max() > 200

def test_cross_entropy_of_logits_far_below_the_paddings_is_exact():
    cfg = config(softcap="0")
    x_ND, head_VD, target_N, weight_N = head_inputs(cfg)
    x_ND[:, 0], head_VD[:, 0], head_VD[cfg.vocab_size:] = 1, -200, 0  # every used logit near -200, the padding's at 0
    assert_finite_and_exact(x_ND, head_VD, target_N, weight_N, cfg)

def test_a_target_of_weight_zero_gives_no_loss_and_no_gradient():
    x_ND, head_VD, target_N, _ = head_inputs(BASE)
    loss, grads = jax.value_and_grad(cross_entropy, argnums=(0, 1))(x_ND, head_VD, target_N, np.zeros(21, np.float32), BASE)
    assert loss == 0 and not any(np.any(grad) for grad in grads)

def test_rms_norm_gives_unit_rms_in_the_inputs_dtype_and_survives_zeros():
    x = np.random.default_rng(0).standard_normal((3, 5, 23)) * 10.0 ** np.arange(-1, 2)[:, None, None]
    np.testing.assert_allclose(rms_norm(jnp.float32(x)), numpy_gpt.rms_norm(x), rtol=2e-5)
    assert rms_norm(jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.bfloat16
    assert np.array_equal(rms_norm(jnp.zeros((2, 3))), np.zeros((2, 3)))


# ---- The weight table ------------------------------------------------------------------------------------------------

@each_case
def test_every_weight_has_the_shape_and_group_its_row_says(cfg):
    specs = param_specs(cfg)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), specs, cfg))
    assert jax.tree.structure(params) == jax.tree.structure(specs)
    sizes = {"L": cfg.num_layers, "I": 3, "D": 20, "F": 37, "HK": 72, "GK": (cfg.num_kv_heads or 6) * 12, "V": 256, "H": 6, "E": 5,
             "J": len(cfg.skips.split(",")), "1": 1}
    for (path, spec), weight in zip(jax.tree.leaves_with_path(specs), jax.tree.leaves(params)):
        assert weight.shape == tuple(sizes[letter] for letter in spec.axes.split()), name_of(path)
        assert weight.dtype == jnp.float32
        assert spec.axes.startswith("L") == ("blocks/" in name_of(path)) and spec.axes.startswith("I") == ("attention/" in name_of(path))
        assert (spec.group in SCALARS) == (len(weight.shape) == 1)
        for optimizer in ("muon", "adamw"):
            assert optimizer_rules(dataclasses.replace(cfg, optimizer=optimizer))[spec.group].lr > 0

def test_the_weights_are_counted_as_by_hand():
    attention, rest, others = 20 * (72 + 24 + 24 + 72) + 5 * 6 + 3, 2 * 20 * 37 + 2, (5 + 1) + (5 + 1) + 1
    assert count_params(param_specs(BASE), BASE) == 3 * (attention + rest) + 2 * 256 * 20 + others
    without = config(mlp_only="0,2")
    assert count_params(param_specs(without), without) == attention + 3 * rest + 2 * 256 * 20 + others
    gpt2, attention = Config(vocab_size=50257), 4 * 768 ** 2 + 12 * 3 + 3
    assert count_params(param_specs(gpt2), gpt2) == 2 * 50688 * 768 + 10 * attention + 11 * (2 * 768 * 3072 + 2) + (12 + 1) + (12 + 1) + 1

def test_a_vocabulary_is_padded_to_whole_registers_and_a_large_one_to_equal_shares_of_eight_devices():
    padded = {131: 256, 256: 256, 257: 384, 8192: 8192, 8193: 8704, 50257: 50688, 50688: 50688}
    assert {size: config(vocab_size=size).padded_vocab for size in padded} == padded

def test_what_a_config_does_without_has_no_weights():
    names = lambda **changes: {name_of(path) for path, _ in jax.tree.leaves_with_path(param_specs(config(**changes)))}
    whole, gates = names(), {"attention/gate", "skip_gate", "smear_gate"}
    assert whole - names(skips="") == {"skip_gate", "skip_mix"}
    assert whole - names(smear=0) == {"smear_gate", "smear_mix"}
    assert whole - names(backout="") == {"backout_mix"}
    assert whole - names(gate_dims=0) == gates
    assert whole == names(late_inputs="", mtp="0.5", tied_stages=1, softcap="0", mlp_only="0,1") and len(whole) == 19

def test_grouped_queries_shrink_keys_and_values_and_nothing_else():
    few, many = (shapes(config(num_kv_heads=heads)) for heads in (2, 0))
    assert few["blocks"] == many["blocks"]
    few, many = few["attention"], many["attention"]
    assert {name for name in few if few[name] != many[name]} == {"w_k", "w_v"}
    assert [few[name][-1] * 3 for name in ("w_k", "w_v")] == [many[name][-1] for name in ("w_k", "w_v")] == [72, 72]

def test_a_new_row_of_the_table_leaves_every_other_weights_first_value():
    specs = param_specs(BASE)
    larger = {"new": Spec("D F", normal(1.0), "muon")} | specs
    larger["blocks"] = {"another": Spec("L D", constant(2.0), "scalar")} | dict(reversed(specs["blocks"].items()))
    old, new = compiled_init(BASE)(3), jit(lambda: init_params(jax.random.key(3), larger, BASE))()
    for path, leaf in jax.tree.leaves_with_path(old):
        assert np.array_equal(leaf, functools.reduce(lambda tree, k: tree[k.key], path, new)), name_of(path)

def test_first_values_depend_on_the_seed_and_differ_between_rows():
    a, b = (compiled_init(BASE)(seed) for seed in (0, 1))
    assert not np.array_equal(a["embed"], b["embed"]) and not np.array_equal(a["attention"]["w_k"], a["attention"]["w_v"])
    assert not np.array_equal(a["attention"]["w_q"][0], a["attention"]["w_q"][1])

def test_first_values_have_the_spread_the_recipe_names():
    cfg = config(model_dim=80, vocab_size=1024)
    p = jax.tree.map(np.asarray, compiled_init(cfg)(0))
    for table in (p["embed"], p["head"]):
        np.testing.assert_allclose([np.std(table), np.mean(table)], [0.005, 0.0], atol=1e-4)
        assert np.abs(table).max() > 0.018  # normal, not uniform
    for w in (*(p["attention"][name] for name in ("w_q", "w_k", "w_v", "w_out")), p["blocks"]["w_up"]):
        np.testing.assert_allclose(np.std(w), 0.5 * 80 ** -0.5, rtol=0.03)
        assert np.abs(w).max() <= 3 ** 0.5 * 0.5 * 80 ** -0.5
    jax.tree.map(np.testing.assert_array_equal, p, with_recipe_values(p))

def test_unstacked_and_restacked_weights_are_the_same_weights():
    cfg = config(mlp_only="1")
    weights = random_weights(cfg)
    apart, again = jit(lambda w: (unstack(w), restack(unstack(w))))(weights)
    jax.tree.map(np.testing.assert_array_equal, again, weights)
    assert len(apart["blocks"]) == 3 and len(apart["attention"]) == 2 and unstack({"head": 1}) == restack({"head": 1}) == {"head": 1}
    for name, matrix in (("blocks", "w_up"), ("attention", "w_q")):
        for i, layer in enumerate(apart[name]):
            assert np.array_equal(layer[matrix], weights[name][matrix][i])


# ---- Blocks without attention ----------------------------------------------------------------------------------------

def test_a_block_without_attention_has_no_attention_weights_and_looks_at_no_other_token():
    cfg = config(num_layers=2, mlp_only="0,1", **WITHOUT, offset_layers="0,1")
    assert all(shape[0] == 0 for shape in shapes(cfg)["attention"].values())
    weights, tokens = random_weights(config(num_layers=2, **WITHOUT)), random_tokens(cfg)
    weights["attention"] = {name: w[:0] for name, w in weights["attention"].items()}
    for place in np.flatnonzero(tokens[0] != BOS):
        assert positions_changed_by(place, weights, tokens, cfg) == {place}

@pytest.mark.parametrize("mlp_only", ["0", "0,2"])
def test_wherever_the_blocks_without_attention_are_the_logits_are_those_of_the_float64_gpt(mlp_only):
    """Windows and key offsets stay with the block they name, not with the place in the stack of those with attention."""
    cfg = config(mlp_only=mlp_only, offset_layers="1,2", max_doc_len="22", window_short="5", window_long="13")
    weights, tokens = random_weights(cfg), random_tokens(cfg)
    assert {w.shape[0] for w in weights["attention"].values()} == {3 - len(mlp_only.split(","))}
    np.testing.assert_allclose(model_logits(weights, tokens, cfg)[..., :131], oracle_logits(weights, tokens, cfg), atol=2e-4)
