"""Two older recipes in this repository's loop: the same data, clock and evaluation.

    python -m scripts.baselines record2025 [flags of train.py]     the JAX record of August 2025
    python -m scripts.baselines nanogpt [flags of train.py]        nanoGPT's GPT-2, by AdamW

record2025 is modded-nanogpt-jax at commit 0316a10: value residual, embedding shortcut, U-net skips,
learned attention scale, Muon. nanogpt is nanoGPT at commit 3adf61e: LayerNorm, learned positions,
GELU, tied head, AdamW, clipping, cosine; no dropout. Both have a preset speedrun of their own size,
that of the record and GPT-2 of 124M parameters, and a preset demo of the demo's size.

What differs on purpose is train.py's for every model: weights, optimizer state, norms and softmax
in float32 (the record: bfloat16, and 0.0078 added in its norms), no logits for ids that pad the
vocabulary. A recipe's numbers are flags where train.py has the flag, else constants here.
"""

import functools
import math
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

import train
from train import (
    Adam,
    Model,
    Spec,
    Stage,
    constant,
    f32,
    lr_scale,
    matmul,
    move,
    normal,
    padding,
    plain_nats,
    product,
    ramp,
    relu_squared,
    replace,
    require,
    rms_norm,
    rotate,
    softcap,
    softcapped_logits,
    softmax_nats,
    split_axis,
    uniform,
)

# ---- Presets -------------------------------------------------------------------------------------

OFF = {  # what neither recipe reads, so other values are refused
    "optimizer": "muon",
    "attention": "xla",
    "num_kv_heads": None,
    "copy_dim": 0,
    "mlp_only": (),
    "long_layers": (),
    "offset_layers": (),
    "skips": (),
    "late_inputs": (),
    "backout": (),
    "gate_dims": 0,
    "smear": False,
}
# the same, columns of a stage
STAGE_OFF = ("doc_len", "short", "long", "ahead", "tied", "candidates")
RECORD = dict(
    softcap=(15.0, 15.0, 0.0),
    attn_scale=0.12,
    cooldown_frac=0.4,
    final_lr_scale=0.1,
    muon_lr=0.04,
    muon_wd=0.0,
    muon_momentum=(0.85, 0.95, 500, 0),
    adam_lr=0.008,
    adam_beta1=0.9,
    adam_beta2=0.95,
    adam_eps=1e-10,
    adam_wd=0.0,
    scalar_lr=0.04,
)
NANOGPT = dict(
    softcap=(),
    warmup_steps=100,
    final_lr_scale=0.1,
    adamw_lr=1e-3,
    adam_beta1=0.9,
    adam_beta2=0.99,
    adam_eps=1e-8,
    adam_wd=0.1,
)


def preset(base, recipe, stages, val, **own):
    return replace(base, **OFF | recipe | own, final_frac=0.0, stages=stages, val=val)


PRESETS = {
    "record2025": {
        "speedrun": preset(
            train.SPEEDRUN,
            RECORD,
            (Stage(0.5, 524_288, seq_len=1024), Stage(1.0, 524_288, seq_len=2048)),
            Stage(seq_len=2048),
            steps=1675,
            num_layers=12,
            model_dim=1024,
            num_heads=4,
            mlp_dim=4096,
            val_context=0,
        ),
        "demo": preset(
            train.DEMO,
            RECORD,
            (Stage(0.5, 2048, seq_len=128), Stage(1.0, 2048, seq_len=256)),
            Stage(seq_len=256),
        ),
    },
    "nanogpt": {
        "speedrun": preset(
            train.SPEEDRUN,
            NANOGPT,
            (Stage(1.0, 491_520, seq_len=1024),),
            Stage(seq_len=1024),
            num_layers=12,
            num_heads=12,
            head_dim=64,
            val_context=0,
            adamw_lr=6e-4,
            adam_beta2=0.95,
        ),
        "demo": preset(train.DEMO, NANOGPT, (Stage(1.0, 2048, seq_len=256),), Stage(seq_len=256)),
    },
}


