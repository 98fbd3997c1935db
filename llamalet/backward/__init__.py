"""The training step without PyTorch: a model's loss, and its gradient for every weight.

Imports the config, the reference, the kernels and the table of a model file's tensors; never the engine or training/. A
change here must not touch what the runtime computes.
"""
