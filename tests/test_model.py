"""The weight table and the model, against the float64 GPT of numpy_gpt.py and their promises."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest
from jaxprs import dots, jit

import train
from scripts.baselines import log_partition
from train import GPT, Config, Spec, Stage, init_params, named, param_specs, replace, rotary

BOS, ROWS, LENGTH, STEP = 7, 2, 22, 70
ROW = Stage(batch_tokens=44, seq_len=LENGTH)
FLAGS = """
--preset=demo --steps=100 --num_layers=3 --model_dim=20 --num_heads=6 --num_kv_heads=2 --head_dim=12
--mlp_dim=37 --vocab_size=131 --bos_id=7 --skips=((0,2),) --late_inputs=((0,2),) --backout=1
--offset_layers= --long_layers=1 --gate_dims=5 --softcap=5,6,1.5 --attn_scale=0.25
--compute_dtype=float32 --residual_dtype=none
"""
BASE = replace(train.parse_flags(FLAGS.split()), stages=(ROW,), val=Stage(seq_len=LENGTH))
config = functools.partial(replace, BASE)
OF_DOCUMENTS = config(stages=(replace(ROW, doc_len=9),), attention="xla")
WITHOUT = {"skips": (), "late_inputs": (), "backout": (), "gate_dims": 0, "smear": False}
PLAIN = config(**WITHOUT, num_layers=2, num_kv_heads=None, offset_layers=(1,))
GROWING = [
    replace(ROW, end=end, doc_len=22, short=5, long=long) for end, long in ((0.3, 7), (0.6, 9))
]
PACKED = config(
    num_kv_heads=1,
    mlp_only=(1,),
    long_layers=(2,),
    offset_layers=(0, 2),
    skips=((0, 1), (1, 2)),
    late_inputs=((0, 2),),
    copy_dim=6,
    stages=(*GROWING, replace(ROW, doc_len=22, short=5, long=13, ahead=(0.5, 0.25))),
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
    "without what is optional, as many key heads": PLAIN,
    "packed, one key head, growing windows, copies, two tokens ahead": PACKED,
    "no softcap, no gates, two skips into one block, one token ahead, tied": UNGATED,
}
each_case = pytest.mark.parametrize("cfg", CASES.values(), ids=CASES.keys())


@pytest.fixture(autouse=True)
def a_pointer_that_looks_back_four_tokens(monkeypatch):
    """So that its window is felt in rows of 22."""
    for module in (train, numpy_gpt):
        monkeypatch.setattr(module, "COPY_WINDOW", 4)


def random_weights(cfg):
    return numpy_gpt.random_weights(cfg, jax.tree.map(lambda spec: spec.shape, param_specs(cfg)))


def random_tokens(cfg, length=LENGTH):
    """Tokens with a BOS about every sixth, the first token not one."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, cfg.vocab_size, (ROWS, length))
    tokens[rng.random(tokens.shape) < 0.16] = BOS
    tokens[:, 0] = 3
    return tokens


def random_batch(cfg):
    """(rows of one token more than they predict, weights of the targets)."""
    weight = np.random.default_rng(3).choice([0.0, 0.5, 1.0], (ROWS, LENGTH))
    return random_tokens(cfg, LENGTH + 1), np.float32(weight)


def copies(weights, cfg):
    return train.unstack(train.gather(weights, param_specs(cfg), 1, cfg))


@functools.partial(jit, static_argnums=1)
def first_weights(seed, cfg):
    return init_params(jax.random.key(seed), param_specs(cfg))


@functools.partial(jit, static_argnums=2)
def compiled_logits(weights, tokens, cfg):
    return train.next_logits(copies(weights, cfg), tokens, cfg)


def model_logits(weights, tokens, cfg):
    return np.array(compiled_logits(weights, tokens, cfg))


@functools.partial(jit, static_argnums=3)
def sums(weights, rows, weight, cfg):
    """What `accumulate` sums in two micro-steps of the last stage: (nats, weight, gradients)."""
    batch = {"tokens": rows[:, None].astype(jnp.uint16), "weights": weight[:, None]}
    apart, key, stage = copies(weights, cfg), jax.random.key(0), cfg.stages[-1]
    nats, total, grads = train.accumulate(apart, batch, key, jnp.int32(STEP), stage, GPT, cfg)
    return nats, total, train.restack(grads)


