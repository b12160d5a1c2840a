"""How a layer runs: slots, class swap, the autograd boundary and the clock. `docs/design.md` explains why."""
