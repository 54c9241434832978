"""The command line: `flowlm prepare | train | distill | generate | evaluate | export | convert | compare | demo |
info`.

Each command's own help is a short lesson in what it does; options are the fields of the configuration.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from flowlm.training.loop import Trainer

USAGE = """\
flowlm: language models that write a whole passage in one forward pass

  flowlm train RECIPE.toml [--out RUN] [--train.steps N ...]     train an FLM: noise to text, many small steps
  flowlm distill RECIPE.toml --teacher RUN [--out RUN2]          distil it into an FMLM: noise to text, one step
  flowlm prepare RECIPE.toml|lm1b|… [--out FOLDER]               tokenise its text ahead, for large ones
  flowlm train --resume RUN                                      continue an interrupted run, bit for bit
  flowlm generate [RUN] [--num 8] [--steps 1] [--seed 0]         write passages
  flowlm evaluate [RUN|FILE] [--steps 1,2,4,8,16,64]             measure them
  flowlm export RUN --out FOLDER [--dtype int8]                  a model to hand on, with its card
  flowlm convert CKPT OUT --tokenizer PATH                       a published checkpoint as a model of this package
  flowlm compare RECIPE.toml [--out FOLDER]                      several families, at equal training compute
  flowlm demo [--minutes 13]                                     all of it, on a language whose law is known
  flowlm info [RUN|RECIPE.toml]                                  what a run or recipe is, and what it costs

Without a RUN, generate, evaluate and info take the small model that comes with the package; hf://USER/NAME is one
on the Hugging Face hub.

An FLM (flow language model) turns Gaussian noise over one-hot tokens into text along a flow, one network call
a step. An FMLM (flow map language model) is the same network taught to jump along that flow, in one call.

flowlm COMMAND --help tells more. FLOWLM_DEBUG=1 shows tracebacks.
"""


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
    """How passages are made."""

    seed: int = 0
    """Passage i depends on (seed, i) alone."""
    gamma: float | None = None
    """Of flows, share of re-noising between steps, in [0, 1]: 0."""
    prior_scale: float | None = None
    """Of flows, scale of the initial noise: 1; below it text is likelier and less varied."""
    temperature: float | None = None
    """Temperature of every posterior: 1."""
    top_k: int | None = None
    """Of AR, draw among the k likeliest tokens: 0, all."""
    top_p: float | None = None
    """Of AR, draw among the likeliest tokens that weigh p together: 1, all."""
    last: str | None = None
    """Rule of the last step: argmax (flows), or categorical (the others)."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: str = "auto"
    """auto, bfloat16 or float32."""

    @property
    def sampler(self) -> dict[str, Any]:
        """The options that were given; the others are as the model's family has them."""
        from flowlm.evaluation.samples import DEFAULT_SAMPLER

        return {name: value for name in DEFAULT_SAMPLER if (value := getattr(self, name)) is not None}


@dataclasses.dataclass(frozen=True)
class GenerateOptions(SamplerOptions):
    """Write passages with a trained model: start from noise, call the network --steps times, print the text.

    Without a RUN the small model that comes with the package writes stories, in English.
    """

    num: int = 8
    """How many passages."""
    steps: int = 1
    """Network calls per passage (NFE): 1 for an FMLM, more for an FLM."""
    json: bool = False
    """Print one JSON object a line instead of text."""
    out: str = ""
    """Write the sample file here (JSONL with a header line)."""
    force: bool = False
    """Replace that file if it is there."""


