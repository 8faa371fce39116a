"""Training and evaluation steps on one and on eight simulated devices."""

import collections
import functools
import itertools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpy_gpt
import pytest
from jaxprs import FAST, equations, jit
from shards import make_folder

import train
from scripts.baselines import log_partition
from scripts.dry_run.hlo import COLLECTIVES, parse
from train import GPT, NO_TOKEN, Spec, Stage, batch_shape, make_mesh, named, param_specs, replace

BOS, LENGTH = 7, 16
STAGE = Stage(1.0, 24 * LENGTH, LENGTH, doc_len=LENGTH, short=5, long=11, ahead=(0.5, 0.25))
# On eight devices heads and vocabulary are held split, the mlp (20 x 37) is not.
# adam_eps: else Adam makes a whole step of the noise in a gradient that is almost zero.
FLAGS = """
--steps=200 --num_layers=2 --model_dim=20 --num_heads=6 --num_kv_heads=2 --head_dim=8 --mlp_dim=37
--vocab_size=131 --bos_id=7 --mlp_only= --skips=((0,1),) --late_inputs=((0,1),) --backout=0
--offset_layers=1 --long_layers=1 --gate_dims=5 --softcap=9.0,10.0,2.0 --attn_scale=0.25
--copy_dim=6 --compute_dtype=float32 --micro_tokens=16 --adam_lr=0.03 --adam_wd=0.05 --adam_eps=1e-3
--val.seq_len=16 --val.short=4 --val.long=9 --val_tokens=200 --val_context=5
"""
CFG = replace(train.parse_flags(FLAGS.split()), stages=(STAGE,))
config = functools.partial(replace, CFG)
TIED = config(stages=(replace(STAGE, end=0.5, tied=True), STAGE))
SPECS = named(param_specs(CFG))
WEIGHTS = numpy_gpt.random_weights(CFG, jax.tree.map(lambda spec: spec.shape, param_specs(CFG)))


