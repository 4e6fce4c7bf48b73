"""What this rank writes and where it is: the agreed plan bound to live tensors, cached as long as nothing moves.

Agreeing is collective and happens only when a layout has changed on some rank; binding is local.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import msgspec
import torch
from torch.distributed.tensor import DTensor

from gpumove.errors import LayoutError
from gpumove.format.boxes import Box
from gpumove.format.codec import digest
from gpumove.state.capture import Capture
from gpumove.state.families import Kin
from gpumove.state.locals import local_tensor, probes
from gpumove.state.members import Tensors
from gpumove.state.peers import Peers
from gpumove.state.plan import (
    Gathered,
    Item,
    Kind,
    Piece,
    Table,
    check,
    check_dense,
    local_box,
    plan_digest,
    share,
)
from gpumove.state.values import dtype_name

_MOST_TABLE_BYTES = 256 << 20
"""Tables that differ are compared up to this many bytes: a job of a thousand ranks that all differ is told so too."""


@dataclass(frozen=True)
class Layout:
    """What to stage and what to write. ``items[i].source`` is an index into ``sources``."""

    items: tuple[Item, ...] = ()
    sources: list[torch.Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """The tensor that each source belongs to."""
    scalars: dict[tuple[str, str], int] = field(default_factory=dict)
    """(rule, hyper-parameter) -> the source that holds it, for those that are tensors."""
    steady: frozenset[int] = frozenset()
    """Sources that no optimizer works on: likely to stay as they are."""
    at_once: list[bool] = field(default_factory=list)
    """Per source: whether it must be copied before the call returns. The same list object as long as all layouts of
    sources are alike: what staging prepared for it still fits."""


@dataclass(frozen=True)
class Holding:
    """What this rank has: its tensors, and by kind which part of them."""

    table: Table
    boxes: list[Box]

    def fits(self, other: Holding) -> bool:
        """Whether a plan for the one is a plan for the other; values may differ."""
        return self.boxes == other.boxes and self.table == msgspec.structs.replace(
            other.table, probes=self.table.probes
        )


@dataclass(frozen=True)
class Agreement:
    """The outcome of planning: this rank's pieces and, on rank 0, every rank's plan digest."""

    holding: Holding
    pieces: tuple[Piece, ...]
    digest: str
    all_digests: tuple[str, ...] = ()
    state_bytes: int = 0


class _Said(msgspec.Struct):
    """What a rank says of its holding: enough, if all ranks have the same table."""

    table: str
    table_bytes: int
    boxes: list[Box]


class _Roll(msgspec.Struct):
    """What rank 0 makes of it: distinct tables by the ranks that are to send them, and distinct lists of boxes."""

    speakers: list[int]
    tables: list[int]
    boxes: list[list[Box]]
    cut: list[int]


class Planner:
    """Keeps the agreed plan and the present layout."""

    def __init__(self, peers: Peers, *, split_bytes: int) -> None:
        self._peers, self._split_bytes = peers, split_bytes
        self._sources: tuple[Tensors, ...] = ()
        self._bound: Layout | None = None
        self._local: tuple[list[tuple[str, torch.dtype, torch.Size]], Layout] | None = None
        self._urgent: tuple[Layout, tuple[object, ...], list[bool]] | None = None
        self.agreed: Agreement | None = None

    def agreement(self) -> Agreement:
        """What was agreed on last."""
        if self.agreed is None:
            raise LayoutError("no plan was agreed on")
        return self.agreed

    def changed(self, capture: Capture) -> bool:
        """Whether a plan made earlier no longer fits what is there now on this rank."""
        if self.agreed is None or len(capture.sources) != len(self._sources):
            return True
        # Members without tensors hand out a new empty dict every time.
        if all(a is b or not (a or b) for a, b in zip(capture.sources, self._sources)):
            return False
        if not self.agreed.holding.fits(_describe(capture, probe=False)):
            return True
        self._sources, self._bound = capture.sources, None  # moved, but of the same shape: bind again
        return False

    def agree(self, capture: Capture) -> None:
        """Plan anew. Collective: all ranks call it at the same step.

        Raises:
            LayoutError: the ranks' shards do not make whole tensors; on every rank alike.
        """
        look = partial(_describe, capture, probe=self._peers.world_size > 1)
        holding = self._peers.agree("the description of the layout", look)
        gathered = self._gathered(holding)
        check(gathered)
        pieces = tuple(share(gathered, self._peers.rank, split_bytes=self._split_bytes))
        table = holding.table
        mine = plan_digest(
            (table.names[piece.tensor], *table.kinds[table.of[piece.tensor]][:2], box)
            for piece, box in zip(pieces, _boxes(holding, pieces))
        )
        digests = tuple(d.decode() for d in self._peers.gather(mine.encode()))
        sizes = [Box((), kind.shape).volume() * kind.item_bytes for kind in table.kinds]
        self.agreed = Agreement(holding, pieces, mine, digests, sum(sizes[kind] for kind in table.of))
        self._sources, self._bound = capture.sources, None

    def _gathered(self, holding: Holding) -> Gathered:
        """What all ranks have. Tables travel only where there are several; then all ranks get all of them."""
        table = msgspec.msgpack.encode(holding.table)
        said = msgspec.msgpack.encode(_Said(digest(table), len(table), holding.boxes))
        found = msgspec.msgpack.decode(self._peers.ask(said, _roll), type=_Roll)
        tables = [holding.table]
        if len(found.speakers) > 1:
            mine = table if self._peers.rank in found.speakers else b""
            sent = self._peers.ask(mine, lambda told: msgspec.msgpack.encode([told[r] for r in found.speakers]))
            tables = [msgspec.msgpack.decode(t, type=Table) for t in msgspec.msgpack.decode(sent, type=list[bytes])]
        return Gathered(tables, found.tables, [found.boxes[n] for n in found.cut])

    def lay_out(self, capture: Capture, mutable: Collection[str] = ()) -> Layout:
        """Bind the agreed plan, and this rank's own tensors behind it, to live tensors.

        Args:
            capture: the cut.
            mutable: further tensors that may change before the next optimizer step.
        """
        for fqn, tensor in capture.local.items():
            check_dense(fqn, tensor)
        specs = [(fqn, t.dtype, t.shape) for fqn, t in capture.local.items()]
        locals_now = [local_tensor(t) for t in capture.local.values()]
        if self._bound is None:
            self._bound, self._local = self._bind(capture, self.agreement()), None
        if self._local is None or self._local[0] != specs:
            items = tuple(
                Item(fqn, dtype_name(t.dtype), tuple(t.shape), Box((0,) * t.dim(), tuple(t.shape)), t.element_size(),
                     len(self._bound.sources) + n, local=True)
                for n, (fqn, t) in enumerate(capture.local.items())
            )  # fmt: skip
            layout = replace(
                self._bound, items=self._bound.items + items, names=self._bound.names + list(capture.local)
            )
            self._local = (specs, layout)
        kept = self._local[1]
        sources, names = self._bound.sources + locals_now, list(kept.names)
        scalars = {}
        for rule, key, tensor in _scalars(capture):
            scalars[rule, key] = len(sources)
            sources.append(local_tensor(tensor.detach()))
            names.append(f"{rule}.{key}")
        at_once = self._at_once(kept, names, capture, mutable)
        return Layout(kept.items, sources, names, scalars, kept.steady, at_once)

    def _at_once(self, kept: Layout, names: list[str], capture: Capture, mutable: Collection[str]) -> list[bool]:
        """What must be copied at once, worked out again only if one of the things that it depends on has changed."""
        state = (len(names), capture.at_once, capture.local.keys(), set(mutable))
        if self._urgent is None or self._urgent[0] is not kept or self._urgent[1] != state:
            early = [n in capture.at_once or n in capture.local or n in mutable for n in names[: len(kept.names)]]
            early += [True] * (len(names) - len(early))  # hyper-parameters: schedulers write to them
            self._urgent = (kept, state, early)
        return self._urgent[2]

    def _bind(self, capture: Capture, agreed: Agreement) -> Layout:
        """Rows of live shards, each storage once however many names it has."""
        live = {fqn: t for source in capture.sources for fqn, t in source.items()}
        layout = Layout([], [], [])  # type: ignore[arg-type]
        seen: dict[tuple[object, ...], int] = {}
        items = []
        for item, piece in zip(_items(agreed.holding, agreed.pieces, capture.relations), agreed.pieces):
            rows = local_tensor(live[item.fqn])
            if rows.dim() and piece.stop - piece.start != len(rows):
                rows = rows[piece.start : piece.stop]
            place = (rows.data_ptr(), rows.dtype, rows.shape, rows.stride(), rows.device)
            number = seen.setdefault(place, len(layout.sources))
            if number == len(layout.sources):
                layout.sources.append(rows)
                layout.names.append(item.fqn)
            items.append(item if number == item.source else item._replace(source=number))
        trained = {item.source for item in items if item.kin is not None}
        steady = frozenset(range(len(layout.sources))) - trained
        return Layout(tuple(items), layout.sources, layout.names, steady=steady)


def _roll(said: Sequence[bytes]) -> bytes:
    """Rank 0's list of who has what."""
    ranks = [msgspec.msgpack.decode(s, type=_Said) for s in said]
    tables: dict[str, int] = {}
    speakers: list[int] = []
    left = _MOST_TABLE_BYTES
    for rank, one in enumerate(ranks):
        if one.table not in tables and (left > one.table_bytes or len(tables) < 2):
            tables[one.table] = len(tables)
            speakers.append(rank)
            left -= one.table_bytes
    boxes: dict[bytes, int] = {}
    texts = [msgspec.msgpack.encode(one.boxes) for one in ranks]
    cut = [boxes.setdefault(text, len(boxes)) for text in texts]
    distinct = [ranks[cut.index(n)].boxes for n in range(len(boxes))]
    return msgspec.msgpack.encode(_Roll(speakers, [tables.get(one.table, -1) for one in ranks], distinct, cut))


