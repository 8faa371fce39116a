"""Two older recipes in this repository's loop: the same data, loader, clock and evaluation, so that only the recipe differs.

    python -m scripts.baselines record2025 [flags of train.py]     the JAX record of August 2025
    python -m scripts.baselines nanogpt [flags of train.py]        nanoGPT's GPT-2, by AdamW

record2025: modded-nanogpt-jax at commit 0316a10 (value residual, embedding shortcut, U-net skips, learned attention scale, Muon);
nanogpt: nanoGPT at commit 3adf61e (LayerNorm, learned positions, GELU, tied head, AdamW, clipping, cosine; no dropout).
--preset=speedrun gives them their own sizes: those of the record, and GPT-2 of 124M parameters; --preset=demo that of the demo.

What differs on purpose is train.py's for every model: weights, optimizer state, norms and softmax in float32 (the record: bfloat16,
and 0.0078 added in its norms), no logits for ids that pad the vocabulary. A recipe's numbers are flags (FLAGS), put before yours.
"""
import functools, sys

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

import train
from train import (Model, Rule, Spec, adam_direction, capped, constant, f32, log_partition, lookup, lr_scale, matmul, muon_direction,
                   normal, product, relu_squared, rms_norm, rotate, shape_of, softcapped_logits, split_axis, stages, uniform)

# ---- Flags -----------------------------------------------------------------------------------------------------------
# By recipe and preset, after those for all presets. Neither recipe reads OFF, so other values are refused.
OFF = {"optimizer": "muon", "max_doc_len": "0", "window_short": "0", "window_long": "0", "val_window_short": 0, "val_window_long": 0,
       "skips": "", "mlp_only": "", "offset_layers": "", "long_layers": "", "num_kv_heads": 0, "late_inputs": "", "backout": "",
       "gate_dims": 0, "smear": 0, "mtp": "", "tied_stages": 0}
PLAIN = " ".join(f"--{name}={value}" for name, value in OFF.items()) + " --stage_lr=1 --final_frac=0"
FLAGS = {
    "record2025": {
        "all": PLAIN + " --softcap=15 --attn_scale=0.12 --rope_base=1024 --muon_lr=0.04 --muon_wd=0 --ns_steps=5 "
               "--muon_momentum=0.85,0.95,500,0 --embed_lr=0.6 --head_lr=0.008 --scalar_lr=0.04 --adam_beta1=0.9 --adam_beta2=0.95 "
               "--adam_eps=1e-10 --adam_wd=0 --warmup_steps=0 --cooldown_frac=0.4 --final_lr_scale=0.1 --stage_ends=0.5,1",
        "speedrun": "--steps=1675 --num_layers=12 --model_dim=1024 --num_heads=4 --head_dim=256 --mlp_dim=4096 "
                    "--batch_tokens=524288 --seq_len=1024,2048 --val_seq_len=2048 --val_context=0",
        "demo": "--batch_tokens=2048 --seq_len=128,256", "tiny": "--batch_tokens=1024 --seq_len=32,64"},
    "nanogpt": {
        "all": PLAIN + " --softcap=0 --adamw_lr=1e-3 --adam_wd=0.1 --adam_beta1=0.9 --adam_beta2=0.99 --adam_eps=1e-8 "
               "--warmup_steps=100 --final_lr_scale=0.1 --stage_ends=1",
        "speedrun": "--num_layers=12 --model_dim=768 --num_heads=12 --head_dim=64 --mlp_dim=3072 --batch_tokens=491520 "
                    "--seq_len=1024 --val_seq_len=1024 --val_context=0 --adamw_lr=6e-4 --adam_beta2=0.95",
        "demo": "--batch_tokens=2048", "tiny": "--batch_tokens=1024 --seq_len=64 --warmup_steps=5"}}

# Axes that only these have: q, k and v of all heads in one, the skips of the U-net, learned positions
train.AXIS_SIZE |= {
    "CHK": lambda cfg: 3 * cfg.num_heads * cfg.head_dim, "U": lambda cfg: cfg.num_layers // 2,
    "P": lambda cfg: max(cfg.val_seq_len, *(stage.seq_len for stage in stages(cfg)))}

def check(cfg):
    """Raises UsageError where a flag asks for what these recipes would pass over in silence."""
    for name, wanted in OFF.items():
        if getattr(cfg, name) != wanted:
            raise train.UsageError(f"--{name}={getattr(cfg, name)}: this baseline knows only --{name}={wanted}")

# ---- What both share -------------------------------------------------------------------------------------------------
def project(x_BTD, w_DN, cfg):  # q, k, v [B, T, H, K] by one matrix
    return rearrange(matmul("BTD,DN->BTN", x_BTD, w_DN), "B T (C H K) -> C B T H K", C=3, H=cfg.num_heads)

