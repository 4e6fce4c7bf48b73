"""What is compared: each peer saves and restores a Job in its own way, behind one small contract."""

from __future__ import annotations

from benchmarks.peers.contract import Peer, make

__all__ = ["Peer", "make"]
