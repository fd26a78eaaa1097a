"""What people train, on small data of the same shapes: each the plain loop that it is elsewhere, thirty steps long."""

import importlib.util

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from learnax.metrics import Mean
from learnax.models import NNX, Functions, Linen
from learnax.step import key_pair
from tests import plain
from tests.helpers import ROOT, assert_trees_close, assert_trees_equal, host, make_trainer

pytestmark = pytest.mark.thorough

SIZE, STEPS = 8, 30
MODES = {"train": {"train": True}, "eval": {"train": False}}


def page(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys(seed=0):
    """The keys of a run's batches, one after another; a model that sees the whole batch draws from this one."""
    seq = key_pair(seed)[0]
    while True:
        seq, key = jax.random.split(seq)
        yield jax.random.fold_in(key, 0)


def loop(loss, params, data, optimizer, state=None, clip=1.0, keyed=keys):
    """Thirty steps of `loss(params, state, key, batch) -> (loss, state)`."""
    drawn = keyed()
    batches = [(next(drawn), batch) for batch in plain.batches(data, SIZE, STEPS)][:STEPS]
    optimizer = optax.chain(optax.clip_by_global_norm(clip), optimizer)
    opt_state, losses = optimizer.init(params), []

    @jax.jit
    def step(params, opt_state, state, key, batch):
        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params, state, key, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state, value

    with jax.numpy_dtype_promotion("standard"):
        for key, batch in batches:
            params, opt_state, state, value = step(params, opt_state, state, key, batch)
            losses.append(float(value))
    return params, state, losses


def run(model, losses, data, optimizer, **overrides):
    """The trainer's thirty steps, and the state that they began with."""
    options = {"optimizer": optimizer, "train_dataset": data[: STEPS * SIZE], "batch_size": SIZE, "seed": 0}
    options["num_epochs"] = -(-STEPS // (len(options["train_dataset"]) // SIZE))
    trainer = make_trainer(model=model, losses=losses, **options | overrides)
    before = host(trainer.train_state)
    trainer.train()
    assert trainer.train_state.step == STEPS
    return trainer, before


def assert_same(trainer, losses, params, state=None):
    np.testing.assert_allclose(trainer.metrics["train/loss"], losses, rtol=1e-4, atol=1e-6)
    assert_trees_close(trainer.train_state.params, params, rtol=1e-4, atol=1e-5)
    if state is not None:
        assert_trees_close(trainer.train_state.model_state, state, rtol=1e-4, atol=1e-5)


SGD = optax.sgd(0.05, momentum=0.9)
FIVE = STEPS // 6 * SIZE
"""Data of five steps: six epochs make thirty."""


def entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def test_a_resnet_with_batch_statistics():
    resnet = page("resnet")
    data, held_out = resnet.digits()
    data, held_out = data[:FIVE], held_out[:11]
    module = resnet.ResNet(4)
    model = Linen(module, batched=True, **MODES)
    trainer, before = run(model, resnet.losses, data, SGD, val_datasets=[held_out])

    def loss(params, state, key, batch):
        variables = {"params": params, **state}
        logits, state = module.apply(variables, batch[0], train=True, mutable=["batch_stats"])
        return entropy(logits, batch[1]).mean(), state

    params, state, losses = loop(loss, before.params, data, SGD, before.model_state)
    assert_same(trainer, losses, params, state)
    x, y = (np.stack(part) for part in zip(*held_out, strict=True))
    logits = module.apply({"params": params, **state}, x, train=False)
    np.testing.assert_allclose(trainer.metrics["val/loss"][-1], entropy(logits, y).mean(), rtol=1e-3)
    np.testing.assert_allclose(trainer.metrics["val/accuracy"][-1], (logits.argmax(-1) == y).mean(), atol=0.1)


def test_the_mnist_of_nnx():
    mnist = page("nnx_digits")
    data = mnist.digits()[0][:FIVE]
    module = mnist.CNN(rngs=nnx.Rngs(0))
    for layer in (module.dropout1, module.dropout2):
        layer.rate = 0.0  # NNX by hand draws from streams of its own
    graph, *states = nnx.split(module, nnx.Param, ...)
    states = jax.tree.map(jnp.array, states)
    with jax.numpy_dtype_promotion("standard"):  # what nnx.avg_pool needs
        trainer, _ = run(NNX(module, batched=True), mnist.losses, data, SGD)

    by_hand = nnx.merge(graph, *states)
    optimizer = nnx.Optimizer(by_hand, optax.chain(optax.clip_by_global_norm(1.0), SGD), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, x, y):
        def loss(module):
            return entropy(module(x), y).mean()

        value, grads = nnx.value_and_grad(loss)(module)
        optimizer.update(module, grads)
        return value

    with jax.numpy_dtype_promotion("standard"):
        losses = [float(step(by_hand, optimizer, *batch)) for batch in plain.batches(data, SIZE, 6)]
    assert_same(trainer, losses, nnx.to_pure_dict(nnx.state(by_hand, nnx.Param)))
    np.testing.assert_allclose(module.norm1.mean[...], by_hand.norm1.mean[...], rtol=1e-4, atol=1e-6)


def test_tokens_with_weights_on_devices_and_accumulated():
    tokens = page("tokens")
    data, held_out = tokens.lines()
    data, held_out = data[:FIVE], held_out[:11]
    module = tokens.Transformer(16, 1)
    model = Linen(module, batched=True, train={"train": False}, eval={"train": False})  # no dropout: it would differ

    def loss_of(params, batch):
        there = (batch[1] > 0).astype(np.float32)
        return (entropy(module.apply({"params": params}, batch[0], train=False), batch[1]) * there).sum() / there.sum()

    runs = [
        run(model, tokens.losses, data, SGD, val_datasets=[held_out], num_epochs=6, **options)
        for options in ({"devices": jax.devices()[:4]}, {"batch_size": SIZE // 2, "accumulate_steps": 2})
    ]
    begin = runs[0][1].params
    loss = lambda params, state, key, batch: (loss_of(params, batch), state)  # noqa: E731
    params, _, losses = loop(loss, begin, data, SGD)
    batch = [np.stack(part) for part in zip(*held_out, strict=True)]
    validated = loss_of(params, batch)
    for trainer, before in runs:
        assert_trees_equal(before.params, begin)
        assert_same(trainer, losses, params)
        np.testing.assert_allclose(trainer.metrics["val/loss"][-1], validated, rtol=1e-4)
        assert trainer.metrics["val/tokens"][-1] == (batch[1] > 0).sum()


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.soak), 4])
def test_contrastive_learning_over_all_devices(count):
    simclr = page("simclr")
    data = simclr.views()[:FIVE]
    module = simclr.Encoder()
    model = Linen(module, batched=True)
    trainer, before = run(model, simclr.losses, data, SGD, devices=jax.devices()[:count])

    def loss(params, state, key, batch):
        views = jnp.moveaxis(module.apply({"params": params}, *batch), 1, 0).reshape(2 * SIZE, -1)
        logits = views @ views.T / 0.5 - 1e9 * jnp.eye(2 * SIZE)
        return entropy(logits, (jnp.arange(2 * SIZE) + SIZE) % (2 * SIZE)).mean(), state

    params, _, losses = loop(loss, before.params, data, SGD)
    assert_same(trainer, losses, params)


def test_diffusion_with_averaged_parameters():
    ddpm = page("ddpm")
    data = ddpm.images()[:FIVE]
    module, decay = ddpm.Diffusion(), 0.9
    trainer, before = run(module, ddpm.losses, data, SGD, ema=decay)
    assert trainer.parts.model.streams == ()

    def loss(params, state, key, batch):
        own = jax.random.split(key, SIZE)
        noise, seen = jax.vmap(lambda key, x: module.apply({"params": params}, x, rngs={"params": key}))(own, batch)
        return jnp.mean((noise - seen) ** 2), state

    def by_datum():
        seq = key_pair(0)[0]
        while True:
            seq, key = jax.random.split(seq)
            yield key

    params, _, losses = loop(loss, before.params, data, SGD, keyed=by_datum)
    assert_same(trainer, losses, params)
    assert trainer.train_state.ema["denoiser"].keys() == params["denoiser"].keys()
    samples = jax.vmap(ddpm.draw, in_axes=(None, 0, 0))(
        trainer.train_state.ema, jax.random.split(jax.random.key(0), 2), np.zeros((2, 64), np.float32)
    )
    assert np.isfinite(samples).all()


class Classifier(nn.Module):
    """Sentiment of a sentence of any length: an LSTM up to its end, behind word dropout."""

    @nn.compact
    def __call__(self, tokens, lengths, train: bool):
        x = nn.Dropout(0.3, deterministic=not train)(nn.Embed(20, 8)(tokens))
        x = nn.RNN(nn.LSTMCell(8), return_carry=True)(x, seq_lengths=lengths)[0][1]
        return nn.Dense(1)(x)[..., 0]


def test_sentiment_with_modes():
    rng = np.random.default_rng(0)
    data = [
        [rng.integers(0, 20, 6).astype(np.int32), np.int32(rng.integers(1, 7)), np.float32(rng.integers(2))]
        for _ in range(FIVE)
    ]
    losses = lambda output, batch: (output, optax.sigmoid_binary_cross_entropy(output, batch[2]), {})  # noqa: E731
    module = Classifier()
    model = Linen(module, batched=True, **MODES)
    # A validation set that is a tail alone takes no key from the run's sequence.
    trainer, before = run(model, losses, data, SGD, val_datasets=[data[:7]])

    def loss(params, state, key, batch):
        output = module.apply({"params": params}, *batch[:2], train=True, rngs={"dropout": key})
        return optax.sigmoid_binary_cross_entropy(output, batch[2]).mean(), state

    params, _, values = loop(loss, before.params, data, SGD)
    assert_same(trainer, values, params)
    x, lengths, y = (np.stack(part) for part in zip(*data[:7], strict=True))
    expected = optax.sigmoid_binary_cross_entropy(module.apply({"params": params}, x, lengths, train=False), y).mean()
    np.testing.assert_allclose(trainer.metrics["val/loss"][-1], expected, rtol=1e-4)


class Seq2Seq(nn.Module):
    """An LSTM reads a question, another one writes the answer, teacher-forced."""

    @nn.compact
    def __call__(self, question, answer):
        carry, _ = nn.RNN(nn.LSTMCell(16), return_carry=True, name="reads")(nn.one_hot(question, 12))
        x = nn.RNN(nn.LSTMCell(16), name="writes")(nn.one_hot(answer[:, :-1], 12), initial_carry=carry)
        return nn.Dense(12)(x)


@pytest.mark.soak
def test_sequences_to_sequences_whose_padding_has_no_weight():
    rng = np.random.default_rng(0)
    data = []
    for _ in range(FIVE):
        one, two = rng.integers(0, 50, 2)
        codes = lambda text, width: np.array([*map("=0123456789 ".index, text.ljust(width))], np.int32)  # noqa: E731
        data.append([codes(f"{one}={two}".replace("+", ""), 6), codes(f"={one + two}", 5)])

    def losses(logits, batch):
        target = batch[1][:, 1:]
        there = (target < 11).astype(jnp.float32)
        return logits, Mean((entropy(logits, target) * there).sum(-1), there.sum(-1)), {}

    module = Seq2Seq()
    trainer, before = run(Linen(module, batched=True), losses, data, SGD)

    def loss(params, state, key, batch):
        target = batch[1][:, 1:]
        there = target < 11
        logits = module.apply({"params": params}, *batch)
        return (entropy(logits, target) * there).sum() / there.sum(), state

    params, _, values = loop(loss, before.params, data, SGD)
    assert_same(trainer, values, params)


class VAE(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(16)(x))
        mean, log_variance = nn.Dense(2)(hidden), nn.Dense(2)(hidden)
        z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(self.make_rng("z"), mean.shape)
        return nn.Dense(8)(nn.relu(nn.Dense(16)(z))), mean, log_variance


@pytest.mark.soak
def test_a_vae_that_draws_its_latents():
    rng = np.random.default_rng(0)
    data = [rng.random(8).astype(np.float32) for _ in range(FIVE)]

    def losses(output, batch):
        seen, mean, log_variance = output
        found = optax.sigmoid_binary_cross_entropy(seen, batch[0]).sum(-1)
        spread = -0.5 * (1 + log_variance - mean**2 - jnp.exp(log_variance)).sum(-1)
        return seen, found + spread, {"found": found, "spread": spread}

    module = VAE()
    optimizer = optax.sgd(1e-3)
    trainer, before = run(Linen(module, batched=True), losses, data, optimizer, max_grad=1e9)

    def loss(params, state, key, batch):
        output = module.apply({"params": params}, batch, rngs={"params": key})
        return losses(output, [batch])[1].mean(), state

    params, _, values = loop(loss, before.params, data, optimizer, clip=1e9)
    assert_same(trainer, values, params)


class Graph(nn.Module):
    """Two rounds of messages over the edges of a padded graph, and a sum over its nodes."""

    @nn.compact
    def __call__(self, nodes, edges, there):
        for _ in range(2):
            messages = nn.Dense(8)(nodes)[edges[:, 0]]
            nodes = nn.relu(nn.Dense(8)(nodes) + jnp.zeros((len(nodes), 8)).at[edges[:, 1]].add(messages))
        return nn.Dense(3)((nodes * there[:, None]).sum(0))


def test_padded_graphs_with_labels_that_are_missing():
    rng = np.random.default_rng(0)
    data = []
    for _ in range(FIVE):
        size = rng.integers(2, 6)
        labels = np.where(rng.random(3) < 0.4, np.nan, rng.integers(0, 2, 3)).astype(np.float32)
        there = (np.arange(6) < size).astype(np.float32)
        nodes = (rng.normal(size=(6, 4)) * there[:, None]).astype(np.float32)
        data.append([nodes, rng.integers(0, size, (8, 2)).astype(np.int32), there, labels])

    def of_graph(logits, labels):
        known = ~jnp.isnan(labels)
        loss = optax.sigmoid_binary_cross_entropy(logits, jnp.where(known, labels, 0))
        return jnp.where(known, loss, 0), known.astype(jnp.float32)

    def losses(logits, datum):
        loss, weight = of_graph(logits, datum[3])
        return logits, Mean(loss.sum(), weight.sum()), {}

    module = Graph()
    trainer, before = run(Linen(module, inputs=3), losses, data, SGD, val_datasets=[data[:11]])

    def loss_of(params, batch):
        logits = jax.vmap(lambda *datum: module.apply({"params": params}, *datum))(*batch[:3])
        loss, weight = of_graph(logits, batch[3])
        return loss.sum() / weight.sum()

    params, _, values = loop(lambda p, state, key, batch: (loss_of(p, batch), state), before.params, data, SGD)
    assert_same(trainer, values, params)
    assert trainer.metrics["train/nan_data"] == [0] * STEPS
    batch = [np.stack(part) for part in zip(*data[:11], strict=True)]
    np.testing.assert_allclose(trainer.metrics["val/loss"][-1], loss_of(params, batch), rtol=1e-4)


JUDGE = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(1)])


