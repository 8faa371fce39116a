"""The GPT of train.py once more, in plain float64 numpy, from the recipe's equations: an oracle.

One row, one layer, one head at a time, in the words of the recipe. Nothing is shared
with train.py but the weights' names and the Config's fields. `weights` are stacked over the layers
that have them, as in the weight table. `longs`: the long windows of the stages so far, for YaRN.
"""

import itertools

import numpy as np

COPY_WINDOW = 2048  # tokens that the pointer looks back


def random_weights(cfg, shapes, seed=0):
    """Weights with no zeros and no symmetry, large enough that every part of the model matters.

    shapes: {"embed": shape, "blocks": {...}, ...}. Float32, so that oracle and model have the same.
    """
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        if name in ("x_mix", "y_mix"):
            return rng.uniform(0.6, 1.4, shape)
        if name.endswith("_mix"):
            return rng.uniform(0.3, 0.8, shape) * rng.choice([-1, 1], shape)
        if "gate" in name or name in ("copy_sink", "copy_logit"):
            return rng.standard_normal(shape)
        std = {"embed": 0.3, "head": 0.5}.get(name, 1.3 * shape[-2] ** -0.5)
        return std * rng.standard_normal(shape)

    def fill(name, shape):
        if isinstance(shape, dict):
            return {key: fill(key, value) for key, value in shape.items()}
        return np.float32(draw(name, shape))

    return fill("", shapes)


def rms_norm(x):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def turning(cfg, longs):
    """(radians per token of the K/4 pairs that turn, the scale of q.k).

    At first 1024^-(j / (K/4 - 1)). Then YaRN, whenever the long window goes from `old` to `new`: a
    pair that turned 32 times in the old one keeps its rate, one that did not turn once has it
    times old / new, linear between; and the scale grows by 1 + 0.2 ln(new / old).
    """
    count = cfg.head_dim // 4
    rate = [1024 ** -(j / (count - 1)) for j in range(count)]
    scale = cfg.attn_scale
    for old, new in itertools.pairwise(longs):
        for j in range(count):
            keeps = min(max((old * rate[j] / (2 * np.pi) - 1) / 31, 0), 1)
            rate[j] *= old / new + keeps * (1 - old / new)
        scale *= 1 + 0.2 * np.log(new / old)
    return rate, scale


def rotated(x, place, rate):
    """Dims j and j + K/2 are one complex number; the first K/4 of them turn by place * rate.

    x [T, K], place [T].
    """
    half = x.shape[1] // 2
    angle = np.outer(place, [*rate, *[0.0] * (half - len(rate))])
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=1)


def before(x):
    """Each position's left neighbour; zeros at the first."""
    return np.concatenate([np.zeros_like(x[:1]), x[:-1]])


def one_head(q, k, v, first, rate, scale):
    """Of raw q, k, v [T, K]; query t sees the keys first[t] .. t.

    Returns (output, shares of the keys, normed and turned q, the same of k).
    """
    place = np.arange(len(q))
    z_q, z_k = (rotated(rms_norm(x), place, rate) for x in (q, k))
    seen = (place >= first[:, None]) & (place <= place[:, None])
    shares = np.where(seen, np.exp(scale * z_q @ z_k.T), 0)
    shares /= shares.sum(axis=1, keepdims=True)
    return shares @ v, shares, z_q, z_k


