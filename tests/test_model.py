"""The weight table and the model, against the float64 GPT of numpy_gpt.py and their promises."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest
from jaxprs import dots

from train import (
    GPT,
    SCALAR_GROUPS,
    Config,
    Spec,
    Stage,
    accumulate,
    ahead_weights,
    attention_xla,
    axis_sizes,
    constant,
    count_params,
    gather,
    init_params,
    log_partition,
    matmul,
    name_of,
    next_logits,
    normal,
    optimizer_rules,
    param_specs,
    parse_flags,
    replace,
    restack,
    rotary,
    rotate,
    softcap,
    unstack,
    with_shapes,
)

BOS, ROWS, LENGTH, STEP = 7, 2, 22, 25
ROW = Stage(batch_tokens=44, seq_len=LENGTH)
FLAGS = """
--preset=demo --steps=100 --num_layers=3 --model_dim=20 --num_heads=6 --num_kv_heads=2 --head_dim=12
--mlp_dim=37 --vocab_size=131 --bos_id=7 --skips=((0,2),) --late_inputs=((0,2),) --backout=1
--offset_layers= --long_layers=1 --gate_dims=5 --softcap=5,6,1.5 --attn_scale=0.25
--compute_dtype=float32 --residual_dtype=none
"""
BASE = replace(parse_flags(FLAGS.split()), stages=(ROW,), val=Stage(seq_len=LENGTH))
config = functools.partial(replace, BASE)
WITHOUT = {"skips": (), "late_inputs": (), "backout": (), "gate_dims": 0, "smear": False}
PLAIN = config(**WITHOUT, num_kv_heads=None, offset_layers=(0, 2))
PACKED = config(
    num_layers=4,
    num_kv_heads=1,
    mlp_only=(2,),
    skips=((0, 2), (1, 3)),
    late_inputs=((1, 3),),
    stages=(replace(ROW, doc_len=22, ahead=(0.5, 0.25)),),
)
GROWING = ((0.3, 7), (0.6, 9), (1.0, 13))
WINDOWS = config(
    mlp_only=(0,),
    offset_layers=(1, 2),
    stages=tuple(replace(ROW, end=end, doc_len=22, short=5, long=long) for end, long in GROWING),
    val=Stage(seq_len=LENGTH, short=4, long=11),
)
UNGATED = config(
    num_kv_heads=3,
    gate_dims=0,
    softcap=(),
    skips=((0, 2), (1, 2)),
    late_inputs=((0, 1), (0, 2)),
    backout=(0,),
    offset_layers=(1, 2),
    stages=(replace(ROW, short=4, ahead=(0.5,), tied=True),),
    val=Stage(seq_len=LENGTH, short=4),
)
CASES = {
    "without what is optional, as many key heads, key offsets": PLAIN,
    "packed, one key head, a block without attention, two skips, two tokens ahead": PACKED,
    "packed, short and long windows, the long one grown, key offsets": WINDOWS,
    "no softcap, no gates, two skips into one block, one token ahead, tied": UNGATED,
}
each_case = pytest.mark.parametrize("cfg", CASES.values(), ids=CASES.keys())
FAST = {"xla_backend_optimization_level": 0}  # compiles in half the time
jit = functools.partial(jax.jit, compiler_options=FAST)


def shapes(cfg):
    return jax.tree.map(lambda spec: spec.shape, param_specs(cfg))


def named(tree):
    return {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def random_weights(cfg, seed=0):
    return numpy_gpt.random_weights(cfg, shapes(cfg), seed)


def random_tokens(cfg, length=LENGTH, seed=1):
    """Tokens with a BOS about every sixth, the first token not one."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, cfg.vocab_size, (ROWS, length))
    tokens[rng.random(tokens.shape) < 0.16] = BOS
    tokens[:, 0] = 3
    return tokens


