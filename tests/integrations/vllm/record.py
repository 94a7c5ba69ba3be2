"""Write tests/data/vllm_prompt_logprobs.json: what a real server and the model itself say of three sequences.

    $ PYTHONPATH=.:python build/integrations/vllm/bin/python tests/integrations/vllm/record.py DTYPE URL

DTYPE, float32 or bfloat16, is what the server computes in; the file's cases of the other one are kept.
"""

import json
import sys
from pathlib import Path

import torch

import pruneopd_kernels as po
from pruneopd_kernels.integrations import vllm
from pruneopd_kernels.integrations.server import Request, Server
from pruneopd_kernels.integrations.topk import Asked
from pruneopd_lab.students import load_teacher, smollm2_folder

FILE = Path(__file__).parents[2] / "data" / "vllm_prompt_logprobs.json"
K = 4
TEXTS = (  # a prompt and a response, the last of which is none that the model would have written
    ("The capital of France is", " Paris, and it is"),
    ("1, 2, 3, 4,", " 5, 6, 7"),
    ("She opened the door and", " purple naïvely €42"),
)


def main():
    dtype, url = sys.argv[1:]
    model, tokenizer = load_teacher(smollm2_folder())
    recorded = json.loads(FILE.read_text()) if FILE.exists() else {"k": K, "vocab_size": len(tokenizer), "cases": []}
    recorded["cases"] = [case for case in recorded["cases"] if case["dtype"] != dtype]
    for texts in TEXTS:
        prompt, response = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
        payload = vllm._payload("teacher", Asked(0, "a text", prompt, response, K))
        request = Request("a text", payload, lambda answer: answer)
        [answer] = Server(url).ask("record", "/v1/completions", [request])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[:, len(prompt) - 1 : -1]
        stats = po.token_stats(logits, logits, token_ids=torch.tensor([response]), k=K)
        recorded["cases"].append({
            "dtype": dtype, "prompt": prompt, "response": response, "payload": payload,
            "prompt_logprobs": answer["choices"][0]["prompt_logprobs"],
            "model": {
                "topk_ids": stats.teacher_topk_ids[0].tolist(),
                "topk_logprobs": stats.teacher_topk_logprobs[0].tolist(),
                "token_logprobs": stats.teacher_token_logprob[0].tolist(),
            },
        })  # fmt: skip
    FILE.parent.mkdir(exist_ok=True)
    cases = ",\n".join(json.dumps(case) for case in recorded["cases"])
    FILE.write_text(f'{{"k": {K}, "vocab_size": {recorded["vocab_size"]}, "cases": [\n{cases}\n]}}\n')


if __name__ == "__main__":
    main()
