"""The TPU kernels in Pallas's interpreter, against float64 numpy and the plain attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxprs import equations, jit

from train import (
    COPY_SUMS,
    GPT,
    SPEEDRUN,
    Band,
    attention_band,
    banded,
    gpt_loss,
    look_up,
    param_specs,
    parse_flags,
    replace,
    rotary,
    unstack,
)

FLAGS = """
--preset=demo --num_layers=1 --model_dim=20 --num_heads=2 --num_kv_heads=1 --head_dim=128
--mlp_dim=37 --vocab_size=131 --bos_id=7 --skips= --backout= --offset_layers=0 --gate_dims=5
--softcap=5,6,1.5 --attn_scale=0.1 --compute_dtype=float32 --stages.end=0.5,1
--stages.batch_tokens=768 --stages.seq_len=768 --stages.doc_len=768 --stages.short=100,200
"""
CFG = parse_flags(FLAGS.split())
config = functools.partial(replace, CFG)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    call = functools.partial(pl.pallas_call, interpret=True)
    monkeypatch.setattr(pl, "pallas_call", call)


def run(function, *given):
    """A function of kernels, compiled; its results in numpy."""
    return jax.device_get(jit(function)(*given))


def random_inputs(cfg, num_rows, length, window, seed=0):
    """(q, k, v, gate, first, cotangent).

    A document begins about every hundredth token, and none in the later part of the first row.
    Some gates are nearly or wholly shut.
    """
    rng = np.random.default_rng(seed)
    heads = (cfg.num_heads, cfg.kv_heads, cfg.kv_heads, cfg.num_heads)
    axes = [(num_rows, length, n * cfg.head_dim) for n in heads]
    q, k, v, g = (np.asarray(rng.standard_normal(a), cfg.compute_dtype) for a in axes)
    place, begins = np.arange(length)[None], rng.random((num_rows, length)) < 0.01
    begins[0, length // 4 :] = False
    gate = rng.uniform(0.05, 1, (num_rows, length, cfg.num_heads)).astype(np.float32)
    gate[0, 1] = 1e-9
    gate[0, 100:200] = 0
    first = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    return q, k, v, gate, np.maximum(first, place - (window or length)), g


def expected_of(inputs, cfg):
    """(output, its gradients) in float64; a gate that is shut has none in the kernels."""
    y, (dq, dk, dv, dgate) = numpy_gpt.attention_and_gradients(*inputs, cfg)
    return y, (dq, dk, dv, np.where(inputs[3] == 0, 0, dgate))


def with_gradients(attend, q, k, v, gate, first, g):
    """(output, its gradients times g) of attend(q, k, v, gate, first)."""
    y, pull = jax.vjp(lambda *given: attend(*given, first), q, k, v, gate)
    return y, pull(g)


def run_kernels(inputs, window, block, cfg):
    """The kernels' output and gradients, with blocks of a given size."""
    length = inputs[0].shape[1]
    *table, scale = rotary(length, cfg.stages[0], cfg)
    table = [jnp.asarray(t, cfg.compute_dtype) for t in table]
    band = Band(length, window or length, block, scale, cfg.num_heads)

    def attend(q, k, v, gate, first):
        return banded((first[:, None, None], gate.mT[:, :, None], q, k, v, *table), band)

    return run(functools.partial(with_gradients, attend), *inputs)


def assert_near(found, expected, tolerance):
    """Each array by its largest element."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


# ---- What the kernels compute --------------------------------------------------------------------

CASES = {  # rows, tokens, query and key heads, their width, window, block
    "two rows, no window, three heads of one key head": (2, 512, 3, 1, 128, 0, 256),
    "a window wider than a block and no multiple of 128": (1, 1024, 1, 1, 256, 300, 256),
    "a window narrower than a tile, blocks of two tiles": (1, 1024, 2, 2, 128, 100, 512),
}


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_and_their_gradients_are_those_of_float64(case):
    rows, length, heads, kv_heads, width, window, block = CASES[case]
    cfg = config(num_heads=heads, num_kv_heads=kv_heads, head_dim=width)
    inputs = random_inputs(cfg, rows, length, window)
    found = run_kernels(inputs, window, block, cfg)
    assert_near(found, expected_of(inputs, cfg), 1e-5)
    shut = inputs[3] == 0
    assert np.any(shut) and not np.any(found[0].reshape(*shut.shape, width)[shut])


def test_in_bfloat16_the_kernels_stay_within_two_roundings_of_float64():
    """With a TPU's memory simulated too."""
    cfg = config(compute_dtype="bfloat16")
    inputs = random_inputs(cfg, 1, 512, 300)
    with pltpu.force_tpu_interpret_mode():
        found = jax.tree.leaves(run_kernels(inputs, 300, 256, cfg))
    assert [a.dtype.name for a in found] == ["bfloat16"] * 4 + ["float32"]
    for a, b in zip(found, jax.tree.leaves(expected_of(inputs, cfg)), strict=True):
        assert np.linalg.norm(np.float64(a) - b) < 2 * 2**-8 * np.linalg.norm(b)