def random_rows(count, seed=0):
    """Rows of tokens that mostly follow from the one before, a BOS now and then."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CFG.vocab_size, (count, LENGTH + 1))
    for t in range(1, LENGTH + 1):
        follows = (tokens[:, t - 1] * 5 + 3) % CFG.vocab_size
        tokens[:, t] = np.where(rng.random(count) < 0.7, follows, tokens[:, t])
    tokens[rng.random(tokens.shape) < 0.1] = BOS
    return [[row] for row in tokens.astype(np.uint16)]


def compiled(function, *arguments):
    """In half the time, for it is not optimized."""
    return function.lower(*arguments).compile(compiler_options=FAST)


@functools.cache
def compiled_init(mesh):
    """One program for all configs here: what it gives depends on none of their differences."""
    return compiled(train.make_init(GPT, mesh, CFG))


@functools.cache
def build(cfg, num_devices):
    """The compiled training step of the first stage, and what goes with it."""
    mesh, stage = make_mesh(jax.devices()[:num_devices]), cfg.stages[0]
    init = compiled_init(mesh)
    num_micro, num_rows, _ = batch_shape(stage, num_devices, cfg)

    def batch(rows, scores=1.0):
        """With a weight for each target."""
        found = train.to_devices(rows, stage, mesh, cfg)
        scores = np.broadcast_to(np.float32(scores), (num_micro * num_rows, LENGTH))
        scores = scores.reshape(num_devices, num_micro, -1, LENGTH).swapaxes(0, 1)
        scores = scores.reshape(num_micro, num_rows, LENGTH)
        return found | {"weights": jax.device_put(scores, found["tokens"].sharding)}

    def random_state(**changes):
        """Step 0 with weights of which none is zero."""
        places = train.state_shardings(GPT, mesh, cfg).params
        return init()._replace(params=jax.device_put(WEIGHTS | changes, places))

    step = compiled(train.make_train_step(stage, GPT, mesh, cfg), init(), batch([]))
    return SimpleNamespace(init=init, step=step, batch=batch, random_state=random_state)


def eight():
    """Three micro-steps of a row on each device."""
    return build(CFG, 8)


def one():
    """One micro-step of all 24 rows."""
    return build(config(micro_tokens=24 * LENGTH), 1)


def arrays(tree):
    return jax.tree.map(np.asarray, named(tree))


def few_steps(built, rows, count=2, scores=1.0, **changes):
    """(last loss, optimizer state, weights) of some steps from random weights on the same rows."""
    state, batch = built.random_state(**changes), built.batch(rows, scores)
    for _ in range(count):
        state, loss = built.step(state, batch)
    assert int(state.step) == count
    return float(loss), arrays(state.opt_state), arrays(state.params)


def assert_same_update(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, slot in expected[1].items():
        atol = 2e-4 * np.abs(slot).max() + 1e-9
        np.testing.assert_allclose(found[1][name], slot, rtol=1e-3, atol=atol, err_msg=name)
    for name, weight in expected[2].items():
        np.testing.assert_allclose(found[2][name], weight, atol=1e-4, err_msg=name)


def oracle_loss(weights, rows, ahead=(0.5, 0.25), scores=1.0, offsets=0.0):
    """The float64 mean over the targets that are there, each times its score.

    offsets: [rows, 1, V], added to the logits.
    """
    tokens, there = np.full((len(rows), LENGTH + 1), BOS), np.zeros((len(rows), LENGTH))
    for i, (row,) in enumerate(rows):
        tokens[i, : len(row)] = row
        there[i, : len(row) - 1] = 1
    given = weights, tokens[:, :-1], (5, 11), (), CFG, True, offsets
    weight = there * scores
    return numpy_gpt.loss(*numpy_gpt.outputs(*given), tokens[:, 1:], weight, ahead) / weight.sum()


# ---- One update, however it is split ----


def test_the_training_loss_is_the_float64_mean_over_the_targets_that_are_there():
    """The last of the later tokens leaves it as the schedule says, in a stage of 200 steps."""
    rows = random_rows(24)
    rows[3], rows[10] = [rows[3][0][:9]], [rows[10][0][:1]]  # one half empty, one without a target
    rows = rows[:22]  # and two that are not there
    for step, last_share in ((0, 0.25), (100, 0.125), (200, 0.0)):
        state = one().random_state()._replace(step=jnp.int32(step))
        _, loss = one().step(state, one().batch(rows))
        assert float(loss) == pytest.approx(oracle_loss(WEIGHTS, rows, (0.5, last_share)), rel=1e-5)


def test_the_first_gradients_are_the_slopes_of_the_float64_mean_loss():
    rows = random_rows(5)
    _, slots, _ = few_steps(one(), rows, 1)
    for name, new_share in {"head": 0.5, "embed": 0.5, "skip_gate": 0.1}.items():
        grad = slots[f"{name}/m"] / new_share
        step = 1e-5 * np.random.default_rng(0).standard_normal(grad.shape)
        up, down = (
            oracle_loss(WEIGHTS | {name: WEIGHTS[name] + change}, rows) for change in (step, -step)
        )
        error = np.vdot(grad, step) - (up - down) / 2
        assert abs(error) < 1e-8 * np.linalg.norm(grad), name


@pytest.mark.parametrize("count", [24, 11])  # with 11 some devices have fewer rows than others
def test_eight_devices_in_micro_steps_make_the_same_update_as_one_with_the_whole_batch(count):
    assert eight().batch([])["tokens"].shape == (3, 8, LENGTH + 1)
    assert one().batch([])["tokens"].shape == (1, 24, LENGTH + 1)
    rows = random_rows(count)
    assert_same_update(few_steps(eight(), rows), few_steps(one(), rows))


# ---- A softmax over candidates ----

SAMPLED = config(stages=(replace(STAGE, candidates=60),))


def candidate_offsets(rows, step, cfg):
    """[rows, 1, V]: what the equation adds to each row's logits; -inf to those that are out.

    Which tokens stand in for those that are no targets is taken from train.py, the rest is not.
    """
    size, num_candidates = cfg.vocab_size, cfg.stages[0].candidates
    ids, _ = train.choose_candidates(rows, step, cfg.stages[0], cfg)
    offsets = np.full((len(rows), 1, size), -np.inf)
    eighth = len(rows) // 8
    for i in range(len(rows)):
        group = rows[i // eighth * eighth : (i // eighth + 1) * eighth]
        targets = {token for (row,) in group for token in row[1:].tolist()}
        others = set(ids[i // eighth].tolist()) - targets
        assert len(targets | others) == num_candidates == len(targets) + len(others)
        offsets[i, 0, sorted(targets)] = 0
        share = len(others) / (size - len(targets))
        offsets[i, 0, sorted(others)] = -0.5 * math.log(share)
    return offsets


@pytest.mark.parametrize("tied", [False, True])
def test_a_loss_over_candidates_and_its_slopes_are_those_of_the_float64_equation(tied):
    cfg = replace(SAMPLED, stages=(replace(SAMPLED.stages[0], tied=tied),), micro_tokens=48)
    built, rows = build(cfg, 1), random_rows(24)
    offsets = candidate_offsets(rows, 0, cfg)
    loss, slots, _ = few_steps(built, rows, 1)

    def exact(**changes):
        weights = WEIGHTS | changes
        if tied:
            weights |= {"embed": weights["head"]}
        return oracle_loss(weights, rows, offsets=offsets)

    assert loss == pytest.approx(exact(), rel=1e-5)
    for name, new_share in {"head": 0.5, "embed": 0.5, "skip_gate": 0.1}.items():
        if tied and name == "embed":
            continue
        grad = slots[f"{name}/m"] / new_share
        change = 1e-5 * np.random.default_rng(0).standard_normal(grad.shape)
        up, down = (exact(**{name: WEIGHTS[name] + sign * change}) for sign in (1, -1))
        error = np.vdot(grad, change) - (up - down) / 2
        assert abs(error) < 1e-8 * np.linalg.norm(grad), name


def test_with_candidates_eight_devices_make_the_same_update_as_one():
    rows = random_rows(24)
    assert_same_update(few_steps(build(SAMPLED, 8), rows), few_steps(build(SAMPLED, 1), rows))


def test_all_tokens_as_candidates_are_the_whole_softmax():
    rows = random_rows(24)
    everything = config(stages=(replace(STAGE, candidates=CFG.vocab_size),))
    assert_same_update(few_steps(build(everything, 1), rows), few_steps(one(), rows))


def test_the_other_candidates_go_round_the_vocabulary_and_follow_from_the_step():
    rows, stage = random_rows(24), SAMPLED.stages[0]
    steps = [train.choose_candidates(rows, step, stage, SAMPLED) for step in range(12)]
    again, _ = train.choose_candidates(rows, 5, stage, SAMPLED)
    assert np.array_equal(again, steps[5][0])
    for group in range(8):
        chosen = [ids[group] for ids, _ in steps]
        assert all(np.all(np.diff(ids.astype(int)) > 0) for ids in chosen)
        assert set(np.concatenate(chosen).tolist()) == set(range(SAMPLED.vocab_size))


def test_candidates_want_a_vocabulary_that_holds_them():
    shards = train.Shards([], [], {"vocab_size": 50, "bos_id": 7})

    def complete(candidates, vocab_size):
        stages = (replace(STAGE, candidates=candidates),)
        return train.complete_config(shards, config(stages=stages, vocab_size=vocab_size))

    assert complete(50, None).vocab_size == 50
    with pytest.raises(train.UsageError, match="candidates=51: wanted at most --vocab_size=50"):
        complete(51, None)
    assert train.STRIDE > 65536  # the largest vocabulary
    assert all(train.STRIDE % divisor for divisor in range(2, math.isqrt(train.STRIDE) + 1))


def test_more_targets_than_candidates_and_rows_in_no_eighths_are_refused():
    few = replace(STAGE, candidates=9)
    with pytest.raises(train.UsageError, match=r"candidates=9: .* has \d+ different targets"):
        train.choose_candidates(random_rows(24), 0, few, CFG)
    for num_devices, rows in ((8, 20), (3, 24), (16, 24)):
        stage = replace(STAGE, candidates=60, batch_tokens=rows * LENGTH)
        refusal = f"{rows} rows on {num_devices} devices; wanted 1, 2, 4, 8 or a multiple of 8 dev"
        with pytest.raises(train.UsageError, match=refusal):
            batch_shape(stage, num_devices, CFG)


def test_micro_steps_that_do_not_divide_an_eighth_leave_its_candidates_with_it():
    """Three rows an eighth, two to a micro-step at most: a spare place would shift the others."""
    rows = random_rows(24)
    cfg = replace(SAMPLED, micro_tokens=2 * LENGTH)
    assert batch_shape(cfg.stages[0], 1, cfg) == (24, 1, LENGTH + 1)
    offsets = candidate_offsets(rows, 0, cfg)
    loss, _, _ = few_steps(build(cfg, 1), rows, 1)
    assert loss == pytest.approx(oracle_loss(WEIGHTS, rows, offsets=offsets), rel=1e-5)


def test_a_batch_may_bring_a_weight_for_each_target():
    """A row of zeros is as no row; others weigh in the mean of the loss and of the gradients."""
    rows = random_rows(24)
    scores = np.random.default_rng(1).choice([0.0, 0.5, 2.0], (24, LENGTH))
    loss, _, _ = few_steps(eight(), rows, 1, scores)
    assert loss == pytest.approx(oracle_loss(WEIGHTS, rows, scores=scores), rel=1e-5)
    scores = 2.0 * (np.arange(24) < 12)[:, None]
    assert_same_update(few_steps(eight(), rows, scores=scores), few_steps(one(), rows[:12]))


@pytest.fixture(scope="module")
def fifty_steps():
    """Of one device and of eight: (the first weights, those after two steps, the losses)."""
    found = []
    for built in (one(), eight()):
        state, losses = built.init(), []
        seen = [arrays(state.params)]
        for step in range(50):
            state, loss = built.step(state, built.batch(random_rows(24, seed=step)))
            losses.append(float(loss))
            if step == 1:
                seen.append(arrays(state.params))
        found.append((*seen, np.array(losses)))
    return found


def test_from_the_same_weights_one_device_and_eight_lose_the_same_over_fifty_steps(fifty_steps):
    (first, _, losses), (first_of_eight, _, losses_of_eight) = fifty_steps
    for name, weight in first.items():
        assert np.array_equal(first_of_eight[name], weight), name
    there = 1 - (0.5 * 1 + 0.25 * 2) / 1.75 / LENGTH  # a row's last have no later next tokens
    assert losses[0] == pytest.approx(math.log(CFG.vocab_size) * there, rel=1e-3)
    assert losses[-1] < losses[0] - 0.5
    np.testing.assert_allclose(losses, losses_of_eight, atol=1e-5)


def test_every_weight_of_every_layer_moves_within_two_steps(fifty_steps):
    """The smear's gate only after its scalar, which starts at 0."""
    first, after_two, _ = fifty_steps[1]
    inputs = [row[:-1] for seed in (0, 1) for (row,) in random_rows(24, seed)]
    for name, weight in after_two.items():
        moved = (weight != first[name]).reshape(len(weight), -1).any(axis=1)
        expected = np.full(len(moved), True)
        if name == "embed":
            expected = np.isin(np.arange(len(moved)), inputs)
        if name == "head":
            expected = np.arange(len(moved)) < CFG.vocab_size  # the padding stays
        assert np.array_equal(moved, expected), name


