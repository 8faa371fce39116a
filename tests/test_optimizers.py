"""Schedules and optimizers, against an SVD, float64 numpy and optax."""
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from train import (
    Config, Rule, Spec, UsageError, adam_direction, equalize_units, layer_windows, loss_shares, lr_scale, make_mesh, muon_direction,
    muon_momentum, name_of, optimizer_rules, orthogonalize, orthogonalize_spread, param_specs, ramp, shape_of, slot_specs, split_axis,
    stage_at, stages, tokens_before, unit_axis, update)

# D < HK, D > GK is tall, D == F is square: every orientation Muon meets
CFG = Config(
    steps=9, num_layers=3, model_dim=20, num_heads=3, num_kv_heads=1, head_dim=12, mlp_dim=20, vocab_size=131, bos_id=7, mlp_only="",
    skips="0>2", late_inputs="", backout="1", offset_layers="", gate_dims=5, compute_dtype="float32", stage_ends="0.5,1",
    batch_tokens="44", seq_len="22", max_doc_len="0", window_short="0", window_long="0", long_layers="", stage_lr="0.7,0.4",
    muon_lr=0.03, muon_wd=0.4, muon_beta2=0.8, muon_momentum="0.8,0.95,3,2", embed_lr=0.3, head_lr=0.05, scalar_lr=0.02, gate_lr=0.01,
    adamw_lr=0.01, adam_beta1=0.7, adam_beta2=0.9, adam_eps=1e-3, adam_wd=0.3, warmup_steps=2, cooldown_frac=0.5,
    final_lr_scale=0.1, final_frac=1 / 9)
config = functools.partial(dataclasses.replace, CFG)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time


def random(shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)

