"""The kinds of layers: what a linear-like map of each kind is, and which layer types are such maps."""
