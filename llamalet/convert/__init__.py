"""Models of other programs: read under this project's names, and written as those programs expect them.

May import model_file, tokenizer and chat_template. Only pytorch_file needs torch, and imports it when it is called. A
change here must leave the bytes of every exported file as they are.
"""