def named(tree):
    """{"attention/w_q": leaf in float64, ...}"""
    return {name_of(path): np.float64(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}

POLYNOMIALS = [  # of Polar Express, as the recipe has them
    (8.156554524902461, -22.48329292557795, 15.878769915207462), (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393), (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)]

def polynomials(s, steps=5):
    """What becomes of a singular value, given as a share of the Frobenius norm."""
    s = s / 1.02
    for a, b, c in POLYNOMIALS[:steps]:
        s = a * s + b * s ** 3 + c * s ** 5
    return s

def svd_orthogonalize(g, steps=5):
    """The iteration on the singular values alone, in float64."""
    u, s, vt = np.linalg.svd(np.float64(g), full_matrices=False)
    size = np.linalg.norm(s, axis=-1, keepdims=True)
    return (u * polynomials(s / np.where(size, size, 1), steps)[..., None, :]) @ vt

def with_singular_values(values, rows, columns, seed=0):
    (u, _, _), (_, _, vt) = (np.linalg.svd(random((n, m), seed), full_matrices=False) for n, m in
                             ((rows, len(values)), (len(values), columns)))
    return (u * np.asarray(values)) @ vt


# ---- Schedules -------------------------------------------------------------------------------------------------------

def constant_stage(cfg, lr=1.0):
    return stages(dataclasses.replace(cfg, stage_lr="1"))[0]._replace(lr=lr)

def test_the_learning_rate_warms_up_stays_falls_to_its_last_share_and_stays_there():
    cfg = config(steps=110, final_frac=1 / 11, warmup_steps=4, cooldown_frac=0.25, final_lr_scale=0.2)
    found = np.array([lr_scale(step, constant_stage(cfg), cfg) for step in (0, 1, 3, 4, 50, 75, 80, 99, 100, 105, 109)])
    np.testing.assert_allclose(found, [0.2, 0.4, 0.8, 1, 1, 1, 0.84, 0.232, 0.2, 0.2, 0.2], rtol=1e-6)

def test_the_last_share_is_of_the_first_stages_rate_whatever_the_stages():
    cfg = config(steps=100, final_frac=0.0, warmup_steps=0, cooldown_frac=0.5, final_lr_scale=0.2)
    found = [lr_scale(step, constant_stage(cfg, lr), cfg) for lr in (1.0, 3.0, 0.5) for step in (50, 75, 100)]
    np.testing.assert_allclose(found, [1, 0.6, 0.2, 3, 1.6, 0.2, 0.5, 0.35, 0.2], rtol=1e-6)

def test_without_warmup_and_cooldown_the_learning_rate_is_the_stages():
    cfg = config(warmup_steps=0, cooldown_frac=0.0, final_frac=0.0)
    assert [float(lr_scale(step, constant_stage(cfg, 1.5), cfg)) for step in range(cfg.steps)] == [1.5] * cfg.steps

def test_a_cooldown_over_the_whole_run_falls_from_its_first_step():
    cfg = config(steps=10, warmup_steps=0, cooldown_frac=1.0, final_lr_scale=0.0, final_frac=0.0)
    np.testing.assert_allclose([lr_scale(step, constant_stage(cfg), cfg) for step in (0, 4, 10)], [1.0, 0.6, 0.0], atol=1e-6)

def test_the_speedruns_learning_rate_is_what_its_table_gives_by_hand():
    """Three thirds of 1866 steps and 40 more; from x = 0.4 on, w = (1 - x) / 0.6 of the stage's rate and 1 - w of 0.15."""
    cfg = Config()
    assert [(stage.first, stage.last, stage.lr) for stage in stages(cfg)] == [
        (0, 622, 1), (622, 1244, 1.52), (1244, 1866, 1.73), (1866, 1906, 1.73)]
    for step, wanted in [(0, 1), (621, 1), (622, 1.52), (0.4 * 1866, 1.52), (933, 1.52 * 5 / 6 + 0.15 / 6),
                         (0.8 * 1866, 1.73 / 3 + 0.15 * 2 / 3), (1866, 0.15), (1905, 0.15)]:
        assert float(lr_scale(step, stage_at(step, stages(cfg)), cfg)) == pytest.approx(wanted, rel=5e-5), step

def test_schedules_are_the_same_traced_as_on_the_host():
    steps, stage = range(CFG.steps + 1), stages(CFG)[0]
    cfg = config(mtp="0.5,0.25")
    for schedule in (lambda step: lr_scale(step, stage, CFG), lambda step: muon_momentum(step, CFG), lambda step: loss_shares(step, stage, cfg)[1]):
        traced = jit(schedule)
        np.testing.assert_allclose([traced(np.int32(step)) for step in steps], [schedule(step) for step in steps], rtol=1e-5, atol=1e-7)

def test_muons_momentum_rises_linearly_stays_and_goes_the_way_back_at_the_end():
    cfg = config(steps=100, muon_momentum="0.85,0.95,20,10")
    np.testing.assert_allclose([muon_momentum(step, cfg) for step in (0, 5, 20, 21, 90, 95, 99, 100)],
                               [0.85, 0.875, 0.95, 0.95, 0.95, 0.9, 0.86, 0.85], rtol=1e-6)
    assert float(muon_momentum(3, config(muon_momentum="0.9,0.9,0,0"))) == pytest.approx(0.9)
    assert float(muon_momentum(99, config(steps=100, muon_momentum="0.85,0.95,20,0"))) == pytest.approx(0.95)
    for steps in (20, 150, 300):  # too few for the whole way there and back
        values = [float(muon_momentum(step, dataclasses.replace(Config(), steps=steps))) for step in range(steps)]
        assert min(values) >= 0.85 - 1e-6 and values[0] == pytest.approx(0.85) and max(values) <= 0.95
    np.testing.assert_allclose([muon_momentum(step, config(steps=100, muon_momentum="0.95,0.85,20,10")) for step in (0, 10, 20, 95)],
                               [0.95, 0.9, 0.85, 0.9], rtol=1e-6)
    np.testing.assert_allclose([muon_momentum(step, Config()) for step in (0, 150, 300, 1856, 1881)], [0.85, 0.9, 0.95, 0.95, 0.9], rtol=1e-6)

def test_the_second_and_third_next_token_leave_the_loss_one_stage_after_the_other():
    cfg, (first, second, third, last) = Config(), stages(Config())
    for step, stage, wanted in [(0, first, [0.5, 0.25]), (311, first, [0.5, 0.125]), (622, first, [0.5, 0]), (622, second, [0.5]),
                                (933, second, [0.25]), (1244, second, [0]), (1244, third, []), (1900, last, [])]:
        assert loss_shares(step, stage, cfg) == pytest.approx(wanted), (step, stage.index)
    assert loss_shares(0, first, config(mtp="")) == []
    assert loss_shares(2, stages(CFG)[0], config(mtp="0.8")) == pytest.approx([0.4]) and loss_shares(5, stages(CFG)[1], config(mtp="0.8")) == []

def test_a_ramp_is_linear_between_its_points_and_constant_outside():
    points, values = [3, 5, 11], [2.0, -1.0, 4.0]
    expected = [2, 2, 2, 2, 0.5, -1, -1 / 6, 2 / 3, 1.5, 7 / 3, 19 / 6, 4, 4, 4, 4]
    np.testing.assert_allclose([ramp(step, points, values) for step in range(15)], expected, rtol=1e-6)
    np.testing.assert_allclose(jit(lambda steps: ramp(steps, points, values))(np.arange(15)), expected, rtol=1e-5)

def test_stages_are_read_from_lists_of_one_value_or_one_for_each():
    cfg = config(steps=90, num_layers=4, stage_ends="0.3,0.7,1", batch_tokens="64,128,256", seq_len="16,32,32", max_doc_len="9",
                 window_short="3,0,5", window_long="7", long_layers="0,3", stage_lr="1,0.5,0.25")
    assert [tuple(stage) for stage in stages(cfg)] == [
        (0, 0, 27, 64, 16, 9, (7, 3, 3, 7), 1.0), (1, 27, 63, 128, 32, 9, (7, 0, 0, 7), 0.5),
        (2, 63, 90, 256, 32, 9, (7, 5, 5, 7), 0.25)]
    assert layer_windows(1, 2, config(num_layers=5, long_layers="4")) == (1, 1, 1, 1, 2)

def test_a_list_of_the_wrong_length_is_named_with_its_value_and_what_was_wanted():
    for name, value in [("seq_len", "16,32"), ("window_long", "1,2,3,4"), ("stage_lr", "1,1")]:
        with pytest.raises(UsageError) as error:
            stages(config(**{"stage_ends": "0.3,0.7,1", "stage_lr": "1", name: value}))
        for words in (f"--{name}={value}", "one value", "3 stages", "--stage_ends=0.3,0.7,1"):
            assert words in str(error.value)

def test_every_step_belongs_to_one_stage_and_tokens_add_up():
    cfg = config(steps=11, stage_ends="0.3,0.7,1", batch_tokens="64,128,256", seq_len="16", stage_lr="1")
    table, seen = stages(cfg), 0
    for step in range(cfg.steps):
        stage = stage_at(step, table)
        assert stage.first <= step < stage.last and tokens_before(step, table) == seen
        seen += stage.batch_tokens
    assert tokens_before(cfg.steps, table) == seen == 3 * 64 + 5 * 128 + 3 * 256
    assert [stage.index for stage in (stage_at(0, table), stage_at(3, table), stage_at(10, table))] == [0, 1, 2]

def test_a_run_of_one_step_still_has_its_step():
    table = stages(config(steps=1, stage_ends="0.333,0.667,1", stage_lr="1"))
    assert sum(stage.last - stage.first for stage in table) == 1 and stage_at(0, table).last == 1


# ---- Orthogonalize ---------------------------------------------------------------------------------------------------

@functools.cache
def compiled_orthogonalize(steps=5, dtype="float32"):
    return jit(lambda *matrices: [orthogonalize(g, steps, jnp.dtype(dtype)) for g in matrices])

SHAPES = [(3, 7, 19), (2, 2, 23, 5), (13, 13), (1, 17), (11, 1)]

@pytest.mark.parametrize("steps", [1, 3, 5])
def test_orthogonalize_maps_singular_values_by_the_polynomials_and_keeps_singular_vectors(steps):
    matrices = [np.float32(random(shape)) for shape in SHAPES]
    for g, found in zip(matrices, compiled_orthogonalize(steps)(*matrices)):
        np.testing.assert_allclose(found, svd_orthogonalize(g, steps), atol=2e-5 * steps)

def test_orthogonalize_multiplies_by_the_smaller_of_the_two_gram_matrices():
    text = str(jax.make_jaxpr(lambda g: orthogonalize(g, 1, jnp.dtype("float32")))(np.zeros((23, 5), np.float32)))
    assert re.findall(r"f32\[(.*?)\] = dot_general", text) == ["5,5", "5,5", "5,23"]

def test_orthogonalize_ignores_scale():
    matrices = [np.float32(random(shape)) for shape in SHAPES]
    for scale in (1e-2, 1e3, 1e12):
        scaled = compiled_orthogonalize()(*(np.float32(scale) * g for g in matrices))
        for g, h in zip(compiled_orthogonalize()(*matrices), scaled):
            np.testing.assert_allclose(g, h, atol=1e-2 if scale < 1 else 1e-4)

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_orthogonalize_of_a_zero_gradient_is_zero(dtype):
    found = compiled_orthogonalize(5, dtype)(*(np.zeros(shape, np.float32) for shape in SHAPES))
    assert not any(np.any(x) for x in found)

def landed(values, dtype):
    """Singular values of some matrices of these singular values, orthogonalized. values: of unit norm, falling."""
    np.testing.assert_allclose(np.linalg.norm(values), 1, atol=1e-6)
    shapes = [(len(values), 61), (61, len(values)), (len(values), len(values))]
    for x in compiled_orthogonalize(5, dtype)(*(np.float32(with_singular_values(values, *shape)) for shape in shapes)):
        assert x.dtype == dtype
        yield np.linalg.svd(np.float64(x), compute_uv=False)

def of_unit_norm(values):
    """Values and a largest one that makes their norm 1."""
    return np.r_[np.sqrt(1 - np.sum(np.square(values))), values]

def test_singular_values_above_a_thousandth_of_the_norm_land_in_the_range_that_the_docstring_states():
    every = polynomials(np.geomspace(0.00102, 1, 100_000))
    assert 0.858 <= every.min() < 0.859 and 1.141 < every.max() <= 1.142 and polynomials(0.00100) < 0.85
    for values in (np.full(30, 0.00102), np.geomspace(0.3, 0.00102, 30)):
        for found in landed(of_unit_norm(values), "float32"):
            assert 0.858 <= found.min() and found.max() <= 1.142
    for values in (np.full(30, 0.002), np.geomspace(0.3, 0.002, 30), np.full(30, 0.18)):
        for found in landed(of_unit_norm(values), "bfloat16"):
            assert 0.8 <= found.min() and found.max() <= 1.15
    assert "above 0.102 % of the Frobenius norm land in [0.858, 1.142]" in " ".join(orthogonalize.__doc__.split())

def test_smaller_singular_values_grow_by_nine_hundred_and_seventy_at_most():
    gain = math.prod(a for a, _, _ in POLYNOMIALS) / 1.02
    assert gain == pytest.approx(970, abs=0.1)
    values = np.geomspace(1e-4, 1e-5, 20)
    for found in landed(of_unit_norm(values), "float32"):
        np.testing.assert_allclose(found[1:], gain * values, rtol=4e-2)


# ---- Orthogonalize, spread over devices ------------------------------------------------------------------------------

def spread(shapes, axes, num_devices, cfg=CFG):
    """orthogonalize_spread under shard_map, of matrices split along these axes, which count from the end."""
    matrices = [np.float32(random(shape)) for shape in shapes]
    mesh = make_mesh(jax.devices()[:num_devices])
    parts = [P() if axis is None else P(*[None] * (len(shape) + axis), "data") for shape, axis in zip(shapes, axes)]
    run = lambda *u: orthogonalize_spread(list(u), axes, num_devices, cfg)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=tuple(parts), out_specs=parts, check_vma=False)
    return matrices, jit(mapped), mapped

