"""Spectral methods beside the backward pass: adaptation, factorisation, meta learning, transfer, orthogonal weights.

Each is grounded in published work and acts on an ordinary model: the training loop stays the user's own. The rule of
the backward pass itself is `retrograde.Spectral`.
"""

from retrograde.spectral import theory as theory
from retrograde.spectral.adaptation import Adapted as Adapted
from retrograde.spectral.adaptation import Shift as Shift
from retrograde.spectral.adaptation import adapt as adapt
from retrograde.spectral.factorisation import BudgetSchedule as BudgetSchedule
from retrograde.spectral.factorisation import FactorReport as FactorReport
from retrograde.spectral.factorisation import FactorRow as FactorRow
from retrograde.spectral.factorisation import factorise as factorise
from retrograde.spectral.factorisation import load_factors as load_factors
from retrograde.spectral.meta import MetaLearner as MetaLearner
from retrograde.spectral.meta import maml as maml
from retrograde.spectral.orthogonal import Orthogonal as Orthogonal
from retrograde.spectral.orthogonal import keep_orthogonal as keep_orthogonal
from retrograde.spectral.sharing import share_projections as share_projections
from retrograde.spectral.transfer import TransferPenalty as TransferPenalty
