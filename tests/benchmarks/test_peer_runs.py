"""Training of other packages' models: their rates, and that every byte is scored once."""

import sys

import pytest
from run_commands import ROOT

from megabyte_jax import ConfigError, Level, MegabyteConfig
from megabyte_jax.config import Config, DataConfig

sys.path.insert(0, str(ROOT / "benchmarks"))
import peer_runs
import peers

MODEL = MegabyteConfig(
  context=16, levels=tuple(Level(patch_size=size, width=8, num_layers=1, num_heads=1) for size in (4, 1))
)


def test_rates_rise_and_fall_as_the_packages_authors_let_them():
  half, quarter = (peer_runs.RULES[name] for name in ("MEGABYTE-pytorch", "SpaceByte"))
  assert [round(half.factor(step, 100), 4) for step in (0, 3, 4, 52, 99)] == [0.25, 1.0, 1.0, 0.5, 0.0003]
  assert [round(quarter.factor(step, 200), 4) for step in (0, 1, 100, 199)] == [0.5, 1.0, 0.7071, 0.0079]


def test_a_checkout_that_is_none_is_said(tmp_path):
  with pytest.raises(ConfigError, match="no checkout"):
    peers.spacebyte(MODEL, str(tmp_path))


def test_every_byte_of_every_document_is_scored_once(tmp_path):
  torch = pytest.importorskip("torch")
  (tmp_path / "a.txt").write_bytes(bytes(37))
  (tmp_path / "b.txt").write_bytes(bytes([1]) * 16)
  config = Config(model=MODEL, data=DataConfig(validation=str(tmp_path)), batch_size=1, num_steps=1)

  def nats(x_BT, scored_BT):  # of a document's own bytes 1 or 2
    return ((1.0 + x_BT) * scored_BT).sum()

  assert peer_runs.evaluate(config, nats, 3, torch.device("cpu")) == (37 + 2 * 16, 53)


def test_megabyte_pytorch_does_not_see_the_byte_that_it_predicts():
  torch = pytest.importorskip("torch")
  pytest.importorskip("MEGABYTE_pytorch")
  torch.manual_seed(0)
  made, nats = peer_runs.build("MEGABYTE-pytorch", MODEL, "")
  with torch.no_grad():
    for parameter in made.parameters():
      parameter *= 3  # far from uniform predictions
    x_BT = torch.randint(0, 256, (1, 16)).repeat(256, 1)
    x_BT[:, 5] = torch.arange(256)
    first_5, first_6 = (torch.arange(16)[None] < length for length in (5, 6))
    before = [float(nats(x_T[None], first_5)) for x_T in x_BT[:2]]
    assert before[0] == pytest.approx(before[1], abs=1e-4)  # what comes later changes nothing
    each = torch.stack([before[0] - nats(x_T[None], first_6) for x_T in x_BT])
  assert 0.05 < torch.exp(each).sum() < 1 + 1e-4  # the rest is the padding's
