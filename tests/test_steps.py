"""Training and evaluation steps on one and on eight simulated devices."""
import dataclasses
import functools
import itertools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import numpy_gpt
from jaxprs import equations
from train import (
    Config, Model, NO_TOKEN, Rule, Shards, Spec, batch_shape, capped, compile_all, flops_per_token, gather, inputs_and_targets, list_programs,
    log_partition, lookup, make_eval_step, make_init, make_mesh, make_train_step, matmul, name_of, normal, param_specs, plan_val, shape_of,
    split_axis, stages, state_shardings, sum_rows, to_devices, val_stage)

BOS, LENGTH = 7, 16
# On eight devices heads and vocabulary are held split, the mlp (20 x 37) is not: both ways of reducing a gradient.
# adam_eps: else Adam makes a whole step of the noise in a gradient that is almost zero
CFG = Config(
    steps=200, num_layers=2, model_dim=20, num_heads=6, num_kv_heads=2, head_dim=8, mlp_dim=37, vocab_size=131, bos_id=BOS, mlp_only="",
    tied_stages=0, skips="0>1", late_inputs="0>1", backout="0", offset_layers="1", gate_dims=5, softcap="9,10,2", rope_base=50.0,
    attn_scale=0.25, attn_block=8, compute_dtype="float32", stage_ends="1", batch_tokens="384", seq_len="16", micro_tokens=16,
    max_doc_len="16", window_short="5", window_long="11", long_layers="1", stage_lr="1", mtp="0.5,0.25", muon_momentum="0.85,0.95,300,50",
    embed_lr=0.1, head_lr=0.02, adam_wd=0.05, adam_eps=1e-3, val_tokens=200, val_seq_len=16, val_context=5, val_window_short=4, val_window_long=9)
config = functools.partial(dataclasses.replace, CFG)
FAST = {"xla_backend_optimization_level": 0}  # compiles in half the time


def name_leaves(tree):
    return {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}

def random_rows(count, seed=0, length=LENGTH + 1):
    """Rows for to_devices: tokens that mostly follow from the one before, a BOS now and then."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CFG.vocab_size, (count, length))
    for t in range(1, length):
        tokens[:, t] = np.where(rng.random(count) < 0.7, (tokens[:, t - 1] * 5 + 3) % CFG.vocab_size, tokens[:, t])
    tokens[rng.random(tokens.shape) < 0.1] = BOS
    return [[row] for row in tokens.astype(np.uint16)]

@functools.cache
def build(cfg, num_devices, index=0):
    """The compiled training step of a stage, and what goes with it."""
    mesh, stage = make_mesh(jax.devices()[:num_devices]), stages(cfg)[index]
    init = make_init(Model(), mesh, cfg).lower().compile(compiler_options=FAST)
    batch = lambda rows: to_devices(rows, stage, mesh, cfg)
    step = make_train_step(stage, Model(), mesh, cfg).lower(init(), batch([])).compile(compiler_options=FAST)
    weights = numpy_gpt.random_weights(cfg, jax.tree.map(lambda spec: shape_of(spec, cfg), param_specs(cfg)))
    def random_state(**changes):
        """Step 0 with weights of which none is zero."""
        return init()._replace(params=jax.device_put(weights | changes, state_shardings(Model(), mesh, cfg).params))
    return SimpleNamespace(cfg=cfg, mesh=mesh, init=init, step=step, batch=batch, random_state=random_state, weights=weights)

EIGHT = lambda: build(CFG, 8)                       # three micro-steps of eight rows
ONE = lambda: build(config(micro_tokens=6 * 16), 1)   # four of six

def few_steps(built, rows, count=2, **changes):
    """(last loss, {name: optimizer state}, {name: weight}) of some steps from random weights, each on the same rows."""
    state = built.random_state(**changes)
    for _ in range(count):
        state, loss = built.step(state, built.batch(rows))
    assert int(state.step) == count
    return float(loss), jax.tree.map(np.asarray, name_leaves(state.opt_state)), jax.tree.map(np.asarray, name_leaves(state.params))

def assert_same_update(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, slot in expected[1].items():
        np.testing.assert_allclose(found[1][name], slot, rtol=1e-3, atol=2e-4 * np.abs(slot).max() + 1e-9, err_msg=name)
    for name, weight in expected[2].items():
        np.testing.assert_allclose(found[2][name], weight, atol=1e-4, err_msg=name)

def oracle_logits(weights, tokens, windows, cfg):
    return numpy_gpt.logits(weights, tokens, windows, (), cfg, packed=True)

def oracle_nats(weights, rows, windows, cfg, shares=(0.5, 0.25)):
    """Float64 nats of each row's targets, in a mean with those of the second and third next token, as far as there are any."""
    for tokens in (np.concatenate(row).astype(int)[None] for row in rows if sum(map(len, row)) > 1):
        logits, total = oracle_logits(weights, tokens[:, :-1], windows, cfg), 0
        for k, share in enumerate([1, *shares]):
            nats = numpy_gpt.nats(logits[:, :max(0, tokens.shape[1] - 1 - k)], tokens[:, 1 + k:])[0]
            total = total + share / (1 + sum(shares)) * np.pad(nats, (0, tokens.shape[1] - 1 - len(nats)))
        yield total


