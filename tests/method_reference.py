"""FineLIP's mathematics reimplemented in NumPy float64, as the reference for the library.

It follows only the paper's formulas, one item or one pair at a time, and favours readability over speed. It shares no code
with the library, so a misunderstanding would have to occur twice to go unnoticed.
Shapes: ``P`` patches, ``T`` text positions, ``W`` transformer width, ``D`` joint width, ``K`` aggregated tokens,
``B_i`` and ``B_t`` images and captions of a batch.
"""

import math

import numpy as np

EPS = 1e-5  # used by every LayerNorm of CLIP and of the aggregators


# Positions -----------------------------------------------------------------------------------------------------------


def stretched_positions(table, context_length, keep=20):
    """Stretch ``[T, W]`` to ``[context_length, W]``: keep the first `keep` rows and interpolate the rest linearly."""
    table = np.asarray(table, dtype=np.float64)
    last = len(table) - 1
    ratio = (len(table) - keep) / (context_length - keep)
    rows = []
    for j in range(context_length):
        source = float(j) if j < keep else keep + (j - keep) * ratio
        if source > last:
            rows.append(table[last] + (source - last) * (table[last] - table[last - 1]))
        elif source == last:
            rows.append(table[last])
        else:
            below = math.floor(source)
            part = source - below
            rows.append((1 - part) * table[below] + part * table[below + 1])
    return np.stack(rows)


def long_clip_positions(table, keep=20, factor=4):
    """Apply Long-CLIP's rule: `factor` rows per learned row past `keep`; the last row is extrapolated with its last slope."""
    table = np.asarray(table, dtype=np.float64)
    rows = list(table[:keep])
    for i in range(keep, len(table)):
        before, after = (i, i + 1) if i + 1 < len(table) else (i - 1, i)
        slope = table[after] - table[before]
        rows.extend(table[i] + step / factor * slope for step in range(factor))
    return np.stack(rows)


# The two transformers ------------------------------------------------------------------------------------------------


def gelu(x):
    """Exact GELU: ``x`` times the cumulative normal distribution."""
    return x * 0.5 * (1.0 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2.0)))


def quick_gelu(x):
    """OpenAI's activation, ``x * sigmoid(1.702 x)``."""
    return x / (1.0 + np.exp(-1.702 * x))


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS) * weight + bias


def softmax(x, axis):
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def self_attention(x, state, name, heads, causal):
    """Multi-head self-attention of ``x [T, W]``; `causal` masks later positions."""
    positions, width = x.shape
    size = width // heads
    queries, keys, values = np.split(x @ state[f"{name}.in_proj_weight"].T + state[f"{name}.in_proj_bias"], 3, axis=-1)
    mixed = np.empty_like(x)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        logits = queries[:, part] @ keys[:, part].T / math.sqrt(size)
        if causal:
            logits[np.triu_indices(positions, 1)] = -np.inf
        mixed[:, part] = softmax(logits, -1) @ values[:, part]
    return mixed @ state[f"{name}.out_proj.weight"].T + state[f"{name}.out_proj.bias"]


def transformer(x, state, name, heads, activation, causal):
    """CLIP's pre-norm blocks from ``name.resblocks.0`` on, as many as the state dict has."""
    depth = 1 + max(int(key.removeprefix(f"{name}.resblocks.").split(".")[0]) for key in state if key.startswith(name))
    for layer in range(depth):
        block = f"{name}.resblocks.{layer}"
        normed = layer_norm(x, state[f"{block}.ln_1.weight"], state[f"{block}.ln_1.bias"])
        x = x + self_attention(normed, state, f"{block}.attn", heads, causal)
        normed = layer_norm(x, state[f"{block}.ln_2.weight"], state[f"{block}.ln_2.bias"])
        hidden = activation(normed @ state[f"{block}.mlp.c_fc.weight"].T + state[f"{block}.mlp.c_fc.bias"])
        x = x + hidden @ state[f"{block}.mlp.c_proj.weight"].T + state[f"{block}.mlp.c_proj.bias"]
    return x


def image_tokens(pixels, state, heads, activation):
    """Tokens of one image ``[3, H, W]`` in the joint space: ``[1 + P, D]``, CLS first."""
    kernels = state["visual.conv1.weight"]
    width, _, patch, _ = kernels.shape
    patches = [
        kernels.reshape(width, -1) @ pixels[:, top : top + patch, left : left + patch].reshape(-1)
        for top in range(0, pixels.shape[1], patch)
        for left in range(0, pixels.shape[2], patch)
    ]
    x = np.stack([state["visual.class_embedding"], *patches]) + state["visual.positional_embedding"]
    x = layer_norm(x, state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    x = transformer(x, state, "visual.transformer", heads, activation, causal=False)
    x = layer_norm(x, state["visual.ln_post.weight"], state["visual.ln_post.bias"])
    return x @ state["visual.proj"]


def text_tokens(ids, state, heads, activation):
    """Tokens of one caption ``[T]`` in the joint space: ``[T, D]``."""
    x = state["token_embedding.weight"][ids] + state["positional_embedding"][: len(ids)]
    x = transformer(x, state, "transformer", heads, activation, causal=True)
    x = layer_norm(x, state["ln_final.weight"], state["ln_final.bias"])
    return x @ state["text_projection"]


# ATRM: token aggregation ---------------------------------------------------------------------------------------------


def unit_rows(x):
    """L2-normalised rows; a zero row stays zero."""
    norms = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)


