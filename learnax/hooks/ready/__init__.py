"""Hooks that are there to be used: each on what `learnax.hooks` gives to anyone, and nothing else."""
