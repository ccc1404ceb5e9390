"""Weights from and to files: transformers' layout and Kyutai's."""