@dataclasses.dataclass(frozen=True)
class TextPlace:
    """The text to judge by."""

    path: str = ""
    """Of a run: the file or folder of the text that it was trained on, if that has moved; it must be the same. Of a
    sample file: a text, a passage a line, or a run whose text is taken."""


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(SamplerOptions):
    """Measure a run (it generates first, in sample files) or a sample file.

    On `grammar` the law is known exactly: share of valid stories, which rules broke, likelihood of the valid
    ones, distance of every slot and pair of slots from the law, how much of it is told. On any text: perplexity under
    an n-gram model of the training text, words it knows, copies, self-BLEU, entropy, beside held-out text and the
    n-gram model's samples.
    """

    steps: str = "1,2,4,8,16,64"
    """Network calls, comma-separated; one row each."""
    num: int = 1000
    """Passages per row."""
    frontier: bool = False
    """Turn each knob of the sampler (temperature, prior scale, …) by itself, and compare at the entropy of held-out
    text. Samples of the same settings are not made again: what was interrupted goes on."""
    scorer: str = ""
    """Perplexity under this model: a run of objective 'ar', a causal model of Hugging Face's as a folder or by its name
    on the hub, name@revision; empty: an n-gram model of the training text."""
    json: str = ""
    """Write the rows here as JSON."""
    report: str = ""
    """Write a folder here: rows, samples, pictures, of a run its held-out curve, as JSON, Markdown and a page."""
    force: bool = False
    """Write the report into a folder that holds something else, or replace the file of --json."""
    data: TextPlace = TextPlace()
    card: bool = False
    """Write what was measured into the card of an exported model."""
    push: str = ""
    """With --card: repository on the hub, USER/NAME, to put the model in with that card."""


@dataclasses.dataclass(frozen=True)
class DemoOptions:
    """Train an FLM on stories, distil it into an FMLM, and watch it write in one step."""

    minutes: float = 13.0
    """Time for the whole; training is scaled to fit."""
    seed: int = 0
    """Seed of the training."""
    out: str = "runs/demo"
    """Where everything is saved."""
    num: int = 1000
    """Stories per row of the evaluation."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: str = "auto"
    """auto, bfloat16 or float32."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (0, or 1 with one message for anything wrong)."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if args[0] in ("-V", "--version"):
        from flowlm import __version__

        print(f"flowlm {__version__}")
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {
        "prepare": _prepare,
        "train": _train,
        "distill": _distill,
        "generate": _generate,
        "evaluate": _evaluate,
        "export": _export,
        "convert": _convert,
        "compare": _compare,
        "demo": _demo,
        "info": _info,
    }
    from flowlm.config import nearest

    if args[0] not in commands:
        return _fail(f"unknown command {args[0]!r}: {nearest(args[0], commands)}")
    from flowlm.device import is_out_of_memory
    from flowlm.training.distributed import ElsewhereError, launched
    from flowlm.training.loop import TrainingError

    _, world, _ = launched()
    if world > 1 and args[0] not in ("train", "distill"):
        return _fail(
            f"flowlm {args[0]} is for one process, and torchrun started {world}: run it without", once=True
        )
    try:
        return commands[args[0]](args[1:])
    except ElsewhereError:
        return 1
    except (ValueError, OSError, ImportError, TrainingError) as error:
        if os.environ.get("FLOWLM_DEBUG"):
            raise
        message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, OSError) and error.filename and str(error.filename) not in message:
            message = f"{error.filename}: {message}"
        # What is wrong with a command is wrong for every process of torchrun's.
        return _fail(message, once=not isinstance(error, TrainingError))
    except (MemoryError, RuntimeError) as error:
        if os.environ.get("FLOWLM_DEBUG") or not is_out_of_memory(error):
            raise
        return _fail(
            "out of memory: this model and its passages do not fit on this device; use another one, or a smaller model"
        )
    except KeyboardInterrupt:
        _fail("interrupted")
        return 130


def _fail(message: str, *, once: bool = False) -> int:
    """Say what is wrong; returns the exit status.

    Args:
        once: on each machine, of the processes that torchrun started there; the others have the same to say.
    """
    from flowlm.training.distributed import launched

    rank, world, local = launched()
    if not (once and local):
        where = f" (process {rank} of {world})" if rank else ""
        print(f"flowlm{where}: {message}", file=sys.stderr)
    return 1


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _positional(args: list[str], what: str) -> str:
    if not args or args[0].startswith("-"):
        raise ValueError(f"give first {what}; see --help")
    return args.pop(0)


