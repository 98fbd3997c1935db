"""Text in, token shards out: sources, documents, vocabularies, and the grammar whose entropy is known.

May import llamalet, and needs no torch. The same input must give the same bytes, whatever the number of workers.
"""