class GAN(nn.Module):
    def setup(self):
        self.generator = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
        self.discriminator = JUDGE.clone()

    def __call__(self, real, noise):
        made = self.generator(noise)
        stopped = jax.lax.stop_gradient
        judge = lambda x: self.discriminator(x)[..., 0]  # noqa: E731
        # Of what it says of made data for the generator, the discriminator itself learns nothing.
        of_real, of_made = judge(real), judge(stopped(made))
        fooled = JUDGE.apply(stopped(self.discriminator.variables), made)[..., 0]
        return of_real, of_made, fooled


def test_a_gan_by_two_patterns():
    rng = np.random.default_rng(0)
    data = [[rng.normal(3, 1, 2).astype(np.float32), rng.normal(size=4).astype(np.float32)] for _ in range(FIVE)]

    def losses(output, batch):
        real, made, fooled = output
        judged = jax.nn.softplus(-real) + jax.nn.softplus(made)
        return output, judged + jax.nn.softplus(-fooled), {"judged": judged}

    module = GAN()
    patterns = {"generator/.*": optax.sgd(0.02), "discriminator/.*": optax.sgd(0.05)}
    trainer, before = run(Linen(module, batched=True), losses, data, patterns, max_grad=1e9)
    parts = {"generator": optax.sgd(0.02), "discriminator": optax.sgd(0.05)}
    params, states = before.params, {name: tx.init(before.params[name]) for name, tx in parts.items()}

    def apply(params, real, noise):
        made = GAN().bind({"params": params["made"]}).generator(noise)
        judge = lambda x: GAN().bind({"params": params["judge"]}).discriminator(x)[..., 0]  # noqa: E731
        return made, judge(real), judge(made)

    for real, noise in plain.batches(data, SIZE, 6):

        def judged(own, params=params, real=real, noise=noise):
            _, of_real, of_made = apply({"made": params, "judge": params | {"discriminator": own}}, real, noise)
            return jnp.mean(jax.nn.softplus(-of_real) + jax.nn.softplus(of_made))

        def made(own, params=params, real=real, noise=noise):
            _, _, fooled = apply({"made": params | {"generator": own}, "judge": params}, real, noise)
            return jnp.mean(jax.nn.softplus(-fooled))

        grads = {
            "generator": jax.grad(made)(params["generator"]),
            "discriminator": jax.grad(judged)(params["discriminator"]),
        }
        for name, tx in parts.items():
            updates, states[name] = tx.update(grads[name], states[name])
            params = params | {name: optax.apply_updates(params[name], updates)}
    assert_trees_close(trainer.train_state.params, params, rtol=1e-4, atol=1e-5)