SPREAD = {  # two orientations of one shape in one batch of 5; 11 and 4 matrices on 8 devices; a square one both ways; unsplit
    (3, 16, 11): -2, (2, 11, 16): -1, (11, 24, 7): -2, (2, 2, 24, 5): -2, (3, 16, 16): -2, (1, 16, 16): -1, (3, 11, 13): None}

def test_spread_over_eight_devices_every_matrix_is_orthogonalized_as_on_one():
    matrices, run, _ = spread(list(SPREAD), list(SPREAD.values()), 8)
    for g, found in zip(matrices, run(*matrices)):
        assert found.shape == g.shape and found.dtype == jnp.float32
        np.testing.assert_allclose(found, svd_orthogonalize(g), atol=2e-5)

def test_on_one_device_nothing_is_exchanged():
    matrices, run, mapped = spread(list(SPREAD), list(SPREAD.values()), 1)
    assert "all_to_all" not in str(jax.make_jaxpr(mapped)(*matrices))
    for g, found in zip(matrices, run(*matrices)):
        np.testing.assert_allclose(found, svd_orthogonalize(g), atol=2e-5)

def test_each_device_orthogonalizes_its_share_of_the_matrices():
    shapes, axes = [(11, 24, 7), (5, 7, 24)], [-2, -1]
    matrices, _, mapped = spread(shapes, axes, 8)
    text = str(jax.make_jaxpr(mapped)(*matrices))
    assert text.count("all_to_all[") == 2  # one trade there and one back, for both arrays
    counts = re.findall(r"f32\[(\d+),\d+,\d+\] = dot_general", text)
    assert counts == 3 * CFG.ns_steps * ["2"]  # 13 + 5 = 18 matrices would be 3 each; 11 + 5 = 16 are 2


