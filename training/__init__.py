"""The training loop and what a step is made of: batches, schedule, optimizer, guard, evaluation.

May import corpus, model and llamalet. Seed and step decide every number: a resumed run must equal an unbroken one, bit
for bit.
"""
