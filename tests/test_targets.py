"""GPUs that are not here: what programs compiled for them hold, and whether a run fits."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bench.workloads import GPT, Size
from learnax.engine import hlo
from learnax.engine.cache import without_cache
from learnax.engine.options import compiler_options
from learnax.engine.targets import CARDS, INSTALL, Remote, target_of
from learnax.loss import LossPipe
from learnax.models import Linen
from tests.helpers import MLP, ROOT, Convolution, Squared, make_data, make_trainer

compiles = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda12") is None,
    reason=f"to compile for a GPU: {INSTALL}",
)


def compiled(function, *shapes, target="h100"):
    """A function's compiled text for a GPU that is not here."""
    engine = Remote(target_of(target))
    sharding = engine.sharding(jax.sharding.PartitionSpec())
    with without_cache():
        return jax.jit(function, in_shardings=sharding).lower(*shapes).compile().as_text()


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


# ---- counting


TEXT = """\
HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%part (p.0: f32[100,8], p.1: s32[]) -> f32[1,8] {
  %p.0 = f32[100,8]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,8]{1,0} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,8}
}

%copied (p.2: f32[100,8]) -> f32[100,8] {
  %p.2 = f32[100,8]{1,0} parameter(0)
  ROOT %copy.9 = f32[100,8]{1,0} copy(%p.2)
}

%body (carry: (s32[], f32[100,8])) -> (s32[], f32[100,8]) {
  %carry = (s32[], f32[100,8]{1,0}) parameter(0)
  %number = s32[] get-tuple-element(%carry), index=0
  %rows = f32[100,8]{1,0} get-tuple-element(%carry), index=1
  %one = f32[1,8]{1,0} fusion(%rows, %number), kind=kLoop, calls=%part
  ROOT %next = (s32[], f32[100,8]{1,0}) tuple(%number, %rows)
}

%condition (held: (s32[], f32[100,8])) -> pred[] {
  %held = (s32[], f32[100,8]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: f32[100,8], y: bf16[8,16]) -> f32[100,8] {
  %x = f32[100,8]{1,0} parameter(0), metadata={op_name="copy("}
  %y = bf16[8,16]{1,0} parameter(1)
  %start = s32[] constant(0)
  %tuple = (s32[], /*index=1*/f32[100,8]{1,0}) tuple(%start, %x)
  %known = (s32[], f32[100,8]{1,0}) while(%tuple), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %unknown = (s32[], f32[100,8]{1,0}) while(%known), condition=%condition, body=%body
  %rows.1 = f32[100,8]{1,0} get-tuple-element(%unknown), index=1
  %again = f32[100,8]{1,0} fusion(%rows.1), kind=kLoop, calls=%copied
  %reduced = f32[100,8]{1,0} all-reduce-start(%again), to_apply=%add
  %whole = f32[100,8]{1,0} all-reduce-done(%reduced)
  %gathering = (bf16[8,16]{1,0}, bf16[64,16]{1,0}) all-gather-start(%y), dimensions={0}
  %gathered = bf16[64,16]{1,0} all-gather-done(%gathering)
  %product = (f32[100,16]{1,0}, s8[4]{0}) custom-call(%whole, %y), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  ROOT %out = f32[100,8]{1,0} copy(%whole)
}
"""  # noqa: E501


def test_a_text_is_counted():
    counts = hlo.count(TEXT, {("f32", (100, 8))})
    assert (counts.known_loops, counts.unknown_loops, counts.conditionals) == (1, 1, 0)
    # Five turns and one, two copies, two collectives, a product.
    assert counts.kernels == 5 + 1 + 2 + 2 + 1
    assert counts.state_copies == 2
    assert hlo.count(TEXT, {("f32", (8, 100))}).state_copies == 0
    assert counts.collectives == {"all-reduce": 3200, "all-gather": 2048}
    assert counts.pieces == {"all-reduce": 1, "all-gather": 1}
    assert counts.flops["f32"] == 2 * 100 * 16 * 8
    # Of the rows a turn reads the one that it takes, and the number of it.
    turn, copy, product = 32 + 4 + 32, 2 * 3200, 3200 + 256 + 6400 + 4
    assert counts.bytes == 6 * turn + 2 * copy + product
    assert hlo.count(TEXT, cache=1000).streamed == 2 * (copy - 2000) + product - 2000


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no text of a compiled program"):
        hlo.count("HloModule nothing")


