"""Keys and values of all conversations, in pages that grow one at a time and are shared where conversations agree.

`Pages` is the memory and what lies in it: a tree whose path from the root spells the ids that the pages hold, so that
whoever begins alike finds them. `attend` is the attention function, registered with transformers under ATTENTION, that
reads and writes them. Nothing here knows requests, sampling or text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llama2_chat.errors import ModelUnavailable

PAGE_TOKENS = 64
BLOCK_TOKENS = 64  # a recorded prefill step takes prompts in blocks of so many tokens
LEAST_PAGES = 8  # 512 tokens; with less no conversation is worth the wait
ATTENTION = "paged"  # the name under which transformers knows attend()

Layers = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [pages, PAGE_TOKENS, kv_heads, head_dim]


# ---- Which pages hold what ----


@dataclass(eq=False)
class Node:
    """One page in the tree: its tokens follow those of its parent. Only a page that is full has children."""

    ids: tuple[int, ...]
    page: int
    parent: Node | None
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    users: int = 0  # running requests that read it; nobody's pages may go, the longest unused first


@dataclass(eq=False)
class SharedPages:
    """The pages of one running request, in order: those it shares, then its own."""

    shared: list[Node] = field(default_factory=list)
    own: list[int] = field(default_factory=list)

    @property
    def pages(self) -> list[int]:
        return [*(node.page for node in self.shared), *self.own]

    def __len__(self) -> int:
        return len(self.shared) + len(self.own)


class PageTree:
    """Who holds which page. Page 0 belongs to nobody: padding is written there."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._root = Node((), 0, None)
        self._free = list(range(count - 1, 0, -1))  # the lowest page is handed out first
        self._unused: OrderedDict[Node, None] = OrderedDict()  # leaves without users, the longest unused first
        self._idle = 0  # pages in the tree without users

    @property
    def available(self) -> int:
        """Pages that allocate() could still hand out."""
        return len(self._free) + self._idle

    def allocate(self) -> int | None:
        """A page, taken from the longest unused conversation if none is free; None if all have users."""
        if not self._free:
            if not self._unused:
                return None
            self._drop(next(iter(self._unused)))
        return self._free.pop()

    def take(self, ids: Sequence[int]) -> tuple[SharedPages, Node | None, int]:
        """The pages that begin as ids do, now with one more user; a page that continues them, and for how many ids.

        The last id is always left to compute: its logits are needed.
        """
        sequence, node, start = SharedPages(), self._root, 0
        while child := node.children.get(tuple(ids[start : min(start + PAGE_TOKENS, len(ids) - 1)])):
            if len(child.ids) < PAGE_TOKENS:
                break
            self._use(child)
            sequence.shared.append(child)
            node, start = child, start + PAGE_TOKENS
        rest = ids[start : min(start + PAGE_TOKENS, len(ids) - 1)]
        nearest = max(node.children.values(), key=lambda child: _common(child.ids, rest), default=None)
        length = _common(nearest.ids, rest) if nearest else 0
        return sequence, nearest if length else None, length

    def share(self, sequence: SharedPages, ids: Sequence[int]) -> None:
        """Let others find the pages that ids fill to the brim, while their request goes on."""
        node = sequence.shared[-1] if sequence.shared else self._root
        while sequence.own and len(ids) >= (len(sequence.shared) + 1) * PAGE_TOKENS:
            start = len(sequence.shared) * PAGE_TOKENS
            key = tuple(ids[start : start + PAGE_TOKENS])
            if key in node.children:
                return  # a neighbour was first; both keep their own until they end
            node = self._add(node, key, sequence.own.pop(0))
            self._use(node)
            sequence.shared.append(node)

    def give_back(self, sequence: SharedPages, ids: Sequence[int]) -> None:
        """Keep what the pages hold, ids, for the next who begins alike; the request has ended."""
        node = sequence.shared[-1] if sequence.shared else self._root
        for index, page in enumerate(sequence.own, len(sequence.shared)):
            key = tuple(ids[index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS])
            known = next((child for child in node.children.values() if child.ids[: len(key)] == key), None)
            if known is not None or not key:
                self._free.append(page)
                node = known if key else node
                continue
            for child in [child for child in node.children.values() if child.ids == key[: len(child.ids)]]:
                if not child.users and not child.children:
                    self._drop(child)  # the page before it grew by this turn
            node = self._add(node, key, page)
        if node in self._unused:
            self._unused.move_to_end(node)
        for node in reversed(sequence.shared):
            self._let_go(node)
        sequence.shared, sequence.own = [], []

    def discard(self, sequence: SharedPages) -> list[int]:
        """Forget what a request that failed has written; the pages that this frees hold nobody knows what."""
        freed = [*sequence.own]
        self._free += sequence.own
        for node in reversed(sequence.shared):
            self._let_go(node)
            if not node.users and not node.children:
                self._drop(node)
                freed.append(node.page)
        sequence.shared, sequence.own = [], []
        return freed

    def _add(self, parent: Node, ids: tuple[int, ...], page: int) -> Node:
        node = parent.children[ids] = Node(ids, page, parent)
        self._unused.pop(parent, None)
        self._unused[node] = None
        self._idle += 1
        return node

    def _use(self, node: Node) -> None:
        self._idle -= not node.users
        node.users += 1
        self._unused.pop(node, None)

    def _let_go(self, node: Node) -> None:
        node.users -= 1
        if not node.users:
            self._idle += 1
            if not node.children:
                self._unused[node] = None

    def _drop(self, node: Node) -> None:
        del self._unused[node], node.parent.children[node.ids]
        self._idle -= 1
        self._free.append(node.page)
        parent = node.parent
        if parent is not self._root and not parent.children and not parent.users:
            self._unused[parent] = None
            self._unused.move_to_end(parent, last=False)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---- The memory ----