# ---- Embedding and head, first one table, then two ----


def test_while_they_are_tied_the_embedding_is_the_head_and_its_gradient_that_of_both_uses():
    rows, tied, head = random_rows(24), build(TIED, 8), WEIGHTS["head"]
    apart = few_steps(eight(), rows, 1, embed=head)  # as two tables that are alike
    uses = apart[1]["head/m"], apart[1]["embed/m"]  # each half of its gradient
    both = sum(uses)
    assert min(np.abs(use).max() for use in uses) > 0.05 * np.abs(both).max()
    for embed in (head, WEIGHTS["embed"]):  # what stands in the embedding does not count
        loss, slots, _ = few_steps(tied, rows, 1, embed=embed)
        assert loss == pytest.approx(apart[0], rel=1e-6)
        np.testing.assert_allclose(slots["head/m"], both, atol=1e-6 * np.abs(both).max())
        for name in slots.keys() - {"head/m", "head/v", "embed/m", "embed/v"}:
            slot = apart[1][name]
            atol = 1e-5 * np.abs(slot).max() + 1e-9
            np.testing.assert_allclose(slots[name], slot, rtol=1e-3, atol=atol, err_msg=name)


def test_after_tied_steps_there_is_one_table_with_one_state_and_then_each_goes_its_own_way():
    tied, loose, rows = build(TIED, 8), eight(), random_rows(24)
    state = tied.random_state()
    for _ in range(2):
        state, _ = tied.step(state, tied.batch(rows))
    head, embed = (arrays((state.params[k], state.opt_state[k])) for k in ("head", "embed"))
    for name, array in head.items():
        assert array.any() and np.array_equal(embed[name], array), name
    assert not np.array_equal(head["0"], WEIGHTS["head"])
    state, _ = loose.step(state, loose.batch(rows))
    head, embed = (np.asarray(state.opt_state[k]["m"]) for k in ("head", "embed"))
    assert np.abs(embed - head).max() > 0.1 * np.abs(head).max()
    assert not np.array_equal(state.params["embed"], state.params["head"])


