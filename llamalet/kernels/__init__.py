"""The fast forward pass: machine code for the functions of llamalet/reference.py, and the threads that run it.

May import the rest of the runtime except what uses it: Model, generate, chat. A change here must leave every logit as
it is, bit for bit, on every instruction path.
"""
