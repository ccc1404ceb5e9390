"""Many streams at once: pools of streams, and a server built on one.

slots.py steps streams by number, pool.py has an object for each stream and queues; neither depends on a server.
"""
