# SPDX-License-Identifier: Apache-2.0
"""The shortest program that generates text.

    python examples/offline.py MODEL PROMPT...

MODEL is a folder or a name on the Hugging Face hub. Where there is no NPU, put
`python -m vllm_ascend.emulator` in front.
"""

import sys

from vllm import LLM, SamplingParams


def main(model: str, prompts: list[str]) -> None:
    llm = LLM(model, max_model_len=1024)
    for request in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32)):
        print(f"{request.prompt!r} -> {request.outputs[0].text!r}")


# vLLM starts its processes afresh, and each of them reads this file again.
if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