def check(cfg):
    """Raises UsageError where a flag asks for what these recipes would pass over in silence."""
    for name, wanted in OFF.items():
        value = getattr(cfg, name)
        require(value == wanted, f"--{name}={value}: this baseline knows only {wanted}")
    for stage in (*cfg.stages, cfg.val):
        for name in STAGE_OFF:
            value, wanted = getattr(stage, name), getattr(Stage(), name)
            flag = f"--{'val' if stage == cfg.val else 'stages'}.{name}"
            require(value == wanted, f"{flag}={value}: this baseline knows only {wanted}")


# ---- What both share -----------------------------------------------------------------------------


def with_shapes(specs, cfg):
    """Also of axes that only these have: q, k and v in one, the U-net's skips, positions."""
    own = {
        "CHK": 3 * cfg.num_heads * cfg.head_dim,
        "U": cfg.num_layers // 2,
        "P": max(stage.seq_len for stage in (*cfg.stages, cfg.val)),
    }
    return train.with_shapes(specs, train.axis_sizes(cfg) | own)


def project(x_BTD, w_DN, cfg):
    """q, k, v [B, T, H, K] by one matrix."""
    qkv_BTN = matmul("BTD,DN->BTN", x_BTD, w_DN)
    return rearrange(qkv_BTN, "B T (C H K) -> C B T H K", C=3, H=cfg.num_heads)


def attend(q_BTHK, k_BSHK, v_BSHK, scale, w_out, cfg):
    """Causal attention over whole rows, and its output projection."""
    qkv = (z.astype(cfg.compute_dtype).swapaxes(1, 2) for z in (q_BTHK, k_BSHK, v_BSHK))
    q_BHTK, k_BHSK, v_BHSK = qkv
    past_TS = jnp.tril(jnp.ones((q_BHTK.shape[2], k_BHSK.shape[2]), bool))
    score_BHTS = scale * matmul("BHTK,BHSK->BHTS", q_BHTK, k_BHSK, f32)
    share_BHTS = jax.nn.softmax(jnp.where(past_TS[None, None], score_BHTS, -jnp.inf))
    y_BHTK = matmul("BHTS,BHSK->BHTK", share_BHTS, v_BHSK)
    return matmul("BTN,ND->BTD", rearrange(y_BHTK, "B H T K -> B T (H K)"), w_out)


def mlp(x_BTD, p, bend):
    return matmul("BTF,FD->BTD", bend(matmul("BTD,DF->BTF", x_BTD, p["w_up"])), p["w_down"])


def log_partition(x_ND, head_VD, weight_N, cfg):
    """Sum over tokens of weight * log sum_v exp(logit_v), in nats."""
    terms = {"weight": weight_N}
    return softmax_nats(x_ND, head_VD, terms, plain_nats, cfg, padding(cfg))


def loss(forward, head, weights, batch, key, stage, cfg):
    """(summed nats, summed weight). head: the name of the table that gives the logits."""
    x_BTD = forward(weights, batch["tokens"], batch["inputs"], cfg).astype(weights[head].dtype)
    label_BT = jnp.sum(x_BTD.astype(f32) * batch["labels"].astype(f32), axis=-1)
    x_ND = rearrange(x_BTD, "B T D -> (B T) D")
    weight_BT = batch["weights"]
    partition = log_partition(x_ND, weights[head], weight_BT.ravel(), cfg)
    return partition - jnp.sum(weight_BT * softcap(label_BT, cfg)), jnp.sum(weight_BT)


def logits(forward, head, weights, tokens_BT, cfg):
    x_BTD = forward(weights, tokens_BT, weights["embed"][tokens_BT], cfg)
    return jax.vmap(lambda x_TD: softcapped_logits(x_TD, weights[head], cfg))(x_BTD)


def descend(direction_of, state, grads, specs, rules, scale):
    """(params, opt_state) after a step along direction_of(spec, rule, gradient, slots)."""
    specs, tree = jax.tree.flatten(specs)
    params, slots = [], []
    leaves = map(tree.flatten_up_to, (state.params, grads, state.opt_state))
    for spec, p, grad, slot in zip(specs, *leaves, strict=True):
        rule = rules[spec.group]
        direction, slot = direction_of(spec, rule, grad, slot)
        params.append(move(p, direction, rule, spec, scale))
        slots.append(slot)
    return tree.unflatten(params), tree.unflatten(slots)


