"""What this rank writes and where it is: the agreed plan bound to live tensors, cached as long as nothing moves.

Agreeing is collective and happens only when a layout has changed on some rank; binding is local.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec
import torch

from gpumove.errors import GpumoveError, LayoutError
from gpumove.format.boxes import Box
from gpumove.state.capture import Capture
from gpumove.state.families import Kin
from gpumove.state.locals import local_tensor
from gpumove.state.members import Tensors
from gpumove.state.peers import Peers
from gpumove.state.plan import Item, Piece, Shard, assign, check_dense, plan_digest, shard_of
from gpumove.state.values import dtype_name


@dataclass(frozen=True)
class Layout:
    """What to stage and what to write. ``items[i].source`` is an index into ``sources``."""

    items: tuple[Item, ...] = ()
    sources: list[torch.Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """The tensor that each source belongs to."""
    scalars: dict[tuple[str, str], int] = field(default_factory=dict)
    """(rule, hyper-parameter) -> the source that holds it, for those that are tensors."""
    at_once: list[bool] = field(default_factory=list)
    """Per source: whether it must be copied before the call returns. The same list object as long as all layouts of
    sources are alike: what staging prepared for it still fits."""


@dataclass(frozen=True)
class Agreement:
    """The outcome of planning: this rank's pieces and, on rank 0, every rank's plan digest."""

    shards: tuple[Shard, ...]
    pieces: tuple[Piece, ...]
    digest: str
    all_digests: tuple[str, ...] = ()
    state_bytes: int = 0


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
        present = _describe(capture, probe=False)
        if present != tuple(s._replace(probe="") for s in self.agreed.shards):
            return True
        self._sources, self._bound = capture.sources, None  # moved, but of the same shape: bind again
        return False

    def agree(self, capture: Capture) -> None:
        """Plan anew. Collective: all ranks call it at the same step.

        Raises:
            LayoutError: the ranks' shards do not make whole tensors; on every rank alike.
        """
        look = partial(_describe, capture, probe=self._peers.world_size > 1)
        shards = self._peers.agree("the description of the layout", look)
        answers: list[bytes] = []
        gathered = self._peers.gather(msgspec.msgpack.encode(shards))
        if self._peers.rank == 0:
            answers = self._plan([msgspec.msgpack.decode(g, type=tuple[Shard, ...]) for g in gathered])
        answer = msgspec.msgpack.decode(self._peers.scatter(answers))
        if "error" in answer:
            raise LayoutError(answer["error"])
        pieces = tuple(Piece(*p) for p in answer["pieces"])
        self.agreed = Agreement(
            shards, pieces, answer["digest"], tuple(answer.get("all", ())), answer.get("state_bytes", 0)
        )
        self._sources, self._bound = capture.sources, None

    def _plan(self, layouts: Sequence[Sequence[Shard]]) -> list[bytes]:
        """On rank 0: every rank's answer, encoded."""
        try:
            pieces = assign(layouts, split_bytes=self._split_bytes)
        except GpumoveError as error:
            return [msgspec.msgpack.encode({"error": str(error)})] * len(layouts)
        digests = [_digest(layout, mine) for layout, mine in zip(layouts, pieces)]
        size = sum(i.box.volume() * i.item_bytes for lay, mine in zip(layouts, pieces) for i in _items(lay, mine))
        answers: list[dict[str, object]] = [{"pieces": mine, "digest": d} for mine, d in zip(pieces, digests)]
        answers[0] |= {"all": digests, "state_bytes": size}
        return [msgspec.msgpack.encode(a) for a in answers]

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
            layout = Layout(self._bound.items + items, [], self._bound.names + list(capture.local))
            self._local = (specs, layout)
        kept = self._local[1]
        sources, names = self._bound.sources + locals_now, list(kept.names)
        scalars = {}
        for rule, key, tensor in _scalars(capture):
            scalars[rule, key] = len(sources)
            sources.append(local_tensor(tensor.detach()))
            names.append(f"{rule}.{key}")
        return Layout(kept.items, sources, names, scalars, self._at_once(kept, names, capture, mutable))

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
        for item in related(_items(agreed.shards, agreed.pieces), capture.relations()):
            piece = agreed.pieces[item.source]
            local = local_tensor(live[item.fqn])
            rows = local[piece.start : piece.stop] if local.dim() else local
            place = (rows.data_ptr(), rows.dtype, rows.shape, rows.stride(), rows.device)
            number = seen.setdefault(place, len(layout.sources))
            if number == len(layout.sources):
                layout.sources.append(rows)
                layout.names.append(item.fqn)
            items.append(item._replace(source=number))
        return Layout(tuple(items), layout.sources, layout.names)


def related(items: Sequence[Item], relations: Mapping[str, Kin]) -> list[Item]:
    """The items with their places in families; those of one family and box are cut by the widest element among them."""
    grains: dict[tuple[str, Box], int] = defaultdict(int)
    for i in items:
        if (kin := relations.get(i.fqn)) is not None:
            grains[kin.family, i.box] = max(grains[kin.family, i.box], i.item_bytes)
    return [
        i if (kin := relations.get(i.fqn)) is None else i._replace(kin=kin, grain=grains[kin.family, i.box])
        for i in items
    ]


def _scalars(capture: Capture) -> Iterator[tuple[str, str, torch.Tensor]]:
    for name, rule in capture.rules.items():
        yield from ((name, key, tensor) for key, tensor in rule.tensors.items())


def _describe(capture: Capture, *, probe: bool) -> tuple[Shard, ...]:
    kin = capture.relations()
    return tuple(
        shard_of(fqn, t, probe=probe, family=kin[fqn].family if fqn in kin else "")
        for source in capture.sources
        for fqn, t in source.items()
    )


def _items(shards: Sequence[Shard], pieces: Sequence[Piece]) -> list[Item]:
    """The boxes of a rank's pieces; ``source`` is the piece's number."""
    found = []
    for number, piece in enumerate(pieces):
        s = shards[piece.shard]
        box = Box(s.offset, s.box)
        if s.box:
            box = Box((s.offset[0] + piece.start, *s.offset[1:]), (piece.stop - piece.start, *s.box[1:]))
        found.append(Item(s.fqn, s.dtype, s.shape, box, s.item_bytes, number, local=False))
    return found


def _digest(shards: Sequence[Shard], pieces: Sequence[Piece]) -> str:
    return plan_digest((i.fqn, i.dtype, i.shape, i.box) for i in _items(shards, pieces))
