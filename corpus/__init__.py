"""From text to token shards: sources, documents, vocabularies, and stories of known entropy.

Start with prepare.py. Imports llamalet but never torch. The same input must give the same bytes with any number of
workers.
"""
