"""Theory as working code: the continuous picture of a training rule, and a bound on what it has learnt.

Everything runs on small problems: weights are one flat vector w (d,), and Hessians are formed.

References:
    Li, Tai, E, *Stochastic modified equations and adaptive stochastic gradient algorithms*, ICML 2017.
    Compagnoni et al., *An SDE for modeling SAM*, ICML 2023.
    McAllester, *PAC-Bayesian model averaging*, COLT 1999; Maurer, *A note on the PAC Bayesian theorem*, 2004.
"""

from retrograde.spectral.theory.bounds import Condition as Condition
from retrograde.spectral.theory.bounds import PacBayes as PacBayes
from retrograde.spectral.theory.bounds import kl_inverse as kl_inverse
from retrograde.spectral.theory.pac_bayesian import pac_bayes as pac_bayes
from retrograde.spectral.theory.quadratic import ornstein_uhlenbeck as ornstein_uhlenbeck
from retrograde.spectral.theory.quadratic import quadratic_rule as quadratic_rule
from retrograde.spectral.theory.rule import Rule as Rule
from retrograde.spectral.theory.rule import drift as drift
from retrograde.spectral.theory.rule import perturbation as perturbation
from retrograde.spectral.theory.rule import perturbed_gradient as perturbed_gradient
from retrograde.spectral.theory.rule import rule_drift as rule_drift
from retrograde.spectral.theory.rule import top_curvature_gradient as top_curvature_gradient
from retrograde.spectral.theory.simulate import Moments as Moments
from retrograde.spectral.theory.simulate import Paths as Paths
from retrograde.spectral.theory.simulate import Problem as Problem
from retrograde.spectral.theory.simulate import network_problem as network_problem
from retrograde.spectral.theory.simulate import simulate_rule as simulate_rule
from retrograde.spectral.theory.simulate import simulate_sde as simulate_sde
from retrograde.spectral.theory.simulate import slope as slope
