"""The clock: at which flow time is how much of a text decided?

Flow time t runs from noise (0) to data (1). With a vocabulary of V tokens almost nothing is decided until t is
large, and then everything at once. Clock time τ counts decided tokens instead: equal steps of τ are equal
shares of the tokens. This prints t at a few τ for several V and draws the curves.

    python examples/clock.py [FOLDER]      FOLDER: where clock.png goes; a temporary folder when left out
"""

import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from flowlm.clock import DecodingErrorClock

TAUS = (0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99)

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
folder.mkdir(parents=True, exist_ok=True)
tau = torch.tensor(TAUS, dtype=torch.float64)
t = torch.linspace(0, 1, 400, dtype=torch.float64)

print("flow time t at clock time τ\n")
print("      V  " + "  ".join(f"τ={x:.2f}" for x in TAUS))
fig, axis = plt.subplots(figsize=(6, 4))
for vocab_size in (2, 27, 512, 8192, 50258):
    clock = DecodingErrorClock(vocab_size)
    print(f"{vocab_size:7,}  " + "  ".join(f"{x:6.3f}" for x in clock.time(tau).tolist()))
    axis.plot(t, clock.tau(t), label=f"V = {vocab_size:,}")
axis.set(xlabel="flow time t", ylabel="clock time τ: share of tokens decided", xlim=(0, 1), ylim=(0, 1))
axis.legend()
fig.savefig(folder / "clock.png", dpi=120, bbox_inches="tight")
print(f"\nwritten to {folder / 'clock.png'}")