# ---- One update, however it is split ---------------------------------------------------------------------------------

def test_the_training_loss_is_the_float64_mean_over_the_targets_that_are_there_and_those_after_them():
    one, rows = ONE(), random_rows(24)
    rows[3], rows[10] = [rows[3][0][:9]], [rows[10][0][:1]]  # one row half empty, one without a target
    rows = rows[:22]                                         # and two that are not there
    nats = np.concatenate(list(oracle_nats(one.weights, rows, (5, 11), CFG)))
    assert len(nats) == 20 * LENGTH + 8
    assert few_steps(one, rows, 1)[0] == pytest.approx(nats.mean(), rel=1e-5)

def test_the_second_next_token_leaves_the_loss_as_the_schedule_says():
    """The step counts, and the loss stays a mean over the same targets."""
    one, rows = ONE(), random_rows(4)
    for step, share in ((100, 0.125), (200, 0.0)):
        state, loss = one.step(one.random_state()._replace(step=jnp.int32(step)), one.batch(rows))
        nats = np.concatenate(list(oracle_nats(one.weights, rows, (5, 11), CFG, (0.5, share))))
        assert float(loss) == pytest.approx(nats.mean(), rel=1e-5)

def test_the_first_gradients_are_the_slopes_of_the_float64_mean_loss():
    one, rows = ONE(), random_rows(5)
    _, slots, _ = few_steps(one, rows, 1)
    for name, scale in [("head/m", 1 - 0.5), ("embed/m", 1 - 0.5), ("attention/w_v/momentum", 1 - 0.85), ("attention/gate/m", 1 - 0.9),
                        ("attention/x0_mix/m", 1 - 0.9), ("blocks/w_down/momentum", 1 - 0.85), ("smear_mix/m", 1 - 0.9), ("skip_gate/m", 1 - 0.9),
                        ("blocks/x_mix/m", 1 - 0.9)]:
        *path, _ = name.split("/")
        direction = np.random.default_rng(0).standard_normal(slots[name].shape)
        def loss_at(distance):
            weights = jax.tree.map_with_path(lambda p, w: w + distance * direction if name_of(p) == "/".join(path) else w, one.weights)
            return np.concatenate(list(oracle_nats(weights, rows, (5, 11), CFG))).mean()
        slope, grad = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5, slots[name] / scale
        np.testing.assert_allclose(np.vdot(grad, direction), slope, atol=1e-3 * np.linalg.norm(grad), err_msg=name)

