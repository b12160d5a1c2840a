"""Better backward passes for PyTorch: one line attaches them, and what they save is measured."""

from typing import TYPE_CHECKING, Any

from retrograde import errors as errors
from retrograde import spectral as spectral
from retrograde.accounting.flops import Flops as Flops
from retrograde.engine.branches import Residual as Residual
from retrograde.engine.maps.base import LayerKind as LayerKind
from retrograde.engine.maps.base import Map as Map
from retrograde.engine.maps.base import Operands as Operands
from retrograde.engine.maps.base import register_layer as register_layer
from retrograde.engine.maps.base import register_map as register_map
from retrograde.engine.maps.linear import LinearKind as LinearKind
from retrograde.engine.maps.linear import LinearMap as LinearMap
from retrograde.engine.slots import Call as Call
from retrograde.engine.slots import Conductor as Conductor
from retrograde.engine.slots import Method as Method
from retrograde.engine.slots import Needs as Needs
from retrograde.engine.slots import Rule as Rule
from retrograde.engine.slots import Site as Site
from retrograde.engine.slots import Step as Step
from retrograde.engine.slots import Tier as Tier
from retrograde.kernels.delta import Delta as Delta
from retrograde.kernels.dispatch import Products as Products
from retrograde.kernels.geometry import Geometry as Geometry
from retrograde.kernels.work import Work as Work
from retrograde.methods.decorrelate import Decorrelate as Decorrelate
from retrograde.methods.deepfocus import DeepFocus as DeepFocus
from retrograde.methods.dither import Dither as Dither
from retrograde.methods.exact import Exact as Exact
from retrograde.methods.perforate import Perforate as Perforate
from retrograde.methods.spectral import Spectral as Spectral
from retrograde.plan import Plan as Plan
from retrograde.planning import make_plan as make_plan
from retrograde.session import Session as Session
from retrograde.session import Summary as Summary
from retrograde.session import attach as attach
from retrograde.session import detach as detach
from retrograde.session import fold as fold
from retrograde.session import resume as resume
from retrograde.session import session_of as session_of

__version__ = "0.1.0"

if TYPE_CHECKING:
    from retrograde.lab.claims.compression import compress as compress
    from retrograde.lab.loading import load_run as load_run


_OF_THE_LABORATORY = {"compress": "claims.compression", "load_run": "loading"}


def __getattr__(name: str) -> Any:
    """What needs the packages of the extra ``lab``, imported when it is asked for."""
    if name not in _OF_THE_LABORATORY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from retrograde.extras import LAB, require

    require(f"rg.{name}", "lab", LAB)
    return getattr(import_module(f"retrograde.lab.{_OF_THE_LABORATORY[name]}"), name)
