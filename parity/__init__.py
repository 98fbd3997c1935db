"""One implementation against another: PyTorch and the runtime on the same file.

May import training, model and llamalet. A proof must be able to fail: its bounds are stated, not fitted.
"""
