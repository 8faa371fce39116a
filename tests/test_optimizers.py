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
    Config, Rule, SLOTS, UsageError, adam_direction, layer_windows, lr_scale, make_mesh, muon_direction, muon_momentum,
    name_of, optimizer_rules, orthogonalize, orthogonalize_spread, param_specs, ramp, shape_of, stage_at, stages,
    tokens_before, update)

# D < HK, D > GK is tall, D == F is square: every orientation Muon meets
CFG = Config(
    steps=8, num_layers=3, model_dim=20, num_heads=3, num_kv_heads=1, head_dim=12, mlp_dim=20, vocab_size=131, bos_id=7, mlp_only="",
    skips="0>2", compute_dtype="float32", stage_ends="0.5,1", batch_tokens="44", seq_len="22", max_doc_len="0", window_short="0",
    window_long="0", long_layers="", stage_lr="0.7,0.4", muon_lr=0.03, muon_wd=0.4, muon_momentum="0.8,0.95,3", embed_lr=0.3,
    head_lr=0.05, scalar_lr=0.02, adamw_lr=0.01, adam_beta1=0.7, adam_beta2=0.9, adam_eps=1e-3, adam_wd=0.3, warmup_steps=2,
    cooldown_frac=0.5, final_lr_scale=0.1)
config = functools.partial(dataclasses.replace, CFG)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time


def random(shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)