def random_batch(cfg):
    """(rows of one token more than they predict, weights of the targets)."""
    weight = np.random.default_rng(3).choice([0.0, 0.5, 1.0], (ROWS, LENGTH))
    return random_tokens(cfg, LENGTH + 1), np.float32(weight)


def copies(weights, cfg):
    return unstack(gather(weights, param_specs(cfg), 1, cfg))


@functools.cache
def compiled_init(cfg):
    return jit(lambda seed: init_params(jax.random.key(seed), param_specs(cfg)))


def first_weights(cfg, seed=0):
    return jax.tree.map(np.asarray, compiled_init(cfg)(seed))


@functools.cache
def compiled_logits(cfg):
    return jit(lambda weights, tokens: next_logits(copies(weights, cfg), tokens, cfg))


def model_logits(weights, tokens, cfg):
    return np.array(compiled_logits(cfg)(weights, tokens))


def sums(weights, rows, weight, cfg):
    """What `accumulate` sums in two micro-steps of the last stage: (nats, weight, gradients)."""
    batch = {"tokens": rows[:, None].astype(np.uint16), "weights": weight[:, None]}
    apart, key, stage = copies(weights, cfg), jax.random.key(0), cfg.stages[-1]
    nats, total, grads = accumulate(apart, batch, key, jnp.int32(STEP), stage, GPT, cfg)
    return nats, total, restack(grads)


@functools.cache
def compiled_sums(cfg):
    return jit(functools.partial(sums, cfg=cfg))


def oracle_logits(weights, tokens, stage, cfg):
    longs, packed = [row.long for row in cfg.stages], cfg.stages[0].doc_len > 0
    windows = [stage.long if i in cfg.long_layers else stage.short for i in range(cfg.num_layers)]
    if stage.tied:
        weights = weights | {"embed": weights["head"]}
    return numpy_gpt.logits(weights, tokens, windows, longs, cfg, packed)


def oracle_loss(weights, rows, weight, cfg):
    """At a quarter of a run of one stage."""
    stage = cfg.stages[-1]
    ahead = [*stage.ahead[:-1], *(0.75 * last for last in stage.ahead[-1:])]
    logits = oracle_logits(weights, rows[:, :-1], stage, cfg)
    return numpy_gpt.loss(logits, rows[:, 1:], weight, ahead)


# ---- The whole model -----------------------------------------------------------------------------


@each_case
def test_logits_are_those_of_a_plain_float64_gpt(cfg):
    """With validation's windows, and the rotation of the last stage."""
    weights, tokens = random_weights(cfg), random_tokens(cfg)
    logits = model_logits(weights, tokens, cfg)
    expected = oracle_logits(weights, tokens, cfg.val, cfg)
    assert expected.std() > 0.5  # the comparison is not one of zeros
    assert logits.shape == (ROWS, LENGTH, 256) and logits.dtype == np.float32
    np.testing.assert_allclose(logits[..., :131], expected, atol=2e-4)
    assert np.all(logits[..., 131:] < -1e9)


@each_case
def test_the_loss_and_each_weights_gradient_are_the_float64_loss_and_its_slope(cfg):
    weights, (rows, weight) = random_weights(cfg), random_batch(cfg)
    nats, total, grads = compiled_sums(cfg)(weights, rows, weight)
    np.testing.assert_allclose(nats, oracle_loss(weights, rows, weight, cfg), rtol=1e-5)
    assert total == weight.sum()
    leaves, tree = jax.tree.flatten(weights)
    rng = np.random.default_rng(4)

    def loss_at(moved_leaf, i):
        moved = tree.unflatten([*leaves[:i], moved_leaf, *leaves[i + 1 :]])
        return oracle_loss(moved, rows, weight, cfg)

    for i, (name, grad) in enumerate(named(grads).items()):
        direction = rng.standard_normal(grad.shape)
        up, down = (loss_at(leaves[i] + distance * direction, i) for distance in (1e-5, -1e-5))
        size = np.linalg.norm(grad)
        assert (size > 1e-3) != (name == "embed" and cfg == UNGATED), name
        slope = (up - down) / 2e-5
        np.testing.assert_allclose(np.vdot(grad, direction), slope, atol=1e-3 * size, err_msg=name)