# ---- The gradient of a lookup ----


def test_the_rows_of_a_lookup_are_summed_as_by_float64_numpy():
    """Ids come unsorted, some often and some never."""
    cases = [(1, 5, "float32"), (256, 300, "float32"), (1000, 131, "bfloat16")]
    for count, num_rows, dtype in cases:
        rng = np.random.default_rng(count)
        ids = np.minimum(rng.geometric(min(1, 3 / num_rows), count) - 1, num_rows - 1)
        g = np.asarray(rng.standard_normal((count, 20)), dtype)
        expected = np.zeros((num_rows, 20))
        np.add.at(expected, ids, np.float64(g))
        found = jit(train.sum_rows, static_argnums=2)(ids, g, num_rows)
        assert found.dtype == jnp.float32
        atol = 2e-7 * np.abs(np.float64(g)).sum(axis=0).max()  # of the running sums
        np.testing.assert_allclose(found, expected, atol=atol)


def test_rows_of_one_sign_do_not_cancel_in_the_sum_of_an_id_that_occurs_once():
    rng, size = np.random.default_rng(0), 65536
    ids = rng.permutation(size)
    g = np.asarray(1 + 0.3 * rng.standard_normal((size, 4)), jnp.bfloat16)
    expected = np.zeros((size, 4))
    expected[ids] = np.float64(g)
    found = np.float64(jit(train.sum_rows, static_argnums=2)(ids, g, size))
    error = np.abs(found / expected - 1)
    assert np.mean(error) < 2e-5 and np.quantile(error, 0.99) < 1e-4


