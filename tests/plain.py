"""The loop that anyone would write: what trainers are compared with."""

import jax
import numpy as np
import optax


def batches(data, size, epochs, length=None):
    """Stacked batches, epoch after epoch; the one that is not full is left out."""
    for _ in range(epochs):
        for start in range(0, len(data) - size + 1, size)[:length]:
            yield jax.tree.map(lambda *rows: np.stack(rows), *data[start : start + size])


def train(loss, params, data, *, size, epochs, rate=1e-2, optimizer=None, clip=1.0, state=None):
    """Trains by `loss(params, state, batch) -> (loss, state)`; the parameters, the state and all losses."""
    optimizer = optax.chain(optax.clip_by_global_norm(clip), optimizer or optax.adam(rate))
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, state, batch):
        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params, state, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state, value

    losses = []
    with jax.numpy_dtype_promotion("standard"):
        for batch in batches(data, size, epochs):
            params, opt_state, state, value = step(params, opt_state, state, batch)
            losses.append(float(value))
    return params, state, losses