def test_bfloat16_stays_near_the_float64_gpt():
    changes = {"skips": ((0, 1),), "late_inputs": (), "softcap": (15.0, 15.0, 0.0)}
    cfg = config(num_layers=2, offset_layers=(0,), compute_dtype="bfloat16", **changes)
    weights, tokens = random_weights(cfg), random_tokens(cfg)
    expected = oracle_logits(weights, tokens, cfg.val, cfg)
    error = model_logits(weights, tokens, cfg)[..., :131] - expected
    assert np.sqrt(np.mean(error**2)) < 0.03 * expected.std()


def test_every_weight_has_a_gradient_within_three_steps_of_the_first_values():
    """At first the MLPs give 0 and nothing is smeared, so what goes into these gets none."""
    weights, (rows, weight) = first_weights(PACKED), random_batch(PACKED)
    for step in range(3):
        _, _, grads = compiled_sums(PACKED)(weights, rows, weight)
        without = {name for name, grad in named(grads).items() if not np.any(grad)}
        assert without == ({"blocks/w_up", "blocks/y_mix", "smear_gate"} if step == 0 else set())
        rate = 0.01 / (step + 1)
        weights = jax.tree.map(lambda w, g, rate=rate: w - rate * np.sign(g), weights, grads)


FIRST = {  # what the recipe starts from where it is not random
    "attention": {"gate": 0.0, "x_mix": 1.1**0.5, "y_mix": 1.0, "x0_mix": 0.0},
    "blocks": {"w_down": 0.0, "x_mix": 1.1**0.5, "y_mix": 1.0},
    "skip_gate": 0.0,
    "skip_mix": -1.5,
    "smear_gate": 0.0,
    "smear_mix": 0.0,
    "backout_mix": 0.5,
}


def with_recipe_values(weights, values=FIRST):
    """Weights, those that are no random matrices replaced."""
    result = dict(weights)
    for name in values.keys() & weights.keys():
        if isinstance(weights[name], dict):
            result[name] = with_recipe_values(weights[name], values[name])
        else:
            result[name] = np.full(weights[name].shape, values[name], np.float32)
    return result


def test_the_first_logits_are_those_of_the_recipes_first_values_and_the_loss_that_of_chance():
    weights, (rows, weight) = first_weights(PACKED, 5), random_batch(PACKED)
    expected = oracle_logits(with_recipe_values(weights), rows[:, :-1], PACKED.val, PACKED)
    assert expected.std() > 0.01
    logits = model_logits(weights, rows[:, :-1], PACKED)[..., :131]
    np.testing.assert_allclose(logits, expected, atol=3e-6)
    nats = numpy_gpt.loss(logits, rows[:, 1:], weight)
    np.testing.assert_allclose(nats / weight.sum(), math.log(131), atol=0.01)


def test_the_softcap_is_the_shifted_sigmoid_of_the_recipe_less_a_constant_or_none():
    z = np.linspace(-60, 60, 241)
    sigmoid = 23 / (1 + np.exp(-(z + 5) / 7.5)) - 11.5
    np.testing.assert_allclose(softcap(jnp.float32(z), Config()), sigmoid, atol=2e-5)
    assert np.array_equal(softcap(jnp.float32(z), config(softcap=())), np.float32(z))


def test_the_tokens_ahead_leave_the_loss_one_stage_after_the_other_the_last_first():
    stages = Config().stages
    for step, i, wanted in [
        (0, 0, [0.5, 0.25]),
        (311, 0, [0.5, 0.125]),
        (622, 0, [0.5, 0]),
        (622, 1, [0.5]),
        (933, 1, [0.25]),
        (1244, 1, [0]),
        (1244, 2, []),
        (1900, 3, []),
    ]:
        assert ahead_weights(step, stages[i], Config()) == pytest.approx(wanted), step


