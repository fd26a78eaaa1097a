"""Looking inside a run: a clock for its phases, windows of steps for profilers, what hangs.

`cudart` starts and stops the CUDA profiler. The room may import utils, and no other one.
"""
