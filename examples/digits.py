"""Trains a small convolutional net on scikit-learn's handwritten digits: 1,797 real scans, 8 x 8 pixels.

python examples/digits.py             # a fresh run
python examples/digits.py --resume    # goes on from its checkpoint
python examples/digits.py --wandb     # also an offline wandb run, no account needed

With --distributed, started several times, it is one run over all these processes and their devices: `make train-2`.
"""

import argparse
import os
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits

from learnax.loss import LossFunction, LossPipe
from learnax.profiling.ledger import TITLES
from learnax.registry import Registry
from learnax.sinks import Report
from learnax.trainer import Trainer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PROJECT = "digits"


class Net(nn.Module):
    """Two convolutions and two dense layers: an image `(8, 8, 1)` to ten logits.

    A datum is `[image, label]`, and the model is given both.
    """

    @nn.compact
    def __call__(self, image, label):
        """The logits; the label is the loss's business."""
        x = nn.relu(nn.Conv(32, (3, 3))(image))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(64, (3, 3))(x))
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x.reshape(-1))))


class CrossEntropy(LossFunction):
    """Cross entropy of one image, with accuracy as a metric."""

    def _call(self, output, batch):
        _, label = batch
        loss = optax.softmax_cross_entropy_with_integer_labels(output, label)
        return output, loss, {"accuracy": (output.argmax() == label).astype(jnp.float32)}


def split_digits():
    """Training and validation data: lists of `[image, label]`, every fifth scan held out."""
    digits = load_digits()
    data = [
        [image[..., None].astype(np.float32) / 16, np.int32(label)]
        for image, label in zip(digits.images, digits.target, strict=True)
    ]
    held_out = data[::5]
    training = [datum for i, datum in enumerate(data) if i % 5]
    # A dataset's order is its own: shuffle once, the same way each time.
    order = np.random.default_rng(0).permutation(len(training))
    return [training[i] for i in order], held_out


def draw(ax, image, title, *, right):
    """One scan under what is read in it: green where that is right, red where not."""
    ax.imshow(np.squeeze(image), cmap="gray_r", vmin=0, vmax=1)
    ax.set_title(title, fontsize=10, color="tab:green" if right else "tab:red")
    ax.set_axis_off()


def plot_predictions(folder):
    """A `plot_pipe`: the first digits of the batch, each with its prediction and how sure it is."""

    def plot(run, outputs, batch):
        draw_read(
            "Training digits and what the net reads, with its confidence", outputs, batch, folder / "training.png"
        )

    return plot


def plot_hardest(params, held_out, path):
    """The held-out digits whose right reading the net finds least likely."""
    images, labels = (np.stack(column) for column in zip(*held_out, strict=True))
    logits = np.asarray(jax.vmap(Net().apply, in_axes=(None, 0, 0))({"params": params}, images, labels))
    likely = jax.nn.log_softmax(logits)[np.arange(len(labels)), labels]
    hardest = np.argsort(likely)[:24]
    title = "The hardest held-out digits and what the net reads, with its confidence"
    draw_read(title, logits[hardest], [held_out[i] for i in hardest], path)


def draw_read(title, outputs, data, path):
    """Up to 24 digits, each over what the net reads there."""
    fig, axes = plt.subplots(3, 8, figsize=(11, 5), layout="constrained")
    for ax, logits, (image, label) in zip(axes.flat, outputs, data, strict=False):
        probabilities = np.exp(logits - np.logaddexp.reduce(logits))
        guess = int(probabilities.argmax())
        was = "" if guess == label else f", is {label}"
        draw(ax, image, f"{guess} ({probabilities[guess]:.0%}){was}", right=guess == label)
    fig.suptitle(title)
    save(fig, path)


def sample_noisy(params, key, datum):
    """A `sample_model`: reads the image under fresh noise, which the net never saw in training."""
    image, label = datum
    noisy = jnp.clip(image + 0.25 * jax.random.normal(key, image.shape), 0, 1)
    return {"image": noisy, "probabilities": jax.nn.softmax(Net().apply({"params": params}, noisy, label))}


def noisy_accuracy(sample, datum):
    """A `sample_metrics`: whether the noisy image is still read right."""
    return {"noisy accuracy": float(sample["probabilities"].argmax() == datum[1])}


def plot_samples(folder):
    """A `sample_plot`: noisy digits, each over the probability of every class."""

    def plot(run, samples, _):
        fig, axes = plt.subplots(2, len(samples), figsize=(1.5 * len(samples), 3.4), layout="constrained")
        for (top, bottom), sample in zip(axes.T, samples, strict=True):
            guess = int(sample["probabilities"].argmax())
            draw(top, sample["image"], f"reads {guess}", right=True)
            top.title.set_color("black")
            bottom.bar(range(10), sample["probabilities"], color="tab:blue")
            bottom.set(ylim=(0, 1), xticks=(0, 5, 9), yticks=(0, 1) if bottom is axes[1, 0] else ())
        axes[1, 0].set_ylabel("probability")
        fig.suptitle("Digits under noise, and the probability of each class")
        save(fig, folder / "samples.png")

    return plot


