"""What a run leaves and survives: its folder, checkpoints, metrics, pictures and signals.

May import llamalet and training.config, and needs no torch. No kill, full disk or signal may cost a saved checkpoint.
"""
