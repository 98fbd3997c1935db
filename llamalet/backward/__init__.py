"""The training step without PyTorch: a model's loss, and its gradient for every weight.

Imports the config, the reference and the kernels; never files, the engine or training/. A change here must not touch
what the runtime computes.
"""