# ---- Which token sees which ----------------------------------------------------------------------


def positions_changed_by(place, weights, tokens, cfg):
    """Positions of row 0 whose logits change when its token at `place` does; no other row may."""
    other = tokens.copy()
    other[0, place] += 1
    if other[0, place] in (BOS, cfg.vocab_size):
        other[0, place] = 0
    logits = (model_logits(weights, x, cfg) for x in (tokens, other))
    changed = np.any(np.not_equal(*logits), axis=-1)
    assert not changed[1:].any(), "rows of a batch depend on each other"
    return set(np.flatnonzero(changed[0]))


def each_place(cfg):
    """Yield (place, positions that the token there changes, row), of tokens that are no BOS."""
    weights, tokens = random_weights(cfg), random_tokens(cfg)
    for place in np.flatnonzero(tokens[0] != BOS):
        yield place, positions_changed_by(place, weights, tokens, cfg), tokens[0]


@each_case
def test_a_later_token_cannot_change_an_earlier_logit(cfg):
    for place, changed, _ in each_place(cfg):
        assert min(changed) == place


def test_a_later_bos_cannot_change_an_earlier_logit():
    weights, tokens = random_weights(PACKED), random_tokens(PACKED)
    other = tokens.copy()
    other[:, 15] = BOS
    before, after = (model_logits(weights, x, PACKED) for x in (tokens, other))
    assert np.array_equal(before[:, :15], after[:, :15])
    assert np.all(np.any(before[:, 15] != after[:, 15], axis=-1))


@pytest.mark.parametrize("offset_layers, smear", [((), False), ((0,), False), ((0,), True)])
def test_one_layer_reaches_a_window_back_one_more_with_key_offset_one_with_smear(
    offset_layers, smear
):
    changes = WITHOUT | {"smear": smear, "offset_layers": offset_layers, "num_layers": 1}
    cfg = config(**changes, val=Stage(seq_len=LENGTH, short=5), long_layers=())
    reach = 5 + len(offset_layers) + smear
    for place, changed, _ in each_place(cfg):
        assert changed == set(range(place, min(place + reach, LENGTH - 1) + 1))


@pytest.mark.parametrize("offset_layers, smear", [((), True), ((1, 3), False)])
def test_in_packed_documents_a_token_changes_its_own_and_by_smear_the_next_ones_first(
    offset_layers, smear
):
    """Which the rest of that document attends to; all else crosses no border."""
    cfg = replace(PACKED, offset_layers=offset_layers, smear=smear)
    for place, changed, row in each_place(cfg):
        borders = [*np.flatnonzero(row == BOS), LENGTH, LENGTH]
        assert len(borders) >= 5
        last = next(i for i, border in enumerate(borders) if border > place)
        end = borders[last + (smear and place + 1 == borders[last])]
        assert changed == set(range(place, end))


def test_in_a_plain_stream_a_token_changes_later_documents_too():
    for place, changed, _ in each_place(PLAIN):
        assert changed == set(range(place, LENGTH))


# ---- Rotary positions ----------------------------------------------------------------------------


def rotated_copies(vector, positions, cfg):
    """One vector at each of these positions: [T, K]."""
    x_BTHK = jnp.tile(jnp.float32(vector)[None, None, None], (1, len(positions), 1, 1))
    table = [t[list(positions)] for t in rotary(max(positions) + 1, ROW, cfg)[:2]]
    return np.float64(rotate(x_BTHK, *table))[0, :, 0]


def test_rotated_q_dot_k_depends_on_the_difference_of_positions_only():
    rng, cfg = np.random.default_rng(0), config(head_dim=20)
    q, k = (rotated_copies(rng.standard_normal(20), range(40), cfg) for _ in "qk")
    score = q @ k.T
    for difference in range(-39, 40):
        diagonal = np.diagonal(score, difference)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
    assert np.std(score[0]) > 0.5