def plot_curves(metrics, path):
    """Loss and accuracy over the run, training beside validation."""
    fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for ax, name in zip(axes, ("loss", "accuracy"), strict=True):
        steps = np.arange(1, len(metrics[f"train/{name}"]) + 1)
        epochs = np.linspace(0, steps[-1], len(metrics[f"val/{name}"]) + 1)[1:]
        ax.plot(steps, metrics[f"train/{name}"], color="tab:blue", alpha=0.25, lw=1, label="training, each step")
        ax.plot(epochs, metrics[f"train_epoch/{name}"], "o-", ms=3, color="tab:blue", label="training, epoch mean")
        ax.plot(epochs, metrics[f"val/{name}"], "o-", ms=3, color="tab:orange", label="validation")
        ax.set(xlabel="step", ylabel=name, title=name.capitalize())
        ax.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_ylim(0.8, 1.005)
    axes[1].legend()
    save(fig, path)


def plot_ledger(ledger, path):
    """Where the wall time of the run went, a bar for each part, and what holds the run back."""
    shown = {TITLES[name]: seconds for name, seconds in ledger.seconds.items() if seconds >= 0.002 * ledger.wall}
    colors = ["tab:blue" if name.startswith("start") else "tab:orange" for name in shown]
    fig, ax = plt.subplots(figsize=(11, 1.1 + 0.34 * len(shown)), layout="constrained")
    bars = ax.barh(list(shown), list(shown.values()), color=colors, height=0.7)
    ax.bar_label(bars, [f"{seconds:.2f} s, {seconds / ledger.wall:.0%}" for seconds in shown.values()], padding=4)
    ax.invert_yaxis()
    ax.set(xlabel="seconds", xlim=(0, 1.15 * max(shown.values())))
    fig.suptitle(f"Where the {ledger.wall:.1f} s of {ledger.steps} steps went\n{ledger.verdict}", fontsize=11)
    ax.spines[["top", "right"]].set_visible(False)
    save(fig, path)


def save(fig, path):
    """Writes a figure where a reader never finds half of it."""
    fig.savefig(path.with_suffix(".part.png"), dpi=110)
    path.with_suffix(".part.png").replace(path)
    plt.close(fig)


def join(place):
    """The one line that a run over several processes takes, before anything else of JAX is used."""
    if place == "auto":
        jax.distributed.initialize()  # Slurm, Open MPI or Kubernetes say which process this is
    else:
        index, count = place.split("/")
        jax.distributed.initialize(process_id=int(index), num_processes=int(count))


def main():
    """Trains, and prints where things are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30, help="epochs of a fresh run; --resume adds a third")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--wandb", action="store_true", help="log to an offline wandb run, too")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read the data")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where everything goes")
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        metavar="I/N",
        help="be one process of a run over several: as its launcher says, or I of N, which meet at the address that "
        "JAX_COORDINATOR_ADDRESS has",
    )
    args = parser.parse_args()
    if args.distributed:
        join(args.distributed)
    first = jax.process_index() == 0

    registry = Registry(PROJECT, args.out)
    run = None
    if args.wandb and first:  # one process logs for all
        os.environ.setdefault("WANDB_MODE", "offline")
        last = registry.path / "last_wandb_run"
        run = registry.restore_run(last.read_text()) if args.resume else registry.new_run({"epochs": args.epochs})
        last.write_text(run.id)
    plots = args.out / "plots"
    plots.mkdir(parents=True, exist_ok=True)

    training, held_out = split_digits()
    batch_size = 48
    steps = args.epochs * (len(training) // batch_size)
    trainer = Trainer(
        Net(),
        learning_rate=optax.cosine_decay_schedule(3e-3, steps, alpha=0.02),
        losses=LossPipe([CrossEntropy()]),
        seed=0,
        train_dataset=training,
        num_epochs=args.epochs + (args.epochs + 2) // 3 * args.resume,
        batch_size=batch_size,
        num_workers=args.num_workers,
        save_every=100,
        checkpoint_every=400,
        max_checkpoints=2,
        keep_best_checkpoint=True,
        best_metric_name="val/accuracy",
        minimize_metric=False,
        load_checkpoint=args.resume,
        val_datasets={"val": held_out},
        run=[Report(args.out), *([run] if run else [])],
        registry=registry,
        compile=True,
        plot_pipe=plot_predictions(plots),
        plot_every=100,
        sample_every=100,
        sample_model=sample_noisy,
        sample_plot=plot_samples(plots),
        sample_metrics=noisy_accuracy,
    )
    preflight = trainer.preflight()
    if first:
        print(preflight)
        print(f"from epoch {trainer.position.epoch} of {trainer.num_epochs}, step {int(trainer.train_state.step)}")
    trainer.train()
    if not first:
        return
    if run is not None:
        run.finish()
    plot_curves(trainer.metrics, plots / "curves.png")
    plot_hardest(jax.device_get(trainer.train_state.params), held_out, plots / "held_out.png")
    plot_ledger(trainer.ledger, plots / "ledger.png")

    accuracy = trainer.metrics["val/accuracy"]
    print(f"validation accuracy: {accuracy[-1]:.2%} at the end, {max(accuracy):.2%} at best")
    print(f"checkpoints: {trainer.checkpointer.path} {list(trainer.checkpointer.list_available_checkpoints())}")
    print(f"report:      {args.out / 'report.html'}")
    print("plots:       " + ", ".join(str(path) for path in sorted(plots.glob("*.png"))))


if __name__ == "__main__":
    main()