# ---- NorMuon ---------------------------------------------------------------------------------------------------------

def equalize_by_hand(x, square, over, beta2):
    """NorMuon in float64, one matrix at a time: (step, mean squares)."""
    steps, squares = [], []
    for matrix, old in zip(np.float64(x), np.float64(square)):
        new = beta2 * old + (1 - beta2) * np.mean(matrix ** 2, axis=over, keepdims=True)
        r = 1 / np.sqrt(np.maximum(new, 1e-10))
        steps.append(matrix * r * np.linalg.norm(matrix) / np.linalg.norm(matrix * r))
        squares.append(new)
    return np.array(steps), np.array(squares)

def test_units_are_evened_out_by_the_root_of_their_mean_square_and_the_norm_stays():
    run = jit(equalize_units, static_argnums=(2, 3, 4))
    for over in (-1, -2):
        x = random((3, 11, 7)) * np.geomspace(0.01, 10, 77).reshape(11, 7)  # units of very different sizes
        square = np.zeros((3, 11, 1) if over == -1 else (3, 1, 7))
        for step in range(3):
            x = x + random(x.shape, step)
            expected, wanted = equalize_by_hand(x, square, over, 0.9)
            found, square = map(np.asarray, run(np.float32(x), np.float32(square), over, None, 0.9))
            np.testing.assert_allclose(found, expected, rtol=1e-5)
            np.testing.assert_allclose(square, wanted, rtol=1e-5)
            np.testing.assert_allclose(np.linalg.norm(found, axis=(1, 2)), np.linalg.norm(x, axis=(1, 2)), rtol=1e-5)
            if step == 0:  # the units' own squares alone: all come out alike
                sizes = np.linalg.norm(found, axis=over)
                np.testing.assert_allclose(sizes, sizes[:, :1] + 0 * sizes, rtol=1e-5)

def test_a_unit_without_a_step_has_none_and_a_matrix_without_one_none_either():
    x = np.float32(random((2, 5, 4)))
    x[0, :, 2], x[1] = 0, 0
    found, square = equalize_units(x, np.zeros((2, 1, 4), np.float32), -2, None, 0.9)
    assert np.isfinite(found).all() and not found[0, :, 2].any() and found[0, :, :2].all() and not found[1].any()
    assert not square[1].any() and square[0, 0, 0] > 0

