"""A stand-in for a server of OpenAI's API, which answers with made-up words. Of its options only --port counts.

It knows no more of a request than `max_tokens`, `stream` and the number of the prompt's ids, of which it says that
half were cached. It reads a millisecond for each of over 100 ids, and writes as long for each of over 20 tokens. A
prompt that begins with 13 gets an error, one with 14 an error in mid-stream, and one with 15 no answer. A stream of an
odd number of tokens closes its connection, and every other such stream says so. Every request is also written to the
file named by BODIES, if that is set.
"""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.whole(200, {"status": "ok"} if self.path == "/health" else {"data": [{"id": "made-up"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "BODIES" in os.environ:
            with open(os.environ["BODIES"], "a") as file:
                file.write(json.dumps(body) + "\n")
        prompt, n = body["prompt"], body["max_tokens"]
        usage = {
            "completion_tokens": n,
            "prompt_tokens": len(prompt),
            "prompt_tokens_details": {"cached_tokens": len(prompt) // 2},
        }
        if prompt[0] == 13:
            self.whole(400, {"error": {"message": "unlucky"}})
        elif prompt[0] == 15:
            self.close_connection = True
        elif not body["stream"]:
            self.whole(200, {"choices": [{"text": " word" * n}], "usage": usage})
        else:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.close_connection = n % 2 == 1
            if n % 4 == 1:
                self.send_header("Connection", "close")
            self.end_headers()
            time.sleep(0.001 * max(0, len(prompt) - 100))
            for number in range(n):
                time.sleep(0.001 if number >= 20 else 0)
                self.event({"choices": [{"text": " word"}]})
            if prompt[0] == 14:
                self.event({"error": {"message": "broken"}})
            self.event({"choices": [{"text": "", "finish_reason": "length"}]})
            self.event({"choices": [], "usage": usage})
            self.chunk(b"data: [DONE]\n\n")
            self.chunk(b"")

    def whole(self, status: int, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def event(self, value: object) -> None:
        self.chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")


class Server(ThreadingHTTPServer):
    request_queue_size = 128


if __name__ == "__main__":
    Server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
