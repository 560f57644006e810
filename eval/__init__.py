"""Evaluation: ``python -m eval COMMAND``.

What stands left in this order never imports what stands right of it: options, results < subjects < drawing < judges <
measures < pages < __main__.
"""
