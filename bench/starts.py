"""A short start: from the command to the end of the first epoch, learnax against a script written by hand.

python -m bench.starts --models mlp deep --pairs 3

Each start is a process of its own. The first of a pair finds an empty compilation cache, the second what the first
left there. Both scripts train one epoch of the same data; that by hand imports nothing but jax, flax and optax.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bench.results import Results
from bench.workloads import IN, OUT, Workload, deep, gpt, mlp, on_mlp_data, squared_error

# ---- what is trained


class Scattered(nn.Module):
    """Many parameters of one number each, as formulas of physics have them."""

    count: int

    @nn.compact
    def __call__(self, x: Any, y: Any) -> Any:
        """The prediction."""
        scalars = [self.param(f"p{i:04d}", nn.initializers.constant(0.1), ()) for i in range(self.count)]
        weights = jnp.stack(scalars).reshape(-1, OUT)
        rows = len(weights)
        return jnp.tanh(jnp.tile(x, -(-rows // IN))[..., :rows]) @ weights


def _equivariant() -> Workload:
    """A small graph network of e3nn-jax, on graphs of eight points."""
    import e3nn_jax as e3nn
    import e3nn_jax.flax

    class Message(nn.Module):
        """Features of the points after they have seen one another."""

        irreps: Any

        @nn.compact
        def __call__(self, features: Any, steps: Any) -> Any:
            points = features.shape[0]
            seen = e3nn.flax.Linear(features.irreps)(features)[None].broadcast_to((points, points, -1))
            harmonics = e3nn.spherical_harmonics("1o + 2e", steps, normalize=True)
            messages = e3nn.concatenate([seen, e3nn.tensor_product(seen, harmonics)]).regroup()
            lengths = jnp.sqrt(jnp.sum(steps**2, -1, keepdims=True) + 1e-6)
            weights = e3nn.flax.MultiLayerPerceptron([32, messages.irreps.num_irreps], jax.nn.silu)(lengths)
            gathered = e3nn.mean(messages * weights, axis=1)
            return e3nn.gate(e3nn.flax.Linear(self.irreps)(gathered))

    class Equivariant(nn.Module):
        """Three rounds of messages, and one number of each point's scalars."""

        @nn.compact
        def __call__(self, points: Any, y: Any) -> Any:
            steps = e3nn.IrrepsArray("1o", points[:, None] - points[None])
            features = e3nn.IrrepsArray("0e", jnp.ones((len(points), 1)))
            for _ in range(3):
                features = Message("24x0e + 24x0o + 8x1o + 8x2e")(features, steps.array)
            return e3nn.flax.Linear("1x0e")(features).array.mean()

    rng = np.random.default_rng(0)
    points = rng.normal(size=(16 * 16, 8, 3)).astype(np.float32)
    targets = np.linalg.norm(points, axis=-1).mean(-1).astype(np.float32)
    data = [[x, y] for x, y in zip(points, targets, strict=True)]
    return Workload("e3nn", Equivariant(), squared_error, data, 16, 16)


MODELS: dict[str, Callable[[], Workload]] = {
    "mlp": lambda: mlp(128, 16),
    "deep": lambda: deep(60, 16),
    "scalars": lambda: on_mlp_data("scalars", Scattered(1000), 16),
    "gpt": lambda: gpt("10m", 16),
    "e3nn": _equivariant,
}
"""What is started, by name."""


# ---- the two scripts


def by_hand(workload: Workload, cache: str) -> list[float]:
    """One epoch as a person would write it; the loss of each step."""
    import optax

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    model = workload.model
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(workload.learning_rate))

    def init(key: Any) -> Any:
        params = model.init(key, *workload.data[0])["params"]
        return params, optimizer.init(params)

    def loss_of(params: Any, batch: Any) -> Any:
        outputs = jax.vmap(lambda *datum: model.apply({"params": params}, *datum))(*batch)
        return workload.loss(outputs, batch)

    def step(state: Any, batch: Any) -> Any:
        params, opt_state = state
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    state = jax.jit(init)(jax.random.key(0))
    step = jax.jit(step, donate_argnums=0)
    losses, size = [], workload.batch_size
    for start in range(0, len(workload.data), size):
        batch = [np.stack(column) for column in zip(*workload.data[start : start + size], strict=True)]
        state, loss = step(state, batch)
        losses.append(loss)
    return [float(loss) for loss in jax.device_get(losses)]