def _scalars(capture: Capture) -> Iterator[tuple[str, str, torch.Tensor]]:
    for name, rule in capture.rules.items():
        yield from ((name, key, tensor) for key, tensor in rule.tensors.items())


def _describe(capture: Capture, *, probe: bool) -> Holding:
    """What this rank has. Tensors are of one kind if they are cut alike on every rank, whatever that makes of them on
    this one: of equal shape and dtype, and by the same mesh in the same way."""
    kin = capture.relations
    tensors = {fqn: t for source in capture.sources for fqn, t in source.items()}
    numbers: dict[tuple[object, ...], int] = {}
    kinds: list[Kind] = []
    boxes: list[Box] = []
    of: list[int] = []
    for fqn, tensor in tensors.items():
        key: tuple[object, ...] = (tensor.dtype, tensor.shape)
        if isinstance(tensor, DTensor):
            key += (tensor.device_mesh, tensor.placements)
        else:
            check_dense(fqn, tensor)
        number = numbers.setdefault(key, len(kinds))
        if number == len(kinds):
            kinds.append(Kind(dtype_name(tensor.dtype), tuple(tensor.shape), tensor.element_size()))
            boxes.append(local_box(fqn, tensor))
        of.append(number)
    families = [kin[fqn].family if fqn in kin else "" for fqn in tensors]
    marks = probes(list(tensors.values())) if probe else [""] * len(tensors)
    return Holding(Table(list(tensors), of, kinds, families, marks), boxes)


