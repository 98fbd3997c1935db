"""What a run runs on: processes, devices, threads, and the CPU's own kernels.

May import torch, model and llamalet. The number of processes must not change the stream of tokens.
"""