def test_nothing_is_seen_before_a_document_or_a_window_or_after_the_query():
    """In each row some keys and values are huge, out of reach of the queries asked about."""
    length, window = 1024, 300
    q, k, v, gate, _, g = random_inputs(CFG, 3, length, window)
    place = np.arange(length)
    starts = np.stack([600 * (place >= 600), 0 * place, 0 * place])
    first = np.maximum(starts, place - window)
    # by row: a document from 600 on; the window; what is earlier
    asked = np.stack([place >= 600, place >= 800, place < 400])
    huge = np.stack([place < 600, place < 800 - window, place >= 400])
    g = np.where(asked[..., None], g, 0)
    expected_y, expected = expected_of((q, k, v, gate, first, g), CFG)
    assert not np.any(expected[1][huge]) and not np.any(expected[2][huge])
    k = np.where(huge[..., None], np.float32(1e15), k)
    v = np.where(huge[..., None], np.float32(1e30), v)
    y, gradients = run_kernels((q, k, v, gate, first, g), window, 256, CFG)
    assert_near((y[asked], *gradients), (expected_y[asked], *expected), 1e-5)
    assert not np.any(gradients[1][huge]) and not np.any(gradients[2][huge])


def test_with_the_band_a_models_loss_and_gradients_are_those_with_the_plain_attention():
    """In documents, and in a window that has grown, and with it the scale of q.k."""
    rng, shapes = np.random.default_rng(0), jax.tree.map(lambda s: s.shape, param_specs(CFG))
    weights = numpy_gpt.random_weights(CFG, shapes)
    tokens = rng.integers(8, 131, (1, 769))
    tokens[0, [0, 3, 170, 300, 305, 511, 512]] = CFG.bos_id
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "step": 0}
    batch["weights"] = jnp.ones((1, 768))

    def loss(weights, attention):
        weights, cfg = unstack(weights), config(attention=attention)
        rows = look_up(weights, batch, GPT)
        return gpt_loss(weights, batch | rows, None, cfg.stages[1], cfg)[0]

    band, xla = (
        run(jax.value_and_grad(functools.partial(loss, attention=attention)), weights)
        for attention in ("band", "xla")
    )
    assert_near(band, xla, 1e-5)


