"""Serves a trained run: OpenAI's interface at /v1, and a page that shows where the model pauses at /.

cyb-serve --workdir=DIR [--port=8000]
cyb-serve --init_from=WEIGHTS
curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "The film was"}'

The server needs the extra `serve`. It ends after SIGTERM or Ctrl-C, when the running requests are complete, and prints
the numbers of tokens that it has generated as JSON.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from cyb_jax.cli import contexts, launching, models
from cyb_jax.errors import InputError

if TYPE_CHECKING:
  from cyb_jax.runs import Run
  from cyb_jax.serving.engine import Engine

_KEY_VARIABLE = "CYB_SERVE_API_KEY"
# Connections beyond those of the rows and the queue, for the page, health and metrics.
_SPARE_CONNECTIONS = 64


def define_flags() -> None:
  models.define_model_flags()
  flags.DEFINE_string("host", "127.0.0.1", "The address to listen on; only programs of this machine reach 127.0.0.1.")
  flags.DEFINE_integer("port", 8000, "The port to listen on; 0: any free port, which the log names.")
  flags.DEFINE_string(
    "api_key", None, f"The key that requests must have; not given: that of the environment variable {_KEY_VARIABLE}, or"
    " none."
  )  # fmt: skip
  flags.DEFINE_string("model_name", "", "The name of the model in the interface; '': the name of its folder or file.")
  flags.DEFINE_integer("rows", 16, "The number of continuations that are generated together.")
  flags.DEFINE_integer("queue", 256, "The largest number of continuations that wait; more requests are refused.")
  flags.DEFINE_integer("chunk", 4, "The number of iterations between which continuations join and leave the batch.")
  flags.DEFINE_integer("body_bytes", 2**20, "The largest size of the body of a request, in bytes.")
  flags.DEFINE_integer("drain_seconds", 30, "The time to complete the running requests after SIGTERM.")


def main(argv: Sequence[str]) -> dict[str, Any]:
  del argv
  args = flags.FLAGS
  for name in ("rows", "queue", "chunk", "body_bytes", "drain_seconds"):
    if args[name].value < 1:
      raise InputError(f"--{name}: {args[name].value} must be at least 1")
  if not 0 <= args.port < 2**16:
    raise InputError(f"--port: {args.port} must be in 0..65535")
  try:
    from cyb_jax.serving import server
  except ImportError as error:
    raise InputError(f"cyb-serve: {error.name} can't be imported; run pip install 'cyb_jax[serve]'") from None
  from cyb_jax.generation.abilities import can_pace_itself

  # The address is bound before the model is loaded, so that a port in use is reported quickly.
  bound = server.bind(args.host, args.port)
  try:
    run = models.load_model()
    if can_pace_itself(run.method):  # which the page lets it do
      contexts.warn_of_untrained_context(run.method, contexts.measured(args.workdir, run.step))
    return _serve(run, bound)
  finally:
    bound.close()


def _serve(run: Run, bound: Any) -> dict[str, Any]:
  from cyb_jax.serving import server
  from cyb_jax.serving.app import Limits, build_app
  from cyb_jax.serving.engine import Engine
  from cyb_jax.serving.protocol import Model

  args = flags.FLAGS
  engine = Engine(run, rows=args.rows, queue=args.queue, chunk=args.chunk)
  key = os.environ.get(_KEY_VARIABLE, "") if args.api_key is None else args.api_key
  limits = Limits(api_key=key, hosts=server.host_names(bound), body_bytes=args.body_bytes)
  model = Model(run, _name(), engine.context, engine.default_mode, max_rows=args.queue)
  app = build_app(engine, model, limits)
  logging.info("compiling for %d rows", args.rows)
  engine.start()
  if not key and not server.is_loopback(bound):
    logging.warning("--host: everyone who reaches %s can use the model; --api_key restricts this", args.host)
  connections = args.rows + args.queue + _SPARE_CONNECTIONS

  def ready() -> None:
    address = server.address_of(bound)
    logging.info("%s: the page is http://%s/ and the interface http://%s/v1", model.name, address, address)

  server.Server(app, bound, drain_seconds=args.drain_seconds, connections=connections, ready=ready).run()
  engine.close(drain=False)
  return _summary(run, engine)


def _name() -> str:
  args = flags.FLAGS
  return args.model_name or pathlib.PurePath(args.workdir or args.init_from).name or "model"


def _summary(run: Run, engine: Engine) -> dict[str, Any]:
  stats = engine.stats
  return {
    "method": run.config.method.name,
    "step": run.step,
    "prompt_tokens": stats.prompt_tokens,
    "tokens": stats.tokens,
    "mean_pauses": stats.pauses / stats.tokens if stats.tokens else None,
    "finished": stats.finished,
    "cancelled": stats.cancelled,
    "failed": stats.failed,
  }


def run() -> None:
  """Console script."""
  define_flags()
  launching.launch(main, interrupted="ended before the server was ready; the same command starts it again")


if __name__ == "__main__":
  run()