@compiles
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_are_counted(dtype):
    rng = np.random.default_rng()
    rows, inner, columns, many = (int(size) for size in 64 * rng.integers(1, 4, 4))  # else they are filled up

    def function(a, b, c):
        return jnp.einsum("bij,bjk->bik", a, b).sum(), jnp.einsum("ij,kj->ik", b[0], c)

    shapes = array(many, rows, inner, dtype=dtype), array(many, inner, columns, dtype=dtype), array(rows, columns)
    counts = hlo.count(compiled(lambda a, b, c: function(a, b, c.astype(dtype)), *shapes))
    assert sum(counts.flops.values()) == 2 * many * rows * inner * columns + 2 * inner * rows * columns
    assert set(counts.flops) == {"bf16" if dtype == jnp.bfloat16 else "f32"}


@compiles
def test_convolutions_are_counted_forward_and_backward():
    def loss(kernel, image):
        out = jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return (out**2).sum()

    image, kernel = array(4, 16, 16, 8), array(3, 3, 8, 24)
    counts = hlo.count(compiled(jax.grad(loss, argnums=(0, 1)), kernel, image))
    once = 2 * 4 * 16 * 16 * 24 * 3 * 3 * 8
    assert sum(counts.flops.values()) == 3 * once


@compiles
def test_products_in_loops_are_counted_by_their_turns():
    def function(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    counts = hlo.count(compiled(function, array(64, 64), array(7, 64, 64)))
    assert (counts.known_loops, counts.unknown_loops) == (1, 0)
    assert sum(counts.flops.values()) == 7 * 2 * 64**3

    def many(x, count):
        return jax.lax.fori_loop(0, count, lambda _, x: jnp.tanh(x @ x), x)

    counts = hlo.count(compiled(many, array(64, 64), array(dtype=jnp.int32)))
    assert (counts.known_loops, counts.unknown_loops) == (0, 1)


# ---- the program of a step


@compiles
@pytest.mark.parametrize("model", [MLP(), Convolution()])
@pytest.mark.parametrize("target", ["h100", "h100:8"])
def test_a_step_on_a_gpu_has_no_unknown_loop_no_branch_no_copy_and_updates_all_in_place(model, target):
    trainer = make_trainer(train_dataset=make_data(64), model=model, batch_size=8, steps_per_execution=1)
    program = trainer.preflight(target=target).programs["train"]
    assert (program.unknown_loops, program.conditionals, program.state_copies) == (0, 0, 0)
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.train_state))
    assert program.state_bytes == state == program.donated_bytes


@compiles
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": optax.adamw(1e-3)},
        {"optimizer": optax.adafactor(1e-3)},
        {"accumulate_steps": 2},
        {"ema": 0.9},
        {"shard_state": True},
        {"model": Linen(MLP(), precision="fp16")},
    ],
    ids=lambda options: next(iter(options)),
)
def test_so_has_a_step_of_other_settings(options):
    trainer = make_trainer(train_dataset=make_data(64), batch_size=8, steps_per_execution=1, **options)
    program = trainer.preflight(target="h100:2").programs["train"]
    assert (program.unknown_loops, program.conditionals, program.state_copies) == (0, 0, 0)
    assert program.donated_bytes == program.state_bytes


