"""Options and mixtures in one string: hand-written cases, round trips, and invalid input."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cyb_jax.errors import InputError
from cyb_jax.option_syntax import Item, parse_mixture, parse_options, written_mixture, written_options

OPTIONS = {
  "": {},
  "a=1": {"a": "1"},
  "a=1,b=x=y": {"a": "1", "b": "x=y"},
  r"pattern=/a\,b/*.txt,unit=line": {"pattern": "/a,b/*.txt", "unit": "line"},
  r"separator=\n": {"separator": r"\n"},
  r"path=C:\new\(1\)": {"path": r"C:\new(1)"},
  "pattern=x(1,2)": {"pattern": "x(1,2)"},
  " a = 1 ,": {"a": " 1 "},
}


@pytest.mark.parametrize("text", OPTIONS)
def test_options(text):
  assert parse_options("f", text) == OPTIONS[text]


MIXTURES = {
  "reviews:0.7,c4:.3": [("reviews", {}, 0.7), ("c4", {}, 0.3)],
  "reviews": [("reviews", {}, 1.0)],
  "jsonl(pattern=/x.jsonl,text_key=body):2, /stores/a:1": [
    ("jsonl", {"pattern": "/x.jsonl", "text_key": "body"}, 2.0),
    ("/stores/a", {}, 1.0),
  ],
  "seqio:mine:3,seqio:other": [("seqio:mine", {}, 3.0), ("seqio:other", {}, 1.0)],
  "gs://bucket/store:1e-1": [("gs://bucket/store", {}, 0.1)],
  r"jsonl(pattern=a\,b\(1\).jsonl)": [("jsonl", {"pattern": "a,b(1).jsonl"}, 1.0)],
  r"/a\,b:2": [("/a,b", {}, 2.0)],
}


@pytest.mark.parametrize("text", MIXTURES)
def test_mixtures(text):
  assert parse_mixture("f", text) == tuple(Item(*item) for item in MIXTURES[text])


# A backslash before a special character cannot be represented: it would be an escape.
values = st.text(alphabet="ab/.,():= ", max_size=8)
options = st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), values, max_size=3)


@given(options)
def test_written_options_round_trip(options):
  assert parse_options("f", written_options(options)) == options


@given(st.lists(st.tuples(st.sampled_from(["imdb", "/a,b(c)", "gs://x/y"]), options), min_size=1, unique_by=str))
def test_a_written_mixture_round_trips(sources):
  items = tuple(Item(name, given, 0.5 + number) for number, (name, given) in enumerate(sources))
  assert parse_mixture("f", written_mixture(items)) == items


@pytest.mark.parametrize(
  ("text", "part"),
  [
    ("", "contains no source"),
    ("a:0", "'0' of 'a:0' is not above 0"),
    ("a:-1", "'-1'"),
    ("a(x=1):nan", "'nan'"),
    ("a(x=1):much", "'much'"),
    ("a(x=1", "do not match"),
    ("a(x):1", "not of the form key=value"),
    ("a:1,a:2", "occurs twice"),
    ("a(b=1,b=2)", "'b' is given twice"),
  ],
)
def test_invalid_mixtures_are_rejected(text, part):
  with pytest.raises(InputError, match="f: ") as caught:
    parse_mixture("f", text)
  assert part in str(caught.value)


@pytest.mark.parametrize("text", ["a", "=1", "a=1,b"])
def test_invalid_options_are_rejected(text):
  with pytest.raises(InputError, match="not of the form key=value"):
    parse_options("f", text)
