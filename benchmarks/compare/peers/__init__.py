"""What is compared: each peer saves and restores a Job in its own way, behind one small contract."""

from __future__ import annotations

from benchmarks.compare.peers.contract import Peer
from benchmarks.compare.peers.registry import PEERS, Entry, make

__all__ = ["PEERS", "Entry", "Peer", "make"]
