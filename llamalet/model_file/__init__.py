"""The raw binary: its header, its tensors, and their quantized forms. Every byte of a .bin is decided here.

May import llamalet's config, errors and files. Nothing here may change what an existing file means: a change of layout
is a new version, with a reader, a golden file and a line in docs/formats.md.
"""
