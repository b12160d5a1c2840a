"""Spectral architecture optimisation: layers as two smaller ones, by the spectrum of their outputs."""

from retrograde.spectral.factorisation.budget import BudgetSchedule as BudgetSchedule
from retrograde.spectral.factorisation.factorise import factorise as factorise
from retrograde.spectral.factorisation.factors import load_factors as load_factors
from retrograde.spectral.factorisation.report import FactorReport as FactorReport
from retrograde.spectral.factorisation.report import FactorRow as FactorRow
