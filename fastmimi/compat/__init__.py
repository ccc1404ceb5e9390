"""Drop-in replacements for the Mimi of transformers, moshi and rustymimi: thin wrappers around `fastmimi.Mimi`."""