def test_a_unit_is_a_hidden_unit_of_the_mlp_or_a_dim_of_a_head_and_has_one_number():
    groups = {name_of(path): spec for path, spec in jax.tree.leaves_with_path(param_specs(CFG)) if spec.group in ("muon", "down")}
    rule = Rule("muon", 1.0, beta2=0.9)
    assert {name: {slot: shape_of(s, CFG) for slot, s in slot_specs(spec, rule).items()} for name, spec in groups.items()} == {
        "attention/w_q": {"momentum": (3, 20, 36), "square": (3, 1, 36)}, "attention/w_k": {"momentum": (3, 20, 12), "square": (3, 1, 12)},
        "attention/w_v": {"momentum": (3, 20, 12), "square": (3, 1, 12)}, "attention/w_out": {"momentum": (3, 36, 20), "square": (3, 36, 1)},
        "blocks/w_up": {"momentum": (3, 20, 20), "square": (3, 1, 20)}, "blocks/w_down": {"momentum": (3, 20, 20), "square": (3, 20, 1)}}
    spec = groups["blocks/w_up"]
    assert slot_specs(spec, Rule("muon", 1.0)) == {"momentum": spec}  # without NorMuon
    assert slot_specs(spec, Rule("adam", 1.0)) == {"m": spec, "v": spec}
    assert unit_axis(Spec("L D D", None, "muon")) == (-1, "L D 1") and unit_axis(Spec("E D", None, "muon")) == (-2, "1 D")

def update_on(num_devices, cfg, specs, rules, state, grads):
    """(params, slots) after an update with each device holding its share, as the rule says."""
    mesh = make_mesh(jax.devices()[:num_devices])
    def part(spec):
        axis = split_axis(spec, cfg, num_devices)
        return P() if axis is None else P(*[None] * (len(spec.axes.split()) + axis), "data")
    parts = jax.tree.map(part, specs)
    slots = jax.tree.map(lambda spec: jax.tree.map(part, slot_specs(spec, rules[spec.group])), specs)
    run = lambda params, grads, slots: update(params, grads, slots, jnp.int32(3), stages(cfg)[0], specs, rules, num_devices, cfg)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(parts, parts, slots), out_specs=(parts, slots), check_vma=False)
    return jax.tree.map(np.asarray, jit(mapped)(state[0], grads, state[1]))

SPLITS = {  # (axis over which a unit reaches, axis that eight devices hold split)
    "units": (dict(model_dim=24, mlp_dim=40, head_dim=16), {(-2, -1), (-1, -2)}),
    "reach": (dict(model_dim=24, mlp_dim=20, head_dim=12, num_kv_heads=3), {(-2, -2), (-1, -1)}),  # 20 and 36 do not divide
    "whole": (dict(model_dim=20, mlp_dim=20, head_dim=12), {(-2, None), (-1, None)})}

@pytest.mark.parametrize("kind", SPLITS)
def test_eight_devices_update_weights_and_state_as_one_whichever_axis_they_hold_split(kind):
    changes, wanted = SPLITS[kind]
    cfg = config(**changes)
    rules, specs = optimizer_rules(cfg), param_specs(cfg) | {"alike": Spec("L D D", None, "muon")}
    matrices = [spec for spec in jax.tree.leaves(specs) if spec.group in ("muon", "down") and spec.axes != "L D D"]
    assert {(unit_axis(spec)[0], split_axis(spec, cfg, 8)) for spec in matrices} == wanted
    draw = lambda seed: jax.tree.map_with_path(lambda path, spec: np.float32(random(shape_of(spec, cfg), seed + len(name_of(path)))), specs)
    slots = jax.tree.map(lambda spec: {name: np.float32(np.abs(random(shape_of(s, cfg)))) for name, s in
                                       slot_specs(spec, rules[spec.group]).items()}, specs)
    one, eight = (update_on(n, cfg, specs, rules, (draw(1), slots), draw(2)) for n in (1, 8))
    for (path, leaf), other in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(other, leaf, rtol=1e-4, atol=1e-5, err_msg=name_of(path))


# ---- Muon ------------------------------------------------------------------------------------------------------------

