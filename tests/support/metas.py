"""Meta's own format made small, and Meta's model in sixty lines: nothing here knows transformers.

A whole model is a dict of float32 tensors by Meta's names. split() is what its training did: each of N files gets some
heads and a part of the MLP.
"""

import hashlib
import json
import struct

import torch
from torch.nn.functional import silu, softmax

WORDS = ("the", "cat", "INST", "x", "sat")
COLUMNS = ("tok_embeddings", "attention.wo", "feed_forward.w2")


def params(**changes):
    return {"dim": 64, "n_layers": 2, "n_heads": 8, "norm_eps": 1e-5, "vocab_size": -1, "multiple_of": 32} | changes


def whole_model(params, rows=300, inner=96):
    torch.manual_seed(0)
    dim, kv_dim = params["dim"], params["dim"] // params["n_heads"] * params.get("n_kv_heads", params["n_heads"])
    shapes = {"tok_embeddings.weight": (rows, dim), "output.weight": (rows, dim), "norm.weight": (dim,)}
    for i in range(params["n_layers"]):
        attention = {"wq": (dim, dim), "wk": (kv_dim, dim), "wv": (kv_dim, dim), "wo": (dim, dim)}
        mlp = {"w1": (inner, dim), "w2": (dim, inner), "w3": (inner, dim)}
        shapes |= {f"layers.{i}.attention.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"layers.{i}.feed_forward.{name}.weight": shape for name, shape in mlp.items()}
        shapes |= {f"layers.{i}.{name}.weight": (dim,) for name in ("attention_norm", "ffn_norm")}
    return {name: torch.randn(shape) * shape[-1] ** -0.5 + (len(shape) == 1) for name, shape in shapes.items()}


def metas_logits(tensors, params, ids):
    """[T, V], as Meta's reference computes them: rotary positions as products of complex numbers."""
    heads, T = params["n_heads"], len(ids)
    kv_heads, size = params.get("n_kv_heads", heads), params["dim"] // heads
    angles = torch.outer(
        torch.arange(T).float(), params.get("rope_theta", 1e4) ** (-torch.arange(0, size, 2).float() / size)
    )
    turns = torch.polar(torch.ones_like(angles), angles)  # [T, size / 2]

    def normed(x, name):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + params["norm_eps"]) * tensors[f"{name}.weight"]

    def rotated(x):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns[:, None]).flatten(2)

    x = tensors["tok_embeddings.weight"][torch.tensor(ids)]
    for i in range(params["n_layers"]):

        def times(x, name, i=i):
            return x @ tensors[f"layers.{i}.{name}.weight"].T

        h = normed(x, f"layers.{i}.attention_norm")
        q = rotated(times(h, "attention.wq").view(T, heads, size))
        k = rotated(times(h, "attention.wk").view(T, kv_heads, size)).repeat_interleave(heads // kv_heads, 1)
        v = times(h, "attention.wv").view(T, kv_heads, size).repeat_interleave(heads // kv_heads, 1)
        scores = torch.einsum("thd,shd->hts", q, k) * size**-0.5
        scores += torch.full((T, T), float("-inf")).triu(1)
        attended = torch.einsum("hts,shd->thd", softmax(scores, -1), v).reshape(T, -1)
        x = x + times(attended, "attention.wo")
        h = normed(x, f"layers.{i}.ffn_norm")
        x = x + times(silu(times(h, "feed_forward.w1")) * times(h, "feed_forward.w3"), "feed_forward.w2")
    return normed(x, "norm") @ tensors["output.weight"].T


def split(tensors, files):
    """The tensors of each file. Norms are the same in all, and so are the frequencies that nobody needs."""
    shards = [{"rope.freqs": torch.ones(4)} for _ in range(files)]
    for name, tensor in tensors.items():
        along = 1 if any(part in name for part in COLUMNS) else 0
        parts = [tensor] * files if tensor.dim() == 1 else tensor.chunk(files, along)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone()
    return shards


def save_metas(folder, tensors, params, files=1, tokenizer=None, checklist=True, line_end="\n"):
    """A folder as Meta's download.sh leaves it. tokenizer: its tokenizer.model; None for a small one."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, shard in enumerate(split(tensors, files)):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_bytes(tokenizer or tokenizer_model())
    if checklist:
        lines = [
            f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}{line_end}" for path in sorted(folder.iterdir())
        ]
        (folder / "checklist.chk").write_bytes("".join(lines).encode())
    return folder


def tokenizer_model(words=WORDS, more=()):
    """A SentencePiece file: the control tokens of a Llama, bytes, letters and words. more: pieces at its end."""
    letters = ["▁", *map(chr, range(33, 127)), "☺", *map(chr, range(0xC0, 0xD0))]
    steps = [word[:n] for word in words for n in range(2, len(word) + 1)]
    steps += [f"▁{word[:n]}" for word in words for n in range(1, len(word) + 1)]
    control = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
    normal = [(text, 1) for text in dict.fromkeys([*steps, *letters]) if text not in dict(control)]
    pieces = [*control, *normal, *((text, 1) for text in more)]
    encoded = (_piece(text, -float(i), kind) for i, (text, kind) in enumerate(pieces))
    return b"".join(b"\x0a" + _length(piece) + piece for piece in encoded) + b"\x12\x02\x18\x02"  # it is a BPE


def more_pieces(data, *texts):
    """A tokenizer.model with further pieces at its end, as Code Llama's is Llama 2's."""
    pieces = [_piece(text, -1e5 - i, 1) for i, text in enumerate(texts)]
    return data + b"".join(b"\x0a" + _length(piece) + piece for piece in pieces)


def _piece(text, score, kind):
    data = text.encode()
    return b"\x0a" + _length(data) + data + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])


def _length(data):
    assert len(data) < 128
    return bytes([len(data)])
