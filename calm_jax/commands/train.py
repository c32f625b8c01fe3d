"""A config in, a workdir with checkpoints, metrics and curves out: trains the processes of a config in their order.

The same command again resumes, and takes its compiled programs from a cache. One of several processes finds the others
by its environment (`training.processes`); calm_jax.supervise starts processes, and starts them again. A workdir belongs
to one config; another config in it is refused with the difference, and so is a second training at the same time.

Exit codes: 0 done; 143, 130 or 129 stopped by SIGTERM, Ctrl-C or SIGHUP, and saved; 2 what was asked for is wrong;
3 the training itself cannot go on (it diverged, or too many records are bad): the same command would end so again;
1 something else failed, such as a full disk. SIGUSR1 makes it write the stacks of its threads to stderr.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import jax

from calm_jax import config as config_lib
from calm_jax import recipes, sharding
from calm_jax.data import builders
from calm_jax.errors import ConfigError
from calm_jax.features import frozen
from calm_jax.models.parameters import Geometry
from calm_jax.text import chat as chat_lib
from calm_jax.training import filters, loop, processes
from calm_jax.training.startup import Startup, keep_programs
from calm_jax.training.workdir import check, claim, held, settled


def train(config: config_lib.Config, workdir: pathlib.Path, *, startup: Startup | None = None, profile: int = 0
          ) -> None:
    """Runs every process of the config that is not complete yet.

    Args:
      startup: watches since the program was started; the first step reports what the time went to.
      profile: so many steps of each process are traced, into `workdir/profile/PROCESS`.

    Raises:
      ConfigError: the config does not fit the workdir, the devices, the tokenizer or the data; or another training
        works in the workdir.
      CheckpointError, TrainingError: see `training.loop.run_process`.
    """
    with held(workdir):
        config = settled(workdir, config)
        check(workdir, config)
        chat = chat_lib.load(config.tokenizer, config.chat)
        if not chat.fits(config.model.decoder.vocab):
            raise ConfigError(f"the tokenizer {chat.tokenizer.name} has {chat.tokenizer.vocab} pieces and "
                              f"model.decoder.vocab is {config.model.decoder.vocab}; set one to fit the other")
        mesh = sharding.make_mesh(config.mesh)
        geometry = Geometry.of(config.model)
        datasets = {}
        for name in config.run:  # all of them now: a mistake in the last process should not wait for its turn
            process = config.processes[name]
            sharding.check_batch(process, mesh, name)
            filters.trainable(geometry.shapes, process)
            if process.cached:
                frozen.check_alone(name)
            datasets[name] = {dataset: builders.load(dataset, config.data.dir) for dataset in process.datasets}
        loop.say(f"devices: {mesh.devices.size} x {mesh.devices.flat[0].device_kind} of {jax.process_count()} "
                 f"process(es), mesh {dict(mesh.shape)}")
        loop.say(sharding.table(geometry.shapes, mesh))
        run = loop.Run(config, workdir, mesh, geometry, chat, startup=startup, profile=profile,
                       begun=lambda: claim(workdir, config))
        for name in config.run:
            loop.run_process(run, name, datasets[name])
        loop.say(f"done: {', '.join(config.run)} in {workdir}")


def run(given: str, overrides: Sequence[str], workdir: str, *, distributed: str, profile: int) -> None:
    """Trains a recipe as the command line names it, after joining the other processes of the job if there are any.

    Raises:
      ConfigError, CheckpointError, TrainingError: see `train`.
    """
    processes.supervised()
    startup = Startup()
    recipe = recipes.load(given, overrides)
    keep_programs()
    processes.join(distributed)
    startup.reached("joining")
    train(recipe.config, pathlib.Path(workdir or f"runs/{recipe.name}"), startup=startup, profile=profile)
