"""Steps that are recorded once and replayed: CUDA graphs, and what stands in for them on CPUs."""
