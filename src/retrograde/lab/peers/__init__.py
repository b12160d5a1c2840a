"""Rivals of the methods, for honest comparisons: adapters of packages, and small implementations where there is none.

Ours and third parties' alike come through the entry point group ``retrograde.peers``; they are imported when they are
asked for, since the packages that they adapt may be missing.

>>> peer = make("sam", {"rho": 0.05})
"""

from typing import Any

from retrograde.lab.options import configure, require_known
from retrograde.lab.peers.base import Peer as Peer
from retrograde.lab.peers.base import Selector as Selector
from retrograde.methods.registry import installed, load

GROUP = "retrograde.peers"


def names() -> tuple[str, ...]:
    """All installed peers.

    Raises:
        OptionError: two packages bring one name.
    """
    return tuple(installed(GROUP, "peer"))


def find(name: str) -> type[Peer]:
    """The class of peer `name`.

    Raises:
        OptionError: there is no such peer, or its entry point does not lead to a `Peer`.
    """
    known = installed(GROUP, "peer")
    require_known("there is no peer", [name], known)
    return load(known[name], "peer", Peer)


def make(name: str, options: dict[str, Any] | None = None) -> Peer:
    """The peer `name` with `options`, checked against its fields.

    Raises:
        OptionError: no such peer, no such option, a refused value, or a package that is not installed.
    """
    return configure(find(name), "peer", name, options or {})