@pytest.mark.parametrize("micro_steps", [2, 4])
def test_accumulated_micro_steps_make_the_same_update_as_the_whole_batch(micro_steps):
    rows, whole = random_rows(24), build(config(micro_tokens=0), 1)
    parts = build(config(micro_tokens=24 // micro_steps * 16), 1)
    assert [batch_shape(stages(built.cfg)[0], 1, built.cfg) for built in (whole, parts)] == [
        (1, 24, LENGTH + 1), (micro_steps, 24 // micro_steps, LENGTH + 1)]
    assert_same_update(few_steps(parts, rows), few_steps(whole, rows))

def test_eight_devices_make_the_same_update_as_one():
    rows = random_rows(24)
    assert_same_update(few_steps(EIGHT(), rows), few_steps(ONE(), rows))

def test_rows_that_do_not_divide_over_the_devices_make_the_same_update_as_on_one():
    cfg, rows = config(batch_tokens=str(11 * 16)), random_rows(11)
    eight = build(cfg, 8)
    assert batch_shape(stages(cfg)[0], 8, cfg) == (2, 8, LENGTH + 1)  # five places of sixteen stay empty
    assert_same_update(few_steps(eight, rows), few_steps(ONE(), rows))  # there thirteen of twenty-four do

def test_empty_rows_add_nothing():
    one, rows, nothing = ONE(), random_rows(12), [np.full(LENGTH + 1, NO_TOKEN, np.uint16)]
    spread = [row for pair in zip(rows, itertools.repeat(nothing)) for row in pair]
    assert_same_update(few_steps(one, spread), few_steps(one, rows * 2))  # the mean of twelve rows is that of each taken twice

def test_over_fifty_steps_one_device_and_eight_lose_the_same():
    losses = []
    for built in (ONE(), EIGHT()):
        state, series = built.init(), []
        for step in range(50):
            state, loss = built.step(state, built.batch(random_rows(24, seed=step)))
            series.append(float(loss))
        losses.append(np.array(series))
    there = 1 - (0.5 * 1 + 0.25 * 2) / 1.75 / LENGTH  # the last of a row have no second or third next token
    assert losses[0][0] == pytest.approx(math.log(CFG.vocab_size) * there, rel=1e-3) and losses[0][-1] < losses[0][0] - 0.5
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)


# ---- Embedding and head, first one table, then two ---------------------------------------------------------------------

TIED = config(stage_ends="0.5,1", tied_stages=1)

def of(table, slots):
    return {name.rpartition("/")[2]: slot for name, slot in slots.items() if name.startswith(f"{table}/")}

def test_while_they_are_tied_the_embedding_is_the_head_and_its_gradient_that_of_both_uses():
    rows, tied = random_rows(24), build(TIED, 8)
    head, other = tied.weights["head"], tied.weights["embed"]
    apart = few_steps(EIGHT(), rows, 1, embed=head)  # as two tables that are alike
    for embed in (head, other):  # what stands in the embedding does not count
        loss, slots, _ = few_steps(tied, rows, 1, embed=embed)
        assert loss == pytest.approx(apart[0], rel=1e-6)
        both = apart[1]["head/m"] + apart[1]["embed/m"]  # each half of its gradient
        np.testing.assert_allclose(slots["head/m"], both, atol=1e-6 * np.abs(both).max())
        assert min(np.abs(apart[1][f"{name}/m"]).max() for name in ("head", "embed")) > 0.05 * np.abs(both).max()
        for name in set(slots) - {f"{table}/{slot}" for table in ("head", "embed") for slot in "mv"}:
            np.testing.assert_allclose(slots[name], apart[1][name], rtol=1e-3, atol=1e-5 * np.abs(slots[name]).max() + 1e-9, err_msg=name)

@pytest.mark.parametrize("count", [1, 2, 3])
def test_after_each_tied_step_embedding_and_head_are_one_table_with_one_state(count):
    tied = build(TIED, 8)
    _, slots, params = few_steps(tied, random_rows(24), count)
    assert np.array_equal(params["embed"], params["head"]) and set(of("head", slots)) == {"m", "v"}
    for name, slot in of("head", slots).items():
        assert slot.any() and np.array_equal(of("embed", slots)[name], slot), name
    assert not np.array_equal(params["head"], tied.weights["head"])

def test_from_the_next_stage_on_they_go_their_own_ways_from_the_same_weights_and_state():
    tied, loose, rows = build(TIED, 8), build(TIED, 8, 1), random_rows(24)
    state, _ = tied.step(tied.random_state(), tied.batch(rows))
    names = ("embed", "head")
    start = jax.tree.map(np.asarray, {name: (state.params[name], state.opt_state[name]) for name in names})
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, start.values()), strict=True))
    state, _ = loose.step(state, loose.batch(rows))
    new = {name: 2 * np.asarray(state.opt_state[name]["m"]) - start[name][1]["m"] for name in names}  # gradients: m is half of each
    assert np.abs(new["embed"] - new["head"]).max() > 0.1 * np.abs(new["head"]).max() > 0
    assert not new["embed"][np.setdiff1d(np.arange(CFG.vocab_size), [row[0][:-1] for row in rows])].any()  # no longer the targets'
    assert not np.array_equal(state.params["embed"], state.params["head"])

def test_eight_devices_make_the_same_tied_update_as_one():
    assert_same_update(few_steps(build(TIED, 8), random_rows(24)), few_steps(build(dataclasses.replace(TIED, micro_tokens=96), 1), random_rows(24)))


# ---- Layers gathered one by one --------------------------------------------------------------------------------------

def test_layers_that_are_gathered_one_by_one_learn_as_those_gathered_at_once_and_as_on_one_device():
    """The mlp's weights are whole on every device, the attention's are split."""
    losses, states = [], []
    for built in (build(config(fsdp=1), 8), EIGHT(), ONE()):
        state, series = built.random_state(), []
        for step in range(4):
            state, loss = built.step(state, built.batch(random_rows(24, seed=step)))
            series.append(float(loss))
        losses.append(series)
        states.append(jax.tree.map(np.asarray, name_leaves(state)))
    assert losses[0][-1] < losses[0][0] - 0.3
    for other in (1, 2):
        np.testing.assert_allclose(losses[0], losses[other], rtol=1e-5)
        for name, leaf in states[other].items():
            np.testing.assert_allclose(states[0][name], leaf, atol=1e-4 * np.abs(leaf).max(), err_msg=name)

def test_with_fsdp_too_the_state_is_split_as_the_table_says():
    built = build(config(fsdp=1), 8)
    state, _ = built.step(built.init(), built.batch(random_rows(24)))
    for name, leaf in [*name_leaves(state.params).items(), *name_leaves(state.opt_state).items()]:
        weight = name if name in LOCAL_SHAPES else name.rpartition("/")[0]
        assert {shard.data.shape for shard in leaf.addressable_shards} == {local_shape(name)}, name
        assert len({str(shard.index) for shard in leaf.addressable_shards}) == (8 if weight in SPLIT else 1), name