class Trained:
    """`update` run for all steps on the whole weight table, with random first weights and a new random gradient each."""
    def __init__(self, cfg, rules, steps=9, gradient=lambda step, name, shape: random(shape, 100 + step)):
        self.cfg, self.rules, self.specs = cfg, rules, param_specs(cfg)
        self.params, self.grads, self.slots = [], [], []
        run = jit(lambda params, grads, slots, step, stage_lr: update(
            params, grads, slots, step, stages(cfg)[0]._replace(lr=stage_lr), self.specs, rules, 1, cfg))
        fill = lambda make: jax.tree.map_with_path(lambda path, spec: np.float32(make(name_of(path), shape_of(spec, cfg))), self.specs)
        params = fill(lambda name, shape: random(shape, len(name)))
        slots = jax.tree.map(lambda spec: {name: np.zeros(shape_of(s, cfg), np.float32) for name, s in
                                           slot_specs(spec, rules[spec.group]).items()}, self.specs)
        self.lr = [stage_at(step, stages(cfg)).lr for step in range(steps)]
        for step in range(steps):
            grads = fill(functools.partial(gradient, step))
            self.params.append(named(params))
            self.grads.append(named(grads))
            params, slots = run(params, grads, slots, np.int32(step), np.float32(self.lr[step]))
            self.slots.append(named(slots))
        self.params.append(named(params))

    def names(self, group):
        return [name_of(path) for path, spec in jax.tree.leaves_with_path(self.specs) if spec.group == group]

def lr_scale_by_hand(step):
    """CFG's: two steps of warmup; 0.7 until round(4.5), then 0.4; from half of 8 steps on down to a tenth, where the ninth stays."""
    share = min(1, 1 - (step - 4) / 4)
    return min(1, (step + 1) / 3) * ((0.7 if step < 4 else 0.4) * share + 0.1 * (1 - share))

RULES = {"muon": Rule("muon", 0.03, 40.0, beta2=0.8), "down": Rule("muon", 0.05, 15.0),
         "embed": Rule("adam", 0.3, 2.0, 0.7, 0.9, 1e-3), "head": Rule("adam", 0.05, 70.0, 0.85, 0.97, 1e-5),
         "scalar": Rule("adam", 0.02, 0.0, 0.5, 0.8, 1e-1),
         "stream": Rule("adam", 0.03, 0.0, 0.65, 0.85, 1e-2), "mix": Rule("adam", 0.04, 0.6, 0.5, 0.8, 1e-1, plain=True),
         "gate": Rule("adam", 0.02, 9.0, 0.6, 0.9, 1e-2), "skip": Rule("adam", 0.07, 0.0, 0.5, 0.9, 1e-2),
         "smear": Rule("adam", 0.06, 0.0, 0.5, 0.9, 1e-2)}

@pytest.fixture(scope="module")
def trained():
    return Trained(CFG, RULES)

OVER = {"w_q": -2, "w_k": -2, "w_v": -2, "w_out": -1, "w_up": -2, "w_down": -1}

def assert_moved(found, w, step, lr_eff, decay, words):
    """found is w less lr_eff of the step and, where that shrinks it, less decay of w; what is nearly zero may have either sign."""
    expected = w - lr_eff * step - np.where(step * w >= 0, decay * w, 0)
    doubt = np.where(np.abs(step) < 1e-5, np.abs(decay * w), 0)
    assert np.all(np.abs(found - expected) <= 3e-6 + doubt), (words, np.abs(found - expected).max())

@pytest.mark.parametrize("group, lr, wd, beta2", [("muon", 0.03, 40.0, 0.8), ("down", 0.05, 15.0, 0.0)])
def test_muon_is_its_definition_in_float64_for_tall_wide_and_square_matrices(trained, group, lr, wd, beta2):
    shapes = {trained.params[0][name].shape[1:] for name in trained.names(group)}
    assert shapes == ({(20, 36), (36, 20), (20, 12), (20, 20)} if group == "muon" else {(20, 20)})
    for name in trained.names(group):
        average, square, kept = 0, np.zeros(3), 0
        for step, grads in enumerate(trained.grads):
            momentum = 0.8 + 0.15 * min(step / 3, 1) - 0.15 * max(0, (step - 7) / 2)
            average = momentum * average + (1 - momentum) * grads[name]
            direction = svd_orthogonalize(momentum * average + (1 - momentum) * grads[name])
            np.testing.assert_allclose(trained.slots[step][f"{name}/momentum"], average, atol=1e-6)
            if beta2:
                direction, square = equalize_by_hand(direction, square, OVER[name.split("/")[1]], beta2)
                np.testing.assert_allclose(trained.slots[step][f"{name}/square"], square, rtol=1e-4)
            factor = math.sqrt(max(direction.shape[1:]) / min(direction.shape[1:]))  # lr_eff = lr * factor, decay = wd * lr * lr_eff
            now = lr * lr_scale_by_hand(step)
            assert_moved(trained.params[step + 1][name], trained.params[step][name], direction, now * factor, wd * now * now * factor,
                         f"{name}, step {step}")
            kept += np.mean(direction * trained.params[step][name] < 0)
        assert 2 < kept < 7  # of nine steps, about half of the weights do not decay