def oracle_outputs(weights, tokens, stage, cfg):
    """(logits, log-probabilities with the copy pointer where there is one)."""
    longs, packed = [row.long for row in cfg.stages], cfg.stages[0].doc_len > 0
    windows = [stage.long if i in cfg.long_layers else stage.short for i in range(cfg.num_layers)]
    if stage.tied:
        weights = weights | {"embed": weights["head"]}
    return numpy_gpt.outputs(weights, tokens, windows, longs, cfg, packed)


def oracle_loss(weights, rows, weight, cfg):
    """Of the last stage at STEP. Of the tokens ahead the last leaves over the stage."""
    stage, begin = cfg.stages[-1], cfg.bounds[-2]
    left = 1 - max(0, STEP - begin) / (cfg.steps - begin)
    ahead = [*stage.ahead[:-1], *(left * last for last in stage.ahead[-1:])]
    outputs = oracle_outputs(weights, rows[:, :-1], stage, cfg)
    return numpy_gpt.loss(*outputs, rows[:, 1:], weight, ahead)


# ---- The whole model -----------------------------------------------------------------------------


@each_case
def test_logits_are_those_of_a_plain_float64_gpt(cfg):
    """With validation's windows, and the rotation of the last stage."""
    weights, tokens = random_weights(cfg), random_tokens(cfg)
    logits = model_logits(weights, tokens, cfg)
    expected = oracle_outputs(weights, tokens, cfg.val, cfg)[1]
    assert expected.std() > 0.5  # the comparison is not one of zeros
    assert logits.shape == (ROWS, LENGTH, 256) and logits.dtype == np.float32
    np.testing.assert_allclose(logits[..., :131], expected, atol=2e-4)
    assert np.all(logits[..., 131:] < -1e9)


@each_case
def test_the_loss_and_each_weights_gradient_are_the_float64_loss_and_its_slope(cfg):
    weights, (rows, weight) = random_weights(cfg), random_batch(cfg)
    nats, total, grads = sums(weights, rows, weight, cfg)
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
    expected = oracle_outputs(weights, tokens, cfg.val, cfg)[1]
    error = model_logits(weights, tokens, cfg)[..., :131] - expected
    assert np.sqrt(np.mean(error**2)) < 0.03 * expected.std()


FIRST = {  # what the recipe starts from where it is not random
    "attention/gate": 0.0,
    "attention/x_mix": 1.1**0.5,
    "attention/y_mix": 1.0,
    "attention/x0_mix": 0.0,
    "blocks/w_down": 0.0,
    "blocks/x_mix": 1.1**0.5,
    "blocks/y_mix": 1.0,
    "skip_gate": 0.0,
    "skip_mix": -1.5,
    "smear_gate": 0.0,
    "smear_mix": 0.0,
    "backout_mix": 0.5,
}


def test_first_values_are_the_recipes_and_the_first_loss_that_of_chance():
    """Random ones have the spread it names, and differ between rows and seeds."""
    cfg = config(model_dim=80, vocab_size=1024)
    p, other = (named(jax.device_get(first_weights(seed, cfg))) for seed in (0, 1))
    assert not np.array_equal(p["embed"], other["embed"])
    assert not np.array_equal(p["attention/w_k"], p["attention/w_v"])
    assert not np.array_equal(p["attention/w_q"][0], p["attention/w_q"][1])
    for name in ("embed", "head"):
        table = p.pop(name)
        np.testing.assert_allclose([np.std(table), np.mean(table)], [0.005, 0.0], atol=1e-4)
        assert np.abs(table).max() > 0.018  # normal, not uniform
    for name in (
        "attention/w_q",
        "attention/w_k",
        "attention/w_v",
        "attention/w_out",
        "blocks/w_up",
    ):
        w = p.pop(name)
        np.testing.assert_allclose(np.std(w), 0.5 * 80**-0.5, rtol=0.03)
        assert np.abs(w).max() <= 3**0.5 * 0.5 * 80**-0.5
    assert p.keys() == FIRST.keys()
    for name, w in p.items():
        assert np.all(w == np.float32(FIRST[name])), name

    p = named(first_weights(5, PACKED))
    np.testing.assert_allclose(np.std(p["copy_qk"]), 20**-0.5, rtol=0.1)
    assert not np.any(p["copy_logit"]) and np.all(np.abs(p["copy_sink"]) > 0)

    rows, weight = random_batch(PACKED)
    logits = model_logits(first_weights(5, PACKED), rows[:, :-1], PACKED)[..., :131]
    assert logits.std() > 0.01
    nats = numpy_gpt.loss(logits, logits, rows[:, 1:], weight)
    np.testing.assert_allclose(nats / weight.sum(), math.log(131), atol=0.01)