def aggregate(x, norm_weight, norm_bias, w1, b1, w2, b2, scale):
    """Aggregate ``x [N, D]`` to ``[K, D]``, not yet normalised; zeros if there are no tokens."""
    if len(x) == 0:
        return np.zeros((len(w2), x.shape[-1]))
    hidden = gelu(layer_norm(x, norm_weight, norm_bias) @ w1.T + b1)
    weights = softmax((hidden @ w2.T + b2) * scale, axis=0)
    return weights.T @ x


def atrm(x, anchor, *parameters):
    """Embedding of one item ``[K + 1, D]``: the anchor (CLS or EOT) first, every row of unit length."""
    return unit_rows(np.concatenate([anchor[None], aggregate(x, *parameters)]))


def aggregator_parameters(state, name):
    """An aggregator's seven parameters under the released code's names, in `aggregate`'s order."""
    keys = ("weight.0.weight", "weight.0.bias", "weight.1.weight", "weight.1.bias", "weight.3.weight", "weight.3.bias")
    return (*(state[f"{name}.{key}"] for key in keys), state[f"{name}.scale"].item())


def encode_image(pixels, state, heads, activation):
    """Embedding of one image ``[K + 1, D]``."""
    tokens = image_tokens(pixels, state, heads, activation)
    return atrm(tokens[1:], tokens[0], *aggregator_parameters(state, "cross_net.aggr_net"))


def encode_text(ids, state, heads, activation):
    """Embedding of one caption ``[K + 1, D]``, of the start token and words with EOT as anchor; padding is ignored."""
    eot = int(np.argmax(ids))
    tokens = text_tokens(ids, state, heads, activation)
    return atrm(tokens[:eot], tokens[eot], *aggregator_parameters(state, "cross_net.cap_aggr_net"))


# CLIM: late interaction ----------------------------------------------------------------------------------------------


def fine(text, image):
    """Fine-grained similarity of ``text [L_t, D]`` and ``image [L_i, D]`` in both directions; 0 if either is empty."""
    if len(text) == 0 or len(image) == 0:
        return 0.0
    s = text @ image.T
    s = np.where(s >= 0, s, 0.1 * s)
    return float(s.max(axis=1).mean() + s.max(axis=0).mean())


def score(text, image, alpha=0.8):
    """Retrieval score: the global cosine of the first rows, combined with `fine`."""
    if len(text) == 0 or len(image) == 0:
        return 0.0
    return float(alpha * (text[0] @ image[0]) + (1 - alpha) * fine(text, image))


def score_matrix(queries, items, alpha=0.8):
    """Matrix ``[Q, N]`` of the `score` of every query with every item."""
    scores = [[score(query, item, alpha) for item in items] for query in queries]
    return np.asarray(scores, dtype=np.float64).reshape(len(queries), len(items))


# Losses --------------------------------------------------------------------------------------------------------------


def triplet_loss(scores, image_ids=None, margin=0.2, hardest=False):
    """Hinge loss over ``scores [B_i, B_t]`` both ways, summed over the batch; `hardest` keeps one negative per anchor."""
    batch = len(scores)
    image_ids = list(range(batch)) if image_ids is None else list(image_ids)
    total = 0.0
    for i in range(batch):
        negatives = [j for j in range(batch) if image_ids[j] != image_ids[i]]
        by_row = [max(0.0, margin + scores[i, j] - scores[i, i]) for j in negatives]
        by_column = [max(0.0, margin + scores[j, i] - scores[i, i]) for j in negatives]
        for costs in (by_row, by_column):
            total += max(costs, default=0.0) if hardest else sum(costs)
    return total


def cross_entropy(logits, label_smoothing=0.0):
    """Mean over rows, where row ``i`` should pick column ``i``; label smoothing spreads over all columns."""
    batch, classes = logits.shape
    total = 0.0
    for i in range(batch):
        log_probabilities = logits[i] - logits[i].max()
        log_probabilities = log_probabilities - math.log(np.exp(log_probabilities).sum())
        target = np.full(classes, label_smoothing / classes)
        target[i] += 1.0 - label_smoothing
        total -= float(target @ log_probabilities)
    return total / batch


def symmetric_cross_entropy(logits, label_smoothing=0.0):
    return (cross_entropy(logits, label_smoothing) + cross_entropy(logits.T, label_smoothing)) / 2


def contrastive_loss(cosines, logit_scale, label_smoothing=0.1):
    """CLIP's loss; `logit_scale` is the learned logarithm of the factor, ``exp(logit_scale)``."""
    return symmetric_cross_entropy(math.exp(logit_scale) * cosines, label_smoothing)


def adaptive_margin_loss(cosines, captions, logit_scale, gamma=0.5):
    """Contrastive loss with larger margins for negatives with similar captions; ``captions [B_t, D]`` are unit rows."""
    resemblance = captions @ captions.T
    np.fill_diagonal(resemblance, 0.0)
    return symmetric_cross_entropy(math.exp(logit_scale) * (cosines + gamma * resemblance))