def by_learnax(workload: Workload, cache: str) -> list[float]:
    """The same by a trainer as it comes."""
    from learnax.trainer import Trainer

    trainer = Trainer(**workload.given(1), compilation_cache=cache)
    trainer.train()
    return trainer.metrics["train/loss"]


SCRIPTS: dict[str, Callable[[Workload, str], list[float]]] = {"hand": by_hand, "learnax": by_learnax}
"""Who starts, by name."""
KINDS = ("cold", "warm")
"""With an empty compilation cache, and with what the first start left there."""


# ---- taking turns


@dataclasses.dataclass
class Start:
    """What a start took: seconds by the clock, and of all processors together."""

    seconds: float
    work: float


def start(model: str, script: str, cache: str) -> Start:
    """Starts a process that trains an epoch, and waits for its end."""
    command = [sys.executable, "-m", "bench.starts", "--child", model, script, cache]
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    # An installed package has its modules compiled; this one gets them at its first start here.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    root = Path(__file__).parents[1]
    with tempfile.TemporaryFile("w+") as said:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{said.read()[-4000:]}")
    return Start(seconds, used.ru_utime + used.ru_stime)


def in_turns(model: str, pairs: int) -> dict[tuple[str, str], list[Start]]:
    """Starts of both scripts with an empty cache and a filled one, each turn begun by the other script."""
    taken: dict[tuple[str, str], list[Start]] = {}
    for number in range(pairs):
        with contextlib.ExitStack() as stack:
            folders = {
                script: stack.enter_context(tempfile.TemporaryDirectory(prefix="learnax-bench-")) for script in SCRIPTS
            }
            for kind in KINDS:
                for script in list(SCRIPTS) if number % 2 else reversed(SCRIPTS):
                    taken.setdefault((script, kind), []).append(start(model, script, folders[script]))
    return taken


def measure(results: Results, models: list[str], pairs: int) -> None:
    """Starts of these models, as figures of a benchmark."""
    for model in models:
        taken = in_turns(model, pairs)
        for kind in KINDS:
            for script in SCRIPTS:
                seconds = [one.seconds for one in taken[script, kind]]
                results.add(model, script, f"start to the end of an epoch, {kind}", "s", seconds)
            results.compare(model, f"start to the end of an epoch, {kind}", "learnax", "hand")


def table(model: str, taken: dict[tuple[str, str], list[Start]]) -> list[str]:
    """Lines of a table: medians of both scripts and their ratio, by the clock and by the processors."""
    lines = []
    for kind in KINDS:
        columns = []
        for measure in ("seconds", "work"):
            own, hand = (
                float(np.median([getattr(one, measure) for one in taken[script, kind]]))
                for script in ("learnax", "hand")
            )
            columns.append(f"{own:7.2f} {hand:7.2f} {own / hand:6.2f}")
        lines.append(f"{model:8} {kind}  {'   '.join(columns)}")
    return lines


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.starts", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="what is started")
    parser.add_argument("--pairs", type=int, default=3, help="first and second starts of each; default: %(default)s")
    parser.add_argument("--child", nargs=3, metavar=("MODEL", "SCRIPT", "CACHE"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measures what is asked for, or is one of the processes that are measured."""
    args = parse(arguments)
    if args.child:
        model, script, cache = args.child
        losses = SCRIPTS[script](MODELS[model](), cache)
        assert np.isfinite(losses).all(), losses
        return
    print("                seconds                     processor seconds")
    print("model    start  learnax    hand  ratio   learnax    hand  ratio")
    for model in args.models:
        try:
            if model == "e3nn":
                import e3nn_jax  # noqa: F401
        except ImportError:
            print("e3nn     e3nn-jax is not installed")
            continue
        print("\n".join(table(model, in_turns(model, args.pairs))), flush=True)


if __name__ == "__main__":
    main()
