"""llamalet: run small Llama models from a raw binary, in Python, without PyTorch."""
