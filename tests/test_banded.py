"""The attention kernels for TPUs, run by Pallas's interpreter, against float64 numpy and against the plain attention."""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import numpy_gpt
from jaxprs import equations
from train import (
    Band, Config, Model, attention_band, attention_xla, banded, list_programs, loss_fn, make_mesh, param_specs, rotary, shape_of, stages,
    unstack, val_stage)

CFG = Config(
    num_layers=2, model_dim=20, num_heads=2, num_kv_heads=1, head_dim=128, mlp_dim=37, vocab_size=131, bos_id=7, mlp_only="", skips="0>1",
    late_inputs="", backout="0", offset_layers="0", gate_dims=5, softcap="5,6,1.5", rope_base=50.0, attn_scale=0.1, attn_block=256,
    compute_dtype="float32", stage_ends="1", batch_tokens="768", seq_len="768", max_doc_len="768", window_short="200", window_long="0",
    stage_lr="1", mtp="0.5", long_layers="1", micro_tokens=0, val_seq_len=768, val_context=256)
config = functools.partial(dataclasses.replace, CFG)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time


def random_inputs(cfg, num_rows, length, window, seed=0):
    """(q, k, v, gate, first, cotangent): a document begins about every hundredth token, and none at the first row's end."""
    rng = np.random.default_rng(seed)
    heads = (cfg.num_heads, cfg.kv_heads, cfg.kv_heads, cfg.num_heads)
    q, k, v, g = (np.asarray(rng.standard_normal((num_rows, length, n * cfg.head_dim)), cfg.compute_dtype) for n in heads)
    begins = rng.random((num_rows, length)) < 0.01
    begins[0, length // 4:] = False
    gate = rng.uniform(0.05, 1, (num_rows, length, cfg.num_heads)).astype(np.float32)
    gate[0, 1] = 1e-9
    first = np.maximum.accumulate(np.where(begins, np.arange(length)[None], 0), axis=1)
    return q, k, v, gate, np.maximum(first, np.arange(length)[None] - window) if window else first, g

def run_kernels(q, k, v, gate, first, g, window, block, cfg):
    """(output, its gradients in q, k, v and gate times g), with blocks of a given size."""
    length = q.shape[1]
    *table, scale = rotary(length, stages(cfg)[-1], cfg)
    table, band = [jnp.asarray(t, cfg.compute_dtype) for t in table], Band(length, window or length, block, scale, cfg.num_heads)
    with pltpu.force_tpu_interpret_mode():
        def there_and_back(q, k, v, gate, first, g):
            y, pull = jax.vjp(lambda q, k, v, gate: banded(first[:, None, None], gate.swapaxes(1, 2)[:, :, None], q, k, v, *table, band),
                              q, k, v, gate)
            return y, pull(g)
        return jax.block_until_ready(jit(there_and_back)(q, k, v, gate, first, g))

def assert_near(found, expected, tolerance):
    """Each array by its largest element."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


# ---- What the kernels compute ----------------------------------------------------------------------------------------

CASES = {  # rows, tokens, query and key heads, their width, window, block
    "two rows, a key head for two query heads, no window, two blocks deep": (2, 512, 2, 1, 128, 0, 256),
    "a window wider than a block and not a multiple of 128": (1, 1024, 1, 1, 256, 300, 256),
    "a window narrower than a tile, blocks of two tiles": (1, 1024, 2, 2, 128, 100, 512),
    "three blocks deep, the window a multiple of the block": (1, 1024, 3, 1, 128, 768, 256)}

@pytest.mark.parametrize("rows, length, heads, kv_heads, width, window, block", CASES.values(), ids=CASES.keys())
def test_the_kernels_and_their_gradients_are_those_of_float64(rows, length, heads, kv_heads, width, window, block):
    cfg = config(num_heads=heads, num_kv_heads=kv_heads, head_dim=width)
    inputs = random_inputs(cfg, rows, length, window)
    assert_near(run_kernels(*inputs, window, block, cfg), numpy_gpt.attention_and_gradients(*inputs, cfg), 1e-5)

def test_a_gate_that_is_0_lets_nothing_through_and_no_gradient_is_nan():
    q, k, v, gate, first, g = random_inputs(CFG, 1, 512, 0)
    gate[:, 100:400] = 0
    y, gradients = run_kernels(q, k, v, gate, first, g, 0, 256, CFG)
    assert not np.any(y[:, 100:400]) and all(np.isfinite(x).all() for x in gradients) and not np.any(gradients[3][:, 100:400])

def test_in_bfloat16_the_kernels_stay_within_two_roundings_of_float64():
    cfg = config(compute_dtype="bfloat16")
    inputs = random_inputs(cfg, 1, 1024, 300)
    (y, gradients), expected = run_kernels(*inputs, 300, 256, cfg), numpy_gpt.attention_and_gradients(*inputs, cfg)
    assert [a.dtype.name for a in (y, *gradients)] == ["bfloat16"] * 4 + ["float32"]
    for a, b in zip((y, *gradients), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(np.float64(a) - b) < 2 * 2 ** -8 * np.linalg.norm(b)

def test_nothing_is_seen_before_a_document_or_a_window_or_after_the_query():
    """In each row some keys and values are huge, all of them out of reach of the queries that are asked about."""
    length, window = 1024, 300
    q, k, v, gate, _, g = random_inputs(CFG, 3, length, window)
    place = np.arange(length)
    first = np.maximum(np.stack([600 * (place >= 600), 0 * place, 0 * place]), place - window)
    asked = np.stack([place >= 600, place >= 800, place < 400])        # the document from 600 on; the window; what is earlier
    huge = np.stack([place < 600, place < 800 - window, place >= 400])
    g = np.where(asked[..., None], g, 0)
    expected_y, expected = numpy_gpt.attention_and_gradients(q, k, v, gate, first, g, CFG)
    assert not np.any(expected[1][huge]) and not np.any(expected[2][huge])
    k, v = np.where(huge[..., None], np.float32(1e15), k), np.where(huge[..., None], np.float32(1e30), v)
    y, (dq, dk, dv, dgate) = map(lambda tree: jax.tree.map(np.asarray, tree), run_kernels(q, k, v, gate, first, g, window, 256, CFG))
    assert_near((y[asked], dq, dk, dv, dgate), (expected_y[asked], *expected), 1e-5)
    assert not np.any(dk[huge]) and not np.any(dv[huge])

@pytest.mark.parametrize("window", [0, 200])
def test_the_band_is_the_plain_attention_behind_the_same_signature(window):
    """In a stage whose long window has grown, and so the scale of q.k."""
    cfg = config(stage_ends="0.5,1", window_long="300,0")
    inputs = random_inputs(cfg, 1, 768, window)  # three blocks
    def run(attend):
        def there_and_back(q, k, v, gate, first, g):
            y, pull = jax.vjp(lambda *given: attend(*given, first, rotary(768, stages(cfg)[1], cfg), window, cfg), q, k, v, gate)
            return y, pull(g)
        return jax.block_until_ready(jit(there_and_back)(*inputs))
    with pltpu.force_tpu_interpret_mode():
        found = run(attention_band)
    assert_near(found, run(attention_xla), 1e-5)
    assert_near(found, numpy_gpt.attention_and_gradients(*inputs, cfg, longs=(300, 768)), 1e-5)

def test_with_the_band_a_models_loss_and_gradients_are_those_with_the_plain_attention():
    rng = np.random.default_rng(0)
    weights = numpy_gpt.random_weights(CFG, jax.tree.map(lambda spec: shape_of(spec, CFG), param_specs(CFG)))
    tokens = rng.integers(8, 131, (1, 769))
    tokens[0, [0, 3, 170, 300, 305, 511, 512]] = CFG.bos_id
    def run(attention):
        cfg = config(attention=attention)
        loss = lambda weights: loss_fn(unstack(weights), tokens[:, :-1], tokens[:, 1:], jnp.ones((1, 768)), stages(cfg)[0], cfg)
        return jax.block_until_ready(jit(jax.value_and_grad(loss))(weights))
    with pltpu.force_tpu_interpret_mode():
        found = run("band")
    assert_near(found, run("xla"), 1e-5)


# ---- What they are said to cost --------------------------------------------------------------------------------------

def flops(function, *args):
    """Of the dot_generals: two for each element of a result and of the axis that is summed over."""
    dots = [e for e in equations(jax.make_jaxpr(function)(*args).jaxpr) if e.primitive.name == "dot_general"]
    summed = lambda e: math.prod(e.invars[0].aval.shape[axis] for axis in e.params["dimension_numbers"][0][0])
    return sum(2 * e.outvars[0].aval.size * summed(e) for e in dots), len(dots)

def plain_tiles(q_BTN, k_BTN, v_BTN, window, cfg):
    """Softmax attention of tiles of 256 queries, each over the keys in its reach: (q, k, v of a tile) -> its output."""
    length, split = q_BTN.shape[1], lambda x: x.reshape(*x.shape[:2], -1, cfg.head_dim)
    attend = jax.checkpoint(lambda q, k, v: jnp.einsum("BHTS,BSHK->BTHK", jax.nn.softmax(jnp.einsum("BTHK,BSHK->BHTS", q, k)), v))
    spans = [(slice(begin, begin + 256), slice(max(0, begin - window) if window else 0, begin + 256)) for begin in range(0, length, 256)]
    return jnp.concatenate([attend(split(q_BTN[:, here]), split(k_BTN[:, keys]), split(v_BTN[:, keys])) for here, keys in spans], axis=1)

SPEEDRUN = config(  # its heads, rows and windows
    num_heads=3, num_kv_heads=0, head_dim=256, num_layers=3, mlp_only="1", skips="", attention="band", compute_dtype="bfloat16",
    batch_tokens="8192", seq_len="4096", max_doc_len="896", micro_tokens=8192, window_short="384", window_long="1408", long_layers="2",
    val_tokens=6144 * 8, val_seq_len=8192, val_context=2048, val_window_short=768, val_window_long=2560)

@pytest.fixture(scope="module")
def kernels():
    """{program: the pallas_call equations of its trace}"""
    programs = list_programs(Model(), make_mesh(jax.devices()[:1]), SPEEDRUN)
    trace = lambda name, function, arguments: [e for e in equations(function.trace(*arguments).jaxpr.jaxpr) if e.primitive.name == "pallas_call"]
    return {key: trace(*entry) for key, entry in programs.items()}

def test_every_kernel_of_every_program_says_what_it_costs(kernels):
    assert {key: len(calls) for key, calls in kernels.items()} == {"init": 0, 0: 4, "eval": 2}  # of two layers, there and back
    for call in (*kernels[0], *kernels["eval"]):
        moved = sum(v.aval.size * v.aval.dtype.itemsize for v in (*call.invars, *call.outvars))
        assert call.params["cost_estimate"].bytes_accessed == pytest.approx(moved, rel=0.1)
        assert call.params["cost_estimate"].transcendentals > 0

@pytest.mark.parametrize("program", [0, "eval"])
def test_the_flops_a_kernel_is_said_to_take_are_those_of_the_plain_attention(program, kernels):
    """Forward, two matmuls over the tiles in reach; backward, the scores once more and four for the gradients."""
    stage = stages(SPEEDRUN)[0] if program == 0 else val_stage(SPEEDRUN)
    rows, length = kernels[program][0].outvars[0].aval.shape[:2]
    assert length == stage.seq_len
    cfg = dataclasses.replace(SPEEDRUN, attn_block=256)
    q, first = jax.ShapeDtypeStruct((rows, length, 768), jnp.bfloat16), jnp.zeros((rows, length), jnp.int32)
    expected = []
    for window in (stage.windows[0], stage.windows[2]):
        table = rotary(length, stage, cfg)
        forward, _ = flops(lambda q, k, v: attention_xla(q, k, v, jnp.ones((rows, length, 3)), first, table, window, cfg), q, q, q)
        there, _ = flops(lambda q, k, v: plain_tiles(q, k, v, window, cfg), q, q, q)
        both, _ = flops(lambda q, k, v, g: jax.vjp(lambda *qkv: plain_tiles(*qkv, window, cfg), q, k, v)[1](g), q, q, q,
                        jax.ShapeDtypeStruct((rows, length, 3, 256), jnp.bfloat16))
        assert there == forward
        assert both - there == 5 / 2 * forward
        expected += [forward] + [both - there] * (program == 0)
    said = [call.params["cost_estimate"].flops for call in kernels[program]]
    np.testing.assert_allclose(sorted(said), sorted(expected), rtol=0.1)

def test_outside_the_kernels_there_is_no_score_of_a_query_and_a_key():
    """Nothing there is larger than the queries of all heads in float32."""
    cfg, length = config(num_heads=2, num_kv_heads=1, head_dim=128), 2048
    q, k = (jax.ShapeDtypeStruct((1, length, n * 128), jnp.float32) for n in (2, 1))
    gate, first = jnp.ones((1, length, 2)), jnp.zeros((1, length), jnp.int32)
    def run(q, k, v, gate, g):
        y, pull = jax.vjp(lambda *given: attention_band(*given, first, rotary(length, stages(cfg)[0], cfg), 0, cfg), q, k, v, gate)
        return y, pull(g)
    jaxpr, names = jax.make_jaxpr(run)(q, k, k, gate, q).jaxpr, []
    for eqn in equations(jaxpr, enter=lambda eqn: eqn.primitive.name != "pallas_call"):
        names.append(eqn.primitive.name)
        for v in eqn.outvars:
            assert v.aval.size <= length * 256 and list(v.aval.shape).count(length) <= 1, eqn
    assert names.count("pallas_call") == 2 and "dot_general" not in names
