"""One loop for every objective.

Everything random in a step is keyed by (seed, what for, step, row), and the data order is a function of the
step: a run that is killed and resumed from a checkpoint goes on bit for bit as if it had not been.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowlm import files, rng
from flowlm.backbone import Backbone
from flowlm.clock import AdaptiveClock, Clock
from flowlm.config import RunConfig, dump_toml, from_dict, merge, nested, read_run_config, to_dict
from flowlm.data.corpora import Corpus, load_corpus, upgraded
from flowlm.data.loader import Loader
from flowlm.data.tokens import Tokenizer
from flowlm.denoiser import DenoiserConfig
from flowlm.device import is_out_of_memory, keep_freed_memory, moved, precision, resolve_dtype
from flowlm.evaluation.diversity import unigram_entropy
from flowlm.evaluation.report import calls_text
from flowlm.evaluation.samples import current_commit
from flowlm.families import Objective, Start, family
from flowlm.model import DATA, FlowLM, describe_data, read_model_config
from flowlm.progress import Part, Progress
from flowlm.provenance import SOURCES, sources_of
from flowlm.training.checkpoint import ORIGIN, Metrics, RunDirectory, save_batch
from flowlm.training.distributed import ElsewhereError, Forward, Ranks, rank_lost
from flowlm.training.ema import Ema
from flowlm.training.optim import Optimizer
from flowlm.training.start import instead, load_teacher, prepare_config
from flowlm.weights import load_weights

TAU_BINS = 8
#: Passages of the held-out loss: fixed rows, fixed noise, so that two evaluations differ by the weights alone.
HELD_OUT_ROWS = 512


class TrainingError(RuntimeError):
    """A run that had to stop, with what to do about it."""


class DivergedError(TrainingError):
    """Its loss or its weights are no longer finite: as it is, it would stop there again."""


@dataclass(frozen=True)
class _Given:
    """A step that the device was given: its loss and gradient norm there, and the draws of its batch."""

    step: int
    loss: Tensor
    norm: Tensor
    draws: Mapping[str, Tensor]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    folder: Path
    step: int
    finished: bool
    """False when it was interrupted; resume continues it."""
    held_out: float
    """Held-out loss of the exported weights, in the objective's unit (`Family.unit`)."""
    seconds: float
    """That training has taken, before a resumption too."""


@dataclass(frozen=True)
class HeldOut:
    """A held-out loss, in the objective's unit."""

    loss: float
    """Mean over rows and times."""
    by_tau: list[float | None]
    """By bins of the conditioning clock's τ at s; None where no row fell."""
    by_kind: dict[str, float]
    """Of a flow map, by kind of row: diagonal, boundary, interior. Its targets move with the student."""