def test_with_fsdp_each_micro_step_asks_for_a_layer_forward_and_again_backward_and_keeps_none():
    """As traced: what a compiler may keep or move it is told by the remat, which a CPU's does not heed."""
    cfg, mesh, shape = config(fsdp=1), make_mesh(), {name: shape_of(spec, CFG) for name, spec in name_leaves(param_specs(CFG)).items()}
    arguments = jax.eval_shape(make_init(Model(), mesh, cfg)), jax.ShapeDtypeStruct(batch_shape(stages(cfg)[0], 8, cfg), jnp.uint16)
    traced = list(equations(jax.make_jaxpr(make_train_step(stages(cfg)[0], Model(), mesh, cfg))(*arguments).jaxpr))
    results = lambda eqns, name: sorted(v.aval.shape for e in eqns if e.primitive.name == name for v in e.outvars)
    loop, = (list(equations(e.params["jaxpr"].jaxpr)) for e in traced if e.primitive.name == "scan" and e.params["length"] == 3)
    stacked = [name for name in SPLIT if "/" in name]
    assert results(loop, "all_gather") == sorted(2 * 2 * [shape[name][1:] for name in stacked])  # two layers, there and back
    assert len(results(loop, "reduce_scatter")) == 2 * len(stacked)
    assert results(traced, "all_gather") == sorted(results(loop, "all_gather") + [shape["embed"], shape["head"]])
    assert len(results(traced, "reduce_scatter")) == 2 * len(stacked) + 2
    remats = [e for e in loop if e.primitive.name.startswith(("remat", "checkpoint"))]
    assert len(remats) == 2 and all(e.params["prevent_cse"] for e in remats)
    for e in remats:  # what a layer's backward starts from: no whole matrix is among it
        assert not {v.aval.shape for v in e.invars} & {shape[name][1:] for name in stacked}

def test_with_fsdp_the_compiled_step_holds_no_layer_gathered_from_one_micro_step_to_the_next():
    found = computations(build(config(fsdp=1), 8).step.as_text())
    bodies = re.findall(r" while\(.*body=%([\w.\-]+)", "\n".join(itertools.chain(*found.values())))
    inside = reachable(bodies, found)
    outside = exchanged([line for name, lines in found.items() if name not in inside for line in lines])
    assert outside["all-gather"] == 2 * [256 * 20]  # embedding and head


# ---- Learning --------------------------------------------------------------------------------------------------------

def test_one_batch_overfits():
    one = build(config(mtp="", adam_eps=1e-8, head_lr=0.05, micro_tokens=6 * 16), 1)
    tokens = np.random.default_rng(0).permutation(np.arange(8, 8 + 3 * (LENGTH + 1))).astype(np.uint16)
    state, batch = one.init(), one.batch(8 * [[row] for row in np.split(tokens, 3)])
    for _ in range(100):
        state, loss = one.step(state, batch)
        loss.block_until_ready()
    assert float(loss) < 0.05

def test_every_weight_of_every_layer_moves_within_two_steps():
    """The smear's gate only after its scalar, which starts at 0."""
    eight = EIGHT()
    state = eight.init()
    before, rows = jax.tree.map(np.asarray, name_leaves(state.params)), random_rows(24)
    for _ in range(2):
        state, loss = eight.step(state, eight.batch(rows))
        loss.block_until_ready()
    for name, weight in name_leaves(state.params).items():
        moved = np.asarray(weight) != before[name]
        if name == "embed":
            inputs = np.zeros(CFG.padded_vocab, bool)
            inputs[np.concatenate([row[0][:-1] for row in rows])] = True
            assert np.array_equal(moved.any(axis=1), inputs)
        elif name == "head":
            assert np.array_equal(moved.any(axis=1), np.arange(256) < CFG.vocab_size)  # the padding stays
        else:
            assert moved.reshape(len(moved), -1).any(axis=1).all(), name


# ---- The gradient of a lookup ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("count, num_rows, dtype", [
    (1, 5, "float32"), (100, 37, "float32"), (256, 300, "float32"), (257, 11, "float32"), (1000, 131, "float32"), (1000, 131, "bfloat16"),
    (700, 1, "float32")])
def test_the_rows_of_a_lookup_are_summed_as_by_float64_numpy(count, num_rows, dtype):
    """Ids come unsorted, some often and some never."""
    rng = np.random.default_rng(count)
    ids = np.minimum(rng.geometric(3 / num_rows, count) - 1, num_rows - 1) if num_rows > 1 else np.zeros(count, int)
    g = np.asarray(rng.standard_normal((count, 20)), dtype)
    expected = np.zeros((num_rows, 20))
    np.add.at(expected, ids, np.float64(g))
    if num_rows == 131:
        assert np.bincount(ids).max() > 10 and len(np.unique(ids)) < 131
    found = jax.jit(sum_rows, static_argnums=2)(ids, g, num_rows)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=2e-7 * np.abs(np.float64(g)).sum(axis=0).max())  # of the running sums


# ---- Where the state lives -------------------------------------------------------------------------------------------

