"""A model as pure functions of its parameters, a random key and one datum.

The room may import flax and utils; it must not know losses, steps or devices.
"""
