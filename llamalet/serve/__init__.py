"""The HTTP server: OpenAI's API for one model, and a page. `llamalet serve` and `python -m llamalet.serve` start it.

Everything on the wire is untrusted: sizes are bounded before anything is read, and no request opens a file. Only
app.py, connection.py, server.py and insight.py import what `pip install 'llamalet[serve]'` brings.

command.py         the command line -> a socket that listens
options.py         its options
server.py          the server's life: it listens, loads the model, answers, and ends after the texts in progress
connection.py      uvicorn's connection, with deadlines
guard.py           who may ask: Host, Origin, key, sizes
exchange.py        one HTTP request and its answer
app.py             the routes
worker.py          the engine's thread (llamalet/engine.py), and the bridge from asyncio to it
metrics.py         what is counted, for Prometheus
api_error.py       an error that a client gets, as OpenAI's JSON
json_body.py       the body of a request as JSON, read strictly, and its fields, checked one by one
served_model.py    the model, its names, its limits and its chat template
prompts.py         prompts and conversations -> checked token ids
schema.py          the body of a request -> what is asked for: requests for the engine
token_json.py      tokens and their logprobs as OpenAI's JSON
answers.py         the engine's events -> whole answers and chunks of streams
text_routes.py     tokenize, detokenize, what the model and its tokenizer are
insight.py         what only the page asks for: its files, and looks inside the model
daemon_threads.py  threads for what would hold up the event loop
page/              the page: HTML, CSS and JavaScript, nothing from another host
"""
