"""A plain, slow, eager training run: one datum at a time, no vmap, no jit, no optax, no learnax.

It says what a run must compute: the random sequence, the losses, the clip, Adam, and validation.
"""

import jax
import jax.numpy as jnp
import numpy as np


def train(model, losses, rate, seed, data, validation, epochs, batch_size, max_grad=1.0):
    """Trains; returns a history of floats by name, and the parameters.

    Args:
        model: a flax module.
        losses: `(output, datum, step) -> (loss, metrics)`, datum a list.
        rate: `update count -> learning rate`.
        seed: of the run.
        data: lists of arguments, numbers and arrays only.
        validation: name -> data.
        epochs: passes over the data.
        batch_size: data per step.
        max_grad: largest norm of a gradient.
    """
    seq = jax.random.key(seed)
    seq, init = jax.random.split(seq)
    params = model.init(jax.random.split(init)[0], *data[0])["params"]
    first = jax.tree.map(jnp.zeros_like, params)
    second = jax.tree.map(jnp.zeros_like, params)
    count = 0
    history = {}

    def write(name, value):
        history.setdefault(name, []).append(float(value))

    def losses_of(params, keys, batch):
        values, metrics = [], []
        for key, datum in zip(keys, batch, strict=True):
            output = model.apply({"params": params}, *datum, rngs={"params": key})
            value, measured = losses(output, datum, count)
            values.append(jnp.where(jnp.isnan(value), 0.0, value))
            metrics.append(measured)
        return jnp.stack(values), metrics

    for _ in range(epochs):
        for start in range(0, len(data) - batch_size + 1, batch_size):
            batch = data[start : start + batch_size]
            seq, sub = jax.random.split(seq)
            keys = jax.random.split(sub, batch_size)
            value, grads = jax.value_and_grad(lambda p: losses_of(p, keys, batch)[0].mean())(params)  # noqa: B023
            norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
            scale = max_grad / norm if norm > max_grad else 1.0
            write("train/loss", value)
            write("train/gradient norm", norm)
            write("train/learning_rate", rate(count))
            grads = jax.tree.map(lambda g: g * scale, grads)  # noqa: B023
            first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
            second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, grads)
            lr, a, b = rate(count), 1 - 0.9 ** (count + 1), 1 - 0.999 ** (count + 1)
            params = jax.tree.map(
                lambda p, m, v: p - lr * (m / a) / (jnp.sqrt(v / b) + 1e-8),  # noqa: B023
                params,
                first,
                second,
            )
            count += 1
        for name, held_out in validation.items():
            total, metrics = 0.0, {}
            for start in range(0, len(held_out), batch_size):
                batch = held_out[start : start + batch_size]
                if len(batch) == batch_size:
                    seq, sub = jax.random.split(seq)
                    keys = jax.random.split(sub, batch_size)
                else:  # what a tail draws is not part of the sequence
                    keys = jax.random.split(jax.random.key(0), len(batch))
                values, measured = losses_of(params, keys, batch)
                total += float(values.sum())
                for row in measured:
                    for key, value in row.items():
                        metrics[key] = metrics.get(key, 0.0) + float(value)
            write(f"{name}/loss", total / len(held_out))
            for key, value in metrics.items():
                write(f"{name}/{key}", value / len(held_out))
    return history, params
