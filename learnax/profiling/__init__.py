"""Looking inside a run. `cudart`: the CUDA profiler's start and stop."""
