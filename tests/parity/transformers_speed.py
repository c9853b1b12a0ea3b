"""The speed of transformers' greedy generation, for the benchmark guide's comparison with `cyb-benchmark decode`.

It runs where torch and transformers are, not jax, and prints one JSON line for each batch size. The model has the shape
of SmolLM2-135M and fresh f32 parameters, because the speed doesn't depend on their values:

  .venv-parity/bin/python tests/parity/transformers_speed.py [--batch_sizes=1,8] [--new_tokens=128] [--repeats=3]

The same of cyb_jax, in mode none:

  cyb-benchmark decode --config=experiments/smollm2_reviews.py:baseline --config.decoder.preset=smollm2_135m
    --vocabulary=49152 --batch_sizes=1,8 --prompt_tokens=32 --new_tokens=128 --repeats=3
"""

import argparse
import json
import statistics
import time

import torch
import transformers

CONFIG = transformers.LlamaConfig(
  vocab_size=49152, num_hidden_layers=30, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
  intermediate_size=1536, rope_theta=100_000.0, tie_word_embeddings=True,
)  # fmt: skip


def seconds(model, tokens, new):
  """The time of one generation, which no end token stops."""
  start = time.perf_counter()
  found = model.generate(
    tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new, do_sample=False,
    pad_token_id=0,
  )  # fmt: skip
  assert found.shape == (tokens.shape[0], tokens.shape[1] + new)
  return time.perf_counter() - start


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--batch_sizes", default="1,8")
  parser.add_argument("--prompt_tokens", type=int, default=32)
  parser.add_argument("--new_tokens", type=int, default=128)
  parser.add_argument("--repeats", type=int, default=3)
  args = parser.parse_args()
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(CONFIG).eval()
  for size in map(int, args.batch_sizes.split(",")):
    tokens = torch.randint(0, CONFIG.vocab_size, (size, args.prompt_tokens))
    seconds(model, tokens, 4)
    first = statistics.median(seconds(model, tokens, 1) for _ in range(args.repeats))
    total = statistics.median(seconds(model, tokens, args.new_tokens) for _ in range(args.repeats))
    row = {
      "rows": size,
      "tokens_per_second": round(size * args.new_tokens / total, 2),
      "milliseconds_to_first_token": round(1000 * first, 1),
    }
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__, **row}), flush=True)


if __name__ == "__main__":
  main()
