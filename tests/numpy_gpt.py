"""The GPT of train.py once more, in plain float64 numpy, written from its docstrings: the tests' oracle.

One row, one layer, one head, one query at a time, in the words of the recipe; nothing is shared with train.py but
the weights' names and the Config's fields. `weights` are stacked over the layers that have them, as in the weight table.
"""
import numpy as np


def random_weights(cfg, shapes, seed=0):
    """Weights with no zeros and no symmetry, large enough that every part of the model matters.

    shapes: {"embed": shape, "blocks": {...}, ...}. Float32 values, so that oracle and model start from the same.
    """
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        if name == "x_mix":
            return rng.uniform(0.6, 1.4, shape)
        if name in ("x0_mix", "skip_mix"):
            return rng.uniform(0.2, 0.8, shape) * rng.choice([-1, 1], shape)
        std = {"embed": 0.3, "head": 0.5}.get(name, 1.3 * shape[-2] ** -0.5)
        return std * rng.standard_normal(shape)
    fill = lambda tree: {k: fill(v) if isinstance(v, dict) else np.float32(draw(k, v)) for k, v in tree.items()}
    return fill(shapes)


def rms_norm(x):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def rotated(x, position, cfg):
    """Dim j and dim j + K/2 are one complex number; the first K/4 of them turn by position * base^-(j / (K/4 - 1))."""
    half, quarter = cfg.head_dim // 2, cfg.head_dim // 4
    z = x[:half] + 1j * x[half:]
    for j in range(quarter):
        z[j] *= np.exp(1j * position * cfg.rope_base ** -(j / (quarter - 1)))
    return np.concatenate([z.real, z.imag])


def attention(x, layer, window, starts, offset, cfg):
    """x [T, D], starts: where each position's document begins, or zeros. offset: before their norm, the dims of a key that
    do not turn are those of the key before it, zero where its document has none. One query head at a time."""
    num_tokens, width = len(x), cfg.head_dim
    num_kv_heads = cfg.num_kv_heads or cfg.num_heads
    scale = cfg.attn_scale if cfg.attn_scale else 1 / np.sqrt(width)
    out = np.zeros((num_tokens, cfg.num_heads * width))
    for h in range(cfg.num_heads):
        g = h * num_kv_heads // cfg.num_heads
        mine, shared = slice(h * width, (h + 1) * width), slice(g * width, (g + 1) * width)
        q = np.array([rotated(rms_norm(x[t] @ layer["w_q"][:, mine]), t, cfg) for t in range(num_tokens)])
        k = x @ layer["w_k"][:, shared]
        if offset:
            still = [*range(width // 4, width // 2), *range(3 * width // 4, width)]
            k = np.array([[k[s - 1, j] * (starts[s] < s) if j in still else k[s, j] for j in range(width)] for s in range(num_tokens)])
        k = np.array([rotated(rms_norm(k[s]), s, cfg) for s in range(num_tokens)])
        v = x @ layer["w_v"][:, shared]
        for t in range(num_tokens):
            first = max(starts[t], t - window if window else 0, 0)
            score = np.exp(scale * k[first:t + 1] @ q[t])
            out[t, mine] = score @ v[first:t + 1] / score.sum()
    return out @ layer["w_out"]


def attention_and_gradients(q, k, v, first, g, cfg):
    """Raw q [B, T, HK] and k, v [B, T, GK], first [B, T]: the first key each query sees. Returns attention's output and the
    gradients of output . g in q, k and v, derived by hand."""
    q, k, v, g = (np.float64(x) for x in (q, k, v, g))
    (num_rows, num_tokens, _), width, half, quarter = q.shape, cfg.head_dim, cfg.head_dim // 2, cfg.head_dim // 4
    scale = cfg.attn_scale if cfg.attn_scale else 1 / np.sqrt(width)
    rate = np.array([cfg.rope_base ** -(j / (quarter - 1)) for j in range(quarter)] + [0.0] * (half - quarter))
    turn = np.exp(1j * np.arange(num_tokens)[:, None] * rate)
    def turned(x, by):
        z = (x[:, :half] + 1j * x[:, half:]) * by
        return np.concatenate([z.real, z.imag], axis=1)
    def norm_backward(x, dy):
        r = 1 / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + 1e-6)
        return r * dy - x * r ** 3 * np.mean(dy * x, axis=1, keepdims=True)
    y, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for b in range(num_rows):
        seen = (np.arange(num_tokens) >= first[b][:, None]) & (np.arange(num_tokens) <= np.arange(num_tokens)[:, None])
        for h in range(q.shape[2] // width):
            shared = h * k.shape[2] // q.shape[2]
            mine, shared = slice(h * width, (h + 1) * width), slice(shared * width, (shared + 1) * width)
            raw_q, raw_k = q[b][:, mine], k[b][:, shared]
            z_q, z_k = turned(rms_norm(raw_q), turn), turned(rms_norm(raw_k), turn)
            p = np.where(seen, np.exp(scale * z_q @ z_k.T), 0)
            p /= p.sum(axis=1, keepdims=True)
            y[b][:, mine] = p @ v[b][:, shared]
            dp = g[b][:, mine] @ v[b][:, shared].T
            ds = scale * p * (dp - (p * dp).sum(axis=1, keepdims=True))
            dq[b][:, mine] = norm_backward(raw_q, turned(ds @ z_k, turn.conj()))
            dk[b][:, shared] += norm_backward(raw_k, turned(ds.T @ z_q, turn.conj()))
            dv[b][:, shared] += p.T @ g[b][:, mine]
    return y, (dq, dk, dv)


def logits(weights, tokens, windows, cfg, packed):
    """[B, T, vocab_size]. windows: per layer; packed: attention stays in its document, which begins with cfg.bos_id."""
    weights = {k: {n: np.float64(w) for n, w in v.items()} if isinstance(v, dict) else np.float64(v)
               for k, v in weights.items()}
    rows = []
    for row in np.asarray(tokens):
        starts, start = [], 0
        for t, token in enumerate(row):
            start = t if packed and token == cfg.bos_id else start
            starts.append(start)
        x0 = x = rms_norm(weights["embed"][row])
        after = []
        for i in range(cfg.num_layers):
            layer, mlp_only = {name: w[i] for name, w in weights["blocks"].items()}, cfg.mlp_only.split(",")
            for j, pair in enumerate(filter(None, cfg.skips.split(","))):
                source, destination = map(int, pair.split(">"))
                if destination == i:
                    x = x + weights["skip_mix"][j] * after[source]
            x = layer["x_mix"] * x + layer["x0_mix"] * x0
            if str(i) not in mlp_only:
                heads = {name: w[sum(str(j) not in mlp_only for j in range(i))] for name, w in weights["attention"].items()}
                x = x + attention(rms_norm(x), heads, windows[i], starts, str(i) in cfg.offset_layers.split(","), cfg)
            x = x + np.maximum(rms_norm(x) @ layer["w_up"], 0) ** 2 @ layer["w_down"]
            after.append(x)
        head = weights["embed" if cfg.tie_embed else "head"]
        z = rms_norm(x) @ head[:cfg.vocab_size].T
        rows.append(cfg.softcap * np.tanh(z / cfg.softcap) if cfg.softcap else z)
    return np.array(rows)


def nats(logits, targets):
    """-log softmax(logits)[target], one number per target."""
    largest = logits.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(logits - largest).sum(axis=-1)) + largest[..., 0]
    return log_sum - np.take_along_axis(logits, np.asarray(targets)[..., None], axis=-1)[..., 0]