LOCAL_SHAPES = {
    "embed": (32, 20), "head": (32, 20), "skip_mix": (1,), "skip_gate": (5, 1), "smear_mix": (1,), "smear_gate": (5, 1),
    "backout_mix": (1,), "blocks/x_mix": (2,), "blocks/y_mix": (2,), "attention/x_mix": (2,), "attention/y_mix": (2,),
    "attention/x0_mix": (2,), "attention/gate": (2, 5, 6), "attention/w_q": (2, 20, 6), "attention/w_k": (2, 20, 2),
    "attention/w_v": (2, 20, 2), "attention/w_out": (2, 6, 20), "blocks/w_up": (2, 20, 37), "blocks/w_down": (2, 37, 20)}
SQUARES = {"attention/w_q": (2, 1, 6), "attention/w_k": (2, 1, 2), "attention/w_v": (2, 1, 2), "attention/w_out": (2, 6, 1),
           "blocks/w_up": (2, 1, 37), "blocks/w_down": (2, 37, 1)}  # one number for each unit
SLOTS = {name: ("momentum", "square") if name in SQUARES else ("m", "v") for name in LOCAL_SHAPES}

def local_shape(name):
    """What a device holds of a weight or a part of its optimizer state."""
    weight, _, slot = name.rpartition("/")
    return LOCAL_SHAPES[name] if name in LOCAL_SHAPES else SQUARES[weight] if slot == "square" else LOCAL_SHAPES[weight]

SPLIT = {"embed", "head", "attention/w_q", "attention/w_k", "attention/w_v", "attention/w_out"}

def test_weights_and_optimizer_state_are_split_over_eight_devices_and_stay_so():
    eight = EIGHT()
    first = eight.init()
    places = jax.tree.map(lambda leaf: leaf.sharding, first)
    after, _ = eight.step(first, eight.batch(random_rows(24)))
    for state in (eight.init(), after):
        assert set(name_leaves(state.params)) == set(LOCAL_SHAPES)
        assert set(name_leaves(state.opt_state)) == {f"{name}/{slot}" for name in LOCAL_SHAPES for slot in SLOTS[name]}
        for name, leaf in [*name_leaves(state.params).items(), *name_leaves(state.opt_state).items()]:
            weight = name if name in LOCAL_SHAPES else name.rpartition("/")[0]
            assert len(leaf.addressable_shards) == 8 and leaf.dtype == jnp.float32
            assert {shard.data.shape for shard in leaf.addressable_shards} == {local_shape(name)}, name
            distinct = {str(shard.index) for shard in leaf.addressable_shards}
            assert len(distinct) == (8 if weight in SPLIT else 1), name
    jax.tree.map(lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim) or pytest.fail("moved"), after, places)

def test_first_weights_do_not_depend_on_the_number_of_devices():
    one, eight = (name_leaves(build_.init().params) for build_ in (ONE(), EIGHT()))
    for name in one:
        assert np.array_equal(one[name], eight[name]), name

def test_a_weight_is_split_along_the_first_axis_of_the_rule_that_divides():
    axes = lambda n, **changes: {name: split_axis(spec, config(**changes), n) for name, spec in name_leaves(param_specs(config(**changes))).items()}
    assert {name: axis for name, axis in axes(8).items() if axis is not None} == {
        "embed": -2, "head": -2, "attention/w_q": -1, "attention/w_k": -1, "attention/w_v": -1, "attention/w_out": -2}
    assert axes(8, mlp_dim=40)["blocks/w_up"] == -1 and axes(8, mlp_dim=40)["blocks/w_down"] == -2
    assert (axes(4)["embed"], axes(4)["attention/w_q"], axes(4)["attention/w_out"]) == (-2, -1, -2)  # though D divides too
    assert axes(5)["blocks/w_up"] == -2 and axes(5)["blocks/w_down"] == -1 and axes(5)["embed"] == -1  # along D

def test_the_state_is_donated():
    eight = EIGHT()
    state, batch = eight.init(), eight.batch(random_rows(24))
    eight.step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state)) and not batch.is_deleted()
    names = [*LOCAL_SHAPES, *(f"{name}/{slot}" for name in LOCAL_SHAPES for slot in SLOTS[name])]
    numbers = sum(math.prod(local_shape(name)) for name in names) + 1
    assert eight.step.memory_analysis().alias_size_in_bytes == 4 * numbers


# ---- What the compiled step exchanges --------------------------------------------------------------------------------

COLLECTIVE = re.compile(r"= (.*?) (all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)(?:-start)?\(")

def computations(hlo):
    """{name: its lines} of a module's text."""
    found, name = {}, None
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = header[1]
            found[name] = []
        elif name:
            found[name].append(line)
    return found

def reachable(names, found):
    """These computations and all that they call."""
    seen, left = set(), list(names)
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            for group in re.findall(r"(?:calls|to_apply|body|condition|\w+_computations?)=\{?((?:%[\w.\-]+(?:, )?)+)", "\n".join(found[name])):
                left += re.findall(r"%([\w.\-]+)", group)
    return seen

