"""A config and what learns in; how long the matrix products of its training step take by themselves out.

Two libraries multiply at different rates on one CPU, and a step consists of products for the most part: what is left of
a difference between two steps once that of their products is taken off is what the program around them makes of it.

Counted are those of the linear layers in the blocks of encoder and language model, and of the logits: each forwards,
and backwards towards its input and its kernel where the process needs that. Each side multiplies as its layers
do: ours with kernels `[in, out]`, torch's with `[out, in]`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from calm_jax import config as config_lib


class Product(NamedTuple):
    """A linear layer `[rows, inputs] @ [inputs, outputs]`, and how often a step computes each of its three products."""

    rows: int
    inputs: int
    outputs: int
    forward: int
    towards_input: int
    towards_kernel: int

    @property
    def flops(self) -> int:
        """Of all of them."""
        times = self.forward + self.towards_input + self.towards_kernel
        return 2 * self.rows * self.inputs * self.outputs * times


def of_step(config: config_lib.Config, learns: Mapping[str, bool]) -> list[Product]:
    """The linear layers of the first process's step, alike ones together.

    Args:
      learns: path -> whether the process teaches it.
    """
    from calm_jax.models.parameters import Geometry
    model, process = config.model, config.processes[config.run[0]]
    taught = [path for path, learn in learns.items() if learn]
    below = {"encoder": any(path.startswith("encoder/") for path in taught), "decoder": bool(taught)}
    tokens = {"encoder": process.batch * process.row.images * model.encoder.part("low").tokens,
              "decoder": process.batch * process.row.tokens}
    used = max(model.depths.block(part, model.encoder.depth) for part in process.parts)
    found: dict[tuple[int, int, int], list[int]] = {}

    def add(part, rows, inputs, outputs, depth, learn):
        again = depth if model.remat == "full" and below[part] else 0  # blocks are computed twice
        times = found.setdefault((rows, inputs, outputs), [0, 0, 0])
        for place, more in enumerate((depth + again, depth if below[part] else 0, depth if learn else 0)):
            times[place] += more

    for path, leaf in Geometry.of(model).shapes.items():
        part = path.split("/")[0]
        if part in tokens and "/blocks/" in path and path.endswith("/kernel"):
            depth, inputs, outputs = leaf.shape
            add(part, tokens[part], inputs, outputs, used if part == "encoder" else depth, learns[path])
    logits = process.batch * process.row.answers, model.decoder.width, model.decoder.vocab
    learn = learns["decoder/embedding" if model.decoder.tied else "decoder/head/kernel"]
    found[logits] = [1, int(below["decoder"]), int(learn)]
    return [Product(*sizes, *times) for sizes, times in found.items()]


def _operands(product: Product) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for shape in ((product.rows, product.inputs), (product.inputs, product.outputs), (product.rows, product.outputs)):
        yield rng.standard_normal(shape, np.float32) / np.float32(math.sqrt(shape[0]))


def jax_side(products: list[Product]) -> Callable[[], float]:
    """What computes all of them with XLA, and returns the sum of their first elements."""
    import jax
    forward, towards_input, towards_kernel = (
        jax.jit(lambda a, b, axes=axes: jax.lax.dot_general(a, b, (axes, ((), ()))))
        for axes in (((1,), (0,)), ((1,), (1,)), ((0,), (0,))))

    def run() -> float:
        total = 0.0
        for product in products:
            x, kernel, out = map(jax.device_put, _operands(product))
            for function, a, b, times in ((forward, x, kernel, product.forward),
                                          (towards_input, out, kernel, product.towards_input),
                                          (towards_kernel, x, out, product.towards_kernel)):
                for _ in range(times):
                    total += float(np.asarray(function(a, b))[0, 0])  # on CPU a view: nothing is copied
        return total

    return run


def torch_side(products: list[Product]) -> Callable[[], float]:
    """What computes all of them with torch, and returns the same."""
    import torch
    torch.set_num_threads(os.cpu_count() or 1)

    def run() -> float:
        total = 0.0
        with torch.no_grad():
            for product in products:
                x, kernel, out = (torch.from_numpy(value) for value in _operands(product))
                kernel = kernel.t().contiguous()
                for a, b, times in ((x, kernel.t(), product.forward), (out, kernel, product.towards_input),
                                    (out.t(), x, product.towards_kernel)):
                    for _ in range(times):
                        total += float((a @ b)[0, 0])
        return total

    return run
