"""The HTTP server: OpenAI's API for one model.

api_error.py     an error that a client gets, as OpenAI's JSON
json_body.py     the body of a request as JSON, read strictly, and its fields, checked one by one
served_model.py  the model, its names, its limits and its chat template
prompts.py       prompts and conversations -> checked token ids
schema.py        the body of a request -> what is asked for: requests for the engine (llamalet/engine.py)
token_json.py    tokens and their logprobs as OpenAI's JSON
answers.py       the engine's events -> whole answers and chunks of streams
text_routes.py   tokenize, detokenize, what the model and its tokenizer are
"""