def model(name, specs, forward, head, rules, update):
    return Model(
        presets=PRESETS[name],
        specs=specs,
        rules=rules,
        loss=functools.partial(loss, forward, head),
        logits=functools.partial(logits, forward, head),
        update=update,
        lookups={"inputs": ("embed", "tokens"), "labels": (head, "targets")},
    )


# ---- record2025 ----------------------------------------------------------------------------------

EMBED_LR = 75  # times adam_lr, the head's: 0.6
ROPE_BASE = 1024.0
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: kellerjordan.github.io/posts/muon
NUM_ITERATIONS = 5


class RecordMuon(NamedTuple):
    """Muon without train.py's unit scales; record_update orthogonalizes."""

    lr: float
    wd: float
    cautious: bool = False

    def slots(self, spec):
        return {"momentum": spec}

    def direction(self, grad, slots, step, cfg):
        """Momentum rises over at most 30 % of the steps, so that short runs see all of it."""
        low, high, warmup, _ = cfg.muon_momentum
        momentum = low + (high - low) * ramp(step, 0.0, max(1.0, min(warmup, 0.3 * cfg.steps)))
        average = momentum * slots["momentum"] + (1 - momentum) * grad
        return momentum * average + (1 - momentum) * grad, {"momentum": average}


def record_specs(cfg):
    check(cfg)
    matrix = uniform(0.5 * cfg.model_dim**-0.5)  # within sqrt(0.75 / D) of zero
    blocks = {
        "w_qkv": Spec("L D CHK", "D", matrix, "muon"),  # one matrix to Muon
        "w_out": Spec("L HK D", "HK", constant(0.0), "muon"),
        "w_up": Spec("L D F", "F", matrix, "muon"),
        "w_down": Spec("L F D", "F", constant(0.0), "muon"),
        "attn_scale": Spec("L", "", constant(cfg.attn_scale), "scalar"),
        "v_mix": Spec("L", "", constant(0.5), "scalar"),  # share of the first layer's values
        "x_mix": Spec("L", "", constant(1.0), "scalar"),
        "x0_mix": Spec("L", "", constant(0.0), "scalar"),
    }
    specs = {
        "embed": Spec("V D", "V", normal(1.0), "embed"),
        "blocks": blocks,
        "head": Spec("V D", "V", constant(0.0), "head"),
        "skip_mix": Spec("U", "", constant(1.0), "scalar"),
    }
    return with_shapes(specs, cfg)


def record_rules(cfg):
    adam = Adam(cfg.adam_lr, cfg.adam_wd, cfg.adam_beta1, cfg.adam_beta2, cfg.adam_eps, False)
    return {
        "muon": RecordMuon(cfg.muon_lr, cfg.muon_wd),
        "embed": adam._replace(lr=EMBED_LR * cfg.adam_lr),
        "head": adam,
        "scalar": adam._replace(lr=cfg.scalar_lr, wd=0.0),
    }


def record_rotary(num_positions, cfg):
    """(cos, sin) [T, K/2] of half-RoPE. The slowest rate lies just above 1/1024; in train.py it is
    that."""
    quarter = cfg.head_dim // 4
    rates = [*ROPE_BASE ** -(np.arange(quarter) / quarter), *np.zeros(quarter)]
    angle_TK = np.outer(np.arange(num_positions), rates)
    return np.cos(angle_TK).astype(np.float32), np.sin(angle_TK).astype(np.float32)


def record_block(x_BTD, x0_BTD, v0_BTHK, p, table, cfg):
    """(stream, the first layer's values). v0_BTHK: those, None in the first layer
    (arXiv:2410.17897)."""
    x_BTD = (p["x_mix"] * x_BTD + p["x0_mix"] * x0_BTD).astype(x_BTD.dtype)
    q_BTHK, k_BTHK, v_BTHK = project(rms_norm(x_BTD), p["w_qkv"], cfg)
    v0_BTHK = v_BTHK if v0_BTHK is None else v0_BTHK
    v_BTHK = (1 - p["v_mix"]) * v_BTHK + p["v_mix"] * v0_BTHK
    q_BTHK, k_BTHK = (rotate(rms_norm(z), *table) for z in (q_BTHK, k_BTHK))
    y_BTD = attend(q_BTHK, k_BTHK, v_BTHK, p["attn_scale"], p["w_out"], cfg)
    x_BTD += y_BTD.astype(x_BTD.dtype)
    return x_BTD + mlp(rms_norm(x_BTD), p, relu_squared), v0_BTHK