def test_the_mlps_rates_and_decays_are_those_of_the_recipe():
    """lr_eff = 0.023 s mult, decay = 1.2 * 0.023 s * lr_eff; mult is 2 for w_up, 4 for w_down and 1 for what is square."""
    cfg = config(model_dim=8, mlp_dim=32, num_heads=2, num_kv_heads=2, head_dim=4, muon_lr=0.023, muon_wd=1.2, steps=100, warmup_steps=0)
    run, s = Trained(cfg, optimizer_rules(cfg), steps=1), 0.7
    for name, mult in [("blocks/w_up", 2), ("blocks/w_down", 4), ("attention/w_q", 1), ("attention/w_out", 1)]:
        direction, _ = equalize_by_hand(svd_orthogonalize(run.grads[0][name]), np.zeros(3), OVER[name.split("/")[1]], 0.8)
        lr_eff = 0.023 * s * mult
        assert_moved(run.params[1][name], run.params[0][name], direction, lr_eff, 1.2 * 0.023 * s * lr_eff, name)
        shrunk = direction * run.params[0][name] > 1e-4
        rate = ((run.params[0][name] - run.params[1][name] - lr_eff * direction) / run.params[0][name])[shrunk]
        assert np.median(rate) == pytest.approx(1.2 * (0.023 * s) ** 2 * mult, rel=0.02)

def test_each_of_q_k_and_v_of_each_layer_is_orthogonalized_by_itself():
    """Gradients of very different sizes: orthogonalized together, the small ones would vanish."""
    size = {"attention/w_q": 1e-3, "attention/w_k": 1.0, "attention/w_v": 1e3}
    cfg = config(num_kv_heads=0, steps=100, warmup_steps=0)  # then all three have one shape
    run = Trained(cfg, RULES | {"muon": Rule("muon", 1.0)}, steps=1,
                  gradient=lambda step, name, shape: random(shape) * size.get(name, 1))
    for name in size:
        moved = (run.params[0][name] - run.params[1][name]) / run.lr[0]
        singular = np.linalg.svd(moved, compute_uv=False) / math.sqrt(36 / 20)
        assert singular.shape == (3, 20) and 0.8 < singular.min() and singular.max() < 1.15

def test_muons_averaged_gradient_points_where_optaxs_does():
    shapes = {"wide": (20, 36), "tall": (36, 20), "square": (20, 20)}
    coefficients = np.array(POLYNOMIALS)
    coefficients[0] /= 1.02 ** np.array([1, 3, 5])  # they start from the norm itself
    muon = optax.contrib.muon(learning_rate=1.0, beta=0.9, nesterov=False, ns_coeffs=coefficients)
    zeros = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    slots, state = {name: {"momentum": zero} for name, zero in zeros.items()}, muon.init(zeros)
    theirs = jit(lambda grads, state: muon.update(grads, state, zeros))
    ours = jit(lambda grads, slots: (lambda slots: (slots, {
        name: orthogonalize(s["momentum"], 5, jnp.float32) * max(1, s["momentum"].shape[1] / s["momentum"].shape[0]) ** 0.5
        for name, s in slots.items()}))({name: muon_direction(grads[name], slots[name], 0.9)[1] for name in slots}))
    for step in range(4):
        grads = {name: np.float32(random(shape, step)) for name, shape in shapes.items()}
        expected, state = theirs(grads, state)
        slots, found = ours(grads, slots)
        for name in shapes:
            np.testing.assert_allclose(-found[name], expected[name], atol=1e-4)


# ---- Adam ------------------------------------------------------------------------------------------------------------

def adam_by_hand(trained, name, rule):
    """(direction, m, v) of one name at each step, in float64."""
    m, v = 0, 0
    for count, grads in enumerate(trained.grads, 1):
        m, v = rule.beta1 * m + (1 - rule.beta1) * grads[name], rule.beta2 * v + (1 - rule.beta2) * grads[name] ** 2
        yield m / (1 - rule.beta1 ** count) / (np.sqrt(v / (1 - rule.beta2 ** count)) + rule.eps), m, v

@pytest.mark.parametrize("group", ["embed", "head", "scalar", "stream", "mix", "gate", "skip", "smear"])
def test_every_group_follows_its_own_rates_betas_eps_and_decay(trained, group):
    rule = RULES[group]
    assert trained.names(group)
    for name in trained.names(group):
        for step, (direction, m, v) in enumerate(adam_by_hand(trained, name, rule)):
            lr, before, after, slots = rule.lr * lr_scale_by_hand(step), trained.params[step][name], trained.params[step + 1][name], trained.slots[step]
            if rule.plain:
                np.testing.assert_allclose(after, before - lr * (direction + rule.wd * before), atol=5e-6, err_msg=f"{name}, step {step}")
            else:
                assert_moved(after, before, direction, lr, lr * lr * rule.wd, f"{name}, step {step}")
            assert {slot for slot in slots if slot.startswith(f"{name}/")} == {f"{name}/m", f"{name}/v"}
            np.testing.assert_allclose(slots[f"{name}/m"], m, atol=1e-6)
            np.testing.assert_allclose(slots[f"{name}/v"], v, rtol=1e-5, atol=1e-7)