def test_the_softcap_is_the_shifted_sigmoid_of_the_recipe_less_a_constant_or_none():
    z = np.linspace(-60, 60, 241)
    sigmoid = 23 / (1 + np.exp(-(z + 5) / 7.5)) - 11.5
    np.testing.assert_allclose(train.softcap(jnp.float32(z), Config()), sigmoid, atol=2e-5)
    assert np.array_equal(train.softcap(jnp.float32(z), config(softcap=())), np.float32(z))


# ---- Which token sees which ----------------------------------------------------------------------


def each_place(cfg):
    """Yield (place, positions whose logits the token there changes, row) of row 0.

    Of tokens that are no BOS. No other row may change.
    """
    weights, tokens = random_weights(cfg), random_tokens(cfg)
    before = model_logits(weights, tokens, cfg)
    for place in np.flatnonzero(tokens[0] != BOS):
        other = tokens.copy()
        other[0, place] = (
            0 if tokens[0, place] + 1 in (BOS, cfg.vocab_size) else tokens[0, place] + 1
        )
        changed = np.any(before != model_logits(weights, other, cfg), axis=-1)
        assert not changed[1:].any(), "rows of a batch depend on each other"
        yield place, set(np.flatnonzero(changed[0])), tokens[0]


def test_in_a_plain_stream_a_token_changes_its_own_logits_and_all_later_ones_and_none_before():
    for place, changed, _ in each_place(PLAIN):
        assert changed == set(range(place, LENGTH))


def test_one_layer_reaches_a_window_back_one_more_with_key_offset_one_with_smear():
    changes = WITHOUT | {"smear": True, "offset_layers": (0,), "num_layers": 1}
    cfg = config(**changes, val=Stage(seq_len=LENGTH, short=5), long_layers=())
    for place, changed, _ in each_place(cfg):
        assert changed == set(range(place, min(place + 5 + 1 + 1, LENGTH - 1) + 1))


def test_in_packed_documents_a_token_changes_its_own_and_by_smear_the_next_ones_first():
    """Which the rest of that document attends to; all else crosses no border."""
    for place, changed, row in each_place(PACKED):
        borders = [*np.flatnonzero(row == BOS), LENGTH, LENGTH]
        assert len(borders) >= 5
        last = next(i for i, border in enumerate(borders) if border > place)
        end = borders[last + (place + 1 == borders[last])]
        assert changed == set(range(place, end))


def test_a_later_bos_cannot_change_an_earlier_logit():
    weights, tokens = random_weights(PACKED), random_tokens(PACKED)
    other = tokens.copy()
    other[:, 15] = BOS
    before, after = (model_logits(weights, x, PACKED) for x in (tokens, other))
    assert np.array_equal(before[:, :15], after[:, :15])
    assert np.all(np.any(before[:, 15] != after[:, 15], axis=-1))


# ---- Rotary positions ----------------------------------------------------------------------------


def test_half_of_a_heads_dims_stand_still_and_in_the_others_q_dot_k_depends_on_the_distance_only():
    rng, cfg, far = np.random.default_rng(0), config(head_dim=20), [0, 1, 17, 4099]
    q, k = np.float32(rng.standard_normal((2, 20)))

    def rotated(vector, places):
        x_1TK = jnp.tile(vector[None, None, None], (1, len(places), 1, 1))
        table = [t[list(places)] for t in rotary(4100, ROW, cfg)[:2]]
        return np.float64(jit(train.rotate)(x_1TK, *table))[0, :, 0]

    rate, _ = numpy_gpt.turning(cfg, ())
    expected = numpy_gpt.rotated(np.tile(q, (4, 1)), far, rate)
    found = rotated(q, far)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    still = [*range(5, 10), *range(15, 20)]
    assert np.all(found[:, still] == q[None, still])
    score = rotated(q, range(40)) @ rotated(k, range(40)).T
    for distance in range(-39, 40):
        diagonal = np.diagonal(score, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
    assert np.std(score[0]) > 0.5


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


def attention_and_gradients(window, cfg, q_BTN, k_BSN, v_BSN, gate_BTH, document_BT, g_BTN):
    """(output, gradients of output . cotangent)."""
    table = rotary(q_BTN.shape[1], ROW, BASE)

    def attend(*given):
        return train.ATTENTION[cfg.attention](*given, document_BT, table, window, cfg)

    y, pull = jax.vjp(attend, q_BTN, k_BSN, v_BSN, gate_BTH)
    return y, pull(g_BTN)


def attention_inputs(length):
    rng = np.random.default_rng(0)
    heads = (6, 6, 2, 2)
    q, g, k, v = (np.float32(rng.standard_normal((2, length, n * 12))) for n in heads)
    place, begins = np.arange(length)[None], rng.random((2, length)) < 0.15
    document = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    gate = np.float32(rng.random((2, length, 6)))
    return q, k, v, gate, document, g


def written_out(window, q, k, v, gate, document, g):
    """attention_and_gradients in float64."""
    first = np.maximum(document, np.arange(q.shape[1])[None] - window)
    return numpy_gpt.attention_and_gradients(q, k, v, gate, first, g, BASE)


def test_attention_and_its_gradients_are_those_written_out_in_float64():
    """From raw queries and keys, in two blocks: of 12 and 11 queries."""
    inputs = attention_inputs(23)
    found = jit(functools.partial(attention_and_gradients, 7, OF_DOCUMENTS))(*inputs)
    expected = written_out(7, *inputs)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), found, expected)


