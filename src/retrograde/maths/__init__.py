"""Pure functions on tensors: the equations of the methods, without layers, sessions or state."""
