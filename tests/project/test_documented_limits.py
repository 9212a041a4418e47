"""Every limit that docs/data.md and docs/running.md name is the one that the code keeps."""

import re

import pytest
from run_commands import ROOT

from megabyte_jax.checkpoints import checkpoints
from megabyte_jax.commands import prepare
from megabyte_jax.config import CheckpointConfig, DataConfig
from megabyte_jax.data import file_handles, files, folders, pipes
from megabyte_jax.data.media import audio, image_decoding
from megabyte_jax.data.records import contents, parquet
from megabyte_jax.parallel import compilation_cache

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
# {document: (the words around a number, what the number must be)}; half a gigabyte and a quarter are words, too.
LIMITS = {
  "data": [
    (r"every byte of a file of up to (\d+) MiB", files._WHOLE_FILE / MIB),
    (r"and (\d+) KiB each at the beginning, in the middle", files._BLOCK / KIB),
    (r"With more than (\d+) files, only files of up to", files._WHOLE_TOTAL / files._WHOLE_FILE),
    (r"only files of up to (\d+) MiB divided by", files._WHOLE_TOTAL / MIB),
    (r"with more than ([\d,]+), only so many evenly spaced", files._SAMPLED_FILES),
    (r"Decoded records take at most (half) a gigabyte", {"half": parquet._KEPT == GIB // 2}),
    (r"up to (\d+) GiB of compressed bytes per source", contents.MOST / GIB),
    (r"is read once into memory, up to (\d+) GiB", pipes._MOST / GIB),
    (r"Folders may be nested (\d+) deep", folders._DEEPEST),
    (r"up to (\d+) links may lead", folders._MOST_VISITS),
    (r"more than `max_pixels` \(([\d,]+)\)", image_decoding.MAX_PIXELS),
    (r"more than (\d+) times as long by resampling", audio._MOST_LONGER),
    (r"keep open at most (\d+) files", file_handles._MOST),
    (r"at most a (quarter) of the process's limit", {"quarter": file_handles._SHARE == 4}),
    (
      r"`--sample-bytes` of the texts \(10\^(\d)",
      len(str(prepare.parse_arguments(["tokenizer", "a", "b", "--pieces=9"]).sample_bytes)) - 1,
    ),
  ],
  "running": [
    (r"at the next multiple of (\d+) steps", checkpoints._MULTI_PROCESS_CLOCK_STEPS),
    (r"a folder of its own of at most (\d+) GiB", compilation_cache.MOST_BYTES / GIB),
  ],
}


@pytest.mark.parametrize(("document", "words", "limit"), [(d, *one) for d, many in LIMITS.items() for one in many])
def test_a_documented_limit_is_the_codes_own(document, words, limit):
  found = re.findall(words.replace(" ", r"\s+"), (ROOT / f"docs/{document}.md").read_text())
  assert len(found) == 1, "the sentence has changed: change its words here, too"
  assert limit[found[0]] if isinstance(limit, dict) else float(found[0].replace(",", "")) == limit


def test_defaults_of_the_config_are_those_of_the_documents():
  assert DataConfig().max_pixels == image_decoding.MAX_PIXELS
  assert CheckpointConfig().keep == 2 and DataConfig().documents == "packed" and DataConfig().scan == "patch"