def _boxes(holding: Holding, pieces: Sequence[Piece]) -> list[Box]:
    """Where a rank's pieces lie in their tensors."""
    found = []
    for tensor, start, stop in pieces:
        box = holding.boxes[holding.table.of[tensor]]
        if box.shape and stop - start != box.shape[0]:
            box = Box((box.offset[0] + start, *box.offset[1:]), (stop - start, *box.shape[1:]))
        found.append(box)
    return found


def _items(holding: Holding, pieces: Sequence[Piece], relations: Mapping[str, Kin]) -> list[Item]:
    """The boxes of a rank's pieces, with their places in families; ``source`` is the piece's number.

    Those of one family and box are cut by the widest element among them.
    """
    table, boxes = holding.table, _boxes(holding, pieces)
    rows = [(table.names[piece.tensor], table.kinds[table.of[piece.tensor]], box) for piece, box in zip(pieces, boxes)]
    grains: dict[tuple[str, Box], int] = defaultdict(int)
    for fqn, kind, box in rows:
        if (kin := relations.get(fqn)) is not None:
            grains[kin.family, box] = max(grains[kin.family, box], kind.item_bytes)
    found = []
    for number, (fqn, kind, box) in enumerate(rows):
        kin = relations.get(fqn)
        grain = 0 if kin is None else grains[kin.family, box]
        found.append(Item(fqn, kind.dtype, kind.shape, box, kind.item_bytes, number, False, kin, grain))
    return found
