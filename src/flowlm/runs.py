"""Training and distilling from Python, as `flowlm train` and `flowlm distill` do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowlm.config import RunConfig, from_dict, merge, nested, read_toml, recipe_path, with_corpus
from flowlm.model import FlowLM

__all__ = ["distill", "recipe_values", "refuse_model", "train"]


def train(
    recipe: str | Path,
    out: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> FlowLM:
    """Train an FLM; returns the finished model.

    Args:
        recipe: the name of one that comes with the package, or the path of a .toml file.
        out: run directory to make.
        options: fields of the configuration by their dotted names, {"data.path": "my.txt", "train.steps": 400}; of
            a path a `Path` will do.
        force: replace a run that is already there.
        say: where plain messages go.

    Raises:
        ValueError: whatever is wrong with recipe, options, data or folder.
        KeyboardInterrupt: it was interrupted; everything is saved, and `flowlm train --resume` goes on.
    """
    if not recipe:
        raise ValueError("give a recipe, such as 'text' with {'data.path': 'my.txt'}, or 'grammar'")
    values = recipe_values(recipe, "flow", corpus=str((options or {}).get("data.corpus", "")))
    return _run(values, out, options, force, say)


def distill(
    teacher: str | Path,
    out: str | Path,
    recipe: str | Path = "text-fmlm",
    options: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> FlowLM:
    """Distil an FLM into its flow map, on the teacher's data; returns the finished model.

    Args:
        teacher: run directory of the FLM.
        recipe, out, options, force, say: as in `train`.

    Raises:
        ValueError, KeyboardInterrupt: as in `train`.
    """
    refuse_model([name for name in options or {} if name.startswith("model.")])
    has_data = any(name.startswith("data.") for name in options or {})
    values = recipe_values(recipe, "flow-map", str(teacher), has_data=has_data)
    return _run(values | {"teacher": str(teacher)}, out, options, force, say)


def _run(
    values: dict[str, Any],
    out: str | Path,
    options: Mapping[str, Any] | None,
    force: bool,
    say: Callable[[str], None],
) -> FlowLM:
    from flowlm.training.checkpoint import RunDirectory
    from flowlm.training.distributed import joined
    from flowlm.training.loop import Trainer

    plain = {name: str(v) if isinstance(v, Path) else v for name, v in (options or {}).items()}
    config = from_dict(RunConfig, merge(values, nested(plain)))
    with joined(config.train) as ranks:
        # Before minutes go into a text.
        ranks.once(lambda: RunDirectory(out).check(force=force))
        trainer = Trainer(config, out, say=say, ranks=ranks)
        trainer.start(force=force)
        if not trainer.train().finished:
            raise KeyboardInterrupt
    return FlowLM.from_pretrained(out)


def refuse_model(asked: Sequence[str]) -> None:
    """Refuse fields of a model that are asked of a student, be they what its teacher has or not.

    ValueError: there are some.
    """
    if asked:
        raise ValueError(f"a student is made like its teacher: leave out {', '.join(asked)}")


def recipe_values(
    recipe: str | Path, objective: str, teacher: str = "", *, has_data: bool = False, corpus: str = ""
) -> dict[str, Any]:
    """The tables of a recipe, with what a student takes from its teacher's run: the data it was trained on.

    Args:
        recipe: as in `train`; empty for none.
        objective: "flow" or "flow-map", unless the recipe says.
        teacher: of a flow map; the recipe's own when empty.
        has_data: whether fields of the data are given elsewhere.
        corpus: by name, that is given elsewhere; a student has its teacher's.

    Raises:
        ValueError: no such recipe, a student with a [model] of its own, a teacher that does not name its data.
    """
    values: dict[str, Any] = {}
    if recipe:
        values = {"recipe": Path(recipe).stem} | read_toml(recipe_path(recipe))
    if objective == "flow":
        return with_corpus(values, corpus)
    if "model" in values:
        raise ValueError(
            f"{recipe}: a distillation has no [model] of its own, the student is made like its teacher"
        )
    if teacher := teacher or values.get("teacher", ""):
        # The student learns on its teacher's data unless told otherwise.
        path = Path(teacher) / "config.toml"
        if Path(teacher).is_file():
            raise ValueError(f"the teacher {teacher} is a file: name the run directory of a trained model")
        if path.exists():
            values = merge({"data": read_toml(path).get("data", {})}, values)
        elif not path.parent.exists():
            raise ValueError(
                f"no run at {teacher}: train the teacher first, or name another one with --teacher RUN"
            )
        elif "data" not in values and not has_data:
            raise ValueError(
                f"{teacher} has no config.toml that names its data, and neither does {recipe or 'the command'}: "
                "add --data.corpus grammar, or --data.corpus text --data.path FILE"
            )
    values.setdefault("objective", objective)
    return values
