"""What a run leaves behind and survives: its folder, checkpoints, metrics, plots and signals.

May import llamalet and training.config, but not torch. No kill, full disk or signal may cost a saved checkpoint.
"""
