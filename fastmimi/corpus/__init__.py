"""Corpora: audio of any amount to tables of codes, batched without changing a code, and what follows from them."""
