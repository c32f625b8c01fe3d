"""The program `calm`: every command with its arguments and help. What a command does is imported when it runs.

Options are written with dashes; underscores do as well. `main` is the program itself, and with a command's name the
program of that command alone, as `python -m calm_jax.train` is.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

import calm_jax
from calm_jax import guard, host_memory

WIDTH = 100  # columns of the help at most

COMPUTING = ("train", "evaluate", "score", "comment", "suggest", "attributes", "personalise")
JUDGE, TRAIN, WEIGHTS, MORE = "Judge photos", "Train and evaluate", "Weights", "Plans, phrases, demonstration"

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": WIDTH,
            "token_normalize_func": lambda name: name.replace("_", "-")}
EXTRAS = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    name="calm", no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False,
    context_settings=SETTINGS,
    help="CALM looks at photographs: it scores them, comments on them, suggests improvements, and learns one person's "
         "taste. This program also trains, converts and measures such models.",
    epilog="[bold]Exit codes[/bold]: 0 done · 1 something failed, such as a full disk · 2 what was asked for is wrong "
           "· 3 training cannot go on, and would end so again · 130, 143, 129 stopped by Ctrl-C, SIGTERM, SIGHUP, and "
           "everything saved.")


def command(name: str, panel: str, *, example: str, extras: bool = False) -> Callable[[Callable], Callable]:
    """Adds a command to the program. Numbers and paths are checked before it runs.

    Args:
      panel: of the list of commands.
      example: a line or several, as they are typed.
      extras: the command takes `--config.FIELD=VALUE` besides its options, from `context.args`.
    """
    def add(function: Callable) -> Callable:
        lines = "\n\n".join(f"[cyan]{line}[/cyan]" for line in example.splitlines())
        app.command(name, rich_help_panel=panel, epilog=f"[bold]Example[/bold]\n\n{lines}",
                    context_settings=EXTRAS if extras else {})(_checked(function))
        return function

    return add


def _checked(function: Callable) -> Callable:
    """The function, after a look at what the library lets pass: `nan`, and the address of a bucket as a path."""
    @functools.wraps(function)
    def checked(**values: Any) -> Any:
        from calm_jax import config as config_lib
        for option, value in values.items():
            for item in value if isinstance(value, list) else [value]:
                label = "argument" if option == "paths" else f"--{option.replace('_', '-')}"
                if isinstance(item, float):
                    config_lib.check_number(label, item, {})
                elif isinstance(item, str) and option != "base_url":
                    for word in item.split(","):
                        config_lib.check_local(label, word)
        return function(**values)

    return checked


def main(*words: str) -> None:
    """The program. With words, they stand before those of the command line."""
    asked = [*words, *sys.argv[1:]]
    if asked and asked[0] in COMPUTING and not {"-h", "--help"}.intersection(asked):
        host_memory.settle()
    guard.run(lambda: invoke(asked))


def single(function: Callable, *, extras: bool = False) -> None:
    """The program of one function whose parameters are declared as those of the commands here; else as `command`."""
    alone = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    alone.command(help=inspect.getdoc(sys.modules[function.__module__]),
                  context_settings=SETTINGS | (EXTRAS if extras else {}))(_checked(function))
    guard.run(lambda: alone(standalone_mode=False))


def invoke(words: list[str]) -> int | None:
    """Runs the command that the words name, and returns its exit code. Errors are raised."""
    return app(words, prog_name="calm", standalone_mode=False)


def _version(asked: bool) -> None:
    if asked:
        print(f"calm_jax {calm_jax.__version__}")
        raise typer.Exit


@app.callback()
def _calm(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", callback=_version,
                                                is_eager=True)] = False) -> None:
    pass


def numbers(name: str, text: str, count: int) -> tuple[float, ...]:
    """The value of an option such as `1,10`.

    Raises:
      ConfigError: it is not `count` numbers.
    """
    from calm_jax.errors import ConfigError
    try:
        values = tuple(float(word) for word in text.split(",") if word)
    except ValueError:
        values = ()
    if len(values) != count:
        raise ConfigError(f"{name} {text} is not {count} numbers with commas between them")
    return values


def overrides(context: typer.Context) -> list[str]:
    """The words of a command line that are none of a command's own: those that set fields of a config.

    Raises:
      ConfigError: one looks like an option and is none; the nearest is given.
    """
    from calm_jax.errors import ConfigError, nearest
    before = ""
    for word in context.args:
        waits = before.startswith("--config.") and "=" not in before
        if word.startswith("-") and not word.startswith("--config.") and not waits:
            known = [option for parameter in context.command.params for option in parameter.opts]
            raise ConfigError(f"there is no option {word.partition('=')[0]}"
                              f"{nearest(word.partition('=')[0], known)}")
        before = "" if waits else word
    return context.args


def _names(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


# ---- options that several commands have ---------------------------------------------------------------------------

Paths = Annotated[list[str] | None, typer.Argument(help="Files, folders, globs, or - for a list on standard input.",
                                                   show_default=False)]
Model = Annotated[str, typer.Option("--checkpoint", metavar="DIR", help="Workdir, process folder or checkpoint of the "
                                    "model; of a workdir the process answers that learned what is asked.")]
ProcessOf = Annotated[str, typer.Option(help="Process of the workdir, which then answers whatever it learned.",
                                        show_default=False)]
Format = Annotated[Literal["table", "csv", "jsonl", "html"], typer.Option("--format", help="Of the results; html is a "
                                                                          "contact sheet.")]
Out = Annotated[str, typer.Option(metavar="FILE", help="File of the results; default: standard output.",
                                  show_default=False)]
Batch = Annotated[int, typer.Option(min=1, help="Photos at a time.")]
TopK = Annotated[int, typer.Option(min=0, help="Only so many, the best; 0 = all.")]
MinScore = Annotated[float | None, typer.Option(help="Only photos with this score or a higher one.")]
Sort = Annotated[Literal["path", "score"] | None, typer.Option(help="Default: path, or score where --top-k is given.",
                                                               show_default=False)]
CopyTo = Annotated[str, typer.Option(metavar="DIR", help="Folder into which the photos of the results are copied; "
                                     "those that lie there already are not looked at, unless it is named.",
                                     show_default=False)]
Tokens = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(help="0: the most probable words; else words are sampled.")]
TopP = Annotated[float, typer.Option(help="Sampled from this share of the probability.")]
Beams = Annotated[int, typer.Option(help="Of a beam search; 1 = none.")]
Seed = Annotated[int, typer.Option(help="Of what is sampled.")]
Recipe = Annotated[str, typer.Option(metavar="NAME|FILE[:VARIANT]", help="The recipe: one of ours by its name, such as "
                                     "finetune:7b, or a file. --config.FIELD=VALUE sets a field of it; python -m "
                                     "calm_jax.config lists them all.")]
DataDir = Annotated[str, typer.Option(metavar="DIR", help="Folder of data sets that calm prepare stored; demo needs "
                                      "none.", show_default=False)]


# ---- photos -------------------------------------------------------------------------------------------------------


@command("score", JUDGE, example="calm score holiday/ --checkpoint runs/finetune --top-k 20 --copy-to best/\n"
         "calm score holiday/ --checkpoint runs/finetune --format html --out holiday.html")
def score(
        checkpoint: Model, paths: Paths = None, process: ProcessOf = "",
        reader: Annotated[Literal["expectation", "text", "levels", "head", "light"], typer.Option(
            help="How the score is read from the model; text is the paper's way.")] = "expectation",
        scale: Annotated[str, typer.Option(metavar="LOW,HIGH", help="Lowest and highest of the results.")] = "1,10",
        top_k: TopK = 0, min_score: MinScore = None, sort: Sort = None, copy_to: CopyTo = "",
        format: Format = "table", out: Out = "", batch: Batch = 16) -> int:
    """Score photos, sort them, copy the best."""
    from calm_jax.commands.predict import verbs
    return verbs.run("score", paths or [], checkpoint=checkpoint, process=process, reader=reader, scale=_names(scale),
                     top_k=top_k, min_score=min_score, sort=sort, copy_to=copy_to, format=format, out=out, batch=batch)


@command("comment", JUDGE, example="calm comment photo.jpg --checkpoint runs/finetune --aspect light")
def comment(
        checkpoint: Model, paths: Paths = None, process: ProcessOf = "",
        aspect: Annotated[str, typer.Option(help="What about; default: everything.", show_default=False)] = "",
        tokens: Tokens = 128, temperature: Temperature = 0.0, top_p: TopP = 1.0, beams: Beams = 1, seed: Seed = 0,
        format: Format = "table", out: Out = "", batch: Batch = 16) -> int:
    """Say in words what is good and bad about photos."""
    from calm_jax.commands.predict import verbs
    return verbs.run("comment", paths or [], checkpoint=checkpoint, process=process, aspect=aspect, tokens=tokens,
                     temperature=temperature, top_p=top_p, beams=beams, seed=seed, format=format, out=out, batch=batch)


@command("suggest", JUDGE, example="calm suggest photo.jpg --checkpoint runs/finetune")
def suggest(
        checkpoint: Model, paths: Paths = None, process: ProcessOf = "", tokens: Tokens = 128,
        temperature: Temperature = 0.0, top_p: TopP = 1.0, beams: Beams = 1, seed: Seed = 0, format: Format = "table",
        out: Out = "", batch: Batch = 16) -> int:
    """Suggest what would improve photos."""
    from calm_jax.commands.predict import verbs
    return verbs.run("suggest", paths or [], checkpoint=checkpoint, process=process, tokens=tokens,
                     temperature=temperature, top_p=top_p, beams=beams, seed=seed, format=format, out=out, batch=batch)


@command("attributes", JUDGE, example="calm attributes holiday/*.jpg --checkpoint runs/finetune --format csv")
def attributes(checkpoint: Model, paths: Paths = None, process: ProcessOf = "", format: Format = "table",
               out: Out = "", batch: Batch = 16) -> int:
    """Judge exposure, sharpness, noise and other attributes of photos."""
    from calm_jax.commands.predict import verbs
    return verbs.run("attributes", paths or [], checkpoint=checkpoint, process=process, format=format, out=out,
                     batch=batch)


@command("personalise", JUDGE, example="calm personalise holiday/ --checkpoint runs/finetune --ratings mine.csv "
         "--scale 1,5")
def personalise(
        checkpoint: Model, paths: Paths = None, process: ProcessOf = "",
        ratings: Annotated[str, typer.Option(metavar="FILE", help="A table image,score[,user] of photos that somebody "
                                             "has rated; paths are relative to its folder.")] = ...,
        user: Annotated[str, typer.Option(help="Whose ratings, where the table has several people's.",
                                          show_default=False)] = "",
        method: Annotated[Literal["ridge", "context"], typer.Option(
            help="ridge: from the generic scores and what the encoder sees, in closed form; context: the rated photos "
                 "are shown to the model (paper), which must have learned that.")] = "ridge",
        shots: Annotated[int, typer.Option(min=0, help="context: rated photos in one; 0 = as many as fit.")] = 0,
        scale: Annotated[str, typer.Option(metavar="LOW,HIGH", help="Of the ratings and of the results.")] = "1,10",
        top_k: TopK = 0, min_score: MinScore = None, sort: Sort = None, copy_to: CopyTo = "",
        format: Format = "table", out: Out = "", batch: Batch = 16) -> int:
    """Score photos as one person would, from photos that this person has rated."""
    from calm_jax.commands.predict import verbs
    return verbs.run("personalise", paths or [], checkpoint=checkpoint, process=process, ratings=ratings, user=user,
                     method=method, shots=shots, scale=_names(scale), top_k=top_k, min_score=min_score, sort=sort,
                     copy_to=copy_to, format=format, out=out, batch=batch)


# ---- training -----------------------------------------------------------------------------------------------------


@command("prepare", TRAIN, example="calm prepare --dataset para --source PARA --data-dir DATA\n"
         "calm prepare --dataset csv --scale 1,10 --name mine --source SCORES.csv --data-dir DATA")
def prepare(
        dataset: Annotated[str, typer.Option(help="Which data set the source is: para, oasis, ava, folder, csv, qa, or "
                                             "one of another package.")],
        source: Annotated[str, typer.Option(metavar="PATH", help="Folder with its labels and photos; for csv and qa "
                                            "also the label file.")],
        data_dir: Annotated[str, typer.Option(metavar="DIR", help="Folder of prepared data sets, the config.data.dir "
                                              "of training.")],
        name: Annotated[str, typer.Option(help="Name to store it under; default: that of the data set.",
                                          show_default=False)] = "",
        longest_side: Annotated[int, typer.Option(min=0, help="Of a stored photo, pixels; larger ones are shrunk; 0 = "
                                                  "kept as they are up to 33 megapixels.")] = 512,
        scale: Annotated[str, typer.Option(metavar="LOW,HIGH", help="csv: lowest and highest score, such as 1,10.",
                                           show_default=False)] = "",
        shares: Annotated[str, typer.Option(metavar="A,B,C", help="Of train, validation and test where there is no "
                                            "official split, such as 0.8,0.1,0.1.", show_default=False)] = "",
        max_bad_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of unusable photos or label rows "
                                                     "above which the build stops.")] = 0.05,
        workers: Annotated[int, typer.Option(min=0, help="Threads that decode photos; 0 = one a core.")] = 0,
        rebuild: Annotated[bool, typer.Option("--rebuild", help="Remove an earlier build of that name first.")] = False
        ) -> None:
    """Store a data set for training; the same command again goes on after an interruption."""
    from calm_jax.commands import prepare as work
    work.prepare(dataset, source, data_dir, name=name, longest_side=longest_side,
                 scale=numbers("--scale", scale, 2) if scale else None,
                 shares=numbers("--shares", shares, 3) if shares else None, max_bad_share=max_bad_share,
                 workers=workers, rebuild=rebuild)


@command("samples", TRAIN, extras=True, example="calm samples --config pretrain --rows 6 --out samples.html")
def samples(
        context: typer.Context, config: Recipe,
        process: Annotated[str, typer.Option(help="Of the config; default: its first.", show_default=False)] = "",
        split: Annotated[str, typer.Option(help="train or validation.")] = "train",
        rows: Annotated[int, typer.Option(min=0, help="Rows that are shown in full.")] = 6,
        out: Annotated[str, typer.Option(metavar="FILE", help="The page.")] = "samples.html") -> None:
    """Show on a page what a process learns from: images, edits, texts, the mixture."""
    from calm_jax import recipes
    from calm_jax.commands import samples as work
    work.run(recipes.load(config, overrides(context)), process=process, split=split, rows=rows, out=out)


@command("train", TRAIN, extras=True, example="calm train --config finetune:7b --config.init=runs/pretrain-7b "
         "--workdir runs/mine\ncalm train --config finetune --config.processes.scores.optimizer.peak_lr=1e-4")
def train(
        context: typer.Context, config: Recipe,
        workdir: Annotated[str, typer.Option(metavar="DIR", help="Folder of checkpoints, metrics and curves; default: "
                                             "runs/NAME-VARIANT.", show_default=False)] = "",
        distributed: Annotated[Literal["auto", "on", "off"], typer.Option(
            help="Whether this is one process of several; auto: where the environment says so, on: as JAX finds out "
            "(Cloud TPU).")] = "auto",
        profile: Annotated[int, typer.Option(min=0, help="Steps of each process, after its first few, that are traced "
                                             "into WORKDIR/profile, for XProf and Perfetto; 0 = none.")] = 0) -> None:
    """Train the processes of a recipe in their order; the same command again resumes."""
    from calm_jax.commands import train as work
    work.run(config, overrides(context), workdir, distributed=distributed, profile=profile)


@command("supervise", TRAIN, extras=True, example="calm supervise --processes 2 -- -m calm_jax.train --config "
         "finetune:7b")
def supervise(context: typer.Context) -> int:
    """Run training and start it again after a crash or a standstill (python -m calm_jax.supervise --help)."""
    from calm_jax import supervise as work
    return work.main(sys.argv[sys.argv.index("supervise") + 1:])


@command("evaluate", TRAIN, example="calm evaluate --workdir runs/finetune --task scoring --dataset demo\n"
         "calm evaluate --workdir DIR1,DIR2 --task personalised --dataset oasis --data-dir DATA --shots 0,5,10")
def evaluate(
        workdir: Annotated[str, typer.Option(metavar="DIR[,DIR...]", help="Workdir, of which the process is measured "
                                             "that learned the task; process folder or checkpoint, measured whatever "
                                             "it learned.")],
        task: Annotated[Literal["attributes", "scoring", "commenting", "suggesting", "personalised"], typer.Option(
            help="What to measure.")],
        process: Annotated[str, typer.Option(help="Of the workdir, measured whatever it learned; default: the latest "
                                             "that learned the task.", show_default=False)] = "",
        dataset: Annotated[str, typer.Option(help="Name of the data set.")] = "demo",
        data_dir: DataDir = "",
        split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
        reader: Annotated[Literal["expectation", "text", "levels", "head", "light"], typer.Option(
            help="scoring: how a score is read from the model.")] = "text",
        records: Annotated[int, typer.Option(min=0, help="Photos of the split that are asked about, spread evenly; 0 = "
                                             "all.")] = 0,
        control: Annotated[str, typer.Option(metavar="DIR", help="attributes: a model trained on shuffled labels; "
                                             "suggesting: one never trained on suggestions.", show_default=False)] = "",
        threshold: Annotated[float, typer.Option(help="scoring: on the scale 1-10, above which a photo is "
                                                 "good.")] = 5.0,
        method: Annotated[Literal["ridge", "context"], typer.Option(
            help="personalised: in closed form on what the encoder sees, or in context, as in the paper.")] = "ridge",
        shots: Annotated[str, typer.Option(metavar="K[,K...]", help="personalised: rated photos "
                                           "shown.")] = "0,2,5,10,20",
        raters: Annotated[int, typer.Option(min=0, help="personalised: how many people; 0 = all.")] = 0,
        shown: Annotated[str, typer.Option(help="personalised: the split of the rated photos shown.")] = "train",
        context: Annotated[int, typer.Option(min=0, help="personalised, context: rated photos in one at most; "
                                             "more shots are the mean over several; 0 = as many as fit.")] = 0,
        spice: Annotated[bool | None, typer.Option("--spice/--no-spice", help="commenting: compute SPICE, or fail; "
                                                   "default: where it can be computed.", show_default=False)] = None,
        out: Annotated[str, typer.Option(metavar="DIR", help="Folder of the results; default: WORKDIR/evaluation.",
                                         show_default=False)] = "") -> None:
    """Measure a model by a task on a data set: table, plot, answers."""
    from calm_jax.commands import evaluate as work
    work.run(_names(workdir), task, process=process, dataset=dataset, data_dir=data_dir, split=split, reader=reader,
             records=records, control=control, threshold=threshold, method=method, shots=_names(shots), raters=raters,
             shown=shown, context=context, spice=spice, out=out)


# ---- weights ------------------------------------------------------------------------------------------------------


@command("parts", WEIGHTS, example="calm parts\ncalm parts laptop --out parts/laptop")
def parts(
        name: Annotated[str, typer.Argument(metavar="NAME", help="The set to fetch; none: list them all.",
                                            show_default=False)] = "",
        out: Annotated[str, typer.Option(metavar="DIR", help="Folder of the set; default: parts/NAME.",
                                         show_default=False)] = "") -> None:
    """List known sets of pretrained parts, or fetch one: encoder and language model."""
    from calm_jax.commands import parts as work
    work.run(name, out)


@command("convert", WEIGHTS, example="calm convert --vit openai/clip-vit-large-patch14-336 --llm lmsys/vicuna-7b-v1.5 "
         "--out runs/calm-7b\ncalm convert --parts parts/laptop --out runs/laptop-start")
def convert(
        out: Annotated[str, typer.Option(metavar="DIR", help="Folder of the checkpoint; must not exist.")],
        vit: Annotated[str, typer.Option(metavar="DIR|FILE|HUB", help="The encoder: CLIP, SigLIP or DINOv2; also an "
                                         "ONNX file of DINOv2.",
                                         show_default=False)] = "",
        llm: Annotated[str, typer.Option(metavar="DIR|FILE|HUB", help="The language model: LLaMA, Vicuna, SmolLM2, "
                                         "Qwen2.5 or Qwen3; also a GGUF file.", show_default=False)] = "",
        parts: Annotated[str, typer.Option(metavar="DIR|NAME", help="Both at once, with their chat template: a set "
                                           "that calm parts fetched, or the name of one.", show_default=False)] = "",
        qformer: Annotated[str, typer.Option(metavar="X[,X,X]", help="The Q-Formers: one for all levels, or "
                                             "low,middle,high; default: initialised at random.",
                                             show_default=False)] = "",
        chat: Annotated[str, typer.Option(help="Chat template of the language model; default: what its tokenizer "
                                          "tells.", show_default=False)] = "",
        seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of what is initialised at random.")] = 0,
        image_size: Annotated[int, typer.Option(min=0, metavar="PIXELS", help="Side of the images that the encoder is "
                                                "to see; 0 = as it was trained.")] = 0) -> None:
    """Turn public Hugging Face weights into a checkpoint to train from."""
    from calm_jax.commands import convert as work
    work.run(vit, llm, _names(qformer), out, seed, chat, image_size, parts=parts)


@command("export", WEIGHTS, example="calm export --checkpoint runs/finetune --out runs/calm-hf")
def export(
        checkpoint: Annotated[str, typer.Option(metavar="DIR", help="A workdir, a process folder or a checkpoint.")],
        out: Annotated[str, typer.Option(metavar="DIR", help="Folder to write; must not exist.")],
        merge_lora: Annotated[bool, typer.Option("--merge-lora", help="Add LoRA adapters to the weights that they "
                                                 "adapt.")] = False,
        parts: Annotated[bool, typer.Option("--parts", help="Also write each part alone.")] = False,
        dtype: Annotated[Literal["stored", "float32", "bfloat16", "float16"], typer.Option(
            help="Of the weights.")] = "stored") -> None:
    """Write a folder that transformers loads without this package."""
    from calm_jax.commands import export as work
    work.run(checkpoint, out, merge_lora=merge_lora, parts=parts, dtype=dtype)


@command("parity", WEIGHTS, example="calm parity --checkpoint runs/finetune --hf runs/calm-hf")
def parity(
        checkpoint: Annotated[str, typer.Option(metavar="DIR", help="A workdir, a process folder or a checkpoint.")],
        hf: Annotated[str, typer.Option(metavar="DIR", help="The folder that calm export wrote.")],
        images: Annotated[str, typer.Option(metavar="FILE[,FILE...]", help="Photos; default: three made on the spot.",
                                            show_default=False)] = "",
        python: Annotated[str, typer.Option(metavar="FILE", help="Interpreter of the torch side; default: this one.",
                                            show_default=False)] = "",
        dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of both computations.")] = "float32",
        tolerance: Annotated[float, typer.Option(min=0.0, help="Largest difference of logits.")] = 1e-4,
        new_tokens: Annotated[int, typer.Option(min=1, help="Length of the greedy answers.")] = 64) -> int:
    """Compare a checkpoint with its export, stage by stage: JAX beside torch."""
    from calm_jax.commands import parity as work
    return work.run(checkpoint, hf, images=tuple(_names(images)), python=python or sys.executable, dtype=dtype,
                    tolerance=tolerance, new_tokens=new_tokens)


# ---- more ---------------------------------------------------------------------------------------------------------


@command("plan", MORE, extras=True, example="calm plan --config finetune:7b --topology v5e-16")
def plan(
        context: typer.Context, config: Recipe,
        topology: Annotated[str, typer.Option(help="The slice: v5e-16, v5e:4x4, 2xv5e-16, v5p-8, v6e-8, a100:8, "
                                              "h100:8, cpu:8.")],
        process: Annotated[str, typer.Option(help="Of the config; default: its last.", show_default=False)] = "",
        inference: Annotated[bool, typer.Option("--inference", help="Plan the scorer instead of the training "
                                                "step.")] = False,
        rows: Annotated[int, typer.Option(min=1, help="inference: photos a device at a time.")] = 8,
        hlo: Annotated[str, typer.Option(metavar="FILE", help="Also write the compiled program's text here.",
                                         show_default=False)] = "",
        out: Annotated[str, typer.Option(metavar="FILE", help="Also write the plan as JSON here.",
                                         show_default=False)] = "") -> int:
    """Compile a training step for accelerators that are not here: memory, communication, time."""
    from calm_jax import recipes
    from calm_jax.commands import plan as work
    return work.run(lambda: recipes.load(config, overrides(context)), topology, process=process, inference=inference,
                    rows=rows, hlo=hlo, out=out)


@command("cues", MORE, example="calm cues --out runs/cues --model gpt-4o-mini --per-place 12")
def cues(
        out: Annotated[str, typer.Option(metavar="DIR", help="Folder of the journal and of cues.json; an unfinished "
                                         "one is continued.")],
        model: Annotated[str, typer.Option(help="Name of the model; the paper's is GPT-3.5.")] = "gpt-3.5-turbo",
        base_url: Annotated[str, typer.Option(metavar="URL", help="Of the endpoint; default: OPENAI_BASE_URL, or "
                                              "OpenAI.", show_default=False)] = "",
        per_place: Annotated[int, typer.Option(min=1, help="Phrases for each grade, question, comparison and "
                                               "advice.")] = 12,
        concurrency: Annotated[int, typer.Option(min=1, help="Requests at the same time.")] = 8,
        attempts: Annotated[int, typer.Option(min=1, help="Requests for one place until it is given up.")] = 4,
        retries: Annotated[int, typer.Option(help="Retries of a request after rate limits, failures and lost "
                                             "connections.")] = 5,
        temperature: Annotated[float | None, typer.Option(help="Of the model; default: the endpoint's.",
                                                          show_default=False)] = None,
        no_verify: Annotated[bool, typer.Option("--no-verify", help="Leave out the second request that classifies "
                                                "every phrase.")] = False,
        attributes: Annotated[str, typer.Option(metavar="NAME[,NAME...]", help="Only these attributes.",
                                                show_default=False)] = "",
        price_per_million: Annotated[str, typer.Option(metavar="IN,OUT", help="Dollars for a million tokens, for "
                                                       "models not in our table.", show_default=False)] = "",
        yes: Annotated[bool, typer.Option("--yes", help="Start without asking.")] = False) -> int:
    """Have a language model write more phrases for the pseudo-labels."""
    from calm_jax.commands import cues as work
    return work.run(out, model=model, base_url=base_url or None, per_place=per_place, concurrency=concurrency,
                    attempts=attempts, retries=retries, temperature=temperature, verify=not no_verify,
                    names=_names(attributes), price_per_million=price_per_million or None, yes=yes)


@command("demo", MORE, example="calm demo --workdir runs/demo")
def demo(
        workdir: Annotated[str, typer.Option(metavar="DIR", help="Folder of everything; default: runs/demo, "
                                             "runs/demo-full or runs/demo-quick.", show_default=False)] = "",
        full: Annotated[bool, typer.Option("--full", help="Train for longer, and a control on shuffled labels "
                                           "besides.")] = False,
        quick: Annotated[bool, typer.Option("--quick", help="A few steps of a smaller model from nothing, to see that "
                                            "it works.")] = False) -> int:
    """Join pretrained parts to a model that judges photos, and show it on a page."""
    from calm_jax.commands import demo as work
    return work.run(workdir, quick=quick, full=full)


if __name__ == "__main__":
    main()
