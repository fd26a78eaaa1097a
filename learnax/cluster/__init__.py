"""The processes of a run: who they are, what they agree on, how they leave, and what ends a run before its last step.

The room may import the watchdog of `profiling`; it must not know what the run computes.
"""