def _spread(tokens: NDArray[Any], num: int) -> Tensor:
    """At most num rows of tokens (N, L), evenly spaced."""
    rows = tokens[:: -(-len(tokens) // num)]
    return torch.from_numpy(rows.astype(np.int64))


class Trainer:
    """A run: model, averaged weights, optimizer, data and objective, and the loop over them.

    Args:
        config: the run's configuration.
        folder: its directory.
        say: where plain messages go.
        corpus: already loaded data; loaded by the config when None.
        teacher: an already loaded teacher, from which the student starts; loaded by the config when None.
        ranks: the processes that train it together; this one alone when None.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: str | Path,
        *,
        say: Callable[[str], None] = print,
        corpus: Corpus | None = None,
        teacher: nn.Module | None = None,
        ranks: Ranks | None = None,
    ):
        self.ranks = ranks or Ranks()
        self.family = family(config.objective)
        self.run = RunDirectory(folder)
        self.say = say = say if self.ranks.first else _quiet
        self.device = self.ranks.device(config.train.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.dtype, reason = resolve_dtype(config.train.dtype, self.device)
        say(f"device {self.device}, compute in {str(self.dtype)[6:]} ({reason})")
        if config.train.shard and self.ranks.world == 1:
            say(
                "train.shard = true shares a model out among processes, and this is one: it is whole here; several are "
                "started by torchrun"
            )
        teacher = load_teacher(config) if teacher is None else teacher
        source = config.teacher or config.init
        length = prepare_config(config, None).model.length
        tokenizer = Tokenizer.load(Path(source)) if source else None
        learned = describe_data(Path(source)) if source else None
        self.corpus = (
            corpus if corpus is not None else load_corpus(config.data, length, tokenizer, say, like=learned)
        )
        if config.teacher:
            before, now = (learned or {}).get("sha256"), self.corpus.meta.get("sha256")
            if before and now and before != now:
                say(
                    f"the teacher learned another text (sha256 {before[:12]}…) than its student will ({now[:12]}…)"
                )
        asked = config.model
        self.config = config = prepare_config(config, self.corpus.tokenizer)
        if config.model.vocab_size != self.corpus.tokenizer.vocab_size or config.model.vocabulary not in (
            "",
            self.corpus.tokenizer.vocabulary_sha256,
        ):
            raise ValueError(
                f"{source} has a vocabulary of {config.model.vocab_size} tokens and the data's tokenizer another, of "
                f"{self.corpus.tokenizer.vocab_size}: give the data the same tokenizer, or train a model on this data"
            )
        self.ranks.check(config)
        if config.init:
            say(f"model and weights are those of {config.init}{instead(asked, config.model)}")
        self.loader = Loader(self.corpus.train, config.train.batch, config.train.seed)
        if len(self.corpus.train) < config.train.batch:
            say(
                f"the corpus has {len(self.corpus.train)} rows, fewer than a batch of {config.train.batch}: every "
                "batch holds some of them twice; expect it to be learnt by heart, or give more text"
            )

        torch.manual_seed(rng.key(config.train.seed, "init"))
        self.model = self.family.network(config.model)
        place = config.init or config.teacher
        start = Start(teacher, read_model_config(Path(place)) if place else None)
        if start.source is not None:
            name = "ema" if (Path(place) / "ema.safetensors").exists() else "model"
            part, under = self.family.part(self.model, start.source)
            load_weights(
                part,
                Path(place) / f"{name}.safetensors",
                under=under,
                allow_missing=self.family.missing(start.source),
            )
        elif teacher is not None:
            part, under = self.family.part(self.model, cast("DenoiserConfig", teacher.config))
            theirs = {
                name.removeprefix(under): value
                for name, value in teacher.state_dict().items()
                if name.startswith(under)
            }
            part.load_state_dict(part.state_dict() | theirs)
        # Times are drawn on the CPU whatever the device: the sampling clock is the loop's own, and stays there.
        self.clock, held_out_clock = self.family.clocks(self.model, config)
        self.family.begin(self.model, start, config, lambda num: _spread(self.corpus.train, num))
        self.model.to(self.device)
        self.ema = Ema(self.model, config.train.ema)
        teacher = (
            teacher.to(self.device) if teacher is not None and self.family.keeps_teacher(config) else None
        )

        def objective(clock: Clock | None) -> Objective:
            return self.family.objective(config, self.model, clock, teacher, self.ema.model)

        self.objective = objective(self.clock)
        self.objective.gather = self.ranks.gather
        # What has no clock is the same for both; a student that becomes its own teacher would have two of those.
        self._held_out_objective = (
            self.objective if held_out_clock is self.clock else objective(held_out_clock)
        )
        self._networks = [n for n in (self.model, self.ema.model, teacher) if n is not None]
        if config.train.compile:
            # Student, teacher and average share one forward; each shape of a batch is compiled for each of them. The
            # default limit, 8, would leave the last of them uncompiled.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            networks = [*self._networks, *self.objective.networks()]
            for module in (module for network in networks for module in network.modules()):
                if isinstance(module, Backbone):
                    module.compile()
        self._forward = self.ranks.wrap(Forward(self.model, self.objective), self.ema.model)
        # Now: the ranks may have made the parameters anew.
        self.optimizer = Optimizer(self.model, config.optim, config.train.steps)
        self.step = 0
        self.best: tuple[float, int] | None = None
        self._held_out = math.nan
        self._unseen: list[tuple[Tensor, Tensor, Tensor]] = []
        """Of steps that the adaptive clock has not seen: times, which of the rows count, this rank's losses."""
        self._drawn: Mapping[str, Tensor] = {}
        """Of the last step."""
        self._stop = False
        self._seconds = 0.0
        """That training has taken, those before a resumption too."""

    # -- the run's life ------------------------------------------------------------------------------------

    def start(self, *, force: bool = False) -> None:
        """Make the run directory.

        Raises:
            ValueError: a run is already there, or it is the one this run learns from.
        """
        self.ranks.once(lambda: self._start(force))

    def _start(self, force: bool) -> None:
        for name in ("teacher", "init"):
            source = getattr(self.config, name)
            if source and Path(source).resolve() == self.run.path.resolve():
                raise ValueError(
                    f"{self.run.path} is this run's own {name}: choose another folder with --out"
                )
        self.run.create(dump_toml(self.config), force=force)
        self.corpus.tokenizer.save(self.run.path)
        files.write_json(self.run.path / DATA, self.corpus.meta)
        files.write_json(
            self.run.path / ORIGIN,
            {
                "commit": current_commit(),
                "torch": torch.__version__,
                "machine": self.ranks.describe(self.device),
                "dtype": str(self.dtype)[6:],
                SOURCES: sources_of(self.config.teacher or self.config.init),
            },
        )

    def resume(self) -> None:
        """Restore the newest checkpoint.

        Raises:
            ValueError: there is none, or it does not fit.
        """
        newest = self.ranks.once(self._newest)
        state, clock = self.run.load(
            newest, self.model, self.ema.model, self.optimizer.load, self.objective.load
        )
        if isinstance(self.clock, AdaptiveClock) and isinstance(clock, AdaptiveClock):
            self.clock.load_state_dict(clock.state_dict(), strict=False)
        self.step, self._unseen = int(state["step"]), []
        self.best = tuple(state["best"]) if state.get("best") else None
        self._held_out = math.nan if state.get("held_out") is None else float(state["held_out"])
        self._seconds = self.ranks.once(lambda: self._tidy(int(state["chosen"])))
        self.say(f"resumed {self.run.path} at step {self.step} of {self.config.train.steps}")

    def _newest(self) -> int:
        steps = self.run.steps()
        if not steps:
            raise ValueError(
                f"{self.run.path} has no checkpoint to resume from: start the run again with --force"
            )
        self.run.sweep()
        return steps[-1]

    def _tidy(self, chosen: int) -> float:
        # A kill may have come after the checkpoint and before what follows it.
        self._publish(chosen)
        lines = Metrics(self.run.path / "metrics.jsonl").resume_at(self.step)
        return max((float(line["seconds"]) for line in lines if "seconds" in line), default=0.0)

    def train(self, part: Part | None = None) -> TrainResult:
        """Run to the last step, or to an interruption; either way a checkpoint is saved.

        Args:
            part: of a longer job's bar, in place of a bar of its own.

        Raises:
            TrainingError: a non-finite loss, out of memory, or another rank that is gone.
            OSError: a checkpoint could not be written.
            ElsewhereError: another rank raised one of them.
        """
        cfg = self.config.train
        metrics = Metrics(self.run.path / "metrics.jsonl" if self.ranks.first else None)
        started = time.perf_counter() - self._seconds
        tokens_per_step = cfg.batch * self.config.model.length
        own = (
            Progress(cfg.steps, self.step, tokens_per_step, self.say, shown=self.ranks.first)
            if part is None
            else part.of(cfg.steps)
        )
        with _interruptible(self), self._lost_guard(), own as progress:
            waiting: _Given | None = None
            loss = norm = None
            while self.step < cfg.steps and not self.ranks.stops(self._stop):
                with self._memory_guard("training"):
                    given = _Given(self.step, *self.update(), self._drawn)
                self.step += 1
                # What a step came to is read when the next one is with the device, which then has no reason to pause.
                if waiting is not None:
                    loss, norm = self._read(waiting)
                waiting = given
                if not self.runs_ahead or self._pauses:
                    loss, norm = self._read(waiting)
                    waiting = None
                self._seconds = time.perf_counter() - started
                progress.advance(self.step, loss)
                if self._logs:
                    metrics.write(
                        step=self.step,
                        loss=loss,
                        gradient_norm=norm,
                        lr_factor=self.optimizer.scale(self.step - 1),
                        tokens=self.step * tokens_per_step,
                        seconds=round(self._seconds, 3),
                        **self.objective.report(),
                    )
                    if warning := self.objective.warning():
                        progress.say(f"step {self.step}: {warning}")
                if self._evaluates:
                    with self._memory_guard("evaluating"):
                        self._evaluate(metrics, progress.say)
                # The best weights are worth a checkpoint wherever they come.
                best = cfg.choose == "best" and self.best is not None and self.best[1] == self.step
                if best or self._saves:
                    self._save()
            if waiting is not None:
                self._read(waiting)
            if self.step < cfg.steps:
                self._save()
        finished = self.step >= cfg.steps
        if not finished:
            self.say(
                f"interrupted at step {self.step}; everything is saved. "
                f"Continue with: flowlm train --resume {self.run.path}"
            )
        chosen = self.best[0] if cfg.choose == "best" and self.best is not None else self._held_out
        return TrainResult(self.run.path, self.step, finished, chosen, time.perf_counter() - started)

    @property
    def interrupted(self) -> bool:
        """Whether an interruption was asked for, even in the last step."""
        return self._stop

    def interrupt(self) -> None:
        """Ask the loop to save and stop after the present step."""
        self._stop = True

    # -- one step ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _memory_guard(self, what: str) -> Iterator[None]:
        """Turns running out of memory into what to do about it."""
        cfg = self.config.train
        rows = len(self.ranks.rows(cfg.batch))
        size = min(cfg.micro_batch or rows, rows)
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            half = size // 2
            again = (
                f" or, to go on from it, flowlm train --resume {self.run.path}" if self.run.steps() else ""
            )
            fix = (
                f"--train.micro-batch {half} (accumulating {math.ceil(rows / half)} of them a step) gives the "
                f"same result{' but for dropout' if self.config.model.backbone.dropout else ''} in about half the "
                f"memory; add it to the command{again}"
                if half
                else "make the model or its passages smaller (--model.backbone.width, --model.length)"
            )
            raise TrainingError(
                f"out of memory at step {self.step}, {what}, with {size} passages of {self.config.model.length} tokens "
                f"in a forward pass: {fix}. {self._last_good()}"
            ) from error

    @contextlib.contextmanager
    def _lost_guard(self) -> Iterator[None]:
        """Turns another rank's end into what to do about it."""
        try:
            yield
        except RuntimeError as error:
            if self.ranks.world == 1 or not rank_lost(error):
                raise
            raise TrainingError(
                f"another of the {self.ranks.world} processes was gone after step {self.step}. {self._last_good()} Go "
                f"on with as many processes as there are: torchrun … -m flowlm.cli train --resume {self.run.path}"
            ) from error

    @property
    def runs_ahead(self) -> bool:
        """Whether a step is given to the device while it is busy with the one before."""
        return self.device.type == "cuda"

    @property
    def _is_last(self) -> bool:
        return self.step == self.config.train.steps

    @property
    def _logs(self) -> bool:
        return self._is_last or self.step % self.config.train.log_every == 0

    @property
    def _evaluates(self) -> bool:
        every = self.config.train.eval_every
        return self._is_last or (every > 0 and self.step % every == 0)

    @property
    def _saves(self) -> bool:
        return self._is_last or self.step % self.config.train.save_every == 0

    @property
    def _pauses(self) -> bool:
        """Whether something is done after this step for which all has to be finite."""
        return self._logs or self._evaluates or self._saves

    def _read(self, given: _Given) -> tuple[float, float]:
        """Loss and gradient norm of a step, when the device is done with it.

        DivergedError: they are no numbers.
        """
        self.ranks.agree()
        loss, norm, step = float(given.loss), float(given.norm), given.step
        if not (math.isfinite(loss) and math.isfinite(norm)):
            if not self.ranks.first:
                raise ElsewhereError("the loss is not finite, which the first rank says")
            path = self.run.path / f"nonfinite-step-{step:08d}.safetensors"
            save_batch(path, {"tokens": self.loader.batch(step), **given.draws})
            raise DivergedError(
                f"the loss became {loss} (gradient norm {norm}) at step {step}; the batch is in {path}. "
                f"{self._last_good()} Lower --optim.lr and --optim.muon-lr, or use --train.dtype float32."
            )
        return loss, norm

    def _last_good(self) -> str:
        steps = self.run.steps()
        return (
            f"The last good checkpoint is {self.run.checkpoint(steps[-1])}."
            if steps
            else "No checkpoint yet."
        )

    def optimize(self) -> tuple[float, float]:
        """One optimizer step over the global batch; returns its loss and gradient norm."""
        loss, norm = self.update()
        self.ranks.agree()
        return float(loss), float(norm)

    def update(self) -> tuple[Tensor, Tensor]:
        """The same on the device, which nothing has waited for, but where the adaptive clock is refitted."""
        cfg, step = self.config.train, self.step
        self.model.train()
        rows = self.ranks.rows(cfg.batch)
        size = cfg.micro_batch or len(rows)
        total = torch.zeros((), device=self.device)
        # Each rank takes the mean over its rows; the mean of these is that of the batch.
        count = len(rows) * self.config.model.length
        seen: list[Tensor] = []
        with self.ranks.opened(self._forward):
            self.objective.prepare(self.model, step)
            self._drawn = draws = self.objective.draw(cfg.batch, rng.generator(cfg.seed, "draw", step))
            for start in range(rows.start, rows.stop, size):
                stop = min(start + size, rows.stop)
                last = stop == rows.stop
                part = {name: value[start:stop] for name, value in draws.items()}
                with self.ranks.accumulating(self._forward, last):
                    losses = self._losses(
                        self.objective,
                        self._forward,
                        self.loader.batch(step, start, stop),
                        "noise",
                        step,
                        start,
                        part,
                    )
                    loss = losses.sum() / count
                    # The noise law's graph (its Gram) is shared by the micro-batches.
                    loss.backward(retain_graph=not last)
                total += loss.detach()
                seen.append(losses.detach().mean(-1))
                del losses, loss  # with what they hold of this part, before the next one's is made
        norm = self.optimizer.step(step)
        self.family.after_step(self.model)
        self.ema.update(self.model, step + 1)
        self.family.after_step(self.ema.model)
        if isinstance(self.clock, AdaptiveClock) and "t" in draws:
            on = draws["s"] == draws["t"] if "s" in draws else torch.ones(cfg.batch, dtype=torch.bool)
            self._unseen.append((draws["t"], on, torch.cat(seen)))
            if (step + 1) % self.config.clock.refit_every == 0:
                self._observe()
                self.clock.refit()
        return self.ranks.mean(total, self._stop), norm

    def _observe(self) -> None:
        """Show the adaptive clock the losses that have waited on the device since the last time."""
        if not isinstance(self.clock, AdaptiveClock) or not self._unseen:
            return
        own = torch.stack([losses for *_, losses in self._unseen]).cpu()
        per_step = torch.cat(self.ranks.gather([own]), 1)
        for (t, on, _), losses in zip(self._unseen, per_step, strict=True):
            self.clock.observe(t[on], losses[on])
        self._unseen = []

    def _losses(
        self,
        objective: Objective,
        forward: nn.Module,
        tokens: Tensor,
        stream: str,
        step: int,
        first: int,
        draws: dict[str, Tensor],
    ) -> Tensor:
        seed = self.config.train.seed
        rows = [(seed, stream, step, first + i) for i in range(len(tokens))]
        noise = objective.noise(rows, tokens.shape[1], self.device)
        torch.manual_seed(rng.key(seed, "dropout", step, first))
        with precision(self.device, self.dtype):
            losses: Tensor = forward(moved(tokens, self.device), noise, MappingProxyType(draws))
        return losses

    # -- looking at it -------------------------------------------------------------------------------------

    @torch.no_grad()
    def held_out(self) -> HeldOut:
        """Held-out loss of the averaged weights."""
        cfg = self.config.train
        rows_held = self._held_out_rows(HELD_OUT_ROWS)
        tokens = torch.from_numpy(rows_held.astype("int64"))
        model = self.ema.model
        objective = self._held_out_objective
        forward = Forward(model, objective)
        rows = []
        size = cfg.micro_batch or len(self.ranks.rows(cfg.batch))
        with self.ranks.opened(model):
            objective.prepare(model)
            draws = objective.draw(len(tokens), rng.generator(cfg.seed, "held-out"))
            for start in range(0, len(tokens), size):
                part = {name: value[start : start + size] for name, value in draws.items()}
                losses = self._losses(
                    objective, forward, tokens[start : start + size], "held-out", 0, start, part
                )
                rows.append(losses.mean(-1).float().cpu())
        loss = torch.cat(rows)
        place = objective.place(self.model, draws)
        by_bin: list[float | None] = []
        if place is not None:
            bins = (place.cpu() * TAU_BINS).long().clamp(0, TAU_BINS - 1)
            by_bin = [
                loss[bins == b].mean().item() if bool((bins == b).any()) else None for b in range(TAU_BINS)
            ]
        by_kind = {}
        if "kind" in draws:
            means = {name: loss[draws["kind"] == kind] for kind, name in enumerate(objective.kinds)}
            by_kind = {name: part.mean().item() for name, part in means.items() if len(part)}
        return HeldOut(loss.mean().item(), by_bin, by_kind)

    def _evaluate(self, metrics: Metrics, say: Callable[[str], None]) -> None:
        cfg = self.config.train
        # Every rank looks at the same passages, since all may be needed for it; what the first one finds is what is so.
        held_out = self.ranks.same(self.held_out())
        self._held_out = loss = held_out.loss
        if math.isfinite(loss) and (self.best is None or loss < self.best[0]):
            self.best = (loss, self.step)
        grid = copy.deepcopy(self.clock).to(self.device) if isinstance(self.clock, AdaptiveClock) else None
        model = FlowLM(self.ema.model, self.corpus.tokenizer, grid)
        # A flow map is for one call, whatever is shown, and may repeat itself there alone.
        numbers = dict.fromkeys((cfg.sample_steps, 1) if self.config.model.two_times else (cfg.sample_steps,))
        with self.ranks.opened(self.ema.model):
            watched = {
                k: list(model.generate_in_parts(WATCHED, k, seed=cfg.seed, dtype=cfg.dtype)) for k in numbers
            }
        texts = [text for part in watched[cfg.sample_steps] for text in part.texts][:4]
        own = {
            k: self._entropy(row for part in parts for row in part.tokens.tolist())
            for k, parts in watched.items()
        }
        data = self._entropy(self._held_out_rows(16 * WATCHED).tolist())
        calls = calls_text(self.family.calls(cfg.sample_steps, self.config.model.length))
        sample_text = f"# step {self.step}, {calls}\n" + "\n".join(texts) + "\n"
        sample_file = self.run.path / "samples" / f"step-{self.step:08d}.txt"
        self.ranks.once(lambda: files.write_data(sample_file, sample_text))
        kinds = {f"held_out_{kind}": value for kind, value in held_out.by_kind.items()}
        metrics.write(
            step=self.step,
            held_out=loss,
            held_out_by_tau=held_out.by_tau,
            sample_entropy=own[cfg.sample_steps],
            **({"one_call_entropy": own[1]} if len(own) > 1 else {}),
            data_entropy=data,
            **kinds,
        )
        by_kind = ", ".join(f"{kind} {value:.4f}" for kind, value in held_out.by_kind.items())
        say(
            f"step {self.step}: held-out loss {loss:.4f} {self.family.unit(self.config)}"
            f"{f' ({by_kind})' if by_kind else ''}; {calls}:"
        )
        for text in texts[:2]:
            say(f"  {text}")
        # At first every model repeats the commonest tokens.
        for k, entropy in own.items():
            if self.step >= cfg.steps / 2 and entropy < COLLAPSED * data:
                which = (
                    "these passages"
                    if k == cfg.sample_steps
                    else f"passages of {calls_text(self.family.calls(k, self.config.model.length))}"
                )
                say(
                    f"  {which} repeat themselves: their tokens have {entropy:.2f} nats of entropy, those of held-out "
                    f"text {data:.2f}; {self.objective.remedy()}"
                )

    def _held_out_rows(self, most: int) -> NDArray[Any]:
        """Held-out rows (n, L). They lie in the order of their source: any of them, not its beginning."""
        generator = rng.generator(self.config.train.seed, "held-out rows")
        order = torch.randperm(len(self.corpus.held_out), generator=generator)
        rows: NDArray[Any] = self.corpus.held_out[order[:most].numpy()]
        return rows

    def _entropy(self, rows: Iterable[list[int]]) -> float:
        """Mean entropy of the tokens within a passage, nats, up to its end; of framed rows of wrapped ones, in all."""
        if self.corpus.meta.get("rows") == "wrap" and self.corpus.meta.get("bos"):
            return unigram_entropy(list(rows))
        end = self.corpus.tokenizer.eos_id
        return unigram_entropy([row[: row.index(end)] if end in row else row for row in rows])

    def _save(self) -> None:
        self._observe()
        collect = self.ranks.collect
        weights, averaged = collect(self.model.state_dict()), collect(self.ema.model.state_dict())
        optimizer, objective = collect(self.optimizer.state()), self.objective.state()
        self.ranks.once(lambda: self._write(weights, averaged, optimizer, objective))

    def _write(
        self,
        weights: Mapping[str, Tensor],
        averaged: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        objective: Mapping[str, Tensor],
    ) -> None:
        cfg = self.config.train
        # The last update may have broken what its own loss did not show: such weights are not worth keeping.
        if not all(bool(value.isfinite().all()) for value in weights.values()):
            raise DivergedError(
                f"the weights are no longer finite after step {self.step}: they were not saved. "
                f"{self._last_good()} Lower --optim.lr and --optim.muon-lr."
            )
        if cfg.choose == "best" and self.best is not None and self.best[1] != self.step:
            chosen = self.best[1] if self.run.checkpoint(self.best[1]).exists() else self.step
        else:
            chosen = self.step
        state = {
            "best": list(self.best) if self.best else None,
            "held_out": self._held_out if math.isfinite(self._held_out) else None,
            "seed": cfg.seed,
            "chosen": chosen,
        }
        self.run.save(self.step, weights, averaged, optimizer, self.clock, state, objective)
        self._publish(chosen)

    def _publish(self, chosen: int) -> None:
        """Export the chosen checkpoint and drop those that the policy does not keep."""
        self.run.export(chosen, self.model)
        self.run.prune(self.config.train.keep, chosen)


#: Passages written at each evaluation, and the share of the data's entropy below which it is said that they repeat
#: themselves.
WATCHED, COLLAPSED = 16, 0.6

#: What a resume may change: where things lie, and what the result does not depend on (but for dropout).
MAY_CHANGE = ("train.micro_batch", "train.shard", "data.path", "teacher")


def open_run(
    folder: str | Path,
    *,
    changes: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
    ranks: Ranks | None = None,
) -> Trainer:
    """A trainer restored from a run directory, at its newest checkpoint.

    Args:
        folder: the run directory.
        changes: to its configuration from now on, by dotted names: "train.micro_batch" and "train.shard", and
            "data.path" and "teacher", for a text or a teacher that has moved. The text must be the same one.
        say: where plain messages go.
        ranks: as of `Trainer`; not those that the run was begun with.

    Raises:
        ValueError: no run there, no checkpoint, one that does not fit, another text, a change of anything else.
    """
    if ranks is not None and not ranks.first:
        say = _quiet
    config = read_run_config(folder)
    if other := [name for name in changes or {} if name not in MAY_CHANGE]:
        raise ValueError(
            f"{', '.join(other)} cannot change in a run that goes on, only {', '.join(MAY_CHANGE)}: to go on with "
            f"other settings start a new run from its weights, with --init {folder}"
        )
    if changes:
        config = from_dict(RunConfig, merge(to_dict(config), nested(changes)))
    if not RunDirectory(folder).steps():
        raise ValueError(f"{folder} has no checkpoint to resume from: start the run again with --force")
    for option, place in (("--data.path", config.data.path), ("--teacher", config.teacher)):
        if place and not Path(place).exists():
            raise ValueError(
                f"{folder} needs {place}, which is not there (seen from {Path.cwd()}): say with {option} where it is"
            )
    saved = Tokenizer.load(Path(folder))
    length = config.model.length
    kept = describe_data(Path(folder))
    corpus = load_corpus(config.data, length, saved, say, like=kept)
    if config.model.vocabulary not in ("", corpus.tokenizer.vocabulary_sha256):
        raise ValueError(
            f"{folder}/tokenizer.json ({corpus.tokenizer.vocab_size} tokens) is the tokenizer of another run: the "
            f"model was trained with one of {config.model.vocab_size} tokens, sha256 {config.model.vocabulary[:12]}…; "
            "put it back"
        )
    for key in ("sha256", "law_sha256", "train", "held_out"):
        if key in kept and kept[key] != corpus.meta.get(key):
            raise ValueError(
                f"the data of {folder} has changed ({key} was {kept[key]}, is {corpus.meta.get(key)})"
                f"{upgraded(kept, corpus.meta)}: put it back to resume, or start a new run from these weights with "
                f"--init {folder}"
            )
    # The weights come from the checkpoint, not from where the run once started, which may be gone.
    trainer = Trainer(dataclasses.replace(config, init=""), folder, say=say, corpus=corpus, ranks=ranks)
    trainer.resume()
    if changes:
        trainer.ranks.once(lambda: files.write_data(Path(folder) / "config.toml", dump_toml(config)))
    return trainer


def _quiet(message: str) -> None:
    """Where messages go that the first rank has said."""


@contextlib.contextmanager
def _interruptible(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C and a polite kill end the loop after the present step; a second Ctrl-C ends it at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        if trainer._stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        trainer.interrupt()

    old: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, handle)
    except ValueError:
        pass  # not in the main thread: the caller keeps its own handlers
    try:
        yield
    finally:
        for restored, previous in old.items():
            signal.signal(restored, previous)
