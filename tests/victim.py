"""A run that is there to be stopped: `python -m tests.victim FOLDER OPTIONS`.

It goes on where the last one on this folder stopped. What it is doing is in a small file that outlives it, however
it dies; what came of it is in `result.json`, once it reached its end.
"""

import hashlib
import json
import logging
import mmap
import os
import sys
import time
from pathlib import Path

BEGAN = time.time()
PHASES = ("start-up", "steps", "validation", "end")
WRITING = ("nothing", "save", "cleanup")
NUMBERS = ("phase", "writing", "step", "known", "resumed", "reading_us", "first_step_us")
"""What the small file has, eight bytes each; times are from the start of the process."""


class Diary:
    """Numbers in a file's memory: written at the price of an assignment, and there after a SIGKILL."""

    def __init__(self, path):
        if not path.exists():
            path.write_bytes(bytes(8 * len(NUMBERS)))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)

    def clear(self):
        self._memory[:] = bytes(len(self._memory))

    def __getitem__(self, name):
        place = 8 * NUMBERS.index(name)
        return int.from_bytes(self._memory[place : place + 8], "little")

    def __setitem__(self, name, value):
        place = 8 * NUMBERS.index(name)
        self._memory[place : place + 8] = int(value).to_bytes(8, "little")


def elapsed():
    return 1e6 * (time.time() - BEGAN)


def main(folder, options):
    diary = Diary(folder / "diary")
    diary.clear()
    os.environ["TRAINAX_REGISTRY_PATH"] = str(folder)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)

    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx

    from learnax.checkpoint import files
    from learnax.checkpoint.folder import Folder
    from learnax.checkpoint.history import History
    from learnax.data import Stream
    from learnax.hooks import Hook, Probe, SaveBest, ScaleRateOnPlateau, Validation
    from learnax.loop import Loop
    from learnax.loss import LossPipe
    from learnax.metrics import Max, Mean
    from learnax.models import NNX
    from learnax.parts.progress import Progress
    from learnax.trainer import Trainer
    from tests.helpers import Squared, make_data

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, y=None):
            dtype = jnp.dtype(options.get("dtype", "float32"))
            x = nn.relu(nn.Dense(options.get("width", 64), param_dtype=dtype)(x))
            return nn.Dense(3, param_dtype=dtype)(nn.Dropout(0.25, deterministic=False)(x)).astype(jnp.float32)

    class OfNNX(nnx.Module):
        """Statistics, random streams, and halves whose loss has a scale."""

        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(8, 64, rngs=rngs), nnx.Linear(64, 3, rngs=rngs)
            self.norm, self.drop = nnx.BatchNorm(64, momentum=0.9, rngs=rngs), nnx.Dropout(0.25, rngs=rngs)

        def __call__(self, x):
            return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))

    def weighted(output, batch):
        error = (output - batch[1]) ** 2
        weight = jnp.abs(batch[1])
        return output, Mean((error * weight).sum(-1), weight.sum(-1)), {"largest": Max(error.max(-1))}

    class Slow:
        """Data that take their time, and a stop on the way where one is asked for."""

        def __init__(self, data, seconds):
            self.data, self.seconds = data, seconds

        def __len__(self):
            return len(self.data)

        def __getitem__(self, index):
            time.sleep(self.seconds)
            return self.data[index]

    def during(owner, function, place, inside, outside):
        original = getattr(owner, function)

        def wrapped(*args, **kwargs):
            diary[place] = inside
            try:
                return original(*args, **kwargs)
            finally:
                diary[place] = outside

        setattr(owner, function, wrapped)

    during(History, "write", "writing", 1, 0)
    during(files, "write", "writing", 1, 0)
    during(Folder, "tidy", "writing", 2, 0)
    during(Validation, "_evaluate", "phase", 2, 1)
    original = Loop._dispatch

    def dispatch(loop, *args):
        result = original(loop, *args)
        if not diary["first_step_us"]:
            jax.block_until_ready(loop._progress.state)
            diary["first_step_us"] = elapsed()
        diary["phase"], diary["step"] = 1, loop._log.step_at_most
        return result

    Loop._dispatch = dispatch
    load = Progress._load

    def timed_load(progress):
        began = elapsed()
        result = load(progress)
        diary["reading_us"] = elapsed() - began
        return result

    Progress._load = timed_load

    optimizers = {
        None: None,
        # A random key, a tree with holes, a tree by labels.
        "keys and masks": optax.chain(
            optax.add_noise(0.01, 0.55, jax.random.key(7)),
            optax.masked(optax.add_decayed_weights(1e-3), lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
            optax.multi_transform(
                {"first": optax.adamw(1e-2), "rest": optax.sgd(1e-2, momentum=0.9)},
                lambda params: {name: "first" if name == "Dense_0" else "rest" for name in params},
            ),
        ),
    }
    data = make_data(options.get("size", 96))
    seconds = options.get("seconds", 0.0)
    dataset = Slow(data, seconds) if seconds else data
    if options.get("stream"):
        import grain

        dataset = Stream(grain.MapDataset.source(dataset).shuffle(seed=1).to_iter_dataset())
    models = {
        None: lambda: (Net(), LossPipe([Squared()])),
        "nnx": lambda: (NNX(OfNNX(nnx.Rngs(0)), batched=True, precision="fp16"), weighted),
    }

    def hooks():
        """What keeps a state, adds to the metrics, saves, and changes the rate."""

        class Count(Hook):
            calls = 0

            def next_due(self, step):
                return step - step % 7 + 7

            def __call__(self, moment):
                self.calls += 1
                moment.save("seventh" if self.calls % 5 == 0 else None)
                return {"calls": self.calls, "params": np.float32(sum(map(np.sum, jax.tree.leaves(moment.params))))}

            def state(self):
                return {"calls": self.calls}

            def restore(self, state):
                self.calls = state["calls"]

        probe = Probe(9, lambda view: {"norm": optax.tree_utils.tree_norm(view.grads)}, "probe")
        return [Count(), probe, ScaleRateOnPlateau("val/loss", 1, 0.9), SaveBest(2, "val/loss")]

    model, losses = models[options.get("model")]()
    trainer = Trainer(
        model,
        1e-2,
        losses,
        seed=0,
        train_dataset=dataset,
        val_datasets={"val": Slow(make_data(21, seed=1), seconds)},
        batch_size=8,
        registry="victims",
        load_checkpoint=True,
        keep_best_checkpoint=True,
        checkpoint_every=50,
        max_checkpoints=2,
        num_epochs=options.get("epochs", 10),
        num_workers=options.get("workers", 0),
        save_every=options.get("save_every", 5),
        optimizer=optimizers[options.get("optimizer")],
        hooks=hooks() if options.get("hooks") else None,
        **options.get("trainer", {}),
    )
    diary["step"] = diary["resumed"] = trainer.log.step
    diary["known"] = 1
    (folder / "ready").touch()
    trainer.train()

    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((trainer.train_state, trainer.rng_seq)):
        leaf = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        digest.update(np.asarray(leaf).tobytes())
    metrics = {name: values for name, values in trainer.metrics.items() if "update_time" not in name}
    result = {"state": digest.hexdigest(), "step": int(trainer.log.step), "metrics": metrics}
    done = trainer.position.epoch == trainer.num_epochs
    (folder / ("result.json" if done else "stopped.json")).write_text(json.dumps(result))
    diary["phase"] = 3


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
