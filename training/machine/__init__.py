"""What a run runs on: processes, devices, threads, and kernels for the CPU.

May import torch (but for group), model, llamalet, training.config and training.run. The number of processes must not
change the stream of tokens.
"""