def test_maml_whose_loss_makes_a_step_of_its_own():
    """A datum is a task; the model adapts to half of it, and is judged on the other half."""
    rng = np.random.default_rng(0)
    data = []
    for _ in range(FIVE):
        x, phase = rng.uniform(-3, 3, (8, 1)).astype(np.float32), rng.uniform(0, 3)
        data.append([x, np.sin(x + phase).astype(np.float32)])

    def net(params, x):
        return jnp.tanh(x @ params["first"] + params["bias"]) @ params["last"]

    def init(key):
        one, two = jax.random.split(key)
        return {
            "first": jax.random.normal(one, (1, 16)),
            "bias": jnp.zeros(16),
            "last": jax.random.normal(two, (16, 1)) / 4,
        }

    def apply(params, x, y):
        error = lambda params, part: jnp.mean((net(params, x[part]) - y[part]) ** 2)  # noqa: E731
        adapted = jax.tree.map(lambda p, g: p - 0.05 * g, params, jax.grad(error)(params, slice(4)))
        return error(adapted, slice(4, 8))

    losses = lambda output, datum: (output, output, {})  # noqa: E731
    optimizer = optax.adam(1e-2)
    trainer, before = run(Functions(init, apply), losses, data, optimizer)
    loss = lambda params, state, key, batch: (jax.vmap(apply, (None, 0, 0))(params, *batch).mean(), state)  # noqa: E731
    params, _, values = loop(loss, before.params, data, optimizer)
    assert_same(trainer, values, params)


