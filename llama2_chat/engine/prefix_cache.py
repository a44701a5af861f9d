"""Which block of the KV pool holds what: a tree whose path from the root spells the ids, so that conversations share
the blocks of whatever they begin alike. Each adapter has a tree of its own: to the same ids it computes other keys and
values. A full block that makes room goes to a page of the host's memory, and stays in the tree. Numbers only: no tensor
is touched here, and no torch imported.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

# Kept free, where the host takes what they held: so many can be handed out without waiting for copies.
SPARE_BLOCKS = 16


@dataclass(eq=False)
class Node:
    """One block in the tree: its ids follow those of its parent. Only a block that is full has children."""

    ids: tuple[int, ...]
    block: int
    parent: Node | None
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    ref_count: int = 0  # running requests that read it; with none it may be evicted, the longest unused first
    away: dict[tuple[int, ...], Node] = field(default_factory=dict)  # its children that have no block, but a page
    page: int | None = None  # of the host; then `block` means nothing, and all children are away


@dataclass(eq=False)
class BlockTable:
    """The blocks of one running request, in order: those it shares, then its own. It only ever grows at its end."""

    adapter: int = 0  # in whose tree they are
    shared: list[Node] = field(default_factory=list)
    own: list[int] = field(default_factory=list)

    @property
    def blocks(self) -> list[int]:
        return [*(node.block for node in self.shared), *self.own]

    def __len__(self) -> int:
        return len(self.shared) + len(self.own)

    def __getitem__(self, index: int) -> int:
        return self.shared[index].block if index < len(self.shared) else self.own[index - len(self.shared)]


class Match(NamedTuple):
    """What the cache knows of a prompt."""

    table: BlockTable  # of full blocks, each now with one more reference
    nearest: Node | None  # the block that goes on as the prompt does for longest after them, to be copied from
    common: int  # for how many ids it does
    away: list[Node]  # the blocks after those of the table that the host has; recall() brings them


class Host(Protocol):
    """Whoever copies blocks to memory of the host and back, in the order in which it is asked to."""

    @property
    def host_blocks(self) -> int:
        """That there are pages for, so far."""

    def save_block(self, block: int, page: int) -> None: ...  # the block is handed to somebody else after that
    def restore_block(self, page: int, block: int) -> None: ...  # and so is the page


class PrefixCache:
    """Blocks 1 to num_blocks - 1, each free, in a BlockTable, or in the tree. Block 0 belongs to nobody: padding is
    written there. host: where blocks go that make room for others; None lets them be forgotten."""

    def __init__(self, num_blocks: int, block_size: int, host: Host | None = None) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._host = host
        self._pages, self._free_pages = 0, list[int]()  # how many are known; those that hold nothing
        self._find_pages()
        # Nodes with a page, the longest unused first: a child leaves the pool before its parent does, and so the first
        # is nobody's parent.
        self._away: OrderedDict[Node, None] = OrderedDict()
        self._roots: defaultdict[int, Node] = defaultdict(lambda: Node((), 0, None))  # of each adapter
        self._free = deque(range(num_blocks - 1, 0, -1))  # the lowest block is handed out first
        self._evictable: OrderedDict[Node, None] = OrderedDict()  # leaves without references, the longest unused first
        self._unreferenced = 0  # blocks in the tree without references

    @property
    def available(self) -> int:
        """Blocks that allocate() could still hand out."""
        return len(self._free) + self._unreferenced

    def allocate(self) -> int | None:
        """A block, taken from the longest unused conversation if none is free; None if all are referenced."""
        if not self._free:
            if not self._evictable:
                return None
            self._make_way(next(iter(self._evictable)))
        return self._free.pop()

    @property
    def is_short(self) -> bool:
        """Whether the next block that is handed out must first be copied to the host."""
        return not self._free and self._spares > 0

    def spare(self) -> None:
        """Let the host have what is unused for longest, so that some blocks are free before somebody needs them."""
        while len(self._free) < self._spares and self._evictable:
            self._make_way(next(iter(self._evictable)))
            self._free.rotate(1)  # handed out last: until then it has been copied

    @property
    def _spares(self) -> int:
        return min(SPARE_BLOCKS, self.num_blocks // 16) if self._host and self._host.host_blocks else 0

    @property
    def host_blocks(self) -> int:
        """How many the host has."""
        return len(self._away)

    def match(self, ids: Sequence[int], adapter: int = 0) -> Match:
        """The adapter's blocks that begin as ids do. The last id is always left to compute: its logits are needed."""
        table, node, start = BlockTable(adapter), self._roots[adapter], 0
        while child := node.children.get(self._next_block(ids, start)):
            if len(child.ids) < self.block_size:
                break
            self._reference(child)
            table.shared.append(child)
            node, start = child, start + self.block_size
        away: list[Node] = []
        last = node
        while child := last.away.get(self._next_block(ids, start + len(away) * self.block_size)):
            away.append(child)
            last = child
        if away:
            return Match(table, None, 0, away)
        rest = self._next_block(ids, start)
        nearest = max(node.children.values(), key=lambda child: _common(child.ids, rest), default=None)
        common = _common(nearest.ids, rest) if nearest else 0
        return Match(table, nearest if common else None, common, [])

    def recall(self, match: Match) -> None:
        """Let the host's blocks of a match that was just made follow those of its table; as many must be available."""
        for node in match.away:
            del self._away[node]  # allocate() lets nobody have their pages
        for node in match.away:
            block, parent, page = self.allocate(), node.parent, node.page
            assert self._host is not None  # else nothing would be away
            assert parent is not None
            assert page is not None
            assert block is not None
            self._host.restore_block(page, block)
            self._free_pages.append(page)
            parent.children[node.ids] = parent.away.pop(node.ids)
            node.block, node.page, node.ref_count = block, None, 1
            match.table.shared.append(node)

    def _next_block(self, ids: Sequence[int], start: int) -> tuple[int, ...]:
        return tuple(ids[start : min(start + self.block_size, len(ids) - 1)])

    def insert(self, table: BlockTable, ids: Sequence[int]) -> None:
        """Let others find the blocks that ids fill to the brim, while their request goes on."""
        node = self._last_shared(table)
        while table.own and len(ids) >= (len(table.shared) + 1) * self.block_size:
            start = len(table.shared) * self.block_size
            key = tuple(ids[start : start + self.block_size])
            if key in node.children:
                return  # a neighbour was first; both keep their own until they end
            node = self._add(node, key, table.own.pop(0))
            self._reference(node)
            table.shared.append(node)

    def release(self, table: BlockTable, ids: Sequence[int]) -> None:
        """Keep what the blocks hold, ids, for the next who begins alike; the request no longer runs."""
        node = self._last_shared(table)
        for index, block in enumerate(table.own, len(table.shared)):
            key = tuple(ids[index * self.block_size : (index + 1) * self.block_size])
            if not key:
                self._free.append(block)
                continue
            known = next((child for child in node.children.values() if child.ids[: len(key)] == key), None)
            if known is not None:
                self._free.append(block)
                node = known
                continue
            for child in [child for child in node.children.values() if child.ids == key[: len(child.ids)]]:
                if not child.ref_count and not child.children:
                    self._remove(child)  # the block before it grew by this turn
            node = self._add(node, key, block)
        if node in self._evictable:
            self._evictable.move_to_end(node)
        for shared in reversed(table.shared):
            self._dereference(shared)
        table.shared, table.own = [], []

    def evict(self, table: BlockTable) -> list[int]:
        """Forget what a request has written that failed. Returns the blocks that this frees: nobody knows what they
        hold, so they must be zeroed."""
        freed = [*table.own]
        self._free += table.own
        for node in reversed(table.shared):
            self._dereference(node)
            if not node.ref_count and not node.children:
                self._remove(node)
                freed.append(node.block)
        table.shared, table.own = [], []
        return freed

    def _last_shared(self, table: BlockTable) -> Node:
        return table.shared[-1] if table.shared else self._roots[table.adapter]

    def _add(self, parent: Node, ids: tuple[int, ...], block: int) -> Node:
        node = parent.away.pop(ids, None) or Node(ids, block, parent)
        if node.page is not None:  # it was computed again
            self._forget(node)
        node.block = block
        parent.children[ids] = node
        self._evictable.pop(parent, None)
        self._evictable[node] = None
        self._unreferenced += 1
        return node

    def _reference(self, node: Node) -> None:
        if not node.ref_count:
            self._unreferenced -= 1
        node.ref_count += 1
        self._evictable.pop(node, None)

    def _dereference(self, node: Node) -> None:
        node.ref_count -= 1
        if not node.ref_count:
            self._unreferenced += 1
            if not node.children:
                self._evictable[node] = None

    def _make_way(self, node: Node) -> None:
        """Free the block of a leaf without references. The host gets what it holds, if that is a full block."""
        page = self._free_page() if len(node.ids) == self.block_size else None
        if self._host is None or page is None:
            self._remove(node)
            return
        self._host.save_block(node.block, page)
        self._take_out(node)
        node.page = page
        self._away[node] = None
        assert node.parent is not None  # a root is never evictable
        node.parent.away[node.ids] = node

    def _find_pages(self) -> None:
        """Know of those that have come."""
        pages = self._host.host_blocks if self._host else 0
        self._free_pages += range(self._pages, pages)
        self._pages = pages

    def _free_page(self) -> int | None:
        """A page, taken from the longest unused if none is free."""
        if not self._free_pages:
            self._find_pages()
        if not self._free_pages and self._away:
            node = next(iter(self._away))
            assert node.parent is not None
            del node.parent.away[node.ids]
            self._forget(node)
        return self._free_pages.pop() if self._free_pages else None

    def _forget(self, node: Node) -> None:
        """The host need not keep it any longer."""
        assert node.page is not None
        del self._away[node]
        self._free_pages.append(node.page)
        node.page = None

    def _remove(self, node: Node) -> None:
        """Take a leaf without references out of the tree, with what the host has behind it; its block is free."""
        behind = [*node.away.values()]
        for each in behind:
            behind += each.away.values()
            self._forget(each)
        self._take_out(node)

    def _take_out(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        del self._evictable[node], parent.children[node.ids]
        self._unreferenced -= 1
        self._free.append(node.block)
        if parent.parent is not None and not parent.children and not parent.ref_count:
            self._evictable[parent] = None
            self._evictable.move_to_end(parent, last=False)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """For how many ids a and b begin alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
