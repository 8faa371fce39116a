"""The TPU kernels in Pallas's interpreter, against float64 numpy and the plain attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest
from jax.experimental.pallas import tpu as pltpu
from jaxprs import equations, jit

from train import (
    GPT,
    Band,
    attention_band,
    banded,
    gpt_loss,
    list_programs,
    look_up,
    make_mesh,
    param_specs,
    parse_flags,
    replace,
    rotary,
    unstack,
    window_of,
)

FLAGS = """
--preset=demo --num_layers=2 --model_dim=20 --num_heads=2 --num_kv_heads=1 --head_dim=128
--mlp_dim=37 --vocab_size=131 --bos_id=7 --skips=((0,1),) --backout=0 --offset_layers=0
--long_layers=1 --gate_dims=5 --softcap=5,6,1.5 --attn_scale=0.1 --compute_dtype=float32
--stages.end=1 --stages.batch_tokens=768 --stages.seq_len=768 --stages.doc_len=768
--stages.short=200
"""
CFG = parse_flags(FLAGS.split())
config = functools.partial(replace, CFG)


def run(function, *given):
    """A function of kernels, compiled, in the interpreter; its results in numpy."""
    with pltpu.force_tpu_interpret_mode():
        found = jit(function)(*given)
        return jax.tree.map(np.asarray, found)


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
    *table, scale = rotary(length, cfg.stages[-1], cfg)
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
    cfg = config(compute_dtype="bfloat16")
    inputs = random_inputs(cfg, 1, 512, 300)
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
    """In documents; one layer has a window, the other none. It has grown, and the scale of q.k."""
    rng, shapes = np.random.default_rng(0), jax.tree.map(lambda s: s.shape, param_specs(CFG))
    weights = numpy_gpt.random_weights(CFG, shapes)
    tokens = rng.integers(8, 131, (1, 769))
    tokens[0, [0, 3, 170, 300, 305, 511, 512]] = CFG.bos_id
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "step": 0}
    batch["weights"] = jnp.ones((1, 768))
    row = CFG.stages[0]
    stages = replace(row, end=0.5, long=300), row

    def loss(weights, attention):
        weights, cfg = unstack(weights), config(attention=attention, stages=stages)
        rows = look_up(weights, batch, GPT)
        return gpt_loss(weights, batch | rows, None, row, cfg)[0]

    band, xla = (
        run(jax.value_and_grad(functools.partial(loss, attention=attention)), weights)
        for attention in ("band", "xla")
    )
    assert_near(band, xla, 1e-5)


# ---- What they are said to cost ------------------------------------------------------------------

# Its heads, rows and windows, in one stage of fewer layers
FLAGS = """
--num_layers=3 --model_dim=20 --mlp_dim=37 --vocab_size=131 --bos_id=7 --mlp_only=1 --long_layers=2
--offset_layers= --skips= --late_inputs= --backout= --attention=band --stages.end=1
--stages.batch_tokens=8192 --micro_tokens=8192 --val_tokens=49152
"""
SPEEDRUN = parse_flags(FLAGS.split())


def test_the_kernels_are_said_to_cost_what_they_move_and_multiply():
    """Tiles of 256 queries and the keys in their reach: forward two matmuls; backward the scores
    once more and four for the gradients."""
    programs = list_programs(GPT, make_mesh(jax.devices()[:1]), SPEEDRUN)
    counts = {}
    for name, (function, arguments) in programs.items():
        traced = equations(function.trace(*arguments).jaxpr.jaxpr)
        calls = [eqn for eqn in traced if eqn.primitive.name == "pallas_call"]
        counts[name], said, expected = len(calls), [], []
        for call in calls:
            arrays = [v.aval for v in (*call.invars, *call.outvars)]
            moved = sum(array.size * array.dtype.itemsize for array in arrays)
            cost = call.params["cost_estimate"]
            assert cost.bytes_accessed == pytest.approx(moved, rel=0.1)
            assert cost.transcendentals > 0
            said.append(cost.flops)
        is_eval = name == "eval"
        stage = SPEEDRUN.val if is_eval else SPEEDRUN.stages[0]
        for layer in (0, 2) if calls else ():
            num_rows, length = calls[0].outvars[0].aval.shape[:2]
            assert length == stage.seq_len
            window = window_of(layer, stage, SPEEDRUN)
            scores = sum(256 * (256 + min(begin, window)) for begin in range(0, length, 256))
            matmul = 2 * num_rows * scores * 3 * 256
            expected += [2 * matmul] if is_eval else [2 * matmul, 5 * matmul]
        np.testing.assert_allclose(sorted(said), sorted(expected), rtol=0.1)
    assert counts == {"init": 0, "train_0": 4, "eval": 2}  # of two layers, there and back


def test_outside_the_kernels_there_is_no_score_of_a_query_and_a_key():
    """Nothing there is larger than the queries of all heads in float32."""
    length, names = 2048, []
    table = rotary(length, CFG.stages[0], CFG)
    attend = functools.partial(attention_band, table=table, window=0, cfg=CFG)
    traced = jax.make_jaxpr(functools.partial(with_gradients, attend))
    jaxpr = traced(*random_inputs(CFG, 1, length, 0)).jaxpr
    for eqn in equations(jaxpr, lambda eqn: eqn.primitive.name != "pallas_call"):
        names.append(eqn.primitive.name)
        for v in eqn.outvars:
            assert v.aval.size <= length * 256 and list(v.aval.shape).count(length) <= 1, eqn
    assert names.count("pallas_call") == 2 and "dot_general" not in names