def _run_or_packaged(args: list[str]) -> Path:
    """The run that is named first; the model of the package where none is."""
    from flowlm.hub import located
    from flowlm.model import PACKAGED

    if args and not args[0].startswith("-"):
        return located(args.pop(0))
    if not PACKAGED.is_dir():
        raise ValueError(
            "give a run directory first, such as runs/demo/fmlm: no model comes with this version of the package"
        )
    return PACKAGED


def _options(kind: type, default: Any, args: list[str], prog: str, description: str | None = None) -> Any:
    import tyro

    return tyro.cli(kind, default=default, args=args, prog=prog, description=description)


# -- prepare, train, distill -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _RunOptions:
    out: str = ""
    """Run directory to make; runs/<recipe's name> when empty."""
    resume: str = ""
    """Continue this run directory, interrupted or killed, from its newest checkpoint."""
    force: bool = False
    """Replace a run that is already there."""
    device: str = ""
    """Short for --train.device: auto, cpu, cuda or mps."""
    dtype: str = ""
    """Short for --train.dtype: auto, bfloat16 or float32."""


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """Read a recipe's text, tokenise it, and write rows of token ids that training maps from disk.

    `flowlm train` does this by itself, into its cache. Do it ahead for a large text, or to take the rows to another
    machine: `--data.path FOLDER` then stands for the text. What is interrupted or killed goes on where it was.

    In place of a recipe stands a corpus by name: lm1b, lm1b-unwrapped, openwebtext, text8, wikitext. Its text comes
    from the Hugging Face hub, or with --data.path from a folder of its Parquet files. tinystories is also a recipe's
    name, and means that here: the corpus is --data.corpus tinystories.
    """

    out: str = ""
    """Folder to write; the cache, where training finds it, when empty."""
    streaming: bool = False
    """Of a corpus by name: read its files on the hub, twice, and keep none of them here."""


@dataclasses.dataclass(frozen=True)
class PreparedLength:
    """What of a recipe's [model] the rows depend on."""

    length: int = 64
    """L, tokens in a passage: that of the model which will read them."""


def _recipe_or_corpus(name: str) -> dict[str, Any]:
    """The tables of a recipe; of a corpus by name, if no recipe has it."""
    from flowlm.config import read_toml, recipe_path, with_corpus
    from flowlm.data.registry import CORPORA

    try:
        path = recipe_path(name)
    except ValueError:
        if name not in CORPORA:
            raise
        return with_corpus({}, name)
    return read_toml(path)


def _prepare(args: list[str]) -> int:
    from flowlm.config import from_dict, with_corpus
    from flowlm.data.corpora import DataConfig, prepare_corpus
    from flowlm.data.registry import CORPORA

    recipe = args.pop(0) if args and not args[0].startswith("-") else ""
    values = with_corpus(_recipe_or_corpus(recipe) if recipe else {}, _peek(args, "--data.corpus"))
    try:
        data = from_dict(DataConfig, values.get("data", {}), "data.")
        model = PreparedLength(values.get("model", {}).get("length", PreparedLength.length))
    except ValueError as error:
        raise ValueError(f"{recipe}: {error}" if recipe else str(error)) from None
    kind = dataclasses.make_dataclass(
        "Options",
        [
            ("data", DataConfig, dataclasses.field(default=data)),
            ("model", PreparedLength, dataclasses.field(default=model)),
        ],
        bases=(PrepareOptions,),
        frozen=True,
    )
    options = _options(kind, kind(), args, "flowlm prepare [RECIPE.toml|CORPUS]", PrepareOptions.__doc__)
    if recipe in CORPORA and options.data.corpus == "text" and not options.data.path:
        raise ValueError(
            f"the recipe {recipe} is for stories of your own: give them with --data.path FILE; the published corpus "
            f"of that name is --data.corpus {recipe}"
        )
    out = Path(options.out) if options.out else None
    folder = prepare_corpus(options.data, options.model.length, out, _say, streaming=options.streaming)
    _say(f"prepared in {folder}")
    return 0


def _train(args: list[str]) -> int:
    return _train_or_distill(args, "train", "flow")