def attend(q_BTHK, k_BSHK, v_BSHK, scale, w_out, cfg):
    """Causal attention over whole rows, and its output projection."""
    q_BHTK, k_BHSK, v_BHSK = (z.astype(cfg.compute_dtype).swapaxes(1, 2) for z in (q_BTHK, k_BSHK, v_BSHK))
    past_TS = jnp.tril(jnp.ones((q_BHTK.shape[2], k_BHSK.shape[2]), bool))
    score_BHTS = jnp.where(past_TS[None, None], scale * matmul("BHTK,BHSK->BHTS", q_BHTK, k_BHSK, f32), -jnp.inf)
    y_BHTK = matmul("BHTS,BHSK->BHTK", jax.nn.softmax(score_BHTS), v_BHSK)
    return matmul("BTN,ND->BTD", rearrange(y_BHTK, "B H T K -> B T (H K)"), w_out)

def mlp(x_BTD, p, bend): return matmul("BTF,FD->BTD", bend(matmul("BTD,DF->BTF", x_BTD, p["w_up"])), p["w_down"])
def fetched(weights): return [weights["fetch"](p, "blocks") if "fetch" in weights else p for p in weights["blocks"]]  # with --fsdp=1

def loss(forward, head, weights, tokens_BT, target_BT, weight_BT, stage, cfg):
    """Summed nats of the targets, each times its weight. head: the name of the table that gives the logits."""
    x_BTD = forward(weights, tokens_BT, cfg).astype(weights[head].dtype)
    label_BT = jnp.sum(x_BTD.astype(f32) * lookup(weights, head, target_BT, "targets").astype(f32), axis=-1)
    partition = log_partition(rearrange(x_BTD, "B T D -> (B T) D"), weights[head], weight_BT.ravel(), cfg)
    return partition - jnp.sum(weight_BT * capped(label_BT, cfg))

def logits(forward, head, weights, tokens_BT, cfg):
    return jax.vmap(lambda x_TD: softcapped_logits(x_TD, weights[head], cfg))(forward(weights, tokens_BT, cfg))

def descend(direction_of, scale, rules, specs, *trees):
    """(params, opt_state) after one step along direction_of(spec, rule, gradient, slots) -> (direction, slots), with decoupled decay."""
    (specs, tree), results = jax.tree.flatten(specs), []
    for spec, p, g, slots in zip(specs, *map(tree.flatten_up_to, trees)):
        rule = rules[spec.group]
        direction, slots = direction_of(spec, rule, g, slots)
        results.append((p * (1 - scale * rule.lr * rule.wd) - scale * rule.lr * direction, slots))
    return tuple(tree.unflatten(column) for column in zip(*results))

# ---- record2025 ------------------------------------------------------------------------------------------------------
def record_specs(cfg):
    check(cfg)
    matrix = uniform(0.5 * cfg.model_dim ** -0.5)  # within sqrt(0.75 / D) of zero
    return {
        "embed": Spec("V D", normal(1.0), "embed"),
        "blocks": {
            "w_qkv": Spec("L D CHK", matrix, "muon"),  # one matrix to Muon
            "w_out": Spec("L HK D", constant(0.0), "muon"),
            "w_up": Spec("L D F", matrix, "muon"),
            "w_down": Spec("L F D", constant(0.0), "muon"),
            "attn_scale": Spec("L", constant(cfg.attn_scale), "scalar"),
            "v_mix": Spec("L", constant(0.5), "scalar"),  # share of the first layer's values
            "x_mix": Spec("L", constant(1.0), "scalar"), "x0_mix": Spec("L", constant(0.0), "scalar")},
        "head": Spec("V D", constant(0.0), "head"),
        "skip_mix": Spec("U", constant(1.0), "scalar")}

def record_rules(cfg):
    adam = functools.partial(Rule, "adam", wd=cfg.adam_wd, beta1=cfg.adam_beta1, beta2=cfg.adam_beta2, eps=cfg.adam_eps)
    return {"muon": Rule("muon", lr=cfg.muon_lr, wd=cfg.muon_wd), "embed": adam(lr=cfg.embed_lr), "head": adam(lr=cfg.head_lr),
            "scalar": adam(lr=cfg.scalar_lr, wd=0.0)}

def record_rotary(num_positions, cfg):
    """(cos, sin) [T, K/2] of half-RoPE. The slowest rate lies just above 1/rope_base; in train.py it is that."""
    quarter = cfg.head_dim // 4
    angle_TK = np.outer(np.arange(num_positions), [*cfg.rope_base ** -(np.arange(quarter) / quarter), *np.zeros(quarter)])
    return np.cos(angle_TK).astype(np.float32), np.sin(angle_TK).astype(np.float32)

