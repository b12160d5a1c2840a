"""Experiments that claims run where training by a recipe is not what is claimed."""
