"""A plain evaluation of a run of blocks in float64, straight from the GGUF: one row at a time, a growing cache.

Nothing of the packages' tricks: no mask, no padding, no scaling, no parts, llama's pairs turned as pairs. The file is
read, and dequantised, by gguf-py. It is checked against llama.cpp like the packages are (check.py); what it adds is the
cache, which llama.cpp keeps to itself.
"""

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize


class Blocks:
    def __init__(self, path, first, last):
        self.reader = GGUFReader(path)
        self.tensors = {t.name: t for t in self.reader.tensors}
        self.arch = self.field("general.architecture")
        self.first, self.last = first, last
        key = lambda name, default=None: self.field(f"{self.arch}.{name}", default)
        self.n_head = key("attention.head_count")
        self.n_head_kv = key("attention.head_count_kv", self.n_head)
        self.head_dim = key("attention.key_length", key("embedding_length") // self.n_head)
        self.eps = key("attention.layer_norm_rms_epsilon")
        self.pairs = self.arch in ("llama", "mistral3")
        i = np.arange(0, self.head_dim, 2)
        self.freq = key("rope.freq_base", 10000.0) ** (-i / self.head_dim)
        if "rope_freqs.weight" in self.tensors:
            self.freq = self.freq / self.weight("rope_freqs.weight")
        self.magnitude = 1.0
        kind, factor = key("rope.scaling.type", "linear"), key("rope.scaling.factor", 1.0)
        if kind == "linear":
            self.freq = self.freq / factor
        elif kind == "yarn":
            trained = key("rope.scaling.original_context_length", key("context_length"))
            base = key("rope.freq_base", 10000.0)
            dim = lambda turns: self.head_dim * np.log(trained / (turns * 2 * np.pi)) / (2 * np.log(base))
            low, high = max(0, np.floor(dim(32))), min(self.head_dim - 1, np.ceil(dim(1)))
            keep = 1 - np.clip((i / 2 - low) / max(0.001, high - low), 0, 1)
            self.freq = self.freq * ((1 - keep) / factor + keep)
            self.magnitude = 1 + 0.1 * np.log(factor)
        elif kind != "none":
            raise ValueError(kind)

    def field(self, name, default=None):
        field = self.reader.get_field(name)
        return default if field is None else field.contents()

    def weight(self, name):
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float64).reshape(tensor.shape[::-1])

    def session(self):
        return Session(self)


class Session:
    def __init__(self, blocks):
        self.blocks = blocks
        self.keys = [[] for _ in range(blocks.first, blocks.last + 1)]  # per block, per position (n_head_kv, head_dim)
        self.values = [[] for _ in self.keys]

    def rewind(self, position):
        for rows in self.keys + self.values:
            del rows[position:]

    def cache(self):
        stack = lambda rows: np.stack(rows, 1)
        return np.stack([np.stack([stack(k), stack(v)]) for k, v in zip(self.keys, self.values)])

    def feed(self, rows):
        rows = np.array(rows, dtype=np.float64)
        for i in range(len(self.keys)):
            rows = self.block(i, rows)
        return rows

    def block(self, i, rows):
        b = self.blocks
        w = lambda suffix: b.weight(f"blk.{b.first + i}.{suffix}")
        linear = lambda x, name: x @ w(f"{name}.weight").T + (0 if w(f"{name}.bias") is None else w(f"{name}.bias"))
        rms = lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True) + b.eps)
        n, d = len(rows), b.head_dim

        h = rms(rows) * w("attn_norm.weight")
        q = linear(h, "attn_q").reshape(n, b.n_head, d)
        k = linear(h, "attn_k").reshape(n, b.n_head_kv, d)
        v = linear(h, "attn_v").reshape(n, b.n_head_kv, d)
        if w("attn_q_norm.weight") is not None:
            q, k = rms(q) * w("attn_q_norm.weight"), rms(k) * w("attn_k_norm.weight")
        start = len(self.keys[i])
        positions = np.arange(start, start + n)
        q, k = self.turn(q, positions), self.turn(k, positions)
        self.keys[i].extend(self.halves(k))
        self.values[i].extend(v)
        keys, values = np.stack(self.keys[i], 1), np.stack(self.values[i], 1)  # (n_head_kv, positions, head_dim)
        group = b.n_head // b.n_head_kv
        mixed = np.empty((n, b.n_head, d))
        for head in range(b.n_head):
            scores = self.halves(q)[:, head] @ keys[head // group].T / np.sqrt(d)
            scores[np.arange(keys.shape[1]) > positions[:, None]] = -np.inf
            e = np.exp(scores - scores.max(1, keepdims=True))
            mixed[:, head] = e / e.sum(1, keepdims=True) @ values[head // group]
        rows = rows + linear(mixed.reshape(n, -1), "attn_output")

        h = rms(rows) * w("ffn_norm.weight")
        gate = linear(h, "ffn_gate")
        return rows + linear(gate / (1 + np.exp(-gate)) * linear(h, "ffn_up"), "ffn_down")

    def turn(self, x, positions):
        """x (n, heads, head_dim), as GGUF orders the dimensions"""
        b = self.blocks
        angles = positions[:, None, None] * b.freq
        cos, sin = np.cos(angles) * b.magnitude, np.sin(angles) * b.magnitude
        half = b.head_dim // 2
        first, second = (slice(0, None, 2), slice(1, None, 2)) if b.pairs else (slice(0, half), slice(half, None))
        y = np.empty_like(x)
        y[..., first] = x[..., first] * cos - x[..., second] * sin
        y[..., second] = x[..., first] * sin + x[..., second] * cos
        return y

    def halves(self, x):
        """Dimensions in the packages' order: pairs apart."""
        return np.concatenate([x[..., 0::2], x[..., 1::2]], -1) if self.blocks.pairs else x