@compiles
def test_several_steps_are_one_loop_whose_turns_the_gpu_counts():
    trainer = make_trainer(train_dataset=make_data(64), batch_size=8)
    program = trainer.preflight(target="h100").programs["train"]
    assert (program.unknown_loops, program.conditionals, program.state_copies) == (1, 0, 0)
    assert program.donated_bytes == program.state_bytes


@compiles
def test_a_gradient_is_reduced_once_over_the_devices():
    trainer = make_trainer(train_dataset=make_data(64), batch_size=8)
    program = trainer.preflight(target="a100:4").programs["train"]
    params = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.train_state.params))
    assert program.pieces == {"all-reduce": 1}
    assert params <= program.collectives["all-reduce"] <= params + 2048  # what is packed is filled up


@compiles
@pytest.mark.thorough
def test_a_divided_state_is_gathered_narrow_and_in_pieces_twice_and_scattered_in_as_many_as_layers():
    layers, width = 3, 768
    model = GPT(Size(layers, width, 12, 4096, 128, 8, jnp.bfloat16))
    data = [[np.zeros(128, np.int32)] * 2] * 8
    losses = lambda output, datum: (output, (output**2).mean(), {})  # noqa: E731
    programs = []
    for divided in (False, True):
        with jax.numpy_dtype_promotion("standard"):  # flax's own layers need it
            given = {"train_dataset": data, "model": model, "losses": losses, "steps_per_execution": 1}
            trainer = make_trainer(shard_state=divided, **given)
            programs.append(trainer.preflight(target="h100:8").programs["train"])
    whole, part = programs
    params = 12 * layers * width**2 + 4096 * width
    # In bfloat16, for the loss and for its gradient; beside them what the lookup of a token's row needs.
    assert 2 * 2 * params <= part.collectives["all-gather"] <= 2 * 2 * params + 4 * 128 * 8 * width
    assert part.pieces["all-gather"] >= 2 * layers
    assert part.collectives["reduce-scatter"] == pytest.approx(2 * params, rel=0.02)
    assert part.pieces["reduce-scatter"] >= layers
    assert part.collectives["all-reduce"] < 1e6
    assert (part.unknown_loops, part.conditionals, part.state_copies) == (0, 0, 0)
    assert part.donated_bytes == part.state_bytes
    assert part.total_bytes < 0.3 * whole.total_bytes


@pytest.mark.parametrize("flags", ["", "--xla_gpu_enable_latency_hiding_scheduler=false"])
def test_the_compiler_is_told_to_overlap_where_there_is_something_to_send_and_the_user_has_not_said(monkeypatch, flags):
    class Device:
        platform = "gpu"

    monkeypatch.setenv("XLA_FLAGS", flags)
    assert "WHILE" in compiler_options([Device()], divided=False).pop("xla_gpu_enable_command_buffer")
    assert compiler_options(jax.devices(), divided=True) == {}
    options = compiler_options([Device()] * 8, divided=True)
    assert ("xla_gpu_enable_latency_hiding_scheduler" in options) == (not flags)
    assert options["xla_gpu_all_gather_combine_threshold_bytes"] == 1 << 24
    assert options["xla_gpu_reduce_scatter_combine_threshold_bytes"] == 1 << 21


# ---- whether it fits


