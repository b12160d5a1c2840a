"""The laboratory: data, models, rivals, training runs, claims and benchmarks. Needs the extra ``lab``."""

from retrograde import extras

extras.require("the laboratory (the command line, the trainer, data sets, reports)", "lab", extras.LAB)
