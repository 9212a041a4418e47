"""Table 3 (and 8): word-level perplexity on PG-19 after 400 billion bytes.

  python train.py --config=configs/paper/table3.py:megabyte --workdir=runs/table3/megabyte
  python eval.py --workdir=runs/table3/megabyte --split=test --method=both --words=pg19
  python -m megabyte_jax prepare tokenizer data/pg19/train data/pg19/tokenizer.model
  python train.py --config=configs/paper/table3.py:transformer_xl --workdir=runs/table3/transformer_xl

The Transformer slides by half its window; Fig. 4 of the paper has it slide by 512 bytes: --stride=512.

The paper's perplexities, with bits per byte of the test set derived from them:

                 validation  test   bpb (test)
  transformer    81.6        69.4   1.032
  perceiver_ar   119.1       88.8   1.092
  megabyte       42.8        36.4   0.875

The other rows are the subword systems that the paper quotes, and a subword Transformer;
megabyte_jax/paper/subword_rows.py says what their papers leave open and what is taken instead.
"""

from megabyte_jax.paper import rows, subword_rows

ROWS = {
  "transformer": rows.with_method(rows.text_transformer("pg19", context=2048, train_bytes=rows.LONG_BYTES), "sliding"),
  "perceiver_ar": rows.text_perceiver_ar("pg19", train_bytes=rows.LONG_BYTES),
  "megabyte": rows.text_megabyte("pg19", (2048, 24), (1024, 24), train_bytes=rows.LONG_BYTES, method="both"),
  "transformer_xl": subword_rows.transformer_xl(),
  "compressive_transformer": subword_rows.compressive_transformer(),
  "block_recurrent": subword_rows.block_recurrent(),
  "subword_perceiver_ar": subword_rows.perceiver_ar(),
  "subword_transformer": subword_rows.transformer(),
}


def get_config(name=""):
  return rows.select(ROWS, name)
