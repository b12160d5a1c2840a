"""The products of a layer's backward pass, one module for each backend, behind one contract."""