# ---- Where the state lives ----

# The axis that eight devices divide, and that of Muon's units
SPLIT = {"embed": 0, "head": 0}
SPLIT |= {"attention/w_q": 2, "attention/w_k": 2, "attention/w_v": 2, "attention/w_out": 1}
UNITS = SPLIT | {"blocks/w_up": 2, "blocks/w_down": 1}
del UNITS["embed"], UNITS["head"]


def whole(name):
    return SPECS[name].shape


def share(name):
    """The shape of a device's part of a weight."""
    return tuple(n // 8 if axis == SPLIT.get(name) else n for axis, n in enumerate(whole(name)))


def shares():
    """{weight, or slot of its optimizer state: the shape of a device's part}."""
    found = {}
    for name in SPECS:
        shape = share(name)
        if name in UNITS:
            squares = tuple(n if axis in (0, UNITS[name]) else 1 for axis, n in enumerate(shape))
            found |= {name: shape, f"{name}/momentum": shape, f"{name}/square": squares}
        else:
            found |= dict.fromkeys([name, f"{name}/m", f"{name}/v"], shape)
    return found


def test_weights_and_optimizer_state_are_split_over_eight_devices_stay_so_and_are_donated():
    built = eight()
    first, batch = built.init(), built.batch(random_rows(24))
    places = jax.tree.map(lambda leaf: leaf.sharding, first)
    after, _ = built.step(first, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert not batch["tokens"].is_deleted()
    for state in (built.init(), after):
        found = {}
        for name, leaf in (named(state.params) | named(state.opt_state)).items():
            assert leaf.dtype == jnp.float32
            (found[name],) = {shard.data.shape for shard in leaf.addressable_shards}
            distinct = {str(shard.index) for shard in leaf.addressable_shards}
            is_split = name in SPLIT or name.rpartition("/")[0] in SPLIT
            assert len(distinct) == (8 if is_split else 1), name
        assert found == shares()
    same = jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), after, places)
    assert all(jax.tree.leaves(same))
    numbers = sum(map(math.prod, shares().values())) + 1
    assert built.step.memory_analysis().alias_size_in_bytes == 4 * numbers


def test_a_weight_is_split_where_the_devices_divide_the_axis_its_row_names():
    def split_axes(num_devices, **changes):
        axes = {}
        for name, spec in named(param_specs(config(**changes))).items():
            axes[name] = train.split_axis(spec, num_devices)
        return {name: axis for name, axis in axes.items() if axis is not None}

    assert split_axes(8) == SPLIT
    assert split_axes(8, mlp_dim=40) == SPLIT | UNITS
    assert split_axes(5) == {}  # though D divides


# ---- What the compiled step exchanges ----


def reachable(name, computations):
    """This computation of a program and all that it calls."""
    attrs = " ".join(instruction.attrs for instruction in computations[name].values())
    called = set(re.findall(r"%([\w.\-]+)", attrs)) & set(computations)
    return {name}.union(*(reachable(other, computations) for other in called))


def exchanged(instructions):
    """{kind: sorted numbers of elements} of the results of the collectives among these."""
    found = collections.defaultdict(list)
    for instruction in instructions:
        kind = instruction.op.removesuffix("-start")
        if kind in COLLECTIVES:
            found[kind] += [math.prod(array.dims) for array in instruction.arrays]
    return {kind: sorted(sizes) for kind, sizes in found.items()}


def sizes_of(names, shape_of):
    return sorted(math.prod(shape_of(name)) for name in names)