class Pages:
    """The tensors: for each layer its keys and its values, [pages, PAGE_TOKENS, heads, head_dim], on its device."""

    def __init__(
        self, model: PreTrainedModel, free_bytes: Mapping[torch.device, int], context_length: int, requests: int
    ) -> None:
        """Take as much of free_bytes as so many requests with a full context need, on a CPU at least what one needs.

        Raises ModelUnavailable if the model cannot be paged, or nothing is left for its pages.
        """
        probe = _probe(model)
        page_bytes: dict[torch.device, int] = {}
        for keys in probe:
            page_bytes[keys.device] = page_bytes.get(keys.device, 0) + 2 * PAGE_TOKENS * keys.nbytes
        fitting = min(free_bytes[device] // size for device, size in page_bytes.items())
        whole = -(-context_length // PAGE_TOKENS)
        if all(device.type == "cpu" for device in page_bytes):
            fitting = max(fitting, whole)
        if fitting < LEAST_PAGES:
            raise ModelUnavailable(
                "The model leaves no GPU memory for conversations. "
                "Set QUANTIZATION=nf4, lower KV_HEADROOM_GB, or use a larger GPU."
            )
        self.count = 1 + min(fitting, requests * whole)
        self.layers: Layers = [
            tuple(keys.new_zeros(self.count, PAGE_TOKENS, keys.shape[1], keys.shape[3]) for _ in range(2))
            for keys in probe
        ]
        self.bytes = sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    @property
    def tokens(self) -> int:
        return (self.count - 1) * PAGE_TOKENS

    def wipe(self, pages: list[int] | slice) -> None:
        """Zeros: what is masked is still multiplied, and nothing times NaN is not nothing."""
        for keys, values in self.layers:
            keys[pages] = 0
            values[pages] = 0

    def are_finite(self, pages: list[int]) -> bool:
        """Whether numbers were computed here: what is none in one layer is none in those after it."""
        return bool(self.layers[-1][1][pages].isfinite().all())

    def copy(self, source: int, target: int) -> None:
        for keys, values in self.layers:
            keys[target], values[target] = keys[source], values[source]


@torch.inference_mode()
def _probe(model: PreTrainedModel) -> list[Tensor]:
    """The keys of one token, [1, heads, 1, head_dim], as each layer makes them."""
    cache = DynamicCache(config=model.config)
    device = model.get_input_embeddings().weight.device
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), past_key_values=cache, use_cache=True)
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        raise ModelUnavailable(
            "This model keeps more than keys and values of past tokens, which this program cannot share between "
            "visitors. Choose a Llama 2, or a model that attends as it does."
        )
    return [layer.keys for layer in cache.layers]


# ---- Attention ----


class Step(Protocol):
    """Where the keys and values of the tokens in one forward pass are. Passed through the model to attend()."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim]; returns [1, T, heads, head_dim]."""


