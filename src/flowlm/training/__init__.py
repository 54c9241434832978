"""Training: one loop, averaged weights, checkpoints that survive anything."""