def _distill(args: list[str]) -> int:
    return _train_or_distill(args, "distill", "flow-map")


def _train_or_distill(args: list[str], command: str, objective: str) -> int:
    import tyro

    from flowlm.config import RunConfig, default_run_folder, dotted, from_dict, read_run_config, to_dict
    from flowlm.runs import recipe_values, refuse_model
    from flowlm.training.checkpoint import RunDirectory
    from flowlm.training.distributed import joined
    from flowlm.training.loop import MAY_CHANGE, Trainer, open_run

    recipe = args.pop(0) if args and not args[0].startswith("-") else ""
    resumed = _peek(args, "--resume")
    if resumed:
        if recipe:
            raise ValueError(f"--resume continues {resumed} by its own recipe: leave {recipe} out")
        config = read_run_config(resumed)
    else:
        has_data = any(arg.startswith("--data.") for arg in args)
        if command == "distill":
            refuse_model([arg.split("=")[0] for arg in args if arg.startswith("--model.")])
        corpus = _peek(args, "--data.corpus")
        values = recipe_values(recipe, objective, _peek(args, "--teacher"), has_data=has_data, corpus=corpus)
        try:
            config = from_dict(RunConfig, values)
        except ValueError as error:
            raise ValueError(f"{recipe}: {error}" if recipe else str(error)) from None

    kind = dataclasses.make_dataclass(
        "Options",
        [("config", Annotated[RunConfig, tyro.conf.arg(name="")], dataclasses.field(default=config))],
        bases=(_RunOptions,),
        frozen=True,
    )
    what = {
        "train": "Train a model by a recipe. Any field can be set: --train.steps 200 --model.backbone.width 64.",
        "distill": "Distil an FLM (--teacher RUN) into its flow map, which writes in one step.",
    }[command]
    options = _options(kind, kind(), args, f"flowlm {command} [RECIPE.toml]", what)
    if options.resume:
        before, now = dotted(to_dict(config)), dotted(to_dict(options.config))
        changes = {name: value for name, value in now.items() if value != before[name]}
        alone = dataclasses.replace(options, config=config)
        if alone != kind(config=config, resume=resumed) or not set(changes) <= set(MAY_CHANGE):
            raise ValueError(
                "--resume continues a run as it was: beside it may stand --train.micro-batch, --train.shard, and "
                "--data.path or --teacher where these have moved; to go on with other settings start a new run from "
                f"its weights: flowlm {command} RECIPE.toml --init {resumed}"
            )
        with joined(options.config.train) as ranks:
            return _run_to_its_end(open_run(resumed, changes=changes, say=_say, ranks=ranks))
    else:
        if not recipe:
            raise ValueError(f"give a recipe, such as flowlm {command} recipes/grammar.toml, or --resume RUN")
        if command == "distill" and not options.config.teacher:
            raise ValueError("distill needs its teacher: --teacher RUN, the run directory of a trained FLM")
        folder = options.out or default_run_folder(recipe)
        short = {name: value for name in ("device", "dtype") if (value := getattr(options, name))}
        train = dataclasses.replace(options.config.train, **short)
        with joined(train) as ranks:
            # Before minutes go into a text.
            ranks.once(lambda: RunDirectory(folder).check(force=options.force))
            config = dataclasses.replace(options.config, train=train)
            return _run_to_its_end(Trainer(config, folder, say=_say, ranks=ranks), options.force)


def _run_to_its_end(trainer: Trainer, force: bool | None = None) -> int:
    """Train; returns the exit status.

    Args:
        force: as of `Trainer.start`, of a new run; None for one that goes on.
    """
    if force is not None:
        trainer.start(force=force)
        trainer.say(f"{trainer.run.path}: {_size(dataclasses.asdict(trainer.config), trainer.model)}")
    result = trainer.train()
    if not result.finished:
        return 130
    trainer.say(
        f"done: step {result.step}, held-out loss {result.held_out:.4f} {trainer.family.unit(trainer.config)}; the "
        f"model is in {result.folder}"
    )
    return 0


