"""A server that answers as vLLM does: `python ids_server.py ANSWERS`, with or without `return_token_ids`, `logprobs`.

ANSWERS is a JSON object: for each prompt a list of answers, given in the order in which they are asked for, each with
`text`, `finish_reason`, `token_ids`, `prompt_token_ids` and, if there are any, `logprobs`. It prints its port. The
model `strict` refuses the fields, `unlogged` only `logprobs`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

ANSWERS: dict[str, list[dict[str, Any]]] = json.loads(Path(sys.argv[1]).read_text())
SEEN: Counter[tuple[str, str]] = Counter()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model, prompt = request["model"], request["messages"][0]["content"]
        refused = {"strict": {"return_token_ids", "logprobs"}, "unlogged": {"logprobs"}}.get(model, set())
        if refused := refused & request.keys():
            self.reply(422, {"detail": f"Unexpected fields in the request: {refused}"})
            return
        number = SEEN[model, prompt]
        SEEN[model, prompt] += 1
        answer = ANSWERS[prompt][number]
        ids = request.get("return_token_ids", False)
        choice = {
            "index": 0,
            "finish_reason": answer["finish_reason"],
            "message": {"role": "assistant", "content": answer["text"]},
            "token_ids": answer["token_ids"] if ids else None,
        }
        if request.get("logprobs") and "logprobs" in answer:
            tokens = [{"token": "x", "bytes": None, "top_logprobs": [], "logprob": v} for v in answer["logprobs"]]
            choice["logprobs"] = {"content": tokens}
        usage = {"prompt_tokens": len(answer["prompt_token_ids"]), "completion_tokens": len(answer["token_ids"])}
        body = {"id": "x", "object": "chat.completion", "created": 0, "model": model, "choices": [choice]}
        body |= {"usage": {**usage, "total_tokens": sum(usage.values())}}
        self.reply(200, {**body, "prompt_token_ids": answer["prompt_token_ids"] if ids else None})

    def reply(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    server = HTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
