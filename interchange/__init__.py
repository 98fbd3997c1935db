"""Models of other programs: theirs read under our names, and ours written as they expect it.

Arrows: scripts -> training/ -> interchange/ -> llamalet/. Only PyTorch's own files need torch here.
"""