class OfEquinox(eqx.Module):
    """Equinox's MNIST, smaller."""

    layers: list

    def __init__(self, key):
        one, two, three = jax.random.split(key, 3)
        self.layers = [
            eqx.nn.Conv2d(1, 3, kernel_size=3, key=one),
            eqx.nn.MaxPool2d(kernel_size=2),
            jax.nn.relu,
            jnp.ravel,
            eqx.nn.Linear(75, 16, key=two),
            jax.nn.sigmoid,
            eqx.nn.Linear(16, 10, key=three),
            jax.nn.log_softmax,
        ]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.soak
def test_the_mnist_of_equinox():
    data = [[np.moveaxis(image, -1, 0), label] for image, label in page("resnet").digits()[0][:FIVE]]
    module = OfEquinox(jax.random.key(0))
    losses = lambda output, datum: (output, -output[datum[1]], {})  # noqa: E731
    trainer, _ = run(module, losses, data, SGD)
    tx = optax.chain(optax.clip_by_global_norm(1.0), SGD)
    opt_state, values = tx.init(eqx.filter(module, eqx.is_inexact_array)), []

    @eqx.filter_jit
    def step(module, opt_state, x, y):
        def loss(module):
            return -jnp.take_along_axis(jax.vmap(module)(x), y[:, None], axis=1).mean()

        value, grads = eqx.filter_value_and_grad(loss)(module)
        updates, opt_state = tx.update(grads, opt_state)
        return eqx.apply_updates(module, updates), opt_state, value

    with jax.numpy_dtype_promotion("standard"):
        for batch in plain.batches(data, SIZE, 6):
            module, opt_state, value = step(module, opt_state, *batch)
            values.append(float(value))
    assert_same(trainer, values, eqx.filter(module, eqx.is_inexact_array))
