"""The training loop and the parts of a step: batches, schedule, optimizer, guard, evaluation.

May import corpus, model and llamalet; config, batches, data, schedule, resume_check, samples and run/ must not import
torch. Seed and step decide every number: a resumed run must equal an uninterrupted one, bit for bit.
"""
