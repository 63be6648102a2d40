"""A server with vLLM's endpoints on loopback, which computes with transformers: what the library is compared with."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file


class TorchServer:
    """Holds models by name and answers like vLLM 0.32.

    asked: (path, body) of all requests. taken: factors of all adapters, by name. sampled: token ids, by the model's
    name. noise: on each logit. fails: What is answered next in the place of an answer. lacks: an endpoint that is not
    there.
    """

    def __init__(self, folder, noise=0.0):
        self.models = {"base": self._read(folder)}
        self.folder, self.noise, self.asked, self.lock = folder, noise, [], threading.Lock()
        self.fails, self.taken, self.sampled, self.lacks = [], {}, {}, None

    @staticmethod
    def _read(folder):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

    def answer(self, path, body):
        """(status, JSON)."""
        with self.lock:
            self.asked.append((path, body))
            if self.fails:
                return self.fails.pop(0)
            name = path.removeprefix("/v1").strip("/").replace("/", "_")
            return (404, {"detail": "Not Found"}) if name == self.lacks else getattr(self, name)(body)

    def completions(self, body):
        if body["model"] not in self.models:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}}
        model, tokens, log_probs = self.models[body["model"]], [], []
        generator = torch.Generator().manual_seed(body["seed"])
        while len(tokens) < body["max_tokens"] and not (tokens and tokens[-1] in body["stop_token_ids"]):
            with torch.no_grad():
                logits = model(torch.tensor([body["prompt"] + tokens])).logits[0, -1].double()
            logits = logits + self.noise * torch.randn(logits.shape, generator=generator, dtype=torch.double)
            chances = (logits / max(body["temperature"], 1e-6)).softmax(-1)
            token = int(torch.multinomial(chances, 1, generator=generator))
            tokens.append(token)
            log_probs.append(float(logits.log_softmax(-1)[token]))
        self.sampled.setdefault(body["model"], set()).add(tuple(tokens))
        reason = "stop" if tokens[-1] in body["stop_token_ids"] else "length"
        choice = {"token_ids": tokens, "logprobs": {"token_logprobs": log_probs}, "finish_reason": reason, "text": ""}
        return 200, {"choices": [choice]}

    def load_lora_adapter(self, body):
        """W + alpha / r B A of every adapted layer, by PEFT's names."""
        if body["lora_name"] in self.models:
            return 400, {"error": {"message": "already loaded", "code": 400}}
        folder, model = Path(body["lora_path"]), self._read(self.folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        factors = load_file(folder / "adapter_model.safetensors")
        for name in config["target_modules"]:
            a, b = (factors[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
            model.get_submodule(name).weight.data += config["lora_alpha"] / config["r"] * b @ a
        self.models[body["lora_name"]], self.taken[body["lora_name"]] = model, factors
        return 200, {}

    def unload_lora_adapter(self, body):
        del self.models[body["lora_name"]]
        return 200, {}

    def collective_rpc(self, body):
        assert body["method"] == "reload_weights"
        self.models["base"] = self._read(body["kwargs"]["weights_path"])
        return 200, {"results": [None]}

    def reset_prefix_cache(self, body):
        return 200, {"success": True}


@contextmanager
def serving(server):
    """The address of the server while it runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, answer = server.answer(self.path, json.loads(body))
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}"
    finally:
        http.shutdown()
        http.server_close()
