"""What a step costs: FLOPs, zeros, and how they are counted."""
