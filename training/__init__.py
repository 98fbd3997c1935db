"""The training loop and the parts of a step: batches, schedule, optimizer, guard, evaluation.

May import corpus, model and llamalet; only evaluation, optimizer, device_guard, step_torch, weights and machine/
may import torch. Seed and step decide every number: a resumed run must equal an uninterrupted one, bit for bit.
"""