def record_block(x_BTD, x0_BTD, v0_BTHK, p, table, cfg):
    """(stream, the first layer's values). v0_BTHK: those values, None in the first layer (arXiv:2410.17897)."""
    x_BTD = (p["x_mix"] * x_BTD + p["x0_mix"] * x0_BTD).astype(x_BTD.dtype)
    q_BTHK, k_BTHK, v_BTHK = project(rms_norm(x_BTD), p["w_qkv"], cfg)
    v0_BTHK = v_BTHK if v0_BTHK is None else v0_BTHK
    v_BTHK = (1 - p["v_mix"]) * v_BTHK + p["v_mix"] * v0_BTHK
    q_BTHK, k_BTHK = (rotate(rms_norm(z), table) for z in (q_BTHK, k_BTHK))
    x_BTD += attend(q_BTHK, k_BTHK, v_BTHK, p["attn_scale"], p["w_out"], cfg).astype(x_BTD.dtype)
    return x_BTD + mlp(rms_norm(x_BTD), p, relu_squared), v0_BTHK

def record_forward(weights, tokens_BT, cfg):
    """Normed final activations. The first half of the blocks hands its outputs to the second, the last to the first of these.
    The record's cap, 30 sigmoid(z / 7.5), is train.py's 15 tanh(z / 15) + 15: no softmax sees the 15."""
    half, table, v0_BTHK, outputs = cfg.num_layers // 2, record_rotary(tokens_BT.shape[1], cfg), None, []
    x_BTD = x0_BTD = rms_norm(lookup(weights, "embed", tokens_BT, "inputs").astype(cfg.activation_dtype))
    for i, p in enumerate(fetched(weights)):
        if half <= i < 2 * half:
            x_BTD += (weights["skip_mix"][i - half] * outputs[2 * half - 1 - i]).astype(x_BTD.dtype)
        x_BTD, v0_BTHK = record_block(x_BTD, x0_BTD, v0_BTHK, p, table, cfg)
        outputs.append(x_BTD)
    return rms_norm(x_BTD)

def newton_schulz(g_LMN, cfg):
    """Five quintic steps with the coefficients of Jordan et al. 2024, whatever train.py's are: kellerjordan.github.io/posts/muon"""
    wide = g_LMN.shape[-2] <= g_LMN.shape[-1]
    x = g_LMN if wide else g_LMN.mT
    x = (x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)).astype(cfg.compute_dtype)
    for _ in range(cfg.ns_steps):
        gram = product("lmn,lkn->lmk", x, x).astype(x.dtype)
        poly = (-4.7750 * gram + 2.0315 * product("lmk,lkn->lmn", gram, gram)).astype(x.dtype)
        x = (3.4445 * x + product("lmk,lkn->lmn", poly, x)).astype(x.dtype)
    return (x if wide else x.mT).astype(f32)

def record_muon(spec, grad, slots, momentum, num_devices, cfg):
    """(direction, slots). As in the record every device orthogonalizes every matrix, then keeps its share. A step is larger by
    sqrt(rows / columns) as the record stored them: of w_qkv outputs are rows, of the others inputs, so w_down gets twice, w_up once."""
    ahead, slots = muon_direction(grad, slots, momentum)
    axis, (inputs, outputs) = split_axis(spec, cfg, num_devices), shape_of(spec, cfg)[-2:]
    larger = max(1, outputs / inputs if "CHK" in spec.axes else inputs / outputs) ** 0.5
    if axis is None:
        return larger * newton_schulz(ahead, cfg), slots
    axis, size = grad.ndim + axis, grad.shape[axis]
    whole = newton_schulz(jax.lax.all_gather(ahead.astype(cfg.compute_dtype), "data", axis=axis, tiled=True).astype(f32), cfg)
    return larger * jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index("data") * size, size, axis), slots

def record_update(params, grads, opt_state, step, stage, specs, rules, num_devices, cfg):
    """Momentum rises over at most 30 % of the steps, so that short runs see all of it."""
    low, high, warmup, _ = map(float, cfg.muon_momentum.split(","))
    momentum = low + (high - low) * jnp.clip(step / max(1, min(warmup, 0.3 * cfg.steps)), 0, 1)
    def direction_of(spec, rule, g, slots):
        if rule.kind == "muon":
            return record_muon(spec, g, slots, momentum, num_devices, cfg)
        return adam_direction(g, slots, step.astype(f32), rule)
    return descend(direction_of, lr_scale(step, stage, cfg), rules, specs, params, grads, opt_state)