def _peek(args: list[str], name: str) -> str:
    for i, arg in enumerate(args):
        if arg == name and i + 1 < len(args):
            return args[i + 1]
        if arg.startswith(name + "="):
            return arg.split("=", 1)[1]
    return ""


def _size(config: dict[str, Any], model: Any) -> str:
    total = sum(p.numel() for p in model.parameters())
    inside = sum(p.numel() for name, p in model.named_parameters() if "backbone." in name)
    m = config["model"]
    return (
        f"{total:,} parameters ({inside:,} in the backbone), V = {m['vocab_size']}, L = {m['length']}, "
        f"d = {m['backbone']['width']}"
    )


# -- generate, evaluate ----------------------------------------------------------------------------------------


def _generate(args: list[str]) -> int:
    import json

    if args and args[0] in ("-h", "--help"):
        _options(GenerateOptions, GenerateOptions(), args, "flowlm generate [RUN]")
    run = _run_or_packaged(args)
    options: GenerateOptions = _options(GenerateOptions, GenerateOptions(), args, "flowlm generate [RUN]")
    from flowlm.evaluation.report import calls_text
    from flowlm.evaluation.runs import write_run_samples
    from flowlm.evaluation.samples import read_samples
    from flowlm.files import check_output
    from flowlm.model import FlowLM

    if options.out:
        check_output(Path(options.out), "--out", options.force)
    model = FlowLM.from_pretrained(run, device=options.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.out) if options.out else Path(folder) / "samples.jsonl"
        write_run_samples(
            model,
            run,
            path,
            options.num,
            options.steps,
            seed=options.seed,
            dtype=options.dtype,
            **options.sampler,
        )
        header, records = read_samples(path)
    for record in records:
        print(
            json.dumps(dataclasses.asdict(record), ensure_ascii=False) if options.json else record.text + "\n"
        )
    seconds = max(header.seconds or 0.0, 1e-3)  # which the file has to the millisecond
    tokens = options.num * model.length
    _say(
        f"{options.num} passages, {calls_text(header.nfe or options.steps)} each, {seconds:.2f} s, "
        f"{tokens / seconds:,.0f} tokens/s ({header.dtype} on {model.embedding.device})"
    )
    if options.out:
        _say(f"written to {options.out}")
    return 0


def parse_steps(text: str) -> list[int]:
    """Step counts of a comma-separated list.

    Raises:
        ValueError: something else than positive whole numbers.
    """
    try:
        steps = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--steps {text!r}: give whole numbers separated by commas, such as 1,2,4,8"
        ) from None
    if any(k < 1 for k in steps):
        raise ValueError(f"--steps {text!r}: every sample takes at least one network call")
    return steps


def _evaluate(args: list[str]) -> int:
    if args and args[0] in ("-h", "--help"):
        _options(EvaluateOptions, EvaluateOptions(), args, "flowlm evaluate [RUN|FILE]")
    typed = list(args)
    target = _run_or_packaged(args)
    options: EvaluateOptions = _options(
        EvaluateOptions, EvaluateOptions(), args, "flowlm evaluate [RUN|FILE]"
    )
    with tempfile.TemporaryDirectory(prefix="flowlm-") as temporary:
        command = ["flowlm", "evaluate", *(word for word in typed if word != "--force")]
        return _measure(target, options, shlex.join(command), temporary)


