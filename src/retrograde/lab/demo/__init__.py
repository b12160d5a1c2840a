"""The demonstration: each method on the kind of work that it is for, judged by the figure that it is for."""