def record_forward(weights, tokens_BT, embedded_BTD, cfg):
    """Normed final activations. The first half of the blocks hands its outputs to the second, the
    last to the first of these.

    The record's cap, 30 sigmoid(z / 7.5), is train.py's 15 tanh(z / 15) + 15: no softmax sees the
    15.
    """
    half = cfg.num_layers // 2
    table = record_rotary(tokens_BT.shape[1], cfg)
    x_BTD = x0_BTD = rms_norm(embedded_BTD.astype(cfg.stream_dtype))
    v0_BTHK, outputs = None, []
    for i, p in enumerate(weights["blocks"]):
        if half <= i < 2 * half:
            skip_BTD = weights["skip_mix"][i - half] * outputs[2 * half - 1 - i]
            x_BTD += skip_BTD.astype(x_BTD.dtype)
        x_BTD, v0_BTHK = record_block(x_BTD, x0_BTD, v0_BTHK, p, table, cfg)
        outputs.append(x_BTD)
    return rms_norm(x_BTD)


def newton_schulz(g_LMN, cfg):
    """Five quintic steps with the old coefficients, whatever train.py's are."""
    a, b, c = NEWTON_SCHULZ
    is_tall = g_LMN.shape[-2] > g_LMN.shape[-1]
    x = g_LMN.mT if is_tall else g_LMN
    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    x = (x / (norm + 1e-7)).astype(cfg.compute_dtype)
    for _ in range(NUM_ITERATIONS):
        gram = product("lmn,lkn->lmk", x, x).astype(x.dtype)
        poly = (b * gram + c * product("lmk,lkn->lmn", gram, gram)).astype(x.dtype)
        x = (a * x + product("lmk,lkn->lmn", poly, x)).astype(x.dtype)
    return (x.mT if is_tall else x).astype(f32)


def record_orthogonal(direction, spec, num_devices, cfg):
    """As in the record every device orthogonalizes every matrix, then keeps its share.

    A step is larger by sqrt(rows / columns) as the record stored them: of w_qkv outputs are rows,
    of the others inputs, so w_down gets twice, w_up once.
    """
    inputs, outputs = spec.shape[-2:]
    ratio = outputs / inputs if "CHK" in spec.axes else inputs / outputs
    larger = max(1, ratio) ** 0.5
    axis = split_axis(spec, num_devices)
    if axis is None:
        return larger * newton_schulz(direction, cfg)
    size = direction.shape[axis]
    share = direction.astype(cfg.compute_dtype)
    whole = lax.all_gather(share, "data", axis=axis, tiled=True).astype(f32)
    begin = lax.axis_index("data") * size
    return larger * lax.dynamic_slice_in_dim(newton_schulz(whole, cfg), begin, size, axis)


def record_update(state, grads, stage, specs, rules, num_devices, cfg):
    def direction_of(spec, rule, grad, slots):
        direction, slots = rule.direction(grad, slots, state.step, cfg)
        if isinstance(rule, RecordMuon):
            direction = record_orthogonal(direction, spec, num_devices, cfg)
        return direction, slots

    scale = lr_scale(state.step, stage, cfg)
    return descend(direction_of, state, grads, specs, rules, scale)


# ---- nanogpt -------------------------------------------------------------------------------------


def nanogpt_specs(cfg):
    """embed also gives the logits, so that its group is the one that the count of FLOPs sees."""
    check(cfg)
    small = normal(0.02 * (2 * cfg.num_layers) ** -0.5)  # of what is added to the stream
    blocks = {
        "norm_attention": Spec("L D", "", constant(1.0), "scalar"),
        "norm_mlp": Spec("L D", "", constant(1.0), "scalar"),
        "w_qkv": Spec("L D CHK", "D", normal(0.02), "matrix"),
        "w_out": Spec("L HK D", "HK", small, "matrix"),
        "w_up": Spec("L D F", "F", normal(0.02), "matrix"),
        "w_down": Spec("L F D", "F", small, "matrix"),
    }
    specs = {
        "embed": Spec("V D", "V", normal(0.02), "head"),
        "positions": Spec("P D", "D", normal(0.02), "embed"),
        "blocks": blocks,
        "norm_final": Spec("D", "", constant(1.0), "scalar"),
    }
    return with_shapes(specs, cfg)


