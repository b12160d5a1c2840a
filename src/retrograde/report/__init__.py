"""One HTML page from run folders, or from results of claims: what was compared, what it reached and what it cost."""

from retrograde import lab as lab  # first: it says which packages are missing
from retrograde.report.page import read_claims as read_claims
from retrograde.report.page import write as write
from retrograde.report.page import write_claims as write_claims
