"""Training: the recipe of arXiv 2410.00037, sections 3.3 and 4.2, for any codec of the package.

synthesis makes speech to learn from; data cuts it into windows; quantizer, losses, discriminators and distillation are
the recipe's parts, step puts them together, loop runs it; evaluate measures what came out. Nothing that encodes or
decodes imports this package; what it needs beyond fastmimi installs with `pip install "fastmimi[train]"`.
"""