def test_decay_that_is_not_cautious_shrinks_every_weight(trained):
    """And the other only those that the step shrinks as well."""
    for group, share in (("mix", 1.0), ("head", 0.5)):
        name, rule = trained.names(group)[0], RULES[group]
        direction, *_ = next(adam_by_hand(trained, name, rule))
        lr, w = rule.lr * lr_scale_by_hand(0), trained.params[0][name]
        shrunk = np.abs(trained.params[1][name] - (w - lr * direction)) > 1e-3 * lr * np.abs(w) * min(1, rule.wd)
        assert np.mean(shrunk) == pytest.approx(share, abs=0.05)

def test_the_flags_reach_the_rules():
    table, small = dict(wd=0.3, beta1=0.7, beta2=0.9, eps=1e-3), dict(beta1=0.9, beta2=0.99, eps=1e-3)
    mixed = dict(beta1=0.9, beta2=0.95, eps=1e-3)
    assert optimizer_rules(CFG) == {
        "muon": Rule("muon", 0.03, 0.4, beta2=0.8), "down": Rule("muon", 0.06, 0.2, beta2=0.8), "embed": Rule("adam", 0.3, **table),
        "head": Rule("adam", 0.05, **table), "scalar": Rule("adam", 0.02, **small), "stream": Rule("adam", 0.02, **mixed), "mix": Rule("adam", 0.004, **mixed),
        "gate": Rule("adam", 0.01, wd=0.002, **small), "skip": Rule("adam", 0.0005, **small), "smear": Rule("adam", 0.0001, **small)}
    groups = {spec.group for spec in jax.tree.leaves(param_specs(CFG))}
    assert groups == set(optimizer_rules(CFG))
    everything, rules = Rule("adam", 0.01, 0.3, 0.7, 0.9, 1e-3, plain=True), optimizer_rules(config(optimizer="adamw"))
    assert {group: rules[group] for group in groups} == {
        group: everything if group in ("muon", "down", "embed", "head") else everything._replace(wd=0.0) for group in groups}

def test_the_speedruns_rates_are_the_recipes():
    rates = {"muon": 0.023, "down": 0.046, "embed": 0.008, "head": 0.008, "scalar": 5 * 0.008, "stream": 5 * 0.008, "mix": 0.008, "gate": 0.008,
             "skip": 0.05 * 0.008, "smear": 0.01 * 0.008}
    rules = optimizer_rules(Config())
    assert {group: rule.lr for group, rule in rules.items()} == pytest.approx(rates)
    assert {group: rule.wd for group, rule in rules.items() if rule.wd} == pytest.approx(
        {"muon": 1.2, "down": 0.6, "embed": 150 * 0.005, "head": 150 * 0.005, "gate": 0.005})
    assert all(rule.eps == 1e-10 for rule in rules.values() if rule.kind == "adam")
    assert (rules["muon"].beta2, rules["down"].beta2) == (0.9, 0.9)
    assert {(rules[group].beta1, rules[group].beta2) for group in ("embed", "head")} == {(0.5, 0.95)}
    assert {(rules[group].beta1, rules[group].beta2) for group in ("stream", "mix")} == {(0.9, 0.95)}
    assert {(rules[group].beta1, rules[group].beta2) for group in ("scalar", "gate", "skip", "smear")} == {(0.9, 0.99)}

def test_adams_direction_is_that_of_optax():
    rule = Rule("adam", lr=1.0, beta1=0.8, beta2=0.95, eps=1e-10)
    adam, zeros = optax.scale_by_adam(b1=0.8, b2=0.95, eps=1e-10), jnp.zeros((5, 7))
    state, slots = adam.init(zeros), {"m": zeros, "v": zeros}
    both = jit(lambda g, state, slots, step: (adam.update(g, state), adam_direction(g, slots, step, rule)))
    for step in range(6):
        g = np.float32(random((5, 7), step)) * np.float32(10.0 ** (step - 3))
        (expected, state), (found, slots) = both(g, state, slots, np.int32(step))
        np.testing.assert_allclose(found, expected, rtol=2e-5)

def test_adamw_for_everything_is_optaxs_adamw():
    cfg = config(optimizer="adamw")
    run = Trained(cfg, optimizer_rules(cfg), steps=6)
    schedule = jnp.array([0.01 * lr_scale_by_hand(step) for step in range(6)])
    decays = {name: any(name in run.names(group) for group in ("muon", "down", "embed", "head")) for name in run.params[0]}
    adamw = optax.adamw(lambda count: schedule[count], b1=0.7, b2=0.9, eps=1e-3, weight_decay=0.3, mask=decays)
    params = jax.tree.map(np.float32, run.params[0])
    state, step_of_optax = adamw.init(params), jit(lambda params, grads, state: (
        lambda updates, state: (optax.apply_updates(params, updates), state))(*adamw.update(grads, state, params)))
    for grads, expected_slots, expected in zip(run.grads, run.slots, run.params[1:]):
        params, state = step_of_optax(params, jax.tree.map(np.float32, grads), state)
        for name in params:
            np.testing.assert_allclose(expected[name], params[name], atol=2e-6, err_msg=name)
        assert set(expected_slots) == {f"{name}/{slot}" for name in params for slot in "mv"}