def test_half_of_the_dims_stand_still_and_the_others_turn_as_in_float64():
    vector, cfg = np.random.default_rng(1).standard_normal(20), config(head_dim=20)
    positions = [0, 1, 17, 4099]
    found = rotated_copies(vector, positions, cfg)
    rate, _ = numpy_gpt.turning(cfg, ())
    expected = [numpy_gpt.rotated(vector, position, rate) for position in positions]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    still = [*range(5, 10), *range(15, 20)]
    assert np.array_equal(found[:, still], np.float32(vector)[None, still].repeat(4, axis=0))


YARN = {  # long window: the rates of pairs 0, 3, 10, 20 and 31 of 32, and q.k's scale, by hand
    384: ([1, 0.511306, 0.10689, 0.0114254, 0.000976562], 0.1),
    896: ([1, 0.504225, 0.0567108, 0.0048966, 0.000418527], 0.11695),
    1408: ([1, 0.504225, 0.0408033, 0.00311602, 0.000266335], 0.12752),
    1664: ([1, 0.504225, 0.0361749, 0.00263663, 0.000225361], 0.13178),
}


def test_where_the_long_window_grows_yarn_slows_the_slow_rates_and_sharpens_the_scores():
    """The recipe's windows; evaluation has the last stage's, though its window is wider."""
    cfg = replace(Config(), head_dim=128, attn_scale=0.1)
    assert [stage.long for stage in cfg.stages] == list(YARN)
    wanted = [*YARN.values(), YARN[1664]]
    for stage, (rates, scale) in zip((*cfg.stages, cfg.val), wanted, strict=True):
        cos, sin, found = rotary(2, stage, cfg)
        angle = np.arctan2(sin, cos)[1]
        assert angle.shape == (64,) and not np.any(angle[32:])
        assert (cos.dtype, sin.dtype) == (np.float32, np.float32)
        np.testing.assert_allclose(angle[[0, 3, 10, 20, 31]], rates, rtol=1e-5)
        np.testing.assert_allclose(found, scale, rtol=5e-5)


def test_yarn_counts_a_window_without_limit_as_the_row_and_waits_until_one_passes_the_largest():
    def tables(*windows):
        rows = [Stage(i, seq_len=64, short=4 + i, long=long) for i, long in enumerate(windows)]
        cfg = config(stages=tuple(rows))
        return [rotary(30, stage, cfg) for stage in rows]

    first, shrunk, grown, larger = tables(32, 8, 32, 48)
    for table in (shrunk, grown):
        assert all(map(np.array_equal, table, first))
    np.testing.assert_allclose(larger[2] / first[2], 1 + 0.2 * math.log(1.5))
    first, last = tables(16, 0)
    np.testing.assert_allclose(last[2] / first[2], 1 + 0.2 * math.log(4))


# ---- Attention -----------------------------------------------------------------------------------


def attention_and_gradients(window, q_BTN, k_BSN, v_BSN, gate_BTH, first_BT, g_BTN):
    """(output, gradients of output . cotangent)."""
    table = rotary(q_BTN.shape[1], ROW, BASE)

    def attend(*given):
        return attention_xla(*given, first_BT, table, window, BASE)

    y, pull = jax.vjp(attend, q_BTN, k_BSN, v_BSN, gate_BTH)
    return y, pull(g_BTN)


def attention_inputs(window, length):
    rng = np.random.default_rng(0)
    heads = (6, 6, 2, 2)
    q, g, k, v = (np.float32(rng.standard_normal((2, length, n * 12))) for n in heads)
    place, begins = np.arange(length)[None], rng.random((2, length)) < 0.15
    first = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    gate = np.float32(rng.random((2, length, 6)))
    return q, k, v, gate, np.maximum(first, place - window), g


