"""Reference implementations in readable PyTorch, one file per op: they define what each op computes.

Every kernel is tested against them. Import this package as `fastmimi.reference`, not as `reference`.
"""