def _measure(target: Path, options: EvaluateOptions, command: str, temporary: str) -> int:
    from rich.console import Console

    from flowlm.card import write_card
    from flowlm.evaluation.report import table_text, views, write_json
    from flowlm.evaluation.run_report import check_report, write_report
    from flowlm.evaluation.runs import (
        SHOWN,
        evaluate_file,
        evaluate_run,
        held_out_curve,
        law_reference,
        shown_samples,
    )
    from flowlm.evaluation.samples import read_samples
    from flowlm.evaluation.scorers import open_scorer
    from flowlm.files import check_output
    from flowlm.model import PACKAGED
    from flowlm.provenance import ABOUT, read_about

    if options.push and not options.card:
        raise ValueError(
            f"--push {options.push} puts a model on the hub with the card that says how good it is: add --card, or use "
            "flowlm export --push"
        )
    if options.card and (target == PACKAGED or not (target / ABOUT).exists()):
        raise ValueError(f"{target} has no card to write to: --card is for a folder that flowlm export made")
    if options.card:
        read_about(target)  # what is damaged is told before the work
    if options.report and target.is_dir():
        held_out_curve(target)
    if options.json:
        check_output(Path(options.json), "--json", options.force)
    if options.report:
        check_report(Path(options.report), command, options.force)
        if importlib.util.find_spec("matplotlib") is None:
            raise ImportError('a report has pictures: pip install "flowlm[plot]"')
    scorer = open_scorer(options.scorer, device=options.device) if options.scorer else None
    if target.is_file():
        kept = {"json", "force", "report", "scorer", "device", "data", "seed"}
        sampled = {f.name for f in dataclasses.fields(EvaluateOptions)} - kept
        set_ = [n for n in sorted(sampled) if getattr(options, n) != getattr(EvaluateOptions(), n)]
        if set_:
            flags = ", ".join("--" + name.replace("_", "-") for name in set_)
            raise ValueError(
                f"{target} is a sample file and is scored as it is: {flags} would change nothing; "
                "give the run's directory to make new samples"
            )
        rows = evaluate_file(target, text=options.data.path, scorer=scorer, seed=options.seed, say=_say)
        shown = {rows[0]["nfe"] or 0: [record.text for record in read_samples(target)[1][:SHOWN]]}
    else:
        steps = parse_steps(options.steps)
        # An installed package is not written into.
        samples = Path(temporary) if target == PACKAGED else target / "samples"
        rows = evaluate_run(
            target,
            steps,
            options.num,
            seed=options.seed,
            device=options.device,
            dtype=options.dtype,
            folder=samples,
            by_text=True if options.card else None,
            text=options.data.path,
            scorer=scorer,
            frontier=steps if options.frontier else (),
            say=_say,
            **options.sampler,
        )
        shown = shown_samples(rows, samples)
    if rows[0]["law"]:
        rows.append(law_reference(rows[0], options.seed, scorer))
    for view in views(rows):
        Console().print(table_text(view))
    if options.report:
        report = Path(options.report)
        write_report(report, target, rows, command, shown, seed=options.seed, device=options.device)
        _say(f"report in {options.report}")
    if options.card:
        write_card(target, rows, command, shown)
        _say(f"card in {target}")
    if options.push:
        from flowlm.hub import push

        push(target, options.push, say=_say)
    if options.json:
        write_json(options.json, rows)
        _say(f"written to {options.json}")
    return 0


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Write a run's model into a folder of its own: weights, tokenizer, and a card that says what it is.

    What it writes, any flowlm can generate from, evaluate, or distil. `flowlm evaluate FOLDER --card` then adds to
    the card how good it is.
    """

    out: str = ""
    """The folder."""
    dtype: str = "float32"
    """Of the stored weights: float32, bfloat16 for half the size, or int8 for a quarter."""
    title: str = ""
    """Of the card; the run's name when empty."""
    licence: str = ""
    """For the card, such as apache-2.0: it is for you to say what the data allow."""
    text: bool = False
    """Put the tokenised text beside the model, so that it can be evaluated where the text is not."""
    force: bool = False
    """Write into a folder that holds what no export made; files of the same names in it are replaced."""
    push: str = ""
    """Repository on the hub, USER/NAME, to put it in as well; log in first with `hf auth login`."""
    private: bool = False
    """Make that repository private."""