def test_the_loop_exchanges_nothing_each_gradient_is_reduced_and_each_split_weight_gathered_once():
    computations, _ = parse(eight().step.as_text())
    loops = [i for part in computations.values() for i in part.values() if i.op == "while"]
    names_inside = set().union(*(reachable(loop.called("body"), computations) for loop in loops))
    inside, outside = [], []
    for name, part in computations.items():
        (inside if name in names_inside else outside).extend(part.values())
    assert {"dot", "custom-call"} & {i.op for i in inside}  # the model is in it
    assert exchanged(inside) == {}
    found = exchanged(outside)
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"}
    assert found["reduce-scatter"] == sizes_of(SPLIT, share)
    assert found["all-gather"] == sizes_of(SPLIT, whole)
    norms = 4 * 2 * [2]  # of the split matrices of two layers, before and after NorMuon
    loss_and_weight = [1, 1]
    copies = sizes_of(SPECS.keys() - SPLIT, whole)
    assert found["all-reduce"] == sorted(copies + loss_and_weight + norms)
    # w_q and w_out: four matrices of 20 x 48, padded to eight; w_k and w_v: four of 20 x 16.
    # An eighth of each goes there and back.
    assert sum(found["all-to-all"]) == 2 * (8 * 20 * 48 // 8 + 8 * 20 * 16 // 8)


def test_the_tied_step_reduces_one_table_and_gathers_one():
    computations, _ = parse(build(TIED, 8).step.as_text())
    found = exchanged(i for part in computations.values() for i in part.values())
    assert found["reduce-scatter"] == sizes_of(SPLIT.keys() - {"embed"}, share)
    assert found["all-gather"] == sizes_of(SPLIT.keys() - {"embed"}, whole)


# ---- Precision ----


def test_with_bfloat16_matmuls_masters_sums_and_scalars_are_float32_and_bfloat16_travels():
    cfg, mesh = config(compute_dtype="bfloat16"), make_mesh()
    function, arguments = train.list_programs(GPT, mesh, cfg)["train_0"]
    jaxpr, out = jax.make_jaxpr(function, return_shape=True)(*arguments)

    def kinds(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    assert kinds(out[0]) == kinds(arguments[0])
    found = list(equations(jaxpr.jaxpr))
    (loop,) = (e for e in found if e.primitive.name == "scan" and e.params["length"] == 3)
    sums = [v for v in loop.outvars if v.aval.shape[:1] != (3,)]  # the others: of each micro-step
    assert len(sums) == 7 + 2 * 12 + 2 + 3 and {v.aval.dtype.name for v in sums} == {"float32"}
    counts = {"dot_general": 0, "all_to_all": 4, "reduce_scatter": 6, "all_gather": 6}
    for name, count in counts.items():
        inputs = [v for e in found if e.primitive.name == name for v in e.invars]
        assert {v.aval.dtype.name for v in inputs if hasattr(v, "aval")} == {"bfloat16"}
        assert not count or len(inputs) == count, name
    copies = jax.eval_shape(lambda w: train.gather(w, param_specs(cfg), 1, cfg), WEIGHTS)
    single = {name for name, leaf in named(copies).items() if leaf.dtype == jnp.float32}
    assert single == {name for name in SPECS if name.endswith("_mix")}


# ---- Evaluation ----


def test_evaluation_scores_each_target_once_after_the_context_it_should_see():
    """On eight devices: 19 rows of 11 targets, some places empty."""
    cfg, mesh = config(micro_tokens=2 * LENGTH), make_mesh()
    tokens = np.concatenate([row for (row,) in random_rows(14, seed=9)])  # more than are read
    rows = train.plan_val(train.Shards([], [tokens], {}), cfg)
    batch = train.to_devices(rows, cfg.val, mesh, cfg)
    assert batch["tokens"].shape == (2, 16, 17)
    params = jax.device_put(WEIGHTS, train.state_shardings(GPT, mesh, cfg).params)
    nats, count = compiled(train.make_eval_step(GPT, mesh, cfg), params, batch)(params, batch)
    expected = []
    for start in range(0, 200, 11):
        stop = min(start + 11, 200)
        context = tokens[start - 5 : start] if start else [BOS] * 5
        row = np.concatenate([context, tokens[start:stop]]).astype(int)[None]
        logits = numpy_gpt.logits(WEIGHTS, row, (4, 9), (), CFG, packed=True)[0, 5:]
        expected += numpy_gpt.nats(logits, tokens[start + 1 : stop + 1].astype(int)).tolist()
    assert len(expected) == int(count) == 200
    assert float(nats) == pytest.approx(sum(expected), rel=1e-5)


# ---- Batches and rows ----


def test_a_batch_shape_holds_every_row_in_about_as_few_micro_steps_as_the_limit_allows():
    for num_rows, devices, micro_rows in itertools.product((1, 11, 24, 40), (1, 3, 8), (1, 5, 99)):
        cfg = config(micro_tokens=micro_rows * 16)
        stage = replace(STAGE, batch_tokens=num_rows * 16)
        num_micro, rows, width = batch_shape(stage, devices, cfg)
        per_device = math.ceil(num_rows / devices)
        limit = min(micro_rows, per_device)
        assert width == 17 and rows % devices == 0 and num_micro * rows >= num_rows
        fewest = math.ceil(per_device / limit)
        assert rows // devices <= limit and fewest <= num_micro <= 1.25 * fewest
        if num_micro > fewest:  # no place is empty then
            assert num_micro * rows == per_device * devices and per_device % fewest
    assert batch_shape(STAGE, 8, config(micro_tokens=3)) == (3, 8, 17)  # at least a row


def test_targets_are_the_next_tokens_and_what_is_not_there_weighs_nothing():
    tokens = jnp.array([[5, 6, 8, 9], [5] + 3 * [NO_TOKEN], 2 * [NO_TOKEN] + [3, 4]], jnp.uint16)
    read = jit(lambda **batch: train.inputs_and_targets(batch, CFG))
    batch = read(tokens=tokens, more=1)
    assert batch["tokens"].tolist() == [[5, 6, 8], [5, BOS, BOS], [BOS, BOS, 3]]
    assert batch["targets"].tolist() == [[6, 8, 9], [BOS, BOS, BOS], [BOS, 3, 4]]
    assert batch["weights"].tolist() == [[1, 1, 1], [0, 0, 0], [0, 1, 1]] and batch["more"] == 1
    weighed = read(tokens=tokens, weights=np.array([[0, 0.5, 1]] * 3))["weights"]
    assert weighed.tolist() == [[0, 0.5, 1], [0, 0, 0], [0, 0.5, 1]]
    assert weighed.dtype == batch["weights"].dtype == jnp.float32


def test_flops_per_token_are_counted_as_by_hand():
    stage = replace(STAGE, seq_len=32, short=5, long=0)
    cfg = config(stages=(stage,), num_layers=3)
    matrices = 3 * (20 * 48 + 2 * 20 * 16 + 48 * 20 + 2 * 20 * 37) + 256 * 20  # the head once
    matrices += 3 * 5 * 6 + 5 + 5  # gates of the heads, of the skip, of the smear
    matrices += 20 * 12 + 20 + 6  # the copy pointer's queries and keys, its logit, its sink
    attention = []
    for window in (5, 31, 5):
        pairs = sum(1 for t in range(32) for s in range(32) if t - window <= s <= t)
        # heads; q.k and p.v; 2 per dim; mean per token; forward, two backward
        attention.append(6 * 2 * (2 * 8) * pairs / 32 * 3)

    def count(cfg, stage=stage):
        return train.flops_per_token(stage, param_specs(cfg), cfg)

    assert count(cfg) == pytest.approx(6 * matrices + sum(attention), rel=1e-9)
    gone = 6 * (20 * 48 + 2 * 20 * 16 + 48 * 20 + 5 * 6) + attention[1]
    assert count(replace(cfg, mlp_only=(1,))) == pytest.approx(count(cfg) - gone, rel=1e-9)
    assert count(cfg, replace(stage, long=1000)) == count(cfg)  # past the row: no window
    assert count(cfg, replace(stage, candidates=60)) == count(cfg) - 6 * (256 - 60) * 20


# ---- Another architecture ----


def bigram_specs(cfg):
    specs = {
        "embed": Spec("V D", "V", train.normal(1.0), "embed"),
        "blocks": {"w_mix": Spec("L D M", "M", train.normal(0.1), "muon")},
        "head": Spec("V D", "V", train.normal(0.1), "head"),
    }
    return train.with_shapes(specs, train.axis_sizes(cfg) | {"M": cfg.model_dim})


def bigram_loss(weights, batch, key, stage, cfg):
    """Only the inputs are looked up; the head's whole gradient comes from the loss."""
    weight_N = batch["weights"].ravel()
    x_ND = batch["inputs"].reshape(-1, cfg.model_dim)
    y_ND = sum(jnp.tanh(train.matmul("ND,DM->NM", x_ND, p["w_mix"])) for p in weights["blocks"])
    label_N = jnp.sum(y_ND * weights["head"][batch["targets"].ravel()], axis=-1)
    nats = log_partition(y_ND, weights["head"], weight_N, cfg)
    return nats - jnp.sum(weight_N * train.softcap(label_N, cfg)), jnp.sum(weight_N)


def plain_loss(weights, batch, key, stage, cfg):
    """Without lookups: the gradients of both tables come from the loss."""
    batch = batch | {"inputs": weights["embed"][batch["tokens"]]}
    return bigram_loss(weights, batch, key, stage, cfg)


RULES = dict.fromkeys(["embed", "head"], train.Adam(0.1, beta1=0.5)) | {"muon": train.Adam(0.01)}
INPUTS = {"inputs": ("embed", "tokens")}
BIGRAM = train.Model({}, bigram_specs, lambda cfg: RULES, bigram_loss, None, lookups=INPUTS)


def test_tied_tables_get_the_gradients_of_both_uses_also_from_a_model_without_lookups():
    shapes = jax.tree.map(lambda spec: spec.shape, bigram_specs(TIED))
    weights = train.unstack(numpy_gpt.random_weights(TIED, shapes))
    batch = {"tokens": np.concatenate(random_rows(24)).reshape(4, 6, LENGTH + 1)}

    def sums(model, weights, batch):
        key, stage = jax.random.key(0), TIED.stages[0]
        return train.accumulate(weights, batch, key, 0, stage, model, TIED)

    without = BIGRAM._replace(loss=plain_loss, lookups={})
    found, expected = jit(lambda *given: (sums(BIGRAM, *given), sums(without, *given)))(
        weights, batch
    )
    assert np.all(np.any(found[2]["head"][: CFG.vocab_size], axis=1))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_another_model_trains_through_main_from_its_own_first_state(tmp_path, monkeypatch):
    """Its functions are told stage and batch, and a key of each micro-step of each device."""
    stages = Stage(0.2, 256, 16), Stage(1.0, 64, 8)
    told, keys, warm_up_keys, seen = set(), [], [], []

    def loss(weights, batch, key, stage, cfg):
        told.add((stage, *sorted(batch)))

        def note(step, data):
            keys.append((int(step), *data.tolist()))

        jax.debug.callback(note, batch["step"], jax.random.key_data(key))
        return bigram_loss(weights, batch, key, stage, cfg)

    def update(state, grads, stage, specs, rules, num_devices, cfg):
        told.add((stage, num_devices))
        return train.update(state, grads, stage, specs, rules, num_devices, cfg)

    def first_state(state, cfg):
        """With a head of zeros, so that the first loss is known."""
        jax.effects_barrier()  # after the warm-up
        warm_up_keys.extend(keys)
        keys.clear()
        head = jnp.zeros_like(state.params["head"])
        return state._replace(params=state.params | {"head": head})

    cfg = config(preset="demo", stages=stages, steps=30, vocab_size=None, bos_id=None)
    model = BIGRAM._replace(
        presets={"demo": cfg}, loss=loss, update=update, first_state=first_state
    )
    flags = ["--val_every=0", "--log_every=1", "--target_loss=0", f"--log_dir={tmp_path}/logs"]
    monkeypatch.setattr(train, "compiler_options", lambda mesh, cfg: FAST)
    run = train.main(make_folder(tmp_path / "data") + flags, model, seen.append)
    jax.effects_barrier()
    assert seen == list(range(1, 31))
    log = (run / "log.txt").read_text()
    losses = re.findall(r"^step:\d+/30 train_loss:(\S+)", log, re.MULTILINE)
    losses = [float(loss) for loss in losses]
    assert len(losses) == 30 and losses[0] == pytest.approx(math.log(257), abs=1e-3)
    assert losses[-1] < losses[0] - 1
    programs = re.findall(r"^compiled: (\w+)", log, re.MULTILINE)
    assert programs == ["init", "train_0", "train_1", "eval"]

    batch = ("inputs", "step", "targets", "tokens", "weights")
    assert told == {(stage, *batch) for stage in (*stages, CFG.val)} | {(s, 8) for s in stages}
    training = [key for key in keys if key[0] < 30]  # evaluation has step 30
    steps = sorted(step for step, *_ in set(training))
    wanted = {step: 8 * (2 if step < 6 else 1) for step in range(30)}  # devices, micro-steps
    assert collections.Counter(steps) == wanted and len(training) == len(steps)
    again = {key for key in warm_up_keys if key[0] == 0}  # as another run would have them
    assert again == {key for key in training if key[0] == 0}
