"""Packed folders that were changed, or that claim what they have not, are refused."""

import hashlib
import json

import numpy as np
import pytest
from packed_folders import PLAIN, pack, write_texts

from megabyte_jax.commands import prepare
from megabyte_jax.data.open_data import open_path
from megabyte_jax.errors import DataError


def test_packed_data_changed_afterwards_are_refused(tmp_path):
  pack(write_texts(tmp_path / "texts"), tmp_path / "p")
  data, first = tmp_path / "p" / "data.bin", open_path(str(tmp_path / "p"), PLAIN).fingerprint
  whole = data.read_bytes()
  data.write_bytes(whole[:50] + b"X" + whole[51:])
  assert open_path(str(tmp_path / "p"), PLAIN).fingerprint != first
  with pytest.raises(DataError, match=r"data\.bin has changed"):
    prepare.main(["verify", str(tmp_path / "p")])
  data.write_bytes(whole[:-1])
  with pytest.raises(DataError, match="330 bytes instead of 3 and 331"):
    open_path(str(tmp_path / "p"), PLAIN)
  data.unlink()
  with pytest.raises(DataError, match=r"data\.bin cannot be read"):
    open_path(str(tmp_path / "p"), PLAIN)
  (tmp_path / "p" / "manifest.json").write_text("{")
  with pytest.raises(DataError, match=r"manifest\.json is not JSON"):
    open_path(str(tmp_path / "p"), PLAIN)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("bytes", 10**15),
    ("bytes", 0),
    ("documents", 10**15),
    ("documents", 1),
    ("unit", 0),
    ("unit", 10**15),
    ("sha256", {}),
    ("sha256", {"../../secret": "0" * 64}),
  ],
)
def test_a_packed_folder_that_claims_what_it_has_not_is_not_whole(tmp_path, field, value):
  (tmp_path / "text").mkdir()
  for name in ("a", "b"):
    (tmp_path / "text" / name).write_bytes(b"some text, and more")
  prepare.main(["pack", str(tmp_path / "text"), str(tmp_path / "p")])
  path = tmp_path / "p" / "manifest.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
  for use in (lambda: prepare.main(["verify", str(tmp_path / "p")]), lambda: open_path(str(tmp_path / "p"), PLAIN)):
    with pytest.raises(DataError, match=f"{tmp_path}/p.*(instead of|units of|checksum)"):
      use()


@pytest.mark.parametrize("ends", [[30, 20, 38], [-5, 38], [0, 38], [19, 19, 38], [[19, 38]], [19.0, 38.0]])
def test_ends_of_documents_that_cannot_be_are_found_though_their_checksum_is_right(tmp_path, ends):
  (tmp_path / "text").write_bytes(bytes(range(38)))
  prepare.main(["pack", str(tmp_path / "text"), str(tmp_path / "p")])
  np.save(tmp_path / "p" / "ends.npy", np.array(ends))
  path = tmp_path / "p" / "manifest.json"
  manifest = json.loads(path.read_text())
  manifest["documents"] = np.size(ends)
  manifest["sha256"]["ends.npy"] = hashlib.sha256((tmp_path / "p" / "ends.npy").read_bytes()).hexdigest()
  path.write_text(json.dumps(manifest))
  for use in (lambda: prepare.main(["verify", str(tmp_path / "p")]), lambda: open_path(str(tmp_path / "p"), PLAIN)):
    with pytest.raises(DataError, match=r"not one after the other|instead of"):
      use()


def test_a_missing_name_is_found_by_verify(tmp_path):
  (tmp_path / "text").write_bytes(bytes(range(38)))
  prepare.main(["pack", str(tmp_path / "text"), str(tmp_path / "p")])
  (tmp_path / "p" / "names.txt").write_bytes(b"")
  path = tmp_path / "p" / "manifest.json"
  manifest = json.loads(path.read_text())
  manifest["sha256"]["names.txt"] = hashlib.sha256(b"").hexdigest()
  path.write_text(json.dumps(manifest))
  with pytest.raises(DataError, match=r"names\.txt has 0 names for 1 documents"):
    prepare.main(["verify", str(tmp_path / "p")])
