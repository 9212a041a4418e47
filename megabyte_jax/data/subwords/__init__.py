"""Reads texts as subwords: pieces of a SentencePiece model that turn back into the very same bytes."""