@pytest.mark.parametrize("window, length", [(24, 24), (7, 23)])
def test_attention_and_its_gradients_are_those_written_out_in_float64(window, length):
    """From raw queries and keys, in two blocks: of 12 and 12 queries, of 12 and 11."""
    inputs = attention_inputs(window, length)
    found = jit(functools.partial(attention_and_gradients, window))(*inputs)
    expected = numpy_gpt.attention_and_gradients(*inputs, BASE)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), found, expected)


def test_blocks_do_not_compute_the_keys_that_causality_and_window_put_out_of_reach():
    def num_scores(window):
        run = functools.partial(attention_and_gradients, window)
        made = [dot.outvars[0].aval for dot in dots(run, *attention_inputs(window, 40))]
        return sum(array.size for array in made if 12 not in array.shape)  # the head's width

    assert num_scores(40) * (20 + 27) == num_scores(7) * (20 + 40)  # keys of two blocks of 20


# ---- Matmul and cross-entropy --------------------------------------------------------------------


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
def test_matmul_multiplies_bfloat16_operands_and_its_gradients_have_the_operands_dtypes(x_dtype):
    def run(x, w, g):
        y, pull = jax.vjp(functools.partial(matmul, "BTD,DF->BTF"), x, w)
        return y, *pull(g)

    rng, axes = np.random.default_rng(0), ((2, 30, 50), (50, 70), (2, 30, 70))
    dtypes = (x_dtype, "bfloat16", x_dtype)
    x, w, g = given = [
        jnp.asarray(rng.standard_normal(a), d) for a, d in zip(axes, dtypes, strict=True)
    ]
    y, dx, dw = run(*given)
    assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, w.dtype)
    for dot in dots(run, *given):
        types = [v.aval.dtype.name for v in (*dot.invars, *dot.outvars)]
        assert types == ["bfloat16", "bfloat16", "float32"]
    x, w, g = (np.float64(z.astype(jnp.bfloat16)) for z in given)  # the operands, to the last bit
    for found, exact in [(y, x @ w), (dx, g @ w.T), (dw, np.einsum("btd,btf->df", x, g))]:
        one_rounding = 2.0**-8 * np.abs(exact) + 1e-4
        assert np.all(np.abs(np.float64(found) - exact) <= one_rounding)


@pytest.mark.parametrize("residual", [None, "float32"])
def test_no_matmul_of_bfloat16_training_has_a_float32_operand(residual):
    cfg = replace(PACKED, compute_dtype="bfloat16", residual_dtype=residual)
    found = dots(functools.partial(sums, cfg=cfg), random_weights(cfg), *random_batch(cfg))
    assert len(found) >= 3 * (6 * 3 + 2 + 1)
    assert {v.aval.dtype.name for dot in found for v in dot.invars} == {"bfloat16"}
    assert {v.aval.dtype.name for dot in found for v in dot.outvars} == {"float32"}
    operands = [[v.aval.shape for v in dot.invars + dot.outvars] for dot in found]
    assert sum(any(256 in shape for shape in three) for three in operands) == 3  # of the head


def head_inputs(cfg, dtype="float32", scale=1.0):
    rng = np.random.default_rng(0)
    axes = ((21, 20), (cfg.padded_vocab, 20))
    x_ND, head_VD = (np.asarray(scale * rng.standard_normal(a), dtype) for a in axes)
    return x_ND, head_VD, np.float32(rng.choice([0, 0.3, 1], 21))


