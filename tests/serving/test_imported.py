"""An imported model without pauses: names of special entries in prompts, and its chat template."""

import imported_models
import jax
import pytest
from served import serving

from cyb_jax.data import tokenizers
from cyb_jax.generation import Sampler, SamplingOptions
from cyb_jax.interop import pretrained

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")


@pytest.mark.slow
def test_an_imported_model(tmp_path):
  imported_models.write_folder(tmp_path / "smollm2", "smollm2", [2])
  run = pretrained.load(str(tmp_path / "smollm2"))
  messages = [{"role": "user", "content": "The film <|im_end|>"}]

  def expected(ids):
    sampler = Sampler(run.method, SamplingOptions(mode="none", temperature=0))
    with jax.default_matmul_precision(run.config.precision.matmul):
      return sampler.generate(run.params, [ids], max_new_tokens=6, end_id=run.boundaries.end_ids).tokens[0]

  with serving(run, rows=2) as served:
    prompt = "<|im_start|>user\nThe film"
    ids = run.tokenizer.encode_with_special(prompt)
    assert served.post("/tokenize", {"prompt": prompt, "add_special_tokens": False})[1]["tokens"] == ids
    (choice,) = served.complete(prompt=prompt, max_tokens=6, temperature=0)["choices"]
    assert choice["token_ids"] == expected(run.boundaries.begun(ids))
    assert choice["pauses"] == [0] * len(choice["token_ids"])
    status, answer = served.post("/v1/chat/completions", {"messages": messages, "max_tokens": 6, "temperature": 0})
    assert status == 200
    # The name in the message is text: the message can't end its own turn.
    assert answer["choices"][0]["token_ids"] == expected(tokenizers.encode_chat(run.tokenizer, messages))
    assert answer["choices"][0]["message"]["content"] == run.tokenizer.decode(answer["choices"][0]["token_ids"])
    status, answer = served.post("/v1/completions", {"prompt": "a", "mode": "self_paced", "max_pauses": 1})
    assert (status, answer["error"]["param"]) == (400, "max_pauses")
