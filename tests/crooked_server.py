"""An OpenAI-compatible server that misbehaves as the model's name says: `python crooked_server.py LOG`.

It prints its port, and writes a line to LOG for each request: the time, and its model, prompt and seed. `flaky`
models answer every question in the end.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LOG = Path(sys.argv[1])
LOCK = threading.Lock()
SEEN: Counter[str] = Counter()


def answer(text: str) -> bytes:
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return json.dumps(body).encode()


def with_message(message: str) -> bytes:
    return b'{"choices": [{"index": 0, "finish_reason": "stop", "message": %s}]}' % message.encode()


# Answers that are none, whole and with status 200.
ODD = {
    "list": with_message('{"role": "assistant", "content": ["a", "b"]}'),
    "number": with_message('{"role": "assistant", "content": 7}'),
    "reasoning": with_message('{"role": "assistant", "content": "7", "reasoning_content": {"a": 1}}'),
    "no-message": b'{"choices": [{"index": 0}]}',
    "message-text": with_message('"hello"'),
    "choices-object": b'{"choices": {"0": 1}}',
    "choices-text": b'{"choices": "none"}',
    "array": b"[1, 2]",
    "null": b"null",
    "latin": with_message('{"role": "assistant", "content": "\u00e9"}').decode().encode("latin-1"),
    "deep": b"[" * 200_000,
    "binary": bytes(range(256)),
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["messages"][0]["content"]
        key = json.dumps([request["model"], prompt, request.get("seed")])
        with LOCK:
            SEEN[key] += 1
            attempt, total = SEEN[key], sum(SEEN.values())
            with LOG.open("a") as log:
                log.write(f"{time.monotonic()} {key}\n")
        self.misbehave(request["model"], attempt, total, f"{self.headers['Authorization']} for {self.path}")

    def misbehave(self, model: str, attempt: int, total: int, asked: str) -> None:
        good = answer("<answer>7</answer>")
        if model == "flaky" and attempt < 4:
            faults = [
                (429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0"}),
                (500, b'{"error": {"message": "oops"}}', {}),
                (200, b"<html>not json</html>", {}),
                (200, b"{}", {}),
                (200, b"", {}),
            ]
            self.reply(*faults[(total + attempt) % len(faults)])
        elif model == "always429":
            self.reply(429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0"})
        elif model == "always500":
            self.reply(500, b'{"error": {"message": "oops"}}', {})
        elif model == "garbage":
            self.reply(200, b"<html>not json</html>", {})
        elif model == "empty":
            self.reply(200, b'{"choices": []}', {})
        elif model == "tells":  # what it was sent, and what steers a terminal
            told = f"\x1b]0;owned\x07\x1b[31m\u202e no: {asked}, again {asked[-60:]}"
            self.reply(401, json.dumps({"error": {"message": told}}).encode(), {})
        elif model == "echoes":
            self.reply(200, answer(f"{self.headers['Authorization']} <answer>7</answer>"), {})
        elif model.startswith("odd-"):
            self.reply(200, ODD[model.removeprefix("odd-")], {})
        elif model.startswith("counts-"):
            body = json.loads(good)
            body["usage"]["completion_tokens"] = "COUNT"
            self.reply(200, json.dumps(body).replace('"COUNT"', model.removeprefix("counts-")).encode(), {})
        elif model == "closes":
            self.close_connection = True
        elif model == "silent":
            time.sleep(30)
        elif model == "spent":
            self.reply(429, b'{"error": {"message": "no money left", "code": "insufficient_quota"}}', {})
        elif model == "long":
            body = json.loads(good)
            body["choices"][0] |= {"finish_reason": "length", "message": {"reasoning_content": "hm", "content": None}}
            self.reply(200, json.dumps(body).encode(), {})
        elif model == "uncounted":
            body = json.loads(answer("\ud83d <answer>7</answer>"))
            del body["usage"]
            self.reply(200, json.dumps(body).encode(), {})
        elif model == "slow":
            time.sleep(1)
            self.reply(200, good, {})
        elif model == "unknown":
            self.reply(404, b'{"error": {"message": "no such model"}}', {})
        elif model == "dies" and total > 5:
            self.reply(500, b'{"error": {"message": "oops"}}', {})
        elif model == "reasons":
            body = json.loads(good)
            body["choices"][0]["message"]["reasoning_content"] = "3 + 4 = 7"
            self.reply(200, json.dumps(body).encode(), {})
        else:
            self.reply(200, good, {})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # of 5, a busy machine refuses some


if __name__ == "__main__":
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
