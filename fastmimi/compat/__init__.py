"""Drop-in faces: the interfaces of transformers, moshi and rustymimi, thin over `fastmimi.Mimi`."""