def attention(u, layer, window, starts, offset, longs, cfg):
    """u [T, D], starts: where each position's document begins, or zeros.

    offset: before their norm, the dims of a key that do not turn are those of the key before it,
    zero where its document has none. What comes out of a query head is let through by
    sigmoid(w . first dims of u).
    """
    num_tokens, width = len(u), cfg.head_dim
    num_kv_heads = cfg.num_kv_heads or cfg.num_heads
    rate, scale = turning(cfg, longs)
    place = np.arange(num_tokens)
    first = np.maximum(starts, place - window) if window else starts
    out = np.zeros((num_tokens, cfg.num_heads * width))
    for h in range(cfg.num_heads):
        g = h * num_kv_heads // cfg.num_heads
        mine, shared = slice(h * width, (h + 1) * width), slice(g * width, (g + 1) * width)
        q, k, v = (
            u @ layer["w_q"][:, mine],
            u @ layer["w_k"][:, shared],
            u @ layer["w_v"][:, shared],
        )
        if offset:
            still = [*range(width // 4, width // 2), *range(3 * width // 4, width)]
            has_left = (starts < place)[:, None]
            k[:, still] = before(k)[:, still] * has_left
        out[:, mine], *_ = one_head(q, k, v, first, rate, scale)
        if cfg.gate_dims:
            opened = sigmoid(u[:, : cfg.gate_dims] @ layer["gate"][:, h])
            out[:, mine] *= opened[:, None]
    return out @ layer["w_out"]


def norm_backward(x, dy):
    """The gradient by x of rms_norm(x) . dy."""
    r = 1 / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + 1e-6)
    return r * dy - x * r**3 * np.mean(dy * x, axis=1, keepdims=True)


def attention_and_gradients(q, k, v, gate, first, g, cfg):
    """Gated attention's output and the gradients of output . g in q, k, v and gate, by hand.

    Raw q [B, T, HK] and k, v [B, T, GK], gate [B, T, H], first [B, T]: the first key a query sees.
    """
    gate_BTN, product_BTN = np.repeat(np.float64(gate), cfg.head_dim, axis=2), np.float64(g)
    q, k, v, g = (np.float64(x) for x in (q, k, v, g * gate_BTN))
    (num_rows, num_tokens, _), width = q.shape, cfg.head_dim
    rate, scale = turning(cfg, ())
    back = -np.arange(num_tokens)
    y, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for b, h in np.ndindex(num_rows, gate.shape[2]):
        group = h * k.shape[2] // q.shape[2]
        mine = b, slice(None), slice(h * width, (h + 1) * width)
        shared = b, slice(None), slice(group * width, (group + 1) * width)
        y[mine], p, z_q, z_k = one_head(q[mine], k[shared], v[shared], first[b], rate, scale)
        dp = g[mine] @ v[shared].T
        ds = scale * p * (dp - (p * dp).sum(axis=1, keepdims=True))
        dq[mine] = norm_backward(q[mine], rotated(ds @ z_k, back, rate))
        dk[shared] += norm_backward(k[shared], rotated(ds.T @ z_q, back, rate))
        dv[shared] += p.T @ g[mine]
    dgate = (product_BTN * y).reshape(*gate.shape, width).sum(axis=3)
    return y * gate_BTN, (dq, dk, dv, dgate)


def copy_sums_and_gradients(q, k, targets, first, dsum, dhit):
    """(sum, hit) [B, T] of the copy pointer, gradients of sum . dsum + hit . dhit by q and k.

    Query t sums exp(q.k) over the keys first[t] .. t - 1, and over those with its own target.
    """
    q, k, dsum, dhit = (np.float64(x) for x in (q, k, dsum, dhit))
    place = np.arange(q.shape[1])
    sums, hits, dq, dk = np.zeros(first.shape), np.zeros(first.shape), q * 0, k * 0
    for b in range(len(q)):
        seen = (place >= first[b][:, None]) & (place < place[:, None])
        e = np.where(seen, np.exp(q[b] @ k[b].T), 0)
        same = targets[b][:, None] == targets[b]
        sums[b], hits[b] = e.sum(axis=1), (e * same).sum(axis=1)
        ds = e * (dsum[b][:, None] + dhit[b][:, None] * same)
        dq[b], dk[b] = ds @ k[b], ds.T @ q[b]
    return (sums, hits), (dq, dk)


def final_activations(weights, row, windows, longs, cfg, packed):
    """[T, D] of one row: what the head multiplies."""
    few, place = cfg.gate_dims, np.arange(len(row))
    begins = (row == cfg.bos_id) & packed
    starts = np.maximum.accumulate(np.where(begins, place, 0))
    e = weights["embed"][row]
    if cfg.smear:
        share = np.full(len(row), 0.5 * weights["smear_mix"][0])
        if few:
            share = weights["smear_mix"][0] * sigmoid(e[:, :few] @ weights["smear_gate"][:, 0])
        e = e + share[:, None] * before(e)
    x0 = x = rms_norm(e)
    after, late = [], {to: source for source, to in cfg.late_inputs}
    for i in range(cfg.num_layers):
        for j, (source, destination) in enumerate(cfg.skips):
            if destination == i:
                opened = np.ones(len(row))
                if few:
                    opened = 2 * sigmoid(x0[:, :few] @ weights["skip_gate"][:, j])
                x = x + (sigmoid(weights["skip_mix"][j]) * opened)[:, None] * after[source]
        if i not in cfg.mlp_only:
            number = sum(j not in cfg.mlp_only for j in range(i))
            layer = {name: w[number] for name, w in weights["attention"].items()}
            u = rms_norm(after[late[i]] if i in late else x)
            y = attention(u, layer, windows[i], starts, i in cfg.offset_layers, longs, cfg)
            x = layer["x_mix"] * x + layer["y_mix"] * y + layer["x0_mix"] * x0
        layer = {name: w[i] for name, w in weights["blocks"].items()}
        y = np.maximum(rms_norm(x) @ layer["w_up"], 0) ** 2 @ layer["w_down"]
        x = layer["x_mix"] * x + layer["y_mix"] * y
        after.append(x)
    for i in cfg.backout:
        x = x - weights["backout_mix"][0] * after[i]
    return rms_norm(x)


def capped(z, cfg):
    if not cfg.softcap:
        return z
    height, width, shift = cfg.softcap
    return height * np.tanh((z + shift) / width)


def with_copies(x, z, weights, row, packed, cfg):
    """Log-probabilities [T, V] of the mixture of softmax(z) and a copy pointer.

    Of row t, with alpha = e^a / (sum_v e^z_v + e^a), a = x . gate, capped as the logits are:
        p(v) = softmax(z)(v) (1 - alpha (1 - none)) + alpha sum_j share_j [row j + 1 is v]
    where share is the softmax over the keys j < t of document and window and a sink, none its own.
    """
    width, place = cfg.copy_dim, np.arange(len(row))
    starts = np.maximum.accumulate(np.where((row == cfg.bos_id) & packed, place, 0))
    starts = np.maximum(starts, place - COPY_WINDOW)
    q, k = rms_norm(x @ weights["copy_qk"][:, :width]), rms_norm(x @ weights["copy_qk"][:, width:])
    a = capped(x @ weights["copy_logit"][:, 0], cfg)
    mixed = np.zeros(z.shape)
    for t in place:
        shares = [np.exp(q[t] @ k[j] / width**0.5) for j in range(starts[t], t)]
        shares.append(np.exp(q[t] @ weights["copy_sink"][:, 0] / width**0.5))
        *shares, none = np.array(shares) / sum(shares)
        odds = np.exp(z[t])
        alpha = np.exp(a[t]) / (odds.sum() + np.exp(a[t]))
        mixed[t] = odds / odds.sum() * (1 - alpha * (1 - none))
        for j, share in zip(range(starts[t], t), shares, strict=True):
            mixed[t, row[j + 1]] += alpha * share
    with np.errstate(divide="ignore"):  # of no candidate
        return np.log(mixed)


def outputs(weights, tokens, windows, longs, cfg, packed, offsets=0.0):
    """(logits plus offsets, the same with the copy pointer where there is one), [B, T, vocab_size].

    windows: per layer; packed: attention stays in its document.
    """

    def doubled(tree):
        return {k: doubled(v) if isinstance(v, dict) else np.float64(v) for k, v in tree.items()}

    weights, rows = doubled(weights), np.asarray(tokens)
    x = [final_activations(weights, row, windows, longs, cfg, packed) for row in rows]
    z = capped(np.array(x) @ weights["head"][: cfg.vocab_size].T, cfg) + offsets
    if not cfg.copy_dim:
        return z, z
    parts = zip(x, z, rows, strict=True)
    return z, np.array([with_copies(x, z, weights, row, packed, cfg) for x, z, row in parts])


def logits(weights, tokens, windows, longs, cfg, packed):
    return outputs(weights, tokens, windows, longs, cfg, packed)[1]


def nats(logits, targets):
    """-log softmax(logits)[target], one number per target."""
    largest = logits.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(logits - largest).sum(axis=-1)) + largest[..., 0]
    return log_sum - np.take_along_axis(logits, np.asarray(targets)[..., None], axis=-1)[..., 0]


def loss(logits, mixed, targets, weight, ahead=()):
    """Summed nats of the targets, each times its weight.

    mixed: the logits of the next token. ahead: `logits` predict the second and later next tokens
    too, with these weights beside the first's 1, in their mean; beyond the row there are none.
    """
    total, shares = 0.0, [1.0, *ahead]
    for k, share in enumerate(shares):
        length = logits.shape[1] - k
        cost = weight[:, k:] * nats((logits if k else mixed)[:, :length], targets[:, k:])
        total += share / sum(shares) * cost.sum()
    return total
