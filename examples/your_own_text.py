"""Your own text in ten lines: an FLM learns it, an FMLM learns to write it in one network call.

    python examples/your_own_text.py my.txt runs/mine [STEPS]

The text has a passage a line. STEPS, 1500 unless given, are those of the FLM, half as many those of its student; the
time left is shown. Both runs, and what they have learned, are then in the second folder.
"""

import sys

import flowlm

text, out = sys.argv[1], sys.argv[2]
steps = int(sys.argv[3]) if len(sys.argv) > 3 else 1500

flowlm.train("text", f"{out}/flm", {"data.path": text, "train.steps": steps})
model = flowlm.distill(f"{out}/flm", f"{out}/fmlm", options={"train.steps": steps // 2})
for passage in model.generate(5, steps=1):
    print(passage)