def test_cudnn_is_asked_for_the_same_attention_and_for_causality_and_window_by_its_own_means(
    monkeypatch,
):
    """Another implementation of the same call answers. A mask alone would skip no block."""
    plain = jax.nn.dot_product_attention
    asked = []

    def answer(*arrays, implementation, **settings):
        has_mask = settings["mask"] is not None
        window = settings["local_window_size"]
        asked.append((implementation, settings["is_causal"], window, has_mask))
        return plain(*arrays, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    for window in (7, 23):  # the row has 23 tokens
        inputs = attention_inputs(23)
        cfg = replace(OF_DOCUMENTS, attention="cudnn")
        run = functools.partial(attention_and_gradients, window, cfg)
        found = jit(run)(*inputs)
        expected = written_out(window, *inputs)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), found, expected)
    q, k, v, gate, document, g = inputs
    run = functools.partial(attention_and_gradients, 7, replace(BASE, attention="cudnn"))
    found = jit(run)(q, k, v, gate, 0 * document, g)
    expected = written_out(7, q, k, v, gate, 0 * document, g)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), found, expected)
    masked = [("cudnn", True, (7, 0), True), ("cudnn", True, None, True)]
    assert asked == [*masked, ("cudnn", True, (7, 0), False)]


def test_blocks_do_not_compute_the_keys_that_causality_and_window_put_out_of_reach():
    def num_scores(window):
        run = functools.partial(attention_and_gradients, window, OF_DOCUMENTS)
        made = [dot.outvars[0].aval for dot in dots(run, *attention_inputs(40))]
        return sum(array.size for array in made if 12 not in array.shape)  # the head's width

    assert num_scores(40) * (20 + 27) == num_scores(7) * (20 + 40)  # keys of two blocks of 20


# ---- Matmul and cross-entropy --------------------------------------------------------------------


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
def test_matmul_multiplies_bfloat16_operands_and_its_gradients_have_the_operands_dtypes(x_dtype):
    def run(x, w, g):
        y, pull = jax.vjp(functools.partial(train.matmul, "BTD,DF->BTF"), x, w)
        return y, *pull(g)

    rng, axes = np.random.default_rng(0), ((2, 30, 50), (50, 70), (2, 30, 70))
    dtypes = (x_dtype, "bfloat16", x_dtype)
    given = [np.asarray(rng.standard_normal(a), d) for a, d in zip(axes, dtypes, strict=True)]
    y, dx, dw = jit(run)(*given)
    assert [z.dtype.name for z in (y, dx, dw)] == [x_dtype, x_dtype, "bfloat16"]
    for dot in dots(run, *given):
        types = [v.aval.dtype.name for v in (*dot.invars, *dot.outvars)]
        assert types == ["bfloat16", "bfloat16", "float32"]
    x, w, g = (np.float64(z.astype(jnp.bfloat16)) for z in given)  # the operands, to the last bit
    for found, exact in [(y, x @ w), (dx, g @ w.T), (dw, np.einsum("btd,btf->df", x, g))]:
        one_rounding = 2.0**-8 * np.abs(exact) + 1e-4
        assert np.all(np.abs(np.float64(found) - exact) <= one_rounding)


def test_no_matmul_of_bfloat16_training_has_a_float32_operand_though_the_stream_is_float32():
    cfg = replace(PACKED, compute_dtype="bfloat16", residual_dtype="float32")
    found = dots(
        lambda *given: sums.__wrapped__(*given, cfg), random_weights(cfg), *random_batch(cfg)
    )
    assert len(found) >= 3 * (6 * 2 + 2 + 1)
    assert {v.aval.dtype.name for dot in found for v in dot.invars} == {"bfloat16"}
    assert {v.aval.dtype.name for dot in found for v in dot.outvars} == {"float32"}
    operands = [[v.aval.shape for v in dot.invars + dot.outvars] for dot in found]
    assert sum(any(256 in shape for shape in three) for three in operands) == 3  # of the head


