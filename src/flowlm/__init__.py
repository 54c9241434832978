"""flowlm: flow language models and their flow maps, which write a whole passage in one forward pass."""

from flowlm import clock, objectives, path
from flowlm.model import FlowLM
from flowlm.runs import distill, train
from flowlm.samplers import sample

__version__ = "0.1.0"
__all__ = ["FlowLM", "__version__", "clock", "distill", "objectives", "path", "sample", "train"]