def named(tree):
    """{"attention/w_q": leaf in float64, ...}"""
    return {name_of(path): np.float64(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}

def quintic(s, steps=5):
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    return s

def svd_orthogonalize(g, steps=5):
    """The iteration on the singular values alone, in float64."""
    u, s, vt = np.linalg.svd(np.float64(g), full_matrices=False)
    size = np.linalg.norm(s, axis=-1, keepdims=True)
    return (u * quintic(s / np.where(size, size, 1), steps)[..., None, :]) @ vt

def with_singular_values(values, rows, columns, seed=0):
    (u, _, _), (_, _, vt) = (np.linalg.svd(random((n, m), seed), full_matrices=False) for n, m in
                             ((rows, len(values)), (len(values), columns)))
    return (u * np.asarray(values)) @ vt


# ---- Schedules -------------------------------------------------------------------------------------------------------

def test_the_learning_rate_warms_up_stays_and_falls_to_its_last_share():
    cfg = config(steps=100, warmup_steps=4, cooldown_frac=0.25, final_lr_scale=0.2)
    found = np.array([lr_scale(step, cfg) for step in (0, 1, 3, 4, 50, 75, 80, 99, 100)])
    np.testing.assert_allclose(found, [0.2, 0.4, 0.8, 1, 1, 1, 0.84, 0.232, 0.2], rtol=1e-6)

def test_without_warmup_and_cooldown_the_learning_rate_is_constant():
    cfg = config(warmup_steps=0, cooldown_frac=0.0)
    assert [float(lr_scale(step, cfg)) for step in range(cfg.steps)] == [1.0] * cfg.steps

def test_a_cooldown_over_the_whole_run_falls_from_its_first_step():
    cfg = config(steps=10, warmup_steps=0, cooldown_frac=1.0, final_lr_scale=0.0)
    np.testing.assert_allclose([lr_scale(step, cfg) for step in (0, 4, 10)], [1.0, 0.6, 0.0], atol=1e-6)

def test_schedules_are_the_same_traced_as_on_the_host():
    steps = range(CFG.steps + 1)
    for schedule in (lr_scale, muon_momentum):
        traced = jit(lambda step: schedule(step, CFG))
        np.testing.assert_allclose([traced(np.int32(step)) for step in steps], [schedule(step, CFG) for step in steps], rtol=1e-5)

def test_muons_momentum_rises_linearly_and_stays():
    cfg = config(muon_momentum="0.85,0.95,20")
    np.testing.assert_allclose([muon_momentum(step, cfg) for step in (0, 5, 20, 21, 900)], [0.85, 0.875, 0.95, 0.95, 0.95], rtol=1e-6)
    assert float(muon_momentum(3, config(muon_momentum="0.9,0.9,0"))) == pytest.approx(0.9)

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

@pytest.mark.parametrize("steps", [1, 5])
def test_orthogonalize_maps_singular_values_by_the_quintic_and_keeps_singular_vectors(steps):
    matrices = [np.float32(random(shape)) for shape in SHAPES]
    for g, found in zip(matrices, compiled_orthogonalize(steps)(*matrices)):
        np.testing.assert_allclose(found, svd_orthogonalize(g, steps), atol=2e-5)

def test_orthogonalize_multiplies_by_the_smaller_of_the_two_gram_matrices():
    text = str(jax.make_jaxpr(lambda g: orthogonalize(g, 1, jnp.dtype("float32")))(np.zeros((23, 5), np.float32)))
    assert re.findall(r"f32\[(.*?)\] = dot_general", text) == ["5,5", "5,5", "5,23"]

def test_orthogonalize_ignores_scale():
    matrices = [np.float32(random(shape)) for shape in SHAPES]
    for scale in (1e-4, 1e3, 1e12):
        scaled = compiled_orthogonalize()(*(np.float32(scale) * g for g in matrices))
        for g, h in zip(compiled_orthogonalize()(*matrices), scaled):
            np.testing.assert_allclose(g, h, atol=2e-3 if scale < 1 else 1e-4)

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_orthogonalize_of_a_zero_gradient_is_zero(dtype):
    found = compiled_orthogonalize(5, dtype)(*(np.zeros(shape, np.float32) for shape in SHAPES))
    assert not any(np.any(x) for x in found)

def test_in_bfloat16_singular_values_above_a_third_of_a_percent_of_the_norm_land_in_the_band():
    steep, flat = np.geomspace(0.0033, 0.53, 32), np.geomspace(0.17, 0.18, 32)
    np.testing.assert_allclose([np.linalg.norm(steep), np.linalg.norm(flat)], 1, atol=0.02)
    shapes = [(32, 61), (61, 32), (32, 32)]
    matrices = [np.float32(with_singular_values(values, *shape)) for values in (steep, flat) for shape in shapes]
    for x in compiled_orthogonalize(5, "bfloat16")(*matrices):
        assert x.dtype == jnp.bfloat16
        singular = np.linalg.svd(np.float64(x), compute_uv=False)
        assert 0.65 <= singular.min() and singular.max() <= 1.2

def test_smaller_singular_values_only_grow():
    values = np.geomspace(1e-5, 1, 20) / np.linalg.norm(np.geomspace(1e-5, 1, 20))
    found, = compiled_orthogonalize()(np.float32(with_singular_values(values, 20, 29)))
    assert np.all(np.sort(np.linalg.svd(np.float64(found), compute_uv=False)) > np.sort(np.minimum(values, 0.6)))


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


# ---- Muon ------------------------------------------------------------------------------------------------------------

class Trained:
    """`update` run for some steps on the whole weight table, with random first weights and a new random gradient each."""
    def __init__(self, cfg, rules, steps=6, gradient=lambda step, name, shape: random(shape, 100 + step)):
        self.cfg, self.rules, self.specs = cfg, rules, param_specs(cfg)
        self.params, self.grads, self.slots = [], [], []
        run = jit(lambda params, grads, slots, step, stage_lr: update(
            params, grads, slots, step, stages(cfg)[0]._replace(lr=stage_lr), self.specs, rules, 1, cfg))
        fill = lambda make: jax.tree.map_with_path(lambda path, spec: np.float32(make(name_of(path), shape_of(spec, cfg))), self.specs)
        params = fill(lambda name, shape: random(shape, len(name)))
        slots = jax.tree.map(lambda spec, p: dict.fromkeys(SLOTS[rules[spec.group].kind], 0 * p), self.specs, params)
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
    """CFG's: two steps of warmup, constant until half of 8 steps, then down to a tenth."""
    return min(1, (step + 1) / 3) * (1 if step <= 4 else 1 - 0.9 * (step - 4) / 4)

RULES = {"muon": Rule("muon", 0.03, 0.4), "embed": Rule("adam", 0.3, 0.1, 0.7, 0.9, 1e-3),
         "head": Rule("adam", 0.05, 0.7, 0.85, 0.97, 1e-5), "scalar": Rule("adam", 0.02, 0.0, 0.5, 0.8, 1e-1)}

@pytest.fixture(scope="module")
def trained():
    return Trained(CFG, RULES)

def test_muon_is_its_definition_in_float64_for_tall_wide_and_square_matrices(trained):
    assert {(20, 36), (36, 20), (20, 12), (20, 20)} == {trained.params[0][name].shape[1:] for name in trained.names("muon")}
    for name in trained.names("muon"):
        w, average = trained.params[0][name], 0
        inputs, outputs = w.shape[1:]
        for step, grads in enumerate(trained.grads[:-1]):
            momentum = 0.8 + 0.15 * min(step / 3, 1)
            average = momentum * average + (1 - momentum) * grads[name]
            nesterov = momentum * average + (1 - momentum) * grads[name]
            direction = svd_orthogonalize(nesterov) * math.sqrt(max(1, outputs / inputs))
            lr = 0.03 * trained.lr[step] * lr_scale_by_hand(step)
            w = w - lr * 0.4 * w - lr * direction
            np.testing.assert_allclose(trained.slots[step][f"{name}/momentum"], average, atol=1e-6)
            np.testing.assert_allclose(trained.params[step + 1][name], w, atol=2e-6, err_msg=f"{name}, step {step}")

def test_each_of_q_k_and_v_of_each_layer_is_orthogonalized_by_itself():
    """Gradients of very different sizes: orthogonalized together, the small ones would vanish."""
    size = {"attention/w_q": 1e-3, "attention/w_k": 1.0, "attention/w_v": 1e3}
    cfg = config(num_kv_heads=0, steps=100, warmup_steps=0)  # then all three have one shape
    run = Trained(cfg, RULES | {"muon": Rule("muon", 1.0)}, steps=1, gradient=lambda step, name, shape: random(shape) * size.get(name, 1))
    for name in size:
        moved = (run.params[0][name] - run.params[1][name]) / run.lr[0]
        singular = np.linalg.svd(moved, compute_uv=False) / math.sqrt(36 / 20)
        assert singular.shape == (3, 20) and 0.65 < singular.min() and singular.max() < 1.2

def test_muons_averaged_gradient_points_where_optaxs_does():
    shapes = {"wide": (20, 36), "tall": (36, 20), "square": (20, 20)}
    muon = optax.contrib.muon(learning_rate=1.0, beta=0.9, nesterov=False)
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

def adamw_by_hand(trained, name, lr, wd, beta1, beta2, eps):
    """Weights of one name after each step, in float64."""
    w, m, v = trained.params[0][name], 0, 0
    for step, grads in enumerate(trained.grads):
        m, v = beta1 * m + (1 - beta1) * grads[name], beta2 * v + (1 - beta2) * grads[name] ** 2
        direction = m / (1 - beta1 ** (step + 1)) / (np.sqrt(v / (1 - beta2 ** (step + 1))) + eps)
        w = w - lr * trained.lr[step] * lr_scale_by_hand(step) * (direction + wd * w)
        yield w

@pytest.mark.parametrize("group, lr, wd, beta1, beta2, eps", [
    ("embed", 0.3, 0.1, 0.7, 0.9, 1e-3), ("head", 0.05, 0.7, 0.85, 0.97, 1e-5), ("scalar", 0.02, 0.0, 0.5, 0.8, 1e-1)])
def test_every_group_follows_its_own_rates_betas_eps_and_decay(trained, group, lr, wd, beta1, beta2, eps):
    assert trained.names(group)
    for name in trained.names(group):
        for step, w in enumerate(adamw_by_hand(trained, name, lr, wd, beta1, beta2, eps)):
            np.testing.assert_allclose(trained.params[step + 1][name], w, atol=5e-6, err_msg=f"{name}, step {step}")

def test_the_flags_reach_the_rules():
    adam = dict(beta1=0.7, beta2=0.9, eps=1e-3)
    assert optimizer_rules(CFG) == {
        "muon": Rule("muon", 0.03, 0.4), "embed": Rule("adam", 0.3, 0.3, **adam), "head": Rule("adam", 0.05, 0.3, **adam),
        "scalar": Rule("adam", 0.02, 0.0, **adam)}
    everything = Rule("adam", 0.01, 0.3, **adam)
    assert optimizer_rules(config(optimizer="adamw")) == {
        "muon": everything, "embed": everything, "head": everything, "scalar": Rule("adam", 0.01, 0.0, **adam)}

def test_adams_direction_is_that_of_optax():
    rule = Rule("adam", lr=1.0, beta1=0.8, beta2=0.95, eps=1e-10)
    adam, zeros = optax.scale_by_adam(b1=0.8, b2=0.95, eps=1e-10), jnp.zeros((5, 7))
    state, slots = adam.init(zeros), {"m": zeros, "v": zeros}
    both = jit(lambda g, state, slots, step: (adam.update(g, state), adam_direction(g, slots, step, rule)))
    for step in range(6):
        g = np.float32(random((5, 7), step)) * np.float32(10.0 ** (step - 3))
        (expected, state), (found, slots) = both(g, state, slots, np.float32(step))
        np.testing.assert_allclose(found, expected, rtol=2e-5)

def test_adamw_for_everything_is_optaxs_adamw():
    cfg = config(optimizer="adamw")
    run = Trained(cfg, optimizer_rules(cfg), steps=6)
    schedule = jnp.array([0.01 * lr * lr_scale_by_hand(step) for step, lr in enumerate(run.lr)])
    decays = {name: name not in run.names("scalar") for name in run.params[0]}
    adamw = optax.adamw(lambda count: schedule[count], b1=0.7, b2=0.9, eps=1e-3, weight_decay=0.3, mask=decays)
    params = jax.tree.map(np.float32, run.params[0])
    state, step_of_optax = adamw.init(params), jit(lambda params, grads, state: (
        lambda updates, state: (optax.apply_updates(params, updates), state))(*adamw.update(grads, state, params)))
    for grads, expected_slots, expected in zip(run.grads, run.slots, run.params[1:]):
        params, state = step_of_optax(params, jax.tree.map(np.float32, grads), state)
        for name in params:
            np.testing.assert_allclose(expected[name], params[name], atol=2e-6, err_msg=name)
        assert set(expected_slots) == {f"{name}/{slot}" for name in params for slot in "mv"}
