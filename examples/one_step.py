"""One step: a tiny network learns to jump to the end of a flow that is known exactly.

The language has four words. Its denoiser D_t is a sum over them, so the flow needs no training: 32 Euler steps
write a word, one step only the likeliest letter at every place. The network is distilled with the FMLM objective
and does in one step what the flow does in many, from the same noise. About ten seconds on one core.
"""

import torch
from torch.nn.functional import one_hot

import flowlm
from flowlm.backbone import BackboneConfig
from flowlm.denoiser import Denoiser, DenoiserConfig
from flowlm.objectives.flow_map import FlowMapConfig
from flowlm.posterior import Posterior

WORDS = ("moon", "lake", "rain", "wind")
LETTERS = sorted(set("".join(WORDS)))
V, L, STEPS, BATCH, RATE = len(LETTERS), 4, 250, 128, 6e-3
DATA = torch.tensor([[LETTERS.index(letter) for letter in word] for word in WORDS])

torch.manual_seed(0)
shape = BackboneConfig(width=32, depth=2, heads=2, conditioning=32)
student = Denoiser(DenoiserConfig(vocab_size=V, length=L, two_times=True, backbone=shape))
student.embedding = torch.nn.Parameter(torch.eye(V, 32), requires_grad=False)  # so that y is x itself


class Flow:
    """p(word | x_t = x) ∝ exp(Σ_l t x[l, word_l] / (1-t)²); D_t is its share for every letter and place."""

    config, clock = DenoiserConfig(vocab_size=V, length=L), student.clock
    embedding, noise_law = student.embedding, student.noise_law

    def __call__(self, y: torch.Tensor, t: torch.Tensor | float) -> Posterior:
        t, words = flowlm.path.times_like(t, y), one_hot(DATA, V).float()
        scores = torch.einsum("blv,wlv->bw", t / (1 - t) ** 2 * y[..., :V], words)
        probs = torch.einsum("bw,wlv->blv", scores.softmax(-1), words)
        return Posterior(probs.clamp_min(1e-30).log(), lambda hidden: hidden, self.embedding)


asked = {"diagonal_target": "teacher", "boundary_target": "teacher", "freeze_embedding": True}
config = FlowMapConfig(boundary=0.25, **asked)
objective = flowlm.objectives.FlowMapObjective(config, student.clock, teacher=Flow())
objective.prepare(student)
times = objective.draw(STEPS * BATCH, torch.Generator().manual_seed(0))
adam = torch.optim.Adam([p for p in student.parameters() if p.requires_grad])
for i in range(STEPS):
    adam.param_groups[0]["lr"] = RATE * min((i + 1) / 20, 1 - i / STEPS)
    tokens, xi = DATA[torch.randint(4, (BATCH,))], torch.randn(BATCH, L, objective.noise_width)
    draws = {name: value[i * BATCH : (i + 1) * BATCH] for name, value in times.items()}
    objective.losses(student, tokens, xi, draws).mean().backward()
    adam.step()
    adam.zero_grad()

for model, steps in [*((Flow(), k) for k in (1, 4, 32)), *((student, k) for k in (1, 2, 4))]:
    rows = flowlm.sample(model, 1000, L, steps, seed=1).tokens.tolist()
    texts = ["".join(LETTERS[i] for i in row) for row in rows]
    name, share = "map " if model is student else "flow", sum(text in WORDS for text in texts) / 10
    print(f"{name} {steps:2} steps: {share:5.1f} % words   {' '.join(texts[:9])}")