# ---- The copy pointer ----------------------------------------------------------------------------
def copy_inputs(num_rows, length, window, dtype="float32", seed=0):
    """(q, k, targets, first, dsum, dhit), scores between -11.4 and 11.4, few different targets.

    The first row begins with a document of one token and has one more in it. The last row is one
    document.
    """
    rng = np.random.default_rng(seed)
    q, k = (numpy_gpt.rms_norm(rng.standard_normal((num_rows, length, 128))) for _ in range(2))
    q[:, ::50] = np.roll(k, 7, axis=1)[:, ::50]  # some keys are all that their query looks at
    targets = rng.integers(0, 20, (num_rows, length), dtype=np.int32)
    begins = rng.random((num_rows, length)) < 0.01
    begins[0, [1, length // 2, length // 2 + 1]] = True
    begins[-1] = False
    place = np.arange(length, dtype=np.int32)[None]
    first = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    dsum, dhit = rng.standard_normal((2, num_rows, length)).astype(np.float32)
    q, k = np.asarray(q * 128**-0.5, dtype), np.asarray(k, dtype)
    return q, k, targets, np.maximum(first, place - window), dsum, dhit


def copy_with_gradients(core, window, q, k, targets, first, dsum, dhit):
    sums, pull = jax.vjp(lambda q, k: core(q, k, targets, first, window), q, k)
    return sums, pull((dsum, dhit))


COPIES = {  # rows, tokens, window
    "two rows of one tile": (2, 256, 128),
    "rows of three blocks, the last two alike": (2, 768, 200),
    "a row of two blocks of four tiles": (1, 2048, 1100),
}


@pytest.mark.parametrize("core", COPY_SUMS)
@pytest.mark.parametrize("case", COPIES)
def test_copy_sums_and_their_gradients_are_those_of_float64(case, core):
    """Each sum by its own size. The first token of a document has no key."""
    inputs = copy_inputs(*COPIES[case])
    window = COPIES[case][2]
    found = run(functools.partial(copy_with_gradients, COPY_SUMS[core], window), *inputs)
    expected = numpy_gpt.copy_sums_and_gradients(*inputs)
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-5)
    assert_near(found[1], expected[1], 1e-5)
    alone = inputs[3] == np.arange(inputs[3].shape[1])
    assert np.any(alone) and not np.any(found[0][0][alone]) and not np.any(found[1][0][alone])


@pytest.mark.parametrize("core", COPY_SUMS)
def test_in_bfloat16_copy_sums_stay_within_two_roundings_of_float64(core):
    inputs = copy_inputs(2, 768, 500, "bfloat16")
    found = run(functools.partial(copy_with_gradients, COPY_SUMS[core], 500), *inputs)
    found, expected = map(jax.tree.leaves, (found, numpy_gpt.copy_sums_and_gradients(*inputs)))
    assert [a.dtype.name for a in found] == ["float32"] * 2 + ["bfloat16"] * 2
    for a, b in zip(found, expected, strict=True):
        assert np.linalg.norm(np.float64(a) - b) < 2 * 2**-8 * np.linalg.norm(b)


# ---- What they are said to cost ------------------------------------------------------------------


def traced(function, *given):
    """Equations of a function, those inside its kernels left out."""
    jaxpr = jax.make_jaxpr(function)(*given).jaxpr
    return list(equations(jaxpr, lambda eqn: eqn.primitive.name != "pallas_call"))


@functools.cache
def traced_attention(window, length=4096, cfg=SPEEDRUN):
    """Of the recipe's attention and its gradients."""
    table = rotary(length, cfg.stages[0], cfg)
    attend = functools.partial(attention_band, table=table, window=window, cfg=cfg)
    inputs = random_inputs(cfg, 1, length, window)
    return traced(functools.partial(with_gradients, attend), *inputs)


@functools.cache
def traced_copy(window, length=4096):
    inputs = copy_inputs(1, length, window, "bfloat16")
    return traced(functools.partial(copy_with_gradients, COPY_SUMS["band"], window), *inputs)


@pytest.mark.parametrize("window", [384, 4096])
@pytest.mark.parametrize(
    "trace, width, matmuls",
    [(traced_attention, 3 * 256, (2, 5)), (traced_copy, 128, (1, 3))],
)
def test_the_kernels_are_said_to_cost_what_they_move_and_multiply(trace, width, matmuls, window):
    """Tiles of 256 queries and the keys in their reach: forward two matmuls; backward the scores
    once more and four for the gradients. Without values one and three."""
    kernels = [eqn for eqn in trace(window) if eqn.primitive.name == "pallas_call"]
    scores = sum(256 * (256 + min(begin, window)) for begin in range(0, 4096, 256))
    matmul = 2 * scores * width
    for kernel, num_matmuls in zip(kernels, matmuls, strict=True):
        arrays = [v.aval for v in (*kernel.invars, *kernel.outvars)]
        moved = sum(array.size * array.dtype.itemsize for array in arrays)
        cost = kernel.params["cost_estimate"]
        assert cost.flops == pytest.approx(num_matmuls * matmul, rel=0.1)
        assert cost.bytes_accessed == pytest.approx(moved, rel=0.1)
        assert cost.transcendentals > 0


@pytest.mark.parametrize("trace, width", [(traced_attention, 3 * 256), (traced_copy, 128)])
def test_outside_the_kernels_there_is_no_score_of_a_query_and_a_key(trace, width):
    """Nothing there is larger than the queries of all heads."""
    found = trace(4096)
    for eqn in found:
        for v in eqn.outvars:
            assert v.aval.size <= 4096 * width and list(v.aval.shape).count(4096) <= 1, eqn
    assert "dot_general" not in {eqn.primitive.name for eqn in found}
