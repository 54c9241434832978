"""The flow on three tokens, with the exact denoiser: noise in the plane runs to the corners of a triangle.

With passages of one token from three, x_t = (1-t) z + t·onehot, and Bayes' rule gives the denoiser at once:

    D_t(x)_k = p(k | x_t = x) ∝ p_k exp(t x_k / (1-t)²)

Nothing is trained. The package's sampler walks the flow x ← (1-h) x + h D, h = (t'-t)/(1-t), and the shares of
the corners come out as p. With too few steps they do not: one Euler step sends every start to the likeliest token.

    python examples/flow_on_three_tokens.py [FOLDER]      FOLDER: where flow.png goes
"""

from __future__ import annotations

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


class ExactDenoiser:
    config, embedding = SimpleNamespace(two_times=False), torch.eye(3)
    clock = flowlm.clock.DecodingErrorClock(3)

    def noise_law(self) -> flowlm.path.DenseNoise:
        return flowlm.path.DenseNoise(self.embedding)

    def __call__(self, x: torch.Tensor, t: float) -> Posterior:
        logits = LAW.log() + t * x / (1 - t) ** 2
        return Posterior(logits, head=lambda hidden: hidden, embedding=self.embedding)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    for steps in (1, 2, 4, 16, 128):
        walk: list[torch.Tensor] = []
        tokens = flowlm.sample(ExactDenoiser(), 4000, 1, steps, seed=0, callback=lambda s: walk.append(s.y)).tokens
        shares = torch.bincount(tokens.flatten(), minlength=3) / len(tokens)
        print(f"{steps:4} steps: shares {shares.numpy().round(3)}, law {LAW.numpy()}")
    points = torch.stack(walk)[:, :150, 0] @ torch.tensor([[-1, -math.sqrt(1 / 3)], [1, -math.sqrt(1 / 3)], [0, 2 / math.sqrt(3)]])
    fig, axis = plt.subplots(figsize=(5, 5))
    for i in range(points.shape[1]):
        axis.plot(*points[:, i].T, color=f"C{int(tokens[i])}", lw=0.6)
    axis.set(title="150 paths of the flow, coloured by the token they end at", aspect="equal")
    fig.savefig(folder / "flow.png", dpi=120, bbox_inches="tight")
    print(f"written to {folder / 'flow.png'}")


if __name__ == "__main__":
    main()