def exchanged(lines):
    """{kind: sorted numbers of elements} of the results of the collectives in these lines."""
    result = {}
    for line in lines:
        if match := COLLECTIVE.search(line):
            sizes = [math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\w+\[([\d,]*)\]", match[1])]
            result[match[2]] = sorted(result.get(match[2], []) + sizes)
    return result

@pytest.fixture(scope="module")
def program():
    """(the loop's lines, all other lines) of the eight-device step with three micro-steps."""
    assert batch_shape(stages(CFG)[0], 8, CFG) == (3, 8, LENGTH + 1)
    found = computations(EIGHT().step.as_text())
    bodies = re.findall(r" while\(.*body=%([\w.\-]+)", "\n".join(itertools.chain(*found.values())))
    inside = reachable(bodies, found)
    return tuple([line for name, lines in found.items() if (name in inside) == chosen for line in lines] for chosen in (True, False))

def test_nothing_is_exchanged_inside_the_accumulation_loop(program):
    inside, _ = program
    assert any(re.search(r" (dot|custom-call)\(", line) for line in inside)  # the loop found is the one with the model in it
    assert exchanged(inside) == {}

def test_each_split_gradient_is_reduced_once_and_each_split_weight_gathered_once(program):
    _, outside = program
    found, specs = exchanged(outside), name_leaves(param_specs(CFG))
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"}
    assert found["reduce-scatter"] == sorted(math.prod(LOCAL_SHAPES[name]) for name in SPLIT)
    assert found["all-gather"] == sorted(math.prod(shape_of(specs[name], CFG)) for name in SPLIT)
    loss_and_count, norms = [1, 1], 4 * 2 * [2]  # of the split matrices of two layers, before and after NorMuon
    assert found["all-reduce"] == sorted([math.prod(shape) for name, shape in LOCAL_SHAPES.items() if name not in SPLIT] + loss_and_count + norms)

def test_the_tied_step_reduces_one_table_and_gathers_one():
    found, specs = exchanged(build(TIED, 8).step.as_text().splitlines()), name_leaves(param_specs(CFG))
    assert found["reduce-scatter"] == sorted(math.prod(LOCAL_SHAPES[name]) for name in SPLIT - {"embed"})
    assert found["all-gather"] == sorted(math.prod(shape_of(specs[name], CFG)) for name in SPLIT - {"embed"})

def test_muon_exchanges_an_eighth_of_each_split_matrix_there_and_back(program):
    _, outside = program
    # w_q and w_out: four matrices of 20 x 48, padded to eight; w_k and w_v: four of 20 x 16
    assert sum(exchanged(outside)["all-to-all"]) == 2 * (8 * 20 * 48 // 8 + 8 * 20 * 16 // 8)


# ---- Precision -------------------------------------------------------------------------------------------------------

def test_with_bfloat16_matmuls_masters_and_sums_over_micro_steps_are_float32_and_weights_and_gradients_travel_in_bfloat16():
    cfg, mesh = config(compute_dtype="bfloat16"), make_mesh()
    state = jax.eval_shape(make_init(Model(), mesh, cfg))
    batch = jax.ShapeDtypeStruct(batch_shape(stages(cfg)[0], 8, cfg), jnp.uint16)
    jaxpr, out = jax.make_jaxpr(make_train_step(stages(cfg)[0], Model(), mesh, cfg), return_shape=True)(state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), out[0]) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    kinds, micro_steps = {}, [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "scan" and eqn.params["length"] == 3]
    for eqn in micro_steps:
        sums = [v for v in eqn.outvars if v.aval.shape[:1] != (3,)]  # the others are of each micro-step
        assert len(sums) == 7 + 2 * 12 + 2 and {v.aval.dtype.name for v in sums} == {"float32"}
    assert len(micro_steps) == 1
    for eqn in equations(jaxpr.jaxpr):
        kinds.setdefault(eqn.primitive.name, []).append(sorted({v.aval.dtype.name for v in eqn.invars if hasattr(v, "aval")}))
    assert kinds["dot_general"] and all(dtypes == ["bfloat16"] for dtypes in kinds["dot_general"])
    assert kinds["all_to_all"] and all(dtypes == ["bfloat16"] for dtypes in kinds["all_to_all"])
    assert kinds["reduce_scatter"] == 6 * [["bfloat16"]]
    assert kinds["all_gather"] == 6 * [["bfloat16"]]

def test_compute_copies_of_tables_and_matrices_are_bfloat16_and_of_scalars_float32():
    cfg = config(compute_dtype="bfloat16")
    copies = jax.eval_shape(lambda: gather(jax.tree.map(lambda spec: jnp.zeros(shape_of(spec, cfg)), param_specs(cfg)), param_specs(cfg), 1, cfg))
    single = {name for name in LOCAL_SHAPES if name.endswith("_mix")}
    assert {name for name, leaf in name_leaves(copies).items() if leaf.dtype == jnp.float32} == single


# ---- Evaluation ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=[8, 1])
def scored(request):
    """(nats, count) of the evaluation of 200 targets, on eight devices and on one; the tokens."""
    cfg, mesh = config(micro_tokens=32), make_mesh(jax.devices()[:request.param])
    tokens = np.concatenate([row[0] for row in random_rows(14, seed=9)])  # more than the 201 that are read
    rows = to_devices(plan_val(Shards([], [tokens], {}), cfg), val_stage(cfg), mesh, cfg)
    assert rows.shape == ((2, 16, 17) if request.param == 8 else (10, 2, 17))  # 19 rows of 11 targets, some places empty
    params = jax.device_put(ONE().weights, state_shardings(Model(), mesh, cfg).params)
    run = make_eval_step(Model(), mesh, cfg).lower(params, rows).compile(compiler_options=FAST)
    return (*run(params, rows), tokens.astype(int))

def test_evaluation_scores_each_target_once_after_the_context_it_should_see(scored):
    nats, count, tokens = scored
    expected, targets_seen = [], []
    for start in range(0, 200, 11):
        stop = min(start + 11, 200)
        context = [BOS] * 5 if start == 0 else tokens[start - 5:start]
        row = np.concatenate([context, tokens[start:stop]]).astype(int)[None]
        logits = oracle_logits(ONE().weights, row, (4, 9), CFG)[0, 5:]
        expected.append(numpy_gpt.nats(logits, tokens[start + 1:stop + 1]))
        targets_seen += range(start + 1, stop + 1)
    assert targets_seen == list(range(1, 201)) and int(count) == 200
    assert float(nats) == pytest.approx(np.concatenate(expected).sum(), rel=1e-5)


# ---- Batches and rows ------------------------------------------------------------------------------------------------

def test_a_batch_shape_holds_every_row_in_as_few_micro_steps_as_the_limit_allows():
    stage = stages(CFG)[0]
    for num_rows, devices, micro_rows in itertools.product((1, 3, 8, 11, 24, 40), (1, 3, 8), (0, 1, 2, 5)):
        cfg = config(micro_tokens=micro_rows * 16)
        num_micro, rows, width = batch_shape(stage._replace(batch_tokens=num_rows * 16), devices, cfg)
        per_device = math.ceil(num_rows / devices)
        assert width == 17 and rows % devices == 0 and num_micro * rows >= num_rows
        assert rows // devices <= (micro_rows or per_device)
        assert num_micro == math.ceil(per_device / min(micro_rows or per_device, per_device))

def test_a_micro_step_holds_a_row_even_if_the_limit_is_shorter():
    assert batch_shape(stages(CFG)[0], 8, config(micro_tokens=3)) == (3, 8, 17)

def test_targets_are_the_next_tokens_and_what_is_not_there_weighs_nothing():
    rows = np.array([[5, 6, 8, 9], [5, NO_TOKEN, NO_TOKEN, NO_TOKEN], [NO_TOKEN, NO_TOKEN, 3, 4]], np.uint16)
    inputs, targets, weights = inputs_and_targets(jnp.asarray(rows), CFG)
    assert inputs.tolist() == [[5, 6, 8], [5, BOS, BOS], [BOS, BOS, 3]]
    assert targets.tolist() == [[6, 8, 9], [BOS, BOS, BOS], [BOS, 3, 4]]
    assert weights.tolist() == [[1, 1, 1], [0, 0, 0], [0, 1, 1]] and weights.dtype == jnp.float32

def test_flops_per_token_are_counted_as_by_hand():
    cfg = config(seq_len="32", num_layers=3, window_short="5", window_long="0")
    stage = stages(cfg)[0]
    assert stage.windows == (5, 0, 5)
    matrices = 3 * (20 * 48 + 2 * 20 * 16 + 48 * 20 + 2 * 20 * 37) + 256 * 20  # the head once
    matrices += 3 * 5 * 6 + 5 + 5  # gates of the heads, of the skip, of the smear
    attention = 0
    for window in (5, 31, 5):
        pairs = sum(1 for t in range(32) for s in range(32) if t - window <= s <= t)
        attention += 6 * 2 * (2 * 8) * pairs / 32 * 3  # heads; q.k and p.v; 2 per dim; mean per token; forward, two backward
    assert flops_per_token(stage, param_specs(cfg), cfg) == pytest.approx(6 * matrices + attention, rel=1e-9)
    without = dataclasses.replace(cfg, mlp_only="1")  # the block with the whole row in view
    gone = 6 * (20 * 48 + 2 * 20 * 16 + 48 * 20 + 5 * 6) + 6 * 2 * (2 * 8) * sum(range(1, 33)) / 32 * 3
    assert flops_per_token(stage, param_specs(without), without) == pytest.approx(6 * matrices + attention - gone, rel=1e-9)
    longer = stage._replace(windows=(1000, 0, 1000))  # a window past the row is no window
    assert flops_per_token(longer, param_specs(cfg), cfg) == flops_per_token(stage._replace(windows=(0, 0, 0)), param_specs(cfg), cfg)


# ---- Another architecture --------------------------------------------------------------------------------------------

def bigram_specs(cfg):
    return {"embed": Spec("V D", normal(1.0), "embed"), "blocks": {"w_mix": Spec("L D D", normal(0.1), "muon")},
            "head": Spec("V D", normal(0.1), "head")}

def bigram_loss(weights, tokens_BT, target_BT, weight_BT, stage, cfg):
    """Its labels are looked up in the head itself, so that the head's whole gradient comes from the loss."""
    x_ND = lookup(weights, "embed", tokens_BT, "inputs").reshape(-1, cfg.model_dim)
    y_ND = sum(jnp.tanh(matmul("ND,DM->NM", x_ND, layer["w_mix"])) for layer in weights["blocks"])
    label_N = capped(jnp.sum(y_ND * weights["head"][target_BT.ravel()], axis=-1), cfg)
    return log_partition(y_ND, weights["head"], weight_BT.ravel(), cfg) - jnp.sum(weight_BT.ravel() * label_N)

def plain_loss(weights, tokens_BT, target_BT, weight_BT, stage, cfg):
    """Without `lookup`: the gradients of both tables come from the loss."""
    return bigram_loss({name: w for name, w in weights.items() if name not in ("inputs", "targets")}, tokens_BT, target_BT, weight_BT, stage, cfg)

def test_tied_tables_get_the_gradients_of_both_uses_also_from_a_model_without_lookups():
    cfg, mesh, means = config(micro_tokens=0, stage_ends="0.5,1", tied_stages=1), make_mesh(jax.devices()[:1]), []
    for loss in (bigram_loss, plain_loss):
        model, stage = Model(specs=bigram_specs, loss=loss), stages(cfg)[0]
        state, _ = make_train_step(stage, model, mesh, cfg)(make_init(model, mesh, cfg)(), to_devices(random_rows(24), stage, mesh, cfg))
        means.append(np.asarray(state.opt_state["head"]["m"]))
    inputs = np.unique([row[0][:-1] for row in random_rows(24)])
    assert np.abs(means[0][inputs]).max() > 0
    np.testing.assert_allclose(means[1], means[0], atol=1e-5 * np.abs(means[0]).max())

def test_a_model_is_five_functions_and_its_loss_and_update_are_told_the_stage():
    cfg, mesh, seen = config(stage_ends="0.2,1", tied_stages=1, micro_tokens=0), make_mesh(jax.devices()[:1]), []
    def loss(weights, tokens_BT, target_BT, weight_BT, stage, cfg):
        seen.append((stage, sorted(set(weights) - set(bigram_specs(cfg))), len(weights.get("ahead", ()))))
        return bigram_loss(weights, tokens_BT, target_BT, weight_BT, stage, cfg)
    def update(params, grads, opt_state, step, stage, specs, rules, num_devices, cfg):
        seen.append((stage, sorted(rules), num_devices))
        return params, opt_state
    rules = lambda cfg: {group: Rule("adam", 0.1) for group in ("embed", "head", "muon")}
    assert Model._fields == ("specs", "loss", "rules", "logits", "update")
    for name, function, arguments in list_programs(Model(bigram_specs, loss, rules, None, update), mesh, cfg).values():
        jax.eval_shape(function, *arguments)
    first, second = stages(cfg)
    told = [(first, ["ahead", "inputs", "targets"], 2), (first, ["embed", "head", "muon"], 1),
            (second, ["ahead", "inputs", "targets"], 1), (second, ["embed", "head", "muon"], 1), (val_stage(cfg), [], 0)]
    assert list(dict.fromkeys(map(str, seen))) == list(map(str, told))  # a loop's body may be traced more than once

def test_another_model_trains_through_the_same_programs_one_for_each_stage():
    """Its matrices are square in one letter, and split over two devices."""
    cfg = config(stage_ends="0.2,0.4,1", seq_len="16,8,16", max_doc_len="16,8,8", micro_tokens=0, muon_lr=0.01)
    model, mesh = Model(specs=bigram_specs, loss=bigram_loss), make_mesh(jax.devices()[:2])
    programs, notes = compile_all(model, mesh, cfg)
    assert list(programs) == ["init", 0, 1, 2, "eval"]
    assert [note.split()[1] for note in notes] == ["init", "train_0", "train_1", "train_2", "eval"]
    state, losses = programs["init"](), []
    for step in range(30):
        state, loss = programs[0](state, to_devices(random_rows(24, seed=step % 3), stages(cfg)[0], mesh, cfg))
        losses.append(float(loss))
    assert losses[0] == pytest.approx(math.log(131), abs=0.5) and losses[-1] < losses[0] - 1.5
    nats, count = programs["eval"](state.params, to_devices([[random_rows(1)[0][0]]], val_stage(cfg), mesh, cfg))
    assert int(count) == 11 and math.isfinite(float(nats))


def test_rows_of_one_sign_do_not_cancel_in_the_sum_of_an_id_that_occurs_once():
    rng, size = np.random.default_rng(0), 65536
    ids, g = rng.permutation(size), np.asarray(1 + 0.3 * rng.standard_normal((size, 4)), jnp.bfloat16)
    expected = np.zeros((size, 4))
    expected[ids] = np.float64(g)
    error = np.abs(np.float64(jax.jit(sum_rows, static_argnums=2)(ids, g, size)) / expected - 1)
    assert np.mean(error) < 2e-5 and np.quantile(error, 0.99) < 1e-4
