"""One implementation against another: PyTorch (without it, plain numpy) and the runtime on one file.

May import training, model and llamalet. A proof must be able to fail: its bounds are stated, not fitted.
"""
