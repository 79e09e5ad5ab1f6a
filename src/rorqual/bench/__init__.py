"""This machine's ceilings, our engine's figures, and those of the peers installed, side by side."""

from rorqual.bench.figures import Figure, Load
from rorqual.bench.peers import PEERS, Places, find_peers
from rorqual.bench.report import Report
from rorqual.bench.rounds import Bench

__all__ = ["PEERS", "Bench", "Figure", "Load", "Places", "Report", "find_peers"]