@compiles
def test_the_report_says_what_a_run_takes_there_and_leaves_the_trainer_as_it_was():
    trainer = make_trainer(train_dataset=make_data(64), batch_size=8, val_datasets=[make_data(13)])
    before = jax.tree.map(np.array, (trainer.train_state, jax.random.key_data(trainer.rng_seq)))
    fit = trainer.preflight(target="H100:2")
    after = jax.tree.map(np.array, (trainer.train_state, jax.random.key_data(trainer.rng_seq)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert fit.fits
    assert fit.remedy is None
    assert set(fit.programs) == {"train", "evaluate"}
    text = str(fit)
    for part in ("2 x NVIDIA H100 80GB HBM3", "train: kernels", "evaluate: memory", "all-reduce", "not below", "yes: "):
        assert part in text
    assert fit.programs["train"].bound_s > 0
    assert fit.memory < 1e6 < fit.capacity


TRANSFORMER, OF_ONE_LAYER = (GPT(Size(layers, 128, 4, 64, 256, 16, jnp.float32)) for layers in (2, 1))


def small_card(monkeypatch, memory):
    monkeypatch.setitem(CARDS, "h100", dataclasses.replace(CARDS["h100"], memory=int(memory)))


@compiles
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("model", "batch_size", "target", "part", "remedy"),
    [
        (TRANSFORMER, 16, "h100", 0.6, "remat='dots_with_no_batch_dims_saveable'"),
        (Linen(OF_ONE_LAYER, remat="nothing_saveable"), 16, "h100", 0.75, "batch_size=8, accumulate_steps=2"),
        (Linen(MLP(1 << 16), remat="nothing_saveable"), 8, "h100:8", 0.75, "shard_state=True"),
    ],
    ids=["remat", "accumulate_steps", "shard_state"],
)
def test_what_makes_a_run_fit_is_found_by_compiling(monkeypatch, model, batch_size, target, part, remedy):
    data, losses = make_data(batch_size), LossPipe([Squared()])
    if batch_size == 16:
        data, losses = [[np.zeros(256, np.int32)] * 2] * batch_size, lambda out, datum: (out, (out**2).mean(), {})
    trainer = make_trainer(train_dataset=data, model=model, batch_size=batch_size, losses=losses)
    # The compiler itself does without some memory where there is none.
    small_card(monkeypatch, part * trainer.preflight(target=target).memory)
    fit = trainer.preflight(target=target)
    assert not fit.fits
    assert fit.remedy is not None
    assert remedy in fit.remedy
    assert f"too much; {remedy}" in str(fit)


@compiles
def test_what_nothing_makes_fit_is_said(monkeypatch):
    trainer = make_trainer(train_dataset=make_data(8), batch_size=8)
    small_card(monkeypatch, 100)
    fit = trainer.preflight(target="h100")
    assert not fit.fits
    assert "none of remat, accumulate_steps, shard_state does" in str(fit)


@compiles
def test_a_run_that_needs_more_than_jax_takes_by_default_is_told_how(monkeypatch):
    trainer = make_trainer(train_dataset=make_data(8), batch_size=8)
    small_card(monkeypatch, trainer.preflight(target="h100").memory / 0.8)
    assert "set XLA_PYTHON_CLIENT_MEM_FRACTION=.95" in str(trainer.preflight(target="h100"))


# ---- bad input


@pytest.mark.parametrize(
    ("target", "error", "text"),
    [
        ("v100", ValueError, "target 'v100' is not known: expected one of a100, h100, h200, b200"),
        ("h100:", ValueError, "target 'h100:' is not known"),
        ("h100:0", ValueError, "target 'h100:0' has no GPU"),
        (8, TypeError, "target must be a GPU's name, 'h100' or 'h100:8' for instance, but is 8"),
    ],
)
def test_a_target_that_nobody_knows(target, error, text):
    with pytest.raises(error) as caught:
        make_trainer(train_dataset=make_data(8), batch_size=8).preflight(target=target)
    assert text in str(caught.value)


@compiles
def test_a_count_that_does_not_divide_the_batch():
    text = r"batch_size 8 does not divide over 3 devices.*another count than in target 'h100:3'"
    with pytest.raises(ValueError, match=text):
        make_trainer(train_dataset=make_data(8), batch_size=8).preflight(target="h100:3")


@compiles
def test_a_count_that_is_no_number_of_nodes():
    with pytest.raises(ValueError, match="'h100:12': more than 8 GPUs must be a multiple of 8"):
        make_trainer(train_dataset=make_data(12), batch_size=12).preflight(target="h100:12")


class WithCudnn(nn.Module):
    @nn.compact
    def __call__(self, x, y=None):
        heads = nn.Dense(64)(x).reshape(1, 1, 64).astype(jnp.bfloat16)
        return nn.Dense(3)(
            jax.nn.dot_product_attention(heads, heads, heads, implementation="cudnn").reshape(-1).astype(jnp.float32)
        )


@pytest.mark.skipif(importlib.util.find_spec("nvidia.cudnn") is not None, reason="cuDNN is here")
def test_a_model_that_asks_for_cudnn_where_it_is_not():
    text = "it asks for cuDNN, which is not here: pip install nvidia-cudnn-cu12, or leave the choice to XLA"
    with pytest.raises(ValueError, match=text):
        make_trainer(train_dataset=make_data(8), model=WithCudnn(), batch_size=8)


def test_without_the_plugin_it_says_what_to_install(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(RuntimeError) as caught:
        target_of("h100").devices()
    assert str(caught.value) == (
        "compiling for GPUs that are not here needs jax-cuda12-plugin, which is not installed; "
        "pip install 'learnax[gpu-compile]'"
    )


def test_a_plugin_of_another_version(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.2")
    with pytest.raises(RuntimeError, match=r"jax-cuda12-plugin 0\.1\.2 does not fit jaxlib .*: both must be of one"):
        target_of("h100").devices()


# ---- the command


def command(*arguments, path=()):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(ROOT), *sys.path])}
    call = [sys.executable, "-m", "learnax", *arguments]
    return subprocess.run(call, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=200)


