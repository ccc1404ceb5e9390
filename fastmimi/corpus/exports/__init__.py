"""One module per format of other libraries. Each has `write(table, count, target, on_progress)`.

`table` is a `CodesTable`, `count` the number of codebooks to write, `target` a file or an empty folder under a
temporary name; `on_progress` is called with the seconds of audio that were written. `../export.py` lists the formats.
"""
