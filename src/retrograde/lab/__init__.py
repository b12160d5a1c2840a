"""The laboratory: data, models, rivals, training runs, claims and benchmarks."""