SCRIPT = """
import sys
import flax.linen as nn
import numpy as np
from learnax.trainer import Trainer

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x)

def losses(output, datum, step):
    return output, (output ** 2).mean(), {}

if __name__ == "__main__":
    data = [np.full(8, i, np.float32) for i in range(64)]
    trainer = Trainer(Net(), 1e-3, losses, 0, data, 1, int(sys.argv[1]), 0)
    if sys.argv[2:] == ["epoch"]:
        trainer.epoch(0)
    elif sys.argv[2:] != ["nothing"]:
        try:
            trainer.train()
        except Exception:
            print("caught")
    print("went on")
"""


@compiles
@pytest.mark.processes
def test_the_command_looks_at_a_script_up_to_its_training(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    result = command("preflight", "--target", "h100:2", str(script), "8")
    assert result.returncode == 0, result.stderr
    assert "2 x NVIDIA H100 80GB HBM3" in result.stdout
    assert "went on" not in result.stdout
    assert "caught" not in result.stdout
    (tmp_path / "module.py").write_text(SCRIPT)
    result = command(
        "preflight",
        "--target",
        "a100",
        "-m",
        "module",
        "8",
        "epoch",
        path=[str(tmp_path)],
    )
    assert result.returncode == 0, result.stderr
    assert "1 x NVIDIA A100-SXM4-80GB" in result.stdout


@pytest.mark.processes
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--target", "h900", "SCRIPT", "8"], "--target 'h900' is not known: expected one of a100"),
        (["--target", "h100"], "no program: expected a script, or -m and a module"),
        (["--target", "h100", "nowhere.py"], "there is no script nowhere.py in"),
        (["--target", "h100", "SCRIPT", "8", "nothing"], "train.py ended without a call of train()"),
    ],
    ids=["target", "nothing", "nowhere", "no train"],
)
def test_what_the_command_cannot_look_at(tmp_path, arguments, text):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    result = command("preflight", *(str(script) if part == "SCRIPT" else part for part in arguments))
    assert result.returncode == 2
    assert text in result.stderr


@compiles
@pytest.mark.processes
def test_platforms_that_hide_the_cpu_are_named(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import learnax.engine.targets as t\nt.target_of('h100').devices()\n")
    result = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join([str(ROOT), *sys.path]), "JAX_PLATFORMS": "cuda", "PATH": ""},
        timeout=100,
    )
    assert "JAX_PLATFORMS=cuda hides the CPU" in result.stderr
