"""What flow language models are measured against: autoregressive and discrete-diffusion models on the same network.

Each family is one file: its corruption, its loss, its sampler, with their equations. Times run as in the papers on
them, from 0, clean, to 1, noise.
"""
