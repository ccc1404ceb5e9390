"""Training: the recipe of the Mimi paper (arXiv 2410.00037, sections 3.3 and 4.2), for any codec of the package.

`synthesis` generates training speech and `data` cuts it into windows. `quantizer`, `losses`, `discriminators` and
`distillation` are the parts of the recipe, `step` combines them into one training step, and `loop` runs the steps.
`evaluate` measures the result. Nothing that encodes or decodes imports this package; its additional dependencies are
installed with `pip install "fastmimi[train]"`.
"""