@functools.cache
def compiled_partition(cfg, dtype="float32", with_gradients=True):
    """-1.3 times the log partition of 21 tokens, and its gradients by x and head."""

    def run(x_ND, head_VD, weight_N):
        return -1.3 * log_partition(x_ND, head_VD, weight_N, cfg)

    function = jax.value_and_grad(run, argnums=(0, 1)) if with_gradients else run
    return jit(function).lower(*head_inputs(cfg, dtype)).compile()


def head_inputs(cfg, dtype="float32", scale=1.0):
    rng = np.random.default_rng(0)
    axes = ((21, 20), (cfg.padded_vocab, 20))
    x_ND, head_VD = (np.asarray(scale * rng.standard_normal(a), dtype) for a in axes)
    return x_ND, head_VD, np.float32(rng.choice([0, 0.3, 1], 21))


def assert_log_partition_is_float64s(x_ND, head_VD, weight_N, cfg, tolerance=1e-5):
    """The value and both gradients, each by its norm. Returns the log partitions."""
    loss, (dx, dhead) = compiled_partition(cfg, x_ND.dtype.name)(x_ND, head_VD, weight_N)
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


CAPPED, UNCAPPED = config(head_block=7), config(softcap=(), head_block=8)  # three blocks; one


@pytest.mark.parametrize("cfg", [CAPPED, UNCAPPED], ids=["capped, in blocks", "uncapped, in one"])
def test_the_log_partition_and_its_gradients_are_those_of_float64(cfg):
    assert_log_partition_is_float64s(*head_inputs(cfg), cfg)


def test_the_log_partition_of_bfloat16_has_gradients_within_its_rounding():
    """The softmax, its scaled other side and the result are rounded."""
    assert_log_partition_is_float64s(*head_inputs(CAPPED, jnp.bfloat16), CAPPED, 2**-8)


def test_the_log_partition_of_logits_far_apart_or_far_below_the_paddings_is_exact():
    far_apart = head_inputs(UNCAPPED, scale=7.0)
    assert assert_log_partition_is_float64s(*far_apart, UNCAPPED, 1e-4).max() > 200
    x_ND, head_VD, weight_N = head_inputs(UNCAPPED)
    x_ND[:, 0], head_VD[:, 0], head_VD[131:] = 1, -200, 0
    assert_log_partition_is_float64s(x_ND, head_VD, weight_N, UNCAPPED, 1e-4)


def test_where_no_gradient_is_wanted_the_compiled_loss_multiplies_by_the_head_once():
    def count(with_gradients):
        text = compiled_partition(CAPPED, with_gradients=with_gradients).as_text()
        return len(re.findall(r" = \S+ dot\(", text))

    assert (count(False), count(True)) == (1, 3)


# ---- The weight table ----------------------------------------------------------------------------


def test_the_weights_are_counted_as_by_hand():
    attention, block = 20 * (72 + 24 + 24 + 72) + 5 * 6 + 3, 2 * 20 * 37 + 2
    others = 2 * 256 * 20 + (5 + 1) + (5 + 1) + 1
    assert train.count_params(param_specs(BASE)) == 3 * (attention + block) + others
    without_two = param_specs(config(mlp_only=(0, 2)))
    assert train.count_params(without_two) == attention + 3 * block + others


def test_a_vocabulary_is_padded_to_whole_registers_and_a_large_one_to_eight_equal_shares():
    padded = {131: 256, 256: 256, 257: 384, 8192: 8192, 8193: 8704, 50257: 50688, 50688: 50688}
    assert {size: config(vocab_size=size).padded_vocab for size in padded} == padded


def test_a_new_row_of_the_table_leaves_every_other_weights_first_value():
    blocks = param_specs(PACKED)["blocks"]
    another = {"another": Spec("L D", "", train.constant(2.0), "scalar")}
    other = {"new": Spec("D F", "", train.normal(1.0), "muon"), "blocks": another | blocks}
    other = train.with_shapes(other, train.axis_sizes(PACKED))
    found = jit(lambda: init_params(jax.random.key(3), other))()["blocks"]
    for name, leaf in first_weights(3, PACKED)["blocks"].items():
        assert np.array_equal(leaf, found[name]), name
