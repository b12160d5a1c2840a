"""One HTML page from run folders: what was compared, what it reached and what it cost."""

from retrograde.report.page import write as write
from retrograde.report.runs import Run as Run
from retrograde.report.runs import collect as collect
from retrograde.report.runs import read as read
