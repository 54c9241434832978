"""The flow on three tokens, with the exact denoiser: noise in the plane runs to the corners of a triangle.

For passages of one token, x_t = (1-t) z + t·onehot, and Bayes' rule gives the denoiser at once:

    D_t(x)_k = p(k | x_t = x) ∝ p_k exp(t x_k / (1-t)²)

Nothing is trained. The sampler walks x ← (1-h) x + h D, h = (t'-t)/(1-t), and the shares of the corners come out
as p. With one step they do not: every start is sent to the likeliest token.

    python examples/flow_on_three_tokens.py [FOLDER]      FOLDER: where flow.png goes
"""

import math
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import flowlm
from flowlm.posterior import Posterior

LAW = torch.tensor([0.5, 0.3, 0.2])
CORNERS = torch.tensor([[-1.0, -1 / math.sqrt(3)], [1.0, -1 / math.sqrt(3)], [0.0, 2 / math.sqrt(3)]])


class ExactDenoiser:
    config, embedding = SimpleNamespace(two_times=False), torch.eye(3)
    clock = flowlm.clock.DecodingErrorClock(3)

    def noise_law(self) -> flowlm.path.DenseNoise:
        return flowlm.path.DenseNoise(self.embedding)

    def __call__(self, x: torch.Tensor, t: float) -> Posterior:
        return Posterior(LAW.log() + t * x / (1 - t) ** 2, lambda hidden: hidden, self.embedding)


folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
folder.mkdir(parents=True, exist_ok=True)
for steps in (1, 2, 4, 16, 128):
    tokens = flowlm.sample(ExactDenoiser(), 4000, 1, steps, seed=0).tokens
    shares = torch.bincount(tokens.flatten(), minlength=3) / len(tokens)
    print(f"{steps:4} steps: shares {shares.numpy().round(3)}, law {LAW.numpy()}")

walk: list[torch.Tensor] = []
ends = flowlm.sample(ExactDenoiser(), 150, 1, 128, seed=0, callback=lambda step: walk.append(step.y)).tokens
paths = torch.stack(walk)[:, :, 0] @ CORNERS
fig, axis = plt.subplots(figsize=(5, 5))
for i, end in enumerate(ends.flatten().tolist()):
    axis.plot(*paths[:, i].T, color=f"C{end}", lw=0.6)
axis.scatter(*CORNERS.T, c=["C0", "C1", "C2"], s=60, zorder=3)
axis.set(title="Paths of the flow, by the token they end at", aspect="equal", xticks=[], yticks=[])
fig.savefig(folder / "flow.png", dpi=120, bbox_inches="tight")
print(f"written to {folder / 'flow.png'}")
