"""An estimate of a step's time on many GPUs: `python -m bench.estimate --params 124e6 --step-ms 180`.

The data of a GPU stay as many, so that its own work takes T, as measured on one GPU alone, on any number of them. What
is added is communication. n GPUs stand in m nodes of g. A ring moves a buffer of B bytes past all n of them, once
reduced and left scattered, or once gathered, in

    (n-1)/n * B / bandwidth

and an all-reduce is one of each: 2(n-1)/n * B / bandwidth (Thakur, Rabenseifner, Gropp: Optimization of Collective
Communication Operations in MPICH, 2005; the same factors are in PERFORMANCE.md of NCCL's nccl-tests). Over nodes it
is done in two levels: inside of each by NVLink, then between nodes, where each GPU has a g-th of the buffer and a
link of its own:

    pass(B) = (g-1)/g * B / nvlink  +  (m-1)/m * B/g / network  +  ((g-1) + (m-1)) * latency

    replicated state: C = 2 pass(gradients)                        an all-reduce
    sharded state:    C = 2 pass(parameters) + pass(gradients)     gathered for the forward pass and for the backward
                                                                   pass, and gradients reduced and scattered

    without overlap:  T + C
    with overlap:     replicated: T/3 + max(2/3 T, C)
                      sharded:    max(T/3, pass(parameters)) + max(2/3 T, pass(parameters) + pass(gradients))

A backward pass multiplies twice as much as a forward pass (Kaplan et al.: Scaling Laws for Neural Language Models,
2020, table 1), hence the thirds. A step lies between these two: how much is overlapped is the compiler's doing. Left
out: stragglers, reading data, a network that others share or that narrows towards its top, kernels that run slower
beside a collective, and the update, which takes a part of T and is shorter where the state is sharded.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

DISCLAIMER = "an estimate; nothing here was measured on that many GPUs"
MOMENTS = 2
"""Adam keeps two of each parameter."""


class Cluster(NamedTuple):
    """What GPUs are connected by.

    Attributes:
        per_node: GPUs of a node.
        nvlink: bytes a second and direction of a GPU, inside its node.
        network: bytes a second and direction of a GPU, out of its node.
        latency: seconds that each step of a ring takes on top.
    """

    # NVIDIA H100 SXM datasheet: NVLink 900 GB/s, which counts both directions. DGX H100 datasheet: eight GPUs, and for
    # each a ConnectX-7 of 400 Gb/s. Rates as sold: the bus bandwidth that nccl-tests reaches makes a better estimate.
    per_node: int = 8
    nvlink: float = 450e9
    network: float = 50e9
    latency: float = 0.0


class Estimate(NamedTuple):
    """A step on so many GPUs.

    Attributes:
        gpus: how many.
        sharded: whether the state is divided among them.
        communication: seconds of it.
        alone: seconds of a step with communication after computation.
        overlapped: seconds of one with as much as can be of it beside computation.
        state: bytes of parameters and moments that each GPU keeps.
    """

    gpus: int
    sharded: bool
    communication: float
    alone: float
    overlapped: float
    state: float


def one_pass(size: float, gpus: int, cluster: Cluster) -> float:
    """Seconds in which a buffer of so many bytes is gathered, or reduced and scattered.

    Raises:
        ValueError: GPUs that do not fill their nodes.
    """
    inside = min(gpus, cluster.per_node)
    if gpus < 1 or gpus % inside:
        raise ValueError(f"{gpus} GPUs do not fill nodes of {cluster.per_node}")
    nodes = gpus // inside
    in_node = (inside - 1) / inside * size / cluster.nvlink
    between = (nodes - 1) / nodes * size / inside / cluster.network
    return in_node + between + (inside + nodes - 2) * cluster.latency


def estimate(params: float, width: float, step: float, gpus: int, sharded: bool, cluster: Cluster) -> Estimate:
    """A step on so many GPUs; see the top of this file.

    Args:
        params: parameters of the model.
        width: bytes of each, and of its gradient and moments.
        step: seconds of a step on one GPU with the same data for each.
        gpus: how many.
        sharded: whether the state is divided among them.
        cluster: what they are connected by.
    """
    moved = one_pass(params * width, gpus, cluster)
    forward, backward = step / 3, step * 2 / 3
    if sharded:
        communication, overlapped = 3 * moved, max(forward, moved) + max(backward, 2 * moved)
    else:
        communication, overlapped = 2 * moved, forward + max(backward, 2 * moved)
    state = (1 + MOMENTS) * params * width / (gpus if sharded else 1)
    return Estimate(gpus, sharded, communication, step + communication, overlapped, state)


def table(estimates: list[Estimate], step: float) -> str:
    """Estimates for a person: a line for each, and what share of one GPU's speed each GPU keeps."""
    lines = [
        f"{'GPUs':>5}  {'state':<10} {'kept by each':>13} {'communication':>14} {'no overlap':>18} {'full overlap':>18}"
    ]
    for each in estimates:
        times = [f"{1e3 * time:.1f} ms ({step / time:.0%})" for time in (each.alone, each.overlapped)]
        lines.append(
            f"{each.gpus:>5}  {'sharded' if each.sharded else 'replicated':<10} {each.state / 1e9:>10.3f} GB "
            f"{1e3 * each.communication:>11.2f} ms {times[0]:>18} {times[1]:>18}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.estimate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = Cluster()
    parser.add_argument("--params", type=float, required=True, help="parameters of the model")
    parser.add_argument("--step-ms", type=float, required=True, help="of a step on one GPU, as measured")
    parser.add_argument("--bytes-per-param", type=float, default=4, help="of a parameter, its gradient, its moments")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512], help="how many there are")
    parser.add_argument("--gpus-per-node", type=int, default=usual.per_node)
    parser.add_argument("--nvlink-gbs", type=float, default=usual.nvlink / 1e9, help="GB/s of a GPU in its node")
    parser.add_argument("--network-gbs", type=float, default=usual.network / 1e9, help="GB/s of a GPU out of its node")
    parser.add_argument("--latency-us", type=float, default=0.0, help="of each step of a ring; left out by default")
    args = parser.parse_args(arguments)
    cluster = Cluster(args.gpus_per_node, args.nvlink_gbs * 1e9, args.network_gbs * 1e9, args.latency_us / 1e6)
    step = args.step_ms / 1e3
    try:
        estimates = [
            estimate(args.params, args.bytes_per_param, step, gpus, sharded, cluster)
            for gpus in args.gpus
            for sharded in (False, True)
        ]
    except ValueError as error:
        parser.error(str(error))
    print(
        f"{args.params / 1e6:,.0f} M parameters of {args.bytes_per_param:g} bytes, {args.step_ms:g} ms on one GPU\n"
        f"nodes of {cluster.per_node}; {args.nvlink_gbs:g} GB/s inside, {args.network_gbs:g} GB/s between, for each GPU"
    )
    print(table(estimates, step))
    print(f"In brackets: of the speed of one GPU alone. This is {DISCLAIMER}.")


if __name__ == "__main__":
    main()
