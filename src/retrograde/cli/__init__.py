"""The command line: one file for each command. Results go to stdout, everything else to stderr."""

from retrograde import lab as lab  # first: it says which packages are missing
from retrograde.cli.main import main as main
