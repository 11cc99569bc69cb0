# SPDX-License-Identifier: Apache-2.0
"""Heads that draft from a model's hidden states (EAGLE, MTP), and how many of their drafts a model keeps.

A random head drafts nothing right. These are right by construction, nearly: the model has one layer, and the
head is that layer, given the next token's embedding as the model gives it, and a little of the hidden state
before. A head does not see a prompt's first token, and the little disturbs it: so some drafts are wrong.

What a head drafts is computed here with transformers' modules, all anew for each token: no cache, no batch.
An engine that keeps another number of drafts made them from a wrong state, token, position or cache.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from engine.families import FAMILIES
from engine.models import RANDOM_MODELS
from safetensors.torch import load_file, save_file
from torch import nn

HIDDEN_SHARE = 0.02
"""Size of the hidden state's part in a head's input; that of the embedding is 1."""


@dataclass(frozen=True)
class Head:
    """A model and what drafts for it. A row's input is the token after it, and the model's state at it."""

    model: Any
    """Of transformers."""
    block: Any
    """The head's own layer and norm, as a model of transformers without embeddings."""
    project: torch.Tensor
    """[hidden, 2 * hidden]: from embedding and state to what the layer gets."""
    skips_first: bool
    """The first row's embedding is taken for zeros."""

    @torch.inference_mode()
    def drafts(self, tokens: list[int], number: int) -> list[int]:
        """What it drafts after `tokens`, of which the model has computed all but the last."""
        ids = torch.tensor(tokens)
        rows = self._rows(ids[1:], self.model.model(ids[None, :-1]).last_hidden_state[0])
        if self.skips_first:
            rows[0] -= self.project[:, : rows.shape[1]] @ self.model.get_input_embeddings()(ids[1])
        drafted: list[int] = []
        while len(drafted) < number:
            state = self.block(inputs_embeds=rows[None]).last_hidden_state[0, -1:]
            token = self.model.lm_head(state).argmax(-1)
            drafted.append(int(token))
            rows = torch.cat((rows, self._rows(token, state)))
        return drafted

    @torch.inference_mode()
    def continued(self, prompt: list[int], number: int) -> list[int]:
        """The model's greedy tokens after `prompt`."""
        tokens = list(prompt)
        for _ in range(number):
            tokens.append(int(self.model(torch.tensor([tokens])).logits[0, -1].argmax()))
        return tokens[len(prompt) :]

    def drafted_and_kept(self, prompt: list[int], num_tokens: int, number: int) -> tuple[int, int]:
        """How many are drafted, `number` at a time, and kept, until `prompt` has `num_tokens` more."""
        # The last drafts may reach beyond them.
        output = self.continued(prompt, num_tokens + number)
        drafted = kept = 0
        done = 1
        while done < num_tokens:
            drafts = self.drafts(prompt + output[:done], number)
            right = [draft == token for draft, token in zip(drafts, output[done:], strict=False)]
            agreed = [*right, False].index(False)
            drafted += number
            kept += agreed
            done += agreed + 1
        return drafted, kept

    def _rows(self, tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return torch.cat((self.model.get_input_embeddings()(tokens), states), dim=-1) @ self.project.T


def save_with_eagle_head(folder: Path, head_folder: Path) -> Head:
    """Write a Llama and its head for EAGLE, which has no norms before its layer and after it."""
    model = _one_layer("LlamaConfig", RANDOM_MODELS["llama"].sizes)
    model.save_pretrained(folder)
    project = _projection(model)
    layer = {
        name.removeprefix("model."): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith("model.layers.0.") and "input_layernorm" not in name
    }
    _save(head_folder, _config(folder), layer | {"fc.weight": project})
    block = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model
    block.layers[0].input_layernorm = block.norm = nn.Identity()
    return Head(model, block, project, skips_first=False)


def save_with_next_token_layer(folder: Path) -> Head:
    """Write a DeepSeek-V3 with a layer that predicts the token after the next (MTP)."""
    sizes = FAMILIES["DeepseekV3ForCausalLM"].tiny.sizes | {"first_k_dense_replace": 0}
    model = _one_layer("DeepseekV3Config", sizes)
    model.save_pretrained(folder)
    project = _projection(model)
    tensors = load_file(folder / "model.safetensors")
    size, own, added = len(project), "model.layers.0.", "model.layers.1."
    tensors |= {added + name.removeprefix(own): t.clone() for name, t in tensors.items() if own in name}
    tensors |= {
        f"{added}embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        f"{added}shared_head.head.weight": tensors["lm_head.weight"].clone(),
        f"{added}shared_head.norm.weight": tensors["model.norm.weight"].clone(),
        f"{added}enorm.weight": torch.ones(size),
        f"{added}hnorm.weight": torch.ones(size),
        f"{added}eh_proj.weight": project,
    }
    _save(folder, _config(folder) | {"num_nextn_predict_layers": 1}, tensors)
    return Head(model, model.model, project, skips_first=True)


def _one_layer(config: str, sizes: dict[str, Any]) -> Any:
    """A random model whose embeddings and last states are as a norm leaves them."""
    torch.manual_seed(20)
    usual = {"vocab_size": 512, "max_position_embeddings": 512, "initializer_range": 0.25}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    configuration = getattr(transformers, config)(**usual | tokens | sizes | {"num_hidden_layers": 1})
    model = transformers.AutoModelForCausalLM.from_config(configuration, dtype=torch.float32).eval()
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings.copy_(nn.functional.rms_norm(embeddings, embeddings.shape[1:]))
    return model


def _projection(model: Any) -> torch.Tensor:
    size = model.config.hidden_size
    draw = torch.Generator().manual_seed(2)
    of_state = HIDDEN_SHARE * size**-0.5 * torch.randn(size, size, generator=draw)
    return torch.cat((torch.eye(size), of_state), dim=1)


def _config(folder: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((folder / "config.json").read_text())
    return config


def _save(folder: Path, config: dict[str, object], tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
