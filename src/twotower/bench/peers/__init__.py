"""Other programs that generate from the same weights, timed in turns with this one."""

from __future__ import annotations

from twotower.bench.peers.compare import PEERS, Peer, PeerSpeed, measure_peer, open_peer

__all__ = ["PEERS", "Peer", "PeerSpeed", "measure_peer", "open_peer"]
