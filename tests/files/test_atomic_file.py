import pytest

from megabyte_jax.files.atomic_file import replacing


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
  target = tmp_path / "folder" / "file.txt"
  with replacing(target) as path:
    path.write_text("old")
  with pytest.raises(RuntimeError), replacing(target) as path:
    path.write_text("half")
    assert target.read_text() == "old"
    raise RuntimeError
  assert target.read_text() == "old"
  assert list(target.parent.iterdir()) == [target]