# ---- nanogpt ---------------------------------------------------------------------------------------------------------
def nanogpt_specs(cfg):
    check(cfg)
    small = normal(0.02 * (2 * cfg.num_layers) ** -0.5)  # of what is added to the stream
    return {
        "embed": Spec("V D", normal(0.02), "head"),  # head: it also gives the logits, which the count of FLOPs should see
        "positions": Spec("P D", normal(0.02), "embed"),
        "blocks": {
            "norm_attention": Spec("L D", constant(1.0), "scalar"), "norm_mlp": Spec("L D", constant(1.0), "scalar"),
            "w_qkv": Spec("L D CHK", normal(0.02), "matrix"),
            "w_out": Spec("L HK D", small, "matrix"),
            "w_up": Spec("L D F", normal(0.02), "matrix"),
            "w_down": Spec("L F D", small, "matrix")},
        "norm_final": Spec("D", constant(1.0), "scalar")}

def nanogpt_rules(cfg):
    adam = functools.partial(Rule, "adam", lr=cfg.adamw_lr, beta1=cfg.adam_beta1, beta2=cfg.adam_beta2, eps=cfg.adam_eps)
    return dict.fromkeys(("head", "embed", "matrix"), adam(wd=cfg.adam_wd)) | {"scalar": adam(wd=0.0)}

def layer_norm(x, weight):
    """LayerNorm without a bias (arXiv:1607.06450), in float32."""
    y = x.astype(f32) - jnp.mean(x.astype(f32), axis=-1, keepdims=True)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5) * weight[None, None]).astype(x.dtype)

def nanogpt_forward(weights, tokens_BT, cfg):
    """Normed final activations. Past the last learned position a row (of samples) stays at it."""
    position_T = jnp.minimum(jnp.arange(tokens_BT.shape[1]), len(weights["positions"]) - 1)
    x_BTD = lookup(weights, "embed", tokens_BT, "inputs").astype(cfg.activation_dtype)
    x_BTD += weights["positions"][position_T][None].astype(x_BTD.dtype)
    for p in fetched(weights):
        q_k_v = project(layer_norm(x_BTD, p["norm_attention"]), p["w_qkv"], cfg)
        x_BTD += attend(*q_k_v, cfg.head_dim ** -0.5, p["w_out"], cfg).astype(x_BTD.dtype)
        x_BTD += mlp(layer_norm(x_BTD, p["norm_mlp"]), p, functools.partial(jax.nn.gelu, approximate=False))
    return layer_norm(x_BTD, weights["norm_final"])

def global_norm(grads, specs, num_devices, cfg):
    """Of all gradients together. What is split over the devices is summed over them, a copy on each counts once."""
    squares = {False: f32(0), True: f32(0)}
    for spec, g in zip(jax.tree.leaves(specs), jax.tree.leaves(grads)):
        squares[split_axis(spec, cfg, num_devices) is not None] += jnp.sum(jnp.square(g))
    return jnp.sqrt(squares[False] + jax.lax.psum(squares[True], "data"))

def nanogpt_lr(step, cfg):
    """Share of the peak: up over warmup_steps, then along half a cosine to final_lr_scale."""
    done = jnp.clip((step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps), 0, 1)
    cosine = cfg.final_lr_scale + (1 - cfg.final_lr_scale) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    return jnp.where(step < cfg.warmup_steps, (step + 1) / (cfg.warmup_steps + 1), cosine)

def nanogpt_update(params, grads, opt_state, step, stage, specs, rules, num_devices, cfg):
    """AdamW after the gradients are clipped to a global norm of 1."""
    clip = jnp.minimum(1, 1 / (global_norm(grads, specs, num_devices, cfg) + 1e-6))
    direction_of = lambda spec, rule, g, slots: adam_direction(clip * g, slots, step.astype(f32), rule)
    return descend(direction_of, stage.lr * nanogpt_lr(step, cfg), rules, specs, params, grads, opt_state)

# ---- main ------------------------------------------------------------------------------------------------------------
def seam(specs, forward, head, rules, update):
    return Model(specs, functools.partial(loss, forward, head), rules, functools.partial(logits, forward, head), update)
MODELS = {"record2025": seam(record_specs, record_forward, "head", record_rules, record_update),
          "nanogpt": seam(nanogpt_specs, nanogpt_forward, "embed", nanogpt_rules, nanogpt_update)}

def with_recipe(name, argv):
    """The recipe's flags for the preset that train.py will choose, then the user's."""
    given = train.parse_flags(argv)
    if given.get("cpu_devices"):
        jax.config.update("jax_num_cpu_devices", given["cpu_devices"])  # before choose_preset asks for a device
    return [*FLAGS[name]["all"].split(), *FLAGS[name].get(train.choose_preset(given)[0], "").split(), *argv]

def main(argv=None):
    """Train a baseline: its name, then flags of train.py. Returns the run's folder; raises as train.main does."""
    name, *argv = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        return print(__doc__)
    if name not in MODELS:
        raise train.UsageError(f"{name!r}: wanted {' or '.join(MODELS)}, then flags of train.py")
    return train.main(with_recipe(name, argv), model=MODELS[name])

if __name__ == "__main__":
    sys.exit(train.command(main))
