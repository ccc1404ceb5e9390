"""Readable PyTorch oracles, one file per op. Imported only as `fastmimi.reference`."""