def nanogpt_rules(cfg):
    adam = Adam(cfg.adamw_lr, cfg.adam_wd, cfg.adam_beta1, cfg.adam_beta2, cfg.adam_eps, False)
    return dict.fromkeys(("head", "embed", "matrix"), adam) | {"scalar": adam._replace(wd=0.0)}


def layer_norm(x, weight):
    """LayerNorm without a bias (arXiv:1607.06450), in float32."""
    y = x.astype(f32) - jnp.mean(x.astype(f32), axis=-1, keepdims=True)
    y *= lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5)
    return (y * weight[None, None]).astype(x.dtype)


def nanogpt_forward(weights, tokens_BT, embedded_BTD, cfg):
    """Normed final activations. Past the last learned position a row (of samples) stays at it."""
    last = len(weights["positions"]) - 1
    position_T = jnp.minimum(jnp.arange(tokens_BT.shape[1]), last)
    x_BTD = embedded_BTD.astype(cfg.stream_dtype)
    x_BTD += weights["positions"][position_T][None].astype(x_BTD.dtype)
    gelu = functools.partial(jax.nn.gelu, approximate=False)
    for p in weights["blocks"]:
        q_k_v = project(layer_norm(x_BTD, p["norm_attention"]), p["w_qkv"], cfg)
        x_BTD += attend(*q_k_v, cfg.head_dim**-0.5, p["w_out"], cfg).astype(x_BTD.dtype)
        x_BTD += mlp(layer_norm(x_BTD, p["norm_mlp"]), p, gelu)
    return layer_norm(x_BTD, weights["norm_final"])


def global_norm(grads, specs, num_devices):
    """Of all gradients together. Shares are summed over the devices, a copy counts once."""
    squares = {False: f32(0), True: f32(0)}
    for spec, g in zip(jax.tree.leaves(specs), jax.tree.leaves(grads), strict=True):
        is_split = split_axis(spec, num_devices) is not None
        squares[is_split] += jnp.sum(jnp.square(g))
    return jnp.sqrt(squares[False] + lax.psum(squares[True], "data"))


def nanogpt_lr(step, cfg):
    """Share of the peak: up over warmup_steps, then along half a cosine to final_lr_scale."""
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    half = 0.5 * (1 + jnp.cos(math.pi * jnp.clip(done, 0, 1)))
    cosine = cfg.final_lr_scale + (1 - cfg.final_lr_scale) * half
    return jnp.where(step < cfg.warmup_steps, (step + 1) / (cfg.warmup_steps + 1), cosine)


def nanogpt_update(state, grads, stage, specs, rules, num_devices, cfg):
    """AdamW after the gradients are clipped to a global norm of 1."""
    clip = jnp.minimum(1, 1 / (global_norm(grads, specs, num_devices) + 1e-6))

    def direction_of(spec, rule, grad, slots):
        return rule.direction(clip * grad, slots, state.step, cfg)

    scale = stage.lr * nanogpt_lr(state.step, cfg)
    return descend(direction_of, state, grads, specs, rules, scale)


# ---- main ----------------------------------------------------------------------------------------

MODELS = {
    "record2025": model(
        "record2025", record_specs, record_forward, "head", record_rules, record_update
    ),
    "nanogpt": model(
        "nanogpt", nanogpt_specs, nanogpt_forward, "embed", nanogpt_rules, nanogpt_update
    ),
}


def main(argv=None):
    """Train a baseline: its name, then flags. Returns the run's folder; raises as train.main."""
    name, *argv = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        return print(__doc__)
    known = " or ".join(MODELS)
    require(name in MODELS, f"{name}: wanted {known}, then flags of train.py")
    return train.main(argv, model=MODELS[name])


if __name__ == "__main__":
    sys.exit(train.command(main))
