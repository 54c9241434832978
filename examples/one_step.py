"""The flow map in one step: a tiny network learns to jump to the end of a flow that is known exactly.

The language has eight words of four letters. Its denoiser D_t is a sum over the eight words, so the flow needs no
training: many Euler steps write a word, one step writes the likeliest letter at every place. The network is
distilled from it with the FMLM objective: D_t on the diagonal, the semigroup identity between, the flow's own
rollout at the boundary. About fifteen seconds on one core.

    python examples/one_step.py
"""

from __future__ import annotations

import torch

import flowlm
from flowlm.backbone import BackboneConfig
from flowlm.denoiser import Denoiser, DenoiserConfig
from flowlm.objectives import FlowMapObjective
from flowlm.objectives.flow_map import FlowMapConfig
from flowlm.posterior import Posterior

WORDS = "moon lake rain wind snow star leaf rose".split()
LETTERS = sorted(set("".join(WORDS)))
DATA = torch.tensor([[LETTERS.index(letter) for letter in word] for word in WORDS])
STEPS, BATCH = 500, 128


class ExactDenoiser:
    """D_t by enumeration: p(word | x_t = x) ∝ exp(Σ_l t x[l, word_l] / (1-t)²), then summed letter by letter."""

    def __init__(self, like: Denoiser):
        self.config, self.embedding, self.clock = DenoiserConfig(len(LETTERS), 4), like.embedding, like.clock
        self.noise_law, self.onehot = like.noise_law, torch.nn.functional.one_hot(DATA, len(LETTERS)).float()

    def __call__(self, y: torch.Tensor, t: torch.Tensor | float) -> Posterior:
        t = flowlm.path.times_like(t, y)
        scores = torch.einsum("blv,wlv->bw", t / (1 - t) ** 2 * y[..., : len(LETTERS)], self.onehot)
        probs = torch.einsum("bw,wlv->blv", scores.softmax(-1), self.onehot)
        return Posterior(probs.clamp_min(1e-30).log(), lambda hidden: hidden, self.embedding)


def report(name: str, model: Denoiser, steps: int) -> None:
    tokens = flowlm.sample(model, 1000, 4, steps, seed=1).tokens
    words = ["".join(LETTERS[i] for i in row) for row in tokens.tolist()]
    print(f"{name:9} {steps:3} steps: {sum(w in WORDS for w in words) / 10:5.1f} % words   {' '.join(words[:8])}")


def main() -> None:
    torch.manual_seed(0)
    shape = BackboneConfig(width=32, depth=2, heads=2, conditioning=32, max_length=4)
    student = Denoiser(DenoiserConfig(len(LETTERS), 4, two_times=True, backbone=shape))
    student.embedding = torch.nn.Parameter(torch.eye(len(LETTERS), 32), requires_grad=False)  # y is x itself
    flow = ExactDenoiser(student)
    for steps in (1, 4, 32):
        report("the flow", flow, steps)

    config = FlowMapConfig(boundary=0.25, boundary_target="teacher")
    objective = FlowMapObjective(config, student.clock, teacher=flow)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], 4e-3)
    generator = torch.Generator().manual_seed(0)
    objective.prepare(student)
    draws = objective.draw(STEPS * BATCH, generator)
    for i in range(STEPS):
        optimizer.param_groups[0]["lr"] = 4e-3 * min((i + 1) / 20, 1 - i / STEPS)
        tokens = DATA[torch.randint(len(WORDS), (BATCH,), generator=generator)]
        xi = torch.randn(BATCH, 4, objective.noise_width, generator=generator)
        rows = {name: value[i * BATCH : (i + 1) * BATCH] for name, value in draws.items()}
        objective.losses(student, tokens, xi, rows)["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for steps in (1, 2, 4):
        report("the map", student.eval(), steps)


if __name__ == "__main__":
    main()