def assert_log_partition_is_float64s(x_ND, head_VD, weight_N, cfg, tolerance=1e-5):
    """The value and both gradients, each by its norm. Returns the log partitions."""

    def run(x, head):
        return -1.3 * log_partition(x, head, weight_N, cfg)

    loss, (dx, dhead) = jit(jax.value_and_grad(run, argnums=(0, 1)))(x_ND, head_VD)
    x, head = np.float64(x_ND), np.float64(head_VD[: cfg.vocab_size])
    z, slope = x @ head.T, 1.0
    if cfg.softcap:
        height, width, shift = cfg.softcap
        t = np.tanh((z + shift) / width)
        z, slope = height * t, height / width * (1 - t**2)
    top = z.max(axis=1, keepdims=True)
    exp = np.exp(z - top)
    logs = np.log(exp.sum(axis=1)) + top[:, 0]
    dz = -1.3 * weight_N[:, None] * exp / exp.sum(axis=1, keepdims=True) * slope
    np.testing.assert_allclose(loss, -1.3 * (weight_N * logs).sum(), rtol=max(1e-6, tolerance / 40))
    for found, exact in ((dx, dz @ head), (dhead[: cfg.vocab_size], dz.T @ x)):
        assert np.linalg.norm(np.float64(found) - exact) < tolerance * np.linalg.norm(exact)
    assert (loss.dtype, dx.dtype, dhead.dtype) == (jnp.float32, x_ND.dtype, head_VD.dtype)
    assert not np.any(dhead[cfg.vocab_size :])  # the ids that pad the table
    assert not np.any(dx[weight_N == 0])
    return logs


@pytest.mark.parametrize(  # three blocks, one, and one as they would be uneven
    "cap, vocab_size, head_block",
    [((5.0, 6.0, 1.5), 131, 7), ((5.0, 6.0, 1.5), 128, 8), ((), 131, 7), ((), 128, 64)],
)
def test_the_log_partition_and_its_gradients_are_those_of_float64(cap, vocab_size, head_block):
    cfg = config(softcap=cap, vocab_size=vocab_size, head_block=head_block)
    assert_log_partition_is_float64s(*head_inputs(cfg), cfg)


def test_the_log_partition_of_bfloat16_has_gradients_within_its_rounding():
    """The softmax, its scaled other side and the result are rounded."""
    assert_log_partition_is_float64s(*head_inputs(BASE, jnp.bfloat16), BASE, 2**-8)


def test_the_log_partition_of_logits_far_apart_or_far_below_the_paddings_is_exact():
    cfg = config(softcap=())
    logs = assert_log_partition_is_float64s(*head_inputs(cfg, scale=7.0), cfg, 1e-4)
    assert logs.max() > 200
    x_ND, head_VD, weight_N = head_inputs(cfg)
    x_ND[:, 0], head_VD[:, 0], head_VD[131:] = 1, -200, 0
    assert_log_partition_is_float64s(x_ND, head_VD, weight_N, cfg, 1e-4)


def test_where_no_gradient_is_wanted_the_compiled_loss_multiplies_by_the_head_once():
    def count(function):
        text = jit(function).lower(*head_inputs(BASE)).compile().as_text()
        return len(re.findall(r" = \S+ dot\(", text))

    loss = functools.partial(log_partition, cfg=config(head_block=7))
    assert (count(loss), count(jax.value_and_grad(loss, argnums=(0, 1)))) == (1, 3)


# ---- The weight table ----------------------------------------------------------------------------


def test_every_weight_has_the_shape_and_group_its_row_says():
    specs = param_specs(PACKED)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), specs))
    assert jax.tree.structure(params) == jax.tree.structure(specs)
    sizes = {"L": 4, "I": 3, "D": 20, "F": 37, "HK": 72, "GK": 12}
    sizes |= {"V": 256, "H": 6, "E": 5, "J": 2, "smear": 1, "backout": 1}
    for name, spec in named(specs).items():
        weight = named(params)[name]
        assert weight.shape == spec.shape == tuple(sizes[axis] for axis in spec.axes.split()), name
        assert weight.dtype == jnp.float32
        assert (spec.axes[0] == "L", spec.axes[0] == "I") == (
            name.startswith("blocks/"),
            name.startswith("attention/"),
        )
        assert spec.split in ("", *spec.axes.split()), name
        assert (spec.group in SCALAR_GROUPS) == (len(weight.shape) == 1)
        for optimizer in ("muon", "adamw"):
            assert optimizer_rules(config(optimizer=optimizer))[spec.group].lr > 0