def _export(args: list[str]) -> int:
    if args and args[0] in ("-h", "--help"):
        _options(ExportOptions, ExportOptions(), args, "flowlm export RUN")
    from flowlm.hub import located

    run = located(_positional(args, "a run directory, as in flowlm export runs/text-fmlm --out my-model"))
    options: ExportOptions = _options(ExportOptions, ExportOptions(), args, "flowlm export RUN")
    if not options.out:
        raise ValueError("give the folder to write: --out FOLDER")
    from flowlm.card import export

    folder = Path(options.out)
    export(
        run,
        folder,
        dtype=options.dtype,
        title=options.title,
        licence=options.licence,
        text=options.text,
        force=options.force,
        say=_say,
    )
    size = sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
    _say(f"{folder}: {size / 1e6:.1f} MB; flowlm evaluate {folder} --card adds to its card how good it is")
    if options.push:
        from flowlm.hub import push

        push(folder, options.push, private=options.private, say=_say)
    return 0


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """Write a published checkpoint of FLM or FMLM (a Lightning file) as a model of this package.

    Of the file, tensors and plain settings are read; nothing that it names is run.
    """

    tokenizer: str = ""
    """Of the same vocabulary, a file or its folder: BERT's vocab.txt for LM1B, GPT-2's encoder.json and vocab.bpe for
    OpenWebText."""
    hub: str = ""
    """Repository on the hub to fetch the checkpoint from, name or name@revision; CHECKPOINT is then a file of it."""
    weights: str = "averaged"
    """averaged (EMA, which the paper reports) or raw."""
    length: int = 0
    """L, tokens in a passage; 0 takes what the file says."""
    logit_softcap: float = 30.0
    """c of the soft cap on output logits; 0 for releases before 2026-04, which had none."""


def _convert(args: list[str]) -> int:
    prog = "flowlm convert CHECKPOINT OUT"
    if args and args[0] in ("-h", "--help"):
        _options(ConvertOptions, ConvertOptions(), args, prog)
    checkpoint = _positional(
        args, "a checkpoint, as in flowlm convert last.ckpt lm1b-fmlm --tokenizer vocab.txt"
    )
    folder = Path(_positional(args, "the folder to write, after the checkpoint"))
    options: ConvertOptions = _options(ConvertOptions, ConvertOptions(), args, prog)
    if not options.tokenizer:
        raise ValueError(
            "give the tokenizer it was trained with: --tokenizer PATH, BERT's vocab.txt for LM1B or the folder of "
            "GPT-2's encoder.json and vocab.bpe for OpenWebText"
        )
    from flowlm.data.tokens import Tokenizer
    from flowlm.hub import fetch_file
    from flowlm.published import convert

    tokenizer = Tokenizer.read(options.tokenizer)
    convert(
        fetch_file(options.hub, checkpoint) if options.hub else Path(checkpoint),
        folder,
        tokenizer,
        weights=options.weights,
        length=options.length,
        logit_softcap=options.logit_softcap,
        say=_say,
    )
    _say(f"written to {folder}; write with it: flowlm generate {folder}")
    return 0


# -- compare ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Train every model of a comparison at equal training compute, judge them alike, and say which claims hold.

    What is finished is not done again, so the command goes on where it was stopped. Fields of [compare] and of runs
    can be set: --compare.num 200 --data.path my.txt; the latter then hold for all models.
    """

    out: str = ""
    """Folder of its runs and its report; comparisons/<recipe's name> when empty."""
    force: bool = False
    """Write into a folder that holds something else than a comparison."""


