"""What the tests of compression share."""

import pytest
from compressed_files import MEGABYTE, model_of

from megabyte_jax.generation import entropy_coding


@pytest.fixture(scope="module")
def model():
  return model_of(MEGABYTE)


@pytest.fixture
def always_coded(monkeypatch):
  """The models of these tests know nothing, and would have all stored."""
  monkeypatch.setattr(entropy_coding, "pays", lambda coded, stored: True)