def test_the_weights_are_counted_as_by_hand():
    attention, block = 20 * (72 + 24 + 24 + 72) + 5 * 6 + 3, 2 * 20 * 37 + 2
    others = 2 * 256 * 20 + (5 + 1) + (5 + 1) + 1
    assert count_params(param_specs(BASE)) == 3 * (attention + block) + others
    assert count_params(param_specs(config(mlp_only=(0, 2)))) == attention + 3 * block + others
    attention, block = 4 * 768**2 + 12 * 3 + 3, 2 * 768 * 3072 + 2
    others = 2 * 50688 * 768 + (12 + 1) + (12 + 1) + 1
    gpt2 = Config(vocab_size=50257)
    assert count_params(param_specs(gpt2)) == 10 * attention + 11 * block + others


def test_a_vocabulary_is_padded_to_whole_registers_and_a_large_one_to_eight_equal_shares():
    padded = {131: 256, 256: 256, 257: 384, 8192: 8192, 8193: 8704, 50257: 50688, 50688: 50688}
    assert {size: config(vocab_size=size).padded_vocab for size in padded} == padded


def test_what_a_config_does_without_has_no_weights_and_grouped_queries_have_fewer_keys():
    def names(**changes):
        return set(named(param_specs(config(**changes))))

    whole = names()
    assert len(whole) == 19
    assert whole - names(skips=()) == {"skip_gate", "skip_mix"}
    assert whole - names(smear=False) == {"smear_gate", "smear_mix"}
    assert whole - names(backout=()) == {"backout_mix"}
    assert whole - names(gate_dims=0) == {"attention/gate", "skip_gate", "smear_gate"}
    few, many = (named(param_specs(config(num_kv_heads=n))) for n in (2, None))
    changed = {name for name in few if few[name].shape != many[name].shape}
    assert changed == {"attention/w_k", "attention/w_v"}
    assert few["attention/w_k"].shape[-1] * 3 == many["attention/w_k"].shape[-1] == 72


def test_a_new_row_of_the_table_leaves_every_other_weights_first_value():
    blocks = param_specs(PACKED)["blocks"]
    another = {"another": Spec("L D", "", constant(2.0), "scalar")}
    other = {"new": Spec("D F", "", normal(1.0), "muon"), "blocks": another | blocks}
    other = with_shapes(other, axis_sizes(PACKED))
    found = jit(lambda: init_params(jax.random.key(3), other))()["blocks"]
    for name, leaf in first_weights(PACKED, 3)["blocks"].items():
        assert np.array_equal(leaf, found[name]), name


def test_first_values_have_the_spread_the_recipe_names_and_differ_between_rows_and_seeds():
    cfg = config(model_dim=80, vocab_size=1024)
    p, other = (first_weights(cfg, seed) for seed in (0, 1))
    assert not np.array_equal(p["embed"], other["embed"])
    assert not np.array_equal(p["attention"]["w_k"], p["attention"]["w_v"])
    assert not np.array_equal(p["attention"]["w_q"][0], p["attention"]["w_q"][1])
    for table in (p["embed"], p["head"]):
        np.testing.assert_allclose([np.std(table), np.mean(table)], [0.005, 0.0], atol=1e-4)
        assert np.abs(table).max() > 0.018  # normal, not uniform
    matrices = [p["attention"][name] for name in ("w_q", "w_k", "w_v", "w_out")]
    for w in (*matrices, p["blocks"]["w_up"]):
        np.testing.assert_allclose(np.std(w), 0.5 * 80**-0.5, rtol=0.03)
        assert np.abs(w).max() <= 3**0.5 * 0.5 * 80**-0.5
    jax.tree.map(np.testing.assert_array_equal, p, with_recipe_values(p))