def _compare(args: list[str]) -> int:
    import tyro

    from flowlm.comparison.recipe import CompareConfig, load_comparison
    from flowlm.comparison.report import check_former, report
    from flowlm.comparison.runs import Interrupted, Runner
    from flowlm.config import RunConfig, dotted, from_dict, to_dict

    typed = list(args)
    wants_help = args[:1] in (["-h"], ["--help"])
    recipe = "" if wants_help else _positional(args, "a comparison's recipe, such as compare-grammar")
    loaded = load_comparison(recipe) if recipe else None
    before = loaded.config if loaded else CompareConfig()
    # Data and objective of one of them: options are read over something that is whole.
    whole = from_dict(RunConfig, loaded.entries[0].values) if loaded else RunConfig()
    kind = dataclasses.make_dataclass(
        "Options",
        [
            (
                "config",
                Annotated[RunConfig, tyro.conf.arg(name="")],
                dataclasses.field(default=whole),
            ),
            ("compare", CompareConfig, dataclasses.field(default=before)),
        ],
        bases=(CompareOptions,),
        frozen=True,
    )
    options = _options(kind, kind(), args, "flowlm compare RECIPE.toml", CompareOptions.__doc__)
    # What was typed, whether or not it is the default.
    named = {
        arg.split("=", 1)[0].removeprefix("--").replace("-", "_") for arg in args if arg.startswith("--")
    }
    over = {
        name: value
        for name, value in dotted(to_dict(options.config)).items()
        if named & {name, ".".join([*name.split(".")[:-1], "no_" + name.split(".")[-1]])}
    }
    comparison = load_comparison(recipe, over, to_dict(options.compare))
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('the report of a comparison has a plot: pip install "flowlm[plot]"')
    out = Path(options.out) if options.out else Path("comparisons") / Path(recipe).stem
    if out.is_dir() and any(out.iterdir()) and not (out / "versions").is_dir() and not options.force:
        raise ValueError(
            f"{out} holds something else than a comparison, whose report would replace what is there: choose another "
            "--out, or use --force"
        )
    command = shlex.join(["flowlm", "compare", *(word for word in typed if word != "--force")])
    check_former(out, command, options.force)
    try:
        report(Runner(comparison, out, _say), command)
    except Interrupted:
        _say(
            f"interrupted; what is finished is kept. Go on with: {shlex.join(['flowlm', 'compare', *typed])}"
        )
        return 130
    _say(f"report in {out}")
    return 0


# -- demo, info ------------------------------------------------------------------------------------------------


def _demo(args: list[str]) -> int:
    options: DemoOptions = _options(DemoOptions, DemoOptions(), args, "flowlm demo")
    from flowlm.demo import run_demo

    run_demo(
        Path(options.out),
        minutes=options.minutes,
        seed=options.seed,
        num=options.num,
        device=options.device,
        dtype=options.dtype,
        say=lambda text: print(text, flush=True),
    )
    return 0


def _info(args: list[str]) -> int:
    if args and args[0] in ("-h", "--help"):
        print(
            "usage: flowlm info [RUN|RECIPE.toml]\n\nWhat a run or a recipe is: model, data, objective, size. Of a "
            "recipe also what it costs, in parameters, tokens, FLOPs, memory and hours, and whether it fits this "
            "machine; any field of it can be set, as in --train.micro-batch 16. Without either: the model that comes "
            "with the package, and its card."
        )
        return 0
    target = _run_or_packaged(args)
    from flowlm.card import CARD
    from flowlm.config import RunConfig, dump_toml, load_recipe, read_run_config
    from flowlm.cost import described
    from flowlm.families import family_of
    from flowlm.model import PACKAGED, describe_data, read_model_config
    from flowlm.training.checkpoint import RunDirectory

    if target.is_dir():
        if args:
            raise ValueError(
                f"{' '.join(args)}: of a run all is told that there is; options are for recipes, such as flowlm info "
                "grammar --train.batch 16"
            )
        model_config = read_model_config(target)
        model = family_of(model_config).network(model_config)
        kind = family_of(model_config)
        print(f"{target}: {kind.label} ({kind.about})")
        print(_size({"model": dataclasses.asdict(model_config)}, model))
        steps = RunDirectory(target).steps()
        print(f"checkpoints: {', '.join(map(str, steps)) or 'none'}")
        for key, value in describe_data(target).items():
            print(f"data {key}: {value}")
        if target == PACKAGED:
            # Its samples are many: what it is and how good comes first.
            card, _, samples = (target / CARD).read_text(encoding="utf-8").partition("\n## In ")
            print(card)
            if samples:
                print(f"\nSamples at each number of network calls are in {target / CARD}")
        elif (target / "config.toml").exists():
            print(dump_toml(read_run_config(target)))
    else:
        recipe = load_recipe(target, _peek(args, "--data.corpus"))
        config: RunConfig = _options(RunConfig, recipe, args, f"flowlm info {target}")
        # As comments, so that all of it is a recipe.
        print("".join(f"# {line}\n" for line in described(config)))
        print(dump_toml(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
