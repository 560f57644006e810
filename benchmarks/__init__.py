"""Speed, memory and the comparison of methods.

As it measures them, this room alone may use the others: it runs ``eval`` by its command, or imports ``eval`` and
``demo`` lazily. Nothing imports it but its tests.
"""
