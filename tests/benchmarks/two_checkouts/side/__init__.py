"""Files that run in a process of one checkout, and use nothing of it but its published surfaces.

They are not imported from here: `serve` is started by its path, with the checkout alone on Python's path.
"""
