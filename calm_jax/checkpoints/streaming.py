"""Leaves whose pieces are still in other files in; a checkpoint that holds them, written piece by piece, out.

Memory holds a few pieces, whatever the size of the model: Orbax opens the arrays and writes its format, this module
hands it one tensor after the other. The checkpoint is what training reads: completion marker
with checksums last, so that an interrupted conversion leaves nothing that looks finished.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

import calm_jax
from calm_jax import files as output
from calm_jax.checkpoints import array_io, on_disk
from calm_jax.checkpoints.meta import ARRAYS, META
from calm_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array that is not in memory: `array[index] = read()` for every piece, which together fill `shape`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[tuple[tuple[int, ...], Callable[[], np.ndarray]], ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The whole array."""
        whole = np.empty(self.shape, self.dtype)
        for index, read in self.pieces:
            whole[index] = read()
        return whole


class _Handler(ocp.type_handlers.NumpyHandler):
    """Orbax's handler of NumPy arrays, which writes a `Leaf` one piece after the other.

    Orbax begins all arrays at once; here each waits for its turn. After an error the rest is passed over, and `error`
    says what it was: raised inside, it would leave Orbax's event loop with unfinished work.
    """

    def __init__(self, progress: Callable[[int], None]):
        super().__init__(deepcopy_host_arrays=False)
        self.error: Exception | None = None
        self._progress, self._turn = progress, None

    async def _open_and_write(self, value: Leaf, tspec: dict[str, Any], ts_context: tensorstore.Context) -> None:
        self._turn = self._turn or asyncio.Lock()  # made inside the event loop that waits for it
        async with self._turn:
            try:
                if self.error is None:
                    store = await tensorstore.open(tensorstore.Spec(tspec), create=True, open=True, context=ts_context)
                    await self._write(value, store)
            except Exception as error:
                self.error = error

    async def _write(self, value: Leaf, store: tensorstore.TensorStore) -> None:
        if value.nbytes < array_io.LARGE:  # one chunk: written in pieces, it would be read again for each of them
            await store.write(await asyncio.to_thread(value.read))
            self._progress(value.nbytes)
            return
        written = None
        for index, read in value.pieces:  # one is read while the one before is written
            piece = np.asarray(await asyncio.to_thread(read), value.dtype)
            if written is not None:
                await written
            written = store[index].write(piece, can_reference_source_data_indefinitely=True)
            self._progress(piece.nbytes)
        if written is not None:
            await written


def save(path: str | os.PathLike, leaves: Mapping[str, Leaf], meta: Mapping[str, Any], *,
         files: Sequence[pathlib.Path] = (), progress: Callable[[int], None] = lambda _: None) -> pathlib.Path:
    """Writes the checkpoint `path` with these parameters and no optimizer state, and returns its absolute path.

    Args:
      path: must not exist. Until everything is written the folder has another name, which ends in `.partial` and which
        no reader accepts; one that a crash left behind is removed.
      leaves: parameter path -> where its values come from.
      meta: as `store.Checkpoints.save` takes it.
      files: copied into the checkpoint beside the arrays, such as a tokenizer.
      progress: called with the bytes of every piece that is written.

    Raises:
      CheckpointError: there is something at `path`, or it cannot be written.
    """
    path = pathlib.Path(path).absolute()
    if path.exists():
        raise CheckpointError(f"{path} exists already; choose another folder, or remove it first")
    tree = {"parameters": array_io.nest(leaves)}
    writer = _Handler(progress)
    registry = ocp.type_handlers.create_type_handler_registry((Leaf, writer))
    # Weights do not compress: it would cost time and save nothing.
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    try:
        with output.whole_folder(path) as partial:
            with ocp.Checkpointer(handler) as orbax:
                orbax.save(partial / ARRAYS,
                           args=ocp.args.PyTreeSave(tree, save_args=jax.tree.map(array_io.chunks, tree)))
            if writer.error is not None:
                raise writer.error
            on_disk.write_json(partial / META, {**meta, "step": 0, "is_best": False,
                                                              "version": calm_jax.__version__})
            for file in files:
                shutil.copyfile(file, partial / file.name)
            on_disk.write_marker(partial)
    except Exception as error:
        raise on_disk.failed(path, error) from error
    return path
