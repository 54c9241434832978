"""FMLM: distillation of a flow into its flow map (arXiv 2602.16813, the FMLM objective).

    E Σ_l KL(sg target_{s,t} || δ_{s,t}(y_s)) + E Σ_l KL(D_t^teacher || δ_{t,t}(y_t))

The rows of a batch are split: some on the diagonal s = t, whose target is the frozen teacher or the data; of the rest
a share at the boundary (s, t) = (0, 1), and the others at random pairs.
Each target is a function of the networks, the state and the times; splitting and reducing are written once.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowlm import rng
from flowlm.clock import Clock
from flowlm.denoiser import Denoiser
from flowlm.device import moved, wide
from flowlm.families import Objective
from flowlm.objectives.derivative import METHODS, Network
from flowlm.objectives.draws import stochastic_round, stratified
from flowlm.objectives.identities import (
    Watched,
    cfm_drift,
    cfm_target,
    esd_logit_target,
    esd_target,
    lsd_logit_target,
    lsd_target,
)
from flowlm.objectives.weighting import InverseWeights
from flowlm.path import (
    CoupledDenseNoise,
    CoupledLowRankNoise,
    DenseNoise,
    IsotropicNoise,
    LowRankNoise,
    corrupt,
    coupled_noise_law,
    step,
)
from flowlm.posterior import Mixture, OneHot, Posterior, Stacked, Target

#: What a flow map is known by; each is a target of it.
IDENTITIES = ("psd", "lsd", "lsd-logit", "esd", "esd-logit", "cfm", "correction")

#: Those whose targets say nothing of t = 1, where the semigroup's takes their place.
NOT_AT_THE_DATA = ("lsd", "lsd-logit", "esd-logit", "cfm")

#: Reports in a row with a figure above a half, after which targets are said to be no targets.
PATIENCE = 10

#: Numbers of the kinds of rows in the draws' "kind".
DIAGONAL, BOUNDARY, INTERIOR = range(3)


def semigroup_weight(s: Tensor, u: Tensor, t: Tensor) -> Tensor:
    """λ = (1-t)(u-s)/((1-u)(t-s)), the weight of the first half-step (the semigroup identity)."""
    return (1 - t) * (u - s) / ((1 - u) * (t - s))


def psd_target(network: Network, y: Tensor, s: Tensor, u: Tensor, t: Tensor) -> Target:
    """The semigroup target δ_{s,t} = λ δ_{s,u}(y) + (1-λ) δ_{u,t}(X_{s,u}(y)), s < u < t.

    Args:
        network: two-time denoiser of the target, evaluated without gradient.
        y: state at s, (B, L, d).
        s, u, t: flow times (B,).
    """
    with torch.no_grad():
        first = network(y, s, u)
        second = network(step(y, first.embed(), s, u), u, t)
    weight = semigroup_weight(s, u, t)
    return Mixture([(weight, first), (1 - weight, second)])


def rollout_target(teacher: Denoiser, y: Tensor, clock: Clock, steps: int) -> Target:
    """X_{0,1}(y) by the teacher's own Euler rollout from noise: the posterior of its last step.

    Args:
        teacher: one-time denoiser.
        y: noise state (B, L, d) in the teacher's embedding.
        clock: in whose τ the grid is uniform.
        steps: network calls.
    """
    grid = moved(clock.time(torch.linspace(0, 1, steps + 1, dtype=torch.float64)).float(), y.device)
    with torch.no_grad():
        for s, t in itertools.pairwise(grid[:-1]):
            y = step(y, teacher(y, s).embed(), s, t)
        return teacher(y, grid[-2])


@dataclass(frozen=True)
class FlowMapConfig:
    """How a flow map is learned. The published setting: diagonal 1/2, diagonal_target "teacher", boundary 1/32,
    boundary_target "self", target "student", identity "psd", head_start 0."""

    diagonal: float = 0.5
    """Share of the rows on the diagonal s = t."""
    diagonal_target: str = "data"
    """Of the rows on the diagonal: "data" (their tokens, so that a student goes on learning the flow that its teacher
    had begun) or "teacher" (its denoiser, of a flow that is learnt to the end)."""
    boundary: float = 0.03125
    """Share of the other rows at (s, t) = (0, 1), rounded stochastically."""
    boundary_target: str = "self"
    """"self" (the semigroup target there too) or "teacher" (the teacher's own rollout from the same noise, which goes
    with diagonal_target "teacher": a student that learns its flow from the data ends elsewhere)."""
    rollout_steps: int = 8
    """Network calls of the teacher's rollout."""
    target: str = "student"
    """Network of the identity's target: "student" (as it is) or "averaged" (its EMA)."""
    identity: str = "psd"
    """What makes the target of two times: "psd" (semigroup), "lsd" (Lagrangian), "esd" (Eulerian), the last two in
    logits, "lsd-logit" and "esd-logit", "cfm" (the
    endpoint, D_t(X_{s,t}), and the squared rate of δ beside the cross-entropy: a bound on the Lagrangian residual), or
    "correction" (the map of a teacher of objective = "correction": the second of two stages)."""
    flow_first: float = 0.0
    """Share of the steps, the first ones, that have all rows on the diagonal: the flow is learned before its map, whose
    targets mean nothing until then. Without a teacher only; a student starts from its teacher's flow."""
    psd_first: float = 0.0
    """Share of the steps, the first ones, in which the semigroup makes the target, whatever `identity` is: rates are
    small and true only of a map that is nearly one."""
    pairs: str = "width"
    """How s < t are drawn, in the clock's time: "width", Δ ~ U(0, 1) and s ~ U(0, 1-Δ), or "uniform", two draws in
    order, among which long jumps are rarer."""
    middle: str = "half"
    """Where u lies between s and t, in the clock's time: "half" way, or "random", evenly."""
    loss: str = "cross-entropy"
    """To the identity's target: "cross-entropy" (the target projected to the simplex), or "squared-error" of
    probabilities, as it is."""
    weight: str = "none"
    """Of rows off the diagonal: "none", or "inverse", to the mean loss at their times."""
    denoiser: str = "student"
    """Whose D_t a Lagrangian, Eulerian or endpoint target takes: "student" (the diagonal of the network of target) or
    "teacher"."""
    derivative: str = "difference"
    """Rates of Lagrangian and Eulerian targets: "difference" (two network calls more, with any attention and compiled
    code) or "jvp" (forward-mode differentiation; slower)."""
    log_floor: float = 0.1
    """Bound of targets of logits: none gives a token more than 1/log_floor times what the network itself does, before
    all are normalised. Rates of a network that is no flow map yet ask for anything; a flow map never meets it. How much
    of a target's mass it has set is logged as "clamped"."""
    head_start: float = 0.0625
    """Share of the clock time from s to t that the state goes towards the data's mean before the network sees it.
    From noise that is the flow's own first step, D_0 being the marginals: it costs no call. Part of the student, not of
    its loss: the trainer makes it with this share."""
    freeze_embedding: bool = False
    """Keep the teacher's embedding (and a head tied to it); otherwise it is trained, and where the teacher makes a
    target the two read one x through two embeddings."""

    @property
    def asks_the_teacher(self) -> bool:
        """Whether some target is made by the teacher, which is not only where a student starts."""
        return (
            "teacher" in (self.diagonal_target, self.boundary_target, self.denoiser)
            or self.identity == "correction"
        )

    def __post_init__(self) -> None:
        for name, whole in (
            ("diagonal", "rows"),
            ("boundary", "rows"),
            ("flow_first", "the steps"),
            ("psd_first", "the steps"),
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"flow_map.{name} is a share of {whole} in [0, 1], got {getattr(self, name)}"
                )
        if not 0 <= self.head_start < 1:
            raise ValueError(
                f"flow_map.head_start is a share of the way from s to t in [0, 1), got {self.head_start}"
            )
        if self.boundary_target not in ("self", "teacher"):
            raise ValueError(f"flow_map.boundary_target = {self.boundary_target!r}: use 'self' or 'teacher'")
        if self.diagonal_target not in ("teacher", "data"):
            raise ValueError(f"flow_map.diagonal_target = {self.diagonal_target!r}: use 'teacher' or 'data'")
        if self.target not in ("student", "averaged"):
            raise ValueError(f"flow_map.target = {self.target!r}: use 'student' or 'averaged'")
        for name, choices in (
            ("identity", IDENTITIES),
            ("pairs", ("width", "uniform")),
            ("middle", ("half", "random")),
            ("loss", ("cross-entropy", "squared-error")),
            ("weight", ("none", "inverse")),
            ("denoiser", ("student", "teacher")),
            ("derivative", METHODS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"flow_map.{name} = {getattr(self, name)!r}: use {', '.join(map(repr, choices))}"
                )
        if self.loss == "squared-error" and (other := _in_probabilities(self.identity)) != self.identity:
            raise ValueError(
                f"flow_map.loss = 'squared-error' is for identities of probabilities, and identity = {self.identity!r} "
                f"is none: use identity = {other!r} or loss = 'cross-entropy'"
            )
        if self.denoiser == "teacher" and self.identity in ("psd", "correction"):
            raise ValueError(
                f"flow_map.denoiser = 'teacher' means nothing for identity = {self.identity!r}, whose target takes no "
                "D_t: use another identity, or denoiser = 'student'"
            )
        if self.identity == "correction" and self.loss != "squared-error":
            raise ValueError(
                "flow_map.identity = 'correction' has a target outside of the simplex: use loss = 'squared-error'"
            )
        if self.psd_first and self.identity == "psd":
            raise ValueError(
                f"flow_map.psd_first = {self.psd_first} means nothing for identity = 'psd': name the identity that "
                "follows it, such as 'esd-logit', or leave it 0"
            )
        if 0 < self.psd_first <= self.flow_first:
            raise ValueError(
                f"flow_map.psd_first = {self.psd_first} is over when flow_map.flow_first = {self.flow_first} is, and "
                "no step would take the semigroup: both count from the first step, so give psd_first more"
            )
        if self.psd_first and self.loss == "squared-error":
            raise ValueError(
                f"flow_map.psd_first = {self.psd_first} would take the semigroup's target in squared errors too: use "
                "loss = 'cross-entropy', or psd_first = 0"
            )
        if self.identity == "correction" and not self.freeze_embedding:
            raise ValueError(
                "flow_map.identity = 'correction' needs freeze_embedding = true: the corrected flow would read the "
                "state of another embedding"
            )
        if self.denoiser == "teacher" and not self.freeze_embedding:
            raise ValueError(
                "flow_map.denoiser = 'teacher' needs freeze_embedding = true: the teacher would read the state of "
                "another embedding"
            )
        if not 0 < self.log_floor < 1:
            raise ValueError(
                f"flow_map.log_floor must lie in (0, 1), got {self.log_floor}: a target gives a token at most "
                "1/log_floor times what the network gives it, and at 1 none could gain"
            )
        if self.rollout_steps < 1:
            raise ValueError(f"flow_map.rollout_steps must be at least 1, got {self.rollout_steps}")
        if self.target == "averaged" and self.identity == "correction":
            raise ValueError(
                "flow_map.target = 'averaged' means nothing for identity = 'correction', whose target is its "
                "teacher's: use target = 'student'"
            )
        if self.target == "averaged" and not self.freeze_embedding:
            raise ValueError(
                "flow_map.target = 'averaged' needs freeze_embedding = true: the averaged network would read "
                "the state of another embedding"
            )


def _in_probabilities(identity: str) -> str:
    """The identity of probabilities behind one that takes a cross-entropy alone."""
    return "lsd" if identity == "cfm" else identity.removesuffix("-logit")


class FlowMapObjective(Objective):
    """The FMLM objective.

    Args:
        config: shares, targets.
        clock: sampling clock; pairs are drawn and u halved in its τ.
        teacher: frozen one-time denoiser; None distils a network into itself, the data on the diagonal.
        averaged: the student's EMA as a denoiser, for target "averaged".
        steps: of the training, of which `flow_first` and `psd_first` are shares.
    """

    steady = False  # a kind of rows that is not there takes no call for its target

    def __init__(
        self,
        config: FlowMapConfig,
        clock: Clock,
        teacher: Denoiser | None = None,
        averaged: Denoiser | None = None,
        steps: int = 0,
    ):
        for name, other in (("diagonal_target", "data"), ("boundary_target", "self")):
            if teacher is None and getattr(config, name) == "teacher":
                raise ValueError(f"flow_map.{name} = 'teacher' needs a teacher: give one or use {other!r}")
        if config.identity == "correction" and (teacher is None or not teacher.config.two_times):
            raise ValueError(
                "flow_map.identity = 'correction' regresses on a corrected flow: name a run of objective = "
                "'correction' with --teacher RUN"
            )
        if teacher is None and config.denoiser == "teacher":
            raise ValueError("flow_map.denoiser = 'teacher' needs a teacher: give one or use 'student'")
        if config.target == "averaged" and averaged is None:
            raise ValueError("flow_map.target = 'averaged' needs the averaged weights: train with an EMA")
        self.config, self.clock, self.averaged = config, clock, averaged
        self.teacher = teacher if config.asks_the_teacher else None
        self._flow_until, self._semigroup_until = config.flow_first * steps, config.psd_first * steps
        self._diagonal = config.diagonal
        self.identity = config.identity
        self.kinds: tuple[str, ...] = ("diagonal", "boundary", "interior")
        self._noise: (
            DenseNoise | LowRankNoise | IsotropicNoise | CoupledDenseNoise | CoupledLowRankNoise | None
        ) = None
        self._weights = InverseWeights() if config.weight == "inverse" else None
        self._training = False
        self._watched: list[tuple[str, Tensor | float, int]] = []
        self._above: dict[str, int] = {}

    def prepare(self, model: Denoiser, step: int | None = None) -> None:
        self._watched = []
        self._training = step is not None
        if self._weights is not None:
            self._weights.step(self.gather)
        # Outside of training, the loss is that of the identity in the end.
        before = step is not None and step < self._flow_until
        self._diagonal = 1.0 if before else self.config.diagonal
        early = step is not None and step < self._semigroup_until
        self.identity = "psd" if early else self.config.identity
        if self.teacher is not None and not self.config.freeze_embedding:
            if isinstance(self._noise, CoupledLowRankNoise):
                self._noise = self._noise.again(model.embedding)  # the teacher's does not change
            else:
                self._noise = coupled_noise_law(self.teacher.embedding, model.embedding)
        elif self._noise is None or not self.config.freeze_embedding or model.embedding.requires_grad:
            # Of a frozen embedding, which teacher, student and average share, it is made once. That the average's asks
            # for no gradient does not say that it stays.
            self._noise = model.noise_law()

    @property
    def noise_width(self) -> int:
        assert self._noise is not None
        return self._noise.width

    def draw(self, num: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Row kinds and the pair (s, u, t) of each row of the step prepared for; on the diagonal s = u = t."""
        cfg = self.config
        n_diagonal = stochastic_round(self._diagonal * num, generator)
        n_boundary = stochastic_round(cfg.boundary * (num - n_diagonal), generator)
        n_interior = num - n_diagonal - n_boundary
        kind = torch.cat(
            [
                torch.full((n,), kind)
                for n, kind in ((n_diagonal, DIAGONAL), (n_boundary, BOUNDARY), (n_interior, INTERIOR))
            ]
        )
        on = stratified(n_diagonal, generator)
        width = stratified(n_interior, generator)
        if cfg.pairs == "uniform":
            width = 1 - (1 - width).sqrt()  # |a - b| of two draws
        # A width below 1e-4 of the clock would divide rounding by rounding.
        width = width.clamp_min(1e-4)
        start = stratified(n_interior, generator) * (1 - width)
        zero, one = torch.zeros(n_boundary, dtype=torch.float64), torch.ones(n_boundary, dtype=torch.float64)
        tau_s = torch.cat([on, zero, start])
        tau_t = torch.cat([on, one, start + width])
        share = torch.full_like(tau_s, 0.5)
        if cfg.middle == "random":
            # Inside: at the ends a half-step has no length.
            share = stratified(num, generator).clamp(1e-2, 1 - 1e-2)
        order = torch.randperm(num, generator=generator)
        # Float64 keeps s < u < t apart where the clock is nearly flat.
        tau_u = tau_s + share * (tau_t - tau_s)
        s, u, t = (self.clock.time(tau[order]) for tau in (tau_s, tau_u, tau_t))
        return {"kind": kind[order], "s": s, "u": u, "t": t}

    def noise(self, rows: Sequence[tuple[int | str, ...]], length: int, device: torch.device) -> Tensor:
        return rng.normal_rows(rows, (length, self.noise_width), device)

    def place(self, model: Denoiser, draws: dict[str, Tensor]) -> Tensor:
        return model.clock.tau(moved(draws["s"], model.embedding.device))

    def losses(self, model: Denoiser, tokens: Tensor, xi: Tensor, draws: dict[str, Tensor]) -> Tensor:
        with contextlib.ExitStack() as stack:
            for network in (model, self.averaged, self.teacher):
                # A teacher may be a flow known in closed form.
                if network is not None and hasattr(network, "frozen_embedding"):
                    stack.enter_context(network.frozen_embedding())
            losses = self._losses(model, tokens, xi, draws)
        if self._weights is not None and self._training:
            # Those on the diagonal have another loss, whose size says nothing of these.
            off = draws["s"] < draws["t"]
            tau = self.clock.tau(draws["s"]), self.clock.tau(draws["t"])
            rows = off.nonzero().flatten()  # of the CPU: to pick by a mask would wait for the device
            self._weights.observe(tau[0][rows], tau[1][rows], losses.mean(-1)[moved(rows, losses.device)])
            weights = torch.where(off, self._weights.of(*tau), 1.0)
            losses = losses * moved(weights, losses.device)[:, None]
        return losses

    def _losses(self, model: Denoiser, tokens: Tensor, xi: Tensor, draws: dict[str, Tensor]) -> Tensor:
        assert self._noise is not None
        cfg, device = self.config, tokens.device
        # Kinds are sorted on the CPU, so that the split costs no synchronisation.
        order = torch.argsort(draws["kind"], stable=True)
        counts = torch.bincount(draws["kind"], minlength=3).tolist()
        at = moved(order, device)
        back = torch.argsort(at)
        tokens, xi = tokens[at], xi[at]
        s, u, t = (moved(draws[name][order], device, wide(device)) for name in ("s", "u", "t"))
        s32, t32 = s.float(), t.float()

        noise = self._noise(xi)
        y0, teacher_y0 = (noise[1], noise[0]) if isinstance(noise, tuple) else (noise, noise)
        y = corrupt(tokens, s32, model.embedding, y0)
        posterior = model(y, s32, t32)

        n_diagonal, n_boundary, _ = counts
        # With the teacher's rollout at the boundary, the identity's target covers the interior alone.
        first = n_diagonal + (n_boundary if cfg.boundary_target == "teacher" else 0)
        diagonal, boundary = slice(0, n_diagonal), slice(n_diagonal, first)
        known: list[tuple[int, Target]] = []
        length = tokens.shape[1]
        with torch.no_grad():
            if n_diagonal:
                target = self._diagonal_target(model, tokens[diagonal], teacher_y0[diagonal], s32[diagonal])
                known.append((n_diagonal * length, target))
            if first > n_diagonal:
                assert self.teacher is not None
                target = rollout_target(self.teacher, teacher_y0[boundary], self.clock, cfg.rollout_steps)
                known.append(((first - n_diagonal) * length, target))
        # At t = 1 a Lagrangian target is D_1 of what the network itself thinks, which any answer satisfies that is sure
        # of itself, and the Eulerian one of logits is 0/0.
        halves = n_diagonal + n_boundary if self.identity in NOT_AT_THE_DATA else first
        pairs: list[tuple[int, Target]] = []
        for rows, identity in (
            (slice(first, halves), "psd"),
            (slice(max(first, halves), len(tokens)), self.identity),
        ):
            if rows.start < rows.stop:
                # Times stay float64 so that the weights do not round.
                place = (y[rows].detach(), s[rows], u[rows], t[rows])
                target = self._pair_target(identity, model, *place)
                pairs.append(((rows.stop - rows.start) * length, target))
        if cfg.loss == "squared-error" and pairs:
            losses = [posterior[:first].cross_entropy(Stacked(known))] if known else []
            loss = torch.cat([*losses, posterior[first:].squared_error(Stacked(pairs))])
        else:
            loss = posterior.cross_entropy(Stacked(known + pairs))
        if self.identity == "cfm" and first < len(tokens):
            loss = loss + self._drift(model, y, s, t, slice(first, len(tokens)))
        # Now, for the backward pass makes some of them again.
        self._watched += [
            (part.name, part.total, part.count) for _, part in pairs if isinstance(part, Watched)
        ]
        return loss[back]

    def _pair_target(
        self, identity: str, model: Denoiser, y: Tensor, s: Tensor, u: Tensor, t: Tensor
    ) -> Target:
        """The target of an identity at the states y and the pairs (s, t), with u between them."""
        cfg = self.config
        network = self.averaged if cfg.target == "averaged" else model
        assert network is not None
        training = network.training
        network.eval()

        def diagonal(y: Tensor, t: Tensor) -> Posterior:
            return network(y, t, t)

        denoiser = diagonal if cfg.denoiser == "student" else self.teacher
        assert denoiser is not None
        project = cfg.loss == "cross-entropy"
        target: Target
        if identity == "psd":
            target = psd_target(network, y, s, u, t)
        elif identity == "lsd":
            target = lsd_target(network, denoiser, y, s, t, cfg.derivative, project)
        elif identity == "lsd-logit":
            target = lsd_logit_target(network, denoiser, y, s, t, cfg.derivative, cfg.log_floor)
        elif identity == "esd":
            target = esd_target(network, denoiser, y, s, t, cfg.derivative, project)
        elif identity == "esd-logit":
            target = esd_logit_target(network, denoiser, y, s, t, cfg.derivative, cfg.log_floor)
        elif identity == "cfm":
            target = cfm_target(network, denoiser, y, s, t)
        else:
            assert self.teacher is not None
            with torch.no_grad():
                target = self.teacher(y, s, t)
        network.train(training)
        return target

    def _drift(self, model: Denoiser, y: Tensor, s: Tensor, t: Tensor, rows: slice) -> Tensor:
        """What is added to the cross-entropy of some rows for the rate of δ, and 0 of the others."""
        training = model.training
        model.eval()  # a difference of two dropouts is none of two times
        drift = cfm_drift(model, y[rows], s[rows], t[rows])
        model.train(training)
        return torch.cat([drift.new_zeros(rows.start, drift.shape[1]), drift])

    def state(self) -> dict[str, Tensor]:
        return {} if self._weights is None else self._weights.state(self.gather)

    def load(self, state: dict[str, Tensor]) -> None:
        if self._weights is not None:
            self._weights.load(state)

    def report(self) -> dict[str, float]:
        """How far the last step's targets were from being one: "outside" the simplex, or "clamped"."""
        figures: dict[str, float] = {}
        watched = self.gather(
            [(name, torch.as_tensor(total).cpu(), count) for name, total, count in self._watched]
        )
        for name in dict.fromkeys(name for name, *_ in watched):
            parts = [(total, count) for other, total, count in watched if other == name]
            figures[name] = float(sum(total for total, _ in parts)) / sum(count for _, count in parts)
            self._above[name] = self._above.get(name, 0) + 1 if figures[name] > 0.5 else 0
        return figures

    def warning(self) -> str:
        for name, count in self._above.items():
            if count == PATIENCE:
                what = {
                    "outside": "lies outside the simplex, with more than half of a token's mass below 0",
                    "clamped": "asks for more than its bound allows, for more than half of its mass",
                }[name]
                return (
                    f"the target of flow_map.identity = {self.identity!r} {what}, {count} times in a row: the student "
                    f"is too far from a flow map for rates to say where one is; {self.remedy()}"
                )
        return ""

    def remedy(self) -> str:
        if self.identity == "psd":
            return super().remedy()
        lower = "lower --optim.lr and --optim.muon-lr"
        cfg = self.config
        if cfg.identity == "psd" or cfg.loss == "squared-error" or max(cfg.psd_first, cfg.flow_first) >= 0.75:
            return lower  # the semigroup cannot come first, or has
        return f"let the semigroup come first with --flow-map.psd-first 0.75, or {lower}"

    def _diagonal_target(self, model: Denoiser, tokens: Tensor, y0: Tensor, t: Tensor) -> Target:
        if self.config.diagonal_target == "data":
            return OneHot(tokens, model.config.vocab_size)
        assert self.teacher is not None
        return self.teacher(corrupt(tokens, t, self.teacher.embedding, y0), t)