@dataclass
class PrefillStep:
    """Tokens of several prompts in one row, [1, T], and where their keys and values go."""

    layers: Layers
    slots: Tensor  # int64 [T]: page * PAGE_TOKENS + offset of each token
    parts: Tensor  # int64 [n, 3] on the CPU: first token, one past the last, position of the first
    tables: Tensor  # int64 [n, P]: the pages of each part's request, padded with page 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        keys, values = self.layers[layer]
        return prefill_attention(query, key, value, keys, values, self.slots, self.parts, self.tables, scale)


@dataclass
class DecodeStep:
    """One token of each of several requests, [1, N], and where their keys and values are."""

    layers: Layers
    lengths: list[int]  # tokens of each request before this one
    tables: Tensor  # int64 [N, P], the pages of each request, padded with page 0
    kernel: Callable[..., Tensor] | None = None  # gpu_kernels.decode_attention, where it runs

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        keys, values = self.layers[layer]
        tables = self.tables.to(keys.device)
        N, kv_heads, head_dim = len(tables), key.shape[1], key.shape[3]
        if self.kernel is not None:
            rows, positions = torch.arange(N, device=keys.device), self.positions.to(keys.device)
            return self.kernel(query, key, value, keys, values, rows, positions, tables, scale)
        write(keys, key, self.slots)
        write(values, value, self.slots)
        # The queries that share a head of keys stand where the tokens of one query would: no key is repeated.
        q = query[0].transpose(0, 1).reshape(N, kv_heads, -1, head_dim)
        if N == 1:
            mask = None
            k, v = (gather(states, tables[0], self.lengths[0] + 1) for states in (keys, values))
        else:
            mask = self.mask.to(keys.device)
            k, v = (states[tables].flatten(1, 2).transpose(1, 2) for states in (keys, values))
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return output.reshape(1, N, -1, head_dim)

    @cached_property
    def positions(self) -> Tensor:
        return torch.tensor(self.lengths, device=self.tables.device)

    @cached_property
    def slots(self) -> Tensor:
        pages = self.tables.gather(1, self.positions[:, None] // PAGE_TOKENS)[:, 0]
        return pages * PAGE_TOKENS + self.positions % PAGE_TOKENS

    @cached_property
    def mask(self) -> Tensor:
        """bool [N, 1, 1, P * PAGE_TOKENS]: what each may attend to."""
        tokens = torch.arange(self.tables.shape[1] * PAGE_TOKENS, device=self.tables.device)
        return (tokens <= self.positions[:, None])[:, None, None]


def prefill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    parts: Tensor,
    tables: Tensor,
    scale: float,
) -> Tensor:
    """Writes key and value, [1, kv_heads, T, head_dim], and lets each part attend to its request so far.

    query: [1, heads, T, head_dim]. Returns [1, T, heads, head_dim].
    """
    write(keys, key, slots)
    write(values, value, slots)
    output = torch.empty_like(query)
    options = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    for (start, end, position), table in zip(parts.tolist(), tables, strict=True):
        q, k, v = (states[:, :, start:end] for states in (query, key, value))
        if position == 0:
            output[:, :, start:end] = F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
            continue
        length = position + end - start
        k, v = (gather(states, table[: -(-length // PAGE_TOKENS)], length) for states in (keys, values))
        # On a GPU the lower right triangle has a kernel of its own; its mask is never made.
        on_cpu = q.device.type == "cpu"
        mask = torch.ones(end - start, length, dtype=torch.bool).tril(position) if on_cpu else None
        mask = causal_lower_right(end - start, length) if mask is None else mask
        output[:, :, start:end] = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    return output.transpose(1, 2)


def write(states: Tensor, new: Tensor, slots: Tensor) -> None:
    """Put new keys or values, [1, kv_heads, T, head_dim], at their slots."""
    states.view(-1, *states.shape[2:])[slots.to(states.device)] = new[0].transpose(0, 1)


def gather(states: Tensor, pages: Tensor, length: int) -> Tensor:
    """The first tokens of one request, [1, kv_heads, length, head_dim]; on a CPU a view if its pages lie in a row."""
    if states.device.type == "cpu" and bool((pages.diff() == 1).all()):
        found = states[pages[0] : pages[-1] + 1]
    else:
        found = states[pages.to(states.device)]
    return found.flatten(0, 1)[:length].transpose(0, 1)[None]


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    step: Step | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention over pages when the engine passes a step through the model, else transformers' own."""
    if step is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention with soft caps or sinks")
    return step.attend(module.layer_idx, query, key, value, scaling or query.shape[-1] ** -0.5), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
