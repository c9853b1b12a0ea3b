"""The reference of config fields: it is complete, and each field has a meaning and accepted values."""

import dataclasses
from typing import ClassVar

import pytest

from cyb_jax import configs, methods
from cyb_jax.configs import documentation
from cyb_jax.configs.documentation import FieldDoc, field_reference
from cyb_jax.configs.parsing import GROUPS
from cyb_jax.configs.validation import RULES
from cyb_jax.decoder import PRESETS
from cyb_jax.decoder.config import RULES as DECODER_RULES
from cyb_jax.errors import InputError


def by_path(method=None):
  return {field.path: field for field in field_reference(method)}


@pytest.mark.parametrize("field", field_reference(), ids=lambda field: f"{field.path}-{'-'.join(field.methods)}")
def test_every_field_has_a_meaning_and_accepted_values(field):
  assert len(field.meaning.split()) >= 3, field
  assert field.type
  assert field.default
  assert field.allowed
  assert "\n" not in field.meaning + field.allowed
  # Readers of the command line don't know the code's files, and a meaning must not continue the name of the field.
  assert "this file" not in field.meaning
  assert not field.meaning.startswith("of ")


def test_every_field_of_a_config_is_listed():
  config = configs.default().to_dict()
  fields = {name for name, value in config.items() if not isinstance(value, dict)}
  fields |= {f"{group}.{name}" for group, values in config.items() if isinstance(values, dict) for name in values}
  assert set(by_path()) == fields
  assert set(documentation.groups()) == {name for name, value in config.items() if isinstance(value, dict)}
  assert all(documentation.groups().values())


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_has_only_its_own_options(name):
  fields = [field for field in field_reference(name) if field.group == "method"]
  assert [field.name for field in fields] == ["name", *methods.option_names(name)]
  assert all(field.methods == (name,) for field in fields[1:])


def test_an_unknown_method_is_an_error():
  with pytest.raises(InputError, match=r"method\.name: 'cby' is unknown; did you mean 'cyb'\?"):
    field_reference("cby")


def test_hand_values():
  found = by_path("ponderlm2")
  assert found["optimizer.clip_norm"] == FieldDoc(
    group="optimizer",
    name="clip_norm",
    type="float",
    default="1.0",
    meaning="the global gradient norm is clipped to this value; 0: no clipping.",
    allowed="not negative; 0 means no clipping",
  )
  assert found["method.jacobi"].type == "ints a:b:c"
  assert found["method.jacobi"].default == "'2:3'"
  assert found["method.pauses"].default == "1"
  assert by_path("ponderlm3")["method.pauses"].default == "3"
  assert by_path("cyb")["method.dont_know_prior"].type == "float or None"
  assert found["decoder.soft_cap"].allowed == "positive; None: the preset's value"
  assert found["init_from"].group == ""


def test_options_that_methods_share_are_listed_once():
  shared = [field for field in field_reference() if field.path == "method.pause_input"]
  assert [field.methods for field in shared] == [("tbys", "cyb", "constant_stop", "mean_slots")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Base:
  """A base.

  Attributes:
    first: has a meaning
      of two lines: with a colon.
    second: is replaced.

  Raises:
    third: is no attribute.
  """

  first: int = 0
  second: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Derived(_Base):
  """A class.

  Attributes:
    second: is its own.
  """

  name: ClassVar[str] = "derived"


def test_attributes_sections():
  assert documentation.attribute_meanings(_Derived) == {
    "first": "has a meaning of two lines: with a colon.",
    "second": "is its own.",
  }


@pytest.mark.parametrize("name", methods.METHODS)
def test_defaults_are_accepted(name):
  config = methods.config_class(name)
  for option, rule in config.rules().items():
    assert rule.accepts(config.__dataclass_fields__[option].default), option


@pytest.mark.parametrize("group", GROUPS)
def test_defaults_of_groups_are_accepted_and_every_field_has_a_rule(group):
  fields = {field.name: field.default for field in dataclasses.fields(GROUPS[group])}
  assert set(RULES[group]) == set(fields)
  assert all(rule.accepts(fields[name]) for name, rule in RULES[group].items())


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_option_of_a_method_has_a_rule(name):
  assert sorted(methods.config_class(name).rules()) == methods.option_names(name)


@pytest.mark.parametrize("name", PRESETS)
def test_every_field_of_a_decoder_has_a_rule(name):
  assert set(DECODER_RULES) == {field.name for field in dataclasses.fields(PRESETS[name])} - {"lora"}
  assert all(rule.accepts(getattr(PRESETS[name], field)) for field, rule in DECODER_RULES.items())
